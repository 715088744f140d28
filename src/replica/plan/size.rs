//! Job: what a transaction costs: its bytes as etcd counts them, and whether it fits the replica's limits.
//! Input: operations, range guards, the limits. Output: byte counts, yes or no, and smaller limits after a refusal.
//! Pure: no clock, no I/O.
//! Always true: a transaction that is said to fit is not larger than etcd's own count allows; the count errs by a few bytes, upwards.

use super::nest::Shape;
use super::{Node, Op, RangeGuard, TxnTree};

/// What etcd wraps around a transaction before it compares the size with `--max-request-bytes` (`InternalRaftRequest`): a header
/// with a request id, an auth revision and a user name of up to 64 bytes, and the transaction's own tag and length.
pub(super) const ENVELOPE_BYTES: usize = 108;
/// A nested transaction without operations: two tags and two lengths of up to 5 bytes.
const NODE_BYTES: usize = 12;
/// A signed 64-bit number is at most this long, with its tag.
const NUMBER_BYTES: usize = 11;
/// An enum value that is not zero, with its tag.
const ENUM_BYTES: usize = 2;

/// What one transaction at the replica may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// etcd's `--max-txn-ops`.
    pub ops_max: usize,
    /// etcd's `--max-request-bytes`.
    pub bytes_max: usize,
    /// The smallest request that was refused as too large. `bytes_max` was learned from it with room to spare, so what cannot be made
    /// smaller is tried up to here.
    pub bytes_refused: Option<usize>,
    pub position_key_bytes: usize,
    /// The longest that the position's JSON can become, without a cursor.
    pub position_value_bytes_max: usize,
}

/// How the replica's etcd refused a transaction for what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitRefusal {
    /// "too many operations in txn request".
    TooManyOps,
    /// "request is too large".
    TooLarge {
        /// `Settled::request_bytes` of what was sent.
        sent_bytes: usize,
    },
}

/// What some operations cost, before they are arranged in levels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub count: usize,
    /// Operations and guards, encoded.
    pub bytes: usize,
    pub guards: usize,
    /// 1 if some operation is itself a transaction with a compare (`Op::Create`), which takes a level of its own.
    pub leaf_width: usize,
}

impl Load {
    pub fn of(ops: &[Op]) -> Self {
        let mut load = Self::default();
        ops.iter().for_each(|op| load.add(op));
        load
    }

    pub fn add(&mut self, op: &Op) {
        self.count += 1;
        self.bytes += op_bytes(op);
        if matches!(op, Op::Create { .. }) {
            self.leaf_width = 1;
        }
    }
}

impl RequestLimits {
    /// Smaller limits after a refusal: half of the operations; the bytes that etcd says it takes (`told_bytes`), where those explain the
    /// refusal, else a tenth less than were refused. `None`: they cannot shrink any further, and another try is useless.
    pub fn learned(self, refusal: LimitRefusal, told_bytes: Option<usize>) -> Option<Self> {
        match refusal {
            LimitRefusal::TooManyOps => (self.ops_max >= 4).then_some(Self { ops_max: self.ops_max / 2, ..self }),
            LimitRefusal::TooLarge { sent_bytes } => {
                let told =
                    told_bytes.filter(|told| *told < sent_bytes.min(self.bytes_max) && *told > self.fixed_bytes());
                if let Some(bytes_max) = told {
                    return Some(Self { bytes_max, bytes_refused: Some(bytes_max + 1), ..self });
                }
                if sent_bytes > self.bytes_max && self.bytes_refused.is_some_and(|refused| sent_bytes < refused) {
                    return Some(Self { bytes_refused: Some(sent_bytes), ..self });
                }
                let refused = self.bytes_max.min(sent_bytes);
                let bytes_max = refused - refused.div_ceil(10);
                (bytes_max > self.fixed_bytes()).then_some(Self { bytes_max, bytes_refused: Some(refused), ..self })
            }
        }
    }

    /// What every transaction holds, whatever it carries: the position's compare, its put, and its get in the failure branch.
    pub(super) fn fixed_bytes(&self) -> usize {
        let key = field(self.position_key_bytes);
        let compare = field(ENUM_BYTES + key + NUMBER_BYTES);
        let put = field(field(key + field(self.position_value_bytes_max)));
        let get = field(field(key));
        ENVELOPE_BYTES + compare + put + get
    }

    /// The bytes of the whole request, never less than etcd counts.
    pub fn request_bytes(&self, tree: &TxnTree) -> usize {
        let guards: usize = tree.guards.iter().map(guard_bytes).sum();
        let success: usize = tree.success.iter().map(node_bytes).sum();
        self.fixed_bytes() + guards + success
    }

    pub(super) fn fits(&self, load: &Load) -> bool {
        self.cost(load).is_some_and(|bytes| bytes <= self.bytes_max)
    }

    /// True also where only a try can tell: above what was learned, and below everything that was refused.
    pub(super) fn may_fit(&self, load: &Load) -> bool {
        self.fits(load) || self.cost(load).zip(self.bytes_refused).is_some_and(|(bytes, refused)| bytes < refused)
    }

    /// The bytes of the whole request; `None` if no nesting has places for so many operations.
    fn cost(&self, load: &Load) -> Option<usize> {
        Some(self.fixed_bytes() + load.bytes + self.shape(load)?.nodes(load.count) * NODE_BYTES)
    }

    pub(super) fn shape(&self, load: &Load) -> Option<Shape> {
        Shape::of(load.count, load.guards, self.ops_max.saturating_sub(load.leaf_width))
    }
}

