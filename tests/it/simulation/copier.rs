//! Job: the replica's half of a base copy, stepped: guards, differences and cursors are the product's.
//! Input: a line's copy steps. Output: requests to the replica's etcd; what the origin is told of the copy.
//! Synchronous.
//! Always true: as in the product's replica/copy.rs, whose calls it stands for; a step whose answer is lost is done again.

use super::line::Shipment;
use super::region::{Context, Trouble};
use super::replica::Replica;
use bytes::Bytes;
use etcd_ferry::model::{KeyRange, Position, Revision};
use etcd_ferry::replica::next;
use etcd_ferry::replica::pages::{Begin, Begun, Copying, Place, Refused, check, read_edge};
use etcd_ferry::replica::plan::{Answered, GuardCount, TxnTree, copy_chunks, copy_diff};
use etcd_ferry::wire::parts::part_of;
use etcd_ferry::wire::replicate::refusal::Kind;

/// A step whose answers are lost so often is left to the next hello.
const TRIES_MAX: u32 = 4;
/// Keys of the replica that are compared at once.
const PRESENT_KEYS: usize = 16;

enum StepError {
    Trouble(Trouble, usize),
    Refused(Kind, String),
}

impl From<Refused> for StepError {
    fn from((kind, reason): Refused) -> Self {
        Self::Refused(kind, reason)
    }
}

impl From<Trouble> for StepError {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble, 0)
    }
}

fn moved(reason: &str) -> StepError {
    StepError::Refused(Kind::PositionMoved, reason.to_owned())
}

fn nothing() -> TxnTree {
    TxnTree { guards: Vec::new(), success: Vec::new() }
}

impl Replica {
    pub fn copy_step(&mut self, step: &Shipment, context: &mut Context) {
        for _ in 0..TRIES_MAX {
            match self.try_step(step, context) {
                Ok(()) => return,
                Err(StepError::Refused(kind, reason)) => {
                    self.copying = None;
                    return self.refuse(kind, reason);
                }
                Err(StepError::Trouble(Trouble::Crashed, _)) => return,
                Err(StepError::Trouble(trouble, sent_bytes)) => {
                    self.learn(trouble, sent_bytes);
                    if self.stopped {
                        return;
                    }
                }
            }
        }
        self.refuse(Kind::Closing, "a hello came while the base copy waited".to_owned());
    }

    fn try_step(&mut self, step: &Shipment, context: &mut Context) -> Result<(), StepError> {
        if self.held.is_none() {
            self.read_position(context)?;
        }
        let place = match step {
            Shipment::Begin(_) => Place::Begin,
            Shipment::Keys { range, .. } | Shipment::Page { range, .. } => Place::Page(range),
            Shipment::End { .. } => Place::End,
            Shipment::Frame(_) | Shipment::Progress(_) => return Ok(()),
        };
        check(self.copying.as_ref(), self.position(), place)?;
        match step {
            Shipment::Begin(begin) => self.begin_copy(begin, context),
            Shipment::Keys { range, keys, last } => self.count_keys(range, keys, *last, context),
            Shipment::Page { range, revision, kvs } => self.copy_page(range, *revision, kvs, context),
            Shipment::End { anchor } => self.end_copy(*anchor, context),
            Shipment::Frame(_) | Shipment::Progress(_) => Ok(()),
        }
    }

    fn present_count(&self, context: &Context) -> u64 {
        self.ranges.as_ref().map_or(0, |ranges| context.replica.count(ranges.pieces()))
    }

    fn begin_copy(&mut self, begin: &Begin, context: &mut Context) -> Result<(), StepError> {
        let position = self.position().cloned();
        begin.check_claim(position.as_ref())?;
        self.claim = Some((begin.epoch, begin.term));
        let Some(ranges) = self.ranges.clone() else { return Ok(()) };
        let replica_empty = self.present_count(context) == 0;
        self.waymark = begin.waymark;
        let (copying, begun) = Copying::begin(begin.clone(), position.as_ref(), &ranges, replica_empty)?;
        self.copying = Some(copying);
        if begun == Begun::Opens {
            self.open_epoch(GuardCount::default(), context)?;
        }
        self.acknowledge_copy();
        Ok(())
    }

