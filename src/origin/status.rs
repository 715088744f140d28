//! Job: what `status` says of a link at its origin.
//! Input: one look at all stages. Output: the link's `LinkStatus`; help for a stage that stands still.
//! Always true: what is wrong is said once, however many stages say it.

use super::Helps;
use super::elect::{ElectView, Standing};
use super::head::HeadView;
use super::lag::LagTracker;
use super::spool::SpoolExtent;
use super::stall::{self, Help};
use super::tail::{TailState, TailView};
use super::view::ShipView;
use crate::etcd::gate::ClusterLimits;
use crate::etcd::limits;
use crate::model::limits::{LimitsStatus, ReplicaLimits};
use crate::model::stall::{Stalled, Verdict, Watchdog};
use crate::model::{CanaryStatus, Epoch, LinkName, LinkState, LinkStatus, Revision, Role, Seq, Side, StageStatus};
use std::time::Duration;

/// One look at all stages, to be written into the status.
pub(super) struct Views<'a> {
    pub(super) node: &'a str,
    pub(super) tail: &'a TailView,
    pub(super) head: &'a HeadView,
    pub(super) elect: &'a ElectView,
    pub(super) ship: &'a ShipView,
    pub(super) spool: &'a SpoolExtent,
    pub(super) limits: ClusterLimits,
    /// What the spool may hold.
    pub(super) spool_bytes_max: u64,
    /// Where the link stands still.
    pub(super) stalled: Option<Stalled>,
}

