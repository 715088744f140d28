//! Job: look out for what others write at the replica, under the link's prefixes.
//! Input: the head of the replica's etcd, the revisions that the applier made, a short watch over what is neither. Output: a `LookoutView`.
//! Edge: a task of its own, with a connection of its own; what is foreign is decided in foreign.rs.
//! Always true: applying never waits for it; what was looked at is remembered across restarts, and nothing is looked at twice by account.

use super::foreign::{Account, Judge, Open, OwnRevisions, Shown};
use super::receive::LinkEnd;
use crate::config::ForeignWrites;
use crate::etcd::{Etcd, EtcdError, WatchSignal, watch_right};
use crate::model::{ForeignStatus, Position, Ranges, Revision};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A foreign write is to be told within 5 s.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// What was looked at since the file was written last is looked at again after a crash; each write is a sync.
const KEEP_EVERY: Duration = Duration::from_secs(30);
/// An answer that is on its way comes meanwhile, and spares a watch.
const ANSWER_TAKES: Duration = Duration::from_millis(100);
const MESSAGE_BYTES_MAX: usize = 512 << 20;
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How often etcd is asked how far a watch is, while it has nothing to show.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// What the status sees.
#[derive(Debug, Clone, Default)]
pub struct LookoutView {
    pub checked: Revision,
    pub keys_ever: u64,
    pub open: Open,
    /// Nobody else's writes are looked for: why.
    pub expected: Option<&'static str>,
    /// Why it cannot look; empty if it can.
    pub waiting: String,
}

impl LookoutView {
    pub fn status(&self) -> ForeignStatus {
        let Open { revisions, keys, first, last, named } = self.open.clone();
        ForeignStatus {
            checked_revision: self.checked,
            revisions,
            keys,
            first_revision: first,
            last_revision: last,
            first_keys: named,
            expected: self.expected.unwrap_or_default().to_owned(),
            trouble: self.waiting.clone(),
        }
    }

    /// No key: http shows it.
    pub fn detail(&self) -> String {
        if !self.waiting.is_empty() {
            return format!("foreign writes cannot be looked for: {}", self.waiting);
        }
        match self.expected {
            Some(why) => format!("foreign writes are not looked for: {why}"),
            None if self.open.revisions == 0 => format!("nobody else wrote up to revision {}", self.checked),
            None => format!("somebody else wrote {} keys", self.open.keys),
        }
    }
}

/// The account in a file, written whole.
pub struct AccountFile(PathBuf);

impl AccountFile {
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// `None`: there is none yet, or it cannot be read; what is foreign is then looked for from the position on.
    fn read(&self) -> Option<Account> {
        let bytes = std::fs::read(&self.0).ok()?;
        serde_json::from_slice(&bytes)
            .inspect_err(
                |e| tracing::warn!(file = %self.0.display(), error = %e, "what was looked at is not known any more"),
            )
            .ok()
    }

