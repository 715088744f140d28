//! Job: send a transaction with the next position, and take etcd's answer to it.
//! Input: a settled plan, or a position to be written. Output: a transaction in flight; the position that is held after it.
//! Edge: part of the applier, which owns all of it.
//! Always true: one transaction is in flight; what its answer leaves in doubt is forgotten, and read again before anything else.

use super::apply::Applier;
use super::lookout::lock;
use super::next;
use super::plan::{Answered, Extent, Node, Op, Request, Settled, TxnTree, answered};
use super::position::{Held, RACE_TRIES_MAX};
use super::txn::transaction;
use crate::etcd::{EtcdError, TxnOpResponse, TxnResponse, txn_revision};
use crate::failpoint;
use crate::metrics;
use crate::model::{Phase, Position, Revision};
use crate::traces;
use bytes::Bytes;
use std::future::Future;
use std::pin::Pin;
use tokio::time::Instant;

/// What a transaction needs of its user, named where etcd refuses.
const APPLY_RIGHT: &str = "read and write the link's prefixes and its position under /etcd-ferry/v1/links/";

/// What a transaction brings in beside the position.
#[derive(Clone, Copy, Default)]
pub(super) struct Load {
    /// As wholes, off the front of what waits.
    pub revisions: usize,
    /// The last of them was applied in parts.
    in_parts: bool,
    request_bytes: usize,
}

/// A transaction whose answer is not here yet.
pub(super) struct InFlight {
    pub load: Load,
    next: Position,
    started: Instant,
    pub answer: Pin<Box<dyn Future<Output = Result<TxnResponse, EtcdError>> + Send>>,
}

/// How a commit ended.
pub(super) enum Committed {
    Done,
    /// Nothing was changed: a guard of the transaction failed.
    GuardFailed,
    /// The position is not what it was held to be; it has been forgotten.
    PositionMoved,
}

/// What an operator's word makes of the position.
pub(super) struct Rewrite<T> {
    /// `None`: the position says so already.
    pub next: Option<Position>,
    /// A quarantine's record that goes with it.
    pub record: Option<Bytes>,
    pub outcome: T,
}

impl Applier {
    /// Sends a settled plan with the position that it leads to.
    pub(super) fn submit(&mut self, settled: Settled) {
        let Some(position) = self.held.as_ref().and_then(|h| h.position.as_ref()) else { return };
        let Some((last, digest)) = self.waiting.get(settled.revisions - 1) else { return };
        if matches!(settled.extent, Extent::Part { from: 0, to, of } if to < of) {
            tracing::warn!(link = %self.link, revision = %settled.revision, "a revision larger than a request is applied in parts");
        }
        let next = next::after_settled(position, &settled, (last.revision.revision, *digest));
        let load = Load {
            revisions: next::revisions_done(&settled),
            in_parts: matches!(settled.extent, Extent::Part { .. }),
            request_bytes: settled.request_bytes,
        };
        failpoint::reach("txn-made");
        self.send(load, next, settled.tree);
    }

    /// Sends a transaction without waiting for it.
    fn send(&mut self, load: Load, next: Position, tree: TxnTree) {
        let (Some(held), Some(etcd)) = (&self.held, self.etcd.clone()) else { return };
        let next = next::to_write(next, self.waymark, self.proved);
        let txn = transaction(Request::new(&self.link, held.mod_revision, &next, tree));
        let answer = Box::pin(async move { etcd.txn(txn, APPLY_RIGHT).await });
        self.in_flight = Some(InFlight { load, next, started: Instant::now(), answer });
        self.show_applying(load.revisions);
    }

    /// Takes etcd's answer to what was in flight.
    pub(super) async fn finished(&mut self, answer: Result<TxnResponse, EtcdError>) {
        let Some(InFlight { load, next, started, .. }) = self.in_flight.take() else { return };
        self.show_applying(0);
        let response = match answer {
            Ok(response) => response,
            Err(e) => {
                self.planned = None;
                // A part is of one.
                return Box::pin(self.refused(e, load.request_bytes, load.revisions.max(1))).await;
            }
        };
        failpoint::reach("txn-answered");
        match self.judge(&response, next) {
            Committed::Done => {
                failpoint::reach("txn-noted");
                if load.in_parts && load.revisions == 0 {
                    failpoint::reach("part-applied");
                }
                self.guard_failures = 0;
                self.backoff.succeeded();
                self.resumed();
                let (revisions, seconds) = (load.revisions, started.elapsed().as_secs_f64());
                tracing::trace!(link = %self.link, revisions, request_bytes = load.request_bytes, seconds, "applied");
                metrics::observe_apply(&self.link, seconds, revisions as u64);
                if let (Some(tracer), Some(now)) = (traces::tracer(), &self.expected) {
                    tracer.applied(&self.link, now.epoch, now.seq, started.elapsed());
                }
                for _ in 0..revisions {
                    self.dequeue();
                }
                self.trial.passed(revisions);
                if revisions > 0 && load.in_parts {
                    self.view.send_modify(|view| view.in_parts += 1);
                }
                self.publish(true);
            }
            Committed::GuardFailed => {
                self.guard_failures += 1;
                self.planned = None;
            }
            Committed::PositionMoved => self.retry().await,
        }
    }

