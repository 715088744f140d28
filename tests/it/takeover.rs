//! Job: the sidecar that ships a link is killed, paused, cut off or stopped: another one ships soon, and nothing is lost, doubled or copied again.
//! Input: regions with several sidecars a side and clusters of one or three members, with writers at the origin. Output: passes or fails.
//! Always true: who ships is judged by the term in the position, what arrived by what the etcds recorded.

use crate::bed::etcd::Etcd;
use crate::bed::pair::{LINK, link_name};
use crate::bed::regions::{Regions, RegionsOptions, RegionsRecorder, TAKEOVER_LIMIT};
use crate::bed::sidecar::ferry;
use crate::bed::traffic::Acknowledged;
use crate::bed::{LinkProxy, PATIENCE, until};
use crate::resume::{last, spool_end, write};
use crate::verify::outcome_of;
use etcd_ferry::model::{Phase, Position, Revision};
use std::time::{Duration, Instant};

/// etcd answers a request that was on its way to a leader that died only after 7 s (5 s and two election time-outs), and the link has one
/// transaction in flight; what comes after that takes its time on a busy machine.
const MEMBER_LOSS_LIMIT: Duration = Duration::from_secs(20);

/// Regions that follow, with something applied.
async fn following(options: RegionsOptions) -> (Regions, Position) {
    let regions = Box::pin(Regions::start(options)).await;
    let revision = regions.origin[0].put("/app/first", "1").await;
    let position = regions.wait_applied(revision).await;
    for standby in 1..regions.origin_sidecars.len() {
        regions.wait_standby(standby).await;
    }
    (regions, position)
}

