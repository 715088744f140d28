//! Job: the replica's durable record of what it received: it can be applied after a crash though the origin is gone.
//! Input: revisions with their seqs, in order. Output: the same revisions, from any one held on.
//! Always true: it holds one epoch at a time, and within it every seq after the base.
//!
//! A record is a standalone frame, which carries the epoch and its first seq. Of which origin that epoch is stands in a file beside: an epoch's
//! number may be used again, with another one.

use crate::config::Limits;
use crate::model::{ClusterId, Digest, Epoch, Revision, Run, Seq, Term, WholeRevision};
use crate::segment::feed::{Appended, Feed, FeedEntry, FeedError, FeedLimits, Held};
use crate::segment::{self, Opened};
use crate::wire::frame::{FrameLimits, decode_standalone, encode_standalone};
use bytes::Bytes;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// What is not applied so soon after it was written is synced. While applying keeps up nothing is: the replica's etcd has synced it itself.
const SYNC_AFTER: Duration = Duration::from_millis(50);
/// Holds the journal's run, beside the segment files.
const RUN_FILE: &str = "run.json";
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
    /// A read found something in the files that cannot be had any more. Only a reset ends it.
    pub damaged: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error(transparent)]
    Feed(#[from] FeedError),
    #[error("an entry of epoch {entry} was appended to a journal of epoch {journal}")]
    OtherEpoch { entry: Epoch, journal: Epoch },
}

impl JournalError {
    /// True if what was asked for is held, and cannot be had any more.
    pub fn is_damage(&self) -> bool {
        match self {
            JournalError::Feed(error) => error.is_damage(),
            JournalError::OtherEpoch { .. } => false,
        }
    }
}

/// A run as it was written down, with a checksum of it; anything else says nothing.
fn run_of(bytes: &[u8]) -> Option<Run> {
    let (run, checksum): (Run, u32) = serde_json::from_slice(bytes).ok()?;
    (checksum_of(run) == checksum).then_some(run)
}

fn checksum_of(run: Run) -> u32 {
    crc32c::crc32c(&serde_json::to_vec(&run).unwrap_or_default())
}

/// See [`Feed`] for what each call promises.
pub struct Journal {
    feed: Feed<JournalEntry>,
    extent: watch::Receiver<JournalExtent>,
    /// As it was last written down; `None`: it is not known.
    run: watch::Sender<Option<Run>>,
    run_file: PathBuf,
}

impl Journal {
    /// Opens the files in `dir`, or makes them. Reads them all, off the async threads.
    pub async fn open(dir: &Path, limits: &Limits) -> Result<(Self, Opened), JournalError> {
        let limits = FeedLimits::new(limits, limits.journal_bytes_max, SYNC_AFTER);
        let dir = dir.to_owned();
        let opening = tokio::task::spawn_blocking(move || {
            let (feed, opened) = Feed::open(&dir, limits, &mut |_, _| {})?;
            let run_file = dir.join(RUN_FILE);
            let run = std::fs::read(&run_file).ok().and_then(|bytes| run_of(&bytes));
            let extent = feed.extent();
            Ok::<_, FeedError>((Self { feed, extent, run: watch::Sender::new(run), run_file }, opened))
        });
        Ok(opening.await.map_err(|_| FeedError::Closed)??)
    }

