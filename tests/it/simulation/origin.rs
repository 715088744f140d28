//! Job: an origin's sidecar, stepped: the product's encoder and account of a stream, the base copy's pages.
//! Input: its tail, the origin's etcd, receipts, an operator's resync. Output: shipments on a line; why the link stops.
//! Synchronous.
//! Always true: whatever decides is the product's; this file only carries values from one decision to the next, as the edges do.

mod hello;
mod remember;
mod standby;

use super::etcd::Etcd;
use super::line::{Line, Receipt, Shipment};
use super::pages::{Copy, Reader};
use super::region::Context;
use super::replica::HelloAnswer;
use super::tail::{REVISION_BYTES_MAX, Tail, TailState, seen_by};
use etcd_ferry::model::{Change, Digest, Epoch, LinkName, Ranges, Revision, Run, Seq, Term, WholeRevision};
use etcd_ferry::origin::candidacy::Published;
use etcd_ferry::origin::sequence::OriginWaymark;
use etcd_ferry::origin::shipped::{RESETS_MAX, Shipped};
use etcd_ferry::origin::spool::SpoolEntry;
use etcd_ferry::origin::tail::Seen;
use etcd_ferry::replica::pages::Begin;
use etcd_ferry::wire::frame::{FrameLimits, encode_standalone};
use etcd_ferry::wire::replicate::refusal::Kind;
use etcd_ferry::wire::replicate::{CopyAck, Progress};
use etcd_ferry::wire::window::{Encoder, WindowLimits};
use remember::write;
use std::collections::BTreeSet;

const PAGES_IN_FLIGHT_MAX: u64 = 3;
const FRAMES_IN_FLIGHT_MAX: usize = 64;
const LINE_MAX: usize = 6;
/// Small, so that values fall out of it.
const WINDOW: WindowLimits = WindowLimits {
    window_bytes_max: 4096,
    frame: FrameLimits { plain_bytes_max: REVISION_BYTES_MAX, revisions_max: 65_536 },
};

pub struct Origin {
    pub name: String,
    pub link: LinkName,
    pub term: Term,
    pub tail: Tail,
    pub session: Option<Session>,
    known_epoch: Epoch,
    /// An operator's wish for a new base copy; true: deletes are allowed.
    pub resync: Option<bool>,
    pub stopped: Option<String>,
    /// Where the replica was at the last hello, if that was of this cluster.
    followed: Option<(Epoch, Seq)>,
    /// Stands for a sidecar of a version without waymarks.
    pub writes_waymarks: bool,
    /// What another one had published when this one looked last.
    looked: Option<Published>,
    /// For a count alone: it outlives the process.
    framed: Framed,
}

pub struct Session {
    pub number: u64,
    pub replica: usize,
    pub line: Line,
    encoder: Encoder,
    epoch: Epoch,
    pub shipped: Shipped,
    waymark: OriginWaymark,
    waymark_revision: Revision,
    canary_revision: Option<Revision>,
    copy_ack: CopyAck,
    pub copying: Option<Copy>,
}

/// Why a stream ended.
pub enum End {
    Again(String),
    Stop(String),
    /// Written down at the origin before it is told.
    OtherHistory(String),
}

struct Greeted {
    answer: HelloAnswer,
    waymark: OriginWaymark,
    waymark_revision: Revision,
}

impl Origin {
    pub fn start(name: String, link: LinkName, term: Term, tail: Tail, writes_waymarks: bool) -> Self {
        Self {
            name,
            link,
            term,
            tail,
            session: None,
            known_epoch: Epoch(0),
            resync: None,
            stopped: None,
            followed: None,
            writes_waymarks,
            looked: None,
            framed: Framed::default(),
        }
    }

    /// As a new process, over what the disk holds.
    pub fn start_again(&mut self, ranges: Ranges) {
        self.tail.start_again(ranges);
        (self.session, self.known_epoch, self.resync, self.stopped) = (None, Epoch(0), None, None);
        self.looked = None;
    }

