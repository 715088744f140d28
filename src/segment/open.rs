//! Job: opens a log after whatever happened to it: makes the directory, reads everything, cuts or sets aside what is damaged.
//! Input: a directory. Output: a `SegmentLog`, and what was wrong.
//! Synchronous: reads every file of the log once.
//! Always true: what is damaged is reported; good records before it are kept; records after a hole are never used.

use super::file::{HEADER_BYTES, Header, OpenFile, Scanned, scan};
use super::{SegmentError, SegmentLimits, SegmentLog, Span, create_file, cut_back, failed, file_path, sync_dir};
use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// How many sets of damaged files are kept for an expert to look at.
const SET_ASIDE_MAX: usize = 2;
const SET_ASIDE_PREFIX: &str = "damaged-";

/// What to do about damage before the last file, where newer records stand behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDamage {
    /// Return [`SegmentError::Damaged`].
    Refuse,
    /// Move everything from the damage on into a folder of its own, and open what is before it.
    SetAside,
}

/// What `open` found wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Opened {
    /// Rubbish behind the last good record of a file, which is gone now: after a crash a half-written record, at worst synced ones.
    pub cuts: Vec<Cut>,
    /// Where the damaged part is kept, see [`OnDamage::SetAside`].
    pub set_aside: Option<PathBuf>,
}

impl Opened {
    /// Tells the operator what opening had to cut or set aside. `what`: spool or journal.
    pub fn log(&self, link: &crate::model::LinkName, what: &str) {
        for cut in &self.cuts {
            tracing::warn!(%link, what, file = %cut.file.display(), offset = cut.offset, bytes = cut.bytes,
                "a half-written record was cut off, as after a crash");
        }
        if let Some(kept) = &self.set_aside {
            tracing::error!(%link, what, kept = %kept.display(), "a damaged part was set aside; what it held is fetched again");
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    pub file: PathBuf,
    pub offset: u64,
    /// 0: the file was too short, and nothing stood behind its last good record.
    pub bytes: u64,
}

/// Where the row of good files ends early.
struct Damage {
    number: u64,
    offset: u64,
}

impl SegmentLog {
    /// Opens the log in `dir`, or makes one. `visit` is shown every record that is good. A directory that others may enter is refused.
    pub fn open(
        dir: &Path,
        limits: SegmentLimits,
        on_damage: OnDamage,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(Self, Opened), SegmentError> {
        make_private_dir(dir)?;
        let lock = lock(dir)?;
        remove_unnamed(dir)?;
        let mut opened = Opened::default();
        let (files, tag, damage) = read_row(dir, &limits, visit, &mut opened)?;
        if let Some(damage) = damage {
            let file = file_path(dir, damage.number);
            if on_damage == OnDamage::Refuse {
                return Err(SegmentError::Damaged { file, offset: damage.offset });
            }
            opened.set_aside = Some(set_aside(dir, &damage)?);
        }
        for cut in &opened.cuts {
            mend(cut, &files, dir)?;
        }
        let (files, active) = open_last(dir, &limits, files, tag)?;
        let log =
            Self { dir: dir.to_owned(), limits, tag, files, active, unsynced: false, in_doubt: false, _lock: lock };
        Ok((log, opened))
    }
}

fn make_private_dir(dir: &Path) -> Result<(), SegmentError> {
    match fs::metadata(dir) {
        Ok(found) => {
            let mode = found.permissions().mode() & 0o777;
            if mode & 0o077 != 0 { Err(SegmentError::DirTooOpen { path: dir.to_owned(), mode }) } else { Ok(()) }
        }
        Err(_) => {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700).create(dir).map_err(failed("creating", dir))?;
            dir.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(Ok(()), sync_dir)
        }
    }
}

/// Gives a directory free when it is dropped. By an explicit unlock: a process that is just being started holds a copy of the
/// descriptor for a moment, and with it the lock.
#[derive(Debug)]
pub(super) struct DirLock(pub(super) File);

impl Drop for DirLock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::debug!(%error, "a directory's lock goes with its descriptor");
        }
    }
}

