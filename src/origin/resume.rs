//! Job: where a link goes on: DESIGN.md section 4's table, and whether the origin is still the same one.
//! Input: what the spool holds, what the replica answered, what the origin's etcd says. Output: a `Resume`.
//! Pure: no clock, no I/O.
//! Always true: nothing is shipped past a hole or from another history; what cannot be proven ends in a stop or a base copy.

use crate::model::{ClusterId, Digest, Epoch, Phase, Position, Revision, Seq, Term, Waymark};
use crate::origin::sequence::OriginWaymark;
use bytes::Bytes;
use std::fmt;

/// What the spool holds: every carried revision above `base`, up to `covered`. A spool of another cluster or of other ranges is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolFacts {
    pub base: Revision,
    /// The spool's end: everything up to it was seen.
    pub covered: Revision,
    /// The last carried revision in it.
    pub last: Option<(Revision, Digest)>,
}

/// What hello brought.
#[derive(Debug, Clone, PartialEq)]
pub enum ReplicaFacts {
    Unreachable,
    Answered { position: Option<Box<Position>>, received: Option<Received> },
}

/// The end of what the replica has received in the position's epoch; at least its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    pub seq: Seq,
    pub revision: Revision,
    pub digest: Digest,
}

/// What the origin's etcd says, read after the replica answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OriginFacts {
    pub cluster: ClusterId,
    /// By a linearizable read.
    pub head: Revision,
    pub ranges_digest: Digest,
    /// The waymark key's value; `None`: there is no such key.
    pub waymark: Option<OriginWaymark>,
    pub carried: CarriedCheck,
    /// The highest compaction that a refused watch or read told of; 0: none yet.
    pub compacted: Revision,
}

/// What became of comparing the last carried revision with the origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CarriedCheck {
    /// Not done: the watch that follows starts at it, inclusive. Also where nothing was carried since the anchor.
    Open,
    Same,
    Other,
    /// It lies at or below the compaction: etcd cannot show it whole any more.
    Compacted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// Ship what the spool holds after this revision; the watch goes on at the spool's end.
    ShipFromSpool { after: Revision },
    /// Empty the spool and watch from here on, from the carried revision inclusive unless it is compacted.
    WatchFrom { after: Revision },
    /// The replica does not answer: go on tailing into the spool from here, and try again.
    Tail { after: Revision },
    /// A base copy: a new one in a new epoch, or the present one from its cursor on.
    Copy { epoch: Epoch, cursor: Option<CopyCursor>, reason: CopyReason },
    /// What came in between is lost, but not what the replica holds: a new epoch that follows from the origin's head at once, and a repair of
    /// what differs.
    Repair { epoch: Epoch, reason: CopyReason },
    /// The origin's history is another one: only an operator can decide, or a policy that he has set.
    Stop { reason: StopReason },
}

impl Resume {
    /// Where the replica is, if a copy or a repair is needed only because neither the spool nor etcd holds what came after.
    pub fn compacted_after(&self) -> Option<Revision> {
        match self {
            Resume::Copy { reason: CopyReason::Compacted { after, .. }, .. }
            | Resume::Repair { reason: CopyReason::Compacted { after, .. }, .. } => Some(*after),
            Resume::Copy { .. }
            | Resume::Repair { .. }
            | Resume::ShipFromSpool { .. }
            | Resume::WatchFrom { .. }
            | Resume::Tail { .. }
            | Resume::Stop { .. } => None,
        }
    }
}

/// Where a base copy goes on that was cut short.
#[derive(Clone, PartialEq, Eq)]
pub struct CopyCursor {
    /// Every key below it is copied.
    pub cursor: Bytes,
    /// Following starts after this revision, from the spool if it reaches back so far, else by a watch.
    pub after: Revision,
    pub spool_reaches: bool,
}

/// Never shows the key: logs hold what this prints.
impl fmt::Debug for CopyCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CopyCursor(after {}, spool reaches: {})", self.after, self.spool_reaches)
    }
}

