//! Job: a PKI that speaks Vault's API, as small as one can be: `POST /v1/pki/issue/ferry` with a token, over TLS.
//! Input: how it shall behave. Output: certificates of its CA, and a record of what was asked.
//! Always true: what it issues lives as long as the request's `ttl` says, from now on; its TLS is of another CA than what it issues.

use super::ports::hush;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::serve::Listener;
use etcd_ferry::certs::issue::{IssueRequest, Issuer, Pair};
use etcd_ferry::certs::load::{self, provider};
use rustls::ServerConfig;
use serde_json::{Value, json};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use time::{Duration, OffsetDateTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

pub const TOKEN: &str = "hvs.the-token-that-nobody-shall-read";

/// What is wrong with its next answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Sound,
    Sealed,
    Elsewhere,
    NotInForm,
    OtherName,
    OtherKey,
    Expired,
    OtherCa,
    ClientOnly,
}

/// One request for a certificate, and how long what was issued for it lives.
#[derive(Debug, Clone)]
pub struct Asked {
    pub body: Value,
    pub namespace: Option<String>,
    pub at: OffsetDateTime,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

struct Shared {
    issuer: Issuer,
    other: Issuer,
    answer: Mutex<Answer>,
    asked: Mutex<Vec<Asked>>,
}

pub struct Pki {
    shared: Arc<Shared>,
    address: SocketAddr,
    tls: Arc<ServerConfig>,
    /// Holds the CA of its own TLS, and the token.
    dir: PathBuf,
    listener: std::net::TcpListener,
    task: JoinHandle<()>,
}

impl Pki {
    pub fn start(dir: &Path) -> Self {
        fs::create_dir(dir).unwrap();
        let own = Issuer::new("the CA of the PKI's TLS").unwrap();
        let pair = own.issue(&IssueRequest::region("pki")).unwrap().write(dir, "pki").unwrap();
        fs::write(dir.join("own-ca.pem"), own.ca_pem()).unwrap();
        let (certified, _) = load::load_pair(&pair.cert, &pair.key).unwrap();
        let tls = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
        let resolver = rustls::sign::SingleCertAndKey::from(certified);
        let tls = Arc::new(tls.with_no_client_auth().with_cert_resolver(Arc::new(resolver)));
        let shared = Arc::new(Shared {
            issuer: Issuer::new("the CA of the sidecars").unwrap(),
            other: Issuer::new("another CA").unwrap(),
            answer: Mutex::new(Answer::Sound),
            asked: Mutex::default(),
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let task = serve(shared.clone(), tls.clone(), &listener);
        let pki = Self { shared, address, tls, dir: dir.to_owned(), listener, task };
        pki.write_token(TOKEN);
        pki
    }

    pub fn write_token(&self, token: &str) {
        fs::write(self.token_file(), format!("{token}\n")).unwrap();
        fs::set_permissions(self.token_file(), fs::Permissions::from_mode(0o600)).unwrap();
    }

    pub fn token_file(&self) -> PathBuf {
        self.dir.join("token")
    }

    pub fn own_ca(&self) -> PathBuf {
        self.dir.join("own-ca.pem")
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// `[tls.pki]` of a sidecar.
    pub fn table(&self, name: &str, ttl_seconds: i64) -> toml::Table {
        let path = |path: PathBuf| toml::Value::from(path.display().to_string());
        toml::Table::from_iter([
            ("address".to_owned(), self.url().into()),
            ("ca".to_owned(), path(self.own_ca())),
            ("role".to_owned(), "ferry".into()),
            ("namespace".to_owned(), "team/".into()),
            ("token_file".to_owned(), path(self.token_file())),
            ("names".to_owned(), vec![name].into()),
            ("ttl_seconds".to_owned(), ttl_seconds.into()),
        ])
    }

    pub fn answer(&self, answer: Answer) {
        *self.shared.answer.lock().unwrap() = answer;
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// A pair as it would issue it, but of any time.
    pub fn issue(&self, request: &IssueRequest) -> Pair {
        self.shared.issuer.issue(request).unwrap()
    }

    pub fn ca_pem(&self) -> &str {
        self.shared.issuer.ca_pem()
    }

    /// Nothing listens there any more.
    pub async fn stop(&mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
        hush(&self.listener);
    }

    /// At the address that it had.
    pub fn start_again(&mut self) {
        self.listener = std::net::TcpListener::bind(self.address).unwrap();
        self.task = serve(self.shared.clone(), self.tls.clone(), &self.listener);
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct TlsListener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (tcp, address) = self.tcp.accept().await.unwrap();
            // Whoever does not trust its CA goes away.
            if let Ok(tls) = self.acceptor.accept(tcp).await {
                return (tls, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

fn serve(shared: Arc<Shared>, tls: Arc<ServerConfig>, tcp: &std::net::TcpListener) -> JoinHandle<()> {
    tcp.set_nonblocking(true).unwrap();
    let tcp = TcpListener::from_std(tcp.try_clone().unwrap()).unwrap();
    let router = Router::new().fallback(handle).with_state(shared);
    tokio::spawn(async move {
        axum::serve(TlsListener { tcp, acceptor: TlsAcceptor::from(tls) }, router).await.unwrap();
    })
}

fn refuse(status: StatusCode, words: &str) -> Response {
    (status, Json(json!({ "errors": [words] }))).into_response()
}

async fn handle(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (token, namespace) = (header("x-vault-token"), header("x-vault-namespace"));
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let answer = *shared.answer.lock().unwrap();
    if answer == Answer::Sealed {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "Vault is sealed");
    }
    if token.as_deref() != Some(TOKEN) {
        return refuse(StatusCode::FORBIDDEN, "permission denied");
    }
    if (head.method.as_str(), head.uri.path()) != ("POST", "/v1/pki/issue/ferry") {
        return refuse(StatusCode::NOT_FOUND, "no handler for route");
    }
    let body: Value = serde_json::from_slice(&body).unwrap();
    let request = wanted(&body, answer);
    let (not_before, not_after) = (request.not_before, request.not_after);
    let at = OffsetDateTime::now_utc();
    shared.asked.lock().unwrap().push(Asked { body, namespace, at, not_before, not_after });
    let issuer = if answer == Answer::OtherCa { &shared.other } else { &shared.issuer };
    let pair = issuer.issue(&request).unwrap();
    let second = issuer.issue(&request).unwrap();
    let key = if answer == Answer::OtherKey { &second.key_pem } else { &pair.key_pem };
    if answer == Answer::NotInForm {
        return (StatusCode::OK, "<html>").into_response();
    }
    if answer == Answer::Elsewhere {
        return (StatusCode::TEMPORARY_REDIRECT, [("location", "https://127.0.0.1:1/")]).into_response();
    }
    let answer = json!({
        "request_id": "1",
        "lease_id": "",
        "renewable": false,
        "lease_duration": 0,
        "data": {
            "certificate": pair.cert_pem.trim_end(),
            "issuing_ca": issuer.ca_pem().trim_end(),
            "ca_chain": [issuer.ca_pem().trim_end()],
            "private_key": key.trim_end(),
            "private_key_type": "ec",
            "serial_number": "17:67",
            "expiration": not_after.unix_timestamp(),
        },
        "warnings": null,
        "auth": null,
    });
    Json(answer).into_response()
}

/// What a request asks for, or what goes wrong with it.
fn wanted(body: &Value, answer: Answer) -> IssueRequest {
    let list = |key: &str| -> Vec<String> {
        let text = body[key].as_str().unwrap_or_default();
        text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
    };
    let ttl = body["ttl"].as_str().and_then(|ttl| ttl.strip_suffix('s')).and_then(|ttl| ttl.parse().ok());
    let now = OffsetDateTime::now_utc();
    let request = IssueRequest {
        common_name: body["common_name"].as_str().unwrap_or_default().to_owned(),
        uris: list("uri_sans"),
        dns: list("alt_names"),
        addresses: Vec::new(),
        server_auth: answer != Answer::ClientOnly,
        client_auth: true,
        not_before: now,
        not_after: now + Duration::seconds(ttl.unwrap_or(3_600)),
    };
    if answer == Answer::Expired {
        request.expired()
    } else if answer == Answer::OtherName {
        IssueRequest { uris: vec!["spiffe://etcd-ferry.dev/region/other".to_owned()], ..request }
    } else {
        request
    }
}
