//! Job: lag and position are true: of an idle link, of a link whose watch is frozen.
//! Input: a pair of regions, a proxy before the origin's etcd. Output: passes or fails.
//! Always true: what is judged is what `status` says of itself, against the origin's head as the test reads it.

use crate::bed::etcd::EtcdOptions;
use crate::bed::pair::{LINK, Pair, PairOptions, link_name};
use crate::bed::traffic::{Acknowledged, Write, commit};
use crate::bed::{LinkProxy, PATIENCE, until};
use crate::resume::noise;
use bytes::Bytes;
use etcd_ferry::demo::proxy::Direction;
use etcd_ferry::model::{Phase, Position, Revision};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

fn loose() -> PairOptions {
    let loose = |options| EtcdOptions { sync: false, ..options };
    PairOptions {
        origin: loose(EtcdOptions::origin()),
        replica: loose(EtcdOptions::replica()),
        prefixes: vec!["/app/".into()],
        ..PairOptions::default()
    }
}

fn caught_up(entry: &Value, head: Revision) -> bool {
    let reached = |field: &str| entry[field].as_u64() >= Some(head.0);
    entry["lag_seconds"] == 0.0 && entry["lag_revisions"] == 0 && reached("origin_revision") && reached("head_revision")
}

#[tokio::test]
async fn an_idle_link_follows_the_head_that_others_move_and_has_no_lag() {
    let pair = Box::pin(Pair::start(loose())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let carried = pair.origin.put("/app/a", "1").await;
    pair.wait_applied(carried).await;
    // Not carried: first what the watch shows all the same, since it covers the positions too, then what it does not.
    for place in ["/between", "/outside"] {
        for i in 0..100 {
            pair.origin.put(format!("{place}/{i}"), "not carried").await;
        }
    }
    let head = pair.origin.head().await;
    assert!(head.0 >= carried.0 + 200);
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let what = format!("lag 0 at head {head}");
        let entry = sidecar.wait_for_within(LINK, &what, Duration::from_secs(15), |e| caught_up(e, head)).await;
        assert_eq!(entry["applied_seq"], 1, "one revision is the link's: {entry:#}");
    }
}

#[tokio::test]
async fn a_replica_hears_of_the_head_while_a_backlog_fills_the_line() {
    let limits = BTreeMap::from([("frame_bytes_max".to_owned(), 64 << 10)]);
    let pair = &mut Box::pin(Pair::start(PairOptions { limits, ..loose() })).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.proxy.cut();
    let mut last = Revision(0);
    for number in 0..900 {
        last = pair.origin.put(format!("/app/{number}"), noise(number, 64 << 10)).await;
    }
    let spooled = |entry: &Value| entry["lag_revisions"] == 900;
    pair.origin_sidecar.wait_for(LINK, "the backlog in the spool", spooled).await;
    // Sixty megabytes, for about half a minute; some of them are in the line at a time.
    pair.proxy.set_rate(Some(2_000_000));
    pair.proxy.heal();
    let connected = |entry: &Value| entry["head_revision"].as_u64() >= Some(last.0);
    pair.replica_sidecar.wait_for(LINK, "the first word of the origin", connected).await;
    let late = pair.origin.put("/app/late", "1").await;
    let heard = |entry: &Value| entry["head_revision"].as_u64() >= Some(late.0);
    let entry = pair.replica_sidecar.wait_for(LINK, "the head to be heard of", heard).await;
    assert!(entry["seq"].as_u64() < Some(900), "it came only after the backlog: {entry:#}");
    pair.proxy.set_rate(None);
    pair.wait_applied(late).await;
    pair.assert_equal().await;
}

