//! Job: a replica's sidecar dies, at the end of a step or in the middle of one, and starts again over its journal and its dedupe log.
//! Input: what the disks kept. Output: a sidecar as it starts; at the next hello a `Fault` where it takes a repeat or a conflict for another thing.
//! Synchronous.
//! Always true: as in the product's replica/mod.rs, whose start it stands for; each of the two disks may hold more, less or others than the other.

use super::Replica;
use crate::simulation::dedupe::{Remembered, notes_of};
use crate::simulation::judge::Fault;
use crate::simulation::region::{Context, Trouble};
use etcd_ferry::model::{Digest, Epoch, Seq, Waymark};
use etcd_ferry::replica::admit::{Admit, Admitted, Refused};
use std::collections::BTreeMap;

impl Replica {
    /// Everything in memory is gone; journal and dedupe log are what their disks kept.
    pub fn crash(&mut self, kept_by_kernel: bool, context: &mut Context) {
        if let Some(in_flight) = &self.in_flight {
            context.drop_pending(in_flight.number);
        }
        self.journal.crash(kept_by_kernel, &mut context.random);
        self.remember(context);
        self.held = None;
        self.expected = None;
        self.start_afresh(Seq(0));
        self.limits = self.configured;
        self.guard_failures = 0;
        self.in_flight = None;
        self.waymark = Waymark::default();
        self.progress = None;
        (self.stopped, self.given_up) = (false, false);
        self.claim = None;
        self.copying = None;
        self.refusal = None;
        self.stream = None;
    }

    /// An error now and then: the process has died here, between two things that last. `what`: as it is counted.
    pub fn survive(&mut self, permille: usize, what: &str, context: &mut Context) -> Result<(), Trouble> {
        if !context.fails(permille, what) {
            return Ok(());
        }
        let kept_by_kernel = context.random.percent(40);
        self.crash(kept_by_kernel, context);
        Err(Trouble::Crashed)
    }

    /// Admission begins with what the dedupe log remembers, and what the journal holds beyond that is noted again.
    fn remember(&mut self, context: &mut Context) {
        let remembered = self.dedupe.restart().unwrap_or_else(|fault| {
            context.fail(fault);
            Vec::new()
        });
        if self.dedupe.is_on_files() && !remembered.is_empty() {
            context.count("dedupe log read from files");
        }
        self.admit = Admit::remembering(&remembered);
        let epoch = Epoch(self.journal.tag);
        let known = remembered.last().filter(|(of, _, _)| *of == epoch).map_or(0, |(_, seq, _)| seq.0);
        if known > self.journal.covered {
            context.count("dedupe log ahead of the journal");
        }
        let after = self.journal.base().max(known);
        if after < self.journal.covered {
            context.count("dedupe log behind the journal");
            let entries = self.journal.read_after(after, usize::MAX).expect("it holds what follows");
            self.dedupe.note(epoch, notes_of(&entries));
        }
        self.remembered = Some(remembered);
    }

    /// At the first hello of a process: what it remembers comes as a repeat, or with other changes as a conflict; of anything else that was
    /// received it says no more than that it came before.
    pub(super) fn judge_memory(&mut self, context: &mut Context) {
        let Some(remembered) = self.remembered.take() else { return };
        let (epoch, term) = self.admit.epoch();
        let received = self.admit.received();
        let known = unbroken_end(&remembered, epoch, received);
        let mut admit = self.admit.clone();
        for seq in (1..=received.0).map(Seq) {
            let digest = known.get(&seq).copied();
            let right = digest.unwrap_or_default();
            let other = Digest(right.0.map(|byte| !byte));
            let said = [right, other].map(|digest| admit.admit(epoch, term, seq, digest));
            let conflict = if digest.is_some() { Err(Refused::Conflict { seq }) } else { Ok(Admitted::Duplicate) };
            if said != [Ok(Admitted::Duplicate), conflict] {
                let what =
                    format!("{} says of seq {seq}, which it knew by {digest:?} when it started: {said:?}", self.name);
                return context.fail(Fault::new("once", what));
            }
        }
        if known.keys().any(|seq| *seq <= received) {
            context.count("repeat and conflict known after a restart");
        }
    }
}

/// What ends with the log's last entry and has no gap; nothing where that is of another epoch, or where more was received since.
fn unbroken_end(remembered: &[Remembered], epoch: Epoch, received: Seq) -> BTreeMap<Seq, Digest> {
    let of_epoch = remembered.iter().filter(|(of, _, _)| *of == epoch).map(|(_, seq, digest)| (*seq, *digest));
    let mut known: BTreeMap<Seq, Digest> = of_epoch.collect();
    let reaches = remembered.last().is_some_and(|(of, seq, _)| *of == epoch && *seq >= received);
    if !reaches {
        return BTreeMap::new();
    }
    let mut seqs = known.keys().rev();
    let mut first = seqs.next().copied().unwrap_or_default();
    for seq in seqs {
        if seq.next() != first {
            break;
        }
        first = *seq;
    }
    known.split_off(&first)
}
