//! Job: memory first, then files: the bounded, durable queue under the spool and the journal.
//! Input: entries with growing indexes. Output: the same entries, to readers at any place, at once from memory or later from files.
//! Always true: readers never wait for the disk to see a new entry; `durable` names only synced entries; memory holds at most
//! `queue_bytes_max` and one batch; nothing between `base` and the end is ever missing.
//!
//! One `Mutex` guards the ring of recent entries and a few numbers, and is held for pointer moves only. One thread (`writer.rs`) writes:
//! it takes what has gathered, writes it, and syncs once for all that is not trimmed soon after. It is woken for what it could not know of,
//! not for each entry. Stages wait on the `extent` watch, which changes with every event. Entries that gather share records of up to 256 KiB.

mod state;

use super::writer::Writer;
use super::{OnDamage, Opened, SegmentError, SegmentLimits, SegmentLog, SegmentReader};
use crate::config::Limits;
use bytes::Bytes;
pub(super) use state::State;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Entries gather so long between two writes, unless there are many bytes of them.
const WRITE_EVERY: Duration = Duration::from_millis(50);
/// How long [`Feed::close`] waits for the disk.
const CLOSE_MAX: Duration = Duration::from_secs(4);

/// What a feed carries. Cheap to clone: its bulk is shared.
pub trait FeedEntry: Clone + Send + Sync + 'static {
    /// The index, typed.
    type Index: Copy + Send + Sync + 'static;
    /// What is kept of the last entry.
    type Tail: Clone + Send + Sync + 'static;
    /// [`Held`], typed.
    type Extent: Clone + Send + Sync + 'static;
    /// True if no index may be left out.
    const DENSE: bool;

    fn index(&self) -> u64;
    /// What it costs in memory; at least what it costs in a file.
    fn bytes(&self) -> usize;
    fn tail(&self) -> Self::Tail;
    fn typed(index: u64) -> Self::Index;
    fn extent(held: &Held<Self::Tail>) -> Self::Extent;
    /// One record from consecutive entries. Never empty: an empty record says that nothing came up to its index.
    fn encode(run: &[Self]) -> Bytes;
    fn decode(record: &[u8], plain_bytes_max: usize) -> Result<Vec<Self>, String>;
}

#[derive(Debug, Clone, Copy)]
pub struct FeedLimits {
    pub segment: SegmentLimits,
    /// Of recent entries in memory; and what may wait for the disk.
    pub queue_bytes_max: usize,
    /// Of one record, decoded.
    pub plain_bytes_max: usize,
    /// Entries gather so long between two writes, unless there are many bytes of them.
    pub write_every: Duration,
    /// What is not trimmed so long after it was written is synced. An etcd's disk may be this one, and each sync makes etcd's own wait.
    pub sync_after: Duration,
}

impl FeedLimits {
    /// For a feed of whole revisions whose files may take `total_bytes_max`.
    pub fn new(limits: &Limits, total_bytes_max: u64, sync_after: Duration) -> Self {
        let segment = SegmentLimits {
            // Files go as a whole: with eight of them or more, what is trimmed and still there is little.
            segment_bytes: limits.segment_bytes.min(total_bytes_max / 8),
            total_bytes_max,
            record_bytes_max: 2 * Limits::REVISION_BYTES_CEILING + (1 << 20),
        };
        // The configured limit is for what arrives: what was taken under a larger one is carried all the same.
        let plain_bytes_max = Limits::REVISION_BYTES_CEILING;
        let queue_bytes_max = limits.queue_bytes_max;
        Self { segment, queue_bytes_max, plain_bytes_max, write_every: WRITE_EVERY, sync_after }
    }
}

/// What a feed holds.
#[derive(Debug, Clone)]
pub struct Held<L> {
    /// As given to [`Feed::reset`].
    pub tag: u64,
    /// Every entry after it, up to `covered`, is held.
    pub base: u64,
    /// The last entry's index, or further, see [`Feed::cover`].
    pub covered: u64,
    /// The last entry since the last reset, even if it is trimmed; after a restart only if the files still hold it.
    pub last: Option<L>,
    /// Files, and plain what is on the way to them.
    pub bytes: u64,
    /// An append was refused, and there is no room yet.
    pub full: bool,
    /// The disk refuses to take more; tried again each second.
    pub disk_full: bool,
    /// A read found something in the files that cannot be had any more. Only [`Feed::reset`] ends it.
    pub damaged: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error("nothing before {base} is held, and what follows {index} was asked for")]
    BeforeBase { index: u64, base: u64 },
    #[error("what follows {index} was asked for, and only what comes up to {end} is known")]
    BeyondEnd { index: u64, end: u64 },
    #[error("entry {index} does not follow {end}")]
    OutOfOrder { index: u64, end: u64 },
    #[error("it was reset meanwhile")]
    Reset,
    #[error("record {index} cannot be decoded: {reason}")]
    Undecodable { index: u64, reason: String },
    #[error("an earlier disk error stopped it: {reason}; mend the disk, then restart its sidecar")]
    Failed { reason: Arc<str> },
    #[error("it is closed")]
    Closed,
    #[error("the disk did not take the last entries in time")]
    CloseTooSlow,
}

