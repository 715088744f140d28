//! Job: long runs of deletes, as one guarded range delete each where the replica holds nothing else there; and the settled transaction.
//! Input: a plan, and for each of its runs what the replica holds there. Output: a `Settled` transaction.
//! Pure: no clock, no I/O.
//! Always true: a range delete removes only keys that the plan deletes: its guard fails the transaction if anybody put one there since.

use super::nest::nest;
use super::size::{Load, delete_bytes, guard_bytes, op_bytes};
use super::{Extent, Op, Plan, PlanError, RangeGuard, RequestLimits, TxnTree, as_u64, fitting};
use crate::model::{KeyRange, Ranges, Revision, Seq};
use crate::wire::parts::after_key;
use bytes::Bytes;
use std::collections::BTreeSet;
use std::ops::Range;

/// Fewer deletes are not worth a read of the replica.
pub const RUN_KEYS_MIN: usize = 64;

/// Consecutive deletes of a plan, inside one piece of the link's ranges, with no put among them.
#[derive(Clone, PartialEq, Eq)]
pub struct DeleteRun {
    /// From the first key to just past the last one.
    pub range: KeyRange,
    /// Which of the plan's operations it is.
    pub ops: Range<usize>,
}

impl std::fmt::Debug for DeleteRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeleteRun({} keys)", self.ops.len())
    }
}

/// What a keys-only, linearizable read of a run's range showed. It must not be older than this link's last transaction, else the
/// guard fails on the link's own puts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunFacts {
    /// The header's revision of the read.
    pub read_revision: Revision,
    /// True if the replica holds no key in the range that the run does not delete.
    pub same_keys_only: bool,
}

/// A transaction, ready but for the position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// How many of the waiting revisions are in it.
    pub revisions: usize,
    /// The last one in it.
    pub seq: Seq,
    pub revision: Revision,
    pub extent: Extent,
    pub tree: TxnTree,
    /// The whole request with the largest position, never less than etcd counts.
    pub request_bytes: usize,
}

impl Plan {
    /// What `settle` wants to know of a run. `present`: the replica's keys in the run's range, in key order.
    pub fn run_facts(&self, run: &DeleteRun, read_revision: Revision, present: &[Bytes]) -> RunFacts {
        let mut deleted = self.ops.get(run.ops.clone()).unwrap_or_default().iter().map(Op::first_key);
        let same_keys_only = present.iter().all(|key| deleted.any(|deleted| deleted == key));
        RunFacts { read_revision, same_keys_only }
    }

    /// The transaction, with a range delete for each run whose facts allow it. With no facts it deletes key by key, and a revision
    /// that only fits with its range deletes becomes its first part.
    pub fn settle(mut self, facts: &[RunFacts], limits: &RequestLimits) -> Result<Settled, PlanError> {
        let runs = std::mem::take(&mut self.runs);
        let allowed: Vec<(DeleteRun, Revision)> = runs
            .into_iter()
            .zip(facts)
            .filter(|(_, facts)| facts.same_keys_only)
            .map(|(run, facts)| (run, facts.read_revision.next()))
            .collect();
        let (runs, below): (Vec<DeleteRun>, Vec<Revision>) = allowed.into_iter().unzip();
        let with_runs = load_with(&self.ops, &runs);
        if !runs.is_empty() && limits.fits(&with_runs) {
            let guards = runs.iter().zip(below).map(|(run, below)| RangeGuard { range: run.range.clone(), below });
            let guards = guards.collect();
            self.ops = replace_runs(self.ops, &runs);
            return self.arrange(guards, &with_runs, limits);
        }
        let key_by_key = Load::of(&self.ops);
        if limits.fits(&key_by_key) || (self.revisions == 1 && limits.may_fit(&key_by_key)) {
            return self.arrange(Vec::new(), &key_by_key, limits);
        }
        if self.revisions > 1 {
            return Err(PlanError::LimitsShrank);
        }
        let (from, of) = match self.extent {
            Extent::Whole => (0, as_u64(self.ops.len())),
            Extent::Part { from, of, .. } => (from, of),
        };
        self.ops.truncate(fitting(&self.ops, self.revision, limits)?);
        self.extent = Extent::Part { from, to: from + as_u64(self.ops.len()), of };
        let load = Load::of(&self.ops);
        self.arrange(Vec::new(), &load, limits)
    }

    fn arrange(self, guards: Vec<RangeGuard>, load: &Load, limits: &RequestLimits) -> Result<Settled, PlanError> {
        let tree = arrange(self.ops, guards, load, limits)?;
        Ok(Settled {
            revisions: self.revisions,
            seq: self.seq,
            revision: self.revision,
            extent: self.extent,
            request_bytes: limits.request_bytes(&tree),
            tree,
        })
    }
}

