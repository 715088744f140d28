//! Job: the command line: parse, call, print, exit code.
//! Input: arguments. Output: text on stdout, one line of what is wrong on stderr, exit code 0 (done), 1 (failed) or
//! 2 (bad usage or configuration).
//! Always true: this file decides nothing but how a result is shown.

use clap::{Args, Parser, Subcommand};
use etcd_ferry::admin::client::{self, ClientError, Connection};
use etcd_ferry::admin::proto::Verification;
use etcd_ferry::admin::verification::{self, verification_json, verification_lines};
use etcd_ferry::admin::{quarantine, show};
use etcd_ferry::app;
use etcd_ferry::certs::{self, issue::CertsError};
use etcd_ferry::config::{Config, Fault, Faults};
use etcd_ferry::demo;
use etcd_ferry::software;
use std::io::{ErrorKind, IsTerminal, Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The width of a terminal that does not tell its own.
const COLUMNS: usize = 80;

/// A sidecar that carries an etcd cluster's revisions to a standby cluster in another region.
#[derive(Parser)]
#[command(name = "etcd-ferry", version = software::SHORT, long_version = software::LONG, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check a configuration and every file that it names; reports all faults at once
    #[command(after_help = "Example: etcd-ferry check --config /etc/etcd-ferry/us-east-1.toml")]
    Check {
        /// The configuration file (TOML); paths in it are relative to the current directory
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Run the sidecar, until SIGTERM or Ctrl-C
    #[command(after_help = "Example: etcd-ferry run --config /etc/etcd-ferry/us-east-1.toml")]
    Run {
        /// The configuration file (TOML); paths in it are relative to the current directory
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Show every link of a running sidecar: state, position, lag, and why it is not following
    #[command(after_help = "Example: etcd-ferry status --config /etc/etcd-ferry/us-east-1.toml --json")]
    Status {
        #[command(flatten)]
        sidecar: Sidecar,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Start a new base copy of a link; ask the sidecar at the link's origin
    #[command(after_help = "Example: etcd-ferry resync config --config /etc/etcd-ferry/us-east-1.toml --allow-deletes")]
    Resync {
        /// The link
        link: String,
        #[command(flatten)]
        sidecar: Sidecar,
        /// Go on past the guards of the base copy: keys that the origin does not have are deleted at the replica
        #[arg(long)]
        allow_deletes: bool,
    },
    /// Compare both sides of a link while traffic goes on; changes nothing. Ask the sidecar at the link's origin
    #[command(
        after_help = "Exit code 0: equal; 1: different, or not to be told. Example: etcd-ferry verify config --config /etc/etcd-ferry/us-east-1.toml"
    )]
    Verify {
        /// The link
        link: String,
        #[command(flatten)]
        sidecar: Sidecar,
        /// The outcome as JSON
        #[arg(long)]
        json: bool,
    },
    /// Compare both sides of a link and ship the keys that differ, and those alone. Ask the sidecar at the link's origin
    #[command(after_help = "Example: etcd-ferry repair config --config /etc/etcd-ferry/us-east-1.toml")]
    Repair {
        /// The link
        link: String,
        #[command(flatten)]
        sidecar: Sidecar,
        /// Also if more keys are deleted at the replica than deletes_share_max allows
        #[arg(long)]
        allow_deletes: bool,
        /// The outcome as JSON
        #[arg(long)]
        json: bool,
    },
    /// Let the revision that is held back for its deletes through, once. Ask the sidecar at the link's replica
    #[command(after_help = "Example: etcd-ferry allow config --config /etc/etcd-ferry/cn-hangzhou.toml")]
    Allow {
        /// The link
        link: String,
        #[command(flatten)]
        sidecar: Sidecar,
    },
    /// The revisions that a link's replica refused and goes on without. Ask the sidecar at the link's replica
    Quarantine {
        #[command(subcommand)]
        command: QuarantineCommand,
    },
    /// Show it on this machine: two etcds, two sidecars, a link that fails now and then, and both sides compared at the end
    #[command(after_help = "Needs etcd in PATH. Example: etcd-ferry demo --keep")]
    Demo {
        /// Keep both regions up at the end, until Ctrl-C, and print the commands to look at them
        #[arg(long)]
        keep: bool,
        /// How long to write
        #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(3..=3600))]
        seconds: u64,
        /// The report as JSON; the rest goes to standard error
        #[arg(long)]
        json: bool,
    },
    /// Issue certificates
    Certs {
        #[command(subcommand)]
        command: CertsCommand,
    },
}

#[derive(Subcommand)]
enum QuarantineCommand {
    /// Show them, one on a line
    #[command(after_help = "Example: etcd-ferry quarantine list config --config /etc/etcd-ferry/cn-hangzhou.toml")]
    List {
        /// The link
        link: String,
        #[command(flatten)]
        sidecar: Sidecar,
        /// JSON instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Show one: why it was refused, and its keys with the sizes of their values
    #[command(after_help = "Example: etcd-ferry quarantine show config 12 --config /etc/etcd-ferry/cn-hangzhou.toml")]
    Show {
        /// The link
        link: String,
        /// The revision's seq
        seq: u64,
        #[command(flatten)]
        sidecar: Sidecar,
        /// JSON instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Bring its keys to what they are at the origin now, never to what it wrote
    #[command(after_help = "Example: etcd-ferry quarantine retry config 12 --config /etc/etcd-ferry/cn-hangzhou.toml")]
    Retry {
        /// The link
        link: String,
        /// The revision's seq
        seq: u64,
        #[command(flatten)]
        sidecar: Sidecar,
    },
    /// Forget it: its keys differ until they are written again, or mended by `repair`
    #[command(
        after_help = "Example: etcd-ferry quarantine discard config 12 --config /etc/etcd-ferry/cn-hangzhou.toml"
    )]
    Discard {
        /// The link
        link: String,
        /// The revision's seq
        seq: u64,
        #[command(flatten)]
        sidecar: Sidecar,
    },
}

#[derive(Subcommand)]
enum CertsCommand {
    /// Make a CA, a pair for each region and an admin pair, for development; issues from a CA that is there already
    #[command(after_help = "Example: etcd-ferry certs dev --out certs-dev --region us-east-1 --region cn-hangzhou")]
    Dev {
        /// The folder for the PEM files; no file in it is ever written over
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// A region; may be given several times
        #[arg(long = "region", value_name = "NAME")]
        regions: Vec<String>,
    },
}

/// Which running sidecar is meant, and who asks.
#[derive(Args)]
struct Sidecar {
    /// The configuration file of the running sidecar
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The operator's certificate [default: admin.pem beside tls.cert]
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its key [default: admin.key beside tls.cert]
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
}

/// Why a command ends without success.
enum Failure {
    /// Exit code 2.
    Config(Faults),
    /// Exit code 1; one line that says what, and what to do.
    Failed(String),
}

impl From<Faults> for Failure {
    fn from(faults: Faults) -> Self {
        Failure::Config(faults)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Failure::Failed(error.to_string())
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Check { config } => check(&config),
        Command::Run { config } => run(&config),
        Command::Status { sidecar, json } => status(&sidecar, json),
        Command::Resync { link, sidecar, allow_deletes } => resync(&sidecar, &link, allow_deletes),
        Command::Verify { link, sidecar, json } => verify(&sidecar, &link, json),
        Command::Repair { link, sidecar, allow_deletes, json } => repair(&sidecar, &link, allow_deletes, json),
        Command::Allow { link, sidecar } => allow(&sidecar, &link),
        Command::Quarantine { command } => quarantine(command),
        Command::Demo { keep, seconds, json } => demo(keep, seconds, json),
        Command::Certs { command: CertsCommand::Dev { out, regions } } => certs_dev(&out, &regions),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Config(faults)) => {
            eprintln!("{faults}");
            ExitCode::from(2)
        }
        Err(Failure::Failed(line)) => {
            eprintln!("etcd-ferry: {line}");
            ExitCode::FAILURE
        }
    }
}

