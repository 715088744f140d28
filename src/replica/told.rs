//! Job: keep what the origin said last, for the replica's status.
//! Input: hellos, progress, marks and comparisons, as the streams tell them; a stream's end. Output: a `Told`.
//! Always true: what an origin said grows older while it is not heard; a mark belongs to the comparison of its own stream.

use crate::model::Revision;
use crate::model::limits::TxnLimits;
use crate::wire::replicate::Verified;
use std::time::Duration;
use tokio::time::Instant;
use tonic::Status;

/// An origin says how it is each 5 s.
const HEARD_WITHIN: Duration = Duration::from_secs(7);

/// What the origin said last, and whether its stream is open: for the replica's status.
#[derive(Debug, Clone, Default)]
pub struct Told {
    pub connected: bool,
    /// The node of the sidecar whose hello was answered last.
    pub shipper: String,
    pub head: Revision,
    pub lag: Duration,
    pub rpo: Duration,
    pub lag_revisions: u64,
    pub rpo_revisions: u64,
    pub at: Option<Instant>,
    /// What the origin said of the last comparison.
    pub verified: Verified,
    /// The replica's revision at the first mark since then; 0: there was none.
    pub marked: Revision,
    /// Both sides were equal at a mark that the replica reached at this revision.
    pub equal_through: Revision,
    /// What the origin's etcd takes.
    pub limits: TxnLimits,
    /// Why the origin does not see what its etcd commits, by its own word; empty: it does.
    pub trouble: String,
    /// Why the last stream ended, or none began.
    pub ended: String,
}

impl Told {
    /// How old what the origin last said has grown, while it is not heard: it has gone, or what it says waits in a line or before a full
    /// journal. 0: it is heard.
    pub(super) fn older(&self) -> Duration {
        let since = self.at.map_or(Duration::ZERO, |at| at.elapsed());
        if self.connected && since <= HEARD_WITHIN { Duration::ZERO } else { since }
    }

    /// The replica reached a mark at this revision.
    pub(super) fn mark_reached(&mut self, at: Revision) {
        if self.marked == Revision(0) {
            self.marked = at;
        }
    }

    /// A hello was refused, and why: shown while nobody is connected.
    pub(super) fn refused(&mut self, status: &Status) {
        if !self.connected {
            self.ended = format!("the last hello was refused: {}", status.message());
        }
    }

    /// The stream has ended, and a comparison that it brought with it: its mark is none of the next one's.
    pub(super) fn stream_ended(&mut self, why: String) {
        (self.connected, self.ended, self.marked) = (false, why, Revision(0));
        self.trouble.clear();
    }

    /// A base copy has replaced what the last comparison saw.
    pub(super) fn copied(&mut self) {
        (self.verified.differing_keys, self.verified.expected_keys, self.verified.mended_keys) = (0, 0, 0);
    }

    /// A comparison has ended. What it says of the replica holds at its first mark.
    pub(super) fn compared(&mut self, verified: Verified) {
        let marked = std::mem::take(&mut self.marked);
        // What is in quarantine differs by an operator's choice, and not since somebody else wrote.
        // What was mended did differ at the mark.
        if verified.differing_keys == verified.expected_keys && verified.mended_keys == 0 {
            self.equal_through = self.equal_through.max(marked);
        }
        self.verified = verified;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_origin_said_grows_older_while_it_is_gone_and_also_while_its_open_stream_says_nothing() {
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds));
        let older = |connected, at| Told { connected, at, ..Told::default() }.older().as_secs();
        assert_eq!(
            [older(true, ago(5)), older(false, ago(5)), older(true, ago(60)), older(false, None)],
            [0, 5, 60, 0]
        );
    }

    #[test]
    fn a_mark_of_a_stream_that_has_ended_is_none_of_the_next_comparisons() {
        let mut told = Told { connected: true, trouble: "it sees nothing".to_owned(), ..Told::default() };
        told.mark_reached(Revision(5));
        told.stream_ended("it broke".to_owned());
        assert_eq!((told.connected, told.marked, &told.ended[..]), (false, Revision(0), "it broke"));
        assert_eq!(told.trouble, "");
        told.mark_reached(Revision(9));
        told.compared(Verified::default());
        assert_eq!(told.equal_through, Revision(9));
    }

    #[test]
    fn a_repair_is_no_proof_that_both_sides_were_equal_at_its_mark() {
        let mut told = Told { connected: true, ..Told::default() };
        told.mark_reached(Revision(5));
        told.compared(Verified { differing_keys: 3, expected_keys: 3, ..Verified::default() });
        assert_eq!(told.equal_through, Revision(5));
        told.mark_reached(Revision(9));
        told.compared(Verified { differing_keys: 3, expected_keys: 3, mended_keys: 1, ..Verified::default() });
        told.mark_reached(Revision(9));
        told.compared(Verified { differing_keys: 3, mended_keys: 3, ..Verified::default() });
        assert_eq!(told.equal_through, Revision(5));
    }
}
