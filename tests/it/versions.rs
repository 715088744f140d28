//! Job: the gate before etcd: which versions a link goes through, at either end, and what is said of them.
//! Input: pairs whose sidecars see their etcd through a proxy that says another version of the same length. Output: passes or fails.
//! Always true: the etcds are real and sound; only the version that they say is another.

use crate::bed::etcd::Etcd;
use crate::bed::pair::{LINK, Pair, PairOptions, link_name};
use crate::bed::sidecar::Sidecar;
use crate::bed::{PATIENCE, until};
use crate::resume::spool_end;
use bytes::Bytes;
use etcd_ferry::etcd::version;
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// In front of an etcd, which seems to be of another version.
struct Mask {
    address: SocketAddr,
    /// What the etcd says of itself, and what it is to say.
    versions: Arc<Mutex<(String, String)>>,
    task: JoinHandle<()>,
}

impl Drop for Mask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Mask {
    async fn start(etcd: &Etcd) -> Self {
        let version = etcd.client().await.status().await.unwrap().version().to_owned();
        let versions = Arc::new(Mutex::new((version.clone(), version)));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (target, said) = (etcd.address(), versions.clone());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((near, _)) = listener.accept().await else { continue };
                connections.spawn(pass(near, target, said.clone()));
            }
        });
        Self { address, versions, task }
    }

    /// From now on; of the same length, so that nothing else moves. Numbers may begin with zeros.
    fn say(&self, version: &str) {
        let mut versions = self.versions.lock().unwrap();
        assert_eq!(versions.0.len(), version.len(), "{} cannot be taken for {version}", versions.0);
        versions.1 = version.to_owned();
    }

    /// `3.5.01` for 3.5.1, as long as the real one.
    fn say_patch(&self, line: &str, patch: u32) {
        let width = self.versions.lock().unwrap().0.len() - line.len() - 1;
        self.say(&format!("{line}.{patch:0width$}"));
    }

    fn unmask(&self) {
        let mut versions = self.versions.lock().unwrap();
        versions.1 = versions.0.clone();
    }

    /// `fine`, unless the tests run with an older etcd.
    fn real_verdict(&self) -> &'static str {
        version::judge(&self.versions.lock().unwrap().0).as_str()
    }

    fn stand_before(&self, sidecar: &mut Sidecar) {
        sidecar.options.etcd.url = format!("http://{}", self.address);
        sidecar.write_config();
    }
}

/// Both directions of one connection. An answer of etcd's Status is small, and comes in one piece.
async fn pass(near: TcpStream, target: SocketAddr, versions: Arc<Mutex<(String, String)>>) {
    let Ok(far) = TcpStream::connect(target).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let ((mut from_near, mut to_near), (mut from_far, mut to_far)) = (near.into_split(), far.into_split());
    let there = async { tokio::io::copy(&mut from_near, &mut to_far).await.map(|_| ()) };
    let back = async {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let count = from_far.read(&mut bytes).await?;
            if count == 0 {
                return std::io::Result::Ok(());
            }
            let (real, said) = versions.lock().unwrap().clone();
            let places: Vec<usize> = (0..(count + 1).saturating_sub(real.len()))
                .filter(|at| bytes[*at..].starts_with(real.as_bytes()))
                .collect();
            for at in places {
                bytes[at..at + said.len()].copy_from_slice(said.as_bytes());
            }
            to_near.write_all(&bytes[..count]).await?;
        }
    };
    tokio::select! {
        _ = there => {}
        _ = back => {}
    }
}

fn says(words: &'static str) -> impl Fn(&Value) -> bool {
    move |entry| entry["reason"].as_str().is_some_and(|reason| reason.contains(words))
}

