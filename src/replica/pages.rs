//! Job: a base copy's account at the replica: what may come next, what its guard is asked, and the position that opens its epoch.
//! Input: the message that opens the copy, the position, the ranges of its pages. Output: verdicts, positions, a `CopyAck`.
//! Pure: no clock, no I/O.
//! Always true: nothing is written before the guard passed; pages come in order and without a hole, since what lies between two of them
//! would be neither copied nor deleted.

use super::next;
use super::plan::{CopyPolicy, GuardCase, GuardCount, guard_verdict};
use crate::model::{
    ClusterId, Digest, Epoch, KeyRange, LinkName, Phase, Position, Ranges, Revision, Seq, Term, Waymark,
};
use crate::wire::digest;
use crate::wire::parts::after_key;
use crate::wire::replicate::CopyAck;
use crate::wire::replicate::refusal::Kind;
use bytes::Bytes;

/// What opens a copy.
#[derive(Debug, Clone)]
pub struct Begin {
    pub epoch: Epoch,
    pub term: Term,
    pub origin_cluster: ClusterId,
    pub anchor: Revision,
    pub waymark: Waymark,
    pub allow_deletes: bool,
    pub origin_empty: bool,
    pub guard_pass: bool,
    pub keys_total: u64,
    pub resume: bool,
    pub deletes_share_max: f64,
    /// Either side knows of a link back over the range.
    pub link_back: bool,
    /// What is here stays, and a repair brings what differs: there are no pages.
    pub repair: bool,
}

impl Begin {
    /// A position of a later sender, which this copy must not write over.
    pub fn check_claim(&self, position: Option<&Position>) -> Result<(), Refused> {
        match position.filter(|p| (self.epoch, self.term) < (p.epoch, p.term)) {
            None => Ok(()),
            Some(p) => Err((Kind::Fenced, format!("the position is at epoch {}, term {} already", p.epoch, p.term))),
        }
    }

    /// The position that opens the epoch.
    pub fn first_position(&self, ranges: &Ranges, state: Phase, cursor: Option<Bytes>) -> Position {
        Position {
            epoch: self.epoch,
            term: self.term,
            seq: Seq(0),
            origin_cluster: self.origin_cluster,
            origin_revision: self.anchor,
            carried_revision: Revision(0),
            carried_digest: Digest::default(),
            waymark: self.waymark,
            ranges_digest: digest::of_ranges(ranges),
            state,
            anchor_revision: self.anchor,
            cursor,
            part: 0,
            part_digest: None,
            skipped: Vec::new(),
            held_back: None,
            paused: None,
            equal_revision: Revision(0),
        }
    }
}

/// Why a step is not done: it ends the stream.
pub type Refused = (Kind, String);

/// Which place in the copy a step takes.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    Begin,
    /// A page of keys, or of keys and values.
    Page(&'a KeyRange),
    End,
}

/// What follows the message that opens a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// Every key below the cursor is copied already.
    GoesOn { cursor: Bytes },
    /// The origin's keys come first, to be counted.
    Counts,
    /// Nothing is to be counted: the guard decides at once.
    Opens,
}

/// A copy under way.
pub struct Copying {
    begin: Begin,
    replica_empty: bool,
    first_copy: bool,
    /// What the keys pages before the last one came to.
    counted: GuardCount,
    /// Where the next page begins; `None`: there are no more.
    expects: Option<Bytes>,
    pub ack: CopyAck,
}

