//! Job: what the applier does when something is refused or fails: learn a limit, wait, show why, or stop.
//! Input: an `EtcdError`, a `PlanError`. Output: the applier's next try, or its stop; the reason in the view.
//! Edge: part of the applier, which owns all of it.
//! Always true: what leaves doubt makes the position be read again; a reason stays shown until what it held up is committed.

use super::apply::Applier;
use super::journal::JournalError;
use super::plan::{LimitRefusal, PlanError, PlanReaction};
use super::quarantine::Refusal;
use crate::etcd::EtcdError;
use crate::model::Seq;
use crate::wire::refusal::stops;
use crate::wire::replicate::refusal::Kind;
use tokio::time::Instant;

impl Applier {
    pub(super) async fn refuse_plan(&mut self, error: &PlanError) {
        if let Some((refusal, revisions)) = self.poisoned_plan(error) {
            // What is in flight ends first; then it is planned again.
            if self.in_flight.is_none() {
                self.refused_for_good(refusal, revisions).await;
            }
            return;
        }
        match error.reaction() {
            PlanReaction::Stop(kind) => {
                tracing::error!(link = %self.link, %error, "the revision cannot be applied");
                self.refuse(kind, error.to_string());
            }
            PlanReaction::HelloAgain => {
                tracing::error!(link = %self.link, %error, "what waits does not continue the position; it is dropped");
                self.start_afresh(self.held.as_ref().and_then(|h| h.position.as_ref()).map_or(Seq(0), |p| p.seq));
                self.refuse(Kind::Gap, error.to_string());
            }
            PlanReaction::PlanAgain => self.planned = None,
        }
    }

    /// Tells the stream; nothing more is applied until the next hello, or until an operator has mended what no hello would.
    pub(super) fn refuse(&mut self, kind: Kind, reason: String) {
        self.stopped = true;
        let (session, stopped) = (self.session, stops(kind) || self.journal.usable().is_err());
        if !stopped {
            self.leave_to_others();
        }
        self.view.send_modify(|view| {
            view.waiting.clone_from(&reason);
            view.stopped = stopped;
            view.refusal = Some((session, kind, reason));
        });
    }

    /// Nothing more is applied until a person decides, here; what is received is kept. Looked at again now and then.
    pub(super) fn hold(&mut self, reason: String) {
        if !self.view.borrow().held {
            tracing::error!(link = %self.link, %reason, "applying is held");
        }
        self.try_later(reason, true);
    }

    /// etcd refused what was in flight, with so many revisions: learn a limit, find the one that is not permitted, or wait and read the
    /// position again.
    pub(super) async fn refused(&mut self, error: EtcdError, sent_bytes: usize, revisions: usize) {
        if matches!(error, EtcdError::Denied { .. }) {
            let refusal = Refusal { reason: format!("the replica's etcd: {error}"), surely: None };
            return self.refused_for_good(refusal, revisions).await;
        }
        let learned = if matches!(error, EtcdError::TooManyOps) {
            LimitRefusal::TooManyOps
        } else if matches!(error, EtcdError::TooLarge) {
            LimitRefusal::TooLarge { sent_bytes }
        } else {
            return self.doubt(&error);
        };
        match self.learned(learned) {
            Some(limits) => {
                tracing::warn!(link = %self.link, %error, ops_max = limits.ops_max, bytes_max = limits.bytes_max,
                    "the replica's etcd takes less than configured; set [limits] txn_ops_max and request_bytes_max accordingly");
                self.limits = limits;
            }
            None => self
                .refuse(Kind::TooLarge, format!("the replica's etcd refuses even the smallest transaction: {error}")),
        }
    }

    /// The journal did not give what it holds. Where that is lost, the journal starts afresh at the position, and so does the origin: its
    /// spool holds everything after that, since only the position trims it.
    pub(super) async fn unread(&mut self, error: &JournalError) {
        if let Err(e) = self.journal.usable() {
            return self.refuse(Kind::Closing, format!("the journal: {e}"));
        }
        if !error.is_damage() {
            return self.wait(format!("the journal: {error}"));
        }
        // What was read before it needs no disk.
        if !self.waiting.is_empty() {
            return;
        }
        let Some(position) = self.held.as_ref().and_then(|h| h.position.as_ref()) else { return };
        let (run, seq) = (position.run(), position.seq);
        tracing::error!(link = %self.link, %error, %seq, "the journal cannot be read any more; it is dropped, and what it held is fetched from the origin again");
        self.start_afresh(seq);
        match self.journal.reset(run, seq).await {
            Ok(()) => {
                let reason = format!("the journal: {error}; what it held after seq {seq} is asked of the origin again");
                self.refuse(Kind::PositionMoved, reason);
            }
            Err(e) => self.wait(format!("the journal cannot be started afresh: {e}")),
        }
    }

    /// Something failed: show why, forget the position unless it surely is as it was, and try again after a wait.
    pub(super) fn doubt(&mut self, error: &EtcdError) {
        if !error.changed_nothing() {
            self.held = None;
        }
        if error.wants_new_connection() {
            self.etcd = None;
        }
        self.planned = None;
        self.wait(format!("the replica's etcd: {error}"));
    }

    pub(super) fn wait(&mut self, reason: String) {
        let news = {
            let view = self.view.borrow();
            !view.stopped && view.waiting != reason
        };
        if news {
            tracing::warn!(link = %self.link, %reason, "applying waits");
        }
        self.try_later(reason, false);
    }

    fn try_later(&mut self, reason: String, held: bool) {
        // What it was stopped for outweighs what it waits for.
        let stopped = {
            let view = self.view.borrow();
            view.stopped.then(|| (view.waiting.clone(), view.held))
        };
        let (reason, held) = stopped.unwrap_or((reason, held));
        self.view.send_modify(|view| (view.waiting, view.held) = (reason, held));
        self.retry_at = Some(Instant::now() + self.backoff.after_failure(rand::random()));
    }

    pub(super) async fn retry(&mut self) {
        self.retry_at = None;
        if self.held.is_none() || self.etcd.is_none() {
            if let Err(e) = self.reread().await {
                return self.doubt(&e);
            }
            self.publish(true);
        }
        // While something waits, be it in the journal, only its commit says that the trouble is over.
        let nothing_waits = self.waiting.is_empty() && self.journal.extent().borrow().end <= self.read_through;
        if nothing_waits && self.paused().is_none() && self.held_back().is_none() {
            self.resumed();
        }
    }

    pub(super) fn resumed(&mut self) {
        if self.view.borrow().waiting.is_empty() || self.stopped {
            return;
        }
        tracing::info!(link = %self.link, "applying goes on");
        self.view.send_modify(|view| {
            view.waiting.clear();
            view.held = false;
        });
    }
}
