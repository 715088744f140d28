//! Job: two regions with a link between them: etcd, sidecar, proxy, sidecar, etcd; and chains of them.
//! Input: `PairOptions`. Output: a running `Pair`, and its recording at the end.
//! Always true: every sidecar reaches the other only through the proxy of its direction.

use super::checkers::{Recording, equal};
use super::etcd::{Etcd, EtcdOptions};
use super::recording::Recorder;
use super::sidecar::{Ports, ReceiveLink, SendLink, Sidecar, SidecarOptions, make_certificates, region_name};
use super::{LinkProxy, PATIENCE, until};
use bytes::Bytes;
use etcd_ferry::model::{LinkName, Phase, Position, Ranges, Revision, Side};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

pub const ORIGIN_REGION: &str = "us-east-1";
pub const REPLICA_REGION: &str = "cn-hangzhou";
/// The link from the origin to the replica.
pub const LINK: &str = "config";
/// The link from the replica to the origin, where there is one.
pub const LINK_BACK: &str = "config-back";

#[derive(Debug, Clone)]
pub struct PairOptions {
    pub origin: EtcdOptions,
    pub replica: EtcdOptions,
    /// Empty: the whole keyspace.
    pub prefixes: Vec<String>,
    pub exclude: Vec<String>,
    /// A link back over the same ranges.
    pub both_ways: bool,
    /// `[limits]` of both sidecars.
    pub limits: BTreeMap<String, u64>,
    pub deletes_share_max: Option<f64>,
    /// Of every link.
    pub other_history: Option<String>,
}

impl Default for PairOptions {
    fn default() -> Self {
        Self {
            origin: EtcdOptions::origin(),
            replica: EtcdOptions::replica(),
            prefixes: Vec::new(),
            exclude: Vec::new(),
            both_ways: false,
            limits: BTreeMap::new(),
            deletes_share_max: None,
            other_history: None,
        }
    }
}

/// Fields end in this order when dropped: processes first, their folders last.
pub struct Pair {
    pub origin_sidecar: Sidecar,
    pub replica_sidecar: Sidecar,
    pub origin: Etcd,
    pub replica: Etcd,
    /// What the origin's sidecar dials.
    pub proxy: LinkProxy,
    /// What the replica's sidecar dials, for the link back.
    pub proxy_back: LinkProxy,
    pub ranges: Ranges,
    dir: TempDir,
}

impl Pair {
    /// Both etcds and both sidecars, up.
    pub async fn start(options: PairOptions) -> Self {
        let mut pair = Self::prepare(options).await;
        pair.origin_sidecar.restart().await;
        pair.replica_sidecar.restart().await;
        pair
    }

    /// Both etcds up, both sidecars configured: for tests that put something into an etcd first, or change a configuration.
    pub async fn prepare(options: PairOptions) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let origin = Box::pin(Etcd::start(options.origin.clone())).await;
        let replica = Box::pin(Etcd::start(options.replica.clone())).await;
        let certs = dir.path().join("certs");
        make_certificates(&certs, &[ORIGIN_REGION, REPLICA_REGION]);
        let (origin_ports, replica_ports) = (Ports::choose(), Ports::choose());
        let proxy = LinkProxy::start(replica_ports.peer).await.expect("the proxy starts");
        let proxy_back = LinkProxy::start(origin_ports.peer).await.expect("the proxy starts");
        let mut at_origin = SidecarOptions::new(ORIGIN_REGION, origin.access(), origin_ports, &certs);
        let mut at_replica = SidecarOptions::new(REPLICA_REGION, replica.access(), replica_ports, &certs);
        connect(&mut at_origin, &mut at_replica, LINK, &proxy, &options);
        if options.both_ways {
            connect(&mut at_replica, &mut at_origin, LINK_BACK, &proxy_back, &options);
        }
        for side in [&mut at_origin, &mut at_replica] {
            side.limits.clone_from(&options.limits);
        }
        Self {
            origin_sidecar: Sidecar::prepare(at_origin, &dir.path().join(ORIGIN_REGION)),
            replica_sidecar: Sidecar::prepare(at_replica, &dir.path().join(REPLICA_REGION)),
            origin,
            replica,
            proxy,
            proxy_back,
            ranges: ranges_of(&options.prefixes, &options.exclude),
            dir,
        }
    }

    /// A folder of this test, for what it needs beside.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// This side's.
    pub fn sidecar(&mut self, side: Side) -> &mut Sidecar {
        match side {
            Side::Origin => &mut self.origin_sidecar,
            Side::Replica => &mut self.replica_sidecar,
        }
    }

    /// The replica's position, if it has one.
    pub async fn position(&self) -> Option<Position> {
        self.replica.position(&link_name(LINK)).await
    }

    /// Waits until the replica follows and holds everything up to `revision`, which must be one that the link carries: an idle link writes
    /// its position only once a minute.
    pub async fn wait_applied_within(&self, revision: Revision, limit: Duration) -> Position {
        wait_applied(&self.replica, LINK, revision, limit).await
    }

    pub async fn wait_applied(&self, revision: Revision) -> Position {
        self.wait_applied_within(revision, PATIENCE).await
    }

    /// Waits until both sides hold the same, byte for byte; panics with what differs.
    pub async fn wait_equal(&self) {
        wait_equal(&self.origin, &self.replica, &self.ranges, PATIENCE).await;
    }

    /// Both sides as they are now, compared byte for byte; returns the number of keys.
    pub async fn assert_equal(&self) -> usize {
        let (_, here) = self.origin.read(&self.ranges, None).await;
        let (_, there) = self.replica.read(&self.ranges, None).await;
        equal(&here, &there).unwrap_or_else(|fault| panic!("{fault}"))
    }

    /// Records both ends from now on.
    pub async fn record(&self) -> PairRecorder {
        PairRecorder { origin: Recorder::start(&self.origin).await, replica: Recorder::start(&self.replica).await }
    }

    /// Ends a recording that has everything up to now in it.
    pub async fn recorded(&self, recorder: PairRecorder) -> Recording {
        // The replica first: a position must not name an origin revision that the origin's history lacks.
        let replica = recorder.replica.finish(self.replica.head().await).await;
        let origin = recorder.origin.finish(self.origin.head().await).await;
        Recording { link: link_name(LINK), ranges: self.ranges.clone(), origin, replica }
    }
}

