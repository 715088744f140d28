//! Job: one of the replica's sidecars that receives nothing knows of the link what the other one knows, and an operator may ask either.
//! Input: regions with two sidecars beside the replica, of which the origin reaches the first alone. Output: passes or fails.
//! Always true: the commands are run as an operator runs them; what became of the link is read from the replica's etcd.

use crate::bed::contents::{load, noise};
use crate::bed::pair::LINK;
use crate::bed::regions::{Regions, RegionsOptions};
use crate::bed::sidecar::Sidecar;
use crate::bed::traffic::{Traffic, TrafficOptions, Write, commit};
use crate::bed::{PATIENCE, until};
use etcd_ferry::model::{Phase, Position, Revision, Seq};
use serde_json::Value;

/// The link follows; the replica's second sidecar is up, and no origin can reach it.
async fn beside_an_idle_one(limits: &[(&str, u64)], configure: impl Fn(&mut Sidecar)) -> Regions {
    let limits = limits.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect();
    let options = RegionsOptions { sidecars: (1, 2), limits, ..RegionsOptions::default() };
    let mut regions = Box::pin(Regions::prepare(options)).await;
    for sidecar in &mut regions.replica_sidecars {
        configure(sidecar);
        sidecar.write_config();
    }
    regions.peer_lines[0][1].cut();
    load(&regions.origin[0], &noise("/app/", 200, 100)).await;
    regions.start_sidecars().await;
    regions.wait_following().await;
    regions
}

fn sidecars(regions: &Regions) -> (&Sidecar, &Sidecar) {
    (&regions.replica_sidecars[0], &regions.replica_sidecars[1])
}

fn done(sidecar: &Sidecar, arguments: &[&str]) -> String {
    let output = sidecar.admin(arguments);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {text}");
    text
}

