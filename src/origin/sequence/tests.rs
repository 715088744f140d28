//! Job: tests of the sequencer: order, fragments, filters, and what etcd must never do.
//! Input: watch messages made by hand, and cut at random. Output: passes or fails.
//! Pure: no clock, no I/O.
//! Always true: no etcd is asked.

use super::*;
use crate::model::{Epoch, Position, Seq, Term};
use proptest::prelude::*;

const PEER: ClusterId = ClusterId(7);

fn link() -> LinkName {
    LinkName::new("config").unwrap()
}

fn sequencer(after: u64) -> Sequencer {
    Sequencer::new(&link(), Ranges::new(&["/app/".into()], &["/app/x/".into()]), Revision(after), 1_000)
}

fn put(revision: u64, key: &str, value: &str) -> Event {
    let change = Change::Put { key: key.to_owned().into(), value: value.to_owned().into() };
    Event { revision: Revision(revision), change }
}

fn delete(revision: u64, key: &str) -> Event {
    Event { revision: Revision(revision), change: Change::Delete { key: key.to_owned().into() } }
}

fn message(events: Vec<Event>) -> WatchMessage {
    WatchMessage { events, fragment: false }
}

fn piece(events: Vec<Event>) -> WatchMessage {
    WatchMessage { fragment: true, ..message(events) }
}

fn position(origin_cluster: ClusterId) -> String {
    let position = Position {
        epoch: Epoch(1),
        term: Term(0),
        seq: Seq(3),
        origin_cluster,
        origin_revision: Revision(5),
        carried_revision: Revision(5),
        carried_digest: Digest::default(),
        anchor_revision: Revision(1),
        ..Position::of_tests()
    };
    String::from_utf8(position.to_json()).unwrap()
}

fn revisions(ended: &[Sequenced]) -> Vec<u64> {
    ended.iter().map(|sequenced| sequenced.revision.0).collect()
}

#[test]
fn a_message_holds_several_whole_revisions_each_sorted_by_key() {
    let events = vec![put(11, "/app/b", "1"), put(11, "/app/a", "1"), put(11, "/app/c", "1"), delete(12, "/app/a")];
    let ended = sequencer(10).push(message(events)).unwrap();
    assert_eq!(revisions(&ended), [11, 12]);
    let keys: Vec<&Bytes> = ended[0].whole.changes.iter().map(Change::key).collect();
    assert_eq!(keys, ["/app/a", "/app/b", "/app/c"]);
    assert_eq!(ended[1].whole.changes, vec![Change::Delete { key: "/app/a".into() }]);
}

#[test]
fn a_revision_in_fragments_ends_with_the_last_one_and_waits_for_no_later_message() {
    let mut sequencer = sequencer(10);
    assert_eq!(revisions(&sequencer.push(piece(vec![put(11, "/app/a", ""), put(12, "/app/a", "")])).unwrap()), [11]);
    assert_eq!(sequencer.push(piece(vec![put(12, "/app/b", "")])).unwrap(), vec![]);
    assert_eq!(sequencer.covered(), Revision(11));
    let ended = sequencer.push(message(vec![put(12, "/app/c", "")])).unwrap();
    assert_eq!((revisions(&ended), ended[0].whole.changes.len()), (vec![12], 3));
    assert_eq!(sequencer.covered(), Revision(12));
}

#[test]
fn a_progress_notice_covers_what_was_seen_but_not_a_revision_that_is_still_coming() {
    let mut sequencer = sequencer(10);
    sequencer.progress(Revision(20)).unwrap();
    assert_eq!(sequencer.covered(), Revision(20));
    sequencer.push(piece(vec![put(21, "/app/a", "")])).unwrap();
    sequencer.progress(Revision(30)).unwrap();
    assert_eq!(sequencer.covered(), Revision(20));
    sequencer.progress(Revision(3)).unwrap();
    assert_eq!(sequencer.covered(), Revision(20));
}

