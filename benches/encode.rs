//! Job: what encode, decode and plan cost on Kubernetes-like objects, one revision a frame and 64.
//! Input: criterion's arguments. Output: its report.
//! Always true: each round encodes other versions than the one before, so that no frame is made twice.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use etcd_ferry::demo::objects;
use etcd_ferry::model::{Change, Digest, Epoch, LinkName, Ranges, Revision, Seq, Term, WholeRevision};
use etcd_ferry::replica::plan::{Begun, RequestLimits, Waiting, plan};
use etcd_ferry::wire::digest;
use etcd_ferry::wire::frame::FrameLimits;
use etcd_ferry::wire::window::{Decoder, Encoder, WindowLimits};
use std::sync::Arc;

const OBJECTS: u64 = 1_000;
const VALUE_BYTES: usize = 1_024;

fn limits() -> WindowLimits {
    WindowLimits { window_bytes_max: 16 << 20, frame: FrameLimits::new(256 << 20) }
}

/// Revision `at` puts one object; all objects in turn.
fn revision(at: u64) -> Arc<WholeRevision> {
    let key = objects::key("/registry/", at % OBJECTS);
    let value = objects::value(at % OBJECTS, at, VALUE_BYTES);
    Arc::new(WholeRevision { revision: Revision(at + 1), changes: vec![Change::Put { key, value }] })
}

/// A stream whose window holds every object.
struct Stream {
    encoder: Encoder,
    decoder: Decoder,
    next: u64,
}

impl Stream {
    fn warm() -> Self {
        let mut stream = Self { encoder: Encoder::new(limits(), 1), decoder: Decoder::new(limits()), next: 0 };
        for _ in 0..OBJECTS / 50 {
            let frame = stream.frame(50);
            stream.decoder.decode(&frame).expect("our own frame");
        }
        stream
    }

    fn revisions(&mut self, count: u64) -> (Seq, Vec<Arc<WholeRevision>>, Vec<Digest>) {
        let first = self.next;
        self.next += count;
        let revisions: Vec<Arc<WholeRevision>> = (first..self.next).map(revision).collect();
        let digests = revisions.iter().map(|r| digest::of_revision(r)).collect();
        (Seq(first + 1), revisions, digests)
    }

    fn frame(&mut self, count: u64) -> bytes::Bytes {
        let (first, revisions, digests) = self.revisions(count);
        self.encoder.encode(Epoch(1), Term(0), first, &revisions, &digests)
    }
}

fn wire(c: &mut Criterion) {
    for count in [1, 64] {
        let mut group = c.benchmark_group(format!("{count} revisions a frame"));
        group.throughput(Throughput::Bytes(count * VALUE_BYTES as u64));
        group.bench_function("encode", |b| {
            let mut stream = Stream::warm();
            b.iter_custom(|rounds| {
                let mut spent = std::time::Duration::ZERO;
                for _ in 0..rounds {
                    let (first, revisions, digests) = stream.revisions(count);
                    let began = std::time::Instant::now();
                    std::hint::black_box(stream.encoder.encode(Epoch(1), Term(0), first, &revisions, &digests));
                    spent += began.elapsed();
                }
                spent
            });
        });
        group.bench_function("decode", |b| {
            let mut stream = Stream::warm();
            b.iter_custom(|rounds| {
                let mut spent = std::time::Duration::ZERO;
                for _ in 0..rounds {
                    let frame = stream.frame(count);
                    let began = std::time::Instant::now();
                    std::hint::black_box(stream.decoder.decode(&frame).expect("our own frame"));
                    spent += began.elapsed();
                }
                spent
            });
        });
        group.bench_function("digest", |b| {
            let revisions: Vec<Arc<WholeRevision>> = (0..count).map(revision).collect();
            b.iter(|| revisions.iter().map(|r| digest::of_revision(r)).collect::<Vec<_>>());
        });
        group.finish();
    }
}

fn plans(c: &mut Criterion) {
    let link = LinkName::new("config").expect("a good name");
    let limits = RequestLimits {
        ops_max: 128,
        bytes_max: 1_572_864,
        bytes_refused: None,
        position_key_bytes: link.position_key().len(),
        position_value_bytes_max: 700,
    };
    let ranges = Ranges::new(&[], &[]);
    for count in [1_u64, 1_000] {
        let waiting: Vec<Waiting> = (0..count).map(|at| Waiting { seq: Seq(at + 1), revision: revision(at) }).collect();
        let mut group = c.benchmark_group("plan");
        group.throughput(Throughput::Elements(count));
        group.bench_function(format!("{count} waiting revisions"), |b| {
            b.iter_batched(
                || waiting.clone(),
                |waiting| {
                    let plan =
                        plan(&waiting, Begun::default(), &ranges, &limits).expect("it fits").expect("something waits");
                    plan.settle(&[], &limits).expect("it fits")
                },
                BatchSize::SmallInput,
            );
        });
        group.finish();
    }
}

criterion_group!(benches, wire, plans);
criterion_main!(benches);
