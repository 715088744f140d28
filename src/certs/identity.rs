//! Job: whom a certificate names, and for how long.
//! Input: a certificate in DER. Output: a `PeerIdentity`.
//! Always true: a name of one kind never passes for a name of the other (a DNS entry that looks like a URI is no name).

use super::{is_dns_name, is_uri};
use std::fmt;
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// What a certificate says about its holder. Whether to believe it is the verifier's business.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The URI and DNS entries of the subject alternative name, as they stand there.
    pub sans: Vec<String>,
    pub subject: String,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
    /// Usable as a server's certificate, and as a client's (extended key usage).
    pub server_auth: bool,
    pub client_auth: bool,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdentityError {
    #[error("it is not an X.509 certificate ({0})")]
    NotX509(String),
    #[error("its {extension} extension cannot be read ({reason})")]
    Extension { extension: &'static str, reason: String },
}

impl PeerIdentity {
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|e| IdentityError::NotX509(e.to_string()))?;
        let sans = certificate.subject_alternative_name().map_err(|e| unreadable("subjectAltName", &e))?;
        let names = sans.map(|s| &s.value.general_names[..]).unwrap_or_default();
        let usage = certificate.extended_key_usage().map_err(|e| unreadable("extendedKeyUsage", &e))?;
        let allows = |f: fn(&x509_parser::extensions::ExtendedKeyUsage<'_>) -> bool| {
            usage.as_ref().is_none_or(|u| u.value.any || f(u.value))
        };
        Ok(Self {
            sans: names.iter().filter_map(name).map(str::to_owned).collect(),
            subject: certificate.subject().to_string(),
            not_before: certificate.validity().not_before.to_datetime(),
            not_after: certificate.validity().not_after.to_datetime(),
            server_auth: allows(|u| u.server_auth),
            client_auth: allows(|u| u.client_auth),
        })
    }

    /// True if the certificate carries this name: a URI letter by letter, a DNS name without regard to case.
    pub fn bears(&self, san: &str) -> bool {
        if is_uri(san) {
            self.sans.iter().any(|s| s == san)
        } else {
            self.sans.iter().any(|s| s.eq_ignore_ascii_case(san))
        }
    }

    /// The names that tell this certificate from its neighbours: the URIs, or, without any, the DNS names.
    /// Every development certificate is also called `localhost`, so that a DNS name beside a URI tells nothing.
    pub fn telling_sans(&self) -> Vec<String> {
        let uris: Vec<String> = self.sans.iter().filter(|s| is_uri(s)).cloned().collect();
        if uris.is_empty() { self.sans.clone() } else { uris }
    }
}

/// For logs: the first name that tells something, or the subject.
impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.telling_sans().first() {
            Some(san) => f.write_str(san),
            None => f.write_str(&self.subject),
        }
    }
}

fn unreadable(extension: &'static str, error: &x509_parser::error::X509Error) -> IdentityError {
    IdentityError::Extension { extension, reason: error.to_string() }
}

fn name<'a>(name: &GeneralName<'a>) -> Option<&'a str> {
    if let GeneralName::URI(uri) = name
        && is_uri(uri)
    {
        Some(uri)
    } else if let GeneralName::DNSName(dns) = name
        && is_dns_name(dns)
    {
        Some(dns)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::issue::{IssueRequest, Issuer};
    use super::*;

    fn identity(request: &IssueRequest) -> PeerIdentity {
        let issuer = Issuer::new("test CA").expect("a CA");
        let pair = issuer.issue(request).expect("a pair");
        let (_, pem) = x509_parser::pem::parse_x509_pem(pair.cert_pem.as_bytes()).expect("PEM");
        PeerIdentity::from_der(&pem.contents).expect("an identity")
    }

    #[test]
    fn an_identity_bears_its_uris_and_dns_names_and_no_others() {
        let peer = identity(&IssueRequest::region("us-east-1"));
        assert!(peer.bears("spiffe://etcd-ferry.dev/region/us-east-1"));
        assert!(peer.bears("LocalHost"));
        assert!(!peer.bears("spiffe://etcd-ferry.dev/region/US-EAST-1"), "URIs are compared letter by letter");
        assert!(!peer.bears("spiffe://etcd-ferry.dev/region/us-east-11"));
        assert!(!peer.bears("127.0.0.1"), "an address is no name");
        assert!(!peer.bears(""));
        assert_eq!(peer.telling_sans(), ["spiffe://etcd-ferry.dev/region/us-east-1"]);
        assert!(peer.server_auth && peer.client_auth && peer.subject.contains("us-east-1"));
    }

    #[test]
    fn a_dns_entry_that_looks_like_a_uri_is_no_name() {
        let mut request = IssueRequest::region("a");
        request.uris.clear();
        request.dns = vec!["spiffe://etcd-ferry.dev/admin".to_owned(), "ferry.example".to_owned()];
        let peer = identity(&request);
        assert_eq!(peer.sans, ["ferry.example"]);
        assert!(!peer.bears("spiffe://etcd-ferry.dev/admin"));
    }

    #[test]
    fn bytes_that_are_no_certificate_are_an_error() {
        assert!(matches!(PeerIdentity::from_der(b"nonsense"), Err(IdentityError::NotX509(_))));
    }
}
