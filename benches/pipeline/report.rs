//! Job: the result: rows with the figures of both systems, their ratio, and whether the bound is kept.
//! Input: rows, trials, lags. Output: a table, JSON.
//! Pure but for asking which machine this is.
//! Always true: a row that has a bound says whether it is kept; nothing is rounded before it is judged.

use crate::arrivals::Lag;
use crate::proxy_cost::ProxyCost;
use crate::rig::{Line, System, tool};
use crate::works::Scale;
use serde::Serialize;
use std::process::Command;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    Millis,
    Seconds,
    Bytes,
    Count,
}

/// What etcd-ferry's figure must be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    None,
    /// At most so many times the other's, and so much more.
    AtMost {
        times: f64,
        plus: f64,
    },
    /// At least so many times the other's.
    AtLeast {
        times: f64,
    },
    /// So many times as fast: the other's time is at least so many times this one's.
    Faster {
        times: f64,
    },
    Below {
        most: f64,
    },
}

#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub work: String,
    pub line: Line,
    pub unit: Unit,
    pub make_mirror: Option<f64>,
    pub etcd_ferry: Option<f64>,
    pub bound: Bound,
    /// The work is as large as the bound is meant for.
    pub judged: bool,
}

impl Row {
    /// `figures`: make-mirror's, etcd-ferry's.
    pub fn new(
        work: impl Into<String>,
        line: Line,
        unit: Unit,
        figures: (Option<f64>, Option<f64>),
        bound: Bound,
    ) -> Self {
        Self { work: work.into(), line, unit, make_mirror: figures.0, etcd_ferry: figures.1, bound, judged: true }
    }

    pub fn judged_if(self, judged: bool) -> Self {
        Self { judged, ..self }
    }

    /// `None`: nothing is asked, or of a larger work. A figure that is missing keeps no bound.
    pub fn kept(&self) -> Option<bool> {
        let ferry = self.etcd_ferry.unwrap_or(f64::NAN);
        let mirror = self.make_mirror.unwrap_or(f64::NAN);
        match self.bound {
            _ if !self.judged => None,
            Bound::None => None,
            Bound::AtMost { times, plus } => Some(ferry <= mirror * times + plus),
            Bound::AtLeast { times } => Some(ferry >= mirror * times),
            Bound::Faster { times } => Some(mirror >= ferry * times),
            Bound::Below { most } => Some(ferry <= most),
        }
    }

    fn ratio(&self) -> String {
        let (Some(mirror), Some(ferry)) = (self.make_mirror, self.etcd_ferry) else { return String::new() };
        if ferry <= mirror { format!("1/{:.2}", mirror / ferry) } else { format!("{:.2}", ferry / mirror) }
    }

    fn asked(&self) -> String {
        match self.bound {
            Bound::None => String::new(),
            Bound::AtMost { times, plus } if times < 1.0 && plus == 0.0 => format!("at most 1/{:.0}", 1.0 / times),
            Bound::AtMost { times, plus: 0.0 } => format!("at most {times}"),
            Bound::AtMost { times, plus } => format!("at most {times} and {plus} more"),
            Bound::AtLeast { times } => format!("at least {times}"),
            Bound::Faster { times } => format!("at most 1/{times:.0}"),
            Bound::Below { most } => format!("at most {most}"),
        }
    }

    fn figure(&self, figure: Option<f64>) -> String {
        let Some(figure) = figure else { return String::new() };
        match self.unit {
            Unit::Millis => format!("{figure:.1} ms"),
            Unit::Seconds => format!("{figure:.2} s"),
            Unit::Bytes => format!("{figure:.0} B"),
            Unit::Count if figure < 100.0 => format!("{figure:.2}"),
            Unit::Count => format!("{figure:.0}"),
        }
    }
}

/// One rate that was tried.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Trial {
    /// `None`: the origin's etcd alone, nothing carries.
    pub system: Option<System>,
    pub rate: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// From when a put was due to the origin's answer: no carrier can be faster.
    pub put_p99_ms: f64,
    /// Cores in use: by the origin's etcd, the replica's, what carries, the benchmark itself.
    pub cores: [f64; 4],
}

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub scale: Scale,
    pub etcd: String,
    pub cores: usize,
    pub proxy: Option<ProxyCost>,
    pub rows: Vec<Row>,
    pub trials: Vec<Trial>,
    /// At 200 revisions/s on the far line.
    pub over_time: Vec<(System, Vec<Lag>)>,
}

impl Report {
    pub fn new(scale: &Scale) -> Self {
        let version = Command::new(tool("etcd")).arg("--version").output();
        let etcd =
            version.map(|out| String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or_default().to_owned());
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let etcd = etcd.unwrap_or_default();
        Self { scale: *scale, etcd, cores, proxy: None, rows: Vec::new(), trials: Vec::new(), over_time: Vec::new() }
    }

    pub fn machine(&self) -> [String; 2] {
        [
            format!("{}, {} cores, {} run", self.etcd, self.cores, self.scale.name),
            format!("lines: {}; {} (each way)", Line::Loopback.name(), Line::Far.name()),
        ]
    }

    /// Adds a row, and says it.
    pub fn row(&mut self, row: Row) {
        println!("  {}", Self::words(&row).join("  "));
        self.rows.push(row);
    }

    pub fn all_kept(&self) -> bool {
        self.rows.iter().all(|row| row.kept() != Some(false))
    }

    fn words(row: &Row) -> [String; 7] {
        let kept = match row.kept() {
            Some(true) => "kept",
            Some(false) => "NOT KEPT",
            None if row.judged => "",
            None => "judged by a full run",
        };
        [
            row.work.clone(),
            row.line.name().to_owned(),
            row.figure(row.make_mirror),
            row.figure(row.etcd_ferry),
            row.ratio(),
            row.asked(),
            kept.to_owned(),
        ]
    }

    /// As Markdown, so that it can stand in the README as it is.
    pub fn table(&self) -> String {
        let head = ["work", "line", "make-mirror", "etcd-ferry", "ratio", "asked", ""].map(str::to_owned);
        let rows: Vec<[String; 7]> = std::iter::once(head).chain(self.rows.iter().map(Self::words)).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let mut table = String::new();
        for (at, row) in rows.iter().enumerate() {
            for (column, word) in row.iter().enumerate() {
                let pad = width(column) - word.chars().count();
                table.push_str(&format!("| {word}{} ", " ".repeat(pad)));
            }
            table.push_str("|\n");
            if at == 0 {
                (0..row.len()).for_each(|column| table.push_str(&format!("|{}", "-".repeat(width(column) + 2))));
                table.push_str("|\n");
            }
        }
        if let Some(proxy) = self.proxy {
            table.push_str(&format!(
                "\nThe proxy adds {:.0} µs to a round trip and takes {:.2} ms of CPU for each megabyte; it carries {:.0} MB/s.\n",
                proxy.round_trip_added_micros, proxy.cpu_millis_a_megabyte, proxy.megabytes_a_second
            ));
        }
        table
    }

    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap()
    }
}
