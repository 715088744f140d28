//! Job: the set of keys that a link carries.
//! Input: prefixes and excludes. Output: ranges of keys, sorted and apart.
//! Pure: no clock, no I/O, no async.
//! Always true: `Ranges` never contain a key under `/etcd-ferry/`.

use super::{FERRY_PREFIX, LINKS_PREFIX};
use bytes::Bytes;
use std::fmt;

/// Keys from `from` up to, not including, `to`; an empty `to` means to the end of the keyspace.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyRange {
    pub from: Bytes,
    pub to: Bytes,
}

impl fmt::Debug for KeyRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.from.escape_ascii(), self.to.escape_ascii())
    }
}

/// For people: as the prefix that it is, if it is one.
impl fmt::Display for KeyRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (self.from.escape_ascii(), self.to.escape_ascii());
        match (self.from.is_empty(), self.to.is_empty()) {
            (true, true) => f.write_str("all keys"),
            (true, false) => write!(f, "all keys before {to}"),
            (false, _) if self.to == prefix_end(&self.from) => write!(f, "the prefix {from}"),
            (false, true) => write!(f, "all keys from {from} on"),
            (false, false) => write!(f, "the keys from {from} to {to}, without the latter"),
        }
    }
}

impl KeyRange {
    /// All keys that start with `prefix` (etcd's prefix rule: the end is the prefix with its last byte below 0xff raised).
    pub fn prefix(prefix: &[u8]) -> Self {
        Self { from: Bytes::copy_from_slice(prefix), to: prefix_end(prefix) }
    }

    pub fn contains(&self, key: &[u8]) -> bool {
        key >= &self.from[..] && (self.to.is_empty() || key < &self.to[..])
    }

    pub fn overlaps(&self, other: &KeyRange) -> bool {
        (self.to.is_empty() || other.from < self.to) && (other.to.is_empty() || self.from < other.to)
    }

    /// `range_end` as etcd's API wants it: a single zero byte stands for the end of the keyspace.
    pub fn etcd_end(&self) -> Vec<u8> {
        if self.to.is_empty() { vec![0] } else { self.to.to_vec() }
    }

    /// `key` as etcd's API wants it: a single zero byte stands for the start of the keyspace.
    pub fn etcd_from(&self) -> Vec<u8> {
        if self.from.is_empty() { vec![0] } else { self.from.to_vec() }
    }
}

fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return Bytes::from(end);
        }
    }
    Bytes::new()
}

/// The set of keys that a link carries: prefixes less excludes, and never [`FERRY_PREFIX`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges {
    /// Disjoint, not touching, in key order.
    pieces: Vec<KeyRange>,
}

/// For people: one after the other.
impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ferry = KeyRange::prefix(FERRY_PREFIX);
        let mut pieces = self.pieces.iter().peekable();
        let mut comma = "";
        while let Some(piece) = pieces.next() {
            // A link's configuration names no such hole.
            match pieces.next_if(|next| piece.to == ferry.from && next.from == ferry.to) {
                Some(next) => {
                    let whole = KeyRange { from: piece.from.clone(), to: next.to.clone() };
                    write!(f, "{comma}{whole} (but etcd-ferry's own)")?;
                }
                None => write!(f, "{comma}{piece}")?,
            }
            comma = ", ";
        }
        Ok(())
    }
}

impl Ranges {
    /// No prefix means the whole keyspace.
    pub fn new(prefixes: &[Bytes], excludes: &[Bytes]) -> Self {
        let whole = [Bytes::new()];
        let prefixes = if prefixes.is_empty() { &whole[..] } else { prefixes };
        let mut pieces: Vec<KeyRange> = prefixes.iter().map(|p| KeyRange::prefix(p)).collect();
        pieces.sort();
        let mut merged: Vec<KeyRange> = Vec::new();
        for piece in pieces {
            match merged.last_mut() {
                Some(last) if last.to.is_empty() || piece.from <= last.to => {
                    if piece.to.is_empty() || (!last.to.is_empty() && piece.to > last.to) {
                        last.to = piece.to;
                    }
                }
                _ => merged.push(piece),
            }
        }
        let ferry = Bytes::from_static(FERRY_PREFIX);
        for exclude in excludes.iter().chain([&ferry]) {
            merged = subtract(merged, &KeyRange::prefix(exclude));
        }
        Self { pieces: merged }
    }

