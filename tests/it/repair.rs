//! Job: a repair ships the keys that differ and those alone, between two revisions; what it may not do it says.
//! Input: pairs of regions with keys changed, deleted and added at the replica by hand. Output: passes or fails.
//! Always true: what was written is told by the revisions of the keys, what crossed by the proxy's counters.

use crate::bed::contents::{load, noise};
use crate::bed::etcd::KeyMap;
use crate::bed::pair::{LINK, LINK_BACK, Pair, PairOptions, link_name};
use crate::bed::recording::Recorder;
use crate::bed::traffic::{Traffic, TrafficOptions};
use crate::bed::{PATIENCE, until};
use crate::verify::{assert_verified, following_with, outcome_of, over_app, verify};
use bytes::Bytes;
use etcd_ferry::model::{Change, Phase, Position};
use serde_json::Value;
use std::time::{Duration, Instant};

fn repair(pair: &Pair, more: &[&str]) -> (Option<i32>, Value) {
    let output = pair.origin_sidecar.admin(&[&["repair", LINK, "--json"], more].concat());
    (output.status.code(), outcome_of(&output))
}

/// What was mended is proved by a comparison of its own.
async fn assert_mended(pair: &Pair, more: &[&str], keys: u64) {
    let (code, outcome) = repair(pair, more);
    assert_eq!((code, outcome["outcome"].as_str()), (Some(0), Some("mended")), "{outcome}");
    assert_eq!(outcome["differing_keys"], keys);
    let proved = |entry: &Value| entry["verification"]["outcome"] == "equal";
    pair.origin_sidecar.wait_for(LINK, "the proof of the repair", proved).await;
}

