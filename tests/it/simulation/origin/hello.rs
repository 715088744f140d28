//! Job: a simulated origin's sidecar says hello, asks the product's resume table, and does what that says.
//! Input: its spool and tail, the origin's etcd, the replica's answer. Output: a stream that is open, with its watch or base copy; or its end.
//! Synchronous.
//! Always true: as in the product's origin/hello.rs and origin/decide.rs, whose calls it stands for.

use super::{End, Greeted, Origin, WINDOW};
use crate::simulation::etcd::Etcd;
use crate::simulation::names::name_of;
use crate::simulation::region::Context;
use crate::simulation::replica::{Hello, HelloRefused, Replica};
use crate::simulation::tail::{Ships, TailState, seen_by, waymark_of};
use etcd_ferry::model::{Digest, Epoch, Revision};
use etcd_ferry::origin::resume::{
    self, CarriedCheck, OriginFacts, Received, ReplicaFacts, Resume, SpoolFacts, StopReason, Tailed,
};
use etcd_ferry::wire::digest;

impl Origin {
    /// Says hello and begins to ship.
    pub fn connect(&mut self, number: u64, at: usize, replica: &mut Replica, etcd: &mut Etcd, context: &mut Context) {
        if let Err(end) = self.try_connect(number, at, replica, etcd, context) {
            self.end(end, etcd, context);
        }
    }

    fn try_connect(
        &mut self,
        number: u64,
        at: usize,
        replica: &mut Replica,
        etcd: &mut Etcd,
        context: &mut Context,
    ) -> Result<(), End> {
        let waymark_revision = etcd.get(&self.link.waymark_key()).map_or(Revision(0), |(_, modified)| modified);
        let waymark = waymark_of(etcd, &self.link).unwrap_or_default();
        let ranges = self.tail.ranges.clone();
        let origin_cluster = etcd.cluster;
        let hello = Hello { number, epoch: self.known_epoch, term: self.term, origin_cluster, ranges, window: WINDOW };
        let lost = context.fails(40, "hello lost");
        let answer = if lost && context.random.percent(50) { None } else { Some(replica.hello(hello, context)) };
        let answer = match answer {
            Some(Ok(answer)) if !lost => answer,
            Some(Err(HelloRefused::Fenced)) => {
                self.known_epoch = Epoch(0);
                return Err(End::Again("fenced".to_owned()));
            }
            Some(Ok(_) | Err(HelloRefused::Unavailable)) | None => {
                let facts = self.origin_facts(etcd);
                let decided = resume::decide(self.spool_facts().as_ref(), &ReplicaFacts::Unreachable, &facts);
                context.count(&name_of(&decided));
                return Err(End::Again("the replica did not answer".to_owned()));
            }
        };
        context.note(|| {
            let at = answer.position.as_ref().map(|p| (p.epoch.0, p.seq.0, p.origin_revision.0, p.state));
            format!("{} greets {}: position {at:?}, received {}", self.name, replica.name, answer.received.0)
        });
        let greeted = Greeted { answer, waymark, waymark_revision };
        self.decide(greeted, number, at, etcd, context)
    }

    fn origin_facts(&self, etcd: &Etcd) -> OriginFacts {
        OriginFacts {
            cluster: etcd.cluster,
            head: etcd.head(),
            ranges_digest: digest::of_ranges(&self.tail.ranges),
            waymark: waymark_of(etcd, &self.link),
            carried: CarriedCheck::Open,
            compacted: Revision(0),
        }
    }

    fn spool_facts(&self) -> Option<SpoolFacts> {
        let facts = self.tail.spool_facts();
        (facts.covered > Revision(0)).then_some(facts)
    }

