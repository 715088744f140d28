//! Job: every metric: its name, its unit, its meaning, and the one place that records it.
//! Input: link statuses, measured durations. Output: the Prometheus text that `/metrics` serves.
//! Edge: the only file that knows the recorder.
//! Always true: names start with `etcd_ferry_` and end in their unit; labels are `link`, `side` and, on one metric each, `state` or
//! `certificate` (enums); never a key.

use crate::model::limits::LimitsVerdict;
use crate::model::{CertificatesStatus, ForeignStatus, LinkName, LinkState, LinkStatus, Outcome, Role, Side};
use metrics::{Label, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::sync::LazyLock;

/// 1 for the state that the link is in, 0 for the eight others; `state` is the third label.
pub const LINK_STATE: &str = "etcd_ferry_link_state";
pub const LAG_SECONDS: &str = "etcd_ferry_lag_seconds";
pub const LAG_REVISIONS: &str = "etcd_ferry_lag_revisions";
pub const RPO_SECONDS: &str = "etcd_ferry_rpo_seconds";
pub const RPO_REVISIONS: &str = "etcd_ferry_rpo_revisions";
pub const CANARY_SECONDS: &str = "etcd_ferry_canary_seconds";
pub const STALLED_SECONDS: &str = "etcd_ferry_stalled_seconds";
pub const EPOCH: &str = "etcd_ferry_epoch";
pub const TERM: &str = "etcd_ferry_term";
pub const SHIPPER: &str = "etcd_ferry_shipper";
pub const SEQ: &str = "etcd_ferry_seq";
pub const APPLIED_SEQ: &str = "etcd_ferry_applied_seq";
pub const DURABLE_SEQ: &str = "etcd_ferry_durable_seq";
pub const ORIGIN_REVISION: &str = "etcd_ferry_origin_revision";
pub const HEAD_REVISION: &str = "etcd_ferry_head_revision";
pub const COPY_DONE_KEYS: &str = "etcd_ferry_copy_done_keys";
pub const COPY_EXPECTED_KEYS: &str = "etcd_ferry_copy_expected_keys";
pub const VERIFIED_TIMESTAMP_SECONDS: &str = "etcd_ferry_verified_timestamp_seconds";
pub const VERIFIED_REVISION: &str = "etcd_ferry_verified_revision";
pub const DIFFERING_KEYS: &str = "etcd_ferry_differing_keys";
pub const VERIFICATION_FAILED: &str = "etcd_ferry_verification_failed";
pub const QUARANTINED_REVISIONS: &str = "etcd_ferry_quarantined_revisions";
pub const LIMITS_SHORT: &str = "etcd_ferry_limits_short";
pub const QUEUE_BYTES: &str = "etcd_ferry_queue_bytes";
pub const QUEUE_LIMIT_BYTES: &str = "etcd_ferry_queue_limit_bytes";
pub const UNMENDED_FOREIGN_KEYS: &str = "etcd_ferry_unmended_foreign_keys";
/// The sidecar's own: its label is `certificate`.
pub const CERTIFICATE_EXPIRY_TIMESTAMP_SECONDS: &str = "etcd_ferry_certificate_expiry_timestamp_seconds";
/// Of the sidecar, without labels.
pub const CERTIFICATES_REFUSED: &str = "etcd_ferry_certificates_refused";
pub const CERTIFICATE_RENEWAL_TIMESTAMP_SECONDS: &str = "etcd_ferry_certificate_renewal_timestamp_seconds";
pub const CERTIFICATE_RELOADS_TOTAL: &str = "etcd_ferry_certificate_reloads_total";
pub const PKI_CERTIFICATES_TOTAL: &str = "etcd_ferry_pki_certificates_total";
pub const PKI_FAILURES_TOTAL: &str = "etcd_ferry_pki_failures_total";
pub const CONFIGURATION_REFUSED: &str = "etcd_ferry_configuration_refused";
pub const CONFIGURATION_NEEDS_RESTART: &str = "etcd_ferry_configuration_needs_restart";
pub const CONFIGURATION_RELOADS_TOTAL: &str = "etcd_ferry_configuration_reloads_total";
pub const RAW_BYTES_TOTAL: &str = "etcd_ferry_raw_bytes_total";
pub const SENT_BYTES_TOTAL: &str = "etcd_ferry_sent_bytes_total";
pub const TRACE_SPANS_TOTAL: &str = "etcd_ferry_trace_spans_total";
pub const TRACE_SPANS_DROPPED_TOTAL: &str = "etcd_ferry_trace_spans_dropped_total";
pub const REVISION_LAG_SECONDS: &str = "etcd_ferry_revision_lag_seconds";
pub const ROUND_TRIP_SECONDS: &str = "etcd_ferry_round_trip_seconds";
pub const APPLY_SECONDS: &str = "etcd_ferry_apply_seconds";
pub const BATCH_REVISIONS: &str = "etcd_ferry_batch_revisions";

const GAUGES: [(&str, &str); 31] = [
    (LINK_STATE, "1 for the state that the link is in, else 0."),
    (LAG_SECONDS, "Since when the oldest origin revision that is not applied has been in etcd."),
    (LAG_REVISIONS, "Origin revisions that are not applied at the replica."),
    (RPO_SECONDS, "Since when the oldest origin revision that is not durable at the replica has been in etcd."),
    (RPO_REVISIONS, "Origin revisions that are not durable at the replica."),
    (
        STALLED_SECONDS,
        "For how long the link has made no progress though there is some to make; 0 unless it is stalled.",
    ),
    (
        CANARY_SECONDS,
        "From the last canary's write to the word that it is applied, or so far if that is longer; 0 where canaries are off (origin).",
    ),
    (EPOCH, "The unbroken run of seqs that the link is in."),
    (TERM, "The term of the shipper's election."),
    (SHIPPER, "1 at the sidecar that is elected to ship the link, else 0."),
    (SEQ, "The last seq given (origin) or received (replica)."),
    (APPLIED_SEQ, "The last seq that is applied at the replica."),
    (DURABLE_SEQ, "The last seq that is durable at the replica."),
    (ORIGIN_REVISION, "Everything up to this origin revision is in the replica."),
    (HEAD_REVISION, "The origin's head, as last read."),
    (COPY_DONE_KEYS, "Keys that the running base copy has done; 0 when none runs."),
    (COPY_EXPECTED_KEYS, "Keys that the running base copy has in all; 0 when none runs or it is not known."),
    (
        VERIFIED_TIMESTAMP_SECONDS,
        "When both sides were last proved equal, in Unix time by the origin's clock; 0: not yet.",
    ),
    (VERIFIED_REVISION, "The origin revision at which both sides were last proved equal; 0: none yet."),
    (
        DIFFERING_KEYS,
        "Keys that differed at the last comparison of both sides, without those that a repair has mended since; 0 at a standby.",
    ),
    (
        VERIFICATION_FAILED,
        "1 if the last comparison of both sides came to no outcome, or a repair mended not all that it was to, else 0; 0 at a standby (origin).",
    ),
    (QUARANTINED_REVISIONS, "Revisions that the replica goes on without; 0 at a standby."),
    (
        LIMITS_SHORT,
        "1 where the replica takes less in a transaction than the origin's etcd does, else 0; 0 at a standby.",
    ),
    (QUEUE_BYTES, "What waits before the link's stages, in memory and in files."),
    (QUEUE_LIMIT_BYTES, "What may wait there: `spool_bytes_max` (origin), `journal_bytes_max` (replica)."),
    (
        UNMENDED_FOREIGN_KEYS,
        "Keys under the link's prefixes that somebody else wrote at the replica since both sides were last proved equal (replica).",
    ),
    (
        CERTIFICATE_EXPIRY_TIMESTAMP_SECONDS,
        "When the sidecar's `own` certificate, its `ca` or its `crl` ends, or what it has for `etcd` (`etcd_ca`), in Unix time.",
    ),
    (
        CERTIFICATES_REFUSED,
        "1 while the files of the certificates are not sound, so that the last ones stay in use, else 0.",
    ),
    (
        CERTIFICATE_RENEWAL_TIMESTAMP_SECONDS,
        "When the PKI is asked for the next certificate, in Unix time: in the past while it does not give one; 0 where no PKI is configured.",
    ),
    (
        CONFIGURATION_REFUSED,
        "1 if the configuration was not sound when it was last read, so that the one before stays in use, else 0.",
    ),
    (
        CONFIGURATION_NEEDS_RESTART,
        "1 if the configuration that was last read has keys that wait for a restart, else 0.",
    ),
];
const COUNTERS: [(&str, &str); 8] = [
    (RAW_BYTES_TOTAL, "Keys and values carried, before encoding."),
    (SENT_BYTES_TOTAL, "Frames and pages carried, after encoding."),
    (CERTIFICATE_RELOADS_TOTAL, "Times that the sidecar took new certificates into use."),
    (PKI_CERTIFICATES_TOTAL, "Certificates that the PKI issued to the sidecar and that were sound."),
    (PKI_FAILURES_TOTAL, "Times that the PKI was asked for a certificate in vain."),
    (CONFIGURATION_RELOADS_TOTAL, "Times that the sidecar took something of a changed configuration into use."),
    (TRACE_SPANS_TOTAL, "Spans that the collector took."),
    (TRACE_SPANS_DROPPED_TOTAL, "Spans that the collector did not take in time, or that found no room to wait for it."),
];
/// The `counts` of a link's status; each becomes `etcd_ferry_<count>_total`, on the sides that are named here.
const COUNTS: [(&str, &str); 22] = [
    ("revisions", "Revisions shipped (origin)."),
    ("skipped", "Revisions not shipped, since they came from the cluster that the link ships to (origin)."),
    ("transactions", "Transactions that brought the position forward (both)."),
    ("repeated", "Revisions that arrived again and changed nothing (both)."),
    ("in_parts", "Revisions larger than one request, which were applied in parts (replica)."),
    ("conflicts", "Differing keys that a base copy left alone, since a link back exists (both)."),
    ("resets", "Frames that did not fit the receiver's window; each starts the window afresh (both)."),
    ("damaged", "Messages whose checksum did not match; each ends the stream, and a new hello goes on (both)."),
    ("frames", "Frames received (replica)."),
    ("refused", "Streams that the replica ended with a reason (replica)."),
    ("elections", "Elections that this sidecar won (origin)."),
    ("copies", "Base copies completed (origin)."),
    ("copied_keys_written", "Keys that completed base copies wrote (origin)."),
    ("copied_keys_equal", "Keys that completed base copies found equal already (origin)."),
    ("copied_keys_deleted", "Keys that completed base copies deleted (origin)."),
    ("stalls", "Times that the link began to stand still (both)."),
    ("other_histories", "Times that the link went on by itself with an origin that was restored or replaced (origin)."),
    ("verifications", "Comparisons of both sides that have ended, whatever their outcome (origin)."),
    ("foreign_keys", "Keys under the link's prefixes that somebody else wrote at the replica (replica)."),
    ("quarantined", "Revisions that the replica gave up and went on without (replica)."),
    ("held_back", "Revisions that were held back for their deletes (replica)."),
    ("mended_keys", "Keys that repairs put or deleted at the replica (origin)."),
];
/// Seconds from half a millisecond (a local etcd) to an outage.
const SECONDS_BUCKETS: [f64; 18] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];
/// From one revision a transaction, while the link keeps up, to the most that a backlog is merged to.
const REVISIONS_BUCKETS: [f64; 13] =
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0];
const HISTOGRAMS: [(&str, &str, &[f64]); 4] = [
    (REVISION_LAG_SECONDS, "From a revision's arrival at the origin to the word that it is applied.", &SECONDS_BUCKETS),
    (ROUND_TRIP_SECONDS, "From shipping a frame to the first ack that covers it.", &SECONDS_BUCKETS),
    (APPLY_SECONDS, "One transaction at the replica's etcd.", &SECONDS_BUCKETS),
    (BATCH_REVISIONS, "Origin revisions in one transaction at the replica.", &REVISIONS_BUCKETS),
];

