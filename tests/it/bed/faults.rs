//! Job: faults of a running pair of regions, each with its end: processes, lines, files, leaders, compaction.
//! Input: `Regions` that run, a seed. Output: the fault is there for a while, then gone; what was done, where that could be nothing.
//! Always true: one fault is ended before the next of its target begins; of a cluster of three, two members always run; compaction spares
//! only what the recorder has not seen yet.

use super::bender::{Aim, Bender};
use super::pair::{LINK, link_name};
use super::recording::Recorder;
use super::regions::Regions;
use super::sidecar::Sidecar;
use etcd_client::CompactionOptions;
use etcd_ferry::demo::proxy::Direction;
use etcd_ferry::model::Revision;
use rand::Rng;
use rand::rngs::StdRng;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;

/// As etcd's own users compact at the worst.
const COMPACTION_PERIOD: Duration = Duration::from_millis(100);
/// One that is slower is done all the same, and not known to be.
const COMPACTION_ANSWERED_WITHIN: Duration = Duration::from_secs(1);
const SLOW_ONE_WAY: Duration = Duration::from_millis(150);
const SLOW_BYTES_PER_SECOND: u64 = 100_000;
/// What bits flip in, and in about each how many bytes: frames are large, what steers the link is small. No pages: a fault begins at a link
/// that follows, and no copy runs there.
const AIMS: [(Aim, u64); 5] =
    [(Aim::SEALED_FRAMES, 2_000), (Aim::FRAMES, 2_000), (Aim::ACKS, 100), (Aim::HELLOS, 60), (Aim::HELLO_REPLIES, 100)];
const FLIPS_MAX: u64 = 5;
/// Within which something comes through that a bit can flip in, once no other fault is there: another sidecar may have to be elected first.
const FLIP_WAIT_MAX: Duration = Duration::from_secs(15);
const FLIP_LOOK_EVERY: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    OriginSidecarKilled,
    OriginSidecarPaused,
    SpoolBitFlipped,
    ReplicaSidecarKilled,
    ReplicaSidecarPaused,
    JournalBitFlipped,
    OriginMemberKilled,
    OriginMemberPaused,
    OriginLeaderMoved,
    ReplicaEtcdKilled,
    ReplicaEtcdPaused,
    LinkCut,
    LinkOneWay,
    LinkHalfOpen,
    LinkSlow,
    LinkBitsFlipped,
    SidecarCutOffFromEtcd,
    Compaction,
}

/// What a fault befalls: of each, one fault at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    OriginSidecar,
    ReplicaSidecar,
    OriginEtcd,
    ReplicaEtcd,
    Link,
    EtcdLine,
    History,
}

impl Fault {
    pub const ALL: [Fault; 18] = [
        Fault::OriginSidecarKilled,
        Fault::OriginSidecarPaused,
        Fault::SpoolBitFlipped,
        Fault::ReplicaSidecarKilled,
        Fault::ReplicaSidecarPaused,
        Fault::JournalBitFlipped,
        Fault::OriginMemberKilled,
        Fault::OriginMemberPaused,
        Fault::OriginLeaderMoved,
        Fault::ReplicaEtcdKilled,
        Fault::ReplicaEtcdPaused,
        Fault::LinkCut,
        Fault::LinkOneWay,
        Fault::LinkHalfOpen,
        Fault::LinkSlow,
        Fault::LinkBitsFlipped,
        Fault::SidecarCutOffFromEtcd,
        Fault::Compaction,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Fault::OriginSidecarKilled => "kill -9 of an origin's sidecar",
            Fault::OriginSidecarPaused => "SIGSTOP of an origin's sidecar",
            Fault::SpoolBitFlipped => "bit flipped in an origin's sidecar's files",
            Fault::ReplicaSidecarKilled => "kill -9 of a replica's sidecar",
            Fault::ReplicaSidecarPaused => "SIGSTOP of a replica's sidecar",
            Fault::JournalBitFlipped => "bit flipped in a replica's sidecar's files",
            Fault::OriginMemberKilled => "kill -9 of a member of the origin",
            Fault::OriginMemberPaused => "SIGSTOP of a member of the origin",
            Fault::OriginLeaderMoved => "the origin's leader moved",
            Fault::ReplicaEtcdKilled => "kill -9 of the replica's etcd",
            Fault::ReplicaEtcdPaused => "SIGSTOP of the replica's etcd",
            Fault::LinkCut => "link cut",
            Fault::LinkOneWay => "link carries one way only",
            Fault::LinkHalfOpen => "link half-open",
            Fault::LinkSlow => "link slow and narrow",
            Fault::LinkBitsFlipped => "bits flipped after TLS",
            Fault::SidecarCutOffFromEtcd => "an origin's sidecar cut off from its etcd",
            Fault::Compaction => "compaction to the head each 100 ms",
        }
    }

    fn target(self) -> Target {
        match self {
            Fault::OriginSidecarKilled | Fault::OriginSidecarPaused | Fault::SpoolBitFlipped => Target::OriginSidecar,
            Fault::ReplicaSidecarKilled | Fault::ReplicaSidecarPaused | Fault::JournalBitFlipped => {
                Target::ReplicaSidecar
            }
            Fault::OriginMemberKilled | Fault::OriginMemberPaused | Fault::OriginLeaderMoved => Target::OriginEtcd,
            Fault::ReplicaEtcdKilled | Fault::ReplicaEtcdPaused => Target::ReplicaEtcd,
            Fault::LinkCut | Fault::LinkOneWay | Fault::LinkHalfOpen | Fault::LinkSlow | Fault::LinkBitsFlipped => {
                Target::Link
            }
            Fault::SidecarCutOffFromEtcd => Target::EtcdLine,
            Fault::Compaction => Target::History,
        }
    }

    pub fn goes_with(self, other: Fault) -> bool {
        self.target() != other.target()
    }
}

