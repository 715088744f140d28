//! Job: answer hellos and open Ship streams: check who asks, for which link and ranges.
//! Input: gRPC calls of peers whose certificate is of our CA. Output: sessions, streams, refusals with their reason.
//! Edge: the services; what a link's stream does is in stream.rs.
//! Always true: nothing but a small hello is read before the peer's name is checked; one stream a link.

use super::admit::Admit;
use super::dedupe::Dedupe;
use super::journal::Journal;
use super::position::{HelloAnswer, HelloFacts, HelloRefused};
use super::ranges::{RangesFile, guard, hex};
use super::stream::Stream;
use super::told::Told;
use super::view::{ApplyCommand, ApplyView};
use crate::config::{Limits, ReceiveConfig};
use crate::etcd::gate::{ClusterLimits, Gate};
use crate::failpoint;
use crate::model::limits::{ReplicaLimits, TxnLimits};
use crate::model::{ClusterId, Epoch, KeyRange, LinkName, Ranges, Revision, Seq, Term};
use crate::repeats::Repeats;
use crate::tls::accept::{LastTurnedAway, PeerConnectInfo, TurnedAway};
use crate::wire::frame::FrameLimits;
use crate::wire::replicate::handshake_server::Handshake;
use crate::wire::replicate::replicate_server::Replicate;
use crate::wire::replicate::{HelloReply, HelloRequest, Receipt, Shipment};
use crate::wire::window::WindowLimits;
use crate::wire::{self, LINK_METADATA, PROTOCOL_VERSION, SESSION_METADATA, cut_text};
use bytes::Bytes;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

/// The applier answers a hello once etcd has; etcd's own calls end within 10 s.
const HELLO_DEADLINE: Duration = Duration::from_secs(14);
/// An earlier stream of the link ends within this time once a later hello was answered.
const HANDOVER_DEADLINE: Duration = Duration::from_secs(10);
const RECEIPTS_MAX: usize = 4;

/// Counts since this sidecar started.
#[derive(Debug, Default)]
pub struct Counters {
    pub frames: AtomicU64,
    /// All that was taken off streams, frames among them.
    pub shipments: AtomicU64,
    pub repeated: AtomicU64,
    pub resets: AtomicU64,
    pub damaged: AtomicU64,
    pub refused: AtomicU64,
    pub bytes_raw: AtomicU64,
    pub bytes_sent: AtomicU64,
}

/// What the services know of one link.
pub struct LinkEnd {
    pub config: ReceiveConfig,
    pub etcd: Arc<Gate>,
    pub limits: Limits,
    pub commands: mpsc::Sender<ApplyCommand>,
    pub view: watch::Receiver<ApplyView>,
    pub journal: Arc<Journal>,
    pub dedupe: Arc<Dedupe>,
    /// The last session whose hello was answered: every other stream of the link ends.
    pub latest_session: watch::Sender<u64>,
    /// Changes when applying stands still and another hello may help: the open stream ends.
    pub hello_again: watch::Sender<()>,
    /// The last hello that came; each takes the next number.
    pub hellos: watch::Sender<u64>,
    pub told: watch::Sender<Told>,
    /// The replica's revision at which both sides were proved equal, once that closed what somebody else had written: other sidecars are to know.
    pub closed: watch::Sender<Revision>,
    pub counters: Counters,
    /// Somebody else wrote here, and that is to be mended; set by the lookout.
    pub repair_wanted: AtomicBool,
    /// Ranges of this process's own `[[send]]` links to the same peer.
    pub sends_back: Vec<Ranges>,
    /// What the first hello named: where the configuration does not say what is accepted, no later one may touch more.
    pub ranges: RangesFile,
    /// What the last hello named, which is what the link carries: less, where its origin was narrowed.
    pub carried: RangesFile,
    /// The session that the last hello opened.
    pub(super) opened: Mutex<Option<Opened>>,
    /// Admission goes from one stream to the next; the lock is its hand-over.
    pub(super) admit: Arc<tokio::sync::Mutex<Admit>>,
    /// Ends the link's streams.
    pub stop: CancellationToken,
}

#[derive(Clone)]
pub(super) struct Opened {
    pub(super) session: [u8; 16],
    pub(super) number: u64,
    pub(super) ranges: Ranges,
    pub(super) origin_cluster: ClusterId,
    pub(super) link_back: bool,
    pub(super) window: WindowLimits,
    pub(super) received: Seq,
    pub(super) epoch: Epoch,
    pub(super) term: Term,
}

