//! Job: lay environment variables and flags over the configuration file, and tell of each value where it stands.
//! Input: the file's text and table, variables, what `--set` says. Output: one table; what was overridden; where each field stands; faults.
//! Pure: no file, no environment, no clock.
//! Always true: a flag goes before a variable, a variable before the file; a variable of ours that names no key is a fault, and so is a
//! value that its key cannot have.

use super::Fault;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

/// What the name of every variable begins with.
const PREFIX: &str = "ETCD_FERRY_";
/// Variables that are no keys: of the failpoints, and of this project's own build (which `cargo run` and `cargo test` hand on), tests and
/// installation.
const OTHER_VARIABLES: [&str; 9] = [
    "ETCD_FERRY_COMMIT",
    "ETCD_FERRY_BUILD",
    "ETCD_FERRY_FAILPOINTS",
    "ETCD_FERRY_MUTANT",
    "ETCD_FERRY_TEST_ETCD",
    "ETCD_FERRY_ORIGIN_ETCD",
    "ETCD_FERRY_REPLICA_ETCD",
    "ETCD_FERRY_POWER_CUT",
    "ETCD_FERRY_ETCD_SUITE",
];

/// How a value is written in a variable or a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    /// With commas between.
    List,
    Whole,
    Switch,
}

/// Every key that a variable or a flag can override: all but those of links, which have no name of their own to be called by.
const KEYS: [(&str, Kind); 47] = [
    ("region", Kind::Text),
    ("node", Kind::Text),
    ("data_dir", Kind::Text),
    ("etcd.endpoints", Kind::List),
    ("etcd.ca", Kind::Text),
    ("etcd.cert", Kind::Text),
    ("etcd.key", Kind::Text),
    ("etcd.username", Kind::Text),
    ("etcd.password_file", Kind::Text),
    ("etcd.allow_corrupting_versions", Kind::Switch),
    ("etcd.compact_after_seconds", Kind::Whole),
    ("etcd.defragment", Kind::Switch),
    ("listen.peer", Kind::Text),
    ("listen.admin", Kind::Text),
    ("listen.http", Kind::Text),
    ("tls.ca", Kind::Text),
    ("tls.cert", Kind::Text),
    ("tls.key", Kind::Text),
    ("tls.crl", Kind::Text),
    ("tls.admins", Kind::List),
    ("tls.viewers", Kind::List),
    ("tls.pki.address", Kind::Text),
    ("tls.pki.ca", Kind::Text),
    ("tls.pki.mount", Kind::Text),
    ("tls.pki.role", Kind::Text),
    ("tls.pki.namespace", Kind::Text),
    ("tls.pki.token_file", Kind::Text),
    ("tls.pki.names", Kind::List),
    ("tls.pki.common_name", Kind::Text),
    ("tls.pki.ttl_seconds", Kind::Whole),
    ("limits.spool_bytes_max", Kind::Whole),
    ("limits.journal_bytes_max", Kind::Whole),
    ("limits.segment_bytes", Kind::Whole),
    ("limits.queue_bytes_max", Kind::Whole),
    ("limits.frame_bytes_max", Kind::Whole),
    ("limits.window_bytes_max", Kind::Whole),
    ("limits.revision_bytes_max", Kind::Whole),
    ("limits.txn_ops_max", Kind::Whole),
    ("limits.request_bytes_max", Kind::Whole),
    ("limits.page_keys_max", Kind::Whole),
    ("limits.page_bytes_max", Kind::Whole),
    ("limits.stall_seconds", Kind::Whole),
    ("log.format", Kind::Text),
    ("log.level", Kind::Text),
    ("traces.endpoint", Kind::Text),
    ("traces.ca", Kind::Text),
    ("traces.sample", Kind::Whole),
];

/// Where a value stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Of the file, from 1.
    Line(usize),
    Variable(String),
    Flag,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Line(line) => write!(f, "line {line}"),
            Source::Variable(name) => f.write_str(name),
            Source::Flag => f.write_str("--set"),
        }
    }
}

