//! Job: tests of the feed: the same entries from memory and from files, limits that hold, what survives a restart.
//! Input: small entries, temporary directories. Output: passes or fails.
//! Always true: no test waits for time; each waits for what it needs, and not for ever.

use super::*;
use std::os::unix::fs::PermissionsExt;

/// For what takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::segment) struct Item {
    index: u64,
    value: Bytes,
}

impl FeedEntry for Item {
    type Index = u64;
    type Tail = u64;
    type Extent = Held<u64>;
    const DENSE: bool = false;

    fn index(&self) -> u64 {
        self.index
    }

    fn bytes(&self) -> usize {
        self.value.len() + 64
    }

    fn tail(&self) -> u64 {
        self.index
    }

    fn typed(index: u64) -> u64 {
        index
    }

    fn extent(held: &Held<u64>) -> Held<u64> {
        held.clone()
    }

    fn encode(run: &[Self]) -> Bytes {
        let mut record = Vec::new();
        for item in run {
            record.extend(item.index.to_le_bytes());
            record.extend((item.value.len() as u64).to_le_bytes());
            record.extend_from_slice(&item.value);
        }
        record.into()
    }

    fn decode(record: &[u8], _: usize) -> Result<Vec<Self>, String> {
        use bytes::Buf;
        let mut left = Bytes::copy_from_slice(record);
        let mut items = Vec::new();
        while let Ok(index) = left.try_get_u64_le() {
            let length = left.try_get_u64_le().map_err(|error| error.to_string())?;
            let value = left.split_to(usize::try_from(length).map_err(|error| error.to_string())?);
            items.push(Item { index, value });
        }
        Ok(items)
    }
}

fn item(index: u64, bytes: usize) -> Item {
    Item { index, value: vec![u8::try_from(index % 251).unwrap_or(0); bytes].into() }
}

pub(in crate::segment) fn items(indexes: impl Iterator<Item = u64>, bytes: usize) -> Vec<Item> {
    indexes.map(|index| item(index, bytes)).collect()
}

pub(in crate::segment) fn limits(queue_bytes_max: usize, total_bytes_max: u64) -> FeedLimits {
    let segment = SegmentLimits { segment_bytes: total_bytes_max / 16, total_bytes_max, record_bytes_max: 1 << 20 };
    let (write_every, sync_after) = (Duration::ZERO, Duration::ZERO);
    FeedLimits { segment, queue_bytes_max, plain_bytes_max: 1 << 20, write_every, sync_after }
}

/// Room for everything in files, for little in memory.
fn roomy() -> FeedLimits {
    limits(8 * 1024, 16 << 20)
}

pub(in crate::segment) fn private_dir() -> tempfile::TempDir {
    let only_we = PermissionsExt::from_mode(0o700);
    tempfile::Builder::new().permissions(only_we).tempdir().unwrap_or_else(|error| panic!("{error}"))
}

/// A feed whose writer the caller runs.
pub(in crate::segment) fn stepped(dir: &Path, limits: FeedLimits) -> (Feed<Item>, Writer<Item>) {
    let opened = SegmentLog::open(dir, limits.segment, OnDamage::Refuse, &mut |_, _| {});
    let (log, _) = opened.unwrap_or_else(|error| panic!("{error}"));
    let shared = Arc::new(Shared::<Item>::new(dir.to_owned(), limits, &log, None));
    let (finish, finished) = watch::channel(false);
    (Feed { shared: Arc::clone(&shared), finished }, Writer::new(shared, log, finish))
}

fn open(dir: &Path, limits: FeedLimits) -> Feed<Item> {
    let opened = Feed::open(dir, limits, &mut |_, _| {});
    opened.unwrap_or_else(|error| panic!("{error}")).0
}

async fn append_durably(feed: &Feed<Item>, items: Vec<Item>) {
    let last = items.last().map_or(0, |item| item.index);
    assert_eq!(feed.append(items).await.unwrap_or_else(|error| panic!("{error}")), Appended::Taken);
    let durable = feed.durable().wait_for(|durable| *durable >= last).await.is_ok();
    assert!(durable, "the feed ended");
}

