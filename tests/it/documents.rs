//! Job: hold the documents against the code: every reason for a stop has its entry, links lead somewhere, commands and targets exist; and what was
//! not tried is said.
//! Input: README.md, docs/, the sources, deploy/, the built program, Makefile. Output: passes or fails, with what is wrong where.
//! Edge: reads files; asks the program for its help.
//! Always true: a reason is found in the sources by how it is given out there, so a new one without an entry fails here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

pub fn text(path: &str) -> String {
    fs::read_to_string(file(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The documents below docs/, by their paths.
pub fn below_docs() -> Vec<String> {
    let entries = fs::read_dir(file("docs")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut paths: Vec<String> = entries.map(|name| format!("docs/{}", name.to_string_lossy())).collect();
    paths.sort();
    paths
}

/// Every document, by its path.
pub fn documents() -> Vec<String> {
    let others = ["README.md", "CHANGELOG.md", "certs-dev/README.md"].map(str::to_owned);
    others.into_iter().chain(below_docs()).collect()
}

/// A source without its unit tests.
fn product(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned()
}

fn sources(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(file(folder)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path.to_string_lossy()));
        } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
    found
}

/// The string literal that `code` begins with, but for white space and what wraps it, as it is read: `{...}` for what is put in.
fn literal(code: &str) -> Option<String> {
    let mut code = code.trim_start();
    while let Some(rest) = ["format!(", "Err(", "("].iter().find_map(|wrap| code.strip_prefix(wrap)) {
        code = rest.trim_start();
    }
    let mut text = String::new();
    let mut characters = code.strip_prefix('"')?.chars();
    while let Some(c) = characters.next() {
        match c {
            '"' => return Some(text),
            // A line that goes on below it.
            '\\' => {
                if characters.next()? == '\n' {
                    let rest = characters.as_str().trim_start();
                    characters = rest.chars();
                }
            }
            '{' => {
                characters.by_ref().find(|c| *c == '}');
                text.push_str("...");
            }
            c => text.push(c),
        }
    }
    None
}

/// The literals behind each place where `start` stands.
fn literals(code: &str, start: &str) -> Vec<String> {
    code.split(start).skip(1).filter_map(literal).collect()
}

/// What an enum of errors says, variant by variant.
fn said_by(path: &str, name: &str) -> Vec<String> {
    let code = product(&file(path));
    let body = code.split(&format!("pub enum {name} {{")).nth(1).unwrap_or_else(|| panic!("{path} has no {name}"));
    literals(body.split("\n}").next().unwrap(), "#[error(")
}

/// Every text in the sources with which a link stops.
fn reasons() -> BTreeSet<String> {
    let mut reasons = BTreeSet::new();
    for path in sources("src/origin") {
        let code = product(&path);
        for start in ["SessionEnd::Stop(", "Stopped { reason: "] {
            reasons.extend(literals(&code, start));
        }
    }
    for path in sources("src/replica") {
        let code = product(&path);
        for kind in ["Guard", "Conflict", "Outside", "TooLarge"] {
            reasons.extend(literals(&code, &format!("Kind::{kind},")));
        }
    }
    reasons.extend(said_by("src/origin/resume.rs", "StopReason"));
    reasons.extend(said_by("src/replica/plan/copy.rs", "GuardStop"));
    // What each of these leads to stands in `PlanError::reaction`, and for the others beside them.
    let goes_on = |text: &str| text.starts_with("seq ... waits") || text.contains("plan again");
    reasons.extend(said_by("src/replica/plan/mod.rs", "PlanError").into_iter().filter(|text| !goes_on(text)));
    let conflict = |text: &String| text.contains("came before");
    reasons.extend(said_by("src/replica/admit.rs", "Refused").into_iter().filter(conflict));
    let stops = |text: &String| !text.contains("starts anew");
    reasons.extend(said_by("src/origin/sequence.rs", "SequenceError").into_iter().filter(stops));
    for (path, fragment) in [
        ("src/origin/history.rs", "two origins may answer by turns"),
        ("src/origin/remember.rs", "cannot be read"),
        ("src/origin/remember.rs", "that it stopped is not written down"),
        ("src/segment/feed.rs", "mend the disk"),
        ("src/model/quarantine.rs", "it is not quarantined"),
        ("src/app/links.rs", "mend that, and reload"),
        ("src/admin/mod.rs", "the link's task has ended"),
    ] {
        let code = product(&file(path));
        let told = code.split('"').enumerate().filter(|(at, _)| at % 2 == 1).map(|(_, text)| text);
        let told = told.filter(|text| text.contains(fragment)).map(|text| literal(&format!("\"{text}\"")).unwrap());
        let told: Vec<String> = told.collect();
        assert_eq!(told.len(), 1, "{path}: {fragment}");
        reasons.extend(told);
    }
    reasons
}

/// The entries for reasons in docs/operating.md: `#### `a reason ... with gaps``, several with `, ` or ` or ` between them.
fn entries() -> Vec<String> {
    let document = text("docs/operating.md");
    let section = document.split("\n## When a link stops\n").nth(1).expect("a section on stops");
    let section = section.split("\n## ").next().unwrap();
    let headings = section.lines().filter_map(|line| line.strip_prefix("### "));
    headings.flat_map(|heading| heading.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// True if the pieces of the entry come in the reason, in their order, the first at its start unless the entry starts with a gap.
fn fits(entry: &str, reason: &str) -> bool {
    let mut rest = reason;
    let mut first = true;
    for piece in entry.split("...") {
        let piece = piece.trim_end();
        let Some(at) = rest.find(piece) else { return false };
        if first && at > 0 {
            return false;
        }
        first = false;
        rest = &rest[at + piece.len()..];
    }
    true
}

#[test]
fn every_reason_for_a_stop_has_its_entry_in_the_operating_manual() {
    let (reasons, entries) = (reasons(), entries());
    assert!(reasons.len() >= 30, "the sources do not look as this test expects: {reasons:#?}");
    let untold: Vec<&String> =
        reasons.iter().filter(|reason| !entries.iter().any(|entry| fits(entry, reason))).collect();
    assert!(untold.is_empty(), "docs/operating.md has no entry for: {untold:#?}");
}

#[test]
fn every_entry_of_the_operating_manual_is_a_reason_that_the_code_gives() {
    let (reasons, entries) = (reasons(), entries());
    assert!(entries.len() >= 20, "the manual does not look as this test expects: {entries:#?}");
    let idle: Vec<&String> = entries.iter().filter(|entry| !reasons.iter().any(|reason| fits(entry, reason))).collect();
    assert!(idle.is_empty(), "no link stops with: {idle:#?}");
}

#[test]
fn an_entry_fits_only_what_it_says_in_its_order() {
    assert!(fits("a ... c", "a b c d") && fits("... c", "a b c") && fits("a", "a b"));
    assert!(!fits("a ... c", "a c b".replace('c', "x").as_str()) && !fits("b", "a b") && !fits("c ... a", "a b c"));
    assert_eq!(literal("format!(\n  \"a {b:?} \\\n   c\", d)").as_deref(), Some("a ... c"));
}

/// How a heading is addressed: in small letters, blanks as hyphens, without other marks.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Without blocks of code, in which nothing is a heading or a link.
fn prose(document: &str) -> String {
    let parts = document.split("\n```").enumerate().filter(|(at, _)| at % 2 == 0);
    parts.map(|(_, part)| part).collect::<Vec<_>>().join("\n")
}

/// True if the file or folder is there, and has that heading.
fn is_there(path: &Path, heading: Option<&str>) -> bool {
    let Some(heading) = heading else { return path.exists() };
    let Ok(found) = fs::read_to_string(path) else { return false };
    let prose = prose(&format!("\n{found}"));
    let mut headings = prose.lines().filter(|line| line.starts_with('#'));
    headings.any(|line| anchor(line.trim_start_matches('#').trim_start()) == heading)
}

/// The links of documents below `root` that lead to no file or folder below it, or to no heading.
pub fn dead_links(root: &Path, documents: &[String]) -> Vec<String> {
    let root = root.canonicalize().unwrap();
    let mut dead = Vec::new();
    for document in documents {
        let here = root.join(document);
        let prose = prose(&fs::read_to_string(&here).unwrap_or_else(|e| panic!("{}: {e}", here.display())));
        let targets = prose.split("](").skip(1).map(|rest| rest.split(')').next().unwrap_or_default());
        for target in targets.filter(|target| !target.contains("://")) {
            let (path, heading) =
                target.split_once('#').map_or((target, None), |(path, heading)| (path, Some(heading)));
            let path = if path.is_empty() { here.clone() } else { here.parent().unwrap().join(path) };
            let inside = path.canonicalize().is_ok_and(|path| path.starts_with(&root));
            if !inside || !is_there(&path, heading) {
                dead.push(format!("{document}: {target}"));
            }
        }
    }
    dead
}

#[test]
fn every_link_between_the_documents_leads_to_a_file_and_a_heading() {
    let dead = dead_links(&file(""), &documents());
    assert!(dead.is_empty(), "links that lead nowhere: {dead:#?}");
}

#[test]
fn the_readme_links_every_document_below_docs() {
    let readme = prose(&text("README.md"));
    let unnamed: Vec<String> =
        below_docs().into_iter().filter(|path| !readme.contains(&format!("[{path}]({path})"))).collect();
    assert!(unnamed.is_empty(), "README.md has no link to: {unnamed:#?}");
}

/// The documents that a text names by their path from the root, as `docs/operating.md` or `README.md#speed`: each with its heading.
fn named_in(text: &str) -> Vec<(String, Option<String>)> {
    let part_of_name = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.' | '#');
    let starts = ["docs/", "README.md"].into_iter().flat_map(|start| text.match_indices(start));
    let names = starts.map(|(at, _)| text[at..].chars().take_while(part_of_name).collect::<String>());
    let named = names.map(|name| {
        let name = name.trim_end_matches('.');
        let (path, heading) = name.split_once('#').map_or((name, None), |(path, heading)| (path, Some(heading)));
        (path.to_owned(), heading.map(str::to_owned))
    });
    named.filter(|(path, _)| path.ends_with(".md")).collect()
}

#[test]
fn what_a_text_names_is_found_with_its_heading() {
    let found = |path: &str, heading: Option<&str>| (path.to_owned(), heading.map(str::to_owned));
    let text = "see (docs/a.md#b-c), file:///doc/docs/d.md, README.md#e. docs/*.md, docs.rs";
    let d = found("docs/d.md", None);
    assert_eq!(named_in(text), [found("docs/a.md", Some("b-c")), d, found("README.md", Some("e"))]);
}

/// The files of a folder and what is below it.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn every_document_that_code_deployment_or_output_names_is_there_with_its_heading() {
    let folders = ["src", "proto", "deploy", "benches", "fuzz/targets"].map(file);
    let files = ["Makefile", "Dockerfile", "Cargo.toml"].map(file).into_iter();
    let mut named = Vec::new();
    for path in folders.iter().flat_map(|folder| files_below(folder)).chain(files) {
        let text = fs::read_to_string(&path).unwrap();
        let place = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().display().to_string();
        // A section is named by its anchor, so that this test can look for it.
        assert!(!text.contains("(README, "), "{place} names a section of the README in words");
        named.extend(named_in(&text).into_iter().map(|name| (place.clone(), name)));
    }
    // What the product prints names them too.
    for document in documents() {
        for block in text(&document).split("\n```").skip(1).step_by(2) {
            named.extend(named_in(block).into_iter().map(|name| (document.clone(), name)));
        }
    }
    assert!(named.len() >= 25, "the sources do not look as this test expects: {named:#?}");
    named.retain(|(_, (path, heading))| !is_there(&file(path), heading.as_deref()));
    assert!(named.is_empty(), "named, and not there: {named:#?}");
}

/// What a line of a block of code calls etcd-ferry with: after a prompt, by its whole path, or inside of a pod.
fn called(line: &str) -> Option<&str> {
    let line = line.trim_start().trim_start_matches("$ ").trim_start_matches("# ");
    let within = ["-- etcd-ferry ", "/usr/bin/etcd-ferry "].iter().find_map(|call| line.split_once(call));
    line.strip_prefix("etcd-ferry ").or(within.map(|(_, rest)| rest))
}

/// Each `etcd-ferry ...` of a text, as words: in blocks of code, fenced or indented, and between backticks, where it may go over a line's end.
fn calls(text: &str) -> Vec<Vec<String>> {
    let mut calls: Vec<String> = Vec::new();
    for (at, part) in text.split("\n```").enumerate() {
        if at % 2 == 1 {
            calls.extend(part.lines().filter_map(called).map(str::to_owned));
            continue;
        }
        calls.extend(part.lines().filter(|line| line.starts_with("    ")).filter_map(called).map(str::to_owned));
        for paragraph in part.split("\n\n") {
            let spans = paragraph.split('`').skip(1).step_by(2).map(|span| span.replace('\n', " "));
            calls.extend(spans.filter_map(|span| span.strip_prefix("etcd-ferry ").map(str::to_owned)));
        }
    }
    let is_its_own = |word: &&str| !word.starts_with(['2', '>', '|', '&', '#']) || *word == "2";
    let words = |call: String| call.split_whitespace().take_while(is_its_own).map(str::to_owned).collect::<Vec<_>>();
    let begins = |word: &String| word.starts_with(|c: char| c.is_ascii_lowercase() || c == '-');
    calls.into_iter().map(words).filter(|words| words.first().is_some_and(begins)).collect()
}

/// The commands of all documents, each with its document.
fn commands() -> Vec<(String, Vec<String>)> {
    let of = |document: String| {
        let calls = calls(&text(&document));
        calls.into_iter().map(move |words| (document.clone(), words))
    };
    // What digests are made with looks like a command, in the protocol's document.
    documents().into_iter().flat_map(of).filter(|(_, words)| words.last().is_some_and(|word| word != "v1")).collect()
}

#[test]
fn commands_are_read_from_blocks_of_code_and_from_between_backticks() {
    let text = "do `etcd-ferry allow LINK\n--config F`, or `x`:\n\n    etcd-ferry check --config a.toml   # first\n\nand\n\n```console\n\
                $ etcd-ferry run --config a.toml 2>a.log &\netcd-ferry 0.1.0\n$ kubectl exec etcd-0 -- etcd-ferry status\n```\nend";
    let found: Vec<String> = calls(text).into_iter().map(|words| words.join(" ")).collect();
    assert_eq!(found, ["check --config a.toml", "allow LINK --config F", "run --config a.toml", "status"]);
}

/// How one command is called, as its help says.
struct Usage {
    /// With whether a value follows.
    flags: BTreeMap<String, bool>,
    arguments_max: usize,
}

/// `of` is a command with the one below it, if it has some; empty: the program itself. `None` if there is no such command.
fn usage(of: &[String]) -> Option<Usage> {
    let output = Command::new(env!("CARGO_BIN_EXE_etcd-ferry")).args(of).arg("--help").output().unwrap();
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = help.lines().find_map(|line| line.strip_prefix("Usage: etcd-ferry")).map(str::trim)?;
    let line = line.strip_prefix(of.join(" ").as_str())?;
    let told = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let flags = told.filter_map(|line| {
        let mut words = line.split([' ', ',']).skip_while(|word| !word.starts_with("--"));
        Some((words.next()?.to_owned(), words.next().is_some_and(|value| value.starts_with('<'))))
    });
    let mut arguments_max = 0;
    let mut words = line.split_whitespace().peekable();
    while let Some(word) = words.next() {
        if word.trim_start_matches('[').starts_with("--") {
            words.next_if(|value| value.starts_with('<'));
        } else if word != "[OPTIONS]" {
            arguments_max += if word.ends_with("...") { usize::MAX / 2 } else { 1 };
        }
    }
    Some(Usage { flags: flags.collect(), arguments_max })
}

/// What is wrong with a call, by the command line's own definitions.
fn wrong_in(words: &[String], usages: &mut BTreeMap<Vec<String>, Option<Usage>>) -> Option<String> {
    let depth = match words[0].as_str() {
        flag if flag.starts_with('-') => 0,
        "quarantine" | "certs" => 2.min(words.len()),
        _ => 1,
    };
    let (of, rest) = words.split_at(depth);
    let usage = usages.entry(of.to_vec()).or_insert_with(|| usage(of));
    let Some(usage) = usage else { return Some("there is no such command".to_owned()) };
    let (mut arguments, mut rest) = (0, rest.iter());
    while let Some(word) = rest.next() {
        let (flag, given) = word.split_once('=').map_or((word.as_str(), false), |(flag, _)| (flag, true));
        match usage.flags.get(flag) {
            Some(true) if !given => _ = rest.next(),
            Some(_) => {}
            None if word.starts_with("--") => return Some(format!("it has no {flag}")),
            None => arguments += usize::from(!word.starts_with('-') && word != "..."),
        }
    }
    (arguments > usage.arguments_max).then(|| format!("it takes no more than {} arguments", usage.arguments_max))
}

#[test]
fn every_command_in_the_documents_is_one_that_the_program_has_with_these_flags() {
    let commands = commands();
    assert!(commands.len() >= 60, "the documents do not look as this test expects: {commands:#?}");
    let mut usages = BTreeMap::new();
    let mut wrong = Vec::new();
    for (document, words) in &commands {
        // As in `quarantine list|show`: each of them.
        let spelled = words.iter().find(|word| word.contains('|')).map_or(1, |word| word.split('|').count());
        for nth in 0..spelled {
            let one = |word: &String| word.split('|').nth(nth).unwrap_or(word).to_owned();
            let words: Vec<String> = words.iter().map(one).collect();
            let fault = wrong_in(&words, &mut usages);
            wrong.extend(fault.map(|fault| format!("{document}: etcd-ferry {}: {fault}", words.join(" "))));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_readme_says_that_the_pki_was_not_run_against_vault() {
    for document in ["README.md", "docs/configuration.md"] {
        let words: Vec<String> = text(document).split_whitespace().map(str::to_owned).collect();
        assert!(words.join(" ").contains("not run against Vault itself"), "{document}");
    }
}

#[test]
fn every_make_target_in_the_documents_exists() {
    let makefile = text("Makefile");
    for document in documents() {
        for rest in text(&document).split("make ").skip(1) {
            let target: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
            let before_and_after = text(&document);
            let is_command = before_and_after.contains(&format!("`make {target}"))
                || before_and_after.contains(&format!("\n    make {target}"));
            if is_command && !target.is_empty() {
                assert!(
                    makefile.lines().any(|line| line.starts_with(&format!("{target}:"))),
                    "{document}: make {target}"
                );
            }
        }
    }
}
