//! Job: a replica's sidecar, stepped: the product's journal files, plans and positions, with the calls between them.
//! Input: what its stream took in, etcd's answers. Output: requests to the replica's etcd.
//! Synchronous; its journal is on a disk that can be torn, its dedupe log on one that is synced later.
//! Always true: whatever decides is the product's; this file only carries values from one decision to the next, as the edges do.

mod hello;
mod restart;
mod stream;

pub use self::hello::{Hello, HelloAnswer, HelloRefused};

use super::dedupe::{DedupeLog, Remembered};
use super::disk::Disk;
use super::etcd::{Answer, Refused};
use super::region::{Context, Trouble, trouble_of};
use etcd_ferry::model::{Digest, Epoch, LinkName, Position, Ranges, Revision, Seq, Term, Waymark};
use etcd_ferry::replica::admit::Admit;
use etcd_ferry::replica::align::{self, Alignment, JournalFacts};
use etcd_ferry::replica::journal::JournalEntry;
use etcd_ferry::replica::next::{self, Claim, Idle};
use etcd_ferry::replica::pages::Copying;
use etcd_ferry::replica::plan::{
    self, Answered, Begun, LimitRefusal, Plan, PlanError, Request, RequestLimits, RunFacts, Settled, TxnTree, Waiting,
};
use etcd_ferry::wire::replicate::CopyAck;
use etcd_ferry::wire::replicate::refusal::Kind;
use etcd_ferry::wire::window::Decoder;
use std::collections::VecDeque;
use std::path::PathBuf;

pub const WAITING_BYTES_MAX: usize = 16 << 10;
const GUARD_FAILURES_MAX: u32 = 2;

pub struct Replica {
    pub name: String,
    pub link: LinkName,
    pub limits: RequestLimits,
    /// What it begins with, before it learns.
    configured: RequestLimits,
    /// As a file keeps them.
    pub ranges: Option<Ranges>,
    pub journal: Disk<JournalEntry>,
    pub dedupe: DedupeLog,
    /// What the dedupe log gave back at the start, until the first hello.
    remembered: Option<Vec<Remembered>>,
    pub held: Option<(Option<Position>, Revision)>,
    expected: Option<Position>,
    read_through: Seq,
    waiting: VecDeque<(Waiting, Digest)>,
    planned: Option<Plan>,
    guard_failures: u32,
    in_flight: Option<InFlight>,
    pub waymark: Waymark,
    progress: Option<Idle>,
    pub stopped: bool,
    /// The next hello begins with an empty journal.
    given_up: bool,
    pub session: u64,
    /// What the session's sender may write with.
    pub claim: Option<Claim>,
    pub copying: Option<Copying>,
    pub copy_ack: CopyAck,
    pub copy_session: u64,
    pub refusal: Option<(u64, Kind, String)>,
    admit: Admit,
    pub stream: Option<Stream>,
}

struct InFlight {
    number: u64,
    revisions: usize,
    settled: Settled,
    next: Position,
}

/// The stream that the last hello opened.
pub struct Stream {
    pub number: u64,
    decoder: Decoder,
    ranges: Ranges,
    refused: bool,
    copy_told: CopyAck,
}

impl Replica {
    /// `journal`: its folder.
    pub fn start(name: String, link: LinkName, journal: PathBuf, dedupe: DedupeLog, configured: RequestLimits) -> Self {
        Self {
            name,
            link,
            limits: configured,
            configured,
            ranges: None,
            journal: Disk::open(journal, 24 << 10),
            dedupe,
            remembered: None,
            held: None,
            expected: None,
            read_through: Seq(0),
            waiting: VecDeque::new(),
            planned: None,
            guard_failures: 0,
            in_flight: None,
            waymark: Waymark::default(),
            progress: None,
            stopped: false,
            given_up: false,
            session: 0,
            claim: None,
            copying: None,
            copy_ack: CopyAck::default(),
            copy_session: 0,
            refusal: None,
            admit: Admit::new(Epoch(0), Term(0), Seq(0), []),
            stream: None,
        }
    }

