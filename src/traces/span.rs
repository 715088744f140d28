//! Job: what a span is, and by which rule both sides of a link give the same revision the same trace.
//! Input: link, epoch, seq, the name of a step. Output: sampled or not, ids, spans.
//! Pure: no clock, no I/O.
//! Always true: ids come from link, epoch, seq and step alone, so that nothing of a trace travels between the sidecars.

use crate::model::{Epoch, LinkName, Revision, Seq};
use std::num::NonZeroU64;

/// The part of a revision's way that one span measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// From its arrival from the origin's watch to the word that it is applied: the root of the trace.
    Revision,
    /// Sequenced, spooled, and read for shipping.
    Spool,
    Encode,
    /// From its frame to the word that the replica has received it.
    Ship,
    /// From then to the word that it is applied.
    Ack,
    /// Decoded, admitted, and taken by the journal.
    Journal,
    /// One transaction at the replica's etcd.
    Apply,
    /// From then until the replica has said so.
    Acknowledge,
}

impl Step {
    pub fn as_str(self) -> &'static str {
        match self {
            Step::Revision => "revision",
            Step::Spool => "spool",
            Step::Encode => "encode",
            Step::Ship => "ship",
            Step::Ack => "ack",
            Step::Journal => "journal",
            Step::Apply => "apply",
            Step::Acknowledge => "acknowledge",
        }
    }

    /// What it is a part of; the replica's steps are parts of the origin's `ship`.
    pub fn parent(self) -> Option<Step> {
        match self {
            Step::Revision => None,
            Step::Spool | Step::Encode | Step::Ship | Step::Ack => Some(Step::Revision),
            Step::Journal | Step::Apply | Step::Acknowledge => Some(Step::Ship),
        }
    }
}

/// A revision on its way over a link.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Traced {
    pub link: LinkName,
    pub epoch: Epoch,
    pub seq: Seq,
}

impl Traced {
    pub fn trace_id(&self) -> [u8; 16] {
        self.id("trace")
    }

    pub fn span_id(&self, step: Step) -> [u8; 8] {
        self.id(step.as_str())
    }

    fn id<const BYTES: usize>(&self, what: &str) -> [u8; BYTES] {
        let mut hasher = blake3::Hasher::new_derive_key("etcd-ferry 2026 ids of traces and spans");
        // No link's name holds a line break.
        hasher.update(self.link.as_str().as_bytes()).update(b"\n").update(&self.epoch.0.to_le_bytes());
        hasher.update(&self.seq.0.to_le_bytes()).update(what.as_bytes());
        let mut id = [0; BYTES];
        hasher.finalize_xof().fill(&mut id);
        // OTLP takes an id of zeros for none.
        if id == [0; BYTES] {
            id[0] = 1;
        }
        id
    }
}

/// One step of one revision; times are nanoseconds of Unix time by the clock of the side that took it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub of: Traced,
    pub revision: Revision,
    pub step: Step,
    pub from_ns: u64,
    pub until_ns: u64,
}

impl Span {
    /// A clock that was set back makes a step short, never negative.
    pub fn new(of: &Traced, revision: Revision, step: Step, from_ns: u64, until_ns: u64) -> Self {
        Self { of: of.clone(), revision, step, from_ns: from_ns.min(until_ns), until_ns }
    }
}

/// The sampled ones of `first..=last`: each seq that `sample` divides, at either side.
pub fn sampled(sample: NonZeroU64, first: Seq, last: Seq) -> impl Iterator<Item = Seq> {
    let next = first.0.checked_next_multiple_of(sample.get());
    let seqs = std::iter::successors(next, move |seq| seq.checked_add(sample.get()));
    seqs.take_while(move |seq| *seq <= last.0).map(Seq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const ALL: [Step; 8] = [
        Step::Revision,
        Step::Spool,
        Step::Encode,
        Step::Ship,
        Step::Ack,
        Step::Journal,
        Step::Apply,
        Step::Acknowledge,
    ];

    fn traced(link: &str, epoch: u64, seq: u64) -> Traced {
        Traced { link: LinkName::new(link).unwrap(), epoch: Epoch(epoch), seq: Seq(seq) }
    }

    #[test]
    fn both_sides_derive_the_same_ids_and_no_two_revisions_share_any() {
        let mut traces = HashSet::new();
        let mut spans = HashSet::new();
        for link in ["a", "b"] {
            for epoch in 0..3 {
                for seq in 0..20 {
                    let one = traced(link, epoch, seq);
                    assert_eq!(one.trace_id(), traced(link, epoch, seq).trace_id());
                    assert!(traces.insert(one.trace_id()));
                    assert!(ALL.into_iter().all(|step| spans.insert(one.span_id(step))));
                }
            }
        }
    }

    #[test]
    fn one_root_has_all_others_below_it() {
        let up = |step: Step| std::iter::successors(Some(step), |step| step.parent()).last();
        assert!(ALL.into_iter().all(|step| up(step) == Some(Step::Revision)));
    }

    #[test]
    fn every_nth_seq_is_sampled_however_frames_are_cut() {
        let sample = |n: u64, first: u64, last: u64| -> Vec<u64> {
            sampled(NonZeroU64::new(n).unwrap(), Seq(first), Seq(last)).map(|seq| seq.0).collect()
        };
        assert_eq!(sample(1, 3, 5), [3, 4, 5]);
        assert_eq!(sample(4, 1, 12), [4, 8, 12]);
        assert_eq!([sample(4, 1, 5), sample(4, 6, 12)].concat(), [4, 8, 12]);
        assert!(sample(4, 5, 7).is_empty() && sample(4, 5, 4).is_empty());
        assert_eq!(sample(u64::MAX, u64::MAX - 1, u64::MAX), [u64::MAX]);
    }

    #[test]
    fn a_clock_that_was_set_back_makes_no_negative_span() {
        let span = Span::new(&traced("a", 1, 1), Revision(9), Step::Ship, 50, 20);
        assert_eq!((span.from_ns, span.until_ns), (20, 20));
    }
}
