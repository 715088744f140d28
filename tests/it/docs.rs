//! Job: hold the documents' tables against the product: its metrics, failpoints, calls and keys, and their example configurations.
//! Input: README.md, docs/, what the code says of its metrics and keys, the metrics of a running pair. Output: passes or fails, with the rows that are right.
//! Edge: reads the documents; one pair of real sidecars.
//! Always true: a key, a default or a metric that is added, changed or removed without its document fails here.

use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::traffic::{Write, commit};
use crate::documents::{documents, text};
use etcd_ferry::admin::roles::CALLS;
use etcd_ferry::config::{Config, Fault, Faults, ForeignWrites, LogFormat, OnPoison, OtherHistory, SendConfig};
use etcd_ferry::failpoint::{POINTS, Point};
use etcd_ferry::metrics::{self, Metric};
use etcd_ferry::model::Ranges;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const README: &str = "README.md";
const CONFIGURATION: &str = "docs/configuration.md";
const LINKS: &str = "docs/links.md";
const MONITORING: &str = "docs/monitoring.md";

/// Each required key once, and one of each table.
const SOUND: &str = r#"
region = "us-east-1"
node = "us-east-1-a"
data_dir = "data"
[etcd]
endpoints = ["http://127.0.0.1:2379"]
[listen]
peer = "127.0.0.1:7443"
admin = "127.0.0.1:7444"
http = "127.0.0.1:7445"
[tls]
ca = "ca.pem"
cert = "a.pem"
key = "a.key"
[tls.pki]
address = "http://127.0.0.1:8200"
role = "ferry"
token_file = "token"
names = ["ferry.example"]
[[send]]
link = "config"
to = ["https://127.0.0.1:8443"]
peer = "ferry.example"
[[receive]]
link = "back"
peer = "ferry.example"
[limits]
[log]
[traces]
endpoint = "http://127.0.0.1:4317"
"#;

/// The rows of the document's table whose header line starts with `header`.
fn rows(document: &str, header: &str) -> Vec<String> {
    let text = text(document);
    let mut lines = text.lines().skip_while(|line| !line.starts_with(header));
    assert!(lines.next().is_some(), "{document} has no table that starts with {header}");
    lines.skip(1).take_while(|line| line.starts_with('|')).map(str::to_owned).collect()
}

/// The same, cell by cell, without backticks.
fn table(document: &str, header: &str) -> Vec<Vec<String>> {
    let cells = |row: &String| row.trim_matches('|').split(" | ").map(|cell| cell.trim().replace('`', "")).collect();
    rows(document, header).iter().map(cells).collect()
}

/// From the name, as Prometheus' custom has it.
fn unit(metric: &Metric) -> &'static str {
    let name = metric.name.trim_end_matches("_total");
    let units = ["seconds", "bytes", "revisions", "keys"];
    units.into_iter().find(|unit| name.ends_with(&format!("_{unit}"))).unwrap_or("-")
}

#[test]
fn the_table_of_metrics_is_what_the_code_has() {
    let row =
        |metric: &Metric| format!("| `{}` | {} | {} | {} |", metric.name, metric.kind, unit(metric), metric.meaning);
    let wanted: Vec<String> = metrics::all().iter().map(row).collect();
    let found = rows(MONITORING, "| metric | type |");
    assert_eq!(found, wanted, "the table of {MONITORING} must be:\n{}\n", wanted.join("\n"));
}

/// The labels of a line of Prometheus' text format, with their values.
fn labels(line: &str) -> Vec<(&str, &str)> {
    let Some((_, labels)) = line.split_once('{') else { return Vec::new() };
    let labels = labels.split_once('}').map_or("", |(labels, _)| labels);
    labels
        .split(',')
        .filter_map(|label| label.split_once('='))
        .map(|(name, value)| (name, value.trim_matches('"')))
        .collect()
}

