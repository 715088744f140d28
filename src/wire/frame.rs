//! Job: whole revisions as bytes, for the wire and the disk: the frame around a body (body.rs), and its standalone kind, which needs
//! nothing but itself.
//! Input: whole revisions; or the bytes of a frame. Output: the bytes of a frame; or whole revisions with their digests.
//! Pure: no clock, no I/O.
//! Always true: any bytes are decoded to the revisions that were encoded, or refused; sizes are checked against the limits, and against what
//! LZ4 can make of the bytes that are there, before memory is taken for them.
//!
//! A frame, byte by byte. It is fixed: any change gets another version. (`v`: varint, see varint.rs.)
//!
//! ```text
//! version     1 byte    1
//! flags       1 byte    1: standalone, 2: fresh (starts the window afresh), not both; the other bits are 0
//! generation  v         of the window, below 2^32; 0 in a standalone frame
//! epoch       v
//! term        v
//! seq_first   v         the seq of the first revision; the others follow without a gap
//! revisions   v         how many
//! body_bytes  v         the length of the body
//! digest      16 bytes  `digest::of_frame` over the digests of the revisions
//! checksum    4 bytes   crc32c, little-endian, of all bytes before it, then the block, then the body
//! block       the rest  the body as one LZ4 block; its dictionary is the window's, or none in a standalone frame
//! ```

use crate::model::{Digest, Epoch, Revision, Seq, Term, WholeRevision};
use crate::wire::{body, digest, varint};
use bytes::Bytes;
use std::borrow::Borrow;
use thiserror::Error;

const VERSION: u8 = 1;
const FLAG_STANDALONE: u8 = 1;
const FLAG_FRESH: u8 = 2;

/// LZ4 makes at most so many bytes of one.
const LZ4_EXPANSION_MAX: usize = 255;
/// A revision in a body has at least so many bytes.
const REVISION_BYTES_MIN: usize = 2;

/// What a decoder accepts. An encoder's caller keeps to the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// Keys plus values of one frame, in bytes.
    pub plain_bytes_max: usize,
    /// Revisions of one frame.
    pub revisions_max: usize,
}

impl FrameLimits {
    /// Far more than the revisions of a full frame, yet few enough to take memory for at once.
    pub const REVISIONS_MAX: usize = 65_536;

    pub fn new(plain_bytes_max: usize) -> Self {
        Self { plain_bytes_max, revisions_max: Self::REVISIONS_MAX }
    }

    /// As many of these as one frame takes: a frame's bytes may hold more revisions of a few bytes each than a decoder accepts.
    pub fn fit<T>(revisions: &[T]) -> &[T] {
        &revisions[..revisions.len().min(Self::REVISIONS_MAX)]
    }

    /// A body may be half as large again as its keys and values, for tags and lengths, and a little more for small frames. Only a frame of
    /// many megabytes of the shortest keys would need more.
    fn body_bytes_max(&self) -> usize {
        self.plain_bytes_max.saturating_add(self.plain_bytes_max / 2).saturating_add(1 << 20)
    }
}