    /// An error now and then: the process has died here, between two things that last. `what`: as it is counted.
    fn survive(&mut self, permille: usize, what: &str, context: &mut Context) -> Result<(), End> {
        if !context.fails(permille, what) {
            return Ok(());
        }
        let kept_by_kernel = context.random.percent(40);
        self.tail.spool.crash(kept_by_kernel, &mut context.random);
        self.start_again(self.tail.ranges.clone());
        Err(End::Again("its process has died".to_owned()))
    }

    /// Ships in a new term; a wish was for an earlier one.
    pub fn elect(&mut self, term: Term) {
        (self.term, self.session, self.resync) = (term, None, None);
    }

    /// Another cluster answers. A connection believes one: the watch on it ends, and the copy that reads from it.
    pub fn lose_cluster(&mut self) {
        self.tail.break_watch();
        self.session.take_if(|session| session.copying.is_some());
    }

    /// Has the tail begin its spool anew.
    fn restart_tail(
        &mut self,
        after: Revision,
        carried: Option<(Revision, Digest)>,
        seen: Option<Seen>,
        etcd: &Etcd,
        context: &mut Context,
    ) -> Result<Result<(), TailState>, End> {
        self.tail.doubt();
        self.survive(30, "sender crashed before its spool was cleared", context)?;
        self.tail.clear(after);
        self.survive(30, "sender crashed before its cleared spool was known to be", context)?;
        Ok(self.tail.restart(after, carried, seen, etcd, context))
    }

    fn end(&mut self, end: End, etcd: &mut Etcd, context: &mut Context) {
        if let End::OtherHistory(reason) = &end {
            let notes = self.followed.is_some();
            self.remember(reason, etcd, context);
            if notes && self.survive(200, "sender crashed between note and stop", context).is_err() {
                return;
            }
        }
        match end {
            End::Again(reason) => context.note(|| format!("{} says hello again: {reason}", self.name)),
            End::Stop(reason) | End::OtherHistory(reason) => {
                context.note(|| format!("{} stops: {reason}", self.name));
                context.count("link stopped");
                self.stopped = Some(reason);
            }
        }
        self.session = None;
    }

    fn open(&mut self, greeted: Greeted, (number, at): (u64, usize)) -> &mut Session {
        let Greeted { answer, waymark, waymark_revision } = greeted;
        let epoch = super::judge::epoch_of(answer.position.as_ref());
        self.known_epoch = self.known_epoch.max(epoch);
        let received = (answer.received.0, answer.received.1);
        self.session.insert(Session {
            number,
            replica: at,
            line: Line::default(),
            encoder: Encoder::new(WINDOW, 1),
            epoch,
            shipped: Shipped::open(answer.position.as_ref(), received, answer.durable),
            waymark,
            waymark_revision,
            canary_revision: None,
            copy_ack: CopyAck::default(),
            copying: None,
        })
    }

    fn trim_as_known(&mut self, context: &mut Context) {
        let known = self.session.as_ref().map(|session| session.shipped.acked.position_revision);
        if let Some(through) = known {
            self.trim(through, context);
        }
    }

    fn trim(&mut self, through: Revision, context: &mut Context) {
        if let Err(fault) = context.judge.may_forget(through) {
            context.fail(fault);
        }
        self.tail.spool.trim(through.0);
    }

