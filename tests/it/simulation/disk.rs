//! Job: a spool or a journal over the product's segment files, written and synced step by step, with crashes in between.
//! Input: entries, trims, resets, crashes. Output: entries from any place, as a feed gives them.
//! Synchronous, in a folder of its own.
//! Always true: after a crash there is what was synced, and of what was only written any part, torn at any byte.

use super::random::Random;
use etcd_ferry::segment::feed::FeedEntry;
use etcd_ferry::segment::{OnDamage, SegmentLimits, SegmentLog};
use std::collections::VecDeque;
use std::fs;
use std::path::PathBuf;

/// segment/file.rs: the header of a file, and what stands before each payload.
const HEADER_BYTES: u64 = 48;
const RECORD_HEADER_BYTES: u64 = 16;
const PLAIN_BYTES_MAX: usize = 1 << 20;

pub struct Disk<T: FeedEntry> {
    dir: PathBuf,
    limits: SegmentLimits,
    /// `None` only while it is opened again.
    log: Option<SegmentLog>,
    /// Entries after `recent_after`; the last `unwritten` of them are in no file yet.
    recent: VecDeque<T>,
    recent_after: u64,
    unwritten: usize,
    pub tag: u64,
    pub covered: u64,
    pub last: Option<T::Tail>,
    pub durable: u64,
    /// The file that is written to: its number, where its records end, and up to where they are synced.
    active: u64,
    written: u64,
    synced: u64,
}

impl<T: FeedEntry> Disk<T> {
    pub fn open(dir: PathBuf, total_bytes_max: u64) -> Self {
        let limits = SegmentLimits { segment_bytes: 2048, total_bytes_max, record_bytes_max: 1 << 20 };
        let mut disk = Self {
            dir,
            limits,
            log: None,
            recent: VecDeque::new(),
            recent_after: 0,
            unwritten: 0,
            tag: 0,
            covered: 0,
            last: None,
            durable: 0,
            active: 0,
            written: 0,
            synced: 0,
        };
        disk.open_log();
        disk
    }

    fn open_log(&mut self) {
        let (mut last_record, mut last_index) = (Vec::new(), 0);
        let mut visit = |index: u64, record: &[u8]| {
            if !record.is_empty() {
                (last_record, last_index) = (record.to_vec(), index);
            }
        };
        let opened = SegmentLog::open(&self.dir, self.limits, OnDamage::SetAside, &mut visit);
        let (log, _) = opened.expect("a log that a crash left can be opened");
        self.last = if last_index == 0 { None } else { decode::<T>(&last_record).last().map(T::tail) };
        self.tag = log.tag();
        self.covered = log.last_index();
        (self.recent_after, self.durable) = (self.covered, self.covered);
        self.recent.clear();
        self.unwritten = 0;
        self.log = Some(log);
        self.find_active();
    }

    fn log(&mut self) -> &mut SegmentLog {
        self.log.as_mut().expect("it is open")
    }

    pub fn base(&self) -> u64 {
        self.log.as_ref().map_or(0, SegmentLog::base)
    }

    pub fn bytes(&self) -> u64 {
        let unwritten = self.recent.iter().skip(self.recent.len() - self.unwritten).map(T::bytes).sum::<usize>();
        self.log.as_ref().map_or(0, SegmentLog::bytes) + unwritten as u64
    }

    pub fn is_full(&self) -> bool {
        self.bytes() >= self.limits.total_bytes_max
    }

    /// False: they do not follow what is held.
    pub fn append(&mut self, entries: Vec<T>) -> bool {
        for entry in &entries {
            if entry.index() <= self.covered || (T::DENSE && entry.index() != self.covered + 1) {
                return false;
            }
            self.covered = entry.index();
            self.last = Some(entry.tail());
        }
        self.unwritten += entries.len();
        self.recent.extend(entries);
        true
    }

    pub fn cover(&mut self, index: u64) {
        self.covered = self.covered.max(index);
    }

    /// Writes some of what waits as one record, or where nothing waits and something is covered, that.
    pub fn write(&mut self, random: &mut Random) {
        if self.unwritten == 0 {
            let covered = self.covered;
            if covered > self.log().last_index() {
                self.append_record(covered, &[]);
            }
            return;
        }
        let count = random.between(1, self.unwritten);
        let start = self.recent.len() - self.unwritten;
        let run: Vec<T> = self.recent.range(start..start + count).cloned().collect();
        self.append_record(run[count - 1].index(), &T::encode(&run));
        self.unwritten -= count;
    }

    fn append_record(&mut self, index: u64, payload: &[u8]) {
        self.log().append(index, payload).expect("the disk takes it");
        let record = RECORD_HEADER_BYTES + payload.len() as u64;
        self.written += record;
        if self.path(self.active + 1).exists() {
            self.active += 1;
            (self.written, self.synced) = (HEADER_BYTES + record, HEADER_BYTES);
        }
    }

