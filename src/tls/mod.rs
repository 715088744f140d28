//! Job: mutual TLS between sidecars and for the admin service: whom to let in, whom to talk to, and why not.
//! Input: a CA, a certificate with its key, names. Output: rustls configurations; connections with a known peer.
//! Always true: TLS 1.3 with certificates at both ends; every connection makes a full handshake, since a resumed one
//! would skip the check of the peer's certificate.

pub mod accept;
pub mod connect;
mod etcd_files;
pub mod explain;
mod recheck;
pub mod reload;
mod stamps;
mod verify;

use crate::certs::load::{self, Credentials, LoadError, TlsFiles};
use crate::config::TlsConfig;
use rustls::client::Resumption;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, ServerConfig};
use std::path::Path;
use std::sync::Arc;

pub use crate::certs::identity::PeerIdentity;
pub use etcd_files::EtcdFiles;
pub use explain::{explain, is_distrust};
pub use reload::Certificates;
pub use verify::WrongName;

/// HTTP/2, the only protocol spoken inside.
const ALPN: &[u8] = b"h2";

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("{path} names nobody: its certificate bears no URI or DNS name")]
    Nameless { path: std::path::PathBuf },
    #[error("the CA or its revocation list cannot be used: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    #[error("TLS cannot be set up: {0}")]
    Rustls(#[from] rustls::Error),
    #[error(
        "the certificate does not name {san} any more, by which peers know this sidecar: if that is meant, restart the sidecar"
    )]
    NameLost { san: String },
    #[error("the certificates' files were changed while they were read: they are read again")]
    Changing,
    #[error("{0}")]
    Name(String),
}

impl<'a> From<&'a TlsConfig> for TlsFiles<'a> {
    fn from(tls: &'a TlsConfig) -> Self {
        Self { ca: &tls.ca, cert: &tls.cert, key: &tls.key, crl: tls.crl.as_deref() }
    }
}

/// For a link: the other side must bear the SAN `peer`, wherever it was dialled.
pub fn client_config(tls: &TlsConfig, peer: &str) -> Result<Arc<ClientConfig>, TlsError> {
    client_config_from(&Credentials::load(tls.into())?, vec![peer.to_owned()])
}

/// For an operator's command to a running sidecar: the other side must bear a name of `own_cert`, the certificate that
/// this sidecar's configuration names.
pub fn admin_client_config(ca: &Path, cert: &Path, key: &Path, own_cert: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let names = load::load_identity(own_cert)?.telling_sans();
    if names.is_empty() {
        return Err(TlsError::Nameless { path: own_cert.to_owned() });
    }
    client_config_from(&Credentials::load(TlsFiles { ca, cert, key, crl: None })?, names)
}

/// For the peer and the admin port: any certificate of our CA is let in; whose it is, is checked by what is called
/// ([`accept::PeerConnectInfo`]).
fn server_config_from(credentials: &Credentials) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(load::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(client_verifier(credentials)?)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(credentials.certified_key.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// [`client_config`] from what is loaded already; the server must bear one of `names`.
pub fn client_config_from(credentials: &Credentials, names: Vec<String>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(load::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(server_verifier(credentials, names)?))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(credentials.certified_key.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn client_verifier(credentials: &Credentials) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut clients = WebPkiClientVerifier::builder_with_provider(credentials.roots.clone(), load::provider());
    if !credentials.crls.is_empty() {
        clients = clients.with_crls(credentials.crls.iter().cloned()).enforce_revocation_expiration();
    }
    Ok(clients.build()?)
}

fn server_verifier(credentials: &Credentials, names: Vec<String>) -> Result<verify::NamedServer, TlsError> {
    Ok(verify::NamedServer::new(credentials.roots.clone(), credentials.crls.clone(), names)?)
}
