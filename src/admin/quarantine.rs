//! Job: ask a running sidecar about the revisions that a link's replica goes on without, and print them.
//! Input: where the sidecar listens, a link, a seq. Output: replies, their JSON and their text.
//! Edge: one call for each question.
//! Always true: keys and sizes are printed, never a value; nothing printed holds a control character.

use super::client::{ClientError, Connection, ask, dialled};
use super::proto::{Link, Quarantined, QuarantinedRequest, QuarantinedRevision, RetryQuarantinedReply, StatusReply};
use super::show::printable;
use super::table::aligned;
use super::verification::moment;
use serde::Serialize;

/// The link as its replica's sidecar tells it, from that sidecar's status.
pub fn at_replica<'a>(connection: &Connection, reply: &'a StatusReply, link: &str) -> Result<&'a Link, ClientError> {
    let at = dialled(connection.admin);
    let of_link: Vec<&Link> = reply.links.iter().filter(|known| known.link == link).collect();
    if let Some(replica) = of_link.iter().find(|known| known.side == "replica") {
        return Ok(replica);
    }
    let reason = match of_link.first() {
        Some(origin) => format!(
            "this sidecar is the origin of link {link}: ask the sidecar at its other side ({})",
            printable(&origin.peer)
        ),
        None => {
            let known: Vec<String> = reply.links.iter().map(|known| printable(&known.link)).collect();
            format!("there is no link {link:?} here; there are: {}", known.join(", "))
        }
    };
    Err(ClientError::Refused { at, reason })
}

/// What is kept of one revision.
pub async fn show(connection: &Connection, link: &str, seq: u64) -> Result<QuarantinedRevision, ClientError> {
    let request = QuarantinedRequest { link: link.to_owned(), seq };
    ask(connection, async |mut client| client.show_quarantined(request).await).await
}

/// Brings its keys to what they are at the origin.
pub async fn retry(connection: &Connection, link: &str, seq: u64) -> Result<RetryQuarantinedReply, ClientError> {
    let request = QuarantinedRequest { link: link.to_owned(), seq };
    ask(connection, async |mut client| client.retry_quarantined(request).await).await
}

/// Takes it out of quarantine as it is.
pub async fn discard(connection: &Connection, link: &str, seq: u64) -> Result<(), ClientError> {
    let request = QuarantinedRequest { link: link.to_owned(), seq };
    ask(connection, async |mut client| client.discard_quarantined(request).await).await.map(|_| ())
}

/// One of `status --json`, and of `quarantine list --json`.
#[derive(Serialize)]
pub(super) struct QuarantinedJson<'a> {
    seq: u64,
    origin_revision: u64,
    keys: u64,
    /// RFC 3339; `null`: not known.
    at: Option<String>,
    reason: &'a str,
}

impl<'a> QuarantinedJson<'a> {
    pub fn of(entry: &'a Quarantined) -> Self {
        let Quarantined { seq, origin_revision, keys, at, reason } = entry;
        Self { seq: *seq, origin_revision: *origin_revision, keys: *keys, at: moment(*at), reason }
    }
}

/// For scripts.
pub fn list_json(link: &Link) -> String {
    let all: Vec<QuarantinedJson<'_>> = link.quarantined.iter().map(QuarantinedJson::of).collect();
    // Strings and numbers: serde_json has no way to fail on these.
    serde_json::to_string_pretty(&all).unwrap_or_default()
}

/// For people: a table, without the last line's break.
pub fn list_text(link: &Link) -> String {
    if link.quarantined.is_empty() {
        return format!("link {}: nothing is in quarantine", link.link);
    }
    let row = |entry: &Quarantined| {
        let Quarantined { seq, origin_revision, keys, at, reason } = entry;
        let at = moment(*at).unwrap_or_default();
        [seq.to_string(), origin_revision.to_string(), keys.to_string(), at, reason.clone()]
    };
    let mut text = aligned(["SEQ", "REVISION", "KEYS", "GIVEN UP", "REASON"], link.quarantined.iter().map(row));
    text.truncate(text.trim_end().len());
    text
}

/// What `status` says of a link's quarantine; `None`: it is empty.
pub(super) fn note(link: &Link) -> Option<String> {
    let count = match link.quarantined_revisions {
        0 => return None,
        1 => "1 revision".to_owned(),
        count => format!("{count} revisions"),
    };
    let named = link.link.as_str();
    Some(if link.side == "replica" {
        format!("goes on without {count}, whose keys differ: `etcd-ferry quarantine list {named}` tells which")
    } else {
        format!("the replica goes on without {count}: `etcd-ferry quarantine list {named}` at its sidecar tells which")
    })
}

#[derive(Serialize)]
struct RevisionJson<'a> {
    epoch: u64,
    seq: u64,
    origin_revision: u64,
    digest: &'a str,
    reason: &'a str,
    refusals: u64,
    at: Option<String>,
    part: u64,
    keys: Vec<KeyJson<'a>>,
}

