//! Job: the mutants, each a small deliberate fault in the product or in the test bed, with the tests that must see it.
//! Input: the TOML files beside this one, and the sources. Output: the mutants; sources that carry all of them, each behind a switch.
//! Edge: reads files, writes none.
//! Always true: a mutant whose text is not in its file exactly once is a fault, and so is one that names no test; all faults are reported at once.

use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// What is always true of a link, word by word as the README promises it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Invariant {
    Complete,
    Once,
    Whole,
    Ordered,
    Equal,
    Fenced,
    Bounded,
    KnownPeers,
}

impl Invariant {
    pub const ALL: [Invariant; 8] = [
        Invariant::Complete,
        Invariant::Once,
        Invariant::Whole,
        Invariant::Ordered,
        Invariant::Equal,
        Invariant::Fenced,
        Invariant::Bounded,
        Invariant::KnownPeers,
    ];
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutant {
    /// A sentence that says what is broken.
    pub name: String,
    /// Which of the eight it breaks, if it is one of them.
    pub invariant: Option<Invariant>,
    pub edits: Vec<Edit>,
    /// Unit tests and integration tests that must fail, by their full names.
    #[serde(default)]
    pub lib: Vec<String>,
    #[serde(default)]
    pub it: Vec<String>,
    /// The edit is to the file as tests read it, not to what is built: for the tests that hold sources and README against rules.
    #[serde(default)]
    pub as_text: bool,
}

/// One piece of code and what stands there instead.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edit {
    pub file: String,
    /// Occurs exactly once. What stands between « and », or all of it, is replaced; it is an expression or whole statements.
    pub find: String,
    pub put: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MutantFile {
    mutant: Vec<Mutant>,
}

/// Where an edit replaces, in bytes of the file.
struct Place<'a> {
    mutant: usize,
    from: usize,
    to: usize,
    put: &'a str,
}

/// All mutants of the repository at `root`, in the order of their files; a mutant's number is its place in the list.
pub fn read(root: &Path) -> Result<Vec<Mutant>, String> {
    let folder = root.join("tests/mutants");
    let entries = fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    let mut mutants = Vec::new();
    for path in paths {
        let fault = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let text = fs::read_to_string(&path).map_err(|e| fault(&e))?;
        let file: MutantFile = toml::from_str(&text).map_err(|e| fault(&e))?;
        mutants.extend(file.mutant);
    }
    Ok(mutants)
}

/// Everything that is wrong with the list as it stands against the sources.
pub fn faults(root: &Path, mutants: &[Mutant]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut names = BTreeSet::new();
    for mutant in mutants {
        if !names.insert(&mutant.name) {
            faults.push(format!("{}: another mutant has this name", mutant.name));
        }
        if mutant.edits.is_empty() || mutant.lib.len() + mutant.it.len() == 0 {
            faults.push(format!("{}: a mutant has an edit and names a test that must fail", mutant.name));
        }
    }
    for invariant in Invariant::ALL {
        if !mutants.iter().any(|mutant| mutant.invariant == Some(invariant)) {
            faults.push(format!("no mutant breaks {invariant:?}"));
        }
    }
    for file in files(mutants, |_| true) {
        match fs::read_to_string(root.join(&file)) {
            Ok(text) => {
                let built = places(mutants, &file, &text, |mutant| !mutant.as_text);
                let read = places(mutants, &file, &text, |mutant| mutant.as_text);
                faults.extend(built.and_then(|places| nested(&file, &places)).err().unwrap_or_default());
                faults.extend(read.err().unwrap_or_default());
            }
            Err(e) => faults.push(format!("{file}: {e}")),
        }
    }
    faults
}

/// The files that the mutants of a kind edit, and `file` as it carries all of them: `switch` says whether the mutant of a number is on.
pub fn switched(root: &Path, mutants: &[Mutant], switch: &str) -> Result<BTreeMap<String, String>, Vec<String>> {
    let mut sources = BTreeMap::new();
    for file in files(mutants, |mutant| !mutant.as_text) {
        let text = fs::read_to_string(root.join(&file)).map_err(|e| vec![format!("{file}: {e}")])?;
        let places = places(mutants, &file, &text, |mutant| !mutant.as_text)?;
        // Only the library can name its modules by `crate`.
        let inside = file.starts_with("src/") && file != "src/main.rs";
        let switch = format!("{}::{switch}", if inside { "crate" } else { "etcd_ferry" });
        let carried = carry(&text, 0, text.len(), &places, &switch);
        sources.insert(file, carried);
    }
    Ok(sources)
}

/// The edits of one mutant made to a file's text.
pub fn edited(mutant: &Mutant, file: &str, text: &str) -> Result<String, Vec<String>> {
    let mut places = places(std::slice::from_ref(mutant), file, text, |_| true)?;
    places.sort_by_key(|place| std::cmp::Reverse(place.from));
    let mut text = text.to_owned();
    for place in places {
        text.replace_range(place.from..place.to, place.put);
    }
    Ok(text)
}

pub fn files(mutants: &[Mutant], of: impl Fn(&Mutant) -> bool) -> BTreeSet<String> {
    let edits = mutants.iter().filter(|mutant| of(mutant)).flat_map(|mutant| &mutant.edits);
    edits.map(|edit| edit.file.clone()).collect()
}

