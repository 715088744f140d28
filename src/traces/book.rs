//! Job: the sampled revisions that are under way at this sidecar, and which spans each step ends.
//! Input: what happened to which seqs, and when. Output: spans.
//! Pure: the caller brings the clock.
//! Always true: at most `UNDER_WAY_MAX` are kept for each side; the oldest is forgotten first, and counted.

use super::span::{Span, Step, Traced};
use crate::model::{Epoch, LinkName, Revision, Seq};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// For each side, some 150 bytes each: more are under way only while a replica stands still, and then their traces tell nothing new.
pub const UNDER_WAY_MAX: usize = 4_096;

/// At the origin, from its frame on.
struct Shipped {
    revision: Revision,
    arrived_ns: u64,
    encoded_ns: u64,
    received_ns: Option<u64>,
}

/// At the replica, from its arrival on.
struct Received {
    revision: Revision,
    at_ns: u64,
    applied_ns: Option<u64>,
}

#[derive(Default)]
pub struct Book {
    shipped: BTreeMap<Traced, Shipped>,
    received: BTreeMap<Traced, Received>,
    forgotten: u64,
}

/// The times of one revision in a frame that was just made.
#[derive(Debug, Clone, Copy)]
pub struct Framed {
    pub revision: Revision,
    pub arrived_ns: u64,
    pub read_ns: u64,
    pub encoded_ns: u64,
}

impl Book {
    /// One that is shipped again, after a new hello, begins anew.
    pub fn framed(&mut self, of: Traced, at: Framed) -> [Span; 2] {
        let Framed { revision, arrived_ns, read_ns, encoded_ns } = at;
        let spans = [
            Span::new(&of, revision, Step::Spool, arrived_ns, read_ns),
            Span::new(&of, revision, Step::Encode, read_ns, encoded_ns),
        ];
        self.forgotten += keep(&mut self.shipped, of, Shipped { revision, arrived_ns, encoded_ns, received_ns: None });
        spans
    }

    /// The replica's word at the origin.
    pub fn heard(&mut self, link: &LinkName, epoch: Epoch, received: Seq, applied: Seq, now_ns: u64) -> Vec<Span> {
        let mut spans = Vec::new();
        for (of, one) in self.shipped.range_mut(up_to(link, epoch, received.max(applied))) {
            if one.received_ns.is_none() {
                one.received_ns = Some(now_ns);
                spans.push(Span::new(of, one.revision, Step::Ship, one.encoded_ns, now_ns));
            }
        }
        for (of, one) in take(&mut self.shipped, link, epoch, applied) {
            spans.push(Span::new(&of, one.revision, Step::Ack, one.received_ns.unwrap_or(now_ns), now_ns));
            spans.push(Span::new(&of, one.revision, Step::Revision, one.arrived_ns, now_ns));
        }
        spans
    }

    pub fn received(&mut self, of: Traced, revision: Revision, now_ns: u64) {
        self.forgotten += keep(&mut self.received, of, Received { revision, at_ns: now_ns, applied_ns: None });
    }

    pub fn journaled(&mut self, of: &Traced, now_ns: u64) -> Option<Span> {
        let one = self.received.get(of)?;
        Some(Span::new(of, one.revision, Step::Journal, one.at_ns, now_ns))
    }

    /// `through` and what came before it, in a transaction that began at `began_ns`.
    pub fn applied(&mut self, link: &LinkName, epoch: Epoch, through: Seq, began_ns: u64, now_ns: u64) -> Vec<Span> {
        let under_way =
            self.received.range_mut(up_to(link, epoch, through)).filter(|(_, one)| one.applied_ns.is_none());
        let apply = under_way.map(|(of, one)| {
            one.applied_ns = Some(now_ns);
            Span::new(of, one.revision, Step::Apply, began_ns.max(one.at_ns), now_ns)
        });
        apply.collect()
    }

    /// The origin was told that everything up to `applied` is.
    pub fn acknowledged(&mut self, link: &LinkName, epoch: Epoch, applied: Seq, now_ns: u64) -> Vec<Span> {
        let told = take(&mut self.received, link, epoch, applied).into_iter();
        let span = |(of, one): (Traced, Received)| {
            Some(Span::new(&of, one.revision, Step::Acknowledge, one.applied_ns?, now_ns))
        };
        told.filter_map(span).collect()
    }

    /// How many were forgotten since the last time that this was asked.
    pub fn forgotten(&mut self) -> u64 {
        std::mem::take(&mut self.forgotten)
    }
}

fn up_to(link: &LinkName, epoch: Epoch, seq: Seq) -> RangeInclusive<Traced> {
    let at = |seq| Traced { link: link.clone(), epoch, seq };
    at(Seq(0))..=at(seq)
}

/// The number of those that had to go for it.
fn keep<T>(under_way: &mut BTreeMap<Traced, T>, of: Traced, one: T) -> u64 {
    under_way.insert(of, one);
    let too_many = under_way.len() > UNDER_WAY_MAX;
    u64::from(too_many && under_way.pop_first().is_some())
}

