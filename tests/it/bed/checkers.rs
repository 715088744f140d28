//! Job: judge a run by what was recorded at both ends; one function for each invariant that histories can show.
//! Input: a `Recording`, and what writers were told. Output: how much was judged, or the first `Fault`.
//! Pure: no clock, no I/O.
//! Always true: a fault names revisions, keys and counts, never a value; a checker that had nothing to judge says so by its count.

use super::etcd::KeyMap;
use super::recording::{History, apply};
use super::traffic::Acknowledged;
use bytes::Bytes;
use etcd_ferry::model::{Change, LINKS_PREFIX, LinkName, Phase, Position, Ranges, Revision};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Bound::{Excluded, Included};

const KEYS_SHOWN: usize = 5;

/// Both ends of one link, recorded from before it had a position, or from a moment when it was idle.
#[derive(Debug, Clone)]
pub struct Recording {
    pub link: LinkName,
    pub ranges: Ranges,
    pub origin: History,
    pub replica: History,
}

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("not {invariant}: {what}")]
pub struct Fault {
    pub invariant: &'static str,
    pub what: String,
}

fn fault<T>(invariant: &'static str, what: impl fmt::Display) -> Result<T, Fault> {
    Err(Fault { invariant, what: what.to_string() })
}

/// One replica revision that touched the link: what it did to the link's keys, and the position that it wrote.
struct Step<'a> {
    revision: Revision,
    position: Option<Position>,
    changes: Vec<&'a Change>,
}

impl Recording {
    /// All checks that need only the recording. Returns how many replica revisions were judged.
    pub fn check(&self) -> Result<usize, Fault> {
        self.fenced()?;
        self.ordered()?;
        self.once()?;
        self.whole()
    }

    /// **Complete**, from the writers' acknowledgements: each is in the origin's history (else the recorder missed it), the position at the
    /// end has passed it, and its effect is at the replica unless a later revision took it away. Returns the number of acknowledgements.
    pub fn complete(&self, acknowledged: &[Acknowledged]) -> Result<usize, Fault> {
        const INVARIANT: &str = "complete";
        let mut last: BTreeMap<&Bytes, Revision> = BTreeMap::new();
        for (revision, changes) in &self.origin.revisions {
            last.extend(changes.iter().map(|change| (change.key(), *revision)));
        }
        let reached = self.last_position()?.map_or(Revision(0), |p| p.origin_revision);
        let at_end = self.replica.state_at(self.replica.head(), &self.ranges);
        let mut judged = 0;
        for ack in acknowledged.iter().filter(|ack| ack.revision > self.origin.base_revision) {
            if self.origin.revisions.get(&ack.revision) != Some(&ack.changes) {
                return fault(
                    INVARIANT,
                    format!("the origin's history differs from the acknowledged revision {}", ack.revision),
                );
            }
            let carried: Vec<&Change> = ack.changes.iter().filter(|c| self.ranges.contains(c.key())).collect();
            if carried.is_empty() {
                continue;
            }
            judged += 1;
            if ack.revision > reached {
                return fault(
                    INVARIANT,
                    format!("revision {} was acknowledged, the position ends at {reached}", ack.revision),
                );
            }
            for change in carried.into_iter().filter(|change| last.get(change.key()) == Some(&ack.revision)) {
                let there = at_end.get(change.key());
                let same = match change {
                    Change::Put { value, .. } => there == Some(value),
                    Change::Delete { .. } => there.is_none(),
                };
                if !same {
                    let key = change.key().escape_ascii();
                    return fault(INVARIANT, format!("revision {} left {key} otherwise at the origin", ack.revision));
                }
            }
        }
        Ok(judged)
    }

