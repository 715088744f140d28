//! Job: print a sidecar's status as JSON for scripts.
//! Input: a reply. Output: text.
//! Pure: no clock, no I/O.
//! Always true: nothing printed holds a control character; the JSON's names and their order are part of the product.

use super::limits::LimitsJson;
use super::proto::{Canary, Certificates, EtcdMember, Link, StatusReply};
use super::quarantine::QuarantinedJson;
use super::verification::{VerificationJson, moment};
use serde::Serialize;
use std::collections::BTreeMap;

/// The JSON of `status --json`; its names and their order are part of the product.
#[derive(Serialize)]
struct StatusJson<'a> {
    region: &'a str,
    node: &'a str,
    version: &'a str,
    links: Vec<LinkJson<'a>>,
    etcd: Vec<MemberJson<'a>>,
    certificates: Option<CertificatesJson<'a>>,
}

#[derive(Serialize)]
struct CertificatesJson<'a> {
    subject: &'a str,
    sans: &'a [String],
    own_expires_at: i64,
    ca_expires_at: i64,
    crl_expires_at: Option<i64>,
    etcd_expires_at: Option<i64>,
    etcd_ca_expires_at: Option<i64>,
    reloads: u64,
    refused: &'a str,
}

#[derive(Serialize)]
struct MemberJson<'a> {
    endpoint: &'a str,
    ok: bool,
    version: &'a str,
    leader: bool,
    verdict: &'a str,
    detail: &'a str,
}

#[derive(Serialize)]
struct LinkJson<'a> {
    link: &'a str,
    side: &'a str,
    state: &'a str,
    role: Option<&'a str>,
    shipper: &'a str,
    reason: &'a str,
    peer: &'a str,
    epoch: u64,
    term: u64,
    seq: u64,
    origin_revision: u64,
    head_revision: u64,
    applied_seq: u64,
    durable_seq: u64,
    lag_revisions: u64,
    lag_seconds: f64,
    rpo_revisions: u64,
    rpo_seconds: f64,
    stalled_seconds: f64,
    bytes_raw: u64,
    bytes_sent: u64,
    counts: BTreeMap<&'a str, u64>,
    copy: Option<CopyJson>,
    canary: Option<CanaryJson>,
    limits: Option<LimitsJson<'a>>,
    verification: Option<VerificationJson<'a>>,
    foreign_writes: Option<ForeignJson<'a>>,
    quarantined_revisions: u64,
    quarantined: Vec<QuarantinedJson<'a>>,
    paused: Option<PausedJson<'a>>,
}

#[derive(Serialize)]
struct PausedJson<'a> {
    /// RFC 3339.
    at: Option<String>,
    by: &'a str,
}

#[derive(Serialize)]
struct ForeignJson<'a> {
    checked_revision: u64,
    revisions: u64,
    keys: u64,
    first_revision: u64,
    last_revision: u64,
    first_keys: &'a [String],
    expected: &'a str,
    trouble: &'a str,
}

#[derive(Serialize)]
struct CanaryJson {
    seconds: f64,
    waiting_seconds: f64,
}

#[derive(Serialize)]
struct CopyJson {
    keys_done: u64,
    keys_total: u64,
}

/// For scripts.
pub fn status_json(reply: &StatusReply) -> String {
    // Strings, numbers and lists of them: serde_json has no way to fail on these.
    serde_json::to_string_pretty(&json_of(reply)).unwrap_or_default()
}

/// The same in one line, for scripts that read one after the other.
pub fn status_line(reply: &StatusReply) -> String {
    serde_json::to_string(&json_of(reply)).unwrap_or_default()
}

fn json_of(reply: &StatusReply) -> StatusJson<'_> {
    StatusJson {
        region: &reply.region,
        node: &reply.node,
        version: &reply.version,
        links: reply.links.iter().map(link_json).collect(),
        etcd: reply.etcd.iter().map(member_json).collect(),
        certificates: reply.certificates.as_ref().map(certificates_json),
    }
}

fn certificates_json(certificates: &Certificates) -> CertificatesJson<'_> {
    let Certificates {
        subject,
        sans,
        own_expires_at,
        ca_expires_at,
        crl_expires_at,
        reloads,
        refused,
        etcd_expires_at,
        etcd_ca_expires_at,
    } = certificates;
    CertificatesJson {
        subject,
        sans,
        own_expires_at: *own_expires_at,
        ca_expires_at: *ca_expires_at,
        crl_expires_at: *crl_expires_at,
        etcd_expires_at: *etcd_expires_at,
        etcd_ca_expires_at: *etcd_ca_expires_at,
        reloads: *reloads,
        refused,
    }
}

fn member_json(member: &EtcdMember) -> MemberJson<'_> {
    let EtcdMember { endpoint, ok, version, leader, verdict, detail } = member;
    MemberJson { endpoint, ok: *ok, version, leader: *leader, verdict, detail }
}

