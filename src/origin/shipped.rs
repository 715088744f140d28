//! Job: the account of one Ship stream: what is on its way, and how far the replica says it is.
//! Input: what was shipped, acknowledgements, resets. Output: the next seq and where to read on; how far the spool may forget.
//! Pure: no clock, no I/O.
//! Always true: seqs are consecutive; nothing is believed of the replica that was not shipped to it; only what its position says lets go
//! of the spool, never what is merely durable there.

use crate::model::{Position, Revision, Seq, Waymark};
use crate::wire::replicate::Ack;
use std::collections::VecDeque;

/// After so many resets in a row frames travel standalone, one revision each.
const RESETS_BEFORE_STANDALONE: u32 = 2;
/// A frame that cannot be decoded so often never will be.
pub const RESETS_MAX: u32 = 8;

/// How far the replica says it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Acked {
    pub applied: Seq,
    pub applied_revision: Revision,
    pub durable: Seq,
    pub durable_revision: Revision,
    /// What the position says: the spool is trimmed up to it, never past it.
    pub position_revision: Revision,
    pub waymark: Waymark,
    pub following: bool,
    /// A repair is under way, or was cut short.
    pub repairing: bool,
    /// Somebody else wrote at the replica, which wants that mended.
    pub repair_wanted: bool,
    /// Applying waits for a person, at the replica.
    pub held: bool,
    /// It is paused there.
    pub paused: bool,
    /// It has said something on this stream.
    pub heard: bool,
}

impl Acked {
    /// Where nothing is applied no mark is reached, and nothing can be compared.
    pub fn notes_marks(&self) -> bool {
        !self.paused && !self.held
    }
}

/// One stream's account.
#[derive(Debug, Clone)]
pub struct Shipped {
    /// The last one that was given.
    pub seq: Seq,
    /// The last revision that was read from the spool for shipping.
    pub cursor: Revision,
    /// The last one that is on its way: a frame that waits for the connection is read, and not sent.
    pub sent: Revision,
    /// The last revision that a progress message told of.
    pub progressed: Revision,
    /// Frames that are not durable at the replica: their last seq and revision.
    in_flight: VecDeque<(Seq, Revision)>,
    received: (Seq, Revision),
    /// What the hello said of that.
    at_open: (Seq, Revision),
    pub acked: Acked,
    resets_in_row: u32,
}

/// What an acknowledgement moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Up to it the spool may forget.
    pub trim: Option<Revision>,
    /// The lag is to hear of it.
    pub lag: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Untrue {
    #[error("the replica acknowledges seq {acked}, of which {sent} were sent")]
    Seq { acked: Seq, sent: Seq },
    #[error("the replica acknowledges revision {acked}, and was told of {told}")]
    Revision { acked: Revision, told: Revision },
    #[error("the replica asks to go back to seq {after}, which is no frame's end")]
    NoFramesEnd { after: Seq },
}

impl Shipped {
    /// `received`: the end of what the replica has, by its hello; `durable`: of that, what is on its disk.
    pub fn open(position: Option<&Position>, received: (Seq, Revision), durable: Seq) -> Self {
        let mut acked = Acked { durable, ..Acked::default() };
        if let Some(position) = position {
            acked.applied = position.seq;
            acked.applied_revision = position.origin_revision;
            acked.durable_revision = position.origin_revision;
            acked.position_revision = position.origin_revision;
            acked.waymark = position.waymark;
        }
        Self {
            seq: received.0,
            cursor: Revision(0),
            sent: Revision(0),
            progressed: Revision(0),
            in_flight: VecDeque::new(),
            received,
            at_open: received,
            acked,
            resets_in_row: 0,
        }
    }

    /// What is known to be durable at the replica when the stream opens.
    pub fn durable_at_open(&self) -> Revision {
        let all = self.received.0 > self.acked.applied && self.acked.durable >= self.received.0;
        if all { self.received.1 } else { self.acked.applied_revision }
    }

    /// A base copy is over: seqs start afresh.
    pub fn open_epoch(&mut self, anchor: Revision) {
        self.seq = Seq(0);
        (self.received, self.at_open) = ((Seq(0), anchor), (Seq(0), anchor));
        self.in_flight.clear();
        self.acked.applied = Seq(0);
        self.acked.durable = Seq(0);
        self.acked.applied_revision = anchor;
        self.acked.durable_revision = anchor;
        self.acked.position_revision = anchor;
    }

