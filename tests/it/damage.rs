//! Job: damaged disks: spool, journal and dedupe log with rubbish in them; and a replica's sidecar killed with work in its journal.
//! Input: a pair of regions, files overwritten while their sidecar is down, or runs. Output: passes or fails.
//! Always true: damage is told of in the log, what was damaged is kept aside, and the link goes on without a hole.

use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::traffic::{Acknowledged, Traffic, TrafficOptions};
use crate::bed::{PATIENCE, until};
use crate::resume::{following, last, noise, spool_dir, spool_end, wait_spooled, write};
use etcd_ferry::model::Revision;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

fn small_segments() -> PairOptions {
    let limits = BTreeMap::from([("segment_bytes".to_owned(), 64 << 10)]);
    PairOptions { limits, ..PairOptions::default() }
}

/// What waits is read from files, and not from memory.
fn little_memory() -> PairOptions {
    let limits = [("segment_bytes", 64 << 10), ("queue_bytes_max", 64 << 10), ("frame_bytes_max", 64 << 10)];
    let limits = limits.into_iter().chain([("page_bytes_max", 64 << 10)]);
    PairOptions { limits: limits.map(|(name, value)| (name.to_owned(), value)).collect(), ..PairOptions::default() }
}

fn replica_dir(pair: &Pair, what: &str) -> PathBuf {
    pair.replica_sidecar.data_dir().join("replica").join(LINK).join(what)
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn segments_in(dir: &Path) -> Vec<String> {
    names_in(dir).into_iter().filter(|name| name.ends_with(".segment")).collect()
}

/// Waits until what the spool has taken is in so many files that one of them is in the middle: they are written a moment later.
async fn wait_written(pair: &Pair) {
    let dir = spool_dir(pair);
    until("a file in the middle of the spool", PATIENCE, async || (segments_in(&dir).len() >= 3).then_some(())).await;
}

/// Overwrites a stretch in the middle of what the middle segment holds; zeros follow that.
fn damage(dir: &Path) {
    let segments = segments_in(dir);
    assert!(segments.len() >= 3, "{segments:?}");
    let path = dir.join(&segments[segments.len() / 2]);
    let middle = fs::read(&path).unwrap().iter().rposition(|byte| *byte != 0).unwrap() / 2;
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&noise(7, 64), middle as u64).unwrap();
}

/// Stops the replica's etcd, writes, and waits until all of it is durable at the replica, and nothing of it applied.
async fn journaled(pair: &Pair, count: usize) -> Vec<Acknowledged> {
    let before = pair.position().await.unwrap();
    pair.replica.pause();
    let acknowledged = write(&pair.origin.access(), "/app/journaled/", count, 1_000).await;
    let durable = before.seq.0 + count as u64;
    let seen = |entry: &Value| entry["durable_seq"] == durable && entry["applied_seq"] == before.seq.0;
    pair.replica_sidecar.wait_for(LINK, "all of it to be durable", seen).await;
    acknowledged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_durable_is_applied_after_a_kill_of_the_replicas_sidecar_though_the_origin_is_gone() {
    let prefixes = vec!["/app/".to_owned()];
    let (mut pair, before) = following(PairOptions { prefixes, ..PairOptions::default() }).await;
    let acknowledged = journaled(&pair, 500).await;
    let (_, expected) = pair.origin.read(&pair.ranges, None).await;
    pair.origin_sidecar.kill();
    pair.origin.kill();
    pair.replica_sidecar.kill();
    pair.replica.resume();
    // The one transaction that was on its way may land; all the others are in the journal alone.
    assert!(pair.position().await.unwrap().seq.0 < before.seq.0 + 500);
    pair.replica_sidecar.restart().await;
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 500));
    let (_, there) = pair.replica.read(&pair.ranges, None).await;
    assert!(there == expected, "{} keys of {}", there.len(), expected.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_journal_is_set_aside_and_what_it_lacks_comes_from_the_origin_again() {
    let (mut pair, before) = following(small_segments()).await;
    let recorder = pair.record().await;
    let mut acknowledged = journaled(&pair, 500).await;
    pair.replica_sidecar.kill();
    damage(&replica_dir(&pair, "journal"));
    pair.replica.resume();
    pair.replica_sidecar.restart().await;
    acknowledged.extend(write(&pair.origin.access(), "/app/more/", 50, 100).await);
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 550));
    assert!(pair.replica_sidecar.log().contains("a damaged part was set aside"));
    assert!(names_in(&replica_dir(&pair, "journal")).iter().any(|name| name.starts_with("damaged-")));
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), 550);
    recording.check().unwrap();
}

