//! Job: hold `check` and `certs dev` to what they promise: every fault of a configuration and of its files at once.
//! Input: configurations in a folder of their own; the binary. Output: passed or failed.
//! Always true: what is expected is what an operator sees: exit code, stdout, stderr.

use crate::bed::ports::Nobody;
use etcd_ferry::certs::issue::{IssueRequest, Issuer};
use etcd_ferry::config::{Config, Faults};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// A folder with development certificates and a configuration that names them.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        etcd_ferry::certs::dev(&dir.path().join("certs"), &["us-east-1"]).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self) -> String {
        let dir = self.dir.path().display();
        format!(
            r#"
region = "us-east-1"
node = "us-east-1-a"
data_dir = "{dir}/data"
[etcd]
endpoints = ["http://127.0.0.1:2379"]
[listen]
peer = "127.0.0.1:0"
admin = "127.0.0.1:0"
http = "127.0.0.1:0"
[tls]
ca = "{dir}/certs/ca.pem"
cert = "{dir}/certs/us-east-1.pem"
key = "{dir}/certs/us-east-1.key"
[[receive]]
link = "config"
peer = "spiffe://etcd-ferry.dev/region/cn-hangzhou"
"#
        )
    }

    fn config(&self) -> Config {
        Config::from_toml(&self.text()).unwrap()
    }

    /// `field: rule` of each fault that the files have.
    fn faults(&self, config: &Config) -> Vec<String> {
        let Faults(faults) = config.check_files().unwrap_err();
        faults.into_iter().map(|f| format!("{}: {}", f.field, f.rule)).collect()
    }

    fn check(&self, text: &str) -> Output {
        let file = self.path("ferry.toml");
        std::fs::write(&file, text).unwrap();
        ferry(&["check", "--config", &file.display().to_string()])
    }
}

fn ferry(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_etcd-ferry")).args(arguments).output().unwrap()
}

fn chmod(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn assert_fault(faults: &[String], field: &str, words: &str) {
    assert_eq!(faults.len(), 1, "{faults:#?}");
    assert!(faults[0].starts_with(&format!("{field}: ")) && faults[0].contains(words), "{faults:#?}");
}

#[test]
fn check_says_who_this_sidecar_is_and_leaves_no_trace() {
    let place = Place::new();
    let output = place.check(&place.text());
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("spiffe://etcd-ferry.dev/region/us-east-1") && stdout.contains("valid until"), "{stdout}");
    assert!(!place.path("data").exists());
}

