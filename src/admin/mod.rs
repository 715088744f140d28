//! Job: what an operator sees of a running sidecar and asks of it: the admin service, its client, and the http listener.
//! Input: a `Directory` of the links, each with its latest status and the way to command it. Output: answers over gRPC and http.
//! Edge: owns no link; reads statuses by `watch` and asks by channel.
//! Always true: nothing here changes a link except by a `LinkCommand` or a `ReplicaCommand`; no answer holds a key or a value.

mod audit;
pub mod bundle;
mod calls;
pub mod certificates;
pub mod client;
mod commands;
mod health;
mod history;
pub mod http;
mod limits;
mod messages;
mod page;
pub mod quarantine;
pub mod refresh;
pub mod reload;
pub mod roles;
pub mod service;
pub mod show;
pub mod status_json;
mod table;
pub mod verification;
mod watching;

use crate::config::Config;
use crate::logs::Logs;
use crate::metrics::Exporter;
use crate::model::{
    CertificatesStatus, EtcdHealth, HeldBack, LinkName, LinkState, LinkStatus, Mended, Paused, Record, Seq, Side,
};
use serde::Serialize;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Generated from proto/admin.proto.
#[allow(clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("etcd_ferry.admin.v1");
}

/// What an operator may ask of a link's own task.
#[derive(Debug)]
pub enum LinkCommand {
    /// Start a new base copy; safe to repeat. The reply's error says why not, and what to do.
    Resync { allow_deletes: bool, reply: oneshot::Sender<Result<(), String>> },
    /// Compare both sides. The reply names the comparison that answers: its end is in the status once so many have ended.
    Verify { reply: oneshot::Sender<Result<u64, String>> },
    /// The same, and ship what differs.
    Repair { allow_deletes: bool, reply: oneshot::Sender<Result<u64, String>> },
}

/// What an operator may ask of a link's replica. Each reply's error says why not, and what to do.
#[derive(Debug)]
pub enum ReplicaCommand {
    /// What is kept of a quarantined revision.
    Show { seq: Seq, reply: oneshot::Sender<Result<Record, String>> },
    /// Bring its keys to what they are at the origin now; answered once they are.
    Retry { seq: Seq, reply: oneshot::Sender<Result<Mended, String>> },
    /// Forget it: its keys stay as they are.
    Discard { seq: Seq, reply: oneshot::Sender<Result<(), String>> },
    /// Let what is held back for its deletes through, once; `seq`: only if it is this one.
    Allow { seq: Option<Seq>, reply: oneshot::Sender<Result<HeldBack, String>> },
    /// Apply nothing until it is resumed. Answered with who paused it, be it before.
    Pause { by: String, reply: oneshot::Sender<Result<Paused, String>> },
    /// Apply again. Answered with who had paused it; `None`: nobody had.
    Resume { by: String, reply: oneshot::Sender<Result<Option<Paused>, String>> },
}

/// What is asked by a channel, with somebody who waits for the answer.
pub trait Command {
    /// Whoever asked has stopped waiting, and was told so.
    fn is_abandoned(&self) -> bool;
}

impl Command for LinkCommand {
    fn is_abandoned(&self) -> bool {
        match self {
            LinkCommand::Resync { reply, .. } => reply.is_closed(),
            LinkCommand::Verify { reply } | LinkCommand::Repair { reply, .. } => reply.is_closed(),
        }
    }
}

impl Command for ReplicaCommand {
    fn is_abandoned(&self) -> bool {
        match self {
            ReplicaCommand::Show { reply, .. } => reply.is_closed(),
            ReplicaCommand::Retry { reply, .. } => reply.is_closed(),
            ReplicaCommand::Discard { reply, .. } => reply.is_closed(),
            ReplicaCommand::Allow { reply, .. } => reply.is_closed(),
            ReplicaCommand::Pause { reply, .. } => reply.is_closed(),
            ReplicaCommand::Resume { reply, .. } => reply.is_closed(),
        }
    }
}

/// The next command that somebody still waits for: one that its caller was told to repeat is not carried out later, when nobody expects
/// it any more. `None`: nobody can command. Cancel-safe.
pub async fn next_command<C: Command>(commands: &mut mpsc::Receiver<C>) -> Option<C> {
    loop {
        let command = commands.recv().await?;
        if !command.is_abandoned() {
            return Some(command);
        }
    }
}

/// One link as admin knows it.
#[derive(Debug, Clone)]
pub struct LinkHandle {
    pub link: LinkName,
    pub side: Side,
    pub status: watch::Receiver<LinkStatus>,
    /// Where its task is asked to write its status now.
    pub refresh: mpsc::Sender<refresh::Asked>,
    /// The last status of its earlier task, if a reload has started it anew: what is counted goes on from there.
    pub before: Option<Arc<LinkStatus>>,
    /// `None`: this is the replica's side, or it takes none.
    pub commands: Option<mpsc::Sender<LinkCommand>>,
    /// `None`: this is the origin's side, or it takes none.
    pub replica_commands: Option<mpsc::Sender<ReplicaCommand>>,
    /// Cancelled once the link is to end here: a reload has changed it or taken it away, or the sidecar ends.
    pub stop: CancellationToken,
}

