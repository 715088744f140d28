//! Job: why etcd did not do what was asked, as one planned reaction each, with what to do about it.
//! Input: errors of etcd's client, statuses in etcd's own words. Output: an `EtcdError`.
//! No I/O: the only file that knows etcd's words.
//! Always true: an error that leaves doubt about what etcd did is never taken for one that does not.

use super::gate::Refusal;
use super::{CALL_DEADLINE, READ_BYTES_MAX};
use crate::model::ClusterId;
use etcd_client::Error as ClientError;
use tonic::Code;

/// Why etcd did not do what was asked. Each variant is one planned reaction.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    #[error("etcd cannot be reached at {endpoints}: {reason}; {}", advice(.reason))]
    Unreachable { endpoints: String, reason: String },
    #[error("etcd has no leader: {0}")]
    NoLeader(String),
    #[error("etcd did not answer within {} s", CALL_DEADLINE.as_secs())]
    TimedOut,
    #[error("etcd is out of space (NOSPACE): compact and defragment it or raise its quota, then disarm the alarm")]
    NoSpace,
    #[error("etcd refused: {said}; its user needs the right to {right} (docs/operating.md#users-and-rights-in-etcd)")]
    Denied { right: String, said: String },
    #[error("etcd does not accept the login: {0}")]
    LoginLost(String),
    #[error("revision is compacted")]
    Compacted,
    #[error("etcd's head is below the revision asked for")]
    FutureRevision,
    #[error("another cluster answers: it is {is}, and was {was} when this connection was made; connecting anew")]
    OtherCluster { was: ClusterId, is: ClusterId },
    #[error("the transaction has more operations than etcd's --max-txn-ops")]
    TooManyOps,
    #[error("the request is larger than etcd's --max-request-bytes")]
    TooLarge,
    #[error("an answer of etcd is larger than the limit of {limit_bytes} B")]
    AnswerTooLarge { limit_bytes: usize },
    #[error(transparent)]
    VersionRefused(Refusal),
    #[error("[etcd] is not usable: {0}")]
    Config(String),
    #[error("etcd failed: {0}")]
    Other(String),
}

impl EtcdError {
    /// True if the request surely changed nothing. False leaves doubt: the caller must read before it goes on.
    pub fn changed_nothing(&self) -> bool {
        match self {
            EtcdError::Denied { .. }
            | EtcdError::LoginLost(_)
            | EtcdError::Compacted
            | EtcdError::FutureRevision
            | EtcdError::TooManyOps
            | EtcdError::TooLarge
            | EtcdError::VersionRefused(_)
            | EtcdError::Config(_) => true,
            // What crosses the quota is applied, and refused all the same (etcd's `quotaApplierV3`).
            EtcdError::NoSpace
            | EtcdError::Unreachable { .. }
            | EtcdError::NoLeader(_)
            | EtcdError::TimedOut
            | EtcdError::OtherCluster { .. }
            | EtcdError::AnswerTooLarge { .. }
            | EtcdError::Other(_) => false,
        }
    }

    /// True unless etcd itself answered, on a connection that is as good as before.
    pub fn wants_new_connection(&self) -> bool {
        match self {
            EtcdError::NoSpace
            | EtcdError::Denied { .. }
            | EtcdError::Compacted
            | EtcdError::FutureRevision
            | EtcdError::TooManyOps
            | EtcdError::TooLarge
            | EtcdError::AnswerTooLarge { .. }
            | EtcdError::Config(_) => false,
            EtcdError::Unreachable { .. }
            | EtcdError::LoginLost(_)
            | EtcdError::TimedOut
            | EtcdError::NoLeader(_)
            | EtcdError::OtherCluster { .. }
            | EtcdError::VersionRefused(_)
            | EtcdError::Other(_) => true,
        }
    }

    /// The same, with the right that was missing, if that is what it is about.
    pub fn needing(self, right: impl FnOnce() -> String) -> Self {
        if let EtcdError::Denied { said, .. } = self {
            return EtcdError::Denied { right: right(), said };
        }
        self
    }
}

