//! Job: the replica's half of a base copy: count what it would delete, then bring the ranges to the origin's pages.
//! Input: copy steps from the stream, what the replica holds. Output: transactions with the cursor that they reach; a `CopyAck`.
//! Always true: nothing is written before the guards passed; what is equal is not written; the cursor moves with the keys, in one transaction.

use super::apply::Applier;
use super::commit::Committed;
use super::next;
use super::pages::{Begin, Begun, Copying, Place, Refused, check, read_edge};
use super::plan::{GuardCount, LimitRefusal, PlanError, PlanReaction, TxnTree, copy_chunks, copy_diff};
use super::position::Held;
use crate::etcd::{Columns, EtcdError};
use crate::failpoint;
use crate::model::{KeyRange, Phase, Position, Revision, Seq};
use crate::wire::digest;
use crate::wire::parts::part_of;
use crate::wire::replicate::CopyAck;
use crate::wire::replicate::refusal::Kind;
use bytes::Bytes;

/// Keys of the replica that are compared at once; the origin's page may be sparser than the replica's range.
const PRESENT_KEYS_MAX: usize = 2_000;
const PRESENT_KEYS_FIRST: usize = 64;

/// One message of a base copy, decoded.
pub enum CopyStep {
    Begin(Begin),
    Keys { range: KeyRange, keys: Vec<Bytes>, last: bool },
    Page { range: KeyRange, revision: Revision, kvs: Vec<(Bytes, Bytes)> },
    End { anchor_revision: Revision },
}

enum StepError {
    Etcd(EtcdError),
    Refused(Kind, String),
    Limits(EtcdError, LimitRefusal),
}

impl From<EtcdError> for StepError {
    fn from(error: EtcdError) -> Self {
        StepError::Etcd(error)
    }
}

impl From<Refused> for StepError {
    fn from((kind, reason): Refused) -> Self {
        StepError::Refused(kind, reason)
    }
}

impl From<PlanError> for StepError {
    fn from(error: PlanError) -> Self {
        let kind = match error.reaction() {
            PlanReaction::Stop(kind) => kind,
            PlanReaction::HelloAgain | PlanReaction::PlanAgain => Kind::Gap,
        };
        StepError::Refused(kind, error.to_string())
    }
}

impl Applier {
    /// Does one step; what etcd refuses for now is tried again until a new session takes the link.
    pub(super) async fn copy_step(&mut self, step: CopyStep) {
        loop {
            let error = match Box::pin(self.try_step(&step)).await {
                Ok(()) => {
                    self.backoff.succeeded();
                    self.view.send_modify(|view| view.waiting.clear());
                    return;
                }
                Err(StepError::Refused(kind, reason)) => {
                    tracing::warn!(link = %self.link, %reason, "the base copy stops");
                    self.copying = None;
                    return self.refuse(kind, reason);
                }
                Err(StepError::Limits(error, refusal)) => match self.learned(refusal) {
                    Some(limits) => {
                        self.limits = limits;
                        continue;
                    }
                    None => return self.refuse(Kind::TooLarge, error.to_string()),
                },
                Err(StepError::Etcd(error)) => error,
            };
            self.doubt(&error);
            let wait = self.backoff.after_failure(rand::random());
            let taken = self.hello_taken;
            let hello_came = tokio::select! {
                biased;
                _ = self.hello_waiting.wait_for(|latest| *latest > taken) => true,
                () = tokio::time::sleep(wait) => false,
            };
            if hello_came {
                // It must be answered before the wait is over; its stream begins the step again.
                return self.refuse(Kind::Closing, "a hello came while the base copy waited".to_owned());
            }
        }
    }

