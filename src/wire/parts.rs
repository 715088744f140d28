//! Job: what two sides tell each other of their keys, so that they find which differ: digests of parts, of sub-parts, of values.
//! Input: keys and values of one range, in key order; what the other side said of the same range. Output: digests, narrower ranges, keys.
//! Pure: no clock, no I/O.
//! Always true: two ranges with equal digests hold the same keys and values; every key that differs is in what is left at each level.

use super::digest::{cut, update_bytes, update_len};
use crate::model::{Digest, KeyRange};
use bytes::Bytes;

const PART_DOMAIN: &str = "etcd-ferry part v1";
const VALUE_DOMAIN: &str = "etcd-ferry value v1";

/// Keys of a part: so many digests are 36 bytes for each megabyte of keys with values of 1 KiB.
pub const PART_KEYS: usize = 1_000;
/// Keys of a sub-part: the square root of a part's, so that a single key that differs costs about 32 digests twice.
pub const SUB_KEYS: usize = 32;

/// A range with what one side holds in it.
#[derive(Clone, PartialEq, Eq)]
pub struct Part {
    pub range: KeyRange,
    pub keys: u64,
    pub digest: Digest,
}

/// Never shows a key: logs may hold what this prints.
impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Part({} keys, {})", self.keys, self.digest)
    }
}

/// Digests the keys and values of one range, fed in key order.
pub struct PartHasher {
    hasher: blake3::Hasher,
    keys: u64,
}

impl PartHasher {
    pub fn new() -> Self {
        Self { hasher: blake3::Hasher::new_derive_key(PART_DOMAIN), keys: 0 }
    }

    pub fn add(&mut self, key: &[u8], value: &[u8]) {
        update_bytes(&mut self.hasher, key);
        update_bytes(&mut self.hasher, value);
        self.keys += 1;
    }

    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// How many keys, and the digest of all of them with their values.
    pub fn finish(mut self) -> (u64, Digest) {
        let keys = usize::try_from(self.keys).unwrap_or(usize::MAX);
        update_len(&mut self.hasher, keys);
        (self.keys, cut(&self.hasher))
    }
}

impl Default for PartHasher {
    fn default() -> Self {
        Self::new()
    }
}

/// 64 bits of a value: enough beside its key, where a part's 128 bits have said already that something differs.
pub fn of_value(value: &[u8]) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key(VALUE_DOMAIN);
    hasher.update(value);
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// Digests a range as a whole and in sub-parts of [`SUB_KEYS`] keys, in one pass.
pub struct Splitter {
    range: KeyRange,
    whole: PartHasher,
    sub: PartHasher,
    sub_from: Bytes,
    subs: Vec<Part>,
}

impl Splitter {
    pub fn new(range: KeyRange) -> Self {
        let sub_from = range.from.clone();
        Self { range, whole: PartHasher::new(), sub: PartHasher::new(), sub_from, subs: Vec::new() }
    }

    pub fn add(&mut self, key: &Bytes, value: &[u8]) {
        if self.sub.keys() == SUB_KEYS as u64 {
            self.end_sub(key.clone());
        }
        self.whole.add(key, value);
        self.sub.add(key, value);
    }

    pub fn keys(&self) -> u64 {
        self.whole.keys()
    }

    fn end_sub(&mut self, to: Bytes) {
        let (keys, digest) = std::mem::take(&mut self.sub).finish();
        let from = std::mem::replace(&mut self.sub_from, to.clone());
        self.subs.push(Part { range: KeyRange { from, to }, keys, digest });
    }

    /// The whole range, and its sub-parts: without holes, from its start to its end.
    pub fn finish(mut self) -> (Part, Vec<Part>) {
        let to = self.range.to.clone();
        self.end_sub(to);
        let (keys, digest) = self.whole.finish();
        (Part { range: self.range, keys, digest }, self.subs)
    }
}

/// Finds where the other side's sub-parts differ from what this side holds, fed in key order; values are not kept.
pub struct Narrower {
    subs: std::vec::IntoIter<Part>,
    /// The sub-part that the next key may lie in, what it holds here, and this side's keys of it.
    at: Option<Part>,
    own: PartHasher,
    keys: Vec<(Bytes, u64)>,
    lists: Vec<KeyList>,
}

impl Narrower {
    /// `theirs` are without holes, and in order: see [`tile`].
    pub fn new(theirs: Vec<Part>) -> Self {
        let mut subs = theirs.into_iter();
        let at = subs.next();
        Self { subs, at, own: PartHasher::new(), keys: Vec::new(), lists: Vec::new() }
    }

