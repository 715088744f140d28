//! Job: tail the origin's watch stream into the spool.
//! Input: etcd's watch messages. Output: spool entries, `covered`, a `TailView`, arrivals for the lag.
//! Always true: one watcher on one stream and connection of its own; only whole revisions reach the spool; compaction, lost leaders,
//! cancels and another history become values of `TailState`, never a bare exit.

use super::head::HeadView;
use super::probe::shows_whole;
use super::reopen::{self, Spooled};
use super::sequence::{Event, SequenceError, Sequenced, Sequencer, WatchMessage};
use super::spool::{Spool, SpoolEntry, SpoolError};
use super::tail::{Begins, Opened, Seen, TailCommand, TailState, TailView, next_command, seen_by};
use super::{Clock, LinkEvent};
use crate::config::Limits;
use crate::etcd::gate::Gate;
use crate::etcd::{Etcd, EtcdError, Look, Watch, WatchSignal, watch_right};
use crate::failpoint;
use crate::model::{Digest, LinkName, Ranges, Revision};
use crate::retry::Backoff;
use crate::segment::feed::Appended;
use crate::wire::digest;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// etcd can send the first events of a stream unfragmented, so the first limit is generous, and a refusal doubles it.
const MESSAGE_BYTES_FIRST: usize = 64 << 20;
pub(super) const MESSAGE_BYTES_CEILING: usize = 512 << 20;
/// An open watch that shows nothing of a head for so long is opened anew.
const SILENCE_MAX: Duration = Duration::from_secs(20);

pub struct Tail {
    pub link: LinkName,
    pub etcd: Arc<Gate>,
    pub ranges: Ranges,
    pub limits: Limits,
    pub spool: Arc<Spool>,
    pub commands: mpsc::Receiver<TailCommand>,
    pub head: watch::Receiver<HeadView>,
    /// Changes when the open watch stands still and another one may help.
    pub reopen: watch::Receiver<()>,
    pub view: watch::Sender<TailView>,
    pub events: mpsc::Sender<LinkEvent>,
    pub clock: Clock,
    /// The origin as it was at the last connect since the spool was begun, or at the hello that came before the first one.
    pub seen: Option<Seen>,
    /// What a watch begins with until the spool has a revision of its own.
    pub carried: Option<(Revision, Digest)>,
}

/// Why a watch session ended.
enum Ended {
    Command(Option<TailCommand>),
    /// The next one begins otherwise.
    Again,
    Trouble(EtcdError),
    Silent,
    StoodStill,
    Closed,
    Canceled(String),
    Compacted {
        from: Revision,
        compacted: Revision,
    },
    Full,
    Sequence(SequenceError),
    OtherHistory(String),
    Spool(SpoolError),
    /// What is to be known of the spool's next revision could not be written down.
    Unkept(SpoolError),
}

impl From<EtcdError> for Ended {
    fn from(error: EtcdError) -> Self {
        Self::Trouble(error)
    }
}

/// What the next turn of the loop does.
enum Next {
    Watch,
    WaitForCommand,
    WaitForRoom,
    /// Nobody can give a command any more.
    End,
}

/// What one turn of the loop leaves to the next.
struct Turn {
    next: Next,
    backoff: Backoff,
    message_bytes_max: usize,
    /// Whoever waits for the watch to open.
    opened: Option<Opened>,
    /// Below the spool's last revision etcd may be compacted while what follows it is still there: then the watch begins after it.
    after_covered: bool,
}

struct OpenWatch {
    etcd: Etcd,
    watch: Watch,
    sequencer: Sequencer,
    from: Revision,
    /// The spool's end when it was opened.
    covered: Revision,
    /// It began there without showing the spool's last revision, and has appended nothing yet.
    unlinked: Option<Revision>,
    /// Of what the spool held up to here its last revision said nothing.
    linked_after: Revision,
}

impl OpenWatch {
    /// It has shown the spool's last revision again.
    fn is_proven(&self) -> bool {
        self.sequencer.proven_from().is_some_and(|from| from <= self.covered)
    }

