//! Job: how far the replica is behind, by the origin's clock alone.
//! Input: when revisions arrived, the origin's head, how far the watch covers it, acks. Output: lag and RPO.
//! Pure: the caller brings the clock.
//! Always true: neither is reported smaller than it is; what is forgotten to stay bounded makes them larger.

use crate::model::Revision;
use std::collections::VecDeque;

/// Samples of arrivals, and of heads: at 200 revisions a second, five seconds at full resolution.
const SAMPLES_MAX: usize = 1_024;

/// How much is missing, and since when.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Lag {
    /// Revisions that the link carries.
    pub revisions: u64,
    /// Revisions in the origin's etcd that no event or progress notice has covered yet, whatever they hold.
    pub uncovered: u64,
    pub seconds: f64,
}

/// Consecutive revisions that the link carries.
#[derive(Debug, Clone, Copy)]
struct Arrival {
    revision_last: Revision,
    /// When the first of them arrived.
    at_ms: u64,
    /// The last one's running number among all carried revisions.
    number_last: u64,
}

/// The origin's head as it was first seen.
#[derive(Debug, Clone, Copy)]
struct Head {
    revision: Revision,
    first_seen_ms: u64,
}

#[derive(Debug, Clone, Default)]
pub struct LagTracker {
    arrivals: VecDeque<Arrival>,
    heads: VecDeque<Head>,
    arrived: Revision,
    head: Revision,
    covered: Revision,
    applied: Revision,
    durable: Revision,
    /// How many carried revisions have arrived, and how many of them are known to be applied.
    number_arrived: u64,
    number_applied: u64,
}

impl LagTracker {
    pub fn new() -> Self {
        Self::default()
    }

    /// A revision that the link carries came, or was found in the spool with the time that it came at. Told before `covered` is told of
    /// it: a head at or above it that was seen earlier says that it has been in etcd since then, however late its event came.
    pub fn arrived(&mut self, revision: Revision, at_ms: u64) {
        self.arrived_several(revision, at_ms, 1);
    }

    /// As [`Self::arrived`], for `count` revisions that end with this one, of which the first arrived at `at_ms`.
    pub fn arrived_several(&mut self, revision: Revision, at_ms: u64, count: u64) {
        if revision <= self.arrived {
            return;
        }
        self.arrived = revision;
        self.number_arrived += count;
        if revision <= self.applied {
            self.number_applied = self.number_arrived;
            return;
        }
        let seen = self.heads.get(self.heads.partition_point(|head| head.revision < revision));
        let at_ms = seen.map_or(at_ms, |head| head.first_seen_ms.min(at_ms));
        self.arrivals.push_back(Arrival { revision_last: revision, at_ms, number_last: self.number_arrived });
        if self.arrivals.len() > SAMPLES_MAX {
            halve(&mut self.arrivals, |older, newer| Arrival { at_ms: older.at_ms, ..newer });
        }
    }

    /// A linearizable read showed this head.
    pub fn head(&mut self, revision: Revision, first_seen_ms: u64) {
        if revision <= self.head {
            return;
        }
        self.head = revision;
        if revision > self.covered {
            self.heads.push_back(Head { revision, first_seen_ms });
        }
        if self.heads.len() > SAMPLES_MAX {
            halve(&mut self.heads, |older, newer| Head { first_seen_ms: older.first_seen_ms, ..newer });
        }
    }

    /// Events and progress notices cover the origin up to this revision.
    pub fn covered(&mut self, revision: Revision) {
        self.covered = self.covered.max(revision);
        let covered = self.covered;
        while self.heads.front().is_some_and(|head| head.revision <= covered) {
            self.heads.pop_front();
        }
    }

    /// The replica holds everything up to this revision.
    pub fn applied(&mut self, revision: Revision) {
        self.applied = self.applied.max(revision);
        let applied = self.applied;
        while let Some(arrival) = self.arrivals.front().filter(|arrival| arrival.revision_last <= applied) {
            self.number_applied = arrival.number_last;
            self.arrivals.pop_front();
        }
        self.covered(applied);
    }

    /// What a hello says. It may be less than was known: a replica that was restored, or a journal that was lost. What is missing again
    /// counts from now on; how many revisions it is, is not known any more.
    pub fn greeted(&mut self, applied: Revision, durable: Revision, now_ms: u64) {
        self.durable = durable;
        let known = self.applied.min(self.arrived);
        if applied < known {
            let number_last = self.number_applied;
            // What was applied before had arrived before what was not.
            let at_ms = self.arrivals.front().map_or(now_ms, |next| next.at_ms.min(now_ms));
            self.arrivals.push_front(Arrival { revision_last: known, at_ms, number_last });
            self.number_applied = number_last.saturating_sub(1);
        }
        // Also where nothing of it has arrived here: what comes next is not applied because an earlier process knew that it was.
        self.applied = self.applied.min(applied);
        self.applied(applied);
    }

