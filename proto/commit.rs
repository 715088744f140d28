//! Job: which commit the sources are of.
//! Input: the folder of the sources; git, if it is there. Output: the commit, or what to say without one; the files that tell of another one.
//! Edge: runs git.
//! Always true: no fault ends a build; a repository that merely lies around the sources is not theirs.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What stands for the commit where the sources have none, as in an unpacked archive.
pub const UNKNOWN: &str = "commit unknown";
/// What a build is made of; a change elsewhere does not change it.
const BUILT_FROM: [&str; 4] = ["Cargo.lock", "Cargo.toml", "proto", "src"];
/// Enough to be the only one of its beginning for a long time.
const DIGITS: &str = "--short=12";

/// As `0123456789ab`, with `, changed` behind it where what a build is made of is not as committed.
pub fn of(root: &Path) -> String {
    let commit = own_repository(root).then(|| git(root, &["rev-parse", DIGITS, "HEAD"])).flatten();
    let Some(commit) = commit else { return UNKNOWN.to_owned() };
    let changes = git(root, &[&["status", "--porcelain", "--"][..], &BUILT_FROM].concat());
    if changes.is_some_and(|changes| changes.is_empty()) { commit } else { format!("{commit}, changed") }
}

/// What changes when another commit is checked out or made. Only what exists: cargo takes what is missing for changed.
pub fn files(root: &Path) -> Vec<PathBuf> {
    if !own_repository(root) {
        return Vec::new();
    }
    let paths = ["HEAD", "logs/HEAD"].into_iter().filter_map(|name| git(root, &["rev-parse", "--git-path", name]));
    paths.map(|path| root.join(path)).filter(|path| path.exists()).collect()
}

fn own_repository(root: &Path) -> bool {
    let Some(top) = git(root, &["rev-parse", "--show-toplevel"]) else { return false };
    matches!((Path::new(&top).canonicalize(), root.canonicalize()), (Ok(top), Ok(root)) if top == root)
}

fn git(root: &Path, args: &[&str]) -> Option<String> {
    // Without locks: a build must not be in the way of somebody who works in the repository.
    let output = Command::new("git").arg("--no-optional-locks").arg("-C").arg(root).args(args).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
