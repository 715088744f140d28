//! Job: what a feed knows, behind its lock: the ring of recent entries, how far everything is, what the writer is asked for.
//! Input: entries, what the writer did. Output: entries, refusals, what is held.
//! No I/O and no waiting: the lock is held for moves of pointers and numbers only.
//! Always true: the ring holds the entries after `ring_after` without a gap, and those that are not written yet stand at its end.

use super::{FeedEntry, FeedError, FeedLimits, Held};
use crate::segment::SegmentLog;
use crate::segment::writer::RECORD_PLAIN_BYTES;
use std::collections::VecDeque;
use std::sync::Arc;

pub(in crate::segment) struct State<T: FeedEntry> {
    /// The entries after `ring_after`, without a gap. Those that are not written yet stand at its end.
    pub(super) ring: VecDeque<T>,
    pub(super) ring_bytes: usize,
    pub(super) ring_after: u64,
    pub(in crate::segment) unwritten: usize,
    pub(in crate::segment) unwritten_bytes: usize,
    pub(in crate::segment) held: Held<T::Tail>,
    /// The last entry's index, or the base.
    pub(super) last: u64,
    pub(super) file_bytes: u64,
    /// The last index that a sync has covered.
    pub(in crate::segment) durable: u64,
    /// The last record's index.
    pub(in crate::segment) logged: u64,
    pub(in crate::segment) trim_to: u64,
    pub(in crate::segment) trimmed_to: u64,
    /// See [`SegmentLog::trims_from`].
    trims_from: Option<u64>,
    /// The tag and base of a reset that the writer has not done yet.
    pub(in crate::segment) reset: Option<(u64, u64)>,
    /// How many resets were asked for.
    pub(in crate::segment) resets: u64,
    pub(super) refused_bytes: u64,
    pub(in crate::segment) failed: Option<Arc<str>>,
    pub(in crate::segment) closing: bool,
}

impl<T: FeedEntry> State<T> {
    pub(super) fn new(log: &SegmentLog, last: Option<T>) -> Self {
        let (base, covered) = (log.base(), log.last_index());
        let held = Held {
            tag: log.tag(),
            base,
            covered,
            last: last.as_ref().map(T::tail),
            bytes: log.bytes(),
            full: false,
            disk_full: false,
            damaged: false,
        };
        Self {
            ring: VecDeque::new(),
            ring_bytes: 0,
            ring_after: covered,
            unwritten: 0,
            unwritten_bytes: 0,
            held,
            last: last.as_ref().map_or(base, T::index),
            file_bytes: log.bytes(),
            durable: covered,
            logged: covered,
            trim_to: base,
            trimmed_to: base,
            trims_from: log.trims_from(),
            reset: None,
            resets: 0,
            refused_bytes: 0,
            failed: None,
            closing: false,
        }
    }

    pub(in crate::segment) fn usable(&self) -> Result<(), FeedError> {
        match &self.failed {
            Some(reason) => Err(FeedError::Failed { reason: Arc::clone(reason) }),
            None if self.closing => Err(FeedError::Closed),
            None => Ok(()),
        }
    }

    pub(super) fn check_readable(&self, index: u64, after: u64, resets: u64) -> Result<(), FeedError> {
        self.usable()?;
        if self.resets != resets {
            return Err(FeedError::Reset);
        }
        if after < self.held.base {
            return Err(FeedError::BeforeBase { index, base: self.held.base });
        }
        if index > self.held.covered {
            return Err(FeedError::BeyondEnd { index, end: self.held.covered });
        }
        Ok(())
    }

    pub(super) fn check_order(&self, entries: &[T]) -> Result<(), FeedError> {
        let mut end = self.held.covered;
        for index in entries.iter().map(T::index) {
            if index <= end || (T::DENSE && index != end + 1) {
                return Err(FeedError::OutOfOrder { index, end });
            }
            end = index;
        }
        Ok(())
    }

    /// True if the writer must be woken: it waits for nothing, or for no more than there is now. While entries gather it looks by itself,
    /// and a wake for each of them would be for nothing.
    pub(super) fn take(&mut self, entries: Vec<T>, bytes: usize, queue_bytes_max: usize) -> bool {
        let (gathering, before) = (self.unwritten > 0, self.unwritten_bytes);
        if let Some(last) = entries.last() {
            self.last = last.index();
            self.held.covered = last.index();
            self.held.last = Some(last.tail());
        }
        self.ring_bytes += bytes;
        self.unwritten_bytes += bytes;
        self.unwritten += entries.len();
        self.ring.extend(entries);
        self.drop_surplus(queue_bytes_max);
        !gathering || (before < RECORD_PLAIN_BYTES && self.unwritten_bytes >= RECORD_PLAIN_BYTES)
    }

