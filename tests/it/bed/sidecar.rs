//! Job: the product's own processes: configuration, certificates, start, stop, what they say of themselves.
//! Input: `SidecarOptions`. Output: a `Sidecar`.
//! Always true: a restart keeps ports, data folder and configuration unless the test rewrites it; only the fixed interfaces are used:
//! the command line, the configuration file, the status JSON, http.

use super::etcd::Access;
use super::ports::free_port;
use super::process::Process;
use super::{PATIENCE, until};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Within which SIGTERM has to be done.
pub const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The longest command that a test runs is a demo.
const COMMAND_SECONDS_MAX: &str = "150";

/// A run of the command line, to its end; one that has none is ended, which is a failure with nothing said.
pub fn ferry(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=1", COMMAND_SECONDS_MAX, env!("CARGO_BIN_EXE_etcd-ferry")]);
    command.args(arguments).output().expect("etcd-ferry runs")
}

/// Makes a CA, a pair for each region and an admin pair in `dir`, as `etcd-ferry certs dev` does.
pub fn make_certificates(dir: &Path, regions: &[&str]) {
    etcd_ferry::certs::dev(dir, regions).expect("development certificates are made");
}

/// The name that a region's certificate bears.
pub fn region_name(region: &str) -> String {
    format!("spiffe://etcd-ferry.dev/region/{region}")
}

/// The three listeners; chosen before anything starts, since each side's configuration names the other's.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    pub peer: SocketAddr,
    pub admin: SocketAddr,
    pub http: SocketAddr,
}

impl Ports {
    pub fn choose() -> Self {
        let address = || SocketAddr::from(([127, 0, 0, 1], free_port()));
        Self { peer: address(), admin: address(), http: address() }
    }
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct SendLink {
    pub link: String,
    pub to: Vec<String>,
    pub peer: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deletes_share_max: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify_interval_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other_history: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary_interval_seconds: Option<u64>,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct ReceiveLink {
    pub link: String,
    pub peer: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub foreign_writes: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_poison: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision_deletes_share_max: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minute_deletes_share_max: Option<f64>,
}

#[derive(Debug, Clone)]
pub struct SidecarOptions {
    pub region: String,
    /// Told apart from the other sidecars of its cluster by its last letter.
    pub node: String,
    pub etcd: Access,
    /// What it dials to reach its etcd; empty: `etcd.url` alone.
    pub endpoints: Vec<String>,
    /// Not in the file if `None`.
    pub compact_after_seconds: Option<u64>,
    pub defragment: Option<bool>,
    pub ports: Ports,
    /// As `make_certificates` left it.
    pub certs: PathBuf,
    /// `tls.crl`.
    pub crl: Option<PathBuf>,
    /// `tls.viewers`.
    pub viewers: Vec<String>,
    /// `[tls.pki]`.
    pub pki: Option<toml::Table>,
    /// `[traces]`.
    pub traces: Option<toml::Table>,
    pub send: Vec<SendLink>,
    pub receive: Vec<ReceiveLink>,
    /// Keys of `[limits]`.
    pub limits: BTreeMap<String, u64>,
    pub log_level: String,
    /// Of `[etcd]`.
    pub allow_corrupting_versions: bool,
    /// Of the next start's environment, such as `spooled=return`; empty: none.
    pub failpoints: String,
}

impl SidecarOptions {
    pub fn new(region: &str, etcd: Access, ports: Ports, certs: &Path) -> Self {
        Self {
            region: region.to_owned(),
            node: format!("{region}-a"),
            endpoints: Vec::new(),
            compact_after_seconds: None,
            defragment: None,
            etcd,
            ports,
            certs: certs.to_owned(),
            crl: None,
            viewers: Vec::new(),
            pki: None,
            traces: None,
            send: Vec::new(),
            receive: Vec::new(),
            limits: BTreeMap::new(),
            log_level: "info,etcd_ferry=debug".to_owned(),
            allow_corrupting_versions: false,
            failpoints: String::new(),
        }
    }
}

/// The configuration file, in the order in which an operator would write it.
#[derive(Serialize)]
struct ConfigFile<'a> {
    region: &'a str,
    node: String,
    data_dir: PathBuf,
    etcd: EtcdTable<'a>,
    listen: ListenTable,
    tls: TlsTable<'a>,
    log: LogTable<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traces: Option<&'a toml::Table>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    limits: &'a BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    send: &'a [SendLink],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    receive: &'a [ReceiveLink],
}

#[derive(Serialize)]
struct EtcdTable<'a> {
    endpoints: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cert: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    username: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    password_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    allow_corrupting_versions: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    compact_after_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    defragment: Option<bool>,
}

#[derive(Serialize)]
struct ListenTable {
    peer: SocketAddr,
    admin: SocketAddr,
    http: SocketAddr,
}

