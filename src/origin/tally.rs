//! Job: what one comparison has come to: what is still to be compared, what is asked at a mark, which keys differ.
//! Input: what was asked, the replica's answers. Output: what is left to do; `Compared`.
//! Pure: no clock, no I/O, no async.
//! Always true: a part is counted once, when all of it was compared at one mark; what was not is left to be done again, whole.

use super::found::{Compared, cut_at, found_of, subs_of};
use crate::model::{KeyRange, PartsProgress, Revision};
use crate::wire::parts::{DifferingKey, Part};
use crate::wire::replicate as wire;
use crate::wire::replicate::part_answer::Outcome;
use std::collections::VecDeque;

/// Differing keys that are kept by name, with their bytes; beyond it they are only counted.
pub(super) const FOUND_KEYS_MAX: usize = 100_000;
const FOUND_BYTES_MAX: usize = 16 << 20;

/// The replica's answer is not to what was asked.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the replica's answer is not to what was asked: are both sidecars of one version?")]
pub(super) struct OtherAnswer;

/// A question that is not answered yet.
pub(super) enum Open {
    Parts(Vec<Part>),
    /// The keys of parts that differ.
    Lists(Vec<Narrowed>),
    /// So many lists of keys that are looked at once more.
    Again(usize),
}

/// A part that differs, of which as many lists of keys are asked about.
pub(super) struct Narrowed {
    pub range: KeyRange,
    pub keys: u64,
    pub lists: usize,
}

/// A mark that is on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    pub id: u64,
    /// What the origin holds at this revision was shipped before the mark.
    pub at: Revision,
}

/// What is under way at one mark.
pub(super) struct Round {
    pub mark: Mark,
    pub open: VecDeque<Open>,
    /// Parts that differ, with the replica's sub-parts: what is asked about next.
    pub differing: VecDeque<(Part, Vec<Part>)>,
    pub done: u64,
    pub question_parts: usize,
    /// Why nothing more can be compared at this mark.
    pub over: Option<String>,
}

impl Round {
    pub fn at(mark: Mark) -> Self {
        let (open, differing) = (VecDeque::new(), VecDeque::new());
        Self { mark, open, differing, done: 0, question_parts: 1, over: None }
    }
}

#[derive(Default)]
pub(super) struct Tally {
    /// What is still to be compared, and at a new mark.
    pub todo: VecDeque<KeyRange>,
    pub compared: Compared,
    pub progress: PartsProgress,
    found_bytes: usize,
}

impl Tally {
    /// The replica has no such mark any more: what was asked at it is asked again. `open`: what the answer would have been to.
    pub fn mark_failed(&mut self, round: &mut Round, open: Option<Open>, reason: String) {
        for open in open.into_iter().chain(round.open.drain(..)) {
            match open {
                Open::Parts(parts) => self.todo.extend(parts.into_iter().map(|part| part.range)),
                Open::Lists(parts) => self.todo.extend(parts.into_iter().map(|part| part.range)),
                // Whoever looks again begins with all of them.
                Open::Again(_) => {}
            }
        }
        self.todo.extend(round.differing.drain(..).map(|(part, _)| part.range));
        round.over = Some(reason);
    }

    pub fn take_parts(
        &mut self,
        round: &mut Round,
        asked: Vec<Part>,
        answers: Vec<wire::PartAnswer>,
    ) -> Result<(), OtherAnswer> {
        asked.into_iter().zip(answers).try_for_each(|(asked, answer)| self.take_part(round, asked, answer))
    }

    fn take_part(&mut self, round: &mut Round, asked: Part, answer: wire::PartAnswer) -> Result<(), OtherAnswer> {
        match answer.outcome() {
            Outcome::Equal => self.did(round, asked.keys),
            Outcome::Differs => {
                let subs = subs_of(answer.subs, &asked.range).ok_or(OtherAnswer)?;
                round.differing.push_back((asked, subs));
            }
            Outcome::Compacted => {
                self.todo.push_back(asked.range);
                round.over = Some("the replica was compacted".to_owned());
            }
            Outcome::Wide => {
                let pieces = cut_at(&asked.range, answer.edges).ok_or(OtherAnswer)?;
                self.progress.parts_total += pieces.len() as u64 - 1;
                self.todo.extend(pieces);
            }
            Outcome::Unspecified => return Err(OtherAnswer),
        }
        Ok(())
    }

