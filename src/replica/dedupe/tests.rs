//! Job: tests of the dedupe log: its life cycle, damage, restarts, trimming.
//! Input: temporary folders. Output: passes or fails.
//! Always true: no test waits for time.

use super::db::{Entry, RECENT_MAX, read_key};
use super::*;

fn private_dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
    let inner = dir.path().join("dedupe");
    (dir, inner)
}

fn digest(seq: u64) -> Digest {
    Digest((u128::from(seq) * 0x0123_4567_89ab_cdef).to_le_bytes())
}

fn noted(seqs: impl Iterator<Item = u64>) -> Vec<Noted> {
    seqs.map(|seq| (Seq(seq), digest(seq), Revision(seq + 100))).collect()
}

fn seqs(opened: &Opened) -> Vec<u64> {
    opened.recent.iter().map(|(_, seq, _)| seq.0).collect()
}

fn db(dir: &Path) -> Db {
    guarded(|| Db::open(dir)).unwrap_or_else(|error| panic!("{error}")).0
}

#[tokio::test]
async fn what_was_noted_is_there_after_a_restart_in_the_order_of_epoch_and_seq() {
    let (_keep, dir) = private_dir();
    let (dedupe, opened) = Dedupe::open(&dir).await.unwrap();
    assert_eq!(opened, Opened::default());
    dedupe.note(Epoch(2), noted(1..=3)).unwrap();
    dedupe.note(Epoch(1), noted(250..=5000)).unwrap();
    dedupe.done_through(Epoch(2), Seq(2)).unwrap();
    dedupe.done_through(Epoch(1), Seq(7)).unwrap();
    dedupe.close().await.unwrap();
    assert!(matches!(dedupe.note(Epoch(2), noted(4..=4)), Err(DedupeError::Closed)));
    let (dedupe, opened) = Dedupe::open(&dir).await.unwrap();
    let newest: Vec<u64> = (250..=5000).chain(1..=3).collect();
    assert_eq!(seqs(&opened), newest[newest.len() - RECENT_MAX..]);
    assert!(opened.recent.iter().all(|(_, seq, kept)| *kept == digest(seq.0)));
    assert!(!opened.moved_aside);
    dedupe.close().await.unwrap();
    assert_eq!(db(&dir).done, (Epoch(2), Seq(2)));
}

/// A log whose thread hangs in its disk: the caller has what it would be told.
fn hung() -> (Dedupe, Receiver<Call>) {
    let (calls, called) = sync_channel(CALLS_MAX);
    (Dedupe { calls, places: Arc::new(Semaphore::new(CALLS_MAX)), behind: AtomicBool::new(false) }, called)
}

#[tokio::test]
async fn nobody_waits_for_a_disk_that_hangs_and_what_found_a_place_is_noted_once_it_goes_on() {
    let (dedupe, called) = hung();
    for seq in 1..=CALLS_MAX as u64 {
        dedupe.note(Epoch(1), noted(seq..=seq)).unwrap();
    }
    assert!(matches!(dedupe.note(Epoch(1), noted(900..=900)), Err(DedupeError::Behind)));
    assert!(matches!(dedupe.done_through(Epoch(1), Seq(7)), Err(DedupeError::Behind)));
    let (_keep, dir) = private_dir();
    let (log, _) = Log::open(&dir).unwrap();
    let places = Arc::clone(&dedupe.places);
    let serving = std::thread::spawn(move || serve(log, &called, &places));
    dedupe.note_again(Epoch(1), noted(901..=901)).await.unwrap();
    dedupe.close().await.unwrap();
    serving.join().unwrap();
    let (dedupe, opened) = Dedupe::open(&dir).await.unwrap();
    assert_eq!(seqs(&opened), (1..=CALLS_MAX as u64).chain([901]).collect::<Vec<u64>>());
    dedupe.close().await.unwrap();
}

#[tokio::test]
async fn one_that_cannot_be_read_is_moved_aside_and_two_such_are_kept() {
    let (keep, dir) = private_dir();
    for round in 0..4 {
        let (dedupe, _) = Dedupe::open(&dir).await.unwrap();
        dedupe.note(Epoch(1), noted(1..=500)).unwrap();
        dedupe.close().await.unwrap();
        let mut bytes = fs::read(dir.join("db")).unwrap();
        for at in (100..bytes.len()).step_by(97) {
            bytes[at] ^= 0xff;
        }
        fs::write(dir.join("db"), bytes).unwrap();
        fs::remove_file(dir.join("conf")).unwrap();
        fs::write(dir.join("conf"), b"rubbish").unwrap();
        let (dedupe, opened) = Dedupe::open(&dir).await.unwrap();
        assert_eq!(opened, Opened { moved_aside: true, ..Opened::default() }, "round {round}");
        dedupe.note(Epoch(1), noted(1..=5)).unwrap();
        dedupe.close().await.unwrap();
        let kept = fs::read_dir(keep.path()).unwrap().count() - 1;
        assert_eq!(kept, (round + 1).min(MOVED_ASIDE_MAX));
        fs::remove_dir_all(&dir).unwrap();
    }
}

