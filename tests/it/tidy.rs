//! Job: the rules of the house, as tests: who may import whom, what is pure, what the map names, how a file begins.
//! Input: the sources as they lie in the repository, and the map at the head of `src/lib.rs`. Output: every breach, with its file.
//! Pure but for reading the sources.
//! Always true: each rule is shown to catch a breach, by a made-up source.

mod breaches_are_caught;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const LINES_MAX: usize = 600;
/// Files that may be longer, each with its reason.
const LONGER: [(&str, &str); 0] = [];
/// What a pure file does not name: runtimes, sockets, disks, clocks. Addresses and moments that a caller brings are plain values.
const IMPURE: [&str; 13] = [
    "tokio",
    "tonic",
    "sled",
    "etcd_client",
    "axum",
    "std::fs",
    "std::process",
    "TcpStream",
    "TcpListener",
    "Instant::now",
    "SystemTime::now",
    "now_utc",
    "async",
];
/// `anyhow` is for where errors end.
const ANYHOW: [&str; 3] = ["src/main.rs", "src/app", "src/demo"];

/// One file, `text` without comments and string literals' insides in `code`.
struct Source {
    path: String,
    text: String,
    code: String,
    /// Compiled for tests only, as its parent declares it: `#[cfg(test)] mod x;`.
    only_for_tests: bool,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let only_for_tests = path.ends_with("/tests.rs");
        Self { path: path.to_owned(), text: text.to_owned(), code: code_of(text), only_for_tests }
    }

    /// `src/wire/frame.rs` belongs to `wire`, `src/retry.rs` to `retry`.
    fn room(&self) -> Option<&str> {
        let first = self.path.strip_prefix("src/")?.split('/').next()?;
        Some(first.strip_suffix(".rs").unwrap_or(first))
    }

    /// Without the unit tests at its end.
    fn product_code(&self) -> &str {
        self.code.split("#[cfg(test)]\nmod tests").next().unwrap_or_default()
    }

    fn names(&self, word: &str) -> bool {
        has_word(self.product_code(), word)
    }
}

fn has_word(code: &str, word: &str) -> bool {
    let part_of_a_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .any(|(at, _)| !code[..at].ends_with(part_of_a_name) && !code[at + word.len()..].starts_with(part_of_a_name))
}

/// Blanks comments and what stands in string literals, so that a rule sees code only.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if rest.starts_with("'\"'") {
            3
        } else if first == '"' {
            string_length(rest)
        } else if rest.starts_with("r\"") || rest.starts_with("r#") {
            raw_string_length(rest)
        } else {
            0
        };
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            rest = &rest[skipped..];
        }
    }
    code
}

fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            '"' if !escaped => return at + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    text.len()
}

