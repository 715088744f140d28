//! Job: what a certificate or a revocation list says of itself, for an operator.
//! Input: DER. Output: plain values.
//! Pure: no clock, no I/O, no async.
//! Always true: nothing of a private key is here; what cannot be read is an error.

use super::identity::{IdentityError, PeerIdentity};
use time::OffsetDateTime;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

/// One certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    pub identity: PeerIdentity,
    pub issuer: String,
    /// Hexadecimal, with colons.
    pub serial: String,
}

/// One revocation list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescribedList {
    pub issuer: String,
    pub this_update: OffsetDateTime,
    /// `None`: it does not say.
    pub next_update: Option<OffsetDateTime>,
    pub revoked: u64,
}

pub fn certificate(der: &[u8]) -> Result<Described, IdentityError> {
    let identity = PeerIdentity::from_der(der)?;
    let (_, certificate) = X509Certificate::from_der(der).map_err(|e| IdentityError::NotX509(e.to_string()))?;
    let serial: Vec<String> = certificate.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Described { identity, issuer: certificate.issuer().to_string(), serial: serial.join(":") })
}

/// `None`: it is no revocation list.
pub fn revocation_list(der: &[u8]) -> Option<DescribedList> {
    let (_, list) = CertificateRevocationList::from_der(der).ok()?;
    Some(DescribedList {
        issuer: list.issuer().to_string(),
        this_update: list.last_update().to_datetime(),
        next_update: list.next_update().map(|time| time.to_datetime()),
        revoked: list.iter_revoked_certificates().count() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::super::issue::{IssueRequest, Issuer};
    use super::*;

    #[test]
    fn a_certificate_is_told_with_its_issuer_and_its_serial() {
        let issuer = Issuer::new("test CA").expect("a CA");
        let pair = issuer.issue(&IssueRequest::region("us-east-1")).expect("a pair");
        let (_, pem) = x509_parser::pem::parse_x509_pem(pair.cert_pem.as_bytes()).expect("PEM");
        let told = certificate(&pem.contents).unwrap();
        assert!(told.issuer.contains("test CA"), "{told:?}");
        assert_eq!(told.identity, PeerIdentity::from_der(&pem.contents).unwrap());
        assert!(told.serial.split(':').all(|byte| byte.len() == 2 && u8::from_str_radix(byte, 16).is_ok()));
        assert!(!told.serial.is_empty());
    }

    #[test]
    fn rubbish_is_neither() {
        assert!(certificate(b"rubbish").is_err());
        assert_eq!(revocation_list(b"rubbish"), None);
    }
}
