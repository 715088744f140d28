//! Job: the dedupe log: seq, digest and state of each revision that was received, and up to which all are done.
//! Input: notes about seqs. Output: at start, the newest of them, and the one that had failed.
//! Always true: losing it costs nothing but itself (the position is the truth), so whatever is wrong with it, it is moved aside and
//! started afresh; once it is open nothing but its own thread waits for its disk, and what the thread has no place for is not noted.
//!
//! All calls of what is kept (db.rs) are on one thread, behind `catch_unwind`: of 150 flipped bits in its files sled panicked on 115.

mod db;

use super::poison::SeqState;
use crate::model::{Digest, Epoch, Revision, Seq};
use db::{Db, now_ms};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, TryAcquireError, oneshot};

/// Calls that wait for the thread.
const CALLS_MAX: usize = 64;
/// Revisions that are noted in memory before they are written.
const GATHERED_MAX: usize = 4096;
/// How long a note may be in memory only. It is a cache: nobody waits for it.
const SYNC_EVERY: Duration = Duration::from_secs(5);
/// On a disk that refuses everything each start fails at once; each costs a warning, and the log that it moves aside.
const RESTART_EVERY: Duration = Duration::from_secs(60);
/// Unreadable logs that are kept for an expert to look at.
const MOVED_ASIDE_MAX: usize = 2;
/// How long [`Dedupe::close`] waits for the disk.
const CLOSE_MAX: Duration = Duration::from_secs(4);

#[derive(Debug, thiserror::Error)]
pub enum DedupeError {
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is open to others (mode {mode:03o}): run `chmod 700` on it", .path.display())]
    DirTooOpen { path: PathBuf, mode: u32 },
    #[error("the dedupe log is closed")]
    Closed,
    #[error("the dedupe log's disk is too slow: what comes meanwhile is not noted")]
    Behind,
    #[error("the disk did not take the dedupe log's last entries in time")]
    CloseTooSlow,
}

/// What was found at start. Notes are synced after a while, so the last ones may be missing in any case: what the journal holds beyond
/// them is noted again.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// The newest entries, in order.
    pub recent: Vec<(Epoch, Seq, Digest)>,
    /// The newest one that is not done and was refused so often.
    pub failed: Option<(Epoch, Seq, u32)>,
    /// True if the log could not be read, and is empty now.
    pub moved_aside: bool,
}

type Noted = (Seq, Digest, Revision);

enum Call {
    Note(Epoch, Vec<Noted>),
    Done(Epoch, Seq),
    State(Epoch, Seq, SeqState),
    Close(oneshot::Sender<()>),
}

/// The door to the thread. Dropping it ends the thread, which syncs first.
pub struct Dedupe {
    calls: SyncSender<Call>,
    /// One permit for each free place in `calls`, so that waiting for one does not block an async thread.
    places: Arc<Semaphore>,
    /// The last call found no place: said once.
    behind: AtomicBool,
}

impl Dedupe {
    /// Opens the log in `dir`, or makes one; where the disk has no room for that, later. An error only if the directory itself cannot be had.
    pub async fn open(dir: &Path) -> Result<(Self, Opened), DedupeError> {
        let dir = dir.to_owned();
        let places = Arc::new(Semaphore::new(CALLS_MAX));
        let (calls, called) = sync_channel(CALLS_MAX);
        let (tell, told) = oneshot::channel();
        let free = Arc::clone(&places);
        let thread = move || match Log::open(&dir) {
            Ok((log, opened)) => {
                if tell.send(Ok(opened)).is_ok() {
                    serve(log, &called, &free);
                }
            }
            Err(error) => drop(tell.send(Err(error))),
        };
        let started = std::thread::Builder::new().name("dedupe".to_owned()).spawn(thread);
        started.map_err(|source| DedupeError::Io { path: PathBuf::from("thread"), source })?;
        let opened = told.await.map_err(|_| DedupeError::Closed)??;
        Ok((Self { calls, places, behind: AtomicBool::new(false) }, opened))
    }

    /// Notes revisions; an error where [`CALLS_MAX`] calls wait for the thread. What is not noted costs the sight of a conflict with an old
    /// seq after a restart, never a revision: neither journal nor position is read from here.
    pub fn note(&self, epoch: Epoch, revisions: Vec<Noted>) -> Result<(), DedupeError> {
        self.try_call(Call::Note(epoch, revisions))
    }

    /// As [`Self::note`], but waits for a place: for the start, when nothing is kept waiting. Cancel-safe.
    pub async fn note_again(&self, epoch: Epoch, revisions: Vec<Noted>) -> Result<(), DedupeError> {
        self.call(Call::Note(epoch, revisions)).await
    }

