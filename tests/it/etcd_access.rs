//! Job: etcds that ask who is there: TLS with client certificates, users whose rights are just enough, rights and logins that go and come.
//! Input: pairs of regions whose etcds use TLS or users. Output: passes or fails.
//! Always true: the rights that are granted here are those that docs/operating.md states; what is missing is named in the status.

use crate::bed::etcd::{Access, Etcd, EtcdOptions, EtcdTls};
use crate::bed::pair::{LINK, LINK_BACK, Pair, PairOptions, REPLICA_REGION, link_name};
use crate::bed::sidecar::{Sidecar, make_certificates};
use crate::bed::traffic::{Traffic, TrafficOptions};
use crate::bed::{PATIENCE, until};
use crate::resume::spool_dir;
use bytes::Bytes;
use etcd_client::{DeleteOptions, KvClient, Permission, PermissionType, RoleRevokePermissionOptions};
use etcd_ferry::config::EtcdConfig;
use etcd_ferry::etcd::{Columns, EtcdError, Txn};
use etcd_ferry::model::{KeyRange, Revision};
use etcd_ferry::tls::EtcdFiles;
use serde_json::Value;
use std::path::Path;

const USER: &str = "ferry";
const PASSWORD: &str = "ferry-password";

/// A pair of a CA of its own, as an operator's etcd has it.
pub fn etcd_tls(dir: &Path) -> EtcdTls {
    make_certificates(dir, &["etcd"]);
    let file = |name: &str| dir.join(name);
    EtcdTls { ca: file("ca.pem"), cert: file("etcd.pem"), key: file("etcd.key"), client_certificates: true }
}

#[tokio::test]
async fn a_link_between_etcds_that_ask_for_client_certificates_follows() {
    let dir = tempfile::tempdir().unwrap();
    let with_tls =
        |name: &str, options: EtcdOptions| EtcdOptions { tls: Some(etcd_tls(&dir.path().join(name))), ..options };
    let options = PairOptions {
        origin: with_tls("origin", EtcdOptions::origin()),
        replica: with_tls("replica", EtcdOptions::replica()),
        ..PairOptions::default()
    };
    let pair = Box::pin(Pair::start(options)).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    let options = TrafficOptions { writes_per_writer: 50, ..TrafficOptions::default() };
    let acknowledged = Traffic::start(&pair.origin.access(), &options).finish().await;
    pair.wait_applied(acknowledged.last().unwrap().revision).await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
}

#[tokio::test]
async fn an_etcd_that_does_not_trust_the_sidecar_or_is_not_trusted_by_it_is_said_to_be_so() {
    let dir = tempfile::tempdir().unwrap();
    let origin = EtcdOptions { tls: Some(etcd_tls(&dir.path().join("origin"))), ..EtcdOptions::origin() };
    let mut pair = Box::pin(Pair::prepare(PairOptions { origin, ..PairOptions::default() })).await;
    let good = pair.origin_sidecar.options.etcd.tls.clone();
    let stranger = etcd_tls(&dir.path().join("stranger"));
    // The sidecar's CA is not that of this etcd.
    pair.origin_sidecar.options.etcd.tls = Some(stranger.clone());
    pair.origin_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    wait_for_reason(&pair.origin_sidecar, LINK, "the origin's etcd: etcd cannot be reached at https://").await;
    wait_for_reason(&pair.origin_sidecar, LINK, "; check [etcd] ca and endpoints").await;
    // This etcd does not know the CA of the sidecar's certificate.
    let ca = good.clone().unwrap().ca;
    pair.origin_sidecar.options.etcd.tls = Some(EtcdTls { ca, ..stranger });
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    wait_for_reason(&pair.origin_sidecar, LINK, "it refuses our client certificate").await;
    // It shows none at all, and then dials without TLS.
    let config = std::fs::read_to_string(pair.origin_sidecar.config_path()).unwrap();
    let without_pair = |line: &&str| !(line.starts_with("cert = ") || line.starts_with("key = "));
    let (etcd, rest) = config.split_once("[listen]").unwrap();
    let etcd: Vec<&str> = etcd.lines().filter(without_pair).collect();
    std::fs::write(pair.origin_sidecar.config_path(), format!("{}\n[listen]{rest}", etcd.join("\n"))).unwrap();
    pair.origin_sidecar.restart().await;
    wait_for_reason(&pair.origin_sidecar, LINK, "set [etcd] cert and key").await;
    pair.origin_sidecar.options.etcd.tls = None;
    pair.origin_sidecar.options.etcd.url = pair.origin.url().replace("https://", "http://");
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    wait_for_reason(&pair.origin_sidecar, LINK, "it speaks https:// where http:// is written").await;

    pair.origin_sidecar.options.etcd.url = pair.origin.url();
    pair.origin_sidecar.options.etcd.tls = good;
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    assert_carries(&pair, "/app/a").await;
}

