//! Job: what the status page shows of the time before it was opened: lag over the last hour, and what happened last.
//! Input: the links' statuses, looked at each second; the time. Output: a `Past`, events.
//! Pure: no clock, no I/O.
//! Always true: it holds an hour and a hundred events at most, and no key.

use crate::model::{LinkState, LinkStatus, Outcome, Side};
use serde::Serialize;
use std::collections::VecDeque;

/// One point of the lag's curve.
pub const STEP_MS: u64 = 10_000;
/// An hour.
const STEPS: usize = 360;
const EVENTS_MAX: usize = 100;

/// Something worth telling, by its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Event {
    pub number: u64,
    pub at_ms: u64,
    pub link: String,
    pub side: Side,
    pub text: String,
}

/// The curve of one link's lag.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curve {
    pub link: String,
    pub side: Side,
    /// The step of the last point, in [`STEP_MS`] since 1970.
    pub last_step: u64,
    /// The longest lag of each step, oldest first; `None`: nobody looked.
    pub lag_seconds: VecDeque<Option<f64>>,
}

/// All that there is, for a page that opens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Past {
    pub step_ms: u64,
    pub links: Vec<Curve>,
    /// Oldest first.
    pub events: VecDeque<Event>,
}

/// What a link was at the last look.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Was {
    state: LinkState,
    has_reason: bool,
    outcome: Outcome,
    runs: u64,
    quarantined: u64,
    foreign_keys: u64,
    shipper: String,
}

#[derive(Debug, Default)]
pub struct History {
    links: Vec<(Curve, Was)>,
    events: VecDeque<Event>,
    told: u64,
}

impl History {
    /// Looks at every link; one that is not there any more is forgotten.
    pub fn look(&mut self, now_ms: u64, links: &[LinkStatus]) {
        let is = |curve: &Curve, link: &LinkStatus| curve.link == link.link.as_str() && curve.side == link.side;
        self.links.retain(|(curve, _)| links.iter().any(|link| is(curve, link)));
        for link in links {
            let seen = Was::of(link);
            let known = self.links.iter_mut().find(|(curve, _)| is(curve, link));
            let was = match known {
                Some((curve, was)) => {
                    curve.add(now_ms / STEP_MS, link.lag_seconds);
                    std::mem::replace(was, seen.clone())
                }
                None => {
                    let (name, lag) = (link.link.as_str().to_owned(), VecDeque::from([Some(link.lag_seconds)]));
                    let curve = Curve { link: name, side: link.side, last_step: now_ms / STEP_MS, lag_seconds: lag };
                    self.links.push((curve, seen.clone()));
                    continue;
                }
            };
            for text in seen.since(&was, link) {
                self.told += 1;
                let (name, side) = (link.link.as_str().to_owned(), link.side);
                self.events.push_back(Event { number: self.told, at_ms: now_ms, link: name, side, text });
            }
            while self.events.len() > EVENTS_MAX {
                self.events.pop_front();
            }
        }
    }

    pub fn past(&self) -> Past {
        let links = self.links.iter().map(|(curve, _)| curve.clone()).collect();
        Past { step_ms: STEP_MS, links, events: self.events.clone() }
    }

    /// The number of the last event.
    pub fn told(&self) -> u64 {
        self.told
    }

    /// The events after the one of this number, as far as they are still held.
    pub fn after(&self, number: u64) -> Vec<Event> {
        self.events.iter().filter(|event| event.number > number).cloned().collect()
    }
}

impl Curve {
    fn add(&mut self, step: u64, lag: f64) {
        if step <= self.last_step {
            if let Some(last) = self.lag_seconds.back_mut() {
                *last = Some(last.map_or(lag, |last| last.max(lag)));
            }
            return;
        }
        let missed = (step - self.last_step - 1).min(STEPS as u64);
        self.lag_seconds.extend((0..missed).map(|_| None));
        self.lag_seconds.push_back(Some(lag));
        while self.lag_seconds.len() > STEPS {
            self.lag_seconds.pop_front();
        }
        self.last_step = step;
    }
}

impl Was {
    fn of(link: &LinkStatus) -> Self {
        Self {
            state: link.state,
            has_reason: !link.reason.is_empty(),
            outcome: link.verification.outcome,
            runs: link.verification.runs,
            quarantined: link.quarantined_revisions,
            foreign_keys: link.foreign_writes.as_ref().map_or(0, |foreign| foreign.keys),
            shipper: link.shipper.clone(),
        }
    }

