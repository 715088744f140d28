//! Job: ranges that a hello named, kept across restarts.
//! Input: a path, a hello's ranges. Output: the ranges, or why they cannot be had.
//! Edge: reads and writes one small file.
//! Always true: what is given out was stored whole; damage is seen.

use crate::model::{KeyRange, Ranges};
use crate::wire::digest;
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Ranges that a hello named; kept across restarts.
pub struct RangesFile {
    path: PathBuf,
    stored: Mutex<Option<Ranges>>,
}

/// Why the stored ranges of a link cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RangesError {
    #[error("{} does not hold ranges: remove it, and the next hello's are stored", path.display())]
    Malformed { path: PathBuf },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

impl RangesFile {
    pub fn open(path: PathBuf) -> Result<Self, RangesError> {
        let stored = match std::fs::read(&path) {
            Ok(bytes) => Some(ranges_from(&bytes).ok_or_else(|| RangesError::Malformed { path: path.clone() })?),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => return Err(RangesError::Io { path, source }),
        };
        Ok(Self { path, stored: Mutex::new(stored) })
    }

    /// One that cannot be read, or is damaged, is as good as none: the next hello says it again.
    pub fn open_or_forget(path: PathBuf) -> Self {
        Self::open(path.clone()).unwrap_or_else(|error| {
            tracing::warn!(%error, "what the link carries is not known any more until the next hello");
            Self { path, stored: Mutex::default() }
        })
    }

    pub fn get(&self) -> Option<Ranges> {
        guard(&self.stored).clone()
    }

    pub(super) fn put(&self, ranges: &Ranges) -> std::io::Result<()> {
        if guard(&self.stored).as_ref() == Some(ranges) {
            return Ok(());
        }
        let pieces: Vec<(String, String)> = ranges.pieces().iter().map(|p| (hex(&p.from), hex(&p.to))).collect();
        // With their digest, so that damage is seen.
        let json = serde_json::to_vec(&(pieces, digest::of_ranges(ranges).to_string()))?;
        crate::segment::write_file(&self.path, &json)?;
        *guard(&self.stored) = Some(ranges.clone());
        Ok(())
    }
}

fn ranges_from(json: &[u8]) -> Option<Ranges> {
    let (pieces, seal) = serde_json::from_slice::<(Vec<(String, String)>, String)>(json).ok()?;
    let piece = |(from, to): (String, String)| Some(KeyRange { from: unhex(&from)?, to: unhex(&to)? });
    let ranges = Ranges::from_pieces(pieces.into_iter().map(piece).collect::<Option<Vec<KeyRange>>>()?)?;
    (seal == digest::of_ranges(&ranges).to_string()).then_some(ranges)
}

pub(super) fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For messages and files.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<Bytes> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok())
        .collect::<Option<Vec<u8>>>()
        .map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_link_carries_is_kept_and_forgotten_where_a_bit_of_it_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("carried.json");
        let file = RangesFile::open_or_forget(path.clone());
        assert_eq!(file.get(), None);
        for exclude in [&[][..], &["/app/local/".into()]] {
            let ranges = Ranges::new(&["/app/".into()], exclude);
            file.put(&ranges).unwrap();
            assert_eq!(RangesFile::open_or_forget(path.clone()).get(), Some(ranges));
        }
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            let read = RangesFile::open_or_forget(path.clone()).get();
            assert!(read.is_none() || read == file.get(), "byte {at}");
            // What an origin may touch is no guess.
            let opened = RangesFile::open(path.clone());
            assert!(opened.is_err() || read == file.get(), "byte {at}");
        }
    }
}
