//! Job: the one thread of a feed that touches its files.
//! Input: what gathered in the feed's state. Output: synced files, and the state told so.
//! Synchronous; it ends when the feed is closed and everything is written, or when the disk failed.
//! Always true: `durable` moves after the sync; a full disk is tried again, any other disk error stops the feed for good.

use super::feed::{FeedEntry, FeedError, FeedLimits, Shared, State, decode, lock};
use super::{SegmentError, SegmentLog};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Plain bytes of entries that share a record: enough for LZ4 to find what repeats, little enough to decode for one entry.
const RECORD_PLAIN_BYTES: usize = 256 * 1024;
/// Entries that share a record.
const RECORD_ENTRIES_MAX: usize = 1024;
/// Entries gather so long between two syncs, unless there are many bytes of them: an etcd's disk may be this one, and each sync makes etcd's
/// own wait. Nothing live waits for it; what is `durable` is told so much later.
const SYNC_EVERY: Duration = Duration::from_millis(50);
/// How often a `covered` that is beyond the last record is written.
const COVER_EVERY: Duration = Duration::from_secs(10);
/// How often a full disk is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Writer<T: FeedEntry> {
    shared: Arc<Shared<T>>,
    log: SegmentLog,
    finish: Finish<T>,
    retry_at: Option<Instant>,
    cover_at: Instant,
    sync_at: Instant,
}

/// Says that the thread has ended, also if it panicked.
struct Finish<T: FeedEntry> {
    shared: Arc<Shared<T>>,
    finished: watch::Sender<bool>,
}

enum Job<T> {
    Reset(u64, u64),
    Trim(u64),
    Write(Vec<T>),
    Cover(u64),
    Close,
}

impl<T: FeedEntry> Writer<T> {
    pub(super) fn new(shared: Arc<Shared<T>>, log: SegmentLog, finished: watch::Sender<bool>) -> Self {
        let finish = Finish { shared: Arc::clone(&shared), finished };
        let now = Instant::now();
        Self { shared, log, finish, retry_at: None, cover_at: now + COVER_EVERY, sync_at: now }
    }

    pub(super) fn run(mut self) {
        loop {
            let (job, resets) = self.next_job();
            let done = match job {
                Job::Reset(tag, base) => self.reset(tag, base, resets),
                Job::Trim(through) => self.trim(through, resets),
                Job::Write(entries) => self.write(&entries, resets),
                Job::Cover(index) => self.cover(index, resets),
                Job::Close => break,
            };
            if !self.goes_on_after(done) {
                break;
            }
        }
        let Self { log, finish, .. } = self;
        drop(log); // the directory is free before anybody is told
        drop(finish);
    }

