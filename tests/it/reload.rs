//! Job: a configuration that changes under running sidecars: links come, go and change, by SIGHUP and by the admin call, and the others go on.
//! Input: a pair under load, configurations that are written anew. Output: passes or fails.
//! Always true: a link that is not touched is judged by recordings of both ends, and by the hellos that its replica has answered: one.

use crate::bed::etcd::EtcdOptions;
use crate::bed::pair::{LINK, Pair, PairOptions, connect, link_name, wait_applied};
use crate::bed::sidecar::Sidecar;
use crate::bed::traffic::{Traffic, TrafficOptions};
use crate::bed::{PATIENCE, until};
use bytes::Bytes;
use serde_json::{Value, json};
use std::fs;
use std::process::{Command, Output};

const EXTRA: &str = "extra";

fn over(prefix: &str) -> PairOptions {
    let quick = |options| EtcdOptions { sync: false, ..options };
    PairOptions {
        origin: quick(EtcdOptions::origin()),
        replica: quick(EtcdOptions::replica()),
        prefixes: vec![prefix.to_owned()],
        ..PairOptions::default()
    }
}

/// The second link, at both sides.
fn add_extra(pair: &mut Pair) {
    let (origin, replica) = (&mut pair.origin_sidecar.options, &mut pair.replica_sidecar.options);
    connect(origin, replica, EXTRA, &pair.proxy, &over("/extra/"));
}

/// Both links from the start.
async fn with_extra() -> Pair {
    let mut pair = Box::pin(Pair::prepare(over("/registry/"))).await;
    add_extra(&mut pair);
    for sidecar in [&mut pair.origin_sidecar, &mut pair.replica_sidecar] {
        sidecar.write_config();
        sidecar.restart().await;
    }
    pair
}

fn remove_extra(pair: &mut Pair) {
    pair.origin_sidecar.options.send.retain(|send| send.link != EXTRA);
    pair.replica_sidecar.options.receive.retain(|receive| receive.link != EXTRA);
}

fn lines_with(sidecar: &Sidecar, words: &[&str]) -> usize {
    sidecar.log().lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
}

/// Writes the configuration, says SIGHUP, and waits until the sidecar has dealt with it.
async fn hang_up(sidecar: &Sidecar) {
    let read = || lines_with(sidecar, &["etcd_ferry::app::reload: the configuration is"]);
    let before = read();
    sidecar.write_config();
    sidecar.process().hang_up();
    until("the configuration to be read again", PATIENCE, async || (read() > before).then_some(())).await;
}

async fn hang_up_both(pair: &Pair) {
    hang_up(&pair.replica_sidecar).await;
    hang_up(&pair.origin_sidecar).await;
}