fn link_json(link: &Link) -> LinkJson<'_> {
    LinkJson {
        link: &link.link,
        side: &link.side,
        state: &link.state,
        role: Some(link.role.as_str()).filter(|role| !role.is_empty()),
        shipper: &link.shipper,
        reason: &link.reason,
        peer: &link.peer,
        epoch: link.epoch,
        term: link.term,
        seq: link.seq,
        origin_revision: link.origin_revision,
        head_revision: link.head_revision,
        applied_seq: link.applied_seq,
        durable_seq: link.durable_seq,
        lag_revisions: link.lag_revisions,
        lag_seconds: link.lag_seconds,
        rpo_revisions: link.rpo_revisions,
        rpo_seconds: link.rpo_seconds,
        stalled_seconds: link.stalled_seconds,
        bytes_raw: link.bytes_raw,
        bytes_sent: link.bytes_sent,
        counts: link.counts.iter().map(|(name, count)| (name.as_str(), *count)).collect(),
        copy: link.copy.as_ref().map(|copy| CopyJson { keys_done: copy.keys_done, keys_total: copy.keys_total }),
        canary: link.canary.map(|Canary { seconds, waiting_seconds }| CanaryJson { seconds, waiting_seconds }),
        limits: link.limits.as_ref().map(LimitsJson::of),
        verification: link.verification.as_ref().map(VerificationJson::of),
        foreign_writes: link.foreign_writes.as_ref().map(|foreign| ForeignJson {
            checked_revision: foreign.checked_revision,
            revisions: foreign.revisions,
            keys: foreign.keys,
            first_revision: foreign.first_revision,
            last_revision: foreign.last_revision,
            first_keys: &foreign.first_keys,
            expected: &foreign.expected,
            trouble: &foreign.trouble,
        }),
        quarantined_revisions: link.quarantined_revisions,
        quarantined: link.quarantined.iter().map(QuarantinedJson::of).collect(),
        paused: link.paused.as_ref().map(|paused| PausedJson { at: moment(paused.at), by: &paused.by }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::proto::Copy;
    use super::super::show::tests::{link, member, reply};
    use super::*;

    #[test]
    fn the_json_has_the_promised_names_in_the_promised_order() {
        let mut link = link();
        link.counts = [("skipped".to_owned(), 1), ("repeated".to_owned(), 4)].into();
        link.copy = Some(Copy { keys_done: 5, keys_total: 9 });
        link.canary = Some(Canary { seconds: 0.08, waiting_seconds: 0.0 });
        (link.role, link.shipper) = ("shipper".to_owned(), "us-east-1-a".to_owned());
        let mut reply = reply(vec![link]);
        reply.etcd.push(member("3.5.1", "refused", "upgrade it"));
        reply.certificates = Some(Certificates {
            subject: "CN=us-east-1".to_owned(),
            sans: vec!["spiffe://etcd-ferry.dev/region/us-east-1".to_owned()],
            own_expires_at: 1_800_000_000,
            ca_expires_at: 1_900_000_000,
            reloads: 2,
            ..Certificates::default()
        });
        let json = status_json(&reply);
        let one_line: String = json.lines().map(str::trim_start).collect::<Vec<_>>().join(" ");
        assert_eq!(
            one_line,
            "{ \"region\": \"us-east-1\", \"node\": \"us-east-1-a\", \"version\": \"0.1.0\", \"links\": [ { \
             \"link\": \"config\", \"side\": \"origin\", \"state\": \"following\", \
             \"role\": \"shipper\", \"shipper\": \"us-east-1-a\", \"reason\": \"\", \"peer\": \"spiffe://etcd-ferry.dev/region/cn-hangzhou\", \"epoch\": 2, \"term\": 0, \"seq\": 120, \
             \"origin_revision\": 4000, \"head_revision\": 4002, \"applied_seq\": 118, \"durable_seq\": 119, \
             \"lag_revisions\": 2, \"lag_seconds\": 0.0421, \"rpo_revisions\": 1, \"rpo_seconds\": 0.0209, \"stalled_seconds\": 0.0, \
             \"bytes_raw\": 14000, \"bytes_sent\": 1000, \"counts\": { \"repeated\": 4, \"skipped\": 1 }, \
             \"copy\": { \"keys_done\": 5, \"keys_total\": 9 }, \"canary\": { \"seconds\": 0.08, \"waiting_seconds\": 0.0 }, \"limits\": null, \"verification\": null, \
             \"foreign_writes\": null, \"quarantined_revisions\": 0, \"quarantined\": [], \"paused\": null } ], \"etcd\": [ { \"endpoint\": \"http://127.0.0.1:2379\", \"ok\": true, \
             \"version\": \"3.5.1\", \"leader\": true, \"verdict\": \"refused\", \"detail\": \"upgrade it\" } ], \"certificates\": { \"subject\": \"CN=us-east-1\", \"sans\": [ \"spiffe://etcd-ferry.dev/region/us-east-1\" ], \
             \"own_expires_at\": 1800000000, \"ca_expires_at\": 1900000000, \"crl_expires_at\": null, \
             \"etcd_expires_at\": null, \"etcd_ca_expires_at\": null, \"reloads\": 2, \"refused\": \"\" } }"
        );
    }
}
