//! Job: ask a running sidecar to compare both sides of a link, or to mend what differs, wait for the outcome, and print it.
//! Input: where the sidecar listens, a link. Output: how far it is, the outcome, its JSON and its text.
//! Edge: one call, whose answer comes in pieces.
//! Always true: what is printed of keys holds no control character; the outcome is that of a comparison that began after the call.

use super::client::{ClientError, Connection, TIMEOUT, connect, dialled, refused};
use super::proto::admin_client::AdminClient;
use super::proto::{DifferingRange, RepairRequest, Verification, VerifyRequest};
use crate::certs::load::rfc3339;
use serde::Serialize;
use time::OffsetDateTime;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

/// Compares both sides; to be asked of the sidecar at the link's origin. `show` is told how far it is.
pub async fn verify(
    connection: &Connection,
    link: &str,
    show: impl FnMut(&Verification),
) -> Result<Verification, ClientError> {
    let request = VerifyRequest { link: link.to_owned() };
    outcome(connection, async |mut client| client.verify(request).await, show).await
}

/// Compares both sides and ships what differs; to be asked of the sidecar at the link's origin.
pub async fn repair(
    connection: &Connection,
    link: &str,
    allow_deletes: bool,
    show: impl FnMut(&Verification),
) -> Result<Verification, ClientError> {
    let request = RepairRequest { link: link.to_owned(), allow_deletes };
    outcome(connection, async |mut client| client.repair(request).await, show).await
}

async fn outcome(
    connection: &Connection,
    call: impl AsyncFnOnce(AdminClient<Channel>) -> Result<Response<Streaming<Verification>>, Status>,
    mut show: impl FnMut(&Verification),
) -> Result<Verification, ClientError> {
    let late = || ClientError::Timeout { at: dialled(connection.admin) };
    let calling = async {
        let client = AdminClient::new(connect(connection).await?);
        call(client).await.map_err(|status| refused(connection, &status))
    };
    let mut words = tokio::time::timeout(TIMEOUT, calling).await.map_err(|_| late())??.into_inner();
    let mut last = None;
    while let Some(word) = words.message().await.map_err(|status| refused(connection, &status))? {
        show(&word);
        last = Some(word);
    }
    last.ok_or_else(late)
}

/// The JSON of `verify --json`, and of each link's `verification` in `status --json`.
#[derive(Serialize)]
pub struct VerificationJson<'a> {
    outcome: &'a str,
    verified_revision: u64,
    /// RFC 3339; `null`: not yet.
    verified_at: Option<String>,
    differing_keys: u64,
    expected_keys: u64,
    differing_ranges: Vec<RangeJson<'a>>,
    detail: &'a str,
    runs: u64,
    /// RFC 3339; `null`: none has ended since the sidecar started.
    ended_at: Option<String>,
    running: Option<PartsJson>,
}

#[derive(Serialize)]
struct RangeJson<'a> {
    from: &'a str,
    to: &'a str,
    keys: u64,
}

#[derive(Serialize)]
struct PartsJson {
    parts_done: u64,
    parts_total: u64,
}

impl<'a> VerificationJson<'a> {
    pub fn of(verification: &'a Verification) -> Self {
        let range = |range: &'a DifferingRange| RangeJson { from: &range.from, to: &range.to, keys: range.keys };
        let (parts_done, parts_total) = (verification.parts_done, verification.parts_total);
        Self {
            outcome: &verification.outcome,
            verified_revision: verification.verified_revision,
            verified_at: moment(verification.verified_at),
            differing_keys: verification.differing_keys,
            expected_keys: verification.expected_keys,
            differing_ranges: verification.differing_ranges.iter().map(range).collect(),
            detail: &verification.detail,
            runs: verification.runs,
            ended_at: moment(verification.ended_at),
            running: verification.running.then_some(PartsJson { parts_done, parts_total }),
        }
    }
}

/// For scripts.
pub fn verification_json(verification: &Verification) -> String {
    // Strings, numbers and lists of them: serde_json has no way to fail on these.
    serde_json::to_string_pretty(&VerificationJson::of(verification)).unwrap_or_default()
}

/// For people: what is known of both sides being equal, in lines; none before anything is.
pub fn verification_lines(verification: &Verification) -> Vec<String> {
    let mut lines = Vec::new();
    if verification.running {
        lines.push(progress(verification));
    }
    let ended = moment(verification.ended_at);
    let when = ended.as_deref().map_or_else(String::new, |at| format!(", {at}"));
    if verification.outcome == "failed" {
        lines.push(format!("the last comparison failed{when}: {}", verification.detail));
    }
    if let Some(at) = moment(verification.verified_at) {
        let revision = verification.verified_revision;
        // That may be the revision of the last comparison too: the replica can change without the origin.
        let differed = verification.differing_keys > 0 && verification.outcome != "equal";
        lines.push(match (differed, verification.outcome.as_str()) {
            (true, _) => {
                format!("both sides were last proved equal at origin revision {revision}, {at}, before they differed")
            }
            (false, "failed") => format!("both sides were last proved equal at origin revision {revision}, {at}"),
            (false, _) => format!("both sides were equal at origin revision {revision}, proved {at}"),
        });
    }
    if let (Some(at), "different" | "mended") = (ended, verification.outcome.as_str()) {
        lines.push(format!("both sides were last compared {at}"));
    }
    lines.extend(differing_lines(verification));
    lines
}

