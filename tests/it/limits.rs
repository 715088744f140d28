//! Job: how large a transaction each end takes is found out at the start, compared, and told at both sides before anything is too large.
//! Input: etcds with flags of their own, users with just their rights, pairs of regions. Output: passes or fails.
//! Always true: what is found is held against the flags that the etcds were started with; nothing is too large in any of these tests.

use crate::bed::etcd::{Etcd, EtcdOptions, EtcdTls};
use crate::bed::pair::{LINK, Pair, PairOptions, link_name};
use crate::bed::sidecar::{Sidecar, make_certificates};
use crate::bed::{PATIENCE, until};
use bytes::Bytes;
use etcd_client::{AlarmAction, AlarmOptions, AlarmType, PermissionType};
use etcd_ferry::config::EtcdConfig;
use etcd_ferry::etcd::gate::{ClusterLimits, Gate};
use etcd_ferry::model::KeyRange;
use etcd_ferry::model::limits::TxnLimits;
use etcd_ferry::tls::EtcdFiles;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const BYTES_DEFAULT: u64 = 1_572_864;
const BYTES_ROOM: u64 = 1_576_960;

fn limits(ops: u64, bytes: u64) -> TxnLimits {
    TxnLimits { txn_ops_max: Some(ops), request_bytes_max: Some(bytes) }
}

fn flags(ops: Option<u64>, bytes: Option<u64>) -> EtcdOptions {
    EtcdOptions { max_txn_ops: ops, max_request_bytes: bytes, sync: false, ..EtcdOptions::default() }
}

/// What a gate before these members finds, once all of it is known.
async fn found(config: EtcdConfig) -> ClusterLimits {
    let files = EtcdFiles::load(&config).unwrap();
    let gate = Arc::new(Gate::new(config, watch::channel(Arc::new(files)).1, link_name(LINK).position_key()));
    let (stop, mut found) = (CancellationToken::new(), gate.limits());
    let running = tokio::spawn({
        let (gate, stop) = (gate.clone(), stop.clone());
        async move { gate.run(stop).await }
    });
    let known = |limits: &ClusterLimits| limits.most.txn_ops_max.is_some() && limits.most.request_bytes_max.is_some();
    let limits = *tokio::time::timeout(PATIENCE, found.wait_for(known)).await.expect("limits in time").unwrap();
    stop.cancel();
    running.await.unwrap();
    limits
}

