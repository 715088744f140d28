//! Job: ask a link's own task what an admin call asks for.
//! Input: a call, the links that there are. Output: a command to the link's task; its answer, or why there is none.
//! Edge: asks by channel, within a time.
//! Always true: a link is asked at the side that can do it, or the caller is told which side that is; what was asked is in the log.

use super::audit::audited;
use super::calls::Service;
use super::messages::verification_message;
use super::proto::{QuarantinedRequest, Verification};
use super::{LinkCommand, LinkHandle, ReplicaCommand};
use crate::model::{LinkStatus, Seq, Side};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// A link's task answers a command at once or says that it is busy; the client gives up after 10 s.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(8);

/// What a link says of itself.
pub(super) type Told = watch::Receiver<LinkStatus>;

/// Tells how far a comparison is, until its end is told or nobody listens.
async fn tell_verification(link: String, run: u64, mut status: Told, out: mpsc::Sender<Result<Verification, Status>>) {
    let mut told = None;
    loop {
        let now = status.borrow_and_update().verification.clone();
        let ended = now.runs >= run;
        if told.as_ref() != Some(&now) {
            told = Some(now.clone());
            if out.send(Ok(verification_message(now))).await.is_err() {
                return;
            }
        }
        if ended {
            return;
        }
        tokio::select! {
            biased;
            () = out.closed() => return,
            changed = status.changed() => if changed.is_err() {
                let gone = format!("link {link}'s task has ended: see the log of the sidecar");
                let _ = out.send(Err(Status::unavailable(gone))).await;
                return;
            }
        }
    }
}

impl Service {
    /// Asks the link's task for a comparison, and tells how it goes.
    pub(super) async fn compare<T>(
        &self,
        request: &Request<T>,
        call: &str,
        link: &str,
        build: impl FnOnce(oneshot::Sender<Result<u64, String>>) -> LinkCommand,
    ) -> Result<Response<ReceiverStream<Result<Verification, Status>>>, Status> {
        let asked = commands(&self.directory.links(), (link, Side::Origin), |handle| handle.commands.clone());
        let begun = async {
            let (commands, status) = asked?;
            Ok((command(&commands, link, build).await?, status))
        };
        let (run, status) = audited(request, call, link, begun).await?;
        let (out, words) = mpsc::channel(1);
        self.go_on(tell_verification(link.to_owned(), run, status, out));
        Ok(Response::new(ReceiverStream::new(words)))
    }
}

impl Service {
    /// Asks a link's replica, and says so in the log as `call`.
    pub(super) async fn at_replica<R, T>(
        &self,
        request: &Request<R>,
        call: &str,
        link: &str,
        build: impl FnOnce(oneshot::Sender<Result<T, String>>) -> ReplicaCommand,
    ) -> Result<T, Status> {
        let asked = commands(&self.directory.links(), (link, Side::Replica), |handle| handle.replica_commands.clone());
        audited(request, call, link, async { command(&asked?.0, link, build).await }).await
    }

    /// Asks a link's replica about one revision in quarantine.
    pub(super) async fn quarantined<T>(
        &self,
        request: &Request<QuarantinedRequest>,
        call: &str,
        build: impl FnOnce(Seq, oneshot::Sender<Result<T, String>>) -> ReplicaCommand,
    ) -> Result<T, Status> {
        let QuarantinedRequest { link, seq } = request.get_ref();
        self.at_replica(request, &format!("{call} {seq}"), link, |reply| build(Seq(*seq), reply)).await
    }
}

/// Where to send a command for this link, or why it cannot be sent from here.
pub(super) fn commands<C>(
    links: &[LinkHandle],
    (name, asked): (&str, Side),
    sender: impl Fn(&LinkHandle) -> Option<mpsc::Sender<C>>,
) -> Result<(mpsc::Sender<C>, Told), Status> {
    let named: Vec<&LinkHandle> = links.iter().filter(|handle| handle.link.as_str() == name).collect();
    let taken = |handle: &&LinkHandle| Some((sender(handle)?, handle.status.clone()));
    if let Some(commands) = named.iter().find_map(taken) {
        return Ok(commands);
    }
    if let Some(handle) = named.iter().find(|handle| handle.side == asked) {
        let status = handle.snapshot();
        return Err(Status::unavailable(format!("link {name} is {}: {}", status.state.as_str(), status.reason)));
    }
    if let Some(handle) = named.first() {
        let side = handle.side.as_str();
        let peer = handle.status.borrow().peer.clone();
        let reason = format!("this sidecar is the {side} of link {name}: ask the sidecar at its other side ({peer})");
        return Err(Status::failed_precondition(reason));
    }
    let mut known: Vec<&str> = links.iter().map(|handle| handle.link.as_str()).collect();
    known.dedup();
    Err(Status::not_found(format!("there is no link {name:?} here; there are: {}", known.join(", "))))
}

/// Asks a link's task and waits for its answer.
pub(super) async fn command<T, C>(
    commands: &mpsc::Sender<C>,
    link: &str,
    build: impl FnOnce(oneshot::Sender<Result<T, String>>) -> C,
) -> Result<T, Status> {
    let ended = || Status::unavailable(format!("link {link}'s task has ended: see the log of the sidecar"));
    let refused = |reason: String| Status::failed_precondition(format!("link {link}: {reason}"));
    let (reply, answer) = oneshot::channel();
    let exchange = async {
        commands.send(build(reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?.map_err(refused)
    };
    let busy = || {
        Status::unavailable(format!("link {link} is busy and did not answer yet: see its status, then repeat the call"))
    };
    tokio::time::timeout(COMMAND_TIMEOUT, exchange).await.unwrap_or_else(|_| Err(busy()))
}
