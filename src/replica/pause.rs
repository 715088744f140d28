//! Job: pause a link at its replica, and have it go on, by an operator's word.
//! Input: an operator's command. Output: `paused` in the position; nothing is applied while it is there.
//! Edge: part of the applier, which owns all of it.
//! Always true: what is received is kept meanwhile; a pause outlives this process and its disk, and holds for every sidecar of the replica.
//!
//! It stands in the position, since whoever applies must read that before, and loses its compare where another one paused meanwhile. While it is
//! there the position is written for hellos and for an operator alone, and keeps it.

use super::apply::Applier;
use super::commit::Rewrite;
use crate::certs::load::rfc3339;
use crate::model::{Paused, Phase, Position};
use std::time::{SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;

/// A certificate may bear a longer name; the position is to stay small.
const BY_CHARS_MAX: usize = 200;

impl Applier {
    /// As it was last known.
    pub(super) fn paused(&self) -> Option<&Paused> {
        self.known().and_then(|position| position.paused.as_ref())
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
        self.refresh().await?;
        let copies = self.copying.is_some();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(0);
        let by_now = Paused { at_ms, by: by.chars().take(BY_CHARS_MAX).collect() };
        let pausing = |position: Option<&Position>| {
            let position = position.ok_or_else(nothing_applied)?;
            if let Some(paused) = position.paused.clone() {
                return Ok(Rewrite { next: None, record: None, outcome: paused });
            }
            if position.state != Phase::Following || copies {
                return Err("the link does not follow: what its replica holds is no state that its origin had. Pause it once it follows".to_owned());
            }
            if position.part > 0 {
                return Err(
                    "a revision that is larger than a request is half applied: ask again once it is in".to_owned()
                );
            }
            let next = Position { paused: Some(by_now.clone()), ..position.clone() };
            Ok(Rewrite { next: Some(next), record: None, outcome: by_now.clone() })
        };
        let paused = self.rewrite(pausing).await?;
        if paused == by_now {
            tracing::warn!(link = %self.link, by, "the link is paused: nothing is applied until it is resumed");
        }
        Ok(paused)
    }

    /// Applying goes on. `None`: it was not paused.
    pub(super) async fn resume(&mut self, by: &str) -> Result<Option<Paused>, String> {
        let resuming = |position: Option<&Position>| {
            let position = position.ok_or_else(nothing_applied)?;
            let next = Position { paused: None, ..position.clone() };
            let paused = position.paused.clone();
            Ok(Rewrite { next: paused.is_some().then_some(next), record: None, outcome: paused })
        };
        let paused = self.rewrite(resuming).await?;
        if paused.is_some() {
            tracing::warn!(link = %self.link, by, "the link is resumed: applying goes on");
        }
        Ok(paused)
    }
}

fn nothing_applied() -> String {
    "nothing of the link was ever applied here: pause it once it follows".to_owned()
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
