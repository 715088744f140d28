//! Job: `make bench`: etcd-ferry beside `etcdctl make-mirror`, on real etcds, the same work for both, each on fresh clusters.
//! Input: `--quick`, `--only WORK`, `--out DIR`. Output: a table, `result.json` and `lag.svg`; exit 0 if every bound that is judged is kept.
//! Always true: ratios are what is judged, since machines differ; after each work both sides are compared byte for byte.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on says why and ends")]
#![allow(clippy::cast_possible_truncation, reason = "counts of a benchmark are small")]

mod arrivals;
#[allow(unused_imports, reason = "the bed's own tests run with the test suite")]
#[path = "../../tests/it/bed/mod.rs"]
mod bed;
mod load;
mod picture;
mod proxy_cost;
mod rates;
mod report;
mod rig;
mod straight;
mod works;

use clap::Parser;
use report::Report;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::LazyLock;
use std::time::Instant;
use works::Scale;

#[derive(Parser)]
#[command(about = "etcd-ferry beside etcdctl make-mirror, on real etcds")]
struct Arguments {
    /// Shorter works, under 3 minutes in all; what depends on their size is shown, and not judged.
    #[arg(long)]
    quick: bool,
    /// Only works whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Where result.json and lag.svg go.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Says what is done now, and how long it has been.
fn say(what: &str) {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let seconds = BEGAN.elapsed().as_secs();
    println!("[{}:{:02}] {what} ...", seconds / 60, seconds % 60);
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let scale = if arguments.quick { Scale::QUICK } else { Scale::FULL };
    let mut report = Report::new(&scale);
    for line in report.machine() {
        println!("{line}");
    }
    let wanted = |name: &str| arguments.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    Box::pin(works::run(&scale, &wanted, &mut report)).await;
    println!("\n{}", report.table());
    std::fs::create_dir_all(&arguments.out).unwrap();
    std::fs::write(arguments.out.join("result.json"), report.json()).unwrap();
    if let Err(e) = picture::draw(&arguments.out.join("lag.svg"), &report) {
        eprintln!("the picture was not drawn: {e}");
        return ExitCode::FAILURE;
    }
    println!("{} and lag.svg beside it", arguments.out.join("result.json").display());
    if report.all_kept() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
