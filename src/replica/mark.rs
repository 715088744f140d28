//! Job: marks: at a place between two seqs, note the replica's revision, or bring a repair in.
//! Input: marks from the stream, in order with the frames. Output: for each, the replica's revision or what was mended, or why not.
//! Edge: part of the applier, which owns all of it.
//! Always true: what is done at a mark is done while the position stands at its seq, and nothing beyond it is in; a repair commits with the
//! position, as everything does.

use super::apply::Applier;
use super::commit::Committed;
use super::plan::{CopyDiff, LimitRefusal, copy_chunks};
use crate::etcd::EtcdError;
use crate::failpoint;
use crate::model::{Change, Mended, Phase, Revision, Seq};
use bytes::Bytes;
use tokio::sync::oneshot;

/// Marks that wait for their place; the origin makes the next one when the last is dealt with.
const MARKS_MAX: usize = 8;

/// A place between two seqs, and what is to be done there.
pub struct Mark {
    pub after: Seq,
    pub there: There,
}

/// What is to be done at a mark, and who is told.
pub enum There {
    Note(oneshot::Sender<Result<Revision, String>>),
    Mend(Mend, oneshot::Sender<Result<Mended, String>>),
}

/// What some keys are at the origin, with everything up to the mark.
pub struct Mend {
    /// The origin's revision at which they were read.
    pub revision: Revision,
    /// In key order, each key once.
    pub changes: Vec<Change>,
    /// With it the replica is the origin again.
    pub last: bool,
    /// The number of the retry that asked for it; 0: it is of a comparison.
    pub wanted: u64,
}

/// Why a mark has to wait.
enum Delay {
    Moved,
    Etcd(EtcdError),
}

impl From<EtcdError> for Delay {
    fn from(error: EtcdError) -> Self {
        Delay::Etcd(error)
    }
}

impl Applier {
    /// Takes a mark: nothing beyond it is planned until it is reached.
    pub(super) fn take_mark(&mut self, mark: Mark) {
        if self.marks.len() >= MARKS_MAX {
            return self.fail_mark(mark, format!("{MARKS_MAX} marks wait already"));
        }
        self.marks.push_back(mark);
    }

    /// With nothing in flight: does what is to be done at each mark that the position stands at.
    pub(super) async fn reach_marks(&mut self) {
        while let Some(seq) = self.held.as_ref().and_then(|h| h.position.as_ref()).map(|p| p.seq) {
            if self.marks.front().is_none_or(|mark| mark.after > seq) {
                return;
            }
            let Some(mark) = self.marks.pop_front() else { return };
            if let Some(reason) = self.unmarkable(&mark) {
                self.fail_mark(mark, reason);
                continue;
            }
            let Mark { after, there } = mark;
            // Who is told waits for as long as it takes: what cannot be done now is done again.
            let (there, delay) = match there {
                There::Note(reached) => match self.note().await {
                    Ok(revision) => {
                        failpoint::reach("mark-reached");
                        let _ = reached.send(Ok(revision));
                        continue;
                    }
                    Err(delay) => (There::Note(reached), delay),
                },
                There::Mend(mend, mended) => match self.mend(&mend).await {
                    Ok(outcome) => {
                        failpoint::reach("repair-applied");
                        if mend.wanted > 0 {
                            Box::pin(self.retried(&mend, &outcome)).await;
                        }
                        let _ = mended.send(outcome);
                        continue;
                    }
                    Err(delay) => (There::Mend(mend, mended), delay),
                },
            };
            self.marks.push_front(Mark { after, there });
            return match delay {
                Delay::Moved => {
                    self.held = None;
                    self.retry().await;
                }
                Delay::Etcd(e) => self.doubt(&e),
            };
        }
    }

    /// Says why nothing is done there, also to who waits for a retry.
    fn fail_mark(&mut self, mark: Mark, reason: String) {
        if let There::Mend(Mend { wanted: 1.., .. }, _) = &mark.there {
            self.end_retry(Err(reason.clone()));
        }
        mark.there.fail(reason);
    }

    fn unmarkable(&self, mark: &Mark) -> Option<String> {
        let position = self.held.as_ref().and_then(|h| h.position.as_ref())?;
        if position.seq > mark.after {
            return Some(format!("the position has passed the mark after seq {}", mark.after));
        }
        if position.part > 0 {
            return Some("a revision larger than a request is applied in part".to_owned());
        }
        (position.state == Phase::Copying).then(|| "the base copy is not over at the replica".to_owned())
    }

    /// The replica's head while the position is what is held. The head and not the position's own revision: what others wrote since is the
    /// replica's content too.
    async fn note(&mut self) -> Result<Revision, Delay> {
        let etcd = self.etcd().await?;
        let look = etcd.look(&self.link.position_key()).await?;
        let found = look.kv.map(|kv| kv.mod_revision);
        let held = self.held.as_ref().map(|held| held.mod_revision);
        if found.is_some() && found == held { Ok(look.head) } else { Err(Delay::Moved) }
    }

    /// Writes what the keys are at the origin. While that takes more than one transaction, the position says `repairing`; a retry leaves that as
    /// it is, since its keys were not what the origin had before. Done again after a doubt it writes the same.
    async fn mend(&mut self, mend: &Mend) -> Result<Result<Mended, String>, Delay> {
        if !self.is_wanted(mend) {
            return Ok(Err("nobody asks for these keys any more".to_owned()));
        }
        failpoint::reach("repair-reached");
        loop {
            let diff = CopyDiff::of_changes(&mend.changes);
            let chunks = match copy_chunks(diff, &Bytes::new(), mend.revision, &self.limits) {
                Ok(chunks) => chunks,
                Err(e) => return Ok(Err(e.to_string())),
            };
            let (mut mended, count) = (Mended::default(), chunks.len());
            let mut learned = None;
            for (i, chunk) in chunks.into_iter().enumerate() {
                let Some(mut next) = self.held.as_ref().and_then(|h| h.position.clone()) else {
                    return Err(Delay::Moved);
                };
                if mend.wanted == 0 {
                    next.state = if mend.last && i + 1 == count { Phase::Following } else { Phase::Repairing };
                }
                let sent_bytes = chunk.request_bytes;
                match self.commit(next, chunk.tree).await {
                    Ok(Committed::Done) => failpoint::reach("repair-committed"),
                    Ok(Committed::GuardFailed | Committed::PositionMoved) => return Err(Delay::Moved),
                    Err(EtcdError::TooManyOps) => learned = Some(LimitRefusal::TooManyOps),
                    Err(EtcdError::TooLarge) => learned = Some(LimitRefusal::TooLarge { sent_bytes }),
                    // Who waits for a retry is told, and nothing waits behind it.
                    Err(e @ EtcdError::Denied { .. }) if mend.wanted > 0 => return Ok(Err(e.to_string())),
                    Err(e) => return Err(Delay::Etcd(e)),
                }
                if learned.is_some() {
                    break;
                }
                mended.puts += chunk.puts;
                mended.deletes += chunk.deletes;
            }
            let Some(refusal) = learned else { return Ok(Ok(mended)) };
            match self.learned(refusal) {
                Some(limits) => self.limits = limits,
                None => return Ok(Err("the replica's etcd refuses even the smallest transaction".to_owned())),
            }
        }
    }
}

impl There {
    /// Says why it is not done.
    pub(super) fn fail(self, reason: String) {
        match self {
            There::Note(reached) => _ = reached.send(Err(reason)),
            There::Mend(_, mended) => _ = mended.send(Err(reason)),
        }
    }
}
