//! Job: a simulated link that is left alone comes to rest, and is judged there.
//! Input: a world after its faults. Output: passes; or a `Fault`, with how the link stands.
//! Synchronous.
//! Always true: at rest both sides are equal, and stay so.

use super::{ROUNDS_MAX, World, key};
use crate::simulation::disk::Disk;
use crate::simulation::judge::Fault;
use crate::simulation::region::Context;
use crate::simulation::tail::TailState;
use bytes::Bytes;
use etcd_ferry::model::{Change, Phase, Revision};

/// Rounds after that, in which nothing may change any more.
const ROUNDS_AFTER: usize = 12;

impl World {
    /// No more faults: the link has to come to rest, equal, or to have stopped for a reason; then an operator mends it.
    pub(super) fn come_to_rest(&mut self) -> Result<(), Fault> {
        self.context.faults = false;
        let elected = (0..self.origins.len()).rev().max_by_key(|at| self.origins[*at].term).unwrap_or(0);
        self.origins.swap(0, elected);
        self.origins.truncate(1);
        self.origins[0].session = None;
        self.write_changes(vec![Change::Put { key: key("/app/last".to_owned()), value: Bytes::from_static(b"last") }]);
        let mut after = 0;
        for round in 0..ROUNDS_MAX {
            self.context.step += 1;
            self.round(round);
            self.check_stops();
            if let Some(fault) = self.context.fault.take() {
                return Err(fault);
            }
            if self.origins[0].stopped.is_some() {
                self.resync(0);
            }
            if self.is_at_rest() {
                after += 1;
                self.equal()?;
                if after > ROUNDS_AFTER {
                    return Ok(());
                }
            } else {
                after = 0;
            }
        }
        Err(Fault::new("complete", format!("the link did not come to rest: {}", self.describe())))
    }

    pub(super) fn round(&mut self, round: usize) {
        for _ in 0..3 {
            self.origins[0].tail.step(&self.origin, &mut self.context);
            self.ship(0);
            for at in 0..self.replicas.len() {
                self.receive(at);
                self.tell(at);
                self.replicas[at].apply(&mut self.context);
            }
            self.context.commit_pending();
            (0..4).for_each(|_| self.origins[0].take_receipt(&mut self.origin, &mut self.context));
        }
        flush(&mut self.origins[0].tail.spool, &mut self.context);
        for at in 0..self.replicas.len() {
            flush(&mut self.replicas[at].journal, &mut self.context);
            if round % 8 == 7 {
                self.replicas[at].look_again();
                self.replicas[at].dedupe.sync();
            }
        }
    }

    pub(super) fn is_at_rest(&self) -> bool {
        let origin = &self.origins[0];
        let Some(session) = origin.session.as_ref().filter(|session| session.copying.is_none()) else { return false };
        let Some(position) = self.context.judge.position() else { return false };
        let seen = origin.tail.covered >= self.origin.head() && origin.tail.state == TailState::Watching;
        let shipped = origin.tail.spool.last.is_none_or(|(last, _)| last <= session.shipped.cursor);
        let applied = position.seq == session.shipped.seq && position.part == 0;
        let told = session.shipped.acked.applied == position.seq
            && session.shipped.acked.applied_revision >= self.last_carried();
        seen && shipped && applied && told && position.state == Phase::Following && !self.context.has_pending()
    }

    fn last_carried(&self) -> Revision {
        self.origins[0].tail.spool.last.map_or(Revision(0), |(last, _)| last)
    }

    fn equal(&self) -> Result<(), Fault> {
        let (origin, replica) = (self.origin.state(), self.context.replica.state());
        self.context.judge.equal(&origin, &replica, &self.ranges[self.ranges_now])
    }

    fn describe(&self) -> String {
        let origin = &self.origins[0];
        let position =
            self.context.judge.position().map(|p| (p.epoch.0, p.seq.0, p.origin_revision.0, p.state, p.part));
        let session = origin.session.as_ref().map(|s| (s.shipped.seq.0, s.shipped.cursor.0, s.copying.is_some()));
        let spool = (origin.tail.spool.base(), origin.tail.spool.covered, origin.tail.spool.last);
        format!(
            "tail {:?} at {}, head {}, spool {spool:?}, position {position:?}, session {session:?}",
            origin.tail.state,
            origin.tail.covered,
            self.origin.head()
        )
    }
}

fn flush<T: etcd_ferry::segment::feed::FeedEntry>(disk: &mut Disk<T>, context: &mut Context) {
    disk.write(&mut context.random);
    disk.sync();
}