    /// The spool begins anew after this revision, where a base copy or a repair starts; what comes next may be of a history with lower
    /// revisions. What was missing stays missing until the anchor is applied, whatever history it was in; nothing else of before holds.
    pub fn anchored(&mut self, revision: Revision) {
        let since = self.since(0);
        self.arrivals.clear();
        self.heads.clear();
        (self.arrived, self.head, self.covered) = (revision, revision, revision);
        (self.applied, self.durable) = (Revision(0), Revision(0));
        if let Some(at_ms) = since {
            self.arrivals.push_back(Arrival { revision_last: revision, at_ms, number_last: self.number_arrived });
        }
    }

    /// How old is, at `now_ms`, what an ack of `revision` would take off: one age for each arrival that is told apart. To be asked before
    /// [`Self::applied`].
    pub fn ages_through(&self, revision: Revision, now_ms: u64) -> impl Iterator<Item = f64> {
        let done = self.arrivals.iter().take_while(move |arrival| arrival.revision_last <= revision);
        done.map(move |arrival| now_ms.saturating_sub(arrival.at_ms) as f64 / 1_000.0)
    }

    /// Everything up to this revision is in the replica's journal.
    pub fn durable(&mut self, revision: Revision) {
        self.durable = self.durable.max(revision);
    }

    /// What is not applied.
    pub fn lag(&self, now_ms: u64) -> Lag {
        self.behind(0, self.number_applied, now_ms)
    }

    /// What is neither durable nor applied: what a loss of the origin's region would cost now.
    pub fn rpo(&self, now_ms: u64) -> Lag {
        let safe = self.arrivals.partition_point(|arrival| arrival.revision_last <= self.durable);
        let number = safe.checked_sub(1).and_then(|last| self.arrivals.get(last)).map(|arrival| arrival.number_last);
        self.behind(safe, number.unwrap_or(self.number_applied), now_ms)
    }

    /// Of the first missing arrival or the first uncovered head, whichever is older.
    fn since(&self, first_missing: usize) -> Option<u64> {
        let arrival = self.arrivals.get(first_missing).map(|arrival| arrival.at_ms);
        let head = self.heads.front().map(|head| head.first_seen_ms);
        arrival.into_iter().chain(head).min()
    }

    /// What is missing from this arrival on, after so many that are not.
    fn behind(&self, first_missing: usize, number: u64, now_ms: u64) -> Lag {
        let since = self.since(first_missing).unwrap_or(now_ms);
        Lag {
            revisions: self.number_arrived - number,
            uncovered: self.head.0.saturating_sub(self.covered.0),
            seconds: now_ms.saturating_sub(since) as f64 / 1_000.0,
        }
    }
}

