//! Job: large revisions: thousands of keys in one, values up to what the replica takes, and what is larger than a request.
//! Input: a pair of regions. Output: passes or fails.
//! Always true: what arrived is judged by a watch at the replica, not by what the sidecars say.

use crate::bed::contents::{load, noise};
use crate::bed::etcd::{Etcd, EtcdOptions};
use crate::bed::pair::{LINK, Pair, PairOptions, link_name};
use crate::bed::traffic::{Acknowledged, Write, commit};
use crate::bed::{LinkProxy, PATIENCE, until};
use crate::resume::{following, last, wait_spooled, write};
use bytes::Bytes;
use etcd_client::DeleteOptions;
use etcd_ferry::model::{Change, Ranges, Revision, Seq, WholeRevision};
use etcd_ferry::replica::plan::{self, Extent, RequestLimits, Waiting};
use etcd_ferry::wire::frame::FrameLimits;
use rand::RngCore;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

const MIB: usize = 1 << 20;
/// etcd's default, and the sidecar's.
const REQUEST_BYTES_DEFAULT: usize = 1_572_864;

fn loose() -> EtcdOptions {
    EtcdOptions { sync: false, ..EtcdOptions::origin() }
}

/// An origin that takes what is larger than the replica's default, and a replica with the defaults.
fn wide_origin(replica: EtcdOptions) -> PairOptions {
    let origin = EtcdOptions { max_request_bytes: Some(64 << 20), max_txn_ops: Some(20_000), ..loose() };
    PairOptions { origin, replica: EtcdOptions { sync: false, ..replica }, ..PairOptions::default() }
}

fn key(number: usize) -> String {
    format!("/app/many/{number:05}")
}

/// Puts `count` keys, some in each revision, and waits until they are at the replica.
async fn fill(pair: &Pair, count: usize) {
    let mut kv = pair.origin.kv().await;
    let mut last = Revision(0);
    for first in (0..count).step_by(100) {
        let writes: Vec<Write> = (first..count.min(first + 100)).map(|i| Write::put(key(i), "value")).collect();
        last = commit(&mut kv, &writes).await.unwrap().unwrap().revision;
    }
    pair.wait_applied(last).await;
}

/// Commits, and returns what the replica's revisions did to the link's keys from then on until it was applied.
async fn arrives_as(pair: &Pair, writes: &[Write]) -> (Acknowledged, Vec<Vec<Change>>) {
    let recorder = pair.record().await;
    let ack = commit(&mut pair.origin.kv().await, writes).await.unwrap().unwrap();
    pair.wait_applied(ack.revision).await;
    let recording = pair.recorded(recorder).await;
    let arrived = recording.replica.revisions_with_changes(&pair.ranges);
    (ack, arrived)
}

fn random_value(bytes: usize) -> Bytes {
    let mut value = vec![0; bytes];
    rand::rng().fill_bytes(&mut value);
    Bytes::from(value)
}

#[tokio::test]
async fn a_prefix_delete_of_ten_thousand_keys_arrives_in_one_revision() {
    let pair = Box::pin(Pair::start(wide_origin(EtcdOptions::replica()))).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    fill(&pair, 10_000).await;
    let (ack, arrived) = arrives_as(&pair, &[Write::delete_prefix("/app/many/")]).await;
    assert_eq!(ack.changes.len(), 10_000);
    assert!(arrived == [ack.changes], "it arrived in {} revisions", arrived.len());
    assert_eq!(pair.assert_equal().await, 0);
}

/// etcd cuts a watch message where it would be larger than a request: 3 MB of keys are one revision in several messages.
#[tokio::test]
async fn a_prefix_delete_that_etcd_tells_in_fragments_arrives_in_one_revision() {
    let pair = Box::pin(Pair::start(PairOptions { origin: loose(), replica: loose(), ..PairOptions::default() })).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let mut kv = pair.origin.kv().await;
    let long = "x".repeat(300);
    for first in (0..10_000).step_by(100) {
        let writes: Vec<Write> =
            (first..first + 100).map(|i| Write::put(format!("/app/many/{long}/{i}"), "")).collect();
        commit(&mut kv, &writes).await.unwrap();
    }
    pair.wait_applied(pair.origin.head().await).await;
    let (ack, arrived) = arrives_as(&pair, &[Write::delete_prefix("/app/many/")]).await;
    assert_eq!(ack.changes.len(), 10_000);
    assert!(arrived == [ack.changes], "it arrived in {} revisions", arrived.len());
}

