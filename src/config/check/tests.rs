//! Job: tests of the rules of the configuration: what is sound, what is refused, and with which words.
//! Input: TOML texts. Output: passes or fails.
//! Pure: no clock, no I/O.
//! Always true: a test of a rule breaks that rule alone, unless it is about several.

use super::*;

const SOUND: &str = r#"
region = "us-east-1"
node = "us-east-1-a"
data_dir = "/var/lib/etcd-ferry"
etcd.endpoints = ["http://127.0.0.1:2379"]
listen = { peer = "0.0.0.0:7443", admin = "127.0.0.1:7444", http = "127.0.0.1:7445" }
tls = { ca = "ca.pem", cert = "a.pem", key = "a.key", admins = ["spiffe://etcd-ferry.dev/admin"] }
[[send]]
link = "config"
to = ["https://ferry.cn-hangzhou.example:7443"]
peer = "spiffe://etcd-ferry.dev/region/cn-hangzhou"
[[receive]]
link = "config"
peer = "ferry.us-east-1.example"
"#;

/// The fields at fault when `from` is written as `to` in the sound configuration.
fn fields(from: &str, to: &str) -> Vec<String> {
    assert_eq!(SOUND.matches(from).count(), 1, "{from:?} is in the sound configuration once");
    match Config::from_toml(&SOUND.replace(from, to)) {
        Ok(_) => Vec::new(),
        Err(Faults(faults)) => faults.into_iter().map(|f| f.field).collect(),
    }
}

/// The same for lines added to the `[[send]]` table.
fn send_fields(lines: &str) -> Vec<String> {
    fields("[[receive]]", &format!("{lines}\n[[receive]]"))
}

#[test]
fn a_sound_configuration_gets_its_defaults() {
    let config = Config::from_toml(SOUND).unwrap();
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.log, LogConfig { format: LogFormat::Text, level: "info".to_owned() });
    assert_eq!(config.send[0].deletes_share_max, 0.1);
    assert_eq!(config.send[0].verify_interval, Some(Duration::from_secs(900)));
    assert_eq!(config.send[0].verify_core_share_max, 0.05);
    assert_eq!(config.send[0].ranges, Ranges::new(&[], &[]));
    assert_eq!(config.receive[0].ranges, None);
}

#[test]
fn a_comparison_by_itself_can_be_switched_off_and_takes_some_of_a_core_and_not_more_than_one() {
    let config = Config::from_toml(&SOUND.replace("[[receive]]", "verify_interval_seconds = 0\n[[receive]]")).unwrap();
    assert_eq!(config.send[0].verify_interval, None);
    assert_eq!(send_fields("verify_interval_seconds = 604801"), ["send[0].verify_interval_seconds"]);
    for share in ["0", "-1", "1.1", "nan"] {
        assert_eq!(send_fields(&format!("verify_core_share_max = {share}")), ["send[0].verify_core_share_max"]);
    }
    assert!(send_fields("verify_core_share_max = 1").is_empty());
}

#[test]
fn others_writes_are_told_unless_they_are_to_be_mended_or_expected() {
    let given =
        |line: &str| Config::from_toml(&format!("{SOUND}{line}")).map(|config| config.receive[0].foreign_writes);
    assert_eq!(given("").unwrap(), ForeignWrites::Report);
    for (word, taken) in
        [("report", ForeignWrites::Report), ("repair", ForeignWrites::Repair), ("expect", ForeignWrites::Expect)]
    {
        assert_eq!(given(&format!("foreign_writes = \"{word}\"")).unwrap(), taken);
    }
    for wrong in ["\"mend\"", "\"\"", "true"] {
        let Faults(faults) = given(&format!("foreign_writes = {wrong}")).unwrap_err();
        assert_eq!(faults.iter().map(|f| &f.field[..]).collect::<Vec<_>>(), ["receive[0].foreign_writes"], "{wrong}");
    }
}

#[test]
fn an_origin_with_another_history_stops_the_link_unless_it_is_to_go_on_with_it() {
    let given = |line: &str| {
        let text = SOUND.replace("[[receive]]", &format!("{line}\n[[receive]]"));
        Config::from_toml(&text).map(|config| config.send[0].other_history)
    };
    assert_eq!(given("").unwrap(), OtherHistory::Stop);
    assert_eq!(given("other_history = \"stop\"").unwrap(), OtherHistory::Stop);
    assert_eq!(given("other_history = \"resync\"").unwrap(), OtherHistory::Resync);
    for wrong in ["\"copy\"", "\"\"", "true"] {
        let Faults(faults) = given(&format!("other_history = {wrong}")).unwrap_err();
        assert_eq!(faults.iter().map(|f| &f.field[..]).collect::<Vec<_>>(), ["send[0].other_history"], "{wrong}");
    }
}

