//! Job: what a new configuration changes under a running sidecar: which links, which limits, and what takes a restart.
//! Input: the configuration that runs, and the one that is wanted. Output: a `Change`.
//! Pure: no clock, no I/O.
//! Always true: every key that differs is told once, as taken or as one that needs a restart; a link in whose configuration, limits and
//! neighbours nothing differs is not touched.

use super::limits::Limit;
use super::{
    CompactConfig, Config, EtcdConfig, Limits, ListenConfig, LogConfig, PkiConfig, ReceiveConfig, SendConfig,
    TlsConfig, TracesConfig,
};
use crate::model::{LinkName, Side};

/// What becomes of one link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkChange {
    pub link: LinkName,
    pub side: Side,
    pub what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    Removed,
    /// In these keys: it stops, and starts anew from what it has on disk.
    Changed(Vec<&'static str>),
    Added,
}

/// From one configuration to the next, as far as a running sidecar can go.
#[derive(Debug, Clone)]
pub struct Change {
    /// What runs from then on: as wanted, but for what needs a restart.
    pub running: Config,
    /// First what ends, then what starts anew, then what is new: ranges are free before others take them.
    pub links: Vec<LinkChange>,
    /// Keys of `[limits]` that links take.
    pub limits: Vec<&'static str>,
    /// Another `log.level`.
    pub log_level: bool,
    /// Keys that stay as they are until the sidecar is restarted.
    pub needs_restart: Vec<&'static str>,
}

/// Compares two sound configurations.
pub fn compare(running: &Config, wanted: &Config) -> Change {
    let mut next = running.clone();
    next.send.clone_from(&wanted.send);
    next.receive.clone_from(&wanted.receive);
    next.log.level.clone_from(&wanted.log.level);
    let mut needs_restart = fixed(running, wanted);
    next.limits = limits(&running.limits, &wanted.limits, &mut needs_restart);
    let differing = differing_limits(&running.limits, &next.limits);
    let of_limits = |side: Side| differing.iter().filter(move |limit| limit.is_of(side)).map(|limit| limit.key);

    let (mut removed, mut changed, mut added) = (Vec::new(), Vec::new(), Vec::new());
    let mut sort = |link: &LinkName, side, keys: Option<Vec<&'static str>>| {
        let change = |what| LinkChange { link: link.clone(), side, what };
        match keys {
            None => added.push(change(What::Added)),
            Some(keys) if keys.is_empty() => {}
            Some(keys) => changed.push(change(What::Changed(keys))),
        }
    };
    for send in &next.send {
        let was = running.send.iter().find(|was| was.link == send.link);
        let keys = was.map(|was| {
            let mut keys = of_send(was, send);
            keys.extend((running.link_back(was) != next.link_back(send)).then_some("the link back"));
            keys.into_iter().chain(of_limits(Side::Origin)).collect()
        });
        sort(&send.link, Side::Origin, keys);
    }
    for receive in &next.receive {
        let was = running.receive.iter().find(|was| was.link == receive.link);
        let keys = was.map(|was| {
            let mut keys = of_receive(was, receive);
            keys.extend((running.sends_back(was) != next.sends_back(receive)).then_some("the link back"));
            keys.into_iter().chain(of_limits(Side::Replica)).collect()
        });
        sort(&receive.link, Side::Replica, keys);
    }
    let gone = |link: &LinkName, side| LinkChange { link: link.clone(), side, what: What::Removed };
    let sent = running.send.iter().filter(|was| !next.send.iter().any(|is| is.link == was.link));
    removed.extend(sent.map(|was| gone(&was.link, Side::Origin)));
    let received = running.receive.iter().filter(|was| !next.receive.iter().any(|is| is.link == was.link));
    removed.extend(received.map(|was| gone(&was.link, Side::Replica)));

    let links = [removed, changed, added].concat();
    let limits = differing.iter().map(|limit| limit.key).collect();
    let log_level = running.log.level != next.log.level;
    Change { running: next, links, limits, log_level, needs_restart }
}

