//! Job: a transaction in the form that etcd's client takes.
//! Input: a `Request`. Output: a `Txn`.
//! Always true: nothing is added and nothing left out; the order is kept.

use super::plan::{Condition, Node, Op, Request};
use crate::etcd::{Compare, CompareOp, DeleteOptions, Txn, TxnOp};

pub(super) fn transaction(request: Request) -> Txn {
    let compares: Vec<Compare> = request.conditions.into_iter().map(compare).collect();
    let success: Vec<TxnOp> = request.success.into_iter().map(node).collect();
    Txn::new().when(compares).and_then(success).or_else([TxnOp::get(request.or_read.to_vec(), None)])
}

fn compare(condition: Condition) -> Compare {
    match condition {
        Condition::Unmoved { key, mod_revision } => {
            Compare::mod_revision(Vec::from(key), CompareOp::Equal, mod_revision.to_etcd())
        }
        Condition::Below(guard) => {
            Compare::mod_revision(guard.range.etcd_from(), CompareOp::Less, guard.below.to_etcd())
                .with_range(guard.range.etcd_end())
        }
    }
}

fn node(node: Node) -> TxnOp {
    match node {
        Node::Op(op) => operation(op),
        Node::Txn(nodes) => {
            let nested: Vec<TxnOp> = nodes.into_iter().map(self::node).collect();
            TxnOp::txn(Txn::new().and_then(nested))
        }
    }
}

fn operation(op: Op) -> TxnOp {
    match op {
        Op::Put { key, value } => TxnOp::put(Vec::from(key), Vec::from(value), None),
        Op::Create { key, value } => TxnOp::txn(
            Txn::new().when([Compare::mod_revision(key.to_vec(), CompareOp::Equal, 0)]).and_then([TxnOp::put(
                Vec::from(key),
                Vec::from(value),
                None,
            )]),
        ),
        Op::Delete { key } => TxnOp::delete(Vec::from(key), None),
        Op::DeleteRange { range } => {
            TxnOp::delete(range.etcd_from(), Some(DeleteOptions::new().with_range(range.etcd_end())))
        }
    }
}
