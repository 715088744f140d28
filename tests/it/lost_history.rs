//! Job: a link whose history is lost comes back by comparing both sides and shipping what differs, not by a whole base copy.
//! Input: pairs whose origin was compacted past the position while its spool was lost. Output: passes or fails.
//! Always true: what crossed is told by the proxy's counters, what was written by the revisions of the keys; both sides end equal.

use crate::bed::contents::{load, noise};
use crate::bed::etcd::KeyMap;
use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::recording::Recorder;
use crate::bed::traffic::{Traffic, TrafficOptions, Write, commit};
use crate::bed::{PATIENCE, until};
use crate::repair::states;
use crate::resume::spool_dir;
use crate::verify::{assert_verified, following_with, over_app};
use bytes::Bytes;
use etcd_ferry::model::{Phase, Position, Revision};
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

/// Stops the origin's sidecar, has the origin written, and loses both the spool and the origin's history.
async fn lose_history(pair: &mut Pair, writes: &[Write]) -> Revision {
    pair.origin_sidecar.stop().await;
    let mut kv = pair.origin.kv().await;
    let mut last = Revision(0);
    for some in writes.chunks(50) {
        last = commit(&mut kv, some).await.unwrap().unwrap().revision;
    }
    let last = pair.origin.put("/elsewhere", "1").await.max(last);
    pair.origin.compact(last).await;
    std::fs::remove_dir_all(spool_dir(pair).parent().unwrap()).unwrap();
    last
}

