//! Job: tail the origin's watch stream into the spool, and keep an eye on the origin's head.
//! Input: etcd's watch messages and head. Output: spool entries, `covered`, a `TailView`, arrivals for the lag.
//! Always true: one watcher on one stream and connection of its own; only whole revisions reach the spool; compaction, lost leaders,
//! cancels and another history become values of `TailState`, never a bare exit.

use super::sequence::{Carried, Event, OriginWaymark, SequenceError, Sequenced, Sequencer, WatchMessage};
use super::spool::{Spool, SpoolEntry};
use super::{Clock, LinkEvent};
use crate::config::{EtcdConfig, Limits};
use crate::etcd::{Columns, Etcd, EtcdError, Look, Watch, WatchSignal, watch_right};
use crate::model::{ClusterId, Digest, KeyRange, LINKS_PREFIX, LinkName, Ranges, Revision};
use crate::retry::Backoff;
use crate::segment::feed::Appended;
use crate::wire::digest;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// etcd can send the first events of a stream unfragmented, so the first limit is generous, and a refusal doubles it.
const MESSAGE_BYTES_FIRST: usize = 64 << 20;
const MESSAGE_BYTES_CEILING: usize = 512 << 20;
pub const HEAD_INTERVAL: Duration = Duration::from_secs(2);
/// An open watch that shows nothing of a head for so long is opened anew.
const SILENCE_MAX: Duration = Duration::from_secs(20);
const PROBE_DEADLINE: Duration = Duration::from_secs(10);

/// What the tail is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TailState {
    /// Nothing says yet from where to watch.
    Idle,
    Connecting {
        reason: String,
    },
    Running,
    SpoolFull,
    /// etcd has compacted past the spool's end: only an anchor helps.
    Lost {
        compacted: Revision,
    },
    /// The origin is not the one that was read before, or broke its own promises.
    OtherHistory {
        reason: String,
    },
    /// Going on needs a human, a larger limit for one.
    Stopped {
        reason: String,
    },
}

/// What others see of the tail.
#[derive(Debug, Clone)]
pub struct TailView {
    pub state: TailState,
    /// Everything up to it that the link carries is in the spool.
    pub covered: Revision,
    /// Revisions up to `covered` that touched nothing but etcd-ferry's own keys, counted since the tail began.
    pub ferry_only: u64,
}

/// The origin's head, read linearizably each [`HEAD_INTERVAL`].
#[derive(Debug, Clone, Default)]
pub struct HeadView {
    pub revision: Revision,
    pub cluster: ClusterId,
    /// Why the head could not be read the last time.
    pub trouble: Option<String>,
}

/// What the shipper asks of the tail.
pub enum TailCommand {
    /// Forget the spool and watch everything after `after`; `opened` is told once etcd has created the watch.
    Restart { after: Revision, opened: oneshot::Sender<Result<(), TailState>> },
}

pub struct Tail {
    pub link: LinkName,
    pub etcd: EtcdConfig,
    pub ranges: Ranges,
    pub limits: Limits,
    pub spool: Arc<Spool>,
    pub commands: mpsc::Receiver<TailCommand>,
    pub head: watch::Receiver<HeadView>,
    pub view: watch::Sender<TailView>,
    pub events: mpsc::Sender<LinkEvent>,
    pub clock: Clock,
    /// The origin as it was at the last connect since the spool was begun.
    pub seen: Option<(ClusterId, OriginWaymark)>,
}

/// Why a watch session ended.
enum Ended {
    Command(Option<TailCommand>),
    Trouble(EtcdError),
    Silent,
    Closed,
    Canceled(String),
    Compacted { from: Revision, compacted: Revision },
    Full,
    Sequence(SequenceError),
    OtherHistory(String),
    Spool(String),
}

/// What the next turn of the loop does.
enum Next {
    Watch,
    WaitForCommand,
    WaitForRoom,
}

impl Tail {
    /// Runs until `stop`. With something in the spool it watches at once; otherwise it waits for a command.
    pub async fn run(mut self, stop: CancellationToken) {
        let body = self.turns();
        tokio::select! {
            () = stop.cancelled() => {}
            () = body => {}
        }
    }