/// A line on standard output. Whoever reads it may have seen enough: a closed pipe is no failure.
fn say(line: &str) -> Result<(), Failure> {
    match writeln!(stdout(), "{line}") {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(Failure::Failed(format!("standard output: {e}"))),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn check(path: &Path) -> Result<(), Failure> {
    let (config, identity) = Config::check(path)?;
    say(&format!(
        "{} is sound; links to send: {}, to receive: {}",
        path.display(),
        config.send.len(),
        config.receive.len()
    ))?;
    say(&format!("this sidecar's certificate is for {}", identity.sans.join(", ")))?;
    say(&format!("and is valid until {}", certs::load::rfc3339(identity.not_after)))
}

fn run(path: &Path) -> Result<(), Failure> {
    let (config, _) = Config::check(path)?;
    config.prepare_files()?;
    app::log(&config.log).map_err(failed)?;
    #[cfg(feature = "failpoints")]
    etcd_ferry::failpoint::arm().map_err(Failure::Failed)?;
    sidecar_runtime()?.block_on(app::run(config)).map_err(failed)
}

fn demo(keep: bool, seconds: u64, json: bool) -> Result<(), Failure> {
    let options = demo::Options { length: Duration::from_secs(seconds), keep, json };
    runtime()?.block_on(demo::run(options)).map_err(failed)
}

fn failed(error: anyhow::Error) -> Failure {
    Failure::Failed(format!("{error:#}"))
}

fn status(sidecar: &Sidecar, json: bool) -> Result<(), Failure> {
    let connection = sidecar.connection()?;
    let reply = runtime()?.block_on(client::status(&connection))?;
    if json {
        say(&show::status_json(&reply))
    } else {
        let columns = || std::env::var("COLUMNS").ok()?.parse().ok();
        let width = stdout().is_terminal().then(|| columns().unwrap_or(COLUMNS));
        say(show::status_table(&reply, width).trim_end())
    }
}

fn resync(sidecar: &Sidecar, link: &str, allow_deletes: bool) -> Result<(), Failure> {
    let connection = sidecar.connection()?;
    runtime()?.block_on(client::resync(&connection, link, allow_deletes))?;
    let config = sidecar.config.display();
    say(&format!(
        "link {link}: a new base copy is asked for; see how it goes with `etcd-ferry status --config {config}`"
    ))
}

fn verify(sidecar: &Sidecar, link: &str, json: bool) -> Result<(), Failure> {
    let connection = sidecar.connection()?;
    let outcome = runtime()?.block_on(verification::verify(&connection, link, show_progress))?;
    told(link, &outcome, json)?;
    ended(sidecar, link, &outcome)
}

fn repair(sidecar: &Sidecar, link: &str, allow_deletes: bool, json: bool) -> Result<(), Failure> {
    let connection = sidecar.connection()?;
    let outcome = runtime()?.block_on(verification::repair(&connection, link, allow_deletes, show_progress))?;
    told(link, &outcome, json)?;
    ended(sidecar, link, &outcome)
}

fn allow(sidecar: &Sidecar, link: &str) -> Result<(), Failure> {
    let allowed = runtime()?.block_on(client::allow(&sidecar.connection()?, link))?;
    let many = format!("{} of {} keys", allowed.deletes, allowed.keys);
    let what = if allowed.minute {
        format!("with it {many} are deleted within a minute")
    } else {
        format!("it deletes {many}")
    };
    say(&format!("link {link}: revision {} (seq {}) goes through; {what}", allowed.origin_revision, allowed.seq))
}

fn quarantine(command: QuarantineCommand) -> Result<(), Failure> {
    match command {
        QuarantineCommand::List { link, sidecar, json } => {
            let connection = sidecar.connection()?;
            let reply = runtime()?.block_on(client::status(&connection))?;
            let link = quarantine::at_replica(&connection, &reply, &link)?;
            if json { say(&quarantine::list_json(link)) } else { say_all(&quarantine::list_lines(link)) }
        }
        QuarantineCommand::Show { link, seq, sidecar, json } => {
            let revision = runtime()?.block_on(quarantine::show(&sidecar.connection()?, &link, seq))?;
            if json { say(&quarantine::show_json(&revision)) } else { say_all(&quarantine::show_lines(&revision)) }
        }
        QuarantineCommand::Retry { link, seq, sidecar } => {
            let mended = runtime()?.block_on(quarantine::retry(&sidecar.connection()?, &link, seq))?;
            let (puts, deletes) = (mended.puts, mended.deletes);
            say(&format!(
                "link {link}: seq {seq} is out of quarantine; its keys are as at the origin ({puts} put, {deletes} deleted)"
            ))
        }
        QuarantineCommand::Discard { link, seq, sidecar } => {
            runtime()?.block_on(quarantine::discard(&sidecar.connection()?, &link, seq))?;
            say(&format!(
                "link {link}: seq {seq} is out of quarantine; its keys differ until they are written again, or mended by `repair`"
            ))
        }
    }
}

fn say_all(lines: &[String]) -> Result<(), Failure> {
    lines.iter().try_for_each(|line| say(line))
}

/// The exit code of a comparison.
fn ended(sidecar: &Sidecar, link: &str, outcome: &Verification) -> Result<(), Failure> {
    let config = sidecar.config.display();
    match outcome.outcome.as_str() {
        "equal" | "mended" => Ok(()),
        "different" if outcome.expected_keys == outcome.differing_keys => Err(Failure::Failed(format!(
            "link {link}: both sides differ as expected, in keys of revisions in quarantine: see `etcd-ferry quarantine list {link}` at the \
             replica's sidecar"
        ))),
        "different" => Err(Failure::Failed(format!(
            "link {link}: both sides differ; `etcd-ferry repair {link} --config {config}` ships what differs"
        ))),
        _ => Err(Failure::Failed(format!(
            "link {link}: {}; `etcd-ferry status --config {config}` shows how the link is",
            outcome.detail
        ))),
    }
}

/// One line that is written over, for whoever sits at a terminal.
fn show_progress(verification: &Verification) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() && verification.running {
        // Nobody is worse off if it cannot be shown.
        let _ = write!(stderr, "\r{:<60}\r", verification::progress(verification)).and_then(|()| stderr.flush());
    }
}

/// The outcome of a comparison, on standard output.
fn told(link: &str, verification: &Verification, json: bool) -> Result<(), Failure> {
    if json {
        return say(&verification_json(verification));
    }
    say(&format!("link {link}: {} ({})", verification.outcome, verification.detail))?;
    let known = ["equal", "different"].contains(&verification.outcome.as_str());
    verification_lines(verification).iter().filter(|_| known).try_for_each(|line| say(line))
}

impl Sidecar {
    fn connection(&self) -> Result<Connection, Failure> {
        let config = Config::load(&self.config)?;
        let beside = |name| config.tls.cert.with_file_name(name);
        Ok(Connection {
            admin: config.listen.admin,
            cert: self.cert.clone().unwrap_or_else(|| beside("admin.pem")),
            key: self.key.clone().unwrap_or_else(|| beside("admin.key")),
            ca: config.tls.ca,
            own_cert: config.tls.cert,
        })
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    started(tokio::runtime::Builder::new_multi_thread().enable_all().build())
}

fn started(runtime: std::io::Result<tokio::runtime::Runtime>) -> Result<tokio::runtime::Runtime, Failure> {
    runtime.map_err(|e| Failure::Failed(format!("no threads can be started: {e}")))
}

/// Half the cores, for the other half is etcd's. Fewer threads also wake each other less: on two cores one thread takes a third less CPU for
/// a live revision than two.
fn sidecar_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    started(builder.worker_threads((cores / 2).max(1)).enable_all().build())
}

fn certs_dev(out: &Path, regions: &[String]) -> Result<(), Failure> {
    let issued = certs::dev(out, regions).map_err(|e| match e {
        CertsError::Region(_) => {
            Failure::Config(Faults(vec![Fault { field: "--region".to_owned(), rule: e.to_string() }]))
        }
        CertsError::File { .. }
        | CertsError::HalfPair { .. }
        | CertsError::CaExpired { .. }
        | CertsError::Load(_)
        | CertsError::Make(_) => Failure::Failed(e.to_string()),
    })?;
    for pair in &issued {
        say(&certs::issue::describe(pair))?;
    }
    Ok(())
}
