//! Job: the whole of two regions, run for minutes under every fault that processes, lines, disks and clusters have, one after the other and
//! two at once.
//! Input: `MINUTES` (2 unless set). Output: passes or fails; which faults there were, what was judged, how long each took to recover from.
//! Always true: whatever was acknowledged is judged from the recordings of both ends, round by round; a link that does not move again after a
//! fault is a failure, and so is one that stands still in silence, and a kind of fault that never was or did nothing.

mod silence;

use crate::bed::checkers::Recording;
use crate::bed::faults::{Done, Fault, strike, told};
use crate::bed::pair::link_name;
use crate::bed::recording::Recorder;
use crate::bed::regions::{Regions, RegionsOptions};
use crate::bed::traffic::{Acknowledged, Traffic, TrafficOptions};
use crate::bed::{PATIENCE, until};
use etcd_ferry::model::{Phase, Revision};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use silence::{silence_max, silent_for_too_long};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const MINUTES: u64 = 2;
/// What was recorded in a round is held in memory until it is judged.
const ROUND: Duration = Duration::from_secs(120);
const FAULT_MIN: Duration = Duration::from_millis(300);
/// Longer than the lease of an election.
const FAULT_MAX: Duration = Duration::from_secs(8);
/// Several times what any fault took on two busy cores. One that takes longer is taken for one that the link does not recover from.
const RECOVERY_MAX: Duration = Duration::from_secs(120);

#[derive(Default)]
struct Report {
    /// From the end of a fault until something written after it was applied.
    recoveries: BTreeMap<Fault, Vec<Duration>>,
    /// What faults that may do nothing have done.
    done: Done,
    acknowledged: usize,
    judged: usize,
    /// Positions that were judged to be fenced.
    positions: usize,
    keys: usize,
    rounds: usize,
    epochs: u64,
}

impl Report {
    fn print(&self, took: Duration) {
        println!("\n{:<46} {:>6} {:>10} {:>10}", "fault", "times", "p50", "longest");
        for (fault, times) in &self.recoveries {
            let mut times = times.clone();
            times.sort();
            let (median, longest) = (times[(times.len() - 1) / 2], times[times.len() - 1]);
            println!(
                "{:<46} {:>6} {:>8.2} s {:>8.2} s",
                fault.name(),
                times.len(),
                median.as_secs_f64(),
                longest.as_secs_f64()
            );
        }
        let faults: usize = self.recoveries.values().map(Vec::len).sum();
        println!(
            "\n{faults} faults in {:.0} s and {} rounds, {} bits flipped after TLS, {} compactions: {} acknowledged revisions all carried, {} \
             replica revisions judged to be whole, once and in order, {} positions fenced, {} keys equal at the ends, {} new epochs",
            took.as_secs_f64(),
            self.rounds,
            self.done.flips,
            self.done.compactions,
            self.acknowledged,
            self.judged,
            self.positions,
            self.keys,
            self.epochs
        );
    }
}

fn traffic(regions: &Regions) -> Vec<Traffic> {
    let at = |(number, member): (usize, &crate::bed::etcd::Etcd)| {
        let options = TrafficOptions {
            prefix: format!("/registry/{number}/"),
            writers: 1,
            writes_per_writer: usize::MAX,
            rate_per_writer: Some(25),
            value_bytes_max: 8 * 1_024,
            ..TrafficOptions::default()
        };
        Traffic::start(&member.access(), &options)
    };
    regions.origin.iter().enumerate().map(at).collect()
}

/// Until something that is written now is applied; how long that took. `after`: which fault, for whoever reads the failure.
async fn recover(regions: &Regions, after: &str) -> Duration {
    let since = Instant::now();
    let moved = async {
        let revision = until("a put at the origin", 2 * RECOVERY_MAX, async || {
            let mut kv = regions.origin_alive().await.kv().await;
            let put = tokio::time::timeout(PATIENCE, kv.put("/registry/marker", after, None)).await;
            put.ok()?.ok()?.header().map(|header| Revision::from_etcd(header.revision()))
        })
        .await;
        until("it to be applied", 2 * RECOVERY_MAX, async || {
            let position = regions.try_position().await?;
            (position.state == Phase::Following && position.origin_revision >= revision).then_some(())
        })
        .await;
    };
    let failed = tokio::select! {
        in_time = tokio::time::timeout(RECOVERY_MAX, Box::pin(moved)) => {
            in_time.err().map(|_| format!("the link did not recover within {RECOVERY_MAX:?}"))
        }
        () = Box::pin(silent_for_too_long(regions)) => {
            Some(format!("the link stood still for {:?}, and no sidecar said why", silence_max()))
        }
    };
    if let Some(failed) = failed {
        panic!("{failed}, after: {after}\n{}", told(regions).await);
    }
    since.elapsed()
}