    async fn turns(&mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(1));
        let mut message_bytes_max = MESSAGE_BYTES_FIRST;
        let mut opened: Option<oneshot::Sender<Result<(), TailState>>> = None;
        // Below the spool's last revision etcd may be compacted while what follows it is still there.
        let mut after_covered = false;
        let has_coverage = self.spool.extent().borrow().covered > Revision(0);
        let mut next = if has_coverage { Next::Watch } else { Next::WaitForCommand };
        loop {
            let skip_last = std::mem::take(&mut after_covered);
            let ended = match next {
                Next::Watch => self.watch_once(message_bytes_max, skip_last, &mut opened, &mut backoff).await,
                Next::WaitForCommand => Ended::Command(self.commands.recv().await),
                Next::WaitForRoom => tokio::select! {
                    biased;
                    command = self.commands.recv() => Ended::Command(command),
                    room = self.spool.room() => match room {
                        Ok(()) => { next = Next::Watch; continue; }
                        Err(e) => Ended::Spool(e.to_string()),
                    },
                },
            };
            next = Next::Watch;
            match ended {
                Ended::Command(None) => return,
                Ended::Command(Some(TailCommand::Restart { after, opened: tell })) => {
                    self.seen = None;
                    match self.spool.reset(after).await {
                        Ok(()) => {
                            self.view.send_modify(|view| view.covered = after);
                            opened = Some(tell);
                        }
                        Err(e) => {
                            let state = TailState::Stopped { reason: e.to_string() };
                            let _ = tell.send(Err(state.clone()));
                            self.publish(state);
                            next = Next::WaitForCommand;
                        }
                    }
                    continue;
                }
                Ended::Compacted { from, compacted } => {
                    let covered = self.spool.extent().borrow().covered;
                    if from <= covered && compacted <= covered.next() {
                        after_covered = true;
                        continue;
                    }
                    tracing::warn!(link = %self.link, %covered, %compacted, "etcd has compacted past the spool's end");
                    next = self.halt(TailState::Lost { compacted }, &mut opened);
                }
                Ended::Full => {
                    tracing::warn!(link = %self.link, "the spool is full: the watch waits for room");
                    self.publish(TailState::SpoolFull);
                    next = Next::WaitForRoom;
                }
                Ended::Trouble(EtcdError::AnswerTooLarge { limit_bytes }) if limit_bytes < MESSAGE_BYTES_CEILING => {
                    message_bytes_max = limit_bytes.saturating_mul(2).min(MESSAGE_BYTES_CEILING);
                }
                Ended::Trouble(e @ EtcdError::AnswerTooLarge { .. }) => {
                    let reason = format!("a watch message of the origin: {e}");
                    next = self.halt(TailState::Stopped { reason }, &mut opened);
                }
                Ended::Trouble(e) => self.pause(e.to_string(), &mut backoff).await,
                Ended::Silent => {
                    let reason = format!("the watch shows nothing of the head for {} s", SILENCE_MAX.as_secs());
                    self.pause(reason, &mut backoff).await;
                }
                Ended::Closed => self.pause("etcd closed the watch".to_owned(), &mut backoff).await,
                Ended::Canceled(reason) => {
                    let error = EtcdError::Denied { right: watch_right(&self.ranges.covering()), said: reason };
                    self.pause(error.to_string(), &mut backoff).await;
                }
                Ended::Sequence(e @ SequenceError::OtherHistory { .. }) => {
                    let reason = e.to_string().replace("LINK", self.link.as_str());
                    next = self.halt(TailState::OtherHistory { reason }, &mut opened);
                }
                Ended::OtherHistory(reason) => next = self.halt(TailState::OtherHistory { reason }, &mut opened),
                Ended::Sequence(e @ SequenceError::WentBack { .. }) => self.pause(e.to_string(), &mut backoff).await,
                Ended::Sequence(e @ SequenceError::TooLarge { .. }) => {
                    next = self.halt(TailState::Stopped { reason: e.to_string() }, &mut opened)
                }
                Ended::Spool(reason) => next = self.halt(TailState::Stopped { reason }, &mut opened),
            }
        }
    }

    fn publish(&self, state: TailState) {
        self.view.send_modify(|view| view.state = state);
    }

    /// Stops watching until a command comes; whoever waits for the watch to open is told.
    fn halt(&self, state: TailState, opened: &mut Option<oneshot::Sender<Result<(), TailState>>>) -> Next {
        if let Some(tell) = opened.take() {
            let _ = tell.send(Err(state.clone()));
        }
        self.publish(state);
        Next::WaitForCommand
    }

    /// A failure that repeats is logged once.
    async fn pause(&self, reason: String, backoff: &mut Backoff) {
        let state = TailState::Connecting { reason };
        if self.view.borrow().state != state
            && let TailState::Connecting { reason } = &state
        {
            tracing::warn!(link = %self.link, %reason, "the watch at the origin has ended; it is opened again until it stays");
        }
        self.publish(state);
        tokio::time::sleep(backoff.after_failure(rand::random())).await;
    }

    /// One watch stream, from the spool's end until something ends it.
    async fn watch_once(
        &mut self,
        message_bytes_max: usize,
        after_covered: bool,
        opened: &mut Option<oneshot::Sender<Result<(), TailState>>>,
        backoff: &mut Backoff,
    ) -> Ended {
        let extent = self.spool.extent().borrow().clone();
        let etcd = match Etcd::connect(&self.etcd).await {
            Ok(etcd) => etcd,
            Err(e) => return Ended::Trouble(e),
        };
        let look = match etcd.look(&self.link.waymark_key()).await {
            Ok(look) => look,
            Err(e) => return Ended::Trouble(e),
        };
        if look.head < extent.covered {
            let reason = format!(
                "the origin was restored or replaced: its head {} is below revision {} that was read before; if this origin is the \
                     right one, run `etcd-ferry resync {} --config F` at its sidecar",
                look.head, extent.covered, self.link
            );
            return Ended::OtherHistory(reason);
        }
        if let Err(reason) = self.same_origin(&look) {
            return Ended::OtherHistory(reason);
        }
        let expected = match extent.last {
            Some((last, _)) if !after_covered => match shows_whole(&etcd, last).await {
                Ok(true) => extent.last,
                Ok(false) => None,
                Err(e) => return Ended::Trouble(e),
            },
            Some(_) | None => None,
        };
        let (mut sequencer, from) = match expected {
            Some((revision, digest)) => {
                let carried = Carried { revision, digest, peer: None, digest_of: digest::of_revision };
                (self.sequencer(extent.covered).expect(carried), revision)
            }
            None => (self.sequencer(extent.covered), extent.covered.next()),
        };
        let mut watch = match etcd.watch(&self.ranges.covering(), from, message_bytes_max).await {
            Ok(watch) => watch,
            Err(e) => return Ended::Trouble(e),
        };
        let mut silent_since = tokio::time::Instant::now();
        let mut head_ticks = tokio::time::interval(HEAD_INTERVAL);
        head_ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                command = self.commands.recv() => return Ended::Command(command),
                signal = watch.next() => {
                    silent_since = tokio::time::Instant::now();
                    match signal {
                        Ok(Some(WatchSignal::Created)) => {
                            backoff.succeeded();
                            self.publish(TailState::Running);
                            if let Some(tell) = opened.take() {
                                let _ = tell.send(Ok(()));
                            }
                        }
                        Ok(Some(WatchSignal::Compacted(compacted))) => return Ended::Compacted { from, compacted },
                        Ok(Some(WatchSignal::Canceled(reason))) => return Ended::Canceled(reason),
                        Ok(Some(signal)) => {
                            if let Err(ended) = self.take(&mut sequencer, signal).await {
                                return self.confirmed(&etcd, ended).await;
                            }
                        }
                        Ok(None) => return Ended::Closed,
                        Err(e) => return Ended::Trouble(e),
                    }
                }
                _ = head_ticks.tick() => {
                    let behind = self.head.borrow().revision > sequencer.covered();
                    if !behind {
                        silent_since = tokio::time::Instant::now();
                    } else if silent_since.elapsed() > SILENCE_MAX {
                        return Ended::Silent;
                    } else if let Err(e) = watch.request_progress().await {
                        return Ended::Trouble(e);
                    }
                }
            }
        }
    }

    /// Another history only if etcd can still show the old one whole: it may have been compacted while the watch was opened,
    /// and then the watch lacks deletes.
    async fn confirmed(&self, etcd: &Etcd, ended: Ended) -> Ended {
        let Ended::Sequence(SequenceError::OtherHistory { carried, .. }) = &ended else { return ended };
        match shows_whole(etcd, *carried).await {
            Ok(true) => ended,
            Ok(false) => Ended::Closed,
            Err(e) => Ended::Trouble(e),
        }
    }

    /// Where the last revision is compacted, cluster and waymark alone tell a restored origin; they are compared at each connect.
    fn same_origin(&mut self, look: &Look) -> Result<(), String> {
        let waymark = look.kv.as_ref().and_then(|kv| OriginWaymark::from_json(&kv.value)).unwrap_or_default();
        let seen = self.seen.replace((look.cluster, waymark));
        let Some((cluster, before)) = seen else { return Ok(()) };
        let older = waymark.present.counter < before.present.counter;
        let other = waymark.present.counter == before.present.counter && waymark.present != before.present;
        if cluster == look.cluster && !older && !other {
            return Ok(());
        }
        self.seen = seen;
        Err(format!(
            "the origin was restored or replaced while this sidecar watched it (cluster {cluster}, waymark {}; now cluster {}, waymark {}); \
             if this origin is the right one, run `etcd-ferry resync {} --config F` at its sidecar",
            before.present.counter, look.cluster, waymark.present.counter, self.link
        ))
    }

    fn sequencer(&self, after: Revision) -> Sequencer {
        Sequencer::new(&self.link, self.ranges.clone(), after, self.limits.revision_bytes_max)
    }

    /// Puts what a message completes into the spool.
    async fn take(&mut self, sequencer: &mut Sequencer, signal: WatchSignal) -> Result<(), Ended> {
        match signal {
            WatchSignal::Events { events, fragment, header } => {
                let events = events.into_iter().map(|(revision, change)| Event { revision, change }).collect();
                let message = WatchMessage { events, fragment, header_revision: header };
                let whole = sequencer.push(message).map_err(Ended::Sequence)?;
                self.spool_all(whole).await?;
            }
            WatchSignal::Progress(revision) => sequencer.progress(revision).map_err(Ended::Sequence)?,
            WatchSignal::Created | WatchSignal::Compacted(_) | WatchSignal::Canceled(_) => {}
        }
        let covered = sequencer.covered();
        let mut moved = false;
        // Whoever waits on the view waits for another state; progress is read now and then.
        self.view.send_if_modified(|view| {
            moved = covered > view.covered;
            view.covered = view.covered.max(covered);
            false
        });
        if moved {
            self.spool.covered(covered);
            let _ = self.events.send(LinkEvent::Covered(covered)).await;
        }
        Ok(())
    }

    async fn spool_all(&mut self, whole: Vec<Sequenced>) -> Result<(), Ended> {
        let at_ms = self.clock.now_ms();
        let ferry_only = whole.iter().filter(|w| w.ferry_only).count() as u64;
        let entries: Vec<SpoolEntry> =
            whole.into_iter().filter(|w| !w.whole.changes.is_empty()).map(|w| entry_of(w, at_ms)).collect();
        if let Some(last) = entries.last().map(|e| e.revision.revision) {
            let revisions: Vec<Revision> = entries.iter().map(|e| e.revision.revision).collect();
            match self.spool.append(entries).await {
                Ok(Appended::Taken) => {}
                Ok(Appended::Full(_)) => return Err(Ended::Full),
                Err(e) => return Err(Ended::Spool(e.to_string())),
            }
            tracing::trace!(link = %self.link, %last, "spooled");
            let _ = self.events.send(LinkEvent::Arrived { revisions, at_ms }).await;
        }
        self.view.send_if_modified(|view| {
            view.ferry_only += ferry_only;
            false
        });
        Ok(())
    }
}

