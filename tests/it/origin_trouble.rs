//! Job: what ails the origin's etcd holds up as little as it must: what is spooled is shipped, what is asked is answered.
//! Input: a pair whose origin's etcd stands still, takes no puts, or lets nobody watch. Output: passes or fails.
//! Always true: a stream that goes on is told by the log, which says when one is given up.

use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::{PATIENCE, until};
use crate::resume::{following, last, second_waymark, wait_spooled, write};
use etcd_client::{AlarmAction, AlarmType};
use etcd_ferry::model::Revision;
use serde_json::Value;
use std::time::Duration;

/// So often the log of the origin's sidecar holds these words.
fn logged(pair: &Pair, words: &str) -> usize {
    pair.origin_sidecar.log().matches(words).count()
}

async fn logged_again(pair: &Pair, words: &str, before: usize) {
    until(words, PATIENCE, async || (logged(pair, words) > before).then_some(())).await;
}

/// Once for each stream.
const FOLLOWS: &str = "session: following link=";
const WAITS: &str = "the link waits; trying again";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_stream_ships_what_is_spooled_while_the_origins_etcd_stands_still() {
    let (pair, before) = following(PairOptions::default()).await;
    pair.proxy.cut();
    // Far more than what is on its way at a time.
    let acknowledged = write(&pair.origin.access(), "/app/backlog/", 300, 60_000).await;
    wait_spooled(&pair, last(&acknowledged)).await;
    let streams = logged(&pair, FOLLOWS);
    // A write at the origin fails after ten seconds: the rest is shipped after it did.
    pair.proxy.set_rate(Some(1_100_000));
    // The first receipt, which has the waymark written, comes after the etcd was paused.
    pair.proxy.set_delay(Duration::from_secs(1));
    pair.proxy.heal();
    logged_again(&pair, FOLLOWS, streams).await;
    pair.origin.pause();
    pair.proxy.set_delay(Duration::ZERO);
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!(after.epoch, before.epoch);
    pair.proxy.set_rate(None);
    pair.origin.resume();
    assert_eq!(logged(&pair, FOLLOWS), streams + 1, "one stream shipped it all");
    let revision = pair.origin.put("/app/awake", "1").await;
    pair.wait_applied(revision).await;
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_replica_tells_that_its_origin_sees_nothing_while_the_stream_is_open() {
    let (pair, _) = following(PairOptions::default()).await;
    let told = |entry: &Value| {
        let reason = entry["reason"].as_str().unwrap_or_default();
        entry["state"] == "following" && reason.starts_with("the origin's sidecar does not see what its etcd commits: ")
    };
    pair.origin.pause();
    pair.replica_sidecar.wait_for(LINK, "that its origin sees nothing", told).await;
    pair.origin.resume();
    let well = |entry: &Value| entry["state"] == "following" && entry["reason"] == "";
    pair.replica_sidecar.wait_for(LINK, "no such word any more", well).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_go_on_arriving_over_one_stream_while_the_origins_etcd_has_no_room() {
    let (pair, before) = following(PairOptions::default()).await;
    // So that a new stream has the next waymark to write at once.
    let present = second_waymark(&pair.origin, PATIENCE).await;
    until("a position with the present waymark", PATIENCE, async || {
        let mut revision = Revision(0);
        for number in 0..3 {
            revision = pair.origin.put(format!("/app/{number}"), "1").await;
        }
        (pair.wait_applied(revision).await.waymark.counter == present).then_some(())
    })
    .await;
    let mut client = pair.origin.client().await;
    client.alarm(AlarmAction::Activate, AlarmType::Nospace, None).await.unwrap();
    assert!(client.put("/app/more", "1", None).await.is_err(), "it has room");
    let (streams, waits) = (logged(&pair, FOLLOWS), logged(&pair, WAITS));
    pair.proxy.reset();
    logged_again(&pair, FOLLOWS, streams).await;
    let told = |entry: &Value| {
        let reason = entry["reason"].as_str().unwrap_or_default();
        entry["state"] == "following" && reason.contains("is not written at the origin") && reason.contains("NOSPACE")
    };
    pair.origin_sidecar.wait_for(LINK, "the reason beside following", told).await;
    for number in 0..3 {
        let deleted = client.delete(format!("/app/{number}"), None).await.unwrap();
        let revision = Revision(u64::try_from(deleted.header().unwrap().revision()).unwrap());
        assert_eq!(pair.wait_applied(revision).await.epoch, before.epoch);
    }
    assert_eq!(pair.assert_equal().await, 1);
    assert_eq!((logged(&pair, FOLLOWS), logged(&pair, WAITS)), (streams + 1, waits), "another stream was needed");
    pair.origin.make_room().await;
    let revision = pair.origin.put("/app/roomy", "1").await;
    pair.wait_applied(revision).await;
}
