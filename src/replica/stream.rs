//! Job: one Ship stream: take what comes, see that each finds its place before the next is taken, and send receipts.
//! Input: shipments of a peer whose name was checked. Output: shipments taken, one after the other; receipts.
//! Edge: the stream's task; what has to wait for its place is a future beside the receipts, never in their way.
//! Always true: received never runs ahead of what was admitted; a frame that cannot be decoded changes nothing; a refusal ends the stream.

use super::admit::Admit;
use super::apply::sleep_until;
use super::receive::{LinkEnd, Opened};
use super::told::Told;
use super::verify::{Comparer, QUESTIONS_MAX, Question};
use super::view::ApplyView;
use crate::etcd::gate::ClusterLimits;
use crate::failpoint;
use crate::model::limits::ReplicaLimits;
use crate::model::{Phase, Seq};
use crate::traces;
use crate::wire::frame::FrameLimits;
use crate::wire::replicate::refusal::Kind;
use crate::wire::replicate::{Ack, CopyAck, KeysWanted, Receipt, Refusal, Reset, Shipment, Verified, receipt};
use crate::wire::window::Decoder;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

/// A stream that says nothing for longer is known to be dead sooner than 10 s: an origin then dials another sidecar, or lets another one
/// dial. About 80 bytes each, and only while there is nothing else to say.
const RECEIPT_INTERVAL: Duration = Duration::from_secs(3);

/// At most one acknowledgement in this time: each costs about 80 bytes on the line, and at 200 revisions a second one for each would
/// be a third of all. A slower link has each of its own, at once.
const ACK_INTERVAL: Duration = Duration::from_millis(25);

/// A refusal waits so long for a sender that does not take its receipts; well below the time within which a later stream of the link must have
/// its place (`HANDOVER_DEADLINE`), or such a sender would keep out the one that follows it.
const REFUSAL_MAX: Duration = Duration::from_secs(3);

type ReceiptPermit<'a> = mpsc::Permit<'a, Result<Receipt, Status>>;

/// What must be told to the origin, as soon as the way is free.
#[derive(Default)]
pub(super) struct Due {
    pub(super) ack: bool,
    copy: bool,
    pub(super) reset: Option<Reset>,
    /// To a question about a mark.
    answer: Option<receipt::What>,
    /// What a retry asks.
    wanted: Option<KeysWanted>,
    refusal: Option<Refusal>,
}

impl Due {
    /// What the origin waits for.
    fn urgent(&self) -> bool {
        let asks = self.answer.is_some() || self.wanted.is_some();
        self.copy || self.reset.is_some() || asks || self.refusal.is_some()
    }
}

/// One Ship stream.
pub(super) struct Stream {
    pub(super) end: Arc<LinkEnd>,
    pub(super) opened: Opened,
    pub(super) decoder: Decoder,
    pub(super) pages: FrameLimits,
    view: watch::Receiver<ApplyView>,
    durable: watch::Receiver<Seq>,
    latest_session: watch::Receiver<u64>,
    hello_again: watch::Receiver<()>,
    pub(super) due: Due,
    /// What the origin was last told of a base copy.
    copy_told: CopyAck,
    /// Questions about marks, to whoever reads the replica for them.
    pub(super) questions: mpsc::Sender<Question>,
    /// What the origin was last told of the last comparison: said once, since every byte of an ack is said often.
    verified_told: Verified,
    /// The last question of a retry that was put.
    wanted_told: u64,
    /// What the replica's etcd takes; what the origin was last told of it, and of what the sidecar takes.
    limits: watch::Receiver<ClusterLimits>,
    limits_told: Option<ReplicaLimits>,
}

/// What has been taken off the stream and waits for its place.
pub(super) type Placing = Pin<Box<dyn Future<Output = Result<(), (Kind, String)>> + Send>>;

impl Stream {
    fn new(end: Arc<LinkEnd>, opened: Opened, questions: mpsc::Sender<Question>) -> Self {
        Self {
            decoder: Decoder::new(opened.window),
            pages: FrameLimits::new(end.limits.revision_bytes_max),
            view: end.view.clone(),
            durable: end.journal.durable(),
            latest_session: end.latest_session.subscribe(),
            hello_again: end.hello_again.subscribe(),
            due: Due::default(),
            copy_told: CopyAck::default(),
            questions,
            verified_told: Verified::default(),
            wanted_told: 0,
            limits: end.etcd.limits(),
            limits_told: None,
            opened,
            end,
        }
    }