/// A label whose values have no end would have a time series for each of them.
fn assert_only_told_labels(metrics: &str) {
    let states = table(MONITORING, "| state | meaning |").into_iter().map(|row| row[0].clone());
    let mut told: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for row in table(MONITORING, "| label | values |") {
        told.insert(row[0].clone(), row[1].split(", ").map(str::to_owned).collect());
    }
    told.insert("state".to_owned(), states.collect());
    told.insert("link".to_owned(), BTreeSet::from([LINK.to_owned()]));
    let mut seen = BTreeSet::new();
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        for (label, value) in labels(line) {
            let values = told.get(label).unwrap_or_else(|| panic!("{MONITORING} has no label {label}: {line}"));
            let is_bound = label == "le" && (value == "+Inf" || value.parse::<f64>().is_ok());
            assert!(is_bound || values.contains(value), "{MONITORING} has no value {value} of {label}: {line}");
            seen.insert(label.to_owned());
        }
    }
    assert_eq!(seen, told.into_keys().collect(), "the labels that there are (left), and those of {MONITORING} (right)");
}

#[tokio::test]
async fn every_metric_of_a_running_pair_is_in_the_table_with_its_type() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let written = commit(&mut pair.origin.kv().await, &[Write::put("/app/a", "1")]).await.unwrap().unwrap();
    pair.wait_applied(written.revision).await;
    let applied = |entry: &serde_json::Value| entry["applied_seq"] == 1;
    pair.origin_sidecar.wait_for(LINK, "the ack of the first seq", applied).await;

    let mut seen = BTreeSet::new();
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let (code, text) = sidecar.http("/metrics").await;
        assert_eq!(code, 200);
        assert_only_told_labels(&text);
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            seen.insert(line.split_once(' ').map(|(name, kind)| (name.to_owned(), kind.to_owned())).unwrap());
        }
    }
    let told = table(MONITORING, "| metric | type |");
    let told: BTreeSet<(String, String)> = told.into_iter().map(|row| (row[0].clone(), row[1].clone())).collect();
    let untold: Vec<_> = seen.difference(&told).collect();
    assert!(untold.is_empty(), "not in {MONITORING}: {untold:?}");
    // Counts start with what they count; everything else is there from the first revision on.
    let unseen: Vec<_> = told.difference(&seen).filter(|(_, kind)| kind != "counter").collect();
    assert!(unseen.is_empty(), "in {MONITORING}, and not in /metrics: {unseen:?}");
}

#[test]
fn the_table_of_failpoints_is_what_the_code_has() {
    let sides = |point: &Point| point.sides.iter().map(|side| side.as_str()).collect::<Vec<_>>().join(", ");
    let row = |point: &Point| {
        format!("| `{}` | {} | {} | {} |", point.name, sides(point), point.during.as_str(), point.stands)
    };
    let wanted: Vec<String> = POINTS.iter().map(row).collect();
    let found = rows(README, "| failpoint | side |");
    assert_eq!(found, wanted, "the table of {README} must be:\n{}\n", wanted.join("\n"));
}

#[test]
fn the_table_of_calls_has_every_call_with_its_role() {
    let told: BTreeMap<String, String> =
        table(LINKS, "| call | role |").into_iter().map(|row| (row[0].clone(), row[1].clone())).collect();
    let calls = CALLS.iter().map(|(call, role)| ((*call).to_owned(), role.as_str().to_owned()));
    assert_eq!(told, calls.collect(), "the calls of {LINKS} (left) must be those of the code (right)");
}

fn faults(text: &str) -> Vec<Fault> {
    match Config::from_toml(text) {
        Ok(_) => Vec::new(),
        Err(Faults(faults)) => faults,
    }
}

