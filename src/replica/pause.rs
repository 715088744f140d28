//! Job: pause a link at its replica, and have it go on, by an operator's word.
//! Input: an operator's command. Output: `paused` in the position; nothing is applied while it is there.
//! Edge: part of the applier, which owns all of it.
//! Always true: what is received is kept meanwhile; a pause outlives this process and its disk, and holds for every sidecar of the replica.
//!
//! It stands in the position, since whoever applies must read that before, and loses its compare where another one paused meanwhile. While it is
//! there the position is written for hellos and for an operator alone, and keeps it.

use super::apply::Applier;
use super::commit::Committed;
use super::plan::TxnTree;
use crate::certs::load::rfc3339;
use crate::model::{Paused, Phase, Position};
use std::time::{SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;
use tokio::time::Instant;

/// A certificate may bear a longer name; the position is to stay small.
const BY_CHARS_MAX: usize = 200;

impl Applier {
    /// As it was last known.
    pub(super) fn paused(&self) -> Option<&Paused> {
        let position = self.held.as_ref().map_or(self.expected.as_ref(), |held| held.position.as_ref());
        position.and_then(|position| position.paused.as_ref())
    }

    /// True while nothing is to be applied; the reason is shown, and the position looked at again now and then, as another sidecar may have been
    /// told to go on.
    pub(super) fn stays_paused(&mut self) -> bool {
        let Some(reason) = self.paused().map(|paused| reason_of(paused, self.link.as_str())) else { return false };
        self.planned = None;
        self.wait(reason);
        self.held = None;
        true
    }

    /// Nothing is applied from now on. Of a link that is paused already, who paused it and when.
    pub(super) async fn pause(&mut self, by: &str) -> Result<Paused, String> {
        let position = self.position_to_pause().await?;
        if let Some(paused) = position.paused {
            return Ok(paused);
        }
        if position.state != Phase::Following || self.copying.is_some() {
            return Err("the link does not follow: what its replica holds is no state that its origin had. Pause it once it follows".to_owned());
        }
        if position.part > 0 {
            return Err("a revision that is larger than a request is half applied: ask again once it is in".to_owned());
        }
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(0);
        let paused = Paused { at_ms, by: by.chars().take(BY_CHARS_MAX).collect() };
        self.write_paused(Position { paused: Some(paused.clone()), ..position }).await?;
        tracing::warn!(link = %self.link, by, "the link is paused: nothing is applied until it is resumed");
        Ok(paused)
    }

    /// Applying goes on. `None`: it was not paused.
    pub(super) async fn resume(&mut self, by: &str) -> Result<Option<Paused>, String> {
        let position = self.position_to_pause().await?;
        let Some(paused) = position.paused.clone() else { return Ok(None) };
        self.write_paused(Position { paused: None, ..position }).await?;
        tracing::warn!(link = %self.link, by, "the link is resumed: applying goes on");
        Ok(Some(paused))
    }

    /// As it is in etcd now.
    async fn position_to_pause(&mut self) -> Result<Position, String> {
        if self.held.is_none() {
            self.reread().await.map_err(|e| format!("the replica's etcd: {e}"))?;
        }
        let position = self.held.as_ref().and_then(|h| h.position.clone());
        position.ok_or_else(|| "nothing of the link was ever applied here: pause it once it follows".to_owned())
    }

    /// Nothing is in flight: it was waited for.
    async fn write_paused(&mut self, next: Position) -> Result<(), String> {
        self.planned = None;
        match self.commit(next, TxnTree { guards: Vec::new(), success: Vec::new() }).await {
            Ok(Committed::Done) => {
                self.retry_at = Some(Instant::now());
                Ok(())
            }
            Ok(Committed::GuardFailed | Committed::PositionMoved) => {
                self.retry_at = Some(Instant::now());
                Err("another applier wrote the position meanwhile: ask again".to_owned())
            }
            Err(e) => {
                self.doubt(&e);
                Err(format!("the replica's etcd: {e}"))
            }
        }
    }
}

fn reason_of(paused: &Paused, link: &str) -> String {
    format!(
        "paused since {} by {}: nothing is applied, and what comes is kept in the journal, then in the origin's spool; to go on, run `etcd-ferry \
         resume {link} --config F` at the replica's sidecar",
        moment(paused.at_ms),
        paused.by
    )
}

fn moment(at_ms: u64) -> String {
    let seconds = i64::try_from(at_ms / 1_000).unwrap_or(i64::MAX);
    OffsetDateTime::from_unix_timestamp(seconds).map_or_else(|_| at_ms.to_string(), rfc3339)
}
