//! Job: two clusters linked both ways, and a chain: each revision crosses once, nothing loops, nothing is swapped.
//! Input: pairs with a link back, chains of three. Output: passes or fails.
//! Always true: crossings are counted in the revisions of the etcds, not in what the sidecars say.

use crate::bed::contents::{load, noise};
use crate::bed::etcd::{Etcd, EtcdOptions, KeyMap};
use crate::bed::pair::{CHAIN_LINKS, Chain, LINK, LINK_BACK, Pair, PairOptions, ranges_of, wait_applied, wait_equal};
use crate::bed::recording::History;
use crate::bed::traffic::{Traffic, TrafficOptions, Write, commit};
use crate::bed::{PATIENCE, until};
use bytes::Bytes;
use etcd_ferry::model::{Ranges, Revision};
use serde_json::Value;

fn over_app() -> PairOptions {
    let quick = |options| EtcdOptions { sync: false, ..options };
    PairOptions {
        origin: quick(EtcdOptions::origin()),
        replica: quick(EtcdOptions::replica()),
        prefixes: vec!["/app/".into()],
        both_ways: true,
        ..PairOptions::default()
    }
}

async fn both_follow(pair: &Pair) -> (Value, Value) {
    let there = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    (there, pair.replica_sidecar.wait_for_state(LINK_BACK, "following").await)
}

/// The revisions that changed keys of `ranges`, and how many keys each.
fn touching(history: &History, ranges: &Ranges) -> Vec<(Revision, usize)> {
    let touched = |changes: &Vec<_>| {
        changes.iter().filter(|change: &&etcd_ferry::model::Change| ranges.contains(change.key())).count()
    };
    history.revisions.iter().map(|(r, changes)| (*r, touched(changes))).filter(|(_, keys)| *keys > 0).collect()
}

#[tokio::test]
async fn two_clusters_with_different_values_are_not_swapped_and_each_gets_what_it_lacks() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    let of = |side: &str| {
        (0..400)
            .map(|i| (Bytes::from(format!("/app/shared-{i:04}")), Bytes::from(format!("{side} {i}"))))
            .collect::<KeyMap>()
    };
    let (here, there) = (of("here"), of("there"));
    let (only_here, only_there, common) =
        (noise("/app/here-", 300, 50), noise("/app/there-", 200, 50), noise("/app/", 100, 50));
    for keys in [&here, &only_here, &common] {
        load(&pair.origin, keys).await;
    }
    for keys in [&there, &only_there, &common] {
        load(&pair.replica, keys).await;
    }
    let (before_here, before_there) = (pair.origin.stamps(&pair.ranges).await, pair.replica.stamps(&pair.ranges).await);
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    both_follow(&pair).await;

    for (sidecar, link) in [(&pair.origin_sidecar, LINK), (&pair.replica_sidecar, LINK_BACK)] {
        let conflicts = |entry: &Value| entry["counts"]["conflicts"] == 400;
        sidecar.wait_for(link, "400 conflicts", conflicts).await;
    }
    let merged = |own: &KeyMap| {
        [own, &only_here, &only_there, &common]
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect::<KeyMap>()
    };
    assert_eq!(pair.origin.read(&pair.ranges, None).await.1, merged(&here));
    assert_eq!(pair.replica.read(&pair.ranges, None).await.1, merged(&there));
    let (after_here, after_there) = (pair.origin.stamps(&pair.ranges).await, pair.replica.stamps(&pair.ranges).await);
    assert!(before_here.iter().all(|(key, stamp)| after_here[key] == *stamp));
    assert!(before_there.iter().all(|(key, stamp)| after_there[key] == *stamp));
}

#[tokio::test]
async fn what_differs_stays_until_one_side_writes_it_and_then_crosses() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    pair.origin.put("/app/a", "here").await;
    pair.replica.put("/app/a", "there").await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    both_follow(&pair).await;
    assert_eq!(pair.origin.get("/app/a").await, Some("here".into()));
    assert_eq!(pair.replica.get("/app/a").await, Some("there".into()));
    let revision = pair.replica.put("/app/a", "settled").await;
    wait_applied(&pair.origin, LINK_BACK, revision, PATIENCE).await;
    assert_eq!(pair.assert_equal().await, 1);
}