    /// Everything up to `seq` is applied. After an error it is to be said again, or a later seq.
    pub fn done_through(&self, epoch: Epoch, seq: Seq) -> Result<(), DedupeError> {
        self.try_call(Call::Done(epoch, seq))
    }

    /// One was refused, or is given up. Not noted where the thread is behind: refusals are then counted afresh after a restart.
    pub fn state(&self, epoch: Epoch, seq: Seq, state: SeqState) -> Result<(), DedupeError> {
        self.try_call(Call::State(epoch, seq, state))
    }

    /// Syncs and ends the thread. Waits at most 4 s.
    pub async fn close(&self) -> Result<(), DedupeError> {
        let (tell, told) = oneshot::channel();
        let closing = async {
            self.call(Call::Close(tell)).await?;
            told.await.map_err(|_| DedupeError::Closed)
        };
        tokio::time::timeout(CLOSE_MAX, closing).await.unwrap_or(Err(DedupeError::CloseTooSlow))
    }

    fn try_call(&self, call: Call) -> Result<(), DedupeError> {
        let place = match self.places.try_acquire() {
            Ok(place) => place,
            Err(TryAcquireError::Closed) => return Err(DedupeError::Closed),
            Err(TryAcquireError::NoPermits) => {
                if !self.behind.swap(true, Ordering::Relaxed) {
                    tracing::warn!("the dedupe log's disk is too slow: what comes meanwhile is not noted");
                }
                return Err(DedupeError::Behind);
            }
        };
        place.forget();
        self.behind.store(false, Ordering::Relaxed);
        self.calls.try_send(call).map_err(|_| DedupeError::Closed)
    }

    async fn call(&self, call: Call) -> Result<(), DedupeError> {
        self.places.acquire().await.map_err(|_| DedupeError::Closed)?.forget();
        self.calls.try_send(call).map_err(|_| DedupeError::Closed)
    }
}

/// What was noted since the last write: one insert for each revision is what sled costs, and little else.
#[derive(Default)]
struct Gathered {
    notes: Vec<(Epoch, Vec<Noted>)>,
    revisions: usize,
    done: Option<(Epoch, Seq)>,
    /// Few: each is a refusal of etcd's, or a revision that was given up.
    states: Vec<(Epoch, Seq, SeqState)>,
}

impl Gathered {
    fn note(&mut self, epoch: Epoch, revisions: Vec<Noted>) {
        self.revisions += revisions.len();
        self.notes.push((epoch, revisions));
    }

    fn done_through(&mut self, epoch: Epoch, seq: Seq) {
        self.done = self.done.max(Some((epoch, seq)));
    }

    fn write(&mut self, log: &mut Log) {
        let Self { notes, done, states, .. } = std::mem::take(self);
        for (epoch, revisions) in notes {
            log.try_do(|db| db.note(epoch, &revisions));
        }
        for (epoch, seq, state) in states {
            log.try_do(|db| db.state(epoch, seq, state));
        }
        log.try_do(|db| {
            if let Some((epoch, seq)) = done {
                db.done_through(epoch, seq)?;
            }
            db.trim()
        });
    }
}

/// The thread: takes calls until there are no more, and writes and syncs at most each [`SYNC_EVERY`].
fn serve(mut log: Log, calls: &Receiver<Call>, places: &Semaphore) {
    let mut gathered = Gathered::default();
    let mut sync_at: Option<Instant> = None;
    let closed = loop {
        let call = match sync_at {
            None => calls.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(at) => calls.recv_timeout(at.saturating_duration_since(Instant::now())),
        };
        places.add_permits(usize::from(call.is_ok()));
        match call {
            Ok(Call::Note(epoch, revisions)) => {
                gathered.note(epoch, revisions);
                sync_at.get_or_insert_with(|| Instant::now() + SYNC_EVERY);
                if gathered.revisions >= GATHERED_MAX {
                    gathered.write(&mut log);
                }
            }
            Ok(Call::Done(epoch, seq)) => {
                gathered.done_through(epoch, seq);
                sync_at.get_or_insert_with(|| Instant::now() + SYNC_EVERY);
            }
            Ok(Call::State(epoch, seq, state)) => {
                gathered.states.push((epoch, seq, state));
                sync_at.get_or_insert_with(|| Instant::now() + SYNC_EVERY);
            }
            Err(RecvTimeoutError::Timeout) => {
                gathered.write(&mut log);
                log.try_do(Db::sync);
                sync_at = None;
            }
            Ok(Call::Close(told)) => break Some(told),
            Err(RecvTimeoutError::Disconnected) => break None,
        }
    };
    gathered.write(&mut log);
    log.try_do(Db::sync);
    log.drop_db();
    places.close();
    if let Some(told) = closed {
        let _ = told.send(()); // whoever asked may have gone
    }
}

