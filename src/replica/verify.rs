//! Job: answer questions about the replica's keys at a mark, beside the frames.
//! Input: questions, in order; the replica's etcd at the revision that the mark was reached at. Output: an answer to each.
//! Edge: a task of its own with a connection of its own; a stream has one.
//! Always true: an answer is about one replica revision alone; a range is read whole, or said not to have been.

use super::receive::LinkEnd;
use crate::etcd::{Columns, Etcd, EtcdError};
use crate::failpoint;
use crate::model::{Digest, KeyRange, Mended, Quarantine, Revision};
use crate::scan::{Scan, Sizes};
use crate::wire::parts::{self, Difference, DifferingKey, KeyList, PART_KEYS, Part, Splitter, after_key, of_value};
use crate::wire::replicate as wire;
use crate::wire::replicate::part_answer::Outcome;
use crate::wire::replicate::receipt;
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// More than an origin has open at a time; one that asks more breaks the rules.
pub(super) const QUESTIONS_MAX: usize = 64;
/// So many keys in one part are too many for an answer with their sub-parts: the origin is told to cut it.
const WIDE_KEYS: u64 = 4 * PART_KEYS as u64;
/// Edges that one answer names; what is beyond the last is asked for again.
const EDGES_MAX: usize = 256;

/// One question about a mark, or the mark itself; or a repair, by its own number.
pub(super) struct Question {
    pub mark: u64,
    pub asked: Asked,
}

pub(super) enum Asked {
    /// Told once the applier has noted the replica's revision.
    Mark(oneshot::Receiver<Result<Revision, String>>),
    Parts(Vec<Part>),
    Lists(Vec<KeyList>),
    /// Told once the applier has brought a repair in; the number is the repair's.
    Repair(oneshot::Receiver<Result<Mended, String>>),
}

impl Asked {
    /// `None`: a digest that is none.
    pub fn parts(parts: Vec<wire::Part>) -> Option<Self> {
        let part = |part: wire::Part| {
            let digest = Digest(<[u8; 16]>::try_from(&part.digest[..]).ok()?);
            Some(Part { range: KeyRange { from: part.from, to: part.to }, keys: part.keys, digest })
        };
        parts.into_iter().map(part).collect::<Option<Vec<Part>>>().map(Asked::Parts)
    }

    /// `None`: a list whose keys are not in order, or not in its range, or without their values.
    pub fn lists(lists: Vec<wire::KeyList>) -> Option<Self> {
        let list = |list: wire::KeyList| {
            let range = KeyRange { from: list.from, to: list.to };
            let ordered = list.keys.windows(2).all(|pair| pair[0] < pair[1]);
            let sound = ordered && list.keys.len() == list.values.len() && list.keys.iter().all(|k| range.contains(k));
            sound.then(|| KeyList { range, keys: list.keys.into_iter().zip(list.values).collect() })
        };
        lists.into_iter().map(list).collect::<Option<Vec<KeyList>>>().map(Asked::Lists)
    }

    /// What it asks about.
    pub fn ranges(&self) -> Box<dyn Iterator<Item = &KeyRange> + '_> {
        match self {
            Asked::Mark(_) | Asked::Repair(_) => Box::new(std::iter::empty()),
            Asked::Parts(parts) => Box::new(parts.iter().map(|part| &part.range)),
            Asked::Lists(lists) => Box::new(lists.iter().map(|list| &list.range)),
        }
    }
}

/// Reads the replica for one stream.
pub(super) struct Comparer {
    end: Arc<LinkEnd>,
    etcd: Option<Etcd>,
    /// The mark that was reached last, and at which revision.
    mark: Option<(u64, Revision)>,
    questions: mpsc::Receiver<Question>,
    answers: mpsc::Sender<receipt::What>,
}

impl Comparer {
    pub(super) fn new(
        end: Arc<LinkEnd>,
        questions: mpsc::Receiver<Question>,
        answers: mpsc::Sender<receipt::What>,
    ) -> Self {
        Self { end, etcd: None, mark: None, questions, answers }
    }

    /// Until the stream ends.
    pub(super) async fn run(mut self) {
        while let Some(Question { mark, asked }) = self.questions.recv().await {
            let answer = match Box::pin(self.answer(mark, asked)).await {
                Ok(Some(answer)) => answer,
                Ok(None) => continue,
                Err(reason) => {
                    // What is still asked about it goes unanswered, as the origin knows.
                    (self.mark, self.etcd) = (None, None);
                    receipt::What::MarkFailed(wire::MarkFailed { mark, reason })
                }
            };
            failpoint::reach("answer-made");
            if self.answers.send(answer).await.is_err() {
                return;
            }
        }
    }

    async fn answer(&mut self, mark: u64, asked: Asked) -> Result<Option<receipt::What>, String> {
        let at = match (asked, self.mark) {
            (Asked::Mark(reached), _) => {
                self.mark = None;
                let gone = || Err("the position moved before the mark was reached".to_owned());
                let at = reached.await.unwrap_or_else(|_| gone())?;
                self.end.told.send_modify(|told| told.mark_reached(at));
                self.mark = Some((mark, at));
                return Ok(None);
            }
            (Asked::Repair(mended), _) => {
                let gone = || Err("the position moved before the repair had its place".to_owned());
                let (mended, refused) = match mended.await.unwrap_or_else(|_| gone()) {
                    Ok(mended) => (mended, String::new()),
                    Err(refused) => (Mended::default(), refused),
                };
                let Mended { puts, deletes } = mended;
                return Ok(Some(receipt::What::Repaired(wire::Repaired { repair: mark, puts, deletes, refused })));
            }
            (asked, Some((reached, at))) if reached == mark => (asked, at),
            (_, _) => return Ok(None),
        };
        let reading = async {
            let etcd = self.etcd().await?;
            match at {
                (Asked::Parts(parts), at) => {
                    let parts = compare_parts(&etcd, parts, at).await?;
                    Ok(receipt::What::PartsAnswer(wire::PartsAnswer { mark, parts }))
                }
                (Asked::Lists(lists), at) => {
                    let quarantine = self.end.view.borrow().quarantine.clone();
                    let lists = compare_lists(&etcd, lists, at, &quarantine).await?;
                    Ok(receipt::What::KeyListsAnswer(wire::KeyListsAnswer { mark, lists }))
                }
                (Asked::Mark(_) | Asked::Repair(_), _) => Err(EtcdError::Compacted),
            }
        };
        Box::pin(reading).await.map(Some).map_err(|e: EtcdError| format!("the replica's etcd: {e}"))
    }