#[test]
fn keys_outside_of_the_ranges_are_left_out_and_their_revision_is_still_handed_out() {
    let ended = sequencer(10).push(message(vec![put(11, "/app/x/1", "v"), put(12, "/b", "v")])).unwrap();
    assert_eq!(revisions(&ended), [11, 12]);
    assert!(ended.iter().all(|s| s.whole.changes.is_empty() && !s.ferry_only && !s.is_carried(None)));
}

#[test]
fn a_revision_that_comes_again_or_goes_back_or_is_at_or_below_the_start_is_an_error() {
    let back = |last, got| Err(SequenceError::WentBack { last: Revision(last), got: Revision(got) });
    assert_eq!(sequencer(10).push(message(vec![put(10, "/app/a", "")])), back(10, 10));
    assert_eq!(sequencer(10).push(message(vec![put(12, "/app/a", ""), put(11, "/app/a", "")])), back(12, 11));
    let mut twice = sequencer(10);
    twice.push(message(vec![put(12, "/app/a", "")])).unwrap();
    assert_eq!(twice.push(message(vec![put(12, "/app/b", "")])), back(12, 12));
}

#[test]
fn of_a_key_that_one_revision_puts_and_then_deletes_the_last_event_counts() {
    let ended = sequencer(10).push(message(vec![put(11, "/app/a", "1"), delete(11, "/app/a")])).unwrap();
    assert_eq!(ended[0].whole.changes, vec![Change::Delete { key: "/app/a".into() }]);
}

#[test]
fn a_revision_larger_than_the_bound_is_an_error_that_names_it_and_other_keys_do_not_count() {
    let mut sequencer = sequencer(10);
    sequencer.push(piece(vec![put(11, "/b", &"v".repeat(5_000)), put(11, "/app/a", &"v".repeat(900))])).unwrap();
    let error = sequencer.push(message(vec![put(11, "/app/b", &"v".repeat(100))])).unwrap_err();
    assert!(matches!(error, SequenceError::TooLarge { revision: Revision(11), bytes: 1_012, bytes_max: 1_000 }));
    assert!(error.to_string().contains("revision_bytes_max"));
}

#[test]
fn a_revision_that_writes_a_position_says_which_cluster_it_came_from() {
    let key = "/etcd-ferry/v1/links/back/position";
    let events = vec![put(11, "/app/a", "v"), put(11, key, &position(PEER))];
    let ended = sequencer(10).push(message(events)).unwrap();
    assert_eq!((&ended[0].came_from[..], ended[0].ferry_only), (&[PEER][..], false));
    assert!(!ended[0].is_carried(Some(PEER)), "it does not go back to where it came from");
    assert!(ended[0].is_carried(Some(ClusterId(8))), "a chain still carries it");
}

