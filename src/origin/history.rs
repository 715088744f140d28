//! Job: what becomes of a link whose origin has another history than the one that was carried: a restored cluster, or another one.
//! Input: the configured policy, when it was last followed, the replica's position, what was written down. Output: go on or stop; then a
//! `Resume`.
//! Pure: no clock, no I/O.
//! Always true: without the policy nothing goes on by itself; with it, no key of the replica is deleted past the guards, and two
//! origins that take turns stop the link. What was met once is met again, until the position is of another epoch.

use super::resume::{CopyReason, Resume};
use crate::config::OtherHistory;
use crate::model::{Digest, Epoch, Position, Seq};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A cluster is not restored twice within this time; two clusters that answer at one place look like it.
const AGAIN_AFTER_MIN: Duration = Duration::from_secs(600);

/// What follows from another history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follows {
    /// The next epoch opens; what differs is found by digests, and mended.
    Resync,
    Stop,
    /// It did go on by itself a moment ago: only a person can tell which of the two is right.
    StopAgain,
}

/// `since`: how long ago the link last went on with another history by itself.
pub fn follows(policy: OtherHistory, since: Option<Duration>) -> Follows {
    match (policy, since) {
        (OtherHistory::Stop, _) => Follows::Stop,
        (OtherHistory::Resync, Some(since)) if since < AGAIN_AFTER_MIN => Follows::StopAgain,
        (OtherHistory::Resync, _) => Follows::Resync,
    }
}

/// What is told beside the reason of a stop that comes too soon after the last time.
pub fn told_again() -> String {
    format!(
        "the link has gone on with another history less than {} minutes ago already, so that two origins may answer by turns; see that \
         [etcd] endpoints are of one cluster",
        AGAIN_AFTER_MIN.as_secs() / 60
    )
}

/// Past every stop of the resume table, into the next epoch. What the replica holds stays, and is compared; where it is only a part of
/// a base copy, or of other ranges, there is nothing to compare it with.
pub fn by_digests(position: Option<&Position>, ranges_digest: Digest) -> Resume {
    let reason = CopyReason::OtherHistory;
    match position {
        None => Resume::Copy { epoch: Epoch(0).next(), cursor: None, reason },
        Some(position) => {
            let epoch = position.epoch.next();
            let comparable = position.cursor.is_none() && position.ranges_digest == ranges_digest;
            if comparable { Resume::Repair { epoch, reason } } else { Resume::Copy { epoch, cursor: None, reason } }
        }
    }
}

/// That this origin has another history than a replica that has come so far, as it is written down in the origin's etcd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Met {
    pub epoch: Epoch,
    /// Of the position at the hello after which it was met.
    pub seq: Seq,
    /// As it was told.
    pub reason: String,
}

impl Met {
    /// The bytes kept in etcd: JSON, readable with etcdctl.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub fn from_json(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// A base copy or a repair has opened another epoch since, or the replica went back to before.
    pub fn is_outlived(&self, position: Option<&Position>) -> bool {
        position.is_none_or(|position| position.epoch != self.epoch || position.seq < self.seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Phase, Revision, Term};

    const RANGES: Digest = Digest([1; 16]);

    fn position(state: Phase) -> Position {
        Position { term: Term(0), ranges_digest: RANGES, state, anchor_revision: Revision(10), ..Position::of_tests() }
    }

    #[test]
    fn a_link_goes_on_with_another_history_only_where_that_is_its_policy_and_not_again_and_again() {
        let seconds = |n| Some(Duration::from_secs(n));
        for since in [None, seconds(0), seconds(100_000)] {
            assert_eq!(follows(OtherHistory::Stop, since), Follows::Stop);
        }
        assert_eq!(follows(OtherHistory::Resync, None), Follows::Resync);
        assert_eq!(follows(OtherHistory::Resync, seconds(0)), Follows::StopAgain);
        assert_eq!(follows(OtherHistory::Resync, seconds(599)), Follows::StopAgain);
        assert_eq!(follows(OtherHistory::Resync, seconds(600)), Follows::Resync);
        assert!(told_again().contains("10 minutes"));
    }

    #[test]
    fn another_history_that_was_met_stands_for_all_that_came_of_that_position_and_for_nothing_else() {
        let met = Met { epoch: Epoch(3), seq: Seq(40), reason: "the origin was restored".to_owned() };
        let at = |epoch, seq| Position { epoch: Epoch(epoch), seq: Seq(seq), ..position(Phase::Following) };
        assert!(!met.is_outlived(Some(&at(3, 40))) && !met.is_outlived(Some(&at(3, 41))));
        assert!(met.is_outlived(Some(&at(3, 39))), "the replica was restored to before");
        assert!(met.is_outlived(Some(&at(4, 40))) && met.is_outlived(Some(&at(2, 40))) && met.is_outlived(None));
    }

    /// It lies in etcds, written by other versions.
    #[test]
    fn what_was_met_is_written_in_the_form_that_lies_in_etcds_and_read_again() {
        let met = Met { epoch: Epoch(3), seq: Seq(40), reason: "the origin was restored".to_owned() };
        let json = "{\"epoch\":3,\"seq\":40,\"reason\":\"the origin was restored\"}";
        assert_eq!(String::from_utf8(met.to_json()).unwrap(), json);
        assert_eq!(Met::from_json(json.as_bytes()).unwrap(), met);
        assert!(Met::from_json(b"").is_err() && Met::from_json(b"{\"epoch\":3}").is_err());
    }

    #[test]
    fn what_the_replica_holds_whole_is_compared_in_the_next_epoch() {
        for state in [Phase::Following, Phase::Repairing, Phase::Copying] {
            let expected = Resume::Repair { epoch: Epoch(4), reason: CopyReason::OtherHistory };
            assert_eq!(by_digests(Some(&position(state)), RANGES), expected);
        }
    }

    #[test]
    fn what_it_holds_in_part_or_of_other_ranges_is_copied_anew() {
        let copied = |position: Option<&Position>, ranges| {
            let decided = by_digests(position, ranges);
            let Resume::Copy { epoch, cursor: None, reason: CopyReason::OtherHistory } = decided else {
                panic!("{decided:?}")
            };
            epoch
        };
        let cut_short = Position { cursor: Some("k".into()), ..position(Phase::Copying) };
        assert_eq!(copied(Some(&cut_short), RANGES), Epoch(4));
        assert_eq!(copied(Some(&position(Phase::Following)), Digest([2; 16])), Epoch(4));
        assert_eq!(copied(None, RANGES), Epoch(1));
    }
}