impl Copying {
    /// `replica_empty`: the replica holds no key of the ranges.
    pub fn begin(
        begin: Begin,
        position: Option<&Position>,
        ranges: &Ranges,
        replica_empty: bool,
    ) -> Result<(Self, Begun), Refused> {
        let ranges_digest = digest::of_ranges(ranges);
        let same =
            position.is_some_and(|p| p.origin_cluster == begin.origin_cluster && p.ranges_digest == ranges_digest);
        let cursor = position.filter(|p| p.epoch == begin.epoch).and_then(|p| p.cursor.clone());
        let mut copying = Self {
            replica_empty,
            first_copy: !same,
            counted: GuardCount::default(),
            expects: next::first_page(ranges),
            ack: CopyAck::default(),
            begin,
        };
        if copying.begin.resume {
            let Some(cursor) = cursor else {
                return Err((Kind::PositionMoved, "the position holds no copy to go on with".to_owned()));
            };
            copying.ack.guard_passed = true;
            copying.expects = next::page_from(ranges, &cursor);
            return Ok((copying, Begun::GoesOn { cursor }));
        }
        let Begin { guard_pass, origin_empty, link_back, .. } = copying.begin;
        if guard_pass && !replica_empty {
            return Ok((copying, Begun::Counts));
        }
        if !guard_pass && !origin_empty && !link_back && !replica_empty {
            // The range was empty at the hello and is not any more: a new hello makes the guard's pass.
            return Err((Kind::PositionMoved, "somebody wrote into the empty range meanwhile".to_owned()));
        }
        Ok((copying, Begun::Opens))
    }

    pub fn policy(&self) -> CopyPolicy {
        CopyPolicy { creates_only: self.begin.link_back }
    }

    /// Whether a step may be done now. Once the epoch is open, each needs the position to be in it still: after a doubt it may have been
    /// restored, or another copy may have taken over.
    pub fn check(&self, position: Option<&Position>, place: Place<'_>) -> Result<(), Refused> {
        let in_place = match place {
            Place::Begin => return Ok(()),
            Place::Page(range) => self.expects.as_ref() == Some(&range.from),
            Place::End => self.expects.is_none(),
        };
        let (sender, ends) = ((self.begin.epoch, self.begin.term), matches!(place, Place::End));
        let ours = position.is_some_and(|p| next::copy_goes_on(p, sender, &self.ack.cursor, ends));
        if self.ack.guard_passed && !ours {
            return Err((Kind::PositionMoved, "the position is no longer that of this base copy".to_owned()));
        }
        if !in_place {
            return Err((Kind::Gap, "a page of the base copy is missing: say hello again".to_owned()));
        }
        Ok(())
    }

    /// The account so far; a step that fails is done again, so it changes by [`Self::counted`] once the whole step is done.
    pub fn count(&self) -> GuardCount {
        self.counted
    }

    pub fn counted(&mut self, counted: GuardCount) {
        self.counted = counted;
    }

    /// The origin has no keys: a count of the replica's is the account.
    pub fn deletes_all(&self) -> bool {
        self.begin.origin_empty
    }

    pub fn guard(&self, link: &LinkName, counted: &GuardCount) -> Result<(), Refused> {
        let case = GuardCase {
            link: link.clone(),
            first_copy: self.first_copy,
            origin_empty: self.begin.origin_empty,
            replica_empty: self.replica_empty,
            deletes_share_max: self.begin.deletes_share_max,
            allow_deletes: self.begin.allow_deletes,
            link_back: self.begin.link_back,
        };
        guard_verdict(counted, &case).map_err(|stop| (Kind::Guard, stop.to_string()))
    }

    /// The position past the guard: nothing is copied yet.
    pub fn first_position(&self, ranges: &Ranges) -> Position {
        let cursor = next::first_page(ranges).unwrap_or_default();
        self.begin.first_position(ranges, Phase::Copying, Some(cursor))
    }

    /// The first position was written: pages with values come now.
    pub fn opened(&mut self, ranges: &Ranges) {
        self.ack.guard_passed = true;
        self.expects = next::first_page(ranges);
    }

    /// A page was dealt with; after a guard's last one the epoch is open, and [`Self::opened`] has said what comes.
    pub fn passed(&mut self, ranges: &Ranges, page: &KeyRange, opened: bool) {
        if !opened {
            self.expects = next::page_after(ranges, &page.to);
        }
        self.ack.pages += 1;
    }
}

/// Whether a step may be done now; where no copy is under way, only the one that begins it may.
pub fn check(copying: Option<&Copying>, position: Option<&Position>, place: Place<'_>) -> Result<(), Refused> {
    match (copying, place) {
        (Some(copying), place) => copying.check(position, place),
        (None, Place::Begin) => Ok(()),
        (None, Place::Page(_) | Place::End) => {
            Err((Kind::Gap, "the base copy was not begun: say hello again".to_owned()))
        }
    }
}

