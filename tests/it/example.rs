//! Job: hold the annotated example configuration against the code: it is sound, has every key, and tells each default.
//! Input: deploy/etcd-ferry.example.toml, what the code says of its keys; the binary. Output: passes or fails.
//! Edge: reads the example.
//! Always true: a key or a default that is added, changed or removed without the example fails here.

use crate::bed::sidecar::ferry;
use crate::docs::{defaults, known_keys, required_keys};
use etcd_ferry::config::Config;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/etcd-ferry.example.toml")
}

fn text() -> String {
    std::fs::read_to_string(path()).unwrap()
}

/// With the tables that stand behind a `#`, and what is required in them.
fn with_every_table() -> String {
    let (mut optional, mut said) = (false, String::new());
    let text = text();
    let lines = text.lines().map(|line| {
        if line.starts_with('[') || line.starts_with("#[") {
            optional = line.starts_with('#');
            return line.trim_start_matches('#');
        }
        if let Some(comment) = line.strip_prefix("# ") {
            said.push_str(comment);
            return line;
        }
        let required = std::mem::take(&mut said).ends_with(" Required.");
        if optional && required { uncommented(line) } else { line }
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// One key of the example, with what is said of it.
struct Entry {
    /// Such as `send[].link`.
    key: String,
    value: String,
    /// Behind a `#`.
    commented_out: bool,
    said: String,
    /// Of the file, from 0.
    line: usize,
}

fn entries(text: &str) -> Vec<Entry> {
    let (mut entries, mut table, mut said) = (Vec::new(), String::new(), String::new());
    for (line, words) in text.lines().enumerate() {
        if let Some(comment) = words.strip_prefix("# ") {
            said.push_str(comment);
        } else if let Some(head) = words.strip_prefix('[') {
            let name = head.trim_matches(['[', ']']);
            table = if head.starts_with('[') { format!("{name}[].") } else { format!("{name}.") };
            said.clear();
        } else if let Some((key, value)) = words.trim_start_matches('#').split_once(" = ") {
            let (key, value) = (format!("{table}{key}"), value.to_owned());
            let said = std::mem::take(&mut said);
            entries.push(Entry { key, value, commented_out: words.starts_with('#'), said, line });
        } else {
            assert!(words.is_empty() || words == "#", "line {}: {words}", line + 1);
            said.clear();
        }
    }
    entries
}

#[test]
fn the_example_is_sound_has_every_key_once_and_says_something_of_each() {
    Config::from_toml(&text()).unwrap_or_else(|faults| panic!("{faults}"));
    let entries = entries(&with_every_table());
    let told: BTreeSet<String> = entries.iter().map(|entry| entry.key.clone()).collect();
    assert_eq!(told, known_keys(), "the example's keys (left) must be those of the configuration (right)");
    assert_eq!(told.len(), entries.len(), "a key is there twice");
    let required = required_keys();
    for Entry { key, commented_out, said, .. } in &entries {
        assert!(said.len() > 15, "{key}: nothing is said of it");
        assert_eq!(required.contains(key), !commented_out, "{key}: behind a #, if and only if it is optional");
    }
}

#[test]
fn each_default_that_is_commented_out_is_the_code_s() {
    let text = with_every_table();
    let config = Config::from_toml(&text).unwrap_or_else(|faults| panic!("{faults}"));
    let (defaults, entries) = (defaults(&config), entries(&text));
    let in_words = ["the whole keyspace", "what the first hello says"];
    for Entry { key, value, commented_out, said, line } in &entries {
        let default = defaults.get(key).filter(|default| !in_words.contains(&default.as_str()));
        assert_eq!(default.is_none() && *commented_out, said.contains("No default"), "{key}: {said}");
        // A list that is empty is told in words.
        if let Some(default) = default.filter(|default| !["none", "nobody"].contains(&default.as_str())) {
            assert_eq!(value.trim_matches('"'), default, "{key}");
        }
        if *commented_out && default.is_some() {
            let lines = text.lines().enumerate();
            let given: Vec<&str> = lines.map(|(n, words)| if n == *line { &words[1..] } else { words }).collect();
            let given = Config::from_toml(&given.join("\n")).unwrap_or_else(|faults| panic!("{faults}"));
            assert_eq!(format!("{given:?}"), format!("{config:?}"), "{key}: with the # taken away");
        }
    }
}

#[test]
fn every_optional_key_of_the_example_may_be_given_as_it_stands_there() {
    let given: Vec<String> = text().lines().map(|line| uncommented(line).to_owned()).collect();
    // The CA of a server goes with https.
    let given = ["2379", "8200", "4317"].iter().fold(given.join("\n"), |given, port| {
        given.replace(&format!("http://127.0.0.1:{port}"), &format!("https://127.0.0.1:{port}"))
    });
    let given = given.replace("compact_after_seconds = 0", "compact_after_seconds = 60");
    let config = Config::from_toml(&given).unwrap_or_else(|faults| panic!("{faults}"));
    assert!(config.etcd.ca.is_some() && config.tls.crl.is_some() && config.receive[0].ranges.is_some());
    assert!(config.pki.is_some_and(|pki| pki.ca.is_some()) && config.traces.is_some_and(|traces| traces.ca.is_some()));
}

/// A key or a table that stands behind a `#` without it.
fn uncommented(line: &str) -> &str {
    line.strip_prefix('#').filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[')).unwrap_or(line)
}

#[test]
fn every_key_but_those_of_links_can_be_set_by_a_flag() {
    let keys: Vec<String> = known_keys().into_iter().collect();
    let file = path();
    let mut arguments = vec!["check".to_owned(), "--config".to_owned(), file.display().to_string()];
    for key in &keys {
        arguments.extend(["--set".to_owned(), format!("{key}=1")]);
    }
    let output = ferry(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let stderr = String::from_utf8(output.stderr).unwrap();
    for key in &keys {
        let refused = stderr.lines().any(|line| line.starts_with(&format!("--set {key}: is ")));
        assert_eq!(refused, key.contains("[]"), "{key}:\n{stderr}");
    }
}