    /// From pieces that came over the wire: sorted, disjoint and non-empty, or `None`.
    pub fn from_pieces(pieces: Vec<KeyRange>) -> Option<Self> {
        let ordered = pieces.windows(2).all(|w| !w[0].to.is_empty() && w[0].to <= w[1].from);
        let ferry = KeyRange::prefix(FERRY_PREFIX);
        let valid = pieces.iter().all(|p| (p.to.is_empty() || p.from < p.to) && !p.overlaps(&ferry));
        (ordered && valid && !pieces.is_empty()).then_some(Self { pieces })
    }

    pub fn pieces(&self) -> &[KeyRange] {
        &self.pieces
    }

    pub fn contains(&self, key: &[u8]) -> bool {
        let after = self.pieces.partition_point(|p| &p.from[..] <= key);
        after > 0 && self.pieces[after - 1].contains(key)
    }

    pub fn overlaps(&self, other: &Ranges) -> bool {
        self.pieces.iter().any(|a| other.pieces.iter().any(|b| a.overlaps(b)))
    }

    /// True if every key of `other` is a key of `self`.
    pub fn covers(&self, other: &Ranges) -> bool {
        other.pieces.iter().all(|b| {
            self.pieces.iter().any(|a| a.from <= b.from && (a.to.is_empty() || (!b.to.is_empty() && b.to <= a.to)))
        })
    }

    /// The smallest single range over all pieces and [`LINKS_PREFIX`]: what the one watcher of a link watches.
    pub fn covering(&self) -> KeyRange {
        let links = KeyRange::prefix(LINKS_PREFIX);
        let mut from = links.from;
        let mut to = links.to;
        for piece in &self.pieces {
            from = from.min(piece.from.clone());
            to = if to.is_empty() || piece.to.is_empty() { Bytes::new() } else { to.max(piece.to.clone()) };
        }
        KeyRange { from, to }
    }
}

