//! Job: what a simulated origin's sidecar writes into the origin's etcd, and how it finds again that it has another history.
//! Input: a position, the reason of a stop, changes. Output: a note in the origin's etcd; the reason that it holds.
//! Synchronous.
//! Always true: as in the product's origin/remember.rs, whose calls it stands for; what is written is judged as any other write is.

use super::Origin;
use crate::simulation::etcd::Etcd;
use crate::simulation::region::Context;
use etcd_ferry::model::{Change, Position, Revision};
use etcd_ferry::origin::history::Met;

impl Origin {
    pub(super) fn recall(
        &mut self,
        position: Option<&Position>,
        etcd: &mut Etcd,
        context: &mut Context,
    ) -> Option<String> {
        let followed = position.filter(|position| position.origin_cluster == etcd.cluster);
        self.followed = followed.map(|position| (position.epoch, position.seq));
        let key = self.link.other_history_key();
        let met = Met::from_json(&etcd.get(&key)?.0).expect("only this file writes it");
        if met.is_outlived(position) {
            write(etcd, Change::Delete { key }, context);
            context.count("another history forgotten");
            return None;
        }
        self.followed = None;
        Some(met.reason)
    }

    pub(super) fn remember(&mut self, reason: &str, etcd: &mut Etcd, context: &mut Context) {
        let Some((epoch, seq)) = self.followed.take() else { return };
        let met = Met { epoch, seq, reason: reason.to_owned() };
        let key = self.link.other_history_key();
        write(etcd, Change::Put { key, value: met.to_json().into() }, context);
        context.count("another history written down");
    }
}

/// A write of etcd-ferry's own at the origin.
pub(super) fn write(etcd: &mut Etcd, change: Change, context: &mut Context) -> Option<Revision> {
    let revision = etcd.write(vec![change])?;
    let written = etcd.written_at(etcd.revision).to_vec();
    context.judge.origin_wrote(etcd.head(), &written, etcd.state());
    Some(revision)
}