/// Why a base copy is needed; for the log and `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CopyReason {
    #[error("the replica has no position of this link yet")]
    NoPosition,
    #[error("the link's ranges were changed")]
    OtherRanges,
    #[error("the origin has compacted up to revision {compacted}, and the replica needs what came after {after}")]
    Compacted { after: Revision, compacted: Revision },
    #[error(
        "the last carried revision is compacted and the replica has no waymark: it cannot be shown that the origin is the same"
    )]
    NotProvable,
    #[error("the base copy goes on where it was cut short")]
    GoesOn,
    #[error("{differing} keys differ, more than a repair keeps by name")]
    TooManyDiffer { differing: u64 },
    #[error("an operator asked for it")]
    Asked,
    #[error("the origin's history is another one, and the link's other_history says to go on with it")]
    OtherHistory,
}

/// Why the link stops; each is told with what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    #[error(
        "the origin was replaced: the replica followed cluster {was}, and this is cluster {is}; if that is not meant, correct etcd.endpoints \
         and restart this sidecar; if this origin is the right one, run `etcd-ferry resync LINK --config F` at its sidecar"
    )]
    OtherCluster { was: ClusterId, is: ClusterId },
    #[error(
        "the origin was restored: its head is revision {head}, and the replica has come to revision {reached}; if this origin is the right \
         one, run `etcd-ferry resync LINK --config F` at its sidecar"
    )]
    HeadBelow { head: Revision, reached: Revision },
    #[error(
        "the origin was restored or replaced: it has no waymark of this link, and the replica has seen number {}; if this origin is the \
         right one, run `etcd-ferry resync LINK --config F` at its sidecar", seen.counter
    )]
    WaymarkMissing { seen: Waymark },
    #[error(
        "the origin was restored: its waymark is number {}, and the replica has seen number {}; if this origin is the right one, run \
         `etcd-ferry resync LINK --config F` at its sidecar", origin.counter, seen.counter
    )]
    WaymarkOlder { origin: Waymark, seen: Waymark },
    #[error(
        "the origin was restored or replaced: the waymark number {} that the replica has seen is neither its present nor its previous one; \
         if this origin is the right one, run `etcd-ferry resync LINK --config F` at its sidecar", seen.counter
    )]
    WaymarkUnknown { seen: Waymark },
    #[error(
        "the origin was restored or replaced: its revision {revision} is not the one that was carried; if this origin is the right one, run \
         `etcd-ferry resync LINK --config F` at its sidecar"
    )]
    CarriedDiffers { revision: Revision },
    #[error(
        "the origin was restored or replaced: its revision {revision} is not the one that this sidecar has read; if this origin is the right \
         one, run `etcd-ferry resync LINK --config F` at its sidecar"
    )]
    SpooledDiffers { revision: Revision },
    #[error(
        "the origin was restored: its elections have come to term {ours}, and the replica has seen term {seen}; if this origin is the right \
         one, run `etcd-ferry resync LINK --config F` at its sidecar"
    )]
    TermBelow { ours: Term, seen: Term },
}

/// Where to go on. To be asked again after each hello, and after a watch that was refused for compaction (then with `compacted`).
pub fn decide(spool: Option<&SpoolFacts>, replica: &ReplicaFacts, origin: &OriginFacts) -> Resume {
    let (position, received) = match replica {
        ReplicaFacts::Unreachable => {
            return Resume::Tail { after: spool.map_or(origin.head, |spool| spool.covered) };
        }
        ReplicaFacts::Answered { position: None, .. } => return copy(None, CopyReason::NoPosition),
        ReplicaFacts::Answered { position: Some(position), received } => (position, received),
    };
    if position.origin_cluster != origin.cluster {
        let reason = StopReason::OtherCluster { was: position.origin_cluster, is: origin.cluster };
        return Resume::Stop { reason };
    }
    if position.ranges_digest != origin.ranges_digest {
        return copy(Some(position), CopyReason::OtherRanges);
    }
    let carried = carried(position, received.as_ref());
    let reached = position.origin_revision.max(carried.0);
    if let Err(reason) = check_same_origin(position, reached, carried.0, origin) {
        return Resume::Stop { reason };
    }
    if origin.carried == CarriedCheck::Compacted && position.waymark == Waymark::default() {
        return copy(Some(position), CopyReason::NotProvable);
    }
    let spool_reaches =
        spool.is_some_and(|spool| spool.base <= reached && reached <= spool.covered && !contradicts(spool, carried));
    // A watch after a revision sees everything if that revision itself is not compacted away.
    let watchable = reached >= origin.compacted;
    if !spool_reaches && !watchable {
        let reason = CopyReason::Compacted { after: reached, compacted: origin.compacted };
        if position.cursor.is_some() {
            return copy(Some(position), reason);
        }
        return Resume::Repair { epoch: position.epoch.next(), reason };
    }
    match (position.state, &position.cursor) {
        (Phase::Copying, Some(cursor)) => {
            let cursor = Some(CopyCursor { cursor: cursor.clone(), after: reached, spool_reaches });
            Resume::Copy { epoch: position.epoch, cursor, reason: CopyReason::GoesOn }
        }
        (Phase::Copying | Phase::Repairing | Phase::Following, _) if spool_reaches => {
            Resume::ShipFromSpool { after: reached }
        }
        (Phase::Copying | Phase::Repairing | Phase::Following, _) => Resume::WatchFrom { after: reached },
    }
}

