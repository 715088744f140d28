//! Job: the http listener: the status page, `/metrics`, `/healthz`, `/readyz`, for people, scrapers and probes.
//! Input: GET requests. Output: text or JSON.
//! Edge: reads statuses, changes nothing.
//! Always true: a connection serves one request and lives ten seconds at most, or ten minutes if it is one of the few that keep a page live, so
//! that nobody can hold the listener; no answer may be read by another web origin.

use super::history::History;
use super::page::{self, Lasting, TELL_EVERY, VIEW_MAX, VIEWERS_MAX};
use super::{Directory, Listening};
use crate::metrics::Exporter;
use crate::model::{CertificatesStatus, EtcdHealth, LinkState, LinkStatus};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// More wait in the kernel's queue. A scraper, two probes and those who watch a page need half of it.
const CONNECTIONS_MAX: usize = 64;
/// A connection, from its acceptance to its end.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Request line and headers together.
const HEAD_BYTES_MAX: usize = 16 * 1024;
const HEADERS_MAX: usize = 64;
/// After an error such as "too many open files": accepting at once would only spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);
/// How long answers in hand may take once the sidecar stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// How often recorded samples are folded into their buckets.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);
/// What a wrong path is answered with.
const PATHS: &str = "\
/                 every link, live, for a browser
/metrics          every metric, in Prometheus' text format
/healthz          200 while this process lives
/healthz?full=1   every link, each stage, and etcd, as JSON
/readyz           200 when every link follows and nothing holds it up, else 503 and a line for each that does not
";

#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("cannot listen at {addr} (listen.http): {}", super::listen_advice(source))]
    Bind { addr: SocketAddr, source: io::Error },
}

/// The bound http listener, not yet serving.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
}

impl Server {
    pub async fn bind(addr: SocketAddr) -> Result<Self, HttpError> {
        let listener = TcpListener::bind(addr).await.map_err(|source| HttpError::Bind { addr, source })?;
        let addr = listener.local_addr().map_err(|source| HttpError::Bind { addr, source })?;
        Ok(Self { listener, addr })
    }

    /// The real address, also when port 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until `stop`, then lets the answers in hand end.
    pub async fn run(self, directory: Arc<Directory>, exporter: Exporter, stop: CancellationToken) {
        let viewers = Arc::new(Semaphore::new(VIEWERS_MAX));
        let shared =
            Shared { directory, exporter: exporter.clone(), history: Arc::default(), viewers, stop: stop.clone() };
        let router = router(shared.clone());
        let mut connections = JoinSet::new();
        let mut upkeep = tokio::time::interval(UPKEEP_INTERVAL);
        let mut looks = tokio::time::interval(TELL_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = upkeep.tick() => exporter.upkeep(),
                _ = looks.tick() => page::note(&shared, &shared.directory.snapshots()),
                Some(_) = connections.join_next() => {}
                accepted = self.listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                    Ok((stream, _)) => {
                        if std::mem::take(&mut failing) {
                            info!("the http listener accepts connections again");
                        }
                        connections.spawn(serve(stream, router.clone()));
                    }
                    Err(error) => {
                        if !std::mem::replace(&mut failing, true) {
                            warn!(%error, "the http listener cannot accept connections");
                        }
                        tokio::time::sleep(ACCEPT_BACKOFF).await;
                    }
                },
            }
        }
        drop(self.listener);
        let drained = async { while connections.join_next().await.is_some() {} };
        // What does not end by then is cut when the set is dropped.
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, drained).await;
    }
}