/// What was done by faults that may do nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Bits that were flipped after TLS.
    pub flips: u64,
    pub compactions: u64,
}

/// Begins all of them at once, holds them for `length`, and ends them in turn.
pub async fn strike(
    regions: &mut Regions,
    faults: &[Fault],
    length: Duration,
    origin: &Recorder,
    random: &mut StdRng,
) -> Done {
    let (mut begun, mut done) = (Vec::new(), Done::default());
    for fault in faults {
        begun.push((*fault, begin(regions, *fault, random).await));
    }
    let until = Instant::now() + length;
    let mut compacted = Revision(0);
    while Instant::now() < until {
        let seen = origin.seen();
        if faults.contains(&Fault::Compaction) && seen > compacted && compact(regions, seen).await {
            compacted = seen;
            done.compactions += 1;
        }
        tokio::time::sleep(COMPACTION_PERIOD.min(until.saturating_duration_since(Instant::now()))).await;
    }
    // The last one: where nothing comes through, no bit flips.
    begun.sort_by_key(|(fault, _)| *fault == Fault::LinkBitsFlipped);
    for (fault, at) in begun {
        done.flips += end(regions, fault, at, random).await;
    }
    done
}

/// Returns which one of several it befell.
async fn begin(regions: &mut Regions, fault: Fault, random: &mut StdRng) -> usize {
    let of = match fault.target() {
        Target::OriginSidecar | Target::EtcdLine => regions.origin_sidecars.len(),
        Target::ReplicaSidecar => regions.replica_sidecars.len(),
        Target::OriginEtcd => regions.origin.len(),
        Target::ReplicaEtcd => regions.replica.len(),
        Target::Link => 2,
        Target::History => 1,
    };
    let at = random.random_range(0..of);
    match fault {
        Fault::OriginSidecarKilled => regions.origin_sidecars[at].kill(),
        Fault::OriginSidecarPaused => regions.origin_sidecars[at].pause(),
        Fault::SpoolBitFlipped => kill_and_flip(&mut regions.origin_sidecars[at], random),
        Fault::ReplicaSidecarKilled => regions.replica_sidecars[at].kill(),
        Fault::ReplicaSidecarPaused => regions.replica_sidecars[at].pause(),
        Fault::JournalBitFlipped => kill_and_flip(&mut regions.replica_sidecars[at], random),
        Fault::OriginMemberKilled => regions.origin[at].kill(),
        Fault::OriginMemberPaused => regions.origin[at].pause(),
        Fault::OriginLeaderMoved => move_leader(regions, at).await,
        Fault::ReplicaEtcdKilled => regions.replica[at].kill(),
        Fault::ReplicaEtcdPaused => regions.replica[at].pause(),
        Fault::LinkCut => regions.cut_link(),
        Fault::LinkOneWay => {
            let deaf = [Direction::ToTarget, Direction::FromTarget][at];
            regions.peer_lines.iter().flatten().for_each(|line| line.black_hole(deaf));
        }
        Fault::LinkHalfOpen => (0..regions.origin_sidecars.len()).for_each(|at| regions.cut_off_from_peers(at)),
        Fault::LinkSlow => {
            for line in regions.peer_lines.iter().flatten() {
                line.set_delay(SLOW_ONE_WAY);
                line.set_rate(Some(SLOW_BYTES_PER_SECOND));
            }
        }
        Fault::LinkBitsFlipped => bend(regions, random),
        Fault::SidecarCutOffFromEtcd => regions.cut_off_from_etcd(at),
        Fault::Compaction => {}
    }
    at
}

