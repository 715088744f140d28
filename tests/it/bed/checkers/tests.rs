//! Job: each checker passes a faithful replica, and fails one that breaks its invariant.
//! Input: made-up recordings of one link. Output: passes or fails.
//! Always true: no recording is longer than what its test is named for needs.

use super::*;
use etcd_ferry::model::{ClusterId, Digest, Epoch, Seq, Term, Waymark};

fn put(key: &str, value: &str) -> Change {
    Change::Put { key: Bytes::from(key.to_owned()), value: Bytes::from(value.to_owned()) }
}

fn delete(key: &str) -> Change {
    Change::Delete { key: Bytes::from(key.to_owned()) }
}

/// What the origin was told, revision by revision.
fn written() -> Vec<Acknowledged> {
    let ack = |revision, changes| Acknowledged { revision: Revision(revision), changes };
    vec![
        ack(2, vec![put("/a", "1")]),
        ack(3, vec![put("/a", "2"), put("/b", "2")]),
        ack(4, vec![delete("/a")]),
        ack(5, vec![put("/b", "5"), put("/c", "5")]),
    ]
}

fn position(seq: u64, revision: u64) -> Change {
    let position = Position {
        epoch: Epoch(1),
        term: Term(0),
        seq: Seq(seq),
        origin_cluster: ClusterId(7),
        origin_revision: Revision(revision),
        carried_revision: Revision(revision),
        carried_digest: Digest::default(),
        waymark: Waymark::default(),
        ranges_digest: Digest::default(),
        state: Phase::Following,
        anchor_revision: Revision(1),
        cursor: None,
        part: 0,
        part_digest: None,
        skipped: Vec::new(),
        held_back: None,
        paused: None,
        equal_revision: Revision(0),
    };
    Change::Put { key: LinkName::new("config").unwrap().position_key(), value: position.to_json().into() }
}

fn history(revisions: Vec<(u64, Vec<Change>)>) -> History {
    let revisions = revisions.into_iter().map(|(revision, changes)| (Revision(revision), changes)).collect();
    History { base_revision: Revision(1), base: KeyMap::new(), revisions }
}

/// A replica that applied each origin revision in one of its own: `changes` follow the position.
fn recording(applied: Vec<(u64, u64, Vec<Change>)>) -> Recording {
    let with_position = |(at, (seq, revision, changes)): (u64, (u64, u64, Vec<Change>))| {
        (at, std::iter::once(position(seq, revision)).chain(changes).collect())
    };
    Recording {
        link: LinkName::new("config").unwrap(),
        ranges: Ranges::new(&[], &[]),
        origin: history(written().into_iter().map(|ack| (ack.revision.0, ack.changes)).collect()),
        replica: history((10..).zip(applied).map(with_position).collect()),
    }
}

fn good() -> Vec<(u64, u64, Vec<Change>)> {
    (1..).zip(written()).map(|(seq, ack)| (seq, ack.revision.0, ack.changes)).collect()
}

/// A faithful replica, but for who has sent each revision: an (epoch, term).
fn sent_by(senders: [(u64, u64); 4]) -> Recording {
    let mut recording = recording(good());
    for (changes, (epoch, term)) in recording.replica.revisions.values_mut().zip(senders) {
        let Change::Put { key, value } = &changes[0] else { continue };
        let position = Position { epoch: Epoch(epoch), term: Term(term), ..parse(value).unwrap() };
        changes[0] = Change::Put { key: key.clone(), value: position.to_json().into() };
    }
    recording
}

fn invariant<T: fmt::Debug>(judged: Result<T, Fault>) -> &'static str {
    judged.unwrap_err().invariant
}

#[test]
fn a_faithful_replica_passes_every_checker() {
    let recording = recording(good());
    assert_eq!(recording.check().unwrap(), 4);
    assert_eq!(recording.fenced().unwrap(), 4);
    assert_eq!(recording.ordered().unwrap(), 4);
    assert_eq!(recording.once().unwrap(), 3, "the first position has none before it");
    assert_eq!(recording.complete(&written()).unwrap(), 4);
}

#[test]
fn a_replica_that_merges_revisions_passes_too() {
    let mut applied = good();
    applied[2] = (4, 5, vec![delete("/a"), put("/b", "5"), put("/c", "5")]);
    applied.truncate(3);
    assert_eq!(recording(applied).check().unwrap(), 3);
}

