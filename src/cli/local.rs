//! Job: the commands that need no running sidecar: check a configuration, run, demo, issue certificates.
//! Input: paths and options. Output: text; a sidecar that runs until it is stopped.
//! Edge: reads files, starts processes.
//! Always true: nothing runs on a configuration that has faults.

use super::sidecar::{runtime, started};
use super::{Failure, say};
use crate::certs::{self, issue::CertsError};
use crate::config::{Checked, Fault, Faults, Layers, Override};
use crate::etcd::with_sources;
use crate::{app, demo, logs};
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

/// What a sidecar is configured with: the file, over it the environment, over both the flags.
#[derive(Args)]
pub(super) struct Configuration {
    /// The configuration file (TOML); paths in it are relative to the current directory
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Goes before the file and the environment, such as limits.txn_ops_max=64; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

impl Configuration {
    fn layers(&self) -> Layers {
        Layers::new(&self.config, &self.set)
    }
}

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

pub(super) fn check(configuration: &Configuration) -> Result<(), Failure> {
    let layers = configuration.layers();
    let checked = layers.check()?;
    let warnings = checked.warnings();
    let Checked { config, identity, overrides } = checked;
    say(&format!(
        "{} is sound; links to send: {}, to receive: {}",
        layers.file().display(),
        config.send.len(),
        config.receive.len()
    ))?;
    for Override { key, value, source } in &overrides {
        say(&format!("{key} = {value} is not from the file: {source} goes before it"))?;
    }
    for warning in warnings {
        say(&format!("warning: {warning}"))?;
    }
    let Some(identity) = identity else {
        return say("this sidecar has no certificate yet: the PKI is asked for one at the start");
    };
    say(&format!("this sidecar's certificate is for {}", identity.sans.join(", ")))?;
    say(&format!("and is valid until {}", certs::load::rfc3339(identity.not_after)))
}

pub(super) fn run(configuration: &Configuration) -> Result<(), Failure> {
    let layers = configuration.layers();
    let checked = layers.check()?;
    let warnings = checked.warnings();
    let Checked { config, overrides, .. } = checked;
    config.prepare_files()?;
    let logs = logs::install(&config.log).map_err(Failure::of)?;
    for Override { key, value, source } in &overrides {
        tracing::info!(key, value, %source, "a key is not as the configuration file says");
    }
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    #[cfg(feature = "failpoints")]
    crate::failpoint::arm().map_err(Failure::Failed)?;
    let runtime = sidecar_runtime()?;
    let ended = runtime.block_on(app::run(config, layers, logs));
    // A name that is looked up and a disk that hangs are not waited for: `app::run` has given them their time.
    runtime.shutdown_background();
    ended.map_err(|e| Failure::Failed(with_sources(e.as_ref())))
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
