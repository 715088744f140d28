//! Job: the rules of the configuration.
//! Input: a TOML table. Output: a `Config`, or all faults.
//! Pure: no file, no clock; what only the disk can tell is in `files.rs`.
//! Always true: a rule speaks of its own field, and also runs when other fields are at fault.

use super::files::NamedFiles;
use super::pki::{PkiConfig, pki};
use super::read::Section;
use super::traces::traces;
use super::{
    CompactConfig, Config, DeleteShares, EtcdConfig, Faults, ForeignWrites, Limits, ListenConfig, LogConfig, LogFormat,
    OnPoison, OtherHistory, ReceiveConfig, SendConfig, TlsConfig,
};
use crate::certs::{REGION_RULE, SAN_RULE, is_region_name, is_san};
use crate::model::{FERRY_PREFIX, LinkName, Ranges};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use toml::Table;

/// The share of the replica's keys that a base copy may delete, unless configured.
const DELETES_SHARE_MAX: f64 = 0.1;
/// A comparison by itself, unless configured: so often, with so much of a core.
const VERIFY_INTERVAL_SECONDS: u64 = 900;
const VERIFY_INTERVAL_SECONDS_MAX: u64 = 7 * 86_400;
/// Compaction of the replica by age.
const COMPACT_AFTER_SECONDS_MAX: u64 = 366 * 86_400;
const VERIFY_CORE_SHARE_MAX: f64 = 0.05;
/// Off, unless configured: each canary is a revision at both ends, and an idle link makes none.
const CANARY_INTERVAL_SECONDS: u64 = 0;
const CANARY_INTERVAL_SECONDS_MAX: u64 = 3_600;

/// Also says what of it names files, as far as that could be read.
pub(super) fn config(table: &Table) -> (Result<Config, Faults>, NamedFiles) {
    let mut root = Section::root(table);
    let region = name(&mut root, "region", "us-east-1");
    let node = name(&mut root, "node", "us-east-1-a");
    let data_dir = root.path("data_dir", "/var/lib/etcd-ferry");
    let etcd = root.table("etcd", Some("endpoints"), etcd);
    let listen = root.table("listen", Some("peer, admin and http"), listen);
    let tls = root.table("tls", Some("ca, cert, key and admins"), tls);
    let send = root.tables("send", send);
    let receive = root.tables("receive", receive);
    let limits = root.table("limits", None, limits);
    let log = root.table("log", None, log);
    let traces = root.table_if_present("traces", traces);

    if !table.contains_key("send") && !table.contains_key("receive") {
        root.fault("send", "is missing, and so is receive: add at least one [[send]] or [[receive]]; a sidecar that is to have no link any more is stopped");
    }
    unique_links(&mut root, "send", send.iter().map(|(i, s)| (*i, &s.link)));
    unique_links(&mut root, "receive", receive.iter().map(|(i, r)| (*i, &r.link)));
    disjoint_ranges(&mut root, &receive);
    if receive.is_empty() && etcd.as_ref().is_some_and(|(_, compact)| compact.is_some()) {
        let rule =
            "is for the etcd of a [[receive]], and there is none: remove it, an origin is compacted by its own users";
        root.fault_at("etcd.compact_after_seconds".to_owned(), rule);
    }

    let faults = root.finish();
    let named_etcd = etcd.as_ref().map(|(etcd, _)| etcd.clone());
    let files =
        NamedFiles { data_dir: data_dir.clone(), etcd: named_etcd, tls: tls.clone(), traces: traces.clone().flatten() };
    let config = match (region, node, data_dir, etcd, listen, tls, limits, log, traces) {
        (
            Some(region),
            Some(node),
            Some(data_dir),
            Some((etcd, compact)),
            Some(listen),
            Some((tls, pki)),
            Some(limits),
            Some(log),
            Some(traces),
        ) if faults.is_empty() => {
            let send = send.into_iter().map(|(_, s)| s).collect();
            let receive = receive.into_iter().map(|(_, r)| r).collect();
            Ok(Config { region, node, data_dir, etcd, compact, listen, tls, pki, send, receive, limits, log, traces })
        }
        _ => Err(Faults(faults)),
    };
    (config, files)
}

