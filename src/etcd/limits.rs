//! Job: ask one member how large a transaction it takes, and tell a link's operator what that comes to.
//! Input: how the member is reached, a key that the user may read. Output: its `TxnLimits`, its `Pulse`; lines in the log.
//! Edge: which numbers are asked about is in bisect.rs, what follows from them in model/limits.rs.
//! Always true: etcd is asked to write nothing, and does not pass the question on to its other members: the transactions read, and fail
//! their compare; the one that would be too large is announced and not sent, so that it needs neither space nor rights.

use super::bisect::Bisect;
use super::{Compare, CompareOp, Etcd, EtcdError, Txn, TxnOp, Watch, WatchSignal, tls_options};
use crate::config::EtcdConfig;
use crate::model::limits::{LimitsStatus, LimitsVerdict, TxnLimits};
use crate::model::{KeyRange, LinkName, Revision, Side};
use crate::tls::EtcdFiles;
use bytes::Bytes;
use etcd_client::GetOptions;
use http::uri::PathAndQuery;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;
use tower::ServiceExt as _;

/// The head of a gRPC message (not compressed, so many bytes follow), and nothing after it. The gRPC library below etcd compares the number
/// with what it takes before it reads on, and names both; no etcd takes so much.
const ANNOUNCED: [u8; 5] = [0, 0xff, 0xff, 0xff, 0xff];
/// What etcd lets a gRPC message have beside `--max-request-bytes` (`grpcOverheadBytes` in its source, in all versions from 3.4 to 3.6).
const GRPC_OVERHEAD_BYTES: u64 = 512 * 1024;
/// It never has a message of more than its head.
const PULSE_MESSAGE_BYTES_MAX: usize = 1 << 20;
const TXN_PATH: &str = "/etcdserverpb.KV/Txn";

/// What a member told.
#[derive(Default)]
pub(super) struct Found {
    /// What it does not tell is `None`.
    pub limits: TxnLimits,
    pub pulse: Option<Pulse>,
    /// Why not all of it is known.
    pub reasons: Vec<EtcdError>,
}

/// A watch that shows nothing, since etcd never comes to where it begins, and that ends with the member's process.
pub(super) struct Pulse {
    watch: Watch,
    stopped: bool,
}

impl Pulse {
    async fn take(etcd: &Etcd, key: &[u8]) -> Result<Self, EtcdError> {
        let range = KeyRange { from: Bytes::copy_from_slice(key), to: Bytes::from([key, &[0]].concat()) };
        let watch = etcd.watch(&range, Revision(u64::MAX), PULSE_MESSAGE_BYTES_MAX).await?;
        Ok(Self { watch, stopped: false })
    }

    pub fn has_stopped(&self) -> bool {
        self.stopped
    }

    /// Cancel-safe.
    pub async fn stops(&mut self) {
        while !self.stopped {
            self.stopped = match self.watch.next().await {
                Ok(Some(WatchSignal::Created | WatchSignal::Progress(_) | WatchSignal::Events { .. })) => false,
                Ok(Some(WatchSignal::Canceled(_) | WatchSignal::Compacted(_)) | None) | Err(_) => true,
            };
        }
    }
}

/// What the one member of `config` takes.
pub(super) async fn of_member(config: &EtcdConfig, files: &EtcdFiles, key: &[u8]) -> Found {
    let asking = async {
        let etcd = Etcd::connect(config, files).await?;
        // Before it is asked, so that no restart is missed. Without the right to it, looks must do.
        let pulse = Pulse::take(&etcd, key).await.ok();
        Ok((txn_ops_max(&etcd, key).await?, pulse))
    };
    let (ops, bytes) = tokio::join!(Box::pin(asking), Box::pin(request_bytes_max(config, files)));
    let mut found = Found::default();
    match ops {
        Ok((ops, pulse)) => (found.limits.txn_ops_max, found.pulse) = (Some(ops), pulse),
        Err(e) => found.reasons.push(e),
    }
    match bytes {
        Ok(bytes) => found.limits.request_bytes_max = Some(bytes),
        Err(e) => found.reasons.push(e),
    }
    found
}