/// The last carried revision: a watch that begins anew starts at it, inclusive, where the origin shows it whole, and sees that it is the same
/// and that nothing of the link lies between it and where the replica is. One that is compacted may be shown again: by an origin that is
/// restored while it is watched.
pub fn watched_from(replica: &ReplicaFacts, check: CarriedCheck) -> Option<(Revision, Digest)> {
    let known = matches!(check, CarriedCheck::Same | CarriedCheck::Compacted);
    match replica {
        ReplicaFacts::Answered { position: Some(position), received } if known => {
            Some(carried(position, received.as_ref()))
        }
        ReplicaFacts::Answered { .. } | ReplicaFacts::Unreachable => None,
    }
}

/// What is known of one revision of the link, in the history that the open watch shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tailed {
    Unknown,
    Holds(Digest),
    /// The link has nothing there.
    Lacks,
}

impl Tailed {
    /// By what is known of the spool; `None`: what it holds has to be read. `proven_from`: from there on it holds what the open watch shows.
    pub fn by_extent(proven_from: Option<Revision>, spool: &SpoolFacts, at: Revision) -> Option<Self> {
        if proven_from.is_none_or(|from| at < from) {
            return Some(Tailed::Unknown);
        }
        match spool.last {
            Some((last, digest)) if last == at => Some(Tailed::Holds(digest)),
            _ if at <= spool.base || spool.covered < at => Some(Tailed::Unknown),
            Some((last, _)) if last > at => None,
            // Everything up to `covered` was seen, and the last of it that is of the link came before.
            Some(_) | None => Some(Tailed::Lacks),
        }
    }

    /// By the first revision that the spool holds from `at` on.
    pub fn by_entry(first: Option<(Revision, Digest)>, at: Revision) -> Self {
        match first {
            Some((revision, digest)) if revision == at => Tailed::Holds(digest),
            Some(_) => Tailed::Lacks,
            None => Tailed::Unknown,
        }
    }

    /// Whether it cannot be of the history in which that revision has this digest.
    pub fn contradicts(self, carried: Digest) -> bool {
        match self {
            Tailed::Holds(digest) => digest != carried,
            Tailed::Lacks => true,
            Tailed::Unknown => false,
        }
    }

    /// What becomes of the comparison once the origin's etcd was asked too: what it shows no more, the open watch may have shown.
    pub fn and(self, probed: CarriedCheck) -> CarriedCheck {
        match (probed, self) {
            (CarriedCheck::Compacted, Tailed::Holds(_) | Tailed::Lacks) => CarriedCheck::Other,
            (probed, _) => probed,
        }
    }
}

/// Whether watches are to begin with the replica's last carried revision from now on: the spool, as a new process finds it that trimmed all
/// it had, holds no revision of its own, and reaches back to where the replica is.
pub fn begins_with(spool: &SpoolFacts, carried: Revision, reached: Revision) -> bool {
    spool.last.is_none() && carried <= spool.base && spool.base <= reached && reached <= spool.covered
}

