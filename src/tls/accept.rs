//! Job: take TCP connections, shake hands with each, and hand on those whose certificate is of our CA.
//! Input: a bound listener. Output: a stream of [`PeerConnection`]s for `serve_with_incoming`; log lines for the rest.
//! Always true: the stream never errs; no handshake waits for another one, lasts longer than its time-out, or goes on
//! after shutdown; at most `handshakes_max` are under way and `connections_max` open, and further connections wait in the kernel.

use super::explain::explain;
use super::recheck::{As, Peer, Rechecked};
use super::reload::InUse;
use crate::certs::identity::PeerIdentity;
use crate::repeats::Repeats;
use crate::retry::Backoff;
use rustls::pki_types::CertificateDer;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

/// How long a refused peer may take to read why: closing at once, with its bytes unread, would reset the connection and
/// throw the alert away.
const LINGER: Duration = Duration::from_secs(1);
/// What is read, and thrown away, of a refused peer.
const LINGER_BYTES_MAX: u64 = 64 << 10;
/// Connections that are through their handshake and not yet taken by the server.
const READY_MAX: usize = 16;

/// The bounds of one listener.
#[derive(Debug, Clone, Copy)]
pub struct AcceptLimits {
    pub handshakes_max: usize,
    /// Those in their handshake are counted too.
    pub connections_max: usize,
    pub handshake_timeout: Duration,
}

impl Default for AcceptLimits {
    /// 10 s is far above the slowest honest handshake; a stranger who stalls on all 128 stops new peers for that long, and leaves
    /// half of the connections to those whose certificate is of our CA: one each is what a sidecar needs.
    fn default() -> Self {
        Self { handshakes_max: 128, connections_max: 256, handshake_timeout: Duration::from_secs(10) }
    }
}

/// Who is at the other end of a call: found in the extensions of each `tonic::Request`.
#[derive(Debug, Clone)]
pub struct PeerConnectInfo {
    pub remote: SocketAddr,
    pub identity: Arc<PeerIdentity>,
}

/// What the server is given: never an error, at which tonic would stop serving.
pub type Incoming = ReceiverStream<Result<PeerConnection, Infallible>>;

/// A connection with a known peer.
pub type PeerConnection = Rechecked<TlsStream<TcpStream>, Kept>;

/// What a connection keeps until it ends.
pub struct Kept {
    peer: PeerConnectInfo,
    /// Given back then.
    _place: OwnedSemaphorePermit,
}

/// The loop behind one [`Incoming`]; its owner runs and joins it.
pub struct AcceptLoop {
    listener: TcpListener,
    in_use: watch::Receiver<Arc<InUse>>,
    limits: AcceptLimits,
    places: Arc<Semaphore>,
    ready: mpsc::Sender<Result<PeerConnection, Infallible>>,
    turned_away: Option<LastTurnedAway>,
    shutdown: CancellationToken,
}

/// A caller that was turned away, by its certificate, by ours, or for what it asked: the last one.
#[derive(Debug, Clone)]
pub struct TurnedAway {
    pub from: IpAddr,
    pub reason: String,
    pub at: Instant,
}

impl TurnedAway {
    pub fn now(remote: SocketAddr, reason: String) -> Self {
        Self { from: remote.ip(), reason, at: Instant::now() }
    }
}

/// Where it is told.
pub type LastTurnedAway = watch::Sender<Option<TurnedAway>>;

struct Refused {
    remote: SocketAddr,
    reason: String,
    /// It went away by itself before anything was refused, as the probes of load balancers do.
    left: bool,
}

enum Event {
    Shutdown,
    Accepted(io::Result<(TcpStream, SocketAddr)>, OwnedSemaphorePermit),
    Shaken(Result<Result<Box<PeerConnection>, Refused>, JoinError>),
}

/// The stream for the server, and the loop that feeds it.
pub fn incoming(
    listener: TcpListener,
    in_use: watch::Receiver<Arc<InUse>>,
    limits: AcceptLimits,
    shutdown: CancellationToken,
) -> (AcceptLoop, Incoming) {
    let (ready, taken) = mpsc::channel(READY_MAX);
    let places = Arc::new(Semaphore::new(limits.connections_max.clamp(1, Semaphore::MAX_PERMITS)));
    let turned_away = None;
    (AcceptLoop { listener, in_use, limits, places, ready, turned_away, shutdown }, ReceiverStream::new(taken))
}

impl AcceptLoop {
    /// Tells there who was turned away last.
    pub fn telling(self, turned_away: LastTurnedAway) -> Self {
        Self { turned_away: Some(turned_away), ..self }
    }