async fn read_all(feed: &Feed<Item>, after: u64, bytes_max: usize) -> Vec<Item> {
    let (end, mut read) = (feed.extent().borrow().last.unwrap_or(0), Vec::<Item>::new());
    while read.last().map_or(after, |item| item.index) < end {
        let from = read.last().map_or(after, |item| item.index);
        read.extend(feed.read_after(from, bytes_max).await.unwrap_or_else(|error| panic!("{error}")));
    }
    read
}

fn ring_bytes(feed: &Feed<Item>) -> usize {
    lock(&feed.shared.state).ring_bytes
}

#[tokio::test]
async fn memory_and_files_give_the_same_entries_whatever_the_reader_takes_at_a_time() {
    let dir = private_dir();
    let feed = open(dir.path(), roomy());
    let written = items((1..2000).map(|n| n * 2), 100);
    for batch in written.chunks(7) {
        append_durably(&feed, batch.to_vec()).await;
    }
    assert!(ring_bytes(&feed) <= 8 * 1024, "memory holds the newest only");
    for bytes_max in [1, 1000, 1 << 20] {
        assert!(read_all(&feed, 0, bytes_max).await == written, "{bytes_max} at a time");
    }
    for after in [1, 2, 1001, 1002, 3990, 3997] {
        assert!(read_all(&feed, after, 5000).await == written[usize::try_from(after / 2).unwrap()..], "after {after}");
    }
    feed.close().await.unwrap();
    let feed = open(dir.path(), roomy());
    assert!(read_all(&feed, 0, 3000).await == written, "after a restart");
    feed.close().await.unwrap();
}

#[tokio::test]
async fn a_waiting_reader_gets_a_new_entry_before_the_disk_has_it() {
    let dir = private_dir();
    let (feed, writer) = stepped(dir.path(), roomy());
    {
        let mut reading = std::pin::pin!(feed.read_after(0, 1000));
        assert!(futures::poll!(reading.as_mut()).is_pending(), "there is nothing yet");
        assert_eq!(feed.append(items(1..=3, 10)).await.unwrap(), Appended::Taken);
        let std::task::Poll::Ready(read) = futures::poll!(reading) else {
            panic!("nobody writes, and it waits for that")
        };
        assert_eq!(read.unwrap(), items(1..=3, 10));
    }
    assert_eq!(*feed.durable().borrow(), 0);
    let writing = std::thread::spawn(move || writer.run());
    feed.close().await.unwrap();
    writing.join().unwrap();
}

#[tokio::test]
async fn a_million_waiting_entries_stay_on_disk_and_not_in_memory() {
    let dir = private_dir();
    let feed = open(dir.path(), limits(1 << 20, 4 << 30));
    for start in (0..1_000_000).step_by(1000) {
        assert_eq!(feed.append(items(start + 1..=start + 1000, 16)).await.unwrap(), Appended::Taken);
        assert!(ring_bytes(&feed) <= (1 << 20) + 80_000);
    }
    let (mut after, mut count) = (0, 0);
    while after < 1_000_000 {
        let read = feed.read_after(after, 256 * 1024).await.unwrap();
        assert_eq!(read.first().map(|item| item.index), Some(after + 1));
        count += read.len();
        after = read.last().map_or(after, |item| item.index);
    }
    assert_eq!(count, 1_000_000);
    feed.close().await.unwrap();
}

#[tokio::test]
async fn what_does_not_follow_is_refused() {
    let dir = private_dir();
    let feed = open(dir.path(), roomy());
    append_durably(&feed, items([3, 7].into_iter(), 10)).await;
    assert!(matches!(feed.append(items(7..9, 10)).await, Err(FeedError::OutOfOrder { index: 7, end: 7 })));
    assert!(matches!(
        feed.append(items([9, 8].into_iter(), 10)).await,
        Err(FeedError::OutOfOrder { index: 8, end: 9 })
    ));
    assert!(matches!(feed.read_after(8, 10).await, Err(FeedError::BeyondEnd { index: 8, end: 7 })));
    feed.cover(20);
    assert!(matches!(feed.append(items(15..16, 10)).await, Err(FeedError::OutOfOrder { index: 15, end: 20 })));
    feed.close().await.unwrap();
    assert!(matches!(feed.append(items(30..31, 10)).await, Err(FeedError::Closed)));
    assert!(matches!(feed.read_after(3, 10).await, Err(FeedError::Closed)));
}

