//! Job: real etcd processes on free loopback ports, and plain reads of what they hold.
//! Input: `EtcdOptions`. Output: an `Etcd`, its clients, key ranges at a revision.
//! Always true: a restart keeps ports and data; writes are synced unless the options say otherwise; a missing etcd is a panic that says
//! what to do.

use super::ports::free_port;
use super::process::Process;
use super::{PATIENCE, PROBE_PAUSE, until};
use bytes::Bytes;
use etcd_client::{
    AlarmAction, AlarmOptions, AlarmType, Certificate, Client, CompactionOptions, ConnectOptions, GetOptions, Identity,
    KvClient, Permission, PermissionType, TlsOptions,
};
use etcd_ferry::model::{KeyRange, LinkName, Position, Ranges, Revision};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::Instant;

pub type KeyMap = BTreeMap<Bytes, Bytes>;

const PAGE_KEYS: i64 = 1_000;
/// A port can be taken between choosing and binding it.
const STARTS_MAX: usize = 5;
pub const ROOT_PASSWORD: &str = "root-password";

#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// The folder of `etcd` and `etcdutl`; `None`: both from PATH.
    pub bin: Option<PathBuf>,
    pub tls: Option<EtcdTls>,
    /// Users and roles on, with a user `root`.
    pub auth: bool,
    pub quota_backend_bytes: Option<u64>,
    pub max_request_bytes: Option<u64>,
    pub max_txn_ops: Option<u64>,
    /// False: `--unsafe-no-fsync`, for tests that write much and lose no power.
    pub sync: bool,
    pub extra: Vec<String>,
}

/// Files of one pair that the etcd serves with and the bed's clients show. Without a pair of this CA a client is refused when
/// `client_certificates` is set.
#[derive(Debug, Clone)]
pub struct EtcdTls {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
    pub client_certificates: bool,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            bin: default_bin(),
            tls: None,
            auth: false,
            quota_backend_bytes: None,
            max_request_bytes: None,
            max_txn_ops: None,
            sync: true,
            extra: Vec::new(),
        }
    }
}

impl EtcdOptions {
    /// As the default, from the folder that `ETCD_FERRY_ORIGIN_ETCD` names, if it is set.
    pub fn origin() -> Self {
        Self::from_folder_in("ETCD_FERRY_ORIGIN_ETCD")
    }

    /// As the default, from the folder that `ETCD_FERRY_REPLICA_ETCD` names, if it is set.
    pub fn replica() -> Self {
        Self::from_folder_in("ETCD_FERRY_REPLICA_ETCD")
    }

    fn from_folder_in(variable: &str) -> Self {
        let bin = std::env::var_os(variable).map(PathBuf::from).or_else(default_bin);
        Self { bin, ..Self::default() }
    }

    fn command(&self, tool: &str) -> Command {
        let path = self.bin.as_ref().map_or_else(|| PathBuf::from(tool), |bin| bin.join(tool));
        assert!(
            Command::new(&path).arg(if tool == "etcd" { "--version" } else { "version" }).output().is_ok(),
            "there is no {}: run `make install`, or set ETCD_FERRY_TEST_ETCD to a folder with etcd and etcdutl",
            path.display()
        );
        Command::new(path)
    }
}

/// `ETCD_FERRY_TEST_ETCD`, else what `make install` unpacked, else PATH.
pub fn default_bin() -> Option<PathBuf> {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/etcd/bin");
    std::env::var_os("ETCD_FERRY_TEST_ETCD")
        .map(PathBuf::from)
        .or_else(|| unpacked.join("etcd").exists().then_some(unpacked))
}

/// How to reach an etcd; stays good over restarts.
#[derive(Debug, Clone)]
pub struct Access {
    pub url: String,
    pub tls: Option<EtcdTls>,
    /// Name and password.
    pub user: Option<(String, String)>,
}

