//! Job: what is measured, work by work, each system on fresh clusters.
//! Input: a `Scale`. Output: rows of the report.
//! Always true: what is judged is seen at the replica's etcd, by a watch or a read; a work ends with both sides equal, and of etcd-ferry with
//! the test suite's checkers over the history of both ends.

use crate::arrivals::{Arrivals, Lag, percentile};
use crate::load::{Load, PREFIX, VALUE_BYTES, Values, drive, fill};
use crate::rates::Begin;
use crate::report::{Bound, Report, Row, Trial, Unit};
use crate::rig::{Line, Rig, System, Used};
use crate::{proxy_cost, rates, say};
use etcd_ferry::model::Revision;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const LIMIT: Duration = Duration::from_secs(600);
pub const BOTH: [System; 2] = [System::MakeMirror, System::EtcdFerry];
const OTHERS: &str = "/others/";

/// How much of each work is done.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Scale {
    pub name: &'static str,
    /// Objects that the load writes.
    pub keys: u64,
    pub lag_seconds: u64,
    /// A disk that stands still for a fifth of a second spoils one run's p99, of whichever system: the median of these counts.
    pub lag_runs: u64,
    pub fast_seconds: u64,
    pub rate_seconds: u64,
    /// A disk that stands still for a fifth of a second spoils a trial of any system: a rate is carried if one of these shows it.
    pub rate_tries: u32,
    pub rates_from: Begin,
    pub waiting: u64,
    /// As of the lags: the median counts.
    pub waiting_runs: u64,
    pub copied: u64,
    pub spooled: u64,
    pub at_rest: u64,
    pub idle_seconds: u64,
}

impl Scale {
    pub const FULL: Scale = Scale {
        name: "full",
        keys: 10_000,
        lag_seconds: 20,
        lag_runs: 5,
        fast_seconds: 10,
        rate_seconds: 20,
        rate_tries: 3,
        rates_from: Begin {
            make_mirror: 400.0,
            etcd_ferry: 1_000.0,
            straight: Some(1_000.0),
            etcd_alone: Some(1_000.0),
        },
        waiting: 20_000,
        waiting_runs: 3,
        copied: 100_000,
        spooled: 1_000_000,
        at_rest: 1_000_000,
        idle_seconds: 60,
    };
    pub const QUICK: Scale = Scale {
        name: "quick",
        keys: 1_000,
        lag_seconds: 4,
        lag_runs: 1,
        fast_seconds: 2,
        rate_seconds: 3,
        rate_tries: 1,
        rates_from: Begin { make_mirror: 1_000.0, etcd_ferry: 5_000.0, straight: None, etcd_alone: None },
        waiting: 5_000,
        waiting_runs: 1,
        copied: 5_000,
        spooled: 50_000,
        at_rest: 50_000,
        idle_seconds: 10,
    };

    /// Whether every work is as large as its bound is meant for. What a smaller one costs once (a dial, a round trip, the first page) weighs
    /// more, and a stall of the disk too: such rows are shown, and not judged.
    pub fn whole(&self) -> bool {
        self.name == Self::FULL.name
    }
}

/// All works whose name is `wanted`.
pub async fn run(scale: &Scale, wanted: &dyn Fn(&str) -> bool, report: &mut Report) {
    if wanted("proxy") {
        say("the proxy's own cost");
        report.proxy = Some(proxy_cost::measure().await.unwrap());
    }
    if wanted("lag") {
        for line in [Line::Loopback, Line::Far] {
            Box::pin(lag(scale, line, report)).await;
        }
    }
    if wanted("rate") {
        Box::pin(rates::highest(scale, report)).await;
    }
    if wanted("waiting") {
        Box::pin(waiting(scale, report)).await;
    }
    if wanted("copy") {
        for line in [Line::Loopback, Line::Far] {
            Box::pin(copy(scale, line, report)).await;
        }
    }
    if wanted("spool") {
        Box::pin(spool(scale, report)).await;
    }
    if wanted("rest") {
        Box::pin(at_rest(scale, report)).await;
    }
    if wanted("idle") {
        Box::pin(idle(scale, report)).await;
    }
}

/// A link that carries, with the load's objects copied, and a watch at the replica.
pub struct Running {
    rig: Rig,
    from: (Revision, Revision),
    next: u64,
}

impl Running {
    pub async fn start(system: System, line: Line, keys: u64) -> Self {
        let mut rig = Rig::prepare(system, line).await;
        fill(rig.origin(), PREFIX, keys, Values::Kubernetes, VALUE_BYTES + 200).await;
        rig.carry();
        rig.holds(PREFIX, keys).await;
        rig.settled().await;
        let mut running = Self { rig, from: Default::default(), next: 1 };
        running.judge_from_here().await;
        running
    }

