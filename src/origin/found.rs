//! Job: what comparing both sides comes to: the replica's answers checked, what differs, and whether a repair may mend it.
//! Input: messages of the replica. Output: narrower ranges, differing keys, a guard's verdict; messages to the replica.
//! Pure: no clock, no I/O.
//! Always true: an answer that leaves a hole in what was asked is no answer; no delete passes the guard that an operator did not allow.

use crate::model::{Digest, KeyRange, Revision};
use crate::wire::parts::{Difference, DifferingKey, KeyList, Part, tile};
use crate::wire::replicate as wire;
use bytes::Bytes;
use std::collections::BTreeSet;

/// What a key costs in an answer beside its own bytes: both values' digests, tags and lengths.
const KEY_OVERHEAD: usize = 34;

/// An operator's wish to have what differs mended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Mending {
    pub allow_deletes: bool,
    /// The share (0 to 1) of the replica's keys that may be deleted unasked.
    pub deletes_share_max: f64,
    /// The position says `repairing`: a repair ends that, also if nothing differs any more.
    pub ends: bool,
}

/// What a comparison came to.
#[derive(Debug, Default)]
pub(super) struct Compared {
    /// The revision of the oldest mark at which a part was compared.
    pub revision: Revision,
    /// Keys of the origin that were compared.
    pub keys: u64,
    pub differing: u64,
    /// The keys that differ, in key order, as far as they are kept.
    pub found: Vec<DifferingKey>,
    /// Keys that differed at first and not any more, where a link back exists: they were on their way.
    pub moving: u64,
    /// Of those that are kept: keys of revisions in quarantine at the replica.
    pub quarantined: BTreeSet<Bytes>,
    /// Keys that a repair put and deleted at the replica.
    pub mended: Option<(u64, u64)>,
    /// Why what differs was to be mended, and is not, or not all of it.
    pub unmended: Option<Unmended>,
}

impl Compared {
    /// Keys that differ and are expected to.
    pub fn expected(&self) -> u64 {
        self.found.iter().filter(|found| self.quarantined.contains(&found.key)).count() as u64
    }

    /// These keys, in key order, are mended, and others are not: they are not among those that differ any more.
    pub fn mended_of(&mut self, keys: &[Bytes]) {
        self.found.retain(|found| keys.binary_search(&found.key).is_err());
        self.differing = self.differing.saturating_sub(keys.len() as u64);
    }

    /// What a repair mends: what is in quarantine is left to those who retry it.
    pub fn mendable(&self) -> impl Iterator<Item = &DifferingKey> {
        self.found.iter().filter(|found| !self.quarantined.contains(&found.key))
    }
}

/// Why what differs is not mended; each says what to do.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub(super) enum MendStop {
    #[error("{differing} keys differ, more than a repair keeps by name: `etcd-ferry resync LINK` brings all of them")]
    TooMany { differing: u64 },
    #[error(
        "the repair would delete {deletes} of the {replica_keys} keys that the replica holds, more than the share of {share_max} that \
         deletes_share_max allows (the origin holds {origin_keys} keys); if they may go, run `etcd-ferry repair LINK --allow-deletes --config F`"
    )]
    Deletes { deletes: u64, replica_keys: u64, origin_keys: u64, share_max: f64 },
}

/// Why what differs was to be mended, and is not, or not all of it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unmended {
    #[error(transparent)]
    Stopped(#[from] MendStop),
    #[error("{0}")]
    Failed(String),
}

/// The guard of a base copy, for what a repair would delete.
pub(super) fn guard_deletes(compared: &Compared, mending: Mending) -> Result<(), MendStop> {
    if compared.differing > compared.found.len() as u64 {
        return Err(MendStop::TooMany { differing: compared.differing });
    }
    let count = |difference| compared.mendable().filter(|found| found.difference == difference).count() as u64;
    let (deletes, missing) = (count(Difference::Extra), count(Difference::Missing));
    let (origin_keys, share_max) = (compared.keys, mending.deletes_share_max);
    let replica_keys = (origin_keys + deletes).saturating_sub(missing);
    // A share that is not a number allows nothing.
    let allowed = origin_keys > 0 && deletes as f64 <= replica_keys as f64 * share_max;
    if deletes == 0 || mending.allow_deletes || allowed {
        return Ok(());
    }
    Err(MendStop::Deletes { deletes, replica_keys, origin_keys, share_max })
}

