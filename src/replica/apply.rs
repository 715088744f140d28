//! Job: bring the replica's etcd forward: one transaction in flight, each with its position, the next one being planned meanwhile.
//! Input: journal entries, what the stream tells (hello, progress, base copy), etcd's answers. Output: transactions; an `ApplyView`.
//! Always true: changes and position commit together or not at all; after any doubt the position is read again before anything else;
//! an `Applied` is made here alone, from a committed transaction or from a position that was read.

use super::breaker::Breaker;
use super::commit::{Committed, InFlight, answer_of};
use super::dedupe::Dedupe;
use super::foreign::OwnRevisions;
use super::journal::{Journal, JournalEntry, JournalError, Reading, bytes_of, read};
use super::learned::EtcdLimits;
use super::mark::Mark;
use super::next::{self, Idle};
use super::plan::{self, Begun, Plan, PlanError, RequestLimits, RunFacts, TxnTree, Waiting};
use super::poison::Trial;
use super::position::{Held, LOOK_EVERY};
use super::quarantine::Retrying;
use super::told::Told;
use super::view::{ApplyCommand, ApplyView};
use crate::admin::{ReplicaCommand, next_command};
use crate::config::{DeleteShares, Limits, OnPoison};
use crate::etcd::gate::Gate;
use crate::etcd::{Columns, Etcd, EtcdError};
use crate::failpoint;
use crate::model::{
    Digest, Epoch, HeldBack, LinkName, Position, Quarantine, Ranges, Revision, Seq, Term, Waymark, skipped_bytes,
};
use crate::retry::Backoff;
use crate::segment::feed::FeedError;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The longest JSON of a position without a cursor, skipped seqs and what is held back: its names, ten numbers of 20 digits, three digests,
/// one cluster id.
const POSITION_BYTES_MAX: usize = 700;
/// Guards that failed so often in a row mean that somebody else writes there: then key by key.
const GUARD_FAILURES_MAX: u32 = 2;
/// A committed transaction may take so long to answer while the process stops.
const STOP_DEADLINE: Duration = Duration::from_secs(3);

/// What this position, and each that follows it before the next one is skipped or held back, takes without a cursor.
pub(super) fn position_bytes_max(position: Option<&Position>) -> usize {
    let skipped = position.map_or(0, |position| position.skipped.len());
    let held_back = position.and_then(|position| position.held_back).map_or(0, |_| HeldBack::BYTES_MAX);
    POSITION_BYTES_MAX + skipped_bytes(skipped) + held_back
}

/// Proof that the replica's etcd holds everything up to `seq`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    epoch: Epoch,
    seq: Seq,
    revision: Revision,
}

