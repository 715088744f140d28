//! Job: one comparison of both sides: tell the replica what the origin holds at a mark, and narrow down what differs.
//! Input: the origin's etcd at the mark's revision, the replica's answers. Output: questions; which keys differ, and since when the rest is equal.
//! Edge: a task of its own beside the session, which gives it its marks and passes answers on.
//! Always true: each key of the link's ranges is compared at one mark; a part whose revision was compacted is compared again at another;
//! what is in flight is bounded, so that frames find room beside it.

use super::found::{Compared, Mending, Unmended, answer_bytes, guard_deletes, list_message, part_message};
use super::tally::{Mark, Narrowed, Open, OtherAnswer, Round, Tally};
use crate::etcd::{Columns, Etcd, EtcdError};
use crate::failpoint;
use crate::model::{KeyRange, PartsProgress, Ranges, Revision};
use crate::scan::{Scan, Sizes};
use crate::wire::parts::{DifferingKey, KeyList, Narrower, PART_KEYS, Part, PartHasher, SUB_KEYS, after_key, of_value};
use crate::wire::replicate::{self as wire, Shipment, shipment};
use bytes::Bytes;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

/// Parts of one question, about 2 KB: a hundred thousand keys are asked about within one round trip. A mark's first question has one part, and
/// each next one twice as many: where either side is compacted all the time, something is compared at each mark.
const QUESTION_PARTS_MAX: usize = 32;
/// Key lists of one question.
const QUESTION_BYTES: usize = 64 << 10;
/// About what an answer to them may hold: the origin's lists may be empty where the replica has thousands of keys.
const ANSWER_BYTES: usize = 512 << 10;
/// Open questions; fewer than the replica takes.
const QUESTIONS_MAX: usize = 16;
/// A mark is reached when what was shipped before it is applied, and a replica that catches up may take minutes.
pub(super) const ANSWER_DEADLINE: Duration = Duration::from_secs(300);
/// Marks in a row at which nothing could be compared, since one side was compacted or could not be read.
pub(super) const MARKS_IN_VAIN_MAX: u32 = 20;
pub(super) const MARK_PAUSE: Duration = Duration::from_millis(500);
/// Where a link back exists: what is on its way has this long to arrive before what differs is looked at again.
const CROSSING_PAUSE: Duration = Duration::from_secs(2);
/// A pause after a slow read is no longer than this: most of such a read was waiting.
const PACE_PAUSE_MAX: Duration = Duration::from_secs(2);

/// What a comparison asks of the session.
pub(super) enum Ask {
    Mark(oneshot::Sender<Mark>),
    /// Ship what these keys are at the origin, as many of them as one message takes: from the first on. They are the last ones.
    Repair {
        keys: Vec<Bytes>,
        last: bool,
        reply: oneshot::Sender<Result<Shipped, String>>,
    },
}

/// A repair that is on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shipped {
    pub repair: u64,
    /// How many of the keys are in it.
    pub keys: usize,
}

/// What the replica says to a comparison.
#[derive(Debug)]
pub(super) enum Answer {
    Parts(wire::PartsAnswer),
    Lists(wire::KeyListsAnswer),
    MarkFailed(wire::MarkFailed),
    Repaired(wire::Repaired),
}

impl Answer {
    fn mark(&self) -> u64 {
        match self {
            // Not about a mark; of an earlier repair, it is nobody's.
            Answer::Repaired(_) => 0,
            Answer::Parts(answer) => answer.mark,
            Answer::Lists(answer) => answer.mark,
            Answer::MarkFailed(failed) => failed.mark,
        }
    }
}

/// Why a comparison ended without a result.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    #[error("the origin's etcd: {0}")]
    Etcd(#[from] EtcdError),
    #[error("{MARKS_IN_VAIN_MAX} marks in a row were in vain; the last one: {0}")]
    InVain(String),
    #[error("the replica did not answer within {} s: is it far behind?", ANSWER_DEADLINE.as_secs())]
    NoAnswer,
    #[error(transparent)]
    OtherAnswer(#[from] OtherAnswer),
    #[error("{0}")]
    NotMended(String),
    #[error("the stream ended")]
    StreamEnded,
}

/// How much of a core a comparison may take: after each read it rests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// 1: no rest.
    pub core_share: f64,
}

