//! Job: where a link goes on: DESIGN.md section 4's table, and whether the origin is still the same one.
//! Input: what the spool holds, what the replica answered, what the origin's etcd says. Output: a `Resume`.
//! Pure: no clock, no I/O.
//! Always true: nothing is shipped past a hole or from another history; what cannot be proven ends in a stop or a base copy.

use crate::model::{ClusterId, Digest, Epoch, Phase, Position, Revision, Seq, Term, Waymark};
use crate::origin::sequence::OriginWaymark;
use bytes::Bytes;
use std::fmt;

/// What the spool holds: every carried revision above `base`, up to `covered`. A spool of another cluster or of other ranges is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolFacts {
    pub base: Revision,
    /// The spool's end: everything up to it was seen.
    pub covered: Revision,
    /// The last carried revision in it.
    pub last: Option<(Revision, Digest)>,
}

/// What hello brought.
#[derive(Debug, Clone, PartialEq)]
pub enum ReplicaFacts {
    Unreachable,
    Answered { position: Option<Box<Position>>, received: Option<Received> },
}

/// The end of what the replica has received in the position's epoch; at least its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    pub seq: Seq,
    pub revision: Revision,
    pub digest: Digest,
}

/// What the origin's etcd says, read after the replica answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OriginFacts {
    pub cluster: ClusterId,
    /// By a linearizable read.
    pub head: Revision,
    pub ranges_digest: Digest,
    /// The waymark key's value; `None`: there is no such key.
    pub waymark: Option<OriginWaymark>,
    pub carried: CarriedCheck,
    /// The highest compaction that a refused watch or read told of; 0: none yet.
    pub compacted: Revision,
}

/// What became of comparing the last carried revision with the origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CarriedCheck {
    /// Not done: the watch that follows starts at it, inclusive. Also where nothing was carried since the anchor.
    Open,
    Same,
    Other,
    /// It lies at or below the compaction: etcd cannot show it whole any more.
    Compacted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// Ship what the spool holds after this revision; the watch goes on at the spool's end.
    ShipFromSpool { after: Revision },
    /// Empty the spool and watch from here on, from the carried revision inclusive unless it is compacted.
    WatchFrom { after: Revision },
    /// The replica does not answer: go on tailing into the spool from here, and try again.
    Tail { after: Revision },
    /// A base copy: a new one in a new epoch, or the present one from its cursor on.
    Copy { epoch: Epoch, cursor: Option<CopyCursor>, reason: CopyReason },
    /// What came in between is lost, but not what the replica holds: a new epoch that follows from the origin's head at once, and a repair of
    /// what differs.
    Repair { epoch: Epoch, reason: CopyReason },
    /// Only an operator can decide.
    Stop { reason: StopReason },
}

/// Where a base copy goes on that was cut short.
#[derive(Clone, PartialEq, Eq)]
pub struct CopyCursor {
    /// Every key below it is copied.
    pub cursor: Bytes,
    /// Following starts after this revision, from the spool if it reaches back so far, else by a watch.
    pub after: Revision,
    pub spool_reaches: bool,
}

/// Never shows the key: logs hold what this prints.
impl fmt::Debug for CopyCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CopyCursor(after {}, spool reaches: {})", self.after, self.spool_reaches)
    }
}

/// Why a base copy is needed; for the log and `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CopyReason {
    #[error("the replica has no position of this link yet")]
    NoPosition,
    #[error("the replica followed cluster {was}, and this is cluster {is}")]
    OtherCluster { was: ClusterId, is: ClusterId },
    #[error("the link's ranges were changed")]
    OtherRanges,
    #[error("the origin has compacted up to revision {compacted}, and the replica needs what came after {after}")]
    Compacted { after: Revision, compacted: Revision },
    #[error(
        "the last carried revision is compacted and the replica has no waymark: it cannot be shown that the origin is the same"
    )]
    NotProvable,
    #[error("the base copy goes on where it was cut short")]
    GoesOn,
    #[error("{differing} keys differ, more than a repair keeps by name")]
    TooManyDiffer { differing: u64 },
    #[error("an operator asked for it")]
    Asked,
}

