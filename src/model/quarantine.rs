//! Job: what is kept of a quarantined revision: which keys it changed, how large they were, why it was refused; never a value.
//! Input: a revision, a reason, the position's skipped seqs. Output: a record's JSON and back; the keys that differ for it.
//! Pure: no clock, no I/O.
//! Always true: a record holds every key of its revision, or there is none; a seq that is skipped is shown, also without its record.

use super::{Change, Digest, Epoch, Position, Revision, Seq, WholeRevision};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Revisions that a link goes on without, at most. Each is 21 bytes in the position, which travels in every transaction, and a record of up to
/// [`RECORD_BYTES_MAX`] in memory. A link that has so many is not followed any more, and holds.
pub const SKIPPED_MAX: usize = 32;
/// A record's JSON: some 2,500 keys, and a third of etcd's smallest usual request, beside the position.
pub const RECORD_BYTES_MAX: usize = 512 << 10;
/// A reason may hold what a peer or etcd said.
const REASON_BYTES_MAX: usize = 1_024;

/// One quarantined revision, as it lies in the replica's etcd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub epoch: Epoch,
    pub seq: Seq,
    /// Of the origin.
    pub revision: Revision,
    pub digest: Digest,
    pub reason: String,
    /// How often it was refused.
    pub refusals: u32,
    /// When it was given up, in milliseconds of Unix time by the replica's clock.
    pub at_ms: u64,
    /// So many of its changes, in key order, were applied before.
    #[serde(default, skip_serializing_if = "super::position::is_zero")]
    pub part: u64,
    /// In key order, each key once.
    pub changes: Vec<Changed>,
}

/// A change without its value.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    #[serde(with = "super::hex_bytes")]
    pub key: Bytes,
    /// `None`: it was deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_bytes: Option<u64>,
}

/// Never shows a key: logs may hold what this prints.
impl std::fmt::Debug for Changed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Changed({} B key)", self.key.len())
    }
}

/// A revision is too large to be recorded: nobody would know afterwards what differs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "revision {revision} changes {keys} keys, and its record would take {bytes} bytes, of at most {RECORD_BYTES_MAX}: it is not quarantined"
)]
pub struct TooManyKeys {
    revision: Revision,
    keys: usize,
    bytes: usize,
}

/// How a revision came to be given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenUp {
    pub reason: String,
    pub refusals: u32,
    pub at_ms: u64,
    pub part: u64,
}

impl Record {
    pub fn of(epoch: Epoch, seq: Seq, whole: &WholeRevision, digest: Digest, why: GivenUp) -> Self {
        let mut changes: Vec<Changed> = whole.changes.iter().map(changed).filter(|c| !c.key.is_empty()).collect();
        // A revision that is none may be here for just that.
        changes.sort_by(|a, b| a.key.cmp(&b.key));
        changes.dedup_by(|a, b| a.key == b.key);
        let GivenUp { mut reason, refusals, at_ms, part } = why;
        let end = (0..=REASON_BYTES_MAX.min(reason.len())).rev().find(|end| reason.is_char_boundary(*end));
        reason.truncate(end.unwrap_or(0));
        Self { epoch, seq, revision: whole.revision, digest, reason, refusals, at_ms, part, changes }
    }

    /// What lies in etcd: JSON, readable with etcdctl.
    pub fn to_json(&self) -> Result<Vec<u8>, TooManyKeys> {
        let json = serde_json::to_vec(self).unwrap_or_default();
        if json.len() > RECORD_BYTES_MAX {
            return Err(TooManyKeys { revision: self.revision, keys: self.changes.len(), bytes: json.len() });
        }
        Ok(json)
    }

    pub fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    pub fn keys(&self) -> impl Iterator<Item = &Bytes> {
        self.changes.iter().map(|changed| &changed.key)
    }
}

fn changed(change: &Change) -> Changed {
    match change {
        Change::Put { key, value } => Changed { key: key.clone(), value_bytes: Some(value.len() as u64) },
        Change::Delete { key } => Changed { key: key.clone(), value_bytes: None },
    }
}

/// What a repair wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mended {
    pub puts: u64,
    pub deletes: u64,
}

/// The revisions that the link goes on without.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quarantine {
    pub epoch: Epoch,
    /// In the order of their seqs; `None`: somebody took the record away.
    pub entries: Vec<(Seq, Option<Record>)>,
}

impl Quarantine {
    /// Those of a position, with the records that were found.
    pub fn of(position: &Position, found: Vec<Record>) -> Self {
        let mut found: Vec<Record> = found.into_iter().filter(|record| record.epoch == position.epoch).collect();
        let entry = |seq: &Seq| {
            let at = found.iter().position(|record| record.seq == *seq);
            (*seq, at.map(|at| found.swap_remove(at)))
        };
        let entries = position.skipped.iter().map(entry).collect();
        Self { epoch: position.epoch, entries }
    }

    /// Whether it is what the position says, so that the records need not be read again.
    pub fn is_of(&self, position: Option<&Position>) -> bool {
        let skipped = position.map_or(&[][..], |position| &position.skipped);
        let same_epoch = skipped.is_empty() || position.is_some_and(|position| position.epoch == self.epoch);
        same_epoch && skipped.iter().eq(self.entries.iter().map(|(seq, _)| seq))
    }

    /// The same, with one more.
    pub fn with(&self, record: Record) -> Self {
        let mut entries = self.entries.clone();
        let epoch = record.epoch;
        entries.push((record.seq, Some(record)));
        Self { epoch, entries }
    }

    /// The same, without one.
    pub fn without(&self, seq: Seq) -> Self {
        let entries = self.entries.iter().filter(|(skipped, _)| *skipped != seq).cloned().collect();
        Self { epoch: self.epoch, entries }
    }

