//! Job: the admin gRPC service, with reflection and health beside it.
//! Input: calls over mutual TLS. Output: statuses of the links; commands to a link's own task.
//! Edge: decides only who may call.
//! Always true: nothing is answered to a certificate whose role is not enough (roles.rs); every admin call and every refusal is in the log.

use super::health::{end_health, health_name, report_all};
use super::messages::{
    certificates_message, link_message, member_message, paused_message, record_message, verification_message,
};
use super::proto::admin_server::{self, Admin, AdminServer};
use super::proto::{
    AllowReply, AllowRequest, BundlePart, BundleRequest, DiscardQuarantinedReply, GetCertificatesReply,
    GetCertificatesRequest, GetConfigurationReply, GetConfigurationRequest, GetLogLevelRequest, LogLevelReply,
    PauseReply, PauseRequest, QuarantinedRequest, QuarantinedRevision, ReloadConfigurationReply,
    ReloadConfigurationRequest, RepairRequest, ResumeReply, ResumeRequest, ResyncReply, ResyncRequest,
    RetryQuarantinedReply, SetLogLevelRequest, StatusReply, StatusRequest, Verification, VerifyRequest,
    WatchStatusRequest,
};
use super::roles::{Admins, Denied};
use super::{Directory, LinkCommand, LinkHandle, Own, ReplicaCommand, bundle, certificates, reload, watching};
use crate::certs::PeerIdentity;
use crate::config::effective_toml;
use crate::logs::{self, Logs};
use crate::model::{self, LinkStatus, Seq};
use crate::tls::accept::{self, AcceptLimits, PeerConnectInfo};
use crate::tls::reload::InUse;
use axum::extract::State;
use axum::middleware::{self, Next};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_server;
use tonic_health::server::HealthReporter;
use tonic_reflection::pb::v1::server_reflection_server;
use tracing::{debug, info, warn};

/// Requests hold a name and a few flags.
const REQUEST_BYTES_MAX: usize = 4 * 1024;
/// A link's task answers a command at once or says that it is busy; the client gives up after 10 s.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(8);
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
    #[error("cannot listen at {addr} (listen.admin): is another process there already?")]
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

/// Who calls, once it is known that they may. Put into the request by [`authorise`].
#[derive(Debug, Clone)]
struct Caller {
    /// The one of `tls.admins` or `tls.viewers` that the certificate bears.
    admin: String,
    from: SocketAddr,
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
    Ok(router.layer(middleware::from_fn_with_state(Arc::new(admins), authorise)).into())
}

