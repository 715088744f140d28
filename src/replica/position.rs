//! Job: what is held of the position: read it, bring queue and journal in line with it, answer a hello from it.
//! Input: the position key in the replica's etcd, a hello. Output: a `Held` position, a `HelloAnswer`, or a refusal.
//! Edge: part of the applier, which owns all of it.
//! Always true: nothing is believed of the position that was not read or committed; a lower (epoch, term) is fenced before it can write.

use super::align::{self, Alignment, JournalFacts};
use super::apply::Applier;
use super::commit::Committed;
use super::journal::{Journal, JournalEntry, JournalError};
use super::next::{self, Claim, Claimed};
use super::plan::TxnTree;
use super::poison::Trial;
use crate::etcd::{Columns, EtcdError, Look};
use crate::failpoint;
use crate::model::{ClusterId, Digest, Epoch, Position, Ranges, Revision, Seq, Term};
use crate::wire::replicate::CopyAck;
use crate::wire::replicate::refusal::Kind;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A rival applier may win the race for the position time and again while it has something to apply; each try costs a read and a
/// transaction.
pub(super) const RACE_TRIES_MAX: u32 = 64;
/// An idle link looks at its position so often: a replica that was restored shows nothing else of it, and a sidecar without a stream hears
/// nothing of what another one does. One read each time.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);
/// What is older is read again before anything is written on its strength.
const HELD_MAX: Duration = LOOK_EVERY.saturating_mul(2);

/// What a fenced sender left in the journal is applied by whoever took the link. While the position stands still for so long and nobody says
/// hello, nobody does: then it is applied from here, as after a restart. Another ships within 10 s.
pub(super) const LEFT_TO_OTHERS: Duration = Duration::from_secs(30);

/// A hello, checked for name, version and ranges.
#[derive(Debug)]
pub struct HelloFacts {
    pub session: u64,
    /// Of the sidecar that ships.
    pub node: String,
    pub epoch: Epoch,
    pub term: Term,
    pub origin_cluster: ClusterId,
    pub ranges: Ranges,
    /// Either side knows of a link back over the ranges.
    pub link_back: bool,
}

/// What a hello is answered with.
#[derive(Debug)]
pub struct HelloAnswer {
    pub replica_cluster: ClusterId,
    pub position: Option<Position>,
    pub received: (Seq, Revision, Digest),
    pub durable: Seq,
    pub ranges_empty: bool,
    /// The position is another sender's, with a higher (epoch, term): no session was opened.
    pub fenced: bool,
}

/// The replica's etcd does not answer, or its journal's disk has failed.
#[derive(Debug)]
pub struct HelloRefused(pub String);

/// Where the answer goes.
pub(super) type HelloReply = oneshot::Sender<Result<HelloAnswer, HelloRefused>>;

/// The position as it was last read or written, with the revision that its compare needs. `position` is `None` where etcd has none.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub position: Option<Position>,
    pub mod_revision: Revision,
    pub at: Instant,
}

impl Held {
    pub fn now(position: Option<Position>, mod_revision: Revision) -> Self {
        Self { position, mod_revision, at: Instant::now() }
    }

    /// True if it is to be read again before anything is written on its strength. While this process slept the replica may have been restored,
    /// and the position's key have come to the same `mod_revision` again with another position. And where nothing is written for so long though
    /// something waits, another of the replica's sidecars may have been told what to do: to discard a revision, or to pause the link.
    pub fn is_stale(&self) -> bool {
        self.at.elapsed() >= HELD_MAX
    }
}

impl Applier {
    /// The position as it is in etcd now, its `mod_revision`, and whose it is. What is held stays as it is.
    pub(super) async fn look_at_position(&mut self) -> Result<(Option<Position>, Revision, ClusterId), EtcdError> {
        let etcd = self.etcd().await?;
        let look = etcd.look(&self.link.position_key()).await?;
        let Some(kv) = look.kv else { return Ok((None, Revision(0), look.cluster)) };
        let position = Position::from_json(&kv.value).map_err(|e| {
            EtcdError::Other(format!(
                "the position at {} cannot be read ({e}): mend it, or delete it to begin with a new base copy",
                self.link.position_key().escape_ascii()
            ))
        })?;
        Ok((Some(position), kv.mod_revision, look.cluster))
    }

    /// Reads the position afresh, and brings queue and journal in line with it.
    pub(super) async fn read_position(&mut self) -> Result<ClusterId, EtcdError> {
        let (position, mod_revision, cluster) = self.look_at_position().await?;
        if let Some(position) = &position
            && position.waymark.counter >= self.waymark.counter
        {
            self.waymark = position.waymark;
        }
        self.planned = None;
        self.read_quarantine(position.as_ref()).await?;
        self.align(position.as_ref()).await.map_err(|e| EtcdError::Other(format!("the journal: {e}")))?;
        if let Some(position) = &position {
            self.knows(position);
        }
        self.expected.clone_from(&position);
        self.held = Some(Held::now(position, mod_revision));
        Ok(cluster)
    }

