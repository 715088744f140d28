//! Job: certificates change under running links: what is sound is taken, what is not is refused and told, and a peer that is not to be
//! trusted any more is cut.
//! Input: pairs whose certificates' files are replaced, as people, scripts and Kubernetes replace them. Output: passes or fails.
//! Always true: no revision is lost, and both sides end equal.

use crate::bed::etcd::{EtcdOptions, EtcdTls};
use crate::bed::pair::{LINK, ORIGIN_REGION, Pair, PairOptions, REPLICA_REGION};
use crate::bed::sidecar::Sidecar;
use crate::bed::{PATIENCE, until};
use crate::calls::connection_to;
use crate::etcd_access::etcd_tls;
use etcd_ferry::admin::client;
use etcd_ferry::certs::issue::{IssueRequest, Issuer, Pair as KeyPair};
use etcd_ferry::certs::load;
use etcd_ferry::model::{Revision, Side};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// After the reload of a revocation list.
const CUT_WITHIN: Duration = Duration::from_secs(5);

/// One sidecar's files, in a folder of its own.
struct Files {
    dir: PathBuf,
    region: &'static str,
}

impl Files {
    fn new(pair: &Pair, region: &'static str) -> Self {
        let dir = pair.dir().join(format!("certs-{region}"));
        fs::create_dir(&dir).unwrap();
        Self { dir, region }
    }

    /// As a careful person replaces a file.
    fn put(&self, name: &str, content: &str, mode: u32) {
        let (new, old) = (self.dir.join(format!("{name}.new")), self.dir.join(name));
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&new).unwrap();
        std::io::Write::write_all(&mut file, content.as_bytes()).unwrap();
        fs::rename(new, old).unwrap();
    }

    fn put_ca(&self, issuers: &[&Issuer]) {
        self.put("ca.pem", &issuers.iter().map(|issuer| issuer.ca_pem()).collect::<String>(), 0o644);
    }

    fn put_pair(&self, pair: &KeyPair) {
        self.put(&format!("{}.pem", self.region), &pair.cert_pem, 0o644);
        self.put(&format!("{}.key", self.region), &pair.key_pem, 0o600);
    }

    /// The next pair, of the same name.
    fn issue(&self, issuer: &Issuer) -> KeyPair {
        issuer.issue(&IssueRequest::region(self.region)).unwrap()
    }
}

/// A pair whose sidecars have their own files, of one CA.
async fn prepared() -> (Pair, Issuer, [Files; 2]) {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    let certs = pair.origin_sidecar.options.certs.clone();
    let issuer = Issuer::load(&certs.join("ca.pem"), &certs.join("ca.key")).unwrap();
    let files = [ORIGIN_REGION, REPLICA_REGION].map(|region| Files::new(&pair, region));
    for (files, sidecar) in files.iter().zip([&mut pair.origin_sidecar, &mut pair.replica_sidecar]) {
        files.put_ca(&[&issuer]);
        files.put_pair(&files.issue(&issuer));
        sidecar.options.certs.clone_from(&files.dir);
        for name in ["admin.pem", "admin.key"] {
            fs::copy(certs.join(name), files.dir.join(name)).unwrap();
        }
        sidecar.write_config();
    }
    (pair, issuer, files)
}

async fn following(pair: &mut Pair) {
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;
    // What a base copy brings is applied before the stream that follows is open.
    until("the first stream", PATIENCE, async || (streams(pair) > 0).then_some(())).await;
}

async fn certificates(sidecar: &Sidecar, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    sidecar.wait_for_health(what, |health| Some(health["certificates"].clone()).filter(|c| wanted(c))).await
}

pub fn ends_of(certificate: &Path) -> i64 {
    load::load_identity(certificate).unwrap().not_after.unix_timestamp()
}

/// Status and metrics say when these end, in seconds of Unix time.
async fn ends_are_told<const N: usize>(sidecar: &Sidecar, ends: [(&str, i64); N]) {
    for (name, at) in ends {
        let field = format!("{name}_expires_at");
        certificates(sidecar, &format!("the end of {name}"), |c| c[&field] == at).await;
        assert_eq!(sidecar.status()["certificates"][&field], at, "{name}");
        let (_, metrics) = sidecar.http("/metrics").await;
        let metric = format!("\netcd_ferry_certificate_expiry_timestamp_seconds{{certificate=\"{name}\"}} {at}\n");
        assert!(metrics.contains(&metric), "{metric} is not in: {metrics}");
    }
}