    async fn try_step(&mut self, step: &CopyStep) -> Result<(), StepError> {
        if self.held.as_ref().is_none_or(Held::is_stale) {
            self.reread().await?;
        }
        let place = match step {
            CopyStep::Begin(_) => Place::Begin,
            CopyStep::Keys { range, .. } | CopyStep::Page { range, .. } => Place::Page(range),
            CopyStep::End { .. } => Place::End,
        };
        check(self.copying.as_ref(), self.held.as_ref().and_then(|h| h.position.as_ref()), place)?;
        match step {
            CopyStep::Begin(begin) => self.begin_copy(begin.clone()).await,
            CopyStep::Keys { range, keys, last } => Box::pin(self.count_keys(range, keys, *last)).await,
            CopyStep::Page { range, revision, kvs } => Box::pin(self.copy_page(range, *revision, kvs)).await,
            CopyStep::End { anchor_revision } => self.end_copy(*anchor_revision).await,
        }
    }

    async fn begin_copy(&mut self, begin: Begin) -> Result<(), StepError> {
        let position = self.held.as_ref().and_then(|h| h.position.clone());
        begin.check_claim(position.as_ref())?;
        if position.as_ref().is_some_and(|position| position.paused.is_some()) {
            return Err(StepError::Refused(
                Kind::Closing,
                "the link is paused at the replica: resume it there".to_owned(),
            ));
        }
        self.claim = Some((begin.epoch, begin.term));
        if begin.repair {
            return self.open_repair(&begin, position.as_ref()).await;
        }
        let Some(ranges) = self.ranges.clone() else { return Ok(()) };
        let replica_empty = self.present_count().await? == 0;
        self.waymark = begin.waymark;
        let keys_total = begin.keys_total;
        let (copying, begun) = Copying::begin(begin, position.as_ref(), &ranges, replica_empty)?;
        let keys_before = match &begun {
            Begun::GoesOn { cursor } => self.present_below(cursor).await?,
            Begun::Counts | Begun::Opens => 0,
        };
        self.view.send_modify(|view| {
            view.copy_keys_total = keys_total;
            view.copy_keys_before = keys_before;
        });
        self.copying = Some(copying);
        if begun == Begun::Opens {
            self.open_epoch(GuardCount::default()).await?;
        }
        self.acknowledge_copy();
        Ok(())
    }

    /// The guard's verdict; past it the position opens the new epoch.
    async fn open_epoch(&mut self, mut counted: GuardCount) -> Result<(), StepError> {
        if self.copying.as_ref().is_some_and(Copying::deletes_all) {
            counted.replica_keys = self.present_count().await?;
            counted.deletes = counted.replica_keys;
        }
        let (Some(copying), Some(ranges)) = (&self.copying, self.ranges.clone()) else { return Ok(()) };
        copying.guard(&self.link, &counted)?;
        let first = copying.first_position(&ranges);
        let (epoch, anchor) = (first.epoch, first.anchor_revision);
        self.open_with(first).await?;
        if let Some(copying) = &mut self.copying {
            copying.opened(&ranges);
        }
        tracing::info!(link = %self.link, %epoch, %anchor, "base copy begins");
        Ok(())
    }

    /// The first position of an epoch, and the journal that goes with it.
    async fn open_with(&mut self, first: Position) -> Result<(), StepError> {
        let run = first.run();
        let forgotten = self.forget_quarantine()?;
        let bytes = self.limits.request_bytes(&forgotten);
        self.commit_step(first, forgotten, bytes).await?;
        failpoint::reach("epoch-opened");
        self.quarantine_is_over();
        if let Err(e) = self.journal.reset(run, Seq(0)).await {
            return Err(StepError::Etcd(EtcdError::Other(format!("the journal cannot be started afresh: {e}"))));
        }
        failpoint::reach("journal-reset");
        self.start_afresh(Seq(0));
        Ok(())
    }

