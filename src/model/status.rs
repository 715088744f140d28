//! Job: what a link says of itself: its state, figures and stages.
//! Input: plain values. Output: plain values, serialised as `status --json` prints them.
//! Pure: no clock, no I/O, no async.
//! Always true: every state and side has one spelling, in JSON, metrics and text.

use super::limits::LimitsStatus;
use super::{Epoch, LinkName, Paused, Quarantine, Revision, Seq, Term};
use bytes::Bytes;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// Which end of a link a status, metric or stage belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    Origin,
    Replica,
}

impl Side {
    pub fn as_str(self) -> &'static str {
        match self {
            Side::Origin => "origin",
            Side::Replica => "replica",
        }
    }
}

/// What a sidecar beside the origin's cluster is to the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The elected one.
    Shipper,
    /// It tails into its spool, and waits to be elected.
    Standby,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Shipper => "shipper",
            Role::Standby => "standby",
        }
    }
}

/// What a link is doing, as `status` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    Connecting,
    Copying,
    Repairing,
    Following,
    /// The replica holds what it received, until a person decides there.
    Held,
    SpoolFull,
    Paused,
    /// Under way, and without progress for longer than configured.
    Stalled,
    Stopped,
}

impl LinkState {
    /// A stream is open: the link is to make progress.
    pub fn is_under_way(self) -> bool {
        match self {
            LinkState::Copying | LinkState::Repairing | LinkState::Following | LinkState::Stalled => true,
            // A person is asked.
            LinkState::Held => false,
            LinkState::Connecting | LinkState::SpoolFull | LinkState::Paused | LinkState::Stopped => false,
        }
    }

    pub const ALL: [LinkState; 9] = [
        LinkState::Connecting,
        LinkState::Copying,
        LinkState::Repairing,
        LinkState::Following,
        LinkState::Held,
        LinkState::SpoolFull,
        LinkState::Paused,
        LinkState::Stalled,
        LinkState::Stopped,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            LinkState::Connecting => "connecting",
            LinkState::Copying => "copying",
            LinkState::Repairing => "repairing",
            LinkState::Following => "following",
            LinkState::Held => "held",
            LinkState::SpoolFull => "spool_full",
            LinkState::Paused => "paused",
            LinkState::Stalled => "stalled",
            LinkState::Stopped => "stopped",
        }
    }
}

/// One link, seen from one side; what `status --json` prints. Only the link's own task writes it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LinkStatus {
    pub link: LinkName,
    pub side: Side,
    pub state: LinkState,
    /// `None` at a replica, and while it is not known.
    pub role: Option<Role>,
    /// The node of the sidecar that ships the link; empty while it is not known.
    pub shipper: String,
    /// Why the link is not following, and what to do; empty when all is well.
    pub reason: String,
    /// The SAN of the other side.
    pub peer: String,
    pub epoch: Epoch,
    pub term: Term,
    /// The last seq given (origin) or received (replica).
    pub seq: Seq,
    /// Everything up to this origin revision is in the replica.
    pub origin_revision: Revision,
    /// The origin's head, as last read.
    pub head_revision: Revision,
    pub applied_seq: Seq,
    pub durable_seq: Seq,
    pub lag_revisions: u64,
    pub lag_seconds: f64,
    pub rpo_revisions: u64,
    pub rpo_seconds: f64,
    /// For how long the link has made no progress though there is some to make; 0 while it does.
    pub stalled_seconds: f64,
    /// Keys and values carried, before encoding.
    pub bytes_raw: u64,
    /// Frames and pages, after encoding.
    pub bytes_sent: u64,
    /// Monotonic counts with names from the glossary (`skipped`, `repeated`, `refused`, `conflicts`, ...).
    pub counts: BTreeMap<&'static str, u64>,
    /// The base copy while it runs: keys done, keys in all (0: not known).
    pub copy: Option<CopyProgress>,
    /// At the sidecar that ships the link, where canaries are on and one was written.
    pub canary: Option<CanaryStatus>,
    /// Whether the replica takes what the origin does; `None` while nothing is known of either.
    pub limits: Option<LimitsStatus>,
    pub verification: Verification,
    /// At a replica, once it was looked.
    pub foreign_writes: Option<ForeignStatus>,
    /// How many revisions the replica goes on without.
    pub quarantined_revisions: u64,
    /// The same one by one, at the replica; no key.
    pub quarantined: Vec<QuarantinedStatus>,
    /// At the replica, while it is paused.
    pub paused: Option<Paused>,
    pub stages: Vec<StageStatus>,
}

