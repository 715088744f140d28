//! Job: the replica's durable record of what it received: it can be applied after a crash though the origin is gone.
//! Input: revisions with their seqs, in order. Output: the same revisions, from any one held on.
//! Always true: it holds one epoch at a time, and within it every seq after the base.
//!
//! A record is a standalone frame, which carries the epoch and its first seq.

use crate::config::Limits;
use crate::model::{Digest, Epoch, Revision, Seq, Term, WholeRevision};
use crate::segment::Opened;
use crate::segment::feed::{Appended, Feed, FeedEntry, FeedError, FeedLimits, Held};
use crate::wire::frame::{FrameLimits, decode_standalone, encode_standalone};
use bytes::Bytes;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

/// What an entry costs beside keys and values: the entry, and for each change its two handles.
const ENTRY_BYTES: usize = 160;
const CHANGE_BYTES: usize = 72;

/// A revision that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalEntry {
    pub epoch: Epoch,
    pub seq: Seq,
    pub revision: Arc<WholeRevision>,
    pub digest: Digest,
}

/// What the journal holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalExtent {
    /// 0: no epoch was opened yet.
    pub epoch: Epoch,
    /// Every seq after it was received and is held, up to `end`.
    pub base: Seq,
    /// The last seq received, or the base.
    pub end: Seq,
    /// The last entry since the last reset, even if it is trimmed; after a restart only if the files still hold it.
    pub last: Option<(Seq, Revision, Digest)>,
    /// Files, and plain what is on the way to them.
    pub bytes: u64,
    /// An append was refused, and there is no room yet.
    pub full: bool,
    /// The disk refuses to take more; tried again each second.
    pub disk_full: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error(transparent)]
    Feed(#[from] FeedError),
    #[error("an entry of epoch {entry} was appended to a journal of epoch {journal}")]
    OtherEpoch { entry: Epoch, journal: Epoch },
}

/// See [`Feed`] for what each call promises.
pub struct Journal {
    feed: Feed<JournalEntry>,
    extent: watch::Receiver<JournalExtent>,
}

impl Journal {
    /// Opens the files in `dir`, or makes them. Reads them all, off the async threads.
    pub async fn open(dir: &Path, limits: &Limits) -> Result<(Self, Opened), JournalError> {
        let limits = FeedLimits::new(limits, limits.journal_bytes_max);
        let dir = dir.to_owned();
        let opening = tokio::task::spawn_blocking(move || Feed::open(&dir, limits, &mut |_, _| {}));
        let (feed, opened) = opening.await.map_err(|_| FeedError::Closed)??;
        let extent = feed.extent();
        Ok((Self { feed, extent }, opened))
    }

    /// The first seq must follow the last one held.
    pub async fn append(&self, entries: Vec<JournalEntry>) -> Result<Appended<JournalEntry>, JournalError> {
        let journal = self.extent.borrow().epoch;
        if let Some(entry) = entries.iter().map(|entry| entry.epoch).find(|epoch| *epoch != journal) {
            return Err(JournalError::OtherEpoch { entry, journal });
        }
        Ok(self.feed.append(entries).await?)
    }

    pub async fn read_after(&self, seq: Seq, bytes_max: usize) -> Result<Vec<JournalEntry>, JournalError> {
        Ok(self.feed.read_after(seq.0, bytes_max).await?)
    }

    /// Everything up to `seq` is applied.
    pub fn trim(&self, seq: Seq) {
        self.feed.trim(seq.0);
    }

    /// Drops everything; the next entry is that of `base` + 1 in `epoch`.
    pub async fn reset(&self, epoch: Epoch, base: Seq) -> Result<(), JournalError> {
        Ok(self.feed.reset(epoch.0, base.0).await?)
    }

    pub async fn room(&self) -> Result<(), JournalError> {
        Ok(self.feed.room().await?)
    }

    pub fn durable(&self) -> watch::Receiver<Seq> {
        self.feed.durable()
    }

    pub fn extent(&self) -> watch::Receiver<JournalExtent> {
        self.feed.extent()
    }

    pub async fn close(&self) -> Result<(), JournalError> {
        Ok(self.feed.close().await?)
    }
}

impl FeedEntry for JournalEntry {
    type Index = Seq;
    type Tail = (Seq, Revision, Digest);
    type Extent = JournalExtent;
    const DENSE: bool = true;

    fn index(&self) -> u64 {
        self.seq.0
    }

    fn bytes(&self) -> usize {
        ENTRY_BYTES + self.revision.bytes() + self.revision.changes.len() * CHANGE_BYTES
    }

    fn tail(&self) -> Self::Tail {
        (self.seq, self.revision.revision, self.digest)
    }

    fn typed(index: u64) -> Seq {
        Seq(index)
    }

    fn extent(held: &Held<Self::Tail>) -> JournalExtent {
        JournalExtent {
            epoch: Epoch(held.tag),
            base: Seq(held.base),
            end: Seq(held.covered),
            last: held.last,
            bytes: held.bytes,
            full: held.full,
            disk_full: held.disk_full,
        }
    }

    fn encode(run: &[Self]) -> Bytes {
        let revisions: Vec<&WholeRevision> = run.iter().map(|entry| entry.revision.as_ref()).collect();
        let (epoch, seq_first) = run.first().map_or((Epoch(0), Seq(0)), |first| (first.epoch, first.seq));
        encode_standalone(epoch, Term(0), seq_first, &revisions)
    }

    fn decode(record: &[u8], plain_bytes_max: usize) -> Result<Vec<Self>, String> {
        let frame = decode_standalone(record, &FrameLimits::new(plain_bytes_max)).map_err(|error| error.to_string())?;
        let epoch = frame.epoch;
        let entry =
            |(seq, (revision, digest))| JournalEntry { epoch, seq: Seq(seq), revision: Arc::new(revision), digest };
        Ok((frame.seq_first.0..).zip(frame.revisions.into_iter().zip(frame.digests)).map(entry).collect())
    }
}
