//! Job: compact the replica's etcd by age, and give the disk back what that frees, where the configuration asks for it.
//! Input: the replica's etcd, its links' marks and lookouts. Output: compactions, defragmentations; what keeps them from being done, in the log.
//! Edge: a task of its own for all links, since they share one etcd.
//! Always true: what a comparison or a lookout still reads is spared; one member is defragmented at a time, the leader last.

use super::age::{Ages, look_interval, worth_defragmenting};
use super::lookout::LookoutView;
use super::receive::LinkEnd;
use super::told::Told;
use crate::config::CompactConfig;
use crate::etcd::gate::Gate;
use crate::etcd::{Etcd, EtcdError};
use crate::model::Revision;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What of one link tells which revisions it still reads at.
pub struct Reads {
    pub(super) end: Arc<LinkEnd>,
    pub(super) told: watch::Receiver<Told>,
    pub(super) seen: watch::Receiver<LookoutView>,
}

impl Reads {
    fn read_at(&self) -> Vec<Revision> {
        let (told, seen) = (self.told.borrow(), self.seen.borrow());
        let mark = Some(told.marked).filter(|marked| told.connected && *marked > Revision(0));
        let looked = Some(seen.checked).filter(|checked| seen.expected.is_none() && *checked > Revision(0));
        mark.into_iter().chain(looked).collect()
    }
}

/// Compacts one etcd until it is stopped.
pub struct Compactor {
    pub(super) etcd: Arc<Gate>,
    pub(super) config: CompactConfig,
    pub(super) reads: watch::Receiver<Vec<Arc<Reads>>>,
}

impl Compactor {
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.turns() => {}
        }
    }

    async fn turns(&self) {
        let (mut ages, began, mut connected) = (Ages::new(self.config.after), Instant::now(), None);
        let mut trouble = String::new();
        let mut ticks = tokio::time::interval(look_interval(self.config.after));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match Box::pin(self.turn(&mut connected, &mut ages, began.elapsed())).await {
                Ok(()) => trouble.clear(),
                Err(e) => {
                    connected = None;
                    let said = e.to_string();
                    if said != trouble {
                        tracing::warn!(error = %said, "the replica's etcd could not be compacted or defragmented by age; it is tried again");
                        trouble = said;
                    }
                }
            }
        }
    }

    async fn turn(&self, connected: &mut Option<Etcd>, ages: &mut Ages, now: Duration) -> Result<(), EtcdError> {
        let reads = self.reads.borrow().clone();
        let Some(first) = reads.first() else { return Ok(()) };
        let etcd = match connected {
            Some(etcd) => etcd,
            None => connected.insert(self.etcd.connect().await?),
        };
        ages.saw(now, etcd.look(&first.end.config.link.position_key()).await?.head);
        let read_at: Vec<Revision> = reads.iter().flat_map(|reads| reads.read_at()).collect();
        if let Some(through) = ages.due(now, &read_at) {
            match etcd.compact(through).await {
                // Another sidecar of this cluster, or an operator, was first.
                Ok(()) | Err(EtcdError::Compacted) => {}
                Err(e) => return Err(e),
            }
            ages.compacted(through);
            tracing::info!(%through, "the replica's etcd is compacted by age");
        }
        // Whether or not it was compacted now: etcd frees what a compaction lets go of a while after it has answered.
        if self.config.defragment { Box::pin(self.defragment()).await } else { Ok(()) }
    }

    /// Where it is worth it, one member after the other: one that is being defragmented answers nobody.
    async fn defragment(&self) -> Result<(), EtcdError> {
        let mut members = Vec::new();
        for endpoint in &self.etcd.config().endpoints {
            let etcd = self.etcd.connect_to(endpoint).await?;
            members.push((etcd.member().await?, endpoint, etcd));
        }
        members.sort_by_key(|(member, ..)| member.leader);
        for (member, endpoint, etcd) in members {
            if worth_defragmenting(member.bytes, member.bytes_in_use) {
                let began = Instant::now();
                etcd.defragment().await?;
                let after = etcd.member().await?.bytes;
                tracing::info!(%endpoint, bytes_before = member.bytes, bytes = after, seconds = began.elapsed().as_secs_f64(),
                    "a member of the replica's etcd is defragmented");
            }
        }
        Ok(())
    }
}
