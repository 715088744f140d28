//! Job: the narrow typed door to etcd: connect, read, commit a transaction, watch.
//! Input: an `EtcdConfig`, ranges, transactions. Output: plain values, or an `EtcdError` that says what kind of doubt it leaves.
//! Always true: each call ends within its deadline, but for `Watch::next`, which waits for what comes; reads are linearizable unless they
//! name a revision; a connection believes one cluster, in answers and on a watch alike; nothing retries by itself.

use crate::config::EtcdConfig;
use crate::model::{Change, ClusterId, KeyRange, Revision};
use bytes::Bytes;
use etcd_client::{
    Certificate, Client, ConnectOptions, Error as ClientError, GetOptions, Identity, KvClient, PutOptions, TlsOptions,
    WatchOptions, WatchRequestSender, WatchResponse, WatchResponseStream,
};
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpStream;
use tonic::Code;

pub use etcd_client::{Compare, CompareOp, DeleteOptions, Txn, TxnOp, TxnOpResponse, TxnResponse};

/// etcd's own client gives an unanswered request this long; so do we.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// A member of one's own cluster is near: one that does not take a connection in this time is down.
const LISTENING_DEADLINE: Duration = Duration::from_millis(500);
/// etcd answers pings more frequent than 5 s with GOAWAY.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// A page holds at least one key, and a value may be as large as a request: far above etcd's default of 1.5 MiB.
const READ_BYTES_MAX: usize = 256 << 20;

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
    #[error("etcd refused: {said}; its user needs the right to {right} (README, etcd rights)")]
    Denied { right: String, said: String },
    #[error("etcd no longer accepts the login: {0}")]
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
    #[error("[etcd] is not usable: {0}")]
    Config(String),
    #[error("etcd failed: {0}")]
    Other(String),
}

impl EtcdError {
    /// True if the request surely changed nothing. False leaves doubt: the caller must read before it goes on.
    pub fn changed_nothing(&self) -> bool {
        match self {
            EtcdError::NoSpace
            | EtcdError::Denied { .. }
            | EtcdError::LoginLost(_)
            | EtcdError::Compacted
            | EtcdError::FutureRevision
            | EtcdError::TooManyOps
            | EtcdError::TooLarge
            | EtcdError::Config(_) => true,
            EtcdError::Unreachable { .. }
            | EtcdError::NoLeader(_)
            | EtcdError::TimedOut
            | EtcdError::OtherCluster { .. }
            | EtcdError::AnswerTooLarge { .. }
            | EtcdError::Other(_) => false,
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
    let rules: [(&[&str], &str); 4] = [
        (
            &["invalid peer certificate"],
            "check [etcd] ca and endpoints: its certificate is not of that CA, not for that name, or out of its time",
        ),
        (&["CertificateRequired"], "it asks for a client certificate: set [etcd] cert and key"),
        (
            &["UnknownCA", "BadCertificate", "CertificateUnknown", "CertificateExpired", "DecryptError"],
            "it refuses our client certificate: check [etcd] cert and key against its --trusted-ca-file",
        ),
        (
            &["broken pipe", "frame with invalid size", "InvalidContentType", "http2 error"],
            "check [etcd] endpoints: it is no etcd, or it speaks https:// where http:// is written, or the other way round",
        ),
    ];
    let rule = rules.into_iter().find(|(words, _)| words.iter().any(|word| reason.contains(word)));
    rule.map_or("check [etcd] endpoints and that etcd runs", |(_, advice)| advice)
}

/// The right to watch a range, as it has to be granted: etcd refuses a watch over what several rights cover only in part.
pub fn watch_right(range: &KeyRange) -> String {
    format!("read all of {range:?}, as one range")
}

/// One key as etcd holds it.
#[derive(Clone, PartialEq, Eq)]
pub struct Kv {
    pub key: Bytes,
    pub value: Bytes,
    pub create_revision: Revision,
    pub mod_revision: Revision,
}

/// A lease by its id: keys that are put with it are deleted when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease(i64);

impl Lease {
    /// Puts a key that lives as long as this lease.
    pub fn put(self, key: &[u8], value: Vec<u8>) -> TxnOp {
        TxnOp::put(key, value, Some(PutOptions::new().with_lease(self.0)))
    }
}

/// A linearizable look at one key, and at the head.
pub struct Look {
    pub kv: Option<Kv>,
    pub head: Revision,
    pub cluster: ClusterId,
}

/// Part of a range, in key order.
pub struct PageRead {
    pub kvs: Vec<Kv>,
    /// The head at which etcd answered (for a pinned read: not the pin).
    pub head: Revision,
    pub more: bool,
    /// Keys in the whole range, whatever the page's limit.
    pub count: u64,
}

/// A member, as its Status tells.
pub struct Member {
    pub version: String,
    pub leader: bool,
}

/// How much of a value a read asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Columns {
    KeysAndValues,
    KeysOnly,
    CountOnly,
}

/// One connection (one HTTP/2 channel, balanced over the endpoints) to one cluster; cheap to clone. Where another cluster answers at the
/// same place later, its answers are refused: what was read before and what comes now would not fit together.
#[derive(Clone)]
pub struct Etcd {
    client: Client,
    kv: KvClient,
    endpoints: String,
    /// The cluster that answered first.
    cluster: Arc<OnceLock<ClusterId>>,
}

impl Etcd {
    /// Connects and, with a user, logs in. Members that are down are left out, or every third request to a cluster of three would fail
    /// for as long as one of them is: whoever meets an error connects anew.
    pub async fn connect(config: &EtcdConfig) -> Result<Self, EtcdError> {
        let config = &EtcdConfig { endpoints: listening(&config.endpoints).await, ..config.clone() };
        let endpoints = config.endpoints.join(", ");
        let (options, without_user) = (connect_options(config)?, EtcdConfig { username: None, ..config.clone() });
        let connecting = async {
            match Client::connect(&config.endpoints, Some(options)).await.map_err(|e| reaction(&e, &endpoints)) {
                // While users are switched off in etcd nobody has to be anyone, and nobody can log in.
                Err(EtcdError::Other(e)) if e.contains("authentication is not enabled") => {
                    let options = connect_options(&without_user)?;
                    Client::connect(&config.endpoints, Some(options)).await.map_err(|e| reaction(&e, &endpoints))
                }
                outcome => outcome,
            }
        };
        let client = match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
            Ok(client) => client?,
            Err(_) => {
                let reason = format!("no answer within {} s", CONNECT_DEADLINE.as_secs());
                return Err(EtcdError::Unreachable { endpoints, reason });
            }
        };
        let kv = client.kv_client().max_decoding_message_size(READ_BYTES_MAX).max_encoding_message_size(usize::MAX);
        Ok(Self { client, kv, endpoints, cluster: Arc::default() })
    }

