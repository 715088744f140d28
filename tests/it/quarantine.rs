//! Job: a revision that the replica refuses whenever it is tried stops the link, or is quarantined where the configuration says so.
//! Input: pairs of regions, values larger than a request, rights that are missing. Output: passes or fails.
//! Always true: the commands are run as an operator runs them; what arrived is judged by the replica's etcd.

use crate::bed::contents::{load, noise};
use crate::bed::etcd::EtcdOptions;
use crate::bed::pair::{LINK, Pair, PairOptions, link_name};
use crate::bed::sidecar::Sidecar;
use crate::bed::traffic::{Write, commit};
use crate::bed::{PATIENCE, until};
use crate::calls::admin_of;
use crate::verify::{assert_verified, outcome_of, over_app, verify};
use bytes::Bytes;
use etcd_client::{Permission, PermissionType};
use etcd_ferry::admin::proto::QuarantinedRequest;
use etcd_ferry::model::{Change, KeyRange, LINKS_PREFIX, Revision, Seq};
use serde_json::Value;
use std::process::Output;
use tonic::Response;

/// What the replica's sidecar takes for its etcd's `--max-request-bytes`.
const REQUEST_BYTES: u64 = 64 << 10;
const USER: &str = "ferry";
const PASSWORD: &str = "pass";