/// Every key that the configuration knows, as `etcd.endpoints` or `send[].link`: asked by way of a key that it does not know.
pub fn known_keys() -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for head in
        ["", "[etcd]", "[listen]", "[tls]", "[tls.pki]", "[[send]]", "[[receive]]", "[limits]", "[log]", "[traces]"]
    {
        let text = format!("{head}\n{head_line}", head_line = "unheard_of = 1");
        let fault = faults(&text).into_iter().find(|fault| fault.field.ends_with("unheard_of"));
        let fault = fault.unwrap_or_else(|| panic!("{head} takes unknown keys"));
        let (_, known) = fault.rule.split_once("one of ").expect("a fault of an unknown key names the known ones");
        let table = head.trim_matches(['[', ']']);
        let place = match head.starts_with("[[") {
            true => format!("{table}[]."),
            false if head.is_empty() => String::new(),
            false => format!("{table}."),
        };
        let tables = ["etcd", "listen", "tls", "send", "receive", "limits", "log", "traces"];
        let here = known.split(", ").filter(|key| !(head.is_empty() && tables.contains(key)));
        keys.extend(here.map(|key| format!("{place}{key}")).filter(|key| key != "tls.pki"));
    }
    keys
}

/// The keys that `SOUND` cannot do without.
pub fn required_keys() -> BTreeSet<String> {
    let mut required = BTreeSet::new();
    let mut table = String::new();
    for (number, line) in SOUND.lines().enumerate() {
        if let Some(head) = line.strip_prefix('[') {
            let name = head.trim_matches(['[', ']']);
            table = if head.starts_with('[') { format!("{name}[].") } else { format!("{name}.") };
        } else if let Some((key, _)) = line.split_once(" = ") {
            let without: Vec<&str> = SOUND.lines().enumerate().filter(|(n, _)| *n != number).map(|(_, l)| l).collect();
            assert!(!faults(&without.join("\n")).is_empty(), "{table}{key} is not required");
            required.insert(format!("{table}{key}"));
        }
    }
    required
}

/// What a key that is left out becomes, where that is a value.
pub fn defaults(config: &Config) -> BTreeMap<String, String> {
    // `Limits { spool_bytes_max: 8589934592, ... }`: every field with its value.
    let limits = format!("{:?}", config.limits);
    let fields = limits.trim_start_matches("Limits {").trim_end_matches('}').split(", ");
    let mut defaults: BTreeMap<String, String> = fields
        .map(|field| field.trim().split_once(": ").unwrap())
        .map(|(key, value)| (format!("limits.{key}"), value.to_owned()))
        .collect();
    let SendConfig { deletes_share_max, ranges, verify_interval, verify_core_share_max, .. } = &config.send[0];
    let canary_interval_seconds = config.send[0].canary_interval.map_or(0, |interval| interval.as_secs());
    let verify_interval = verify_interval.expect("on by default");
    let traces = config.traces.as_ref().expect("they are configured");
    let pki = config.pki.as_ref().expect("it is configured");
    assert!(pki.ttl.is_none() && pki.namespace.is_none() && pki.common_name.is_none());
    assert_eq!(*ranges, Ranges::new(&[], &[]));
    assert_eq!(config.log.format, LogFormat::Text);
    assert!(
        config.receive[0].ranges.is_none()
            && config.tls.admins.is_empty()
            && config.tls.viewers.is_empty()
            && config.compact.is_none()
    );
    for (key, value) in [
        ("send[].deletes_share_max", deletes_share_max.to_string()),
        ("send[].other_history", format!("{:?}", OtherHistory::default()).to_lowercase()),
        ("send[].verify_interval_seconds", verify_interval.as_secs().to_string()),
        ("send[].verify_core_share_max", verify_core_share_max.to_string()),
        ("send[].canary_interval_seconds", canary_interval_seconds.to_string()),
        ("send[].prefixes", "the whole keyspace".to_owned()),
        ("send[].exclude", "none".to_owned()),
        ("receive[].prefixes", "what the first hello says".to_owned()),
        ("receive[].foreign_writes", format!("{:?}", ForeignWrites::default()).to_lowercase()),
        ("etcd.allow_corrupting_versions", config.etcd.allow_corrupting_versions.to_string()),
        ("etcd.compact_after_seconds", "0".to_owned()),
        ("etcd.defragment", "false".to_owned()),
        ("receive[].on_poison", format!("{:?}", OnPoison::default()).to_lowercase()),
        ("tls.admins", "nobody".to_owned()),
        ("tls.viewers", "nobody".to_owned()),
        ("tls.pki.mount", pki.mount.clone()),
        ("tls.pki.ttl_seconds", "0".to_owned()),
        ("log.format", "text".to_owned()),
        ("traces.sample", traces.sample.to_string()),
        ("log.level", config.log.level.clone()),
    ] {
        defaults.insert(key.to_owned(), value);
    }
    defaults
}

