//! Job: a sidecar's pair comes from a PKI that speaks Vault's API: at the start, at two thirds of its life, and not from a bad answer.
//! Input: sidecars before a small PKI of the bed. Output: passes or fails.
//! Always true: no revision is lost; what is in use is never worse than what was there before.

use crate::bed::pair::{LINK, ORIGIN_REGION, Pair, PairOptions, REPLICA_REGION};
use crate::bed::pki::{Answer, Pki, TOKEN};
use crate::bed::sidecar::{Sidecar, ferry, region_name};
use crate::bed::{PATIENCE, until};
use etcd_ferry::certs::issue::IssueRequest;
use etcd_ferry::certs::load;
use etcd_ferry::config::{Config, PkiConfig, TlsConfig};
use etcd_ferry::pki;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};
use tokio::net::TcpStream;

/// A pair of sidecars that have empty folders, and a PKI to fill them.
async fn prepared(ttl_seconds: i64) -> (Pair, Pki) {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    let pki = Pki::start(&pair.dir().join("pki"));
    let dirs = [ORIGIN_REGION, REPLICA_REGION].map(|region| pair.dir().join(format!("certs-{region}")));
    for (dir, sidecar) in dirs.iter().zip([&mut pair.origin_sidecar, &mut pair.replica_sidecar]) {
        fs::create_dir(dir).unwrap();
        sidecar.options.certs.clone_from(dir);
        sidecar.options.pki = Some(pki.table(&region_name(&sidecar.options.region), ttl_seconds));
        sidecar.write_config();
    }
    (pair, pki)
}

fn file(sidecar: &Sidecar, suffix: &str) -> PathBuf {
    sidecar.options.certs.join(format!("{}.{suffix}", sidecar.options.region))
}

fn put_pair(pki: &Pki, sidecar: &Sidecar, request: &IssueRequest) {
    fs::write(sidecar.options.certs.join("ca.pem"), pki.ca_pem()).unwrap();
    pki.issue(request).write(&sidecar.options.certs, &sidecar.options.region).unwrap();
}

/// How often the origin's sidecar has opened a stream.
fn streams(pair: &Pair) -> usize {
    pair.origin_sidecar.log().matches(": following link=").count()
}

async fn said(sidecar: &Sidecar, words: &str) {
    until(words, PATIENCE, async || sidecar.log().contains(words).then_some(())).await;
}

async fn reloads(sidecar: &Sidecar, at_least: u64) {
    let enough = |health: &Value| health["certificates"]["reloads"].as_u64().filter(|reloads| *reloads >= at_least);
    sidecar.wait_for_health(&format!("{at_least} reloads"), enough).await;
}