/// A value that goes before the file's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// Such as `limits.txn_ops_max`.
    pub key: &'static str,
    /// As TOML has it.
    pub value: String,
    pub source: Source,
}

/// One table made of all layers.
#[derive(Debug)]
pub(super) struct Layered {
    pub table: Table,
    /// The ones that hold, in the order of the keys.
    pub overrides: Vec<Override>,
    /// Of variables and flags alone.
    pub faults: Vec<Fault>,
    /// By the field of each value, such as `send[0].to[1]`.
    sources: BTreeMap<String, Source>,
}

/// True for a variable that speaks of the configuration, also if it names no key of it.
pub fn is_variable(name: &str) -> bool {
    name.starts_with(PREFIX) && !OTHER_VARIABLES.contains(&name) && !is_of_kubernetes(name)
}

/// Kubernetes tells every container of a namespace about each service in it: ETCD_FERRY_SERVICE_HOST, ETCD_FERRY_PORT_7443_TCP_ADDR and the
/// like, where one is named etcd-ferry.
fn is_of_kubernetes(name: &str) -> bool {
    let numbered = |(_, rest): (&str, &str)| {
        let (port, protocol) = rest.split_once('_').unwrap_or((rest, ""));
        let protocol = protocol.split('_').next().unwrap_or_default();
        port.parse::<u16>().is_ok() && ["TCP", "UDP", "SCTP"].contains(&protocol)
    };
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.rsplit_once("_PORT_").is_some_and(numbered)
}

/// The variable of a key.
fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.to_uppercase().replace('.', "_"))
}

/// Lays variables and flags over a file's table, which was made from `text`. Of several flags for one key the last one holds.
pub(super) fn lay(text: &str, mut table: Table, variables: &[(String, OsString)], flags: &[String]) -> Layered {
    let mut sources = lines(text);
    let (mut faults, mut given) = (Vec::new(), BTreeMap::new());
    for (name, value) in variables.iter().filter(|(name, _)| is_variable(name)) {
        let mut fault = |rule: String| faults.push(Fault { field: name.clone(), rule });
        let Some(at) = KEYS.iter().position(|(key, _)| variable(key) == *name) else {
            fault(unknown_variable(name));
            continue;
        };
        match value.to_str().map(|value| value_of(KEYS[at].1, value)) {
            Some(Ok(value)) => drop(given.insert(at, (value, Source::Variable(name.clone())))),
            Some(Err(rule)) => fault(rule.to_owned()),
            None => fault("is not UTF-8 text: write it anew".to_owned()),
        }
    }
    for flag in flags {
        let (key, value) = flag.split_once('=').map_or((flag.trim(), None), |(key, value)| (key.trim(), Some(value)));
        let mut fault = |rule: String| faults.push(Fault { field: format!("--set {key}"), rule });
        let known = KEYS.iter().position(|(known, _)| *known == key);
        match (known, value) {
            (Some(at), Some(value)) => match value_of(KEYS[at].1, value) {
                Ok(value) => drop(given.insert(at, (value, Source::Flag))),
                Err(rule) => fault(rule.to_owned()),
            },
            (Some(_), None) => fault(format!("has no value: write --set {key}=VALUE")),
            (None, _) => fault(unknown_key(key)),
        }
    }
    let mut overrides = Vec::new();
    for (at, (value, source)) in given {
        let key = KEYS[at].0;
        overrides.push(Override { key, value: value.to_string(), source: source.clone() });
        put(&mut table, key, value);
        sources.retain(|field, _| !is_at_or_below(field, key));
        sources.insert(key.to_owned(), source);
    }
    Layered { table, overrides, faults, sources }
}

fn unknown_variable(name: &str) -> String {
    let links = ["SEND_", "RECEIVE_"].iter().any(|table| name[PREFIX.len()..].starts_with(table));
    if links {
        return "is about a link, and links are in the file alone: write it there, and unset this".to_owned();
    }
    let example = variable("limits.spool_bytes_max");
    format!("names no key: unset it, or correct it; {example}, for one, is limits.spool_bytes_max")
}

