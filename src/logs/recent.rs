//! Job: the last lines of the log, kept in memory for a support bundle.
//! Input: lines as they are written. Output: the last of them, without colours.
//! Pure: no clock, no I/O, no async.
//! Always true: no more than `RECENT_BYTES_MAX` is kept; a line that is too long is cut, and says so.

use std::collections::VecDeque;

/// Some hours of a sidecar that has something to say, and little beside what a link takes.
pub const RECENT_BYTES_MAX: usize = 512 << 10;
/// A reason that a peer wrote may be long.
const LINE_BYTES_MAX: usize = 4 << 10;
const CUT: &str = " ... (cut)";

/// The last lines, the oldest first.
#[derive(Debug, Default)]
pub struct Recent {
    lines: VecDeque<String>,
    bytes: usize,
}

impl Recent {
    /// One line, or several at once.
    pub fn push(&mut self, text: &str) {
        for line in text.lines() {
            let mut line = without_colours(line);
            if line.len() > LINE_BYTES_MAX {
                let end = (0..=LINE_BYTES_MAX).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
                line.truncate(end);
                line.push_str(CUT);
            }
            self.bytes += line.len();
            self.lines.push_back(line);
        }
        while self.bytes > RECENT_BYTES_MAX {
            self.bytes -= self.lines.pop_front().map_or(self.bytes, |line| line.len());
        }
    }

    pub fn text(&self) -> String {
        self.lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect()
    }
}

/// Colours are `ESC [ numbers m`; they are there only where standard error is a terminal.
fn without_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        plain.push_str(before);
        rest = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        rest = rest.strip_prefix('m').unwrap_or(rest);
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_and_the_oldest_go_first() {
        let mut recent = Recent::default();
        let line = "x".repeat(1_000);
        for number in 0..2_000 {
            recent.push(&format!("{number} {line}\n"));
        }
        let text = recent.text();
        assert!(text.len() <= RECENT_BYTES_MAX + recent.lines.len(), "{}", text.len());
        assert!(text.len() > RECENT_BYTES_MAX - 2_000, "no less than there is room for");
        assert!(text.ends_with(&format!("1999 {line}\n")) && !text.contains("\n0 x"));
        let bytes: usize = recent.lines.iter().map(String::len).sum();
        assert_eq!(recent.bytes, bytes);
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_where_a_letter_ends() {
        let mut recent = Recent::default();
        recent.push(&format!("a{}\nnext\n", "\u{e4}".repeat(LINE_BYTES_MAX)));
        let text = recent.text();
        let (first, next) = text.split_once('\n').unwrap();
        assert!(first.ends_with(&format!("\u{e4}{CUT}")) && first.len() <= LINE_BYTES_MAX + CUT.len());
        assert_eq!(next, "next\n");
    }

    #[test]
    fn colours_are_not_kept() {
        let mut recent = Recent::default();
        recent.push("\u{1b}[2m2026-11-26\u{1b}[0m \u{1b}[1;32m INFO\u{1b}[0m etcd_ferry: said\n");
        assert_eq!(recent.text(), "2026-11-26  INFO etcd_ferry: said\n");
    }
}