async fn metric(sidecar: &Sidecar, name: &str) -> f64 {
    let (_, text) = sidecar.http("/metrics").await;
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap_or_else(|| panic!("{name} is not in {text}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_without_a_pair_asks_for_one_before_it_listens_and_links_with_it() {
    let (mut pair, pki) = prepared(3_600).await;
    let config = pair.origin_sidecar.config_path();
    let check = ferry(&["check", "--config", config.to_str().unwrap()]);
    let stdout = String::from_utf8(check.stdout).unwrap();
    assert!(check.status.success() && stdout.contains("the PKI is asked for one"), "{stdout}");

    pki.answer(Answer::Sealed);
    pair.origin_sidecar.spawn();
    said(&pair.origin_sidecar, "Vault is sealed").await;
    assert!(
        TcpStream::connect(pair.origin_sidecar.options.ports.peer).await.is_err(),
        "it has nothing to show to a peer"
    );
    pki.answer(Answer::Sound);
    pair.origin_sidecar.http("/healthz").await;
    pair.replica_sidecar.restart().await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;

    let asked = pki.asked();
    let names: Vec<&str> = asked.iter().filter_map(|asked| asked.body["uri_sans"].as_str()).collect();
    assert_eq!(names, [region_name(ORIGIN_REGION), region_name(REPLICA_REGION)]);
    assert_eq!((asked[0].namespace.as_deref(), &asked[0].body["ttl"]), (Some("team"), &"3600s".into()));
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let ca = sidecar.options.certs.join("ca.pem");
        assert_eq!([mode(&file(sidecar, "key")), mode(&file(sidecar, "pem")), mode(&ca)], [0o600, 0o644, 0o644]);
        let key = fs::read_to_string(file(sidecar, "key")).unwrap();
        let log = sidecar.log();
        assert!(key.lines().filter(|line| line.len() > 30).all(|line| !log.contains(line)), "a key in the log");
        assert!(!log.contains("PRIVATE") && !log.contains(TOKEN), "a secret in the log");
    }
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_that_waits_for_its_first_pair_stops_in_order() {
    let (mut pair, pki) = prepared(3_600).await;
    pki.answer(Answer::Sealed);
    pair.origin_sidecar.spawn();
    said(&pair.origin_sidecar, "Vault is sealed").await;
    let (took, status) = pair.origin_sidecar.stop().await;
    assert!(status.success(), "SIGTERM ended it with {status} after {took:?}: {}", pair.origin_sidecar.log());
    assert!(pair.origin_sidecar.log().contains("stopped before everything was bound"));
}

#[tokio::test(flavor = "multi_thread")]
async fn pairs_are_renewed_at_two_thirds_of_their_life_again_and_again_on_one_stream() {
    let (mut pair, pki) = prepared(6).await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;
    until("the first stream", PATIENCE, async || (streams(&pair) > 0).then_some(())).await;
    let before = streams(&pair);
    // By the second, the certificates that the stream's handshake showed have been over for long.
    for round in 1..=2 {
        for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
            reloads(sidecar, round).await;
        }
        let last = pair.origin.put("/app/round", &*round.to_string()).await;
        pair.wait_applied(last).await;
    }
    assert_eq!(streams(&pair), before, "a stream was given up for a renewal: {}", pair.origin_sidecar.log());
    for region in [ORIGIN_REGION, REPLICA_REGION] {
        let of_region = |body: &Value| body["uri_sans"] == *region_name(region);
        let asked: Vec<_> = pki.asked().into_iter().filter(|asked| of_region(&asked.body)).collect();
        assert!(asked.len() >= 3);
        for (earlier, later) in asked.iter().zip(&asked[1..]) {
            // A certificate's times are whole seconds.
            let due = earlier.not_before + (earlier.not_after - earlier.not_before) * 2 / 3 - Duration::SECOND;
            assert!(later.at >= due, "{region}: asked again at {} for {earlier:?}", later.at);
        }
    }
    assert_eq!(metric(&pair.origin_sidecar, "etcd_ferry_pki_failures_total").await, 0.0);
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_ends_while_the_pki_is_down_is_told_and_renewed_when_it_is_up_again() {
    let (mut pair, mut pki) = prepared(3_600).await;
    let now = OffsetDateTime::now_utc();
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let life = (now - Duration::hours(20), now + Duration::hours(2));
        let request = IssueRequest::region(&sidecar.options.region);
        put_pair(&pki, sidecar, &IssueRequest { not_before: life.0, not_after: life.1, ..request });
    }
    pki.stop().await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;
    said(&pair.origin_sidecar, "this sidecar's certificate ends, and the PKI does not renew it").await;
    let log = pair.origin_sidecar.log();
    let line = log.lines().find(|line| line.contains("certificate ends")).unwrap();
    assert!(line.contains("ERROR") && line.contains("cannot be asked") && line.contains("refused"), "{line}");
    let overdue = |at: f64| at > 0.0 && at < now.unix_timestamp() as f64;
    assert!(overdue(metric(&pair.origin_sidecar, "etcd_ferry_certificate_renewal_timestamp_seconds").await));
    assert!(metric(&pair.origin_sidecar, "etcd_ferry_pki_failures_total").await >= 1.0);

    pki.start_again();
    reloads(&pair.origin_sidecar, 1).await;
    said(&pair.origin_sidecar, "the PKI renewed this sidecar's certificate").await;
    assert_eq!(metric(&pair.origin_sidecar, "etcd_ferry_pki_certificates_total").await, 1.0);
    assert!(!overdue(metric(&pair.origin_sidecar, "etcd_ferry_certificate_renewal_timestamp_seconds").await));
    let state = pair.origin_sidecar.wait_for_state(LINK, "following").await;
    assert_eq!(state["state"], "following");
    pair.assert_equal().await;
}

/// What a sidecar of one region would be configured with, in a folder that holds a good pair.
fn files(dir: &Path, pki: &Pki) -> (TlsConfig, PkiConfig) {
    fs::write(dir.join("ca.pem"), pki.ca_pem()).unwrap();
    let issued = pki.issue(&IssueRequest::region(ORIGIN_REGION)).write(dir, "pair").unwrap();
    let tls = TlsConfig {
        ca: dir.join("ca.pem"),
        cert: issued.cert,
        key: issued.key,
        crl: None,
        admins: Vec::new(),
        viewers: Vec::new(),
    };
    let table = pki.table(&region_name(ORIGIN_REGION), 3_600);
    let text = format!(
        "region = 'a'\nnode = 'a'\ndata_dir = 'd'\netcd.endpoints = ['http://a:1']\n[[receive]]\nlink = 'l'\npeer = 'b'\n\
         [listen]\npeer = '127.0.0.1:0'\nadmin = '127.0.0.1:0'\nhttp = '127.0.0.1:0'\n\
         [tls]\nca = 'ca'\ncert = 'cert'\nkey = 'key'\n[tls.pki]\n{table}"
    );
    (tls, Config::from_toml(&text).unwrap_or_else(|faults| panic!("{faults}")).pki.unwrap())
}

#[tokio::test]
async fn an_answer_that_is_not_sound_and_a_refusal_leave_the_old_pair_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Pki::start(&dir.path().join("pki"));
    let (tls, config) = files(dir.path(), &server);
    let there = || (fs::read(&tls.cert).unwrap(), fs::read(&tls.key).unwrap(), fs::read(&tls.ca).unwrap());
    let before = there();
    let refusal = async |config: &PkiConfig, known_by: &[String]| {
        let renewed = pki::Pki::new(tls.clone(), config.clone()).renew(known_by).await;
        assert_eq!(there(), before);
        let refusal = renewed.unwrap_err().to_string();
        assert!(!refusal.contains(TOKEN) && !refusal.contains('\n'), "{refusal}");
        refusal
    };
    for (answer, words) in [
        (Answer::Sealed, "answered 503 to /v1/pki/issue/ferry: Vault is sealed"),
        (Answer::Elsewhere, "answered 307"),
        (Answer::NotInForm, "is not in the form of Vault's API"),
        (Answer::OtherName, "does not name spiffe://etcd-ferry.dev/region/us-east-1"),
        (Answer::OtherKey, "is not that of its certificate"),
        (Answer::Expired, "expired on"),
        (Answer::OtherCa, "is not of the CA in tls.ca"),
        (Answer::ClientOnly, "is not issued for use as a server"),
    ] {
        server.answer(answer);
        let said = refusal(&config, &[]).await;
        assert!(said.contains(words), "{answer:?}: {said}");
    }
    server.answer(Answer::Sound);
    let said = refusal(&config, &["ferry.example".to_owned()]).await;
    assert!(said.contains("does not name ferry.example"), "what peers know this sidecar by: {said}");
    let elsewhere = PkiConfig { mount: "other".to_owned(), ..config.clone() };
    let said = refusal(&elsewhere, &[]).await;
    assert!(said.contains("answered 404") && said.contains("tls.pki.mount"), "{said}");
    let strange = PkiConfig { ca: Some(tls.ca.clone()), ..config.clone() };
    let said = refusal(&strange, &[]).await;
    assert!(said.contains("cannot be asked") && said.contains("UnknownIssuer"), "{said}");

    server.write_token("another");
    let said = refusal(&config, &[]).await;
    assert!(said.contains("403") && said.contains("permission denied") && said.contains("token"), "{said}");
    server.write_token("");
    assert!(refusal(&config, &[]).await.contains("it is empty"));
    fs::set_permissions(server.token_file(), fs::Permissions::from_mode(0o644)).unwrap();
    assert!(refusal(&config, &[]).await.contains("is open to others"));
    server.write_token(TOKEN);
    server.stop().await;
    assert!(refusal(&config, &[]).await.contains("refused"));

    // The token is read anew.
    server.start_again();
    pki::Pki::new(tls.clone(), config).renew(&[]).await.unwrap();
    assert!(there().0 != before.0 && there().1 != before.1 && there().2 == before.2);
    load::load_pair(&tls.cert, &tls.key).unwrap();
}