    /// Opens an epoch over what the replica holds of the same ranges, whole, be it of the same origin or of one that another has replaced.
    /// Nothing is deleted here: the repair has a guard of its own.
    async fn open_repair(&mut self, begin: &Begin, position: Option<&Position>) -> Result<(), StepError> {
        let Some(ranges) = self.ranges.clone() else { return Ok(()) };
        let comparable = position.is_some_and(|p| p.ranges_digest == digest::of_ranges(&ranges) && p.cursor.is_none());
        if !comparable || begin.link_back {
            let reason = "what the replica holds is a part, or not of these ranges: only a base copy helps".to_owned();
            return Err(StepError::Refused(Kind::PositionMoved, reason));
        }
        self.waymark = begin.waymark;
        self.open_with(begin.first_position(&ranges, Phase::Repairing, None)).await?;
        tracing::info!(link = %self.link, epoch = %begin.epoch, anchor = %begin.anchor, "repair begins");
        let session = self.session;
        self.view.send_modify(|view| {
            view.copy = CopyAck { guard_passed: true, complete: true, ..CopyAck::default() };
            view.copy_session = session;
        });
        Ok(())
    }

    async fn count_keys(&mut self, range: &KeyRange, keys: &[Bytes], last: bool) -> Result<(), StepError> {
        let etcd = self.etcd().await?;
        let mut from = range.from.clone();
        // The account changes once the whole step is done: a step that fails is done again.
        let Some(mut counted) = self.copying.as_ref().map(Copying::count) else { return Ok(()) };
        loop {
            let rest = KeyRange { from: from.clone(), to: range.to.clone() };
            let page = etcd.page(&rest, 10 * PRESENT_KEYS_MAX, None, Columns::KeysOnly).await?;
            let present: Vec<Bytes> = page.kvs.into_iter().map(|kv| kv.key).collect();
            let to = read_edge(page.more, present.last(), &range.to);
            let read = KeyRange { from, to: to.clone() };
            counted.add(part_of(keys, &read, |key| key), &present);
            if !page.more {
                break;
            }
            from = to;
        }
        failpoint::reach("guard-counted");
        if last {
            self.open_epoch(counted).await?;
        }
        if let (Some(copying), Some(ranges)) = (&mut self.copying, &self.ranges) {
            copying.counted(counted);
            copying.passed(ranges, range, last);
        }
        self.acknowledge_copy();
        Ok(())
    }

    /// Brings one page's range to the origin's keys, in pieces that bound what is read of the replica.
    async fn copy_page(
        &mut self,
        range: &KeyRange,
        revision: Revision,
        kvs: &[(Bytes, Bytes)],
    ) -> Result<(), StepError> {
        let Some(copying) = &self.copying else { return Ok(()) };
        let policy = copying.policy();
        let mut limit = kvs.len().saturating_mul(2).clamp(PRESENT_KEYS_FIRST, PRESENT_KEYS_MAX);
        let mut from = range.from.clone();
        loop {
            let rest = KeyRange { from: from.clone(), to: range.to.clone() };
            let etcd = self.etcd().await?;
            let page = match etcd.page(&rest, limit, None, Columns::KeysAndValues).await {
                Err(EtcdError::AnswerTooLarge { .. }) if limit > 1 => {
                    limit /= 2;
                    continue;
                }
                page => page?,
            };
            let present: Vec<(Bytes, Bytes)> = page.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect();
            let to = read_edge(page.more, present.last().map(|(key, _)| key), &range.to);
            let read = KeyRange { from, to: to.clone() };
            let diff = copy_diff(part_of(kvs, &read, |(key, _)| key), &present, policy);
            let (equal, conflicts) = (diff.equal, diff.conflicts);
            failpoint::reach("page-compared");
            for chunk in copy_chunks(diff, &to, revision, &self.limits)? {
                self.commit_chunk(chunk, revision).await?;
            }
            if let Some(copying) = &mut self.copying {
                copying.ack.keys_equal += equal;
                copying.ack.conflicts += conflicts;
            }
            self.view.send_modify(|view| view.conflicts += conflicts);
            if !page.more {
                break;
            }
            from = to;
        }
        failpoint::reach("page-applied");
        if let (Some(copying), Some(ranges)) = (&mut self.copying, &self.ranges) {
            copying.passed(ranges, range, false);
        }
        self.acknowledge_copy();
        Ok(())
    }