    /// The position as it was last read or written; while that is in doubt, what was known before.
    pub(super) fn known(&self) -> Option<&Position> {
        self.held.as_ref().map_or(self.expected.as_ref(), |held| held.position.as_ref())
    }

    /// After a fresh read: drops what is in already; where the position moved in a way that is not ours, the stream is closed.
    async fn align(&mut self, position: Option<&Position>) -> Result<(), JournalError> {
        let (run, seq) = position.map_or_else(Default::default, |p| (p.run(), p.seq));
        let epoch = run.epoch;
        let journal = journal_facts(&self.journal, epoch, seq).await?;
        let (reset_journal, moved) = match align::align(position, self.expected.as_ref(), self.claim, journal) {
            Alignment::GoesOn => {
                while self.waiting.front().is_some_and(|(w, _)| w.seq <= seq) {
                    self.dequeue();
                }
                self.read_through = self.read_through.max(seq);
                return Ok(());
            }
            Alignment::Fenced { by, reset_journal } => {
                self.fence(by);
                (reset_journal, None)
            }
            Alignment::StartsAfresh { reset_journal, moved } => (reset_journal, moved),
        };
        self.start_afresh(seq);
        if reset_journal && let Err(e) = self.journal.reset(run, seq).await {
            tracing::error!(link = %self.link, error = %e, "the journal cannot be started afresh");
        }
        if let Some((kind, reason)) = moved {
            let connected = self.told.borrow().connected;
            let further = self.expected.as_ref().is_some_and(|known| (epoch, seq) > (known.epoch, known.seq));
            if connected || !further {
                tracing::warn!(link = %self.link, %reason, "the position moved");
            } else {
                tracing::debug!(link = %self.link, %reason, "the position moved, as it does where another sidecar receives");
            }
            // What this session still says, before it hears of its end, is of another run; and so is what it still puts into the journal.
            self.stopped = if reset_journal { connected } else { self.stopped };
            self.given_up |= reset_journal;
            let session = self.session;
            self.view.send_modify(|view| {
                if reset_journal {
                    // Nothing waits any more, whatever it waited for.
                    (view.waiting, view.held, view.stopped) = (String::new(), false, false);
                }
                view.refusal = Some((session, kind, reason));
            });
        }
        Ok(())
    }

    /// Another sender has the link: this session's changes nothing any more, be it here or in the journal, which stays as it is: whoever
    /// says hello next goes on from there, since all senders give a revision the same seq.
    pub(super) fn fence(&mut self, (epoch, term): Claim) {
        let reason = format!("a sender with epoch {epoch}, term {term} took the link");
        if self.told.borrow().connected {
            tracing::warn!(link = %self.link, %reason, "the sender is fenced");
        } else {
            tracing::debug!(link = %self.link, %reason, "the sender is fenced; its stream has ended before");
        }
        (self.claim, self.copying, self.progress, self.stopped) = (None, None, None, true);
        self.leave_to_others();
        let session = self.session;
        self.view.send_modify(|view| view.refusal = Some((session, Kind::Fenced, reason)));
    }

    /// The next hello goes on with what this session leaves in the journal, or another of the replica's sidecars does.
    pub(super) fn leave_to_others(&mut self) {
        self.left_to_others = Some((Instant::now(), self.known().map_or(Seq(0), |position| position.seq)));
    }

    /// Reads the position again where nothing else would show that it moved.
    pub(super) async fn look_again(&mut self) {
        if self.follows() && self.held.as_ref().is_some_and(|held| held.at.elapsed() >= LOOK_EVERY) {
            self.held = None;
            self.retry().await;
        }
    }

    /// Without a stream nobody says what another of the replica's sidecars does with the link: it brings the position forward, something is held
    /// back or quarantined there, an operator pauses it. What is in flight or waits looks by itself.
    pub(super) async fn look_without_stream(&mut self) {
        let idle = self.in_flight.is_none() && self.retry_at.is_none();
        if !idle || self.told.borrow().connected || self.journal.usable().is_err() {
            return;
        }
        self.held = None;
        self.retry().await;
        self.forget_ended_stream();
    }

    /// What was known of the position may be another sidecar's past: reads it for an operator, and shows it. Nothing is in flight.
    pub(super) async fn refresh(&mut self) -> Result<(), String> {
        if let Err(e) = self.reread().await {
            self.doubt(&e);
            return Err(format!("the replica's etcd: {e}"));
        }
        self.forget_ended_stream();
        self.publish(true);
        Ok(())
    }

