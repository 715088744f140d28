//! Job: the replica's half of a link: receive, journal and apply, and what `status` says of them.
//! Input: a `[[receive]]` link, the replica's etcd, the peer's stream. Output: an applier that runs, a link's end for the services.
//! Always true: the link's task alone writes the link's status; what the journal holds is applied whether or not the origin is there.

pub mod admit;
pub mod age;
pub mod align;
pub mod apply;
pub mod breaker;
pub mod commit;
pub mod compact;
pub mod copy;
pub mod dedupe;
pub mod foreign;
mod hold;
pub mod journal;
mod learned;
pub mod lookout;
pub mod mark;
pub mod next;
pub mod pages;
mod pause;
pub mod plan;
pub mod poison;
pub mod position;
mod quarantine;
mod ranges;
pub mod receive;
mod shipments;
mod stall;
pub mod stream;
pub mod told;
pub mod trouble;
pub mod txn;
mod verify;
pub mod view;

use crate::admin::ReplicaCommand;
use crate::admin::refresh::Asked;
use crate::config::{CompactConfig, Limits, ReceiveConfig};
use crate::etcd::gate::{ClusterLimits, Gate};
use crate::etcd::limits;
use crate::model::limits::LimitsStatus;
use crate::model::stall::{Stalled, Verdict, Watchdog};
use crate::model::{
    CopyProgress, Digest, Epoch, LinkState, LinkStatus, Phase, QuarantinedStatus, Ranges, Revision, Seq, Side,
    StageStatus, Term,
};
use crate::tls::accept::TurnedAway;
use admit::Admit;
use apply::{Applier, ApplierParts};
use compact::{Compactor, Reads};
use dedupe::Dedupe;
use foreign::OwnRevisions;
use journal::{Journal, JournalExtent};
use lookout::{AccountFile, Lookout, LookoutView};
use poison::Trial;
use ranges::RangesFile;
use receive::LinkEnd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use told::Told;
use view::ApplyView;

/// Copy steps and progress between the stream and the applier; each page is bounded by its sender's page bytes.
const COMMANDS_MAX: usize = 2;
/// Journal entries are read in portions of this size when the dedupe log is made anew.
const NOTE_BYTES: usize = 1 << 20;
/// An origin that is turned away comes again within half a minute: so long a reason for that is shown.
const TURNED_AWAY_SHOWN: Duration = Duration::from_secs(60);
/// Whoever reads the status asks for it anew; this is for what watches it.
const STATUS_INTERVAL: Duration = Duration::from_millis(500);

