//! Job: answer each call of the admin service.
//! Input: calls that may be made (service.rs). Output: what the sidecar says of itself; commands to a link's own task (commands.rs).
//! Edge: reads statuses and files; a call that goes on telling is a task of its own.
//! Always true: every call is in the log, with its caller and its outcome.

use super::audit::{audit, audited, caller};
use super::commands::{command, commands};
use super::messages::{certificates_message, link_message, member_message, paused_message, record_message};
use super::proto::admin_server::Admin;
use super::proto::{
    AllowReply, AllowRequest, BundlePart, BundleRequest, DiscardQuarantinedReply, GetCertificatesReply,
    GetCertificatesRequest, GetConfigurationReply, GetConfigurationRequest, GetLogLevelRequest, LogLevelReply,
    PauseReply, PauseRequest, QuarantinedRequest, QuarantinedRevision, ReloadConfigurationReply,
    ReloadConfigurationRequest, RepairRequest, ResumeReply, ResumeRequest, ResyncReply, ResyncRequest,
    RetryQuarantinedReply, SetLogLevelRequest, StatusReply, StatusRequest, Verification, VerifyRequest,
    WatchStatusRequest,
};
use super::{Directory, LinkCommand, Own, ReplicaCommand, bundle, certificates, reload, watching};
use crate::config::effective_toml;
use crate::logs::{self, Logs};
use crate::model;
use crate::tls::reload::InUse;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

pub(super) struct Service {
    pub(super) directory: Arc<Directory>,
    own: Own,
    in_use: watch::Receiver<Arc<InUse>>,
    /// Calls that go on telling; they end with their link, or with whoever listens.
    calls: Mutex<JoinSet<()>>,
    /// Places for those who watch the status.
    watchers: Arc<Semaphore>,
    bundles: Arc<Semaphore>,
    stop: CancellationToken,
}

impl Service {
    pub(super) fn new(
        directory: Arc<Directory>,
        own: Own,
        in_use: watch::Receiver<Arc<InUse>>,
        stop: CancellationToken,
    ) -> Self {
        let watchers = Arc::new(Semaphore::new(watching::WATCHERS_MAX));
        let bundles = Arc::new(Semaphore::new(bundle::BUNDLES_MAX));
        Self { directory, own, in_use, calls: Mutex::default(), watchers, bundles, stop }
    }

    /// On a thread of its own: it reads files.
    async fn certificates(&self) -> Result<GetCertificatesReply, Status> {
        let (in_use, config) = (self.in_use.borrow().clone(), self.own.config());
        let gathering = tokio::task::spawn_blocking(move || certificates::gather(&in_use.credentials, &config));
        gathering.await.map_err(|e| Status::internal(format!("the certificates were not gathered: {e}")))
    }

    /// The files of a bundle; on a thread of its own, as it reads folders.
    async fn bundled(&self) -> Result<Vec<bundle::BundleFile>, Status> {
        let certificates = self.certificates().await?;
        self.directory.refresh().await;
        let (directory, own) = (self.directory.clone(), self.own.clone());
        let looking = tokio::task::spawn_blocking(move || bundle::files(&directory, &own, &certificates));
        looking.await.map_err(|e| Status::internal(format!("the bundle was not made: {e}")))
    }

    /// Runs what goes on telling.
    pub(super) fn go_on(&self, telling: impl Future<Output = ()> + Send + 'static) {
        let mut calls = lock(&self.calls);
        while calls.try_join_next().is_some() {}
        calls.spawn(telling);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.directory.refresh().await;
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
        audit(&request, "WatchStatus", "", &asked);
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
        audited(&request, "GetCertificates", "", self.certificates()).await.map(Response::new)
    }

    async fn bundle(&self, request: Request<BundleRequest>) -> Result<Response<Self::BundleStream>, Status> {
        let full = |_| Status::resource_exhausted("4 bundles are being told already: ask again in a moment");
        let making = async {
            let place = self.bundles.clone().try_acquire_owned().map_err(full)?;
            Ok((self.bundled().await?, place))
        };
        let (files, place) = audited(&request, "Bundle", "", making).await?;
        let (out, pieces) = mpsc::channel(1);
        self.go_on(bundle::tell(files, place, self.stop.clone(), out));
        Ok(Response::new(ReceiverStream::new(pieces)))
    }

    async fn get_log_level(&self, request: Request<GetLogLevelRequest>) -> Result<Response<LogLevelReply>, Status> {
        audit(&request, "GetLogLevel", "", &Ok(()));
        Ok(Response::new(log_level(&self.own.logs)))
    }

    async fn set_log_level(&self, request: Request<SetLogLevelRequest>) -> Result<Response<LogLevelReply>, Status> {
        let (logs, level) = (&self.own.logs, &request.get_ref().level);
        let checked = logs::check(level).map_err(|e| Status::invalid_argument(e.to_string()));
        let set = checked.and_then(|()| logs.set_level(level).map_err(|e| Status::internal(e.to_string())));
        audit(&request, &format!("SetLogLevel {level}"), "", &set);
        set?;
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
        let AllowRequest { link, seq } = request.get_ref();
        let seq = (*seq > 0).then_some(model::Seq(*seq));
        let allowed = self.at_replica(&request, "Allow", link, |reply| ReplicaCommand::Allow { seq, reply }).await?;
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
        let reloaded = reload::ask(&self.directory.reloads);
        audited(&request, "ReloadConfiguration", "", reloaded).await.map(Response::new)
    }

    async fn resync(&self, request: Request<ResyncRequest>) -> Result<Response<ResyncReply>, Status> {
        let ResyncRequest { link, allow_deletes } = request.get_ref();
        let asked = commands(&self.directory.links(), (link, model::Side::Origin), |handle| handle.commands.clone());
        let build = |reply| LinkCommand::Resync { allow_deletes: *allow_deletes, reply };
        let call = if *allow_deletes { "Resync --allow-deletes" } else { "Resync" };
        audited(&request, call, link, async { command(&asked?.0, link, build).await }).await?;
        Ok(Response::new(ResyncReply {}))
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