/// Why a frame is refused.
#[derive(Debug, Error)]
pub enum FrameError {
    #[error("the frame ends too early")]
    Truncated,
    #[error("the frame has version {0}, and this sidecar speaks {VERSION}")]
    Version(u8),
    #[error("the frame has unknown flags ({0:#04x})")]
    Flags(u8),
    #[error("a number in the frame is malformed or out of its range")]
    Number,
    #[error("the frame declares a body of {declared} bytes, and {max} are possible")]
    BodyTooLarge { declared: usize, max: usize },
    #[error("the frame declares {declared} revisions, and {max} are possible")]
    TooManyRevisions { declared: usize, max: usize },
    #[error("a revision declares {declared} changes, and {max} are possible")]
    TooManyChanges { declared: usize, max: usize },
    #[error("the frame's keys and values exceed {max} bytes")]
    PlainTooLarge { max: usize },
    #[error("the frame's block cannot be decompressed")]
    Block(#[source] lz4_flex::block::DecompressError),
    #[error("the frame's block holds {found} bytes, and {declared} are declared")]
    BodyLength { declared: usize, found: usize },
    #[error("the frame's checksum is wrong")]
    Checksum,
    #[error("the frame has an unknown kind of change ({0})")]
    Tag(u8),
    #[error("the frame's keys or revisions are not in order")]
    Order,
    #[error("the frame has bytes after its last revision")]
    Trailing,
    #[error("the frame's revisions do not have the digest that it declares")]
    Digest,
    #[error("the frame needs its stream's window")]
    NotStandalone,
}

/// What a frame says of itself. Read before the checksum is proven: good for a first look, not for a decision that lasts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameHeader {
    pub standalone: bool,
    pub fresh: bool,
    pub generation: u32,
    pub epoch: Epoch,
    pub term: Term,
    pub seq_first: Seq,
    pub revisions: usize,
    pub body_bytes: usize,
    pub digest: Digest,
}

/// A decoded frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    pub epoch: Epoch,
    pub term: Term,
    /// Of the first revision; the others follow without a gap.
    pub seq_first: Seq,
    pub revisions: Vec<WholeRevision>,
    /// Of each revision.
    pub digests: Vec<Digest>,
    /// Keys plus values, in bytes.
    pub plain_bytes: usize,
}

impl FrameHeader {
    fn write(&self, out: &mut Vec<u8>) {
        let standalone = if self.standalone { FLAG_STANDALONE } else { 0 };
        let fresh = if self.fresh { FLAG_FRESH } else { 0 };
        out.extend_from_slice(&[VERSION, standalone | fresh]);
        varint::put(out, u64::from(self.generation));
        varint::put(out, self.epoch.0);
        varint::put(out, self.term.0);
        varint::put(out, self.seq_first.0);
        varint::put_len(out, self.revisions);
        varint::put_len(out, self.body_bytes);
        out.extend_from_slice(&self.digest.0);
    }
}

/// Encodes revisions, whose digests are `digests`, so that they can be decoded without anything before them. They are in order, and at
/// most [`FrameLimits::REVISIONS_MAX`]. No delta and no dictionary: this is the body for disks and pages, where cheap counts.
pub fn encode_standalone<R: Borrow<WholeRevision>>(
    epoch: Epoch,
    term: Term,
    seq_first: Seq,
    revisions: &[R],
    digests: &[Digest],
) -> Bytes {
    debug_assert_eq!(revisions.len(), digests.len());
    let plain_bytes: usize = revisions.iter().map(|r| r.borrow().bytes()).sum();
    let mut body = Vec::with_capacity(plain_bytes + plain_bytes / 8 + 64);
    body::write_revisions(&mut body, revisions, Revision(0), body::write_change);
    let header = FrameHeader {
        standalone: true,
        fresh: false,
        generation: 0,
        epoch,
        term,
        seq_first,
        revisions: revisions.len(),
        body_bytes: body.len(),
        digest: digest::of_frame(digests),
    };
    seal(&header, &body, &[], &mut Vec::new())
}

/// Decodes a standalone frame. Its keys and values are slices of one buffer.
pub fn decode_standalone(frame: &[u8], limits: &FrameLimits) -> Result<Decoded, FrameError> {
    let sealed = Sealed::parse(frame, limits)?;
    if !sealed.header.standalone {
        return Err(FrameError::NotStandalone);
    }
    let body = sealed.open(&[])?;
    body::read_revisions(body, &sealed.header, limits, Revision(0), body::read_change)
}

