//! Job: power cuts and full disks, for real: what was said to be durable is there, byte for byte.
//! Input: an ext4 in a file, mounted by loop; a process that writes into it. Output: passes or fails.
//! Always true: mounts and processes are gone at the end, also after a panic.
//!
//! The writing process is stopped mid-way, the file under the mounted ext4 is copied, and the copy is mounted: what the kernel had not
//! written yet is missing in it, as after a power cut.

use crate::bed::PATIENCE;
use crate::bed::disk::{Disk, run};
use bytes::Bytes;
use etcd_ferry::config::Limits;
use etcd_ferry::model::{Change, ClusterId, Digest, Epoch, Revision, Run, Seq, WholeRevision};
use etcd_ferry::origin::spool::{Spool, SpoolEntry};
use etcd_ferry::replica::dedupe::Dedupe;
use etcd_ferry::replica::journal::{Journal, JournalEntry};
use etcd_ferry::segment::feed::Appended;
use etcd_ferry::segment::{OnDamage, SegmentLimits, SegmentLog};
use etcd_ferry::wire::digest;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Set for the writing process: what to write, the size of a record, and where.
const WRITE: &str = "ETCD_FERRY_POWER_CUT";
const SIZES: [usize; 4] = [64, 1024, 64 * 1024, 1536 * 1024];
/// Bytes written before the first cut; there is a second one after as many again.
const CUT_EVERY_BYTES: usize = 3 << 20;
/// Notes of the dedupe log: more than its file has room for, so that a sync that is left out loses the file's new end.
const DEDUPE_NOTES: u64 = 20_000;
/// The dedupe log is synced each 5 s.
const DEDUPE_SYNCED_WITHIN: Duration = Duration::from_secs(15);
/// Of what the journal receives.
const EPOCH: Epoch = Epoch(3);
const RUN: Run = Run { cluster: ClusterId(7), epoch: EPOCH };

#[test]
fn a_power_cut_loses_no_segment_record_that_was_synced() {
    SIZES.into_iter().for_each(|bytes| cut_twice("segment", bytes));
}

#[test]
fn what_a_killed_writer_left_unsynced_survives_a_power_cut_once_the_log_is_open_again() {
    let disk = Disk::new(32 << 20);
    let dir = disk.mount.join("segment");
    let (mut log, _) = open_log(&dir);
    log.append(1, &payload(1, 1024)).unwrap();
    log.sync().unwrap();
    (2..=40).for_each(|index| log.append(index, &payload(index, 1024)).unwrap());
    drop(log);
    let (again, seen) = open_log(&dir);
    assert_eq!((again.last_index(), seen.len()), (40, 40), "the kernel holds it all");
    let copy = disk.copy();
    let (_, kept) = open_log(&copy.mount.join("segment"));
    assert!(kept == seen, "{} of 40 are there", kept.len());
}

#[test]
fn a_power_cut_loses_no_spooled_revision_that_was_durable() {
    SIZES.into_iter().for_each(|bytes| cut_twice("spool", bytes));
}

#[test]
fn a_power_cut_loses_no_journaled_revision_that_was_durable() {
    SIZES.into_iter().for_each(|bytes| cut_twice("journal", bytes));
}

/// What else is in the folder, and syncs it, is not there.
#[test]
fn a_power_cut_brings_nothing_back_into_a_log_that_was_cleared() {
    let disk = Disk::new(32 << 20);
    let mut log = open_log(&disk.mount.join("log")).0;
    log.append(1, &payload(1, 1_024)).unwrap();
    log.sync().unwrap();
    log.clear(3, 7).unwrap();
    let copy = disk.copy();
    let (kept, records) = open_log(&copy.mount.join("log"));
    assert_eq!((kept.tag(), kept.base(), kept.last_index(), records.len()), (3, 7, 7, 0));
}

