//! Job: decide, on the dialling side, whether the server is the one that was meant.
//! Input: the server's certificates. Output: yes, or which name was wanted and which were found.
//! Always true: the chain is checked by webpki (issuer, dates, purpose, revocation) before any name is looked at; the
//! host name that was dialled decides nothing, since a link's peer is known by its SAN.

use crate::certs::identity::PeerIdentity;
use crate::certs::load::provider;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::server::VerifierBuilderError;
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme};
use std::sync::Arc;

/// A good certificate of somebody else.
#[derive(Debug, thiserror::Error)]
#[error(
    "the peer's certificate names {found}, not {wanted}: check `peer` in the configuration, and the address dialled"
)]
pub struct WrongName {
    pub wanted: String,
    pub found: String,
}

/// Trusts a server of our CA that bears one of the wanted SANs.
#[derive(Debug)]
pub struct NamedServer {
    chain: Arc<WebPkiServerVerifier>,
    wanted: Vec<String>,
}

impl NamedServer {
    pub fn new(
        roots: Arc<RootCertStore>,
        crls: Vec<CertificateRevocationListDer<'static>>,
        wanted: Vec<String>,
    ) -> Result<Self, VerifierBuilderError> {
        let mut chain = WebPkiServerVerifier::builder_with_provider(roots, provider());
        if !crls.is_empty() {
            chain = chain.with_crls(crls).enforce_revocation_expiration();
        }
        Ok(Self { chain: chain.build()?, wanted })
    }

    fn check_name(&self, end_entity: &CertificateDer<'_>) -> Result<ServerCertVerified, Error> {
        let identity = PeerIdentity::from_der(end_entity)
            .map_err(|e| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(e)))))?;
        if self.wanted.iter().any(|san| identity.bears(san)) {
            return Ok(ServerCertVerified::assertion());
        }
        let found = if identity.sans.is_empty() { "nobody".to_owned() } else { identity.sans.join(", ") };
        let wrong = WrongName { wanted: self.wanted.join(" or "), found };
        Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(wrong)))))
    }
}

impl ServerCertVerifier for NamedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Ok(_) => self.check_name(end_entity),
            // rustls compares the dialled name last, after the whole chain; only that verdict is replaced by ours.
            // (tests/it/trust.rs holds a wrong chain with a wrong name against this order.)
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => self.check_name(end_entity),
            Err(other) => Err(other),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