/// `etcd-ferry reload --json`, after the configuration was written.
fn reload(sidecar: &Sidecar) -> Value {
    sidecar.write_config();
    let output = sidecar.admin(&["reload", "--json"]);
    assert!(output.status.success(), "{}", words(&output));
    serde_json::from_slice(&output.stdout).expect("reload --json prints JSON")
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

async fn links_of(sidecar: &Sidecar) -> Vec<String> {
    let health = sidecar.health().await.expect("the sidecar answers");
    let links = health["links"].as_array().expect("links").iter();
    links.map(|link| link["link"].as_str().expect("a name").to_owned()).collect()
}

async fn metric(sidecar: &Sidecar, name: &str) -> String {
    let (_, text) = sidecar.http("/metrics").await;
    let value = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
    value.unwrap_or_else(|| panic!("{name} is not there")).to_owned()
}

/// Puts a key at the origin; it arrives by the second link.
async fn carries(pair: &Pair, key: &str) {
    let revision = pair.origin.put(key, "of the origin").await;
    wait_applied(&pair.replica, EXTRA, revision, PATIENCE).await;
    assert_eq!(pair.replica.get(key).await, Some(Bytes::from("of the origin")));
}

#[tokio::test]
async fn a_link_that_is_added_removed_and_added_again_by_sighup_carries_and_the_others_are_not_touched() {
    let mut pair = Box::pin(Pair::start(over("/registry/"))).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    let options = TrafficOptions {
        writers: 1,
        writes_per_writer: 1_000_000,
        rate_per_writer: Some(50),
        value_bytes_max: 2_048,
        ..TrafficOptions::default()
    };
    let traffic = Traffic::start(&pair.origin.access(), &options);
    pair.origin.put("/extra/before", "of the origin").await;

    add_extra(&mut pair);
    hang_up_both(&pair).await;
    carries(&pair, "/extra/added").await;
    assert_eq!(pair.replica.get("/extra/before").await, Some(Bytes::from("of the origin")), "by its base copy");
    pair.origin_sidecar.wait_for_state(EXTRA, "following").await;
    assert_eq!(links_of(&pair.origin_sidecar).await, [LINK, EXTRA]);
    let position = pair.replica.position(&link_name(EXTRA)).await.expect("a position");

    remove_extra(&mut pair);
    hang_up_both(&pair).await;
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        assert_eq!(links_of(sidecar).await, [LINK]);
        assert!(!sidecar.http("/metrics").await.1.contains("link=\"extra\""), "its metrics would freeze");
        let said = ["removed and stopped; its files stay in"];
        assert_eq!(lines_with(sidecar, &said), 1);
    }
    assert!(pair.origin_sidecar.data_dir().join("origin/extra/spool").is_dir());
    let missed = pair.origin.put("/extra/while-it-was-gone", "of the origin").await;
    let other = pair.origin.put("/registry/other", "x").await;
    pair.wait_applied(other).await;
    assert_eq!(pair.replica.get("/extra/while-it-was-gone").await, None);

    add_extra(&mut pair);
    hang_up_both(&pair).await;
    let caught_up = wait_applied(&pair.replica, EXTRA, missed, PATIENCE).await;
    assert_eq!(caught_up.epoch, position.epoch, "it goes on where it was");
    carries(&pair, "/extra/again").await;

    let acknowledged = traffic.stop().await;
    pair.wait_applied(acknowledged.last().expect("something was written").revision).await;
    pair.wait_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
    let hello = "etcd_ferry::replica::receive: hello ";
    assert_eq!(lines_with(&pair.replica_sidecar, &[hello, "link=config "]), 1, "its session was never given up");
    assert_eq!(lines_with(&pair.replica_sidecar, &[hello, "link=extra "]), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_changed_by_the_admin_call_goes_on_from_its_spool_and_its_journal() {
    let mut pair = Box::pin(with_extra()).await;
    // The copy may have brought the first one.
    carries(&pair, "/extra/a").await;
    carries(&pair, "/extra/b").await;
    pair.wait_applied(pair.origin.put("/registry/a", "x").await).await;
    let before = pair.replica.position(&link_name(EXTRA)).await.expect("a position");
    let counted = |entry: &Value| entry["counts"]["revisions"].as_u64() > Some(0);
    let shipped = pair.origin_sidecar.wait_for(EXTRA, "a revision to be counted", counted).await;
    let shipped = shipped["counts"]["revisions"].as_u64().unwrap();

    // What is spooled and not shipped is there when the link begins anew, though etcd has it no more.
    pair.proxy.cut();
    let mut last = before.origin_revision;
    for i in 0..20 {
        last = pair.origin.put(format!("/extra/{i}"), "in the outage").await;
    }
    let spooled = |entry: &Value| entry["lag_revisions"].as_u64() >= Some(20);
    pair.origin_sidecar.wait_for(EXTRA, "everything to be spooled", spooled).await;
    pair.origin.compact(last).await;
    pair.origin_sidecar.options.send[1].verify_interval_seconds = Some(3_600);
    let told = reload(&pair.origin_sidecar);
    let wanted = "link extra (origin): changed (verify_interval_seconds), and goes on from what it has on disk";
    assert_eq!(told, json!({ "taken": [wanted], "failed": [], "needs_restart": [] }));
    pair.proxy.heal();
    let after = wait_applied(&pair.replica, EXTRA, last, PATIENCE).await;
    assert_eq!(after.epoch, before.epoch, "no base copy");
    // What was on its way when the line was cut is shipped, and counted, twice.
    let counted = |entry: &Value| entry["counts"]["revisions"].as_u64() >= Some(shipped + 20);
    pair.origin_sidecar.wait_for(EXTRA, "counts to go on where they were", counted).await;

    // What waits for its etcd takes a while to end, and its origin says hello again meanwhile.
    pair.replica.pause();
    let seq = after.seq.0;
    pair.origin.put("/extra/on-its-way", "x").await;
    pair.replica_sidecar.wait_for(EXTRA, "a revision on its way", |entry| entry["seq"].as_u64() > Some(seq)).await;
    pair.replica_sidecar.options.receive[1].foreign_writes = Some("expect".to_owned());
    let told = reload(&pair.replica_sidecar);
    pair.replica.resume();
    assert_eq!(
        told["taken"],
        json!(["link extra (replica): changed (foreign_writes), and goes on from what it has on disk"])
    );
    carries(&pair, "/extra/after").await;
    let refused = |reason: &str| lines_with(&pair.replica_sidecar, &["a call is refused", reason]);
    assert_eq!(refused("receives no link named"), 0, "it was there all the time");
    assert!(refused("link extra is stopped here") > 0, "{}", pair.replica_sidecar.log());
    assert_eq!(pair.replica.position(&link_name(EXTRA)).await.expect("a position").epoch, before.epoch);
    let expects = |entry: &Value| entry["foreign_writes"]["expected"].as_str().is_some_and(|why| !why.is_empty());
    pair.replica_sidecar.wait_for(EXTRA, "others' writes to be expected", expects).await;
    let config_back = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(config_back["counts"]["stalls"], 0);
}

#[tokio::test]
async fn a_configuration_that_is_not_sound_is_refused_whole_and_what_needs_a_restart_is_named() {
    let mut pair = Box::pin(Pair::start(over("/registry/"))).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.origin_sidecar.options.log_level = "info".to_owned();
    add_extra(&mut pair);
    pair.origin_sidecar.options.limits.insert("txn_ops_max".to_owned(), 1);
    hang_up(&pair.origin_sidecar).await;
    let sidecar = &pair.origin_sidecar;
    assert_eq!(links_of(sidecar).await, [LINK], "also what is sound in it is not taken");
    assert_eq!(metric(sidecar, "etcd_ferry_configuration_refused").await, "1");
    let fault =
        ["ERROR", "is refused as a whole", "field=limits.txn_ops_max", "must be from 4 to 65536 (found 1) [line "];
    assert_eq!(lines_with(sidecar, &fault), 1);
    let refused = sidecar.admin(&["reload"]);
    assert_eq!(refused.status.code(), Some(2), "who asks reads it too: {}", words(&refused));

    remove_extra(&mut pair);
    let sidecar = &mut pair.origin_sidecar;
    // A fault that only the sidecar looks for: it is in a file that the configuration names.
    sidecar.options.limits.clear();
    sidecar.options.crl = Some("no-such-list.pem".into());
    sidecar.write_config();
    let refused = sidecar.admin(&["reload"]);
    assert_eq!(refused.status.code(), Some(1), "{}", words(&refused));
    let told = words(&refused);
    let named =
        told.contains("the last one stays in use: tls.crl: /") && told.contains("/no-such-list.pem cannot be read");
    assert!(named, "{told}");
    sidecar.options.crl = None;
    sidecar.options.limits =
        [("revision_bytes_max".to_owned(), 1 << 29), ("spool_bytes_max".to_owned(), 1 << 30)].into();
    sidecar.options.allow_corrupting_versions = true;
    let told = reload(sidecar);
    let taken = [
        "log.level: info",
        "limits.spool_bytes_max: taken by each link that is bound by it",
        "link config (origin): changed (limits.spool_bytes_max), and goes on from what it has on disk",
    ];
    let needs_restart = ["limits.revision_bytes_max", "etcd.allow_corrupting_versions"];
    let told_keys: std::collections::BTreeSet<&str> =
        told["needs_restart"].as_array().expect("keys").iter().filter_map(Value::as_str).collect();
    assert_eq!(told_keys, needs_restart.into());
    assert_eq!((&told["taken"], &told["failed"]), (&json!(taken), &json!([])));
    for (name, value) in [("refused", "0"), ("needs_restart", "1"), ("reloads_total", "1")] {
        assert_eq!(metric(sidecar, &format!("etcd_ferry_configuration_{name}")).await, value, "{name}");
    }
    let roomy = |entry: &Value| entry["stages"][1]["queue_bytes_max"] == 1_u64 << 30;
    sidecar.wait_for(LINK, "the spool to have its new limit", roomy).await;
    pair.wait_applied(pair.origin.put("/registry/a", "x").await).await;

    // Who sends SIGHUP reads it in the log.
    hang_up(&pair.origin_sidecar).await;
    for key in needs_restart {
        assert_eq!(lines_with(&pair.origin_sidecar, &["WARN", "restart", "keys=", key]), 2, "{key}");
    }

    // The level in force tells no details any more; what waits for a restart is told again, and nothing else has changed.
    let details = || lines_with(&pair.origin_sidecar, &["DEBUG", "admin port called"]);
    let before = details();
    let again = reload(&pair.origin_sidecar);
    assert_eq!((&again["taken"], &again["needs_restart"]), (&json!([]), &told["needs_restart"]));
    assert_eq!(details(), before);
}

#[tokio::test]
async fn a_link_that_cannot_be_opened_is_told_and_shown_and_comes_with_the_next_reload() {
    let mut pair = Box::pin(Pair::start(over("/registry/"))).await;
    pair.wait_applied(pair.origin.put("/registry/a", "x").await).await;
    add_extra(&mut pair);
    let (mut in_the_way, mut asked) = (Vec::new(), ["verify", "pause"].into_iter().rev());
    for (sidecar, side) in [(&pair.replica_sidecar, "replica"), (&pair.origin_sidecar, "origin")] {
        let folder = sidecar.data_dir().join(side).join(EXTRA);
        fs::create_dir(folder.parent().expect("a parent")).ok();
        fs::write(&folder, "no folder").expect("a file in its way");
        sidecar.write_config();
        let output = sidecar.admin(&["reload"]);
        assert_eq!(output.status.code(), Some(1), "{}", words(&output));
        assert!(words(&output).contains(&format!("not taken: link extra ({side}): ")), "{}", words(&output));
        let stopped = sidecar.wait_for_state(EXTRA, "stopped").await;
        let reason = stopped["reason"].as_str().expect("a reason");
        assert!(reason.contains("it could not be opened") && reason.contains("mend that, and reload"), "{reason}");
        // Nobody is sent to the other region, where the link is asked at the right side.
        let output = sidecar.admin(&[asked.next().unwrap(), EXTRA]);
        assert!(words(&output).contains("link extra is stopped: it could not be opened"), "{}", words(&output));
        in_the_way.push(folder);
    }
    pair.wait_applied(pair.origin.put("/registry/b", "x").await).await;

    in_the_way.iter().for_each(|folder| fs::remove_file(folder).expect("the way is free"));
    for (sidecar, side) in [(&pair.replica_sidecar, "replica"), (&pair.origin_sidecar, "origin")] {
        assert_eq!(reload(sidecar)["taken"], json!([format!("link extra ({side}): added and started")]));
    }
    carries(&pair, "/extra/a").await;
}

/// A folder whose disk hangs: whoever opens a file of it waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_that_cannot_be_opened_for_long_holds_up_neither_a_reload_nor_another_link_nor_the_end() {
    let mut pair = Box::pin(with_extra()).await;
    carries(&pair, "/extra/a").await;
    let spool = pair.origin_sidecar.data_dir().join("origin").join(EXTRA).join("spool");
    let hangs = spool.join(format!("{:020}.segment", u64::MAX));
    assert!(Command::new("mkfifo").arg(&hangs).status().unwrap().success());

    pair.origin_sidecar.options.send[1].verify_interval_seconds = Some(3_600);
    let told = reload(&pair.origin_sidecar);
    assert_eq!((&told["failed"], told["taken"].as_array().map(Vec::len)), (&json!([]), Some(1)), "{told}");
    pair.wait_applied(pair.origin.put("/registry/a", "x").await).await;
    let entry = pair.origin_sidecar.wait_for_state(EXTRA, "connecting").await;
    let verify = pair.origin_sidecar.admin(&["verify", LINK]);
    assert!(verify.status.success(), "{}\n{entry:#}", words(&verify));
    let (_, status) = pair.origin_sidecar.stop().await;
    assert!(status.success(), "{status}");
}
