//! Job: what a running sidecar says of itself: status, health, readiness and metrics, true at both ends and silent on keys and values.
//! Input: pairs of regions, writes, a link that is cut and healed. Output: passes or fails.
//! Always true: what is said is compared with what was written and with the replica's etcd, not with what another page says.

use crate::bed::etcd::{Etcd, EtcdOptions};
use crate::bed::pair::{LINK, ORIGIN_REGION, Pair, PairOptions, REPLICA_REGION};
use crate::bed::sidecar::{Ports, Sidecar, ferry, region_name};
use crate::bed::traffic::{Acknowledged, Traffic, TrafficOptions, Write, commit};
use crate::bed::{PATIENCE, until};
use bytes::Bytes;
use etcd_ferry::model::Change;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

const TOP: [&str; 6] = ["region", "node", "version", "links", "etcd", "certificates"];
const FIELDS: [&str; 19] = [
    "link",
    "side",
    "state",
    "reason",
    "peer",
    "epoch",
    "term",
    "seq",
    "origin_revision",
    "head_revision",
    "applied_seq",
    "durable_seq",
    "lag_revisions",
    "lag_seconds",
    "rpo_revisions",
    "rpo_seconds",
    "stalled_seconds",
    "bytes_raw",
    "bytes_sent",
];
/// Beside the fields that every reader may count on: who ships the link, what was counted, how far a base copy is, what each end takes, and what is
/// known of both sides being equal and of revisions in quarantine.
const MORE_FIELDS: [&str; 11] = [
    "role",
    "shipper",
    "counts",
    "copy",
    "canary",
    "limits",
    "verification",
    "foreign_writes",
    "quarantined_revisions",
    "quarantined",
    "paused",
];

/// The one link of `status --json`, with its fields checked.
fn status(sidecar: &Sidecar, side: &str, peer_region: &str) -> Value {
    let status = sidecar.status();
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(names(&status), set(&TOP));
    let region = &sidecar.options.region;
    assert_eq!(status["region"], **region);
    assert_eq!(status["node"], format!("{region}-a"));
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["links"].as_array().unwrap().len(), 1);
    let link = &status["links"][0];
    assert_eq!(names(link), set(&[&FIELDS[..], &MORE_FIELDS].concat()));
    for name in ["link", "side", "state", "reason", "peer"] {
        assert!(link[name].is_string(), "{name}: {link:#}");
    }
    for name in FIELDS.iter().skip(5).filter(|name| !name.ends_with("_seconds")) {
        assert!(link[*name].is_u64(), "{name}: {link:#}");
    }
    assert!(link["lag_seconds"].is_f64() && link["rpo_seconds"].is_f64(), "{link:#}");
    assert_eq!((link["link"].as_str(), link["side"].as_str()), (Some(LINK), Some(side)));
    assert_eq!(link["peer"], region_name(peer_region));
    link.clone()
}

fn at_origin(pair: &Pair) -> Value {
    status(&pair.origin_sidecar, "origin", REPLICA_REGION)
}

fn at_replica(pair: &Pair) -> Value {
    status(&pair.replica_sidecar, "replica", ORIGIN_REGION)
}

fn number(link: &Value, name: &str) -> u64 {
    link[name].as_u64().unwrap_or_else(|| panic!("{name} is no number in {link:#}"))
}

fn seconds(link: &Value, name: &str) -> f64 {
    link[name].as_f64().unwrap_or_else(|| panic!("{name} is no number in {link:#}"))
}

/// Keys and values, as a person would count them.
fn raw_bytes(acknowledged: &[Acknowledged]) -> u64 {
    acknowledged.iter().flat_map(|ack| &ack.changes).map(|change| Change::bytes(change) as u64).sum()
}

