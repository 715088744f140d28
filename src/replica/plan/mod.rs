//! Job: from waiting whole revisions to one replica transaction, and what a base copy writes.
//! Input: revisions in order, the link's ranges, the replica's limits, what the replica holds where a run is deleted. Output: a `TxnTree`.
//! Pure: no clock, no I/O.
//! Always true: a plan holds whole revisions, or a part of one that is larger than a request; it fits the limits, and no key is in it twice.

mod copy;
#[cfg(test)]
mod model_etcd;
mod nest;
mod request;
mod runs;
mod size;
#[cfg(test)]
mod tests;

pub use copy::{
    CopyChunk, CopyDiff, CopyPolicy, GuardCase, GuardCount, GuardStop, copy_chunks, copy_diff, guard_verdict,
};
pub use request::{Answered, Condition, Request, answered};
pub use runs::{DeleteRun, RUN_KEYS_MIN, RunFacts, Settled, deletes};
pub use size::{LimitRefusal, RequestLimits};

use crate::model::limits::POSITION_REQUEST_BYTES;
use crate::model::{Change, Digest, KeyRange, Position, Ranges, Revision, Seq, WholeRevision};
use crate::wire::digest;
use crate::wire::replicate::refusal::Kind;
use bytes::Bytes;
use size::Load;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// Merging stops here. etcd applies one transaction at a time, and 14,000 puts in one took it 0.4 s, 60,000 took 2 s (3.5.30, two
/// cores): the replica's other clients wait so long. A single revision may have more, since it stays whole.
pub const MERGED_OPS_MAX: usize = 16_384;

/// A revision that is admitted and not yet applied.
#[derive(Debug, Clone)]
pub struct Waiting {
    pub seq: Seq,
    pub revision: Arc<WholeRevision>,
}

/// One operation of a transaction.
#[derive(Clone, PartialEq, Eq)]
pub enum Op {
    Put {
        key: Bytes,
        value: Bytes,
    },
    /// A put that does nothing if the key is there: a nested transaction with the compare `mod_revision(key) == 0`.
    Create {
        key: Bytes,
        value: Bytes,
    },
    Delete {
        key: Bytes,
    },
    /// Only ever with a [`RangeGuard`] over the same range.
    DeleteRange {
        range: KeyRange,
    },
}

/// Never shows a key or a value: logs may hold what this prints.
impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Put { key, value } => write!(f, "Put({} B key, {} B value)", key.len(), value.len()),
            Op::Create { key, value } => write!(f, "Create({} B key, {} B value)", key.len(), value.len()),
            Op::Delete { key } => write!(f, "Delete({} B key)", key.len()),
            Op::DeleteRange { range } => write!(f, "DeleteRange({} B, {} B)", range.from.len(), range.to.len()),
        }
    }
}

/// A compare at the top of the transaction: every key in the range has a `mod_revision` below this one.
/// Deeper, a compare that fails would skip its branch and let the rest commit; here it fails the whole.
#[derive(Clone, PartialEq, Eq)]
pub struct RangeGuard {
    pub range: KeyRange,
    pub below: Revision,
}

impl fmt::Debug for RangeGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RangeGuard(below {})", self.below)
    }
}

/// A transaction but for the position: the applier adds its compare and its put at the top, and its get as the failure branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnTree {
    pub guards: Vec<RangeGuard>,
    pub success: Vec<Node>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Op(Op),
    /// A nested transaction: no compares, so that its success branch is always taken.
    Txn(Vec<Node>),
}

/// Whether the last revision of a plan is in it as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    Whole,
    /// Changes `from..to` of the `of` that the revision has, in key order. `to` is the position's `part`, until it reaches `of`.
    Part {
        from: u64,
        to: u64,
        of: u64,
    },
}

/// What one transaction is to hold. `settle` makes the transaction, once the replica was asked about the runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// How many of the waiting revisions are in it.
    pub revisions: usize,
    /// The last one in it.
    pub seq: Seq,
    pub revision: Revision,
    pub extent: Extent,
    /// The revision after it, if one waits, does not fit.
    pub full: bool,
    /// Puts and deletes in key order, each key once: its last write.
    pub ops: Vec<Op>,
    /// In key order; parts of `ops`.
    pub runs: Vec<DeleteRun>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The advice has room for a retry from quarantine, whose position is longer.
    #[error(
        "revision {revision} holds a key of {key_bytes} bytes with a value of {value_bytes} bytes; to apply it takes a request of \
         {request_bytes_needed} bytes, and the replica's etcd takes {request_bytes_max}: raise --max-request-bytes of the replica's etcd, \
         and request_bytes_max in [limits] of its sidecar, to at least {}, or better to what the origin's etcd has and \
         {POSITION_REQUEST_BYTES} more, which all its values fit; then restart that sidecar, and after it the origin's",
        *request_bytes_needed as u64 + POSITION_REQUEST_BYTES
    )]
    TooLarge {
        revision: Revision,
        key_bytes: usize,
        value_bytes: usize,
        request_bytes_needed: usize,
        request_bytes_max: usize,
    },
    #[error("revision {revision} is not as a revision must be: {rule}")]
    Malformed { revision: Revision, rule: &'static str },
    #[error("seq {got} waits where {expected} must come")]
    OutOfOrder { expected: Seq, got: Seq },
    #[error("the position says that {part} changes of revision {revision} are in, and it has only {changes}")]
    PartBeyond { revision: Revision, part: u64, changes: u64 },
    #[error(
        "{part} changes of another revision are in where revision {revision} comes: the origin's history was replaced while that one was \
         applied in parts"
    )]
    PartOfAnother { revision: Revision, part: u64 },
    #[error("the replica's limits shrank after the plan was made: plan again")]
    LimitsShrank,
    #[error("a transaction would write a key twice")]
    Overlap,
}

