//! Job: append-only segment files in one directory: what the spool and the journal keep on disk.
//! Input: records with growing indexes; an index up to which to trim. Output: the same records again, byte for byte.
//! Synchronous: every call may wait for the disk.
//! Always true: what was there at a `sync` that succeeded is there after a power cut, or `open` says that it is not; no damaged record is given out.
//!
//! A log is a row of files with consecutive numbers (`file.rs` says what stands in one). There is always at least one, and each says
//! which index came before it: so a log that is empty still knows where it begins (`base`), and a lost file leaves a hole that is seen.

pub mod feed;
mod file;
mod open;
mod writer;

use crate::failpoint;
use file::{HEADER_BYTES, Header, OpenFile, RECORD_HEADER_BYTES, record_header};
pub use open::{Cut, OnDamage, Opened};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The bounds of one log.
#[derive(Debug, Clone, Copy)]
pub struct SegmentLimits {
    /// A file is closed before a record would make it longer; a single record may be longer.
    pub segment_bytes: u64,
    /// Of all files. The feed stops there; `append` itself does not refuse.
    pub total_bytes_max: u64,
    /// The longest payload, written or read.
    pub record_bytes_max: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    #[error("{what} {}: {source}", .path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{what} {}: the disk is full ({source})", .path.display())]
    DiskFull { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is open to others (mode {mode:03o}): it holds key values; run `chmod 700` on it", .path.display())]
    DirTooOpen { path: PathBuf, mode: u32 },
    #[error("{} is in use by another sidecar: give each a data_dir of its own", .path.display())]
    InUse { path: PathBuf },
    #[error("{} is damaged at byte {offset}, and files after it hold newer records", .file.display())]
    Damaged { file: PathBuf, offset: u64 },
    #[error("record {index} does not come after {last}")]
    OutOfOrder { index: u64, last: u64 },
    #[error("a record of {bytes} B is longer than the limit of {bytes_max} B")]
    RecordTooLong { bytes: usize, bytes_max: usize },
    #[error("nothing before record {base} is held, and what follows {index} was asked for")]
    BeforeBase { index: u64, base: u64 },
    #[error("an earlier disk error left {} in doubt: open it again", .path.display())]
    InDoubt { path: PathBuf },
}

impl SegmentError {
    pub fn is_disk_full(&self) -> bool {
        matches!(self, SegmentError::DiskFull { .. })
    }

    /// True if what was written cannot be read any more, now or later. A process without a free descriptor or memory says nothing of its
    /// files.
    pub fn is_damage(&self) -> bool {
        match self {
            SegmentError::Damaged { .. } | SegmentError::BeforeBase { .. } => true,
            SegmentError::Io { source, .. } => {
                let of_the_process = [Errno::MFILE, Errno::NFILE, Errno::NOMEM].map(Errno::raw_os_error);
                !source.raw_os_error().is_some_and(|code| of_the_process.contains(&code))
            }
            SegmentError::DiskFull { .. }
            | SegmentError::DirTooOpen { .. }
            | SegmentError::InUse { .. }
            | SegmentError::OutOfOrder { .. }
            | SegmentError::RecordTooLong { .. }
            | SegmentError::InDoubt { .. } => false,
        }
    }
}

/// Names the step and the file of an I/O error.
pub(crate) fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SegmentError + 'a {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    move |source| match matches!(source.kind(), StorageFull | QuotaExceeded) {
        true => SegmentError::DiskFull { what, path: path.to_owned(), source },
        false => SegmentError::Io { what, path: path.to_owned(), source },
    }
}

/// One file of the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    number: u64,
    after: u64,
    first: Option<u64>,
    /// `after` while there is no record.
    last: u64,
    /// Where its records end.
    bytes: u64,
    padded_bytes: u64,
}

/// The writing end of a log. One for each directory, which it holds locked.
#[derive(Debug)]
pub struct SegmentLog {
    dir: PathBuf,
    limits: SegmentLimits,
    tag: u64,
    /// Never empty. The last one is written to.
    files: VecDeque<Span>,
    active: File,
    /// Records were appended since the last sync.
    unsynced: bool,
    /// A write could not be taken back, or a sync failed: what the kernel still holds is then unknown, and a second sync would lie.
    in_doubt: bool,
    _lock: open::DirLock,
}

impl SegmentLog {
    /// Appends one record, which is durable after the next [`Self::sync`]. After an error nothing of it remains.
    pub fn append(&mut self, index: u64, payload: &[u8]) -> Result<(), SegmentError> {
        self.usable()?;
        if index <= self.last_index() {
            return Err(SegmentError::OutOfOrder { index, last: self.last_index() });
        }
        let bytes_max = self.limits.record_bytes_max;
        let too_long = SegmentError::RecordTooLong { bytes: payload.len(), bytes_max };
        let Ok(length) = u32::try_from(payload.len()) else { return Err(too_long) };
        if payload.len() > bytes_max {
            return Err(too_long);
        }
        let record_bytes = RECORD_HEADER_BYTES + u64::from(length);
        let active = self.files[self.files.len() - 1];
        if active.first.is_some() && active.bytes + record_bytes > active.padded_bytes {
            self.rotate()?;
        }
        let head = record_header(length, index, payload);
        if let Err(error) = write_gathered(&mut self.active, &head, payload) {
            let path = self.active_path();
            self.take_back();
            return Err(failed("writing to", &path)(error));
        }
        if let Some(active) = self.files.back_mut() {
            active.first.get_or_insert(index);
            active.last = index;
            active.bytes += record_bytes;
        }
        self.unsynced = true;
        Ok(())
    }

