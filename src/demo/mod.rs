//! Job: two regions on one machine, for `make demo`; and the parts of it that tests and benchmarks use too.
//! Input: the demo's options, signals. Output: a live line, a table, and whether both sides are equal.
//! Always true: it listens on loopback only; whatever ends it (its own end, an error, a panic, a signal at any moment), no process and no
//! folder stays behind.

pub mod compare;
pub mod faults;
pub mod load;
pub mod meter;
pub mod objects;
pub mod ports;
pub mod process;
pub mod proxy;
pub mod regions;
pub mod report;
pub mod show;

use crate::etcd::Etcd;
use anyhow::{Context, bail};
use faults::Faults;
use meter::Backlog;
use regions::{Region, Regions};
use report::{Findings, Report};
use show::{Board, Screen, Seen};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Acknowledgements and events on their way to the board: a second's worth.
const SEEN_MAX: usize = 1_024;
/// Batches in one demo: one in quiet times at its start, and one while the link is cut.
const BATCHES: u32 = 4;

/// How long a failure waits for a process to turn out dead.
const DEATH_LOOKS: u32 = 20;
const DEATH_LOOK: Duration = Duration::from_millis(25);

#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long it writes.
    pub length: Duration,
    /// Both regions stay up until Ctrl-C.
    pub keep: bool,
    /// The report as JSON on standard output; everything else on standard error.
    pub json: bool,
}

/// Runs the demo. An `Err` says why it did not pass, or that it was stopped.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let shown = tokio::select! {
        biased;
        name = signals.next() => bail!("the demo was stopped by {name}; nothing of it is left behind"),
        shown = Box::pin(show(options)) => shown?,
    };
    let Shown { regions, mut screen, report } = shown;
    if options.json {
        println!("{}", report.json());
    } else {
        screen.say(&report.table())?;
    }
    if options.keep {
        screen.say(&how_to_look(&regions))?;
        signals.next().await;
    }
    drop(regions);
    match report.difference {
        _ if report.passed => Ok(()),
        Some(difference) => bail!("the two sides differ: {difference}"),
        None => bail!("the two sides are equal, but not each revision took effect exactly once: see the table"),
    }
}

struct Shown {
    regions: Regions,
    screen: Screen,
    report: Report,
}

async fn show(options: Options) -> anyhow::Result<Shown> {
    let mut screen = Screen::open(options.json);
    screen.say(&format!(
        "two regions on this machine, {} (origin) and {} (replica): an etcd and a sidecar each",
        regions::ORIGIN,
        regions::REPLICA
    ))?;
    let started = Instant::now();
    let mut regions = Box::pin(Regions::start()).await?;
    let origin = regions.origin.connect().await?;
    load::write_first(&origin).await?;
    Box::pin(regions.start_sidecars()).await?;
    let first = load::OBJECTS_FIRST;
    let took = show::time(started.elapsed());
    screen.say(&format!("both are up and {first} objects are copied, {took} after the start; now it writes"))?;

    match Box::pin(perform(options, &mut regions, &origin, screen)).await {
        Ok((screen, report)) => Ok(Shown { regions, screen, report }),
        Err(failure) => {
            // A process that has died explains what failed because of it. Its connections end a little before it can be seen.
            for _ in 0..DEATH_LOOKS {
                regions.check()?;
                tokio::time::sleep(DEATH_LOOK).await;
            }
            Err(failure)
        }
    }
}