async fn reloaded(sidecar: &Sidecar, reloads: u64) {
    certificates(sidecar, &format!("{reloads} reloads"), |c| c["reloads"] == reloads && c["refused"] == "").await;
}

/// How often the origin's sidecar has opened a stream.
fn streams(pair: &Pair) -> usize {
    pair.origin_sidecar.log().matches(": following link=").count()
}

/// A stream is opened anew, with what is in the files now.
async fn dialled_anew(pair: &Pair) {
    let before = streams(pair);
    pair.proxy.cut();
    pair.proxy.heal();
    until("the next stream", PATIENCE, async || (streams(pair) > before).then_some(())).await;
    let last = writes(pair, 1).await;
    pair.wait_applied(last).await;
}

async fn writes(pair: &Pair, round: usize) -> Revision {
    let mut last = Revision(0);
    for key in 0..20 {
        last = pair.origin.put(&*format!("/app/{key}"), &*round.to_string()).await;
    }
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn renewed_pairs_are_taken_into_use_while_the_stream_goes_on() {
    let (mut pair, issuer, files) = prepared().await;
    following(&mut pair).await;
    let before = streams(&pair);
    for round in 1..=3 {
        for files in &files {
            files.put_pair(&files.issue(&issuer));
        }
        writes(&pair, round).await;
        for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
            reloaded(sidecar, round as u64).await;
        }
        let last = writes(&pair, round).await;
        pair.wait_applied(last).await;
    }
    assert_eq!(streams(&pair), before, "no stream was given up for a renewal: {}", pair.origin_sidecar.log());
    let (_, metrics) = pair.origin_sidecar.http("/metrics").await;
    assert!(metrics.contains("\netcd_ferry_certificate_reloads_total 3\n"), "{metrics}");
    // What is dialled from now on shows the new certificate, and is shown it.
    pair.proxy.cut();
    pair.proxy.heal();
    let last = writes(&pair, 9).await;
    pair.wait_applied(last).await;
    assert!(streams(&pair) > before);
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_sound_is_refused_in_words_and_the_last_pair_stays_in_use() {
    let (mut pair, issuer, [files, _]) = prepared().await;
    following(&mut pair).await;
    let request = || IssueRequest::region(ORIGIN_REGION);
    let good = issuer.issue(&request()).unwrap();
    let stranger = Issuer::new("another CA").unwrap();
    let bad: [(&str, KeyPair, u32); 4] = [
        ("expired on", issuer.issue(&request().expired()).unwrap(), 0o600),
        ("was not issued by the configured CA", stranger.issue(&request()).unwrap(), 0o600),
        ("does not name spiffe://", issuer.issue(&IssueRequest::region("elsewhere")).unwrap(), 0o600),
        ("is open to others", issuer.issue(&request()).unwrap(), 0o644),
    ];
    let texts = bad.iter().map(|(words, pair, mode)| (*words, &pair.cert_pem[..], &pair.key_pem[..], *mode));
    let halves = ("is not the key of", &good.cert_pem[..], &issuer.issue(&request()).unwrap().key_pem[..], 0o600);
    for (nth, (words, cert, key, mode)) in texts.chain([halves]).enumerate() {
        files.put(&format!("{ORIGIN_REGION}.pem"), cert, 0o644);
        files.put(&format!("{ORIGIN_REGION}.key"), key, mode);
        let told = |c: &Value| c["refused"].as_str().is_some_and(|reason| reason.contains(words));
        certificates(&pair.origin_sidecar, words, told).await;
        let (_, metrics) = pair.origin_sidecar.http("/metrics").await;
        assert!(metrics.contains("\netcd_ferry_certificates_refused 1\n"), "{metrics}");
        // A new dial shows the last one.
        pair.proxy.cut();
        pair.proxy.heal();
        let last = writes(&pair, 1).await;
        pair.wait_applied(last).await;
        files.put_pair(&files.issue(&issuer));
        reloaded(&pair.origin_sidecar, nth as u64 + 1).await;
    }
    let said = pair.origin_sidecar.log();
    assert_eq!(said.matches("new certificates are refused").count(), 5, "each once: {said}");
    assert!(!said.contains("BEGIN"), "no file's content is told");
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_is_replaced_by_steps_and_no_handshake_fails() {
    let (mut pair, old, files) = prepared().await;
    following(&mut pair).await;
    let new = Issuer::new("the next CA").unwrap();
    let both = [&pair.origin_sidecar, &pair.replica_sidecar];
    // At the start one of them was there before the other.
    let before = both.map(|sidecar| sidecar.log().len());
    for files in &files {
        files.put_ca(&[&old, &new]);
    }
    for sidecar in both {
        reloaded(sidecar, 1).await;
    }
    dialled_anew(&pair).await;
    for (files, sidecar) in files.iter().zip(both) {
        // First the one has a certificate of the new CA while the other's is of the old one, and what dials meets the other way round.
        if sidecar.options.region == REPLICA_REGION {
            dialled_anew(&pair).await;
        }
        files.put_pair(&files.issue(&new));
        reloaded(sidecar, 2).await;
        sidecar.status();
        writes(&pair, 2).await;
    }
    // The stream was opened while the replica's certificate was of the old CA, and outlived its renewal.
    let of_the_old_ca = streams(&pair);
    for (files, sidecar) in files.iter().zip(both) {
        files.put_ca(&[&new]);
        reloaded(sidecar, 3).await;
        writes(&pair, 3).await;
    }
    let cut = async || {
        pair.origin_sidecar.log().contains("a connection is cut since certificates were reloaded").then_some(())
    };
    until("what dialled to cut the stream of the old CA", PATIENCE, cut).await;
    until("a stream of the new CA", PATIENCE, async || (streams(&pair) > of_the_old_ca).then_some(())).await;
    let last = writes(&pair, 4).await;
    pair.wait_applied(last).await;
    for (sidecar, before) in both.into_iter().zip(before) {
        let said = sidecar.log().split_off(before);
        assert!(!said.contains("a connection was refused") && !said.contains("no mutual trust"), "{said}");
    }
    // Who trusts the new CA alone, and shows a certificate of it, gets in and meets one.
    for (files, sidecar) in files.iter().zip(both) {
        let admin = new.issue(&IssueRequest::admin()).unwrap();
        files.put("admin.pem", &admin.cert_pem, 0o644);
        files.put("admin.key", &admin.key_pem, 0o600);
        sidecar.status();
    }
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_revoked_is_cut_off_its_live_stream_and_comes_back_with_another_certificate() {
    Box::pin(revoked(Side::Origin)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_revoked_is_cut_off_by_its_origin_and_comes_back_with_another_certificate() {
    Box::pin(revoked(Side::Replica)).await;
}

fn other_than(side: Side, pair: &mut Pair) -> &mut Sidecar {
    match side {
        Side::Origin => &mut pair.replica_sidecar,
        Side::Replica => &mut pair.origin_sidecar,
    }
}

/// The certificate of this side is revoked at the other one.
async fn revoked(side: Side) {
    let (mut pair, issuer, [origin, replica]) = prepared().await;
    let tomorrow = OffsetDateTime::now_utc() + time::Duration::days(1);
    let (stolen_from, judge, region) = match side {
        Side::Origin => (&origin, &replica, REPLICA_REGION),
        Side::Replica => (&replica, &origin, ORIGIN_REGION),
    };
    let stolen = stolen_from.issue(&issuer);
    stolen_from.put_pair(&stolen);
    judge.put("crl.pem", &issuer.revoke(&[], tomorrow).unwrap(), 0o644);
    other_than(side, &mut pair).options.crl = Some(judge.dir.join("crl.pem"));
    other_than(side, &mut pair).write_config();
    following(&mut pair).await;
    let own = ends_of(&judge.dir.join(format!("{region}.pem")));
    let ends = [("own", own), ("ca", ends_of(&judge.dir.join("ca.pem"))), ("crl", tomorrow.unix_timestamp())];
    ends_are_told(other_than(side, &mut pair), ends).await;
    judge.put("crl.pem", &issuer.revoke(&[&stolen], tomorrow).unwrap(), 0o644);
    reloaded(other_than(side, &mut pair), 1).await;
    let since = Instant::now();
    let told = "reason=the peer's certificate is refused: it is revoked";
    let log = other_than(side, &mut pair).log_path();
    let cut = async || {
        let log = fs::read_to_string(&log).unwrap();
        log.lines().any(|line| line.contains("a connection is cut") && line.contains(told)).then_some(())
    };
    until("the live stream to be cut", PATIENCE, cut).await;
    assert!(since.elapsed() < CUT_WITHIN, "it took {:?}", since.elapsed());
    let refused = |link: &Value| link["reason"].as_str().is_some_and(|reason| reason.contains("revoked"));
    pair.origin_sidecar.wait_for(LINK, "its certificate to be refused", refused).await;
    let waiting = writes(&pair, 1).await;
    stolen_from.put_pair(&stolen_from.issue(&issuer));
    pair.wait_applied(waiting).await;
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_list_by_which_everybody_would_be_refused_is_refused_and_the_last_one_stays_in_use() {
    let (mut pair, issuer, [_, files]) = prepared().await;
    let (now, day) = (OffsetDateTime::now_utc(), time::Duration::days(1));
    let list = |issuer: &Issuer, ends| issuer.revoke(&[], ends).unwrap();
    let put = |content: String| files.put("crl.pem", &content, 0o644);
    put(list(&issuer, now + day));
    pair.replica_sidecar.options.crl = Some(files.dir.join("crl.pem"));
    pair.replica_sidecar.write_config();
    following(&mut pair).await;
    let (namesake, next) = (Issuer::new("etcd-ferry development CA").unwrap(), Issuer::new("the next CA").unwrap());
    let bad = [
        ("is not signed by it", list(&namesake, now + day)),
        ("is out of date since", list(&issuer, now - day)),
        ("holds no revocation list of the CA", list(&next, now + day)),
    ];
    for (nth, (words, content)) in bad.into_iter().enumerate() {
        put(content);
        let told = |c: &Value| c["refused"].as_str().is_some_and(|reason| reason.contains(words));
        certificates(&pair.replica_sidecar, words, told).await;
        let checked = pair.replica_sidecar.admin(&["check"]);
        let said = String::from_utf8(checked.stderr).unwrap();
        assert!(checked.status.code() == Some(2) && said.contains("tls.crl: ") && said.contains(words), "{said}");
        // Who dials anew is judged by the last one.
        pair.proxy.cut();
        pair.proxy.heal();
        let last = writes(&pair, 1).await;
        pair.wait_applied(last).await;
        put([list(&issuer, now + day), list(&next, now + day)].concat());
        reloaded(&pair.replica_sidecar, nth as u64 + 1).await;
    }
    // The next CA, whose list is there, and then a pair of it.
    files.put_ca(&[&issuer, &next]);
    reloaded(&pair.replica_sidecar, 4).await;
    let last = writes(&pair, 2).await;
    pair.wait_applied(last).await;
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_who_is_revoked_is_cut_off_the_status_that_they_watch_and_not_let_in_again() {
    let (mut pair, issuer, [origin, _]) = prepared().await;
    let tomorrow = OffsetDateTime::now_utc() + time::Duration::days(1);
    origin.put("crl.pem", &issuer.revoke(&[], tomorrow).unwrap(), 0o644);
    pair.origin_sidecar.options.crl = Some(origin.dir.join("crl.pem"));
    pair.origin_sidecar.write_config();
    let operators = |pair: &KeyPair| {
        origin.put("admin.pem", &pair.cert_pem, 0o644);
        origin.put("admin.key", &pair.key_pem, 0o600);
    };
    let stolen = issuer.issue(&IssueRequest::admin()).unwrap();
    operators(&stolen);
    following(&mut pair).await;
    let connection = connection_to(&pair.origin_sidecar);
    let mut watched = client::Statuses::open(&connection, 100).await.unwrap();
    watched.next().await.unwrap();

    origin.put("crl.pem", &issuer.revoke(&[&stolen], tomorrow).unwrap(), 0o644);
    reloaded(&pair.origin_sidecar, 1).await;

    let cut = async { while watched.next().await.is_ok() {} };
    tokio::time::timeout(CUT_WITHIN, cut).await.expect("who is revoked is told the status no more");
    let refused = client::status(&connection).await.unwrap_err().to_string();
    assert!(refused.contains("no mutual trust with the sidecar"), "{refused}");
    for words in ["a connection was refused", "it is revoked"] {
        pair.origin_sidecar.wait_for_log(words).await;
    }
    operators(&issuer.issue(&IssueRequest::admin()).unwrap());
    client::status(&connection).await.unwrap();
}

/// Kubernetes mounts a secret as links into a folder that a link names, and swaps that link.
#[tokio::test(flavor = "multi_thread")]
async fn a_swapped_link_is_a_new_pair() {
    let (mut pair, issuer, [files, _]) = prepared().await;
    let names = [format!("{ORIGIN_REGION}.pem"), format!("{ORIGIN_REGION}.key"), "ca.pem".to_owned()];
    let data = |version: &str| files.dir.join(format!("..{version}"));
    let mount = |version: &str, content: &KeyPair| {
        let there = data(version);
        fs::create_dir(&there).unwrap();
        for (name, text) in names.iter().zip([&content.cert_pem[..], &content.key_pem, issuer.ca_pem()]) {
            fs::write(there.join(name), text).unwrap();
            fs::set_permissions(there.join(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        swap(&files.dir, &there);
    };
    mount("1", &files.issue(&issuer));
    for name in &names {
        fs::remove_file(files.dir.join(name)).unwrap();
        symlink(Path::new("..data").join(name), files.dir.join(name)).unwrap();
    }
    following(&mut pair).await;
    let before = streams(&pair);
    mount("2", &files.issue(&issuer));
    reloaded(&pair.origin_sidecar, 1).await;
    let last = writes(&pair, 1).await;
    pair.wait_applied(last).await;
    assert_eq!(streams(&pair), before);
    pair.assert_equal().await;
}

fn swap(dir: &Path, to: &Path) {
    let (new, old) = (dir.join("..data_tmp"), dir.join("..data"));
    symlink(to.file_name().unwrap(), &new).unwrap();
    fs::rename(new, old).unwrap();
}

/// etcd itself takes new certificates at a restart; the sidecar takes its own then, from the same places.
#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_comes_back_with_another_ca_is_reached_with_what_is_in_the_files_then() {
    let dir = tempfile::tempdir().unwrap();
    let certs = dir.path().join("etcd");
    let origin = EtcdOptions { tls: Some(etcd_tls(&certs)), ..EtcdOptions::origin() };
    let mut pair = Box::pin(Pair::start(PairOptions { origin, ..PairOptions::default() })).await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;
    fs::remove_dir_all(&certs).unwrap();
    etcd_tls(&certs);
    pair.origin.restart().await;
    let last = writes(&pair, 1).await;
    pair.wait_applied(last).await;
    pair.assert_equal().await;
}

/// A pair and a CA for etcd that only the sidecar has, so that etcd itself starts whatever is in them.
async fn with_files_for_etcd(dir: &Path) -> (Pair, EtcdTls) {
    let tls = etcd_tls(&dir.join("etcd"));
    let origin = EtcdOptions { tls: Some(tls.clone()), ..EtcdOptions::origin() };
    let mut pair = Box::pin(Pair::prepare(PairOptions { origin, ..PairOptions::default() })).await;
    let own = dir.join("sidecar");
    fs::create_dir(&own).unwrap();
    let copy = |file: &Path| {
        let to = own.join(file.file_name().unwrap());
        fs::copy(file, &to).unwrap();
        to
    };
    let copied = EtcdTls { ca: copy(&tls.ca), cert: copy(&tls.cert), key: copy(&tls.key), ..tls };
    pair.origin_sidecar.options.etcd.tls = Some(copied.clone());
    pair.origin_sidecar.write_config();
    (pair, copied)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_for_etcd_that_is_not_sound_is_refused_and_etcd_is_reached_with_the_last_one() {
    let dir = tempfile::tempdir().unwrap();
    let (mut pair, files) = with_files_for_etcd(dir.path()).await;
    following(&mut pair).await;
    let good = fs::read_to_string(&files.key).unwrap();
    let stranger = etcd_tls(&dir.path().join("stranger"));
    fs::copy(&stranger.key, &files.key).unwrap();
    let told = |c: &Value| c["refused"].as_str().is_some_and(|reason| reason.contains("is not the key of"));
    certificates(&pair.origin_sidecar, "a key of another certificate to be refused", told).await;
    let (_, metrics) = pair.origin_sidecar.http("/metrics").await;
    assert!(metrics.contains("\netcd_ferry_certificates_refused 1\n"), "{metrics}");
    // Every connection to it is made anew.
    pair.origin.restart().await;
    let last = writes(&pair, 1).await;
    pair.wait_applied(last).await;

    fs::write(&files.key, good).unwrap();
    reloaded(&pair.origin_sidecar, 0).await;
    let issuer = Issuer::load(&dir.path().join("etcd/ca.pem"), &dir.path().join("etcd/ca.key")).unwrap();
    let next = issuer.issue(&IssueRequest::region("etcd")).unwrap();
    fs::write(&files.cert, &next.cert_pem).unwrap();
    fs::write(&files.key, &next.key_pem).unwrap();
    reloaded(&pair.origin_sidecar, 1).await;
    let ca = dir.path().join("etcd/ca.pem");
    ends_are_told(&pair.origin_sidecar, [("etcd", ends_of(&files.cert)), ("etcd_ca", ends_of(&ca))]).await;
    pair.origin.restart().await;
    let last = writes(&pair, 2).await;
    pair.wait_applied(last).await;
    pair.assert_equal().await;
}
