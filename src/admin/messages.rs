//! Job: what links and etcd's members say of themselves, as the admin service's messages.
//! Input: statuses, records. Output: the messages of proto/admin.proto.
//! Pure: no clock, no I/O, no async.
//! Always true: every field of a status is in its message, or is left out here by name; keys are escaped where they are no printable ASCII.

use super::limits;
use super::proto::{
    Canary, Certificates, Copy, DifferingRange, EtcdMember, ForeignWrites, Link, Paused, Quarantined, QuarantinedKey,
    QuarantinedRevision, Verification,
};
use crate::model::{self, LinkStatus, Record};

pub(super) fn link_message(status: LinkStatus) -> Link {
    // Taken apart by name, so that a field that is added there is not forgotten here. The rest of stages is for `/healthz?full=1`.
    let LinkStatus {
        link,
        side,
        state,
        role,
        shipper,
        reason,
        peer,
        epoch,
        term,
        seq,
        origin_revision,
        head_revision,
        applied_seq,
        durable_seq,
        lag_revisions,
        lag_seconds,
        rpo_revisions,
        rpo_seconds,
        stalled_seconds,
        bytes_raw,
        bytes_sent,
        counts,
        copy,
        canary,
        limits,
        verification,
        foreign_writes,
        quarantined_revisions,
        quarantined,
        paused,
        stages,
    } = status;
    Link {
        link: link.to_string(),
        side: side.as_str().to_owned(),
        state: state.as_str().to_owned(),
        role: role.map_or_else(String::new, |role| role.as_str().to_owned()),
        shipper,
        reason,
        peer,
        epoch: epoch.0,
        term: term.0,
        seq: seq.0,
        origin_revision: origin_revision.0,
        head_revision: head_revision.0,
        applied_seq: applied_seq.0,
        durable_seq: durable_seq.0,
        lag_revisions,
        lag_seconds,
        rpo_revisions,
        rpo_seconds,
        stalled_seconds,
        bytes_raw,
        bytes_sent,
        counts: counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect(),
        copy: copy.map(|copy| Copy { keys_done: copy.keys_done, keys_total: copy.keys_total }),
        canary: canary.map(|canary| Canary { seconds: canary.seconds, waiting_seconds: canary.waiting_seconds }),
        limits: limits.map(limits::message),
        verification: Some(verification_message(verification)),
        foreign_writes: foreign_writes.map(foreign_message),
        quarantined_revisions,
        quarantined: quarantined.into_iter().map(quarantined_message).collect(),
        paused: paused.map(paused_message),
        queue_bytes: stages.iter().map(|stage| stage.queue_bytes).sum(),
        queue_bytes_max: stages.iter().map(|stage| stage.queue_bytes_max).sum(),
    }
}

pub(super) fn paused_message(paused: model::Paused) -> Paused {
    let model::Paused { at_ms, by } = paused;
    Paused { at: at_ms as f64 / 1000.0, by }
}

fn quarantined_message(entry: model::QuarantinedStatus) -> Quarantined {
    let model::QuarantinedStatus { seq, revision, keys, at_ms, reason } = entry;
    Quarantined { seq: seq.0, origin_revision: revision.0, keys, at: at_ms as f64 / 1000.0, reason }
}

pub(super) fn record_message(record: Record) -> QuarantinedRevision {
    let key = |changed: model::Changed| QuarantinedKey {
        key: changed.key.escape_ascii().to_string(),
        deleted: changed.value_bytes.is_none(),
        value_bytes: changed.value_bytes.unwrap_or(0),
    };
    QuarantinedRevision {
        epoch: record.epoch.0,
        seq: record.seq.0,
        origin_revision: record.revision.0,
        digest: record.digest.to_string(),
        reason: record.reason,
        refusals: record.refusals.into(),
        at: record.at_ms as f64 / 1000.0,
        part: record.part,
        keys: record.changes.into_iter().map(key).collect(),
    }
}

pub(super) fn certificates_message(certificates: model::CertificatesStatus) -> Certificates {
    let model::CertificatesStatus {
        subject,
        sans,
        own_expires_at,
        ca_expires_at,
        crl_expires_at,
        etcd_expires_at,
        etcd_ca_expires_at,
        reloads,
        refused,
    } = certificates;
    Certificates {
        subject,
        sans,
        own_expires_at,
        ca_expires_at,
        crl_expires_at,
        reloads,
        refused,
        etcd_expires_at,
        etcd_ca_expires_at,
    }
}

pub(super) fn member_message(member: model::EtcdHealth) -> EtcdMember {
    let model::EtcdHealth { endpoint, ok, version, leader, verdict, detail } = member;
    EtcdMember { endpoint, ok, version, leader, verdict: verdict.to_owned(), detail }
}

fn foreign_message(foreign: model::ForeignStatus) -> ForeignWrites {
    ForeignWrites {
        checked_revision: foreign.checked_revision.0,
        revisions: foreign.revisions,
        keys: foreign.keys,
        first_revision: foreign.first_revision.0,
        last_revision: foreign.last_revision.0,
        first_keys: foreign.first_keys,
        expected: foreign.expected,
        trouble: foreign.trouble,
    }
}

pub(super) fn verification_message(verification: model::Verification) -> Verification {
    let model::Verification {
        verified_revision,
        verified_at_ms,
        differing_keys,
        expected_keys,
        differing_ranges,
        runs,
        ended_at_ms,
        outcome,
        detail,
        running,
    } = verification;
    let range = |range: model::DifferingRange| DifferingRange {
        from: range.first.escape_ascii().to_string(),
        to: range.last.escape_ascii().to_string(),
        keys: range.keys,
    };
    let progress = running.unwrap_or_default();
    Verification {
        verified_revision: verified_revision.0,
        verified_at: verified_at_ms as f64 / 1000.0,
        differing_keys,
        differing_ranges: differing_ranges.into_iter().map(range).collect(),
        runs,
        outcome: outcome.as_str().to_owned(),
        detail,
        running: running.is_some(),
        parts_done: progress.parts_done,
        parts_total: progress.parts_total,
        expected_keys,
        ended_at: ended_at_ms as f64 / 1000.0,
    }
}
