//! Job: what the tail of the origin's etcd shows of itself, and what it is asked.
//! Input: the shipper's commands. Output: a `TailView`.
//! Edge: a channel; who watches is watch.rs.
//! Always true: a command that nobody waits for any more is not carried out.

use crate::model::{Digest, Revision};
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
    /// Everything up to it that the link carries is in the spool.
    pub covered: Revision,
    /// From this revision on, what the spool holds is in the history that the open watch shows.
    pub proven_from: Option<Revision>,
    /// Revisions up to `covered` that touched nothing but etcd-ferry's own keys, counted since the tail began.
    pub ferry_only: u64,
}

/// Told once etcd has created a watch, or why it did not.
pub type Opened = oneshot::Sender<Result<(), TailState>>;

/// What the shipper asks of the tail.
pub enum TailCommand {
    /// Forget the spool and watch everything after `after`; `opened` is told once etcd has created the watch. `carried`: the watch begins
    /// at this revision, to see that it and what follows up to `after` is what it was. Not begun once nobody waits for `opened`.
    Restart { after: Revision, carried: Option<(Revision, Digest)>, begins: Begins, opened: Opened },
    /// The replica's last carried revision: where the spool holds none of its own, watches begin with it from now on, the open one too.
    Carried((Revision, Digest)),
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
            TailCommand::Restart { .. } | TailCommand::Carried(_) => return Some(command),
        }
    }
}
