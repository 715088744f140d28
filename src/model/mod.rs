//! Job: the values that every stage speaks: numbers with types, changes, whole revisions; the position, ranges, status and
//! quarantine in files of their own.
//! Input: plain values. Output: plain values.
//! Pure: no clock, no I/O, no async.
//! Always true: a `WholeRevision` holds each key once, in key order.

pub mod limits;
mod position;
mod quarantine;
mod ranges;
pub mod stall;
mod status;

pub use position::{HeldBack, Paused, Phase, Position, Waymark, hex_bytes};
pub use quarantine::{
    Changed, GivenUp, Mended, Quarantine, RECORD_BYTES_MAX, Record, SKIPPED_MAX, TooManyKeys, skipped_bytes,
};
pub use ranges::{KeyRange, Ranges};
pub use status::{
    CanaryStatus, CertificatesStatus, CopyProgress, DifferingRange, EtcdHealth, ForeignStatus, LinkState, LinkStatus,
    Outcome, PartsProgress, QuarantinedStatus, Role, Side, StageStatus, Verification,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The prefix of everything that etcd-ferry itself keeps in an etcd; never replicated.
pub const FERRY_PREFIX: &[u8] = b"/etcd-ferry/";
/// The part of [`FERRY_PREFIX`] that every link watches: positions and waymarks.
pub const LINKS_PREFIX: &[u8] = b"/etcd-ferry/v1/links/";

/// A revision number of an etcd cluster (`mod_revision`, `header.revision`). 0: none yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// The global event sequence number of a link: +1 for each revision that it carries, 0 at an anchor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seq(pub u64);

/// Names an unbroken run of seqs; every anchor opens the next one. 0: none yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// The term of the shipper's election; 0 before there is one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub u64);

impl Revision {
    /// etcd's signed revision; a negative one is taken for 0, which no revision has.
    pub fn from_etcd(revision: i64) -> Self {
        Self(u64::try_from(revision).unwrap_or(0))
    }

    /// As etcd's API wants it.
    pub fn to_etcd(self) -> i64 {
        i64::try_from(self.0).unwrap_or(i64::MAX)
    }

    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Seq {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Epoch {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One epoch of a link, and the origin that it is read from. An epoch's number alone may be used again: by a link that was removed and made anew,
/// after a replica was restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub cluster: ClusterId,
    pub epoch: Epoch,
}

/// A cluster's id, as in etcd's response header. Shown in hexadecimal, as etcdctl does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub u64);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl Serialize for ClusterId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ClusterId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        u64::from_str_radix(&text, 16)
            .map(ClusterId)
            .map_err(|_| serde::de::Error::custom("a cluster id is a hexadecimal number of at most 16 digits"))
    }
}

/// A 128-bit digest (BLAKE3, cut). Shown as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 16]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl std::str::FromStr for Digest {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const RULE: &str = "a digest is 32 hexadecimal digits";
        if text.len() != 32 || !text.is_ascii() {
            return Err(RULE);
        }
        let number = u128::from_str_radix(text, 16).map_err(|_| RULE)?;
        Ok(Digest(number.to_be_bytes()))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One put or delete of one key, inside one revision.
#[derive(Clone, PartialEq, Eq)]
pub enum Change {
    Put { key: Bytes, value: Bytes },
    Delete { key: Bytes },
}

impl Change {
    pub fn key(&self) -> &Bytes {
        match self {
            Change::Put { key, .. } | Change::Delete { key } => key,
        }
    }

    pub fn into_key(self) -> Bytes {
        match self {
            Change::Put { key, .. } | Change::Delete { key } => key,
        }
    }

    /// Key plus value, in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Change::Put { key, value } => key.len() + value.len(),
            Change::Delete { key } => key.len(),
        }
    }
}

/// Never shows a key or a value: logs may hold what this prints.
impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Put { key, value } => write!(f, "Put({} B key, {} B value)", key.len(), value.len()),
            Change::Delete { key } => write!(f, "Delete({} B key)", key.len()),
        }
    }
}

/// All changes that etcd committed under one `mod_revision` and that lie in the link's ranges; never torn apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WholeRevision {
    pub revision: Revision,
    /// In key order, each key once.
    pub changes: Vec<Change>,
}

impl WholeRevision {
    /// Keys plus values, in bytes: what the memory bounds of every queue count.
    pub fn bytes(&self) -> usize {
        self.changes.iter().map(Change::bytes).sum()
    }
}

/// A link's name: 1 to 63 of `a-z 0-9 -`, starting with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct LinkName(String);

impl LinkName {
    pub const RULE: &'static str = "a link's name is 1 to 63 of a-z, 0-9 and '-', starting with a letter or digit";

    pub fn new(name: &str) -> Result<Self, &'static str> {
        let shape = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 63 || name.starts_with('-') || !name.chars().all(shape) {
            return Err(Self::RULE);
        }
        Ok(Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key of this link's position in the replica's etcd.
    pub fn position_key(&self) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/position", self.0))
    }

    /// Everything that this link keeps in an etcd lies below it.
    pub fn folder(&self) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/", self.0))
    }

    /// In the replica's etcd: the records of quarantined revisions lie below it.
    pub fn quarantine_folder(&self) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/quarantine/", self.0))
    }

    /// In the replica's etcd: the record of one quarantined revision.
    pub fn quarantine_key(&self, epoch: Epoch, seq: Seq) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/quarantine/{epoch}-{seq}", self.0))
    }

    /// In the origin's etcd: the key by which the sidecar named `node` stands for election.
    pub fn candidate_key(&self, node: &str) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/candidates/{node}", self.0))
    }

    /// In the origin's etcd: up to where the shipper's spool is applied at the replica, for the standbys.
    pub fn applied_key(&self) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/applied", self.0))
    }

    /// Of the shipper's canaries, in the origin's etcd.
    pub fn canary_key(&self) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/canary", self.0))
    }

    /// In the origin's etcd: that this origin was found to have another history than the replica.
    pub fn other_history_key(&self) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/other-history", self.0))
    }

    /// In the origin's etcd: written where only an event shows how far a watch is.
    pub fn progress_key(&self) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/progress", self.0))
    }

    /// The key of this link's waymark in the origin's etcd.
    pub fn waymark_key(&self) -> Bytes {
        Bytes::from(format!("/etcd-ferry/v1/links/{}/waymark", self.0))
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_links_name_is_part_of_keys_and_folders_and_so_of_few_characters() {
        assert!(
            LinkName::new("a").is_ok() && LinkName::new("0-config").is_ok() && LinkName::new(&"a".repeat(63)).is_ok()
        );
        for bad in ["", "-a", "Config", "a/b", "a.b", "a b", "ä", &"a".repeat(64)] {
            assert!(LinkName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_change_is_shown_without_its_key_and_its_value() {
        let (key, value) = (Bytes::from_static(b"secret-key"), Bytes::from_static(b"secret"));
        let shown = format!("{:?} {:?}", Change::Put { key: key.clone(), value }, Change::Delete { key });
        assert_eq!(shown, "Put(10 B key, 6 B value) Delete(10 B key)");
    }

    #[test]
    fn etcds_signed_numbers_are_taken_without_a_wrap() {
        assert_eq!((Revision::from_etcd(-1), Revision::from_etcd(7)), (Revision(0), Revision(7)));
        assert_eq!((Revision(7).to_etcd(), Revision(u64::MAX).to_etcd()), (7, i64::MAX));
    }
}
