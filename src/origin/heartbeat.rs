//! Job: what an open stream says and writes once a second, whether frames flow or not: progress, waymark, applied; and whether it is dead.
//! Input: ticks, the tail's and the head's views, the lag. Output: progress messages, waymarks at the origin, the end of a silent stream.
//! Edge: part of the session, which owns all of it.
//! Always true: the waymark is rewritten only once the position holds the present one; an idle link causes no writes of its own; no write at
//! the origin holds the stream up, nor ends it but for a rival's sake.

use super::candidacy::{self, Published};
use super::elect::still_elected;
use super::receipts::OPEN_DEADLINE;
use super::sequence::OriginWaymark;
use super::session::{Session, SessionEnd};
use super::ship::{Shipper, at_origin};
use super::tail::TailState;
use crate::etcd::{Compare, CompareOp, Etcd, EtcdError, Txn, TxnOp, TxnResponse, txn_revision};
use crate::failpoint;
use crate::model::{Epoch, LinkStatus, Revision};
use crate::wire;
use crate::wire::replicate::{Progress, Shipment, shipment};
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

const IDLE_PROGRESS: Duration = Duration::from_secs(5);
/// While frames fill the way they say most of it; what they do not say, the lag and the head, goes between two of them after this time.
const PROGRESS_OVERDUE: Duration = Duration::from_secs(10);
/// The replica answers each progress; so long without any receipt means that the stream is dead.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// The same where another of the replica's sidecars can be dialled instead: it says something every 3 s, unless the way is very narrow.
const SILENCE_WITH_OTHERS_MAX: Duration = Duration::from_secs(5);
/// Waymarks and idle positions are written at most so often.
const IDLE_WRITE: Duration = Duration::from_secs(60);

/// How much of the origin's movement was not ours, at some moment.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Movement {
    covered: Revision,
    ferry_only: u64,
}

impl Movement {
    /// Revisions since `earlier` that touched something else than etcd-ferry's own keys.
    fn by_others_since(self, earlier: Movement) -> u64 {
        let moved = self.covered.0.saturating_sub(earlier.covered.0);
        moved.saturating_sub(self.ferry_only.saturating_sub(earlier.ferry_only))
    }
}

/// How long a stream may say nothing. `open_for`: since when the replica has opened it; until then it may be waiting for the stream before
/// to hand over.
fn patience(open_for: Option<Duration>, silence_max: Duration) -> Duration {
    if open_for.is_some() { silence_max } else { OPEN_DEADLINE }
}

/// How long nothing was said: that it was opened is a word too.
fn silence(open_for: Option<Duration>, since_receipt: Duration) -> Duration {
    open_for.map_or(since_receipt, |open_for| open_for.min(since_receipt))
}

impl Session {
    /// Once a second: deadlines, progress, what is to be written at the origin.
    pub(super) fn tick(&mut self, ship: &mut Shipper, drained: bool) -> Result<(), SessionEnd> {
        self.check_deadline()?;
        let extent = ship.spool.extent().borrow().clone();
        let spooled = extent.last.map(|(last, _)| last);
        let (through, shipped_all) = self.shipped.through(drained, spooled, extent.covered);
        self.rewrite_waymark(ship);
        self.publish_applied(ship);
        self.write_canary(ship);
        let now = movement(ship);
        let idle_write = shipped_all
            && self.shipped.acked.following
            && self.persisted_at.0.elapsed() >= IDLE_WRITE
            && now.by_others_since(self.persisted_at.1) > 0;
        let news = through > self.shipped.progressed || idle_write;
        let behind = (self.told_behind, is_behind(&ship.status.borrow()));
        if !is_worth_telling(news, behind, self.last_progress.elapsed()) {
            return Ok(());
        }
        match self.send_progress(ship, through, idle_write) {
            None => {
                self.shipped.progressed = through;
                if idle_write {
                    self.persisted_at = (Instant::now(), now);
                }
            }
            unsent if self.last_progress.elapsed() >= PROGRESS_OVERDUE => {
                self.overdue = unsent;
                self.last_progress = Instant::now();
                // It goes next, and may be acknowledged before anything else is told.
                self.shipped.progressed = self.shipped.progressed.max(through);
            }
            Some(_) => {}
        }
        Ok(())
    }

    pub(super) fn check_deadline(&self) -> Result<(), SessionEnd> {
        let open_for = self.receipts.opened_at.map(|at| at.elapsed());
        let patience = patience(open_for, self.silence_max);
        if silence(open_for, self.last_receipt.elapsed()) > patience {
            let patience = patience.as_secs();
            return Err(SessionEnd::Wait(format!("the replica's sidecar said nothing for {patience} s")));
        }
        Ok(())
    }