/// How long a revision takes from its write at the origin to the word that it is applied at the replica.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct CanaryStatus {
    /// The last one took so long; 0: none has come through yet.
    pub seconds: f64,
    /// The present one has been on its way for so long; 0: none is.
    pub waiting_seconds: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CopyProgress {
    pub keys_done: u64,
    pub keys_total: u64,
}

/// What is known of both sides being equal.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Verification {
    /// The last origin revision at which both sides were proved equal; 0: none yet.
    pub verified_revision: Revision,
    /// When, in milliseconds of Unix time by the origin's clock; 0: not yet.
    pub verified_at_ms: u64,
    /// Keys that differed at the last comparison.
    pub differing_keys: u64,
    /// Of these, keys of revisions in quarantine: that they differ is expected.
    pub expected_keys: u64,
    /// Where, at the origin. Its edges are keys: for an operator, who calls the admin port, and never for http.
    #[serde(skip)]
    pub differing_ranges: Vec<DifferingRange>,
    /// Comparisons that have ended since the sidecar started.
    pub runs: u64,
    /// When the last of them did, in milliseconds of Unix time by the origin's clock; 0: none yet.
    pub ended_at_ms: u64,
    pub outcome: Outcome,
    /// Why the last one failed, or what it compared; no key.
    pub detail: String,
    /// The one that runs.
    pub running: Option<PartsProgress>,
}

impl Verification {
    /// Keys that differ as far as is known; those that were mended are not among them, which are all but the expected ones.
    pub fn differing_now(&self) -> u64 {
        if self.outcome == Outcome::Mended { self.expected_keys } else { self.differing_keys }
    }

    /// A comparison ended without a result: what was known before it still holds, and what was mended differs no more.
    pub fn failed(&mut self, reason: &str, at_ms: u64) {
        if self.outcome == Outcome::Mended {
            self.differing_keys = self.differing_now();
            self.differing_ranges.clear();
        }
        (self.outcome, self.ended_at_ms) = (Outcome::Failed, at_ms);
        reason.clone_into(&mut self.detail);
    }

    /// A base copy has replaced what the last comparison saw.
    pub fn copied(&mut self) {
        if self.outcome != Outcome::Equal {
            (self.outcome, self.differing_keys, self.expected_keys) = (Outcome::None, 0, 0);
            self.differing_ranges.clear();
            "a base copy was made since the last comparison".clone_into(&mut self.detail);
        }
    }
}

/// What others wrote at the replica under the link's prefixes, since both sides were last proved equal.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ForeignStatus {
    /// Everything up to this revision of the replica was looked at.
    pub checked_revision: Revision,
    pub revisions: u64,
    pub keys: u64,
    /// The first and the last foreign revision of the replica; 0: none.
    pub first_revision: Revision,
    pub last_revision: Revision,
    /// The first keys: for an operator, who calls the admin port, and never for http.
    #[serde(skip)]
    pub first_keys: Vec<String>,
    /// Why others' writes are no concern here; empty where they are.
    pub expected: String,
    /// Why it cannot be looked at present; empty if it can.
    pub trouble: String,
}

