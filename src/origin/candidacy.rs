//! Job: who ships a link: what a candidate does next, when a shipper gives way, what a standby does with its spool.
//! Input: the candidates' keys and the published position as etcd shows them, ages, what a hello was answered. Output: the next step.
//! Pure: no clock, no I/O.
//! Always true: of the candidates that see the same keys one leads; whoever leads has the highest term that any shipper had before.
//!
//! Each sidecar beside the origin's cluster stands for election with a key of its own, named after its node and bound to a lease. The
//! key that was created first leads, and its create_revision is the term: who comes later has a higher one, so terms only grow from one
//! shipper to the next. The lease decides when the others go on without a shipper; it protects nothing. What protects the replica is
//! the term, which is compared inside each transaction there, by way of the position.

use crate::model::{Epoch, Revision, Term};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// After so long without a renewal etcd deletes a candidate's key. Another must ship within 10 s of a kill: this, etcd's half second,
/// the standby's next look and a hello.
pub const LEASE_TTL: Duration = Duration::from_secs(5);
/// A shipper for whom others stand by stops by itself so long after it sent the last renewal that was answered: before its lease can have ended, with a second
/// for what is still on its way. Good manners: it would be fenced.
pub const SHIPS_UNRENEWED_MAX: Duration = Duration::from_secs(4);
/// A shipper renews, and looks at the candidates, so often.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(1);
/// A standby does so more often: how soon it sees that it leads is a part of every takeover.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A replica says something every 3 s on an open stream. A shipper that has heard nothing for so long gives way, if others stand by:
/// it may be cut off where they are not.
pub const PATIENCE_FIRST: Duration = Duration::from_secs(6);
/// While nobody reaches the replica, each turn lasts twice as long as the last: giving way costs the origin two revisions.
pub const PATIENCE_MAX: Duration = Duration::from_secs(60);
/// The applied revision is published at most so often.
pub const PUBLISH_INTERVAL: Duration = Duration::from_secs(10);

/// The value of a candidate's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// Random for each start of a sidecar: a key that an earlier process left is not taken for one's own.
    pub run: u64,
}

/// A candidate's key as etcd shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub node: String,
    /// `None`: the value is none that this version writes.
    pub run: Option<u64>,
    /// The key's create_revision.
    pub term: Term,
    pub mod_revision: Revision,
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Own<'a> {
    pub node: &'a str,
    pub run: u64,
    /// This process has stood for election before.
    pub enrolled: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// No key bears this node's name: create it.
    Enrol,
    /// An earlier process of this node left its key, and its lease may last for seconds: delete it, if it is still this one.
    Replace {
        mod_revision: Revision,
    },
    Lead {
        term: Term,
        others: usize,
    },
    StandBy {
        shipper: String,
        term: Term,
    },
    /// A later process stands under this node's name: it is left alone, or the two would replace each other for ever.
    NameTaken {
        shipper: String,
        term: Term,
    },
}

/// What a candidate does, from all candidates of its link.
pub fn next(own: Own<'_>, candidates: &[Candidate]) -> Next {
    let Some(mine) = candidates.iter().find(|candidate| candidate.node == own.node) else { return Next::Enrol };
    let first = candidates.iter().min_by_key(|candidate| candidate.term).unwrap_or(mine);
    let (shipper, term) = (first.node.clone(), first.term);
    if mine.run != Some(own.run) {
        return if own.enrolled {
            Next::NameTaken { shipper, term }
        } else {
            Next::Replace { mod_revision: mine.mod_revision }
        };
    }
    if first.node == mine.node {
        Next::Lead { term, others: candidates.len() - 1 }
    } else {
        Next::StandBy { shipper, term }
    }
}

/// What keeps this sidecar from shipping well, and need not keep another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    /// Its spool's disk has failed.
    Disk,
    /// Its spool lacks what the replica needs next, and etcd has compacted it.
    Compacted,
}

impl Unfit {
    /// Why another sidecar is to ship.
    pub fn reason(self) -> &'static str {
        match self {
            Unfit::Disk => "this sidecar's spool cannot be used: another sidecar's turn",
            Unfit::Compacted => {
                "this sidecar's spool lacks what etcd has compacted: another sidecar's turn, whose spool may have it"
            }
        }
    }
}