    /// **Whole** (and true): at each replica revision whose position says `following`, the link's keys equal the origin's at the position's
    /// `origin_revision`. Returns how many replica revisions were judged.
    pub fn whole(&self) -> Result<usize, Fault> {
        const INVARIANT: &str = "whole";
        let mut pair = Pair::new(self.origin.base_of(&self.ranges), self.replica.base_of(&self.ranges));
        let mut origin_at = self.origin.base_revision;
        let mut position = self.base_position()?;
        let mut judged = 0;
        for step in self.steps()? {
            for change in &step.changes {
                pair.change_replica(change);
            }
            position = step.position.or(position);
            let Some(now) = position.as_ref().filter(|p| p.state == Phase::Following && p.part == 0) else { continue };
            if now.origin_revision < self.origin.base_revision {
                continue;
            }
            if now.origin_revision > self.origin.head() {
                let end = self.origin.head();
                return fault(
                    INVARIANT,
                    format!("the position says {}, the origin's history ends at {end}", now.origin_revision),
                );
            }
            if now.origin_revision < origin_at {
                return fault(INVARIANT, format!("the position went back to {} from {origin_at}", now.origin_revision));
            }
            for (_, changes) in self.origin.revisions.range((Excluded(origin_at), Included(now.origin_revision))) {
                for change in changes.iter().filter(|change| self.ranges.contains(change.key())) {
                    pair.change_origin(change);
                }
            }
            origin_at = now.origin_revision;
            judged += 1;
            if !pair.differing.is_empty() {
                let keys = shown(pair.differing.iter());
                return fault(
                    INVARIANT,
                    format!("replica revision {} is not origin revision {origin_at}: {keys}", step.revision),
                );
            }
        }
        Ok(judged)
    }

    /// **Fenced**: the position's (epoch, term) never falls, so no sender of an older one has written. Returns the number of positions.
    pub fn fenced(&self) -> Result<usize, Fault> {
        const INVARIANT: &str = "fenced";
        let mut before = self.base_position()?.map(|position| (position.epoch, position.term));
        let mut judged = 0;
        for step in self.steps()? {
            let Some(new) = step.position.map(|position| (position.epoch, position.term)) else { continue };
            judged += 1;
            if let Some(old) = before.filter(|old| new < *old) {
                return fault(INVARIANT, format!("replica revision {}: {new:?} came after {old:?}", step.revision));
            }
            before = Some(new);
        }
        Ok(judged)
    }

    /// **Ordered**: the position of a following link only goes forward, in seq and in the origin's revisions. Returns the number of positions.
    pub fn ordered(&self) -> Result<usize, Fault> {
        const INVARIANT: &str = "ordered";
        let mut before = self.base_position()?;
        let mut judged = 0;
        for step in self.steps()? {
            let Some(now) = step.position else { continue };
            judged += 1;
            let following = |position: &Position| position.state == Phase::Following;
            if let Some(before) = before.filter(|p| p.epoch == now.epoch && following(p) && following(&now)) {
                let old = (before.seq, before.origin_revision, before.carried_revision);
                let new = (now.seq, now.origin_revision, now.carried_revision);
                if new.0 < old.0 || new.1 < old.1 || new.2 < old.2 {
                    return fault(INVARIANT, format!("replica revision {}: {new:?} came after {old:?}", step.revision));
                }
            }
            before = Some(now);
        }
        Ok(judged)
    }

    /// **Once**: a revision that changes the link's keys moves the seq in the same revision, by as many as the origin's revisions that it
    /// covers; nothing changes the link's keys beside the position. Not for a range that others write too. Returns the number of revisions.
    pub fn once(&self) -> Result<usize, Fault> {
        const INVARIANT: &str = "once";
        let mut before = self.base_position()?;
        let mut judged = 0;
        for step in self.steps()? {
            let followed = before.as_ref().is_some_and(|p| p.state == Phase::Following);
            let Some(now) = step.position else {
                if followed {
                    return fault(
                        INVARIANT,
                        format!("replica revision {} changes keys without the position", step.revision),
                    );
                }
                continue;
            };
            let pair = before.as_ref().filter(|p| followed && p.epoch == now.epoch && p.part == 0 && now.part == 0);
            if let Some(before) = pair {
                judged += 1;
                if now.seq == before.seq && !step.changes.is_empty() {
                    return fault(INVARIANT, format!("replica revision {} repeats seq {}", step.revision, now.seq));
                }
                let moved = now.seq.0.saturating_sub(before.seq.0);
                let carried = self.carried_between(before.carried_revision, now.carried_revision);
                if let Some(carried) = carried.filter(|carried| *carried != moved) {
                    let what =
                        format!("replica revision {}: seq moved by {moved} over {carried} revisions", step.revision);
                    return fault(INVARIANT, what);
                }
            }
            before = Some(now);
        }
        Ok(judged)
    }

