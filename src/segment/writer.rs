//! Job: the one thread of a feed that touches its files.
//! Input: what gathered in the feed's state. Output: synced files, and the state told so.
//! Synchronous; it ends when the feed is closed and everything is written, or when the disk failed.
//! Always true: `durable` moves after the sync; what is trimmed in time is never synced; a full disk is tried again, any other disk error
//! stops the feed for good.

use super::feed::{FeedEntry, FeedError, Shared, State, lock};
use super::{SegmentError, SegmentLog};
use crate::failpoint;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Plain bytes of entries that share a record: enough for LZ4 to find what repeats, little enough to decode for one entry.
pub(super) const RECORD_PLAIN_BYTES: usize = 256 * 1024;
/// Entries that share a record.
const RECORD_ENTRIES_MAX: usize = 1024;
/// So many bytes in files are looked at without waiting: a sync of more would make whoever shares the disk wait noticeably.
const UNSYNCED_BYTES_MAX: usize = 4 << 20;
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
    write_at: Instant,
    unsynced: Option<Unsynced>,
}

/// Records that no sync has covered yet.
#[derive(Debug, Clone, Copy)]
struct Unsynced {
    /// The last of those that are looked at next. A sync takes the ones after it along.
    through: u64,
    look_at: Instant,
    bytes: usize,
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
    Skip(u64),
    Sync,
    Cover(u64),
    Close,
}

impl<T: FeedEntry> Writer<T> {
    pub(super) fn new(shared: Arc<Shared<T>>, log: SegmentLog, finished: watch::Sender<bool>) -> Self {
        let finish = Finish { shared: Arc::clone(&shared), finished };
        let now = Instant::now();
        Self { shared, log, finish, retry_at: None, cover_at: now + COVER_EVERY, write_at: now, unsynced: None }
    }

