//! Job: when a certificate is to be renewed, how soon a failed try is repeated, and which failures are worth a line.
//! Input: the certificate's time, the caller's clock. Output: stages, waits, verdicts.
//! Pure: no clock, no I/O.
//! Always true: a certificate is due at two thirds of its life; tries come no faster than one a second, and not slower than leaves four more.

use super::RETRY_FIRST;
use crate::certs::identity::PeerIdentity;
use std::time::Duration;
use time::OffsetDateTime;

/// A failure that goes on unchanged is told each so many tries: about once an hour.
const TELL_EACH: u64 = 12;

/// When a certificate begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    from: OffsetDateTime,
    until: OffsetDateTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Fresh,
    /// To be renewed.
    Due,
    /// Half of the time for that is over.
    Ending,
    /// No new connection will be made with it.
    Over,
}

impl Life {
    pub fn of(identity: &PeerIdentity) -> Self {
        Self { from: identity.not_before, until: identity.not_after }
    }

    pub fn until(self) -> OffsetDateTime {
        self.until
    }

    pub fn renew_at(self) -> OffsetDateTime {
        self.until - (self.until - self.from) / 3
    }

    pub fn stage(self, now: OffsetDateTime) -> Stage {
        let ending_at = self.until - (self.until - self.from) / 6;
        if now > self.until {
            Stage::Over
        } else if now >= ending_at {
            Stage::Ending
        } else if now >= self.renew_at() {
            Stage::Due
        } else {
            Stage::Fresh
        }
    }

    /// Zero once it is due.
    pub fn renew_in(self, now: OffsetDateTime) -> Duration {
        Duration::try_from(self.renew_at() - now).unwrap_or_default()
    }

    /// After a failure: what the backoff says, but soon enough for four more tries before the end.
    pub fn retry_in(self, now: OffsetDateTime, backoff: Duration) -> Duration {
        let quarter = Duration::try_from((self.until - now) / 4).unwrap_or_default();
        if quarter.is_zero() { backoff } else { backoff.min(quarter.max(RETRY_FIRST)) }
    }
}

/// What was said of failures in a row.
#[derive(Debug, Default)]
pub struct Telling {
    failures: u64,
    told: Option<(String, Stage)>,
    told_at: u64,
}

impl Telling {
    /// The number of failures in a row, if this one is to be told: the first, one of another kind, and each twelfth.
    pub fn failed(&mut self, reason: &str, stage: Stage) -> Option<u64> {
        self.failures += 1;
        let same = self.told.as_ref().is_some_and(|(told, at)| told == reason && *at == stage);
        if same && self.failures - self.told_at < TELL_EACH {
            return None;
        }
        (self.told, self.told_at) = (Some((reason.to_owned(), stage)), self.failures);
        Some(self.failures)
    }

    /// The number of failures that came before.
    pub fn succeeded(&mut self) -> u64 {
        std::mem::take(self).failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn life() -> Life {
        let from = OffsetDateTime::UNIX_EPOCH;
        Life { from, until: from + 3 * DAY }
    }

    fn at(seconds: u64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_certificate_is_due_at_two_thirds_of_its_life_and_ending_at_five_sixths() {
        for (seconds, stage) in [
            (0, Stage::Fresh),
            (2 * 86_400 - 1, Stage::Fresh),
            (2 * 86_400, Stage::Due),
            (2 * 86_400 + 43_199, Stage::Due),
            (2 * 86_400 + 43_200, Stage::Ending),
            (3 * 86_400, Stage::Ending),
            (3 * 86_400 + 1, Stage::Over),
        ] {
            assert_eq!(life().stage(at(seconds)), stage, "{seconds}");
        }
        assert_eq!(life().renew_in(at(86_400)), DAY);
        assert_eq!(life().renew_in(at(10 * 86_400)), Duration::ZERO);
    }

    #[test]
    fn tries_are_repeated_in_time_for_four_more_but_never_more_often_than_each_second() {
        let minutes = Duration::from_secs(300);
        assert_eq!(life().retry_in(at(2 * 86_400), minutes), minutes);
        assert_eq!(life().retry_in(at(3 * 86_400 - 400), minutes), Duration::from_secs(100));
        assert_eq!(life().retry_in(at(3 * 86_400 - 1), minutes), RETRY_FIRST);
        assert_eq!(life().retry_in(at(4 * 86_400), minutes), minutes, "it is over: nothing is to be hurried any more");
        let soon = Duration::from_millis(600);
        assert_eq!(life().retry_in(at(3 * 86_400 - 1), soon), soon);
    }

    #[test]
    fn a_failure_is_told_at_first_when_it_changes_and_now_and_then() {
        let mut telling = Telling::default();
        let told: Vec<u64> = (0..30).filter_map(|_| telling.failed("down", Stage::Due)).collect();
        assert_eq!(told, [1, 13, 25]);
        assert_eq!(telling.failed("down", Stage::Ending), Some(31));
        assert_eq!(telling.failed("sealed", Stage::Ending), Some(32));
        assert_eq!(telling.succeeded(), 32);
        assert_eq!((telling.failed("down", Stage::Due), telling.succeeded(), telling.succeeded()), (Some(1), 1, 0));
    }
}
