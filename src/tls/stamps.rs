//! Job: which files need not be read again, since they are the ones that were read last.
//! Input: paths. Output: whether to read.
//! Edge: asks the file system, reads no file.
//! Always true: a file that changed is read at the next look, or within a minute where its file system's times do not tell.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A certificate can end, and a file system may keep time by another clock: so often they are read whatever is seen of them.
const READ_EVERY: Duration = Duration::from_secs(60);
/// A file that changed within this may change again without another time: the kernel's clock of files moves in steps.
const YOUNG: Duration = Duration::from_secs(2);

/// Of the file that a path leads to, also through links. Whatever is written or set, the kernel sets the last one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Since the epoch.
    changed: Duration,
}

impl Stamp {
    /// `None`: there is no such file, or it cannot be looked at.
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        let seconds = u64::try_from(found.ctime()).ok()?;
        let changed = Duration::new(seconds, u32::try_from(found.ctime_nsec()).ok()?);
        Some(Self { device: found.dev(), inode: found.ino(), bytes: found.size(), changed })
    }

    fn is_young(&self, now: Duration) -> bool {
        now.abs_diff(self.changed) < YOUNG
    }
}

/// What was seen of some files when they were to be read last.
#[derive(Debug)]
pub(super) struct Stamps {
    paths: Vec<PathBuf>,
    /// `None`: not all of them could be told from what follows.
    seen: Option<Vec<Stamp>>,
    read_at: Option<Instant>,
}

impl Stamps {
    pub(super) fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, seen: None, read_at: None }
    }

    /// True if the files are to be read now. What is seen is remembered before they are.
    pub(super) fn ask_to_read(&mut self) -> bool {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.ask_to_read_at(wall, Instant::now())
    }

    fn ask_to_read_at(&mut self, wall: Duration, now: Instant) -> bool {
        let found: Option<Vec<Stamp>> = self.paths.iter().map(|path| Stamp::of(path)).collect();
        let lately = self.read_at.is_some_and(|at| now.saturating_duration_since(at) < READ_EVERY);
        if lately && found.is_some() && found == self.seen {
            return false;
        }
        self.seen = found.filter(|stamps| !stamps.iter().any(|stamp| stamp.is_young(wall)));
        self.read_at = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const LATER: Duration = Duration::from_secs(5);

    /// Two files, and what is asked of them as if they had been made some seconds ago.
    fn place() -> (TempDir, Stamps, Duration, Instant) {
        let dir = TempDir::new().unwrap_or_else(|error| panic!("{error}"));
        let paths = ["ca.pem", "own.pem"].map(|name| dir.path().join(name));
        paths.iter().for_each(|path| write(path, "one"));
        let stamps = Stamps::new(paths.to_vec());
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        (dir, stamps, wall + LATER, Instant::now())
    }

    fn write(path: &Path, text: &str) {
        fs::write(path, text).unwrap_or_else(|error| panic!("{error}"));
    }

    #[test]
    fn files_that_stand_are_read_once_and_again_after_a_minute() {
        let (_dir, mut stamps, wall, now) = place();
        let mut ask = |after| stamps.ask_to_read_at(wall + after, now + after);
        let asked = [0, 2, 4, 59, 60, 62, 119, 120].map(|seconds| ask(Duration::from_secs(seconds)));
        assert_eq!(asked, [true, false, false, false, true, false, false, true]);
    }

    #[test]
    fn a_file_that_is_written_replaced_linked_or_gone_is_read_at_the_next_look() {
        let (dir, mut stamps, wall, now) = place();
        let own = dir.path().join("own.pem");
        let steps: [&dyn Fn(); 5] = [
            &|| write(&own, "longer"),
            &|| {
                let new = dir.path().join("new");
                write(&new, "second");
                fs::rename(new, &own).unwrap_or_else(|error| panic!("{error}"));
            },
            &|| {
                let before = Stamp::of(&own);
                // The kernel's clock of files moves in steps.
                while Stamp::of(&own) == before {
                    write(&own, "likely");
                }
            },
            &|| {
                fs::remove_file(&own).unwrap_or_else(|error| panic!("{error}"));
                std::os::unix::fs::symlink("ca.pem", &own).unwrap_or_else(|error| panic!("{error}"));
            },
            &|| fs::remove_file(&own).unwrap_or_else(|error| panic!("{error}")),
        ];
        stamps.ask_to_read_at(wall, now);
        for (at, step) in steps.into_iter().enumerate() {
            assert!(!stamps.ask_to_read_at(wall, now), "before step {at}");
            step();
            assert!(stamps.ask_to_read_at(wall, now), "after step {at}");
        }
        assert!(stamps.ask_to_read_at(wall, now), "what is not there may come at any time");
    }

    #[test]
    fn a_file_that_has_just_changed_is_read_again() {
        let (_dir, mut stamps, wall, now) = place();
        let just = wall - LATER;
        assert_eq!([just, just, wall, wall].map(|wall| stamps.ask_to_read_at(wall, now)), [true, true, true, false]);
    }
}
