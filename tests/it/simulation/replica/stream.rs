//! Job: a simulated replica's end of a stream: the product's decoder and admission, and what is said of how far it is.
//! Input: a line's shipments. Output: journal entries, notes of them in the dedupe log, steps of a copy; receipts.
//! Synchronous.
//! Always true: as in the product's replica/stream.rs, whose calls it stands for; a stream that was refused takes and says nothing any more.

use super::Replica;
use crate::simulation::dedupe::notes_of;
use crate::simulation::line::{Line, Receipt, Shipment};
use crate::simulation::region::Context;
use etcd_ferry::model::{Epoch, Phase, Revision, Seq, Waymark};
use etcd_ferry::replica::admit;
use etcd_ferry::replica::journal::JournalEntry;
use etcd_ferry::replica::next::{self, Idle};
use etcd_ferry::wire::replicate::refusal::Kind;
use etcd_ferry::wire::replicate::{Ack, Progress};
use etcd_ferry::wire::window::DecodeError;
use std::sync::Arc;

impl Replica {
    /// Takes the next shipment off the line.
    pub fn receive(&mut self, line: &mut Line, context: &mut Context) {
        if self.journal.is_full() || self.stream.as_ref().is_none_or(|stream| stream.refused) {
            return;
        }
        let Some(shipment) = line.shipments.pop_front() else { return };
        let number = self.session;
        let taken = match shipment {
            Shipment::Frame(frame) => self.take_frame(&frame, line, context),
            Shipment::Progress(progress) => {
                self.take_progress(&progress);
                Ok(())
            }
            step @ (Shipment::Begin(_) | Shipment::Keys { .. } | Shipment::Page { .. } | Shipment::End { .. }) => {
                if self.stream.as_ref().is_some_and(|stream| stream.number == number) && !self.stopped {
                    self.settle_in_flight(context);
                    // It may have died of that.
                    if self.stream.is_some() {
                        self.copy_step(&step, context);
                    }
                }
                Ok(())
            }
        };
        if let Err((kind, reason)) = taken {
            self.refuse_stream(kind, reason, line, context);
        }
    }

    fn refuse_stream(&mut self, kind: Kind, reason: String, line: &mut Line, context: &mut Context) {
        if let Some(stream) = self.stream.as_mut().filter(|stream| !stream.refused) {
            stream.refused = true;
            context.count(&format!("refusal {}", kind.as_str_name()));
            context.note(|| format!("{} refuses: {reason}", self.name));
            line.receipt(context, Receipt::Refusal(kind, reason));
        }
    }

    fn take_frame(&mut self, frame: &[u8], line: &mut Line, context: &mut Context) -> Result<(), (Kind, String)> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let decoded = match stream.decoder.decode(frame) {
            Ok(decoded) => decoded,
            Err(DecodeError::NotFresh) => return Ok(()),
            Err(error) => {
                context.count("reset");
                context.note(|| format!("{} asks for a fresh window: {error}", self.name));
                line.receipt(context, Receipt::Reset(self.admit.received().0));
                return Ok(());
            }
        };
        if decoded.revisions.iter().any(|whole| admit::outside(&stream.ranges, whole)) {
            return Err((Kind::Outside, "a key outside of the ranges".to_owned()));
        }
        let admitted = self.admit.admit_frame(decoded.epoch, decoded.term, decoded.seq_first, &decoded.digests);
        let repeated = admitted.map_err(|refused| {
            let kind = match refused {
                admit::Refused::Gap { .. } => Kind::Gap,
                admit::Refused::Fenced { .. } => Kind::Fenced,
                admit::Refused::Conflict { .. } => Kind::Conflict,
            };
            (kind, refused.to_string())
        })?;
        if repeated > 0 {
            context.count("duplicates");
        }
        let seqs = (decoded.seq_first.0..).map(Seq);
        let received = seqs.zip(decoded.revisions.into_iter().zip(decoded.digests)).skip(repeated);
        let epoch = decoded.epoch;
        let entries: Vec<JournalEntry> = received
            .map(|(seq, (whole, digest))| JournalEntry { epoch, seq, revision: Arc::new(whole), digest })
            .collect();
        if entries.is_empty() {
            return Ok(());
        }
        let notes = notes_of(&entries);
        if Epoch(self.journal.tag) != epoch || !self.journal.append(entries) {
            return Err((Kind::Closing, "the replica's journal does not take it".to_owned()));
        }
        if context.fails(6, "receiver crashed between journal and dedupe log") {
            // The journal's own thread was faster.
            self.journal.write(&mut context.random);
            self.journal.sync();
            self.crash(true, context);
            return Ok(());
        }
        self.dedupe.note(epoch, notes);
        Ok(())
    }

    fn take_progress(&mut self, progress: &Progress) {
        if progress.origin_revision == 0 {
            return;
        }
        self.waymark = progress.waymark.map(Waymark::from).unwrap_or_default();
        let persist = progress.persist || self.progress.is_some_and(|idle| idle.persist);
        let (through, after) = (Revision(progress.origin_revision), Seq(progress.after_seq));
        self.progress = Some(Idle { through, after, persist });
    }

    /// Says how far it is, and what else there is to say.
    pub fn tell(&mut self, line: &mut Line, context: &mut Context) {
        let Some(number) = self.stream.as_ref().filter(|stream| !stream.refused).map(|stream| stream.number) else {
            return;
        };
        if self.copy_session == number {
            let position = self.position().or(self.expected.as_ref());
            if let Some(position) = position.filter(|p| self.copy_ack.complete && p.epoch > self.admit.epoch().0) {
                let (epoch, term) = (position.epoch, position.term);
                self.admit.open_epoch(epoch, term, Seq(0)).expect("it is a higher one");
            }
            let told = self.stream.as_mut().map(|stream| &mut stream.copy_told);
            if let Some(told) = told.filter(|told| **told != self.copy_ack) {
                told.clone_from(&self.copy_ack);
                line.receipt(context, Receipt::CopyAck(Box::new(self.copy_ack.clone())));
            }
        }
        if let Some((_, kind, reason)) = self.refusal.clone().filter(|(session, _, _)| *session == number) {
            return self.refuse_stream(kind, reason, line, context);
        }
        let ack = self.ack();
        line.receipt(context, Receipt::Ack(Box::new(ack)));
    }

    fn ack(&self) -> Ack {
        let position = match &self.held {
            Some((position, _)) => position.as_ref(),
            None => self.expected.as_ref(),
        };
        let position = position.filter(|p| p.epoch == self.admit.epoch().0);
        let applied = position.map_or(Seq(0), |p| p.seq);
        let received = self.admit.received();
        Ack {
            received_seq: received.0,
            durable_seq: self.journal.durable.max(applied.0).min(received.0.max(applied.0)),
            applied_seq: applied.0,
            applied_origin_revision: position.map_or(0, |p| next::applied_revision(p, self.progress).0),
            position_revision: position.map_or(0, |p| p.origin_revision.0),
            waymark: position.map(|p| p.waymark.into()),
            following: position.is_some_and(|p| p.state == Phase::Following),
            ..Ack::default()
        }
    }
}