async fn followed_in(pair: &Pair, before: &Position) -> Position {
    until("an epoch that follows", PATIENCE, async || {
        pair.position().await.filter(|p| p.epoch > before.epoch && p.state == Phase::Following)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_lost_history_only_what_differs_crosses_and_is_written() {
    const KEYS: usize = 30_000;
    let mut pair = Box::pin(following_with(over_app(), KEYS, 1_000)).await;
    let before = pair.position().await.unwrap();
    let stamps = pair.replica.stamps(&pair.ranges).await;
    // Neighbours and scattered ones; changed, deleted and new.
    let mut writes: Vec<Write> = (5_000..5_100).map(|n| Write::put(format!("/app/{n:06}"), vec![b'n'; 500])).collect();
    writes.extend((0..20).map(|n| Write::delete(format!("/app/{:06}", n * 1_371))));
    writes.extend((0..30).map(|n| Write::put(format!("/app/new-{n}"), "new")));
    lose_history(&mut pair, &writes).await;
    let recorder = Recorder::start(&pair.replica).await;
    let crossed = |pair: &Pair| pair.proxy.counters().bytes_to_target + pair.proxy.counters().bytes_from_target;
    let bytes_before = crossed(&pair);

    pair.origin_sidecar.restart().await;

    followed_in(&pair, &before).await;
    let sent = crossed(&pair) - bytes_before;
    eprintln!("150 of {KEYS} keys of 1,000 B after lost history: {sent} bytes");
    assert!(sent < 300_000, "{sent} bytes");
    assert_eq!(pair.assert_equal().await, KEYS + 10);
    let history = recorder.finish(pair.replica.head().await).await;
    // The restarted sidecar's term came first, into the position as it was; then the epoch was opened.
    assert_eq!(states(&history), [Phase::Following, Phase::Repairing, Phase::Following]);
    let after = pair.replica.stamps(&pair.ranges).await;
    let written = after.iter().filter(|(key, stamp)| stamps.get(*key) != Some(*stamp)).count();
    assert_eq!(written, 130, "only what differed was written");
    assert_verified(&pair);
    let revision = pair.origin.put("/app/after", "1").await;
    pair.wait_applied(revision).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traffic_goes_on_while_a_link_comes_back_after_lost_history() {
    let mut pair = Box::pin(following_with(over_app(), 10_000, 200)).await;
    let before = pair.position().await.unwrap();
    let writes: Vec<Write> = (0..300).map(|n| Write::put(format!("/app/{:06}", n * 31), "lost")).collect();
    lose_history(&mut pair, &writes).await;
    let options = TrafficOptions {
        prefix: "/app/traffic/".to_owned(),
        rate_per_writer: Some(80),
        value_bytes_max: 3_000,
        writes_per_writer: 1_000_000,
        ..TrafficOptions::default()
    };
    let traffic = Traffic::start(&pair.origin.access(), &options);
    pair.origin_sidecar.restart().await;
    followed_in(&pair, &before).await;
    assert_verified(&pair);
    let acknowledged = traffic.stop().await;
    pair.wait_applied(acknowledged.last().unwrap().revision).await;
    pair.wait_equal().await;
    // From here on every state of the replica is one that the origin had.
    let recorder = pair.record().await;
    let more =
        Traffic::start(&pair.origin.access(), &TrafficOptions { writes_per_writer: 100, ..options }).finish().await;
    pair.wait_applied(more.last().unwrap().revision).await;
    let recording = pair.recorded(recorder).await;
    recording.complete(&more).unwrap();
    recording.check().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_comes_back_goes_on_after_both_sidecars_were_killed() {
    let mut pair = Box::pin(following_with(over_app(), 4_000, 1_500)).await;
    let before = pair.position().await.unwrap();
    let writes: Vec<Write> = noise("/app/", 3_000, 1_600).into_iter().map(|(k, v)| Write::put(k, v)).collect();
    lose_history(&mut pair, &writes).await;
    pair.proxy.set_rate(Some(1_000_000));
    pair.origin_sidecar.restart().await;
    let lost = noise("/app/", 3_000, 1_600);
    until("some of it to be mended", PATIENCE, async || {
        (pair.replica.get("/app/000000").await.as_ref() == lost.get(&b"/app/000000"[..])).then_some(())
    })
    .await;
    pair.origin_sidecar.kill();
    pair.replica_sidecar.kill();
    assert_eq!(pair.position().await.unwrap().state, Phase::Repairing, "it is over: its middle cannot be tested");
    pair.proxy.set_rate(None);
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let after = followed_in(&pair, &before).await;
    assert_eq!(after.epoch, before.epoch.next(), "the same repair went on");
    assert_eq!(pair.assert_equal().await, 4_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_deletes_than_the_share_hold_a_link_that_comes_back_until_they_are_allowed() {
    let mut pair = Box::pin(following_with(over_app(), 100, 10)).await;
    let before = pair.position().await.unwrap();
    let writes: Vec<Write> = (0..30).map(|n| Write::delete(format!("/app/{n:06}"))).collect();
    lose_history(&mut pair, &writes).await;
    pair.origin_sidecar.restart().await;
    let held = |entry: &Value| {
        entry["state"] == "repairing"
            && entry["reason"].as_str().is_some_and(|r| r.contains("delete 30 of the 100 keys"))
    };
    let entry = pair.origin_sidecar.wait_for(LINK, "the guard", held).await;
    assert!(entry["reason"].as_str().unwrap().contains("etcd-ferry repair config --allow-deletes"), "{entry}");
    assert_eq!(pair.replica.read(&pair.ranges, None).await.1.len(), 100, "nothing was deleted");
    // What is written meanwhile arrives, beside what still differs.
    pair.origin.put("/app/meanwhile", "1").await;
    until("a write to arrive", PATIENCE, async || pair.replica.get("/app/meanwhile").await).await;
    let output = pair.origin_sidecar.admin(&["repair", LINK, "--allow-deletes"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    followed_in(&pair, &before).await;
    assert_eq!(pair.assert_equal().await, 71);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seventy_thousand_long_keys_that_the_origin_has_no_more_are_told_of_in_bounded_answers() {
    let long = "k".repeat(110);
    let gone: KeyMap = (0..70_000).map(|n| (format!("/app/{long}{n:06}").into(), Bytes::new())).collect();
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    load(&pair.origin, &noise("/app/", 500, 10)).await;
    load(&pair.origin, &gone).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    lose_history(&mut pair, &[]).await;
    let all = etcd_client::DeleteOptions::new().with_prefix();
    pair.origin.kv().await.delete(format!("/app/{long}"), Some(all)).await.unwrap();
    pair.origin.compact(pair.origin.head().await).await;
    pair.origin_sidecar.restart().await;
    let held = |entry: &Value| entry["reason"].as_str().is_some_and(|r| r.contains("delete 70000 of the 70500 keys"));
    pair.origin_sidecar.wait_for(LINK, "all of them to be found", held).await;
}

/// A link that lost history, and more keys with it than a repair keeps by name; the origin as it was before any of it.
async fn lost_more_than_a_repair_keeps() -> (Pair, PathBuf) {
    const KEYS: usize = 100_500;
    let mut pair = Box::pin(following_with(over_app(), 500, 10)).await;
    let snapshot = pair.origin.save_snapshot().await;
    lose_history(&mut pair, &[Write::put("/app/new", "1")]).await;
    load(&pair.origin, &noise("/app/lost/", KEYS, 10)).await;
    (pair, snapshot)
}

const GAVE_UP: &str = "keys differ: a base copy brings them";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_differing_keys_than_a_repair_keeps_are_brought_by_a_base_copy_that_says_why() {
    let (mut pair, _) = lost_more_than_a_repair_keeps().await;
    let before = pair.position().await.unwrap();
    pair.origin_sidecar.restart().await;
    followed_in(&pair, &before).await;
    assert_eq!(pair.assert_equal().await, 101_001);
    let log = pair.origin_sidecar.log();
    assert!(
        log.contains("100501 keys differ, more than a repair keeps by name") && log.contains("base copy is complete")
    );
    assert!(!log.contains("an operator asked for it"), "nobody did");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_that_was_restored_while_a_repair_gave_up_stops_the_link_before_any_base_copy() {
    let (mut pair, snapshot) = lost_more_than_a_repair_keeps().await;
    let before = pair.position().await.unwrap();
    pair.origin_sidecar.restart().await;
    let logged = async |pair: &Pair, words: &str| {
        until(words, PATIENCE, async || pair.origin_sidecar.log().contains(words).then_some(())).await;
    };
    logged(&pair, "repair instead of a base copy").await;
    // So that the hello after it takes some seconds.
    pair.proxy.set_delay(Duration::from_secs(1));
    logged(&pair, GAVE_UP).await;
    pair.proxy.cut();
    pair.origin_sidecar.pause();
    pair.origin.restore_snapshot(&snapshot).await;
    pair.proxy.set_delay(Duration::ZERO);
    pair.proxy.heal();
    pair.origin_sidecar.resume();
    let entry = pair.origin_sidecar.wait_for_state(LINK, "stopped").await;
    assert!(entry["reason"].as_str().is_some_and(|reason| reason.contains("restored")), "{entry}");
    let after = pair.position().await.unwrap();
    assert_eq!((after.epoch, after.state), (before.epoch.next(), Phase::Repairing), "old values were copied");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_emptied_gets_a_base_copy_after_lost_history() {
    let mut pair = Box::pin(following_with(PairOptions { ..over_app() }, 500, 100)).await;
    let before = pair.position().await.unwrap();
    pair.replica.kv().await.delete("/app/", Some(etcd_client::DeleteOptions::new().with_prefix())).await.unwrap();
    lose_history(&mut pair, &[Write::put("/app/new", "1")]).await;
    load(&pair.origin, &noise("/app/more-", 100, 10)).await;
    pair.origin_sidecar.restart().await;
    followed_in(&pair, &before).await;
    pair.wait_equal().await;
    pair.origin_sidecar.wait_for(LINK, "the copy to be counted", |entry| entry["counts"]["copies"] == 1).await;
    let copies = pair.origin_sidecar.log().matches("base copy is complete").count();
    assert_eq!(copies, 2, "the first one, and one instead of a repair");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_lost_history_without_a_change_follows_again_though_nothing_differs() {
    let mut pair = Box::pin(following_with(over_app(), 500, 100)).await;
    let before = pair.position().await.unwrap();
    let stamps = pair.replica.stamps(&pair.ranges).await;
    // What was written is written back, so that history is lost and nothing else.
    let kept = pair.origin.get("/app/000007").await.unwrap();
    lose_history(&mut pair, &[Write::put("/app/000007", "other")]).await;
    let last = pair.origin.put("/app/000007", kept).await;
    pair.origin.compact(last).await;
    pair.origin_sidecar.restart().await;
    followed_in(&pair, &before).await;
    assert_eq!(pair.assert_equal().await, 500);
    assert_eq!(pair.replica.stamps(&pair.ranges).await, stamps, "a key was written");
}