    /// Keeps the stream alive during a base copy; says nothing of revisions.
    pub(super) fn keep_alive(&mut self, ship: &Shipper) {
        if self.last_progress.elapsed() >= IDLE_PROGRESS {
            // While pages fill the way it is alive.
            self.send_progress(ship, Revision(0), false);
        }
    }

    /// Where frames fill the way, what is not sent.
    fn send_progress(&mut self, ship: &Shipper, through: Revision, persist: bool) -> Option<Shipment> {
        let status = ship.status.borrow();
        let millis = |seconds: f64| {
            Duration::try_from_secs_f64(seconds).map_or(u64::MAX, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
        };
        let progress = Progress {
            origin_revision: through.0,
            head_revision: ship.head.borrow().revision.0,
            waymark: Some(self.waymark.present.into()),
            lag_ms: millis(status.lag_seconds),
            rpo_ms: millis(status.rpo_seconds),
            lag_revisions: status.lag_revisions,
            rpo_revisions: status.rpo_revisions,
            persist,
            after_seq: self.shipped.seq.0,
            limits: Some(ship.limits.borrow().most.into()),
            trouble: trouble(&ship.tail.borrow().state, ship.head.borrow().trouble.as_deref()),
        };
        let shipment = Shipment { what: Some(shipment::What::Progress(progress)) };
        let behind = is_behind(&status);
        match self.outbound.try_send(shipment) {
            Ok(()) => {
                self.last_progress = Instant::now();
                self.told_behind = behind;
                None
            }
            Err(TrySendError::Full(unsent) | TrySendError::Closed(unsent)) => {
                // It may go later.
                self.told_behind |= behind;
                Some(unsent)
            }
        }
    }

    /// The waymark is rewritten only once the position holds the present one, so that a position's is always the present
    /// or the previous one; and only if the origin moved by more than etcd-ferry's own work.
    fn rewrite_waymark(&mut self, ship: &Shipper) {
        let now = movement(ship);
        let due = match self.waymark_at {
            None => true,
            Some((at, then)) => at.elapsed() >= IDLE_WRITE && now.by_others_since(then) > 0,
        };
        if due && self.shipped.acked.following && self.shipped.acked.waymark == self.waymark.present {
            let next = self.waymark.next(rand::random());
            let (txn, right) = self.waymark_txn(ship, &next);
            self.writes.begin(Write::Waymark(next), now, self.etcd.clone(), txn, right);
        }
    }

    /// Writes the next waymark at the origin, which a base copy waits for; a rival writer ends the stream.
    pub(super) async fn write_waymark(&mut self, ship: &Shipper) -> Result<(), SessionEnd> {
        let next = self.waymark.next(rand::random());
        let (txn, right) = self.waymark_txn(ship, &next);
        let response = self.etcd.txn(txn, &right).await.map_err(|e| at_origin(&e))?;
        self.took_waymark(next, &response)
    }

    /// With the right that it needs.
    fn waymark_txn(&self, ship: &Shipper, next: &OriginWaymark) -> (Txn, String) {
        let key = ship.origin.send.link.waymark_key();
        let txn = Txn::new()
            .when([
                Compare::mod_revision(key.to_vec(), CompareOp::Equal, self.waymark_revision.to_etcd()),
                still_elected(&ship.origin.send.link, &ship.origin.node, self.term),
            ])
            .and_then([TxnOp::put(key.to_vec(), next.to_json(), None)]);
        (txn, format!("write {}", key.escape_ascii()))
    }

    fn took_waymark(&mut self, next: OriginWaymark, response: &TxnResponse) -> Result<(), SessionEnd> {
        if !response.succeeded() {
            return Err(SessionEnd::HelloAgain("another sidecar wrote this link's waymark, or was elected".to_owned()));
        }
        failpoint::reach("waymark-written");
        self.waymark = next;
        self.waymark_revision = txn_revision(response);
        Ok(())
    }

    /// A canary, where it is on and due: an empty revision that the link carries as it does any other. An empty revision's digest says nothing
    /// but its number: so it is written only on the history that this stream goes on with, which the last waymark and the last canary are of.
    fn write_canary(&mut self, ship: &mut Shipper) {
        let Some(interval) = ship.origin.send.canary_interval else { return };
        let now = ship.clock.elapsed();
        let carries = self.shipped.acked.following || self.shipped.acked.repairing;
        if !carries || self.writes.is_busy() || !ship.canary.is_due(interval, now) {
            return;
        }
        ship.canary.begin(now);
        let link = &ship.origin.send.link;
        let key = link.canary_key();
        let value = format!("{{\"node\":\"{}\"}}", ship.origin.node);
        let put = TxnOp::put(key.to_vec(), value, None);
        let unchanged = |key: &[u8], at: Revision| Compare::mod_revision(key.to_vec(), CompareOp::Equal, at.to_etcd());
        let mut when = vec![
            still_elected(link, &ship.origin.node, self.term),
            unchanged(&link.waymark_key(), self.waymark_revision),
        ];
        when.extend(self.canary_revision.map(|last| unchanged(&key, last)));
        let txn = Txn::new().when(when).and_then([put]);
        let right = format!("write {}", key.escape_ascii());
        self.writes.begin(Write::Canary, movement(ship), self.etcd.clone(), txn, right);
    }

    /// How the canary does, for the view.
    pub(super) fn show_canary(&self, ship: &mut Shipper) {
        if ship.origin.send.canary_interval.is_none() {
            return;
        }
        ship.canary.applied(self.shipped.acked.applied_revision, ship.clock.elapsed());
        let canary = ship.canary;
        let flying_since = canary.flying_since().map(|begun| ship.clock + begun);
        ship.view.send_if_modified(|view| {
            let now = (canary.took(), flying_since);
            std::mem::replace(&mut view.canary, now) != now
        });
    }

    /// Tells the standbys how far the position is, so that they trim up to there: now and then, and never for our own work's sake.
    fn publish_applied(&mut self, ship: &Shipper) {
        if self.epoch != Epoch(0) && !self.copying {
            self.publish(ship, self.epoch, self.shipped.acked.position_revision);
        }
    }

    pub(super) fn publish(&mut self, ship: &Shipper, epoch: Epoch, revision: Revision) {
        let (link, now) = (&ship.origin.send.link, Published { term: self.term, epoch, revision });
        let before = ship.elected.borrow().published;
        let since = self.published_at.map(|(at, _)| at.elapsed());
        let movement = movement(ship);
        let moved = self.published_at.is_none_or(|(_, then)| movement.by_others_since(then) > 0);
        if !candidacy::publishes(before, now, since, moved) {
            return;
        }
        let key = link.applied_key();
        let txn = Txn::new().when([still_elected(link, &ship.origin.node, self.term)]).and_then([TxnOp::put(
            key.to_vec(),
            now.to_json(),
            None,
        )]);
        let right = format!("write {}", key.escape_ascii());
        self.writes.begin(Write::Applied, movement, self.etcd.clone(), txn, right);
    }

    /// What became of a write at the origin. One that failed is no reason to end a stream: etcd may be without a leader, or without room, and
    /// what is spooled is better shipped. It is due again as if it had been written, whether the origin moves or not.
    pub(super) fn written(&mut self, ship: &mut Shipper, written: Written) -> Result<(), SessionEnd> {
        let Written { write, movement, outcome } = written;
        let at = Some((Instant::now(), if outcome.is_ok() { movement } else { Movement::default() }));
        let (link, what) = (ship.origin.send.link.clone(), write.as_str());
        match &write {
            Write::Waymark(_) => self.waymark_at = at,
            Write::Applied => self.published_at = at,
            // The next one is due when it would have been.
            Write::Canary => {}
        }
        match (outcome, write) {
            (Ok(response), Write::Waymark(next)) => self.took_waymark(next, &response)?,
            (Ok(response), Write::Applied) if response.succeeded() => failpoint::reach("applied-published"),
            (Ok(response), Write::Canary) if response.succeeded() => {
                self.canary_revision = Some(txn_revision(&response));
                let (applied, now) = (self.shipped.acked.applied_revision, ship.clock.elapsed());
                ship.canary.written(txn_revision(&response), applied, now);
                self.show_canary(ship);
            }
            (Ok(_), Write::Canary) => {
                let reason = "another sidecar was elected, or the origin is not what it was";
                return Err(SessionEnd::HelloAgain(reason.to_owned()));
            }
            (Ok(_), Write::Applied) => {
                return Err(SessionEnd::HelloAgain("another sidecar was elected".to_owned()));
            }
            (Err(error), _) => {
                if ship.view.borrow().unwritten.is_none() {
                    tracing::warn!(%link, %error, "{what} is not written at the origin; the stream goes on");
                }
                let unwritten = format!("{what} is not written at the origin: {error}");
                ship.view.send_modify(|view| view.unwritten = Some(unwritten));
                return Ok(());
            }
        }
        if ship.view.borrow().unwritten.is_some() {
            tracing::info!(%link, "{what} is written at the origin again");
            ship.view.send_modify(|view| view.unwritten = None);
        }
        Ok(())
    }
}

/// What a stream writes at the origin.
#[derive(Debug, Clone, Copy)]
enum Write {
    Waymark(OriginWaymark),
    Applied,
    Canary,
}

impl Write {
    fn as_str(self) -> &'static str {
        match self {
            Write::Waymark(_) => "the waymark",
            Write::Applied => "the applied revision",
            Write::Canary => "the canary",
        }
    }
}

