//! Job: the values that every stage speaks: numbers with types, changes, whole revisions, the position; ranges, status and
//! quarantine in files of their own.
//! Input: plain values. Output: plain values.
//! Pure: no clock, no I/O, no async.
//! Always true: a `WholeRevision` holds each key once, in key order.

pub mod limits;
mod quarantine;
mod ranges;
pub mod stall;
mod status;

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

/// A note that the shipper keeps in the origin's etcd, so that a restored origin is known by its age.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waymark {
    pub counter: u64,
    /// Random, so that two histories with the same counter differ.
    pub id: u64,
}

/// Where a replica stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Copying,
    Repairing,
    Following,
}

/// How far the replica has come. One key in the replica's own etcd, written in the same transaction as the changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    pub epoch: Epoch,
    pub term: Term,
    /// The last seq of this epoch that is applied; 0 at an anchor.
    pub seq: Seq,
    pub origin_cluster: ClusterId,
    /// Everything that the origin committed up to this revision is in (while `following`).
    pub origin_revision: Revision,
    /// The last revision that the link carried (0: none since the anchor), and its digest.
    pub carried_revision: Revision,
    pub carried_digest: Digest,
    pub waymark: Waymark,
    /// Digest of the link's ranges, see `wire::digest::of_ranges`.
    pub ranges_digest: Digest,
    pub state: Phase,
    /// The highest revision at which a page of the present base copy was read: following starts when it is passed.
    pub anchor_revision: Revision,
    /// While `copying`: every key below it is copied (hexadecimal); `None`: all are.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "hex_key")]
    pub cursor: Option<Bytes>,
    /// While a revision larger than a request is applied in parts: how many of its changes are in.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub part: u64,
    /// The digest of that revision: no other may go on where it was left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_digest: Option<Digest>,
    /// Seqs of this epoch that the link went on without, since the replica's etcd refuses them: they are in quarantine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<Seq>,
    /// The next revision deletes so much that a person has to allow it; it goes with that revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back: Option<HeldBack>,
    /// Nothing is applied, by an operator's word, until another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<Paused>,
    /// The last revision of the replica's own etcd at which both sides were proved equal after somebody else had written there (0: none).
    #[serde(default, skip_serializing_if = "is_unproved")]
    pub equal_revision: Revision,
}

/// A revision that is not applied until a person allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBack {
    pub seq: Seq,
    /// Of the origin.
    pub revision: Revision,
    /// Of this revision; or, where `minute` says so, with those of the minute before it.
    pub deletes: u64,
    /// Of so many keys that the replica holds, or held a minute before.
    pub keys: u64,
    #[serde(default, skip_serializing_if = "is_false")]
    pub minute: bool,
    /// A person said so: it goes through, once.
    #[serde(default, skip_serializing_if = "is_false")]
    pub allowed: bool,
}

/// Since when a link is paused, and by whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paused {
    /// In milliseconds of Unix time, by the replica's clock.
    pub at_ms: u64,
    /// The name of the operator's certificate.
    pub by: String,
}

impl HeldBack {
    /// The longest that it makes the position's JSON: its names, four numbers of 20 digits, two words.
    pub const BYTES_MAX: usize = 180;
}

fn is_false(flag: &bool) -> bool {
    !flag
}

