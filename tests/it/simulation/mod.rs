//! Job: the seeded simulation: the product's pure stages, stepped through faults by one seed after the other, and judged at each transaction.
//! Input: seeds. Output: passes; or the seed that failed, its invariant, its step and the steps before it.
//! Synchronous: one seed is one thread's work, and the same each time.
//! Always true: every kind of fault and every outcome of the resume table has happened in a run over all seeds, or the run fails.
//!
//! `SEED=n` runs that seed alone; `SEEDS=n` runs so many (`make soak`).

mod copier;
mod dedupe;
mod disk;
mod etcd;
mod judge;
mod line;
mod names;
mod origin;
mod pages;
mod random;
mod region;
mod replica;
mod tail;
mod world;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const SEEDS: u64 = 2_000;
/// Failing seeds that are told of in full.
const FAILURES_SHOWN: usize = 3;
/// Failing seeds that are told of in a line.
const HEADS_SHOWN: usize = 40;

/// What must have happened over all seeds.
const MUST_HAPPEN: [&str; 87] = [
    "frame damaged",
    "frame dropped",
    "frame repeated",
    "frame reordered",
    "progress dropped",
    "progress repeated",
    "progress reordered",
    "page dropped",
    "page repeated",
    "page reordered",
    "ack dropped",
    "ack repeated",
    "ack reordered",
    "reset",
    "standalone frame",
    "duplicates",
    "framed anew",
    "two senders",
    "hello lost",
    "hello fenced",
    "hello takes over",
    "request lost",
    "answer lost",
    "gave up waiting",
    "read failed",
    "position compare failed",
    "refused for operations",
    "refused for bytes",
    "plan merged",
    "plan in parts",
    "plan range delete",
    "plan nested",
    "guard of a range delete failed",
    "idle position",
    "watch message in fragments",
    "watch goes on after the spool's end",
    "carried revision known from the spool",
    "watch begins with the carried revision",
    "tail saw another history",
    "spool full",
    "spool of another run",
    "spool shows a restored origin",
    "revision appended after a gap",
    "waymark written",
    "base copy begun",
    "base copy complete",
    "sender crashed",
    "receiver crashed",
    "sender crashed between spool and copy",
    "sender crashed between note and stop",
    "sender crashed before its spool was cleared",
    "sender crashed before its cleared spool was known to be",
    "receiver crashed between journal and dedupe log",
    "receiver crashed between commit and trim",
    "receiver crashed between trim and done",
    "receiver crashed between epoch and journal",
    "receiver crashed between claim and session",
    "stream broken",
    "watch broken",
    "origin compacted",
    "replica compacted",
    "foreign write",
    "election",
    "spool lost",
    "lineage lost",
    "position published",
    "standby trims",
    "standby begins",
    "standby begins earlier",
    "journal lost",
    "dedupe log lost",
    "dedupe log read from files",
    "dedupe log ahead of the journal",
    "dedupe log behind the journal",
    "repeat and conflict known after a restart",
    "replica restored",
    "origin restored",
    "origin replaced",
    "ranges changed",
    "operator's resync",
    "another history written down",
    "another history remembered",
    "another history forgotten",
    "end GUARD",
    "end GAP",
    "end FENCED",
    "end POSITION_MOVED",
];

/// Every outcome of the resume table, each with each of its reasons.
const OUTCOMES: [&str; 16] = [
    "ship from the spool",
    "watch from the position",
    "tail",
    "copy: no position",
    "stop: other cluster",
    "copy: other ranges",
    "copy: compacted",
    "repair: compacted",
    "copy: not provable",
    "copy: goes on",
    "copy: asked",
    "stop: head below",
    "stop: waymark missing",
    "stop: waymark older",
    "stop: waymark unknown",
    "stop: carried differs",
];

/// In memory where there is such a folder: what is written here is not worth a disk.
fn folder(seed: u64) -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    let root = if memory.is_dir() { memory } else { std::env::temp_dir() };
    root.join(format!("etcd-ferry-simulation-{}-{seed}", std::process::id()))
}

fn number_in(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number, not {text:?}")))
}

#[derive(Default)]
struct Sum {
    counts: BTreeMap<String, u64>,
    judged: u64,
    failures: Vec<String>,
}

impl Sum {
    fn add(&mut self, seed: u64, run: world::Run) {
        for (what, count) in run.counts {
            *self.counts.entry(what).or_default() += count;
        }
        self.judged += run.judged;
        if let Some((fault, step, trace)) = run.fault {
            self.failures.push(format!(
                "seed {seed}, step {step}: not {}: {}\nthe last steps:\n{trace}\nagain: SEED={seed} cargo test --test it simulation",
                fault.invariant, fault.what
            ));
        }
    }
}

/// Runs seeds `0..count` on all processors.
fn run_all(count: u64) -> Sum {
    let next = AtomicU64::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let mut sum = Sum::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= count {
                return sum;
            }
            sum.add(seed, world::run(seed, &folder(seed)));
        }
    };
    let mut all = Sum::default();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        for worker in running {
            let sum = worker.join().expect("a seed does not panic");
            sum.counts.into_iter().for_each(|(what, count)| *all.counts.entry(what).or_default() += count);
            all.judged += sum.judged;
            all.failures.extend(sum.failures);
        }
    });
    all
}

#[test]
fn whatever_fails_on_the_way_the_replica_is_the_origin_at_each_of_its_positions_and_at_the_end() {
    if let Some(seed) = number_in("SEED") {
        let mut sum = Sum::default();
        sum.add(seed, world::run(seed, &folder(seed)));
        println!("{:#?}", sum.counts);
        assert!(sum.failures.is_empty(), "\n{}\n", sum.failures.join("\n"));
        return;
    }
    let (seeds, started) = (number_in("SEEDS").unwrap_or(SEEDS), Instant::now());
    let sum = run_all(seeds);
    let seconds = started.elapsed().as_secs_f64();
    let (failed, shown) = (sum.failures.len(), sum.failures.iter().take(FAILURES_SHOWN).cloned().collect::<Vec<_>>());
    println!("{} transactions judged; {:#?}\n{seeds} seeds took {seconds:.1} s", sum.judged, sum.counts);
    let heads: Vec<&str> = sum.failures.iter().filter_map(|failure| failure.lines().next()).take(HEADS_SHOWN).collect();
    assert!(shown.is_empty(), "\n{}\n\n{failed} of {seeds} seeds failed:\n{}\n", shown.join("\n\n"), heads.join("\n"));
    let outcomes = OUTCOMES.iter().map(|outcome| format!("resume {outcome}"));
    let wanted = MUST_HAPPEN.iter().map(|what| (*what).to_owned()).chain(outcomes);
    let missing: Vec<String> = wanted.filter(|what| !sum.counts.contains_key(what)).collect();
    assert!(missing.is_empty() || seeds < SEEDS, "in {seeds} seeds these never happened: {missing:?}");
}

#[test]
fn the_same_seed_makes_the_same_run() {
    for seed in [3, 77] {
        let [first, second] = ["one", "two"].map(|name| world::run(seed, &folder(seed).with_extension(name)));
        assert_eq!((first.counts, first.judged), (second.counts, second.judged));
    }
}