/// A write at the origin that has ended.
pub(super) struct Written {
    write: Write,
    /// The origin's when it began.
    movement: Movement,
    outcome: Result<TxnResponse, EtcdError>,
}

/// What a stream writes at the origin, beside the frames and receipts, which a slow etcd does not hold up: one write at a time.
#[derive(Default)]
pub(super) struct Writes {
    under_way: Option<AbortOnDropHandle<Written>>,
}

impl Writes {
    /// Nothing, while another one is under way: it is asked for again a second later.
    fn begin(&mut self, write: Write, movement: Movement, etcd: Etcd, txn: Txn, right: String) {
        if self.under_way.is_none() {
            let writing = async move { Written { write, movement, outcome: etcd.txn(txn, &right).await } };
            self.under_way = Some(AbortOnDropHandle::new(tokio::spawn(writing)));
        }
    }

    fn is_busy(&self) -> bool {
        self.under_way.is_some()
    }

    /// The one that ends next. Cancel-safe.
    pub(super) async fn next(&mut self) -> Written {
        loop {
            let Some(under_way) = &mut self.under_way else { return std::future::pending().await };
            let ended = under_way.await;
            self.under_way = None;
            // It cannot panic; were it lost, it would be due again.
            if let Ok(written) = ended {
                return written;
            }
        }
    }
}