async fn applied_after(regions: &Regions, before: &Position) -> Position {
    let moved = async || regions.try_position().await.filter(|position| position.seq > before.seq);
    until("the position to move", PATIENCE, moved).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_shipper_is_followed_by_a_standby_within_ten_seconds_again_and_again() {
    let (mut regions, before) = following(RegionsOptions::default()).await;
    let recorder = regions.record().await;
    let traffic = regions.traffic();
    let mut position = before.clone();
    for _ in 0..2 {
        position = applied_after(&regions, &position).await;
        let shipper = regions.shipper().await;
        regions.origin_sidecars[shipper].kill();
        position = regions.wait_taken_over(&position).await;
        regions.origin_sidecars[shipper].restart().await;
        regions.wait_standby(shipper).await;
    }
    regions.judge(recorder, &traffic.stop().await, &before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_shipper_is_followed_by_a_standby_and_stands_by_when_it_wakes() {
    let (regions, before) = following(RegionsOptions::default()).await;
    let recorder = regions.record().await;
    let traffic = regions.traffic();
    let position = applied_after(&regions, &before).await;
    let shipper = regions.shipper().await;
    regions.origin_sidecars[shipper].pause();
    let position = regions.wait_taken_over(&position).await;
    regions.origin_sidecars[shipper].resume();
    regions.wait_standby(shipper).await;
    let after = applied_after(&regions, &position).await;
    assert_eq!(after.term, position.term, "it that woke has not taken the link back");
    regions.judge(recorder, &traffic.stop().await, &before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_that_is_cut_off_from_its_etcd_stops_by_itself_and_another_one_ships() {
    let (regions, before) = following(RegionsOptions::default()).await;
    let recorder = regions.record().await;
    let traffic = regions.traffic();
    let position = applied_after(&regions, &before).await;
    let shipper = regions.shipper().await;
    regions.cut_off_from_etcd(shipper);
    let stops = |entry: &serde_json::Value| entry["role"].is_null();
    let limit = Duration::from_secs(6);
    regions.origin_sidecars[shipper].wait_for_within(LINK, "the shipper to stop by itself", limit, stops).await;
    regions.wait_taken_over(&position).await;
    regions.heal();
    regions.wait_standby(shipper).await;
    regions.judge(recorder, &traffic.stop().await, &before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_that_is_cut_off_from_its_peer_gives_way_to_one_that_is_not() {
    let (regions, before) = following(RegionsOptions::default()).await;
    let recorder = regions.record().await;
    let traffic = regions.traffic();
    let position = applied_after(&regions, &before).await;
    let shipper = regions.shipper().await;
    regions.cut_off_from_peers(shipper);
    regions.wait_taken_over(&position).await;
    regions.wait_standby(shipper).await;
    regions.heal();
    regions.judge(recorder, &traffic.stop().await, &before).await;
}

/// While it is alone it looks at the candidates only once etcd has made a revision.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_that_was_alone_gives_way_to_one_that_has_come_since() {
    let (mut regions, before) = following(RegionsOptions::default()).await;
    let shipper = regions.shipper().await;
    let other = 1 - shipper;
    regions.origin_sidecars[other].stop().await;
    let revision = regions.origin[0].put("/app/alone", "1").await;
    let alone = regions.wait_applied(revision).await;
    assert_eq!(alone.term, before.term);
    regions.origin_sidecars[other].restart().await;
    regions.wait_standby(other).await;
    regions.cut_off_from_peers(shipper);
    regions.origin[0].put("/app/cut", "1").await;
    let after = regions.wait_taken_over(&alone).await;
    assert_eq!(after.epoch, before.epoch, "without a copy");
    regions.heal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_whose_spool_s_disk_fails_gives_way_to_one_whose_disk_is_well() {
    let limits = ["segment_bytes", "queue_bytes_max", "frame_bytes_max", "page_bytes_max"].map(|name| (name, 64 << 10));
    let limits = limits.map(|(name, value)| (name.to_owned(), value)).into();
    let (regions, before) = following(RegionsOptions { limits, ..RegionsOptions::default() }).await;
    let recorder = regions.record().await;
    let shipper = regions.shipper().await;
    let failing = &regions.origin_sidecars[shipper];
    std::fs::remove_dir_all(failing.data_dir().join("origin").join(LINK).join("spool")).unwrap();
    let acknowledged = write(&regions.origin[0].access(), "/app/some/", 500, 1_000).await;
    let stopped = |entry: &serde_json::Value| entry["state"] == "stopped";
    failing.wait_for(LINK, "the failed disk to stop the link", stopped).await;
    let taken_over = async || {
        let position = regions.try_position().await?;
        (position.term > before.term && position.origin_revision >= last(&acknowledged)).then_some(position)
    };
    let position = until("the other one to ship", TAKEOVER_LIMIT, taken_over).await;
    assert_eq!(position.epoch, before.epoch, "no copy");
    let tells = |entry: &serde_json::Value| {
        entry["role"] == "standby" && entry["reason"].as_str().is_some_and(|reason| reason.contains("disk"))
    };
    failing.wait_for(LINK, "the one that gave way to say what is wrong with it", tells).await;
    regions.judge(recorder, &acknowledged, &before).await;
}

/// As where a pod's member of etcd is stopped together with its sidecar.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resignation_that_etcd_does_not_take_at_first_is_tried_again() {
    let (mut regions, before) = following(RegionsOptions::default()).await;
    let shipper = regions.shipper().await;
    let (sidecar, lines) = (&mut regions.origin_sidecars[shipper], &regions.etcd_lines[shipper]);
    let log = sidecar.log_path();
    let says = |words: &str| std::fs::read_to_string(&log).is_ok_and(|log| log.contains(words));
    lines.iter().for_each(LinkProxy::cut);
    let healed = async {
        let refused = async || says("etcd did not take the resignation; trying again").then_some(());
        until("a try that fails", PATIENCE, refused).await;
        lines.iter().for_each(LinkProxy::heal);
    };
    let ((_, status), ()) = tokio::join!(sidecar.stop(), healed);
    assert!(status.success() && says("resigned"), "{status}");
    regions.origin[0].put("/app/second", "1").await;
    assert_eq!(regions.wait_taken_over(&before).await.epoch, before.epoch);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_that_gets_sigterm_hands_the_link_over_at_once() {
    let (mut regions, before) = following(RegionsOptions::default()).await;
    let recorder = regions.record().await;
    let traffic = regions.traffic();
    let position = applied_after(&regions, &before).await;
    let shipper = regions.shipper().await;
    let (took, status) = regions.origin_sidecars[shipper].stop().await;
    assert!(status.success() && took < Duration::from_secs(2), "{status} after {took:?}");
    let stopped = Instant::now();
    regions.wait_taken_over(&position).await;
    // The lease would have lasted for five seconds.
    assert!(stopped.elapsed() < Duration::from_secs(3), "{:?}", stopped.elapsed());
    regions.judge(recorder, &traffic.stop().await, &before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resync_that_was_asked_for_in_an_earlier_term_is_not_done_when_its_sidecar_ships_again() {
    let (mut regions, before) = following(RegionsOptions::default()).await;
    let shipper = regions.shipper().await;
    regions.cut_link();
    let asked = regions.origin_sidecars[shipper].admin(&["resync", LINK, "--allow-deletes"]);
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    let stands_by = |entry: &serde_json::Value| entry["role"] == "standby";
    regions.origin_sidecars[shipper].wait_for(LINK, "the shipper to give way", stands_by).await;
    regions.heal();
    let revision = regions.origin[0].put("/app/by-the-other", "1").await;
    let position = regions.wait_applied(revision).await;
    regions.wait_standby(shipper).await;
    let other = regions.shipper().await;
    assert_ne!(other, shipper, "the link was healed too late: the first one ships again");
    regions.origin_sidecars[other].stop().await;
    let ships = |entry: &serde_json::Value| entry["role"] == "shipper" && entry["state"] == "following";
    regions.origin_sidecars[shipper].wait_for(LINK, "the first one to ship again", ships).await;
    let revision = regions.origin[0].put("/app/by-the-first", "1").await;
    let after = regions.wait_applied(revision).await;
    assert!(after.term > position.term);
    assert_eq!(after.epoch, before.epoch, "a base copy that nobody waited for any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_comparison_ends_with_a_reason_when_the_sidecar_that_was_asked_gives_way() {
    let (regions, _) = following(RegionsOptions::default()).await;
    let shipper = regions.shipper().await;
    regions.replica_sidecars[0].pause();
    let config = regions.origin_sidecars[shipper].config_path().to_str().unwrap().to_owned();
    let asked = tokio::task::spawn_blocking(move || ferry(&["verify", LINK, "--json", "--config", &config]));
    let runs = |entry: &serde_json::Value| !entry["verification"]["running"].is_null();
    regions.origin_sidecars[shipper].wait_for(LINK, "a comparison that runs", runs).await;
    let output = tokio::time::timeout(PATIENCE, asked).await.expect("the call ends").unwrap();
    regions.replica_sidecars[0].resume();
    let outcome = outcome_of(&output);
    assert_eq!((output.status.code(), outcome["outcome"].as_str()), (Some(1), Some("failed")), "{outcome}");
    assert!(outcome["detail"].as_str().unwrap().contains("another sidecar ships the link now"), "{outcome}");
    let over = |entry: &serde_json::Value| entry["verification"]["running"].is_null();
    regions.origin_sidecars[shipper].wait_for(LINK, "the comparison to be over", over).await;
}

/// What ends the shipper while the link is down.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Kill,
    Pause,
    CutOffFromEtcd,
}

async fn spooled(regions: &Regions, sidecar: usize, revision: Revision) {
    let reached = |entry: &serde_json::Value| spool_end(entry).is_some_and(|end| end >= revision.0);
    regions.origin_sidecars[sidecar].wait_for(LINK, "the spool to have it all", reached).await;
}

/// The link is down, the shipper goes, the origin is compacted to its head: the standby's spool is all that there is.
async fn taken_over_in_an_outage(end: End) {
    let (mut regions, before) = following(RegionsOptions::default()).await;
    let recorder = regions.record().await;
    let shipper = regions.shipper().await;
    let standby = 1 - shipper;
    regions.cut_link();
    let access = regions.origin[0].access();
    let mut acknowledged = write(&access, "/app/one/", 1_000, 100).await;
    match end {
        End::Kill => regions.origin_sidecars[shipper].kill(),
        End::Pause => regions.origin_sidecars[shipper].pause(),
        End::CutOffFromEtcd => regions.cut_off_from_etcd(shipper),
    }
    let writing = async {
        let acknowledged = write(&access, "/app/two/", 1_000, 100).await;
        spooled(&regions, standby, last(&acknowledged)).await;
        let origin = recorded_so_far(&regions, &recorder).await;
        regions.origin[0].compact(origin).await;
        acknowledged
    };
    let ships = |entry: &serde_json::Value| entry["role"] == "shipper";
    let sidecar = &regions.origin_sidecars[standby];
    let elected = sidecar.wait_for_within(LINK, "the standby to be elected", TAKEOVER_LIMIT, ships);
    let (_, two) = tokio::join!(elected, writing);
    acknowledged.extend(two);
    regions.peer_lines.iter().flatten().for_each(|line| line.heal());
    let position = regions.wait_taken_over(&before).await;
    assert!(position.epoch == before.epoch, "{end:?}: no new copy, {position:?}");
    if end == End::Pause {
        regions.origin_sidecars[shipper].resume();
    }
    regions.heal();
    regions.judge(recorder, &acknowledged, &before).await;
}

/// These sidecars lose etcd for less than their lease lasts, and it is compacted past the ends of their spools.
async fn lose_history_for_a_moment(
    regions: &Regions,
    recorder: &RegionsRecorder,
    sidecars: &[usize],
) -> Vec<Acknowledged> {
    sidecars.iter().for_each(|sidecar| regions.cut_off_from_etcd(*sidecar));
    let acknowledged = write(&regions.origin[0].access(), "/app/unseen/", 200, 100).await;
    for seeing in (0..regions.origin_sidecars.len()).filter(|sidecar| !sidecars.contains(sidecar)) {
        spooled(regions, seeing, last(&acknowledged)).await;
    }
    let head = recorded_so_far(regions, recorder).await;
    regions.origin[0].compact(head).await;
    regions.heal();
    acknowledged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_whose_spool_lacks_what_etcd_has_compacted_gives_way_to_one_whose_spool_has_it() {
    let (regions, before) = following(RegionsOptions::default()).await;
    let recorder = regions.record().await;
    let shipper = regions.shipper().await;
    let acknowledged = lose_history_for_a_moment(&regions, &recorder, &[shipper]).await;
    let position = regions.wait_taken_over(&before).await;
    assert_eq!(position.epoch, before.epoch, "nothing was lost: the standby has it");
    regions.wait_applied(last(&acknowledged)).await;
    regions.wait_standby(shipper).await;
    regions.judge(recorder, &acknowledged, &before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_sidecar_has_seen_is_asked_of_each_once_and_then_compared() {
    let (regions, before) = following(RegionsOptions::default()).await;
    let recorder = regions.record().await;
    lose_history_for_a_moment(&regions, &recorder, &[0, 1]).await;
    let follows_anew = async || {
        let position = regions.try_position().await?;
        (position.epoch > before.epoch && position.state == Phase::Following).then_some(position)
    };
    let position = until("the epoch that a comparison opens", TAKEOVER_LIMIT, follows_anew).await;
    assert_eq!(position.epoch, before.epoch.next());
    assert!(position.term > before.term, "the other one was asked");
    let revision = regions.origin[0].put("/app/after", "1").await;
    regions.wait_applied(revision).await;
    regions.assert_equal().await;
}

/// The head, once the recorder has seen all of it: nothing that it still needs is compacted with it.
async fn recorded_so_far(regions: &Regions, recorder: &RegionsRecorder) -> Revision {
    let head = regions.origin[0].put("/app/mark", "1").await;
    until("the recorder to see the head", PATIENCE, async || (recorder.origin.seen() >= head).then_some(())).await;
    head
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_killed_in_an_outage_longer_than_the_compaction_window_costs_no_copy() {
    taken_over_in_an_outage(End::Kill).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_paused_in_an_outage_longer_than_the_compaction_window_costs_no_copy() {
    taken_over_in_an_outage(End::Pause).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_cut_off_from_etcd_in_an_outage_longer_than_the_compaction_window_costs_no_copy() {
    taken_over_in_an_outage(End::CutOffFromEtcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_comes_in_the_middle_of_an_outage_begins_where_the_replica_is() {
    let (mut regions, before) = following(RegionsOptions::default()).await;
    let recorder = regions.record().await;
    regions.origin_sidecars[1].kill();
    std::fs::remove_dir_all(regions.origin_sidecars[1].data_dir().join("origin")).unwrap();
    regions.cut_link();
    let acknowledged = write(&regions.origin[0].access(), "/app/", 500, 100).await;
    regions.origin_sidecars[1].restart().await;
    spooled(&regions, 1, last(&acknowledged)).await;
    let head = recorded_so_far(&regions, &recorder).await;
    regions.origin[0].compact(head).await;
    regions.origin_sidecars[0].kill();
    regions.heal();
    regions.wait_taken_over(&before).await;
    regions.judge(recorder, &acknowledged, &before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_lets_go_of_what_is_applied() {
    let limits = [("segment_bytes", 65_536), ("spool_bytes_max", 4_194_304)];
    let limits = limits.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let (regions, before) = following(RegionsOptions { limits, ..RegionsOptions::default() }).await;
    // Several times what its spool holds.
    let mut written: Vec<Acknowledged> = Vec::new();
    for round in 0..3 {
        let more = write(&regions.origin[0].access(), &format!("/app/{round}/"), 600, 4_000).await;
        regions.wait_applied(last(&more)).await;
        let end = last(&more).0;
        let base = |entry: &serde_json::Value| {
            let stage = entry["stages"].as_array()?.iter().find(|stage| stage["stage"] == "spool")?.clone();
            stage["detail"].as_str()?.split(' ').nth(3)?.parse::<u64>().ok()
        };
        let begun = written.first().map_or(before.origin_revision.0, |first| first.revision.0);
        let let_go = |entry: &serde_json::Value| base(entry).is_some_and(|base| base > begun && base <= end);
        regions.origin_sidecars[1].wait_for(LINK, "the standby to let go of what is applied", let_go).await;
        written = more;
    }
    assert_eq!(regions.origin_sidecars[1].http("/readyz").await.0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_sidecar_of_the_replica_is_killed_or_paused_and_the_other_one_receives() {
    let options = RegionsOptions { sidecars: (1, 2), ..RegionsOptions::default() };
    let (mut regions, before) = following(options).await;
    let recorder = regions.record().await;
    let traffic = regions.traffic();
    for round in 0..4 {
        let sidecar = round % 2;
        applied_after(&regions, &before).await;
        let since = Instant::now();
        if round < 2 {
            regions.replica_sidecars[sidecar].kill();
        } else {
            regions.replica_sidecars[sidecar].pause();
        }
        let at_once = regions.position().await;
        let beyond = async || regions.try_position().await.filter(|now| now.seq.0 > at_once.seq.0 + 20);
        until("the other sidecar to receive", TAKEOVER_LIMIT, beyond).await;
        eprintln!("round {round}: it goes on after {:?}", since.elapsed());
        if round < 2 {
            regions.replica_sidecars[sidecar].restart().await;
        } else {
            regions.replica_sidecars[sidecar].resume();
        }
    }
    regions.judge(recorder, &traffic.stop().await, &before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_member_of_either_cluster_is_killed_in_turn_and_the_link_goes_on() {
    let options = RegionsOptions { members: (3, 3), ..RegionsOptions::default() };
    let (mut regions, before) = following(options).await;
    let mut acknowledged = Vec::new();
    let mut position = before.clone();
    for member in 0..3 {
        let others = (member + 1) % 3;
        let traffic = regions.traffic_at(&regions.origin[others]);
        for side in 0..2 {
            let cluster = if side == 0 { &mut regions.origin } else { &mut regions.replica };
            cluster[member].kill();
            let since = Instant::now();
            let at_once = regions.position().await;
            let beyond = async || regions.try_position().await.filter(|now| now.seq.0 > at_once.seq.0 + 20);
            position = until("the link to go on", MEMBER_LOSS_LIMIT, beyond).await;
            eprintln!("member {member} of side {side}: it goes on after {:?}", since.elapsed());
            let cluster = if side == 0 { &mut regions.origin } else { &mut regions.replica };
            cluster[member].restart().await;
        }
        acknowledged.extend(traffic.stop().await);
    }
    let revision = regions.origin[0].put("/app/last", "1").await;
    let after = regions.wait_applied(revision).await;
    assert_eq!(after.epoch, before.epoch, "no new base copy");
    assert!(after.seq.0 >= position.seq.0 && !acknowledged.is_empty());
    regions.assert_equal().await;
    // Recorded afterwards, from the histories that etcd still has: nothing was compacted.
    let start = async |etcd: &Etcd, from| crate::bed::recording::Recorder::start_at(etcd, Some(from)).await;
    let recorder_of_replica = start(&regions.replica[0], Revision(1)).await;
    let recorder_of_origin = start(&regions.origin[0], Revision(1)).await;
    let recording = crate::bed::checkers::Recording {
        link: link_name(LINK),
        ranges: regions.ranges.clone(),
        replica: recorder_of_replica.finish(regions.replica[0].head().await).await,
        origin: recorder_of_origin.finish(regions.origin[0].head().await).await,
    };
    assert_eq!(recording.complete(&acknowledged).unwrap(), acknowledged.len());
    assert!(recording.check().unwrap() > 0);
}
