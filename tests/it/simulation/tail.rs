//! Job: the origin's tail, stepped: the product's sequencer and its rules on where a watch begins, into a spool on a disk that can be torn.
//! Input: the origin's watch messages. Output: spool entries; what the tail is doing.
//! Synchronous.
//! Always true: as in the product's origin/watch.rs, whose calls it stands for.

use super::disk::Disk;
use super::etcd::{Etcd, Signal, Watch};
use super::region::Context;
use etcd_ferry::model::{Change, Digest, LinkName, Ranges, Revision, Run};
use etcd_ferry::origin::lineage::Lineage;
use etcd_ferry::origin::reopen::{self, Spooled};
use etcd_ferry::origin::resume::{CarriedCheck, SpoolFacts, Tailed};
use etcd_ferry::origin::sequence::{Event, OriginWaymark, SequenceError, Sequenced, Sequencer, WatchMessage};
use etcd_ferry::origin::spool::SpoolEntry;
use etcd_ferry::origin::tail::Seen;
use etcd_ferry::wire::digest;
use std::sync::Arc;

pub const REVISION_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TailState {
    /// Nothing says yet from where to watch.
    Idle,
    Watching,
    SpoolFull,
    Lost {
        compacted: Revision,
    },
    OtherHistory {
        reason: String,
    },
    Stopped {
        reason: String,
    },
}

pub struct Tail {
    link: LinkName,
    pub ranges: Ranges,
    pub spool: Disk<SpoolEntry>,
    pub state: TailState,
    watch: Option<Open>,
    after_covered: bool,
    /// Everything up to it was seen.
    pub covered: Revision,
    seen: Option<Seen>,
    /// The origin that a hello has looked at, until the open watch is compared with it.
    told: Option<Seen>,
    /// What a watch begins with until the spool has a revision of its own.
    carried: Option<(Revision, Digest)>,
    /// On the disk, as far as it outlives the process.
    lineage: Lineage,
}

struct Open {
    watch: Watch,
    sequencer: Sequencer,
    from: Revision,
    /// The spool's end when it was opened.
    covered: Revision,
    /// It began there without showing the spool's last revision, and has appended nothing yet.
    unlinked: Option<Revision>,
    /// Of what the spool held up to here its last revision said nothing.
    linked_after: Revision,
}

impl Open {
    fn is_proven(&self) -> bool {
        self.sequencer.proven_from().is_some_and(|from| from <= self.covered)
    }

    fn proven_from(&self) -> Option<Revision> {
        self.sequencer.proven_from().map(|from| from.max(self.linked_after.next()))
    }
}

/// Whether a spool is shipped from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ships {
    Yes,
    No,
    /// Its last revision, this one, shows that the origin was restored within the run.
    Restored(Revision),
}

pub fn seen_by(etcd: &Etcd, link: &LinkName) -> Seen {
    (etcd.cluster, waymark_of(etcd, link).unwrap_or_default())
}

pub fn waymark_of(etcd: &Etcd, link: &LinkName) -> Option<OriginWaymark> {
    etcd.get(&link.waymark_key()).and_then(|(json, _)| OriginWaymark::from_json(&json))
}

impl Tail {
    /// With something in the spool it watches at once; otherwise it waits to be told from where.
    pub fn start(link: LinkName, ranges: Ranges, spool: Disk<SpoolEntry>) -> Self {
        let (state, covered) = (TailState::Idle, Revision(0));
        let mut tail = Self {
            link,
            ranges: ranges.clone(),
            spool,
            state,
            watch: None,
            after_covered: false,
            covered,
            seen: None,
            told: None,
            carried: None,
            lineage: Lineage::default(),
        };
        tail.start_again(ranges);
        tail
    }

