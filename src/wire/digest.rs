//! Job: the 128-bit digests by which two sides know that they speak of the same revision, frame or ranges.
//! Input: plain values. Output: `Digest`s, BLAKE3 cut to 16 bytes.
//! Pure: no clock, no I/O.
//! Always true: every variable part is preceded by its length, so that two values that differ never hash the same bytes; each kind of
//! digest has its own domain. The forms are fixed: positions in etcds and journals on disk hold their results.

use crate::model::{Change, Digest, Ranges, WholeRevision};

const REVISION_DOMAIN: &str = "etcd-ferry revision v1";
const FRAME_DOMAIN: &str = "etcd-ferry frame v1";
const RANGES_DOMAIN: &str = "etcd-ferry ranges v1";

const TAG_DELETE: u8 = 0;
const TAG_PUT: u8 = 1;

/// Of the canonical plain form (numbers as u64, little-endian): revision, count of changes, then for each in key order its tag
/// (0 delete, 1 put), key length, key, and for a put value length, value.
pub fn of_revision(revision: &WholeRevision) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key(REVISION_DOMAIN);
    hasher.update(&revision.revision.0.to_le_bytes());
    update_len(&mut hasher, revision.changes.len());
    for change in &revision.changes {
        match change {
            Change::Delete { key } => {
                hasher.update(&[TAG_DELETE]);
                update_bytes(&mut hasher, key);
            }
            Change::Put { key, value } => {
                hasher.update(&[TAG_PUT]);
                update_bytes(&mut hasher, key);
                update_bytes(&mut hasher, value);
            }
        }
    }
    cut(&hasher)
}

/// Of a frame: the digests of its revisions, in order.
pub fn of_frame(digests: &[Digest]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key(FRAME_DOMAIN);
    for digest in digests {
        hasher.update(&digest.0);
    }
    cut(&hasher)
}

/// Of a link's ranges: each piece's `from` and `to`, in key order. The same keys give the same digest, however they were configured.
pub fn of_ranges(ranges: &Ranges) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key(RANGES_DOMAIN);
    for piece in ranges.pieces() {
        update_bytes(&mut hasher, &piece.from);
        update_bytes(&mut hasher, &piece.to);
    }
    cut(&hasher)
}

pub(super) fn update_len(hasher: &mut blake3::Hasher, len: usize) {
    hasher.update(&(len as u64).to_le_bytes());
}

pub(super) fn update_bytes(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    update_len(hasher, bytes.len());
    hasher.update(bytes);
}

pub(super) fn cut(hasher: &blake3::Hasher) -> Digest {
    let mut digest = Digest::default();
    hasher.finalize_xof().fill(&mut digest.0);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Revision;
    use bytes::Bytes;
    use std::collections::BTreeSet;

    fn put(key: &'static str, value: &'static str) -> Change {
        Change::Put { key: Bytes::from_static(key.as_bytes()), value: Bytes::from_static(value.as_bytes()) }
    }

    fn delete(key: &'static str) -> Change {
        Change::Delete { key: Bytes::from_static(key.as_bytes()) }
    }

    #[test]
    fn revisions_that_differ_in_anything_have_different_digests() {
        let forms = [
            (1, vec![]),
            (2, vec![]),
            (1, vec![put("a", "bc")]),
            (1, vec![put("ab", "c")]),
            (1, vec![put("abc", "")]),
            (1, vec![delete("abc")]),
            (1, vec![put("a", "b"), put("c", "")]),
            (1, vec![put("a", "b"), delete("c")]),
            (2, vec![put("a", "b"), delete("c")]),
        ];
        let digests: BTreeSet<Digest> = forms
            .iter()
            .map(|(n, changes)| of_revision(&WholeRevision { revision: Revision(*n), changes: changes.clone() }))
            .collect();
        assert_eq!(digests.len(), forms.len());
    }

    #[test]
    fn the_digest_of_a_known_revision_never_changes_since_positions_hold_it() {
        let revision = WholeRevision { revision: Revision(7), changes: vec![put("/a", "1"), delete("/b")] };
        let digest = of_revision(&revision);
        assert_eq!(digest.to_string(), "fa40142740150ea73a645655e43b2ae7");
        assert_eq!(of_frame(&[digest]).to_string(), "0d05e86335ac8547e71b5c952d5ecf6b");
    }

    #[test]
    fn a_frame_of_the_same_revisions_in_another_order_has_another_digest() {
        let (a, b) = (Digest([1; 16]), Digest([2; 16]));
        assert_ne!(of_frame(&[a, b]), of_frame(&[b, a]));
        assert_ne!(of_frame(&[a]), of_frame(&[a, a]));
    }

    #[test]
    fn ranges_of_the_same_keys_have_the_same_digest_and_others_another() {
        let ranges = |prefixes: &[&'static str], excludes: &[&'static str]| {
            let all =
                |texts: &[&'static str]| texts.iter().map(|t| Bytes::from_static(t.as_bytes())).collect::<Vec<_>>();
            of_ranges(&Ranges::new(&all(prefixes), &all(excludes)))
        };
        assert_eq!(ranges(&["/a/", "/a/b/"], &[]), ranges(&["/a/"], &[]));
        assert_ne!(ranges(&["/a/"], &[]), ranges(&["/b/"], &[]));
        assert_ne!(ranges(&["/a/"], &["/a/x"]), ranges(&["/a/"], &[]));
    }
}
