//! Job: that the origin has another history is remembered, whatever is killed, lost or compacted, until an operator decides or it is put right.
//! Input: origins restored from snapshots behind the position's waymark, sidecars killed, etcds compacted. Output: passes or fails.
//! Always true: once it is remembered, nothing in the origin's etcd tells of its other history any more but the note.

use crate::bed::etcd::EtcdOptions;
use crate::bed::pair::{LINK, Pair, PairOptions, link_name};
use crate::bed::{PATIENCE, until};
use crate::resume::{following, last, write};
use crate::same_origin::restore_and_write_past;
use bytes::Bytes;
use etcd_client::{Permission, PermissionType};
use etcd_ferry::model::{KeyRange, Phase, Position, Revision};
use etcd_ferry::origin::history::Met;
use std::path::PathBuf;

async fn note(pair: &Pair) -> Option<Met> {
    let json = pair.origin.get(link_name(LINK).other_history_key().to_vec()).await?;
    Some(Met::from_json(&json).unwrap())
}

/// Writes until the position holds the origin's present waymark, which is not rewritten within a minute then.
async fn settle_waymark(pair: &Pair) {
    until("the position to hold the present waymark", PATIENCE, async || {
        let position = pair.wait_applied(pair.origin.put("/app/settling", "1").await).await;
        let json = pair.origin.get(link_name(LINK).waymark_key().to_vec()).await?;
        let waymark: serde_json::Value = serde_json::from_slice(&json).ok()?;
        (waymark["counter"].as_u64()? >= 2 && waymark["counter"] == position.waymark.counter).then_some(())
    })
    .await;
}

/// An origin that is restored to after its last waymark and written past its old head, and a link that has stopped for it.
struct Stopped {
    pair: Pair,
    before: Position,
    /// Of the history that the replica has.
    good: PathBuf,
    head: Revision,
    reason: String,
}

async fn stopped(options: PairOptions) -> Stopped {
    let (mut pair, before) = following(options).await;
    settle_waymark(&pair).await;
    // Named by its size, which the next one may have too.
    let old = pair.dir().join("old.db");
    std::fs::rename(pair.origin.save_snapshot().await, &old).unwrap();
    let lost = write(&pair.origin.access(), "/app/lost/", 50, 50).await;
    pair.wait_applied(last(&lost)).await;
    let good = pair.origin.save_snapshot().await;
    pair.origin_sidecar.pause();
    let head = restore_and_write_past(&mut pair.origin, &old, last(&lost)).await;
    pair.origin_sidecar.resume();
    let reason = stop_reason(&pair).await;
    Stopped { pair, before, good, head, reason }
}

/// Why it stopped, and nothing else: right after its etcd was away, that the head cannot be read is told too.
async fn stop_reason(pair: &Pair) -> String {
    let alone = |reason: &str| reason.ends_with("(`etcd-ferry resync config`)");
    let stopped =
        |entry: &serde_json::Value| entry["state"] == "stopped" && entry["reason"].as_str().is_some_and(alone);
    let entry = pair.origin_sidecar.wait_for(LINK, "stopped, for one reason", stopped).await;
    entry["reason"].as_str().unwrap().to_owned()
}

/// Whatever told of the other history is gone from the origin, but the note.
async fn let_it_be_forgotten(pair: &mut Pair, head: Revision) {
    pair.origin_sidecar.kill();
    pair.origin.compact(head).await;
}

