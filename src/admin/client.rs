//! Job: ask a running sidecar over its admin service.
//! Input: where it listens and which certificates to show. Output: replies.
//! Edge: one connection for each question.
//! Always true: an answer or an error that says what to do comes within ten seconds.

use super::proto::admin_client::AdminClient;
use super::proto::{
    AllowReply, AllowRequest, GetConfigurationRequest, GetLogLevelRequest, LogLevelReply, PauseRequest, Paused,
    ResumeRequest, ResyncRequest, SetLogLevelRequest, StatusReply, StatusRequest, WatchStatusRequest,
};
use super::show::printable;
use crate::tls::connect::{ConnectError, PeerConnector, endpoint};
use crate::tls::explain::{explain, wrong_name};
use crate::tls::{self, TlsError, WrongName};
use std::error::Error;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use tonic::transport::{self, Channel};
use tonic::{Code, Response, Status, Streaming};

/// One question: connecting, TLS and the answer together.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// Where the sidecar is, and which certificates to use.
#[derive(Debug, Clone)]
pub struct Connection {
    /// `listen.admin` of its configuration; an unspecified address (`0.0.0.0`) is dialled on loopback.
    pub admin: SocketAddr,
    pub ca: PathBuf,
    /// The operator's pair.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// The sidecar's own certificate (`tls.cert` of its configuration): whom the admin port must name.
    pub own_cert: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(transparent)]
    Certificates(#[from] TlsError),
    #[error("no sidecar answers at {at}: is `etcd-ferry run` up? ({reason})")]
    NoAnswer { at: SocketAddr, reason: String },
    #[error("no answer from {at} within {} s: see the log of the sidecar", TIMEOUT.as_secs())]
    Timeout { at: SocketAddr },
    #[error("no mutual trust with the sidecar at {at}, which was shown {}: {reason}", cert.display())]
    Tls { at: SocketAddr, cert: PathBuf, reason: String },
    #[error("the sidecar at {at} does not take orders from {}: {reason}", cert.display())]
    NotAdmin { at: SocketAddr, cert: PathBuf, reason: String },
    #[error(
        "another sidecar answers at {at}: it is {found}, and tls.cert of this configuration is of {wanted}: give its own --config, or put its own certificate back"
    )]
    OtherSidecar { at: SocketAddr, found: String, wanted: String },
    #[error("what answers at {at} is no admin port: see listen.admin")]
    NoAdminPort { at: SocketAddr },
    #[error("the sidecar at {at} has stopped: see its log, and start it again")]
    Ended { at: SocketAddr },
    #[error("the sidecar at {at} refuses: {reason}")]
    Refused { at: SocketAddr, reason: String },
}

/// Every link of the sidecar, as it is now.
pub async fn status(connection: &Connection) -> Result<StatusReply, ClientError> {
    ask(connection, async |mut client| client.status(StatusRequest {}).await).await
}

/// Hands each status to `show`, at once and then at each interval, until `show` fails or the sidecar stops.
pub async fn watch_status<E: From<ClientError>>(
    connection: &Connection,
    interval_ms: u32,
    mut show: impl FnMut(&StatusReply) -> Result<(), E>,
) -> Result<(), E> {
    let mut statuses = Statuses::open(connection, interval_ms).await?;
    loop {
        show(&statuses.next().await?)?;
    }
}

/// The statuses that a sidecar tells by one call, which is one line in its log.
pub struct Statuses<'c> {
    connection: &'c Connection,
    /// Longer without one, and the sidecar does not answer any more.
    silence_max: Duration,
    told: Streaming<StatusReply>,
}

impl<'c> Statuses<'c> {
    /// The first one is told at once, the others at each interval.
    pub async fn open(connection: &'c Connection, interval_ms: u32) -> Result<Self, ClientError> {
        let calling = async {
            let mut client = AdminClient::new(connect(connection).await?);
            let call = client.watch_status(WatchStatusRequest { interval_ms }).await;
            call.map(Response::into_inner).map_err(|status| refused(connection, &status))
        };
        let late = ClientError::Timeout { at: dialled(connection.admin) };
        let told = tokio::time::timeout(TIMEOUT, calling).await.unwrap_or(Err(late))?;
        Ok(Self { connection, silence_max: TIMEOUT + Duration::from_millis(interval_ms.into()), told })
    }

    /// The next one. An error ends the call.
    pub async fn next(&mut self) -> Result<StatusReply, ClientError> {
        let at = dialled(self.connection.admin);
        let next = tokio::time::timeout(self.silence_max, self.told.message()).await;
        let next = next.map_err(|_| ClientError::Timeout { at })?;
        next.map_err(|status| refused(self.connection, &status))?.ok_or(ClientError::Ended { at })
    }
}

/// The configuration that is in force, as TOML.
pub async fn configuration(connection: &Connection) -> Result<String, ClientError> {
    ask(connection, async |mut client| client.get_configuration(GetConfigurationRequest {}).await)
        .await
        .map(|reply| reply.toml)
}

