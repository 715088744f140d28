//! Job: positions, which anybody with etcdctl can write.
//! Input: bytes. Output: a crash, where there is a fault.
//! Always true: a position that is accepted is the same one when it is written and read again.

#![no_main]

use etcd_ferry::model::Position;
use etcd_ferry::origin::sequence::OriginWaymark;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(position) = Position::from_json(data) {
        assert_eq!(Position::from_json(&position.to_json()).expect("our own position"), position);
    }
    let _ = OriginWaymark::from_json(data);
});