/// Writes, breaks the link, waits for the replica, compares.
async fn perform(
    options: Options,
    regions: &mut Regions,
    origin: &Etcd,
    screen: Screen,
) -> anyhow::Result<(Screen, Report)> {
    let (seen, mut incoming) = mpsc::channel(SEEN_MAX);
    let (backlog_sender, backlog) = watch::channel(Backlog::default());
    let mut board = Board::new(screen, regions.proxy.clone(), backlog_sender);
    let replica = regions.replica.connect().await?;
    let mut cast = Cast::start(origin, &replica, options.length, &seen).await?;
    let mut faults = Faults { regions, seen, backlog, reports: Vec::new() };
    let course = async {
        faults.run(options.length).await?;
        cast.stop_writing().await?;
        faults.caught_up().await?;
        let comparison = Box::pin(compare::compare(origin, &replica)).await?;
        anyhow::Ok((comparison, faults.regions.count().await))
    };
    let (comparison, counts) = tokio::select! {
        outcome = Box::pin(course) => outcome?,
        ended = board.run(&mut incoming) => {
            ended?;
            bail!("everything that is shown has ended");
        }
    };
    let reports = faults.reports;
    let bytes_sent = board.bytes_sent();
    let findings =
        Findings { length: options.length, meter: &board.meter, comparison, counts, bytes_sent, faults: reports };
    let report = Report::new(findings);
    Ok((board.screen, report))
}

/// Who writes at the origin, and who watches at the replica.
struct Cast {
    writers: JoinSet<()>,
    stop: CancellationToken,
    _watcher: JoinSet<()>,
}

impl Cast {
    async fn start(origin: &Etcd, replica: &Etcd, length: Duration, seen: &mpsc::Sender<Seen>) -> anyhow::Result<Self> {
        let head = replica.look(b"head").await?.head;
        let mut watcher = JoinSet::new();
        watcher.spawn(telling(compare::watch(replica.clone(), head, seen.clone()), seen.clone()));
        let (mut writers, stop) = (JoinSet::new(), CancellationToken::new());
        for number in 0..load::WRITERS {
            let writing = load::write_objects(origin.clone(), number, stop.clone(), seen.clone());
            writers.spawn(telling(writing, seen.clone()));
        }
        let batches = load::write_batches(origin.clone(), length / BATCHES, stop.clone(), seen.clone());
        writers.spawn(telling(batches, seen.clone()));
        Ok(Self { writers, stop, _watcher: watcher })
    }

    /// Returns when every writer has told of its last write.
    async fn stop_writing(&mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        while let Some(ended) = self.writers.join_next().await {
            ended?;
        }
        Ok(())
    }
}

/// A task whose failure ends the demo.
async fn telling(task: impl Future<Output = anyhow::Result<()>>, seen: mpsc::Sender<Seen>) {
    if let Err(failure) = task.await {
        // If nobody listens any more, the demo has ended already.
        let _ = seen.send(Seen::Failed(failure)).await;
    }
}

/// For `--keep`: commands that can be copied.
fn how_to_look(regions: &Regions) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("etcd-ferry"));
    let etcdctl = in_path("etcdctl");
    let region = |region: &Region| {
        format!(
            "{}:\n  {} --endpoints={} get --prefix /registry/pods/ --keys-only --limit=3\n  {} status --config {}\n  \
             curl http://{}/metrics\n  log: {}\n",
            region.name,
            etcdctl.display(),
            region.etcd_url,
            program.display(),
            region.config_path().display(),
            region.http,
            region.log_path().display(),
        )
    };
    let position = format!(
        "the position, which lives with the data:\n  {} --endpoints={} get --print-value-only {}\n",
        etcdctl.display(),
        regions.replica.etcd_url,
        regions::position_key(),
    );
    format!(
        "\nBoth regions stay up, and the link carries on what you put, until Ctrl-C.\n\n{}\n{}\n{position}",
        region(&regions.origin),
        region(&regions.replica)
    )
}

/// The path of a tool, so that its command works in any shell.
fn in_path(tool: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(tool)).find(|file| file.is_file());
    found.unwrap_or_else(|| PathBuf::from(tool))
}

/// Signals that ask the demo to end. Once they are listened for, none of them ends the process by itself, however often it comes.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("signals cannot be listened for");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            quit: listen(SignalKind::quit())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "Ctrl-C",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hangup.recv() => "the end of its terminal",
            _ = self.quit.recv() => "SIGQUIT",
        }
    }
}
