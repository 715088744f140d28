//! Job: what the segment files cost: records appended with a sync for each and for 64 of them, and read again.
//! Input: criterion's arguments; the disk under the temporary folder. Output: criterion's report.
//! Always true: a record counts when it is synced.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use etcd_ferry::segment::{OnDamage, SegmentLimits, SegmentLog};
use std::path::Path;

const RECORD_BYTES: usize = 1_024;
const READ_RECORDS: u64 = 10_000;

fn open(dir: &Path) -> SegmentLog {
    let limits = SegmentLimits { segment_bytes: 64 << 20, total_bytes_max: 8 << 30, record_bytes_max: 1 << 20 };
    SegmentLog::open(dir, limits, OnDamage::SetAside, &mut |_, _| {}).expect("a fresh folder").0
}

fn append(c: &mut Criterion) {
    for each in [1_u64, 64] {
        let mut group = c.benchmark_group("segment");
        group.throughput(Throughput::Bytes(each * RECORD_BYTES as u64));
        group.bench_function(format!("append {each}, then sync"), |b| {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let mut log = open(&folder.path().join("log"));
            let payload = vec![7; RECORD_BYTES];
            let mut index = 0;
            b.iter(|| {
                for _ in 0..each {
                    index += 1;
                    log.append(index, &payload).expect("the disk has room");
                }
                log.sync().expect("the disk syncs");
            });
        });
        group.finish();
    }
}

fn read(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut log = open(&folder.path().join("log"));
    for index in 1..=READ_RECORDS {
        log.append(index, &vec![7; RECORD_BYTES]).expect("the disk has room");
    }
    log.sync().expect("the disk syncs");
    let mut group = c.benchmark_group("segment");
    group.throughput(Throughput::Bytes(READ_RECORDS * RECORD_BYTES as u64));
    group.bench_function("read 10,000 records", |b| {
        b.iter(|| {
            let (mut reader, mut payload, mut read) = (log.read_after(0), Vec::new(), 0);
            while reader.next(READ_RECORDS, &mut payload).expect("a sound log").is_some() {
                read += payload.len();
            }
            read
        });
    });
    group.finish();
}

criterion_group!(benches, append, read);
criterion_main!(benches);
