//! Job: when each put was seen at the replica, by a watch there.
//! Input: puts as they are due, the replica's events. Output: a lag for each put.
//! Always true: a put that a later one of its key overtook (merged on the way) has arrived when that one is seen, later by the origin's
//! revisions; a lag counts from when the put was due.

use crate::bed::etcd::Etcd;
use crate::load::{PREFIX, Values};
use etcd_client::{EventType, WatchOptions};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// One put: when it was due after the start, and how much later it was seen; both in seconds.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Lag {
    pub at: f64,
    pub lag: f64,
}

/// One object's puts, and what the replica showed of it.
#[derive(Default)]
struct Object {
    /// By version: when it was due, and the origin's revision once that is known.
    puts: HashMap<u64, (Instant, Option<i64>)>,
    /// Versions as they came, in the replica's order.
    seen: Vec<(u64, Instant)>,
}

impl Object {
    /// The version that the origin committed last.
    fn last_version(&self) -> Option<u64> {
        self.puts.iter().max_by_key(|(_, (_, revision))| *revision).map(|(version, _)| *version)
    }

    /// From when a put was due to when the replica first showed it, or what the origin committed after it.
    fn lags(&self, began: Instant) -> Vec<Lag> {
        let mut puts: Vec<(i64, Instant)> =
            self.puts.values().filter_map(|(due, revision)| Some(((*revision)?, *due))).collect();
        puts.sort_unstable();
        let seen = self.seen.iter().filter_map(|(version, at)| Some((self.puts.get(version)?.1?, *at)));
        let mut seen = seen.peekable();
        let lag = |(revision, due): (i64, Instant)| {
            while seen.next_if(|(shown, _)| *shown < revision).is_some() {}
            let (_, at) = seen.peek()?;
            let since = |earlier: Instant, later: Instant| later.saturating_duration_since(earlier).as_secs_f64();
            Some(Lag { at: since(began, due), lag: since(due, *at) })
        };
        puts.into_iter().filter_map(lag).collect()
    }
}

#[derive(Default)]
struct State {
    objects: HashMap<u64, Object>,
    began: Option<Instant>,
    /// From when a put was due to etcd's answer, in seconds: what the origin itself adds.
    answers: Vec<f64>,
}

pub struct Arrivals {
    state: Mutex<State>,
    /// Changes with each message of the watch.
    messages: watch::Sender<()>,
}

/// A watch at the replica; ends when dropped.
pub struct Watching(JoinHandle<()>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Arrivals {
    pub fn new() -> Self {
        Self { state: Mutex::default(), messages: watch::Sender::new(()) }
    }

    /// Watches `replica` from now on.
    pub async fn watch(replica: &Etcd, values: Values) -> (Arc<Self>, Watching) {
        let arrivals = Arc::new(Self::new());
        let mut client = replica.client().await.watch_client().max_decoding_message_size(usize::MAX);
        let options = WatchOptions::new().with_prefix().with_fragment();
        let mut stream = client.watch(PREFIX, Some(options)).await.unwrap();
        // The answer that the watch is there.
        stream.message().await.unwrap();
        let told = arrivals.clone();
        let task = tokio::spawn(async move {
            while let Ok(Some(message)) = stream.message().await {
                let now = Instant::now();
                {
                    let mut state = told.state.lock().unwrap();
                    for event in message.events() {
                        let Some(kv) = event.kv().filter(|_| event.event_type() == EventType::Put) else { continue };
                        if let (Some(number), Some(version)) = (number_of(kv.key()), values.version(kv.value())) {
                            state.objects.entry(number).or_default().seen.push((version, now));
                        }
                    }
                }
                told.messages.send_replace(());
            }
        });
        (arrivals, Watching(task))
    }

    /// A put is about to be sent.
    pub fn due(&self, number: u64, version: u64, at: Instant) {
        let mut state = self.state.lock().unwrap();
        state.began.get_or_insert(at);
        state.objects.entry(number).or_default().puts.insert(version, (at, None));
    }

    /// etcd has answered a put: it is in `revision`.
    pub fn answered(&self, number: u64, version: u64, revision: i64) {
        let mut state = self.state.lock().unwrap();
        let State { objects, answers, .. } = &mut *state;
        let Some((due, put)) = objects.get_mut(&number).and_then(|object| object.puts.get_mut(&version)) else {
            return;
        };
        *put = Some(revision);
        answers.push(due.elapsed().as_secs_f64());
    }

    /// Once all puts are answered: waits until the last one of each object has been seen. False if that takes longer than `limit`.
    pub async fn all_seen(&self, limit: Duration) -> bool {
        let mut messages = self.messages.subscribe();
        let mut missing: Vec<(u64, u64)> = {
            let state = self.state.lock().unwrap();
            state.objects.iter().filter_map(|(number, object)| Some((*number, object.last_version()?))).collect()
        };
        let waiting = async {
            loop {
                messages.borrow_and_update();
                {
                    let state = self.state.lock().unwrap();
                    let shown = |number: &u64| state.objects.get(number)?.seen.last().map(|(version, _)| *version);
                    missing.retain(|(number, version)| shown(number) != Some(*version));
                }
                if missing.is_empty() {
                    return true;
                }
                if messages.changed().await.is_err() {
                    return false;
                }
            }
        };
        tokio::time::timeout(limit, waiting).await.unwrap_or(false)
    }

    /// The lags and the answers' times so far, taken away.
    pub fn take(&self) -> (Vec<Lag>, Vec<f64>) {
        let State { objects, began, answers } = std::mem::take(&mut *self.state.lock().unwrap());
        let mut lags: Vec<Lag> =
            began.map_or_else(Vec::new, |began| objects.values().flat_map(|object| object.lags(began)).collect());
        lags.sort_by(|a, b| a.at.total_cmp(&b.at));
        (lags, answers)
    }
}

/// Keys end in the object's number.
fn number_of(key: &[u8]) -> Option<u64> {
    let digits = key.rsplit(|b| *b == b'-').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The share `p` of `seconds` is at most this.
pub fn percentile(seconds: impl IntoIterator<Item = f64>, p: f64) -> f64 {
    let mut sorted: Vec<f64> = seconds.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let at = ((sorted.len() as f64 * p).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).copied().unwrap_or(f64::INFINITY)
}
