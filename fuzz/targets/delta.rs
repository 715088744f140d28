//! Job: deltas: any bytes against any base, and every value against every base and back.
//! Input: two lengths and bytes. Output: a crash, where there is a fault.
//! Always true: a delta makes at most as many bytes as are allowed, or leaves nothing; one's own is what it was made of.

#![no_main]

use bytes::BytesMut;
use etcd_ferry::wire::delta::{self, DeltaEncoder};
use libfuzzer_sys::fuzz_target;

const TARGET_LEN_MAX: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    let [a, rest @ ..] = data else { return };
    let (base, input) = rest.split_at((usize::from(*a) * 4).min(rest.len()));
    let mut out = BytesMut::new();
    match delta::decode(base, &mut &input[..], TARGET_LEN_MAX, &mut out) {
        Ok(len) => assert!(len == out.len() && len <= TARGET_LEN_MAX),
        Err(_) => assert!(out.is_empty()),
    }
    assert!(out.capacity() <= 2 * TARGET_LEN_MAX, "{} bytes are held", out.capacity());
    let mut encoded = Vec::new();
    if DeltaEncoder::default().encode(base, input, &mut encoded) {
        out.clear();
        delta::decode(base, &mut &encoded[..], input.len(), &mut out).expect("our own delta");
        assert_eq!(&out[..], input);
    }
});
