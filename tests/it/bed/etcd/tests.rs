//! Job: the test bed's etcd does what the tests take for granted: reads, kills, restores, rights, TLS, a lost member.
//! Input: real etcds. Output: passes or fails.
//! Always true: each etcd is started and ended by its own test.

use super::*;
use etcd_client::{Txn, TxnOp};

#[tokio::test]
async fn a_read_over_several_pages_has_every_key_of_its_ranges_at_one_revision() {
    let etcd = Etcd::start(EtcdOptions { sync: false, ..EtcdOptions::default() }).await;
    let mut kv = etcd.kv().await;
    for batch in 0..25 {
        let put = |i| TxnOp::put(format!("/app/{batch:02}-{i:03}"), "1", None);
        kv.txn(Txn::new().and_then((0..100).map(put).collect::<Vec<_>>())).await.unwrap();
    }
    let before = etcd.put("/app/00-000", "2").await;
    etcd.put("/app-beside", "1").await;
    etcd.put("/app/00-000", "3").await;
    let ranges = Ranges::new(&[Bytes::from_static(b"/app/")], &[]);
    let (at, keys) = etcd.read(&ranges, Some(before)).await;
    assert_eq!((at, keys.len()), (before, 2_500));
    assert_eq!(keys[&b"/app/00-000"[..]], "2");
}

#[tokio::test]
async fn a_killed_etcd_comes_back_with_its_ports_and_data() {
    let mut etcd = Etcd::start(EtcdOptions::default()).await;
    let url = etcd.url();
    let revision = etcd.put("/app/a", "1").await;
    etcd.kill();
    etcd.restart().await;
    assert_eq!(etcd.url(), url);
    assert_eq!(etcd.head().await, revision);
    assert_eq!(etcd.get("/app/a").await, Some(Bytes::from_static(b"1")));
}

#[tokio::test]
async fn a_restored_etcd_has_its_old_keys_and_the_same_cluster_id() {
    let mut etcd = Etcd::start(EtcdOptions::default()).await;
    let (cluster, saved_at) = (etcd.cluster_id().await, etcd.put("/app/a", "1").await);
    let snapshot = etcd.save_snapshot().await;
    etcd.put("/app/a", "2").await;
    etcd.restore_snapshot(&snapshot).await;
    assert_eq!(etcd.get("/app/a").await, Some(Bytes::from_static(b"1")));
    assert_eq!(etcd.head().await, saved_at);
    assert_eq!(etcd.cluster_id().await, cluster);
}

#[tokio::test]
async fn a_user_can_read_what_its_role_permits_and_no_more() {
    let etcd = Etcd::start(EtcdOptions { auth: true, ..EtcdOptions::default() }).await;
    etcd.put("/app/a", "1").await;
    etcd.add_user("ferry", "pass", &[(PermissionType::Read, KeyRange::prefix(b"/app/"))]).await;
    let access = Access { user: Some(("ferry".into(), "pass".into())), ..etcd.access() };
    let mut kv = access.kv().await;
    assert_eq!(kv.get("/app/a", None).await.unwrap().kvs().len(), 1);
    assert!(kv.get("/other", None).await.is_err());
    assert!(kv.put("/app/a", "2", None).await.is_err());
}

#[tokio::test]
async fn an_etcd_with_tls_serves_who_bears_a_certificate_of_its_ca_and_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let pair = |ca: &str| {
        let certs = dir.path().join(ca);
        crate::bed::sidecar::make_certificates(&certs, &["us-east-1"]);
        let file = |name| certs.join(name);
        EtcdTls {
            ca: file("ca.pem"),
            cert: file("us-east-1.pem"),
            key: file("us-east-1.key"),
            client_certificates: true,
        }
    };
    let tls = pair("its-own");
    let etcd = Etcd::start(EtcdOptions { tls: Some(tls.clone()), ..EtcdOptions::default() }).await;
    etcd.put("/app/a", "1").await;
    let stranger = EtcdTls { ca: tls.ca, ..pair("another") };
    let refused = Access { tls: Some(stranger), ..etcd.access() }.try_client().await;
    let answered = match refused {
        Ok(mut client) => client.get("/app/a", None).await.is_ok(),
        Err(_) => false,
    };
    assert!(!answered);
}

#[tokio::test]
async fn a_cluster_of_three_serves_with_one_member_lost_and_not_with_two() {
    let mut members = Etcd::start_cluster(EtcdOptions::default(), 3).await;
    let mut kv = members[0].kv().await;
    members[2].kill();
    // The lost one may have been the leader.
    until("two of three to serve", PATIENCE, async || kv.put("/app/a", "2", None).await.ok()).await;
    members[1].kill();
    let read = tokio::time::timeout(Duration::from_secs(1), kv.get("/app/a", None)).await;
    assert!(!matches!(read, Ok(Ok(_))), "a linearizable read needs a leader");
    members[1].restart().await;
    assert_eq!(members[1].get("/app/a").await, Some(Bytes::from_static(b"2")));
}
