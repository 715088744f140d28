//! Job: tests of both ends of a stream: what is encoded is decoded, and nothing else is believed.
//! Input: revisions, and frames bent bit by bit. Output: passes or fails.
//! Pure: no clock, no I/O.
//! Always true: encoder and decoder advance alike.

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
        let (frame, revisions) = ship(&mut encoder, version.into(), vec![put("/registry/leases/a", value(version))]);
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
    assert!(decoder.window.is_none());
    for frame in [&second, &third] {
        assert!(matches!(decoder.decode(frame), Err(DecodeError::NotFresh)));
    }
    encoder.restart();
    let (fourth, revisions) = ship(&mut encoder, 4, vec![put("a", value(4))]);
    assert_eq!(decoder.decode(&fourth).unwrap().revisions, revisions);
    assert!(decoder.window.is_some());
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
    let standalone =
        frame::encode_standalone(Epoch(1), Term(2), Seq(0), &page, &page.each_ref().map(digest::of_revision));
    assert_eq!(decoder.decode(&standalone).unwrap().revisions, page);
    assert!(decoder.window.is_none());
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
        assert_eq!(decoder.window.is_none(), outcome.is_err());
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
        prop_assert!(decoder.window.is_none());
    }
}
