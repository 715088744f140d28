//! Job: both sidecars stay below their memory bound, whatever waits and whichever side was down.
//! Input: a pair of regions, 2,000 revisions of 100 KiB: what waits is more than the bound. Output: passes or fails.
//! Always true: what is judged is the highest resident memory that the kernel saw (`VmHWM`).

use crate::bed::etcd::EtcdOptions;
use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::sidecar::Sidecar;
use crate::bed::traffic::put_at_once;
use bytes::Bytes;
use etcd_ferry::model::Revision;
use rand::RngCore;
use std::time::Duration;

const MEMORY_BYTES_MAX: u64 = 150 << 20;
const VALUE_BYTES: usize = 100 << 10;
const REVISIONS: usize = 2_000;
/// 200 MiB through two etcds, two sidecars and two disks, beside other tests.
const LIMIT: Duration = Duration::from_secs(120);

async fn following() -> Pair {
    let loose = |options| EtcdOptions { sync: false, ..options };
    let (origin, replica) = (loose(EtcdOptions::origin()), loose(EtcdOptions::replica()));
    let pair = Box::pin(Pair::start(PairOptions { origin, replica, ..PairOptions::default() })).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

/// 2,000 revisions of 100 KiB that no encoding makes smaller; the last one's revision.
async fn write_much(pair: &Pair) -> Revision {
    let value = || {
        let mut value = vec![0; VALUE_BYTES];
        rand::rng().fill_bytes(&mut value);
        Bytes::from(value)
    };
    let writes = (0..REVISIONS).map(|i| (Bytes::from(format!("/app/{i:04}")), value())).collect();
    put_at_once(&pair.origin.access(), writes).await.last().unwrap().revision
}

async fn caught_up_within_bounds(pair: &Pair, last: Revision) {
    pair.wait_applied_within(last, LIMIT).await;
    let highest = |sidecar: &Sidecar| sidecar.process().memory_bytes().1;
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let mib = highest(sidecar) >> 20;
        eprintln!("{}: {mib} MiB at most", sidecar.options.region);
        assert!((1..MEMORY_BYTES_MAX >> 20).contains(&mib), "{}: {mib} MiB", sidecar.options.region);
    }
    assert_eq!(pair.assert_equal().await, REVISIONS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_mebibytes_that_waited_for_the_replicas_sidecar_stay_within_bounds() {
    let mut pair = following().await;
    pair.replica_sidecar.kill();
    let last = write_much(&pair).await;
    pair.replica_sidecar.restart().await;
    caught_up_within_bounds(&pair, last).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_mebibytes_that_waited_for_the_origins_sidecar_stay_within_bounds() {
    let mut pair = following().await;
    pair.origin_sidecar.kill();
    let last = write_much(&pair).await;
    pair.origin_sidecar.restart().await;
    caught_up_within_bounds(&pair, last).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_mebibytes_that_waited_for_the_replicas_etcd_stay_within_bounds() {
    let mut pair = following().await;
    pair.replica.kill();
    let last = write_much(&pair).await;
    let all = |entry: &serde_json::Value| entry["seq"].as_u64() >= Some(REVISIONS as u64);
    pair.replica_sidecar.wait_for_within(LINK, "everything to be in the journal", LIMIT, all).await;
    pair.replica.restart().await;
    caught_up_within_bounds(&pair, last).await;
}
