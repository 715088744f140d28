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
pub mod tail;
mod tally;
mod term;
mod verify;
mod view;
pub mod watch;

use crate::admin::LinkCommand;
use crate::config::{Limits, SendConfig};
use crate::etcd::gate::{ClusterLimits, Gate};
use crate::etcd::limits;
use crate::metrics;
use crate::model::limits::LimitsStatus;
use crate::model::stall::{Stalled, Verdict, Watchdog};
use crate::model::{
    CanaryStatus, Epoch, LinkName, LinkState, LinkStatus, Revision, Role, Seq, Side, StageStatus, Term,
};
use crate::tls::reload::InUse;
use crate::wire::digest;
use elect::{ElectView, Election, Heard, Standing};
use head::HeadView;
use lag::LagTracker;
use ship::Shipper;
use spool::{Spool, SpoolExtent};
use stall::Help;
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
const STATUS_INTERVAL: Duration = Duration::from_millis(250);

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
    /// What the sidecar that ships the link has published.
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

impl OriginLink {
    /// Runs until `stop`; an `Err` means that the link could not even start (its spool cannot be opened).
    pub async fn run(
        self,
        status: watch_channel::Sender<LinkStatus>,
        commands: mpsc::Receiver<LinkCommand>,
        stop: CancellationToken,
    ) -> Result<(), OriginError> {
        let link = self.send.link.clone();
        let clock = Clock::new();
        let (spool, opened) =
            Spool::open(&self.dir.join("spool"), &self.limits, digest::of_ranges(&self.send.ranges)).await?;
        opened.log(&link, "spool");
        let spool = Arc::new(spool);
        let mut lag = LagTracker::new();
        for arrived in spool.arrivals() {
            lag.arrived_several(arrived.revision_last, arrived.at_ms, arrived.count);
        }
        lag.covered(spool.extent().borrow().covered);
        let spool_bytes_max = self.limits.spool_bytes_max;
        let mut dog = Watchdog::new(self.limits.stall_seconds.saturating_mul(1_000));
        let mut stages = self.start(&spool, clock, status.subscribe(), commands, &stop);
        let mut stalls = 0;
        let mut ticks = tokio::time::interval(STATUS_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                event = stages.events.recv() => match event {
                    Some(event) => take(&mut lag, event, &link, clock.now_ms()),
                    None => break,
                },
                ended = stages.tasks.join_next() => {
                    let why = ended.and_then(Result::err).map_or_else(String::new, |e| e.to_string());
                    return Err(OriginError::Ended { why });
                }
                _ = ticks.tick() => {
                    let extent = spool.extent().borrow().clone();
                    let (tail, head, ship) = (stages.tail.borrow(), stages.head.borrow(), stages.ship.borrow());
                    let elect = stages.elect.borrow();
                    let node = &stages.node;
                    let (elect, spool, stalled) = (&elect, &extent, None);
                    let (tail, head, ship, limits) = (&tail, &head, &ship, *stages.limits.borrow());
                    let mut views =
                        Views { node, tail, head, ship, elect, spool, spool_bytes_max, limits, stalled };
                    views.watch(&mut dog, &mut stalls, &stages.help, &link, clock.now_ms());
                    status.send_if_modified(|status| status.differs_after(|status| views.write(status, &lag, stalls, clock.now_ms())));
                }
            }
        }
        while stages.tasks.join_next().await.is_some() {}
        if let Err(e) = spool.close().await {
            tracing::warn!(%link, error = %e, "the spool was not closed well; its tail is checked at the next start");
        }
        Ok(())
    }

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
        let unseen = TailView { state: TailState::Idle, covered, proven_from: None, ferry_only: 0 };
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

/// One look at all stages, to be written into the status.
struct Views<'a> {
    node: &'a str,
    tail: &'a TailView,
    head: &'a HeadView,
    elect: &'a ElectView,
    ship: &'a ShipView,
    spool: &'a SpoolExtent,
    limits: ClusterLimits,
    /// What the spool may hold.
    spool_bytes_max: u64,
    /// Where the link stands still.
    stalled: Option<Stalled>,
}