    /// As a new process, over what the disk holds.
    pub fn start_again(&mut self, ranges: Ranges) {
        let tag = tag_of(&ranges);
        if self.spool.tag != tag && self.spool.covered > 0 {
            self.lineage = Lineage::default();
            self.spool.reset(tag, 0);
        }
        self.ranges = ranges;
        self.covered = Revision(self.spool.covered);
        self.state = if self.covered > Revision(0) { TailState::Watching } else { TailState::Idle };
        self.lineage = Lineage::found(&self.lineage.to_json(), self.covered);
        (self.watch, self.after_covered, self.seen, self.told, self.carried) = (None, false, None, None, None);
    }

    /// Whether a replica that follows `run`, has everything up to `reached`, and `carried` last, may be sent what the spool holds.
    pub fn ships(&mut self, run: Run, reached: Revision, carried: (Revision, Digest), etcd: &Etcd) -> Ships {
        let asked = self.spool.last.filter(|_| self.lineage.asks_after(run, reached));
        if let Some(last) = asked {
            let shown = if last.0 <= etcd.head() { self.probe(last, etcd) } else { CarriedCheck::Other };
            if self.lineage.is_restored(run, last.0, shown) {
                return Ships::Restored(last.0);
            }
            match shown {
                CarriedCheck::Same => self.lineage.proven(),
                CarriedCheck::Other => return Ships::No,
                CarriedCheck::Open | CarriedCheck::Compacted => {}
            }
        }
        if self.spooled_at(carried.0, Some(Revision(0))).contradicts(carried.1) {
            return Ships::No;
        }
        self.lineage.judge(run, Revision(self.spool.base()));
        if self.lineage.ships_after(reached) { Ships::Yes } else { Ships::No }
    }

    pub fn is_of_another(&self, run: Run) -> bool {
        self.lineage.is_of_another(run)
    }

    /// The watch stands at where the link goes on in this run; `applied` is at the replica.
    pub fn serves(&mut self, run: Run, applied: Revision) {
        self.lineage.serves(run, applied.max(Revision(self.spool.base())));
    }

    /// What was written down of the spool is gone.
    pub fn lose_lineage(&mut self) {
        self.lineage = Lineage::found(&[], Revision(self.spool.covered));
    }

    pub fn has_watch(&self) -> bool {
        self.watch.is_some()
    }

    fn close_watch(&mut self) {
        if self.watch.take().is_some() {
            self.lineage.unwatched(Revision(self.spool.covered));
        }
    }

    pub fn spooled(&self) -> Spooled {
        Spooled { covered: Revision(self.spool.covered), last: self.spool.last.or(self.carried) }
    }

    /// What the spool tells of one revision in the history that the open watch shows.
    pub fn tailed(&mut self, at: Revision) -> Tailed {
        let proven_from = self.watch.as_ref().and_then(Open::proven_from);
        self.spooled_at(at, proven_from)
    }

    fn spooled_at(&mut self, at: Revision, proven_from: Option<Revision>) -> Tailed {
        Tailed::by_extent(proven_from, &self.spool_facts(), at).unwrap_or_else(|| {
            let entries = self.spool.read_after(at.0 - 1, 1).unwrap_or_default();
            Tailed::by_entry(entries.first().map(|entry| (entry.revision.revision, entry.digest)), at)
        })
    }

    pub fn spool_facts(&self) -> SpoolFacts {
        let spool = &self.spool;
        SpoolFacts { base: Revision(spool.base()), covered: Revision(spool.covered), last: spool.last }
    }

    /// What one revision of the link holds at the origin, against what was carried.
    pub fn probe(&self, carried: (Revision, Digest), etcd: &Etcd) -> CarriedCheck {
        if !etcd.shows_whole(carried.0) {
            return CarriedCheck::Compacted;
        }
        let before = Revision(carried.0.0 - 1);
        let mut sequencer = Sequencer::new(&self.link, self.ranges.clone(), before, REVISION_BYTES_MAX);
        let event = |change: &Change| Event { revision: carried.0, change: change.clone() };
        let events = etcd.written_at(carried.0.0).iter().map(event).collect();
        let message = WatchMessage { events, fragment: false };
        let whole = sequencer.push(message).expect("one revision is in order");
        let found = whole.first().filter(|found| found.is_of_the_link());
        match found.map(|found| digest::of_revision(&found.whole)) {
            Some(digest) if digest == carried.1 => CarriedCheck::Same,
            Some(_) | None => CarriedCheck::Other,
        }
    }