    /// The origin of what it holds; `None`: it is not known.
    pub fn origin(&self) -> Option<ClusterId> {
        let epoch = self.extent.borrow().epoch;
        self.run.borrow().filter(|run| run.epoch == epoch).map(|run| run.cluster)
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

    /// Drops everything; the next entry is that of `base` + 1 in `run`. What the file says of a run is never of entries that are of another:
    /// it is written between what is dropped and the first that is appended.
    pub async fn reset(&self, run: Run, base: Seq) -> Result<(), JournalError> {
        self.feed.reset(run.epoch.0, base.0).await?;
        self.run.send_replace(None);
        let (path, bytes) = (self.run_file.clone(), serde_json::to_vec(&(run, checksum_of(run))).unwrap_or_default());
        let writing = tokio::task::spawn_blocking(move || segment::write_file_or_none(&path, &bytes));
        let is_there = writing.await.map_err(|_| FeedError::Closed)?.map_err(FeedError::from)?;
        self.run.send_replace(is_there.then_some(run));
        Ok(())
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

    /// An error once the disk has failed for good.
    pub fn usable(&self) -> Result<(), JournalError> {
        Ok(self.feed.usable()?)
    }

    /// See [`JournalExtent::damaged`].
    pub fn is_damaged(&self) -> bool {
        self.extent.borrow().damaged
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
        bytes_of(&self.revision)
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
            damaged: held.damaged,
        }
    }

    fn encode(run: &[Self]) -> Bytes {
        let revisions: Vec<&WholeRevision> = run.iter().map(|entry| entry.revision.as_ref()).collect();
        let (epoch, seq_first) = run.first().map_or((Epoch(0), Seq(0)), |first| (first.epoch, first.seq));
        let digests: Vec<Digest> = run.iter().map(|entry| entry.digest).collect();
        encode_standalone(epoch, Term(0), seq_first, &revisions, &digests)
    }

    fn decode(record: &[u8], plain_bytes_max: usize) -> Result<Vec<Self>, String> {
        let frame = decode_standalone(record, &FrameLimits::new(plain_bytes_max)).map_err(|error| error.to_string())?;
        let epoch = frame.epoch;
        let entry =
            |(seq, (revision, digest))| JournalEntry { epoch, seq: Seq(seq), revision: Arc::new(revision), digest };
        Ok((frame.seq_first.0..).zip(frame.revisions.into_iter().zip(frame.digests)).map(entry).collect())
    }
}

/// What a revision takes in memory: its keys and values, and what they cost beside.
pub(super) fn bytes_of(whole: &WholeRevision) -> usize {
    ENTRY_BYTES + whole.bytes() + whole.changes.len() * CHANGE_BYTES
}

/// A read of the journal under way.
pub(super) struct Reading {
    pub after: Seq,
    entries: Pin<Box<dyn Future<Output = Result<Vec<JournalEntry>, JournalError>> + Send>>,
}

impl Reading {
    pub fn new(journal: Arc<Journal>, after: Seq, bytes_max: usize) -> Self {
        Self { after, entries: Box::pin(async move { journal.read_after(after, bytes_max).await }) }
    }
}

/// What it gives; of none, nothing ever.
pub(super) async fn read(reading: &mut Option<Reading>) -> Result<Vec<JournalEntry>, JournalError> {
    match reading {
        Some(reading) => reading.entries.as_mut().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Change;
    use crate::wire::digest;

    fn limits() -> Limits {
        Limits {
            spool_bytes_max: 1 << 20,
            journal_bytes_max: 1 << 20,
            segment_bytes: 32 * 1024,
            queue_bytes_max: 8 * 1024,
            ..Limits::default()
        }
    }

    fn entry(epoch: u64, seq: u64) -> JournalEntry {
        let changes = vec![Change::Put { key: Bytes::from(format!("/a/{seq}")), value: vec![7; 100].into() }];
        let revision = Arc::new(WholeRevision { revision: Revision(1000 + seq * 2), changes });
        let digest = digest::of_revision(&revision);
        JournalEntry { epoch: Epoch(epoch), seq: Seq(seq), revision, digest }
    }

    fn run(epoch: u64) -> Run {
        Run { cluster: ClusterId(7), epoch: Epoch(epoch) }
    }

    async fn append_durably(journal: &Journal, entries: Vec<JournalEntry>) {
        let last = entries.last().map_or(0, FeedEntry::index);
        let appended = journal.append(entries).await;
        assert!(matches!(appended, Ok(Appended::Taken)), "{appended:?}");
        assert!(journal.durable().wait_for(|durable| durable.0 >= last).await.is_ok());
    }

    #[tokio::test]
    async fn what_was_received_is_read_again_from_any_seq_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("journal");
        let (journal, _) = Journal::open(&dir, &limits()).await.unwrap();
        journal.reset(run(3), Seq(0)).await.unwrap();
        let entries: Vec<JournalEntry> = (1..=400).map(|seq| entry(3, seq)).collect();
        for some in entries.chunks(11) {
            append_durably(&journal, some.to_vec()).await;
        }
        let before = journal.extent().borrow().clone();
        assert_eq!((before.epoch, before.base, before.end), (Epoch(3), Seq(0), Seq(400)));
        assert_eq!(before.last, Some((Seq(400), Revision(1800), entries[399].digest)));
        journal.close().await.unwrap();
        let (journal, _) = Journal::open(&dir, &limits()).await.unwrap();
        assert_eq!(*journal.extent().borrow(), JournalExtent { ..before });
        for after in [0, 1, 250, 399] {
            let read = journal.read_after(Seq(after), 1 << 20).await.unwrap();
            assert!(read == entries[usize::try_from(after).unwrap()..], "after {after}");
        }
        journal.close().await.unwrap();
    }

    #[tokio::test]
    async fn a_gap_a_repeat_and_another_epoch_are_refused_until_a_reset_opens_it() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("journal");
        let (journal, _) = Journal::open(&dir, &limits()).await.unwrap();
        assert_eq!(journal.extent().borrow().epoch, Epoch(0));
        journal.reset(run(1), Seq(10)).await.unwrap();
        append_durably(&journal, vec![entry(1, 11), entry(1, 12)]).await;
        for seq in [10, 12, 14] {
            let refused = journal.append(vec![entry(1, seq)]).await;
            assert!(matches!(refused, Err(JournalError::Feed(FeedError::OutOfOrder { .. }))), "{seq}");
        }
        let refused = journal.append(vec![entry(2, 13)]).await;
        assert!(matches!(refused, Err(JournalError::OtherEpoch { entry: Epoch(2), journal: Epoch(1) })));
        journal.reset(run(2), Seq(0)).await.unwrap();
        append_durably(&journal, vec![entry(2, 1)]).await;
        journal.close().await.unwrap();
        let (journal, _) = Journal::open(&dir, &limits()).await.unwrap();
        let extent = journal.extent().borrow().clone();
        assert_eq!((extent.epoch, extent.base, extent.end), (Epoch(2), Seq(0), Seq(1)));
        assert_eq!(journal.read_after(Seq(0), 1).await.unwrap(), [entry(2, 1)]);
        journal.close().await.unwrap();
    }

    #[tokio::test]
    async fn which_origin_its_epoch_is_of_is_known_after_a_restart_and_a_file_that_is_damaged_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("journal");
        let (journal, _) = Journal::open(&dir, &limits()).await.unwrap();
        assert_eq!(journal.origin(), None);
        journal.reset(run(2), Seq(5)).await.unwrap();
        assert_eq!(journal.origin(), Some(ClusterId(7)));
        journal.close().await.unwrap();
        let sound = std::fs::read(dir.join(RUN_FILE)).unwrap();
        for at in 0..sound.len() {
            let mut bent = sound.clone();
            bent[at] ^= 1;
            for written in [&sound[..at], &bent[..]] {
                assert!(run_of(written).is_none(), "{}", written.escape_ascii());
            }
        }
        let (journal, _) = Journal::open(&dir, &limits()).await.unwrap();
        assert_eq!((journal.origin(), journal.extent().borrow().epoch), (Some(ClusterId(7)), Epoch(2)));
        // A process that ends in the middle of a reset leaves the file of the epoch before.
        journal.feed.reset(3, 0).await.unwrap();
        assert_eq!(journal.origin(), None);
        journal.close().await.unwrap();
    }
}