    fn since(&self, was: &Was, link: &LinkStatus) -> Vec<String> {
        let mut told = Vec::new();
        if self.state != was.state || self.has_reason != was.has_reason {
            let reason = if self.has_reason { format!(": {}", link.reason) } else { String::new() };
            told.push(format!("{}{reason}", self.state.as_str()));
        }
        if self.shipper != was.shipper && !self.shipper.is_empty() {
            told.push(format!("{} ships the link", self.shipper));
        }
        if self.runs != was.runs {
            told.push(format!("both sides were compared: {}", self.outcome.as_str()));
        }
        if self.foreign_keys > was.foreign_keys {
            told.push(format!("others wrote {} keys at the replica", self.foreign_keys - was.foreign_keys));
        }
        if self.quarantined != was.quarantined {
            told.push(format!("{} revisions are in quarantine", self.quarantined));
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LinkName;

    fn link(state: LinkState, lag: f64) -> LinkStatus {
        let name = LinkName::new("config").unwrap();
        let mut status = LinkStatus::new(name, Side::Origin, "spiffe://peer".to_owned());
        (status.state, status.lag_seconds) = (state, lag);
        status
    }

    fn texts(history: &History) -> Vec<String> {
        history.past().events.into_iter().map(|event| event.text).collect()
    }

    #[test]
    fn a_point_is_the_longest_lag_of_its_step_and_a_time_without_looks_is_a_gap() {
        let mut history = History::default();
        for (at_ms, lag) in [(10_000, 0.5), (12_000, 2.0), (19_999, 0.1), (20_000, 0.3), (50_000, 0.4)] {
            history.look(at_ms, &[link(LinkState::Following, lag)]);
        }
        let curve = &history.past().links[0];
        assert_eq!(curve.lag_seconds, [Some(2.0), Some(0.3), None, None, Some(0.4)]);
        assert_eq!(curve.last_step, 5);
    }

    #[test]
    fn a_curve_holds_an_hour_also_after_a_long_pause() {
        let mut history = History::default();
        for step in 0..500 {
            history.look(step * STEP_MS, &[link(LinkState::Following, step as f64)]);
        }
        assert_eq!(history.past().links[0].lag_seconds.len(), STEPS);
        assert_eq!(history.past().links[0].lag_seconds[0], Some(140.0));
        history.look(u64::MAX, &[link(LinkState::Following, 1.0)]);
        let curve = &history.past().links[0];
        assert_eq!((curve.lag_seconds.len(), curve.lag_seconds[0]), (STEPS, None));
    }

    #[test]
    fn what_changes_is_an_event_and_what_stays_is_none() {
        let mut history = History::default();
        history.look(0, &[link(LinkState::Following, 0.0)]);
        history.look(1, &[link(LinkState::Following, 9.0)]);
        assert!(texts(&history).is_empty(), "the first look tells nothing, and a figure is no event");
        let mut cut = link(LinkState::Connecting, 9.0);
        cut.reason = "nothing listens there".to_owned();
        history.look(2, &[cut.clone()]);
        cut.reason = "no answer within 5 s".to_owned();
        history.look(3, &[cut]);
        let mut healed = link(LinkState::Following, 0.0);
        history.look(4, &[healed.clone()]);
        (healed.verification.runs, healed.verification.outcome) = (1, Outcome::Equal);
        healed.shipper = "us-east-1-b".to_owned();
        history.look(5, &[healed]);
        let told = [
            "connecting: nothing listens there",
            "following",
            "us-east-1-b ships the link",
            "both sides were compared: equal",
        ];
        assert_eq!(texts(&history), told);
        assert_eq!(history.after(2).len(), 2);
        assert_eq!(history.told(), 4);
    }

    #[test]
    fn the_last_hundred_events_are_held() {
        let mut history = History::default();
        for at_ms in 0..250 {
            let state = if at_ms % 2 == 0 { LinkState::Following } else { LinkState::Connecting };
            history.look(at_ms, &[link(state, 0.0)]);
        }
        let past = history.past();
        assert_eq!((past.events.len(), past.events[0].number, history.told()), (EVENTS_MAX, 150, 249));
    }
}
