//! Job: the command line: every command with its options and its example, from which help, completions and man pages are made.
//! Input: arguments. Output: text on stdout, one line of what is wrong on stderr, exit code 0 (done), 1 (failed) or 2 (bad usage or
//! configuration).
//! Always true: nothing is decided here but which command runs; every command that can be run has an example in its help.

mod about;
mod bundle;
mod generate;
mod links;
mod live;
mod local;
mod quarantine;
mod sidecar;

use crate::admin::client::ClientError;
use crate::config::Faults;
use crate::software;
use clap::{Parser, Subcommand};
use sidecar::{Named, Sidecar};
use std::fmt;
use std::io::{ErrorKind, Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

/// A sidecar that carries an etcd cluster's revisions to a standby cluster in another region.
#[derive(Parser)]
#[command(name = "etcd-ferry", version = software::SHORT, long_version = software::LONG, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed, and one line on standard error says what and what to do; 2 bad usage, or a bad \
                          configuration with all its faults, one on a line";

#[derive(Subcommand)]
enum Command {
    /// Check a configuration and every file that it names; reports all faults at once
    #[command(after_help = "Example: etcd-ferry check --config /etc/etcd-ferry/us-east-1.toml")]
    Check {
        #[command(flatten)]
        configuration: local::Configuration,
    },
    /// Run the sidecar, until SIGTERM or Ctrl-C
    #[command(after_help = "Example: etcd-ferry run --config /etc/etcd-ferry/us-east-1.toml")]
    Run {
        #[command(flatten)]
        configuration: local::Configuration,
    },
    /// Show every link of a running sidecar: state, position, lag, and why it is not following
    #[command(after_help = "Example: etcd-ferry status --config /etc/etcd-ferry/us-east-1.toml --json")]
    Status {
        #[command(flatten)]
        sidecar: Sidecar,
        /// Again and again, until Ctrl-C; with --json one line for each
        #[arg(long)]
        watch: bool,
        /// Milliseconds from one to the next
        #[arg(long, value_name = "N", default_value_t = 1000, requires = "watch", value_parser = clap::value_parser!(u32).range(100..=60_000))]
        interval_ms: u32,
    },
    /// Show the configuration that is in force, with every default filled in and no secret
    #[command(after_help = "Example: etcd-ferry configuration --config /etc/etcd-ferry/us-east-1.toml")]
    Configuration {
        #[command(flatten)]
        sidecar: Sidecar,
    },
    /// Show every certificate that a running sidecar shows or trusts, and when it ends
    #[command(after_help = "Example: etcd-ferry certificates --config /etc/etcd-ferry/us-east-1.toml")]
    Certificates {
        #[command(flatten)]
        sidecar: Sidecar,
    },
    /// Write a support bundle: configuration, status, certificates, metrics, the log's last lines; no key, no value, no secret
    #[command(after_help = "Example: etcd-ferry bundle --config /etc/etcd-ferry/us-east-1.toml --out bundle.tar.gz")]
    Bundle {
        #[command(flatten)]
        sidecar: Sidecar,
        /// The file to make; none is ever written over; - for standard output [default: etcd-ferry-NODE-TIME.tar.gz]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Show what a running sidecar's log tells, or have it tell more or less until the next start
    #[command(
        after_help = "Example: etcd-ferry log-level info,etcd_ferry=debug --config /etc/etcd-ferry/us-east-1.toml"
    )]
    LogLevel {
        /// off, error, warn, info, debug or trace, or a list such as info,etcd_ferry=debug; without it, nothing is changed
        level: Option<String>,
        #[command(flatten)]
        sidecar: Sidecar,
    },
    /// Show every link of one or several sidecars, live: state, lag, rates, spool, last proof of equality
    #[command(
        after_help = "Once, as text, if standard output is no terminal.\nExample: etcd-ferry top --config /etc/etcd-ferry/us-east-1.toml"
    )]
    Top {
        #[command(flatten)]
        several: live::Several,
    },
    /// Have a running sidecar read its configuration again, as SIGHUP does: links, limits and the log's level are taken
    #[command(after_help = "Example: etcd-ferry reload --config /etc/etcd-ferry/us-east-1.toml")]
    Reload {
        #[command(flatten)]
        sidecar: Sidecar,
    },
    /// Start a new base copy of a link; ask the sidecar at the link's origin
    #[command(after_help = "Example: etcd-ferry resync config --config /etc/etcd-ferry/us-east-1.toml --allow-deletes")]
    Resync {
        #[command(flatten)]
        named: Named,
        /// Go on past the guards of the base copy: keys that the origin does not have are deleted at the replica
        #[arg(long)]
        allow_deletes: bool,
    },
    /// Compare both sides of a link while traffic goes on; changes nothing. Ask the sidecar at the link's origin
    #[command(
        after_help = "Exit code 0: equal; 1: different, or not to be told.\nExample: etcd-ferry verify config --config /etc/etcd-ferry/us-east-1.toml"
    )]
    Verify {
        #[command(flatten)]
        named: Named,
    },
    /// Compare both sides of a link and ship the keys that differ, and those alone. Ask the sidecar at the link's origin
    #[command(after_help = "Example: etcd-ferry repair config --config /etc/etcd-ferry/us-east-1.toml")]
    Repair {
        #[command(flatten)]
        named: Named,
        /// Also if more keys are deleted at the replica than deletes_share_max allows
        #[arg(long)]
        allow_deletes: bool,
    },
    /// Let the revision that is held back for its deletes through, once. Ask the sidecar at the link's replica
    #[command(after_help = "Example: etcd-ferry allow config 42 --config /etc/etcd-ferry/cn-hangzhou.toml")]
    Allow {
        #[command(flatten)]
        named: Named,
        /// Only if it is the one with this seq, as the status names it: then a call that is repeated lets nothing else through
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        seq: Option<u64>,
    },
    /// Have a link's replica apply nothing until it is resumed; what comes is kept. Ask the sidecar at the link's replica
    #[command(after_help = "Example: etcd-ferry pause config --config /etc/etcd-ferry/cn-hangzhou.toml")]
    Pause {
        #[command(flatten)]
        named: Named,
    },
    /// Have a link's replica apply again. Ask the sidecar at the link's replica
    #[command(after_help = "Example: etcd-ferry resume config --config /etc/etcd-ferry/cn-hangzhou.toml")]
    Resume {
        #[command(flatten)]
        named: Named,
    },
    /// The revisions that a link's replica refused and goes on without. Ask the sidecar at the link's replica
    #[command(after_help = "Example: etcd-ferry quarantine list config --config /etc/etcd-ferry/cn-hangzhou.toml")]
    Quarantine {
        #[command(subcommand)]
        command: quarantine::QuarantineCommand,
    },
    /// Show it on this machine: two etcds, two sidecars, a link that fails now and then, and both sides compared at the end
    #[command(after_help = "Needs etcd in PATH.\nExample: etcd-ferry demo --keep")]
    Demo {
        /// Keep both regions up at the end, until Ctrl-C, and print the commands to look at them
        #[arg(long)]
        keep: bool,
        /// How long to write
        #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(3..=3600))]
        seconds: u64,
        /// The report as JSON; the rest goes to standard error
        #[arg(long)]
        json: bool,
    },
    /// Issue certificates
    #[command(after_help = "Example: etcd-ferry certs dev --out certs-dev --region us-east-1 --region cn-hangzhou")]
    Certs {
        #[command(subcommand)]
        command: local::CertsCommand,
    },
    /// Print a shell's completions
    #[command(after_help = "Example: etcd-ferry completions bash >/usr/share/bash-completion/completions/etcd-ferry")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write a man page for each command into a folder
    #[command(after_help = "Example: etcd-ferry man /usr/local/share/man/man1")]
    Man {
        /// The folder; made if it is absent
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

/// Why a command ends without success.
enum Failure {
    /// Exit code 2.
    Config(Faults),
    /// Exit code 1; one line that says what, and what to do.
    Failed(String),
    /// Whoever read standard output has seen enough. Exit code 0.
    NobodyReads,
}

impl From<Faults> for Failure {
    fn from(faults: Faults) -> Self {
        Failure::Config(faults)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Failure::Failed(error.to_string())
    }
}

impl Failure {
    /// With its causes, where it has some.
    fn of(error: impl fmt::Display) -> Self {
        Failure::Failed(format!("{error:#}"))
    }
}

/// Runs the command that this process was called with.
pub fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Check { configuration } => local::check(&configuration),
        Command::Run { configuration } => local::run(&configuration),
        Command::Status { sidecar, watch: false, .. } => about::status(&sidecar),
        Command::Status { sidecar, watch: true, interval_ms } => about::watch_status(&sidecar, interval_ms),
        Command::Configuration { sidecar } => about::configuration(&sidecar),
        Command::Certificates { sidecar } => about::certificates(&sidecar),
        Command::Bundle { sidecar, out } => bundle::bundle(&sidecar, out.as_deref()),
        Command::LogLevel { level, sidecar } => about::log_level(&sidecar, level.as_deref()),
        Command::Top { several } => live::top(several),
        Command::Reload { sidecar } => live::reload(&sidecar),
        Command::Resync { named, allow_deletes } => links::resync(&named, allow_deletes),
        Command::Verify { named } => links::verify(&named),
        Command::Repair { named, allow_deletes } => links::repair(&named, allow_deletes),
        Command::Allow { named, seq } => links::allow(&named, seq),
        Command::Pause { named } => links::pause(&named),
        Command::Resume { named } => links::resume(&named),
        Command::Quarantine { command } => quarantine::run(command),
        Command::Demo { keep, seconds, json } => local::demo(keep, seconds, json),
        Command::Certs { command } => local::certs(command),
        Command::Completions { shell } => generate::completions(shell),
        Command::Man { folder } => generate::man(&folder),
    };
    match result {
        Ok(()) | Err(Failure::NobodyReads) => ExitCode::SUCCESS,
        Err(Failure::Config(faults)) => {
            eprintln!("{faults}");
            ExitCode::from(2)
        }
        Err(Failure::Failed(line)) => {
            eprintln!("etcd-ferry: {line}");
            ExitCode::FAILURE
        }
    }
}

