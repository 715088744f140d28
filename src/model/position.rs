//! Job: how far a replica has come, as it lies in the replica's etcd.
//! Input: plain values; JSON. Output: JSON; plain values.
//! Pure: no clock, no I/O.
//! Always true: what one version has written, every later one reads.

use super::{ClusterId, Digest, Epoch, Revision, Run, Seq, Term};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

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

pub(super) fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Position {
    /// The run that the replica follows.
    pub fn run(&self) -> Run {
        Run { cluster: self.origin_cluster, epoch: self.epoch }
    }

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
impl Position {
    /// What tests begin with: following at seq 40 and revision 100, the last carried one 90.
    pub(crate) fn of_tests() -> Self {
        Self {
            epoch: Epoch(3),
            term: Term(2),
            seq: Seq(40),
            origin_cluster: ClusterId(1),
            origin_revision: Revision(100),
            carried_revision: Revision(90),
            carried_digest: Digest([9; 16]),
            waymark: Waymark::default(),
            ranges_digest: Digest::default(),
            state: Phase::Following,
            anchor_revision: Revision(50),
            cursor: None,
            part: 0,
            part_digest: None,
            skipped: Vec::new(),
            held_back: None,
            paused: None,
            equal_revision: Revision(0),
        }
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
}
