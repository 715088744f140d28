//! Job: what the demo shows while it runs: one live line, and a line of its own for each thing that happens.
//! Input: what was seen at both ends, the proxy's byte counters. Output: text; how far the replica is, for whoever waits for it.
//! Always true: on a terminal the live line is redrawn in place and fits 80 columns; elsewhere it is printed now and then.

use super::meter::{Arrived, Backlog, Lag, Meter, Written};
use super::proxy::LinkProxy;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

const REDRAW: Duration = Duration::from_millis(200);
const REPRINT: Duration = Duration::from_secs(3);

/// What the board is told.
pub enum Seen {
    Written(Written),
    Arrived(Arrived),
    /// Something happened that deserves a line.
    Happened(String),
    /// Since when nothing is wrong with the link; `None`: something is.
    Calm(Option<Instant>),
    /// Answer when everything that was told before is taken in.
    Asked(oneshot::Sender<()>),
    /// The demo cannot go on.
    Failed(anyhow::Error),
}

/// Where lines go.
pub struct Screen {
    out: Box<dyn Write>,
    terminal: bool,
    /// The cursor stands at the end of a live line.
    drawn: bool,
}

impl Screen {
    /// Standard output; with `json`, that is for the report alone, and lines go to standard error.
    pub fn open(json: bool) -> Self {
        if json {
            Self { out: Box::new(io::stderr()), terminal: io::stderr().is_terminal(), drawn: false }
        } else {
            Self { out: Box::new(io::stdout()), terminal: io::stdout().is_terminal(), drawn: false }
        }
    }

    /// Lines that stay.
    pub fn say(&mut self, text: &str) -> io::Result<()> {
        self.clear()?;
        writeln!(self.out, "{}", text.trim_end())?;
        self.out.flush()
    }

    /// The live line.
    fn draw(&mut self, line: &str) -> io::Result<()> {
        if !self.terminal {
            return self.say(line);
        }
        write!(self.out, "\r{line}\x1b[K")?;
        self.drawn = true;
        self.out.flush()
    }

    fn clear(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.drawn) { write!(self.out, "\r\x1b[K") } else { Ok(()) }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.clear();
        let _ = self.out.flush();
    }
}

/// Owns the meter and the screen while the demo runs.
pub struct Board {
    pub screen: Screen,
    pub meter: Meter,
    start: Instant,
    proxy: Arc<LinkProxy>,
    /// What had crossed the link before, such as the first copy.
    bytes_before: (u64, u64),
    backlog: watch::Sender<Backlog>,
}

impl Board {
    pub fn new(screen: Screen, proxy: Arc<LinkProxy>, backlog: watch::Sender<Backlog>) -> Self {
        let bytes_before = crossed(&proxy);
        Self { screen, meter: Meter::default(), start: Instant::now(), proxy, bytes_before, backlog }
    }

    /// Everything that crossed the link since the start, there and back: frames, acknowledgements, TLS.
    pub fn bytes_sent(&self) -> (u64, u64) {
        let (there, back) = crossed(&self.proxy);
        (there.saturating_sub(self.bytes_before.0), back.saturating_sub(self.bytes_before.1))
    }

    /// Takes in what comes, until nobody is left who could tell anything, or somebody failed.
    pub async fn run(&mut self, seen: &mut mpsc::Receiver<Seen>) -> anyhow::Result<()> {
        let mut ticks = tokio::time::interval(if self.screen.terminal { REDRAW } else { REPRINT });
        ticks.tick().await;
        loop {
            tokio::select! {
                next = seen.recv() => match next {
                    Some(next) => self.take(next)?,
                    None => return Ok(()),
                },
                _ = ticks.tick() => {
                    let line = self.line(Instant::now());
                    self.screen.draw(&line)?;
                }
            }
        }
    }

    fn take(&mut self, seen: Seen) -> anyhow::Result<()> {
        match seen {
            Seen::Written(written) => self.meter.write(written),
            Seen::Arrived(arrived) => self.meter.arrive(arrived),
            Seen::Calm(since) => self.meter.set_calm(since),
            Seen::Happened(what) => {
                let line = format!("{:>5.1}s  {what}", self.start.elapsed().as_secs_f64());
                self.screen.say(&line)?;
            }
            Seen::Asked(answer) => {
                self.backlog.send_replace(self.meter.backlog());
                // Who asked may have gone.
                let _ = answer.send(());
            }
            Seen::Failed(failure) => return Err(failure),
        }
        self.backlog.send_replace(self.meter.backlog());
        Ok(())
    }

    fn line(&mut self, now: Instant) -> String {
        let elapsed = now.saturating_duration_since(self.start).as_secs_f64();
        let (revisions, lag) = self.meter.last_second(now);
        let behind = self.meter.backlog();
        let (there, back) = self.bytes_sent();
        let (raw, sent) = (self.meter.applied.bytes, there + back);
        format!(
            "{elapsed:>5.1}s {revisions:>5} rev/s  {:<26}  raw {} sent {} ratio {}",
            lag_words(lag, behind, now),
            bytes(raw),
            bytes(sent),
            ratio(raw, sent),
        )
    }
}

fn crossed(proxy: &LinkProxy) -> (u64, u64) {
    let counters = proxy.counters();
    (counters.bytes_to_target, counters.bytes_from_target)
}

/// The lag of what arrived in the last second; if nothing did, how long and how much has been waiting.
fn lag_words(lag: Option<Lag>, behind: Backlog, now: Instant) -> String {
    match (lag, behind.oldest) {
        (Some(lag), _) => format!("lag p50 {} p99 {}", time(lag.p50), time(lag.p99)),
        (None, Some(oldest)) => {
            format!("lag {}, {} waiting", time(now.saturating_duration_since(oldest)), behind.revisions)
        }
        (None, None) => "idle".to_owned(),
    }
}

/// Decimal units, two to four digits.
pub fn bytes(count: u64) -> String {
    match count {
        0..1_000 => format!("{count} B"),
        1_000..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

pub fn time(span: Duration) -> String {
    let seconds = span.as_secs_f64();
    match seconds {
        ..0.01 => format!("{:.1} ms", seconds * 1e3),
        0.01..1.0 => format!("{:.0} ms", seconds * 1e3),
        _ => format!("{seconds:.1} s"),
    }
}

pub fn ratio(raw: u64, sent: u64) -> String {
    if sent == 0 { "-".to_owned() } else { format!("{:.1}", raw as f64 / sent as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        assert_eq!(
            [0, 999, 1_500, 2_345_678, 12_345_678_901].map(bytes),
            ["0 B", "999 B", "1.5 kB", "2.3 MB", "12.35 GB"]
        );
        assert_eq!(
            [400, 2_340, 15_000, 4_812_000].map(|us| time(Duration::from_micros(us))),
            ["0.4 ms", "2.3 ms", "15 ms", "4.8 s"]
        );
        assert_eq!((ratio(100, 0), ratio(789, 100)), ("-".to_owned(), "7.9".to_owned()));
    }

    #[test]
    fn while_nothing_arrives_the_line_says_how_long_and_how_much_waits() {
        let now = Instant::now();
        let behind =
            Backlog { revisions: 812, oldest: now.checked_sub(Duration::from_millis(3_200)), ..Backlog::default() };
        assert_eq!(lag_words(None, behind, now), "lag 3.2 s, 812 waiting");
        assert_eq!(lag_words(None, Backlog::default(), now), "idle");
    }
}
