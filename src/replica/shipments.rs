//! Job: what each shipment is taken for: decode and admit it, and say where its place is.
//! Input: shipments, in the order of the stream. Output: what waits for its place in the journal or before the applier; a refusal.
//! Edge: part of the stream, which owns all of it.
//! Always true: what lies outside of the link's ranges is refused before anything of it is placed; a frame that cannot be decoded changes
//! nothing.

use super::admit::{Admit, Refused, outside};
use super::copy::CopyStep;
use super::journal::{JournalEntry, JournalError};
use super::mark::{Mark, Mend, There};
use super::pages::Begin;
use super::receive::LinkEnd;
use super::stream::{Placing, Stream};
use super::verify::{Asked, QUESTIONS_MAX, Question};
use super::view::ApplyCommand;
use crate::failpoint;
use crate::model::{Change, Epoch, KeyRange, Ranges, Revision, Seq, Term, Waymark};
use crate::segment::feed::Appended;
use crate::traces;
use crate::wire::cut_text;
use crate::wire::frame;
use crate::wire::replicate as wire;
use crate::wire::replicate::refusal::Kind;
use crate::wire::replicate::{CopyBegin, Page, Progress, Reset, Shipment, shipment};
use crate::wire::window::DecodeError;
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

impl Stream {
    /// Takes one shipment. What it leads to may have to wait for its place: the caller goes on with receipts meanwhile.
    pub(super) fn take(&mut self, admit: &mut Admit, shipment: Shipment) -> Result<Option<Placing>, (Kind, String)> {
        self.end.counters.shipments.fetch_add(1, Ordering::Relaxed);
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
        let mend = Mend { revision: whole.revision, changes: whole.changes, last: repair.last, wanted: repair.wanted };
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
        failpoint::reach("frame-received");
        let traced = traces::tracer().map(|tracer| (tracer, traces::now_ns()));
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
        if let Some((tracer, came_ns)) = traced {
            let revisions = entries.iter().map(|e| (e.epoch, e.seq, e.revision.revision));
            tracer.received(&self.end.config.link, revisions, came_ns);
        }
        failpoint::reach("frame-admitted");
        Ok(Some(Box::pin(journal_all(self.end.clone(), entries))))
    }

    fn take_progress(&mut self, progress: &Progress) -> Option<Placing> {
        self.end.told.send_modify(|told| {
            told.head = Revision(progress.head_revision);
            told.lag = Duration::from_millis(progress.lag_ms);
            told.rpo = Duration::from_millis(progress.rpo_ms);
            told.lag_revisions = progress.lag_revisions;
            told.rpo_revisions = progress.rpo_revisions;
            told.limits = progress.limits.map(Into::into).unwrap_or_default();
            told.at = Some(Instant::now());
            told.trouble = cut_text(progress.trouble.clone());
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

/// Puts admitted revisions into the journal, waiting for room; and into the dedupe log beside it.
async fn journal_all(end: Arc<LinkEnd>, entries: Vec<JournalEntry>) -> Result<(), (Kind, String)> {
    let failed = |e: JournalError| (Kind::Closing, format!("the replica's journal: {e}"));
    let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return Ok(()) };
    let (epoch, seqs) = (first.epoch, first.seq..=last.seq);
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
    failpoint::reach("journaled");
    if let Some(tracer) = traces::tracer() {
        tracer.journaled(&end.config.link, epoch, seqs);
    }
    // A dedupe log that cannot be written costs the sight of conflicts with old seqs, never a revision.
    let _ = end.dedupe.note(epoch, notes);
    failpoint::reach("dedupe-noted");
    Ok(())
}
