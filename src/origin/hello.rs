//! Job: dial the replica's sidecar, and say hello.
//! Input: the addresses of the link, the origin's waymark, what this sidecar claims. Output: an answered hello, or why there is none.
//! Edge: a connection for each hello; the stream that follows goes over it.
//! Always true: a dial and a hello end within their deadlines; a refusal is waited out, and told with the address that refused.

use super::sequence::OriginWaymark;
use super::session::SessionEnd;
use super::ship::{Shipper, at_origin};
use super::tail::seen_by;
use crate::etcd::Etcd;
use crate::model::{Revision, Waymark};
use crate::tls;
use crate::wire::replicate::handshake_client::HandshakeClient;
use crate::wire::replicate::{HelloReply, HelloRequest, Range};
use crate::wire::{PROTOCOL_VERSION, RECEIPT_BYTES_MAX};
use std::time::Duration;
use tonic::Code;
use tonic::transport::Channel;

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const HELLO_DEADLINE: Duration = Duration::from_secs(15);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A hello that was answered, and what it led to.
pub(super) struct Greeted {
    pub channel: Channel,
    pub reply: HelloReply,
    pub etcd: Etcd,
    pub waymark: OriginWaymark,
    pub waymark_revision: Revision,
}

impl Shipper {
    /// Connects to the next address, reads the origin's waymark, and says hello.
    pub(super) async fn greet(&mut self) -> Result<Greeted, SessionEnd> {
        let addresses = &self.origin.send.to;
        let address = addresses[self.next_address % addresses.len()].clone();
        self.next_address += 1;
        let etcd = self.origin.etcd.connect().await.map_err(|e| at_origin(&e))?;
        let look = etcd.look(&self.origin.send.link.waymark_key()).await.map_err(|e| at_origin(&e))?;
        let waymark_revision = look.kv.as_ref().map_or(Revision(0), |kv| kv.mod_revision);
        let (cluster, waymark) = seen_by(&look);
        let channel = self.channel(&address).await?;
        let hello = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            link: self.origin.send.link.as_str().to_owned(),
            epoch: self.claimed_epoch().0,
            term: self.term.0,
            origin_cluster: cluster.0,
            waymark: Some(waymark.present.into()),
            ranges: self
                .origin
                .send
                .ranges
                .pieces()
                .iter()
                .map(|p| Range { from: p.from.clone(), to: p.to.clone() })
                .collect(),
            window_bytes_max: self.origin.limits.window_bytes_max as u64,
            frame_bytes_max: self.origin.limits.frame_bytes_max as u64,
            link_back: self.origin.link_back,
            region: self.origin.region.clone(),
            node: self.origin.node.clone(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let mut client = HandshakeClient::new(channel.clone()).max_decoding_message_size(RECEIPT_BYTES_MAX);
        let reply = match tokio::time::timeout(HELLO_DEADLINE, client.hello(hello)).await {
            Ok(Ok(reply)) => reply.into_inner(),
            Ok(Err(status)) => return Err(refused(&address, &status)),
            Err(_) => {
                return Err(SessionEnd::Wait(format!(
                    "{address} did not answer the hello within {} s",
                    HELLO_DEADLINE.as_secs()
                )));
            }
        };
        if reply.protocol_version != PROTOCOL_VERSION {
            let theirs = reply.protocol_version;
            return Err(SessionEnd::Wait(format!(
                "{address} speaks protocol version {theirs}, this sidecar {PROTOCOL_VERSION}: upgrade the older one"
            )));
        }
        self.heard();
        let fenced = reply.fenced;
        let greeted = Greeted { channel, reply, etcd, waymark, waymark_revision };
        if fenced {
            return Err(self.fenced(&greeted).await.unwrap_or_else(|end| end));
        }
        Ok(greeted)
    }

    async fn channel(&self, address: &str) -> Result<Channel, SessionEnd> {
        let (certificates, peer) = (self.origin.certificates.clone(), &self.origin.send.peer);
        let connector = tls::connect::PeerConnector::to_peer(certificates, peer).with_timeout(CONNECT_DEADLINE);
        let endpoint = tls::connect::endpoint(address)
            .map_err(|e| SessionEnd::Stop(e.to_string()))?
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(2 << 20);
        endpoint.connect_with_connector(connector).await.map_err(|e| {
            let why = tls::explain(&e);
            if tls::connect::found_nobody(&e) {
                SessionEnd::Unreachable(format!("{address} cannot be reached: {why}"))
            } else if tls::is_distrust(&e) {
                SessionEnd::Wait(format!("no mutual trust with {address}: {why}"))
            } else {
                SessionEnd::Wait(format!("no connection to {address}: {why}"))
            }
        })
    }
}

impl From<Waymark> for crate::wire::replicate::Waymark {
    fn from(waymark: Waymark) -> Self {
        Self { counter: waymark.counter, id: waymark.id }
    }
}

impl From<crate::wire::replicate::Waymark> for Waymark {
    fn from(waymark: crate::wire::replicate::Waymark) -> Self {
        Self { counter: waymark.counter, id: waymark.id }
    }
}

/// Refusals of a hello are waited out: the cure is at one of the two configurations or in the replica's etcd.
fn refused(address: &str, status: &tonic::Status) -> SessionEnd {
    // Unavailable without a cause is the peer's own word; with one, the connection's.
    let of_the_peer = matches!(status.code(), Code::PermissionDenied | Code::FailedPrecondition)
        || status.code() == Code::Unavailable && std::error::Error::source(status).is_none();
    let said = if of_the_peer { status.message().to_owned() } else { tls::explain(status) };
    SessionEnd::Wait(format!("{address} refused: {said}"))
}