/// The last carried revision of what the replica has, and its digest.
pub fn carried(position: &Position, received: Option<&Received>) -> (Revision, Digest) {
    received.map_or((position.carried_revision, position.carried_digest), |r| (r.revision, r.digest))
}

/// A base copy that an operator asked for: past every stop of [`decide`].
pub fn resync(position: Option<&Position>) -> Resume {
    copy(position, CopyReason::Asked)
}

/// Why the link stops where the replica has seen a term that this origin's elections have not come to yet. What tells more of the
/// restore is said first.
pub fn went_back(replica: &ReplicaFacts, origin: &OriginFacts, ours: Term) -> StopReason {
    match (decide(None, replica, origin), replica) {
        (Resume::Stop { reason }, _) => reason,
        (_, ReplicaFacts::Answered { position: Some(position), .. }) => {
            StopReason::TermBelow { ours, seen: position.term }
        }
        (_, ReplicaFacts::Answered { position: None, .. } | ReplicaFacts::Unreachable) => {
            StopReason::TermBelow { ours, seen: Term(0) }
        }
    }
}

/// What a repair leads to that gave up on `differing` keys: a base copy where [`decide`] would go on, while the position still says
/// `repairing`. It stops where [`decide`] does: nobody has looked at the origin since.
pub fn copy_instead(decided: Resume, position: Option<&Position>, differing: u64) -> Resume {
    match decided {
        Resume::ShipFromSpool { .. } | Resume::WatchFrom { .. } | Resume::Repair { .. }
            if position.is_some_and(|position| position.state == Phase::Repairing) =>
        {
            copy(position, CopyReason::TooManyDiffer { differing })
        }
        Resume::ShipFromSpool { .. }
        | Resume::WatchFrom { .. }
        | Resume::Repair { .. }
        | Resume::Tail { .. }
        | Resume::Copy { .. }
        | Resume::Stop { .. } => decided,
    }
}

fn copy(position: Option<&Position>, reason: CopyReason) -> Resume {
    let epoch = position.map_or(Epoch(0), |position| position.epoch).next();
    Resume::Copy { epoch, cursor: None, reason }
}

/// Head, cluster id and ranges do not tell a restored origin from the old one: the carried revision does, and the waymark.
/// The shipper replaces the waymark only when the position holds the present one, so the position's is one of the last two.
fn check_same_origin(
    position: &Position,
    reached: Revision,
    carried: Revision,
    origin: &OriginFacts,
) -> Result<(), StopReason> {
    if origin.head < reached {
        return Err(StopReason::HeadBelow { head: origin.head, reached });
    }
    let seen = position.waymark;
    if seen != Waymark::default() {
        let Some(waymark) = origin.waymark else { return Err(StopReason::WaymarkMissing { seen }) };
        // A replica that was restored has an older one; that its last revision is still the origin's says that history goes on.
        let restored_replica = origin.carried == CarriedCheck::Same && waymark.present.counter > seen.counter;
        if waymark.present != seen && waymark.previous != Some(seen) && !restored_replica {
            let origin = waymark.present;
            let older = origin.counter < seen.counter;
            return Err(if older {
                StopReason::WaymarkOlder { origin, seen }
            } else {
                StopReason::WaymarkUnknown { seen }
            });
        }
    }
    match origin.carried {
        CarriedCheck::Other => Err(StopReason::CarriedDiffers { revision: carried }),
        CarriedCheck::Open | CarriedCheck::Same | CarriedCheck::Compacted => Ok(()),
    }
}

/// The spool holds the stretch in which the replica's last carried revision lies, but not that revision: it is of another
/// history. It is then left aside, and the watch, which starts at that revision, tells which of the two is the origin's.
fn contradicts(spool: &SpoolFacts, (revision, digest): (Revision, Digest)) -> bool {
    let inside = spool.base < revision && revision <= spool.covered;
    match spool.last {
        Some((last, of_last)) if inside && last == revision => of_last != digest,
        Some((last, _)) => inside && last < revision,
        None => inside,
    }
}

#[cfg(test)]
mod tests;