    pub fn waiting_bytes(&self) -> usize {
        self.waiting.iter().map(|(waiting, _)| waiting.revision.bytes()).sum()
    }

    pub fn position(&self) -> Option<&Position> {
        self.held.as_ref().and_then(|(position, _)| position.as_ref())
    }

    fn start_afresh(&mut self, seq: Seq) {
        self.waiting.clear();
        self.planned = None;
        self.read_through = seq;
    }

    pub fn restart_journal(&mut self, epoch: Epoch) {
        self.journal.reset(epoch.0, 0);
        self.start_afresh(Seq(0));
    }

    /// Reads the position afresh, and brings queue and journal in line with it.
    pub fn read_position(&mut self, context: &mut Context) -> Result<(), Trouble> {
        let found = context.read().map_err(|_| Trouble::Lost)?.get(&self.link.position_key());
        let mod_revision = found.as_ref().map_or(Revision(0), |(_, modified)| *modified);
        let position = found.map(|(json, _)| Position::from_json(&json).expect("a position that was written is read"));
        if let Some(position) = &position
            && position.waymark.counter >= self.waymark.counter
        {
            self.waymark = position.waymark;
        }
        self.planned = None;
        self.align(position.as_ref(), context);
        self.expected.clone_from(&position);
        self.held = Some((position, mod_revision));
        Ok(())
    }

    fn align(&mut self, position: Option<&Position>, context: &mut Context) {
        let (epoch, seq) = position.map_or((Epoch(0), Seq(0)), |p| (p.epoch, p.seq));
        let base = Seq(self.journal.base());
        let last = self.journal.last.map_or(base, |(seq, _, _)| seq);
        let epoch_held = Epoch(self.journal.tag);
        // Whose it is stands in a file of the product's journal, which is not stepped here.
        let mut facts =
            JournalFacts { epoch: epoch_held, origin: None, base, last, at_position: None, after_position: None };
        let mut first_after = |after| self.journal.read_after(after, 1).unwrap_or_default().into_iter().next();
        if facts.epoch == epoch && base < seq && seq <= last {
            facts.at_position = first_after(seq.0 - 1).map(|entry| entry.digest);
        }
        if facts.epoch == epoch && base <= seq && seq < last {
            facts.after_position = first_after(seq.0).map(|entry| entry.revision.revision);
        }
        match align::align(position, self.expected.as_ref(), self.claim, facts) {
            Alignment::GoesOn => {
                while self.waiting.front().is_some_and(|(waiting, _)| waiting.seq <= seq) {
                    self.waiting.pop_front();
                }
                self.read_through = self.read_through.max(seq);
            }
            Alignment::Fenced { by: (by_epoch, by_term), reset_journal } => {
                context.count("align fenced by a claim");
                (self.claim, self.copying, self.progress) = (None, None, None);
                self.start_afresh(seq);
                if reset_journal {
                    self.journal.reset(epoch.0, seq.0);
                }
                self.refuse(Kind::Fenced, format!("a sender with epoch {by_epoch}, term {by_term} took the link"));
            }
            Alignment::StartsAfresh { reset_journal, moved } => {
                self.start_afresh(seq);
                if reset_journal {
                    self.journal.reset(epoch.0, seq.0);
                }
                if let Some((kind, reason)) = moved {
                    context.count(&format!("align {}", kind.as_str_name()));
                    self.stopped |= reset_journal;
                    self.given_up |= reset_journal;
                    self.refusal = Some((self.session, kind, reason));
                }
            }
        }
    }

    fn follows(&self) -> bool {
        self.position().is_some_and(|p| p.cursor.is_none()) && !self.stopped && self.copying.is_none()
    }

    /// One step of applying: what can be done now.
    pub fn apply(&mut self, context: &mut Context) {
        if let Some(in_flight) = &self.in_flight {
            let (number, revisions) = (in_flight.number, in_flight.revisions);
            if let Some(answer) = context.answer(number) {
                self.answered(answer, context);
            } else if !context.is_pending(number) || context.fails(20, "gave up waiting") {
                self.doubt();
            } else if revisions > 0 && self.planned.is_none() {
                self.plan(revisions);
            }
            return;
        }
        if self.held.is_none() {
            let _ = self.read_position(context);
            let _ = self.publish(context);
            return;
        }
        if !self.follows() {
            return;
        }
        if self.waiting_bytes() < WAITING_BYTES_MAX {
            self.read_journal(&mut context.random);
        }
        if self.planned.is_none() {
            if self.waiting.is_empty() {
                return self.persist_idle(context);
            }
            self.plan(0);
        }
        if let Some(planned) = self.planned.take() {
            self.settle(planned, context);
        }
    }

