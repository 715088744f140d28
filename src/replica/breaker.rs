//! Job: decide whether a revision that deletes much of the link is held back until a person allows it.
//! Input: the configured shares, how many keys the replica holds, each revision's deletes in order, the time. Output: a verdict for each.
//! Pure: the clock is handed in, no I/O.
//! Always true: each revision is counted once; nothing is held back on a count that was not made for it; what deletes nothing passes.

use crate::config::DeleteShares;
use crate::model::Seq;
use std::collections::VecDeque;

/// The minute that slides.
const WINDOW_MS: u64 = 60_000;
/// The window is kept by the second, so it has at most so many entries, and one that begins.
const SECOND_MS: u64 = 1_000;
/// A count of the replica's keys is good for so long; what is held back is counted anew before.
const COUNT_AGE_MS_MAX: u64 = 60_000;

/// What is to become of a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judged {
    Passes,
    /// How many keys the replica holds is not known well enough: count, with everything before it applied, and ask again.
    Count,
    Holds {
        /// Of this revision, or with those of the minute before it.
        deletes: u64,
        /// Of so many keys.
        keys: u64,
        minute: bool,
    },
}

/// Deletes that passed within one second.
#[derive(Debug, Clone, Copy)]
struct Passed {
    at_ms: u64,
    first: Seq,
    deletes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Counted {
    at_ms: u64,
    keys: u64,
    /// What had been deleted within the minute before.
    deleted: u64,
    /// The revision that it was made for.
    next: Seq,
}

/// Watches one link's deletes.
#[derive(Debug)]
pub struct Breaker {
    shares: DeleteShares,
    passed: VecDeque<Passed>,
    counted: Option<Counted>,
}

impl Breaker {
    pub fn new(shares: DeleteShares) -> Self {
        Self { shares, passed: VecDeque::new(), counted: None }
    }

    pub fn is_on(&self) -> bool {
        self.shares.revision.is_some() || self.shares.minute.is_some()
    }

    /// The next revision, with so many deletes. One that passes is counted with the minute.
    pub fn judge(&mut self, now_ms: u64, seq: Seq, deletes: u64) -> Judged {
        if deletes == 0 || !self.is_on() {
            return Judged::Passes;
        }
        let Some(counted) = self.counted.filter(|counted| now_ms < counted.at_ms.saturating_add(COUNT_AGE_MS_MAX))
        else {
            return Judged::Count;
        };
        let in_minute = self.deleted_since(now_ms).saturating_add(deletes);
        let at_minute = counted.keys.saturating_add(counted.deleted);
        let held = if exceeds(self.shares.revision, deletes, counted.keys) {
            Judged::Holds { deletes, keys: counted.keys, minute: false }
        } else if exceeds(self.shares.minute, in_minute, at_minute) {
            Judged::Holds { deletes: in_minute, keys: at_minute, minute: true }
        } else {
            self.note(now_ms, seq, deletes);
            return Judged::Passes;
        };
        if counted.next == seq { held } else { Judged::Count }
    }

    /// The replica holds so many keys of the link, with everything before `next` applied.
    pub fn counted(&mut self, now_ms: u64, keys: u64, next: Seq) {
        let deleted = self.deleted_since(now_ms);
        self.counted = Some(Counted { at_ms: now_ms, keys, deleted, next });
    }

    /// Somebody allowed what was held back, and it is in: what comes after it is watched as if nothing had been deleted.
    pub fn start_afresh(&mut self) {
        self.passed.clear();
        self.counted = None;
    }

    /// Nothing after this seq was applied: it comes again.
    pub fn forget_after(&mut self, seq: Seq) {
        self.passed.retain(|passed| passed.first <= seq);
        self.counted = None;
    }

    fn deleted_since(&mut self, now_ms: u64) -> u64 {
        while self.passed.front().is_some_and(|passed| passed.at_ms.saturating_add(WINDOW_MS) <= now_ms) {
            self.passed.pop_front();
        }
        self.passed.iter().fold(0, |sum, passed| sum.saturating_add(passed.deletes))
    }

