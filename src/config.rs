//! Job: the configuration file, from raw TOML to checked values.
//! Input: text. Output: a `Config`, or every fault at once, each with its field and rule.
//! Always true: a `Config` is complete and consistent; its `Debug` shows no secret.

use crate::model::{LinkName, Ranges};
use bytes::Bytes;
use std::net::SocketAddr;
use std::path::PathBuf;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub region: String,
    pub node: String,
    pub data_dir: PathBuf,
    pub etcd: EtcdConfig,
    pub listen: ListenConfig,
    pub tls: TlsConfig,
    pub send: Vec<SendConfig>,
    pub receive: Vec<ReceiveConfig>,
    pub limits: Limits,
    pub log: LogConfig,
}

#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// `http://` or `https://` URLs, all of one kind.
    pub endpoints: Vec<String>,
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub username: Option<String>,
    pub password_file: Option<PathBuf>,
}

#[derive(Debug, Clone)]
pub struct ListenConfig {
    pub peer: SocketAddr,
    pub admin: SocketAddr,
    pub http: SocketAddr,
}

#[derive(Debug, Clone)]
pub struct TlsConfig {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
    /// SANs (URI or DNS) of those who may call the admin service.
    pub admins: Vec<String>,
}

/// This cluster is the origin of the link.
#[derive(Debug, Clone)]
pub struct SendConfig {
    pub link: LinkName,
    /// `https://host:port`, tried in turn.
    pub to: Vec<String>,
    /// A SAN (URI or DNS) that the other side must bear.
    pub peer: String,
    pub ranges: Ranges,
    /// A key that lies in none of the excludes and in one of the prefixes is carried. As configured, for `status`.
    pub prefixes: Vec<Bytes>,
    pub exclude: Vec<Bytes>,
    /// The largest share (0 to 1) of the replica's keys that a base copy may delete unasked.
    pub deletes_share_max: f64,
}

/// This cluster is the replica of the link.
#[derive(Debug, Clone)]
pub struct ReceiveConfig {
    pub link: LinkName,
    pub peer: String,
    /// What the origin may touch; `None`: what its first hello says.
    pub ranges: Option<Ranges>,
}

/// Every bound of the process; each is a key of `[limits]` with the default given here.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Spool files of one link. 8 GiB.
    pub spool_bytes_max: u64,
    /// Journal files of one link. 1 GiB.
    pub journal_bytes_max: u64,
    /// One segment file. 64 MiB.
    pub segment_bytes: u64,
    /// What one stage of one link keeps in memory for the next one. 16 MiB.
    pub queue_bytes_max: usize,
    /// Plain bytes of one frame, unless a single revision is larger. 1 MiB.
    pub frame_bytes_max: usize,
    /// The delta window's values, at each end of a link. 16 MiB.
    pub window_bytes_max: usize,
    /// One revision, plain. 256 MiB: a larger one stops the link.
    pub revision_bytes_max: usize,
    /// The replica etcd's `--max-txn-ops`. 128.
    pub txn_ops_max: usize,
    /// The replica etcd's `--max-request-bytes`. 1572864.
    pub request_bytes_max: usize,
    /// Keys of one page of a base copy. 1000.
    pub page_keys_max: usize,
    /// Bytes of one page of a base copy. 1 MiB.
    pub page_bytes_max: usize,
}

#[derive(Debug, Clone)]
pub struct LogConfig {
    pub format: LogFormat,
    /// A `tracing` filter, such as `info` or `etcd_ferry=debug`.
    pub level: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}
