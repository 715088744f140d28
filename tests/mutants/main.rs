//! Job: `make mutants`: break the product on purpose, one small fault at a time, and see that the tests notice each.
//! Input: the list in the TOML files beside this one. Output: a line for each mutant and each that survives; exit code 1 if any does.
//! Edge: copies the tree to a folder of its own, builds it once with every mutant behind a switch, and runs the named tests with one switch on.
//! Always true: the tree of the repository is never touched; a mutant that does not build, and a test that does not exist, is an error, not a catch.

mod list;

use clap::Parser;
use list::Mutant;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The number of the mutant that is on in a process and in those that it starts.
const SWITCH: &str = "ETCD_FERRY_MUTANT";
/// A test gives up after 30 seconds of waiting for one thing; a few such waits in a row are no hang yet.
const RUN_MAX: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(20);
/// What of the repository is not copied.
const LEFT_OUT: [&str; 2] = ["target", ".git"];

/// What the copy's library gets: the switch that every mutant stands behind. `THE_SWITCH` stands for its name.
const SWITCHES: &str = r#"
pub mod mutants {
    use std::sync::LazyLock;

    static ON: LazyLock<Option<usize>> = LazyLock::new(|| std::env::var("THE_SWITCH").ok()?.parse().ok());

    pub fn on(number: usize) -> bool {
        *ON == Some(number)
    }
}
"#;

/// Breaks the product on purpose, one fault at a time, and sees that the tests notice.
#[derive(Parser)]
struct Arguments {
    /// Only mutants whose name, or a named test, contains this; may be given several times.
    #[arg(long)]
    only: Vec<String>,
    /// Print the mutants and the tests that no mutant names, and run nothing.
    #[arg(long)]
    list: bool,
    /// Do not run the named tests without a mutant first.
    #[arg(long)]
    no_control: bool,
    /// So many mutants at once. On a busy machine tests can fail for that alone, which is no proof.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
}

/// Which of the two test binaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Suite {
    Lib,
    It,
}

/// A built test binary.
struct Binary {
    path: PathBuf,
    tests: BTreeSet<String>,
}