    /// One key and the head, linearizable.
    pub async fn look(&self, key: &[u8]) -> Result<Look, EtcdError> {
        let mut kv = self.kv.clone();
        let right = || format!("read {}", key.escape_ascii());
        let mut answer = self.within(kv.get(key, None)).await.map_err(|e| e.needing(right))?;
        let (head, cluster) = head_of(answer.header());
        check_cluster(&self.cluster, cluster)?;
        let found = answer.take_kvs().into_iter().next().map(kv_of);
        Ok(Look { kv: found, head, cluster })
    }

    /// The first `limit` keys of `range` (0: all), at `at` or linearizable at the head.
    pub async fn page(
        &self,
        range: &KeyRange,
        limit: usize,
        at: Option<Revision>,
        columns: Columns,
    ) -> Result<PageRead, EtcdError> {
        let mut options = GetOptions::new().with_range(range.etcd_end());
        options = options.with_limit(i64::try_from(limit).unwrap_or(i64::MAX));
        if let Some(at) = at {
            options = options.with_revision(at.to_etcd());
        }
        options = match columns {
            Columns::KeysAndValues => options,
            Columns::KeysOnly => options.with_keys_only(),
            Columns::CountOnly => options.with_count_only(),
        };
        let mut kv = self.kv.clone();
        // Not the range itself: where a page begins is a key of the user's.
        let right = || "read the link's prefixes".to_owned();
        let mut answer = self.within(kv.get(range.etcd_from(), Some(options))).await.map_err(|e| e.needing(right))?;
        let (head, cluster) = head_of(answer.header());
        check_cluster(&self.cluster, cluster)?;
        let kvs = answer.take_kvs().into_iter().map(kv_of).collect();
        Ok(PageRead { kvs, head, more: answer.more(), count: u64::try_from(answer.count()).unwrap_or(0) })
    }

    /// Commits, or finds that a compare failed. Never retried here: see [`EtcdError::changed_nothing`].
    /// `right`: what the user must be permitted for it, named where etcd refuses.
    pub async fn txn(&self, txn: Txn, right: &str) -> Result<TxnResponse, EtcdError> {
        let mut kv = self.kv.clone();
        let response = self.within(kv.txn(txn)).await.map_err(|e| e.needing(|| right.to_owned()))?;
        check_cluster(&self.cluster, head_of(response.header()).1)?;
        Ok(response)
    }

