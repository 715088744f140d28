//! Job: dial the other side: TCP, then TLS, for tonic's `Endpoint::connect_with_connector`.
//! Input: `https://host:port`, a client configuration. Output: a connection to the peer that was meant, or why not.
//! Always true: tonic sees `http://`, since TLS is made here; a dial ends within its time-out.

use super::explain::explain;
use super::recheck::{As, Peer, Rechecked};
use super::reload::InUse;
use super::{TlsError, client_config_from};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::Endpoint;
use tower::Service;

/// How long a dial may take, name lookup, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{0:?} is no address to dial: write https://host:port")]
    Address(String),
    #[error("{at}: no answer within {} ms", timeout.as_millis())]
    TimedOut { at: String, timeout: Duration },
    #[error("{at}: {}", explain(source))]
    Tcp { at: String, source: std::io::Error },
    #[error("{at}: {}{}", explain(source), port_hint(source))]
    Tls { at: String, source: std::io::Error },
    #[error("{at}: the peer does not speak HTTP/2")]
    Protocol { at: String },
    #[error("our own certificates cannot be used: {0}")]
    Own(#[from] TlsError),
}

/// True if a dial failed before either side had judged the other: no answer, a refusal or a reset by the network, not by TLS.
pub fn found_nobody(error: &(dyn std::error::Error + 'static)) -> bool {
    let found = std::iter::successors(Some(error), |error| error.source());
    match found.filter_map(|error| error.downcast_ref::<ConnectError>()).next() {
        Some(ConnectError::Tcp { .. } | ConnectError::TimedOut { .. }) => true,
        // What rustls decides comes as invalid data.
        Some(ConnectError::Tls { source, .. }) => source.kind() != std::io::ErrorKind::InvalidData,
        Some(ConnectError::Address(_) | ConnectError::Protocol { .. } | ConnectError::Own(_)) | None => false,
    }
}

/// What an etcd, a proxy or a port of plain HTTP does with a handshake of ours.
fn port_hint(error: &std::io::Error) -> &'static str {
    let fault = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let wrong_port =
        error.kind() == std::io::ErrorKind::UnexpectedEof || matches!(fault, Some(rustls::Error::InvalidMessage(_)));
    if wrong_port { "; is it the port of a sidecar, and not that of an etcd, of a proxy or of its http?" } else { "" }
}

/// Makes connections for one [`Endpoint`].
#[derive(Clone)]
pub struct PeerConnector {
    with: With,
    timeout: Duration,
}

/// What a dial shows and trusts.
#[derive(Clone)]
enum With {
    Config(Arc<ClientConfig>),
    /// What is in use at the time; the server must bear this SAN, then and whenever that changes.
    InUse(watch::Receiver<Arc<InUse>>, String),
}

/// The endpoint of `https://host:port`, for `connect_with_connector` (or `_lazy`) with a [`PeerConnector`]. With `https`
/// left in it, tonic would make a TLS of its own.
pub fn endpoint(url: &str) -> Result<Endpoint, ConnectError> {
    let invalid = || ConnectError::Address(url.to_owned());
    let rest = url.strip_prefix("https://").ok_or_else(invalid)?;
    Endpoint::from_shared(format!("http://{rest}")).map_err(|_| invalid())
}

impl PeerConnector {
    /// Dials always with the same certificates.
    pub fn new(config: Arc<ClientConfig>) -> Self {
        Self { with: With::Config(config), timeout: CONNECT_TIMEOUT }
    }

    /// Dials with the certificates in use, whoever bears the SAN `peer`; a connection ends when they refuse it.
    pub fn to_peer(in_use: watch::Receiver<Arc<InUse>>, peer: &str) -> Self {
        Self { with: With::InUse(in_use, peer.to_owned()), timeout: CONNECT_TIMEOUT }
    }

    /// Dials within another time than 10 s.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Dials `host:port`. In TLS 1.3 this succeeds before the server has judged our certificate: a refusal comes as an
    /// error of the first read ([`explain`] finds it there).
    async fn dial(mut self, uri: http::Uri) -> Result<TokioIo<Rechecked<TlsStream<TcpStream>>>, ConnectError> {
        let invalid = || ConnectError::Address(uri.to_string());
        let host = uri.host().ok_or_else(invalid)?.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = uri.port_u16().ok_or_else(invalid)?;
        let name = ServerName::try_from(host.clone()).map_err(|_| invalid())?;
        let at = format!("{host}:{port}");

        let timed_out = ConnectError::TimedOut { at: at.clone(), timeout: self.timeout };
        let dial = async {
            let tcp = |source| ConnectError::Tcp { at: at.clone(), source };
            let stream = TcpStream::connect((host.as_str(), port)).await.map_err(tcp)?;
            stream.set_nodelay(true).map_err(tcp)?;
            let tls = |source| ConnectError::Tls { at: at.clone(), source };
            let stream = TlsConnector::from(self.with.config()?).connect(name, stream).await.map_err(tls)?;
            if stream.get_ref().1.alpn_protocol() != Some(super::ALPN) {
                return Err(ConnectError::Protocol { at: at.clone() });
            }
            Ok(TokioIo::new(self.with.hold(stream, at.clone())))
        };
        tokio::time::timeout(self.timeout, dial).await.unwrap_or(Err(timed_out))
    }
}

impl With {
    fn config(&mut self) -> Result<Arc<ClientConfig>, TlsError> {
        match self {
            With::Config(config) => Ok(config.clone()),
            With::InUse(in_use, peer) => {
                client_config_from(&in_use.borrow_and_update().credentials, vec![peer.clone()])
            }
        }
    }

    fn hold(self, stream: TlsStream<TcpStream>, at: String) -> Rechecked<TlsStream<TcpStream>> {
        match self {
            With::Config(_) => Rechecked::never(stream),
            With::InUse(in_use, peer) => {
                let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
                let chain = chain.iter().map(|c| c.clone().into_owned()).collect();
                Rechecked::new(stream, Peer { chain, of: As::Server(vec![peer]), at }, in_use, ())
            }
        }
    }
}

impl Service<http::Uri> for PeerConnector {
    type Response = TokioIo<Rechecked<TlsStream<TcpStream>>>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: http::Uri) -> Self::Future {
        Box::pin(self.clone().dial(uri))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_made_of_https_addresses_only() {
        assert_eq!(endpoint("https://[::1]:7443").unwrap().uri().to_string(), "http://[::1]:7443/");
        assert!(matches!(endpoint("http://a:7443"), Err(ConnectError::Address(_))));
        assert!(matches!(endpoint("https://a b"), Err(ConnectError::Address(_))));
    }
}
