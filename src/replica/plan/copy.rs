//! Job: what a base copy writes: the difference between a page of the origin and the replica, in transactions; and its guards.
//! Input: keys and values of both sides over one range, in key order; counts. Output: chunks with the cursor each reaches, or a stop.
//! Pure: no clock, no I/O.
//! Always true: what is equal is not written; a chunk's cursor is exact; no delete passes a guard that an operator did not allow.

use super::runs::arrange;
use super::size::Load;
use super::{Op, PlanError, RequestLimits, TxnTree, as_u64, check_fits_alone};
use crate::model::{Change, LinkName, Revision};
use bytes::Bytes;
use std::cmp::Ordering;

/// A cursor in the position's JSON besides its two hexadecimal digits a byte: its name, quotes, colon and comma.
const CURSOR_FIELD_BYTES: usize = 12;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyPolicy {
    /// A link back exists: the replica's own writes may not have crossed yet, so only absent keys are created.
    pub creates_only: bool,
}

/// What brings the replica's keys in one range to the origin's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CopyDiff {
    /// In key order, each key once.
    pub ops: Vec<Op>,
    pub puts: u64,
    pub deletes: u64,
    pub equal: u64,
    /// Keys that differ and are left alone (`creates_only`).
    pub conflicts: u64,
    /// Keys that only the replica has and that are left alone (`creates_only`).
    pub kept: u64,
}

/// One transaction of a base copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyChunk {
    pub tree: TxnTree,
    /// Every key below it is copied once this is committed: the position's cursor. The last chunk reaches the range's end.
    pub reached: Bytes,
    pub puts: u64,
    pub deletes: u64,
    /// The whole request with the largest position, never less than etcd counts.
    pub request_bytes: usize,
}

/// Both sides hold all keys of one range `[from, to)`, in key order.
pub fn copy_diff(page: &[(Bytes, Bytes)], present: &[(Bytes, Bytes)], policy: CopyPolicy) -> CopyDiff {
    let mut diff = CopyDiff::default();
    let (mut page, mut present) = (page.iter().peekable(), present.iter().peekable());
    loop {
        let side = match (page.peek(), present.peek()) {
            (Some((ours, _)), Some((theirs, _))) => ours.cmp(theirs),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return diff,
        };
        let origin = if side.is_le() { page.next() } else { None };
        let replica = if side.is_ge() { present.next() } else { None };
        diff.note(origin, replica, policy);
    }
}

impl CopyDiff {
    /// What a repair writes: puts and deletes as the origin has them, in key order.
    pub fn of_changes(changes: &[Change]) -> Self {
        let deletes = as_u64(changes.iter().filter(|change| matches!(change, Change::Delete { .. })).count());
        let puts = as_u64(changes.len()) - deletes;
        Self { ops: changes.iter().map(Op::of).collect(), puts, deletes, ..Self::default() }
    }

    fn note(&mut self, origin: Option<&(Bytes, Bytes)>, replica: Option<&(Bytes, Bytes)>, policy: CopyPolicy) {
        match (origin, replica) {
            (Some((_, ours)), Some((_, theirs))) if ours == theirs => self.equal += 1,
            (Some(_), Some(_)) if policy.creates_only => self.conflicts += 1,
            (Some((key, value)), _) => {
                let (key, value) = (key.clone(), value.clone());
                self.puts += 1;
                self.ops.push(if policy.creates_only { Op::Create { key, value } } else { Op::Put { key, value } });
            }
            (None, Some(_)) if policy.creates_only => self.kept += 1,
            (None, Some((key, _))) => {
                self.deletes += 1;
                self.ops.push(Op::Delete { key: key.clone() });
            }
            (None, None) => {}
        }
    }
}

/// The diff over `[from, to)` in transactions that fit; always at least one, so that the cursor moves over an equal page too.
/// `revision` is the page's, for the error that a value does not fit.
pub fn copy_chunks(
    diff: CopyDiff,
    to: &Bytes,
    revision: Revision,
    limits: &RequestLimits,
) -> Result<Vec<CopyChunk>, PlanError> {
    let ops = diff.ops;
    let reached_at = |end: usize| ops.get(end).map_or(to, Op::first_key).clone();
    let mut chunks = Vec::new();
    let mut start = 0;
    loop {
        let (end, load) = chunk_end(&ops, start, to, revision, limits)?;
        let reached = reached_at(end);
        let limits = with_cursor(limits, &reached);
        let chunk = ops[start..end].to_vec();
        let deletes = as_u64(chunk.iter().filter(|op| matches!(op, Op::Delete { .. })).count());
        let puts = as_u64(chunk.len()) - deletes;
        let tree = arrange(chunk, Vec::new(), &load, &limits)?;
        chunks.push(CopyChunk { request_bytes: limits.request_bytes(&tree), tree, reached, puts, deletes });
        if end == ops.len() {
            return Ok(chunks);
        }
        start = end;
    }
}

