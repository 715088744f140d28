//! Job: what the demo has shown, as a table and as JSON.
//! Input: the figures. Output: text.
//! Pure: figures in, text out.
//! Always true: the demo has passed only if both sides are equal and each written revision took effect once.

use super::compare::Comparison;
use super::faults::FaultReport;
use super::meter::{Lag, Meter};
use super::regions::{Counts, ORIGIN, REPLICA};
use super::show::{bytes, ratio, time};
use serde::Serialize;
use std::time::Duration;

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub passed: bool,
    /// The first difference between both sides; `None`: they are equal, byte for byte.
    pub difference: Option<String>,
    pub seconds: f64,
    pub keys_compared: u64,
    pub bytes_compared: u64,
    pub written: WrittenReport,
    pub applied: AppliedReport,
    /// Revisions that a sidecar sent again after a fault; the replica had them and left them out.
    pub repeated: u64,
    /// Streams that the replica's sidecar refused.
    pub refused: u64,
    /// Of what was written while nothing was wrong with the link.
    pub lag: Option<LagReport>,
    /// Keys and values.
    pub bytes_raw: u64,
    /// What crossed the link in both directions, TLS and acknowledgements included.
    pub bytes_sent: u64,
    /// The part of it that went from the replica to the origin: acknowledgements and the like.
    pub bytes_back: u64,
    pub faults: Vec<FaultReport>,
}

#[derive(Debug, Clone, Serialize)]
pub struct WrittenReport {
    pub revisions: u64,
    pub puts: u64,
    pub deletes: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct AppliedReport {
    pub revisions: u64,
    /// The position's last seq: the link's own count of revisions.
    pub seq: u64,
    pub transactions: u64,
    pub changes_in_one_max: u64,
    /// Transactions whose changes had been applied before.
    pub twice: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct LagReport {
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub longest_ms: f64,
    pub samples: usize,
}

impl From<Lag> for LagReport {
    fn from(lag: Lag) -> Self {
        let ms = |span: Duration| (span.as_secs_f64() * 1e6).round() / 1e3;
        Self { p50_ms: ms(lag.p50), p99_ms: ms(lag.p99), longest_ms: ms(lag.longest), samples: lag.samples }
    }
}

/// Everything that the demo found.
pub struct Findings<'a> {
    pub length: Duration,
    pub meter: &'a Meter,
    pub comparison: Comparison,
    pub counts: Counts,
    /// There, and back.
    pub bytes_sent: (u64, u64),
    pub faults: Vec<FaultReport>,
}

impl Report {
    pub fn new(findings: Findings) -> Self {
        let Findings { length, meter, comparison, counts, bytes_sent, faults } = findings;
        let seq = meter.position.map_or(0, |position| position.seq.0);
        let once = meter.twice == 0 && meter.applied == meter.written && seq == meter.written.revisions;
        Self {
            passed: comparison.difference.is_none() && once,
            difference: comparison.difference,
            seconds: length.as_secs_f64(),
            keys_compared: comparison.keys,
            bytes_compared: comparison.bytes,
            written: WrittenReport {
                revisions: meter.written.revisions,
                puts: meter.written.puts,
                deletes: meter.written.deletes,
            },
            applied: AppliedReport {
                revisions: meter.applied.revisions,
                seq,
                transactions: meter.transactions,
                changes_in_one_max: meter.changes_max,
                twice: meter.twice,
            },
            repeated: counts.repeated,
            refused: counts.refused,
            lag: meter.calm_lag().map(LagReport::from),
            bytes_raw: meter.applied.bytes,
            bytes_sent: bytes_sent.0 + bytes_sent.1,
            bytes_back: bytes_sent.1,
            faults,
        }
    }

    pub fn json(&self) -> String {
        // Strings, numbers and lists of them: serde_json has no way to fail on these.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    pub fn table(&self) -> String {
        let mut text = String::from("\n");
        let mut row = |head: &str, words: String| text.push_str(&format!("  {head:<34}{words}\n"));
        let WrittenReport { revisions, puts, deletes } = self.written;
        row(&format!("written in {ORIGIN}"), format!("{revisions} revisions: {puts} puts, {deletes} deletes"));
        let AppliedReport { revisions, seq, transactions, changes_in_one_max, twice } = self.applied;
        row(
            &format!("applied in {REPLICA}"),
            format!(
                "{revisions} revisions (seq {seq}) in {transactions} transactions of up to {changes_in_one_max} keys"
            ),
        );
        row("repeated", format!("{} revisions were sent again; {twice} took effect twice", self.repeated));
        row("refused", self.refused.to_string());
        if let Some(lag) = &self.lag {
            let span = |ms: f64| time(Duration::from_secs_f64(ms / 1e3));
            let words = format!("p50 {}, p99 {}, longest {}", span(lag.p50_ms), span(lag.p99_ms), span(lag.longest_ms));
            row("lag without a fault", words);
        }
        for fault in &self.faults {
            let took = time(Duration::from_secs_f64(fault.caught_up_seconds));
            row(&fault.fault, format!("up to {} revisions waited; caught up after {took}", fault.waited_revisions_max));
        }
        let (raw, sent) = (self.bytes_raw, self.bytes_sent);
        row("raw, sent", format!("{}, {} with TLS and acks: ratio {}", bytes(raw), bytes(sent), ratio(raw, sent)));
        let verdict = match &self.difference {
            None => format!("{} keys, {}: equal, byte for byte", self.keys_compared, bytes(self.bytes_compared)),
            Some(difference) => format!("NOT EQUAL: {difference}"),
        };
        row("both sides compared", verdict);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::meter::{Arrived, Written};
    use super::*;
    use crate::model::{Epoch, Revision, Seq};
    use std::time::Instant;

    fn report(meter: &Meter, difference: Option<&str>) -> Report {
        let comparison = Comparison { keys: 1, bytes: 2, difference: difference.map(str::to_owned) };
        let counts = Counts::default();
        Report::new(Findings {
            length: Duration::from_secs(1),
            meter,
            comparison,
            counts,
            bytes_sent: (3, 4),
            faults: vec![],
        })
    }

    #[test]
    fn it_passes_only_if_both_sides_are_equal_and_each_revision_took_effect_once() {
        let at = Instant::now();
        let arrived =
            |seq| Arrived { at, epoch: Epoch(1), seq: Seq(seq), origin_revision: Revision(seq + 1), changes: 1 };
        let mut meter = Meter::default();
        for revision in 2..=3 {
            meter.write(Written { revision: Revision(revision), at, puts: 1, deletes: 0, bytes: 9 });
        }
        meter.arrive(arrived(1));
        assert!(!report(&meter, None).passed, "a revision is not applied");
        meter.arrive(arrived(2));
        assert!(report(&meter, None).passed);
        assert!(!report(&meter, Some("a is missing at the replica")).passed);
        assert!(report(&meter, Some("a is missing at the replica")).table().contains("NOT EQUAL: a is missing"));
        meter.arrive(arrived(2));
        assert!(!report(&meter, None).passed, "something took effect twice");
    }
}
