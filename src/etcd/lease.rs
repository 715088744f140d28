//! Job: a lease in etcd: keys that live as long as somebody renews it.
//! Input: a connection, a time to live. Output: a `Lease`, and the `Renewals` of one; each answer tells the head.
//! Edge: asks etcd, each time within the deadline of a call.
//! Always true: renewals go over one stream; whoever stops waiting for an answer loses the stream, so that none is taken for another's.

use super::{Etcd, EtcdError, check_cluster, head_of};
use crate::model::Revision;
use etcd_client::{Error as ClientError, LeaseKeepAliveStream, LeaseKeeper, PutOptions, TxnOp};
use std::time::Duration;
use tonic::Code;

/// A lease by its id: keys that are put with it are deleted when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease(i64);

impl Lease {
    /// Puts a key that lives as long as this lease.
    pub fn put(self, key: &[u8], value: Vec<u8>) -> TxnOp {
        TxnOp::put(key, value, Some(PutOptions::new().with_lease(self.0)))
    }
}

/// The stream over which a lease is renewed.
pub struct Renewals {
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
}

/// A lease that lives, and the head at which etcd said so, or an earlier one. `None`: it was not told.
pub type Renewed = (Renewals, Option<Revision>);

impl Etcd {
    /// A lease that ends so long after its last renewal. It makes no revision.
    pub async fn grant(&self, ttl: Duration) -> Result<Lease, EtcdError> {
        let mut client = self.client.lease_client();
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        Ok(Lease(self.within(client.grant(seconds, None)).await?.id()))
    }

    /// Lets the lease's time begin anew, over the stream of its last renewal if that still stands; `None`: it has ended.
    pub async fn renew(&self, lease: Lease, over: Option<Renewals>) -> Result<Option<Renewed>, EtcdError> {
        if let Some(Renewals { mut keeper, mut answers }) = over {
            let renewing = async {
                keeper.keep_alive().await?;
                answers.message().await
            };
            if let Some(answer) = self.within(renewing).await? {
                let (head, cluster) = head_of(answer.header());
                check_cluster(&self.cluster, cluster)?;
                return Ok((answer.ttl() > 0).then_some((Renewals { keeper, answers }, Some(head))));
            }
        }
        let mut client = self.client.lease_client();
        let opening = async {
            match client.keep_alive(lease.0).await {
                Ok((keeper, answers)) => Ok(Some((Renewals { keeper, answers }, None))),
                // The client's own words for an answer without time left.
                Err(ClientError::LeaseKeepAliveError(e)) if e == "lease not found" => Ok(None),
                Err(ClientError::GRpcStatus(status)) if status.code() == Code::NotFound => Ok(None),
                Err(e) => Err(e),
            }
        };
        self.within(opening).await
    }

    /// Ends a lease, and deletes the keys that live with it; one that has ended already is no error.
    pub async fn revoke(&self, lease: Lease) -> Result<(), EtcdError> {
        let mut client = self.client.lease_client();
        let revoking = async {
            match client.revoke(lease.0).await {
                Err(ClientError::GRpcStatus(status)) if status.code() == Code::NotFound => Ok(()),
                answer => answer.map(|_| ()),
            }
        };
        self.within(revoking).await
    }
}