fn name(s: &mut Section<'_>, key: &'static str, example: &str) -> Option<String> {
    let name = s.text(key, example)?;
    if !is_region_name(&name) {
        s.fault(key, format!("must be {REGION_RULE}, such as {example:?}"));
        return None;
    }
    Some(name)
}

fn etcd(s: &mut Section<'_>) -> Option<(EtcdConfig, Option<CompactConfig>)> {
    let example = "http://127.0.0.1:2379";
    let endpoints = urls(s, "endpoints", &["http", "https"], example);
    let [ca, cert, key] = ["ca", "cert", "key"].map(|k| (k, s.path_if_present(k, "/etc/etcd-ferry/etcd.pem")));
    let username = s.text_if_present("username", "etcd-ferry");
    let password_file = s.path_if_present("password_file", "/etc/etcd-ferry/etcd-password");

    let allow_corrupting_versions = s.flag_if_present("allow_corrupting_versions").unwrap_or(false);

    if let Some(endpoints) = &endpoints {
        let https = endpoints.iter().filter(|e| e.starts_with("https:")).count();
        if https != 0 && https != endpoints.len() {
            s.fault("endpoints", "must be all http:// or all https://: a cluster speaks one of the two");
        } else if https == 0 {
            for (k, path) in [&ca, &cert, &key] {
                if path.is_some() {
                    s.fault(k, "is only for https:// endpoints: remove it, or write the endpoints with https://");
                }
            }
        } else if ca.1.is_none() {
            s.fault("ca", "is missing: https:// endpoints need the CA that signed etcd's certificate");
        }
    }
    together(s, "cert", cert.1.is_some(), "key", key.1.is_some());
    together(s, "username", username.is_some(), "password_file", password_file.is_some());
    let compact = compact(s);
    let (ca, cert, key) = (ca.1, cert.1, key.1);
    let endpoints = endpoints?;
    Some((EtcdConfig { endpoints, ca, cert, key, username, password_file, allow_corrupting_versions }, compact))
}

fn compact(s: &mut Section<'_>) -> Option<CompactConfig> {
    let after_seconds = limit(s, "compact_after_seconds", 0, 0, COMPACT_AFTER_SECONDS_MAX);
    let defragment = s.flag_if_present("defragment").unwrap_or(false);
    if defragment && after_seconds == 0 {
        s.fault("defragment", "goes only with compact_after_seconds: set that too, or remove this");
    }
    (after_seconds > 0).then(|| CompactConfig { after: Duration::from_secs(after_seconds), defragment })
}

fn together(s: &mut Section<'_>, a: &str, a_given: bool, b: &str, b_given: bool) {
    let lacking = |absent: &str, present: &str| format!("is missing: {present} is given, and goes only with {absent}");
    if a_given && !b_given {
        s.fault(b, lacking(b, a));
    } else if b_given && !a_given {
        s.fault(a, lacking(a, b));
    }
}

fn listen(s: &mut Section<'_>) -> Option<ListenConfig> {
    let keys = [("peer", "0.0.0.0:7443"), ("admin", "127.0.0.1:7444"), ("http", "127.0.0.1:7445")];
    let read = keys.map(|(key, example)| {
        let text = s.text(key, example)?;
        let address = text.parse::<SocketAddr>();
        if address.is_err() {
            s.fault(key, format!("must be an IP address and a port, such as {example:?} (found {text:?})"));
        }
        address.ok()
    });
    for (i, address) in read.iter().enumerate() {
        for (j, earlier) in read[..i].iter().enumerate() {
            if let (Some(a), Some(b)) = (address, earlier)
                && same_socket(a, b)
            {
                s.fault(keys[i].0, format!("{a} and {} ({b}) need the same port: give each its own", keys[j].0));
            }
        }
    }
    let [peer, admin, http] = read;
    Some(ListenConfig { peer: peer?, admin: admin?, http: http? })
}