#[tokio::test]
async fn what_a_stop_left_between_key_and_certificate_is_used_while_the_pki_is_down() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Pki::start(&dir.path().join("pki"));
    let (tls, config) = files(dir.path(), &server);
    let next = server.issue(&IssueRequest::region(ORIGIN_REGION));
    fs::write(&tls.key, &next.key_pem).unwrap();
    fs::write(tls.cert.with_extension("pem.new"), &next.cert_pem).unwrap();
    server.stop().await;
    tokio::time::timeout(PATIENCE, pki::Pki::new(tls.clone(), config).prepare())
        .await
        .expect("it starts with that pair");
    load::load_pair(&tls.cert, &tls.key).unwrap();
    assert_eq!(fs::read_to_string(&tls.cert).unwrap(), next.cert_pem);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_that_will_not_do_is_replaced_at_the_start() {
    let (mut pair, pki) = prepared(3_600).await;
    put_pair(&pki, &pair.origin_sidecar, &IssueRequest::region(ORIGIN_REGION).expired());
    put_pair(&pki, &pair.replica_sidecar, &IssueRequest::region("elsewhere"));
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;
    assert!(pair.origin_sidecar.log().contains("expired on"));
    assert!(pair.replica_sidecar.log().contains("does not name"));
    pair.assert_equal().await;
}

