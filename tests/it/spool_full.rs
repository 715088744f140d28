//! Job: full spools, full disks and read-only ones: stated, waited out, and nothing lost.
//! Input: a pair of regions, small limits, small tmpfs mounts (root is needed). Output: passes or fails.
//! Always true: a mount is gone at the end, also after a panic.

use crate::bed::disk::{Disk, run};
use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::traffic::{Write, commit};
use crate::resume::{following, last, spool_end, write};
use etcd_ferry::model::{Position, Revision, Side};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const MEMORY_MAX: u64 = 150 << 20;
/// Revisions of an outage that need several times the spool.
const WRITES: usize = 300;
const VALUE_BYTES: usize = 20 * 1024;

fn small_spool() -> PairOptions {
    let limits = BTreeMap::from([("spool_bytes_max".to_owned(), 1 << 20), ("segment_bytes".to_owned(), 128 << 10)]);
    PairOptions { limits, deletes_share_max: Some(1.0), ..PairOptions::default() }
}

fn reason(entry: &Value) -> &str {
    entry["reason"].as_str().unwrap_or_default()
}

/// Cuts the link and writes past the spool's limit. Returns the last revision, and where the spool ends.
async fn fill(pair: &Pair) -> (Revision, u64) {
    pair.proxy.cut();
    let head = last(&write(&pair.origin.access(), "/app/outage/", WRITES, VALUE_BYTES).await);
    let entry = pair.origin_sidecar.wait_for_state(LINK, "spool_full").await;
    assert!(reason(&entry).contains("the spool is full"), "{entry:#}");
    let end = spool_end(&entry).unwrap();
    assert!(end < head.0, "the watch has stopped at {end}, before {head}");
    (head, end)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_spool_stops_the_watch_says_so_and_goes_on_without_a_copy() {
    let (pair, before) = following(small_spool()).await;
    let recorder = pair.record().await;
    let (head, end) = fill(&pair).await;
    let more = pair.origin.put("/app/more", "1").await;
    let lag = |entry: &Value| entry["head_revision"].as_u64() >= Some(more.0);
    let entry = pair.origin_sidecar.wait_for(LINK, "the head to be seen", lag).await;
    assert_eq!(spool_end(&entry), Some(end), "a full spool takes nothing more");
    assert!(entry["lag_seconds"].as_f64().unwrap() > 0.0);
    let (_, memory_max) = pair.origin_sidecar.process().memory_bytes();
    assert!(memory_max < MEMORY_MAX, "{} MiB", memory_max >> 20);
    pair.proxy.heal();
    let after = pair.wait_applied(more).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + WRITES as u64 + 1), "{head}");
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.assert_equal().await;
    pair.recorded(recorder).await.check().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_spool_goes_on_with_an_anchor_if_etcd_has_compacted_past_its_end() {
    let (mut pair, before) = following(small_spool()).await;
    let (head, _) = fill(&pair).await;
    // Also after a restart: the spool is as full as before.
    pair.origin_sidecar.kill();
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "spool_full").await;
    let prefix = [Write::delete_prefix("/app/outage/00001")];
    let deleted = commit(&mut pair.origin.kv().await, &prefix).await.unwrap().unwrap().revision;
    pair.origin.compact(deleted).await;
    pair.proxy.heal();
    let revision = pair.origin.put("/app/more", "1").await;
    let after: Position = pair.wait_applied(revision).await;
    assert!(after.epoch > before.epoch && revision > head, "{after:?}");
    pair.wait_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_under_the_spool_is_told_and_waited_out_without_a_hole() {
    // More than the disk and the memory before it take together.
    const MANY: usize = 2 * WRITES;
    let (mut pair, before) = following(PairOptions::default()).await;
    pair.origin_sidecar.stop().await;
    let disk = Tmpfs::over(&pair.origin_sidecar.data_dir(), "2m");
    pair.origin_sidecar.restart().await;
    pair.proxy.cut();
    let head = last(&write(&pair.origin.access(), "/app/outage/", MANY, VALUE_BYTES).await);
    let told = |entry: &Value| reason(entry).contains("disk") && entry["state"] == "spool_full";
    let entry = pair.origin_sidecar.wait_for(LINK, "the full disk to be told", told).await;
    assert!(spool_end(&entry).unwrap() < head.0, "{entry:#}");
    // A start makes no more room, and needs none.
    pair.origin_sidecar.kill();
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for(LINK, "the full disk to be told again", told).await;
    disk.resize("64m");
    let room = |entry: &Value| spool_end(entry).is_some_and(|end| end >= head.0) && !reason(entry).contains("disk");
    pair.origin_sidecar.wait_for(LINK, "the spool to go on by itself", room).await;
    pair.proxy.heal();
    let after = pair.wait_applied(head).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + MANY as u64));
    pair.assert_equal().await;
    pair.origin_sidecar.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_under_the_journal_is_told_and_waited_out_without_a_hole() {
    Box::pin(full_journal(false)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_a_replicas_sidecar_starts_and_once_there_is_room_it_goes_on_without_a_hole() {
    Box::pin(full_journal(true)).await;
}

async fn full_journal(restarts: bool) {
    let (mut pair, before) = following(PairOptions::default()).await;
    pair.replica_sidecar.stop().await;
    let disk = Tmpfs::over(&pair.replica_sidecar.data_dir(), "2m");
    pair.replica_sidecar.restart().await;
    pair.replica_sidecar.wait_for_state(LINK, "following").await;
    // What is applied leaves the journal: it fills while the replica's etcd hangs.
    pair.replica.pause();
    let head = last(&write(&pair.origin.access(), "/app/outage/", WRITES, VALUE_BYTES).await);
    let told = |entry: &Value| reason(entry).contains("the journal's disk takes no more");
    pair.replica_sidecar.wait_for(LINK, "the full disk to be told", told).await;
    if restarts {
        // A start makes no more room, and needs none: not for the dedupe log either, which lies there too.
        pair.replica_sidecar.kill();
        pair.replica_sidecar.restart().await;
    }
    disk.resize("64m");
    pair.replica_sidecar.wait_for(LINK, "the journal to go on by itself", |entry| !told(entry)).await;
    pair.replica.resume();
    let after = pair.wait_applied(head).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + WRITES as u64));
    pair.assert_equal().await;
    pair.replica_sidecar.stop().await;
}

