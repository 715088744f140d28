//! Job: the gate before etcd: ask each configured member for its version and its limits, and let nothing through where one of them corrupts.
//! Input: an `EtcdConfig`, what members say of themselves. Output: connections, or why there is none; an `EtcdHealth` for each member, the
//! cluster's limits.
//! Edge: what is to be thought of a version is in version.rs, how limits are asked for in limits.rs.
//! Always true: every connection of a link is made here; a member that does not answer holds nobody up for longer than `ASK_MAX`.

use super::limits::{self, Found, Pulse};
use super::version::{self, Verdict, Version};
use super::{Etcd, EtcdError, Member};
use crate::config::EtcdConfig;
use crate::model::EtcdHealth;
use crate::model::limits::TxnLimits;
use crate::tls::EtcdFiles;
use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A member of one's own cluster is near, and its version needs no quorum: one that takes longer is not judged this time.
const ASK_MAX: Duration = Duration::from_secs(1);
/// How often each member is asked while nobody connects.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// A handful of small questions.
const MEASURE_MAX: Duration = Duration::from_secs(5);
/// What a member did not tell is asked for again.
const MEASURE_AGAIN: Duration = Duration::from_secs(60);
/// Nothing is asked more often than this, whatever ends pulses.
const MEASURE_AGAIN_MIN: Duration = Duration::from_secs(5);

/// The cluster beside this sidecar, whose members are asked who they are before anything else is.
pub struct Gate {
    config: EtcdConfig,
    files: watch::Receiver<Arc<EtcdFiles>>,
    /// One that the configured user may read, wherever the rights are as they must be.
    readable_key: Bytes,
    /// When members began to be asked last; held until they have answered, so that whoever came before shares the next answer.
    asked: Mutex<Option<Instant>>,
    members: watch::Sender<Vec<EtcdHealth>>,
    refusal: watch::Sender<Option<Refusal>>,
    limits: watch::Sender<ClusterLimits>,
}

/// What the members of a cluster take that were asked. What goes to a cluster may meet the least, and what comes from it may be of the most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClusterLimits {
    pub least: TxnLimits,
    pub most: TxnLimits,
}

/// One member's limits. Others take a restart of the member, so they are asked for again when it answers again, and when its pulse has stopped:
/// a restart can be over before the next look.
#[derive(Default)]
struct Measured {
    limits: TxnLimits,
    at: Option<Instant>,
    /// It did not answer since.
    was_down: bool,
    pulse: Option<Pulse>,
}

impl Measured {
    fn is_due(&self) -> bool {
        let again = if self.was_down { MEASURE_AGAIN_MIN } else { MEASURE_AGAIN };
        self.at.is_none_or(|at| (self.was_down || !self.limits.is_known()) && at.elapsed() >= again)
    }
}

/// Why nothing goes through to etcd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "etcd at {endpoint} is version {version}, which {fault}: upgrade it to {upgrade_to} or newer; until then nothing is read from this cluster \
     or written to it (docs/operating.md#etcds-versions)"
)]
pub struct Refusal {
    endpoint: String,
    version: String,
    fault: &'static str,
    upgrade_to: Version,
}

/// In whose name a member is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    /// Enough for the versions that are refused.
    Anyone,
    /// The configured user, if nobody else is told.
    User,
}

impl Gate {
    /// `files`: what connections are made with at present. `readable_key`: what the configured user may read.
    pub fn new(config: EtcdConfig, files: watch::Receiver<Arc<EtcdFiles>>, readable_key: Bytes) -> Self {
        let unasked = |endpoint: &String| EtcdHealth { endpoint: endpoint.clone(), ..EtcdHealth::default() };
        let members = config.endpoints.iter().map(unasked).collect();
        Self {
            config,
            files,
            readable_key,
            asked: Mutex::new(None),
            members: watch::channel(members).0,
            refusal: watch::channel(None).0,
            limits: watch::channel(ClusterLimits::default()).0,
        }
    }

    /// How the cluster is reached.
    pub fn config(&self) -> &EtcdConfig {
        &self.config
    }

    /// What each member said last, in the configuration's order.
    pub fn members(&self) -> watch::Receiver<Vec<EtcdHealth>> {
        self.members.subscribe()
    }

    /// What its transactions may hold, as far as it is known.
    pub fn limits(&self) -> watch::Receiver<ClusterLimits> {
        self.limits.subscribe()
    }