/// Port 0 asks for a free port, so that it is never taken twice.
fn same_socket(a: &SocketAddr, b: &SocketAddr) -> bool {
    let everywhere = a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() != 0 && a.port() == b.port() && (a.ip() == b.ip() || everywhere)
}

fn tls(s: &mut Section<'_>) -> Option<(TlsConfig, Option<PkiConfig>)> {
    let ca = s.path("ca", "certs-dev/ca.pem");
    let cert = s.path("cert", "certs-dev/us-east-1.pem");
    let key = s.path("key", "certs-dev/us-east-1.key");
    let crl = s.path_if_present("crl", "certs-dev/crl.pem");
    let admins = sans(s, "admins");
    let viewers = sans(s, "viewers");
    for (field, san) in &viewers {
        if admins.iter().any(|(_, admin)| admin == san) {
            s.fault_at(field.clone(), "is among admins too, who may look anyway: remove it from one of the two");
        }
    }
    let pki = s.table_if_present("pki", pki);
    if s.has("pki") && [(&key, &cert), (&key, &ca), (&cert, &ca)].iter().any(|(a, b)| a.is_some() && a == b) {
        s.fault("key", "must be another file than cert and ca: the PKI's answers are written to them");
    }
    let [admins, viewers] = [admins, viewers].map(|sans| sans.into_iter().map(|(_, san)| san).collect());
    Some((TlsConfig { ca: ca?, cert: cert?, key: key?, crl, admins, viewers }, pki?))
}

/// Names of certificates, each with its field.
fn sans(s: &mut Section<'_>, key: &'static str) -> Vec<(String, String)> {
    let sans = s.texts(key).unwrap_or_default();
    for (field, san) in &sans {
        if !is_san(san) {
            s.fault_at(field.clone(), format!("must be {SAN_RULE} (found {san:?})"));
        }
    }
    sans
}

fn send(s: &mut Section<'_>) -> Option<SendConfig> {
    let link = link(s);
    let to = urls(s, "to", &["https"], "https://ferry.example:7443");
    let peer = peer(s);
    let prefixes = prefixes(s);
    let exclude = excludes(s, prefixes.as_deref());
    let share = s.number_if_present("deletes_share_max").unwrap_or(DELETES_SHARE_MAX);
    if !(0.0..=1.0).contains(&share) {
        s.fault("deletes_share_max", "must be from 0 (delete nothing unasked) to 1 (no guard)");
    }
    let other_history = match s.text_if_present("other_history", "stop").as_deref() {
        None | Some("stop") => OtherHistory::Stop,
        Some("resync") => OtherHistory::Resync,
        Some(other) => {
            s.fault("other_history", format!("must be \"stop\" or \"resync\" (found {other:?})"));
            OtherHistory::Stop
        }
    };
    let interval = limit(s, "verify_interval_seconds", VERIFY_INTERVAL_SECONDS, 0, VERIFY_INTERVAL_SECONDS_MAX);
    let verify_interval = (interval > 0).then_some(Duration::from_secs(interval));
    let verify_core_share_max = s.number_if_present("verify_core_share_max").unwrap_or(VERIFY_CORE_SHARE_MAX);
    if !(0.001..=1.0).contains(&verify_core_share_max) {
        s.fault("verify_core_share_max", "must be from 0.001 to 1 (a whole core)");
    }
    let canary = limit(s, "canary_interval_seconds", CANARY_INTERVAL_SECONDS, 0, CANARY_INTERVAL_SECONDS_MAX);
    let canary_interval = (canary > 0).then_some(Duration::from_secs(canary));
    let prefixes = prefixes.unwrap_or_default();
    let ranges = Ranges::new(&prefixes, &exclude);
    if ranges.pieces().is_empty() && !exclude.is_empty() {
        s.fault("exclude", "leaves no key to carry: make it narrower");
    }
    Some(SendConfig {
        link: link?,
        to: to?,
        peer: peer?,
        ranges,
        prefixes,
        exclude,
        deletes_share_max: share,
        other_history,
        verify_interval,
        verify_core_share_max,
        canary_interval,
    })
}

