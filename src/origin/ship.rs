//! Job: run what is decided after a hello to the replica's sidecar, until something ends it; one stream after the other.
//! Input: the spool, the tail's and the head's views, receipts, an operator's commands. Output: shipments, a `ShipView`, acknowledgements.
//! Always true: seqs count on from what the replica has received; nothing is trimmed from the spool before it is applied;
//! everything that ends a stream is a value of `Ended` with one planned reaction.

use super::canary::Canary;
use super::candidacy::{Gap, Unfit};
use super::decide::Way;
use super::elect::{ElectView, Heard};
use super::head::HeadView;
use super::hello::Greeted;
use super::history::{self, Follows, Met};
use super::session::{Session, SessionEnd};
use super::spool::Spool;
use super::tail::{TailCommand, TailView};
use super::view::ShipView;
use super::{LinkEvent, OriginLink, anchor};
use crate::admin::{LinkCommand, next_command};
use crate::etcd::EtcdError;
use crate::etcd::gate::ClusterLimits;
use crate::failpoint;
use crate::model::{Epoch, LinkName, LinkState, LinkStatus, Position, Revision, Seq, Term};
use crate::retry::Backoff;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const WAIT_FIRST: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(1);
/// A link that heals waits up to this long for the next dial, and all of it is lag: as long as the rest of the way to the first applied
/// revision over 40 ms. A dial that finds nobody is a packet.
const DIAL_WAIT: Duration = Duration::from_millis(200);
/// A stream that lasted so long was a good one: what ended it is a new trouble.
const STEADY: Duration = Duration::from_secs(5);
/// The election looks each second, and each look may take a second and a half.
const GIVES_WAY_MAX: Duration = Duration::from_secs(4);
/// A stop that could not be written down is tried again so often: an etcd without room or leader may be cured any moment.
const REMEMBER_AGAIN: Duration = Duration::from_secs(5);

/// An operator's wish for a new base copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resync {
    pub allow_deletes: bool,
}

pub struct Shipper {
    pub(super) origin: OriginLink,
    pub(super) spool: Arc<Spool>,
    pub(super) tail_commands: mpsc::Sender<TailCommand>,
    pub(super) tail: watch::Receiver<TailView>,
    pub(super) head: watch::Receiver<HeadView>,
    /// What the origin's etcd takes.
    pub(super) limits: watch::Receiver<ClusterLimits>,
    pub(super) commands: mpsc::Receiver<LinkCommand>,
    pub(super) view: watch::Sender<ShipView>,
    pub(super) events: mpsc::Sender<LinkEvent>,
    pub(super) status: watch::Receiver<LinkStatus>,
    pub(super) elected: watch::Receiver<ElectView>,
    pub(super) heard: watch::Sender<Heard>,
    /// Changes when the open stream stands still and another hello may help.
    pub(super) hello_again: watch::Receiver<()>,
    /// Of this sidecar's election.
    pub(super) term: Term,
    /// Another sidecar shipped before this one was elected.
    pub(super) took_over: bool,
    /// For which gap of its spool this sidecar gave way last.
    pub(super) asked_others: Option<Gap>,
    /// The epoch of a position whose term was higher than ours, although we were elected: only the next epoch goes past it.
    pub(super) went_back: Option<Epoch>,
    pub(super) known_epoch: Epoch,
    /// In this term: what was asked of this sidecar is not done weeks later, after others shipped.
    pub(super) resync: Option<Resync>,
    /// A repair gave up on so many differing keys. Not an operator's word: every stop of the resume table stands before it.
    pub(super) copy_wanted: Option<u64>,
    /// Where the replica was at the last hello, if that was of this cluster: what another history is to be written down for.
    pub(super) followed: Option<(Epoch, Seq)>,
    /// What is to be written down and is not, and why.
    pub(super) unwritten: Option<(Met, String)>,
    /// What the link's policy made of an origin with another history.
    pub(super) other_history: OtherHistoryMet,
    /// When both sides are compared next, unless somebody asks.
    pub(super) verify_due: Option<Instant>,
    /// The most revisions that were in quarantine since the last comparison began, as the replica told.
    pub(super) quarantined_most: u64,
    pub(super) next_address: usize,
    pub(super) canary: Canary,
    /// What its times are since.
    pub(super) clock: Instant,
    /// When the present stream's first receipt came, or the last one's.
    pub(super) opened: Option<Instant>,
    /// The last reason that was logged: one that repeats is logged once.
    logged: String,
}