impl Shipper {
    /// How long a stream may say nothing.
    pub(super) fn silence_max(&self) -> Duration {
        if self.origin.send.to.len() > 1 { SILENCE_WITH_OTHERS_MAX } else { SILENCE_MAX }
    }
}

/// Why what etcd commits is not seen here, for the replica's status; empty: it is. `unread`: why the head could not be read.
fn trouble(tail: &TailState, unread: Option<&str>) -> String {
    let why = match tail {
        TailState::Connecting { reason } if !reason.is_empty() => reason,
        TailState::SpoolFull => "its spool is full",
        TailState::Lost { .. } => "its etcd has compacted what it has not seen",
        TailState::Stopped { reason } | TailState::OtherHistory { reason } => reason,
        TailState::Idle | TailState::Connecting { .. } | TailState::Running => unread.unwrap_or_default(),
    };
    wire::cut_text(why.to_owned())
}

pub(super) fn movement(ship: &Shipper) -> Movement {
    let tail = ship.tail.borrow();
    Movement { covered: tail.covered, ferry_only: tail.ferry_only }
}

/// Whether progress is told now; `behind`: whether the replica was told to be, and whether it is. What was told before the first ack of a
/// stream was counted is not left to stand.
fn is_worth_telling(news: bool, behind: (bool, bool), since_last: Duration) -> bool {
    news || behind == (true, false) || since_last >= IDLE_PROGRESS
}

/// True where something is told to be missing at the replica, or at risk.
fn is_behind(status: &LinkStatus) -> bool {
    status.lag_revisions > 0 || status.rpo_revisions > 0 || status.lag_seconds > 0.0 || status.rpo_seconds > 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_replica_is_told_why_its_origin_sees_nothing_and_nothing_while_it_sees() {
        assert_eq!(trouble(&TailState::Running, None), "");
        assert_eq!(trouble(&TailState::Running, Some("no answer")), "no answer");
        let refused = TailState::Connecting { reason: "refused".to_owned() };
        assert_eq!(trouble(&refused, Some("no answer")), "refused");
        let first = TailState::Connecting { reason: String::new() };
        assert_eq!(trouble(&first, Some("no answer")), "no answer");
        let long = TailState::Stopped { reason: "é".repeat(2_000) };
        assert_eq!(trouble(&long, None).len(), wire::TEXT_BYTES_MAX);
    }

    #[test]
    fn a_lag_that_was_told_is_taken_back_at_once_and_else_an_idle_link_says_little() {
        let now = |behind| is_worth_telling(false, behind, Duration::ZERO);
        assert!(now((true, false)));
        assert!(!now((true, true)) && !now((false, true)) && !now((false, false)));
        assert!(is_worth_telling(true, (false, false), Duration::ZERO));
        assert!(is_worth_telling(false, (false, false), IDLE_PROGRESS));
    }

    #[test]
    fn a_stream_that_is_not_open_yet_has_the_time_that_opening_takes_and_an_open_one_its_own() {
        let seconds = Duration::from_secs;
        let short = SILENCE_WITH_OTHERS_MAX;
        assert_eq!(patience(None, short), OPEN_DEADLINE);
        assert_eq!(patience(Some(seconds(0)), short), short);
        assert_eq!(silence(None, seconds(9)), seconds(9));
        assert_eq!(silence(Some(seconds(1)), seconds(9)), seconds(1), "it was opened after eight");
        assert_eq!(silence(Some(seconds(60)), seconds(2)), seconds(2));
    }
}
