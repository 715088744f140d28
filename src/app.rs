//! Job: bind every listener and open every disk, then run all links and services; own their tasks and the shutdown.
//! Input: a checked configuration. Output: a running sidecar, until SIGTERM or Ctrl-C.
//! Always true: nothing runs before everything is bound and open; every task is joined; a second Ctrl-C exits at once.

mod links;
mod reload;

use crate::admin::reload::ReloadCommand;
use crate::admin::roles::Admins;
use crate::admin::{self, Directory, Listening, Own};
use crate::config::{Config, Layers};
use crate::etcd::gate::Gate;
use crate::etcd::with_sources;
use crate::logs::Logs;
use crate::metrics;
use crate::model::LINKS_PREFIX;
use crate::pki::Pki;
use crate::replica;
use crate::replica::receive::Receiver;
use crate::tls::accept::LastTurnedAway;
use crate::tls::reload::InUse;
use crate::tls::{Certificates, accept};
use crate::traces;
use crate::wire::HELLO_BYTES_MAX;
use crate::wire::replicate::handshake_server::HandshakeServer;
use crate::wire::replicate::replicate_server::ReplicateServer;
use anyhow::Context;
use bytes::Bytes;
use links::{Ended, Links};
use reload::Reloader;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A link over 100 ms of round trip needs windows of this size to fill 50 MB/s.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams of one peer's connection: a hello and a Ship stream for each link.
const STREAMS_MAX: u32 = 256;
/// SIGTERM stops within 5 s.
const STOP_DEADLINE: Duration = Duration::from_millis(4_500);
/// Their peers have been told by then.
const STREAMS_END_MAX: Duration = Duration::from_millis(500);

/// Runs until SIGTERM or Ctrl-C. `layers`: what `config` was read from, to be read again.
pub async fn run(config: Config, layers: Layers, logs: Logs) -> anyhow::Result<()> {
    // What lies below data_dir holds values: whatever makes a file there, also sled, makes it for this user alone.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let stop = CancellationToken::new();
    let (reloads, reloading) = mpsc::channel(1);
    let mut signals = JoinSet::new();
    signals.spawn(wait_for_signals(stop.clone(), reloads.clone()));
    // A PKI that is to issue the first pair may be away for as long as it likes.
    let Some(bound) = stop.run_until_cancelled(Box::pin(App::bind(config, logs, stop.clone()))).await else {
        tracing::info!("stopped before everything was bound");
        return Ok(());
    };
    bound?.run(layers, reloads, reloading).await
}

async fn wait_for_signals(stop: CancellationToken, reloads: mpsc::Sender<ReloadCommand>) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = hangup.recv() => {
                tracing::info!("SIGHUP: reading the configuration again");
                // One that waits already will read what is there now.
                let _ = reloads.try_send(oneshot::channel().0);
                continue;
            }
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("Ctrl-C: stopping; once more exits at once"),
        }
        if stop.is_cancelled() {
            std::process::exit(1);
        }
        stop.cancel();
    }
}

/// A sidecar with everything bound and open.
pub struct App {
    config: Config,
    logs: Logs,
    stop: CancellationToken,
    etcd: Arc<Gate>,
    certificates: Arc<Certificates>,
    pki: Option<Pki>,
    listening: Listening,
    peer: TcpListener,
    admin: admin::service::Server,
    http: admin::http::Server,
    exporter: metrics::Exporter,
    receiver: Receiver,
    streams: TaskTracker,
    links: Links,
}