impl LinkHandle {
    /// Of a link that takes no commands, and that no earlier task had.
    pub fn new(
        (link, side): (LinkName, Side),
        status: watch::Receiver<LinkStatus>,
        refresh: mpsc::Sender<refresh::Asked>,
        stop: CancellationToken,
    ) -> Self {
        Self { link, side, status, refresh, before: None, commands: None, replica_commands: None, stop }
    }

    /// The link's latest status. A link whose task has ended is never shown as running, and one that was to end not as one that failed.
    pub fn snapshot(&self) -> LinkStatus {
        let mut status = self.status.borrow().clone();
        if self.status.has_changed().is_err() && status.state != LinkState::Stopped {
            (status.state, status.reason) = if self.stop.is_cancelled() {
                (LinkState::Connecting, "it was stopped here, by a reload or with the sidecar".to_owned())
            } else {
                let reason = "the link's task has ended: see the log, and start the sidecar again";
                (LinkState::Stopped, reason.to_owned())
            };
        }
        if let Some(before) = &self.before {
            status.count_on(before);
        }
        status
    }
}

/// Where this sidecar listens: the addresses that were really bound.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Listening {
    pub peer: SocketAddr,
    pub admin: SocketAddr,
    pub http: SocketAddr,
}

/// Everything that admin may show or command. What moves is behind the receivers.
#[derive(Debug, Clone)]
pub struct Directory {
    pub region: String,
    pub node: String,
    /// The software's.
    pub version: String,
    pub started: Instant,
    pub listening: Listening,
    pub links: watch::Receiver<Arc<[LinkHandle]>>,
    /// Where to ask for the configuration to be read again.
    pub reloads: mpsc::Sender<reload::ReloadCommand>,
    pub etcd: watch::Receiver<Vec<EtcdHealth>>,
    pub certificates: watch::Receiver<CertificatesStatus>,
}

/// What the admin service tells of this process beside its links.
#[derive(Clone)]
pub struct Own {
    /// As it is in force; a reload changes it.
    pub config: watch::Receiver<Arc<Config>>,
    pub logs: Logs,
    pub exporter: Exporter,
}

impl Own {
    pub fn config(&self) -> Arc<Config> {
        self.config.borrow().clone()
    }
}

impl Directory {
    /// The links that there are now, in the configuration's order.
    pub fn links(&self) -> Arc<[LinkHandle]> {
        self.links.borrow().clone()
    }

    /// The latest status of each.
    pub fn snapshots(&self) -> Vec<LinkStatus> {
        self.links().iter().map(LinkHandle::snapshot).collect()
    }
}

/// Why an address cannot be listened at, as far as it can be guessed.
pub fn listen_advice(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::AddrNotAvailable {
        "no interface of this machine has that address"
    } else if error.kind() == io::ErrorKind::PermissionDenied {
        "a port below 1024 needs a right (CAP_NET_BIND_SERVICE)"
    } else {
        "is another process there already?"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_command_that_nobody_waits_for_any_more_is_passed_over() {
        let (sender, mut commands) = mpsc::channel(3);
        let mut answers = Vec::new();
        for allow_deletes in [true, true, false] {
            let (reply, answer) = oneshot::channel();
            sender.try_send(LinkCommand::Resync { allow_deletes, reply }).unwrap();
            answers.push(answer);
        }
        answers.drain(..2);
        drop(sender);
        let command = next_command(&mut commands).await;
        assert!(matches!(command, Some(LinkCommand::Resync { allow_deletes: false, .. })), "{command:?}");
        assert!(next_command(&mut commands).await.is_none());
    }

    #[test]
    fn a_link_whose_task_has_ended_is_shown_as_stopped() {
        let link = LinkName::new("config").unwrap();
        let mut following = LinkStatus::new(link.clone(), Side::Origin, String::new());
        following.state = LinkState::Following;
        let (sender, status) = watch::channel(following);
        let stop = CancellationToken::new();
        let handle = LinkHandle::new((link, Side::Origin), status, refresh::channel().0, stop.clone());
        assert_eq!(handle.snapshot().state, LinkState::Following);

        drop(sender);

        assert_eq!(handle.snapshot().state, LinkState::Stopped);
        assert!(handle.snapshot().reason.contains("the link's task has ended"));
        stop.cancel();
        assert_eq!(handle.snapshot().state, LinkState::Connecting, "it was to end");
    }

    #[test]
    fn what_a_link_counts_goes_on_where_its_earlier_task_ended() {
        let link = LinkName::new("config").unwrap();
        let mut before = LinkStatus::new(link.clone(), Side::Origin, String::new());
        (before.bytes_raw, before.bytes_sent) = (100, 10);
        before.counts = [("revisions", 7), ("copies", 1)].into();
        let mut now = before.clone();
        (now.bytes_raw, now.bytes_sent) = (1, 2);
        now.counts = [("revisions", 3), ("stalls", 0)].into();
        (before.verification.runs, now.verification.runs) = (5, 1);
        let (_sender, status) = watch::channel(now);
        let handle = LinkHandle::new((link, Side::Origin), status, refresh::channel().0, CancellationToken::new());
        let handle = LinkHandle { before: Some(Arc::new(before)), ..handle };
        let seen = handle.snapshot();
        assert_eq!((seen.bytes_raw, seen.bytes_sent, seen.verification.runs), (101, 12, 6));
        assert_eq!(seen.counts, [("revisions", 10), ("copies", 1), ("stalls", 0)].into());
    }
}