/// Both sides know that nothing is missing.
async fn wait_settled(pair: &Pair, seq: u64) {
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let settled = |link: &Value| {
            link["applied_seq"] == seq
                && link["durable_seq"] == seq
                && link["lag_revisions"] == 0
                && link["lag_seconds"] == 0.0
        };
        sidecar.wait_for(LINK, &format!("seq {seq} to be applied and no lag"), settled).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_has_the_promised_fields_with_true_values_while_following_while_cut_and_after_healing() {
    let mut pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let options = TrafficOptions { writes_per_writer: 60, ..TrafficOptions::default() };
    let acknowledged = Traffic::start(&pair.origin.access(), &options).finish().await;
    let written = acknowledged.len() as u64;
    wait_settled(&pair, written).await;

    let position = pair.position().await.unwrap();
    let (origin, replica) = (at_origin(&pair), at_replica(&pair));
    for link in [&origin, &replica] {
        assert_eq!((link["state"].as_str(), link["reason"].as_str()), (Some("following"), Some("")));
        assert_eq!((number(link, "epoch"), number(link, "term")), (position.epoch.0, position.term.0));
        for name in ["seq", "applied_seq", "durable_seq"] {
            assert_eq!(number(link, name), written, "{name}");
        }
        assert!(number(link, "origin_revision") >= acknowledged.last().unwrap().revision.0, "{link:#}");
        assert!(number(link, "head_revision") >= number(link, "origin_revision"), "{link:#}");
        assert!(number(link, "head_revision") <= pair.origin.head().await.0, "{link:#}");
        assert_eq!((number(link, "rpo_revisions"), seconds(link, "rpo_seconds")), (0, 0.0));
        assert_eq!(number(link, "bytes_raw"), raw_bytes(&acknowledged), "keys and values, before encoding");
    }
    let sent = number(&origin, "bytes_sent");
    assert_eq!(sent, number(&replica, "bytes_sent"));
    assert!(sent > written && sent < raw_bytes(&acknowledged), "{sent} bytes sent of {}", raw_bytes(&acknowledged));

    pair.proxy.cut();
    let more: Vec<Acknowledged> = write(&pair, "/registry/while-cut/", 10).await;
    let cut = |link: &Value| link["state"] == "connecting" && number(link, "lag_revisions") == 10;
    pair.origin_sidecar.wait_for(LINK, "10 revisions of lag", cut).await;
    let first = at_origin(&pair);
    assert_eq!(number(&first, "rpo_revisions"), 10);
    assert_eq!(number(&first, "applied_seq"), written);
    assert!(!first["reason"].as_str().unwrap().is_empty());
    let grown = |link: &Value| {
        seconds(link, "lag_seconds") > seconds(&first, "lag_seconds") + 1.0
            && seconds(link, "rpo_seconds") > seconds(&first, "rpo_seconds") + 1.0
    };
    pair.origin_sidecar.wait_for(LINK, "lag and RPO to grow at the origin", grown).await;
    let deaf = |link: &Value| link["state"] == "connecting" && seconds(link, "lag_seconds") > 1.0;
    pair.replica_sidecar.wait_for(LINK, "lag to grow at the replica", deaf).await;
    let replica = at_replica(&pair);
    assert!(replica["reason"].as_str().unwrap().contains("the origin's sidecar is not connected"), "{replica:#}");
    assert!(seconds(&replica, "rpo_seconds") > 1.0, "{replica:#}");

    pair.proxy.heal();
    wait_settled(&pair, written + 10).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let raw = raw_bytes(&acknowledged) + raw_bytes(&more);
    assert_eq!(number(&at_origin(&pair), "bytes_raw"), raw);
    assert_eq!(number(&at_replica(&pair), "bytes_raw"), raw);
    pair.origin_sidecar.stop().await;
    let output = pair.origin_sidecar.admin(&["status"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("is `etcd-ferry run` up?") && said.lines().count() == 1, "{said}");
}

/// Single puts with values that compress.
async fn write(pair: &Pair, prefix: &str, count: u32) -> Vec<Acknowledged> {
    let mut kv = pair.origin.kv().await;
    let mut acknowledged = Vec::new();
    for i in 0..count {
        let writes = [Write::put(format!("{prefix}{i}"), format!("{i} ").repeat(100))];
        acknowledged.push(commit(&mut kv, &writes).await.unwrap().unwrap());
    }
    acknowledged
}

#[tokio::test]
async fn readiness_says_503_and_why_while_the_link_is_cut_and_health_says_that_the_process_lives() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let sidecars = [&pair.origin_sidecar, &pair.replica_sidecar];
    let ready = async |wanted: u16| {
        for sidecar in sidecars {
            let what = format!("/readyz to say {wanted}");
            until(&what, PATIENCE, async || (sidecar.http("/readyz").await.0 == wanted).then_some(())).await;
        }
    };
    ready(200).await;
    assert_eq!(pair.origin_sidecar.http("/readyz").await.1, "ok\n");
    pair.proxy.cut();
    ready(503).await;
    let (_, origin) = pair.origin_sidecar.http("/readyz").await;
    let (_, replica) = pair.replica_sidecar.http("/readyz").await;
    assert!(origin.starts_with("config origin connecting: ") && origin.len() > 40, "{origin}");
    assert!(replica.starts_with("config replica connecting: the origin's sidecar is not connected"), "{replica}");
    for sidecar in sidecars {
        assert_eq!(sidecar.http("/healthz").await, (200, "ok\n".to_owned()));
    }
    let table = String::from_utf8(pair.origin_sidecar.admin(&["status"]).stdout).unwrap();
    assert!(table.contains("connecting") && table.contains("config (origin): "), "{table}");
    pair.proxy.heal();
    ready(200).await;
    let table = String::from_utf8(pair.replica_sidecar.admin(&["status"]).stdout).unwrap();
    for word in ["LINK", "LAG", "RPO", "config", "replica", "following", &region_name(ORIGIN_REGION)] {
        assert!(table.contains(word), "{word} is not in {table}");
    }
    let notes = table.lines().filter(|line| line.starts_with("config (replica): "));
    let others: Vec<&str> = notes.filter(|note| !note.contains("the replica takes requests of")).collect();
    assert!(others.is_empty(), "nothing to explain but both ends' limits: {table}");
}

#[tokio::test]
async fn full_health_names_every_stage_and_etcd_with_its_version_also_while_etcd_is_down() {
    let mut pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let stages = |entry: &Value| -> Vec<(String, bool)> {
        let stages = entry["stages"].as_array().unwrap().iter();
        stages.map(|s| (s["stage"].as_str().unwrap().to_owned(), s["ok"] == true)).collect()
    };
    let well = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), true)).collect::<Vec<_>>();
    let origin = pair.origin_sidecar.health().await.unwrap();
    assert_eq!(stages(&origin["links"][0]), well(&["watch", "spool", "ship"]));
    let replica = pair.replica_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(stages(&replica), well(&["receive", "journal", "apply", "lookout"]));
    let version = pair.origin.client().await.status().await.unwrap().version().to_owned();
    let known = async || {
        let health = pair.origin_sidecar.health().await?;
        let etcd = health["etcd"].as_array()?.first()?.clone();
        (etcd["ok"] == true).then_some(etcd)
    };
    let etcd = until("the etcd's health", PATIENCE, known).await;
    assert_eq!((etcd["version"].as_str(), etcd["leader"].as_bool()), (Some(&version[..]), Some(true)));
    assert_eq!(etcd["endpoint"], pair.origin.url());
    assert_eq!(origin["listening"]["peer"], pair.origin_sidecar.options.ports.peer.to_string());

    pair.origin.kill();
    let says = |entry: &Value| entry["reason"].as_str().is_some_and(|r| r.contains("etcd cannot be reached at"));
    let entry = pair.origin_sidecar.wait_for(LINK, "the origin's etcd to be missed", says).await;
    assert_eq!(stages(&entry)[0], ("watch".to_owned(), false));
    pair.origin.restart().await;
    pair.origin_sidecar.wait_for(LINK, "no reason any more", |entry| entry["reason"] == "").await;
    let put = pair.origin.put("/a", "1").await;
    pair.wait_applied(put).await;
}

