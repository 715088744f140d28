//! Job: two regions as they are run in earnest: clusters of several members, several sidecars beside each, a line of its own between any two.
//! Input: `RegionsOptions`. Output: running `Regions`, who ships, recordings.
//! Always true: an origin's sidecar reaches each member and each of the replica's sidecars only through the line that is for the two.

use super::bender::Bender;
use super::checkers::Recording;
use super::etcd::{Etcd, EtcdOptions};
use super::pair::{LINK, ORIGIN_REGION, REPLICA_REGION, link_name, ranges_of};
use super::recording::Recorder;
use super::sidecar::{Ports, ReceiveLink, SendLink, Sidecar, SidecarOptions, link_of, make_certificates, region_name};
use super::traffic::{Acknowledged, Traffic, TrafficOptions};
use super::{LinkProxy, PATIENCE, until};
use etcd_ferry::demo::proxy::Direction;
use etcd_ferry::model::{Phase, Position, Ranges, Revision};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Within which another sidecar ships, whatever became of the one that did.
pub const TAKEOVER_LIMIT: Duration = Duration::from_secs(10);

/// A member that takes longer is passed over: without a leader it would answer after 7 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
pub struct RegionsOptions {
    /// Members of the two clusters: the origin's, the replica's.
    pub members: (usize, usize),
    /// Sidecars beside them.
    pub sidecars: (usize, usize),
    /// `[limits]` of all sidecars.
    pub limits: BTreeMap<String, u64>,
    /// Each of the origin's sidecars dials another of the replica's first.
    pub apart: bool,
    /// A bender before each of the replica's sidecars.
    pub bent: bool,
}

impl Default for RegionsOptions {
    fn default() -> Self {
        Self { members: (1, 1), sidecars: (2, 1), limits: BTreeMap::new(), apart: false, bent: false }
    }
}

/// Fields end in this order when dropped: processes first, their folders last.
pub struct Regions {
    pub origin_sidecars: Vec<Sidecar>,
    pub replica_sidecars: Vec<Sidecar>,
    pub origin: Vec<Etcd>,
    pub replica: Vec<Etcd>,
    /// `etcd_lines[i]`: from the origin's sidecar i to each member.
    pub etcd_lines: Vec<Vec<LinkProxy>>,
    /// `peer_lines[i]`: from the origin's sidecar i to each of the replica's sidecars.
    pub peer_lines: Vec<Vec<LinkProxy>>,
    pub benders: Vec<Bender>,
    pub ranges: Ranges,
    dir: TempDir,
}

/// Both ends, recorded.
pub struct RegionsRecorder {
    pub origin: Recorder,
    replica: Recorder,
}

async fn cluster(options: EtcdOptions, members: usize) -> Vec<Etcd> {
    let options = EtcdOptions { sync: false, ..options };
    match members {
        1 => vec![Box::pin(Etcd::start(options)).await],
        several => Box::pin(Etcd::start_cluster(options, several)).await,
    }
}

async fn lines_to(targets: impl Iterator<Item = SocketAddr>) -> Vec<LinkProxy> {
    let mut lines = Vec::new();
    for target in targets {
        lines.push(LinkProxy::start(target).await.expect("the proxy starts"));
    }
    lines
}

fn node_of(region: &str, number: usize) -> String {
    format!("{region}-{}", ["a", "b", "c"][number])
}

impl Regions {
    /// Everything up, and the link followed.
    pub async fn start(options: RegionsOptions) -> Self {
        let mut regions = Box::pin(Self::prepare(options)).await;
        regions.start_sidecars().await;
        regions.wait_following().await;
        regions
    }