    /// `answers`: as many as all the parts have lists. A part of which one list could not be compared is left to be done again as a whole:
    /// what its other lists named would be named twice.
    pub fn take_lists(
        &mut self,
        round: &mut Round,
        asked: Vec<Narrowed>,
        answers: Vec<wire::KeyListAnswer>,
    ) -> Result<(), OtherAnswer> {
        let mut answers = answers.into_iter();
        for part in asked {
            let of_part: Vec<wire::KeyListAnswer> = answers.by_ref().take(part.lists).collect();
            if of_part.iter().any(|answer| answer.compacted) {
                self.todo.push_back(part.range);
                round.over = Some("the replica was compacted".to_owned());
                continue;
            }
            of_part.into_iter().flat_map(|answer| answer.keys).try_for_each(|key| self.note(key))?;
            self.did(round, part.keys);
        }
        Ok(())
    }

    /// The lists of keys that are looked at once more: all of them count, or none.
    pub fn take_again(&mut self, round: &mut Round, answers: Vec<wire::KeyListAnswer>) -> Result<(), OtherAnswer> {
        if answers.iter().any(|answer| answer.compacted) {
            round.over = Some("the replica was compacted".to_owned());
            return Ok(());
        }
        answers.into_iter().flat_map(|answer| answer.keys).try_for_each(|key| self.note(key))
    }

    /// One part more, of so many keys of the origin.
    fn did(&mut self, round: &mut Round, keys: u64) {
        round.done += 1;
        self.compared.keys += keys;
        self.progress.parts_done += 1;
        self.progress.parts_total = self.progress.parts_total.max(self.progress.parts_done);
    }

    fn note(&mut self, key: wire::DifferingKey) -> Result<(), OtherAnswer> {
        let quarantined = key.quarantined;
        let found = found_of(key).ok_or(OtherAnswer)?;
        self.compared.differing += 1;
        let found_bytes = self.found_bytes + found.key.len();
        if self.compared.found.len() < FOUND_KEYS_MAX && found_bytes <= FOUND_BYTES_MAX {
            self.found_bytes = found_bytes;
            if quarantined {
                self.compared.quarantined.insert(found.key.clone());
            }
            self.compared.found.push(found);
        }
        Ok(())
    }

    /// What was kept by name, which is noted anew from here on.
    pub fn take_found(&mut self) -> Vec<DifferingKey> {
        self.found_bytes = 0;
        std::mem::take(&mut self.compared.found)
    }

