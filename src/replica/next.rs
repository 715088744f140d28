//! Job: which position comes after the one that is held, and who may write it.
//! Input: positions, a settled transaction, the origin's word on its progress, a hello's epoch and term. Output: the next position; a verdict.
//! Pure: no clock, no I/O.
//! Always true: a position names a revision as carried only when all of it is in.

use super::plan::{Extent, Settled};
use crate::model::{ClusterId, Digest, Epoch, Phase, Position, Ranges, Revision, Seq, Term, Waymark};
use bytes::Bytes;

/// The position that goes into a settled transaction. `carried`: its last revision, with its digest.
pub fn after_settled(position: &Position, settled: &Settled, carried: (Revision, Digest)) -> Position {
    let mut next = position.clone();
    match settled.extent {
        Extent::Part { to, of, .. } if to < of => (next.part, next.part_digest) = (to, Some(carried.1)),
        Extent::Part { .. } | Extent::Whole => {
            next.seq = settled.seq;
            next.origin_revision = carried.0;
            (next.carried_revision, next.carried_digest) = carried;
            (next.part, next.part_digest) = (0, None);
            next.held_back = next.held_back.filter(|held| held.seq > settled.seq);
        }
    }
    next
}

/// The position that goes on without the revision that comes next.
pub fn after_skipped(position: &Position, seq: Seq, carried: (Revision, Digest)) -> Position {
    let held_back = position.held_back.filter(|held| held.seq > seq);
    let mut next = Position { seq, origin_revision: carried.0, held_back, ..position.clone() };
    (next.part, next.part_digest) = (0, None);
    (next.carried_revision, next.carried_digest) = carried;
    next.skipped.push(seq);
    next
}

/// The position that does not say any more that it went on without a revision.
pub fn without_skipped(position: &Position, seq: Seq) -> Position {
    let mut next = position.clone();
    next.skipped.retain(|skipped| *skipped != seq);
    next
}

/// How many of the waiting revisions a settled transaction brings in as wholes.
pub fn revisions_done(settled: &Settled) -> usize {
    match settled.extent {
        Extent::Part { to, of, .. } if to < of => 0,
        Extent::Part { .. } | Extent::Whole => settled.revisions,
    }
}

/// What every position gets before it is written: the origin's waymark, and `following` once a base copy's last page is passed. In one epoch
/// the waymark only grows: an older one is a late word of another sender, or that of an origin that was restored meanwhile, which the next
/// hello must be able to tell. `proved`: the replica's revision at which both sides were equal, to be told to other sidecars; 0: none.
pub fn to_write(mut next: Position, waymark: Waymark, proved: Revision) -> Position {
    next.equal_revision = next.equal_revision.max(proved);
    if waymark.counter > next.waymark.counter {
        next.waymark = waymark;
    }
    if next.state == Phase::Copying && next.cursor.is_none() && next.origin_revision >= next.anchor_revision {
        next.state = Phase::Following;
    }
    next
}

/// The origin's word that everything of the link up to `through` has seq `after` or less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Idle {
    pub through: Revision,
    pub after: Seq,
    /// The origin asks to have it written.
    pub persist: bool,
}

/// The position without a change, where it is to be written: when the origin asks for it, and when a base copy's last page is passed.
pub fn after_idle(position: &Position, idle: Idle) -> Option<Position> {
    let Idle { through, after, persist } = idle;
    let ends_copy = position.state == Phase::Copying && through >= position.anchor_revision;
    let moves = ends_copy || (persist && through > position.origin_revision);
    let origin_revision = through.max(position.origin_revision);
    (position.seq >= after && moves).then(|| Position { origin_revision, ..position.clone() })
}

/// The position without a change, where other sidecars are to see that both sides were proved equal at this revision of the replica.
pub fn after_proved(position: &Position, proved: Revision) -> Option<Position> {
    (proved > position.equal_revision).then(|| position.clone())
}

/// Everything that the origin committed up to it is in, by the position and the origin's word.
pub fn applied_revision(position: &Position, idle: Option<Idle>) -> Revision {
    let told = idle.filter(|idle| position.seq >= idle.after).map_or(Revision(0), |idle| idle.through);
    position.origin_revision.max(told)
}

/// Every key below `reached` is copied; nothing: the end of the keyspace, which is no key, so the last cursor stays until the copy ends.
/// `revision`: at which the page was read.
pub fn after_copied(position: &Position, reached: &Bytes, revision: Revision) -> Position {
    let cursor = if reached.is_empty() { position.cursor.clone() } else { Some(reached.clone()) };
    Position { cursor, anchor_revision: position.anchor_revision.max(revision), ..position.clone() }
}

