//! Job: within which limits the applier plans: as configured, smaller after a refusal, as configured again once the replica's etcd says others.
//! Input: the configuration, refusals, what the replica's members say that they take. Output: the applier's `RequestLimits`.
//! Edge: waits for the gate; what a refusal teaches is in plan/size.rs.
//! Always true: what was learned of an etcd is forgotten as soon as it says that it takes something else.

use super::apply::{Applier, position_bytes_max};
use super::plan::{LimitRefusal, RequestLimits};
use crate::config::Limits;
use crate::etcd::gate::{ClusterLimits, Gate};
use crate::model::LinkName;
use tokio::sync::watch;

pub(super) struct EtcdLimits {
    pub configured: RequestLimits,
    told: watch::Receiver<ClusterLimits>,
}

impl EtcdLimits {
    pub fn new(limits: &Limits, link: &LinkName, gate: &Gate) -> Self {
        let configured = RequestLimits {
            ops_max: limits.txn_ops_max,
            bytes_max: limits.request_bytes_max,
            bytes_refused: None,
            position_key_bytes: link.position_key().len(),
            position_value_bytes_max: position_bytes_max(None),
        };
        Self { configured, told: gate.limits() }
    }

    /// Until its members say that they take something else than before. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.told.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

impl Applier {
    /// The limits after a refusal: see [`RequestLimits::learned`].
    pub(super) fn learned(&self, refusal: LimitRefusal) -> Option<RequestLimits> {
        let ClusterLimits { least, most } = *self.etcd_limits.told.borrow();
        // Where members take different sizes, nobody says which of them refused.
        let told = least.request_bytes_max.filter(|_| least.request_bytes_max == most.request_bytes_max);
        self.limits.learned(refusal, told.and_then(|bytes| usize::try_from(bytes).ok()))
    }

    /// What was refused before may be taken now.
    pub(super) fn forget_learned(&mut self) {
        let position_value_bytes_max = self.limits.position_value_bytes_max;
        let configured = RequestLimits { position_value_bytes_max, ..self.etcd_limits.configured };
        if self.limits != configured {
            tracing::info!(link = %self.link, ops_max = configured.ops_max, bytes_max = configured.bytes_max,
                "the replica's etcd says other limits than before: what is configured is tried again");
            (self.limits, self.planned) = (configured, None);
        }
    }
}