fn is_unproved(revision: &Revision) -> bool {
    *revision == Revision(0)
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Position {
    /// The bytes kept in etcd: JSON, readable with etcdctl.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub fn from_json(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

/// Keys may hold any bytes, JSON strings may not: a key is hexadecimal.
pub mod hex_bytes {
    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(key: &Bytes, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&key.iter().map(|b| format!("{b:02x}")).collect::<String>())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(d)?;
        let digit = |i: usize| text.get(i..i + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
        let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(digit).collect();
        bytes.map(Bytes::from).ok_or_else(|| serde::de::Error::custom("a key is hexadecimal digits"))
    }
}

/// A key that may be absent; where it is there, as [`hex_bytes`].
mod hex_key {
    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    struct Key(#[serde(with = "super::hex_bytes")] Bytes);

    pub fn serialize<S: Serializer>(key: &Option<Bytes>, s: S) -> Result<S::Ok, S::Error> {
        match key {
            Some(key) => super::hex_bytes::serialize(key, s),
            None => s.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Bytes>, D::Error> {
        Ok(Option::<Key>::deserialize(d)?.map(|Key(key)| key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(cursor: Option<Bytes>) -> Position {
        Position {
            epoch: Epoch(3),
            term: Term(2),
            seq: Seq(9),
            origin_cluster: ClusterId(0xab),
            origin_revision: Revision(100),
            carried_revision: Revision(90),
            carried_digest: Digest([0x1f; 16]),
            waymark: Waymark { counter: 5, id: u64::MAX },
            ranges_digest: Digest([1; 16]),
            state: Phase::Copying,
            anchor_revision: Revision(70),
            cursor,
            part: 0,
            part_digest: None,
            skipped: Vec::new(),
            held_back: None,
            paused: None,
            equal_revision: Revision(0),
        }
    }

    #[test]
    fn a_position_is_read_as_it_was_written_whatever_bytes_its_cursor_has() {
        for cursor in [None, Some(Bytes::new()), Some(Bytes::from_static(b"/a\0\xff"))] {
            let position = position(cursor);
            assert_eq!(Position::from_json(&position.to_json()).unwrap(), position);
        }
        let part = Position { part: 7, part_digest: Some(Digest([3; 16])), skipped: vec![Seq(4)], ..position(None) };
        let part = Position { equal_revision: Revision(8), ..part };
        let paused = Some(Paused { at_ms: u64::MAX, by: "spiffe://etcd-ferry.dev/admin \"\n".to_owned() });
        let part = Position { paused, ..part };
        assert_eq!(Position::from_json(&part.to_json()).unwrap(), part);
    }

    #[test]
    fn what_is_held_back_is_read_as_it_was_written_and_never_takes_more_than_is_counted() {
        let most = HeldBack {
            seq: Seq(u64::MAX),
            revision: Revision(u64::MAX),
            deletes: u64::MAX,
            keys: u64::MAX,
            minute: true,
            allowed: true,
        };
        let plain = position(None);
        let held = Position { held_back: Some(most), ..plain.clone() };
        assert!(held.to_json().len() - plain.to_json().len() <= HeldBack::BYTES_MAX);
        assert_eq!(Position::from_json(&held.to_json()).unwrap(), held);
        let short = HeldBack { minute: false, allowed: false, ..most };
        let held = Position { held_back: Some(short), ..plain };
        assert_eq!(Position::from_json(&held.to_json()).unwrap(), held);
    }

    /// They lie in etcds, written by other versions.
    #[test]
    fn a_positions_json_has_the_names_and_forms_that_lie_in_etcds() {
        let json = String::from_utf8(position(Some(Bytes::from_static(b"/a"))).to_json()).unwrap();
        let digests = ["1f".repeat(16), "01".repeat(16)];
        assert_eq!(
            json,
            format!(
                "{{\"epoch\":3,\"term\":2,\"seq\":9,\"origin_cluster\":\"ab\",\"origin_revision\":100,\"carried_revision\":90,\
                 \"carried_digest\":\"{}\",\"waymark\":{{\"counter\":5,\"id\":18446744073709551615}},\"ranges_digest\":\"{}\",\
                 \"state\":\"copying\",\"anchor_revision\":70,\"cursor\":\"2f61\"}}",
                digests[0], digests[1]
            )
        );
        let bent = |from: &str, to: &str| Position::from_json(json.replace(from, to).as_bytes());
        assert!(
            bent("\"ab\"", "\"xy\"").is_err() && bent("1f1f", "1f1").is_err() && bent("\"2f61\"", "\"2f6\"").is_err()
        );
    }

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
