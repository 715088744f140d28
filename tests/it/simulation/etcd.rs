//! Job: an etcd in memory: revisions, history, compaction, restore, transactions by etcd's rules, one watch at a time.
//! Input: writes, requests, reads, polls. Output: what etcd would answer.
//! Pure: no clock, no I/O.
//! Always true: it keeps what the product relies on: a revision for each transaction that writes, refusals below the compaction (whose own
//! revision it still shows, deletes too: measured with 3.5.30), silence for a watch that begins in the future, the width and overlap rules.

use super::random::Random;
use bytes::Bytes;
use etcd_ferry::model::{Change, ClusterId, KeyRange, Ranges, Revision};
use etcd_ferry::replica::plan::{Condition, Node, Op, Request, RequestLimits, TxnTree};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// The planner's own model: its rules on transactions are used here as they are there.
#[allow(dead_code, reason = "the planner's tests use the rest")]
#[path = "../../../src/replica/plan/model_etcd.rs"]
mod model_etcd;

pub use model_etcd::{Keys, Refused};

#[derive(Clone)]
pub struct Etcd {
    pub cluster: ClusterId,
    keys: Keys,
    pub revision: u64,
    pub compacted: u64,
    /// What each revision wrote, in its order; and what was there after it.
    history: BTreeMap<u64, Vec<Change>>,
    states: BTreeMap<u64, Rc<Keys>>,
    pub ops_max: usize,
    pub bytes_max: usize,
}

/// An answer to a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    pub succeeded: bool,
    /// In the failure branch: the `mod_revision` of the key that was read.
    pub found: Option<Revision>,
    pub revision: Revision,
}

pub struct Page {
    pub kvs: Vec<(Bytes, Bytes)>,
    pub head: Revision,
    pub more: bool,
}

/// The revision asked for is compacted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compacted;

impl Etcd {
    pub fn new(cluster: u64) -> Self {
        let states = BTreeMap::from([(1, Rc::new(Keys::new()))]);
        Self {
            cluster: ClusterId(cluster),
            keys: Keys::new(),
            revision: 1,
            compacted: 0,
            history: BTreeMap::new(),
            states,
            ops_max: 128,
            bytes_max: 1 << 20,
        }
    }

    pub fn head(&self) -> Revision {
        Revision(self.revision)
    }

    /// The value and its `mod_revision`.
    pub fn get(&self, key: &[u8]) -> Option<(Bytes, Revision)> {
        self.keys.get(key).map(|(value, modified)| (value.clone(), Revision::from_etcd(*modified)))
    }

    /// Commits changes without a condition; those that change nothing make no revision.
    pub fn write(&mut self, changes: Vec<Change>) -> Option<Revision> {
        let there = |change: &Change| matches!(change, Change::Put { .. }) || self.keys.contains_key(change.key());
        let written: Vec<Change> = changes.into_iter().filter(there).collect();
        if written.is_empty() { None } else { Some(self.commit_changes(written)) }
    }

    fn commit_changes(&mut self, written: Vec<Change>) -> Revision {
        self.revision += 1;
        let revision = self.head().to_etcd();
        model_etcd::write(&mut self.keys, &written, revision);
        self.history.insert(self.revision, written);
        self.states.insert(self.revision, Rc::new(self.keys.clone()));
        self.head()
    }

    pub fn commit(&mut self, request: &Request) -> Result<Answer, Refused> {
        let txn = model_etcd::encode(request);
        model_etcd::check(&txn, self.ops_max, self.bytes_max)?;
        let written = model_etcd::judged(&self.keys, &txn);
        let succeeded = written.is_some();
        if let Some(written) = written.filter(|written| !written.is_empty()) {
            self.commit_changes(written);
        }
        let found = (!succeeded).then(|| self.get(&request.or_read).map_or(Revision(0), |(_, modified)| modified));
        Ok(Answer { succeeded, found, revision: self.head() })
    }

