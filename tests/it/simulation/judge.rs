//! Job: judge every transaction of the link as the replica's etcd commits it, by the invariants of the design.
//! Input: what the origin wrote, over all its histories; what the link's transactions write. Output: the first `Fault`.
//! Pure: no clock, no I/O.
//! Always true: a replica revision whose position says `following` is compared, key by key, with the origin at that position's revision; keys
//! that somebody else wrote under the link count only once the link has written them again.

use super::etcd::Keys;
use bytes::Bytes;
use etcd_ferry::model::{Change, ClusterId, Digest, Epoch, LinkName, Phase, Position, Ranges, Revision, Seq};
use etcd_ferry::wire::digest;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};
use std::rc::Rc;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub invariant: &'static str,
    pub what: String,
}

impl Fault {
    pub fn new(invariant: &'static str, what: String) -> Self {
        Self { invariant, what }
    }
}

/// One life of the origin: a restore, or another cluster in its place, begins the next.
#[derive(Clone)]
struct History {
    cluster: ClusterId,
    written: BTreeMap<u64, Vec<Change>>,
    states: BTreeMap<u64, Rc<Keys>>,
}

pub struct Judge {
    position_key: Bytes,
    canary_key: Bytes,
    ranges: BTreeMap<Digest, Ranges>,
    histories: Vec<History>,
    /// Which histories the present run of the replica may still be following.
    follows: BTreeSet<usize>,
    before: Option<Position>,
    /// The highest of the origin's revisions that any position has said to be in.
    reached: Revision,
    /// The origin's revision at which the present epoch began.
    anchor: Revision,
    foreign: BTreeSet<Bytes>,
    /// Transactions that were judged as wholes.
    pub judged: u64,
}

impl Judge {
    pub fn new(link: &LinkName, ranges: &[Ranges], cluster: ClusterId) -> Self {
        let first = History { cluster, written: BTreeMap::new(), states: BTreeMap::new() };
        Self {
            position_key: link.position_key(),
            canary_key: link.canary_key(),
            ranges: ranges.iter().map(|ranges| (digest::of_ranges(ranges), ranges.clone())).collect(),
            histories: vec![first],
            follows: BTreeSet::from([0]),
            before: None,
            reached: Revision(0),
            anchor: Revision(0),
            foreign: BTreeSet::new(),
            judged: 0,
        }
    }

    pub fn origin_wrote(&mut self, revision: Revision, changes: &[Change], state: Rc<Keys>) {
        let now = self.histories.last_mut().expect("there is one");
        now.written.insert(revision.0, changes.to_vec());
        now.states.insert(revision.0, state);
    }

    /// The origin is what it was at `at` again; it goes on from there otherwise than before.
    pub fn origin_restored(&mut self, at: Revision) {
        let mut next = self.histories.last().expect("there is one").clone();
        next.written.retain(|revision, _| *revision <= at.0);
        next.states.retain(|revision, _| *revision <= at.0);
        self.histories.push(next);
        // Up to there both are the same history.
        self.follow_any_that_fit();
    }

    pub fn origin_replaced(&mut self, cluster: ClusterId) {
        self.histories.push(History { cluster, written: BTreeMap::new(), states: BTreeMap::new() });
    }

    pub fn foreign(&self) -> BTreeSet<Bytes> {
        self.foreign.clone()
    }

    /// The replica is what it was at an earlier revision; `foreign`: the keys that were somebody else's then.
    pub fn replica_restored(&mut self, state: &Keys, foreign: BTreeSet<Bytes>) {
        self.foreign = foreign;
        let position = state.get(&self.position_key).and_then(|(json, _)| Position::from_json(json).ok());
        if position.as_ref().map(|p| p.epoch) != self.before.as_ref().map(|p| p.epoch) {
            // Where that epoch began is not known here any more.
            self.anchor = Revision(0);
        }
        self.before = position;
        self.follow_any_that_fit();
    }