impl Views<'_> {
    /// Looks whether the link stands still; says so once, and has done what may help. `stalls` counts.
    fn watch(&mut self, dog: &mut Watchdog, stalls: &mut u64, helps: &Helps, link: &LinkName, now_ms: u64) {
        let Verdict { stalled, begins, ends, react } = dog.turn(self.state(), &stall::seen(self), now_ms);
        self.stalled = stalled;
        if ends {
            tracing::info!(%link, "the link makes progress again");
        }
        let Some(stalled) = stalled else { return };
        if begins {
            *stalls += 1;
            tracing::warn!(%link, reason = %stall::reason(self, stalled), "the link stands still");
        }
        if react {
            match stall::help(self, stalled) {
                Help::ReopenWatch => helps.reopen.send_replace(()),
                Help::HelloAgain => helps.hello_again.send_replace(()),
                Help::Nothing => {}
            }
        }
    }

    fn write(&self, status: &mut LinkStatus, lag: &LagTracker, stalls: u64, now_ms: u64) {
        let ship = self.ship;
        debug_assert!(status.side == Side::Origin);
        status.state = self.state();
        status.reason = self.reason();
        status.stalled_seconds = self.stalled.map_or(0.0, |stalled| stalled.for_ms as f64 / 1_000.0);
        status.epoch = ship.epoch;
        status.term = self.elect.standing.term().unwrap_or(ship.term);
        (status.role, status.shipper) = match &self.elect.standing {
            Standing::Unknown { .. } => (None, String::new()),
            Standing::Standby { shipper, .. } => (Some(Role::Standby), shipper.clone()),
            Standing::Shipper { .. } => (Some(Role::Shipper), self.node.to_owned()),
        };
        status.seq = ship.seq;
        status.origin_revision = ship.applied_revision;
        status.head_revision = self.head.revision.max(self.tail.covered);
        status.applied_seq = ship.applied_seq;
        status.durable_seq = ship.durable_seq;
        let (behind, at_risk) = (lag.lag(now_ms), lag.rpo(now_ms));
        let copying = ship.copy_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        status.lag_revisions = behind.revisions;
        status.lag_seconds = behind.seconds.max(copying);
        status.rpo_revisions = at_risk.revisions;
        status.rpo_seconds = at_risk.seconds.max(copying);
        if status.role == Some(Role::Standby) {
            self.write_of_standby(status);
        }
        status.bytes_raw = ship.bytes_raw;
        status.bytes_sent = ship.bytes_sent;
        status.counts.clone_from(&ship.counts);
        status.counts.insert("elections", self.elect.won);
        status.counts.insert("stalls", stalls);
        status.copy = ship.copy;
        status.canary = self.canary();
        let told = LimitsStatus::of(self.limits.most, &ship.replica_limits);
        limits::tell(&status.link, status.side, status.limits.as_ref(), told.as_ref());
        status.limits = told;
        status.verification.clone_from(&ship.verification);
        status.quarantined_revisions = ship.quarantined;
        status.stages = vec![
            StageStatus::new("watch", matches!(self.tail.state, TailState::Running), self.tail_detail())
                .at(self.tail.covered.0)
                .with_waiting(self.head.revision.0.saturating_sub(self.tail.covered.0)),
            StageStatus::new(
                "spool",
                !self.spool.full && !self.spool.damaged,
                format!("holds revisions after {} up to {}", self.spool.base, self.spool.covered),
            )
            .at(self.spool.covered.0)
            .with_queue(self.spool.bytes, self.spool_bytes_max),
            StageStatus::new("ship", ship.reason.is_empty(), ship.detail.clone())
                .at(status.seq.0)
                .with_waiting(status.lag_revisions),
        ];
    }

    /// Of a canary that is off, or that no stream has written yet, there is nothing to be told.
    fn canary(&self) -> Option<CanaryStatus> {
        let (took, since) = self.ship.canary;
        let waiting = since.map_or(Duration::ZERO, |since| since.elapsed());
        (took.is_some() || since.is_some()).then(|| CanaryStatus {
            seconds: took.unwrap_or_default().as_secs_f64(),
            waiting_seconds: waiting.as_secs_f64(),
        })
    }

    /// Lag is measured where the link is shipped: what a standby knows of the replica may be ten seconds old.
    fn write_of_standby(&self, status: &mut LinkStatus) {
        let published = self.elect.published;
        status.epoch = published.map_or(Epoch(0), |published| published.epoch);
        status.origin_revision = published.map_or(Revision(0), |published| published.revision);
        (status.seq, status.applied_seq, status.durable_seq) = (Seq(0), Seq(0), Seq(0));
        (status.lag_revisions, status.lag_seconds) = (0, 0.0);
        (status.rpo_revisions, status.rpo_seconds) = (0, 0.0);
    }

    fn state(&self) -> LinkState {
        if self.stalled.is_some() {
            return LinkState::Stalled;
        }
        match self.tail.state {
            TailState::Running if matches!(self.elect.standing, Standing::Standby { .. }) => LinkState::Following,
            TailState::SpoolFull if self.ship.state != LinkState::Stopped => LinkState::SpoolFull,
            TailState::Stopped { .. } => LinkState::Stopped,
            TailState::Idle
            | TailState::Connecting { .. }
            | TailState::Running
            | TailState::SpoolFull
            | TailState::Lost { .. }
            | TailState::OtherHistory { .. } => self.ship.state,
        }
    }

    fn reason(&self) -> String {
        let mut reasons: Vec<String> = self.stalled.iter().map(|stalled| stall::reason(self, *stalled)).collect();
        match &self.elect.standing {
            Standing::Unknown { reason } | Standing::Standby { reason, .. } if !reason.is_empty() => {
                reasons.push(reason.clone());
            }
            Standing::Unknown { .. } | Standing::Standby { .. } | Standing::Shipper { .. } => {}
        }
        if !self.ship.reason.is_empty() {
            reasons.push(self.ship.reason.clone());
        }
        match &self.tail.state {
            TailState::SpoolFull if self.spool.disk_full => {}
            TailState::SpoolFull => reasons.push(
                "the spool is full: watching goes on when the replica has applied more; raise [limits] spool_bytes_max if outages last longer"
                    .to_owned(),
            ),
            TailState::Stopped { reason } => reasons.push(reason.clone()),
            TailState::Connecting { reason } if is_new(&reasons, reason) => reasons.push(format!("the origin's watch: {reason}")),
            TailState::OtherHistory { reason } if *reason != self.ship.reason => reasons.push(reason.clone()),
            TailState::Lost { .. } if self.ship.state == LinkState::Stopped => {}
            TailState::Lost { compacted } => reasons.push(format!(
                "etcd has compacted up to {compacted}, past the spool's end: once the replica answers, both sides are compared and what differs is shipped"
            )),
            TailState::Idle
            | TailState::Connecting { .. }
            | TailState::Running
            | TailState::OtherHistory { .. } => {}
        }
        if let Some(unwritten) = &self.ship.unwritten {
            reasons.push(unwritten.clone());
        }
        if self.spool.disk_full {
            reasons.push("the spool's disk takes no more: make room below data_dir".to_owned());
        }
        if self.spool.damaged {
            reasons.push(
                "the spool cannot be read any more: once the replica answers it is dropped, and what it held is fetched again"
                    .to_owned(),
            );
        }
        if let Some(trouble) = self.head.trouble.as_ref().filter(|trouble| is_new(&reasons, trouble)) {
            reasons.push(format!("the origin's head cannot be read: {trouble}"));
        }
        reasons.join("; ")
    }

    fn tail_detail(&self) -> String {
        match &self.tail.state {
            TailState::Idle => "waits until the replica has said where to begin".to_owned(),
            TailState::Connecting { reason } => format!("connecting: {reason}"),
            TailState::Running => format!("everything up to revision {} is seen", self.tail.covered),
            TailState::SpoolFull => "waits for room in the spool".to_owned(),
            TailState::Lost { compacted } => format!("etcd has compacted up to {compacted}, past the spool's end"),
            TailState::OtherHistory { reason } | TailState::Stopped { reason } => reason.clone(),
        }
    }
}

/// An etcd that does not answer fails every stage with the same words; they are said once.
fn is_new(reasons: &[String], reason: &str) -> bool {
    !reason.is_empty() && !reasons.iter().any(|said| said.contains(reason))
}