/// Up to where a read of the replica reached, that was to reach `to`. `last`: its last key; `more`: there are more than it has.
pub fn read_edge(more: bool, last: Option<&Bytes>, to: &Bytes) -> Bytes {
    match last {
        Some(last) if more => after_key(last),
        _ => to.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges() -> Ranges {
        Ranges::from_pieces(vec![KeyRange::prefix(b"/a/"), KeyRange::prefix(b"/c/")]).unwrap()
    }

    fn page(from: &'static str, to: &'static str) -> KeyRange {
        KeyRange { from: from.into(), to: to.into() }
    }

    fn begin() -> Begin {
        Begin {
            epoch: Epoch(4),
            term: Term(2),
            origin_cluster: ClusterId(7),
            anchor: Revision(100),
            waymark: Waymark::default(),
            allow_deletes: false,
            origin_empty: false,
            guard_pass: false,
            keys_total: 10,
            resume: false,
            deletes_share_max: 0.1,
            link_back: false,
            repair: false,
        }
    }

    fn kind_of<T>(refused: Result<T, Refused>) -> Option<Kind> {
        refused.err().map(|(kind, _)| kind)
    }

    fn begun(begin: Begin, position: Option<&Position>, replica_empty: bool) -> Result<Begun, Kind> {
        Copying::begin(begin, position, &ranges(), replica_empty).map(|(_, begun)| begun).map_err(|(kind, _)| kind)
    }

    #[test]
    fn what_the_replica_holds_decides_whether_keys_are_counted_first() {
        assert_eq!(begun(begin(), None, true), Ok(Begun::Opens));
        assert_eq!(begun(Begin { guard_pass: true, ..begin() }, None, true), Ok(Begun::Opens));
        assert_eq!(begun(Begin { guard_pass: true, ..begin() }, None, false), Ok(Begun::Counts));
        assert_eq!(begun(begin(), None, false), Err(Kind::PositionMoved), "somebody wrote meanwhile");
        for begin in [Begin { origin_empty: true, ..begin() }, Begin { link_back: true, ..begin() }] {
            assert_eq!(begun(begin, None, false), Ok(Begun::Opens));
        }
    }

    #[test]
    fn a_copy_goes_on_only_at_the_cursor_of_its_own_epoch() {
        let resume = Begin { resume: true, ..begin() };
        let at = |epoch, cursor| Position { epoch, ..begin().first_position(&ranges(), Phase::Copying, cursor) };
        let cursor = Some(Bytes::from_static(b"/a/5"));
        let here = at(Epoch(4), cursor.clone());
        assert_eq!(
            begun(resume.clone(), Some(&here), false),
            Ok(Begun::GoesOn { cursor: Bytes::from_static(b"/a/5") })
        );
        for other in [Some(at(Epoch(3), cursor)), Some(at(Epoch(4), None)), None] {
            assert_eq!(begun(resume.clone(), other.as_ref(), false), Err(Kind::PositionMoved));
        }
        let (copying, _) = Copying::begin(resume, Some(&here), &ranges(), false).unwrap();
        assert_eq!(copying.check(Some(&here), Place::Page(&page("/a/5", "/a/7"))), Ok(()));
        assert_eq!(kind_of(copying.check(Some(&here), Place::Page(&page("/a/", "/a/7")))), Some(Kind::Gap));
    }

    #[test]
    fn pages_come_in_order_without_a_hole_and_the_end_after_the_last() {
        let (mut copying, _) = Copying::begin(begin(), None, &ranges(), true).unwrap();
        copying.opened(&ranges());
        let position = copying.first_position(&ranges());
        let check = |copying: &Copying, place| kind_of(copying.check(Some(&position), place));
        let pages = [page("/a/", "/a/5"), page("/a/5", "/a0"), page("/c/", "/c0")];
        for (at, next) in pages.iter().enumerate() {
            for (other, page) in pages.iter().enumerate() {
                let refused = (other != at).then_some(Kind::Gap);
                assert_eq!(check(&copying, Place::Page(page)), refused, "{other} where {at} must come");
            }
            assert_eq!(check(&copying, Place::End), Some(Kind::Gap));
            assert_eq!(check(&copying, Place::Begin), None);
            copying.passed(&ranges(), next, false);
        }
        assert_eq!(check(&copying, Place::End), None);
        assert_eq!(check(&copying, Place::Page(&pages[2])), Some(Kind::Gap));
        assert_eq!(copying.ack.pages, 3);
    }

    #[test]
    fn keys_pages_come_before_the_guard_and_all_ranges_again_after_it() {
        let (mut copying, begun) =
            Copying::begin(Begin { guard_pass: true, ..begin() }, None, &ranges(), false).unwrap();
        assert_eq!(begun, Begun::Counts);
        assert_eq!(copying.check(None, Place::Page(&page("/a/", "/a0"))), Ok(()), "there is no position yet");
        copying.passed(&ranges(), &page("/a/", "/a0"), false);
        copying.opened(&ranges());
        copying.passed(&ranges(), &page("/c/", "/c0"), true);
        let position = copying.first_position(&ranges());
        assert_eq!(copying.check(Some(&position), Place::Page(&page("/a/", "/a0"))), Ok(()));
        assert_eq!(kind_of(copying.check(None, Place::Page(&page("/a/", "/a0")))), Some(Kind::PositionMoved));
        let theirs = Position { term: Term(3), ..position };
        assert_eq!(kind_of(copying.check(Some(&theirs), Place::Page(&page("/a/", "/a0")))), Some(Kind::PositionMoved));
    }

    #[test]
    fn a_first_copy_and_a_later_one_of_the_same_origin_are_told_apart() {
        let counted = GuardCount { origin_keys: 100, replica_keys: 100, deletes: 1 };
        let link = LinkName::new("config").unwrap();
        let verdict = |position: Option<&Position>| {
            let (copying, _) =
                Copying::begin(Begin { guard_pass: true, ..begin() }, position, &ranges(), false).unwrap();
            kind_of(copying.guard(&link, &counted))
        };
        let before = begin().first_position(&ranges(), Phase::Following, None);
        assert_eq!(verdict(Some(&before)), None);
        assert_eq!(verdict(None), Some(Kind::Guard));
        assert_eq!(verdict(Some(&Position { origin_cluster: ClusterId(8), ..before.clone() })), Some(Kind::Guard));
        assert_eq!(verdict(Some(&Position { ranges_digest: Digest::default(), ..before })), Some(Kind::Guard));
    }

    #[test]
    fn what_belongs_to_a_copy_that_was_not_begun_is_refused_and_its_end_too() {
        let position = begin().first_position(&ranges(), Phase::Copying, Some(Bytes::from_static(b"/a/")));
        assert_eq!(check(None, Some(&position), Place::Begin), Ok(()));
        for place in [Place::Page(&page("/a/", "/a0")), Place::End] {
            assert_eq!(kind_of(check(None, Some(&position), place)), Some(Kind::Gap), "{place:?}");
        }
    }

    #[test]
    fn a_later_senders_position_is_not_written_over() {
        let position = begin().first_position(&ranges(), Phase::Following, None);
        assert_eq!(begin().check_claim(None), Ok(()));
        assert_eq!(begin().check_claim(Some(&position)), Ok(()));
        let later = Begin { term: Term(1), ..begin() };
        assert_eq!(kind_of(later.check_claim(Some(&position))), Some(Kind::Fenced));
    }

    #[test]
    fn a_read_that_found_more_ends_behind_its_last_key() {
        let (last, to) = (Bytes::from_static(b"/a/5"), Bytes::from_static(b"/a0"));
        assert_eq!(read_edge(true, Some(&last), &to), Bytes::from_static(b"/a/5\0"));
        assert_eq!(read_edge(false, Some(&last), &to), to);
        assert_eq!(read_edge(true, None, &to), to);
    }
}
