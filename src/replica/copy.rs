//! Job: the replica's half of a base copy: count what it would delete, then bring the ranges to the origin's pages.
//! Input: copy steps from the stream, what the replica holds. Output: transactions with the cursor that they reach; a `CopyAck`.
//! Always true: nothing is written before the guards passed; what is equal is not written; the cursor moves with the keys, in one transaction.

use super::apply::{Applier, Committed};
use super::next;
use super::plan::{
    CopyPolicy, GuardCase, GuardCount, PlanError, Refusal as LimitRefusal, TxnTree, copy_chunks, copy_diff,
    guard_verdict,
};
use crate::etcd::{Columns, EtcdError};
use crate::model::{ClusterId, Digest, Epoch, KeyRange, Phase, Position, Ranges, Revision, Seq, Term, Waymark};
use crate::wire::digest;
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

/// What opens a copy.
#[derive(Debug, Clone)]
pub struct Begin {
    pub epoch: Epoch,
    pub term: Term,
    pub origin_cluster: ClusterId,
    pub anchor: Revision,
    pub waymark: Waymark,
    pub allow_deletes: bool,
    pub origin_empty: bool,
    pub guard_pass: bool,
    pub keys_total: u64,
    pub resume: bool,
    pub deletes_share_max: f64,
    /// Either side knows of a link back over the range.
    pub link_back: bool,
    /// What is here stays, and a repair brings what differs: there are no pages.
    pub repair: bool,
}

/// A copy under way.
pub(super) struct Copying {
    begin: Begin,
    replica_empty: bool,
    first_copy: bool,
    /// What the keys pages before the last one came to.
    counted: GuardCount,
    /// Where the next page begins; `None`: there are no more.
    expects: Option<Bytes>,
    ack: CopyAck,
}