/// For people: what differs, or differed until it was mended.
pub fn differing_lines(verification: &Verification) -> Vec<String> {
    let mut lines = Vec::new();
    if verification.differing_keys > 0 {
        let expected = match verification.expected_keys {
            0 => String::new(),
            all if all == verification.differing_keys => {
                ", as expected: revisions in quarantine changed them".to_owned()
            }
            some => format!(", {some} of them as expected: revisions in quarantine changed them"),
        };
        lines.push(match verification.outcome.as_str() {
            "mended" => {
                let was = counted(verification.differing_keys);
                format!("{was} differed{expected}, and what was to be mended is; the next comparison tells whether both sides are equal")
            }
            _ if verification.differing_keys == 1 => format!("1 key differs{expected}"),
            _ => format!("{} differ{expected}", counted(verification.differing_keys)),
        });
    }
    let differing = verification.differing_ranges.iter().filter(|_| verification.outcome != "mended");
    for range in differing {
        lines.push(if range.from == range.to {
            format!("differs: {}", range.from)
        } else {
            format!("differ: {} from {} to {}", counted(range.keys), range.from, range.to)
        });
    }
    lines
}

/// How far the comparison that runs is.
pub fn progress(verification: &Verification) -> String {
    let Verification { parts_done, parts_total, .. } = verification;
    match parts_total {
        0 => "comparing both sides".to_owned(),
        _ => format!("comparing both sides: {parts_done} of {parts_total} parts"),
    }
}

pub(super) fn counted(keys: u64) -> String {
    if keys == 1 { "1 key".to_owned() } else { format!("{keys} keys") }
}

pub(super) fn moment(unix_seconds: f64) -> Option<String> {
    // Far below 2^53: the fraction is what is cut off.
    #[allow(clippy::cast_possible_truncation)]
    let seconds = unix_seconds as i64;
    (seconds > 0).then(|| OffsetDateTime::from_unix_timestamp(seconds).ok().map(rfc3339)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn different() -> Verification {
        let range = |from: &str, to: &str, keys| DifferingRange { from: from.to_owned(), to: to.to_owned(), keys };
        Verification {
            verified_revision: 40,
            verified_at: 1_790_000_000.5,
            differing_keys: 3,
            differing_ranges: vec![range("/app/a", "/app/a", 1), range("/app/b", "/app/d", 2)],
            runs: 2,
            ended_at: 1_790_000_100.0,
            outcome: "different".to_owned(),
            detail: "9 keys".to_owned(),
            ..Verification::default()
        }
    }

    #[test]
    fn the_json_has_the_promised_names_in_the_promised_order() {
        let one_line: String =
            verification_json(&different()).lines().map(str::trim_start).collect::<Vec<_>>().join(" ");
        assert_eq!(
            one_line,
            "{ \"outcome\": \"different\", \"verified_revision\": 40, \"verified_at\": \"2026-09-21T14:13:20Z\", \
             \"differing_keys\": 3, \"expected_keys\": 0, \"differing_ranges\": [ { \"from\": \"/app/a\", \"to\": \"/app/a\", \"keys\": 1 }, \
             { \"from\": \"/app/b\", \"to\": \"/app/d\", \"keys\": 2 } ], \"detail\": \"9 keys\", \"runs\": 2, \
             \"ended_at\": \"2026-09-21T14:15:00Z\", \"running\": null }"
        );
    }

    #[test]
    fn people_read_when_both_sides_were_equal_what_differs_and_how_far_the_next_look_is() {
        assert!(verification_lines(&Verification::default()).is_empty());
        let mut verification = different();
        (verification.running, verification.parts_done, verification.parts_total) = (true, 4, 10);
        assert_eq!(
            verification_lines(&verification),
            [
                "comparing both sides: 4 of 10 parts",
                "both sides were last proved equal at origin revision 40, 2026-09-21T14:13:20Z, before they differed",
                "both sides were last compared 2026-09-21T14:15:00Z",
                "3 keys differ",
                "differs: /app/a",
                "differ: 2 keys from /app/b to /app/d",
            ]
        );
        verification.expected_keys = 2;
        let some = "3 keys differ, 2 of them as expected: revisions in quarantine changed them";
        assert_eq!(verification_lines(&verification)[3], some);
        verification.expected_keys = 3;
        assert_eq!(
            verification_lines(&verification)[3],
            "3 keys differ, as expected: revisions in quarantine changed them"
        );
        let proved = Verification { outcome: "equal".to_owned(), differing_keys: 0, ..different() };
        let equal = "both sides were equal at origin revision 40, proved 2026-09-21T14:13:20Z";
        assert_eq!(verification_lines(&proved)[0], equal);
        verification.outcome = "failed".to_owned();
        let failed = "the last comparison failed, 2026-09-21T14:15:00Z: 9 keys";
        assert_eq!(verification_lines(&verification)[1], failed);
    }
}