/// What `/healthz?full=1` says of the one member, once it says `verdict`.
async fn member(sidecar: &Sidecar, verdict: &str) -> Value {
    until(&format!("a member that is {verdict}"), PATIENCE, async || {
        let member = sidecar.health().await?["etcd"].as_array()?.first()?.clone();
        (member["verdict"] == verdict).then_some(member)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_read_from_an_origin_whose_version_corrupts_until_it_is_upgraded_or_that_is_allowed() {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    let mask = Mask::start(&pair.origin).await;
    mask.stand_before(&mut pair.origin_sidecar);
    mask.say_patch("3.5", 1);
    let first = pair.origin.put("/app/a", "1").await;
    let head = pair.origin.head().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;

    let entry = pair.origin_sidecar.wait_for(LINK, "a refusal", says("which can corrupt its data")).await;
    assert_eq!(entry["state"], "connecting", "{entry:#}");
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains("upgrade it to 3.5.24 or newer") && reason.contains(&mask.address.to_string()), "{reason}");
    let refused = member(&pair.origin_sidecar, "refused").await;
    assert_eq!((&refused["ok"], refused["version"].as_str().unwrap().ends_with('1')), (&Value::Bool(true), true));
    let status = pair.origin_sidecar.status();
    assert_eq!(status["etcd"][0], refused, "status --json says the same");
    let table = String::from_utf8(pair.origin_sidecar.admin(&["status"]).stdout).unwrap();
    assert!(table.contains("(refused): this version can corrupt its data"), "{table}");
    assert_eq!(pair.origin_sidecar.http("/readyz").await.0, 503);
    assert!(pair.origin_sidecar.log().contains("ERROR"), "{}", pair.origin_sidecar.log());
    assert_eq!(pair.position().await, None, "nothing was carried");
    assert_eq!(pair.origin.head().await, head, "nor written, by an election for one");

    mask.unmask();
    pair.wait_applied(first).await;
    member(&pair.origin_sidecar, mask.real_verdict()).await;

    // The danger is known, and the data must out.
    mask.say_patch("3.5", 2);
    pair.origin_sidecar.options.allow_corrupting_versions = true;
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    let allowed = pair.origin.put("/app/b", "1").await;
    pair.wait_applied(allowed).await;
    let told = member(&pair.origin_sidecar, "allowed").await;
    assert!(told["detail"].as_str().unwrap().contains("allow_corrupting_versions"), "{told}");
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_replaced_by_one_whose_version_corrupts_is_written_no_more_until_it_is_another() {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    let mask = Mask::start(&pair.replica).await;
    mask.stand_before(&mut pair.replica_sidecar);
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let first = pair.origin.put("/app/a", "1").await;
    pair.wait_applied(first).await;

    mask.say_patch("3.5", 0);
    // Whoever was connected connects anew.
    pair.replica.restart().await;
    pair.origin.put("/app/b", "1").await;
    pair.replica_sidecar.wait_for(LINK, "a refusal", says("which can corrupt its data")).await;
    let head = pair.replica.head().await;
    let last = pair.origin.put("/app/c", "1").await;
    let told = says("which can corrupt its data");
    pair.origin_sidecar.wait_for(LINK, "the origin to be told why the replica waits", told).await;
    assert_eq!(pair.replica.head().await, head, "nothing was written");

    mask.unmask();
    pair.wait_applied(last).await;
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_loses_watch_events_is_warned_of_and_the_link_follows_all_the_same() {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    let mask = Mask::start(&pair.origin).await;
    mask.stand_before(&mut pair.origin_sidecar);
    mask.say_patch("3.5", 16);
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let first = pair.origin.put("/app/a", "1").await;
    pair.wait_applied(first).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let warned = member(&pair.origin_sidecar, "warned").await;
    assert!(warned["detail"].as_str().unwrap().contains("upgrade it to 3.5.24"), "{warned}");
    let log = pair.origin_sidecar.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("can lose the watch events of deletes")).collect();
    assert!(lines.len() == 1 && lines[0].contains("WARN"), "said once: {lines:?}");
    assert_eq!(pair.origin_sidecar.http("/readyz").await.0, 200, "it is no reason to be taken out of service");
}

/// How often a key was written since it is there.
async fn times_written(etcd: &Etcd, key: Bytes) -> i64 {
    let got = etcd.kv().await.get(key.to_vec(), None).await.unwrap();
    got.kvs().first().map_or(0, |kv| kv.version())
}

/// The origin's head is moved by keys that the link's watch does not show, and the watch is seen to get there.
async fn heads_that_are_covered(pair: &Pair, count: u64) {
    for number in 0..count {
        let head = pair.origin.put(format!("/zzz/{number}"), "no link's").await;
        let covers = |entry: &Value| spool_end(entry).is_some_and(|end| end >= head.0);
        pair.origin_sidecar.wait_for(LINK, "the head to be covered", covers).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_tells_of_progress_too_early_is_shown_a_key_instead_of_being_asked() {
    let prefixes = vec!["/app/".to_owned()];
    let mut pair = Box::pin(Pair::prepare(PairOptions { prefixes, ..PairOptions::default() })).await;
    let mask = Mask::start(&pair.origin).await;
    mask.stand_before(&mut pair.origin_sidecar);
    mask.say_patch("3.5", 7);
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let key = link_name(LINK).progress_key();

    heads_that_are_covered(&pair, 3).await;
    let written = times_written(&pair.origin, key.clone()).await;
    assert!((1..=3).contains(&written), "{written} times for three heads: none for one of its own");

    mask.say_patch("3.5", 8);
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    heads_that_are_covered(&pair, 3).await;
    assert_eq!(times_written(&pair.origin, key).await, written, "a notice is believed, and nothing is written for it");
    let last = pair.origin.put("/app/last", "1").await;
    pair.wait_applied(last).await;
    pair.assert_equal().await;
}