    async fn watch(&self, values: Values) -> (Arc<Arrivals>, crate::arrivals::Watching) {
        Arrivals::watch(self.rig.replica(), values).await
    }

    /// Carries a load to its end; the lags, and what it took.
    async fn carry(&mut self, load: Load) -> (Vec<Lag>, Used) {
        let (lags, _, used) = self.carry_timing_answers(load).await;
        (lags, used)
    }

    /// As `carry`; also how long etcd took to answer each put, in seconds.
    async fn carry_timing_answers(&mut self, load: Load) -> (Vec<Lag>, Vec<f64>, Used) {
        let (arrivals, _watching) = self.watch(load.values).await;
        let before = self.rig.used();
        drive(self.rig.origin(), load, self.next, &arrivals).await;
        self.next += load.puts;
        assert!(arrivals.all_seen(LIMIT).await, "not everything arrived: {}", self.rig.why());
        let (lags, answers) = arrivals.take();
        (lags, answers, self.rig.used() - before)
    }

    /// Everything has arrived: what is judged at the end begins here. A history of several minutes takes longer to read than it took.
    pub async fn judge_from_here(&mut self) {
        self.from = (self.rig.origin().head().await, self.rig.replica().head().await);
    }

    /// Carries a load at a rate, and says how that went.
    pub async fn trial(&mut self, load: Load, rate: u64, system: Option<System>) -> Trial {
        let (began, cpu) = (Instant::now(), self.rig.cpu_of_all());
        let (lags, answers, _) = self.carry_timing_answers(load).await;
        let cores = self.rig.cores_since(cpu, began);
        let [p50_ms, p99_ms] = [0.5, 0.99].map(|p| percentile(lags.iter().map(|lag| lag.lag), p) * 1e3);
        let put_p99_ms = percentile(answers, 0.99) * 1e3;
        let [origin, replica, carries, own] = cores;
        println!("  lag p50 {p50_ms:.0} ms, p99 {p99_ms:.0} ms; the puts themselves p99 {put_p99_ms:.0} ms");
        println!(
            "  cores: origin's etcd {origin:.2}, replica's {replica:.2}, what carries {carries:.2}, load and line {own:.2}"
        );
        Trial { system, rate, p50_ms, p99_ms, put_p99_ms, cores }
    }

    pub async fn end(self) {
        self.rig.judge(self.from).await;
    }
}

/// 200 revisions a second: the medians of the lags of several runs, and bytes; on the far line also random values, and 2,000 a second. Both
/// systems stand at once and take turns, run by run: a disk that is slow for a minute is slow for both.
async fn lag(scale: &Scale, line: Line, report: &mut Report) {
    let puts = 200 * scale.lag_seconds;
    let steady = Load { values: Values::Kubernetes, keys: scale.keys, puts, rate: Some(200) };
    let mut both = Vec::new();
    for system in BOTH {
        say(&format!("lag at 200 revisions/s, {}, {}: getting ready", line.name(), system.name()));
        let mut running = Running::start(system, line, scale.keys).await;
        // A link that has run for a while: most objects have been written since its stream began.
        running.carry(Load { puts: 4 * scale.keys, rate: None, ..steady }).await;
        both.push((system, running));
    }
    let mut runs = [[vec![], vec![]], [vec![], vec![]]];
    let mut bytes = [[0.0; 3]; 2];
    for run in 1..=scale.lag_runs {
        for (at, (system, running)) in both.iter_mut().enumerate() {
            say(&format!("lag at 200 revisions/s, {}, {}, run {run}", line.name(), system.name()));
            let (lags, used) = running.carry(steady).await;
            let [p50, p99] = [0.5, 0.99].map(|p| percentile(lags.iter().map(|lag| lag.lag), p) * 1e3);
            println!("  lag p50 {p50:.1} ms, p99 {p99:.1} ms");
            runs[at][0].push(p50);
            runs[at][1].push(p99);
            bytes[at][0] += used.bytes as f64 / (puts * scale.lag_runs) as f64;
            if line == Line::Far && run == scale.lag_runs {
                report.over_time.push((*system, lags));
            }
        }
    }
    for (at, (system, mut running)) in both.into_iter().enumerate() {
        if line == Line::Far {
            say(&format!("bytes of other loads, {}, {}", line.name(), system.name()));
            [bytes[at][1], bytes[at][2]] = bytes_of_other_loads(&mut running, scale, steady).await;
        }
        running.end().await;
    }
    report_lag(scale, line, runs.map(|of_one| of_one.map(|run| percentile(run, 0.5))), bytes, report);
}

