//! Job: several links in one process, both roles at once, each with ranges of its own.
//! Input: a pair whose sidecars are configured with more links. Output: passes or fails.
//! Always true: what must not cross is looked for in the whole keyspace of the other side.

use crate::bed::contents::{load, noise};
use crate::bed::etcd::{Etcd, EtcdOptions, KeyMap};
use crate::bed::pair::{LINK, Pair, PairOptions, connect, link_name, ranges_of, wait_applied};
use crate::bed::{PATIENCE, until};
use bytes::Bytes;
use etcd_ferry::model::{FERRY_PREFIX, Revision};
use serde_json::Value;

fn over(prefixes: &[&str], exclude: &[&str]) -> PairOptions {
    let quick = |options| EtcdOptions { sync: false, ..options };
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    PairOptions {
        origin: quick(EtcdOptions::origin()),
        replica: quick(EtcdOptions::replica()),
        prefixes: texts(prefixes),
        exclude: texts(exclude),
        ..PairOptions::default()
    }
}

/// One more link, from the pair's origin to its replica or back.
fn add_link(pair: &mut Pair, link: &str, back: bool, options: &PairOptions) {
    let (origin, replica) = (&mut pair.origin_sidecar, &mut pair.replica_sidecar);
    if back {
        connect(&mut replica.options, &mut origin.options, link, &pair.proxy_back, options);
    } else {
        connect(&mut origin.options, &mut replica.options, link, &pair.proxy, options);
    }
    origin.write_config();
    replica.write_config();
}

async fn restart_both(pair: &mut Pair) {
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
}

/// All keys but etcd-ferry's own.
async fn foreign_keys(etcd: &Etcd) -> KeyMap {
    let (_, mut keys) = etcd.read_all().await;
    keys.retain(|key, _| !key.starts_with(FERRY_PREFIX));
    keys
}

async fn ferry_keys(etcd: &Etcd) -> Vec<String> {
    let (_, keys) = etcd.read_all().await;
    let ferry = keys.into_keys().filter(|key| key.starts_with(FERRY_PREFIX));
    ferry.map(|key| String::from_utf8(key.to_vec()).unwrap()).collect()
}

const CARRIED_THERE: [&str; 6] = ["/app/a", "/app/secrets", "/db/a", "/sys/a", "/sys/z", "/sys/tmpfile"];
const CARRIED_BACK: [&str; 2] = ["/back/a", "/notes/a"];
const NOT_CARRIED: [&str; 8] =
    ["/app", "/app/secret/a", "/db/cache/a", "/db0", "/other", "/sys/tmp/a", "/back/own/a", "/etc"];

async fn write_everything(etcd: &Etcd, value: &str) -> Revision {
    for key in NOT_CARRIED.iter().chain(&CARRIED_THERE).chain(&CARRIED_BACK) {
        etcd.put(*key, value).await;
    }
    for key in ["/etcd-ferry/", "/etcd-ferry/v1/links/other/thing", "/etcd-ferry/v2"] {
        etcd.put(key, value).await;
    }
    etcd.head().await
}

#[tokio::test]
async fn several_links_in_one_process_carry_their_own_ranges_each_way_and_nothing_else() {
    let mut pair = Box::pin(Pair::prepare(over(&["/app/", "/db/"], &["/app/secret/", "/db/cache/"]))).await;
    add_link(&mut pair, "sys", false, &over(&["/sys/"], &["/sys/tmp/"]));
    add_link(&mut pair, "back", true, &over(&["/back/", "/notes/"], &["/back/own/"]));
    // Before the copies and after them, so that both ways of carrying are tried.
    for key in ["/app/old", "/app/secret/old", "/sys/old", "/sys/tmp/old", "/back/old"] {
        pair.origin.put(key, "of the origin").await;
    }
    pair.replica.put("/notes/old", "of the replica").await;
    pair.replica.put("/app/secret/own", "of the replica").await;
    // The link back must not find a key here that its origin has not.
    pair.replica.put("/back/old", "of the replica").await;
    restart_both(&mut pair).await;
    for (sidecar, link) in
        [(&pair.origin_sidecar, LINK), (&pair.origin_sidecar, "sys"), (&pair.replica_sidecar, "back")]
    {
        sidecar.wait_for_state(link, "following").await;
    }
    write_everything(&pair.origin, "here").await;
    write_everything(&pair.replica, "there").await;
    let last = (
        pair.origin.put("/app/last", "1").await,
        pair.origin.put("/sys/last", "1").await,
        pair.replica.put("/notes/last", "1").await,
    );
    pair.wait_applied(last.0).await;
    wait_applied(&pair.replica, "sys", last.1, PATIENCE).await;
    wait_applied(&pair.origin, "back", last.2, PATIENCE).await;

    // The ranges of the first two links hold what was written there last, at the replica; the others are as each side wrote them.
    let (here, there) = (foreign_keys(&pair.origin).await, foreign_keys(&pair.replica).await);
    for key in NOT_CARRIED {
        assert_eq!(
            (&here[key.as_bytes()][..], &there[key.as_bytes()][..]),
            (&b"here"[..], &b"there"[..]),
            "{key} crossed"
        );
    }
    for key in CARRIED_BACK {
        assert_eq!((&here[key.as_bytes()][..], &there[key.as_bytes()][..]), (&b"there"[..], &b"there"[..]), "{key}");
    }
    for (key, crossed) in [("/app/old", true), ("/sys/old", true), ("/app/secret/old", false), ("/sys/tmp/old", false)]
    {
        assert_eq!(there.contains_key(key.as_bytes()), crossed, "{key}");
    }
    assert_eq!(here[&b"/back/old"[..]], "of the replica");
    assert!(here.contains_key(&b"/notes/old"[..]) && !here.contains_key(&b"/app/secret/own"[..]));
    assert_eq!(there[&b"/app/secret/own"[..]], "of the replica");
}