    fn read_journal(&mut self, random: &mut super::random::Random) {
        let bytes_max = random.between(1, WAITING_BYTES_MAX / 2);
        if self.journal.covered <= self.read_through.0 {
            return;
        }
        for entry in self.journal.read_after(self.read_through.0, bytes_max).unwrap_or_default() {
            self.read_through = entry.seq;
            self.waiting.push_back((Waiting { seq: entry.seq, revision: entry.revision }, entry.digest));
        }
    }

    /// A transaction is on its way whose guard fails where somebody writes into the range that it deletes.
    pub fn deletes_a_range(&self) -> bool {
        self.in_flight.as_ref().is_some_and(|in_flight| !in_flight.settled.tree.guards.is_empty())
    }

    fn plan(&mut self, in_flight: usize) {
        let begun = if in_flight == 0 { Begun::of(self.position()) } else { Begun::default() };
        let Some(ranges) = &self.ranges else { return };
        match plan::plan(self.waiting.iter().skip(in_flight).map(|(waiting, _)| waiting), begun, ranges, &self.limits) {
            Ok(planned) => self.planned = planned,
            Err(error) => self.refuse(Kind::TooLarge, error.to_string()),
        }
    }

    fn settle(&mut self, planned: Plan, context: &mut Context) {
        let mut facts: Vec<RunFacts> = Vec::new();
        if self.guard_failures < GUARD_FAILURES_MAX {
            for run in &planned.runs {
                let Ok(etcd) = context.read() else { return self.doubt() };
                let page = etcd.page(&run.range, 0, None).expect("the head is never compacted");
                let keys: Vec<_> = page.kvs.into_iter().map(|(key, _)| key).collect();
                facts.push(planned.run_facts(run, page.head, &keys));
            }
        }
        match planned.settle(&facts, &self.limits) {
            Ok(settled) => self.submit(settled, context),
            Err(PlanError::LimitsShrank) => {}
            Err(error) => self.refuse(Kind::TooLarge, error.to_string()),
        }
    }

    fn submit(&mut self, settled: Settled, context: &mut Context) {
        let Some((Some(position), held)) = &self.held else { return };
        let Some((last, digest)) = self.waiting.get(settled.revisions - 1) else { return };
        for (shape, is) in [
            ("merged", settled.revisions > 1),
            ("in parts", matches!(settled.extent, plan::Extent::Part { .. })),
            ("range delete", !settled.tree.guards.is_empty()),
            ("nested", settled.tree.success.iter().any(|node| matches!(node, plan::Node::Txn(_)))),
        ] {
            if is {
                context.count(&format!("plan {shape}"));
            }
        }
        let next = next::after_settled(position, &settled, (last.revision.revision, *digest));
        let next = next::to_write(next, self.waymark, Revision(0));
        let request = Request::new(&self.link, *held, &next, settled.tree.clone());
        let number = context.send(request);
        context.note(|| format!("{} sends seq {} (revision {})", self.name, next.seq, next.origin_revision));
        self.in_flight = Some(InFlight { number, revisions: next::revisions_done(&settled), settled, next });
    }

    fn answered(&mut self, answer: Result<Answer, Refused>, context: &mut Context) {
        let Some(InFlight { revisions, settled, next, .. }) = self.in_flight.take() else { return };
        if context.fails(25, "answer lost") {
            return self.doubt();
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(refused) => {
                self.planned = None;
                let trouble = trouble_of(&refused, context);
                return self.learn(trouble, settled.request_bytes);
            }
        };
        match self.judge(answer, next) {
            Answered::Committed => {
                self.guard_failures = 0;
                self.waiting.drain(..revisions.min(self.waiting.len()));
                // Where it dies of that, nothing is left to be done.
                let _ = self.publish(context);
            }
            Answered::GuardFailed => {
                context.count("guard of a range delete failed");
                self.guard_failures += 1;
                self.planned = None;
            }
            Answered::PositionMoved => context.count("position compare failed"),
        }
    }