/// Lets a call in only if its certificate bears a name whose role is enough for it.
async fn authorise(
    State(admins): State<Arc<Admins>>,
    mut request: axum::extract::Request,
    next: Next,
) -> axum::response::Response {
    let call = request.uri().path().to_owned();
    let Some(PeerConnectInfo { remote: from, identity }) = request.extensions().get::<PeerConnectInfo>().cloned()
    else {
        return Status::permission_denied("the connection has no certificate").into_http();
    };
    let admin = match admins.judge(&identity, &call) {
        Ok(admin) => admin,
        Err(denied) => {
            warn!(who = %identity, %from, call, "admin call refused: {denied}");
            return Status::permission_denied(refusal_of(&denied, &identity, &call)).into_http();
        }
    };
    debug!(admin, %from, call, "admin port called");
    request.extensions_mut().insert(Caller { admin, from });
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

struct Service {
    directory: Arc<Directory>,
    own: Own,
    in_use: watch::Receiver<Arc<InUse>>,
    /// Calls that go on telling; they end with their link, or with whoever listens.
    calls: Mutex<JoinSet<()>>,
    /// Places for those who watch the status.
    watchers: Arc<Semaphore>,
    stop: CancellationToken,
}

impl Service {
    fn new(directory: Arc<Directory>, own: Own, in_use: watch::Receiver<Arc<InUse>>, stop: CancellationToken) -> Self {
        let watchers = Arc::new(Semaphore::new(watching::WATCHERS_MAX));
        Self { directory, own, in_use, calls: Mutex::default(), watchers, stop }
    }

    /// On a thread of its own: it reads files.
    async fn certificates(&self) -> Result<GetCertificatesReply, Status> {
        let (in_use, config) = (self.in_use.borrow().clone(), self.own.config());
        let gathering = tokio::task::spawn_blocking(move || certificates::gather(&in_use.credentials, &config));
        gathering.await.map_err(|e| Status::internal(format!("the certificates were not gathered: {e}")))
    }

    /// Runs what goes on telling.
    fn go_on(&self, telling: impl Future<Output = ()> + Send + 'static) {
        let mut calls = lock(&self.calls);
        while calls.try_join_next().is_some() {}
        calls.spawn(telling);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a link says of itself.
type Told = watch::Receiver<LinkStatus>;

/// Tells how far a comparison is, until its end is told or nobody listens.
async fn tell_verification(link: String, run: u64, mut status: Told, out: mpsc::Sender<Result<Verification, Status>>) {
    let mut told = None;
    loop {
        let now = status.borrow_and_update().verification.clone();
        let ended = now.runs >= run;
        if told.as_ref() != Some(&now) {
            told = Some(now.clone());
            if out.send(Ok(verification_message(now))).await.is_err() {
                return;
            }
        }
        if ended {
            return;
        }
        tokio::select! {
            biased;
            () = out.closed() => return,
            changed = status.changed() => if changed.is_err() {
                let gone = format!("link {link}'s task has ended: see the log of the sidecar");
                let _ = out.send(Err(Status::unavailable(gone))).await;
                return;
            }
        }
    }
}

impl Service {
    /// Asks the link's task for a comparison, and tells how it goes.
    async fn compare<T>(
        &self,
        request: &Request<T>,
        call: &str,
        link: &str,
        build: impl FnOnce(oneshot::Sender<Result<u64, String>>) -> LinkCommand,
    ) -> Result<Response<ReceiverStream<Result<Verification, Status>>>, Status> {
        let asked = match commands(&self.directory.links(), link, |handle| handle.commands.clone()) {
            Ok((commands, status)) => command(&commands, link, build).await.map(|run| (run, status)),
            Err(refusal) => Err(refusal),
        };
        audit(request, call, link, &asked.as_ref().map(|_| ()).map_err(Clone::clone));
        let (run, status) = asked?;
        let (out, words) = mpsc::channel(1);
        self.go_on(tell_verification(link.to_owned(), run, status, out));
        Ok(Response::new(ReceiverStream::new(words)))
    }
}

impl Service {
    /// Asks a link's replica, and says so in the log as `call`.
    async fn at_replica<R, T>(
        &self,
        request: &Request<R>,
        call: &str,
        link: &str,
        build: impl FnOnce(oneshot::Sender<Result<T, String>>) -> ReplicaCommand,
    ) -> Result<T, Status> {
        let outcome = match commands(&self.directory.links(), link, |handle| handle.replica_commands.clone()) {
            Ok((commands, _)) => command(&commands, link, build).await,
            Err(refusal) => Err(refusal),
        };
        audit(request, call, link, &outcome.as_ref().map(|_| ()).map_err(Clone::clone));
        outcome
    }

    /// Asks a link's replica about one revision in quarantine.
    async fn quarantined<T>(
        &self,
        request: &Request<QuarantinedRequest>,
        call: &str,
        build: impl FnOnce(Seq, oneshot::Sender<Result<T, String>>) -> ReplicaCommand,
    ) -> Result<T, Status> {
        let QuarantinedRequest { link, seq } = request.get_ref();
        self.at_replica(request, &format!("{call} {seq}"), link, |reply| build(Seq(*seq), reply)).await
    }
}

#[tonic::async_trait]
impl Admin for Service {
    type VerifyStream = ReceiverStream<Result<Verification, Status>>;

    type RepairStream = ReceiverStream<Result<Verification, Status>>;

    type BundleStream = ReceiverStream<Result<BundlePart, Status>>;

    type WatchStatusStream = ReceiverStream<Result<StatusReply, Status>>;

    async fn verify(&self, request: Request<VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let link = &request.get_ref().link;
        self.compare(&request, "Verify", link, |reply| LinkCommand::Verify { reply }).await
    }

    async fn repair(&self, request: Request<RepairRequest>) -> Result<Response<Self::RepairStream>, Status> {
        let RepairRequest { link, allow_deletes } = request.get_ref();
        let call = if *allow_deletes { "Repair --allow-deletes" } else { "Repair" };
        self.compare(&request, call, link, |reply| LinkCommand::Repair { allow_deletes: *allow_deletes, reply }).await
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        audit(&request, "Status", "", &Ok(()));
        Ok(Response::new(status_reply(&self.directory)))
    }

    async fn watch_status(
        &self,
        request: Request<WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        let full =
            |_| Status::resource_exhausted("the status is watched by 16 callers already: end one, or ask Status");
        let asked = watching::interval_of(request.get_ref().interval_ms);
        let asked = asked.and_then(|interval| {
            let place = self.watchers.clone().try_acquire_owned().map_err(full)?;
            Ok((interval, place))
        });
        audit(&request, "WatchStatus", "", &asked.as_ref().map(|_| ()).map_err(Clone::clone));
        let (interval, place) = asked?;
        let (out, statuses) = mpsc::channel(1);
        self.go_on(watching::tell_status(self.directory.clone(), interval, place, self.stop.clone(), out));
        Ok(Response::new(ReceiverStream::new(statuses)))
    }

    async fn get_configuration(
        &self,
        request: Request<GetConfigurationRequest>,
    ) -> Result<Response<GetConfigurationReply>, Status> {
        audit(&request, "GetConfiguration", "", &Ok(()));
        Ok(Response::new(GetConfigurationReply { toml: effective_toml(&self.own.config()) }))
    }

    async fn get_certificates(
        &self,
        request: Request<GetCertificatesRequest>,
    ) -> Result<Response<GetCertificatesReply>, Status> {
        audit(&request, "GetCertificates", "", &Ok(()));
        self.certificates().await.map(Response::new)
    }

    async fn bundle(&self, request: Request<BundleRequest>) -> Result<Response<Self::BundleStream>, Status> {
        audit(&request, "Bundle", "", &Ok(()));
        let certificates = self.certificates().await?;
        let (directory, own) = (self.directory.clone(), self.own.clone());
        let looking = tokio::task::spawn_blocking(move || bundle::files(&directory, &own, &certificates));
        let files = looking.await.map_err(|e| Status::internal(format!("the bundle was not made: {e}")))?;
        let (out, pieces) = mpsc::channel(1);
        self.go_on(bundle::tell(files, self.stop.clone(), out));
        Ok(Response::new(ReceiverStream::new(pieces)))
    }

    async fn get_log_level(&self, request: Request<GetLogLevelRequest>) -> Result<Response<LogLevelReply>, Status> {
        audit(&request, "GetLogLevel", "", &Ok(()));
        Ok(Response::new(log_level(&self.own.logs)))
    }

    async fn set_log_level(&self, request: Request<SetLogLevelRequest>) -> Result<Response<LogLevelReply>, Status> {
        let (logs, level) = (&self.own.logs, &request.get_ref().level);
        let checked = logs::check(level).map_err(|e| Status::invalid_argument(e.to_string()));
        // Before it changes: "off" would keep it out of the log.
        audit(&request, &format!("SetLogLevel {level}"), "", &checked);
        checked?;
        logs.set_level(level).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(log_level(logs)))
    }

    async fn show_quarantined(
        &self,
        request: Request<QuarantinedRequest>,
    ) -> Result<Response<QuarantinedRevision>, Status> {
        let build = |seq, reply| ReplicaCommand::Show { seq, reply };
        self.quarantined(&request, "ShowQuarantined", build).await.map(|record| Response::new(record_message(record)))
    }

    async fn retry_quarantined(
        &self,
        request: Request<QuarantinedRequest>,
    ) -> Result<Response<RetryQuarantinedReply>, Status> {
        let build = |seq, reply| ReplicaCommand::Retry { seq, reply };
        let model::Mended { puts, deletes } = self.quarantined(&request, "RetryQuarantined", build).await?;
        Ok(Response::new(RetryQuarantinedReply { puts, deletes }))
    }

    async fn discard_quarantined(
        &self,
        request: Request<QuarantinedRequest>,
    ) -> Result<Response<DiscardQuarantinedReply>, Status> {
        let build = |seq, reply| ReplicaCommand::Discard { seq, reply };
        self.quarantined(&request, "DiscardQuarantined", build).await?;
        Ok(Response::new(DiscardQuarantinedReply {}))
    }

    async fn allow(&self, request: Request<AllowRequest>) -> Result<Response<AllowReply>, Status> {
        let link = &request.get_ref().link;
        let allowed = self.at_replica(&request, "Allow", link, |reply| ReplicaCommand::Allow { reply }).await?;
        let model::HeldBack { seq, revision, deletes, keys, minute, allowed: _ } = allowed;
        Ok(Response::new(AllowReply { seq: seq.0, origin_revision: revision.0, deletes, keys, minute }))
    }

    async fn pause(&self, request: Request<PauseRequest>) -> Result<Response<PauseReply>, Status> {
        let (link, by) = (&request.get_ref().link, caller(&request));
        let paused = self.at_replica(&request, "Pause", link, |reply| ReplicaCommand::Pause { by, reply }).await?;
        Ok(Response::new(PauseReply { paused: Some(paused_message(paused)) }))
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<ResumeReply>, Status> {
        let (link, by) = (&request.get_ref().link, caller(&request));
        let paused = self.at_replica(&request, "Resume", link, |reply| ReplicaCommand::Resume { by, reply }).await?;
        Ok(Response::new(ResumeReply { paused: paused.map(paused_message) }))
    }

    async fn reload_configuration(
        &self,
        request: Request<ReloadConfigurationRequest>,
    ) -> Result<Response<ReloadConfigurationReply>, Status> {
        let outcome = reload::ask(&self.directory.reloads).await;
        audit(&request, "ReloadConfiguration", "", &outcome.as_ref().map(|_| ()).map_err(Clone::clone));
        outcome.map(Response::new)
    }

    async fn resync(&self, request: Request<ResyncRequest>) -> Result<Response<ResyncReply>, Status> {
        let ResyncRequest { link, allow_deletes } = request.get_ref();
        let outcome = match commands(&self.directory.links(), link, |handle| handle.commands.clone()) {
            Ok((commands, _)) => {
                command(&commands, link, |reply| LinkCommand::Resync { allow_deletes: *allow_deletes, reply }).await
            }
            Err(refusal) => Err(refusal),
        };
        let call = if *allow_deletes { "Resync --allow-deletes" } else { "Resync" };
        audit(&request, call, link, &outcome);
        outcome.map(|()| Response::new(ResyncReply {}))
    }
}

/// What a sidecar says of itself and its links, now.
pub(super) fn status_reply(directory: &Directory) -> StatusReply {
    let Directory { region, node, version, .. } = directory;
    StatusReply {
        region: region.clone(),
        node: node.clone(),
        version: version.clone(),
        links: directory.snapshots().into_iter().map(link_message).collect(),
        etcd: directory.etcd.borrow().iter().cloned().map(member_message).collect(),
        certificates: Some(certificates_message(directory.certificates.borrow().clone())),
    }
}

fn log_level(logs: &Logs) -> LogLevelReply {
    let (level, configured) = logs.levels();
    LogLevelReply { level, configured }
}

/// The name by which the caller was let in.
fn caller<T>(request: &Request<T>) -> String {
    request.extensions().get::<Caller>().map_or_else(String::new, |caller| caller.admin.clone())
}

/// One line in the log for each admin call: who, what, on which link, how it ended.
fn audit<T>(request: &Request<T>, call: &str, link: &str, outcome: &Result<(), Status>) {
    // `authorise` lets nothing through without a caller.
    let Some(Caller { admin, from }) = request.extensions().get::<Caller>() else { return };
    match outcome {
        Ok(()) => info!(admin, %from, call, link, outcome = "done", "admin call"),
        Err(status) => warn!(admin, %from, call, link, outcome = status.message(), "admin call"),
    }
}

/// Where to send a command for this link, or why it cannot be sent from here.
fn commands<C>(
    links: &[LinkHandle],
    name: &str,
    sender: impl Fn(&LinkHandle) -> Option<mpsc::Sender<C>>,
) -> Result<(mpsc::Sender<C>, Told), Status> {
    let named: Vec<&LinkHandle> = links.iter().filter(|handle| handle.link.as_str() == name).collect();
    let taken = |handle: &&LinkHandle| Some((sender(handle)?, handle.status.clone()));
    if let Some(commands) = named.iter().find_map(taken) {
        return Ok(commands);
    }
    if let Some(handle) = named.first() {
        let side = handle.side.as_str();
        let peer = handle.status.borrow().peer.clone();
        let reason = format!("this sidecar is the {side} of link {name}: ask the sidecar at its other side ({peer})");
        return Err(Status::failed_precondition(reason));
    }
    let mut known: Vec<&str> = links.iter().map(|handle| handle.link.as_str()).collect();
    known.dedup();
    Err(Status::not_found(format!("there is no link {name:?} here; there are: {}", known.join(", "))))
}

/// Asks a link's task and waits for its answer.
async fn command<T, C>(
    commands: &mpsc::Sender<C>,
    link: &str,
    build: impl FnOnce(oneshot::Sender<Result<T, String>>) -> C,
) -> Result<T, Status> {
    let ended = || Status::unavailable(format!("link {link}'s task has ended: see the log of the sidecar"));
    let refused = |reason: String| Status::failed_precondition(format!("link {link}: {reason}"));
    let (reply, answer) = oneshot::channel();
    let exchange = async {
        commands.send(build(reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?.map_err(refused)
    };
    let busy = || {
        Status::unavailable(format!("link {link} is busy and did not answer yet: see its status, then repeat the call"))
    };
    tokio::time::timeout(COMMAND_TIMEOUT, exchange).await.unwrap_or_else(|_| Err(busy()))
}