/// All faults in an order of their own, each third one together with the next.
async fn round(regions: &mut Regions, length: Duration, random: &mut StdRng, report: &mut Report) {
    let before = regions.position().await;
    let members = regions.origin.iter().map(crate::bed::etcd::Etcd::access).collect();
    let origin = Recorder::start_over(members, None).await;
    let replica = Recorder::start(regions.replica_alive().await).await;
    let writers = traffic(regions);
    let end = Instant::now() + length;
    let mut order = Vec::new();
    // Whole orders: each kind comes as often as any other.
    while Instant::now() < end || !order.is_empty() {
        if order.is_empty() {
            order = Fault::ALL.to_vec();
            order.shuffle(random);
        }
        let mut faults: Vec<Fault> = order.pop().into_iter().collect();
        if random.random_ratio(1, 3)
            && let Some(second) = order.iter().position(|other| other.goes_with(faults[0]))
        {
            faults.push(order.swap_remove(second));
        }
        let length = random.random_range(FAULT_MIN..FAULT_MAX);
        let names = faults.iter().map(|fault| fault.name()).collect::<Vec<_>>().join(", and ");
        eprintln!("{names}, for {length:?}");
        let done = strike(regions, &faults, length, &origin, random).await;
        report.done.flips += done.flips;
        report.done.compactions += done.compactions;
        let took = recover(regions, &names).await;
        faults.iter().for_each(|fault| report.recoveries.entry(*fault).or_default().push(took));
    }
    let mut acknowledged: Vec<Acknowledged> = Vec::new();
    for writer in writers {
        acknowledged.extend(writer.stop().await);
    }
    acknowledged.sort_by_key(|ack| ack.revision);
    recover(regions, "the end of a round").await;
    regions.assert_equal().await;
    let (at_origin, at_replica) = (regions.origin_alive().await, regions.replica_alive().await);
    let recording = Recording {
        link: link_name(crate::bed::pair::LINK),
        ranges: regions.ranges.clone(),
        // The replica first: a position must not name an origin revision that the origin's history lacks.
        replica: replica.finish(at_replica.head().await).await,
        origin: origin.finish(at_origin.head().await).await,
    };
    report.acknowledged += recording.complete(&acknowledged).expect("complete");
    report.judged += recording.check().expect("fenced, once, whole and in order");
    report.positions += recording.fenced().expect("fenced");
    report.keys = at_origin.read(&regions.ranges, None).await.1.len();
    report.epochs += regions.position().await.epoch.0 - before.epoch.0;
    report.rounds += 1;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_for_minutes_nothing_is_lost_doubled_torn_or_silent() {
    let minutes = std::env::var("MINUTES").map_or(MINUTES, |text| text.parse().expect("MINUTES is a number"));
    let seed = rand::random();
    eprintln!("soak: seed {seed}, {minutes} minutes");
    let mut random = StdRng::seed_from_u64(seed);
    let options =
        RegionsOptions { members: (3, 1), sidecars: (2, 2), apart: true, bent: true, ..RegionsOptions::default() };
    let mut regions = Box::pin(Regions::start(options)).await;
    let (mut report, began) = (Report::default(), Instant::now());
    let length = Duration::from_secs(60 * minutes);
    while began.elapsed() < length {
        let left = length.saturating_sub(began.elapsed());
        Box::pin(round(&mut regions, left.min(ROUND), &mut random, &mut report)).await;
    }
    report.print(began.elapsed());
    assert!(report.acknowledged > 0 && report.judged > 0 && report.positions > 0, "nothing was judged");
    assert!(report.done.flips > 0, "no bit was flipped after TLS");
    assert!(report.done.compactions > 0, "the origin was never compacted");
    let missing: Vec<&str> =
        Fault::ALL.iter().filter(|fault| !report.recoveries.contains_key(fault)).map(|fault| fault.name()).collect();
    assert!(missing.is_empty() || minutes < 2, "these never happened: {missing:?}");
}
