//! Job: one Ship stream: encode what the spool holds, and send it.
//! Input: spool entries, ticks, what receipts.rs has heard. Output: shipments.
//! Always true: frames carry consecutive seqs; the stream has a deadline of its own.

use super::LinkEvent;
use super::candidacy::Unfit;
use super::heartbeat::{Movement, Writes, movement};
use super::hello::Greeted;
use super::receipts::Receipts;
use super::sequence::OriginWaymark;
use super::ship::Shipper;
use super::shipped::Shipped;
use super::spool::{Spool, SpoolEntry, SpoolError};
use super::tail::TailState;
use super::verify::Verifying;
use crate::admin::{LinkCommand, next_command};
use crate::etcd::Etcd;
use crate::failpoint;
use crate::model::{ClusterId, Digest, Epoch, Position, Revision, Seq, Term, WholeRevision};
use crate::traces;
use crate::wire::frame::FrameLimits;
use crate::wire::replicate::{CopyAck, HelloReply, Shipment, shipment};
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
use tonic::metadata::AsciiMetadataValue;

/// Frames between the encoder and the connection; the rest waits in the spool.
const OUTBOUND_MAX: usize = 4;
/// Frames that are not durable yet; each costs 16 bytes here, and the replica's own bounds hold the stream back long before.
const IN_FLIGHT_MAX: usize = 4096;
const TICK: Duration = Duration::from_secs(1);
/// Why a stream ended, as its planned reaction.
#[derive(Debug)]
pub enum SessionEnd {
    /// Something outside must change first: try again after a wait, with the reason shown.
    Wait(String),
    /// Nobody answers the dial: try again soon.
    Unreachable(String),
    /// Only an operator can decide how to go on.
    Stop(String),
    /// The same, unless the link's policy says to go on with the origin as it is.
    OtherHistory(String),
    HelloAgain(String),
    Commanded(Option<LinkCommand>),
    /// Another sidecar may go on where this one cannot.
    OthersTurn(Unfit),
    /// The watch that was to be opened starts at a compacted revision.
    Compacted(Revision),
}

impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEnd::Wait(reason)
            | SessionEnd::Unreachable(reason)
            | SessionEnd::Stop(reason)
            | SessionEnd::OtherHistory(reason)
            | SessionEnd::HelloAgain(reason) => f.write_str(reason),
            SessionEnd::OthersTurn(unfit) => f.write_str(unfit.reason()),
            SessionEnd::Commanded(_) => f.write_str("an operator asked for something else"),
            SessionEnd::Compacted(revision) => write!(f, "the origin has compacted up to {revision}"),
        }
    }
}

