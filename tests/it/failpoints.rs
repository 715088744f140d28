//! Job: end either sidecar at each failpoint, start it again, and judge what has become of the link.
//! Input: the product's own list of points, pairs of regions. Output: passes or fails, with the point.
//! Always true: every point of the list is tried, at each side that passes it; one that is not passed fails the test; the process ended there
//! and by itself.

use crate::bed::contents::{load, noise};
use crate::bed::etcd::{Access, EtcdOptions, KeyMap};
use crate::bed::pair::{LINK, ORIGIN_REGION, Pair, PairOptions, PairRecorder, link_name};
use crate::bed::sidecar::{Ports, ReceiveLink, Sidecar, SidecarOptions, ferry, make_certificates, region_name};
use crate::bed::traffic::{Acknowledged, Traffic, TrafficOptions, Write, commit, put_at_once};
use crate::bed::{LinkProxy, PATIENCE, until};
use crate::resume::wait_spooled;
use crate::verify::assert_verified;
use etcd_client::DeleteOptions;
use etcd_ferry::failpoint::{self, During, POINTS, Point};
use etcd_ferry::model::{Phase, Side};
use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const CALL: &str = "this build has no failpoints: run `make test`, or `cargo test --features failpoints`";
const SIGABRT: i32 = 6;
/// Keys that are there from the beginning: pages, and more than one message of a repair takes.
const KEYS: usize = 400;
/// Each round is written and synced by itself, and fills more than two files.
const OUTAGE_ROUNDS: usize = 2;
const OUTAGE_KEYS: usize = 20;

/// At which passes of a point the process ends, one after the other.
fn passes(during: During) -> &'static [u32] {
    match during {
        During::Following | During::Parts | During::Pages => &[1, 3],
        During::Start | During::Outage | During::BaseCopy | During::Compaction | During::Mark | During::Repair => &[1],
    }
}

/// Every point has its place in one of the tests below.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Group {
    Carrying,
    Copying,
    Comparing,
}

fn group(during: During) -> Group {
    match during {
        During::Start | During::Following | During::Parts | During::Outage => Group::Carrying,
        During::BaseCopy | During::Pages | During::Compaction => Group::Copying,
        During::Mark | During::Repair => Group::Comparing,
    }
}

/// Small files, requests and pages: a little work passes every point.
async fn pair() -> Pair {
    assert!(failpoint::are_compiled_in(), "{CALL}");
    let quick = |options| EtcdOptions { sync: false, ..options };
    let limits = [("segment_bytes", 65_536), ("request_bytes_max", 65_536), ("page_keys_max", 16)];
    let options = PairOptions {
        origin: quick(EtcdOptions::origin()),
        replica: quick(EtcdOptions::replica()),
        prefixes: vec!["/app/".into()],
        limits: limits.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        ..PairOptions::default()
    };
    let pair = Box::pin(Pair::prepare(options)).await;
    load(&pair.origin, &noise("/app/", KEYS, 100)).await;
    pair
}

async fn following() -> Pair {
    let mut pair = Box::pin(pair()).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

/// One sidecar that ends at one pass of one point.
#[derive(Debug, Clone, Copy)]
struct Trial {
    point: &'static Point,
    side: Side,
    pass: u32,
}

/// Of the points of a group, each at each side and pass; the two sides by turns: a sidecar of the origin that has seen one stream after the other
/// end waits longer and longer before the next, and one that has just started does not.
fn trials(of: Group) -> Vec<Trial> {
    let of_side = |side| {
        let points = POINTS.iter().filter(move |point| group(point.during) == of && point.sides.contains(&side));
        points.flat_map(move |point| passes(point.during).iter().map(move |pass| Trial { point, side, pass: *pass }))
    };
    let both = of_side(Side::Origin).enumerate().chain(of_side(Side::Replica).enumerate());
    let mut both: Vec<(usize, Trial)> = both.collect();
    both.sort_by_key(|(turn, _)| *turn);
    both.into_iter().map(|(_, trial)| trial).collect()
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at the {}, pass {}", self.point.name, self.side.as_str(), self.pass)
    }
}

impl Trial {
    fn sidecar(self, pair: &mut Pair) -> &mut Sidecar {
        match self.side {
            Side::Origin => &mut pair.origin_sidecar,
            Side::Replica => &mut pair.replica_sidecar,
        }
    }

    /// Starts the sidecar anew; it will end at the point.
    fn arm(self, pair: &mut Pair) {
        let sidecar = self.sidecar(pair);
        let before = if self.pass > 1 { format!("{}*off->", self.pass - 1) } else { String::new() };
        sidecar.options.failpoints = format!("{}={before}return", self.point.name);
        std::fs::remove_file(sidecar.log_path()).expect("it has run before");
        sidecar.spawn();
        sidecar.options.failpoints.clear();
    }

