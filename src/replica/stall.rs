//! Job: what the watchdog sees of the replica's stages, and how a stall is told.
//! Input: the stages' views. Output: a `Seen` for each stage; a reason with what to look at.
//! No I/O: the link's task looks, and ends the stream where that may help.
//! Always true: a link without a stream is not looked at: its state has a reason of its own; a shipment on its way is not cut short.

use super::Views;
use crate::model::Seq;
use crate::model::stall::{Seen, Stage, Stalled};
use std::sync::atomic::Ordering;

/// The stages in the order in which one explains the other.
pub(super) fn seen(views: &Views<'_>) -> [Seen; 2] {
    let (received, applied) = received_and_applied(views);
    let shipments = views.end.counters.shipments.load(Ordering::Relaxed);
    let mark = (applied.0, views.view.transactions);
    let apply = Seen { stage: Stage::Apply, pending: received > applied, mark, allowance_ms: 0 };
    [apply, heard(views.told.connected, shipments, applied)]
}

/// A full journal takes nothing off the stream until some of it is applied: that too is progress.
fn heard(connected: bool, shipments: u64, applied: Seq) -> Seen {
    Seen { stage: Stage::Heard, pending: connected, mark: (shipments, applied.0), allowance_ms: 0 }
}

/// Another hello may help where applying stands still without a word: the origin then tries another sidecar too.
pub(super) fn ends_stream(views: &Views<'_>, stalled: Stalled) -> bool {
    stalled.stage == Stage::Apply && views.view.waiting.is_empty()
}

/// Where the link stands still, since when, and what the operator should look at.
pub(super) fn reason(views: &Views<'_>, stalled: Stalled) -> String {
    let (received, applied) = received_and_applied(views);
    let seconds = stalled.for_ms / 1_000;
    if stalled.stage == Stage::Heard {
        return format!(
            "the origin's stream is open, and nothing whole has come over it for {seconds} s: look at the origin's sidecar, and at the width of the \
             line if a very large revision is on its way"
        );
    }
    format!(
        "up to seq {received} is received, and nothing after seq {applied} has been applied for {seconds} s: look at the replica's etcd"
    )
}

fn received_and_applied(views: &Views<'_>) -> (Seq, Seq) {
    let position = views.view.position.as_ref();
    let applied = position.map_or(Seq(0), |p| p.seq);
    let same_epoch = position.is_some_and(|p| p.epoch == views.extent.epoch);
    (if same_epoch { views.extent.end.max(applied) } else { applied }, applied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_what_is_received_is_applied_the_stream_makes_progress_though_nothing_more_comes_over_it() {
        assert_eq!(heard(true, 9, Seq(3)), heard(true, 9, Seq(3)));
        assert_ne!(heard(true, 9, Seq(3)), heard(true, 9, Seq(4)));
        assert_ne!(heard(true, 9, Seq(3)), heard(true, 10, Seq(3)));
        assert!(heard(true, 9, Seq(3)).pending && !heard(false, 9, Seq(3)).pending);
    }
}
