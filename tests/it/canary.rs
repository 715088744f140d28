//! Job: the canary: it is carried as a revision of its own, measured by the origin's clock, and seen by nobody who should not.
//! Input: pairs with canaries each second, a slow line, a frozen one, a link back, a spool that is lost. Output: passes or fails.
//! Always true: a canary changes no key at the replica but the position; histories are told by recordings of both ends.

use crate::bed::pair::{LINK, LINK_BACK, Pair, PairOptions, link_name};
use crate::bed::{PATIENCE, until};
use crate::resume::spool_dir;
use etcd_ferry::demo::proxy::Direction;
use etcd_ferry::model::Position;
use serde_json::Value;
use std::time::Duration;

/// A pair whose links carry a canary each second; both sidecars up.
async fn with_canaries(options: PairOptions) -> Pair {
    let mut pair = Box::pin(Pair::prepare(options)).await;
    for sidecar in [&mut pair.origin_sidecar, &mut pair.replica_sidecar] {
        sidecar.options.send.iter_mut().for_each(|send| send.canary_interval_seconds = Some(1));
        sidecar.write_config();
    }
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

fn over_app() -> PairOptions {
    PairOptions { prefixes: vec!["/app/".into()], ..PairOptions::default() }
}

/// The link's entry once so many canaries have come through.
async fn canaries(pair: &Pair, count: u64) -> Value {
    let sung = |entry: &Value| entry["applied_seq"].as_u64() >= Some(count) && entry["canary"]["seconds"] != 0.0;
    pair.origin_sidecar.wait_for(LINK, &format!("{count} canaries"), sung).await
}

async fn position(pair: &Pair) -> Position {
    pair.position().await.expect("a position")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_is_carried_as_an_empty_revision_and_nobody_takes_it_for_more() {
    let pair = with_canaries(over_app()).await;
    let written = pair.origin.put("/app/a", "1").await;
    pair.wait_applied(written).await;
    let before = position(&pair).await;
    let recorder = pair.record().await;

    let entry = canaries(&pair, before.seq.0 + 3).await;

    let took = entry["canary"]["seconds"].as_f64().unwrap();
    assert!(took > 0.0 && took < 5.0, "{entry:#}");
    let table = String::from_utf8(pair.origin_sidecar.admin(&["status"]).stdout).unwrap();
    assert!(table.contains("the last canary was applied"), "{table}");
    let (_, metrics) = pair.origin_sidecar.http("/metrics").await;
    let gauge = |line: &&str| line.starts_with("etcd_ferry_canary_seconds{") && !line.ends_with("} 0");
    assert!(metrics.lines().any(|line| gauge(&line)), "{metrics}");
    let verified = pair.origin_sidecar.admin(&["verify", LINK]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    let checked = |entry: &Value| entry["foreign_writes"]["checked_revision"].as_u64() > Some(before.seq.0 + 3);
    let replica = pair.replica_sidecar.wait_for(LINK, "a look at who wrote", checked).await;
    assert_eq!(replica["foreign_writes"]["revisions"], 0, "{replica:#}");
    let revision = pair.origin.put("/app/b", "1").await;
    pair.wait_applied(revision).await;
    let recording = pair.recorded(recorder).await;
    let (canary, position_key) = (link_name(LINK).canary_key(), link_name(LINK).position_key());
    let sung = recording.origin.revisions.values().filter(|changes| changes.iter().any(|c| *c.key() == canary)).count();
    assert!(sung >= 3, "{sung} canaries");
    assert!(
        recording
            .replica
            .revisions
            .values()
            .flatten()
            .all(|c| *c.key() == position_key || c.key().starts_with(b"/app/")),
        "nothing else is written at the replica"
    );
    // Each has a seq: what the seqs count is checked against the origin's history.
    assert!(recording.check().unwrap() >= 3);
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_tells_a_slow_line_and_ages_while_nothing_comes_back() {
    let pair = with_canaries(over_app()).await;
    pair.proxy.set_delay(Duration::from_millis(300));
    let slow = |entry: &Value| entry["canary"]["seconds"].as_f64() >= Some(0.6);
    let entry = pair.origin_sidecar.wait_for(LINK, "a canary of a round trip of 600 ms", slow).await;
    assert_eq!(entry["lag_revisions"].as_u64().map(|lag| lag <= 1), Some(true), "{entry:#}");
    pair.proxy.freeze(Direction::FromTarget);
    let ages = |entry: &Value| entry["canary"]["waiting_seconds"].as_f64() > Some(2.0);
    pair.origin_sidecar.wait_for(LINK, "a canary on its way for 2 s", ages).await;
    pair.proxy.heal();
    pair.proxy.set_delay(Duration::ZERO);
    let through = |entry: &Value| entry["canary"]["seconds"].as_f64() > Some(2.0);
    pair.origin_sidecar.wait_for(LINK, "the canary that was held up to come through", through).await;
    let well =
        |entry: &Value| entry["canary"]["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0 && seconds < 2.0);
    pair.origin_sidecar.wait_for(LINK, "the next one", well).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn canaries_of_two_clusters_that_are_linked_both_ways_cause_no_others() {
    let pair = with_canaries(PairOptions { both_ways: true, ..over_app() }).await;
    pair.replica_sidecar.wait_for_state(LINK_BACK, "following").await;
    let recorder = pair.record().await;
    canaries(&pair, 4).await;
    let sung = |entry: &Value| entry["applied_seq"].as_u64() >= Some(4);
    pair.replica_sidecar.wait_for(LINK_BACK, "4 canaries back", sung).await;
    let recording = pair.recorded(recorder).await;
    for (history, own, other) in [(&recording.origin, LINK, LINK_BACK), (&recording.replica, LINK_BACK, LINK)] {
        let (canary, position) = (link_name(own).canary_key(), link_name(other).position_key());
        let writing = |key: &bytes::Bytes| {
            history.revisions.values().filter(|changes| changes.iter().any(|change| change.key() == key)).count()
        };
        let all = history.revisions.len();
        // Beside them: waymarks, what standbys would read, and the positions that take those.
        assert!(all <= writing(&canary) + writing(&position) + 4, "{all} revisions, {history:?}");
        assert!(writing(&position) <= writing(&canary) + 6, "no position is written for the sake of another");
    }
    let entry = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(entry["counts"]["skipped"], 0, "what comes back is not even spooled: {entry:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_whose_last_revision_was_a_canary_goes_on_after_a_restart_and_knows_its_origin() {
    let mut pair = with_canaries(over_app()).await;
    for lose_spool in [false, true] {
        let before = position(&pair).await;
        canaries(&pair, before.seq.0 + 2).await;
        pair.origin_sidecar.stop().await;
        let last = until("a position that rests", PATIENCE, async || {
            let position = position(&pair).await;
            (position.carried_revision == position.origin_revision).then_some(position)
        })
        .await;
        if lose_spool {
            std::fs::remove_dir_all(spool_dir(&pair)).unwrap();
        }
        pair.origin_sidecar.restart().await;
        let revision = pair.origin.put("/app/after", format!("{lose_spool}")).await;
        let after = pair.wait_applied(revision).await;
        assert_eq!(after.epoch, last.epoch, "no other history is seen, the spool lost: {lose_spool}");
        assert!(after.seq > last.seq);
    }
    assert!(!pair.origin_sidecar.log().contains("the link stops"));
    pair.assert_equal().await;
}
