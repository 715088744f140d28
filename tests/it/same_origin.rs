//! Job: a link follows one origin: a restored one is noticed, whatever its head says, and nothing else is taken for one.
//! Input: origins restored from snapshots with identical flags, compactions, restarts. Output: passes or fails.
//! Always true: the cluster id of a restored origin is the old one, and its head is past the old one before the link sees it.

use crate::bed::etcd::Etcd;
use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::traffic::{Write, commit};
use crate::bed::{PATIENCE, until};
use crate::resume::{following, last, second_waymark, wait_spooled, write};
use etcd_ferry::model::{Phase, Position, Revision};
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

/// Goes back to the snapshot, and writes other things past `old_head`.
pub async fn restore_and_write_past(origin: &mut Etcd, snapshot: &std::path::Path, old_head: Revision) -> Revision {
    let cluster = origin.cluster_id().await;
    origin.restore_snapshot(snapshot).await;
    assert_eq!(origin.cluster_id().await, cluster, "the trap");
    let head = origin.head().await;
    assert!(head < old_head, "the snapshot is older than what was carried");
    let missing = usize::try_from(old_head.0 - head.0).unwrap() + 20;
    let written = write(&origin.access(), "/app/new-history/", missing, 50).await;
    assert!(last(&written) > old_head);
    last(&written)
}

