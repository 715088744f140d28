//! Job: bits that flip after TLS has done its part: in memory, or in a proxy that both sides trust.
//! Input: a pair of regions with a bender between them. Output: passes or fails.
//! Always true: where bits flip is chosen by a printed seed; both ends end equal, complete and once, judged from recordings.

use crate::bed::bender::{Aim, Bender};
use crate::bed::pair::{LINK, ORIGIN_REGION, Pair, PairOptions, PairRecorder, REPLICA_REGION};
use crate::bed::traffic::{Acknowledged, Traffic, TrafficOptions, Write, commit};
use etcd_ferry::demo::objects;
use serde_json::Value;
use std::time::Duration;

/// A flip costs up to a hello and its wait.
const LIMIT: Duration = Duration::from_secs(90);

pub struct BentPair {
    pub pair: Pair,
    pub bender: Bender,
}

impl BentPair {
    /// Both etcds up, both sidecars down, the bender before the proxy.
    pub async fn prepare() -> Self {
        let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
        let certs = pair.dir().join("certs");
        let bender = Bender::start(pair.proxy.address(), &certs, ORIGIN_REGION, REPLICA_REGION).await;
        pair.origin_sidecar.options.send[0].to = vec![format!("https://{}", bender.address())];
        pair.origin_sidecar.write_config();
        Self { pair, bender }
    }

    pub async fn start(&mut self) {
        self.pair.replica_sidecar.restart().await;
        self.pair.origin_sidecar.restart().await;
    }

    fn bend(&self, aim: Aim, bytes_between: u64, flips_max: u64) {
        self.bender.bend(rand::random(), aim, bytes_between, flips_max);
    }

    pub async fn write(&self, writes_per_writer: usize) -> Vec<Acknowledged> {
        let options = TrafficOptions { writes_per_writer, value_bytes_max: 4_096, ..TrafficOptions::default() };
        Traffic::start(&self.pair.origin.access(), &options).finish().await
    }

    /// Waits for the end of what was written, and judges it.
    pub async fn judge(&self, recorder: PairRecorder, acknowledged: &[Acknowledged]) {
        self.pair.wait_applied_within(acknowledged.last().unwrap().revision, LIMIT).await;
        self.pair.assert_equal().await;
        let recording = self.pair.recorded(recorder).await;
        assert_eq!(recording.complete(acknowledged).unwrap(), acknowledged.len());
        assert!(recording.check().unwrap() > 0);
    }

    /// The replica counts what it refuses and where it asks for a fresh window.
    async fn wait_for_count(&self, name: &str) {
        let counted = |entry: &Value| entry["counts"][name].as_u64().is_some_and(|count| count > 0);
        self.pair.replica_sidecar.wait_for(LINK, &format!("{name} to be counted"), counted).await;
    }

    /// What was noticed is mended at once: the watchdog, which helps a link that stands still, had nothing to do.
    async fn assert_never_stalled(&self) {
        for sidecar in [&self.pair.origin_sidecar, &self.pair.replica_sidecar] {
            let entry = sidecar.wait_for_state(LINK, "following").await;
            assert_eq!(entry["counts"]["stalls"], 0, "{entry:#}");
        }
    }
}