impl Pace {
    async fn rest_after(self, started: Instant) {
        if self.core_share < 1.0 {
            let rest = started.elapsed().mul_f64(1.0 / self.core_share - 1.0);
            tokio::time::sleep(rest.min(PACE_PAUSE_MAX)).await;
        }
    }
}

/// One comparison.
pub(super) struct Comparison {
    pub etcd: Etcd,
    pub ranges: Ranges,
    pub pace: Pace,
    /// A link back exists over the range: what differs may be on its way from there.
    pub link_back: bool,
    pub mending: Option<Mending>,
    pub asks: mpsc::Sender<Ask>,
    pub outbound: mpsc::Sender<Shipment>,
    pub answers: mpsc::Receiver<Answer>,
    pub progress: watch::Sender<PartsProgress>,
    pub tally: Tally,
    pub sizes: Sizes,
}

impl Comparison {
    /// Compares everything, and what differs once more where it may have been on its way.
    pub(super) async fn run(mut self) -> Result<Compared, Failed> {
        self.tally.todo = self.ranges.pieces().iter().cloned().collect();
        let keys = self.count().await?;
        self.tally.progress.parts_total = keys.div_ceil(PART_KEYS as u64).max(1);
        self.progress.send_replace(self.tally.progress);
        let mut in_vain = 0;
        while !self.tally.todo.is_empty() {
            let round = self.compare_at_mark().await?;
            in_vain = if round.done > 0 { 0 } else { in_vain + 1 };
            if let (true, Some(reason)) = (in_vain >= MARKS_IN_VAIN_MAX, &round.over) {
                return Err(Failed::InVain(reason.clone()));
            }
            if in_vain > 0 {
                tokio::time::sleep(MARK_PAUSE).await;
            }
        }
        self.tally.compared.found.sort_by(|a, b| a.key.cmp(&b.key));
        if self.link_back && !self.tally.compared.found.is_empty() {
            self.look_again().await?;
        }
        if let Some(mending) = self
            .mending
            .filter(|mending| mending.ends || self.tally.compared.differing > self.tally.compared.expected())
        {
            let mended = match guard_deletes(&self.tally.compared, mending) {
                Ok(()) => self.mend().await.map_err(|failed| Unmended::Failed(failed.to_string())),
                Err(stop) => Err(stop.into()),
            };
            self.tally.compared.unmended = mended.err();
        }
        Ok(self.tally.compared)
    }

    async fn count(&self) -> Result<u64, Failed> {
        let mut keys = 0;
        for piece in self.ranges.pieces() {
            keys += self.etcd.page(piece, 0, None, Columns::CountOnly).await?.count;
        }
        Ok(keys)
    }

    async fn mark(&self) -> Result<Mark, Failed> {
        let (reply, mark) = oneshot::channel();
        self.asks.send(Ask::Mark(reply)).await.map_err(|_| Failed::StreamEnded)?;
        mark.await.map_err(|_| Failed::StreamEnded)
    }

    async fn send(&self, what: shipment::What) -> Result<(), Failed> {
        self.outbound.send(Shipment { what: Some(what) }).await.map_err(|_| Failed::StreamEnded)
    }

    /// As much as can be compared at one mark; what cannot stays to be done.
    async fn compare_at_mark(&mut self) -> Result<Round, Failed> {
        let mark = self.mark().await?;
        let mut round = Round::at(mark);
        loop {
            while let Ok(answer) = self.answers.try_recv() {
                self.take_answer(&mut round, answer)?;
            }
            let may_ask = round.open.len() < QUESTIONS_MAX;
            if may_ask && !round.differing.is_empty() {
                self.ask_keys(&mut round).await?;
            } else if may_ask && round.over.is_none() && !self.tally.todo.is_empty() {
                self.ask_parts(&mut round).await?;
            } else if round.open.is_empty() {
                break;
            } else {
                let answer = tokio::time::timeout(ANSWER_DEADLINE, self.answers.recv()).await;
                let answer = answer.map_err(|_| Failed::NoAnswer)?.ok_or(Failed::StreamEnded)?;
                self.take_answer(&mut round, answer)?;
            }
        }
        if round.done > 0 {
            let oldest = self.tally.compared.revision;
            self.tally.compared.revision = if oldest == Revision(0) { mark.at } else { oldest.min(mark.at) };
        }
        Ok(round)
    }

