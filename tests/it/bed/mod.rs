//! Job: everything that a test of two regions stands on: real etcds, real sidecars, a bad link, writers, recordings, checkers.
//! Input: a test's options. Output: running processes, what was acknowledged, what each etcd held at each revision.
//! Always true: a process that the bed started ends with the value that stands for it, also when the test panics; nothing is
//! waited for without a deadline; a missing tool fails the test and says what to do.
//!
//! The bed panics where a test would `unwrap`: its messages are written for whoever reads the failed test.
#![allow(dead_code, reason = "each test uses a part of the bed")]

pub mod bender;
pub mod checkers;
pub mod contents;
pub mod disk;
pub mod etcd;
pub mod faults;
pub mod pair;
pub mod pki;
pub mod ports;
pub mod process;
pub mod recording;
pub mod regions;
pub mod sidecar;
pub mod traffic;

pub use etcd_ferry::demo::proxy::LinkProxy;

use std::time::Duration;
use tokio::time::Instant;

/// How long a test waits for what should take milliseconds: long enough for a busy machine of two cores.
pub const PATIENCE: Duration = Duration::from_secs(30);
const PROBE_PAUSE: Duration = Duration::from_millis(20);

/// Asks again and again until the probe has an answer; panics at the limit, with `what` was waited for.
pub async fn until<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Ok(Some(answer)) = tokio::time::timeout_at(deadline, probe()).await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} in vain for: {what}");
        tokio::time::sleep(PROBE_PAUSE).await;
    }
}
