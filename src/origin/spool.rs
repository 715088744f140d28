//! Job: the origin's durable queue of revisions that are not yet applied at the replica.
//! Input: whole revisions in order, how far they cover the origin, how far to trim. Output: the same revisions, from any one held on.
//! Always true: every revision that the link carries after `base`, up to `covered`, is in here, or `open` reports what it had to cut; of
//! which run they are is kept beside them.
//!
//! A record is: version u8, count u32; for each revision `arrived_ms` u64, the number of clusters it came from u8, their ids u64 (all
//! little-endian); then a standalone frame with the revisions.

use super::lineage::Lineage;
use crate::config::Limits;
use crate::model::{ClusterId, Digest, Epoch, Revision, Run, Seq, Term, WholeRevision};
use crate::segment::feed::{Appended, Feed, FeedEntry, FeedError, FeedLimits, Held};
use crate::segment::{self, Opened};
use crate::wire::frame::{FrameLimits, decode_standalone, encode_standalone};
use bytes::{Buf, Bytes};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, watch};

const VERSION: u8 = 1;
/// What a power cut takes of the spool is still in the origin's etcd: it is watched again from the spool's end. So the sync need only come
/// before etcd compacts; and a link that is up, be it over half a globe, has trimmed by then.
const SYNC_AFTER: Duration = Duration::from_millis(300);
/// What an entry costs beside keys and values: the entry, and for each change its two handles.
const ENTRY_BYTES: usize = 160;
const CHANGE_BYTES: usize = 72;
/// How many arrivals are kept from before a restart.
const ARRIVALS_MAX: usize = 1024;
/// Holds the lineage, beside the segment files.
const LINEAGE_FILE: &str = "lineage.json";

/// A revision that waits to be applied at the replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolEntry {
    pub revision: Arc<WholeRevision>,
    pub digest: Digest,
    /// When this cluster's sidecar saw it, in Unix milliseconds.
    pub arrived_ms: u64,
    /// The origin clusters named by position keys that the revision wrote: it must not go back to them. At most 255.
    pub came_from: Vec<ClusterId>,
}

/// What the spool holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolExtent {
    /// Of the ranges that it was filled for.
    pub tag: u64,
    /// Every revision that the link carries after it, up to `covered`, is held.
    pub base: Revision,
    /// The last revision held, or further if the origin moved without a change for the link.
    pub covered: Revision,
    /// The last revision since the last reset, even if it is trimmed; after a restart only if the files still hold it.
    pub last: Option<(Revision, Digest)>,
    /// Files, and plain what is on the way to them.
    pub bytes: u64,
    /// An append was refused, and there is no room yet.
    pub full: bool,
    /// The disk refuses to take more; tried again each second.
    pub disk_full: bool,
    /// A read found something in the files that cannot be had any more. Only a reset ends it.
    pub damaged: bool,
}

pub type SpoolError = FeedError;

/// See [`Feed`] for what each call promises.
pub struct Spool {
    feed: Feed<SpoolEntry>,
    arrivals: Vec<Arrived>,
    /// Which ranges it holds: see [`Spool::open`].
    tag: u64,
    lineage: Arc<Mutex<Kept>>,
    lineage_file: PathBuf,
}

/// The lineage, and what the file says of it.
struct Kept {
    lineage: Lineage,
    written: Vec<u8>,
}

/// Revisions that were in the files at `open`: all of them after the sample before this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    pub revision_last: Revision,
    /// When the oldest of them had arrived, in Unix milliseconds.
    pub at_ms: u64,
    pub count: u64,
}

impl Spool {
    /// Opens the files in `dir`, or makes them. Reads them all, off the async threads.
    /// What was spooled for other ranges is dropped: it may lack what these ranges carry.
    pub async fn open(dir: &Path, limits: &Limits, ranges: Digest) -> Result<(Self, Opened), SpoolError> {
        let limits = FeedLimits::new(limits, limits.spool_bytes_max, SYNC_AFTER);
        let dir = dir.to_owned();
        let open = move || {
            let mut arrivals = Arrivals::default();
            let (feed, opened) =
                Feed::<SpoolEntry>::open(&dir, limits, &mut |last, record| arrivals.add(last, record))?;
            let covered = feed.extent().borrow().covered;
            let lineage_file = dir.join(LINEAGE_FILE);
            // Without it, what was read before is fetched again: no reason to stop.
            let written = std::fs::read(&lineage_file).unwrap_or_default();
            let lineage = Arc::new(Mutex::new(Kept { lineage: Lineage::found(&written, covered), written }));
            let spool = Self { feed, arrivals: arrivals.samples, tag: tag_of(ranges), lineage, lineage_file };
            Ok::<_, SpoolError>((spool, opened))
        };
        let (mut spool, opened) = tokio::task::spawn_blocking(open).await.map_err(|_| FeedError::Closed)??;
        let (tag, covered) = {
            let extent = spool.extent();
            let extent = extent.borrow();
            (extent.tag, extent.covered)
        };
        if tag != spool.tag && covered > Revision(0) {
            spool.arrivals.clear();
            spool.reset(Revision(0)).await?;
        }
        Ok((spool, opened))
    }

