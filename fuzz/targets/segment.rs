//! Job: segment files with anything in them: rubbish for a whole file, or behind and inside of good records.
//! Input: bytes; the first two choose where they go. Output: a crash, where there is a fault.
//! Always true: a log that opens gives out its own records in order, none longer than its limit, and takes new ones.

#![no_main]

use etcd_ferry::segment::{OnDamage, SegmentLimits, SegmentLog};
use libfuzzer_sys::fuzz_target;
use std::fs;

const LIMITS: SegmentLimits = SegmentLimits { segment_bytes: 4_096, total_bytes_max: 1 << 20, record_bytes_max: 1_024 };

fuzz_target!(|data: &[u8]| {
    let [choice, at, data @ ..] = data else { return };
    let memory = std::path::Path::new("/dev/shm");
    let root = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let root = tempfile::tempdir_in(root).expect("a folder");
    // Made by the log itself: one that others may look into is refused.
    let dir = root.path().join("log");
    {
        let (mut log, _) = SegmentLog::open(&dir, LIMITS, OnDamage::Refuse, &mut |_, _| ()).expect("a new log");
        for index in 1..=20 {
            log.append(index, &[index as u8; 300]).expect("room");
        }
        log.sync().expect("a sync");
    }
    let mut files: Vec<_> = fs::read_dir(&dir).expect("it is there").flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "segment"));
    files.sort();
    let path = &files[usize::from(*choice >> 1) % files.len()];
    let mut held = fs::read(path).expect("a segment");
    if choice & 1 == 0 {
        held = data.to_vec();
    } else {
        let at = usize::from(*at) * 16 % held.len();
        for (byte, patch) in held[at..].iter_mut().zip(data) {
            *byte ^= patch;
        }
    }
    fs::write(path, held).expect("it can be written");
    let mut shown = 0;
    let mut visit = |_: u64, payload: &[u8]| {
        assert!(payload.len() <= LIMITS.record_bytes_max);
        shown += 1;
    };
    let Ok((mut log, _)) = SegmentLog::open(&dir, LIMITS, OnDamage::SetAside, &mut visit) else { return };
    let last = log.last_index();
    let mut reader = log.read_after(log.base());
    let (mut before, mut payload) = (log.base(), Vec::new());
    while let Ok(Some(index)) = reader.next(last, &mut payload) {
        assert!(index > before && payload.len() <= LIMITS.record_bytes_max);
        before = index;
    }
    // What is read back afterwards is what was shown, or an error says that the file changed.
    assert!(shown <= 256);
    if let Some(next) = last.checked_add(1) {
        log.append(next, b"new").expect("it goes on");
    }
});
