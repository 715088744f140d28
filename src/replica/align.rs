//! Job: what a position that was read afresh means for what waits in memory and in the journal.
//! Input: the position, what this applier knew, what its session may write with, what the journal holds. Output: a verdict.
//! Pure: no clock, no I/O.
//! Always true: a position that moved in a way that is not this applier's own ends the stream, and a journal that does not continue it is
//! started afresh.

use super::next::Claim;
use crate::model::{ClusterId, Digest, Epoch, Position, Revision, Seq};
use crate::wire::replicate::refusal::Kind;

/// What the journal holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalFacts {
    pub epoch: Epoch,
    /// Whose revisions its epoch holds; `None`: it is not known.
    pub origin: Option<ClusterId>,
    pub base: Seq,
    pub last: Seq,
    /// The digest of its entry with the position's seq, where it has one and it could be read.
    pub at_position: Option<Digest>,
    /// The origin's revision of the entry that follows, where it has one and it could be read.
    pub after_position: Option<Revision>,
}

impl JournalFacts {
    /// Whether what it holds after the position's seq is of the position's run. An epoch's number can be used again, after the replica was
    /// restored or the link removed and made anew: then the journal is of another run.
    fn continues(self, position: Option<&Position>) -> bool {
        let (epoch, seq) = position.map_or((Epoch(0), Seq(0)), |p| (p.epoch, p.seq));
        let spans = self.epoch == epoch && self.base <= seq && seq <= self.last;
        let Some(position) = position else { return spans };
        let same = self.at_position.is_none_or(|digest| digest == position.carried_digest)
            && self.origin.is_none_or(|origin| origin == position.origin_cluster);
        let follows = match self.after_position {
            Some(next) => next > position.origin_revision,
            None => seq == self.last || self.at_position.is_some(),
        };
        spans && same && follows
    }
}

/// What a position that was read afresh means for what waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alignment {
    /// It is where this applier brought it, or further in the same run: what it covers has been applied.
    GoesOn,
    /// Another sender has the link: nothing of this session's is applied any more.
    Fenced { by: Claim, reset_journal: bool },
    StartsAfresh {
        /// The journal is of another run, or ends before the position.
        reset_journal: bool,
        /// Why the stream ends.
        moved: Option<(Kind, String)>,
    },
}