    /// The first `limit` keys of a range (0: all), at the head or at a revision.
    pub fn page(&self, range: &KeyRange, limit: usize, at: Option<Revision>) -> Result<Page, Compacted> {
        let keys = match at {
            Some(at) if at.0 < self.compacted => return Err(Compacted),
            Some(at) => self.state_at(at.0),
            None => &self.keys,
        };
        let inside = keys.range(range.from.clone()..).take_while(|(key, _)| range.contains(key));
        let mut kvs: Vec<(Bytes, Bytes)> = inside.map(|(key, (value, _))| (key.clone(), value.clone())).collect();
        let more = limit > 0 && kvs.len() > limit;
        if more {
            kvs.truncate(limit);
        }
        Ok(Page { kvs, head: self.head(), more })
    }

    pub fn count(&self, pieces: &[KeyRange]) -> u64 {
        let of = |piece: &KeyRange| self.page(piece, 0, None).map_or(0, |page| page.kvs.len());
        pieces.iter().map(of).sum::<usize>() as u64
    }

    fn state_at(&self, revision: u64) -> &Keys {
        self.states.range(..=revision).next_back().map_or(&self.keys, |(_, state)| state)
    }

    /// What was there after the head's revision.
    pub fn state(&self) -> Rc<Keys> {
        self.states.values().next_back().cloned().unwrap_or_default()
    }

    pub fn written_at(&self, revision: u64) -> &[Change] {
        self.history.get(&revision).map_or(&[], Vec::as_slice)
    }

    /// As the product asks it: by a read of the revision before, so that older etcds too show its deletes.
    pub fn shows_whole(&self, revision: Revision) -> bool {
        revision.0.saturating_sub(1) >= self.compacted
    }

    pub fn compact(&mut self, revision: u64) {
        self.compacted = self.compacted.max(revision.min(self.revision));
    }

    fn shown_at(&self, revision: u64, range: &KeyRange) -> Vec<(Revision, Change)> {
        let shown = self.written_at(revision).iter().filter(|change| range.contains(change.key()));
        shown.map(|change| (Revision(revision), change.clone())).collect()
    }
}

pub enum Signal {
    Created,
    Events { events: Vec<(Revision, Change)>, fragment: bool },
    Progress(Revision),
    Compacted(Revision),
}

/// One watcher on a stream of its own. Messages that it has not given out are lost with it.
pub struct Watch {
    range: KeyRange,
    next: u64,
    created: bool,
    messages: VecDeque<Signal>,
}

impl Watch {
    pub fn open(ranges: &Ranges, from: Revision) -> Self {
        Self { range: ranges.covering(), next: from.0, created: false, messages: VecDeque::new() }
    }

    /// The next message; `None`: there is none now.
    pub fn poll(&mut self, etcd: &Etcd, random: &mut Random) -> Option<Signal> {
        if !self.created {
            self.created = true;
            return Some(Signal::Created);
        }
        if let Some(message) = self.messages.pop_front() {
            return Some(message);
        }
        if self.next < etcd.compacted {
            return Some(Signal::Compacted(Revision(etcd.compacted)));
        }
        if self.next > etcd.revision + 1 {
            return None;
        }
        let through = etcd.revision.min(self.next + random.below(6) as u64);
        let events: Vec<_> = (self.next..=through).flat_map(|at| etcd.shown_at(at, &self.range)).collect();
        self.next = self.next.max(through + 1);
        self.cut(events, random);
        if let Some(message) = self.messages.pop_front() {
            return Some(message);
        }
        (self.next > etcd.revision && random.percent(30)).then_some(Signal::Progress(etcd.head()))
    }

    /// One message in fragments; the last one says that it is the last.
    fn cut(&mut self, events: Vec<(Revision, Change)>, random: &mut Random) {
        let mut piece = Vec::new();
        let last = events.len().saturating_sub(1);
        for (at, event) in events.into_iter().enumerate() {
            piece.push(event);
            let ends = at == last;
            if ends || random.percent(25) {
                let events = std::mem::take(&mut piece);
                self.messages.push_back(Signal::Events { events, fragment: !ends });
            }
        }
    }
}