/// `name{labels}` and its value, of every line that is no comment.
fn samples(metrics: &str) -> BTreeMap<String, f64> {
    let lines = metrics.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_as_the_status_is_and_have_help_and_units() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let written = write(&pair, "/a/", 50).await;
    wait_settled(&pair, 50).await;
    for (sidecar, side) in [(&pair.origin_sidecar, "origin"), (&pair.replica_sidecar, "replica")] {
        let (code, text) = sidecar.http("/metrics").await;
        assert_eq!(code, 200);
        let samples = samples(&text);
        let labels = format!("{{link=\"{LINK}\",side=\"{side}\"}}");
        let value = |name: &str| samples[&format!("etcd_ferry_{name}{labels}")];
        assert_eq!((value("seq"), value("applied_seq"), value("durable_seq")), (50.0, 50.0, 50.0));
        assert_eq!((value("lag_seconds"), value("lag_revisions"), value("rpo_revisions")), (0.0, 0.0, 0.0));
        assert_eq!(value("raw_bytes_total"), raw_bytes(&written) as f64);
        assert!(value("sent_bytes_total") > 50.0 && value("sent_bytes_total") < value("raw_bytes_total"));
        assert!(value("head_revision") >= value("origin_revision") && value("origin_revision") > 50.0);
        let state = format!("etcd_ferry_link_state{{link=\"{LINK}\",side=\"{side}\",state=\"following\"}}");
        assert_eq!(samples[&state], 1.0);
        for name in samples.keys() {
            assert!(name.starts_with("etcd_ferry_"), "{name}");
        }
        for name in ["lag_seconds", "rpo_seconds", "raw_bytes_total"] {
            assert!(text.contains(&format!("# HELP etcd_ferry_{name} ")), "{name} has no help");
        }
    }
    let (_, origin) = pair.origin_sidecar.http("/metrics").await;
    let lags = samples(&origin);
    let label = format!("{{link=\"{LINK}\",side=\"origin\"}}");
    assert!(lags[&format!("etcd_ferry_revision_lag_seconds_count{label}")] >= 1.0, "{origin}");
    assert!(lags[&format!("etcd_ferry_round_trip_seconds_count{label}")] >= 1.0, "{origin}");
    let (_, replica) = pair.replica_sidecar.http("/metrics").await;
    let label = format!("{{link=\"{LINK}\",side=\"replica\"}}");
    assert!(samples(&replica)[&format!("etcd_ferry_apply_seconds_count{label}")] >= 1.0, "{replica}");
}