/// Why the link stops; each is told with what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    #[error(
        "the origin was restored: its head is revision {head}, and the replica has come to revision {reached}; if this origin is the right \
         one, run `etcd-ferry resync LINK --config F` at its sidecar"
    )]
    HeadBelow { head: Revision, reached: Revision },
    #[error(
        "the origin was restored or replaced: it has no waymark of this link, and the replica has seen number {}; if this origin is the \
         right one, run `etcd-ferry resync LINK --config F` at its sidecar", seen.counter
    )]
    WaymarkMissing { seen: Waymark },
    #[error(
        "the origin was restored: its waymark is number {}, and the replica has seen number {}; if this origin is the right one, run \
         `etcd-ferry resync LINK --config F` at its sidecar", origin.counter, seen.counter
    )]
    WaymarkOlder { origin: Waymark, seen: Waymark },
    #[error(
        "the origin was restored or replaced: the waymark number {} that the replica has seen is neither its present nor its previous one; \
         if this origin is the right one, run `etcd-ferry resync LINK --config F` at its sidecar", seen.counter
    )]
    WaymarkUnknown { seen: Waymark },
    #[error(
        "the origin was restored or replaced: its revision {revision} is not the one that was carried; if this origin is the right one, run \
         `etcd-ferry resync LINK --config F` at its sidecar"
    )]
    CarriedDiffers { revision: Revision },
    #[error(
        "the origin was restored: its elections have come to term {ours}, and the replica has seen term {seen}; if this origin is the right \
         one, run `etcd-ferry resync LINK --config F` at its sidecar"
    )]
    TermBelow { ours: Term, seen: Term },
}

/// Where to go on. To be asked again after each hello, and after a watch that was refused for compaction (then with `compacted`).
pub fn decide(spool: Option<&SpoolFacts>, replica: &ReplicaFacts, origin: &OriginFacts) -> Resume {
    let (position, received) = match replica {
        ReplicaFacts::Unreachable => {
            return Resume::Tail { after: spool.map_or(origin.head, |spool| spool.covered) };
        }
        ReplicaFacts::Answered { position: None, .. } => return copy(None, CopyReason::NoPosition),
        ReplicaFacts::Answered { position: Some(position), received } => (position, received),
    };
    if position.origin_cluster != origin.cluster {
        let reason = CopyReason::OtherCluster { was: position.origin_cluster, is: origin.cluster };
        return copy(Some(position), reason);
    }
    if position.ranges_digest != origin.ranges_digest {
        return copy(Some(position), CopyReason::OtherRanges);
    }
    let carried = carried(position, received.as_ref());
    let reached = position.origin_revision.max(carried.0);
    if let Err(reason) = check_same_origin(position, reached, carried.0, origin) {
        return Resume::Stop { reason };
    }
    if origin.carried == CarriedCheck::Compacted && position.waymark == Waymark::default() {
        return copy(Some(position), CopyReason::NotProvable);
    }
    let spool_reaches =
        spool.is_some_and(|spool| spool.base <= reached && reached <= spool.covered && !contradicts(spool, carried));
    // A watch after a revision sees everything if that revision itself is not compacted away.
    let watchable = reached >= origin.compacted;
    if !spool_reaches && !watchable {
        let reason = CopyReason::Compacted { after: reached, compacted: origin.compacted };
        if position.cursor.is_some() {
            return copy(Some(position), reason);
        }
        return Resume::Repair { epoch: position.epoch.next(), reason };
    }
    match (position.state, &position.cursor) {
        (Phase::Copying, Some(cursor)) => {
            let cursor = Some(CopyCursor { cursor: cursor.clone(), after: reached, spool_reaches });
            Resume::Copy { epoch: position.epoch, cursor, reason: CopyReason::GoesOn }
        }
        (Phase::Copying | Phase::Repairing | Phase::Following, _) if spool_reaches => {
            Resume::ShipFromSpool { after: reached }
        }
        (Phase::Copying | Phase::Repairing | Phase::Following, _) => Resume::WatchFrom { after: reached },
    }
}

/// The last carried revision, where the origin was found to show it whole: a watch that begins anew starts at it, inclusive, and sees
/// that nothing of the link lies between it and where the replica is.
pub fn watched_from(replica: &ReplicaFacts, check: CarriedCheck) -> Option<(Revision, Digest)> {
    match replica {
        ReplicaFacts::Answered { position: Some(position), received } if check == CarriedCheck::Same => {
            Some(carried(position, received.as_ref()))
        }
        ReplicaFacts::Answered { .. } | ReplicaFacts::Unreachable => None,
    }
}