fn lock(dir: &Path) -> Result<DirLock, SegmentError> {
    let path = dir.join("lock");
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = opened.map_err(failed("opening", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(DirLock(file)),
        Err(TryLockError::WouldBlock) => Err(SegmentError::InUse { path: dir.to_owned() }),
        Err(TryLockError::Error(error)) => Err(failed("locking", &path)(error)),
    }
}

/// The numbers of the files in `dir`, ascending.
pub fn numbers(dir: &Path) -> Result<Vec<u64>, SegmentError> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed("listing", dir))? {
        let name = entry.map_err(failed("listing", dir))?.file_name();
        let number =
            name.to_str().and_then(|name| name.strip_suffix(".segment")).and_then(|digits| digits.parse().ok());
        numbers.extend(number.filter(|number| file_path(dir, *number).ends_with(&name)));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// A file that did not get its name yet holds nothing.
fn remove_unnamed(dir: &Path) -> Result<(), SegmentError> {
    for entry in fs::read_dir(dir).map_err(failed("listing", dir))? {
        let path = entry.map_err(failed("listing", dir))?.path();
        if path.extension().is_some_and(|extension| extension == "new") {
            fs::remove_file(&path).map_err(failed("removing", &path))?;
        }
    }
    Ok(())
}

/// Reads the files in order as far as they follow on each other.
fn read_row(
    dir: &Path,
    limits: &SegmentLimits,
    visit: &mut dyn FnMut(u64, &[u8]),
    opened: &mut Opened,
) -> Result<(VecDeque<Span>, u64, Option<Damage>), SegmentError> {
    let numbers = unlink_void(dir, numbers(dir)?)?;
    let mut files: VecDeque<Span> = VecDeque::new();
    let mut tag = 0;
    for (at, &number) in numbers.iter().enumerate() {
        let path = file_path(dir, number);
        let file = OpenFile::open(&path).map_err(failed("reading", &path))?;
        let Some(file) = file.filter(|file| file.header.number == number) else {
            if at + 1 < numbers.len() {
                return Ok((files, tag, Some(Damage { number, offset: 0 })));
            }
            let bytes = fs::metadata(&path).map_err(failed("reading", &path))?.len();
            opened.cuts.push(Cut { file: path, offset: 0, bytes });
            break;
        };
        let Header { after, padded_bytes, .. } = file.header;
        if let Some(before) = files.back().filter(|before| before.number + 1 != number || before.last != after) {
            // The records between are missing, and this file's come after them.
            let damage = Damage { number: before.number, offset: before.bytes };
            opened.cuts.retain(|cut| cut.file != file_path(dir, before.number));
            return Ok((files, tag, Some(damage)));
        }
        tag = file.header.tag;
        let scanned = scan(file, limits.record_bytes_max, visit).map_err(failed("reading", &path))?;
        let Scanned { first, last, end, rubbish } = scanned;
        opened.cuts.extend(rubbish.map(|bytes| Cut { file: path, offset: end, bytes }));
        files.push_back(Span { number, after, first, last, bytes: end, padded_bytes });
    }
    Ok((files, tag, None))
}

/// Finishes a `clear` that a crash interrupted.
fn unlink_void(dir: &Path, numbers: Vec<u64>) -> Result<Vec<u64>, SegmentError> {
    let mut kept = Vec::new();
    for number in numbers {
        let path = file_path(dir, number);
        let file = OpenFile::open(&path).map_err(failed("reading", &path))?;
        if file.is_some_and(|file| file.header.starts_anew) && !kept.is_empty() {
            for void in kept.drain(..) {
                let path = file_path(dir, void);
                fs::remove_file(&path).map_err(failed("removing", &path))?;
            }
            sync_dir(dir)?;
        }
        kept.push(number);
    }
    Ok(kept)
}

/// Makes a file end with its last good record. One without a good header goes altogether.
fn mend(cut: &Cut, files: &VecDeque<Span>, dir: &Path) -> Result<(), SegmentError> {
    let Some(good) = files.iter().find(|good| file_path(dir, good.number) == cut.file) else {
        fs::remove_file(&cut.file).map_err(failed("removing", &cut.file))?;
        return sync_dir(dir);
    };
    let file = OpenOptions::new().write(true).open(&cut.file).map_err(failed("opening", &cut.file))?;
    cut_back(&file, good.bytes, good.padded_bytes).and_then(|()| file.sync_all()).map_err(failed("cutting", &cut.file))
}

/// Moves everything from the damage on into `damaged-<unix ms>`, of which the newest are kept.
fn set_aside(dir: &Path, damage: &Damage) -> Result<PathBuf, SegmentError> {
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let aside = dir.join(format!("{SET_ASIDE_PREFIX}{unix_ms:015}"));
    DirBuilder::new().recursive(true).mode(0o700).create(&aside).map_err(failed("creating", &aside))?;
    for number in numbers(dir)?.into_iter().rev().filter(|number| *number >= damage.number) {
        let (from, to) = (file_path(dir, number), file_path(&aside, number));
        if number > damage.number || damage.offset < HEADER_BYTES {
            fs::rename(&from, &to).map_err(failed("moving", &from))?;
            continue;
        }
        fs::copy(&from, &to).map_err(failed("copying", &from))?;
        let file = OpenOptions::new().write(true).open(&from).map_err(failed("opening", &from))?;
        let bytes = file.metadata().map_err(failed("reading", &from))?.len();
        cut_back(&file, damage.offset, bytes).and_then(|()| file.sync_all()).map_err(failed("cutting", &from))?;
    }
    sync_dir(&aside)?;
    sync_dir(dir)?;
    remove_old_asides(dir)?;
    Ok(aside)
}

fn remove_old_asides(dir: &Path) -> Result<(), SegmentError> {
    let mut asides: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed("listing", dir))? {
        let entry = entry.map_err(failed("listing", dir))?;
        asides.extend(entry.file_name().to_string_lossy().starts_with(SET_ASIDE_PREFIX).then(|| entry.path()));
    }
    asides.sort();
    for old in &asides[..asides.len().saturating_sub(SET_ASIDE_MAX)] {
        fs::remove_dir_all(old).map_err(failed("removing", old))?;
    }
    Ok(())
}

/// Opens the last good file for writing, or makes the first one.
fn open_last(
    dir: &Path,
    limits: &SegmentLimits,
    mut files: VecDeque<Span>,
    tag: u64,
) -> Result<(VecDeque<Span>, File), SegmentError> {
    if let Some(last) = files.back() {
        let path = file_path(dir, last.number);
        let mut file = OpenOptions::new().write(true).open(&path).map_err(failed("opening", &path))?;
        // Whoever wrote the last records may have ended before they were synced; files before the last one were synced when it was begun.
        file.sync_data().map_err(failed("syncing", &path))?;
        file.seek(SeekFrom::Start(last.bytes)).map_err(failed("opening", &path))?;
        return Ok((files, file));
    }
    let header = Header { number: 1, after: 0, tag, padded_bytes: limits.segment_bytes, starts_anew: true };
    let file = create_file(dir, &header)?;
    sync_dir(dir)?;
    let Header { number, after, padded_bytes, .. } = header;
    files.push_back(Span { number, after, first: None, last: after, bytes: HEADER_BYTES, padded_bytes });
    Ok((files, file))
}