/// What follows from a plan that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlanReaction {
    /// The same would be refused again: the link stops.
    Stop(Kind),
    /// What waits does not continue the position: it is dropped, and a new hello settles where to go on.
    HelloAgain,
    PlanAgain,
}

impl PlanError {
    /// The revision that it is about, if it lies in that revision alone; what the origin is told of it.
    pub fn poison(&self) -> Option<(Revision, Kind)> {
        match self {
            PlanError::TooLarge { revision, .. } => Some((*revision, Kind::TooLarge)),
            PlanError::Malformed { revision, .. } => Some((*revision, Kind::Outside)),
            PlanError::PartBeyond { .. }
            | PlanError::PartOfAnother { .. }
            | PlanError::OutOfOrder { .. }
            | PlanError::LimitsShrank
            | PlanError::Overlap => None,
        }
    }

    pub fn reaction(&self) -> PlanReaction {
        match self {
            PlanError::TooLarge { .. } => PlanReaction::Stop(Kind::TooLarge),
            // What was sent is no revision, or not the one of which a part is in.
            PlanError::Malformed { .. } | PlanError::Overlap => PlanReaction::Stop(Kind::Outside),
            PlanError::PartBeyond { .. } | PlanError::PartOfAnother { .. } => PlanReaction::Stop(Kind::Conflict),
            PlanError::OutOfOrder { .. } => PlanReaction::HelloAgain,
            PlanError::LimitsShrank => PlanReaction::PlanAgain,
        }
    }
}

/// What the position says of a revision that is applied in parts: so many of its changes are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Begun {
    pub part: u64,
    /// Of that revision.
    pub digest: Option<Digest>,
}

impl Begun {
    pub fn of(position: Option<&Position>) -> Self {
        position.map_or_else(Self::default, |position| Self { part: position.part, digest: position.part_digest })
    }
}

/// Plans the next transaction: the first revision alone while only one waits, else as many as fit together. `begun`: what of the first
/// revision is in already. `None` if nothing waits.
pub fn plan<'a>(
    waiting: impl IntoIterator<Item = &'a Waiting>,
    begun: Begun,
    ranges: &Ranges,
    limits: &RequestLimits,
) -> Result<Option<Plan>, PlanError> {
    let mut waiting = waiting.into_iter().peekable();
    let Some(first) = waiting.next() else { return Ok(None) };
    check_revision(&first.revision)?;
    let ops: Vec<Op> = first.revision.changes.iter().map(Op::of).collect();
    if begun.part > 0 {
        if begun.digest.is_some_and(|digest| digest != digest::of_revision(&first.revision)) {
            return Err(PlanError::PartOfAnother { revision: first.revision.revision, part: begun.part });
        }
        return plan_part(first, ops, begun.part, limits).map(Some);
    }
    let load = Load::of(&ops);
    if !limits.may_fit(&load) {
        return plan_large(first, ops, ranges, limits).map(Some);
    }
    let mut plan = Plan {
        revisions: 1,
        seq: first.seq,
        revision: first.revision.revision,
        extent: Extent::Whole,
        full: false,
        ops,
        runs: Vec::new(),
    };
    if waiting.peek().is_some() {
        merge(&mut plan, first, load, waiting, limits)?;
    }
    plan.runs = runs::delete_runs(&plan.ops, ranges, limits);
    Ok(Some(plan))
}

impl Plan {
    /// Whether planning again would take more along, now that so many revisions wait.
    pub fn has_room(&self, waiting: usize) -> bool {
        !self.full && waiting > self.revisions
    }
}

/// The waiting revisions that a plan may hold: none beyond a mark, so that there is a replica revision that has reached it and no more.
pub fn up_to<'a>(waiting: impl Iterator<Item = &'a Waiting>, mark: Option<Seq>) -> impl Iterator<Item = &'a Waiting> {
    waiting.take_while(move |waiting| mark.is_none_or(|mark| waiting.seq <= mark))
}