    /// Waits until it has ended at the point.
    async fn ends(self, pair: &mut Pair) {
        let what = format!("the sidecar to end: {self}");
        let sidecar = self.sidecar(pair);
        let status = until(&what, PATIENCE, async || sidecar.try_ended()).await;
        assert_eq!(status.signal(), Some(SIGABRT), "{self}: {status}");
        let line = format!("failpoint {}: the process ends here", self.point.name);
        assert!(sidecar.log().contains(&line), "{self}");
    }

    /// While the replica's sidecar is down, the origin's etcd forgets what was: what the spool has let go of cannot be had any more.
    async fn compacts(self, pair: &Pair, recorder: &PairRecorder) {
        if self.side == Side::Replica {
            let mark = pair.origin.put("/app/mark", self.to_string()).await;
            recorder.origin_seen(mark).await;
            wait_spooled(pair, mark).await;
            pair.origin.compact(mark).await;
        }
    }

    /// Starts it again, without the point.
    async fn starts_again(self, pair: &mut Pair) {
        self.sidecar(pair).restart().await;
    }

    /// The link has everything, whole, in order and once, and both sides are equal.
    async fn judge(self, pair: &Pair, recorder: PairRecorder, mut acknowledged: Vec<Acknowledged>) {
        let last = [Write::put("/app/last", self.to_string())];
        acknowledged.extend(commit(&mut pair.origin.kv().await, &last).await.unwrap());
        pair.wait_applied(acknowledged.last().unwrap().revision).await;
        pair.assert_equal().await;
        let recording = pair.recorded(recorder).await;
        let complete = recording.complete(&acknowledged).unwrap_or_else(|fault| panic!("{self}: {fault}"));
        assert_eq!(complete, acknowledged.len(), "{self}");
        recording.check().unwrap_or_else(|fault| panic!("{self}: {fault}"));
    }
}

/// Writes that go on until they are stopped: small ones of every kind, or revisions larger than a request.
enum Writes {
    Small(Traffic),
    Large(JoinHandle<Vec<Acknowledged>>, CancellationToken),
}

impl Writes {
    fn small(access: &Access) -> Self {
        let options = TrafficOptions {
            prefix: "/app/traffic/".to_owned(),
            writers: 1,
            writes_per_writer: 1_000_000,
            rate_per_writer: Some(100),
            value_bytes_max: 8 * 1_024,
            ..TrafficOptions::default()
        };
        Self::Small(Traffic::start(access, &options))
    }

    fn large(access: Access) -> Self {
        let stop = CancellationToken::new();
        Self::Large(tokio::spawn(write_large(access, stop.clone())), stop)
    }

    async fn stop(self) -> Vec<Acknowledged> {
        match self {
            Writes::Small(traffic) => traffic.stop().await,
            Writes::Large(writing, stop) => {
                stop.cancel();
                writing.await.unwrap()
            }
        }
    }
}

async fn write_large(access: Access, stop: CancellationToken) -> Vec<Acknowledged> {
    let mut kv = access.kv().await;
    let mut pace = tokio::time::interval(Duration::from_millis(50));
    let mut acknowledged = Vec::new();
    while !stop.is_cancelled() {
        pace.tick().await;
        let keys = noise("/app/large/", 12, 10_000);
        let writes: Vec<Write> = keys.into_iter().map(|(key, value)| Write::put(key, value)).collect();
        acknowledged.extend(commit(&mut kv, &writes).await.unwrap());
    }
    acknowledged
}

/// Carries writes over the end of a sidecar.
async fn carried(trial: Trial, pair: &mut Pair, recorder: &PairRecorder) -> Vec<Acknowledged> {
    trial.arm(pair);
    let large = trial.point.during == During::Parts;
    let access = pair.origin.access();
    let writes = if large { Writes::large(access) } else { Writes::small(&access) };
    if trial.point.during == During::Start && trial.side == Side::Replica {
        // A hello, with a term of its own.
        pair.origin_sidecar.restart().await;
    }
    trial.ends(pair).await;
    trial.compacts(pair, recorder).await;
    trial.starts_again(pair).await;
    writes.stop().await
}

