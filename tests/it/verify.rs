//! Job: both sides are compared while traffic goes on: what differs is named, what is equal is proved, and nothing is changed by it.
//! Input: pairs of regions under load, keys changed at the replica by hand, compactions, cut links. Output: passes or fails.
//! Always true: `verify` is run as an operator runs it; that it changed nothing is told by the revisions of the keys.

use crate::bed::contents::{load, noise, oddities};
use crate::bed::etcd::{Access, Etcd, EtcdOptions};
use crate::bed::pair::{LINK, LINK_BACK, Pair, PairOptions, wait_applied};
use crate::bed::traffic::{Traffic, TrafficOptions};
use crate::bed::{PATIENCE, until};
use etcd_ferry::model::Revision;
use serde_json::Value;
use std::process::Output;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

pub fn over_app() -> PairOptions {
    let quick = |options| EtcdOptions { sync: false, ..options };
    PairOptions {
        origin: quick(EtcdOptions::origin()),
        replica: quick(EtcdOptions::replica()),
        prefixes: vec!["/app/".into()],
        ..PairOptions::default()
    }
}

/// A pair that follows, with these keys.
pub async fn following_with(options: PairOptions, count: usize, value_bytes: usize) -> Pair {
    let mut pair = Box::pin(Pair::prepare(options)).await;
    load(&pair.origin, &noise("/app/", count, value_bytes)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

pub fn outcome_of(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// `etcd-ferry verify LINK --json`, with its exit code.
pub fn verify(pair: &Pair) -> (Option<i32>, Value) {
    let output = pair.origin_sidecar.admin(&["verify", LINK, "--json"]);
    (output.status.code(), outcome_of(&output))
}

pub fn assert_verified(pair: &Pair) -> Value {
    let (code, outcome) = verify(pair);
    assert_eq!((code, outcome["outcome"].as_str()), (Some(0), Some("equal")), "{outcome}");
    assert_eq!(outcome["differing_keys"], 0);
    outcome
}

/// The keys that an outcome names, each alone.
pub fn named(outcome: &Value) -> Vec<String> {
    let ranges = outcome["differing_ranges"].as_array().unwrap();
    let name = |range: &Value| {
        assert_eq!(range["from"], range["to"], "{range} is one key");
        range["from"].as_str().unwrap().to_owned()
    };
    ranges.iter().map(name).collect()
}

fn traffic(etcd: &Etcd) -> Traffic {
    let options = TrafficOptions {
        prefix: "/app/traffic/".to_owned(),
        rate_per_writer: Some(60),
        value_bytes_max: 5_000,
        writes_per_writer: 1_000_000,
        ..TrafficOptions::default()
    };
    Traffic::start(&etcd.access(), &options)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_are_proved_equal_at_a_mark_while_traffic_goes_on_and_both_say_when() {
    let pair = Box::pin(following_with(over_app(), 3_000, 200)).await;
    let traffic = traffic(&pair.origin);
    let mut before = Revision(0);
    for _ in 0..5 {
        let head = pair.origin.head().await;
        let outcome = assert_verified(&pair);
        let revision = Revision(outcome["verified_revision"].as_u64().unwrap());
        assert!(revision > before, "{revision} is no later than {before}");
        // What is written all the time has passed the mark, and the mark what was there when it was asked for.
        assert!(revision.0 + 300 > head.0 && revision <= pair.origin.head().await, "{revision}, head was {head}");
        before = revision;
    }
    traffic.stop().await;
    let shown = |entry: &Value| entry["verification"]["verified_revision"] == before.0;
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let entry = sidecar.wait_for(LINK, "the verified revision", shown).await;
        assert!(entry["verification"]["verified_at_ms"].as_u64() > Some(1_700_000_000_000), "{entry}");
    }
    let (_, metrics) = pair.origin_sidecar.http("/metrics").await;
    for line in [
        format!("etcd_ferry_verified_revision{{link=\"{LINK}\",side=\"origin\"}} {before}"),
        format!("etcd_ferry_verifications_total{{link=\"{LINK}\",side=\"origin\"}} 5"),
    ] {
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_changed_deleted_and_added_at_the_replica_by_hand_are_named_while_traffic_goes_on() {
    let pair = Box::pin(following_with(over_app(), 5_000, 200)).await;
    let traffic = traffic(&pair.origin);
    assert_verified(&pair);
    pair.replica.put("/app/000017", "by hand").await;
    pair.replica.kv().await.delete("/app/002345", None).await.unwrap();
    // At both ends of the range, and between.
    for key in ["/app/", "/app/003333/more", "/app/zzz"] {
        pair.replica.put(key, "by hand").await;
    }
    let before = pair.replica.stamps(&pair.ranges).await;
    let (code, outcome) = verify(&pair);
    assert_eq!((code, outcome["outcome"].as_str()), (Some(1), Some("different")), "{outcome}");
    assert_eq!(outcome["differing_keys"], 5);
    assert_eq!(named(&outcome), ["/app/", "/app/000017", "/app/002345", "/app/003333/more", "/app/zzz"]);
    let status = &pair.origin_sidecar.status()["links"][0]["verification"];
    assert_eq!((&status["differing_ranges"], &status["differing_keys"]), (&outcome["differing_ranges"], &5.into()));
    let health = pair.origin_sidecar.health().await.unwrap().to_string();
    assert!(health.contains("\"differing_keys\":5") && !health.contains("/app/000017"), "http shows no key: {health}");
    let shown = |entry: &Value| entry["verification"]["differing_keys"] == 5;
    pair.replica_sidecar.wait_for(LINK, "the count of differing keys", shown).await;
    traffic.stop().await;
    let after = pair.replica.stamps(&pair.ranges).await;
    let touched = before.iter().filter(|(key, _)| !key.starts_with(b"/app/traffic/"));
    assert!(
        touched.clone().count() > 5_000 && touched.clone().all(|(key, stamp)| after[key] == *stamp),
        "verify wrote"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_link_is_compared_as_it_is_now_and_not_as_it_was_at_its_last_revision() {
    let pair = Box::pin(following_with(over_app(), 50, 100)).await;
    assert_verified(&pair);
    pair.replica.put("/app/000007", "by hand").await;
    let (code, outcome) = verify(&pair);
    assert_eq!((code, named(&outcome)), (Some(1), vec!["/app/000007".to_owned()]));
    // The origin's head goes on outside of the link, and what the link last carried is compacted.
    let mut last = Revision(0);
    for number in 0..50 {
        last = pair.origin.put(format!("/elsewhere/{number}"), "1").await;
    }
    pair.origin.compact(last).await;
    pair.replica.compact(pair.replica.head().await).await;
    let revision = pair.origin.put("/app/000007", "by the origin").await;
    pair.wait_applied(revision).await;
    pair.origin.compact(revision).await;
    assert_verified(&pair);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_any_bytes_and_sizes_over_the_whole_keyspace_are_compared() {
    let mut pair = Box::pin(Pair::prepare(PairOptions { prefixes: Vec::new(), ..over_app() })).await;
    let mut keys = oddities(b"", 3_000, rand::random());
    keys.extend(oddities(b"/etcd-ferry0", 500, 2));
    keys.retain(|key, _| pair.ranges.contains(key));
    load(&pair.origin, &keys).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_verified(&pair);
    let chosen = keys.keys().nth(1_234).unwrap().clone();
    pair.replica.put(chosen.clone(), "by hand").await;
    let (code, outcome) = verify(&pair);
    assert_eq!((code, named(&outcome)), (Some(1), vec![chosen.escape_ascii().to_string()]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_more_keys_at_the_replica_than_a_part_has_are_counted_exactly() {
    let pair = Box::pin(following_with(over_app(), 1_500, 50)).await;
    load(&pair.replica, &noise("/app/000700/", 15_000, 10)).await;
    let (code, outcome) = verify(&pair);
    assert_eq!((code, &outcome["differing_keys"]), (Some(1), &15_000.into()), "{outcome}");
    let ranges = outcome["differing_ranges"].as_array().unwrap();
    assert!(ranges.len() <= 16);
    assert_eq!(ranges[0]["from"], "/app/000700/000000");
    assert_eq!(ranges[ranges.len() - 1]["to"], "/app/000700/014999");
}

async fn survives_compaction(at_origin: bool) {
    let pair = Box::pin(following_with(over_app(), 30_000, 500)).await;
    let traffic = traffic(&pair.origin);
    pair.replica.put("/app/029000", "by hand").await;
    let stop = CancellationToken::new();
    let etcd = if at_origin { &pair.origin } else { &pair.replica };
    // In a task of its own: `verify` holds up this one.
    let compacting = tokio::spawn(compact_until(etcd.access(), stop.clone()));
    let (code, outcome) = verify(&pair);
    assert_eq!((code, named(&outcome)), (Some(1), vec!["/app/029000".to_owned()]), "{outcome}");
    stop.cancel();
    let compactions = compacting.await.unwrap();
    traffic.stop().await;
    assert!(compactions >= 2, "{compactions} compactions met the comparison");
}

/// Compacts to the head each 100 ms; how often.
async fn compact_until(access: Access, stop: CancellationToken) -> u32 {
    let mut kv = access.kv().await;
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    let mut compactions = 0;
    while !stop.is_cancelled() {
        ticks.tick().await;
        let got = kv.get("head", None).await.expect("a read");
        let head = got.header().map_or(0, |header| header.revision());
        compactions += u32::from(kv.compact(head, None).await.is_ok());
    }
    compactions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_the_origin_compacts_meanwhile_is_compared_at_another_mark() {
    Box::pin(survives_compaction(true)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_the_replica_compacts_meanwhile_is_compared_at_another_mark() {
    Box::pin(survives_compaction(false)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_cut_meanwhile_ends_the_comparison_with_a_reason_and_the_next_one_is_sound() {
    let pair = Box::pin(following_with(over_app(), 2_000, 200)).await;
    // So slow that the answer is on its way when the link is cut.
    pair.proxy.set_delay(Duration::from_secs(3));
    let config = pair.origin_sidecar.config_path().to_str().unwrap().to_owned();
    let asked = tokio::task::spawn_blocking(move || {
        crate::bed::sidecar::ferry(&["verify", LINK, "--json", "--config", &config])
    });
    let runs = |entry: &Value| !entry["verification"]["running"].is_null();
    pair.origin_sidecar.wait_for(LINK, "a comparison that runs", runs).await;
    pair.proxy.cut();
    let output = asked.await.unwrap();
    let outcome = outcome_of(&output);
    assert_eq!((output.status.code(), outcome["outcome"].as_str()), (Some(1), Some("failed")), "{outcome}");
    assert!(outcome["detail"].as_str().unwrap().contains("the stream to the replica ended"), "{outcome}");
    let output = pair.origin_sidecar.admin(&["verify", LINK]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("connecting"), "{said}");
    pair.proxy.set_delay(Duration::ZERO);
    pair.proxy.heal();
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_verified(&pair);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn linked_both_ways_what_differs_is_told_and_stays_while_what_is_on_its_way_is_no_difference() {
    let mut pair = Box::pin(Pair::prepare(PairOptions { both_ways: true, ..over_app() })).await;
    load(&pair.origin, &noise("/app/", 1_000, 100)).await;
    pair.origin.put("/app/shared", "here").await;
    pair.replica.put("/app/shared", "there").await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.replica_sidecar.wait_for_state(LINK_BACK, "following").await;
    let there = Traffic::start(
        &pair.replica.access(),
        &TrafficOptions {
            prefix: "/app/there/".to_owned(),
            rate_per_writer: Some(50),
            value_bytes_max: 2_000,
            writes_per_writer: 1_000_000,
            ..TrafficOptions::default()
        },
    );
    let (code, outcome) = verify(&pair);
    assert_eq!((code, named(&outcome)), (Some(1), vec!["/app/shared".to_owned()]), "{outcome}");
    assert_eq!(pair.origin.get("/app/shared").await, Some("here".into()));
    assert_eq!(pair.replica.get("/app/shared").await, Some("there".into()));
    let revision = pair.origin.put("/app/shared", "settled").await;
    pair.wait_applied(revision).await;
    assert_verified(&pair);
    let last = there.stop().await.last().unwrap().revision;
    wait_applied(&pair.origin, LINK_BACK, last, PATIENCE).await;
    assert_verified(&pair);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_cannot_be_compared_now_says_why_and_where_to_ask() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    load(&pair.origin, &noise("/app/", 4_000, 1_000)).await;
    pair.proxy.set_rate(Some(500_000));
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let says = |pair: &Pair, words: &[&str]| {
        let output = pair.origin_sidecar.admin(&["verify", LINK]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?} are not in: {said}");
    };
    let copying = |entry: &Value| entry["copy"]["keys_done"].as_u64() > Some(0);
    pair.origin_sidecar.wait_for(LINK, "a base copy that runs", copying).await;
    says(&pair, &["base copy is not over"]);
    pair.proxy.set_rate(None);
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(pair.assert_equal().await, 4_000, "the copy went on");
    let output = pair.replica_sidecar.admin(&["verify", LINK]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("this sidecar is the replica of link config: ask the sidecar at its other side"), "{said}");

    load(&pair.replica, &noise("/app/extra-", 2_000, 10)).await;
    assert!(pair.origin_sidecar.admin(&["resync", LINK]).status.success());
    pair.origin_sidecar.wait_for_state(LINK, "stopped").await;
    says(&pair, &["the link is stopped", "would delete 2000"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_comparison_by_itself_takes_less_than_a_twentieth_of_a_core_at_each_side() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    pair.origin_sidecar.options.send[0].verify_interval_seconds = Some(1);
    pair.origin_sidecar.write_config();
    load(&pair.origin, &noise("/app/", 20_000, 1_024)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let running = |entry: &Value| !entry["verification"]["running"].is_null();
    pair.origin_sidecar.wait_for(LINK, "a comparison that runs", running).await;
    let spent = |pair: &Pair| [&pair.origin_sidecar, &pair.replica_sidecar].map(|s| s.process().cpu_seconds());
    let (before, began) = (spent(&pair), Instant::now());
    // Whoever asked the sidecar for it would be part of what is measured. How long it rests depends on how long etcd takes for a page.
    let ended = async || pair.origin_sidecar.log().contains("both sides are equal").then_some(());
    until("its end", 4 * PATIENCE, ended).await;
    let seconds = began.elapsed().as_secs_f64();
    let shares = [0, 1].map(|side| (spent(&pair)[side] - before[side]) / seconds);
    eprintln!("20,000 keys of 1 KiB in {seconds:.1} s: {shares:.3?} of a core");
    assert!(seconds > 1.0, "{seconds} s: it does not rest");
    assert!(shares.iter().all(|share| *share < 0.05), "{shares:?} of a core");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_are_compared_by_themselves_each_interval() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    pair.origin_sidecar.options.send[0].verify_interval_seconds = Some(1);
    pair.origin_sidecar.write_config();
    load(&pair.origin, &noise("/app/", 500, 100)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let verified = |times: u64| move |entry: &Value| entry["counts"]["verifications"].as_u64() >= Some(times);
    let entry = pair.origin_sidecar.wait_for(LINK, "two comparisons", verified(2)).await;
    assert_eq!((&entry["verification"]["outcome"], &entry["state"]), (&"equal".into(), &"following".into()));
    pair.replica.put("/app/000333", "by hand").await;
    let differs = |entry: &Value| entry["verification"]["differing_keys"] == 1;
    pair.origin_sidecar.wait_for(LINK, "the difference to be found", differs).await;
    until("it to be in the log", PATIENCE, async || {
        pair.origin_sidecar.log().contains("both sides differ").then_some(())
    })
    .await;
    assert!(!pair.origin_sidecar.log().contains("/app/000333"), "no key is logged");
    pair.origin.put("/app/000333", "by the origin").await;
    let healed = |entry: &Value| entry["verification"]["differing_keys"] == 0;
    pair.origin_sidecar.wait_for(LINK, "equality again", healed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_copy_ends_what_the_last_comparison_said_of_keys_that_differ() {
    let pair = Box::pin(following_with(over_app(), 50, 100)).await;
    pair.replica.put("/app/000017", "by hand").await;
    assert_eq!(verify(&pair).0, Some(1));
    let differs = |keys: u64| move |entry: &Value| entry["verification"]["differing_keys"] == keys;
    pair.replica_sidecar.wait_for(LINK, "a key that differs", differs(1)).await;
    let lines = pair.origin_sidecar.admin(&["status"]);
    assert!(String::from_utf8_lossy(&lines.stdout).contains("1 key differs"), "{lines:?}");

    assert!(pair.origin_sidecar.admin(&["resync", LINK]).status.success());
    let copied = |entry: &Value| entry["counts"]["copies"] == 2 && entry["state"] == "following";
    let entry = pair.origin_sidecar.wait_for(LINK, "another base copy", copied).await;
    assert!(differs(0)(&entry), "{entry:#}");
    let lines = pair.origin_sidecar.admin(&["status"]);
    assert!(!String::from_utf8_lossy(&lines.stdout).contains("differs"), "{lines:?}");
    pair.replica_sidecar.wait_for(LINK, "no key that differs", differs(0)).await;
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let (_, metrics) = sidecar.http("/metrics").await;
        let differing = metrics.lines().find(|line| line.starts_with("etcd_ferry_differing_keys{"));
        assert!(differing.is_some_and(|line| line.ends_with(" 0")), "{differing:?}");
    }
    assert_verified(&pair);
}
