//! Job: go on without a revision that the replica's etcd refuses whenever it is tried, keep what it was, and bring its keys back later.
//! Input: refusals, an operator's commands, what the origin says the keys are now. Output: skipped seqs in the position, records beside it.
//! Edge: part of the applier, which owns all of it; which revision it is, is found in poison.rs.
//! Always true: a seq becomes skipped, and is taken out again, in one transaction with its record; an old value is never written; where the
//! configuration does not say so, nothing is skipped.

use super::apply::Applier;
use super::commit::{Committed, Rewrite};
use super::mark::Mend;
use super::next;
use super::plan::{self, Node, Op, PlanError, TxnTree};
use super::poison::{SeqState, Verdict};
use crate::config::OnPoison;
use crate::etcd::EtcdError;
use crate::model::{Digest, GivenUp, Mended, Phase, Position, Quarantine, Record, SKIPPED_MAX, Seq};
use crate::wire::replicate::KeysWanted;
use crate::wire::replicate::refusal::Kind;
use bytes::Bytes;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Keys that are asked of the origin at once: it reads their values while frames wait.
pub(super) const WANTED_KEYS_MAX: usize = 256;

/// Why a revision is refused.
pub(super) struct Refusal {
    pub reason: String,
    /// It is no revision, or too large: it would be refused again.
    pub surely: Option<Kind>,
}

/// A retry under way.
pub(super) struct Retrying {
    seq: Seq,
    /// The question that is open.
    wanted: u64,
    /// What is not mended yet, in key order.
    left: Vec<Bytes>,
    mended: Mended,
    reply: oneshot::Sender<Result<Mended, String>>,
}

impl Applier {
    /// The records of what the position says was skipped, where they are not known yet.
    pub(super) async fn read_quarantine(&mut self, position: Option<&Position>) -> Result<(), EtcdError> {
        if self.quarantine.is_of(position) {
            return Ok(());
        }
        let Some(position) = position else {
            self.show_quarantine(Quarantine::default());
            return Ok(());
        };
        let etcd = self.etcd().await?;
        let mut found = Vec::new();
        for seq in &position.skipped {
            let key = self.link.quarantine_key(position.epoch, *seq);
            let look = etcd.look(&key).await.map_err(|e| e.needing(|| format!("read {}", key.escape_ascii())))?;
            match look.kv.map(|kv| Record::from_json(&kv.value)) {
                Some(Ok(record)) => found.push(record),
                Some(Err(error)) => {
                    tracing::warn!(link = %self.link, %seq, %error, "a quarantine's record cannot be read")
                }
                None => tracing::warn!(link = %self.link, %seq, "a quarantine's record is gone"),
            }
        }
        self.show_quarantine(Quarantine::of(position, found));
        Ok(())
    }

    fn show_quarantine(&mut self, quarantine: Quarantine) {
        self.quarantine = Arc::new(quarantine);
        let shown = self.quarantine.clone();
        self.view.send_modify(|view| view.quarantine = shown);
    }

    /// A new epoch brings every key: nothing is skipped in it. Deletes the records.
    pub(super) fn forget_quarantine(&self) -> Result<TxnTree, PlanError> {
        let Quarantine { epoch, entries } = &*self.quarantine;
        plan::deletes(entries.iter().map(|(seq, _)| self.link.quarantine_key(*epoch, *seq)), &self.limits)
    }

    pub(super) fn quarantine_is_over(&mut self) {
        self.show_quarantine(Quarantine::default());
    }

    /// What a plan's error says of one of the waiting revisions, and how many of them were looked at until it was found.
    pub(super) fn poisoned_plan(&self, error: &PlanError) -> Option<(Refusal, usize)> {
        let (revision, surely) = error.poison()?;
        let at = self.waiting.iter().position(|(waiting, _)| waiting.revision.revision == revision)?;
        Some((Refusal { reason: error.to_string(), surely: Some(surely) }, at + 1))
    }

    /// A transaction with the first so many of what waits was refused for what it holds. Nothing is in flight.
    pub(super) async fn refused_for_good(&mut self, refusal: Refusal, revisions: usize) {
        let Some((seq, revision)) = self.waiting.front().map(|(waiting, _)| (waiting.seq, waiting.revision.revision))
        else {
            return;
        };
        self.planned = None;
        let refusals = match self.trial.refused(seq, revisions, refusal.surely.is_some()) {
            Verdict::Narrow => {
                tracing::debug!(link = %self.link, revisions, first = %seq, reason = %refusal.reason, "refused together; fewer are tried");
                self.retry_at = Some(Instant::now());
                return;
            }
            Verdict::Again { refusals } => {
                self.note_state(seq, SeqState::Failed { refusals });
                return self.wait(format!("{}: revision {revision} (seq {seq}) is refused", refusal.reason));
            }
            Verdict::Poison { refusals } => refusals,
        };
        self.note_state(seq, SeqState::Failed { refusals });
        match (self.on_poison, refusal.surely) {
            (OnPoison::Quarantine, _) => self.quarantine(refusal, refusals).await,
            (OnPoison::Stop, Some(kind)) => {
                tracing::error!(link = %self.link, reason = %refusal.reason, "the revision cannot be applied");
                self.refuse(kind, refusal.reason);
            }
            // Whoever grants the right sees it go on.
            (OnPoison::Stop, None) => {
                self.wait(format!("{}: revision {revision} (seq {seq}) is refused", refusal.reason))
            }
        }
    }