/// 0 if it is a raw identifier.
fn raw_string_length(text: &str) -> usize {
    let hashes = text[1..].chars().take_while(|c| *c == '#').count();
    if !text[1 + hashes..].starts_with('"') {
        return 0;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let body = 2 + hashes;
    text[body..].find(&end).map_or(text.len(), |at| body + at + end.len())
}

/// The map of `src/lib.rs`.
#[derive(Default)]
struct Map {
    /// Room or file to its line: a smaller one may use a greater one.
    rank: BTreeMap<String, usize>,
    /// Paths under `src/` without `.rs`: `model`, `wire/frame`.
    named: BTreeSet<String>,
    pure: BTreeSet<String>,
}

impl Map {
    fn parse(lib: &str) -> Self {
        let mut map = Self::default();
        let lines = lib.lines().filter_map(|line| line.strip_prefix("//!"));
        let block = lines.skip_while(|line| line.trim() != "```text").skip(1).take_while(|line| line.trim() != "```");
        let mut room: Option<String> = None;
        for (rank, line) in block.enumerate() {
            let line = line.strip_prefix(' ').unwrap_or(line);
            // What a line says beside names stands in parentheses, or after the first comma or colon.
            let words = words_of(line);
            let mut words = words.iter();
            if !line.starts_with(' ') {
                room =
                    line.split(['/', ' ']).next().filter(|name| line[name.len()..].starts_with('/')).map(str::to_owned);
            }
            let Some(room) = &room else {
                for (file, pure) in words.map_while(|(word, pure)| Some((word.strip_suffix(".rs")?, pure))) {
                    map.name(file.to_owned(), file, *pure, rank);
                }
                continue;
            };
            if !line.starts_with(' ') {
                words.next();
            }
            for (word, pure) in words {
                map.name(format!("{room}/{}", word.trim_end_matches(".rs")), room, *pure, rank);
            }
        }
        map
    }

    fn name(&mut self, path: String, room: &str, pure: bool, rank: usize) {
        self.rank.entry(room.to_owned()).or_insert(rank);
        if pure {
            self.pure.insert(path.clone());
        }
        self.named.insert(path);
    }

    /// The entry that stands for a file: its own, or that of the folder that it is in (`replica/plan` for `src/replica/plan/merge.rs`).
    fn entry(&self, source: &str) -> Option<&String> {
        let path = source.strip_prefix("src/")?.strip_suffix(".rs")?;
        let mut folders = path.match_indices('/').map(|(at, _)| &path[..at]).skip(1);
        self.named.get(path).or_else(|| folders.find_map(|folder| self.named.get(folder)))
    }
}

/// Words with whether `(p)` follows; other parentheses are for the reader.
fn words_of(line: &str) -> Vec<(String, bool)> {
    let mut words: Vec<(String, bool)> = Vec::new();
    let (mut word, mut aside, mut depth) = (String::new(), String::new(), 0);
    for c in line.chars().chain([' ']) {
        match c {
            '(' => depth += 1,
            ')' => {
                depth -= 1;
                if aside == "p" && !word.is_empty() {
                    words.push((std::mem::take(&mut word), true));
                }
                aside.clear();
            }
            _ if depth > 0 => aside.push(c),
            ' ' | ',' | ':' if !word.is_empty() => words.push((std::mem::take(&mut word), false)),
            ' ' | ',' | ':' => {}
            _ => word.push(c),
        }
        if matches!(c, ',' | ':') && depth == 0 {
            break;
        }
    }
    words
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Vec::new();
    let mut folders = vec![root.join("src"), root.join("tests"), root.join("benches"), root.join("proto")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                sources.push(Source::new(&name, &fs::read_to_string(&path).unwrap()));
            }
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    let only_for_tests: BTreeSet<String> = sources.iter().flat_map(test_modules).collect();
    for source in &mut sources {
        source.only_for_tests |= only_for_tests.contains(&source.path);
    }
    sources
}

/// The files of modules that `parent` declares for tests only.
fn test_modules(parent: &Source) -> Vec<String> {
    let folder = parent.path.trim_end_matches(".rs").trim_end_matches("/mod").trim_end_matches("/lib");
    let declared = parent.code.split("#[cfg(test)]").skip(1).filter_map(|after| {
        let after = after.trim_start().trim_start_matches("pub ").trim_start_matches("pub(crate) ");
        let (name, _) = after.strip_prefix("mod ")?.split_once([';', '{'])?;
        Some(format!("{folder}/{}.rs", name.trim()))
    });
    declared.collect()
}

fn map() -> Map {
    Map::parse(&fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap())
}

/// Each breach of `rule` in the repository; the test lists them all.
fn assert_tidy(rule: impl Fn(&Map, &Source) -> Vec<String>) {
    let map = map();
    let breaches: Vec<String> = sources()
        .iter()
        .flat_map(|source| rule(&map, source).into_iter().map(|breach| format!("{}: {breach}", source.path)))
        .collect();
    assert!(breaches.is_empty(), "\n{}\n", breaches.join("\n"));
}

/// Top-level modules that a file names as `crate::x` or `etcd_ferry::x`, also in groups: `use crate::{x, y::Z}`.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for start in ["crate::", "etcd_ferry::"] {
        for (at, _) in code.match_indices(start) {
            let rest = &code[at + start.len()..];
            match rest.strip_prefix('{') {
                Some(group) => found.extend(group_heads(group)),
                None => found.extend(head(rest)),
            }
        }
    }
    found
}

fn head(path: &str) -> Option<String> {
    let name: String = path.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some(name)
}

/// The first names of a group's members: `a::{b, c}, d}` gives a and d.
fn group_heads(group: &str) -> Vec<String> {
    let (mut heads, mut depth, mut member) = (Vec::new(), 0_usize, String::new());
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => heads.extend(head(&std::mem::take(&mut member))),
            '{' => depth += 1,
            '}' => depth -= 1,
            _ if depth == 0 => member.push(c),
            _ => {}
        }
    }
    heads.extend(head(&member));
    heads
}

fn upward_imports(map: &Map, source: &Source) -> Vec<String> {
    let Some(own) = source.room().filter(|room| *room != "lib" && *room != "main") else { return Vec::new() };
    let Some(own_rank) = map.rank.get(own) else { return Vec::new() };
    let mut breaches = Vec::new();
    for other in imports(&source.code) {
        let opposite = matches!((own, other.as_str()), ("origin", "replica") | ("replica", "origin"));
        let above = map.rank.get(&other).is_some_and(|rank| rank < own_rank);
        if opposite || above {
            breaches.push(format!("{own} uses {other}, which stands above or opposite it on the map"));
        }
    }
    breaches
}

fn impurities(map: &Map, source: &Source) -> Vec<String> {
    if !map.entry(&source.path).is_some_and(|entry| map.pure.contains(entry)) {
        return Vec::new();
    }
    let named = IMPURE.iter().filter(|word| source.names(word));
    named.map(|word| format!("is pure (p) on the map, and names {word}")).collect()
}