/// What a run of some tests said.
struct Outcome {
    failed: BTreeSet<String>,
    /// True if the run ended by itself and said so.
    ended: bool,
    output: String,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

/// True if every mutant was caught.
fn run(arguments: &Arguments) -> Result<bool, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mutants = list::read(root)?;
    let faults = list::faults(root, &mutants);
    if !faults.is_empty() {
        return Err(faults.join("\n"));
    }
    let wanted = |mutant: &Mutant| {
        let mut names = [&mutant.name].into_iter().chain(&mutant.lib).chain(&mutant.it);
        arguments.only.is_empty() || names.any(|name| arguments.only.iter().any(|part| name.contains(part)))
    };
    let chosen: Vec<usize> = (0..mutants.len()).filter(|number| wanted(&mutants[*number])).collect();
    if chosen.is_empty() {
        return Err("no mutant of that name: see --list".to_owned());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let folder = target.join("mutants");
    let tree = folder.join("tree");
    let binaries = build(root, &tree, &folder.join("target"), &mutants)?;
    let unknown = unknown_tests(&mutants, &binaries);
    if !unknown.is_empty() {
        return Err(format!("tests that do not exist:\n{}", unknown.join("\n")));
    }
    if arguments.list {
        print_list(&mutants, &chosen, &binaries);
        return Ok(true);
    }
    if !arguments.no_control {
        let red = red_without_a_mutant(&mutants, &chosen, &binaries, &tree);
        if !red.is_empty() {
            return Err(format!("red without any mutant, and so no proof of anything:\n{}", red.join("\n")));
        }
    }
    let (alone, together): (Vec<usize>, Vec<usize>) = chosen.iter().partition(|number| mutants[**number].as_text);
    let judge = Judge { root, tree: &tree, mutants: &mutants, binaries: &binaries, of: chosen.len() };
    let mut survivors = judge.all(&alone, 1)?;
    survivors.extend(judge.all(&together, arguments.jobs)?);
    print_unnamed(&mutants, &binaries);
    println!("{} mutants, {} blind tests", chosen.len(), survivors.len());
    survivors.iter().for_each(|survivor| println!("SURVIVES {survivor}"));
    Ok(survivors.is_empty())
}

/// Copies the tree, builds it with all mutants behind their switches, and puts the sources back as they were: what a test reads is
/// what the repository holds.
fn build(root: &Path, tree: &Path, target: &Path, mutants: &[Mutant]) -> Result<BTreeMap<Suite, Binary>, String> {
    let carried = list::switched(root, mutants, "mutants::on").map_err(|faults| faults.join("\n"))?;
    copy_tree(root, tree).map_err(|e| format!("copying the tree: {e}"))?;
    let library = "src/lib.rs";
    let plain = fs::read_to_string(root.join(library)).map_err(|e| format!("{library}: {e}"))?;
    for (file, text) in &carried {
        write(&tree.join(file), text)?;
    }
    write(
        &tree.join(library),
        &format!("{}{}", carried.get(library).unwrap_or(&plain), SWITCHES.replace("THE_SWITCH", SWITCH)),
    )?;
    // A test that takes in a file of the library finds the switch at the same place.
    let tests = "tests/it/main.rs";
    let plain = fs::read_to_string(root.join(tests)).map_err(|e| format!("{tests}: {e}"))?;
    write(&tree.join(tests), &format!("{}pub use etcd_ferry::mutants;\n", carried.get(tests).unwrap_or(&plain)))?;
    println!("building {} mutants into one copy of the tree", mutants.len());
    let built = Command::new(env!("CARGO"))
        .args(["test", "--no-run", "--features", "failpoints", "--lib", "--test", "it", "--message-format", "json"])
        .env("CARGO_TARGET_DIR", target)
        .current_dir(tree)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cargo: {e}"))?;
    copy_tree(root, tree).map_err(|e| format!("copying the tree: {e}"))?;
    let messages = String::from_utf8_lossy(&built.stdout);
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let messages: Vec<serde_json::Value> = messages.collect();
    if !built.status.success() {
        // Without the warnings: an expression behind a switch stands in parentheses that it may not need.
        let errors = messages.iter().map(|message| &message["message"]).filter(|said| said["level"] == "error");
        let errors: String = errors.filter_map(|said| said["rendered"].as_str()).collect();
        return Err(format!("{errors}a mutant does not build"));
    }
    let mut binaries = BTreeMap::new();
    for message in &messages {
        let suite = match (message["profile"]["test"].as_bool(), message["target"]["name"].as_str()) {
            (Some(true), Some("etcd_ferry")) => Suite::Lib,
            (Some(true), Some("it")) => Suite::It,
            _ => continue,
        };
        if let Some(path) = message["executable"].as_str() {
            let tests = Command::new(path).arg("--list").output().map_err(|e| format!("{path}: {e}"))?;
            let tests = String::from_utf8_lossy(&tests.stdout);
            let tests = tests.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect();
            binaries.insert(suite, Binary { path: path.into(), tests });
        }
    }
    if binaries.len() == 2 { Ok(binaries) } else { Err("cargo did not say where the test binaries are".to_owned()) }
}

/// Makes `to` like `from`; what is equal already keeps its time, so that builds are incremental.
fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (name, target) = (entry.file_name(), to.join(entry.file_name()));
        if LEFT_OUT.iter().any(|left_out| name == OsStr::new(left_out)) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else if fs::read(&target).ok() != Some(fs::read(entry.path())?) {
            fs::copy(entry.path(), &target)?;
        }
        names.insert(name);
    }
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        if !names.contains(&entry.file_name()) {
            let gone = entry.path();
            if entry.file_type()?.is_dir() { fs::remove_dir_all(gone)? } else { fs::remove_file(gone)? }
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

fn named(mutant: &Mutant, suite: Suite) -> &[String] {
    match suite {
        Suite::Lib => &mutant.lib,
        Suite::It => &mutant.it,
    }
}

fn unknown_tests(mutants: &[Mutant], binaries: &BTreeMap<Suite, Binary>) -> Vec<String> {
    let mut unknown = Vec::new();
    for mutant in mutants {
        for (suite, binary) in binaries {
            let missing = named(mutant, *suite).iter().filter(|test| !binary.tests.contains(*test));
            unknown.extend(missing.map(|test| format!("{}: {test}", mutant.name)));
        }
    }
    unknown
}

fn red_without_a_mutant(
    mutants: &[Mutant],
    chosen: &[usize],
    binaries: &BTreeMap<Suite, Binary>,
    tree: &Path,
) -> Vec<String> {
    let mut red = Vec::new();
    for (suite, binary) in binaries {
        let tests: BTreeSet<&String> = chosen.iter().flat_map(|number| named(&mutants[*number], *suite)).collect();
        if tests.is_empty() {
            continue;
        }
        println!("first without any mutant: {} tests of {suite:?}", tests.len());
        // Many tests at once take longer than those of one mutant.
        let run_max = RUN_MAX * u32::try_from(1 + tests.len() / 10).unwrap_or(u32::MAX);
        let outcome = run_tests(binary, tree, None, &tests.into_iter().collect::<Vec<_>>(), run_max);
        match outcome {
            Ok(outcome) if outcome.ended => red.extend(outcome.failed),
            Ok(outcome) => red.push(format!("{suite:?} did not end:\n{}", outcome.output)),
            Err(reason) => red.push(reason),
        }
    }
    red
}

/// Who runs the mutants, one by one or several at once.
struct Judge<'a> {
    root: &'a Path,
    tree: &'a Path,
    mutants: &'a [Mutant],
    binaries: &'a BTreeMap<Suite, Binary>,
    of: usize,
}