    /// See [`Sequencer::proven_from`].
    fn proven_from(&self) -> Option<Revision> {
        self.sequencer.proven_from().map(|from| from.max(self.linked_after.next()))
    }
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
        let has_coverage = self.spool.extent().borrow().covered > Revision(0);
        let mut turn = Turn {
            next: if has_coverage { Next::Watch } else { Next::WaitForCommand },
            backoff: Backoff::new(Duration::from_millis(200), Duration::from_secs(1)),
            message_bytes_max: MESSAGE_BYTES_FIRST,
            opened: None,
            after_covered: false,
        };
        loop {
            let ended = match std::mem::replace(&mut turn.next, Next::Watch) {
                Next::Watch => Box::pin(self.watch_once(&mut turn)).await,
                Next::End => return,
                Next::WaitForCommand => Ended::Command(self.next_restart().await),
                Next::WaitForRoom => {
                    let spool = self.spool.clone();
                    tokio::select! {
                        biased;
                        command = self.next_restart() => Ended::Command(command),
                        room = spool.room() => match room {
                            Ok(()) => continue,
                            Err(e) => Ended::Spool(e),
                        },
                    }
                }
            };
            self.go_on_after(ended, &mut turn).await;
        }
    }

    /// The next command that makes a tail watch that does not. Cancel-safe.
    async fn next_restart(&mut self) -> Option<TailCommand> {
        loop {
            match next_command(&mut self.commands).await {
                Some(TailCommand::Greeted { seen, carried }) => {
                    self.seen.get_or_insert(seen);
                    _ = self.remember(carried);
                }
                command => return command,
            }
        }
    }

    /// True if the next watch begins otherwise than the last one did.
    fn remember(&mut self, carried: Option<(Revision, Digest)>) -> bool {
        let new = carried.is_some() && self.spool.extent().borrow().last.is_none() && self.carried.is_none();
        if new {
            self.carried = carried;
        }
        new
    }

    /// A hello came while a watch is open. `Err`: it ends.
    fn greeted(&mut self, seen: Seen, carried: Option<(Revision, Digest)>) -> Result<(), Ended> {
        if let Some(own) = self.seen.filter(|own| reopen::is_another(*own, seen)) {
            return Err(Ended::OtherHistory(self.other_origin(seen, own)));
        }
        if self.remember(carried) { Err(Ended::Again) } else { Ok(()) }
    }

    /// Begins the spool anew, then watches; `opened` is told when the watch stands.
    async fn restart(&mut self, command: TailCommand, turn: &mut Turn) {
        let TailCommand::Restart { after, carried, seen, begins, opened } = command else { return };
        (self.seen, self.carried) = (seen, carried);
        match self.spool.reset(after).await {
            Ok(()) => {
                self.view.send_modify(|view| (view.covered, view.proven_from) = (after, None));
                turn.opened = Some(opened);
                if begins == Begins::Afresh {
                    // From here: what arrives next is told after it.
                    let _ = self.events.send(LinkEvent::Anchored(after)).await;
                }
            }
            Err(e) => {
                turn.opened = Some(opened);
                self.halt(TailState::Stopped { reason: format!("the spool: {e}") }, turn);
            }
        }
    }

    /// Decides what follows the end of a watch; waits where that is all that can be done.
    async fn go_on_after(&mut self, ended: Ended, turn: &mut Turn) {
        match ended {
            Ended::Command(None) => turn.next = Next::End,
            Ended::Command(Some(command)) => self.restart(command, turn).await,
            Ended::Again => {}
            Ended::Compacted { from, compacted } => {
                let covered = self.spool.extent().borrow().covered;
                if reopen::goes_on_after_end(from, covered, compacted) {
                    turn.after_covered = true;
                    return;
                }
                tracing::warn!(link = %self.link, %covered, %compacted, "etcd has compacted past the spool's end");
                self.halt(TailState::Lost { compacted }, turn);
            }
            Ended::Full => {
                let disk_full = self.spool.extent().borrow().disk_full;
                let what = if disk_full { "the spool's disk takes no more" } else { "the spool is full" };
                tracing::warn!(link = %self.link, "{what}: the watch waits for room");
                self.publish(TailState::SpoolFull);
                turn.next = Next::WaitForRoom;
            }
            Ended::Trouble(EtcdError::AnswerTooLarge { limit_bytes }) if limit_bytes < MESSAGE_BYTES_CEILING => {
                turn.message_bytes_max = limit_bytes.saturating_mul(2).min(MESSAGE_BYTES_CEILING);
            }
            Ended::Trouble(e @ EtcdError::AnswerTooLarge { .. }) => {
                self.halt(TailState::Stopped { reason: format!("a watch message of the origin: {e}") }, turn);
            }
            Ended::Trouble(e) => self.pause(e.to_string(), turn).await,
            Ended::Silent => {
                let reason = format!("the watch shows nothing of the head for {} s", SILENCE_MAX.as_secs());
                self.pause(reason, turn).await;
            }
            Ended::StoodStill => self.pause("the watch stood still".to_owned(), turn).await,
            Ended::Closed => self.pause("etcd closed the watch".to_owned(), turn).await,
            Ended::Canceled(reason) => {
                let error = EtcdError::Denied { right: watch_right(&self.ranges.covering()), said: reason };
                self.pause(error.to_string(), turn).await;
            }
            Ended::Sequence(e @ SequenceError::OtherHistory { .. }) => {
                let reason = e.to_string().replace("LINK", self.link.as_str());
                self.halt(TailState::OtherHistory { reason }, turn);
            }
            Ended::OtherHistory(reason) => self.halt(TailState::OtherHistory { reason }, turn),
            Ended::Sequence(e @ SequenceError::WentBack { .. }) => self.pause(e.to_string(), turn).await,
            Ended::Sequence(e @ SequenceError::TooLarge { .. }) => {
                self.halt(TailState::Stopped { reason: e.to_string() }, turn);
            }
            Ended::Unkept(e) => self.pause(format!("the spool: {e}"), turn).await,
            Ended::Spool(e) => self.halt(TailState::Stopped { reason: format!("the spool: {e}") }, turn),
        }
    }

    fn publish(&self, state: TailState) {
        self.view.send_modify(|view| {
            // A watch that is open says itself what it has shown.
            view.proven_from = view.proven_from.filter(|_| state == TailState::Running);
            view.state = state;
        });
    }

    /// Stops watching until a command comes; whoever waits for the watch to open is told.
    fn halt(&self, state: TailState, turn: &mut Turn) {
        if let Some(opened) = turn.opened.take() {
            let _ = opened.send(Err(state.clone()));
        }
        self.publish(state);
        turn.next = Next::WaitForCommand;
    }

    /// A failure that repeats is logged once.
    async fn pause(&self, reason: String, turn: &mut Turn) {
        let state = TailState::Connecting { reason };
        if self.view.borrow().state != state
            && let TailState::Connecting { reason } = &state
        {
            tracing::warn!(link = %self.link, %reason, "the watch at the origin has ended; it is opened again until it stays");
        }
        self.publish(state);
        tokio::time::sleep(turn.backoff.after_failure(rand::random())).await;
    }

    /// One watch stream, from the spool's end until something ends it.
    async fn watch_once(&mut self, turn: &mut Turn) -> Ended {
        let after_covered = std::mem::take(&mut turn.after_covered);
        match self.open(after_covered, turn.message_bytes_max).await {
            Ok(mut open) => {
                let ended = self.follow(&mut open, turn).await;
                self.spool.unwatched().await;
                self.confirmed(&open.etcd, ended).await
            }
            Err(ended) => ended,
        }
    }

    /// Asks whether this is still the same origin, and opens the watch where the spool ends: at its last revision, to see that
    /// again, or after it where etcd no longer shows it whole.
    async fn open(&mut self, after_covered: bool, message_bytes_max: usize) -> Result<OpenWatch, Ended> {
        let extent = self.spool.extent().borrow().clone();
        let etcd = self.etcd.connect().await?;
        let look = etcd.look(&self.link.waymark_key()).await?;
        if look.head < extent.covered {
            let reason = format!(
                "the origin was restored or replaced: its head {} is below revision {} that was read before; if this origin is the \
                     right one, run `etcd-ferry resync {} --config F` at its sidecar",
                look.head, extent.covered, self.link
            );
            return Err(Ended::OtherHistory(reason));
        }
        self.same_origin(&look).map_err(Ended::OtherHistory)?;
        let last = extent.last.or(self.carried);
        let shows_last = match last {
            Some((last, _)) => !after_covered && shows_whole(&etcd, last).await?,
            None => false,
        };
        let spooled = Spooled { covered: extent.covered, last };
        let bytes_max = self.limits.revision_bytes_max;
        let (sequencer, from) = reopen::sequencer(&self.link, self.ranges.clone(), spooled, shows_last, bytes_max);
        // etcd takes a watch that begins at the very revision to which it is compacted, and older ones leave out that one's deletes.
        if from > extent.covered && !shows_whole(&etcd, from).await? {
            return Err(Ended::Compacted { from, compacted: from });
        }
        let watch = etcd.watch(&self.ranges.covering(), from, message_bytes_max).await?;
        if !shows_last {
            self.spool.unwatched().await;
        }
        let linked_after = self.spool.lineage().await.linked_after();
        let unlinked = (!shows_last).then_some(extent.covered);
        Ok(OpenWatch { etcd, watch, sequencer, from, covered: extent.covered, unlinked, linked_after })
    }

    async fn follow(&mut self, open: &mut OpenWatch, turn: &mut Turn) -> Ended {
        let mut silent_since = tokio::time::Instant::now();
        let mut head_open = true;
        self.reopen.mark_unchanged();
        loop {
            tokio::select! {
                biased;
                command = next_command(&mut self.commands) => match command {
                    Some(TailCommand::Greeted { seen, carried }) => if let Err(ended) = self.greeted(seen, carried) {
                        return ended;
                    },
                    command => return Ended::Command(command),
                },
                signal = open.watch.next() => {
                    silent_since = tokio::time::Instant::now();
                    match signal {
                        Ok(Some(WatchSignal::Created)) => {
                            turn.backoff.succeeded();
                            self.view.send_modify(|view| view.proven_from = open.proven_from());
                            self.publish(TailState::Running);
                            if let Some(opened) = turn.opened.take() {
                                let _ = opened.send(Ok(()));
                            }
                        }
                        Ok(Some(WatchSignal::Compacted(compacted))) => return Ended::Compacted { from: open.from, compacted },
                        Ok(Some(WatchSignal::Canceled(reason))) => return Ended::Canceled(reason),
                        Ok(Some(signal)) => {
                            let proven = open.is_proven();
                            if let Err(ended) = self.take(open, signal).await {
                                return ended;
                            }
                            if open.is_proven() && !proven {
                                self.spool.proven().await;
                            }
                        }
                        Ok(None) => return Ended::Closed,
                        Err(e) => return Ended::Trouble(e),
                    }
                }
                Ok(()) = self.reopen.changed() => return Ended::StoodStill,
                // Told at each read of the head, whether it moved or not.
                read = self.head.changed(), if head_open => {
                    head_open = read.is_ok();
                    let behind = self.head.borrow_and_update().revision > open.sequencer.covered();
                    if !behind {
                        silent_since = tokio::time::Instant::now();
                    } else if silent_since.elapsed() > SILENCE_MAX {
                        return Ended::Silent;
                    } else if silent_since.elapsed() >= open.etcd.asks_progress_after()
                        && let Err(e) = open.etcd.ask_progress(&mut open.watch, &self.link.progress_key()).await
                    {
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
        let now = seen_by(look);
        match self.seen {
            Some(before) if !reopen::same_origin(before, now) => return Err(self.other_origin(before, now)),
            Some(_) | None => self.seen = Some(now),
        }
        self.view.send_if_modified(|view| {
            view.cluster = Some(look.cluster);
            false
        });
        Ok(())
    }

    fn other_origin(&self, before: Seen, now: Seen) -> String {
        format!(
            "the origin was restored or replaced while this sidecar watched it (cluster {}, waymark {}; now cluster {}, waymark {}); \
             if this origin is the right one, run `etcd-ferry resync {} --config F` at its sidecar",
            before.0, before.1.present.counter, now.0, now.1.present.counter, self.link
        )
    }

    /// Puts what a message completes into the spool.
    async fn take(&mut self, open: &mut OpenWatch, signal: WatchSignal) -> Result<(), Ended> {
        match signal {
            WatchSignal::Events { events, fragment } => {
                failpoint::reach("watch-read");
                let events = events.into_iter().map(|(revision, change)| Event { revision, change }).collect();
                let message = WatchMessage { events, fragment };
                let whole = open.sequencer.push(message).map_err(Ended::Sequence)?;
                self.spool_all(whole, &mut open.unlinked).await?;
            }
            WatchSignal::Progress(revision) => open.sequencer.progress(revision).map_err(Ended::Sequence)?,
            WatchSignal::Created | WatchSignal::Compacted(_) | WatchSignal::Canceled(_) => {}
        }
        let (covered, proven_from) = (open.sequencer.covered(), open.proven_from());
        let mut moved = false;
        // Whoever waits on the view waits for another state; progress is read now and then.
        self.view.send_if_modified(|view| {
            moved = covered > view.covered;
            view.proven_from = proven_from;
            view.covered = view.covered.max(covered);
            false
        });
        if moved {
            self.spool.covered(covered);
            let _ = self.events.send(LinkEvent::Covered(covered)).await;
        }
        Ok(())
    }

    /// `unlinked`: see [`OpenWatch`].
    async fn spool_all(&mut self, whole: Vec<Sequenced>, unlinked: &mut Option<Revision>) -> Result<(), Ended> {
        let at_ms = self.clock.now_ms();
        let ferry_only = whole.iter().filter(|w| w.ferry_only).count() as u64;
        let entries: Vec<SpoolEntry> =
            whole.into_iter().filter(|w| w.is_of_the_link()).map(|w| entry_of(w, at_ms)).collect();
        if let Some(last) = entries.last().map(|e| e.revision.revision) {
            let revisions: Vec<Revision> = entries.iter().map(|e| e.revision.revision).collect();
            failpoint::reach("sequenced");
            if let Some(covered) = *unlinked {
                self.spool.appends_unlinked(covered).await.map_err(Ended::Unkept)?;
                *unlinked = None;
            }
            match self.spool.append(entries).await {
                Ok(Appended::Taken) => {}
                Ok(Appended::Full(_)) => return Err(Ended::Full),
                Err(e) => return Err(Ended::Spool(e)),
            }
            failpoint::reach("spooled");
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