    /// What comes after `after` is shipped from now on.
    pub fn follow(&mut self, after: Revision) {
        self.cursor = after;
        self.received.1 = self.received.1.max(after);
    }

    /// A frame of so many revisions was made, the last of them `last`.
    pub fn frame(&mut self, revisions: u64, last: Revision) {
        self.seq = Seq(self.seq.0 + revisions);
        self.in_flight.push_back((self.seq, last));
    }

    pub fn frames_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Frames did not arrive whole, twice in a row: the less is in one, the less can be hit.
    pub fn is_standalone(&self) -> bool {
        self.resets_in_row >= RESETS_BEFORE_STANDALONE
    }

    /// Up to where everything is on its way. `drained`: no frame waits for the connection. `spooled`: the spool's last revision;
    /// `covered`: how far the spool has seen the origin.
    pub fn through(&self, drained: bool, spooled: Option<Revision>, covered: Revision) -> (Revision, bool) {
        let shipped_all = drained && spooled.is_none_or(|last| last <= self.cursor);
        (if shipped_all { covered.max(self.cursor) } else { self.sent }, shipped_all)
    }

    /// What the origin holds at this revision is what was shipped, up to the present seq; nothing must wait to be sent.
    pub fn standing(&self, spooled: Option<Revision>, covered: Revision) -> Revision {
        let drained = spooled.is_none_or(|last| last <= self.cursor);
        if drained { covered.max(self.cursor) } else { self.cursor }
    }

    /// `copying`: a base copy is under way, whatever the position still says.
    pub fn acknowledge(&mut self, ack: &Ack, copying: bool) -> Result<Moved, Untrue> {
        let durable = Seq(ack.durable_seq.max(ack.applied_seq));
        if durable > self.seq || Seq(ack.received_seq) > self.seq {
            return Err(Untrue::Seq { acked: durable, sent: self.seq });
        }
        let told = self.cursor.max(self.progressed).max(self.received.1).max(self.acked.applied_revision);
        // Before following, a base copy's anchor is acknowledged that was told in another way.
        if self.cursor > Revision(0) && Revision(ack.applied_origin_revision) > told {
            return Err(Untrue::Revision { acked: Revision(ack.applied_origin_revision), told });
        }
        if Seq(ack.received_seq) > self.received.0 {
            self.resets_in_row = 0;
        }
        let mut acked = self.acked;
        while let Some((seq, revision)) = self.in_flight.front().copied() {
            if seq <= Seq(ack.received_seq) {
                self.received = self.received.max((seq, revision));
            }
            if seq > durable {
                break;
            }
            acked.durable_revision = acked.durable_revision.max(revision);
            self.in_flight.pop_front();
        }
        for (seq, revision) in self.in_flight.iter().copied().take_while(|(seq, _)| *seq <= Seq(ack.received_seq)) {
            self.received = self.received.max((seq, revision));
        }
        acked.applied = acked.applied.max(Seq(ack.applied_seq));
        acked.applied_revision = acked.applied_revision.max(Revision(ack.applied_origin_revision));
        acked.durable = acked.durable.max(durable);
        acked.durable_revision = acked.durable_revision.max(acked.applied_revision);
        acked.waymark = ack.waymark.map(Waymark::from).unwrap_or_default();
        acked.following = ack.following && !copying;
        acked.repairing = ack.repairing && !copying;
        acked.repair_wanted = ack.repair_wanted && acked.following;
        (acked.held, acked.paused, acked.heard) = (ack.held, ack.paused, true);
        if durable >= self.at_open.0 {
            acked.durable_revision = acked.durable_revision.max(self.at_open.1);
        }
        acked.position_revision = acked.position_revision.max(Revision(ack.position_revision));
        let lag = acked.applied_revision > self.acked.applied_revision
            || acked.durable_revision > self.acked.durable_revision;
        // An idle position may be further than what was read for shipping, and what is read on from must stay.
        let trim = acked.position_revision.min(self.cursor);
        let trim = (acked.position_revision > self.acked.position_revision).then_some(trim);
        self.acked = acked;
        Ok(Moved { trim, lag })
    }