/// What to do about a connection that does not come about, by what rustls and the HTTP/2 library say of it.
fn advice(reason: &str) -> &'static str {
    let rules: [(&[&str], &str); 6] = [
        (&["timed out"], "check that etcd runs and answers, and the way to it"),
        (
            &["invalid peer certificate"],
            "check [etcd] ca and endpoints: its certificate is not of that CA, not for that name, or out of its time",
        ),
        (&["CertificateRequired"], "it asks for a client certificate: set [etcd] cert and key"),
        // What an etcd says of both that is built with Go before 1.20.
        (
            &["BadCertificate"],
            "it refuses our client certificate, or was shown none: set [etcd] cert and key to a pair of its --trusted-ca-file",
        ),
        (
            &["UnknownCA", "CertificateUnknown", "CertificateExpired", "DecryptError"],
            "it refuses our client certificate: check [etcd] cert and key against its --trusted-ca-file",
        ),
        (
            &["broken pipe", "frame with invalid size", "InvalidContentType", "handshake eof", "http2 error"],
            "check [etcd] endpoints: nothing answers, it is no etcd, or it speaks https:// where http:// is written, or the other way round",
        ),
    ];
    let rule = rules.into_iter().find(|(words, _)| words.iter().any(|word| reason.contains(word)));
    rule.map_or("check [etcd] endpoints and that etcd runs", |(_, advice)| advice)
}

/// One file, one place, where etcd's errors become ours. The texts are etcd's own (its api/v3rpc/rpctypes/error.go).
pub(super) fn reaction(error: &ClientError, endpoints: &str) -> EtcdError {
    let unreachable = |reason: String| EtcdError::Unreachable { endpoints: endpoints.to_owned(), reason };
    match error {
        ClientError::GRpcStatus(status) => status_reaction(status, endpoints),
        ClientError::TransportError(e) => unreachable(with_sources(e)),
        ClientError::IoError(e) => unreachable(e.to_string()),
        ClientError::InvalidArgs(e) | ClientError::EndpointError(e) => EtcdError::Config(e.clone()),
        ClientError::InvalidUri(e) => EtcdError::Config(e.to_string()),
        ClientError::InvalidMetadataValue(e) => EtcdError::Other(e.to_string()),
        ClientError::WatchError(e)
        | ClientError::LeaseKeepAliveError(e)
        | ClientError::ElectError(e)
        | ClientError::Internal(e) => EtcdError::Other(e.clone()),
        ClientError::Utf8Error(e) => EtcdError::Other(e.to_string()),
        ClientError::EndpointsNotManaged => EtcdError::Other(error.to_string()),
    }
}

/// etcd's own words, and those of the gRPC library below it.
const TOO_LARGE: [&str; 3] =
    ["request is too large", "trying to send message larger than max", "received message larger than max"];

/// What a login is answered with, and in 3.4 a call of one who had logged in before, while etcd's users are switched off.
pub(super) const USERS_OFF: &str = "authentication is not enabled";
const LOGIN_LOST: [&str; 3] = ["invalid auth token", "auth: revision in header is old", USERS_OFF];

/// What the HTTP/2 library says of a port that answers something else, closes the connection, or takes nothing any more.
const NO_HTTP2: [&str; 3] = ["frame with invalid size", "connection closed", "broken pipe"];

fn denied(said: &str) -> EtcdError {
    EtcdError::Denied { right: String::new(), said: said.to_owned() }
}

fn status_reaction(status: &tonic::Status, endpoints: &str) -> EtcdError {
    let text = status.message();
    let has = |needle: &str| text.contains(needle);
    if has("mvcc: required revision has been compacted") {
        EtcdError::Compacted
    } else if has("mvcc: required revision is a future revision") {
        EtcdError::FutureRevision
    } else if has("too many operations in txn request") {
        EtcdError::TooManyOps
    } else if TOO_LARGE.iter().any(|words| has(words)) {
        EtcdError::TooLarge
    } else if has("decoded message length too large") || has("message length too large") {
        EtcdError::AnswerTooLarge { limit_bytes: READ_BYTES_MAX }
    } else if has("database space exceeded") {
        EtcdError::NoSpace
    } else if has("no leader") || has("leader changed") {
        EtcdError::NoLeader(text.to_owned())
    } else if has("permission denied") {
        denied(text)
    } else if has("user name is empty") {
        EtcdError::LoginLost(format!("{text}: it asks for a user, see [etcd] username"))
    } else if has("user name not found") {
        // The one that etcd reads from a client certificate, where nobody logs in.
        EtcdError::LoginLost(format!("{text}: it is the client certificate's common name, see [etcd] username"))
    } else if has("authentication failed") {
        EtcdError::LoginLost(format!("{text}: see [etcd] username and password_file"))
    } else if LOGIN_LOST.iter().any(|words| has(words)) {
        EtcdError::LoginLost(text.to_owned())
    } else if has("transport error") || NO_HTTP2.iter().any(|words| with_root_cause(status).contains(words)) {
        // The library's own words: no connection came about, or it broke.
        EtcdError::Unreachable { endpoints: endpoints.to_owned(), reason: with_root_cause(status) }
    } else {
        match status.code() {
            Code::Unavailable => {
                EtcdError::Unreachable { endpoints: endpoints.to_owned(), reason: with_root_cause(status) }
            }
            Code::PermissionDenied => denied(text),
            Code::Unauthenticated => EtcdError::LoginLost(text.to_owned()),
            Code::DeadlineExceeded => EtcdError::TimedOut,
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Internal
            | Code::DataLoss => EtcdError::Other(with_root_cause(status)),
        }
    }
}

