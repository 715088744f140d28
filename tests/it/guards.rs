//! Job: the guards of the base copy: a copy that would delete much waits for an operator's word.
//! Input: a pair of regions, with keys at the replica that the origin has not. Output: passes or fails.
//! Always true: that nothing was written is told by the revision of every key at the replica, the position's among them.

use crate::bed::contents::{Stamps, load, noise};
use crate::bed::etcd::{EtcdOptions, KeyMap};
use crate::bed::pair::{LINK, Pair, PairOptions, link_name};
use crate::bed::sidecar::Sidecar;
use crate::bed::{PATIENCE, until};
use etcd_ferry::model::Revision;
use serde_json::Value;

fn over_app() -> PairOptions {
    let quick = |options| EtcdOptions { sync: false, ..options };
    PairOptions {
        origin: quick(EtcdOptions::origin()),
        replica: quick(EtcdOptions::replica()),
        prefixes: vec!["/app/".into()],
        ..PairOptions::default()
    }
}

fn resync(sidecar: &Sidecar, more: &[&str]) {
    let output = sidecar.admin(&[&["resync", LINK], more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until the link has stopped that often, with `words` in the reason at the origin, and the replica still as it was.
async fn assert_stopped(pair: &Pair, times: usize, words: &[&str], before: &(Revision, Stamps)) {
    let stops = async || (pair.origin_sidecar.log().matches("the link stops").count() >= times).then_some(());
    until(&format!("stop number {times}"), PATIENCE, stops).await;
    let entry = pair.origin_sidecar.wait_for_state(LINK, "stopped").await;
    let reason = entry["reason"].as_str().unwrap();
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in the reason: {reason}");
    }
    assert!(reason.contains("etcd-ferry resync config --allow-deletes --config F"), "{reason}");
    assert_eq!(pair.replica.all_stamps().await, *before, "something was written at the replica");
}

/// Follows and is equal, after the operator's word.
async fn assert_goes_on(pair: &Pair, keys: usize) {
    resync(&pair.origin_sidecar, &["--allow-deletes"]);
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(pair.assert_equal().await, keys);
    let revision = pair.origin.put("/app/000000", "after the copy").await;
    pair.wait_applied(revision).await;
}

#[tokio::test]
async fn an_empty_origin_over_a_replica_with_keys_stops_the_link_until_deletes_are_allowed() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    pair.origin.put("/beside", "1").await;
    load(&pair.replica, &noise("/app/", 50, 10)).await;
    let before = pair.replica.all_stamps().await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    assert_stopped(&pair, 1, &["holds no key", "50"], &before).await;

    resync(&pair.origin_sidecar, &[]);
    assert_stopped(&pair, 2, &["holds no key", "50"], &before).await;
    pair.origin_sidecar.restart().await;
    assert_stopped(&pair, 3, &["holds no key", "50"], &before).await;
    assert_goes_on(&pair, 0).await;
}

#[tokio::test]
async fn a_first_copy_over_keys_that_the_origin_has_not_stops_the_link_until_deletes_are_allowed() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    let keys = noise("/app/", 12_000, 10);
    load(&pair.origin, &keys).await;
    // One key of 12,001, between two pages' worth of common ones.
    let mut more: KeyMap = keys;
    more.insert("/app/007777x".into(), "of the replica".into());
    load(&pair.replica, &more).await;
    let before = pair.replica.all_stamps().await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let words = ["first copy", "delete 1 of the 12001 keys", "12000 keys"];
    assert_stopped(&pair, 1, &words, &before).await;

    resync(&pair.origin_sidecar, &[]);
    assert_stopped(&pair, 2, &words, &before).await;
    assert_goes_on(&pair, 12_000).await;
    let after = pair.replica.stamps(&pair.ranges).await;
    let kept = after.iter().filter(|(key, stamp)| before.1[*key] == **stamp).count();
    assert_eq!(kept, 11_999, "only the deleted key and the one put later were written");
}

