//! Job: two fresh etcds and what carries from one to the other: a pair of sidecars, `etcdctl make-mirror` beside the destination, or this process.
//! Input: a system, a line. Output: a running `Rig`; its bytes on the line, CPU and memory.
//! Always true: whatever crosses between the two sides crosses the proxy, which counts it; etcd syncs as it does in earnest.

use crate::bed::checkers::{Recording, equal};
use crate::bed::etcd::{Etcd, EtcdOptions, default_bin};
use crate::bed::pair::{LINK, Pair, PairOptions, link_name};
use crate::bed::process::Process;
use crate::bed::recording::Recorder;
use crate::bed::{LinkProxy, until};
use crate::straight::Straight;
use etcd_client::GetOptions;
use etcd_ferry::model::{Phase, Ranges, Revision};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::Instant;

/// Long enough for make-mirror's base copy of 100,000 keys on a slow machine.
const LIMIT: Duration = Duration::from_secs(600);
const CLOCK_TICKS_PER_SECOND: f64 = 100.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    MakeMirror,
    EtcdFerry,
    /// No replicator, but what the etcds leave possible to one.
    Straight,
}

impl System {
    pub fn name(self) -> &'static str {
        match self {
            Self::MakeMirror => "make-mirror",
            Self::EtcdFerry => "etcd-ferry",
            Self::Straight => "straight from the watch",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    Loopback,
    /// 40 ms one way, 200 Mbit/s.
    Far,
}

impl Line {
    pub fn one_way(self) -> Duration {
        match self {
            Self::Loopback => Duration::ZERO,
            Self::Far => Duration::from_millis(40),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Far => "40 ms, 200 Mbit/s",
        }
    }

    fn shape(self, proxy: &LinkProxy) {
        if self == Self::Far {
            proxy.set_delay(self.one_way());
            proxy.set_rate(Some(25_000_000));
        }
    }
}

pub enum Rig {
    Mirror {
        origin: Box<Etcd>,
        replica: Box<Etcd>,
        proxy: LinkProxy,
        process: Option<Process>,
        dir: TempDir,
    },
    Ferry(Box<Pair>),
    /// What carries ends before the etcds do.
    Straight {
        carries: Option<Straight>,
        origin: Box<Etcd>,
        replica: Box<Etcd>,
        proxy: LinkProxy,
    },
}

/// What was used since some moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Used {
    /// On the line, both directions, with all that TCP carries.
    pub bytes: u64,
    /// Of what carries: make-mirror, or both sidecars.
    pub cpu_seconds: f64,
}

impl std::ops::Sub for Used {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { bytes: self.bytes - before.bytes, cpu_seconds: self.cpu_seconds - before.cpu_seconds }
    }
}

/// On a fast disk the trials of the highest rate write more than the 2 GiB that etcd holds unless it is told otherwise.
fn roomy(options: EtcdOptions) -> EtcdOptions {
    EtcdOptions { quota_backend_bytes: Some(8 << 30), ..options }
}

impl Rig {
    /// Both etcds up and empty; nothing carries yet.
    pub async fn prepare(system: System, line: Line) -> Self {
        let rig = match system {
            System::MakeMirror => {
                let (origin, replica, proxy) = Self::etcds().await;
                Self::Mirror { origin, replica, proxy, process: None, dir: tempfile::tempdir().unwrap() }
            }
            System::Straight => {
                let (origin, replica, proxy) = Self::etcds().await;
                Self::Straight { carries: None, origin, replica, proxy }
            }
            System::EtcdFerry => {
                let (origin, replica) = (roomy(EtcdOptions::origin()), roomy(EtcdOptions::replica()));
                let options = PairOptions { origin, replica, ..PairOptions::default() };
                let mut pair = Box::pin(Pair::prepare(options)).await;
                for sidecar in [&mut pair.origin_sidecar, &mut pair.replica_sidecar] {
                    sidecar.options.log_level = "info".to_owned();
                    sidecar.write_config();
                }
                Self::Ferry(Box::new(pair))
            }
        };
        line.shape(rig.proxy());
        rig
    }

    async fn etcds() -> (Box<Etcd>, Box<Etcd>, LinkProxy) {
        let origin = Box::new(Box::pin(Etcd::start(roomy(EtcdOptions::origin()))).await);
        let replica = Box::new(Box::pin(Etcd::start(roomy(EtcdOptions::replica()))).await);
        let proxy = LinkProxy::start(origin.address()).await.unwrap();
        (origin, replica, proxy)
    }

    /// Starts carrying; returns at once.
    pub fn carry(&mut self) {
        match self {
            Self::Mirror { replica, proxy, process, dir, .. } => {
                let mut command = Command::new(tool("etcdctl"));
                command.env("ETCDCTL_API", "3");
                command.arg(format!("--endpoints=http://{}", proxy.address())).args(["make-mirror", &replica.url()]);
                *process = Some(Process::start("etcdctl make-mirror", &mut command, &dir.path().join("mirror.log")));
            }
            Self::Ferry(pair) => {
                pair.replica_sidecar.spawn();
                pair.origin_sidecar.spawn();
            }
            Self::Straight { origin, replica, carries, .. } => *carries = Some(Straight::start(origin, replica)),
        }
    }

