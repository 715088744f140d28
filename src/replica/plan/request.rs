//! Job: a planned transaction with the position around it: what is compared, written, and read where a compare failed.
//! Input: a `TxnTree`, the position that is held, the one that comes next. Output: a `Request`; what etcd's answer to it means.
//! Pure: no clock, no I/O.
//! Always true: every transaction compares the position's `mod_revision` and puts the next position; its failure branch tells which
//! compare failed.

use super::{Node, Op, RangeGuard, TxnTree};
use crate::model::{LinkName, Position, Revision};
use bytes::Bytes;

/// One compare at the top of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// `mod_revision(key)` is this one; 0: there is no such key.
    Unmoved {
        key: Bytes,
        mod_revision: Revision,
    },
    Below(RangeGuard),
}

/// One transaction at the replica, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub conditions: Vec<Condition>,
    pub success: Vec<Node>,
    /// The key that is read where a condition failed.
    pub or_read: Bytes,
}

impl Request {
    /// The tree with the position's compare, put, and (in the failure branch) get around it. `held`: the `mod_revision` of the
    /// position that is held.
    pub fn new(link: &LinkName, held: Revision, next: &Position, tree: TxnTree) -> Self {
        let key = link.position_key();
        let mut conditions = vec![Condition::Unmoved { key: key.clone(), mod_revision: held }];
        conditions.extend(tree.guards.into_iter().map(Condition::Below));
        let mut success = tree.success;
        success.push(Node::Op(Op::Put { key: key.clone(), value: next.to_json().into() }));
        Self { conditions, success, or_read: key }
    }
}

/// What an answer means for the position that was held when the transaction was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    Committed,
    /// Nothing was changed: a guard of the transaction failed.
    GuardFailed,
    /// Nothing was changed: the position is not what it was held to be.
    PositionMoved,
}

/// `found`: the position key's `mod_revision` in the failure branch (0: no such key); `None`: the answer did not show it.
pub fn answered(succeeded: bool, found: Option<Revision>, held: Revision) -> Answered {
    match found {
        _ if succeeded => Answered::Committed,
        Some(found) if found == held => Answered::GuardFailed,
        Some(_) | None => Answered::PositionMoved,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ClusterId, Digest, Epoch, KeyRange, Seq, Term};

    fn position() -> Position {
        Position {
            epoch: Epoch(1),
            term: Term(0),
            seq: Seq(4),
            origin_cluster: ClusterId(7),
            origin_revision: Revision(20),
            carried_revision: Revision(20),
            carried_digest: Digest::default(),
            anchor_revision: Revision(1),
            ..Position::of_tests()
        }
    }

    #[test]
    fn changes_and_position_stand_in_one_transaction_that_compares_the_position() {
        let link = LinkName::new("config").unwrap();
        let put = Node::Op(Op::Put { key: Bytes::from_static(b"/a"), value: Bytes::from_static(b"1") });
        let range = KeyRange::prefix(b"/b/");
        let guard = RangeGuard { range, below: Revision(9) };
        let tree = TxnTree { guards: vec![guard.clone()], success: vec![put.clone()] };
        let request = Request::new(&link, Revision(8), &position(), tree);
        let key = link.position_key();
        let unmoved = Condition::Unmoved { key: key.clone(), mod_revision: Revision(8) };
        assert_eq!(request.conditions, [unmoved, Condition::Below(guard)]);
        let json = position().to_json().into();
        assert_eq!(request.success, [put, Node::Op(Op::Put { key: key.clone(), value: json })]);
        assert_eq!(request.or_read, key);
    }

    #[test]
    fn a_failed_transaction_is_a_failed_guard_only_if_the_position_is_where_it_was() {
        let held = Revision(8);
        assert_eq!(answered(true, None, held), Answered::Committed);
        assert_eq!(answered(false, Some(held), held), Answered::GuardFailed);
        assert_eq!(answered(false, Some(Revision(9)), held), Answered::PositionMoved);
        assert_eq!(answered(false, Some(Revision(0)), Revision(0)), Answered::GuardFailed, "there is no position yet");
        assert_eq!(answered(false, None, held), Answered::PositionMoved);
    }
}
