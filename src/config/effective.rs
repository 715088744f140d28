//! Job: a configuration as it is in force, defaults filled in, as TOML.
//! Input: a `Config`. Output: text that reads as the same `Config`.
//! Pure: no file, no clock.
//! Always true: every field of a `Config` is in it; what is secret lies in files of its own, of which only the names are.

use super::{
    CompactConfig, Config, DeleteShares, EtcdConfig, ForeignWrites, Limits, ListenConfig, LogConfig, LogFormat,
    OnPoison, OtherHistory, PkiConfig, ReceiveConfig, SendConfig, TlsConfig, TracesConfig,
};
use bytes::Bytes;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;
use toml::Value;

/// For an operator. Structs are taken apart by name, so that a field that is added is not forgotten here.
pub fn effective_toml(config: &Config) -> String {
    let Config { region, node, data_dir, etcd, compact, listen, tls, pki, send, receive, limits, log, traces } = config;
    let mut text = Text::default();
    text.put("region", region.as_str());
    text.put("node", node.as_str());
    text.path("data_dir", data_dir);
    put_etcd(&mut text, etcd, *compact);
    let ListenConfig { peer, admin, http } = listen;
    text.head("[listen]");
    for (key, address) in [("peer", peer), ("admin", admin), ("http", http)] {
        text.put(key, address.to_string());
    }
    put_tls(&mut text, tls);
    if let Some(pki) = pki {
        put_pki(&mut text, pki);
    }
    send.iter().for_each(|send| put_send(&mut text, send));
    receive.iter().for_each(|receive| put_receive(&mut text, receive));
    put_limits(&mut text, limits);
    let LogConfig { format, level } = log;
    text.head("[log]");
    text.put(
        "format",
        match format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        },
    );
    text.put("level", level.as_str());
    if let Some(TracesConfig { endpoint, ca, sample }) = traces {
        text.head("[traces]");
        text.put("endpoint", endpoint.as_str());
        text.path_if_given("ca", ca);
        text.number("sample", sample.get());
    }
    text.0
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, head: &str) {
        self.0.push_str(&format!("\n{head}\n"));
    }

    fn put(&mut self, key: &str, value: impl Into<Value>) {
        // A string takes whatever is written to it.
        let _ = writeln!(self.0, "{key} = {}", value.into());
    }

    fn path(&mut self, key: &str, path: &Path) {
        self.put(key, path.to_string_lossy().into_owned());
    }

    fn path_if_given(&mut self, key: &str, path: &Option<std::path::PathBuf>) {
        if let Some(path) = path {
            self.path(key, path);
        }
    }

    fn texts(&mut self, key: &str, texts: &[String]) {
        self.put(key, texts.to_vec());
    }

    /// Prefixes come from a text file, so they are text.
    fn prefixes(&mut self, key: &str, prefixes: &[Bytes]) {
        let texts: Vec<String> = prefixes.iter().map(|p| String::from_utf8_lossy(p).into_owned()).collect();
        self.texts(key, &texts);
    }

    /// TOML's numbers are signed; no limit is near their end.
    fn number(&mut self, key: &str, number: u64) {
        self.put(key, i64::try_from(number).unwrap_or(i64::MAX));
    }

    /// 0: never.
    fn seconds(&mut self, key: &str, interval: Option<Duration>) {
        self.number(key, interval.map_or(0, |interval| interval.as_secs()));
    }
}

fn put_etcd(text: &mut Text, etcd: &EtcdConfig, compact: Option<CompactConfig>) {
    let EtcdConfig { endpoints, ca, cert, key, username, password_file, allow_corrupting_versions } = etcd;
    text.head("[etcd]");
    text.texts("endpoints", endpoints);
    for (name, path) in [("ca", ca), ("cert", cert), ("key", key)] {
        text.path_if_given(name, path);
    }
    if let Some(username) = username {
        text.put("username", username.as_str());
    }
    text.path_if_given("password_file", password_file);
    text.put("allow_corrupting_versions", *allow_corrupting_versions);
    text.seconds("compact_after_seconds", compact.map(|compact| compact.after));
    text.put("defragment", compact.is_some_and(|compact| compact.defragment));
}

fn put_tls(text: &mut Text, tls: &TlsConfig) {
    let TlsConfig { ca, cert, key, crl, admins, viewers } = tls;
    text.head("[tls]");
    for (name, path) in [("ca", ca), ("cert", cert), ("key", key)] {
        text.path(name, path);
    }
    text.path_if_given("crl", crl);
    text.texts("admins", admins);
    text.texts("viewers", viewers);
}

fn put_pki(text: &mut Text, pki: &PkiConfig) {
    let PkiConfig { address, ca, mount, role, namespace, token_file, names, common_name, ttl } = pki;
    text.head("[tls.pki]");
    text.put("address", address.as_str());
    text.path_if_given("ca", ca);
    text.put("mount", mount.as_str());
    text.put("role", role.as_str());
    for (key, given) in [("namespace", namespace), ("common_name", common_name)] {
        if let Some(given) = given {
            text.put(key, given.as_str());
        }
    }
    text.path("token_file", token_file);
    text.texts("names", names);
    text.seconds("ttl_seconds", *ttl);
}

