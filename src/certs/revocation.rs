//! Job: say before a handshake does that with these revocation lists everybody would be refused.
//! Input: the lists, a certificate's chain, the CA, the time. Output: nothing, or what is wrong with the lists and what to do.
//! Edge in name only: it asks the library that judges peers, and nothing else.
//! Always true: lists that the handshakes do not need are not looked at: those of a CA that is going, or that is to come.

use super::load::{LoadError, provider, rfc3339, unix_time};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, Error, RootCertStore};
use std::path::Path;
use std::sync::Arc;
use time::OffsetDateTime;

/// Refuses lists with which a peer whose certificate is of the same CA as our own, `chain` (leaf first), would be refused at `now`.
/// `path`: the lists' file, for the error.
pub fn check(
    path: &Path,
    lists: &[CertificateRevocationListDer<'static>],
    chain: &[CertificateDer<'static>],
    roots: Arc<RootCertStore>,
    now: OffsetDateTime,
) -> Result<(), LoadError> {
    let refused = |reason: String| LoadError::Revocation { path: path.to_owned(), reason };
    let Some((leaf, intermediates)) = chain.split_first() else { return Ok(()) };
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .with_crls(lists.iter().cloned())
        .enforce_revocation_expiration()
        .build()
        .map_err(|e| refused(format!("holds a revocation list that cannot be used ({e}): make it anew")))?;
    verifier.verify_client_cert(leaf, intermediates, unix_time(now)).map(drop).map_err(|error| refused(words(&error)))
}

#[expect(clippy::wildcard_enum_match_arm, reason = "all other variants keep the words of rustls")]
fn words(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Revoked) => {
            "revokes this sidecar's own certificate: issue another one".to_owned()
        }
        Error::InvalidCertificate(CertificateError::UnknownRevocationStatus) => {
            "holds no revocation list of the CA of this sidecar's certificate: put that CA's list into it too, or nobody with a certificate of it is let in"
                .to_owned()
        }
        Error::InvalidCertificate(CertificateError::ExpiredRevocationListContext { next_update, .. }) => {
            let end = i64::try_from(next_update.as_secs()).ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
            let since = end.map_or_else(String::new, |end| format!(" since {}", rfc3339(end)));
            format!("is out of date{since}: make the list anew, or set this machine's clock if it is ahead")
        }
        Error::InvalidCertRevocationList(why) => format!(
            "holds a revocation list that names the CA of this sidecar's certificate and is not signed by it ({why:?}): give the list that this CA has signed; another CA needs a name of its own"
        ),
        other => format!("holds revocation lists by which this sidecar's own certificate would be refused: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::Issuer;
    use crate::certs::issue::IssueRequest;
    use rustls::pki_types::pem::PemObject;
    use time::Duration;

    fn list(issuer: &Issuer, ends: OffsetDateTime) -> CertificateRevocationListDer<'static> {
        CertificateRevocationListDer::from_pem_slice(issuer.revoke(&[], ends).unwrap().as_bytes()).unwrap()
    }

    #[test]
    fn lists_by_which_everybody_would_be_refused_are_refused_and_others_are_not_looked_at() {
        let issuer = |name| Issuer::new(name).unwrap();
        let (first, second, namesake) = (issuer("first"), issuer("second"), issuer("first"));
        let now = OffsetDateTime::now_utc();
        let (yesterday, tomorrow) = (now - Duration::days(1), now + Duration::days(1));
        let own = first.issue(&IssueRequest::region("us-east-1")).unwrap();
        let chain = [CertificateDer::from_pem_slice(own.cert_pem.as_bytes()).unwrap()];
        let mut roots = RootCertStore::empty();
        for issuer in [&first, &second] {
            roots.add(CertificateDer::from_pem_slice(issuer.ca_pem().as_bytes()).unwrap()).unwrap();
        }
        let roots = Arc::new(roots);
        let said = |lists: &[CertificateRevocationListDer<'static>]| {
            check(Path::new("crl.pem"), lists, &chain, roots.clone(), now).err().map(|error| error.to_string())
        };
        let good = list(&first, tomorrow);
        assert_eq!(said(std::slice::from_ref(&good)), None, "the other CA needs none");
        assert_eq!(said(&[list(&second, yesterday), good.clone()]), None, "nor one in its time");
        assert_eq!(said(&[list(&issuer("third"), tomorrow), good.clone()]), None);
        let revoked = first.revoke(&[&own], tomorrow).unwrap();
        let revoked = CertificateRevocationListDer::from_pem_slice(revoked.as_bytes()).unwrap();
        for (lists, words) in [
            (vec![list(&second, tomorrow)], "crl.pem holds no revocation list of the CA of this sidecar's certificate"),
            (vec![list(&namesake, tomorrow), good], "is not signed by it"),
            (vec![list(&first, yesterday)], "crl.pem is out of date since "),
            (vec![revoked], "crl.pem revokes this sidecar's own certificate"),
            (vec![CertificateRevocationListDer::from(vec![1, 2, 3])], "cannot be used"),
        ] {
            let said = said(&lists).unwrap_or_default();
            assert!(said.contains(words), "{words}: {said}");
        }
    }
}