impl App {
    /// Binds the listeners, opens the disks, loads the certificates: with a PKI, not before there are any.
    pub async fn bind(config: Config, logs: Logs, stop: CancellationToken) -> anyhow::Result<Self> {
        let exporter = metrics::install()?;
        let pki = config.pki.clone().map(|pki| Pki::new(config.tls.clone(), pki));
        match &pki {
            Some(pki) => Box::pin(pki.prepare()).await,
            None => metrics::record_renewal(0),
        }
        let bind = |what: &'static str, address| async move {
            TcpListener::bind(address).await.map_err(|e| {
                let advice = admin::listen_advice(&e);
                anyhow::Error::new(e).context(format!("cannot listen at {address} (listen.{what}): {advice}"))
            })
        };
        let peer = bind("peer", config.listen.peer).await?;
        let certificates = Arc::new(Certificates::load(&config.tls, &config.etcd)?);
        let (in_use, tls) = (certificates.in_use(), &config.tls);
        let admins = Admins { admins: tls.admins.clone(), viewers: tls.viewers.clone() };
        let admin = admin::service::Server::bind(config.listen.admin, in_use, admins).await?;
        let http = admin::http::Server::bind(config.listen.http).await?;
        let listening = Listening { peer: peer.local_addr()?, admin: admin.local_addr(), http: http.local_addr() };
        let etcd = Arc::new(Gate::new(config.etcd.clone(), certificates.etcd_in_use(), readable_key(&config)));
        let mut links = Links::new(etcd.clone(), certificates.in_use(), stop.clone());
        links.open_all(&config).await?;
        let streams = TaskTracker::new();
        let receiver = Receiver::new(links.ends(), links.turned_away(), &config.region, &config.node, streams.clone());
        Ok(Self {
            config,
            logs,
            stop,
            etcd,
            certificates,
            pki,
            listening,
            peer,
            admin,
            http,
            exporter,
            receiver,
            streams,
            links,
        })
    }

    pub fn listening(&self) -> Listening {
        self.listening
    }

    /// Runs everything until `stop`, or until something fails that must not. `reloading`: what is asked by `reloads`.
    pub async fn run(
        self,
        layers: Layers,
        reloads: mpsc::Sender<ReloadCommand>,
        reloading: mpsc::Receiver<ReloadCommand>,
    ) -> anyhow::Result<()> {
        let Self {
            config,
            logs,
            stop,
            etcd,
            certificates,
            pki,
            listening,
            peer,
            admin,
            http,
            exporter,
            receiver,
            streams,
            mut links,
        } = self;
        tracing::info!(region = %config.region, node = %config.node, version = env!("CARGO_PKG_VERSION"), peer = %listening.peer,
            admin = %listening.admin, http = %listening.http, "running");
        let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
        let directory = Arc::new(Directory {
            region: config.region.clone(),
            node: config.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: Instant::now(),
            listening,
            links: links.shown(),
            reloads,
            etcd: etcd.members(),
            certificates: certificates.status(),
        });
        let (in_force, told) = watch::channel(Arc::new(config.clone()));
        let own = Own { config: told, logs: logs.clone(), exporter: exporter.clone() };
        let (gate, until) = (etcd.clone(), stop.clone());
        start(&mut tasks, async move { gate.run(until).await });
        let turned_away = links.turned_away();
        tasks.spawn(serve_peers(config.clone(), peer, certificates.in_use(), receiver, turned_away, stop.clone()));
        if let Some(traces) = &config.traces {
            let exporter = traces::install(traces, &config.region, &config.node).context("[traces]")?;
            start(&mut tasks, exporter.run(stop.clone()));
        }
        if let Some(pki) = pki {
            let (in_use, until) = (certificates.in_use(), stop.clone());
            start(&mut tasks, Box::pin(async move { pki.run(in_use, until).await }));
        }
        let until = stop.clone();
        start(&mut tasks, async move { certificates.run(until).await });
        tasks.spawn({
            let (directory, stop) = (directory.clone(), stop.clone());
            async move { admin.run(directory, own, stop).await.context("the admin service") }
        });
        start(&mut tasks, http.run(directory, exporter, stop.clone()));
        if let Some(compact) = config.compact {
            let compactor = replica::compactor(etcd.clone(), compact, links.reads());
            start(&mut tasks, Box::pin(compactor.run(stop.clone())));
        }
        links.start(&config);
        let reloader = Reloader::new(layers, config, logs, in_force);
        let outcome = until_over(tasks, links, reloader, reloading, &stop).await;
        streams.close();
        let _ = tokio::time::timeout(STREAMS_END_MAX, streams.wait()).await;
        tracing::info!("stopped");
        outcome
    }
}

