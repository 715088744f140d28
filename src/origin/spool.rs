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
use std::time::Duration;
use tokio::sync::watch;

const VERSION: u8 = 1;
/// What a power cut takes of the spool is still in the origin's etcd: it is watched again from the spool's end. So the sync need only come
/// before etcd compacts; and a link that is up, be it over half a globe, has trimmed by then.
const SYNC_AFTER: Duration = Duration::from_millis(300);
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
            let (feed, opened) = Feed::open(&dir, limits, &mut |last, record| arrivals.add(last, record))?;
            Ok::<_, SpoolError>((Self { feed, arrivals: arrivals.samples, tag: tag_of(ranges) }, opened))
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
        self.feed.reset(self.tag, base.0).await
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
mod tests {
    use super::*;
    use crate::model::Change;
    use crate::wire::digest;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn limits() -> Limits {
        Limits {
            spool_bytes_max: 1 << 20,
            journal_bytes_max: 1 << 20,
            segment_bytes: 32 * 1024,
            queue_bytes_max: 8 * 1024,
            ..Limits::default()
        }
    }

    fn entry(revision: u64) -> SpoolEntry {
        let key = Bytes::from(format!("/a/{revision}"));
        let value = Bytes::from(vec![u8::try_from(revision % 256).unwrap_or(0); 100]);
        let changes = vec![Change::Put { key, value }, Change::Delete { key: Bytes::from_static(b"/b") }];
        let revision = Arc::new(WholeRevision { revision: Revision(revision), changes });
        let digest = digest::of_revision(&revision);
        let number = revision.revision.0;
        let came_from = (0..number % 3).map(ClusterId).collect();
        SpoolEntry { revision, digest, arrived_ms: 1_000_000 + number, came_from }
    }

    async fn append_durably(spool: &Spool, entries: Vec<SpoolEntry>) {
        let last = entries.last().map_or(0, FeedEntry::index);
        let appended = spool.append(entries).await;
        assert!(matches!(appended, Ok(Appended::Taken)), "{appended:?}");
        let mut durable = spool.durable();
        assert!(durable.wait_for(|durable| durable.0 >= last).await.is_ok());
    }

    async fn read_all(spool: &Spool) -> Vec<SpoolEntry> {
        let (base, last) = {
            let extent = spool.extent();
            let extent = extent.borrow();
            (extent.base, extent.last.map_or(extent.base, |(last, _)| last))
        };
        let (mut read, mut at) = (Vec::new(), base);
        while at < last {
            read.extend(spool.read_after(at, 2000).await.unwrap_or_else(|error| panic!("{error}")));
            at = read.last().map_or(last, |entry: &SpoolEntry| entry.revision.revision);
        }
        read
    }