/// Recorders of both ends.
pub struct PairRecorder {
    origin: Recorder,
    replica: Recorder,
}

impl PairRecorder {
    /// Waits until the origin is recorded up to a revision: from then on a compaction does not overtake the recorder.
    pub async fn origin_seen(&self, revision: Revision) {
        let seen = async || (self.origin.seen() >= revision).then_some(());
        until("the recorder to see the origin's revision", PATIENCE, seen).await;
    }
}

pub fn link_name(name: &str) -> LinkName {
    LinkName::new(name).expect("the bed's links have good names")
}

pub fn ranges_of(prefixes: &[String], exclude: &[String]) -> Ranges {
    let bytes = |texts: &[String]| -> Vec<Bytes> { texts.iter().map(|text| Bytes::from(text.clone())).collect() };
    Ranges::new(&bytes(prefixes), &bytes(exclude))
}

/// Adds one link from one sidecar's configuration to another's; for chains, call it for each hop.
pub fn connect(
    from: &mut SidecarOptions,
    to: &mut SidecarOptions,
    link: &str,
    proxy: &LinkProxy,
    options: &PairOptions,
) {
    from.send.push(SendLink {
        link: link.to_owned(),
        to: vec![format!("https://{}", proxy.address())],
        peer: region_name(&to.region),
        prefixes: options.prefixes.clone(),
        exclude: options.exclude.clone(),
        deletes_share_max: options.deletes_share_max,
        other_history: options.other_history.clone(),
        ..SendLink::default()
    });
    to.receive.push(ReceiveLink {
        link: link.to_owned(),
        peer: region_name(&from.region),
        prefixes: options.prefixes.clone(),
        ..ReceiveLink::default()
    });
}

/// Waits until a replica's position follows and has reached `revision`; panics with the last position that it had.
pub async fn wait_applied(replica: &Etcd, link: &str, revision: Revision, limit: Duration) -> Position {
    let link = link_name(link);
    let mut kv = replica.kv().await;
    let key = link.position_key();
    let what = format!("link {link} to have applied revision {revision}");
    until(&what, limit, async || {
        let got = kv.get(key.to_vec(), None).await.ok()?;
        let position = Position::from_json(got.kvs().first()?.value()).ok()?;
        (position.state == Phase::Following && position.origin_revision >= revision).then_some(position)
    })
    .await
}

/// Waits until two etcds hold the same in `ranges`; panics with what differs at the end.
pub async fn wait_equal(one: &Etcd, two: &Etcd, ranges: &Ranges, limit: Duration) {
    let compare = async || equal(&one.read(ranges, None).await.1, &two.read(ranges, None).await.1);
    let became = tokio::time::timeout(limit, until("equality", limit * 2, async || compare().await.ok())).await;
    if became.is_err() {
        compare().await.unwrap_or_else(|fault| panic!("after {limit:?}: {fault}"));
    }
}

/// A, B and C in a row: two links, each with a proxy of its own; B is a replica and an origin at once.
pub struct Chain {
    pub sidecars: Vec<Sidecar>,
    pub etcds: Vec<Etcd>,
    /// `proxies[i]` carries from `etcds[i]` to `etcds[i + 1]`.
    pub proxies: Vec<LinkProxy>,
    pub ranges: Ranges,
    dir: TempDir,
}

pub const CHAIN_REGIONS: [&str; 3] = ["us-east-1", "eu-central-1", "cn-hangzhou"];
/// `CHAIN_LINKS[i]` carries from region i to region i + 1.
pub const CHAIN_LINKS: [&str; 2] = ["first-hop", "second-hop"];

impl Chain {
    pub async fn start(options: PairOptions) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let certs = dir.path().join("certs");
        make_certificates(&certs, &CHAIN_REGIONS);
        let (mut etcds, mut sides, mut proxies) = (Vec::new(), Vec::new(), Vec::new());
        for region in CHAIN_REGIONS {
            let etcd = Box::pin(Etcd::start(options.origin.clone())).await;
            sides.push(SidecarOptions::new(region, etcd.access(), Ports::choose(), &certs));
            etcds.push(etcd);
        }
        for (hop, link) in CHAIN_LINKS.into_iter().enumerate() {
            let proxy = LinkProxy::start(sides[hop + 1].ports.peer).await.expect("the proxy starts");
            let (before, after) = sides.split_at_mut(hop + 1);
            connect(&mut before[hop], &mut after[0], link, &proxy, &options);
            proxies.push(proxy);
        }
        let mut sidecars = Vec::new();
        for side in sides {
            let folder = dir.path().join(&side.region);
            sidecars.push(Sidecar::start(side, &folder).await);
        }
        let ranges = ranges_of(&options.prefixes, &options.exclude);
        Self { sidecars, etcds, proxies, ranges, dir }
    }
}