/// What a status says, and the deepest of its causes; the layers between are the gRPC library's own affair.
fn with_root_cause(status: &tonic::Status) -> String {
    let mut deepest = std::error::Error::source(status);
    while let Some(below) = deepest.and_then(std::error::Error::source) {
        deepest = Some(below);
    }
    let said = status.message();
    let cause = deepest.map(ToString::to_string).filter(|cause| !said.contains(cause.as_str()));
    match (said.is_empty(), cause) {
        (false, Some(cause)) => format!("{said}: {cause}"),
        (false, None) => said.to_owned(),
        (true, cause) => cause.unwrap_or_else(|| status.code().description().to_owned()),
    }
}

/// An error with the causes below it, without saying the same words twice.
pub fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Status;

    #[test]
    fn a_login_that_holds_no_more_is_told_from_what_another_login_does_not_mend() {
        let lost = [
            Status::unauthenticated("etcdserver: invalid auth token"),
            Status::invalid_argument("etcdserver: authentication failed, invalid user ID or password"),
            Status::invalid_argument("etcdserver: auth: revision in header is old"),
            Status::failed_precondition("etcdserver: authentication is not enabled"),
        ];
        for status in lost {
            let reaction = status_reaction(&status, "etcd");
            assert!(
                matches!(reaction, EtcdError::LoginLost(_)) && reaction.changed_nothing(),
                "{status}: {reaction:?}"
            );
        }
        let full = status_reaction(&Status::resource_exhausted("etcdserver: mvcc: database space exceeded"), "etcd");
        assert!(matches!(full, EtcdError::NoSpace) && !full.changed_nothing(), "what crosses the quota is applied");
        for (status, wanted) in [
            (Status::permission_denied("etcdserver: permission denied"), "Denied"),
            (Status::unavailable("etcdserver: no leader"), "NoLeader"),
            (Status::unknown("etcdserver: something else"), "Other"),
        ] {
            assert!(format!("{:?}", status_reaction(&status, "etcd")).starts_with(wanted), "{status}");
        }
    }

    #[test]
    fn a_port_that_does_not_speak_http2_is_named_with_what_to_look_at() {
        for (status, advice) in [
            (
                Status::internal("h2 protocol error: http2 error: frame with invalid size"),
                "it is no etcd, or it speaks https://",
            ),
            (
                Status::unknown(
                    "h2 protocol error: error reading a body from connection: stream closed because of a broken pipe",
                ),
                "nothing answers, it is no etcd,",
            ),
            (
                Status::cancelled("operation was canceled: connection closed"),
                "check [etcd] endpoints and that etcd runs",
            ),
        ] {
            let said = status_reaction(&status, "http://127.0.0.1:7444").to_string();
            assert!(
                said.starts_with("etcd cannot be reached at http://127.0.0.1:7444: ") && said.contains(advice),
                "{said}"
            );
        }
        assert!(
            advice("tls handshake eof").contains("it speaks https:// where http:// is written, or the other way round")
        );
        let late = advice("http2 error: operation timed out");
        assert_eq!(late, "check that etcd runs and answers, and the way to it");
        let broken =
            status_reaction(&Status::unknown("h2 protocol error: error reading a body from connection"), "etcd");
        assert!(matches!(broken, EtcdError::Other(_)), "{broken}");
    }

    #[test]
    fn only_an_answer_that_is_etcds_own_keeps_the_connection() {
        for (status, wanted) in [
            (Status::resource_exhausted("etcdserver: mvcc: database space exceeded"), false),
            (Status::permission_denied("etcdserver: permission denied"), false),
            (Status::invalid_argument("etcdserver: too many operations in txn request"), false),
            (Status::invalid_argument("etcdserver: request is too large"), false),
            (Status::out_of_range("etcdserver: mvcc: required revision has been compacted"), false),
            (Status::unauthenticated("etcdserver: invalid auth token"), true),
            (Status::unavailable("etcdserver: no leader"), true),
            (Status::deadline_exceeded("late"), true),
            (Status::unavailable("transport error"), true),
            (Status::internal("h2 protocol error"), true),
            (Status::unknown("something that nobody planned for"), true),
        ] {
            assert_eq!(status_reaction(&status, "etcd").wants_new_connection(), wanted, "{status}");
        }
    }
}
