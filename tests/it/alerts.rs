//! Job: the alerts and the dashboard that go with the product: they name what there is, fire when they shall, and tell where to read on.
//! Input: deploy/, docs/runbook.md, the code's metrics; a real Prometheus before a real pair. Output: passes or fails.
//! Always true: an alert is tested by promtool's rule tests and has one entry in the runbook; no query names a metric that does not exist.

use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::ports::free_port;
use crate::bed::process::Process;
use crate::bed::{PATIENCE, until};
use etcd_ferry::metrics;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn text(path: &str) -> String {
    fs::read_to_string(file(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Every alert's name, in their order.
fn alerts() -> Vec<String> {
    text("deploy/alerts.yml")
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .map(str::to_owned)
        .collect()
}

/// Every name of a metric in `text` that is ours; a histogram's series count as the histogram.
fn named(text: &str) -> BTreeSet<String> {
    let part_of_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let words = text.split(|c: char| !part_of_name(c)).filter(|word| word.starts_with("etcd_ferry_"));
    words.map(|word| histogram_of(word).unwrap_or(word).to_owned()).collect()
}

/// The histogram that has this series.
fn histogram_of(series: &str) -> Option<&str> {
    let name = ["_bucket", "_sum", "_count"].iter().find_map(|end| series.strip_suffix(end))?;
    metrics::all().iter().any(|metric| metric.name == name && metric.kind == "histogram").then_some(name)
}

#[test]
fn only_a_histogram_has_buckets() {
    let metric = |kind: &str| metrics::all().into_iter().find(|metric| metric.kind == kind).unwrap().name;
    let (histogram, gauge) = (metric("histogram"), metric("gauge"));
    let query = format!("rate({histogram}_bucket[5m]) / {histogram}_count + {gauge}_bucket");
    assert_eq!(named(&query), [histogram, format!("{gauge}_bucket")].into());
}

fn assert_all_exist(path: &str) {
    let known: BTreeSet<String> = metrics::all().into_iter().map(|metric| metric.name).collect();
    let named = named(&text(path));
    let unknown: Vec<&String> = named.difference(&known).collect();
    assert!(!named.is_empty() && unknown.is_empty(), "{path} names metrics that there are not: {unknown:?}");
}

#[test]
fn alerts_and_dashboard_name_only_metrics_that_exist() {
    assert_all_exist("deploy/alerts.yml");
    assert_all_exist("deploy/dashboard.json");
    let dashboard: Value = serde_json::from_str(&text("deploy/dashboard.json")).expect("the dashboard is JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let targets = panel["targets"].as_array().expect("targets");
        for target in targets {
            let query = target["expr"].as_str().expect("a query");
            assert!(!named(query).is_empty(), "{} asks nothing of ours: {query}", panel["title"]);
        }
    }
}

#[test]
fn every_alert_has_its_entry_in_the_runbook_and_its_rule_tests() {
    let runbook = text("docs/runbook.md");
    let entries: Vec<String> =
        runbook.lines().filter_map(|line| line.strip_prefix("### ")).map(str::to_owned).collect();
    assert_eq!(entries, alerts(), "the runbook has one entry for each alert, in their order");
    let (rules, tests) = (text("deploy/alerts.yml"), text("deploy/alerts_test.yml"));
    for alert in alerts() {
        let link = format!("runbook: docs/runbook.md#{}", alert.to_lowercase());
        assert_eq!(rules.lines().filter(|line| line.trim() == link).count(), 1, "{alert} names its entry");
        let tested = format!("- alertname: {alert}");
        assert_eq!(tests.lines().filter(|line| line.trim() == tested).count(), 2, "{alert}: one quiet time, one alert");
    }
}

#[test]
fn the_rule_tests_pass() {
    for (command, path) in [("check", "deploy/alerts.yml"), ("test", "deploy/alerts_test.yml")] {
        let output = Command::new("promtool").args([command, "rules"]).arg(file(path)).output();
        let output = output.expect("promtool runs: `.ci/install` brings it (Debian's prometheus)");
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "promtool {command} rules {path}: {said}");
    }
}

#[test]
fn the_configuration_that_the_documents_give_to_prometheus_is_one() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(file("deploy/alerts.yml"), folder.path().join("alerts.yml")).unwrap();
    let monitoring = text("docs/monitoring.md");
    let block = monitoring.split("\n```yaml\n").nth(1).and_then(|rest| rest.split("\n```").next()).unwrap();
    fs::write(folder.path().join("prometheus.yml"), block).unwrap();
    let output = Command::new("promtool").args(["check", "config"]).arg(folder.path().join("prometheus.yml")).output();
    let output = output.expect("promtool runs: `.ci/install` brings it (Debian's prometheus)");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("rules found"), "{said}");
}

/// A Prometheus before both sidecars, with the product's rules; what an alert waits for is shortened, or the test would take that long.
struct Prometheus {
    port: u16,
    _process: Process,
}

impl Prometheus {
    fn start(pair: &Pair) -> Self {
        let dir = pair.dir().join("prometheus");
        fs::create_dir(&dir).unwrap();
        let rules = text("deploy/alerts.yml");
        let waits = |line: &&str| line.trim().starts_with("for: ");
        assert!(rules.lines().any(|line| waits(&line)));
        let rules: String = rules.lines().filter(|line| !waits(line)).map(|line| format!("{line}\n")).collect();
        fs::write(dir.join("alerts.yml"), rules).unwrap();
        let targets = [&pair.origin_sidecar, &pair.replica_sidecar].map(|s| format!("'{}'", s.options.ports.http));
        let config = format!(
            "global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}\nrule_files: [alerts.yml]\n\
             scrape_configs: [{{job_name: etcd-ferry, static_configs: [{{targets: [{}]}}]}}]\n",
            targets.join(", ")
        );
        fs::write(dir.join("prometheus.yml"), config).unwrap();
        let port = free_port();
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", dir.join("prometheus.yml").display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let process = Process::start("prometheus", &mut command, &dir.join("prometheus.log"));
        Self { port, _process: process }
    }

    /// The firing alerts' names with their link.
    async fn firing(&self) -> Option<BTreeSet<(String, String)>> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.ok()?;
        stream.write_all(b"GET /api/v1/alerts HTTP/1.0\r\nHost: prometheus\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let answer: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
        let firing = answer["data"]["alerts"].as_array()?.iter().filter(|alert| alert["state"] == "firing");
        let label = |alert: &Value, name: &str| alert["labels"][name].as_str().unwrap_or_default().to_owned();
        Some(firing.map(|alert| (label(alert, "alertname"), label(alert, "link"))).collect())
    }

    async fn wait(&self, what: &str, wanted: impl Fn(&BTreeSet<(String, String)>) -> bool) {
        until(what, PATIENCE, async || self.firing().await.filter(|firing| wanted(firing))).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_link_is_alerted_by_a_real_prometheus_and_the_alert_ends_with_the_cut() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;
    let prometheus = Prometheus::start(&pair);
    let not_following = ("EtcdFerryNotFollowing".to_owned(), LINK.to_owned());
    let down = |firing: &BTreeSet<(String, String)>| firing.iter().any(|(alert, _)| alert == "EtcdFerryDown");
    prometheus
        .wait("no alert of a link that follows", |firing| !firing.contains(&not_following) && !down(firing))
        .await;
    pair.proxy.cut();
    prometheus.wait("the alert of a link that is cut", |firing| firing.contains(&not_following)).await;
    pair.proxy.heal();
    prometheus.wait("its end", |firing| !firing.contains(&not_following)).await;
    pair.assert_equal().await;
}
