//! Job: write once a minute what would be written each second: whoever is refused comes again at once.
//! Input: a line's words, the time. Output: the line, or one more that was left out.
//! Pure: no clock, no I/O, no async.
//! Always true: no words are written twice within a minute, and never more than `LINES_MAX` lines: nobody fills our disk by knocking.

use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(60);
const LINES_MAX: usize = 64;

/// What was written within the last minute.
#[derive(Debug, Default)]
pub struct Repeats {
    written: Vec<(String, Instant)>,
    left_out: u64,
}

impl Repeats {
    /// Calls `line` with the number of lines left out before it, or counts it as left out.
    pub fn write(&mut self, now: Instant, words: &str, line: impl FnOnce(u64)) {
        self.written.retain(|(_, at)| now < *at + WINDOW);
        if self.written.len() >= LINES_MAX || self.written.iter().any(|(written, _)| written == words) {
            self.left_out += 1;
            return;
        }
        self.written.push((words.to_owned(), now));
        line(std::mem::take(&mut self.left_out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What of these words is written so many seconds after the start, each with the number of lines left out before it.
    fn written(said: impl IntoIterator<Item = (u64, String)>) -> Vec<(u64, String, u64)> {
        let (mut log, start, mut written) = (Repeats::default(), Instant::now(), Vec::new());
        for (second, words) in said {
            log.write(start + Duration::from_secs(second), &words, |left_out| {
                written.push((second, words.clone(), left_out));
            });
        }
        written
    }

    #[test]
    fn what_is_said_each_second_is_written_each_minute_and_other_words_at_once() {
        let other = (30, "b".to_owned());
        let said = (0..=60).map(|second| (second, "a".to_owned())).chain([(61, "a".to_owned())]);
        let mut said: Vec<_> = said.collect();
        said.insert(31, other);
        let seen = written(said);
        assert_eq!(seen, [(0, "a".to_owned(), 0), (30, "b".to_owned(), 30), (60, "a".to_owned(), 29)]);
    }

    #[test]
    fn a_flood_of_different_words_is_counted_and_not_written() {
        let flood = (0..100).map(|number| (0, format!("knock {number}")));
        let seen = written(flood.chain([(60, "later".to_owned())]));
        assert_eq!(seen.len(), LINES_MAX + 1);
        assert_eq!(seen.last(), Some(&(60, "later".to_owned(), 100 - LINES_MAX as u64)));
    }
}