/// A revision that the replica goes on without.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QuarantinedStatus {
    pub seq: Seq,
    /// Of the origin; 0, as the rest: its record is gone.
    pub revision: Revision,
    pub keys: u64,
    pub at_ms: u64,
    pub reason: String,
}

impl QuarantinedStatus {
    pub fn all(quarantine: &Quarantine) -> Vec<Self> {
        let entry = |(seq, record): &(Seq, Option<super::Record>)| match record {
            Some(record) => Self {
                seq: *seq,
                revision: record.revision,
                keys: record.changes.len() as u64,
                at_ms: record.at_ms,
                reason: record.reason.clone(),
            },
            None => {
                Self { seq: *seq, revision: Revision(0), keys: 0, at_ms: 0, reason: "its record is gone".to_owned() }
            }
        };
        quarantine.entries.iter().map(entry).collect()
    }
}

/// How a comparison ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    #[default]
    #[serde(rename = "")]
    None,
    Equal,
    Different,
    /// What differed was shipped by a repair.
    Mended,
    Failed,
}

impl Outcome {
    /// Empty before the first comparison has ended.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::None => "",
            Outcome::Equal => "equal",
            Outcome::Different => "different",
            Outcome::Mended => "mended",
            Outcome::Failed => "failed",
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PartsProgress {
    pub parts_done: u64,
    /// 0: not known yet.
    pub parts_total: u64,
}

/// Keys that differ, from the first to the last of them.
#[derive(Clone, PartialEq, Eq)]
pub struct DifferingRange {
    pub first: Bytes,
    pub last: Bytes,
    pub keys: u64,
}

/// Never shows a key: logs may hold what this prints.
impl fmt::Debug for DifferingRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DifferingRange({} keys)", self.keys)
    }
}

/// One stage of a link, for `/healthz?full=1` and the page.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageStatus {
    /// `watch`, `spool`, `ship`, `receive`, `journal`, `apply` or `lookout`.
    pub stage: &'static str,
    pub ok: bool,
    /// What it is doing or waiting for; no key, no value.
    pub detail: String,
    /// What waits before it, in bytes.
    pub queue_bytes: u64,
    /// What may wait before it, by the configuration; 0: no bytes are counted there.
    pub queue_bytes_max: u64,
    /// How far it is: a revision of the etcd beside it (watch, spool, lookout), or a seq (ship, receive, journal), or the transactions made
    /// (apply). Its rate is how fast that grows; a new epoch gives seqs anew.
    pub reached: u64,
    /// How many revisions wait before it; `None`: it has no queue of its own.
    pub waiting: Option<u64>,
}

impl StageStatus {
    /// A stage without a queue, that has not begun.
    pub fn new(stage: &'static str, ok: bool, detail: String) -> Self {
        Self { stage, ok, detail, queue_bytes: 0, queue_bytes_max: 0, reached: 0, waiting: None }
    }

    pub fn at(self, reached: u64) -> Self {
        Self { reached, ..self }
    }

    pub fn with_waiting(self, revisions: u64) -> Self {
        Self { waiting: Some(revisions), ..self }
    }

    pub fn with_queue(self, queue_bytes: u64, queue_bytes_max: u64) -> Self {
        Self { queue_bytes, queue_bytes_max, ..self }
    }
}

/// One member of the cluster beside a sidecar, as last asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct EtcdHealth {
    /// As configured.
    pub endpoint: String,
    /// It answered when it was asked last.
    pub ok: bool,
    /// As the member says it (`3.5.30`), or said it last; empty: not known, since it has not answered yet or the user is not root.
    pub version: String,
    /// True if this member leads its cluster.
    pub leader: bool,
    /// Of its version: `fine`, `warned`, `refused`, or `allowed` where the configuration lets a refused one through; empty: not known.
    pub verdict: &'static str,
    /// What is wrong with it or with its version, and what to do, or why its version is not known; empty when all is well.
    pub detail: String,
}

