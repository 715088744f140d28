//! Job: a plan as the transaction that etcd takes.
//! Input: a `TxnTree`, the position that is held, the one that comes next. Output: a `Txn`.
//! Always true: every transaction compares the position's `mod_revision` and puts the next position; its failure branch tells which
//! compare failed.

use super::plan::{Node, Op, TxnTree};
use super::position::Held;
use crate::etcd::{Compare, CompareOp, DeleteOptions, Txn, TxnOp};
use crate::model::{LinkName, Position};

/// The tree with the position's compare, put, and (in the failure branch) get around it.
pub(super) fn transaction(link: &LinkName, held: &Held, next: &Position, tree: TxnTree) -> Txn {
    let key = link.position_key();
    let mut compares = vec![Compare::mod_revision(key.to_vec(), CompareOp::Equal, held.mod_revision.to_etcd())];
    for guard in &tree.guards {
        let below = guard.below.to_etcd();
        compares.push(
            Compare::mod_revision(guard.range.etcd_from(), CompareOp::Less, below).with_range(guard.range.etcd_end()),
        );
    }
    let mut success: Vec<TxnOp> = tree.success.into_iter().map(node).collect();
    success.push(TxnOp::put(key.to_vec(), next.to_json(), None));
    Txn::new().when(compares).and_then(success).or_else([TxnOp::get(key.to_vec(), None)])
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