    /// The next parts, as the origin holds them at the mark.
    async fn ask_parts(&mut self, round: &mut Round) -> Result<(), Failed> {
        let mut parts: Vec<Part> = Vec::new();
        while parts.len() < round.question_parts {
            let Some(range) = self.tally.todo.pop_front() else { break };
            match self.read_part(&range, round.mark.at).await {
                Ok((part, rest)) => {
                    parts.push(part);
                    if let Some(rest) = rest {
                        self.tally.todo.push_front(rest);
                    }
                }
                Err(e) => {
                    self.tally.todo.push_front(range);
                    round.over = Some(over_for(e)?);
                    break;
                }
            }
        }
        if parts.is_empty() {
            return Ok(());
        }
        round.question_parts = (2 * round.question_parts).min(QUESTION_PARTS_MAX);
        let message = parts.iter().map(part_message).collect();
        round.open.push_back(Open::Parts(parts));
        self.send(shipment::What::Parts(wire::Parts { mark: round.mark.id, parts: message })).await
    }

    /// The first part of a range, and what is left of it.
    async fn read_part(&mut self, range: &KeyRange, at: Revision) -> Result<(Part, Option<KeyRange>), EtcdError> {
        let mut scan = Scan::new(&self.etcd, range, at, self.sizes);
        let mut hasher = PartHasher::new();
        loop {
            let started = Instant::now();
            let left = PART_KEYS.saturating_sub(usize::try_from(hasher.keys()).unwrap_or(PART_KEYS));
            for kv in scan.page(left).await? {
                hasher.add(&kv.key, &kv.value);
            }
            self.sizes = scan.sizes();
            self.pace.rest_after(started).await;
            if scan.is_over() || hasher.keys() >= PART_KEYS as u64 {
                break;
            }
        }
        let rest = (!scan.is_over()).then(|| scan.rest().clone());
        let to = rest.as_ref().map_or_else(|| range.to.clone(), |rest| rest.from.clone());
        let (keys, digest) = hasher.finish();
        Ok((Part { range: KeyRange { from: range.from.clone(), to }, keys, digest }, rest))
    }

    /// The origin's keys where the replica's sub-parts differ, of as many parts as one question takes.
    async fn ask_keys(&mut self, round: &mut Round) -> Result<(), Failed> {
        let (mut asked, mut lists, mut bytes, mut answer) = (Vec::new(), Vec::new(), 0, 0);
        while bytes < QUESTION_BYTES && answer < ANSWER_BYTES {
            let Some((part, subs)) = round.differing.pop_front() else { break };
            match self.narrow(&part.range, subs.clone(), round.mark.at).await {
                Ok(narrowed) => {
                    answer = answer_bytes(&narrowed, &subs).saturating_add(answer);
                    bytes += narrowed.iter().flat_map(|list| &list.keys).map(|(key, _)| key.len() + 10).sum::<usize>();
                    asked.push(Narrowed { range: part.range, keys: part.keys, lists: narrowed.len() });
                    lists.extend(narrowed);
                }
                Err(e) => {
                    self.tally.todo.push_back(part.range);
                    round.over = Some(over_for(e)?);
                }
            }
        }
        if lists.is_empty() {
            // The replica's sub-parts are what the origin's are, whatever it said of the parts.
            return Ok(self.tally.take_lists(round, asked, Vec::new())?);
        }
        self.ask_lists(round, Open::Lists(asked), lists).await
    }

    async fn ask_lists(&self, round: &mut Round, open: Open, lists: Vec<KeyList>) -> Result<(), Failed> {
        round.open.push_back(open);
        let lists = lists.into_iter().map(list_message).collect();
        self.send(shipment::What::KeyLists(wire::KeyLists { mark: round.mark.id, lists })).await
    }

    async fn narrow(&self, range: &KeyRange, subs: Vec<Part>, at: Revision) -> Result<Vec<KeyList>, EtcdError> {
        let mut scan = Scan::new(&self.etcd, range, at, self.sizes);
        let mut narrower = Narrower::new(subs);
        while !scan.is_over() {
            let started = Instant::now();
            for kv in scan.page(PART_KEYS).await? {
                narrower.add(&kv.key, &kv.value);
            }
            self.pace.rest_after(started).await;
        }
        Ok(narrower.finish())
    }

