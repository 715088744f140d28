//! Job: the base copy: what it writes, what it leaves alone, how it goes on after kills and compactions.
//! Input: a pair of regions, with keys in one or both before their sidecars start. Output: passes or fails.
//! Always true: what is judged is what the etcds hold and when they were written, not what the sidecars say.

use crate::bed::contents::{load, noise, oddities};
use crate::bed::etcd::{Etcd, EtcdOptions, KeyMap};
use crate::bed::pair::{LINK, Pair, PairOptions, link_name, ranges_of};
use crate::bed::recording::History;
use crate::bed::traffic::{Traffic, TrafficOptions, Write, commit};
use crate::bed::{PATIENCE, until};
use bytes::Bytes;
use etcd_ferry::model::{Change, Phase, Position, Ranges, Revision};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

fn unsynced() -> PairOptions {
    let quick = |options| EtcdOptions { sync: false, ..options };
    PairOptions {
        origin: quick(EtcdOptions::origin()),
        replica: quick(EtcdOptions::replica()),
        ..PairOptions::default()
    }
}

/// Every position that the replica's history shows, in order.
fn positions(history: &History) -> Vec<Position> {
    let key = link_name(LINK).position_key();
    let of_change = |change: &Change| match change {
        Change::Put { key: found, value } if *found == key => Position::from_json(value).ok(),
        Change::Put { .. } | Change::Delete { .. } => None,
    };
    history.revisions.values().flatten().filter_map(of_change).collect()
}

fn count(entry: &Value, name: &str) -> u64 {
    entry["counts"][name].as_u64().unwrap_or(0)
}

#[tokio::test]
async fn a_copy_brings_keys_of_any_bytes_and_sizes_and_writes_nothing_that_is_equal() {
    let mut pair = Box::pin(Pair::prepare(unsynced())).await;
    // On both sides of /etcd-ferry/, and beside it.
    let mut keys = oddities(b"", 2_000, rand::random());
    keys.extend(oddities(b"/etcd-ferry0", 500, 2));
    keys.extend(oddities(b"/app/", 500, 3));
    keys.retain(|key, _| pair.ranges.contains(key));
    load(&pair.origin, &keys).await;
    let equal: KeyMap = keys.iter().step_by(3).map(|(k, v)| (k.clone(), v.clone())).collect();
    let differing: KeyMap = keys.keys().skip(1).step_by(3).map(|k| (k.clone(), "of the replica".into())).collect();
    load(&pair.replica, &equal).await;
    load(&pair.replica, &differing).await;
    let before = pair.replica.stamps(&pair.ranges).await;
    let recorder = pair.record().await;

    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let entry = pair.origin_sidecar.wait_for_state(LINK, "following").await;

    assert_eq!(pair.assert_equal().await, keys.len());
    let after = pair.replica.stamps(&pair.ranges).await;
    assert!(equal.keys().all(|key| before[key] == after[key]), "an equal key was written");
    assert_eq!(count(&entry, "copied_keys_equal"), equal.len() as u64);
    assert_eq!(count(&entry, "copied_keys_written"), (keys.len() - equal.len()) as u64);
    let recording = pair.recorded(recorder).await;
    let states: Vec<Phase> = positions(&recording.replica).iter().map(|position| position.state).collect();
    assert!(states.is_sorted_by_key(|state| *state == Phase::Following), "{states:?}");
    assert_eq!((states.first(), states.last()), (Some(&Phase::Copying), Some(&Phase::Following)));
    recording.check().unwrap();
}

