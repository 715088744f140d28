//! Job: a link that keeps up: each origin revision appears at the replica, whole, in one revision of its own.
//! Input: a pair of regions. Output: passes or fails.
//! Always true: what is judged are recordings of both ends, not what the sidecars say.

use crate::bed::etcd::EtcdOptions;
use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::traffic::{Acknowledged, Traffic, TrafficOptions, Write, commit, put_at_once};
use bytes::Bytes;
use etcd_ferry::model::Change;

#[tokio::test]
async fn a_put_a_delete_and_a_thousand_key_transaction_each_arrive_in_one_revision() {
    let origin = EtcdOptions { max_txn_ops: Some(2_000), ..EtcdOptions::origin() };
    let pair = Box::pin(Pair::start(PairOptions { origin, ..PairOptions::default() })).await;
    pair.origin_sidecar.wait_for_state("config", "following").await;
    let recorder = pair.record().await;
    let mut kv = pair.origin.kv().await;
    let thousand = (0..1_000).map(|i| Write::put(format!("/app/many/{i:04}"), "value")).collect();
    let mut acknowledged: Vec<Acknowledged> = Vec::new();
    for writes in [vec![Write::put("/app/a", "1")], vec![Write::delete("/app/a")], thousand] {
        let ack = commit(&mut kv, &writes).await.unwrap().unwrap();
        pair.wait_applied(ack.revision).await;
        acknowledged.push(ack);
    }
    let recording = pair.recorded(recorder).await;
    let arrived = recording.replica.revisions_with_changes(&pair.ranges);
    let sent: Vec<Vec<Change>> = acknowledged.iter().map(|ack| ack.changes.clone()).collect();
    assert_eq!(arrived, sent);
    assert_eq!(recording.complete(&acknowledged).unwrap(), 3);
    assert!(recording.check().unwrap() >= 3);
}

#[tokio::test]
async fn what_several_writers_do_at_once_arrives_complete_whole_in_order_and_once() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    let recorder = pair.record().await;
    let acknowledged = Traffic::start(&pair.origin.access(), &TrafficOptions::default()).finish().await;
    pair.wait_applied(acknowledged.last().unwrap().revision).await;
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
}

#[tokio::test]
async fn while_the_link_keeps_up_each_revision_of_the_origin_is_one_of_the_replica() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    for i in 0..40 {
        pair.wait_applied(pair.origin.put(format!("/app/{}", i % 3), i.to_string()).await).await;
    }
    let recording = pair.recorded(recorder).await;
    let sent = recording.origin.revisions_with_changes(&pair.ranges);
    assert_eq!(sent.len(), 40);
    assert_eq!(recording.replica.revisions_with_changes(&pair.ranges), sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revisions_that_waited_are_merged_and_the_last_write_of_a_key_wins() {
    let mut pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    pair.replica_sidecar.kill();
    let writes = (0..5_000).map(|i| (Bytes::from(format!("/app/{:02}", i % 20)), Bytes::from(format!("value {i}"))));
    let acknowledged = put_at_once(&pair.origin.access(), writes.collect()).await;
    pair.replica_sidecar.restart().await;
    pair.wait_applied(acknowledged.last().unwrap().revision).await;
    assert_eq!(pair.assert_equal().await, 20);
    let recording = pair.recorded(recorder).await;
    let arrived = recording.replica.revisions_with_changes(&pair.ranges).len();
    assert!((1..500).contains(&arrived), "{arrived} replica revisions for 5000 of the origin");
    assert_eq!(recording.complete(&acknowledged).unwrap(), 5_000);
    assert!(recording.check().unwrap() > 0);
}

/// Keys that are no text, that touch both ends of the keyspace, and that are long.
fn keys_of_any_bytes() -> Vec<Bytes> {
    let long = |byte: u8| vec![byte; 6 * 1_024];
    let plain: [&[u8]; 9] = [
        b"\0",
        b"\0\0",
        b"\0\xff",
        b"/app/\xff\0\xfe",
        b"/etcd-ferry",
        b"/etcd-ferry0",
        b"\xc3\x28",
        b"\xff",
        b"\xff\xff",
    ];
    plain.iter().map(|key| Bytes::copy_from_slice(key)).chain([Bytes::from(long(0xff)), Bytes::from(long(0))]).collect()
}

#[tokio::test]
async fn keys_of_any_bytes_and_empty_values_are_copied_followed_and_deleted_over_the_whole_keyspace() {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    let keys = keys_of_any_bytes();
    let mut kv = pair.origin.kv().await;
    let copied: Vec<Write> = keys.iter().step_by(2).map(|key| Write::put(key.clone(), Bytes::new())).collect();
    commit(&mut kv, &copied).await.unwrap();
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.wait_equal().await;

    let recorder = pair.record().await;
    let all: Vec<Write> = keys.iter().map(|key| Write::put(key.clone(), key.clone())).collect();
    let emptied: Vec<Write> = keys.iter().map(|key| Write::put(key.clone(), Bytes::new())).collect();
    let deleted: Vec<Write> = keys.iter().skip(1).step_by(2).map(|key| Write::delete(key.clone())).collect();
    let mut acknowledged: Vec<Acknowledged> = Vec::new();
    for writes in [all, emptied, deleted] {
        let ack = commit(&mut kv, &writes).await.unwrap().unwrap();
        pair.wait_applied(ack.revision).await;
        acknowledged.push(ack);
    }
    assert_eq!(pair.assert_equal().await, keys.len().div_ceil(2));
    let recording = pair.recorded(recorder).await;
    let sent: Vec<Vec<Change>> = acknowledged.iter().map(|ack| ack.changes.clone()).collect();
    assert_eq!(recording.replica.revisions_with_changes(&pair.ranges), sent);
    assert_eq!(recording.complete(&acknowledged).unwrap(), 3);
    assert!(recording.check().unwrap() >= 3);
}