/// An operation as an entry of a transaction's success branch: `TxnRequest.success` of a `RequestOp`.
pub(super) fn op_bytes(op: &Op) -> usize {
    match op {
        Op::Put { key, value } => put_bytes(key.len(), value.len()),
        Op::Create { key, value } => {
            let compare = field(ENUM_BYTES + optional(key.len()) + NUMBER_BYTES);
            field(field(compare + put_bytes(key.len(), value.len())))
        }
        Op::Delete { key } => delete_bytes(key.len()),
        Op::DeleteRange { range } => field(field(optional(range.from.len()) + optional(range.to.len()))),
    }
}

pub(super) fn put_bytes(key: usize, value: usize) -> usize {
    field(field(optional(key) + optional(value)))
}

pub(super) fn delete_bytes(key: usize) -> usize {
    field(field(optional(key)))
}

/// An entry of `TxnRequest.compare`; `range_end` has tag 64 and so one byte more than the others.
pub(super) fn guard_bytes(guard: &RangeGuard) -> usize {
    let ends = optional(guard.range.from.len()) + 1 + optional(guard.range.to.len());
    field(2 * ENUM_BYTES + NUMBER_BYTES + ends)
}

fn node_bytes(node: &Node) -> usize {
    match node {
        Node::Op(op) => op_bytes(op),
        Node::Txn(nodes) => field(field(nodes.iter().map(node_bytes).sum())),
    }
}

/// A length-delimited protobuf field with a tag below 16.
fn field(len: usize) -> usize {
    1 + varint_bytes(len) + len
}

/// The same, where an empty one is left out, as proto3 does with bytes.
fn optional(len: usize) -> usize {
    if len == 0 { 0 } else { field(len) }
}

fn varint_bytes(mut number: usize) -> usize {
    let mut bytes = 1;
    while number >= 0x80 {
        number >>= 7;
        bytes += 1;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::tests::{NOTHING, etcd_defaults, everything, put, waiting};
    use super::super::{Extent, PlanError, plan};
    use super::*;

    #[test]
    fn a_refusal_halves_the_operations_or_takes_a_tenth_off_the_bytes_until_nothing_is_left_to_take() {
        let limits = etcd_defaults();
        assert_eq!(limits.learned(LimitRefusal::TooManyOps, Some(1)), Some(RequestLimits { ops_max: 64, ..limits }));
        let sent = LimitRefusal::TooLarge { sent_bytes: 1_000_000 };
        assert_eq!(
            limits.learned(sent, None),
            Some(RequestLimits { bytes_max: 900_000, bytes_refused: Some(1_000_000), ..limits })
        );
        let shrink = |limits: RequestLimits, refusal| {
            std::iter::successors(Some(limits), move |l| l.learned(refusal, None)).take(1_000)
        };
        assert_eq!(shrink(limits, LimitRefusal::TooManyOps).last().unwrap().ops_max, 2);
        let smallest = shrink(limits, LimitRefusal::TooLarge { sent_bytes: usize::MAX }).last().unwrap();
        assert!(smallest.bytes_max > 700 && smallest.bytes_max < 1_200, "{smallest:?}");
    }

    #[test]
    fn what_etcd_says_that_it_takes_is_learned_to_the_byte_where_it_explains_a_refusal() {
        let limits = etcd_defaults();
        let sent = |sent_bytes| LimitRefusal::TooLarge { sent_bytes };
        let told = limits.learned(sent(80_000), Some(65_536)).unwrap();
        assert_eq!(told, RequestLimits { bytes_max: 65_536, bytes_refused: Some(65_537), ..limits });
        let small = waiting(vec![vec![put("/a".to_owned(), vec![0; 64_000])]]);
        assert!(plan(&small, NOTHING, &everything(), &told).is_ok());
        let large = waiting(vec![vec![put("/a".to_owned(), vec![0; 70_000])]]);
        let error = plan(&large, NOTHING, &everything(), &told).unwrap_err();
        assert!(matches!(error, PlanError::TooLarge { request_bytes_max: 65_536, .. }), "{error}");
        // Another member is asked than the one that refused, or it was restarted since.
        for unexplained in [80_000, 1_572_864, 10] {
            assert_eq!(
                limits.learned(sent(80_000), Some(unexplained)),
                limits.learned(sent(80_000), None),
                "{unexplained}"
            );
        }
        assert_eq!(
            told.learned(sent(60_000), Some(65_536)).unwrap().bytes_max,
            54_000,
            "it refuses what it says it takes"
        );
    }

    #[test]
    fn what_cannot_be_made_smaller_is_tried_below_the_smallest_request_that_was_refused() {
        let learned = etcd_defaults().learned(LimitRefusal::TooLarge { sent_bytes: 1_000_000 }, None).unwrap();
        let large = waiting(vec![vec![put("/a".to_owned(), vec![0; 950_000])]]);
        let settled = plan(&large, NOTHING, &everything(), &learned).unwrap().unwrap().settle(&[], &learned).unwrap();
        assert_eq!(settled.extent, Extent::Whole);
        let refused = learned.learned(LimitRefusal::TooLarge { sent_bytes: settled.request_bytes }, None).unwrap();
        assert_eq!(refused.bytes_max, learned.bytes_max, "nothing that was known to fit became smaller");
        assert!(matches!(plan(&large, NOTHING, &everything(), &refused), Err(PlanError::TooLarge { .. })));
    }
}