    fn decide(
        &mut self,
        greeted: Greeted,
        number: u64,
        at: usize,
        etcd: &mut Etcd,
        context: &mut Context,
    ) -> Result<(), End> {
        let answer = &greeted.answer;
        let (seq, revision, digest) = answer.received;
        let received = Received { seq, revision, digest };
        let ahead = answer.position.as_ref().is_some_and(|p| seq > p.seq);
        let mut origin = self.origin_facts(etcd);
        if let Some(position) = &answer.position {
            let carried = if ahead { (revision, digest) } else { (position.carried_revision, position.carried_digest) };
            let same_place =
                position.origin_cluster == origin.cluster && position.ranges_digest == origin.ranges_digest;
            let shown = same_place && carried.0 > Revision(0) && origin.head >= carried.0;
            let reached = position.origin_revision.max(carried.0);
            let begins = resume::begins_with(&self.tail.spool_facts(), carried.0, reached);
            if shown && begins {
                context.count("watch begins with the carried revision");
            }
            if same_place {
                self.tail.greeted(seen_by(etcd, &self.link), (shown && begins).then_some(carried));
            }
            if shown {
                let tailed = self.tail.tailed(carried.0);
                origin.carried = if tailed == Tailed::Holds(carried.1) {
                    context.count("carried revision known from the spool");
                    CarriedCheck::Same
                } else {
                    tailed.and(self.tail.probe(carried, etcd))
                };
            }
        }
        let replica = ReplicaFacts::Answered {
            position: answer.position.clone().map(Box::new),
            received: ahead.then_some(received),
        };
        let met = self.recall(answer.position.as_ref(), etcd, context);
        let decided = if self.resync.is_some() {
            resume::resync(answer.position.as_ref())
        } else {
            if let Some(reason) = met {
                context.count("another history remembered");
                return Err(End::OtherHistory(reason));
            }
            let same_origin = answer.position.as_ref().is_some_and(|p| p.origin_cluster == origin.cluster);
            let left = answer.position.as_ref().is_some_and(|position| self.tail.is_of_another(position.run()));
            if left && matches!(self.tail.state, TailState::OtherHistory { .. }) && same_origin {
                context.count("tail compared with what the link has left");
            }
            let usable = match &self.tail.state {
                TailState::OtherHistory { reason } if same_origin && !left => {
                    return Err(End::OtherHistory(reason.clone()));
                }
                TailState::Lost { compacted } => {
                    origin.compacted = *compacted;
                    false
                }
                TailState::OtherHistory { .. } => false,
                TailState::Idle | TailState::Watching | TailState::SpoolFull | TailState::Stopped { .. } => same_origin,
            };
            let position = answer.position.as_ref().filter(|_| usable);
            let ships = position.map_or(Ships::No, |position| {
                let carried = resume::carried(position, ahead.then_some(&received));
                let reached = position.origin_revision.max(carried.0);
                self.tail.ships(position.run(), reached, carried, etcd)
            });
            match ships {
                Ships::Yes => {}
                Ships::No => _ = usable.then(|| context.count("spool of another run")),
                Ships::Restored(revision) => {
                    context.count("spool shows a restored origin");
                    return Err(End::OtherHistory(StopReason::SpooledDiffers { revision }.to_string()));
                }
            }
            let spool = self.spool_facts().filter(|_| ships == Ships::Yes);
            resume::decide(spool.as_ref(), &replica, &origin)
        };
        context.count(&name_of(&decided));
        context.note(|| format!("{}: {decided:?}", self.name));
        let carried = resume::watched_from(&replica, origin.carried).filter(|_| self.resync.is_none());
        self.act(decided, carried, greeted, (number, at), etcd, context)
    }

    /// `stream`: its number, and which replica it goes to. `carried`: what a new watch begins with.
    fn act(
        &mut self,
        decided: Resume,
        carried: Option<(Revision, Digest)>,
        greeted: Greeted,
        stream: (u64, usize),
        etcd: &mut Etcd,
        context: &mut Context,
    ) -> Result<(), End> {
        let failed = |state: TailState| match state {
            TailState::OtherHistory { reason } => End::OtherHistory(reason),
            TailState::Stopped { reason } => End::Stop(reason),
            state @ (TailState::Idle | TailState::Watching | TailState::SpoolFull | TailState::Lost { .. }) => {
                End::Again(format!("the watch did not open: {state:?}"))
            }
        };
        match decided {
            Resume::Stop { reason } => Err(End::OtherHistory(reason.to_string())),
            Resume::Tail { .. } => Err(End::Again("the replica did not answer".to_owned())),
            Resume::ShipFromSpool { after } => {
                self.open(greeted, stream).follow(after);
                self.trim_as_known(context);
                Ok(())
            }
            Resume::WatchFrom { after } => {
                let seen = seen_by(etcd, &self.link);
                self.restart_tail(after, carried, Some(seen), etcd, context)?.map_err(failed)?;
                if let Some(position) = &greeted.answer.position {
                    self.tail.serves(position.run(), Revision(0));
                }
                self.open(greeted, stream).follow(after);
                self.trim_as_known(context);
                Ok(())
            }
            Resume::Copy { epoch, cursor: Some(cursor), .. } => {
                if !cursor.spool_reaches {
                    let seen = seen_by(etcd, &self.link);
                    self.restart_tail(cursor.after, carried, Some(seen), etcd, context)?.map_err(failed)?;
                    if let Some(position) = &greeted.answer.position {
                        self.tail.serves(position.run(), Revision(0));
                    }
                }
                self.copy(epoch, Some(cursor.cursor), greeted, stream, etcd, context)
            }
            // Comparisons and what they mend are not stepped here: a base copy brings what was lost, as it does in the product where the
            // replica is empty or a link back exists.
            Resume::Copy { epoch, cursor: None, .. } | Resume::Repair { epoch, .. } => {
                let epoch = epoch.max(self.known_epoch.next());
                self.copy(epoch, None, greeted, stream, etcd, context)
            }
        }
    }
}