#[tokio::test]
async fn a_panic_in_the_middle_starts_it_afresh_and_it_goes_on() {
    let (keep, dir) = private_dir();
    let (mut log, _) = Log::open(&dir).unwrap();
    log.try_do(|db| db.note(Epoch(1), &noted(1..=5)));
    log.try_do(|_| panic!("as sled does"));
    log.try_do(|db| db.note(Epoch(1), &noted(6..=7)));
    log.try_do(Db::sync);
    log.drop_db();
    let (dedupe, opened) = Dedupe::open(&dir).await.unwrap();
    assert_eq!(seqs(&opened), [6, 7]);
    assert_eq!(fs::read_dir(keep.path()).unwrap().count(), 2);
    dedupe.close().await.unwrap();
}

#[test]
fn a_value_with_any_flipped_bit_is_noticed() {
    let (_keep, dir) = private_dir();
    fs::create_dir(&dir).unwrap();
    let mut db = db(&dir);
    db.note(Epoch(1), &noted(7..=7)).unwrap();
    let (key, good) = db.db.first().unwrap().unwrap();
    assert!(Entry::read(&key, &good).is_some());
    for bit in 0..good.len() * 8 {
        let mut bad = good.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Entry::read(&key, &bad).is_none(), "bit {bit}");
    }
}

#[test]
fn the_oldest_go_by_count_and_age_once_they_are_done_and_never_more_than_twice_the_count_stay() {
    let (_keep, dir) = private_dir();
    fs::create_dir(&dir).unwrap();
    let mut db = db(&dir);
    db.entries_max = 200;
    let held = |db: &Db| {
        let keys = db.db.iter().keys().filter_map(|key| read_key(&key.unwrap())).map(|(_, seq)| seq.0);
        let keys: Vec<u64> = keys.collect();
        assert_eq!(db.entries, keys.len() as u64);
        (keys[0], keys.len())
    };
    let note = |db: &mut Db, seq: u64| {
        db.note(Epoch(1), &noted(seq..=seq)).unwrap();
        db.trim().unwrap();
    };
    (1..=300).for_each(|seq| note(&mut db, seq));
    assert_eq!(held(&db), (1, 300), "what is not done stays");
    (301..=450).for_each(|seq| note(&mut db, seq));
    assert_eq!(held(&db), (51, 400), "but not without a bound");
    db.done_through(Epoch(1), Seq(400)).unwrap();
    note(&mut db, 451);
    note(&mut db, 452);
    assert_eq!(held(&db), (253, 200), "in batches, down to the count");
    db.age_ms_max = 0;
    let noted_at = now_ms();
    while now_ms() == noted_at {
        std::hint::spin_loop();
    }
    (453..=460).for_each(|seq| note(&mut db, seq));
    assert_eq!(held(&db).0, 401, "what is done and old goes, the rest stays");
}

#[tokio::test]
async fn what_was_refused_is_known_after_a_restart_until_it_is_done_or_given_up() {
    let (_keep, dir) = private_dir();
    let (dedupe, _) = Dedupe::open(&dir).await.unwrap();
    dedupe.note(Epoch(1), noted(1..=9)).unwrap();
    dedupe.done_through(Epoch(1), Seq(5)).unwrap();
    for (seq, refusals) in [(3, 1), (6, 3), (6, 2), (77, 1)] {
        dedupe.state(Epoch(1), Seq(seq), SeqState::Failed { refusals }).unwrap();
    }
    dedupe.close().await.unwrap();
    let (dedupe, opened) = Dedupe::open(&dir).await.unwrap();
    assert_eq!(opened.failed, Some((Epoch(1), Seq(6), 3)), "not what is done, nor what was never noted");
    assert_eq!(seqs(&opened), (1..=9).collect::<Vec<u64>>(), "each keeps its digest");
    assert!(opened.recent.iter().all(|(_, seq, kept)| *kept == digest(seq.0)));
    dedupe.state(Epoch(1), Seq(6), SeqState::Quarantined).unwrap();
    dedupe.state(Epoch(1), Seq(6), SeqState::Failed { refusals: 9 }).unwrap();
    dedupe.close().await.unwrap();
    let (dedupe, opened) = Dedupe::open(&dir).await.unwrap();
    assert_eq!(opened.failed, None);
    dedupe.close().await.unwrap();
}