    pub async fn append(&self, entries: Vec<SpoolEntry>) -> Result<Appended<SpoolEntry>, SpoolError> {
        self.feed.append(entries).await
    }

    pub async fn read_after(&self, revision: Revision, bytes_max: usize) -> Result<Vec<SpoolEntry>, SpoolError> {
        self.feed.read_after(revision.0, bytes_max).await
    }

    /// Everything that the link carries up to `revision` is in here.
    pub fn covered(&self, revision: Revision) {
        self.feed.cover(revision.0);
    }

    /// Everything up to `revision` is applied at the replica.
    pub fn trim(&self, revision: Revision) {
        self.feed.trim(revision.0);
    }

    /// Drops everything; the next revision is the first one after `base` that the link carries.
    pub async fn reset(&self, base: Revision) -> Result<(), SpoolError> {
        // What follows must never pass for a part of what was before, nor that for a part of what follows, wherever this ends.
        let covered = self.feed.extent().borrow().covered;
        self.keep(|lineage| *lineage = Lineage::of_no_run(covered)).await?;
        self.feed.reset(self.tag, base.0).await?;
        self.keep(|lineage| *lineage = Lineage::default()).await.map(|_| ())
    }

    /// The watch has ended, or another one begins after the spool's end: see [`Lineage::unwatched`].
    pub async fn unwatched(&self) {
        let covered = self.feed.extent().borrow().covered;
        self.lineage.lock().await.lineage.unwatched(covered);
    }

    /// Before the first append of a watch that began after the spool's end, `covered`: see [`Lineage::appends_unlinked`].
    pub async fn appends_unlinked(&self, covered: Revision) -> Result<(), SpoolError> {
        if covered <= self.feed.extent().borrow().base {
            return Ok(());
        }
        self.keep(|lineage| lineage.appends_unlinked(covered)).await.map(|_| ())
    }

    /// The last revision, if the origin is to show it: see [`Lineage::asks_after`].
    pub async fn asked_after(&self, run: Run, reached: Revision) -> Option<(Revision, Digest)> {
        let asks = self.lineage.lock().await.lineage.asks_after(run, reached);
        self.feed.extent().borrow().last.filter(|_| asks)
    }

    /// See [`Lineage::proven`].
    pub async fn proven(&self) {
        self.lineage.lock().await.lineage.proven();
    }

    /// As far as it is known now.
    pub async fn lineage(&self) -> Lineage {
        self.lineage.lock().await.lineage
    }

    /// See [`Lineage::serves`].
    pub async fn serves(&self, run: Run, applied: Revision) -> Result<(), SpoolError> {
        let applied = applied.max(self.feed.extent().borrow().base);
        self.keep(|lineage| lineage.serves(run, applied)).await.map(|_| ())
    }

    /// Whether a replica that follows `run`, and has everything up to `reached`, may be sent what is in here.
    pub async fn ships(&self, run: Run, reached: Revision) -> Result<bool, SpoolError> {
        let base = self.feed.extent().borrow().base;
        let lineage = self.keep(|lineage| lineage.judge(run, base)).await?;
        Ok(lineage.ships_after(reached))
    }

    /// Changes the lineage once the file says so, where it is to; on a full disk there is none, which costs the next process what is held, and
    /// is no reason to ship less now. Cancel-safe.
    async fn keep(&self, change: impl FnOnce(&mut Lineage)) -> Result<Lineage, SpoolError> {
        let mut kept = self.lineage.clone().lock_owned().await;
        let mut changed = kept.lineage;
        change(&mut changed);
        let (after, path) = (changed.to_json(), self.lineage_file.clone());
        let write = move || {
            if after != kept.written {
                let is_there = segment::write_file_or_none(&path, &after)?;
                kept.written = if is_there { after } else { Vec::new() };
            }
            kept.lineage = changed;
            Ok::<_, SpoolError>(changed)
        };
        tokio::task::spawn_blocking(write).await.map_err(|_| FeedError::Closed)?
    }

    pub async fn room(&self) -> Result<(), SpoolError> {
        self.feed.room().await
    }

    pub fn durable(&self) -> watch::Receiver<Revision> {
        self.feed.durable()
    }

    pub fn extent(&self) -> watch::Receiver<SpoolExtent> {
        self.feed.extent()
    }

    /// When revisions that were in the files at `open` had arrived.
    pub fn arrivals(&self) -> Vec<Arrived> {
        self.arrivals.clone()
    }

