//! Job: decides for each received revision whether it is the next one.
//! Input: the sender's (epoch, term), a seq and a digest. Output: apply, duplicate, or why it is refused.
//! Pure: no clock, no I/O.
//! Always true: seqs are admitted one after the other, each once; a refusal changes nothing; no older (epoch, term) is admitted.

use crate::model::{Digest, Epoch, Ranges, Seq, Term, WholeRevision};
use std::collections::VecDeque;

/// The digests that are kept to tell a repeat from a conflict: more than any sender has in flight.
pub const RECENTS_MAX: usize = 8_192;

/// What the replica has received of one link. Opened from the position and the journal, at each hello.
#[derive(Debug, Clone)]
pub struct Admit {
    epoch: Epoch,
    term: Term,
    received: Seq,
    /// Digests of the seqs up to `received`, the last one at the back.
    recents: VecDeque<Digest>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admitted {
    /// The next one: it counts as received from now on.
    Apply,
    /// Received before, and the same as then, as far as is remembered.
    Duplicate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Also for an (epoch, term) that no hello has opened: its seqs count from a position that is not known here.
    #[error("seq {expected} was to come: say hello again")]
    Gap { expected: Seq },
    #[error("a sender with epoch {}, term {} took the link", by.0, by.1)]
    Fenced { by: (Epoch, Term) },
    #[error(
        "seq {seq} came before with other changes: two senders numbered differently, or the origin's history was replaced"
    )]
    Conflict { seq: Seq },
}

impl Admit {
    /// `received`: the higher of the position's seq and the journal's end. `recents`: digests of the seqs that end there.
    pub fn new(epoch: Epoch, term: Term, received: Seq, recents: impl IntoIterator<Item = Digest>) -> Self {
        let mut admit = Self { epoch, term, received, recents: VecDeque::new() };
        recents.into_iter().for_each(|digest| admit.remember(digest));
        admit
    }

    /// What the dedupe log remembers of the newest epoch: the digests of the seqs that end it without a gap. `recent`: in order.
    pub fn remembering(recent: &[(Epoch, Seq, Digest)]) -> Self {
        let Some((epoch, last, _)) = recent.last().copied() else {
            return Self::new(Epoch(0), Term(0), Seq(0), []);
        };
        let mut digests = Vec::new();
        let mut expected = last;
        for (of, seq, digest) in recent.iter().rev() {
            if *of != epoch || *seq != expected {
                break;
            }
            digests.push(*digest);
            expected = Seq(seq.0.saturating_sub(1));
        }
        Self::new(epoch, Term(0), last, digests.into_iter().rev())
    }

    pub fn epoch(&self) -> (Epoch, Term) {
        (self.epoch, self.term)
    }

    pub fn received(&self) -> Seq {
        self.received
    }

    pub fn admit(&mut self, epoch: Epoch, term: Term, seq: Seq, digest: Digest) -> Result<Admitted, Refused> {
        let expected = self.received.next();
        match (epoch, term).cmp(&self.epoch()) {
            std::cmp::Ordering::Less => return Err(Refused::Fenced { by: self.epoch() }),
            std::cmp::Ordering::Greater => return Err(Refused::Gap { expected }),
            std::cmp::Ordering::Equal => {}
        }
        if seq > expected {
            return Err(Refused::Gap { expected });
        }
        if seq == expected {
            self.received = seq;
            self.remember(digest);
            return Ok(Admitted::Apply);
        }
        match self.recent(seq) {
            Some(known) if known != digest => Err(Refused::Conflict { seq }),
            Some(_) | None => Ok(Admitted::Duplicate),
        }
    }

    /// A frame of consecutive seqs: how many of its first revisions are duplicates; the rest is to be applied. All or nothing: when
    /// any of its revisions is refused, none is admitted.
    pub fn admit_frame(
        &mut self,
        epoch: Epoch,
        term: Term,
        seq_first: Seq,
        digests: &[Digest],
    ) -> Result<usize, Refused> {
        let mut duplicates = 0;
        // Within a frame no refusal comes after an `Apply`: only the first one can leave a gap, and conflicts lie below it.
        for (seq, digest) in (seq_first.0..=u64::MAX).zip(digests) {
            match self.admit(epoch, term, Seq(seq), *digest)? {
                Admitted::Apply => {}
                Admitted::Duplicate => duplicates += 1,
            }
        }
        Ok(duplicates)
    }