#[tokio::test]
async fn a_prefix_delete_spares_a_foreign_key_of_the_replica_and_still_arrives_in_one_revision() {
    let pair = Box::pin(Pair::start(wide_origin(EtcdOptions::replica()))).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    fill(&pair, 10_000).await;
    pair.replica.put("/app/many/05000-foreign", "stays").await;
    let (ack, arrived) = arrives_as(&pair, &[Write::delete_prefix("/app/many/")]).await;
    assert_eq!(ack.changes.len(), 10_000);
    assert!(arrived == [ack.changes], "it arrived in {} revisions", arrived.len());
    let (_, left) = pair.replica.read(&pair.ranges, None).await;
    assert_eq!(left.keys().collect::<Vec<_>>(), [&Bytes::from_static(b"/app/many/05000-foreign")]);
}

#[tokio::test]
async fn a_prefix_delete_never_reaches_over_an_exclude_or_past_the_prefix() {
    let options = PairOptions {
        prefixes: vec!["/app/many/".into()],
        exclude: vec!["/app/many/005".into()],
        ..wide_origin(EtcdOptions::replica())
    };
    let pair = Box::pin(Pair::start(options)).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    fill(&pair, 1_000).await;
    let own = ["/app/many", "/app/many/00500", "/app/many/005zz", "/app/many0"];
    for key in own {
        pair.replica.put(key, "the replica's own").await;
    }
    let (ack, arrived) = arrives_as(&pair, &[Write::delete_prefix("/app/many/")]).await;
    assert_eq!(ack.changes.len(), 1_000);
    let carried: Vec<Change> = ack.changes.into_iter().filter(|c| pair.ranges.contains(c.key())).collect();
    assert_eq!(carried.len(), 900);
    assert!(arrived == [carried], "it arrived in {} revisions", arrived.len());
    let app = Ranges::new(&[Bytes::from_static(b"/app/")], &[]);
    let (_, left) = pair.replica.read(&app, None).await;
    assert_eq!(left.into_keys().collect::<Vec<_>>(), own);
}

/// The longest value of `key` that is planned as a whole within the default request.
fn value_bytes_largest(key: &str) -> usize {
    let limits = RequestLimits {
        ops_max: 128,
        bytes_max: REQUEST_BYTES_DEFAULT,
        bytes_refused: None,
        position_key_bytes: link_name(LINK).position_key().len(),
        position_value_bytes_max: 700,
    };
    let value = Bytes::from(vec![0; REQUEST_BYTES_DEFAULT]);
    let fits = |bytes: usize| {
        let changes = vec![Change::Put { key: Bytes::from(key.to_owned()), value: value.slice(..bytes) }];
        let waiting = Waiting { seq: Seq(1), revision: Arc::new(WholeRevision { revision: Revision(1), changes }) };
        plan::plan([&waiting], plan::Begun::default(), &Ranges::new(&[], &[]), &limits)
            .is_ok_and(|plan| plan.is_some_and(|plan| plan.extent == Extent::Whole))
    };
    let (mut fitting, mut refused) = (0, REQUEST_BYTES_DEFAULT);
    while refused - fitting > 1 {
        let middle = (fitting + refused) / 2;
        if fits(middle) { fitting = middle } else { refused = middle }
    }
    fitting
}