pub struct Session {
    pub(super) outbound: mpsc::Sender<Shipment>,
    pub(super) receipts: Receipts,
    pub(super) reply: HelloReply,
    pub(super) etcd: Etcd,
    pub(super) encoder: Encoder,
    pub(super) epoch: Epoch,
    pub(super) term: Term,
    pub(super) shipped: Shipped,
    /// A frame whose round trip is being measured, one at a time.
    pub(super) timed: Option<(Seq, Instant)>,
    /// The bytes of each frame that is not received yet, by its last seq; fewer than [`IN_FLIGHT_MAX`].
    pub(super) unreceived: VecDeque<(Seq, u64)>,
    replica_cluster: ClusterId,
    /// The lesser of both sides': each takes a revision, a page and a repair of so much.
    pub(super) frame_bytes_max: usize,
    pub(super) waymark: OriginWaymark,
    pub(super) waymark_revision: Revision,
    pub(super) silence_max: Duration,
    pub(super) waymark_at: Option<(Instant, Movement)>,
    pub(super) persisted_at: (Instant, Movement),
    pub(super) writes: Writes,
    /// Of the last canary that this stream wrote.
    pub(super) canary_revision: Option<Revision>,
    /// When the applied revision was published last by this stream, and the origin's movement then.
    pub(super) published_at: Option<(Instant, Movement)>,
    pub(super) last_receipt: Instant,
    pub(super) last_progress: Instant,
    /// What the last word of progress said of lag and RPO was not that there is none.
    pub(super) told_behind: bool,
    /// A progress that found no place, and goes next.
    pub(super) overdue: Option<Shipment>,
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
        let receipts = Receipts::open(channel, request);
        let position = Position::from_json(&reply.position).ok();
        let limits = &ship.origin.limits;
        let frame_bytes_max = wire::lesser(limits.frame_bytes_max, reply.frame_bytes_max);
        let window = WindowLimits {
            window_bytes_max: wire::lesser(limits.window_bytes_max, reply.window_bytes_max),
            frame: FrameLimits::new(limits.revision_bytes_max),
        };
        let now = Instant::now();
        let received = (Seq(reply.received_seq), Revision(reply.received_revision));
        let shipped = Shipped::open(position.as_ref(), received, Seq(reply.durable_seq));
        let epoch = position.as_ref().map_or(Epoch(0), |p| p.epoch);
        ship.learned_epoch(epoch);
        let greeting =
            LinkEvent::Greeted { applied: shipped.acked.applied_revision, durable: shipped.durable_at_open() };
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
            shipped,
            timed: None,
            unreceived: VecDeque::new(),
            frame_bytes_max,
            waymark,
            waymark_revision,
            silence_max: ship.silence_max(),
            waymark_at: None,
            persisted_at: (now, movement(ship)),
            writes: Writes::default(),
            canary_revision: None,
            published_at: None,
            last_receipt: now,
            last_progress: now,
            told_behind: false,
            overdue: None,
            copy_ack: CopyAck::default(),
            copying: false,
            verifying: Verifying::default(),
        })
    }

    /// A base copy is over: seqs start afresh.
    pub(super) async fn opened_epoch(&mut self, ship: &mut Shipper, epoch: Epoch, anchor: Revision) {
        self.copying = false;
        self.epoch = epoch;
        ship.follows_in(epoch);
        self.shipped.open_epoch(anchor);
        self.timed = None;
        self.unreceived.clear();
        if ship.other_history.opened() {
            ship.view.send_modify(|view| view.count("other_histories", 1));
        }
        self.persisted_at = (Instant::now(), movement(ship));
        ship.learned_epoch(epoch);
        let _ = ship.events.send(LinkEvent::Acked { applied: anchor, durable: anchor }).await;
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
        failpoint::reach("stream-opened");
        self.shipped.follow(after);
        if self.receipts.are_open() {
            self.show(ship, true);
        }
        // What was applied while no stream was open makes room too.
        ship.spool.trim(self.shipped.acked.position_revision);
        tracing::info!(link = %ship.origin.send.link, epoch = %self.epoch, seq = %self.shipped.seq, after = %after, "following");
        ship.hello_again.mark_unchanged();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut pending: Option<Shipment> = None;
        let mut stream_open = true;
        let (outbound, spool) = (self.outbound.clone(), ship.spool.clone());
        let mut reading: Option<Reading> = None;
        loop {
            if pending.is_none() {
                self.shipped.sent = self.shipped.cursor;
                pending = self.overdue.take();
            }
            // A read goes on while receipts are taken: begun anew at each of them, it might never end.
            reading = reading.filter(|reading| reading.after == self.shipped.cursor);
            if reading.is_none() && pending.is_none() && self.may_read() {
                // One revision a frame, where larger ones did not arrive whole: the less there is, the less can be hit.
                let bytes_max = if self.shipped.is_standalone() { 1 } else { self.frame_bytes_max };
                reading = Some(Reading::new(spool.clone(), self.shipped.cursor, bytes_max));
            }
            let due = self.verification_due(ship);
            tokio::select! {
                biased;
                command = next_command(&mut ship.commands) => self.command(ship, command)?,
                receipt = self.receipts.next() => self.take(ship, receipt).await?,
                changed = ship.tail.changed() => {
                    if changed.is_err() {
                        return Err(SessionEnd::Wait("the tail has ended".to_owned()));
                    }
                    self.check_tail(ship)?;
                }
                Ok(()) = ship.hello_again.changed() => {
                    return Err(SessionEnd::Wait("the stream stood still: another hello may help".to_owned()));
                }
                written = self.writes.next() => self.written(ship, written)?,
                permit = outbound.reserve(), if pending.is_some() && stream_open => match permit {
                    Ok(permit) => if let Some(shipment) = pending.take() {
                        permit.send(shipment);
                        failpoint::reach("shipment-sent");
                        self.verifying.mark_sent();
                    },
                    // The reason comes with the receipts.
                    Err(_) => stream_open = false,
                },
                _ = ticks.tick() => {
                    self.show_verification(ship);
                    self.tick(ship, pending.is_none())?;
                }
                event = self.verifying.next(due), if pending.is_none() => pending = self.verify_event(ship, event)?,
                entries = read(&mut reading), if pending.is_none() && !self.verifying.is_reading() => {
                    reading = None;
                    match entries {
                        Ok(entries) => {
                            failpoint::reach("spool-read");
                            pending = self.encode(ship, &entries);
                        }
                        Err(e) => return Err(unread(ship, &e)),
                    }
                }
            }
        }
    }

    /// Whether another frame may be on its way. Standalone, one at a time: what follows one that is not decoded would come out of order,
    /// and that it never will be would not be told.
    fn may_read(&self) -> bool {
        let alone = !self.shipped.is_standalone() || self.unreceived.is_empty();
        alone && self.shipped.frames_in_flight() < IN_FLIGHT_MAX
    }

    /// What the origin holds at this revision is what was shipped, up to the present seq; nothing must wait to be sent.
    pub(super) fn standing(&self, ship: &Shipper) -> Revision {
        let extent = ship.spool.extent();
        let extent = extent.borrow();
        self.shipped.standing(extent.last.map(|(last, _)| last), extent.covered)
    }

    pub(super) fn check_tail(&self, ship: &mut Shipper) -> Result<(), SessionEnd> {
        match &ship.tail.borrow_and_update().state {
            TailState::Lost { compacted } => {
                Err(SessionEnd::HelloAgain(format!("the origin has compacted up to {compacted}, past the spool's end")))
            }
            TailState::OtherHistory { reason } => Err(SessionEnd::OtherHistory(reason.clone())),
            TailState::Stopped { reason } => Err(SessionEnd::Stop(reason.clone())),
            TailState::Idle | TailState::Connecting { .. } | TailState::Running | TailState::SpoolFull => Ok(()),
        }
    }

    /// One frame of what was read; `None` if all of it came from the replica's own cluster.
    fn encode(&mut self, ship: &Shipper, entries: &[SpoolEntry]) -> Option<Shipment> {
        let traced = traces::tracer().map(|tracer| (tracer, traces::now_ns()));
        // What does not fit is read again, after the last one that does.
        let entries = FrameLimits::fit(entries);
        let last = entries.last()?;
        self.shipped.cursor = last.revision.revision;
        let ours = |e: &&SpoolEntry| !e.came_from.contains(&self.replica_cluster);
        let carried: Vec<&SpoolEntry> = entries.iter().filter(ours).collect();
        let skipped = (entries.len() - carried.len()) as u64;
        let revisions: Vec<Arc<WholeRevision>> = carried.iter().map(|e| e.revision.clone()).collect();
        let digests: Vec<Digest> = carried.iter().map(|e| e.digest).collect();
        let frame = revisions.last().map(|last| {
            let first = self.shipped.seq.next();
            let frame = if self.shipped.is_standalone() {
                wire::frame::encode_standalone(self.epoch, self.term, first, &revisions, &digests)
            } else {
                self.encoder.encode(self.epoch, self.term, first, &revisions, &digests)
            };
            self.shipped.frame(revisions.len() as u64, last.revision);
            self.timed.get_or_insert((self.shipped.seq, Instant::now()));
            self.unreceived.push_back((self.shipped.seq, frame.len() as u64));
            if let Some((tracer, read_ns)) = traced {
                let arrivals: Vec<_> = carried.iter().map(|e| (e.revision.revision, e.arrived_ms)).collect();
                tracer.framed(&ship.origin.send.link, self.epoch, first, &arrivals, read_ns);
            }
            failpoint::reach("frame-encoded");
            frame
        });
        let raw: u64 = revisions.iter().map(|r| r.bytes() as u64).sum();
        ship.view.send_modify(|view| {
            view.seq = self.shipped.seq;
            view.unreceived_bytes += frame.as_ref().map_or(0, |f: &Bytes| f.len() as u64);
            view.bytes_raw += raw;
            view.bytes_sent += frame.as_ref().map_or(0, |f: &Bytes| f.len() as u64);
            view.count("revisions", revisions.len() as u64);
            view.count("skipped", skipped);
        });
        frame.map(|frame| Shipment { what: Some(shipment::What::Frame(frame)) })
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

/// A spool that is damaged is none from the next hello on: what it held is watched again, or mended where etcd has compacted it.
fn unread(ship: &Shipper, error: &SpoolError) -> SessionEnd {
    if let Err(e) = ship.spool.usable() {
        return SessionEnd::Stop(format!("the spool: {e}"));
    }
    if error.is_damage() {
        tracing::error!(link = %ship.origin.send.link, %error, "the spool cannot be read any more; it is dropped, and what it held is fetched again");
    }
    SessionEnd::HelloAgain(format!("the spool: {error}"))
}