/// The certificates that a sidecar shows and trusts. Times are in seconds of Unix time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CertificatesStatus {
    /// Of its own certificate.
    pub subject: String,
    pub sans: Vec<String>,
    /// When its own certificate ends.
    pub own_expires_at: i64,
    /// When the first certificate of the CA's file ends.
    pub ca_expires_at: i64,
    /// When the revocation list is out of date, so that nobody is let in any more; `None`: none is configured, or it does not say.
    pub crl_expires_at: Option<i64>,
    /// When the certificate ends that etcd is shown; `None`: it is shown none.
    pub etcd_expires_at: Option<i64>,
    /// When the first certificate of the file ends that etcd's own is judged by; `None`: there is no such file.
    pub etcd_ca_expires_at: Option<i64>,
    /// How often new files were taken into use since the start.
    pub reloads: u64,
    /// Why the files that are there now are not in use; empty: they are.
    pub refused: String,
}

impl LinkStatus {
    /// Has `write` say how the link is now. True if anything is other than before: nobody need be woken to read the same.
    pub fn differs_after(&mut self, write: impl FnOnce(&mut Self)) -> bool {
        let before = self.clone();
        write(self);
        *self != before
    }

    pub fn new(link: LinkName, side: Side, peer: String) -> Self {
        Self {
            link,
            side,
            state: LinkState::Connecting,
            role: None,
            shipper: String::new(),
            reason: String::new(),
            peer,
            epoch: Epoch(0),
            term: Term(0),
            seq: Seq(0),
            origin_revision: Revision(0),
            head_revision: Revision(0),
            applied_seq: Seq(0),
            durable_seq: Seq(0),
            lag_revisions: 0,
            lag_seconds: 0.0,
            rpo_revisions: 0,
            rpo_seconds: 0.0,
            stalled_seconds: 0.0,
            bytes_raw: 0,
            bytes_sent: 0,
            counts: BTreeMap::new(),
            copy: None,
            canary: None,
            limits: None,
            verification: Verification::default(),
            foreign_writes: None,
            quarantined_revisions: 0,
            quarantined: Vec::new(),
            paused: None,
            stages: Vec::new(),
        }
    }

    /// Adds what an earlier task of the same link had counted, so that counts only grow while the sidecar lives.
    pub fn count_on(&mut self, before: &LinkStatus) {
        self.bytes_raw += before.bytes_raw;
        self.bytes_sent += before.bytes_sent;
        self.verification.runs += before.verification.runs;
        for (count, value) in &before.counts {
            *self.counts.entry(count).or_default() += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_that_fails_after_a_repair_does_not_bring_back_what_was_mended() {
        let key = bytes::Bytes::from_static(b"/app/a");
        let known = Verification {
            differing_keys: 3,
            expected_keys: 1,
            differing_ranges: vec![DifferingRange { first: key.clone(), last: key, keys: 3 }],
            outcome: Outcome::Different,
            ..Verification::default()
        };
        let mut differs = known.clone();
        differs.failed("the stream ended", 7);
        let detail = "the stream ended".to_owned();
        assert_eq!(differs, Verification { outcome: Outcome::Failed, detail, ended_at_ms: 7, ..known.clone() });

        let mut mended = Verification { outcome: Outcome::Mended, ..known };
        assert_eq!(mended.differing_now(), 1);
        mended.failed("the stream ended", 7);
        assert_eq!((mended.differing_keys, mended.differing_now(), mended.differing_ranges.len()), (1, 1, 0));
    }

    #[test]
    fn a_status_differs_once_it_says_something_else() {
        let link = LinkName::new("config").unwrap_or_else(|error| panic!("{error}"));
        let mut status = LinkStatus::new(link, Side::Origin, String::new());
        let mut lags = |revisions| status.differs_after(|status| status.lag_revisions = revisions);
        assert_eq!([0, 7, 7, 0].map(&mut lags), [false, true, false, true]);
    }
}