fn receive(s: &mut Section<'_>) -> Option<ReceiveConfig> {
    let link = link(s);
    let peer = peer(s);
    let prefixes = prefixes(s);
    let ranges = prefixes.as_ref().map(|p| Ranges::new(p, &[]));
    let foreign_writes = match s.text_if_present("foreign_writes", "report").as_deref() {
        None | Some("report") => ForeignWrites::Report,
        Some("repair") => ForeignWrites::Repair,
        Some("expect") => ForeignWrites::Expect,
        Some(other) => {
            s.fault("foreign_writes", format!("must be \"report\", \"repair\" or \"expect\" (found {other:?})"));
            ForeignWrites::Report
        }
    };
    let on_poison = match s.text_if_present("on_poison", "stop").as_deref() {
        None | Some("stop") => OnPoison::Stop,
        Some("quarantine") => OnPoison::Quarantine,
        Some(other) => {
            s.fault("on_poison", format!("must be \"stop\" or \"quarantine\" (found {other:?})"));
            OnPoison::Stop
        }
    };
    let [revision, minute] = ["revision_deletes_share_max", "minute_deletes_share_max"].map(|key| {
        let share = s.number_if_present(key)?;
        if !(0.0..=1.0).contains(&share) {
            s.fault(key, "must be from 0 (hold every delete) to 1; leave it out to hold none");
        }
        Some(share)
    });
    let delete_shares = DeleteShares { revision, minute };
    Some(ReceiveConfig { link: link?, peer: peer?, ranges, prefixes, foreign_writes, on_poison, delete_shares })
}

fn link(s: &mut Section<'_>) -> Option<LinkName> {
    let link = LinkName::new(&s.text("link", "config")?);
    link.map_err(|rule| s.fault("link", format!("breaks a rule: {rule}"))).ok()
}

fn peer(s: &mut Section<'_>) -> Option<String> {
    let peer = s.text("peer", "spiffe://etcd-ferry.dev/region/cn-hangzhou")?;
    if !is_san(&peer) {
        s.fault("peer", format!("must be {SAN_RULE} (found {peer:?})"));
        return None;
    }
    Some(peer)
}

/// A list with at least one URL of scheme, host and port, each once; a slash at the end is dropped.
fn urls(s: &mut Section<'_>, key: &'static str, schemes: &[&str], example: &str) -> Option<Vec<String>> {
    let Some(texts) = s.texts(key) else {
        // A value of the wrong type has its fault already.
        s.missing_list(key, example);
        return None;
    };
    if texts.is_empty() {
        s.fault(key, format!("is empty: give at least one, such as [{example:?}]"));
    }
    let mut urls: Vec<String> = Vec::new();
    for (field, text) in texts {
        let url = text.strip_suffix('/').unwrap_or(&text).to_owned();
        if !is_url(&url, schemes) {
            let scheme = schemes.join(":// or ");
            let rule = format!("must be {scheme}:// with a host, a port and nothing more, such as {example:?}");
            s.fault_at(field, format!("{rule} (found {:?})", without_user(&text)));
        } else if urls.contains(&url) {
            s.fault_at(field, "is given twice: remove one");
        }
        urls.push(url);
    }
    Some(urls)
}

pub(super) fn is_url(url: &str, schemes: &[&str]) -> bool {
    let Ok(uri) = url.parse::<http::Uri>() else { return false };
    let scheme = uri.scheme_str().is_some_and(|scheme| schemes.contains(&scheme));
    let host = uri.host().is_some_and(|host| !host.is_empty()) && !url.contains('@');
    let bare = uri.path_and_query().is_none_or(|p| p.as_str() == "/") && !url.ends_with('/') && !url.contains('#');
    scheme && host && bare && uri.port_u16().is_some_and(|port| port != 0)
}