async fn serve(stream: TcpStream, router: Router) {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(CONNECTION_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .keep_alive(false);
    let lasting = Lasting::default();
    let router = router.layer(Extension(lasting.clone()));
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    // How a client's connection ends is the client's affair: nothing to log, nothing to mend.
    let ended = tokio::time::timeout(CONNECTION_TIMEOUT, connection.as_mut()).await.is_ok();
    if !ended && lasting.load(Ordering::Relaxed) {
        let _ = tokio::time::timeout(VIEW_MAX, connection).await;
    }
}

#[derive(Clone)]
pub(super) struct Shared {
    pub(super) directory: Arc<Directory>,
    exporter: Exporter,
    history: Arc<Mutex<History>>,
    /// Places for those who keep a page live.
    pub(super) viewers: Arc<Semaphore>,
    pub(super) stop: CancellationToken,
}

impl Shared {
    pub(super) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/", get(page::serve_page))
        .route("/events", get(page::serve_events))
        .route("/metrics", get(serve_metrics))
        .route("/healthz", get(serve_health))
        .route("/readyz", get(serve_readiness))
        .fallback(async || plain(StatusCode::NOT_FOUND, format!("no such path; there are:\n\n{PATHS}")))
        .with_state(shared)
}

async fn serve_metrics(State(shared): State<Shared>) -> Response {
    shared.directory.refresh().await;
    let text = shared.exporter.render_links(&shared.directory.snapshots());
    answer(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
}

async fn serve_readiness(State(shared): State<Shared>) -> Response {
    shared.directory.refresh().await;
    match not_ready(&shared.directory.snapshots()) {
        None => plain(StatusCode::OK, format!("ok\n{}", quarantines(&shared.directory.snapshots()))),
        Some(lines) => plain(StatusCode::SERVICE_UNAVAILABLE, lines),
    }
}

async fn serve_health(State(shared): State<Shared>, RawQuery(query): RawQuery) -> Response {
    let full = query.is_some_and(|query| query.split('&').any(|pair| pair == "full=1"));
    if !full {
        return plain(StatusCode::OK, "ok\n".to_owned());
    }
    shared.directory.refresh().await;
    match serde_json::to_string_pretty(&full_health(&shared.directory)) {
        Ok(json) => answer(StatusCode::OK, "application/json", json),
        Err(error) => {
            plain(StatusCode::INTERNAL_SERVER_ERROR, format!("the health cannot be written as JSON: {error}\n"))
        }
    }
}

/// A link that follows in name, while its watch is refused or its replica takes nothing, has a reason.
fn is_ready(link: &LinkStatus) -> bool {
    link.state == LinkState::Following && link.reason.is_empty()
}

/// One line for each link that is not ready; `None` when all are.
fn not_ready(links: &[LinkStatus]) -> Option<String> {
    let line = |link: &LinkStatus| {
        let reason = if link.reason.is_empty() { "no reason given yet" } else { &link.reason };
        format!("{} {} {}: {reason}\n", link.link, link.side.as_str(), link.state.as_str())
    };
    let lines: String = links.iter().filter(|link| !is_ready(link)).map(line).collect();
    (!lines.is_empty()).then_some(lines)
}

/// One line for each link that goes on without some revisions. That was an operator's choice, so it is no reason to take the sidecar out of
/// service: the link carries on.
fn quarantines(links: &[LinkStatus]) -> String {
    let line = |link: &LinkStatus| {
        let count = match link.quarantined_revisions {
            1 => "1 revision".to_owned(),
            count => format!("{count} revisions"),
        };
        format!("{} {}: {count} in quarantine\n", link.link, link.side.as_str())
    };
    links.iter().filter(|link| link.quarantined_revisions > 0).map(line).collect()
}

#[derive(Serialize)]
pub(super) struct FullHealth<'a> {
    region: &'a str,
    node: &'a str,
    version: &'a str,
    uptime_seconds: f64,
    listening: Listening,
    links: Vec<LinkStatus>,
    etcd: Vec<EtcdHealth>,
    certificates: CertificatesStatus,
}

pub(super) fn full_health(directory: &Directory) -> FullHealth<'_> {
    FullHealth {
        region: &directory.region,
        node: &directory.node,
        version: &directory.version,
        uptime_seconds: directory.started.elapsed().as_secs_f64(),
        listening: directory.listening,
        links: directory.snapshots(),
        etcd: directory.etcd.borrow().clone(),
        certificates: directory.certificates.borrow().clone(),
    }
}

pub(super) fn plain(status: StatusCode, text: String) -> Response {
    answer(status, "text/plain; charset=utf-8", text)
}