pub(super) fn part_message(part: &Part) -> wire::Part {
    let digest = Bytes::copy_from_slice(&part.digest.0);
    wire::Part { from: part.range.from.clone(), to: part.range.to.clone(), keys: part.keys, digest }
}

pub(super) fn list_message(list: KeyList) -> wire::KeyList {
    let (keys, values) = list.keys.into_iter().unzip();
    wire::KeyList { from: list.range.from, to: list.range.to, keys, values }
}

/// The replica's sub-parts of a part, if they are that.
pub(super) fn subs_of(subs: Vec<wire::Part>, range: &KeyRange) -> Option<Vec<Part>> {
    let sub = |sub: wire::Part| {
        let digest = Digest(<[u8; 16]>::try_from(&sub.digest[..]).ok()?);
        Some(Part { range: KeyRange { from: sub.from, to: sub.to }, keys: sub.keys, digest })
    };
    let subs = subs.into_iter().map(sub).collect::<Option<Vec<Part>>>()?;
    tile(&subs, range).then_some(subs)
}

/// About what the answer to a question with these lists may hold: each key of either side with both values. The replica's are known by
/// their number in the sub-parts that it named, and taken to be as long as those parts' edges.
pub(super) fn answer_bytes(lists: &[KeyList], subs: &[Part]) -> usize {
    let inside = |sub: &&Part| {
        let within = |list: &KeyList| list.range.from <= sub.range.from && !ends_before(&list.range, &sub.range);
        lists.iter().any(within)
    };
    let replica = subs.iter().filter(inside).map(|sub| {
        let key_bytes = sub.range.from.len().max(sub.range.to.len()) + KEY_OVERHEAD;
        usize::try_from(sub.keys).unwrap_or(usize::MAX).saturating_mul(key_bytes)
    });
    let origin = lists.iter().flat_map(|list| &list.keys).map(|(key, _)| key.len() + KEY_OVERHEAD);
    replica.chain(origin).fold(0, usize::saturating_add)
}

fn ends_before(one: &KeyRange, other: &KeyRange) -> bool {
    !one.to.is_empty() && (other.to.is_empty() || one.to < other.to)
}

/// The range cut at edges that lie inside of it, in order; at least one.
pub(super) fn cut_at(range: &KeyRange, edges: Vec<Bytes>) -> Option<Vec<KeyRange>> {
    let mut pieces = Vec::with_capacity(edges.len() + 1);
    let mut from = range.from.clone();
    for edge in edges {
        if edge <= from || !range.contains(&edge) {
            return None;
        }
        pieces.push(KeyRange { from: std::mem::replace(&mut from, edge.clone()), to: edge });
    }
    pieces.push(KeyRange { from, to: range.to.clone() });
    (pieces.len() > 1).then_some(pieces)
}