/// Every two neighbours become one, with the older one's time, so that what it stands for never looks younger than it is.
fn halve<T: Copy>(samples: &mut VecDeque<T>, join: impl Fn(T, T) -> T) {
    let mut samples_left = samples.iter().copied();
    let mut joined = VecDeque::with_capacity(SAMPLES_MAX + 1);
    while let Some(older) = samples_left.next() {
        joined.push_back(samples_left.next().map_or(older, |newer| join(older, newer)));
    }
    *samples = joined;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_restored_replica_lost_is_behind_again_and_what_a_lost_journal_held_is_at_risk_again() {
        let mut tracker = arrived([(10, 1_000), (20, 2_000)]);
        tracker.applied(Revision(10));
        tracker.durable(Revision(20));
        assert_eq!(tracker.rpo(5_000).revisions, 0);

        tracker.greeted(Revision(10), Revision(10), 5_000);

        assert_eq!((tracker.rpo(5_000).revisions, tracker.rpo(5_000).seconds), (1, 3.0));
        tracker.greeted(Revision(4), Revision(4), 6_000);
        assert_eq!((tracker.lag(7_000).revisions, tracker.lag(7_000).seconds), (2, 5.0));
        tracker.applied(Revision(20));
        assert_eq!(tracker.lag(9_000).revisions, 0);
    }

    #[test]
    fn what_a_restored_replica_lost_is_behind_though_only_an_earlier_process_saw_it_arrive() {
        let mut tracker = LagTracker::new();
        tracker.applied(Revision(1_000));
        tracker.greeted(Revision(500), Revision(500), 5_000);
        tracker.arrived(Revision(600), 5_001);
        tracker.covered(Revision(600));
        assert_eq!(tracker.lag(6_001), Lag { revisions: 1, uncovered: 0, seconds: 1.0 });
        assert_eq!(tracker.rpo(6_001).revisions, 1);
    }

    #[test]
    fn a_history_with_lower_revisions_is_measured_from_its_anchor_on_and_what_was_missing_until_then_is_not_hidden() {
        let mut tracker = arrived([(4_999_990, 1_000), (5_000_000, 2_000)]);
        tracker.applied(Revision(4_999_990));
        tracker.durable(Revision(5_000_000));
        tracker.head(Revision(5_000_007), 3_000);

        tracker.anchored(Revision(50));

        assert_eq!(tracker.lag(10_000), Lag { revisions: 1, uncovered: 0, seconds: 8.0 });
        assert_eq!(tracker.rpo(10_000).seconds, 8.0, "the copy is not there yet");
        tracker.arrived(Revision(51), 11_000);
        tracker.covered(Revision(51));
        assert_eq!((tracker.lag(12_000).revisions, tracker.lag(12_000).seconds), (2, 10.0));
        tracker.applied(Revision(50));
        tracker.durable(Revision(50));
        assert_eq!(tracker.lag(12_000), Lag { revisions: 1, uncovered: 0, seconds: 1.0 });
        assert_eq!(tracker.rpo(12_000), tracker.lag(12_000));
        // A hello that says what was said before takes nothing back.
        tracker.greeted(Revision(51), Revision(51), 13_000);
        assert_eq!(tracker.lag(60_000), Lag::default());
        tracker.head(Revision(53), 61_000);
        assert_eq!((tracker.lag(62_000).uncovered, tracker.lag(62_000).seconds), (2, 1.0));
    }

    #[test]
    fn an_anchor_where_nothing_is_missing_is_no_lag() {
        let mut tracker = arrived([(10, 1_000)]);
        tracker.applied(Revision(10));
        tracker.anchored(Revision(30));
        assert_eq!(tracker.lag(9_000), Lag::default());
        tracker.anchored(Revision(40));
        tracker.arrived(Revision(41), 9_500);
        assert_eq!(tracker.lag(10_000), Lag { revisions: 1, uncovered: 0, seconds: 0.5 });
    }

    fn arrived(revisions: impl IntoIterator<Item = (u64, u64)>) -> LagTracker {
        let mut tracker = LagTracker::new();
        for (revision, at_ms) in revisions {
            tracker.arrived(Revision(revision), at_ms);
            tracker.covered(Revision(revision));
        }
        tracker
    }

    #[test]
    fn nothing_known_is_no_lag() {
        assert_eq!(LagTracker::new().lag(5_000), Lag::default());
        assert_eq!(LagTracker::new().rpo(5_000), Lag::default());
    }

    #[test]
    fn lag_runs_since_the_oldest_revision_that_is_not_applied_arrived() {
        let mut tracker = arrived([(10, 1_000), (11, 2_000), (15, 3_000)]);
        assert_eq!(tracker.lag(4_000), Lag { revisions: 3, uncovered: 0, seconds: 3.0 });
        tracker.applied(Revision(10));
        assert_eq!(tracker.lag(4_000), Lag { revisions: 2, uncovered: 0, seconds: 2.0 });
        tracker.applied(Revision(14));
        assert_eq!(tracker.lag(4_000), Lag { revisions: 1, uncovered: 0, seconds: 1.0 });
        tracker.applied(Revision(15));
        assert_eq!(tracker.lag(9_000), Lag::default());
    }

    #[test]
    fn an_ack_takes_off_what_it_covers_with_the_age_of_each() {
        let tracker = arrived([(10, 1_000), (11, 2_000), (15, 3_000)]);
        assert_eq!(tracker.ages_through(Revision(9), 4_000).count(), 0);
        assert_eq!(tracker.ages_through(Revision(14), 4_000).collect::<Vec<_>>(), [3.0, 2.0]);
    }

    #[test]
    fn rpo_counts_what_is_neither_durable_nor_applied() {
        let mut tracker = arrived([(10, 1_000), (11, 2_000), (15, 3_000)]);
        tracker.durable(Revision(11));
        assert_eq!(tracker.rpo(4_000), Lag { revisions: 1, uncovered: 0, seconds: 1.0 });
        assert_eq!(tracker.lag(4_000).revisions, 3);
        tracker.applied(Revision(15));
        assert_eq!(tracker.rpo(4_000), Lag::default(), "applied is durable too");
    }

    #[test]
    fn while_the_watch_is_silent_below_the_head_lag_grows_from_when_that_head_was_first_seen() {
        let mut tracker = arrived([(10, 1_000)]);
        tracker.applied(Revision(10));
        tracker.head(Revision(12), 2_000);
        tracker.head(Revision(12), 4_000);
        tracker.head(Revision(20), 6_000);
        assert_eq!(tracker.lag(8_000), Lag { revisions: 0, uncovered: 10, seconds: 6.0 });
        assert_eq!(tracker.rpo(8_000).seconds, 6.0);
        tracker.covered(Revision(12));
        assert_eq!(tracker.lag(8_000).seconds, 2.0);
        tracker.covered(Revision(20));
        assert_eq!(tracker.lag(8_000), Lag::default());
    }

    #[test]
    fn a_revision_that_came_late_is_as_old_as_the_head_that_was_seen_above_it() {
        let mut tracker = LagTracker::new();
        tracker.head(Revision(12), 2_000);
        tracker.arrived(Revision(11), 30_000);
        tracker.covered(Revision(12));
        assert_eq!(tracker.lag(31_000), Lag { revisions: 1, uncovered: 0, seconds: 29.0 });
    }

    #[test]
    fn an_idle_link_has_no_lag_while_others_write_outside_of_its_ranges() {
        let mut tracker = arrived([(10, 1_000)]);
        tracker.applied(Revision(10));
        tracker.covered(Revision(500));
        tracker.head(Revision(500), 7_000);
        assert_eq!(tracker.lag(60_000), Lag::default());
    }

    #[test]
    fn applied_beyond_everything_that_is_known_is_no_lag() {
        let mut tracker = arrived([(10, 1_000)]);
        tracker.head(Revision(12), 2_000);
        tracker.applied(Revision(99));
        assert_eq!(tracker.lag(9_000), Lag::default());
        tracker.arrived(Revision(50), 9_000);
        assert_eq!(tracker.lag(9_500), Lag::default());
    }

    #[test]
    fn a_repeated_or_older_arrival_counts_once() {
        let tracker = arrived([(10, 1_000), (10, 2_000), (9, 2_000)]);
        assert_eq!(tracker.lag(3_000).revisions, 1);
    }

    #[test]
    fn a_clock_that_steps_back_is_no_lag_rather_than_a_panic() {
        assert_eq!(arrived([(10, 5_000)]).lag(1_000).seconds, 0.0);
    }

    #[test]
    fn a_long_outage_stays_bounded_and_exact_at_both_ends() {
        let mut tracker = arrived((1..=1_000_000).map(|r| (r, r)));
        assert!(tracker.arrivals.len() <= SAMPLES_MAX);
        assert_eq!(tracker.lag(2_000_000), Lag { revisions: 1_000_000, uncovered: 0, seconds: 1_999.999 });
        tracker.applied(Revision(1_000_000));
        assert_eq!(tracker.lag(2_000_000), Lag::default());
        (1..=100_000).for_each(|n| tracker.head(Revision(1_000_000 + n), 2_000_000 + n));
        assert!(tracker.heads.len() <= SAMPLES_MAX);
        assert_eq!(tracker.lag(2_200_001).seconds, 200.0);
    }

    proptest! {
        #[test]
        fn an_anchor_hides_nothing_until_it_is_applied_and_nothing_that_comes_after_it(
            // An anchor is a head, and an etcd's first one is 1.
            count in 1_u64..3_000, applied in 0_u64..3_000, head in 0_u64..4_000, anchor in 1_u64..4_000, after in 0_u64..50,
        ) {
            let mut tracker = arrived((1..=count).map(|r| (r, r * 10)));
            tracker.applied(Revision(applied));
            tracker.head(Revision(head), 40_000);
            let before = tracker.lag(60_000);
            tracker.anchored(Revision(anchor));
            prop_assert!(tracker.lag(60_000).seconds >= before.seconds && tracker.rpo(60_000).seconds >= before.seconds);
            prop_assert!(tracker.lag(60_000).revisions >= before.revisions);
            for n in 1..=after {
                tracker.arrived(Revision(anchor + n), 60_000 + n);
            }
            tracker.applied(Revision(anchor));
            prop_assert_eq!(tracker.lag(70_000).revisions, after);
            prop_assert_eq!(tracker.lag(70_000).seconds, if after > 0 { 9.999 } else { 0.0 });
        }

        #[test]
        fn lag_and_rpo_are_never_smaller_than_they_are(
            count in 1_u64..5_000, applied in 0_u64..5_000, durable in 0_u64..5_000,
        ) {
            let mut tracker = arrived((1..=count).map(|r| (r, r * 10)));
            tracker.durable(Revision(durable));
            tracker.applied(Revision(applied));
            for (lag, done) in [(tracker.lag(60_000), applied), (tracker.rpo(60_000), applied.max(durable))] {
                let missing = count.saturating_sub(done);
                let seconds = if missing > 0 { (60_000 - (done + 1) * 10) as f64 / 1_000.0 } else { 0.0 };
                prop_assert!(lag.revisions >= missing && lag.seconds >= seconds, "{lag:?}, {missing}, {seconds}");
                if count <= 1_024 || missing == 0 {
                    prop_assert_eq!((lag.revisions, lag.seconds), (missing, seconds));
                }
            }
        }
    }
}