    /// The stream, with the task that reads the replica for questions about marks.
    pub(super) async fn run(
        end: Arc<LinkEnd>,
        opened: Opened,
        admit: &mut Admit,
        inbound: Streaming<Shipment>,
        out: mpsc::Sender<Result<Receipt, Status>>,
        stop: CancellationToken,
    ) {
        let (questions, asked) = mpsc::channel(QUESTIONS_MAX);
        let (answers, answered) = mpsc::channel(1);
        let mut comparing = JoinSet::new();
        comparing.spawn(Comparer::new(end.clone(), asked, answers).run());
        let ended = Self::new(end.clone(), opened, questions).receive(admit, inbound, answered, out, stop).await;
        // Before the end is told, so that no mark is noted after it.
        comparing.shutdown().await;
        end.told.send_modify(|told| told.stream_ended(ended));
    }

    async fn receive(
        mut self,
        admit: &mut Admit,
        mut inbound: Streaming<Shipment>,
        mut answers: mpsc::Receiver<receipt::What>,
        out: mpsc::Sender<Result<Receipt, Status>>,
        stop: CancellationToken,
    ) -> String {
        self.end.told.send_modify(|told| {
            told.connected = true;
            told.at = Some(Instant::now());
        });
        self.due.ack = true;
        self.view.mark_changed();
        let ended = self.turns(admit, &mut inbound, &mut answers, &out, &stop).await;
        tracing::info!(link = %self.end.config.link, reason = %ended, "the stream has ended");
        ended
    }