async fn txn_ops_max(etcd: &Etcd, key: &[u8]) -> Result<u64, EtcdError> {
    let mut search = Bisect::new();
    while let Some(ops) = search.question() {
        match etcd.txn(never(key, ops), &format!("read {}", key.escape_ascii())).await {
            Ok(_) => search.answered(ops, true),
            Err(EtcdError::TooManyOps) => search.answered(ops, false),
            Err(e) => return Err(e),
        }
    }
    Ok(search.largest())
}

/// A transaction with so many operations, none of which is ever done: no version is below 0.
fn never(key: &[u8], ops: u64) -> Txn {
    let read = TxnOp::get(key, Some(GetOptions::new().with_count_only()));
    let reads: Vec<TxnOp> = (0..ops).map(|_| read.clone()).collect();
    Txn::new().when([Compare::version(key, CompareOp::Less, 0)]).and_then(reads)
}

async fn request_bytes_max(config: &EtcdConfig, files: &EtcdFiles) -> Result<u64, EtcdError> {
    let address = config.endpoints.first().cloned().unwrap_or_default();
    let unreachable = |e: tonic::transport::Error| EtcdError::Unreachable {
        endpoints: address.clone(),
        reason: super::with_sources(&e),
    };
    let mut endpoint = Endpoint::from_shared(address.clone()).map_err(unreachable)?;
    if let Some(tls) = tls_options(config, files) {
        endpoint = endpoint.tls_config(tls).map_err(unreachable)?;
    }
    let channel = endpoint.connect().await.map_err(unreachable)?;
    let announcing = channel.map_request(|request: http::Request<Body>| {
        request.map(|_| Body::new(axum::body::Body::from(Bytes::from_static(&ANNOUNCED))))
    });
    let mut grpc = Grpc::new(announcing);
    grpc.ready().await.map_err(unreachable)?;
    let (path, nothing) = (PathAndQuery::from_static(TXN_PATH), tonic::Request::new(()));
    match grpc.unary(nothing, path, ProstCodec::<(), ()>::default()).await {
        Ok(_) => Err(EtcdError::Other("etcd took a request that was not sent".to_owned())),
        Err(status) => bytes_in(status.message()).ok_or_else(|| {
            EtcdError::Other(format!("etcd did not say which requests are too large for it: {}", status.message()))
        }),
    }
}

/// Of `grpc: received message larger than max (4294967295 vs. 2097152)`: the second number, without what etcd allows beside a request.
fn bytes_in(refusal: &str) -> Option<u64> {
    let (_, numbers) = refusal.split_once("received message larger than max (")?;
    let (_, most) = numbers.split_once(" vs. ")?;
    let most: u64 = most.split(')').next()?.parse().ok()?;
    most.checked_sub(GRPC_OVERHEAD_BYTES)
}

/// Says what has become of both ends' limits since it was said last.
pub fn tell(link: &LinkName, side: Side, before: Option<&LimitsStatus>, now: Option<&LimitsStatus>) {
    let Some(limits) = now.filter(|now| before != Some(*now)) else { return };
    let (side, advice) = (side.as_str(), &limits.advice);
    match limits.verdict {
        LimitsVerdict::Short => tracing::warn!(%link, side, "{advice}"),
        LimitsVerdict::Tight => tracing::info!(%link, side, "{advice}"),
        LimitsVerdict::Fine => tracing::info!(%link, side, "the replica takes every request that the origin takes"),
        LimitsVerdict::Unknown => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_largest_request_and_other_words_name_none() {
        let refusal = "grpc: received message larger than max (4294967295 vs. 2097152)";
        assert_eq!(bytes_in(refusal), Some(1_572_864));
        for other in [
            "etcdserver: request is too large",
            "grpc: received message larger than max (4294967295 vs. 5)",
            "grpc: received message larger than max (4294967295 vs. many)",
            "grpc: received message larger than max (4294967295",
            "",
        ] {
            assert_eq!(bytes_in(other), None, "{other}");
        }
    }
}