const KEY_MARK: &str = "KeyMark7f3a";
const VALUE_MARK: &str = "ValueMark9c1e";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_key_and_no_value_is_in_any_log_metric_or_answer_even_at_debug_level() {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    for sidecar in [&mut pair.origin_sidecar, &mut pair.replica_sidecar] {
        sidecar.options.log_level = "debug".to_owned();
        sidecar.write_config();
    }
    let marked = |kind: &str, i: u32| {
        Write::put(format!("/{kind}/{KEY_MARK}/{i:05}"), format!("{VALUE_MARK} {}", "x".repeat(200)))
    };
    let mut kv = pair.origin.kv().await;
    for batch in 0..30 {
        let writes: Vec<Write> = (0..100).map(|i| marked("copied", batch * 100 + i)).collect();
        commit(&mut kv, &writes).await.unwrap();
    }
    // A copy that is cut short half-way and goes on at its cursor, which is a key.
    pair.proxy.set_rate(Some(20_000));
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let half_way = async || {
        let cursor = pair.position().await?.cursor?;
        cursor.windows(KEY_MARK.len()).any(|w| w == KEY_MARK.as_bytes()).then_some(())
    };
    until("a cursor within the keys", PATIENCE, half_way).await;
    let mut said = pair.origin_sidecar.http("/healthz?full=1").await.1;
    pair.replica_sidecar.kill();
    pair.proxy.set_rate(None);
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    // Following, catching up, a delete of a range, an etcd that fails.
    for i in 0..20 {
        commit(&mut kv, &[marked("live", i)]).await.unwrap();
    }
    pair.proxy.cut();
    for i in 0..20 {
        commit(&mut kv, &[marked("spooled", i)]).await.unwrap();
    }
    pair.origin_sidecar.restart().await;
    pair.proxy.heal();
    commit(&mut kv, &[Write::delete_prefix(format!("/copied/{KEY_MARK}/"))]).await.unwrap();
    pair.replica.kill();
    pair.replica.restart().await;
    let last = commit(&mut kv, &[marked("last", 1)]).await.unwrap().unwrap();
    pair.wait_applied(last.revision).await;
    // A value that the replica does not take stops the link, with a reason that names the revision, not the key.
    let large = format!("{VALUE_MARK}{}", "y".repeat(1_572_700));
    commit(&mut kv, &[Write::put(format!("/large/{KEY_MARK}"), large)]).await.unwrap();
    pair.origin_sidecar.wait_for_state(LINK, "stopped").await;

    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        for path in ["/metrics", "/healthz", "/healthz?full=1", "/readyz"] {
            said += &sidecar.http(path).await.1;
        }
        for arguments in [&["status"][..], &["status", "--json"], &["resync", "nowhere"]] {
            let output = sidecar.admin(arguments);
            said += &String::from_utf8_lossy(&[output.stdout, output.stderr].concat());
        }
        let log = sidecar.log();
        assert!(log.contains("DEBUG"), "the log is at debug level");
        said += &log;
    }
    let hex = |mark: &str| mark.bytes().map(|b| format!("{b:02x}")).collect::<String>();
    for mark in [KEY_MARK, VALUE_MARK, &hex(KEY_MARK), &hex(VALUE_MARK)] {
        let line = said.lines().find(|line| line.contains(mark));
        assert_eq!(line, None, "{mark} was said");
    }
    let read = pair.replica.get(format!("/last/{KEY_MARK}/00001")).await.unwrap();
    assert!(read.starts_with(VALUE_MARK.as_bytes()), "the marks did cross");
}

