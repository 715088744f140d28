//! Job: walk a TOML table and take typed values out of it, noting what is wrong and what nobody took.
//! Input: text. Output: values, and faults with the path of their field.
//! Pure: no file, no clock.
//! Always true: a key that was not asked for is a fault; reading goes on after a fault, so that all are found at once.

use super::{Fault, Faults};
use std::path::PathBuf;
use toml::{Table, Value};

/// Syntax only: a table, or the first place that is not TOML (after it nothing can be trusted).
pub(super) fn parse(text: &str) -> Result<Table, Faults> {
    text.parse::<Table>().map_err(|error| {
        let before = &text[..error.span().map_or(0, |s| s.start.min(text.len()))];
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        let rule = format!("is not TOML: {}", error.message().trim());
        Faults(vec![Fault { field: format!("line {line}, column {column}"), rule }])
    })
}

/// One table of the file while it is being read.
pub(super) struct Section<'t> {
    path: String,
    table: &'t Table,
    asked: Vec<&'static str>,
    faults: Vec<Fault>,
}

impl<'t> Section<'t> {
    pub(super) fn root(table: &'t Table) -> Self {
        Self { path: String::new(), table, asked: Vec::new(), faults: Vec::new() }
    }

    /// The path of a key of this table, such as `send[0].link`.
    pub(super) fn field(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub(super) fn fault(&mut self, key: &str, rule: impl Into<String>) {
        let field = self.field(key);
        self.fault_at(field, rule);
    }

    /// Like [`Section::fault`], with a whole path.
    pub(super) fn fault_at(&mut self, field: String, rule: impl Into<String>) {
        self.faults.push(Fault { field, rule: rule.into() });
    }

    /// All faults, with one for each key that nobody asked for.
    pub(super) fn finish(mut self) -> Vec<Fault> {
        for key in self.table.keys() {
            if !self.asked.contains(&key.as_str()) {
                let rule = format!("is not a known key: remove it, or use one of {}", self.asked.join(", "));
                let field = self.field(key);
                self.faults.push(Fault { field, rule });
            }
        }
        self.faults
    }

    /// True if the key is there, whatever it holds.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    fn value(&mut self, key: &'static str) -> Option<&'t Value> {
        self.asked.push(key);
        self.table.get(key)
    }

    fn wrong_type(&mut self, field: String, wanted: &str, found: &Value) {
        self.fault_at(field, format!("must be {wanted}, not {}", with_article(found.type_str())));
    }

    /// A string that must be there and not be empty.
    pub(super) fn text(&mut self, key: &'static str, example: &str) -> Option<String> {
        if !self.table.contains_key(key) {
            self.asked.push(key);
            self.fault(key, format!("is missing: give one, such as {example:?}"));
            return None;
        }
        self.text_if_present(key, example)
    }

    /// A string that may be absent, but not empty.
    pub(super) fn text_if_present(&mut self, key: &'static str, example: &str) -> Option<String> {
        let value = self.value(key)?;
        let Some(text) = value.as_str() else {
            self.wrong_type(self.field(key), "a string", value);
            return None;
        };
        if text.is_empty() {
            self.fault(key, format!("is empty: give one, such as {example:?}"));
            return None;
        }
        Some(text.to_owned())
    }

    /// A string that may be absent: then it is `default`.
    pub(super) fn text_or(&mut self, key: &'static str, default: &str) -> Option<String> {
        if self.has(key) { self.text(key, default) } else { self.value(key).is_none().then(|| default.to_owned()) }
    }

    pub(super) fn path(&mut self, key: &'static str, example: &str) -> Option<PathBuf> {
        self.text(key, example).map(PathBuf::from)
    }

    pub(super) fn path_if_present(&mut self, key: &'static str, example: &str) -> Option<PathBuf> {
        self.text_if_present(key, example).map(PathBuf::from)
    }

    /// The CA (`ca`) of what an `http://` or `https://` URL leads to: required with the one, of no use with the other. `whose`: what the CA signed.
    pub(super) fn ca_of(&mut self, url: Option<&str>, key: &str, example: &str, whose: &str) -> Option<PathBuf> {
        let ca = self.path_if_present("ca", example);
        match (url.map(|url| url.starts_with("https:")), &ca) {
            (Some(true), None) => {
                self.fault("ca", format!("is missing: an https:// {key} needs the CA that signed {whose}"));
            }
            (Some(false), Some(_)) => {
                self.fault("ca", format!("is only for an https:// {key}: remove it, or write the {key} with https://"));
            }
            (Some(true), Some(_)) | (Some(false) | None, _) => {}
        }
        ca
    }

    /// A list of strings with the path of each, empty strings included; `None` if it is absent or no list.
    pub(super) fn texts(&mut self, key: &'static str) -> Option<Vec<(String, String)>> {
        let value = self.value(key)?;
        let Value::Array(items) = value else {
            self.wrong_type(self.field(key), "a list of strings, such as [\"...\"]", value);
            return None;
        };
        let mut texts = Vec::new();
        for (i, item) in items.iter().enumerate() {
            let field = format!("{}[{i}]", self.field(key));
            match item.as_str() {
                Some(text) => texts.push((field, text.to_owned())),
                None => self.wrong_type(field, "a string", item),
            }
        }
        Some(texts)
    }

    /// Notes that a list is missing, unless it is there (and then had the wrong type).
    pub(super) fn missing_list(&mut self, key: &'static str, example: &str) {
        if !self.table.contains_key(key) {
            self.fault(key, format!("is missing: give at least one, such as [{example:?}]"));
        }
    }

    pub(super) fn integer_if_present(&mut self, key: &'static str) -> Option<i64> {
        let value = self.value(key)?;
        if !value.is_integer() {
            self.wrong_type(self.field(key), "a whole number", value);
        }
        value.as_integer()
    }

