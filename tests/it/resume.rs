//! Job: where a link goes on after whatever happened: each row of the design's resume table, against the real thing.
//! Input: a pair of regions, outages, lost disks, restored replicas. Output: passes or fails.
//! Always true: a link that could go on without a copy keeps its epoch; at the end both sides are equal, byte for byte.

use crate::bed::checkers::Recording;
use crate::bed::etcd::{Access, Etcd, EtcdOptions};
use crate::bed::pair::{LINK, Pair, PairOptions, link_name, ranges_of};
use crate::bed::recording::Recorder;
use crate::bed::traffic::{Acknowledged, Write, commit};
use crate::bed::{PATIENCE, until};
use etcd_ferry::config::{EtcdConfig, Limits};
use etcd_ferry::etcd::gate::Gate;
use etcd_ferry::model::{Digest, LinkName, Position, Revision};
use etcd_ferry::origin::Clock;
use etcd_ferry::origin::spool::Spool;
use etcd_ferry::origin::tail::{Begins, TailCommand, TailState, TailView};
use etcd_ferry::origin::watch::Tail;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// A pair whose etcds do not sync: these tests write much, and no power is cut.
pub async fn following(options: PairOptions) -> (Pair, Position) {
    let origin = EtcdOptions { sync: false, ..options.origin.clone() };
    let replica = EtcdOptions { sync: false, ..options.replica.clone() };
    let pair = Box::pin(Pair::start(PairOptions { origin, replica, ..options })).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let revision = pair.origin.put("/app/first", "1").await;
    let position = pair.wait_applied(revision).await;
    (pair, position)
}

/// `count` revisions, each with a put of its own key and, now and then, a delete; what was acknowledged, in order.
pub async fn write(access: &Access, prefix: &str, count: usize, value_bytes: usize) -> Vec<Acknowledged> {
    const WRITERS: usize = 16;
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS.min(count) {
        let (access, prefix) = (access.clone(), prefix.to_owned());
        writers.spawn(async move {
            let mut kv = access.kv().await;
            let mut acknowledged = Vec::new();
            for number in (writer..count).step_by(WRITERS) {
                let mut writes = vec![Write::put(format!("{prefix}{number:06}"), noise(number as u64, value_bytes))];
                if number % 10 == 9 && number >= WRITERS {
                    writes.push(Write::delete(format!("{prefix}{:06}", number - WRITERS)));
                }
                acknowledged.extend(commit(&mut kv, &writes).await.unwrap());
            }
            acknowledged
        });
    }
    let mut acknowledged: Vec<Acknowledged> = writers.join_all().await.into_iter().flatten().collect();
    acknowledged.sort_by_key(|ack| ack.revision);
    acknowledged
}

/// Bytes that cannot be compressed.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..bytes).map(|_| step()).collect()
}

pub fn last(acknowledged: &[Acknowledged]) -> Revision {
    acknowledged.last().unwrap().revision
}

/// Waits until the origin's spool says that it holds everything up to `revision`.
pub async fn wait_spooled(pair: &Pair, revision: Revision) {
    let what = format!("the spool to reach {revision}");
    pair.origin_sidecar.wait_for(LINK, &what, |entry| spool_end(entry).is_some_and(|end| end >= revision.0)).await;
}

/// What the origin's spool holds, from `holds revisions after N up to M`: N and M.
pub fn spool_holds(entry: &serde_json::Value) -> Option<(u64, u64)> {
    let stage = entry["stages"].as_array()?.iter().find(|stage| stage["stage"] == "spool")?;
    let (after, end) = stage["detail"].as_str()?.strip_prefix("holds revisions after ")?.split_once(" up to ")?;
    Some((after.parse().ok()?, end.parse().ok()?))
}

pub fn spool_end(entry: &serde_json::Value) -> Option<u64> {
    spool_holds(entry).map(|(_, end)| end)
}

/// The first copy writes the first waymark, and following the second: from then on it is one a minute. Returns its number.
pub async fn second_waymark(origin: &Etcd, limit: Duration) -> u64 {
    let key = link_name(LINK).waymark_key();
    until("the second waymark", limit, async || {
        let json = origin.get(key.to_vec()).await?;
        let waymark: serde_json::Value = serde_json::from_slice(&json).ok()?;
        waymark["counter"].as_u64().filter(|counter| *counter >= 2)
    })
    .await
}

pub fn spool_dir(pair: &Pair) -> PathBuf {
    pair.origin_sidecar.data_dir().join("origin").join(LINK).join("spool")
}