#[test]
fn what_is_refused_whenever_it_is_tried_stops_a_link_unless_it_is_to_be_quarantined() {
    let given = |line: &str| Config::from_toml(&format!("{SOUND}{line}")).map(|config| config.receive[0].on_poison);
    assert_eq!(given("").unwrap(), OnPoison::Stop);
    for (word, taken) in [("stop", OnPoison::Stop), ("quarantine", OnPoison::Quarantine)] {
        assert_eq!(given(&format!("on_poison = \"{word}\"")).unwrap(), taken);
    }
    for wrong in ["\"skip\"", "\"\"", "true"] {
        let Faults(faults) = given(&format!("on_poison = {wrong}")).unwrap_err();
        assert_eq!(faults.iter().map(|f| &f.field[..]).collect::<Vec<_>>(), ["receive[0].on_poison"], "{wrong}");
    }
}

#[test]
fn deletes_are_not_held_back_unless_a_share_from_0_to_1_is_given() {
    let given = |line: &str| Config::from_toml(&format!("{SOUND}{line}")).map(|config| config.receive[0].delete_shares);
    assert_eq!(given("").unwrap(), DeleteShares { revision: None, minute: None });
    let both = given("revision_deletes_share_max = 0.25\nminute_deletes_share_max = 1").unwrap();
    assert_eq!(both, DeleteShares { revision: Some(0.25), minute: Some(1.0) });
    for key in ["revision_deletes_share_max", "minute_deletes_share_max"] {
        for wrong in ["-0.1", "1.1", "nan", "\"0.1\""] {
            let Faults(faults) = given(&format!("{key} = {wrong}")).unwrap_err();
            let fields: Vec<&str> = faults.iter().map(|f| &f.field[..]).collect();
            assert_eq!(fields, [format!("receive[0].{key}")], "{wrong}");
        }
    }
}

#[test]
fn what_is_given_is_taken() {
    let text = SOUND.replace(
        "[[receive]]",
        "prefixes = [\"/app/\", \"ä\"]\nexclude = [\"/app/tmp/\"]\ndeletes_share_max = 1\n[limits]\ntxn_ops_max = 64\n\
         segment_bytes = 1048576\n[log]\nformat = \"json\"\nlevel = \"info,etcd_ferry=debug\"\n[[receive]]\nprefixes = [\"\"]",
    );
    let config = Config::from_toml(&text).unwrap();
    let send = &config.send[0];
    assert!(send.ranges.contains(b"/app/x") && send.ranges.contains("ä".as_bytes()));
    assert!(!send.ranges.contains(b"/app/tmp/x") && !send.ranges.contains(b"/b"));
    assert_eq!(send.deletes_share_max, 1.0);
    assert_eq!((config.limits.txn_ops_max, config.limits.segment_bytes), (64, 1 << 20));
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.receive[0].ranges, Some(Ranges::new(&[], &[])));
}

#[test]
fn all_faults_are_found_at_once() {
    let text = r#"
nod = "x"
region = "not/good"
data_dir = 7
[etcd]
endpoints = ["http://a:1", "https://b:2"]
cert = "c.pem"
[listen]
peer = "0.0.0.0:7443"
admin = "localhost"
http = "127.0.0.1:7443"
[tls]
ca = ""
cert = "c.pem"
kee = "k.pem"
admins = ["two words"]
[[send]]
link = "Config"
to = ["http://a:1", "https://a", 5]
peer = "https:"
deletes_share_max = 1.5
[limits]
txn_ops_max = 1
[log]
level = "inof"
"#;
    let faults = Config::from_toml(text).unwrap_err();
    let mut fields: Vec<&str> = faults.0.iter().map(|f| f.field.as_str()).collect();
    fields.sort_unstable();
    let expected = [
        "data_dir",
        "etcd.endpoints",
        "etcd.key",
        "limits.txn_ops_max",
        "listen.admin",
        "listen.http",
        "log.level",
        "nod",
        "node",
        "region",
        "send[0].deletes_share_max",
        "send[0].link",
        "send[0].peer",
        "send[0].to[0]",
        "send[0].to[1]",
        "send[0].to[2]",
        "tls.admins[0]",
        "tls.ca",
        "tls.kee",
        "tls.key",
    ];
    assert_eq!(fields, expected);
    assert_eq!(faults.to_string().lines().count(), expected.len(), "one line each");
}

