//! Job: what others write at the replica, under the link's prefixes, is told soon and after a restart; what the link writes is not.
//! Input: pairs of regions, writers beside the link, restarts, a link back, users without rights. Output: passes or fails.
//! Always true: what is told is read from `status` as an operator reads it.

use crate::bed::contents::{load, noise};
use crate::bed::etcd::Etcd;
use crate::bed::pair::{LINK, LINK_BACK, Pair, PairOptions, connect, wait_applied};
use crate::bed::regions::{Regions, RegionsOptions};
use crate::bed::sidecar::Sidecar;
use crate::bed::traffic::{Traffic, TrafficOptions};
use crate::bed::{PATIENCE, until};
use crate::verify::{following_with, over_app};
use etcd_client::PutOptions;
use etcd_ferry::model::Revision;
use serde_json::{Value, json};
use std::time::Duration;

/// As the issue of a foreign write has it.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

fn foreign(sidecar: &Sidecar, link: &str) -> Value {
    let status = sidecar.status();
    let links = status["links"].as_array().unwrap();
    links.iter().find(|entry| entry["link"] == link && entry["side"] == "replica").unwrap()["foreign_writes"].clone()
}

/// Waits until everything up to the present head was looked at.
async fn looked_at(sidecar: &Sidecar, link: &str, replica: &Etcd) -> Value {
    let head = replica.head().await;
    until("everything to be looked at", PATIENCE, async || {
        let foreign = foreign(sidecar, link);
        (foreign["checked_revision"].as_u64() >= Some(head.0)).then_some(foreign)
    })
    .await
}