pub fn copy_folder(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_revisions_of_an_outage_come_from_the_spool_though_the_origin_is_compacted_to_its_head() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let recorder = pair.record().await;
    let recorder_at_origin = Recorder::start(&pair.origin).await;
    pair.proxy.cut();
    let acknowledged = write(&pair.origin.access(), "/app/outage/", 20_000, 200).await;
    let head = last(&acknowledged);
    wait_spooled(&pair, head).await;
    let origin = recorder_at_origin.finish(pair.origin.head().await).await;
    pair.origin.compact(pair.origin.head().await).await;
    // Not killed: what has not come to the files yet, on a machine that is busy, would be gone from etcd too.
    pair.origin_sidecar.stop().await;
    pair.origin_sidecar.restart().await;
    wait_spooled(&pair, head).await;

    let healed = Instant::now();
    pair.proxy.heal();
    let after = pair.wait_applied_within(head, Duration::from_secs(60)).await;
    eprintln!("20,000 revisions were caught up {:?} after the link was healed", healed.elapsed());
    assert_eq!(after.epoch, before.epoch, "no new copy");
    assert_eq!(after.seq.0, before.seq.0 + 20_000);
    pair.assert_equal().await;
    let recording = Recording { origin, ..pair.recorded(recorder).await };
    assert_eq!(recording.complete(&acknowledged).unwrap(), 20_000);
    assert!(recording.check().unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_that_starts_after_the_position_gives_way_to_a_watch_from_the_position() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let recorder = pair.record().await;
    pair.origin_sidecar.stop().await;
    let acknowledged = write(&pair.origin.access(), "/app/down/", 300, 100).await;
    std::fs::remove_dir_all(spool_dir(&pair).parent().unwrap()).unwrap();
    pair.origin_sidecar.restart().await;
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 300));
    pair.assert_equal().await;
    let recording = pair.recorded(recorder).await;
    assert_eq!(recording.complete(&acknowledged).unwrap(), 300);
    recording.check().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_spool_whose_revisions_are_compacted_leads_to_a_new_anchor() {
    let (mut pair, before) = following(PairOptions { deletes_share_max: Some(1.0), ..PairOptions::default() }).await;
    let old = write(&pair.origin.access(), "/app/old/", 50, 100).await;
    pair.wait_applied(last(&old)).await;
    pair.origin_sidecar.stop().await;
    commit(&mut pair.origin.kv().await, &[Write::delete_prefix("/app/old/")]).await.unwrap();
    let acknowledged = write(&pair.origin.access(), "/app/down/", 300, 100).await;
    pair.origin.compact(last(&acknowledged)).await;
    std::fs::remove_dir_all(spool_dir(&pair).parent().unwrap()).unwrap();
    pair.origin_sidecar.restart().await;
    let after = pair.wait_applied(last(&acknowledged)).await;
    assert!(after.epoch > before.epoch, "{after:?}");
    pair.wait_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_that_ends_before_the_position_is_dropped_and_the_watch_starts_at_the_position() {
    let (mut pair, before) = following(PairOptions::default()).await;
    pair.origin_sidecar.stop().await;
    let kept = pair.dir().join("spool-of-before");
    copy_folder(&spool_dir(&pair), &kept);
    pair.origin_sidecar.restart().await;
    let some = write(&pair.origin.access(), "/app/some/", 200, 100).await;
    let reached = pair.wait_applied(last(&some)).await;
    pair.origin_sidecar.stop().await;
    copy_folder(&kept, &spool_dir(&pair));
    // What the old spool would watch from is gone; what the position needs is not.
    pair.origin.compact(reached.origin_revision).await;
    let more = write(&pair.origin.access(), "/app/more/", 200, 100).await;
    pair.origin_sidecar.restart().await;
    let after = pair.wait_applied(last(&more)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, reached.seq.0 + 200));
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_replica_cannot_be_reached_tailing_goes_on_from_the_spools_end_also_after_a_restart() {
    let (mut pair, before) = following(PairOptions::default()).await;
    pair.proxy.cut();
    let one = write(&pair.origin.access(), "/app/one/", 100, 100).await;
    wait_spooled(&pair, last(&one)).await;
    pair.origin_sidecar.stop().await;
    let two = write(&pair.origin.access(), "/app/two/", 100, 100).await;
    pair.origin_sidecar.restart().await;
    wait_spooled(&pair, last(&two)).await;
    let three = write(&pair.origin.access(), "/app/three/", 100, 100).await;
    wait_spooled(&pair, last(&three)).await;
    // Until the replica answers, what it had applied before may be counted too; never less than what is missing.
    let counted = |entry: &serde_json::Value| (300..=301).contains(&entry["lag_revisions"].as_u64().unwrap_or(0));
    let entry = pair.origin_sidecar.wait_for(LINK, "lag to be counted", counted).await;
    assert_eq!(entry["state"], "connecting");
    assert!(entry["reason"].as_str().unwrap().contains("cannot be reached"), "{entry}");
    pair.origin.compact(pair.origin.head().await).await;
    pair.proxy.heal();
    let after = pair.wait_applied(last(&three)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, before.seq.0 + 300));
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_restored_during_the_stream_is_caught_up_though_the_origin_is_idle() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let snapshot = pair.replica.save_snapshot().await;
    let some = write(&pair.origin.access(), "/app/some/", 200, 100).await;
    let reached = pair.wait_applied(last(&some)).await;
    pair.replica.restore_snapshot(&snapshot).await;
    let again = pair.wait_applied(last(&some)).await;
    assert_eq!((again.epoch, again.seq), (before.epoch, reached.seq), "the same seqs for the same revisions");
    pair.assert_equal().await;
    pair.replica.restore_snapshot(&snapshot).await;
    let more = write(&pair.origin.access(), "/app/more/", 100, 100).await;
    let after = pair.wait_applied(last(&more)).await;
    assert_eq!((after.epoch, after.seq.0), (before.epoch, reached.seq.0 + 100));
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_position_leads_to_an_anchor_in_an_epoch_that_was_never_used() {
    let (pair, before) = following(PairOptions::default()).await;
    let key = link_name(LINK).position_key();
    pair.replica.kv().await.delete(key.to_vec(), None).await.unwrap();
    let revision = pair.origin.put("/app/second", "2").await;
    let after = pair.wait_applied(revision).await;
    assert!(after.epoch > before.epoch, "{after:?}");
    let revision = pair.origin.put("/app/third", "3").await;
    assert_eq!(pair.wait_applied(revision).await.epoch, after.epoch);
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_position_leads_to_an_epoch_that_was_never_used_also_after_a_restart_of_the_origins_sidecar() {
    let (mut pair, before) = following(PairOptions::default()).await;
    let published = link_name(LINK).applied_key();
    let epoch = format!("\"epoch\":{},", before.epoch);
    until("the epoch to be published at the origin", PATIENCE, async || {
        let value = pair.origin.get(published.to_vec()).await?;
        String::from_utf8_lossy(&value).contains(&epoch).then_some(())
    })
    .await;
    pair.origin_sidecar.stop().await;
    pair.replica.kv().await.delete(link_name(LINK).position_key().to_vec(), None).await.unwrap();
    pair.origin_sidecar.restart().await;
    let revision = pair.origin.put("/app/second", "2").await;
    assert_eq!(pair.wait_applied(revision).await.epoch, before.epoch.next());
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_ranges_lead_to_a_new_epoch_with_an_anchor() {
    let prefixes = vec!["/app/".to_owned(), "/more/".to_owned()];
    let (mut pair, before) = following(PairOptions { prefixes, ..PairOptions::default() }).await;
    pair.origin_sidecar.stop().await;
    let narrower = vec!["/app/".to_owned()];
    pair.origin_sidecar.options.send[0].prefixes.clone_from(&narrower);
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    let not_carried = pair.origin.put("/more/a", "1").await;
    let revision = pair.origin.put("/app/second", "2").await;
    assert!(not_carried < revision);
    let after = pair.wait_applied(revision).await;
    assert_eq!(after.epoch, before.epoch.next());
    assert_ne!(after.ranges_digest, before.ranges_digest);
    assert_eq!(pair.replica.get("/more/a").await, None);
    pair.ranges = ranges_of(&narrower, &[]);
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_origin_cluster_leads_to_a_new_epoch_with_an_anchor_where_the_link_is_to_go_on_with_it() {
    let goes_on = PairOptions { other_history: Some("resync".into()), ..PairOptions::default() };
    let (mut pair, before) = following(goes_on).await;
    pair.origin_sidecar.stop().await;
    let options =
        EtcdOptions { sync: false, extra: vec!["--initial-cluster-token=another".to_owned()], ..EtcdOptions::origin() };
    let other = Box::pin(Etcd::start(options)).await;
    other.put("/app/first", "1 of the other").await;
    let filled = write(&other.access(), "/app/other/", 100, 100).await;
    pair.origin_sidecar.options.etcd = other.access();
    pair.origin_sidecar.write_config();
    pair.origin = other;
    pair.origin_sidecar.restart().await;
    let after = until("an epoch of the other cluster", PATIENCE, async || {
        pair.position().await.filter(|p| p.epoch > before.epoch && p.origin_revision >= last(&filled))
    })
    .await;
    assert_ne!(after.origin_cluster, before.origin_cluster);
    pair.wait_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waymark_and_idle_position_are_written_once_a_minute_and_not_for_etcd_ferrys_own_keys() {
    let prefixes = vec!["/app/".to_owned()];
    let mut quiet = Box::pin(Pair::prepare(PairOptions { prefixes: prefixes.clone(), ..PairOptions::default() })).await;
    quiet.origin.put("/app/first", "1").await;
    quiet.origin_sidecar.restart().await;
    quiet.replica_sidecar.restart().await;
    let started = Instant::now();
    let (busy, _) = following(PairOptions { prefixes, ..PairOptions::default() }).await;
    let link: LinkName = link_name(LINK);
    second_waymark(&quiet.origin, PATIENCE).await;
    second_waymark(&busy.origin, PATIENCE).await;
    let settled = [quiet.origin.head().await, quiet.replica.head().await];
    let recorder = busy.record().await;

    // Writes that the link does not carry, until the idle position has followed them.
    let mut last = Revision(0);
    for number in 0..20 {
        last = busy.origin.put(format!("/elsewhere/{number}"), "x").await;
    }
    busy.wait_applied_within(last, Duration::from_secs(100)).await;
    let seconds = started.elapsed().as_secs();
    assert!(seconds >= 60, "the idle position came after {seconds} s");
    let recording = busy.recorded(recorder).await;
    let positions = recording.replica.revisions.len();
    let waymarks = recording.origin.revisions.values().flatten().filter(|c| *c.key() == link.waymark_key()).count();
    assert!(positions == 1 && waymarks <= 1, "{positions} positions, {waymarks} waymarks in {seconds} s");
    assert_eq!([quiet.origin.head().await, quiet.replica.head().await], settled, "the quiet link wrote in {seconds} s");
}

/// A tail with a spool of its own at this etcd, told to begin after `after`: what came of the watch.
async fn begin_after(etcd: &Etcd, dir: &Path, after: Revision) -> Result<(), TailState> {
    let (ranges, limits) = (ranges_of(&[], &[]), Limits::default());
    let (spool, _) = Spool::open(dir, &limits, Digest::default()).await.unwrap();
    let view =
        TailView { state: TailState::Idle, cluster: None, covered: Revision(0), proven_from: None, ferry_only: 0 };
    let (commands, incoming) = mpsc::channel(1);
    let (_heads, head) = watch::channel(Default::default());
    let (view, _views) = watch::channel(view);
    let (events, _heard) = mpsc::channel(16);
    let tail = Tail {
        link: link_name(LINK),
        etcd: Arc::new(Gate::new(
            EtcdConfig { endpoints: vec![etcd.url()], ..EtcdConfig::default() },
            watch::channel(Arc::default()).1,
            link_name(LINK).waymark_key(),
        )),
        ranges,
        limits,
        spool: Arc::new(spool),
        commands: incoming,
        head,
        reopen: watch::channel(()).1,
        view,
        events,
        clock: Clock::new(),
        seen: None,
        carried: None,
    };
    let stop = CancellationToken::new();
    let running = tokio::spawn(tail.run(stop.clone()));
    let (opened, waiting) = oneshot::channel();
    assert!(
        commands
            .send(TailCommand::Restart { after, carried: None, seen: None, begins: Begins::Afresh, opened })
            .await
            .is_ok()
    );
    let outcome = tokio::time::timeout(PATIENCE, waiting).await.expect("an answer").unwrap();
    stop.cancel();
    running.await.unwrap();
    outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_watch_begins_at_the_revision_to_which_etcd_is_compacted_and_one_right_after_it_does() {
    let etcd = Box::pin(Etcd::start(EtcdOptions::origin())).await;
    let before = etcd.put("/app/a", "1").await;
    let deleted = commit(&mut etcd.kv().await, &[Write::delete("/app/a")]).await.unwrap().unwrap().revision;
    assert_eq!(deleted, before.next());
    etcd.put("/app/b", "1").await;
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(begin_after(&etcd, &dir.path().join("one"), before).await, Ok(()), "nothing is compacted");
    etcd.compact(deleted).await;
    let lost = TailState::Lost { compacted: deleted };
    assert_eq!(begin_after(&etcd, &dir.path().join("two"), before).await, Err(lost), "an old etcd lacks its delete");
    assert_eq!(begin_after(&etcd, &dir.path().join("three"), deleted).await, Ok(()));
    let head = etcd.head().await;
    etcd.compact(head).await;
    assert_eq!(begin_after(&etcd, &dir.path().join("four"), head).await, Ok(()), "nothing is missing after the head");
}