/// A URL may hold a password before an '@', which must not be shown.
pub(super) fn without_user(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((_, rest)) => format!("...@{rest}"),
        None => url.to_owned(),
    }
}

/// The prefixes as bytes; `None` if the key is absent. `[""]` means the whole keyspace, as no key does.
fn prefixes(s: &mut Section<'_>) -> Option<Vec<Bytes>> {
    let texts = s.texts("prefixes")?;
    if texts.is_empty() {
        s.fault("prefixes", "is an empty list: remove it to mean the whole keyspace, or name a prefix");
    }
    let several = texts.len() > 1;
    let mut prefixes = Vec::new();
    for (field, prefix) in texts {
        if prefix.is_empty() && several {
            s.fault_at(field, "is empty, which means the whole keyspace: remove it, or the others");
        } else if prefix.as_bytes().starts_with(FERRY_PREFIX) {
            s.fault_at(field, "lies under /etcd-ferry/, which is never replicated: remove it");
        }
        prefixes.push(Bytes::from(prefix));
    }
    Some(prefixes)
}

fn excludes(s: &mut Section<'_>, prefixes: Option<&[Bytes]>) -> Vec<Bytes> {
    let mut excludes = Vec::new();
    for (field, exclude) in s.texts("exclude").unwrap_or_default() {
        let exclude = Bytes::from(exclude);
        let inside = |p: &Bytes| exclude.len() > p.len() && exclude.starts_with(p);
        if exclude.is_empty() {
            s.fault_at(field, "is empty, which excludes every key: remove it");
        } else if prefixes.is_some_and(|all| !all.iter().any(inside)) {
            s.fault_at(field, "must start with one of the prefixes and go on: it excludes nothing, or a whole prefix");
        }
        excludes.push(exclude);
    }
    excludes
}

fn unique_links<'a>(root: &mut Section<'_>, key: &str, links: impl Iterator<Item = (usize, &'a LinkName)>) {
    let mut first: BTreeMap<&LinkName, usize> = BTreeMap::new();
    for (i, link) in links {
        match first.get(link) {
            Some(earlier) => {
                let rule = format!("is the same as {key}[{earlier}].link: give each link of one side its own name");
                root.fault_at(format!("{key}[{i}].link"), rule);
            }
            None => {
                first.insert(link, i);
            }
        }
    }
}

