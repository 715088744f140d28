//! Job: hold what etcd-ferry is delivered as against the product: the service, the image, the Debian package; what is in that, Kubernetes, and what
//! is built in have files of their own.
//! Input: deploy/, Dockerfile, Cargo.toml, the built program; systemd-analyze and dpkg-deb. Output: passes or fails.
//! Edge: runs these tools and the scripts in deploy/.
//! Always true: nothing is installed; a tool that is missing fails the test and says what installs it.

mod debian;
mod dependencies;
mod kubernetes;

use crate::documents::below_docs;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const UNIT: &str = "deploy/systemd/etcd-ferry.service";
const PROGRAM: &str = env!("CARGO_BIN_EXE_etcd-ferry");

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn text(path: &str) -> String {
    fs::read_to_string(file(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn run(command: &mut Command) -> Output {
    let tool = command.get_program().to_string_lossy().into_owned();
    command.output().unwrap_or_else(|e| panic!("{tool}: {e}; `.ci/install --tests` installs it"))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

#[test]
fn the_service_is_exposed_less_than_2_0_by_the_count_of_systemd() {
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["security", "--offline=true", "--no-pager", "--threshold=19"]).arg(file(UNIT));
    let output = run(&mut analyze);
    let said = said(&output);
    // The threshold is in tenths, and what reaches it passes.
    assert!(output.status.success() && said.contains("Overall exposure level for etcd-ferry.service"), "{said}");
}

#[test]
fn systemd_takes_the_service_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("etcd-ferry.service");
    let unit = text(UNIT);
    assert_eq!(unit.matches("/usr/bin/etcd-ferry").count(), 1, "the package's program, in ExecStart alone");
    fs::write(&copy, unit.replace("/usr/bin/etcd-ferry", PROGRAM)).unwrap();
    let output = run(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&copy));
    let complaints: Vec<String> =
        said(&output).lines().filter(|line| line.contains("etcd-ferry.service")).map(str::to_owned).collect();
    assert!(output.status.success() && complaints.is_empty(), "{}", said(&output));
}

/// Every file that Cargo.toml names for a target beside library and program.
fn other_targets() -> BTreeSet<String> {
    let manifest: toml::Table = text("Cargo.toml").parse().unwrap();
    let targets = ["test", "bench"]
        .into_iter()
        .flat_map(|kind| manifest[kind].as_array().unwrap().iter().map(move |t| (kind, t)));
    let path = |(kind, target): (&str, &toml::Value)| match target.get("path") {
        Some(path) => path.as_str().unwrap().to_owned(),
        None => format!("{kind}es/{}.rs", target["name"].as_str().unwrap()),
    };
    targets.map(path).collect()
}

#[test]
fn the_image_is_built_from_all_that_cargo_wants_and_ends_without_root_or_anything_else() {
    let dockerfile = text("Dockerfile");
    let (build, image) = dockerfile.split_once("\nFROM scratch\n").expect("the last stage starts from nothing");
    let touched = build.split("touch ").nth(1).unwrap().split(" \\\n").next().unwrap();
    let touched: BTreeSet<String> = touched.split_whitespace().map(str::to_owned).collect();
    assert_eq!(
        touched,
        other_targets(),
        "what the Dockerfile touches (left) must be the targets of Cargo.toml (right)"
    );
    let user = image.lines().find_map(|line| line.strip_prefix("USER ")).expect("a user");
    let (user, group) = user.split_once(':').expect("a user and a group");
    assert!(user.parse::<u32>().unwrap() > 0 && group.parse::<u32>().unwrap() > 0, "numbers, not root's");
    assert_eq!(image.matches("COPY").count(), 1, "only what deploy/rootfs has made");

    let copied = build.lines().filter_map(|line| line.strip_prefix("COPY ")).flat_map(|line| {
        let paths: Vec<&str> = line.split_whitespace().collect();
        paths[..paths.len() - 1].iter().map(|path| (*path).to_owned()).collect::<Vec<_>>()
    });
    let sent = text(".dockerignore");
    let sent: BTreeSet<String> = sent.lines().filter_map(|line| line.strip_prefix('!')).map(str::to_owned).collect();
    assert_eq!(copied.collect::<BTreeSet<_>>(), sent, "what is copied (left) is what Docker is sent (right)");
}

#[test]
fn the_files_of_the_image_are_all_that_the_program_needs() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    let output = run(Command::new(file("deploy/rootfs")).arg(PROGRAM).arg(&root));
    assert!(output.status.success(), "{}", said(&output));
    // The image's own loader, with the image's libraries and no others.
    let libraries: Vec<PathBuf> =
        all_files(&root).into_iter().filter(|path| path.to_string_lossy().contains(".so")).collect();
    let loader = libraries.iter().find(|path| path.to_string_lossy().contains("/ld-linux")).expect("a loader");
    let folders: BTreeSet<&Path> = libraries.iter().filter_map(|path| path.parent()).collect();
    let folders: Vec<String> = folders.iter().map(|path| path.to_string_lossy().into_owned()).collect();
    let mut program = Command::new(loader);
    program.env_clear().args(["--inhibit-cache", "--library-path", &folders.join(":")]);
    let output = run(program.arg(root.join("usr/bin/etcd-ferry")).arg("-V"));
    assert_eq!(said(&output), said(&run(Command::new(PROGRAM).arg("-V"))));
    let loaded = run(Command::new(loader)
        .env_clear()
        .args(["--inhibit-cache", "--library-path", &folders.join(":"), "--list"])
        .arg(root.join("usr/bin/etcd-ferry")));
    let strange: Vec<String> = said(&loaded)
        .lines()
        .filter(|line| line.contains('/') && !line.contains(&*root.to_string_lossy()))
        .map(str::to_owned)
        .collect();
    assert!(loaded.status.success() && strange.is_empty(), "not from the image: {strange:?}");
}

