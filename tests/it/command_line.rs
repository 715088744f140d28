//! Job: the command line as an operator and a script meet it: help, completions, man pages, and each call to a running sidecar.
//! Input: the program, a pair. Output: passes or fails.
//! Always true: nothing is called but the program; what it prints and its exit code are all that is judged.

use crate::bed::pair::{LINK, Pair, REPLICA_REGION};
use crate::bed::sidecar::{Sidecar, ferry, region_name};
use crate::documents;
use crate::verify::over_app;
use etcd_ferry::config::Config;
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn json(sidecar: &Sidecar, arguments: &[&str]) -> Value {
    let output = sidecar.admin(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {}", text(&output)))
}

/// The commands that a help lists.
fn commands(help: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // A description that is broken stands further in.
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_owned).collect()
}

/// Every command that can be run, with its help.
fn helps(path: Vec<String>, found: &mut Vec<(String, String)>) {
    let arguments: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
    let output = ferry(&arguments);
    assert!(output.status.success(), "{arguments:?}");
    let help = text(&output);
    let below = commands(&help);
    if below.is_empty() {
        found.push((path.join(" "), help));
    } else {
        below.into_iter().for_each(|name| helps([path.clone(), vec![name]].concat(), found));
    }
}

#[test]
fn the_help_of_every_command_has_an_example() {
    let mut found = Vec::new();
    helps(Vec::new(), &mut found);
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    for wanted in ["run", "status", "pause", "resume", "quarantine discard", "certs dev", "bundle", "log-level"] {
        assert!(names.contains(&wanted), "{wanted} is not among {names:?}");
    }
    for (name, help) in &found {
        assert!(help.contains(&format!("Example: etcd-ferry {name}")), "{name}:\n{help}");
    }
}

#[test]
fn the_table_of_calls_names_commands_that_there_are_and_every_command_that_asks_a_sidecar() {
    let (mut found, mut told) = (Vec::new(), BTreeSet::new());
    helps(Vec::new(), &mut found);
    let page = documents::text("docs/links.md");
    let rows = page.lines().skip_while(|line| !line.starts_with("| call | role | command |")).skip(2);
    for row in rows.take_while(|line| line.starts_with('|')) {
        // As: `status`, `top` (once), `quarantine list LINK`
        let cell = row.split(" | ").nth(2).unwrap_or_else(|| panic!("no command in {row}"));
        for command in cell.split('`').skip(1).step_by(2) {
            let is_argument = |word: &&str| word.starts_with('-') || word.to_uppercase() == **word;
            let name: Vec<&str> = command.split(' ').take_while(|word| !is_argument(word)).collect();
            let known = found.iter().find(|(known, _)| *known == name.join(" "));
            let (name, help) = known.unwrap_or_else(|| panic!("{command:?} is no command: {row}"));
            for argument in command.split(' ').filter(is_argument) {
                let forms = [format!("<{argument}>"), format!("[{argument}]"), format!(" {argument}")];
                let there = if argument.starts_with('-') { &forms[2..] } else { &forms[..2] };
                assert!(there.iter().any(|form| help.contains(form.as_str())), "{name} takes no {argument}:\n{help}");
            }
            told.insert(name.as_str());
        }
    }
    let asking = found.iter().filter(|(_, help)| help.contains("--cert <FILE>")).map(|(name, _)| name.as_str());
    assert_eq!(told, asking.collect(), "the commands of the table (left) must be those that take an operator's --cert");
}