    pub(super) fn run(mut self) {
        loop {
            let (job, resets) = self.next_job();
            let done = match job {
                Job::Reset(tag, base) => self.reset(tag, base, resets),
                Job::Trim(through) => self.trim(through, resets),
                Job::Write(entries) => self.write(&entries, resets),
                Job::Skip(through) => self.skip(through, resets),
                Job::Sync => self.sync(resets),
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
    fn next_job(&mut self) -> (Job<T>, u64) {
        let shared = Arc::clone(&self.shared);
        let mut state = lock(&shared.state);
        loop {
            let now = Instant::now();
            self.forget_trimmed(&state, now);
            let retry_in = self.retry_at.and_then(|at| at.checked_duration_since(now)).filter(|wait| !wait.is_zero());
            let cover_in = self.cover_at.saturating_duration_since(now);
            let write_in = self.write_at.saturating_duration_since(now);
            let sync_in = self.unsynced.map(|unsynced| unsynced.look_at.saturating_duration_since(now));
            let enough = state.closing || state.unwritten_bytes >= RECORD_PLAIN_BYTES || write_in.is_zero();
            let uncovered = state.unwritten == 0 && state.reset.is_none() && state.held.covered > state.logged;
            if retry_in.is_none() {
                if let Some((tag, base)) = state.reset {
                    return (Job::Reset(tag, base), state.resets);
                }
                if state.trim_to > state.trimmed_to {
                    return (Job::Trim(state.trim_to), state.resets);
                }
                if state.held.disk_full && state.trim_to > state.logged {
                    return (Job::Skip(state.trim_to), state.resets);
                }
                let sync_due = sync_in.is_some_and(|wait| state.closing || wait.is_zero());
                // A full disk may take nothing more for long: what it took does not wait for that.
                if sync_due && state.held.disk_full {
                    return (Job::Sync, state.resets);
                }
                if state.unwritten > 0 && enough {
                    return (Job::Write(state.first_unwritten()), state.resets);
                }
                if sync_due {
                    return (Job::Sync, state.resets);
                }
                if uncovered && (state.closing || cover_in.is_zero()) {
                    return (Job::Cover(state.held.covered), state.resets);
                }
            }
            if state.closing {
                return (Job::Close, state.resets);
            }
            let gathers = (state.unwritten > 0).then_some(write_in);
            let next = [gathers, sync_in, uncovered.then_some(cover_in)].into_iter().flatten().min();
            state = match retry_in.or(next) {
                Some(wait) => {
                    let waited = shared.wake_writer.wait_timeout(state, wait);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => shared.wake_writer.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Nobody needs what is trimmed, least of all after a power cut: where all of it went in time, no sync makes a neighbour on this disk
    /// wait, and those that came since are looked at in their turn.
    fn forget_trimmed(&mut self, state: &State<T>, now: Instant) {
        let due = self.unsynced.filter(|unsynced| unsynced.look_at <= now && unsynced.through <= state.trim_to);
        if due.is_some() && !state.closing {
            let look_at = now + self.shared.limits.sync_after;
            let more = state.logged > state.trim_to;
            self.unsynced = more.then_some(Unsynced { through: state.logged, look_at, bytes: 0 });
        }
    }

    fn reset(&mut self, tag: u64, base: u64, resets: u64) -> Result<(), FeedError> {
        self.log.clear(tag, base)?;
        self.unsynced = None;
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
        if moved {
            // An open file that is unlinked still takes its place on the disk.
            self.shared.forget_cursor();
        }
        if let Some(mut state) = self.still(resets) {
            state.trimmed_to = through;
            if moved {
                state.refresh(&self.log);
                self.shared.publish(&mut state);
            }
        }
        Ok(())
    }

    /// Writes all of `entries`. If the disk is full on the way, what was written before counts; a disk that was full is asked for little.
    fn write(&mut self, entries: &[T], resets: u64) -> Result<(), FeedError> {
        let together = if lock(&self.shared.state).held.disk_full { 1 } else { RECORD_ENTRIES_MAX };
        let (mut written, mut bytes) = (0, 0);
        let mut appended = Ok(());
        while written < entries.len() && appended.is_ok() {
            let run = &entries[written..written + run_length(&entries[written..], together)];
            let record = T::encode(run);
            appended = self.log.append(run[run.len() - 1].index(), &record);
            if appended.is_ok() {
                (written, bytes) = (written + run.len(), bytes + record.len());
            }
        }
        failpoint::reach("segment-written");
        let now = Instant::now();
        (self.write_at, self.cover_at) = (now + self.shared.limits.write_every, now + COVER_EVERY);
        if written > 0 {
            let (through, look_at) = (self.log.last_index(), now + self.shared.limits.sync_after);
            let unsynced = self.unsynced.get_or_insert(Unsynced { through, look_at, bytes: 0 });
            unsynced.bytes += bytes;
            if unsynced.bytes >= UNSYNCED_BYTES_MAX {
                unsynced.look_at = now;
            }
        }
        if let Some(mut state) = self.still(resets) {
            state.advance(&entries[..written], &self.log, &self.shared.limits);
            // What is still full was never otherwise, also between two tries.
            state.held.disk_full &= appended.is_err();
            self.shared.publish(&mut state);
        }
        Ok(appended?)
    }

    /// What a full disk did not take, and nobody needs any more, is never written: the files go on behind it.
    fn skip(&mut self, through: u64, resets: u64) -> Result<(), FeedError> {
        self.log.clear(self.log.tag(), through)?;
        self.unsynced = None;
        self.shared.forget_cursor();
        if let Some(mut state) = self.still(resets) {
            state.skip(through, &self.log);
            self.shared.publish(&mut state);
        }
        Ok(())
    }

    fn sync(&mut self, resets: u64) -> Result<(), FeedError> {
        let through = self.log.last_index();
        self.log.sync()?;
        self.unsynced = None;
        if let Some(mut state) = self.still(resets) {
            state.durable = through;
            self.shared.publish_durable(&mut state);
        }
        Ok(())
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

/// How many of the entries share the next record: `most`, or what makes one of [`RECORD_PLAIN_BYTES`].
fn run_length<T: FeedEntry>(entries: &[T], most: usize) -> usize {
    let mut bytes = 0;
    let fits = |entry: &&T| {
        bytes += entry.bytes();
        bytes <= RECORD_PLAIN_BYTES
    };
    entries.iter().take(most).take_while(fits).count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::feed::Feed;
    use crate::segment::feed::tests::{Item, flip, items, limits, private_dir, segment_files, stepped};

    /// Does what the writer finds to do; says whether a sync was among it.
    fn step(writer: &mut Writer<Item>) -> bool {
        let (job, resets) = writer.next_job();
        let syncs = matches!(job, Job::Sync);
        let done = match job {
            Job::Write(entries) => writer.write(&entries, resets),
            Job::Sync => writer.sync(resets),
            Job::Trim(through) => writer.trim(through, resets),
            Job::Reset(..) | Job::Skip(_) | Job::Cover(_) | Job::Close => panic!("nobody asked for it"),
        };
        done.unwrap_or_else(|error| panic!("{error}"));
        syncs
    }

    async fn append(feed: &Feed<Item>, indexes: std::ops::RangeInclusive<u64>) {
        feed.append(items(indexes, 100)).await.unwrap_or_else(|error| panic!("{error}"));
    }

    #[tokio::test]
    async fn what_is_trimmed_before_its_sync_is_due_is_never_synced_and_what_came_since_waits_for_its_own_turn() {
        let dir = private_dir();
        let (feed, mut writer) = stepped(dir.path(), limits(8 * 1024, 1 << 20));
        append(&feed, 1..=5).await;
        assert!(!step(&mut writer), "they are written");
        append(&feed, 6..=7).await;
        assert!(!step(&mut writer), "these too");
        feed.trim(5);
        assert!(!step(&mut writer), "the trim");
        assert!(writer.unsynced.is_some_and(|unsynced| unsynced.through == 7), "the first five are gone");
        assert!(step(&mut writer), "two that nobody trimmed are synced");
        assert_eq!(*feed.durable().borrow(), 7);
        append(&feed, 8..=9).await;
        assert!(!step(&mut writer), "they are written");
        feed.trim(9);
        assert!(!step(&mut writer), "the trim");
        let shared = Arc::clone(&writer.shared);
        writer.forget_trimmed(&lock(&shared.state), Instant::now());
        assert!(writer.unsynced.is_none(), "all are gone");
        assert_eq!(*feed.durable().borrow(), 7, "no sync was made for them");
    }

    /// Lets the writer do everything but wait.
    fn settle(writer: &mut Writer<Item>) {
        let shared = Arc::clone(&writer.shared);
        let has_work = || {
            let state = lock(&shared.state);
            state.unwritten > 0 || state.trim_to > state.trimmed_to
        };
        while has_work() {
            step(writer);
        }
    }

    #[tokio::test]
    async fn a_disk_is_full_until_it_takes_all_that_waits() {
        let dir = private_dir();
        let (feed, mut writer) = stepped(dir.path(), limits(8 * 1024, 64 * 1024));
        append(&feed, 1..=2).await;
        let shared = Arc::clone(&writer.shared);
        lock(&shared.state).held.disk_full = true;
        let mut try_them = |refused| {
            writer.log.in_doubt = refused;
            let entries = lock(&shared.state).first_unwritten();
            let written = writer.write(&entries, 0).is_ok();
            (written, lock(&shared.state).held.disk_full)
        };
        assert_eq!([try_them(true), try_them(false)], [(false, true), (true, false)]);
    }

    #[tokio::test]
    async fn a_trim_wakes_the_writer_if_a_file_goes_with_it_and_otherwise_not() {
        let dir = private_dir();
        let (feed, mut writer) = stepped(dir.path(), limits(8 * 1024, 64 * 1024));
        let shared = Arc::clone(&writer.shared);
        let let_go = |index| lock(&shared.state).let_go(index);
        append(&feed, 1..=5).await;
        settle(&mut writer);
        assert!(!let_go(5), "the only file is far from full");
        append(&feed, 6..=20).await;
        settle(&mut writer);
        assert_eq!([let_go(19), let_go(20)], [false, true], "it is a quarter full");
        settle(&mut writer);
        assert!(!let_go(20), "it has gone");
        for first in [21, 41, 61, 81] {
            append(&feed, first..=first + 19).await;
            settle(&mut writer);
        }
        let files = std::fs::read_dir(dir.path()).unwrap_or_else(|error| panic!("{error}")).count();
        assert!(files > 3, "{files}");
        assert_eq!([let_go(21), let_go(99)], [false, true], "the first file's last entry, or more");
        settle(&mut writer);
        assert!(feed.extent().borrow().base >= 60);
    }

    #[tokio::test]
    async fn damage_in_what_may_go_is_no_damage_of_the_feed() {
        let dir = private_dir();
        let (feed, mut writer) = stepped(dir.path(), limits(8 * 1024, 64 * 1024));
        append(&feed, 1..=5).await;
        settle(&mut writer);
        segment_files(dir.path()).iter().for_each(|file| flip(file));
        feed.trim(5);
        assert!(feed.read_after(0, 1000).await.is_err());
        assert!(!feed.extent().borrow().damaged);
    }
}