    /// An error once the disk has failed for good.
    pub fn usable(&self) -> Result<(), SpoolError> {
        self.feed.usable()
    }

    pub async fn close(&self) -> Result<(), SpoolError> {
        self.feed.close().await
    }
}

/// The ranges' digest, as far as a segment file has room for it.
fn tag_of(ranges: Digest) -> u64 {
    ranges.0.iter().take(8).fold(0, |tag, byte| tag << 8 | u64::from(*byte))
}

impl FeedEntry for SpoolEntry {
    type Index = Revision;
    type Tail = (Revision, Digest);
    type Extent = SpoolExtent;
    const DENSE: bool = false;

    fn index(&self) -> u64 {
        self.revision.revision.0
    }

    fn bytes(&self) -> usize {
        ENTRY_BYTES + self.revision.bytes() + self.revision.changes.len() * CHANGE_BYTES + self.came_from.len() * 8
    }

    fn tail(&self) -> Self::Tail {
        (self.revision.revision, self.digest)
    }

    fn typed(index: u64) -> Revision {
        Revision(index)
    }

    fn extent(held: &Held<Self::Tail>) -> SpoolExtent {
        SpoolExtent {
            tag: held.tag,
            base: Revision(held.base),
            covered: Revision(held.covered),
            last: held.last,
            bytes: held.bytes,
            full: held.full,
            disk_full: held.disk_full,
            damaged: held.damaged,
        }
    }

    fn encode(run: &[Self]) -> Bytes {
        let mut record = vec![VERSION];
        record.extend(u32::try_from(run.len()).unwrap_or(u32::MAX).to_le_bytes());
        for entry in run {
            record.extend(entry.arrived_ms.to_le_bytes());
            let clusters = u8::try_from(entry.came_from.len()).unwrap_or(u8::MAX);
            record.push(clusters);
            for cluster in entry.came_from.iter().take(usize::from(clusters)) {
                record.extend(cluster.0.to_le_bytes());
            }
        }
        let revisions: Vec<&WholeRevision> = run.iter().map(|entry| entry.revision.as_ref()).collect();
        let digests: Vec<Digest> = run.iter().map(|entry| entry.digest).collect();
        record.extend_from_slice(&encode_standalone(Epoch(0), Term(0), Seq(0), &revisions, &digests));
        record.into()
    }

    fn decode(record: &[u8], plain_bytes_max: usize) -> Result<Vec<Self>, String> {
        let mut left = record;
        let notes = read_notes(&mut left).ok_or("its head is malformed")?;
        let frame = decode_standalone(left, &FrameLimits::new(plain_bytes_max)).map_err(|error| error.to_string())?;
        if frame.revisions.len() != notes.len() || frame.digests.len() != notes.len() {
            return Err("its head does not fit its frame".to_owned());
        }
        let entry = |((revision, digest), (arrived_ms, came_from))| SpoolEntry {
            revision: Arc::new(revision),
            digest,
            arrived_ms,
            came_from,
        };
        Ok(frame.revisions.into_iter().zip(frame.digests).zip(notes).map(entry).collect())
    }
}

type Note = (u64, Vec<ClusterId>);

/// What stands before the frame: one note for each revision.
fn read_notes(left: &mut &[u8]) -> Option<Vec<Note>> {
    if left.try_get_u8().ok()? != VERSION {
        return None;
    }
    let count = left.try_get_u32_le().ok()?;
    let mut notes = Vec::new();
    for _ in 0..count {
        let arrived_ms = left.try_get_u64_le().ok()?;
        let clusters = left.try_get_u8().ok()?;
        let ids: Option<Vec<ClusterId>> = (0..clusters).map(|_| left.try_get_u64_le().ok().map(ClusterId)).collect();
        notes.push((arrived_ms, ids?));
    }
    Some(notes)
}

/// Samples of arrivals, of which neighbours are merged when there are too many.
#[derive(Default)]
struct Arrivals {
    samples: Vec<Arrived>,
}

impl Arrivals {
    /// `last`: the record's last revision.
    fn add(&mut self, last: u64, record: &[u8]) {
        let mut left = record;
        let Some(notes) = read_notes(&mut left) else { return };
        let Some(oldest) = notes.first() else { return };
        self.samples.push(Arrived { revision_last: Revision(last), at_ms: oldest.0, count: notes.len() as u64 });
        if self.samples.len() > ARRIVALS_MAX {
            let pairs = self.samples.chunks(2).filter_map(|pair| {
                let at_ms = pair.iter().map(|sample| sample.at_ms).min()?;
                Some(Arrived { at_ms, count: pair.iter().map(|sample| sample.count).sum(), ..*pair.last()? })
            });
            self.samples = pairs.collect();
        }
    }
}

#[cfg(test)]
mod tests;