    /// Waits for work. Also says how many resets there were: what a job finds out before a reset is void after it.
    fn next_job(&self) -> (Job<T>, u64) {
        let mut state = lock(&self.shared.state);
        loop {
            let now = Instant::now();
            let retry_in = self.retry_at.and_then(|at| at.checked_duration_since(now)).filter(|wait| !wait.is_zero());
            let cover_in = self.cover_at.saturating_duration_since(now);
            let sync_in = self.sync_at.saturating_duration_since(now);
            let enough = state.closing || state.unwritten_bytes >= RECORD_PLAIN_BYTES || sync_in.is_zero();
            let uncovered = state.unwritten == 0 && state.reset.is_none() && state.held.covered > state.logged;
            if retry_in.is_none() {
                if let Some((tag, base)) = state.reset {
                    return (Job::Reset(tag, base), state.resets);
                }
                if state.trim_to > state.trimmed_to {
                    return (Job::Trim(state.trim_to), state.resets);
                }
                if state.unwritten > 0 && enough {
                    return (Job::Write(state.first_unwritten()), state.resets);
                }
                if uncovered && (state.closing || cover_in.is_zero()) {
                    return (Job::Cover(state.held.covered), state.resets);
                }
            }
            if state.closing {
                return (Job::Close, state.resets);
            }
            let gathers = (state.unwritten > 0).then_some(sync_in);
            state = match retry_in.or(gathers).or(uncovered.then_some(cover_in)) {
                Some(wait) => {
                    let waited = self.shared.wake_writer.wait_timeout(state, wait);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.shared.wake_writer.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn reset(&mut self, tag: u64, base: u64, resets: u64) -> Result<(), FeedError> {
        self.log.clear(tag, base)?;
        self.shared.forget_cursor();
        if let Some(mut state) = self.still(resets) {
            state.reset = None;
            state.refresh(&self.log);
            self.shared.publish(&mut state);
        }
        Ok(())
    }

    fn trim(&mut self, through: u64, resets: u64) -> Result<(), FeedError> {
        let moved = self.log.trim(through)?;
        let first = if moved { first_entry::<T>(&self.log, &self.shared.limits)? } else { None };
        if moved {
            // An open file that is unlinked still takes its place on the disk.
            self.shared.forget_cursor();
        }
        if let Some(mut state) = self.still(resets) {
            state.trimmed_to = through;
            if moved {
                state.refresh(&self.log);
                state.held.first = first.or_else(|| state.first_unwritten().first().map(T::index));
                self.shared.publish(&mut state);
            }
        }
        Ok(())
    }

    /// Writes all of `entries`, then syncs once. If the disk is full on the way, what was written before counts.
    fn write(&mut self, entries: &[T], resets: u64) -> Result<(), FeedError> {
        let mut written = 0;
        let mut appended = Ok(());
        while written < entries.len() && appended.is_ok() {
            let run = &entries[written..written + run_length(&entries[written..])];
            appended = self.log.append(run[run.len() - 1].index(), &T::encode(run));
            written += if appended.is_ok() { run.len() } else { 0 };
        }
        self.log.sync()?;
        self.sync_at = Instant::now() + SYNC_EVERY;
        if let Some(mut state) = self.still(resets) {
            state.advance(&entries[..written], &self.log, &self.shared.limits);
            state.held.disk_full = false;
            self.shared.publish_durable(&mut state);
        }
        self.cover_at = Instant::now() + COVER_EVERY;
        Ok(appended?)
    }

    fn cover(&mut self, index: u64, resets: u64) -> Result<(), FeedError> {
        self.log.append(index, &[])?;
        self.cover_at = Instant::now() + COVER_EVERY;
        if let Some(mut state) = self.still(resets) {
            state.refresh(&self.log);
        }
        Ok(())
    }

    /// The state, unless it was reset since the job was taken.
    fn still(&self, resets: u64) -> Option<MutexGuard<'_, State<T>>> {
        let state = lock(&self.shared.state);
        (state.resets == resets).then_some(state)
    }

    fn goes_on_after(&mut self, done: Result<(), FeedError>) -> bool {
        self.retry_at = None;
        let mut state = lock(&self.shared.state);
        let Err(error) = done else {
            if state.held.disk_full && state.unwritten == 0 {
                state.held.disk_full = false;
                self.shared.publish(&mut state);
            }
            return true;
        };
        let disk_full = matches!(&error, FeedError::Segment(error) if SegmentError::is_disk_full(error));
        if disk_full && self.log.usable().is_ok() {
            self.retry_at = Some(Instant::now() + RETRY_EVERY);
            state.held.disk_full = true;
        } else {
            state.failed = Some(error.to_string().into());
        }
        self.shared.publish(&mut state);
        state.failed.is_none()
    }
}

impl<T: FeedEntry> Drop for Finish<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        if std::thread::panicking() {
            state.failed = Some("the writing thread panicked".into());
        }
        state.closing = true;
        self.shared.publish(&mut state);
        self.finished.send_replace(true);
    }
}

/// How many of the entries share the next record.
fn run_length<T: FeedEntry>(entries: &[T]) -> usize {
    let mut bytes = 0;
    let fits = |entry: &&T| {
        bytes += entry.bytes();
        bytes <= RECORD_PLAIN_BYTES
    };
    entries.iter().take(RECORD_ENTRIES_MAX).take_while(fits).count().max(1)
}

/// The index of the first entry that the files hold.
pub(super) fn first_entry<T: FeedEntry>(log: &SegmentLog, limits: &FeedLimits) -> Result<Option<u64>, FeedError> {
    let (mut reader, mut record) = (log.read_after(log.base()), Vec::new());
    while let Some(index) = reader.next(log.last_index(), &mut record)? {
        if !record.is_empty() {
            return Ok(decode::<T>(index, &record, limits)?.first().map(T::index));
        }
    }
    Ok(None)
}
