//! Job: arranges operations in levels of nested transactions, so that more of them fit in one than `--max-txn-ops` says.
//! Input: operations in order, the number of range guards, etcd's limit. Output: a `TxnTree`.
//! Pure: no clock, no I/O.
//! Always true: along every path the widths of the levels add up to at most the limit; the tree is the shallowest that does so.

use super::{Node, Op};

/// Deeper trees would hold more operations than any request has bytes for.
const LEVELS_MAX: usize = 8;

/// How many children a transaction has on each level, the top first. The position's put is not counted, but has its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    widths: Vec<usize>,
}

impl Shape {
    /// etcd bounds the sum of the widths along a path, a width being the largest of compares, successes and failures (FACTS.md).
    /// At the top, compares are `guards` + 1 (the position's) and successes the children + 1 (the position's put).
    pub fn of(count: usize, guards: usize, ops_max: usize) -> Option<Self> {
        let budget = ops_max.checked_sub(1)?;
        (1..=LEVELS_MAX)
            .filter_map(|levels| widths(levels, guards, budget))
            .find(|widths| widths.iter().fold(1_usize, |all, width| all.saturating_mul(*width)) >= count)
            .map(|widths| Self { widths })
    }

    /// How many nested transactions `count` operations take.
    pub fn nodes(&self, count: usize) -> usize {
        let below_top = self.widths.iter().skip(1).rev();
        below_top
            .fold((0, count), |(nodes, children), width| {
                let parents = children.div_ceil(*width);
                (nodes + parents, parents)
            })
            .0
    }
}

/// As even as can be, since that has the largest product; the top is wider where the guards need it.
fn widths(levels: usize, guards: usize, budget: usize) -> Option<Vec<usize>> {
    let even = |budget: usize, levels: usize| (0..levels).map(move |i| (budget + levels - 1 - i) / levels);
    let top = even(budget, levels).next()?.max(guards);
    let rest = budget.checked_sub(top)?;
    let widths: Vec<usize> = std::iter::once(top).chain(even(rest, levels - 1)).collect();
    widths.iter().all(|width| *width > 0).then_some(widths)
}

/// From the leaves up: each level's transactions are filled before the next one is begun.
pub(super) fn nest(ops: Vec<Op>, shape: &Shape) -> Vec<Node> {
    let mut nodes: Vec<Node> = ops.into_iter().map(Node::Op).collect();
    for width in shape.widths.iter().skip(1).rev() {
        let mut parents = Vec::with_capacity(nodes.len().div_ceil(*width));
        let mut children = nodes.into_iter().peekable();
        while children.peek().is_some() {
            parents.push(Node::Txn(children.by_ref().take(*width).collect()));
        }
        nodes = parents;
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::limits::changes_max;

    #[test]
    fn as_many_operations_as_leave_a_place_for_the_position_stay_flat() {
        assert_eq!(Shape::of(127, 0, 128), Some(Shape { widths: vec![127] }));
        assert_eq!(Shape::of(128, 0, 128), Some(Shape { widths: vec![64, 63] }));
    }

    #[test]
    fn levels_are_added_only_when_the_shallower_tree_is_full() {
        let levels = |count| Shape::of(count, 0, 128).map(|shape| shape.widths.len());
        assert_eq!(levels(64 * 63), Some(2));
        assert_eq!(levels(64 * 63 + 1), Some(3));
        assert_eq!(levels(14_448), Some(3));
        assert_eq!(levels(43 * 42 * 42 + 1), Some(4));
    }

    #[test]
    fn guards_widen_the_top_and_leave_the_rest_to_the_levels_below() {
        assert_eq!(Shape::of(10, 100, 128), Some(Shape { widths: vec![127] }));
        assert_eq!(Shape::of(200, 100, 128), Some(Shape { widths: vec![100, 27] }));
        assert_eq!(Shape::of(1, 128, 128), None);
    }

    #[test]
    fn a_limit_of_two_takes_one_operation_and_a_limit_of_one_takes_none() {
        assert!(Shape::of(1, 0, 2).is_some());
        assert!(Shape::of(2, 0, 2).is_none());
        assert!(Shape::of(1, 0, 1).is_none());
        assert!(Shape::of(1, 0, 0).is_none());
    }

    /// Both ends of a link are compared by that.
    #[test]
    fn as_many_changes_as_the_comparison_of_limits_says_find_a_place_and_not_one_more() {
        for ops_max in 2..=48 {
            let changes = usize::try_from(changes_max(ops_max)).unwrap();
            let ops_max = usize::try_from(ops_max).unwrap();
            assert!(Shape::of(changes, 0, ops_max).is_some(), "{changes} with {ops_max}");
            assert!(Shape::of(changes + 1, 0, ops_max).is_none(), "{changes} and one with {ops_max}");
        }
        assert!(
            changes_max(34) < 100_000 && changes_max(35) >= 100_000,
            "docs/operating.md#the-replicas-request-size names 35"
        );
    }
}