    /// A stream that has ended copies nothing more. What it was stopped for is over once the journal has nothing of it that is not in, unless
    /// only an operator can cure it.
    pub(super) fn forget_ended_stream(&mut self) {
        let position = self.held.as_ref().and_then(|h| h.position.as_ref());
        let (false, Some(position)) = (self.told.borrow().connected, position) else { return };
        let rest = self.journal.extent().borrow().end > position.seq;
        let (now, seq) = (Instant::now(), position.seq);
        self.left_to_others = self.left_to_others.map(|(since, at)| if at == seq { (since, at) } else { (now, seq) });
        let nobody_comes = self.left_to_others.is_some_and(|(since, _)| now - since >= LEFT_TO_OTHERS);
        if self.stopped && rest && nobody_comes {
            tracing::info!(link = %self.link, %seq, "nobody goes on with what the last stream left in the journal: it is applied from here");
            // It is of the position's run, whatever the stream was to begin.
            self.claim = None;
        }
        self.stopped &= self.view.borrow().stopped || rest && !nobody_comes;
        self.copying = None;
    }

    pub(super) async fn reread(&mut self) -> Result<(), EtcdError> {
        self.read_position().await.map(|_| ())
    }

    /// Nothing waits any more; the journal's entries after `seq` come next. What the origin said of its progress was of what came before.
    pub(super) fn start_afresh(&mut self, seq: Seq) {
        self.progress = None;
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.planned = None;
        self.trial = Trial::default();
        self.cleared = seq;
        self.breaker.forget_after(seq);
        self.end_retry(Err("the position moved meanwhile: ask again".to_owned()));
        self.marks.clear();
        self.read_through = seq;
    }

    /// Reads the position, settles who may write it, and says from where to ship. `reply`: who waits for that.
    pub(super) async fn hello(&mut self, facts: HelloFacts, reply: &HelloReply) -> Result<HelloAnswer, HelloRefused> {
        // The reason that is shown stays: a session would have nowhere to put what it is sent.
        let failed = |e| HelloRefused(format!("the replica's journal: {e}"));
        self.journal.usable().map_err(failed)?;
        let unavailable = |e: EtcdError| HelloRefused(format!("the replica's etcd: {e}"));
        self.hello_taken = self.hello_taken.max(facts.session);
        let mut tries = 0;
        let (replica_cluster, claim) = loop {
            let replica_cluster = self.read_position().await.map_err(unavailable)?;
            if replica_cluster == facts.origin_cluster {
                self.check_other_etcd(&facts).await?;
            }
            let position = self.held.as_ref().and_then(|h| h.position.as_ref());
            let (next, claim) = match next::claim(position, facts.origin_cluster, facts.epoch, facts.term) {
                Claimed::Nothing => break (replica_cluster, None),
                Claimed::Fenced => return Ok(self.answer(replica_cluster, false, true)),
                Claimed::Holds(claim) => break (replica_cluster, Some(claim)),
                Claimed::TakesOver(next, claim) => (next, claim),
            };
            // Nothing of a base copy that was refused goes into it.
            self.waymark = next.waymark;
            let tree = TxnTree { guards: Vec::new(), success: Vec::new() };
            match self.commit(*next, tree).await.map_err(unavailable)? {
                Committed::Done => {
                    failpoint::reach("term-taken");
                    // Whatever becomes of this hello: the earlier sender's term is older than the position's.
                    self.fence(claim);
                    break (replica_cluster, Some(claim));
                }
                Committed::GuardFailed | Committed::PositionMoved if tries < RACE_TRIES_MAX => tries += 1,
                Committed::GuardFailed | Committed::PositionMoved => {
                    return Err(HelloRefused(
                        "the position moved all the time while the hello was answered".to_owned(),
                    ));
                }
            }
        };
        let mut ranges_empty = true;
        let etcd = self.etcd().await.map_err(unavailable)?;
        for piece in facts.ranges.pieces() {
            ranges_empty &= etcd.page(piece, 0, None, Columns::CountOnly).await.map_err(unavailable)?.count == 0;
        }
        if self.given_up {
            let position = self.held.as_ref().and_then(|h| h.position.as_ref());
            let (run, seq) = position.map_or_else(Default::default, |p| (p.run(), p.seq));
            self.start_afresh(seq);
            let reset = self.journal.reset(run, seq).await;
            reset.map_err(|e| HelloRefused(format!("the journal cannot be started afresh: {e}")))?;
            self.given_up = false;
        }
        self.open_session(facts, claim, reply)?;
        Ok(self.answer(replica_cluster, ranges_empty, false))
    }

