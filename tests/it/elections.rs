//! Job: who is elected, what a standby says of itself, and what one sidecar alone notices of elections.
//! Input: regions with one or several sidecars at the origin. Output: passes or fails.
//! Always true: terms are read from the position and from the status, and are the same.

use crate::bed::pair::LINK;
use crate::bed::regions::{Regions, RegionsOptions};
use serde_json::Value;
use std::time::{Duration, Instant};

fn alone() -> RegionsOptions {
    RegionsOptions { sidecars: (1, 1), ..RegionsOptions::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_alone_that_was_killed_ships_again_without_waiting_for_its_old_lease() {
    let mut regions = Box::pin(Regions::start(alone())).await;
    let revision = regions.origin[0].put("/app/a", "1").await;
    let before = regions.wait_applied(revision).await;
    regions.origin_sidecars[0].kill();
    let started = Instant::now();
    regions.origin_sidecars[0].restart().await;
    let revision = regions.origin[0].put("/app/b", "1").await;
    let after = regions.wait_applied(revision).await;
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    assert!(after.term > before.term && after.epoch == before.epoch, "{before:?}, then {after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_alone_is_elected_at_once_and_outages_of_the_link_do_not_make_it_give_way() {
    let regions = Box::pin(Regions::start(alone())).await;
    let revision = regions.origin[0].put("/app/a", "1").await;
    let before = regions.wait_applied(revision).await;
    let entry = regions.origin_sidecars[0].wait_for_state(LINK, "following").await;
    assert_eq!((&entry["role"], &entry["shipper"]), (&"shipper".into(), &"us-east-1-a".into()), "{entry:#}");
    assert_eq!(entry["term"], before.term.0);
    assert_eq!(entry["counts"]["elections"], 1);
    let head = regions.origin[0].head().await;
    regions.cut_link();
    regions.origin[0].put("/app/b", "1").await;
    // Longer than the patience of one who has somebody to give way to.
    let long = |entry: &Value| entry["lag_seconds"].as_f64().is_some_and(|seconds| seconds > 8.0);
    regions.origin_sidecars[0].wait_for(LINK, "an outage of eight seconds", long).await;
    regions.heal();
    let revision = regions.origin[0].put("/app/c", "1").await;
    assert_eq!(regions.wait_applied(revision).await.term, before.term);
    // The two puts, and what the first one made due: the applied revision and the waymark.
    assert!(regions.origin[0].head().await.0 - head.0 <= 4, "the outage cost revisions at the origin");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_revoked_is_followed_by_another_one() {
    let regions = Box::pin(Regions::start(alone())).await;
    let revision = regions.origin[0].put("/app/a", "1").await;
    let before = regions.wait_applied(revision).await;
    let mut etcd = regions.origin[0].client().await;
    for lease in etcd.leases().await.unwrap().leases() {
        etcd.lease_revoke(lease.id()).await.unwrap();
    }
    let elected = |entry: &Value| entry["counts"]["elections"] == 2 && entry["state"] == "following";
    regions.origin_sidecars[0].wait_for(LINK, "another election", elected).await;
    let revision = regions.origin[0].put("/app/b", "1").await;
    let after = regions.wait_applied(revision).await;
    assert!(after.term > before.term && after.epoch == before.epoch, "{before:?}, then {after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_says_that_it_stands_by_and_for_whom_is_ready_and_declines_commands() {
    let regions = Box::pin(Regions::start(RegionsOptions::default())).await;
    let revision = regions.origin[0].put("/app/a", "1").await;
    let position = regions.wait_applied(revision).await;
    let entry = regions.wait_standby(1).await;
    assert_eq!((&entry["reason"], &entry["shipper"]), (&"".into(), &"us-east-1-a".into()), "{entry:#}");
    assert_eq!((&entry["term"], &entry["lag_seconds"]), (&position.term.0.into(), &0.0.into()), "{entry:#}");
    let standby = &regions.origin_sidecars[1];
    assert_eq!(standby.http("/readyz").await.0, 200);
    let table = standby.admin(&["status"]);
    assert!(String::from_utf8_lossy(&table.stdout).contains("following (standby)"), "{table:?}");
    let declined = standby.admin(&["resync", LINK]);
    assert_eq!(declined.status.code(), Some(1));
    let said = String::from_utf8_lossy(&declined.stderr).into_owned();
    assert!(said.contains("us-east-1-a ships this link"), "{said}");
    for (sidecar, shipper) in regions.origin_sidecars.iter().zip([1, 0]) {
        let (_, metrics) = sidecar.http("/metrics").await;
        let line = format!("etcd_ferry_shipper{{link=\"{LINK}\",side=\"origin\"}} {shipper}");
        assert!(metrics.contains(&line), "{line} is not in:\n{metrics}");
    }
    let entry = regions.replica_sidecars[0].wait_for_state(LINK, "following").await;
    assert_eq!((&entry["role"], &entry["shipper"]), (&Value::Null, &"us-east-1-a".into()), "{entry:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sidecars_with_the_same_node_name_do_not_replace_each_other_for_ever_and_the_name_is_named() {
    let mut regions = Box::pin(Regions::prepare(RegionsOptions::default())).await;
    regions.origin_sidecars[1].options.node = regions.origin_sidecars[0].options.node.clone();
    regions.origin_sidecars[1].write_config();
    regions.start_sidecars().await;
    let told = |entry: &Value| entry["reason"].as_str().is_some_and(|r| r.contains("give each its own `node`"));
    regions.origin_sidecars[0].wait_for(LINK, "the name that is taken to be told of", told).await;
    let entry = regions.origin_sidecars[1].wait_for_state(LINK, "following").await;
    assert_eq!(entry["role"], "shipper");
    let log = regions.origin_sidecars[1].log();
    let warned =
        |line: &str| line.contains("WARN") && line.contains("if it still runs, give each sidecar its own `node`");
    assert!(log.lines().any(warned), "{log}");
    let revision = regions.origin[0].put("/app/a", "1").await;
    let before = regions.wait_applied(revision).await;
    let revision = regions.origin[0].put("/app/b", "1").await;
    assert_eq!(regions.wait_applied(revision).await.term, before.term);
    assert_eq!(entry["counts"]["elections"], 1);
}