/// What is given once for the whole life of a process.
fn fixed(was: &Config, is: &Config) -> Vec<&'static str> {
    let Config { region, node, data_dir, etcd, compact, listen, tls, pki, send: _, receive: _, limits: _, log, traces } =
        was;
    let EtcdConfig { endpoints, ca, cert, key, username, password_file, allow_corrupting_versions } = etcd;
    let ListenConfig { peer, admin, http } = listen;
    let TlsConfig { ca: tls_ca, cert: tls_cert, key: tls_key, crl, admins, viewers } = tls;
    let LogConfig { format, level: _ } = log;
    let after = |compact: &Option<CompactConfig>| compact.map(|CompactConfig { after, defragment: _ }| after);
    let defragment = |compact: &Option<CompactConfig>| compact.is_some_and(|compact| compact.defragment);
    let mut keys = named([
        ("region", *region != is.region),
        ("node", *node != is.node),
        ("data_dir", *data_dir != is.data_dir),
        ("etcd.endpoints", *endpoints != is.etcd.endpoints),
        ("etcd.ca", *ca != is.etcd.ca),
        ("etcd.cert", *cert != is.etcd.cert),
        ("etcd.key", *key != is.etcd.key),
        ("etcd.username", *username != is.etcd.username),
        ("etcd.password_file", *password_file != is.etcd.password_file),
        ("etcd.allow_corrupting_versions", *allow_corrupting_versions != is.etcd.allow_corrupting_versions),
        ("etcd.compact_after_seconds", after(compact) != after(&is.compact)),
        ("etcd.defragment", defragment(compact) != defragment(&is.compact)),
        ("listen.peer", *peer != is.listen.peer),
        ("listen.admin", *admin != is.listen.admin),
        ("listen.http", *http != is.listen.http),
        ("tls.ca", *tls_ca != is.tls.ca),
        ("tls.cert", *tls_cert != is.tls.cert),
        ("tls.key", *tls_key != is.tls.key),
        ("tls.crl", *crl != is.tls.crl),
        ("tls.admins", *admins != is.tls.admins),
        ("tls.viewers", *viewers != is.tls.viewers),
        ("log.format", *format != is.log.format),
    ]);
    keys.extend(of_pki(pki.as_ref(), is.pki.as_ref()));
    keys.extend(of_traces(traces.as_ref(), is.traces.as_ref()));
    keys
}

fn of_pki(was: Option<&PkiConfig>, is: Option<&PkiConfig>) -> Vec<&'static str> {
    let (was, is) = match (was, is) {
        (None, None) => return Vec::new(),
        (None, Some(_)) | (Some(_), None) => return vec!["tls.pki"],
        (Some(was), Some(is)) => (was, is),
    };
    let PkiConfig { address, ca, mount, role, namespace, token_file, names, common_name, ttl } = was;
    named([
        ("tls.pki.address", *address != is.address),
        ("tls.pki.ca", *ca != is.ca),
        ("tls.pki.mount", *mount != is.mount),
        ("tls.pki.role", *role != is.role),
        ("tls.pki.namespace", *namespace != is.namespace),
        ("tls.pki.token_file", *token_file != is.token_file),
        ("tls.pki.names", *names != is.names),
        ("tls.pki.common_name", *common_name != is.common_name),
        ("tls.pki.ttl_seconds", *ttl != is.ttl),
    ])
}

fn of_traces(was: Option<&TracesConfig>, is: Option<&TracesConfig>) -> Vec<&'static str> {
    let (was, is) = match (was, is) {
        (None, None) => return Vec::new(),
        (None, Some(_)) | (Some(_), None) => return vec!["traces"],
        (Some(was), Some(is)) => (was, is),
    };
    let TracesConfig { endpoint, ca, sample } = was;
    named([
        ("traces.endpoint", *endpoint != is.endpoint),
        ("traces.ca", *ca != is.ca),
        ("traces.sample", *sample != is.sample),
    ])
}