    async fn commit_chunk(&mut self, chunk: super::plan::CopyChunk, revision: Revision) -> Result<(), StepError> {
        let Some(position) = self.held.as_ref().and_then(|h| h.position.clone()) else {
            return Err(StepError::Refused(Kind::PositionMoved, "the position is gone".to_owned()));
        };
        let next = next::after_copied(&position, &chunk.reached, revision);
        if chunk.tree.success.is_empty() && next == position {
            return Ok(());
        }
        let anchor_moves = next.anchor_revision > position.anchor_revision;
        self.commit_step(next, chunk.tree, chunk.request_bytes).await?;
        failpoint::reach("cursor-moved");
        if anchor_moves {
            failpoint::reach("anchor-moved");
        }
        if let Some(copying) = &mut self.copying {
            copying.ack.keys_written += chunk.puts;
            copying.ack.keys_deleted += chunk.deletes;
        }
        Ok(())
    }

    async fn end_copy(&mut self, anchor_revision: Revision) -> Result<(), StepError> {
        let Some(position) = self.held.as_ref().and_then(|h| h.position.clone()) else {
            return Err(StepError::Refused(Kind::PositionMoved, "the position is gone".to_owned()));
        };
        if position.cursor.is_some() {
            let next = next::after_copy(&position, anchor_revision);
            self.commit_step(next, TxnTree { guards: Vec::new(), success: Vec::new() }, 0).await?;
            failpoint::reach("cursor-gone");
        }
        if let Some(copying) = &mut self.copying {
            copying.ack.complete = true;
        }
        self.acknowledge_copy();
        let ack = self.view.borrow().copy.clone();
        tracing::info!(link = %self.link, written = ack.keys_written, equal = ack.keys_equal, deleted = ack.keys_deleted,
            conflicts = ack.conflicts, "base copy is complete");
        self.copying = None;
        Ok(())
    }

    async fn commit_step(&mut self, next: Position, tree: TxnTree, request_bytes: usize) -> Result<(), StepError> {
        match self.commit(next, tree).await {
            Ok(Committed::Done) => Ok(()),
            Ok(Committed::GuardFailed | Committed::PositionMoved) => Err(StepError::Refused(
                Kind::PositionMoved,
                "another applier wrote the position during the base copy".to_owned(),
            )),
            Err(e @ EtcdError::TooManyOps) => Err(StepError::Limits(e, LimitRefusal::TooManyOps)),
            Err(e @ EtcdError::TooLarge) => {
                Err(StepError::Limits(e, LimitRefusal::TooLarge { sent_bytes: request_bytes }))
            }
            Err(e) => Err(StepError::Etcd(e)),
        }
    }

    async fn present_count(&mut self) -> Result<u64, StepError> {
        let etcd = self.etcd().await?;
        let Some(ranges) = self.ranges.clone() else { return Ok(0) };
        let mut count = 0;
        for piece in ranges.pieces() {
            count += etcd.page(piece, 0, None, Columns::CountOnly).await?.count;
        }
        Ok(count)
    }

    /// Keys of the replica below a cursor: those that an earlier sidecar's copy has dealt with.
    async fn present_below(&mut self, cursor: &Bytes) -> Result<u64, StepError> {
        let etcd = self.etcd().await?;
        let Some(ranges) = self.ranges.clone() else { return Ok(0) };
        let mut count = 0;
        for piece in ranges.pieces().iter().filter(|piece| piece.from < *cursor) {
            let to = if piece.to.is_empty() { cursor.clone() } else { piece.to.clone().min(cursor.clone()) };
            let below = KeyRange { from: piece.from.clone(), to };
            count += etcd.page(&below, 0, None, Columns::CountOnly).await?.count;
        }
        Ok(count)
    }

    fn acknowledge_copy(&mut self) {
        let cursor =
            self.held.as_ref().and_then(|h| h.position.as_ref()).and_then(|p| p.cursor.clone()).unwrap_or_default();
        let Some(copying) = &mut self.copying else { return };
        copying.ack.cursor = cursor;
        let ack = copying.ack.clone();
        let session = self.session;
        self.view.send_modify(|view| {
            view.copy = ack;
            view.copy_session = session;
        });
    }
}