#[derive(Serialize)]
struct KeyJson<'a> {
    key: &'a str,
    deleted: bool,
    /// `null`: it was deleted.
    value_bytes: Option<u64>,
}

/// For scripts.
pub fn show_json(revision: &QuarantinedRevision) -> String {
    let json = RevisionJson {
        epoch: revision.epoch,
        seq: revision.seq,
        origin_revision: revision.origin_revision,
        digest: &revision.digest,
        reason: &revision.reason,
        refusals: revision.refusals,
        at: moment(revision.at),
        part: revision.part,
        keys: revision
            .keys
            .iter()
            .map(|key| KeyJson {
                key: &key.key,
                deleted: key.deleted,
                value_bytes: (!key.deleted).then_some(key.value_bytes),
            })
            .collect(),
    };
    // Strings, numbers and lists of them: serde_json has no way to fail on these.
    serde_json::to_string_pretty(&json).unwrap_or_default()
}

/// For people: why, then each key with its size.
pub fn show_lines(revision: &QuarantinedRevision) -> Vec<String> {
    let QuarantinedRevision { epoch, seq, origin_revision, digest, reason, refusals, at, part, keys } = revision;
    let times = if *refusals == 1 { "once".to_owned() } else { format!("{refusals} times") };
    let at = moment(*at).unwrap_or_default();
    let mut lines = vec![
        format!("seq {seq} of epoch {epoch}: origin revision {origin_revision}, digest {digest}"),
        printable(&format!("given up {at}, refused {times}: {reason}")),
    ];
    if *part > 0 {
        lines.push(format!("{part} of its changes, in the order below, were applied before"));
    }
    lines.extend(keys.iter().map(|key| {
        let what = if key.deleted { "deleted".to_owned() } else { format!("a value of {} bytes", key.value_bytes) };
        printable(&format!("  {}: {what}", key.key))
    }));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::proto::QuarantinedKey;

    fn link(side: &str, quarantined: Vec<Quarantined>) -> Link {
        let quarantined_revisions = quarantined.len() as u64;
        let (link, side) = ("config".to_owned(), side.to_owned());
        Link { link, side, peer: "the.other".to_owned(), quarantined_revisions, quarantined, ..Link::default() }
    }

    fn entry() -> Quarantined {
        let reason = "too\nlarge".to_owned();
        Quarantined { seq: 5, origin_revision: 40, keys: 1, at: 1_790_000_000.5, reason }
    }

    #[test]
    fn each_revision_is_one_line_of_a_table_and_an_empty_quarantine_says_so() {
        assert_eq!(list_text(&link("replica", Vec::new())), "link config: nothing is in quarantine");
        let text = list_text(&link("replica", vec![entry(), Quarantined { seq: 17, at: 0.0, ..entry() }]));
        let lines = [
            "SEQ  REVISION  KEYS  GIVEN UP              REASON",
            "5    40        1     2026-09-21T14:13:20Z  too large",
            "17   40        1                           too large",
        ];
        assert_eq!(text, lines.join("\n"));
        let json = list_json(&link("replica", vec![entry()]));
        let json: String = json.lines().map(str::trim_start).collect();
        assert_eq!(
            json,
            r#"[{"seq": 5,"origin_revision": 40,"keys": 1,"at": "2026-09-21T14:13:20Z","reason": "too\nlarge"}]"#
        );
    }

    #[test]
    fn what_is_kept_of_a_revision_names_its_keys_and_their_sizes() {
        let key = |key: &str, deleted, value_bytes| QuarantinedKey { key: key.to_owned(), deleted, value_bytes };
        let revision = QuarantinedRevision {
            epoch: 2,
            seq: 5,
            origin_revision: 40,
            digest: "ab".to_owned(),
            reason: "too large".to_owned(),
            refusals: 8,
            at: 1_790_000_000.0,
            part: 1,
            keys: vec![key("/a", true, 0), key("/b\\x01", false, 9)],
        };
        assert_eq!(
            show_lines(&revision),
            [
                "seq 5 of epoch 2: origin revision 40, digest ab",
                "given up 2026-09-21T14:13:20Z, refused 8 times: too large",
                "1 of its changes, in the order below, were applied before",
                "  /a: deleted",
                "  /b\\x01: a value of 9 bytes",
            ]
        );
        let json = show_json(&revision);
        assert!(json.contains("\"value_bytes\": null") && json.contains("\"value_bytes\": 9"), "{json}");
    }

    #[test]
    fn the_status_says_that_a_link_goes_on_without_revisions_and_who_tells_which() {
        assert_eq!(note(&link("replica", Vec::new())), None);
        let here = note(&link("replica", vec![entry(), entry()])).unwrap();
        assert!(here.starts_with("goes on without 2 revisions") && here.contains("quarantine list config"), "{here}");
        let there = note(&link("origin", vec![entry()])).unwrap();
        assert!(
            there.starts_with("the replica goes on without 1 revision:") && there.contains("at its sidecar"),
            "{there}"
        );
    }
}
