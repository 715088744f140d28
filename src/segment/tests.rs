//! Job: tests of the segment files: what is written is read again, damage is noticed, errors leave the log usable.
//! Input: temporary directories. Output: passes or fails.
//! Always true: no test waits for time.

use super::*;
use std::collections::BTreeMap;

fn limits() -> SegmentLimits {
    SegmentLimits { segment_bytes: 4096, total_bytes_max: 64 * 1024, record_bytes_max: 16 * 1024 }
}

type Records = BTreeMap<u64, Vec<u8>>;

fn open(dir: &Path, on_damage: OnDamage) -> Result<(SegmentLog, Opened, Records), SegmentError> {
    let mut seen = Records::new();
    let (log, opened) = SegmentLog::open(dir, limits(), on_damage, &mut |index, payload| {
        seen.insert(index, payload.to_vec());
    })?;
    Ok((log, opened, seen))
}

fn payload(index: u64, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| u8::try_from((at as u64 * 31 + index * 7) % 251).unwrap_or(0) + 1).collect()
}

fn fill(log: &mut SegmentLog, indexes: impl Iterator<Item = u64>, bytes: usize) -> Records {
    let records: Records = indexes.map(|index| (index, payload(index, bytes))).collect();
    for (index, payload) in &records {
        log.append(*index, payload).unwrap_or_else(|error| panic!("{error}"));
    }
    log.sync().unwrap_or_else(|error| panic!("{error}"));
    records
}

fn read_all(log: &SegmentLog, after: u64) -> Result<Records, SegmentError> {
    let (mut reader, mut payload, mut records) = (log.read_after(after), Vec::new(), Records::new());
    while let Some(index) = reader.next(log.last_index(), &mut payload)? {
        records.insert(index, payload.clone());
    }
    Ok(records)
}

fn private_dir() -> tempfile::TempDir {
    let only_we = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    tempfile::Builder::new().permissions(only_we).tempdir().unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn what_was_appended_is_read_again_by_a_reader_and_after_a_restart() {
    let dir = private_dir();
    let (mut log, opened, seen) = open(dir.path(), OnDamage::Refuse).unwrap();
    assert!(seen.is_empty() && opened == Opened::default());
    let written = fill(&mut log, (1..200).map(|n| n * 3), 300);
    assert!(log.files.len() > 10, "the records fill many files");
    assert!(read_all(&log, 0).unwrap() == written);
    assert!(read_all(&log, 300).unwrap().into_iter().eq(written.clone().split_off(&301)));
    drop(log);
    let (log, opened, seen) = open(dir.path(), OnDamage::Refuse).unwrap();
    assert!((seen, opened) == (written, Opened::default()));
    assert_eq!((log.base(), log.last_index()), (0, 597));
}

#[test]
fn a_reader_goes_on_when_more_is_appended_behind_it() {
    let dir = private_dir();
    let (mut log, _, _) = open(dir.path(), OnDamage::Refuse).unwrap();
    let (mut reader, mut got) = (log.read_after(0), Vec::new());
    for index in 1..100 {
        fill(&mut log, index..=index, 100);
        assert_eq!(reader.next(index, &mut got).unwrap(), Some(index));
        assert_eq!(got, payload(index, 100));
        assert_eq!(reader.next(index, &mut got).unwrap(), None);
    }
}

#[test]
fn an_index_that_does_not_grow_is_refused() {
    let dir = private_dir();
    let (mut log, _, _) = open(dir.path(), OnDamage::Refuse).unwrap();
    fill(&mut log, 1..=5, 10);
    assert!(matches!(log.append(5, b"again"), Err(SegmentError::OutOfOrder { index: 5, last: 5 })));
    assert!(matches!(log.append(6, &vec![1; 16 * 1024 + 1]), Err(SegmentError::RecordTooLong { .. })));
    log.append(6, &vec![1; 16 * 1024]).unwrap();
    assert_eq!(read_all(&log, 5).unwrap().len(), 1, "a record longer than a file has one of its own");
}

/// In memory where there is such a place: for tests that open a log thousands of times, each with its syncs.
fn dir_in_memory() -> tempfile::TempDir {
    let only_we = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    let in_memory = tempfile::Builder::new().permissions(only_we).tempdir_in("/dev/shm");
    in_memory.unwrap_or_else(|_| private_dir())
}

/// A log of four records and a little padding, in one file.
fn small_file(dir: &Path) -> (PathBuf, Records) {
    let limits = SegmentLimits { segment_bytes: 256, ..limits() };
    let opened = SegmentLog::open(dir, limits, OnDamage::Refuse, &mut |_, _| {});
    let (mut log, _) = opened.unwrap_or_else(|error| panic!("{error}"));
    let written = fill(&mut log, 1..=4, 24);
    (log.active_path(), written)
}

#[test]
fn every_flipped_bit_is_noticed_and_no_altered_record_is_given_out() {
    let dir = dir_in_memory();
    let (path, written) = small_file(dir.path());
    let good = fs::read(&path).unwrap();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bad).unwrap();
        let (log, opened, seen) = open(dir.path(), OnDamage::Refuse).unwrap();
        assert_eq!(opened.cuts.len(), 1, "bit {bit} was not noticed");
        assert!(opened.cuts[0].bytes > 0, "bit {bit}");
        assert!(seen.iter().all(|(index, payload)| written.get(index) == Some(payload)), "bit {bit} got through");
        drop(log);
        let (_, opened, seen_again) = open(dir.path(), OnDamage::Refuse).unwrap();
        assert!((opened, seen_again) == (Opened::default(), seen), "bit {bit} was not mended");
        fs::remove_file(&path).unwrap_or(());
    }
}

