//! Job: one Ship stream: decode and admit what comes, place it in the journal or before the applier, and send receipts.
//! Input: shipments of a peer whose name was checked. Output: journal entries, copy steps, progress; receipts.
//! Edge: the stream's task; what has to wait for its place is a future beside the receipts, never in their way.
//! Always true: received never runs ahead of what was admitted; a frame that cannot be decoded changes nothing; a refusal ends the stream.

use super::admit::{Admit, Refused, outside};
use super::apply::{ApplyCommand, ApplyView};
use super::copy::CopyStep;
use super::journal::{JournalEntry, JournalError};
use super::mark::{Mark, Mend, There};
use super::pages::Begin;
use super::receive::{LinkEnd, Opened};
use super::verify::{Asked, Comparer, QUESTIONS_MAX, Question};
use crate::model::{Change, Epoch, KeyRange, Phase, Ranges, Revision, Seq, Term, Waymark};
use crate::segment::feed::Appended;
use crate::wire::frame::{self, FrameLimits};
use crate::wire::replicate as wire;
use crate::wire::replicate::refusal::Kind;
use crate::wire::replicate::{
    Ack, CopyAck, CopyBegin, Page, Progress, Receipt, Refusal, Reset, Shipment, Verified, receipt, shipment,
};
use crate::wire::window::{DecodeError, Decoder};
use bytes::Bytes;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
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

/// What must be told to the origin, as soon as the way is free.
#[derive(Default)]
struct Due {
    ack: bool,
    copy: bool,
    reset: Option<Reset>,
    /// To a question about a mark.
    answer: Option<receipt::What>,
    refusal: Option<Refusal>,
}

impl Due {
    /// What the origin waits for.
    fn urgent(&self) -> bool {
        self.copy || self.reset.is_some() || self.answer.is_some() || self.refusal.is_some()
    }
}

/// One Ship stream.
pub(super) struct Stream {
    end: Arc<LinkEnd>,
    opened: Opened,
    decoder: Decoder,
    pages: FrameLimits,
    view: watch::Receiver<ApplyView>,
    durable: watch::Receiver<Seq>,
    latest_session: watch::Receiver<u64>,
    due: Due,
    /// What the origin was last told of a base copy.
    copy_told: CopyAck,
    /// Questions about marks, to whoever reads the replica for them.
    questions: mpsc::Sender<Question>,
    /// What the origin was last told of the last comparison: said once, since every byte of an ack is said often.
    verified_told: Verified,
}

/// What has been taken off the stream and waits for its place.
type Placing = Pin<Box<dyn Future<Output = Result<(), (Kind, String)>> + Send>>;

