//! Job: where a link goes on after a hello: gather the facts, ask the resume table, bring the tail to where it says.
//! Input: a hello's answer, the origin's etcd, the views of the tail and the spool. Output: a `Way`, or why there is none.
//! Edge: part of the shipper, which owns all of it.
//! Always true: nothing begins but as the resume table says; a watch that is refused for compaction is a new fact, and asked about again.

use super::candidacy::{self, Gap, Unfit};
use super::elect;
use super::hello::Greeted;
use super::history;
use super::probe::{Probed, probe};
use super::resume::{self, CarriedCheck, OriginFacts, Received, ReplicaFacts, Resume, SpoolFacts, Tailed};
use super::sequence::OriginWaymark;
use super::session::SessionEnd;
use super::ship::{Shipper, at_origin};
use super::spool::SpoolError;
use super::tail::{Begins, Seen, TailCommand, TailState, seen_by};
use crate::etcd::Etcd;
use crate::model::{Digest, Epoch, Position, Revision, Seq};
use crate::wire::digest;
use std::future::Future;
use std::time::Duration;
use tokio::sync::oneshot;

/// A watch opens within milliseconds. Until it does, nothing is heard of the replica, so this is less than a shipper's patience.
pub(super) const WATCH_OPENS_MAX: Duration = Duration::from_secs(4);

/// How the stream begins.
pub(super) enum Way {
    Follow { after: Revision },
    Copy { epoch: Epoch, cursor: Option<bytes::Bytes>, reason: String },
    Repair { epoch: Epoch, reason: String },
}

fn no_way() -> SessionEnd {
    SessionEnd::Wait("the replica did not answer".to_owned())
}

impl Shipper {
    /// The resume table, with its facts gathered; a watch that is refused for compaction is a new fact.
    pub(super) async fn decide(&mut self, greeted: &Greeted) -> Result<Way, SessionEnd> {
        let (replica, mut origin, seen) = self.facts(greeted).await?;
        let position = match &replica {
            ReplicaFacts::Answered { position, .. } => position.clone(),
            ReplicaFacts::Unreachable => None,
        };
        if let Some(position) = &position {
            // Whatever is decided, a stop for one: this is how far the replica is.
            self.view.send_modify(|view| {
                (view.epoch, view.term) = (position.epoch, position.term);
                (view.seq, view.applied_seq, view.durable_seq) = (position.seq, position.seq, position.seq);
                (view.received_seq, view.applied_revision) = (position.seq, position.origin_revision);
            });
        }
        let met = self.recall(greeted, position.as_deref(), origin.cluster).await?;
        if self.resync.is_some() {
            return self.act(resume::resync(position.as_deref()), None, seen).await?.ok_or_else(no_way);
        }
        if self.other_history.goes_on {
            let decided = history::by_digests(position.as_deref(), origin.ranges_digest);
            return self.act(decided, None, seen).await?.ok_or_else(no_way);
        }
        let same_origin = position.as_ref().is_some_and(|p| p.origin_cluster == origin.cluster);
        if let Some(reason) = met {
            return Err(SessionEnd::OtherHistory(reason));
        }
        let left = match &position {
            Some(position) => self.spool.lineage().await.is_of_another(position.run()),
            None => false,
        };
        let usable = match &self.tail.borrow().state {
            // Where the link has gone on in another run since, what the tail compared the origin with says nothing.
            TailState::OtherHistory { reason } if same_origin && !left => {
                return Err(SessionEnd::OtherHistory(reason.clone()));
            }
            TailState::Lost { compacted } => {
                origin.compacted = *compacted;
                false
            }
            TailState::OtherHistory { .. } => false,
            TailState::Idle
            | TailState::Connecting { .. }
            | TailState::Running
            | TailState::SpoolFull
            | TailState::Stopped { .. } => same_origin,
        };
        let usable = match (&replica, usable) {
            (ReplicaFacts::Answered { position: Some(position), received }, true) => {
                let carried = resume::carried(position, received.as_ref());
                self.let_tail_reach(position.origin_revision.max(carried.0)).await;
                self.ships_spool(&greeted.etcd, &origin, position, carried).await?
            }
            (ReplicaFacts::Answered { .. } | ReplicaFacts::Unreachable, _) => false,
        };
        let extent = self.spool.extent().borrow().clone();
        let spool = SpoolFacts { base: extent.base, covered: extent.covered, last: extent.last };
        let spool = (usable && !extent.damaged && extent.covered > Revision(0)).then_some(spool);
        loop {
            let decided = resume::decide(spool.as_ref(), &replica, &origin);
            if let (Some(after), Some(position)) = (decided.compacted_after(), &position) {
                self.leave_to_others(&greeted.etcd, Gap { epoch: position.epoch, after }).await?;
            }
            let decided = match self.copy_wanted {
                Some(differing) => resume::copy_instead(decided, position.as_deref(), differing),
                None => decided,
            };
            tracing::debug!(link = %self.origin.send.link, ?decided, "resume");
            match self.act(decided, resume::watched_from(&replica, origin.carried), seen).await {
                Ok(Some(way)) => {
                    let run = position.as_ref().map(|position| position.run());
                    if let (Some(run), Way::Follow { .. } | Way::Copy { cursor: Some(_), .. }) = (run, &way) {
                        self.spool.serves(run, Revision(0)).await.map_err(unkept)?;
                    }
                    return Ok(way);
                }
                Ok(None) => return Err(no_way()),
                Err(SessionEnd::Compacted(compacted)) if compacted > origin.compacted => origin.compacted = compacted,
                Err(end) => return Err(end),
            }
        }
    }