    /// For the status alone: nobody is woken for it.
    fn show_applying(&self, revisions: usize) {
        self.view.send_if_modified(|view| {
            view.applying = revisions as u64;
            false
        });
    }

    /// What the answer means for the position that is held.
    fn judge(&mut self, response: &TxnResponse, next: Position) -> Committed {
        let found = if response.succeeded() { None } else { position_found(response) };
        let held = self.held.as_ref().map_or(Revision(0), |h| h.mod_revision);
        match answered(response.succeeded(), found, held) {
            Answered::Committed => {
                self.committed(next, txn_revision(response));
                Committed::Done
            }
            Answered::GuardFailed => Committed::GuardFailed,
            Answered::PositionMoved => {
                self.held = None;
                Committed::PositionMoved
            }
        }
    }

    /// etcd has a position of this applier's, since this revision of its own.
    pub(super) fn committed(&mut self, next: Position, revision: Revision) {
        let before = self.held.as_ref().and_then(|held| held.position.as_ref()).map(|p| p.state);
        if (before, next.state) == (Some(Phase::Copying), Phase::Following) {
            failpoint::reach("following-written");
        }
        self.knows(&next);
        if next.equal_revision >= self.proved {
            self.proved = Revision(0);
        }
        self.expected = Some(next.clone());
        lock(&self.own).note(revision);
        self.held = Some(Held::now(Some(next), revision));
        // Told with the position, which is published next. A part, or a piece of a repair, moves no seq and is progress too.
        self.view.send_if_modified(|view| {
            view.transactions += 1;
            false
        });
    }

    /// Makes of the position what an operator wants of it, and of no other than the one that is in etcd then: what is held may be another
    /// sidecar's past, and that one may go on writing. Nothing is in flight.
    pub(super) async fn rewrite<T>(
        &mut self,
        change: impl Fn(Option<&Position>) -> Result<Rewrite<T>, String>,
    ) -> Result<T, String> {
        // Whatever comes of it is read, and shown, like everything that others wrote.
        (self.held, self.planned, self.retry_at) = (None, None, Some(Instant::now()));
        for _ in 0..RACE_TRIES_MAX {
            if let Some(outcome) = self.try_rewrite(&change).await? {
                return Ok(outcome);
            }
        }
        Err("another applier writes the position all the time: ask again".to_owned())
    }

    /// `None`: another applier was faster.
    async fn try_rewrite<T>(
        &mut self,
        change: &impl Fn(Option<&Position>) -> Result<Rewrite<T>, String>,
    ) -> Result<Option<T>, String> {
        let (position, mod_revision, _) = self.look_at_position().await.map_err(|e| self.not_rewritten(&e))?;
        let Rewrite { next, record, outcome } = change(position.as_ref())?;
        let Some(next) = next else { return Ok(Some(outcome)) };
        let etcd = self.etcd().await.map_err(|e| self.not_rewritten(&e))?;
        let delete = record.iter().map(|key| Node::Op(Op::Delete { key: key.clone() }));
        let tree = TxnTree { guards: Vec::new(), success: delete.collect() };
        let txn = transaction(Request::new(&self.link, mod_revision, &next, tree));
        match etcd.txn(txn, APPLY_RIGHT).await {
            Ok(response) if response.succeeded() => Ok(Some(outcome)),
            Ok(_) => Ok(None),
            Err(e) => {
                let e = match &record {
                    Some(key) => e.needing(|| format!("write {} for a quarantine", key.escape_ascii())),
                    None => e,
                };
                Err(self.not_rewritten(&e))
            }
        }
    }

    fn not_rewritten(&mut self, error: &EtcdError) -> String {
        self.doubt(error);
        format!("the replica's etcd: {error}")
    }

    /// Commits at once and waits: for what is not a journal entry (a base copy, an idle position, a new term).
    pub(super) async fn commit(&mut self, next: Position, tree: TxnTree) -> Result<Committed, EtcdError> {
        debug_assert!(self.in_flight.is_none());
        self.etcd().await?;
        self.send(Load::default(), next, tree);
        let Some(in_flight) = self.in_flight.take() else {
            return Ok(Committed::PositionMoved);
        };
        match in_flight.answer.await {
            Ok(response) => {
                let committed = self.judge(&response, in_flight.next);
                if matches!(committed, Committed::Done) {
                    self.backoff.succeeded();
                    self.publish(true);
                }
                Ok(committed)
            }
            Err(e) => {
                if !e.changed_nothing() {
                    self.held = None;
                }
                Err(e)
            }
        }
    }
}

/// The position's `mod_revision`, where a compare failed; 0: there is none.
fn position_found(response: &TxnResponse) -> Option<Revision> {
    response.op_responses().into_iter().find_map(|op| match op {
        TxnOpResponse::Get(get) => {
            Some(Revision::from_etcd(get.kvs().first().map_or(0, etcd_client::KeyValue::mod_revision)))
        }
        TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
    })
}

/// What etcd says to what is in flight; with nothing in flight, never.
pub(super) async fn answer_of(in_flight: &mut Option<InFlight>) -> Result<TxnResponse, EtcdError> {
    match in_flight {
        Some(in_flight) => (&mut in_flight.answer).await,
        None => std::future::pending().await,
    }
}