    #[tokio::test]
    async fn revisions_come_back_whole_with_their_notes_and_the_extent_survives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("spool");
        let (spool, opened) = Spool::open(&dir, &limits(), Digest::default()).await.unwrap();
        assert_eq!(opened, Opened::default());
        let empty = spool.extent().borrow().clone();
        assert_eq!((empty.base, empty.covered, empty.last), (Revision(0), Revision(0), None));
        spool.reset(Revision(40)).await.unwrap();
        let entries: Vec<SpoolEntry> = (21..200).map(|n| entry(n * 2)).collect();
        for some in entries.chunks(9) {
            append_durably(&spool, some.to_vec()).await;
        }
        assert!(read_all(&spool).await == entries);
        spool.covered(Revision(500));
        let before = spool.extent().borrow().clone();
        assert_eq!((before.base, before.covered), (Revision(40), Revision(500)));
        assert_eq!(before.last, Some((Revision(398), entries[178].digest)));
        spool.close().await.unwrap();
        let (spool, opened) = Spool::open(&dir, &limits(), Digest::default()).await.unwrap();
        let after = spool.extent().borrow().clone();
        assert_eq!(
            (opened, SpoolExtent { bytes: 0, ..after }),
            (Opened::default(), SpoolExtent { bytes: 0, ..before })
        );
        assert!(read_all(&spool).await == entries);
        let arrivals = spool.arrivals();
        let first = Arrived { revision_last: Revision(58), at_ms: 1_000_042, count: 9 };
        assert_eq!(arrivals.first(), Some(&first), "a sample names the oldest of its record");
        assert_eq!(arrivals.last().map(|sample| sample.revision_last), Some(Revision(398)));
        assert_eq!(arrivals.iter().map(|sample| sample.count).sum::<u64>(), 179);
        spool.close().await.unwrap();
    }

    fn noise(seed: u64, bytes: usize) -> Bytes {
        let mut random = StdRng::seed_from_u64(seed);
        (0..bytes).map(|_| random.random::<u8>()).collect()
    }

    /// docs/operating.md sizes the spool by it.
    #[tokio::test]
    async fn a_revision_that_comes_alone_takes_at_most_80_bytes_beside_its_keys_and_values() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, _) = Spool::open(&folder.path().join("spool"), &limits(), Digest::default()).await.unwrap();
        let one = |number: u64| {
            let changes = vec![Change::Put { key: noise(number, 11), value: noise(number + 1_000, 1_000) }];
            let revision = Arc::new(WholeRevision { revision: Revision(number), changes });
            let digest = digest::of_revision(&revision);
            vec![SpoolEntry { revision, digest, arrived_ms: 1_764_000_000_000 + number, ..entry(3) }]
        };
        append_durably(&spool, one(1)).await;
        let before = spool.extent().borrow().bytes;
        for number in 2..=101 {
            append_durably(&spool, one(number)).await;
        }
        let each = (spool.extent().borrow().bytes - before) / 100;
        assert!((1_011..=1_011 + 80).contains(&each), "{each}");
        spool.close().await.unwrap();
    }

    #[tokio::test]
    async fn what_was_spooled_for_other_ranges_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("spool");
        let (spool, _) = Spool::open(&dir, &limits(), Digest([1; 16])).await.unwrap();
        spool.reset(Revision(10)).await.unwrap();
        append_durably(&spool, vec![entry(900)]).await;
        spool.close().await.unwrap();
        let (same, _) = Spool::open(&dir, &limits(), Digest([1; 16])).await.unwrap();
        assert_eq!(same.extent().borrow().covered, Revision(900));
        same.close().await.unwrap();
        let (other, _) = Spool::open(&dir, &limits(), Digest([2; 16])).await.unwrap();
        let extent = other.extent().borrow().clone();
        assert_eq!((extent.base, extent.covered, extent.last), (Revision(0), Revision(0), None));
        assert_eq!(other.arrivals(), []);
        other.close().await.unwrap();
    }

    #[tokio::test]
    async fn what_was_spooled_under_a_larger_limit_is_carried_under_a_smaller_one() {
        const LARGE: usize = 3 << 20;
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("spool");
        let roomy = Limits { spool_bytes_max: 64 << 20, revision_bytes_max: 8 << 20, ..limits() };
        let narrow = Limits { revision_bytes_max: 64 << 10, ..roomy.clone() };
        let mut noise = 1_u64;
        let value: Vec<u8> = std::iter::repeat_with(|| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            noise.to_be_bytes()[0]
        })
        .take(LARGE)
        .collect();
        let large = Change::Put { key: Bytes::from_static(b"/a/large"), value: Bytes::from(value) };
        let large = Arc::new(WholeRevision { revision: Revision(8), changes: vec![large] });
        let digest = digest::of_revision(&large);
        let large = SpoolEntry { revision: large, digest, arrived_ms: 1_000_000, came_from: Vec::new() };
        for entries in [vec![entry(7), large.clone(), entry(9)], vec![entry(7), large]] {
            let (spool, _) = Spool::open(&dir, &roomy, Digest::default()).await.unwrap();
            spool.reset(Revision(0)).await.unwrap();
            append_durably(&spool, entries.clone()).await;
            spool.close().await.unwrap();
            let (spool, opened) = Spool::open(&dir, &narrow, Digest::default()).await.unwrap();
            assert_eq!(opened, Opened::default(), "nothing is cut off");
            assert!(read_all(&spool).await == entries);
            spool.close().await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_reset_spool_without_revisions_still_knows_where_it_stands_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("spool");
        let (spool, _) = Spool::open(&dir, &limits(), Digest::default()).await.unwrap();
        append_durably(&spool, vec![entry(900)]).await;
        spool.reset(Revision(70)).await.unwrap();
        spool.covered(Revision(75));
        spool.close().await.unwrap();
        let (spool, _) = Spool::open(&dir, &limits(), Digest::default()).await.unwrap();
        let extent = spool.extent().borrow().clone();
        assert_eq!((extent.base, extent.covered, extent.last), (Revision(70), Revision(75), None));
        assert_eq!(spool.arrivals(), []);
        spool.close().await.unwrap();
    }

    #[test]
    fn samples_of_arrivals_are_bounded_and_never_younger_than_what_they_stand_for() {
        let mut arrivals = Arrivals::default();
        for revision in 1..=5000 {
            arrivals.add(revision, &SpoolEntry::encode(&[entry(revision)]));
            assert!(arrivals.samples.len() <= ARRIVALS_MAX);
        }
        let mut samples = arrivals.samples.iter();
        for revision in 1..=5000 {
            let sample = samples.as_slice().iter().find(|sample| sample.revision_last.0 >= revision);
            assert!(sample.is_some_and(|sample| sample.at_ms <= 1_000_000 + revision), "{revision}");
        }
        assert_eq!(samples.next_back().map(|sample| sample.revision_last), Some(Revision(5000)));
        assert_eq!(arrivals.samples.iter().map(|sample| sample.count).sum::<u64>(), 5000);
    }

    #[test]
    fn a_cut_or_flipped_record_is_an_error_or_differs_in_its_notes_only() {
        let entries: Vec<SpoolEntry> = (1..6).map(entry).collect();
        let record = SpoolEntry::encode(&entries);
        assert_eq!(SpoolEntry::decode(&record, 1 << 20), Ok(entries.clone()));
        for bytes in 0..record.len() {
            assert!(SpoolEntry::decode(&record[..bytes], 1 << 20).is_err(), "cut at {bytes}");
        }
        for bit in 0..record.len() * 8 {
            let mut bad = record.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let revisions = |entries: Vec<SpoolEntry>| entries.into_iter().map(|e| e.revision).collect::<Vec<_>>();
            let decoded = SpoolEntry::decode(&bad, 1 << 20).map(revisions);
            assert!(decoded.is_err() || decoded == Ok(revisions(entries.clone())), "bit {bit}");
        }
    }
}