    /// Whether what the spool holds is of the origin as the replica follows it, whose last carried revision is `carried`. `Err`: it shows that
    /// the origin was restored.
    async fn ships_spool(
        &self,
        etcd: &Etcd,
        origin: &OriginFacts,
        position: &Position,
        carried: (Revision, Digest),
    ) -> Result<bool, SessionEnd> {
        let (run, reached) = (position.run(), position.origin_revision.max(carried.0));
        let asked = self.spool.asked_after(run, reached).await;
        let shown = match asked {
            Some(last) if self.has_come_to(etcd, origin.head, last.0).await? => self.check_origin(etcd, last).await?,
            Some(_) => CarriedCheck::Other,
            None => CarriedCheck::Open,
        };
        if let Some((revision, _)) = asked
            && self.spool.lineage().await.is_restored(run, revision, shown)
        {
            return Err(SessionEnd::OtherHistory(resume::StopReason::SpooledDiffers { revision }.to_string()));
        }
        if shown == CarriedCheck::Same {
            self.spool.proven().await;
        }
        let ships = shown != CarriedCheck::Other
            && !self.spooled_at(carried.0, Some(Revision(0))).await.contradicts(carried.1)
            && self.spool.ships(run, reached).await.map_err(unkept)?;
        if !ships {
            tracing::info!(link = %self.origin.send.link, "the spool was filled before the link's present epoch, or before the origin was restored: what it holds is fetched again");
        }
        Ok(ships)
    }

    /// The head was read a moment before the spool's end was.
    async fn has_come_to(&self, etcd: &Etcd, head: Revision, revision: Revision) -> Result<bool, SessionEnd> {
        if revision <= head {
            return Ok(true);
        }
        let look = etcd.look(&self.origin.send.link.waymark_key()).await.map_err(|e| at_origin(&e))?;
        Ok(revision <= look.head)
    }

    /// What this sidecar's spool lacks may be in that of one that stands by, whose watch was never cut: rather than compare both sides, it
    /// lets them try, once. `Err`: it does.
    async fn leave_to_others(&mut self, etcd: &Etcd, gap: Gap) -> Result<(), SessionEnd> {
        let others = elect::others(etcd, &self.origin.send.link, &self.origin.node).await.map_err(|e| at_origin(&e))?;
        if !candidacy::asks_others(gap, self.asked_others, others) {
            return Ok(());
        }
        self.asked_others = Some(gap);
        Err(SessionEnd::OthersTurn(Unfit::Compacted))
    }