#[test]
fn each_side_has_its_rules() {
    for (from, to, field) in [
        ("[[send]]", "[sent]", "sent"),
        ("region = \"us-east-1\"", "", "region"),
        ("[\"http://127.0.0.1:2379\"]", "[]", "etcd.endpoints"),
        ("[\"http://127.0.0.1:2379\"]", "\"http://127.0.0.1:2379\"", "etcd.endpoints"),
        ("[\"http://127.0.0.1:2379\"]", "[\"http://127.0.0.1\"]", "etcd.endpoints[0]"),
        ("[\"http://127.0.0.1:2379\"]", "[\"http://127.0.0.1:2379/x\"]", "etcd.endpoints[0]"),
        ("[\"http://127.0.0.1:2379\"]", "[\"http://127.0.0.1:0\"]", "etcd.endpoints[0]"),
        ("[\"http://127.0.0.1:2379\"]", "[\"http://a:1\", \"http://a:1/\"]", "etcd.endpoints[1]"),
        ("[\"http://127.0.0.1:2379\"]", "[\"https://127.0.0.1:2379\"]", "etcd.ca"),
        ("[\"http://127.0.0.1:2379\"]", "[\"http://127.0.0.1:2379\"]\netcd.ca = \"x\"", "etcd.ca"),
        ("[\"http://127.0.0.1:2379\"]", "[\"http://127.0.0.1:2379\"]\netcd.username = \"x\"", "etcd.password_file"),
        ("[\"http://127.0.0.1:2379\"]", "[\"http://127.0.0.1:2379\"]\netcd.password_file = \"x\"", "etcd.username"),
        ("127.0.0.1:7444", "127.0.0.1:7445", "listen.http"),
        ("127.0.0.1:7444", "127.0.0.1:7443", "listen.admin"),
        (", admins = [\"spiffe://etcd-ferry.dev/admin\"]", ", admins = [\"*.example\"]", "tls.admins[0]"),
        (", admins = [\"spiffe://etcd-ferry.dev/admin\"]", ", viewers = [\"two words\"]", "tls.viewers[0]"),
        (
            "dev/admin\"] }",
            "dev/admin\"], viewers = [\"a.example\", \"spiffe://etcd-ferry.dev/admin\"] }",
            "tls.viewers[1]",
        ),
        (", admins = [\"spiffe://etcd-ferry.dev/admin\"]", ", crl = \"\"", "tls.crl"),
        ("\"https://ferry.cn-hangzhou.example:7443\"", "\"http://ferry.example:7443\"", "send[0].to[0]"),
        ("ferry.us-east-1.example", "127.0.0.1", "receive[0].peer"),
    ] {
        assert_eq!(fields(from, to), [field], "{to}");
    }
    assert!(fields("127.0.0.1:7444", "127.0.0.1:0").is_empty());
    assert!(fields("127.0.0.1:7444", "[::1]:7445").is_empty(), "other addresses may have the same port");
}

#[test]
fn port_zero_is_never_taken_twice() {
    let listen = r#"{ peer = "127.0.0.1:0", admin = "127.0.0.1:0", http = "127.0.0.1:0" }"#;
    let given = r#"{ peer = "0.0.0.0:7443", admin = "127.0.0.1:7444", http = "127.0.0.1:7445" }"#;
    assert!(fields(given, listen).is_empty());
}

#[test]
fn prefixes_and_excludes_have_their_rules() {
    for (lines, field) in [
        ("prefixes = []", "send[0].prefixes"),
        ("prefixes = [\"/a/\", \"\"]", "send[0].prefixes[1]"),
        ("prefixes = [\"/etcd-ferry/x\"]", "send[0].prefixes[0]"),
        ("prefixes = [\"/a/\"]\nexclude = [\"/b/\"]", "send[0].exclude[0]"),
        ("prefixes = [\"/a/b/\"]\nexclude = [\"/a/\"]", "send[0].exclude[0]"),
        ("exclude = [\"\"]", "send[0].exclude[0]"),
        ("exclude = \"/a/\"", "send[0].exclude"),
        ("deletes_share_max = nan", "send[0].deletes_share_max"),
        ("deletes_share_max = \"half\"", "send[0].deletes_share_max"),
    ] {
        assert!(send_fields(lines).contains(&field.to_owned()), "{lines}: {:?}", send_fields(lines));
    }
    assert!(send_fields("prefixes = [\"\"]\nexclude = [\"/b/\"]").is_empty());
    assert!(send_fields("prefixes = [\"/etcd\"]").is_empty(), "wider than our own keys, which are left out of it");
}