    /// A lease that ends so long after its last renewal. It makes no revision.
    pub async fn grant(&self, ttl: Duration) -> Result<Lease, EtcdError> {
        let mut client = self.client.lease_client();
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        Ok(Lease(self.within(client.grant(seconds, None)).await?.id()))
    }

    /// Lets the lease's time begin anew; false: it has ended.
    pub async fn renew(&self, lease: Lease) -> Result<bool, EtcdError> {
        let mut client = self.client.lease_client();
        let renewing = async {
            match client.keep_alive(lease.0).await {
                Ok(_) => Ok(true),
                // The client's own words for an answer without time left.
                Err(ClientError::LeaseKeepAliveError(e)) if e == "lease not found" => Ok(false),
                Err(ClientError::GRpcStatus(status)) if status.code() == Code::NotFound => Ok(false),
                Err(e) => Err(e),
            }
        };
        self.within(renewing).await
    }

    /// Ends a lease, and deletes the keys that live with it.
    pub async fn revoke(&self, lease: Lease) -> Result<(), EtcdError> {
        let mut client = self.client.lease_client();
        self.within(client.revoke(lease.0)).await.map(|_| ())
    }

    /// Opens a watch stream with one watcher, with fragments. `message_bytes_max` bounds one message.
    pub async fn watch(&self, range: &KeyRange, from: Revision, message_bytes_max: usize) -> Result<Watch, EtcdError> {
        let options = WatchOptions::new()
            .with_range(range.etcd_end())
            .with_start_revision(from.to_etcd())
            .with_progress_notify()
            .with_fragment();
        let mut client = self.client.watch_client().max_decoding_message_size(message_bytes_max);
        let stream = self.within(client.watch(range.etcd_from(), Some(options))).await?;
        let (requests, responses) = stream.split();
        Ok(Watch {
            requests,
            responses,
            message_bytes_max,
            endpoints: self.endpoints.clone(),
            cluster: self.cluster.clone(),
        })
    }

    /// What the member that answers says of itself; connect to one endpoint alone to ask a certain one.
    pub async fn member(&self) -> Result<Member, EtcdError> {
        let mut client = self.client.maintenance_client();
        let status = self.within(client.status()).await?;
        let leader = status.header().is_some_and(|h| h.member_id() == status.leader());
        Ok(Member { version: status.version().to_owned(), leader })
    }

    async fn within<T>(&self, call: impl Future<Output = Result<T, ClientError>>) -> Result<T, EtcdError> {
        match tokio::time::timeout(CALL_DEADLINE, call).await {
            Ok(answer) => answer.map_err(|e| reaction(&e, &self.endpoints)),
            Err(_) => Err(EtcdError::TimedOut),
        }
    }
}

/// Those of several endpoints at which somebody listens; all of them, if nobody does anywhere.
async fn listening(endpoints: &[String]) -> Vec<String> {
    if endpoints.len() < 2 {
        return endpoints.to_vec();
    }
    let dial = async |endpoint: &String| {
        let address = endpoint.split_once("://").map_or(&endpoint[..], |(_, rest)| rest).trim_end_matches('/');
        tokio::time::timeout(LISTENING_DEADLINE, TcpStream::connect(address)).await.is_ok_and(|dialled| dialled.is_ok())
    };
    let answers = futures::future::join_all(endpoints.iter().map(dial)).await;
    let answering = endpoints.iter().zip(answers).filter(|(_, listens)| *listens);
    let answering: Vec<String> = answering.map(|(endpoint, _)| endpoint.clone()).collect();
    if answering.is_empty() { endpoints.to_vec() } else { answering }
}

/// What a watch stream says, one message at a time.
pub enum WatchSignal {
    Created,
    Events {
        /// Each with its `mod_revision`, in the order in which etcd sent them.
        events: Vec<(Revision, Change)>,
        /// True if the last revision goes on in the next message.
        fragment: bool,
    },
    /// Every event up to this revision has been sent.
    Progress(Revision),
    /// The watch began below this compacted revision, or fell behind it.
    Compacted(Revision),
    Canceled(String),
}

/// A watch stream. After an error or an end it gives nothing more: open another one.
pub struct Watch {
    requests: WatchRequestSender,
    responses: WatchResponseStream,
    message_bytes_max: usize,
    endpoints: String,
    /// Of its connection: balanced over several endpoints, the watch may have come to another one than the call before it.
    cluster: Arc<OnceLock<ClusterId>>,
}