/// `expected`: the last position that this applier knew; `None`: it knew none since it started. `claim`: what the session's sender may write
/// with; `None`: there is no such sender.
pub fn align(
    position: Option<&Position>,
    expected: Option<&Position>,
    claim: Option<Claim>,
    journal: JournalFacts,
) -> Alignment {
    let (epoch, seq) = position.map_or((Epoch(0), Seq(0)), |p| (p.epoch, p.seq));
    let (known_epoch, known_seq) = expected.map_or((epoch, seq), |p| (p.epoch, p.seq));
    let by = position.map(|p| (p.epoch, p.term)).filter(|by| claim.is_some_and(|claim| *by > claim));
    let ours = expected.is_none() || (position.is_some() && epoch == known_epoch && seq >= known_seq);
    let continues = journal.continues(position);
    if let Some(by) = by {
        return Alignment::Fenced { by, reset_journal: !continues };
    }
    if ours && continues {
        return Alignment::GoesOn;
    }
    let further = (epoch, seq) > (known_epoch, known_seq);
    let overtaken = !continues && further;
    let moved = (!ours || overtaken).then(|| {
        let kind = if further && epoch != known_epoch { Kind::Fenced } else { Kind::PositionMoved };
        let reason = if further {
            format!("another applier has brought the position to epoch {epoch}, seq {seq}")
        } else {
            format!("the position moved back to epoch {epoch}, seq {seq}: was the replica restored?")
        };
        (kind, reason)
    });
    Alignment::StartsAfresh { reset_journal: !continues, moved }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Term;

    const DIGEST: Digest = Digest([9; 16]);

    fn position() -> Position {
        Position::of_tests()
    }

    fn journal() -> JournalFacts {
        let (at_position, after_position) = (Some(DIGEST), Some(Revision(101)));
        let origin = Some(ClusterId(1));
        JournalFacts { epoch: Epoch(3), origin, base: Seq(30), last: Seq(45), at_position, after_position }
    }

    fn moved(alignment: Alignment) -> Option<Kind> {
        match alignment {
            Alignment::StartsAfresh { moved: Some((kind, _)), .. } => Some(kind),
            Alignment::StartsAfresh { moved: None, .. } | Alignment::Fenced { .. } | Alignment::GoesOn => None,
        }
    }

    /// By an applier whose session claims nothing.
    fn aligned(position: Option<&Position>, expected: Option<&Position>, journal: JournalFacts) -> Alignment {
        align(position, expected, None, journal)
    }

    #[test]
    fn a_position_where_it_was_left_or_further_in_the_same_run_goes_on() {
        let earlier = Position { seq: Seq(38), ..position() };
        for expected in [None, Some(&position()), Some(&earlier)] {
            assert_eq!(aligned(Some(&position()), expected, journal()), Alignment::GoesOn);
            let claim = Some((Epoch(3), Term(2)));
            assert_eq!(align(Some(&position()), expected, claim, journal()), Alignment::GoesOn);
        }
    }

    #[test]
    fn a_position_above_what_the_sender_may_write_with_fences_it() {
        let by = (Epoch(3), Term(2));
        for claim in [(Epoch(3), Term(1)), (Epoch(2), Term(9))] {
            let fenced = |journal| align(Some(&position()), Some(&position()), Some(claim), journal);
            assert_eq!(fenced(journal()), Alignment::Fenced { by, reset_journal: false }, "{claim:?}");
            let behind = JournalFacts { last: Seq(39), ..journal() };
            assert_eq!(fenced(behind), Alignment::Fenced { by, reset_journal: true });
        }
        let above = Some((Epoch(4), Term(1)));
        assert_eq!(align(Some(&position()), Some(&position()), above, journal()), Alignment::GoesOn);
        let gone = align(None, Some(&position()), Some((Epoch(3), Term(1))), journal());
        assert_eq!(moved(gone), Some(Kind::PositionMoved));
    }

    #[test]
    fn a_position_that_moved_back_or_is_gone_ends_the_stream_and_one_of_a_later_epoch_fences_it() {
        let later = Position { seq: Seq(41), ..position() };
        assert_eq!(moved(aligned(Some(&position()), Some(&later), journal())), Some(Kind::PositionMoved));
        let newer = Position { epoch: Epoch(4), seq: Seq(0), ..position() };
        assert_eq!(moved(aligned(Some(&position()), Some(&newer), journal())), Some(Kind::PositionMoved));
        assert_eq!(moved(aligned(None, Some(&position()), journal())), Some(Kind::PositionMoved));
        let older = Position { epoch: Epoch(2), ..position() };
        assert_eq!(moved(aligned(Some(&position()), Some(&older), journal())), Some(Kind::Fenced));
    }

    #[test]
    fn another_applier_that_is_further_than_the_journal_ends_the_stream_in_the_same_epoch_too() {
        let behind = JournalFacts { last: Seq(39), at_position: None, ..journal() };
        let earlier = Position { seq: Seq(38), ..position() };
        let overtaken = aligned(Some(&position()), Some(&earlier), behind);
        assert!(matches!(overtaken, Alignment::StartsAfresh { reset_journal: true, .. }), "{overtaken:?}");
        assert_eq!(moved(overtaken), Some(Kind::PositionMoved));
        assert_eq!(moved(aligned(Some(&position()), Some(&position()), behind)), None, "it is where it was left");
    }

    #[test]
    fn a_journal_of_another_run_or_that_does_not_reach_the_position_starts_afresh() {
        let afresh = Alignment::StartsAfresh { reset_journal: true, moved: None };
        let others = [
            JournalFacts { epoch: Epoch(2), ..journal() },
            JournalFacts { origin: Some(ClusterId(2)), ..journal() },
            JournalFacts { base: Seq(41), ..journal() },
            JournalFacts { last: Seq(39), ..journal() },
            JournalFacts { at_position: Some(Digest([1; 16])), ..journal() },
            JournalFacts { after_position: Some(Revision(100)), ..journal() },
            JournalFacts { at_position: None, after_position: None, ..journal() },
        ];
        for other in others {
            assert_eq!(aligned(Some(&position()), None, other), afresh, "{other:?}");
        }
        let sound = [
            JournalFacts { origin: None, ..journal() },
            JournalFacts { at_position: None, ..journal() },
            JournalFacts { after_position: None, ..journal() },
            JournalFacts { last: Seq(40), at_position: None, after_position: None, ..journal() },
        ];
        for journal in sound {
            assert_eq!(aligned(Some(&position()), None, journal), Alignment::GoesOn, "{journal:?}");
        }
    }

    #[test]
    fn before_an_epochs_first_seq_only_what_comes_after_its_anchor_is_of_it() {
        let anchored = Position { seq: Seq(0), ..position() };
        let journal = |next| JournalFacts { base: Seq(0), at_position: None, after_position: Some(next), ..journal() };
        assert_eq!(aligned(Some(&anchored), None, journal(Revision(101))), Alignment::GoesOn);
        let of_another_run = aligned(Some(&anchored), None, journal(Revision(50)));
        assert_eq!(of_another_run, Alignment::StartsAfresh { reset_journal: true, moved: None });
        // Another origin's revisions may be larger.
        let of_another_origin = JournalFacts { origin: Some(ClusterId(2)), ..journal(Revision(101)) };
        let aligned = aligned(Some(&anchored), None, of_another_origin);
        assert_eq!(aligned, Alignment::StartsAfresh { reset_journal: true, moved: None });
    }
}
