//! Job: what two sidecars say to each other, before and after the hello: any bytes as any message, as they come and with the right checksum.
//! Input: bytes; the first one chooses. Output: a crash, where there is a fault.
//! Always true: a message that is accepted had its checksum and is written as it was read; a hello's ranges and a reply's position that are
//! accepted are such as this side makes.

#![no_main]

use bytes::Bytes;
use etcd_ferry::model::{FERRY_PREFIX, KeyRange, LINKS_PREFIX, Position, Ranges};
use etcd_ferry::wire::codec::unseal;
use etcd_ferry::wire::replicate::{HelloReply, HelloRequest, Range, Receipt, Shipment};
use libfuzzer_sys::fuzz_target;
use prost::Message;

const CHECKSUM_BYTES: usize = 4;
/// In the first byte: the checksum is put right.
const SEAL: u8 = 4;

/// Few inputs would get past the checksum by themselves.
fn sealed(message: &[u8]) -> Bytes {
    [message, &crc32c::crc32c(message).to_le_bytes()[..]].concat().into()
}

fn accepted<M: Message + Default + PartialEq>(bytes: &Bytes) -> Option<M> {
    let message: M = unseal(bytes.clone()).ok()?;
    assert_eq!(sealed(&bytes[..bytes.len() - CHECKSUM_BYTES]), *bytes, "a wrong checksum");
    let written = message.encode_to_vec();
    // A number that is none differs from itself.
    assert!(unseal::<M>(sealed(&written)).is_ok_and(|read| read == message || read.encode_to_vec() == written));
    Some(message)
}

/// As a replica takes them (src/replica/receive.rs).
fn take_ranges(hello: HelloRequest) {
    let piece = |range: Range| KeyRange { from: range.from, to: range.to };
    let pieces: Vec<KeyRange> = hello.ranges.into_iter().map(piece).collect();
    let Some(ranges) = Ranges::from_pieces(pieces.clone()) else { return };
    assert_eq!(ranges.pieces(), pieces);
    assert!(pieces.iter().all(|piece| ranges.contains(&piece.from)));
    assert!(![FERRY_PREFIX, LINKS_PREFIX].iter().any(|own| ranges.contains(own)));
    assert!(Ranges::new(&[], &[]).covers(&ranges), "more than there is to carry");
}

/// As an origin takes it (src/origin/session.rs).
fn take_position(reply: HelloReply) {
    if let Ok(position) = Position::from_json(&reply.position) {
        assert_eq!(Position::from_json(&position.to_json()).expect("our own position"), position);
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let bytes = if choice & SEAL == 0 { Bytes::copy_from_slice(data) } else { sealed(data) };
    match choice % 4 {
        0 => accepted(&bytes).into_iter().for_each(take_ranges),
        1 => accepted(&bytes).into_iter().for_each(take_position),
        2 => drop(accepted::<Shipment>(&bytes)),
        _ => drop(accepted::<Receipt>(&bytes)),
    }
});