async fn wait_for_reason(sidecar: &Sidecar, link: &str, words: &str) -> Value {
    let says = |entry: &Value| entry["reason"].as_str().is_some_and(|reason| reason.contains(words));
    sidecar.wait_for(link, &format!("the reason {words:?}"), says).await
}

async fn assert_carries(pair: &Pair, key: &str) {
    let put = pair.origin.put(key, "value").await;
    pair.wait_applied(put).await;
    assert_eq!(pair.replica.get(key).await, Some(Bytes::from_static(b"value")));
}

fn app() -> KeyRange {
    KeyRange::prefix(b"/app/")
}

/// What the one watch of a link over `/app/` covers, as docs/operating.md states it: not asked of the code that is to keep to it.
fn watched() -> KeyRange {
    KeyRange { from: Bytes::from_static(b"/app/"), to: Bytes::from_static(b"/etcd-ferry/v1/links0") }
}

/// One key alone.
fn key(key: &Bytes) -> KeyRange {
    KeyRange { from: key.clone(), to: Bytes::from([key, &[0][..]].concat()) }
}

/// At an origin: one range read for the watch, which covers the prefixes and `/etcd-ferry/v1/links/`; write of the link's own folder.
fn rights_at_origin() -> Vec<(PermissionType, KeyRange)> {
    vec![(PermissionType::Read, watched()), (PermissionType::Write, KeyRange::prefix(&link_name(LINK).folder()))]
}

/// At a replica: the prefixes and the link's position.
fn rights_at_replica() -> Vec<(PermissionType, KeyRange)> {
    vec![(PermissionType::Readwrite, app()), (PermissionType::Readwrite, key(&link_name(LINK).position_key()))]
}

fn as_user(sidecar: &mut Sidecar) {
    sidecar.options.etcd.user = Some((USER.into(), PASSWORD.into()));
    sidecar.write_config();
}

/// Both etcds with users on, both sidecars as a user who has these rights, `/app/` with a few keys at the origin.
async fn with_rights(
    at_origin: &[(PermissionType, KeyRange)],
    at_replica: &[(PermissionType, KeyRange)],
    extra: &[&str],
) -> Pair {
    let extra: Vec<String> = extra.iter().map(|flag| (*flag).to_owned()).collect();
    let options = PairOptions {
        origin: EtcdOptions { auth: true, extra: extra.clone(), ..EtcdOptions::origin() },
        replica: EtcdOptions { auth: true, extra, ..EtcdOptions::replica() },
        prefixes: vec!["/app/".into()],
        ..PairOptions::default()
    };
    let mut pair = Box::pin(Pair::prepare(options)).await;
    for i in 0..100 {
        pair.origin.put(format!("/app/copied/{i}"), "1").await;
    }
    pair.origin.add_user(USER, PASSWORD, at_origin).await;
    pair.replica.add_user(USER, PASSWORD, at_replica).await;
    as_user(&mut pair.origin_sidecar);
    as_user(&mut pair.replica_sidecar);
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair
}

async fn grant(etcd: &Etcd, (kind, range): &(PermissionType, KeyRange)) {
    let permission = Permission::new(*kind, range.etcd_from()).with_range_end(range.etcd_end());
    etcd.client().await.role_grant_permission(USER, permission).await.unwrap();
}

async fn revoke(etcd: &Etcd, (_, range): &(PermissionType, KeyRange)) {
    let options = RoleRevokePermissionOptions::new().with_range_end(range.etcd_end());
    etcd.client().await.role_revoke_permission(USER, range.etcd_from(), Some(options)).await.unwrap();
}