/// Returns how many bits were flipped after TLS.
async fn end(regions: &mut Regions, fault: Fault, at: usize, random: &mut StdRng) -> u64 {
    match fault {
        Fault::OriginSidecarKilled | Fault::SpoolBitFlipped => regions.origin_sidecars[at].restart().await,
        Fault::OriginSidecarPaused => regions.origin_sidecars[at].resume(),
        Fault::ReplicaSidecarKilled | Fault::JournalBitFlipped => regions.replica_sidecars[at].restart().await,
        Fault::ReplicaSidecarPaused => regions.replica_sidecars[at].resume(),
        Fault::OriginMemberKilled => regions.origin[at].restart().await,
        Fault::OriginMemberPaused => regions.origin[at].resume(),
        Fault::ReplicaEtcdKilled => regions.replica[at].restart().await,
        Fault::ReplicaEtcdPaused => regions.replica[at].resume(),
        Fault::LinkCut | Fault::LinkOneWay | Fault::LinkHalfOpen => {
            regions.peer_lines.iter().flatten().for_each(super::LinkProxy::heal);
        }
        Fault::LinkSlow => {
            for line in regions.peer_lines.iter().flatten() {
                line.set_delay(Duration::ZERO);
                line.set_rate(None);
            }
        }
        Fault::LinkBitsFlipped => return flipped(&regions.benders).await,
        Fault::SidecarCutOffFromEtcd => {
            // Some come back to connections that lost bytes, some to none.
            if random.random() {
                regions.etcd_lines[at].iter().for_each(super::LinkProxy::reset);
            }
            regions.etcd_lines[at].iter().for_each(super::LinkProxy::heal);
        }
        Fault::OriginLeaderMoved | Fault::Compaction => {}
    }
    0
}

fn bend(regions: &Regions, random: &mut StdRng) {
    let (aim, bytes_between) = AIMS[random.random_range(0..AIMS.len())];
    for bender in &regions.benders {
        bender.bend(random.random(), aim, bytes_between, FLIPS_MAX);
    }
    // A link that follows says no hello.
    if [Aim::HELLOS, Aim::HELLO_REPLIES].contains(&aim) {
        regions.peer_lines.iter().flatten().for_each(super::LinkProxy::reset);
    }
}

/// Ends it once a bit has flipped, or none will. Returns how many did.
async fn flipped(benders: &[Bender]) -> u64 {
    let deadline = Instant::now() + FLIP_WAIT_MAX;
    while benders.iter().all(|bender| bender.flips() == 0) && Instant::now() < deadline {
        tokio::time::sleep(FLIP_LOOK_EVERY).await;
    }
    benders.iter().map(Bender::rest).sum()
}

/// As far as the recorder has seen: a history with a hole judges nothing. False if no member answers; it is tried again the next time.
async fn compact(regions: &Regions, seen: Revision) -> bool {
    for member in regions.origin.iter().filter(|member| member.is_running()) {
        let Ok(mut client) = member.access().try_client().await else { continue };
        let options = CompactionOptions::new().with_physical();
        let compacting = client.compact(seen.to_etcd(), Some(options));
        match tokio::time::timeout(COMPACTION_ANSWERED_WITHIN, compacting).await {
            Ok(Ok(_)) => return true,
            // A member that was too slow to say so has done it.
            Ok(Err(error)) if error.to_string().contains("has been compacted") => return true,
            Ok(Err(_)) | Err(_) => {}
        }
    }
    false
}

/// To the member of this number, or the next one if it leads already.
async fn move_leader(regions: &Regions, to: usize) {
    let mut members = Vec::new();
    for member in &regions.origin {
        let mut client = member.client().await;
        let status = client.status().await.expect("a member that runs says its status");
        members.push((status.header().map_or(0, etcd_client::ResponseHeader::member_id), status.leader(), client));
    }
    let Some(leads) = members.iter().position(|(id, leader, _)| id == leader) else { return };
    let to = if to == leads { (to + 1) % members.len() } else { to };
    let target = members[to].0;
    // Refused where an election came between, which is what was wanted.
    let _ = members[leads].2.move_leader(target).await;
}

/// One bit of what a sidecar has on disk, wherever that is.
fn kill_and_flip(sidecar: &mut Sidecar, random: &mut StdRng) {
    sidecar.kill();
    let mut files = Vec::new();
    files_below(&sidecar.data_dir(), &mut files);
    // What an origin may touch is no guess: over damaged ranges a sidecar does not start, and says which file to remove.
    files.retain(|(path, bytes)| *bytes > 0 && !path.ends_with("ranges.json"));
    if files.is_empty() {
        return;
    }
    let (path, bytes) = &files[random.random_range(0..files.len())];
    let at = random.random_range(0..*bytes);
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("a file of the sidecar's");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("it is that long");
    file.write_all_at(&[byte[0] ^ (1 << random.random_range(0..8))], at).expect("it can be written");
    eprintln!("a bit of {} is flipped, at {at} of {bytes} bytes", path.display());
}

/// Up to where each file holds something: what follows is preallocated zeros.
fn files_below(dir: &Path, files: &mut Vec<(PathBuf, u64)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files_below(&path, files);
        } else if let Ok(held) = fs::read(&path) {
            files.push((path, held.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1)));
        }
    }
}

/// What all sidecars say of the link, for whoever reads a failure.
pub async fn told(regions: &Regions) -> String {
    let mut told = String::new();
    for sidecar in regions.origin_sidecars.iter().chain(&regions.replica_sidecars) {
        let entry = sidecar.health().await.and_then(|health| super::sidecar::link_of(&health, LINK));
        told.push_str(&format!("{}: {entry:?}\n", sidecar.options.node));
    }
    let position = regions.try_position().await;
    format!("{told}{}: {position:?}", link_name(LINK).position_key().escape_ascii())
}