impl Access {
    pub async fn try_client(&self) -> Result<Client, etcd_client::Error> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(2))
            .with_keep_alive(Duration::from_secs(10), Duration::from_secs(5))
            .with_keep_alive_while_idle(false);
        if let Some(tls) = &self.tls {
            let read = |path: &Path| fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let identity = Identity::from_pem(read(&tls.cert), read(&tls.key));
            options = options.with_tls(
                TlsOptions::new()
                    .ca_certificate(Certificate::from_pem(read(&tls.ca)))
                    .identity(identity)
                    .domain_name("localhost"),
            );
        }
        if let Some((name, password)) = &self.user {
            options = options.with_user(name, password);
        }
        Client::connect([&self.url], Some(options)).await
    }

    pub async fn client(&self) -> Client {
        // Not `until`: writers connect in tasks of their own, and an async closure is not `Send` in general.
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_client().await {
                Ok(client) => return client,
                Err(e) => assert!(Instant::now() < deadline, "no connection to {} within {PATIENCE:?}: {e}", self.url),
            }
            tokio::time::sleep(PROBE_PAUSE).await;
        }
    }

    /// A client for reads and writes of any size.
    pub async fn kv(&self) -> KvClient {
        self.client().await.kv_client().max_decoding_message_size(usize::MAX)
    }
}

/// A running member, alone or one of a cluster; killed when dropped.
pub struct Etcd {
    options: EtcdOptions,
    name: String,
    initial_cluster: String,
    client_port: u16,
    peer_port: u16,
    dir: TempDir,
    user: Option<(String, String)>,
    process: Option<Process>,
}

impl Etcd {
    /// A cluster of one, ready to serve.
    pub async fn start(options: EtcdOptions) -> Self {
        for _ in 0..STARTS_MAX {
            let mut etcd = Self::prepare(options.clone(), "default");
            etcd.initial_cluster = etcd.own_cluster_entry();
            etcd.spawn();
            if !etcd.ready_or_port_taken().await {
                continue;
            }
            if etcd.options.auth {
                Box::pin(etcd.enable_auth()).await;
            }
            return etcd;
        }
        panic!("no free ports after {STARTS_MAX} tries");
    }

    /// A cluster of several members, ready to serve.
    pub async fn start_cluster(options: EtcdOptions, members: usize) -> Vec<Self> {
        let mut cluster: Vec<Self> =
            (0..members).map(|i| Self::prepare(options.clone(), &format!("member-{i}"))).collect();
        let entries: Vec<String> = cluster.iter().map(Self::own_cluster_entry).collect();
        for member in &mut cluster {
            member.initial_cluster = entries.join(",");
            member.spawn();
        }
        for member in &mut cluster {
            assert!(
                member.ready_or_port_taken().await,
                "a port of the cluster was taken by another process; run again"
            );
        }
        cluster
    }

    fn prepare(options: EtcdOptions, name: &str) -> Self {
        Self {
            options,
            name: name.to_owned(),
            initial_cluster: String::new(),
            client_port: free_port(),
            peer_port: free_port(),
            dir: tempfile::tempdir().expect("a temporary folder"),
            user: None,
            process: None,
        }
    }

    fn own_cluster_entry(&self) -> String {
        format!("{}={}", self.name, self.peer_url())
    }