    /// The origin that a hello has looked at; the replica's last carried revision, for a spool that holds none.
    pub fn greeted(&mut self, seen: Seen, carried: Option<(Revision, Digest)>) {
        if self.state == TailState::Watching {
            self.told = Some(seen);
        } else {
            self.seen.get_or_insert(seen);
        }
        if carried.is_some() && self.spool.last.is_none() && self.carried.is_none() {
            self.carried = carried;
            self.close_watch();
        }
    }

    /// The stream to etcd breaks; messages on it are lost.
    pub fn break_watch(&mut self) {
        self.close_watch();
    }

    /// The spool is about to be dropped: see [`Tail::clear`].
    pub fn doubt(&mut self) {
        self.lineage = Lineage::of_no_run(Revision(self.spool.covered));
    }

    /// Drops the spool, of whose end nothing is known until [`Tail::restart`] goes on.
    pub fn clear(&mut self, after: Revision) {
        self.spool.reset(tag_of(&self.ranges), after.0);
    }

    /// Watches everything after `after`, where the spool was cleared.
    pub fn restart(
        &mut self,
        after: Revision,
        carried: Option<(Revision, Digest)>,
        seen: Option<Seen>,
        etcd: &Etcd,
        context: &mut Context,
    ) -> Result<(), TailState> {
        (self.seen, self.told, self.carried) = (seen, None, carried);
        self.lineage = Lineage::default();
        (self.covered, self.state, self.watch, self.after_covered) = (after, TailState::Watching, None, false);
        self.step(etcd, context);
        match &self.state {
            TailState::Watching | TailState::Idle | TailState::SpoolFull => Ok(()),
            state @ (TailState::Lost { .. } | TailState::OtherHistory { .. } | TailState::Stopped { .. }) => {
                Err(state.clone())
            }
        }
    }

    /// Opens the watch, or takes its next message.
    pub fn step(&mut self, etcd: &Etcd, context: &mut Context) {
        match self.state {
            TailState::Watching => {}
            TailState::SpoolFull if !self.spool.is_full() => self.state = TailState::Watching,
            TailState::SpoolFull
            | TailState::Idle
            | TailState::Lost { .. }
            | TailState::OtherHistory { .. }
            | TailState::Stopped { .. } => return,
        }
        if self.watch.is_none() {
            self.watch = match self.open(etcd) {
                Ok(open) => Some(open),
                Err(state) => return self.state = state,
            };
        }
        let told = self.told.take();
        if let (Some(own), Some(told)) = (self.seen, told)
            && reopen::is_another(own, told)
        {
            self.close_watch();
            context.count("tail is of another origin than the hello");
            let reason = "the origin was restored or replaced since the hello looked at it".to_owned();
            self.state = TailState::OtherHistory { reason };
            return;
        }
        let Some(open) = &mut self.watch else { return };
        let Some(signal) = open.watch.poll(etcd, &mut context.random) else { return };
        self.take(signal, etcd, context);
    }

    fn open(&mut self, etcd: &Etcd) -> Result<Open, TailState> {
        let after_covered = std::mem::take(&mut self.after_covered);
        let spooled = self.spooled();
        if etcd.head() < spooled.covered {
            let reason = format!("the origin's head {} is below {}", etcd.head(), spooled.covered);
            return Err(TailState::OtherHistory { reason });
        }
        let now = seen_by(etcd, &self.link);
        if let Some(before) = self.seen.replace(now)
            && !reopen::same_origin(before, now)
        {
            self.seen = Some(before);
            let reason = "the origin was restored or replaced while it was watched".to_owned();
            return Err(TailState::OtherHistory { reason });
        }
        let shows_last = spooled.last.is_some_and(|(last, _)| !after_covered && etcd.shows_whole(last));
        let (sequencer, from) =
            reopen::sequencer(&self.link, self.ranges.clone(), spooled, shows_last, REVISION_BYTES_MAX);
        if from > spooled.covered && !etcd.shows_whole(from) {
            return Err(TailState::Lost { compacted: from });
        }
        if !shows_last {
            self.lineage.unwatched(spooled.covered);
        }
        let (covered, linked_after) = (spooled.covered, self.lineage.linked_after());
        let unlinked = (!shows_last).then_some(covered);
        Ok(Open { watch: Watch::open(&self.ranges, from), sequencer, from, covered, unlinked, linked_after })
    }