    /// What the replica answered and what the origin's etcd says, the carried revision compared.
    pub(super) async fn facts(&self, greeted: &Greeted) -> Result<(ReplicaFacts, OriginFacts, Seen), SessionEnd> {
        let reply = &greeted.reply;
        let position = match &reply.position[..] {
            [] => None,
            json => Some(
                Position::from_json(json)
                    .map_err(|e| SessionEnd::Wait(format!("the replica's position cannot be read: {e}")))?,
            ),
        };
        let digest = <[u8; 16]>::try_from(&reply.received_digest[..]).map(Digest).unwrap_or_default();
        let received = Received { seq: Seq(reply.received_seq), revision: Revision(reply.received_revision), digest };
        let ahead = position.as_ref().is_some_and(|p| received.seq > p.seq);
        let link = &self.origin.send.link;
        let look = greeted.etcd.look(&link.waymark_key()).await.map_err(|e| at_origin(&e))?;
        let mut origin = OriginFacts {
            cluster: look.cluster,
            head: look.head,
            ranges_digest: digest::of_ranges(&self.origin.send.ranges),
            waymark: look.kv.as_ref().and_then(|kv| OriginWaymark::from_json(&kv.value)),
            carried: CarriedCheck::Open,
            compacted: Revision(0),
        };
        let seen = seen_by(&look);
        if let Some(position) = &position {
            let carried = if ahead {
                (received.revision, received.digest)
            } else {
                (position.carried_revision, position.carried_digest)
            };
            let same_place =
                position.origin_cluster == origin.cluster && position.ranges_digest == origin.ranges_digest;
            let shown = same_place && carried.0 > Revision(0) && origin.head >= carried.0;
            let begins = resume::begins_with(&self.spool_facts(), carried.0, position.origin_revision.max(carried.0));
            if same_place {
                // Told before the comparison: a watch that opens after it begins with what was compared, where it was. A command that waits
                // already comes first; then the next hello tells.
                let carried = (shown && begins).then_some(carried);
                let _ = self.tail_commands.try_send(TailCommand::Greeted { seen, carried });
            }
            if shown {
                origin.carried = self.check_carried(&greeted.etcd, carried).await?;
            }
        }
        let replica = ReplicaFacts::Answered { position: position.map(Box::new), received: ahead.then_some(received) };
        Ok((replica, origin, seen))
    }

    /// Whether the carried revision is the origin's. Where the open watch has shown it, the spool tells; a short watch costs up to 0.1 s.
    async fn check_carried(&self, etcd: &Etcd, carried: (Revision, Digest)) -> Result<CarriedCheck, SessionEnd> {
        let proven_from = self.tail.borrow().proven_from;
        let tailed = self.spooled_at(carried.0, proven_from).await;
        if tailed == Tailed::Holds(carried.1) {
            return Ok(CarriedCheck::Same);
        }
        Ok(tailed.and(self.check_origin(etcd, carried).await?))
    }

    /// Whether the origin has this revision as it was, which its head has come to.
    async fn check_origin(&self, etcd: &Etcd, was: (Revision, Digest)) -> Result<CarriedCheck, SessionEnd> {
        let send = &self.origin.send;
        let probed = probe(etcd, &send.ranges, &send.link, was.0, &self.origin.limits).await;
        Ok(match probed.map_err(|e| at_origin(&e))? {
            Probed::Digest(found) if found == was.1 => CarriedCheck::Same,
            Probed::Digest(_) | Probed::Nothing => CarriedCheck::Other,
            Probed::Compacted => CarriedCheck::Compacted,
        })
    }

    /// What the spool tells of one revision, as far as it is to be believed: from `proven_from` on.
    async fn spooled_at(&self, at: Revision, proven_from: Option<Revision>) -> Tailed {
        if let Some(tailed) = Tailed::by_extent(proven_from, &self.spool_facts(), at) {
            return tailed;
        }
        match self.spool.read_after(Revision(at.0.saturating_sub(1)), 1).await {
            Ok(entries) => Tailed::by_entry(entries.first().map(|entry| (entry.revision.revision, entry.digest)), at),
            Err(_) => Tailed::Unknown,
        }
    }

    fn spool_facts(&self) -> SpoolFacts {
        let extent = self.spool.extent();
        let extent = extent.borrow();
        SpoolFacts { base: extent.base, covered: extent.covered, last: extent.last }
    }

