//! Job: tell a link that makes no progress though there is some to make, where it stands still, and when something is to be done about it.
//! Input: at each look, what waits before each stage and how far the stage is; the time. Output: a `Verdict`.
//! Pure: no clock, no I/O.
//! Always true: a stage that moves, or has nothing before it, is never stalled; while nobody looks, no time passes; what is to be done
//! comes less and less often.

use super::LinkState;

/// A place at which a link can stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// At the origin: etcd's head is above what its watch has shown, or no watch is open.
    Watch,
    /// At the origin: the replica's sidecar says something every few seconds.
    Receipts,
    /// At the origin: a base copy is under way.
    Copy,
    /// At the origin: what was shipped is not received yet.
    Receive,
    /// At either end: what was received is not applied yet.
    Apply,
    /// At the replica: the origin's sidecar says something every few seconds.
    Heard,
}

/// What is seen of one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub stage: Stage,
    /// Something waits for it.
    pub pending: bool,
    /// How far it is: any change is progress.
    pub mark: (u64, u64),
    /// So much longer may one step of it take, since it is a large one.
    pub allowance_ms: u64,
}

/// The stage that stands still, the first of those that do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stalled {
    pub stage: Stage,
    pub for_ms: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verdict {
    pub stalled: Option<Stalled>,
    /// It began to stand still with this look.
    pub begins: bool,
    /// It stood still until this look, and makes progress again.
    pub ends: bool,
    /// It is time to do what may help; rarer each time.
    pub react: bool,
}

/// Longer between two looks, and it was the whole process that stood still.
const LOOKS_APART_MAX_MS: u64 = 2_000;
/// What may help is done at most so often, once it has not helped.
const REACT_EVERY_MS_MAX: u64 = 600_000;

/// Looks at the stages of one side of a link.
#[derive(Debug, Clone)]
pub struct Watchdog {
    limit_ms: u64,
    /// Since when each stage is where it is.
    stages: Vec<(Seen, u64)>,
    looked_ms: u64,
    reacting: Option<Reacting>,
}

#[derive(Debug, Clone, Copy)]
struct Reacting {
    stage: Stage,
    next_for_ms: u64,
}

impl Watchdog {
    /// `limit_ms`: so long without progress is a stall.
    pub fn new(limit_ms: u64) -> Self {
        Self { limit_ms, stages: Vec::new(), looked_ms: 0, reacting: None }
    }

    /// One look at a link in `state`; one that is not to make progress now is not looked at. A stall ends with progress, not with a stream that is
    /// given up for it. `seen`: the same stages at each look, those first whose standing still explains the others'.
    pub fn turn(&mut self, state: LinkState, seen: &[Seen], now_ms: u64) -> Verdict {
        let stood_still = self.is_stalled();
        let looks = state.is_under_way() || state == LinkState::Connecting && stood_still;
        if !looks {
            self.forget();
            return Verdict::default();
        }
        let verdict = self.look(seen, now_ms);
        Verdict { ends: stood_still && verdict.stalled.is_none(), ..verdict }
    }

    fn is_stalled(&self) -> bool {
        self.reacting.is_some()
    }

    fn forget(&mut self) {
        (self.reacting, self.stages) = (None, Vec::new());
    }