    pub fn add(&mut self, key: &Bytes, value: &[u8]) {
        while self.at.as_ref().is_some_and(|sub| !sub.range.to.is_empty() && *key >= sub.range.to) {
            self.end_sub();
        }
        self.own.add(key, value);
        self.keys.push((key.clone(), of_value(value)));
    }

    fn end_sub(&mut self) {
        let Some(sub) = std::mem::replace(&mut self.at, self.subs.next()) else { return };
        let keys = std::mem::take(&mut self.keys);
        if std::mem::take(&mut self.own).finish() == (sub.keys, sub.digest) {
            return;
        }
        match self.lists.last_mut() {
            Some(last) if last.range.to == sub.range.from => {
                last.range.to = sub.range.to;
                last.keys.extend(keys);
            }
            _ => self.lists.push(KeyList { range: sub.range, keys }),
        }
    }

    /// The ranges that differ, each with all of this side's keys in it. Sub-parts that touch are joined.
    pub fn finish(mut self) -> Vec<KeyList> {
        while self.at.is_some() {
            self.end_sub();
        }
        self.lists
    }
}

/// True if the parts cover the range without holes, each key once.
pub fn tile(parts: &[Part], range: &KeyRange) -> bool {
    let ends = parts.first().is_some_and(|p| p.range.from == range.from)
        && parts.last().is_some_and(|p| p.range.to == range.to);
    let inner = parts.windows(2).all(|pair| {
        let edge = &pair[0].range.to;
        *edge == pair[1].range.from && !edge.is_empty()
    });
    ends && inner && parts.iter().all(|p| p.range.to.is_empty() || p.range.from < p.range.to)
}

/// All keys that one side holds in a range, in key order, each with 64 bits of its value.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyList {
    pub range: KeyRange,
    pub keys: Vec<(Bytes, u64)>,
}

/// Never shows a key: logs may hold what this prints.
impl std::fmt::Debug for KeyList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyList({} keys)", self.keys.len())
    }
}

/// In what a key differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// Only the origin has it.
    Missing,
    /// Only the replica has it.
    Extra,
    OtherValue,
}

/// A key that differs, with what either side's value digests to: two looks at the same difference are told by it.
#[derive(Clone, PartialEq, Eq)]
pub struct DifferingKey {
    pub key: Bytes,
    pub difference: Difference,
    /// Of both values; 0 where there is none.
    pub values: (u64, u64),
}

/// Never shows a key: logs may hold what this prints.
impl std::fmt::Debug for DifferingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DifferingKey({} B, {:?})", self.key.len(), self.difference)
    }
}

/// The keys in which two lists of one range differ, in key order.
pub fn differing_keys(origin: &[(Bytes, u64)], replica: &[(Bytes, u64)]) -> Vec<DifferingKey> {
    let (mut origin, mut replica) = (origin.iter().peekable(), replica.iter().peekable());
    let mut found = Vec::new();
    loop {
        let side = match (origin.peek(), replica.peek()) {
            (Some((ours, _)), Some((theirs, _))) => ours.cmp(theirs),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (None, None) => return found,
        };
        let ours = if side.is_le() { origin.next() } else { None };
        let theirs = if side.is_ge() { replica.next() } else { None };
        let (key, difference, values) = match (ours, theirs) {
            (Some((_, ours)), Some((_, theirs))) if ours == theirs => continue,
            (Some((key, ours)), Some((_, theirs))) => (key, Difference::OtherValue, (*ours, *theirs)),
            (Some((key, ours)), None) => (key, Difference::Missing, (*ours, 0)),
            (None, Some((key, theirs))) => (key, Difference::Extra, (0, *theirs)),
            (None, None) => continue,
        };
        found.push(DifferingKey { key: key.clone(), difference, values });
    }
}

/// The part of `items` (in key order) whose keys lie in `range`.
pub fn part_of<'a, T>(items: &'a [T], range: &KeyRange, key: impl Fn(&T) -> &Bytes) -> &'a [T] {
    let start = items.partition_point(|item| *key(item) < range.from);
    let end = if range.to.is_empty() { items.len() } else { items.partition_point(|item| *key(item) < range.to) };
    &items[start.min(end)..end]
}

