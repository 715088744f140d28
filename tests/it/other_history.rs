//! Job: a link whose policy is to go on with an origin that was restored or replaced: a new epoch, and what differs alone is shipped.
//! Input: pairs with `other_history = "resync"`, real restores from snapshots, clusters in the place of others. Output: passes or fails.
//! Always true: both sides end equal, or the guard has held and the replica has kept what it had.

use crate::bed::contents::{load, noise};
use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::{PATIENCE, until};
use crate::resume::{last, write};
use crate::same_origin::restore_and_write_past;
use etcd_ferry::model::{Phase, Position};
use serde_json::Value;

const KEYS: usize = 2_000;

/// Following, with the same [`KEYS`] of 200 bytes below `/app/` at both sides.
async fn following(other_history: &str) -> (Pair, Position) {
    let options = PairOptions {
        prefixes: vec!["/app/".into()],
        other_history: Some(other_history.to_owned()),
        ..PairOptions::default()
    };
    let pair = Box::pin(Pair::start(options)).await;
    load(&pair.origin, &noise("/app/", KEYS, 200)).await;
    let revision = pair.origin.put("/app/last", "1").await;
    let position = pair.wait_applied(revision).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    (pair, position)
}

async fn next_epoch(pair: &Pair, before: &Position) -> Position {
    until("the next epoch to follow", PATIENCE, async || {
        pair.position().await.filter(|p| p.epoch > before.epoch && p.state == Phase::Following)
    })
    .await
}

fn times(pair: &Pair, words: &str) -> usize {
    pair.origin_sidecar.log().matches(words).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_goes_on_by_itself_with_an_origin_that_was_restored_and_ships_what_differs_alone() {
    let (mut pair, before) = following("resync").await;
    let snapshot = pair.origin.save_snapshot().await;
    let lost = write(&pair.origin.access(), "/app/lost/", 20, 50).await;
    pair.wait_applied(last(&lost)).await;
    let stamps = pair.replica.stamps(&pair.ranges).await;
    let bytes_before = pair.proxy.counters().bytes_to_target;
    pair.origin_sidecar.pause();
    restore_and_write_past(&mut pair.origin, &snapshot, last(&lost)).await;
    pair.origin_sidecar.resume();

    next_epoch(&pair, &before).await;

    pair.wait_equal().await;
    let crossed = pair.proxy.counters().bytes_to_target - bytes_before;
    assert!(crossed < 100_000, "{crossed} bytes for what differed of {KEYS} keys of 200 B");
    let after = pair.replica.stamps(&pair.ranges).await;
    assert!(stamps.iter().filter(|(key, _)| !key.starts_with(b"/app/lost/")).all(|(k, s)| after.get(k) == Some(s)));
    let entry = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(entry["counts"]["other_histories"], 1, "{entry:#}");
    assert_eq!(times(&pair, "the link stops"), 0);
    assert_eq!(times(&pair, "ship: base copy link="), 1, "the first one");
    let revision = pair.origin.put("/app/after", "1").await;
    assert_eq!(pair.wait_applied(revision).await.epoch.0, before.epoch.0 + 1);
    // It was for that epoch alone: the next hello opens none.
    pair.replica_sidecar.restart().await;
    let revision = pair.origin.put("/app/later", "1").await;
    assert_eq!(pair.wait_applied(revision).await.epoch.0, before.epoch.0 + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_restored_from_a_backup_that_is_nearly_empty_does_not_empty_the_replica() {
    let options = PairOptions { other_history: Some("resync".into()), ..PairOptions::default() };
    let mut pair = Box::pin(Pair::start(options)).await;
    let revision = pair.origin.put("/app/first", "1").await;
    let before = pair.wait_applied(revision).await;
    let snapshot = pair.origin.save_snapshot().await;
    load(&pair.origin, &noise("/app/", KEYS, 50)).await;
    let revision = pair.origin.put("/app/last", "1").await;
    pair.wait_applied(revision).await;
    pair.origin.restore_snapshot(&snapshot).await;

    let held = |entry: &Value| {
        entry["state"] == "repairing" && entry["reason"].as_str().is_some_and(|r| r.contains("the repair would delete"))
    };
    let entry = pair.origin_sidecar.wait_for(LINK, "the guard to hold", held).await;
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains(&format!("delete {} of the", KEYS + 1)) && reason.contains("--allow-deletes"), "{reason}");
    let (_, kept) = pair.replica.read(&pair.ranges, None).await;
    assert_eq!(kept.len(), KEYS + 2, "the replica has kept every key");
    assert_eq!(pair.origin_sidecar.http("/readyz").await.0, 503);

    let output = pair.origin_sidecar.admin(&["repair", LINK, "--allow-deletes"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    next_epoch(&pair, &before).await;
    assert_eq!(pair.assert_equal().await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_in_the_place_of_another_stops_the_link_unless_its_policy_says_to_go_on() {
    for policy in ["stop", "resync"] {
        let (mut pair, before) = following(policy).await;
        let stamps = pair.replica.stamps(&pair.ranges).await;
        pair.origin_sidecar.pause();
        pair.origin.replace().await;
        // All that the old one had, but for a few keys, and some more.
        load(&pair.origin, &noise("/app/", KEYS, 200).into_iter().skip(20).collect()).await;
        pair.origin.put("/app/of-the-new-one", "1").await;
        pair.origin_sidecar.resume();
        if policy == "stop" {
            // The new cluster has an election of its own first.
            let told = |entry: &Value| {
                entry["state"] == "stopped" && entry["reason"].as_str().unwrap().contains("the origin was replaced")
            };
            let entry = pair.origin_sidecar.wait_for(LINK, "a stop that names both clusters", told).await;
            assert!(entry["reason"].as_str().unwrap().contains("resync config"), "{entry:#}");
            assert_eq!(pair.replica.stamps(&pair.ranges).await, stamps, "nothing of it was written");
            let output = pair.origin_sidecar.admin(&["resync", LINK, "--allow-deletes"]);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        next_epoch(&pair, &before).await;
        pair.wait_equal().await;
        let after = pair.replica.stamps(&pair.ranges).await;
        let written = after.iter().filter(|(key, stamp)| stamps.get(*key) != Some(*stamp)).count();
        assert_eq!(written, 1, "only what differed ({policy})");
        assert_eq!(times(&pair, "the link stops") > 0, policy == "stop");
        assert_eq!((times(&pair, "resync config") > 0, times(&pair, "resync LINK")), (true, 0), "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_other_history_a_moment_later_stops_the_link_also_where_it_goes_on_by_itself() {
    let (mut pair, before) = following("resync").await;
    let snapshot = pair.origin.save_snapshot().await;
    let lost = write(&pair.origin.access(), "/app/lost/", 20, 50).await;
    pair.wait_applied(last(&lost)).await;
    pair.origin.restore_snapshot(&snapshot).await;
    next_epoch(&pair, &before).await;
    pair.wait_equal().await;
    let again = write(&pair.origin.access(), "/app/lost-again/", 20, 50).await;
    pair.wait_applied(last(&again)).await;
    pair.origin.restore_snapshot(&snapshot).await;
    let entry = pair.origin_sidecar.wait_for_state(LINK, "stopped").await;
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains("two origins may answer by turns"), "{reason}");
    let (_, kept) = pair.replica.read(&pair.ranges, None).await;
    assert!(kept.keys().any(|key| key.starts_with(b"/app/lost-again/")), "it has kept what it had");
}