impl Judge<'_> {
    /// A line for each mutant and test that does not see it.
    fn all(&self, numbers: &[usize], jobs: usize) -> Result<Vec<String>, String> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut survivors = Vec::new();
            while let Some(number) = numbers.get(next.fetch_add(1, Ordering::Relaxed)) {
                survivors.extend(self.one(*number)?);
            }
            Ok(survivors)
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
            let judged = workers.into_iter().map(|worker| worker.join().map_err(|_| "a worker panicked".to_owned())?);
            Ok(judged.collect::<Result<Vec<Vec<String>>, String>>()?.concat())
        })
    }

    fn one(&self, number: usize) -> Result<Vec<String>, String> {
        let (started, mutant) = (Instant::now(), &self.mutants[number]);
        let green = green_tests(self.root, self.tree, number, mutant, self.binaries)?;
        let verdict = if green.is_empty() { "caught" } else { "SURVIVES" };
        println!(
            "{verdict:<8} {:>6.1} s  {} (number {number}, {} in all)",
            started.elapsed().as_secs_f64(),
            mutant.name,
            self.of
        );
        Ok(green.into_iter().map(|test| format!("{}: not seen by {test}", mutant.name)).collect())
    }
}

/// The named tests that are not seen to fail with the mutant on.
fn green_tests(
    root: &Path,
    tree: &Path,
    number: usize,
    mutant: &Mutant,
    binaries: &BTreeMap<Suite, Binary>,
) -> Result<Vec<String>, String> {
    if mutant.as_text {
        for file in list::files(std::slice::from_ref(mutant), |_| true) {
            let text = fs::read_to_string(root.join(&file)).map_err(|e| format!("{file}: {e}"))?;
            write(&tree.join(&file), &list::edited(mutant, &file, &text).map_err(|faults| faults.join("\n"))?)?;
        }
    }
    let mut green = Vec::new();
    for (suite, binary) in binaries {
        let tests: Vec<&String> = named(mutant, *suite).iter().collect();
        if tests.is_empty() {
            continue;
        }
        let outcome = run_tests(binary, tree, Some(number), &tests, RUN_MAX)?;
        // A run that was stopped, or died, says nothing of any test.
        let unseen = |test: &&&String| !outcome.ended || !outcome.failed.contains(**test);
        green.extend(tests.iter().filter(unseen).map(|test| (*test).clone()));
        if !outcome.ended {
            println!("{}: the tests did not end by themselves:\n{}", mutant.name, outcome.output);
        }
    }
    if mutant.as_text {
        copy_tree(root, tree).map_err(|e| format!("copying the tree: {e}"))?;
    }
    Ok(green)
}

