//! Job: what the demo measures: lag, rates, what waits.
//! Input: the origin's acknowledgements of writes, the replica's revisions as a watch there shows them, each with its moment.
//! Output: figures for the live line and for the table.
//! Pure: moments come from outside.
//! Always true: a revision counts as applied when the replica's position passes it; its lag runs from the origin's acknowledgement to the
//! event at the replica; nothing counts twice.

use crate::model::{Epoch, Revision, Seq};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// What the live line looks back on.
const WINDOW: Duration = Duration::from_secs(1);
/// The replica's event can be seen before the writer has its acknowledgement; it never is so many revisions earlier.
const ARRIVALS_KEPT: usize = 4_096;

/// A revision that the origin's etcd acknowledged to a writer.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    pub revision: Revision,
    pub at: Instant,
    pub puts: u64,
    pub deletes: u64,
    /// Keys and values.
    pub bytes: u64,
}

/// A revision of the replica that moved the position.
#[derive(Debug, Clone, Copy)]
pub struct Arrived {
    pub at: Instant,
    pub epoch: Epoch,
    pub seq: Seq,
    /// Everything that the origin committed up to here is in.
    pub origin_revision: Revision,
    /// Keys of the link that it changed.
    pub changes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub revisions: u64,
    pub puts: u64,
    pub deletes: u64,
    pub bytes: u64,
}

impl Totals {
    fn add(&mut self, written: &Written) {
        self.revisions += 1;
        self.puts += written.puts;
        self.deletes += written.deletes;
        self.bytes += written.bytes;
    }
}

/// p50, p99 and the longest of some lags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lag {
    pub p50: Duration,
    pub p99: Duration,
    pub longest: Duration,
    pub samples: usize,
}

