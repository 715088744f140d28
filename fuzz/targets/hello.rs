//! Job: what two sidecars say to each other, before and after the hello: any bytes as any message.
//! Input: bytes; the first one chooses. Output: a crash, where there is a fault.
//! Always true: a message that is accepted is written as it was read.

#![no_main]

use etcd_ferry::wire::replicate::{HelloReply, HelloRequest, Receipt, Shipment};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn again<M: Message + Default + PartialEq>(data: &[u8]) {
    if let Ok(message) = M::decode(data) {
        let written = message.encode_to_vec();
        assert!(M::decode(&written[..]).is_ok_and(|read| read == message || read.encode_to_vec() == written));
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    match choice % 4 {
        0 => again::<HelloRequest>(data),
        1 => again::<HelloReply>(data),
        2 => again::<Shipment>(data),
        _ => again::<Receipt>(data),
    }
});