impl Applied {
    pub(super) fn of(position: &Position) -> Self {
        Self { epoch: position.epoch, seq: position.seq, revision: position.origin_revision }
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub fn seq(&self) -> Seq {
        self.seq
    }

    /// Everything that the origin committed up to this revision is in.
    pub fn revision(&self) -> Revision {
        self.revision
    }
}

pub struct Applier {
    pub(super) link: LinkName,
    gate: Arc<Gate>,
    pub(super) etcd: Option<Etcd>,
    pub(super) limits: RequestLimits,
    pub(super) etcd_limits: EtcdLimits,
    queue_bytes_max: usize,
    pub(super) ranges: Option<Ranges>,
    pub(super) journal: Arc<Journal>,
    pub(super) dedupe: Arc<Dedupe>,
    pub(super) own: Arc<Mutex<OwnRevisions>>,
    pub(super) on_poison: OnPoison,
    pub(super) trial: Trial,
    /// As the position has it.
    pub(super) quarantine: Arc<Quarantine>,
    pub(super) retrying: Option<Retrying>,
    pub(super) breaker: Breaker,
    /// What waits up to this seq may be applied, whatever it deletes.
    pub(super) cleared: Seq,
    /// The last question to the origin about keys.
    pub(super) wanted: u64,
    /// The last hello knew of a link back over the same ranges.
    pub(super) link_back: bool,
    pub(super) told: watch::Receiver<Told>,
    /// Where both sides were proved equal, as the lookout tells it.
    closed: watch::Receiver<Revision>,
    /// The same, until the position says it; 0: it does.
    pub(super) proved: Revision,
    operator: mpsc::Receiver<ReplicaCommand>,
    /// What the dedupe log has not been told yet.
    done: Option<Applied>,
    pub(super) held: Option<Held>,
    /// The last position that this applier knew: what a fresh read is compared with.
    pub(super) expected: Option<Position>,
    /// Entries up to this seq were taken from the journal.
    pub(super) read_through: Seq,
    pub(super) waiting: VecDeque<(Waiting, Digest)>,
    pub(super) waiting_bytes: usize,
    pub(super) planned: Option<Plan>,
    pub(super) guard_failures: u32,
    pub(super) in_flight: Option<InFlight>,
    /// Places between seqs that are to be noted, in order.
    pub(super) marks: VecDeque<Mark>,
    pub(super) waymark: Waymark,
    /// The origin's last word on idle progress, and the seq after which it holds.
    pub(super) progress: Option<Idle>,
    pub(super) backoff: Backoff,
    pub(super) retry_at: Option<Instant>,
    /// Set by what only an operator can cure; a new hello clears it.
    pub(super) stopped: bool,
    /// Since when a fenced sender's rest is left to others, and where the position stood then.
    pub(super) left_to_others: Option<(Instant, Seq)>,
    /// The position moved past what the session sends: the next hello begins with an empty journal.
    pub(super) given_up: bool,
    pub(super) session: u64,
    /// What the breaker's clock counts from.
    pub(super) began: Instant,
    /// What the present session's sender may write with: a position above it is another sender's. `None`: there was no hello yet, or it is of
    /// another origin than the position, whose terms say nothing.
    pub(super) claim: Option<(Epoch, Term)>,
    /// The last hello that was taken, and the last that came: the one whose base copy runs is no reason to end it.
    pub(super) hello_taken: u64,
    pub(super) hello_waiting: watch::Receiver<u64>,
    pub(super) commands: mpsc::Receiver<ApplyCommand>,
    pub(super) view: watch::Sender<ApplyView>,
    pub(super) copying: Option<super::pages::Copying>,
}

/// What an applier is made of.
pub struct ApplierParts {
    pub link: LinkName,
    pub etcd: Arc<Gate>,
    pub limits: Limits,
    pub ranges: Option<Ranges>,
    pub journal: Arc<Journal>,
    pub dedupe: Arc<Dedupe>,
    /// The revisions that the applier makes, for whoever looks out for others'.
    pub own: Arc<Mutex<OwnRevisions>>,
    pub on_poison: OnPoison,
    pub delete_shares: DeleteShares,
    /// What an earlier process was refused.
    pub trial: Trial,
    /// What an operator asks.
    pub operator: mpsc::Receiver<ReplicaCommand>,
    pub told: watch::Receiver<Told>,
    /// Where both sides were proved equal after somebody else wrote.
    pub closed: watch::Receiver<Revision>,
    pub hello_waiting: watch::Receiver<u64>,
    pub commands: mpsc::Receiver<ApplyCommand>,
    pub view: watch::Sender<ApplyView>,
}

impl Applier {
    pub fn new(parts: ApplierParts) -> Self {
        let etcd_limits = EtcdLimits::new(&parts.limits, &parts.link, &parts.etcd);
        Self {
            link: parts.link,
            gate: parts.etcd,
            etcd: None,
            limits: etcd_limits.configured,
            etcd_limits,
            queue_bytes_max: parts.limits.queue_bytes_max,
            ranges: parts.ranges,
            journal: parts.journal,
            dedupe: parts.dedupe,
            own: parts.own,
            on_poison: parts.on_poison,
            trial: parts.trial,
            quarantine: Arc::default(),
            retrying: None,
            breaker: Breaker::new(parts.delete_shares),
            cleared: Seq(0),
            wanted: 0,
            link_back: false,
            told: parts.told,
            closed: parts.closed,
            proved: Revision(0),
            operator: parts.operator,
            done: None,
            held: None,
            expected: None,
            read_through: Seq(0),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            planned: None,
            guard_failures: 0,
            in_flight: None,
            marks: VecDeque::new(),
            waymark: Waymark::default(),
            progress: None,
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(1)),
            retry_at: Some(Instant::now()),
            stopped: false,
            left_to_others: None,
            given_up: false,
            session: 0,
            began: Instant::now(),
            claim: None,
            hello_taken: 0,
            hello_waiting: parts.hello_waiting,
            commands: parts.commands,
            view: parts.view,
            copying: None,
        }
    }