async fn stopped(pair: &Pair) -> String {
    let entry = pair.origin_sidecar.wait_for_state(LINK, "stopped").await;
    let reason = entry["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("restored") && reason.contains("resync config"), "{reason}");
    reason
}

async fn nothing_of_the_new_history_is_there(pair: &Pair, before: &Position) {
    let (_, keys) = pair.replica.read_all().await;
    assert!(!keys.keys().any(|key| key.starts_with(b"/app/new-history/")), "the replica went on over a hole");
    assert_eq!(pair.position().await.map(|p| p.epoch), Some(before.epoch));
}

/// The operator says that this origin is the right one: all that the replica has too much goes.
async fn resync(pair: &Pair, before: &Position, head: Revision) {
    let output = pair.origin_sidecar.admin(&["resync", LINK, "--allow-deletes"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let is_new = |p: &Position| p.epoch > before.epoch && p.state == Phase::Following && p.origin_revision >= head;
    let after = until("a new epoch", PATIENCE, async || pair.position().await.filter(is_new)).await;
    pair.wait_equal().await;
    let revision = pair.origin.put("/app/after-the-resync", "1").await;
    assert_eq!(pair.wait_applied(revision).await.epoch, after.epoch);
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_restored_and_written_past_its_old_head_stops_the_link_by_the_carried_digest_until_a_resync() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let shared = write(&pair.origin.access(), "/app/shared/", 50, 50).await;
    pair.wait_applied(last(&shared)).await;
    let snapshot = pair.origin.save_snapshot().await;
    let lost = write(&pair.origin.access(), "/app/lost/", 50, 50).await;
    pair.wait_applied(last(&lost)).await;
    pair.origin_sidecar.stop().await;
    let head = restore_and_write_past(&mut pair.origin, &snapshot, last(&lost)).await;
    // Without a spool, only what the position says of the carried revision can tell.
    std::fs::remove_dir_all(crate::resume::spool_dir(&pair)).unwrap();
    pair.origin_sidecar.restart().await;
    let reason = stopped(&pair).await;
    assert!(reason.contains(&format!("its revision {} is not the one that was carried", last(&lost))), "{reason}");
    nothing_of_the_new_history_is_there(&pair, &before).await;
    resync(&pair, &before, head).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_restored_under_an_open_stream_stops_the_link() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let snapshot = pair.origin.save_snapshot().await;
    let lost = write(&pair.origin.access(), "/app/lost/", 50, 50).await;
    pair.wait_applied(last(&lost)).await;
    // Nobody sees the restored origin before it is past its old head.
    pair.origin_sidecar.pause();
    let head = restore_and_write_past(&mut pair.origin, &snapshot, last(&lost)).await;
    pair.origin_sidecar.resume();
    stopped(&pair).await;
    nothing_of_the_new_history_is_there(&pair, &before).await;
    resync(&pair, &before, head).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_carried_revision_is_compacted_away_the_waymark_tells_a_restored_origin() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let snapshot = pair.origin.save_snapshot().await;
    let seen = second_waymark(&pair.origin, PATIENCE).await;
    // Each start rewrites the waymark, and the position takes it with what is applied next.
    pair.origin_sidecar.stop().await;
    pair.origin_sidecar.restart().await;
    until("a position with a later waymark", PATIENCE, async || {
        let revision = pair.origin.put("/app/lost", "2").await;
        let waymark = pair.wait_applied(revision).await.waymark;
        (waymark.counter > seen).then_some(())
    })
    .await;
    let reached = pair.position().await.unwrap().origin_revision;
    pair.origin_sidecar.stop().await;
    let head = restore_and_write_past(&mut pair.origin, &snapshot, reached).await;
    pair.origin.compact(head).await;
    pair.origin_sidecar.restart().await;
    let reason = stopped(&pair).await;
    assert!(reason.contains("its waymark is number"), "{reason}");
    nothing_of_the_new_history_is_there(&pair, &before).await;
    resync(&pair, &before, head).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_whose_head_is_below_what_was_carried_stops_the_link() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let snapshot = pair.origin.save_snapshot().await;
    let lost = write(&pair.origin.access(), "/app/lost/", 50, 50).await;
    pair.wait_applied(last(&lost)).await;
    pair.origin.restore_snapshot(&snapshot).await;
    let reason = stopped(&pair).await;
    assert!(reason.contains("head"), "{reason}");
    nothing_of_the_new_history_is_there(&pair, &before).await;
    resync(&pair, &before, Revision(0)).await;
}

/// Of two sidecars at the origin, each with a disk of its own, the one that was down while the origin was restored and the link went on.
struct LeftBehind {
    disk: PathBuf,
    node: String,
    lost: Revision,
    /// The end of its spool.
    unrelated: Revision,
}

impl LeftBehind {
    async fn prepare(pair: &mut Pair, before: &Position) -> Self {
        let snapshot = pair.origin.save_snapshot().await;
        let lost = last(&write(&pair.origin.access(), "/app/lost/", 20, 50).await);
        pair.wait_applied(lost).await;
        let unrelated = last(&write(&pair.origin.access(), "/other/", 400, 10).await);
        wait_spooled(pair, unrelated).await;
        pair.origin_sidecar.stop().await;
        let disk = pair.dir().join("disk of the first sidecar");
        std::fs::rename(pair.origin_sidecar.data_dir(), &disk).unwrap();
        pair.origin.restore_snapshot(&snapshot).await;
        let node = std::mem::replace(&mut pair.origin_sidecar.options.node, "us-east-1-b".to_owned());
        pair.origin_sidecar.write_config();
        pair.origin_sidecar.restart().await;
        stopped(pair).await;
        resync(pair, before, Revision(0)).await;
        Self { disk, node, lost, unrelated }
    }

    async fn comes_back_in_place_of_the_other(self, pair: &mut Pair) {
        std::fs::remove_dir_all(pair.origin_sidecar.data_dir()).unwrap();
        std::fs::rename(&self.disk, pair.origin_sidecar.data_dir()).unwrap();
        pair.origin_sidecar.options.node = self.node;
        pair.origin_sidecar.write_config();
        pair.origin_sidecar.restart().await;
    }
}

/// etcd shows nothing any more of what the first sidecar has spooled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_that_was_filled_before_a_restore_is_not_shipped_once_another_sidecar_has_gone_on_with_the_restored_origin()
 {
    let (mut pair, before) = following(PairOptions::default()).await;
    let first = LeftBehind::prepare(&mut pair, &before).await;
    let epoch = pair.position().await.unwrap().epoch;
    pair.proxy.cut();
    let kept_by_nobody = pair.origin.put("/app/of-the-new-history", "1").await;
    assert!(kept_by_nobody < first.lost, "the first sidecar has read past it, in the other history");
    let missing = usize::try_from(first.unrelated.0 - kept_by_nobody.0).unwrap() + 20;
    write(&pair.origin.access(), "/other/", missing, 10).await;
    pair.origin_sidecar.stop().await;
    pair.origin.compact(first.unrelated).await;
    first.comes_back_in_place_of_the_other(&mut pair).await;
    pair.proxy.heal();
    pair.wait_applied(pair.origin.put("/app/after", "1").await).await;
    pair.wait_equal().await;
    assert!(pair.position().await.unwrap().epoch > epoch, "what came in between is mended, in an epoch of its own");
}

/// etcd still shows that the first sidecar's spool is of another history, and its watch meets that before the replica answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_comes_back_with_a_spool_of_a_history_that_the_link_has_left_goes_on_with_the_present_one() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let first = LeftBehind::prepare(&mut pair, &before).await;
    let epoch = pair.position().await.unwrap().epoch;
    pair.proxy.cut();
    let waiting = pair.origin.put("/app/of-the-new-history", "1").await;
    assert!(waiting < first.lost);
    pair.origin_sidecar.stop().await;
    first.comes_back_in_place_of_the_other(&mut pair).await;
    let told = |entry: &Value| entry["reason"].as_str().is_some_and(|reason| reason.contains("restored"));
    pair.origin_sidecar.wait_for(LINK, "another history to be told of while the replica is away", told).await;
    pair.proxy.heal();
    pair.wait_applied(pair.origin.put("/app/after", "1").await).await;
    pair.wait_equal().await;
    assert_eq!(pair.position().await.unwrap().epoch, epoch, "nothing is lost that a comparison would have to find");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_link_declines_a_comparison_and_stays_as_it_is_until_a_resync() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let snapshot = pair.origin.save_snapshot().await;
    let lost = write(&pair.origin.access(), "/app/lost/", 50, 50).await;
    pair.wait_applied(last(&lost)).await;
    pair.origin.restore_snapshot(&snapshot).await;
    stopped(&pair).await;
    let stops = |pair: &Pair| pair.origin_sidecar.log().matches("the link stops").count();
    let stops_before = stops(&pair);
    for command in ["verify", "repair"] {
        let output = pair.origin_sidecar.admin(&[command, LINK]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("the link is stopped") && said.contains("restored"), "{command}: {said}");
    }
    // A link that had said hello again would have stopped again before it took the next command.
    resync(&pair, &before, Revision(0)).await;
    assert_eq!(stops(&pair), stops_before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_of_the_lost_history_is_not_continued_with_the_new_one_though_the_replica_was_away() {
    let (mut pair, before) = following(PairOptions::default()).await;
    pair.proxy.cut();
    let snapshot = pair.origin.save_snapshot().await;
    let lost = write(&pair.origin.access(), "/app/lost/", 50, 50).await;
    wait_spooled(&pair, last(&lost)).await;
    pair.origin_sidecar.pause();
    let head = restore_and_write_past(&mut pair.origin, &snapshot, last(&lost)).await;
    pair.origin_sidecar.resume();
    let told = |entry: &Value| entry["reason"].as_str().is_some_and(|reason| reason.contains("restored"));
    pair.origin_sidecar.wait_for(LINK, "the restored origin to be told of while the replica is away", told).await;
    pair.origin_sidecar.stop().await;
    pair.origin_sidecar.restart().await;
    pair.proxy.heal();
    stopped(&pair).await;
    nothing_of_the_new_history_is_there(&pair, &before).await;
    resync(&pair, &before, head).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compaction_exactly_at_a_carried_delete_and_a_restart_of_the_origin_are_no_other_history() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let mut kv = pair.origin.kv().await;
    for round in 0..3 {
        let writes = [Write::put(format!("/app/{round}"), "1")];
        commit(&mut kv, &writes).await.unwrap();
        let deleted = commit(&mut kv, &[Write::delete(format!("/app/{round}"))]).await.unwrap().unwrap().revision;
        let position = pair.wait_applied(deleted).await;
        assert_eq!(position.carried_revision, deleted);
        pair.origin_sidecar.stop().await;
        if round == 1 {
            std::fs::remove_dir_all(crate::resume::spool_dir(&pair)).unwrap();
        }
        pair.origin.compact(deleted).await;
        pair.origin.restart().await;
        kv = pair.origin.kv().await;
        let next = pair.origin.put(format!("/app/next-{round}"), "1").await;
        pair.origin_sidecar.restart().await;
        let after = pair.wait_applied(next).await;
        assert_eq!(after.epoch, before.epoch, "round {round}");
    }
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_to_the_head_each_tenth_of_a_second_with_reconnects_is_no_other_history() {
    let (pair, before) = following(PairOptions::default()).await;
    let access = pair.origin.access();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let compacting = tokio::spawn(async move {
        let mut kv = access.kv().await;
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        while !*stopped.borrow() {
            ticks.tick().await;
            let head = kv.get("head", None).await.unwrap().header().unwrap().revision();
            // Refused where nothing was written since the last one.
            let _ = kv.compact(head, None).await;
        }
    });
    let mut kv = pair.origin.kv().await;
    let mut head = Revision(0);
    for round in 0..20 {
        for number in 0..10 {
            let writes = [
                Write::put(format!("/app/{round}-{number}"), "1"),
                Write::delete(format!("/app/{}-{number}", round - 1)),
            ];
            head = commit(&mut kv, &writes).await.unwrap().unwrap().revision;
            let deleted = commit(&mut kv, &[Write::delete(format!("/app/{round}-{number}"))]).await.unwrap();
            head = deleted.map_or(head, |ack| ack.revision);
        }
        pair.proxy.reset();
        let applied = pair.wait_applied(head).await;
        let entry = pair.origin_sidecar.wait_for_state(LINK, "following").await;
        assert_eq!(applied.epoch, before.epoch, "{entry:#}");
    }
    stop.send(true).unwrap();
    compacting.await.unwrap();
    assert!(head > Revision(0));
    pair.assert_equal().await;
    assert!(!pair.origin_sidecar.log().contains("the link stops"));
}
