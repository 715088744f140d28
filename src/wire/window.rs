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

    /// True if only a fresh or a standalone frame can be decoded next: after an error, until the origin has heard of it.
    pub fn needs_fresh(&self) -> bool {
        self.window.is_none()
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FRAME: FrameLimits = FrameLimits { plain_bytes_max: 100_000, revisions_max: 100 };
    const LIMITS: WindowLimits = WindowLimits { window_bytes_max: 100_000, frame: FRAME };

    fn put(key: &'static str, value: impl Into<Vec<u8>>) -> Change {
        Change::Put { key: Bytes::from_static(key.as_bytes()), value: Bytes::from(value.into()) }
    }

    fn delete(key: &'static str) -> Change {
        Change::Delete { key: Bytes::from_static(key.as_bytes()) }
    }

    fn ship(encoder: &mut Encoder, revision: u64, changes: Vec<Change>) -> (Bytes, Vec<WholeRevision>) {
        let revisions = vec![WholeRevision { revision: Revision(revision), changes }];
        let digests = [digest::of_revision(&revisions[0])];
        (encoder.encode(Epoch(1), Term(2), Seq(revision), &revisions, &digests), revisions)
    }

    /// A frame of generation 1 around any body.
    fn forged(body: &[u8], revisions: usize) -> Bytes {
        let header = FrameHeader {
            standalone: false,
            fresh: false,
            generation: 1,
            epoch: Epoch(1),
            term: Term(0),
            seq_first: Seq(1),
            revisions,
            body_bytes: body.len(),
            digest: Digest::default(),
        };
        frame::seal(&header, body, &[], &mut Vec::new())
    }

    /// About 300 bytes that differ in a few places.
    fn value(version: u32) -> String {
        format!(
            "{{\"version\":{version},\"text\":\"{}\",\"again\":{version},\"checksum\":\"0123456789abcdef\"}}",
            "lorem ipsum dolor ".repeat(14)
        )
    }

    #[test]
    fn a_change_of_a_known_key_is_much_smaller_than_its_value() {
        let (mut encoder, mut decoder) = (Encoder::new(LIMITS, 7), Decoder::new(LIMITS));
        let mut lens = Vec::new();
        for version in 1..4 {
            let (frame, revisions) =
                ship(&mut encoder, version.into(), vec![put("/registry/leases/a", value(version))]);
            let decoded = decoder.decode(&frame).unwrap();
            assert_eq!(decoded.revisions, revisions);
            assert_eq!((decoded.epoch, decoded.term, decoded.seq_first), (Epoch(1), Term(2), Seq(version.into())));
            assert_eq!(decoded.plain_bytes, revisions[0].bytes());
            lens.push(frame.len());
        }
        assert!(lens[1] < 60 && lens[2] < 60, "{lens:?}");
    }

    #[test]
    fn what_the_stream_said_of_another_key_is_not_said_again() {
        let (mut encoder, mut decoder) = (Encoder::new(LIMITS, 1), Decoder::new(LIMITS));
        let mut revision = 0;
        let mut ship = |changes| {
            revision += 1;
            let (frame, revisions) = ship(&mut encoder, revision, changes);
            assert_eq!(decoder.decode(&frame).unwrap().revisions, revisions);
            frame.len()
        };
        assert!(ship(vec![put("/a", checksums())]) > 400);
        for (key, bytes_between) in [("/b", 0), ("/c", 20_000), ("/d", 20_000), ("/e", 31_000)] {
            ship(vec![put("/between", vec![0; bytes_between])]);
            let len = ship(vec![put(key, checksums())]);
            assert!(len < 100, "{len} bytes after {bytes_between}");
        }
        ship(vec![put("/between", vec![0; 90_000])]);
        assert!(ship(vec![put("/f", checksums())]) > 400, "the dictionary is bounded");
    }

    /// 400 bytes that LZ4 alone cannot shorten.
    fn checksums() -> String {
        (1..=25u64).map(|n| format!("{:016x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
    }

    #[test]
    fn after_an_error_every_frame_is_refused_until_a_fresh_one_comes() {
        let (mut encoder, mut decoder) = (Encoder::new(LIMITS, 1), Decoder::new(LIMITS));
        let (first, _) = ship(&mut encoder, 1, vec![put("a", value(1))]);
        let (second, _) = ship(&mut encoder, 2, vec![put("a", value(2))]);
        let (third, _) = ship(&mut encoder, 3, vec![put("a", value(3))]);
        decoder.decode(&first).unwrap();
        assert!(matches!(decoder.decode(&second[..second.len() - 1]), Err(DecodeError::Frame(_))));
        assert!(decoder.needs_fresh());
        for frame in [&second, &third] {
            assert!(matches!(decoder.decode(frame), Err(DecodeError::NotFresh)));
        }
        encoder.restart();
        let (fourth, revisions) = ship(&mut encoder, 4, vec![put("a", value(4))]);
        assert_eq!(decoder.decode(&fourth).unwrap().revisions, revisions);
        assert!(!decoder.needs_fresh());
        assert!(matches!(decoder.decode(&third), Err(DecodeError::Generation { expected: 2, found: 1 })));
    }

    #[test]
    fn a_frame_that_was_lost_is_noticed_by_the_next_change_of_its_key() {
        let lost: [fn() -> Change; 2] = [|| put("a", value(20)), || delete("a")];
        for lost in lost {
            let (mut encoder, mut decoder) = (Encoder::new(LIMITS, 1), Decoder::new(LIMITS));
            decoder.decode(&ship(&mut encoder, 1, vec![put("a", value(1)), put("b", "x")]).0).unwrap();
            ship(&mut encoder, 2, vec![lost()]);
            let (frame, _) = ship(&mut encoder, 3, vec![put("a", value(21))]);
            assert!(decoder.decode(&frame).is_err());
        }
    }

    #[test]
    fn a_standalone_frame_needs_no_window_and_changes_none() {
        let (mut encoder, mut decoder) = (Encoder::new(LIMITS, 1), Decoder::new(LIMITS));
        let page = [WholeRevision { revision: Revision(9), changes: vec![put("a", value(9))] }];
        let standalone = frame::encode_standalone(Epoch(1), Term(2), Seq(0), &page);
        assert_eq!(decoder.decode(&standalone).unwrap().revisions, page);
        assert!(decoder.needs_fresh());
        decoder.decode(&ship(&mut encoder, 1, vec![put("a", value(1))]).0).unwrap();
        decoder.decode(&standalone).unwrap();
        let (frame, revisions) = ship(&mut encoder, 2, vec![put("a", value(2))]);
        assert_eq!(decoder.decode(&frame).unwrap().revisions, revisions);
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_of_a_frame_is_noticed() {
        let mut encoder = Encoder::new(LIMITS, 1);
        let (first, _) = ship(&mut encoder, 1, vec![put("a", value(1)), put("b", value(2)), put("c", "x")]);
        let changes = vec![put("a", value(3)), delete("b"), put("c", "yy"), put("d", "new"), delete("e")];
        let (second, _) = ship(&mut encoder, 2, changes);
        let decode_second = |bytes: &[u8]| {
            let mut decoder = Decoder::new(LIMITS);
            decoder.decode(&first).unwrap();
            let outcome = decoder.decode(bytes);
            assert_eq!(decoder.needs_fresh(), outcome.is_err());
            outcome
        };
        decode_second(&second).unwrap();
        for bit in 0..second.len() * 8 {
            let mut flipped = second.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_second(&flipped).is_err(), "bit {bit}");
        }
        for len in 0..second.len() {
            assert!(decode_second(&second[..len]).is_err(), "{len} bytes");
        }
    }

    /// A few bytes say "the last value again", over and over: what comes out is bounded all the same.
    #[test]
    fn deltas_cannot_make_more_than_the_limit() {
        let mut body = Vec::new();
        varint::put_signed(&mut body, 1);
        varint::put_len(&mut body, 100);
        for slot in 0..100 {
            body.push(body::TAG_PUT_CHANGED);
            varint::put(&mut body, slot);
            varint::put_signed(&mut body, 0);
            varint::put_len(&mut body, 10_000);
        }
        let mut window = Window::new(1, 10_000_000);
        for key in 100..200u8 {
            window.cache.put(&[key], &[0; 10_000]);
        }
        let frame = forged(&body, 1);
        let mut decoder = Decoder { window: Some(window), ..Decoder::new(LIMITS) };
        let refused = decoder.decode(&frame).unwrap_err();
        assert!(matches!(refused, DecodeError::Delta(DeltaError::TooLarge { .. })), "{refused}");
    }

    #[test]
    fn the_window_holds_on_to_no_buffer_of_a_caller() {
        let (mut encoder, mut decoder) = (Encoder::new(LIMITS, 1), Decoder::new(LIMITS));
        let key = Bytes::from(b"/a/key".to_vec());
        for version in 1..3 {
            let value = Bytes::from(value(version));
            let changes = vec![Change::Put { key: key.clone(), value: value.clone() }];
            let (frame, revisions) = ship(&mut encoder, version.into(), changes);
            decoder.decode(&frame).unwrap();
            drop(revisions);
            assert!(value.is_unique() && frame.is_unique());
        }
        assert!(key.is_unique());
    }

    prop_compose! {
        /// A change of one of a few keys: `None` deletes; a value is made of a few kinds of pieces, so that it resembles the ones before.
        fn step()(
            key in 0u8..10,
            pieces in prop::option::weighted(0.8, prop::collection::vec((0u8..4, 0usize..30), 0..12)),
        ) -> (u8, Option<Vec<u8>>) {
            (key, pieces.map(|pieces| pieces.iter().flat_map(|(byte, len)| vec![*byte; *len]).collect()))
        }
    }

    fn whole(revision: u64, steps: Vec<(u8, Option<Vec<u8>>)>) -> WholeRevision {
        let steps: std::collections::BTreeMap<u8, Option<Vec<u8>>> = steps.into_iter().collect();
        let changes = steps.into_iter().map(|(key, value)| {
            let key = Bytes::from(vec![b'k'; usize::from(key)]);
            match value {
                Some(value) => Change::Put { key, value: value.into() },
                None => Change::Delete { key },
            }
        });
        WholeRevision { revision: Revision(revision), changes: changes.collect() }
    }

    proptest! {
        #[test]
        fn both_ends_stay_in_step_whatever_the_window_evicts(
            frames in prop::collection::vec(
                (prop::collection::vec(prop::collection::vec(step(), 0..5), 0..4), prop::bool::weighted(0.05)), 0..30),
            window_bytes_max in 0usize..3_000,
        ) {
            let limits = WindowLimits { window_bytes_max, frame: FRAME };
            let (mut encoder, mut decoder) = (Encoder::new(limits, 1), Decoder::new(limits));
            let mut revision = 40;
            for (steps, restart) in frames {
                if restart {
                    encoder.restart();
                }
                let revisions: Vec<WholeRevision> = steps.into_iter().map(|steps| { revision += 3; whole(revision, steps) }).collect();
                let digests: Vec<Digest> = revisions.iter().map(digest::of_revision).collect();
                let frame = encoder.encode(Epoch(1), Term(0), Seq(revision), &revisions, &digests);
                let decoded = decoder.decode(&frame).unwrap();
                prop_assert_eq!(decoded.revisions, revisions);
                prop_assert_eq!(decoded.digests, digests);
                let there = decoder.window.as_ref().unwrap();
                prop_assert_eq!(encoder.window.cache.entries_newest_first(), there.cache.entries_newest_first());
                prop_assert_eq!(encoder.window.dictionary(DICTIONARY_BYTES), there.dictionary(DICTIONARY_BYTES));
            }
        }

        #[test]
        fn any_body_in_a_window_is_refused_without_a_panic(
            body in prop::collection::vec(prop_oneof![0u8..8, any::<u8>()], 1..60), revisions in 1usize..4,
        ) {
            let mut window = Window::new(1, 10_000);
            for key in 0..4 {
                window.cache.put(&[key], &[key; 20]);
            }
            let frame = forged(&body, revisions);
            let mut decoder = Decoder { window: Some(window), ..Decoder::new(LIMITS) };
            prop_assert!(decoder.decode(&frame).is_err());
            prop_assert!(decoder.needs_fresh());
        }
    }
}