#[test]
fn a_replica_is_compacted_by_age_only_where_that_is_asked_for() {
    let with = |lines: &str| Config::from_toml(&SOUND.replace("listen =", &format!("{lines}\nlisten =")));
    assert!(with("").unwrap().compact.is_none());
    let compact = with("etcd.compact_after_seconds = 3600\netcd.defragment = true").unwrap().compact.unwrap();
    assert_eq!((compact.after, compact.defragment), (Duration::from_secs(3_600), true));
    assert!(with("etcd.compact_after_seconds = 0").unwrap().compact.is_none());
    let wrong = ["etcd.compact_after_seconds = -1", "etcd.defragment = true", "etcd.defragment = 1"];
    for (lines, field) in wrong.into_iter().zip(["etcd.compact_after_seconds", "etcd.defragment", "etcd.defragment"]) {
        let Faults(faults) = with(lines).unwrap_err();
        assert_eq!(faults.iter().map(|f| &f.field[..]).collect::<Vec<_>>(), [field], "{lines}: {faults:?}");
    }
    let origin_alone = SOUND.split_once("[[receive]]").unwrap().0;
    let text = origin_alone.replace("listen =", "etcd.compact_after_seconds = 60\nlisten =");
    let Faults(faults) = Config::from_toml(&text).unwrap_err();
    assert_eq!(faults[0].field, "etcd.compact_after_seconds", "{faults:?}");
}

#[test]
fn links_are_unique_on_each_side_and_receive_disjoint_ranges() {
    let again = "link = \"config\"\npeer = \"a.example\"\nprefixes = [\"/a/\"]";
    let text = format!("{SOUND}prefixes = [\"/a/b/\"]\n[[receive]]\n{again}");
    let Faults(faults) = Config::from_toml(&text).unwrap_err();
    let fields: Vec<&str> = faults.iter().map(|f| f.field.as_str()).collect();
    assert_eq!(fields, ["receive[1].link", "receive[1].prefixes"]);
}

#[test]
fn a_configuration_without_links_is_no_configuration() {
    let text = &SOUND[..SOUND.find("[[send]]").unwrap()];
    let Faults(faults) = Config::from_toml(text).unwrap_err();
    assert_eq!(faults.len(), 1);
    assert!(faults[0].rule.contains("at least one [[send]] or [[receive]]"));
}

#[test]
fn limits_have_bounds_and_fit_each_other() {
    for (line, field) in [
        ("txn_ops_max = 3", "limits.txn_ops_max"),
        ("page_keys_max = 0", "limits.page_keys_max"),
        ("queue_bytes_max = -1", "limits.queue_bytes_max"),
        ("queue_bytes_max = 1e6", "limits.queue_bytes_max"),
        ("revision_bytes_max = 9223372036854775807", "limits.revision_bytes_max"),
        ("spool_bytes_max = 16777216", "limits.segment_bytes"),
        ("journal_bytes_max = 16777216", "limits.segment_bytes"),
        ("frame_bytes_max = 33554432", "limits.frame_bytes_max"),
        ("page_bytes_max = 33554432", "limits.page_bytes_max"),
        ("revision_bytes_max = 65536", "limits.frame_bytes_max"),
        ("spool_bytes = 5", "limits.spool_bytes"),
    ] {
        assert_eq!(fields("[[send]]", &format!("[limits]\n{line}\n[[send]]")), [field], "{line}");
    }
}

#[test]
fn no_password_is_ever_shown() {
    let text = SOUND.replace("http://127.0.0.1:2379", "http://root:hunter2@127.0.0.1:2379");
    let faults = Config::from_toml(&text).unwrap_err();
    assert_eq!(faults.0[0].field, "etcd.endpoints[0]");
    assert!(!faults.to_string().contains("hunter2"), "{faults}");
}

#[test]
fn a_log_level_is_a_level_or_a_list_for_targets() {
    for good in ["debug", "info,etcd_ferry=debug", "warn, h2::codec=trace"] {
        assert!(fields("[[send]]", &format!("[log]\nlevel = \"{good}\"\n[[send]]")).is_empty(), "{good}");
    }
    for bad in ["inof", "info,", "etcd_ferry", "=debug", "a b=info"] {
        let found = fields("[[send]]", &format!("[log]\nlevel = \"{bad}\"\n[[send]]"));
        assert_eq!(found, ["log.level"], "{bad}");
    }
}