#[test]
fn a_position_that_cannot_be_read_tells_nothing_and_a_later_versions_position_is_understood() {
    let key = "/etcd-ferry/v1/links/back/position";
    let other_keys = ["/etcd-ferry/v1/links//position", "/etcd-ferry/v1/links/a/b/position", "/app/links/a/position"];
    let mut events =
        vec![put(11, key, "no JSON"), put(12, key, r#"{"origin_cluster":"7","state":"new"}"#), delete(13, key)];
    events.extend(other_keys.map(|key| put(14, key, &position(PEER))));
    let ended = sequencer(10).push(message(events)).unwrap();
    assert_eq!(ended.iter().map(|s| s.came_from.len()).collect::<Vec<_>>(), [0, 1, 0, 0]);
}

#[test]
fn revisions_of_ferry_keys_alone_are_known_and_the_links_own_waymark_is_read() {
    let mut sequencer = sequencer(10);
    let waymark = r#"{"counter":2,"id":18446744073709551615,"previous":{"counter":1,"id":5}}"#;
    let events = vec![
        put(11, "/etcd-ferry/v1/links/config/waymark", waymark),
        put(12, "/etcd-ferry/v1/links/other/waymark", waymark),
        put(13, "/app/a", "v"),
    ];
    let ended = sequencer.push(message(events)).unwrap();
    let (present, previous) = (Waymark { counter: 2, id: u64::MAX }, Some(Waymark { counter: 1, id: 5 }));
    assert_eq!(ended[0].waymark, Some(OriginWaymark { present, previous }));
    assert_eq!(ended[1].waymark, None);
    assert_eq!(serde_json::to_string(&ended[0].waymark).unwrap(), waymark);
    assert_eq!(ended.iter().map(|s| s.ferry_only).collect::<Vec<_>>(), [true, true, false]);
}

#[test]
fn the_links_own_canary_is_of_the_link_though_it_changes_nothing_and_no_other_key_of_ferrys_is() {
    let mut sequencer = sequencer(10);
    let events = vec![
        put(11, "/etcd-ferry/v1/links/config/canary", "{}"),
        put(12, "/etcd-ferry/v1/links/other/canary", "{}"),
        delete(13, "/etcd-ferry/v1/links/config/canary"),
        put(14, "/etcd-ferry/v1/links/config/canary/x", "{}"),
        put(15, "/etcd-ferry/v1/links/config/canary", "{}"),
        put(15, "/app/a", "v"),
    ];
    let ended = sequencer.push(message(events)).unwrap();
    let of_the_link: Vec<bool> = ended.iter().map(Sequenced::is_of_the_link).collect();
    assert_eq!(of_the_link, [true, false, false, false, true]);
    assert!(ended[0].whole.changes.is_empty() && ended[0].ferry_only && ended[0].is_carried(Some(PEER)));
    assert_eq!(ended[4].whole.changes.len(), 1, "the key itself is never carried");
}

#[test]
fn a_carried_canary_is_known_again_and_another_revision_in_its_place_is_another_history() {
    let empty = shape_of(&WholeRevision { revision: Revision(10), changes: Vec::new() });
    let carried = Carried { revision: Revision(10), digest: empty, peer: None, digest_of: shape_of };
    let canary = || put(10, "/etcd-ferry/v1/links/config/canary", "{}");
    let mut same = sequencer(12).expect(carried);
    assert_eq!(same.push(message(vec![canary()])), Ok(vec![]));
    let unknown = same.push(message(vec![put(11, "/etcd-ferry/v1/links/config/canary", "{}")]));
    assert!(unknown.is_err(), "it would have been carried");
    let mut other = sequencer(12).expect(carried);
    assert!(other.push(message(vec![put(10, "/app/a", "v")])).is_err());
    for beside in ["/b", "/etcd-ferry/v1/links/config/waymark", "/etcd-ferry/v1/links/other/canary"] {
        let mut beside_the_link = sequencer(12).expect(carried);
        let found = beside_the_link.push(message(vec![put(10, beside, "{}")]));
        let wanted = SequenceError::OtherHistory { carried: Revision(10), found: Found::OtherChanges };
        assert_eq!(found, Err(wanted), "{beside} is no canary of this link");
    }
}

/// Not a real digest: the number of changes and the bytes of the revision.
fn shape_of(whole: &WholeRevision) -> Digest {
    let shape = (whole.changes.len() * 1_000 + whole.bytes()) as u128;
    Digest(shape.to_be_bytes())
}

fn resumed(after: u64, peer: Option<ClusterId>) -> Sequencer {
    let changes = vec![Change::Put { key: "/app/a".into(), value: "v1".into() }];
    let digest = shape_of(&WholeRevision { revision: Revision(10), changes });
    sequencer(after).expect(Carried { revision: Revision(10), digest, peer, digest_of: shape_of })
}

fn other(found: Found) -> Result<Vec<Sequenced>, SequenceError> {
    Err(SequenceError::OtherHistory { carried: Revision(10), found })
}

#[test]
fn the_carried_revision_comes_first_is_compared_and_not_handed_out_again() {
    let events = vec![put(10, "/app/a", "v1"), put(10, "/b", "of no matter"), put(11, "/app/a", "v2")];
    assert_eq!(revisions(&resumed(10, None).push(message(events)).unwrap()), [11]);
}

#[test]
fn other_changes_in_the_carried_revision_are_another_history() {
    assert_eq!(resumed(10, None).push(message(vec![put(10, "/app/a", "other")])), other(Found::OtherChanges));
    assert_eq!(resumed(10, None).push(message(vec![put(10, "/b", "v1")])), other(Found::OtherChanges));
}

#[test]
fn a_carried_revision_that_does_not_come_is_another_history() {
    let later = vec![put(11, "/app/a", "v1")];
    assert_eq!(resumed(10, None).push(message(later)), other(Found::Nothing(Revision(11))));
    let mut idle = resumed(10, None);
    assert_eq!(idle.progress(Revision(9)), Ok(()));
    assert!(matches!(idle.progress(Revision(10)), Err(SequenceError::OtherHistory { .. })));
}

#[test]
fn between_the_carried_revision_and_the_position_nothing_may_be_that_the_link_would_carry() {
    let key = "/etcd-ferry/v1/links/back/position";
    let from_peer = vec![put(12, "/app/c", "v"), put(12, key, &position(PEER))];
    let known = || [vec![put(10, "/app/a", "v1"), put(11, "/b", "")], from_peer.clone()].concat();
    for peer in [Some(PEER), None] {
        let later = [known(), vec![put(15, "/b", ""), put(16, "/app/d", "")]].concat();
        assert_eq!(revisions(&resumed(15, peer).push(message(later)).unwrap()), [16]);
        let unknown = [known(), vec![put(13, "/app/d", "")]].concat();
        assert_eq!(resumed(15, peer).push(message(unknown)), other(Found::Unknown(Revision(13))));
    }
    assert_eq!(resumed(15, Some(ClusterId(8))).push(message(known())), other(Found::Unknown(Revision(12))));
}

#[test]
fn what_was_known_before_is_covered_from_the_start() {
    assert_eq!(resumed(15, None).covered(), Revision(15));
}

#[test]
fn a_watch_proves_what_it_shows_and_all_before_the_carried_revision_once_that_was_the_same() {
    assert_eq!(sequencer(15).proven_from(), Some(Revision(16)));
    let mut resumed = resumed(15, None);
    assert_eq!(resumed.proven_from(), None);
    resumed.push(piece(vec![put(10, "/app/a", "v1")])).unwrap();
    assert_eq!(resumed.proven_from(), None, "the revision may go on");
    resumed.push(message(vec![put(16, "/app/a", "v2")])).unwrap();
    assert_eq!(resumed.proven_from(), Some(Revision(0)));
}

proptest! {
    #[test]
    fn however_messages_are_cut_into_fragments_the_same_revisions_come_out(
        sizes in prop::collection::vec(1_usize..5, 1..12), cuts in prop::collection::vec(any::<bool>(), 60),
    ) {
        let revision_of = |(i, size): (usize, &usize)| {
            let revision = u64::try_from(i).unwrap_or(0) * 2 + 11;
            (0..*size).map(move |k| put(revision, &format!("/app/{k}"), "v")).collect::<Vec<_>>()
        };
        let events: Vec<Event> = sizes.iter().enumerate().flat_map(revision_of).collect();
        let whole = sequencer(10).push(message(events.clone())).unwrap();
        let mut cut_up = sequencer(10);
        let mut ended = Vec::new();
        let mut pending = Vec::new();
        for (event, cut) in events.iter().zip(cuts) {
            pending.push(event.clone());
            if cut {
                ended.extend(cut_up.push(piece(std::mem::take(&mut pending))).unwrap());
            }
        }
        ended.extend(cut_up.push(message(pending)).unwrap());
        prop_assert_eq!(ended, whole);
    }
}