/// A line on standard output. Whoever reads it may have seen enough: a closed pipe is no failure.
fn say(line: &str) -> Result<(), Failure> {
    match writeln!(stdout(), "{line}") {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(Failure::Failed(format!("standard output: {e}"))),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn say_all(lines: &[String]) -> Result<(), Failure> {
    lines.iter().try_for_each(|line| say(line))
}

/// For scripts.
fn say_json(json: &serde_json::Value) -> Result<(), Failure> {
    say(&format!("{json:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// Every command that can be run, with its path.
    fn runnable(command: &clap::Command, path: &str, found: &mut Vec<(String, String)>) {
        let path = format!("{path} {}", command.get_name()).trim_start().to_owned();
        let below: Vec<_> = command.get_subcommands().filter(|below| below.get_name() != "help").collect();
        if below.is_empty() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            found.push((path, help));
        } else {
            below.into_iter().for_each(|below| runnable(below, &path, found));
        }
    }

    #[test]
    fn every_command_has_an_example_that_the_command_line_takes() {
        let mut found = Vec::new();
        runnable(&Cli::command(), "", &mut found);
        assert!(found.len() >= 12, "{found:?}");
        for (path, help) in found {
            let (_, example) = help.split_once("Example: ").unwrap_or_else(|| panic!("{path} has no example"));
            assert!(example.starts_with(&path), "the example of {path} is {example}");
            let words = example.split(" >").next().unwrap_or_default().split(' ');
            if let Err(e) = Cli::try_parse_from(words) {
                panic!("the example of {path}: {e}");
            }
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