    /// Brings the tail to where the decision wants it. `carried`: what a new watch begins with; `seen`: the origin that it must be of.
    async fn act(
        &mut self,
        decided: Resume,
        carried: Option<(Revision, Digest)>,
        seen: Seen,
    ) -> Result<Option<Way>, SessionEnd> {
        match decided {
            Resume::Stop { reason } => Err(SessionEnd::OtherHistory(reason.to_string())),
            Resume::ShipFromSpool { after } => Ok(Some(Way::Follow { after })),
            Resume::WatchFrom { after } => {
                self.watch_from(after, carried, seen).await?;
                Ok(Some(Way::Follow { after }))
            }
            Resume::Copy { epoch, cursor: Some(at), reason } => {
                if !at.spool_reaches {
                    self.watch_from(at.after, carried, seen).await?;
                }
                Ok(Some(Way::Copy { epoch, cursor: Some(at.cursor), reason: reason.to_string() }))
            }
            Resume::Copy { epoch, cursor: None, reason } => {
                // Where the position was lost, its epoch may be used up.
                let epoch = epoch.max(self.used_epoch().next());
                Ok(Some(Way::Copy { epoch, cursor: None, reason: reason.to_string() }))
            }
            Resume::Repair { epoch, reason } => {
                Ok(Some(Way::Repair { epoch: epoch.max(self.used_epoch().next()), reason: reason.to_string() }))
            }
            Resume::Tail { .. } => Ok(None),
        }
    }

    /// The highest epoch that is known to have been opened, also by an earlier process: its number is never given again, or a journal at the
    /// replica could be taken for one of the new epoch.
    fn used_epoch(&self) -> Epoch {
        let published = self.elected.borrow().published;
        self.known_epoch.max(published.map_or(Epoch(0), |published| published.epoch))
    }

    async fn watch_from(
        &mut self,
        after: Revision,
        carried: Option<(Revision, Digest)>,
        seen: Seen,
    ) -> Result<(), SessionEnd> {
        let opening = self.restart_tail(after, carried, Some(seen), Begins::GoesOn, WATCH_OPENS_MAX);
        let opened = tokio::select! {
            biased;
            goes_on = self.resync_asked() => {
                let asked = SessionEnd::HelloAgain("an operator asked for a base copy".to_owned());
                return Err(if goes_on { asked } else { SessionEnd::Commanded(None) });
            }
            opened = opening => opened,
        };
        match opened {
            Ok(()) => Ok(()),
            Err(TailState::Lost { compacted }) => Err(SessionEnd::Compacted(compacted)),
            Err(TailState::OtherHistory { reason }) => Err(SessionEnd::OtherHistory(reason)),
            Err(TailState::Stopped { reason }) => Err(SessionEnd::Stop(reason)),
            Err(TailState::Connecting { reason }) => Err(not_opened(&reason)),
            Err(TailState::Idle | TailState::Running | TailState::SpoolFull) => {
                Err(SessionEnd::Wait("the origin's watch did not open".to_owned()))
            }
        }
    }

    /// Has the tail drop the spool and watch everything after `after`: `Ok` once etcd has created the watch. Where that takes longer than
    /// `limit`, the tail goes on trying, and what keeps it from it is told. `carried`, `seen`: see [`TailCommand::Restart`].
    pub(super) fn restart_tail(
        &self,
        after: Revision,
        carried: Option<(Revision, Digest)>,
        seen: Option<Seen>,
        begins: Begins,
        limit: Duration,
    ) -> impl Future<Output = Result<(), TailState>> + Send + use<> {
        let (commands, tail) = (self.tail_commands.clone(), self.tail.clone());
        let (opened, waiting) = oneshot::channel();
        let gone = || TailState::Stopped { reason: "the tail has ended".to_owned() };
        let opening = async move {
            commands.send(TailCommand::Restart { after, carried, seen, begins, opened }).await.map_err(|_| gone())?;
            waiting.await.unwrap_or_else(|_| Err(gone()))
        };
        async move {
            tokio::time::timeout(limit, opening).await.unwrap_or_else(|_| {
                // Any other state is that of the watch before.
                let state = tail.borrow().state.clone();
                let silent = TailState::Connecting { reason: format!("no answer within {} s", limit.as_secs()) };
                Err(if matches!(state, TailState::Connecting { .. }) { state } else { silent })
            })
        }
    }
}

/// The link waits where the spool's lineage cannot be written down.
pub(super) fn unkept(error: SpoolError) -> SessionEnd {
    SessionEnd::Wait(format!("the spool: {error}"))
}

pub(super) fn not_opened(reason: &str) -> SessionEnd {
    SessionEnd::Wait(format!("the origin's watch did not open: {reason}"))
}
