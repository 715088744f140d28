//! Job: the commands that are for one link: resync, verify, repair, allow, pause, resume.
//! Input: a link, options. Output: what the sidecar did, in words or as JSON.
//! Edge: one call each.
//! Always true: both sides that differ, and a link that could not be compared, are a failure; who is to do what about it is said.

use super::sidecar::{Named, Sidecar};
use super::{Failure, say, say_all, say_json};
use crate::admin::proto::Verification;
use crate::admin::verification::{self, differing_lines, verification_json, verification_lines};
use crate::admin::{client, show};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// A comparison of a million keys takes some seconds.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) fn resync(named: &Named, allow_deletes: bool) -> Result<(), Failure> {
    let Named { link, sidecar } = named;
    sidecar.ask(async |connection| client::resync(&connection, link, allow_deletes).await)?;
    if sidecar.json {
        return say_json(&json!({ "link": link, "asked": true }));
    }
    let config = sidecar.config.display();
    say(&format!(
        "link {link}: a new base copy is asked for; see how it goes with `etcd-ferry status --config {config}`"
    ))
}

pub(super) fn verify(named: &Named) -> Result<(), Failure> {
    let Named { link, sidecar } = named;
    let outcome = sidecar
        .ask(async |connection| patiently(named, verification::verify(&connection, link, show_progress)).await)?;
    told(link, &outcome, sidecar.json)?;
    ended(sidecar, link, &outcome)
}

pub(super) fn repair(named: &Named, allow_deletes: bool) -> Result<(), Failure> {
    let Named { link, sidecar } = named;
    let outcome = sidecar.ask(async |connection| {
        patiently(named, verification::repair(&connection, link, allow_deletes, show_progress)).await
    })?;
    told(link, &outcome, sidecar.json)?;
    ended(sidecar, link, &outcome)
}

pub(super) fn allow(named: &Named, seq: Option<u64>) -> Result<(), Failure> {
    let Named { link, sidecar } = named;
    let allowed = sidecar.ask(async |connection| client::allow(&connection, link, seq).await)?;
    if sidecar.json {
        return say_json(&json!({
            "link": link, "seq": allowed.seq, "origin_revision": allowed.origin_revision, "deletes": allowed.deletes, "keys": allowed.keys,
            "minute": allowed.minute,
        }));
    }
    let many = format!("{} of {} keys", allowed.deletes, allowed.keys);
    let what = if allowed.minute {
        format!("with it {many} are deleted within a minute")
    } else {
        format!("it deletes {many}")
    };
    say(&format!("link {link}: revision {} (seq {}) goes through; {what}", allowed.origin_revision, allowed.seq))
}

pub(super) fn pause(named: &Named) -> Result<(), Failure> {
    let Named { link, sidecar } = named;
    let paused = sidecar.ask(async |connection| client::pause(&connection, link).await)?;
    let (since, by) = (show::since(&paused), show::printable(&paused.by));
    if sidecar.json {
        return say_json(&json!({ "link": link, "paused": true, "at": since, "by": by }));
    }
    let config = sidecar.config.display();
    say(&format!(
        "link {link}: paused since {since} by {by}: its replica applies nothing until `etcd-ferry resume {link} --config {config}`"
    ))
}

pub(super) fn resume(named: &Named) -> Result<(), Failure> {
    let Named { link, sidecar } = named;
    let paused = sidecar.ask(async |connection| client::resume(&connection, link).await)?;
    let was = paused.map(|paused| (show::since(&paused), show::printable(&paused.by)));
    if sidecar.json {
        let (at, by) = was.unzip();
        return say_json(&json!({ "link": link, "paused": false, "at": at, "by": by }));
    }
    say(&match was {
        Some((since, by)) => format!("link {link}: its replica applies again; it was paused since {since} by {by}"),
        None => format!("link {link}: it was not paused"),
    })
}

/// Whoever waits long is told, on standard error, where to look.
async fn patiently<T>(named: &Named, comparing: impl Future<Output = T>) -> T {
    tokio::pin!(comparing);
    tokio::select! {
        biased;
        outcome = &mut comparing => return outcome,
        () = tokio::time::sleep(PATIENCE) => {}
    }
    let Named { link, sidecar } = named;
    eprintln!(
        "link {link}: both sides are still being compared; if it lasts, `etcd-ferry status --config {}` says what the link waits for. Ctrl-C ends \
         this command, and not the comparison",
        sidecar.config.display()
    );
    comparing.await
}

/// The exit code of a comparison.
fn ended(sidecar: &Sidecar, link: &str, outcome: &Verification) -> Result<(), Failure> {
    let config = sidecar.config.display();
    match outcome.outcome.as_str() {
        "equal" | "mended" => Ok(()),
        "different" if outcome.expected_keys == outcome.differing_keys => Err(Failure::Failed(format!(
            "link {link}: both sides differ as expected, in keys of revisions in quarantine: see `etcd-ferry quarantine list {link}` at the \
             replica's sidecar"
        ))),
        "different" => Err(Failure::Failed(format!(
            "link {link}: both sides differ; `etcd-ferry repair {link} --config {config}` ships what differs"
        ))),
        _ => Err(Failure::Failed(format!(
            "link {link}: {}; `etcd-ferry status --config {config}` shows how the link is",
            outcome.detail.replace("--config F", &format!("--config {config}"))
        ))),
    }
}

/// One line that is written over, for whoever sits at a terminal.
fn show_progress(verification: &Verification) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() && verification.running {
        // Nobody is worse off if it cannot be shown.
        let _ = write!(stderr, "\r{:<60}\r", verification::progress(verification)).and_then(|()| stderr.flush());
    }
}

/// The outcome of a comparison, on standard output.
fn told(link: &str, verification: &Verification, json: bool) -> Result<(), Failure> {
    if json {
        return say(&verification_json(verification));
    }
    match verification.outcome.as_str() {
        // Why is said on standard error.
        "failed" => say(&format!("link {link}: failed")),
        outcome => say(&format!("link {link}: {outcome} ({})", verification.detail)),
    }?;
    let known = ["equal", "different"].contains(&verification.outcome.as_str());
    let lines = if known { verification_lines(verification) } else { differing_lines(verification) };
    say_all(&lines)
}
