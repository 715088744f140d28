//! Job: the command line: parse, call, print, exit code.
//! Input: arguments. Output: text on stdout, one line of what is wrong on stderr, exit code 0 (done), 1 (failed) or
//! 2 (bad usage or configuration).
//! Always true: this file decides nothing but how a result is shown.

use clap::{Parser, Subcommand};
use etcd_ferry::certs;
use etcd_ferry::config::{Config, Faults};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A sidecar that carries an etcd cluster's revisions to a standby cluster in another region.
#[derive(Parser)]
#[command(name = "etcd-ferry", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check a configuration and every file that it names; reports all faults at once
    #[command(after_help = "Example: etcd-ferry check --config /etc/etcd-ferry/us-east-1.toml")]
    Check {
        /// The configuration file (TOML); paths in it are relative to the current directory
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Issue certificates
    Certs {
        #[command(subcommand)]
        command: CertsCommand,
    },
}

#[derive(Subcommand)]
enum CertsCommand {
    /// Make a CA, a pair for each region and an admin pair, for development; issues from a CA that is there already
    #[command(after_help = "Example: etcd-ferry certs dev --out certs-dev --region us-east-1 --region cn-hangzhou")]
    Dev {
        /// The folder for the PEM files; no file in it is ever written over
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// A region; may be given several times
        #[arg(long = "region", value_name = "NAME")]
        regions: Vec<String>,
    },
}

/// Why a command ends without success.
enum Failure {
    /// Exit code 2.
    Config(Faults),
    /// Exit code 1; one line that says what, and what to do.
    Failed(String),
}

impl From<Faults> for Failure {
    fn from(faults: Faults) -> Self {
        Failure::Config(faults)
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Check { config } => check(&config),
        Command::Certs { command: CertsCommand::Dev { out, regions } } => certs_dev(&out, &regions),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
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

fn check(path: &Path) -> Result<(), Failure> {
    let config = Config::load(path)?;
    let identity = config.check_files()?;
    println!("{} is sound: {} links to send, {} to receive", path.display(), config.send.len(), config.receive.len());
    println!("this sidecar's certificate names {}", identity.sans.join(", "));
    println!("and is valid until {}", certs::load::rfc3339(identity.not_after));
    Ok(())
}

fn certs_dev(out: &Path, regions: &[String]) -> Result<(), Failure> {
    let issued = certs::dev(out, regions).map_err(|e| Failure::Failed(e.to_string()))?;
    for pair in &issued {
        println!("{}", certs::issue::describe(pair));
    }
    Ok(())
}
