//! Job: the log: set it up, change its level while the sidecar runs, keep its last lines.
//! Input: `[log]` of the configuration, a level. Output: lines on standard error; the level in force; the last lines.
//! Edge: writes to standard error.
//! Always true: a level is checked before it is taken; one that is changed lasts until the process ends, and is written nowhere.

pub mod recent;

use crate::config::{LOG_LEVEL_RULE, LogConfig, LogFormat, is_log_level};
use recent::Recent;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::MakeWriterExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

/// The target of what operators changed, and of what was refused to them. It is logged whatever the level: no level switches it off.
pub const AUDIT: &str = "etcd_ferry::audit";

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("the log level {level:?} {LOG_LEVEL_RULE}")]
    Level { level: String },
    #[error("logging cannot be set up: {0}")]
    Taken(#[from] TryInitError),
    #[error("the log's level cannot be changed: {0}")]
    Reload(#[from] reload::Error),
}

/// The log of this process. Clones are the same log.
#[derive(Clone)]
pub struct Logs {
    filter: reload::Handle<EnvFilter, Registry>,
    configured: Arc<Mutex<String>>,
    level: Arc<Mutex<String>>,
    recent: Arc<Mutex<Recent>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sets up logging; call once.
pub fn install(config: &LogConfig) -> Result<Logs, LogError> {
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (logs, subscriber) = prepare(config, colours)?;
    subscriber.try_init()?;
    Ok(logs)
}

/// A log that is not this process's yet.
pub fn prepare(config: &LogConfig, colours: bool) -> Result<(Logs, impl Subscriber + Send + Sync), LogError> {
    let (filter, handle) = reload::Layer::new(filter_of(&config.level)?);
    let logs = Logs {
        filter: handle,
        configured: Arc::new(Mutex::new(config.level.clone())),
        level: Arc::new(Mutex::new(config.level.clone())),
        recent: Arc::default(),
    };
    let writer = io::stderr.and(KeepRecent(logs.recent.clone()));
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    let lines = match config.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    Ok((logs, tracing_subscriber::registry().with(filter).with(lines)))
}

/// Whether a level could be set.
pub fn check(level: &str) -> Result<(), LogError> {
    filter_of(level).map(drop)
}

fn filter_of(level: &str) -> Result<EnvFilter, LogError> {
    let wrong = || LogError::Level { level: level.to_owned() };
    if !is_log_level(level) {
        return Err(wrong());
    }
    // Of two directives for one target a filter takes the later one.
    EnvFilter::try_new(format!("{level},{AUDIT}=info")).map_err(|_| wrong())
}

impl Logs {
    /// The level in force, and the configured one, which comes back with the next start.
    pub fn levels(&self) -> (String, String) {
        (lock(&self.level).clone(), lock(&self.configured).clone())
    }

    /// Until the process ends. Returns the level before.
    pub fn set_level(&self, level: &str) -> Result<String, LogError> {
        let filter = filter_of(level)?;
        // Held over the change: of two at once, the one that is told is the one in force.
        let mut now = lock(&self.level);
        self.filter.reload(filter)?;
        Ok(std::mem::replace(&mut *now, level.to_owned()))
    }

    /// The configuration says something else now: that is in force, and comes back with the next start.
    pub fn configure(&self, level: &str) -> Result<(), LogError> {
        self.set_level(level)?;
        level.clone_into(&mut lock(&self.configured));
        Ok(())
    }

    /// The last lines.
    pub fn recent(&self) -> String {
        lock(&self.recent).text()
    }
}

/// Keeps what is written beside standard error.
struct KeepRecent(Arc<Mutex<Recent>>);

impl<'a> MakeWriter<'a> for KeepRecent {
    type Writer = Keep<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        Keep(&self.0)
    }
}

struct Keep<'a>(&'a Mutex<Recent>);

/// An event comes as one piece.
impl Write for Keep<'_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        lock(self.0).push(&String::from_utf8_lossy(piece));
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(level: &str) -> LogConfig {
        LogConfig { format: LogFormat::Text, level: level.to_owned() }
    }

    #[test]
    fn a_level_is_checked_then_in_force_and_the_configured_one_is_told_beside_it() {
        let (logs, subscriber) = prepare(&config("info"), false).unwrap();
        let _guard = tracing::subscriber::set_default(subscriber);
        tracing::debug!("too fine to be told");
        assert_eq!(logs.set_level("warn,etcd_ferry=debug").unwrap(), "info");
        tracing::debug!("told now");
        assert_eq!(logs.levels(), ("warn,etcd_ferry=debug".to_owned(), "info".to_owned()));
        for wrong in ["", "loud", "etcd_ferry", "etcd_ferry=loud", "info,"] {
            let error = logs.set_level(wrong).unwrap_err().to_string();
            assert!(error.contains("must be off, error, warn"), "{wrong}: {error}");
        }
        assert_eq!(logs.levels().0, "warn,etcd_ferry=debug", "a wrong one changes nothing");
        let recent = logs.recent();
        assert!(recent.contains("told now") && !recent.contains("too fine"), "{recent}");
        assert!(prepare(&config("loud"), false).is_err());
    }

    #[test]
    fn what_operators_change_is_logged_at_every_level_also_at_one_that_names_it() {
        for level in ["off", "off,etcd_ferry::audit=off", "etcd_ferry::audit=error,off", "etcd_ferry=off"] {
            let (logs, subscriber) = prepare(&config("info"), false).unwrap();
            let _guard = tracing::subscriber::set_default(subscriber);
            logs.set_level(level).unwrap();
            tracing::error!(target: "etcd_ferry::other", "of no operator");
            tracing::info!(target: AUDIT, "an operator's change");
            let recent = logs.recent();
            assert!(recent.contains("an operator's change") && !recent.contains("of no operator"), "{level}: {recent}");
        }
    }
}