/// A revision's, of random values at the same rate and of objects at 2,000 a second.
async fn bytes_of_other_loads(running: &mut Running, scale: &Scale, steady: Load) -> [f64; 2] {
    let (_, used) = running.carry(Load { values: Values::Random, ..steady }).await;
    let random = used.bytes as f64 / steady.puts as f64;
    // Random values are there now.
    running.carry(Load { puts: 4 * scale.keys, rate: None, ..steady }).await;
    let fast = Load { puts: 2_000 * scale.fast_seconds, rate: Some(2_000), ..steady };
    let (_, used) = running.carry(fast).await;
    [random, used.bytes as f64 / fast.puts as f64]
}

/// `quantiles`: p50 and p99 of each system; `bytes`: at 200 a second, of random values, at 2,000 a second.
fn report_lag(scale: &Scale, line: Line, quantiles: [[f64; 2]; 2], bytes: [[f64; 3]; 2], report: &mut Report) {
    let of = |q: usize| (Some(quantiles[0][q]), Some(quantiles[1][q]));
    let bound = |plus| Bound::AtMost { times: 1.1, plus };
    report.row(Row::new("lag at 200 revisions/s, p50", line, Unit::Millis, of(0), bound(1.0)));
    let p99 = Row::new("lag at 200 revisions/s, p99", line, Unit::Millis, of(1), bound(2.0));
    report.row(p99.judged_if(scale.whole()));
    if line == Line::Far {
        let of = |b: usize| (Some(bytes[0][b]), Some(bytes[1][b]));
        let most = |times| Bound::AtMost { times, plus: 0.0 };
        let row = |work, of, times| Row::new(work, line, Unit::Bytes, of, most(times));
        report.row(row("bytes a revision at 200/s, Kubernetes-like", of(0), 1.0 / 6.0));
        report.row(row("bytes a revision at 200/s, random", of(1), 1.03));
        report.row(row("bytes a revision at 2,000/s, Kubernetes-like", of(2), 1.0 / 12.0));
    }
}

/// Revisions written while the line was cut: for five seconds, as an outage at the least is. What is written all at once, etcd shows no
/// watch at once: 1,000 revisions each 0.1 s, whoever watches.
const WAITING_RATE: u64 = 4_000;

async fn waiting(scale: &Scale, report: &mut Report) {
    let line = Line::Far;
    let mut seconds = [0.0; 2];
    let mut bytes = [0.0; 2];
    for (at, system) in BOTH.into_iter().enumerate() {
        say(&format!("catching up {} revisions, {}, {}", scale.waiting, line.name(), system.name()));
        let mut running = Running::start(system, line, scale.keys).await;
        let load = Load { values: Values::Kubernetes, keys: scale.keys, puts: scale.waiting, rate: Some(WAITING_RATE) };
        let mut runs = vec![];
        for _ in 0..scale.waiting_runs {
            let (arrivals, _watching) = running.watch(load.values).await;
            running.rig.proxy().cut();
            drive(running.rig.origin(), load, running.next, &arrivals).await;
            let before = running.rig.used();
            let healed = Instant::now();
            running.rig.proxy().heal();
            assert!(arrivals.all_seen(LIMIT).await, "not everything arrived: {}", running.rig.why());
            let took = healed.elapsed().as_secs_f64();
            println!("  caught up in {took:.2} s");
            runs.push(took);
            bytes[at] += (running.rig.used() - before).bytes as f64 / (scale.waiting * scale.waiting_runs) as f64;
            running.next += scale.waiting;
        }
        seconds[at] = percentile(runs, 0.5);
        running.end().await;
    }
    let pair = |of: [f64; 2]| (Some(of[0]), Some(of[1]));
    let times = Bound::Faster { times: 15.0 };
    let row = Row::new("catching up after a cut", line, Unit::Seconds, pair(seconds), times);
    report.row(row.judged_if(scale.whole()));
    let twelfth = Bound::AtMost { times: 1.0 / 12.0, plus: 0.0 };
    report.row(Row::new("bytes a revision in catching up", line, Unit::Bytes, pair(bytes), twelfth));
}

