//! Job: the commands that need no running sidecar: check a configuration, run, demo, issue certificates.
//! Input: paths and options. Output: text; a sidecar that runs until it is stopped.
//! Edge: reads files, starts processes.
//! Always true: nothing runs on a configuration that has faults.

use super::sidecar::{runtime, started};
use super::{Failure, say};
use crate::certs::{self, issue::CertsError};
use crate::config::{Config, Fault, Faults};
use crate::{app, demo, logs};
use clap::Subcommand;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Subcommand)]
pub(super) enum CertsCommand {
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

pub(super) fn check(path: &Path) -> Result<(), Failure> {
    let (config, identity) = Config::check(path)?;
    say(&format!(
        "{} is sound; links to send: {}, to receive: {}",
        path.display(),
        config.send.len(),
        config.receive.len()
    ))?;
    say(&format!("this sidecar's certificate is for {}", identity.sans.join(", ")))?;
    say(&format!("and is valid until {}", certs::load::rfc3339(identity.not_after)))
}

pub(super) fn run(path: &Path) -> Result<(), Failure> {
    let (config, _) = Config::check(path)?;
    config.prepare_files()?;
    let logs = logs::install(&config.log).map_err(Failure::of)?;
    #[cfg(feature = "failpoints")]
    crate::failpoint::arm().map_err(Failure::Failed)?;
    sidecar_runtime()?.block_on(app::run(config, logs)).map_err(Failure::of)
}

/// Half the cores, for the other half is etcd's. Fewer threads also wake each other less: on two cores one thread takes a third less CPU for
/// a live revision than two.
fn sidecar_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    started(builder.worker_threads((cores / 2).max(1)).enable_all().build())
}

pub(super) fn demo(keep: bool, seconds: u64, json: bool) -> Result<(), Failure> {
    let options = demo::Options { length: Duration::from_secs(seconds), keep, json };
    runtime()?.block_on(demo::run(options)).map_err(Failure::of)
}

pub(super) fn certs(CertsCommand::Dev { out, regions }: CertsCommand) -> Result<(), Failure> {
    let issued = certs::dev(&out, &regions).map_err(|e| match e {
        CertsError::Region(_) => {
            Failure::Config(Faults(vec![Fault { field: "--region".to_owned(), rule: e.to_string() }]))
        }
        CertsError::File { .. }
        | CertsError::HalfPair { .. }
        | CertsError::CaExpired { .. }
        | CertsError::Load(_)
        | CertsError::Make(_) => Failure::Failed(e.to_string()),
    })?;
    for pair in &issued {
        say(&certs::issue::describe(pair))?;
    }
    Ok(())
}