/// The log as the thread sees it: it is there, or it could not be made.
struct Log {
    dir: PathBuf,
    db: Option<Db>,
    /// When it may start afresh again.
    restart_at: Instant,
}

impl Log {
    fn open(dir: &Path) -> Result<(Self, Opened), DedupeError> {
        let mut log = Self { dir: dir.to_owned(), db: None, restart_at: Instant::now() };
        match check_private(dir) {
            Err(DedupeError::Io { source, .. })
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                log.restart("it found no room");
                return Ok((log, Opened::default()));
            }
            checked => checked?,
        }
        let opened = match guarded(|| Db::open(dir)) {
            Ok((db, opened)) => {
                log.db = Some(db);
                opened
            }
            // On a full disk there may be no new one either: the link goes on without.
            Err(reason) => {
                log.restart(&reason);
                Opened { moved_aside: true, ..Opened::default() }
            }
        };
        Ok((log, opened))
    }

    /// Whatever goes wrong, the log starts afresh, but not more often than each [`RESTART_EVERY`]; meanwhile nothing is noted.
    fn try_do(&mut self, work: impl FnOnce(&mut Db) -> Result<(), String>) {
        if self.db.is_none() {
            self.restart("it could not be written");
        }
        let Some(db) = &mut self.db else { return };
        if let Err(reason) = guarded(|| work(db)) {
            self.drop_db();
            self.restart(&reason);
        }
    }

    fn restart(&mut self, reason: &str) {
        let now = Instant::now();
        if now < self.restart_at {
            return;
        }
        self.restart_at = now + RESTART_EVERY;
        match start_afresh(&self.dir, reason) {
            Ok(db) => self.db = Some(db),
            Err(error) => {
                tracing::warn!(%error, "the dedupe log cannot be started; the position still catches what is repeated")
            }
        }
    }

    fn drop_db(&mut self) {
        let db = self.db.take();
        let dropping = || {
            drop(db);
            Ok(())
        };
        if guarded(dropping).is_err() {
            tracing::debug!("the dedupe log panicked while closing");
        }
    }
}

/// Runs sled code: a panic in it is an error like another.
fn guarded<V>(work: impl FnOnce() -> Result<V, String>) -> Result<V, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(format!("panicked: {}", text.unwrap_or_else(|| "for no stated reason".to_owned())))
    })
}

fn check_private(dir: &Path) -> Result<(), DedupeError> {
    let failed = |source| DedupeError::Io { path: dir.to_owned(), source };
    match fs::metadata(dir) {
        Ok(found) => {
            let mode = found.permissions().mode() & 0o777;
            if mode & 0o077 != 0 { Err(DedupeError::DirTooOpen { path: dir.to_owned(), mode }) } else { Ok(()) }
        }
        Err(_) => DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed),
    }
}

/// Moves what is in `dir` to `<dir>.bad-<unix ms>`, of which the newest are kept, and makes a new log.
fn start_afresh(dir: &Path, reason: &str) -> Result<Db, DedupeError> {
    let failed = |source| DedupeError::Io { path: dir.to_owned(), source };
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let aside = (now_ms()..).map(|ms| dir.with_file_name(format!("{name}.bad-{ms:015}"))).find(|path| !path.exists());
    let Some(aside) = aside else { return Err(failed(io::ErrorKind::AlreadyExists.into())) };
    let moved_to = match fs::rename(dir, &aside) {
        // An earlier try has moved it, and found no room for a new one.
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        moved => moved.map(|()| Some(&aside)).map_err(failed)?,
    };
    check_private(dir)?;
    let mut old: Vec<PathBuf> = Vec::new();
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    for entry in fs::read_dir(parent).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let bad = entry.file_name().to_string_lossy().starts_with(&format!("{name}.bad-"));
        old.extend(bad.then(|| entry.path()));
    }
    old.sort();
    for path in &old[..old.len().saturating_sub(MOVED_ASIDE_MAX)] {
        fs::remove_dir_all(path).map_err(failed)?;
    }
    let opened = guarded(|| Db::open(dir)).map_err(|reason| {
        // What is half made is not worth a place among those that were moved aside.
        let _ = fs::remove_dir_all(dir);
        failed(io::Error::other(reason))
    });
    let (db, _) = opened?;
    let moved_to = moved_to.map(|path| tracing::field::display(path.display()));
    tracing::warn!(reason, moved_to, "the dedupe log could not be read or written; started a new one");
    Ok(db)
}

#[cfg(test)]
mod tests;