impl LinkEnd {
    /// Returns once no stream of the link is open; one that comes later, after `stop`, ends at once. Cancel-safe.
    pub async fn stream_ended(&self) {
        drop(self.admit.lock().await);
    }

    /// Whether a link back exists over the ranges; `None`: no hello has said it yet.
    pub(super) fn link_back(&self) -> Option<bool> {
        guard(&self.opened).as_ref().map(|opened| opened.link_back)
    }

    /// What the replica takes: `etcd` as its cluster's members were asked.
    pub(super) fn limits(&self, etcd: ClusterLimits) -> ReplicaLimits {
        let known = |limit: usize| u64::try_from(limit).ok();
        let Limits { txn_ops_max, request_bytes_max, .. } = self.limits;
        let sidecar = TxnLimits { txn_ops_max: known(txn_ops_max), request_bytes_max: known(request_bytes_max) };
        ReplicaLimits { etcd: etcd.least, sidecar }
    }

    /// What the link carries, as far as any hello has said it.
    pub(super) fn carried(&self) -> Option<Ranges> {
        self.carried.get().or_else(|| self.ranges.get())
    }

    /// What an origin may touch: what the configuration says, else what the first hello said.
    fn accepted(&self) -> Option<Ranges> {
        self.config.ranges.clone().or_else(|| self.ranges.get())
    }
}

/// Both services, over all links that this sidecar receives.
#[derive(Clone)]
pub struct Receiver {
    /// Those that there are now.
    links: watch::Receiver<Vec<Arc<LinkEnd>>>,
    turned_away: LastTurnedAway,
    region: Arc<str>,
    node: Arc<str>,
    streams: TaskTracker,
    /// Held while a first hello's ranges are compared with the other links' and stored.
    storing: Arc<Mutex<()>>,
    refusals: Arc<Mutex<Repeats>>,
}

impl Receiver {
    pub fn new(
        links: watch::Receiver<Vec<Arc<LinkEnd>>>,
        turned_away: LastTurnedAway,
        region: &str,
        node: &str,
        streams: TaskTracker,
    ) -> Self {
        let (storing, refusals) = (Arc::default(), Arc::default());
        Self { links, turned_away, region: region.into(), node: node.into(), streams, storing, refusals }
    }

    /// An origin whose hello is refused says it again within seconds.
    fn log_refusal(&self, from: Option<&PeerConnectInfo>, link: &str, status: &Status) {
        let remote = from.map(|from| from.remote);
        let names = from.map(|from| from.identity.sans.join(", ")).unwrap_or_default();
        let (link, reason) = (cut_text(link.to_owned()), status.message());
        let words = format!("{:?} {link} {names} {reason}", remote.map(|remote| remote.ip()));
        guard(&self.refusals).write(Instant::now().into_std(), &words, |left_out| {
            let remote = remote.map(tracing::field::display);
            tracing::warn!(%link, remote, %names, %reason, left_out, "a call is refused");
        });
    }

    /// The link, if the caller's certificate bears the name that it is configured with.
    fn known<T>(&self, request: &Request<T>, link: &str) -> Result<Arc<LinkEnd>, Status> {
        let Some(peer) = request.extensions().get::<PeerConnectInfo>() else {
            return Err(Status::unauthenticated("no client certificate"));
        };
        let end = self.links.borrow().iter().find(|end| end.config.link.as_str() == link).cloned();
        let Some(end) = end else {
            let reason = format!(
                "it asked for the link {:?}, which is not among those received here",
                cut_text(link.to_owned())
            );
            self.turned_away.send_replace(Some(TurnedAway::now(peer.remote, reason)));
            return Err(Status::permission_denied(format!(
                "{} receives no link named {link:?}: add a [[receive]] with that name to its configuration",
                self.region
            )));
        };
        if end.stop.is_cancelled() {
            let why = "is stopped here, with its sidecar or by a reload of the configuration: the next hello tells";
            return Err(Status::unavailable(format!("link {link} {why}")));
        }
        if !peer.identity.bears(&end.config.peer) {
            let refused = Status::permission_denied(format!(
                "link {link} takes {} only, and this certificate bears {}: correct [[receive]] peer, or use that region's certificate",
                end.config.peer,
                peer.identity.sans.join(", ")
            ));
            end.told.send_modify(|told| told.refused(&refused));
            return Err(refused);
        }
        Ok(end)
    }

