//! Job: `etcd-ferry demo` as a user runs it: it passes, says what it did, and leaves nothing behind, however it ends.
//! Input: the program, etcd, a temporary folder in which the demo makes its own. Output: passes or fails.
//! Always true: what is left behind is looked for among all processes and in the folder, not asked of the demo.

use crate::bed::etcd::EtcdOptions;
use crate::bed::process::Process;
use crate::bed::{PATIENCE, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// The demo makes its folder in `temporary`, and finds the etcd of the tests first.
fn demo(temporary: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_etcd-ferry"));
    command.arg("demo").args(arguments).env("TMPDIR", temporary);
    if let Some(bin) = EtcdOptions::default().bin {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(bin).chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(folders).unwrap());
    }
    command
}

/// Ids and command lines of all processes that name a file in `folder`, zombies aside: they name none.
fn processes_in(folder: &Path) -> Vec<(i32, String)> {
    let folder = folder.to_str().unwrap();
    let lines = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let entry = entry.ok()?;
        let id = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        Some((id, String::from_utf8_lossy(&line).replace('\0', " ")))
    });
    lines.filter(|(_, line)| line.contains(folder)).collect()
}

fn assert_nothing_is_left(temporary: &Path) {
    assert_eq!(processes_in(temporary), Vec::new());
    let left: Vec<_> = fs::read_dir(temporary).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_short_demo_passes_and_leaves_nothing_behind() {
    let temporary = TempDir::new().unwrap();
    let mut command = demo(temporary.path(), &["--seconds", "4", "--json"]);
    let run = tokio::task::spawn_blocking(move || command.output().unwrap());
    let Output { status, stdout, stderr } = tokio::time::timeout(PATIENCE * 2, run).await.unwrap().unwrap();
    let lines = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{status}\n{lines}");
    let report: Value = serde_json::from_slice(&stdout).unwrap();
    assert_eq!((&report["passed"], &report["difference"]), (&true.into(), &Value::Null), "{report:#}");
    assert!(report["written"]["revisions"].as_u64().unwrap() > 100, "{report:#}");
    assert_eq!(report["written"]["revisions"], report["applied"]["seq"]);
    assert!(report["written"]["deletes"].as_u64().unwrap() >= 3_000, "{report:#}");
    assert!(
        report["bytes_sent"].as_u64().unwrap() > 10_000 && report["keys_compared"].as_u64().unwrap() > 100,
        "{report:#}"
    );
    assert_eq!(report["faults"].as_array().unwrap().len(), 3);
    for happened in ["the link is cut", "the link is healed", "the sidecar in us-east-1", "the sidecar in cn-hangzhou"]
    {
        assert!(lines.contains(happened), "{happened} is not said:\n{lines}");
    }
    assert_nothing_is_left(temporary.path());
}

/// Starts a demo, sends `signals` once `when` holds of the number of its processes and what it printed, and waits for its end.
async fn interrupted(signals: &[Signal], when: impl Fn(usize, &str) -> bool) {
    let temporary = TempDir::new().unwrap();
    let log = TempDir::new().unwrap();
    let mut command = demo(temporary.path(), &["--keep", "--seconds", "3"]);
    let mut demo = Process::start("the demo", &mut command, &log.path().join("log"));
    until("the moment to interrupt", PATIENCE * 2, async || {
        when(processes_in(temporary.path()).len(), &demo.log()).then_some(())
    })
    .await;
    let pid = Pid::from_raw(i32::try_from(demo.id()).unwrap()).unwrap();
    for signal in signals {
        // The second one may come too late.
        let _ = kill_process(pid, *signal);
    }
    until("the demo to end", Duration::from_secs(10), async || demo.ended()).await;
    assert_nothing_is_left(temporary.path());
}

#[tokio::test]
async fn a_signal_while_it_starts_leaves_nothing_behind() {
    interrupted(&[Signal::INT], |processes, _| processes >= 1).await;
    interrupted(&[Signal::TERM], |processes, _| processes >= 3).await;
}

#[tokio::test]
async fn ctrl_c_pressed_twice_while_it_writes_leaves_nothing_behind() {
    interrupted(&[Signal::INT, Signal::INT], |_, log| log.contains("now it writes")).await;
}

#[tokio::test]
async fn with_keep_it_stays_until_ctrl_c_with_commands_that_work_and_leaves_nothing_behind() {
    let temporary = TempDir::new().unwrap();
    let log = TempDir::new().unwrap();
    let mut command = demo(temporary.path(), &["--keep", "--seconds", "3"]);
    let mut demo = Process::start("the demo", &mut command, &log.path().join("log"));
    let printed = until("the commands to look at both regions", PATIENCE * 2, async || {
        assert!(demo.ended().is_none(), "{}", demo.log());
        let log = demo.log();
        log.contains("until Ctrl-C").then_some(log)
    })
    .await;
    let commands: Vec<&str> =
        printed.lines().filter(|line| line.contains(" status ") || line.contains("etcdctl ")).collect();
    assert_eq!(commands.len(), 5, "{printed}");
    for command in commands {
        let output = Command::new("sh").args(["-c", command]).stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success() && !output.stdout.is_empty(), "{command}: {output:?}");
    }
    kill_process(Pid::from_raw(i32::try_from(demo.id()).unwrap()).unwrap(), Signal::INT).unwrap();
    let ended = until("the demo to end", Duration::from_secs(10), async || demo.ended()).await;
    assert!(ended.success(), "{ended}");
    assert_nothing_is_left(temporary.path());
}

#[tokio::test]
async fn an_etcd_that_dies_ends_the_demo_with_that_reason_and_leaves_nothing_behind() {
    let temporary = TempDir::new().unwrap();
    let log = TempDir::new().unwrap();
    let mut demo = Process::start("the demo", &mut demo(temporary.path(), &[]), &log.path().join("log"));
    until("the demo to write", PATIENCE * 2, async || demo.log().contains("now it writes").then_some(())).await;
    let etcd = processes_in(temporary.path()).into_iter().find(|(_, line)| line.contains("cn-hangzhou/etcd"));
    kill_process(Pid::from_raw(etcd.unwrap().0).unwrap(), Signal::KILL).unwrap();
    let ended = until("the demo to end", Duration::from_secs(10), async || demo.ended()).await;
    assert_eq!(ended.code(), Some(1));
    assert!(demo.log().contains("the etcd of cn-hangzhou ended by itself"), "{}", demo.log());
    assert_nothing_is_left(temporary.path());
}