fn run_tests(
    binary: &Binary,
    tree: &Path,
    number: Option<usize>,
    tests: &[&String],
    run_max: Duration,
) -> Result<Outcome, String> {
    let mut command = Command::new(&binary.path);
    command.arg("--exact").args(tests).current_dir(tree).stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::null()).env_remove(SWITCH);
    command.envs(number.map(|number| (SWITCH, number.to_string())));
    let failed = |e: std::io::Error| format!("{}: {e}", binary.path.display());
    let mut child = command.spawn().map_err(failed)?;
    let mut stdout = child.stdout.take().ok_or("a child without its output")?;
    let reading = std::thread::spawn(move || {
        let mut output = Vec::new();
        stdout.read_to_end(&mut output).map(|_| String::from_utf8_lossy(&output).into_owned())
    });
    let started = Instant::now();
    while child.try_wait().map_err(failed)?.is_none() {
        if started.elapsed() > run_max {
            child.kill().and_then(|()| child.wait()).map_err(failed)?;
            end_what_is_left(number);
            return Ok(Outcome { failed: BTreeSet::new(), ended: false, output: format!("stopped after {run_max:?}") });
        }
        std::thread::sleep(POLL);
    }
    end_what_is_left(number);
    let output = reading.join().map_err(|_| "reading the output failed")?.map_err(failed)?;
    // The last list of names: the one before it holds what each test printed.
    let list = output.rsplit_once("\nfailures:\n").map_or("", |(_, list)| list);
    let names = list.lines().take_while(|line| line.starts_with("    ")).map(|line| line.trim().to_owned());
    Ok(Outcome { failed: names.collect(), ended: output.contains("\ntest result: "), output })
}

/// Ends what a broken program has left behind: every process that was started with this mutant's switch on.
fn end_what_is_left(number: Option<usize>) {
    let Some(number) = number else { return };
    let switch = format!("{SWITCH}={number}");
    let ids =
        fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    for id in ids {
        let variables = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        if variables.split(|byte| *byte == 0).any(|variable| variable == switch.as_bytes())
            && let Some(pid) = Pid::from_raw(id)
        {
            // It may have ended by itself meanwhile.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn print_list(mutants: &[Mutant], chosen: &[usize], binaries: &BTreeMap<Suite, Binary>) {
    for number in chosen {
        let mutant = &mutants[*number];
        let invariant = mutant.invariant.map(|invariant| format!(" [{invariant:?}]")).unwrap_or_default();
        println!("{number:>4} {}{invariant}", mutant.name);
        mutant.lib.iter().chain(&mutant.it).for_each(|test| println!("       {test}"));
    }
    print_unnamed(mutants, binaries);
}

fn print_unnamed(mutants: &[Mutant], binaries: &BTreeMap<Suite, Binary>) {
    for (suite, binary) in binaries {
        let named: BTreeSet<&String> = mutants.iter().flat_map(|mutant| named(mutant, *suite)).collect();
        let unnamed: Vec<&String> = binary.tests.iter().filter(|test| !named.contains(test)).collect();
        println!("{suite:?}: {} of {} tests are named by a mutant", named.len(), binary.tests.len());
        unnamed.iter().for_each(|test| println!("  no mutant names {test}"));
    }
}
