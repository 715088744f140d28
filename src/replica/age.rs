//! Job: up to which revision an etcd may be compacted, by age.
//! Input: its head now and then, by a clock handed in; the revisions that somebody still reads at. Output: a revision to compact to.
//! Pure: no clock, no I/O.
//! Always true: what is younger than the age stays, and what is read at stays for a bounded time longer; a head that was never seen is never old.

use crate::model::Revision;
use std::collections::VecDeque;
use std::time::Duration;

/// Who still reads at a revision holds compaction up for so long at the most, and not for longer than the age itself: a comparison takes minutes,
/// and whoever is stuck must not let the replica fill its disk.
const SPARED_MAX: Duration = Duration::from_secs(3_600);
/// A head is looked at so often in an age: what is compacted is older than the age by at most one such step.
const LOOKS_AN_AGE: u32 = 64;
const LOOK_INTERVAL_MIN: Duration = Duration::from_secs(1);
/// They reach back over the age and as long again.
const HEADS_MAX: usize = 2 * LOOKS_AN_AGE as usize + 2;

/// Heads by the time at which they were seen, since the process began.
#[derive(Debug)]
pub struct Ages {
    after: Duration,
    heads: VecDeque<(Duration, Revision)>,
    compacted: Revision,
}

/// How often a head is to be looked at, for compaction at this age.
pub fn look_interval(after: Duration) -> Duration {
    (after / LOOKS_AN_AGE).max(LOOK_INTERVAL_MIN)
}

impl Ages {
    /// What is younger than `after` stays.
    pub fn new(after: Duration) -> Self {
        Self { after, heads: VecDeque::new(), compacted: Revision(0) }
    }

    pub fn saw(&mut self, at: Duration, head: Revision) {
        // An etcd that was restored begins anew.
        self.heads.retain(|(_, seen)| *seen <= head);
        if self.compacted > head {
            self.compacted = Revision(0);
        }
        if self.heads.len() == HEADS_MAX {
            self.heads.pop_front();
        }
        self.heads.push_back((at, head));
    }

    /// The newest head that is old enough, but not beyond what `read_at` needs; `None`: nothing new to compact.
    pub fn due(&self, now: Duration, read_at: &[Revision]) -> Option<Revision> {
        let old = self.seen_before(now.checked_sub(self.after)?)?;
        let very_old = now
            .checked_sub(self.after + self.after.min(SPARED_MAX))
            .and_then(|at| self.seen_before(at))
            .unwrap_or(Revision(0));
        let spared = read_at.iter().copied().filter(|revision| *revision >= very_old).min();
        let target = spared.map_or(old, |spared| spared.min(old));
        (target > self.compacted && target > Revision(0)).then_some(target)
    }

    pub fn compacted(&mut self, through: Revision) {
        self.compacted = self.compacted.max(through);
    }

    fn seen_before(&self, at: Duration) -> Option<Revision> {
        self.heads.iter().rev().find(|(seen, _)| *seen <= at).map(|(_, head)| *head)
    }
}

/// Whether giving back what is free is worth the time in which the member does not answer: half of a file that is not small.
pub fn worth_defragmenting(bytes: u64, bytes_in_use: u64) -> bool {
    const BYTES_MIN: u64 = 32 << 20;
    bytes >= BYTES_MIN && bytes_in_use <= bytes / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn minutes(n: u64) -> Duration {
        Duration::from_secs(60 * n)
    }

    /// One revision each second, seen each minute for so long.
    fn seen(until: u64) -> Ages {
        let mut ages = Ages::new(HOUR);
        (0..=until).for_each(|minute| ages.saw(minutes(minute), Revision(60 * minute + 1)));
        ages
    }

    #[test]
    fn what_was_the_head_an_age_ago_is_compacted_to_and_never_a_second_time() {
        let mut ages = seen(90);
        assert_eq!(ages.due(minutes(90), &[]), Some(Revision(60 * 30 + 1)));
        ages.compacted(Revision(60 * 30 + 1));
        assert_eq!(ages.due(minutes(90), &[]), None);
        ages.saw(minutes(91), Revision(9_000));
        assert_eq!(ages.due(minutes(91), &[]), Some(Revision(60 * 31 + 1)));
    }

    #[test]
    fn before_an_age_has_passed_nothing_is_compacted() {
        assert_eq!(seen(59).due(minutes(59), &[]), None);
        assert_eq!(Ages::new(HOUR).due(minutes(600), &[]), None);
    }

    #[test]
    fn what_is_read_at_is_spared_for_as_long_again_and_no_longer() {
        let mark = Revision(60 * 10 + 1);
        for (now, expected) in [(65, Revision(60 * 5 + 1)), (75, mark), (130, mark), (131, Revision(60 * 71 + 1))] {
            assert_eq!(seen(now).due(minutes(now), &[mark, Revision(6_000)]), Some(expected), "minute {now}");
        }
    }

    #[test]
    fn an_etcd_that_was_restored_begins_anew() {
        let mut ages = seen(90);
        ages.compacted(Revision(1_801));
        ages.saw(minutes(91), Revision(700));
        assert_eq!(ages.due(minutes(91), &[]), Some(Revision(60 * 11 + 1)), "the heads that it still has count");
        assert_eq!(ages.due(minutes(150), &[]), Some(Revision(60 * 11 + 1)));
    }

    #[test]
    fn heads_reach_back_over_the_age_and_what_is_spared_however_long_that_is() {
        for after in [Duration::from_secs(1), Duration::from_secs(100), HOUR, 24 * HOUR, 366 * 24 * HOUR] {
            let (mut ages, mut at) = (Ages::new(after), Duration::ZERO);
            let end = 5 * after;
            while at < end {
                ages.saw(at, Revision(at.as_secs() + 1));
                at += look_interval(after);
            }
            let step = look_interval(after).as_secs() + 1;
            let near = |due: Option<Revision>, exact: Duration| {
                let (due, exact) = (due.unwrap().0, exact.as_secs() + 1);
                assert!(due <= exact && exact - due <= step, "{after:?}: {due} of {exact}");
            };
            near(ages.due(end, &[]), end - after);
            let spared = Revision((end - after - after.min(SPARED_MAX)).as_secs() + 1 + step);
            assert_eq!(ages.due(end, &[spared]), Some(spared.min(ages.due(end, &[]).unwrap())));
            assert!(ages.heads.len() <= HEADS_MAX);
        }
    }

    #[test]
    fn a_file_that_is_small_or_mostly_in_use_is_not_defragmented() {
        assert!(worth_defragmenting(64 << 20, 20 << 20));
        assert!(!worth_defragmenting(64 << 20, 40 << 20));
        assert!(!worth_defragmenting(8 << 20, 1 << 20));
    }
}
