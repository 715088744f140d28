//! Job: when each put was seen at the replica, by a watch there.
//! Input: puts as they are due, the replica's events. Output: a lag for each put.
//! Always true: a put that a later one of its key overtook (merged on the way) has arrived when that one is seen; a lag counts from when
//! the put was due.

use crate::bed::etcd::Etcd;
use crate::load::{PREFIX, Values};
use etcd_client::{EventType, WatchOptions};
use std::collections::{HashMap, VecDeque};
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

#[derive(Default)]
struct State {
    /// By object: puts that are not seen yet.
    waiting: HashMap<u64, VecDeque<(u64, Instant)>>,
    outstanding: u64,
    began: Option<Instant>,
    lags: Vec<Lag>,
    /// From when a put was due to etcd's answer, in seconds: what the origin itself adds.
    answers: Vec<f64>,
}

pub struct Arrivals {
    state: Mutex<State>,
    outstanding: watch::Sender<u64>,
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
        Self { state: Mutex::default(), outstanding: watch::Sender::new(0) }
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
                for event in message.events() {
                    let Some(kv) = event.kv().filter(|_| event.event_type() == EventType::Put) else { continue };
                    if let (Some(number), Some(version)) = (number_of(kv.key()), values.version(kv.value())) {
                        told.seen(number, version, now);
                    }
                }
            }
        });
        (arrivals, Watching(task))
    }

    /// A put is about to be sent.
    pub fn due(&self, number: u64, version: u64, at: Instant) {
        let mut state = self.state.lock().unwrap();
        state.began.get_or_insert(at);
        state.waiting.entry(number).or_default().push_back((version, at));
        state.outstanding += 1;
        let outstanding = state.outstanding;
        self.outstanding.send_replace(outstanding);
    }

    /// etcd has answered the put that was due at `at`.
    pub fn answered(&self, at: Instant) {
        self.state.lock().unwrap().answers.push(at.elapsed().as_secs_f64());
    }

    fn seen(&self, number: u64, version: u64, now: Instant) {
        let mut state = self.state.lock().unwrap();
        let State { waiting, outstanding, began, lags, .. } = &mut *state;
        let Some(queue) = waiting.get_mut(&number) else { return };
        while let Some((_, at)) = queue.front().copied().filter(|(waits, _)| *waits <= version) {
            queue.pop_front();
            let began = began.unwrap_or(at);
            let since = |earlier: Instant, later: Instant| later.saturating_duration_since(earlier).as_secs_f64();
            lags.push(Lag { at: since(began, at), lag: since(at, now) });
            *outstanding -= 1;
        }
        self.outstanding.send_replace(*outstanding);
    }

    /// Waits until everything that was due has been seen. False if that takes longer than `limit`.
    pub async fn all_seen(&self, limit: Duration) -> bool {
        let mut outstanding = self.outstanding.subscribe();
        tokio::time::timeout(limit, outstanding.wait_for(|outstanding| *outstanding == 0)).await.is_ok()
    }

    /// The lags and the answers' times so far, taken away.
    pub fn take(&self) -> (Vec<Lag>, Vec<f64>) {
        let mut state = self.state.lock().unwrap();
        state.began = None;
        (std::mem::take(&mut state.lags), std::mem::take(&mut state.answers))
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
