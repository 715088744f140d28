//! Job: the body of a frame: whole revisions as plain bytes, before LZ4 and after it.
//! Input: whole revisions; or the bytes of a body. Output: the bytes of a body; or whole revisions with their digests.
//! Pure: no clock, no I/O.
//! Always true: counts and lengths are checked against the bytes that are there before memory is taken for them; what is read has its
//! revisions and keys in order, each once, and the digest that the header declares.
//!
//! Fixed, as part of the frame (frame.rs; `v`: varint, `s`: signed varint):
//!
//! ```text
//! body   = for each revision:  s(its number - that of the one before), v(count of changes), the changes in key order
//! change = tag, then
//!   0 delete         v(key length), key
//!   1 put            v(key length), key, v(value length), value
//!   2 delete cached  v(slot)                                     2 to 4 only in a window: the slot stands for the key
//!   3 put cached     v(slot), v(value length), value
//!   4 put changed    v(slot), delta (delta.rs) against the value in the slot
//! ```
//!
//! "The one before" the first revision is the last one of the window's frame before, or 0. Tags from 5 on are refused.

use crate::model::{Change, Revision, WholeRevision};
use crate::wire::frame::{Decoded, FrameError, FrameHeader, FrameLimits};
use crate::wire::{digest, varint};
use bytes::Bytes;
use std::borrow::Borrow;

pub const TAG_DELETE: u8 = 0;
pub const TAG_PUT: u8 = 1;
pub const TAG_DELETE_CACHED: u8 = 2;
pub const TAG_PUT_CACHED: u8 = 3;
pub const TAG_PUT_CHANGED: u8 = 4;

/// A change in a body has at least so many bytes.
const CHANGE_BYTES_MIN: usize = 2;

/// Writes the body; `write_change` writes each change.
pub fn write_revisions<R: Borrow<WholeRevision>>(
    body: &mut Vec<u8>,
    revisions: &[R],
    before: Revision,
    mut write_change: impl FnMut(&mut Vec<u8>, &Change),
) {
    let mut before = before.0;
    for revision in revisions {
        let revision: &WholeRevision = revision.borrow();
        varint::put_signed(body, revision.revision.0.wrapping_sub(before).cast_signed());
        varint::put_len(body, revision.changes.len());
        for change in &revision.changes {
            write_change(body, change);
        }
        before = revision.revision.0;
    }
}

/// A change that says everything itself.
pub fn write_change(body: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Delete { key } => {
            body.push(TAG_DELETE);
            write_bytes(body, key);
        }
        Change::Put { key, value } => {
            body.push(TAG_PUT);
            write_bytes(body, key);
            write_bytes(body, value);
        }
    }
}

pub fn write_bytes(body: &mut Vec<u8>, bytes: &[u8]) {
    varint::put_len(body, bytes.len());
    body.extend_from_slice(bytes);
}

/// Reads the body; `read_change` reads each change after its tag. Recomputes the digests.
pub fn read_revisions<E: From<FrameError>>(
    body: Bytes,
    header: &FrameHeader,
    limits: &FrameLimits,
    before: Revision,
    mut read_change: impl FnMut(u8, &mut BodyReader) -> Result<Change, E>,
) -> Result<Decoded, E> {
    let mut reader =
        BodyReader { body, at: 0, plain_bytes_left: limits.plain_bytes_max, plain_bytes_max: limits.plain_bytes_max };
    let mut revisions: Vec<WholeRevision> = Vec::with_capacity(header.revisions);
    let mut digests = Vec::with_capacity(header.revisions);
    let mut before = before;
    for _ in 0..header.revisions {
        let revision = reader.take_revision(before)?;
        if revisions.last().is_some_and(|last| last.revision >= revision) {
            return Err(FrameError::Order.into());
        }
        let changes = read_changes(&mut reader, &mut read_change)?;
        let whole = WholeRevision { revision, changes };
        digests.push(digest::of_revision(&whole));
        revisions.push(whole);
        before = revision;
    }
    if reader.at != reader.body.len() {
        return Err(FrameError::Trailing.into());
    }
    if digest::of_frame(&digests) != header.digest {
        return Err(FrameError::Digest.into());
    }
    Ok(Decoded {
        epoch: header.epoch,
        term: header.term,
        seq_first: header.seq_first,
        revisions,
        digests,
        plain_bytes: limits.plain_bytes_max - reader.plain_bytes_left,
    })
}