#[test]
fn every_key_of_the_configuration_is_in_the_table_with_its_default() {
    let config = Config::from_toml(SOUND).unwrap_or_else(|faults| panic!("{faults}"));
    let (required, defaults) = (required_keys(), defaults(&config));
    let rows = table(CONFIGURATION, "| key | default |");
    let told: BTreeSet<String> = rows.iter().map(|row| row[0].clone()).collect();
    assert_eq!(told, known_keys(), "the keys of {CONFIGURATION} (left) must be those of the configuration (right)");
    assert_eq!(told.len(), rows.len(), "a key is there twice");
    for row in rows {
        let wanted = match defaults.get(&row[0]) {
            _ if required.contains(&row[0]) => "required",
            Some(default) => default,
            None => "none",
        };
        assert_eq!(row[1], wanted, "the default of {}", row[0]);
    }
}

/// A document's code blocks that hold a configuration.
fn example_configurations(document: &str) -> Vec<String> {
    let text = text(document);
    let blocks = text.split("\n```toml\n").skip(1);
    blocks.map(|rest| rest.split("\n```").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn every_example_configuration_of_the_documents_is_sound() {
    assert!(example_configurations(README).len() >= 2, "one for each side");
    for document in documents() {
        for example in example_configurations(&document) {
            let config = Config::from_toml(&example);
            let config = config.unwrap_or_else(|faults| panic!("{document}: {faults}\nin\n{example}"));
            // What a PKI issues is written by the sidecar, to which systemd's unit leaves nothing else to write in.
            let files = [config.tls.ca, config.tls.cert, config.tls.key];
            let writable = files.iter().all(|path| path.starts_with("/var/lib/etcd-ferry"));
            assert!(config.pki.is_none() || writable, "{document}: {example}");
        }
    }
}

#[test]
fn every_count_that_a_link_keeps_is_described() {
    let described: BTreeSet<String> = metrics::all().into_iter().map(|metric| metric.name).collect();
    let mut counts = BTreeSet::new();
    let files = [
        "origin/anchor.rs",
        "origin/outcome.rs",
        "origin/receipts.rs",
        "origin/session.rs",
        "origin/ship.rs",
        "origin/verify.rs",
        "origin/mod.rs",
        "replica/mod.rs",
    ];
    for file in files {
        let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file)).unwrap();
        for start in [".count(\"", "counts.insert(\"", "(\""] {
            for rest in source.split(start).skip(1) {
                let Some((name, after)) = rest.split_once('"') else { continue };
                // The replica's counts stand in a list: ("frames", counters.frames...), ("conflicts", self.view.conflicts).
                let is_count = start != "(\"" || after.starts_with(", counters.") || after.starts_with(", self.view.");
                if is_count {
                    counts.insert(name.to_owned());
                }
            }
        }
    }
    assert!(counts.len() >= 10, "the sources do not look as this test expects: {counts:?}");
    for count in counts {
        assert!(described.contains(&format!("etcd_ferry_{count}_total")), "the count {count} is not in metrics.rs");
    }
}