    fn look(&mut self, seen: &[Seen], now_ms: u64) -> Verdict {
        let lost_ms = now_ms.saturating_sub(self.looked_ms);
        let lost_ms = if lost_ms > LOOKS_APART_MAX_MS { lost_ms } else { 0 };
        self.looked_ms = now_ms;
        let since = |before: Option<&(Seen, u64)>, seen: &Seen| match before {
            Some((was, since_ms)) if seen.pending && was.pending && was.mark == seen.mark => {
                (since_ms + lost_ms).min(now_ms)
            }
            Some(_) | None => now_ms,
        };
        let before = std::mem::take(&mut self.stages);
        self.stages = seen
            .iter()
            .map(|seen| (*seen, since(before.iter().find(|(was, _)| was.stage == seen.stage), seen)))
            .collect();
        let stalled = self.stages.iter().find_map(|(seen, since_ms)| {
            let for_ms = now_ms - since_ms;
            (seen.pending && for_ms >= self.limit_ms.saturating_add(seen.allowance_ms))
                .then_some(Stalled { stage: seen.stage, for_ms })
        });
        let Some(Stalled { stage, for_ms }) = stalled else {
            self.reacting = None;
            return Verdict::default();
        };
        let goes_on = self.reacting.filter(|reacting| reacting.stage == stage);
        let react = goes_on.is_none_or(|reacting| for_ms >= reacting.next_for_ms);
        if react {
            let pause_ms = for_ms.clamp(self.limit_ms.min(REACT_EVERY_MS_MAX), REACT_EVERY_MS_MAX);
            self.reacting = Some(Reacting { stage, next_for_ms: for_ms.saturating_add(pause_ms) });
        }
        Verdict { stalled, begins: goes_on.is_none(), ends: false, react }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: u64 = 10_000;

    fn seen(stage: Stage, mark: u64) -> Seen {
        Seen { stage, pending: true, mark: (mark, 0), allowance_ms: 0 }
    }

    /// Looks each second, from `from` up to and with `to`; what the last look says.
    fn looked(dog: &mut Watchdog, seen: &[Seen], from: u64, to: u64) -> Verdict {
        let mut last = Verdict::default();
        for now_ms in (from..=to).step_by(1_000) {
            last = dog.look(seen, now_ms);
        }
        last
    }

    #[test]
    fn a_stage_that_stands_still_with_something_before_it_is_stalled_after_the_limit_and_not_before() {
        let mut dog = Watchdog::new(LIMIT);
        let still = [seen(Stage::Apply, 5)];
        assert_eq!(looked(&mut dog, &still, 1_000, 10_000), Verdict::default());
        let verdict = dog.look(&still, 11_000);
        assert_eq!(verdict.stalled, Some(Stalled { stage: Stage::Apply, for_ms: 10_000 }));
        assert!(verdict.begins && verdict.react);
        let later = dog.look(&still, 12_000);
        assert!(later.stalled.is_some() && !later.begins && !later.react, "{later:?}");
    }

    #[test]
    fn progress_of_either_kind_and_having_nothing_to_do_end_a_stall_and_begin_its_time_anew() {
        let idle = Seen { pending: false, ..seen(Stage::Apply, 5) };
        let other = Seen { mark: (5, 1), ..seen(Stage::Apply, 5) };
        for moved in [seen(Stage::Apply, 6), other, idle] {
            let mut dog = Watchdog::new(LIMIT);
            assert!(looked(&mut dog, &[seen(Stage::Apply, 5)], 0, 12_000).stalled.is_some());
            assert_eq!(dog.look(&[moved], 13_000), Verdict::default());
            let again = Seen { pending: true, ..moved };
            assert_eq!(looked(&mut dog, &[again], 14_000, 22_000), Verdict::default());
            assert!(looked(&mut dog, &[again], 23_000, 24_000).stalled.is_some());
        }
    }

    #[test]
    fn the_stage_whose_standing_still_explains_the_others_is_told() {
        let mut dog = Watchdog::new(LIMIT);
        let stages = [seen(Stage::Receipts, 1), seen(Stage::Receive, 1), seen(Stage::Apply, 1)];
        let verdict = looked(&mut dog, &stages, 0, 10_000);
        assert_eq!(verdict.stalled.map(|s| s.stage), Some(Stage::Receipts));
        let stages = [seen(Stage::Receipts, 2), seen(Stage::Receive, 1), seen(Stage::Apply, 1)];
        let verdict = dog.look(&stages, 11_000);
        assert_eq!(verdict.stalled, Some(Stalled { stage: Stage::Receive, for_ms: 11_000 }));
        assert!(verdict.begins, "another stage is another stall");
    }

    #[test]
    fn a_large_step_has_the_time_that_it_takes() {
        let mut dog = Watchdog::new(LIMIT);
        let large = [Seen { allowance_ms: 60_000, ..seen(Stage::Receive, 1) }];
        assert_eq!(looked(&mut dog, &large, 0, 69_000), Verdict::default());
        assert!(dog.look(&large, 70_000).stalled.is_some());
    }

    #[test]
    fn time_in_which_nobody_looked_is_no_stall() {
        let mut dog = Watchdog::new(LIMIT);
        let still = [seen(Stage::Heard, 1)];
        looked(&mut dog, &still, 0, 4_000);
        assert_eq!(dog.look(&still, 500_000), Verdict::default(), "the process was paused");
        assert_eq!(looked(&mut dog, &still, 501_000, 505_000), Verdict::default());
        assert_eq!(dog.look(&still, 506_000).stalled, Some(Stalled { stage: Stage::Heard, for_ms: 10_000 }));
    }

    #[test]
    fn a_stall_is_known_until_the_stage_moves_or_is_not_to_move_any_more() {
        let mut dog = Watchdog::new(LIMIT);
        assert!(!dog.is_stalled());
        let still = [seen(Stage::Receipts, 1)];
        looked(&mut dog, &still, 0, 10_000);
        assert!(dog.is_stalled());
        dog.look(&[seen(Stage::Receipts, 2)], 11_000);
        assert!(!dog.is_stalled());
        looked(&mut dog, &still, 12_000, 22_000);
        assert!(dog.is_stalled());
        dog.forget();
        assert!(!dog.is_stalled());
        assert_eq!(looked(&mut dog, &still, 23_000, 32_000), Verdict::default());
    }

    #[test]
    fn a_link_that_is_not_to_make_progress_is_not_looked_at_unless_it_connects_again_since_it_stood_still() {
        let mut dog = Watchdog::new(LIMIT);
        let still = [seen(Stage::Receipts, 1)];
        let mut turns = |state, seconds: std::ops::RangeInclusive<u64>| {
            let verdicts = seconds.map(|second| dog.turn(state, &still, second * 1_000));
            verdicts.last().unwrap_or_default()
        };
        assert_eq!(turns(LinkState::Connecting, 0..=30), Verdict::default());
        assert_eq!(turns(LinkState::Following, 31..=40), Verdict::default(), "it is looked at since it follows");
        assert!(turns(LinkState::Following, 41..=41).begins);
        for (state, seconds) in [(LinkState::Stalled, 42..=43), (LinkState::Connecting, 44..=60)] {
            let verdict = turns(state, seconds);
            assert!(verdict.stalled.is_some() && !verdict.begins && !verdict.ends, "{state:?}: {verdict:?}");
        }
        assert_eq!(turns(LinkState::Paused, 61..=61), Verdict::default());
        assert_eq!(turns(LinkState::Connecting, 62..=90), Verdict::default());
    }

    #[test]
    fn the_end_of_a_stall_is_told_once_and_only_where_it_ends_with_progress() {
        for (state, ends) in [(LinkState::Stalled, true), (LinkState::Connecting, true), (LinkState::Paused, false)] {
            let mut dog = Watchdog::new(LIMIT);
            assert!(looked(&mut dog, &[seen(Stage::Apply, 1)], 0, 10_000).stalled.is_some());
            let moved = [seen(Stage::Apply, 2)];
            assert_eq!(dog.turn(state, &moved, 11_000), Verdict { ends, ..Verdict::default() }, "{state:?}");
            assert_eq!(dog.turn(LinkState::Following, &moved, 12_000), Verdict::default(), "{state:?}");
        }
    }

    #[test]
    fn what_may_help_is_done_ever_more_rarely() {
        let mut dog = Watchdog::new(LIMIT);
        let still = [seen(Stage::Watch, 1)];
        let times: Vec<u64> =
            (0..4_000).map(|second| second * 1_000).filter(|now| dog.look(&still, *now).react).collect();
        assert_eq!(
            times,
            [
                10_000, 20_000, 40_000, 80_000, 160_000, 320_000, 640_000, 1_240_000, 1_840_000, 2_440_000, 3_040_000,
                3_640_000
            ]
        );
    }

    proptest! {
        #[test]
        fn a_stage_is_stalled_exactly_where_it_was_pending_and_unmoved_for_the_limit(
            // Mostly pending and unmoved, or none would stand still for so long.
            steps in prop::collection::vec((prop::bool::weighted(0.95), prop::bool::weighted(0.05), 1_u64..2_000), 1..200),
        ) {
            let mut dog = Watchdog::new(LIMIT);
            let (mut now_ms, mut mark, mut since) = (0, 0, None::<(u64, u64)>);
            for (pending, moved, apart_ms) in steps {
                now_ms += apart_ms;
                mark += u64::from(moved);
                since = since.filter(|(was, _)| pending && *was == mark).or(pending.then_some((mark, now_ms)));
                let verdict = dog.look(&[Seen { pending, ..seen(Stage::Receive, mark) }], now_ms);
                let stalled = since.is_some_and(|(_, at)| now_ms - at >= LIMIT);
                prop_assert_eq!(verdict.stalled.is_some(), stalled);
                prop_assert!(!verdict.react || stalled);
                prop_assert!(!verdict.begins || verdict.react);
            }
        }
    }
}