    /// Makes everything appended so far durable.
    pub fn sync(&mut self) -> Result<(), SegmentError> {
        self.usable()?;
        if self.unsynced {
            if let Err(error) = self.active.sync_data() {
                self.in_doubt = true;
                return Err(failed("syncing", &self.active_path())(error));
            }
            failpoint::reach("segment-synced");
            self.unsynced = false;
        }
        Ok(())
    }

    /// Unlinks the files in which no record is above `through`. The last file goes only if it is at least a quarter full: an idle
    /// log would otherwise make a new file for each record. True if `base` moved.
    pub fn trim(&mut self, through: u64) -> Result<bool, SegmentError> {
        self.usable()?;
        let base = self.base();
        while self.files.len() > 1 && self.files[0].last <= through {
            self.unlink_first()?;
        }
        let active = self.files[self.files.len() - 1];
        if active.last <= through && active.first.is_some() && active.bytes >= self.limits.segment_bytes / 4 {
            // No sync of what goes: after a crash on the way either the old records are there or none.
            self.clear(self.tag, active.last)?;
        }
        Ok(base != self.base())
    }

    /// A [`Self::trim`] to less than this unlinks nothing; `None`: nor does any other.
    pub fn trims_from(&self) -> Option<u64> {
        let first = self.files[0];
        let alone_and_small =
            self.files.len() == 1 && (first.first.is_none() || first.bytes < self.limits.segment_bytes / 4);
        (!alone_and_small).then_some(first.last)
    }

    /// Drops all records; the log goes on after `base`, and its files bear `tag`. After a crash on the way either the old
    /// records are there or none.
    pub fn clear(&mut self, tag: u64, base: u64) -> Result<(), SegmentError> {
        self.usable()?;
        let padded_bytes = self.limits.segment_bytes;
        let number = self.files[self.files.len() - 1].number + 1;
        self.create(Header { number, after: base, tag, padded_bytes, starts_anew: true })?;
        failpoint::reach("segment-cleared");
        self.tag = tag;
        self.unsynced = false;
        while self.files.len() > 1 {
            self.unlink_first()?;
        }
        Ok(())
    }

    /// A reader of what comes after `index`; it needs no lock and may live on another thread.
    pub fn read_after(&self, index: u64) -> SegmentReader {
        SegmentReader::new(&self.dir, self.limits.record_bytes_max, index)
    }

    /// Every record after it that was appended is held.
    pub fn base(&self) -> u64 {
        self.files[0].after
    }

    /// As given to [`Self::clear`]; 0 at first.
    pub fn tag(&self) -> u64 {
        self.tag
    }

    /// The last record's index, or where a log without records begins.
    pub fn last_index(&self) -> u64 {
        self.files[self.files.len() - 1].last
    }

    /// Of all files, without padding.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    fn usable(&self) -> Result<(), SegmentError> {
        if self.in_doubt { Err(SegmentError::InDoubt { path: self.dir.clone() }) } else { Ok(()) }
    }

    fn active_path(&self) -> PathBuf {
        file_path(&self.dir, self.files[self.files.len() - 1].number)
    }

    /// Removes what a failed write left behind the last record.
    fn take_back(&mut self) {
        let Span { bytes, padded_bytes, .. } = self.files[self.files.len() - 1];
        let cut = cut_back(&self.active, bytes, padded_bytes);
        let sought = self.active.seek(SeekFrom::Start(bytes));
        self.in_doubt = cut.is_err() || sought.is_err();
    }

    fn rotate(&mut self) -> Result<(), SegmentError> {
        self.sync()?;
        failpoint::reach("segment-full");
        let Span { number, last, .. } = self.files[self.files.len() - 1];
        let padded_bytes = self.limits.segment_bytes;
        self.create(Header { number: number + 1, after: last, tag: self.tag, padded_bytes, starts_anew: false })?;
        failpoint::reach("segment-rolled");
        Ok(())
    }

    /// Makes the next file and goes on in it.
    fn create(&mut self, header: Header) -> Result<(), SegmentError> {
        let active = create_file(&self.dir, &header)?;
        // It has its name, and records that follow in the file before it would be behind it: there is no way back.
        sync_dir(&self.dir).inspect_err(|_| self.in_doubt = true)?;
        self.active = active;
        let Header { number, after, padded_bytes, .. } = header;
        self.files.push_back(Span { number, after, first: None, last: after, bytes: HEADER_BYTES, padded_bytes });
        Ok(())
    }

    /// One by one, each made durable: a crash must not leave a hole in the row.
    fn unlink_first(&mut self) -> Result<(), SegmentError> {
        let path = file_path(&self.dir, self.files[0].number);
        fs::remove_file(&path).map_err(failed("removing", &path))?;
        failpoint::reach("segment-unlinked");
        self.files.pop_front();
        sync_dir(&self.dir)
    }
}

