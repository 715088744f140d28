//! Job: tests of the resume table: each of its rows, and whether the origin is the same.
//! Input: positions, spools and origins made by hand. Output: passes or fails.
//! Pure: no clock, no I/O.
//! Always true: no etcd is asked.

use super::*;

const NOW: Waymark = Waymark { counter: 5, id: 55 };
const BEFORE: Waymark = Waymark { counter: 4, id: 44 };
const CLUSTER: ClusterId = ClusterId(1);

/// Following at revision 100, the last carried one 90.
fn position() -> Position {
    Position {
        term: Term(0),
        origin_cluster: CLUSTER,
        waymark: NOW,
        ranges_digest: Digest([1; 16]),
        anchor_revision: Revision(10),
        ..Position::of_tests()
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
    assert_eq!(decided(spool(60, 150), &at(older.clone()), &origin()), Resume::ShipFromSpool { after: Revision(60) });
    assert_eq!(decided(spool(61, 150), &at(older), &origin()), Resume::WatchFrom { after: Revision(60) });
}

#[test]
fn a_replica_without_a_position_gets_a_base_copy_in_the_first_epoch() {
    let none = ReplicaFacts::Answered { position: None, received: None };
    assert_eq!(decided(spool(50, 150), &none, &origin()), new_copy(1, CopyReason::NoPosition));
}

#[test]
fn another_origin_cluster_stops_the_link_whatever_its_ranges() {
    let other = OriginFacts { cluster: ClusterId(2), head: Revision(3), waymark: None, ..origin() };
    let reason = StopReason::OtherCluster { was: CLUSTER, is: ClusterId(2) };
    assert_eq!(stop(other), reason);
    assert_eq!(stop(OriginFacts { ranges_digest: Digest([2; 16]), ..other }), reason);
    assert!(reason.to_string().contains("cluster 1") || reason.to_string().contains("0000000000000001"), "{reason}");
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
fn a_new_watch_knows_the_last_carried_revision_unless_the_origin_shows_another() {
    let carried = Some((Revision(90), Digest([9; 16])));
    assert_eq!(watched_from(&at(position()), CarriedCheck::Same), carried);
    assert_eq!(watched_from(&at(position()), CarriedCheck::Compacted), carried);
    for check in [CarriedCheck::Open, CarriedCheck::Other] {
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

#[test]
fn watches_begin_with_what_was_carried_where_an_empty_spool_reaches_back_to_the_replica() {
    let empty = |base, covered| SpoolFacts { base: Revision(base), covered: Revision(covered), last: None };
    let begins = |spool: SpoolFacts| begins_with(&spool, Revision(90), Revision(100));
    for (base, covered) in [(90, 100), (95, 100), (100, 100), (100, 150)] {
        assert!(begins(empty(base, covered)), "{base}..{covered}");
    }
    // One of another history, one that starts after the position, one that ends before it.
    for (base, covered) in [(89, 150), (101, 150), (90, 99)] {
        assert!(!begins(empty(base, covered)), "{base}..{covered}");
    }
    assert!(!begins(spool(95, 150).unwrap()), "it begins with its own last revision");
}

#[test]
fn a_spool_that_has_another_revision_or_none_where_the_replica_has_its_last_contradicts_it() {
    let digest = |byte| Digest([byte; 16]);
    assert!(Tailed::Holds(digest(2)).contradicts(digest(1)) && Tailed::Lacks.contradicts(digest(1)));
    assert!(!Tailed::Holds(digest(1)).contradicts(digest(1)) && !Tailed::Unknown.contradicts(digest(1)));
}

#[test]
fn what_the_open_watch_has_shown_counts_where_etcd_shows_the_carried_revision_no_more() {
    let carried = Digest([9; 16]);
    let spool = |last| SpoolFacts { base: Revision(50), covered: Revision(120), last };
    let full = |last: u64| spool(Some((Revision(last), carried)));
    let proven = Some(Revision(0));
    let at = Revision(90);
    assert_eq!(Tailed::by_extent(None, &full(90), at), Some(Tailed::Unknown), "of what history, nobody knows");
    assert_eq!(Tailed::by_extent(Some(Revision(91)), &full(90), at), Some(Tailed::Unknown));
    assert_eq!(Tailed::by_extent(Some(at), &full(90), at), Some(Tailed::Holds(carried)));
    assert_eq!(Tailed::by_extent(proven, &full(80), at), Some(Tailed::Lacks));
    assert_eq!(Tailed::by_extent(proven, &spool(None), at), Some(Tailed::Lacks));
    assert_eq!(Tailed::by_extent(proven, &full(100), at), None);
    for outside in [Revision(50), Revision(121)] {
        assert_eq!(Tailed::by_extent(proven, &full(80), outside), Some(Tailed::Unknown), "{outside}");
    }
    assert_eq!(Tailed::by_entry(Some((at, carried)), at), Tailed::Holds(carried));
    assert_eq!(Tailed::by_entry(Some((Revision(91), carried)), at), Tailed::Lacks);
    assert_eq!(Tailed::by_entry(None, at), Tailed::Unknown);

    for seen in [Tailed::Holds(Digest([8; 16])), Tailed::Lacks] {
        assert_eq!(seen.and(CarriedCheck::Compacted), CarriedCheck::Other, "{seen:?}");
        assert_eq!(seen.and(CarriedCheck::Same), CarriedCheck::Same, "etcd's own word");
    }
    assert_eq!(Tailed::Unknown.and(CarriedCheck::Compacted), CarriedCheck::Compacted);
    assert_eq!(Tailed::Unknown.and(CarriedCheck::Other), CarriedCheck::Other);
}
