//! Job: `etcd-ferry top` at a real terminal: what it shows, and that the terminal is as it was when it ends.
//! Input: the binary behind a pseudo-terminal, a running pair. Output: passes or fails.
//! Edge: a pseudo-terminal of its own.
//! Always true: what is judged is what a terminal would have been sent.

use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::ports::Nobody;
use crate::bed::sidecar::Sidecar;
use crate::bed::{PATIENCE, until};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};

/// What switches to the second screen of a terminal, and back.
const ENTER: &str = "\u{1b}[?1049h";
const LEAVE: &str = "\u{1b}[?1049l";

/// A command at a terminal of its own.
struct AtTerminal {
    child: Child,
    /// The terminal's other end.
    master: File,
    /// Held, so that what was sent last can be read after the command has ended.
    terminal: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl AtTerminal {
    fn start(arguments: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
        grantpt(&master).expect("it is ours");
        unlockpt(&master).expect("it can be opened");
        let name = ptsname(&master, Vec::new()).expect("its name");
        let open =
            || rustix::fs::open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("it opens");
        let terminal = File::from(open());
        assert!(echoes(&terminal));
        let size = Winsize { ws_row: 30, ws_col: 190, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal, size).expect("it has a size");
        let child = Command::new(env!("CARGO_BIN_EXE_etcd-ferry"))
            .args(arguments)
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .stdin(File::from(open()))
            .stdout(File::from(open()))
            .stderr(File::from(open()))
            .spawn()
            .expect("etcd-ferry starts");
        let master = File::from(master);
        let (mut reading, seen) = (master.try_clone().expect("a second handle"), Arc::new(Mutex::new(Vec::new())));
        let kept = seen.clone();
        // It ends with the terminal.
        std::thread::spawn(move || {
            let mut piece = [0; 4_096];
            while let Ok(count @ 1..) = reading.read(&mut piece) {
                kept.lock().unwrap().extend_from_slice(&piece[..count]);
            }
        });
        Self { child, master, terminal, seen }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    async fn shows(&self, words: &str) {
        until(&format!("the terminal to show {words:?}"), PATIENCE, async || self.text().contains(words).then_some(()))
            .await;
    }

    /// What is shown from now on is what counts.
    fn forget(&self) {
        self.seen.lock().unwrap().clear();
    }

    async fn ended(&mut self) -> ExitStatus {
        let child = &mut self.child;
        until("top to end", PATIENCE, async || child.try_wait().expect("a child can be waited for")).await
    }
}

/// True while keys are shown as they are typed, as a shell wants it.
fn echoes(terminal: &File) -> bool {
    tcgetattr(terminal).expect("its modes").local_modes.contains(rustix::termios::LocalModes::ECHO)
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_terminal_shows_every_link_live_until_a_key_or_a_signal_and_is_then_as_it_was() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let configs = [&pair.origin_sidecar, &pair.replica_sidecar].map(|sidecar| sidecar.config_path());
    let [origin, replica] = configs.each_ref().map(|path| path.to_str().expect("a plain name"));
    let arguments = ["top", "--config", origin, "--config", replica];

    let once = Command::new(env!("CARGO_BIN_EXE_etcd-ferry")).args(arguments).output().unwrap();
    let text = String::from_utf8(once.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(once.status.success() && lines.len() >= 3 && !text.contains('\u{1b}'), "{text}");
    assert!(lines[1].starts_with("us-east-1-a") && lines[2].starts_with("cn-hangzhou-a"), "{text}");

    for way in ["q", "\u{3}", "SIGTERM"] {
        let mut top = AtTerminal::start(&arguments);
        // Only cells that change are sent, so that words are sent whole where nothing stood before.
        top.shows("cn-hangzhou-a").await;
        top.shows("following").await;
        assert!(top.text().contains(ENTER) && !top.text().contains(LEAVE) && !echoes(&top.terminal), "{way}");
        match way {
            "SIGTERM" => kill_process(Pid::from_child(&top.child), Signal::TERM).unwrap(),
            key => top.master.write_all(key.as_bytes()).unwrap(),
        }
        let status = top.ended().await;
        assert!(status.success(), "{way}: {status}\n{}", top.text());
        top.shows(LEAVE).await;
        assert!(echoes(&top.terminal), "{way}");
    }
}

/// The calls for its status that a sidecar's log holds. Nobody else makes one where only http is asked.
fn status_calls(sidecar: &Sidecar) -> Vec<String> {
    let of_status = |line: &&str| line.contains("admin call") && line.contains("Status");
    sidecar.log().lines().filter(of_status).map(str::to_owned).collect()
}

#[tokio::test]
async fn a_top_that_runs_on_is_one_line_in_a_sidecars_log_and_one_more_where_the_sidecar_was_started_again() {
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    pair.origin_sidecar.restart().await;
    let config = pair.replica_sidecar.config_path();
    let top = AtTerminal::start(&["top", "--config", config.to_str().expect("a plain name")]);
    top.shows("answer:").await;
    pair.replica_sidecar.restart().await;
    top.shows("cn-hangzhou-a").await;
    pair.replica_sidecar.wait_for_state(LINK, "following").await;
    // Each of these words is of other letters than the one that it takes the place of, and so is sent whole.
    for _ in 0..3 {
        for (command, state) in [("pause", "paused"), ("resume", "following")] {
            top.forget();
            let output = pair.replica_sidecar.admin(&[command, LINK]);
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            top.shows(state).await;
        }
    }
    let calls = status_calls(&pair.replica_sidecar);
    assert!(calls.len() == 1 && calls[0].contains("WatchStatus"), "{calls:#?}");

    top.forget();
    pair.replica_sidecar.stop().await;
    top.shows("answer:").await;
    pair.replica_sidecar.restart().await;
    let calls = async || Some(status_calls(&pair.replica_sidecar)).filter(|calls| calls.len() > 1);
    let calls = until("a call to the sidecar that was started again", PATIENCE, calls).await;
    assert_eq!(calls.len(), 2, "{calls:#?}");
}

#[tokio::test]
async fn top_without_a_sidecar_says_so_and_fails() {
    let pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    let nobody = Nobody::new();
    let flag = format!("listen.admin={}", nobody.address);
    let output = pair.origin_sidecar.admin(&["top", "--set", &flag]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    let told = stderr.contains(&format!("no sidecar answers at {}", nobody.address));
    assert!(told && stderr.lines().count() == 1, "{stderr}");
}