#[tokio::test]
async fn a_replica_is_not_left_with_the_lag_that_its_origin_told_before_the_first_ack_of_a_stream() {
    let pair = Box::pin(Pair::start(loose())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let first = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(first).await;
    pair.origin_sidecar.wait_for(LINK, "the ack of the first", |e| caught_up(e, first)).await;
    // Applied, and the word of it does not come back before the link is cut.
    pair.proxy.freeze(Direction::FromTarget);
    let last = pair.origin.put("/app/last", "1").await;
    pair.wait_applied(last).await;
    let behind = |entry: &Value| entry["lag_revisions"] == 1 && entry["lag_seconds"].as_f64() > Some(2.0);
    pair.origin_sidecar.wait_for(LINK, "lag for want of an ack", behind).await;
    pair.proxy.cut();
    pair.proxy.heal();
    pair.origin_sidecar.wait_for(LINK, "no lag on the next stream", |e| caught_up(e, last)).await;
    // Half of the time after which the origin speaks when it has nothing to say.
    let within = Duration::from_millis(2_500);
    pair.replica_sidecar.wait_for_within(LINK, "to be told so", within, |e| caught_up(e, last)).await;
}

#[tokio::test]
async fn a_restarted_origin_that_cannot_ask_its_replica_counts_from_what_it_had_published() {
    let pair = &mut Box::pin(Pair::start(loose())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let mut last = Revision(0);
    for number in 0..20 {
        last = pair.origin.put(format!("/app/{number}"), "1").await;
    }
    pair.wait_applied(last).await;
    let published = async || {
        let text = pair.origin.get(link_name(LINK).applied_key().to_vec()).await?;
        let published: Value = serde_json::from_slice(&text).unwrap();
        (published["revision"].as_u64() >= Some(last.0)).then_some(())
    };
    until("the applied revision to be published", PATIENCE, published).await;
    pair.proxy.cut();
    let more = pair.origin.put("/app/more", "1").await;
    let spooled = |entry: &Value| entry["lag_revisions"] == 1 && entry["head_revision"].as_u64() >= Some(more.0);
    pair.origin_sidecar.wait_for(LINK, "one revision of lag", spooled).await;

    pair.origin_sidecar.restart().await;

    let counted = |entry: &Value| {
        let alone = entry["role"] == "shipper" && entry["state"] == "connecting";
        alone && entry["lag_revisions"] == 1 && entry["rpo_revisions"] == 1
    };
    pair.origin_sidecar.wait_for(LINK, "a shipper that reaches nobody, and counts what is not applied", counted).await;
}

#[tokio::test]
async fn after_the_origin_was_replaced_by_one_with_lower_revisions_lag_and_rpo_are_told_all_the_same() {
    let goes_on = PairOptions { other_history: Some("resync".into()), ..loose() };
    let pair = &mut Box::pin(Pair::start(goes_on)).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let mut revision = Revision(0);
    for number in 0..300 {
        revision = pair.origin.put("/app/a", format!("{number}")).await;
    }
    let before = pair.wait_applied(revision).await;
    pair.origin_sidecar.pause();
    pair.origin.replace().await;
    let head = pair.origin.put("/app/a", "of another cluster").await;
    assert!(head.0 < 100);
    pair.origin_sidecar.resume();
    let is_new = |p: &Position| p.epoch > before.epoch && p.state == Phase::Following;
    until("the next epoch to be followed", PATIENCE, async || pair.position().await.filter(is_new)).await;
    pair.origin_sidecar.wait_for(LINK, "no lag after the copy", |e| caught_up(e, head)).await;

    pair.proxy.cut();
    pair.origin.put("/app/b", "1").await;

    let behind = |entry: &Value| {
        let behind = |what: &str| entry[format!("{what}_seconds")].as_f64() > Some(1.0);
        entry["lag_revisions"] == 1 && entry["rpo_revisions"] == 1 && behind("lag") && behind("rpo")
    };
    pair.origin_sidecar.wait_for(LINK, "lag while the link is cut", behind).await;
    pair.proxy.heal();
    let last = pair.origin.put("/app/c", "1").await;
    pair.wait_applied(last).await;
    pair.origin_sidecar.wait_for(LINK, "no lag once it has healed", |e| caught_up(e, last)).await;
}

/// A pair whose origin's sidecar reaches its etcd through a proxy, and the connection of the watch is the busiest of all.
async fn behind_a_proxy() -> (Pair, LinkProxy) {
    let mut pair = Box::pin(Pair::prepare(loose())).await;
    let proxy = LinkProxy::start(pair.origin.address()).await.unwrap();
    pair.origin_sidecar.options.etcd.url = format!("http://{}", proxy.address());
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let mut last = Revision(0);
    for i in 0..20 {
        last = pair.origin.put(format!("/app/large-{i}"), vec![b'x'; 50_000]).await;
    }
    pair.wait_applied(last).await;
    (pair, proxy)
}

/// Freezes the watch, writes, and waits until the lag has grown; what was written.
async fn lag_grows_when_the_watch_freezes(pair: &Pair, proxy: &LinkProxy) -> Vec<Acknowledged> {
    proxy.freeze_busiest(Direction::FromTarget);
    let mut kv = pair.origin.kv().await;
    let mut acknowledged = Vec::new();
    for i in 0..50 {
        let write = Write::put(format!("/app/{}", i % 7), Bytes::from(format!("value {i}")));
        acknowledged.extend(commit(&mut kv, &[write]).await.unwrap());
    }
    let lags = |entry: &Value| entry["lag_seconds"].as_f64() > Some(4.0);
    pair.origin_sidecar.wait_for_within(LINK, "lag of 4 s", Duration::from_secs(12), lags).await;
    let told = |entry: &Value| entry["lag_seconds"].as_f64() > Some(3.0);
    pair.replica_sidecar.wait_for_within(LINK, "lag at the replica", Duration::from_secs(8), told).await;
    acknowledged
}

#[tokio::test]
async fn lag_grows_while_the_origins_watch_is_frozen_and_nothing_is_lost_when_it_thaws() {
    let (pair, proxy) = behind_a_proxy().await;
    let recorder = pair.record().await;
    let acknowledged = lag_grows_when_the_watch_freezes(&pair, &proxy).await;
    proxy.heal();
    let last = acknowledged.last().unwrap().revision;
    pair.wait_applied(last).await;
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        sidecar.wait_for(LINK, "lag 0 after the thaw", |e| caught_up(e, last)).await;
    }
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
}

#[tokio::test]
async fn a_watch_that_stays_frozen_is_opened_anew_on_another_connection() {
    let (pair, proxy) = behind_a_proxy().await;
    let recorder = pair.record().await;
    let acknowledged = lag_grows_when_the_watch_freezes(&pair, &proxy).await;
    let last = acknowledged.last().unwrap().revision;
    pair.wait_applied_within(last, PATIENCE).await;
    pair.origin_sidecar.wait_for(LINK, "lag 0 without a thaw", |e| caught_up(e, last)).await;
    let entry = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(entry["counts"]["stalls"], 0, "the watch's own silence is shorter than a stall: {entry:#}");
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
}