impl Begin {
    /// The position that opens the epoch.
    fn first_position(&self, ranges: &Ranges, state: Phase, cursor: Option<Bytes>) -> Position {
        Position {
            epoch: self.epoch,
            term: self.term,
            seq: Seq(0),
            origin_cluster: self.origin_cluster,
            origin_revision: self.anchor,
            carried_revision: Revision(0),
            carried_digest: Digest::default(),
            waymark: self.waymark,
            ranges_digest: digest::of_ranges(ranges),
            state,
            anchor_revision: self.anchor,
            cursor,
            part: 0,
            skipped: Vec::new(),
        }
    }
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

impl From<PlanError> for StepError {
    fn from(error: PlanError) -> Self {
        StepError::Refused(Kind::TooLarge, error.to_string())
    }
}

impl Applier {
    /// Does one step; what etcd refuses for now is tried again until a new session takes the link.
    pub(super) async fn copy_step(&mut self, step: CopyStep) {
        loop {
            let error = match self.try_step(&step).await {
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
                Err(StepError::Limits(error, refusal)) => match self.limits.learned(refusal) {
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
        if self.held.is_none() {
            self.reread().await?;
        }
        self.check_epoch(step)?;
        self.check_place(step)?;
        match step {
            CopyStep::Begin(begin) => self.begin_copy(begin.clone()).await,
            CopyStep::Keys { range, keys, last } => self.count_keys(range, keys, *last).await,
            CopyStep::Page { range, revision, kvs } => Box::pin(self.copy_page(range, *revision, kvs)).await,
            CopyStep::End { anchor_revision } => self.end_copy(*anchor_revision).await,
        }
    }

    /// Once the epoch is open, each step needs the position to be in it still: after a doubt it may have been restored, or
    /// another copy may have taken over.
    fn check_epoch(&self, step: &CopyStep) -> Result<(), StepError> {
        let Some(copying) = self.copying.as_ref().filter(|c| c.ack.guard_passed) else { return Ok(()) };
        if matches!(step, CopyStep::Begin(_)) {
            return Ok(());
        }
        let position = self.held.as_ref().and_then(|h| h.position.as_ref());
        let ends = matches!(step, CopyStep::End { .. });
        let sender = (copying.begin.epoch, copying.begin.term);
        let ours = position.is_some_and(|p| next::copy_goes_on(p, sender, &copying.ack.cursor, ends));
        if ours {
            return Ok(());
        }
        Err(StepError::Refused(Kind::PositionMoved, "the position is no longer that of this base copy".to_owned()))
    }

    /// Pages come without a hole and in order: what lies between two of them would be neither copied nor deleted.
    fn check_place(&self, step: &CopyStep) -> Result<(), StepError> {
        let Some(copying) = &self.copying else { return Ok(()) };
        let in_place = match step {
            CopyStep::Begin(_) => true,
            CopyStep::Keys { range, .. } | CopyStep::Page { range, .. } => {
                copying.expects.as_ref() == Some(&range.from)
            }
            CopyStep::End { .. } => copying.expects.is_none(),
        };
        if in_place {
            return Ok(());
        }
        Err(StepError::Refused(Kind::Gap, "a page of the base copy is missing: say hello again".to_owned()))
    }

    fn expect_after(&mut self, range: &KeyRange) {
        let after = self.ranges.as_ref().and_then(|ranges| next::page_after(ranges, &range.to));
        if let Some(copying) = &mut self.copying {
            copying.expects = after;
        }
    }

    async fn begin_copy(&mut self, begin: Begin) -> Result<(), StepError> {
        let position = self.held.as_ref().and_then(|h| h.position.clone());
        if let Some(position) = &position
            && (begin.epoch, begin.term) < (position.epoch, position.term)
        {
            return Err(fenced(position));
        }
        self.claim = Some((begin.epoch, begin.term));
        if begin.repair {
            return self.open_repair(&begin, position.as_ref()).await;
        }
        let replica_empty = self.present_count().await? == 0;
        let ranges_digest = self.ranges.as_ref().map(digest::of_ranges);
        let mut copying = Copying {
            replica_empty,
            first_copy: position
                .as_ref()
                .is_none_or(|p| p.origin_cluster != begin.origin_cluster || Some(p.ranges_digest) != ranges_digest),
            counted: GuardCount::default(),
            expects: self.ranges.as_ref().and_then(next::first_page),
            ack: CopyAck::default(),
            begin,
        };
        self.waymark = copying.begin.waymark;
        let resumable = position.as_ref().is_some_and(|p| p.epoch == copying.begin.epoch && p.cursor.is_some());
        if copying.begin.resume && !resumable {
            return Err(StepError::Refused(Kind::PositionMoved, "the position holds no copy to go on with".to_owned()));
        }
        let ready = copying.begin.resume;
        let mut keys_before = 0;
        if ready {
            copying.ack.guard_passed = true;
            let cursor = position.as_ref().and_then(|p| p.cursor.clone()).unwrap_or_default();
            copying.expects = self.ranges.as_ref().and_then(|ranges| next::page_from(ranges, &cursor));
            keys_before = self.present_below(&cursor).await?;
        }
        let keys_total = copying.begin.keys_total;
        self.view.send_modify(|view| {
            view.copy_keys_total = keys_total;
            view.copy_keys_before = keys_before;
        });
        let pass = copying.begin.guard_pass && !replica_empty;
        self.copying = Some(copying);
        if !ready && !pass {
            if self
                .copying
                .as_ref()
                .is_some_and(|c| !c.begin.guard_pass && !c.begin.origin_empty && !c.begin.link_back && !replica_empty)
            {
                // The range was empty at the hello and is not any more: a new hello makes the guard's pass.
                return Err(StepError::Refused(
                    Kind::PositionMoved,
                    "somebody wrote into the empty range meanwhile".to_owned(),
                ));
            }
            self.open_epoch(GuardCount::default()).await?;
        }
        self.acknowledge_copy();
        Ok(())
    }

    /// The guard's verdict; past it the position opens the new epoch.
    async fn open_epoch(&mut self, mut counted: GuardCount) -> Result<(), StepError> {
        let Some(copying) = &self.copying else { return Ok(()) };
        let begin = copying.begin.clone();
        let (first_copy, replica_empty) = (copying.first_copy, copying.replica_empty);
        if begin.origin_empty {
            counted.replica_keys = self.present_count().await?;
            counted.deletes = counted.replica_keys;
        }
        let case = GuardCase {
            link: self.link.clone(),
            first_copy,
            origin_empty: begin.origin_empty,
            replica_empty,
            deletes_share_max: begin.deletes_share_max,
            allow_deletes: begin.allow_deletes,
            link_back: begin.link_back,
        };
        guard_verdict(&counted, &case).map_err(|stop| StepError::Refused(Kind::Guard, stop.to_string()))?;
        let Some(ranges) = self.ranges.clone() else { return Ok(()) };
        let cursor = ranges.pieces().first().map(|p| p.from.clone()).unwrap_or_default();
        let first = begin.first_position(&ranges, Phase::Copying, Some(cursor));
        self.open_with(first).await?;
        if let Some(copying) = &mut self.copying {
            copying.ack.guard_passed = true;
            copying.expects = next::first_page(&ranges);
        }
        tracing::info!(link = %self.link, epoch = %begin.epoch, anchor = %begin.anchor, "base copy begins");
        Ok(())
    }

    /// The first position of an epoch, and the journal that goes with it.
    async fn open_with(&mut self, first: Position) -> Result<(), StepError> {
        let epoch = first.epoch;
        self.commit_step(first, TxnTree { guards: Vec::new(), success: Vec::new() }, 0).await?;
        if let Err(e) = self.journal.reset(epoch, Seq(0)).await {
            return Err(StepError::Etcd(EtcdError::Other(format!("the journal cannot be started afresh: {e}"))));
        }
        self.start_afresh(Seq(0));
        Ok(())
    }

    /// Opens an epoch over what the replica holds of the same origin and ranges. Nothing is deleted here: the repair has a guard of its own.
    async fn open_repair(&mut self, begin: &Begin, position: Option<&Position>) -> Result<(), StepError> {
        let Some(ranges) = self.ranges.clone() else { return Ok(()) };
        let same = position.is_some_and(|p| {
            p.origin_cluster == begin.origin_cluster
                && p.ranges_digest == digest::of_ranges(&ranges)
                && p.cursor.is_none()
        });
        if !same || begin.link_back {
            let reason =
                "what the replica holds is not of this origin and these ranges: only a base copy helps".to_owned();
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
        let Some(mut counted) = self.copying.as_ref().map(|copying| copying.counted) else { return Ok(()) };
        loop {
            let rest = KeyRange { from: from.clone(), to: range.to.clone() };
            let page = etcd.page(&rest, 10 * PRESENT_KEYS_MAX, None, Columns::KeysOnly).await?;
            let present: Vec<Bytes> = page.kvs.into_iter().map(|kv| kv.key).collect();
            let to = next_edge(page.more, present.last(), &range.to);
            let ours = part_of(keys, &from, &to, |key| key);
            counted.add(ours, &present);
            if !page.more {
                break;
            }
            from = to;
        }
        if last {
            self.open_epoch(counted).await?;
        } else {
            self.expect_after(range);
        }
        if let Some(copying) = &mut self.copying {
            copying.counted = counted;
            copying.ack.pages += 1;
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
        let policy = CopyPolicy { creates_only: copying.begin.link_back };
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
            let to = next_edge(page.more, present.last().map(|(key, _)| key), &range.to);
            let diff = copy_diff(part_of(kvs, &from, &to, |(key, _)| key), &present, policy);
            let (equal, conflicts) = (diff.equal, diff.conflicts);
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
        self.expect_after(range);
        if let Some(copying) = &mut self.copying {
            copying.ack.pages += 1;
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
        self.commit_step(next, chunk.tree, chunk.request_bytes).await?;
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

fn fenced(position: &Position) -> StepError {
    StepError::Refused(
        Kind::Fenced,
        format!("the position is at epoch {}, term {} already", position.epoch, position.term),
    )
}

/// Up to where a read of the replica reached.
fn next_edge(more: bool, last: Option<&Bytes>, to: &Bytes) -> Bytes {
    match last {
        Some(last) if more => {
            let mut edge = last.to_vec();
            edge.push(0);
            Bytes::from(edge)
        }
        _ => to.clone(),
    }
}

/// The part of `items` (in key order) whose keys lie in `[from, to)`.
fn part_of<'a, T>(items: &'a [T], from: &Bytes, to: &Bytes, key: impl Fn(&T) -> &Bytes) -> &'a [T] {
    let start = items.partition_point(|item| key(item) < from);
    let end = if to.is_empty() { items.len() } else { items.partition_point(|item| key(item) < to) };
    &items[start.min(end)..end]
}