    pub fn origin(&self) -> &Etcd {
        match self {
            Self::Mirror { origin, .. } | Self::Straight { origin, .. } => origin,
            Self::Ferry(pair) => &pair.origin,
        }
    }

    pub fn replica(&self) -> &Etcd {
        match self {
            Self::Mirror { replica, .. } | Self::Straight { replica, .. } => replica,
            Self::Ferry(pair) => &pair.replica,
        }
    }

    pub fn proxy(&self) -> &LinkProxy {
        match self {
            Self::Mirror { proxy, .. } | Self::Straight { proxy, .. } => proxy,
            Self::Ferry(pair) => &pair.proxy,
        }
    }

    /// Waits until the replica holds `count` keys below `prefix`; of the sidecars, until the position says `following`, too.
    pub async fn holds(&self, prefix: &str, count: u64) {
        let mut kv = self.replica().kv().await;
        until(&format!("{count} keys at the replica"), LIMIT, async || {
            let options = GetOptions::new().with_prefix().with_count_only();
            let there = kv.get(prefix, Some(options)).await.ok()?.count();
            if there < i64::try_from(count).ok()? {
                tokio::time::sleep(Duration::from_millis(30)).await;
                return None;
            }
            if let Self::Ferry(pair) = self {
                pair.position().await.filter(|position| position.state == Phase::Following)?;
            }
            Some(())
        })
        .await;
    }

    /// Puts one key and waits until it is there: the link is up and idle, and nothing of the start is in what is measured next.
    pub async fn settled(&self) -> Revision {
        let put = self.origin().put("/settled", rand::random::<u64>().to_string()).await;
        let value = self.origin().get("/settled").await;
        until("the link to settle", LIMIT, async || (self.replica().get("/settled").await == value).then_some(()))
            .await;
        put
    }

    fn processes(&self) -> Vec<&Process> {
        match self {
            Self::Mirror { process, .. } => process.iter().collect(),
            Self::Ferry(pair) => vec![pair.origin_sidecar.process(), pair.replica_sidecar.process()],
            Self::Straight { .. } => Vec::new(),
        }
    }

    pub fn used(&self) -> Used {
        let counters = self.proxy().counters();
        let cpu_seconds = self.processes().into_iter().map(|process| cpu_seconds(process.id())).sum();
        Used { bytes: counters.bytes_to_target + counters.bytes_from_target, cpu_seconds }
    }

    /// CPU seconds so far, of each that takes part: origin's etcd, replica's etcd, what carries, this benchmark (load, watch, line).
    pub fn cpu_of_all(&self) -> [f64; 4] {
        let of = |process: &Process| cpu_seconds(process.id());
        let carries = self.processes().into_iter().map(of).sum();
        [of(self.origin().process()), of(self.replica().process()), carries, cpu_seconds(std::process::id())]
    }

    /// How many cores each of [`Self::cpu_of_all`] had on average since `began`, when it was `before`.
    pub fn cores_since(&self, before: [f64; 4], began: Instant) -> [f64; 4] {
        let mut cores = self.cpu_of_all();
        cores
            .iter_mut()
            .zip(before)
            .for_each(|(cores, before)| *cores = (*cores - before) / began.elapsed().as_secs_f64());
        cores
    }

    /// The most that each process ever held, in bytes; the origin's sidecar first.
    pub fn memory(&self) -> Vec<u64> {
        self.processes().into_iter().map(|process| process.memory_bytes().1).collect()
    }

    /// Ends a work: both sides are equal, byte for byte.
    pub async fn assert_equal(&self) {
        let all = Ranges::new(&[], &[]);
        let (_, here) = self.origin().read(&all, None).await;
        let (_, there) = self.replica().read(&all, None).await;
        equal(&here, &there).unwrap_or_else(|fault| panic!("{fault}"));
    }

    /// Ends a work: equal, and of the sidecars also ordered, once and whole in every revision since `from` (the origin's, the replica's).
    /// The histories are read from both etcds afterwards, so that judging slows nothing that is measured.
    pub async fn judge(&self, from: (Revision, Revision)) {
        self.assert_equal().await;
        let Self::Ferry(pair) = self else { return };
        let origin = Recorder::start_at(&pair.origin, Some(from.0)).await;
        let replica = Recorder::start_at(&pair.replica, Some(from.1)).await;
        let recording = Recording {
            link: link_name(LINK),
            ranges: Ranges::new(&[], &[]),
            origin: origin.finish(pair.origin.head().await).await,
            replica: replica.finish(pair.replica.head().await).await,
        };
        let judged = recording.check().unwrap_or_else(|fault| panic!("{fault}"));
        assert!(judged > 0, "nothing was judged");
    }

    /// How the link is said to be, for the message of a failure.
    pub fn why(&self) -> String {
        match self {
            Self::Mirror { process, .. } => process.as_ref().map(Process::log).unwrap_or_default(),
            Self::Ferry(pair) => format!("link {LINK}: {}", pair.origin_sidecar.log()),
            Self::Straight { .. } => String::new(),
        }
    }
}

/// A tool of etcd, from where the tests have theirs.
pub fn tool(name: &str) -> PathBuf {
    default_bin().map_or_else(|| name.into(), |bin| bin.join(name))
}

/// User and system time of a process so far.
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything; the times are fields 14 and 15.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / CLOCK_TICKS_PER_SECOND
}