fn file_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:020}.segment"))
}

/// The file gets its name only when its header is durable, so that a named file without a good header is a damaged one. The name is durable
/// after a [`sync_dir`].
fn create_file(dir: &Path, header: &Header) -> Result<File, SegmentError> {
    let path = file_path(dir, header.number);
    let unnamed = path.with_extension("new");
    let create = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unnamed)?;
        file.write_all(&header.encode())?;
        file.set_len(header.padded_bytes.max(HEADER_BYTES))?;
        file.sync_all()?;
        failpoint::reach("segment-unnamed");
        fs::rename(&unnamed, &path)?;
        Ok(file)
    };
    create().map_err(failed("creating", &path))
}

/// Writes a small file as a whole: it is there with all of `bytes`, or as it was.
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unnamed = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unnamed)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&unnamed, path)?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}

/// As [`write_file`]; on a full disk the file is removed instead, so that it says nothing that is not so any more. False: it was.
pub fn write_file_or_none(path: &Path, bytes: &[u8]) -> Result<bool, SegmentError> {
    match write_file(path, bytes).map_err(failed("writing", path)) {
        Err(error) if error.is_disk_full() => remove_file(path).map(|()| false),
        written => written.map(|()| true),
    }
}

/// Removes a small file for good, if it is there.
pub fn remove_file(path: &Path) -> Result<(), SegmentError> {
    match fs::remove_file(path) {
        Ok(()) => path.parent().map_or(Ok(()), sync_dir),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("removing", path)(error)),
    }
}

/// Makes everything from `bytes` on zeros again.
fn cut_back(file: &File, bytes: u64, padded_bytes: u64) -> io::Result<()> {
    file.set_len(bytes)?;
    file.set_len(padded_bytes.max(bytes))
}

pub fn sync_dir(dir: &Path) -> Result<(), SegmentError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("syncing", dir))
}

fn write_gathered(file: &mut File, head: &[u8], payload: &[u8]) -> io::Result<()> {
    let mut parts = [IoSlice::new(head), IoSlice::new(payload)];
    let mut left = &mut parts[..];
    while left.iter().any(|part| !part.is_empty()) {
        match file.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut left, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads a log's records in order, one file after the other, each once. Goes on where it stopped when more was appended.
#[derive(Debug)]
pub struct SegmentReader {
    dir: PathBuf,
    record_bytes_max: usize,
    file: Option<OpenFile>,
    after: u64,
}

impl SegmentReader {
    fn new(dir: &Path, record_bytes_max: usize, after: u64) -> Self {
        Self { dir: dir.to_owned(), record_bytes_max, file: None, after }
    }

    /// Reads the next record into `payload` and returns its index; `None` once the record `through` was read. `through` must be in
    /// the files already: a record that should be there and is not is an error.
    pub fn next(&mut self, through: u64, payload: &mut Vec<u8>) -> Result<Option<u64>, SegmentError> {
        let mut reread = false;
        while self.after < through {
            let mut file = match self.file.take() {
                Some(file) => file,
                None => self.find()?,
            };
            let path = file_path(&self.dir, file.header.number);
            let read = file.next(payload, self.record_bytes_max).map_err(failed("reading", &path))?;
            if let Some(index) = read {
                self.file = Some(file);
                reread = false;
                if index > self.after {
                    self.after = index;
                    return Ok(Some(index));
                }
            } else if !reread {
                file.reread().map_err(failed("reading", &path))?;
                self.file = Some(file);
                reread = true;
            } else {
                self.file = Some(self.following(&file)?);
                reread = false;
            }
        }
        Ok(None)
    }

    /// The last file that begins at or before `after`.
    fn find(&self) -> Result<OpenFile, SegmentError> {
        let mut base = None;
        for number in open::numbers(&self.dir)?.into_iter().rev() {
            let path = file_path(&self.dir, number);
            let opened = OpenFile::open(&path).map_err(failed("reading", &path))?;
            let file = opened.ok_or(SegmentError::Damaged { file: path, offset: 0 })?;
            if file.header.after <= self.after {
                return Ok(file);
            }
            base = Some(file.header.after);
        }
        Err(SegmentError::BeforeBase { index: self.after, base: base.unwrap_or(self.after) })
    }

    fn following(&self, file: &OpenFile) -> Result<OpenFile, SegmentError> {
        let damaged = SegmentError::Damaged { file: file_path(&self.dir, file.header.number), offset: file.offset };
        let next = file_path(&self.dir, file.header.number + 1);
        match OpenFile::open(&next) {
            Ok(Some(next)) if next.header.after == file.last => Ok(next),
            Ok(_) => Err(damaged),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged),
            Err(error) => Err(failed("reading", &next)(error)),
        }
    }
}

#[cfg(test)]
mod tests;