/// As many operations from `start` on as fit together with the cursor that they reach; at least one, unless none is left.
fn chunk_end(
    ops: &[Op],
    start: usize,
    to: &Bytes,
    revision: Revision,
    limits: &RequestLimits,
) -> Result<(usize, Load), PlanError> {
    let mut load = Load::default();
    for (end, op) in ops.iter().enumerate().skip(start) {
        let mut grown = load;
        grown.add(op);
        let limits = with_cursor(limits, ops.get(end + 1).map_or(to, Op::first_key));
        if !limits.fits(&grown) {
            if end == start {
                check_fits_alone(op, revision, &limits)?;
                return Ok((end + 1, grown));
            }
            return Ok((end, load));
        }
        load = grown;
    }
    Ok((ops.len(), load))
}

/// The position holds the cursor in hexadecimal, beside what it always holds.
fn with_cursor(limits: &RequestLimits, cursor: &Bytes) -> RequestLimits {
    let position_value_bytes_max = limits.position_value_bytes_max + CURSOR_FIELD_BYTES + 2 * cursor.len();
    RequestLimits { position_value_bytes_max, ..*limits }
}

/// What a keys-only pass over both sides found, before the first write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuardCount {
    pub origin_keys: u64,
    pub replica_keys: u64,
    /// Keys of the replica that the origin has not: a copy would delete them.
    pub deletes: u64,
}

impl GuardCount {
    /// Adds one range: all keys of both sides in it, in key order. Ranges may come in any order, but none twice.
    pub fn add(&mut self, origin: &[Bytes], replica: &[Bytes]) {
        let mut origin_keys = origin.iter().peekable();
        for key in replica {
            while origin_keys.next_if(|origin| *origin < key).is_some() {}
            if origin_keys.peek() != Some(&key) {
                self.deletes += 1;
            }
        }
        self.origin_keys += as_u64(origin.len());
        self.replica_keys += as_u64(replica.len());
    }
}

/// What a guard knows besides the counts.
#[derive(Debug, Clone, PartialEq)]
pub struct GuardCase {
    pub link: LinkName,
    /// The replica has no position of this link from this origin yet.
    pub first_copy: bool,
    /// The origin holds no key in the ranges, by a linearizable read.
    pub origin_empty: bool,
    /// The replica holds no key in the ranges, by a linearizable read.
    pub replica_empty: bool,
    /// The share (0 to 1) of the replica's keys that a copy may delete unasked.
    pub deletes_share_max: f64,
    /// An operator said so: `resync LINK --allow-deletes`.
    pub allow_deletes: bool,
    pub link_back: bool,
}

/// Why a copy may not start; each says what was counted and how to allow it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GuardStop {
    #[error(
        "the origin holds no key in the ranges of link {link}, and the replica holds {replica_keys}: a copy would delete them all; \
         if they may go, run `etcd-ferry resync {link} --allow-deletes --config F` at the origin's sidecar"
    )]
    OriginEmpty { link: LinkName, replica_keys: u64 },
    #[error(
        "the first copy of link {link} would delete {deletes} of the {replica_keys} keys that the replica holds in its ranges, since the \
         origin (with {origin_keys} keys) has not got them; if they may go, run `etcd-ferry resync {link} --allow-deletes --config F` at the origin's sidecar"
    )]
    FirstCopyDeletes { link: LinkName, deletes: u64, replica_keys: u64, origin_keys: u64 },
    #[error(
        "the copy of link {link} would delete {deletes} of the {replica_keys} keys that the replica holds in its ranges, more than the \
         share of {deletes_share_max} that deletes_share_max allows; if they may go, run `etcd-ferry resync {link} --allow-deletes --config F` at the origin's sidecar"
    )]
    TooManyDeletes { link: LinkName, deletes: u64, replica_keys: u64, deletes_share_max: f64 },
}

