//! Job: what the tail of the origin's etcd shows of itself, and what it is asked.
//! Input: the shipper's commands. Output: a `TailView`.
//! Edge: a channel; who watches is watch.rs.
//! Always true: a command that nobody waits for any more is not carried out.

use super::sequence::OriginWaymark;
use crate::etcd::Look;
use crate::model::{ClusterId, Digest, Revision};
use tokio::sync::{mpsc, oneshot};

/// What the tail is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TailState {
    /// Nothing says yet from where to watch.
    Idle,
    Connecting {
        reason: String,
    },
    Running,
    SpoolFull,
    /// etcd has compacted past the spool's end: only an anchor helps.
    Lost {
        compacted: Revision,
    },
    /// The origin is not the one that was read before, or broke its own promises.
    OtherHistory {
        reason: String,
    },
    /// Going on needs a human, a larger limit for one.
    Stopped {
        reason: String,
    },
}

/// What others see of the tail.
#[derive(Debug, Clone)]
pub struct TailView {
    pub state: TailState,
    /// The origin that its last connect was to.
    pub cluster: Option<ClusterId>,
    /// Everything up to it that the link carries is in the spool.
    pub covered: Revision,
    /// From this revision on, what the spool holds is in the history that the open watch shows.
    pub proven_from: Option<Revision>,
    /// Revisions up to `covered` that touched nothing but etcd-ferry's own keys, counted since the tail began.
    pub ferry_only: u64,
}

/// The origin as a look at its waymark's key found it.
pub type Seen = (ClusterId, OriginWaymark);

/// A key that is not there, or holds no waymark, is as good as the first one.
pub(super) fn seen_by(look: &Look) -> Seen {
    let waymark = look.kv.as_ref().and_then(|kv| OriginWaymark::from_json(&kv.value));
    (look.cluster, waymark.unwrap_or_default())
}

/// Told once etcd has created a watch, or why it did not.
pub type Opened = oneshot::Sender<Result<(), TailState>>;

/// What the shipper asks of the tail.
pub enum TailCommand {
    /// Forget the spool and watch everything after `after`; `opened` is told once etcd has created the watch. `carried`: the watch begins
    /// at this revision, to see that it and what follows up to `after` is what it was; `seen`: the watch must be of this origin, where
    /// whoever asks has looked. Not begun once nobody waits for `opened`.
    Restart { after: Revision, carried: Option<(Revision, Digest)>, seen: Option<Seen>, begins: Begins, opened: Opened },
    /// What a hello found. `seen`: the origin that it has looked at, and all watches are of. `carried`: the replica's last carried revision:
    /// where the spool holds none of its own, watches begin with it from now on, the open one too.
    Greeted { seen: Seen, carried: Option<(Revision, Digest)> },
}

/// What a spool that is begun anew is to its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begins {
    /// It goes on in the history that was followed before.
    GoesOn,
    /// What came before is brought in another way, by a base copy for one, and may have been another history.
    Afresh,
}

/// The next command that somebody still waits for: whoever gave up has decided anew since. Cancel-safe.
pub(super) async fn next_command(commands: &mut mpsc::Receiver<TailCommand>) -> Option<TailCommand> {
    loop {
        let command = commands.recv().await?;
        match &command {
            TailCommand::Restart { opened, .. } if opened.is_closed() => {}
            TailCommand::Restart { .. } | TailCommand::Greeted { .. } => return Some(command),
        }
    }
}
