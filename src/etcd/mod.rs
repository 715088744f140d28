//! Job: the narrow typed door to etcd: connect, read, commit a transaction, watch.
//! Input: an `EtcdConfig`, ranges, transactions. Output: plain values, or an `EtcdError` that says what kind of doubt it leaves.
//! Always true: each call ends within its deadline, but for `Watch::next`, which waits for what comes; reads are linearizable unless they
//! name a revision; a connection believes one cluster, in answers and on a watch alike; nothing retries by itself.

mod bisect;
mod error;
pub mod gate;
mod lease;
pub mod limits;
pub mod version;
mod watch;

use crate::config::EtcdConfig;
use crate::model::{ClusterId, KeyRange, Revision};
use crate::tls::EtcdFiles;
use bytes::Bytes;
use error::{USERS_OFF, reaction};
use etcd_client::{
    Certificate, Client, ConnectOptions, Error as ClientError, GetOptions, Identity, KvClient, TlsOptions, WatchOptions,
};
use gate::Refusal;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch as watch_channel;
use tokio::time::{Instant, Interval};

pub use error::{EtcdError, with_sources};
pub use etcd_client::{Compare, CompareOp, DeleteOptions, Txn, TxnOp, TxnOpResponse, TxnResponse};
pub use lease::{Lease, Renewals};
pub use watch::{Watch, WatchSignal};

/// etcd's own client gives an unanswered request this long; so do we.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Some gigabytes on a slow disk.
const DEFRAGMENT_DEADLINE: Duration = Duration::from_secs(600);
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// A member of one's own cluster is near: one that does not take a connection in this time is down.
const LISTENING_DEADLINE: Duration = Duration::from_millis(500);
/// etcd answers pings more frequent than 5 s with GOAWAY.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Events that are on their way come within this.
const WRITES_PROGRESS_AFTER: Duration = Duration::from_secs(1);
/// A page holds at least one key, and a value may be as large as a request: far above etcd's default of 1.5 MiB.
const READ_BYTES_MAX: usize = 256 << 20;

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
    /// Of its database file.
    pub bytes: u64,
    /// Of that, what is not free.
    pub bytes_in_use: u64,
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
    /// Why it takes no calls at present, told by the gate that it was made by.
    refusal: Option<watch_channel::Receiver<Option<Refusal>>>,
    /// A notice of progress that a watch asked for comes after the events that it speaks of.
    progress_in_order: bool,
}

impl Etcd {
    /// Connects and, with a user, logs in. Members that are down are left out, or every third request to a cluster of three would fail
    /// for as long as one of them is: whoever meets an error connects anew.
    pub async fn connect(config: &EtcdConfig, files: &EtcdFiles) -> Result<Self, EtcdError> {
        let config = &EtcdConfig { endpoints: listening(&config.endpoints).await, ..config.clone() };
        let endpoints = config.endpoints.join(", ");
        let (options, without_user) =
            (connect_options(config, files)?, EtcdConfig { username: None, ..config.clone() });
        let connecting = async {
            match Client::connect(&config.endpoints, Some(options)).await.map_err(|e| reaction(&e, &endpoints)) {
                // While users are switched off in etcd nobody has to be anyone, and nobody can log in.
                Err(EtcdError::LoginLost(e)) if e.contains(USERS_OFF) => {
                    let options = connect_options(&without_user, files)?;
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
        Ok(Self { client, kv, endpoints, cluster: Arc::default(), refusal: None, progress_in_order: true })
    }

    fn behind(self, refusal: watch_channel::Receiver<Option<Refusal>>, progress_in_order: bool) -> Self {
        Self { refusal: Some(refusal), progress_in_order, ..self }
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

    /// How long a watch has to show nothing before it is asked how far it is: no time; or, where asking is a write, until the events alone
    /// would have told.
    pub fn asks_progress_after(&self) -> Duration {
        if self.progress_in_order { Duration::ZERO } else { WRITES_PROGRESS_AFTER }
    }

    /// When a watch that has just been opened is to be asked how far it is, again and again.
    pub fn progress_asks(&self, every: Duration) -> Interval {
        let first = self.asks_progress_after();
        tokio::time::interval_at(Instant::now() + first, every.max(first))
    }

    /// Has a watch tell how far it is. Where a notice of progress may run ahead of the events, the event of `key` tells the same, since a
    /// watcher's events come in order: it is written for that, and has to lie in the watch's range. [`LINKS_PREFIX`](crate::model::LINKS_PREFIX)
    /// does in every link's, so that one write tells all of them.
    pub async fn ask_progress(&self, watch: &mut Watch, key: &[u8]) -> Result<(), EtcdError> {
        if self.progress_in_order {
            return watch.request_progress().await;
        }
        let put = Txn::new().and_then([TxnOp::put(key, "", None)]);
        self.txn(put, &format!("write {}", key.escape_ascii())).await.map(drop)
    }

    /// What the member that answers says of itself; connect to one endpoint alone to ask a certain one.
    pub async fn member(&self) -> Result<Member, EtcdError> {
        let mut client = self.client.maintenance_client();
        let status = self.within(client.status()).await?;
        let leader = status.header().is_some_and(|h| h.member_id() == status.leader());
        let bytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        let (file, in_use) = (bytes(status.0.db_size), bytes(status.0.db_size_in_use));
        Ok(Member { version: status.version().to_owned(), leader, bytes: file, bytes_in_use: in_use })
    }

    /// Lets go of every version that was overwritten up to `through`, which itself stays readable.
    pub async fn compact(&self, through: Revision) -> Result<(), EtcdError> {
        let mut kv = self.kv.clone();
        self.within(kv.compact(through.to_etcd(), None)).await.map(|_| ())
    }

    /// Gives the disk back what is free in the file of the member that answers, which serves nobody meanwhile; as for `member`, connect to
    /// one endpoint alone.
    pub async fn defragment(&self) -> Result<(), EtcdError> {
        let mut client = self.client.maintenance_client();
        match tokio::time::timeout(DEFRAGMENT_DEADLINE, client.defragment()).await {
            Ok(answer) => answer.map(|_| ()).map_err(|e| reaction(&e, &self.endpoints)),
            Err(_) => Err(EtcdError::TimedOut),
        }
    }

    async fn within<T>(&self, call: impl Future<Output = Result<T, ClientError>>) -> Result<T, EtcdError> {
        if let Some(refusal) = self.refusal.as_ref().and_then(|refusal| refusal.borrow().clone()) {
            return Err(EtcdError::VersionRefused(refusal));
        }
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

fn connect_options(config: &EtcdConfig, files: &EtcdFiles) -> Result<ConnectOptions, EtcdError> {
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
    if let Some(tls) = tls_options(config, files) {
        options = options.with_tls(tls);
    }
    Ok(options)
}

/// `None`: without TLS.
fn tls_options(config: &EtcdConfig, files: &EtcdFiles) -> Option<TlsOptions> {
    if !config.endpoints.iter().any(|e| e.starts_with("https://")) {
        return None;
    }
    let mut tls = TlsOptions::new();
    if let Some(ca) = &files.ca {
        tls = tls.ca_certificate(Certificate::from_pem(ca));
    }
    if let Some((cert, key)) = &files.pair {
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    Some(tls)
}
