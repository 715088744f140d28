//! Job: what a simulated origin's sidecar does for its spool while another one ships the link.
//! Input: how far the shipper has published the position to be. Output: a spool that is trimmed, or begun anew; its lineage.
//! Synchronous.
//! Always true: as in the product's origin/standby.rs, whose calls it stands for; what is published is a key in the origin's etcd.

use super::remember::write;
use super::{End, Origin};
use crate::simulation::etcd::Etcd;
use crate::simulation::region::Context;
use crate::simulation::tail::TailState;
use etcd_ferry::model::{Change, LinkName, Revision, Run};
use etcd_ferry::origin::candidacy::{self, Chore, PUBLISH_INTERVAL, Published, Tailing};

/// As the shipper does. `Err`: another one was elected.
pub(super) fn publish(link: &LinkName, now: Published, etcd: &mut Etcd, context: &mut Context) -> Result<(), End> {
    let before = published(link, etcd);
    if before.is_some_and(|before| before.term > now.term) {
        return Err(End::Again("another sidecar was elected".to_owned()));
    }
    if candidacy::publishes(before, now, Some(PUBLISH_INTERVAL), true) {
        write(etcd, Change::Put { key: link.applied_key(), value: now.to_json().into() }, context);
        context.count("position published");
    }
    Ok(())
}

fn published(link: &LinkName, etcd: &Etcd) -> Option<Published> {
    etcd.get(&link.applied_key()).and_then(|(json, _)| Published::from_json(&json))
}

impl Origin {
    /// Looks after the spool, where another one may ship.
    pub fn stand_by(&mut self, etcd: &mut Etcd, context: &mut Context) {
        if self.session.is_some() || self.stopped.is_some() {
            return;
        }
        if let Err(End::Again(reason) | End::Stop(reason) | End::OtherHistory(reason)) =
            self.look_after_spool(etcd, context)
        {
            context.note(|| format!("{} stands by: {reason}", self.name));
        }
    }

    fn look_after_spool(&mut self, etcd: &mut Etcd, context: &mut Context) -> Result<(), End> {
        if context.random.percent(70) {
            self.looked = published(&self.link, etcd);
        }
        let published = self.looked;
        self.known_epoch = published.map_or(self.known_epoch, |published| published.epoch.max(self.known_epoch));
        let tailing = match &self.tail.state {
            TailState::Idle | TailState::Lost { .. } | TailState::OtherHistory { .. } => Tailing::Nothing,
            TailState::Watching | TailState::SpoolFull => Tailing::AtWork,
            TailState::Stopped { .. } => Tailing::Stopped,
        };
        let chore = candidacy::chore(tailing, Revision(self.tail.spool.base()), published);
        context.note(|| format!("{} stands by: {published:?}, {chore:?}", self.name));
        let shows = |after: Revision| after.0 >= etcd.compacted && after <= etcd.head();
        let begun = match chore {
            Chore::Nothing => return Ok(()),
            Chore::Trim(applied) => {
                context.count("standby trims");
                self.trim(applied, context);
                if let Some(Published { epoch, revision, .. }) = published.filter(|_| self.tail.has_watch()) {
                    self.tail.serves(Run { cluster: etcd.cluster, epoch }, revision);
                }
                return Ok(());
            }
            Chore::Begin { after } => {
                context.count("standby begins");
                after.filter(|after| shows(*after)).unwrap_or(etcd.head())
            }
            Chore::BeginEarlier { after } if shows(after) => {
                context.count("standby begins earlier");
                after
            }
            Chore::BeginEarlier { .. } => return Ok(()),
        };
        self.restart_tail(begun, None, None, etcd, context)?
            .map_err(|state| End::Again(format!("the watch did not open: {state:?}")))
    }
}