    fn copy(
        &mut self,
        epoch: Epoch,
        cursor: Option<bytes::Bytes>,
        greeted: Greeted,
        stream: (u64, usize),
        etcd: &mut Etcd,
        context: &mut Context,
    ) -> Result<(), End> {
        let resume = cursor.is_some();
        let anchor = match &greeted.answer.position {
            Some(position) if resume => position.origin_revision,
            Some(_) | None => {
                let head = etcd.head();
                let seen = seen_by(etcd, &self.link);
                let opened = self.restart_tail(head, None, Some(seen), etcd, context)?;
                opened.map_err(|state| End::Again(format!("the watch did not open: {state:?}")))?;
                self.tail.serves(Run { cluster: etcd.cluster, epoch }, head);
                self.survive(80, "sender crashed between spool and copy", context)?;
                head
            }
        };
        let ranges = self.tail.ranges.clone();
        let (ranges_empty, link, writes_waymarks) =
            (greeted.answer.ranges_empty, self.link.clone(), self.writes_waymarks);
        let (allow_deletes, term) = (self.resync == Some(true), self.term);
        self.known_epoch = self.known_epoch.max(epoch);
        let session = self.open(greeted, stream);
        if writes_waymarks && session.waymark.present.counter == 0 {
            session.write_waymark(&link, etcd, context)?;
        }
        let keys_total = etcd.count(ranges.pieces());
        let guard_pass = !resume && !ranges_empty && keys_total > 0;
        let begin = Begin {
            epoch,
            term,
            origin_cluster: etcd.cluster,
            anchor,
            waymark: session.waymark.present,
            allow_deletes,
            origin_empty: keys_total == 0,
            guard_pass,
            keys_total,
            resume,
            deletes_share_max: 0.5,
            link_back: false,
            repair: false,
        };
        session.line.ship(context, Shipment::Begin(Box::new(begin)));
        let guard = guard_pass.then(|| Reader::new(&ranges, None, anchor));
        session.copying =
            Some(Copy { epoch, anchor, guard, pages: Reader::new(&ranges, cursor, anchor), sent: 0, ended: false });
        self.known_epoch = self.known_epoch.max(epoch);
        Ok(())
    }

    /// Puts something on the line, if there is anything.
    pub fn ship(&mut self, etcd: &mut Etcd, context: &mut Context) {
        if let Err(end) = self.try_ship(etcd, context) {
            self.end(end, etcd, context);
        }
    }

    fn try_ship(&mut self, etcd: &mut Etcd, context: &mut Context) -> Result<(), End> {
        match &self.tail.state {
            TailState::Lost { compacted } => {
                return Err(End::Again(format!("the origin has compacted up to {compacted}")));
            }
            TailState::OtherHistory { reason } => return Err(End::OtherHistory(reason.clone())),
            TailState::Stopped { reason } => return Err(End::Stop(reason.clone())),
            TailState::Idle | TailState::Watching | TailState::SpoolFull => {}
        }
        let Some(session) = &mut self.session else { return Ok(()) };
        if session.line.shipments.len() >= LINE_MAX {
            return Ok(());
        }
        if session.copying.is_some() {
            return self.ship_copy(etcd, context);
        }
        if context.random.percent(25) {
            return self.tick(etcd, context);
        }
        if session.shipped.frames_in_flight() < FRAMES_IN_FLIGHT_MAX {
            self.ship_frame(context)?;
        }
        Ok(())
    }