/// Puts header, checksum and block together. `scratch` is only memory to work in.
pub(super) fn seal(header: &FrameHeader, body: &[u8], dictionary: &[u8], scratch: &mut Vec<u8>) -> Bytes {
    scratch.clear();
    header.write(scratch);
    let checksum_at = scratch.len();
    let block_at = checksum_at + 4;
    scratch.resize(block_at + lz4_flex::block::get_maximum_output_size(body.len()), 0);
    let block_bytes = lz4_flex::block::compress_into_with_dict(body, &mut scratch[block_at..], dictionary)
        .expect("LZ4 needs no more than its own maximum");
    scratch.truncate(block_at + block_bytes);
    let checksum = checksum(&scratch[..checksum_at], &scratch[block_at..], body);
    scratch[checksum_at..block_at].copy_from_slice(&checksum.to_le_bytes());
    Bytes::copy_from_slice(scratch)
}

/// Covers the block too, so that a change of it that LZ4 decodes to the same bytes is noticed all the same.
fn checksum(header: &[u8], block: &[u8], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(header), block), body)
}

/// A frame whose header is read and whose block is still closed.
pub(super) struct Sealed<'a> {
    pub(super) header: FrameHeader,
    header_bytes: &'a [u8],
    checksum: u32,
    block: &'a [u8],
}

impl<'a> Sealed<'a> {
    pub(super) fn parse(frame: &'a [u8], limits: &FrameLimits) -> Result<Self, FrameError> {
        let (&[version, flags], mut rest) = frame.split_first_chunk().ok_or(FrameError::Truncated)?;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let known = flags & !(FLAG_STANDALONE | FLAG_FRESH) == 0;
        if !known || flags == FLAG_STANDALONE | FLAG_FRESH {
            return Err(FrameError::Flags(flags));
        }
        let generation = take_number(&mut rest)?;
        let epoch = Epoch(take_number(&mut rest)?);
        let term = Term(take_number(&mut rest)?);
        let seq_first = Seq(take_number(&mut rest)?);
        let revisions = varint::take_len(&mut rest).ok_or(FrameError::Number)?;
        let body_bytes = varint::take_len(&mut rest).ok_or(FrameError::Number)?;
        let (digest, rest) = rest.split_first_chunk().ok_or(FrameError::Truncated)?;
        let header_bytes = &frame[..frame.len() - rest.len()];
        let (checksum, block) = rest.split_first_chunk().ok_or(FrameError::Truncated)?;
        let header = FrameHeader {
            standalone: flags & FLAG_STANDALONE != 0,
            fresh: flags & FLAG_FRESH != 0,
            generation: u32::try_from(generation).map_err(|_| FrameError::Number)?,
            epoch,
            term,
            seq_first,
            revisions,
            body_bytes,
            digest: Digest(*digest),
        };
        header.check_sizes(block.len(), limits)?;
        Ok(Self { header, header_bytes, checksum: u32::from_le_bytes(*checksum), block })
    }

    /// Decompresses and proves the checksum.
    pub(super) fn open(&self, dictionary: &[u8]) -> Result<Bytes, FrameError> {
        let declared = self.header.body_bytes;
        let mut body = vec![0; declared];
        let found =
            lz4_flex::block::decompress_into_with_dict(self.block, &mut body, dictionary).map_err(FrameError::Block)?;
        if found != declared {
            return Err(FrameError::BodyLength { declared, found });
        }
        if checksum(self.header_bytes, self.block, &body) != self.checksum {
            return Err(FrameError::Checksum);
        }
        Ok(Bytes::from(body))
    }
}

impl FrameHeader {
    fn check_sizes(&self, block_bytes: usize, limits: &FrameLimits) -> Result<(), FrameError> {
        let max = limits.body_bytes_max().min(block_bytes.saturating_mul(LZ4_EXPANSION_MAX));
        if self.body_bytes > max {
            return Err(FrameError::BodyTooLarge { declared: self.body_bytes, max });
        }
        let max = limits.revisions_max.min(self.body_bytes / REVISION_BYTES_MIN);
        if self.revisions > max {
            return Err(FrameError::TooManyRevisions { declared: self.revisions, max });
        }
        let seq_end = self.seq_first.0 + self.revisions as u64;
        if seq_end > i64::MAX.unsigned_abs() {
            return Err(FrameError::Number);
        }
        Ok(())
    }
}