    fn judge(&mut self, answer: Answer, next: Position) -> Answered {
        let held = self.held.as_ref().map_or(Revision(0), |(_, modified)| *modified);
        let judged = plan::answered(answer.succeeded, answer.found, held);
        match judged {
            Answered::Committed => {
                self.expected = Some(next.clone());
                self.held = Some((Some(next), answer.revision));
            }
            Answered::GuardFailed => {}
            Answered::PositionMoved => self.held = None,
        }
        judged
    }

    /// A limit of etcd's was met: learned, or nothing helps.
    pub fn learn(&mut self, trouble: Trouble, sent_bytes: usize) {
        let refusal = match trouble {
            Trouble::Lost => return self.doubt(),
            Trouble::Crashed => return,
            Trouble::TooManyOps => LimitRefusal::TooManyOps,
            Trouble::TooLarge => LimitRefusal::TooLarge { sent_bytes },
        };
        match self.limits.learned(refusal, None) {
            Some(limits) => self.limits = limits,
            None => self.refuse(Kind::TooLarge, "even the smallest transaction is refused".to_owned()),
        }
    }

    pub fn doubt(&mut self) {
        self.in_flight = None;
        self.held = None;
        self.planned = None;
    }

    pub fn refuse(&mut self, kind: Kind, reason: String) {
        self.stopped = true;
        self.refusal = Some((self.session, kind, reason));
    }

    /// Commits at once and waits: for what is not a journal entry.
    pub fn commit(&mut self, next: Position, tree: TxnTree, context: &mut Context) -> Result<Answered, Trouble> {
        let Some((_, held)) = self.held else { return Ok(Answered::PositionMoved) };
        let next = next::to_write(next, self.waymark, Revision(0));
        let request = Request::new(&self.link, held, &next, tree);
        context.note(|| format!("{} writes {:?} at epoch {}, seq {}", self.name, next.state, next.epoch, next.seq));
        match context.commit_and_wait(&request) {
            Ok(answer) => {
                let judged = self.judge(answer, next);
                if judged == Answered::Committed {
                    self.publish(context)?;
                }
                Ok(judged)
            }
            Err(Trouble::Lost) => {
                self.held = None;
                Err(Trouble::Lost)
            }
            Err(trouble) => Err(trouble),
        }
    }

    /// Journal and dedupe log may let go of what the position covers.
    fn publish(&mut self, context: &mut Context) -> Result<(), Trouble> {
        let Some((epoch, seq)) = self.position().map(|position| (position.epoch, position.seq)) else { return Ok(()) };
        self.survive(3, "receiver crashed between commit and trim", context)?;
        self.journal.trim(seq.0);
        self.survive(3, "receiver crashed between trim and done", context)?;
        self.dedupe.done_through(epoch, seq);
        Ok(())
    }

    fn persist_idle(&mut self, context: &mut Context) {
        let (Some(idle), Some(position)) = (self.progress, self.position()) else { return };
        let Some(next) = next::after_idle(position, idle) else { return };
        self.progress = Some(Idle { persist: false, ..idle });
        context.count("idle position");
        let tree = TxnTree { guards: Vec::new(), success: Vec::new() };
        if self.commit(next, tree, context).is_err() {
            self.doubt();
        }
    }

    /// What is in flight is waited for before anything else is done.
    fn settle_in_flight(&mut self, context: &mut Context) {
        while let Some(in_flight) = &self.in_flight {
            if context.is_pending(in_flight.number) {
                context.commit_pending();
            } else {
                self.apply(context);
            }
        }
    }

    /// An idle link looks at its position now and then: a replica that was restored shows nothing else of it.
    pub fn look_again(&mut self) {
        if self.follows() && self.in_flight.is_none() {
            self.held = None;
        }
    }
}
