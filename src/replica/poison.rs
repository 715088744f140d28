//! Job: single out the revision that the replica refuses, and say when it is given up; the life of a revision in the dedupe log.
//! Input: which revisions a transaction held, and whether it was refused or applied. Output: how many to try next; a verdict; states.
//! Pure: no clock, no I/O.
//! Always true: a revision is given up only after it was refused alone, so often, and for a reason that lies in itself.
//!
//! Only what is refused again whenever it is tried counts: too large, no revision, not permitted. What passes by itself (unreachable, no leader,
//! no space, too late) never comes here.

use crate::model::Seq;

/// What is not permitted may be permitted in a moment, since somebody is changing the rights: with the applier's back-off (a second at most)
/// so many refusals take 5 to 8 seconds.
pub const REFUSALS_MAX: u32 = 8;

/// What the dedupe log holds of one revision, beside the mark up to which all are done. Whether one that is neither is pending or being applied
/// is known in memory alone: after a crash only the position can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeqState {
    /// In the journal, and perhaps on its way to etcd.
    Pending,
    /// Refused so often; tried again.
    Failed { refusals: u32 },
    /// Given up: the link went on without it.
    Quarantined,
}

impl SeqState {
    pub fn to_bytes(self) -> [u8; 2] {
        match self {
            SeqState::Pending => [0, 0],
            SeqState::Failed { refusals } => [1, u8::try_from(refusals).unwrap_or(u8::MAX)],
            SeqState::Quarantined => [2, 0],
        }
    }

    pub fn from_bytes(bytes: [u8; 2]) -> Option<Self> {
        match bytes {
            [0, 0] => Some(SeqState::Pending),
            [1, refusals] => Some(SeqState::Failed { refusals: refusals.into() }),
            [2, 0] => Some(SeqState::Quarantined),
            _ => None,
        }
    }

    /// Whether the one may follow the other: refusals only grow, and what is given up stays so.
    pub fn may_become(self, next: SeqState) -> bool {
        match (self, next) {
            (SeqState::Quarantined, _) | (_, SeqState::Pending) => false,
            (SeqState::Failed { refusals }, SeqState::Failed { refusals: now }) => now > refusals,
            (SeqState::Pending | SeqState::Failed { .. }, _) => true,
        }
    }
}

/// What follows from a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Several were refused together: try fewer at once.
    Narrow,
    /// It was refused alone, for so many times.
    Again { refusals: u32 },
    /// It is given up.
    Poison { refusals: u32 },
}

/// The search for the revision that is refused, among those that wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trial {
    /// The first so many that wait hold it; 0: nothing is searched.
    suspects: usize,
    refused: Option<(Seq, u32)>,
}

impl Trial {
    /// As an earlier process left it.
    pub fn remembered(seq: Seq, refusals: u32) -> Self {
        Self { suspects: 1, refused: Some((seq, refusals)) }
    }

    /// How many revisions the next transaction may hold.
    pub fn revisions_max(&self) -> usize {
        if self.suspects == 0 { usize::MAX } else { (self.suspects / 2).max(1) }
    }

    pub fn is_searching(&self) -> bool {
        self.suspects > 0
    }

    /// A transaction with so many revisions, the first of them `first`, was refused. `surely`: it would be again.
    pub fn refused(&mut self, first: Seq, revisions: usize, surely: bool) -> Verdict {
        self.suspects = revisions.max(1);
        if revisions > 1 {
            return Verdict::Narrow;
        }
        let before = self.refused.filter(|(seq, _)| *seq == first).map_or(0, |(_, refusals)| refusals);
        let refusals = before.saturating_add(1);
        self.refused = Some((first, refusals));
        if surely || refusals >= REFUSALS_MAX { Verdict::Poison { refusals } } else { Verdict::Again { refusals } }
    }