fn carried(position: &Position, received: Option<&Received>) -> (Revision, Digest) {
    received.map_or((position.carried_revision, position.carried_digest), |r| (r.revision, r.digest))
}

/// A base copy that an operator asked for: past every stop of [`decide`].
pub fn resync(position: Option<&Position>) -> Resume {
    copy(position, CopyReason::Asked)
}

/// Why the link stops where the replica has seen a term that this origin's elections have not come to yet. What tells more of the
/// restore is said first.
pub fn went_back(replica: &ReplicaFacts, origin: &OriginFacts, ours: Term) -> StopReason {
    match (decide(None, replica, origin), replica) {
        (Resume::Stop { reason }, _) => reason,
        (_, ReplicaFacts::Answered { position: Some(position), .. }) => {
            StopReason::TermBelow { ours, seen: position.term }
        }
        (_, ReplicaFacts::Answered { position: None, .. } | ReplicaFacts::Unreachable) => {
            StopReason::TermBelow { ours, seen: Term(0) }
        }
    }
}

/// What a repair leads to that gave up on `differing` keys: a base copy where [`decide`] would go on, while the position still says
/// `repairing`. It stops where [`decide`] does: nobody has looked at the origin since.
pub fn copy_instead(decided: Resume, position: Option<&Position>, differing: u64) -> Resume {
    match decided {
        Resume::ShipFromSpool { .. } | Resume::WatchFrom { .. } | Resume::Repair { .. }
            if position.is_some_and(|position| position.state == Phase::Repairing) =>
        {
            copy(position, CopyReason::TooManyDiffer { differing })
        }
        Resume::ShipFromSpool { .. }
        | Resume::WatchFrom { .. }
        | Resume::Repair { .. }
        | Resume::Tail { .. }
        | Resume::Copy { .. }
        | Resume::Stop { .. } => decided,
    }
}

fn copy(position: Option<&Position>, reason: CopyReason) -> Resume {
    let epoch = position.map_or(Epoch(0), |position| position.epoch).next();
    Resume::Copy { epoch, cursor: None, reason }
}

/// Head, cluster id and ranges do not tell a restored origin from the old one: the carried revision does, and the waymark.
/// The shipper replaces the waymark only when the position holds the present one, so the position's is one of the last two.
fn check_same_origin(
    position: &Position,
    reached: Revision,
    carried: Revision,
    origin: &OriginFacts,
) -> Result<(), StopReason> {
    if origin.head < reached {
        return Err(StopReason::HeadBelow { head: origin.head, reached });
    }
    let seen = position.waymark;
    if seen != Waymark::default() {
        let Some(waymark) = origin.waymark else { return Err(StopReason::WaymarkMissing { seen }) };
        // A replica that was restored has an older one; that its last revision is still the origin's says that history goes on.
        let restored_replica = origin.carried == CarriedCheck::Same && waymark.present.counter > seen.counter;
        if waymark.present != seen && waymark.previous != Some(seen) && !restored_replica {
            let origin = waymark.present;
            let older = origin.counter < seen.counter;
            return Err(if older {
                StopReason::WaymarkOlder { origin, seen }
            } else {
                StopReason::WaymarkUnknown { seen }
            });
        }
    }
    match origin.carried {
        CarriedCheck::Other => Err(StopReason::CarriedDiffers { revision: carried }),
        CarriedCheck::Open | CarriedCheck::Same | CarriedCheck::Compacted => Ok(()),
    }
}