/// A journal is one disk: the origin forgets what is applied, not what is durable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_a_lost_journal_held_comes_from_the_spool_though_the_origin_is_compacted_to_its_head() {
    let (mut pair, before) = following(small_segments()).await;
    let acknowledged = journaled(&pair, 500).await;
    pair.origin_sidecar.wait_for(LINK, "the word that it is durable", |e| e["durable_seq"] == before.seq.0 + 500).await;
    pair.replica_sidecar.kill();
    std::fs::remove_dir_all(replica_dir(&pair, "journal")).unwrap();
    pair.replica.resume();
    pair.origin.compact(last(&acknowledged)).await;
    pair.replica_sidecar.restart().await;
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 500));
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_spool_is_set_aside_and_what_it_lacks_is_watched_again() {
    let (mut pair, before) = following(small_segments()).await;
    let recorder = pair.record().await;
    pair.proxy.cut();
    let acknowledged = write(&pair.origin.access(), "/app/outage/", 500, 1_000).await;
    wait_spooled(&pair, last(&acknowledged)).await;
    wait_written(&pair).await;
    pair.origin_sidecar.kill();
    damage(&spool_dir(&pair));
    pair.origin_sidecar.restart().await;
    pair.proxy.heal();
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 500));
    assert!(pair.origin_sidecar.log().contains("a damaged part was set aside"));
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), 500);
    recording.check().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_spool_whose_lost_part_is_compacted_leads_to_an_anchor_and_never_past_a_hole() {
    let (mut pair, before) = following(small_segments()).await;
    pair.proxy.cut();
    let acknowledged = write(&pair.origin.access(), "/app/outage/", 500, 1_000).await;
    wait_spooled(&pair, last(&acknowledged)).await;
    wait_written(&pair).await;
    pair.origin_sidecar.kill();
    damage(&spool_dir(&pair));
    pair.origin.compact(last(&acknowledged)).await;
    pair.origin_sidecar.restart().await;
    pair.proxy.heal();
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert!(after.epoch > before.epoch, "{after:?}");
    pair.wait_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_that_is_damaged_under_the_running_sidecar_is_dropped_and_what_it_held_is_watched_again() {
    let (pair, before) = following(little_memory()).await;
    let recorder = pair.record().await;
    pair.proxy.cut();
    let acknowledged = write(&pair.origin.access(), "/app/outage/", 500, 1_000).await;
    wait_spooled(&pair, last(&acknowledged)).await;
    wait_written(&pair).await;
    damage(&spool_dir(&pair));
    pair.proxy.heal();
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 500));
    assert_eq!(pair.origin_sidecar.log().matches("the spool cannot be read any more").count(), 1);
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), 500);
    recording.check().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_that_is_damaged_under_the_running_sidecar_after_a_compaction_leads_to_a_repair_and_never_past_a_hole()
{
    let (pair, before) = following(little_memory()).await;
    pair.proxy.cut();
    let acknowledged = write(&pair.origin.access(), "/app/outage/", 500, 1_000).await;
    wait_spooled(&pair, last(&acknowledged)).await;
    wait_written(&pair).await;
    damage(&spool_dir(&pair));
    pair.origin.compact(last(&acknowledged)).await;
    pair.proxy.heal();
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert!(after.epoch > before.epoch, "{after:?}");
    pair.wait_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_is_damaged_under_the_running_sidecar_is_dropped_and_the_origins_spool_has_it_all() {
    let (pair, before) = following(little_memory()).await;
    let recorder = pair.record().await;
    let acknowledged = journaled(&pair, 500).await;
    damage(&replica_dir(&pair, "journal"));
    pair.origin.compact(last(&acknowledged)).await;
    pair.proxy.cut();
    pair.replica.resume();
    pair.replica_sidecar.wait_for_log("the journal cannot be read any more").await;
    let dropped = |entry: &Value| entry["state"] == "connecting" && entry["durable_seq"] == entry["applied_seq"];
    pair.replica_sidecar.wait_for(LINK, "it to wait for the origin", dropped).await;
    pair.proxy.heal();
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 500));
    assert_eq!(pair.replica_sidecar.log().matches("the journal cannot be read any more").count(), 1);
    pair.replica_sidecar.wait_for_state(LINK, "following").await;
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), 500);
    recording.check().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_whose_disk_fails_stops_the_link_with_the_reason_until_the_sidecar_is_restarted() {
    let (mut pair, before) = following(little_memory()).await;
    std::fs::remove_dir_all(replica_dir(&pair, "journal")).unwrap();
    let acknowledged = write(&pair.origin.access(), "/app/some/", 500, 1_000).await;
    let says = |entry: &Value, what: &str| entry["reason"].as_str().is_some_and(|reason| reason.contains(what));
    let stopped = |entry: &Value| entry["state"] == "stopped" && says(entry, "mend the disk");
    pair.replica_sidecar.wait_for(LINK, "the failed disk", stopped).await;
    let told = |entry: &Value| says(entry, "the replica's journal: an earlier disk error stopped it");
    pair.origin_sidecar.wait_for(LINK, "the failed disk", told).await;
    pair.replica_sidecar.wait_for(LINK, "the reason to stay", stopped).await;
    pair.replica_sidecar.kill();
    pair.replica_sidecar.restart().await;
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 500));
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_damaged_ranges_a_replicas_sidecar_does_not_start_and_says_which_file_to_remove() {
    let (mut pair, before) = following(PairOptions::default()).await;
    pair.replica_sidecar.kill();
    let path = replica_dir(&pair, "ranges.json");
    let mut ranges = fs::read(&path).unwrap();
    let middle = ranges.len() / 2;
    ranges[middle] ^= 1;
    fs::write(&path, ranges).unwrap();
    pair.replica_sidecar.spawn();
    assert!(!pair.replica_sidecar.ended().await.success());
    let told = format!("{} does not hold ranges: remove it", path.display());
    assert!(pair.replica_sidecar.log().contains(&told), "{}", pair.replica_sidecar.log());
    fs::remove_file(&path).unwrap();
    pair.replica_sidecar.restart().await;
    let acknowledged = write(&pair.origin.access(), "/app/more/", 20, 100).await;
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dedupe_log_full_of_rubbish_is_moved_aside_and_made_anew_and_the_link_goes_on() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let mut acknowledged = write(&pair.origin.access(), "/app/some/", 200, 100).await;
    pair.wait_applied(last(&acknowledged)).await;
    pair.replica_sidecar.kill();
    let db = replica_dir(&pair, "dedupe").join("db");
    let bytes = fs::metadata(&db).unwrap().len();
    fs::write(&db, noise(3, usize::try_from(bytes).unwrap())).unwrap();
    pair.replica_sidecar.restart().await;
    acknowledged.extend(write(&pair.origin.access(), "/app/more/", 200, 100).await);
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 400));
    assert!(pair.replica_sidecar.log().contains("moved aside"));
    let beside = names_in(replica_dir(&pair, "dedupe").parent().unwrap());
    assert!(beside.iter().any(|name| name.starts_with("dedupe.bad-")), "{beside:?}");
    pair.assert_equal().await;
}

