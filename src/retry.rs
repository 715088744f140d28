//! Job: how long to wait before the next try.
//! Input: the number of failures in a row, a random number. Output: a wait.
//! Pure: the caller brings clock and randomness.
//! Always true: no wait is longer than the maximum, and none is shorter than half of its step.

use std::time::Duration;

/// Doubling waits with jitter.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    pub fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, failures: 0 }
    }

    /// The wait after one more failure. `random` is any number; it spreads the wait over the upper half of the step.
    pub fn after_failure(&mut self, random: u64) -> Duration {
        let step = self.first.saturating_mul(1 << self.failures.min(16)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        let half = step / 2;
        let spread_ms = u64::try_from(half.as_millis()).unwrap_or(u64::MAX).max(1);
        half + Duration::from_millis(random % spread_ms)
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_maximum_and_start_again_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        let waits: Vec<u128> = (0..8).map(|_| backoff.after_failure(u64::MAX).as_millis()).collect();
        assert!(waits.windows(2).all(|w| w[0] <= w[1] || w[1] >= 1000), "{waits:?}");
        assert!(waits.iter().all(|w| *w <= 2000), "{waits:?}");
        assert!(waits[0] >= 50 && waits[0] <= 100, "{waits:?}");
        backoff.succeeded();
        assert!(backoff.after_failure(0).as_millis() <= 100);
    }
}
