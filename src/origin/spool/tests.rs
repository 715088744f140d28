//! Job: tests of the spool: what comes back, after a restart too, and what is forgotten.
//! Input: revisions made by hand. Output: passes or fails.
//! Edge: files in folders of the tests' own.
//! Always true: no etcd is asked.

use super::*;
use crate::model::{Change, ClusterId, Run};
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

fn of(epoch: u64) -> Run {
    Run { cluster: ClusterId(1), epoch: Epoch(epoch) }
}

async fn open(dir: &Path) -> Spool {
    Spool::open(dir, &limits(), Digest::default()).await.unwrap().0
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
    assert_eq!((opened, SpoolExtent { bytes: 0, ..after }), (Opened::default(), SpoolExtent { bytes: 0, ..before }));
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

#[tokio::test]
async fn of_which_run_a_spool_is_outlives_the_process_and_ends_with_a_reset() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("spool");
    let spool = open(&dir).await;
    spool.reset(Revision(10)).await.unwrap();
    spool.serves(of(1), Revision(0)).await.unwrap();
    append_durably(&spool, vec![entry(11)]).await;
    spool.close().await.unwrap();
    let spool = open(&dir).await;
    assert_eq!(spool.asked_after(of(1), Revision(10)).await, Some((Revision(11), entry(11).digest)));
    assert_eq!(spool.asked_after(of(1), Revision(11)).await, None);
    assert!(spool.ships(of(1), Revision(10)).await.unwrap());
    spool.close().await.unwrap();
    let spool = open(&dir).await;
    assert!(!spool.ships(of(2), Revision(10)).await.unwrap(), "it was read in the epoch before");
    assert!(spool.ships(of(2), Revision(11)).await.unwrap());
    spool.close().await.unwrap();
    let spool = open(&dir).await;
    spool.reset(Revision(20)).await.unwrap();
    append_durably(&spool, vec![entry(21)]).await;
    spool.close().await.unwrap();
    let spool = open(&dir).await;
    assert!(!spool.ships(of(2), Revision(20)).await.unwrap(), "nothing says of which run it is");
    spool.close().await.unwrap();
}

#[tokio::test]
async fn a_gap_outlives_the_process_and_so_does_that_nothing_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("spool");
    let spool = open(&dir).await;
    spool.reset(Revision(10)).await.unwrap();
    spool.serves(of(1), Revision(0)).await.unwrap();
    spool.appends_unlinked(Revision(10)).await.unwrap();
    assert_eq!(spool.lineage().await.linked_after(), Revision(0), "nothing is held up to there");
    append_durably(&spool, vec![entry(11)]).await;
    spool.covered(Revision(15));
    spool.appends_unlinked(Revision(15)).await.unwrap();
    append_durably(&spool, vec![entry(16)]).await;
    spool.close().await.unwrap();
    let spool = open(&dir).await;
    assert_eq!(spool.asked_after(of(1), Revision(10)).await, Some((Revision(16), entry(16).digest)));
    spool.proven().await;
    assert!(!spool.ships(of(2), Revision(10)).await.unwrap() && spool.ships(of(2), Revision(15)).await.unwrap());
    spool.close().await.unwrap();
    std::fs::remove_file(dir.join(LINEAGE_FILE)).unwrap();
    let spool = open(&dir).await;
    spool.proven().await;
    assert!(!spool.ships(of(2), Revision(15)).await.unwrap() && spool.ships(of(2), Revision(16)).await.unwrap());
    spool.reset(Revision(20)).await.unwrap();
    append_durably(&spool, vec![entry(21)]).await;
    spool.close().await.unwrap();
    let spool = open(&dir).await;
    spool.proven().await;
    assert!(spool.ships(of(2), Revision(20)).await.unwrap(), "it is known that it was begun anew");
    spool.close().await.unwrap();
}

#[tokio::test]
async fn a_reset_that_is_cut_short_leaves_nothing_that_passes_for_a_part_of_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("spool");
    let spool = open(&dir).await;
    spool.reset(Revision(10)).await.unwrap();
    spool.serves(of(1), Revision(0)).await.unwrap();
    append_durably(&spool, vec![entry(11)]).await;
    let lineage = || std::fs::read(dir.join(LINEAGE_FILE)).unwrap();
    let before = lineage();
    {
        let mut reset = std::pin::pin!(spool.reset(Revision(20)));
        let polled = std::future::poll_fn(|context| std::task::Poll::Ready(reset.as_mut().poll(context).is_ready()));
        assert!(!polled.await);
        // Its first step goes on by itself; the second one is never begun.
        while lineage() == before {
            tokio::task::yield_now().await;
        }
    }
    spool.close().await.unwrap();
    let spool = open(&dir).await;
    assert_eq!(spool.extent().borrow().covered, Revision(11), "it was cut short");
    spool.proven().await;
    assert!(!spool.ships(of(2), Revision(10)).await.unwrap());
    spool.reset(Revision(5)).await.unwrap();
    append_durably(&spool, vec![entry(6)]).await;
    assert!(spool.ships(of(2), Revision(5)).await.unwrap(), "it was begun anew");
    spool.close().await.unwrap();
}

#[tokio::test]
async fn on_a_full_disk_a_spool_is_shipped_and_begun_anew_and_the_next_process_doubts_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("spool");
    let spool = open(&dir).await;
    spool.serves(of(1), Revision(0)).await.unwrap();
    assert!(dir.join(LINEAGE_FILE).exists());
    // Where the next file would be written before it gets its name.
    std::os::unix::fs::symlink("/dev/full", dir.join(LINEAGE_FILE).with_extension("new")).unwrap();
    spool.reset(Revision(10)).await.unwrap();
    append_durably(&spool, vec![entry(11)]).await;
    spool.serves(of(1), Revision(0)).await.unwrap();
    assert!(spool.ships(of(1), Revision(10)).await.unwrap());
    assert!(!dir.join(LINEAGE_FILE).exists(), "what it said before does not hold");
    spool.close().await.unwrap();
    let spool = open(&dir).await;
    assert!(!spool.ships(of(1), Revision(10)).await.unwrap());
    spool.close().await.unwrap();
}
