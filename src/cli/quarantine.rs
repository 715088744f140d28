//! Job: the commands about revisions that a link's replica goes on without.
//! Input: a link, a seq. Output: what is kept of them, or what became of one, in words or as JSON.
//! Edge: one call each.
//! Always true: no value is ever shown.

use super::sidecar::Named;
use super::{Failure, say, say_all, say_json};
use crate::admin::{client, quarantine};
use clap::{Args, Subcommand};
use serde_json::json;

#[derive(Subcommand)]
pub(super) enum QuarantineCommand {
    /// Show them, one on a line
    #[command(after_help = "Example: etcd-ferry quarantine list config --config /etc/etcd-ferry/cn-hangzhou.toml")]
    List {
        #[command(flatten)]
        named: Named,
    },
    /// Show one: why it was refused, and its keys with the sizes of their values
    #[command(after_help = "Example: etcd-ferry quarantine show config 12 --config /etc/etcd-ferry/cn-hangzhou.toml")]
    Show {
        #[command(flatten)]
        one: One,
    },
    /// Bring its keys to what they are at the origin now, never to what it wrote
    #[command(after_help = "Example: etcd-ferry quarantine retry config 12 --config /etc/etcd-ferry/cn-hangzhou.toml")]
    Retry {
        #[command(flatten)]
        one: One,
    },
    /// Forget it: its keys differ until they are written again, or mended by `repair`
    #[command(
        after_help = "Example: etcd-ferry quarantine discard config 12 --config /etc/etcd-ferry/cn-hangzhou.toml"
    )]
    Discard {
        #[command(flatten)]
        one: One,
    },
}

/// One revision of a link.
#[derive(Args)]
pub(super) struct One {
    #[command(flatten)]
    named: Named,
    /// The revision's seq
    seq: u64,
}

pub(super) fn run(command: QuarantineCommand) -> Result<(), Failure> {
    match command {
        QuarantineCommand::List { named } => list(&named),
        QuarantineCommand::Show { one } => show(&one),
        QuarantineCommand::Retry { one } => retry(&one),
        QuarantineCommand::Discard { one } => discard(&one),
    }
}

fn list(Named { link, sidecar }: &Named) -> Result<(), Failure> {
    let link = sidecar.ask(async |connection| {
        let reply = client::status(&connection).await?;
        quarantine::at_replica(&connection, &reply, link).cloned()
    })?;
    if sidecar.json { say(&quarantine::list_json(&link)) } else { say(&quarantine::list_text(&link)) }
}

fn show(One { named: Named { link, sidecar }, seq }: &One) -> Result<(), Failure> {
    let revision = sidecar.ask(async |connection| quarantine::show(&connection, link, *seq).await)?;
    if sidecar.json { say(&quarantine::show_json(&revision)) } else { say_all(&quarantine::show_lines(&revision)) }
}

fn retry(One { named: Named { link, sidecar }, seq }: &One) -> Result<(), Failure> {
    let mended = sidecar.ask(async |connection| quarantine::retry(&connection, link, *seq).await)?;
    let (puts, deletes) = (mended.puts, mended.deletes);
    if sidecar.json {
        return say_json(&json!({ "link": link, "seq": seq, "puts": puts, "deletes": deletes }));
    }
    say(&format!(
        "link {link}: seq {seq} is out of quarantine; its keys are as at the origin ({puts} put, {deletes} deleted)"
    ))
}

fn discard(One { named: Named { link, sidecar }, seq }: &One) -> Result<(), Failure> {
    sidecar.ask(async |connection| quarantine::discard(&connection, link, *seq).await)?;
    if sidecar.json {
        return say_json(&json!({ "link": link, "seq": seq }));
    }
    say(&format!(
        "link {link}: seq {seq} is out of quarantine; its keys differ until they are written again, or mended by `repair`"
    ))
}
