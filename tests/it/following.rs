//! Job: a link that keeps up: each origin revision appears at the replica, whole, in one revision of its own.
//! Input: a pair of regions. Output: passes or fails.
//! Always true: what is judged are recordings of both ends, not what the sidecars say.

use crate::bed::etcd::EtcdOptions;
use crate::bed::pair::{Pair, PairOptions};
use crate::bed::recording::History;
use crate::bed::traffic::{Acknowledged, Traffic, TrafficOptions, Write, commit};
use etcd_ferry::model::{Change, Ranges};

/// The link's changes of each replica revision that has any.
fn revisions_with_changes(history: &History, ranges: &Ranges) -> Vec<Vec<Change>> {
    let carried = |changes: &Vec<Change>| changes.iter().filter(|c| ranges.contains(c.key())).cloned().collect();
    history.revisions.values().map(carried).filter(|changes: &Vec<Change>| !changes.is_empty()).collect()
}

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
    let arrived = revisions_with_changes(&recording.replica, &pair.ranges);
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
