//! Job: one child process: start, signals, its log, its memory.
//! Input: a command. Output: a `Process`; its log goes to a file.
//! Always true: the process is killed and reaped when its value is dropped; if the test is panicking, the end of its log is printed.

use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The kernel stops a process's threads one by one.
const STOP_MAX: Duration = Duration::from_secs(10);

const LOG_LINES_SHOWN: usize = 60;

pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; both of its outputs are appended to `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Self {
        let open = || File::options().create(true).append(true).open(log).expect("the log file opens");
        let child = command.stdin(Stdio::null()).stdout(open()).stderr(open()).spawn();
        let child = child.unwrap_or_else(|e| panic!("{name} does not start: {e} ({command:?})"));
        Self { name: name.to_owned(), child, log: log.to_owned() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGKILL, and reaped.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM; how long it took to end, and how. Panics at the limit.
    pub async fn terminate(&mut self, limit: Duration) -> (Duration, ExitStatus) {
        let start = Instant::now();
        self.signal(Signal::TERM);
        let what = format!("{} to end after SIGTERM", self.name);
        let status =
            super::until(&what, limit, async || self.child.try_wait().expect("a child can be waited for")).await;
        (start.elapsed(), status)
    }

    /// SIGSTOP: it stays, and does nothing. Returns when all of its threads stand still: on a busy machine they go on for a while.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
        let deadline = Instant::now() + STOP_MAX;
        while !self.stands_still() {
            assert!(Instant::now() < deadline, "process {} goes on though it was stopped", self.id());
            std::thread::yield_now();
        }
    }

    fn stands_still(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.id())).into_iter().flatten().flatten();
        let states = tasks.filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
        // The name in parentheses may hold anything; the state follows it.
        states
            .into_iter()
            .all(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['T', 't', 'Z', 'X'])))
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGHUP.
    pub fn hang_up(&self) {
        self.signal(Signal::HUP);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap_or_else(|e| panic!("{}: {e}", self.name));
    }

    /// CPU time since its start, user and system.
    pub fn cpu_seconds(&self) -> f64 {
        // `utime` and `stime`, counted after the name in parentheses, in ticks of 10 ms.
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        let ticks = after_name.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok());
        ticks.sum::<f64>() / 100.0
    }

    /// Resident memory now and at its highest, in bytes (`VmRSS` and `VmHWM`).
    pub fn memory_bytes(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1_024
        };
        (field("VmRSS:"), field("VmHWM:"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let from = lines.len().saturating_sub(LOG_LINES_SHOWN);
            eprintln!("--- end of the log of {} ---\n{}\n---", self.name, lines[from..].join("\n"));
        }
    }
}
