//! Job: hold back a revision that deletes much of the link, until a person allows it.
//! Input: what waits, how many keys the replica holds, an operator's command. Output: how far what waits may be applied; `held_back` in the
//! position.
//! Edge: part of the applier, which owns all of it; what is too much is decided in breaker.rs.
//! Always true: nothing of a revision that is held back is applied, by whatever sidecar, before the position says that it is allowed.

use super::apply::{Applier, position_bytes_max};
use super::breaker::Judged;
use super::commit::{Committed, Rewrite};
use super::plan::TxnTree;
use crate::etcd::{Columns, EtcdError};
use crate::model::{Change, HeldBack, Position, Seq, WholeRevision};
use std::sync::Arc;

impl Applier {
    /// A position that was read or committed. Where what was held back has gone through, the breaker begins afresh.
    pub(super) fn knows(&mut self, position: &Position) {
        let before = self.expected.as_ref().and_then(|position| position.held_back);
        if before.is_some_and(|held| held.allowed && position.seq >= held.seq) {
            self.breaker.start_afresh();
        }
        self.cleared = self.cleared.max(position.seq);
        self.limits.position_value_bytes_max = position_bytes_max(Some(position));
    }

    /// What comes next, where it waits for a person, as it was last known.
    pub(super) fn held_back(&self) -> Option<HeldBack> {
        let position = self.known()?;
        position.held_back.filter(|held| !held.allowed && position.seq.next() == held.seq)
    }

    /// Judges what waits, in order. False: the next one is held back, or could not be judged now.
    pub(super) async fn clear_deletes(&mut self) -> bool {
        let Some(position) = self.held.as_ref().and_then(|h| h.position.clone()) else { return false };
        if let Some(held) = self.held_back() {
            self.still_held(&held);
            return false;
        }
        if self.ranges.is_none() {
            // Nobody knows what to count, and nothing is applied before a hello tells.
            return true;
        }
        while let Some((seq, whole)) = self.next_uncleared() {
            if let Some(held) = position.held_back.filter(|held| seq >= held.seq) {
                if held.allowed && seq == held.seq {
                    self.cleared = seq;
                }
                // What comes after it is judged once it is in.
                return true;
            }
            // A revision whose first part is in was judged before.
            let begun = position.part > 0 && seq == position.seq.next();
            let deletes = if begun || !self.breaker.is_on() { 0 } else { deletes_of(&whole) };
            match self.breaker.judge(self.now_ms(), seq, deletes) {
                Judged::Passes => self.cleared = seq,
                // What comes before it is applied first.
                Judged::Count if self.in_flight.is_some() || position.seq.next() != seq => return true,
                Judged::Count => match self.count_keys_present().await {
                    Ok(keys) => self.breaker.counted(self.now_ms(), keys, seq),
                    Err(e) => {
                        self.doubt(&e);
                        return false;
                    }
                },
                Judged::Holds { deletes, keys, minute } => {
                    let revision = whole.revision;
                    let held = HeldBack { seq, revision, deletes, keys, minute, allowed: false };
                    self.hold_back(&position, held).await;
                    return false;
                }
            }
        }
        true
    }

    fn next_uncleared(&self) -> Option<(Seq, Arc<WholeRevision>)> {
        let first = self.waiting.front()?.0.seq;
        let at = self.cleared.0.saturating_add(1).saturating_sub(first.0);
        let (next, _) = self.waiting.get(usize::try_from(at).ok()?)?;
        Some((next.seq, next.revision.clone()))
    }

    /// Milliseconds since the applier began: a clock that nobody sets.
    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The link's keys at the replica, now.
    async fn count_keys_present(&mut self) -> Result<u64, EtcdError> {
        let etcd = self.etcd().await?;
        let mut keys = 0;
        for piece in self.ranges.iter().flat_map(crate::model::Ranges::pieces) {
            keys += etcd.page(piece, 0, None, Columns::CountOnly).await?.count;
        }
        Ok(keys)
    }

    /// Into the position, so that it is still held back after a restart, and by another sidecar. Nothing is in flight: it was counted for.
    async fn hold_back(&mut self, position: &Position, held: HeldBack) {
        let next = Position { held_back: Some(held), ..position.clone() };
        match self.commit(next, TxnTree { guards: Vec::new(), success: Vec::new() }).await {
            Ok(Committed::Done) => {
                self.view.send_modify(|view| view.held_back_ever += 1);
                self.still_held(&held);
            }
            Ok(Committed::GuardFailed | Committed::PositionMoved) => self.retry().await,
            Err(e) => self.doubt(&e),
        }
    }

    fn still_held(&mut self, held: &HeldBack) {
        self.planned = None;
        self.hold(reason_of(held, self.link.as_str()));
        // Another sidecar may have been told to let it through.
        self.held = None;
    }

    /// What is held back goes through, once; `seq`: only if it is this one.
    pub(super) async fn allow(&mut self, seq: Option<Seq>) -> Result<HeldBack, String> {
        let allowing = |position: Option<&Position>| {
            let held = position.and_then(|position| position.held_back);
            let (Some(position), Some(held)) = (position, held) else {
                return Err("nothing is held back for its deletes".to_owned());
            };
            if let Some(seq) = seq.filter(|seq| *seq != held.seq) {
                return Err(format!("seq {seq} is not held back for its deletes; seq {} is", held.seq));
            }
            let allowed = HeldBack { allowed: true, ..held };
            let next = Position { held_back: Some(allowed), ..position.clone() };
            Ok(Rewrite { next: (!held.allowed).then_some(next), record: None, outcome: allowed })
        };
        let held = self.rewrite(allowing).await?;
        tracing::warn!(link = %self.link, seq = %held.seq, revision = %held.revision, deletes = held.deletes, "what was held back is allowed");
        Ok(held)
    }
}

fn deletes_of(whole: &WholeRevision) -> u64 {
    whole.changes.iter().filter(|change| matches!(change, Change::Delete { .. })).count() as u64
}

fn reason_of(held: &HeldBack, link: &str) -> String {
    let HeldBack { seq, revision, deletes, keys, minute, .. } = held;
    let (what, rule) = if *minute {
        (
            format!("with revision {revision} (seq {seq}) {deletes} keys are deleted within a minute"),
            "minute_deletes_share_max",
        )
    } else {
        (format!("revision {revision} (seq {seq}) deletes {deletes} keys"), "revision_deletes_share_max")
    };
    format!(
        "{what}, of {keys} that the replica holds: more than the share that {rule} allows, so nothing of it is applied; if they may go, run \
         `etcd-ferry allow {link} {seq} --config F` at the replica's sidecar"
    )
}
