//! Job: a link that is paused at its replica applies nothing and loses nothing, and says who paused it.
//! Input: pairs of regions, an operator's commands, restarts. Output: passes or fails.
//! Always true: the commands are run as an operator runs them; what was applied is read from the replica's etcd.

use crate::bed::contents::{load, noise};
use crate::bed::pair::{LINK, Pair};
use crate::bed::sidecar::Sidecar;
use crate::bed::traffic::{Write, commit};
use crate::resume::wait_spooled;
use crate::verify::{outcome_of, over_app};
use etcd_ferry::model::{Change, Revision};
use serde_json::Value;

const ADMIN: &str = "spiffe://etcd-ferry.dev/admin";

fn said(sidecar: &Sidecar, arguments: &[&str]) -> (bool, String) {
    let output = sidecar.admin(arguments);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

fn done(sidecar: &Sidecar, arguments: &[&str]) -> String {
    let (success, text) = said(sidecar, arguments);
    assert!(success, "{arguments:?}: {text}");
    text
}

fn refused(sidecar: &Sidecar, arguments: &[&str]) -> String {
    let (success, text) = said(sidecar, arguments);
    assert!(!success, "{arguments:?}: {text}");
    text
}

async fn paused(sidecar: &Sidecar) -> Value {
    let is_paused = |entry: &Value| {
        let reason = entry["reason"].as_str().unwrap_or_default();
        entry["state"] == "paused"
            && reason.contains(&format!("by {ADMIN}"))
            && reason.contains("etcd-ferry resume config")
    };
    sidecar.wait_for(LINK, "paused, with by whom and what to do", is_paused).await
}

async fn put(pair: &Pair, key: &str) -> (Revision, Vec<Change>) {
    let ack = commit(
        &mut pair.origin.kv().await,
        &[Write::put(key.to_owned(), "1"), Write::put("/app/last", key.to_owned())],
    )
    .await;
    let ack = ack.unwrap().unwrap();
    (ack.revision, ack.changes)
}

async fn keys_at_replica(pair: &Pair) -> usize {
    pair.replica.read(&pair.ranges, None).await.1.len()
}

/// A pair that follows, with ten keys. Twelve seconds without progress are a stall.
async fn following() -> Pair {
    let mut options = over_app();
    options.limits.insert("stall_seconds".to_owned(), 12);
    let mut pair = Box::pin(Pair::prepare(options)).await;
    load(&pair.origin, &noise("/app/", 10, 100)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_paused_applies_nothing_also_over_restarts_and_loses_nothing_once_it_is_resumed() {
    let mut pair = following().await;
    let (before, _) = put(&pair, "/app/before").await;
    pair.wait_applied(before).await;
    let told = refused(&pair.origin_sidecar, &["pause", LINK]);
    assert!(told.contains("ask the sidecar at its other side"), "{told}");
    let told = done(&pair.replica_sidecar, &["pause", LINK]);
    assert!(told.contains(&format!("by {ADMIN}")), "{told}");
    // Whoever asks right after it is told of it.
    assert_eq!(pair.replica_sidecar.status()["links"][0]["state"], "paused");
    let recorder = pair.record().await;
    let mut written = Vec::new();
    for number in 0..5 {
        written.push(put(&pair, &format!("/app/paused/{number}")).await);
    }
    let last = written[4].0;
    let at_replica = paused(&pair.replica_sidecar).await;
    paused(&pair.origin_sidecar).await;
    // Received, so that a loss of the origin would cost nothing, and not applied.
    let durable = |entry: &Value| entry["durable_seq"] == 6 && entry["applied_seq"] == 1 && entry["rpo_revisions"] == 0;
    pair.origin_sidecar.wait_for(LINK, "the journal to have all of it", durable).await;
    assert_eq!(keys_at_replica(&pair).await, 12);
    assert_eq!(at_replica["paused"]["by"], ADMIN);
    let position = pair.position().await.unwrap();
    assert_eq!(position.paused.unwrap().by, ADMIN);

    // Paused for longer than a stall takes, it is none.
    let long = |entry: &Value| entry["lag_seconds"].as_f64().is_some_and(|seconds| seconds > 14.0);
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        sidecar.wait_for(LINK, "a lag longer than a stall takes", long).await;
        let entry = paused(sidecar).await;
        assert_eq!(
            (&entry["counts"]["stalls"], entry["stalled_seconds"].as_f64()),
            (&0.into(), Some(0.0)),
            "{entry:#}"
        );
        let (code, lines) = sidecar.http("/readyz").await;
        assert!(code == 503 && lines.contains("paused since"), "{lines}");
    }

    // Also where the replica's sidecar is started again, and where it has lost its files.
    pair.replica_sidecar.kill();
    pair.replica_sidecar.restart().await;
    assert_eq!(paused(&pair.replica_sidecar).await["paused"], at_replica["paused"]);
    pair.replica_sidecar.kill();
    std::fs::remove_dir_all(pair.replica_sidecar.data_dir()).unwrap();
    pair.replica_sidecar.restart().await;
    paused(&pair.replica_sidecar).await;
    paused(&pair.origin_sidecar).await;
    assert_eq!(keys_at_replica(&pair).await, 12);

    // Asking twice changes nothing.
    let again = done(&pair.replica_sidecar, &["pause", LINK, "--json"]);
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!((&again["paused"], &again["by"]), (&true.into(), &ADMIN.into()));
    let told = done(&pair.replica_sidecar, &["resume", LINK]);
    assert!(told.contains("its replica applies again; it was paused since"), "{told}");
    // Whoever asks right after it is not told of the pause.
    let resumed = &pair.replica_sidecar.status()["links"][0];
    assert_eq!((&resumed["state"], &resumed["reason"]), (&"following".into(), &"".into()), "{resumed:#}");
    pair.wait_applied(last).await;
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        sidecar.wait_for(LINK, "following without a reason", |e| e["state"] == "following" && e["reason"] == "").await;
    }
    assert!(done(&pair.replica_sidecar, &["resume", LINK]).contains("it was not paused"));
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    let arrived: Vec<Change> = recording.replica.revisions_with_changes(&pair.ranges).into_iter().flatten().collect();
    let wanted: Vec<Change> = written.into_iter().flat_map(|(_, changes)| changes).collect();
    for change in &wanted {
        assert!(change.key().as_ref() == b"/app/last" || arrived.contains(change), "{change:?} is lost");
    }
    assert_eq!(pair.position().await.unwrap().paused, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_base_copy_and_no_comparison_goes_past_a_pause() {
    let pair = following().await;
    let log = done(&pair.replica_sidecar, &["pause", LINK, "--json"]);
    assert!(log.contains(ADMIN));
    paused(&pair.origin_sidecar).await;
    let told = refused(&pair.origin_sidecar, &["verify", LINK]);
    assert!(told.contains("link config: it is paused at the replica"), "{told}");
    let (last, _) = put(&pair, "/app/after").await;
    wait_spooled(&pair, last).await;
    done(&pair.origin_sidecar, &["resync", LINK]);
    // Asked once more, it is the same wish: one base copy comes of it.
    let asked = outcome_of(&pair.origin_sidecar.admin(&["resync", LINK, "--json"]));
    assert_eq!((&asked["link"], &asked["asked"]), (&LINK.into(), &true.into()), "{asked}");
    let waits = |entry: &Value| {
        let reason = entry["reason"].as_str().unwrap_or_default();
        reason.contains(&format!("paused at the replica by {ADMIN}"))
            && reason.contains("waits for a base copy")
            && reason.contains("run `etcd-ferry resume config --config F`")
    };
    pair.origin_sidecar.wait_for(LINK, "to wait for the resume", waits).await;
    assert_eq!(keys_at_replica(&pair).await, 10);
    assert_eq!(pair.position().await.unwrap().epoch.0, 1);

    let resumed = outcome_of(&pair.replica_sidecar.admin(&["resume", LINK, "--json"]));
    assert_eq!((&resumed["paused"], &resumed["by"]), (&false.into(), &ADMIN.into()), "{resumed}");
    let copied = |entry: &Value| entry["state"] == "following" && entry["epoch"] == 2 && entry["reason"] == "";
    pair.origin_sidecar.wait_for(LINK, "the base copy", copied).await;
    pair.wait_equal().await;
    assert!(done(&pair.origin_sidecar, &["verify", LINK]).contains("equal"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_nothing_was_applied_of_is_not_paused() {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    pair.replica_sidecar.restart().await;
    let told = refused(&pair.replica_sidecar, &["pause", LINK]);
    assert!(told.contains("link config: nothing of the link was ever applied here"), "{told}");
}
