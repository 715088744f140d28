//! Job: what the dedupe log keeps on disk: one entry for each revision, and up to which all are done. The only file that knows sled.
//! Input: notes about seqs, from one thread. Output: what was kept, at start.
//! Always true: an entry is believed only if a checksum of ours says that it is what was written: of 150 flipped bits sled missed 16. What is
//! synced is on the disk: sled's `flush` never calls fsync, so `sync_data` on its `db` file follows. Any of it may panic.

use super::{Noted, Opened};
use crate::model::{Digest, Epoch, Revision, Seq};
use crate::replica::poison::SeqState;
use std::fs::File;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Entries that are kept, and how old they may be: twice what admission remembers. sled holds about half a kilobyte of memory for each.
const ENTRIES_MAX: u64 = 2 * crate::replica::admit::RECENTS_MAX as u64;
const AGE_MS_MAX: u64 = 24 * 3600 * 1000;
/// Entries that `open` returns.
pub(super) const RECENT_MAX: usize = 4096;
/// Entries of one trim: larger ones cost sled hundreds of megabytes.
const TRIM_BATCH: usize = 64;
const CACHE_BYTES: u64 = 8 << 20;
/// Holds the epoch and seq up to which everything is done. Always there, and shorter than every other key.
const DONE_KEY: &[u8] = b"done";

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// sled itself. Every function may panic.
pub(super) struct Db {
    pub(super) db: sled::Db,
    /// sled's own file, for the fsync that sled leaves out.
    file: File,
    pub(super) entries: u64,
    /// Since the last trim.
    written: usize,
    pub(super) entries_max: u64,
    pub(super) age_ms_max: u64,
    pub(super) done: (Epoch, Seq),
}

/// What is kept of a revision: digest 16, revision u64, noted_ms u64, state 2, crc32c of key and these u32.
pub(super) struct Entry {
    digest: Digest,
    revision: Revision,
    noted_ms: u64,
    state: SeqState,
}

impl Db {
    pub(super) fn open(dir: &Path) -> Result<(Self, Opened), String> {
        let is_new = !dir.join("db").exists();
        let config = sled::Config::new().path(dir).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        let db = config.open().map_err(|error| error.to_string())?;
        let file = File::open(dir.join("db")).map_err(|error| error.to_string())?;
        let done = match db.get(DONE_KEY).map_err(|error| error.to_string())? {
            Some(key) => read_key(&key).ok_or("a malformed value")?,
            // sled opens what it cannot understand as if nothing had been in it.
            None if !is_new => return Err("what it held is gone".to_owned()),
            None => (Epoch(0), Seq(0)),
        };
        let (mut recent, mut entries, mut failed) = (Vec::new(), 0, None);
        for pair in db.iter().rev() {
            let (key, value) = pair.map_err(|error| error.to_string())?;
            if key == DONE_KEY {
                continue;
            }
            entries += 1;
            let entry = Entry::read(&key, &value).ok_or("a value whose checksum is wrong")?;
            let (epoch, seq) = read_key(&key).ok_or("a malformed key")?;
            if let (SeqState::Failed { refusals }, None, true) = (entry.state, failed, (epoch, seq) > done) {
                failed = Some((epoch, seq, refusals));
            }
            if recent.len() < RECENT_MAX {
                recent.push((epoch, seq, entry.digest));
            }
        }
        recent.reverse();
        db.insert(DONE_KEY, write_key(done.0, done.1).to_vec()).map_err(|error| error.to_string())?;
        let mut db = Self { db, file, entries, written: 0, entries_max: ENTRIES_MAX, age_ms_max: AGE_MS_MAX, done };
        db.sync()?;
        for path in [dir.join("conf"), dir.to_owned()] {
            File::open(path).and_then(|file| file.sync_all()).map_err(|error| error.to_string())?;
        }
        Ok((db, Opened { recent, failed, moved_aside: false }))
    }

    pub(super) fn note(&mut self, epoch: Epoch, revisions: &[Noted]) -> Result<(), String> {
        let noted_ms = now_ms();
        for (seq, digest, revision) in revisions {
            let key = write_key(epoch, *seq);
            let entry = Entry { digest: *digest, revision: *revision, noted_ms, state: SeqState::Pending };
            let value = entry.write(&key);
            let before = self.db.insert(key, value).map_err(|error| error.to_string())?;
            self.entries += u64::from(before.is_none());
        }
        self.written += revisions.len();
        Ok(())
    }

