//! Job: say in plain words why a connection did not come about.
//! Input: an error with its sources. Output: one line for the log and for `status`.
//! Edge in name only: it looks into the errors of libraries, and does nothing else.
//! Always true: who refused whom is said; the line holds no key, value or secret.

use super::connect::ConnectError;
use super::verify::WrongName;
use crate::certs::load::rfc3339;
use rustls::pki_types::UnixTime;
use rustls::{CertificateError, Error as TlsFault, OtherError, PeerIncompatible};
use std::error::Error;
use std::io;
use time::OffsetDateTime;
use tonic::Status;

/// What a refusal for a certificate's time ends with: where the certificate is right, a clock is not, and either end's may be the one.
const CLOCKS: &str = "check the clocks of both machines";
/// What rustls writes before an alert's name; some layers above keep only the text of an error.
const ALERT_TEXT: &str = "received fatal alert: ";

/// What rustls writes where a connection ended without a goodbye.
const NO_GOODBYE: &str = "peer closed connection without sending TLS close_notify";

/// How a `Status` with a cause begins where it is shown as a whole.
const STATUS_TEXT: &str = "code: '";

/// The deepest reason that can be said in words, else the chain of causes.
pub fn explain(error: &(dyn Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(words) = words(cause) {
            return words;
        }
        let text = match cause.downcast_ref::<Status>().filter(|status| status.source().is_some()) {
            // As a whole it is shown with its causes, in the way of a debugger.
            Some(status) => status.message().to_owned(),
            None => cause.to_string(),
        };
        if text.starts_with(STATUS_TEXT) && source(cause).is_some() {
            // What only passes such a one on shows it so too.
            next = source(cause);
            continue;
        }
        // A layer that repeats its cause adds nothing.
        if !texts.iter().any(|t| t.contains(&text)) {
            texts.push(text);
        }
        next = source(cause);
    }
    texts.join(": ")
}

/// The good certificate of somebody else, if that is what a connection failed for.
pub fn wrong_name<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e WrongName> {
    let causes = std::iter::successors(Some(error), |cause| source(*cause));
    causes.filter_map(|cause| cause.downcast_ref::<TlsFault>()).find_map(|fault| {
        let TlsFault::InvalidCertificate(CertificateError::Other(OtherError(inner))) = fault else { return None };
        inner.downcast_ref()
    })
}

/// True where a connection failed since one side did not accept what the other showed of itself.
pub fn is_distrust(error: &(dyn Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |cause| source(*cause));
    causes.any(|cause| match cause.downcast_ref::<TlsFault>() {
        // What is no TLS at all is a matter of ports.
        Some(fault) => !matches!(fault, TlsFault::InvalidMessage(_)),
        // Of an alert that comes after the handshake only the text may be left.
        None => cause.to_string().contains("received fatal alert"),
    })
}

/// `io::Error::source` skips the error that it wraps.
fn source<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e (dyn Error + 'static)> {
    if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        return Some(inner);
    }
    error.source()
}

fn words(error: &(dyn Error + 'static)) -> Option<String> {
    if let Some(dial) = error.downcast_ref::<ConnectError>() {
        return Some(dial.to_string());
    }
    if let Some(fault) = error.downcast_ref::<TlsFault>() {
        return Some(tls_words(fault));
    }
    if let Some(io) = error.downcast_ref::<io::Error>()
        // rustls says at length that a connection ended without a goodbye; it is the same end of file.
        && (io.get_ref().is_none() || io.kind() == io::ErrorKind::UnexpectedEof)
    {
        return io_words(io.kind()).map(str::to_owned);
    }
    if error.source().is_none() {
        let text = error.to_string();
        // Where only the text of an error is left.
        if text.contains(NO_GOODBYE) {
            return io_words(io::ErrorKind::UnexpectedEof).map(str::to_owned);
        }
        if text == "connection closed" {
            let words = "the peer closed the connection; if it refused our certificate, its log says why";
            return Some(words.to_owned());
        }
        let name = text.split_once(ALERT_TEXT)?.1;
        let name = name.split(|c: char| !c.is_ascii_alphanumeric()).next()?;
        return Some(refusal(name));
    }
    None
}

fn io_words(kind: io::ErrorKind) -> Option<&'static str> {
    if kind == io::ErrorKind::ConnectionRefused {
        Some("nothing listens there (connection refused): is the other sidecar up, and the address right?")
    } else if kind == io::ErrorKind::UnexpectedEof {
        Some("the peer closed the connection in the middle of it")
    } else if kind == io::ErrorKind::ConnectionReset {
        Some("the connection was reset by the peer or on the way")
    } else {
        None
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "all other variants keep the words of rustls")]
fn tls_words(fault: &TlsFault) -> String {
    match fault {
        TlsFault::AlertReceived(alert) => refusal(&format!("{alert:?}")),
        TlsFault::InvalidCertificate(why) => certificate_words(why),
        TlsFault::NoCertificatesPresented => "the peer presented no certificate".to_owned(),
        TlsFault::InvalidMessage(_) => "the peer does not speak TLS".to_owned(),
        TlsFault::PeerIncompatible(
            PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled,
        ) => "the peer does not speak TLS 1.3".to_owned(),
        TlsFault::InvalidCertRevocationList(why) => format!(
            "our revocation list (tls.crl) cannot be used ({why:?}): give the one that the CA of that name in tls.ca has signed"
        ),
        TlsFault::NoApplicationProtocol => "the peer does not speak HTTP/2".to_owned(),
        other => other.to_string(),
    }
}