fn unknown_key(key: &str) -> String {
    if ["send", "receive"].iter().any(|table| key.starts_with(table)) {
        return "is about a link, and links are in the file alone: write it there".to_owned();
    }
    let table = key.split_once('.').map(|(table, _)| format!("{table}."));
    let near = KEYS.iter().map(|(known, _)| *known);
    let near: Vec<&str> = match &table {
        Some(table) if near.clone().any(|known| known.starts_with(table)) => {
            near.filter(|known| known.starts_with(table)).collect()
        }
        Some(_) | None => near.collect(),
    };
    format!("is not a known key: use one of {}", near.join(", "))
}

/// What a variable or a flag says, as a value of TOML.
fn value_of(kind: Kind, text: &str) -> Result<Value, &'static str> {
    match kind {
        Kind::Text => Ok(Value::String(text.to_owned())),
        Kind::List if text.trim().is_empty() => Ok(Value::Array(Vec::new())),
        Kind::List => Ok(Value::Array(text.split(',').map(|item| Value::String(item.trim().to_owned())).collect())),
        Kind::Whole => text.trim().parse().map(Value::Integer).map_err(|_| "must be a whole number, such as 1048576"),
        Kind::Switch => text.trim().parse().map(Value::Boolean).map_err(|_| "must be true or false"),
    }
}

/// Where the file has something else than a table, that is a fault of its own, and the value has no place.
fn put(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => drop(table.insert(key.to_owned(), value)),
        Some((name, key)) => {
            let inner = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
            if let Some(inner) = inner.as_table_mut() {
                put(inner, key, value);
            }
        }
    }
}

fn is_at_or_below(field: &str, key: &str) -> bool {
    field.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// The line of each field. The text is known to be TOML.
fn lines(text: &str) -> BTreeMap<String, Source> {
    let starts: Vec<usize> = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
    let line = |at: usize| Source::Line(starts.partition_point(|start| *start <= at));
    let mut found = BTreeMap::new();
    if let Ok(table) = DeTable::parse(text) {
        note_table("", table.get_ref(), &line, &mut found);
    }
    found
}

type Lines<'a> = &'a dyn Fn(usize) -> Source;

fn note_table(path: &str, table: &DeTable<'_>, line: Lines<'_>, found: &mut BTreeMap<String, Source>) {
    for (key, value) in table {
        let field = if path.is_empty() { key.get_ref().to_string() } else { format!("{path}.{}", key.get_ref()) };
        found.insert(field.clone(), line(key.span().start));
        note_value(&field, value, line, found);
    }
}

fn note_value(field: &str, value: &Spanned<DeValue<'_>>, line: Lines<'_>, found: &mut BTreeMap<String, Source>) {
    match value.get_ref() {
        DeValue::Table(table) => note_table(field, table, line, found),
        DeValue::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                let field = format!("{field}[{i}]");
                found.insert(field.clone(), line(item.span().start));
                note_value(&field, item, line, found);
            }
        }
        DeValue::String(_) | DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_) => {}
    }
}

impl Layered {
    /// Says of each fault where its field stands; of one that is absent, where its table does.
    pub fn locate(&self, faults: Vec<Fault>) -> Vec<Fault> {
        let located = |Fault { field, rule }: Fault| match self.source_of(&field) {
            Some(source) => Fault { rule: format!("{rule} [{source}]"), field },
            None => Fault { field, rule },
        };
        faults.into_iter().map(located).collect()
    }