/// Changes and deletes ten of 100,000 keys at the replica, by hand; which.
async fn change_ten(pair: &Pair) -> Vec<Bytes> {
    let mut changed = Vec::new();
    for number in (0..10).map(|n| n * 9_973 + 71) {
        let key = Bytes::from(format!("/app/{number:06}"));
        match number % 3 {
            0 => _ = pair.replica.kv().await.delete(key.to_vec(), None).await.unwrap(),
            _ => _ = pair.replica.put(key.clone(), "by hand").await,
        }
        changed.push(key);
    }
    changed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_of_a_hundred_thousand_keys_are_mended_with_under_200_kb_in_three_round_trips() {
    const ONE_WAY: Duration = Duration::from_secs(2);
    let pair = Box::pin(following_with(over_app(), 100_000, 1_024)).await;
    // What both sides compute takes its time too, on a busy machine as long as a round trip: it is measured on a line without delay.
    change_ten(&pair).await;
    let asked_at = Instant::now();
    let (code, outcome) = repair(&pair, &[]);
    let computing = asked_at.elapsed();
    assert_eq!((code, outcome["outcome"].as_str()), (Some(0), Some("mended")), "{outcome}");
    let proved = |entry: &Value| entry["verification"]["outcome"] == "equal";
    pair.origin_sidecar.wait_for(LINK, "the proof of the first repair", proved).await;
    let mut changed = change_ten(&pair).await;
    let (_, before) = pair.replica.all_stamps().await;
    pair.proxy.set_delay(ONE_WAY);
    let crossed = |pair: &Pair| pair.proxy.counters().bytes_to_target + pair.proxy.counters().bytes_from_target;
    let (bytes_before, asked_at) = (crossed(&pair), Instant::now());

    let (code, outcome) = repair(&pair, &[]);

    let (took, sent) = (asked_at.elapsed(), crossed(&pair) - bytes_before);
    let round_trip = 2 * ONE_WAY;
    eprintln!(
        "10 of 100,000 keys: {sent} bytes in {took:?}, {computing:?} without delay, at {round_trip:?} a round trip"
    );
    assert_eq!((code, outcome["outcome"].as_str()), (Some(0), Some("mended")), "{outcome}");
    assert_eq!(outcome["differing_keys"], 10, "{outcome}");
    assert!(sent < 200_000, "{sent} bytes");
    let on_the_line = took.saturating_sub(computing);
    assert!(on_the_line < round_trip * 7 / 2, "{on_the_line:?} is more than three round trips of {round_trip:?}");
    pair.proxy.set_delay(Duration::ZERO);
    assert_eq!(pair.assert_equal().await, 100_000);
    let after = pair.replica.stamps(&pair.ranges).await;
    let mut written: Vec<&Bytes> =
        after.iter().filter(|(k, stamp)| before.get(*k) != Some(*stamp)).map(|(k, _)| k).collect();
    written.sort();
    changed.sort();
    assert_eq!(written, changed.iter().collect::<Vec<_>>(), "only what differed was written");
    pair.origin_sidecar.wait_for(LINK, "the proof of the repair", proved).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_has_its_place_between_the_revisions_of_traffic_that_goes_on() {
    let pair = Box::pin(following_with(over_app(), 4_000, 100)).await;
    let options = |writes| TrafficOptions {
        prefix: "/app/traffic/".to_owned(),
        rate_per_writer: Some(80),
        value_bytes_max: 3_000,
        writes_per_writer: writes,
        ..TrafficOptions::default()
    };
    let first = Traffic::start(&pair.origin.access(), &options(1_000_000));
    for round in 0..4 {
        // Also keys that traffic writes all the time.
        let hot = pair.replica.read(&pair.ranges, None).await.1;
        let hot = hot.keys().filter(|key| key.starts_with(b"/app/traffic/")).take(20);
        for key in hot.cloned().collect::<Vec<_>>() {
            pair.replica.put(key, "by hand").await;
        }
        pair.replica.put(format!("/app/00{round}111"), "by hand").await;
        pair.replica.kv().await.delete(format!("/app/00{round}222"), None).await.unwrap();
        pair.replica.put(format!("/app/extra-{round}"), "by hand").await;
        let (code, outcome) = repair(&pair, &[]);
        assert_eq!(code, Some(0), "{outcome}");
        assert!(outcome["differing_keys"].as_u64() >= Some(3), "{outcome}");
        assert_verified(&pair);
    }
    first.stop().await;
    pair.wait_equal().await;
    let recorder = pair.record().await;
    let acknowledged = Traffic::start(&pair.origin.access(), &options(150)).finish().await;
    pair.wait_applied(acknowledged.last().unwrap().revision).await;
    let recording = pair.recorded(recorder).await;
    recording.complete(&acknowledged).unwrap();
    assert!(recording.check().unwrap() > 0);
}

/// Every state that the replica's position had, in order, each once.
pub fn states(history: &crate::bed::recording::History) -> Vec<Phase> {
    let key = link_name(LINK).position_key();
    let of_change = |change: &Change| match change {
        Change::Put { key: found, value } if *found == key => Position::from_json(value).ok().map(|p| p.state),
        Change::Put { .. } | Change::Delete { .. } => None,
    };
    let mut states: Vec<Phase> = history.revisions.values().flatten().filter_map(of_change).collect();
    states.dedup();
    states
}

fn by_hand(count: usize) -> KeyMap {
    (0..count).map(|n| (Bytes::from(format!("/app/{n:06}")), Bytes::from_static(b"by hand"))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_repair_takes_several_transactions_the_position_says_repairing() {
    let pair = Box::pin(following_with(over_app(), 4_000, 1_500)).await;
    let epoch = pair.position().await.unwrap().epoch;
    load(&pair.replica, &by_hand(3_000)).await;
    let recorder = Recorder::start(&pair.replica).await;
    assert_mended(&pair, &[], 3_000).await;
    assert_eq!(pair.assert_equal().await, 4_000);
    let history = recorder.finish(pair.replica.head().await).await;
    assert_eq!(states(&history), [Phase::Repairing, Phase::Following]);
    let position = pair.position().await.unwrap();
    assert_eq!((position.epoch, position.state), (epoch, Phase::Following));
    assert_verified(&pair);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_that_was_cut_short_goes_on_by_itself() {
    let mut pair = Box::pin(following_with(over_app(), 4_000, 1_500)).await;
    load(&pair.replica, &by_hand(4_000)).await;
    pair.proxy.set_rate(Some(1_000_000));
    let config = pair.origin_sidecar.config_path().to_str().unwrap().to_owned();
    let asked = tokio::task::spawn_blocking(move || {
        crate::bed::sidecar::ferry(&["repair", LINK, "--json", "--config", &config])
    });
    until("a repair under way", PATIENCE, async || {
        pair.position().await.filter(|position| position.state == Phase::Repairing)
    })
    .await;
    pair.origin_sidecar.kill();
    assert!(!asked.await.unwrap().status.success());
    let left = pair.replica.read(&pair.ranges, None).await.1;
    assert!(left.values().any(|value| *value == "by hand"), "the repair is over: its middle cannot be tested");
    pair.replica_sidecar.wait_for_state(LINK, "connecting").await;
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "repairing").await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(pair.assert_equal().await, 4_000);
    assert_verified(&pair);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_deletes_than_the_share_hold_a_repair_until_they_are_allowed() {
    let options = PairOptions { deletes_share_max: Some(0.1), ..over_app() };
    let pair = Box::pin(following_with(options, 90, 10)).await;
    // The eleventh of 101 is one too many.
    load(&pair.replica, &noise("/app/extra-", 11, 10)).await;
    let before = pair.replica.all_stamps().await;
    let (code, outcome) = repair(&pair, &[]);
    assert_eq!((code, outcome["outcome"].as_str()), (Some(1), Some("failed")), "{outcome}");
    let reason = outcome["detail"].as_str().unwrap();
    for word in ["delete 11 of the 101 keys", "deletes_share_max", "repair config --allow-deletes"] {
        assert!(reason.contains(word), "{word:?} is not in: {reason}");
    }
    assert_eq!(
        (&outcome["differing_keys"], &outcome["differing_ranges"][0]["from"]),
        (&11.into(), &"/app/extra-000000".into())
    );
    let output = pair.origin_sidecar.admin(&["repair", LINK]);
    let (told, failed) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    let (first, rest) = told.split_once('\n').unwrap();
    assert_eq!((first, rest.lines().next()), (&format!("link {LINK}: failed")[..], Some("11 keys differ")), "{told}");
    let config = pair.origin_sidecar.config_path();
    assert!(failed.contains(&format!("repair {LINK} --allow-deletes --config {}`", config.display())), "{failed}");
    assert_eq!(pair.replica.all_stamps().await, before, "something was written at the replica");
    assert_mended(&pair, &["--allow-deletes"], 11).await;
    assert_eq!(pair.assert_equal().await, 90);
    load(&pair.replica, &noise("/app/extra-", 10, 10)).await;
    assert_mended(&pair, &[], 10).await;
    assert_eq!(pair.assert_equal().await, 90);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_a_link_back_exists_nothing_is_mended_and_the_reason_says_what_to_do() {
    let mut pair = Box::pin(Pair::prepare(PairOptions { both_ways: true, ..over_app() })).await;
    pair.origin.put("/app/shared", "here").await;
    pair.replica.put("/app/shared", "there").await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.replica_sidecar.wait_for_state(LINK_BACK, "following").await;
    let output = pair.origin_sidecar.admin(&["repair", LINK]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("a link back exists") && said.contains("write the right value at one side"), "{said}");
    assert_eq!(pair.origin.get("/app/shared").await, Some("here".into()));
    assert_eq!(pair.replica.get("/app/shared").await, Some("there".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_over_the_whole_keyspace_leaves_the_ferrys_own_keys_alone() {
    let options = PairOptions { prefixes: Vec::new(), deletes_share_max: Some(1.0), ..over_app() };
    let pair = Box::pin(following_with(options, 500, 50)).await;
    for key in ["/", "/etcd-ferry", "/etcd-ferry/other", "/etcd-ferry/v1/links/other/position", "/etcd-ferry0", "z"] {
        pair.replica.put(key, "{}").await;
    }
    assert_mended(&pair, &[], 4).await;
    assert_eq!(pair.assert_equal().await, 500);
    for key in ["/etcd-ferry/other", "/etcd-ferry/v1/links/other/position"] {
        assert_eq!(pair.replica.get(key).await, Some("{}".into()), "{key}");
    }
    let (code, outcome) = verify(&pair);
    assert_eq!(code, Some(0), "{outcome}");
}
