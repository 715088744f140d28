//! Job: what both ends of a stream remember, so that a frame says only what is new: the last value of each key, and the last plain bytes as
//! LZ4's dictionary.
//! Input: whole revisions at the origin; frames at the replica. Output: frames; whole revisions with their digests.
//! Pure: no clock, no I/O.
//! Always true: a frame is decoded to what was encoded, or refused; after a refusal every frame is refused until a fresh one comes, so that
//! two windows that went apart never meet again unnoticed.

use crate::model::{Change, Digest, Epoch, Revision, Seq, Term, WholeRevision};
use crate::wire::body::BodyReader;
use crate::wire::cache::Cache;
use crate::wire::delta::{self, DeltaEncoder, DeltaError};
use crate::wire::digest;
use crate::wire::frame::{self, Decoded, FrameError, FrameHeader, FrameLimits, Sealed};
use crate::wire::{body, varint};
use bytes::{Bytes, BytesMut};
use std::borrow::Borrow;
use thiserror::Error;

/// How much of the stream's last bodies a decoder keeps for LZ4, which cannot look back further. Part of the protocol.
const DICTIONARY_BYTES: usize = 64 * 1024;
/// How much of it this encoder uses. It is hashed anew for each frame, and LZ4's table is too small for more: measured, 64 KiB take twice the
/// time and find less.
const DICTIONARY_BYTES_USED: usize = 32 * 1024;
/// Decoded values are packed into buffers of this size: what a single value that is kept can pin.
const ARENA_BYTES: usize = 64 * 1024;
/// By how much a value may be longer than its base before it gets a buffer of its own.
const ARENA_SPARE_BYTES: usize = 256;
/// Scratch memory above this is given back after a frame that needed it.
const SCRATCH_BYTES_MAX: usize = 4 << 20;

/// Bounds of one stream; `window_bytes_max` must be the same at both ends (hello fixes it).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowLimits {
    pub window_bytes_max: usize,
    pub frame: FrameLimits,
}

/// Why a frame of a stream is refused. The answer to each is a Reset.
#[derive(Debug, Error)]
pub enum DecodeError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the frame is of generation {found} of the window, and here it is {expected}")]
    Generation { expected: u32, found: u32 },
    #[error("the frame needs a window, and there is none until a fresh one comes")]
    NotFresh,
    #[error("the frame names a key that the window does not hold")]
    Slot,
    #[error("a value cannot be rebuilt")]
    Delta(#[from] DeltaError),
}

/// The part that both ends keep alike.
struct Window {
    generation: u32,
    cache: Cache,
    history: Vec<u8>,
    revision_last: Revision,
}

impl Window {
    fn new(generation: u32, window_bytes_max: usize) -> Self {
        Self { generation, cache: Cache::new(window_bytes_max), history: Vec::new(), revision_last: Revision(0) }
    }

    /// The last `bytes_max` of the bodies so far.
    fn dictionary(&self, bytes_max: usize) -> &[u8] {
        &self.history[self.history.len().saturating_sub(bytes_max)..]
    }

    /// Keeps up to twice the dictionary, so that moving its bytes is seldom needed.
    fn remember(&mut self, body: &[u8]) {
        let new = &body[body.len().saturating_sub(DICTIONARY_BYTES)..];
        if self.history.len() + new.len() > 2 * DICTIONARY_BYTES {
            self.history.drain(..self.history.len() - DICTIONARY_BYTES);
        }
        self.history.extend_from_slice(new);
    }
}

/// The origin's end.
pub struct Encoder {
    limits: WindowLimits,
    window: Window,
    /// True until the first frame of this generation is made.
    fresh: bool,
    delta: DeltaEncoder,
    body: Vec<u8>,
    scratch: Vec<u8>,
}