async fn told(sidecar: &Sidecar, keys: u64, limit: Duration) -> Value {
    until("the foreign keys to be told", limit, async || {
        let foreign = foreign(sidecar, LINK);
        (foreign["keys"] == keys).then_some(foreign)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_write_is_told_within_five_seconds_and_closed_by_a_repair() {
    let pair = Box::pin(following_with(over_app(), 100, 100)).await;
    let options =
        TrafficOptions { prefix: "/app/traffic/".to_owned(), rate_per_writer: Some(40), ..Default::default() };
    let traffic = Traffic::start(&pair.origin.access(), &options);
    looked_at(&pair.replica_sidecar, LINK, &pair.replica).await;
    let first = pair.replica.put("/app/000007", "by hand").await;
    told(&pair.replica_sidecar, 1, TOLD_WITHIN).await;
    let last = pair.replica.put("/app/\u{1}new", "by hand").await;
    let foreign = told(&pair.replica_sidecar, 2, TOLD_WITHIN).await;
    assert_eq!(
        (&foreign["revisions"], &foreign["first_keys"]),
        (&2.into(), &serde_json::json!(["/app/000007", "/app/\\x01new"]))
    );
    assert_eq!((&foreign["first_revision"], &foreign["last_revision"]), (&first.0.into(), &last.0.into()));
    let table = pair.replica_sidecar.admin(&["status"]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains("somebody else wrote 2 keys here") && table.contains("/app/000007"), "{table}");
    let health = pair.replica_sidecar.health().await.unwrap().to_string();
    assert!(
        health.contains("somebody else wrote 2 keys") && !health.contains("/app/000007"),
        "http shows no key: {health}"
    );
    assert!(!pair.replica_sidecar.log().contains("by hand"), "no value is logged");

    let repaired = pair.origin_sidecar.admin(&["repair", LINK, "--allow-deletes", "--json"]);
    assert!(repaired.status.success(), "{}", String::from_utf8_lossy(&repaired.stdout));
    let closed = told(&pair.replica_sidecar, 0, PATIENCE).await;
    assert_eq!((&closed["revisions"], &closed["first_keys"]), (&0.into(), &serde_json::json!([])));
    let (_, metrics) = pair.replica_sidecar.http("/metrics").await;
    let line = format!("etcd_ferry_foreign_keys_total{{link=\"{LINK}\",side=\"replica\"}} 2");
    assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    traffic.stop().await;
    pair.wait_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_proved_before_the_replica_was_restored_closes_nothing_that_was_written_after_it() {
    let mut pair = Box::pin(following_with(over_app(), 100, 100)).await;
    let snapshot = pair.replica.save_snapshot().await;
    for number in 0..50 {
        pair.replica.put(format!("/outside/{number}"), "1").await;
    }
    let last = pair.origin.put("/app/last", "1").await;
    pair.wait_applied(last).await;
    let verified = pair.origin_sidecar.admin(&["verify", LINK]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stdout));
    looked_at(&pair.replica_sidecar, LINK, &pair.replica).await;
    let proved = pair.replica.head().await;
    pair.replica.restore_snapshot(&snapshot).await;
    let written = pair.replica.put("/app/000007", "by hand").await;
    assert!(written < proved, "{written} is past {proved}");
    told(&pair.replica_sidecar, 1, PATIENCE).await;
    for number in 0..60 {
        pair.replica.put(format!("/outside/{number}"), "2").await;
    }
    assert!(pair.replica.head().await > proved);
    let foreign = looked_at(&pair.replica_sidecar, LINK, &pair.replica).await;
    assert_eq!((&foreign["revisions"], &foreign["last_revision"]), (&1.into(), &written.0.into()), "{foreign}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_wrote_to_a_restored_replica_is_told_though_the_link_alone_had_written_there_since_a_proof() {
    let mut pair = Box::pin(following_with(over_app(), 100, 100)).await;
    // The look after the restore begins where both sides were proved equal, and what the link has made since then comes right after it.
    pair.replica.put("/app/mended", "by hand").await;
    told(&pair.replica_sidecar, 1, PATIENCE).await;
    let repaired = pair.origin_sidecar.admin(&["repair", LINK, "--allow-deletes"]);
    assert!(repaired.status.success(), "{}", String::from_utf8_lossy(&repaired.stdout));
    told(&pair.replica_sidecar, 0, PATIENCE).await;
    until("the proof to be in the position", PATIENCE, async || {
        pair.wait_applied(pair.origin.put("/app/early", "1").await).await;
        pair.position().await.filter(|position| position.equal_revision > Revision(0))
    })
    .await;
    let snapshot = pair.replica.save_snapshot().await;
    for number in 0..20 {
        let last = pair.origin.put(format!("/app/late/{number}"), "1").await;
        pair.wait_applied(last).await;
    }
    looked_at(&pair.replica_sidecar, LINK, &pair.replica).await;
    let before = pair.replica.head().await;
    // Nothing of the link comes between the restore and the look at it.
    pair.origin_sidecar.stop().await;
    pair.replica.restore_snapshot(&snapshot).await;
    let written = pair.replica.put("/app/000007", "by hand").await;
    assert!(written < before, "{written} is past {before}");
    let foreign = told(&pair.replica_sidecar, 1, PATIENCE).await;
    assert_eq!((&foreign["first_revision"], &foreign["first_keys"]), (&written.0.into(), &json!(["/app/000007"])));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_wrote_to_a_replica_that_was_restored_while_its_sidecar_was_down_is_told_though_they_wrote_much() {
    let mut pair = Box::pin(following_with(over_app(), 100, 100)).await;
    let snapshot = pair.replica.save_snapshot().await;
    let last = pair.origin.put("/app/last", "1").await;
    pair.wait_applied(last).await;
    looked_at(&pair.replica_sidecar, LINK, &pair.replica).await;
    let before = pair.replica.head().await;
    pair.origin_sidecar.stop().await;
    pair.replica_sidecar.stop().await;
    pair.replica.restore_snapshot(&snapshot).await;
    let written = pair.replica.put("/app/000007", "by hand").await;
    let mut head = written;
    while head <= before {
        head = pair.replica.put("/outside/busy", "1").await;
    }
    pair.replica_sidecar.restart().await;
    let foreign = told(&pair.replica_sidecar, 1, PATIENCE).await;
    assert_eq!(foreign["first_revision"], written.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_write_is_told_after_a_restart_whether_it_came_before_it_or_meanwhile() {
    let mut pair = Box::pin(following_with(over_app(), 10, 100)).await;
    looked_at(&pair.replica_sidecar, LINK, &pair.replica).await;
    pair.replica.put("/app/before", "by hand").await;
    told(&pair.replica_sidecar, 1, TOLD_WITHIN).await;
    // The position moves past it: what was told of it is known from the file alone.
    let moved = pair.origin.put("/app/000001", "of the origin").await;
    pair.wait_applied(moved).await;
    pair.replica_sidecar.kill();
    pair.replica.put("/app/meanwhile", "by hand").await;
    // Between two foreign writes lies one of the link, from a journal or a stream of the next process.
    pair.origin.put("/app/000003", "of the origin").await;
    pair.replica_sidecar.restart().await;
    let foreign = told(&pair.replica_sidecar, 2, PATIENCE).await;
    assert_eq!(foreign["first_keys"], serde_json::json!(["/app/before", "/app/meanwhile"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_told_of_two_links_into_one_etcd_elections_leases_and_writers_outside_the_ranges() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    let second = PairOptions { prefixes: vec!["/sys/".into()], ..over_app() };
    connect(&mut pair.origin_sidecar.options, &mut pair.replica_sidecar.options, "sys", &pair.proxy, &second);
    pair.origin_sidecar.write_config();
    pair.replica_sidecar.write_config();
    load(&pair.origin, &noise("/app/", 500, 100)).await;
    load(&pair.origin, &noise("/sys/", 500, 100)).await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    for link in [LINK, "sys"] {
        pair.origin_sidecar.wait_for_state(link, "following").await;
    }
    let writers: Vec<Traffic> = ["/app/t/", "/sys/t/"]
        .map(|prefix| TrafficOptions { prefix: prefix.to_owned(), rate_per_writer: Some(40), ..Default::default() })
        .iter()
        .map(|options| Traffic::start(&pair.origin.access(), options))
        .collect();
    let mut client = pair.replica.client().await;
    let lease = client.lease_grant(1, None).await.unwrap().id();
    client.put("/outside/leased", "x", Some(PutOptions::new().with_lease(lease))).await.unwrap();
    let campaign = client.lease_grant(60, None).await.unwrap().id();
    client.campaign("/election/", "me", campaign).await.unwrap();
    for key in ["/app", "/app0", "/sys", "/etcd-ferry/v1/other", "/zzz"] {
        pair.replica.put(key, "of no link").await;
    }
    until("the leased key to be gone", PATIENCE, async || {
        pair.replica.get("/outside/leased").await.is_none().then_some(())
    })
    .await;
    for traffic in writers {
        traffic.stop().await;
    }
    let last = [pair.origin.put("/app/last", "1").await, pair.origin.put("/sys/last", "1").await];
    for (link, last) in [LINK, "sys"].into_iter().zip(last) {
        wait_applied(&pair.replica, link, last, PATIENCE).await;
        let foreign = looked_at(&pair.replica_sidecar, link, &pair.replica).await;
        assert_eq!((&foreign["revisions"], &foreign["expected"]), (&0.into(), &"".into()), "{link}: {foreign}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_that_are_expected_are_not_told_by_configuration_nor_where_a_link_back_exists() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    pair.replica_sidecar.options.receive[0].foreign_writes = Some("expect".to_owned());
    pair.replica_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.replica.put("/app/mine", "by hand").await;
    let expected = looked_at(&pair.replica_sidecar, LINK, &pair.replica).await;
    assert_eq!((&expected["revisions"], &expected["expected"]), (&0.into(), &"foreign_writes = \"expect\"".into()));

    let both = Box::pin(Pair::start(PairOptions { both_ways: true, ..over_app() })).await;
    both.origin_sidecar.wait_for_state(LINK, "following").await;
    both.replica_sidecar.wait_for_state(LINK_BACK, "following").await;
    both.replica.put("/app/mine", "written here").await;
    let expected = looked_at(&both.replica_sidecar, LINK, &both.replica).await;
    let why = "a link back writes the same keys";
    assert_eq!((&expected["revisions"], &expected["expected"]), (&0.into(), &why.into()), "{expected}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_replica_wants_it_the_origin_mends_what_others_wrote_and_proves_it() {
    let mut pair = Box::pin(following_with(over_app(), 100, 100)).await;
    pair.replica_sidecar.options.receive[0].foreign_writes = Some("repair".to_owned());
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    looked_at(&pair.replica_sidecar, LINK, &pair.replica).await;
    pair.replica.put("/app/000007", "by hand").await;
    pair.replica.put("/app/new", "by hand").await;
    pair.replica.kv().await.delete("/app/000008", None).await.unwrap();
    pair.wait_equal().await;
    let closed = told(&pair.replica_sidecar, 0, PATIENCE).await;
    assert_eq!(closed["revisions"], 0);
    let counted = pair.replica_sidecar.health().await.unwrap()["links"][0]["counts"]["foreign_keys"].clone();
    assert_eq!(counted, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_mended_through_one_of_the_replicas_sidecars_is_closed_at_the_other_too() {
    let regions = Box::pin(Regions::start(RegionsOptions { sidecars: (1, 2), ..RegionsOptions::default() })).await;
    let put = regions.origin[0].put("/app/a", "of the origin").await;
    regions.wait_applied(put).await;
    let receives = async |sidecar: &Sidecar| {
        let open = |entry: &Value| entry["state"] == "following" && entry["reason"] == "";
        sidecar.wait_for(LINK, "the origin's stream", open).await;
    };
    // First the one, then the other: the first has nothing but its own eyes from then on.
    let [first, second] = &regions.replica_sidecars[..] else { panic!("two of them") };
    receives(first).await;
    looked_at(first, LINK, &regions.replica[0]).await;
    regions.peer_lines[0][0].cut();
    receives(second).await;
    looked_at(second, LINK, &regions.replica[0]).await;

    regions.replica[0].put("/app/a", "by hand").await;
    for sidecar in [first, second] {
        told(sidecar, 1, PATIENCE).await;
    }
    let repaired = regions.origin_sidecars[0].admin(&["repair", LINK]);
    assert!(repaired.status.success(), "{}", String::from_utf8_lossy(&repaired.stdout));
    for sidecar in [second, first] {
        let closed = told(sidecar, 0, PATIENCE).await;
        assert_eq!(closed["revisions"], 0);
    }
    // It is no foreign write of the other's.
    looked_at(first, LINK, &regions.replica[0]).await;
    assert_eq!(foreign(first, LINK)["keys"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_origin_was_narrowed_what_it_left_is_no_business_of_the_links_also_after_a_restart() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    // What is accepted is what the first hello said, and stays so.
    pair.replica_sidecar.options.receive[0].prefixes.clear();
    pair.replica_sidecar.write_config();
    pair.origin.put("/app/a", "of the origin").await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let before = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.origin_sidecar.options.send[0].exclude.push("/app/local/".to_owned());
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    let narrowed = |entry: &Value| entry["state"] == "following" && entry["epoch"].as_u64() > before["epoch"].as_u64();
    pair.origin_sidecar.wait_for(LINK, "the copy of the narrower ranges", narrowed).await;

    pair.replica.put("/app/local/a", "of the replica").await;
    assert_eq!(looked_at(&pair.replica_sidecar, LINK, &pair.replica).await["keys"], 0);
    pair.origin_sidecar.stop().await;
    pair.replica_sidecar.restart().await;
    pair.replica.put("/app/local/b", "of the replica").await;
    assert_eq!(looked_at(&pair.replica_sidecar, LINK, &pair.replica).await["keys"], 0, "without a hello");
    pair.replica.put("/app/a", "by hand").await;
    let told = told(&pair.replica_sidecar, 1, PATIENCE).await;
    assert_eq!(told["first_keys"], serde_json::json!(["/app/a"]));
}
