//! Job: the admin gRPC service, with reflection and health beside it.
//! Input: calls over mutual TLS. Output: those that may be made, to calls.rs.
//! Edge: decides only who may call.
//! Always true: nothing is answered to a certificate whose role is not enough (roles.rs); every admin call and every refusal is in the log.

use super::audit::Caller;
use super::calls::Service;
use super::health::{end_health, health_name, report_all};
use super::proto::admin_server::{self, AdminServer};
use super::roles::{Admins, Denied, asked};
use super::{Directory, Own};
use crate::certs::PeerIdentity;
use crate::logs::AUDIT;
use crate::repeats::Repeats;
use crate::tls::accept::{self, AcceptLimits, PeerConnectInfo};
use crate::tls::reload::InUse;
use axum::extract::State;
use axum::middleware::{self, Next};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport;
use tonic_health::pb::health_server;
use tonic_health::server::HealthReporter;
use tonic_reflection::pb::v1::server_reflection_server;
use tracing::{debug, warn};

/// Requests hold a name and a few flags.
const REQUEST_BYTES_MAX: usize = 4 * 1024;
pub(super) const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Operators' tools use a handful; a stranger to the CA gets no further than these.
const LIMITS: AcceptLimits =
    AcceptLimits { handshakes_max: 32, connections_max: 64, handshake_timeout: Duration::from_secs(10) };
const STREAMS_MAX: u32 = 32;
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// A connection whose other end is gone is found by a ping, and closed.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long calls in hand may take once the sidecar stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error("cannot listen at {addr} (listen.admin): {}", super::listen_advice(source))]
    Bind { addr: SocketAddr, source: io::Error },
    #[error("reflection cannot be served: {0}")]
    Reflection(#[source] tonic_reflection::server::Error),
    #[error("the admin service has ended: {0}")]
    Serve(#[source] transport::Error),
}

/// The bound admin listener, not yet serving.
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
    in_use: watch::Receiver<Arc<InUse>>,
    admins: Admins,
}

impl Server {
    pub async fn bind(
        addr: SocketAddr,
        in_use: watch::Receiver<Arc<InUse>>,
        admins: Admins,
    ) -> Result<Self, ServiceError> {
        let listener = TcpListener::bind(addr).await.map_err(|source| ServiceError::Bind { addr, source })?;
        let addr = listener.local_addr().map_err(|source| ServiceError::Bind { addr, source })?;
        Ok(Self { listener, addr, in_use, admins })
    }

    /// The real address, also when port 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until `stop`, then ends the health watches and lets the calls in hand end.
    pub async fn run(self, directory: Arc<Directory>, own: Own, stop: CancellationToken) -> Result<(), ServiceError> {
        let mut reporter = HealthReporter::new();
        let links = directory.links.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(report_all(reporter.clone(), links.clone(), stop.clone()));
        let service = Service::new(directory, own, self.in_use.clone(), stop.clone());
        let routes = routes(service, self.admins, reporter.clone())?;
        let (accept_loop, incoming) = accept::incoming(self.listener, self.in_use, LIMITS, stop.clone());
        tasks.spawn(accept_loop.run());
        let serving = transport::Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_TIMEOUT))
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        let mut serving = Box::pin(serving);
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            ended = &mut serving => return ended.map_err(ServiceError::Serve),
        }
        while tasks.join_next().await.is_some() {}
        let names = links.borrow().iter().map(health_name).collect();
        end_health(&mut reporter, names).await;
        // A call that does not end by then dies with the process.
        match tokio::time::timeout(DRAIN_TIMEOUT, serving).await {
            Ok(ended) => ended.map_err(ServiceError::Serve),
            Err(_) => Ok(()),
        }
    }
}

/// The services of the admin port, behind [`authorise`].
fn routes(service: Service, admins: Admins, health: HealthReporter) -> Result<Routes, ServiceError> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
            // By name, since the descriptors also hold the services of the peer port.
            .with_service_name(admin_server::SERVICE_NAME)
            .with_service_name(health_server::SERVICE_NAME)
            .with_service_name(server_reflection_server::SERVICE_NAME)
    };
    let reflection_v1 = reflection().build_v1().map_err(ServiceError::Reflection)?;
    // Python's client and older grpcurls know only this one.
    let reflection_v1alpha = reflection().build_v1alpha().map_err(ServiceError::Reflection)?;
    let health = tonic_health::server::HealthService::from_health_reporter(health);
    let admin = AdminServer::new(service).max_decoding_message_size(REQUEST_BYTES_MAX);
    let router = Routes::new(admin)
        .add_service(reflection_v1.max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(reflection_v1alpha.max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(health_server::HealthServer::new(health).max_decoding_message_size(REQUEST_BYTES_MAX))
        .into_axum_router();
    let door = Arc::new(Door { admins, refusals: Mutex::default() });
    Ok(router.layer(middleware::from_fn_with_state(door, authorise)).into())
}

/// Who is let in, and who was refused within the last minute.
struct Door {
    admins: Admins,
    refusals: Mutex<Repeats>,
}

/// Lets a call in only if its certificate bears a name whose role is enough for it.
async fn authorise(
    State(door): State<Arc<Door>>,
    mut request: axum::extract::Request,
    next: Next,
) -> axum::response::Response {
    let call = request.uri().path().to_owned();
    let Some(PeerConnectInfo { remote: from, identity }) = request.extensions().get::<PeerConnectInfo>().cloned()
    else {
        return Status::permission_denied("the connection has no certificate").into_http();
    };
    let admin = match door.admins.judge(&identity, &call) {
        Ok(admin) => admin,
        Err(denied) => {
            let words = format!("{identity} {} {call} {denied}", from.ip());
            let mut refusals = door.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            refusals.write(Instant::now(), &words, |left_out| {
                warn!(target: AUDIT, who = %identity, %from, call, left_out, "admin call refused: {denied}");
            });
            drop(refusals);
            return Status::permission_denied(refusal_of(&denied, &identity, &call)).into_http();
        }
    };
    debug!(admin, %from, call, "admin port called");
    request.extensions_mut().insert(Caller { admin, from, asked: asked(&call) });
    next.run(request).await
}

/// Why a call is refused, for whoever called.
fn refusal_of(denied: &Denied, identity: &PeerIdentity, call: &str) -> String {
    match denied {
        Denied::Stranger => format!(
            "this is the admin port, and {identity} is not among its `tls.admins` or `tls.viewers`: an operator shows another certificate (--cert \
             and --key), a sidecar dials the other's listen.peer"
        ),
        Denied::AsksFor { name, asked } => {
            let call = call.rsplit('/').next().unwrap_or_default();
            let role = asked.as_str();
            format!(
                "{call} asks for the {role} role, and {name} is one of `tls.viewers`, who may only look: show a certificate of `tls.admins` \
                 (--cert and --key)"
            )
        }
    }
}