    /// Origin revisions after `from`, up to `to`, with a change in the link's ranges or its canary; `None` where that cannot be told: before the first
    /// carried one, before the history, or among revisions that another link wrote (those may be skipped).
    fn carried_between(&self, from: Revision, to: Revision) -> Option<u64> {
        if from.0 == 0 || from < self.origin.base_revision || to < from {
            return None;
        }
        let canary_key = self.link.canary_key();
        let mut carried = 0;
        for (_, changes) in self.origin.revisions.range((Excluded(from), Included(to))) {
            if changes.iter().any(|c| c.key().starts_with(LINKS_PREFIX) && c.key().ends_with(b"/position")) {
                return None;
            }
            let is_of_the_link = |change: &Change| self.ranges.contains(change.key()) || *change.key() == canary_key;
            carried += u64::from(changes.iter().any(is_of_the_link));
        }
        Some(carried)
    }

    fn steps(&self) -> Result<Vec<Step<'_>>, Fault> {
        let position_key = self.link.position_key();
        let mut steps = Vec::new();
        for (revision, changes) in &self.replica.revisions {
            let mut step = Step { revision: *revision, position: None, changes: Vec::new() };
            for change in changes {
                match change {
                    Change::Put { key, value } if *key == position_key => step.position = Some(parse(value)?),
                    Change::Put { .. } | Change::Delete { .. } if self.ranges.contains(change.key()) => {
                        step.changes.push(change)
                    }
                    Change::Put { .. } | Change::Delete { .. } => {}
                }
            }
            if step.position.is_some() || !step.changes.is_empty() {
                steps.push(step);
            }
        }
        Ok(steps)
    }

    fn base_position(&self) -> Result<Option<Position>, Fault> {
        self.replica.base.get(&self.link.position_key()).map(|json| parse(json)).transpose()
    }

    fn last_position(&self) -> Result<Option<Position>, Fault> {
        let last = self.steps()?.into_iter().rev().find_map(|step| step.position);
        if last.is_some() { Ok(last) } else { self.base_position() }
    }
}

fn parse(json: &[u8]) -> Result<Position, Fault> {
    Position::from_json(json).or_else(|e| fault("readable", format!("a position: {e}")))
}

/// **Equal**: the same keys with the same values, byte for byte. Returns the number of keys.
pub fn equal(origin: &KeyMap, replica: &KeyMap) -> Result<usize, Fault> {
    let keys: BTreeSet<&Bytes> = origin.keys().chain(replica.keys()).collect();
    let differing: Vec<&Bytes> = keys.into_iter().filter(|key| origin.get(*key) != replica.get(*key)).collect();
    if differing.is_empty() {
        return Ok(origin.len());
    }
    fault("equal", format!("{} keys here, {} there: {}", origin.len(), replica.len(), shown(differing.into_iter())))
}

fn shown<'a>(keys: impl ExactSizeIterator<Item = &'a Bytes>) -> String {
    let count = keys.len();
    let first: Vec<String> = keys.take(KEYS_SHOWN).map(|key| key.escape_ascii().to_string()).collect();
    format!("{count} keys differ, such as {}", first.join(", "))
}

/// Two states that move, and the keys in which they differ now: a comparison costs what changed, not what is there.
struct Pair {
    origin: KeyMap,
    replica: KeyMap,
    differing: BTreeSet<Bytes>,
}

impl Pair {
    fn new(origin: KeyMap, replica: KeyMap) -> Self {
        let mut pair = Self { origin, replica, differing: BTreeSet::new() };
        let keys: Vec<Bytes> = pair.origin.keys().chain(pair.replica.keys()).cloned().collect();
        keys.iter().for_each(|key| pair.compare(key));
        pair
    }

    fn change_origin(&mut self, change: &Change) {
        apply(&mut self.origin, change);
        self.compare(change.key());
    }

    fn change_replica(&mut self, change: &Change) {
        apply(&mut self.replica, change);
        self.compare(change.key());
    }

    fn compare(&mut self, key: &Bytes) {
        if self.origin.get(key) == self.replica.get(key) {
            self.differing.remove(key);
        } else {
            self.differing.insert(key.clone());
        }
    }
}

#[cfg(test)]
mod tests;
