//! Job: frames from anywhere, standalone and in a stream: as they come, and as our own with bytes changed.
//! Input: bytes; the first one chooses. Output: a crash, where there is a fault.
//! Always true: what is accepted holds no more than the limits say, and is what it was encoded from.

#![no_main]

use bytes::Bytes;
use etcd_ferry::model::{Change, Epoch, Revision, Seq, Term, WholeRevision};
use etcd_ferry::wire::digest;
use etcd_ferry::wire::frame::{FrameLimits, decode_standalone, encode_standalone};
use etcd_ferry::wire::window::{Decoder, Encoder, WindowLimits};
use libfuzzer_sys::fuzz_target;

const PLAIN_BYTES_MAX: usize = 1 << 16;

fn limits() -> WindowLimits {
    WindowLimits {
        window_bytes_max: 1 << 14,
        frame: FrameLimits { plain_bytes_max: PLAIN_BYTES_MAX, revisions_max: 256 },
    }
}

/// Revisions of a few small changes, by the bytes.
fn revisions(mut data: &[u8]) -> Vec<WholeRevision> {
    let mut revisions = Vec::new();
    while let [head, rest @ ..] = data {
        let take = usize::from(head & 15).min(rest.len());
        let (bytes, rest) = rest.split_at(take);
        let key = Bytes::from(vec![b'k', head & 7]);
        let change = if head & 128 == 0 {
            Change::Put { key, value: Bytes::copy_from_slice(bytes).repeat(1 + usize::from(head >> 4)).into() }
        } else {
            Change::Delete { key }
        };
        revisions.push(WholeRevision { revision: Revision(revisions.len() as u64 + 1), changes: vec![change] });
        data = rest;
    }
    revisions.truncate(200);
    revisions
}

fn change(frame: &Bytes, patches: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for patch in patches.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([patch[0], patch[1]])) % frame.len().max(1);
        if let Some(byte) = frame.get_mut(at) {
            *byte ^= patch[2];
        }
    }
    frame
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    match choice % 3 {
        0 => {
            if let Ok(decoded) = decode_standalone(data, &limits().frame) {
                assert!(decoded.plain_bytes <= PLAIN_BYTES_MAX);
            }
            let _ = Decoder::new(limits()).decode(data);
        }
        1 => {
            let whole = revisions(data);
            let digests: Vec<_> = whole.iter().map(digest::of_revision).collect();
            let frame = encode_standalone(Epoch(1), Term(2), Seq(3), &whole, &digests);
            let decoded = decode_standalone(&frame, &FrameLimits::new(1 << 20)).expect("our own frame");
            assert_eq!((decoded.revisions, decoded.digests), (whole, digests));
        }
        _ => {
            let (patches, data) = data.split_at(data.len().min(12));
            let whole = revisions(data);
            let (mut encoder, mut decoder) = (Encoder::new(limits(), 1), Decoder::new(limits()));
            let mut seq = 1;
            for (at, part) in whole.chunks(7).enumerate() {
                let digests: Vec<_> = part.iter().map(digest::of_revision).collect();
                let frame = encoder.encode(Epoch(1), Term(0), Seq(seq), part, &digests);
                seq += part.len() as u64;
                let bent = if at == 1 { change(&frame, patches) } else { frame.to_vec() };
                match decoder.decode(&bent) {
                    // Its digests are its own: a frame that passes is what was encoded, or says to be another one.
                    Ok(decoded) => assert!(decoded.plain_bytes <= PLAIN_BYTES_MAX),
                    Err(_) => return,
                }
            }
        }
    }
});