    /// An answer to the oldest open question; one about an earlier mark is nobody's any more.
    fn take_answer(&mut self, round: &mut Round, answer: Answer) -> Result<(), Failed> {
        if answer.mark() != round.mark.id {
            return Ok(());
        }
        failpoint::reach("answer-heard");
        match (answer, round.open.pop_front()) {
            (Answer::MarkFailed(failed), open) => self.tally.mark_failed(round, open, failed.reason),
            (Answer::Parts(answer), Some(Open::Parts(asked))) if answer.parts.len() == asked.len() => {
                self.tally.take_parts(round, asked, answer.parts)?;
            }
            (Answer::Lists(answer), Some(Open::Lists(asked)))
                if answer.lists.len() == asked.iter().map(|part| part.lists).sum::<usize>() =>
            {
                self.tally.take_lists(round, asked, answer.lists)?;
            }
            (Answer::Lists(answer), Some(Open::Again(lists))) if answer.lists.len() == lists => {
                self.tally.take_again(round, answer.lists)?;
            }
            (Answer::Parts(_) | Answer::Lists(_) | Answer::Repaired(_), _) => return Err(OtherAnswer.into()),
        }
        self.progress.send_replace(self.tally.progress);
        Ok(())
    }

    /// Looks at another mark whether what differed still does, with the same values: the rest was on its way.
    async fn look_again(&mut self) -> Result<(), Failed> {
        tokio::time::sleep(CROSSING_PAUSE).await;
        let before = self.tally.take_found();
        let (uncounted, kept) = (self.tally.compared.differing - before.len() as u64, before.len() as u64);
        for some in before.chunks(SUB_KEYS * QUESTIONS_MAX) {
            let mut in_vain = 0;
            loop {
                self.tally.compared.differing = 0;
                let mark = self.tally.compared.found.len();
                match self.look_again_at(some).await? {
                    None => break,
                    Some(reason) if in_vain >= MARKS_IN_VAIN_MAX => return Err(Failed::InVain(reason)),
                    Some(_) => in_vain += 1,
                }
                self.tally.forget_after(mark);
                tokio::time::sleep(MARK_PAUSE).await;
            }
        }
        self.tally.todo.clear();
        self.tally
            .compared
            .found
            .retain(|now| before.binary_search_by(|b| b.key.cmp(&now.key)).is_ok_and(|i| before[i] == *now));
        let still = self.tally.compared.found.len() as u64;
        self.tally.compared.moving = kept - still;
        self.tally.compared.differing = still + uncounted;
        Ok(())
    }

    /// `Some`: why it has to be done again.
    async fn look_again_at(&mut self, keys: &[DifferingKey]) -> Result<Option<String>, Failed> {
        let mark = self.mark().await?;
        let mut round = Round::at(mark);
        let mut lists = Vec::with_capacity(keys.len());
        for DifferingKey { key, .. } in keys {
            let range = KeyRange { from: key.clone(), to: after_key(key) };
            let started = Instant::now();
            match self.etcd.page(&range, 1, Some(mark.at), Columns::KeysAndValues).await {
                Ok(page) => {
                    let keys = page.kvs.into_iter().map(|kv| (kv.key, of_value(&kv.value))).collect();
                    lists.push(KeyList { range, keys });
                }
                Err(e) => return over_for(e).map(Some),
            }
            self.pace.rest_after(started).await;
        }
        self.ask_lists(&mut round, Open::Again(lists.len()), lists).await?;
        while !round.open.is_empty() {
            let answer = tokio::time::timeout(ANSWER_DEADLINE, self.answers.recv()).await;
            let answer = answer.map_err(|_| Failed::NoAnswer)?.ok_or(Failed::StreamEnded)?;
            self.take_answer(&mut round, answer)?;
        }
        Ok(round.over)
    }
}

/// What another mark can cure; the rest ends the comparison.
fn over_for(error: EtcdError) -> Result<String, Failed> {
    if matches!(error, EtcdError::Compacted) {
        return Ok("the origin was compacted".to_owned());
    }
    Err(Failed::Etcd(error))
}