impl Views<'_> {
    /// Looks whether the link stands still; says so once, and has done what may help. `stalls` counts.
    pub(super) fn watch(&mut self, dog: &mut Watchdog, stalls: &mut u64, helps: &Helps, link: &LinkName, now_ms: u64) {
        let Verdict { stalled, begins, ends, react } = dog.turn(self.state(), &stall::seen(self), now_ms);
        self.stalled = stalled;
        if ends {
            tracing::info!(%link, "the link makes progress again");
        }
        let Some(stalled) = stalled else { return };
        if begins {
            *stalls += 1;
            tracing::warn!(%link, reason = %stall::reason(self, stalled), "the link stands still");
        }
        if react {
            match stall::help(self, stalled) {
                Help::ReopenWatch => helps.reopen.send_replace(()),
                Help::HelloAgain => helps.hello_again.send_replace(()),
                Help::Nothing => {}
            }
        }
    }

    pub(super) fn write(&self, status: &mut LinkStatus, lag: &LagTracker, stalls: u64, now_ms: u64) {
        let ship = self.ship;
        debug_assert!(status.side == Side::Origin);
        status.state = self.state();
        status.reason = self.reason();
        status.stalled_seconds = self.stalled.map_or(0.0, |stalled| stalled.for_ms as f64 / 1_000.0);
        status.epoch = ship.epoch;
        status.term = self.elect.standing.term().unwrap_or(ship.term);
        (status.role, status.shipper) = match &self.elect.standing {
            Standing::Unknown { .. } => (None, String::new()),
            Standing::Standby { shipper, .. } => (Some(Role::Standby), shipper.clone()),
            Standing::Shipper { .. } => (Some(Role::Shipper), self.node.to_owned()),
        };
        status.seq = ship.seq;
        status.origin_revision = ship.applied_revision;
        status.head_revision = self.head.revision.max(self.tail.covered);
        status.applied_seq = ship.applied_seq;
        status.durable_seq = ship.durable_seq;
        let (behind, at_risk) = (lag.lag(now_ms), lag.rpo(now_ms));
        let copying = ship.copy_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        status.lag_revisions = behind.revisions;
        status.lag_seconds = behind.seconds.max(copying);
        status.rpo_revisions = at_risk.revisions;
        status.rpo_seconds = at_risk.seconds.max(copying);
        status.bytes_raw = ship.bytes_raw;
        status.bytes_sent = ship.bytes_sent;
        status.counts.clone_from(&ship.counts);
        // Those that alerts look at are there from the beginning: a rise from nothing is none.
        for name in ["damaged", "resets"] {
            status.counts.entry(name).or_default();
        }
        status.counts.insert("elections", self.elect.won);
        status.counts.insert("stalls", stalls);
        status.copy = ship.copy;
        status.canary = self.canary();
        let told = LimitsStatus::of(self.limits.most, &self.replica_limits());
        limits::tell(&status.link, status.side, status.limits.as_ref(), told.as_ref());
        status.limits = told;
        status.verification.clone_from(&ship.verification);
        status.quarantined_revisions = ship.quarantined;
        if status.role == Some(Role::Standby) {
            self.write_of_standby(status);
        }
        status.stages = vec![
            StageStatus::new("watch", matches!(self.tail.state, TailState::Running), self.tail_detail())
                .at(self.tail.covered.0)
                .with_waiting(self.head.revision.0.saturating_sub(self.tail.covered.0)),
            StageStatus::new(
                "spool",
                !self.spool.full && !self.spool.damaged,
                format!("holds revisions after {} up to {}", self.spool.base, self.spool.covered),
            )
            .at(self.spool.covered.0)
            .with_queue(self.spool.bytes, self.spool_bytes_max),
            StageStatus::new("ship", ship.reason.is_empty(), ship.detail.clone())
                .at(status.seq.0)
                .with_waiting(status.lag_revisions),
        ];
    }

    /// Of a canary that is off, or that no stream has written yet, there is nothing to be told.
    fn canary(&self) -> Option<CanaryStatus> {
        let (took, since) = self.ship.canary;
        let waiting = since.map_or(Duration::ZERO, |since| since.elapsed());
        (took.is_some() || since.is_some()).then(|| CanaryStatus {
            seconds: took.unwrap_or_default().as_secs_f64(),
            waiting_seconds: waiting.as_secs_f64(),
        })
    }

    /// A standby is told none, and what it heard when it shipped may be the past.
    fn replica_limits(&self) -> ReplicaLimits {
        match self.elect.standing {
            Standing::Standby { .. } => ReplicaLimits::default(),
            Standing::Unknown { .. } | Standing::Shipper { .. } => self.ship.replica_limits,
        }
    }

    /// Lag is measured where the link is shipped: what a standby knows of the replica may be ten seconds old, and what the replica told it
    /// while it shipped, older.
    fn write_of_standby(&self, status: &mut LinkStatus) {
        let published = self.elect.published;
        status.epoch = published.map_or(Epoch(0), |published| published.epoch);
        status.origin_revision = published.map_or(Revision(0), |published| published.revision);
        (status.seq, status.applied_seq, status.durable_seq) = (Seq(0), Seq(0), Seq(0));
        (status.lag_revisions, status.lag_seconds) = (0, 0.0);
        (status.rpo_revisions, status.rpo_seconds) = (0, 0.0);
        (status.canary, status.quarantined_revisions) = (None, 0);
    }

    fn state(&self) -> LinkState {
        if self.stalled.is_some() {
            return LinkState::Stalled;
        }
        match self.tail.state {
            TailState::Running if matches!(self.elect.standing, Standing::Standby { .. }) => LinkState::Following,
            TailState::SpoolFull if self.ship.state != LinkState::Stopped => LinkState::SpoolFull,
            TailState::Stopped { .. } => LinkState::Stopped,
            TailState::Idle
            | TailState::Connecting { .. }
            | TailState::Running
            | TailState::SpoolFull
            | TailState::Lost { .. }
            | TailState::OtherHistory { .. } => self.ship.state,
        }
    }

    fn reason(&self) -> String {
        let mut reasons: Vec<String> = self.stalled.iter().map(|stalled| stall::reason(self, *stalled)).collect();
        match &self.elect.standing {
            Standing::Unknown { reason } | Standing::Standby { reason, .. } if !reason.is_empty() => {
                reasons.push(reason.clone());
            }
            Standing::Unknown { .. } | Standing::Standby { .. } | Standing::Shipper { .. } => {}
        }
        if !self.ship.reason.is_empty() {
            reasons.push(self.ship.reason.clone());
        }
        match &self.tail.state {
            TailState::SpoolFull if self.spool.disk_full => {}
            TailState::SpoolFull => reasons.push(
                "the spool is full: watching goes on when the replica has applied more; raise [limits] spool_bytes_max if outages last longer"
                    .to_owned(),
            ),
            TailState::Stopped { reason } => reasons.push(reason.clone()),
            TailState::Connecting { reason } if is_new(&reasons, reason) => reasons.push(format!("the origin's watch: {reason}")),
            TailState::OtherHistory { reason } if *reason != self.ship.reason => reasons.push(reason.clone()),
            TailState::Lost { .. } if self.ship.state == LinkState::Stopped => {}
            TailState::Lost { compacted } => reasons.push(format!(
                "etcd has compacted up to {compacted}, past the spool's end: once the replica answers, both sides are compared and what differs is shipped"
            )),
            TailState::Idle
            | TailState::Connecting { .. }
            | TailState::Running
            | TailState::OtherHistory { .. } => {}
        }
        if let Some(unwritten) = &self.ship.unwritten {
            reasons.push(unwritten.clone());
        }
        if self.spool.disk_full {
            reasons.push("the spool's disk takes no more: make room below data_dir".to_owned());
        }
        if self.spool.damaged {
            reasons.push(
                "the spool cannot be read any more: once the replica answers it is dropped, and what it held is fetched again"
                    .to_owned(),
            );
        }
        if let Some(trouble) = self.head.trouble.as_ref().filter(|trouble| is_new(&reasons, trouble)) {
            reasons.push(format!("the origin's head cannot be read: {trouble}"));
        }
        reasons.join("; ")
    }

    fn tail_detail(&self) -> String {
        match &self.tail.state {
            TailState::Idle => "waits until the replica has said where to begin".to_owned(),
            TailState::Connecting { reason } => format!("connecting: {reason}"),
            TailState::Running => format!("everything up to revision {} is seen", self.tail.covered),
            TailState::SpoolFull => "waits for room in the spool".to_owned(),
            TailState::Lost { compacted } => format!("etcd has compacted up to {compacted}, past the spool's end"),
            TailState::OtherHistory { reason } | TailState::Stopped { reason } => reason.clone(),
        }
    }
}