/// A task that cannot fail.
fn start(tasks: &mut JoinSet<anyhow::Result<()>>, task: impl Future<Output = ()> + Send + 'static) {
    tasks.spawn(async move {
        task.await;
        Ok(())
    });
}

/// Until all tasks and links have ended, after `stop` or what failed; reloads meanwhile.
async fn until_over(
    mut tasks: JoinSet<anyhow::Result<()>>,
    mut links: Links,
    mut reloader: Reloader,
    mut reloading: mpsc::Receiver<ReloadCommand>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut outcome = Ok(());
    let mut deadline = None;
    while !(tasks.is_empty() && links.is_over()) {
        let failed = tokio::select! {
            biased;
            () = stop.cancelled(), if deadline.is_none() => {
                deadline = Some(tokio::time::Instant::now() + STOP_DEADLINE);
                continue;
            }
            () = until(deadline) => {
                tracing::warn!("not everything stopped in time");
                break;
            }
            Some(ended) = tasks.join_next() => match ended {
                Ok(Ok(())) => continue,
                Ok(Err(e)) => e,
                Err(e) => anyhow::anyhow!("a task failed: {e}"),
            },
            Some(ended) = links.next_end(), if !links.is_over() => {
                reloader.ended(&ended);
                match ended {
                    Ended { result: Ok(()), .. } => continue,
                    Ended { result: Err(e), from_start: true, .. } => e,
                    Ended { link, side, result: Err(e), from_start: false } => {
                        let side = side.as_str();
                        tracing::error!(%link, side, error = with_sources(e.as_ref()), "a link of the last reload has ended; the others go on");
                        continue;
                    }
                }
            }
            Some(reply) = reloading.recv(), if deadline.is_none() => {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    reloaded = reloader.reload(&mut links) => {
                        // Whoever asked may have gone; the log has it.
                        let _ = reply.send(reloaded.map_err(|faults| faults.to_string().lines().map(str::to_owned).collect()));
                    }
                }
                continue;
            }
        };
        tracing::error!(error = with_sources(failed.as_ref()), "stopping: a task failed");
        outcome = Err(failed);
        stop.cancel();
    }
    outcome
}

/// One that this sidecar's user may read in its etcd, as docs/operating.md#users-and-rights-in-etcd states the rights.
fn readable_key(config: &Config) -> Bytes {
    let positions = config.receive.iter().map(|receive| receive.link.position_key());
    let waymarks = config.send.iter().map(|send| send.link.waymark_key());
    positions.chain(waymarks).next().unwrap_or_else(|| Bytes::from_static(LINKS_PREFIX))
}

async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Both gRPC services behind mutual TLS. Each has a limit of its own for what it reads.
async fn serve_peers(
    config: Config,
    listener: TcpListener,
    in_use: watch::Receiver<Arc<InUse>>,
    receiver: Receiver,
    turned_away: LastTurnedAway,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let (accepting, incoming) = accept::incoming(listener, in_use, accept::AcceptLimits::default(), stop.clone());
    let shipment_bytes_max = config.limits.revision_bytes_max.saturating_mul(2).saturating_add(1 << 20);
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_MAX)
        .add_service(HandshakeServer::new(receiver.clone()).max_decoding_message_size(HELLO_BYTES_MAX))
        .add_service(ReplicateServer::new(receiver).max_decoding_message_size(shipment_bytes_max))
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned());
    let mut accept_loop = JoinSet::new();
    accept_loop.spawn(accepting.telling(turned_away).run());
    server.await.context("the peer listener")?;
    while accept_loop.join_next().await.is_some() {}
    Ok(())
}
