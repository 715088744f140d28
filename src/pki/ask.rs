//! Job: one request to a PKI that speaks Vault's API, over HTTP/1.1.
//! Input: whom to ask, the file of the token. Output: what it issued, or why not.
//! Edge: dials, reads files.
//! Always true: it ends within a time and reads no more than a bound; the token is in one header, and never in an error.

use super::PkiError;
use super::answer::{self, Issued};
use crate::certs::load;
use crate::config::PkiConfig;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderValue};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// From the dial to the end of the answer: a PKI makes a key of 4096 bits meanwhile.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// A certificate with a chain of ten has some 20 KiB.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Vault's largest tokens have some hundred bytes; those of others, a few KiB.
const TOKEN_BYTES_MAX: u64 = 64 << 10;

/// Either kind of connection.
trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Wire for S {}

/// Asks for a pair.
pub async fn ask(pki: &PkiConfig) -> Result<Issued, PkiError> {
    let token = token(&pki.token_file)?;
    let exchange = Box::pin(exchange(pki, token));
    let silent = || PkiError::Silent { address: pki.address.clone(), timeout: ANSWER_WITHIN };
    let (status, body) = tokio::time::timeout(ANSWER_WITHIN, exchange).await.map_err(|_| silent())??;
    if status != StatusCode::OK {
        return Err(refused(pki, status, &body));
    }
    answer::read(&body).map_err(|source| PkiError::Unsound { address: pki.address.clone(), source })
}

fn token(path: &Path) -> Result<HeaderValue, PkiError> {
    let unusable = |reason: &str| PkiError::Token { path: path.to_owned(), reason: reason.to_owned() };
    load::check_secret(path)?;
    let read = || {
        if std::fs::metadata(path)?.len() > TOKEN_BYTES_MAX {
            return Err(io::Error::other("it is larger than any token"));
        }
        std::fs::read_to_string(path)
    };
    let text = read().map_err(|e| unusable(&e.to_string()))?;
    let token = text.trim();
    if token.is_empty() {
        return Err(unusable("it is empty"));
    }
    let mut token = HeaderValue::from_str(token).map_err(|_| unusable("it holds what no header can"))?;
    token.set_sensitive(true);
    Ok(token)
}

async fn exchange(pki: &PkiConfig, token: HeaderValue) -> Result<(StatusCode, Bytes), PkiError> {
    let failed =
        |error: &(dyn Error + 'static)| PkiError::Unreachable { address: pki.address.clone(), reason: causes(error) };
    let (wire, host) = dial(pki).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(wire)).await.map_err(|e| failed(&e))?;
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(answer::path(pki))
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .header("X-Vault-Request", "true")
        .header("X-Vault-Token", token);
    if let Some(namespace) = &pki.namespace {
        request = request.header("X-Vault-Namespace", namespace);
    }
    let request = request.body(Full::new(Bytes::from(answer::request(pki).to_string()))).map_err(|e| failed(&e))?;
    let answered = async {
        let answer = sender.send_request(request).await.map_err(|e| failed(&e))?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|e| failed(e.as_ref()))?;
        Ok((head.status, body.to_bytes()))
    };
    tokio::pin!(answered);
    tokio::select! {
        biased;
        answered = &mut answered => answered,
        // It drives the request, and ends before the answer was read only where the other side hung up.
        ended = connection => match ended {
            Ok(()) => answered.await,
            Err(e) => Err(failed(&e)),
        },
    }
}

/// A connection, and what the request says that it was made to.
async fn dial(pki: &PkiConfig) -> Result<(Box<dyn Wire>, String), PkiError> {
    let failed = |reason: String| PkiError::Unreachable { address: pki.address.clone(), reason };
    let uri: http::Uri = pki.address.parse().map_err(|_| failed("it is no address".to_owned()))?;
    let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or_default());
    let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let tcp = TcpStream::connect((name.as_str(), port)).await.map_err(|e| failed(causes(&e)))?;
    let at = format!("{host}:{port}");
    let Some(ca) = &pki.ca else {
        let wire: Box<dyn Wire> = Box::new(tcp);
        return Ok((wire, at));
    };
    let config = ClientConfig::builder_with_provider(load::provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| failed(e.to_string()))?
        .with_root_certificates(load::load_roots(ca)?)
        .with_no_client_auth();
    let name = ServerName::try_from(name).map_err(|e| failed(e.to_string()))?;
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(|e| failed(causes(&e)))?;
    Ok((Box::new(tls), at))
}

fn refused(pki: &PkiConfig, status: StatusCode, body: &[u8]) -> PkiError {
    let words = answer::words(body);
    let advice = match status.as_u16() {
        403 => format!("{words} (may the token in {} do that, and is it still valid?)", pki.token_file.display()),
        404 => format!("{words} (are tls.pki.mount and tls.pki.namespace right?)"),
        300..=399 => "it sends elsewhere: give the address of the node that answers itself".to_owned(),
        _ => words,
    };
    let (address, path) = (pki.address.clone(), answer::path(pki));
    PkiError::Refused { address, path, status: status.as_u16(), reason: advice }
}

/// An error and what caused it, on one line.
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        next = cause.source();
        let text = cause.to_string();
        if !texts.iter().any(|told| told.contains(&text)) {
            texts.push(text);
        }
    }
    texts.join(": ")
}
