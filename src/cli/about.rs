//! Job: the commands about a sidecar as a whole: its status, configuration, certificates, log.
//! Input: which sidecar, options. Output: what it says of itself, in words or as JSON.
//! Edge: one call each.
//! Always true: nothing is changed but the log's level, and that only where one is given.

use super::sidecar::Sidecar;
use super::{Failure, say, say_json};
use crate::admin::status_json::{status_json, status_line};
use crate::admin::{certificates, client, show};
use serde_json::json;
use std::io::{ErrorKind, IsTerminal, Write, stdout};

/// The width of a terminal that does not tell its own.
const COLUMNS: usize = 80;

pub(super) fn status(sidecar: &Sidecar) -> Result<(), Failure> {
    let reply = sidecar.ask(async |connection| client::status(&connection).await)?;
    if sidecar.json { say(&status_json(&reply)) } else { say(show::status_table(&reply, width()).trim_end()) }
}

/// Until the sidecar stops, or whoever reads has gone.
pub(super) fn watch_status(sidecar: &Sidecar, interval_ms: u32) -> Result<(), Failure> {
    sidecar.ask(async |connection| {
        client::watch_status(&connection, interval_ms, |reply| {
            if sidecar.json { told(&status_line(reply)) } else { told(&show::status_table(reply, width())) }
        })
        .await
    })
}

/// A stream that nobody reads any more ends here, as other programs do.
fn told(text: &str) -> Result<(), Failure> {
    let mut out = stdout();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Err(Failure::NobodyReads),
        told => told.map_err(|e| Failure::Failed(format!("standard output: {e}"))),
    }
}

pub(super) fn configuration(sidecar: &Sidecar) -> Result<(), Failure> {
    let toml = sidecar.ask(async |connection| client::configuration(&connection).await)?;
    if !sidecar.json {
        return say(toml.trim_end());
    }
    let table: toml::Table = toml.parse().map_err(|e| Failure::Failed(format!("the answer is no TOML: {e}")))?;
    say_json(&json!(table))
}

pub(super) fn certificates(sidecar: &Sidecar) -> Result<(), Failure> {
    let reply = sidecar.ask(async |connection| certificates::certificates(&connection).await)?;
    if sidecar.json {
        return say(&certificates::certificates_json(&reply));
    }
    say(certificates::certificates_table(&reply).trim_end())
}

pub(super) fn log_level(sidecar: &Sidecar, level: Option<&str>) -> Result<(), Failure> {
    let reply = sidecar.ask(async |connection| match level {
        Some(level) => client::set_log_level(&connection, level).await,
        None => client::log_level(&connection).await,
    })?;
    let (now, configured) = (&reply.level, &reply.configured);
    if sidecar.json {
        return say_json(&json!({ "level": now, "configured": configured }));
    }
    if now == configured {
        say(&format!("the log level is {now}, as configured"))
    } else {
        say(&format!("the log level is {now} until the next start, which takes {configured} from the configuration"))
    }
}

/// Of the terminal; `None`: standard output is none.
fn width() -> Option<usize> {
    let columns = || std::env::var("COLUMNS").ok()?.parse().ok();
    stdout().is_terminal().then(|| columns().unwrap_or(COLUMNS))
}