    /// A higher (epoch, term) takes over, after it is in the position. `base`: the seq that its position has (0 at an anchor).
    /// A new term in the same epoch goes on with the same seqs; their digests are kept.
    pub fn open_epoch(&mut self, epoch: Epoch, term: Term, base: Seq) -> Result<(), Refused> {
        if (epoch, term) < self.epoch() {
            return Err(Refused::Fenced { by: self.epoch() });
        }
        let behind = self.received.0.checked_sub(base.0).and_then(|n| usize::try_from(n).ok());
        match behind {
            Some(behind) if epoch == self.epoch => {
                let kept = self.recents.len().saturating_sub(behind);
                self.recents.truncate(kept);
            }
            Some(_) | None => self.recents.clear(),
        }
        (self.epoch, self.term, self.received) = (epoch, term, base);
        Ok(())
    }

    fn recent(&self, seq: Seq) -> Option<Digest> {
        let back = usize::try_from(self.received.0.checked_sub(seq.0)?).ok()?;
        let index = self.recents.len().checked_sub(back + 1)?;
        self.recents.get(index).copied()
    }

    fn remember(&mut self, digest: Digest) {
        if self.recents.len() == RECENTS_MAX {
            self.recents.pop_front();
        }
        self.recents.push_back(digest);
    }
}

