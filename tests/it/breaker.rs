//! Job: what deletes much of a link is held back at the replica before anything of it is applied, until a person allows it, once.
//! Input: pairs of regions, deletes of many keys at once or within a minute, restarts. Output: passes or fails.
//! Always true: the commands are run as an operator runs them; what was applied is read from the replica's etcd.

use crate::bed::contents::{load, noise};
use crate::bed::pair::{LINK, Pair};
use crate::bed::sidecar::Sidecar;
use crate::bed::traffic::{Write, commit};
use crate::bed::{PATIENCE, until};
use crate::resume::wait_spooled;
use crate::verify::{outcome_of, over_app};
use etcd_ferry::model::{Change, Revision};
use serde_json::Value;
use std::process::Output;

/// A pair that follows with so many keys, `/app/000000` and on; nothing is asked but what `shares` say.
async fn watched(keys: usize, shares: (Option<f64>, Option<f64>)) -> Pair {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    let receive = &mut pair.replica_sidecar.options.receive[0];
    (receive.revision_deletes_share_max, receive.minute_deletes_share_max) = shares;
    pair.replica_sidecar.write_config();
    load(&pair.origin, &noise("/app/", keys, 100)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

async fn delete(pair: &Pair, prefix: &str) -> (Revision, Vec<Change>) {
    let ack = commit(&mut pair.origin.kv().await, &[Write::delete_prefix(prefix.to_owned())]).await.unwrap().unwrap();
    (ack.revision, ack.changes)
}

async fn held(sidecar: &Sidecar, words: &[String]) {
    let holds = |entry: &Value| {
        let reason = entry["reason"].as_str().unwrap_or_default();
        entry["state"] == "held" && words.iter().all(|word| reason.contains(word))
    };
    sidecar.wait_for(LINK, &format!("held, with {words:?}"), holds).await;
}

async fn keys_at_replica(pair: &Pair) -> usize {
    pair.replica.read(&pair.ranges, None).await.1.len()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn allow(sidecar: &Sidecar) -> String {
    let output = sidecar.admin(&["allow", LINK]);
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revision_that_deletes_more_than_the_share_is_held_back_also_over_restarts_until_it_is_allowed_once() {
    let mut pair = Box::pin(watched(200, (Some(0.25), None))).await;
    let (within, _) = delete(&pair, "/app/00000").await;
    pair.wait_applied(within).await;
    assert_eq!(keys_at_replica(&pair).await, 190, "ten of two hundred pass");
    let nothing = pair.replica_sidecar.admin(&["allow", LINK]);
    assert!(!nothing.status.success() && said(&nothing).contains("nothing is held back"), "{}", said(&nothing));

    let recorder = pair.record().await;
    let (deleted, changes) = delete(&pair, "/app/0000").await;
    let after = pair.origin.put("/app/after", "1").await;
    let words = [
        format!("revision {deleted} (seq 2) deletes 90 keys, of 190"),
        "etcd-ferry allow config 2 --config".to_owned(),
    ];
    held(&pair.replica_sidecar, &words).await;
    held(&pair.origin_sidecar, &words).await;
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        let (code, lines) = sidecar.http("/readyz").await;
        assert!(code == 503 && lines.contains("held"), "{lines}");
    }
    let verify = pair.origin_sidecar.admin(&["verify", LINK]);
    assert!(!verify.status.success() && said(&verify).contains("it is held at the replica"), "{}", said(&verify));
    let (_, metrics) = pair.replica_sidecar.http("/metrics").await;
    for line in [
        format!("etcd_ferry_held_back_total{{link=\"{LINK}\",side=\"replica\"}} 1"),
        format!("etcd_ferry_link_state{{link=\"{LINK}\",side=\"replica\",state=\"held\"}} 1"),
    ] {
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    }
    assert!(pair.replica_sidecar.log().contains("applying is held"));
    // The origin goes on spooling, and nothing of it is in.
    wait_spooled(&pair, after).await;
    assert_eq!(keys_at_replica(&pair).await, 190);

    // Also where its sidecar is killed, and starts without its files.
    pair.replica_sidecar.kill();
    pair.replica_sidecar.restart().await;
    held(&pair.replica_sidecar, &words).await;
    pair.replica_sidecar.kill();
    std::fs::remove_dir_all(pair.replica_sidecar.data_dir()).unwrap();
    pair.replica_sidecar.restart().await;
    held(&pair.replica_sidecar, &words).await;
    held(&pair.origin_sidecar, &words).await;
    assert_eq!(keys_at_replica(&pair).await, 190);

    let elsewhere = pair.origin_sidecar.admin(&["allow", LINK]);
    assert!(!elsewhere.status.success() && said(&elsewhere).contains("ask the sidecar at its other side"));
    let told = allow(&pair.replica_sidecar);
    assert!(told.contains(&format!("revision {deleted} (seq 2) goes through")) && told.contains("90 of 190"), "{told}");
    pair.wait_applied(after).await;
    // Whoever did not hear the answer asks again; that allows nothing of what is still to come.
    let done = pair.replica_sidecar.admin(&["allow", LINK]);
    assert!(!done.status.success() && said(&done).contains("nothing is held back"), "{}", said(&done));
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        sidecar.wait_for(LINK, "following without a reason", |e| e["state"] == "following" && e["reason"] == "").await;
    }
    let recording = pair.recorded(recorder).await;
    let arrived = recording.replica.revisions_with_changes(&pair.ranges);
    assert!(arrived[0] == changes, "it arrives whole");

    // It was allowed once.
    let (again, _) = delete(&pair, "/app/").await;
    held(&pair.replica_sidecar, &[format!("revision {again} (seq 4) deletes 101 keys, of 101")]).await;
    assert_eq!(keys_at_replica(&pair).await, 101);
    assert_eq!(pair.position().await.unwrap().held_back.unwrap().revision, again);
    // Nor does whoever repeats the first call let another revision through, where they say which one they mean.
    let repeated = pair.replica_sidecar.admin(&["allow", LINK, "2"]);
    let told = said(&repeated);
    assert!(!repeated.status.success() && told.contains("seq 2 is not held back for its deletes; seq 4 is"), "{told}");
    assert!(!pair.position().await.unwrap().held_back.unwrap().allowed);
    let allowed = outcome_of(&pair.replica_sidecar.admin(&["allow", LINK, "4", "--json"]));
    assert_eq!((&allowed["origin_revision"], &allowed["minute"]), (&again.0.into(), &false.into()), "{allowed}");
    assert_eq!((&allowed["deletes"], &allowed["keys"]), (&101.into(), &101.into()), "{allowed}");
    let position = pair.wait_applied(again).await;
    assert_eq!((keys_at_replica(&pair).await, position.held_back), (0, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minute_that_deletes_more_than_the_share_is_held_back_and_watched_again_after_it_was_allowed() {
    let mut pair = Box::pin(watched(1_000, (None, Some(0.025)))).await;
    for tens in ["00001", "00002"] {
        let (deleted, _) = delete(&pair, &format!("/app/{tens}")).await;
        pair.wait_applied(deleted).await;
    }
    let (third, _) = delete(&pair, "/app/00003").await;
    let after = pair.origin.put("/app/after", "1").await;
    let words = [format!("with revision {third} (seq 3) 30 keys are deleted within a minute, of 1000")];
    held(&pair.replica_sidecar, &words).await;
    assert_eq!(keys_at_replica(&pair).await, 980);
    pair.replica_sidecar.restart().await;
    held(&pair.replica_sidecar, &words).await;
    assert_eq!(keys_at_replica(&pair).await, 980, "a restart does not begin a new minute for it");
    let told = allow(&pair.replica_sidecar);
    assert!(told.contains("30 of 1000"), "{told}");
    pair.wait_applied(after).await;

    // The minute begins afresh: ten pass, and ten more, and then no more.
    for tens in ["00004", "00005"] {
        let (deleted, _) = delete(&pair, &format!("/app/{tens}")).await;
        pair.wait_applied(deleted).await;
    }
    let (sixth, _) = delete(&pair, "/app/00006").await;
    held(&pair.replica_sidecar, &[format!("with revision {sixth} (seq 7)")]).await;
    allow(&pair.replica_sidecar);
    pair.wait_applied(sixth).await;
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_revisions_that_wait_together_those_before_the_one_that_is_held_back_are_applied() {
    let mut pair = Box::pin(watched(100, (Some(0.5), None))).await;
    pair.replica_sidecar.kill();
    for number in 0..20 {
        pair.origin.put(format!("/app/before/{number}"), "1").await;
    }
    let (deleted, _) = delete(&pair, "/app/0").await;
    for number in 0..20 {
        pair.origin.put(format!("/app/next/{number}"), "1").await;
    }
    pair.replica_sidecar.restart().await;
    held(&pair.replica_sidecar, &[format!("revision {deleted} (seq 21) deletes 100 keys, of 120")]).await;
    until("what comes before it", PATIENCE, async || (keys_at_replica(&pair).await == 120).then_some(())).await;
    allow(&pair.replica_sidecar);
    pair.wait_equal().await;
}
