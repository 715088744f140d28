//! Job: the replica's half of a base copy, stepped: guards, differences and cursors are the product's.
//! Input: a line's copy steps. Output: requests to the replica's etcd; what the origin is told of the copy.
//! Synchronous.
//! Always true: as in the product's replica/copy.rs, whose calls it stands for; a step whose answer is lost is done again.

use super::line::Shipment;
use super::region::{Context, Trouble};
use super::replica::Replica;
use bytes::Bytes;
use etcd_ferry::model::{Digest, KeyRange, Phase, Position, Revision, Seq};
use etcd_ferry::replica::copy::Begin;
use etcd_ferry::replica::next;
use etcd_ferry::replica::plan::{
    Answered, CopyPolicy, GuardCase, GuardCount, TxnTree, copy_chunks, copy_diff, guard_verdict,
};
use etcd_ferry::wire::digest;
use etcd_ferry::wire::replicate::CopyAck;
use etcd_ferry::wire::replicate::refusal::Kind;

/// A step whose answers are lost so often is left to the next hello.
const TRIES_MAX: u32 = 4;
/// Keys of the replica that are compared at once.
const PRESENT_KEYS: usize = 16;

pub struct Copying {
    begin: Begin,
    replica_empty: bool,
    first_copy: bool,
    counted: GuardCount,
    expects: Option<Bytes>,
    ack: CopyAck,
}

