//! Job: keep the list of `make mutants` from rotting: each mutant still finds its code, and each of the eight invariants has one.
//! Input: tests/mutants/, and the sources as they lie in the repository. Output: passes or fails, with every mutant that needs mending.
//! Edge: reads files.
//! Always true: nothing is built and nothing is changed.

#[path = "../mutants/list.rs"]
#[allow(dead_code, reason = "the runner uses the rest")]
mod list;

use std::path::Path;

#[test]
fn every_mutant_finds_its_code_exactly_once_and_every_invariant_has_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mutants = list::read(root).unwrap_or_else(|fault| panic!("{fault}"));
    let faults = list::faults(root, &mutants);
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}