/// etcd's numbers are signed, and so ours never need the last bit: one more can always be added.
fn take_number(bytes: &mut &[u8]) -> Result<u64, FrameError> {
    varint::take(bytes).filter(|number| *number < i64::MAX.unsigned_abs()).ok_or(FrameError::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Change;
    use proptest::prelude::*;

    const LIMITS: FrameLimits = FrameLimits { plain_bytes_max: 10_000, revisions_max: 100 };

    fn put(key: &'static str, value: &'static str) -> Change {
        Change::Put { key: Bytes::from_static(key.as_bytes()), value: Bytes::from_static(value.as_bytes()) }
    }

    fn sample() -> Vec<WholeRevision> {
        let delete = Change::Delete { key: Bytes::from_static(b"/b") };
        vec![
            WholeRevision { revision: Revision(300), changes: vec![put("/a", "the same, the same, the same"), delete] },
            WholeRevision { revision: Revision(301), changes: vec![put("", ""), put("/c", "")] },
        ]
    }

    /// A frame as a forger makes it: consistent but for what `forge` does to its header.
    fn forged(body: &[u8], forge: impl FnOnce(&mut FrameHeader)) -> Bytes {
        let mut header = FrameHeader {
            standalone: true,
            fresh: false,
            generation: 0,
            epoch: Epoch(1),
            term: Term(0),
            seq_first: Seq(1),
            revisions: 1,
            body_bytes: body.len(),
            digest: Digest::default(),
        };
        forge(&mut header);
        seal(&header, body, &[], &mut Vec::new())
    }

    fn refused(frame: &[u8]) -> FrameError {
        decode_standalone(frame, &LIMITS).unwrap_err()
    }

    /// Not that they are encoded so again: LZ4 may find better matches one day.
    fn standalone(epoch: Epoch, term: Term, seq_first: Seq, revisions: &[WholeRevision]) -> Bytes {
        let digests: Vec<Digest> = revisions.iter().map(digest::of_revision).collect();
        encode_standalone(epoch, term, seq_first, revisions, &digests)
    }

    #[test]
    fn frames_that_lie_on_disks_can_still_be_decoded() {
        const KNOWN: &str = "01010003c801050232ed1adea5d2bb16ae75b1f92d6fe1b6a8fc4f01b4fe03d8040201022f611c7468652073616d652c200a00e000022f62020201000001022f6300";
        let digit = |at: usize| u8::from_str_radix(&KNOWN[at..at + 2], 16).unwrap();
        let frame: Vec<u8> = (0..KNOWN.len()).step_by(2).map(digit).collect();
        let decoded = decode_standalone(&frame, &LIMITS).unwrap();
        assert_eq!((decoded.epoch, decoded.term, decoded.seq_first), (Epoch(3), Term(200), Seq(5)));
        assert_eq!(decoded.revisions, sample());
    }

    #[test]
    fn a_frame_is_filled_with_no_more_tiny_revisions_than_a_decoder_accepts() {
        let revision = |n| WholeRevision { revision: Revision(n), changes: vec![put("/a", "")] };
        let backlog: Vec<WholeRevision> = (1..=FrameLimits::REVISIONS_MAX as u64 + 2).map(revision).collect();
        assert_eq!(FrameLimits::fit(&backlog[..3]).len(), 3);
        let limits = FrameLimits::new(32 << 20);
        let all = standalone(Epoch(1), Term(0), Seq(1), &backlog);
        assert!(matches!(decode_standalone(&all, &limits), Err(FrameError::TooManyRevisions { .. })));
        let frame = standalone(Epoch(1), Term(0), Seq(1), FrameLimits::fit(&backlog));
        assert_eq!(decode_standalone(&frame, &limits).unwrap().revisions.len(), FrameLimits::REVISIONS_MAX);
    }

    #[test]
    fn a_frame_without_revisions_is_a_frame() {
        let frame = standalone(Epoch(1), Term(0), Seq(9), &[]);
        let decoded = decode_standalone(&frame, &LIMITS).unwrap();
        assert_eq!((decoded.seq_first, decoded.revisions.len(), decoded.plain_bytes), (Seq(9), 0, 0));
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_noticed() {
        let frame = standalone(Epoch(3), Term(200), Seq(5), &sample());
        for bit in 0..frame.len() * 8 {
            let mut flipped = frame.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_standalone(&flipped, &LIMITS).is_err(), "bit {bit}");
        }
        for len in 0..frame.len() {
            assert!(decode_standalone(&frame[..len], &LIMITS).is_err(), "{len} bytes");
        }
        assert!(decode_standalone(&[&frame[..], &[0]].concat(), &LIMITS).is_err());
    }

    /// With lengths that no memory can hold: taking it would end the test.
    #[test]
    fn forged_sizes_are_refused_before_memory_is_taken_for_them() {
        let forged_body = |bytes| forged(&[0; 100], |header| header.body_bytes = bytes);
        assert!(matches!(refused(&forged_body(usize::MAX / 2)), FrameError::BodyTooLarge { .. }));
        let block = forged_body(100).len() - forged(&[], |_| ()).len();
        assert!(matches!(refused(&forged_body((block + 2) * 255)), FrameError::BodyTooLarge { .. }));

        let many = forged(&[0; 100], |header| header.revisions = usize::MAX / 2);
        assert!(matches!(refused(&many), FrameError::TooManyRevisions { max: 50, .. }));
        let many = forged(&[0; 1_000], |header| header.revisions = 101);
        assert!(matches!(refused(&many), FrameError::TooManyRevisions { max: 100, .. }));

        let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        let changes = [&[0][..], &huge].concat();
        assert!(matches!(refused(&forged(&changes, |_| ())), FrameError::TooManyChanges { max: 0, .. }));
        let key = [&[0, 1, body::TAG_DELETE][..], &huge].concat();
        assert!(matches!(refused(&forged(&key, |_| ())), FrameError::Truncated));
    }

    #[test]
    fn keys_and_values_above_the_limit_are_refused() {
        let value = Bytes::from(vec![7; LIMITS.plain_bytes_max]);
        let revision = |key| WholeRevision {
            revision: Revision(1),
            changes: vec![Change::Put { key: Bytes::from_static(key), value: value.clone() }],
        };
        let frame = |key| standalone(Epoch(1), Term(0), Seq(1), &[revision(key)]);
        assert!(decode_standalone(&frame(b""), &LIMITS).is_ok());
        assert!(matches!(refused(&frame(b"k")), FrameError::PlainTooLarge { max: 10_000 }));
    }

    #[test]
    fn what_no_encoder_makes_is_refused_by_its_name() {
        let body = |bytes: &[u8]| refused(&forged(bytes, |_| ()));
        assert!(matches!(body(&[2, 1, 5, 0]), FrameError::Tag(5)), "a kind of change that is not known yet");
        assert!(matches!(body(&[2, 1, body::TAG_PUT_CACHED, 0, 0]), FrameError::Tag(3)), "a slot without a window");
        assert!(matches!(body(&[2, 2, 0, 1, b'a', 0, 1, b'a']), FrameError::Order), "a key twice");
        assert!(matches!(body(&[2, 2, 0, 1, b'b', 0, 1, b'a']), FrameError::Order), "keys out of order");
        assert!(matches!(body(&[1, 0]), FrameError::Number), "a revision below 0");
        assert!(matches!(body(&[2, 0, 0]), FrameError::Trailing));
        assert!(matches!(body(&[2, 0]), FrameError::Digest));
        let revision_again = forged(&[2, 0, 0, 0], |header| header.revisions = 2);
        assert!(matches!(refused(&revision_again), FrameError::Order), "a revision twice");
        let last_seq = forged(&[2, 0], |header| header.seq_first = Seq(i64::MAX.unsigned_abs() - 1));
        assert!(matches!(refused(&last_seq), FrameError::Digest), "a seq that can still be added to");
        let beyond = forged(&[2, 0], |header| header.seq_first = Seq(i64::MAX.unsigned_abs()));
        assert!(matches!(refused(&beyond), FrameError::Number));
        let windowed = forged(&[2, 0], |header| header.standalone = false);
        assert!(matches!(refused(&windowed), FrameError::NotStandalone));
        let both = forged(&[2, 0], |header| header.fresh = true);
        assert!(matches!(refused(&both), FrameError::Flags(3)));
        assert!(matches!(refused(&[2, 0, 0]), FrameError::Version(2)));
        assert!(matches!(refused(&[1, 4, 0]), FrameError::Flags(4)));
    }

    prop_compose! {
        fn revisions()(
            steps in prop::collection::vec(
                (1u64..1_000_000, prop::collection::btree_map(
                    prop::collection::vec(any::<u8>(), 0..6),
                    prop::option::of(prop::collection::vec(any::<u8>(), 0..50)),
                    0..6,
                )),
                0..20,
            ),
        ) -> Vec<WholeRevision> {
            let mut revision = 0;
            steps.into_iter().map(|(step, changes)| {
                revision += step;
                let changes = changes.into_iter().map(|(key, value)| match value {
                    Some(value) => Change::Put { key: key.into(), value: value.into() },
                    None => Change::Delete { key: key.into() },
                });
                WholeRevision { revision: Revision(revision), changes: changes.collect() }
            }).collect()
        }
    }

    proptest! {
        #[test]
        fn any_revisions_are_decoded_as_they_were_encoded(revisions in revisions(), epoch in 0u64..1 << 40, seq in 0u64..1 << 40) {
            let frame = standalone(Epoch(epoch), Term(epoch / 3), Seq(seq), &revisions);
            let decoded = decode_standalone(&frame, &LIMITS).unwrap();
            prop_assert_eq!((decoded.epoch, decoded.term, decoded.seq_first), (Epoch(epoch), Term(epoch / 3), Seq(seq)));
            prop_assert_eq!(decoded.plain_bytes, revisions.iter().map(WholeRevision::bytes).sum::<usize>());
            prop_assert_eq!(decoded.digests, revisions.iter().map(digest::of_revision).collect::<Vec<_>>());
            prop_assert_eq!(decoded.revisions, revisions);
        }

        #[test]
        fn any_bytes_are_refused(bytes: Vec<u8>, changed in any::<prop::sample::Index>(), to: u8, revisions in revisions()) {
            prop_assert!(decode_standalone(&bytes, &LIMITS).is_err());
            prop_assert!(decode_standalone(&[&[1, 1, 0, 1, 0, 1, 1, 20][..], &bytes].concat(), &LIMITS).is_err());
            let mut frame = standalone(Epoch(1), Term(0), Seq(1), &revisions).to_vec();
            let at = changed.index(frame.len());
            prop_assume!(frame[at] != to);
            frame[at] = to;
            prop_assert!(decode_standalone(&frame, &LIMITS).is_err());
        }

        #[test]
        fn any_body_is_refused_unless_its_digest_is_right(bytes in prop::collection::vec(0u8..6, 0..40), revisions in 0usize..4) {
            prop_assume!(!(bytes.is_empty() && revisions == 0));
            prop_assert!(decode_standalone(&forged(&bytes, |header| header.revisions = revisions), &LIMITS).is_err());
        }
    }
}