    /// The clusters up, the sidecars configured.
    pub async fn prepare(options: RegionsOptions) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let certs = dir.path().join("certs");
        make_certificates(&certs, &[ORIGIN_REGION, REPLICA_REGION]);
        let origin = cluster(EtcdOptions::origin(), options.members.0).await;
        let replica = cluster(EtcdOptions::replica(), options.members.1).await;
        let mut replica_sidecars = Vec::new();
        for number in 0..options.sidecars.1 {
            let mut side = SidecarOptions::new(REPLICA_REGION, replica[0].access(), Ports::choose(), &certs);
            side.node = node_of(REPLICA_REGION, number);
            side.endpoints = replica.iter().map(Etcd::url).collect();
            side.limits.clone_from(&options.limits);
            let peer = region_name(ORIGIN_REGION);
            side.receive.push(ReceiveLink { link: LINK.to_owned(), peer, ..ReceiveLink::default() });
            let folder = dir.path().join(&side.node);
            replica_sidecars.push(Sidecar::prepare(side, &folder));
        }
        let mut peers: Vec<SocketAddr> = replica_sidecars.iter().map(|sidecar| sidecar.options.ports.peer).collect();
        let mut benders = Vec::new();
        if options.bent {
            for peer in &mut peers {
                let bender = Bender::start(*peer, &certs, ORIGIN_REGION, REPLICA_REGION).await;
                *peer = bender.address();
                benders.push(bender);
            }
        }
        let (mut origin_sidecars, mut etcd_lines, mut peer_lines) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..options.sidecars.0 {
            let to_etcd = lines_to(origin.iter().map(Etcd::address)).await;
            let to_peers = lines_to(peers.iter().copied()).await;
            let mut side = SidecarOptions::new(ORIGIN_REGION, origin[0].access(), Ports::choose(), &certs);
            side.node = node_of(ORIGIN_REGION, number);
            side.endpoints = to_etcd.iter().map(|line| format!("http://{}", line.address())).collect();
            side.limits.clone_from(&options.limits);
            let mut to: Vec<String> = to_peers.iter().map(|line| format!("https://{}", line.address())).collect();
            if options.apart {
                to.rotate_left(number % options.sidecars.1);
            }
            let peer = region_name(REPLICA_REGION);
            side.send.push(SendLink { link: LINK.to_owned(), to, peer, ..SendLink::default() });
            let folder = dir.path().join(&side.node);
            origin_sidecars.push(Sidecar::prepare(side, &folder));
            etcd_lines.push(to_etcd);
            peer_lines.push(to_peers);
        }
        let ranges = ranges_of(&[], &[]);
        Self { origin_sidecars, replica_sidecars, origin, replica, etcd_lines, peer_lines, benders, ranges, dir }
    }

    /// One after the other: the first of the origin's is elected.
    pub async fn start_sidecars(&mut self) {
        for sidecar in &mut self.replica_sidecars {
            sidecar.restart().await;
        }
        for sidecar in &mut self.origin_sidecars {
            sidecar.restart().await;
            let enrolled = |entry: &serde_json::Value| entry["role"].is_string();
            sidecar.wait_for(LINK, "the sidecar to stand for election", enrolled).await;
        }
    }

    /// Until the shipper says that the link follows, and each standby that it tails.
    pub async fn wait_following(&self) {
        for sidecar in &self.origin_sidecars {
            sidecar.wait_for_state(LINK, "following").await;
        }
    }

    /// The number of the one sidecar that says that it ships.
    pub async fn shipper(&self) -> usize {
        until("one sidecar to ship", PATIENCE, async || {
            let mut ships = None;
            for (number, sidecar) in self.origin_sidecars.iter().enumerate() {
                let Some(entry) = sidecar.health().await.and_then(|health| link_of(&health, LINK)) else { continue };
                if entry["role"] == "shipper" && ships.replace(number).is_some() {
                    return None;
                }
            }
            ships
        })
        .await
    }

    /// The first member that answers: one may be down, or without a leader for a moment.
    async fn alive(members: &[Etcd]) -> &Etcd {
        until("a member to answer", PATIENCE, async || {
            for member in members.iter().filter(|member| member.is_running()) {
                let Ok(mut client) = member.access().try_client().await else { continue };
                if tokio::time::timeout(ANSWER_LIMIT, client.get("alive", None)).await.is_ok_and(|got| got.is_ok()) {
                    return Some(member);
                }
            }
            None
        })
        .await
    }

    pub async fn origin_alive(&self) -> &Etcd {
        Self::alive(&self.origin).await
    }

    pub async fn replica_alive(&self) -> &Etcd {
        Self::alive(&self.replica).await
    }

    pub async fn position(&self) -> Position {
        until("a position", PATIENCE, async || self.try_position().await).await
    }

    /// From the first member that answers; `None` too if none does.
    pub async fn try_position(&self) -> Option<Position> {
        let key = link_name(LINK).position_key();
        for member in self.replica.iter().filter(|member| member.is_running()) {
            let Ok(mut client) = member.access().try_client().await else { continue };
            let got = tokio::time::timeout(ANSWER_LIMIT, client.get(key.to_vec(), None)).await;
            if let Ok(Ok(got)) = got {
                return Position::from_json(got.kvs().first()?.value()).ok();
            }
        }
        None
    }

    /// Waits until the replica follows and holds everything up to `revision`.
    pub async fn wait_applied(&self, revision: Revision) -> Position {
        super::pair::wait_applied(self.replica_alive().await, LINK, revision, PATIENCE).await
    }

    /// Waits until a sidecar with another term than `before` has brought something; how long that took.
    pub async fn wait_taken_over(&self, before: &Position) -> Position {
        let since = Instant::now();
        let after = until("another sidecar to ship within 10 s", TAKEOVER_LIMIT, async || {
            let position = self.try_position().await?;
            (position.term > before.term && position.seq > before.seq).then_some(position)
        })
        .await;
        eprintln!("term {} ships {:?} later", after.term, since.elapsed());
        after
    }

    /// Steady writes at the origin's first member.
    pub fn traffic(&self) -> Traffic {
        self.traffic_at(&self.origin[0])
    }

    pub fn traffic_at(&self, member: &Etcd) -> Traffic {
        let options = TrafficOptions {
            writes_per_writer: 1_000_000,
            rate_per_writer: Some(40),
            value_bytes_max: 8 * 1_024,
            ..TrafficOptions::default()
        };
        Traffic::start(&member.access(), &options)
    }

    /// Records both ends from now on, at members that stay alive.
    pub async fn record_at(&self, origin: &Etcd, replica: &Etcd) -> RegionsRecorder {
        RegionsRecorder { origin: Recorder::start(origin).await, replica: Recorder::start(replica).await }
    }

    pub async fn record(&self) -> RegionsRecorder {
        self.record_at(&self.origin[0], &self.replica[0]).await
    }

    pub async fn recorded(&self, recorder: RegionsRecorder) -> Recording {
        let (origin, replica) = (self.origin_alive().await, self.replica_alive().await);
        // The replica first: a position must not name an origin revision that the origin's history lacks.
        let replica = recorder.replica.finish(replica.head().await).await;
        let origin = recorder.origin.finish(origin.head().await).await;
        Recording { link: link_name(LINK), ranges: self.ranges.clone(), origin, replica }
    }

    /// The end of a run: what was acknowledged is there, once, whole and in order, in the epoch that it began in, and both sides are equal.
    pub async fn judge(&self, recorder: RegionsRecorder, acknowledged: &[Acknowledged], before: &Position) {
        let position = self.wait_applied(acknowledged.last().expect("something was written").revision).await;
        assert_eq!(position.epoch, before.epoch, "no new base copy");
        self.assert_equal().await;
        let recording = self.recorded(recorder).await;
        assert_eq!(recording.complete(acknowledged).expect("complete"), acknowledged.len());
        assert!(recording.check().expect("once, whole and in order") > 0);
    }

    pub async fn assert_equal(&self) {
        let (origin, replica) = (self.origin_alive().await, self.replica_alive().await);
        super::pair::wait_equal(origin, replica, &self.ranges, PATIENCE).await;
    }

    /// No byte comes through between this sidecar and the origin's etcd, and nobody is told.
    pub fn cut_off_from_etcd(&self, sidecar: usize) {
        self.etcd_lines[sidecar].iter().for_each(deafen);
    }

    /// The same between this sidecar and all of the replica's.
    pub fn cut_off_from_peers(&self, sidecar: usize) {
        self.peer_lines[sidecar].iter().for_each(deafen);
    }

    pub fn heal(&self) {
        self.etcd_lines.iter().chain(&self.peer_lines).flatten().for_each(LinkProxy::heal);
    }

    /// The outage of the link: every connection is reset, and each new one.
    pub fn cut_link(&self) {
        self.peer_lines.iter().flatten().for_each(LinkProxy::cut);
    }

    /// What a sidecar says of the link, as soon as it stands by.
    pub async fn wait_standby(&self, sidecar: usize) -> serde_json::Value {
        let stands_by = |entry: &serde_json::Value| entry["role"] == "standby" && entry["state"] == "following";
        self.origin_sidecars[sidecar].wait_for(LINK, "the sidecar to stand by and tail", stands_by).await
    }

    /// Waits until the position is in the middle of a base copy.
    pub async fn wait_copying(&self) -> Position {
        let middle = |p: &Position| {
            p.state == Phase::Copying && p.cursor.as_ref().is_some_and(|cursor| cursor.starts_with(b"/app/"))
        };
        until("a base copy under way", PATIENCE, async || self.try_position().await.filter(middle)).await
    }
}

fn deafen(line: &LinkProxy) {
    line.black_hole(Direction::ToTarget);
    line.black_hole(Direction::FromTarget);
}
