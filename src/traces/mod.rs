//! Job: spans of each nth revision, from the origin's watch to the replica's etcd, for a collector that speaks OTLP.
//! Input: what the stages say of a frame, a transaction, an ack. Output: spans, to the task that exports them.
//! Edge: the process has one tracer, or none; it reads the clock.
//! Always true: without `[traces]` each call is one look whether there is a tracer; with it, no stage ever waits for a collector.

mod book;
mod export;
mod span;

use crate::certs::load::LoadError;
use crate::config::TracesConfig;
use crate::metrics;
use crate::model::{Epoch, LinkName, Revision, Seq};
use book::{Book, Framed};
use export::Exporter;
use span::{Span, Traced, sampled};
use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// Spans that wait for the next export: some 1 MiB; at 200 revisions a second and one in ten sampled, ten seconds.
const QUEUE_MAX: usize = 4_096;

static TRACER: OnceLock<Tracer> = OnceLock::new();

#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    #[error("traces are on already in this process")]
    Taken,
    #[error(transparent)]
    Ca(#[from] LoadError),
    #[error("{endpoint} cannot be a collector's: {reason}")]
    Endpoint { endpoint: String, reason: String },
}

/// What takes note of sampled revisions.
pub struct Tracer {
    sample: NonZeroU64,
    book: Mutex<Book>,
    spans: mpsc::Sender<Span>,
}

/// Sets up the process' tracer; what it returns is to be run.
pub fn install(config: &TracesConfig, region: &str, node: &str) -> Result<Exporter, TracesError> {
    let (spans, queue) = mpsc::channel(QUEUE_MAX);
    let exporter = Exporter::new(config, region, node, queue)?;
    let tracer = Tracer { sample: config.sample, book: Mutex::default(), spans };
    TRACER.set(tracer).map_err(|_| TracesError::Taken)?;
    Ok(exporter)
}

/// `None`: no traces are wanted.
pub fn tracer() -> Option<&'static Tracer> {
    TRACER.get()
}

/// Nanoseconds of Unix time.
pub fn now_ns() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}

impl Tracer {
    /// A frame was made at the origin of revisions that were read at `read_ns`; of each, its revision and when it arrived, in milliseconds.
    pub fn framed(&self, link: &LinkName, epoch: Epoch, first: Seq, revisions: &[(Revision, u64)], read_ns: u64) {
        let Some(last) = (revisions.len() as u64).checked_sub(1).map(|more| Seq(first.0.saturating_add(more))) else {
            return;
        };
        let encoded_ns = now_ns();
        for seq in sampled(self.sample, first, last) {
            let at = usize::try_from(seq.0 - first.0).ok().and_then(|at| revisions.get(at));
            let Some((revision, arrived_ms)) = at.copied() else { continue };
            let arrived_ns = arrived_ms.saturating_mul(1_000_000);
            let framed = Framed { revision, arrived_ns, read_ns, encoded_ns };
            let spans = self.book().framed(traced(link, epoch, seq), framed);
            self.send(spans);
        }
    }

    /// An ack, at the origin.
    pub fn heard(&self, link: &LinkName, epoch: Epoch, received: Seq, applied: Seq) {
        let spans = self.book().heard(link, epoch, received, applied, now_ns());
        self.send(spans);
    }

    /// A frame's new part, at the replica; `came_ns`: when the frame came.
    pub fn received<'e>(
        &self,
        link: &LinkName,
        revisions: impl Iterator<Item = (Epoch, Seq, Revision)> + 'e,
        came_ns: u64,
    ) {
        for (epoch, seq, revision) in revisions.filter(|(_, seq, _)| seq.0 % self.sample == 0) {
            self.book().received(traced(link, epoch, seq), revision, came_ns);
        }
    }

    /// The journal has taken these.
    pub fn journaled(&self, link: &LinkName, epoch: Epoch, seqs: RangeInclusive<Seq>) {
        let now_ns = now_ns();
        for seq in sampled(self.sample, *seqs.start(), *seqs.end()) {
            let span = self.book().journaled(&traced(link, epoch, seq), now_ns);
            self.send(span);
        }
    }

    /// A transaction that took so long has brought the position to `through`.
    pub fn applied(&self, link: &LinkName, epoch: Epoch, through: Seq, took: Duration) {
        let now_ns = now_ns();
        let began_ns = now_ns.saturating_sub(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        let spans = self.book().applied(link, epoch, through, began_ns, now_ns);
        self.send(spans);
    }

    /// The origin was sent the word that everything up to `applied` is.
    pub fn acknowledged(&self, link: &LinkName, epoch: Epoch, applied: Seq) {
        let spans = self.book().acknowledged(link, epoch, applied, now_ns());
        self.send(spans);
    }

    /// Held for a few steps in memory, never while anything is waited for.
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, spans: impl IntoIterator<Item = Span>) {
        let full = spans.into_iter().filter_map(|span| self.spans.try_send(span).err()).count();
        let dropped = full as u64 + self.book().forgotten();
        if dropped > 0 {
            metrics::count_dropped_spans(dropped);
        }
    }
}

fn traced(link: &LinkName, epoch: Epoch, seq: Seq) -> Traced {
    Traced { link: link.clone(), epoch, seq }
}
