//! Job: what others see of the applier, and what they ask of it.
//! Input: what the applier writes; what the stream asks. Output: an `ApplyView`; `ApplyCommand`s.
//! Always true: only the applier writes its view; what is asked is done in the order of the channel.

use super::apply::Applied;
use super::copy::CopyStep;
use super::mark::Mark;
use super::position::{HelloAnswer, HelloFacts, HelloRefused};
use crate::model::{Position, Quarantine, Revision, Seq, Waymark};
use crate::wire::replicate::refusal::Kind;
use crate::wire::replicate::{CopyAck, KeysWanted};
use std::sync::Arc;
use tokio::sync::oneshot;

/// What the stream and the status see of applying.
#[derive(Debug, Clone, Default)]
pub struct ApplyView {
    pub applied: Option<Applied>,
    /// As [`Applied::revision`], carried on by the origin's word that nothing of the link is missing in between.
    pub applied_revision: Revision,
    pub position: Option<Position>,
    /// Why applying waits; empty if it does not.
    pub waiting: String,
    pub transactions: u64,
    /// Differing keys that base copies left alone because a link back exists.
    pub conflicts: u64,
    /// Revisions larger than a request, which were applied in parts.
    pub in_parts: u64,
    /// Only an operator can make applying go on.
    pub stopped: bool,
    pub copy: CopyAck,
    /// The session that `copy` belongs to.
    pub copy_session: u64,
    pub copy_keys_total: u64,
    /// Keys that the copy had reached before it was taken up again.
    pub copy_keys_before: u64,
    /// Applying waits for a person, who decides here; `waiting` says for what.
    pub held: bool,
    /// Revisions of the transaction in flight.
    pub applying: u64,
    pub quarantine: Arc<Quarantine>,
    /// Revisions that were quarantined since the sidecar started.
    pub quarantined_ever: u64,
    /// Revisions that were held back for their deletes since then.
    pub held_back_ever: u64,
    /// What a retry asks of the origin; the session that it asks.
    pub wanted: Option<(u64, KeysWanted)>,
    /// What ended the stream; the session that it concerns.
    pub refusal: Option<(u64, Kind, String)>,
}

impl ApplyView {
    /// The position that is held from now on, and how far the origin's word carries it. Why it was paused is no reason any more once it is
    /// not; what the link was stopped for stays.
    pub fn hold(&mut self, position: Option<Position>, applied_revision: Revision) {
        let paused = |position: &Option<Position>| position.as_ref().is_some_and(|position| position.paused.is_some());
        if paused(&self.position) && position.is_some() && !paused(&position) && !self.stopped {
            self.waiting.clear();
        }
        self.applied = position.as_ref().map(Applied::of);
        self.applied_revision = applied_revision;
        self.position = position;
    }
}

/// What the stream asks of the applier, in order.
pub enum ApplyCommand {
    Hello {
        facts: HelloFacts,
        reply: oneshot::Sender<Result<HelloAnswer, HelloRefused>>,
    },
    /// Everything of the link up to `through` has seq `after` or less.
    Progress {
        session: u64,
        through: Revision,
        after: Seq,
        waymark: Waymark,
        persist: bool,
    },
    Copy {
        session: u64,
        step: CopyStep,
    },
    /// Note the replica's revision there. `taken` is answered at once: what comes after the mark must not be journaled before.
    Mark {
        session: u64,
        mark: Mark,
        taken: oneshot::Sender<()>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Paused;

    #[test]
    fn a_link_that_goes_on_is_not_said_to_be_paused_and_one_that_is_stopped_keeps_its_reason() {
        let going = Position::of_tests();
        let paused = Position { paused: Some(Paused { at_ms: 1, by: "an operator".to_owned() }), ..going.clone() };
        let resumed = |stopped| {
            let mut view = ApplyView { stopped, waiting: "a reason".to_owned(), ..ApplyView::default() };
            view.hold(Some(paused.clone()), Revision(1));
            assert_eq!(view.waiting, "a reason");
            view.hold(Some(going.clone()), Revision(1));
            view.waiting
        };
        assert_eq!((&resumed(false)[..], &resumed(true)[..]), ("", "a reason"));
        let mut waits = ApplyView { waiting: "no answer".to_owned(), ..ApplyView::default() };
        waits.hold(Some(going.clone()), Revision(1));
        assert_eq!(waits.waiting, "no answer", "it was not paused");
    }
}
