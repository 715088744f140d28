//! Job: how large a transaction may be, as both sides tell each other.
//! Input: limits of either form. Output: the same in the other form.
//! Pure: no clock, no I/O.
//! Always true: what is not known is 0 on the wire, and never the other way round.

use super::replicate as wire;
use crate::model::limits::{ReplicaLimits, TxnLimits};

impl From<TxnLimits> for wire::TxnLimits {
    fn from(limits: TxnLimits) -> Self {
        let TxnLimits { txn_ops_max, request_bytes_max } = limits;
        Self { txn_ops_max: txn_ops_max.unwrap_or(0), request_bytes_max: request_bytes_max.unwrap_or(0) }
    }
}

impl From<wire::TxnLimits> for TxnLimits {
    fn from(limits: wire::TxnLimits) -> Self {
        let known = |limit| Some(limit).filter(|limit| *limit > 0);
        Self { txn_ops_max: known(limits.txn_ops_max), request_bytes_max: known(limits.request_bytes_max) }
    }
}

impl From<ReplicaLimits> for wire::ReplicaLimits {
    fn from(limits: ReplicaLimits) -> Self {
        Self { etcd: Some(limits.etcd.into()), sidecar: Some(limits.sidecar.into()) }
    }
}

impl From<wire::ReplicaLimits> for ReplicaLimits {
    fn from(limits: wire::ReplicaLimits) -> Self {
        let known = |limits: Option<wire::TxnLimits>| limits.map_or_else(TxnLimits::default, TxnLimits::from);
        Self { etcd: known(limits.etcd), sidecar: known(limits.sidecar) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_cross_the_line_as_they_are_known_or_not() {
        let etcd = TxnLimits { txn_ops_max: Some(128), request_bytes_max: None };
        let sidecar = TxnLimits { txn_ops_max: None, request_bytes_max: Some(5) };
        let limits = ReplicaLimits { etcd, sidecar };
        assert_eq!(ReplicaLimits::from(wire::ReplicaLimits::from(limits)), limits);
        assert_eq!(ReplicaLimits::from(wire::ReplicaLimits::default()), ReplicaLimits::default());
    }
}
