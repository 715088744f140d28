//! Job: the README's first link by hand: what it says is typed into a shell, and what it shows is what comes.
//! Input: README.md. Output: passes or fails.
//! Always true: the commands are the README's own, but for their ports; of what they print only numbers, times and widths may differ.

use crate::bed::ports::free_port;
use crate::bed::{PATIENCE, until};
use crate::documents;
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// What a command ends with, before its exit code.
const END: &str = "-- ended with ";
/// These change nothing: they may be asked until what was begun before them is done.
const LOOKS: [&str; 3] = [" get ", " status ", " check "];

/// A block of code: its kind, what is inside, and the last word in backticks before it.
struct Block {
    kind: String,
    text: String,
    named: String,
}

fn blocks(section: &str) -> Vec<Block> {
    let (mut blocks, mut rest) = (Vec::new(), section);
    while let Some((before, after)) = rest.split_once("\n```") {
        let (kind, after) = after.split_once('\n').unwrap();
        let (text, left) = after.split_once("\n```").unwrap();
        let named = before.rsplit('`').nth(1).unwrap_or_default();
        blocks.push(Block { kind: kind.to_owned(), text: text.to_owned(), named: named.to_owned() });
        rest = left;
    }
    blocks
}

/// The commands of a console, each with what it prints.
fn commands(console: &str) -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    let mut lines = console.lines();
    while let Some(line) = lines.next() {
        let Some(command) = line.strip_prefix("$ ") else {
            let (_, printed) = commands.last_mut().expect("a console begins with a command");
            *printed += &format!("{line}\n");
            continue;
        };
        let mut command = command.to_owned();
        while command.contains("<<END") && !command.ends_with("\nEND") {
            command += &format!("\n{}", lines.next().expect("END"));
        }
        commands.push((command, String::new()));
    }
    commands
}

/// With numbers and widths made equal.
fn shape(text: &str) -> String {
    let mut shape = String::new();
    for word in text.split_whitespace() {
        let mut last = ' ';
        for letter in word.chars().map(|letter| if letter.is_ascii_digit() { '#' } else { letter }) {
            if letter != '#' || last != '#' {
                shape.push(letter);
            }
            last = letter;
        }
        shape.push(' ');
    }
    shape
}

/// The README's ports, and those of this run.
struct Ports(BTreeMap<String, u16>);

const HOST: &str = "127.0.0.1:";

fn port_of(rest: &str) -> (&str, &str) {
    rest.split_at(rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len()))
}

impl Ports {
    fn of(section: &str) -> Self {
        // The one that the log shows of a caller was chosen by the system.
        let written =
            section.split(HOST).zip(section.split(HOST).skip(1)).filter(|(before, _)| !before.ends_with("from="));
        Self(written.map(|(_, rest)| (port_of(rest).0.to_owned(), free_port())).collect())
    }

    fn put_into(&self, text: &str) -> String {
        let mut parts = text.split(HOST);
        let mut put = parts.next().unwrap_or_default().to_owned();
        for rest in parts {
            let (port, rest) = port_of(rest);
            let port = self.0.get(port).map_or_else(|| port.to_owned(), u16::to_string);
            put += &format!("{HOST}{port}{rest}");
        }
        put
    }
}

/// A shell with what was begun in it.
struct Shell {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Shell {
    fn start(dir: &Path) -> Self {
        let own = Path::new(env!("CARGO_BIN_EXE_etcd-ferry")).parent().unwrap().to_owned();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(std::iter::once(own).chain(std::env::split_paths(&path))).unwrap();
        let mut command = Command::new("bash");
        command.current_dir(dir).env("PATH", path).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, input, output: BufReader::new(output).lines() }
    }

    /// What a command prints, on both outputs, and its exit code.
    async fn run(&mut self, command: &str) -> (String, i32) {
        let typed = format!("{{\n{command}\n}} 2>&1\necho '{END}'$?\n");
        let run = async {
            self.input.write_all(typed.as_bytes()).await.unwrap();
            let mut printed = String::new();
            loop {
                let line = self.output.next_line().await.unwrap().expect("the shell goes on");
                match line.split_once(END) {
                    Some((last, code)) => return (printed + last, code.parse().unwrap()),
                    None => printed += &format!("{line}\n"),
                }
            }
        };
        tokio::time::timeout(PATIENCE, run).await.unwrap_or_else(|_| panic!("{command} does not end"))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let id = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(group) = id {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Runs a command of the document until it prints what stands there; once, if it changes something.
async fn prints(shell: &mut Shell, command: &str, told: &str) {
    let looks = LOOKS.iter().any(|looks| command.contains(looks));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (printed, code) = shell.run(command).await;
        if code == 0 && shape(&printed) == shape(told) {
            return;
        }
        let waits = looks && Instant::now() < deadline;
        assert!(waits, "$ {command}\n{printed}\nexit code {code}; the README says:\n{told}");
    }
}

/// Both sidecars are up, as somebody sees who types the next command.
async fn follows(log: PathBuf) {
    let lines = async || fs::read_to_string(&log).ok()?.contains(": following link=").then_some(());
    until("the link to follow", PATIENCE, lines).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_link_by_hand_goes_as_the_readme_says() {
    let readme = documents::text("README.md");
    let section = readme.split("\n## A first link, by hand\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let ports = Ports::of(section);
    assert_eq!(ports.0.len(), 10, "{:?}", ports.0.keys());
    let origin = ports.0["2379"];
    let folder = tempfile::tempdir().unwrap();
    let mut shell = Shell::start(folder.path());
    let mut shown = 0;
    for Block { kind, text, named } in blocks(section) {
        let text = ports.put_into(&format!("{text}\n"));
        match kind.as_str() {
            "toml" => fs::write(folder.path().join(&named), text).unwrap(),
            "sh" => {
                assert_eq!(shell.run(&text).await, (String::new(), 0), "{text}");
                if text.contains("etcd-ferry run") {
                    follows(folder.path().join("us-east-1.log")).await;
                }
            }
            "console" => {
                for (command, told) in commands(&text) {
                    // Where etcdctl goes by itself is another test's.
                    let own = format!("etcdctl --endpoints http://127.0.0.1:{origin} ");
                    let elsewhere = command.contains("--endpoints");
                    let command = if elsewhere { command } else { command.replacen("etcdctl ", &own, 1) };
                    prints(&mut shell, &command, &told).await;
                    shown += 1;
                }
            }
            "text" => {
                let log = fs::read_to_string(folder.path().join("us-east-1.log")).unwrap();
                let without_time = |line: &str| shape(line.trim_start().split_once(' ').unwrap().1);
                let lines: Vec<String> = log.lines().map(without_time).collect();
                for told in text.lines() {
                    assert!(lines.contains(&without_time(told)), "{told}\nis not in:\n{log}");
                    shown += 1;
                }
            }
            other => panic!("a block of {other}"),
        }
    }
    assert!(shown >= 12, "{shown} outputs were looked at");
    let stop = "kill %1 %2 %3 %4";
    assert!(section.contains(stop));
    // The shell itself tells how etcd ended; the last one is a sidecar.
    let (_, code) = shell.run(&format!("{stop}\nwait %1 %2 %3 %4")).await;
    assert_eq!(code, 0, "a sidecar that is asked to stop does, in order");
}