/// The least key above `key`.
pub fn after_key(key: &[u8]) -> Bytes {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    Bytes::from(next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    type Content = BTreeMap<Bytes, Bytes>;

    fn whole() -> KeyRange {
        KeyRange { from: Bytes::new(), to: Bytes::new() }
    }

    #[test]
    fn the_part_of_a_list_that_lies_in_a_range_ends_before_its_end() {
        let keys: Vec<Bytes> = ["/a/1", "/a/5", "/a/7"].map(Bytes::from).to_vec();
        let part = |from: &'static str, to: &'static str| {
            part_of(&keys, &KeyRange { from: from.into(), to: to.into() }, |key| key).len()
        };
        assert_eq!([part("/a/", "/a/5"), part("/a/5", "/a/5\0"), part("/a/5", ""), part("/b", "/c")], [1, 1, 2, 0]);
        assert_eq!(after_key(b"/a/5"), "/a/5\0");
    }

    fn numbered(count: usize) -> Content {
        (0..count).map(|n| (Bytes::from(format!("/app/{n:06}")), Bytes::from(format!("value {n}")))).collect()
    }

    fn lists(theirs: Vec<Part>, own: &Content) -> Vec<KeyList> {
        let mut narrower = Narrower::new(theirs);
        own.iter().for_each(|(key, value)| narrower.add(key, value));
        narrower.finish()
    }

    fn split(content: &Content) -> (Part, Vec<Part>) {
        let mut splitter = Splitter::new(whole());
        content.iter().for_each(|(key, value)| splitter.add(key, value));
        splitter.finish()
    }

    /// All three levels, as two sides go through them: what the replica splits, the origin narrows, and the replica names.
    fn narrowed(origin: &Content, replica: &Content) -> Vec<DifferingKey> {
        let (ours, _) = split(origin);
        let (theirs, subs) = split(replica);
        if ours == theirs {
            return Vec::new();
        }
        let lists = lists(subs, origin);
        let present: Vec<(Bytes, u64)> = replica.iter().map(|(k, v)| (k.clone(), of_value(v))).collect();
        let found =
            lists.iter().flat_map(|list| differing_keys(&list.keys, part_of(&present, &list.range, |(key, _)| key)));
        found.collect()
    }

    fn expected(origin: &Content, replica: &Content) -> Vec<(Bytes, Difference)> {
        let keys: BTreeSet<&Bytes> = origin.keys().chain(replica.keys()).collect();
        let of = |key: &&Bytes| match (origin.get(*key), replica.get(*key)) {
            (Some(ours), Some(theirs)) => (ours != theirs).then_some(Difference::OtherValue),
            (Some(_), None) => Some(Difference::Missing),
            (None, _) => Some(Difference::Extra),
        };
        keys.into_iter().filter_map(|key| of(&key).map(|difference| (key.clone(), difference))).collect()
    }

    #[test]
    fn the_digest_of_a_known_part_never_changes_since_two_versions_compare_by_it() {
        let mut hasher = PartHasher::new();
        hasher.add(b"/a", b"1");
        hasher.add(b"/b", b"");
        let (keys, digest) = hasher.finish();
        assert_eq!((keys, digest.to_string().as_str()), (2, "01786e2f207789d3ad5367961076dbfc"));
        assert_eq!(format!("{:016x}", of_value(b"1")), "a138f9fc99ecfc1f");
    }

    #[test]
    fn parts_that_differ_in_anything_have_different_digests() {
        let forms: [&[(&str, &str)]; 6] =
            [&[], &[("a", "bc")], &[("ab", "c")], &[("abc", "")], &[("a", ""), ("bc", "")], &[("a", "b"), ("c", "")]];
        let digest = |form: &&[(&str, &str)]| {
            let mut hasher = PartHasher::new();
            form.iter().for_each(|(key, value)| hasher.add(key.as_bytes(), value.as_bytes()));
            hasher.finish()
        };
        let digests: BTreeSet<(u64, Digest)> = forms.iter().map(digest).collect();
        assert_eq!(digests.len(), forms.len());
    }

    #[test]
    fn sub_parts_have_no_holes_and_reach_from_the_start_of_the_range_to_its_end() {
        for count in [0, 1, SUB_KEYS, SUB_KEYS + 1, PART_KEYS] {
            let (part, subs) = split(&numbered(count));
            assert_eq!(part.keys, count as u64);
            assert_eq!(subs.iter().map(|sub| sub.keys).sum::<u64>(), count as u64);
            assert!(subs.iter().all(|sub| sub.keys <= SUB_KEYS as u64));
            assert!(tile(&subs, &whole()));
            assert_eq!(subs.len(), count.div_ceil(SUB_KEYS).max(1));
        }
    }

    /// Each key of a part in turn, changed, deleted, and added beside.
    #[test]
    fn a_single_difference_anywhere_is_narrowed_to_one_sub_part_and_named() {
        let origin = numbered(200);
        for key in origin.keys() {
            let mut changed = origin.clone();
            changed.insert(key.clone(), Bytes::from_static(b"other"));
            let mut deleted = origin.clone();
            deleted.remove(key);
            let mut added = origin.clone();
            added.insert(after_key(key), Bytes::new());
            for replica in [&changed, &deleted, &added] {
                let (_, subs) = split(replica);
                let lists = lists(subs, &origin);
                assert_eq!(lists.len(), 1);
                assert!(lists[0].keys.len() <= 2 * SUB_KEYS, "{}", lists[0].keys.len());
                let found: Vec<_> = narrowed(&origin, replica).into_iter().map(|d| (d.key, d.difference)).collect();
                assert_eq!(found, expected(&origin, replica));
            }
        }
    }

    #[test]
    fn parts_with_a_hole_an_overlap_or_another_end_do_not_tile_a_range() {
        let range = |from: &'static str, to: &'static str| KeyRange { from: from.into(), to: to.into() };
        let parts = |ranges: &[(&'static str, &'static str)]| -> Vec<Part> {
            let part = |range| Part { range, keys: 0, digest: Digest::default() };
            ranges.iter().map(|(from, to)| part(range(from, to))).collect()
        };
        assert!(tile(&parts(&[("a", "c"), ("c", "")]), &range("a", "")));
        for bad in [&[][..], &[("a", "b"), ("c", "")], &[("a", "c"), ("b", "")], &[("a", "c")], &[("", "")]] {
            assert!(!tile(&parts(bad), &range("a", "")), "{bad:?}");
        }
        assert!(!tile(&parts(&[("a", ""), ("", "")]), &range("a", "")), "nothing comes after the end of the keyspace");
        assert!(!tile(&parts(&[("a", "a"), ("a", "b")]), &range("a", "b")), "an empty range");
    }

    #[test]
    fn sub_parts_that_touch_are_asked_about_as_one() {
        let (origin, replica) = (numbered(SUB_KEYS * 4), Content::new());
        let (_, subs) = split(&origin);
        let lists = lists(subs, &replica);
        assert_eq!(lists.len(), 1);
        assert_eq!(lists[0].range, whole());
    }

    fn content() -> impl Strategy<Value = Content> {
        let value = prop::collection::vec(any::<u8>(), 0..3).prop_map(Bytes::from);
        prop::collection::btree_map("[a-d]{1,4}".prop_map(Bytes::from), value, 0..150)
    }

    proptest! {
        #[test]
        fn the_keys_named_are_those_that_differ_and_no_other(origin in content(), replica in content()) {
            let found: Vec<_> = narrowed(&origin, &replica).into_iter().map(|d| (d.key, d.difference)).collect();
            prop_assert_eq!(found, expected(&origin, &replica));
        }

        #[test]
        fn a_few_differences_among_many_keys_are_named(
            origin in content(), changes in prop::collection::btree_map("[a-d]{1,4}", any::<Option<u8>>(), 0..4),
        ) {
            let mut replica = origin.clone();
            for (key, change) in changes {
                match change {
                    Some(byte) => _ = replica.insert(Bytes::from(key), Bytes::from(vec![byte])),
                    None => _ = replica.remove(key.as_bytes()),
                }
            }
            let found: Vec<_> = narrowed(&origin, &replica).into_iter().map(|d| (d.key, d.difference)).collect();
            prop_assert_eq!(found, expected(&origin, &replica));
        }

        #[test]
        fn two_looks_at_the_same_difference_are_the_same_and_at_a_moved_one_are_not(ours: u8, theirs: u8, later: u8) {
            prop_assume!(ours != theirs && later != ours && later != theirs);
            let one = |byte: u8| Content::from([(Bytes::from_static(b"k"), Bytes::from(vec![byte]))]);
            let first = narrowed(&one(ours), &one(theirs));
            prop_assert_eq!(&first, &narrowed(&one(ours), &one(theirs)));
            prop_assert_ne!(&first, &narrowed(&one(ours), &one(later)));
        }
    }
}