    /// What is synced is durable, and may be forgotten in memory.
    pub fn sync(&mut self) {
        self.log().sync().expect("the disk syncs");
        self.synced = self.written;
        self.durable = self.durable.max(self.log().last_index().min(self.covered));
        while self.recent.len() > self.unwritten {
            self.recent_after = self.recent.pop_front().map_or(self.recent_after, |entry| entry.index());
        }
    }

    pub fn trim(&mut self, index: u64) {
        let (index, before) = (index.min(self.covered), self.base());
        self.log().trim(index).expect("the disk trims");
        assert!(self.base() <= before.max(index), "trimmed up to {index}, and gone is all up to {}", self.base());
        self.find_active_if_moved();
    }

    pub fn reset(&mut self, tag: u64, base: u64) {
        self.log().clear(tag, base).expect("the disk clears");
        self.recent.clear();
        (self.recent_after, self.unwritten, self.durable, self.covered) = (base, 0, base, base);
        (self.tag, self.last) = (tag, None);
        self.find_active();
    }

    /// Entries after `index`: as many as `bytes_max` takes, at least one. `None`: they are not held any more, or not yet known.
    pub fn read_after(&mut self, index: u64, bytes_max: usize) -> Option<Vec<T>> {
        if index < self.base() || index > self.covered {
            return None;
        }
        let mut found = Vec::new();
        let mut bytes = 0;
        if index < self.recent_after {
            let through = self.recent_after.min(self.log().last_index());
            let (mut reader, mut record) = (self.log().read_after(index), Vec::new());
            while let Some(_at) = reader.next(through, &mut record).expect("files hold what was written") {
                let entries = if record.is_empty() { Vec::new() } else { decode::<T>(&record) };
                found.extend(entries.into_iter().filter(|entry| entry.index() > index));
            }
        }
        found.extend(self.recent.iter().filter(|entry| entry.index() > index.max(self.recent_after)).cloned());
        let fits = |entry: &T| {
            bytes += entry.bytes();
            bytes <= bytes_max
        };
        let count = found.iter().map(fits).take_while(|fits| *fits).count().max(1);
        found.truncate(count);
        Some(found)
    }

    /// The process dies. `kept_by_kernel`: not the machine, so that what was written is there.
    pub fn crash(&mut self, kept_by_kernel: bool, random: &mut Random) {
        self.log = None;
        let path = self.path(self.active);
        let mut bytes = fs::read(&path).expect("the file is there");
        let (synced, written) = (self.synced, self.written.min(bytes.len() as u64));
        if !kept_by_kernel && synced < written {
            let kept = synced + random.next() % (written - synced + 1);
            let area = usize::try_from(kept).unwrap_or(0)..usize::try_from(written).unwrap_or(0);
            let garbled = random.percent(20);
            for byte in &mut bytes[area] {
                *byte = if garbled { random.next().to_le_bytes()[0] } else { 0 };
            }
            fs::write(&path, &bytes).expect("the file can be torn");
        }
        self.open_log();
    }

    /// The disk is new: nothing is left.
    pub fn lose(&mut self) {
        self.log = None;
        fs::remove_dir_all(&self.dir).expect("the folder goes");
        self.open_log();
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:020}.segment"))
    }

    fn find_active_if_moved(&mut self) {
        if self.path(self.active + 1).exists() {
            self.find_active();
        }
    }

    /// After an open, a clear, or a trim that began a new file: all that stands in the last file is synced.
    fn find_active(&mut self) {
        let numbers = fs::read_dir(&self.dir).expect("the folder is there").filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.strip_suffix(".segment")?.parse::<u64>().ok()
        });
        self.active = numbers.max().unwrap_or(1);
        let bytes = fs::read(self.path(self.active)).expect("the file is there");
        self.written = records_end(&bytes);
        self.synced = self.written;
    }
}

/// Where the records of a file end: after them there are zeros, and no record has the index 0.
fn records_end(file: &[u8]) -> u64 {
    let mut end = HEADER_BYTES;
    loop {
        let at = usize::try_from(end).unwrap_or(usize::MAX);
        let Some(head) = file.get(at..at + 16) else { return end };
        let length = u32::from_le_bytes(head[..4].try_into().expect("four bytes"));
        if head[8..] == [0; 8] {
            return end;
        }
        end += RECORD_HEADER_BYTES + u64::from(length);
    }
}

fn decode<T: FeedEntry>(record: &[u8]) -> Vec<T> {
    T::decode(record, PLAIN_BYTES_MAX).expect("a record that was given out can be decoded")
}