fn answer(status: StatusCode, content_type: &'static str, body: String) -> Response {
    let mut response = (status, body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{LinkHandle, refresh};
    use crate::metrics;
    use crate::model::{LinkName, Side};
    use std::time::Instant;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::watch;
    use tokio::task::JoinHandle;

    fn link(name: &str, state: LinkState, reason: &str) -> LinkStatus {
        let name = LinkName::new(name).unwrap_or_else(|rule| panic!("{rule}"));
        let mut status = LinkStatus::new(name, Side::Origin, "spiffe://peer".to_owned());
        status.state = state;
        status.reason = reason.to_owned();
        status
    }

    struct Running {
        addr: SocketAddr,
        link: watch::Sender<LinkStatus>,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    async fn start() -> Running {
        let server = Server::bind(([127, 0, 0, 1], 0).into()).await.expect("a free port");
        let addr = server.local_addr();
        let following = link("config", LinkState::Following, "");
        let name = following.link.clone();
        let (sender, status) = watch::channel(following);
        let stop = CancellationToken::new();
        let handle = LinkHandle::new((name, Side::Origin), status, refresh::channel().0, stop);
        let member = EtcdHealth {
            endpoint: "http://127.0.0.1:2379".to_owned(),
            ok: true,
            verdict: "fine",
            ..EtcdHealth::default()
        };
        let directory = Directory {
            region: "us-east-1".to_owned(),
            node: "us-east-1-a".to_owned(),
            version: "9.9.9".to_owned(),
            started: Instant::now(),
            listening: Listening { peer: addr, admin: addr, http: addr },
            links: watch::channel(Arc::from([handle])).1,
            reloads: tokio::sync::mpsc::channel(1).0,
            etcd: watch::channel(vec![member]).1,
            certificates: watch::channel(CertificatesStatus::default()).1,
        };
        let stop = CancellationToken::new();
        let exporter = metrics::install().expect("the process' recorder");
        let task = tokio::spawn(server.run(Arc::new(directory), exporter, stop.clone()));
        Running { addr, link: sender, stop, task }
    }

    /// The whole answer: reading to its end shows that the server closes the connection.
    async fn ask(addr: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(addr).await.expect("the listener");
        stream.write_all(request.as_bytes()).await.expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        answer
    }

    async fn get_path(addr: SocketAddr, path: &str) -> String {
        ask(addr, &format!("GET {path} HTTP/1.1\r\nHost: ferry\r\n\r\n")).await
    }

    #[test]
    fn each_link_that_is_not_following_has_a_line_with_its_reason() {
        let links = [
            link("config", LinkState::Following, ""),
            link("orders", LinkState::SpoolFull, "the spool is full: raise limits.spool_bytes_max"),
            link("users", LinkState::Connecting, ""),
        ];
        let lines = not_ready(&links).unwrap();
        assert_eq!(
            lines,
            "orders origin spool_full: the spool is full: raise limits.spool_bytes_max\n\
             users origin connecting: no reason given yet\n"
        );
        assert_eq!(not_ready(&links[..1]), None);
        assert_eq!(not_ready(&[]), None);
    }

    #[tokio::test]
    async fn readiness_follows_the_link_and_health_does_not() {
        let running = start().await;
        assert!(get_path(running.addr, "/readyz").await.starts_with("HTTP/1.1 200"));

        running.link.send_replace(link("config", LinkState::Stopped, "the origin was restored"));

        let answer = get_path(running.addr, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.ends_with("config origin stopped: the origin was restored\n"), "{answer}");
        assert!(get_path(running.addr, "/healthz").await.starts_with("HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn full_health_is_json_with_links_listeners_and_etcd() {
        let running = start().await;
        let answer = get_path(running.addr, "/healthz?full=1").await;
        let json: serde_json::Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!(json["region"], "us-east-1");
        assert_eq!(json["version"], "9.9.9");
        assert_eq!(json["links"][0]["link"], "config");
        assert_eq!(json["links"][0]["state"], "following");
        assert!(json["links"][0]["stages"].is_array());
        assert_eq!(json["etcd"][0]["endpoint"], "http://127.0.0.1:2379");
        assert_eq!(json["etcd"][0]["verdict"], "fine");
        assert_eq!(json["listening"]["http"], running.addr.to_string());
        assert!(json["uptime_seconds"].as_f64().unwrap() >= 0.0);
    }

    #[tokio::test]
    async fn metrics_show_the_link_as_it_is_when_asked() {
        let running = start().await;
        let mut status = link("http-metrics", LinkState::Following, "");
        status.lag_revisions = 17;
        running.link.send_replace(status);
        let answer = get_path(running.addr, "/metrics").await;
        assert!(answer.contains("etcd_ferry_lag_revisions{link=\"http-metrics\",side=\"origin\"} 17"), "{answer}");
    }

    #[tokio::test]
    async fn what_is_not_served_is_refused_in_words() {
        let running = start().await;
        let answer = get_path(running.addr, "/nowhere").await;
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("/healthz?full=1"), "{answer}");
        for path in ["/", "/events", "/readyz"] {
            let post = format!("POST {path} HTTP/1.1\r\nHost: ferry\r\nContent-Length: 0\r\n\r\n");
            let answer = ask(running.addr, &post).await;
            assert!(answer.starts_with("HTTP/1.1 405"), "{path}: {answer}");
        }
        let long = "x".repeat(HEAD_BYTES_MAX);
        let answer = ask(running.addr, &format!("GET /{long}")).await;
        assert!(answer.starts_with("HTTP/1.1 431") || answer.starts_with("HTTP/1.1 414"), "{answer}");
    }

    #[tokio::test]
    async fn the_page_comes_with_a_policy_that_lets_it_load_nothing_from_elsewhere_and_nobody_frame_it() {
        let running = start().await;
        let answer = get_path(running.addr, "/").await;
        let (head, page) = answer.split_once("\r\n\r\n").expect("a head and a page");
        assert!(head.starts_with("HTTP/1.1 200") && page.starts_with("<!doctype html>"), "{head}");
        let named = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let policy = named("content-security-policy").unwrap_or_else(|| panic!("no policy in {head}"));
        let rules: Vec<&str> = policy.split("; ").collect();
        for rule in ["default-src 'none'", "connect-src 'self'", "form-action 'none'", "frame-ancestors 'none'"] {
            assert!(rules.contains(&rule), "{rule} is not in {policy}");
        }
        for (name, value) in
            [("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"), ("cache-control", "no-store")]
        {
            assert_eq!(named(name), Some(value), "{name} in {head}");
        }
    }

    #[tokio::test]
    async fn stopping_does_not_wait_for_an_idle_connection() {
        let running = start().await;
        let idle = TcpStream::connect(running.addr).await.unwrap();
        // Connections are accepted in their order: after this answer the idle one is open at the server too.
        assert!(get_path(running.addr, "/healthz").await.starts_with("HTTP/1.1 200"));
        running.stop.cancel();
        tokio::time::timeout(CONNECTION_TIMEOUT / 2, running.task).await.unwrap().unwrap();
        assert!(TcpStream::connect(running.addr).await.is_err());
        drop(idle);
    }
}
