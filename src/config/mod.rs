//! Job: the configuration, from a file, the environment and flags to checked values.
//! Input: text. Output: a `Config`, or every fault at once, each with its field and rule, and where its value stands.
//! Always true: a `Config` is complete and consistent; its `Debug` shows no secret (secrets stay in files of their own).

pub mod change;
mod check;
mod effective;
mod files;
mod layers;
mod limits;
mod pki;
mod read;
mod traces;

pub use check::{LOG_LEVEL_RULE, is_log_level};
pub use effective::effective_toml;
pub use layers::{Override, Source, is_variable};

use crate::certs::identity::PeerIdentity;
use crate::model::{LinkName, Ranges};
use bytes::Bytes;
use files::NamedFiles;
use layers::Layered;
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use limits::Limits;
pub use pki::PkiConfig;
pub use traces::TracesConfig;

/// Largest configuration file that is read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// One fault of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where: `send[0].to[1]`, or `line 3, column 5`.
    pub field: String,
    /// The rule that is broken, and what to do.
    pub rule: String,
}

impl Fault {
    /// True where a flag of this command is at fault, and not what a sidecar runs with.
    pub fn is_of_a_flag(&self) -> bool {
        let flag = Source::Flag;
        self.field.starts_with(&format!("{flag} ")) || self.rule.ends_with(&format!("[{flag}]"))
    }
}

/// All faults of a configuration; shown one on a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Faults(pub Vec<Fault>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.0.iter().enumerate() {
            let line_break = if i == 0 { "" } else { "\n" };
            write!(f, "{line_break}{}: {}", fault.field, fault.rule)?;
        }
        Ok(())
    }
}

impl Config {
    /// Reads and checks text; looks at no file. Paths stay as they are written: relative ones are relative to the
    /// current directory, as those on a command line are.
    pub fn from_toml(text: &str) -> Result<Config, Faults> {
        check::config(&read::parse(text)?).0
    }
}

/// What a configuration is read from: a file, over it the environment, over both the flags.
#[derive(Debug, Clone)]
pub struct Layers {
    file: PathBuf,
    variables: Vec<(String, OsString)>,
    flags: Vec<String>,
}

/// A sound configuration with sound files.
#[derive(Debug, Clone)]
pub struct Checked {
    pub config: Config,
    /// Whom this sidecar's own certificate names; `None`: there is none yet, and the PKI is to issue it.
    pub identity: Option<PeerIdentity>,
    /// What is not as the file says.
    pub overrides: Vec<Override>,
}

impl Checked {
    /// What is no fault, and hardly meant.
    pub fn warnings(&self) -> Vec<String> {
        let Config { tls, send, receive, .. } = &self.config;
        let mut warnings = Vec::new();
        if tls.admins.is_empty() {
            let who = if tls.viewers.is_empty() {
                "nobody may ask this sidecar anything"
            } else {
                "nobody may do more than look"
            };
            warnings.push(format!("tls.admins is empty: {who}; list the names of your operators' certificates"));
        }
        let sends = send.iter().map(|link| ("send", &link.link, &link.peer));
        let receives = receive.iter().map(|link| ("receive", &link.link, &link.peer));
        for (side, link, peer) in sends.chain(receives) {
            if self.identity.as_ref().is_some_and(|identity| identity.bears(peer)) {
                warnings.push(format!(
                    "[[{side}]] {link}: peer {peer} is a name of this sidecar's own certificate; it is to be the other region's"
                ));
            }
        }
        warnings
    }
}

impl Layers {
    /// A file, this process's environment as it is now, and what `--set` said: `section.key=value`.
    pub fn new(file: &Path, flags: &[String]) -> Self {
        let variables = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let variables = variables.filter(|(name, _)| is_variable(name)).collect();
        Self { file: file.to_owned(), variables, flags: flags.to_vec() }
    }