/// What an alert says about us; the peer's own log has the details. (In TLS 1.3 we are the one who is refused: the peer
/// has judged our certificate by then, whichever side dialled.)
fn refusal(alert: &str) -> String {
    let out_of_its_time = format!("it has expired or is not yet valid: renew it, or {CLOCKS}");
    let about_us = match alert {
        "CertificateExpired" => out_of_its_time.as_str(),
        "UnknownCA" => "it is not of the CA that the peer trusts, or the peer cannot tell whether it is revoked",
        "CertificateRequired" => "none was presented, and the peer requires one",
        "CertificateRevoked" => "it is revoked",
        "UnsupportedCertificate" => "it is not issued for this use (extended key usage)",
        "CertificateUnknown" => "it does not bear the name that the peer expects",
        "BadCertificate" => "it is malformed, or does not bear the name that the peer expects",
        "DecryptError" => "a signature does not match: it is not of the CA that the peer trusts, or not of this key",
        "AccessDenied" => "it is not permitted there",
        "ProtocolVersion" => return "the peer does not speak TLS 1.3".to_owned(),
        "NoApplicationProtocol" => return "the peer does not speak HTTP/2".to_owned(),
        other => return format!("the peer refused the connection (TLS alert {other}); its log says why"),
    };
    format!("the peer refused our certificate: {about_us}")
}

#[expect(clippy::wildcard_enum_match_arm, reason = "all other variants keep the words of rustls")]
fn certificate_words(why: &CertificateError) -> String {
    let reason = match why {
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("it expired on {}: have it renewed, or {CLOCKS}", day(*not_after))
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("it is not valid before {}: {CLOCKS}", day(*not_before))
        }
        CertificateError::UnknownIssuer => "it is not of the CA that we trust: compare tls.ca of both sides".to_owned(),
        CertificateError::BadSignature => "its signature is not of the CA that we trust (tls.ca)".to_owned(),
        CertificateError::Revoked => "it is revoked".to_owned(),
        CertificateError::UnknownRevocationStatus => {
            "the revocation list (tls.crl) does not cover its CA: put that CA's list into it too".to_owned()
        }
        CertificateError::ExpiredRevocationListContext { next_update, .. } => {
            let since = day(*next_update);
            format!(
                "our revocation list (tls.crl) is out of date since {since}: renew it, or set this machine's clock if it is ahead"
            )
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "it is not issued for this use (extended key usage)".to_owned()
        }
        CertificateError::Other(OtherError(inner)) => match inner.downcast_ref::<WrongName>() {
            Some(wrong) => return wrong.to_string(),
            None => inner.to_string(),
        },
        other => other.to_string(),
    };
    format!("the peer's certificate is refused: {reason}")
}

