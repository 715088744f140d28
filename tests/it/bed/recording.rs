//! Job: what an etcd held at every revision, recorded by a watch while a test runs.
//! Input: how to reach an etcd. Output: a `History`.
//! Always true: a history has no hole between its base and its end; a compaction that overtakes the recorder is a panic, not a hole.

use super::PATIENCE;
use super::etcd::{Access, Etcd, KeyMap, read, whole_keyspace};
use bytes::Bytes;
use etcd_client::{EventType, WatchOptions, WatchStream};
use etcd_ferry::model::{Change, Ranges, Revision};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A member that shows nothing for so long, while others may be written to, is left for the next one.
const SILENCE_MAX: Duration = Duration::from_secs(2);

/// Everything from `base_revision` on: the keys as they were then, and each later revision's changes, in key order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    pub base_revision: Revision,
    pub base: KeyMap,
    pub revisions: BTreeMap<Revision, Vec<Change>>,
}

impl History {
    /// The keys of `ranges` as they were at `revision`.
    pub fn state_at(&self, revision: Revision, ranges: &Ranges) -> KeyMap {
        let mut state = self.base_of(ranges);
        for (_, changes) in self.revisions.range(..=revision) {
            for change in changes.iter().filter(|change| ranges.contains(change.key())) {
                apply(&mut state, change);
            }
        }
        state
    }

    pub fn base_of(&self, ranges: &Ranges) -> KeyMap {
        self.base.iter().filter(|(key, _)| ranges.contains(key)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// What each revision did to `ranges`, without those that did nothing there.
    pub fn revisions_with_changes(&self, ranges: &Ranges) -> Vec<Vec<Change>> {
        let carried = |changes: &Vec<Change>| changes.iter().filter(|c| ranges.contains(c.key())).cloned().collect();
        self.revisions.values().map(carried).filter(|changes: &Vec<Change>| !changes.is_empty()).collect()
    }

    pub fn head(&self) -> Revision {
        self.revisions.keys().next_back().copied().unwrap_or(self.base_revision)
    }
}

pub fn apply(state: &mut KeyMap, change: &Change) {
    match change {
        Change::Put { key, value } => state.insert(key.clone(), value.clone()),
        Change::Delete { key } => state.remove(key),
    };
}

/// Records one etcd, over its restarts.
pub struct Recorder {
    seen: watch::Receiver<Revision>,
    stop: watch::Sender<bool>,
    task: JoinHandle<History>,
}

impl Recorder {
    /// Records from the state that `etcd` has now.
    pub async fn start(etcd: &Etcd) -> Self {
        Self::start_at(etcd, None).await
    }

    /// Records from the state that `etcd` had at a revision (`None`: now), which must not be compacted.
    pub async fn start_at(etcd: &Etcd, revision: Option<Revision>) -> Self {
        Self::start_over(vec![etcd.access()], revision).await
    }

    /// As `start_at`, over all members of a cluster: where one of several is silent or gone, the next one is watched.
    pub async fn start_over(members: Vec<Access>, revision: Option<Revision>) -> Self {
        let (base_revision, base) = read(&mut members[0].kv().await, &[whole_keyspace()], revision).await;
        let (sender, seen) = watch::channel(base_revision);
        let (stop, stopped) = watch::channel(false);
        let history = History { base_revision, base, revisions: BTreeMap::new() };
        let task = tokio::spawn(record(members, history, sender, stopped));
        Self { seen, stop, task }
    }

    /// Everything up to it is recorded.
    pub fn seen(&self) -> Revision {
        *self.seen.borrow()
    }

    /// The history up to at least `head`, which must be a revision that the etcd has reached.
    pub async fn finish(mut self, head: Revision) -> History {
        loop {
            let before = *self.seen.borrow_and_update();
            if before >= head {
                let _ = self.stop.send(true);
                return self.task.await.expect("the recorder ends well");
            }
            let moved = tokio::time::timeout(PATIENCE, self.seen.changed()).await;
            if !moved.is_ok_and(|moved| moved.is_ok()) {
                break;
            }
        }
        if self.task.is_finished() {
            self.task.await.expect("the recorder ends well");
        }
        let seen = *self.seen.borrow();
        panic!("the recorder saw revisions up to {seen}, not {head}, and none for {PATIENCE:?}");
    }
}

async fn record(
    members: Vec<Access>,
    mut history: History,
    seen: watch::Sender<Revision>,
    mut stop: watch::Receiver<bool>,
) -> History {
    for access in members.iter().cycle() {
        let silence_max = if members.len() > 1 { SILENCE_MAX } else { Duration::MAX };
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {
                history.revisions.retain(|revision, _| *revision <= *seen.borrow());
                return history;
            }
            () = follow(access, &mut history, &seen, silence_max) => {}
        }
        // etcd is down. What came in pieces comes again, whole.
        history.revisions.retain(|revision, _| *revision <= *seen.borrow());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    history
}

/// Adds to the history until the watch breaks.
async fn follow(access: &Access, history: &mut History, seen: &watch::Sender<Revision>, silence_max: Duration) {
    let all = whole_keyspace();
    let options = WatchOptions::new()
        .with_range(all.etcd_end())
        .with_start_revision(seen.borrow().next().to_etcd())
        .with_fragment();
    let opening = async {
        let client = access.try_client().await.ok()?;
        let mut watch_client = client.watch_client().max_decoding_message_size(usize::MAX);
        watch_client.watch(all.etcd_from(), Some(options)).await.ok()
    };
    let Ok(Some(mut stream)) = tokio::time::timeout(silence_max, opening).await else { return };
    while let Ok(Some(whole)) = tokio::time::timeout(silence_max, next(&mut stream, history)).await {
        if whole {
            seen.send_replace(history.head());
        }
    }
}

/// Takes one message in; true if it ends its last revision, `None` if the watch is over.
async fn next(stream: &mut WatchStream, history: &mut History) -> Option<bool> {
    let message = stream.message().await.ok()??;
    assert!(
        message.compact_revision() == 0,
        "the recorder was overtaken by a compaction at {}",
        message.compact_revision()
    );
    if message.canceled() {
        return None;
    }
    for event in message.events() {
        let Some(kv) = event.kv() else { continue };
        let key = Bytes::copy_from_slice(kv.key());
        let change = match event.event_type() {
            EventType::Put => Change::Put { key, value: Bytes::copy_from_slice(kv.value()) },
            EventType::Delete => Change::Delete { key },
        };
        let changes = history.revisions.entry(Revision::from_etcd(kv.mod_revision())).or_default();
        let at = changes.partition_point(|earlier| earlier.key() < change.key());
        changes.insert(at, change);
    }
    Some(!message.0.fragment)
}