    async fn turns(
        &mut self,
        admit: &mut Admit,
        inbound: &mut Streaming<Shipment>,
        answers: &mut mpsc::Receiver<receipt::What>,
        out: &mpsc::Sender<Result<Receipt, Status>>,
        stop: &CancellationToken,
    ) -> String {
        let mut placing: Option<Placing> = None;
        let (mut stopping, mut gives_up_at) = (false, None);
        let now = Instant::now();
        let mut told_at = now.checked_sub(ACK_INTERVAL).unwrap_or(now);
        loop {
            if *self.latest_session.borrow() != self.opened.number {
                self.refuse(Kind::Closing, "a later hello took the link".to_owned());
            }
            let refused = self.due.refusal.is_some();
            if refused && gives_up_at.is_none() {
                gives_up_at = Some(Instant::now() + REFUSAL_MAX);
            }
            let quiet = told_at.elapsed() < ACK_INTERVAL;
            let next_word = told_at + if self.due.ack && quiet { ACK_INTERVAL } else { RECEIPT_INTERVAL };
            tokio::select! {
                biased;
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    self.refuse(Kind::Closing, "the replica's sidecar is shutting down".to_owned());
                }
                permit = out.reserve(), if self.due.urgent() || (self.due.ack && !quiet) => match permit {
                    Ok(permit) => if let Some(ended) = self.tell(admit, permit, &mut told_at) {
                        return ended;
                    },
                    Err(_) => return "the origin closed the stream".to_owned(),
                },
                () = sleep_until(gives_up_at) => {
                    let refusal = self.due.refusal.take().unwrap_or_default();
                    return format!("{}; the origin did not take its receipts", refusal.reason);
                }
                _ = self.latest_session.changed() => {}
                Ok(()) = self.hello_again.changed() => {
                    self.refuse(Kind::Closing, "applying stands still: another hello may help".to_owned());
                }
                () = tokio::time::sleep_until(next_word) => self.due.ack = true,
                changed = self.view.changed() => {
                    if changed.is_err() {
                        return "the link has ended".to_owned();
                    }
                    self.look_at_applier(admit);
                }
                _ = self.durable.changed() => self.due.ack = true,
                Ok(()) = self.limits.changed() => self.due.ack = true,
                Some(answer) = answers.recv(), if self.due.answer.is_none() => self.due.answer = Some(answer),
                placed = place(&mut placing) => {
                    placing = None;
                    if let Err((kind, reason)) = placed {
                        self.refuse(kind, reason);
                    }
                    self.due.ack = true;
                }
                message = inbound.message(), if placing.is_none() && !refused => match self.hear(admit, message) {
                    Ok(next) => placing = next,
                    Err(ended) => return ended,
                },
            }
        }
    }

    /// The next receipt goes out. Why the stream ends with it, if it does.
    fn tell(&mut self, admit: &Admit, permit: ReceiptPermit<'_>, told_at: &mut Instant) -> Option<String> {
        let receipt = self.next_receipt(admit);
        let is_ack = matches!(receipt.what, Some(receipt::What::Ack(_)));
        if is_ack {
            failpoint::reach("ack-made");
            *told_at = Instant::now();
        }
        let refusal =
            if let Some(receipt::What::Refusal(refusal)) = &receipt.what { Some(refusal.reason.clone()) } else { None };
        permit.send(Ok(receipt));
        if is_ack {
            failpoint::reach("ack-sent");
        }
        refusal
    }

    /// What is to be put into its place next. `Err`: why the stream has ended.
    fn hear(
        &mut self,
        admit: &mut Admit,
        message: Result<Option<Shipment>, Status>,
    ) -> Result<Option<Placing>, String> {
        match message {
            Ok(Some(shipment)) => Ok(self.take(admit, shipment).unwrap_or_else(|(kind, reason)| {
                self.refuse(kind, reason);
                None
            })),
            Ok(None) => Err("the origin closed the stream".to_owned()),
            Err(status) => {
                if status.code() == Code::DataLoss {
                    self.end.counters.damaged.fetch_add(1, Ordering::Relaxed);
                }
                Err(format!("the stream broke: {}", crate::tls::explain(&status)))
            }
        }
    }

    fn refuse(&mut self, kind: Kind, reason: String) {
        if self.due.refusal.is_none() {
            self.end.counters.refused.fetch_add(1, Ordering::Relaxed);
            self.due.refusal = Some(Refusal { kind: kind.into(), reason });
        }
    }

    fn look_at_applier(&mut self, admit: &mut Admit) {
        let view = self.view.borrow_and_update();
        self.due.ack = true;
        if view.copy_session == self.opened.number {
            self.due.copy |= view.copy != self.copy_told;
            if view.copy.complete
                && let Some(position) = &view.position
                && position.epoch > admit.epoch().0
                && admit.open_epoch(position.epoch, position.term, Seq(0)).is_err()
            {
                tracing::error!(link = %self.end.config.link, "an older epoch was opened");
            }
        }
        if let Some((session, wanted)) = &view.wanted
            && *session == self.opened.number
            && wanted.wanted > self.wanted_told
        {
            self.wanted_told = wanted.wanted;
            self.due.wanted = Some(wanted.clone());
        }
        let refusal = view.refusal.clone().filter(|(session, _, _)| *session == self.opened.number);
        drop(view);
        if let Some((_, kind, reason)) = refusal {
            self.refuse(kind, reason);
        }
    }

    /// Resets first, so that no acknowledgement overtakes one; a refusal last, since the stream ends with it.
    fn next_receipt(&mut self, admit: &Admit) -> Receipt {
        let what = if let Some(reset) = self.due.reset.take() {
            receipt::What::Reset(reset)
        } else if self.due.copy {
            self.due.copy = false;
            self.copy_told.clone_from(&self.view.borrow().copy);
            if self.copy_told.complete {
                self.end.told.send_modify(Told::copied);
            }
            receipt::What::CopyAck(self.copy_told.clone())
        } else if self.due.ack {
            self.due.ack = false;
            let ack = self.ack(admit);
            self.verified_told = self.end.told.borrow().verified;
            self.limits_told = Some(self.end.limits(*self.limits.borrow()));
            if let Some(tracer) = traces::tracer() {
                let (epoch, _) = admit.epoch();
                tracer.acknowledged(&self.end.config.link, epoch, Seq(ack.applied_seq));
            }
            receipt::What::Ack(ack)
        } else if let Some(answer) = self.due.answer.take() {
            answer
        } else if let Some(wanted) = self.due.wanted.take() {
            receipt::What::KeysWanted(wanted)
        } else {
            receipt::What::Refusal(self.due.refusal.clone().unwrap_or_default())
        };
        Receipt { what: Some(what) }
    }

    fn ack(&self, admit: &Admit) -> Ack {
        let view = self.view.borrow();
        let verified = self.end.told.borrow().verified;
        let verified = if verified == self.verified_told { Verified::default() } else { verified };
        let limits = Some(self.end.limits(*self.limits.borrow()));
        let position = view.position.as_ref().filter(|p| p.epoch == admit.epoch().0);
        let applied = position.map_or(Seq(0), |p| p.seq);
        let durable = self.durable.borrow().0.max(applied.0).min(admit.received().0.max(applied.0));
        Ack {
            received_seq: admit.received().0,
            durable_seq: durable,
            applied_seq: applied.0,
            applied_origin_revision: if position.is_some() { view.applied_revision.0 } else { 0 },
            position_revision: position.map_or(0, |p| p.origin_revision.0),
            waymark: position.map(|p| p.waymark.into()),
            following: position.is_some_and(|p| p.state == Phase::Following),
            waiting: view.waiting.clone(),
            repeated: self.end.counters.repeated.load(Ordering::Relaxed),
            transactions: view.transactions,
            conflicts: view.conflicts,
            verified_revision: verified.origin_revision,
            verified_at_ms: verified.at_ms,
            repairing: position.is_some_and(|p| p.state == Phase::Repairing),
            repair_wanted: self.end.repair_wanted.load(Ordering::Relaxed),
            held: view.held,
            paused: view.position.as_ref().is_some_and(|p| p.paused.is_some()),
            quarantined: view.quarantine.entries.len() as u64,
            limits: limits.filter(|_| limits != self.limits_told).map(Into::into),
        }
    }
}

async fn place(placing: &mut Option<Placing>) -> Result<(), (Kind, String)> {
    match placing {
        Some(placing) => placing.as_mut().await,
        None => std::future::pending().await,
    }
}