    fn note_state(&self, seq: Seq, state: SeqState) {
        if let Some(position) = self.held.as_ref().and_then(|h| h.position.as_ref()) {
            // The dedupe log is a cache: after a restart refusals are counted afresh.
            let _ = self.dedupe.state(position.epoch, seq, state);
        }
    }

    /// Goes on without the first revision that waits, if there is a place for it.
    async fn quarantine(&mut self, refusal: Refusal, refusals: u32) {
        let Some(position) = self.held.as_ref().and_then(|h| h.position.clone()) else { return };
        let Some((waiting, digest)) = self.waiting.front().cloned() else { return };
        let (seq, whole) = (waiting.seq, waiting.revision);
        let Refusal { reason, surely } = refusal;
        if position.skipped.len() >= SKIPPED_MAX {
            return self.hold(format!(
                "{SKIPPED_MAX} revisions are in quarantine, and there is no place for revision {} ({reason}): mend the cause, or discard one \
                 (`etcd-ferry quarantine list {}`)",
                whole.revision, self.link
            ));
        }
        let why = GivenUp { reason: reason.clone(), refusals, at_ms: now_ms(), part: position.part };
        let record = Record::of(position.epoch, seq, &whole, digest, why);
        let json = match (record.to_json(), surely) {
            (Ok(json), _) => json,
            (Err(e), Some(kind)) => return self.refuse(kind, format!("{reason}; {e}")),
            (Err(e), None) => return self.wait(format!("{reason}; {e}")),
        };
        let key = self.link.quarantine_key(position.epoch, seq);
        let put = Node::Op(Op::Put { key: key.clone(), value: json.into() });
        let next = next::after_skipped(&position, seq, (whole.revision, digest));
        match self.commit(next, TxnTree { guards: Vec::new(), success: vec![put] }).await {
            Ok(Committed::Done) => self.skipped(record, digest),
            Ok(Committed::GuardFailed | Committed::PositionMoved) => self.retry().await,
            Err(e) => self.doubt(&e.needing(|| format!("write {} for a quarantine", key.escape_ascii()))),
        }
    }

    fn skipped(&mut self, record: Record, digest: Digest) {
        let Record { seq, revision, .. } = record;
        let (keys, reason) = (record.changes.len(), record.reason.clone());
        tracing::error!(link = %self.link, %revision, %seq, %digest, keys, reason,
            "a revision is quarantined: the link goes on without it, and its keys differ until `etcd-ferry quarantine retry`");
        self.note_state(seq, SeqState::Quarantined);
        self.dequeue();
        self.trial.passed(1);
        self.show_quarantine(self.quarantine.with(record));
        self.view.send_modify(|view| view.quarantined_ever += 1);
        self.resumed();
        self.retry_at = Some(Instant::now());
    }

    /// Takes a seq out of the quarantine; its keys stay as they are.
    pub(super) async fn discard(&mut self, seq: Seq) -> Result<(), String> {
        self.refresh().await?;
        self.entry(seq)?;
        self.take_out(seq).await?;
        tracing::warn!(link = %self.link, %seq, "a quarantined revision is discarded: its keys differ until they are written again or mended");
        self.end_retry_of(seq);
        Ok(())
    }

    /// What is kept of it.
    pub(super) async fn show(&mut self, seq: Seq) -> Result<Record, String> {
        self.refresh().await?;
        self.recorded(seq).cloned()
    }

    fn entry(&self, seq: Seq) -> Result<Option<&Record>, String> {
        self.quarantine.entry(seq).ok_or_else(|| {
            let there: Vec<String> = self.quarantine.entries.iter().map(|(seq, _)| seq.to_string()).collect();
            let there = if there.is_empty() { "nothing".to_owned() } else { format!("seq {}", there.join(", ")) };
            format!("seq {seq} is not in quarantine; there is {there}")
        })
    }

    fn recorded(&self, seq: Seq) -> Result<&Record, String> {
        self.entry(seq)?.ok_or_else(|| {
            format!(
                "the record of seq {seq} is gone, so nobody knows its keys: run `etcd-ferry repair {}` at the origin's sidecar, then \
                 `etcd-ferry quarantine discard {} {seq}` here",
                self.link, self.link
            )
        })
    }

