//! Job: one Ship stream: encode what the spool holds, send it, take receipts.
//! Input: spool entries, receipts, ticks. Output: shipments; acknowledgements to the lag and the spool.
//! Always true: frames carry consecutive seqs; a Reset starts a fresh window at the seq it names; the stream has a deadline of its own.

use super::LinkEvent;
use super::compare::Answer;
use super::heartbeat::{Movement, movement};
use super::sequence::OriginWaymark;
use super::ship::{Greeted, Shipper};
use super::spool::{Spool, SpoolEntry, SpoolError};
use super::verify::Verifying;
use super::watch::TailState;
use crate::admin::LinkCommand;
use crate::etcd::Etcd;
use crate::metrics;
use crate::model::{
    ClusterId, Digest, Epoch, LinkState, Outcome, Position, Revision, Seq, Term, Waymark, WholeRevision,
};
use crate::tls;
use crate::wire::frame::FrameLimits;
use crate::wire::replicate::refusal::Kind;
use crate::wire::replicate::replicate_client::ReplicateClient;
use crate::wire::replicate::{Ack, CopyAck, HelloReply, Receipt, Refusal, Shipment, receipt, shipment};
use crate::wire::window::{Encoder, WindowLimits};
use crate::wire::{self, LINK_METADATA, SESSION_METADATA};
use bytes::Bytes;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::metadata::AsciiMetadataValue;

/// Frames between the encoder and the connection; the rest waits in the spool.
const OUTBOUND_MAX: usize = 4;
/// Frames that are not durable yet; each costs 16 bytes here, and the replica's own bounds hold the stream back long before.
const IN_FLIGHT_MAX: usize = 4096;
const TICK: Duration = Duration::from_secs(1);
const OPEN_DEADLINE: Duration = Duration::from_secs(15);
/// After so many resets in a row frames travel standalone, one revision each.
const RESETS_BEFORE_STANDALONE: u32 = 2;
/// A frame that cannot be decoded so often never will be.
const RESETS_MAX: u32 = 8;

/// Why a stream ended, as its planned reaction.
#[derive(Debug)]
pub enum SessionEnd {
    /// Something outside must change first: try again after a wait, with the reason shown.
    Wait(String),
    /// Nobody answers the dial: try again soon.
    Unreachable(String),
    /// Only an operator can decide how to go on.
    Stop(String),
    HelloAgain(String),
    Commanded(Option<LinkCommand>),
    /// The watch that was to be opened starts at a compacted revision.
    Compacted(Revision),
}

impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEnd::Wait(reason)
            | SessionEnd::Unreachable(reason)
            | SessionEnd::Stop(reason)
            | SessionEnd::HelloAgain(reason) => f.write_str(reason),
            SessionEnd::Commanded(_) => f.write_str("an operator asked for something else"),
            SessionEnd::Compacted(revision) => write!(f, "the origin has compacted up to {revision}"),
        }
    }
}

/// How far the replica says it is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Acked {
    pub applied: Seq,
    pub applied_revision: Revision,
    pub durable: Seq,
    pub durable_revision: Revision,
    /// What the position says: the spool is trimmed up to it, never past it.
    pub position_revision: Revision,
    pub waymark: Waymark,
    pub following: bool,
    /// A repair is under way, or was cut short.
    pub repairing: bool,
}

pub struct Session {
    pub(super) outbound: mpsc::Sender<Shipment>,
    receipts: Streaming<Receipt>,
    pub(super) reply: HelloReply,
    pub(super) etcd: Etcd,
    encoder: Encoder,
    pub(super) epoch: Epoch,
    pub(super) term: Term,
    pub(super) seq: Seq,
    /// The last revision that was read from the spool for shipping.
    pub(super) cursor: Revision,
    /// The last one that is on its way: a frame that waits for the connection is read, and not sent.
    pub(super) sent: Revision,
    /// Frames that are not durable at the replica: their last seq and revision.
    in_flight: VecDeque<(Seq, Revision)>,
    received: (Seq, Revision),
    /// A frame whose round trip is being measured, one at a time.
    timed: Option<(Seq, Instant)>,
    pub(super) acked: Acked,
    replica_cluster: ClusterId,
    resets_in_row: u32,
    frame_bytes_max: usize,
    pub(super) waymark: OriginWaymark,
    pub(super) waymark_revision: Revision,
    pub(super) silence_max: Duration,
    pub(super) waymark_at: Option<(Instant, Movement)>,
    pub(super) persisted_at: (Instant, Movement),
    /// When the applied revision was published last by this stream, and the origin's movement then.
    pub(super) published_at: Option<(Instant, Movement)>,
    pub(super) last_receipt: Instant,
    pub(super) last_progress: Instant,
    pub(super) progressed: Revision,
    pub(super) copy_ack: CopyAck,
    /// A base copy is under way, whatever the position still says.
    pub(super) copying: bool,
    pub(super) verifying: Verifying,
}

