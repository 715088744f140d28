//! Job: what docs/protocol.md lets a later version of the same protocol say to this one, and write for it: it is skipped, and nothing is lost by it.
//! Input: a pair of real sidecars with a message of an unknown kind behind each of theirs; a position with more fields. Output: passes or fails.
//! Always true: what is put in is whole and sealed, as a peer would send it; that the stream went on is read from both sidecars' logs.

use crate::bed::pair::LINK;
use crate::flips::BentPair;
use bytes::Bytes;
use etcd_ferry::model::Position;

/// A shipment, or a receipt, whose kind has the number 1000; three bytes long.
const UNKNOWN_KIND: &[u8] = &[0xc2, 0x3e, 3, 1, 2, 3];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipment_and_a_receipt_of_an_unknown_kind_say_nothing_and_the_stream_goes_on() {
    let mut bent = Box::pin(BentPair::prepare()).await;
    bent.bender.put_in(Bytes::from_static(UNKNOWN_KIND));
    bent.start().await;
    bent.pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = bent.pair.record().await;
    let acknowledged = bent.write(50).await;
    bent.judge(recorder, &acknowledged).await;
    let [to_origin, to_replica] = bent.bender.strangers();
    assert!(to_origin >= 5 && to_replica >= 5, "{to_origin} receipts and {to_replica} shipments were put in");
    for (sidecar, ends) in
        [(&bent.pair.origin_sidecar, "saying hello again"), (&bent.pair.replica_sidecar, "the stream has ended")]
    {
        let log = sidecar.log();
        assert!(!log.contains(ends), "{log}");
    }
}

/// As one lies in an etcd.
const POSITION: &str = r#"{"epoch":3,"term":2,"seq":9,"origin_cluster":"ab","origin_revision":100,"carried_revision":90,
"carried_digest":"1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f","waymark":{"counter":5,"id":6},"ranges_digest":"01010101010101010101010101010101",
"state":"following","anchor_revision":70}"#;

#[test]
fn a_field_of_the_position_that_is_not_known_is_skipped() {
    let known = Position::from_json(POSITION.as_bytes()).unwrap();
    for (place, longer) in
        [("{\"epoch\"", "{\"later\":{\"a\":[1]},\"epoch\""), ("\"counter\"", "\"later\":1,\"counter\"")]
    {
        assert_eq!(POSITION.matches(place).count(), 1, "{place}");
        let later = POSITION.replace(place, longer);
        assert_eq!(Position::from_json(later.as_bytes()).unwrap(), known, "{later}");
    }
}