fn day(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    OffsetDateTime::from_unix_timestamp(seconds).map_or_else(|_| format!("{seconds} (Unix time)"), rfc3339)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::AlertDescription;
    use std::time::Duration;

    #[derive(Debug, thiserror::Error)]
    #[error("transport error")]
    struct Outer(#[source] Box<dyn Error + Send + Sync>);

    #[test]
    fn a_peer_that_closes_without_a_word_is_said_to_have_done_so_in_our_words() {
        let closed = Outer(Box::new(Outer("connection closed".into())));
        let words = explain(&Status::from_error(Box::new(closed)));
        assert_eq!(words, "the peer closed the connection; if it refused our certificate, its log says why");
        let broken = "peer closed connection without sending TLS close_notify: https://docs.rs/rustls";
        let broken = Outer(Box::new(Outer(broken.into())));
        let words = explain(&Status::from_error(Box::new(broken)));
        assert_eq!(words, "the peer closed the connection in the middle of it");
        let reason = Outer("no such thing".into());
        assert_eq!(explain(&Status::from_error(Box::new(reason))), "transport error: no such thing");
    }

    #[derive(Debug, thiserror::Error)]
    #[error(transparent)]
    struct Passes(Status);

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct PassesOn(#[source] Passes);

    #[test]
    fn what_only_passes_a_cause_on_is_not_shown_in_the_way_of_a_debugger() {
        let cut = io::Error::new(io::ErrorKind::ConnectionAborted, "the peer's certificate is refused");
        let broken = Status::from_error(Box::new(Outer(Box::new(cut))));
        let words = explain(&Outer(Box::new(PassesOn(Passes(broken)))));
        assert_eq!(words, "transport error: the peer's certificate is refused");
    }

    #[test]
    fn an_alert_becomes_words_however_deep_it_lies() {
        let alert = TlsFault::AlertReceived(AlertDescription::CertificateExpired);
        let io = io::Error::new(io::ErrorKind::InvalidData, alert);
        let words = explain(&Outer(Box::new(Outer(Box::new(io)))));
        assert!(words.starts_with("the peer refused our certificate: it has expired or is not yet valid"), "{words}");
    }

    #[test]
    fn a_refusal_for_the_time_of_a_certificate_names_it_and_says_to_look_at_both_clocks() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let (time, not_before, not_after) = (at(2_000_000_000), at(2_100_000_000), at(1_900_000_000));
        let early = CertificateError::NotValidYetContext { time, not_before };
        let late = CertificateError::ExpiredContext { time, not_after };
        let refused = |why| explain(&TlsFault::InvalidCertificate(why));
        let heard = |alert| explain(&TlsFault::AlertReceived(alert));
        for (words, told) in [
            (refused(early), "it is not valid before 2036-07-18T13:20:00Z: check the clocks of both machines"),
            (
                refused(late),
                "it expired on 2030-03-17T17:46:40Z: have it renewed, or check the clocks of both machines",
            ),
            (
                heard(AlertDescription::CertificateExpired),
                "it has expired or is not yet valid: renew it, or check the clocks of both machines",
            ),
        ] {
            assert!(words.ends_with(told), "{words}");
        }
        assert!(!refused(CertificateError::Revoked).contains("clock"), "a clock has no part in it");
    }

    #[test]
    fn an_alert_of_which_only_the_text_is_left_becomes_words() {
        let text = "connection error: received fatal alert: UnknownCA";
        let words = explain(&Outer(text.into()));
        assert!(words.starts_with("the peer refused our certificate: it is not of the CA"), "{words}");
        assert!(is_distrust(&Outer(text.into())) && !is_distrust(&Outer("h2 protocol error".into())));
    }

    #[test]
    fn every_alert_name_that_we_match_is_one_that_rustls_uses() {
        use AlertDescription as A;
        let about_certificates = [
            A::CertificateExpired,
            A::UnknownCA,
            A::CertificateRequired,
            A::CertificateRevoked,
            A::UnsupportedCertificate,
            A::CertificateUnknown,
            A::BadCertificate,
            A::DecryptError,
            A::AccessDenied,
        ];
        let refused = |alert| explain(&TlsFault::AlertReceived(alert)).starts_with("the peer refused our certificate");
        assert!(about_certificates.into_iter().all(refused));
        assert!(!refused(A::ProtocolVersion) && !refused(A::InternalError));
    }

    #[test]
    fn causes_without_words_are_listed_once_each() {
        assert_eq!(explain(&Outer("a cause".into())), "transport error: a cause");
        assert_eq!(explain(&Outer(Box::new(Outer("a cause".into())))), "transport error: a cause");
        let cut =
            io::Error::new(io::ErrorKind::UnexpectedEof, "peer closed connection without sending TLS close_notify");
        assert_eq!(explain(&Outer(Box::new(cut))), "the peer closed the connection in the middle of it");
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert!(explain(&Outer(Box::new(refused))).starts_with("nothing listens there"));
    }
}