    /// Out of the position's list, with its record. False: it is not in it.
    async fn take_out(&mut self, seq: Seq) -> Result<bool, String> {
        let link = self.link.clone();
        let taking_out = |position: Option<&Position>| {
            let Some(position) = position.filter(|position| position.skipped.contains(&seq)) else {
                return Ok(Rewrite { next: None, record: None, outcome: false });
            };
            let next = next::without_skipped(position, seq);
            let record = link.quarantine_key(position.epoch, seq);
            Ok(Rewrite { next: Some(next), record: Some(record), outcome: true })
        };
        let taken = self.rewrite(taking_out).await?;
        self.show_quarantine(self.quarantine.without(seq));
        Ok(taken)
    }

    pub(super) async fn begin_retry(&mut self, seq: Seq, reply: oneshot::Sender<Result<Mended, String>>) {
        let refreshed = self.refresh().await;
        let keys = match refreshed.and_then(|()| self.may_retry(seq)) {
            Ok(record) => record.keys().cloned().collect(),
            Err(reason) => {
                let _ = reply.send(Err(reason));
                return;
            }
        };
        self.end_retry(Err("another retry was asked for meanwhile, whose answer counts".to_owned()));
        self.retrying = Some(Retrying { seq, wanted: 0, left: keys, mended: Mended::default(), reply });
        self.ask_for_keys();
    }

    fn may_retry(&self, seq: Seq) -> Result<&Record, String> {
        if self.paused().is_some() {
            return Err("the link is paused: resume it, then ask again".to_owned());
        }
        let record = self.recorded(seq)?;
        let connected = self.told.borrow().connected;
        let state = self.held.as_ref().and_then(|h| h.position.as_ref()).map(|position| position.state);
        let waiting = self.view.borrow().waiting.clone();
        if self.link_back {
            return Err("a link back exists over these keys, so nobody can tell which side is right: write the right values at one side, and \
                        they cross; then discard it"
                .to_owned());
        }
        if !waiting.is_empty() {
            return Err(format!("applying waits, and what comes before must be in first: {waiting}"));
        }
        if !connected {
            return Err(
                "the origin's sidecar is not connected, and nobody else knows the present values: ask again once it is"
                    .to_owned(),
            );
        }
        if state == Some(Phase::Copying) {
            return Err("a base copy runs, which brings every key: there is nothing to retry".to_owned());
        }
        Ok(record)
    }

    /// Asks the origin for the next keys, or ends the retry where none is left.
    fn ask_for_keys(&mut self) {
        self.wanted += 1;
        let (wanted, session) = (self.wanted, self.session);
        let Some(retrying) = &mut self.retrying else { return };
        retrying.wanted = wanted;
        let keys = retrying.left.iter().take(WANTED_KEYS_MAX).cloned().collect();
        let asked = (session, KeysWanted { wanted, keys });
        self.view.send_modify(|view| view.wanted = Some(asked));
    }

    /// True for what a comparison brings, and for what the present retry asked for.
    pub(super) fn is_wanted(&self, mend: &Mend) -> bool {
        let asked = |retrying: &Retrying| {
            let ours =
                mend.changes.iter().map(crate::model::Change::key).eq(retrying.left.iter().take(mend.changes.len()));
            let some = !mend.changes.is_empty() || retrying.left.is_empty();
            retrying.wanted == mend.wanted && ours && some
        };
        mend.wanted == 0 || self.retrying.as_ref().is_some_and(asked)
    }

    /// What a retry asked for is in, or is refused.
    pub(super) async fn retried(&mut self, mend: &Mend, outcome: &Result<Mended, String>) {
        let Some(retrying) = self.retrying.as_mut().filter(|retrying| retrying.wanted == mend.wanted) else { return };
        match outcome {
            Err(reason) => return self.end_retry(Err(format!("it is refused again: {reason}"))),
            Ok(mended) => {
                retrying.left.drain(..mend.changes.len().min(retrying.left.len()));
                retrying.mended.puts += mended.puts;
                retrying.mended.deletes += mended.deletes;
            }
        }
        if !retrying.left.is_empty() {
            return self.ask_for_keys();
        }
        let (seq, mended) = (retrying.seq, retrying.mended);
        let ended = self.take_out(seq).await.map(|_| mended);
        if ended.is_ok() {
            tracing::info!(link = %self.link, %seq, puts = mended.puts, deletes = mended.deletes,
                "a quarantined revision's keys are what they are at the origin");
        }
        self.end_retry(ended);
    }

    /// Tells who waits for a retry how it ended.
    pub(super) fn end_retry(&mut self, ended: Result<Mended, String>) {
        if let Some(retrying) = self.retrying.take() {
            let _ = retrying.reply.send(ended);
        }
    }

    fn end_retry_of(&mut self, seq: Seq) {
        if self.retrying.as_ref().is_some_and(|retrying| retrying.seq == seq) {
            self.end_retry(Err("it was discarded meanwhile: a repair at the origin brings its keys".to_owned()));
        }
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
