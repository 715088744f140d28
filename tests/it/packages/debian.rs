//! Job: hold what is in the Debian package against the program and the documents: man pages, completions, and where its documents' links lead.
//! Input: the package, unpacked; the built program. Output: passes or fails.
//! Edge: runs deploy/debian/build, dpkg-deb and the program.
//! Always true: the package is judged by what it unpacks to, and only in a folder that goes with the test.

use super::{PROGRAM, all_files, debian_package, run, said};
use crate::documents::dead_links;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The package's files, as they would lie below `/`.
fn unpacked(folder: &Path) -> PathBuf {
    let package = debian_package(folder, "1");
    let root = folder.join("root");
    let output = run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&root));
    assert!(output.status.success(), "{}", said(&output));
    root
}

#[test]
fn every_link_in_the_package_s_documents_leads_to_a_file_of_the_package() {
    let folder = tempfile::tempdir().unwrap();
    let manual = unpacked(folder.path()).join("usr/share/doc/etcd-ferry");
    let below = |path: PathBuf| path.strip_prefix(&manual).unwrap().to_string_lossy().into_owned();
    let documents: Vec<String> =
        all_files(&manual).into_iter().map(below).filter(|path| path.ends_with(".md")).collect();
    assert!(documents.len() >= 8, "{documents:?}");
    let dead = dead_links(&manual, &documents);
    assert!(dead.is_empty(), "links in the package that lead nowhere: {dead:#?}");
}

/// Of gzip's header, as RFC 1952 has it: flags (of which 8 says that a name follows), time, and how much was done to make it small (2: all).
fn is_without_name_and_time_and_as_small_as_can_be(zipped: &[u8]) -> bool {
    zipped[3] & 8 == 0 && zipped[4..8] == [0; 4] && zipped[8] == 2
}

#[test]
fn the_package_has_the_program_s_own_man_pages_and_completions() {
    let folder = tempfile::tempdir().unwrap();
    let shared = unpacked(folder.path()).join("usr/share");
    let made = folder.path().join("made");
    let output = run(Command::new(PROGRAM).arg("man").arg(&made));
    assert!(output.status.success(), "{}", said(&output));
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let wanted: BTreeMap<String, String> = all_files(&made)
        .into_iter()
        .map(|path| (format!("{}.gz", name(&path)), fs::read_to_string(&path).unwrap()))
        .collect();
    let mut found = BTreeMap::new();
    for path in all_files(&shared.join("man/man1")) {
        let zipped = fs::read(&path).unwrap();
        assert!(is_without_name_and_time_and_as_small_as_can_be(&zipped), "{}: {:?}", path.display(), &zipped[..10]);
        let mut page = String::new();
        flate2::read::GzDecoder::new(&zipped[..]).read_to_string(&mut page).unwrap();
        found.insert(name(&path), page);
    }
    assert!(found.len() >= 20 && found == wanted, "{:?}, and not {:?}", found.keys(), wanted.keys());
    for (shell, path) in [
        ("bash", "bash-completion/completions/etcd-ferry"),
        ("zsh", "zsh/vendor-completions/_etcd-ferry"),
        ("fish", "fish/vendor_completions.d/etcd-ferry.fish"),
    ] {
        let output = run(Command::new(PROGRAM).args(["completions", shell]));
        assert_eq!(fs::read(shared.join(path)).unwrap(), output.stdout, "{shell}");
    }
}