/// Outer places first.
fn places<'a>(
    mutants: &'a [Mutant],
    file: &str,
    text: &str,
    of: impl Fn(&Mutant) -> bool,
) -> Result<Vec<Place<'a>>, Vec<String>> {
    let (mut places, mut faults) = (Vec::new(), Vec::new());
    for (number, mutant) in mutants.iter().enumerate().filter(|(_, mutant)| of(mutant)) {
        for edit in mutant.edits.iter().filter(|edit| edit.file == file) {
            let (before, rest) = edit.find.split_once('«').unwrap_or(("", &edit.find));
            let (replaced, after) = rest.split_once('»').unwrap_or((rest, ""));
            let wanted = format!("{before}{replaced}{after}");
            let found: Vec<usize> = text.match_indices(&wanted).map(|(at, _)| at).collect();
            match found[..] {
                [at] => {
                    let from = at + before.len();
                    places.push(Place { mutant: number, from, to: from + replaced.len(), put: &edit.put });
                }
                _ => faults.push(format!("{}: {} times in {file}: {wanted}", mutant.name, found.len())),
            }
        }
    }
    places.sort_by_key(|place| (place.from, std::cmp::Reverse(place.to)));
    if faults.is_empty() { Ok(places) } else { Err(faults) }
}

/// Two places may lie in one another or be the same; they must not share only a part.
fn nested(file: &str, places: &[Place<'_>]) -> Result<(), Vec<String>> {
    let crossed = |a: &Place<'_>, b: &Place<'_>| a.from < b.from && b.from < a.to && a.to < b.to;
    let pairs = places.iter().enumerate().flat_map(|(at, a)| places[at + 1..].iter().map(move |b| (a, b)));
    let faults: Vec<String> = pairs
        .filter(|(a, b)| crossed(a, b))
        .map(|(a, b)| format!("{file}: the mutants {} and {} replace overlapping code", a.mutant, b.mutant))
        .collect();
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

/// The text from `from` to `to`, each place in it as `if switch(number) { put } else { what stands there }`.
fn carry(text: &str, from: usize, to: usize, places: &[Place<'_>], switch: &str) -> String {
    let mut carried = String::new();
    let mut at = from;
    let mut places = places;
    while let Some(outer) = places.first() {
        let inside = places.iter().take_while(|place| place.to <= outer.to && place.from < outer.to.max(1)).count();
        let same = places.iter().take_while(|place| (place.from, place.to) == (outer.from, outer.to)).count();
        carried.push_str(&text[at..outer.from]);
        let replaced = &text[outer.from..outer.to];
        // A statement in parentheses is none; a part of an expression needs them.
        let statement = replaced.trim_end().ends_with([';', '}']);
        carried.push_str(if statement { "" } else { "(" });
        for place in &places[..same] {
            carried.push_str(&format!("if {switch}({}) {{ {} }} else ", place.mutant, place.put));
        }
        let kept = carry(text, outer.from, outer.to, &places[same..inside], switch);
        carried.push_str(&format!("{{ {kept} }}{}", if statement { "" } else { ")" }));
        at = outer.to;
        places = &places[inside..];
    }
    carried.push_str(&text[at..to]);
    carried
}

#[cfg(test)]
#[allow(dead_code, reason = "the runner has no test harness; the tests run with those of `it`")]
mod tests {
    use super::*;

    fn mutant(find: &str, put: &str) -> Mutant {
        let edit = Edit { file: "a.rs".to_owned(), find: find.to_owned(), put: put.to_owned() };
        Mutant {
            name: put.to_owned(),
            invariant: None,
            edits: vec![edit],
            lib: Vec::new(),
            it: Vec::new(),
            as_text: false,
        }
    }

    fn carried(text: &str, mutants: &[Mutant]) -> Result<String, Vec<String>> {
        let places = places(mutants, "a.rs", text, |_| true)?;
        nested("a.rs", &places)?;
        Ok(carry(text, 0, text.len(), &places, "on"))
    }

    #[test]
    fn a_source_carries_every_mutant_behind_its_switch() {
        let text = "let a = b(c, d);\ne();\n";
        let mutants =
            [mutant("let a = «b(c, d)»", "1"), mutant("«b(c, d)»;", "2"), mutant("b(c, «d»)", "3"), mutant("e();", "")];
        let wanted = "let a = (if on(0) { 1 } else if on(1) { 2 } else { b(c, (if on(2) { 3 } else { d })) });\n\
            if on(3) {  } else { e(); }\n";
        assert_eq!(carried(text, &mutants).unwrap(), wanted);
        assert_eq!(edited(&mutants[2], "a.rs", text).unwrap(), "let a = b(c, 3);\ne();\n");
    }

    #[test]
    fn a_text_that_is_not_there_exactly_once_and_places_that_cross_are_faults() {
        assert_eq!(carried("a; b; a;", &[mutant("a;", "1")]).unwrap_err(), ["1: 2 times in a.rs: a;"]);
        assert_eq!(carried("a; b;", &[mutant("c", "1")]).unwrap_err(), ["1: 0 times in a.rs: c"]);
        assert_eq!(carried("a + b + c", &[mutant("a + b", "1"), mutant("b + c", "2")]).unwrap_err().len(), 1);
    }
}