fn entry_of(sequenced: Sequenced, arrived_ms: u64) -> SpoolEntry {
    let digest = digest::of_revision(&sequenced.whole);
    SpoolEntry { revision: Arc::new(sequenced.whole), digest, arrived_ms, came_from: sequenced.came_from }
}

/// Reads the head each [`HEAD_INTERVAL`], on a connection of its own, so that a frozen watch does not hide it.
pub async fn poll_head(
    etcd: EtcdConfig,
    link: LinkName,
    view: watch::Sender<HeadView>,
    events: mpsc::Sender<LinkEvent>,
    clock: Clock,
    stop: CancellationToken,
) {
    let key = link.waymark_key();
    let mut connection: Option<Etcd> = None;
    let mut ticks = tokio::time::interval(HEAD_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let read = async {
            let etcd = match connection.take() {
                Some(etcd) => etcd,
                None => Etcd::connect(&etcd).await?,
            };
            let look = etcd.look(&key).await?;
            Ok::<_, EtcdError>((etcd, look))
        };
        let outcome = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            outcome = read => outcome,
        };
        match outcome {
            Ok((etcd, look)) => {
                connection = Some(etcd);
                view.send_replace(HeadView { revision: look.head, cluster: look.cluster, trouble: None });
                let at_ms = clock.now_ms();
                if events.send(LinkEvent::Head { revision: look.head, at_ms }).await.is_err() {
                    return;
                }
            }
            Err(e) => {
                view.send_modify(|view| view.trouble = Some(e.to_string()));
            }
        }
    }
}