#[tokio::test]
async fn users_with_just_the_rights_that_the_manual_states_carry_copies_revisions_and_range_deletes() {
    let pair = Box::pin(with_rights(&rights_at_origin(), &rights_at_replica(), &[])).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    let options = TrafficOptions { prefix: "/app/".into(), writes_per_writer: 50, ..TrafficOptions::default() };
    let acknowledged = Traffic::start(&pair.origin.access(), &options).finish().await;
    let head = pair.origin.put("/app/last", "1").await;
    pair.wait_applied(head).await;
    let mut kv = pair.origin.kv().await;
    kv.delete("/app/", Some(DeleteOptions::new().with_prefix())).await.unwrap();
    assert_carries(&pair, "/app/after-the-range-delete").await;
    assert_eq!(pair.assert_equal().await, 1);
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
    let waymark = pair.origin.get(link_name(LINK).waymark_key().to_vec()).await;
    assert!(waymark.is_some(), "the waymark was written with the user's right");
}

#[tokio::test]
async fn a_right_that_the_origins_user_lacks_is_named_and_granted_later_it_goes_on_by_itself() {
    let rights = rights_at_origin();
    let pair = Box::pin(with_rights(&[], &rights_at_replica(), &[])).await;
    let folder = "/etcd-ferry/v1/links/config/";
    wait_for_reason(&pair.origin_sidecar, LINK, &format!("needs the right to read the prefix {folder}")).await;
    // The parts of the range do not make the whole: etcd looks for one right that covers a watch.
    grant(&pair.origin, &(PermissionType::Read, app())).await;
    grant(&pair.origin, &(PermissionType::Read, KeyRange::prefix(b"/etcd-ferry/v1/links/"))).await;
    wait_for_reason(&pair.origin_sidecar, LINK, &format!("needs the right to write the prefix {folder}")).await;
    assert_eq!(pair.replica.read_all().await.1.len(), 0);
    grant(&pair.origin, &rights[1]).await;
    let words = "needs the right to read all of [/app/, /etcd-ferry/v1/links0), as one range";
    wait_for_reason(&pair.origin_sidecar, LINK, words).await;
    grant(&pair.origin, &rights[0]).await;
    assert_carries(&pair, "/app/a").await;
    let well = |entry: &serde_json::Value| entry["state"] == "following" && entry["reason"] == "";
    pair.origin_sidecar.wait_for(LINK, "the link to follow with nothing in its way", well).await;
}

#[tokio::test]
async fn while_the_watch_may_not_be_opened_commands_are_answered_with_and_without_a_stream() {
    let rights = rights_at_origin();
    let mut pair = Box::pin(with_rights(&rights, &rights_at_replica(), &[])).await;
    assert_carries(&pair, "/app/a").await;
    pair.origin_sidecar.stop().await;
    std::fs::remove_dir_all(spool_dir(&pair)).unwrap();
    grant(&pair.origin, &(PermissionType::Read, app())).await;
    grant(&pair.origin, &(PermissionType::Read, KeyRange::prefix(b"/etcd-ferry/v1/links/"))).await;
    revoke(&pair.origin, &rights[0]).await;
    pair.origin_sidecar.restart().await;
    let words = "needs the right to read all of [/app/, /etcd-ferry/v1/links0), as one range";
    wait_for_reason(&pair.origin_sidecar, LINK, words).await;
    let logged = async |pair: &Pair, words: &str| {
        until(words, PATIENCE, async || pair.origin_sidecar.log().contains(words).then_some(())).await;
    };
    logged(&pair, "the origin's watch did not open").await;
    let asked = pair.origin_sidecar.admin(&["resync", LINK]);
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    logged(&pair, "base copy link=config reason=an operator asked for it").await;
    let asked = pair.origin_sidecar.admin(&["verify", LINK]);
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(said.contains("the base copy is not over at the replica"), "{said}");
    wait_for_reason(&pair.origin_sidecar, LINK, words).await;
    grant(&pair.origin, &rights[0]).await;
    assert_carries(&pair, "/app/b").await;
}