fn subtract(pieces: Vec<KeyRange>, hole: &KeyRange) -> Vec<KeyRange> {
    let mut left = Vec::new();
    for piece in pieces {
        if !piece.overlaps(hole) {
            left.push(piece);
            continue;
        }
        if piece.from < hole.from {
            left.push(KeyRange { from: piece.from.clone(), to: hole.from.clone() });
        }
        if !hole.to.is_empty() && (piece.to.is_empty() || hole.to < piece.to) {
            left.push(KeyRange { from: hole.to.clone(), to: piece.to });
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(prefixes: &[&'static str], excludes: &[&'static str]) -> Ranges {
        let bytes = |texts: &[&'static str]| texts.iter().map(|text| Bytes::from(*text)).collect::<Vec<_>>();
        Ranges::new(&bytes(prefixes), &bytes(excludes))
    }

    fn piece(from: &'static str, to: &'static str) -> KeyRange {
        KeyRange { from: Bytes::from(from), to: Bytes::from(to) }
    }

    #[test]
    fn a_prefix_ends_where_its_last_byte_that_can_be_raised_is() {
        let end = |prefix: &[u8]| KeyRange::prefix(prefix).to;
        assert_eq!((&end(b"/a/")[..], &end(b"/a\xff\xff")[..]), (&b"/a0"[..], &b"/b"[..]));
        assert!(end(b"\xff\xff").is_empty() && end(b"").is_empty(), "the end of the keyspace");
        let (all, last) = (KeyRange::prefix(b""), KeyRange::prefix(b"\xff"));
        assert!(all.contains(b"") && last.contains(b"\xff\xff") && !last.contains(b"\xfe"));
        assert_eq!((all.etcd_from(), all.etcd_end()), (vec![0], vec![0]));
    }

    #[test]
    fn people_read_prefixes_where_there_are_such() {
        let shown = |prefixes, excludes| ranges(prefixes, excludes).to_string();
        assert_eq!(shown(&["/app/", "/b/"], &[]), "the prefix /app/, the prefix /b/");
        assert_eq!(shown(&["\u{7f}"], &[]), "the prefix \\x7f");
        assert_eq!(shown(&["/a", "/b"], &[]), "the keys from /a to /c, without the latter");
        assert_eq!(shown(&[], &[]), "all keys (but etcd-ferry's own)");
        assert_eq!(
            shown(&["/"], &["/a/"]),
            "the keys from / to /a/, without the latter, the keys from /a0 to 0, without the latter (but etcd-ferry's own)"
        );
        assert_eq!(shown(&["/"], &[]), "the prefix / (but etcd-ferry's own)");
        assert_eq!(shown(&[], &["/etcd-ferry0"]), "all keys before /etcd-ferry/, all keys from /etcd-ferry1 on");
        assert_eq!(KeyRange::prefix(b"").to_string(), "all keys");
        assert_eq!(KeyRange::prefix(b"\xff").to_string(), "the prefix \\xff");
    }

    #[test]
    fn prefixes_within_each_other_or_side_by_side_are_one_piece_whatever_their_order() {
        assert_eq!(ranges(&["/a/b/", "/a/"], &[]).pieces(), [piece("/a/", "/a0")]);
        assert_eq!(ranges(&["/b", "/a"], &[]).pieces(), [piece("/a", "/c")]);
        assert_eq!(ranges(&["/c", "/a"], &[]).pieces(), [piece("/a", "/b"), piece("/c", "/d")]);
    }

    #[test]
    fn what_is_excluded_and_the_ferrys_own_keys_are_in_no_piece() {
        assert_eq!(ranges(&["/a/"], &["/a/x/"]).pieces(), [piece("/a/", "/a/x/"), piece("/a/x0", "/a0")]);
        let all = ranges(&[], &[]);
        assert_eq!(all.pieces(), [piece("", "/etcd-ferry/"), piece("/etcd-ferry0", "")]);
        assert!(all.contains(b"/etcd-ferry") && !all.contains(b"/etcd-ferry/v1/links/a/position"));
        assert!(ranges(&["/etcd-ferry/v1/"], &[]).pieces().is_empty());
    }

    #[test]
    fn pieces_of_a_peer_are_taken_only_if_they_are_such_as_ranges_have() {
        let taken = |pieces: &[KeyRange]| Ranges::from_pieces(pieces.to_vec()).is_some();
        let (a, b, rest) = (piece("/a", "/b"), piece("/c", "/d"), piece("/f", ""));
        assert!(taken(&[a.clone(), b.clone(), rest.clone()]));
        assert!(!taken(&[]), "none");
        assert!(!taken(&[b.clone(), a.clone()]), "out of order");
        assert!(!taken(&[a.clone(), piece("/aa", "/c")]), "overlapping");
        assert!(!taken(&[rest, piece("/g", "/h")]), "after the end of the keyspace");
        assert!(!taken(&[piece("/b", "/b")]) && !taken(&[piece("/b", "/a")]), "empty");
        assert!(!taken(&[piece("/etcd", "/etce")]) && !taken(&[piece("/a", "")]), "over the ferry's own keys");
    }

    #[test]
    fn ranges_cover_what_lies_in_them_and_overlap_what_shares_a_key() {
        let (wide, narrow, beside) = (ranges(&["/a/"], &["/a/x/"]), ranges(&["/a/b/"], &[]), ranges(&["/a0"], &[]));
        assert!(wide.covers(&narrow) && !narrow.covers(&wide) && wide.overlaps(&narrow) && narrow.overlaps(&wide));
        assert!(!wide.covers(&ranges(&["/a/"], &[])) && !wide.overlaps(&ranges(&["/a/x/"], &[])));
        assert!(!wide.overlaps(&beside) && !wide.covers(&beside), "an end is outside");
        assert!(ranges(&[], &[]).covers(&wide) && !wide.covers(&ranges(&[], &[])));
    }

    #[test]
    fn the_one_watch_of_a_link_covers_its_pieces_and_the_positions_of_all_links() {
        assert_eq!(ranges(&["/a/", "/b/"], &[]).covering(), piece("/a/", "/etcd-ferry/v1/links0"));
        assert_eq!(ranges(&["/x/"], &[]).covering(), piece("/etcd-ferry/v1/links/", "/x0"));
        assert_eq!(ranges(&[], &[]).covering(), piece("", ""));
    }
}
