//! Job: what the watchdog sees of the origin's stages, how a stall is told, and what may help against it.
//! Input: the stages' views. Output: a `Seen` for each stage; a reason with what to look at; a `Help`.
//! No I/O: the link's task looks, and does what helps.
//! Always true: a link that is not under way is not looked at: its state has a reason of its own; what moves only slowly is not cut short.

use super::elect::Standing;
use super::status::Views;
use super::tail::TailState;
use super::view::ShipView;
use crate::model::stall::{Seen, Stage, Stalled};

/// A line that is narrower than this does not carry a link.
const LINE_BYTES_PER_SECOND_MIN: u64 = 64 << 10;

/// What may help a stage that stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Help {
    ReopenWatch,
    HelloAgain,
    /// Others have it in hand, or it would only begin anew what goes slowly.
    Nothing,
}

/// The stages in the order in which one explains the others.
pub(super) fn seen(views: &Views<'_>) -> [Seen; 5] {
    let (tail, ship) = (views.tail, views.ship);
    let head_unseen = views.head.revision > tail.covered;
    let watch_waits = match &tail.state {
        TailState::Running => head_unseen,
        TailState::Connecting { .. } => true,
        TailState::Idle
        | TailState::SpoolFull
        | TailState::Lost { .. }
        | TailState::OtherHistory { .. }
        | TailState::Stopped { .. } => false,
    };
    // A standby ships nothing.
    let ships = matches!(views.elect.standing, Standing::Shipper { .. });
    let follows = ships && ship.copy.is_none();
    let stage = |stage, pending, mark| Seen { stage, pending, mark, allowance_ms: 0 };
    [
        stage(Stage::Watch, watch_waits, (tail.covered.0, 0)),
        stage(Stage::Receipts, ships, (ship.receipts, 0)),
        stage(Stage::Copy, ships && ship.copy.is_some(), (ship.copy_acks, 0)),
        Seen {
            allowance_ms: ship.unreceived_bytes.saturating_mul(1_000) / LINE_BYTES_PER_SECOND_MIN,
            ..stage(Stage::Receive, follows && ship.seq > ship.received_seq, received(ship))
        },
        stage(Stage::Apply, follows && ship.received_seq > ship.applied_seq, (ship.applied_seq.0, ship.transactions())),
    ]
}

/// How far the replica is with what it receives. A full journal takes nothing until some of it is applied: that too is progress.
fn received(ship: &ShipView) -> (u64, u64) {
    (ship.received_seq.0.saturating_add(ship.applied_seq.0), ship.epoch.0)
}

pub(super) fn help(views: &Views<'_>, stalled: Stalled) -> Help {
    match stalled.stage {
        Stage::Watch => Help::ReopenWatch,
        Stage::Receipts | Stage::Receive => Help::HelloAgain,
        // A replica that says why it waits would say the same after another hello.
        Stage::Apply if views.ship.reason.is_empty() => Help::HelloAgain,
        Stage::Apply | Stage::Copy | Stage::Heard => Help::Nothing,
    }
}

/// Where the link stands still, since when, and what the operator should look at.
pub(super) fn reason(views: &Views<'_>, stalled: Stalled) -> String {
    let (ship, seconds) = (views.ship, stalled.for_ms / 1_000);
    match stalled.stage {
        Stage::Watch => match &views.tail.state {
            TailState::Connecting { .. } => {
                format!("no watch at the origin's etcd has stayed open for {seconds} s: look at that etcd")
            }
            TailState::Idle
            | TailState::Running
            | TailState::SpoolFull
            | TailState::Lost { .. }
            | TailState::OtherHistory { .. }
            | TailState::Stopped { .. } => format!(
                "the origin's watch has shown nothing for {seconds} s, and is at revision {}, though etcd's head is at {}: it is opened anew; look at \
                 the member of etcd that it is connected to",
                views.tail.covered, views.head.revision
            ),
        },
        Stage::Receipts => format!(
            "nothing has been heard from the replica's sidecar for {seconds} s, though the stream is open: look at the line and at that sidecar"
        ),
        Stage::Copy => {
            format!("the base copy has not moved for {seconds} s: look at the replica's etcd and at its sidecar's log")
        }
        Stage::Receive => format!(
            "of what was shipped up to seq {} the replica has received no more than up to seq {} for {seconds} s: look at the width of the line and \
             at the replica's sidecar",
            ship.seq, ship.received_seq
        ),
        Stage::Apply | Stage::Heard => format!(
            "the replica has received up to seq {}, and has applied nothing after seq {} for {seconds} s: look at its etcd and at its \
             sidecar's log",
            ship.received_seq, ship.applied_seq
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Seq;

    #[test]
    fn while_what_is_received_is_applied_the_replica_makes_progress_though_it_receives_nothing_more() {
        let full = ShipView { received_seq: Seq(9), applied_seq: Seq(3), ..ShipView::default() };
        let applying = ShipView { received_seq: Seq(9), applied_seq: Seq(4), ..ShipView::default() };
        assert_ne!(received(&full), received(&applying));
    }
}