    fn source_of(&self, field: &str) -> Option<&Source> {
        let mut place = field;
        loop {
            if let Some(source) = self.sources.get(place) {
                return Some(source);
            }
            place = &place[..place.rfind(['.', '['])?];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::read::parse;

    fn laid(text: &str, variables: &[(&str, &str)], flags: &[&str]) -> Layered {
        let variables: Vec<_> = variables.iter().map(|(k, v)| ((*k).to_owned(), OsString::from(v))).collect();
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        lay(text, parse(text).unwrap(), &variables, &flags)
    }

    fn field_at_fault(text: &str, variables: &[(&str, &str)], flags: &[&str]) -> (String, String) {
        let faults = laid(text, variables, flags).faults;
        assert_eq!(faults.len(), 1, "{faults:?}");
        (faults[0].field.clone(), faults[0].rule.clone())
    }

    #[test]
    fn a_flag_goes_before_a_variable_and_a_variable_before_the_file() {
        let text = "node = 'file'\n[limits]\ntxn_ops_max = 1\npage_keys_max = 1\nstall_seconds = 1\n";
        let variables =
            [("ETCD_FERRY_LIMITS_TXN_OPS_MAX", "2"), ("ETCD_FERRY_LIMITS_PAGE_KEYS_MAX", "2"), ("HOME", "/")];
        let flags = ["limits.page_keys_max=3", "limits.page_keys_max = 4", "log.level=info,etcd_ferry=debug"];
        let layered = laid(text, &variables, &flags);
        assert_eq!(layered.faults, []);
        let wanted = "node = 'file'\n[limits]\ntxn_ops_max = 2\npage_keys_max = 4\nstall_seconds = 1\n[log]\nlevel = 'info,etcd_ferry=debug'";
        assert_eq!(layered.table, parse(wanted).unwrap());
        let told: Vec<String> =
            layered.overrides.iter().map(|o| format!("{} = {} {}", o.key, o.value, o.source)).collect();
        let wanted = [
            "limits.txn_ops_max = 2 ETCD_FERRY_LIMITS_TXN_OPS_MAX",
            "limits.page_keys_max = 4 --set",
            "log.level = \"info,etcd_ferry=debug\" --set",
        ];
        assert_eq!(told, wanted);
    }

    #[test]
    fn values_are_written_plainly_and_lists_with_commas() {
        let variables = [
            ("ETCD_FERRY_TLS_ADMINS", "spiffe://a/x, spiffe://a/y"),
            ("ETCD_FERRY_ETCD_DEFRAGMENT", "true"),
            ("ETCD_FERRY_DATA_DIR", "/a b"),
        ];
        let layered = laid("[tls]\nadmins = ['spiffe://a/z', 'spiffe://a/z']\n", &variables, &["etcd.endpoints="]);
        let wanted = "data_dir = '/a b'\n[tls]\nadmins = ['spiffe://a/x', 'spiffe://a/y']\n[etcd]\ndefragment = true\nendpoints = []\n";
        assert_eq!((layered.table, layered.faults), (parse(wanted).unwrap(), Vec::new()));
        for (value, rule) in [("12 MiB", "whole number"), ("1.5", "whole number"), ("", "whole number")] {
            let (field, found) = field_at_fault("", &[("ETCD_FERRY_LIMITS_PAGE_KEYS_MAX", value)], &[]);
            assert_eq!(field, "ETCD_FERRY_LIMITS_PAGE_KEYS_MAX");
            assert!(found.contains(rule), "{value}: {found}");
        }
        assert!(field_at_fault("", &[], &["etcd.defragment=yes"]).1.contains("true or false"));
    }

    #[test]
    fn a_variable_or_a_flag_that_names_no_key_is_a_fault() {
        for name in
            ["ETCD_FERRY_LIMIT_TXN_OPS_MAX", "ETCD_FERRY_", "ETCD_FERRY_LIMITS", "ETCD_FERRY_limits_txn_ops_max"]
        {
            let (field, rule) = field_at_fault("", &[(name, "1")], &[]);
            assert_eq!(field, name);
            assert!(rule.contains("names no key"), "{rule}");
        }
        assert!(field_at_fault("", &[("ETCD_FERRY_SEND_CONFIG_TO", "x")], &[]).1.contains("in the file alone"));
        for (flag, field, words) in [
            ("limits.txn_ops=1", "--set limits.txn_ops", "limits.txn_ops_max"),
            ("limits.txn_ops_max", "--set limits.txn_ops_max", "write --set limits.txn_ops_max=VALUE"),
            ("nod=1", "--set nod", "node"),
            ("send[0].to=x", "--set send[0].to", "in the file alone"),
        ] {
            let (found, rule) = field_at_fault("", &[], &[flag]);
            assert_eq!(found, field);
            assert!(rule.contains(words), "{rule}");
        }
    }

    #[test]
    fn variables_of_tests_of_kubernetes_and_of_others_are_left_alone() {
        for name in [
            "ETCD_FERRY_FAILPOINTS",
            "ETCD_FERRY_COMMIT",
            "ETCD_FERRY_SERVICE_HOST",
            "ETCD_FERRY_SERVICE_PORT",
            "ETCD_FERRY_SERVICE_PORT_PEER",
            "ETCD_FERRY_PORT",
            "ETCD_FERRY_PORT_7443_TCP",
            "ETCD_FERRY_PORT_7443_TCP_ADDR",
            "ETCD_FERRY_ADMIN_PORT_7444_TCP_PROTO",
            "ETCDCTL_ENDPOINTS",
        ] {
            assert_eq!(laid("", &[(name, "tcp://10.0.0.1:7443")], &[]).faults, [], "{name}");
        }
    }

    #[test]
    fn no_key_is_taken_for_something_else_and_each_has_a_variable_of_its_own() {
        let mut names: Vec<String> = KEYS.iter().map(|(key, _)| variable(key)).collect();
        assert!(names.iter().all(|name| is_variable(name)));
        assert_eq!(variable("limits.txn_ops_max"), "ETCD_FERRY_LIMITS_TXN_OPS_MAX");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), KEYS.len());
    }

