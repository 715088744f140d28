//! Job: what a Ship stream hears of the replica: acknowledgements, a Reset, a refusal, answers, its end.
//! Input: receipts. Output: acknowledgements to the lag and the spool; the view; why the stream ends.
//! Edge: part of the session; reads the stream's other direction.
//! Always true: nothing is trimmed that is not applied; a Reset starts a fresh window at the seq it names.

use super::LinkEvent;
use super::compare::Answer;
use super::session::{Session, SessionEnd};
use super::ship::Shipper;
use super::shipped::RESETS_MAX;
use crate::failpoint;
use crate::metrics;
use crate::model::{LinkState, Outcome, Revision, Seq};
use crate::tls;
use crate::traces;
use crate::wire::RECEIPT_BYTES_MAX;
use crate::wire::refusal::stops;
use crate::wire::replicate::refusal::Kind;
use crate::wire::replicate::replicate_client::ReplicateClient;
use crate::wire::replicate::{Ack, Receipt, Refusal, Shipment, receipt};
use std::time::Duration;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::Streaming;
use tonic::transport::Channel;

/// Longer than the replica waits for the stream before to hand over.
pub(super) const OPEN_DEADLINE: Duration = Duration::from_secs(15);

impl Session {
    /// Takes one receipt; also the stream's end.
    pub(super) async fn take(
        &mut self,
        ship: &mut Shipper,
        receipt: Result<Option<Receipt>, tonic::Status>,
    ) -> Result<(), SessionEnd> {
        self.last_receipt = Instant::now();
        let receipt = match receipt {
            Ok(Some(receipt)) => {
                ship.opened.get_or_insert(self.last_receipt);
                ship.heard();
                ship.view.send_modify(|view| view.receipts += 1);
                receipt
            }
            Ok(None) => return Err(SessionEnd::HelloAgain("the replica's sidecar closed the stream".to_owned())),
            Err(status) if !self.receipts.are_open() => {
                return Err(SessionEnd::Wait(format!("the stream was refused: {}", tls::explain(&status))));
            }
            Err(status) => {
                if status.code() == tonic::Code::DataLoss {
                    ship.view.send_modify(|view| view.count("damaged", 1));
                }
                return Err(SessionEnd::HelloAgain(format!("the stream broke: {}", tls::explain(&status))));
            }
        };
        match receipt.what {
            Some(receipt::What::Ack(ack)) => self.acknowledge(ship, ack).await,
            Some(receipt::What::Reset(reset)) => self.reset(ship, Seq(reset.after_seq), &reset.reason),
            Some(receipt::What::Refusal(refusal)) => Err(end_of(ship, refusal)),
            Some(receipt::What::CopyAck(ack)) => {
                ship.view.send_modify(|view| view.copy_acks += 1);
                self.copy_ack = ack;
                Ok(())
            }
            Some(receipt::What::PartsAnswer(answer)) => self.answered(Answer::Parts(answer)),
            Some(receipt::What::KeyListsAnswer(answer)) => self.answered(Answer::Lists(answer)),
            Some(receipt::What::MarkFailed(failed)) => self.answered(Answer::MarkFailed(failed)),
            Some(receipt::What::KeysWanted(wanted)) => {
                self.verifying.want_keys(wanted);
                Ok(())
            }
            Some(receipt::What::Repaired(repaired)) => self.answered(Answer::Repaired(repaired)),
            None => Ok(()),
        }
    }

    fn answered(&self, answer: Answer) -> Result<(), SessionEnd> {
        self.verifying.take(answer);
        Ok(())
    }

    /// The next receipt; for the base copy, which waits on receipts between pages.
    pub(super) async fn next_receipt(&mut self) -> Result<Option<Receipt>, tonic::Status> {
        self.receipts.next().await
    }

    async fn acknowledge(&mut self, ship: &mut Shipper, ack: Ack) -> Result<(), SessionEnd> {
        failpoint::reach("ack-heard");
        let moved = self
            .shipped
            .acknowledge(&ack, self.copying)
            .map_err(|untrue| SessionEnd::HelloAgain(untrue.to_string()))?;
        if let Some((_, shipped)) = self.timed.take_if(|(seq, _)| *seq <= Seq(ack.received_seq)) {
            metrics::observe_round_trip(&ship.origin.send.link, shipped.elapsed().as_secs_f64());
        }
        self.unreceived.retain(|(seq, _)| *seq > Seq(ack.received_seq));
        if let Some(tracer) = traces::tracer() {
            tracer.heard(&ship.origin.send.link, self.epoch, Seq(ack.received_seq), Seq(ack.applied_seq));
        }
        ship.view.send_modify(|view| {
            view.received_seq = Seq(ack.received_seq).min(self.shipped.seq);
            view.unreceived_bytes = self.unreceived.iter().map(|(_, bytes)| bytes).sum();
            view.counts.insert("repeated", ack.repeated);
            view.counts.insert("transactions", ack.transactions);
            view.counts.insert("conflicts", ack.conflicts);
            view.quarantined = ack.quarantined;
            if let Some(limits) = ack.limits {
                view.replica_limits = limits.into();
            }
            view.reason.clone_from(&ack.waiting);
        });
        ship.quarantined_most = ship.quarantined_most.max(ack.quarantined);
        self.learn_verified(ship, Revision(ack.verified_revision), ack.verified_at_ms);
        self.show(ship, ack.waiting.is_empty());
        self.show_canary(ship);
        if self.shipped.acked.durable > self.shipped.acked.applied {
            failpoint::reach("durable-heard");
        }
        if let Some(through) = moved.trim {
            failpoint::reach("applied-heard");
            ship.spool.trim(through);
            failpoint::reach("spool-trimmed");
        }
        if moved.lag {
            let acked = self.shipped.acked;
            let event = LinkEvent::Acked { applied: acked.applied_revision, durable: acked.durable_revision };
            let _ = ship.events.send(event).await;
        }
        Ok(())
    }