    /// One that was trimmed, or never noted, has no state any more.
    pub(super) fn state(&mut self, epoch: Epoch, seq: Seq, state: SeqState) -> Result<(), String> {
        let key = write_key(epoch, seq);
        let Some(value) = self.db.get(key).map_err(|error| error.to_string())? else { return Ok(()) };
        let entry = Entry::read(&key, &value).ok_or("a value whose checksum is wrong")?;
        if entry.state.may_become(state) {
            let value = Entry { state, ..entry }.write(&key);
            self.db.insert(key, value).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    pub(super) fn done_through(&mut self, epoch: Epoch, seq: Seq) -> Result<(), String> {
        if self.done < (epoch, seq) {
            self.done = (epoch, seq);
            self.db.insert(DONE_KEY, write_key(epoch, seq).to_vec()).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    pub(super) fn sync(&mut self) -> Result<(), String> {
        self.db.flush().map_err(|error| error.to_string())?;
        self.file.sync_data().map_err(|error| error.to_string())
    }

    /// Removes the oldest entries that are done, about as many as were written since the last time: those beyond the count, and those
    /// beyond the age. What is not done stays until there are twice as many.
    pub(super) fn trim(&mut self) -> Result<(), String> {
        let most = std::mem::take(&mut self.written) + TRIM_BATCH;
        let old_ms = now_ms().saturating_sub(self.age_ms_max);
        let mut removed = 0;
        while removed < most {
            let mut batch = sled::Batch::default();
            let mut batched = 0;
            for pair in self.db.iter().take(TRIM_BATCH) {
                let (key, value) = pair.map_err(|error| error.to_string())?;
                if key == DONE_KEY {
                    continue;
                }
                let entry = Entry::read(&key, &value).ok_or("a value whose checksum is wrong")?;
                let done = read_key(&key).is_some_and(|key| key <= self.done);
                let count = self.entries - batched;
                let surplus = count > self.entries_max && (done || count > self.entries_max * 2);
                let old = done && entry.noted_ms < old_ms;
                if surplus || old {
                    batch.remove(key);
                    batched += 1;
                } else {
                    break;
                }
            }
            if batched == 0 {
                break;
            }
            self.db.apply_batch(batch).map_err(|error| error.to_string())?;
            self.entries -= batched;
            removed += TRIM_BATCH;
        }
        Ok(())
    }
}

impl Entry {
    fn write(&self, key: &[u8]) -> Vec<u8> {
        let mut value = self.digest.0.to_vec();
        value.extend(self.revision.0.to_le_bytes());
        value.extend(self.noted_ms.to_le_bytes());
        value.extend(self.state.to_bytes());
        value.extend(crc32c::crc32c_append(crc32c::crc32c(key), &value).to_le_bytes());
        value
    }

    pub(super) fn read(key: &[u8], value: &[u8]) -> Option<Self> {
        let (checked, crc) = value.split_at_checked(34)?;
        if crc32c::crc32c_append(crc32c::crc32c(key), checked).to_le_bytes() != crc {
            return None;
        }
        let number = |at: usize| Some(u64::from_le_bytes(checked.get(at..at + 8)?.try_into().ok()?));
        let digest = Digest(checked.get(..16)?.try_into().ok()?);
        let state = SeqState::from_bytes(checked.get(32..)?.try_into().ok()?)?;
        Some(Self { digest, revision: Revision(number(16)?), noted_ms: number(24)?, state })
    }
}

/// Big-endian, so that sled's order is that of (epoch, seq).
fn write_key(epoch: Epoch, seq: Seq) -> [u8; 16] {
    ((u128::from(epoch.0) << 64) | u128::from(seq.0)).to_be_bytes()
}

pub(super) fn read_key(key: &[u8]) -> Option<(Epoch, Seq)> {
    let (epoch, seq) = key.split_at_checked(8)?;
    Some((Epoch(u64::from_be_bytes(epoch.try_into().ok()?)), Seq(u64::from_be_bytes(seq.try_into().ok()?))))
}