/// Whether a base copy may write. With a link back it deletes nothing, so there is nothing to guard.
pub fn guard_verdict(counts: &GuardCount, case: &GuardCase) -> Result<(), GuardStop> {
    if case.allow_deletes || case.link_back || case.replica_empty {
        return Ok(());
    }
    let link = case.link.clone();
    let GuardCount { origin_keys, replica_keys, deletes } = *counts;
    if case.origin_empty || (origin_keys == 0 && replica_keys > 0) {
        return Err(GuardStop::OriginEmpty { link, replica_keys });
    }
    if case.first_copy && deletes > 0 {
        return Err(GuardStop::FirstCopyDeletes { link, deletes, replica_keys, origin_keys });
    }
    let deletes_share_max = case.deletes_share_max;
    // A share that is not a number allows nothing.
    let allowed = deletes as f64 <= replica_keys as f64 * deletes_share_max;
    if deletes > 0 && !allowed {
        return Err(GuardStop::TooManyDeletes { link, deletes, replica_keys, deletes_share_max });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn limits(bytes_max: usize) -> RequestLimits {
        RequestLimits {
            ops_max: 16,
            bytes_max,
            bytes_refused: None,
            position_key_bytes: 36,
            position_value_bytes_max: 500,
        }
    }

    fn case() -> GuardCase {
        GuardCase {
            link: LinkName::new("config").unwrap(),
            first_copy: false,
            origin_empty: false,
            replica_empty: false,
            deletes_share_max: 0.1,
            allow_deletes: false,
            link_back: false,
        }
    }

    const SOME_DELETES: GuardCount = GuardCount { origin_keys: 95, replica_keys: 100, deletes: 10 };

    #[test]
    fn an_empty_origin_over_a_replica_with_keys_stops_the_copy() {
        let counts = GuardCount { origin_keys: 0, replica_keys: 7, deletes: 7 };
        let stop = guard_verdict(&counts, &GuardCase { origin_empty: true, deletes_share_max: 1.0, ..case() });
        let text = stop.unwrap_err().to_string();
        assert!(text.contains('7') && text.contains("etcd-ferry resync config --allow-deletes"), "{text}");
        assert!(guard_verdict(&counts, &GuardCase { deletes_share_max: 1.0, ..case() }).is_err(), "also by the count");
    }

    #[test]
    fn a_first_copy_that_would_delete_a_single_key_stops() {
        let counts = GuardCount { origin_keys: 99, replica_keys: 100, deletes: 1 };
        let first = GuardCase { first_copy: true, ..case() };
        assert!(matches!(guard_verdict(&counts, &first), Err(GuardStop::FirstCopyDeletes { deletes: 1, .. })));
        assert_eq!(guard_verdict(&GuardCount { deletes: 0, ..counts }, &first), Ok(()));
    }

    #[test]
    fn a_later_copy_may_delete_the_configured_share_and_not_one_key_more() {
        assert_eq!(guard_verdict(&SOME_DELETES, &case()), Ok(()));
        let more = GuardCount { deletes: 11, ..SOME_DELETES };
        let text = guard_verdict(&more, &case()).unwrap_err().to_string();
        assert!(text.contains("11 of the 100") && text.contains("resync config --allow-deletes"), "{text}");
        assert!(guard_verdict(&SOME_DELETES, &GuardCase { deletes_share_max: f64::NAN, ..case() }).is_err());
    }

    #[test]
    fn an_operators_word_a_link_back_or_an_empty_replica_pass_every_guard() {
        let counts = GuardCount { origin_keys: 0, replica_keys: 9, deletes: 9 };
        let worst = GuardCase { first_copy: true, origin_empty: true, deletes_share_max: 0.0, ..case() };
        assert!(guard_verdict(&counts, &worst).is_err());
        assert_eq!(guard_verdict(&counts, &GuardCase { allow_deletes: true, ..worst.clone() }), Ok(()));
        assert_eq!(guard_verdict(&counts, &GuardCase { link_back: true, ..worst.clone() }), Ok(()));
        assert_eq!(guard_verdict(&GuardCount::default(), &GuardCase { replica_empty: true, ..worst }), Ok(()));
    }

    #[test]
    fn a_value_that_fits_no_request_is_an_error_that_says_what_to_raise() {
        let page = [(Bytes::from_static(b"/a"), Bytes::from(vec![0; 3000]))];
        let diff = copy_diff(&page, &[], CopyPolicy { creates_only: false });
        let error = copy_chunks(diff, &Bytes::new(), Revision(9), &limits(3000)).unwrap_err();
        assert!(matches!(error, PlanError::TooLarge { value_bytes: 3000, .. }));
        assert!(error.to_string().contains("--max-request-bytes"), "{error}");
    }

    #[test]
    fn an_equal_page_is_one_chunk_without_a_write_that_reaches_the_pages_end() {
        let page = [(Bytes::from_static(b"/a"), Bytes::from_static(b"1"))];
        let diff = copy_diff(&page, &page, CopyPolicy { creates_only: false });
        assert_eq!((diff.equal, diff.ops.len()), (1, 0));
        let chunks = copy_chunks(diff, &Bytes::from_static(b"/b"), Revision(9), &limits(3000)).unwrap();
        assert_eq!(chunks.len(), 1);
        assert_eq!((&chunks[0].tree.success[..], &chunks[0].reached[..]), (&[][..], &b"/b"[..]));
    }

    fn keys() -> impl Strategy<Value = BTreeSet<Bytes>> {
        prop::collection::btree_set("[a-d]{1,3}".prop_map(Bytes::from), 0..40)
    }

    fn pairs() -> impl Strategy<Value = BTreeMap<Bytes, Bytes>> {
        let value = prop::collection::vec(any::<u8>(), 0..4).prop_map(Bytes::from);
        prop::collection::btree_map("[a-d]{1,3}".prop_map(Bytes::from), value, 0..60)
    }

    proptest! {
        #[test]
        fn the_deletes_counted_are_the_replicas_keys_that_the_origin_lacks(origin in keys(), replica in keys()) {
            let mut counts = GuardCount::default();
            let (o, r): (Vec<Bytes>, Vec<Bytes>) = (origin.iter().cloned().collect(), replica.iter().cloned().collect());
            counts.add(&o, &r);
            prop_assert_eq!(counts.deletes, as_u64(replica.difference(&origin).count()));
            prop_assert_eq!((counts.origin_keys, counts.replica_keys), (as_u64(o.len()), as_u64(r.len())));
        }

        #[test]
        fn below_each_chunks_cursor_the_replica_is_the_origin_and_at_the_end_all_of_it(
            origin in pairs(), replica in pairs(), creates_only: bool,
        ) {
            let as_page = |map: &BTreeMap<Bytes, Bytes>| map.clone().into_iter().collect::<Vec<_>>();
            let diff = copy_diff(&as_page(&origin), &as_page(&replica), CopyPolicy { creates_only });
            let small = limits(1100);
            let chunks = copy_chunks(diff.clone(), &Bytes::new(), Revision(9), &small).unwrap();
            let mut model = super::super::model_etcd::ModelEtcd::new(&small, replica.clone());
            let mut wanted = origin.clone();
            if creates_only {
                wanted.extend(replica.clone());
            }
            for chunk in &chunks {
                prop_assert!(model.apply(&chunk.tree).unwrap());
                let below = |map: BTreeMap<Bytes, Bytes>| -> Vec<_> {
                    map.into_iter().filter(|(k, _)| chunk.reached.is_empty() || *k < chunk.reached).collect()
                };
                prop_assert_eq!(below(model.content()), below(wanted.clone()));
            }
            prop_assert_eq!(model.content(), wanted);
            prop_assert!(chunks.last().unwrap().reached.is_empty());
            let written: u64 = chunks.iter().map(|chunk| chunk.puts + chunk.deletes).sum();
            prop_assert_eq!(written, diff.puts + diff.deletes);
            let equal = origin.iter().filter(|(k, v)| replica.get(*k) == Some(v)).count();
            prop_assert_eq!(diff.equal, as_u64(equal));
        }

        #[test]
        fn creating_never_overwrites_what_a_client_wrote_meanwhile(origin in pairs(), meanwhile in pairs()) {
            let page: Vec<_> = origin.clone().into_iter().collect();
            let diff = copy_diff(&page, &[], CopyPolicy { creates_only: true });
            let chunks = copy_chunks(diff, &Bytes::new(), Revision(9), &limits(4000)).unwrap();
            let mut model = super::super::model_etcd::ModelEtcd::new(&limits(4000), meanwhile.clone());
            for chunk in &chunks {
                prop_assert!(model.apply(&chunk.tree).unwrap());
            }
            let mut wanted = origin;
            wanted.extend(meanwhile);
            prop_assert_eq!(model.content(), wanted);
        }
    }
}
