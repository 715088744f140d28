//! Job: what `--version` says, and which commit a build is said to be of.
//! Input: the built program; repositories made here, by git. Output: passes or fails.
//! Edge: runs the program and git.
//! Always true: sources that are not of a commit are never said to be.

#[path = "../../proto/commit.rs"]
mod commit;

use std::fs;
use std::path::Path;
use std::process::Command;

fn said(flag: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_etcd-ferry")).arg(flag).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    String::from_utf8(output.stdout).unwrap()
}

/// A commit as it is told, of this tree or of one that was given to the build.
fn assert_is_commit(told: &str) {
    let digits = told.strip_suffix(", changed").unwrap_or(told);
    let hexadecimal = digits.len() >= 12 && digits.chars().all(|c| c.is_ascii_hexdigit());
    assert!(hexadecimal || told == commit::UNKNOWN, "{told}");
}

#[test]
fn the_version_comes_with_the_commit_and_the_build_and_on_one_line_with_the_commit() {
    let version = env!("CARGO_PKG_VERSION");
    let short = said("-V");
    let commit = short.strip_prefix(&format!("etcd-ferry {version} (")).and_then(|rest| rest.strip_suffix(")\n"));
    let commit = commit.unwrap_or_else(|| panic!("{short}"));
    assert_is_commit(commit);

    let long = said("--version");
    let lines: Vec<&str> = long.lines().collect();
    let [first, second, third] = lines[..] else { panic!("{long}") };
    assert_eq!((first, second), (format!("etcd-ferry {version}").as_str(), format!("commit: {commit}").as_str()));
    let build: Vec<&str> = third.strip_prefix("build: ").unwrap_or_else(|| panic!("{third}")).split(", ").collect();
    let [profile, target, rustc] = build[..] else { panic!("{third}") };
    assert_eq!(profile, if cfg!(debug_assertions) { "debug" } else { "release" });
    assert!(target.starts_with(std::env::consts::ARCH) && target.contains(std::env::consts::OS), "{target}");
    let number = rustc.strip_prefix("rustc ").unwrap_or_else(|| panic!("{rustc}"));
    assert!(number.split('.').count() == 3 && !number.contains(' '), "{rustc}");
}

#[test]
fn a_build_in_a_repository_names_a_commit_of_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let short = said("-V");
    let told = short.split(['(', ',', ')']).nth(1).unwrap();
    // Somebody may commit while the tests run: not what is checked out now, but what the repository knows.
    let of_this_repository = commit::of(root) != commit::UNKNOWN;
    assert_eq!(told != commit::UNKNOWN, of_this_repository, "{short}");
    if of_this_repository {
        assert_eq!(git(root, &["cat-file", "-t", told]), "commit");
    }
}

/// A folder with what a build is made of, in a repository of its own or in none.
fn sources(at: &Path) {
    fs::create_dir_all(at.join("src")).unwrap();
    fs::create_dir_all(at.join("proto")).unwrap();
    for file in ["Cargo.toml", "Cargo.lock", "src/main.rs", "proto/a.proto", "README.md"] {
        fs::write(at.join(file), "as committed").unwrap();
    }
}

fn git(at: &Path, args: &[&str]) -> String {
    let identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"];
    let output = Command::new("git").arg("-C").arg(at).args(identity).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn commit_all(at: &Path) -> String {
    git(at, &["add", "."]);
    git(at, &["commit", "-q", "-m", "a"]);
    git(at, &["rev-parse", "HEAD"])
}

#[test]
fn a_tree_without_git_has_no_commit() {
    let folder = tempfile::tempdir().unwrap();
    sources(folder.path());
    assert_eq!(commit::of(folder.path()), commit::UNKNOWN);
    assert!(commit::files(folder.path()).is_empty());
}

#[test]
fn sources_that_were_changed_are_not_said_to_be_the_commit_s() {
    let folder = tempfile::tempdir().unwrap();
    sources(folder.path());
    git(folder.path(), &["init", "-q"]);
    assert_eq!(commit::of(folder.path()), commit::UNKNOWN, "nothing is committed yet");
    let committed = commit_all(folder.path());
    assert_eq!(commit::of(folder.path()), committed[..12]);

    fs::write(folder.path().join("README.md"), "other words").unwrap();
    assert_eq!(commit::of(folder.path()), committed[..12], "no build is made of the README");
    fs::write(folder.path().join("src/new.rs"), "more").unwrap();
    assert_eq!(commit::of(folder.path()), format!("{}, changed", &committed[..12]));
    let next = commit_all(folder.path());
    assert_eq!(commit::of(folder.path()), next[..12]);
}

#[test]
fn a_commit_that_is_made_is_seen_in_a_file_that_the_build_watches() {
    let folder = tempfile::tempdir().unwrap();
    sources(folder.path());
    git(folder.path(), &["init", "-q"]);
    commit_all(folder.path());
    let watched = || -> Vec<_> { commit::files(folder.path()).iter().map(|file| fs::read(file).unwrap()).collect() };
    let before = watched();
    fs::write(folder.path().join("src/main.rs"), "changed").unwrap();
    commit_all(folder.path());
    assert_ne!(watched(), before);
}

#[test]
fn a_repository_that_lies_around_the_sources_is_not_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("vendor/etcd-ferry");
    sources(&inside);
    git(folder.path(), &["init", "-q"]);
    commit_all(folder.path());
    assert_eq!(commit::of(&inside), commit::UNKNOWN);
    assert!(commit::files(&inside).is_empty());
}