    /// The replica's decoder lost its way: everything after `after` is shipped again. Returns how many resets came in a row.
    pub fn reset(&mut self, after: Seq) -> Result<u32, Untrue> {
        let known = self.in_flight.iter().find(|(seq, _)| *seq == after).copied();
        let back = known.or((after == self.received.0).then_some(self.received));
        let Some(back) = back else { return Err(Untrue::NoFramesEnd { after }) };
        self.resets_in_row += 1;
        (self.seq, self.cursor) = back;
        self.sent = self.sent.min(self.cursor);
        self.in_flight.retain(|(seq, _)| *seq <= after);
        Ok(self.resets_in_row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opened at seq 10, revision 100, with everything applied.
    fn opened() -> Shipped {
        let mut shipped = Shipped::open(None, (Seq(10), Revision(100)), Seq(10));
        shipped.acked.applied_revision = Revision(100);
        shipped.acked.position_revision = Revision(100);
        shipped.follow(Revision(100));
        shipped
    }

    /// Two frames are on their way: up to seq 12 (revision 104) and up to 13 (106).
    fn shipping() -> Shipped {
        let mut shipped = opened();
        for (count, last) in [(2, Revision(104)), (1, Revision(106))] {
            shipped.cursor = last;
            shipped.frame(count, last);
        }
        shipped
    }

    fn ack(received: u64, durable: u64, applied: u64, revision: u64) -> Ack {
        Ack {
            received_seq: received,
            durable_seq: durable,
            applied_seq: applied,
            applied_origin_revision: revision,
            position_revision: revision,
            following: true,
            ..Ack::default()
        }
    }

    #[test]
    fn the_spool_forgets_what_the_position_says_and_nothing_that_is_only_durable() {
        let mut shipped = shipping();
        let durable = shipped.acknowledge(&ack(13, 13, 10, 100), false).unwrap();
        assert_eq!((durable.trim, durable.lag), (None, true));
        assert_eq!((shipped.acked.durable_revision, shipped.frames_in_flight()), (Revision(106), 0));
        let applied = shipped.acknowledge(&ack(13, 13, 12, 104), false).unwrap();
        assert_eq!(applied.trim, Some(Revision(104)));
        let told = Ack { applied_origin_revision: 106, ..ack(13, 13, 13, 105) };
        assert_eq!(shipped.acknowledge(&told, false).unwrap().trim, Some(Revision(105)), "not what it was merely told");
    }

    #[test]
    fn the_spool_keeps_the_place_that_is_read_on_from_when_an_idle_position_is_further() {
        let mut shipped = shipping();
        shipped.progressed = Revision(120);
        let moved = shipped.acknowledge(&ack(13, 13, 13, 120), false).unwrap();
        assert_eq!((moved.trim, shipped.cursor), (Some(Revision(106)), Revision(106)));
    }

    #[test]
    fn an_acknowledgement_that_comes_late_or_twice_takes_nothing_back() {
        let mut shipped = shipping();
        shipped.acknowledge(&ack(13, 13, 13, 106), false).unwrap();
        let before = shipped.acked;
        assert_eq!(shipped.acknowledge(&ack(12, 12, 12, 104), false).unwrap(), Moved::default());
        assert_eq!(shipped.acked, before);
    }

    #[test]
    fn what_was_never_shipped_cannot_be_acknowledged() {
        let untrue = Untrue::Seq { acked: Seq(14), sent: Seq(13) };
        assert_eq!(shipping().acknowledge(&ack(14, 14, 10, 100), false), Err(untrue));
        let untrue = Untrue::Revision { acked: Revision(107), told: Revision(106) };
        assert_eq!(shipping().acknowledge(&ack(13, 13, 13, 107), false), Err(untrue));
        let mut told = shipping();
        told.progressed = Revision(107);
        assert!(told.acknowledge(&ack(13, 13, 13, 107), false).is_ok());
    }

    #[test]
    fn a_reset_goes_back_to_the_end_of_a_frame_or_of_what_was_received_and_nowhere_else() {
        let mut shipped = shipping();
        assert_eq!(shipped.reset(Seq(12)), Ok(1));
        assert_eq!((shipped.seq, shipped.cursor, shipped.frames_in_flight()), (Seq(12), Revision(104), 1));
        assert_eq!(shipped.reset(Seq(10)), Ok(2));
        assert_eq!((shipped.seq, shipped.cursor, shipped.frames_in_flight()), (Seq(10), Revision(100), 0));
        assert!(shipped.is_standalone());
        assert_eq!(shipping().reset(Seq(11)), Err(Untrue::NoFramesEnd { after: Seq(11) }));
        let mut received = shipping();
        received.acknowledge(&ack(13, 13, 12, 104), false).unwrap();
        assert_eq!(received.reset(Seq(13)), Ok(1), "durable frames are forgotten, their end is not");
        assert_eq!(received.cursor, Revision(106));
    }

    #[test]
    fn frames_travel_standalone_until_one_is_received() {
        let mut shipped = shipping();
        shipped.reset(Seq(10)).unwrap();
        assert!(!shipped.is_standalone());
        shipped.reset(Seq(10)).unwrap();
        assert!(shipped.is_standalone());
        shipped.frame(1, Revision(104));
        shipped.acknowledge(&ack(10, 10, 10, 100), false).unwrap();
        assert!(shipped.is_standalone());
        shipped.acknowledge(&ack(11, 10, 10, 100), false).unwrap();
        assert!(!shipped.is_standalone());
    }

    #[test]
    fn progress_tells_of_everything_covered_only_once_all_of_the_spool_is_on_its_way() {
        let mut shipped = shipping();
        shipped.sent = Revision(104);
        assert_eq!(shipped.through(true, Some(Revision(106)), Revision(120)), (Revision(120), true));
        assert_eq!(shipped.through(false, Some(Revision(106)), Revision(120)), (Revision(104), false));
        assert_eq!(shipped.through(true, Some(Revision(108)), Revision(120)), (Revision(104), false));
    }

    #[test]
    fn what_was_shipped_stands_at_all_that_is_covered_once_nothing_waits_in_the_spool() {
        let shipped = shipping();
        assert_eq!(shipped.standing(Some(Revision(106)), Revision(120)), Revision(120));
        assert_eq!(shipped.standing(None, Revision(90)), Revision(106));
        assert_eq!(shipped.standing(Some(Revision(108)), Revision(120)), Revision(106));
    }

    #[test]
    fn a_repair_is_told_of_unless_a_base_copy_is_under_way() {
        let mut shipped = shipping();
        let repairing = Ack { following: false, repairing: true, ..ack(13, 13, 13, 106) };
        shipped.acknowledge(&repairing, false).unwrap();
        assert!(shipped.acked.repairing && !shipped.acked.repair_wanted);
        let wanted = Ack { repair_wanted: true, ..ack(13, 13, 13, 106) };
        shipped.acknowledge(&wanted, false).unwrap();
        assert!(shipped.acked.repair_wanted);
        shipped.acknowledge(&Ack { following: false, ..wanted }, false).unwrap();
        assert!(!shipped.acked.repair_wanted, "what a copy or a repair is to bring is no difference yet");
        shipped.acknowledge(&repairing, false).unwrap();
        shipped.acknowledge(&repairing, true).unwrap();
        assert!(!shipped.acked.repairing);
    }

    #[test]
    fn a_base_copy_begins_a_new_count_from_its_anchor() {
        let mut shipped = shipping();
        shipped.open_epoch(Revision(200));
        assert_eq!((shipped.seq, shipped.frames_in_flight()), (Seq(0), 0));
        assert_eq!(shipped.acked.position_revision, Revision(200));
        assert_eq!(shipped.reset(Seq(0)), Ok(1));
        assert_eq!(shipped.cursor, Revision(200));
    }

    #[test]
    fn what_was_received_before_the_stream_is_safe_once_the_replica_says_so() {
        let mut shipped = Shipped::open(None, (Seq(12), Revision(104)), Seq(10));
        assert_eq!(shipped.durable_at_open(), Revision(0));
        shipped.follow(Revision(104));
        shipped.acknowledge(&ack(12, 11, 10, 100), false).unwrap();
        assert_eq!(shipped.acked.durable_revision, Revision(100));
        shipped.acknowledge(&ack(12, 12, 10, 100), false).unwrap();
        assert_eq!(shipped.acked.durable_revision, Revision(104));
    }

    #[test]
    fn a_link_that_is_held_or_paused_has_nothing_to_be_compared() {
        let mut shipped = Shipped::open(None, (Seq(12), Revision(104)), Seq(12));
        assert!(!shipped.acked.heard, "it has said nothing");
        for (held, paused, expected) in [(false, false, true), (true, false, false), (false, true, false)] {
            shipped.acknowledge(&Ack { held, paused, ..ack(12, 12, 12, 104) }, false).unwrap();
            assert_eq!((shipped.acked.notes_marks(), shipped.acked.heard), (expected, true));
        }
    }
}