async fn stops_again(pair: &Pair, before: &Position, reason: &str) {
    assert_eq!(stop_reason(pair).await, reason);
    assert_eq!(pair.position().await.unwrap().epoch, before.epoch, "nothing was opened, copied or mended");
    let (_, keys) = pair.replica.read_all().await;
    assert!(!keys.keys().any(|key| key.starts_with(b"/app/new-history/")), "nothing of the new history came over");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_for_another_history_outlives_a_kill_and_a_compaction_until_a_resync() {
    let Stopped { mut pair, before, head, reason, .. } = stopped(PairOptions::default()).await;
    let met = note(&pair).await.expect("a note before the stop is told");
    assert_eq!(met.epoch, before.epoch);
    let_it_be_forgotten(&mut pair, head).await;
    pair.origin_sidecar.restart().await;
    stops_again(&pair, &before, &reason).await;
    assert_eq!(note(&pair).await, Some(met), "it is not written again");

    let output = pair.origin_sidecar.admin(&["resync", LINK, "--allow-deletes"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let is_new = |p: &Position| p.epoch > before.epoch && p.state == Phase::Following;
    until("a new epoch", PATIENCE, async || pair.position().await.filter(is_new)).await;
    pair.wait_equal().await;
    // It is outlived, and gone with the next hello.
    pair.origin_sidecar.kill();
    pair.origin_sidecar.restart().await;
    pair.wait_applied(pair.origin.put("/app/after", "1").await).await;
    assert_eq!(note(&pair).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_never_saw_the_stop_and_has_a_disk_of_its_own_stops_too() {
    let Stopped { mut pair, before, head, reason, .. } = stopped(PairOptions::default()).await;
    let_it_be_forgotten(&mut pair, head).await;
    std::fs::remove_dir_all(pair.origin_sidecar.data_dir()).unwrap();
    pair.origin_sidecar.options.node = "us-east-1-b".to_owned();
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    stops_again(&pair, &before, &reason).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_that_is_restored_once_more_to_what_the_replica_followed_is_followed_again() {
    let Stopped { mut pair, before, good, .. } = stopped(PairOptions::default()).await;
    pair.origin_sidecar.kill();
    pair.origin.restore_snapshot(&good).await;
    pair.origin_sidecar.restart().await;
    let revision = pair.origin.put("/app/after", "1").await;
    assert_eq!(pair.wait_applied(revision).await.epoch, before.epoch);
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_cannot_be_written_down_is_told_with_that_and_written_as_soon_as_it_can() {
    let key = |key: Bytes| KeyRange { to: Bytes::from([&key[..], &[0]].concat()), from: key };
    let link = link_name(LINK);
    let all = KeyRange { from: Bytes::from_static(b"/app/"), to: Bytes::from_static(b"/etcd-ferry/v1/links0") };
    let rights = [
        (PermissionType::Read, all),
        (PermissionType::Write, key(link.waymark_key())),
        (PermissionType::Write, key(link.applied_key())),
        (PermissionType::Write, KeyRange::prefix(b"/etcd-ferry/v1/links/config/candidates/")),
    ];
    let origin = EtcdOptions { auth: true, ..EtcdOptions::origin() };
    let options = PairOptions { origin, prefixes: vec!["/app/".into()], ..PairOptions::default() };
    let mut pair = Box::pin(Pair::prepare(options)).await;
    pair.origin.add_user("ferry", "ferry-password", &rights).await;
    pair.origin_sidecar.options.etcd.user = Some(("ferry".into(), "ferry-password".into()));
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let snapshot = pair.origin.save_snapshot().await;
    pair.wait_applied(pair.origin.put("/app/lost", "1").await).await;
    pair.origin.restore_snapshot(&snapshot).await;

    let said = |words: &'static str, told: bool| {
        move |entry: &serde_json::Value| {
            entry["state"] == "stopped" && entry["reason"].as_str().is_some_and(|reason| reason.contains(words) == told)
        }
    };
    let unwritten = "is not written down at the origin";
    let entry = pair.origin_sidecar.wait_for(LINK, "a stop that is not written down", said(unwritten, true)).await;
    let right = "needs the right to write /etcd-ferry/v1/links/config/other-history";
    assert!(entry["reason"].as_str().unwrap().contains(right), "{entry:#}");
    let folder = KeyRange::prefix(&link.folder());
    let permission = Permission::new(PermissionType::Write, folder.etcd_from()).with_range_end(folder.etcd_end());
    pair.origin.client().await.role_grant_permission("ferry", permission).await.unwrap();
    pair.origin_sidecar.wait_for(LINK, "a stop that is written down", said(unwritten, false)).await;
    assert!(note(&pair).await.is_some());
}
