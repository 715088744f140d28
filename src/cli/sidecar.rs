//! Job: which running sidecar a command is for, which link, who asks, and in which form the answer is wanted.
//! Input: options. Output: a connection; an answer of the sidecar.
//! Edge: reads the configuration, starts a runtime for one call.
//! Always true: what is not given beside the configuration is taken from it.

use super::Failure;
use crate::admin::client::Connection;
use crate::config::Config;
use clap::Args;
use std::future::Future;
use std::path::PathBuf;

/// Which running sidecar is meant, and who asks.
#[derive(Args)]
pub(super) struct Sidecar {
    /// The configuration file of the running sidecar
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
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
        let config = Config::load(&self.config)?;
        let beside = |name| config.tls.cert.with_file_name(name);
        Ok(Connection {
            admin: config.listen.admin,
            cert: self.cert.clone().unwrap_or_else(|| beside("admin.pem")),
            key: self.key.clone().unwrap_or_else(|| beside("admin.key")),
            ca: config.tls.ca,
            own_cert: config.tls.cert,
        })
    }

    /// What the sidecar is called.
    pub fn node(&self) -> Result<String, Failure> {
        Ok(Config::load(&self.config)?.node)
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

pub(super) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    started(tokio::runtime::Builder::new_multi_thread().enable_all().build())
}

pub(super) fn started(runtime: std::io::Result<tokio::runtime::Runtime>) -> Result<tokio::runtime::Runtime, Failure> {
    runtime.map_err(|e| Failure::Failed(format!("no threads can be started: {e}")))
}