#[test]
fn a_missing_revision_is_not_complete() {
    let mut applied = good();
    applied.truncate(3);
    assert_eq!(invariant(recording(applied).complete(&written())), "complete");
}

#[test]
fn a_lost_delete_is_neither_complete_nor_whole() {
    let mut applied = good();
    applied[2].2.clear();
    assert_eq!(invariant(recording(applied.clone()).complete(&written())), "complete");
    assert_eq!(invariant(recording(applied).whole()), "whole");
}

#[test]
fn an_acknowledgement_that_the_origins_history_lacks_is_noticed() {
    let mut recording = recording(good());
    recording.origin.revisions.remove(&Revision(3));
    assert_eq!(invariant(recording.complete(&written())), "complete");
}

#[test]
fn a_torn_revision_is_not_whole() {
    let mut applied = good();
    applied[1].2.pop();
    assert_eq!(invariant(recording(applied).whole()), "whole");
}

#[test]
fn a_torn_revision_under_a_position_that_copies_is_not_judged() {
    let mut torn = recording(good());
    for changes in torn.replica.revisions.values_mut() {
        let Change::Put { key, value } = &changes[0] else { continue };
        let json = String::from_utf8(value.to_vec()).unwrap().replace("following", "copying");
        changes[0] = Change::Put { key: key.clone(), value: json.into() };
    }
    torn.replica.revisions.values_mut().for_each(|changes| changes.truncate(2));
    assert_eq!(torn.whole().unwrap(), 0);
}

#[test]
fn a_position_ahead_of_its_changes_is_not_whole() {
    let mut applied = good();
    applied[0].1 = 3;
    assert_eq!(invariant(recording(applied).whole()), "whole");
}

#[test]
fn a_sender_of_an_older_epoch_or_term_is_not_fenced() {
    let of_term = [(1, 1), (1, 2), (1, 1), (1, 1)];
    let of_epoch = [(1, 3), (2, 3), (2, 3), (1, 3)];
    let of_epoch_in_a_later_term = [(1, 3), (2, 0), (1, 4), (2, 4)];
    for senders in [of_term, of_epoch, of_epoch_in_a_later_term] {
        assert_eq!(invariant(sent_by(senders).fenced()), "fenced");
        assert_eq!(invariant(sent_by(senders).check()), "fenced");
    }
}

#[test]
fn a_sender_of_an_older_term_than_before_the_recording_is_not_fenced() {
    let mut late = sent_by([(1, 3); 4]);
    let earlier = sent_by([(1, 4); 4]).replica.revisions[&Revision(10)][0].clone();
    apply(&mut late.replica.base, &earlier);
    assert_eq!(invariant(late.fenced()), "fenced");
}

#[test]
fn later_terms_and_epochs_are_fenced_whatever_the_term_of_a_new_epoch() {
    assert_eq!(sent_by([(1, 0), (1, 5), (1, 5), (2, 0)]).fenced().unwrap(), 4);
}

#[test]
fn revisions_in_another_order_are_not_ordered() {
    let mut applied = good();
    applied.swap(1, 2);
    assert_eq!(invariant(recording(applied.clone()).ordered()), "ordered");
    assert_eq!(invariant(recording(applied).whole()), "whole");
}

#[test]
fn a_repeated_revision_is_not_once() {
    let mut applied = good();
    let again = applied[3].clone();
    applied.push(again);
    assert_eq!(invariant(recording(applied).once()), "once");
}

#[test]
fn a_seq_that_skips_or_stretches_is_not_once() {
    let mut applied = good();
    applied[2].0 = 4;
    applied[3].0 = 5;
    assert_eq!(invariant(recording(applied).once()), "once");
}

#[test]
fn a_change_beside_the_position_is_not_once() {
    let mut recording = recording(good());
    recording.replica.revisions.insert(Revision(50), vec![put("/b", "5")]);
    assert_eq!(invariant(recording.once()), "once");
}

#[test]
fn one_differing_key_is_not_equal_and_is_named_without_its_value() {
    let map = |value: &str| KeyMap::from([(Bytes::from_static(b"/a"), Bytes::from(value.to_owned()))]);
    assert_eq!(equal(&map("same"), &map("same")), Ok(1));
    let fault = equal(&map("here"), &map("there-value")).unwrap_err().to_string();
    assert!(fault.contains("/a") && !fault.contains("there-value"), "{fault}");
    assert_eq!(invariant(equal(&map("1"), &KeyMap::new())), "equal");
}
