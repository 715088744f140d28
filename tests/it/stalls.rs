//! Job: a link that stands still says so, where, and what to look at; what may help is done; and it goes on when it can.
//! Input: pairs whose line swallows acknowledgements, whose watch is half open, whose replica's sidecar or etcd is paused. Output: passes or fails.
//! Always true: nothing is lost by a stall; both sides end equal.

use crate::bed::LinkProxy;
use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::sidecar::Sidecar;
use etcd_ferry::demo::proxy::Direction;
use etcd_ferry::etcd::version;
use etcd_ferry::model::Revision;
use serde_json::Value;
use std::collections::BTreeMap;

/// The least that is configurable.
const STALL_SECONDS: u64 = 12;

fn watched() -> PairOptions {
    PairOptions { limits: BTreeMap::from([("stall_seconds".to_owned(), STALL_SECONDS)]), ..PairOptions::default() }
}

async fn following() -> Pair {
    let pair = Box::pin(Pair::start(watched())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;
    pair
}

/// The link's entry once it is stalled with these words, by which every way of asking says the same.
async fn stalled(sidecar: &Sidecar, words: &str) -> Value {
    let told = |entry: &Value| {
        entry["state"] == "stalled" && entry["reason"].as_str().is_some_and(|reason| reason.contains(words))
    };
    let entry = sidecar.wait_for(LINK, &format!("a stall: {words}"), told).await;
    assert!(entry["stalled_seconds"].as_f64() >= Some(STALL_SECONDS as f64), "{entry:#}");
    let (code, said) = sidecar.http("/readyz").await;
    assert!(code == 503 && said.contains(" stalled: "), "{code}: {said}");
    let (_, metrics) = sidecar.http("/metrics").await;
    let gauge = |line: &&str| line.starts_with("etcd_ferry_stalled_seconds{") && !line.ends_with("} 0");
    assert!(metrics.lines().any(|line| gauge(&line)), "{metrics}");
    let state = |line: &&str| line.starts_with("etcd_ferry_link_state{") && line.contains("\"stalled\"} 1");
    assert!(metrics.lines().any(|line| state(&line)), "{metrics}");
    assert_eq!(sidecar.status()["links"][0]["state"], "stalled");
    assert!(sidecar.log().contains("the link stands still"), "{}", sidecar.log());
    entry
}

/// The stall is over: what was written last is there, and nothing is wrong any more.
async fn goes_on(pair: &Pair, last: Revision) {
    pair.wait_applied(last).await;
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let well =
            |entry: &Value| entry["state"] == "following" && entry["stalled_seconds"] == 0.0 && entry["reason"] == "";
        sidecar.wait_for(LINK, "no stall and no reason any more", well).await;
        let log = sidecar.log();
        let told = log.contains("the link stands still") == log.contains("the link makes progress again");
        assert!(told, "a stall's end is told as its beginning is: {log}");
    }
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_swallows_acknowledgements_is_a_stall_until_they_come_again() {
    let pair = following().await;
    pair.proxy.black_hole(Direction::FromTarget);
    let last = pair.origin.put("/app/unheard", "1").await;
    let entry = stalled(&pair.origin_sidecar, "nothing has been heard from the replica's sidecar").await;
    assert_eq!(entry["counts"]["stalls"], 1, "{entry:#}");
    // The stream is given up for another hello, and that is no progress yet.
    let gave_up = |entry: &Value| entry["state"] == "stalled" && entry["reason"].as_str().unwrap().contains("hello");
    pair.origin_sidecar.wait_for(LINK, "another hello to be tried", gave_up).await;
    pair.proxy.heal();
    goes_on(&pair, last).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replicas_sidecar_that_is_paused_is_a_stall_until_it_runs_again() {
    let pair = following().await;
    pair.replica_sidecar.pause();
    let last = pair.origin.put("/app/paused", "1").await;
    stalled(&pair.origin_sidecar, "nothing has been heard from the replica's sidecar").await;
    pair.replica_sidecar.resume();
    goes_on(&pair, last).await;
    // The pause was its own: no time passed for it.
    let entry = pair.replica_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(entry["counts"]["stalls"], 0, "{entry:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_received_and_not_applied_is_a_stall_at_both_ends() {
    let pair = following().await;
    pair.replica.pause();
    let last = pair.origin.put("/app/received", "1").await;
    stalled(&pair.replica_sidecar, "up to seq 2 is received, and nothing after seq 1 has been applied").await;
    stalled(&pair.origin_sidecar, "the replica has received up to seq 2, and has applied nothing after seq 1").await;
    pair.replica.resume();
    goes_on(&pair, last).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_is_half_open_is_a_stall_that_another_watch_ends() {
    let mut pair = Box::pin(Pair::prepare(watched())).await;
    let line = LinkProxy::start(pair.origin.address()).await.unwrap();
    pair.origin_sidecar.options.etcd.url = format!("http://{}", line.address());
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    // So that the watch's connection is the busiest.
    let mut last = Revision(0);
    for number in 0..20 {
        last = pair.origin.put(format!("/app/large-{number}"), vec![b'x'; 50_000]).await;
    }
    pair.wait_applied(last).await;
    line.freeze_busiest(Direction::FromTarget);
    let last = pair.origin.put("/app/unseen", "1").await;
    // Nobody thaws it.
    goes_on(&pair, last).await;
    let entry = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let log = pair.origin_sidecar.log();
    let version = pair.origin.client().await.status().await.unwrap().version().to_owned();
    if version::progress_in_order(&version) == Some(false) {
        // Such an etcd is not asked for progress but shown a key, and that it does not answer to that is met before the stall.
        assert!(entry["counts"]["stalls"] == 0 && log.contains("etcd did not answer within 10 s"), "{entry:#}\n{log}");
        return;
    }
    assert_eq!(entry["counts"]["stalls"], 1, "{entry:#}");
    assert!(log.contains("the origin's watch has shown nothing for 12 s"), "{log}");
    assert!(log.contains("the watch stood still"), "{log}");
}