    /// The histories that hold what the replica has carried last.
    fn follow_any_that_fit(&mut self) {
        let before = self.before.clone();
        let fits = |history: &History| match &before {
            Some(p) if p.carried_revision.0 > 0 => {
                self.carries(history, p.carried_revision, p) == Some(p.carried_digest)
            }
            Some(p) => history.cluster == p.origin_cluster && history.states.contains_key(&p.origin_revision.0),
            None => true,
        };
        self.follows = (0..self.histories.len()).filter(|at| fits(&self.histories[*at])).collect();
    }

    /// The digest of what the link carries of one revision.
    fn carries(&self, history: &History, revision: Revision, position: &Position) -> Option<Digest> {
        let ranges = self.ranges.get(&position.ranges_digest)?;
        let mut last: BTreeMap<&Bytes, &Change> = BTreeMap::new();
        last.extend(history.written.get(&revision.0)?.iter().map(|change| (change.key(), change)));
        let changes = last.into_values().filter(|change| ranges.contains(change.key())).cloned().collect();
        (history.cluster == position.origin_cluster)
            .then(|| digest::of_revision(&etcd_ferry::model::WholeRevision { revision, changes }))
    }

    pub fn foreign_wrote(&mut self, changes: &[Change]) {
        self.foreign.extend(changes.iter().map(|change| change.key().clone()));
    }

    pub fn position(&self) -> Option<&Position> {
        self.before.as_ref()
    }

    /// A spool that has let go of more has lost it.
    pub fn may_forget(&self, through: Revision) -> Result<(), Fault> {
        let reached = self.reached;
        if through <= reached {
            return Ok(());
        }
        Err(Fault::new("complete", format!("the spool forgets up to {through}, and no position was past {reached}")))
    }

    /// A transaction of the link was committed.
    pub fn link_wrote(&mut self, written: &[Change], state: &Keys) -> Result<(), Fault> {
        let mut now = None;
        let mut keys = Vec::new();
        for change in written {
            match change {
                Change::Put { key, value } if *key == self.position_key => now = Position::from_json(value).ok(),
                Change::Put { .. } | Change::Delete { .. } => keys.push(change.key()),
            }
        }
        for key in &keys {
            self.foreign.remove(*key);
        }
        let Some(now) = now else {
            return Err(Fault::new("once", format!("{} keys were written without the position", keys.len())));
        };
        self.reached = self.reached.max(now.origin_revision);
        let before = self.before.replace(now.clone());
        let opens = before.as_ref().is_none_or(|before| before.epoch != now.epoch);
        if opens || (now.state == Phase::Copying && now.seq == Seq(0)) {
            // A second sender may begin the same epoch at another anchor.
            self.anchor = now.origin_revision;
        }
        if opens {
            self.follows = (0..self.histories.len()).collect();
        }
        if let Some(before) = &before {
            ordered(before, &now)?;
            self.once(before, &now, keys.len())?;
        }
        self.whole(&now, state)
    }

    /// The seq moves with the keys, by as many as the origin's revisions that come in.
    fn once(&self, before: &Position, now: &Position, keys: usize) -> Result<(), Fault> {
        let follows = |p: &Position| p.cursor.is_none() && p.part == 0;
        if before.epoch != now.epoch || !follows(before) || !follows(now) {
            return Ok(());
        }
        if now.seq == before.seq && keys > 0 {
            return Err(Fault::new("once", format!("{keys} keys are written again at seq {}", now.seq)));
        }
        let from = if before.carried_revision.0 == 0 { self.anchor } else { before.carried_revision };
        if from.0 == 0 {
            return Ok(());
        }
        let ranges = &self.ranges[&now.ranges_digest];
        let carried = |history: &History| {
            let through = now.carried_revision.0.max(from.0);
            let between = history.written.range((Excluded(from.0), Unbounded)).take_while(|(at, _)| **at <= through);
            let is_carried = |change: &Change| ranges.contains(change.key()) || *change.key() == self.canary_key;
            between.filter(|(_, changes)| changes.iter().any(is_carried)).count() as u64
        };
        let moved = now.seq.0.saturating_sub(before.seq.0);
        let expected: Vec<u64> = self.follows.iter().map(|at| carried(&self.histories[*at])).collect();
        if expected.is_empty() || expected.contains(&moved) {
            return Ok(());
        }
        let (from, to) = (from, now.carried_revision);
        Err(Fault::new(
            "once",
            format!("seq moved by {moved} from revision {from} to {to}, and {expected:?} are carried"),
        ))
    }