/// Why a replica link cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    #[error("the journal: {0}")]
    Journal(#[from] journal::JournalError),
    #[error("the dedupe log: {0}")]
    Dedupe(#[from] dedupe::DedupeError),
    #[error(transparent)]
    Ranges(#[from] ranges::RangesError),
    #[error("applying has ended: {why}")]
    Ended { why: String },
}

/// Everything that one replica link needs.
pub struct ReplicaLink {
    pub receive: ReceiveConfig,
    pub etcd: Arc<Gate>,
    pub limits: Limits,
    /// The link's own folder below `data_dir`.
    pub dir: PathBuf,
    /// Ranges of this process's own `[[send]]` links to the same peer.
    pub sends_back: Vec<Ranges>,
    /// What an operator asks of it.
    pub commands: mpsc::Receiver<ReplicaCommand>,
    /// Who was turned away at the peer port.
    pub turned_away: watch::Receiver<Option<TurnedAway>>,
    /// Ends its streams; the same that ends its task.
    pub stop: CancellationToken,
}

/// A replica link whose disks are open; [`ReplicaTask::run`] runs it.
pub struct ReplicaTask {
    end: Arc<LinkEnd>,
    applier: Applier,
    view: watch::Receiver<ApplyView>,
    told: watch::Receiver<Told>,
    turned_away: watch::Receiver<Option<TurnedAway>>,
    lookout: Lookout,
    seen: watch::Receiver<LookoutView>,
}

impl ReplicaLink {
    /// Opens journal and dedupe log. An `Err` means that the disk cannot be used.
    pub async fn open(self) -> Result<(Arc<LinkEnd>, ReplicaTask), ReplicaError> {
        let link = self.receive.link.clone();
        let (journal, opened) = Journal::open(&self.dir.join("journal"), &self.limits).await?;
        opened.log(&link, "journal");
        let journal = Arc::new(journal);
        let (dedupe, remembered) = Dedupe::open(&self.dir.join("dedupe")).await?;
        let dedupe = Arc::new(dedupe);
        if remembered.moved_aside {
            tracing::warn!(%link, "the dedupe log could not be read and was moved aside; it is made anew from the journal and the position");
        }
        note_again(&journal, &dedupe, &remembered.recent).await?;
        let ranges = RangesFile::open(self.dir.join("ranges.json"))?;
        let carried = RangesFile::open_or_forget(self.dir.join("carried.json"));
        let turned_away = self.turned_away;
        let (commands, incoming) = mpsc::channel(COMMANDS_MAX);
        let (view_sender, view) = watch::channel(ApplyView::default());
        let (latest_session, _) = watch::channel(0);
        let (hellos, hello_waiting) = watch::channel(0);
        let (told_sender, told) = watch::channel(Told::default());
        let (closed_sender, closed) = watch::channel(Revision(0));
        let own = Arc::new(Mutex::new(OwnRevisions::default()));
        let applier = Applier::new(ApplierParts {
            link,
            etcd: self.etcd.clone(),
            limits: self.limits.clone(),
            ranges: carried.get().or_else(|| ranges.get()),
            journal: journal.clone(),
            dedupe: dedupe.clone(),
            own: own.clone(),
            on_poison: self.receive.on_poison,
            delete_shares: self.receive.delete_shares,
            trial: failed_before(&journal, remembered.failed),
            operator: self.commands,
            told: told.clone(),
            closed,
            hello_waiting,
            commands: incoming,
            view: view_sender,
        });
        let admit = Admit::remembering(&remembered.recent);
        let end = Arc::new(LinkEnd {
            config: self.receive,
            etcd: self.etcd,
            limits: self.limits,
            commands,
            view: view.clone(),
            journal,
            dedupe,
            latest_session,
            hello_again: watch::channel(()).0,
            hellos,
            told: told_sender,
            closed: closed_sender,
            counters: receive::Counters::default(),
            repair_wanted: AtomicBool::new(false),
            sends_back: self.sends_back,
            ranges,
            carried,
            opened: std::sync::Mutex::default(),
            admit: Arc::new(tokio::sync::Mutex::new(admit)),
            stop: self.stop,
        });
        let (lookout_view, seen) = watch::channel(LookoutView::default());
        let lookout = Lookout::new(end.clone(), own, AccountFile::new(self.dir.join("foreign.json")), lookout_view);
        Ok((end.clone(), ReplicaTask { end, applier, view, told, turned_away, lookout, seen }))
    }
}

impl ReplicaTask {
    /// Which of the replica's revisions this link still reads at, from now on.
    pub fn reads(&self) -> Reads {
        Reads { end: self.end.clone(), told: self.told.clone(), seen: self.seen.clone() }
    }

    /// Runs until `stop`, then flushes journal and dedupe log.
    pub async fn run(
        self,
        status: watch::Sender<LinkStatus>,
        mut asked: mpsc::Receiver<Asked>,
        stop: CancellationToken,
    ) -> Result<(), ReplicaError> {
        let Self { end, applier, view, told, turned_away, lookout, seen } = self;
        let (started, limits) = (Instant::now(), end.etcd.limits());
        let mut applying = tokio::task::JoinSet::new();
        applying.spawn(applier.run(stop.clone()));
        let mut looking = tokio::task::JoinSet::new();
        looking.spawn(lookout.run(stop.clone()));
        let mut dog = Watchdog::new(end.limits.stall_seconds.saturating_mul(1_000));
        let mut stalls = 0;
        let mut ticks = tokio::time::interval(STATUS_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut over = false;
        while !over {
            let asked = tokio::select! {
                biased;
                () = stop.cancelled() => {
                    while applying.join_next().await.is_some() {}
                    while looking.join_next().await.is_some() {}
                    over = true;
                    None
                }
                ended = applying.join_next() => {
                    let why = ended.map_or_else(String::new, |e| e.err().map_or_else(String::new, |e| e.to_string()));
                    return Err(ReplicaError::Ended { why });
                }
                Some(asked) = asked.recv() => Some(asked),
                _ = ticks.tick() => None,
            };
            {
                let extent = end.journal.extent().borrow().clone();
                let durable = *end.journal.durable().borrow();
                let turned_away = turned_away.borrow();
                let mut views = Views {
                    end: &end,
                    view: &view.borrow(),
                    told: &told.borrow(),
                    turned_away: turned_away.as_ref().filter(|last| last.at.elapsed() < TURNED_AWAY_SHOWN),
                    seen: &seen.borrow(),
                    extent: &extent,
                    durable,
                    limits: *limits.borrow(),
                    stalled: None,
                };
                views.watch(&mut dog, &mut stalls, started.elapsed());
                status.send_if_modified(|status| status.differs_after(|status| views.write(status, stalls)));
            }
            if let Some(asked) = asked {
                // Whoever asked may be gone.
                let _ = asked.send(());
            }
        }
        if let Err(e) = end.journal.close().await {
            tracing::warn!(link = %end.config.link, error = %e, "the journal was not closed well; its tail is checked at the next start");
        }
        if let Err(e) = end.dedupe.close().await {
            tracing::warn!(link = %end.config.link, error = %e, "the dedupe log was not closed well");
        }
        Ok(())
    }
}

/// Compacts the etcd that these links are applied to, which may come and go.
pub fn compactor(etcd: Arc<Gate>, config: CompactConfig, reads: watch::Receiver<Vec<Arc<Reads>>>) -> Compactor {
    Compactor { etcd, config, reads }
}

/// The revision that an earlier process was refused, if the journal still holds it as its first.
fn failed_before(journal: &Journal, failed: Option<(Epoch, Seq, u32)>) -> Trial {
    let extent = journal.extent().borrow().clone();
    let failed = failed.filter(|(epoch, seq, _)| *epoch == extent.epoch && *seq > extent.base);
    failed.map_or_else(Trial::default, |(_, seq, refusals)| Trial::remembered(seq, refusals))
}

/// Notes what the journal holds beyond the dedupe log's last entry: the log is synced later than the journal, and may be new.
async fn note_again(journal: &Journal, dedupe: &Dedupe, recent: &[(Epoch, Seq, Digest)]) -> Result<(), ReplicaError> {
    let extent = journal.extent().borrow().clone();
    let known = recent.last().filter(|(epoch, _, _)| *epoch == extent.epoch).map_or(Seq(0), |(_, seq, _)| *seq);
    let mut after = extent.base.max(known);
    while after < extent.end {
        let entries = journal.read_after(after, NOTE_BYTES).await?;
        let Some(last) = entries.last() else { break };
        after = last.seq;
        let notes = entries.iter().map(|e| (e.seq, e.digest, e.revision.revision)).collect();
        dedupe.note_again(extent.epoch, notes).await?;
    }
    Ok(())
}

/// One look at all stages, to be written into the status.
struct Views<'a> {
    end: &'a LinkEnd,
    view: &'a ApplyView,
    told: &'a Told,
    /// Within [`TURNED_AWAY_SHOWN`].
    turned_away: Option<&'a TurnedAway>,
    seen: &'a LookoutView,
    extent: &'a JournalExtent,
    durable: Seq,
    /// Of its etcd.
    limits: ClusterLimits,
    /// Where the link stands still.
    stalled: Option<Stalled>,
}

impl Views<'_> {
    /// Looks whether the link stands still; says so once, and ends the stream where another hello may help. `stalls` counts.
    fn watch(&mut self, dog: &mut Watchdog, stalls: &mut u64, uptime: Duration) {
        let now_ms = u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX);
        let link = &self.end.config.link;
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
        if react && stall::ends_stream(self, stalled) {
            self.end.hello_again.send_replace(());
        }
    }

    fn write(&self, status: &mut LinkStatus, stalls: u64) {
        debug_assert!(status.side == Side::Replica);
        let position = self.view.position.as_ref();
        let same_epoch = position.is_some_and(|p| p.epoch == self.extent.epoch);
        let applied = position.map_or(Seq(0), |p| p.seq);
        status.state = self.state();
        status.reason = self.reason();
        status.stalled_seconds = self.stalled.map_or(0.0, |stalled| stalled.for_ms as f64 / 1_000.0);
        status.shipper.clone_from(&self.told.shipper);
        status.epoch = position.map_or(Epoch(0), |p| p.epoch);
        status.term = position.map_or(Term(0), |p| p.term);
        status.seq = if same_epoch { self.extent.end.max(applied) } else { applied };
        status.origin_revision = self.view.applied_revision;
        status.head_revision = self.told.head.max(self.view.applied_revision);
        status.applied_seq = applied;
        status.durable_seq = if same_epoch { self.durable.max(applied).min(status.seq) } else { applied };
        status.lag_revisions = self.told.lag_revisions;
        status.rpo_revisions = self.told.rpo_revisions;
        let older = self.told.older();
        status.lag_seconds = (self.told.lag + older).as_secs_f64();
        status.rpo_seconds = (self.told.rpo + older).as_secs_f64();
        let counters = &self.end.counters;
        status.bytes_raw = counters.bytes_raw.load(Ordering::Relaxed);
        status.bytes_sent = counters.bytes_sent.load(Ordering::Relaxed);
        let counts = [
            ("frames", counters.frames.load(Ordering::Relaxed)),
            ("repeated", counters.repeated.load(Ordering::Relaxed)),
            ("resets", counters.resets.load(Ordering::Relaxed)),
            ("damaged", counters.damaged.load(Ordering::Relaxed)),
            ("refused", counters.refused.load(Ordering::Relaxed)),
            ("transactions", self.view.transactions),
            ("conflicts", self.view.conflicts),
            ("in_parts", self.view.in_parts),
            ("foreign_keys", self.seen.keys_ever),
            ("stalls", stalls),
            ("quarantined", self.view.quarantined_ever),
            ("held_back", self.view.held_back_ever),
        ];
        status.counts = counts.into_iter().collect();
        let copying = position.is_some_and(|p| p.state == Phase::Copying && p.cursor.is_some());
        status.copy = copying.then_some(CopyProgress {
            keys_done: self.view.copy_keys_before + self.view.copy.keys_written + self.view.copy.keys_equal,
            keys_total: self.view.copy_keys_total,
        });
        let verified = &self.told.verified;
        status.verification.verified_revision = Revision(verified.origin_revision);
        status.verification.verified_at_ms = verified.at_ms;
        status.verification.differing_keys = verified.differing_keys.saturating_sub(verified.mended_keys);
        status.verification.expected_keys = verified.expected_keys;
        let told = LimitsStatus::of(self.told.limits, &self.end.limits(self.limits));
        limits::tell(&status.link, status.side, status.limits.as_ref(), told.as_ref());
        status.limits = told;
        status.quarantined = QuarantinedStatus::all(&self.view.quarantine);
        status.quarantined_revisions = status.quarantined.len() as u64;
        status.paused = position.and_then(|p| p.paused.clone());
        status.foreign_writes = (self.seen.checked > Revision(0)).then(|| self.seen.status());
        status.stages = self.stages(status, applied, same_epoch);
    }

    /// `of`: the seqs are written down in it already.
    fn stages(&self, of: &LinkStatus, applied: Seq, same_epoch: bool) -> Vec<StageStatus> {
        let (connected, applies) = (self.told.connected, self.view.waiting.is_empty());
        let LinkStatus { seq, durable_seq, .. } = of;
        vec![
            StageStatus::new("receive", connected, self.receive_detail()).at(seq.0),
            StageStatus::new(
                "journal",
                !self.extent.full && !self.extent.disk_full && !self.extent.damaged,
                format!("holds seqs after {} up to {}", self.extent.base, self.extent.end),
            )
            .at(durable_seq.0)
            .with_waiting(seq.0.saturating_sub(durable_seq.0))
            .with_queue(self.extent.bytes, self.end.limits.journal_bytes_max),
            StageStatus::new("apply", applies, self.apply_detail(applied, same_epoch))
                .at(self.view.transactions)
                .with_waiting(seq.0.saturating_sub(applied.0)),
            StageStatus::new("lookout", self.seen.waiting.is_empty(), self.seen.detail()).at(self.seen.checked.0),
        ]
    }

    fn state(&self) -> LinkState {
        if self.view.stopped {
            return LinkState::Stopped;
        }
        if self.view.position.as_ref().is_some_and(|position| position.paused.is_some()) {
            return LinkState::Paused;
        }
        if self.stalled.is_some() {
            return LinkState::Stalled;
        }
        if self.view.held {
            return LinkState::Held;
        }
        match &self.view.position {
            Some(position) if self.told.connected => match position.state {
                Phase::Copying => LinkState::Copying,
                Phase::Repairing => LinkState::Repairing,
                Phase::Following => LinkState::Following,
            },
            Some(_) | None => LinkState::Connecting,
        }
    }

    fn reason(&self) -> String {
        let mut reasons: Vec<String> = self.stalled.iter().map(|stalled| stall::reason(self, *stalled)).collect();
        if !self.told.connected {
            // What stopped the applier ended the stream too, and is said below.
            let said_below = is_within(&self.told.ended, &self.view.waiting);
            let ended = if said_below || self.told.ended.is_empty() {
                String::new()
            } else {
                format!(" ({})", self.told.ended)
            };
            reasons.push(format!("the origin's sidecar is not connected{ended}"));
            if let Some(TurnedAway { from, reason, .. }) = self.turned_away {
                reasons.push(format!("a caller from {from} was turned away: {reason}"));
            }
        }
        if !self.told.trouble.is_empty() && self.told.older().is_zero() {
            reasons.push(format!("the origin's sidecar does not see what its etcd commits: {}", self.told.trouble));
        }
        if !self.view.waiting.is_empty() && !reasons.iter().any(|said| is_within(&self.view.waiting, said)) {
            reasons.push(self.view.waiting.clone());
        }
        if self.extent.disk_full {
            reasons.push("the journal's disk takes no more: make room below data_dir".to_owned());
        }
        reasons.join("; ")
    }

    /// How many of the revisions that were received are where in their life.
    fn apply_detail(&self, applied: Seq, same_epoch: bool) -> String {
        let end = if same_epoch { self.extent.end.max(applied) } else { applied };
        let applying = self.view.applying.min(end.0 - applied.0);
        let pending = end.0 - applied.0 - applying;
        let mut detail = format!("applied up to seq {applied}; {pending} pending, {applying} applying");
        let quarantined = self.view.quarantine.entries.len();
        if quarantined > 0 {
            detail.push_str(&format!(", {quarantined} in quarantine"));
        }
        if !self.view.waiting.is_empty() {
            detail = [&detail, &self.view.waiting[..]].join("; ");
        }
        detail
    }

    fn receive_detail(&self) -> String {
        if self.told.connected {
            "the origin's stream is open".to_owned()
        } else {
            format!("no stream: {}", self.told.ended)
        }
    }
}

/// An etcd that does not answer fails every stage with the same words; they are said once.
fn is_within(words: &str, said: &str) -> bool {
    !words.is_empty() && said.contains(words)
}
