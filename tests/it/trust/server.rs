//! Job: a server behind the real accept loop, certificates for it and for its callers, and its log.
//! Input: TLS configurations. Output: who called; what a caller was told; what the server logged.
//! Edge: listens on loopback.
//! Always true: what is logged is kept for the thread of the test alone.

use etcd_ferry::certs::issue::{IssueRequest, Issuer, Pair};
use etcd_ferry::config::{EtcdConfig, TlsConfig};
use etcd_ferry::tls::accept::{AcceptLimits, PeerConnectInfo, incoming};
use etcd_ferry::tls::connect::{PeerConnector, endpoint};
use etcd_ferry::tls::{Certificates, explain};
use rustls::ClientConfig;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tracing::subscriber::DefaultGuard;

/// One CA and the folder for what it issues.
pub struct Authority {
    pub dir: TempDir,
    pub issuer: Issuer,
}

impl Authority {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let issuer = Issuer::new("test CA").unwrap();
        std::fs::write(dir.path().join("ca.pem"), issuer.ca_pem()).unwrap();
        Self { dir, issuer }
    }

    pub fn east(&self) -> TlsConfig {
        self.tls("us-east-1", &IssueRequest::region("us-east-1"))
    }

    pub fn west(&self) -> TlsConfig {
        self.tls("cn-hangzhou", &IssueRequest::region("cn-hangzhou"))
    }

    pub fn tls(&self, name: &str, request: &IssueRequest) -> TlsConfig {
        self.tls_of(name, &self.issuer.issue(request).unwrap())
    }

    pub fn tls_of(&self, name: &str, pair: &Pair) -> TlsConfig {
        let issued = pair.write(self.dir.path(), name).unwrap();
        let ca = self.dir.path().join("ca.pem");
        TlsConfig { ca, cert: issued.cert, key: issued.key, crl: None, admins: Vec::new(), viewers: Vec::new() }
    }
}

/// What the server logs, in this thread: each test here has a runtime of one thread.
#[derive(Clone, Default)]
pub struct Log(watch::Sender<String>);

impl Log {
    pub fn capture() -> (Self, DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::WARN);
        let subscriber = subscriber.with_writer(move || writer.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    pub fn text(&self) -> String {
        self.0.borrow().clone()
    }

    pub async fn wait_for(&self, words: &str) {
        let mut lines = self.0.subscribe();
        let found = lines.wait_for(|text| text.contains(words));
        let found = tokio::time::timeout(Duration::from_secs(10), found).await.is_ok();
        assert!(found, "the server's log lacks {words:?}:\n{}", self.text());
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.send_modify(|text| text.push_str(&String::from_utf8_lossy(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A running accept loop with grpc.health.v1 behind it.
pub struct Server {
    pub address: SocketAddr,
    shutdown: CancellationToken,
    tasks: [JoinHandle<()>; 2],
    /// Who called, as the service saw it.
    pub callers: Arc<Mutex<Vec<PeerConnectInfo>>>,
}

impl Server {
    pub async fn start(tls: &TlsConfig) -> Self {
        Self::start_with(tls, AcceptLimits::default()).await
    }

    pub async fn start_with(tls: &TlsConfig, limits: AcceptLimits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let certificates = Certificates::load(tls, &EtcdConfig::default()).unwrap();
        let (accept, connections) = incoming(listener, certificates.in_use(), limits, shutdown.clone());
        let (_reporter, health) = tonic_health::server::health_reporter();
        let callers = Arc::new(Mutex::new(Vec::new()));
        let seen = callers.clone();
        let note = move |request: tonic::Request<()>| {
            seen.lock().unwrap().push(request.extensions().get::<PeerConnectInfo>().unwrap().clone());
            Ok(request)
        };
        let router = tonic::transport::Server::builder()
            .layer(tonic::service::InterceptorLayer::new(note))
            .add_service(health)
            .serve_with_incoming_shutdown(connections, shutdown.clone().cancelled_owned());
        let serve = tokio::spawn(async move { router.await.unwrap() });
        Self { address, shutdown, tasks: [tokio::spawn(accept.run()), serve], callers }
    }

    pub async fn call(&self, config: Arc<ClientConfig>) -> Result<(), String> {
        call(self.address, config).await
    }

    pub async fn stop(self) {
        self.shutdown.cancel();
        for task in self.tasks {
            tokio::time::timeout(Duration::from_secs(5), task).await.expect("it stops").unwrap();
        }
    }
}

pub async fn call(address: SocketAddr, config: Arc<ClientConfig>) -> Result<(), String> {
    let endpoint = endpoint(&format!("https://{address}")).unwrap();
    let channel = endpoint.connect_with_connector(PeerConnector::new(config)).await.map_err(|e| explain(&e))?;
    let reply = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    reply.map(drop).map_err(|e| explain(&e))
}

pub fn without_certificate(authority: &Authority) -> Arc<ClientConfig> {
    let roots = etcd_ferry::certs::load::load_roots(&authority.dir.path().join("ca.pem")).unwrap();
    let mut config = ClientConfig::builder_with_provider(etcd_ferry::certs::load::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}