async fn delete(regions: &Regions, prefix: &str) -> Revision {
    let writes = [Write::delete_prefix(prefix.to_owned())];
    commit(&mut regions.origin[0].kv().await, &writes).await.unwrap().unwrap().revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_at_the_sidecar_that_receives_is_seen_and_ended_at_the_idle_one() {
    let regions = Box::pin(beside_an_idle_one(&[], |_| {})).await;
    let (receives, idle) = sidecars(&regions);
    let position = regions.wait_applied(regions.origin[0].put("/app/first", "1").await).await;
    let knows = |entry: &Value| {
        let revision = entry["origin_revision"].as_u64();
        entry["state"] == "connecting"
            && entry["applied_seq"] == position.seq.0
            && revision >= Some(position.origin_revision.0)
    };
    idle.wait_for(LINK, "the idle sidecar to show how far the other one has come", knows).await;

    // At once: the idle one may not have looked since.
    done(receives, &["pause", LINK]);
    assert!(done(idle, &["resume", LINK]).contains("its replica applies again; it was paused since"));
    regions.wait_applied(regions.origin[0].put("/app/second", "1").await).await;

    done(receives, &["pause", LINK]);
    let paused = |entry: &Value| {
        let reason = entry["reason"].as_str().unwrap_or_default();
        entry["state"] == "paused" && !entry["paused"].is_null() && reason.contains("etcd-ferry resume config")
    };
    idle.wait_for(LINK, "the idle sidecar to show the pause", paused).await;
    let last = regions.origin[0].put("/app/third", "1").await;
    assert!(done(idle, &["resume", LINK]).contains("its replica applies again"));
    regions.wait_applied(last).await;
    let over = |entry: &Value| {
        let reason = entry["reason"].as_str().unwrap_or_default();
        entry["state"] == "connecting" && entry["paused"].is_null() && !reason.contains("paused")
    };
    idle.wait_for(LINK, "the idle sidecar to show that it is over", over).await;
    assert!(!idle.log().contains("the position moved back"), "{}", idle.log());
    regions.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_sidecar_pauses_and_resumes_a_link_that_the_other_one_applies_all_the_time() {
    let regions = Box::pin(beside_an_idle_one(&[], |_| {})).await;
    let (_, idle) = sidecars(&regions);
    let options = TrafficOptions {
        prefix: "/app/traffic/".to_owned(),
        writes_per_writer: 1_000_000,
        value_bytes_max: 1_024,
        ..TrafficOptions::default()
    };
    let traffic = Traffic::start(&regions.origin[0].access(), &options);
    let mut before = regions.position().await;
    for round in 0..16 {
        let moves = async || regions.try_position().await.filter(|now| now.seq.0 > before.seq.0 + 50);
        until("the other sidecar to apply", PATIENCE, moves).await;
        done(idle, &["pause", LINK]);
        before = regions.position().await;
        assert!(before.paused.is_some(), "round {round}: {before:?}");
        done(idle, &["resume", LINK]);
    }
    let written = traffic.stop().await;
    regions.wait_applied(written.last().unwrap().revision).await;
    regions.assert_equal().await;
}

async fn held(sidecar: &Sidecar, revision: Revision) -> Value {
    let words = format!("revision {revision} ");
    let holds = |entry: &Value| {
        entry["state"] == "held" && entry["reason"].as_str().is_some_and(|reason| reason.contains(&words))
    };
    sidecar.wait_for(LINK, &format!("held, with {words:?}"), holds).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_back_is_allowed_at_the_idle_sidecar_and_stays_held_there_without_a_word_until_then() {
    let share = |sidecar: &mut Sidecar| sidecar.options.receive[0].revision_deletes_share_max = Some(0.25);
    let mut regions = Box::pin(beside_an_idle_one(&[], share)).await;
    let first = delete(&regions, "/app/0000").await;
    let (receives, idle) = sidecars(&regions);
    held(receives, first).await;
    // At once: the idle one may not have looked since.
    assert!(done(idle, &["allow", LINK]).contains(&format!("revision {first} ")));
    regions.wait_applied(first).await;

    let second = delete(&regions, "/app/").await;
    held(receives, second).await;
    held(idle, second).await;
    let earlier = idle.log().len();
    regions.replica_sidecars[1].restart().await;
    let (_, idle) = sidecars(&regions);
    held(idle, second).await;
    // It looks again each second at least.
    let lag = |entry: &Value| entry["lag_seconds"].as_f64().unwrap_or_default();
    let since = lag(&regions.origin_sidecars[0].wait_for_state(LINK, "held").await);
    let long = |entry: &Value| lag(entry) > since + 5.0;
    regions.origin_sidecars[0].wait_for(LINK, "some looks", long).await;
    let log = idle.log().split_off(earlier);
    assert_eq!((log.matches("applying is held").count(), log.matches("applying goes on").count()), (1, 0), "{log}");
    done(idle, &["allow", LINK]);
    regions.wait_applied(second).await;
    let over = |entry: &Value| entry["state"] == "connecting" && !entry["reason"].to_string().contains("revision");
    idle.wait_for(LINK, "the idle sidecar to show that nothing is held back", over).await;
    regions.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_sidecar_that_receives_has_quarantined_is_shown_and_discarded_at_the_idle_one() {
    let quarantines = |sidecar: &mut Sidecar| sidecar.options.receive[0].on_poison = Some("quarantine".to_owned());
    let regions = Box::pin(beside_an_idle_one(&[("request_bytes_max", 64 << 10)], quarantines)).await;
    let (_, idle) = sidecars(&regions);
    regions.origin[0].put("/app/large", "s".repeat(80_000)).await;
    let skipped = async || regions.try_position().await.filter(|position| position.skipped == [Seq(1)]);
    until("the revision to be quarantined", PATIENCE, skipped).await;
    // At once: the idle one may not have looked since.
    let shown = done(idle, &["quarantine", "show", LINK, "1"]);
    assert!(shown.contains("/app/large: a value of 80000 bytes"), "{shown}");
    let listed = |entry: &Value| entry["quarantined_revisions"] == 1;
    idle.wait_for(LINK, "the idle sidecar to list it", listed).await;
    done(idle, &["quarantine", "discard", LINK, "1"]);
    let follows = |position: &Position| position.state == Phase::Following && position.skipped.is_empty();
    assert!(follows(&regions.position().await));
    let none = |entry: &Value| entry["quarantined_revisions"] == 0;
    for sidecar in &regions.replica_sidecars {
        sidecar.wait_for(LINK, "nothing in quarantine", none).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_quarantine_that_is_relieved_at_the_idle_sidecar_lets_the_other_one_go_on() {
    let configure = |sidecar: &mut Sidecar| {
        sidecar.options.limits.insert("request_bytes_max".to_owned(), 64 << 10);
        sidecar.options.receive[0].on_poison = Some("quarantine".to_owned());
    };
    let regions = Box::pin(beside_an_idle_one(&[], configure)).await;
    let (receives, idle) = sidecars(&regions);
    for number in 0..33 {
        regions.origin[0].put(format!("/app/large/{number}"), vec![b's'; 80_000]).await;
    }
    let entry = receives.wait_for_state(LINK, "held").await;
    assert!(entry["reason"].as_str().unwrap().contains("mend the cause, or discard one"), "{entry:#}");
    done(idle, &["quarantine", "discard", LINK, "1"]);
    let position = regions.wait_applied(regions.origin[0].put("/app/after", "1").await).await;
    assert_eq!(position.skipped, (2..=33).map(Seq).collect::<Vec<_>>());
}