/// The process has one recorder; it is installed by the first who asks.
static EXPORTER: LazyLock<Result<Exporter, MetricsError>> = LazyLock::new(build);

#[derive(Debug, Clone, thiserror::Error)]
pub enum MetricsError {
    #[error("the buckets of {metric} are not valid: {reason}")]
    Buckets { metric: &'static str, reason: String },
    #[error("another metrics recorder is installed in this process")]
    Taken,
}

/// One metric as `/metrics` describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metric {
    pub name: String,
    /// `gauge`, `counter` or `histogram`.
    pub kind: &'static str,
    pub meaning: &'static str,
}

/// Every metric that there can be, in the order of the table in docs/monitoring.md#metrics.
pub fn all() -> Vec<Metric> {
    let metric = |name: &str, kind, meaning| Metric { name: name.to_owned(), kind, meaning };
    let gauges = GAUGES.iter().map(|(name, meaning)| metric(name, "gauge", meaning));
    let counters = COUNTERS.iter().map(|(name, meaning)| metric(name, "counter", meaning));
    let counts = COUNTS.iter().map(|(count, meaning)| metric(&count_name(count), "counter", meaning));
    let histograms = HISTOGRAMS.iter().map(|(name, meaning, _)| metric(name, "histogram", meaning));
    gauges.chain(counters).chain(counts).chain(histograms).collect()
}

