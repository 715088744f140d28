//! Job: write down that the origin has another history before anybody is told, and find it again: no restart and no election forgets it.
//! Input: a hello's answer, the reason of a stop. Output: a note in the origin's etcd; the same stop at the next hello.
//! Edge: part of the shipper, which owns all of it; what a note says of a position is in history.rs.
//! Always true: what is met is remembered by the cluster that it was met at, until the replica's position is of another epoch.
//!
//! The facts by which another history is known do not last: new writes lift the head, compaction takes the carried revision, and the waymark
//! is rewritten each minute alone, so that the restored one may be the position's. The note stands in the origin's own etcd, not on a disk
//! and not at the replica, for three reasons. Every sidecar that is elected later reads it there, whoever's disk is lost. It is of the
//! history that it speaks of: where the operator restores the cluster once more, to what the replica has followed, or corrects the endpoints,
//! the note is not there, and the link goes on, as it must. And where that other history goes on, so does the note, in each later snapshot of
//! it. The replica cannot keep it: it does not know which origin it hears. An origin of another cluster id needs no note: the position tells.

use super::elect::still_elected;
use super::hello::Greeted;
use super::history::Met;
use super::session::SessionEnd;
use super::ship::{Shipper, at_origin};
use crate::etcd::{Compare, CompareOp, EtcdError, Txn, TxnOp};
use crate::model::{ClusterId, Epoch, Position, Revision, Seq};

impl Shipper {
    /// Why the link stops here, where another history was met before, by whichever sidecar, and the position is still of what went before it.
    pub(super) async fn recall(
        &mut self,
        greeted: &Greeted,
        position: Option<&Position>,
        cluster: ClusterId,
    ) -> Result<Option<String>, SessionEnd> {
        let followed = position.filter(|position| position.origin_cluster == cluster);
        self.followed = followed.map(|position| (position.epoch, position.seq));
        let key = self.origin.send.link.other_history_key();
        let Some(note) = greeted.etcd.look(&key).await.map_err(|e| at_origin(&e))?.kv else { return Ok(None) };
        match (Met::from_json(&note.value), position) {
            (Ok(met), _) if !met.is_outlived(position) => {
                // It is written down already.
                self.followed = None;
                Ok(Some(met.reason))
            }
            (Err(e), Some(_)) => Ok(Some(format!(
                "the origin may have been restored or replaced: what is written down of it at {} cannot be read ({e}); if this origin is the \
                 right one, run `etcd-ferry resync LINK --config F` at its sidecar",
                key.escape_ascii()
            ))),
            (Ok(_) | Err(_), _) => self.forget(greeted, note.mod_revision).await.map(|()| None),
        }
    }

    /// A base copy or a repair has opened an epoch: what is met from now on is another history than that.
    pub(super) fn follows_in(&mut self, epoch: Epoch) {
        self.followed = Some((epoch, Seq(0)));
    }

    async fn forget(&self, greeted: &Greeted, written_at: Revision) -> Result<(), SessionEnd> {
        let key = self.origin.send.link.other_history_key();
        let unchanged = Compare::mod_revision(&key[..], CompareOp::Equal, written_at.to_etcd());
        let txn = Txn::new().when([unchanged, self.leads_still()]).and_then([TxnOp::delete(&key[..], None)]);
        let forgotten = greeted.etcd.txn(txn, &self.note_right()).await.map_err(|e| at_origin(&e))?;
        if !forgotten.succeeded() {
            return Err(SessionEnd::HelloAgain("another sidecar was elected".to_owned()));
        }
        tracing::info!(link = %self.origin.send.link, "the replica is in another epoch than when the origin had another history: that is forgotten");
        Ok(())
    }

    /// Writes down that the origin has another history than what the last hello's position is of. Nothing is to be done where the position
    /// itself tells, or where it is written down already. Where that fails, a stop is told all the same, and tries again.
    pub(super) async fn remember(&mut self, reason: &str) {
        if let Some((epoch, seq)) = self.followed.take() {
            self.unwritten = Some((Met { epoch, seq, reason: reason.to_owned() }, String::new()));
            self.write_down().await;
        }
    }

    pub(super) async fn write_down(&mut self) {
        let Some((met, before)) = self.unwritten.take() else { return };
        if let Err(error) = self.write(&met).await {
            if before.is_empty() {
                tracing::warn!(link = %self.origin.send.link, %error, "that the origin has another history is not written down there; trying again");
            }
            self.unwritten = Some((met, error.to_string()));
        }
    }

    async fn write(&self, met: &Met) -> Result<(), EtcdError> {
        let key = self.origin.send.link.other_history_key();
        let put = TxnOp::put(&key[..], met.to_json(), None);
        let txn = Txn::new().when([self.leads_still()]).and_then([put]);
        // One who is not elected any more leaves it to the next, who meets the same.
        self.origin.etcd.connect().await?.txn(txn, &self.note_right()).await.map(|_| ())
    }

    pub(super) fn show_unwritten(&self) {
        let told = |(_, error): &(Met, String)| {
            format!("that it stopped is not written down at the origin, and would be forgotten by a restart: {error}")
        };
        let unwritten = self.unwritten.as_ref().map(told);
        self.view.send_modify(|view| view.unwritten = unwritten);
    }

    fn leads_still(&self) -> Compare {
        still_elected(&self.origin.send.link, &self.origin.node, self.term)
    }

    fn note_right(&self) -> String {
        format!("write {}", self.origin.send.link.other_history_key().escape_ascii())
    }
}