impl FeedError {
    /// True if what was asked for is held, and cannot be had any more.
    pub fn is_damage(&self) -> bool {
        match self {
            FeedError::Segment(error) => error.is_damage(),
            FeedError::Undecodable { .. } => true,
            FeedError::BeforeBase { .. }
            | FeedError::BeyondEnd { .. }
            | FeedError::OutOfOrder { .. }
            | FeedError::Reset
            | FeedError::Failed { .. }
            | FeedError::Closed
            | FeedError::CloseTooSlow => false,
        }
    }
}

/// What became of a batch.
#[derive(Debug, PartialEq, Eq)]
pub enum Appended<T> {
    Taken,
    /// The files are at their limit, or the disk is full: nothing of the batch was taken. Wait for [`Feed::room`].
    Full(Vec<T>),
}

/// The queue. Dropping it closes it in the background.
pub struct Feed<T: FeedEntry> {
    shared: Arc<Shared<T>>,
    finished: watch::Receiver<bool>,
}

pub(super) struct Shared<T: FeedEntry> {
    pub(super) limits: FeedLimits,
    pub(super) state: Mutex<State<T>>,
    pub(super) wake_writer: Condvar,
    extent: watch::Sender<T::Extent>,
    durable: watch::Sender<T::Index>,
    dir: PathBuf,
    /// Where the last read from files stopped.
    cursor: Mutex<Option<Cursor<T>>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: FeedEntry> Feed<T> {
    /// Opens the files in `dir` and starts the writer. Damaged parts are cut or set aside. `visit` is shown each record that has
    /// entries. Reads all files: not for an async thread.
    pub fn open(
        dir: &Path,
        limits: FeedLimits,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(Self, Opened), FeedError> {
        let (mut last_index, mut last_record) = (0, Vec::new());
        let (log, opened) = SegmentLog::open(dir, limits.segment, OnDamage::SetAside, &mut |index, record| {
            if !record.is_empty() {
                last_index = index;
                last_record.clear();
                last_record.extend_from_slice(record);
                visit(index, record);
            }
        })?;
        let last = if last_record.is_empty() { None } else { decode(last_index, &last_record, &limits)?.pop() };
        let shared = Shared::new(dir.to_owned(), limits, &log, last);
        Ok((start(shared, log)?, opened))
    }

    /// Adds entries, all of them or none. They can be read at once and are written beside that; `durable` tells when they are.
    /// Waits while what is not written yet fills the memory's limit. Cancel-safe: a cancelled call has added nothing.
    pub async fn append(&self, entries: Vec<T>) -> Result<Appended<T>, FeedError> {
        if entries.is_empty() {
            return Ok(Appended::Taken);
        }
        let bytes: usize = entries.iter().map(T::bytes).sum();
        let mut changed = self.shared.extent.subscribe();
        loop {
            {
                let mut state = lock(&self.shared.state);
                state.usable()?;
                state.check_order(&entries)?;
                if state.is_full_for(bytes as u64, &self.shared.limits) {
                    state.held.full = true;
                    state.refused_bytes = bytes as u64;
                    self.shared.publish(&mut state);
                    return Ok(Appended::Full(entries));
                }
                if state.unwritten == 0 || state.unwritten_bytes + bytes <= self.shared.limits.queue_bytes_max {
                    let wakes = state.take(entries, bytes, self.shared.limits.queue_bytes_max);
                    self.shared.publish(&mut state);
                    if wakes {
                        self.shared.wake_writer.notify_one();
                    }
                    return Ok(Appended::Taken);
                }
            }
            changed.changed().await.map_err(|_| FeedError::Closed)?;
        }
    }

    /// The entries after `index`, in order: as many as `bytes_max` takes, but at least one, for which it waits. What stands before
    /// damage is given out before the damage is told of. Cancel-safe.
    pub async fn read_after(&self, index: u64, bytes_max: usize) -> Result<Vec<T>, FeedError> {
        let mut changed = self.shared.extent.subscribe();
        let resets = lock(&self.shared.state).resets;
        let mut after = index;
        loop {
            let from_files = {
                let state = lock(&self.shared.state);
                state.check_readable(index, after, resets)?;
                if after >= state.ring_after {
                    let found = state.recent(after, bytes_max);
                    if !found.is_empty() {
                        return Ok(found);
                    }
                }
                (after < state.ring_after).then_some(state.logged)
            };
            let Some(through) = from_files else {
                changed.changed().await.map_err(|_| FeedError::Closed)?;
                continue;
            };
            let shared = Arc::clone(&self.shared);
            let reading = tokio::task::spawn_blocking(move || shared.read_files(after, through, bytes_max, resets));
            let found = match reading.await.map_err(|_| FeedError::Closed)? {
                // What was read before a reset is not what the feed holds now, though its indexes may be.
                Ok(_) if lock(&self.shared.state).resets != resets => return Err(FeedError::Reset),
                Ok(found) => found,
                Err(error) => {
                    let mut state = lock(&self.shared.state);
                    state.check_readable(index, after, resets)?;
                    // Of what may go a file may go while it is read.
                    let needed = after >= state.trim_to;
                    if error.is_damage() && needed && !state.held.damaged {
                        state.held.damaged = true;
                        self.shared.publish(&mut state);
                    }
                    return Err(error);
                }
            };
            if !found.is_empty() {
                return Ok(found);
            }
            after = through;
        }
    }

    /// Allows everything up to `index` to go. Files go as a whole, so `base` follows in steps.
    pub fn trim(&self, index: u64) {
        let mut state = lock(&self.shared.state);
        let wakes = state.let_go(index);
        if state.held.full {
            self.shared.publish(&mut state);
        }
        if wakes {
            self.shared.wake_writer.notify_one();
        }
    }

    /// Says that everything up to `index` is in here, though the last entry comes before it. Remembered at once; on disk within
    /// 10 s, without a sync of its own.
    pub fn cover(&self, index: u64) {
        let mut state = lock(&self.shared.state);
        if index > state.held.covered {
            let first = state.held.covered <= state.logged;
            state.held.covered = index;
            self.shared.publish(&mut state);
            if first {
                self.shared.wake_writer.notify_one();
            }
        }
    }

    /// Drops everything and goes on after `base`. Readers that wait get [`FeedError::Reset`]. When it returns the disk knows too;
    /// a cancelled call is still carried out.
    pub async fn reset(&self, tag: u64, base: u64) -> Result<(), FeedError> {
        let mut changed = self.shared.extent.subscribe();
        let resets = {
            let mut state = lock(&self.shared.state);
            state.usable()?;
            state.start_anew(tag, base);
            self.shared.publish_durable(&mut state);
            self.shared.wake_writer.notify_one();
            state.resets
        };
        loop {
            {
                let state = lock(&self.shared.state);
                state.usable()?;
                if state.reset.is_none() || state.resets != resets {
                    return Ok(());
                }
            }
            changed.changed().await.map_err(|_| FeedError::Closed)?;
        }
    }

    /// Waits until trimming has made room: for the batch that was refused, and a tenth of the limit.
    pub async fn room(&self) -> Result<(), FeedError> {
        let mut changed = self.shared.extent.subscribe();
        loop {
            {
                let state = lock(&self.shared.state);
                state.usable()?;
                if !state.held.full {
                    return Ok(());
                }
            }
            changed.changed().await.map_err(|_| FeedError::Closed)?;
        }
    }

    /// An error once the disk has failed for good, or the feed was closed.
    pub fn usable(&self) -> Result<(), FeedError> {
        lock(&self.shared.state).usable()
    }

    pub fn extent(&self) -> watch::Receiver<T::Extent> {
        self.shared.extent.subscribe()
    }

    /// Everything up to it survives a power cut.
    pub fn durable(&self) -> watch::Receiver<T::Index> {
        self.shared.durable.subscribe()
    }

    /// Writes and syncs what is left, and gives the directory free. Waits at most 4 s.
    pub async fn close(&self) -> Result<(), FeedError> {
        self.shared.ask_to_close();
        let mut finished = self.finished.clone();
        let waited = tokio::time::timeout(CLOSE_MAX, finished.wait_for(|finished| *finished)).await;
        match (waited, &lock(&self.shared.state).failed) {
            (Err(_), _) => Err(FeedError::CloseTooSlow),
            (Ok(_), Some(reason)) => Err(FeedError::Failed { reason: Arc::clone(reason) }),
            (Ok(_), None) => Ok(()),
        }
    }
}

impl<T: FeedEntry> Drop for Feed<T> {
    fn drop(&mut self) {
        self.shared.ask_to_close();
    }
}

fn start<T: FeedEntry>(shared: Shared<T>, log: SegmentLog) -> Result<Feed<T>, FeedError> {
    let shared = Arc::new(shared);
    let (finish, finished) = watch::channel(false);
    let writer = Writer::new(Arc::clone(&shared), log, finish);
    let started = std::thread::Builder::new().name("feed-writer".to_owned()).spawn(move || writer.run());
    let failed = |source| SegmentError::Io { what: "starting the writer of", path: shared.dir.clone(), source };
    started.map_err(failed)?;
    Ok(Feed { shared, finished })
}

fn decode<T: FeedEntry>(index: u64, record: &[u8], limits: &FeedLimits) -> Result<Vec<T>, FeedError> {
    T::decode(record, limits.plain_bytes_max).map_err(|reason| FeedError::Undecodable { index, reason })
}

impl<T: FeedEntry> Shared<T> {
    fn new(dir: PathBuf, limits: FeedLimits, log: &SegmentLog, last: Option<T>) -> Self {
        let state = State::new(log, last);
        let extent = watch::Sender::new(T::extent(&state.held));
        let durable = watch::Sender::new(T::typed(state.durable));
        let (state, wake_writer, cursor) = (Mutex::new(state), Condvar::new(), Mutex::new(None));
        Self { limits, state, wake_writer, extent, durable, dir, cursor }
    }

    /// Tells every waiting stage. Called with the lock held, so that the last one told is the last that happened.
    pub(super) fn publish(&self, state: &mut State<T>) {
        state.held.bytes = state.file_bytes + state.unwritten_bytes as u64;
        state.held.full = state.held.full && !state.has_room(&self.limits);
        self.extent.send_replace(T::extent(&state.held));
    }

    pub(super) fn publish_durable(&self, state: &mut State<T>) {
        self.publish(state);
        self.durable.send_replace(T::typed(state.durable));
    }

    pub(super) fn forget_cursor(&self) {
        *lock(&self.cursor) = None;
    }

    fn ask_to_close(&self) {
        lock(&self.state).closing = true;
        self.wake_writer.notify_one();
    }

    /// Goes on where the last read stopped, if that is `after`: a reader that is far behind reads each file once.
    fn read_files(&self, after: u64, through: u64, bytes_max: usize, resets: u64) -> Result<Vec<T>, FeedError> {
        let stopped = lock(&self.cursor).take();
        let stopped = stopped.filter(|cursor| cursor.after == after && cursor.resets == resets);
        let mut cursor = stopped.unwrap_or_else(|| Cursor {
            reader: SegmentReader::new(&self.dir, self.limits.segment.record_bytes_max, after),
            waiting: VecDeque::new(),
            after,
            resets,
        });
        let found = cursor.take(through, bytes_max, &self.limits)?;
        *lock(&self.cursor) = Some(cursor);
        Ok(found)
    }
}

struct Cursor<T> {
    reader: SegmentReader,
    /// Decoded entries that the last read had no place for.
    waiting: VecDeque<T>,
    after: u64,
    resets: u64,
}

impl<T: FeedEntry> Cursor<T> {
    fn take(&mut self, through: u64, bytes_max: usize, limits: &FeedLimits) -> Result<Vec<T>, FeedError> {
        let (mut found, mut bytes, mut record) = (Vec::new(), 0, Vec::new());
        loop {
            while let Some(entry) = self.waiting.front() {
                bytes += entry.bytes();
                if !found.is_empty() && bytes > bytes_max {
                    return Ok(found);
                }
                self.after = entry.index();
                found.extend(self.waiting.pop_front());
            }
            let read = self.reader.next(through, &mut record).map_err(FeedError::from);
            let decoded = read.and_then(|read| match read {
                Some(index) if !record.is_empty() => decode::<T>(index, &record, limits).map(Some),
                Some(_) => Ok(Some(Vec::new())),
                None => Ok(None),
            });
            match decoded {
                Ok(Some(entries)) => {
                    self.waiting.extend(entries.into_iter().filter(|entry| entry.index() > self.after));
                }
                Ok(None) => break,
                // Asked for again, what follows `found` is the damage.
                Err(_) if !found.is_empty() => return Ok(found),
                Err(error) => return Err(error),
            }
        }
        self.after = through;
        Ok(found)
    }
}

#[cfg(test)]
pub(super) mod tests;
