//! Job: which running sidecar a command is for, which link, who asks, and in which form the answer is wanted.
//! Input: options. Output: a connection; an answer of the sidecar.
//! Edge: reads the configuration, starts a runtime for one call.
//! Always true: what is not given beside the configuration is taken from it.

use super::Failure;
use crate::admin::client::Connection;
use crate::config::{Fault, Faults, Layers};
use clap::Args;
use std::future::Future;
use std::path::{Path, PathBuf};

/// Which running sidecar is meant, and who asks.
#[derive(Args)]
pub(super) struct Sidecar {
    /// The configuration file of the running sidecar
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// What the sidecar runs with beside it, such as listen.admin=127.0.0.1:7444; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// The operator's certificate [default: admin.pem beside tls.cert]
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its key [default: admin.key beside tls.cert]
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// JSON instead of text, for scripts
    #[arg(long)]
    pub json: bool,
}

/// One link of that sidecar.
#[derive(Args)]
pub(super) struct Named {
    /// The link
    pub link: String,
    #[command(flatten)]
    pub sidecar: Sidecar,
}

impl Sidecar {
    fn connection(&self) -> Result<Connection, Failure> {
        connection(&self.layers(), self.cert.as_deref(), self.key.as_deref())
    }

    fn layers(&self) -> Layers {
        Layers::new(&self.config, &self.set)
    }

    /// What the sidecar is called.
    pub fn node(&self) -> Result<String, Failure> {
        Ok(self.layers().load()?.node)
    }

    /// One question, and its answer.
    pub fn ask<T, E, F>(&self, question: impl FnOnce(Connection) -> F) -> Result<T, Failure>
    where
        Failure: From<E>,
        F: Future<Output = Result<T, E>>,
    {
        let connection = self.connection()?;
        Ok(runtime()?.block_on(question(connection))?)
    }
}

/// To the sidecar of this configuration; with the operator's pair, or what lies beside `tls.cert`.
pub(super) fn connection(layers: &Layers, cert: Option<&Path>, key: Option<&Path>) -> Result<Connection, Failure> {
    let config = layers.load().map_err(|Faults(mut faults)| {
        if !layers.file().exists() || faults.iter().all(Fault::is_of_a_flag) {
            return Faults(faults);
        }
        let rule = "is not sound, so that it does not tell where its sidecar is. A sidecar that runs goes on with the last sound one; \
                    `curl 'http://HOST:PORT/healthz?full=1'` at its listen.http tells its status";
        faults.push(Fault { field: layers.file().display().to_string(), rule: rule.to_owned() });
        Faults(faults)
    })?;
    let operators = |given: Option<&Path>, name| match given {
        Some(given) => Ok(given.to_owned()),
        None => {
            let beside = config.tls.cert.with_file_name(name);
            // One that cannot be looked for is told when it is read.
            if beside.try_exists().unwrap_or(true) {
                return Ok(beside);
            }
            Err(Failure::Failed(format!(
                "{} is not there: it would be the operator's; give the operator's certificate and key with --cert and --key",
                beside.display()
            )))
        }
    };
    Ok(Connection {
        admin: config.listen.admin,
        cert: operators(cert, "admin.pem")?,
        key: operators(key, "admin.key")?,
        ca: config.tls.ca,
        own_cert: config.tls.cert,
    })
}

pub(super) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    started(tokio::runtime::Builder::new_multi_thread().enable_all().build())
}

pub(super) fn started(runtime: std::io::Result<tokio::runtime::Runtime>) -> Result<tokio::runtime::Runtime, Failure> {
    runtime.map_err(|e| Failure::Failed(format!("no threads can be started: {e}")))
}