/// The spool holds the stretch in which the replica's last carried revision lies, but not that revision: it is of another
/// history. It is then left aside, and the watch, which starts at that revision, tells which of the two is the origin's.
fn contradicts(spool: &SpoolFacts, (revision, digest): (Revision, Digest)) -> bool {
    let inside = spool.base < revision && revision <= spool.covered;
    match spool.last {
        Some((last, of_last)) if inside && last == revision => of_last != digest,
        Some((last, _)) => inside && last < revision,
        None => inside,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Waymark = Waymark { counter: 5, id: 55 };
    const BEFORE: Waymark = Waymark { counter: 4, id: 44 };
    const CLUSTER: ClusterId = ClusterId(1);

    /// Following at revision 100, the last carried one 90.
    fn position() -> Position {
        Position {
            epoch: Epoch(3),
            term: Term(0),
            seq: Seq(40),
            origin_cluster: CLUSTER,
            origin_revision: Revision(100),
            carried_revision: Revision(90),
            carried_digest: Digest([9; 16]),
            waymark: NOW,
            ranges_digest: Digest([1; 16]),
            state: Phase::Following,
            anchor_revision: Revision(10),
            cursor: None,
            part: 0,
            skipped: Vec::new(),
        }
    }

    fn at(position: Position) -> ReplicaFacts {
        ReplicaFacts::Answered { position: Some(Box::new(position)), received: None }
    }

    fn origin() -> OriginFacts {
        OriginFacts {
            cluster: CLUSTER,
            head: Revision(200),
            ranges_digest: Digest([1; 16]),
            waymark: Some(OriginWaymark { present: NOW, previous: Some(BEFORE) }),
            carried: CarriedCheck::Same,
            compacted: Revision(0),
        }
    }

    fn spool(base: u64, covered: u64) -> Option<SpoolFacts> {
        let last = Some((Revision(covered), Digest([5; 16]))).filter(|_| covered > base);
        Some(SpoolFacts { base: Revision(base), covered: Revision(covered), last })
    }

    fn decided(spool: Option<SpoolFacts>, replica: &ReplicaFacts, origin: &OriginFacts) -> Resume {
        decide(spool.as_ref(), replica, origin)
    }

    fn new_copy(epoch: u64, reason: CopyReason) -> Resume {
        Resume::Copy { epoch: Epoch(epoch), cursor: None, reason }
    }

    fn stop(origin: OriginFacts) -> StopReason {
        let resume = decided(spool(50, 150), &at(position()), &origin);
        let Resume::Stop { reason } = resume else { panic!("{resume:?}") };
        reason
    }

    #[test]
    fn a_spool_that_reaches_back_to_the_position_is_shipped_from_there() {
        for (base, covered) in [(50, 150), (100, 150), (50, 100), (100, 100)] {
            let resume = decided(spool(base, covered), &at(position()), &origin());
            assert_eq!(resume, Resume::ShipFromSpool { after: Revision(100) }, "spool {base}..{covered}");
        }
    }

    #[test]
    fn the_spool_is_shipped_although_the_origin_has_compacted_past_the_position() {
        let compacted = OriginFacts { compacted: Revision(180), carried: CarriedCheck::Compacted, ..origin() };
        let resume = decided(spool(50, 150), &at(position()), &compacted);
        assert_eq!(resume, Resume::ShipFromSpool { after: Revision(100) });
    }

    #[test]
    fn what_the_replica_has_received_beyond_its_position_is_not_shipped_again() {
        let received = Received { seq: Seq(45), revision: Revision(120), digest: Digest([5; 16]) };
        let replica = ReplicaFacts::Answered { position: Some(Box::new(position())), received: Some(received) };
        assert_eq!(decided(spool(110, 150), &replica, &origin()), Resume::ShipFromSpool { after: Revision(120) });
        let same = Received { seq: Seq(40), revision: Revision(90), digest: Digest([9; 16]) };
        let replica = ReplicaFacts::Answered { position: Some(Box::new(position())), received: Some(same) };
        assert_eq!(decided(spool(95, 150), &replica, &origin()), Resume::ShipFromSpool { after: Revision(100) });
    }

    #[test]
    fn a_spool_that_starts_after_the_position_gives_way_to_a_watch_from_the_position() {
        let watch = Resume::WatchFrom { after: Revision(100) };
        assert_eq!(decided(spool(101, 150), &at(position()), &origin()), watch);
        assert_eq!(decided(None, &at(position()), &origin()), watch);
    }

    #[test]
    fn a_watch_from_the_position_that_is_compacted_is_a_repair_in_a_new_epoch() {
        let reason = CopyReason::Compacted { after: Revision(100), compacted: Revision(101) };
        let compacted = OriginFacts { compacted: Revision(101), carried: CarriedCheck::Compacted, ..origin() };
        let repair = Resume::Repair { epoch: Epoch(4), reason };
        assert_eq!(decided(spool(101, 150), &at(position()), &compacted), repair);
        assert_eq!(decided(None, &at(position()), &compacted), repair);
        for state in [Phase::Repairing, Phase::Copying] {
            assert_eq!(decided(None, &at(Position { state, ..position() }), &compacted), repair, "{state:?}");
        }
        let just_not = OriginFacts { compacted: Revision(100), ..compacted };
        assert_eq!(decided(None, &at(position()), &just_not), Resume::WatchFrom { after: Revision(100) });
    }

    #[test]
    fn a_position_beyond_the_spool_drops_the_spool_and_watches_from_the_position() {
        assert_eq!(decided(spool(20, 99), &at(position()), &origin()), Resume::WatchFrom { after: Revision(100) });
    }

    #[test]
    fn while_the_replica_cannot_be_reached_tailing_goes_on_from_the_spools_end() {
        let unreachable = ReplicaFacts::Unreachable;
        assert_eq!(decided(spool(20, 99), &unreachable, &origin()), Resume::Tail { after: Revision(99) });
        assert_eq!(decided(None, &unreachable, &origin()), Resume::Tail { after: Revision(200) });
    }

    #[test]
    fn a_replica_that_moved_back_gets_from_its_older_position_on() {
        let older = Position { origin_revision: Revision(60), carried_revision: Revision(60), ..position() };
        assert_eq!(
            decided(spool(60, 150), &at(older.clone()), &origin()),
            Resume::ShipFromSpool { after: Revision(60) }
        );
        assert_eq!(decided(spool(61, 150), &at(older), &origin()), Resume::WatchFrom { after: Revision(60) });
    }

    #[test]
    fn a_replica_without_a_position_gets_a_base_copy_in_the_first_epoch() {
        let none = ReplicaFacts::Answered { position: None, received: None };
        assert_eq!(decided(spool(50, 150), &none, &origin()), new_copy(1, CopyReason::NoPosition));
    }

    #[test]
    fn another_origin_cluster_gets_a_base_copy_in_the_next_epoch() {
        let other = OriginFacts { cluster: ClusterId(2), head: Revision(3), waymark: None, ..origin() };
        let reason = CopyReason::OtherCluster { was: CLUSTER, is: ClusterId(2) };
        assert_eq!(decided(spool(50, 150), &at(position()), &other), new_copy(4, reason));
    }

    #[test]
    fn other_ranges_get_a_base_copy_in_the_next_epoch() {
        let other = OriginFacts { ranges_digest: Digest([2; 16]), ..origin() };
        assert_eq!(decided(spool(50, 150), &at(position()), &other), new_copy(4, CopyReason::OtherRanges));
    }

    fn copying(cursor: Option<&'static [u8]>) -> Position {
        Position {
            state: Phase::Copying,
            carried_revision: Revision(0),
            carried_digest: Digest::default(),
            cursor: cursor.map(Bytes::from_static),
            seq: Seq(0),
            ..position()
        }
    }

    #[test]
    fn a_base_copy_that_was_cut_short_goes_on_at_its_cursor_if_everything_since_can_be_had() {
        let goes_on = |spool_reaches| Resume::Copy {
            epoch: Epoch(3),
            cursor: Some(CopyCursor { cursor: Bytes::from_static(b"/m"), after: Revision(100), spool_reaches }),
            reason: CopyReason::GoesOn,
        };
        let cut_short = at(copying(Some(b"/m")));
        assert_eq!(decided(spool(100, 150), &cut_short, &origin()), goes_on(true));
        assert_eq!(decided(spool(101, 150), &cut_short, &origin()), goes_on(false));
        let compacted = OriginFacts { compacted: Revision(180), ..origin() };
        assert_eq!(decided(spool(100, 150), &cut_short, &compacted), goes_on(true));
        let reason = CopyReason::Compacted { after: Revision(100), compacted: Revision(180) };
        assert_eq!(decided(spool(101, 150), &cut_short, &compacted), new_copy(4, reason));
    }

    #[test]
    fn a_base_copy_whose_pages_are_all_in_is_followed_like_any_position() {
        let complete = at(copying(None));
        assert_eq!(decided(spool(100, 150), &complete, &origin()), Resume::ShipFromSpool { after: Revision(100) });
        assert_eq!(decided(None, &complete, &origin()), Resume::WatchFrom { after: Revision(100) });
    }

    #[test]
    fn a_head_below_what_the_replica_has_stops_as_restored() {
        let reason = stop(OriginFacts { head: Revision(99), ..origin() });
        assert_eq!(reason, StopReason::HeadBelow { head: Revision(99), reached: Revision(100) });
        assert!(reason.to_string().contains("restored") && reason.to_string().contains("resync"), "{reason}");
        let received = Received { seq: Seq(45), revision: Revision(201), digest: Digest([5; 16]) };
        let replica = ReplicaFacts::Answered { position: Some(Box::new(position())), received: Some(received) };
        assert!(matches!(decided(None, &replica, &origin()), Resume::Stop { reason: StopReason::HeadBelow { .. } }));
        let at_head = decided(spool(50, 150), &at(position()), &OriginFacts { head: Revision(100), ..origin() });
        assert!(matches!(at_head, Resume::ShipFromSpool { .. }));
    }

    #[test]
    fn the_waymark_may_be_one_ahead_of_the_position_and_no_more_where_nothing_else_vouches() {
        let one_ahead = OriginWaymark { present: Waymark { counter: 6, id: 66 }, previous: Some(NOW) };
        let unvouched = OriginFacts { carried: CarriedCheck::Compacted, ..origin() };
        let resume = decided(spool(50, 150), &at(position()), &OriginFacts { waymark: Some(one_ahead), ..unvouched });
        assert!(matches!(resume, Resume::ShipFromSpool { .. }));
        let two_ahead = OriginWaymark { present: Waymark { counter: 7, id: 77 }, previous: Some(one_ahead.present) };
        let reason = stop(OriginFacts { waymark: Some(two_ahead), ..unvouched });
        assert_eq!(reason, StopReason::WaymarkUnknown { seen: NOW });
    }

    #[test]
    fn a_replica_restored_to_an_older_waymark_goes_on_if_its_last_revision_is_still_the_origins() {
        let newer =
            OriginWaymark { present: Waymark { counter: 9, id: 99 }, previous: Some(Waymark { counter: 8, id: 88 }) };
        let proven = OriginFacts { waymark: Some(newer), carried: CarriedCheck::Same, ..origin() };
        assert_eq!(decided(spool(50, 150), &at(position()), &proven), Resume::ShipFromSpool { after: Revision(100) });
        for carried in [CarriedCheck::Open, CarriedCheck::Compacted] {
            assert_eq!(stop(OriginFacts { carried, ..proven }), StopReason::WaymarkUnknown { seen: NOW });
        }
    }

    #[test]
    fn an_older_waymark_stops_as_restored_even_if_the_carried_revision_is_the_same() {
        let older = OriginWaymark { present: BEFORE, previous: None };
        let reason = stop(OriginFacts { waymark: Some(older), ..origin() });
        assert_eq!(reason, StopReason::WaymarkOlder { origin: BEFORE, seen: NOW });
    }

    #[test]
    fn the_same_count_with_another_id_stops_as_another_history() {
        let other = OriginWaymark { present: Waymark { counter: 5, id: 1 }, previous: Some(BEFORE) };
        assert_eq!(stop(OriginFacts { waymark: Some(other), ..origin() }), StopReason::WaymarkUnknown { seen: NOW });
    }

    #[test]
    fn a_missing_waymark_stops_unless_the_replica_never_had_one() {
        let none = OriginFacts { waymark: None, ..origin() };
        assert_eq!(stop(none), StopReason::WaymarkMissing { seen: NOW });
        let never = at(Position { waymark: Waymark::default(), ..position() });
        assert!(matches!(decided(spool(50, 150), &never, &none), Resume::ShipFromSpool { .. }));
    }

    #[test]
    fn a_carried_revision_that_differs_stops_even_if_the_waymark_is_right() {
        let reason = stop(OriginFacts { carried: CarriedCheck::Other, ..origin() });
        assert_eq!(reason, StopReason::CarriedDiffers { revision: Revision(90) });
    }

    #[test]
    fn a_compacted_carried_revision_is_vouched_for_by_the_waymark_and_by_nothing_less() {
        let compacted = OriginFacts { carried: CarriedCheck::Compacted, compacted: Revision(95), ..origin() };
        assert_eq!(decided(None, &at(position()), &compacted), Resume::WatchFrom { after: Revision(100) });
        let never = at(Position { waymark: Waymark::default(), ..position() });
        assert_eq!(decided(spool(50, 150), &never, &compacted), new_copy(4, CopyReason::NotProvable));
    }

    #[test]
    fn a_check_that_is_still_open_goes_on_and_leaves_it_to_the_watch() {
        let open = OriginFacts { carried: CarriedCheck::Open, ..origin() };
        assert_eq!(decided(None, &at(position()), &open), Resume::WatchFrom { after: Revision(100) });
    }

    #[test]
    fn a_spool_of_another_history_than_the_replicas_is_not_shipped() {
        let watch = Resume::WatchFrom { after: Revision(100) };
        let with = |last| Some(SpoolFacts { base: Revision(50), covered: Revision(150), last });
        for last in [None, Some((Revision(80), Digest([9; 16]))), Some((Revision(90), Digest([8; 16])))] {
            assert_eq!(decided(with(last), &at(position()), &origin()), watch, "{last:?}");
        }
        let same = Some((Revision(90), Digest([9; 16])));
        assert_eq!(decided(with(same), &at(position()), &origin()), Resume::ShipFromSpool { after: Revision(100) });
    }

    #[test]
    fn a_term_that_went_back_stops_with_what_tells_most_of_the_restore() {
        let replica = at(Position { term: Term(50), ..position() });
        let other = OriginFacts { carried: CarriedCheck::Other, ..origin() };
        assert_eq!(went_back(&replica, &other, Term(20)), StopReason::CarriedDiffers { revision: Revision(90) });
        let reason = went_back(&replica, &origin(), Term(20));
        assert_eq!(reason, StopReason::TermBelow { ours: Term(20), seen: Term(50) });
        assert!(reason.to_string().contains("restored") && reason.to_string().contains("resync"), "{reason}");
    }

    #[test]
    fn a_new_watch_starts_at_the_last_carried_revision_if_that_is_still_shown() {
        let carried = Some((Revision(90), Digest([9; 16])));
        assert_eq!(watched_from(&at(position()), CarriedCheck::Same), carried);
        for check in [CarriedCheck::Open, CarriedCheck::Other, CarriedCheck::Compacted] {
            assert_eq!(watched_from(&at(position()), check), None, "{check:?}");
        }
        let received = Received { seq: Seq(45), revision: Revision(120), digest: Digest([5; 16]) };
        let ahead = ReplicaFacts::Answered { position: Some(Box::new(position())), received: Some(received) };
        assert_eq!(watched_from(&ahead, CarriedCheck::Same), Some((Revision(120), Digest([5; 16]))));
        assert_eq!(watched_from(&ReplicaFacts::Unreachable, CarriedCheck::Same), None);
    }

    #[test]
    fn a_repair_that_gave_up_is_followed_by_a_base_copy_and_never_past_a_stop() {
        let repairing = Position { state: Phase::Repairing, ..position() };
        let instead = |spool, position: &Position, origin: &OriginFacts| {
            copy_instead(decided(spool, &at(position.clone()), origin), Some(position), 7)
        };
        let copied = new_copy(4, CopyReason::TooManyDiffer { differing: 7 });
        assert_eq!(instead(spool(50, 150), &repairing, &origin()), copied);
        assert_eq!(instead(None, &repairing, &origin()), copied);
        let compacted = OriginFacts { compacted: Revision(101), ..origin() };
        assert_eq!(instead(None, &repairing, &compacted), copied);
        let restored = OriginFacts { carried: CarriedCheck::Other, ..origin() };
        let stop = Resume::Stop { reason: StopReason::CarriedDiffers { revision: Revision(90) } };
        assert_eq!(instead(None, &repairing, &restored), stop);
        let other = OriginFacts { ranges_digest: Digest([2; 16]), ..origin() };
        assert_eq!(instead(None, &repairing, &other), new_copy(4, CopyReason::OtherRanges));
        // The replica has become another since.
        assert_eq!(instead(None, &position(), &origin()), Resume::WatchFrom { after: Revision(100) });
        assert_eq!(copy_instead(Resume::Tail { after: Revision(9) }, None, 7), Resume::Tail { after: Revision(9) });
    }

    #[test]
    fn an_operators_resync_is_a_base_copy_past_every_stop() {
        assert_eq!(resync(Some(&position())), new_copy(4, CopyReason::Asked));
        assert_eq!(resync(None), new_copy(1, CopyReason::Asked));
    }
}