async fn copy(scale: &Scale, line: Line, report: &mut Report) {
    let mut seconds = [0.0; 2];
    let mut cpu = [0.0; 2];
    let mut bytes = [0.0; 2];
    for (at, system) in BOTH.into_iter().enumerate() {
        say(&format!("base copy of {} keys, {}, {}", scale.copied, line.name(), system.name()));
        let mut rig = Rig::prepare(system, line).await;
        fill(rig.origin(), PREFIX, scale.copied, Values::Kubernetes, VALUE_BYTES).await;
        let began = Instant::now();
        rig.carry();
        rig.holds(PREFIX, scale.copied).await;
        seconds[at] = began.elapsed().as_secs_f64();
        // Since the processes began.
        let used = rig.used();
        (cpu[at], bytes[at]) = (used.cpu_seconds, used.bytes as f64 / 1e6);
        rig.assert_equal().await;
    }
    let pair = |of: [f64; 2]| (Some(of[0]), Some(of[1]));
    let row = Row::new("base copy", line, Unit::Seconds, pair(seconds), Bound::Faster { times: 15.0 });
    report.row(row.judged_if(scale.whole()));
    let quarter = Bound::AtMost { times: 0.25, plus: 0.0 };
    let row = Row::new("base copy, CPU of what carries", line, Unit::Seconds, pair(cpu), quarter);
    report.row(row.judged_if(scale.whole()));
    report.row(Row::new("base copy, megabytes on the line", line, Unit::Count, pair(bytes), Bound::None));
}

/// A long outage: what waits is on disk, not in memory.
async fn spool(scale: &Scale, report: &mut Report) {
    let line = Line::Loopback;
    say(&format!("{} revisions waiting in the spool", scale.spooled));
    let running = Running::start(System::EtcdFerry, line, scale.keys).await;
    let (arrivals, _watching) = running.watch(Values::Kubernetes).await;
    running.rig.proxy().cut();
    let load = Load { values: Values::Kubernetes, keys: scale.keys, puts: scale.spooled, rate: None };
    drive(running.rig.origin(), load, running.next, &arrivals).await;
    let healed = Instant::now();
    running.rig.proxy().heal();
    assert!(arrivals.all_seen(LIMIT).await, "not everything arrived: {}", running.rig.why());
    let seconds = healed.elapsed().as_secs_f64();
    let memory = running.rig.memory();
    for (side, bytes) in ["the origin's", "the replica's"].into_iter().zip(memory) {
        let work = format!("memory of {side} sidecar, {} revisions waiting, MiB", scale.spooled);
        report.row(Row::new(
            work,
            line,
            Unit::Count,
            (None, Some(bytes as f64 / 1_048_576.0)),
            Bound::Below { most: 150.0 },
        ));
    }
    let work = format!("catching up {} revisions", scale.spooled);
    report.row(Row::new(work, line, Unit::Seconds, (None, Some(seconds)), Bound::None));
    running.rig.assert_equal().await;
}

/// What a revision costs must not depend on how many other keys there are.
async fn at_rest(scale: &Scale, report: &mut Report) {
    let line = Line::Loopback;
    let mut running = Running::start(System::EtcdFerry, line, 1_000).await;
    let mut micros = [0.0; 2];
    for (at, rest) in [0, scale.at_rest].into_iter().enumerate() {
        say(&format!("the cost of a revision beside {rest} keys at rest"));
        if rest > 0 {
            fill(running.rig.origin(), OTHERS, rest, Values::Kubernetes, 100).await;
            running.rig.holds(OTHERS, rest).await;
            running.rig.settled().await;
        }
        let puts = 1_000 * scale.lag_seconds;
        let load = Load { values: Values::Kubernetes, keys: 1_000, puts, rate: Some(1_000) };
        // Once unmeasured: the windows fill.
        running.carry(Load { puts: 2_000, rate: None, ..load }).await;
        let (_, used) = running.carry(load).await;
        micros[at] = used.cpu_seconds * 1e6 / puts as f64;
    }
    let work = format!("CPU a revision beside {} keys at rest (left: none), µs", scale.at_rest);
    let bound = Bound::AtMost { times: 1.2, plus: 0.0 };
    let row = Row::new(work, line, Unit::Count, (Some(micros[0]), Some(micros[1])), bound);
    report.row(row.judged_if(scale.whole()));
    running.rig.assert_equal().await;
}

async fn idle(scale: &Scale, report: &mut Report) {
    let line = Line::Loopback;
    say(&format!("an idle link for {} s", scale.idle_seconds));
    let running = Running::start(System::EtcdFerry, line, 1_000).await;
    // Past the waymark and the first idle position.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = running.rig.used();
    let length = Duration::from_secs(scale.idle_seconds);
    tokio::time::sleep(length).await;
    let used = running.rig.used() - before;
    let share = used.cpu_seconds / length.as_secs_f64() * 100.0;
    let row = |work: &str, figure, most| Row::new(work, line, Unit::Count, (None, Some(figure)), Bound::Below { most });
    // Time is told in ticks of 10 ms: what a short look shows of it is a few of them.
    report.row(row("an idle link, % of a core for both sidecars", share, 0.5).judged_if(scale.whole()));
    report.row(row("an idle link, bytes/s", used.bytes as f64 / length.as_secs_f64(), 200.0));
}