#[test]
fn every_truncation_is_noticed() {
    let dir = dir_in_memory();
    let (path, written) = small_file(dir.path());
    let good = fs::read(&path).unwrap();
    for bytes in 0..good.len() {
        fs::write(&path, &good[..bytes]).unwrap();
        let (_, opened, seen) = open(dir.path(), OnDamage::Refuse).unwrap();
        assert_eq!(opened.cuts.len(), 1, "a cut at {bytes} was not noticed");
        assert!(seen.iter().all(|(index, payload)| written.get(index) == Some(payload)), "cut at {bytes}");
    }
}

#[test]
fn damage_before_newer_records_is_refused_or_set_aside_with_everything_after_it() {
    let dir = private_dir();
    let (mut log, _, _) = open(dir.path(), OnDamage::Refuse).unwrap();
    let written = fill(&mut log, 1..=60, 300);
    let third = file_path(dir.path(), log.files[2].number);
    let (after, files) = (log.files[2].after, log.files.len());
    drop(log);
    let mut bytes = fs::read(&third).unwrap();
    bytes[48 + 316 * 2 + 20] ^= 4; // in the third file's third record
    fs::write(&third, &bytes).unwrap();
    let offset = 48 + 316 * 2;
    match open(dir.path(), OnDamage::Refuse) {
        Err(SegmentError::Damaged { file, offset: at }) => assert_eq!((file, at), (third.clone(), offset)),
        other => panic!("{other:?}"),
    }
    let (mut log, opened, seen) = open(dir.path(), OnDamage::SetAside).unwrap();
    assert!(seen.iter().eq(written.range(..=after + 2)));
    assert_eq!(fs::read_dir(opened.set_aside.unwrap()).unwrap().count(), files - 2);
    assert_eq!(log.last_index(), after + 2);
    fill(&mut log, after + 3..=after + 30, 300);
    drop(log);
    let (_, opened, seen) = open(dir.path(), OnDamage::Refuse).unwrap();
    assert_eq!((opened, seen.len() as u64), (Opened::default(), after + 30));
}

#[test]
fn a_missing_file_is_noticed() {
    let dir = private_dir();
    let (mut log, _, _) = open(dir.path(), OnDamage::Refuse).unwrap();
    fill(&mut log, 1..=60, 300);
    fs::remove_file(file_path(dir.path(), log.files[2].number)).unwrap();
    drop(log);
    assert!(matches!(open(dir.path(), OnDamage::Refuse), Err(SegmentError::Damaged { .. })));
}