/// Where etcd has compacted what the spool holds last, the next watch shows nothing of it: what it appends is not linked to what is held, and that
/// is written down before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_that_cannot_write_down_what_its_next_revision_is_linked_to_tells_it_and_goes_on_once_it_can() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let held = gap_in_an_outage(&mut pair).await;
    let in_its_place = spool_dir(&pair).join("lineage.new");
    fs::create_dir(&in_its_place).unwrap();
    let next = pair.origin.put("/app/next", "1").await;
    let told = |entry: &Value| entry["reason"].as_str().is_some_and(|reason| reason.contains("lineage.json"));
    let entry = pair.origin_sidecar.wait_for(LINK, "the file that cannot be written to be told", told).await;
    assert!(spool_end(&entry) < Some(next.0), "{entry:#}");
    fs::remove_dir(&in_its_place).unwrap();
    wait_spooled(&pair, next).await;
    pair.proxy.heal();
    let after = pair.wait_applied(next).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + HELD + 1), "after {held}");
    pair.assert_equal().await;
}

/// A hello looks at the head before it looks at the spool, which may have got further meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_that_goes_past_the_head_that_a_hello_has_seen_is_no_other_history() {
    let (mut pair, before) = following(PairOptions::default()).await;
    gap_in_an_outage(&mut pair).await;
    let options = TrafficOptions { writers: 8, writes_per_writer: 100_000, value_bytes_max: 100, ..Default::default() };
    let traffic = Traffic::start(&pair.origin.access(), &options);
    let flows = pair.origin.put("/app/while-traffic-flows", "1").await;
    wait_spooled(&pair, flows).await;
    pair.proxy.heal();
    pair.wait_applied(flows).await;
    let after = pair.wait_applied(last(&traffic.stop().await)).await;
    assert_eq!(after.epoch, before.epoch);
    assert!(!pair.origin_sidecar.log().contains("the link stops"));
    pair.assert_equal().await;
}

/// Revisions that the spool holds when the watch ends, and etcd shows no more.
const HELD: u64 = 20;

/// Cuts the link, and has the watch open anew after the spool's end. Returns the last revision that is held.
async fn gap_in_an_outage(pair: &mut Pair) -> Revision {
    pair.proxy.cut();
    let count = usize::try_from(HELD).unwrap();
    let held = last(&write(&pair.origin.access(), "/app/held/", count, 50).await);
    wait_spooled(pair, held).await;
    pair.origin.compact(held).await;
    pair.origin.restart().await;
    held
}
