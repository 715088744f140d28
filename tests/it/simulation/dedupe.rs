//! Job: a replica's dedupe log, stepped: the product's own on files, or a model of what those hold.
//! Input: notes of revisions, how far all are done, syncs, crashes, a lost disk. Output: at a start, what is remembered; a `Fault` where the
//! files do not give back just what was synced.
//! Synchronous: the log's thread is waited for.
//! Always true: after a crash there is what was synced, and nothing of what was not.
//!
//! What the product's thread gathers until the next sync waits here: a thread cannot be killed. Files are for some of the seeds only, since a
//! start means to open sled, and 2,000 seeds have thousands of starts; in the others the model stands for them, which they are held against.

use super::judge::Fault;
use etcd_ferry::model::{Digest, Epoch, Revision, Seq};
use etcd_ferry::replica::dedupe::{Dedupe, DedupeError, Opened};
use etcd_ferry::replica::journal::JournalEntry;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use tokio::runtime::{Builder, Runtime};

pub type Noted = (Seq, Digest, Revision);
pub type Remembered = (Epoch, Seq, Digest);

/// What the log is told of revisions that are in the journal.
pub fn notes_of(entries: &[JournalEntry]) -> Vec<Noted> {
    entries.iter().map(|entry| (entry.seq, entry.digest, entry.revision.revision)).collect()
}

pub struct DedupeLog {
    /// `None`: modelled.
    files: Option<Files>,
    /// What is not synced.
    gathered: Vec<(Epoch, Vec<Noted>)>,
    done: Option<(Epoch, Seq)>,
    /// What is synced.
    kept: BTreeMap<(Epoch, Seq), Digest>,
}

impl DedupeLog {
    pub fn new(dir: PathBuf, on_files: bool) -> Self {
        let files = on_files.then(|| Files::new(dir));
        Self { files, gathered: Vec::new(), done: None, kept: BTreeMap::new() }
    }

    pub fn is_on_files(&self) -> bool {
        self.files.is_some()
    }

    pub fn note(&mut self, epoch: Epoch, revisions: Vec<Noted>) {
        self.gathered.push((epoch, revisions));
    }

    pub fn done_through(&mut self, epoch: Epoch, seq: Seq) {
        self.done = self.done.max(Some((epoch, seq)));
    }

    pub fn sync(&mut self) {
        let (gathered, done) = (std::mem::take(&mut self.gathered), self.done.take());
        for (epoch, revisions) in &gathered {
            self.kept.extend(revisions.iter().map(|(seq, digest, _)| ((*epoch, *seq), *digest)));
        }
        if let Some(files) = &mut self.files
            && !(gathered.is_empty() && done.is_none())
        {
            files.write(gathered, done);
        }
    }

    /// The process dies and starts again: what it remembers then.
    pub fn restart(&mut self) -> Result<Vec<Remembered>, Fault> {
        self.gathered.clear();
        self.done = None;
        let kept: Vec<Remembered> = self.kept.iter().map(|((epoch, seq), digest)| (*epoch, *seq, *digest)).collect();
        let Some(files) = &mut self.files else { return Ok(kept) };
        let opened = files.restart();
        if opened.recent == kept && opened.failed.is_none() && !opened.moved_aside {
            return Ok(opened.recent);
        }
        Err(Fault::new("once", difference(&kept, &opened)))
    }

    /// The disk is new: nothing is left.
    pub fn lose(&mut self) {
        self.kept.clear();
        if let Some(files) = &mut self.files {
            files.lose();
        }
    }
}

fn difference(kept: &[Remembered], opened: &Opened) -> String {
    let Opened { recent, failed, moved_aside } = opened;
    let at = kept.iter().zip(recent).take_while(|(kept, found)| kept == found).count();
    format!(
        "the dedupe log gives back {} entries of {}, first another one {:?} for {:?}; failed: {failed:?}, moved aside: {moved_aside}",
        recent.len(),
        kept.len(),
        recent.get(at),
        kept.get(at)
    )
}

/// The product's log.
struct Files {
    dir: PathBuf,
    /// Each start has a folder of its own: threads of sled's may hold the last one's lock for a moment longer.
    starts: u64,
    runtime: Runtime,
    /// `None`: nothing was written since the last start that found nothing.
    log: Option<Dedupe>,
}

impl Files {
    fn new(dir: PathBuf) -> Self {
        fs::create_dir_all(&dir).expect("the disk takes a folder");
        let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
        Self { dir, starts: 0, runtime, log: None }
    }

    fn path(&self) -> PathBuf {
        self.dir.join(self.starts.to_string())
    }

    fn open(&self) -> (Dedupe, Opened) {
        self.runtime.block_on(Dedupe::open(&self.path())).expect("the dedupe log opens")
    }

    /// Synced with the next end of the log at the latest.
    fn write(&mut self, gathered: Vec<(Epoch, Vec<Noted>)>, done: Option<(Epoch, Seq)>) {
        if self.log.is_none() {
            let (log, _) = self.open();
            self.log = Some(log);
        }
        let Some(log) = &self.log else { return };
        for (epoch, revisions) in gathered {
            self.runtime.block_on(log.note_again(epoch, revisions)).expect("the log takes it");
        }
        let Some((epoch, seq)) = done else { return };
        while let Err(error) = log.done_through(epoch, seq) {
            assert!(matches!(error, DedupeError::Behind), "the log takes it: {error}");
            std::thread::yield_now();
        }
    }

    fn restart(&mut self) -> Opened {
        self.close();
        let before = self.path();
        self.starts += 1;
        if !before.is_dir() {
            return Opened::default();
        }
        move_files(&before, &self.path());
        let (log, opened) = self.open();
        self.log = Some(log);
        opened
    }

    fn lose(&mut self) {
        self.close();
        if self.path().is_dir() {
            fs::remove_dir_all(self.path()).expect("the folder goes");
        }
        self.starts += 1;
    }

    fn close(&mut self) {
        let Some(log) = self.log.take() else { return };
        loop {
            match self.runtime.block_on(log.close()) {
                Ok(()) | Err(DedupeError::Closed) => return,
                // On a busy machine; asked again, it has closed meanwhile.
                Err(DedupeError::CloseTooSlow) => {}
                Err(error) => panic!("the dedupe log does not close: {error}"),
            }
        }
    }
}

impl Drop for Files {
    /// Its thread must not write into folders that are being removed.
    fn drop(&mut self) {
        self.close();
    }
}

/// Copies, so that the new files bear no lock, and removes the old ones. sled's folder of large values is always empty here.
fn move_files(from: &Path, to: &Path) {
    DirBuilder::new().mode(0o700).create(to).expect("the disk takes a folder");
    for entry in fs::read_dir(from).expect("the folder is there") {
        let path = entry.expect("it can be listed").path();
        if path.is_file() {
            let name = path.file_name().expect("it has a name");
            fs::copy(&path, to.join(name)).expect("the disk takes it");
        }
    }
    fs::remove_dir_all(from).expect("the folder goes");
}
