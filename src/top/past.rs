//! Job: what `etcd-ferry top` knows: the last answer of each sidecar, and the lag and the rates of each link over the looks before it.
//! Input: answers and failures, with the time. Output: rows of words.
//! Pure: no clock, no I/O.
//! Always true: a minute of looks is kept of a link, and nothing of one that is gone; no word holds a control character.

use crate::admin::proto::{Link, StatusReply, Verification};
use crate::admin::show::{behind, duration, printable};
use std::collections::{BTreeMap, VecDeque};

/// Looks that are kept: a minute's.
pub const LOOKS_MAX: usize = 60;
/// Points of the lag's curve: the newest half of it is enough to see a trend in a column.
pub const POINTS: usize = 30;
/// A rate is taken over so many looks: long enough to be steady, short enough to follow.
const RATE_LOOKS: usize = 10;
/// A lag of less is drawn low, however small the others are: that is a link that keeps up.
const PEAK_SECONDS_MIN: f64 = 0.1;
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

pub const HEADER: [&str; 11] = [
    "SIDECAR",
    "LINK",
    "SIDE",
    "STATE",
    "LAG",
    "LAG SO FAR",
    "RPO",
    "REV/S",
    "SENT/S",
    "SPOOL, JOURNAL",
    "PROVED EQUAL",
];

/// How a link looks from afar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Good,
    /// It comes up, or it follows and something is to be said of it.
    Busy,
    Bad,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// As in [`HEADER`].
    pub cells: [String; 11],
    pub tone: Tone,
}

/// One look at a link.
#[derive(Debug, Clone, Copy)]
struct Look {
    at_ms: u64,
    lag_seconds: f64,
    /// Carried so far, as this side counts.
    revisions: u64,
    bytes_sent: u64,
}

type LinkKey = (String, String);

struct Sidecar {
    name: String,
    /// `None`: it has not answered yet.
    reply: Option<StatusReply>,
    /// Why it does not answer now; empty: it does.
    trouble: String,
    links: BTreeMap<LinkKey, VecDeque<Look>>,
}

/// All that is known.
pub struct Past {
    sidecars: Vec<Sidecar>,
}

impl Past {
    /// `names`: what sidecars are called until they tell their own.
    pub fn new(names: Vec<String>) -> Self {
        let new = |name| Sidecar { name, reply: None, trouble: String::new(), links: BTreeMap::new() };
        Self { sidecars: names.into_iter().map(new).collect() }
    }

    pub fn answered(&mut self, sidecar: usize, reply: StatusReply, at_ms: u64) {
        let Some(sidecar) = self.sidecars.get_mut(sidecar) else { return };
        sidecar.links.retain(|key, _| reply.links.iter().any(|link| key_of(link) == *key));
        for link in &reply.links {
            let looks = sidecar.links.entry(key_of(link)).or_default();
            looks.push_back(Look {
                at_ms,
                lag_seconds: link.lag_seconds,
                revisions: link.counts.get("revisions").copied().unwrap_or(link.applied_seq),
                bytes_sent: link.bytes_sent,
            });
            if looks.len() > LOOKS_MAX {
                looks.pop_front();
            }
        }
        sidecar.trouble.clear();
        sidecar.reply = Some(reply);
    }

    /// What it said last is shown on, as its last word.
    pub fn failed(&mut self, sidecar: usize, why: String) {
        if let Some(sidecar) = self.sidecars.get_mut(sidecar) {
            sidecar.trouble = why;
        }
    }

    pub fn has_answers(&self) -> bool {
        self.sidecars.iter().any(|sidecar| sidecar.reply.is_some())
    }

    /// One for each link, in the order of sidecars and their configurations.
    pub fn rows(&self, now_ms: u64) -> Vec<Row> {
        let mut rows = Vec::new();
        for sidecar in &self.sidecars {
            for (reply, link) in sidecar.reply.iter().flat_map(|reply| reply.links.iter().map(move |l| (reply, l))) {
                let looks = sidecar.links.get(&key_of(link));
                rows.push(row(reply, link, looks, !sidecar.trouble.is_empty(), now_ms));
            }
        }
        rows
    }