impl Lag {
    /// `None` without a sample.
    pub fn of(mut samples: Vec<Duration>) -> Option<Self> {
        samples.sort_unstable();
        let rank = |percent: usize| samples.get((samples.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Some(Self { p50: rank(50)?, p99: rank(99)?, longest: rank(100)?, samples: samples.len() })
    }
}

/// What waits to be applied.
#[derive(Debug, Clone, Copy, Default)]
pub struct Backlog {
    pub revisions: u64,
    /// When the oldest of them was acknowledged at the origin.
    pub oldest: Option<Instant>,
    /// The most that waited since the link was last disturbed.
    pub revisions_max: u64,
    /// When the newest revision that is applied was acknowledged at the origin.
    pub newest_applied: Option<Instant>,
}

#[derive(Debug, Default)]
pub struct Meter {
    waiting: BTreeMap<Revision, Written>,
    waiting_max: usize,
    newest_applied: Option<Instant>,
    arrivals: VecDeque<(Revision, Instant)>,
    window: VecDeque<(Instant, Duration)>,
    calm_since: Option<Instant>,
    calm: Vec<Duration>,
    pub written: Totals,
    pub applied: Totals,
    /// The position that the last of the replica's revisions came with.
    pub position: Option<Arrived>,
    /// Replica revisions that changed keys.
    pub transactions: u64,
    /// The most keys that one replica revision changed.
    pub changes_max: u64,
    /// Replica revisions that changed keys without moving the seq on: something took effect twice.
    pub twice: u64,
}

impl Meter {
    pub fn write(&mut self, written: Written) {
        self.written.add(&written);
        let before = self.arrivals.partition_point(|(revision, _)| *revision < written.revision);
        match self.arrivals.get(before) {
            Some(&(_, at)) => self.apply(&written, at),
            None => {
                self.waiting.insert(written.revision, written);
                self.waiting_max = self.waiting_max.max(self.waiting.len());
            }
        }
    }

    pub fn arrive(&mut self, arrived: Arrived) {
        if arrived.changes > 0 {
            let before = self.position.map(|last| (last.epoch, last.seq));
            self.transactions += 1;
            self.changes_max = self.changes_max.max(arrived.changes);
            self.twice += u64::from(before.is_some_and(|before| (arrived.epoch, arrived.seq) <= before));
        }
        self.position = Some(arrived);
        self.arrivals.push_back((arrived.origin_revision, arrived.at));
        if self.arrivals.len() > ARRIVALS_KEPT {
            self.arrivals.pop_front();
        }
        let rest = self.waiting.split_off(&arrived.origin_revision.next());
        for written in std::mem::replace(&mut self.waiting, rest).values() {
            self.apply(written, arrived.at);
        }
    }

    fn apply(&mut self, written: &Written, at: Instant) {
        self.applied.add(written);
        self.newest_applied = self.newest_applied.max(Some(written.at));
        let lag = at.saturating_duration_since(written.at);
        self.window.push_back((at, lag));
        if self.calm_since.is_some_and(|since| written.at >= since) {
            self.calm.push(lag);
        }
    }

    /// From now on nothing is wrong with the link (`Some`), or something is (`None`).
    pub fn set_calm(&mut self, since: Option<Instant>) {
        self.calm_since = since;
        if since.is_none() {
            self.waiting_max = self.waiting.len();
        }
    }

    pub fn backlog(&self) -> Backlog {
        Backlog {
            revisions: self.waiting.len() as u64,
            oldest: self.waiting.values().next().map(|written| written.at),
            revisions_max: self.waiting_max as u64,
            newest_applied: self.newest_applied,
        }
    }

    /// Revisions applied in the last second, and their lag.
    pub fn last_second(&mut self, now: Instant) -> (usize, Option<Lag>) {
        while self.window.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > WINDOW) {
            self.window.pop_front();
        }
        (self.window.len(), Lag::of(self.window.iter().map(|(_, lag)| *lag).collect()))
    }

    /// Over all revisions that were written while nothing was wrong with the link.
    pub fn calm_lag(&self) -> Option<Lag> {
        Lag::of(self.calm.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn written(revision: u64, at: Instant) -> Written {
        Written { revision: Revision(revision), at, puts: 1, deletes: 0, bytes: 100 }
    }

    fn arrived(origin_revision: u64, seq: u64, at: Instant) -> Arrived {
        Arrived { at, epoch: Epoch(1), seq: Seq(seq), origin_revision: Revision(origin_revision), changes: 1 }
    }

    #[test]
    fn a_lag_runs_from_the_acknowledgement_to_the_position_that_passes_it() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.set_calm(Some(start));
        for revision in 2..=4 {
            meter.write(written(revision, start + ms(revision)));
        }
        assert_eq!((meter.backlog().revisions, meter.backlog().oldest), (3, Some(start + ms(2))));
        meter.arrive(arrived(3, 2, start + ms(10)));
        assert_eq!((meter.backlog().revisions, meter.applied.bytes), (1, 200));
        assert_eq!(meter.calm_lag().unwrap(), Lag { p50: ms(7), p99: ms(8), longest: ms(8), samples: 2 });
        assert_eq!(meter.last_second(start + ms(1_500)).0, 0);
    }

    #[test]
    fn an_acknowledgement_that_comes_after_the_event_counts_once_and_has_no_negative_lag() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.set_calm(Some(start));
        meter.arrive(arrived(2, 1, start + ms(1)));
        meter.arrive(arrived(3, 2, start + ms(5)));
        meter.write(written(2, start + ms(3)));
        assert_eq!((meter.applied.revisions, meter.backlog().revisions), (1, 0));
        assert_eq!(meter.calm_lag().unwrap().longest, Duration::ZERO);
    }

    #[test]
    fn changes_without_a_new_seq_are_an_effect_had_twice() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.arrive(arrived(2, 1, start));
        meter.arrive(arrived(3, 1, start));
        meter.arrive(Arrived { changes: 0, ..arrived(4, 1, start) });
        assert_eq!((meter.twice, meter.transactions), (1, 2));
    }

    #[test]
    fn what_is_written_while_the_link_is_disturbed_is_not_in_the_calm_lag() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.set_calm(Some(start));
        meter.write(written(2, start));
        meter.set_calm(None);
        assert_eq!(meter.backlog().newest_applied, None);
        meter.arrive(arrived(2, 1, start + ms(4_000)));
        assert_eq!((meter.backlog().newest_applied, meter.backlog().revisions_max), (Some(start), 1));
        meter.set_calm(Some(start + ms(5_000)));
        meter.write(written(3, start + ms(4_500)));
        meter.write(written(4, start + ms(5_500)));
        meter.arrive(arrived(4, 3, start + ms(5_502)));
        assert_eq!(meter.calm_lag().unwrap(), Lag { p50: ms(2), p99: ms(2), longest: ms(2), samples: 1 });
    }
}