/// Live frames under flips: at least `flips_wanted` are made, all are noticed, counted as `counted`, and cost nothing.
async fn flipped_live(aim: Aim, bytes_between: u64, flips_max: u64, flips_wanted: u64, counted: &str) {
    let mut bent = Box::pin(BentPair::prepare()).await;
    bent.start().await;
    bent.pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = bent.pair.record().await;
    bent.bend(aim, bytes_between, flips_max);
    let acknowledged = bent.write(200).await;
    bent.judge(recorder, &acknowledged).await;
    let flips = bent.bender.rest();
    assert!(flips >= flips_wanted, "{flips} bits were flipped");
    bent.wait_for_count(counted).await;
    bent.assert_never_stalled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_in_frames_on_the_way_are_noticed_and_a_new_hello_goes_on() {
    flipped_live(Aim::FRAMES, 5_000, 10, 3, "damaged").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_in_live_frames_before_they_were_sealed_are_noticed_and_sent_again() {
    flipped_live(Aim::SEALED_FRAMES, 8_000, 40, 5, "resets").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_while_catching_up_before_frames_were_sealed_are_noticed_and_sent_again() {
    let mut bent = Box::pin(BentPair::prepare()).await;
    bent.start().await;
    bent.pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = bent.pair.record().await;
    bent.pair.proxy.cut();
    let acknowledged = bent.write(400).await;
    bent.bend(Aim::SEALED_FRAMES, 10_000, 10);
    bent.pair.proxy.heal();
    bent.judge(recorder, &acknowledged).await;
    let flips = bent.bender.rest();
    assert!(flips >= 3, "{flips} bits were flipped");
    bent.wait_for_count("resets").await;
    bent.assert_never_stalled().await;
}

/// Enough keys for some twenty pages' worth of compressed bytes.
async fn fill(pair: &Pair) -> Acknowledged {
    let mut kv = pair.origin.kv().await;
    let mut last = None;
    for batch in 0..60_u64 {
        let put = |i| Write::put(objects::key("/registry/copied/", i), objects::value(i, 1, 1_024));
        let writes: Vec<Write> = (batch * 100..(batch + 1) * 100).map(put).collect();
        last = commit(&mut kv, &writes).await.unwrap();
    }
    last.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_in_the_pages_of_a_base_copy_are_noticed_and_the_copy_goes_on() {
    let mut bent = Box::pin(BentPair::prepare()).await;
    fill(&bent.pair).await;
    bent.bend(Aim::PAGES, 50_000, 5);
    bent.start().await;
    bent.pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let flips = bent.bender.rest();
    assert!(flips >= 2, "{flips} bits were flipped");
    let recorder = bent.pair.record().await;
    let acknowledged = bent.write(20).await;
    bent.judge(recorder, &acknowledged).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_in_acknowledgements_lose_and_repeat_nothing_and_status_is_true_again() {
    let mut bent = Box::pin(BentPair::prepare()).await;
    bent.start().await;
    bent.pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = bent.pair.record().await;
    bent.bend(Aim::ACKS, 100, 10);
    let mut acknowledged = bent.write(100).await;
    // How many acknowledgements there are depends on how fast the machine is.
    for _ in 0..20 {
        if bent.bender.flips() >= 5 {
            break;
        }
        acknowledged.extend(bent.write(50).await);
        bent.pair.wait_applied_within(acknowledged.last().unwrap().revision, LIMIT).await;
    }
    let flips = bent.bender.rest();
    assert!(flips >= 5, "{flips} bits were flipped");
    acknowledged.extend(bent.write(5).await);
    bent.judge(recorder, &acknowledged).await;
    let position = bent.pair.position().await.unwrap();
    let settled = |link: &Value| {
        link["applied_seq"] == position.seq.0
            && link["durable_seq"] == position.seq.0
            && link["lag_revisions"] == 0
            && link["origin_revision"].as_u64() <= link["head_revision"].as_u64()
    };
    bent.pair.origin_sidecar.wait_for(LINK, "a true status", settled).await;
}

/// Each new hello and each tick says again what was damaged, so whatever is hit is hit many times.
async fn flips_all_over_what_steers_the_link(aim: Aim, bytes_between: u64) {
    let mut bent = Box::pin(BentPair::prepare()).await;
    let filled = fill(&bent.pair).await;
    bent.bend(aim, bytes_between, 8);
    bent.start().await;
    bent.pair.wait_applied_within(filled.revision, LIMIT).await;
    bent.pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let recorder = bent.pair.record().await;
    let mut acknowledged = bent.write(100).await;
    for _ in 0..20 {
        if bent.bender.flips() >= 3 {
            break;
        }
        bent.pair.proxy.cut();
        acknowledged.extend(bent.write(20).await);
        bent.pair.proxy.heal();
        bent.pair.wait_applied_within(acknowledged.last().unwrap().revision, LIMIT).await;
    }
    let flips = bent.bender.rest();
    assert!(flips >= 3, "{flips} bits were flipped");
    acknowledged.extend(bent.write(5).await);
    bent.judge(recorder, &acknowledged).await;
    // A position over a hole, or a wrong reason to copy anew, would show here.
    let position = bent.pair.position().await.unwrap();
    assert_eq!(position.epoch.0, 1);
    let logs = bent.pair.origin_sidecar.log() + &bent.pair.replica_sidecar.log();
    assert!(logs.contains("checksum does not match"), "nothing was noticed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_in_hellos_change_no_range_and_no_epoch() {
    Box::pin(flips_all_over_what_steers_the_link(Aim::HELLOS, 60)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_in_the_answers_to_hellos_do_not_stop_the_link_nor_make_it_copy_anew() {
    Box::pin(flips_all_over_what_steers_the_link(Aim::HELLO_REPLIES, 100)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_in_progress_raise_no_position() {
    Box::pin(flips_all_over_what_steers_the_link(Aim::PROGRESS, 10)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_in_the_bounds_of_pages_delete_nothing() {
    Box::pin(flips_all_over_what_steers_the_link(Aim::PAGE_BOUNDS, 60)).await;
}