#[tokio::test]
async fn a_link_over_the_whole_keyspace_carries_everything_but_the_keys_of_etcd_ferry() {
    let mut pair = Box::pin(Pair::prepare(over(&[], &[]))).await;
    let odd = ["/etcd-ferry/", "/etcd-ferry/v1/links/other/thing", "/etcd-ferry/zzz"];
    for key in odd {
        pair.origin.put(key, "1").await;
    }
    pair.origin.put("/etcd-ferry", "1").await;
    restart_both(&mut pair).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    for key in odd {
        pair.origin.put(key, "2").await;
    }
    let last = pair.origin.put("/etcd-ferry0", "2").await;
    pair.wait_applied(last).await;
    assert_eq!(ferry_keys(&pair.replica).await, ["/etcd-ferry/v1/links/config/position"]);
    assert_eq!(foreign_keys(&pair.replica).await, foreign_keys(&pair.origin).await);
    let own = ferry_keys(&pair.origin).await;
    assert_eq!(
        own.len(),
        odd.len() + 3,
        "beside these, the election's key, the applied revision, the waymark: {own:?}"
    );
}

#[tokio::test]
async fn two_links_whose_ranges_overlap_at_a_replica_are_refused_by_name() {
    let mut pair = Box::pin(Pair::prepare(over(&["/app/"], &[]))).await;
    add_link(&mut pair, "narrow", false, &over(&["/app/own/"], &[]));
    // What the configuration says would be refused at once; what the hellos say can only be known then.
    for link in &mut pair.replica_sidecar.options.receive {
        link.prefixes.clear();
    }
    pair.replica_sidecar.write_config();
    for number in 0..20 {
        pair.origin.put(format!("/app/own/{number}"), "1").await;
    }
    restart_both(&mut pair).await;
    let links = [LINK, "narrow"];
    let refused = until("one of the two to follow and the other to be refused", PATIENCE, async || {
        let health = pair.origin_sidecar.health().await?;
        let entry = |link| crate::bed::sidecar::link_of(&health, link);
        let (one, two) = (entry(links[0])?, entry(links[1])?);
        let is_refused = |entry: &Value| entry["reason"].as_str().is_some_and(|reason| reason.contains("overlap"));
        assert!(!(is_refused(&one) && is_refused(&two)), "each refuses the other");
        match (one["state"].as_str()?, two["state"].as_str()?) {
            ("following", _) if is_refused(&two) => Some(1),
            (_, "following") if is_refused(&one) => Some(0),
            _ => None,
        }
    })
    .await;
    let entry = pair.origin_sidecar.wait_for_state(links[refused], "connecting").await;
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains(LINK) && reason.contains("narrow") && reason.contains("prefixes"), "{reason}");
    assert_eq!(pair.replica.position(&link_name(links[refused])).await, None);
}

#[tokio::test]
async fn a_link_back_over_other_ranges_does_not_keep_a_copy_from_mending_and_deleting() {
    let mut pair = Box::pin(Pair::prepare(over(&["/app/"], &[]))).await;
    add_link(&mut pair, "back", true, &over(&["/back/"], &[]));
    // The origin's sidecar does not know from its configuration what the link back brings.
    for link in &mut pair.origin_sidecar.options.receive {
        link.prefixes.clear();
    }
    pair.origin_sidecar.write_config();
    load(&pair.origin, &noise("/app/", 100, 10)).await;
    restart_both(&mut pair).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    pair.replica.put("/app/000001", "other").await;
    pair.replica.put("/app/stray", "1").await;
    assert!(pair.origin_sidecar.admin(&["resync", LINK]).status.success());
    pair.wait_equal().await;
    let ranges = ranges_of(&["/app/".to_owned()], &[]);
    let keys: Vec<Bytes> = pair.replica.read(&ranges, None).await.1.into_keys().collect();
    assert_eq!(keys.len(), 100);
}