impl Watch {
    /// The next message; cancel-safe. `Ok(None)`: etcd closed the stream.
    pub async fn next(&mut self) -> Result<Option<WatchSignal>, EtcdError> {
        match self.responses.message().await {
            Ok(Some(response)) => {
                if let Some(header) = &response.0.header {
                    check_cluster(&self.cluster, ClusterId(header.cluster_id))?;
                }
                Ok(Some(signal_of(response)))
            }
            Ok(None) => Ok(None),
            Err(e) => {
                let error = reaction(&e, &self.endpoints);
                if matches!(error, EtcdError::AnswerTooLarge { .. }) {
                    return Err(EtcdError::AnswerTooLarge { limit_bytes: self.message_bytes_max });
                }
                Err(error)
            }
        }
    }

    /// Asks etcd how far this stream is; the answer comes as [`WatchSignal::Progress`].
    pub async fn request_progress(&mut self) -> Result<(), EtcdError> {
        let asked = tokio::time::timeout(CALL_DEADLINE, self.requests.request_progress()).await;
        asked.map_err(|_| EtcdError::TimedOut)?.map_err(|e| reaction(&e, &self.endpoints))
    }
}

fn signal_of(response: WatchResponse) -> WatchSignal {
    let inner = response.0;
    if inner.compact_revision > 0 {
        return WatchSignal::Compacted(Revision::from_etcd(inner.compact_revision));
    }
    if inner.canceled || inner.watch_id < 0 && !inner.cancel_reason.is_empty() {
        return WatchSignal::Canceled(inner.cancel_reason);
    }
    if inner.created {
        return WatchSignal::Created;
    }
    if inner.events.is_empty() && !inner.fragment {
        return WatchSignal::Progress(Revision::from_etcd(inner.header.map_or(0, |header| header.revision)));
    }
    let events = inner.events.into_iter().filter_map(|event| {
        let kv = event.kv?;
        let (key, revision) = (Bytes::from(kv.key), Revision::from_etcd(kv.mod_revision));
        let change = match event.r#type {
            0 => Change::Put { key, value: Bytes::from(kv.value) },
            _ => Change::Delete { key },
        };
        Some((revision, change))
    });
    WatchSignal::Events { events: events.collect(), fragment: inner.fragment }
}

fn kv_of(kv: etcd_client::KeyValue) -> Kv {
    let create_revision = Revision::from_etcd(kv.create_revision());
    let mod_revision = Revision::from_etcd(kv.mod_revision());
    let (key, value) = kv.into_key_value();
    Kv { key: Bytes::from(key), value: Bytes::from(value), create_revision, mod_revision }
}

fn head_of(header: Option<&etcd_client::ResponseHeader>) -> (Revision, ClusterId) {
    header.map_or((Revision(0), ClusterId(0)), |h| (Revision::from_etcd(h.revision()), ClusterId(h.cluster_id())))
}

/// Every answer bears its cluster's id; the first one on a connection says which it is to be.
fn check_cluster(known: &OnceLock<ClusterId>, is: ClusterId) -> Result<(), EtcdError> {
    let was = *known.get_or_init(|| is);
    if was == is { Ok(()) } else { Err(EtcdError::OtherCluster { was, is }) }
}

/// The head in a transaction's answer: the revision that it made, if it committed.
pub fn txn_revision(response: &TxnResponse) -> Revision {
    head_of(response.header()).0
}

fn connect_options(config: &EtcdConfig) -> Result<ConnectOptions, EtcdError> {
    let mut options = ConnectOptions::new()
        .with_keep_alive(KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT)
        .with_keep_alive_while_idle(false)
        .with_connect_timeout(CONNECT_DEADLINE)
        .with_tcp_keepalive(KEEP_ALIVE_INTERVAL)
        .with_auto_token_refresh(true)
        .with_require_leader(true);
    if let (Some(user), Some(file)) = (&config.username, &config.password_file) {
        let password = std::fs::read_to_string(file)
            .map_err(|e| EtcdError::Config(format!("password_file {}: {e}", file.display())))?;
        options = options.with_user(user, password.trim_end_matches(['\r', '\n']));
    }
    if config.endpoints.iter().any(|e| e.starts_with("https://")) {
        let read = |file: &std::path::Path| {
            std::fs::read(file).map_err(|e| EtcdError::Config(format!("{}: {e}", file.display())))
        };
        let mut tls = TlsOptions::new();
        if let Some(ca) = &config.ca {
            tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
        }
        if let (Some(cert), Some(key)) = (&config.cert, &config.key) {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        options = options.with_tls(tls);
    }
    Ok(options)
}

/// One file, one place, where etcd's errors become ours. The texts are etcd's own (its api/v3rpc/rpctypes/error.go).
fn reaction(error: &ClientError, endpoints: &str) -> EtcdError {
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
    } else if has("invalid auth token") || has("auth: revision in header is old") || has("authentication failed") {
        EtcdError::LoginLost(text.to_owned())
    } else if has("transport error") {
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