fn take<T>(under_way: &mut BTreeMap<Traced, T>, link: &LinkName, epoch: Epoch, through: Seq) -> Vec<(Traced, T)> {
    let done: Vec<Traced> = under_way.range(up_to(link, epoch, through)).map(|(of, _)| of.clone()).collect();
    done.into_iter().filter_map(|of| under_way.remove_entry(&of)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch(3);

    fn link() -> LinkName {
        LinkName::new("config").unwrap()
    }

    fn traced(seq: u64) -> Traced {
        Traced { link: link(), epoch: EPOCH, seq: Seq(seq) }
    }

    fn framed(book: &mut Book, seq: u64) -> [Span; 2] {
        let at = Framed { revision: Revision(seq + 100), arrived_ns: 10, read_ns: 20, encoded_ns: 30 };
        book.framed(traced(seq), at)
    }

    fn steps(spans: &[Span]) -> Vec<(u64, Step, u64, u64)> {
        spans.iter().map(|span| (span.of.seq.0, span.step, span.from_ns, span.until_ns)).collect()
    }

    #[test]
    fn at_the_origin_each_step_begins_where_the_one_before_ends() {
        let mut book = Book::default();
        let made = framed(&mut book, 4);
        assert_eq!(steps(&made), [(4, Step::Spool, 10, 20), (4, Step::Encode, 20, 30)]);
        framed(&mut book, 8);
        assert_eq!(steps(&book.heard(&link(), EPOCH, Seq(5), Seq(3), 40)), [(4, Step::Ship, 30, 40)]);
        assert!(book.heard(&link(), EPOCH, Seq(7), Seq(3), 45).is_empty(), "each is told once");
        let both = book.heard(&link(), EPOCH, Seq(8), Seq(8), 50);
        let wanted = [
            (8, Step::Ship, 30, 50),
            (4, Step::Ack, 40, 50),
            (4, Step::Revision, 10, 50),
            (8, Step::Ack, 50, 50),
            (8, Step::Revision, 10, 50),
        ];
        assert_eq!(steps(&both), wanted);
        assert!(book.heard(&link(), EPOCH, Seq(8), Seq(8), 60).is_empty());
    }

    #[test]
    fn at_the_replica_each_step_is_told_once_and_in_order() {
        let mut book = Book::default();
        book.received(traced(4), Revision(104), 10);
        assert_eq!(book.journaled(&traced(4), 20).map(|span| (span.from_ns, span.until_ns)), Some((10, 20)));
        assert!(book.journaled(&traced(5), 20).is_none(), "it is not sampled");
        assert_eq!(steps(&book.applied(&link(), EPOCH, Seq(6), 25, 30)), [(4, Step::Apply, 25, 30)]);
        assert!(book.applied(&link(), EPOCH, Seq(7), 31, 32).is_empty());
        assert_eq!(steps(&book.acknowledged(&link(), EPOCH, Seq(6), 40)), [(4, Step::Acknowledge, 30, 40)]);
        assert!(book.acknowledged(&link(), EPOCH, Seq(6), 41).is_empty());
        assert_eq!(book.journaled(&traced(4), 42), None);
    }

    #[test]
    fn another_link_and_another_epoch_are_not_meant() {
        let mut book = Book::default();
        framed(&mut book, 4);
        book.received(traced(4), Revision(104), 10);
        let other = LinkName::new("other").unwrap();
        for (link, epoch) in [(&other, EPOCH), (&link(), Epoch(4)), (&link(), Epoch(2))] {
            assert!(book.heard(link, epoch, Seq(9), Seq(9), 50).is_empty());
            assert!(book.applied(link, epoch, Seq(9), 1, 50).is_empty());
            assert!(book.acknowledged(link, epoch, Seq(9), 50).is_empty());
        }
    }

    #[test]
    fn one_that_is_shipped_again_begins_anew() {
        let mut book = Book::default();
        framed(&mut book, 4);
        book.heard(&link(), EPOCH, Seq(4), Seq(0), 40);
        framed(&mut book, 4);
        assert_eq!(steps(&book.heard(&link(), EPOCH, Seq(4), Seq(0), 60)), [(4, Step::Ship, 30, 60)]);
    }

    #[test]
    fn a_replica_that_stands_still_costs_no_more_than_the_bound() {
        let mut book = Book::default();
        for seq in 0..UNDER_WAY_MAX as u64 + 10 {
            framed(&mut book, seq);
            book.received(traced(seq), Revision(seq), 10);
        }
        assert_eq!((book.shipped.len(), book.received.len()), (UNDER_WAY_MAX, UNDER_WAY_MAX));
        assert_eq!((book.forgotten(), book.forgotten()), (20, 0));
        assert!(book.heard(&link(), EPOCH, Seq(9), Seq(9), 50).is_empty(), "the oldest went first");
    }
}