pub(super) fn found_of(key: wire::DifferingKey) -> Option<DifferingKey> {
    let difference = match key.difference() {
        wire::differing_key::Difference::Missing => Difference::Missing,
        wire::differing_key::Difference::Extra => Difference::Extra,
        wire::differing_key::Difference::OtherValue => Difference::OtherValue,
        wire::differing_key::Difference::Unspecified => return None,
    };
    Some(DifferingKey { key: key.key, difference, values: (key.origin_value, key.replica_value) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(from: &'static str, to: &'static str) -> KeyRange {
        KeyRange { from: from.into(), to: to.into() }
    }

    #[test]
    fn a_wide_part_is_cut_without_holes_and_only_at_edges_inside_of_it() {
        let cut = |edges: &[&'static str]| cut_at(&range("b", "m"), edges.iter().map(|e| Bytes::from(*e)).collect());
        assert_eq!(cut(&["d", "f"]), Some(vec![range("b", "d"), range("d", "f"), range("f", "m")]));
        for bad in [&[][..], &["b"], &["a"], &["m"], &["f", "d"], &["d", "d"]] {
            assert_eq!(cut(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_a_repair_that_broke_off_had_mended_differs_no_more() {
        let found = ["a", "b", "c", "d"].map(|key| DifferingKey {
            key: key.into(),
            difference: Difference::Missing,
            values: (1, 0),
        });
        let mut compared = Compared { differing: 4, found: found.to_vec(), ..Compared::default() };
        compared.mended_of(&["a".into(), "c".into()]);
        let left: Vec<&Bytes> = compared.found.iter().map(|found| &found.key).collect();
        assert_eq!((compared.differing, left), (2, vec![&Bytes::from("b"), &Bytes::from("d")]));
    }

    #[test]
    fn an_answer_is_as_large_as_what_either_side_holds_where_they_differ() {
        let sub = |from, to, keys| Part { range: range(from, to), keys, digest: Digest::default() };
        let subs = [sub("b", "d", 32), sub("d", "fff", 32), sub("fff", "m", 5)];
        let list = |from, to, keys: &[&'static str]| KeyList {
            range: range(from, to),
            keys: keys.iter().map(|key| (Bytes::from(*key), 0)).collect(),
        };
        // The origin has nothing there, the replica has.
        assert_eq!(answer_bytes(&[list("d", "fff", &[])], &subs), 32 * (3 + 34));
        assert_eq!(answer_bytes(&[list("b", "fff", &["c"])], &subs), 32 * (1 + 34) + 32 * (3 + 34) + (1 + 34));
        assert_eq!(answer_bytes(&[list("b", "d", &[]), list("fff", "m", &[])], &subs), 32 * 35 + 5 * 37);
        assert_eq!(answer_bytes(&[], &subs), 0);
        let to_the_end = [sub("b", "d", 2), sub("d", "", 3)];
        assert_eq!(answer_bytes(&[list("d", "", &[])], &to_the_end), 3 * 35);
        assert_eq!(answer_bytes(&[list("b", "d", &[])], &to_the_end), 2 * 35);
        assert_eq!(answer_bytes(&[list("b", "", &[])], &[sub("b", "", u64::MAX)]), usize::MAX);
    }

    /// `deletes` keys that only the replica has, beside what both have.
    fn extra(keys: u64, deletes: usize) -> Compared {
        let found = |n: usize| DifferingKey {
            key: Bytes::from(format!("{n:04}")),
            difference: Difference::Extra,
            values: (0, 1),
        };
        let found: Vec<DifferingKey> = (0..deletes).map(found).collect();
        Compared { keys, differing: deletes as u64, found, ..Compared::default() }
    }

    #[test]
    fn a_repair_deletes_the_configured_share_and_not_one_key_more_unless_it_is_allowed_to() {
        let mending = Mending { allow_deletes: false, deletes_share_max: 0.1, ends: false };
        assert!(guard_deletes(&extra(90, 10), mending).is_ok());
        let stop = guard_deletes(&extra(90, 11), mending).unwrap_err().to_string();
        assert!(stop.contains("11 of the 101") && stop.contains("repair LINK --allow-deletes"), "{stop}");
        assert!(guard_deletes(&extra(90, 11), Mending { allow_deletes: true, ..mending }).is_ok());
        assert!(guard_deletes(&extra(0, 1), Mending { deletes_share_max: 1.0, ..mending }).is_err(), "an empty origin");
        assert!(guard_deletes(&extra(9, 1), Mending { deletes_share_max: f64::NAN, ..mending }).is_err());
        assert!(guard_deletes(&extra(0, 0), mending).is_ok());
    }

    #[test]
    fn keys_in_quarantine_are_expected_to_differ_and_left_out_of_a_repair_and_its_guard() {
        let mut compared = extra(90, 11);
        assert_eq!((compared.expected(), compared.mendable().count()), (0, 11));
        compared.quarantined = [Bytes::from_static(b"0003"), Bytes::from_static(b"elsewhere")].into();
        assert_eq!((compared.expected(), compared.mendable().count()), (1, 10));
        assert!(compared.mendable().all(|found| found.key != "0003"));
        let mending = Mending { allow_deletes: false, deletes_share_max: 0.1, ends: false };
        assert!(guard_deletes(&compared, mending).is_ok(), "ten of a hundred");
    }

    #[test]
    fn more_keys_than_are_kept_by_name_are_no_repair() {
        let more = Compared { differing: 12, ..extra(90, 10) };
        let mending = Mending { allow_deletes: true, deletes_share_max: 1.0, ends: false };
        assert_eq!(guard_deletes(&more, mending), Err(MendStop::TooMany { differing: 12 }));
    }

    #[test]
    fn sub_parts_that_leave_a_hole_are_no_answer() {
        let sub = |from: &'static str, to: &'static str| wire::Part {
            from: from.into(),
            to: to.into(),
            keys: 0,
            digest: Bytes::from(vec![0; 16]),
        };
        assert!(subs_of(vec![sub("b", "d"), sub("d", "m")], &range("b", "m")).is_some());
        assert!(subs_of(vec![sub("b", "d"), sub("e", "m")], &range("b", "m")).is_none());
        assert!(subs_of(vec![wire::Part { digest: Bytes::new(), ..sub("b", "m") }], &range("b", "m")).is_none());
    }
}