/// True if the revision touches a key that this replica does not accept from the link. Ranges never hold a key under
/// `/etcd-ferry/`, so those are always outside.
pub fn outside(accepted: &Ranges, revision: &WholeRevision) -> bool {
    revision.changes.iter().any(|change| !accepted.contains(change.key()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Change, Revision};
    use bytes::Bytes;

    const E: Epoch = Epoch(2);
    const T: Term = Term(1);

    fn digest(n: u64) -> Digest {
        Digest(u128::from(n).to_be_bytes())
    }

    fn received(seqs: u64) -> Admit {
        Admit::new(E, T, Seq(seqs), (1..=seqs).map(digest))
    }

    #[test]
    fn the_next_seq_is_applied_once_and_a_repeat_is_a_duplicate() {
        let mut admit = received(0);
        assert_eq!(admit.admit(E, T, Seq(1), digest(1)), Ok(Admitted::Apply));
        assert_eq!(admit.admit(E, T, Seq(1), digest(1)), Ok(Admitted::Duplicate));
        assert_eq!(admit.admit(E, T, Seq(2), digest(2)), Ok(Admitted::Apply));
        assert_eq!(admit.received(), Seq(2));
    }

    #[test]
    fn a_missing_seq_is_a_gap_that_names_what_was_expected() {
        assert_eq!(received(3).admit(E, T, Seq(5), digest(5)), Err(Refused::Gap { expected: Seq(4) }));
    }

    #[test]
    fn the_same_seq_with_another_digest_is_a_conflict() {
        assert_eq!(received(3).admit(E, T, Seq(2), digest(9)), Err(Refused::Conflict { seq: Seq(2) }));
    }

    #[test]
    fn a_repeat_older_than_what_is_remembered_is_a_duplicate() {
        let seqs = u64::try_from(RECENTS_MAX).unwrap() + 5;
        let mut admit = received(seqs);
        assert_eq!(admit.recents.len(), RECENTS_MAX);
        assert_eq!(admit.admit(E, T, Seq(5), digest(99)), Ok(Admitted::Duplicate));
        assert_eq!(admit.admit(E, T, Seq(6), digest(99)), Err(Refused::Conflict { seq: Seq(6) }));
        assert_eq!(Admit::new(E, T, Seq(7), []).admit(E, T, Seq(7), digest(99)), Ok(Admitted::Duplicate));
    }

    #[test]
    fn an_older_epoch_or_term_is_fenced_and_a_newer_one_must_say_hello_first() {
        let mut admit = received(3);
        let fenced = Err(Refused::Fenced { by: (E, T) });
        assert_eq!(admit.admit(Epoch(1), Term(9), Seq(4), digest(4)), fenced);
        assert_eq!(admit.admit(E, Term(0), Seq(4), digest(4)), fenced);
        let gap = Err(Refused::Gap { expected: Seq(4) });
        assert_eq!(admit.admit(E, Term(2), Seq(4), digest(4)), gap);
        assert_eq!(admit.admit(Epoch(3), Term(0), Seq(1), digest(1)), gap);
        assert_eq!(admit.received(), Seq(3));
    }

    #[test]
    fn a_new_epoch_starts_its_seqs_at_the_anchor_and_forgets_the_old_digests() {
        let mut admit = received(3);
        assert_eq!(admit.open_epoch(Epoch(3), Term(0), Seq(0)), Ok(()));
        assert_eq!(admit.admit(Epoch(3), Term(0), Seq(1), digest(77)), Ok(Admitted::Apply));
        assert_eq!(admit.admit(E, T, Seq(4), digest(4)), Err(Refused::Fenced { by: (Epoch(3), Term(0)) }));
        assert!(admit.open_epoch(E, T, Seq(0)).is_err());
    }

    #[test]
    fn a_new_term_goes_on_with_the_same_seqs_and_remembers_them() {
        let mut admit = received(3);
        assert_eq!(admit.open_epoch(E, Term(2), Seq(2)), Ok(()));
        assert_eq!(admit.admit(E, Term(2), Seq(2), digest(9)), Err(Refused::Conflict { seq: Seq(2) }));
        assert_eq!(admit.admit(E, Term(2), Seq(3), digest(33)), Ok(Admitted::Apply), "it was received, never applied");
        assert_eq!(admit.open_epoch(E, Term(3), Seq(9)), Ok(()));
        assert_eq!(admit.admit(E, Term(3), Seq(9), digest(1)), Ok(Admitted::Duplicate), "nothing is remembered of it");
    }

    #[test]
    fn a_seq_at_the_end_of_its_numbers_is_no_panic() {
        let mut admit = received(3);
        let gap = Err(Refused::Gap { expected: Seq(4) });
        assert_eq!(admit.admit_frame(E, T, Seq(u64::MAX), &[digest(1), digest(2)]), gap);
    }

    /// Every frame of up to 3 revisions, around every position from 0 to 4, with and without a wrong digest.
    #[test]
    fn every_small_frame_is_cut_to_its_new_part_or_refused_whole() {
        for (have, first, len) in (0..5).flat_map(|h| (0..8).flat_map(move |f| (0..4).map(move |l| (h, f, l)))) {
            for wrong in (first..first + len).map(Some).chain([None]) {
                let digests: Vec<Digest> =
                    (first..first + len).map(|seq| digest(if wrong == Some(seq) { 99 } else { seq })).collect();
                let mut admit = received(have);
                let verdict = admit.admit_frame(E, T, Seq(first), &digests);
                let conflict = wrong.filter(|seq| (1..=have).contains(seq));
                let expected = match conflict {
                    Some(seq) => Err(Refused::Conflict { seq: Seq(seq) }),
                    None if len > 0 && first > have + 1 => Err(Refused::Gap { expected: Seq(have + 1) }),
                    None => Ok(usize::try_from((have + 1).saturating_sub(first).min(len)).unwrap()),
                };
                assert_eq!(verdict, expected, "have {have}, frame {first}+{len}, wrong {wrong:?}");
                let end = if verdict.is_ok() && len > 0 { have.max(first + len - 1) } else { have };
                assert_eq!(admit.received(), Seq(end));
            }
        }
    }

    /// All orders in which the revisions 1 to 3 can arrive in 5 deliveries.
    #[test]
    fn whatever_is_repeated_or_reordered_each_seq_is_applied_once_and_in_order() {
        for mut code in 0..3_u32.pow(5) {
            let mut admit = received(0);
            let mut applied = Vec::new();
            for _ in 0..5 {
                let seq = u64::from(code % 3) + 1;
                code /= 3;
                if admit.admit(E, T, Seq(seq), digest(seq)) == Ok(Admitted::Apply) {
                    applied.push(seq);
                }
            }
            assert!(applied.iter().copied().eq(1..=admit.received().0), "{applied:?}");
        }
    }

    #[test]
    fn a_change_outside_of_what_is_accepted_or_under_the_ferrys_own_keys_is_outside() {
        let revision = |key: &'static str| WholeRevision {
            revision: Revision(1),
            changes: vec![Change::Delete { key: Bytes::from_static(b"/app/a") }, Change::Delete { key: key.into() }],
        };
        let app = Ranges::new(&["/app/".into()], &["/app/x/".into()]);
        assert!(!outside(&app, &revision("/app/b")));
        assert!(outside(&app, &revision("/app/x/1")));
        assert!(outside(&app, &revision("/b")));
        assert!(outside(&Ranges::new(&[], &[]), &revision("/etcd-ferry/v1/links/a/position")));
    }
}