#[tokio::test]
async fn a_power_cut_brings_no_older_epoch_back_into_a_journal_that_was_reset() {
    let disk = Disk::new(32 << 20);
    let (journal, _) = Journal::open(&disk.mount.join("journal"), &limits(2 << 20, 1 << 30)).await.unwrap();
    let older = Epoch(EPOCH.0 - 1);
    journal.reset(Run { epoch: older, ..RUN }, Seq(0)).await.unwrap();
    let entry = JournalEntry { epoch: older, ..received(1, 1024) };
    assert_eq!(journal.append(vec![entry]).await.unwrap(), Appended::Taken);
    journal.durable().wait_for(|durable| durable.0 == 1).await.unwrap();
    journal.reset(RUN, Seq(7)).await.unwrap();
    let copy = disk.copy();
    journal.close().await.unwrap();
    let (kept, _) = Journal::open(&copy.mount.join("journal"), &limits(2 << 20, 1 << 30)).await.unwrap();
    let extent = kept.extent().borrow().clone();
    assert_eq!((extent.epoch, extent.base, extent.end, extent.last), (EPOCH, Seq(7), Seq(7), None));
    assert_eq!(kept.origin(), Some(RUN.cluster));
    kept.close().await.unwrap();
}

#[test]
fn notes_of_the_dedupe_log_survive_a_power_cut_some_seconds_later_though_nobody_closes_it() {
    let disk = Disk::new(128 << 20);
    let dir = disk.mount.join("dedupe");
    let mut writer = Writer::start(&format!("dedupe 0 {}", dir.display()));
    let deadline = Instant::now() + DEDUPE_SYNCED_WITHIN;
    let noted = writer.stop_after(DEDUPE_NOTES);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    loop {
        let copy = disk.copy();
        let kept = runtime.block_on(kept_notes(&copy.mount.join("dedupe")));
        if kept == noted {
            break;
        }
        assert!(Instant::now() < deadline, "{kept} of {noted} are there");
        writer.go_on();
        std::thread::yield_now();
        writer.stop();
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_after_trimming_the_spool_goes_on_without_a_hole() {
    let disk = Disk::new(20 << 20);
    let dir = disk.mount.join("spool");
    let (spool, _) = Spool::open(&dir, &limits(16 << 20, 1 << 30), Digest::default()).await.unwrap();
    let mut next = 1;
    let mut extent = spool.extent();
    loop {
        // A few at a time, so that the spool's own limits are never near.
        match spool.append((next..next + 4).map(|index| entry(index, 256 * 1024)).collect()).await.unwrap() {
            Appended::Taken => next += 4,
            Appended::Full(_) => break,
        }
        assert!(next < 1000, "the disk is never full");
        let told = async {
            tokio::select! {
                _ = extent.wait_for(|extent| extent.disk_full) => {}
                _ = durable(&spool, next - 1) => {}
            }
        };
        tokio::time::timeout(PATIENCE, told).await.expect("the disk takes it, or is said to be full");
    }
    let extent = spool.extent().borrow().clone();
    assert!(extent.disk_full && extent.full, "{extent:?}");
    let all = read_all(&spool, 0, next - 1).await;
    assert!(all.iter().zip(1..).all(|(entry, index)| *entry == self::entry(index, 256 * 1024)), "all can be read");
    let synced = *spool.durable().borrow();
    spool.trim(synced);
    spool.room().await.unwrap();
    for index in next..next + 10 {
        assert_eq!(spool.append(vec![entry(index, 256 * 1024)]).await.unwrap(), Appended::Taken);
    }
    durable(&spool, next + 9).await;
    let base = spool.extent().borrow().base;
    spool.close().await.unwrap();
    let (spool, opened) = Spool::open(&dir, &limits(16 << 20, 1 << 30), Digest::default()).await.unwrap();
    assert!(opened.cuts.is_empty() && opened.set_aside.is_none(), "{opened:?}");
    let kept = read_all(&spool, base.0, next + 9).await;
    assert!(kept.iter().map(|entry| entry.revision.revision.0).eq(base.0 + 1..next + 10), "after a restart");
    spool.close().await.unwrap();
}

/// Fills a disk until so many bytes are left.
fn fill(mount: &Path, left: u64) {
    let mut ballast = File::create(mount.join("ballast")).unwrap();
    while ballast.write_all(&[1; 4096]).is_ok() {}
    let bytes = ballast.metadata().unwrap().len();
    ballast.set_len(bytes - left).unwrap();
    ballast.sync_all().unwrap();
}

#[tokio::test]
async fn a_disk_with_little_room_takes_what_fits_and_is_not_asked_for_what_nobody_needs_any_more() {
    let disk = Disk::new(20 << 20);
    let dir = disk.mount.join("spool");
    let (spool, _) = Spool::open(&dir, &limits(16 << 20, 1 << 30), Digest::default()).await.unwrap();
    fill(&disk.mount, 200 << 10);
    // Two of them fit, and three that share a record do not.
    let entries: Vec<SpoolEntry> = (1..=4).map(|index| entry(index, 80 << 10)).collect();
    assert_eq!(spool.append(entries.clone()).await.unwrap(), Appended::Taken);
    tokio::time::timeout(PATIENCE, durable(&spool, 1)).await.expect("the first one fits");
    let mut extent = spool.extent();
    // The first one is synced at once because the disk is full.
    assert!(extent.borrow().disk_full && *spool.durable().borrow() < Revision(4));
    assert!(read_all(&spool, 0, 4).await == entries, "all can be read");
    spool.trim(Revision(4));
    let room =
        tokio::time::timeout(PATIENCE, extent.wait_for(|extent| !extent.disk_full && extent.base == Revision(4)));
    let held = room.await.expect("nothing is left to be written").unwrap().clone();
    assert_eq!(held.covered, Revision(4));
    assert_eq!(spool.append(vec![entry(5, 80 << 10)]).await.unwrap(), Appended::Taken);
    tokio::time::timeout(PATIENCE, durable(&spool, 5)).await.expect("it fits");
    spool.close().await.unwrap();
    let (spool, opened) = Spool::open(&dir, &limits(16 << 20, 1 << 30), Digest::default()).await.unwrap();
    assert!(opened.cuts.is_empty() && opened.set_aside.is_none(), "{opened:?}");
    assert!(read_all(&spool, 4, 5).await == [entry(5, 80 << 10)], "after a restart");
    spool.close().await.unwrap();
}

/// The process that writes: not a test of its own, it ends at once unless it was started by one.
#[test]
fn writer_of_the_power_cut_tests() {
    let Ok(task) = std::env::var(WRITE) else { return };
    let mut words = task.splitn(3, ' ');
    let (kind, bytes, dir) = (words.next().unwrap(), words.next().unwrap(), Path::new(words.next().unwrap()));
    let bytes: usize = bytes.parse().unwrap();
    match kind {
        "segment" => write_segments(dir, bytes),
        "spool" => tokio::runtime::Runtime::new().unwrap().block_on(write_spool(dir, bytes)),
        "journal" => tokio::runtime::Runtime::new().unwrap().block_on(write_journal(dir, bytes)),
        _ => tokio::runtime::Runtime::new().unwrap().block_on(write_dedupe(dir)),
    }
}

fn write_segments(dir: &Path, bytes: usize) {
    let mut log = open_log(dir).0;
    for index in 1.. {
        log.append(index, &payload(index, bytes)).unwrap();
        // Many small ones share a sync, and each file ends somewhere between two syncs.
        if index % (64 * 1024 / bytes as u64).clamp(1, 50) == 0 {
            log.sync().unwrap();
            println!("durable {index}");
        }
    }
}

async fn write_spool(dir: &Path, bytes: usize) {
    let (spool, _) = Spool::open(dir, &limits(2 << 20, 1 << 30), Digest::default()).await.unwrap();
    let mut durable = spool.durable();
    for index in 1.. {
        durable.wait_for(|durable| durable.0 + ahead_max(bytes) >= index).await.unwrap();
        assert_eq!(spool.append(vec![entry(index, bytes)]).await.unwrap(), Appended::Taken);
        println!("durable {}", *durable.borrow());
    }
}

async fn write_journal(dir: &Path, bytes: usize) {
    let (journal, _) = Journal::open(dir, &limits(2 << 20, 1 << 30)).await.unwrap();
    journal.reset(RUN, Seq(0)).await.unwrap();
    let mut durable = journal.durable();
    for seq in 1.. {
        durable.wait_for(|durable| durable.0 + ahead_max(bytes) >= seq).await.unwrap();
        assert_eq!(journal.append(vec![received(seq, bytes)]).await.unwrap(), Appended::Taken);
        println!("durable {}", *durable.borrow());
    }
}

/// What is not durable yet must not fill the disk.
fn ahead_max(bytes: usize) -> u64 {
    (2 * 1024 * 1024 / bytes as u64).max(3)
}

async fn write_dedupe(dir: &Path) {
    let (dedupe, _) = Dedupe::open(dir).await.unwrap();
    dedupe.note(Epoch(1), (1..=DEDUPE_NOTES).map(|seq| (Seq(seq), note(seq), Revision(seq))).collect()).unwrap();
    println!("durable {DEDUPE_NOTES}");
    // Whoever closes it syncs.
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

fn cut_twice(kind: &str, bytes: usize) {
    let disk = Disk::new(128 << 20);
    let dir = disk.mount.join(kind);
    let mut writer = Writer::start(&format!("{kind} {bytes} {}", dir.display()));
    for cut in 1..=2_u64 {
        let target = cut * (CUT_EVERY_BYTES / bytes).clamp(3, 5_000) as u64;
        let durable = writer.stop_after(target);
        let copy = disk.copy();
        let dir = copy.mount.join(kind);
        let what = format!("{kind}, {bytes} B, cut {cut}, {durable} durable");
        match kind {
            "segment" => check_segments(&dir, bytes, durable, &what),
            "spool" => tokio::runtime::Runtime::new().unwrap().block_on(check_spool(&dir, bytes, durable, &what)),
            _ => tokio::runtime::Runtime::new().unwrap().block_on(check_journal(&dir, bytes, durable, &what)),
        }
        // Not before: on a fast disk it would fill its own while the copy is looked at.
        writer.go_on();
    }
}

fn check_segments(dir: &Path, bytes: usize, durable: u64, what: &str) {
    let (mut log, seen) = open_log(dir);
    assert!(seen.keys().copied().eq(1..=seen.len() as u64) && seen.len() as u64 >= durable, "{what}: {}", seen.len());
    assert!(seen.iter().all(|(index, kept)| *kept == payload(*index, bytes)), "{what}: altered");
    log.append(seen.len() as u64 + 1, b"on").unwrap();
    log.sync().unwrap();
}

async fn check_spool(dir: &Path, bytes: usize, durable: u64, what: &str) {
    let (spool, opened) = Spool::open(dir, &limits(2 << 20, 1 << 30), Digest::default()).await.unwrap();
    assert_eq!(opened.set_aside, None, "{what}");
    let last = spool.extent().borrow().last.map_or(0, |(revision, _)| revision.0);
    assert!(last >= durable, "{what}: only {last} are there");
    let kept = read_all(&spool, 0, last).await;
    assert!(kept.iter().zip(1..).all(|(kept, index)| *kept == entry(index, bytes)), "{what}: altered");
    assert_eq!(kept.len() as u64, last, "{what}");
    assert_eq!(spool.append(vec![entry(last + 1, bytes)]).await.unwrap(), Appended::Taken);
    spool.close().await.unwrap();
}

async fn check_journal(dir: &Path, bytes: usize, durable: u64, what: &str) {
    let (journal, opened) = Journal::open(dir, &limits(2 << 20, 1 << 30)).await.unwrap();
    assert_eq!(opened.set_aside, None, "{what}");
    let extent = journal.extent().borrow().clone();
    assert_eq!((extent.epoch, extent.base), (EPOCH, Seq(0)), "{what}");
    let last = extent.end.0;
    assert!(last >= durable, "{what}: only {last} are there");
    let mut kept = Vec::new();
    while (kept.len() as u64) < last {
        kept.extend(journal.read_after(Seq(kept.len() as u64), 1 << 20).await.unwrap());
    }
    // Each one's bytes are its own: what is equal was written.
    assert!(kept.iter().zip(1..).all(|(kept, seq)| *kept == received(seq, bytes)), "{what}: altered");
    assert_eq!(kept.len() as u64, last, "{what}");
    assert_eq!(journal.append(vec![received(last + 1, bytes)]).await.unwrap(), Appended::Taken);
    journal.close().await.unwrap();
}

/// The last one, after a look whether they are as they were noted, and none is missing; 0 where a cut in the middle of a sync left a log that
/// begins anew.
async fn kept_notes(dir: &Path) -> u64 {
    let (dedupe, opened) = Dedupe::open(dir).await.unwrap();
    let last = opened.recent.last().map_or(0, |(_, seq, _)| seq.0);
    let first = last + 1 - opened.recent.len() as u64;
    assert!(opened.recent.iter().map(|(_, seq, _)| seq.0).eq(first..=last), "holes");
    assert!(opened.recent.iter().all(|(_, seq, kept)| *kept == note(seq.0)), "altered");
    dedupe.close().await.unwrap();
    last
}

fn open_log(dir: &Path) -> (SegmentLog, BTreeMap<u64, Vec<u8>>) {
    let limits = SegmentLimits { segment_bytes: 1 << 20, total_bytes_max: 1 << 30, record_bytes_max: 2 << 20 };
    let mut seen = BTreeMap::new();
    let opened = SegmentLog::open(dir, limits, OnDamage::Refuse, &mut |index, payload| {
        seen.insert(index, payload.to_vec());
    });
    (opened.unwrap().0, seen)
}

async fn durable(spool: &Spool, index: u64) {
    spool.durable().wait_for(|durable| durable.0 >= index).await.unwrap();
}

async fn read_all(spool: &Spool, after: u64, last: u64) -> Vec<SpoolEntry> {
    let (mut read, mut at) = (Vec::<SpoolEntry>::new(), after);
    while at < last {
        read.extend(spool.read_after(Revision(at), 1 << 20).await.unwrap());
        at = read.last().unwrap().revision.revision.0;
    }
    read
}

fn limits(queue_bytes_max: usize, files_bytes_max: u64) -> Limits {
    let (spool_bytes_max, journal_bytes_max) = (files_bytes_max, files_bytes_max);
    Limits { spool_bytes_max, journal_bytes_max, segment_bytes: 1 << 20, queue_bytes_max, ..Limits::default() }
}

/// Bytes that differ for each index and cannot be compressed.
fn payload(index: u64, bytes: usize) -> Vec<u8> {
    let mut state = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut payload = Vec::with_capacity(bytes + 8);
    while payload.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        payload.extend(state.to_le_bytes());
    }
    payload.truncate(bytes);
    payload
}

fn entry(index: u64, bytes: usize) -> SpoolEntry {
    let put = Change::Put { key: Bytes::from(format!("/key/{index}")), value: Bytes::from(payload(index, bytes)) };
    let revision = WholeRevision { revision: Revision(index), changes: vec![put] };
    let digest = digest::of_revision(&revision);
    SpoolEntry { revision: Arc::new(revision), digest, arrived_ms: 1_700_000_000_000 + index, came_from: Vec::new() }
}

/// Its revision is another number than its seq.
fn received(seq: u64, bytes: usize) -> JournalEntry {
    let SpoolEntry { revision, digest, .. } = entry(1_000 + 2 * seq, bytes);
    JournalEntry { epoch: EPOCH, seq: Seq(seq), revision, digest }
}

fn note(seq: u64) -> Digest {
    Digest(payload(seq, 16).try_into().unwrap())
}

/// The writing process.
struct Writer {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Writer {
    fn start(task: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["writer_of_the_power_cut_tests", "--nocapture"])
            .env(WRITE, task)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Lets it write until `target` is durable, then stops it wherever it is. Returns what it had said to be durable.
    fn stop_after(&mut self, target: u64) -> u64 {
        let durable = loop {
            let line = self.lines.next().expect("the writer ended").unwrap();
            let durable = line.split_once("durable ").and_then(|(_, index)| index.parse::<u64>().ok());
            if let Some(durable) = durable.filter(|durable| *durable >= target) {
                break durable;
            }
        };
        self.stop();
        durable
    }

    fn stop(&self) {
        self.signal("STOP");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.is_stopped() {
            assert!(Instant::now() < deadline, "the writer does not stop");
            std::thread::yield_now();
        }
    }

    fn go_on(&self) {
        self.signal("CONT");
    }

    fn signal(&self, signal: &str) {
        run("kill", &[&format!("-{signal}"), &self.child.id().to_string()]);
    }

    /// True once each of its threads is.
    fn is_stopped(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let stopped = |task: PathBuf| {
            let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
        };
        tasks.map(|task| task.unwrap().path()).all(stopped)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