    fn open_epoch(&mut self, mut counted: GuardCount, context: &mut Context) -> Result<(), StepError> {
        if self.copying.as_ref().is_some_and(Copying::deletes_all) {
            counted.replica_keys = self.present_count(context);
            counted.deletes = counted.replica_keys;
        }
        let (Some(copying), Some(ranges)) = (&self.copying, self.ranges.clone()) else { return Ok(()) };
        copying.guard(&self.link, &counted)?;
        let first = copying.first_position(&ranges);
        let epoch = first.epoch;
        self.commit_step(first, nothing(), 0, context)?;
        self.survive(100, "receiver crashed between epoch and journal", context)?;
        self.restart_journal(epoch);
        if let Some(copying) = &mut self.copying {
            copying.opened(&ranges);
        }
        context.count("base copy begun");
        Ok(())
    }

    fn count_keys(
        &mut self,
        range: &KeyRange,
        keys: &[Bytes],
        last: bool,
        context: &mut Context,
    ) -> Result<(), StepError> {
        let Some(mut counted) = self.copying.as_ref().map(Copying::count) else { return Ok(()) };
        let page = context.read().map_err(|_| Trouble::Lost)?.page(range, 0, None).expect("never compacted");
        let present: Vec<Bytes> = page.kvs.into_iter().map(|(key, _)| key).collect();
        counted.add(keys, &present);
        if last {
            self.open_epoch(counted, context)?;
        }
        if let (Some(copying), Some(ranges)) = (&mut self.copying, &self.ranges) {
            copying.counted(counted);
            copying.passed(ranges, range, last);
        }
        self.acknowledge_copy();
        Ok(())
    }

    fn copy_page(
        &mut self,
        range: &KeyRange,
        revision: Revision,
        kvs: &[(Bytes, Bytes)],
        context: &mut Context,
    ) -> Result<(), StepError> {
        let Some(copying) = &self.copying else { return Ok(()) };
        let policy = copying.policy();
        context.note(|| format!("{} copies a page of revision {revision} with {} keys", self.name, kvs.len()));
        let mut from = range.from.clone();
        loop {
            let rest = KeyRange { from: from.clone(), to: range.to.clone() };
            let page = context.read().map_err(|_| Trouble::Lost)?.page(&rest, PRESENT_KEYS, None).expect("the head");
            let to = read_edge(page.more, page.kvs.last().map(|(key, _)| key), &range.to);
            let read = KeyRange { from, to: to.clone() };
            let diff = copy_diff(part_of(kvs, &read, |(key, _)| key), &page.kvs, policy);
            let chunks = copy_chunks(diff, &to, revision, &self.limits);
            for chunk in chunks.map_err(|error| StepError::Refused(Kind::TooLarge, error.to_string()))? {
                let Some(position) = self.position() else { return Err(moved("the position is gone")) };
                let next = next::after_copied(position, &chunk.reached, revision);
                if !chunk.tree.success.is_empty() || next != *position {
                    self.commit_step(next, chunk.tree, chunk.request_bytes, context)?;
                }
            }
            if !page.more {
                break;
            }
            from = to;
        }
        if let (Some(copying), Some(ranges)) = (&mut self.copying, &self.ranges) {
            copying.passed(ranges, range, false);
        }
        self.acknowledge_copy();
        Ok(())
    }

    fn end_copy(&mut self, anchor: Revision, context: &mut Context) -> Result<(), StepError> {
        let Some(position) = self.position().cloned() else { return Err(moved("the position is gone")) };
        if position.cursor.is_some() {
            self.commit_step(next::after_copy(&position, anchor), nothing(), 0, context)?;
        }
        if let Some(copying) = &mut self.copying {
            copying.ack.complete = true;
        }
        self.acknowledge_copy();
        context.count("base copy complete");
        self.copying = None;
        Ok(())
    }

    fn commit_step(
        &mut self,
        next: Position,
        tree: TxnTree,
        request_bytes: usize,
        context: &mut Context,
    ) -> Result<(), StepError> {
        match self.commit(next, tree, context) {
            Ok(Answered::Committed) => Ok(()),
            Ok(Answered::GuardFailed | Answered::PositionMoved) => Err(moved("another applier wrote the position")),
            Err(trouble) => Err(StepError::Trouble(trouble, request_bytes)),
        }
    }

    fn acknowledge_copy(&mut self) {
        let cursor = self.position().and_then(|p| p.cursor.clone()).unwrap_or_default();
        let Some(copying) = &mut self.copying else { return };
        copying.ack.cursor = cursor;
        self.copy_ack = copying.ack.clone();
        self.copy_session = self.session;
    }
}
