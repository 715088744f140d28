//! Job: ship the keys that a comparison found to differ, and learn what became of them.
//! Input: the differing keys, by name; what the session shipped, the replica's answers. Output: how many were put and deleted.
//! Edge: part of a comparison, which owns all of it.
//! Always true: one repair is under way at a time; what the session could not ship, or only in part, is asked for again, in vain for so long.

use super::compare::{ANSWER_DEADLINE, Answer, Ask, Comparison, Failed, MARK_PAUSE, MARKS_IN_VAIN_MAX};
use crate::wire::replicate as wire;
use bytes::Bytes;
use tokio::sync::oneshot;

/// Keys of one repair: its values are read while frames wait.
const REPAIR_KEYS: usize = 256;

impl Comparison {
    /// Ships the keys that differ, as many at a time as one message takes.
    pub(super) async fn mend(&mut self) -> Result<(), Failed> {
        let keys: Vec<Bytes> = self.compared.found.iter().map(|found| found.key.clone()).collect();
        let (mut puts, mut deletes, mut in_vain) = (0, 0, 0);
        let mut left = &keys[..];
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
            if !repaired.refused.is_empty() {
                return Err(Failed::NotMended(format!("the replica does not take the repair: {}", repaired.refused)));
            }
            (puts, deletes) = (puts + repaired.puts, deletes + repaired.deletes);
            left = &left[shipped.keys..];
            if left.is_empty() {
                break;
            }
        }
        self.compared.mended = Some((puts, deletes));
        Ok(())
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
