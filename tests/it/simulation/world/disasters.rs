//! Job: what happens to a simulated link beside what a line and an answer do: crashes, compaction, others' writes, elections, lost disks, restores.
//! Input: the run's random numbers, and what this seed may bring. Output: a world in which it has happened, told to the judge.
//! Synchronous.
//! Always true: each kind is counted; nothing happens that a stated limit lets pass unseen.

use super::{World, key};
use crate::simulation::etcd::Etcd;
use crate::simulation::judge::epoch_of;
use crate::simulation::origin::Origin;
use crate::simulation::replica::Replica;
use bytes::Bytes;
use etcd_ferry::model::{Change, ClusterId, Phase, Position, Revision, Term};

impl World {
    /// What may go wrong, beside what a line and an answer do.
    pub(super) fn disturb(&mut self, origin: usize, replica: usize) {
        if self.context.fails(4, "sender crashed") {
            let kept = self.context.random.percent(40);
            self.crash_origin(origin, kept);
        }
        if self.context.fails(4, "receiver crashed") {
            let kept = self.context.random.percent(40);
            self.replicas[replica].crash(kept, &mut self.context);
        }
        if self.context.fails(5, "stream broken") {
            self.origins[origin].session = None;
        }
        if self.context.fails(6, "watch broken") {
            self.origins[origin].tail.break_watch();
        }
        if self.context.fails(2, "origin compacted under a new watch") {
            self.origins[origin].tail.break_watch();
            self.origins[origin].tail.step(&self.origin, &mut self.context);
            self.origin.compact(self.origins[origin].tail.covered.0.min(self.compact_max));
        }
        if self.context.fails(4, "origin compacted") {
            let back = self.context.random.below(20) as u64;
            self.origin.compact(self.origin.revision.saturating_sub(back).min(self.compact_max));
        }
        if self.context.fails(5, "replica compacted") {
            self.context.replica.compact(self.context.replica.revision);
        }
        if self.may.foreign && self.context.fails(8, "foreign write") {
            let what = self.context.random.below(3);
            self.write_foreign(what);
        }
        // Where a range is about to be deleted.
        if self.may.foreign && self.replicas[replica].deletes_a_range() && self.context.fails(300, "foreign write") {
            self.write_foreign(1);
        }
        if self.may.elections && self.context.fails(8, "election") {
            let highest = self.origins.iter().map(|origin| origin.term).max().unwrap_or_default();
            self.origins[origin].elect(Term(highest.0 + 1));
        }
        if self.context.random.permille(40) && self.origins[origin].stopped.is_some() {
            self.resync(origin);
        }
        self.bring_disaster(origin, replica);
    }

    fn bring_disaster(&mut self, origin: usize, replica: usize) {
        if self.may.lose_disks && self.context.fails(3, "spool lost") {
            self.origins[origin].tail.spool.lose();
            self.origins[origin].start_again(self.ranges[self.ranges_now].clone());
        }
        if self.may.lose_disks && self.context.fails(3, "lineage lost") {
            self.crash_origin(origin, true);
            self.origins[origin].tail.lose_lineage();
        }
        if self.may.lose_disks && self.context.fails(3, "journal lost") {
            self.replicas[replica].journal.lose();
            self.replicas[replica].crash(true, &mut self.context);
        }
        if self.may.lose_disks && self.context.fails(3, "dedupe log lost") {
            self.replicas[replica].dedupe.lose();
            self.replicas[replica].crash(true, &mut self.context);
        }
        if self.may.restore_replica && self.context.random.permille(15) {
            self.replica_snapshot = Some((self.context.replica.clone(), self.context.judge.foreign()));
        }
        if self.may.restore_replica && self.replica_snapshot.is_some() && self.context.fails(6, "replica restored") {
            self.restore_replica();
        }
        if self.may.restore_origin && self.context.random.permille(5) {
            self.origin_snapshot = Some(self.origin.clone());
        }
        if self.may.restore_origin && self.is_known_by_what_it_carried() && self.context.fails(8, "origin restored") {
            self.restore_origin();
        }
        if self.may.replace_origin && self.context.fails(2, "origin replaced") {
            self.replace_origin();
        }
        if self.may.change_ranges && self.context.fails(4, "ranges changed") {
            self.ranges_now = 1 - self.ranges_now;
            for at in 0..self.origins.len() {
                self.crash_origin(at, true);
            }
        }
    }

    fn crash_origin(&mut self, at: usize, kept_by_kernel: bool) {
        self.origins[at].tail.spool.crash(kept_by_kernel, &mut self.context.random);
        self.origins[at].start_again(self.ranges[self.ranges_now].clone());
    }