    fn ship_frame(&mut self, context: &mut Context) -> Result<(), End> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let bytes_max = if session.shipped.is_standalone() { 1 } else { context.random.between(1, 4096) };
        let entries = self.tail.spool.read_after(session.shipped.cursor.0, bytes_max);
        let entries: Vec<SpoolEntry> = entries.ok_or_else(|| End::Again("the spool does not hold it".to_owned()))?;
        let Some(last) = entries.last() else { return Ok(()) };
        session.shipped.cursor = last.revision.revision;
        let revisions: Vec<&WholeRevision> = entries.iter().map(|entry| entry.revision.as_ref()).collect();
        let digests: Vec<Digest> = entries.iter().map(|entry| entry.digest).collect();
        let (epoch, first) = (session.epoch, session.shipped.seq.next());
        let frame = if session.shipped.is_standalone() {
            context.count("standalone frame");
            encode_standalone(epoch, self.term, first, &revisions, &digests)
        } else {
            session.encoder.encode(epoch, self.term, first, &revisions, &digests)
        };
        session.shipped.frame(revisions.len() as u64, last.revision.revision);
        session.shipped.sent = session.shipped.cursor;
        context.note(|| {
            let (from, to) = (revisions[0].revision, last.revision.revision);
            format!("{} ships seq {first} and {} more, revisions {from} to {to}", self.name, revisions.len() - 1)
        });
        session.line.ship(context, Shipment::Frame(frame));
        if self.framed.add(epoch, first, session.shipped.seq) {
            context.count("framed anew");
        }
        Ok(())
    }

    /// Progress, and the waymark.
    fn tick(&mut self, etcd: &mut Etcd, context: &mut Context) -> Result<(), End> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let acked = session.shipped.acked;
        let due = context.random.percent(if context.faults { 20 } else { 2 }) && self.writes_waymarks;
        if due && acked.following && acked.waymark == session.waymark.present {
            session.write_waymark(&self.link, etcd, context)?;
        }
        let sings = context.random.percent(if context.faults { 15 } else { 2 }) && self.writes_waymarks;
        if sings && acked.following {
            session.write_canary(&self.link, etcd, context)?;
        }
        if acked.following && context.random.percent(20) {
            let published = Published { term: self.term, epoch: session.epoch, revision: acked.position_revision };
            standby::publish(&self.link, published, etcd, context)?;
        }
        let spooled = self.tail.spool.last.map(|(last, _)| last);
        let (through, shipped_all) = session.shipped.through(true, spooled, Revision(self.tail.spool.covered));
        let persist = shipped_all && acked.following && context.random.percent(30);
        let progress = Progress {
            origin_revision: through.0,
            waymark: Some(session.waymark.present.into()),
            persist,
            after_seq: session.shipped.seq.0,
            ..Progress::default()
        };
        session.shipped.progressed = through;
        session.line.ship(context, Shipment::Progress(progress));
        Ok(())
    }

    fn ship_copy(&mut self, etcd: &mut Etcd, context: &mut Context) -> Result<(), End> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let (acked, Some(copy)) = (&session.copy_ack, &mut session.copying) else { return Ok(()) };
        if copy.sent >= acked.pages + PAGES_IN_FLIGHT_MAX {
            return Ok(());
        }
        if let Some(guard) = &mut copy.guard
            && let Some(page) = guard.next(etcd, &mut context.random)
        {
            copy.sent += 1;
            let keys = page.kvs.into_iter().map(|(key, _)| key).collect();
            session.line.ship(context, Shipment::Keys { range: page.range, keys, last: page.last });
            return Ok(());
        }
        if !acked.guard_passed {
            return Ok(());
        }
        self.resync = None;
        self.followed = Some((copy.epoch, Seq(0)));
        if copy.sent == 0 || copy.guard.is_some() {
            let published = Published { term: self.term, epoch: copy.epoch, revision: copy.anchor };
            standby::publish(&self.link, published, etcd, context)?;
        }
        if copy.guard.take().is_some() {
            copy.sent = acked.pages;
        }
        if let Some(page) = copy.pages.next(etcd, &mut context.random) {
            copy.sent += 1;
            let shipment = Shipment::Page { range: page.range, revision: page.revision, kvs: page.kvs };
            session.line.ship(context, shipment);
        } else if !copy.ended {
            copy.ended = true;
            let anchor = copy.pages.highest;
            session.line.ship(context, Shipment::End { anchor });
        } else if acked.complete {
            let (epoch, anchor) = (copy.epoch, copy.anchor);
            session.copying = None;
            session.epoch = epoch;
            session.shipped.open_epoch(anchor);
            session.shipped.follow(anchor);
            self.trim_as_known(context);
        }
        Ok(())
    }

    /// Takes the next receipt.
    pub fn take_receipt(&mut self, etcd: &mut Etcd, context: &mut Context) {
        let Some(receipt) = self.session.as_mut().and_then(|session| session.line.receipts.pop_front()) else { return };
        if let Err(end) = self.take(receipt, context) {
            self.end(end, etcd, context);
        }
    }

    fn take(&mut self, receipt: Receipt, context: &mut Context) -> Result<(), End> {
        let Some(session) = &mut self.session else { return Ok(()) };
        match receipt {
            Receipt::Ack(ack) => {
                let copying = session.copying.is_some();
                let moved = session.shipped.acknowledge(&ack, copying);
                let moved = moved.map_err(|untrue| End::Again(untrue.to_string()))?;
                if let Some(through) = moved.trim {
                    self.trim(through, context);
                }
                Ok(())
            }
            Receipt::Reset(after) => {
                let in_row = session.shipped.reset(Seq(after)).map_err(|untrue| End::Again(untrue.to_string()))?;
                if in_row > RESETS_MAX {
                    return Err(End::Stop("the replica cannot decode what comes".to_owned()));
                }
                session.encoder.restart();
                Ok(())
            }
            Receipt::CopyAck(ack) => {
                session.copy_ack = *ack;
                Ok(())
            }
            Receipt::Refusal(kind, reason) => {
                if kind == Kind::Fenced {
                    self.known_epoch = Epoch(0);
                }
                if kind == Kind::Guard {
                    self.resync = None;
                }
                context.count(&format!("end {}", kind.as_str_name()));
                Err(match kind {
                    Kind::Guard | Kind::Conflict | Kind::Outside | Kind::TooLarge => End::Stop(reason),
                    Kind::Fenced | Kind::PositionMoved | Kind::Gap | Kind::Closing | Kind::Unspecified => {
                        End::Again(reason)
                    }
                })
            }
        }
    }
}