    /// Everything up to `index` may go. True if the writer must be woken: a file goes. What lets more files go later is the writer's own
    /// doing, and it looks after each.
    pub(in crate::segment) fn let_go(&mut self, index: u64) -> bool {
        self.trim_to = self.trim_to.max(index.min(self.held.covered));
        self.drop_trimmed();
        self.trim_to > self.trimmed_to && self.trims_from.is_some_and(|from| from <= self.trim_to)
    }

    pub(super) fn recent(&self, after: u64, bytes_max: usize) -> Vec<T> {
        let from = self.ring.partition_point(|entry| entry.index() <= after);
        let (mut found, mut bytes) = (Vec::new(), 0);
        for entry in self.ring.range(from..) {
            bytes += entry.bytes();
            if !found.is_empty() && bytes > bytes_max {
                break;
            }
            found.push(entry.clone());
        }
        found
    }

    pub(super) fn start_anew(&mut self, tag: u64, base: u64) {
        self.ring.clear();
        (self.ring_bytes, self.ring_after, self.unwritten, self.unwritten_bytes) = (0, base, 0, 0);
        self.held = Held { tag, base, covered: base, last: None, damaged: false, ..self.held.clone() };
        (self.last, self.durable, self.logged, self.trim_to, self.trimmed_to) = (base, base, base, base, base);
        (self.file_bytes, self.trims_from) = (0, None);
        self.reset = Some((tag, base));
        self.resets += 1;
    }

    /// True if all entries are trimmed: then even a batch larger than the limit is taken, or it could never be.
    fn is_all_trimmed(&self) -> bool {
        self.unwritten == 0 && self.trim_to >= self.last
    }

    pub(super) fn is_full_for(&self, bytes: u64, limits: &FeedLimits) -> bool {
        let used = self.file_bytes + self.unwritten_bytes as u64;
        self.held.disk_full || (!self.is_all_trimmed() && used + bytes > limits.segment.total_bytes_max)
    }

    pub(super) fn has_room(&self, limits: &FeedLimits) -> bool {
        let used = self.file_bytes + self.unwritten_bytes as u64;
        let enough = used <= limits.segment.total_bytes_max / 10 * 9;
        !self.is_full_for(self.refused_bytes, limits) && (enough || self.is_all_trimmed())
    }

    pub(in crate::segment) fn first_unwritten(&self) -> Vec<T> {
        self.ring.range(self.ring.len() - self.unwritten..).cloned().collect()
    }

    /// The first `written` of the unwritten entries are in the files.
    pub(in crate::segment) fn advance(&mut self, written: &[T], log: &SegmentLog, limits: &FeedLimits) {
        self.unwritten -= written.len();
        self.unwritten_bytes -= written.iter().map(T::bytes).sum::<usize>();
        self.refresh(log);
        self.drop_surplus(limits.queue_bytes_max);
        self.drop_trimmed();
    }

    /// The files go on after `through`, which is trimmed; what comes before it is not written any more.
    pub(in crate::segment) fn skip(&mut self, through: u64, log: &SegmentLog) {
        while let Some(entry) = self.ring.front().filter(|entry| entry.index() <= through) {
            if self.ring.len() == self.unwritten {
                self.unwritten_bytes -= entry.bytes();
                self.unwritten -= 1;
            }
            self.drop_oldest();
        }
        self.refresh(log);
    }

    pub(in crate::segment) fn refresh(&mut self, log: &SegmentLog) {
        (self.held.base, self.file_bytes, self.logged) = (log.base(), log.bytes(), log.last_index());
        self.trims_from = log.trims_from();
    }

    fn drop_surplus(&mut self, queue_bytes_max: usize) {
        while self.ring_bytes > queue_bytes_max && self.ring.len() > self.unwritten {
            self.drop_oldest();
        }
    }

    pub(super) fn drop_trimmed(&mut self) {
        while self.ring.len() > self.unwritten && self.ring.front().is_some_and(|e| e.index() <= self.trim_to) {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(entry) = self.ring.pop_front() {
            self.ring_bytes -= entry.bytes();
            self.ring_after = entry.index();
        }
    }
}