async fn assert_run_fails(sidecar: &mut Sidecar, code: i32, words: &[&str]) {
    let before = sidecar.log().len();
    sidecar.spawn();
    let ended = sidecar.ended().await;
    let log = sidecar.log()[before..].to_owned();
    assert_eq!(ended.code(), Some(code), "{log}");
    for word in words {
        assert!(log.contains(word), "{word:?} is not in what was said:\n{log}");
    }
}

#[tokio::test]
async fn run_says_what_is_wrong_before_it_does_anything() {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    let nowhere = pair.dir().join("nowhere.toml").display().to_string();
    let output = ferry(&["run", "--config", &nowhere]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nowhere.toml: cannot be read"));

    let sidecar = &mut pair.origin_sidecar;
    let ports = sidecar.options.ports;
    for (what, port) in [("listen.peer", ports.peer), ("listen.admin", ports.admin), ("listen.http", ports.http)] {
        let taken = TcpListener::bind(port).unwrap();
        assert_run_fails(sidecar, 1, &[what, &port.to_string()]).await;
        drop(taken);
    }
    let data_dir = sidecar.data_dir();
    fs::set_permissions(&data_dir, fs::Permissions::from_mode(0o755)).unwrap();
    assert_run_fails(sidecar, 2, &["data_dir: ", "mode 0755"]).await;
    fs::set_permissions(&data_dir, fs::Permissions::from_mode(0o700)).unwrap();
    let key = sidecar.options.certs.join(format!("{ORIGIN_REGION}.key"));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    assert_run_fails(sidecar, 2, &["tls.key: ", "mode 0644"]).await;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let good = fs::read_to_string(sidecar.config_path()).unwrap();
    fs::write(sidecar.config_path(), good.replace("region = \"us-east-1\"", "region = 7\nregoin = 8")).unwrap();
    assert_run_fails(sidecar, 2, &["region: ", "regoin: "]).await;
    fs::write(sidecar.config_path(), good).unwrap();

    // Nothing of this was left behind: it starts.
    sidecar.restart().await;
    let busy = sidecar.options.clone();
    let ports = Ports { http: Ports::choose().http, ..busy.ports };
    let second = pair.dir().join("second");
    let mut second = Sidecar::prepare(crate::bed::sidecar::SidecarOptions { ports, ..busy }, &second);
    assert_run_fails(&mut second, 1, &["(listen.peer): is another process there already?"]).await;
    let config = std::fs::read_to_string(second.config_path()).unwrap();
    let nowhere = config.replace(&ports.peer.to_string(), "192.0.2.1:7443");
    std::fs::write(second.config_path(), nowhere).unwrap();
    assert_run_fails(&mut second, 1, &["no interface of this machine has that address"]).await;
}

#[tokio::test]
async fn a_sidecar_that_starts_before_its_etcd_says_so_and_waits_for_it() {
    let mut origin = Etcd::start(EtcdOptions::origin()).await;
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    origin.put("/a", "1").await;
    origin.kill();
    pair.replica.kill();
    pair.origin_sidecar.options.etcd = origin.access();
    pair.origin_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let says = |words: &'static str| {
        move |entry: &Value| {
            entry["state"] == "connecting" && entry["reason"].as_str().is_some_and(|r| r.contains(words))
        }
    };
    let words = "the origin's etcd: etcd cannot be reached at";
    let entry = pair.origin_sidecar.wait_for(LINK, words, says(words)).await;
    assert!(entry["reason"].as_str().unwrap().contains(&origin.url()), "{entry:#}");
    let words = "the replica's etcd: etcd cannot be reached at";
    pair.replica_sidecar.wait_for(LINK, words, says(words)).await;
    assert_eq!(pair.origin_sidecar.http("/readyz").await.0, 503);
    origin.restart().await;
    // The replica's etcd is still down: the origin's status says so.
    pair.origin_sidecar.wait_for(LINK, words, says(words)).await;
    let table = String::from_utf8(pair.replica_sidecar.admin(&["status"]).stdout).unwrap();
    assert_eq!(table.matches("cannot be reached").count(), 1, "{table}");
    pair.replica.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(pair.replica.get("/a").await, Some(Bytes::from_static(b"1")));
}