    /// The link is the caller's from now on, if it still waits: the earlier session's stream ends, also where nobody hears the answer.
    pub(super) fn open_session(
        &mut self,
        facts: HelloFacts,
        claim: Option<Claim>,
        reply: &HelloReply,
    ) -> Result<(), HelloRefused> {
        if reply.is_closed() {
            return Err(HelloRefused("who said hello has gone meanwhile".to_owned()));
        }
        let earlier = std::mem::replace(&mut self.session, facts.session);
        self.link_back = facts.link_back;
        self.end_retry(Err("the stream to the origin ended meanwhile: ask again".to_owned()));
        self.claim = claim;
        self.ranges = Some(facts.ranges);
        self.copying = None;
        self.marks.clear();
        self.progress = None;
        (self.stopped, self.left_to_others) = (false, None);
        self.retry_at = None;
        if let Some(position) = self.held.as_ref().and_then(|h| h.position.as_ref()) {
            self.waymark = position.waymark;
        }
        self.view.send_modify(|view| {
            let told = view.refusal.take().filter(|(session, ..)| *session == earlier);
            let later = || (earlier, Kind::Closing, "a later hello took the link".to_owned());
            view.refusal = Some(told.unwrap_or_else(later));
            view.stopped = false;
            view.waiting.clear();
            view.held = false;
            view.wanted = None;
            view.copy = CopyAck::default();
            view.copy_session = facts.session;
        });
        self.publish(true);
        Ok(())
    }

    /// Refuses a sender that stands beside this same etcd: it would read what is written here, and write it again. Clusters that are made alike
    /// have the same id, so that the id alone is no proof; that the sender's place in the election is seen here, with its term, is.
    async fn check_other_etcd(&mut self, facts: &HelloFacts) -> Result<(), HelloRefused> {
        let key = self.link.candidate_key(&facts.node);
        let looking = async { self.etcd().await?.look(&key).await };
        match looking.await {
            Ok(Look { kv: Some(candidate), .. }) if candidate.create_revision.0 == facts.term.0 => {
                Err(HelloRefused(format!(
                    "the origin's sidecar {} and this one stand beside the same etcd cluster, which would be written from itself: correct \
                     etcd.endpoints of one of the two",
                    facts.node
                )))
            }
            Ok(_) => Ok(()),
            Err(EtcdError::Denied { said, .. }) => {
                tracing::warn!(link = %self.link, key = %key.escape_ascii(), said, "the origin's cluster has the id of this one, and whether it is another cannot be seen without the right to read that key");
                Ok(())
            }
            Err(e) => Err(HelloRefused(format!("the replica's etcd: {e}"))),
        }
    }

    fn answer(&self, replica_cluster: ClusterId, ranges_empty: bool, fenced: bool) -> HelloAnswer {
        let position = self.held.as_ref().and_then(|h| h.position.clone());
        let extent = self.journal.extent().borrow().clone();
        let carried = position
            .as_ref()
            .map_or((Seq(0), Revision(0), Digest::default()), |p| (p.seq, p.carried_revision, p.carried_digest));
        let received = extent.last.filter(|(seq, _, _)| *seq > carried.0).unwrap_or(carried);
        let durable = carried.0.max(*self.journal.durable().borrow());
        HelloAnswer { replica_cluster, position, received, durable, ranges_empty, fenced }
    }
}

/// `Err`: the journal cannot be read just now, which says nothing of what it holds.
async fn journal_facts(journal: &Journal, epoch: Epoch, seq: Seq) -> Result<JournalFacts, JournalError> {
    let (extent, origin) = (journal.extent().borrow().clone(), journal.origin());
    let last = extent.last.map_or(extent.base, |(seq, _, _)| seq);
    let (base, at_position, after_position) = (extent.base, None, None);
    let mut facts = JournalFacts { epoch: extent.epoch, origin, base, last, at_position, after_position };
    if extent.epoch != epoch {
        return Ok(facts);
    }
    let lost = journal.usable().is_err();
    let first_after = async |after| first_of(journal.read_after(after, 1).await, lost);
    if extent.base < seq && seq <= last {
        facts.at_position = first_after(Seq(seq.0 - 1)).await?.map(|entry| entry.digest);
    }
    if extent.base <= seq && seq < last {
        facts.after_position = first_after(seq).await?.map(|entry| entry.revision.revision);
    }
    Ok(facts)
}

/// The first entry that was read. `None`: there is none, or it cannot be had any more. `lost`: the journal's disk has failed for good.
pub(super) fn first_of(
    read: Result<Vec<JournalEntry>, JournalError>,
    lost: bool,
) -> Result<Option<JournalEntry>, JournalError> {
    match read {
        Ok(entries) => Ok(entries.into_iter().next()),
        Err(error) if lost || error.is_damage() => Ok(None),
        Err(error) => Err(error),
    }
}
