//! Job: from watch messages to whole revisions, in order, filtered to the link's ranges.
//! Input: watch messages and progress notices. Output: one `Sequenced` for each revision that was seen, or what etcd broke.
//! Pure: no clock, no I/O.
//! Always true: a revision is handed out once, whole, and after every lower one; after an error nothing more may be pushed.

use crate::model::{
    Change, ClusterId, Digest, FERRY_PREFIX, LINKS_PREFIX, LinkName, Ranges, Revision, Waymark, WholeRevision,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// One event of a watch message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its `mod_revision`.
    pub revision: Revision,
    pub change: Change,
}

/// A watch response that carries events. The revision in its header says nothing about what is covered: etcd may have gone on while the
/// watcher was catching up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchMessage {
    pub events: Vec<Event>,
    /// More pieces of this message follow; without it the message ends its last revision.
    pub fragment: bool,
}

/// A whole revision of the origin, as far as the link's watcher sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequenced {
    pub revision: Revision,
    /// Only the changes in the link's ranges; none if the revision touched other keys only.
    pub whole: WholeRevision,
    /// The clusters that it came from: the `origin_cluster` of each position that it writes.
    pub came_from: Vec<ClusterId>,
    /// It touches only keys under `/etcd-ferry/`.
    pub ferry_only: bool,
    /// What it writes to this link's waymark key.
    pub waymark: Option<OriginWaymark>,
    /// It writes this link's canary: it is carried, though it may change nothing.
    pub canary: bool,
}

impl Sequenced {
    /// Whether the link has anything to carry of it: changes, or its canary.
    pub fn is_of_the_link(&self) -> bool {
        !self.whole.changes.is_empty() || self.canary
    }

    /// Whether this link ships it: it is of the link, and did not come from the cluster that the link ships to.
    pub fn is_carried(&self, peer: Option<ClusterId>) -> bool {
        self.is_of_the_link() && !peer.is_some_and(|peer| self.came_from.contains(&peer))
    }
}

/// The value of the waymark key in the origin's etcd: the present waymark, and the one that it replaced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginWaymark {
    #[serde(flatten)]
    pub present: Waymark,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Waymark>,
}

impl OriginWaymark {
    /// The one that replaces this one; `id` is random.
    pub fn next(&self, id: u64) -> Self {
        let previous = (self.present.counter > 0).then_some(self.present);
        Self { present: Waymark { counter: self.present.counter + 1, id }, previous }
    }

    /// As etcd holds it.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// `None` for a value that is no waymark: then the link has none.
    pub fn from_json(value: &[u8]) -> Option<Self> {
        serde_json::from_slice(value).ok()
    }
}

/// The last revision that was carried before: the watch starts at it, inclusive, to see that it is still the same one.
#[derive(Debug, Clone, Copy)]
pub struct Carried {
    pub revision: Revision,
    pub digest: Digest,
    /// The cluster that this link ships to; `None` while it is not known.
    pub peer: Option<ClusterId>,
    /// `wire::digest::of_revision`.
    pub digest_of: fn(&WholeRevision) -> Digest,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    #[error(
        "the watch delivered revision {got} after {last}: etcd promises that they only grow; the watch starts anew"
    )]
    WentBack { last: Revision, got: Revision },
    #[error(
        "revision {revision} of the origin has at least {bytes} bytes in the link's ranges, and revision_bytes_max is {bytes_max}: \
         raise it in [limits]"
    )]
    TooLarge { revision: Revision, bytes: usize, bytes_max: usize },
    /// Only if the revision is above the origin's compaction: at or below it, etcd no longer shows its deletes.
    #[error(
        "the origin's history is not the one that was carried up to revision {carried}: {found}; it was restored or replaced, and only \
         a new base copy helps (`etcd-ferry resync LINK`)"
    )]
    OtherHistory { carried: Revision, found: Found },
}

/// In what the origin's history differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Found {
    #[error("that revision holds other changes now")]
    OtherChanges,
    #[error("that revision is gone, and the watch goes on at {0}")]
    Nothing(Revision),
    #[error("revision {0} has changes now that it had not then")]
    Unknown(Revision),
}

#[derive(Debug)]
pub struct Sequencer {
    ranges: Ranges,
    waymark_key: Bytes,
    canary_key: Bytes,
    revision_bytes_max: usize,
    after: Revision,
    /// The last revision that ended.
    last: Revision,
    covered: Revision,
    gathering: Option<Gathering>,
    carried: Option<Carried>,
    /// The carried revision has come and was the same.
    carried_seen: bool,
}

/// A revision that may go on in the next message.
#[derive(Debug)]
struct Gathering {
    revision: Revision,
    changes: Vec<Change>,
    bytes: usize,
    came_from: Vec<ClusterId>,
    ferry_only: bool,
    waymark: Option<OriginWaymark>,
    canary: bool,
}

impl Sequencer {
    /// For a watch that starts at `after` + 1.
    pub fn new(link: &LinkName, ranges: Ranges, after: Revision, revision_bytes_max: usize) -> Self {
        Self {
            ranges,
            waymark_key: link.waymark_key(),
            canary_key: link.canary_key(),
            revision_bytes_max,
            after,
            last: after,
            covered: after,
            gathering: None,
            carried: None,
            carried_seen: true,
        }
    }

    /// For a watch that starts at the carried revision, inclusive. It is compared and not handed out, nor is anything up to
    /// `after`; but a revision between them that this link would carry is of another history.
    pub fn expect(mut self, carried: Carried) -> Self {
        self.last = Revision(carried.revision.0.saturating_sub(1)).min(self.after);
        self.carried = Some(carried);
        self.carried_seen = false;
        self
    }