#[test]
fn check_tells_the_faults_of_a_pki_s_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let text = format!(
        "region = 'a'\nnode = 'a'\ndata_dir = '{}'\netcd.endpoints = ['http://a:1']\n[[receive]]\nlink = 'l'\npeer = 'b'\n\
         [listen]\npeer = '127.0.0.1:0'\nadmin = '127.0.0.1:0'\nhttp = '127.0.0.1:0'\n\
         [tls]\nca = '{}'\ncert = '{}'\nkey = '{}'\n\
         [tls.pki]\naddress = 'https://a:1'\nca = '{}'\nrole = 'r'\ntoken_file = '{}'\nnames = ['b']\n",
        at("data"),
        at("ca.pem"),
        at("none/cert.pem"),
        at("key"),
        at("pki-ca.pem"),
        at("token")
    );
    fs::write(at("config.toml"), text).unwrap();
    fs::write(at("token"), "\n").unwrap();
    fs::set_permissions(at("token"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(at("ca.pem"), "").unwrap();
    let check = ferry(&["check", "--config", &at("config.toml")]);
    assert_eq!(check.status.code(), Some(2));
    let stderr = String::from_utf8(check.stderr).unwrap();
    let fields: Vec<&str> = stderr.lines().filter_map(|line| line.split(": ").next()).collect();
    assert_eq!(fields, ["tls.pki.ca", "tls.pki.token_file", "tls.ca", "tls.cert"], "{stderr}");
}