impl Stream {
    fn new(end: Arc<LinkEnd>, opened: Opened, questions: mpsc::Sender<Question>) -> Self {
        Self {
            decoder: Decoder::new(opened.window),
            pages: FrameLimits::new(end.limits.revision_bytes_max),
            view: end.view.clone(),
            durable: end.journal.durable(),
            latest_session: end.latest_session.subscribe(),
            due: Due::default(),
            copy_told: CopyAck::default(),
            questions,
            verified_told: Verified::default(),
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
        Self::new(end, opened, questions).receive(admit, inbound, answered, out, stop).await;
    }

    async fn receive(
        mut self,
        admit: &mut Admit,
        mut inbound: Streaming<Shipment>,
        mut answers: mpsc::Receiver<receipt::What>,
        out: mpsc::Sender<Result<Receipt, Status>>,
        stop: CancellationToken,
    ) {
        self.end.told.send_modify(|told| {
            told.connected = true;
            told.at = Some(Instant::now());
        });
        self.due.ack = true;
        self.view.mark_changed();
        let ended = self.turns(admit, &mut inbound, &mut answers, &out, &stop).await;
        tracing::info!(link = %self.end.config.link, reason = %ended, "the stream has ended");
        self.end.told.send_modify(|told| {
            told.connected = false;
            told.ended = ended;
        });
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
        let now = Instant::now();
        let mut told_at = now.checked_sub(ACK_INTERVAL).unwrap_or(now);
        loop {
            if *self.latest_session.borrow() != self.opened.number {
                self.refuse(Kind::Closing, "a later hello took the link".to_owned());
            }
            let refused = self.due.refusal.is_some();
            let quiet = told_at.elapsed() < ACK_INTERVAL;
            let next_word = told_at + if self.due.ack && quiet { ACK_INTERVAL } else { RECEIPT_INTERVAL };
            tokio::select! {
                biased;
                () = stop.cancelled(), if !refused => self.refuse(Kind::Closing, "the replica's sidecar is shutting down".to_owned()),
                permit = out.reserve(), if self.due.urgent() || (self.due.ack && !quiet) => match permit {
                    Ok(permit) => {
                        let receipt = self.next_receipt(admit);
                        if matches!(receipt.what, Some(receipt::What::Ack(_))) {
                            told_at = Instant::now();
                        }
                        if let Some(receipt::What::Refusal(refusal)) = &receipt.what {
                            let reason = refusal.reason.clone();
                            permit.send(Ok(receipt));
                            return reason;
                        }
                        permit.send(Ok(receipt));
                    }
                    Err(_) => return "the origin closed the stream".to_owned(),
                },
                _ = self.latest_session.changed() => {}
                () = tokio::time::sleep_until(next_word) => self.due.ack = true,
                changed = self.view.changed() => {
                    if changed.is_err() {
                        return "the link has ended".to_owned();
                    }
                    self.look_at_applier(admit);
                }
                _ = self.durable.changed() => self.due.ack = true,
                Some(answer) = answers.recv(), if self.due.answer.is_none() => self.due.answer = Some(answer),
                placed = place(&mut placing) => {
                    placing = None;
                    if let Err((kind, reason)) = placed {
                        self.refuse(kind, reason);
                    }
                    self.due.ack = true;
                }
                message = inbound.message(), if placing.is_none() && !refused => match message {
                    Ok(Some(shipment)) => match self.take(admit, shipment) {
                        Ok(next) => placing = next,
                        Err((kind, reason)) => self.refuse(kind, reason),
                    },
                    Ok(None) => return "the origin closed the stream".to_owned(),
                    Err(status) => {
                        if status.code() == Code::DataLoss {
                            self.end.counters.damaged.fetch_add(1, Ordering::Relaxed);
                        }
                        return format!("the stream broke: {}", crate::tls::explain(&status));
                    }
                },
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
            receipt::What::CopyAck(self.copy_told.clone())
        } else if self.due.ack {
            self.due.ack = false;
            let ack = self.ack(admit);
            self.verified_told = self.end.told.borrow().verified;
            receipt::What::Ack(ack)
        } else if let Some(answer) = self.due.answer.take() {
            answer
        } else {
            receipt::What::Refusal(self.due.refusal.clone().unwrap_or_default())
        };
        Receipt { what: Some(what) }
    }

    fn ack(&self, admit: &Admit) -> Ack {
        let view = self.view.borrow();
        let verified = self.end.told.borrow().verified;
        let verified = if verified == self.verified_told { Verified::default() } else { verified };
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
        }
    }

    /// Takes one shipment. What it leads to may have to wait for its place: the caller goes on with receipts meanwhile.
    fn take(&mut self, admit: &mut Admit, shipment: Shipment) -> Result<Option<Placing>, (Kind, String)> {
        match shipment.what {
            Some(shipment::What::Frame(frame)) => self.take_frame(admit, &frame),
            Some(shipment::What::Progress(progress)) => Ok(self.take_progress(&progress)),
            Some(shipment::What::CopyBegin(begin)) => Ok(Some(self.copy_step(CopyStep::Begin(self.begin_of(begin))))),
            Some(shipment::What::KeysPage(page)) => {
                let (range, last) = (KeyRange { from: page.from.clone(), to: page.to.clone() }, page.last);
                let keys = self.kvs_of(page)?.into_iter().map(|(key, _)| key).collect();
                Ok(Some(self.copy_step(CopyStep::Keys { range, keys, last })))
            }
            Some(shipment::What::Page(page)) => {
                let range = KeyRange { from: page.from.clone(), to: page.to.clone() };
                let revision = Revision(page.revision);
                let kvs = self.kvs_of(page)?;
                Ok(Some(self.copy_step(CopyStep::Page { range, revision, kvs })))
            }
            Some(shipment::What::CopyEnd(end)) => {
                Ok(Some(self.copy_step(CopyStep::End { anchor_revision: Revision(end.anchor_revision) })))
            }
            Some(shipment::What::Mark(mark)) => self.take_mark(admit, &mark).map(Some),
            Some(shipment::What::Repair(repair)) => self.take_repair(admit, repair).map(Some),
            Some(shipment::What::Parts(parts)) => self.ask(parts.mark, Asked::parts(parts.parts)),
            Some(shipment::What::KeyLists(lists)) => self.ask(lists.mark, Asked::lists(lists.lists)),
            Some(shipment::What::Verified(verified)) => {
                self.end.told.send_modify(|told| told.compared(verified));
                self.due.ack = true;
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// A mark's place is before everything that comes later: nothing is taken off the stream until the applier has it.
    fn take_mark(&self, admit: &Admit, mark: &wire::Mark) -> Result<Placing, (Kind, String)> {
        let (reached, waiting) = oneshot::channel();
        self.pass_on(Question { mark: mark.mark, asked: Asked::Mark(waiting) })?;
        Ok(self.place_mark(admit, Mark { after: Seq(mark.after_seq), there: There::Note(reached) }))
    }

    /// A repair has its place as a mark has.
    fn take_repair(&self, admit: &Admit, repair: wire::Repair) -> Result<Placing, (Kind, String)> {
        self.end.counters.bytes_sent.fetch_add(repair.frame.len() as u64, Ordering::Relaxed);
        let decoded = frame::decode_standalone(&repair.frame, &self.pages)
            .map_err(|e| (Kind::Gap, format!("a repair cannot be decoded: {e}")))?;
        if decoded.revisions.iter().any(|whole| outside(&self.opened.ranges, whole)) {
            return Err((Kind::Outside, "a repair holds a key outside of the link's ranges".to_owned()));
        }
        let Some(whole) = decoded.revisions.into_iter().next() else {
            return Err((Kind::Gap, "a repair holds nothing".to_owned()));
        };
        let (mended, waiting) = oneshot::channel();
        self.pass_on(Question { mark: repair.repair, asked: Asked::Repair(waiting) })?;
        let mend = Mend { revision: whole.revision, changes: whole.changes, last: repair.last };
        let mark = Mark { after: Seq(repair.after_seq), there: There::Mend(mend, mended) };
        if self.opened.link_back {
            mark.there.fail("a link back exists: nothing is mended".to_owned());
            return Ok(Box::pin(std::future::ready(Ok(()))));
        }
        Ok(self.place_mark(admit, mark))
    }

    fn place_mark(&self, admit: &Admit, mark: Mark) -> Placing {
        let after = mark.after;
        if after != admit.received() {
            mark.there.fail(format!("what comes before the mark after seq {after} is not here"));
            return Box::pin(std::future::ready(Ok(())));
        }
        let (taken, placed) = oneshot::channel();
        let session = self.opened.number;
        let sent = self.command(ApplyCommand::Mark { session, mark, taken });
        Box::pin(async move {
            sent.await?;
            // An applier that has ended says so by itself.
            let _ = placed.await;
            Ok(())
        })
    }

    /// A question about the state at a mark, if it asks for no more than the link's ranges.
    fn ask(&self, mark: u64, asked: Option<Asked>) -> Result<Option<Placing>, (Kind, String)> {
        let Some(asked) = asked else {
            return Err((Kind::Gap, "a question about a mark is not as it must be".to_owned()));
        };
        let inside = |range: &KeyRange| {
            Ranges::from_pieces(vec![range.clone()]).is_some_and(|piece| self.opened.ranges.covers(&piece))
        };
        if !asked.ranges().all(inside) {
            return Err((Kind::Outside, "a comparison asks for keys outside of the link's ranges".to_owned()));
        }
        self.pass_on(Question { mark, asked })?;
        Ok(None)
    }

    fn pass_on(&self, question: Question) -> Result<(), (Kind, String)> {
        let full = |_| (Kind::Gap, format!("more than {QUESTIONS_MAX} questions about a mark are open"));
        self.questions.try_send(question).map_err(full)
    }

    fn take_frame(&mut self, admit: &mut Admit, frame: &Bytes) -> Result<Option<Placing>, (Kind, String)> {
        let counters = &self.end.counters;
        counters.frames.fetch_add(1, Ordering::Relaxed);
        counters.bytes_sent.fetch_add(frame.len() as u64, Ordering::Relaxed);
        let decoded = match self.decoder.decode(frame) {
            Ok(decoded) => decoded,
            // Frames that were on their way before the origin heard of the reset.
            Err(DecodeError::NotFresh) => return Ok(None),
            Err(e) => {
                counters.resets.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(link = %self.end.config.link, error = %e, "a frame cannot be decoded; asking for a fresh window");
                self.due.reset = Some(Reset { after_seq: admit.received().0, reason: e.to_string() });
                return Ok(None);
            }
        };
        counters.bytes_raw.fetch_add(decoded.plain_bytes as u64, Ordering::Relaxed);
        if let Some(whole) = decoded.revisions.iter().find(|whole| outside(&self.opened.ranges, whole)) {
            return Err((
                Kind::Outside,
                format!("revision {} changes a key outside of the link's ranges", whole.revision),
            ));
        }
        let repeated =
            admit.admit_frame(decoded.epoch, decoded.term, decoded.seq_first, &decoded.digests).map_err(|refused| {
                let kind = match refused {
                    Refused::Gap { .. } => Kind::Gap,
                    Refused::Fenced { .. } => Kind::Fenced,
                    Refused::Conflict { .. } => Kind::Conflict,
                };
                (kind, refused.to_string())
            })?;
        counters.repeated.fetch_add(repeated as u64, Ordering::Relaxed);
        let seqs = (decoded.seq_first.0..).map(Seq);
        let received = seqs.zip(decoded.revisions.into_iter().zip(decoded.digests)).skip(repeated);
        let entries: Vec<JournalEntry> = received
            .map(|(seq, (whole, digest))| JournalEntry { epoch: decoded.epoch, seq, revision: Arc::new(whole), digest })
            .collect();
        if entries.is_empty() {
            self.due.ack = true;
            return Ok(None);
        }
        Ok(Some(Box::pin(journal_all(self.end.clone(), entries))))
    }

    fn take_progress(&mut self, progress: &Progress) -> Option<Placing> {
        self.end.told.send_modify(|told| {
            told.head = Revision(progress.head_revision);
            told.lag = Duration::from_millis(progress.lag_ms);
            told.rpo = Duration::from_millis(progress.rpo_ms);
            told.lag_revisions = progress.lag_revisions;
            told.rpo_revisions = progress.rpo_revisions;
            told.at = Some(Instant::now());
        });
        self.due.ack = true;
        if progress.origin_revision == 0 {
            return None;
        }
        let command = ApplyCommand::Progress {
            session: self.opened.number,
            through: Revision(progress.origin_revision),
            // By the origin's own count: a frame that could not be decoded, or is still missing, is in it.
            after: Seq(progress.after_seq),
            waymark: progress.waymark.map(Waymark::from).unwrap_or_default(),
            persist: progress.persist,
        };
        Some(self.command(command))
    }

    fn copy_step(&self, step: CopyStep) -> Placing {
        self.command(ApplyCommand::Copy { session: self.opened.number, step })
    }

    fn command(&self, command: ApplyCommand) -> Placing {
        let commands = self.end.commands.clone();
        Box::pin(async move {
            commands
                .send(command)
                .await
                .map_err(|_| (Kind::Closing, "the replica's sidecar is shutting down".to_owned()))
        })
    }

    fn begin_of(&self, begin: CopyBegin) -> Begin {
        Begin {
            epoch: Epoch(begin.epoch),
            term: Term(begin.term),
            origin_cluster: self.opened.origin_cluster,
            anchor: Revision(begin.anchor_revision),
            waymark: begin.waymark.map(Waymark::from).unwrap_or_default(),
            allow_deletes: begin.allow_deletes,
            origin_empty: begin.origin_empty,
            guard_pass: begin.guard_pass,
            keys_total: begin.keys_total,
            resume: begin.resume,
            deletes_share_max: begin.deletes_share_max,
            link_back: self.opened.link_back,
            repair: begin.repair,
        }
    }

    /// A page's keys and values, checked against the ranges.
    fn kvs_of(&self, page: Page) -> Result<Vec<(Bytes, Bytes)>, (Kind, String)> {
        let counters = &self.end.counters;
        counters.bytes_sent.fetch_add(page.frame.len() as u64, Ordering::Relaxed);
        // What the replica has in a page's range and the page has not is deleted: the range itself must be allowed.
        let piece = KeyRange { from: page.from.clone(), to: page.to.clone() };
        if !Ranges::from_pieces(vec![piece]).is_some_and(|piece| self.opened.ranges.covers(&piece)) {
            return Err((Kind::Outside, "a page of the base copy reaches outside of the link's ranges".to_owned()));
        }
        // A page that cannot be decoded is asked for again by a new hello: the copy goes on at its cursor.
        let decoded = frame::decode_standalone(&page.frame, &self.pages)
            .map_err(|e| (Kind::Gap, format!("a page of the base copy cannot be decoded: {e}")))?;
        counters.bytes_raw.fetch_add(decoded.plain_bytes as u64, Ordering::Relaxed);
        let range = KeyRange { from: page.from, to: page.to };
        if decoded.revisions.iter().any(|whole| outside(&self.opened.ranges, whole)) {
            return Err((Kind::Outside, "a page of the base copy holds a key outside of the link's ranges".to_owned()));
        }
        let changes = decoded.revisions.into_iter().flat_map(|whole| whole.changes);
        let kv = |change| match change {
            Change::Put { key, value } if range.contains(&key) => Ok((key, value)),
            Change::Put { .. } | Change::Delete { .. } => {
                Err((Kind::Gap, "a page of the base copy is not what it says".to_owned()))
            }
        };
        changes.map(kv).collect()
    }
}

async fn place(placing: &mut Option<Placing>) -> Result<(), (Kind, String)> {
    match placing {
        Some(placing) => placing.as_mut().await,
        None => std::future::pending().await,
    }
}

/// Puts admitted revisions into the journal, waiting for room; and into the dedupe log beside it.
async fn journal_all(end: Arc<LinkEnd>, entries: Vec<JournalEntry>) -> Result<(), (Kind, String)> {
    let failed = |e: JournalError| (Kind::Closing, format!("the replica's journal: {e}"));
    let Some(epoch) = entries.first().map(|e| e.epoch) else { return Ok(()) };
    let notes = entries.iter().map(|e| (e.seq, e.digest, e.revision.revision)).collect();
    let mut waiting = entries;
    loop {
        match end.journal.append(waiting).await.map_err(failed)? {
            Appended::Taken => break,
            Appended::Full(back) => {
                waiting = back;
                end.journal.room().await.map_err(failed)?;
            }
        }
    }
    // A dedupe log that cannot be written costs the sight of conflicts with old seqs, never a revision.
    let _ = end.dedupe.note(epoch, notes);
    Ok(())
}
