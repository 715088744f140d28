//! Job: ship the keys that a comparison found to differ, and learn what became of them; read what keys are at the origin.
//! Input: the differing keys, by name; what the session shipped, the replica's answers. Output: how many were put and deleted; values.
//! Edge: part of a comparison, which owns all of it; what is read is the session's.
//! Always true: one repair is under way at a time; what the session could not ship, or only in part, is asked for again, in vain for so long;
//! keys of revisions in quarantine are left to those who retry them.

use super::compare::{ANSWER_DEADLINE, Answer, Ask, Comparison, Failed, MARK_PAUSE, MARKS_IN_VAIN_MAX, Shipped};
use crate::etcd::{Columns, Etcd, EtcdError};
use crate::failpoint;
use crate::model::{Change, KeyRange, LinkName, Revision, Seq};
use crate::wire::parts::after_key;
use crate::wire::replicate as wire;
use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// Keys of one repair: its values are read while frames wait.
const REPAIR_KEYS: usize = 256;
/// Keys that a replica may ask for at once.
pub(super) const WANTED_KEYS_MAX: usize = REPAIR_KEYS;
/// Values of a repair that are read at a time.
const READS_AT_ONCE: usize = 16;

/// Whose repair it is.
pub(super) struct RepairOf {
    /// No more follow.
    pub last: bool,
    /// The comparison that waits for it.
    pub reply: Option<oneshot::Sender<Result<Shipped, String>>>,
    /// The replica's question that it answers.
    pub wanted: Option<wire::KeysWanted>,
}

/// What the keys of a repair are at the origin, being read where the stream stands; frames wait for it.
pub(super) struct RepairReading {
    pub last: bool,
    pub keys: usize,
    pub at: Revision,
    /// Where the stream stood; a reset moves it.
    pub stood: (Seq, Revision),
    pub changes: JoinSet<Result<Vec<Change>, EtcdError>>,
    pub wanted: Option<wire::KeysWanted>,
    reply: Option<oneshot::Sender<Result<Shipped, String>>>,
}

impl RepairReading {
    /// `at`: at which revision, and of how many bytes.
    pub fn begin(
        etcd: Etcd,
        keys: Vec<Bytes>,
        (at, bytes_max): (Revision, usize),
        stood: (Seq, Revision),
        of: RepairOf,
    ) -> Self {
        let (count, mut changes) = (keys.len(), JoinSet::new());
        changes.spawn(read_keys(etcd, keys, at, bytes_max));
        let RepairOf { last, reply, wanted } = of;
        Self { last, keys: count, at, stood, changes, wanted, reply }
    }

    fn tell(reply: Option<oneshot::Sender<Result<Shipped, String>>>, outcome: Result<Shipped, String>) {
        if let Some(reply) = reply {
            // A comparison that has ended does not wait any more.
            let _ = reply.send(outcome);
        }
    }

    pub fn shipped(self, shipped: Shipped) {
        Self::tell(self.reply, Ok(shipped));
    }

    /// What was read is not what the stream stands at any more; a question that is still to be answered.
    pub fn moved(self) -> Option<wire::KeysWanted> {
        Self::tell(self.reply, Err("the stream was reset meanwhile".to_owned()));
        self.wanted
    }

    pub fn failed(self, link: &LinkName, error: &EtcdError) {
        if self.wanted.is_some() {
            tracing::warn!(%link, %error, "what the replica asks of some keys cannot be read: its operator asks again");
        }
        Self::tell(self.reply, Err(format!("the origin's etcd: {error}")));
    }
}

impl Comparison {
    /// Ships the keys that differ. Where that fails, those that are in by then differ no more.
    pub(super) async fn mend(&mut self) -> Result<(), Failed> {
        failpoint::reach("difference-known");
        let keys: Vec<Bytes> = self.tally.compared.mendable().map(|found| found.key.clone()).collect();
        let mut left = &keys[..];
        let shipped = self.ship_all(&mut left).await;
        if shipped.is_err() {
            self.tally.compared.mended_of(&keys[..keys.len() - left.len()]);
        }
        shipped
    }

    /// As many keys at a time as one message takes; `left`: those that are not in yet.
    async fn ship_all(&mut self, left: &mut &[Bytes]) -> Result<(), Failed> {
        let mut in_vain = 0;
        loop {
            let some = &left[..left.len().min(REPAIR_KEYS)];
            let (reply, shipped) = oneshot::channel();
            let ask = Ask::Repair { keys: some.to_vec(), last: some.len() == left.len(), reply };
            self.asks.send(ask).await.map_err(|_| Failed::StreamEnded)?;
            let shipped = match shipped.await.map_err(|_| Failed::StreamEnded)? {
                Ok(shipped) => shipped,
                Err(reason) if in_vain >= MARKS_IN_VAIN_MAX => return Err(Failed::NotMended(reason)),
                Err(_) => {
                    in_vain += 1;
                    tokio::time::sleep(MARK_PAUSE).await;
                    continue;
                }
            };
            let repaired = self.repaired(shipped.repair).await?;
            failpoint::reach("repair-heard");
            if !repaired.refused.is_empty() {
                return Err(Failed::NotMended(format!("the replica does not take the repair: {}", repaired.refused)));
            }
            let (puts, deletes) = self.tally.compared.mended.unwrap_or_default();
            self.tally.compared.mended = Some((puts + repaired.puts, deletes + repaired.deletes));
            *left = &left[shipped.keys..];
            if left.is_empty() {
                return Ok(());
            }
        }
    }

    async fn repaired(&mut self, repair: u64) -> Result<wire::Repaired, Failed> {
        loop {
            let answer = tokio::time::timeout(ANSWER_DEADLINE, self.answers.recv()).await;
            match answer.map_err(|_| Failed::NoAnswer)?.ok_or(Failed::StreamEnded)? {
                Answer::Repaired(repaired) if repaired.repair == repair => return Ok(repaired),
                Answer::Repaired(_) | Answer::Parts(_) | Answer::Lists(_) | Answer::MarkFailed(_) => {}
            }
        }
    }
}

/// What the keys are at a revision, from the first on, as many as are `bytes_max` together at most; the first in any case.
async fn read_keys(etcd: Etcd, keys: Vec<Bytes>, at: Revision, bytes_max: usize) -> Result<Vec<Change>, EtcdError> {
    let mut changes: Vec<Change> = Vec::with_capacity(keys.len());
    let mut bytes = 0;
    for some in keys.chunks(READS_AT_ONCE) {
        let read = futures::future::try_join_all(some.iter().map(|key| read_key(&etcd, key, at))).await?;
        for change in read {
            bytes += change.bytes();
            if bytes > bytes_max && !changes.is_empty() {
                return Ok(changes);
            }
            changes.push(change);
        }
    }
    Ok(changes)
}

async fn read_key(etcd: &Etcd, key: &Bytes, at: Revision) -> Result<Change, EtcdError> {
    let range = KeyRange { from: key.clone(), to: after_key(key) };
    let page = etcd.page(&range, 1, Some(at), Columns::KeysAndValues).await?;
    Ok(match page.kvs.into_iter().next() {
        Some(kv) => Change::Put { key: kv.key, value: kv.value },
        None => Change::Delete { key: key.clone() },
    })
}