#[derive(Serialize)]
struct TlsTable<'a> {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    crl: Option<&'a Path>,
    admins: [&'a str; 1],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    viewers: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    pki: Option<&'a toml::Table>,
}

#[derive(Serialize)]
struct LogTable<'a> {
    format: &'a str,
    level: &'a str,
}

/// One sidecar, running or not; killed when dropped. Its folder is the test's.
pub struct Sidecar {
    /// What the next `write_config` writes.
    pub options: SidecarOptions,
    dir: PathBuf,
    process: Option<Process>,
}

impl Sidecar {
    /// Writes the configuration into `dir` (made if absent), starts the sidecar, waits until it answers over http.
    pub async fn start(options: SidecarOptions, dir: &Path) -> Self {
        let mut sidecar = Self::prepare(options, dir);
        sidecar.restart().await;
        sidecar
    }

    /// Writes the configuration only.
    pub fn prepare(options: SidecarOptions, dir: &Path) -> Self {
        let sidecar = Self { options, dir: dir.to_owned(), process: None };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(sidecar.data_dir()).expect("a data folder");
        sidecar.write_config();
        sidecar
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn config_path(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// Writes `options` to the configuration file; the next start reads it.
    pub fn write_config(&self) {
        let options = &self.options;
        let password_file =
            options.etcd.user.as_ref().map(|(_, password)| self.write_secret("etcd-password", password));
        let pair = options.etcd.tls.as_ref();
        let config = ConfigFile {
            region: &options.region,
            node: options.node.clone(),
            data_dir: self.data_dir(),
            etcd: EtcdTable {
                endpoints: match &options.endpoints[..] {
                    [] => std::slice::from_ref(&options.etcd.url),
                    several => several,
                },
                ca: pair.map(|tls| tls.ca.as_path()),
                cert: pair.map(|tls| tls.cert.as_path()),
                key: pair.map(|tls| tls.key.as_path()),
                username: options.etcd.user.as_ref().map(|(name, _)| name.as_str()),
                password_file,
                allow_corrupting_versions: options.allow_corrupting_versions,
                compact_after_seconds: options.compact_after_seconds,
                defragment: options.defragment,
            },
            listen: ListenTable { peer: options.ports.peer, admin: options.ports.admin, http: options.ports.http },
            tls: TlsTable {
                ca: options.certs.join("ca.pem"),
                cert: options.certs.join(format!("{}.pem", options.region)),
                key: options.certs.join(format!("{}.key", options.region)),
                crl: options.crl.as_deref(),
                admins: ["spiffe://etcd-ferry.dev/admin"],
                viewers: &options.viewers,
                pki: options.pki.as_ref(),
            },
            log: LogTable { format: "text", level: &options.log_level },
            traces: options.traces.as_ref(),
            limits: &options.limits,
            send: &options.send,
            receive: &options.receive,
        };
        let text = toml::to_string(&config).expect("a configuration is TOML");
        fs::write(self.config_path(), text).expect("the configuration is written");
    }

    fn write_secret(&self, name: &str, secret: &str) -> PathBuf {
        let path = self.dir.join(name);
        fs::write(&path, secret).expect("a secret is written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("a secret is kept private");
        path
    }

    /// Starts it without waiting for anything: for tests of a sidecar that must not come up.
    pub fn spawn(&mut self) {
        self.process = None;
        let mut command = Command::new(env!("CARGO_BIN_EXE_etcd-ferry"));
        command.args(["run", "--config"]).arg(self.config_path());
        command.env("ETCD_FERRY_FAILPOINTS", &self.options.failpoints);
        let name = format!("etcd-ferry {}", self.options.node);
        self.process = Some(Process::start(&name, &mut command, &self.log_path()));
    }

    /// Starts it where it was, killing it if it still runs, and waits until it answers over http.
    pub async fn restart(&mut self) {
        self.spawn();
        let http = self.options.ports.http;
        let process = self.process.as_mut().expect("it was just started");
        until("the sidecar to answer over http", PATIENCE, async || {
            if let Some(status) = process.ended() {
                panic!("the sidecar ended by itself ({status}):\n{}", process.log());
            }
            get(http, "/healthz").await
        })
        .await;
    }

    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("this sidecar is not running")
    }

    /// How it ended; panics if it goes on.
    pub async fn ended(&mut self) -> ExitStatus {
        let process = self.process.as_mut().expect("this sidecar was not started");
        until("the sidecar to end", PATIENCE, async || process.ended()).await
    }

    /// How it ended, if it has.
    pub fn try_ended(&mut self) -> Option<ExitStatus> {
        self.process.as_mut().expect("this sidecar was not started").ended()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// What is shown or answered may be so before the log's line is written.
    pub async fn wait_for_log(&self, words: &str) {
        let what = format!("{words:?} in the log of {}", self.options.region);
        until(&what, PATIENCE, async || self.log().contains(words).then_some(())).await;
    }

    pub fn log_path(&self) -> PathBuf {
        self.dir.join("ferry.log")
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM; how long it took, and how it ended. Panics if it takes longer than the promised 5 s.
    pub async fn stop(&mut self) -> (Duration, ExitStatus) {
        let mut process = self.process.take().expect("this sidecar is not running");
        process.terminate(STOP_LIMIT).await
    }

    /// SIGSTOP.
    pub fn pause(&self) {
        self.process().pause();
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.process().resume();
    }

    /// A command that talks to the running sidecar, such as `["resync", "config"]`.
    pub fn admin(&self, arguments: &[&str]) -> Output {
        let config = self.config_path();
        let config = config.to_str().expect("a temporary folder has a plain name");
        ferry(&[arguments, &["--config", config]].concat())
    }

    /// `etcd-ferry status --json`, as a user runs it.
    pub fn status(&self) -> Value {
        let output = self.admin(&["status", "--json"]);
        assert!(output.status.success(), "etcd-ferry status: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("status --json prints JSON")
    }

    /// `/healthz?full=1`, if it answers.
    pub async fn health(&self) -> Option<Value> {
        let (_, body) = get(self.options.ports.http, "/healthz?full=1").await?;
        serde_json::from_str(&body).ok()
    }

    /// What `pick` finds in `/healthz?full=1`, as soon as it finds something.
    pub async fn wait_for_health<T>(&self, what: &str, pick: impl Fn(&Value) -> Option<T>) -> T {
        until(what, PATIENCE, async || pick(&self.health().await?)).await
    }

    /// A page of the http listener: status code and body.
    pub async fn http(&self, path: &str) -> (u16, String) {
        until(&format!("an answer to {path}"), PATIENCE, async || get(self.options.ports.http, path).await).await
    }

    /// One link's entry of `/healthz?full=1`, as soon as it looks as wanted; panics after `limit`, with the last that was seen.
    pub async fn wait_for_within(
        &self,
        link: &str,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let last = std::cell::RefCell::new(Value::Null);
        let seen = async {
            until(what, limit * 2, async || {
                let entry = link_of(&self.health().await?, link)?;
                last.replace(entry.clone());
                wanted(&entry).then_some(entry)
            })
            .await
        };
        let seen = tokio::time::timeout(limit, seen).await;
        let node = &self.options.node;
        seen.unwrap_or_else(|_| panic!("{node}: waited {limit:?} in vain for: {what}; last seen: {:#}", last.borrow()))
    }

    pub async fn wait_for(&self, link: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.wait_for_within(link, what, PATIENCE, wanted).await
    }

    /// Waits for a state, such as `following`.
    pub async fn wait_for_state(&self, link: &str, state: &str) -> Value {
        self.wait_for(link, &format!("link {link} to be {state}"), |entry| entry["state"] == state).await
    }
}

/// The entry of one link in a status or health answer.
pub fn link_of(answer: &Value, link: &str) -> Option<Value> {
    answer["links"].as_array()?.iter().find(|entry| entry["link"] == link).cloned()
}

/// A plain GET over HTTP/1.0, so that the body ends with the connection; `None` if nobody answers.
async fn get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok()?;
    let answer = String::from_utf8(answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let code = head.split(' ').nth(1)?.parse().ok()?;
    Some((code, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_of_the_bed_is_toml_with_every_table() {
        let dir = tempfile::tempdir().unwrap();
        let access =
            Access { url: "http://127.0.0.1:1".into(), tls: None, user: Some(("ferry".into(), "pass".into())) };
        let mut options = SidecarOptions::new("us-east-1", access, Ports::choose(), dir.path());
        options.send.push(SendLink { link: "config".into(), prefixes: vec!["/app/".into()], ..SendLink::default() });
        options.receive.push(ReceiveLink { link: "back".into(), ..ReceiveLink::default() });
        options.limits.insert("spool_bytes_max".into(), 1_000_000);
        let sidecar = Sidecar::prepare(options, dir.path());
        let config: toml::Table = fs::read_to_string(sidecar.config_path()).unwrap().parse().unwrap();
        assert_eq!(config["node"].as_str(), Some("us-east-1-a"));
        assert_eq!(config["send"][0]["prefixes"][0].as_str(), Some("/app/"));
        assert!(config["receive"][0].get("prefixes").is_none());
        assert_eq!(config["limits"]["spool_bytes_max"].as_integer(), Some(1_000_000));
        assert!(
            !fs::read_to_string(sidecar.config_path()).unwrap().contains("pass\""),
            "the password is in a file of its own"
        );
    }
}