#[tokio::test]
async fn a_right_that_the_replicas_user_lacks_is_named_at_both_ends_and_granted_later_it_goes_on_by_itself() {
    let rights = rights_at_replica();
    let pair = Box::pin(with_rights(&rights_at_origin(), &[], &[])).await;
    let position = link_name(LINK).position_key();
    let words = format!("needs the right to read {}", position.escape_ascii());
    wait_for_reason(&pair.origin_sidecar, LINK, &words).await;
    wait_for_reason(&pair.replica_sidecar, LINK, &words).await;
    grant(&pair.replica, &rights[1]).await;
    wait_for_reason(&pair.origin_sidecar, LINK, "needs the right to read the link's prefixes").await;
    grant(&pair.replica, &(PermissionType::Read, app())).await;
    let words = "needs the right to read and write the link's prefixes and its position under /etcd-ferry/v1/links/";
    wait_for_reason(&pair.replica_sidecar, LINK, words).await;
    wait_for_reason(&pair.origin_sidecar, LINK, words).await;
    grant(&pair.replica, &rights[0]).await;
    assert_carries(&pair, "/app/a").await;
    // While it follows, a right goes and comes.
    revoke(&pair.replica, &rights[0]).await;
    let put = pair.origin.put("/app/b", "1").await;
    wait_for_reason(&pair.replica_sidecar, LINK, words).await;
    wait_for_reason(&pair.origin_sidecar, LINK, words).await;
    grant(&pair.replica, &rights[0]).await;
    pair.wait_applied(put).await;
    pair.origin_sidecar.wait_for(LINK, "no reason any more", |entry| entry["reason"] == "").await;
    pair.assert_equal().await;
}

#[tokio::test]
async fn a_wrong_password_is_said_to_be_so() {
    let mut pair = Box::pin(with_rights(&rights_at_origin(), &rights_at_replica(), &[])).await;
    pair.origin_sidecar.options.etcd.user = Some((USER.into(), "another".into()));
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    let entry = wait_for_reason(&pair.origin_sidecar, LINK, "the origin's etcd: etcd does not accept the login").await;
    let reason = entry["reason"].as_str().unwrap();
    assert!(
        reason.contains("authentication failed") && reason.contains("see [etcd] username and password_file"),
        "{entry:#}"
    );
    as_user(&mut pair.origin_sidecar);
    pair.origin_sidecar.restart().await;
    assert_carries(&pair, "/app/a").await;
}

#[tokio::test]
async fn logins_that_expire_on_an_idle_link_or_with_a_restart_of_etcd_are_renewed() {
    let mut pair = Box::pin(with_rights(&rights_at_origin(), &rights_at_replica(), &["--auth-token-ttl=1"])).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = pair.record().await;
    for round in 0..2 {
        // Nobody uses the applier's login meanwhile, and etcd forgets it after a second.
        let (since, expired) = (tokio::time::Instant::now(), std::time::Duration::from_secs(3));
        until("logins to expire", PATIENCE, async || (since.elapsed() > expired).then_some(())).await;
        assert_carries(&pair, &format!("/app/after-expiry-{round}")).await;
    }
    pair.replica.kill();
    let put = pair.origin.put("/app/while-down", "1").await;
    pair.replica.restart().await;
    pair.wait_applied(put).await;
    pair.origin.kill();
    pair.origin.restart().await;
    assert_carries(&pair, "/app/after-restarts").await;
    let recording = pair.recorded(recorder).await;
    assert!(recording.check().unwrap() >= 4);
}

#[tokio::test]
async fn users_switched_off_and_on_again_mid_run_lose_nothing() {
    let mut pair = Box::pin(with_rights(&rights_at_origin(), &rights_at_replica(), &[])).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    for round in 0..2 {
        let etcd = if round == 0 { &pair.origin } else { &pair.replica };
        etcd.client().await.auth_disable().await.unwrap();
        // Nobody can log in while users are off, and before 3.5.10 etcd refuses the token of who had.
        let off = Access { user: None, ..etcd.access() };
        let (mut origin, mut replica) = match round {
            0 => (off.kv().await, pair.replica.kv().await),
            _ => (pair.origin.kv().await, off.kv().await),
        };
        carries_with(&mut origin, &mut replica, &format!("/app/off-{round}")).await;
        if round == 0 {
            pair.origin_sidecar.restart().await;
        } else {
            pair.replica_sidecar.restart().await;
        }
        carries_with(&mut origin, &mut replica, &format!("/app/off-{round}-restarted")).await;
        off.client().await.auth_enable().await.unwrap();
        assert_carries(&pair, &format!("/app/on-{round}")).await;
    }
    pair.origin_sidecar.wait_for(LINK, "no reason any more", |entry| entry["reason"] == "").await;
    pair.assert_equal().await;
}

async fn carries_with(origin: &mut KvClient, replica: &mut KvClient, key: &str) {
    origin.put(key, "value", None).await.unwrap();
    let there = async || (!replica.get(key, None).await.ok()?.kvs().is_empty()).then_some(());
    until(&format!("{key} at the replica"), PATIENCE, there).await;
}

