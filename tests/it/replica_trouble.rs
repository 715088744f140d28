//! Job: a replica that refuses is waited for, with the reason shown at both sides, and nothing is lost or doubled when it is cured.
//! Input: a pair of regions, an etcd that is killed, stopped, alone, or full. Output: passes or fails.
//! Always true: each trouble comes under traffic; what is judged at the end are recordings of both ends.

use crate::bed::etcd::{Etcd, EtcdOptions};
use crate::bed::pair::{LINK, Pair, PairOptions, PairRecorder};
use crate::bed::traffic::{Acknowledged, Traffic, TrafficOptions, Write, commit};
use crate::bed::{PATIENCE, until};
use bytes::Bytes;
use serde_json::Value;
use std::time::Duration;

fn traffic(pair: &Pair) -> Traffic {
    let options = TrafficOptions {
        writes_per_writer: 100_000,
        rate_per_writer: Some(40),
        value_bytes_max: 4 * 1_024,
        ..TrafficOptions::default()
    };
    Traffic::start(&pair.origin.access(), &options)
}

/// Both sides' `status` name the trouble in one of these words, while both sidecars go on.
async fn reason_is_shown(pair: &Pair, words: &[&str]) {
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        let named = |entry: &Value| {
            let reason = entry["reason"].as_str().unwrap_or_default();
            let shown = reason.contains("the replica's etcd") && words.iter().any(|word| reason.contains(word));
            assert!(!shown || entry["state"] != "copying", "no base copy runs: {entry:#}");
            assert!(!shown || entry["applied_seq"].as_u64() > Some(0), "what was applied stays applied: {entry:#}");
            shown
        };
        let what = format!("a reason with one of {words:?}");
        sidecar.wait_for_within(LINK, &what, Duration::from_secs(45), named).await;
    }
}

async fn goes_on(pair: &Pair, recorder: PairRecorder, acknowledged: &[Acknowledged]) {
    pair.wait_applied_within(acknowledged.last().unwrap().revision, Duration::from_secs(60)).await;
    pair.assert_equal().await;
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        let well = |entry: &Value| entry["state"] == "following" && entry["reason"] == "";
        sidecar.wait_for(LINK, "following without a reason", well).await;
    }
    let recording = pair.recorded(recorder).await;
    assert!(recording.complete(acknowledged).unwrap() > 0);
    assert!(recording.check().unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_was_killed_is_waited_for() {
    let mut pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    let traffic = traffic(&pair);
    pair.wait_applied(pair.origin.put("/app/before", "1").await).await;
    pair.replica.kill();
    reason_is_shown(&pair, &["cannot be reached"]).await;
    pair.replica.restart().await;
    pair.wait_applied(pair.origin.put("/app/between", "1").await).await;
    pair.replica.kill();
    pair.replica.restart().await;
    goes_on(&pair, recorder, &traffic.stop().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_is_stopped_is_waited_for() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    let traffic = traffic(&pair);
    pair.wait_applied(pair.origin.put("/app/before", "1").await).await;
    pair.replica.pause();
    reason_is_shown(&pair, &["did not answer", "no answer", "cannot be reached"]).await;
    pair.replica.resume();
    goes_on(&pair, recorder, &traffic.stop().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_without_a_leader_is_waited_for() {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    let mut members = Etcd::start_cluster(EtcdOptions::replica(), 3).await;
    pair.replica = members.remove(0);
    pair.replica_sidecar.options.etcd = pair.replica.access();
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    let traffic = traffic(&pair);
    pair.wait_applied(pair.origin.put("/app/before", "1").await).await;
    members.iter_mut().for_each(Etcd::kill);
    reason_is_shown(&pair, &["no leader"]).await;
    for member in &mut members {
        member.restart().await;
    }
    goes_on(&pair, recorder, &traffic.stop().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_is_out_of_space_is_waited_for_until_it_has_room() {
    let replica = EtcdOptions { quota_backend_bytes: Some(4 << 20), ..EtcdOptions::replica() };
    let pair = Box::pin(Pair::start(PairOptions { replica, ..PairOptions::default() })).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let mut kv = pair.origin.kv().await;
    let mut acknowledged: Vec<Acknowledged> = Vec::new();
    for i in 0..80_u8 {
        let write = Write::put(format!("/app/{}", i % 4), Bytes::from(vec![i; 100_000]));
        acknowledged.extend(commit(&mut kv, &[write]).await.unwrap());
        let written = acknowledged.last().unwrap().revision;
        // What waits together has a key each: merged, it is no less, however slow the replica is.
        if i % 4 == 3 {
            let applied_or_full = |entry: &Value| {
                entry["origin_revision"].as_u64() >= Some(written.0)
                    || entry["reason"].as_str().is_some_and(|reason| reason.contains("NOSPACE"))
            };
            pair.replica_sidecar.wait_for(LINK, "it to be applied, or NOSPACE", applied_or_full).await;
        }
    }
    let last = acknowledged.last().unwrap().revision;
    reason_is_shown(&pair, &["NOSPACE"]).await;
    let warned = |log: &str| log.matches("applying waits").count();
    let before = warned(&pair.replica_sidecar.log());
    let waits = |entry: &Value| entry["lag_seconds"].as_f64() > Some(6.0);
    pair.origin_sidecar.wait_for(LINK, "some tries more", waits).await;
    reason_is_shown(&pair, &["NOSPACE"]).await;
    assert_eq!(warned(&pair.replica_sidecar.log()), before, "a failure that repeats is logged once");
    // It fills up again before everything is in, since nobody else compacts it.
    until("everything to be applied in a replica that is given room again and again", PATIENCE * 2, async || {
        pair.replica.make_room().await;
        pair.position().await.filter(|position| position.origin_revision >= last)
    })
    .await;
    pair.assert_equal().await;
    let well = |entry: &Value| entry["state"] == "following" && entry["reason"] == "";
    pair.replica_sidecar.wait_for(LINK, "following without a reason", well).await;
    assert_eq!(pair.position().await.unwrap().seq.0, 80, "each revision once");
}