/// All pages are in; the highest was read at `anchor_revision`.
pub fn after_copy(position: &Position, anchor_revision: Revision) -> Position {
    Position { cursor: None, anchor_revision: position.anchor_revision.max(anchor_revision), ..position.clone() }
}

/// Where a base copy's first page begins; `None`: there is nothing to copy.
pub fn first_page(ranges: &Ranges) -> Option<Bytes> {
    ranges.pieces().first().map(|piece| piece.from.clone())
}

/// Where the page begins that comes after everything below `cursor`.
pub fn page_from(ranges: &Ranges, cursor: &Bytes) -> Option<Bytes> {
    let piece = ranges.pieces().iter().find(|piece| piece.to.is_empty() || piece.to > *cursor)?;
    Some(piece.from.clone().max(cursor.clone()))
}

/// Where the page begins that comes after one that ends at `to`; `None`: that was the last one.
pub fn page_after(ranges: &Ranges, to: &Bytes) -> Option<Bytes> {
    if to.is_empty() { None } else { page_from(ranges, to) }
}

/// Whether a copy of this (epoch, term) goes on at this position. `reached`: the cursor after its last step; a replica that was restored
/// meanwhile has a lower one, and what lies between was copied into what is gone. A position without a cursor is that of a copy whose end
/// was written.
pub fn copy_goes_on(position: &Position, sender: (Epoch, Term), reached: &Bytes, ends: bool) -> bool {
    let there = position.cursor.as_ref().map_or(ends, |cursor| cursor >= reached);
    (position.epoch, position.term) == sender && there
}

/// What a sender may write with: a position above it is another sender's.
pub type Claim = (Epoch, Term);

/// What a hello's (epoch, term) is to the position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// There is no position of this origin. Terms are revisions of one cluster: those of another origin's say nothing of this sender.
    Nothing,
    Fenced,
    /// The position to write before anything else: from then on every older sender's transaction fails its compare.
    TakesOver(Box<Position>, Claim),
    Holds(Claim),
}

