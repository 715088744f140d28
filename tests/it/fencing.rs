//! Job: a sender whose term is old changes nothing at the replica, wherever it comes back; rival appliers do no harm; terms that went back stop.
//! Input: regions whose sidecars dial different ones of the replica's, paused shippers, restored origins. Output: passes or fails.
//! Always true: what is judged is what the replica's etcd holds, and who wrote it.

use crate::bed::contents::{load, noise};
use crate::bed::pair::{LINK, link_name};
use crate::bed::regions::{Regions, RegionsOptions, TAKEOVER_LIMIT};
use crate::bed::sidecar::Sidecar;
use crate::bed::traffic::Acknowledged;
use crate::bed::{PATIENCE, until};
use crate::resume::{last, spool_holds, write};
use etcd_client::DeleteOptions;
use etcd_ferry::demo::proxy::Direction;
use etcd_ferry::model::{Phase, Position};
use serde_json::Value;
use std::time::Instant;

/// The origin's sidecars each dial another of the replica's first: only the position can tell the replica's two who is fenced.
fn apart() -> RegionsOptions {
    RegionsOptions { sidecars: (2, 2), apart: true, ..RegionsOptions::default() }
}

fn transactions(entry: &Value) -> u64 {
    entry["counts"]["transactions"].as_u64().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_shipper_that_wakes_with_frames_in_hand_is_fenced_by_a_replica_that_has_seen_no_other() {
    let regions = Box::pin(Regions::start(apart())).await;
    let revision = regions.origin[0].put("/app/first", "1").await;
    let before = regions.wait_applied(revision).await;
    regions.wait_standby(1).await;
    let recorder = regions.record().await;
    let (shipper, its_peer) = (&regions.origin_sidecars[0], &regions.replica_sidecars[0]);
    // What it has read of the spool is held back in its line, and what the next shipper sends crawls: the old one's frames come first.
    let line = &regions.peer_lines[0][0];
    line.freeze(Direction::ToTarget);
    regions.peer_lines[1].iter().for_each(|line| line.set_rate(Some(20_000)));
    let acknowledged = write(&regions.origin[0].access(), "/app/in-hand/", 300, 4_000).await;
    let shipped = |entry: &Value| entry["seq"].as_u64() > Some(before.seq.0);
    shipper.wait_for(LINK, "frames to be on their way", shipped).await;
    shipper.pause();
    let elected = async || regions.try_position().await.filter(|position| position.term > before.term);
    until("another sidecar to say hello", TAKEOVER_LIMIT, elected).await;
    line.heal();
    let fenced = async || its_peer.log().contains("the sender is fenced").then_some(());
    until("the old sender to be fenced", PATIENCE, fenced).await;
    let position = regions.position().await;
    assert!(position.seq.0 < before.seq.0 + 150, "the old sender's frames were applied: {before:?}, then {position:?}");
    shipper.resume();
    regions.wait_standby(0).await;
    regions.peer_lines[1].iter().for_each(|line| line.set_rate(None));
    let after = regions.wait_applied(last(&acknowledged)).await;
    assert_eq!(after.term, position.term);
    regions.judge(recorder, &acknowledged, &before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_fenced_sender_left_in_a_journal_is_applied_though_its_origin_is_lost_and_nobody_says_hello_again() {
    let mut regions = Box::pin(Regions::start(apart())).await;
    let revision = regions.origin[0].put("/app/first", "1").await;
    let before = regions.wait_applied(revision).await;
    regions.wait_standby(1).await;
    let line = &regions.peer_lines[0][0];
    line.freeze(Direction::ToTarget);
    // Whoever takes the link brings next to nothing.
    regions.peer_lines[1].iter().for_each(|line| line.set_rate(Some(2_000)));
    let acknowledged = write(&regions.origin[0].access(), "/app/in-hand/", 100, 4_000).await;
    let shipped = |entry: &Value| entry["seq"].as_u64() >= Some(before.seq.0 + 100);
    regions.origin_sidecars[0].wait_for(LINK, "all of it to be on its way", shipped).await;
    regions.origin_sidecars[0].pause();
    let elected = async || regions.try_position().await.filter(|position| position.term > before.term);
    until("another sidecar to say hello", TAKEOVER_LIMIT, elected).await;
    // Nothing can be applied, and so nobody be fenced, before all of it is in the journal.
    regions.replica[0].pause();
    line.heal();
    let received = |entry: &Value| entry["durable_seq"].as_u64() >= Some(before.seq.0 + 100);
    regions.replica_sidecars[0].wait_for(LINK, "all of it to be in the journal", received).await;
    regions.replica[0].resume();
    let fenced = async || regions.replica_sidecars[0].log().contains("the sender is fenced").then_some(());
    until("the old sender to be fenced", PATIENCE, fenced).await;
    let since = Instant::now();
    // The region is lost, with all that its sidecars had.
    regions.origin_sidecars.iter_mut().for_each(Sidecar::kill);
    let position = regions.position().await;
    assert!(position.seq.0 < before.seq.0 + 100, "nothing is left to the fenced one: {position:?}");

    let applied =
        async || regions.try_position().await.filter(|position| position.origin_revision >= last(&acknowledged));
    let after = until("what is in the journal to be applied", PATIENCE * 3, applied).await;

    assert!(since.elapsed() > TAKEOVER_LIMIT * 2, "whoever took the link has had no time to say hello again");
    assert_eq!((after.epoch, after.seq.0, after.term), (before.epoch, before.seq.0 + 100, position.term));
    regions.assert_equal().await;
}

async fn paused_in_the_middle_of_a_copy(options: RegionsOptions) {
    let limits = [("page_keys_max", 100), ("page_bytes_max", 65_536)];
    let limits = limits.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let mut regions = Box::pin(Regions::prepare(RegionsOptions { limits, ..options })).await;
    load(&regions.origin[0], &noise("/app/", 4_000, 1_000)).await;
    // The copy takes about ten seconds.
    regions.peer_lines.iter().flatten().for_each(|line| line.set_rate(Some(400_000)));
    regions.start_sidecars().await;
    let middle = regions.wait_copying().await;
    // What it holds from the anchor on is its own only once its watch has read it: until then etcd may compact it away.
    let read = regions.origin[0].put("/app/read", "by the standby too").await;
    let from_anchor = |entry: &Value| {
        spool_holds(entry).is_some_and(|(after, end)| after == middle.origin_revision.0 && end >= read.0)
    };
    regions.origin_sidecars[1].wait_for(LINK, "the standby's spool to hold what follows the anchor", from_anchor).await;
    regions.origin_sidecars[0].pause();
    // What is written now is in the standby's spool alone.
    let acknowledged = write(&regions.origin[0].access(), "/app/000", 100, 100).await;
    regions.origin[0].compact(last(&acknowledged)).await;
    let taken = async || regions.try_position().await.filter(|position| position.term > middle.term);
    until("another sidecar to take the link", TAKEOVER_LIMIT, taken).await;
    let further = async || {
        let position = regions.try_position().await?;
        (position.term > middle.term && position.cursor > middle.cursor).then_some(position)
    };
    let position = until("another sidecar to go on with the copy", PATIENCE, further).await;
    assert_eq!(position.epoch, middle.epoch, "the copy goes on, it does not begin anew");
    regions.origin_sidecars[0].resume();
    regions.peer_lines.iter().flatten().for_each(|line| line.set_rate(None));
    let after = regions.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.state), (middle.epoch, Phase::Following));
    regions.wait_standby(0).await;
    regions.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_paused_in_the_middle_of_a_base_copy_is_fenced_and_the_copy_goes_on_at_its_cursor() {
    paused_in_the_middle_of_a_copy(RegionsOptions::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_paused_in_the_middle_of_a_base_copy_is_fenced_also_by_another_of_the_replicas_sidecars() {
    paused_in_the_middle_of_a_copy(apart()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_appliers_at_once_do_no_harm() {
    let regions = Box::pin(Regions::start(RegionsOptions { sidecars: (1, 2), ..RegionsOptions::default() })).await;
    let revision = regions.origin[0].put("/app/first", "1").await;
    let before = regions.wait_applied(revision).await;
    let recorder = regions.record().await;
    let mut acknowledged = Vec::new();
    let mut rivals = 0;
    for round in 0..4 {
        // The one sidecar journals what it cannot apply; then the line to it goes, and the other one gets the same.
        regions.replica[0].pause();
        let written = write(&regions.origin[0].access(), &format!("/app/{round}/"), 500, 2_000).await;
        let received = async || {
            for (number, sidecar) in regions.replica_sidecars.iter().enumerate() {
                let (health, wanted) = (sidecar.health().await?, before.seq.0 + 500 * (round + 1));
                let entry = crate::bed::sidecar::link_of(&health, LINK)?;
                if entry["seq"].as_u64() >= Some(wanted) {
                    return Some(number);
                }
            }
            None
        };
        let receiver = until("all to be received", PATIENCE, received).await;
        regions.peer_lines[0][receiver].cut();
        regions.replica[0].resume();
        let position = regions.wait_applied(last(&written)).await;
        acknowledged.extend(written);
        let other = &regions.replica_sidecars[1 - receiver];
        let shown = |entry: &Value| entry["applied_seq"].as_u64() >= Some(position.seq.0);
        let entry = other.wait_for(LINK, "the other sidecar to know of it all", shown).await;
        rivals += transactions(&entry);
        regions.peer_lines[0][receiver].heal();
    }
    assert!(rivals > 0, "nobody but the receiver applied: there were no two appliers");
    regions.judge(recorder, &acknowledged, &before).await;
}

/// The replica's first sidecar has these in its journal, applied; then it and the origin's are stopped.
async fn stopped_with_a_journal(regions: &mut Regions) -> (Vec<Acknowledged>, Position) {
    let old = write(&regions.origin[0].access(), "/app/old/", 20, 100).await;
    let before = regions.wait_applied(last(&old)).await;
    let late = &regions.replica_sidecars[0];
    late.wait_for(LINK, "the first sidecar to hold it all", |entry| entry["seq"] == before.seq.0).await;
    regions.replica_sidecars[0].stop().await;
    regions.origin_sidecars[0].stop().await;
    (old, before)
}

/// The link follows in an epoch of the same number, from its first seq on, by the replica's second sidecar; the first one comes late to it.
async fn begun_anew(regions: &mut Regions, before: &Position) -> Position {
    regions.peer_lines[0][1].heal();
    regions.origin_sidecars[0].restart().await;
    let anew = |position: &Position| position.state == Phase::Following && position.cursor.is_none();
    let position = until("the link to follow anew", PATIENCE, async || regions.try_position().await.filter(anew)).await;
    assert_eq!((position.epoch, position.seq.0), (before.epoch, 0), "the same number, another run");
    regions.replica_sidecars[0].restart().await;
    let late = &regions.replica_sidecars[0];
    late.wait_for(LINK, "the late sidecar to know the new run", |entry| entry["seq"] == 0).await;
    position
}

/// What it says that it has received is what its journal holds.
async fn applies_at_the_late_one(regions: &Regions) {
    regions.peer_lines[0][1].cut();
    let revision = regions.origin[0].put("/app/last", "1").await;
    assert_eq!(regions.wait_applied(revision).await.seq.0, 1);
    regions.assert_equal().await;
}

/// The folder stays where a link was removed, and a link of that name begins with the first epoch again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_of_a_link_that_was_removed_is_not_applied_to_one_that_was_made_anew_with_its_name() {
    let mut regions = Box::pin(Regions::start(RegionsOptions { sidecars: (1, 2), ..RegionsOptions::default() })).await;
    // The first one receives, as long as it is there.
    regions.peer_lines[0][1].cut();
    let (old, before) = stopped_with_a_journal(&mut regions).await;
    for etcd in [&regions.origin[0], &regions.replica[0]] {
        let options = DeleteOptions::new().with_prefix();
        etcd.kv().await.delete(format!("/etcd-ferry/v1/links/{LINK}/"), Some(options)).await.unwrap();
    }
    for change in old.iter().flat_map(|acknowledged| &acknowledged.changes) {
        regions.origin[0].put(change.key().to_vec(), "new").await;
    }
    let recorder = regions.record().await;
    begun_anew(&mut regions, &before).await;
    applies_at_the_late_one(&regions).await;
    regions.recorded(recorder).await.check().unwrap();
}

/// Both clusters are built anew, and their sidecars keep their folders: the first epoch has the same number, and its revisions lower ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_of_another_origin_is_not_applied_though_its_epoch_has_the_same_number_and_its_revisions_are_later() {
    let options = RegionsOptions { sidecars: (1, 2), ..RegionsOptions::default() };
    let mut regions = Box::pin(Regions::prepare(options)).await;
    load(&regions.origin[0], &noise("/app/", 200, 10)).await;
    regions.origin[0].put("/app/later", "1").await;
    write(&regions.origin[0].access(), "/app/later/", 200, 10).await;
    regions.peer_lines[0][1].cut();
    regions.start_sidecars().await;
    let (old, before) = stopped_with_a_journal(&mut regions).await;
    regions.origin[0].replace().await;
    let mut replica = regions.replica[0].kv().await;
    for prefix in ["/app/".to_owned(), format!("/etcd-ferry/v1/links/{LINK}/")] {
        replica.delete(prefix, Some(DeleteOptions::new().with_prefix())).await.unwrap();
    }
    for change in old.iter().flat_map(|acknowledged| &acknowledged.changes) {
        regions.origin[0].put(change.key().to_vec(), "new").await;
    }
    let position = begun_anew(&mut regions, &before).await;
    assert!(position.origin_revision < old[0].revision, "the trap");
    applies_at_the_late_one(&regions).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_whose_elections_went_back_with_it_stops_the_link_until_a_resync_opens_the_next_epoch() {
    let mut regions = Box::pin(Regions::start(RegionsOptions { sidecars: (1, 1), ..RegionsOptions::default() })).await;
    let shared = write(&regions.origin[0].access(), "/app/shared/", 20, 50).await;
    regions.wait_applied(last(&shared)).await;
    let snapshot = regions.origin[0].save_snapshot().await;
    let lost = write(&regions.origin[0].access(), "/app/lost/", 100, 50).await;
    regions.wait_applied(last(&lost)).await;
    // The next term is as high as this history has come; the restored one will not have come so far.
    regions.origin_sidecars[0].stop().await;
    regions.origin_sidecars[0].restart().await;
    let revision = regions.origin[0].put("/app/lost", "1").await;
    let before = regions.wait_applied(revision).await;
    assert!(before.term.0 > last(&lost).0);
    regions.origin[0].restore_snapshot(&snapshot).await;
    let entry = regions.origin_sidecars[0].wait_for_state(LINK, "stopped").await;
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains("restored") && reason.contains("resync config"), "{reason}");
    // Also a sidecar that knows nothing of before.
    regions.origin_sidecars[0].stop().await;
    std::fs::remove_dir_all(regions.origin_sidecars[0].data_dir().join("origin")).unwrap();
    regions.origin_sidecars[0].restart().await;
    let entry = regions.origin_sidecars[0].wait_for_state(LINK, "stopped").await;
    assert!(entry["reason"].as_str().unwrap().contains("restored"), "{entry:#}");
    assert!(entry["term"].as_u64() < Some(before.term.0), "{entry:#}");
    let output = regions.origin_sidecars[0].admin(&["resync", LINK, "--allow-deletes"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let is_new = |p: &Position| p.epoch > before.epoch && p.state == Phase::Following && p.term < before.term;
    let opened = async || regions.replica[0].position(&link_name(LINK)).await.filter(is_new);
    until("a new epoch with the lower term", PATIENCE, opened).await;
    let revision = regions.origin[0].put("/app/after", "1").await;
    regions.wait_applied(revision).await;
    regions.assert_equal().await;
}