/// The frames of one epoch that were shipped, each by its first and last seq.
#[derive(Default)]
struct Framed {
    epoch: Epoch,
    frames: BTreeSet<(Seq, Seq)>,
}

impl Framed {
    /// True if some of its revisions came before, in another frame.
    fn add(&mut self, epoch: Epoch, first: Seq, last: Seq) -> bool {
        if self.epoch != epoch {
            *self = Self { epoch, frames: BTreeSet::new() };
        }
        let again = self.frames.iter().any(|(from, to)| *from <= last && first <= *to);
        self.frames.insert((first, last)) && again
    }
}

impl Session {
    fn follow(&mut self, after: Revision) {
        self.shipped.follow(after);
    }

    /// As the product does: only on the history that the last waymark and the last canary are of.
    fn write_canary(&mut self, link: &LinkName, etcd: &mut Etcd, context: &mut Context) -> Result<(), End> {
        let modified = |etcd: &Etcd, key: &bytes::Bytes| etcd.get(key).map_or(Revision(0), |(_, modified)| modified);
        let key = link.canary_key();
        let last = modified(etcd, &key);
        if modified(etcd, &link.waymark_key()) != self.waymark_revision
            || self.canary_revision.is_some_and(|canary| canary != last)
        {
            return Err(End::Again("the origin is not what it was".to_owned()));
        }
        self.canary_revision = write(etcd, Change::Put { key, value: "{}".into() }, context);
        context.count("canary written");
        Ok(())
    }

    fn write_waymark(&mut self, link: &LinkName, etcd: &mut Etcd, context: &mut Context) -> Result<(), End> {
        let key = link.waymark_key();
        let present = etcd.get(&key).map_or(Revision(0), |(_, modified)| modified);
        if present != self.waymark_revision {
            return Err(End::Again("another sidecar wrote this link's waymark".to_owned()));
        }
        self.waymark = self.waymark.next(context.random.next());
        let change = Change::Put { key, value: self.waymark.to_json().into() };
        self.waymark_revision = write(etcd, change, context).unwrap_or_default();
        context.count("waymark written");
        Ok(())
    }
}