fn named<const N: usize>(keys: [(&'static str, bool); N]) -> Vec<&'static str> {
    keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
}

fn of_send(was: &SendConfig, is: &SendConfig) -> Vec<&'static str> {
    let SendConfig {
        link: _,
        to,
        peer,
        ranges: _,
        prefixes,
        exclude,
        deletes_share_max,
        other_history,
        verify_interval,
        verify_core_share_max,
        canary_interval,
    } = was;
    named([
        ("to", *to != is.to),
        ("peer", *peer != is.peer),
        ("prefixes", *prefixes != is.prefixes),
        ("exclude", *exclude != is.exclude),
        ("deletes_share_max", *deletes_share_max != is.deletes_share_max),
        ("other_history", *other_history != is.other_history),
        ("verify_interval_seconds", *verify_interval != is.verify_interval),
        ("verify_core_share_max", *verify_core_share_max != is.verify_core_share_max),
        ("canary_interval_seconds", *canary_interval != is.canary_interval),
    ])
}

fn of_receive(was: &ReceiveConfig, is: &ReceiveConfig) -> Vec<&'static str> {
    let ReceiveConfig { link: _, peer, ranges: _, prefixes, foreign_writes, on_poison, delete_shares } = was;
    named([
        ("peer", *peer != is.peer),
        ("prefixes", *prefixes != is.prefixes),
        ("foreign_writes", *foreign_writes != is.foreign_writes),
        ("on_poison", *on_poison != is.on_poison),
        ("revision_deletes_share_max", delete_shares.revision != is.delete_shares.revision),
        ("minute_deletes_share_max", delete_shares.minute != is.delete_shares.minute),
    ])
}

/// `revision_bytes_max` is also what the peer port reads at most in one message, for all links: it stays until a restart, and with it a
/// frame that would be larger.
fn limits(was: &Limits, wanted: &Limits, needs_restart: &mut Vec<&'static str>) -> Limits {
    let mut is = Limits { revision_bytes_max: was.revision_bytes_max, ..wanted.clone() };
    if is.frame_bytes_max > is.revision_bytes_max {
        is.frame_bytes_max = was.frame_bytes_max;
        needs_restart.push("limits.frame_bytes_max");
    }
    if wanted.revision_bytes_max != was.revision_bytes_max {
        needs_restart.push("limits.revision_bytes_max");
    }
    is
}

fn differing_limits(was: &Limits, is: &Limits) -> Vec<Limit> {
    let pairs = was.each().into_iter().zip(is.each());
    pairs.filter(|(was, is)| was.value != is.value).map(|(_, is)| is).collect()
}

impl Config {
    /// True if this process is also the replica of an overlapping link from the same peer. What a `[[receive]]` without prefixes will bring,
    /// the peer knows: it tells in its answer to the hello.
    pub fn link_back(&self, send: &SendConfig) -> bool {
        let overlaps = |receive: &ReceiveConfig| receive.ranges.as_ref().is_some_and(|r| r.overlaps(&send.ranges));
        self.receive.iter().any(|receive| receive.peer == send.peer && overlaps(receive))
    }

    /// Ranges of this process's own links to the peer that a link is received from.
    pub fn sends_back(&self, receive: &ReceiveConfig) -> Vec<crate::model::Ranges> {
        self.send.iter().filter(|send| send.peer == receive.peer).map(|send| send.ranges.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: &str = r#"
region = "us-east-1"
node = "us-east-1-a"
data_dir = "/var/lib/etcd-ferry"
[etcd]
endpoints = ["http://127.0.0.1:2379"]
[listen]
peer = "0.0.0.0:7443"
admin = "127.0.0.1:7444"
http = "127.0.0.1:7445"
[tls]
ca = "ca.pem"
cert = "a.pem"
key = "a.key"
[limits]
[log]
[[send]]
link = "config"
to = ["https://ferry.example:7443"]
peer = "hangzhou.example"
prefixes = ["/app/"]
[[receive]]
link = "orders"
peer = "berlin.example"
prefixes = ["/orders/"]
"#;

    fn config(text: &str) -> Config {
        Config::from_toml(text).unwrap_or_else(|faults| panic!("{faults}\nin\n{text}"))
    }

    fn compared(from: &str, to: &str) -> Change {
        assert_eq!(RUNNING.matches(from).count(), 1, "{from:?} is there once");
        compare(&config(RUNNING), &config(&RUNNING.replace(from, to)))
    }

    /// `link side what` of each.
    fn told(change: &Change) -> Vec<String> {
        let one = |change: &LinkChange| format!("{} {} {:?}", change.link, change.side.as_str(), change.what);
        change.links.iter().map(one).collect()
    }

    /// Where it is applied, nothing of it is left but what needs a restart.
    fn assert_settles(change: &Change, wanted: &Config) {
        let again = compare(&change.running, wanted);
        assert_eq!((again.links, again.limits, again.log_level), (Vec::new(), Vec::new(), false));
        assert_eq!(again.needs_restart, change.needs_restart);
    }

    #[test]
    fn the_same_configuration_changes_nothing() {
        let change = compare(&config(RUNNING), &config(RUNNING));
        assert_eq!(told(&change), Vec::<String>::new());
        assert_eq!((change.limits, change.log_level, change.needs_restart), (Vec::new(), false, Vec::new()));
    }

    #[test]
    fn links_are_removed_before_others_change_and_added_last() {
        let wanted = RUNNING.replace("link = \"config\"", "link = \"other\"").replace("berlin", "paris");
        let wanted = config(&wanted);
        let change = compare(&config(RUNNING), &wanted);
        let links = ["config origin Removed", "orders replica Changed([\"peer\"])", "other origin Added"];
        assert_eq!(told(&change), links);
        assert_eq!(change.running.send[0].link.as_str(), "other");
        assert_settles(&change, &wanted);
        // One name on both sides is two links.
        let moved = RUNNING.replace("link = \"orders\"", "link = \"config\"");
        let change = compare(&config(RUNNING), &config(&moved));
        assert_eq!(told(&change), ["orders replica Removed", "config replica Added"]);
    }

    #[test]
    fn each_key_of_a_link_changes_that_link_alone() {
        for (from, to, key) in [
            ("\"https://ferry.example:7443\"", "\"https://ferry.example:7444\"", "to"),
            ("hangzhou.example", "shanghai.example", "peer"),
            ("prefixes = [\"/app/\"]", "prefixes = [\"/app/x/\"]", "prefixes"),
            ("prefixes = [\"/app/\"]", "prefixes = [\"/app/\"]\nexclude = [\"/app/x/\"]", "exclude"),
            ("prefixes = [\"/app/\"]", "prefixes = [\"/app/\"]\ndeletes_share_max = 0.2", "deletes_share_max"),
            ("prefixes = [\"/app/\"]", "prefixes = [\"/app/\"]\nother_history = \"resync\"", "other_history"),
            (
                "prefixes = [\"/app/\"]",
                "prefixes = [\"/app/\"]\nverify_interval_seconds = 1",
                "verify_interval_seconds",
            ),
            ("prefixes = [\"/app/\"]", "prefixes = [\"/app/\"]\nverify_core_share_max = 1", "verify_core_share_max"),
            (
                "prefixes = [\"/app/\"]",
                "prefixes = [\"/app/\"]\ncanary_interval_seconds = 1",
                "canary_interval_seconds",
            ),
        ] {
            assert_eq!(told(&compared(from, to)), [format!("config origin Changed([{key:?}])")], "{to}");
        }
        for (from, to, key) in [
            ("berlin.example", "paris.example", "peer"),
            ("prefixes = [\"/orders/\"]", "", "prefixes"),
            ("prefixes = [\"/orders/\"]", "prefixes = [\"/orders/\"]\nforeign_writes = \"repair\"", "foreign_writes"),
            ("prefixes = [\"/orders/\"]", "prefixes = [\"/orders/\"]\non_poison = \"quarantine\"", "on_poison"),
            (
                "prefixes = [\"/orders/\"]",
                "prefixes = [\"/orders/\"]\nrevision_deletes_share_max = 0.5",
                "revision_deletes_share_max",
            ),
            (
                "prefixes = [\"/orders/\"]",
                "prefixes = [\"/orders/\"]\nminute_deletes_share_max = 0.5",
                "minute_deletes_share_max",
            ),
        ] {
            assert_eq!(told(&compared(from, to)), [format!("orders replica Changed([{key:?}])")], "{to}");
        }
    }

    #[test]
    fn a_link_back_that_comes_or_goes_changes_the_link_that_it_answers() {
        let back = "[[receive]]\nlink = \"config-back\"\npeer = \"hangzhou.example\"\nprefixes = [\"/app/\"]\n";
        let there = config(&format!("{RUNNING}{back}"));
        let change = compare(&config(RUNNING), &there);
        assert_eq!(told(&change), ["config origin Changed([\"the link back\"])", "config-back replica Added"]);
        let change = compare(&there, &config(RUNNING));
        assert_eq!(told(&change), ["config-back replica Removed", "config origin Changed([\"the link back\"])"]);
        // The other way round: what is sent to the peer of a link that is received.
        let back =
            "[[send]]\nlink = \"back\"\nto = [\"https://b:1\"]\npeer = \"berlin.example\"\nprefixes = [\"/x/\"]\n";
        let change = compare(&config(RUNNING), &config(&format!("{RUNNING}{back}")));
        assert_eq!(told(&change), ["orders replica Changed([\"the link back\"])", "back origin Added"]);
    }

    #[test]
    fn a_limit_changes_the_links_that_have_it() {
        let (origin, replica) = ("config origin", "orders replica");
        for (key, value, sides) in [
            ("spool_bytes_max", "1073741824", &[origin][..]),
            ("journal_bytes_max", "536870912", &[replica]),
            ("segment_bytes", "1048576", &[origin, replica]),
            ("queue_bytes_max", "16777216", &[origin, replica]),
            ("frame_bytes_max", "65536", &[origin, replica]),
            ("window_bytes_max", "65536", &[origin, replica]),
            ("txn_ops_max", "64", &[replica]),
            ("request_bytes_max", "1576960", &[replica]),
            ("page_keys_max", "10", &[origin]),
            ("page_bytes_max", "65536", &[origin]),
            ("stall_seconds", "60", &[origin, replica]),
        ] {
            let change = compared("[limits]", &format!("[limits]\n{key} = {value}"));
            let wanted: Vec<String> = sides.iter().map(|side| format!("{side} Changed([\"limits.{key}\"])")).collect();
            assert_eq!(told(&change), wanted, "{key}");
            assert_eq!(change.limits, [format!("limits.{key}")]);
            assert_eq!(change.needs_restart, Vec::<&str>::new(), "{key}");
        }
    }

    #[test]
    fn the_largest_revision_and_a_frame_larger_than_it_wait_for_a_restart() {
        let change = compared("[limits]", "[limits]\nrevision_bytes_max = 536870912");
        assert_eq!((told(&change), change.needs_restart), (Vec::new(), vec!["limits.revision_bytes_max"]));
        let small = RUNNING.replace("[limits]", "[limits]\nrevision_bytes_max = 2097152");
        let wanted = config(&RUNNING.replace("[limits]", "[limits]\nframe_bytes_max = 4194304"));
        let change = compare(&config(&small), &wanted);
        assert_eq!(told(&change), Vec::<String>::new());
        assert_eq!(change.needs_restart, ["limits.frame_bytes_max", "limits.revision_bytes_max"]);
        assert_settles(&change, &wanted);
    }

    #[test]
    fn a_log_level_is_taken_and_everything_else_needs_a_restart() {
        let change = compared("[log]", "[log]\nlevel = \"debug\"");
        assert!(change.log_level && change.links.is_empty() && change.needs_restart.is_empty());
        assert_eq!(change.running.log.level, "debug");
        for (from, to, keys) in [
            ("region = \"us-east-1\"", "region = \"us-east-2\"", &["region"][..]),
            ("us-east-1-a", "us-east-1-b", &["node"]),
            ("/var/lib/etcd-ferry", "/var/lib/ferry", &["data_dir"]),
            ("127.0.0.1:2379", "127.0.0.1:2378", &["etcd.endpoints"]),
            ("[etcd]", "[etcd]\nusername = \"x\"\npassword_file = \"p\"", &["etcd.username", "etcd.password_file"]),
            ("[etcd]", "[etcd]\nallow_corrupting_versions = true", &["etcd.allow_corrupting_versions"]),
            ("[etcd]", "[etcd]\ncompact_after_seconds = 9", &["etcd.compact_after_seconds"]),
            (
                "[etcd]",
                "[etcd]\ncompact_after_seconds = 9\ndefragment = true",
                &["etcd.compact_after_seconds", "etcd.defragment"],
            ),
            ("0.0.0.0:7443", "0.0.0.0:7442", &["listen.peer"]),
            ("127.0.0.1:7444", "127.0.0.1:7442", &["listen.admin"]),
            ("127.0.0.1:7445", "127.0.0.1:7442", &["listen.http"]),
            ("\"ca.pem\"", "\"b.pem\"", &["tls.ca"]),
            ("\"a.pem\"", "\"b.pem\"", &["tls.cert"]),
            ("\"a.key\"", "\"b.key\"", &["tls.key"]),
            ("[tls]", "[tls]\ncrl = \"crl.pem\"", &["tls.crl"]),
            ("[tls]", "[tls]\nadmins = [\"a.example\"]", &["tls.admins"]),
            ("[tls]", "[tls]\nviewers = [\"a.example\"]", &["tls.viewers"]),
            ("[log]", "[log]\nformat = \"json\"", &["log.format"]),
        ] {
            let change = compared(from, to);
            assert_eq!(change.needs_restart, keys, "{to}");
            assert_eq!((told(&change), change.limits, change.log_level), (Vec::new(), Vec::new(), false), "{to}");
            assert_eq!(format!("{:?}", change.running), format!("{:?}", config(RUNNING)), "{to}");
        }
        let pki = "[tls.pki]\naddress = \"https://a:1\"\nca = \"c\"\nmount = \"m\"\nrole = \"r\"\nnamespace = \"n\"\ntoken_file = \"t\"\n\
                   names = [\"a.example\"]\ncommon_name = \"a.example\"\nttl_seconds = 3600\n";
        let with = |pki: &str| config(&RUNNING.replace("[limits]", &format!("{pki}[limits]")));
        assert_eq!(compare(&config(RUNNING), &with(pki)).needs_restart, ["tls.pki"]);
        assert_eq!(compare(&with(pki), &config(RUNNING)).needs_restart, ["tls.pki"]);
        for (from, to, key) in [
            ("https://a:1", "https://a:2", "address"),
            ("\"c\"", "\"d\"", "ca"),
            ("\"m\"", "\"d\"", "mount"),
            ("\"r\"", "\"d\"", "role"),
            ("\"n\"", "\"d\"", "namespace"),
            ("\"t\"", "\"d\"", "token_file"),
            ("names = [\"a.", "names = [\"b.", "names"),
            ("common_name = \"a.", "common_name = \"b.", "common_name"),
            ("3600", "7200", "ttl_seconds"),
        ] {
            let change = compare(&with(pki), &with(&pki.replacen(from, to, 1)));
            assert_eq!(change.needs_restart, [format!("tls.pki.{key}")], "{from}");
        }
        let traces = "[traces]\nendpoint = \"https://a:1\"\nca = \"c\"\n";
        let with = |traces: &str| config(&RUNNING.replace("[limits]", &format!("{traces}[limits]")));
        assert_eq!(compare(&config(RUNNING), &with(traces)).needs_restart, ["traces"]);
        assert_eq!(compare(&with(traces), &config(RUNNING)).needs_restart, ["traces"]);
        for (from, to, key) in [
            ("https://a:1", "https://a:2", "endpoint"),
            ("\"c\"", "\"d\"", "ca"),
            ("ca =", "sample = 5\nca =", "sample"),
        ] {
            let change = compare(&with(traces), &with(&traces.replacen(from, to, 1)));
            assert_eq!(change.needs_restart, [format!("traces.{key}")], "{from}");
        }
        let https = RUNNING.replace("http://127.0.0.1:2379\"]", "https://127.0.0.1:2379\"]\nca = \"x.pem\"");
        let pair = https.replace("ca = \"x.pem\"", "ca = \"x.pem\"\ncert = \"c\"\nkey = \"k\"");
        assert_eq!(compare(&config(&https), &config(&pair)).needs_restart, ["etcd.cert", "etcd.key"]);
        assert_eq!(compare(&config(RUNNING), &config(&https)).needs_restart, ["etcd.endpoints", "etcd.ca"]);
    }
}
