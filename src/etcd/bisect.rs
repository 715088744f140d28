//! Job: find the largest number that is still taken, in few questions.
//! Input: which numbers were taken and which refused. Output: the next number to ask about; in the end the largest one.
//! Pure: no clock, no I/O.
//! Always true: what etcd has by default takes two questions; whatever it has, `QUESTIONS_MAX` are enough.

/// etcd's default for `--max-txn-ops`.
const USUAL: u64 = 128;
/// Above the default it is first asked about these. More operations than the last are enough for anything.
const LADDER: [u64; 2] = [1_024, MOST];
/// The question about so many operations has a few hundred kilobytes.
pub const MOST: u64 = 8_192;
#[cfg(test)]
const QUESTIONS_MAX: usize = 17;

/// A number above 0: everything up to it is taken, and everything above it refused.
#[derive(Debug, Clone, Copy)]
pub struct Bisect {
    taken: u64,
    refused: Option<u64>,
}

impl Bisect {
    pub fn new() -> Self {
        Self { taken: 0, refused: None }
    }

    /// `None`: nothing is left to be asked.
    pub fn question(&self) -> Option<u64> {
        match self.refused {
            None if self.taken == 0 => Some(USUAL),
            None if self.taken == USUAL => Some(USUAL + 1),
            None => LADDER.into_iter().find(|step| *step > self.taken),
            Some(refused) if refused - self.taken > 1 => Some(self.taken + (refused - self.taken) / 2),
            Some(_) => None,
        }
    }

    pub fn answered(&mut self, asked: u64, taken: bool) {
        if taken {
            self.taken = self.taken.max(asked);
        } else {
            self.refused = Some(self.refused.map_or(asked, |refused| refused.min(asked)));
        }
    }

    /// The largest number that was taken: [`MOST`] where no larger one is asked about.
    pub fn largest(&self) -> u64 {
        self.taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(limit: u64) -> (u64, usize) {
        let (mut search, mut questions) = (Bisect::new(), 0);
        while let Some(asked) = search.question() {
            search.answered(asked, asked <= limit);
            questions += 1;
            assert!(questions <= QUESTIONS_MAX, "at {limit}");
        }
        (search.largest(), questions)
    }

    #[test]
    fn every_limit_is_found_to_the_last_one_and_the_usual_one_in_two_questions() {
        for limit in 1..=MOST {
            assert_eq!(found(limit).0, limit);
        }
        assert_eq!(found(USUAL), (USUAL, 2));
    }

    #[test]
    fn what_takes_more_than_is_asked_about_is_not_asked_for_ever() {
        assert_eq!(found(u64::MAX), (MOST, 4));
        assert!(found(0).0 == 0);
    }
}