/// The replica's etcd stands still until all that was written is heard to be durable, or the sidecar has ended: files are full, synced and, once
/// it is applied, unlinked.
async fn carried_over_an_outage(trial: Trial, pair: &mut Pair, recorder: &PairRecorder) -> Vec<Acknowledged> {
    trial.arm(pair);
    let before = pair.origin.put("/app/before", trial.to_string()).await;
    let mut seq = until("the link to follow, or the end of the sidecar", PATIENCE, async || {
        let position = pair.position().await?;
        let ended = trial.sidecar(pair).try_ended().is_some();
        (ended || position.origin_revision >= before).then_some(position.seq.0)
    })
    .await;
    pair.replica.pause();
    let mut acknowledged = Vec::new();
    for round in 0..OUTAGE_ROUNDS {
        let keys = noise(&format!("/app/outage/{round}/"), OUTAGE_KEYS, 8_000);
        acknowledged.extend(put_at_once(&pair.origin.access(), keys.into_iter().collect()).await);
        seq += OUTAGE_KEYS as u64;
        until("all to be durable, or the end of the sidecar", PATIENCE, async || {
            if trial.sidecar(pair).try_ended().is_some() {
                return Some(());
            }
            let health = pair.origin_sidecar.health().await?;
            (health["links"][0]["durable_seq"].as_u64()? >= seq).then_some(())
        })
        .await;
    }
    pair.replica.resume();
    trial.ends(pair).await;
    trial.compacts(pair, recorder).await;
    trial.starts_again(pair).await;
    acknowledged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_a_sidecar_ends_between_reading_a_revision_and_acknowledging_it_the_link_goes_on() {
    let mut pair = following().await;
    for trial in trials(Group::Carrying) {
        eprintln!("{trial}");
        let recorder = pair.record().await;
        let acknowledged = if trial.point.during == During::Outage {
            carried_over_an_outage(trial, &mut pair, &recorder).await
        } else {
            carried(trial, &mut pair, &recorder).await
        };
        trial.judge(&pair, recorder, acknowledged).await;
        assert_eq!(pair.position().await.unwrap().epoch.0, 1, "{trial}: a new epoch");
    }
}

/// The replica has no position any more, and half of the keys.
async fn forget_position(pair: &Pair) {
    let mut kv = pair.replica.kv().await;
    kv.delete(link_name(LINK).position_key().to_vec(), None).await.unwrap();
    let half = DeleteOptions::new().with_range(format!("/app/{:06}", KEYS / 2));
    kv.delete("/app/", Some(half)).await.unwrap();
    kv.delete("/app/traffic/", Some(DeleteOptions::new().with_prefix())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_a_sidecar_ends_in_a_base_copy_the_copy_is_completed() {
    let mut pair = following().await;
    let slowly = LinkProxy::start(pair.origin.address()).await.unwrap();
    slowly.set_delay(Duration::from_millis(50));
    for trial in trials(Group::Copying) {
        eprintln!("{trial}");
        pair.origin_sidecar.kill();
        pair.replica_sidecar.kill();
        forget_position(&pair).await;
        let recorder = pair.record().await;
        let mark = pair.origin.put("/app/mark", trial.to_string()).await;
        recorder.origin_seen(mark).await;
        let compaction = trial.point.during == During::Compaction;
        if compaction {
            set_etcd(&mut pair.origin_sidecar, slowly.address());
        }
        trial.arm(&mut pair);
        match trial.side {
            Side::Origin => pair.replica_sidecar.restart().await,
            Side::Replica => pair.origin_sidecar.restart().await,
        }
        let writes = Writes::small(&pair.origin.access());
        let compacting = if compaction { Some(compacted_in_the_copy(&pair).await) } else { None };
        trial.ends(&mut pair).await;
        if let Some(compacting) = compacting {
            compacting.abort();
        }
        set_etcd(&mut pair.origin_sidecar, pair.origin.address());
        trial.starts_again(&mut pair).await;
        pair.origin_sidecar.wait_for_state(LINK, "following").await;
        trial.judge(&pair, recorder, writes.stop().await).await;
    }
}

/// Its next start reaches its etcd at this address.
fn set_etcd(sidecar: &mut Sidecar, address: SocketAddr) {
    sidecar.options.etcd.url = format!("http://{address}");
    sidecar.write_config();
}

/// Once the base copy has begun, etcd is compacted to its head, again and again: from one page to the next more than once, as its sidecar
/// reaches it slowly.
async fn compacted_in_the_copy(pair: &Pair) -> JoinHandle<()> {
    let copying = async || pair.position().await.filter(|position| position.state == Phase::Copying);
    until("the base copy to begin", PATIENCE, copying).await;
    let access = pair.origin.access();
    tokio::spawn(async move {
        let mut client = access.client().await;
        let mut pace = tokio::time::interval(Duration::from_millis(5));
        loop {
            pace.tick().await;
            let put = client.put("/app/compacted", "", None).await.unwrap();
            let head = put.header().map_or(0, |header| header.revision());
            // Somebody else's revisions may be there already.
            let _ = client.compact(head, None).await;
        }
    })
}

/// What an operator asks of the origin's sidecar, until the sidecar of the trial has ended over it.
async fn asked_until_it_ends(trial: Trial, pair: &mut Pair, command: &'static str) {
    let deadline = Instant::now() + PATIENCE;
    while trial.sidecar(pair).try_ended().is_none() {
        assert!(Instant::now() < deadline, "{command} does not pass {trial}");
        ask(pair, command).await;
    }
    trial.ends(pair).await;
}

/// True if it was answered, and well.
async fn ask(pair: &Pair, command: &'static str) -> bool {
    let config = pair.origin_sidecar.config_path().to_str().unwrap().to_owned();
    let asking = tokio::task::spawn_blocking(move || ferry(&[command, LINK, "--json", "--config", &config]));
    asking.await.unwrap().status.success()
}

async fn ended_in_a_comparison(trial: Trial, pair: &mut Pair) {
    let recorder = pair.record().await;
    trial.arm(pair);
    let writes = Writes::small(&pair.origin.access());
    asked_until_it_ends(trial, pair, "verify").await;
    trial.starts_again(pair).await;
    trial.judge(pair, recorder, writes.stop().await).await;
    until("both sides to be compared", PATIENCE, async || ask(pair, "verify").await.then_some(())).await;
}

async fn ended_in_a_repair(trial: Trial, pair: &mut Pair) {
    let by_hand: KeyMap = noise("/app/", KEYS, 90).into_iter().take(KEYS - 50).collect();
    load(&pair.replica, &by_hand).await;
    let recorder = pair.record().await;
    trial.arm(pair);
    asked_until_it_ends(trial, pair, "repair").await;
    let (_, keys) = pair.replica.read(&pair.ranges, None).await;
    let left = by_hand.iter().filter(|(key, value)| keys.get(*key) == Some(*value)).count();
    let state = pair.position().await.unwrap().state;
    assert_eq!(state == Phase::Repairing, (1..by_hand.len()).contains(&left), "{trial}: {left} keys left, {state:?}");
    trial.starts_again(pair).await;
    if left == by_hand.len() {
        until("what differs to be mended", PATIENCE, async || ask(pair, "repair").await.then_some(())).await;
    }
    // What was begun goes on by itself.
    pair.wait_equal().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorded = pair.recorded(recorder).await;
    recorded.fenced().and_then(|_| recorded.ordered()).unwrap_or_else(|fault| panic!("{trial}: {fault}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_a_sidecar_ends_in_a_comparison_or_a_repair_both_sides_are_equal_and_proved_to_be() {
    let mut pair = following().await;
    for trial in trials(Group::Comparing) {
        eprintln!("{trial}");
        if trial.point.during == During::Repair {
            ended_in_a_repair(trial, &mut pair).await;
        } else {
            ended_in_a_comparison(trial, &mut pair).await;
        }
    }
    assert_eq!(pair.position().await.unwrap().epoch.0, 1, "no base copy");
    assert_verified(&pair);
}

#[tokio::test]
async fn a_failpoint_that_is_not_in_the_list_is_refused_and_named() {
    assert!(failpoint::are_compiled_in(), "{CALL}");
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path(), &[ORIGIN_REGION]);
    let etcd = Access { url: "http://127.0.0.1:1".into(), tls: None, user: None };
    let mut options = SidecarOptions::new(ORIGIN_REGION, etcd, Ports::choose(), dir.path());
    let peer = region_name(ORIGIN_REGION);
    options.receive.push(ReceiveLink { link: LINK.to_owned(), peer, ..ReceiveLink::default() });
    let mut sidecar = Sidecar::prepare(options, dir.path());
    for (asked, said) in [("unheard-of=return", "there is no failpoint"), ("spooled=vanish", "spooled: ")] {
        sidecar.options.failpoints = asked.to_owned();
        sidecar.spawn();
        assert_eq!(sidecar.ended().await.code(), Some(1), "{asked}");
        assert!(sidecar.log().contains(said), "{asked}: {}", sidecar.log());
    }
}

/// Every `failpoint::reach("...")` of the product.
fn places() -> Vec<String> {
    let (mut places, mut folders) = (Vec::new(), vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(path).unwrap();
            let found = text.split("failpoint::reach(\"").skip(1).filter_map(|rest| rest.split_once('"'));
            places.extend(found.map(|(name, _)| name.to_owned()));
        }
    }
    places
}

#[test]
fn every_failpoint_of_the_list_has_one_place_in_the_sources_and_no_place_has_another_name() {
    let listed: BTreeSet<&str> = POINTS.iter().map(|point| point.name).collect();
    assert_eq!(listed.len(), POINTS.len(), "a name is there twice");
    let places = places();
    let named: BTreeSet<&str> = places.iter().map(String::as_str).collect();
    assert_eq!(named, listed);
    assert_eq!(places.len(), POINTS.len(), "a point has two places: {places:?}");
}