    /// Forgets what was noted after the first so many.
    pub fn forget_after(&mut self, kept: usize) {
        let forgotten = self.compared.found.drain(kept..).map(|found| found.key.len()).sum::<usize>();
        self.found_bytes -= forgotten;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Digest;
    use crate::origin::found::{Mending, guard_deletes};
    use bytes::Bytes;

    fn range(from: &'static str, to: &'static str) -> KeyRange {
        KeyRange { from: from.into(), to: to.into() }
    }

    fn part(range: KeyRange, keys: u64) -> Part {
        Part { range, keys, digest: Digest::default() }
    }

    fn round() -> Round {
        Round::at(Mark { id: 1, at: Revision(9) })
    }

    fn outcome(outcome: Outcome) -> wire::PartAnswer {
        wire::PartAnswer { outcome: outcome.into(), ..wire::PartAnswer::default() }
    }

    /// With one sub-part, which is all of it.
    fn differs(range: &KeyRange) -> wire::PartAnswer {
        let sub =
            wire::Part { from: range.from.clone(), to: range.to.clone(), keys: 1, digest: Bytes::from(vec![0; 16]) };
        wire::PartAnswer { subs: vec![sub], ..outcome(Outcome::Differs) }
    }

    fn extra(key: String) -> wire::DifferingKey {
        let difference = wire::differing_key::Difference::Extra.into();
        wire::DifferingKey { key: Bytes::from(key), difference, ..wire::DifferingKey::default() }
    }

    fn named(count: usize) -> wire::KeyListAnswer {
        let keys = (0..count).map(|n| extra(format!("b{n:04}"))).collect();
        wire::KeyListAnswer { keys, ..wire::KeyListAnswer::default() }
    }

    fn compacted() -> wire::KeyListAnswer {
        wire::KeyListAnswer { compacted: true, ..wire::KeyListAnswer::default() }
    }

    /// Asks about the part that differs, in so many lists.
    fn asked_about(round: &mut Round, lists: usize) -> Vec<Narrowed> {
        let (part, _) = round.differing.pop_front().unwrap();
        vec![Narrowed { range: part.range, keys: part.keys, lists }]
    }

    #[test]
    fn however_often_a_part_is_compared_again_its_keys_count_once_and_the_guard_sees_the_true_share() {
        let mut tally = Tally::default();
        let whole = range("b", "c");
        let mut first = round();
        tally.take_parts(&mut first, vec![part(whole.clone(), 900)], vec![differs(&whole)]).unwrap();
        let asked = asked_about(&mut first, 1);
        tally.mark_failed(&mut first, Some(Open::Lists(asked)), "gone".to_owned());
        assert_eq!((first.done, tally.compared.keys, tally.todo.pop_front()), (0, 0, Some(whole.clone())));

        let mut second = round();
        tally.take_parts(&mut second, vec![part(whole.clone(), 900)], vec![differs(&whole)]).unwrap();
        tally.mark_failed(&mut second, None, "gone".to_owned());
        assert_eq!((second.done, tally.compared.keys, tally.todo.pop_front()), (0, 0, Some(whole.clone())));

        let mut third = round();
        tally.take_parts(&mut third, vec![part(whole.clone(), 900)], vec![differs(&whole)]).unwrap();
        let asked = asked_about(&mut third, 2);
        tally.take_lists(&mut third, asked, vec![named(150), compacted()]).unwrap();
        assert_eq!((third.done, tally.compared.differing), (0, 0), "what its first list named comes again");
        assert_eq!((third.over.is_some(), tally.todo.pop_front()), (true, Some(whole.clone())));

        let mut last = round();
        tally.take_parts(&mut last, vec![part(whole.clone(), 900)], vec![differs(&whole)]).unwrap();
        let asked = asked_about(&mut last, 1);
        tally.take_lists(&mut last, asked, vec![named(150)]).unwrap();
        let compared = &tally.compared;
        assert_eq!((last.done, compared.keys, compared.differing, compared.found.len()), (1, 900, 150, 150));
        let mending = Mending { allow_deletes: false, deletes_share_max: 0.1, ends: true };
        assert!(guard_deletes(compared, mending).is_err(), "150 of 1,050");
    }

    #[test]
    fn each_part_is_done_once_and_the_total_follows_what_is_cut() {
        let mut tally = Tally { progress: PartsProgress { parts_done: 0, parts_total: 2 }, ..Tally::default() };
        let mut round = round();
        let wide = wire::PartAnswer { edges: vec!["d".into(), "e".into()], ..outcome(Outcome::Wide) };
        let parts = vec![part(range("a", "b"), 3), part(range("c", "f"), 1), part(range("f", "g"), 5)];
        tally.take_parts(&mut round, parts, vec![outcome(Outcome::Equal), wide, outcome(Outcome::Compacted)]).unwrap();
        assert_eq!((round.done, tally.compared.keys), (1, 3));
        assert_eq!(tally.progress, PartsProgress { parts_done: 1, parts_total: 4 });
        assert_eq!(tally.todo, [range("c", "d"), range("d", "e"), range("e", "f"), range("f", "g")]);
        let nothing = tally.take_parts(&mut round, vec![part(range("a", "b"), 3)], vec![outcome(Outcome::Unspecified)]);
        assert_eq!(nothing, Err(OtherAnswer));
    }

    #[test]
    fn what_is_looked_at_once_more_is_noted_whole_or_not_at_all() {
        let mut tally = Tally::default();
        let mut again = round();
        tally.take_again(&mut again, vec![named(2), compacted()]).unwrap();
        assert_eq!((tally.compared.found.len(), again.over.is_some()), (0, true));
        tally.take_again(&mut round(), vec![named(2), named(1)]).unwrap();
        assert_eq!(tally.compared.found.len(), 3);
        let bytes = tally.found_bytes;
        tally.take_again(&mut round(), vec![named(4)]).unwrap();
        tally.forget_after(3);
        assert_eq!((tally.compared.found.len(), tally.found_bytes), (3, bytes));
        assert_eq!((tally.take_found().len(), tally.found_bytes), (3, 0));
    }
}