#[tokio::test]
async fn a_full_feed_takes_nothing_until_trimming_made_room() {
    let dir = private_dir();
    let limits = limits(16 * 1024, 64 * 1024);
    let feed = open(dir.path(), limits);
    let mut last = 0;
    let refused = loop {
        let batch = items(last + 1..=last + 10, 400);
        match feed.append(batch.clone()).await.unwrap() {
            Appended::Taken => last += 10,
            Appended::Full(refused) => {
                assert_eq!(refused, batch);
                break refused;
            }
        }
    };
    feed.durable().wait_for(|durable| *durable == last).await.unwrap();
    let extent = feed.extent().borrow().clone();
    assert!(extent.full && extent.last == Some(last) && extent.bytes <= 64 * 1024, "{extent:?}");
    assert!(read_all(&feed, 0, 1000).await == items(1..=last, 400), "a full feed can be read");
    let (room, ()) = tokio::join!(feed.room(), async { feed.trim(last / 2) });
    room.unwrap();
    let extent = feed.extent().borrow().clone();
    assert!(!extent.full && extent.base > 0 && extent.base <= last / 2, "{extent:?}");
    assert!(read_all(&feed, extent.base, 1000).await == items(extent.base + 1..=last, 400), "nothing more is gone");
    assert_eq!(feed.append(refused).await.unwrap(), Appended::Taken);
    assert!(matches!(feed.read_after(extent.base - 1, 10).await, Err(FeedError::BeforeBase { .. })));
    feed.close().await.unwrap();
    let files: u64 = std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(files <= 64 * 1024 + limits.segment.segment_bytes, "{files} B in files");
}

#[tokio::test]
async fn a_batch_larger_than_the_limit_is_taken_once_all_else_is_trimmed() {
    let dir = private_dir();
    let feed = open(dir.path(), limits(16 * 1024, 64 * 1024));
    append_durably(&feed, items(1..=10, 400)).await;
    let Appended::Full(large) = feed.append(items(11..=12, 100_000)).await.unwrap() else { panic!("it does not fit") };
    let waiting = async { tokio::join!(feed.room(), async { feed.trim(10) }).0 };
    tokio::time::timeout(PATIENCE, waiting).await.expect("room is made").unwrap();
    append_durably(&feed, large).await;
    feed.close().await.unwrap();
}

#[tokio::test]
async fn a_reset_drops_everything_for_good_and_tells_a_waiting_reader() {
    let dir = private_dir();
    let feed = open(dir.path(), roomy());
    append_durably(&feed, items(100..=500, 100)).await;
    let (read, reset) = tokio::join!(feed.read_after(500, 10), feed.reset(9, 40));
    reset.unwrap();
    assert!(matches!(read, Err(FeedError::Reset)));
    let extent = feed.extent().borrow().clone();
    assert_eq!((extent.tag, extent.base, extent.covered, extent.last), (9, 40, 40, None));
    assert_eq!(*feed.durable().borrow(), 40);
    assert!(matches!(feed.read_after(39, 10).await, Err(FeedError::BeforeBase { .. })));
    feed.close().await.unwrap();
    let feed = open(dir.path(), roomy());
    let extent = feed.extent().borrow().clone();
    assert_eq!((extent.tag, extent.base, extent.covered, extent.last), (9, 40, 40, None), "it is remembered");
    append_durably(&feed, items(41..=42, 100)).await;
    assert!(read_all(&feed, 40, 1000).await == items(41..=42, 100));
    feed.close().await.unwrap();
}