#[tokio::test]
async fn a_first_copy_over_keys_that_the_origin_has_too_needs_no_word() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    let keys = noise("/app/", 100, 10);
    load(&pair.origin, &keys).await;
    load(&pair.replica, &keys.keys().take(40).map(|key| (key.clone(), "another value".into())).collect()).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(pair.assert_equal().await, 100);
}

#[tokio::test]
async fn more_deletes_than_the_share_stop_a_later_copy_until_deletes_are_allowed() {
    let options = PairOptions { deletes_share_max: Some(0.1), ..over_app() };
    let mut pair = Box::pin(Pair::prepare(options)).await;
    load(&pair.origin, &noise("/app/", 90, 10)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    // The eleventh of 101 is one too many.
    load(&pair.replica, &noise("/app/extra-", 11, 10)).await;
    let before = pair.replica.all_stamps().await;
    let words = ["delete 11 of the 101 keys", "deletes_share_max"];
    resync(&pair.origin_sidecar, &[]);
    assert_stopped(&pair, 1, &words, &before).await;
    resync(&pair.origin_sidecar, &[]);
    assert_stopped(&pair, 2, &words, &before).await;
    assert_goes_on(&pair, 90).await;
}

#[tokio::test]
async fn resync_is_safe_to_repeat_also_while_a_copy_runs() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    load(&pair.origin, &noise("/app/", 3_000, 100)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let before = pair.replica.stamps(&pair.ranges).await;
    let epoch = pair.position().await.unwrap().epoch;

    for more in [&["--allow-deletes"][..], &[], &["--allow-deletes"], &[], &[]] {
        resync(&pair.origin_sidecar, more);
    }
    let again = |entry: &Value| entry["epoch"].as_u64() > Some(epoch.0) && entry["state"] == "following";
    pair.origin_sidecar.wait_for(LINK, "the last copy's end", again).await;
    let revision = pair.origin.put("/app/after", "1").await;
    pair.wait_applied(revision).await;
    assert_eq!(pair.assert_equal().await, 3_001);
    let mut after = pair.replica.stamps(&pair.ranges).await;
    after.remove(&b"/app/after"[..]);
    assert_eq!(before, after, "an equal key was written");
}

#[tokio::test]
async fn the_word_of_an_operator_holds_for_one_copy_only() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    load(&pair.origin, &noise("/app/", 10, 10)).await;
    load(&pair.replica, &noise("/app/old-", 30, 10)).await;
    let before = pair.replica.all_stamps().await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    assert_stopped(&pair, 1, &["first copy", "30"], &before).await;
    assert_goes_on(&pair, 10).await;
    load(&pair.replica, &noise("/app/old-", 30, 10)).await;
    let before = pair.replica.all_stamps().await;
    resync(&pair.origin_sidecar, &[]);
    assert_stopped(&pair, 2, &["delete 30 of the 40 keys"], &before).await;
}

#[tokio::test]
async fn two_sidecars_beside_one_etcd_make_no_link_until_one_of_them_is_put_right() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    let right = std::mem::replace(&mut pair.replica_sidecar.options.etcd, pair.origin.access());
    pair.replica_sidecar.write_config();
    pair.origin.put("/app/a", "1").await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let told = |entry: &Value| {
        entry["reason"].as_str().is_some_and(|reason| reason.contains("stand beside the same etcd cluster"))
    };
    let entry = pair.origin_sidecar.wait_for(LINK, "that both stand beside one etcd", told).await;
    assert!(entry["reason"].as_str().unwrap().contains("correct etcd.endpoints of one of the two"), "{entry:#}");
    assert_eq!(entry["state"], "connecting", "{entry:#}");
    let written = pair.origin.put("/app/a", "2").await;
    let position = pair.origin.kv().await.get(link_name(LINK).position_key().to_vec(), None).await.unwrap();
    assert!(position.kvs().is_empty(), "the etcd became its own replica");

    pair.replica_sidecar.options.etcd = right;
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.wait_applied(written).await;
    assert_eq!(pair.assert_equal().await, 1);
    let keys = pair.origin.kv().await.get("/app/a", None).await.unwrap();
    assert_eq!(keys.kvs()[0].version(), 2, "written by nobody but whoever put it");
}
