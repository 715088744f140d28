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
    /// Reads the header alone and checks its sizes.
    pub fn read(frame: &[u8], limits: &FrameLimits) -> Result<Self, FrameError> {
        Ok(Sealed::parse(frame, limits)?.header)
    }

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

/// Encodes revisions so that they can be decoded without anything before them. They are in order, and at most
/// [`FrameLimits::REVISIONS_MAX`]. No delta and no dictionary: this is the body for disks and pages, where cheap counts.
pub fn encode_standalone<R: Borrow<WholeRevision>>(epoch: Epoch, term: Term, seq_first: Seq, revisions: &[R]) -> Bytes {
    let plain_bytes: usize = revisions.iter().map(|r| r.borrow().bytes()).sum();
    let mut body = Vec::with_capacity(plain_bytes + plain_bytes / 8 + 64);
    body::write_revisions(&mut body, revisions, Revision(0), body::write_change);
    let digests: Vec<Digest> = revisions.iter().map(|r| digest::of_revision(r.borrow())).collect();
    let header = FrameHeader {
        standalone: true,
        fresh: false,
        generation: 0,
        epoch,
        term,
        seq_first,
        revisions: revisions.len(),
        body_bytes: body.len(),
        digest: digest::of_frame(&digests),
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