    /// What is to be said beside the rows: who does not answer, and why a link does not follow. Not answered yet is not said.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for sidecar in &self.sidecars {
            let name = sidecar.reply.as_ref().map_or(&sidecar.name, |reply| &reply.node);
            if !sidecar.trouble.is_empty() {
                notes.push(format!("{name} does not answer: {}", sidecar.trouble));
            }
            let links = sidecar.reply.iter().flat_map(|reply| &reply.links).filter(|link| !link.reason.is_empty());
            notes.extend(links.map(|link| format!("{name}, {} ({}): {}", link.link, link.side, link.reason)));
        }
        notes.iter().map(|note| printable(note)).collect()
    }

    /// Sidecars that have answered, and all.
    pub fn counts(&self) -> (usize, usize) {
        let answering = |sidecar: &&Sidecar| sidecar.reply.is_some() && sidecar.trouble.is_empty();
        (self.sidecars.iter().filter(answering).count(), self.sidecars.len())
    }
}

fn key_of(link: &Link) -> LinkKey {
    (link.link.clone(), link.side.clone())
}

fn row(reply: &StatusReply, link: &Link, looks: Option<&VecDeque<Look>>, silent: bool, now_ms: u64) -> Row {
    let standby = link.role == "standby";
    let state = if standby { format!("{} (standby)", link.state) } else { link.state.clone() };
    let (revisions, sent) = looks.map_or((None, None), rates);
    let rate = |rate: Option<f64>, words: fn(f64) -> String| rate.map_or_else(|| "-".to_owned(), words);
    let cells = [
        reply.node.clone(),
        link.link.clone(),
        link.side.clone(),
        if silent { format!("{state}?") } else { state },
        behind(link.lag_seconds, link.lag_revisions),
        looks.map_or_else(String::new, curve),
        behind(link.rpo_seconds, link.rpo_revisions),
        rate(revisions, |rate| format!("{rate:.0}")),
        rate(sent, bytes),
        queue(link.queue_bytes, link.queue_bytes_max),
        proof(link.verification.as_ref(), now_ms),
    ];
    Row { cells: cells.map(|cell| printable(&cell)), tone: tone(link, silent) }
}

fn tone(link: &Link, silent: bool) -> Tone {
    match &link.state[..] {
        _ if silent => Tone::Bad,
        "following" if link.reason.is_empty() => Tone::Good,
        "following" | "copying" | "repairing" | "connecting" => Tone::Busy,
        _ => Tone::Bad,
    }
}

/// Revisions and bytes a second; `None` until there are two looks. A sidecar that was started anew counts from 0.
fn rates(looks: &VecDeque<Look>) -> (Option<f64>, Option<f64>) {
    let from = looks.len().saturating_sub(RATE_LOOKS + 1);
    let (Some(first), Some(last)) = (looks.get(from), looks.back()) else { return (None, None) };
    let seconds = last.at_ms.saturating_sub(first.at_ms) as f64 / 1_000.0;
    let rate = |from: u64, to: u64| (seconds > 0.0).then(|| to.saturating_sub(from) as f64 / seconds);
    (rate(first.revisions, last.revisions), rate(first.bytes_sent, last.bytes_sent))
}

/// The lag of the last looks, the newest at the right; as high as the longest of them.
fn curve(looks: &VecDeque<Look>) -> String {
    let shown = || looks.iter().skip(looks.len().saturating_sub(POINTS)).map(|look| look.lag_seconds.max(0.0));
    let peak = shown().fold(PEAK_SECONDS_MIN, f64::max);
    let block = |lag: f64| {
        let steps = BLOCKS.iter().zip(1_u8..);
        let highest = steps.take_while(|(_, step)| lag * 8.0 > peak * f64::from(*step - 1)).last();
        highest.map_or(BLOCKS[0], |(block, _)| *block)
    };
    let line: String = shown().map(block).collect();
    format!("{}{line}", " ".repeat(POINTS.saturating_sub(line.chars().count())))
}