impl Encoder {
    pub fn new(limits: WindowLimits, generation: u32) -> Self {
        Self {
            limits,
            window: Window::new(generation, limits.window_bytes_max),
            fresh: true,
            delta: DeltaEncoder::default(),
            body: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Starts afresh, in the next generation: what a Reset asks for.
    pub fn restart(&mut self) {
        self.window = Window::new(self.window.generation.wrapping_add(1), self.limits.window_bytes_max);
        self.fresh = true;
    }

    pub fn generation(&self) -> u32 {
        self.window.generation
    }

    /// The next frame of the stream. `digests` are those of the revisions, which are in order and at most
    /// [`FrameLimits::revisions_max`]. Each frame made must be sent, in this order.
    pub fn encode<R: Borrow<WholeRevision>>(
        &mut self,
        epoch: Epoch,
        term: Term,
        seq_first: Seq,
        revisions: &[R],
        digests: &[Digest],
    ) -> Bytes {
        debug_assert_eq!(revisions.len(), digests.len());
        let Self { window, delta, body, .. } = self;
        body.clear();
        body::write_revisions(body, revisions, window.revision_last, |body, change| {
            write_change(body, change, &mut window.cache, delta);
        });
        let header = FrameHeader {
            standalone: false,
            fresh: self.fresh,
            generation: window.generation,
            epoch,
            term,
            seq_first,
            revisions: revisions.len(),
            body_bytes: body.len(),
            digest: digest::of_frame(digests),
        };
        let frame = frame::seal(&header, body, window.dictionary(DICTIONARY_BYTES_USED), &mut self.scratch);
        window.remember(body);
        if let Some(last) = revisions.last() {
            window.revision_last = last.borrow().revision;
        }
        self.fresh = false;
        for scratch in [&mut self.body, &mut self.scratch] {
            if scratch.capacity() > SCRATCH_BYTES_MAX {
                *scratch = Vec::new();
            }
        }
        frame
    }
}

fn write_change(body: &mut Vec<u8>, change: &Change, cache: &mut Cache, delta: &mut DeltaEncoder) {
    let slot = cache.slot_of(change.key());
    let Some((slot, (_, base))) = slot.and_then(|slot| Some((slot, cache.get(slot)?))) else {
        body::write_change(body, change);
        if let Change::Put { key, value } = change {
            cache.put(key, value);
        }
        return;
    };
    match change {
        Change::Delete { .. } => {
            body.push(body::TAG_DELETE_CACHED);
            varint::put(body, u64::from(slot));
            cache.remove(slot);
        }
        Change::Put { key, value } => {
            let tag_at = body.len();
            body.push(body::TAG_PUT_CHANGED);
            varint::put(body, u64::from(slot));
            if !delta.encode(base, value, body) {
                body[tag_at] = body::TAG_PUT_CACHED;
                body::write_bytes(body, value);
            }
            cache.put(key, value);
        }
    }
}

/// The replica's end.
pub struct Decoder {
    limits: WindowLimits,
    /// `None` until a fresh frame comes, and again after an error.
    window: Option<Window>,
    arena: BytesMut,
}

impl Decoder {
    pub fn new(limits: WindowLimits) -> Self {
        Self { limits, window: None, arena: BytesMut::new() }
    }

    /// Decodes the next frame of the stream. A standalone frame neither needs nor changes the window; after any error there is none.
    pub fn decode(&mut self, frame: &[u8]) -> Result<Decoded, DecodeError> {
        let window = self.window.take();
        let sealed = Sealed::parse(frame, &self.limits.frame)?;
        let header = &sealed.header;
        if header.standalone {
            let decoded = frame::decode_standalone(frame, &self.limits.frame)?;
            self.window = window;
            return Ok(decoded);
        }
        let mut window = match window {
            _ if header.fresh => Window::new(header.generation, self.limits.window_bytes_max),
            None => return Err(DecodeError::NotFresh),
            Some(window) if window.generation != header.generation => {
                return Err(DecodeError::Generation { expected: window.generation, found: header.generation });
            }
            Some(window) => window,
        };
        let body = sealed.open(window.dictionary(DICTIONARY_BYTES))?;
        window.remember(&body);
        let (cache, arena) = (&mut window.cache, &mut self.arena);
        let decoded = body::read_revisions(body, header, &self.limits.frame, window.revision_last, |tag, reader| {
            read_change(tag, reader, cache, arena)
        })?;
        if let Some(last) = decoded.revisions.last() {
            window.revision_last = last.revision;
        }
        self.window = Some(window);
        Ok(decoded)
    }
}

fn read_change(
    tag: u8,
    reader: &mut BodyReader,
    cache: &mut Cache,
    arena: &mut BytesMut,
) -> Result<Change, DecodeError> {
    match tag {
        body::TAG_DELETE_CACHED => {
            let (slot, key) = take_slot(reader, cache)?;
            cache.remove(slot);
            return Ok(Change::Delete { key });
        }
        body::TAG_PUT_CACHED | body::TAG_PUT_CHANGED => {
            let (slot, key) = take_slot(reader, cache)?;
            let value = if tag == body::TAG_PUT_CACHED {
                reader.take_bytes()?
            } else {
                rebuild(reader, cache.get(slot).ok_or(DecodeError::Slot)?.1, arena)?
            };
            cache.put(&key, &value);
            return Ok(Change::Put { key, value });
        }
        _ => (),
    }
    let change = body::read_change(tag, reader)?;
    if let Change::Put { key, value } = &change {
        cache.put(key, value);
    }
    Ok(change)
}

fn take_slot(reader: &mut BodyReader, cache: &Cache) -> Result<(u32, Bytes), DecodeError> {
    let slot = u32::try_from(reader.take_len()?).map_err(|_| DecodeError::Slot)?;
    let (key, _) = cache.get(slot).ok_or(DecodeError::Slot)?;
    reader.count(key.len())?;
    Ok((slot, key.clone()))
}

/// The value that a delta makes of `base`.
fn rebuild(reader: &mut BodyReader, base: &[u8], arena: &mut BytesMut) -> Result<Bytes, DecodeError> {
    let len_max = reader.plain_bytes_left();
    if arena.capacity() < base.len() + ARENA_SPARE_BYTES {
        *arena = BytesMut::with_capacity(ARENA_BYTES.max(base.len() + ARENA_SPARE_BYTES));
    }
    let len = reader.take_from(|rest| delta::decode(base, rest, len_max, arena))?;
    reader.count(len)?;
    Ok(arena.split().freeze())
}

#[cfg(test)]
mod tests;
