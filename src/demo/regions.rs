//! Job: two regions on this machine: an etcd and a sidecar each, a link between them, all in one temporary folder.
//! Input: `etcd` in PATH, this very program for the sidecars. Output: running `Regions`, and what the sidecars say of themselves.
//! Always true: processes end before their folder goes, on every way out; everything listens on loopback, on ports that were free.

use super::ports::free_port;
use super::process::Process;
use super::proxy::LinkProxy;
use crate::admin::client::{self, Connection};
use crate::admin::proto::{Link, StatusReply};
use crate::certs;
use crate::config::EtcdConfig;
use crate::etcd::Etcd;
use crate::tls::EtcdFiles;
use anyhow::{Context, bail};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const ORIGIN: &str = "us-east-1";
pub const REPLICA: &str = "cn-hangzhou";
pub const LINK: &str = "demo";
/// A port can be taken between choosing and binding it.
const STARTS_MAX: usize = 5;
/// Long enough for a small machine that does something else as well.
const START_DEADLINE: Duration = Duration::from_secs(60);
const PROBE_PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
#[error("another process took a port that was free a moment ago")]
struct PortTaken;

/// What a sidecar counted over its lives; what it counted between the last look and a `kill -9` is lost with it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub repeated: u64,
    pub refused: u64,
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { repeated: self.repeated + other.repeated, refused: self.refused + other.refused }
    }
}

/// One side.
pub struct Region {
    pub name: &'static str,
    dir: PathBuf,
    pub etcd_url: String,
    connection: Connection,
    pub http: SocketAddr,
    etcd: Process,
    sidecar: Option<Process>,
    /// Of the sidecar's earlier lives, and of this one.
    counted: (Counts, Counts),
}

/// Fields end in this order when dropped: processes first, their folder last.
pub struct Regions {
    pub origin: Region,
    pub replica: Region,
    pub proxy: Arc<LinkProxy>,
    pub folder: TempDir,
}

impl Regions {
    /// Both etcds, up and empty; both sidecars configured but not started.
    pub async fn start() -> anyhow::Result<Self> {
        for _ in 0..STARTS_MAX {
            match Self::try_start().await {
                Err(e) if e.is::<PortTaken>() => {}
                outcome => return outcome,
            }
        }
        bail!("no free ports after {STARTS_MAX} tries");
    }

    async fn try_start() -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("etcd-ferry-demo-").tempdir().context("no temporary folder")?;
        let certs = folder.path().join("certs");
        certs::dev(&certs, &[ORIGIN, REPLICA])?;
        let peer = loopback()?;
        let proxy = Arc::new(LinkProxy::start(peer).await?);
        let send =
            format!("[[send]]\nlink = {LINK:?}\nto = [\"https://{}\"]\npeer = {:?}\n", proxy.address(), san(REPLICA));
        let receive = format!("[[receive]]\nlink = {LINK:?}\npeer = {:?}\n", san(ORIGIN));
        let origin = Region::prepare(ORIGIN, folder.path(), loopback()?, &send)?;
        let replica = Region::prepare(REPLICA, folder.path(), peer, &receive)?;
        let mut regions = Self { origin, replica, proxy, folder };
        for region in [&mut regions.origin, &mut regions.replica] {
            region.etcd_is_up().await?;
        }
        Ok(regions)
    }

    /// Starts both sidecars; returns when the link is following. The first copy is then done.
    pub async fn start_sidecars(&mut self) -> anyhow::Result<()> {
        self.origin.start_sidecar()?;
        self.replica.start_sidecar()?;
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            self.check()?;
            let link = self.origin.look().await;
            match link {
                Some(link) if link.state == "following" => return Ok(()),
                Some(link) if link.state == "stopped" => bail!("the link stopped: {}", link.reason),
                last if Instant::now() > deadline => {
                    let reason = last.map_or("its sidecar does not answer".to_owned(), |link| link.reason);
                    bail!(
                        "the link does not follow after {} s: {reason}\n{}",
                        START_DEADLINE.as_secs(),
                        self.log_ends()
                    );
                }
                _ => tokio::time::sleep(PROBE_PAUSE).await,
            }
        }
    }

    /// An error if a process has ended by itself.
    pub fn check(&mut self) -> anyhow::Result<()> {
        for region in [&mut self.origin, &mut self.replica] {
            region.check()?;
        }
        Ok(())
    }

    /// Refreshes what the sidecars counted.
    pub async fn count(&mut self) -> Counts {
        self.replica.look().await;
        let (earlier, now) = self.replica.counted;
        earlier + now
    }

    /// The last lines of both sidecars' logs.
    pub fn log_ends(&self) -> String {
        let end = |region: &Region| {
            let log = region.sidecar.as_ref().map(Process::log_end).unwrap_or_default();
            format!("--- the log of the sidecar in {} ends with\n{log}\n", region.name)
        };
        format!("{}{}", end(&self.origin), end(&self.replica))
    }
}

