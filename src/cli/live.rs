//! Job: the commands about a whole sidecar's running: look at several live, and have one read its configuration again.
//! Input: options. Output: a screen, or text on stdout.
//! Edge: asks running sidecars.
//! Always true: what is no terminal gets text, once.

use super::sidecar::{Sidecar, connection, runtime};
use super::{Failure, say};
use crate::admin::reload;
use crate::config::Layers;
use crate::top::{self, Source};
use clap::Args;
use std::io::{IsTerminal, stdout};
use std::path::PathBuf;

/// Which sidecars are looked at.
#[derive(Args)]
pub(super) struct Several {
    /// The configuration file of a running sidecar; may be given several times
    #[arg(long = "config", value_name = "FILE", required = true)]
    configs: Vec<PathBuf>,
    /// What each of them runs with beside its file, such as tls.cert=/etc/etcd-ferry/tls.pem; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// The operator's certificate [default: admin.pem beside each tls.cert]
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its key [default: admin.key beside each tls.cert]
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
}

pub(super) fn top(several: Several) -> Result<(), Failure> {
    let Several { configs, set, cert, key } = several;
    let mut sources = Vec::new();
    for config in configs {
        let connection = connection(&Layers::new(&config, &set), cert.as_deref(), key.as_deref())?;
        sources.push(Source { connection, name: config.display().to_string() });
    }
    let runtime = runtime()?;
    if stdout().is_terminal() {
        let ended = runtime.block_on(top::live(sources));
        return ended.map_err(|e| Failure::Failed(format!("the terminal cannot be used: {e}")));
    }
    say(runtime.block_on(top::once(sources))?.trim_end())
}

pub(super) fn reload(sidecar: &Sidecar) -> Result<(), Failure> {
    let reply = sidecar.ask(async |connection| reload::reload(&connection).await)?;
    if sidecar.json {
        say(&reload::json(&reply))?;
    } else {
        reload::lines(&reply).iter().try_for_each(|line| say(line))?;
    }
    match reply.failed.len() {
        0 => Ok(()),
        count => Err(Failure::Failed(format!("{count} of the changes could not be taken: mend that, and reload"))),
    }
}