#[test]
fn rubbish_in_the_padding_of_an_earlier_file_is_noticed_and_costs_no_record() {
    let dir = private_dir();
    let (mut log, _, _) = open(dir.path(), OnDamage::Refuse).unwrap();
    let written = fill(&mut log, 1..=60, 300);
    let first = file_path(dir.path(), log.files[0].number);
    drop(log);
    let mut bytes = fs::read(&first).unwrap();
    bytes[4095] = 1;
    fs::write(&first, &bytes).unwrap();
    let (_, opened, seen) = open(dir.path(), OnDamage::Refuse).unwrap();
    assert!((opened.cuts.len(), seen) == (1, written));
}

#[test]
fn trimming_unlinks_whole_files_and_what_is_left_says_where_it_begins() {
    let dir = private_dir();
    let (mut log, _, _) = open(dir.path(), OnDamage::Refuse).unwrap();
    fill(&mut log, 1..=60, 300);
    let bytes = log.bytes();
    assert!(log.trim(30).unwrap());
    assert!(log.base() <= 30 && log.base() > 15, "base {}", log.base());
    assert!(log.bytes() < bytes * 7 / 10);
    let base = log.base();
    assert!(matches!(read_all(&log, base - 1), Err(SegmentError::BeforeBase { .. })));
    assert_eq!(read_all(&log, base).unwrap().len() as u64, 60 - base);
    log.trim(60).unwrap();
    drop(log);
    let (mut log, opened, _) = open(dir.path(), OnDamage::Refuse).unwrap();
    assert_eq!((opened, log.last_index()), (Opened::default(), 60), "an empty log knows where it stands");
    fill(&mut log, 61..=61, 300);
    assert!(!log.trim(61).unwrap(), "a file that is hardly used stays");
}

#[test]
fn clearing_drops_everything_and_a_crash_in_the_middle_is_finished_at_the_next_start() {
    let dir = private_dir();
    let (mut log, _, _) = open(dir.path(), OnDamage::Refuse).unwrap();
    fill(&mut log, 100..=160, 300);
    let first = file_path(dir.path(), log.files[0].number);
    let bytes = fs::read(&first).unwrap();
    log.clear(7, 40).unwrap();
    assert_eq!((log.base(), log.last_index(), log.tag()), (40, 40, 7));
    fill(&mut log, 41..=42, 10);
    drop(log);
    fs::write(&first, &bytes).unwrap(); // as if the crash had come before this file was unlinked
    let (log, opened, seen) = open(dir.path(), OnDamage::Refuse).unwrap();
    assert_eq!((opened, log.tag(), log.base()), (Opened::default(), 7, 40));
    assert_eq!(seen.into_keys().collect::<Vec<_>>(), [41, 42]);
}

#[test]
fn a_directory_that_others_may_enter_or_another_log_holds_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = private_dir();
    let inner = dir.path().join("a/b");
    let (log, _, _) = open(&inner, OnDamage::Refuse).unwrap();
    assert_eq!(fs::metadata(&inner).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(log.active_path()).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(open(&inner, OnDamage::Refuse), Err(SegmentError::InUse { .. })));
    drop(log);
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o750)).unwrap();
    let refused = open(&inner, OnDamage::Refuse).unwrap_err().to_string();
    assert!(refused.contains("750") && refused.contains("chmod 700"), "{refused}");
}

#[test]
fn a_closed_log_can_be_opened_again_though_a_process_being_started_holds_a_copy_of_its_descriptors() {
    let dir = private_dir();
    let (log, _, _) = open(dir.path(), OnDamage::Refuse).unwrap();
    let copy = log._lock.0.try_clone().unwrap();
    assert!(matches!(open(dir.path(), OnDamage::Refuse), Err(SegmentError::InUse { .. })));
    drop(log);
    open(dir.path(), OnDamage::Refuse).unwrap();
    drop(copy);
}

#[test]
fn a_file_that_cannot_be_read_is_damage_unless_the_process_lacks_descriptors_or_memory() {
    let io = |source| SegmentError::Io { what: "reading", path: PathBuf::from("a"), source };
    for errno in [Errno::IO, Errno::NOENT] {
        assert!(io(errno.into()).is_damage(), "{errno}");
    }
    for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
        assert!(!io(errno.into()).is_damage(), "{errno}");
    }
    assert!(SegmentError::Damaged { file: PathBuf::from("a"), offset: 7 }.is_damage());
    assert!(!SegmentError::InDoubt { path: PathBuf::from("a") }.is_damage());
}