/// What the origin holds at one revision of the link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probed {
    Digest(Digest),
    Compacted,
    /// etcd has passed the revision and shows no change of the link there.
    Nothing,
}

/// False if etcd has compacted at or past `revision`: then it no longer shows that revision's deletes, and nothing can be told of it.
async fn shows_whole(etcd: &Etcd, revision: Revision) -> Result<bool, EtcdError> {
    let one = KeyRange::prefix(LINKS_PREFIX);
    match etcd.page(&one, 1, Some(Revision(revision.0.saturating_sub(1))), Columns::CountOnly).await {
        Ok(_) => Ok(true),
        Err(EtcdError::Compacted) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Reads one revision of the link from etcd's history, by a short watch that starts at it.
pub async fn probe(
    etcd: &Etcd,
    ranges: &Ranges,
    link: &LinkName,
    at: Revision,
    limits: &Limits,
) -> Result<Probed, EtcdError> {
    if !shows_whole(etcd, at).await? {
        return Ok(Probed::Compacted);
    }
    let reading = async {
        let mut watch = etcd.watch(&ranges.covering(), at, MESSAGE_BYTES_CEILING).await?;
        let mut sequencer =
            Sequencer::new(link, ranges.clone(), Revision(at.0.saturating_sub(1)), limits.revision_bytes_max);
        let mut ask = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                biased;
                signal = watch.next() => match probe_step(&mut sequencer, at, signal?) {
                    Some(outcome) => return outcome,
                    None => continue,
                },
                _ = ask.tick() => watch.request_progress().await?,
            }
        }
    };
    let read = tokio::time::timeout(PROBE_DEADLINE, reading).await.map_err(|_| EtcdError::TimedOut)?;
    let read = read.map_err(|e| e.needing(|| watch_right(&ranges.covering())))?;
    // Compacted meanwhile, the watch may have lacked deletes.
    if shows_whole(etcd, at).await? { Ok(read) } else { Ok(Probed::Compacted) }
}

