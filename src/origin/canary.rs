//! Job: when the next canary is written, and how long the last one took from its write to the word that it is applied.
//! Input: times on one clock, what became of a write, acknowledgements. Output: whether one is due; a duration.
//! Pure: no clock, no I/O.
//! Always true: one canary is on its way at a time, so that an outage costs one; it is measured through whatever streams it takes.

use crate::model::Revision;
use std::time::Duration;

/// The canary of one link at its shipper. Times are since one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Canary {
    /// When the last one was begun.
    begun: Option<Duration>,
    /// The one that is at the origin and not yet at the replica: its revision, and when its write began.
    flying: Option<(Revision, Duration)>,
    took: Option<Duration>,
}

impl Canary {
    pub fn is_due(&self, interval: Duration, now: Duration) -> bool {
        self.flying.is_none() && self.begun.is_none_or(|begun| now.saturating_sub(begun) >= interval)
    }

    pub fn begin(&mut self, now: Duration) {
        self.begun = Some(now);
    }

    /// It is written, at this revision; its ack may have overtaken the word of that.
    pub fn written(&mut self, revision: Revision, applied: Revision, now: Duration) {
        self.flying = self.begun.map(|begun| (revision, begun));
        self.applied(applied, now);
    }

    /// Everything up to `revision` is applied at the replica.
    pub fn applied(&mut self, revision: Revision, now: Duration) {
        if let Some((_, begun)) = self.flying.take_if(|(canary, _)| *canary <= revision) {
            self.took = Some(now.saturating_sub(begun));
        }
    }

    /// How long the last one took; `None`: none has come through yet.
    pub fn took(&self) -> Option<Duration> {
        self.took
    }

    /// Since when, on the caller's clock, one has been on its way.
    pub fn flying_since(&self) -> Option<Duration> {
        self.flying.map(|(_, begun)| begun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(5);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn one_is_written_each_interval_while_they_come_through() {
        let mut canary = Canary::default();
        assert!(canary.is_due(EVERY, ms(0)));
        canary.begin(ms(1_000));
        assert!(!canary.is_due(EVERY, ms(5_999)), "a write that failed is not tried all the time either");
        assert!(canary.is_due(EVERY, ms(6_000)));
    }

    #[test]
    fn the_time_is_from_the_write_to_the_first_word_that_it_is_applied() {
        let mut canary = Canary::default();
        canary.begin(ms(1_000));
        canary.written(Revision(7), Revision(6), ms(1_010));
        assert_eq!((canary.took(), canary.flying_since()), (None, Some(ms(1_000))));
        canary.applied(Revision(6), ms(1_020));
        assert_eq!(canary.took(), None);
        canary.applied(Revision(9), ms(1_080));
        assert_eq!((canary.took(), canary.flying_since()), (Some(ms(80)), None));
        canary.applied(Revision(12), ms(3_000));
        assert_eq!(canary.took(), Some(ms(80)), "what follows says nothing of it");
    }

    #[test]
    fn an_ack_may_come_before_the_word_that_it_is_written() {
        let mut canary = Canary::default();
        canary.begin(ms(1_000));
        canary.written(Revision(7), Revision(7), ms(1_030));
        assert_eq!((canary.took(), canary.flying_since()), (Some(ms(30)), None));
    }

    #[test]
    fn one_that_does_not_come_through_is_followed_by_none_and_ages() {
        let mut canary = Canary::default();
        canary.begin(ms(0));
        canary.written(Revision(7), Revision(1), ms(10));
        assert!(!canary.is_due(EVERY, ms(3_600_000)));
        assert_eq!(canary.flying_since(), Some(ms(0)));
        canary.applied(Revision(8), ms(3_600_000));
        assert_eq!(canary.took(), Some(ms(3_600_000)));
        assert!(canary.is_due(EVERY, ms(3_600_000)));
    }
}
