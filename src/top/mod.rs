//! Job: `etcd-ferry top`: every link of one or several sidecars, live on a terminal, or once as text.
//! Input: where the sidecars are; keys; signals. Output: a screen that is drawn anew after each look.
//! Edge: asks each sidecar once, which tells its status each second from then on; what is shown is decided in past.rs and drawn in screen.rs.
//! Always true: however it ends (a key, a signal, a panic), the terminal is as it was; a sidecar that does not answer hides no other.

pub mod past;
pub mod screen;

use crate::admin::client::{self, ClientError, Connection, Statuses};
use crate::admin::proto::StatusReply;
use past::Past;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// From one look at a sidecar to the next.
const LOOK_EVERY_MS: u32 = 1_000;
/// After a call that has failed, until the next one.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Looks and keys that wait to be shown: drawing takes milliseconds.
const WAITING_MAX: usize = 16;
/// How long the reader of keys takes to notice that it is over.
const KEY_WAIT: Duration = Duration::from_millis(100);

/// A sidecar to look at.
#[derive(Debug, Clone)]
pub struct Source {
    /// What it is called until it has told its node's name.
    pub name: String,
    pub connection: Connection,
}

enum Heard {
    Looked { sidecar: usize, answer: Box<Result<StatusReply, ClientError>> },
    Quit,
    Resized,
    KeysLost(io::Error),
}

/// All links, once, as text. An error: no sidecar answers.
pub async fn once(sources: Vec<Source>) -> Result<String, ClientError> {
    let mut past = Past::new(sources.iter().map(|source| source.name.clone()).collect());
    let looks = sources.iter().map(|source| client::status(&source.connection));
    let mut first = None;
    for (sidecar, answer) in futures::future::join_all(looks).await.into_iter().enumerate() {
        match answer {
            Ok(reply) => past.answered(sidecar, reply, now_ms()),
            Err(error) => {
                past.failed(sidecar, error.to_string());
                first.get_or_insert(error);
            }
        }
    }
    match first {
        Some(error) if !past.has_answers() => Err(error),
        Some(_) | None => Ok(screen::text(&past, now_ms())),
    }
}

/// Shows all links until a key or a signal ends it.
pub async fn live(sources: Vec<Source>) -> io::Result<()> {
    let mut past = Past::new(sources.iter().map(|source| source.name.clone()).collect());
    let (tell, mut heard) = mpsc::channel(WAITING_MAX);
    let mut ends = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    let over = Arc::new(AtomicBool::new(false));
    let mut terminal = Terminal::enter()?;
    let mut tasks = JoinSet::new();
    for (sidecar, source) in sources.into_iter().enumerate() {
        tasks.spawn(look(sidecar, source.connection, tell.clone()));
    }
    let mut keys = JoinSet::new();
    keys.spawn_blocking({
        let over = over.clone();
        move || read_keys(&tell, &over)
    });
    let outcome = loop {
        if let Err(error) = terminal.0.draw(|frame| screen::draw(frame, &past, now_ms())) {
            break Err(error);
        }
        let heard = tokio::select! {
            biased;
            () = any(&mut ends) => break Ok(()),
            heard = heard.recv() => heard,
        };
        match heard {
            Some(Heard::Looked { sidecar, answer }) => match *answer {
                Ok(reply) => past.answered(sidecar, reply, now_ms()),
                Err(error) => past.failed(sidecar, error.to_string()),
            },
            Some(Heard::Resized) => {}
            Some(Heard::KeysLost(error)) => break Err(error),
            Some(Heard::Quit) | None => break Ok(()),
        }
    };
    over.store(true, Ordering::Relaxed);
    drop((terminal, heard));
    tasks.shutdown().await;
    while keys.join_next().await.is_some() {}
    outcome
}

/// The terminal while it shows the screen; what it was before comes back when this is dropped, and when anything panics.
struct Terminal(ratatui::DefaultTerminal);

impl Terminal {
    fn enter() -> io::Result<Self> {
        ratatui::try_init().map(Self)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// The first of the signals. One that cannot be waited for never comes.
async fn any(signals: &mut [io::Result<Signal>; 3]) {
    let waiting = signals.iter_mut().filter_map(|signal| signal.as_mut().ok());
    let waiting: Vec<_> = waiting.map(|signal| Box::pin(signal.recv())).collect();
    if waiting.is_empty() {
        return std::future::pending().await;
    }
    futures::future::select_all(waiting).await;
}

/// One call for as long as it lasts: each is a line in the sidecar's log.
async fn look(sidecar: usize, connection: Connection, tell: mpsc::Sender<Heard>) {
    let mut call = None;
    loop {
        let answer = Box::new(next(&mut call, &connection).await);
        let has_failed = answer.is_err();
        if tell.send(Heard::Looked { sidecar, answer }).await.is_err() {
            return;
        }
        if has_failed {
            call = None;
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// What the sidecar tells next, after another call if none is open.
async fn next<'c>(call: &mut Option<Statuses<'c>>, connection: &'c Connection) -> Result<StatusReply, ClientError> {
    let statuses = match call {
        Some(statuses) => statuses,
        None => call.insert(Statuses::open(connection, LOOK_EVERY_MS).await?),
    };
    statuses.next().await
}

/// On a thread of its own: a terminal is read by waiting.
fn read_keys(tell: &mpsc::Sender<Heard>, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let heard = match event::poll(KEY_WAIT).and_then(|is_there| is_there.then(event::read).transpose()) {
            Ok(None) => continue,
            Ok(Some(event)) => match meaning(&event) {
                Some(heard) => heard,
                None => continue,
            },
            Err(error) => Heard::KeysLost(error),
        };
        let last = matches!(heard, Heard::KeysLost(_));
        if tell.blocking_send(heard).is_err() || last {
            return;
        }
    }
}

/// In raw mode Ctrl-C is a key and no signal.
fn meaning(event: &Event) -> Option<Heard> {
    if matches!(event, Event::Resize(..)) {
        return Some(Heard::Resized);
    }
    let key = event.as_key_event().filter(|key| key.kind == KeyEventKind::Press)?;
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    (control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)).then_some(Heard::Quit)
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