    async fn etcd(&mut self) -> Result<Etcd, EtcdError> {
        if let Some(etcd) = &self.etcd {
            return Ok(etcd.clone());
        }
        let etcd = self.end.etcd.connect().await?;
        self.etcd = Some(etcd.clone());
        Ok(etcd)
    }
}

async fn compare_parts(etcd: &Etcd, parts: Vec<Part>, at: Revision) -> Result<Vec<wire::PartAnswer>, EtcdError> {
    let mut answers = Vec::with_capacity(parts.len());
    let mut sizes = Sizes::default();
    for part in parts {
        answers.push(match compare_part(etcd, &part, at, &mut sizes).await {
            Err(EtcdError::Compacted) => only(Outcome::Compacted),
            answer => answer?,
        });
    }
    Ok(answers)
}

fn only(outcome: Outcome) -> wire::PartAnswer {
    wire::PartAnswer { outcome: outcome.into(), ..wire::PartAnswer::default() }
}

async fn compare_part(
    etcd: &Etcd,
    part: &Part,
    at: Revision,
    sizes: &mut Sizes,
) -> Result<wire::PartAnswer, EtcdError> {
    let mut scan = Scan::new(etcd, &part.range, at, *sizes);
    let mut splitter = Splitter::new(part.range.clone());
    let mut edges = Vec::new();
    while !scan.is_over() {
        let kvs = scan.page(PART_KEYS).await?;
        *sizes = scan.sizes();
        for kv in kvs {
            if splitter.keys() > 0 && splitter.keys().is_multiple_of(PART_KEYS as u64) {
                edges.push(kv.key.clone());
            }
            splitter.add(&kv.key, &kv.value);
        }
        if splitter.keys() > WIDE_KEYS {
            more_edges(etcd, scan.rest(), at, &mut edges).await?;
            return Ok(wire::PartAnswer { outcome: Outcome::Wide.into(), edges, ..wire::PartAnswer::default() });
        }
    }
    let (own, subs) = splitter.finish();
    if own == *part {
        return Ok(only(Outcome::Equal));
    }
    let subs = subs.into_iter().map(part_message).collect();
    Ok(wire::PartAnswer { outcome: Outcome::Differs.into(), subs, ..wire::PartAnswer::default() })
}

/// Where the rest of a wide part is to be cut, without its values.
async fn more_edges(etcd: &Etcd, rest: &KeyRange, at: Revision, edges: &mut Vec<Bytes>) -> Result<(), EtcdError> {
    let mut rest = rest.clone();
    while edges.len() < EDGES_MAX {
        let page = etcd.page(&rest, PART_KEYS, Some(at), Columns::KeysOnly).await?;
        match page.kvs.last() {
            Some(last) if page.more => {
                edges.push(last.key.clone());
                rest.from = after_key(&last.key);
            }
            _ => return Ok(()),
        }
    }
    Ok(())
}

fn part_message(part: Part) -> wire::Part {
    let digest = Bytes::copy_from_slice(&part.digest.0);
    wire::Part { from: part.range.from, to: part.range.to, keys: part.keys, digest }
}

/// A key that differs for a revision in quarantine is told as one that does.
async fn compare_lists(
    etcd: &Etcd,
    lists: Vec<KeyList>,
    at: Revision,
    quarantine: &Quarantine,
) -> Result<Vec<wire::KeyListAnswer>, EtcdError> {
    let quarantined = quarantine.keys();
    let mut answers = Vec::with_capacity(lists.len());
    for list in lists {
        answers.push(match read_list(etcd, &list.range, at).await {
            Err(EtcdError::Compacted) => wire::KeyListAnswer { compacted: true, keys: Vec::new() },
            own => {
                let message = |found: DifferingKey| {
                    let quarantined = quarantined.contains(&found.key);
                    key_message(found, quarantined)
                };
                let keys = parts::differing_keys(&list.keys, &own?).into_iter().map(message).collect();
                wire::KeyListAnswer { compacted: false, keys }
            }
        });
    }
    Ok(answers)
}

async fn read_list(etcd: &Etcd, range: &KeyRange, at: Revision) -> Result<Vec<(Bytes, u64)>, EtcdError> {
    let mut scan = Scan::new(etcd, range, at, Sizes::default());
    let mut own = Vec::new();
    while !scan.is_over() {
        own.extend(scan.page(PART_KEYS).await?.into_iter().map(|kv| (kv.key, of_value(&kv.value))));
    }
    Ok(own)
}

fn key_message(found: DifferingKey, quarantined: bool) -> wire::DifferingKey {
    let difference = match found.difference {
        Difference::Missing => wire::differing_key::Difference::Missing,
        Difference::Extra => wire::differing_key::Difference::Extra,
        Difference::OtherValue => wire::differing_key::Difference::OtherValue,
    };
    let (origin_value, replica_value) = found.values;
    wire::DifferingKey { key: found.key, difference: difference.into(), origin_value, replica_value, quarantined }
}