impl Session {
    /// Opens the Ship stream that the hello allowed.
    pub(super) async fn open(ship: &mut Shipper, greeted: Greeted) -> Result<Self, SessionEnd> {
        let Greeted { channel, reply, etcd, waymark, waymark_revision } = greeted;
        let (outbound, shipments) = mpsc::channel(OUTBOUND_MAX);
        let mut request = tonic::Request::new(ReceiverStream::new(shipments));
        let session: String = reply.session.iter().map(|b| format!("{b:02x}")).collect();
        for (name, value) in [(LINK_METADATA, ship.origin.send.link.as_str()), (SESSION_METADATA, &session)] {
            let value = AsciiMetadataValue::try_from(value).map_err(|e| SessionEnd::Stop(e.to_string()))?;
            request.metadata_mut().insert(name, value);
        }
        let mut client = ReplicateClient::new(channel);
        let opening = tokio::time::timeout(OPEN_DEADLINE, client.ship(request));
        let receipts = match opening.await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => {
                return Err(SessionEnd::Wait(format!("the stream was refused: {}", tls::explain(&status))));
            }
            Err(_) => return Err(SessionEnd::Wait("the stream was not opened in time".to_owned())),
        };
        let position = Position::from_json(&reply.position).ok();
        let limits = &ship.origin.limits;
        let frame_bytes_max = wire::lesser(limits.frame_bytes_max, reply.frame_bytes_max);
        let window = WindowLimits {
            window_bytes_max: wire::lesser(limits.window_bytes_max, reply.window_bytes_max),
            frame: FrameLimits::new(limits.revision_bytes_max),
        };
        let now = Instant::now();
        let received = (Seq(reply.received_seq), Revision(reply.received_revision));
        let mut acked = Acked { durable: Seq(reply.durable_seq), ..Acked::default() };
        if let Some(position) = &position {
            acked.applied = position.seq;
            acked.applied_revision = position.origin_revision;
            acked.durable_revision = position.origin_revision;
            acked.position_revision = position.origin_revision;
            acked.waymark = position.waymark;
        }
        let epoch = position.as_ref().map_or(Epoch(0), |p| p.epoch);
        ship.learned_epoch(epoch);
        let durable =
            if received.0 > acked.applied && acked.durable >= received.0 { received.1 } else { acked.applied_revision };
        let greeting = LinkEvent::Greeted { applied: acked.applied_revision, durable };
        let _ = ship.events.send(greeting).await;
        Ok(Self {
            outbound,
            receipts,
            replica_cluster: ClusterId(reply.replica_cluster),
            reply,
            etcd,
            encoder: Encoder::new(window, 1),
            epoch,
            term: ship.term,
            seq: received.0,
            cursor: Revision(0),
            sent: Revision(0),
            in_flight: VecDeque::new(),
            received,
            timed: None,
            acked,
            resets_in_row: 0,
            frame_bytes_max,
            waymark,
            waymark_revision,
            silence_max: ship.silence_max(),
            waymark_at: None,
            persisted_at: (now, movement(ship)),
            published_at: None,
            last_receipt: now,
            last_progress: now,
            progressed: Revision(0),
            copy_ack: CopyAck::default(),
            copying: false,
            verifying: Verifying::default(),
        })
    }

    /// A base copy is over: seqs start afresh.
    pub(super) fn opened_epoch(&mut self, ship: &mut Shipper, epoch: Epoch, anchor: Revision) {
        self.copying = false;
        self.epoch = epoch;
        self.seq = Seq(0);
        self.received = (Seq(0), anchor);
        self.in_flight.clear();
        self.timed = None;
        self.acked.applied = Seq(0);
        self.acked.durable = Seq(0);
        self.acked.applied_revision = anchor;
        self.acked.durable_revision = anchor;
        self.persisted_at = (Instant::now(), movement(ship));
        self.acked.position_revision = anchor;
        ship.learned_epoch(epoch);
    }

    /// Ships everything after `after`, as it comes, until something ends the stream.
    pub(super) async fn follow(&mut self, ship: &mut Shipper, after: Revision) -> Result<Infallible, SessionEnd> {
        let ended = self.follow_on(ship, after).await;
        if let Err(end) = &ended {
            self.abandon_verification(ship, &end.to_string());
        }
        ended
    }

    async fn follow_on(&mut self, ship: &mut Shipper, after: Revision) -> Result<Infallible, SessionEnd> {
        self.cursor = after;
        self.received.1 = self.received.1.max(after);
        self.show(ship, true);
        // What was applied while no stream was open makes room too.
        ship.spool.trim(self.acked.position_revision);
        tracing::info!(link = %ship.origin.send.link, epoch = %self.epoch, seq = %self.seq, after = %after, "following");
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut pending: Option<Shipment> = None;
        let mut stream_open = true;
        let (outbound, spool) = (self.outbound.clone(), ship.spool.clone());
        let mut reading: Option<Reading> = None;
        loop {
            if pending.is_none() {
                self.sent = self.cursor;
            }
            // A read goes on while receipts are taken: begun anew at each of them, it might never end.
            reading = reading.filter(|reading| reading.after == self.cursor);
            if reading.is_none() && pending.is_none() && self.in_flight.len() < IN_FLIGHT_MAX {
                // One revision a frame, where larger ones did not arrive whole: the less there is, the less can be hit.
                let bytes_max = if self.is_standalone() { 1 } else { self.frame_bytes_max };
                reading = Some(Reading::new(spool.clone(), self.cursor, bytes_max));
            }
            let due = self.verification_due(ship);
            tokio::select! {
                biased;
                command = ship.commands.recv() => self.command(ship, command)?,
                receipt = self.receipts.message() => self.take(ship, receipt).await?,
                changed = ship.tail.changed() => {
                    if changed.is_err() {
                        return Err(SessionEnd::Wait("the tail has ended".to_owned()));
                    }
                    self.check_tail(ship)?;
                }
                permit = outbound.reserve(), if pending.is_some() && stream_open => match permit {
                    Ok(permit) => if let Some(shipment) = pending.take() {
                        permit.send(shipment);
                        self.verifying.mark_sent();
                    },
                    // The reason comes with the receipts.
                    Err(_) => stream_open = false,
                },
                _ = ticks.tick() => {
                    self.show_verification(ship);
                    self.tick(ship, pending.is_none()).await?;
                }
                event = self.verifying.next(due), if pending.is_none() => pending = self.verify_event(ship, event)?,
                entries = read(&mut reading), if pending.is_none() && !self.verifying.is_reading() => {
                    reading = None;
                    match entries {
                        Ok(entries) => pending = self.encode(ship, &entries),
                        Err(e) => return Err(SessionEnd::HelloAgain(format!("the spool: {e}"))),
                    }
                }
            }
        }
    }

    /// What the origin holds at this revision is what was shipped, up to the present seq; nothing must wait to be sent.
    pub(super) fn standing(&self, ship: &Shipper) -> Revision {
        let extent = ship.spool.extent();
        let extent = extent.borrow();
        let drained = extent.last.is_none_or(|(last, _)| last <= self.cursor);
        if drained { extent.covered.max(self.cursor) } else { self.cursor }
    }

    pub(super) fn check_tail(&self, ship: &mut Shipper) -> Result<(), SessionEnd> {
        match &ship.tail.borrow_and_update().state {
            TailState::Lost { compacted } => {
                Err(SessionEnd::HelloAgain(format!("the origin has compacted up to {compacted}, past the spool's end")))
            }
            TailState::OtherHistory { reason } => Err(SessionEnd::Stop(reason.clone())),
            TailState::Stopped { reason } => Err(SessionEnd::Stop(reason.clone())),
            TailState::Idle | TailState::Connecting { .. } | TailState::Running | TailState::SpoolFull => Ok(()),
        }
    }

    fn is_standalone(&self) -> bool {
        self.resets_in_row >= RESETS_BEFORE_STANDALONE
    }

    /// One frame of what was read; `None` if all of it came from the replica's own cluster.
    fn encode(&mut self, ship: &Shipper, entries: &[SpoolEntry]) -> Option<Shipment> {
        let last = entries.last()?;
        self.cursor = last.revision.revision;
        let ours = |e: &&SpoolEntry| !e.came_from.contains(&self.replica_cluster);
        let carried: Vec<&SpoolEntry> = entries.iter().filter(ours).collect();
        let skipped = (entries.len() - carried.len()) as u64;
        let revisions: Vec<Arc<WholeRevision>> = carried.iter().map(|e| e.revision.clone()).collect();
        let digests: Vec<Digest> = carried.iter().map(|e| e.digest).collect();
        let frame = revisions.last().map(|last| {
            let first = self.seq.next();
            let frame = if self.is_standalone() {
                wire::frame::encode_standalone(self.epoch, self.term, first, &revisions, &digests)
            } else {
                self.encoder.encode(self.epoch, self.term, first, &revisions, &digests)
            };
            self.seq = Seq(self.seq.0 + revisions.len() as u64);
            self.in_flight.push_back((self.seq, last.revision));
            self.timed.get_or_insert((self.seq, Instant::now()));
            frame
        });
        let raw: u64 = revisions.iter().map(|r| r.bytes() as u64).sum();
        ship.view.send_modify(|view| {
            view.seq = self.seq;
            view.bytes_raw += raw;
            view.bytes_sent += frame.as_ref().map_or(0, |f: &Bytes| f.len() as u64);
            view.count("revisions", revisions.len() as u64);
            view.count("skipped", skipped);
        });
        frame.map(|frame| Shipment { what: Some(shipment::What::Frame(frame)) })
    }

    /// Takes one receipt; also the stream's end.
    pub(super) async fn take(
        &mut self,
        ship: &mut Shipper,
        receipt: Result<Option<Receipt>, tonic::Status>,
    ) -> Result<(), SessionEnd> {
        self.last_receipt = Instant::now();
        let receipt = match receipt {
            Ok(Some(receipt)) => {
                ship.heard();
                receipt
            }
            Ok(None) => return Err(SessionEnd::HelloAgain("the replica's sidecar closed the stream".to_owned())),
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
                self.copy_ack = ack;
                Ok(())
            }
            Some(receipt::What::PartsAnswer(answer)) => self.answered(Answer::Parts(answer)),
            Some(receipt::What::KeyListsAnswer(answer)) => self.answered(Answer::Lists(answer)),
            Some(receipt::What::MarkFailed(failed)) => self.answered(Answer::MarkFailed(failed)),
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
        self.receipts.message().await
    }

    async fn acknowledge(&mut self, ship: &mut Shipper, ack: Ack) -> Result<(), SessionEnd> {
        let durable = Seq(ack.durable_seq.max(ack.applied_seq));
        if durable > self.seq || Seq(ack.received_seq) > self.seq {
            return Err(SessionEnd::HelloAgain(format!(
                "the replica acknowledges seq {durable}, of which {} were sent",
                self.seq
            )));
        }
        let told = self.cursor.max(self.progressed).max(self.received.1).max(self.acked.applied_revision);
        // Before following, a base copy's anchor is acknowledged that was told in another way.
        if self.cursor > Revision(0) && Revision(ack.applied_origin_revision) > told {
            return Err(SessionEnd::HelloAgain(format!(
                "the replica acknowledges revision {}, and was told of {told}",
                ack.applied_origin_revision
            )));
        }
        if Seq(ack.received_seq) > self.received.0 {
            self.resets_in_row = 0;
        }
        if let Some((_, shipped)) = self.timed.take_if(|(seq, _)| *seq <= Seq(ack.received_seq)) {
            metrics::observe_round_trip(&ship.origin.send.link, shipped.elapsed().as_secs_f64());
        }
        let mut acked = self.acked;
        while let Some((seq, revision)) = self.in_flight.front().copied() {
            if seq <= Seq(ack.received_seq) {
                self.received = self.received.max((seq, revision));
            }
            if seq > durable {
                break;
            }
            acked.durable_revision = acked.durable_revision.max(revision);
            self.in_flight.pop_front();
        }
        for (seq, revision) in self.in_flight.iter().copied().take_while(|(seq, _)| *seq <= Seq(ack.received_seq)) {
            self.received = self.received.max((seq, revision));
        }
        acked.applied = acked.applied.max(Seq(ack.applied_seq));
        acked.applied_revision = acked.applied_revision.max(Revision(ack.applied_origin_revision));
        acked.durable = acked.durable.max(durable);
        acked.durable_revision = acked.durable_revision.max(acked.applied_revision);
        acked.waymark = ack.waymark.map(Waymark::from).unwrap_or_default();
        acked.following = ack.following && !self.copying;
        acked.repairing = ack.repairing && !self.copying;
        let moved = acked.applied_revision > self.acked.applied_revision
            || acked.durable_revision > self.acked.durable_revision;
        acked.position_revision = acked.position_revision.max(Revision(ack.position_revision));
        let trim = acked.position_revision > self.acked.position_revision;
        self.acked = acked;
        ship.view.send_modify(|view| {
            view.counts.insert("repeated", ack.repeated);
            view.counts.insert("transactions", ack.transactions);
            view.counts.insert("conflicts", ack.conflicts);
            view.reason.clone_from(&ack.waiting);
        });
        self.learn_verified(ship, Revision(ack.verified_revision), ack.verified_at_ms);
        self.show(ship, ack.waiting.is_empty());
        if trim {
            ship.spool.trim(acked.position_revision);
        }
        if moved {
            let event = LinkEvent::Acked { applied: acked.applied_revision, durable: acked.durable_revision };
            let _ = ship.events.send(event).await;
        }
        Ok(())
    }

    fn show(&self, ship: &Shipper, well: bool) {
        ship.view.send_modify(|view| {
            view.state = match (self.acked.following, self.acked.repairing) {
                (true, _) => LinkState::Following,
                (false, true) => LinkState::Repairing,
                (false, false) => LinkState::Copying,
            };
            if self.acked.following {
                view.copy_since = None;
            }
            view.epoch = self.epoch;
            view.term = self.term;
            view.seq = self.seq;
            view.applied_seq = self.acked.applied;
            view.durable_seq = self.acked.durable;
            view.applied_revision = self.acked.applied_revision;
            let held = view.state == LinkState::Repairing && view.verification.outcome == Outcome::Failed;
            if held {
                view.reason = format!("the repair waits: {}", view.verification.detail);
                view.detail.clone_from(&view.reason);
            } else if well {
                view.reason.clear();
                view.detail = format!("shipped up to seq {}", self.seq);
            } else {
                view.detail = format!("the replica waits: {}", view.reason);
            }
        });
    }

    fn reset(&mut self, ship: &Shipper, after: Seq, reason: &str) -> Result<(), SessionEnd> {
        let known = self.in_flight.iter().find(|(seq, _)| *seq == after).copied();
        let back = match known {
            Some(known) => known,
            None if after == self.received.0 => self.received,
            None => {
                return Err(SessionEnd::HelloAgain(format!(
                    "the replica asks to go back to seq {after}, which is no frame's end"
                )));
            }
        };
        self.resets_in_row += 1;
        if self.resets_in_row > RESETS_MAX {
            return Err(SessionEnd::Stop(format!(
                "the replica cannot decode what comes after seq {after}, also standalone: {reason}; are both sides' [limits] revision_bytes_max alike?"
            )));
        }
        tracing::warn!(link = %ship.origin.send.link, %reason, seq = %after, "the replica asks for a fresh window");
        ship.view.send_modify(|view| view.count("resets", 1));
        self.encoder.restart();
        self.timed = None;
        (self.seq, self.cursor) = back;
        self.sent = self.sent.min(self.cursor);
        self.in_flight.retain(|(seq, _)| *seq <= after);
        Ok(())
    }
}

/// A read of the spool under way.
struct Reading {
    after: Revision,
    entries: Pin<Box<dyn Future<Output = Result<Vec<SpoolEntry>, SpoolError>> + Send>>,
}

impl Reading {
    fn new(spool: Arc<Spool>, after: Revision, bytes_max: usize) -> Self {
        Self { after, entries: Box::pin(async move { spool.read_after(after, bytes_max).await }) }
    }
}

async fn read(reading: &mut Option<Reading>) -> Result<Vec<SpoolEntry>, SpoolError> {
    match reading {
        Some(reading) => reading.entries.as_mut().await,
        None => std::future::pending().await,
    }
}

fn end_of(ship: &mut Shipper, refusal: Refusal) -> SessionEnd {
    match refusal.kind() {
        Kind::Fenced => {
            ship.forget_epoch();
            SessionEnd::HelloAgain(refusal.reason)
        }
        Kind::PositionMoved | Kind::Gap | Kind::Closing | Kind::Unspecified => SessionEnd::HelloAgain(refusal.reason),
        Kind::Guard => {
            ship.resync = None;
            SessionEnd::Stop(refusal.reason)
        }
        Kind::Conflict | Kind::Outside | Kind::TooLarge => SessionEnd::Stop(refusal.reason),
    }
}
