//! Job: what a sidecar does for a link while another one ships it: tail into the spool, trim by what the shipper published.
//! Input: the election's and the tail's views. Output: commands to the tail, trims; the term once this sidecar is elected.
//! Edge: part of the shipper, which owns all of it.
//! Always true: nothing is shipped from here; what is trimmed is applied, by the word of a position.

use super::LinkEvent;
use super::candidacy::{self, Chore, Published, Tailing};
use super::decide::WATCH_OPENS_MAX;
use super::elect::{ElectView, Standing};
use super::ship::Shipper;
use super::tail::{Begins, TailState};
use crate::admin::{LinkCommand, next_command};
use crate::etcd::{Columns, Etcd, EtcdError};
use crate::model::{KeyRange, LINKS_PREFIX, LinkState, Revision, Run, Term};
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior};

/// How often a standby looks after its spool.
const CHORE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a sidecar that has just taken over waits for its tail to come to where the replica is: progress comes at each read of the head.
const CATCH_UP_MAX: Duration = Duration::from_secs(3);

impl Shipper {
    /// Stands by until this sidecar is elected. `None`: the process ends.
    pub(super) async fn stand_by(&mut self) -> Option<Term> {
        let mut ticks = tokio::time::interval(CHORE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // A published revision that etcd has compacted past: the spool cannot begin there.
        let mut out_of_reach = None;
        loop {
            let view = self.elected.borrow_and_update().clone();
            match &view.standing {
                Standing::Shipper { term } => {
                    // Until the replica answers, the best that is known of it; a hello takes back what does not hold.
                    if let Some(published) = view.published {
                        let _ = self.events.send(LinkEvent::Published(published.revision)).await;
                    }
                    return Some(*term);
                }
                Standing::Standby { .. } => self.took_over = true,
                Standing::Unknown { .. } => {}
            }
            self.show_standby(&view);
            let mut elected = self.elected.clone();
            tokio::select! {
                biased;
                changed = elected.changed() => {
                    changed.ok()?;
                    continue;
                }
                command = next_command(&mut self.commands) => {
                    decline(command?, &view);
                    continue;
                }
                _ = ticks.tick() => {}
            }
            // A watch that does not open must not keep the sidecar from leading.
            tokio::select! {
                biased;
                changed = elected.changed() => changed.ok()?,
                () = self.look_after_spool(&view, &mut out_of_reach) => {}
            }
        }
    }

    fn show_standby(&self, view: &ElectView) {
        let detail = match &view.standing {
            Standing::Standby { shipper, .. } => format!("stands by: {shipper} ships the link"),
            Standing::Unknown { .. } | Standing::Shipper { .. } => "waits for the election".to_owned(),
        };
        self.view.send_if_modified(|ship| {
            if ship.detail == detail && ship.reason.is_empty() {
                return false;
            }
            ship.state = LinkState::Connecting;
            (ship.detail, ship.reason) = (detail, String::new());
            (ship.copy, ship.copy_since, ship.unwritten) = (None, None, None);
            true
        });
    }

    async fn look_after_spool(&mut self, view: &ElectView, out_of_reach: &mut Option<Revision>) {
        if !matches!(view.standing, Standing::Standby { .. }) {
            return;
        }
        if let Some(published) = view.published {
            self.learned_epoch(published.epoch);
        }
        let tailing = match &self.tail.borrow().state {
            TailState::Idle | TailState::Lost { .. } | TailState::OtherHistory { .. } => Tailing::Nothing,
            TailState::Connecting { .. } | TailState::Running | TailState::SpoolFull => Tailing::AtWork,
            TailState::Stopped { .. } => Tailing::Stopped,
        };
        let base = self.spool.extent().borrow().base;
        let chore = candidacy::chore(tailing, base, view.published);
        let done = match chore {
            Chore::Nothing => Ok(()),
            Chore::Trim(applied) => {
                self.spool.trim(applied);
                self.hears_of(view.published).await;
                let _ = self.events.send(LinkEvent::Published(applied)).await;
                Ok(())
            }
            Chore::Begin { after } => self.begin(after).await,
            Chore::BeginEarlier { after } if *out_of_reach == Some(after) => Ok(()),
            Chore::BeginEarlier { after } => self.begin_earlier(after, out_of_reach).await,
        };
        if let Err(error) = done {
            tracing::debug!(link = %self.origin.send.link, %error, ?chore, "the standby's spool waits");
        }
    }

    /// While its watch stands, what the standby's spool holds is of the epoch that the shipper publishes.
    async fn hears_of(&self, published: Option<Published>) {
        let cluster = {
            let tail = self.tail.borrow();
            tail.cluster.filter(|_| tail.state == TailState::Running)
        };
        let (Some(cluster), Some(Published { epoch, revision, .. })) = (cluster, published) else { return };
        if let Err(error) = self.spool.serves(Run { cluster, epoch }, revision).await {
            tracing::debug!(link = %self.origin.send.link, %error, "of which epoch the spool is was not written down");
        }
    }

    async fn begin(&mut self, after: Option<Revision>) -> Result<(), EtcdError> {
        let etcd = self.origin.etcd.connect().await?;
        let from = match after {
            Some(after) if can_watch_after(&etcd, after).await? => after,
            Some(_) | None => etcd.look(&self.origin.send.link.applied_key()).await?.head,
        };
        tracing::info!(link = %self.origin.send.link, after = %from, "the standby's spool begins");
        // Should etcd compact past it before the watch stands, the tail says so, and the next look begins at the head.
        let _ = self.restart_tail(from, None, None, Begins::Afresh, WATCH_OPENS_MAX).await;
        Ok(())
    }

    async fn begin_earlier(&mut self, after: Revision, out_of_reach: &mut Option<Revision>) -> Result<(), EtcdError> {
        let etcd = self.origin.etcd.connect().await?;
        if !can_watch_after(&etcd, after).await? {
            *out_of_reach = Some(after);
            return Ok(());
        }
        tracing::info!(link = %self.origin.send.link, %after, "the standby's spool begins anew, where the replica is");
        let _ = self.restart_tail(after, None, None, Begins::GoesOn, WATCH_OPENS_MAX).await;
        Ok(())
    }

    /// A standby's tail may be a moment behind what the shipper before it had shipped. To drop its spool for that would cost a base copy
    /// where etcd is compacted.
    pub(super) async fn let_tail_reach(&mut self, reached: Revision) {
        if !std::mem::take(&mut self.took_over) {
            return;
        }
        let deadline = Instant::now() + CATCH_UP_MAX;
        let mut extent = self.spool.extent();
        let behind = |covered: Revision| covered > Revision(0) && covered < reached;
        while behind(extent.borrow_and_update().covered) && self.tails() {
            if tokio::time::timeout_at(deadline, extent.changed()).await.is_err() {
                return;
            }
        }
    }

    fn tails(&self) -> bool {
        matches!(self.tail.borrow().state, TailState::Running | TailState::Connecting { .. })
    }
}

/// A command is for the sidecar that ships.
fn decline(command: LinkCommand, view: &ElectView) {
    let reason = match &view.standing {
        Standing::Standby { shipper, .. } => format!("the sidecar {shipper} ships this link: run the command there"),
        Standing::Unknown { .. } | Standing::Shipper { .. } => {
            "it is not known yet which sidecar ships this link: see its status, then repeat the command".to_owned()
        }
    };
    match command {
        LinkCommand::Resync { reply, .. } => _ = reply.send(Err(reason)),
        LinkCommand::Verify { reply } | LinkCommand::Repair { reply, .. } => _ = reply.send(Err(reason)),
    }
}

/// Whether a watch from the next revision on would see everything: etcd has not compacted past `after`, and has come to it.
async fn can_watch_after(etcd: &Etcd, after: Revision) -> Result<bool, EtcdError> {
    let one = KeyRange::prefix(LINKS_PREFIX);
    match etcd.page(&one, 1, Some(after), Columns::CountOnly).await {
        Ok(_) => Ok(true),
        Err(EtcdError::Compacted | EtcdError::FutureRevision) => Ok(false),
        Err(e) => Err(e),
    }
}
