//! Job: a reader at the replica never sees half of a transfer.
//! Input: a pair of regions, with a bank at the origin. Output: passes or fails.
//! Always true: sums are read at the replica while transfers go on, each read at one revision.

use crate::bed::PATIENCE;
use crate::bed::pair::{Pair, PairOptions};
use crate::bed::traffic::Bank;
use etcd_ferry::model::Revision;
use rand::SeedableRng;
use rand::rngs::StdRng;

const TRANSFERS: usize = 500;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_money_is_made_or_lost_in_any_revision_of_the_replica() {
    let bank = Bank { prefix: "/bank/".to_owned(), accounts: 30, balance_first: 100 };
    let pair = Box::pin(Pair::start(PairOptions { prefixes: vec!["/bank/".into()], ..PairOptions::default() })).await;
    let recorder = pair.record().await;
    let mut kv = pair.origin.kv().await;
    let opened = bank.open(&mut kv).await;
    pair.wait_applied(opened.revision).await;

    let seed = rand::random();
    eprintln!("bank: seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (done, reader_stops) = tokio::sync::watch::channel(false);
    let transfers = async {
        let mut last = opened.revision;
        for _ in 0..TRANSFERS {
            if let Some(ack) = bank.transfer(&mut kv, &mut random).await.unwrap() {
                last = ack.revision;
            }
        }
        tokio::time::timeout(PATIENCE, pair.wait_applied(last)).await.unwrap();
        done.send(true).unwrap();
        last
    };
    let reads = async {
        let mut reads = 0;
        while !*reader_stops.borrow() {
            let (_, keys) = pair.replica.read(&pair.ranges, None).await;
            assert_eq!(bank.sum(&keys), Some(bank.total()));
            reads += 1;
        }
        reads
    };
    let (last, reads): (Revision, u32) = tokio::join!(transfers, reads);
    assert!(last > opened.revision && reads > 0, "{reads} reads");

    let recording = pair.recorded(recorder).await;
    assert!(recording.check().unwrap() > 0);
    for revision in recording.replica.revisions.keys() {
        let keys = recording.replica.state_at(*revision, &pair.ranges);
        assert!(bank.sum(&keys).is_none_or(|sum| sum == bank.total()), "torn at replica revision {revision}");
    }
}