    fn peer_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer_port)
    }

    /// The client URL.
    pub fn url(&self) -> String {
        let scheme = if self.options.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.client_port)
    }

    pub fn address(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.client_port).into()
    }

    pub fn access(&self) -> Access {
        Access { url: self.url(), tls: self.options.tls.clone(), user: self.user.clone() }
    }

    pub async fn client(&self) -> Client {
        self.access().client().await
    }

    pub async fn kv(&self) -> KvClient {
        self.access().kv().await
    }

    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("this etcd is not running")
    }

    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn spawn(&mut self) {
        let url = self.url();
        let mut command = self.options.command("etcd");
        command
            .args(["--name", &self.name, "--log-level", "warn", "--logger", "zap"])
            .arg("--data-dir")
            .arg(self.data_dir())
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &self.peer_url(), "--initial-advertise-peer-urls", &self.peer_url()])
            .args(["--initial-cluster", &self.initial_cluster]);
        let numbers = [
            ("--quota-backend-bytes", self.options.quota_backend_bytes),
            ("--max-request-bytes", self.options.max_request_bytes),
            ("--max-txn-ops", self.options.max_txn_ops),
        ];
        for (flag, number) in numbers {
            if let Some(number) = number {
                command.args([flag, &number.to_string()]);
            }
        }
        if let Some(tls) = &self.options.tls {
            command.arg("--cert-file").arg(&tls.cert).arg("--key-file").arg(&tls.key);
            command
                .arg("--trusted-ca-file")
                .arg(&tls.ca)
                .arg(format!("--client-cert-auth={}", tls.client_certificates));
        }
        if !self.options.sync {
            command.arg("--unsafe-no-fsync");
        }
        command.args(&self.options.extra);
        let log = self.dir.path().join("etcd.log");
        self.process = Some(Process::start(&format!("etcd at {url}"), &mut command, &log));
    }

    /// Waits until it serves; false if a port was taken by someone else; panics if it ended for another reason.
    async fn ready_or_port_taken(&mut self) -> bool {
        let access = self.access();
        let process = self.process.as_mut().expect("it was just started");
        until("etcd to serve", PATIENCE, async || {
            if process.ended().is_some() {
                let log = process.log();
                assert!(log.contains("address already in use"), "etcd ended by itself:\n{log}");
                return Some(false);
            }
            let mut client = access.try_client().await.ok()?;
            client.get("ready", None).await.ok().map(|_| true)
        })
        .await
    }

    async fn enable_auth(&mut self) {
        let mut client = self.client().await;
        client.user_add("root", ROOT_PASSWORD, None).await.expect("user root is added");
        client.user_grant_role("root", "root").await.expect("role root is granted");
        client.auth_enable().await.expect("auth is enabled");
        self.user = Some(("root".to_owned(), ROOT_PASSWORD.to_owned()));
    }

    /// A user with one role that permits just this.
    pub async fn add_user(&self, name: &str, password: &str, permitted: &[(PermissionType, KeyRange)]) {
        let mut client = self.client().await;
        client.role_add(name).await.expect("a role is added");
        for (kind, range) in permitted {
            let permission = Permission::new(*kind, range.etcd_from()).with_range_end(range.etcd_end());
            client.role_grant_permission(name, permission).await.expect("a permission is granted");
        }
        client.user_add(name, password, None).await.expect("a user is added");
        client.user_grant_role(name, name).await.expect("the role is granted");
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM, waits for the end.
    pub async fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.terminate(PATIENCE).await;
        }
    }

    /// The next start has this limit.
    pub fn set_max_request_bytes(&mut self, bytes: u64) {
        self.options.max_request_bytes = Some(bytes);
    }

    /// Compacts to the head, gives the space back, and takes every alarm away: what an operator does after NOSPACE.
    pub async fn make_room(&self) {
        let mut client = self.client().await;
        let physical = CompactionOptions::new().with_physical();
        // An error says that this revision is compacted already.
        let _ = client.compact(self.head().await.to_etcd(), Some(physical)).await;
        client.defragment().await.expect("a defragmentation");
        let raised = client.alarm(AlarmAction::Get, AlarmType::None, None).await.expect("a list of alarms");
        for alarm in raised.alarms() {
            let mut member = AlarmOptions::new();
            member.with_member(alarm.member_id());
            client.alarm(AlarmAction::Deactivate, alarm.alarm(), Some(member)).await.expect("an alarm is taken away");
        }
    }

    /// Starts it again where it was, killing it if it still runs.
    pub async fn restart(&mut self) {
        self.kill();
        self.spawn();
        assert!(self.ready_or_port_taken().await, "the port of {} was taken while it was down", self.url());
    }

    /// Another cluster, empty, at the same place. Only for a cluster of one.
    pub async fn replace(&mut self) {
        self.kill();
        fs::remove_dir_all(self.data_dir()).expect("the data folder is removed");
        self.options.extra.push("--initial-cluster-token=another".to_owned());
        self.restart().await;
    }

    /// SIGSTOP.
    pub fn pause(&self) {
        self.process().pause();
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.process().resume();
    }

    /// Saves a snapshot beside the data, and returns its file.
    pub async fn save_snapshot(&self) -> PathBuf {
        let mut stream = self.client().await.snapshot().await.expect("a snapshot starts");
        let mut snapshot = Vec::new();
        while let Some(piece) = stream.message().await.expect("a snapshot's piece") {
            snapshot.extend_from_slice(piece.blob());
        }
        let path = self.dir.path().join(format!("snapshot-{}.db", snapshot.len()));
        fs::write(&path, snapshot).expect("a snapshot is written");
        path
    }

    /// Goes back to a snapshot with identical flags: the cluster id stays, which is the trap that this is for. Only for a cluster of one.
    pub async fn restore_snapshot(&mut self, snapshot: &Path) {
        self.kill();
        fs::remove_dir_all(self.data_dir()).expect("the data folder is removed");
        // 3.4 has none; a newer one restores its snapshots too.
        let own = self.options.bin.as_ref().is_none_or(|bin| bin.join("etcdutl").exists());
        let options = if own { self.options.clone() } else { EtcdOptions::default() };
        let mut command = options.command("etcdutl");
        command.args(["snapshot", "restore"]).arg(snapshot).arg("--data-dir").arg(self.data_dir());
        command.args(["--name", &self.name, "--initial-cluster", &self.initial_cluster]);
        command.args(["--initial-advertise-peer-urls", &self.peer_url()]);
        let output = command.output().expect("etcdutl runs");
        assert!(output.status.success(), "etcdutl snapshot restore: {}", String::from_utf8_lossy(&output.stderr));
        self.restart().await;
    }

    /// The newest revision, read linearizably.
    pub async fn head(&self) -> Revision {
        let got =
            self.kv().await.get("head", Some(GetOptions::new().with_count_only())).await.expect("a read of the head");
        Revision::from_etcd(got.header().map_or(0, |header| header.revision()))
    }

    pub async fn cluster_id(&self) -> u64 {
        let got =
            self.kv().await.get("head", Some(GetOptions::new().with_count_only())).await.expect("a read of the head");
        got.header().map_or(0, |header| header.cluster_id())
    }

    /// Physically: it is gone when this returns.
    pub async fn compact(&self, revision: Revision) {
        let options = CompactionOptions::new().with_physical();
        self.kv().await.compact(revision.to_etcd(), Some(options)).await.expect("a compaction");
    }

    /// Returns the revision of the put.
    pub async fn put(&self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Revision {
        let put = self.kv().await.put(key, value, None).await.expect("a put");
        Revision::from_etcd(put.header().map_or(0, |header| header.revision()))
    }

    /// The value of one key.
    pub async fn get(&self, key: impl Into<Vec<u8>>) -> Option<Bytes> {
        let mut got = self.kv().await.get(key, None).await.expect("a get");
        got.take_kvs().pop().map(|kv| Bytes::from(kv.into_key_value().1))
    }

    /// The position of a link that this etcd is the replica of.
    pub async fn position(&self, link: &LinkName) -> Option<Position> {
        let json = self.get(link.position_key().to_vec()).await?;
        Some(Position::from_json(&json).unwrap_or_else(|e| panic!("the position of {link} is unreadable: {e}")))
    }

    /// What it holds in `ranges`, all read at one revision (`None`: the newest).
    pub async fn read(&self, ranges: &Ranges, at: Option<Revision>) -> (Revision, KeyMap) {
        read(&mut self.kv().await, ranges.pieces(), at).await
    }

    /// All keys, those of etcd-ferry too.
    pub async fn read_all(&self) -> (Revision, KeyMap) {
        read(&mut self.kv().await, &[whole_keyspace()], None).await
    }
}

pub fn whole_keyspace() -> KeyRange {
    KeyRange::prefix(b"")
}

/// Reads `pieces` in pages, all at one revision.
pub async fn read(kv: &mut KvClient, pieces: &[KeyRange], at: Option<Revision>) -> (Revision, KeyMap) {
    let mut at = at;
    let mut keys = KeyMap::new();
    for piece in pieces {
        let mut from = piece.etcd_from();
        loop {
            let options = GetOptions::new()
                .with_range(piece.etcd_end())
                .with_limit(PAGE_KEYS)
                .with_revision(at.map_or(0, Revision::to_etcd));
            let mut page = kv.get(from.clone(), Some(options)).await.expect("a page of a range");
            at = at.or(Some(Revision::from_etcd(page.header().map_or(0, |header| header.revision()))));
            let more = page.more();
            for kv in page.take_kvs() {
                let (key, value) = kv.into_key_value();
                from = [&key[..], &[0]].concat();
                keys.insert(Bytes::from(key), Bytes::from(value));
            }
            if !more {
                break;
            }
        }
    }
    (at.unwrap_or_default(), keys)
}

#[cfg(test)]
mod tests;