pub async fn log_level(connection: &Connection) -> Result<LogLevelReply, ClientError> {
    ask(connection, async |mut client| client.get_log_level(GetLogLevelRequest {}).await).await
}

/// Until the sidecar ends.
pub async fn set_log_level(connection: &Connection, level: &str) -> Result<LogLevelReply, ClientError> {
    let request = SetLogLevelRequest { level: level.to_owned() };
    ask(connection, async |mut client| client.set_log_level(request).await).await
}

/// Starts a new base copy of a link; to be asked of the sidecar at the link's origin.
pub async fn resync(connection: &Connection, link: &str, allow_deletes: bool) -> Result<(), ClientError> {
    let request = ResyncRequest { link: link.to_owned(), allow_deletes };
    ask(connection, async |mut client| client.resync(request).await).await.map(|_| ())
}

/// Lets what is held back for its deletes through, once; to be asked of the sidecar at the link's replica. `seq`: only if it is this one.
pub async fn allow(connection: &Connection, link: &str, seq: Option<u64>) -> Result<AllowReply, ClientError> {
    let request = AllowRequest { link: link.to_owned(), seq: seq.unwrap_or_default() };
    ask(connection, async |mut client| client.allow(request).await).await
}

/// Has a link's replica apply nothing; to be asked of its sidecar.
pub async fn pause(connection: &Connection, link: &str) -> Result<Paused, ClientError> {
    let request = PauseRequest { link: link.to_owned() };
    ask(connection, async |mut client| client.pause(request).await).await.map(|reply| reply.paused.unwrap_or_default())
}

/// Has it apply again. `None`: it was not paused.
pub async fn resume(connection: &Connection, link: &str) -> Result<Option<Paused>, ClientError> {
    let request = ResumeRequest { link: link.to_owned() };
    ask(connection, async |mut client| client.resume(request).await).await.map(|reply| reply.paused)
}

/// A channel to the admin port, for any of its services.
pub async fn connect(connection: &Connection) -> Result<Channel, ClientError> {
    let Connection { ca, cert, key, own_cert, .. } = connection;
    let config = tls::admin_client_config(ca, cert, key, own_cert)?;
    let at = dialled(connection.admin);
    let endpoint = endpoint(&format!("https://{at}")).map_err(|error| undialled(connection, &error))?;
    let channel = endpoint.connect_with_connector(PeerConnector::new(config).with_timeout(TIMEOUT)).await;
    channel.map_err(|error: transport::Error| undialled(connection, &error))
}

pub(super) async fn ask<T, F: Future<Output = Result<Response<T>, Status>>>(
    connection: &Connection,
    question: impl FnOnce(AdminClient<Channel>) -> F,
) -> Result<T, ClientError> {
    let exchange = async {
        let client = AdminClient::new(connect(connection).await?);
        question(client).await.map(Response::into_inner).map_err(|status| refused(connection, &status))
    };
    let late = ClientError::Timeout { at: dialled(connection.admin) };
    tokio::time::timeout(TIMEOUT, exchange).await.unwrap_or(Err(late))
}

/// A server listens on all addresses by an unspecified one; a client cannot dial that.
pub(super) fn dialled(mut admin: SocketAddr) -> SocketAddr {
    if admin.ip().is_unspecified() {
        admin.set_ip(match admin.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    admin
}

/// Why no connection came about: nobody there, or somebody else.
fn undialled(connection: &Connection, error: &(dyn Error + 'static)) -> ClientError {
    let at = dialled(connection.admin);
    if let Some(WrongName { wanted, found }) = wrong_name(error) {
        return ClientError::OtherSidecar { at, found: printable(found), wanted: printable(wanted) };
    }
    match connect_error(error) {
        Some(ConnectError::Tcp { source, .. }) => ClientError::NoAnswer { at, reason: source.to_string() },
        Some(ConnectError::TimedOut { .. }) => ClientError::Timeout { at },
        Some(
            ConnectError::Address(_) | ConnectError::Tls { .. } | ConnectError::Protocol { .. } | ConnectError::Own(_),
        )
        | None => ClientError::Tls { at, cert: connection.cert.clone(), reason: printable(&explain(error)) },
    }
}

/// tonic wraps what our connector says in errors of its own.
fn connect_error<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e ConnectError> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(found) = cause.downcast_ref() {
            return Some(found);
        }
        next = cause.source();
    }
    None
}

/// An answer that is none. In TLS 1.3 a server that refuses our certificate says so only here, as the cause of the status.
pub(super) fn refused(connection: &Connection, status: &Status) -> ClientError {
    let (at, cert) = (dialled(connection.admin), connection.cert.clone());
    if status.source().is_some() {
        return ClientError::Tls { at, cert, reason: printable(&explain(status)) };
    }
    if status.code() == Code::Unimplemented {
        return ClientError::NoAdminPort { at };
    }
    let reason = if status.message().is_empty() { status.code().description() } else { status.message() };
    let reason = printable(reason);
    if status.code() == Code::PermissionDenied {
        return ClientError::NotAdmin { at, cert, reason };
    }
    ClientError::Refused { at, reason }
}