    /// The first so many are in, or given up.
    pub fn passed(&mut self, revisions: usize) {
        self.suspects = self.suspects.saturating_sub(revisions);
        if self.suspects == 0 {
            self.refused = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Applies `count` revisions of which some are refused, as the applier does; the seqs that were given up, and how many transactions it took.
    fn search(count: u64, poisoned: &[u64]) -> (Vec<u64>, u32) {
        let (mut trial, mut given_up, mut transactions) = (Trial::default(), Vec::new(), 0);
        let mut next = 1;
        while next <= count {
            let sent = (count - next + 1).min(u64::try_from(trial.revisions_max()).unwrap_or(u64::MAX));
            let held = next..next + sent;
            transactions += 1;
            let revisions = usize::try_from(sent).unwrap();
            if !poisoned.iter().any(|seq| held.contains(seq)) {
                trial.passed(revisions);
                next += sent;
                continue;
            }
            match trial.refused(Seq(next), revisions, false) {
                Verdict::Narrow => assert!(revisions > 1),
                Verdict::Again { refusals } => assert!(revisions == 1 && refusals < REFUSALS_MAX),
                Verdict::Poison { refusals } => {
                    assert!(revisions == 1 && refusals == REFUSALS_MAX);
                    given_up.push(next);
                    trial.passed(1);
                    next += 1;
                }
            }
        }
        assert!(!trial.is_searching());
        (given_up, transactions)
    }

    #[test]
    fn of_any_merged_revisions_exactly_those_that_are_refused_alone_are_given_up() {
        for count in 1..=33 {
            for one in 1..=count {
                assert_eq!(search(count, &[one]).0, [one], "of {count}");
                for two in one + 1..=count {
                    assert_eq!(search(count, &[one, two]).0, [one, two], "of {count}");
                }
            }
            assert_eq!(search(count, &[]), (Vec::new(), 1));
        }
    }

    #[test]
    fn the_one_among_thousands_is_found_by_halves() {
        let (given_up, transactions) = search(4_096, &[3_000]);
        assert_eq!(given_up, [3_000]);
        assert!(transactions < 40 + REFUSALS_MAX, "{transactions} transactions");
    }

    #[test]
    fn what_would_surely_be_refused_again_is_not_tried_again_and_what_is_merged_is_never_given_up() {
        let mut trial = Trial::default();
        assert_eq!(trial.refused(Seq(5), 3, true), Verdict::Narrow);
        assert_eq!(trial.refused(Seq(5), 1, true), Verdict::Poison { refusals: 1 });
    }

    #[test]
    fn refusals_are_counted_for_one_revision_and_go_on_where_an_earlier_process_stopped() {
        let mut trial = Trial::default();
        assert_eq!(trial.refused(Seq(5), 1, false), Verdict::Again { refusals: 1 });
        assert_eq!(trial.refused(Seq(6), 1, false), Verdict::Again { refusals: 1 });
        let mut trial = Trial::remembered(Seq(5), REFUSALS_MAX - 1);
        assert_eq!(trial.revisions_max(), 1);
        assert_eq!(trial.refused(Seq(5), 1, false), Verdict::Poison { refusals: REFUSALS_MAX });
        trial.passed(1);
        assert_eq!(trial, Trial::default());
    }

    const STATES: [SeqState; 4] =
        [SeqState::Pending, SeqState::Failed { refusals: 1 }, SeqState::Failed { refusals: 2 }, SeqState::Quarantined];

    #[test]
    fn a_state_is_read_as_it_was_written_and_other_bytes_are_none() {
        for state in STATES {
            assert_eq!(SeqState::from_bytes(state.to_bytes()), Some(state));
        }
        for bytes in [[3, 0], [0, 1], [2, 1], [255, 255]] {
            assert_eq!(SeqState::from_bytes(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn a_revision_fails_more_often_or_is_given_up_and_never_goes_back() {
        for (i, from) in STATES.into_iter().enumerate() {
            for (k, to) in STATES.into_iter().enumerate() {
                assert_eq!(from.may_become(to), i < k, "{from:?} to {to:?}");
            }
        }
    }
}