/// A pair that follows, with a replica that takes small requests only.
async fn narrow(on_poison: &str) -> Pair {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    let replica = &mut pair.replica_sidecar.options;
    replica.limits.insert("request_bytes_max".to_owned(), REQUEST_BYTES);
    replica.receive[0].on_poison = Some(on_poison.to_owned());
    pair.replica_sidecar.write_config();
    load(&pair.origin, &noise("/app/", 50, 100)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

fn too_large(fill: char) -> String {
    fill.to_string().repeat(80_000)
}

/// The replica's sidecar takes large requests from now on.
async fn widen(pair: &mut Pair) {
    pair.replica_sidecar.options.limits.insert("request_bytes_max".to_owned(), 1_572_864);
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    connected(&pair.replica_sidecar).await;
}

async fn connected(sidecar: &Sidecar) {
    sidecar.wait_for(LINK, "an open stream", |entry| entry["stages"][0]["ok"] == true && entry["reason"] == "").await;
}

/// `quarantine list`, once there are so many; the status is a quarter of a second old.
async fn list(sidecar: &Sidecar, count: usize) -> Vec<Value> {
    quarantined(sidecar, count as u64).await;
    let output = sidecar.admin(&["quarantine", "list", LINK, "--json"]);
    let all = outcome_of(&output).as_array().unwrap().clone();
    assert_eq!(all.len(), count, "{all:?}");
    all
}

async fn quarantined(sidecar: &Sidecar, count: u64) {
    let what = format!("{count} revisions in quarantine");
    sidecar.wait_for(LINK, &what, |entry| entry["quarantined_revisions"] == count).await;
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn assert_done(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    said(output)
}

async fn put_large(pair: &Pair) -> Revision {
    let writes = [Write::put("/app/large", too_large('s')), Write::put("/app/beside", "old")];
    commit(&mut pair.origin.kv().await, &writes).await.unwrap().unwrap().revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revision_that_does_not_fit_is_quarantined_and_its_keys_come_back_with_their_present_values() {
    let mut pair = Box::pin(narrow("quarantine")).await;
    let recorder = pair.record().await;
    let poisoned = put_large(&pair).await;
    let beside = pair.origin.put("/app/beside", "new").await;
    let position = pair.wait_applied(beside).await;
    assert_eq!((position.skipped, position.seq), (vec![Seq(1)], Seq(2)));
    assert_eq!(pair.replica.get("/app/large").await, None);

    // What is told, at both sides.
    let all = list(&pair.replica_sidecar, 1).await;
    assert_eq!((&all[0]["seq"], &all[0]["keys"]), (&1.into(), &2.into()));
    assert_eq!(all[0]["origin_revision"], poisoned.0);
    assert!(all[0]["reason"].as_str().unwrap().contains("request_bytes_max"), "{}", all[0]);
    let shown = assert_done(&pair.replica_sidecar.admin(&["quarantine", "show", LINK, "1"]));
    for words in ["/app/large: a value of 80000 bytes", "/app/beside: a value of 3 bytes", "refused once"] {
        assert!(shown.contains(words), "{words} is not in {shown}");
    }
    assert!(!shown.contains("sss"), "no value is shown");
    let shown = outcome_of(&pair.replica_sidecar.admin(&["quarantine", "show", LINK, "1", "--json"]));
    let (first, second) = (&shown["keys"][0], &shown["keys"][1]);
    assert_eq!((&shown["seq"], &first["key"]), (&1.into(), &"/app/beside".into()), "{shown}");
    assert_eq!((&second["deleted"], &second["value_bytes"]), (&false.into(), &80_000.into()), "{shown}");
    for (sidecar, side) in [(&pair.replica_sidecar, "replica"), (&pair.origin_sidecar, "origin")] {
        quarantined(sidecar, 1).await;
        let (code, ready) = sidecar.http("/readyz").await;
        assert_eq!(code, 200, "{ready}");
        assert!(ready.contains(&format!("{LINK} {side}: 1 revision in quarantine")), "{ready}");
        let (_, metrics) = sidecar.http("/metrics").await;
        let line = format!("etcd_ferry_quarantined_revisions{{link=\"{LINK}\",side=\"{side}\"}} 1");
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
        assert!(said(&sidecar.admin(&["status"])).contains("quarantine list config"));
    }
    let log = pair.replica_sidecar.log();
    assert!(log.contains("a revision is quarantined") && !log.contains("sss") && !log.contains("/app/large"));

    // Both sides differ, and that is expected; a repair leaves those keys alone.
    let (code, outcome) = verify(&pair);
    assert_eq!((code, outcome["outcome"].as_str()), (Some(1), Some("different")), "{outcome}");
    assert_eq!((&outcome["differing_keys"], &outcome["expected_keys"]), (&1.into(), &1.into()), "{outcome}");
    pair.replica.put("/app/000007", "by hand").await;
    let repaired = outcome_of(&pair.origin_sidecar.admin(&["repair", LINK, "--json"]));
    assert_eq!(repaired["outcome"], "mended", "{repaired}");
    assert_eq!((&repaired["differing_keys"], &repaired["expected_keys"]), (&2.into(), &1.into()), "{repaired}");
    let closed =
        |entry: &Value| entry["foreign_writes"]["keys"] == 0 && entry["foreign_writes"]["checked_revision"] != 0;
    pair.replica_sidecar.wait_for(LINK, "what somebody else wrote to be mended", closed).await;

    // While it still does not fit, a retry says so, and nothing changes.
    let refused = pair.replica_sidecar.admin(&["quarantine", "retry", LINK, "1"]);
    assert!(!refused.status.success() && said(&refused).contains("refused again"), "{}", said(&refused));
    assert_eq!(pair.replica.get("/app/beside").await, Some(Bytes::from_static(b"new")));
    widen(&mut pair).await;
    let mended = assert_done(&pair.replica_sidecar.admin(&["quarantine", "retry", LINK, "1"]));
    assert!(mended.contains("2 put, 0 deleted"), "{mended}");
    // Whoever did not hear the answer asks again.
    let again = pair.replica_sidecar.admin(&["quarantine", "retry", LINK, "1"]);
    assert!(!again.status.success() && said(&again).contains("seq 1 is not in quarantine"), "{}", said(&again));
    assert_verified(&pair);
    list(&pair.replica_sidecar, 0).await;
    assert_eq!(pair.position().await.unwrap().skipped, []);
    let kept = pair.replica.get(link_name(LINK).quarantine_key(position.epoch, Seq(1)).to_vec()).await;
    assert_eq!(kept, None, "its record goes with it");

    let recording = pair.recorded(recorder).await;
    let old = Change::Put { key: "/app/beside".into(), value: "old".into() };
    let replayed = recording.replica.revisions_with_changes(&pair.ranges).concat().contains(&old);
    assert!(!replayed, "an old value was written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quarantine_outlives_restarts_of_both_sidecars_and_a_lost_data_folder_and_is_neither_applied_nor_a_conflict()
{
    let mut pair = Box::pin(narrow("quarantine")).await;
    put_large(&pair).await;
    pair.wait_applied(pair.origin.put("/app/after", "1").await).await;
    let before = list(&pair.replica_sidecar, 1).await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.wait_applied(pair.origin.put("/app/after", "2").await).await;
    assert_eq!(list(&pair.replica_sidecar, 1).await, before);
    // The origin's spool still has it: it is asked for from the position on, which has passed it.
    pair.replica_sidecar.kill();
    std::fs::remove_dir_all(pair.replica_sidecar.data_dir()).unwrap();
    std::fs::remove_dir_all(pair.origin_sidecar.data_dir()).unwrap();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let position = pair.wait_applied(pair.origin.put("/app/after", "3").await).await;
    assert_eq!((position.seq, position.skipped), (Seq(4), vec![Seq(1)]));
    assert_eq!(list(&pair.replica_sidecar, 1).await, before);
    assert_eq!(pair.replica.get("/app/large").await, None);

    // A new base copy brings every key, and nothing is skipped in its epoch.
    widen(&mut pair).await;
    for _ in 0..2 {
        let asked = outcome_of(&pair.origin_sidecar.admin(&["resync", LINK, "--json"]));
        assert_eq!((&asked["link"], &asked["asked"]), (&LINK.into(), &true.into()), "{asked}");
    }
    pair.wait_equal().await;
    let epoch = position.epoch;
    until("the new epoch", PATIENCE, async || {
        pair.position().await.filter(|p| p.epoch > epoch && p.skipped.is_empty())
    })
    .await;
    quarantined(&pair.replica_sidecar, 0).await;
    let kept = pair.replica.get(link_name(LINK).quarantine_key(epoch, Seq(1)).to_vec()).await;
    assert_eq!(kept, None, "the records go with the epoch");
    // It was asked twice, and the link goes on.
    pair.wait_applied(pair.origin.put("/app/after", "4").await).await;
    pair.assert_equal().await;
}

/// The sidecar is configured with more than its etcd takes at first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn once_the_replicas_etcd_takes_more_what_was_refused_is_retried_and_what_follows_is_applied() {
    let replica = EtcdOptions { max_request_bytes: Some(REQUEST_BYTES), sync: false, ..EtcdOptions::replica() };
    let mut pair = Box::pin(Pair::prepare(PairOptions { replica, ..over_app() })).await;
    pair.replica_sidecar.options.receive[0].on_poison = Some("quarantine".to_owned());
    pair.replica_sidecar.write_config();
    pair.origin.put("/app/beside", "old").await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let takes = |bytes: u64| move |entry: &Value| entry["limits"]["replica"]["request_bytes_max"] == bytes;
    pair.replica_sidecar.wait_for(LINK, "the etcd's limit to be known", takes(REQUEST_BYTES)).await;
    put_large(&pair).await;
    let all = list(&pair.replica_sidecar, 1).await;
    let reason = all[0]["reason"].as_str().unwrap();
    assert!(reason.contains(&format!("the replica's etcd takes {REQUEST_BYTES}:")), "{reason}");

    pair.replica.set_max_request_bytes(1_572_864);
    pair.replica.restart().await;
    pair.replica_sidecar.wait_for(LINK, "the etcd's new limit to be known", takes(1_572_864)).await;
    let later = pair.origin.put("/app/later", &*too_large('t')).await;
    let position = pair.wait_applied(later).await;
    assert_eq!(position.skipped, [Seq(1)], "nothing else is in quarantine");
    assert_done(&pair.replica_sidecar.admin(&["quarantine", "retry", LINK, "1"]));
    pair.wait_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_quarantine_holds_the_link_until_one_is_discarded() {
    let pair = Box::pin(narrow("quarantine")).await;
    let mut last = Revision(0);
    for number in 0..33 {
        last = pair.origin.put(format!("/app/large/{number}"), too_large('s')).await;
    }
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        let entry = sidecar.wait_for_state(LINK, "held").await;
        let reason = entry["reason"].as_str().unwrap();
        assert!(reason.contains("32 revisions are in quarantine") && reason.contains(&last.to_string()), "{reason}");
        assert_eq!(sidecar.http("/readyz").await.0, 503);
    }
    assert!(pair.replica_sidecar.log().contains("applying is held"));
    let unknown = pair.replica_sidecar.admin(&["quarantine", "discard", LINK, "99"]);
    assert!(!unknown.status.success() && said(&unknown).contains("seq 99 is not in quarantine; there is seq 1, 2"));
    let elsewhere = pair.origin_sidecar.admin(&["quarantine", "discard", LINK, "1"]);
    assert!(
        !elsewhere.status.success() && said(&elsewhere).contains("ask the sidecar at its other side"),
        "{}",
        said(&elsewhere)
    );
    let elsewhere = pair.origin_sidecar.admin(&["quarantine", "list", LINK]);
    assert!(!elsewhere.status.success() && said(&elsewhere).contains("ask the sidecar at its other side"));

    assert_done(&pair.replica_sidecar.admin(&["quarantine", "discard", LINK, "1"]));
    let position = pair.wait_applied(pair.origin.put("/app/after", "1").await).await;
    assert_eq!(position.skipped, (2..=33).map(Seq).collect::<Vec<Seq>>());
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        sidecar.wait_for(LINK, "following without a reason", |e| e["state"] == "following" && e["reason"] == "").await;
    }
    // What was discarded is not expected to differ any more.
    let (_, outcome) = verify(&pair);
    assert_eq!((&outcome["differing_keys"], &outcome["expected_keys"]), (&33.into(), &32.into()), "{outcome}");
}

fn app() -> KeyRange {
    KeyRange::prefix(b"/app/")
}

fn forbidden() -> KeyRange {
    KeyRange::prefix(b"/app/forbidden/")
}

/// A pair that follows, whose user at the replica may not write below `/app/forbidden/`.
async fn with_a_forbidden_folder(on_poison: &str) -> Pair {
    let quick = |options| EtcdOptions { sync: false, ..options };
    let replica = EtcdOptions { auth: true, ..quick(EtcdOptions::replica()) };
    let mut pair = Box::pin(Pair::prepare(PairOptions { replica, ..over_app() })).await;
    let before = KeyRange { from: app().from, to: forbidden().from };
    let after = KeyRange { from: forbidden().to, to: app().to };
    let reads = KeyRange { from: app().from, to: KeyRange::prefix(LINKS_PREFIX).to };
    let folder = KeyRange::prefix(&link_name(LINK).folder());
    let rights = [
        (PermissionType::Read, reads),
        (PermissionType::Readwrite, before),
        (PermissionType::Readwrite, after),
        (PermissionType::Readwrite, folder),
    ];
    pair.replica.add_user(USER, PASSWORD, &rights).await;
    pair.replica_sidecar.options.etcd.user = Some((USER.into(), PASSWORD.into()));
    pair.replica_sidecar.options.receive[0].on_poison = Some(on_poison.to_owned());
    pair.replica_sidecar.write_config();
    load(&pair.origin, &noise("/app/", 50, 100)).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

async fn grant_all(pair: &Pair) {
    let permission =
        Permission::new(PermissionType::Readwrite, forbidden().etcd_from()).with_range_end(forbidden().etcd_end());
    pair.replica.client().await.role_grant_permission(USER, permission).await.unwrap();
}

/// Forty revisions that wait together at the replica, of which the 23rd and the 24th are not permitted.
async fn merged(pair: &mut Pair) -> Revision {
    pair.replica_sidecar.kill();
    let mut last = Revision(0);
    for number in 1..=40 {
        let key = if [23, 24].contains(&number) { "/app/forbidden/" } else { "/app/free/" };
        last = pair.origin.put(format!("{key}{number}"), format!("{number}")).await;
    }
    pair.replica_sidecar.restart().await;
    last
}

/// While the origin does not answer, a revision is retried twice. What is put and deleted, as the last call is told; the first is told of it.
async fn retried_twice_at_once(pair: &Pair, seq: u64) -> (u64, u64) {
    let admin = admin_of(&pair.replica_sidecar).await;
    let retry = || {
        let mut admin = admin.clone();
        let asked = QuarantinedRequest { link: LINK.to_owned(), seq };
        tokio::spawn(async move { admin.retry_quarantined(asked).await.map(Response::into_inner) })
    };
    pair.origin_sidecar.pause();
    let retries = [retry(), retry()];
    let superseded = "another retry was asked for meanwhile, whose answer counts";
    until(superseded, PATIENCE, async || pair.replica_sidecar.log().contains(superseded).then_some(())).await;
    pair.origin_sidecar.resume();
    let mut told = Vec::new();
    for retried in retries {
        told.push(retried.await.unwrap());
    }
    let refused = told.iter().filter_map(|told| told.as_ref().err()).map(tonic::Status::message);
    assert_eq!(refused.collect::<Vec<_>>(), [format!("link {LINK}: {superseded}")]);
    let done: Vec<_> = told.into_iter().filter_map(Result::ok).collect();
    assert_eq!(done.len(), 1, "{done:?}");
    (done[0].puts, done[0].deletes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_permitted_is_singled_out_of_merged_revisions_and_brought_back_once_it_is() {
    let mut pair = Box::pin(with_a_forbidden_folder("quarantine")).await;
    let last = merged(&mut pair).await;
    let position = pair.wait_applied(last).await;
    assert_eq!((position.seq, position.skipped), (Seq(40), vec![Seq(23), Seq(24)]));
    let (_, there) = pair.replica.read(&pair.ranges, None).await;
    assert_eq!(there.len(), 50 + 38);
    let all = list(&pair.replica_sidecar, 2).await;
    assert!(all.iter().all(|entry| entry["reason"].as_str().unwrap().contains("needs the right")), "{all:?}");
    connected(&pair.replica_sidecar).await;
    // What the origin has deleted meanwhile is deleted, and not written as it was.
    pair.origin.kv().await.delete("/app/forbidden/24", None).await.unwrap();
    grant_all(&pair).await;
    pair.wait_applied(pair.origin.put("/app/free/after", "1").await).await;
    assert_eq!(retried_twice_at_once(&pair, 23).await, (1, 0));
    let mended = outcome_of(&pair.replica_sidecar.admin(&["quarantine", "retry", LINK, "24", "--json"]));
    assert_eq!((&mended["seq"], &mended["puts"]), (&24.into(), &0.into()), "{mended}");
    assert_eq!((&mended["link"], &mended["deletes"]), (&LINK.into(), &1.into()), "{mended}");
    assert_eq!(pair.assert_equal().await, 50 + 38 + 1 + 1);
    assert_eq!(pair.position().await.unwrap().skipped, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_default_the_link_does_not_go_past_what_is_not_permitted_names_it_and_goes_on_once_it_is() {
    let mut pair = Box::pin(with_a_forbidden_folder("stop")).await;
    let last = merged(&mut pair).await;
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        let named = |entry: &Value| {
            let reason = entry["reason"].as_str().unwrap_or_default();
            reason.contains("(seq 23) is refused") && reason.contains("needs the right")
        };
        sidecar.wait_for(LINK, "the revision that is refused", named).await;
    }
    let position = pair.position().await.unwrap();
    assert_eq!((position.seq, position.skipped), (Seq(22), Vec::new()), "what comes before it is in");
    grant_all(&pair).await;
    pair.wait_applied(last).await;
    assert_eq!(pair.assert_equal().await, 50 + 40);
    for sidecar in [&pair.replica_sidecar, &pair.origin_sidecar] {
        sidecar.wait_for(LINK, "no reason any more", |entry| entry["reason"] == "").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_discarded_differs_until_a_repair_mends_it() {
    let mut pair = Box::pin(narrow("quarantine")).await;
    put_large(&pair).await;
    pair.wait_applied(pair.origin.put("/app/after", "1").await).await;
    let (_, outcome) = verify(&pair);
    assert_eq!((&outcome["differing_keys"], &outcome["expected_keys"]), (&2.into(), &2.into()), "{outcome}");
    quarantined(&pair.origin_sidecar, 1).await;
    let discarded = outcome_of(&pair.replica_sidecar.admin(&["quarantine", "discard", LINK, "1", "--json"]));
    assert_eq!((&discarded["link"], &discarded["seq"]), (&LINK.into(), &1.into()), "{discarded}");
    let again = pair.replica_sidecar.admin(&["quarantine", "discard", LINK, "1"]);
    let told = said(&again);
    assert!(!again.status.success() && told.contains("seq 1 is not in quarantine; there is nothing"), "{told}");
    assert_eq!(pair.position().await.unwrap().skipped, []);
    list(&pair.replica_sidecar, 0).await;
    // Nobody asks: what was expected while it was in quarantine is not any more.
    let unexpected = |entry: &Value| {
        let known = &entry["verification"];
        known["differing_keys"] == 2 && known["expected_keys"] == 0 && known["outcome"] == "different"
    };
    pair.origin_sidecar.wait_for(LINK, "both sides to be compared again", unexpected).await;
    widen(&mut pair).await;
    let (_, outcome) = verify(&pair);
    assert_eq!((&outcome["differing_keys"], &outcome["expected_keys"]), (&2.into(), &0.into()), "{outcome}");
    assert_done(&pair.origin_sidecar.admin(&["repair", LINK]));
    assert_verified(&pair);
}