    /// The same file and flags, with the environment as it is now.
    pub fn again(&self) -> Self {
        Self::new(&self.file, &self.flags)
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Reads and checks the configuration; looks at no file that it names.
    pub fn load(&self) -> Result<Config, Faults> {
        let (_, config, _) = self.read()?;
        config
    }

    /// Reads and checks the configuration and every file that it names, also where a rule is broken; changes nothing.
    pub fn check(&self) -> Result<Checked, Faults> {
        let (layered, config, files) = self.read()?;
        match (config, files.check()) {
            (Ok(config), Ok(identity)) => Ok(Checked { config, identity, overrides: layered.overrides }),
            (config, identity) => {
                let of_rules = config.err().map_or(Vec::new(), |faults| faults.0);
                let of_files = identity.err().map_or(Vec::new(), |faults| faults.0);
                Err(Faults([of_rules, layered.locate(of_files)].concat()))
            }
        }
    }

    /// All layers in one table, what its rules make of it, and what it names.
    fn read(&self) -> Result<(Layered, Result<Config, Faults>, NamedFiles), Faults> {
        let text = read_file(&self.file)?;
        let named = |Faults(faults)| {
            let file = self.file.display();
            let name = |fault: Fault| Fault { field: format!("{file}, {}", fault.field), ..fault };
            Faults(faults.into_iter().map(name).collect())
        };
        let table = read::parse(&text).map_err(named)?;
        let mut layered = layers::lay(&text, table, &self.variables, &self.flags);
        let (config, files) = check::config(&layered.table);
        let of_layers = std::mem::take(&mut layered.faults);
        let config = match config {
            Ok(config) if of_layers.is_empty() => Ok(config),
            config => {
                let of_rules = config.err().map_or(Vec::new(), |faults| faults.0);
                Err(Faults([of_layers, layered.locate(of_rules)].concat()))
            }
        };
        Ok((layered, config, files))
    }
}

fn read_file(path: &Path) -> Result<String, Faults> {
    let fault = |rule| Faults(vec![Fault { field: path.display().to_string(), rule }]);
    let unreadable = |e: std::io::Error| fault(format!("cannot be read ({e}): give the path of a TOML file"));
    if std::fs::metadata(path).map_err(unreadable)?.len() > CONFIG_BYTES_MAX {
        return Err(fault(format!("is larger than {CONFIG_BYTES_MAX} bytes: give the path of a TOML file")));
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub region: String,
    pub node: String,
    pub data_dir: PathBuf,
    pub etcd: EtcdConfig,
    /// `None`: this sidecar compacts nothing.
    pub compact: Option<CompactConfig>,
    pub listen: ListenConfig,
    pub tls: TlsConfig,
    /// Who issues the pair that `tls` names; `None`: somebody else puts it there.
    pub pki: Option<PkiConfig>,
    pub send: Vec<SendConfig>,
    pub receive: Vec<ReceiveConfig>,
    pub limits: Limits,
    pub log: LogConfig,
    /// `None`: no traces.
    pub traces: Option<TracesConfig>,
}

#[derive(Debug, Clone, Default)]
pub struct EtcdConfig {
    /// `http://` or `https://` URLs, all of one kind.
    pub endpoints: Vec<String>,
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub username: Option<String>,
    pub password_file: Option<PathBuf>,
    /// Links also go through members whose version is known to corrupt data.
    pub allow_corrupting_versions: bool,
}

/// Compaction of the replica's etcd by age.
#[derive(Debug, Clone, Copy)]
pub struct CompactConfig {
    /// What is younger stays.
    pub after: Duration,
    pub defragment: bool,
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
    /// Revocation lists of the CA; with it, a certificate without a known status and a list past its time are refused.
    pub crl: Option<PathBuf>,
    /// SANs (URI or DNS) of those who may call everything of the admin service; none: nobody may.
    pub admins: Vec<String>,
    /// The same of those who may only look.
    pub viewers: Vec<String>,
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
    /// The largest share (0 to 1) of the replica's keys that a base copy may delete unasked. 0.1.
    pub deletes_share_max: f64,
    pub other_history: OtherHistory,
    /// Both sides are compared so often by themselves; `None`: only when somebody asks. 15 minutes.
    pub verify_interval: Option<Duration>,
    /// The share of a core that such a comparison takes at each side. 0.05.
    pub verify_core_share_max: f64,
    /// A canary is written so often; `None`, the default: never.
    pub canary_interval: Option<Duration>,
}

/// This cluster is the replica of the link.
#[derive(Debug, Clone)]
pub struct ReceiveConfig {
    pub link: LinkName,
    pub peer: String,
    /// What the origin may touch; `None`: what its first hello says.
    pub ranges: Option<Ranges>,
    /// The same as configured.
    pub prefixes: Option<Vec<Bytes>>,
    pub foreign_writes: ForeignWrites,
    pub on_poison: OnPoison,
    pub delete_shares: DeleteShares,
}

/// What becomes of a link whose origin has another history than the one that was carried: it was restored, or replaced by another cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OtherHistory {
    /// The link stops, until an operator asks for a resync.
    #[default]
    Stop,
    /// The next epoch opens by itself, and what differs is found by digests and mended.
    Resync,
}

/// What becomes of others' writes at the replica, under the link's prefixes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ForeignWrites {
    /// They are told.
    #[default]
    Report,
    /// They are told, and the origin is asked for a repair.
    Repair,
    /// They are nobody's concern.
    Expect,
}

/// What a link may delete at the replica, while it follows, before a person is asked: shares (0 to 1) of the keys that it holds there.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DeleteShares {
    /// In one revision; `None`: any.
    pub revision: Option<f64>,
    /// Within a minute; `None`: any.
    pub minute: Option<f64>,
}

/// What becomes of a revision that the replica's etcd refuses whenever it is tried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnPoison {
    /// The link does not go past it.
    #[default]
    Stop,
    /// The link goes on without it, and says so.
    Quarantine,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// `text` (the default) or `json`.
    pub format: LogFormat,
    /// A `tracing` filter, such as `info` (the default) or `info,etcd_ferry=debug`.
    pub level: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}
