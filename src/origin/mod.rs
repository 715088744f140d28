//! Job: the origin's half of a link: its three stages (watch, spool, ship) and what `status` says of them.
//! Input: a `[[send]]` link, the origin's etcd, commands. Output: shipments to the peer, a `LinkStatus`.
//! Always true: the link's task alone writes the link's status; a stage that ends ends the link.

pub mod anchor;
pub mod canary;
pub mod candidacy;
mod compare;
mod decide;
pub mod elect;
mod found;
mod head;
mod heartbeat;
mod hello;
pub mod history;
pub mod lag;
pub mod lineage;
mod mend;
mod outcome;
mod probe;
mod reader;
mod receipts;
mod remember;
pub mod reopen;
pub mod resume;
pub mod sequence;
pub mod session;
pub mod ship;
pub mod shipped;
pub mod spool;
mod stall;
mod standby;
mod status;
pub mod tail;
mod tally;
mod term;
mod verify;
mod view;
pub mod watch;

use crate::admin::LinkCommand;
use crate::admin::refresh::Asked;
use crate::config::{Limits, SendConfig};
use crate::etcd::gate::{ClusterLimits, Gate};
use crate::metrics;
use crate::model::stall::Watchdog;
use crate::model::{LinkName, LinkStatus, Revision, Term};
use crate::tls::reload::InUse;
use crate::wire::digest;
use elect::{ElectView, Election, Heard};
use head::HeadView;
use lag::LagTracker;
use ship::Shipper;
use spool::{Spool, SpoolExtent};
use status::Views;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tail::{TailState, TailView};
use tokio::sync::{mpsc, watch as watch_channel};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use view::ShipView;
use watch::Tail;

/// Batches of arrivals and head readings that wait for the link's task; it only counts them, so they never gather.
const EVENTS_MAX: usize = 256;
/// Whoever reads the status asks for it anew; this is for what watches it.
const STATUS_INTERVAL: Duration = Duration::from_millis(500);

/// Unix time that never steps back while the process lives: the clock that lag is measured by.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started: Instant,
    started_ms: u64,
}