fn probe_step(
    sequencer: &mut Sequencer,
    at: Revision,
    signal: Option<WatchSignal>,
) -> Option<Result<Probed, EtcdError>> {
    let Some(signal) = signal else {
        return Some(Err(EtcdError::Other("etcd closed the watch".to_owned())));
    };
    match signal {
        WatchSignal::Created => None,
        WatchSignal::Compacted(_) => Some(Ok(Probed::Compacted)),
        WatchSignal::Canceled(said) => Some(Err(EtcdError::Denied { right: String::new(), said })),
        WatchSignal::Progress(revision) if revision >= at => Some(Ok(Probed::Nothing)),
        WatchSignal::Progress(_) => None,
        WatchSignal::Events { events, fragment, header } => {
            let events = events.into_iter().map(|(revision, change)| Event { revision, change }).collect();
            match sequencer.push(WatchMessage { events, fragment, header_revision: header }) {
                Err(e) => Some(Err(EtcdError::Other(e.to_string()))),
                Ok(whole) => {
                    let first = whole.iter().find(|w| !w.whole.changes.is_empty())?;
                    if first.whole.revision == at {
                        return Some(Ok(Probed::Digest(digest::of_revision(&first.whole))));
                    }
                    Some(Ok(Probed::Nothing))
                }
            }
        }
    }
}

/// Watches nothing and closes at once: tells at start whether the rights suffice. `Ok` once etcd has created the watch.
pub async fn may_watch(etcd: &Etcd, ranges: &Ranges) -> Result<(), EtcdError> {
    let mut watch: Watch = etcd.watch(&ranges.covering(), Revision(0), MESSAGE_BYTES_FIRST).await?;
    match tokio::time::timeout(PROBE_DEADLINE, watch.next()).await {
        Ok(Ok(Some(WatchSignal::Canceled(reason)))) => {
            Err(EtcdError::Denied { right: watch_right(&ranges.covering()), said: reason })
        }
        Ok(Ok(_)) => Ok(()),
        Ok(Err(e)) => Err(e),
        Err(_) => Err(EtcdError::TimedOut),
    }
}
