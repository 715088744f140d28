//! Job: the replica's etcd is compacted by age, and what that frees is given back; the link does not mind.
//! Input: a pair of regions whose replica's sidecar compacts. Output: passes or fails.
//! Always true: that a revision is gone is told by the replica's etcd, which refuses to read at it.

use crate::bed::etcd::Etcd;
use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::traffic::{Traffic, TrafficOptions};
use crate::bed::{PATIENCE, until};
use crate::verify::assert_verified;
use etcd_client::GetOptions;
use etcd_ferry::model::Revision;

async fn compacting(after_seconds: u64, defragment: Option<bool>) -> Pair {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    pair.replica_sidecar.options.compact_after_seconds = Some(after_seconds);
    pair.replica_sidecar.options.defragment = defragment;
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

async fn readable_at(etcd: &Etcd, revision: Revision) -> bool {
    let options = GetOptions::new().with_revision(revision.to_etcd()).with_count_only();
    match etcd.kv().await.get("any", Some(options)).await {
        Ok(_) => true,
        Err(e) => {
            assert!(e.to_string().contains("has been compacted"), "{e}");
            false
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_older_than_the_configured_age_is_compacted_and_link_lookout_and_comparison_go_on() {
    let pair = compacting(2, None).await;
    let options = TrafficOptions {
        writes_per_writer: usize::MAX,
        rate_per_writer: Some(50),
        value_bytes_max: 2_000,
        ..TrafficOptions::default()
    };
    let traffic = Traffic::start(&pair.origin.access(), &options);
    let old = pair.replica.head().await;
    until("an old revision to be compacted", PATIENCE, async || (!readable_at(&pair.replica, old).await).then_some(()))
        .await;
    let present = pair.replica.head().await;
    assert!(readable_at(&pair.replica, present).await, "what is not so old is there");
    assert_verified(&pair);
    let acknowledged = traffic.stop().await;
    pair.wait_applied(acknowledged.last().unwrap().revision).await;
    pair.wait_equal().await;
    let foreign = pair.replica.put("/registry/foreign", "1").await;
    let seen = |entry: &serde_json::Value| entry["foreign_writes"]["last_revision"] == foreign.0;
    pair.replica_sidecar.wait_for(LINK, "the lookout to see a foreign write", seen).await;
}

async fn file_bytes(etcd: &Etcd) -> i64 {
    etcd.client().await.status().await.unwrap().db_size()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_compaction_frees_is_given_back_to_the_disk_where_that_is_configured() {
    let pair = compacting(2, Some(true)).await;
    let mut revision = Revision(0);
    for n in 0..60_u8 {
        revision = pair.origin.put("/app/large", vec![n; 1_000_000]).await;
        pair.wait_applied(revision).await;
    }
    pair.wait_applied(revision).await;
    let smaller = async || (file_bytes(&pair.replica).await < 16_000_000).then_some(());
    until("the replica's file to shrink", PATIENCE, smaller).await;
    assert!(pair.replica_sidecar.log().contains("is defragmented"), "it has shrunk by something else");
    assert_eq!(pair.assert_equal().await, 1);
}