/// A sender that knows no epoch (0) claims the position's.
pub fn claim(position: Option<&Position>, origin: ClusterId, epoch: Epoch, term: Term) -> Claimed {
    let Some(position) = position.filter(|p| p.origin_cluster == origin) else { return Claimed::Nothing };
    let claim = (if epoch == Epoch(0) { position.epoch } else { epoch }, term);
    if claim < (position.epoch, position.term) {
        return Claimed::Fenced;
    }
    if term <= position.term {
        return Claimed::Holds(claim);
    }
    Claimed::TakesOver(Box::new(Position { term, ..position.clone() }), claim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::HeldBack;
    use crate::replica::plan::TxnTree;

    const DIGEST: Digest = Digest([9; 16]);

    fn position() -> Position {
        Position::of_tests()
    }

    fn settled(extent: Extent) -> Settled {
        let tree = TxnTree { guards: Vec::new(), success: Vec::new() };
        Settled { revisions: 2, seq: Seq(42), revision: Revision(120), extent, tree, request_bytes: 0 }
    }

    #[test]
    fn a_position_says_once_that_both_sides_were_proved_equal_and_never_less_than_it_did() {
        let proved = after_proved(&position(), Revision(7)).map(|next| to_write(next, Waymark::default(), Revision(7)));
        let proved = proved.unwrap();
        assert_eq!(proved, Position { equal_revision: Revision(7), ..position() });
        assert_eq!(after_proved(&proved, Revision(7)), None);
        assert_eq!(after_proved(&position(), Revision(0)), None);
        assert_eq!(to_write(proved.clone(), Waymark::default(), Revision(0)), proved);
    }

    #[test]
    fn whole_revisions_move_seq_and_revisions_and_a_part_moves_only_the_part() {
        let carried = (Revision(120), Digest([1; 16]));
        let next = after_settled(&Position { part: 7, ..position() }, &settled(Extent::Whole), carried);
        assert_eq!((next.seq, next.origin_revision), (Seq(42), Revision(120)));
        assert_eq!((next.part, next.part_digest), (0, None));
        assert_eq!((next.carried_revision, next.carried_digest), carried);
        let part = settled(Extent::Part { from: 2, to: 5, of: 9 });
        let begun = Position { part: 5, part_digest: Some(carried.1), ..position() };
        assert_eq!(after_settled(&position(), &part, carried), begun);
        let last = settled(Extent::Part { from: 5, to: 9, of: 9 });
        assert_eq!(after_settled(&begun, &last, carried), next);
        assert_eq!([settled(Extent::Whole), part, last].map(|s| revisions_done(&s)), [2, 0, 2]);
    }

    #[test]
    fn a_skipped_revision_counts_as_carried_and_stays_named_until_it_is_taken_out() {
        let carried = (Revision(120), Digest([1; 16]));
        let partly = Position { part: 7, skipped: vec![Seq(3)], ..position() };
        let next = after_skipped(&partly, Seq(41), carried);
        assert_eq!((next.seq, next.origin_revision, next.part), (Seq(41), Revision(120), 0));
        assert_eq!((next.carried_revision, next.carried_digest), carried);
        assert_eq!(next.skipped, [Seq(3), Seq(41)]);
        let further = after_settled(&next, &settled(Extent::Whole), carried);
        assert_eq!(further.skipped, [Seq(3), Seq(41)], "what comes after it leaves them there");
        assert_eq!(without_skipped(&further, Seq(3)).skipped, [Seq(41)]);
        assert_eq!(without_skipped(&further, Seq(9)), further);
    }

    #[test]
    fn what_was_held_back_goes_with_its_revision_and_not_before() {
        let held =
            HeldBack { seq: Seq(42), revision: Revision(120), deletes: 9, keys: 10, minute: false, allowed: true };
        let (position, carried) = (Position { held_back: Some(held), ..position() }, (Revision(120), DIGEST));
        let before = Settled { seq: Seq(41), ..settled(Extent::Whole) };
        assert_eq!(after_settled(&position, &before, carried).held_back, Some(held));
        let part = settled(Extent::Part { from: 0, to: 5, of: 9 });
        assert_eq!(after_settled(&position, &part, carried).held_back, Some(held));
        assert_eq!(after_settled(&position, &settled(Extent::Whole), carried).held_back, None);
        assert_eq!(after_skipped(&position, Seq(41), carried).held_back, Some(held));
        assert_eq!(after_skipped(&position, Seq(42), carried).held_back, None);
    }

    #[test]
    fn following_begins_once_all_pages_are_in_and_the_highest_is_passed() {
        let copying = Position { state: Phase::Copying, anchor_revision: Revision(110), ..position() };
        let state = |p: Position| to_write(p, Waymark::default(), Revision(0)).state;
        assert_eq!(state(copying.clone()), Phase::Copying);
        let passed = Position { origin_revision: Revision(110), ..copying };
        assert_eq!(state(Position { cursor: Some(Bytes::from_static(b"/k")), ..passed.clone() }), Phase::Copying);
        assert_eq!(state(passed), Phase::Following);
    }

    #[test]
    fn a_position_gets_a_newer_waymark_and_never_an_older_one() {
        let waymark = Waymark { counter: 3, id: 4 };
        assert_eq!(to_write(position(), waymark, Revision(0)).waymark, waymark);
        let newer = Position { waymark, ..position() };
        for late in [Waymark { counter: 2, id: 9 }, Waymark { counter: 3, id: 9 }] {
            assert_eq!(to_write(newer.clone(), late, Revision(0)).waymark, waymark);
        }
    }

    #[test]
    fn an_idle_position_is_written_when_it_is_asked_for_or_ends_a_copy_and_never_ahead_of_what_is_missing() {
        let idle = Idle { through: Revision(105), after: Seq(40), persist: true };
        assert_eq!(after_idle(&position(), idle).unwrap().origin_revision, Revision(105));
        assert_eq!(after_idle(&position(), Idle { persist: false, ..idle }), None);
        assert_eq!(after_idle(&position(), Idle { after: Seq(41), ..idle }), None);
        assert_eq!(after_idle(&position(), Idle { through: Revision(100), ..idle }), None);
        let copying = Position { state: Phase::Copying, anchor_revision: Revision(104), ..position() };
        let asked_by_nobody = Idle { persist: false, ..idle };
        assert!(after_idle(&copying, asked_by_nobody).is_some());
        assert_eq!(after_idle(&copying, Idle { through: Revision(103), ..asked_by_nobody }), None);
    }

    #[test]
    fn the_origins_word_counts_only_once_its_seq_is_in() {
        let idle = Idle { through: Revision(105), after: Seq(40), persist: false };
        assert_eq!(applied_revision(&position(), Some(idle)), Revision(105));
        assert_eq!(applied_revision(&position(), Some(Idle { after: Seq(41), ..idle })), Revision(100));
        assert_eq!(applied_revision(&position(), Some(Idle { through: Revision(1), ..idle })), Revision(100));
        assert_eq!(applied_revision(&position(), None), Revision(100));
    }

    #[test]
    fn the_cursor_moves_to_what_is_copied_and_stays_where_the_keyspace_ends() {
        let copying = Position { cursor: Some(Bytes::from_static(b"/k")), ..position() };
        let further = after_copied(&copying, &Bytes::from_static(b"/m"), Revision(60));
        assert_eq!((further.cursor.as_deref(), further.anchor_revision), (Some(&b"/m"[..]), Revision(60)));
        let end = after_copied(&copying, &Bytes::new(), Revision(40));
        assert_eq!(end, copying);
        let done = after_copy(&copying, Revision(70));
        assert_eq!((done.cursor, done.anchor_revision), (None, Revision(70)));
    }

    #[test]
    fn pages_follow_each_other_over_the_pieces_of_the_ranges_up_to_their_end() {
        let bytes = |text: &'static str| Bytes::from_static(text.as_bytes());
        let ranges = Ranges::new(&[bytes("/a/"), bytes("/b/")], &[bytes("/a/x/")]);
        assert_eq!(first_page(&ranges), Some(bytes("/a/")));
        let after = |to| page_after(&ranges, &bytes(to));
        assert_eq!(after("/a/k"), Some(bytes("/a/k")));
        assert_eq!(after("/a/x/"), Some(bytes("/a/x0")), "the next piece");
        assert_eq!(after("/a0"), Some(bytes("/b/")));
        assert_eq!(after("/b0"), None);
        let whole = Ranges::new(&[], &[]);
        assert_eq!(page_after(&whole, &bytes("/etcd-ferry/")), Some(bytes("/etcd-ferry0")));
        assert_eq!(page_after(&whole, &Bytes::new()), None, "the end of the keyspace");
        assert_eq!(page_from(&whole, &Bytes::new()), Some(Bytes::new()));
    }

    #[test]
    fn a_copy_goes_on_only_where_its_cursor_is_or_further() {
        let at = |cursor| Position { cursor: Some(Bytes::from_static(cursor)), ..position() };
        let (reached, ours) = (Bytes::from_static(b"/k"), (Epoch(3), Term(2)));
        assert!(copy_goes_on(&at(b"/k"), ours, &reached, false));
        assert!(copy_goes_on(&at(b"/m"), ours, &reached, false), "a step whose answer was lost");
        assert!(!copy_goes_on(&at(b"/a"), ours, &reached, false), "the replica was restored");
        assert!(!copy_goes_on(&at(b"/k"), (Epoch(4), Term(2)), &reached, false));
        assert!(!copy_goes_on(&at(b"/k"), (Epoch(3), Term(1)), &reached, false), "another sender took over");
        assert!(copy_goes_on(&position(), ours, &reached, true));
        assert!(!copy_goes_on(&position(), ours, &reached, false));
    }

    #[test]
    fn an_older_epoch_or_term_is_fenced_and_a_newer_term_takes_over() {
        let claim = |epoch, term| claim(Some(&position()), ClusterId(1), Epoch(epoch), Term(term));
        let ours = (Epoch(3), Term(2));
        assert_eq!(claim(3, 2), Claimed::Holds(ours));
        assert_eq!(claim(0, 2), Claimed::Holds(ours), "who knows no epoch claims the position's");
        assert_eq!(claim(4, 2), Claimed::Holds((Epoch(4), Term(2))), "a base copy that is to begin");
        assert_eq!(claim(4, 1), Claimed::Holds((Epoch(4), Term(1))));
        for (epoch, term) in [(2, 2), (2, 9), (3, 1), (0, 1)] {
            assert_eq!(claim(epoch, term), Claimed::Fenced, "epoch {epoch}, term {term}");
        }
        let taken = Box::new(Position { term: Term(4), ..position() });
        assert_eq!(claim(3, 4), Claimed::TakesOver(taken, (Epoch(3), Term(4))));
    }

    #[test]
    fn another_origins_position_says_nothing_of_terms() {
        assert_eq!(claim(Some(&position()), ClusterId(7), Epoch(0), Term(1)), Claimed::Nothing);
        assert_eq!(claim(None, ClusterId(1), Epoch(0), Term(1)), Claimed::Nothing);
    }
}