/// Whether a shipper that has not heard from the replica for `silent` lets another one try. `None`: it waits for an operator, as any
/// other would. One that would have to compare both sides, for want of what another may have in its spool, does not wait.
pub fn gives_way(silent: Option<Duration>, patience: Duration, others: usize, unfit: Option<Unfit>) -> bool {
    let at_once = unfit == Some(Unfit::Compacted);
    others > 0 && (at_once || silent.is_some_and(|silent| silent >= patience))
}

/// Where the replica is, and this sidecar's spool cannot go on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    pub epoch: Epoch,
    pub after: Revision,
}

/// Whether a shipper first lets the others look into their spools. `asked`: for which gap it did so last; nobody had it, if the gap is
/// still the same.
pub fn asks_others(gap: Gap, asked: Option<Gap>, others: usize) -> bool {
    others > 0 && asked != Some(gap)
}

/// Whether a shipper that cannot renew stops by itself. `since`: when it sent the last renewal that was answered; `others`: who stood by
/// then. With nobody to take over, what is in its spool is better shipped: should another sidecar come, this one is fenced.
pub fn stops_unrenewed(since: Duration, others: usize) -> bool {
    others > 0 && since >= SHIPS_UNRENEWED_MAX
}

/// How long it waits the next time.
pub fn patience_after(patience: Duration) -> Duration {
    patience.saturating_mul(2).min(PATIENCE_MAX)
}

/// Why a hello was fenced, and so what follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fencing {
    /// The epoch that was claimed is old, the term is not: the next hello claims none, and learns.
    OldEpoch,
    /// Another one was elected.
    Deposed,
    /// etcd says that this sender is the elected one, and its term is lower than one that came before: terms are revisions of this
    /// cluster, so its history went back.
    WentBack,
}

/// `leads`: what a linearizable read after the fencing says of this sender and its `term`.
pub fn fencing(position_term: Term, term: Term, leads: bool) -> Fencing {
    match (position_term > term, leads) {
        (false, _) => Fencing::OldEpoch,
        (true, false) => Fencing::Deposed,
        (true, true) => Fencing::WentBack,
    }
}

/// The value of the link's `applied` key in the origin's etcd: how far the shipper knows the position to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    pub term: Term,
    pub epoch: Epoch,
    /// Everything up to it is applied, and the position says so: standbys trim up to it.
    pub revision: Revision,
}

impl Published {
    /// As etcd holds it.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// `None` for a value that is none: then nothing is published.
    pub fn from_json(value: &[u8]) -> Option<Self> {
        serde_json::from_slice(value).ok()
    }
}

/// Whether `now` is to be written over `before`. `since`: how long ago this shipper wrote last; `moved`: the origin did, since then, by
/// more than etcd-ferry's own work.
pub fn publishes(before: Option<Published>, now: Published, since: Option<Duration>, moved: bool) -> bool {
    let due = since.is_none_or(|since| since >= PUBLISH_INTERVAL);
    match before {
        None => due,
        // A new epoch, or a replica that was restored: what is published promises too much, or of another run.
        Some(before) if before.epoch != now.epoch || before.revision > now.revision => due,
        Some(before) => due && now.revision > before.revision && (moved || since.is_none()),
    }
}

/// What the tail of a standby is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tailing {
    /// It watches, or tries to, or waits for room.
    AtWork,
    /// It has nothing to go on with: the spool is empty, of another history, or etcd has compacted past its end.
    Nothing,
    /// Only a person can help.
    Stopped,
}

/// What a standby does for its spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chore {
    Nothing,
    /// Let go of what is applied.
    Trim(Revision),
    /// Begin the spool after this revision if etcd still shows all that follows it, else at the head.
    Begin {
        after: Option<Revision>,
    },
    /// The spool does not reach back to what is applied: begin it there if etcd still shows all that follows, else leave it.
    BeginEarlier {
        after: Revision,
    },
}