fn unmapped(map: &Map, source: &Source) -> Vec<String> {
    let own = source.room().unwrap_or_default();
    let stands_for_its_room = map.rank.contains_key(own) && source.path == format!("src/{own}/mod.rs");
    let mapped = map.entry(&source.path).is_some() || stands_for_its_room || source.path == "src/lib.rs";
    if mapped || source.only_for_tests || !source.path.starts_with("src/") {
        Vec::new()
    } else {
        vec!["is not on the map in src/lib.rs".to_owned()]
    }
}

fn strangers(_: &Map, source: &Source) -> Vec<String> {
    let mut breaches = Vec::new();
    let is_or_is_in = |place: &str| {
        source.path.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '.']))
    };
    if source.path.starts_with("src/") {
        if source.names("sled") && !is_or_is_in("src/replica/dedupe") {
            breaches.push("names sled, which only replica/dedupe knows".to_owned());
        }
        if source.names("anyhow") && !ANYHOW.iter().any(|place| is_or_is_in(place)) {
            breaches.push("names anyhow, which is for main, app, demo and tests".to_owned());
        }
        if makes_applied(source.product_code()) && !is_or_is_in("src/replica/apply") {
            breaches.push("makes an Applied, which only replica/apply may".to_owned());
        }
    }
    breaches
}

/// `Applied {` or `Applied(` as an expression: not as a variant, a return type or the head of a block.
fn makes_applied(code: &str) -> bool {
    ["Applied {", "Applied(", "Applied::new("].iter().any(|form| {
        code.match_indices(form).any(|(at, _)| {
            let before = code[..at].trim_end();
            let part_of_a_name = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            let otherwise = ["->", "::", "impl", "for", "struct", "let", "|"].iter().any(|word| before.ends_with(word));
            !part_of_a_name && !otherwise
        })
    })
}

fn header_gaps(_: &Map, source: &Source) -> Vec<String> {
    // The map and the list of a room's modules are their own headers.
    let only_declares = source.path.ends_with("/mod.rs") && !has_word(&source.code, "fn");
    if ["src/lib.rs", "tests/it/main.rs", "proto/build.rs"].contains(&source.path.as_str()) || only_declares {
        return Vec::new();
    }
    let header: Vec<&str> = source.text.lines().take_while(|line| line.starts_with("//!")).collect();
    let header = header.join("\n");
    let mut lacking = vec!["Job:", "Input:", "Output:", "Always true:"];
    lacking.retain(|part| !header.contains(part));
    if lacking.is_empty() { Vec::new() } else { vec![format!("its header lacks {}", lacking.join(" "))] }
}

fn oversize(_: &Map, source: &Source) -> Vec<String> {
    let lines = source.text.lines().count();
    let allowed = LONGER.iter().any(|(path, _)| *path == source.path);
    if lines <= LINES_MAX || allowed { Vec::new() } else { vec![format!("has {lines} lines, more than {LINES_MAX}")] }
}

fn bad_habits(_: &Map, source: &Source) -> Vec<String> {
    let mut breaches = Vec::new();
    let mut forbid = |found: bool, what: &str| {
        if found {
            breaches.push(what.to_owned());
        }
    };
    forbid(has_word(&source.code, "unbounded_channel"), "has an unbounded channel: full means wait");
    forbid(source.code.contains("#[ignore"), "skips a test");
    let marks = ["TO", "FIX"].map(|start| start.to_owned() + if start == "TO" { "DO" } else { "ME" });
    forbid(marks.iter().any(|mark| has_word(&source.text, mark)), "leaves something to do: do it, or state the limit");
    let test = source.path.starts_with("tests/it/") && !source.path.starts_with("tests/it/bed/");
    forbid(test && has_word(&source.code, "sleep"), "sleeps in a test: wait for a signal");
    breaches
}

#[test]
fn nothing_imports_upwards_and_origin_and_replica_never_import_each_other() {
    assert_tidy(upward_imports);
}

#[test]
fn pure_files_name_no_runtime_no_network_no_disk_and_no_clock() {
    assert_tidy(impurities);
}

#[test]
fn the_map_names_every_file() {
    assert_tidy(unmapped);
}

#[test]
fn every_file_that_the_map_names_exists() {
    let sources: BTreeSet<String> = sources().into_iter().map(|source| source.path).collect();
    let map = map();
    assert!(map.named.len() > 20 && map.pure.len() > 5, "the map was not understood");
    let exists = |name: &String| {
        sources.contains(&format!("src/{name}.rs"))
            || sources.iter().any(|path| path.starts_with(&format!("src/{name}/")))
    };
    let missing: Vec<&String> = map.named.iter().filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "on the map, but not there: {missing:?}");
}

#[test]
fn sled_anyhow_and_applied_stay_where_they_belong() {
    assert_tidy(strangers);
}

#[test]
fn every_file_begins_with_its_job_input_output_and_what_is_always_true() {
    assert_tidy(header_gaps);
}

#[test]
fn files_are_short() {
    assert_tidy(oversize);
}

#[test]
fn nothing_is_unbounded_skipped_left_to_do_or_slept_through() {
    assert_tidy(bad_habits);
}