/// Adds waiting revisions while they fit key by key; the last write of a key wins.
fn merge<'a>(
    plan: &mut Plan,
    first: &'a Waiting,
    mut load: Load,
    waiting: impl Iterator<Item = &'a Waiting>,
    limits: &RequestLimits,
) -> Result<(), PlanError> {
    let mut merged: BTreeMap<&Bytes, &Change> = first.revision.changes.iter().map(|c| (c.key(), c)).collect();
    for next in waiting {
        let expected = plan.seq.next();
        if next.seq != expected {
            return Err(PlanError::OutOfOrder { expected, got: next.seq });
        }
        check_revision(&next.revision)?;
        let mut grown = load;
        for change in &next.revision.changes {
            grown.bytes += change_bytes(change);
            match merged.get(change.key()) {
                Some(earlier) => grown.bytes -= change_bytes(earlier),
                None => grown.count += 1,
            }
        }
        if grown.count > MERGED_OPS_MAX || !limits.fits(&grown) {
            plan.full = true;
            break;
        }
        load = grown;
        merged.extend(next.revision.changes.iter().map(|c| (c.key(), c)));
        plan.revisions += 1;
        plan.seq = next.seq;
        plan.revision = next.revision.revision;
    }
    if plan.revisions > 1 {
        plan.ops = merged.into_values().map(Op::of).collect();
    }
    Ok(())
}

/// A revision that does not fit key by key: whole if its long runs can be range deletes, else in parts.
fn plan_large(first: &Waiting, ops: Vec<Op>, ranges: &Ranges, limits: &RequestLimits) -> Result<Plan, PlanError> {
    // Before anything of it is applied: a revision must not stop half-way for a value that can never fit.
    for op in &ops {
        check_fits_alone(op, first.revision.revision, limits)?;
    }
    let runs = runs::delete_runs(&ops, ranges, limits);
    if !limits.fits(&runs::load_with(&ops, &runs)) {
        return plan_part(first, ops, 0, limits);
    }
    let (seq, revision) = (first.seq, first.revision.revision);
    Ok(Plan { revisions: 1, seq, revision, extent: Extent::Whole, full: true, ops, runs })
}

/// The next part of a revision that is larger than a request, as full as fits.
fn plan_part(first: &Waiting, mut ops: Vec<Op>, part: u64, limits: &RequestLimits) -> Result<Plan, PlanError> {
    let revision = first.revision.revision;
    let of = as_u64(ops.len());
    let from = usize::try_from(part).unwrap_or(usize::MAX);
    if from >= ops.len() {
        return Err(PlanError::PartBeyond { revision, part, changes: of });
    }
    ops.drain(..from);
    ops.truncate(fitting(&ops, revision, limits)?);
    let extent = Extent::Part { from: part, to: part + as_u64(ops.len()), of };
    Ok(Plan { revisions: 1, seq: first.seq, revision, extent, full: true, ops, runs: Vec::new() })
}

/// How many operations, from the first on, fit one request; at least one, or the error says why not.
fn fitting(ops: &[Op], revision: Revision, limits: &RequestLimits) -> Result<usize, PlanError> {
    let mut load = Load::default();
    for (i, op) in ops.iter().enumerate() {
        load.add(op);
        if !limits.fits(&load) {
            if i == 0 {
                check_fits_alone(op, revision, limits)?;
            }
            return Ok(i.max(1));
        }
    }
    Ok(ops.len())
}

fn check_fits_alone(op: &Op, revision: Revision, limits: &RequestLimits) -> Result<(), PlanError> {
    let load = Load::of(std::slice::from_ref(op));
    if limits.may_fit(&load) {
        return Ok(());
    }
    let (key_bytes, value_bytes) = match op {
        Op::Put { key, value } | Op::Create { key, value } => (key.len(), value.len()),
        Op::Delete { key } => (key.len(), 0),
        Op::DeleteRange { range } => (range.from.len() + range.to.len(), 0),
    };
    Err(PlanError::TooLarge {
        revision,
        key_bytes,
        value_bytes,
        request_bytes_needed: limits.fixed_bytes() + load.bytes,
        request_bytes_max: limits.bytes_refused.map_or(limits.bytes_max, |refused| refused - 1),
    })
}

/// What the merge relies on, and what etcd would refuse: revisions come from another process.
fn check_revision(whole: &WholeRevision) -> Result<(), PlanError> {
    let malformed = |rule| PlanError::Malformed { revision: whole.revision, rule };
    if whole.changes.first().is_some_and(|change| change.key().is_empty()) {
        return Err(malformed("a key is not empty"));
    }
    if !whole.changes.windows(2).all(|pair| pair[0].key() < pair[1].key()) {
        return Err(malformed("its changes are in key order, each key once"));
    }
    Ok(())
}

fn change_bytes(change: &Change) -> usize {
    match change {
        Change::Put { key, value } => size::put_bytes(key.len(), value.len()),
        Change::Delete { key } => size::delete_bytes(key.len()),
    }
}

fn as_u64(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

impl Op {
    fn of(change: &Change) -> Self {
        match change {
            Change::Put { key, value } => Op::Put { key: key.clone(), value: value.clone() },
            Change::Delete { key } => Op::Delete { key: key.clone() },
        }
    }
}