fn before(etcds: &[&Etcd]) -> EtcdConfig {
    EtcdConfig { endpoints: etcds.iter().map(|etcd| etcd.url()).collect(), ..EtcdConfig::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_flags_of_an_etcd_are_found_to_the_last_byte_and_operation_and_nothing_is_proposed_to_it() {
    for (ops, bytes) in
        [(None, None), (Some(1), Some(65_536)), (Some(300), Some(10 << 20)), (Some(20_000), Some(64 << 20))]
    {
        let etcd = Box::pin(Etcd::start(flags(ops, bytes))).await;
        // More than this is enough for anything, and not asked about.
        let wanted = limits(ops.unwrap_or(128).min(8_192), bytes.unwrap_or(BYTES_DEFAULT));
        assert_eq!(found(before(&[&etcd])).await, ClusterLimits { least: wanted, most: wanted });
        let index = etcd.client().await.status().await.unwrap().raft_index();
        found(before(&[&etcd])).await;
        assert_eq!(etcd.client().await.status().await.unwrap().raft_index(), index, "with {ops:?} and {bytes:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_members_with_different_flags_the_least_and_the_most_are_known() {
    let small = Box::pin(Etcd::start(flags(Some(64), Some(2 << 20)))).await;
    let large = Box::pin(Etcd::start(flags(Some(256), Some(1 << 20)))).await;
    let both = found(before(&[&small, &large])).await;
    assert_eq!(both, ClusterLimits { least: limits(64, 1 << 20), most: limits(256, 2 << 20) });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_without_space_tells_its_limits_over_tls_to_a_user_who_may_read_the_position_alone() {
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path(), &["etcd"]);
    let file = |name: &str| dir.path().join(name);
    let tls = EtcdTls { ca: file("ca.pem"), cert: file("etcd.pem"), key: file("etcd.key"), client_certificates: true };
    let options = EtcdOptions { auth: true, tls: Some(tls.clone()), ..flags(Some(32), None) };
    let etcd = Box::pin(Etcd::start(options)).await;
    let position = link_name(LINK).position_key();
    let alone = KeyRange { from: position.clone(), to: Bytes::from([&position[..], &[0]].concat()) };
    etcd.add_user("ferry", "ferry-password", &[(PermissionType::Read, alone)]).await;
    let mut client = etcd.client().await;
    let member = client.member_list().await.unwrap().members()[0].id();
    let mut full = AlarmOptions::new();
    full.with_member(member);
    client.alarm(AlarmAction::Activate, AlarmType::Nospace, Some(full)).await.unwrap();
    client.put("/app/a", "1", None).await.expect_err("there is no space");

    std::fs::write(file("password"), "ferry-password").unwrap();
    let config = EtcdConfig {
        endpoints: vec![etcd.url()],
        ca: Some(tls.ca),
        cert: Some(tls.cert),
        key: Some(tls.key),
        username: Some("ferry".into()),
        password_file: Some(file("password")),
        ..EtcdConfig::default()
    };
    let wanted = limits(32, BYTES_DEFAULT);
    assert_eq!(found(config).await, ClusterLimits { least: wanted, most: wanted });
}

/// Both sides' `limits` in `status`, once they have this verdict.
async fn told(pair: &Pair, verdict: &str) -> [Value; 2] {
    let mut told = Vec::new();
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let what = format!("limits that are {verdict:?}");
        let entry = sidecar.wait_for(LINK, &what, |entry| entry["limits"]["verdict"] == verdict).await;
        told.push(entry["limits"].clone());
    }
    told.try_into().unwrap()
}

async fn metric(sidecar: &Sidecar, value: &str) {
    until(&format!("limits_short to be {value}"), PATIENCE, async || {
        let (_, text) = sidecar.http("/metrics").await;
        let mut lines = text.lines().filter(|line| line.starts_with("etcd_ferry_limits_short{"));
        lines.next().filter(|line| line.ends_with(&format!(" {value}"))).map(|_| ())
    })
    .await;
}

fn pair_of(origin: EtcdOptions, replica: EtcdOptions, request_bytes_max: Option<u64>) -> PairOptions {
    let limits = request_bytes_max.map(|bytes| ("request_bytes_max".to_owned(), bytes)).into_iter().collect();
    PairOptions { origin, replica, limits, ..PairOptions::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_takes_less_is_told_at_both_sides_before_anything_is_too_large_until_it_takes_enough() {
    let options = pair_of(flags(None, None), flags(None, Some(512 << 10)), Some(BYTES_ROOM));
    let mut pair = Box::pin(Pair::start(options)).await;
    let advice = "the replica takes requests of 524288 bytes, the origin of 1572864: a value of more than about 520192 bytes cannot be \
                  carried; raise --max-request-bytes of the replica's etcd to at least 1576960";
    for limits in told(&pair, "short").await {
        let wanted = json!({
            "origin": { "txn_ops_max": 128, "request_bytes_max": BYTES_DEFAULT },
            "replica": { "txn_ops_max": 128, "request_bytes_max": 512 << 10 },
            "verdict": "short",
            "advice": advice,
        });
        assert_eq!(limits, wanted);
    }
    // The link works: nothing is too large yet.
    pair.wait_applied(pair.origin.put("/app/a", "1").await).await;
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        metric(sidecar, "1").await;
        assert!(sidecar.log().lines().any(|line| line.contains("WARN") && line.contains(advice)), "{}", sidecar.log());
        let entry = sidecar.wait_for_state(LINK, "following").await;
        assert_eq!(entry["reason"], "", "the link is ready all the same");
        let table = sidecar.admin(&["status"]);
        let table = String::from_utf8_lossy(&table.stdout).into_owned();
        assert!(table.contains(advice), "{table}");
    }

    pair.replica.set_max_request_bytes(BYTES_ROOM);
    pair.replica.restart().await;
    for limits in told(&pair, "fine").await {
        assert_eq!(limits["replica"]["request_bytes_max"], BYTES_ROOM);
        assert_eq!(limits["advice"], "");
    }
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        metric(sidecar, "0").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn defaults_at_both_ends_are_tight_and_no_alarm() {
    let pair = Box::pin(Pair::start(pair_of(flags(None, None), flags(None, None), None))).await;
    for limits in told(&pair, "tight").await {
        let advice = limits["advice"].as_str().unwrap();
        let both = "raise --max-request-bytes of the replica's etcd, and request_bytes_max in [limits] of the replica's sidecar to at least";
        assert!(advice.contains(both), "{advice}");
    }
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    metric(&pair.origin_sidecar, "0").await;
    assert!(
        !pair.origin_sidecar.log().lines().any(|line| line.contains("WARN") && line.contains("--max-request-bytes"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_is_configured_with_less_than_its_etcd_takes_and_too_few_operations_are_named_apart() {
    let options = pair_of(flags(None, Some(4 << 20)), flags(Some(16), Some(8 << 20)), None);
    let pair = Box::pin(Pair::start(options)).await;
    for limits in told(&pair, "short").await {
        assert_eq!(limits["origin"]["request_bytes_max"], 4 << 20);
        assert_eq!(limits["replica"], json!({ "txn_ops_max": 16, "request_bytes_max": BYTES_DEFAULT }));
        let advice = limits["advice"].as_str().unwrap();
        assert!(
            advice.contains("; raise request_bytes_max in [limits] of the replica's sidecar to at least 4198400; "),
            "{advice}"
        );
        assert!(
            advice.ends_with("applied in parts; raise --max-txn-ops of the replica's etcd to at least 128"),
            "{advice}"
        );
    }
}