#[tokio::test]
async fn each_revision_written_at_either_side_crosses_once() {
    let pair = Box::pin(Pair::start(over_app())).await;
    both_follow(&pair).await;
    let recorder = pair.record().await;
    let (mut here, mut there) = (pair.origin.kv().await, pair.replica.kv().await);
    let (mut written_here, mut written_there) = (0, 0);
    for number in 0..60 {
        let several = |side: &str| {
            vec![Write::put(format!("/app/{side}/{number}"), "1"), Write::put(format!("/app/{side}/{number}/2"), "2")]
        };
        let last_here = commit(&mut here, &several("here")).await.unwrap().unwrap().revision;
        let last_there =
            commit(&mut there, &[Write::put(format!("/app/there/{number}"), "1")]).await.unwrap().unwrap().revision;
        written_here += 1;
        written_there += 1;
        // Each alone, so that none is merged with the next.
        pair.wait_applied(last_here).await;
        wait_applied(&pair.origin, LINK_BACK, last_there, PATIENCE).await;
    }
    let last_here = commit(&mut here, &[Write::delete_prefix("/app/there/")]).await.unwrap().unwrap().revision;
    pair.wait_applied(last_here).await;
    let last_there = commit(&mut there, &[Write::delete("/app/here/7")]).await.unwrap().unwrap().revision;
    wait_applied(&pair.origin, LINK_BACK, last_there, PATIENCE).await;
    let all = written_here + written_there + 2;

    assert_eq!(pair.assert_equal().await, 119);
    settled(&pair).await;
    let recording = pair.recorded(recorder).await;
    let keys = |history| -> Vec<usize> { touching(history, &pair.ranges).into_iter().map(|(_, keys)| keys).collect() };
    let (at_origin, at_replica) = (keys(&recording.origin), keys(&recording.replica));
    assert_eq!((at_origin.len(), at_replica.len()), (all, all), "each revision is at both sides once");
    assert_eq!(at_origin.iter().sum::<usize>(), 60 * 3 + 60 + 1);
    assert_eq!(at_replica.iter().sum::<usize>(), 60 * 3 + 60 + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_at_both_sides_with_keys_of_their_own_end_equal_and_nothing_is_written_twice() {
    let pair = Box::pin(Pair::start(over_app())).await;
    both_follow(&pair).await;
    let recorder = pair.record().await;
    let options = |prefix: &str, seed| TrafficOptions {
        prefix: prefix.to_owned(),
        seed,
        value_bytes_max: 5_000,
        ..TrafficOptions::default()
    };
    let here = Traffic::start(&pair.origin.access(), &options("/app/here/", rand::random()));
    let there = Traffic::start(&pair.replica.access(), &options("/app/there/", rand::random()));
    let (here, there) = tokio::join!(here.finish(), there.finish());
    pair.wait_applied(here.last().unwrap().revision).await;
    wait_applied(&pair.origin, LINK_BACK, there.last().unwrap().revision, PATIENCE).await;
    pair.assert_equal().await;
    settled(&pair).await;
    let recording = pair.recorded(recorder).await;
    let (at_origin, at_replica) =
        (touching(&recording.origin, &pair.ranges).len(), touching(&recording.replica, &pair.ranges).len());
    // What waits is merged, so there may be fewer than were written; a loop would make more.
    assert!(at_origin <= here.len() + there.len() && at_origin >= here.len(), "{at_origin}");
    assert!(at_replica <= here.len() + there.len() && at_replica >= there.len(), "{at_replica}");
    // At each side its own writers alone write their keys.
    for (history, prefix, written) in
        [(&recording.origin, "/app/here/", here.len()), (&recording.replica, "/app/there/", there.len())]
    {
        let revisions = touching(history, &ranges_of(&[prefix.to_owned()], &[])).len();
        assert_eq!(revisions, written, "revisions of keys below {prefix}");
    }
}

/// Waits until both links have said that there is nothing new: a revision that comes back does so much sooner.
async fn settled(pair: &Pair) {
    const WORD_BYTES: u64 = 60;
    let crossed = || [&pair.proxy, &pair.proxy_back].map(|proxy| proxy.counters().bytes_to_target);
    let before = crossed();
    until("a word of both idle links", PATIENCE, async || {
        crossed().iter().zip(before).all(|(now, before)| *now >= before + WORD_BYTES).then_some(())
    })
    .await;
}

#[tokio::test]
async fn two_idle_clusters_linked_both_ways_make_fewer_than_five_revisions_and_write_no_key_again() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    load(&pair.origin, &noise("/app/here-", 100, 10)).await;
    load(&pair.replica, &noise("/app/there-", 100, 10)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    both_follow(&pair).await;
    let revision = pair.origin.put("/app/last", "1").await;
    pair.wait_applied(revision).await;
    let heads = (pair.origin.head().await, pair.replica.head().await);
    let stamps = (pair.origin.stamps(&pair.ranges).await, pair.replica.stamps(&pair.ranges).await);
    settled(&pair).await;
    settled(&pair).await;
    let made = (pair.origin.head().await.0 - heads.0.0) + (pair.replica.head().await.0 - heads.1.0);
    // None, but for a minute that ends just now: a waymark and a position for each link. A loop makes hundreds.
    assert!(made < 5, "{made} revisions of two idle clusters");
    assert_eq!((pair.origin.stamps(&pair.ranges).await, pair.replica.stamps(&pair.ranges).await), stamps);
    assert_eq!(pair.assert_equal().await, 201);
}

fn chain_options() -> PairOptions {
    PairOptions { both_ways: false, ..over_app() }
}

#[tokio::test]
async fn a_chain_carries_puts_and_deletes_from_its_first_to_its_last_cluster() {
    let chain = Box::pin(Chain::start(chain_options())).await;
    for (sidecar, link) in chain.sidecars.iter().zip(CHAIN_LINKS) {
        sidecar.wait_for_state(link, "following").await;
    }
    let [first, _, last] = &chain.etcds[..] else { panic!("three clusters") };
    let mut kv = first.kv().await;
    let two = [Write::put("/app/a", "1"), Write::put("/app/b", "2")];
    commit(&mut kv, &two).await.unwrap().unwrap();
    wait_equal(first, last, &chain.ranges, PATIENCE).await;
    assert_eq!(last.get("/app/b").await, Some("2".into()));
    commit(&mut kv, &[Write::delete("/app/a")]).await.unwrap().unwrap();
    wait_equal(first, last, &chain.ranges, PATIENCE).await;
    assert_eq!(last.get("/app/a").await, None);
    let acknowledged = Traffic::start(
        &first.access(),
        &TrafficOptions { prefix: "/app/".to_owned(), value_bytes_max: 5_000, ..TrafficOptions::default() },
    )
    .finish()
    .await;
    assert!(acknowledged.len() > 500);
    wait_equal(first, last, &chain.ranges, PATIENCE).await;
}

#[tokio::test]
async fn a_base_copy_goes_through_a_chain() {
    let mut chain = Box::pin(Chain::start(chain_options())).await;
    for sidecar in &mut chain.sidecars {
        sidecar.kill();
    }
    let first: &Etcd = &chain.etcds[0];
    load(first, &noise("/app/", 3_000, 200)).await;
    first.put("/other", "1").await;
    for sidecar in &mut chain.sidecars {
        sidecar.restart().await;
    }
    let last: &Etcd = &chain.etcds[2];
    wait_equal(first, last, &chain.ranges, PATIENCE).await;
    assert_eq!(last.get("/other").await, None);
    for (sidecar, link) in chain.sidecars.iter().zip(CHAIN_LINKS) {
        sidecar.wait_for_state(link, "following").await;
    }
    // A copy on the first hop deletes at the middle; the second hop carries that on.
    chain.etcds[1].put("/app/stray", "1").await;
    until("the stray key at the end of the chain", PATIENCE, async || last.get("/app/stray").await).await;
    assert!(chain.sidecars[0].admin(&["resync", CHAIN_LINKS[0]]).status.success());
    wait_equal(first, last, &chain.ranges, PATIENCE).await;
}