/// Another history than the one that was carried, met at the origin.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct OtherHistoryMet {
    /// The next epoch is to open with it.
    pub goes_on: bool,
    /// When it last did.
    pub at: Option<Instant>,
}

impl OtherHistoryMet {
    /// An epoch was opened; true if it was with another history, by the link's policy.
    pub fn opened(&mut self) -> bool {
        let goes_on = std::mem::take(&mut self.goes_on);
        if goes_on {
            self.at = Some(Instant::now());
        }
        goes_on
    }
}

impl Shipper {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        origin: OriginLink,
        spool: Arc<Spool>,
        tail_commands: mpsc::Sender<TailCommand>,
        tail: watch::Receiver<TailView>,
        head: watch::Receiver<HeadView>,
        commands: mpsc::Receiver<LinkCommand>,
        view: watch::Sender<ShipView>,
        events: mpsc::Sender<LinkEvent>,
        status: watch::Receiver<LinkStatus>,
        elected: watch::Receiver<ElectView>,
        heard: watch::Sender<Heard>,
        hello_again: watch::Receiver<()>,
    ) -> Self {
        let mut shipper = Self {
            limits: origin.etcd.limits(),
            origin,
            spool,
            tail_commands,
            tail,
            head,
            commands,
            view,
            events,
            status,
            elected,
            heard,
            hello_again,
            term: Term(0),
            took_over: false,
            asked_others: None,
            went_back: None,
            known_epoch: Epoch(0),
            resync: None,
            copy_wanted: None,
            followed: None,
            unwritten: None,
            other_history: OtherHistoryMet::default(),
            verify_due: None,
            quarantined_most: 0,
            next_address: 0,
            canary: Canary::default(),
            clock: Instant::now(),
            opened: None,
            logged: String::new(),
        };
        shipper.verified_now();
        shipper
    }

    /// The next comparison is due an interval from now.
    pub(super) fn verified_now(&mut self) {
        self.verify_due = self.origin.send.verify_interval.map(|interval| Instant::now() + interval);
    }

    /// Of what the last comparison found to be expected, some is not any more: a revision has left the quarantine since it began.
    pub(super) fn expected_no_more(&self) -> bool {
        let view = self.view.borrow();
        view.verification.expected_keys > 0 && view.quarantined < self.quarantined_most
    }

    /// Ships until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.terms() => {}
        }
    }

    pub(super) async fn turns(&mut self) {
        let mut backoff = Backoff::new(WAIT_FIRST, WAIT_MAX);
        let mut dials = Backoff::new(DIAL_WAIT, DIAL_WAIT);
        loop {
            let end = Box::pin(self.connect_and_ship()).await;
            if self.opened.take().is_some_and(|opened| opened.elapsed() >= STEADY) {
                backoff.succeeded();
                dials.succeeded();
                self.logged.clear();
            }
            match end {
                SessionEnd::Wait(reason) => {
                    if !self.wait(reason, backoff.after_failure(rand::random())).await {
                        return;
                    }
                }
                SessionEnd::Unreachable(reason) => {
                    if !self.wait(reason, dials.after_failure(rand::random())).await {
                        return;
                    }
                }
                SessionEnd::Stop(reason) => {
                    if !self.stopped(&reason).await {
                        return;
                    }
                }
                SessionEnd::OtherHistory(reason) => {
                    self.remember(&reason).await;
                    match self.other_history(&reason) {
                        Ok(()) => tokio::time::sleep(backoff.after_failure(rand::random())).await,
                        Err(reason) => {
                            if !self.stopped(&reason).await {
                                return;
                            }
                        }
                    }
                }
                SessionEnd::HelloAgain(reason) => {
                    tracing::info!(link = %self.origin.send.link, %reason, "saying hello again");
                    self.rest(LinkState::Connecting, reason);
                    tokio::time::sleep(backoff.after_failure(rand::random())).await;
                }
                // Only `decide` meets it, and takes it for a new fact.
                SessionEnd::Compacted(revision) => {
                    self.rest(LinkState::Connecting, format!("the origin has compacted up to {revision}"));
                    tokio::time::sleep(backoff.after_failure(rand::random())).await;
                }
                SessionEnd::OthersTurn(unfit) => {
                    if !self.wait_for_others(unfit).await {
                        return;
                    }
                }
                SessionEnd::Commanded(None) => return,
                SessionEnd::Commanded(Some(command)) => _ = self.obey(command),
            }
        }
    }

    /// Waits for an operator. False: the process ends.
    async fn stopped(&mut self, reason: &str) -> bool {
        let reason = self.named(reason);
        tracing::error!(link = %self.origin.send.link, %reason, "the link stops");
        self.rest(LinkState::Stopped, reason);
        let unfit = self.spool.usable().is_err().then_some(Unfit::Disk);
        self.heard.send_replace(Heard { stopped: unfit.is_none(), unfit, ..Heard::nothing(self.term) });
        let goes_on = loop {
            self.show_unwritten();
            let unwritten = self.unwritten.is_some();
            tokio::select! {
                biased;
                goes_on = self.resync_asked() => break goes_on,
                () = tokio::time::sleep(REMEMBER_AGAIN), if unwritten => self.write_down().await,
            }
        };
        self.unwritten = None;
        self.heard();
        goes_on
    }

    /// The same reason, with what it tells to run of this link.
    fn named(&self, reason: &str) -> String {
        reason.replace("resync LINK", &format!("resync {}", self.origin.send.link))
    }

    /// What the policy makes of another history at the origin; `Err`: the link stops, with this reason.
    fn other_history(&mut self, reason: &str) -> Result<(), String> {
        let since = self.other_history.at.map(|at| at.elapsed());
        match history::follows(self.origin.send.other_history, since) {
            Follows::Resync => {
                let reason = self.named(reason);
                tracing::warn!(link = %self.origin.send.link, %reason, "the origin has another history, and the link goes on with it in a new epoch, as other_history says");
                self.other_history.goes_on = true;
                self.rest(
                    LinkState::Connecting,
                    "the origin has another history: the next epoch opens with it".to_owned(),
                );
                Ok(())
            }
            Follows::Stop => Err(reason.to_owned()),
            Follows::StopAgain => Err(format!("{reason}; {}", history::told_again())),
        }
    }

    /// Shows the reason and waits, unless a resync is asked for first. False: the process ends.
    async fn wait(&mut self, reason: String, wait: Duration) -> bool {
        self.log_wait(&reason);
        self.rest(LinkState::Connecting, reason);
        tokio::select! {
            biased;
            goes_on = self.resync_asked() => goes_on,
            () = tokio::time::sleep(wait) => true,
        }
    }

    /// Has the election give way, which ends this term. Where that does not happen, nobody else can ship: this sidecar goes on. False: the
    /// process ends.
    async fn wait_for_others(&mut self, unfit: Unfit) -> bool {
        self.heard.send_replace(Heard { unfit: Some(unfit), ..Heard::nothing(self.term) });
        let goes_on = self.wait(unfit.reason().to_owned(), GIVES_WAY_MAX).await;
        self.heard();
        goes_on
    }

    /// A failure that repeats is logged once.
    fn log_wait(&mut self, reason: &str) {
        if self.logged != reason {
            tracing::warn!(link = %self.origin.send.link, %reason, "the link waits; trying again");
            reason.clone_into(&mut self.logged);
        }
    }

    fn rest(&self, state: LinkState, reason: String) {
        self.view.send_modify(|view| {
            view.state = state;
            view.detail.clone_from(&reason);
            view.reason = reason;
            (view.copy, view.unwritten) = (None, None);
        });
    }

    /// Until an operator asks for a resync; what cannot be done now is declined meanwhile, and changes nothing. False: nobody can command
    /// any more, the process ends. Cancel-safe.
    pub(super) async fn resync_asked(&mut self) -> bool {
        while let Some(command) = next_command(&mut self.commands).await {
            if self.obey(command) {
                return true;
            }
        }
        false
    }

    /// True if the command changes how the link goes on.
    fn obey(&mut self, command: LinkCommand) -> bool {
        match command {
            LinkCommand::Resync { allow_deletes, reply } => {
                // Who was not told that it will be done repeats the call, or thinks better of it.
                let told = reply.send(Ok(())).is_ok();
                if told {
                    self.resync = Some(Resync { allow_deletes });
                }
                told
            }
            LinkCommand::Verify { reply } | LinkCommand::Repair { reply, .. } => {
                let view = self.view.borrow();
                let state = view.state.as_str();
                let _ = reply.send(Err(format!(
                    "the link is {state} ({}): both sides can be compared once it follows",
                    view.reason
                )));
                false
            }
        }
    }

    async fn connect_and_ship(&mut self) -> SessionEnd {
        let greeted = match Box::pin(self.greet()).await {
            Ok(greeted) => greeted,
            Err(end) => return end,
        };
        failpoint::reach("greeted");
        let decided = self.decide(&greeted).await;
        let outcome = match decided.and_then(|way| while_paused(way, &greeted, &self.origin.send.link)) {
            Ok(Way::Follow { after }) => self.follow(greeted, after).await,
            Ok(Way::Copy { epoch, cursor, reason }) => Box::pin(self.copy(greeted, epoch, cursor, &reason)).await,
            Ok(Way::Repair { epoch, reason }) => {
                // Nothing to be compared with, or nobody who could tell which side is right.
                let as_copy = greeted.reply.ranges_empty || greeted.reply.link_back || self.origin.link_back;
                if as_copy {
                    Box::pin(self.copy(greeted, epoch, None, &reason)).await
                } else {
                    Box::pin(self.repair(greeted, epoch, &reason)).await
                }
            }
            Err(end) => return end,
        };
        match outcome {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn follow(&mut self, greeted: Greeted, after: Revision) -> Result<std::convert::Infallible, SessionEnd> {
        let mut session = Session::open(self, greeted).await?;
        session.follow(self, after).await
    }

    /// A base copy, then following in the same stream. `cursor`: goes on with the position's copy.
    async fn copy(
        &mut self,
        greeted: Greeted,
        epoch: Epoch,
        cursor: Option<bytes::Bytes>,
        reason: &str,
    ) -> Result<std::convert::Infallible, SessionEnd> {
        tracing::info!(link = %self.origin.send.link, %reason, "base copy");
        self.view.send_modify(|view| _ = view.copy_since.get_or_insert_with(Instant::now));
        let mut session = Session::open(self, greeted).await?;
        let after = anchor::copy(self, &mut session, epoch, cursor).await?;
        session.follow(self, after).await
    }

    /// Follows from the origin's head in a new epoch; what was lost in between is found by a comparison, and mended.
    async fn repair(
        &mut self,
        greeted: Greeted,
        epoch: Epoch,
        reason: &str,
    ) -> Result<std::convert::Infallible, SessionEnd> {
        tracing::info!(link = %self.origin.send.link, %reason, "repair instead of a base copy");
        self.view.send_modify(|view| _ = view.copy_since.get_or_insert_with(Instant::now));
        let mut session = Session::open(self, greeted).await?;
        let after = anchor::open_repair(self, &mut session, epoch).await?;
        session.follow(self, after).await
    }

    pub(super) fn learned_epoch(&mut self, epoch: Epoch) {
        self.known_epoch = self.known_epoch.max(epoch);
    }

    /// After a fencing the next hello claims nothing.
    pub(super) fn forget_epoch(&mut self) {
        self.known_epoch = Epoch(0);
    }
}

/// A replica that is paused keeps what it holds, as an operator wished: it takes revisions into its journal, and no copy.
fn while_paused(way: Way, greeted: &Greeted, link: &LinkName) -> Result<Way, SessionEnd> {
    let paused = Position::from_json(&greeted.reply.position).ok().and_then(|position| position.paused);
    match (way, paused) {
        (Way::Copy { reason, .. } | Way::Repair { reason, .. }, Some(paused)) => Err(SessionEnd::Wait(format!(
            "the link is paused at the replica by {}, and waits for a base copy or a repair ({reason}): run `etcd-ferry resume {link} --config F` at the \
             replica's sidecar",
            paused.by
        ))),
        (way, _) => Ok(way),
    }
}

pub(super) fn at_origin(error: &EtcdError) -> SessionEnd {
    SessionEnd::Wait(format!("the origin's etcd: {error}"))
}
