//! Job: what the link's task and the election see of shipping.
//! Input: what the shipper and its session write. Output: a `ShipView`.
//! Always true: only the shipper and what it runs write it; a count never falls.

use crate::model::{CopyProgress, Epoch, LinkState, Revision, Seq, Term, Verification};
use std::collections::BTreeMap;
use tokio::time::Instant;

/// What `status` says of shipping.
#[derive(Debug, Clone)]
pub struct ShipView {
    pub state: LinkState,
    /// Empty while all is well.
    pub reason: String,
    pub detail: String,
    pub epoch: Epoch,
    pub term: Term,
    pub seq: Seq,
    pub applied_seq: Seq,
    pub durable_seq: Seq,
    pub applied_revision: Revision,
    pub bytes_raw: u64,
    pub bytes_sent: u64,
    pub counts: BTreeMap<&'static str, u64>,
    pub copy: Option<CopyProgress>,
    pub verification: Verification,
    /// Since when a base copy is wanted and not complete: all that it is to bring is behind since then.
    pub copy_since: Option<Instant>,
}

impl Default for ShipView {
    fn default() -> Self {
        Self {
            state: LinkState::Connecting,
            reason: String::new(),
            detail: String::new(),
            epoch: Epoch(0),
            term: Term(0),
            seq: Seq(0),
            applied_seq: Seq(0),
            durable_seq: Seq(0),
            applied_revision: Revision(0),
            bytes_raw: 0,
            bytes_sent: 0,
            counts: BTreeMap::new(),
            copy: None,
            verification: Verification::default(),
            copy_since: None,
        }
    }
}

impl ShipView {
    pub fn count(&mut self, name: &'static str, more: u64) {
        *self.counts.entry(name).or_default() += more;
    }
}