    pub(super) fn flag_if_present(&mut self, key: &'static str) -> Option<bool> {
        let value = self.value(key)?;
        let flag = value.as_bool();
        if flag.is_none() {
            self.wrong_type(self.field(key), "true or false", value);
        }
        flag
    }

    /// A number, with or without a fraction.
    pub(super) fn number_if_present(&mut self, key: &'static str) -> Option<f64> {
        let value = self.value(key)?;
        // Exact for all numbers that a rule here accepts, and a number beyond 2^53 stays far out of range.
        let number = value.as_float().or_else(|| value.as_integer().map(|n| n as f64));
        if number.is_none() {
            self.wrong_type(self.field(key), "a number", value);
        }
        number
    }

    /// A table `[key]` that may be absent; an absent one is read as an empty one if `required` is not given.
    pub(super) fn table<T>(
        &mut self,
        key: &'static str,
        required: Option<&str>,
        check: impl FnOnce(&mut Section<'_>) -> Option<T>,
    ) -> Option<T> {
        let empty = Table::new();
        let table = match (self.value(key), required) {
            (Some(Value::Table(table)), _) => table,
            (Some(other), _) => {
                self.wrong_type(self.field(key), &format!("a table, [{key}]"), other);
                return None;
            }
            (None, None) => &empty,
            (None, Some(contents)) => {
                self.fault(key, format!("is missing: add a table [{key}] with {contents}"));
                return None;
            }
        };
        self.inner(self.field(key), table, check)
    }

    /// A table `[key]` that may be absent: `Some(None)`. `None`: it is there, and has faults.
    pub(super) fn table_if_present<T>(
        &mut self,
        key: &'static str,
        check: impl FnOnce(&mut Section<'_>) -> Option<T>,
    ) -> Option<Option<T>> {
        match self.value(key) {
            None => Some(None),
            Some(Value::Table(table)) => self.inner(self.field(key), table, check).map(Some),
            Some(other) => {
                self.wrong_type(self.field(key), &format!("a table, [{}]", self.field(key)), other);
                None
            }
        }
    }

    /// A list of tables `[[key]]` that may be absent; those with faults are left out.
    pub(super) fn tables<T>(
        &mut self,
        key: &'static str,
        mut check: impl FnMut(&mut Section<'_>) -> Option<T>,
    ) -> Vec<(usize, T)> {
        let items = match self.value(key) {
            None => return Vec::new(),
            Some(Value::Array(items)) => items,
            Some(other) => {
                self.wrong_type(self.field(key), &format!("a list of tables, [[{key}]]"), other);
                return Vec::new();
            }
        };
        let mut read = Vec::new();
        for (i, item) in items.iter().enumerate() {
            let field = format!("{}[{i}]", self.field(key));
            match item.as_table() {
                Some(table) => read.extend(self.inner(field, table, &mut check).map(|t| (i, t))),
                None => self.wrong_type(field, &format!("a table, [[{key}]]"), item),
            }
        }
        read
    }

    fn inner<T>(
        &mut self,
        path: String,
        table: &Table,
        check: impl FnOnce(&mut Section<'_>) -> Option<T>,
    ) -> Option<T> {
        let mut section = Section { path, table, asked: Vec::new(), faults: Vec::new() };
        let read = check(&mut section);
        self.faults.extend(section.finish());
        read
    }
}

fn with_article(type_name: &str) -> String {
    let vowel = type_name.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {type_name}", if vowel { "an" } else { "a" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_syntax_error_has_its_line_and_column() {
        let Faults(faults) = parse("a = 1\nb = \"x\nc = 2\n").unwrap_err();
        assert_eq!(faults.len(), 1);
        assert!(faults[0].field.starts_with("line 2, column "), "{:?}", faults[0]);
        let Faults(faults) = parse("a = 1\na = 2\n").unwrap_err();
        assert_eq!(faults[0].field, "line 2, column 1", "{:?}", faults[0]);
    }

    #[test]
    fn unknown_keys_are_faults_at_every_depth_and_name_the_known_ones() {
        let table = parse("known = 'x'\nunknown = 1\n[inner]\nstray = 1\n[[list]]\n[[list]]\nstray = 1\n").unwrap();
        let mut root = Section::root(&table);
        root.text("known", "y");
        root.table("inner", None, |s| s.text_if_present("taken", "y"));
        root.tables("list", |s| s.text_if_present("taken", "y"));
        let faults = root.finish();
        let fields: Vec<&str> = faults.iter().map(|f| f.field.as_str()).collect();
        assert_eq!(fields, ["inner.stray", "list[1].stray", "unknown"]);
        assert!(faults[2].rule.ends_with("one of known, inner, list"), "{}", faults[2].rule);
    }

    #[test]
    fn a_value_of_another_type_is_named() {
        let table = parse("text = 1\nlist = ['a', 2]\ntables = [3]\ntable = 4\nswitch = 'yes'").unwrap();
        let mut root = Section::root(&table);
        root.text("text", "y");
        assert_eq!(root.texts("list").unwrap().len(), 1);
        root.tables("tables", |_| Some(()));
        root.table("table", None, |_| Some(()));
        assert_eq!(root.flag_if_present("switch"), None);
        let faults: Vec<String> = root.finish().iter().map(|f| format!("{}: {}", f.field, f.rule)).collect();
        let expected = [
            "text: must be a string, not an integer",
            "list[1]: must be a string, not an integer",
            "tables[0]: must be a table, [[tables]], not an integer",
            "table: must be a table, [table], not an integer",
            "switch: must be true or false, not a string",
        ];
        assert_eq!(faults, expected);
    }
}