#[test]
fn check_warns_where_nobody_is_an_admin_and_where_a_link_names_this_side_as_its_peer() {
    let place = Place::new();
    let said = |text: &str| {
        let output = place.check(text);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let nobody = "warning: tls.admins is empty: nobody may ask this sidecar anything; list the names of your operators' certificates\n";
    assert!(said(&place.text()).contains(nobody));
    let viewer = place.text().replace("[tls]", "[tls]\nviewers = [\"spiffe://etcd-ferry.dev/monitoring\"]");
    assert!(said(&viewer).contains("warning: tls.admins is empty: nobody may do more than look;"));
    let admin = place.text().replace("[tls]", "[tls]\nadmins = [\"spiffe://etcd-ferry.dev/admin\"]");
    assert!(!said(&admin).contains("warning"));
    let itself = admin.replace("peer = \"spiffe://etcd-ferry.dev/region/cn-hangzhou\"", "peer = \"localhost\"");
    let warning = "warning: [[receive]] config: peer localhost is a name of this sidecar's own certificate; it is to be the other region's\n";
    assert!(said(&itself).contains(warning));
}

#[test]
fn check_reports_all_faults_and_exits_with_2() {
    let place = Place::new();
    let text = place.text().replace("[etcd]", "[etcd]\nendpoint = 1").replace("node = ", "nod = ");
    let output = place.check(&text);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    for field in ["nod: ", "node: ", "etcd.endpoint: "] {
        assert!(stderr.lines().any(|l| l.starts_with(field)), "{field} is lacking:\n{stderr}");
    }
}

#[test]
fn check_reports_faults_of_files_beside_those_of_rules() {
    let place = Place::new();
    std::fs::create_dir(place.path("data")).unwrap();
    chmod(&place.path("data"), 0o755);
    let text = place.text().replace("ca.pem", "none.pem").replace("node = ", "nod = ");
    let output = place.check(&text);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    for field in ["nod: ", "node: ", "data_dir: ", "tls.ca: "] {
        assert!(stderr.lines().any(|l| l.starts_with(field)), "{field} is lacking:\n{stderr}");
    }
}

#[test]
fn each_fault_says_which_line_variable_or_flag_it_is_about() {
    let place = Place::new();
    let file = place.path("ferry.toml");
    std::fs::write(&file, place.text().replace("node = \"us-east-1-a\"", "node = \"a b\"")).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_etcd-ferry"))
        .args(["check", "--set", "log.format=xml", "--set", "limits.stall=60", "--config"])
        .arg(&file)
        .env("ETCD_FERRY_LIMITS_TXN_OPS_MAX", "1")
        .env("ETCD_FERRY_TLS_CA", place.path("none.pem"))
        .env("ETCD_FERRY_LOGLEVEL", "debug")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    for (field, place) in [
        ("node: ", " [line 3]"),
        ("limits.txn_ops_max: ", " [ETCD_FERRY_LIMITS_TXN_OPS_MAX]"),
        ("tls.ca: ", " [ETCD_FERRY_TLS_CA]"),
        ("log.format: ", " [--set]"),
        ("ETCD_FERRY_LOGLEVEL: ", ""),
        ("--set limits.stall: ", ""),
    ] {
        assert!(stderr.lines().any(|l| l.starts_with(field) && l.ends_with(place)), "{field}{place}:\n{stderr}");
    }
    assert_eq!(stderr.lines().count(), 6, "{stderr}");
}

#[test]
fn check_shows_what_goes_before_the_file_and_that_it_does() {
    let place = Place::new();
    let file = place.path("ferry.toml");
    std::fs::write(&file, place.text().replace("region = \"us-east-1\"", "region = \"not/good\"")).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_etcd-ferry"))
        .args(["check", "--set", "region=us-east-1", "--config"])
        .arg(&file)
        .env("ETCD_FERRY_REGION", "from/the/environment")
        .env("ETCD_FERRY_TLS_ADMINS", "spiffe://etcd-ferry.dev/admin,admin.example")
        .env("ETCD_FERRY_PORT_7443_TCP_ADDR", "10.0.0.1")
        .output()
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Vec<&str> = stdout.lines().filter(|line| line.contains("goes before")).collect();
    let wanted = [
        "region = \"us-east-1\" is not from the file: --set goes before it",
        "tls.admins = [\"spiffe://etcd-ferry.dev/admin\", \"admin.example\"] is not from the file: ETCD_FERRY_TLS_ADMINS goes before it",
    ];
    assert_eq!(told, wanted);
}

#[test]
fn a_missing_configuration_and_bad_usage_exit_with_2() {
    let place = Place::new();
    let output = ferry(&["check", "--config", &place.path("none.toml").display().to_string()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("none.toml: cannot be read"));
    let output = place.check("region = \nnode = 1\n");
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("ferry.toml, line 1, column ") && said.contains("is not TOML"), "{said}");
    assert_eq!(ferry(&["check"]).status.code(), Some(2));
    assert_eq!(ferry(&["chekc"]).status.code(), Some(2));
    assert_eq!(ferry(&["--version"]).status.code(), Some(0));
}

#[test]
fn a_command_s_own_flag_or_an_absent_file_is_not_called_an_unsound_configuration() {
    let place = Place::new();
    let file = place.path("ferry.toml");
    let asked = |more: &[&str]| {
        let output = ferry(&[&["status", "--config", &file.display().to_string()], more].concat());
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let absent = asked(&[]);
    assert!(absent.contains("cannot be read") && absent.lines().count() == 1, "{absent}");
    std::fs::write(&file, place.text()).unwrap();
    for flag in ["listen.admin=nowhere", "listen.adnim=127.0.0.1:1", "limits.txn_ops_max=many"] {
        let flagged = asked(&["--set", flag]);
        assert!(flagged.contains("--set") && flagged.lines().count() == 1, "{flag}: {flagged}");
    }
    std::fs::write(&file, place.text().replace("node =", "nodes =")).unwrap();
    let unsound = asked(&["--set", "listen.admin=nowhere"]);
    assert!(unsound.contains("ferry.toml: is not sound"), "{unsound}");
}

#[test]
fn a_sidecar_that_nobody_may_ask_says_so_when_it_starts() {
    let place = Place::new();
    let file = place.path("ferry.toml");
    std::fs::write(&file, place.text()).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("listen.peer={}", taken.local_addr().unwrap());
    let output = ferry(&["run", "--config", &file.display().to_string(), "--set", &address]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.contains("cannot listen at"), "{said}");
    let warned = |line: &str| line.contains("WARN") && line.contains("tls.admins is empty: nobody may ask");
    assert!(said.lines().any(warned), "{said}");
}

#[test]
fn a_command_to_a_running_sidecar_takes_the_flags_that_it_runs_with() {
    let place = Place::new();
    let file = place.path("ferry.toml");
    std::fs::write(&file, place.text()).unwrap();
    let nobody = Nobody::new();
    let (cert, key) = (place.path("certs/us-east-1.pem"), place.path("certs/us-east-1.key"));
    let (file, cert, key) = (file.display().to_string(), cert.display().to_string(), key.display().to_string());
    let flag = format!("listen.admin={}", nobody.address);
    let output = ferry(&["status", "--config", &file, "--set", &flag, "--cert", &cert, "--key", &key]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains(&format!("no sidecar answers at {}", nobody.address)), "{said}");
}

#[test]
fn where_a_file_of_a_relative_path_was_looked_for_is_told() {
    let place = Place::new();
    let certs = place.path("certs").display().to_string();
    std::fs::write(place.path("ferry.toml"), place.text().replace(&certs, "elsewhere")).unwrap();
    let mut check = Command::new(env!("CARGO_BIN_EXE_etcd-ferry"));
    let output = check.args(["check", "--config", "ferry.toml"]).current_dir(place.dir.path()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let ca = place.dir.path().canonicalize().unwrap().join("elsewhere/ca.pem");
    assert!(
        output.status.code() == Some(2) && said.contains(&format!("tls.ca: {} cannot be read", ca.display())),
        "{said}"
    );
}

#[test]
fn every_missing_file_is_reported() {
    let place = Place::new();
    std::fs::remove_dir_all(place.path("certs")).unwrap();
    let mut config = place.config();
    config.tls.crl = Some(place.path("crl.pem"));
    config.etcd.ca = Some(place.path("etcd-ca.pem"));
    config.etcd.password_file = Some(place.path("password"));
    let faults = place.faults(&config);
    let fields: Vec<&str> = faults.iter().filter_map(|f| f.split(": ").next()).collect();
    assert_eq!(fields, ["etcd.ca", "etcd.password_file", "tls.ca", "tls.crl", "tls.key", "tls.cert"]);
    assert!(faults.iter().all(|f| f.contains("No such file")), "{faults:#?}");
}

#[test]
fn a_key_or_a_password_that_others_may_read_is_refused() {
    let place = Place::new();
    let mut config = place.config();
    chmod(&config.tls.key, 0o640);
    assert_fault(&place.faults(&config), "tls.key", "mode 0640");
    chmod(&config.tls.key, 0o400);
    config.check_files().unwrap();

    let password = place.path("password");
    std::fs::write(&password, "hunter2\n").unwrap();
    chmod(&password, 0o644);
    config.etcd.password_file = Some(password.clone());
    assert_fault(&place.faults(&config), "etcd.password_file", "chmod 600");
    chmod(&password, 0o600);
    config.check_files().unwrap();
    std::fs::write(&password, "\n").unwrap();
    assert_fault(&place.faults(&config), "etcd.password_file", "is empty");
}

#[test]
fn a_pair_that_does_not_belong_together_is_refused() {
    let place = Place::new();
    let mut config = place.config();
    config.tls.key = place.path("certs/admin.key");
    assert_fault(&place.faults(&config), "tls.key", "is not the key of");
}

#[test]
fn a_certificate_out_of_its_time_of_another_ca_or_for_one_end_only_is_refused() {
    let place = Place::new();
    let mut config = place.config();
    let ours = Issuer::load(&place.path("certs/ca.pem"), &place.path("certs/ca.key")).unwrap();
    let other = Issuer::new("another CA").unwrap();
    let good = IssueRequest::region("x");
    let nameless = IssueRequest { uris: Vec::new(), dns: Vec::new(), ..good.clone() };
    let cases = [
        ("old", &ours, good.clone().expired(), "expired on"),
        ("new", &ours, good.clone().not_yet_valid(), "is not valid before"),
        ("strange", &other, good, "was not issued by the configured CA"),
        ("admin2", &ours, IssueRequest::admin(), "is not issued for use as a server"),
        ("nameless", &ours, nameless, "bears no URI or DNS name"),
    ];
    let server_alone = IssueRequest { client_auth: false, ..IssueRequest::region("x") };
    let issued = ours.issue(&server_alone).unwrap().write(place.dir.path(), "server").unwrap();
    (config.tls.cert, config.tls.key) = (issued.cert, issued.key.clone());
    let faults = place.faults(&config);
    assert_fault(&faults, "tls.cert", "is not issued for use as a client");
    assert_eq!(faults.len(), 1, "of its CA it is: {faults:?}");
    config.tls.cert = issued.key;
    assert_fault(&place.faults(&config), "tls.cert", "holds no certificate");
    for (name, issuer, request, words) in cases {
        let issued = issuer.issue(&request).unwrap().write(place.dir.path(), name).unwrap();
        (config.tls.cert, config.tls.key) = (issued.cert, issued.key);
        assert_fault(&place.faults(&config), "tls.cert", words);
    }
}

#[test]
fn a_broken_pem_file_is_refused_without_showing_it() {
    let place = Place::new();
    let config = place.config();
    let key = std::fs::read_to_string(&config.tls.key).unwrap();
    std::fs::write(&config.tls.key, key.replace("MI", "M!")).unwrap();
    let faults = place.faults(&config);
    assert_fault(&faults, "tls.key", "base64 is broken");
    std::fs::write(&config.tls.ca, "").unwrap();
    assert!(place.faults(&config)[0].contains("holds no certificate"));
}

#[test]
fn the_data_directory_is_made_0700_and_refused_when_it_is_wider() {
    let place = Place::new();
    let config = place.config();
    config.prepare_files().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&config.data_dir), 0o700);
    config.prepare_files().unwrap();
    chmod(&config.data_dir, 0o750);
    assert_fault(&place.faults(&config), "data_dir", "mode 0750");
    std::fs::remove_dir(&config.data_dir).unwrap();
    std::fs::write(&config.data_dir, "").unwrap();
    assert_fault(&place.faults(&config), "data_dir", "is not a directory");
}

#[test]
fn certs_dev_makes_what_is_missing_and_says_how_to_renew_the_rest() {
    let place = Place::new();
    let out = place.path("made").display().to_string();
    let first = ferry(&["certs", "dev", "--out", &out, "--region", "us-east-1"]);
    assert_eq!(first.status.code(), Some(0), "{}", String::from_utf8_lossy(&first.stderr));
    let second = ferry(&["certs", "dev", "--out", &out, "--region", "us-east-1", "--region", "cn-hangzhou"]);
    let stdout = String::from_utf8(second.stdout).unwrap();
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines.len(), 4, "{stdout}");
    assert!(lines[1].starts_with("kept") && lines[1].contains("delete both files and run this again"), "{stdout}");
    assert!(lines[2].starts_with("made") && lines[2].contains("region/cn-hangzhou"), "{stdout}");

    let refused = ferry(&["certs", "dev", "--out", &out, "--region", "../x"]);
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(String::from_utf8(refused.stderr).unwrap().lines().count(), 1);
}