    /// `None`: it is not in quarantine.
    pub fn entry(&self, seq: Seq) -> Option<Option<&Record>> {
        self.entries.iter().find(|(skipped, _)| *skipped == seq).map(|(_, record)| record.as_ref())
    }

    /// The keys whose values may differ for it.
    pub fn keys(&self) -> BTreeSet<&Bytes> {
        self.entries.iter().filter_map(|(_, record)| record.as_ref()).flat_map(Record::keys).collect()
    }
}

/// What the skipped seqs add to the position's JSON: its name, brackets, and 20 digits with a comma for each.
pub fn skipped_bytes(skipped: usize) -> usize {
    if skipped == 0 { 0 } else { 14 + 21 * skipped }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    fn record(seq: u64, keys: usize) -> Record {
        let changes =
            (0..keys).map(|n| Change::Put { key: Bytes::from(format!("/app/{n:06}")), value: bytes("12345") });
        let whole = WholeRevision { revision: Revision(100 + seq), changes: changes.collect() };
        let why = GivenUp { reason: "too large".to_owned(), refusals: 1, at_ms: 7, part: 0 };
        Record::of(Epoch(3), Seq(seq), &whole, Digest([9; 16]), why)
    }

    fn position(skipped: &[u64]) -> Position {
        Position { skipped: skipped.iter().copied().map(Seq).collect(), ..Position::of_tests() }
    }

    /// It lies in etcds, written by other versions.
    #[test]
    fn a_record_names_keys_and_sizes_and_never_holds_a_value() {
        let put = Change::Put { key: bytes("/b\\xff"), value: bytes("secret") };
        let whole = WholeRevision { revision: Revision(9), changes: vec![Change::Delete { key: bytes("/a") }, put] };
        let why = GivenUp { reason: "no".to_owned(), refusals: 8, at_ms: 5, part: 1 };
        let record = Record::of(Epoch(1), Seq(2), &whole, Digest([0x1f; 16]), why);
        let json = record.to_json().unwrap();
        assert_eq!(
            String::from_utf8(json.clone()).unwrap(),
            format!(
                "{{\"epoch\":1,\"seq\":2,\"revision\":9,\"digest\":\"{}\",\"reason\":\"no\",\"refusals\":8,\"at_ms\":5,\"part\":1,\
                 \"changes\":[{{\"key\":\"2f61\"}},{{\"key\":\"2f625c786666\",\"value_bytes\":6}}]}}",
                "1f".repeat(16)
            )
        );
        assert_eq!(Record::from_json(&json).unwrap(), record);
        assert!(!format!("{record:?}").contains("secret"));
    }

    #[test]
    fn a_revision_that_is_none_is_kept_with_each_of_its_keys_once_and_in_order() {
        let put = |key| Change::Put { key: bytes(key), value: bytes("1") };
        let changes = vec![put("/b"), put(""), put("/a"), put("/b")];
        let why = GivenUp { reason: "ä".repeat(REASON_BYTES_MAX), refusals: 1, at_ms: 0, part: 0 };
        let record =
            Record::of(Epoch(1), Seq(1), &WholeRevision { revision: Revision(1), changes }, Digest::default(), why);
        assert_eq!(record.keys().collect::<Vec<_>>(), ["/a", "/b"]);
        assert_eq!(record.reason.len(), REASON_BYTES_MAX);
    }

    #[test]
    fn a_revision_with_more_keys_than_a_record_takes_is_not_quarantined() {
        assert!(record(1, 5_000).to_json().is_ok());
        let refused = record(1, 20_000).to_json().unwrap_err().to_string();
        assert!(refused.contains("revision 101 changes 20000 keys"), "{refused}");
    }

    #[test]
    fn every_skipped_seq_is_shown_also_without_its_record_and_records_of_another_epoch_are_not() {
        let other = Record { epoch: Epoch(2), ..record(6, 1) };
        let quarantine = Quarantine::of(&position(&[4, 6]), vec![other, record(5, 1), record(4, 1)]);
        assert_eq!(quarantine.entries, [(Seq(4), Some(record(4, 1))), (Seq(6), None)]);
        assert_eq!(quarantine.entry(Seq(6)), Some(None));
        assert_eq!(quarantine.entry(Seq(5)), None);
        assert_eq!(quarantine.keys().len(), 1);
    }

    #[test]
    fn the_records_are_read_again_only_where_the_position_says_something_else() {
        let quarantine = Quarantine::of(&position(&[4, 6]), vec![record(4, 1)]);
        assert!(quarantine.is_of(Some(&position(&[4, 6]))));
        assert!(!quarantine.is_of(Some(&position(&[4]))) && !quarantine.is_of(None));
        let newer = Position { epoch: Epoch(4), ..position(&[4, 6]) };
        assert!(!quarantine.is_of(Some(&newer)), "the same seqs of another epoch");
        assert!(Quarantine::default().is_of(None) && Quarantine::default().is_of(Some(&position(&[]))));
        assert!(quarantine.without(Seq(6)).with(record(9, 1)).is_of(Some(&position(&[4, 9]))));
    }

    #[test]
    fn the_skipped_seqs_never_take_more_of_the_position_than_is_counted() {
        let plain = position(&[]).to_json().len();
        for count in [1, 2, SKIPPED_MAX] {
            let full = Position { skipped: vec![Seq(u64::MAX); count], ..position(&[]) };
            assert!(full.to_json().len() - plain <= skipped_bytes(count), "{count}");
        }
        assert_eq!(skipped_bytes(0), 0);
    }
}
