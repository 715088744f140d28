//! Job: kill -9 and SIGTERM of either sidecar under traffic: nothing lost, torn, doubled or reordered, and little to redo.
//! Input: a pair of regions with writers at the origin. Output: passes or fails.
//! Always true: sidecars are killed only after they have done something since the last kill; no run needs a second base copy.

use crate::bed::etcd::{Access, EtcdOptions};
use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::traffic::{Acknowledged, Bank, Traffic, TrafficOptions};
use crate::bed::{PATIENCE, until};
use etcd_ferry::model::Seq;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio_util::sync::CancellationToken;

const KILLS: usize = 5;

async fn following() -> Pair {
    let loose = |options| EtcdOptions { sync: false, ..options };
    let (origin, replica) = (loose(EtcdOptions::origin()), loose(EtcdOptions::replica()));
    let pair = Box::pin(Pair::start(PairOptions { origin, replica, ..PairOptions::default() })).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

fn steady(pair: &Pair, rate_per_writer: u32) -> Traffic {
    let options = TrafficOptions {
        writes_per_writer: 1_000_000,
        rate_per_writer: Some(rate_per_writer),
        value_bytes_max: 8 * 1_024,
        ..TrafficOptions::default()
    };
    Traffic::start(&pair.origin.access(), &options)
}

/// Waits until something was applied after `seq`; how far it is then.
async fn applied_after(pair: &Pair, seq: Seq) -> Seq {
    until("the position to move", PATIENCE, async || pair.position().await.map(|p| p.seq).filter(|now| *now > seq))
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_sidecar_is_killed_five_times_all_arrives_whole_in_order_and_once() {
    let mut pair = following().await;
    let recorder = pair.record().await;
    let traffic = steady(&pair, 50);
    let mut seq = Seq(0);
    for _ in 0..KILLS {
        seq = applied_after(&pair, seq).await;
        pair.replica_sidecar.kill();
        pair.replica_sidecar.restart().await;
        seq = applied_after(&pair, seq).await;
        pair.origin_sidecar.kill();
        pair.origin_sidecar.restart().await;
    }
    let acknowledged = traffic.stop().await;
    let position = pair.wait_applied(acknowledged.last().unwrap().revision).await;
    assert_eq!(position.epoch.0, 1, "no second base copy");
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
}

/// Transfers until told to stop; what was acknowledged.
async fn transfer(access: Access, bank: Bank, stop: CancellationToken) -> Vec<Acknowledged> {
    let seed = rand::random();
    eprintln!("bank: seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut kv = access.kv().await;
    let mut acknowledged = vec![bank.open(&mut kv).await];
    while !stop.is_cancelled() {
        acknowledged.extend(bank.transfer(&mut kv, &mut random).await.unwrap());
    }
    acknowledged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_money_is_made_or_lost_while_sidecars_are_killed() {
    let mut pair = following().await;
    let recorder = pair.record().await;
    let bank = Bank { prefix: "/bank/".to_owned(), accounts: 30, balance_first: 100 };
    let stop = CancellationToken::new();
    let transfers = tokio::spawn(transfer(pair.origin.access(), bank.clone(), stop.clone()));
    let mut seq = Seq(0);
    for round in 0..2 * KILLS {
        seq = applied_after(&pair, seq).await;
        let sidecar = if round % 2 == 0 { &mut pair.replica_sidecar } else { &mut pair.origin_sidecar };
        sidecar.kill();
        sidecar.restart().await;
    }
    stop.cancel();
    let acknowledged = transfers.await.unwrap();
    pair.wait_applied(acknowledged.last().unwrap().revision).await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
    for revision in recording.replica.revisions.keys() {
        let keys = recording.replica.state_at(*revision, &pair.ranges);
        assert!(bank.sum(&keys).is_none_or(|sum| sum == bank.total()), "torn at replica revision {revision}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sigterm_under_load_ends_within_five_seconds_and_leaves_nothing_to_redo() {
    let mut pair = following().await;
    let recorder = pair.record().await;
    let traffic = steady(&pair, 200);
    let seq = applied_after(&pair, Seq(100)).await;
    let (took, status) = pair.replica_sidecar.stop().await;
    assert!(status.success(), "{status} after {took:?}");
    pair.replica_sidecar.restart().await;
    let seq = applied_after(&pair, Seq(seq.0 + 100)).await;
    let (took, status) = pair.origin_sidecar.stop().await;
    assert!(status.success(), "{status} after {took:?}");
    pair.origin_sidecar.restart().await;
    applied_after(&pair, Seq(seq.0 + 100)).await;
    let acknowledged = traffic.stop().await;
    let position = pair.wait_applied(acknowledged.last().unwrap().revision).await;
    assert_eq!(position.epoch.0, 1, "no second base copy");
    let entry = pair.replica_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(entry["counts"]["repeated"], 0, "what was received is not sent again: {entry:#}");
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
}
