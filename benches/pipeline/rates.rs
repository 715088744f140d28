//! Job: the highest rate that is carried, for each system, for both etcds with nothing between them, and for the origin's etcd alone.
//! Input: a `Scale`. Output: rows and trials of the report.
//! Always true: a rate counts as carried only if p99 of its lag, from when a put was due, stays under the bound.

use crate::arrivals::{Arrivals, percentile};
use crate::load::{Load, PREFIX, VALUE_BYTES, Values, drive, fill};
use crate::report::{Bound, Report, Row, Trial, Unit};
use crate::rig::{Line, Rig, System};
use crate::say;
use crate::works::{Running, Scale};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A rate is carried if p99 of the lag stays under the line's one-way delay and this.
const CARRIED_LAG: Duration = Duration::from_millis(100);
/// The search goes up, or down, in such steps.
const RATE_STEP: f64 = 1.26;
/// Then it halves the last step until what is carried and what is not are so close: a ratio of two rates is no finer than they are.
const FINE_STEP: f64 = 1.07;
/// The search begins above this, whatever the machine.
const RATE_MIN: f64 = 50.0;

/// Where the search for the highest rate begins.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Begin {
    pub make_mirror: f64,
    pub etcd_ferry: f64,
    /// Of both etcds, with nothing but this process between them. `None`: not searched.
    pub straight: Option<f64>,
    /// `None`: not searched.
    pub etcd_alone: Option<f64>,
}

/// What the trials have shown.
#[derive(Clone, Copy)]
struct Search {
    begin: f64,
    fine_step: f64,
    carried: Option<f64>,
    refused: Option<f64>,
}

impl Search {
    /// The next rate to be tried; `None`: the highest is found.
    fn next(&self) -> Option<f64> {
        match (self.carried, self.refused) {
            (None, None) => Some(self.begin),
            (Some(carried), None) => Some(carried * RATE_STEP),
            (None, Some(refused)) => Some(refused / RATE_STEP).filter(|rate| *rate > RATE_MIN),
            (Some(carried), Some(refused)) => (refused / carried > self.fine_step).then(|| (carried * refused).sqrt()),
        }
    }
}

/// The highest rate that each system carries, and what limits any.
pub async fn highest(scale: &Scale, report: &mut Report) {
    let line = Line::Far;
    let begin = scale.rates_from;
    let alone = match begin.etcd_alone {
        Some(begin) => Some(Box::pin(of_etcd_alone(scale, begin, lag_max_ms(line), report)).await),
        None => None,
    };
    let straight = match begin.straight {
        Some(begin) => Some(Box::pin(highest_of(System::Straight, Line::Loopback, begin, scale, report)).await),
        None => None,
    };
    let mirror = Box::pin(highest_of(System::MakeMirror, line, begin.make_mirror, scale, report)).await;
    let ferry = Box::pin(highest_of(System::EtcdFerry, line, begin.etcd_ferry, scale, report)).await;
    let bound = Bound::AtLeast { times: 5.0 };
    let row = Row::new("highest rate carried, revisions/s", line, Unit::Count, (mirror, ferry), bound);
    report.row(row.judged_if(scale.whole()));
    let limits = [
        ("the same of both etcds, from the watch straight into transactions", straight),
        ("puts/s that the origin's etcd alone answers so fast", alone),
    ];
    for (what, highest) in limits {
        if let Some(highest) = highest.flatten() {
            let work = format!("{what}: {highest:.0}");
            report.row(Row::new(work, Line::Loopback, Unit::Count, (None, None), Bound::None));
        }
    }
}

fn lag_max_ms(line: Line) -> f64 {
    (line.one_way() + CARRIED_LAG).as_secs_f64() * 1e3
}

async fn highest_of(system: System, line: Line, begin: f64, scale: &Scale, report: &mut Report) -> Option<f64> {
    let mut running = Running::start(system, line, scale.keys).await;
    let fine_step = if scale.whole() { FINE_STEP } else { f64::INFINITY };
    let mut search = Search { begin, fine_step, carried: None, refused: None };
    while let Some(rate) = search.next() {
        let carried = is_carried(&mut running, scale, (system, line), rate as u64, report).await;
        *(if carried { &mut search.carried } else { &mut search.refused }) = Some(rate);
    }
    running.end().await;
    search.carried.map(f64::floor)
}

async fn is_carried(
    running: &mut Running,
    scale: &Scale,
    (system, line): (System, Line),
    rate: u64,
    report: &mut Report,
) -> bool {
    let puts = rate * scale.rate_seconds;
    let load = Load { values: Values::Kubernetes, keys: scale.keys, puts, rate: Some(rate) };
    for _ in 0..scale.rate_tries {
        say(&format!("{rate} revisions/s for {} s, {}, {}", scale.rate_seconds, line.name(), system.name()));
        running.judge_from_here().await;
        let trial = running.trial(load, rate, Some(system)).await;
        report.trials.push(trial);
        if trial.p99_ms < lag_max_ms(line) {
            return true;
        }
    }
    false
}

/// The same loads on one etcd of which nothing is carried: what the machine leaves possible.
async fn of_etcd_alone(scale: &Scale, begin: f64, put_max_ms: f64, report: &mut Report) -> Option<f64> {
    let rig = Rig::prepare(System::MakeMirror, Line::Loopback).await;
    fill(rig.origin(), PREFIX, scale.keys, Values::Kubernetes, VALUE_BYTES + 200).await;
    let (mut highest, mut rate, mut next) = (None, begin, 1);
    loop {
        if !answers_in_time(&rig, scale, rate as u64, put_max_ms, &mut next, report).await {
            return highest;
        }
        highest = Some(rate.floor());
        rate *= RATE_STEP;
    }
}

/// `next`: the number of the load's first put, which counts on.
async fn answers_in_time(
    rig: &Rig,
    scale: &Scale,
    rate: u64,
    put_max_ms: f64,
    next: &mut u64,
    report: &mut Report,
) -> bool {
    let puts = rate * scale.rate_seconds;
    let load = Load { values: Values::Kubernetes, keys: scale.keys, puts, rate: Some(rate) };
    for _ in 0..scale.rate_tries {
        say(&format!("{rate} puts/s for {} s, the origin's etcd alone", scale.rate_seconds));
        let arrivals = Arc::new(Arrivals::new());
        let (began, cpu) = (Instant::now(), rig.cpu_of_all());
        drive(rig.origin(), load, *next, &arrivals).await;
        *next += load.puts;
        let cores = rig.cores_since(cpu, began);
        let put_p99_ms = percentile(arrivals.take().1, 0.99) * 1e3;
        println!("  the puts' p99 {put_p99_ms:.0} ms; cores: etcd {:.2}, load {:.2}", cores[0], cores[3]);
        report.trials.push(Trial { system: None, rate, p50_ms: f64::NAN, p99_ms: f64::NAN, put_p99_ms, cores });
        if put_p99_ms < put_max_ms {
            return true;
        }
    }
    false
}