/// What deletes these keys, each once, beside the position.
pub fn deletes(keys: impl IntoIterator<Item = Bytes>, limits: &RequestLimits) -> Result<TxnTree, PlanError> {
    let keys: BTreeSet<Bytes> = keys.into_iter().collect();
    let ops: Vec<Op> = keys.into_iter().map(|key| Op::Delete { key }).collect();
    let load = Load::of(&ops);
    arrange(ops, Vec::new(), &load, limits)
}

/// Checks and nests operations that are known to fit.
pub(super) fn arrange(
    ops: Vec<Op>,
    guards: Vec<RangeGuard>,
    load: &Load,
    limits: &RequestLimits,
) -> Result<TxnTree, PlanError> {
    check_overlap(&ops)?;
    let shape = limits.shape(load).ok_or(PlanError::LimitsShrank)?;
    Ok(TxnTree { guards, success: nest(ops, &shape) })
}

/// etcd refuses a transaction that puts a key twice, or puts and deletes it; in key order it shows in one pass.
fn check_overlap(ops: &[Op]) -> Result<(), PlanError> {
    let apart = ops.windows(2).all(|pair| match &pair[0] {
        Op::Put { key, .. } | Op::Create { key, .. } | Op::Delete { key } => key < pair[1].first_key(),
        Op::DeleteRange { range } => !range.to.is_empty() && range.to <= *pair[1].first_key(),
    });
    if apart { Ok(()) } else { Err(PlanError::Overlap) }
}

/// The longest runs, in key order: each takes a compare at the top, so only a quarter of its width goes to them.
pub(super) fn delete_runs(ops: &[Op], ranges: &Ranges, limits: &RequestLimits) -> Vec<DeleteRun> {
    let mut runs = Vec::new();
    let mut start = 0;
    while start < ops.len() {
        let end = run_end(ops, start, ranges);
        if end - start >= RUN_KEYS_MIN {
            let run = DeleteRun { range: run_range(ops, start..end), ops: start..end };
            let (as_range, key_by_key) = run_bytes(ops, &run);
            if as_range < key_by_key {
                runs.push(run);
            }
        }
        start = end.max(start + 1);
    }
    runs.sort_by_key(|run| std::cmp::Reverse(run.ops.len()));
    runs.truncate(limits.ops_max / 4);
    runs.sort_by_key(|run| run.ops.start);
    runs
}

/// Where the run that starts here ends: at the first put, or at the edge of the piece of the ranges that its first key lies in.
fn run_end(ops: &[Op], start: usize, ranges: &Ranges) -> usize {
    let Some(piece) = ranges.pieces().iter().find(|piece| piece.contains(ops[start].first_key())) else { return start };
    let inside = |op: &&Op| matches!(op, Op::Delete { key } if piece.contains(key));
    start + ops[start..].iter().take_while(inside).count()
}

fn run_range(ops: &[Op], run: Range<usize>) -> KeyRange {
    KeyRange { from: ops[run.start].first_key().clone(), to: after_key(ops[run.end - 1].first_key()) }
}

/// As a guarded range, and key by key.
fn run_bytes(ops: &[Op], run: &DeleteRun) -> (usize, usize) {
    let guard = guard_bytes(&RangeGuard { range: run.range.clone(), below: Revision(0) });
    let as_range = guard + op_bytes(&Op::DeleteRange { range: run.range.clone() });
    let key_by_key = ops[run.ops.clone()].iter().map(|op| delete_bytes(op.first_key().len())).sum();
    (as_range, key_by_key)
}

/// What the operations cost with these runs as guarded ranges.
pub(super) fn load_with(ops: &[Op], runs: &[DeleteRun]) -> Load {
    let mut load = Load::of(ops);
    for run in runs {
        let (as_range, key_by_key) = run_bytes(ops, run);
        load.bytes = load.bytes + as_range - key_by_key;
        load.count = load.count + 1 - run.ops.len();
        load.guards += 1;
    }
    load
}

fn replace_runs(ops: Vec<Op>, runs: &[DeleteRun]) -> Vec<Op> {
    let mut runs = runs.iter().peekable();
    let mut replaced = Vec::new();
    for (i, op) in ops.into_iter().enumerate() {
        runs.next_if(|run| run.ops.end <= i);
        match runs.peek() {
            Some(run) if run.ops.start == i => replaced.push(Op::DeleteRange { range: run.range.clone() }),
            Some(run) if run.ops.contains(&i) => {}
            Some(_) | None => replaced.push(op),
        }
    }
    replaced
}

impl Op {
    pub(super) fn first_key(&self) -> &Bytes {
        match self {
            Op::Put { key, .. } | Op::Create { key, .. } | Op::Delete { key } => key,
            Op::DeleteRange { range } => &range.from,
        }
    }
}
