//! Job: a replica's answer to a hello: who may write the position, and from where to ship.
//! Input: a hello, the position as etcd has it. Output: an answer with an open stream, or a refusal.
//! Synchronous.
//! Always true: as in the product's replica/position.rs, whose calls it stands for; who may write is settled before anything else.

use super::{Replica, Stream};
use crate::simulation::region::Context;
use etcd_ferry::model::{ClusterId, Digest, Epoch, Position, Ranges, Revision, Seq, Term};
use etcd_ferry::replica::admit::Admit;
use etcd_ferry::replica::next::{self, Claimed};
use etcd_ferry::replica::plan::{Answered, TxnTree};
use etcd_ferry::wire::replicate::CopyAck;
use etcd_ferry::wire::window::{Decoder, WindowLimits};

pub struct Hello {
    pub number: u64,
    pub epoch: Epoch,
    pub term: Term,
    pub origin_cluster: ClusterId,
    pub ranges: Ranges,
    pub window: WindowLimits,
}

pub struct HelloAnswer {
    pub position: Option<Position>,
    pub received: (Seq, Revision, Digest),
    pub durable: Seq,
    pub ranges_empty: bool,
}

pub enum HelloRefused {
    Unavailable,
    Fenced,
}

impl Replica {
    pub fn hello(&mut self, hello: Hello, context: &mut Context) -> Result<HelloAnswer, HelloRefused> {
        self.settle_in_flight(context);
        self.read_position(context).map_err(|_| HelloRefused::Unavailable)?;
        let claim = match next::claim(self.position(), hello.origin_cluster, hello.epoch, hello.term) {
            Claimed::Nothing => None,
            Claimed::Holds(claim) => Some(claim),
            Claimed::Fenced => {
                context.count("hello fenced");
                return Err(HelloRefused::Fenced);
            }
            Claimed::TakesOver(next, claim) => {
                context.count("hello takes over");
                let tree = TxnTree { guards: Vec::new(), success: Vec::new() };
                if self.commit(*next, tree, context) != Ok(Answered::Committed) {
                    return Err(HelloRefused::Unavailable);
                }
                let survived = self.survive(50, "receiver crashed between claim and session", context);
                survived.map_err(|_| HelloRefused::Unavailable)?;
                Some(claim)
            }
        };
        if std::mem::take(&mut self.given_up) {
            let (epoch, seq) = self.position().map_or((Epoch(0), Seq(0)), |p| (p.epoch, p.seq));
            self.start_afresh(seq);
            self.journal.reset(epoch.0, seq.0);
        }
        self.claim = claim;
        self.session = hello.number;
        self.ranges = Some(hello.ranges.clone());
        self.copying = None;
        self.progress = None;
        self.stopped = false;
        self.refusal = None;
        self.copy_ack = CopyAck::default();
        self.copy_session = hello.number;
        self.publish(context).map_err(|_| HelloRefused::Unavailable)?;
        let position = self.position().cloned();
        if let Some(position) = &position {
            self.waymark = position.waymark;
        }
        let carried = position
            .as_ref()
            .map_or((Seq(0), Revision(0), Digest::default()), |p| (p.seq, p.carried_revision, p.carried_digest));
        let received = self.journal.last.filter(|(seq, _, _)| *seq > carried.0).unwrap_or(carried);
        let epoch = position.as_ref().map_or(Epoch(0), |p| p.epoch);
        if self.admit.open_epoch(epoch, hello.term, received.0).is_err() {
            self.admit = Admit::new(epoch, hello.term, received.0, []);
        }
        self.judge_memory(context);
        self.stream = Some(Stream {
            number: hello.number,
            decoder: Decoder::new(hello.window),
            ranges: hello.ranges.clone(),
            refused: false,
            copy_told: CopyAck::default(),
        });
        let durable = Seq(self.journal.durable).max(carried.0);
        let ranges_empty = context.replica.count(hello.ranges.pieces()) == 0;
        Ok(HelloAnswer { position, received, durable, ranges_empty })
    }
}