    fn write_foreign(&mut self, what: usize) {
        let random = &mut self.context.random;
        let key = match what {
            0 => key(format!("/app/k{:02}", random.below(12))),
            1 => key(format!("/app/run/{:03}{}", random.below(66), ["", "x"][random.below(2)])),
            _ => key("/app/foreign".to_owned()),
        };
        let change = match random.below(4) {
            0 => Change::Delete { key },
            _ => Change::Put { key, value: Bytes::from_static(b"somebody else's") },
        };
        self.context.note(|| format!("somebody else writes {}", change.key().escape_ascii()));
        self.context.judge.foreign_wrote(std::slice::from_ref(&change));
        self.context.replica.write(vec![change]);
    }

    /// The replica's etcd is what it was; requests that were on their way are gone with the old one. It went away and came back, which its
    /// connections show: no applier holds on to what it read before, and none sends a request any more whose compare is of the etcd that is gone.
    fn restore_replica(&mut self) {
        let Some((snapshot, foreign)) = self.replica_snapshot.clone() else { return };
        self.context.note(|| format!("the replica is restored to its revision {}", snapshot.revision));
        self.replica_restored = true;
        self.context.restore(snapshot, foreign);
        self.replicas.iter_mut().for_each(Replica::doubt);
    }

    /// Where nothing was carried since the anchor, only the waymark tells a restored origin: that this is not enough for one that went back
    /// to a moment after its last waymark is a stated limit.
    fn is_known_by_what_it_carried(&self) -> bool {
        let copies = self.origins.iter().any(|origin| origin.session.as_ref().is_some_and(|s| s.copying.is_some()));
        let carried = self
            .context
            .judge
            .position()
            .is_none_or(|position| position.state == Phase::Following && position.carried_revision > Revision(0));
        self.origin_snapshot.is_some() && carried && !copies
    }

    fn restore_origin(&mut self) {
        // The next one is taken of the history that begins now.
        let Some(snapshot) = self.origin_snapshot.take() else { return };
        self.context.note(|| format!("the origin is restored to its revision {}", snapshot.revision));
        let passes = self.context.random.percent(60);
        let head_before = self.origin.revision;
        self.origin = snapshot;
        self.origin_changed = true;
        self.compact_max = self.compact_max.min(self.origin.revision);
        self.restored_in = Some(epoch_of(self.context.judge.position()));
        self.lost_through = self.lost_through.max(head_before);
        // A replica that is as it was when nothing had been carried yet: the same limit.
        let position_key = self.origins[0].link.position_key();
        self.replica_snapshot.take_if(|(snapshot, _)| !has_carried(snapshot, &position_key));
        self.context.judge.origin_restored(self.origin.head());
        self.origins.iter_mut().for_each(|origin| origin.tail.break_watch());
        if self.context.fails(500, "sender made anew") {
            // With a disk of its own, beside the restored etcd.
            let at = self.context.random.below(self.origins.len());
            self.origins[at].tail.spool.lose();
            self.origins[at].start_again(self.ranges[self.ranges_now].clone());
        }
        for _ in 0..self.context.random.below(10) {
            self.write();
        }
        // As after some time of use, so that the head alone tells nothing.
        while passes && self.origin.revision < head_before + 2 {
            self.write();
        }
    }

    /// What a link has read in an epoch that was opened since is of the history that goes on. Where the replica may be restored, its position
    /// may be of the one before again.
    pub(super) fn end_restore(&mut self) {
        let position = self.context.judge.position().filter(|position| position.state == Phase::Following);
        let goes_on = !self.may.restore_replica;
        if goes_on && self.restored_in.is_some_and(|epoch| position.is_some_and(|position| position.epoch > epoch)) {
            (self.compact_max, self.restored_in) = (u64::MAX, None);
        }
    }

    fn replace_origin(&mut self) {
        self.origin = Etcd::new(self.origin.cluster.0 + 0x100);
        self.context.note(|| format!("another origin, cluster {}", self.origin.cluster));
        self.origin_changed = true;
        (self.origin_snapshot, self.compact_max, self.restored_in) = (None, u64::MAX, None);
        self.lost_through = 0;
        self.context.judge.origin_replaced(ClusterId(self.origin.cluster.0));
        self.context.judge.origin_wrote(self.origin.head(), &[], self.origin.state());
        self.origins.iter_mut().for_each(Origin::lose_cluster);
        for _ in 0..self.context.random.below(60) {
            self.write();
        }
    }

    /// An operator has read the reason, and wants the replica to be as the origin is.
    pub(super) fn resync(&mut self, at: usize) {
        self.context.count("operator's resync");
        self.context.note(|| "an operator asks for a resync".to_owned());
        self.origins[at].stopped = None;
        self.origins[at].resync = Some(true);
    }
}

fn has_carried(replica: &Etcd, position_key: &Bytes) -> bool {
    let position = replica.get(position_key).and_then(|(json, _)| Position::from_json(&json).ok());
    position.is_none_or(|position| position.carried_revision > Revision(0))
}