#[tokio::test]
async fn the_largest_value_passes_and_one_byte_more_stops_the_link_until_the_advice_is_taken() {
    let mut pair = Box::pin(Pair::start(wide_origin(EtcdOptions::replica()))).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let largest = value_bytes_largest("/app/large");
    assert!(largest > REQUEST_BYTES_DEFAULT - 1_500, "{largest}");
    pair.wait_applied(pair.origin.put("/app/large", random_value(largest)).await).await;
    assert_eq!(pair.assert_equal().await, 1);
    assert!(!pair.replica_sidecar.log().contains("takes less than configured"), "a limit had to be learned");

    let too_large = pair.origin.put("/app/large", random_value(largest + 1)).await;
    let after = pair.origin.put("/app/small", "waits for the large one").await;
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        let entry = sidecar.wait_for_state(LINK, "stopped").await;
        let reason = entry["reason"].as_str().unwrap();
        for advice in ["--max-request-bytes", "request_bytes_max", &too_large.to_string()] {
            assert!(reason.contains(advice), "{advice} is not in: {reason}");
        }
    }
    assert_eq!(pair.replica.get("/app/small").await, None, "nothing overtakes what cannot be applied");
    // Whoever pauses it meanwhile and goes on is told the same.
    for command in ["pause", "resume"] {
        let output = pair.replica_sidecar.admin(&[command, LINK]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let entry = &pair.replica_sidecar.status()["links"][0];
    let reason = entry["reason"].as_str().unwrap();
    assert!(entry["state"] == "stopped" && reason.contains("--max-request-bytes"), "{entry:#}");

    pair.replica.set_max_request_bytes(4 << 20);
    pair.replica.restart().await;
    pair.replica_sidecar.options.limits.insert("request_bytes_max".to_owned(), 4 << 20);
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.wait_applied(after).await;
    assert_eq!(pair.assert_equal().await, 2);
}

#[tokio::test]
async fn a_revision_that_the_replica_never_decodes_stops_the_link_though_others_follow_it() {
    let mut pair = Box::pin(Pair::prepare(wide_origin(EtcdOptions::replica()))).await;
    pair.replica_sidecar.options.limits.insert("revision_bytes_max".to_owned(), MIB as u64);
    pair.replica_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.wait_applied(pair.origin.put("/app/first", "1").await).await;
    // Small on the line.
    let values = |n: usize| Write::put(format!("/app/wide/{n}"), vec![b'v'; MIB / 2]);
    let wide: Vec<Write> = (0..6).map(values).collect();
    commit(&mut pair.origin.kv().await, &wide).await.unwrap().unwrap();
    let traffic = async {
        loop {
            pair.origin.put("/app/beside", "1").await;
        }
    };
    let stopped = async {
        let entry = pair.origin_sidecar.wait_for_state(LINK, "stopped").await;
        entry["reason"].as_str().unwrap().to_owned()
    };
    let reason = tokio::select! {
        reason = stopped => reason,
        () = traffic => unreachable!("it has no end"),
    };
    assert!(reason.contains("revision_bytes_max alike"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_and_repairs_are_no_larger_than_the_replica_takes_a_revision() {
    let mut pair = Box::pin(Pair::prepare(wide_origin(EtcdOptions::replica()))).await;
    for (key, value) in [("revision_bytes_max", MIB / 2), ("frame_bytes_max", MIB / 4)] {
        pair.replica_sidecar.options.limits.insert(key.to_owned(), value as u64);
    }
    pair.replica_sidecar.write_config();
    load(&pair.origin, &noise("/app/", 60, 40_000)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.wait_equal().await;
    let mut replica = pair.replica.kv().await;
    replica.delete("/app/", Some(DeleteOptions::new().with_prefix())).await.unwrap();
    let output = pair.origin_sidecar.admin(&["repair", LINK]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    pair.wait_equal().await;
}

#[tokio::test]
async fn a_replica_whose_requests_are_smaller_than_configured_stops_the_link_with_the_advice() {
    let replica = EtcdOptions { max_request_bytes: Some(MIB as u64), ..EtcdOptions::replica() };
    let pair = Box::pin(Pair::start(wide_origin(replica))).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.origin.put("/app/large", random_value(MIB + 100_000)).await;
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        let entry = sidecar.wait_for_state(LINK, "stopped").await;
        let reason = entry["reason"].as_str().unwrap();
        assert!(reason.contains("--max-request-bytes of the replica's etcd"), "{reason}");
    }
}

#[tokio::test]
async fn a_value_that_fits_is_applied_though_larger_requests_were_refused_before() {
    let replica = EtcdOptions { max_request_bytes: Some(MIB as u64), ..EtcdOptions::replica() };
    let pair = Box::pin(Pair::start(wide_origin(replica))).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let many: Vec<Write> = (0..11).map(|i| Write::put(key(i), random_value(100_000))).collect();
    let ack = commit(&mut pair.origin.kv().await, &many).await.unwrap().unwrap();
    pair.wait_applied(ack.revision).await;
    pair.wait_applied(pair.origin.put("/app/large", random_value(MIB - 2_000)).await).await;
    pair.assert_equal().await;
}

#[tokio::test]
async fn a_replica_that_takes_fewer_operations_than_configured_is_learned_and_revisions_stay_whole() {
    let replica = EtcdOptions { max_txn_ops: Some(40), ..EtcdOptions::replica() };
    let pair = Box::pin(Pair::start(wide_origin(replica))).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let thousand: Vec<Write> = (0..1_000).map(|i| Write::put(key(i), "value")).collect();
    let (ack, arrived) = arrives_as(&pair, &thousand).await;
    assert!(arrived == [ack.changes], "it arrived in {} revisions", arrived.len());
    assert!(pair.replica_sidecar.log().contains("takes less than configured"));
}

/// A revision of `count` keys of 100,000 random bytes.
async fn write_large(origin: &Etcd, count: usize) -> Acknowledged {
    let writes: Vec<Write> = (0..count).map(|i| Write::put(key(i), random_value(100_000))).collect();
    commit(&mut origin.kv().await, &writes).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revision_larger_than_a_request_is_applied_in_parts_and_counted() {
    let pair = Box::pin(Pair::start(wide_origin(EtcdOptions::replica()))).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    let ack = write_large(&pair.origin, 40).await;
    let after = pair.origin.put("/app/after", "1").await;
    pair.wait_applied(after).await;
    let recording = pair.recorded(recorder).await;
    let parts = recording.replica.revisions_with_changes(&pair.ranges);
    assert_eq!(parts.len(), 3 + 1, "4 MB in requests of 1.5 MiB, and the next one");
    assert_eq!(parts[..3].concat(), ack.changes);
    assert_eq!(recording.complete(&[ack]).unwrap(), 1);
    assert!(recording.check().unwrap() > 0);
    pair.assert_equal().await;
    let counted = |entry: &serde_json::Value| entry["counts"]["in_parts"] == 1;
    pair.replica_sidecar.wait_for(LINK, "one revision counted as applied in parts", counted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_amid_the_parts_of_a_revision_goes_on_with_the_next_part() {
    let mut pair = Box::pin(Pair::prepare(wide_origin(EtcdOptions::replica()))).await;
    let slow = LinkProxy::start(pair.replica.address()).await.unwrap();
    pair.replica_sidecar.options.etcd.url = format!("http://{}", slow.address());
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    slow.set_rate(Some(4 << 20));
    let ack = write_large(&pair.origin, 120).await;
    let part_above = async |least: u64| {
        until("a part to be applied", PATIENCE, async || {
            pair.position().await.map(|p| p.part).filter(|part| *part > least)
        })
        .await
    };
    let first = part_above(0).await;
    pair.replica_sidecar.kill();
    assert!(pair.position().await.unwrap().part >= first);
    pair.replica_sidecar.restart().await;
    slow.set_rate(None);
    pair.wait_applied(ack.revision).await;
    let recording = pair.recorded(recorder).await;
    let parts = recording.replica.revisions_with_changes(&pair.ranges);
    assert_eq!(parts.concat(), ack.changes, "each change once, in order");
    assert_eq!(recording.complete(&[ack]).unwrap(), 1);
    assert!(recording.check().unwrap() > 0);
    pair.assert_equal().await;
}

/// 1.2 MB at 50 kB/s are on their way for longer than a stream may be silent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_of_more_tiny_revisions_than_a_frame_takes_is_shipped_in_whole_frames() {
    let limits = ["frame_bytes_max", "queue_bytes_max"].map(|limit| (limit.to_owned(), 32 << 20)).into();
    let (pair, before) = following(PairOptions { limits, ..PairOptions::default() }).await;
    pair.proxy.cut();
    let acknowledged = write(&pair.origin.access(), "/t/", FrameLimits::REVISIONS_MAX + 500, 1).await;
    wait_spooled(&pair, last(&acknowledged)).await;
    pair.proxy.heal();
    let after = pair.wait_applied_within(last(&acknowledged), Duration::from_secs(60)).await;
    assert_eq!(after.seq.0, before.seq.0 + acknowledged.len() as u64);
    let entry = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(entry["counts"]["resets"], 0, "a frame was refused: {entry}");
}

#[tokio::test]
async fn a_value_that_is_half_a_minute_on_its_way_over_a_narrow_link_arrives_in_one_stream() {
    let pair = Box::pin(Pair::start(PairOptions { origin: loose(), replica: loose(), ..PairOptions::default() })).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.proxy.set_rate(Some(50_000));
    let connections = pair.proxy.counters().connections;
    let put = pair.origin.put("/app/large", random_value(1_200_000)).await;
    pair.wait_applied_within(put, PATIENCE * 2).await;
    assert_eq!(pair.proxy.counters().connections, connections);
    let counted = |link: &Value| link["counts"]["frames"] == 1 && link["state"] == "following";
    pair.replica_sidecar.wait_for(LINK, "one frame to be counted", counted).await;
}
