//! Job: take a configuration that was changed into use while the sidecar runs, as far as that goes.
//! Input: the configuration's layers, read anew; the links that run. Output: links that came, went and changed; what needs a restart.
//! Edge: what a change means is decided in config/change.rs.
//! Always true: a configuration that is not sound as a whole changes nothing; what is not touched by a change goes on.

use super::links::{Ended, Links, When};
use crate::admin::reload::Reloaded;
use crate::config::change::{Change, LinkChange, What, compare};
use crate::config::{Checked, Config, Fault, Faults, Layers};
use crate::etcd::with_sources;
use crate::logs::Logs;
use crate::metrics;
use crate::model::{LinkName, Side};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;

/// What runs, and what it was read from.
pub struct Reloader {
    layers: Layers,
    running: Config,
    logs: Logs,
    /// What runs, for whoever asks.
    in_force: watch::Sender<Arc<Config>>,
    /// How often a changed configuration was taken.
    reloads: u64,
}

impl Reloader {
    pub fn new(layers: Layers, running: Config, logs: Logs, in_force: watch::Sender<Arc<Config>>) -> Self {
        metrics::record_configuration(false, false, 0);
        Self { layers, running, logs, in_force, reloads: 0 }
    }

    /// Reads all layers again and takes what can be taken. Everything is told in the log, too.
    pub async fn reload(&mut self, links: &mut Links) -> Result<Reloaded, Faults> {
        let file = self.layers.file().display().to_string();
        let layers = Layers::again(&self.layers);
        let checked = tokio::task::spawn_blocking(move || layers.check()).await;
        let checked = checked.unwrap_or_else(|error| {
            Err(Faults(vec![Fault { field: file.clone(), rule: format!("could not be checked: {error}") }]))
        });
        let wanted = match checked {
            Ok(Checked { config, .. }) => config,
            Err(faults) => {
                metrics::record_configuration(true, false, self.reloads);
                for Fault { field, rule } in &faults.0 {
                    tracing::error!(%file, %field, %rule, "the configuration is refused as a whole, and the last one stays in use");
                }
                return Err(faults);
            }
        };
        let change = compare(&self.running, &wanted);
        let reloaded = self.apply(change, links).await;
        self.reloads += u64::from(!reloaded.taken.is_empty());
        metrics::record_configuration(false, !reloaded.needs_restart.is_empty(), self.reloads);
        tell(&file, &reloaded);
        Ok(reloaded)
    }

    /// A link's task has ended by itself: it runs no more, and the next reload begins it anew.
    pub fn ended(&mut self, ended: &Ended) {
        forget(&mut self.running, &ended.link, ended.side);
    }

    async fn apply(&mut self, change: Change, links: &mut Links) -> Reloaded {
        let Change { running, links: changes, limits, log_level, needs_restart } = change;
        self.running = running;
        let mut reloaded = Reloaded { needs_restart: own(&needs_restart), ..Reloaded::default() };
        if log_level {
            let level = self.running.log.level.clone();
            match self.logs.configure(&level) {
                Ok(()) => reloaded.taken.push(format!("log.level: {level}")),
                Err(error) => reloaded.failed.push(format!("log.level: {error}")),
            }
        }
        if !limits.is_empty() {
            reloaded.taken.push(format!("{}: taken by each link that is bound by it", limits.join(", ")));
        }
        let ending = changes.iter().filter(|change| change.what != What::Added);
        let ending: Vec<(LinkName, Side)> = ending.map(|change| (change.link.clone(), change.side)).collect();
        let went_on = links.stop(&ending).await.err().unwrap_or_default();
        for LinkChange { link, side, what } in changes {
            let name = format!("link {link} ({})", side.as_str());
            let outcome = match &what {
                What::Removed if went_on.contains(&(link.clone(), side)) => {
                    Err("it has not stopped in time: it does when the sidecar ends".to_owned())
                }
                What::Removed => {
                    Ok(format!("removed and stopped; its files stay in {}", self.dir(&link, side).display()))
                }
                What::Changed(keys) => self
                    // A large spool takes minutes, for which the other links would stand still.
                    .begin(links, &link, side, When::InItsTask)
                    .await
                    .map(|()| format!("changed ({}), and {}", keys.join(", "), goes_on(side, keys))),
                What::Added => self.begin(links, &link, side, When::Now).await.map(|()| "added and started".to_owned()),
            };
            match outcome {
                Ok(what) => reloaded.taken.push(format!("{name}: {what}")),
                Err(why) => {
                    forget(&mut self.running, &link, side);
                    reloaded.failed.push(format!("{name}: {why}"));
                }
            }
        }
        links.start(&self.running);
        self.in_force.send_replace(Arc::new(self.running.clone()));
        reloaded
    }

    async fn begin(&self, links: &mut Links, link: &LinkName, side: Side, when: When) -> Result<(), String> {
        links.open(&self.running, link, side, when).await.map_err(|error| with_sources(error.as_ref()))
    }

    fn dir(&self, link: &LinkName, side: Side) -> PathBuf {
        self.running.data_dir.join(side.as_str()).join(link.as_str())
    }
}

/// What becomes of a link that is changed.
fn goes_on(side: Side, keys: &[&str]) -> &'static str {
    let other_ranges = side == Side::Origin && keys.iter().any(|key| ["prefixes", "exclude"].contains(key));
    if other_ranges {
        "begins with a base copy, since its ranges are others"
    } else {
        "goes on from what it has on disk"
    }
}

fn own(keys: &[&'static str]) -> Vec<String> {
    keys.iter().map(|key| (*key).to_owned()).collect()
}

/// A link that does not run is one that the next reload adds.
fn forget(running: &mut Config, link: &LinkName, side: Side) {
    match side {
        Side::Origin => running.send.retain(|send| send.link != *link),
        Side::Replica => running.receive.retain(|receive| receive.link != *link),
    }
}

fn tell(file: &str, reloaded: &Reloaded) {
    let Reloaded { taken, failed, needs_restart } = reloaded;
    for what in taken {
        tracing::info!(%file, %what, "the configuration is read again, and this is taken");
    }
    for what in failed {
        tracing::error!(%file, %what, "the configuration is read again, and this could not be taken");
    }
    if !needs_restart.is_empty() {
        let keys = needs_restart.join(", ");
        tracing::warn!(%file, %keys, "the configuration is read again, and these keys stay as they are until the sidecar is restarted");
    }
    if taken.is_empty() && failed.is_empty() && needs_restart.is_empty() {
        tracing::info!(%file, "the configuration is read again, and nothing in it has changed");
    }
}