fn bytes(count: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut count, mut unit) = (count, 0);
    while count >= 1024.0 && unit + 1 < units.len() {
        (count, unit) = (count / 1024.0, unit + 1);
    }
    if unit == 0 { format!("{count:.0} B") } else { format!("{count:.1} {}", units[unit]) }
}

fn queue(bytes_waiting: u64, bytes_max: u64) -> String {
    let waiting = bytes(bytes_waiting as f64);
    if bytes_max == 0 {
        waiting
    } else {
        format!("{waiting}, {:.0} %", bytes_waiting as f64 * 100.0 / bytes_max as f64)
    }
}

fn proof(verification: Option<&Verification>, now_ms: u64) -> String {
    let Some(verification) = verification else { return "not yet".to_owned() };
    let Verification { verified_revision, verified_at, differing_keys, expected_keys, .. } = verification;
    let proved = if *verified_at > 0.0 {
        let ago = (now_ms as f64 / 1_000.0 - verified_at).max(0.0).floor();
        let ago = if ago < 60.0 { format!("{ago} s") } else { duration(ago) };
        format!("{ago} ago, at {verified_revision}")
    } else {
        "not yet".to_owned()
    };
    match differing_keys.saturating_sub(*expected_keys) {
        0 => proved,
        1 => format!("1 key differs; {proved}"),
        differing => format!("{differing} keys differ; {proved}"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::top) fn link(name: &str, side: &str, state: &str) -> Link {
        Link { link: name.to_owned(), side: side.to_owned(), state: state.to_owned(), ..Link::default() }
    }

    pub(in crate::top) fn reply(node: &str, links: Vec<Link>) -> StatusReply {
        StatusReply { node: node.to_owned(), links, ..StatusReply::default() }
    }

    /// A link that carries 100 revisions and 2 KiB each second, and whose lag grows by 0.1 s.
    pub(in crate::top) fn looked_at(past: &mut Past, looks: u64) {
        for second in 0..looks {
            let mut link = link("config", "origin", "following");
            link.counts.insert("revisions".to_owned(), second * 100);
            (link.bytes_sent, link.lag_seconds, link.lag_revisions) = (second * 2_048, second as f64 / 10.0, second);
            (link.queue_bytes, link.queue_bytes_max) = (3 << 20, 8 << 30);
            let verified = Verification { verified_revision: 4_711, verified_at: 940.0, ..Verification::default() };
            link.verification = Some(verified);
            past.answered(0, reply("us-east-1-a", vec![link]), 1_000_000 + second * 1_000);
        }
    }

    #[test]
    fn rates_need_two_looks_and_follow_the_last_ten() {
        let mut past = Past::new(vec!["a".to_owned()]);
        looked_at(&mut past, 1);
        let cells = |past: &Past| past.rows(1_000_000)[0].cells.clone();
        assert_eq!([&cells(&past)[7][..], &cells(&past)[8]], ["-", "-"]);
        looked_at(&mut past, 9);
        assert_eq!([&cells(&past)[7][..], &cells(&past)[8]], ["100", "2.0 KiB"]);
        // Nothing came for ten looks.
        let last = past.sidecars[0].reply.clone().unwrap();
        for second in 9..20 {
            past.answered(0, last.clone(), 1_000_000 + second * 1_000);
        }
        assert_eq!(cells(&past)[7], "0");
        // Started anew: no rate is below none.
        past.answered(0, reply("us-east-1-a", vec![link("config", "origin", "connecting")]), 1_021_000);
        assert_eq!(cells(&past)[7], "0");
    }

    #[test]
    fn the_curve_is_as_high_as_the_longest_lag_and_low_where_all_are_short() {
        let look = |lag_seconds| Look { at_ms: 0, lag_seconds, revisions: 0, bytes_sent: 0 };
        let drawn = |lags: &[f64]| curve(&lags.iter().map(|lag| look(*lag)).collect());
        assert_eq!(drawn(&[0.0, 4.0, 8.0, 1.0]).trim_start(), "▁▄█▁");
        assert_eq!(drawn(&[0.003, 0.004, 0.0, 0.003]).trim_start(), "▁▁▁▁", "milliseconds are no mountains");
        assert_eq!(drawn(&[0.05, 0.1]).trim_start(), "▄█");
        for count in [0, 1, POINTS, LOOKS_MAX] {
            assert_eq!(drawn(&vec![1.0; count]).chars().count(), POINTS);
        }
    }

    #[test]
    fn a_minute_is_kept_and_nothing_of_a_link_that_is_gone() {
        let mut past = Past::new(vec!["a".to_owned()]);
        looked_at(&mut past, 100);
        assert_eq!(past.sidecars[0].links.values().map(VecDeque::len).collect::<Vec<_>>(), [LOOKS_MAX]);
        past.answered(0, reply("us-east-1-a", vec![link("config", "replica", "following")]), 2_000_000);
        assert_eq!(past.sidecars[0].links.len(), 1);
        assert_eq!(past.rows(2_000_000)[0].cells[2], "replica");
    }

    #[test]
    fn a_sidecar_that_is_silent_keeps_its_last_word_with_a_question_mark_and_a_note() {
        let mut past = Past::new(vec!["one.toml".to_owned(), "two.toml".to_owned()]);
        assert!(!past.has_answers() && past.notes().is_empty());
        past.failed(1, "no sidecar answers\nat 127.0.0.1:1".to_owned());
        looked_at(&mut past, 1);
        assert_eq!(past.notes(), ["two.toml does not answer: no sidecar answers at 127.0.0.1:1"]);
        assert_eq!((past.counts(), past.rows(0).len()), ((1, 2), 1));
        past.failed(0, "it is gone".to_owned());
        let rows = past.rows(0);
        assert_eq!((&rows[0].cells[3][..], rows[0].tone), ("following?", Tone::Bad));
        assert_eq!(past.notes()[0], "us-east-1-a does not answer: it is gone");
        looked_at(&mut past, 1);
        assert_eq!(past.rows(0)[0].tone, Tone::Good);
    }

    #[test]
    fn states_have_their_tone_and_reasons_are_notes() {
        for (state, reason, tone) in [
            ("following", "", Tone::Good),
            ("following", "its watch is refused", Tone::Busy),
            ("copying", "", Tone::Busy),
            ("stopped", "the origin was restored", Tone::Bad),
            ("held", "", Tone::Bad),
            ("stalled", "", Tone::Bad),
        ] {
            let mut past = Past::new(vec!["a".to_owned()]);
            let link = Link { reason: reason.to_owned(), ..link("config", "origin", state) };
            past.answered(0, reply("n", vec![link]), 0);
            assert_eq!(past.rows(0)[0].tone, tone, "{state}");
            assert_eq!(past.notes().len(), usize::from(!reason.is_empty()));
        }
    }

    #[test]
    fn the_last_proof_of_equality_is_told_with_its_age() {
        let proved = |at: f64, keys, expected| {
            let verification = Verification {
                verified_revision: 7,
                verified_at: at,
                differing_keys: keys,
                expected_keys: expected,
                ..Verification::default()
            };
            proof(Some(&verification), 1_000_500)
        };
        assert_eq!(proved(0.0, 0, 0), "not yet");
        assert_eq!(proof(None, 0), "not yet");
        assert_eq!(proved(988.2, 0, 0), "12 s ago, at 7");
        assert_eq!(proved(1_000.4, 0, 0), "0 s ago, at 7");
        assert_eq!(proved(2_000.0, 0, 0), "0 s ago, at 7", "clocks may differ");
        assert_eq!(proved(925.0, 0, 0), "1 min 15 s ago, at 7");
        assert_eq!(proved(988.2, 3, 0), "3 keys differ; 12 s ago, at 7");
        assert_eq!(proved(988.2, 3, 2), "1 key differs; 12 s ago, at 7");
        assert_eq!(proved(988.2, 3, 3), "12 s ago, at 7");
    }
}