    pub(super) fn show(&self, ship: &Shipper, well: bool) {
        ship.view.send_modify(|view| {
            let acked = self.shipped.acked;
            view.state = match (acked.following, acked.repairing) {
                _ if acked.paused => LinkState::Paused,
                _ if acked.held => LinkState::Held,
                (true, _) => LinkState::Following,
                (false, true) => LinkState::Repairing,
                (false, false) => LinkState::Copying,
            };
            if acked.following {
                view.copy_since = None;
            }
            view.epoch = self.epoch;
            view.term = self.term;
            view.seq = self.shipped.seq;
            view.applied_seq = acked.applied;
            view.durable_seq = acked.durable;
            view.applied_revision = acked.applied_revision;
            let held = view.state == LinkState::Repairing && view.verification.outcome == Outcome::Failed;
            if held {
                view.reason = format!("the repair waits: {}", view.verification.detail);
                view.detail.clone_from(&view.reason);
            } else if well {
                view.reason.clear();
                view.detail = format!("shipped up to seq {}", self.shipped.seq);
            } else {
                view.detail = format!("the replica waits: {}", view.reason);
            }
        });
    }

    fn reset(&mut self, ship: &Shipper, after: Seq, reason: &str) -> Result<(), SessionEnd> {
        let resets_in_row = self.shipped.reset(after).map_err(|untrue| SessionEnd::HelloAgain(untrue.to_string()))?;
        if resets_in_row > RESETS_MAX {
            return Err(SessionEnd::Stop(format!(
                "the replica cannot decode what comes after seq {after}, also standalone: {reason}; are both sides' [limits] revision_bytes_max alike?"
            )));
        }
        tracing::warn!(link = %ship.origin.send.link, %reason, seq = %after, "the replica asks for a fresh window");
        ship.view.send_modify(|view| view.count("resets", 1));
        self.encoder.restart();
        self.unreceived.retain(|(seq, _)| *seq <= after);
        self.timed = None;
        Ok(())
    }
}

/// The stream's other direction. Its first word takes a round trip, and what is shipped does not wait for it.
pub(super) struct Receipts {
    opening: Option<AbortOnDropHandle<Result<Streaming<Receipt>, tonic::Status>>>,
    /// `None` until the replica has opened it, and where it refused to.
    stream: Option<Streaming<Receipt>>,
    pub(super) opened_at: Option<Instant>,
}

impl Receipts {
    /// In a task of its own: the request goes out though nobody asks for receipts yet.
    pub(super) fn open(channel: Channel, request: tonic::Request<ReceiverStream<Shipment>>) -> Self {
        let mut client = ReplicateClient::new(channel).max_decoding_message_size(RECEIPT_BYTES_MAX);
        let opening = tokio::spawn(async move {
            let opening = tokio::time::timeout(OPEN_DEADLINE, client.ship(request)).await;
            let answered = opening.map_err(|_| tonic::Status::deadline_exceeded("it was not opened in time"))?;
            Ok(answered?.into_inner())
        });
        Self { opening: Some(AbortOnDropHandle::new(opening)), stream: None, opened_at: None }
    }

    pub(super) fn are_open(&self) -> bool {
        self.stream.is_some()
    }

    /// Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Receipt>, tonic::Status> {
        if let Some(opening) = &mut self.opening {
            let opened = opening.await;
            self.opening = None;
            self.stream = Some(opened.map_err(|e| tonic::Status::internal(e.to_string()))??);
            self.opened_at = Some(Instant::now());
        }
        match &mut self.stream {
            Some(stream) => stream.message().await,
            None => Ok(None),
        }
    }
}

fn end_of(ship: &mut Shipper, refusal: Refusal) -> SessionEnd {
    match refusal.kind() {
        Kind::Fenced => ship.forget_epoch(),
        Kind::Guard => (ship.resync, ship.copy_wanted, ship.other_history.goes_on) = (None, None, false),
        Kind::PositionMoved
        | Kind::Gap
        | Kind::Closing
        | Kind::Unspecified
        | Kind::Conflict
        | Kind::Outside
        | Kind::TooLarge => {}
    }
    if stops(refusal.kind()) { SessionEnd::Stop(refusal.reason) } else { SessionEnd::HelloAgain(refusal.reason) }
}