    /// Applies until `stop`; then what is in flight is waited for, so that nothing needs to be redone.
    pub async fn run(mut self, stop: CancellationToken) {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = self.turns() => {}
        }
        if let Some(in_flight) = self.in_flight.take() {
            let _ = tokio::time::timeout(STOP_DEADLINE, in_flight.answer).await;
        }
    }

    async fn turns(&mut self) {
        let mut reading: Option<Reading> = None;
        let mut looks = tokio::time::interval_at(Instant::now() + LOOK_EVERY, LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let may_read = self.may_read();
            // A read goes on while answers are taken: begun anew at each of them, it would be done over and over.
            reading = reading.filter(|reading| reading.after == self.read_through);
            if reading.is_none() && may_read {
                reading = Some(Reading::new(self.journal.clone(), self.read_through, self.queue_bytes_max / 2));
            }
            tokio::select! {
                biased;
                answer = answer_of(&mut self.in_flight) => self.finished(answer).await,
                command = self.commands.recv() => match command {
                    Some(command) => Box::pin(self.command(command)).await,
                    None => return,
                },
                Some(command) = next_command(&mut self.operator) => Box::pin(self.operate(command)).await,
                () = self.etcd_limits.changed() => self.forget_learned(),
                Ok(()) = self.closed.changed() => self.proved = *self.closed.borrow_and_update(),
                () = sleep_until(self.retry_at) => self.retry().await,
                _ = looks.tick() => Box::pin(self.look_without_stream()).await,
                entries = read(&mut reading), if may_read => match entries {
                    Ok(entries) => {
                        reading = None;
                        entries.into_iter().for_each(|entry| self.enqueue(entry));
                    }
                    // A new epoch begins under a read that waits where the old one ended.
                    Err(JournalError::Feed(FeedError::Reset)) => reading = None,
                    Err(e) => {
                        reading = None;
                        self.unread(&e).await;
                    }
                },
            }
            self.advance().await;
            // The position is the truth; the dedupe log may lag behind it, and is told again where its disk is slow.
            if self.done.take_if(|done| self.dedupe.done_through(done.epoch, done.seq).is_ok()).is_some() {
                failpoint::reach("dedupe-done");
            }
        }
    }

    fn enqueue(&mut self, entry: JournalEntry) {
        self.read_through = entry.seq;
        self.waiting_bytes += bytes_of(&entry.revision);
        self.waiting.push_back((Waiting { seq: entry.seq, revision: entry.revision }, entry.digest));
    }

    /// The first that waits is in, or the link goes on without it.
    pub(super) fn dequeue(&mut self) {
        if let Some((done, _)) = self.waiting.pop_front() {
            self.waiting_bytes = self.waiting_bytes.saturating_sub(bytes_of(&done.revision));
        }
    }

    /// True while following and with room for more. What stands before damage in the journal is applied before that is looked at again.
    fn may_read(&self) -> bool {
        let drained = self.waiting.is_empty() || !self.journal.is_damaged();
        self.follows() && drained && self.waiting_bytes < self.queue_bytes_max
    }

    pub(super) fn follows(&self) -> bool {
        let ready = self.held.as_ref().and_then(|h| h.position.as_ref()).is_some_and(|p| p.cursor.is_none());
        ready && !self.stopped && self.retry_at.is_none() && self.copying.is_none()
    }

    /// Plans and sends as far as can be done now.
    async fn advance(&mut self) {
        if !self.follows() {
            return;
        }
        if self.in_flight.as_ref().is_some_and(|f| f.load.revisions == 0 || self.trial.is_searching()) {
            // What comes next depends on how this one ends.
            return;
        }
        let writes = !self.waiting.is_empty() || self.progress.is_some_and(|idle| idle.persist);
        if writes && self.in_flight.is_none() && self.held.as_ref().is_some_and(Held::is_stale) {
            self.held = None;
            Box::pin(self.retry()).await;
            if !self.follows() {
                return;
            }
        }
        if self.stays_paused() {
            return;
        }
        if self.in_flight.is_none() && !self.marks.is_empty() {
            Box::pin(self.reach_marks()).await;
            if !self.follows() {
                return;
            }
        }
        if !self.clear_deletes().await {
            return;
        }
        if self.in_flight.is_none() {
            // More came while the last transaction was on its way.
            let waiting = self.waiting.len();
            self.planned = self.planned.take_if(|planned| !planned.has_room(waiting));
        }
        if self.planned.is_none() {
            let in_flight = self.in_flight.as_ref().map_or(0, |f| f.load.revisions);
            let begun = if in_flight == 0 { self.begun() } else { Begun::default() };
            let (Some(ranges), true) = (&self.ranges, self.waiting.len() > in_flight) else {
                return self.persist_idle().await;
            };
            let mark = self.marks.front().map(|mark| mark.after);
            let cleared = self.waiting.iter().map(|(w, _)| w).take_while(|w| w.seq <= self.cleared);
            let next = plan::up_to(cleared.skip(in_flight), mark);
            match plan::plan(next.take(self.trial.revisions_max()), begun, ranges, &self.limits) {
                Ok(planned) => self.planned = planned,
                Err(e) => return Box::pin(self.refuse_plan(&e)).await,
            }
        }
        if self.in_flight.is_none()
            && let Some(planned) = self.planned.take()
        {
            self.settle(planned).await;
        }
    }

    fn begun(&self) -> Begun {
        Begun::of(self.held.as_ref().and_then(|h| h.position.as_ref()))
    }

    /// Asks the replica about the plan's runs, and sends the transaction.
    async fn settle(&mut self, planned: Plan) {
        let facts = match self.run_facts(&planned).await {
            Ok(facts) => facts,
            Err(e) => return self.doubt(&e),
        };
        match planned.settle(&facts, &self.limits) {
            Ok(settled) => self.submit(settled),
            Err(PlanError::LimitsShrank) => {}
            Err(e) => Box::pin(self.refuse_plan(&e)).await,
        }
    }

    async fn run_facts(&mut self, planned: &Plan) -> Result<Vec<RunFacts>, EtcdError> {
        let mut facts = Vec::new();
        if planned.runs.is_empty() || self.guard_failures >= GUARD_FAILURES_MAX {
            return Ok(facts);
        }
        let etcd = self.etcd().await?;
        for run in &planned.runs {
            // One more than the run has is one that it does not delete.
            let page = etcd.page(&run.range, run.ops.len() + 1, None, Columns::KeysOnly).await?;
            let keys: Vec<Bytes> = page.kvs.into_iter().map(|kv| kv.key).collect();
            let mut fact = planned.run_facts(run, page.head, &keys);
            fact.same_keys_only &= !page.more;
            facts.push(fact);
        }
        Ok(facts)
    }

    pub(super) async fn etcd(&mut self) -> Result<Etcd, EtcdError> {
        if let Some(etcd) = &self.etcd {
            return Ok(etcd.clone());
        }
        let etcd = self.gate.connect().await?;
        self.etcd = Some(etcd.clone());
        Ok(etcd)
    }

    /// What is in flight is waited for: what comes next needs the position as it is then.
    async fn settle_in_flight(&mut self) {
        if let Some(in_flight) = &mut self.in_flight {
            let answer = (&mut in_flight.answer).await;
            self.finished(answer).await;
        }
    }

    async fn operate(&mut self, command: ReplicaCommand) {
        self.settle_in_flight().await;
        match command {
            ReplicaCommand::Show { seq, reply } => _ = reply.send(self.show(seq).await),
            ReplicaCommand::Retry { seq, reply } => self.begin_retry(seq, reply).await,
            ReplicaCommand::Discard { seq, reply } => _ = reply.send(self.discard(seq).await),
            ReplicaCommand::Allow { seq, reply } => _ = reply.send(self.allow(seq).await),
            ReplicaCommand::Pause { by, reply } => _ = reply.send(self.pause(&by).await),
            ReplicaCommand::Resume { by, reply } => _ = reply.send(self.resume(&by).await),
        }
    }

    async fn command(&mut self, command: ApplyCommand) {
        self.settle_in_flight().await;
        match command {
            // Who waited too long was told so, and says hello again.
            ApplyCommand::Hello { facts, reply } if reply.is_closed() => {
                self.hello_taken = self.hello_taken.max(facts.session);
            }
            ApplyCommand::Hello { facts, reply } => {
                let answer = Box::pin(self.hello(facts, &reply)).await;
                let _ = reply.send(answer);
            }
            ApplyCommand::Progress { session, through, after, waymark, persist } => {
                // What another origin said of its revisions says nothing of this one's.
                if session == self.session {
                    self.waymark = waymark;
                    let persist = persist || self.progress.is_some_and(|idle| idle.persist);
                    self.progress = Some(Idle { through, after, persist });
                    self.publish(false);
                }
                self.look_again().await;
            }
            ApplyCommand::Copy { session, step } => {
                if session == self.session && !self.stopped {
                    Box::pin(self.copy_step(step)).await;
                }
            }
            ApplyCommand::Mark { session, mark, taken } => {
                if session == self.session && !self.stopped {
                    self.take_mark(mark);
                }
                let _ = taken.send(());
            }
        }
    }

    /// Makes what is held visible; `committed`: it is in etcd, so journal and dedupe log may let go of what it covers.
    pub(super) fn publish(&mut self, committed: bool) {
        // In doubt about the last transaction, what was known before it still holds.
        let position = self.held.as_ref().map_or_else(|| self.expected.clone(), |h| h.position.clone());
        let applied = position.as_ref().map(Applied::of);
        let revision = position.as_ref().map_or(Revision(0), |p| next::applied_revision(p, self.progress));
        self.view.send_modify(|view| view.hold(position, revision));
        if let (true, Some(applied)) = (committed, applied) {
            self.journal.trim(applied.seq);
            failpoint::reach("journal-trimmed");
            self.done = Some(applied);
        }
    }

    /// Writes the position without a change: when the origin asks for it, when a base copy's last page is passed, and when what somebody else
    /// wrote is mended.
    async fn persist_idle(&mut self) {
        let Some(position) = self.held.as_ref().and_then(|h| h.position.as_ref()) else { return };
        if self.in_flight.is_some() || !self.waiting.is_empty() {
            return;
        }
        let idle = self.progress.and_then(|idle| next::after_idle(position, idle));
        let Some(next) = idle.or_else(|| next::after_proved(position, self.proved)) else { return };
        self.progress = self.progress.map(|idle| Idle { persist: false, ..idle });
        match self.commit(next, TxnTree { guards: Vec::new(), success: Vec::new() }).await {
            Ok(Committed::Done) => {}
            Ok(Committed::GuardFailed | Committed::PositionMoved) => self.retry().await,
            Err(e) => self.doubt(&e),
        }
    }
}

/// Never, where there is no such time.
pub(super) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