    /// A connection to the cluster, unless one of its members is of a version that corrupts. It takes no calls any more once such a member is
    /// met: below it, a connection that broke is made anew without a word.
    pub async fn connect(&self) -> Result<Etcd, EtcdError> {
        let ((), etcd) = tokio::join!(Box::pin(self.ask(Who::Anyone)), Box::pin(self.dial(&self.config)));
        match self.refusal.borrow().clone() {
            Some(refusal) => Err(EtcdError::VersionRefused(refusal)),
            None => etcd.map(|etcd| etcd.behind(self.refusal.subscribe(), self.progress_in_order())),
        }
    }

    /// A connection to one member, whatever its version.
    pub async fn connect_to(&self, endpoint: &str) -> Result<Etcd, EtcdError> {
        self.dial(&EtcdConfig { endpoints: vec![endpoint.to_owned()], ..self.config.clone() }).await
    }

    async fn dial(&self, config: &EtcdConfig) -> Result<Etcd, EtcdError> {
        let files = self.files.borrow().clone();
        Etcd::connect(config, &files).await
    }

    /// Whether a notice of progress that a watch asks for comes after the events that it speaks of, whichever member answers. One that does not
    /// tell its version though it answers is none of the old ones; of one that never answered nothing is known.
    fn progress_in_order(&self) -> bool {
        let members = self.members.borrow();
        members.iter().all(|member| version::progress_in_order(&member.version).unwrap_or(member.ok))
    }