    /// While following, the replica is the origin at the position's revision.
    fn whole(&mut self, now: &Position, state: &Keys) -> Result<(), Fault> {
        if now.state != Phase::Following || now.part > 0 {
            return Ok(());
        }
        self.judged += 1;
        let differing = |history: &History| match history.states.get(&now.origin_revision.0) {
            Some(origin) if history.cluster == now.origin_cluster => self.differing(origin, state, &now.ranges_digest),
            Some(_) | None => vec![Bytes::from_static(b"(no such revision)")],
        };
        let all: Vec<(usize, Vec<Bytes>)> =
            self.follows.iter().map(|at| (*at, differing(&self.histories[*at]))).collect();
        let same: BTreeSet<usize> = all.iter().filter(|(_, keys)| keys.is_empty()).map(|(at, _)| *at).collect();
        if same.is_empty() {
            let shown: Vec<String> = all
                .iter()
                .map(|(at, keys)| {
                    let first: Vec<String> = keys.iter().take(5).map(|key| key.escape_ascii().to_string()).collect();
                    format!("in history {at} {} keys differ: {}", keys.len(), first.join(", "))
                })
                .collect();
            let what = format!("seq {}, origin revision {}: {}", now.seq, now.origin_revision, shown.join("; "));
            return Err(Fault::new("whole", what));
        }
        self.follows = same;
        Ok(())
    }

    fn differing(&self, origin: &Keys, replica: &Keys, ranges: &Digest) -> Vec<Bytes> {
        differing(origin, replica, &self.ranges[ranges], &self.foreign)
    }

    /// **Equal**: at the end, with the origin as it is now. Keys that somebody else wrote under the link do not count.
    pub fn equal(&self, origin: &Keys, replica: &Keys, ranges: &Ranges) -> Result<(), Fault> {
        let keys = differing(origin, replica, ranges, &self.foreign);
        let first: Vec<String> = keys.iter().take(5).map(|key| key.escape_ascii().to_string()).collect();
        if keys.is_empty() {
            return Ok(());
        }
        Err(Fault::new("equal", format!("{} keys differ at the end: {}", keys.len(), first.join(", "))))
    }
}

fn ordered(before: &Position, now: &Position) -> Result<(), Fault> {
    let (old, new) = ((before.epoch, before.term), (now.epoch, now.term));
    if new < old {
        return Err(Fault::new("fenced", format!("epoch {}, term {} writes after {old:?}", new.0, new.1)));
    }
    let following = |p: &Position| p.state == Phase::Following;
    let (old, new) = (
        (before.seq, before.origin_revision, before.carried_revision),
        (now.seq, now.origin_revision, now.carried_revision),
    );
    let back = new.0 < old.0 || new.1 < old.1 || new.2 < old.2;
    if before.epoch == now.epoch && following(before) && following(now) && back {
        return Err(Fault::new("ordered", format!("{new:?} comes after {old:?}")));
    }
    Ok(())
}

fn differing(origin: &Keys, replica: &Keys, ranges: &Ranges, foreign: &BTreeSet<Bytes>) -> Vec<Bytes> {
    let mut keys = Vec::new();
    for piece in ranges.pieces() {
        let inside = |keys: &Keys| -> BTreeMap<Bytes, Bytes> {
            let from_here = keys.range(piece.from.clone()..).take_while(|(key, _)| piece.contains(key));
            let counted = from_here.filter(|(key, _)| !foreign.contains(*key));
            counted.map(|(key, (value, _))| (key.clone(), value.clone())).collect()
        };
        let (ours, theirs) = (inside(origin), inside(replica));
        if ours != theirs {
            let all: BTreeSet<&Bytes> = ours.keys().chain(theirs.keys()).collect();
            keys.extend(all.into_iter().filter(|key| ours.get(*key) != theirs.get(*key)).cloned());
        }
    }
    keys
}

/// The epoch of a position, 0 without one.
pub fn epoch_of(position: Option<&Position>) -> Epoch {
    position.map_or(Epoch(0), |position| position.epoch)
}