    pub fn push(&mut self, message: WatchMessage) -> Result<Vec<Sequenced>, SequenceError> {
        let mut ended = Vec::new();
        for event in message.events {
            if self.gathering.as_ref().is_some_and(|gathering| gathering.revision != event.revision) {
                self.end(&mut ended)?;
            }
            self.gather(event)?;
        }
        if !message.fragment {
            self.end(&mut ended)?;
        }
        Ok(ended)
    }

    /// A progress notice: every event up to this revision was delivered before it.
    pub fn progress(&mut self, header_revision: Revision) -> Result<(), SequenceError> {
        if let (Some(carried), false) = (self.carried, self.carried_seen)
            && header_revision >= carried.revision
            && self.gathering.is_none()
        {
            let found = Found::Nothing(header_revision.next());
            return Err(SequenceError::OtherHistory { carried: carried.revision, found });
        }
        // A revision whose last piece is not here is not covered, whatever the notice says.
        if self.gathering.is_none() {
            self.covered = self.covered.max(header_revision);
        }
        Ok(())
    }

    /// From here on what was handed out, now or before, is in the history that this watch shows; `None`: it has not shown it yet.
    pub fn proven_from(&self) -> Option<Revision> {
        match self.carried {
            None => Some(self.after.next()),
            Some(_) => self.carried_seen.then_some(Revision(0)),
        }
    }

    /// Everything up to it has been handed out, or was known before.
    pub fn covered(&self) -> Revision {
        self.covered
    }

    fn gather(&mut self, event: Event) -> Result<(), SequenceError> {
        let revision = event.revision;
        if revision <= self.last {
            return Err(SequenceError::WentBack { last: self.last, got: revision });
        }
        let gathering = self.gathering.get_or_insert_with(|| Gathering {
            revision,
            changes: Vec::new(),
            bytes: 0,
            came_from: Vec::new(),
            ferry_only: true,
            waymark: None,
            canary: false,
        });
        if event.change.key().starts_with(FERRY_PREFIX) {
            gathering.note(&event.change, &self.waymark_key, &self.canary_key);
            return Ok(());
        }
        gathering.ferry_only = false;
        if self.ranges.contains(event.change.key()) {
            gathering.bytes += event.change.bytes();
            if gathering.bytes > self.revision_bytes_max {
                let (bytes, bytes_max) = (gathering.bytes, self.revision_bytes_max);
                return Err(SequenceError::TooLarge { revision, bytes, bytes_max });
            }
            gathering.changes.push(event.change);
        }
        Ok(())
    }

    fn end(&mut self, ended: &mut Vec<Sequenced>) -> Result<(), SequenceError> {
        let Some(gathering) = self.gathering.take() else { return Ok(()) };
        self.last = gathering.revision;
        let sequenced = gathering.end();
        if self.is_known(&sequenced)? {
            return Ok(());
        }
        self.covered = self.covered.max(sequenced.revision);
        ended.push(sequenced);
        Ok(())
    }

    /// Whether the revision was dealt with before, and is what it was then.
    fn is_known(&mut self, sequenced: &Sequenced) -> Result<bool, SequenceError> {
        let Some(carried) = self.carried else { return Ok(false) };
        let revision = sequenced.revision;
        let other = |found| Err(SequenceError::OtherHistory { carried: carried.revision, found });
        if !self.carried_seen {
            if revision != carried.revision {
                return other(Found::Nothing(revision));
            }
            // What changes nothing of the link has the digest of an empty canary.
            if !sequenced.is_of_the_link() || (carried.digest_of)(&sequenced.whole) != carried.digest {
                return other(Found::OtherChanges);
            }
            self.carried_seen = true;
            return Ok(true);
        }
        if revision > self.after {
            return Ok(false);
        }
        // While the peer is not known, a revision that came from anywhere may be one that was skipped.
        let may_be_skipped = carried.peer.is_none() && !sequenced.came_from.is_empty();
        if sequenced.is_carried(carried.peer) && !may_be_skipped {
            return other(Found::Unknown(revision));
        }
        Ok(true)
    }
}

impl Gathering {
    /// A key of etcd-ferry's own: where the revision came from, or this link's waymark or canary.
    fn note(&mut self, change: &Change, waymark_key: &Bytes, canary_key: &Bytes) {
        let Change::Put { key, value } = change else { return };
        if is_position_key(key)
            && let Ok(position) = serde_json::from_slice::<PositionOrigin>(value)
        {
            self.came_from.push(position.origin_cluster);
        }
        self.canary |= key == canary_key;
        if key == waymark_key {
            self.waymark = serde_json::from_slice(value).ok();
        }
    }

    fn end(self) -> Sequenced {
        let Self { revision, mut changes, came_from, ferry_only, waymark, canary, .. } = self;
        // etcd refuses most transactions that write a key twice, but accepts a put in one nested transaction and a delete in a
        // later one (tried with 3.5.30): both events have this revision, in order, and the last one is what the key became.
        changes.reverse();
        changes.sort_by(|a, b| a.key().cmp(b.key()));
        changes.dedup_by(|a, b| a.key() == b.key());
        Sequenced { revision, whole: WholeRevision { revision, changes }, came_from, ferry_only, waymark, canary }
    }
}

/// The one field of a position that a loop is known by; a position of a later version still has it.
#[derive(Deserialize)]
struct PositionOrigin {
    origin_cluster: ClusterId,
}

fn is_position_key(key: &[u8]) -> bool {
    let link = key.strip_prefix(LINKS_PREFIX).and_then(|rest| rest.strip_suffix(b"/position"));
    link.is_some_and(|link| !link.is_empty() && !link.contains(&b'/'))
}

#[cfg(test)]
mod tests;
