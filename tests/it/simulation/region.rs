//! Job: the replica's etcd with what is on its way to it, and what every stage of a simulation shares: chance, faults, counts, the trace.
//! Input: requests, the seed's faults. Output: answers that may be lost; what is in etcd is judged as it is committed.
//! Pure: no clock, no I/O.
//! Always true: a request whose sender died or gave up may still be committed, at any later step, once.

use super::etcd::{Answer, Etcd, Keys, Refused};
use super::judge::{Fault, Judge};
use super::random::Random;
use bytes::Bytes;
use etcd_ferry::model::Change;
use etcd_ferry::replica::plan::Request;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Steps that a failing seed shows.
const TRACE_LINES: usize = 40;

/// What one seed makes of everything that can be chosen.
pub struct Context {
    pub random: Random,
    /// Off once the run has to come to rest.
    pub faults: bool,
    /// How often a line damages a frame, of a thousand.
    pub frames_damaged: usize,
    pub replica: Etcd,
    pub judge: Judge,
    /// Requests on their way, each with its number.
    pending: Vec<(u64, Request)>,
    answers: BTreeMap<u64, Result<Answer, Refused>>,
    last_number: u64,
    pub counts: BTreeMap<String, u64>,
    pub fault: Option<Fault>,
    pub step: u64,
    trace: VecDeque<String>,
}

/// The answer did not come: whether the request was committed is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost;

/// Why a commit that was waited for brought no answer to go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    Lost,
    TooManyOps,
    TooLarge,
    /// Who waited has died.
    Crashed,
}

impl Context {
    pub fn new(random: Random, replica: Etcd, judge: Judge) -> Self {
        Self {
            random,
            faults: true,
            frames_damaged: 8,
            replica,
            judge,
            pending: Vec::new(),
            answers: BTreeMap::new(),
            last_number: 0,
            counts: BTreeMap::new(),
            fault: None,
            step: 0,
            trace: VecDeque::new(),
        }
    }

    pub fn count(&mut self, what: &str) {
        *self.counts.entry(what.to_owned()).or_default() += 1;
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if self.trace.len() == TRACE_LINES {
            self.trace.pop_front();
        }
        self.trace.push_back(format!("{:>5}  {}", self.step, line()));
    }

    pub fn trace(&self) -> String {
        self.trace.iter().cloned().collect::<Vec<_>>().join("\n")
    }

    /// True now and then while faults happen; counted.
    pub fn fails(&mut self, permille: usize, what: &str) -> bool {
        let fails = self.faults && self.random.permille(permille);
        if fails {
            self.count(what);
            self.note(|| what.to_owned());
        }
        fails
    }

    pub fn fail(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }

    /// Sends a request without waiting for it.
    pub fn send(&mut self, request: Request) -> u64 {
        self.last_number += 1;
        self.pending.push((self.last_number, request));
        self.last_number
    }

    /// etcd takes one of the requests that are on their way; it takes them in any order.
    pub fn commit_pending(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let at = if self.faults { self.random.below(self.pending.len()) } else { 0 };
        let (number, request) = self.pending.remove(at);
        let answer = self.commit(&request);
        self.answers.insert(number, answer);
    }

    /// What a dead connection carried is lost, or not.
    pub fn drop_pending(&mut self, number: u64) {
        if self.random.percent(50) {
            self.pending.retain(|(of, _)| *of != number);
        }
    }

    pub fn is_pending(&self, number: u64) -> bool {
        self.pending.iter().any(|(of, _)| *of == number)
    }

    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The replica is what it was in `snapshot`; what was on its way is gone.
    pub fn restore(&mut self, snapshot: Etcd, foreign: BTreeSet<Bytes>) {
        self.replica = snapshot;
        self.pending.clear();
        self.answers.clear();
        let state = self.replica.state();
        self.judge.replica_restored(&state, foreign);
    }

    pub fn answer(&mut self, number: u64) -> Option<Result<Answer, Refused>> {
        self.answers.remove(&number)
    }

    fn commit(&mut self, request: &Request) -> Result<Answer, Refused> {
        let before = self.replica.head();
        let answer = self.replica.commit(request);
        if self.replica.head() > before {
            let written: Vec<Change> = self.replica.written_at(self.replica.revision).to_vec();
            let state: &Keys = &self.replica.state();
            if let Err(fault) = self.judge.link_wrote(&written, state) {
                self.fail(fault);
            }
        }
        answer
    }

    /// Sends a request and waits for the answer.
    pub fn commit_and_wait(&mut self, request: &Request) -> Result<Answer, Trouble> {
        while self.faults && !self.pending.is_empty() && self.random.percent(10) {
            self.commit_pending();
        }
        if self.fails(15, "request lost") {
            return Err(Trouble::Lost);
        }
        let answer = self.commit(request);
        if self.fails(15, "answer lost") {
            return Err(Trouble::Lost);
        }
        answer.map_err(|refused| trouble_of(&refused, self))
    }

    /// A read of the replica's etcd.
    pub fn read(&mut self) -> Result<&Etcd, Lost> {
        if self.fails(5, "read failed") { Err(Lost) } else { Ok(&self.replica) }
    }
}

/// What etcd refuses for its limits is learned; anything else means that the product built what etcd does not take.
pub fn trouble_of(refused: &Refused, context: &mut Context) -> Trouble {
    match refused {
        Refused::TooManyOps => {
            context.count("refused for operations");
            Trouble::TooManyOps
        }
        Refused::TooLarge { .. } => {
            context.count("refused for bytes");
            Trouble::TooLarge
        }
        Refused::DuplicateKey | Refused::EmptyKey => {
            context.fail(Fault::new("well formed", format!("etcd refuses the transaction: {refused:?}")));
            Trouble::Lost
        }
    }
}