#[tokio::test]
async fn what_is_read_from_files_while_a_reset_is_done_is_not_given_out_after_it() {
    let dir = private_dir();
    let feed = open(dir.path(), roomy());
    append_durably(&feed, items(1..=50, 100)).await;
    feed.close().await.unwrap();
    drop(feed);
    // Nothing is in memory.
    let feed = open(dir.path(), roomy());
    let mut reading = std::pin::pin!(feed.read_after(0, 1 << 20));
    assert!(futures::poll!(reading.as_mut()).is_pending(), "another thread reads the files");
    feed.reset(2, 0).await.unwrap();
    append_durably(&feed, items(1..=3, 200)).await;
    let read = reading.await;
    assert!(matches!(read, Err(FeedError::Reset)), "{:?}", read.map(|read| read.len()));
    assert!(read_all(&feed, 0, 1 << 20).await == items(1..=3, 200));
    feed.close().await.unwrap();
}

#[tokio::test]
async fn how_far_it_covers_is_remembered_and_reading_goes_on_after_it() {
    let dir = private_dir();
    let feed = open(dir.path(), roomy());
    append_durably(&feed, items(1..=5, 100)).await;
    feed.cover(70);
    feed.cover(60);
    assert_eq!(feed.extent().borrow().covered, 70);
    feed.close().await.unwrap();
    let feed = open(dir.path(), roomy());
    let extent = feed.extent().borrow().clone();
    assert_eq!((extent.covered, extent.last, extent.base), (70, Some(5), 0));
    let (read, ()) = tokio::join!(feed.read_after(6, 1000), append_durably(&feed, items(71..=72, 10)));
    assert_eq!(read.unwrap(), items(71..=72, 10));
    assert!(read_all(&feed, 3, 1000).await.iter().map(|item| item.index).eq([4, 5, 71, 72]));
    feed.close().await.unwrap();
}

#[tokio::test]
async fn a_crash_before_the_sync_loses_only_what_was_not_durable() {
    let dir = private_dir();
    let feed = open(dir.path(), roomy());
    append_durably(&feed, items(1..=50, 100)).await;
    let file = std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path());
    let file = file.into_iter().find(|path| path.extension().is_some_and(|end| end == "segment")).unwrap();
    let durable = std::fs::read(&file).unwrap();
    append_durably(&feed, items(51..=90, 100)).await;
    feed.close().await.unwrap();
    let written = std::fs::read(&file).unwrap();
    let from = durable.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    for torn in [from, from + 1, from + 20, from + 1000] {
        let mut bytes = written[..torn].to_vec();
        bytes.resize(written.len(), 0);
        std::fs::write(&file, bytes).unwrap();
        let feed = open(dir.path(), roomy());
        assert!(read_all(&feed, 0, 1000).await == items(1..=50, 100), "torn at {torn}");
        append_durably(&feed, items(51..=52, 100)).await;
        feed.close().await.unwrap();
    }
}

#[tokio::test]
async fn appending_waits_while_the_disk_is_behind_and_a_cancelled_append_adds_nothing() {
    let dir = private_dir();
    let limits = limits(1000, 1 << 20);
    let (feed, writer) = stepped(dir.path(), limits);
    assert_eq!(feed.append(items(1..=9, 100)).await.unwrap(), Appended::Taken, "a single batch always fits");
    {
        let waiting = std::pin::pin!(feed.append(items(10..=12, 100)));
        assert!(futures::poll!(waiting).is_pending(), "the backlog exceeds the memory's limit");
    }
    assert_eq!(feed.extent().borrow().covered, 9, "the cancelled append added nothing");
    let writing = std::thread::spawn(move || writer.run());
    append_durably(&feed, items(10..=12, 100)).await;
    assert!(read_all(&feed, 0, 1000).await == items(1..=12, 100));
    feed.close().await.unwrap();
    writing.join().unwrap();
}

#[tokio::test]
async fn a_disk_error_stops_the_feed_and_whoever_waits_is_told() {
    let dir = private_dir();
    let feed = open(dir.path(), limits(1000, 64 * 1024));
    append_durably(&feed, items(1..=3, 100)).await;
    std::fs::remove_dir_all(dir.path()).unwrap();
    let (read, ()) = tokio::join!(feed.read_after(3, 1), async {
        let mut last = 3;
        while feed.append(items(last + 1..=last + 10, 400)).await.is_ok() {
            last += 10;
        }
    });
    drop(read);
    let refused = feed.append(items(9000..9001, 1)).await.err();
    assert!(matches!(refused, Some(FeedError::Failed { .. })));
    let told = refused.map(|e| e.to_string()).unwrap_or_default();
    assert!(told.contains("No such file") && told.ends_with("; mend the disk, then restart its sidecar"), "{told}");
    assert!(matches!(feed.read_after(3, 1).await, Err(FeedError::Failed { .. })));
    assert!(matches!(feed.reset(0, 0).await, Err(FeedError::Failed { .. })));
    assert!(matches!(feed.close().await, Err(FeedError::Failed { .. })));
}