/// Its reason names the disk's own error.
fn is_read_only(entry: &Value) -> bool {
    reason(entry).to_lowercase().contains("read-only file system")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_turns_read_only_under_the_spool_stops_the_link_and_mended_it_goes_on_without_a_hole() {
    Box::pin(turns_read_only(Side::Origin)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_turns_read_only_under_the_journal_and_the_dedupe_log_stops_the_link_and_mended_it_goes_on() {
    Box::pin(turns_read_only(Side::Replica)).await;
}

/// The disk of this side's sidecar.
async fn turns_read_only(side: Side) {
    let (mut pair, before) = following(PairOptions::default()).await;
    pair.sidecar(side).stop().await;
    let disk = Disk::over(&pair.sidecar(side).data_dir(), 64 << 20);
    pair.sidecar(side).restart().await;
    pair.sidecar(side).wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    disk.fail();
    let acknowledged = write(&pair.origin.access(), "/app/read-only/", WRITES, 1_000).await;
    let stopped = |entry: &Value| entry["state"] == "stopped" && reason(entry).contains("mend the disk");
    let entry = pair.sidecar(side).wait_for(LINK, "the disk's error to be told", stopped).await;
    assert!(is_read_only(&entry), "{entry:#}");
    pair.sidecar(side).kill();
    disk.mend();
    pair.sidecar(side).restart().await;
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + WRITES as u64));
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), WRITES);
    recording.check().unwrap();
    pair.sidecar(side).stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_data_folder_is_refused_at_the_start_and_nothing_is_lost_by_it() {
    read_only(|data_dir, _| data_dir).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_whose_folder_alone_is_read_only_is_refused_at_the_start_and_nothing_is_lost_by_it() {
    read_only(|data_dir, side| data_dir.join(side).join(LINK)).await;
}

/// Makes the folder that `over` chooses, of a data folder and a side, read-only at both sides; each sidecar ends and names it, and goes on
/// once it can be written again.
async fn read_only(over: impl Fn(PathBuf, &str) -> PathBuf) {
    let (mut pair, before) = following(PairOptions::default()).await;
    let folders = [over(pair.origin_sidecar.data_dir(), "origin"), over(pair.replica_sidecar.data_dir(), "replica")];
    pair.origin_sidecar.stop().await;
    pair.replica_sidecar.stop().await;
    let disks = folders.each_ref().map(|folder| Tmpfs::over(folder, "64m"));
    disks.iter().for_each(|disk| disk.remount("ro"));
    for (sidecar, folder) in [&mut pair.origin_sidecar, &mut pair.replica_sidecar].into_iter().zip(&folders) {
        sidecar.spawn();
        assert!(!sidecar.ended().await.success());
        let log = sidecar.log().to_lowercase();
        assert!(log.contains("read-only") && log.contains(&*folder.to_string_lossy().to_lowercase()), "{log}");
    }
    disks.iter().for_each(|disk| disk.remount("rw"));
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let head = last(&write(&pair.origin.access(), "/app/more/", 50, 100).await);
    let after = pair.wait_applied(head).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 50));
    pair.assert_equal().await;
    pair.origin_sidecar.stop().await;
    pair.replica_sidecar.stop().await;
}

/// A small disk in memory, mounted over a folder.
struct Tmpfs {
    mount: PathBuf,
}

impl Tmpfs {
    /// What is in the folder is copied onto the disk.
    fn over(folder: &Path, size: &str) -> Self {
        let kept = folder.with_extension("kept");
        std::fs::rename(folder, &kept).unwrap();
        std::fs::create_dir(folder).unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size},mode=0700"), "tmpfs", &folder.to_string_lossy()]);
        let disk = Self { mount: folder.to_owned() };
        run("cp", &["-a", "--sparse=always", &format!("{}/.", kept.display()), &folder.to_string_lossy()]);
        disk
    }

    fn resize(&self, size: &str) {
        self.remount(&format!("size={size}"));
    }

    fn remount(&self, options: &str) {
        run("mount", &["-o", &format!("remount,{options}"), &self.mount.to_string_lossy()]);
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: after a panic a sidecar may still have files open.
        let _ = Command::new("umount").arg("-l").arg(&self.mount).stderr(Stdio::null()).status();
    }
}