    fn note(&mut self, now_ms: u64, first: Seq, deletes: u64) {
        match self.passed.back_mut() {
            Some(last) if now_ms < last.at_ms.saturating_add(SECOND_MS) => {
                last.deletes = last.deletes.saturating_add(deletes)
            }
            Some(_) | None => self.passed.push_back(Passed { at_ms: now_ms, first, deletes }),
        }
    }
}

/// More than the share. Where there is no key there is nothing to lose.
fn exceeds(share: Option<f64>, deletes: u64, keys: u64) -> bool {
    keys > 0 && share.is_some_and(|share| deletes as f64 > keys as f64 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REVISION: DeleteShares = DeleteShares { revision: Some(0.1), minute: None };
    const MINUTE: DeleteShares = DeleteShares { revision: None, minute: Some(0.1) };

    /// Judges as the applier does: counts where it is asked to.
    fn judge(breaker: &mut Breaker, now_ms: u64, seq: u64, deletes: u64, keys: u64) -> Judged {
        let mut judged = breaker.judge(now_ms, Seq(seq), deletes);
        if judged == Judged::Count {
            breaker.counted(now_ms, keys, Seq(seq));
            judged = breaker.judge(now_ms, Seq(seq), deletes);
        }
        assert_ne!(judged, Judged::Count, "once is enough");
        judged
    }

    #[test]
    fn a_revision_may_delete_the_configured_share_and_not_one_key_more() {
        for keys in [1_u64, 10, 100, 1_000, 12_345] {
            for deletes in 0..=keys.min(300) {
                let judged = judge(&mut Breaker::new(REVISION), 0, 1, deletes, keys);
                let allowed = deletes * 10 <= keys;
                let held = Judged::Holds { deletes, keys, minute: false };
                assert_eq!(judged, if allowed { Judged::Passes } else { held }, "{deletes} of {keys}");
            }
        }
    }

    #[test]
    fn a_breaker_that_is_off_and_what_deletes_nothing_need_no_count() {
        assert_eq!(Breaker::new(DeleteShares::default()).judge(0, Seq(1), u64::MAX), Judged::Passes);
        assert_eq!(Breaker::new(REVISION).judge(0, Seq(1), 0), Judged::Passes);
        assert_eq!(Breaker::new(REVISION).judge(0, Seq(1), 1), Judged::Count);
        assert_eq!(judge(&mut Breaker::new(REVISION), 0, 1, 5, 0), Judged::Passes, "there is nothing to lose");
    }

    #[test]
    fn a_share_of_nothing_holds_the_first_delete_and_a_whole_one_none() {
        let share = |share| DeleteShares { revision: Some(share), minute: None };
        assert!(matches!(judge(&mut Breaker::new(share(0.0)), 0, 1, 1, 1_000), Judged::Holds { .. }));
        assert_eq!(judge(&mut Breaker::new(share(1.0)), 0, 1, 1_000, 1_000), Judged::Passes);
    }

    #[test]
    fn many_small_deletes_of_one_minute_are_held_and_the_same_over_a_longer_time_are_not() {
        let mut breaker = Breaker::new(MINUTE);
        for seq in 1..=100 {
            assert_eq!(judge(&mut breaker, seq * 500, seq, 1, 1_000 - (seq - 1)), Judged::Passes, "{seq}");
        }
        let held = Judged::Holds { deletes: 101, keys: 1_000, minute: true };
        assert_eq!(judge(&mut breaker, 50_500, 101, 1, 900), held);
        assert_eq!(judge(&mut breaker, 50_600, 101, 1, 900), held, "the same again");

        let mut breaker = Breaker::new(MINUTE);
        for seq in 1..=500_u64 {
            let keys = 5_000 - (seq - 1);
            assert_eq!(judge(&mut breaker, seq * 700, seq, 1, keys), Judged::Passes, "{seq}");
        }
        assert!(breaker.passed.len() <= 61, "{} entries", breaker.passed.len());
    }

    #[test]
    fn what_was_deleted_a_minute_ago_does_not_count_any_more() {
        let mut breaker = Breaker::new(MINUTE);
        assert_eq!(judge(&mut breaker, 0, 1, 100, 1_000), Judged::Passes);
        assert!(matches!(judge(&mut breaker, WINDOW_MS - 1, 2, 1, 900), Judged::Holds { .. }));
        assert_eq!(judge(&mut breaker, WINDOW_MS, 2, 90, 900), Judged::Passes);
    }

    #[test]
    fn a_minute_is_measured_by_what_there_was_when_it_began() {
        let mut breaker = Breaker::new(DeleteShares { revision: None, minute: Some(0.5) });
        assert_eq!(judge(&mut breaker, 0, 1, 30, 100), Judged::Passes);
        // Counted anew with 70 left: half of a hundred may go.
        breaker.counted(1_000, 70, Seq(2));
        assert_eq!(judge(&mut breaker, 1_000, 2, 20, 70), Judged::Passes);
        assert_eq!(judge(&mut breaker, 1_100, 3, 1, 50), Judged::Holds { deletes: 51, keys: 100, minute: true });
    }

    #[test]
    fn nothing_is_held_on_a_count_that_was_made_before() {
        let mut breaker = Breaker::new(REVISION);
        assert_eq!(judge(&mut breaker, 0, 1, 1, 10), Judged::Passes);
        // Ten thousand keys came since.
        assert_eq!(breaker.judge(1_000, Seq(2), 500), Judged::Count);
        assert_eq!(judge(&mut breaker, 1_000, 2, 500, 10_000), Judged::Passes);
    }

    #[test]
    fn a_count_grows_old() {
        let mut breaker = Breaker::new(REVISION);
        assert_eq!(judge(&mut breaker, 0, 1, 1, 1_000), Judged::Passes);
        assert_eq!(breaker.judge(COUNT_AGE_MS_MAX - 1, Seq(2), 1), Judged::Passes);
        assert_eq!(breaker.judge(COUNT_AGE_MS_MAX, Seq(3), 1), Judged::Count);
    }

    #[test]
    fn after_what_was_allowed_the_minute_begins_afresh() {
        let mut breaker = Breaker::new(MINUTE);
        assert_eq!(judge(&mut breaker, 0, 1, 100, 1_000), Judged::Passes);
        assert!(matches!(judge(&mut breaker, 1, 2, 500, 900), Judged::Holds { .. }));
        breaker.start_afresh();
        assert_eq!(judge(&mut breaker, 2, 3, 40, 400), Judged::Passes);
        assert!(matches!(judge(&mut breaker, 3, 4, 1, 360), Judged::Holds { deletes: 41, keys: 400, minute: true }));
    }

    #[test]
    fn what_comes_again_is_counted_once() {
        let mut breaker = Breaker::new(MINUTE);
        assert_eq!(judge(&mut breaker, 0, 1, 50, 1_000), Judged::Passes);
        assert_eq!(judge(&mut breaker, 2_000, 2, 50, 1_000), Judged::Passes);
        breaker.forget_after(Seq(1));
        assert_eq!(judge(&mut breaker, 4_000, 2, 50, 950), Judged::Passes);
        assert!(matches!(judge(&mut breaker, 6_000, 3, 1, 900), Judged::Holds { deletes: 101, .. }));
    }
}