fn all_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files
}

/// The lines of `key=` in a unit, without the key.
fn setting<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
}

/// The Debian package, made in this folder.
fn debian_package(folder: &Path, revision: &str) -> PathBuf {
    let mut build = Command::new(file("deploy/debian/build"));
    let output = run(build.env("DEB_COMPRESSION", "none").env("DEB_REVISION", revision).arg(PROGRAM).arg(folder));
    assert!(output.status.success(), "{}", said(&output));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// Of a line of `dpkg-deb --contents`. (A symbolic link is always open to all, and says nothing.)
fn is_root_s_alone_to_change(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let (mode, owner) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let others_write = mode.get(5..6) == Some("w") || mode.get(8..9) == Some("w");
    owner == "root/root" && (mode.starts_with('l') || !others_write)
}

#[test]
fn the_debian_package_holds_what_the_service_and_its_documents_name() {
    let folder = tempfile::tempdir().unwrap();
    let package = debian_package(folder.path(), "7");
    let version = format!("{}-7", env!("CARGO_PKG_VERSION"));
    let name = package.file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with(&format!("etcd-ferry_{version}_")), "{name}");

    let field =
        |field: &str| said(&run(Command::new("dpkg-deb").arg("--field").arg(&package).arg(field))).trim().to_owned();
    assert_eq!((field("Package").as_str(), field("Version")), ("etcd-ferry", version));
    assert!(field("Depends").contains("libc6 (>= 2."), "{}", field("Depends"));

    let listed = said(&run(Command::new("dpkg-deb").arg("--contents").arg(&package)));
    let strange: Vec<&str> = listed.lines().filter(|line| !is_root_s_alone_to_change(line)).collect();
    assert!(strange.is_empty(), "{strange:#?}");
    let listed: BTreeSet<&str> = listed.lines().filter_map(|line| line.split_whitespace().nth(5)).collect();
    let unit = text(UNIT);
    let program = setting(&unit, "ExecStart")[0].split_whitespace().next().unwrap().to_owned();
    let manual = setting(&unit, "Documentation")[0].strip_prefix("file://").unwrap().to_owned();
    let folder_of_configuration = format!("{}/", setting(&unit, "WorkingDirectory")[0]);
    for wanted in
        [&program, &manual, &folder_of_configuration, &format!("/usr/lib/systemd/system/{}", "etcd-ferry.service")]
    {
        assert!(listed.contains(format!(".{wanted}").as_str()), "the package lacks {wanted}: {listed:?}");
    }
    let manual = ["README.md", "CHANGELOG.md", "copyright", "examples/etcd-ferry.example.toml", "examples/alerts.yml"];
    let manual = manual.into_iter().map(str::to_owned).chain(below_docs());
    let manual = manual.map(|document| format!("doc/etcd-ferry/{document}"));
    let beside = [
        "man/man1/etcd-ferry.1.gz",
        "man/man1/etcd-ferry-quarantine-retry.1.gz",
        "bash-completion/completions/etcd-ferry",
        "zsh/vendor-completions/_etcd-ferry",
        "fish/vendor_completions.d/etcd-ferry.fish",
    ];
    for document in manual.chain(beside.map(str::to_owned)) {
        let wanted = format!("./usr/share/{document}");
        assert!(listed.contains(wanted.as_str()), "the package lacks {document}: {listed:?}");
    }
    let scripts = ["postinst", "prerm", "postrm"].map(|script| text(&format!("deploy/debian/{script}")));
    let user = setting(&unit, "User")[0];
    assert!(scripts[0].contains(&format!(
        "adduser --system --group --quiet --no-create-home --home /var/lib/etcd-ferry --gecos etcd-ferry {user}\n"
    )));
    for script in ["postinst", "prerm", "postrm"] {
        let checked = run(Command::new("sh").arg("-n").arg(file(&format!("deploy/debian/{script}"))));
        assert!(checked.status.success(), "{}", said(&checked));
    }
}
