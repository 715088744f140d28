//! Job: one child process of the demo.
//! Input: a command, and a file for what it prints. Output: a `Process`.
//! Always true: the child is killed and reaped when its value is dropped, on every way out of the demo, a panic included; a Ctrl-C at the
//! terminal does not reach it, so it ends only by our hand.

use crate::config::is_variable;
use anyhow::Context;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

const LOG_LINES_SHOWN: usize = 15;

pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` in a process group of its own; both of its outputs are appended to `log`.
    pub fn start(command: &mut Command, log: PathBuf) -> anyhow::Result<Self> {
        let open = || File::options().create(true).append(true).open(&log);
        // The demo's sidecars are as the demo configures them.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_variable)) {
            command.env_remove(name);
        }
        command.stdin(Stdio::null()).stdout(open()?).stderr(open()?).process_group(0);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("{program} cannot be started: is it in PATH? (`make demo` installs it)"))?;
        Ok(Self { child, log })
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// `kill -9`; it is gone when this returns.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The last lines that it printed.
    pub fn log_end(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
