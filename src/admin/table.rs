//! Job: a table for a terminal.
//! Input: a header, rows. Output: text, one line for each row.
//! Pure: no clock, no I/O, no async.
//! Always true: each column is as wide as its widest cell, the last one is not padded, and no line holds a control character.

use super::show::printable;

/// Ends with a line break.
pub(super) fn aligned<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(header.map(str::to_owned)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().enumerate().map(|(column, cell)| format!("{cell:<0$}", width(column))).collect();
        text.push_str(&line(&cells.join("  ")));
    }
    text
}

/// One line, with its break.
pub(super) fn line(text: &str) -> String {
    format!("{}\n", printable(text.trim_end()))
}