/// Two origins writing the same keys of one replica would undo each other's work.
fn disjoint_ranges(root: &mut Section<'_>, receive: &[(usize, ReceiveConfig)]) {
    for (n, (i, a)) in receive.iter().enumerate() {
        for (j, b) in &receive[..n] {
            if let (Some(ranges), Some(earlier)) = (&a.ranges, &b.ranges)
                && ranges.overlaps(earlier)
            {
                let rule = format!("overlap those of receive[{j}]: two links cannot write the same keys of a replica");
                root.fault_at(format!("receive[{i}].prefixes"), rule);
            }
        }
    }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

fn limits(s: &mut Section<'_>) -> Option<Limits> {
    let d = Limits::default();
    let revision_max = wide(Limits::REVISION_BYTES_CEILING);
    let limits = Limits {
        spool_bytes_max: limit(s, "spool_bytes_max", d.spool_bytes_max, MIB, 16 * TIB),
        journal_bytes_max: limit(s, "journal_bytes_max", d.journal_bytes_max, MIB, 16 * TIB),
        segment_bytes: limit(s, "segment_bytes", d.segment_bytes, 64 * KIB, GIB),
        queue_bytes_max: limit(s, "queue_bytes_max", d.queue_bytes_max, 64 * KIB, GIB),
        frame_bytes_max: limit(s, "frame_bytes_max", d.frame_bytes_max, 4 * KIB, 32 * MIB),
        window_bytes_max: limit(s, "window_bytes_max", d.window_bytes_max, 64 * KIB, GIB),
        revision_bytes_max: limit(s, "revision_bytes_max", d.revision_bytes_max, 64 * KIB, revision_max),
        txn_ops_max: limit(s, "txn_ops_max", d.txn_ops_max, 4, 65_536),
        request_bytes_max: limit(s, "request_bytes_max", d.request_bytes_max, 64 * KIB, 256 * MIB),
        page_keys_max: limit(s, "page_keys_max", d.page_keys_max, 1, 100_000),
        page_bytes_max: limit(s, "page_bytes_max", d.page_bytes_max, 4 * KIB, 64 * MIB),
        // A call of etcd may take 10 s, and then says why it failed.
        stall_seconds: limit(s, "stall_seconds", d.stall_seconds, 12, 86_400),
    };
    relations(s, &limits);
    Some(limits)
}

/// A whole number in its bounds. A fault leaves the default, so that the other limits are checked too.
pub(super) fn limit<N>(s: &mut Section<'_>, key: &'static str, default: N, min: u64, max: u64) -> N
where
    N: TryFrom<u64>,
{
    let Some(number) = s.integer_if_present(key) else { return default };
    let checked = u64::try_from(number).ok().filter(|n| (min..=max).contains(n)).and_then(|n| N::try_from(n).ok());
    if checked.is_none() {
        s.fault(key, format!("must be from {min} to {max} (found {number})"));
    }
    checked.unwrap_or(default)
}

fn relations(s: &mut Section<'_>, l: &Limits) {
    let quarter = "a quarter of ";
    let rules: [(&str, u64, &str, &str, u64); 5] = [
        ("segment_bytes", l.segment_bytes, quarter, "spool_bytes_max", l.spool_bytes_max / 4),
        ("segment_bytes", l.segment_bytes, quarter, "journal_bytes_max", l.journal_bytes_max / 4),
        ("frame_bytes_max", wide(l.frame_bytes_max), "", "queue_bytes_max", wide(l.queue_bytes_max)),
        ("page_bytes_max", wide(l.page_bytes_max), "", "queue_bytes_max", wide(l.queue_bytes_max)),
        ("frame_bytes_max", wide(l.frame_bytes_max), "", "revision_bytes_max", wide(l.revision_bytes_max)),
    ];
    for (key, value, part, other, most) in rules {
        if value > most {
            s.fault(key, format!("is {value}, and must be at most {part}{other}, {most}: lower it, or raise {other}"));
        }
    }
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

fn log(s: &mut Section<'_>) -> Option<LogConfig> {
    let format = match s.text_if_present("format", "text").as_deref() {
        None | Some("text") => LogFormat::Text,
        Some("json") => LogFormat::Json,
        Some(other) => {
            s.fault("format", format!("must be \"text\" or \"json\" (found {other:?})"));
            LogFormat::Text
        }
    };
    let level = s.text_if_present("level", "info").unwrap_or_else(|| "info".to_owned());
    if !is_log_level(&level) {
        s.fault("level", format!("{LOG_LEVEL_RULE} (found {level:?})"));
    }
    Some(LogConfig { format, level })
}

/// What a log's level looks like.
pub const LOG_LEVEL_RULE: &str =
    "must be off, error, warn, info, debug or trace, or a list such as \"info,etcd_ferry=debug\"";

/// True if `level` follows [`LOG_LEVEL_RULE`].
pub fn is_log_level(level: &str) -> bool {
    level.split(',').all(is_log_directive)
}

/// A level, or `target=level`. A bare target, which a `tracing` filter would also take, is most likely a typing error.
fn is_log_directive(directive: &str) -> bool {
    let is_level = |l: &str| matches!(l, "off" | "error" | "warn" | "info" | "debug" | "trace");
    match directive.trim().split_once('=') {
        None => is_level(directive.trim()),
        Some((target, level)) => {
            let shape = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':' | '-');
            !target.is_empty() && target.chars().all(shape) && is_level(level)
        }
    }
}

#[cfg(test)]
mod tests;
