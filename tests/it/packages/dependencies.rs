//! Job: hold what is built in against deny.toml: licences, sources, banned crates, and exceptions that are outlived.
//! Input: deny.toml, Cargo.toml, Cargo.lock, what cargo says of the crates. Output: passes or fails.
//! Pure but for reading them.
//! Always true: nothing is needed but cargo; `make audit` looks at advisories too, where it can.

use super::text;
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

/// A table of Cargo.lock's.
struct Locked {
    name: String,
    version: String,
    /// `None`: a crate of this folder.
    source: Option<String>,
    has_checksum: bool,
}

fn parsed(path: &str) -> toml::Table {
    text(path).parse().unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn locked() -> Vec<Locked> {
    let lock = parsed("Cargo.lock");
    let word = |table: &toml::Value, key: &str| table.get(key).and_then(toml::Value::as_str).map(str::to_owned);
    let of = |table: &toml::Value| Locked {
        name: word(table, "name").expect("a name"),
        version: word(table, "version").expect("a version"),
        source: word(table, "source"),
        has_checksum: table.get("checksum").is_some(),
    };
    lock["package"].as_array().expect("packages").iter().map(of).collect()
}

/// The texts of a list in deny.toml, or what its tables have under `key`.
fn words(table: &toml::Value, list: &str, key: &str) -> Vec<String> {
    let entries = table[list].as_array().unwrap_or_else(|| panic!("{list} is a list"));
    let word = |entry: &toml::Value| entry.get(key).unwrap_or(entry).as_str().map(str::to_owned);
    entries.iter().map(|entry| word(entry).unwrap_or_else(|| panic!("{list} has {entry}"))).collect()
}

/// The three numbers of a version; what follows them is not compared.
fn numbers(version: &str) -> Vec<u64> {
    let release = version.split(['-', '+']).next().unwrap_or_default();
    release.split('.').map(|number| number.parse().unwrap_or_else(|e| panic!("{version}: {e}"))).collect()
}

/// True if a crate is what `NAME` or `NAME:<VERSION` bans.
fn is_banned(ban: &str, name: &str, version: &str) -> bool {
    match ban.split_once(':') {
        None => name == ban,
        Some((banned, below)) => {
            let below = below.strip_prefix('<').unwrap_or_else(|| panic!("{ban}: this test knows no other bound"));
            name == banned && numbers(version) < numbers(below)
        }
    }
}

#[test]
fn a_ban_is_of_a_crate_or_of_its_versions_below_one() {
    assert!(is_banned("h2", "h2", "9.0.0") && !is_banned("h2", "h3", "9.0.0"));
    let below = |version| is_banned("h2:<0.4.16", "h2", version);
    assert!(below("0.4.15") && below("0.4.9") && below("0.3.27") && below("0.4.15+a"));
    assert!(!below("0.4.16") && !below("0.5.0") && !below("1.0.0") && !is_banned("h2:<0.4.16", "h3", "0.1.0"));
}

#[test]
fn no_crate_is_locked_that_deny_toml_bans() {
    let (deny, locked) = (parsed("deny.toml"), locked());
    let bans = words(&deny["bans"], "deny", "crate");
    assert!(bans.len() >= 5 && locked.len() >= 100, "{bans:?}, {} crates", locked.len());
    let banned = bans.iter().flat_map(|ban| {
        let crates = locked.iter().filter(move |locked| is_banned(ban, &locked.name, &locked.version));
        crates.map(move |locked| format!("{} {}, which {ban} bans", locked.name, locked.version))
    });
    let banned: Vec<String> = banned.collect();
    assert!(banned.is_empty(), "{banned:#?}");
}

#[test]
fn every_crate_but_our_own_is_of_one_registry_with_its_checksum_and_no_other_source_is_let_in() {
    let locked = locked();
    let ours: Vec<&str> = locked.iter().filter(|l| l.source.is_none()).map(|l| l.name.as_str()).collect();
    assert_eq!(ours, [env!("CARGO_PKG_NAME")]);
    let others: Vec<&Locked> = locked.iter().filter(|l| l.source.is_some()).collect();
    let sources: BTreeSet<&str> = others.iter().filter_map(|l| l.source.as_deref()).collect();
    let is_registry = |source: &&str| source.starts_with("registry+https://") && source.contains("/rust-lang/");
    assert!(sources.len() == 1 && sources.iter().all(is_registry), "{sources:?}");
    let unsealed: Vec<&str> = others.iter().filter(|l| !l.has_checksum).map(|l| l.name.as_str()).collect();
    assert!(unsealed.is_empty(), "without a checksum: {unsealed:?}");
    let deny = parsed("deny.toml");
    for unknown in ["unknown-registry", "unknown-git"] {
        assert_eq!(deny["sources"][unknown].as_str(), Some("deny"), "{unknown}");
    }
}

/// Each crate that a build of this machine takes, those of tests among them, with its licence's SPDX expression.
fn licensed() -> Vec<(String, String)> {
    let asked =
        ["metadata", "--locked", "--format-version=1", "--all-features", "--filter-platform=x86_64-unknown-linux-gnu"];
    let output =
        Command::new(env!("CARGO")).args(asked).current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let nodes = said["resolve"]["nodes"].as_array().expect("nodes");
    let taken: BTreeSet<&str> = nodes.iter().filter_map(|node| node["id"].as_str()).collect();
    let all = said["packages"].as_array().expect("packages").iter();
    let licensed = all.filter(|package| package["id"].as_str().is_some_and(|id| taken.contains(id)));
    let word = |package: &Value, key: &str| package[key].as_str().unwrap_or_default().to_owned();
    licensed.map(|package| (word(package, "name"), word(package, "license"))).collect()
}

/// True if what `allow` names is enough to take a crate under. An exception to a licence is not looked at: nothing needs one.
fn is_let_in(licence: &str, allow: &[String]) -> bool {
    let expression = spdx::Expression::parse_mode(licence, spdx::ParseMode::LAX);
    expression.is_ok_and(|expression| {
        expression.evaluate(|wanted| {
            let id = wanted.license.id().filter(|_| wanted.addition.is_none());
            id.is_some_and(|id| allow.iter().any(|name| name == id.name))
        })
    })
}

#[test]
fn every_crate_is_under_a_licence_that_deny_toml_lets_in_and_none_is_let_in_for_nobody() {
    let allow = words(&parsed("deny.toml")["licenses"], "allow", "");
    let only = |name: &str| vec![name.to_owned()];
    assert!(is_let_in("GPL-3.0 OR MIT", &only("MIT")) && is_let_in("Unlicense/MIT", &only("MIT")));
    assert!(!is_let_in("GPL-3.0 AND MIT", &only("MIT")) && !is_let_in("GPL-3.0-only", &only("MIT")));
    assert!(!is_let_in("", &only("MIT")) && !is_let_in("free for all", &only("MIT")));

    let licensed = licensed();
    assert!(licensed.len() >= 100, "{} crates", licensed.len());
    let out: Vec<_> = licensed.iter().filter(|(_, licence)| !is_let_in(licence, &allow)).collect();
    assert!(out.is_empty(), "{out:#?}");
    for name in &allow {
        let without: Vec<String> = allow.iter().filter(|other| *other != name).cloned().collect();
        let needed = licensed.iter().any(|(_, licence)| !is_let_in(licence, &without));
        assert!(needed, "no crate needs {name}");
    }
}

#[test]
fn our_own_licence_is_let_in_and_each_exception_is_for_a_crate_that_is_there() {
    let deny = parsed("deny.toml");
    let licences = words(&deny["licenses"], "allow", "");
    assert!(licences.iter().any(|licence| licence == env!("CARGO_PKG_LICENSE")), "{licences:?}");
    assert!(licences.is_sorted(), "{licences:?}");
    // A reason begins with the crate's name.
    for reason in words(&deny["advisories"], "ignore", "reason") {
        let name = reason.split(' ').next().unwrap_or_default();
        assert!(locked().iter().any(|locked| locked.name == name), "nothing is called {name}: {reason}");
    }
}