#[tokio::test]
async fn a_link_both_ways_needs_both_sets_of_rights_at_both_ends() {
    let options = PairOptions {
        origin: EtcdOptions { auth: true, ..EtcdOptions::origin() },
        replica: EtcdOptions { auth: true, ..EtcdOptions::replica() },
        prefixes: vec!["/app/".into()],
        both_ways: true,
        ..PairOptions::default()
    };
    let mut pair = Box::pin(Pair::prepare(options)).await;
    let (there, back) = (link_name(LINK), link_name(LINK_BACK));
    for (etcd, folder, position) in
        [(&pair.origin, there.folder(), back.position_key()), (&pair.replica, back.folder(), there.position_key())]
    {
        let rights = [
            (PermissionType::Read, watched()),
            (PermissionType::Readwrite, app()),
            (PermissionType::Write, KeyRange::prefix(&folder)),
            (PermissionType::Write, key(&position)),
        ];
        etcd.add_user(USER, PASSWORD, &rights).await;
    }
    as_user(&mut pair.origin_sidecar);
    as_user(&mut pair.replica_sidecar);
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.replica_sidecar.wait_for_state(LINK_BACK, "following").await;
    assert_carries(&pair, "/app/there").await;
    let put = pair.replica.put("/app/back", "1").await;
    crate::bed::pair::wait_applied(&pair.origin, LINK_BACK, put, PATIENCE).await;
    pair.wait_equal().await;
    assert_eq!(pair.replica_sidecar.options.region, REPLICA_REGION);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_refuses_the_answers_of_another_cluster_at_its_old_place() {
    let mut etcd = Box::pin(Etcd::start(EtcdOptions::origin())).await;
    let config = EtcdConfig { endpoints: vec![etcd.url()], ..EtcdConfig::default() };
    let connection = etcd_ferry::etcd::Etcd::connect(&config, &EtcdFiles::default()).await.unwrap();
    let before = connection.look(b"/a").await.unwrap().cluster;

    etcd.replace().await;

    // The connection below is made anew by itself.
    let refused = until("an answer at the old place", PATIENCE, async || match connection.look(b"/a").await {
        Err(EtcdError::OtherCluster { was, is }) => Some((was, is)),
        Err(_) => None,
        Ok(_) => panic!("another cluster's answer is believed"),
    });
    let (was, is) = refused.await;
    assert_eq!(was, before);
    let page = connection.page(&app(), 1, None, Columns::KeysAndValues).await;
    assert!(matches!(page, Err(EtcdError::OtherCluster { .. })), "a page of it is refused too");
    let committed = connection.txn(Txn::new(), "").await;
    assert!(matches!(committed, Err(EtcdError::OtherCluster { .. })), "and what a transaction says");
    let mut watch = connection.watch(&app(), Revision(1), 1 << 20).await.unwrap();
    let watched = watch.next().await;
    assert!(matches!(watched, Err(EtcdError::OtherCluster { .. })), "and what a watch shows");
    let anew = etcd_ferry::etcd::Etcd::connect(&config, &EtcdFiles::default()).await.unwrap();
    assert_eq!(anew.look(b"/a").await.unwrap().cluster, is);
}

#[tokio::test]
async fn a_replicas_user_who_may_not_watch_is_told_which_right_that_takes_and_the_link_goes_on() {
    let pair = Box::pin(with_rights(&rights_at_origin(), &rights_at_replica(), &[])).await;
    assert_carries(&pair, "/app/a").await;
    pair.replica.put("/app/foreign", "by hand").await;
    let said = |entry: &Value| entry["foreign_writes"]["trouble"].as_str().unwrap_or_default().to_owned();
    let words = "needs the right to read all of [/app/, /etcd-ferry/v1/links0), as one range";
    pair.replica_sidecar.wait_for(LINK, "the right to be named", |entry| said(entry).contains(words)).await;
    assert_carries(&pair, "/app/b").await;
    assert_eq!(pair.replica_sidecar.http("/readyz").await.0, 200);
    grant(&pair.replica, &(PermissionType::Read, watched())).await;
    let told = |entry: &Value| entry["foreign_writes"]["keys"] == 1 && said(entry).is_empty();
    pair.replica_sidecar.wait_for(LINK, "the foreign write", told).await;
}