#[test]
fn completions_are_sound_scripts_that_know_every_command() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = ferry(&["completions", shell]);
        assert!(output.status.success(), "{shell}: {}", text(&output));
        let script = String::from_utf8(output.stdout).unwrap();
        for word in ["quarantine", "log-level", "allow-deletes"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
        if shell == "bash" {
            let path = folder.path().join("etcd-ferry");
            std::fs::write(&path, script).unwrap();
            let offered = "COMP_WORDS=(etcd-ferry pau); COMP_CWORD=1; \
                           read -ra registered < <(complete -p etcd-ferry | sed 's/.*-F //'); \
                           $registered etcd-ferry pau etcd-ferry; echo ${COMPREPLY[@]}";
            let line = format!("set -e; source {}; {offered}", path.display());
            let output = Command::new("bash").args(["-c", &line]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "pause", "{}", text(&output));
            assert!(Command::new("bash").arg("-n").arg(&path).status().unwrap().success());
        }
    }
    assert_eq!(ferry(&["completions", "tcsh"]).status.code(), Some(2));
}

#[test]
fn every_command_has_a_man_page_that_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let man = folder.path().join("man1");
    let output = ferry(&["man", man.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output));
    let pages = std::fs::read_dir(&man).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut pages: Vec<String> = pages.collect();
    pages.sort();
    for page in ["etcd-ferry.1", "etcd-ferry-status.1", "etcd-ferry-quarantine-retry.1", "etcd-ferry-certs-dev.1"] {
        assert!(pages.iter().any(|found| found == page), "{page} is not among {pages:?}");
    }
    let rendered =
        Command::new("groff").args(["-man", "-Tascii", "-P-cbou"]).arg(man.join("etcd-ferry-pause.1")).output();
    let rendered = text(&rendered.expect("groff (`.ci/install --tests` brings it)"));
    let words: Vec<&str> = rendered.split_whitespace().collect();
    let page = words.join(" ");
    for part in [
        "etcd-ferry-pause",
        "Have a link's replica apply nothing until it is resumed",
        "--config",
        "Example: etcd-ferry pause config",
        concat!("etcd-ferry ", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = ferry(&["man", file.to_str().unwrap()]);
    assert!(output.status.code() == Some(1) && text(&output).contains("the pages cannot be written to"));
}

/// A pair that follows, whose origin's sidecar takes the replica's certificate for a viewer's.
async fn with_viewer() -> Pair {
    let mut pair = Box::pin(Pair::prepare(over_app())).await;
    pair.origin_sidecar.options.viewers = vec![region_name(REPLICA_REGION)];
    pair.origin_sidecar.write_config();
    pair.origin.put("/app/key-of-somebody", "unspeakable").await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_viewer_sees_everything_and_changes_nothing() {
    let pair = with_viewer().await;
    let sidecar = &pair.origin_sidecar;
    let file = |name: &str| sidecar.options.certs.join(name).display().to_string();
    let (cert, key) = (file("cn-hangzhou.pem"), file("cn-hangzhou.key"));
    let bundle = pair.dir().join("viewers.tar.gz").display().to_string();
    let as_viewer = |arguments: &[&str]| sidecar.admin(&[arguments, &["--cert", &cert, "--key", &key]].concat());
    for looks in [&["status"][..], &["configuration"], &["certificates"], &["log-level"], &["bundle", "--out", &bundle]]
    {
        let output = as_viewer(looks);
        assert!(output.status.success(), "{looks:?}: {}", text(&output));
    }
    for changes in [
        &["resync", LINK][..],
        &["verify", LINK],
        &["repair", LINK],
        &["allow", LINK],
        &["pause", LINK],
        &["resume", LINK],
        &["quarantine", "retry", LINK, "1"],
        &["quarantine", "discard", LINK, "1"],
        &["log-level", "off"],
    ] {
        let output = as_viewer(changes);
        assert_eq!(output.status.code(), Some(1), "{changes:?}");
        assert!(text(&output).contains("asks for the full role"), "{changes:?}: {}", text(&output));
    }
    let log = sidecar.log();
    let refusals = log.lines().filter(|line| line.contains("admin call refused: the call asks for the full role"));
    assert_eq!(refusals.count(), 9, "each is in the log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_tells_its_configuration_its_certificates_and_its_log_s_level_which_can_be_changed_until_the_next_start()
 {
    let mut pair = with_viewer().await;
    let sidecar = &pair.origin_sidecar;
    let configuration = json(sidecar, &["configuration"]);
    assert_eq!(configuration["send"][0]["verify_interval_seconds"], 900, "{configuration}");
    let printed = text(&sidecar.admin(&["configuration"]));
    let read = Config::from_toml(&printed).unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(read.node, sidecar.options.node);
    let certificates = json(sidecar, &["certificates"]);
    assert_eq!(certificates["certificates"][0]["sans"][0], region_name("us-east-1"), "{certificates}");
    assert!(text(&sidecar.admin(&["certificates"])).starts_with("USE "));

    let quiet = json(sidecar, &["log-level", "error"]);
    assert_eq!((&quiet["level"], &quiet["configured"]), (&"error".into(), &"info,etcd_ferry=debug".into()));
    let calls = |sidecar: &Sidecar| sidecar.log().matches("call=\"Status\"").count();
    let before = calls(sidecar);
    sidecar.status();
    assert_eq!(calls(sidecar), before, "an error is all that it tells");
    json(sidecar, &["log-level", "off"]);
    for changed in ["SetLogLevel error", "SetLogLevel off"] {
        assert!(sidecar.log().contains(&format!("call={changed:?}")), "{changed} is in the log at every level");
    }
    json(sidecar, &["log-level", "error"]);
    let wrong = sidecar.admin(&["log-level", "loud"]);
    assert!(wrong.status.code() == Some(1) && text(&wrong).contains("must be off, error, warn"), "{}", text(&wrong));
    let told = text(&sidecar.admin(&["log-level"]));
    assert!(told.contains("is error until the next start, which takes info,etcd_ferry=debug"), "{told}");
    json(sidecar, &["log-level", "info"]);
    sidecar.status();
    assert_eq!(calls(sidecar), before + 1);
    pair.origin_sidecar.restart().await;
    let told = text(&pair.origin_sidecar.admin(&["log-level"]));
    assert!(told.contains("info,etcd_ferry=debug, as configured"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_status_is_watched_line_by_line_until_the_sidecar_stops() {
    let mut pair = with_viewer().await;
    let sidecar = &pair.origin_sidecar;
    let mut watching = Command::new(env!("CARGO_BIN_EXE_etcd-ferry"));
    watching.args(["status", "--watch", "--interval-ms", "100", "--json", "--config"]).arg(sidecar.config_path());
    let mut watching = watching.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        let status: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(status["links"][0]["state"], "following");
    }
    // One whose reader has seen enough ends without a complaint.
    let config = sidecar.config_path();
    let mut seen = Command::new(env!("CARGO_BIN_EXE_etcd-ferry"));
    seen.args(["status", "--watch", "--interval-ms", "100", "--json", "--config"]).arg(config);
    let mut seen = seen.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    BufReader::new(seen.stdout.take().unwrap()).lines().next().unwrap().unwrap();
    let seen = seen.wait_with_output().unwrap();
    assert_eq!((seen.status.code(), text(&seen)), (Some(0), String::new()));

    pair.origin_sidecar.stop().await;
    lines.for_each(drop);
    let ended = watching.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(text(&ended).contains("has stopped: see its log"), "{}", text(&ended));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_support_bundle_has_what_helps_and_no_key_no_value_and_no_secret() {
    let pair = with_viewer().await;
    pair.wait_equal().await;
    let sidecar = &pair.origin_sidecar;
    let path = pair.dir().join("bundle.tar.gz");
    let out = path.display().to_string();
    let made = json(sidecar, &["bundle", "--out", &out]);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let output = Command::new("tar").args(["-xzf", &out, "-C"]).arg(pair.dir()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let folder = std::fs::read_dir(pair.dir()).unwrap().map(|entry| entry.unwrap().path());
    let is_its_own =
        |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("etcd-ferry-us-east-1-a-");
    let folder = folder.into_iter().find(is_its_own).expect("a folder of its own");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    for (name, part) in [
        ("about.json", "\"node\": \"us-east-1-a\""),
        ("configuration.toml", "link = \"config\""),
        ("status.json", "\"state\": \"following\""),
        ("certificates.json", "\"use\": \"own\""),
        ("metrics.txt", "etcd_ferry_lag_seconds"),
        ("log.txt", "running"),
        ("data.json", "origin/config/spool"),
    ] {
        assert!(read(name).contains(part), "{part} is not in {name}:\n{}", read(name));
    }
    let files = made["files"].as_array().unwrap();
    assert_eq!(files.len(), 7, "{made}");
    for file in files {
        let name = file["file"].as_str().unwrap();
        let content = read(name);
        assert_eq!(content.len() as u64, file["bytes"].as_u64().unwrap());
        for secret in ["unspeakable", "key-of-somebody", "PRIVATE KEY"] {
            assert!(!content.contains(secret), "{secret} is in {name}");
        }
    }
    let piped = sidecar.admin(&["bundle", "--out", "-"]);
    assert!(piped.status.success(), "{}", text(&piped));
    let mut unpacked = tar::Archive::new(flate2::read::GzDecoder::new(&piped.stdout[..]));
    let names = unpacked.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned());
    // Its folder is named after the second in which it was made.
    assert_eq!(names.filter(|name| name.to_str().unwrap().starts_with("etcd-ferry-us-east-1-a-")).count(), 7);
    let again = sidecar.admin(&["bundle", "--out", &out]);
    assert!(again.status.code() == Some(1) && text(&again).contains("the bundle cannot be written to"));
    assert!(path.exists(), "what was there stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_meets_somebody_else_or_has_no_certificate_says_what_to_give_it() {
    let pair = Box::pin(Pair::start(over_app())).await;
    let (origin, replica) = (&pair.origin_sidecar.options, &pair.replica_sidecar.options);
    let config = std::fs::read_to_string(pair.origin_sidecar.config_path()).unwrap();
    let own = origin.ports.admin.to_string();
    // With the first in place of the second; what stood there before stands elsewhere.
    let asked = |to: &str, from: &str| {
        assert!(config.contains(from), "{from} is not in {config}");
        let path = pair.dir().join("other.toml");
        std::fs::write(&path, config.replace(to, "127.0.0.1:1").replace(from, to)).unwrap();
        let output = ferry(&["status", "--config", path.to_str().unwrap()]);
        assert!(!output.status.success(), "{}", text(&output));
        text(&output)
    };
    let another = asked(&replica.ports.admin.to_string(), &own);
    assert!(another.contains("another sidecar answers") && another.contains("give its own --config"), "{another}");
    for name in [region_name(&replica.region), format!("this configuration is of {}", region_name(&origin.region))] {
        assert!(another.contains(&name), "{name}: {another}");
    }
    let no_admin = asked(&origin.ports.peer.to_string(), &own);
    assert!(no_admin.contains("is no admin port: see listen.admin"), "{no_admin}");
    let http = asked(&origin.ports.http.to_string(), &own);
    assert!(http.contains("is it the port of a sidecar"), "{http}");

    let elsewhere = pair.dir().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let certs = origin.certs.to_str().unwrap();
    for name in [format!("{}.pem", origin.region), format!("{}.key", origin.region), "ca.pem".to_owned()] {
        std::fs::copy(origin.certs.join(&name), elsewhere.join(&name)).unwrap();
    }
    let absent = asked(elsewhere.to_str().unwrap(), certs);
    assert!(absent.contains("admin.pem is not there") && absent.contains("with --cert and --key"), "{absent}");
    let broken = asked("[listening]", "[listen]");
    assert!(broken.contains("goes on with the last sound one") && broken.contains("/healthz?full=1"), "{broken}");
}
