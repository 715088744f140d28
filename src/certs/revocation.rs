//! Job: say before it does whether a file of revocation lists would refuse everybody.
//! Input: the lists, the CA's certificates, the time. Output: nothing, or what is wrong with the file and what to do.
//! Pure but for [`check_file`], which reads the files.
//! Always true: each CA has a list, in its time, and none that bears its name is signed by somebody else: a handshake takes the first list of the
//! CA's name (RFC 5280, section 6.3), and refuses whom it cannot judge. Lists of other CAs do no harm: the next CA's may be there before it.

use super::load::{self, LoadError, rfc3339};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use std::path::Path;
use time::OffsetDateTime;
use x509_parser::error::X509Error;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

/// As [`check`], from files. Of a CA's file that is not sound its own check tells.
pub fn check_file(crl: &Path, ca: &Path, now: OffsetDateTime) -> Result<(), LoadError> {
    let lists = load::load_crls(crl)?;
    load::load_certificates(ca).map_or(Ok(()), |authorities| check(crl, &lists, &authorities, now))
}

/// Refuses lists with which everybody of one of the CAs would be refused at `now`. `path`: the lists' file, for the error.
pub fn check(
    path: &Path,
    lists: &[CertificateRevocationListDer<'_>],
    authorities: &[CertificateDer<'_>],
    now: OffsetDateTime,
) -> Result<(), LoadError> {
    let refused = |reason: String| LoadError::Revocation { path: path.to_owned(), reason };
    let parsed: Result<Vec<_>, _> = lists.iter().map(|list| CertificateRevocationList::from_der(list)).collect();
    let parsed = parsed.map_err(|_| refused("holds a revocation list that is malformed: make it anew".to_owned()))?;
    for authority in authorities {
        // One that cannot be read is not trusted either.
        let Ok((_, authority)) = X509Certificate::from_der(authority) else { continue };
        let (subject, name) = (authority.subject(), authority.subject().to_string());
        let lists = parsed.iter().map(|(_, list)| list);
        let mut of_it = lists.filter(|list| list.issuer().as_raw() == subject.as_raw()).peekable();
        if of_it.peek().is_none() {
            let advice = "put that CA's list into it too, or nobody with a certificate of it is let in";
            return Err(refused(format!("holds no revocation list of the CA {name:?}, which is trusted: {advice}")));
        }
        for list in of_it {
            let signed = list.verify_signature(authority.public_key());
            // What this library cannot tell the handshakes do.
            if !matches!(signed, Ok(()) | Err(X509Error::SignatureUnsupportedAlgorithm)) {
                let advice = "give the list that this CA has signed; another CA needs a name of its own";
                let what = format!("holds a revocation list that names the CA {name:?} and is not signed by it");
                return Err(refused(format!("{what}: {advice}")));
            }
            let end = list.next_update().map(|end| end.to_datetime());
            if let Some(end) = end.filter(|end| *end <= now) {
                let advice = "make it anew, or set this machine's clock if it is ahead";
                let what = format!("holds a revocation list of the CA {name:?} that is out of date since");
                return Err(refused(format!("{what} {}: {advice}", rfc3339(end))));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::Issuer;
    use rustls::pki_types::pem::PemObject;
    use time::Duration;

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn authority(issuer: &Issuer) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(issuer.ca_pem().as_bytes()).unwrap()
    }

    fn list(issuer: &Issuer, ends: OffsetDateTime) -> CertificateRevocationListDer<'static> {
        CertificateRevocationListDer::from_pem_slice(issuer.revoke(&[], ends).unwrap().as_bytes()).unwrap()
    }

    /// `None`: it is taken.
    fn refused(lists: &[CertificateRevocationListDer<'_>], authorities: &[CertificateDer<'_>]) -> Option<String> {
        check(Path::new("crl.pem"), lists, authorities, NOW).err().map(|error| error.to_string())
    }

    #[test]
    fn lists_that_would_refuse_everybody_are_refused_and_those_of_other_cas_are_not_looked_at() {
        let issuer = |name| Issuer::new(name).unwrap();
        let (first, second, namesake) = (issuer("first"), issuer("second"), issuer("first"));
        let tomorrow = NOW + Duration::days(1);
        let good = [list(&first, tomorrow), list(&second, tomorrow)];
        let both = [authority(&first), authority(&second)];
        assert_eq!(refused(&good, &both), None);
        assert_eq!(refused(&good, &both[..1]), None, "the next CA's list may be there before it");
        assert_eq!(refused(&[list(&first, tomorrow), list(&second, NOW)], &both[..1]), None);

        let said = refused(&good[..1], &both).unwrap();
        assert!(
            said.starts_with("crl.pem holds no revocation list of the CA \"CN=second\", which is trusted"),
            "{said}"
        );
        for lists in
            [[list(&namesake, tomorrow), list(&first, tomorrow)], [list(&first, tomorrow), list(&namesake, tomorrow)]]
        {
            let said = refused(&lists, &both[..1]).unwrap();
            assert!(said.contains("names the CA \"CN=first\" and is not signed by it"), "{said}");
        }
        let said = refused(&[list(&first, NOW)], &both[..1]).unwrap();
        assert!(said.contains("out of date since 1970-01-01T00:00:00Z: make it anew"), "{said}");
        let said = refused(&[CertificateRevocationListDer::from(vec![1, 2, 3])], &both[..1]).unwrap();
        assert!(said.contains("malformed"), "{said}");
    }
}