    #[test]
    fn the_rules_know_every_key_and_take_what_a_variable_or_a_flag_makes_of_it() {
        let value = |kind| match kind {
            Kind::Text | Kind::List => "x",
            Kind::Whole => "1",
            Kind::Switch => "true",
        };
        let flags: Vec<String> = KEYS.iter().map(|(key, kind)| format!("{key}={}", value(*kind))).collect();
        let layered = lay("", Table::new(), &[], &flags);
        assert_eq!((layered.overrides.len(), layered.faults), (KEYS.len(), Vec::new()));
        let Err(crate::config::Faults(faults)) = crate::config::check::config(&layered.table).0 else {
            panic!("a configuration without links is none")
        };
        let not_taken = |fault: &&Fault| fault.rule.contains("is not a known key") || fault.rule.contains(", not a");
        assert_eq!(faults.iter().filter(not_taken).collect::<Vec<_>>(), Vec::<&Fault>::new());
    }

    #[test]
    fn a_fault_says_where_its_value_stands() {
        let text = "node = 1\n\n[etcd]\nendpoints = [\n  'a',\n  'b',\n]\n[[send]]\nlink = 'x'\n[[send]]\nto = 1\n[tls]\nadmins = ['c', 'd']\n";
        let layered = laid(text, &[("ETCD_FERRY_TLS_ADMINS", "e,f")], &["listen.http=nowhere"]);
        for (field, place) in [
            ("node", "[line 1]"),
            ("etcd.endpoints", "[line 4]"),
            ("etcd.endpoints[1]", "[line 6]"),
            ("etcd.cert", "[line 3]"),
            ("send[0].link", "[line 9]"),
            ("send[0].peer", "[line 8]"),
            ("send[1].to[3]", "[line 11]"),
            ("send[1].peer", "[line 10]"),
            ("tls.admins[1]", "[ETCD_FERRY_TLS_ADMINS]"),
            ("listen.http", "[--set]"),
        ] {
            let fault = Fault { field: field.to_owned(), rule: "must not be".to_owned() };
            assert_eq!(layered.locate(vec![fault])[0].rule, format!("must not be {place}"), "{field}");
        }
        let region = Fault { field: "region".to_owned(), rule: "is missing".to_owned() };
        assert_eq!(layered.locate(vec![region.clone()]), [region]);
    }
}