    /// The ranges of a hello, if this replica takes them.
    fn ranges(&self, end: &LinkEnd, hello: &HelloRequest) -> Result<Ranges, Status> {
        let pieces = hello.ranges.iter().map(|r| KeyRange { from: r.from.clone(), to: r.to.clone() }).collect();
        let Some(ranges) = Ranges::from_pieces(pieces) else {
            return Err(Status::invalid_argument(
                "the hello's ranges are not sorted, disjoint, and clear of /etcd-ferry/",
            ));
        };
        let link = &end.config.link;
        if let Some(accepted) = end.accepted()
            && !accepted.covers(&ranges)
        {
            return Err(Status::permission_denied(format!(
                "link {link} may touch {accepted} here, and the origin asks for {ranges}: set prefixes of [[receive]] to allow it"
            )));
        }
        self.check_overlaps(link, &ranges)?;
        Ok(ranges)
    }

    fn check_overlaps(&self, link: &LinkName, ranges: &Ranges) -> Result<(), Status> {
        for other in self.links.borrow().iter().filter(|other| other.config.link != *link) {
            if other.accepted().is_some_and(|theirs| theirs.overlaps(ranges)) {
                return Err(Status::failed_precondition(format!(
                    "link {link}'s ranges overlap those of link {} at this replica: give each its own prefixes",
                    other.config.link
                )));
            }
        }
        Ok(())
    }

    /// Keeps a hello's ranges: applier and lookout need them after a restart, before an origin says hello again. Where the
    /// configuration names none, the first hello's stand for what is accepted; they are compared again, since two links' may come at once.
    fn store_ranges(&self, end: &LinkEnd, ranges: &Ranges) -> Result<(), Status> {
        let _storing = guard(&self.storing);
        let unstored = |e| Status::unavailable(format!("the link's ranges cannot be stored: {e}"));
        if end.config.ranges.is_none() && end.ranges.get().is_none() {
            self.check_overlaps(&end.config.link, ranges)?;
        }
        if end.config.ranges.is_some() || end.ranges.get().is_none() {
            end.ranges.put(ranges).map_err(unstored)?;
        }
        end.carried.put(ranges).map_err(unstored)
    }

    /// `session`: empty where none was opened.
    fn reply(&self, end: &LinkEnd, answer: &HelloAnswer, session: &[u8], link_back: bool) -> HelloReply {
        HelloReply {
            protocol_version: PROTOCOL_VERSION,
            session: Bytes::copy_from_slice(session),
            replica_cluster: answer.replica_cluster.0,
            position: answer.position.as_ref().map(|p| Bytes::from(p.to_json())).unwrap_or_default(),
            received_seq: answer.received.0.0,
            received_revision: answer.received.1.0,
            received_digest: Bytes::copy_from_slice(&answer.received.2.0),
            durable_seq: answer.durable.0,
            window_bytes_max: end.limits.window_bytes_max as u64,
            frame_bytes_max: end.limits.frame_bytes_max as u64,
            ranges_empty: answer.ranges_empty,
            link_back,
            region: self.region.to_string(),
            node: self.node.to_string(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
            fenced: answer.fenced,
        }
    }
}

#[tonic::async_trait]
impl Handshake for Receiver {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let (from, link) = (request.extensions().get::<PeerConnectInfo>().cloned(), request.get_ref().link.clone());
        let answered = match self.known(&request, &link) {
            Ok(end) => {
                let answered = self.answer(&end, request.into_inner()).await;
                if let Err(status) = &answered {
                    end.told.send_modify(|told| told.refused(status));
                }
                answered
            }
            Err(status) => Err(status),
        };
        if let Err(status) = &answered {
            self.log_refusal(from.as_ref(), &link, status);
        }
        answered.map(Response::new)
    }
}

