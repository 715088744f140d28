//! Job: one term after the other: stand by until elected, ship until deposed; and what a fencing means for the term.
//! Input: the election's view, a hello that was fenced, the origin's etcd. Output: the shipper's turns, begun and ended; a `SessionEnd`.
//! Edge: part of the shipper, which owns all of it.
//! Always true: nothing is shipped but under a term that was won; that the history went back is said only of a term that was read again.

use super::Clock;
use super::canary::Canary;
use super::candidacy::{self, Fencing};
use super::elect::{self, Heard, Standing};
use super::hello::Greeted;
use super::resume::{self, ReplicaFacts};
use super::session::SessionEnd;
use super::ship::{Shipper, at_origin};
use crate::failpoint;
use crate::model::Epoch;
use tokio::time::Instant;

impl Shipper {
    /// Stands by until it is elected, ships until it is not any more.
    pub(super) async fn terms(&mut self) {
        loop {
            let Some(term) = self.stand_by().await else { return };
            failpoint::reach("elected");
            self.term = term;
            self.forget_wishes();
            let mut elected = self.elected.clone();
            tokio::select! {
                biased;
                _ = elected.wait_for(|view| view.standing != Standing::Shipper { term }) => {}
                () = Box::pin(self.turns()) => return,
            }
            tracing::info!(link = %self.origin.send.link, %term, "this sidecar ships the link no more");
            self.opened = None;
            // The session went with its term, and said nothing.
            let reason = "another sidecar ships the link now: ask there";
            self.view.send_modify(|view| view.abandon_verification(reason, Clock::new().now_ms()));
        }
    }

    /// A wish was for the link as it was in an earlier term. Whoever shipped since may have fulfilled it, and the origin may be another.
    fn forget_wishes(&mut self) {
        if self.resync.is_some() {
            tracing::warn!(link = %self.origin.send.link, term = %self.term,
                "a resync was asked for in an earlier term and is forgotten: ask again if it is still wanted");
        }
        (self.resync, self.copy_wanted, self.went_back) = (None, None, None);
        self.other_history.goes_on = false;
        // Another shipper's are its own.
        self.canary = Canary::default();
        self.view.send_modify(|view| view.canary = (None, None));
    }

    /// The replica has said something.
    pub(super) fn heard(&self) {
        self.heard.send_replace(Heard { at: Some(Instant::now()), ..Heard::nothing(self.term) });
    }

    /// The replica has seen a higher (epoch, term) than ours, and its answer holds the position that says so.
    pub(super) async fn fenced(&mut self, greeted: &Greeted) -> Result<SessionEnd, SessionEnd> {
        let (replica, origin, _) = self.facts(greeted).await?;
        let ReplicaFacts::Answered { position: Some(position), .. } = &replica else {
            return Ok(SessionEnd::Wait("the replica fenced this sidecar and named no position".to_owned()));
        };
        let link = &self.origin.send.link;
        let leads = elect::leads(&greeted.etcd, link, &self.origin.node, self.term).await.map_err(|e| at_origin(&e))?;
        let (seen, term) = (position.term, self.term);
        Ok(match candidacy::fencing(seen, term, leads) {
            Fencing::OldEpoch => {
                self.forget_epoch();
                SessionEnd::HelloAgain(format!("the replica is in epoch {} already", position.epoch))
            }
            Fencing::Deposed => {
                self.forget_epoch();
                SessionEnd::Wait(format!("another sidecar has taken the link with term {seen}; ours was {term}"))
            }
            Fencing::WentBack => {
                self.went_back = Some(position.epoch);
                let same_cluster = position.origin_cluster == origin.cluster;
                self.followed = same_cluster.then_some((position.epoch, position.seq));
                if self.opens_next_epoch() {
                    return Ok(SessionEnd::HelloAgain(
                        "the next epoch opens, whose claim goes past the fence".to_owned(),
                    ));
                }
                SessionEnd::OtherHistory(resume::went_back(&replica, &origin, term).to_string())
            }
        })
    }

    fn opens_next_epoch(&self) -> bool {
        self.resync.is_some() || self.other_history.goes_on
    }

    /// The last epoch that is known, or the one that a resync will open where nothing less goes past a fence.
    pub(super) fn claimed_epoch(&self) -> Epoch {
        let opening = self.went_back.filter(|_| self.opens_next_epoch());
        opening.map_or(self.known_epoch, |fenced| self.known_epoch.max(fenced.next()))
    }
}