/// `base`: the spool holds everything after it.
pub fn chore(tailing: Tailing, base: Revision, published: Option<Published>) -> Chore {
    let applied = published.map(|published| published.revision);
    match (tailing, applied) {
        (Tailing::Stopped, _) | (Tailing::AtWork, None) => Chore::Nothing,
        (Tailing::Nothing, after) => Chore::Begin { after },
        (Tailing::AtWork, Some(applied)) if applied < base => Chore::BeginEarlier { after: applied },
        (Tailing::AtWork, Some(applied)) => Chore::Trim(applied),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const NODES: [&str; 3] = ["a", "b", "c"];

    fn own(node: &str) -> Own<'_> {
        Own { node, run: run_of(node), enrolled: true }
    }

    fn run_of(node: &str) -> u64 {
        u64::from(node.as_bytes()[0])
    }

    fn candidate(node: &str, term: u64) -> Candidate {
        Candidate { node: node.to_owned(), run: Some(run_of(node)), term: Term(term), mod_revision: Revision(term) }
    }

    /// Every set of up to three candidates, in every order of their terms.
    fn elections() -> Vec<Vec<Candidate>> {
        let mut elections = Vec::new();
        for terms in 0..4_u64.pow(3) {
            let terms = [terms % 4, terms / 4 % 4, terms / 16];
            let standing: Vec<(&str, u64)> = NODES.into_iter().zip(terms).filter(|(_, term)| *term > 0).collect();
            let different: BTreeSet<u64> = standing.iter().map(|(_, term)| *term).collect();
            // Each creation is a revision of its own.
            if different.len() == standing.len() {
                elections.push(standing.into_iter().map(|(node, term)| candidate(node, term)).collect());
            }
        }
        elections
    }

    #[test]
    fn whatever_candidates_there_are_the_first_one_leads_and_everyone_agrees_who_that_is() {
        for candidates in elections() {
            let first = candidates.iter().min_by_key(|c| c.term).cloned();
            for node in NODES {
                let step = next(own(node), &candidates);
                let stands = candidates.iter().any(|c| c.node == node);
                let expected = match &first {
                    Some(first) if first.node == node => Next::Lead { term: first.term, others: candidates.len() - 1 },
                    Some(first) if stands => Next::StandBy { shipper: first.node.clone(), term: first.term },
                    Some(_) | None => Next::Enrol,
                };
                assert_eq!(step, expected, "{node} among {candidates:?}");
            }
        }
    }

    #[test]
    fn whoever_leads_after_the_shipper_is_gone_has_a_higher_term() {
        for candidates in elections() {
            let Some(first) = candidates.iter().min_by_key(|c| c.term).cloned() else { continue };
            let rest: Vec<Candidate> = candidates.iter().filter(|c| **c != first).cloned().collect();
            for node in NODES {
                if let Next::Lead { term, .. } = next(own(node), &rest) {
                    assert!(term > first.term);
                }
            }
        }
    }

    #[test]
    fn a_key_that_an_earlier_process_of_this_node_left_is_replaced_once_and_a_later_one_is_left_alone() {
        for run in [None, Some(99)] {
            for other in [vec![], vec![candidate("b", 3)], vec![candidate("b", 9)]] {
                let left = Candidate { run, mod_revision: Revision(6), ..candidate("a", 5) };
                let candidates = [vec![left], other].concat();
                let (shipper, term) = if candidates.iter().any(|c| c.term == Term(3)) { ("b", 3) } else { ("a", 5) };
                let at_start = Own { enrolled: false, ..own("a") };
                assert_eq!(next(at_start, &candidates), Next::Replace { mod_revision: Revision(6) });
                let taken = Next::NameTaken { shipper: shipper.to_owned(), term: Term(term) };
                assert_eq!(next(own("a"), &candidates), taken);
            }
        }
    }

    #[test]
    fn others_are_asked_once_for_each_gap() {
        let gap = |epoch, after| Gap { epoch: Epoch(epoch), after: Revision(after) };
        assert!(asks_others(gap(1, 7), None, 1));
        assert!(!asks_others(gap(1, 7), None, 0), "nobody is there to ask");
        assert!(!asks_others(gap(1, 7), Some(gap(1, 7)), 1), "nobody had it");
        for other in [gap(1, 8), gap(2, 7)] {
            assert!(asks_others(other, Some(gap(1, 7)), 1));
        }
    }

    #[test]
    fn a_shipper_gives_way_only_to_others_and_only_after_silence() {
        let (long, short) = (Duration::from_secs(6), Duration::from_secs(5));
        for (silent, others, expected) in
            [(Some(long), 1, true), (Some(long), 0, false), (Some(short), 1, false), (None, 2, false)]
        {
            for unfit in [None, Some(Unfit::Disk)] {
                assert_eq!(gives_way(silent, PATIENCE_FIRST, others, unfit), expected, "{silent:?}, {others}");
            }
            let at_once = gives_way(silent, PATIENCE_FIRST, others, Some(Unfit::Compacted));
            assert_eq!(at_once, others > 0, "{silent:?}, {others}");
        }
        let mut patience = PATIENCE_FIRST;
        for _ in 0..10 {
            patience = patience_after(patience);
        }
        assert_eq!(patience, PATIENCE_MAX);
        assert_eq!(patience_after(PATIENCE_FIRST), 2 * PATIENCE_FIRST);
    }

    #[test]
    fn a_shipper_that_cannot_renew_stops_by_itself_if_others_stand_by() {
        let (just, not_yet) = (SHIPS_UNRENEWED_MAX, SHIPS_UNRENEWED_MAX - Duration::from_millis(1));
        assert!(stops_unrenewed(just, 1) && stops_unrenewed(LEASE_TTL, 2));
        assert!(!stops_unrenewed(not_yet, 1) && !stops_unrenewed(just, 0) && !stops_unrenewed(10 * LEASE_TTL, 0));
    }

    #[test]
    fn a_shipper_has_stopped_by_itself_before_its_lease_can_have_ended_and_another_ships_within_ten_seconds() {
        assert!(SHIPS_UNRENEWED_MAX < LEASE_TTL && SHIPS_UNRENEWED_MAX > 2 * RENEW_INTERVAL);
        let etcd_looks_at_leases = Duration::from_millis(500);
        let hello = Duration::from_secs(1);
        assert!(LEASE_TTL + etcd_looks_at_leases + LOOK_INTERVAL + hello < Duration::from_secs(8));
        assert!(PATIENCE_FIRST + LOOK_INTERVAL + hello < Duration::from_secs(8));
    }

    #[test]
    fn a_fencing_by_a_higher_term_means_a_rival_or_where_there_is_none_a_history_that_went_back() {
        let seen = Term(7);
        for (term, leads, expected) in [
            (7, true, Fencing::OldEpoch),
            (8, true, Fencing::OldEpoch),
            (8, false, Fencing::OldEpoch),
            (6, false, Fencing::Deposed),
            (6, true, Fencing::WentBack),
        ] {
            assert_eq!(fencing(seen, Term(term), leads), expected, "term {term}, leads: {leads}");
        }
    }

    fn published(epoch: u64, revision: u64) -> Published {
        Published { term: Term(1), epoch: Epoch(epoch), revision: Revision(revision) }
    }

    #[test]
    fn the_applied_revision_is_published_each_ten_seconds_if_it_moved_by_more_than_our_own_work() {
        let (now, long, short) = (published(2, 50), Some(PUBLISH_INTERVAL), Some(Duration::from_secs(9)));
        for (before, since, moved, expected) in [
            (None, None, false, true),
            (None, short, true, false),
            (Some(published(2, 50)), None, true, false),
            (Some(published(2, 49)), None, false, true),
            (Some(published(2, 49)), long, true, true),
            (Some(published(2, 49)), long, false, false),
            (Some(published(2, 49)), short, true, false),
            (Some(published(2, 51)), None, false, true),
            (Some(published(2, 51)), short, false, false),
            (Some(published(1, 50)), None, false, true),
            (Some(published(1, 50)), long, false, true),
        ] {
            assert_eq!(publishes(before, now, since, moved), expected, "{before:?}, {since:?}, moved: {moved}");
        }
        assert_eq!(Published::from_json(&now.to_json()), Some(now));
        assert_eq!(Published::from_json(b"{}"), None);
    }

    #[test]
    fn a_standby_begins_where_the_replica_is_and_trims_up_to_there() {
        let at = |revision| Some(published(1, revision));
        for (tailing, base, published, expected) in [
            (Tailing::Nothing, 0, None, Chore::Begin { after: None }),
            (Tailing::Nothing, 90, at(40), Chore::Begin { after: Some(Revision(40)) }),
            (Tailing::AtWork, 30, None, Chore::Nothing),
            (Tailing::AtWork, 30, at(40), Chore::Trim(Revision(40))),
            (Tailing::AtWork, 40, at(40), Chore::Trim(Revision(40))),
            (Tailing::AtWork, 41, at(40), Chore::BeginEarlier { after: Revision(40) }),
            (Tailing::Stopped, 41, at(40), Chore::Nothing),
            (Tailing::Stopped, 0, None, Chore::Nothing),
        ] {
            assert_eq!(chore(tailing, Revision(base), published), expected, "{tailing:?}, {base}, {published:?}");
        }
    }
}
