//! Job: each rule of the house is shown to catch a breach.
//! Input: made-up sources and a made-up map. Output: passes or fails.
//! Pure.
//! Always true: what is no breach is shown beside what is one.

use super::*;

const LIB: &str = "//! ```text\n//! main.rs    the command line\n//! origin/    mod watch lag(p) (files, some) ship, under app\n\
    //!            spool: on disk\n//! replica/   mod plan(p) dedupe(the only file that knows sled)\n//! model.rs(p) retry.rs plain words\n//! ```\n";

fn breaches(rule: impl Fn(&Map, &Source) -> Vec<String>, path: &str, text: &str) -> usize {
    rule(&Map::parse(LIB), &Source::new(path, text)).len()
}

#[test]
fn the_map_is_read_with_rooms_continued_lines_and_asides() {
    let map = Map::parse(LIB);
    let named: Vec<&str> = map.named.iter().map(String::as_str).collect();
    let origin = ["main", "model", "origin/lag", "origin/mod", "origin/ship", "origin/spool", "origin/watch"];
    assert_eq!(named, [&origin[..], &["replica/dedupe", "replica/mod", "replica/plan", "retry"]].concat());
    assert_eq!(map.pure.iter().map(String::as_str).collect::<Vec<_>>(), ["model", "origin/lag", "replica/plan"]);
}

#[test]
fn an_upward_or_sideways_import_in_every_form() {
    assert_eq!(breaches(upward_imports, "src/model.rs", "use crate::origin::ship;"), 1);
    assert_eq!(breaches(upward_imports, "src/origin/ship.rs", "use crate::{model, replica::{plan, admit}};"), 1);
    assert_eq!(breaches(upward_imports, "src/replica/plan/merge.rs", "fn f() { crate::origin::lag::f() }"), 1);
    assert_eq!(
        breaches(upward_imports, "src/origin/ship.rs", "use crate::{model::{self, Seq}, retry}; // crate::replica"),
        0
    );
}

#[test]
fn a_clock_or_a_runtime_in_a_pure_file_but_not_in_its_comments_and_tests() {
    assert_eq!(breaches(impurities, "src/origin/lag.rs", "let at = Instant::now();"), 1);
    assert_eq!(breaches(impurities, "src/origin/lag.rs", "fn lag(now: Instant) {}"), 0);
    assert_eq!(breaches(impurities, "src/replica/plan/merge.rs", "fn f() { tokio::spawn(g()); }"), 1);
    assert_eq!(
        breaches(
            impurities,
            "src/model.rs",
            "/// tokio\nconst A: &str = \"sled\";\n#[cfg(test)]\nmod tests { use tokio; }"
        ),
        0
    );
    assert_eq!(breaches(impurities, "src/origin/ship.rs", "use tokio::select;"), 0);
}

#[test]
fn a_file_that_is_not_on_the_map() {
    assert_eq!(breaches(unmapped, "src/origin/helper.rs", ""), 1);
    assert_eq!(breaches(unmapped, "src/other.rs", ""), 1);
    assert_eq!(breaches(unmapped, "src/replica/plan/merge.rs", ""), 0);
    assert_eq!(breaches(unmapped, "src/replica/mod.rs", ""), 0);
    let parent = Source::new("src/wire/mod.rs", "#[cfg(test)]\nmod samples;\nmod frame;\n#[cfg(test)]\nmod tests {}");
    assert_eq!(test_modules(&parent), ["src/wire/samples.rs", "src/wire/tests.rs"]);
}

#[test]
fn strangers_where_they_do_not_belong() {
    assert_eq!(breaches(strangers, "src/replica/journal.rs", "sled::open(path)"), 1);
    assert_eq!(breaches(strangers, "src/replica/dedupe.rs", "sled::open(path)"), 0);
    assert_eq!(breaches(strangers, "src/wire/frame.rs", "use anyhow::Result;"), 1);
    assert_eq!(breaches(strangers, "src/replica/receive.rs", "send(Applied { seq })"), 1);
    assert_eq!(
        breaches(strangers, "src/replica/receive.rs", "fn f() -> Applied { g() } match e { Event::Applied(a) => {} }"),
        0
    );
    assert_eq!(breaches(strangers, "src/replica/apply.rs", "Applied { seq }"), 0);
}

#[test]
fn a_poor_header_a_long_file_and_bad_habits() {
    assert_eq!(breaches(header_gaps, "src/model.rs", "//! To come.\n"), 1);
    assert_eq!(
        breaches(header_gaps, "src/model.rs", "//! Job: a.\n//! Input: b. Output: c.\n//! Always true: d.\n"),
        0
    );
    assert_eq!(breaches(oversize, "src/model.rs", &"\n".repeat(LINES_MAX + 1)), 1);
    assert_eq!(breaches(bad_habits, "src/model.rs", "let (a, b) = mpsc::unbounded_channel();"), 1);
    assert_eq!(breaches(bad_habits, "tests/it/bank.rs", "#[ignore]\nfn f() { tokio::time::sleep(second) }"), 2);
    assert_eq!(breaches(bad_habits, "tests/it/bed/mod.rs", "tokio::time::sleep(pause)"), 0);
}