impl Receiver {
    /// Answers a hello, and opens a session for it.
    async fn answer(&self, end: &Arc<LinkEnd>, hello: HelloRequest) -> Result<HelloReply, Status> {
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "this sidecar speaks protocol version {PROTOCOL_VERSION}, the origin's {}: upgrade the older one",
                hello.protocol_version
            )));
        }
        let ranges = self.ranges(end, &hello)?;
        let link_back = hello.link_back || end.sends_back.iter().any(|back| back.overlaps(&ranges));
        let number = {
            let mut number = 0;
            end.hellos.send_modify(|latest| {
                *latest += 1;
                number = *latest;
            });
            number
        };
        let facts = HelloFacts {
            session: number,
            node: hello.node.clone(),
            epoch: Epoch(hello.epoch),
            term: Term(hello.term),
            origin_cluster: ClusterId(hello.origin_cluster),
            ranges: ranges.clone(),
            link_back,
        };
        let answer = ask(end, facts).await?;
        if answer.fenced {
            tracing::info!(link = %end.config.link, region = %hello.region, node = %hello.node, term = hello.term, "hello fenced");
            return Ok(self.reply(end, &answer, &[], link_back));
        }
        self.store_ranges(end, &ranges)?;
        // Not before: a sender that is refused changes nothing for the one that ships.
        end.latest_session.send_modify(|latest| *latest = number.max(*latest));
        let session: [u8; 16] = rand::random();
        let window = WindowLimits {
            window_bytes_max: wire::lesser(end.limits.window_bytes_max, hello.window_bytes_max),
            frame: FrameLimits::new(end.limits.revision_bytes_max),
        };
        let epoch = answer.position.as_ref().map_or(Epoch(0), |p| p.epoch);
        *guard(&end.opened) = Some(Opened {
            session,
            number,
            ranges,
            origin_cluster: ClusterId(hello.origin_cluster),
            link_back,
            window,
            received: answer.received.0,
            epoch,
            term: Term(hello.term),
        });
        end.told.send_modify(|told| told.shipper.clone_from(&hello.node));
        tracing::info!(link = %end.config.link, region = %hello.region, node = %hello.node, software = %hello.software,
            epoch = %epoch, term = hello.term, seq = %answer.received.0, "hello");
        failpoint::reach("session-opened");
        Ok(self.reply(end, &answer, &session, link_back))
    }
}

async fn ask(end: &LinkEnd, facts: HelloFacts) -> Result<HelloAnswer, Status> {
    let (reply, answer) = oneshot::channel();
    let asking = async {
        end.commands.send(ApplyCommand::Hello { facts, reply }).await.ok()?;
        answer.await.ok()
    };
    match tokio::time::timeout(HELLO_DEADLINE, asking).await {
        Ok(Some(Ok(answer))) => Ok(answer),
        Ok(Some(Err(HelloRefused(reason)))) => Err(Status::unavailable(reason)),
        Ok(None) => Err(Status::unavailable("the replica's sidecar is shutting down")),
        Err(_) => {
            let waiting = end.view.borrow().waiting.clone();
            let why =
                if waiting.is_empty() { "the replica's etcd does not answer in time".to_owned() } else { waiting };
            Err(Status::unavailable(why))
        }
    }
}

#[tonic::async_trait]
impl Replicate for Receiver {
    type ShipStream = ReceiverStream<Result<Receipt, Status>>;

    async fn ship(&self, request: Request<Streaming<Shipment>>) -> Result<Response<Self::ShipStream>, Status> {
        let text =
            |name: &str| request.metadata().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        let (link, session) = (text(LINK_METADATA), text(SESSION_METADATA));
        let end = self.known(&request, &link).inspect_err(|status| {
            self.log_refusal(request.extensions().get::<PeerConnectInfo>(), &link, status);
        })?;
        let opened = guard(&end.opened).clone().filter(|o| hex(&o.session) == session);
        let Some(opened) = opened else {
            return Err(Status::failed_precondition(
                "no hello opened this session, or a later one took the link: say hello again",
            ));
        };
        let admit = tokio::time::timeout(HANDOVER_DEADLINE, end.admit.clone().lock_owned()).await;
        let Ok(mut admit) = admit else {
            return Err(Status::unavailable("an earlier stream of the link has not ended yet"));
        };
        // A position that went back to an older epoch (a restored replica) starts afresh.
        if admit.open_epoch(opened.epoch, opened.term, opened.received).is_err() {
            *admit = Admit::new(opened.epoch, opened.term, opened.received, []);
        }
        let (out, receipts) = mpsc::channel(RECEIPTS_MAX);
        let stop = end.stop.clone();
        self.streams.spawn(async move {
            Box::pin(Stream::run(end, opened, &mut admit, request.into_inner(), out, stop)).await;
        });
        Ok(Response::new(ReceiverStream::new(receipts)))
    }
}