    fn take(&mut self, signal: Signal, etcd: &Etcd, context: &mut Context) {
        let Some(open) = &mut self.watch else { return };
        let proven = open.is_proven();
        let taken = match signal {
            Signal::Created => Ok(Vec::new()),
            Signal::Compacted(compacted) => {
                let (from, covered) = (open.from, Revision(self.spool.covered));
                self.close_watch();
                if reopen::goes_on_after_end(from, covered, compacted) {
                    context.count("watch goes on after the spool's end");
                    self.after_covered = true;
                } else {
                    self.state = TailState::Lost { compacted };
                }
                return;
            }
            Signal::Progress(revision) => open.sequencer.progress(revision).map(|()| Vec::new()),
            Signal::Events { events, fragment } => {
                if fragment {
                    context.count("watch message in fragments");
                }
                let events = events.into_iter().map(|(revision, change)| Event { revision, change }).collect();
                open.sequencer.push(WatchMessage { events, fragment })
            }
        };
        let covered = open.sequencer.covered();
        let proves = open.is_proven() && !proven;
        match taken {
            Ok(whole) => {
                self.spool_all(whole, covered, context);
                if proves && self.watch.is_some() {
                    self.lineage.proven();
                }
            }
            Err(error) => {
                self.close_watch();
                self.go_on_after(&error, etcd, context);
            }
        }
    }

    fn go_on_after(&mut self, error: &SequenceError, etcd: &Etcd, context: &mut Context) {
        match error {
            // Another history only if etcd can still show the old one whole.
            SequenceError::OtherHistory { carried, .. } if etcd.shows_whole(*carried) => {
                context.count("tail saw another history");
                self.state = TailState::OtherHistory { reason: error.to_string() };
            }
            SequenceError::OtherHistory { .. } | SequenceError::WentBack { .. } => {}
            SequenceError::TooLarge { .. } => self.state = TailState::Stopped { reason: error.to_string() },
        }
    }

    fn spool_all(&mut self, whole: Vec<Sequenced>, covered: Revision, context: &mut Context) {
        let entries: Vec<SpoolEntry> = whole.into_iter().filter(|w| w.is_of_the_link()).map(entry_of).collect();
        if !entries.is_empty() {
            if self.spool.is_full() {
                context.count("spool full");
                self.close_watch();
                self.state = TailState::SpoolFull;
                return;
            }
            let unlinked = self.watch.as_mut().and_then(|open| open.unlinked.take());
            if let Some(covered) = unlinked.filter(|covered| covered.0 > self.spool.base()) {
                context.count("revision appended after a gap");
                self.lineage.appends_unlinked(covered);
            }
            assert!(self.spool.append(entries), "what a sequencer hands out follows the spool's end");
        }
        self.spool.cover(covered.0);
        self.covered = self.covered.max(covered);
    }
}

fn entry_of(sequenced: Sequenced) -> SpoolEntry {
    let digest = digest::of_revision(&sequenced.whole);
    SpoolEntry { revision: Arc::new(sequenced.whole), digest, arrived_ms: 0, came_from: sequenced.came_from }
}

fn tag_of(ranges: &Ranges) -> u64 {
    u64::from_be_bytes(digest::of_ranges(ranges).0[..8].try_into().expect("a digest has sixteen bytes"))
}
