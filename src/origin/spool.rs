//! Job: the origin's durable queue of revisions that are not yet applied at the replica.
//! Input: whole revisions in order, how far they cover the origin, how far to trim. Output: the same revisions, from any one held on.
//! Always true: every revision that the link carries after `base`, up to `covered`, is in here, or `open` reports what it had to cut.
//!
//! A record is: version u8, count u32; for each revision `arrived_ms` u64, the number of clusters it came from u8, their ids u64 (all
//! little-endian); then a standalone frame with the revisions.

use crate::config::Limits;
use crate::model::{ClusterId, Digest, Epoch, Revision, Seq, Term, WholeRevision};
use crate::segment::Opened;
use crate::segment::feed::{Appended, Feed, FeedEntry, FeedError, FeedLimits, Held};
use crate::wire::frame::{FrameLimits, decode_standalone, encode_standalone};
use bytes::{Buf, Bytes};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

const VERSION: u8 = 1;
/// What an entry costs beside keys and values: the entry, and for each change its two handles.
const ENTRY_BYTES: usize = 160;
const CHANGE_BYTES: usize = 72;
/// How many arrivals are kept from before a restart.
const ARRIVALS_MAX: usize = 1024;

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
    /// Every revision that the link carries after it, up to `covered`, is held.
    pub base: Revision,
    /// The last revision held, or further if the origin moved without a change for the link.
    pub covered: Revision,
    /// The last revision since the last reset, even if it is trimmed; after a restart only if the files still hold it.
    pub last: Option<(Revision, Digest)>,
    pub first: Option<Revision>,
    /// Files, and plain what is on the way to them.
    pub bytes: u64,
    /// An append was refused, and there is no room yet.
    pub full: bool,
    /// The disk refuses to take more; tried again each second.
    pub disk_full: bool,
}

pub type SpoolError = FeedError;

/// See [`Feed`] for what each call promises.
pub struct Spool {
    feed: Feed<SpoolEntry>,
    arrivals: Vec<(Revision, u64)>,
}

impl Spool {
    /// Opens the files in `dir`, or makes them. Reads them all, off the async threads.
    pub async fn open(dir: &Path, limits: &Limits) -> Result<(Self, Opened), SpoolError> {
        let limits = FeedLimits::new(limits, limits.spool_bytes_max);
        let dir = dir.to_owned();
        let open = move || {
            let mut arrivals = Arrivals::default();
            let (feed, opened) = Feed::open(&dir, limits, &mut |last, record| arrivals.add(last, record))?;
            Ok((Self { feed, arrivals: arrivals.samples }, opened))
        };
        tokio::task::spawn_blocking(open).await.map_err(|_| FeedError::Closed)?
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
        self.feed.reset(0, base.0).await
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

    /// When revisions that were in the files at `open` had arrived, in Unix milliseconds: a sample stands for all revisions
    /// after the sample before it, and names the time of the oldest of them.
    pub fn arrivals(&self) -> Vec<(Revision, u64)> {
        self.arrivals.clone()
    }

    pub async fn close(&self) -> Result<(), SpoolError> {
        self.feed.close().await
    }
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
            base: Revision(held.base),
            covered: Revision(held.covered),
            last: held.last,
            first: held.first.map(Revision),
            bytes: held.bytes,
            full: held.full,
            disk_full: held.disk_full,
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
        record.extend_from_slice(&encode_standalone(Epoch(0), Term(0), Seq(0), &revisions));
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
    samples: Vec<(Revision, u64)>,
}

impl Arrivals {
    /// `last`: the record's last revision.
    fn add(&mut self, last: u64, record: &[u8]) {
        let mut left = record;
        let Some(oldest) = read_notes(&mut left).and_then(|notes| notes.first().map(|note| note.0)) else { return };
        self.samples.push((Revision(last), oldest));
        if self.samples.len() > ARRIVALS_MAX {
            let pairs = self.samples.chunks(2).filter_map(|pair| {
                let (last, _) = pair.last()?;
                Some((*last, pair.iter().map(|sample| sample.1).min()?))
            });
            self.samples = pairs.collect();
        }
    }
}