impl Region {
    /// Writes the configuration and starts the etcd.
    fn prepare(name: &'static str, folder: &Path, peer: SocketAddr, link: &str) -> anyhow::Result<Self> {
        let dir = folder.join(name);
        fs::create_dir(&dir)?;
        let (client_url, peer_url) = (format!("http://{}", loopback()?), format!("http://{}", loopback()?));
        let (admin, http) = (loopback()?, loopback()?);
        let pem = |name: &str| folder.join("certs").join(name);
        let connection = Connection {
            admin,
            ca: pem("ca.pem"),
            cert: pem("admin.pem"),
            key: pem("admin.key"),
            own_cert: pem(&format!("{name}.pem")),
        };
        let config = format!(
            "region = {name:?}\nnode = \"{name}-a\"\ndata_dir = {data_dir}\n\n[etcd]\nendpoints = [{client_url:?}]\n\n\
             [listen]\npeer = \"{peer}\"\nadmin = \"{admin}\"\nhttp = \"{http}\"\n\n\
             [tls]\nca = {ca}\ncert = {cert}\nkey = {key}\nadmins = [\"spiffe://etcd-ferry.dev/admin\"]\n\n{link}",
            data_dir = quoted(&dir.join("ferry")),
            ca = quoted(&connection.ca),
            cert = quoted(&connection.own_cert),
            key = quoted(&pem(&format!("{name}.key"))),
        );
        fs::write(dir.join("config.toml"), config)?;
        let mut etcd = Command::new("etcd");
        // A variable of the user's own that names a flag would be refused beside the flag.
        for (variable, _) in std::env::vars_os().filter(|(v, _)| v.to_string_lossy().starts_with("ETCD_")) {
            etcd.env_remove(variable);
        }
        etcd.args(["--name", "default", "--log-level", "warn", "--data-dir"]).arg(dir.join("etcd"));
        etcd.args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url]);
        etcd.args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url]);
        etcd.args(["--initial-cluster", &format!("default={peer_url}")]);
        let etcd = Process::start(&mut etcd, dir.join("etcd.log"))?;
        Ok(Self { name, dir, etcd_url: client_url, connection, http, etcd, sidecar: None, counted: Default::default() })
    }

    async fn etcd_is_up(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            self.check()?;
            let asked = async { self.connect().await?.look(b"up").await };
            match asked.await {
                Ok(_) => return Ok(()),
                Err(e) if Instant::now() > deadline => bail!("the etcd of {} does not serve: {e}", self.name),
                Err(_) => tokio::time::sleep(PROBE_PAUSE).await,
            }
        }
    }

    /// A connection to this region's etcd.
    pub async fn connect(&self) -> Result<Etcd, crate::etcd::EtcdError> {
        let endpoints = vec![self.etcd_url.clone()];
        Etcd::connect(&EtcdConfig { endpoints, ..EtcdConfig::default() }, &EtcdFiles::default()).await
    }

    pub fn config_path(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    pub fn log_path(&self) -> PathBuf {
        self.dir.join("ferry.log")
    }

    /// This very program, as `etcd-ferry run`.
    pub fn start_sidecar(&mut self) -> anyhow::Result<()> {
        let program = std::env::current_exe().context("the path of this program is not known")?;
        let mut command = Command::new(program);
        command.args(["run", "--config"]).arg(self.config_path());
        self.sidecar = Some(Process::start(&mut command, self.log_path())?);
        Ok(())
    }

    /// `kill -9`.
    pub async fn kill_sidecar(&mut self) {
        self.look().await;
        self.sidecar = None;
        let (earlier, last) = self.counted;
        self.counted = (earlier + last, Counts::default());
    }

    /// What the sidecar says of the link; `None` if it does not answer.
    async fn look(&mut self) -> Option<Link> {
        let reply: StatusReply = client::status(&self.connection).await.ok()?;
        let link = reply.links.into_iter().find(|link| link.link == LINK)?;
        let count = |name: &str| link.counts.get(name).copied().unwrap_or(0);
        self.counted.1 = Counts { repeated: count("repeated"), refused: count("refused") };
        Some(link)
    }

    fn check(&mut self) -> anyhow::Result<()> {
        let children = [("etcd", Some(&mut self.etcd)), ("sidecar", self.sidecar.as_mut())];
        for (what, process) in children {
            let Some(process) = process else { continue };
            let Some(status) = process.ended() else { continue };
            let log = process.log_end();
            if log.contains("address already in use") || log.contains("cannot listen at") {
                bail!(PortTaken);
            }
            bail!("the {what} of {} ended by itself ({status}); its last words:\n{log}", self.name);
        }
        Ok(())
    }
}

fn loopback() -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::from(([127, 0, 0, 1], free_port()?)))
}

/// Where the replica's etcd keeps the link's position.
pub fn position_key() -> String {
    format!("/etcd-ferry/v1/links/{LINK}/position")
}

fn san(region: &str) -> String {
    format!("spiffe://etcd-ferry.dev/region/{region}")
}

/// A path as TOML wants it.
fn quoted(path: &Path) -> String {
    toml::Value::from(path.to_string_lossy().into_owned()).to_string()
}