fn count_name(count: &str) -> String {
    format!("etcd_ferry_{count}_total")
}

/// Renders what was recorded.
#[derive(Debug, Clone)]
pub struct Exporter {
    handle: PrometheusHandle,
}

impl Exporter {
    /// All metrics in Prometheus' text format.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Records these links, and renders their metrics and the sidecar's own: a link that was removed is told of no more.
    pub fn render_links(&self, links: &[LinkStatus]) -> String {
        links.iter().for_each(record_link);
        let known: Vec<String> = links.iter().map(|link| label_text(&link.link, link.side)).collect();
        only_of(&known, &self.render())
    }

    /// Folds recorded samples into their buckets. To be called every few seconds: without it they pile up until the next scrape.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

/// Installs the process' recorder, or hands out the one that is installed already.
pub fn install() -> Result<Exporter, MetricsError> {
    EXPORTER.clone()
}

fn build() -> Result<Exporter, MetricsError> {
    let mut builder = PrometheusBuilder::new();
    for (metric, _, buckets) in HISTOGRAMS {
        builder = builder
            .set_buckets_for_metric(Matcher::Full(metric.to_owned()), buckets)
            .map_err(|e| MetricsError::Buckets { metric, reason: e.to_string() })?;
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|_| MetricsError::Taken)?;
    GAUGES.iter().for_each(|(name, meaning)| describe_gauge!(*name, *meaning));
    COUNTERS.iter().for_each(|(name, meaning)| describe_counter!(*name, *meaning));
    COUNTS.iter().for_each(|(count, meaning)| describe_counter!(count_name(count), *meaning));
    HISTOGRAMS.iter().for_each(|(name, meaning, _)| describe_histogram!(*name, *meaning));
    Ok(Exporter { handle })
}

/// Sets every gauge and counter of a link from one snapshot. Its `counts` become `etcd_ferry_<count>_total`.
pub fn record_link(status: &LinkStatus) {
    let labels = labels(&status.link, status.side);
    for state in LinkState::ALL {
        let mut labels = labels.clone();
        labels.push(Label::new("state", state.as_str()));
        gauge!(LINK_STATE, labels).set(if state == status.state { 1.0 } else { 0.0 });
    }
    let (copy, canary) = (status.copy.unwrap_or_default(), status.canary.unwrap_or_default());
    let short = status.limits.as_ref().is_some_and(|limits| limits.verdict == LimitsVerdict::Short);
    let queue_bytes: u64 = status.stages.iter().map(|stage| stage.queue_bytes).sum();
    let queue_bytes_max: u64 = status.stages.iter().map(|stage| stage.queue_bytes_max).sum();
    // What a sidecar found while it shipped is for the one that ships now to find again.
    let compares = status.role != Some(Role::Standby);
    let expected = |foreign: &&ForeignStatus| foreign.expected.is_empty();
    let foreign_keys = status.foreign_writes.as_ref().filter(expected).map_or(0, |foreign| foreign.keys);
    for (name, value) in [
        (LAG_SECONDS, status.lag_seconds),
        (LAG_REVISIONS, status.lag_revisions as f64),
        (RPO_SECONDS, status.rpo_seconds),
        (RPO_REVISIONS, status.rpo_revisions as f64),
        (STALLED_SECONDS, status.stalled_seconds),
        (CANARY_SECONDS, canary.seconds.max(canary.waiting_seconds)),
        (EPOCH, status.epoch.0 as f64),
        (TERM, status.term.0 as f64),
        (SHIPPER, if status.role == Some(Role::Shipper) { 1.0 } else { 0.0 }),
        (SEQ, status.seq.0 as f64),
        (APPLIED_SEQ, status.applied_seq.0 as f64),
        (DURABLE_SEQ, status.durable_seq.0 as f64),
        (ORIGIN_REVISION, status.origin_revision.0 as f64),
        (HEAD_REVISION, status.head_revision.0 as f64),
        (COPY_DONE_KEYS, copy.keys_done as f64),
        (COPY_EXPECTED_KEYS, copy.keys_total as f64),
        (VERIFIED_TIMESTAMP_SECONDS, status.verification.verified_at_ms as f64 / 1000.0),
        (VERIFIED_REVISION, status.verification.verified_revision.0 as f64),
        (DIFFERING_KEYS, if compares { status.verification.differing_now() as f64 } else { 0.0 }),
        (VERIFICATION_FAILED, if compares && status.verification.outcome == Outcome::Failed { 1.0 } else { 0.0 }),
        (QUARANTINED_REVISIONS, status.quarantined_revisions as f64),
        (LIMITS_SHORT, if short { 1.0 } else { 0.0 }),
        (QUEUE_BYTES, queue_bytes as f64),
        (QUEUE_LIMIT_BYTES, queue_bytes_max as f64),
        (UNMENDED_FOREIGN_KEYS, foreign_keys as f64),
    ] {
        gauge!(name, labels.clone()).set(value);
    }
    counter!(RAW_BYTES_TOTAL, labels.clone()).absolute(status.bytes_raw);
    counter!(SENT_BYTES_TOTAL, labels.clone()).absolute(status.bytes_sent);
    for (count, value) in &status.counts {
        debug_assert!(COUNTS.iter().any(|(known, _)| known == count), "the count {count} is not described");
        counter!(count_name(count), labels.clone()).absolute(*value);
    }
}

/// Sets what there is of a sidecar's certificates.
pub fn record_certificates(status: &CertificatesStatus) {
    let expiries = [
        ("own", Some(status.own_expires_at)),
        ("ca", Some(status.ca_expires_at)),
        ("crl", status.crl_expires_at),
        ("etcd", status.etcd_expires_at),
        ("etcd_ca", status.etcd_ca_expires_at),
    ];
    for (certificate, expires_at) in expiries {
        if let Some(expires_at) = expires_at {
            let labels = vec![Label::new("certificate", certificate)];
            gauge!(CERTIFICATE_EXPIRY_TIMESTAMP_SECONDS, labels).set(expires_at as f64);
        }
    }
    gauge!(CERTIFICATES_REFUSED).set(if status.refused.is_empty() { 0.0 } else { 1.0 });
    counter!(CERTIFICATE_RELOADS_TOTAL).absolute(status.reloads);
}

/// When the certificate in use is to be renewed; 0 where no PKI does it.
pub fn record_renewal(renew_at: i64) {
    gauge!(CERTIFICATE_RENEWAL_TIMESTAMP_SECONDS).set(renew_at as f64);
    for counter in [PKI_CERTIFICATES_TOTAL, PKI_FAILURES_TOTAL] {
        counter!(counter).increment(0);
    }
}

pub fn count_pki_certificate() {
    counter!(PKI_CERTIFICATES_TOTAL).increment(1);
}

pub fn count_pki_failure() {
    counter!(PKI_FAILURES_TOTAL).increment(1);
}

/// Sets what became of the configuration when it was last read.
pub fn record_configuration(refused: bool, needs_restart: bool, reloads: u64) {
    gauge!(CONFIGURATION_REFUSED).set(if refused { 1.0 } else { 0.0 });
    gauge!(CONFIGURATION_NEEDS_RESTART).set(if needs_restart { 1.0 } else { 0.0 });
    counter!(CONFIGURATION_RELOADS_TOTAL).absolute(reloads);
}

pub fn count_spans(spans: u64) {
    counter!(TRACE_SPANS_TOTAL).increment(spans);
}

pub fn count_dropped_spans(spans: u64) {
    counter!(TRACE_SPANS_DROPPED_TOTAL).increment(spans);
}

/// One revision, by the origin's clock: from its arrival at the origin to the ack that says it is applied.
pub fn observe_lag(link: &LinkName, seconds: f64) {
    histogram!(REVISION_LAG_SECONDS, labels(link, Side::Origin)).record(seconds);
}

/// One frame, at the origin: from shipping it to the first ack that covers it.
pub fn observe_round_trip(link: &LinkName, seconds: f64) {
    histogram!(ROUND_TRIP_SECONDS, labels(link, Side::Origin)).record(seconds);
}

/// One transaction at the replica's etcd, and how many origin revisions it carried.
pub fn observe_apply(link: &LinkName, seconds: f64, revisions: u64) {
    let labels = labels(link, Side::Replica);
    histogram!(APPLY_SECONDS, labels.clone()).record(seconds);
    histogram!(BATCH_REVISIONS, labels).record(revisions as f64);
}

fn labels(link: &LinkName, side: Side) -> Vec<Label> {
    vec![Label::new("link", link.as_str().to_owned()), Label::new("side", side.as_str())]
}

/// As [`labels`] are rendered.
fn label_text(link: &LinkName, side: Side) -> String {
    format!("link=\"{link}\",side=\"{}\"", side.as_str())
}

/// The lines that are about none of the links, or about one of the `known`. The recorder forgets nothing, and a frozen figure of a link that
/// is gone would raise alarms for ever.
fn only_of(known: &[String], text: &str) -> String {
    let is_known = |labels: &str| known.iter().any(|known| labels.starts_with(known.as_str()));
    let is_told = |line: &&str| match line.split_once('{') {
        Some((_, labels)) if !line.starts_with('#') && labels.starts_with("link=") => is_known(labels),
        Some(_) | None => true,
    };
    text.split_inclusive('\n').filter(is_told).collect()
}

#[cfg(test)]
mod tests;