    /// Runs until shutdown, or until the server has dropped its stream. Then the stream ends, handshakes under way are
    /// cut, and connections that were handed on live on.
    pub async fn run(self) {
        let mut handshakes = JoinSet::new();
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let mut log = Repeats::default();
        loop {
            let room = handshakes.len() < self.limits.handshakes_max.max(1);
            let event = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => Event::Shutdown,
                Some(shaken) = handshakes.join_next() => Event::Shaken(shaken),
                Ok((place, accepted)) = accept(&self.listener, &self.places), if room => Event::Accepted(accepted, place),
            };
            let goes_on = match event {
                Event::Shutdown => false,
                Event::Accepted(Ok((tcp, remote)), place) => {
                    backoff.succeeded();
                    let handshake = handshake(self.in_use.clone(), tcp, remote, self.limits.handshake_timeout, place);
                    handshakes.spawn(Box::pin(handshake));
                    true
                }
                Event::Accepted(Err(error), _) => {
                    log.write(Instant::now().into_std(), &error.to_string(), |left_out| {
                        tracing::warn!(%error, left_out, "a connection cannot be accepted; trying again");
                    });
                    // Finished handshakes wait meanwhile: without file descriptors little else can go on either.
                    self.pause(backoff.after_failure(rand::random())).await
                }
                Event::Shaken(Ok(Ok(connection))) => self.hand_on(*connection).await,
                Event::Shaken(Ok(Err(Refused { remote, reason, left: true }))) => {
                    tracing::debug!(%remote, %reason, "a connection ended before its handshake did");
                    true
                }
                Event::Shaken(Ok(Err(Refused { remote, reason, left: false }))) => {
                    let words = format!("{} {reason}", remote.ip());
                    log.write(Instant::now().into_std(), &words, |left_out| {
                        tracing::warn!(%remote, %reason, left_out, "a connection was refused");
                    });
                    if let Some(turned_away) = &self.turned_away {
                        turned_away.send_replace(Some(TurnedAway::now(remote, reason)));
                    }
                    true
                }
                Event::Shaken(Err(error)) => {
                    tracing::error!(%error, "a handshake ended in a bug of ours; please report it");
                    true
                }
            };
            if !goes_on {
                break;
            }
        }
        handshakes.shutdown().await;
    }

    async fn pause(&self, wait: Duration) -> bool {
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => false,
            () = tokio::time::sleep(wait) => true,
        }
    }

    async fn hand_on(&self, connection: PeerConnection) -> bool {
        let peer = &connection.kept.peer;
        tracing::debug!(remote = %peer.remote, peer = %peer.identity, "a connection was accepted");
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => false,
            sent = self.ready.send(Ok(connection)) => sent.is_ok(),
        }
    }
}

/// A place first, so that what finds none stays in the kernel. Cancel-safe: a place that leads to nothing is given back.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Result<(OwnedSemaphorePermit, io::Result<(TcpStream, SocketAddr)>), AcquireError> {
    let place = places.clone().acquire_owned().await?;
    Ok((place, listener.accept().await))
}

async fn handshake(
    mut in_use: watch::Receiver<Arc<InUse>>,
    tcp: TcpStream,
    remote: SocketAddr,
    timeout: Duration,
    place: OwnedSemaphorePermit,
) -> Result<Box<PeerConnection>, Refused> {
    let refused = |reason| Refused { remote, reason, left: false };
    // Without it the last part of each small frame would wait for an acknowledgement.
    tcp.set_nodelay(true).map_err(|e| refused(explain(&e)))?;
    let acceptor = TlsAcceptor::from(in_use.borrow_and_update().server.clone());
    match tokio::time::timeout(timeout, acceptor.accept(tcp).into_fallible()).await {
        Err(_) => Err(refused(format!("it did not finish its TLS handshake within {} ms", timeout.as_millis()))),
        Ok(Err((error, tcp))) => {
            linger(tcp).await;
            let left = matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset);
            Err(Refused { left, ..refused(explain(&error)) })
        }
        Ok(Ok(stream)) => match identity(&stream) {
            Ok((identity, chain)) => {
                let at = format!("{identity} from {remote}");
                let kept = Kept { peer: PeerConnectInfo { remote, identity: Arc::new(identity) }, _place: place };
                Ok(Box::new(Rechecked::new(stream, Peer { chain, of: As::Client, at }, in_use, kept)))
            }
            Err(reason) => Err(refused(reason)),
        },
    }
}

/// Lets the peer read our alert before the connection goes.
async fn linger(mut tcp: TcpStream) {
    let read_out = async {
        tcp.shutdown().await?;
        tokio::io::copy(&mut tcp.take(LINGER_BYTES_MAX), &mut tokio::io::sink()).await
    };
    // Whether the peer took the chance makes no difference to us.
    let _ = tokio::time::timeout(LINGER, read_out).await;
}

fn identity(stream: &TlsStream<TcpStream>) -> Result<(PeerIdentity, Vec<CertificateDer<'static>>), String> {
    let (_, session) = stream.get_ref();
    let chain = session.peer_certificates().unwrap_or_default();
    let leaf = chain.first().ok_or("the peer presented no certificate")?;
    let identity = PeerIdentity::from_der(leaf).map_err(|e| format!("the peer's certificate is refused: {e}"))?;
    Ok((identity, chain.iter().map(|c| c.clone().into_owned()).collect()))
}

impl Connected for PeerConnection {
    type ConnectInfo = PeerConnectInfo;

    fn connect_info(&self) -> PeerConnectInfo {
        self.kept.peer.clone()
    }
}