fn read_changes<E: From<FrameError>>(
    reader: &mut BodyReader,
    read_change: &mut impl FnMut(u8, &mut BodyReader) -> Result<Change, E>,
) -> Result<Vec<Change>, E> {
    let declared = reader.take_len()?;
    let max = (reader.body.len() - reader.at) / CHANGE_BYTES_MIN;
    if declared > max {
        return Err(FrameError::TooManyChanges { declared, max }.into());
    }
    // A change in memory is much larger than the smallest one in a frame: only what is really there may make the list grow far.
    let mut changes: Vec<Change> = Vec::with_capacity(declared.min(1_024));
    for _ in 0..declared {
        let tag = reader.take_tag()?;
        let change = read_change(tag, reader)?;
        if changes.last().is_some_and(|last| last.key() >= change.key()) {
            return Err(FrameError::Order.into());
        }
        changes.push(change);
    }
    Ok(changes)
}

/// A change that says everything itself.
pub fn read_change(tag: u8, reader: &mut BodyReader) -> Result<Change, FrameError> {
    match tag {
        TAG_DELETE => Ok(Change::Delete { key: reader.take_bytes()? }),
        TAG_PUT => Ok(Change::Put { key: reader.take_bytes()?, value: reader.take_bytes()? }),
        _ => Err(FrameError::Tag(tag)),
    }
}

/// Walks over a body and keeps count of the keys and values that came out.
pub struct BodyReader {
    body: Bytes,
    at: usize,
    plain_bytes_left: usize,
    plain_bytes_max: usize,
}

impl BodyReader {
    fn take_tag(&mut self) -> Result<u8, FrameError> {
        let tag = *self.body.get(self.at).ok_or(FrameError::Truncated)?;
        self.at += 1;
        Ok(tag)
    }

    fn take_revision(&mut self, before: Revision) -> Result<Revision, FrameError> {
        let difference = self.take_from(|rest| varint::take_signed(rest).ok_or(FrameError::Number))?;
        let revision = before.0.wrapping_add_signed(difference);
        if revision > i64::MAX.unsigned_abs() {
            return Err(FrameError::Number);
        }
        Ok(Revision(revision))
    }

    pub fn take_len(&mut self) -> Result<usize, FrameError> {
        self.take_from(|rest| varint::take_len(rest).ok_or(FrameError::Number))
    }

    /// A key or a value: a slice of the body.
    pub fn take_bytes(&mut self) -> Result<Bytes, FrameError> {
        let len = self.take_len()?;
        let end = self.at.checked_add(len).filter(|end| *end <= self.body.len()).ok_or(FrameError::Truncated)?;
        self.count(len)?;
        let bytes = self.body.slice(self.at..end);
        self.at = end;
        Ok(bytes)
    }

    /// Lets `take` take something off the front of what is left.
    pub fn take_from<T, E>(&mut self, take: impl FnOnce(&mut &[u8]) -> Result<T, E>) -> Result<T, E> {
        let mut rest = &self.body[self.at..];
        let taken = take(&mut rest)?;
        self.at = self.body.len() - rest.len();
        Ok(taken)
    }

    /// Keys and values that may still come out of this frame, in bytes.
    pub fn plain_bytes_left(&self) -> usize {
        self.plain_bytes_left
    }

    /// Counts a key or value that came out other than by `take_bytes`.
    pub fn count(&mut self, len: usize) -> Result<(), FrameError> {
        self.plain_bytes_left =
            self.plain_bytes_left.checked_sub(len).ok_or(FrameError::PlainTooLarge { max: self.plain_bytes_max })?;
        Ok(())
    }
}