    /// Asks each member now and then until `stop`, for whoever looks at its health.
    pub async fn run(&self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut measured: Vec<Measured> = self.config.endpoints.iter().map(|_| Measured::default()).collect();
        loop {
            let look = async {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = pulse_stops(&mut measured) => {}
                }
                self.ask(Who::User).await;
                self.measure(&mut measured).await;
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = look => {}
            }
        }
    }

    /// Asks the members whose limits may be others than they were when they were asked last.
    async fn measure(&self, measured: &mut [Measured]) {
        if self.refusal.borrow().is_some() {
            return;
        }
        let members = self.members.borrow().clone();
        for (known, member) in measured.iter_mut().zip(&members) {
            known.was_down |= !member.ok;
            // It has told what it can: that it ends once is enough.
            known.was_down |= known.pulse.take_if(|pulse| pulse.has_stopped()).is_some();
        }
        let asking = measured.iter_mut().zip(&members).filter(|(known, member)| member.ok && known.is_due());
        let asking = asking.map(|(known, member)| async move {
            let one = EtcdConfig { endpoints: vec![member.endpoint.clone()], ..self.config.clone() };
            let files = self.files.borrow().clone();
            let asking = Box::pin(limits::of_member(&one, &files, &self.readable_key));
            let asked = tokio::time::timeout(MEASURE_MAX, asking).await;
            let Found { limits, pulse, reasons } =
                asked.unwrap_or_else(|_| Found { reasons: vec![EtcdError::TimedOut], ..Found::default() });
            for reason in &reasons {
                tracing::info!(endpoint = %member.endpoint, %reason, "how large a transaction etcd takes is not known");
            }
            *known = Measured { limits, at: Some(Instant::now()), was_down: false, pulse };
        });
        futures::future::join_all(asking).await;
        let all = || measured.iter().map(|known| known.limits);
        let (least, most) = (all().reduce(TxnLimits::lesser), all().reduce(TxnLimits::greater));
        let now = ClusterLimits { least: least.unwrap_or_default(), most: most.unwrap_or_default() };
        self.limits.send_if_modified(|before| std::mem::replace(before, now) != now);
    }

    /// Asks all members at once, unless that was begun after this call.
    async fn ask(&self, who: Who) {
        let came = Instant::now();
        let mut asked = self.asked.lock().await;
        if asked.is_some_and(|begun| begun >= came) {
            return;
        }
        *asked = Some(Instant::now());
        let before = self.members.borrow().clone();
        let answers = before.iter().map(|member| self.ask_one(member, who));
        let now: Vec<EtcdHealth> = futures::future::join_all(answers).await;
        for (member, before) in now.iter().zip(&before) {
            if (&member.version, member.verdict) != (&before.version, before.verdict) {
                log(member);
            }
        }
        let refusal = now.iter().find_map(|member| self.refusal_of(member));
        self.refusal.send_if_modified(|before| std::mem::replace(before, refusal.clone()) != refusal);
        self.members.send_if_modified(|members| std::mem::replace(members, now.clone()) != now);
    }

    fn refusal_of(&self, member: &EtcdHealth) -> Option<Refusal> {
        match version::judge(&member.version) {
            Verdict::Refused { fault, upgrade_to } if !self.config.allow_corrupting_versions => {
                let (endpoint, version) = (member.endpoint.clone(), member.version.clone());
                Some(Refusal { endpoint, version, fault, upgrade_to })
            }
            Verdict::Refused { .. } | Verdict::Warned { .. } | Verdict::Fine | Verdict::Unknown => None,
        }
    }

    async fn ask_one(&self, before: &EtcdHealth, who: Who) -> EtcdHealth {
        let endpoint = before.endpoint.clone();
        match tokio::time::timeout(ASK_MAX, Box::pin(self.version_of(&endpoint, who))).await {
            Ok(Ok(member)) => self.health(endpoint, member),
            // What a login has shown stands until the next one.
            Ok(Err(EtcdError::Denied { .. } | EtcdError::LoginLost(_)))
                if who == Who::Anyone && ["fine", "warned"].contains(&before.verdict) =>
            {
                EtcdHealth { ok: true, ..before.clone() }
            }
            // That it says so shows that it answers, and that it is none of the old versions: those tell anyone.
            Ok(Err(EtcdError::Denied { .. } | EtcdError::LoginLost(_))) => {
                let detail = "it answers, and tells its version to the user root alone".to_owned();
                EtcdHealth { endpoint, ok: true, detail, ..EtcdHealth::default() }
            }
            // A version that was refused is not forgotten because its member is slow.
            Ok(Err(e)) => EtcdHealth { ok: false, leader: false, detail: e.to_string(), ..before.clone() },
            Err(_) => {
                let detail = format!("it did not say its version within {} s", ASK_MAX.as_secs());
                EtcdHealth { ok: false, leader: false, detail, ..before.clone() }
            }
        }
    }

    /// Versions before 3.5.28 tell anyone, and newer ones a user of etcd's role root, whose password etcd takes a tenth of a second to check.
    async fn version_of(&self, endpoint: &str, who: Who) -> Result<Member, EtcdError> {
        let one = EtcdConfig { endpoints: vec![endpoint.to_owned()], ..self.config.clone() };
        let nobody = EtcdConfig { username: None, password_file: None, ..one.clone() };
        match self.dial(&nobody).await?.member().await {
            Err(EtcdError::Denied { .. } | EtcdError::LoginLost(_)) if who == Who::User && one.username.is_some() => {
                self.dial(&one).await?.member().await
            }
            answer => answer,
        }
    }

    fn health(&self, endpoint: String, member: Member) -> EtcdHealth {
        let verdict = version::judge(&member.version);
        let (shown, detail) = match verdict {
            Verdict::Fine | Verdict::Unknown => (verdict.as_str(), String::new()),
            Verdict::Warned { fault, upgrade_to } => {
                (verdict.as_str(), format!("this version {fault}: upgrade it to {upgrade_to} or newer"))
            }
            Verdict::Refused { fault, upgrade_to } if self.config.allow_corrupting_versions => (
                "allowed",
                format!(
                    "this version {fault}, and allow_corrupting_versions lets it through: upgrade it to {upgrade_to} or newer"
                ),
            ),
            Verdict::Refused { fault, upgrade_to } => (
                verdict.as_str(),
                format!("this version {fault}, so no link goes through it: upgrade it to {upgrade_to} or newer"),
            ),
        };
        EtcdHealth { endpoint, ok: true, version: member.version, leader: member.leader, verdict: shown, detail }
    }
}

/// Until the first of them stops. Cancel-safe.
async fn pulse_stops(measured: &mut [Measured]) {
    let beating = measured.iter_mut().filter_map(|known| known.pulse.as_mut()).filter(|pulse| !pulse.has_stopped());
    let mut beating: FuturesUnordered<_> = beating.map(Pulse::stops).collect();
    if beating.next().await.is_none() {
        std::future::pending().await
    }
}

fn log(member: &EtcdHealth) {
    let EtcdHealth { endpoint, version, detail, verdict, .. } = member;
    match *verdict {
        "refused" => tracing::error!(%endpoint, %version, "etcd: {detail}"),
        "warned" | "allowed" => tracing::warn!(%endpoint, %version, "etcd: {detail}"),
        _ if version.is_empty() => tracing::info!(%endpoint, "etcd: its version is not known: {detail}"),
        _ => tracing::info!(%endpoint, %version, "etcd"),
    }
}