    fn write(&self, account: &Account) -> std::io::Result<()> {
        crate::segment::write_file(&self.0, &serde_json::to_vec(account)?)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

pub(super) fn lock(own: &Mutex<OwnRevisions>) -> MutexGuard<'_, OwnRevisions> {
    own.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct Lookout {
    pub end: Arc<LinkEnd>,
    pub own: Arc<Mutex<OwnRevisions>>,
    pub file: AccountFile,
    pub view: watch::Sender<LookoutView>,
    etcd: Option<Etcd>,
    account: Option<Account>,
    kept: Option<(Account, Instant)>,
}

impl Lookout {
    pub fn new(
        end: Arc<LinkEnd>,
        own: Arc<Mutex<OwnRevisions>>,
        file: AccountFile,
        view: watch::Sender<LookoutView>,
    ) -> Self {
        let account = file.read();
        Self { end, own, file, view, etcd: None, account, kept: None }
    }

    /// Looks each [`LOOK_EVERY`] until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                looked = self.look() => self.show(looked.err()),
            }
            self.keep(false);
        }
        self.keep(true);
    }

    fn show(&mut self, trouble: Option<EtcdError>) {
        let waiting = trouble.map_or_else(String::new, |e| e.to_string());
        if !waiting.is_empty() {
            self.etcd = None;
            if self.view.borrow().waiting != waiting {
                tracing::warn!(link = %self.end.config.link, reason = %waiting, "foreign writes cannot be looked for");
            }
        }
        let expected = self.expected();
        let account = self.account.clone().unwrap_or_default();
        let wanted = self.end.config.foreign_writes == ForeignWrites::Repair && account.open.revisions > 0;
        self.end.repair_wanted.store(wanted, Ordering::Relaxed);
        self.view.send_modify(|view| {
            (view.checked, view.keys_ever, view.open) = (account.checked, account.keys_ever, account.open);
            (view.expected, view.waiting) = (expected, waiting);
        });
    }

    /// Why others' writes are none of its business.
    fn expected(&self) -> Option<&'static str> {
        if self.end.config.foreign_writes == ForeignWrites::Expect {
            return Some("foreign_writes = \"expect\"");
        }
        self.account.as_ref().is_some_and(|account| account.link_back).then_some("a link back writes the same keys")
    }

    async fn look(&mut self) -> Result<(), EtcdError> {
        let Some(ranges) = self.end.carried() else { return Ok(()) };
        let etcd = match &self.etcd {
            Some(etcd) => etcd.clone(),
            None => self.etcd.insert(self.end.etcd.connect().await?).clone(),
        };
        let position_key = self.end.config.link.position_key();
        let look = etcd.look(&position_key).await?;
        // Without a position nothing here is the link's yet.
        let Some(position) = look.kv else { return Ok(()) };
        let equal = Position::from_json(&position.value).map_or(Revision(0), |p| p.equal_revision);
        let shown = Shown {
            cluster: look.cluster,
            head: look.head,
            position: position.mod_revision,
            settled: equal.max(position.create_revision),
        };
        if self.account.as_ref().is_some_and(|kept| kept.is_past(&shown)) {
            // What was proved of its revisions is of others.
            self.end.told.send_modify(|told| told.equal_through = Revision(0));
            self.end.closed.send_replace(Revision(0));
        }
        let mut account = Account::begin(self.account.take(), &shown, &mut lock(&self.own));
        account.link_back = self.end.link_back().unwrap_or(account.link_back);
        let told = self.end.told.borrow().equal_through;
        if told <= look.head && account.proved_equal(told) {
            self.end.closed.send_replace(told);
        }
        // Of a comparison that another sidecar's stream has brought the position tells.
        account.proved_equal(equal);
        let account = self.account.insert(account);
        if self.end.config.foreign_writes == ForeignWrites::Expect || account.link_back {
            (account.checked, account.open) = (look.head, Open::default());
            return Ok(());
        }
        account.checked = lock(&self.own).advance(account.checked);
        if account.checked < look.head {
            // The applier may not have its own answer yet.
            tokio::time::sleep(ANSWER_TAKES).await;
            account.checked = lock(&self.own).advance(account.checked);
        }
        if account.checked >= look.head {
            return Ok(());
        }
        self.examine(&etcd, ranges, look.head).await
    }

    /// Judges every revision that was not looked at, up to `head`.
    async fn examine(&mut self, etcd: &Etcd, ranges: Ranges, head: Revision) -> Result<(), EtcdError> {
        let Some(account) = &mut self.account else { return Ok(()) };
        let link = &self.end.config.link;
        let before = account.open.clone();
        let range = ranges.covering();
        let denied = |e: EtcdError| e.needing(|| watch_right(&range));
        let mut judge = Judge::new(link, ranges, account.checked);
        let mut watch = etcd.watch(&range, account.checked.next(), MESSAGE_BYTES_MAX).await.map_err(denied)?;
        let mut ask = etcd.progress_asks(ASK_EVERY);
        let mut heard = Instant::now();
        while judge.checked() < head {
            let signal = tokio::select! {
                biased;
                signal = watch.next() => signal.map_err(denied)?,
                _ = ask.tick() => {
                    if heard.elapsed() > SILENCE_MAX {
                        return Err(EtcdError::TimedOut);
                    }
                    etcd.ask_progress(&mut watch, &link.progress_key()).await?;
                    continue;
                }
            };
            heard = Instant::now();
            match signal {
                None => return Err(EtcdError::Other("etcd closed the watch".to_owned())),
                Some(WatchSignal::Created) => {}
                Some(WatchSignal::Progress(revision)) => judge.progress(revision),
                Some(WatchSignal::Events { events, fragment, .. }) => {
                    let keys = events.into_iter().map(|(revision, change)| (revision, change.into_key()));
                    judge.push(keys, fragment).iter().for_each(|foreign| account.add(foreign));
                }
                Some(WatchSignal::Compacted(compacted)) => {
                    tracing::warn!(%link, after = %account.checked, through = %compacted,
                        "the replica was compacted before it could be seen whether somebody else wrote there: the next comparison tells");
                    account.checked = compacted;
                    return Ok(());
                }
                Some(WatchSignal::Canceled(said)) => {
                    return Err(EtcdError::Denied { right: watch_right(&range), said });
                }
            }
            account.checked = account.checked.max(judge.checked());
        }
        let open = &account.open;
        if *open != before {
            tracing::warn!(%link, revisions = open.revisions, keys = open.keys, first = %open.first, last = %open.last,
                "somebody else wrote under the link's prefixes at the replica: `etcd-ferry status` names the first keys, `etcd-ferry repair {link}` at the origin mends them");
        }
        Ok(())
    }

    /// Writes the file when something foreign was found, now and then, and at the end.
    fn keep(&mut self, ends: bool) {
        let Some(account) = &self.account else { return };
        let due = match &self.kept {
            None => true,
            Some((kept, at)) => {
                let told = kept.open != account.open || kept.keys_ever != account.keys_ever;
                kept != account && (told || ends || at.elapsed() >= KEEP_EVERY)
            }
        };
        if !due {
            return;
        }
        if let Err(e) = self.file.write(account) {
            tracing::warn!(link = %self.end.config.link, file = %self.file.path().display(), error = %e,
                "what was looked at cannot be kept: a restart looks at it again");
        }
        self.kept = Some((account.clone(), Instant::now()));
    }
}