impl Clock {
    pub fn new() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { started: Instant::now(), started_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(0) }
    }

    pub fn now_ms(&self) -> u64 {
        self.started_ms + u64::try_from(self.started.elapsed().as_millis()).unwrap_or(0)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

/// What the stages tell the link's task, in order.
#[derive(Debug)]
pub enum LinkEvent {
    Arrived {
        revisions: Vec<Revision>,
        at_ms: u64,
    },
    Covered(Revision),
    Head {
        revision: Revision,
        at_ms: u64,
    },
    Greeted {
        applied: Revision,
        durable: Revision,
    },
    Acked {
        applied: Revision,
        durable: Revision,
    },
    /// The spool begins anew after this revision, where a base copy or a repair starts.
    Anchored(Revision),
    /// What the sidecar that ships the link has published, or the one before this one.
    Published(Revision),
}

/// Why an origin link cannot run.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    #[error("the spool: {0}")]
    Spool(#[from] spool::SpoolError),
    #[error("a stage has ended: {why}")]
    Ended { why: String },
}

/// Everything that one origin link needs.
pub struct OriginLink {
    pub send: SendConfig,
    pub etcd: Arc<Gate>,
    pub limits: Limits,
    /// The link's own folder below `data_dir`.
    pub dir: PathBuf,
    pub certificates: watch_channel::Receiver<Arc<InUse>>,
    pub region: String,
    pub node: String,
    /// True if this process is also the replica of an overlapping link from the same peer.
    pub link_back: bool,
}

/// An origin link whose disk is open; [`OriginTask::run`] runs it.
pub struct OriginTask {
    origin: OriginLink,
    spool: Arc<Spool>,
}

impl OriginLink {
    /// Opens the spool. An `Err` means that the disk cannot be used.
    pub async fn open(self) -> Result<OriginTask, OriginError> {
        let ranges = digest::of_ranges(&self.send.ranges);
        let (spool, opened) = Spool::open(&self.dir.join("spool"), &self.limits, ranges).await?;
        opened.log(&self.send.link, "spool");
        Ok(OriginTask { origin: self, spool: Arc::new(spool) })
    }

    /// Opens the spool, which takes its time where much is in it, then runs until `stop`.
    pub async fn run(
        self,
        status: watch_channel::Sender<LinkStatus>,
        asked: mpsc::Receiver<Asked>,
        commands: mpsc::Receiver<LinkCommand>,
        stop: CancellationToken,
    ) -> Result<(), OriginError> {
        self.open().await?.run(status, asked, commands, stop).await
    }
}

impl OriginTask {
    /// Runs until `stop`, then closes the spool.
    pub async fn run(
        self,
        status: watch_channel::Sender<LinkStatus>,
        mut asked: mpsc::Receiver<Asked>,
        commands: mpsc::Receiver<LinkCommand>,
        stop: CancellationToken,
    ) -> Result<(), OriginError> {
        let Self { origin, spool } = self;
        let link = origin.send.link.clone();
        let clock = Clock::new();
        let mut lag = LagTracker::new();
        for arrived in spool.arrivals() {
            lag.arrived_several(arrived.revision_last, arrived.at_ms, arrived.count);
        }
        lag.covered(spool.extent().borrow().covered);
        let dog = Watchdog::new(origin.limits.stall_seconds.saturating_mul(1_000));
        let spool_bytes_max = origin.limits.spool_bytes_max;
        let mut watching = Watching { link: link.clone(), dog, stalls: 0, spool_bytes_max };
        let mut stages = origin.start(&spool, clock, status.subscribe(), commands, &stop);
        let mut ticks = tokio::time::interval(STATUS_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut over = false;
        while !over {
            let asked = tokio::select! {
                biased;
                () = stop.cancelled() => {
                    while stages.tasks.join_next().await.is_some() {}
                    over = true;
                    None
                }
                event = stages.events.recv() => match event {
                    Some(event) => {
                        take(&mut lag, event, &link, clock.now_ms());
                        continue;
                    }
                    None => {
                        over = true;
                        None
                    }
                },
                ended = stages.tasks.join_next() => {
                    let why = ended.and_then(Result::err).map_or_else(String::new, |e| e.to_string());
                    return Err(OriginError::Ended { why });
                }
                Some(asked) = asked.recv() => Some(asked),
                _ = ticks.tick() => None,
            };
            let extent = spool.extent().borrow().clone();
            stages.write(&status, &extent, &lag, &mut watching, clock.now_ms());
            if let Some(asked) = asked {
                // Whoever asked may be gone.
                let _ = asked.send(());
            }
        }
        if let Err(e) = spool.close().await {
            tracing::warn!(%link, error = %e, "the spool was not closed well; its tail is checked at the next start");
        }
        Ok(())
    }
}

impl OriginLink {
    /// Starts watching, reading the head, standing for election and shipping; each runs until `stop`.
    fn start(
        self,
        spool: &Arc<Spool>,
        clock: Clock,
        status: watch_channel::Receiver<LinkStatus>,
        commands: mpsc::Receiver<LinkCommand>,
        stop: &CancellationToken,
    ) -> Stages {
        let (link, limits) = (self.send.link.clone(), self.etcd.limits());
        let covered = spool.extent().borrow().covered;
        let (events, incoming) = mpsc::channel(EVENTS_MAX);
        let (head_sender, head) = watch_channel::channel(HeadView::default());
        let unseen = TailView { state: TailState::Idle, cluster: None, covered, proven_from: None, ferry_only: 0 };
        let (tail_sender, tail) = watch_channel::channel(unseen);
        let (tail_commands, tail_incoming) = mpsc::channel(1);
        let (reopen, reopening) = watch_channel::channel(());
        let (hello_again, saying_hello) = watch_channel::channel(());
        let (ship_sender, ship) = watch_channel::channel(ShipView::default());
        let mut tasks = JoinSet::new();
        let watching = Tail {
            link: link.clone(),
            etcd: self.etcd.clone(),
            ranges: self.send.ranges.clone(),
            limits: self.limits.clone(),
            spool: spool.clone(),
            commands: tail_incoming,
            head: head.clone(),
            reopen: reopening,
            view: tail_sender,
            events: events.clone(),
            clock,
            seen: None,
            carried: None,
        };
        tasks.spawn(watching.run(stop.clone()));
        tasks.spawn(head::poll(self.etcd.clone(), link.clone(), head_sender, events.clone(), clock, stop.clone()));
        let (elect_sender, elect) = watch_channel::channel(ElectView::default());
        let (heard, last_heard) = watch_channel::channel(Heard::nothing(Term(0)));
        let node = self.node.clone();
        let election = Election::new(link, node.clone(), self.etcd.clone(), elect_sender, last_heard);
        tasks.spawn(election.run(stop.clone()));
        let shipper = Shipper::new(
            self,
            spool.clone(),
            tail_commands,
            tail.clone(),
            head.clone(),
            commands,
            ship_sender,
            events,
            status,
            elect.clone(),
            heard,
            saying_hello,
        );
        tasks.spawn(shipper.run(stop.clone()));
        let help = Helps { reopen, hello_again };
        Stages { node, tasks, events: incoming, tail, head, elect, ship, limits, help }
    }
}

/// The stages under way, and what the link's task sees of them.
struct Stages {
    node: String,
    tasks: JoinSet<()>,
    events: mpsc::Receiver<LinkEvent>,
    tail: watch_channel::Receiver<TailView>,
    head: watch_channel::Receiver<HeadView>,
    elect: watch_channel::Receiver<ElectView>,
    ship: watch_channel::Receiver<ShipView>,
    /// What the origin's etcd takes.
    limits: watch_channel::Receiver<ClusterLimits>,
    help: Helps,
}

impl Stages {
    /// Looks at all of them, and writes what they show.
    fn write(
        &self,
        status: &watch_channel::Sender<LinkStatus>,
        spool: &SpoolExtent,
        lag: &LagTracker,
        watching: &mut Watching,
        now_ms: u64,
    ) {
        let (tail, head, ship, elect) =
            (&*self.tail.borrow(), &*self.head.borrow(), &*self.ship.borrow(), &*self.elect.borrow());
        let (node, limits, spool_bytes_max) = (&self.node, *self.limits.borrow(), watching.spool_bytes_max);
        let mut views = Views { node, tail, head, ship, elect, spool, spool_bytes_max, limits, stalled: None };
        views.watch(&mut watching.dog, &mut watching.stalls, &self.help, &watching.link, now_ms);
        let stalls = watching.stalls;
        status.send_if_modified(|status| status.differs_after(|status| views.write(status, lag, stalls, now_ms)));
    }
}

/// What the link's task keeps to tell how its stages do.
struct Watching {
    link: LinkName,
    dog: Watchdog,
    stalls: u64,
    /// What the spool may hold.
    spool_bytes_max: u64,
}

/// What may help a stage that stands still.
struct Helps {
    reopen: watch_channel::Sender<()>,
    hello_again: watch_channel::Sender<()>,
}

fn take(lag: &mut LagTracker, event: LinkEvent, link: &LinkName, now_ms: u64) {
    match event {
        LinkEvent::Arrived { revisions, at_ms } => {
            for revision in revisions {
                lag.arrived(revision, at_ms);
            }
        }
        LinkEvent::Covered(revision) => lag.covered(revision),
        LinkEvent::Head { revision, at_ms } => lag.head(revision, at_ms),
        LinkEvent::Greeted { applied, durable } => lag.greeted(applied, durable, now_ms),
        LinkEvent::Acked { applied, durable } => {
            lag.ages_through(applied, now_ms).for_each(|seconds| metrics::observe_lag(link, seconds));
            lag.applied(applied);
            lag.durable(durable);
        }
        LinkEvent::Anchored(revision) => lag.anchored(revision),
        LinkEvent::Published(revision) => lag.applied(revision),
    }
}