/// Flips a bit of the file's first record.
pub(in crate::segment) fn flip(file: &Path) {
    let mut written = std::fs::read(file).unwrap();
    written[100] ^= 1;
    std::fs::write(file, written).unwrap();
}

pub(in crate::segment) fn segment_files(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let mut files: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|end| end == "segment")).collect();
    files.sort();
    files
}

#[tokio::test]
async fn trimming_reads_nothing_so_that_damage_in_what_nobody_reads_stops_no_feed() {
    let dir = private_dir();
    let feed = open(dir.path(), limits(1000, 64 * 1024));
    for batch in items(1..=300, 100).chunks(10) {
        append_durably(&feed, batch.to_vec()).await;
    }
    let files = segment_files(dir.path());
    assert!(files.len() > 4, "{files:?}");
    files[1..files.len() - 1].iter().for_each(|file| flip(file));
    feed.trim(150);
    let mut extent = feed.extent();
    let trimmed = extent.wait_for(|extent| extent.base > 0);
    assert!(tokio::time::timeout(PATIENCE, trimmed).await.is_ok(), "the feed has stopped");
    append_durably(&feed, items(301..=310, 100)).await;
    assert!(read_all(&feed, 300, 1000).await == items(301..=310, 100));
    feed.close().await.unwrap();
}

#[tokio::test]
async fn what_stands_before_damage_is_given_out_and_then_the_feed_is_damaged_until_a_reset() {
    let dir = private_dir();
    let feed = open(dir.path(), limits(1000, 64 * 1024));
    for batch in items(1..=300, 100).chunks(10) {
        append_durably(&feed, batch.to_vec()).await;
    }
    flip(&segment_files(dir.path())[2]);
    let mut last = 0;
    let error = loop {
        match feed.read_after(last, 1 << 20).await {
            Ok(read) => {
                assert_eq!(read.first().map(|item| item.index), Some(last + 1));
                assert!(!feed.extent().borrow().damaged);
                last += read.len() as u64;
            }
            Err(error) => break error,
        }
    };
    assert!(last > 0 && error.is_damage(), "read up to {last}, then: {error}");
    assert!(feed.extent().borrow().damaged);
    assert!(feed.read_after(last, 1).await.is_err());
    feed.reset(0, last).await.unwrap();
    assert!(!feed.extent().borrow().damaged);
    append_durably(&feed, items(last + 1..=last + 2, 100)).await;
    assert!(read_all(&feed, last, 1000).await == items(last + 1..=last + 2, 100));
    feed.close().await.unwrap();
}

#[test]
fn a_feed_whose_disk_failed_or_that_was_asked_for_what_it_never_held_is_not_damaged() {
    for error in [
        FeedError::Closed,
        FeedError::Reset,
        FeedError::BeforeBase { index: 1, base: 2 },
        FeedError::Failed { reason: "".into() },
    ] {
        assert!(!error.is_damage(), "{error}");
    }
    assert!(FeedError::Undecodable { index: 1, reason: String::new() }.is_damage());
}

#[tokio::test]
async fn the_writer_is_woken_for_the_first_entry_and_for_a_record_full_of_them_and_not_for_those_between() {
    let dir = private_dir();
    let (feed, _writer) = stepped(dir.path(), limits(1 << 20, 16 << 20));
    let mut state = lock(&feed.shared.state);
    let mut take = |index, bytes: usize| state.take(items(index..=index, bytes), bytes + 64, 1 << 20);
    let half = crate::segment::writer::RECORD_PLAIN_BYTES / 2;
    assert_eq!([take(1, 100), take(2, 100), take(3, half)], [true, false, false]);
    assert_eq!([take(4, half), take(5, 100)], [true, false], "once there is a record full");
}