/// An etcd that does not answer fails every stage with the same words; they are said once.
fn is_new(reasons: &[String], reason: &str) -> bool {
    !reason.is_empty() && !reasons.iter().any(|said| said.contains(reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Term;

    #[test]
    fn a_standby_tells_nothing_that_the_replica_told_it_while_it_shipped() {
        let tail = TailView {
            state: TailState::Running,
            cluster: None,
            covered: Revision(9),
            proven_from: None,
            ferry_only: 0,
        };
        let head = HeadView::default();
        let spool = SpoolExtent {
            tag: 0,
            base: Revision(0),
            covered: Revision(9),
            last: None,
            bytes: 0,
            full: false,
            disk_full: false,
            damaged: false,
        };
        let (took, since) = (Some(Duration::from_millis(80)), Some(tokio::time::Instant::now()));
        let ship = ShipView { quarantined: 2, canary: (took, since), ..ShipView::default() };
        let told = |standing| {
            let elect = ElectView { standing, ..ElectView::default() };
            let (tail, head, elect, ship, spool) = (&tail, &head, &elect, &ship, &spool);
            let limits = ClusterLimits::default();
            let views = Views { node: "a", tail, head, elect, ship, spool, limits, spool_bytes_max: 1, stalled: None };
            let link = LinkName::new("config").unwrap_or_else(|rule| panic!("{rule}"));
            let mut status = LinkStatus::new(link, Side::Origin, String::new());
            views.write(&mut status, &LagTracker::new(), 0, 0);
            (status.quarantined_revisions, status.canary.is_some())
        };
        assert_eq!(told(Standing::Shipper { term: Term(3) }), (2, true));
        assert_eq!(
            told(Standing::Standby { shipper: "b".to_owned(), term: Term(4), reason: String::new() }),
            (0, false)
        );
    }
}