enum StepError {
    Trouble(Trouble, usize),
    Refused(Kind, String),
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
        self.check_epoch(step)?;
        self.check_place(step)?;
        match step {
            Shipment::Begin(begin) => self.begin_copy(begin, context),
            Shipment::Keys { range, keys, last } => self.count_keys(range, keys, *last, context),
            Shipment::Page { range, revision, kvs } => self.copy_page(range, *revision, kvs, context),
            Shipment::End { anchor } => self.end_copy(*anchor, context),
            Shipment::Frame(_) | Shipment::Progress(_) => Ok(()),
        }
    }

    fn check_epoch(&self, step: &Shipment) -> Result<(), StepError> {
        let Some(copying) = self.copying.as_ref().filter(|copying| copying.ack.guard_passed) else { return Ok(()) };
        if matches!(step, Shipment::Begin(_)) {
            return Ok(());
        }
        let ends = matches!(step, Shipment::End { .. });
        let sender = (copying.begin.epoch, copying.begin.term);
        let ours = self.position().is_some_and(|p| next::copy_goes_on(p, sender, &copying.ack.cursor, ends));
        if ours { Ok(()) } else { Err(moved("the position is no longer that of this base copy")) }
    }

    fn check_place(&self, step: &Shipment) -> Result<(), StepError> {
        let Some(copying) = &self.copying else { return Ok(()) };
        let in_place = match step {
            Shipment::Keys { range, .. } | Shipment::Page { range, .. } => {
                copying.expects.as_ref() == Some(&range.from)
            }
            Shipment::End { .. } => copying.expects.is_none(),
            Shipment::Begin(_) | Shipment::Frame(_) | Shipment::Progress(_) => true,
        };
        if in_place {
            return Ok(());
        }
        Err(StepError::Refused(Kind::Gap, "a page of the base copy is missing".to_owned()))
    }

    fn expect_after(&mut self, range: &KeyRange) {
        let after = self.ranges.as_ref().and_then(|ranges| next::page_after(ranges, &range.to));
        if let Some(copying) = &mut self.copying {
            copying.expects = after;
        }
    }

    fn present_count(&self, context: &Context) -> u64 {
        self.ranges.as_ref().map_or(0, |ranges| context.replica.count(ranges.pieces()))
    }

    fn begin_copy(&mut self, begin: &Begin, context: &mut Context) -> Result<(), StepError> {
        let position = self.position().cloned();
        if position.as_ref().is_some_and(|p| (begin.epoch, begin.term) < (p.epoch, p.term)) {
            return Err(StepError::Refused(Kind::Fenced, "the position is further".to_owned()));
        }
        self.claim = Some((begin.epoch, begin.term));
        let replica_empty = self.present_count(context) == 0;
        let ranges_digest = self.ranges.as_ref().map(digest::of_ranges);
        let first_copy = position
            .as_ref()
            .is_none_or(|p| p.origin_cluster != begin.origin_cluster || Some(p.ranges_digest) != ranges_digest);
        let mut copying = Copying {
            begin: begin.clone(),
            replica_empty,
            first_copy,
            counted: GuardCount::default(),
            expects: self.ranges.as_ref().and_then(next::first_page),
            ack: CopyAck::default(),
        };
        self.waymark = begin.waymark;
        let cursor = position.as_ref().filter(|p| p.epoch == begin.epoch).and_then(|p| p.cursor.clone());
        if begin.resume {
            let Some(cursor) = cursor else { return Err(moved("the position holds no copy to go on with")) };
            copying.ack.guard_passed = true;
            copying.expects = self.ranges.as_ref().and_then(|ranges| next::page_from(ranges, &cursor));
        }
        self.copying = Some(copying);
        let pass = begin.guard_pass && !replica_empty;
        if !begin.resume && !pass {
            if !begin.guard_pass && !begin.origin_empty && !replica_empty {
                return Err(moved("somebody wrote into the empty range meanwhile"));
            }
            self.open_epoch(GuardCount::default(), context)?;
        }
        self.acknowledge_copy();
        Ok(())
    }

    fn open_epoch(&mut self, mut counted: GuardCount, context: &mut Context) -> Result<(), StepError> {
        let (Some(copying), Some(ranges)) = (&self.copying, self.ranges.clone()) else { return Ok(()) };
        let begin = copying.begin.clone();
        if begin.origin_empty {
            counted.replica_keys = self.present_count(context);
            counted.deletes = counted.replica_keys;
        }
        let case = GuardCase {
            link: self.link.clone(),
            first_copy: copying.first_copy,
            origin_empty: begin.origin_empty,
            replica_empty: copying.replica_empty,
            deletes_share_max: begin.deletes_share_max,
            allow_deletes: begin.allow_deletes,
            link_back: begin.link_back,
        };
        guard_verdict(&counted, &case).map_err(|stop| StepError::Refused(Kind::Guard, stop.to_string()))?;
        let next = Position {
            epoch: begin.epoch,
            term: begin.term,
            seq: Seq(0),
            origin_cluster: begin.origin_cluster,
            origin_revision: begin.anchor,
            carried_revision: Revision(0),
            carried_digest: Digest::default(),
            waymark: begin.waymark,
            ranges_digest: digest::of_ranges(&ranges),
            state: Phase::Copying,
            anchor_revision: begin.anchor,
            cursor: next::first_page(&ranges),
            part: 0,
            skipped: Vec::new(),
        };
        self.commit_step(next, nothing(), 0, context)?;
        self.restart_journal(begin.epoch);
        if let Some(copying) = &mut self.copying {
            copying.ack.guard_passed = true;
            copying.expects = next::first_page(&ranges);
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
        let Some(mut counted) = self.copying.as_ref().map(|copying| copying.counted) else { return Ok(()) };
        let page = context.read().map_err(|_| Trouble::Lost)?.page(range, 0, None).expect("never compacted");
        let present: Vec<Bytes> = page.kvs.into_iter().map(|(key, _)| key).collect();
        counted.add(keys, &present);
        if last {
            self.open_epoch(counted, context)?;
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

    fn copy_page(
        &mut self,
        range: &KeyRange,
        revision: Revision,
        kvs: &[(Bytes, Bytes)],
        context: &mut Context,
    ) -> Result<(), StepError> {
        let Some(copying) = &self.copying else { return Ok(()) };
        let policy = CopyPolicy { creates_only: copying.begin.link_back };
        context.note(|| format!("{} copies a page of revision {revision} with {} keys", self.name, kvs.len()));
        let mut from = range.from.clone();
        loop {
            let rest = KeyRange { from: from.clone(), to: range.to.clone() };
            let page = context.read().map_err(|_| Trouble::Lost)?.page(&rest, PRESENT_KEYS, None).expect("the head");
            let to = match page.kvs.last().filter(|_| page.more) {
                Some((last, _)) => Bytes::from([&last[..], &[0]].concat()),
                None => range.to.clone(),
            };
            let ours: Vec<(Bytes, Bytes)> =
                kvs.iter().filter(|(key, _)| *key >= from && (to.is_empty() || *key < to)).cloned().collect();
            let chunks = copy_chunks(copy_diff(&ours, &page.kvs, policy), &to, revision, &self.limits);
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
        self.expect_after(range);
        if let Some(copying) = &mut self.copying {
            copying.ack.pages += 1;
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