#[tokio::test]
async fn a_later_copy_mends_what_others_wrote_at_the_replica_and_deletes_within_the_share() {
    let prefixes = vec!["/app/".to_owned(), "/db/".to_owned()];
    let exclude = vec!["/app/own/".to_owned()];
    let options = PairOptions { prefixes, exclude, deletes_share_max: Some(0.05), ..unsynced() };
    let mut pair = Box::pin(Pair::prepare(options)).await;
    load(&pair.origin, &noise("/app/", 300, 100)).await;
    load(&pair.origin, &noise("/db/", 100, 100)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let first = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let before = pair.replica.stamps(&pair.ranges).await;

    let beside = ["/app/own/a", "/ap", "/dc", "/db"];
    for key in beside {
        pair.replica.put(key, "the replica's own").await;
    }
    // 20 of 420: just within the share, also at both ends of a range.
    for number in 0..18 {
        pair.replica.put(format!("/app/{number:06}/more"), "1").await;
    }
    for key in ["/app/", "/db/zzz"] {
        pair.replica.put(key, "1").await;
    }
    pair.replica.put("/db/000007", "other").await;
    assert!(pair.origin_sidecar.admin(&["resync", LINK]).status.success());
    let again = |entry: &Value| entry["epoch"].as_u64() > first["epoch"].as_u64() && entry["state"] == "following";
    let entry = pair.origin_sidecar.wait_for(LINK, "the second copy's end", again).await;

    assert_eq!(pair.assert_equal().await, 400);
    assert_eq!(count(&entry, "copied_keys_deleted"), 20);
    let after = pair.replica.stamps(&pair.ranges).await;
    let rewritten: Vec<&Bytes> = before.keys().filter(|key| before[*key] != after[*key]).collect();
    assert_eq!(rewritten, ["/db/000007"]);
    for key in beside {
        assert_eq!(pair.replica.get(key).await, Some("the replica's own".into()), "{key} is outside of the ranges");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_during_a_copy_arrives_too_and_the_state_says_copying_until_it_did() {
    let options = PairOptions { limits: small_pages(), ..unsynced() };
    let mut pair = Box::pin(Pair::prepare(options)).await;
    load(&pair.origin, &noise("/registry/zz-", 2_000, 1_000)).await;
    let recorder = pair.record().await;
    let traffic = Traffic::start(
        &pair.origin.access(),
        &TrafficOptions { rate_per_writer: Some(100), ..TrafficOptions::default() },
    );
    pair.proxy.set_rate(Some(2_000_000));
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let acknowledged = traffic.finish().await;
    pair.wait_applied(acknowledged.last().unwrap().revision).await;
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
    let copying = positions(&recording.replica).iter().filter(|p| p.state == Phase::Copying).count();
    assert!(copying > 10, "{copying} positions of the copy: writes came during it");
}

/// Pages so small that a narrow link has many of them to carry.
fn small_pages() -> BTreeMap<String, u64> {
    BTreeMap::from([("page_bytes_max".to_owned(), 32 * 1_024), ("page_keys_max".to_owned(), 20)])
}

const KEYS: usize = 2_000;
const VALUE_BYTES: usize = 2_000;
const RATE_BYTES_PER_SECOND: u64 = 1_500_000;

/// A copy of 4 MB that no compression helps, over a narrow link; returns when it is past its half.
async fn copy_past_its_half() -> (Pair, Position) {
    let mut pair = Box::pin(Pair::prepare(PairOptions { limits: small_pages(), ..unsynced() })).await;
    load(&pair.origin, &noise("/app/", KEYS, VALUE_BYTES)).await;
    pair.proxy.set_rate(Some(RATE_BYTES_PER_SECOND));
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let half = Bytes::from(format!("/app/{:06}", KEYS / 2));
    let position = until("a cursor past the half", PATIENCE, async || {
        let position = pair.position().await?;
        assert_eq!(position.state, Phase::Copying, "the copy is over: its middle cannot be tested");
        position.cursor.as_ref().is_some_and(|cursor| *cursor > half).then_some(position)
    })
    .await;
    (pair, position)
}

/// The whole copy crossed about once: what lay below the cursor was not sent again.
async fn assert_resumed(pair: &Pair, at_kill: &Position) {
    let entry = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(pair.assert_equal().await, KEYS);
    let position = pair.position().await.unwrap();
    assert_eq!((position.epoch, position.state), (at_kill.epoch, Phase::Following));
    let plain = (KEYS * VALUE_BYTES) as u64;
    let sent = pair.proxy.counters().bytes_to_target;
    assert!(sent > plain && sent < plain * 13 / 10, "{sent} bytes crossed for {plain}");
    assert!(entry["copy"].is_null());
}

#[tokio::test]
async fn a_copy_goes_on_at_its_cursor_after_the_replicas_sidecar_was_killed() {
    let (mut pair, at_kill) = Box::pin(copy_past_its_half()).await;
    pair.replica_sidecar.kill();
    let held = pair.replica.stamps(&pair.ranges).await;
    pair.replica_sidecar.restart().await;
    assert_resumed(&pair, &at_kill).await;
    let after = pair.replica.stamps(&pair.ranges).await;
    assert!(held.iter().all(|(key, stamp)| after[key] == *stamp), "a copied key was written again");
}

#[tokio::test]
async fn a_copy_goes_on_at_its_cursor_after_the_origins_sidecar_was_killed() {
    let (mut pair, at_kill) = Box::pin(copy_past_its_half()).await;
    pair.origin_sidecar.kill();
    let during = pair.origin.put("/app/000003", "written while the origin's sidecar was down").await;
    pair.origin_sidecar.restart().await;
    let shown = |entry: &Value| entry["copy"]["keys_done"].as_u64() >= Some(KEYS as u64 / 2);
    let entry = pair.origin_sidecar.wait_for(LINK, "progress that counts what lies below the cursor", shown).await;
    assert_eq!((&entry["state"], entry["copy"]["keys_total"].as_u64()), (&Value::from("copying"), Some(KEYS as u64)));
    pair.wait_applied(during).await;
    assert_resumed(&pair, &at_kill).await;
}

#[tokio::test]
async fn both_sides_show_how_far_a_copy_is() {
    let (pair, _) = Box::pin(copy_past_its_half()).await;
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let shown = |entry: &Value| entry["copy"]["keys_done"].as_u64() >= Some(KEYS as u64 / 2);
        let entry = sidecar.wait_for(LINK, "half of the copy", shown).await;
        assert_eq!(
            (&entry["state"], entry["copy"]["keys_total"].as_u64()),
            (&Value::from("copying"), Some(KEYS as u64))
        );
    }
}

#[tokio::test]
async fn a_copy_whose_start_was_compacted_away_meanwhile_begins_anew_from_another_anchor() {
    let (mut pair, at_kill) = Box::pin(copy_past_its_half()).await;
    pair.origin_sidecar.kill();
    let mut kv = pair.origin.kv().await;
    commit(&mut kv, &[Write::delete("/app/000001"), Write::put("/app/000002", "new")]).await.unwrap().unwrap();
    let last = pair.origin.put("/app/new", "1").await;
    pair.origin.compact(last).await;
    pair.proxy.set_rate(None);
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(pair.assert_equal().await, KEYS);
    let position = pair.position().await.unwrap();
    assert_eq!(position.epoch, at_kill.epoch.next());
    // The election of the sidecar that came back made revisions too.
    assert!(position.origin_revision >= last, "{position:?}");
}

/// Compacts `etcd` to its head each 100 ms; how often it did.
async fn compact_always(etcd: &Etcd, stop: &CancellationToken) -> u32 {
    let mut kv = etcd.kv().await;
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    let mut compactions = 0;
    let mut before = Revision(0);
    while !stop.is_cancelled() {
        ticks.tick().await;
        let head = etcd.head().await;
        if head > before {
            kv.compact(head.to_etcd(), None).await.expect("a compaction");
            compactions += 1;
            before = head;
        }
    }
    compactions
}

/// Puts one key after the other; returns the last revision.
async fn write_always(etcd: &Etcd, stop: &CancellationToken) -> Revision {
    let mut kv = etcd.kv().await;
    let mut ticks = tokio::time::interval(Duration::from_millis(5));
    let mut last = Revision(0);
    for number in 0_u64.. {
        if stop.is_cancelled() && last > Revision(0) {
            break;
        }
        ticks.tick().await;
        let write = match number % 5 {
            4 => Write::delete(format!("/app/{:06}", number * 37 % 100_000)),
            _ => Write::put(format!("/app/{:06}", number * 91 % 100_000), number.to_string()),
        };
        if let Some(ack) = commit(&mut kv, &[write]).await.expect("a write") {
            last = ack.revision;
        }
    }
    last
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_keys_are_copied_while_the_origin_is_written_and_compacted_to_its_head_each_100_ms() {
    const LIMIT: Duration = Duration::from_secs(120);
    let mut pair = Box::pin(Pair::prepare(unsynced())).await;
    load(&pair.origin, &noise("/app/", 100_000, 200)).await;
    let stop = CancellationToken::new();
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let copying = async {
        let first = until("the copy's first position", PATIENCE, async || pair.position().await).await;
        let copied = |entry: &Value| count(entry, "copies") > 0;
        let entry = pair.origin_sidecar.wait_for_within(LINK, "the copy's end", LIMIT, copied).await;
        stop.cancel();
        // What a copy leaves out a comparison may mend later.
        let brought = count(&entry, "copied_keys_written") + count(&entry, "copied_keys_equal");
        assert!(brought > 90_000, "the copy brought {brought} keys");
        first
    };
    let (first, last, compactions) =
        tokio::join!(copying, write_always(&pair.origin, &stop), compact_always(&pair.origin, &stop));

    let position = pair.wait_applied_within(last, LIMIT).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let keys = pair.assert_equal().await;
    assert!(keys > 90_000, "{keys} keys");
    let (anchor, highest) = (first.origin_revision, position.anchor_revision);
    assert!(highest > anchor, "every page was read at {anchor}: none of {compactions} compactions met the copy");
}

#[tokio::test]
async fn a_link_over_an_empty_range_of_both_sides_follows() {
    let pair = Box::pin(Pair::start(PairOptions { prefixes: vec!["/app/".into()], ..unsynced() })).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let revision = pair.origin.put("/app/a", "1").await;
    pair.wait_applied(revision).await;
    let ranges: Ranges = ranges_of(&["/app/".to_owned()], &[]);
    assert_eq!(pair.replica.read(&ranges, None).await.1, KeyMap::from([("/app/a".into(), "1".into())]));
}