fn put_send(text: &mut Text, send: &SendConfig) {
    let SendConfig {
        link,
        to,
        peer,
        // Made of the next two.
        ranges: _,
        prefixes,
        exclude,
        deletes_share_max,
        other_history,
        verify_interval,
        verify_core_share_max,
        canary_interval,
    } = send;
    text.head("[[send]]");
    text.put("link", link.as_str());
    text.texts("to", to);
    text.put("peer", peer.as_str());
    // None: the whole keyspace, which an empty prefix means too.
    let whole = [Bytes::new()];
    text.prefixes("prefixes", if prefixes.is_empty() { &whole } else { prefixes });
    text.prefixes("exclude", exclude);
    text.put("deletes_share_max", *deletes_share_max);
    text.put(
        "other_history",
        match other_history {
            OtherHistory::Stop => "stop",
            OtherHistory::Resync => "resync",
        },
    );
    text.seconds("verify_interval_seconds", *verify_interval);
    text.put("verify_core_share_max", *verify_core_share_max);
    text.seconds("canary_interval_seconds", *canary_interval);
}

fn put_receive(text: &mut Text, receive: &ReceiveConfig) {
    let ReceiveConfig { link, peer, ranges: _, prefixes, foreign_writes, on_poison, delete_shares } = receive;
    text.head("[[receive]]");
    text.put("link", link.as_str());
    text.put("peer", peer.as_str());
    if let Some(prefixes) = prefixes {
        text.prefixes("prefixes", prefixes);
    }
    text.put(
        "foreign_writes",
        match foreign_writes {
            ForeignWrites::Report => "report",
            ForeignWrites::Repair => "repair",
            ForeignWrites::Expect => "expect",
        },
    );
    text.put(
        "on_poison",
        match on_poison {
            OnPoison::Stop => "stop",
            OnPoison::Quarantine => "quarantine",
        },
    );
    let DeleteShares { revision, minute } = delete_shares;
    for (key, share) in [("revision_deletes_share_max", revision), ("minute_deletes_share_max", minute)] {
        if let Some(share) = share {
            text.put(key, *share);
        }
    }
}

fn put_limits(text: &mut Text, limits: &Limits) {
    text.head("[limits]");
    for limit in limits.each() {
        text.number(limit.key.trim_start_matches("limits."), limit.value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"
region = "us-east-1"
node = "us-east-1-a"
data_dir = "data \"quoted\""
[etcd]
endpoints = ["https://127.0.0.1:2379", "https://127.0.0.2:2379"]
ca = "etcd-ca.pem"
cert = "etcd.pem"
key = "etcd.key"
username = "ferry"
password_file = "password"
allow_corrupting_versions = true
compact_after_seconds = 3600
defragment = true
[listen]
peer = "0.0.0.0:7443"
admin = "[::1]:7444"
http = "127.0.0.1:7445"
[tls]
ca = "ca.pem"
cert = "a.pem"
key = "a.key"
crl = "crl.pem"
admins = ["spiffe://etcd-ferry.dev/admin"]
viewers = ["viewer.example"]
[tls.pki]
address = "https://vault.example:8200"
ca = "vault-ca.pem"
mount = "team/pki"
role = "ferry"
namespace = "a"
token_file = "token"
names = ["spiffe://example.org/a", "a.example"]
common_name = "a.example"
ttl_seconds = 3600
[[send]]
link = "config"
to = ["https://ferry.example:7443"]
peer = "ferry.example"
prefixes = ["/app/", "/ü\n/"]
exclude = ["/app/tmp/"]
deletes_share_max = 0.25
other_history = "resync"
verify_interval_seconds = 0
verify_core_share_max = 1
canary_interval_seconds = 5
[[receive]]
link = "back"
peer = "ferry.example"
prefixes = ["/back/"]
foreign_writes = "repair"
on_poison = "quarantine"
revision_deletes_share_max = 0.5
minute_deletes_share_max = 1.0
[limits]
spool_bytes_max = 1073741824
txn_ops_max = 64
stall_seconds = 12
[log]
format = "json"
level = "info,etcd_ferry=debug"
[traces]
endpoint = "https://collector.example:4317"
ca = "collector-ca.pem"
sample = 10
"#;

    const LEAST: &str = r#"
region = "us-east-1"
node = "us-east-1-a"
data_dir = "data"
etcd = { endpoints = ["http://127.0.0.1:2379"] }
listen = { peer = "0.0.0.0:7443", admin = "127.0.0.1:7444", http = "127.0.0.1:7445" }
tls = { ca = "ca.pem", cert = "a.pem", key = "a.key" }
send = [{ link = "config", to = ["https://ferry.example:7443"], peer = "ferry.example" }]
receive = [{ link = "back", peer = "ferry.example" }]
"#;

    #[test]
    fn what_is_told_reads_as_the_same_configuration() {
        for text in [FULL, LEAST] {
            let config = Config::from_toml(text).unwrap();
            let told = effective_toml(&config);
            let again = Config::from_toml(&told).unwrap_or_else(|faults| panic!("{faults}\nin\n{told}"));
            assert_eq!(effective_toml(&again), told);
            let plain = |config: &Config| format!("{config:?}").replace("prefixes: [b\"\"]", "prefixes: []");
            assert_eq!(plain(&again), plain(&config), "{told}");
        }
    }

    #[test]
    fn defaults_are_filled_in() {
        let told = effective_toml(&Config::from_toml(LEAST).unwrap());
        for line in [
            "prefixes = [\"\"]",
            "deletes_share_max = 0.1",
            "verify_interval_seconds = 900",
            "foreign_writes = \"report\"",
            "spool_bytes_max = 8589934592",
            "level = \"info\"",
            "viewers = []",
        ] {
            assert!(told.lines().any(|told| told == line), "{line} is not in\n{told}");
        }
    }
}
