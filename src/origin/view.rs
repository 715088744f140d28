//! Job: what the link's task and the election see of shipping.
//! Input: what the shipper and its session write. Output: a `ShipView`.
//! Always true: only the shipper and what it runs write it; a count never falls.

use crate::model::limits::ReplicaLimits;
use crate::model::{CopyProgress, Epoch, LinkState, Revision, Seq, Term, Verification};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// What `status` says of shipping.
#[derive(Debug, Clone)]
pub struct ShipView {
    pub state: LinkState,
    /// Empty while all is well.
    pub reason: String,
    pub detail: String,
    pub epoch: Epoch,
    pub term: Term,
    pub seq: Seq,
    pub applied_seq: Seq,
    pub durable_seq: Seq,
    pub applied_revision: Revision,
    /// The last one that is received, and the bytes of frames on their way after it.
    pub received_seq: Seq,
    pub unreceived_bytes: u64,
    /// Words of the replica, and those of a base copy among them.
    pub receipts: u64,
    pub copy_acks: u64,
    pub bytes_raw: u64,
    pub bytes_sent: u64,
    pub counts: BTreeMap<&'static str, u64>,
    pub copy: Option<CopyProgress>,
    /// How long the last canary took; since when one has been on its way.
    pub canary: (Option<Duration>, Option<Instant>),
    /// What the open stream could not write at the origin the last time, and why.
    pub unwritten: Option<String>,
    pub verification: Verification,
    /// Revisions that the replica goes on without.
    pub quarantined: u64,
    /// As the replica told them last.
    pub replica_limits: ReplicaLimits,
    /// Once so many comparisons have ended, everyone who asked for one has an answer.
    pub runs_promised: u64,
    /// Since when a base copy is wanted and not complete: all that it is to bring is behind since then.
    pub copy_since: Option<Instant>,
}

impl Default for ShipView {
    fn default() -> Self {
        Self {
            state: LinkState::Connecting,
            reason: String::new(),
            detail: String::new(),
            epoch: Epoch(0),
            term: Term(0),
            seq: Seq(0),
            applied_seq: Seq(0),
            durable_seq: Seq(0),
            applied_revision: Revision(0),
            received_seq: Seq(0),
            unreceived_bytes: 0,
            receipts: 0,
            copy_acks: 0,
            bytes_raw: 0,
            bytes_sent: 0,
            counts: BTreeMap::new(),
            copy: None,
            canary: (None, None),
            unwritten: None,
            verification: Verification::default(),
            quarantined: 0,
            replica_limits: ReplicaLimits::default(),
            runs_promised: 0,
            copy_since: None,
        }
    }
}

impl ShipView {
    /// That the replica has committed, parts of revisions among them.
    pub fn transactions(&self) -> u64 {
        self.counts.get("transactions").copied().unwrap_or(0)
    }

    pub fn count(&mut self, name: &'static str, more: u64) {
        *self.counts.entry(name).or_default() += more;
    }

    /// The comparison that ran ended without an outcome. One that was asked for has failed: whoever asked waits for it.
    pub fn abandon_verification(&mut self, reason: &str, at_ms: u64) {
        self.verification.running = None;
        let asked = self.runs_promised.saturating_sub(self.verification.runs);
        if asked > 0 {
            self.verification.runs += asked;
            self.verification.failed(reason, at_ms);
            self.count("verifications", asked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Outcome, PartsProgress};

    #[test]
    fn comparisons_that_were_asked_for_have_failed_once_they_are_abandoned_and_others_only_end() {
        let mut view = ShipView::default();
        view.verification.runs = 3;
        view.verification.outcome = Outcome::Equal;
        view.verification.running = Some(PartsProgress::default());
        view.abandon_verification("nobody asked", 7_000);
        assert_eq!((view.verification.running, view.verification.runs, view.verification.ended_at_ms), (None, 3, 0));
        assert_eq!(view.verification.outcome, Outcome::Equal);

        view.runs_promised = 5;
        view.verification.running = Some(PartsProgress::default());
        view.abandon_verification("it was deposed", 8_000);
        assert_eq!(
            (view.verification.running, view.verification.runs, view.verification.ended_at_ms),
            (None, 5, 8_000)
        );
        assert_eq!((view.verification.outcome, &view.verification.detail[..]), (Outcome::Failed, "it was deposed"));
        assert_eq!(view.counts["verifications"], 2);
        view.abandon_verification("again", 9_000);
        assert_eq!((view.verification.runs, view.verification.ended_at_ms), (5, 8_000), "nobody waits");
    }
}
