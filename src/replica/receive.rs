//! Job: answer hellos and take Ship streams: check who asks and for what, then decode and admit what comes, into the journal.
//! Input: gRPC calls of peers whose certificate is of our CA. Output: journal entries, copy steps, progress; receipts.
//! Always true: nothing but a small hello is read before the peer's name is checked; one stream a link; received never runs ahead of
//! what the journal has taken; a receipt is never held up by what waits.

use super::admit::{Admit, Refused, outside};
use super::apply::{ApplyCommand, ApplyView, HelloAnswer, HelloFacts, HelloRefused};
use super::copy::{Begin, CopyStep};
use super::dedupe::{Dedupe, State};
use super::journal::{Journal, JournalEntry, JournalError};
use crate::config::{Limits, ReceiveConfig};
use crate::model::{Change, ClusterId, Epoch, KeyRange, Ranges, Revision, Seq, Term, Waymark};
use crate::segment::feed::Appended;
use crate::tls::accept::PeerConnectInfo;
use crate::wire::frame::{self, FrameLimits};
use crate::wire::replicate::handshake_server::Handshake;
use crate::wire::replicate::refusal::Kind;
use crate::wire::replicate::replicate_server::Replicate;
use crate::wire::replicate::{
    Ack, CopyBegin, HelloReply, HelloRequest, Page, Progress, Receipt, Refusal, Reset, Shipment, receipt, shipment,
};
use crate::wire::window::{DecodeError, Decoder, WindowLimits};
use crate::wire::{self, LINK_METADATA, PROTOCOL_VERSION, SESSION_METADATA};
use bytes::Bytes;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// What the origin said last, and whether its stream is open: for the replica's status.
#[derive(Debug, Clone, Default)]
pub struct Told {
    pub connected: bool,
    pub head: Revision,
    pub lag: Duration,
    pub rpo: Duration,
    pub lag_revisions: u64,
    pub rpo_revisions: u64,
    pub at: Option<Instant>,
    /// Why the last stream ended.
    pub ended: String,
}

/// Counts since this sidecar started.
#[derive(Debug, Default)]
pub struct Counters {
    pub frames: AtomicU64,
    pub repeated: AtomicU64,
    pub resets: AtomicU64,
    pub refused: AtomicU64,
    pub bytes_raw: AtomicU64,
    pub bytes_sent: AtomicU64,
}

/// What the services know of one link.
pub struct LinkEnd {
    pub config: ReceiveConfig,
    pub limits: Limits,
    pub commands: mpsc::Sender<ApplyCommand>,
    pub view: watch::Receiver<ApplyView>,
    pub journal: Arc<Journal>,
    pub dedupe: Arc<Dedupe>,
    pub latest_session: watch::Sender<u64>,
    pub told: watch::Sender<Told>,
    pub counters: Counters,
    /// Ranges of this process's own `[[send]]` links to the same peer.
    pub sends_back: Vec<Ranges>,
    pub ranges: RangesFile,
    /// The session that the last hello opened.
    opened: Mutex<Option<Opened>>,
    /// Admission goes from one stream to the next; the lock is its hand-over.
    admit: Arc<tokio::sync::Mutex<Admit>>,
}

/// The ranges that the first hello named, kept across restarts.
pub struct RangesFile {
    path: PathBuf,
    stored: Mutex<Option<Ranges>>,
}

#[derive(Clone)]
struct Opened {
    session: [u8; 16],
    number: u64,
    ranges: Ranges,
    origin_cluster: ClusterId,
    link_back: bool,
    window: WindowLimits,
    received: Seq,
    epoch: Epoch,
    term: Term,
}

impl RangesFile {
    pub fn open(path: PathBuf) -> anyhow::Result<Self> {
        let stored = match std::fs::read(&path) {
            Ok(bytes) => {
                let pieces: Vec<(String, String)> = serde_json::from_slice(&bytes).map_err(|e| {
                    anyhow::anyhow!(
                        "{} cannot be read ({e}): remove it, and the next hello's ranges are stored",
                        path.display()
                    )
                })?;
                let piece = |(from, to): (String, String)| Some(KeyRange { from: unhex(&from)?, to: unhex(&to)? });
                let pieces: Option<Vec<KeyRange>> = pieces.into_iter().map(piece).collect();
                pieces.and_then(Ranges::from_pieces)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(anyhow::anyhow!("{}: {e}", path.display())),
        };
        Ok(Self { path, stored: Mutex::new(stored) })
    }

    pub fn get(&self) -> Option<Ranges> {
        guard(&self.stored).clone()
    }

    fn put(&self, ranges: &Ranges) -> std::io::Result<()> {
        if guard(&self.stored).as_ref() == Some(ranges) {
            return Ok(());
        }
        let pieces: Vec<(String, String)> = ranges.pieces().iter().map(|p| (hex(&p.from), hex(&p.to))).collect();
        crate::segment::write_file(&self.path, &serde_json::to_vec(&pieces)?)?;
        *guard(&self.stored) = Some(ranges.clone());
        Ok(())
    }
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<Bytes> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok())
        .collect::<Option<Vec<u8>>>()
        .map(Bytes::from)
}

/// What a link's end is made of.
pub struct LinkEndParts {
    pub config: ReceiveConfig,
    pub limits: Limits,
    pub commands: mpsc::Sender<ApplyCommand>,
    pub view: watch::Receiver<ApplyView>,
    pub journal: Arc<Journal>,
    pub dedupe: Arc<Dedupe>,
    pub latest_session: watch::Sender<u64>,
    pub told: watch::Sender<Told>,
    pub sends_back: Vec<Ranges>,
    pub ranges: RangesFile,
    pub admit: Admit,
}

impl LinkEnd {
    pub fn new(parts: LinkEndParts) -> Self {
        Self {
            config: parts.config,
            limits: parts.limits,
            commands: parts.commands,
            view: parts.view,
            journal: parts.journal,
            dedupe: parts.dedupe,
            latest_session: parts.latest_session,
            told: parts.told,
            counters: Counters::default(),
            sends_back: parts.sends_back,
            ranges: parts.ranges,
            opened: Mutex::new(None),
            admit: Arc::new(tokio::sync::Mutex::new(parts.admit)),
        }
    }

    /// What an origin may touch: what the configuration says, else what the first hello said.
    fn accepted(&self) -> Option<Ranges> {
        self.config.ranges.clone().or_else(|| self.ranges.get())
    }
}

/// Both services, over all links that this sidecar receives.
#[derive(Clone)]
pub struct Receiver {
    links: Arc<Vec<Arc<LinkEnd>>>,
    region: Arc<str>,
    node: Arc<str>,
    streams: TaskTracker,
    stop: CancellationToken,
}

impl Receiver {
    pub fn new(
        links: Vec<Arc<LinkEnd>>,
        region: &str,
        node: &str,
        streams: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        Self { links: Arc::new(links), region: region.into(), node: node.into(), streams, stop }
    }

    /// The link, if the caller's certificate bears the name that it is configured with.
    fn known<T>(&self, request: &Request<T>, link: &str) -> Result<Arc<LinkEnd>, Status> {
        let Some(peer) = request.extensions().get::<PeerConnectInfo>() else {
            return Err(Status::unauthenticated("no client certificate"));
        };
        let names = peer.identity.sans.join(", ");
        let Some(end) = self.links.iter().find(|end| end.config.link.as_str() == link) else {
            tracing::warn!(%link, remote = %peer.remote, %names, "refused: no such link to receive");
            return Err(Status::permission_denied(format!(
                "{} receives no link named {link:?}: add a [[receive]] with that name to its configuration",
                self.region
            )));
        };
        if !peer.identity.bears(&end.config.peer) {
            tracing::warn!(%link, remote = %peer.remote, %names, wanted = %end.config.peer, "refused: the peer's certificate bears another name");
            return Err(Status::permission_denied(format!(
                "link {link} takes {} only, and this certificate bears {names}: correct [[receive]] peer, or use that region's certificate",
                end.config.peer
            )));
        }
        Ok(end.clone())
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
            tracing::warn!(%link, asked = ?ranges.pieces(), accepted = ?accepted.pieces(), "refused: ranges that this replica does not accept");
            return Err(Status::permission_denied(format!(
                "link {link} may touch {:?} here, and the origin asks for {:?}: set prefixes of [[receive]] to allow it",
                accepted.pieces(),
                ranges.pieces()
            )));
        }
        for other in self.links.iter().filter(|other| other.config.link != *link) {
            if other.accepted().is_some_and(|theirs| theirs.overlaps(&ranges)) {
                tracing::warn!(%link, other = %other.config.link, "refused: overlapping ranges");
                return Err(Status::failed_precondition(format!(
                    "link {link}'s ranges overlap those of link {} at this replica: give each its own prefixes",
                    other.config.link
                )));
            }
        }
        Ok(ranges)
    }
}

#[tonic::async_trait]
impl Handshake for Receiver {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let end = self.known(&request, &request.get_ref().link)?;
        let hello = request.into_inner();
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "this sidecar speaks protocol version {PROTOCOL_VERSION}, the origin's {}: upgrade the older one",
                hello.protocol_version
            )));
        }
        let ranges = self.ranges(&end, &hello)?;
        let link_back = hello.link_back || end.sends_back.iter().any(|back| back.overlaps(&ranges));
        let number = {
            let mut number = 0;
            end.latest_session.send_modify(|latest| {
                *latest += 1;
                number = *latest;
            });
            number
        };
        let facts =
            HelloFacts { session: number, epoch: Epoch(hello.epoch), term: Term(hello.term), ranges: ranges.clone() };
        let answer = ask(&end, facts).await?;
        if end.config.ranges.is_none() && end.ranges.get().is_none() {
            end.ranges
                .put(&ranges)
                .map_err(|e| Status::unavailable(format!("the link's ranges cannot be stored: {e}")))?;
        }
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
        tracing::info!(link = %end.config.link, region = %hello.region, node = %hello.node, software = %hello.software,
            epoch = %epoch, seq = %answer.received.0, "hello");
        Ok(Response::new(HelloReply {
            protocol_version: PROTOCOL_VERSION,
            session: Bytes::copy_from_slice(&session),
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
        }))
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
        Ok(Some(Err(HelloRefused::Unavailable(reason)))) => Err(Status::unavailable(reason)),
        Ok(Some(Err(HelloRefused::Fenced(reason)))) => Err(Status::failed_precondition(format!("fenced: {reason}"))),
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
        let end = self.known(&request, &link)?;
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
        let stream = Stream {
            decoder: Decoder::new(opened.window),
            pages: FrameLimits::new(end.limits.revision_bytes_max),
            view: end.view.clone(),
            durable: end.journal.durable(),
            latest_session: end.latest_session.subscribe(),
            due: Due::default(),
            opened,
            end,
        };
        let stop = self.stop.clone();
        self.streams.spawn(async move { Box::pin(stream.run(&mut admit, request.into_inner(), out, stop)).await });
        Ok(Response::new(ReceiverStream::new(receipts)))
    }
}

/// What must be told to the origin, as soon as the way is free.
#[derive(Default)]
struct Due {
    ack: bool,
    copy: bool,
    reset: Option<Reset>,
    refusal: Option<Refusal>,
}

impl Due {
    fn any(&self) -> bool {
        self.ack || self.copy || self.reset.is_some() || self.refusal.is_some()
    }
}

/// One Ship stream.
struct Stream {
    end: Arc<LinkEnd>,
    opened: Opened,
    decoder: Decoder,
    pages: FrameLimits,
    view: watch::Receiver<ApplyView>,
    durable: watch::Receiver<Seq>,
    latest_session: watch::Receiver<u64>,
    due: Due,
}

/// What has been taken off the stream and waits for its place.
type Placing = Pin<Box<dyn Future<Output = Result<(), (Kind, String)>> + Send>>;

impl Stream {
    async fn run(
        mut self,
        admit: &mut Admit,
        mut inbound: Streaming<Shipment>,
        out: mpsc::Sender<Result<Receipt, Status>>,
        stop: CancellationToken,
    ) {
        self.end.told.send_modify(|told| {
            told.connected = true;
            told.at = Some(Instant::now());
        });
        self.due.ack = true;
        self.view.mark_changed();
        let ended = self.turns(admit, &mut inbound, &out, &stop).await;
        tracing::info!(link = %self.end.config.link, reason = %ended, "the stream has ended");
        self.end.told.send_modify(|told| {
            told.connected = false;
            told.ended = ended;
        });
    }

    async fn turns(
        &mut self,
        admit: &mut Admit,
        inbound: &mut Streaming<Shipment>,
        out: &mpsc::Sender<Result<Receipt, Status>>,
        stop: &CancellationToken,
    ) -> String {
        let mut placing: Option<Placing> = None;
        loop {
            if *self.latest_session.borrow() != self.opened.number {
                self.refuse(Kind::Closing, "a later hello took the link".to_owned());
            }
            let refused = self.due.refusal.is_some();
            tokio::select! {
                biased;
                () = stop.cancelled(), if !refused => self.refuse(Kind::Closing, "the replica's sidecar is shutting down".to_owned()),
                permit = out.reserve(), if self.due.any() => match permit {
                    Ok(permit) => {
                        let receipt = self.next_receipt(admit);
                        if let Some(receipt::What::Refusal(refusal)) = &receipt.what {
                            let reason = refusal.reason.clone();
                            permit.send(Ok(receipt));
                            return reason;
                        }
                        permit.send(Ok(receipt));
                    }
                    Err(_) => return "the origin closed the stream".to_owned(),
                },
                _ = self.latest_session.changed() => {}
                changed = self.view.changed() => {
                    if changed.is_err() {
                        return "the link has ended".to_owned();
                    }
                    self.look_at_applier(admit);
                }
                _ = self.durable.changed() => self.due.ack = true,
                placed = place(&mut placing) => {
                    placing = None;
                    if let Err((kind, reason)) = placed {
                        self.refuse(kind, reason);
                    }
                    self.due.ack = true;
                }
                message = inbound.message(), if placing.is_none() && !refused => match message {
                    Ok(Some(shipment)) => match self.take(admit, shipment) {
                        Ok(next) => placing = next,
                        Err((kind, reason)) => self.refuse(kind, reason),
                    },
                    Ok(None) => return "the origin closed the stream".to_owned(),
                    Err(status) => return format!("the stream broke: {}", crate::tls::explain(&status)),
                },
            }
        }
    }

    fn refuse(&mut self, kind: Kind, reason: String) {
        if self.due.refusal.is_none() {
            self.end.counters.refused.fetch_add(1, Ordering::Relaxed);
            self.due.refusal = Some(Refusal { kind: kind.into(), reason });
        }
    }

    fn look_at_applier(&mut self, admit: &mut Admit) {
        let view = self.view.borrow_and_update();
        self.due.ack = true;
        if view.copy_session == self.opened.number {
            self.due.copy = true;
            if view.copy.complete
                && let Some(position) = &view.position
                && position.epoch > admit.epoch().0
                && admit.open_epoch(position.epoch, position.term, Seq(0)).is_err()
            {
                tracing::error!(link = %self.end.config.link, "an older epoch was opened");
            }
        }
        let refusal = view.refusal.clone().filter(|(session, _, _)| *session == self.opened.number);
        drop(view);
        if let Some((_, kind, reason)) = refusal {
            self.refuse(kind, reason);
        }
    }

    /// Resets first, so that no acknowledgement overtakes one; a refusal last, since the stream ends with it.
    fn next_receipt(&mut self, admit: &Admit) -> Receipt {
        let what = if let Some(reset) = self.due.reset.take() {
            receipt::What::Reset(reset)
        } else if self.due.copy {
            self.due.copy = false;
            receipt::What::CopyAck(self.view.borrow().copy.clone())
        } else if self.due.ack {
            self.due.ack = false;
            receipt::What::Ack(self.ack(admit))
        } else {
            receipt::What::Refusal(self.due.refusal.clone().unwrap_or_default())
        };
        Receipt { what: Some(what) }
    }

    fn ack(&self, admit: &Admit) -> Ack {
        let view = self.view.borrow();
        let position = view.position.as_ref().filter(|p| p.epoch == admit.epoch().0);
        let applied = position.map_or(Seq(0), |p| p.seq);
        let durable = self.durable.borrow().0.max(applied.0).min(admit.received().0.max(applied.0));
        Ack {
            received_seq: admit.received().0,
            durable_seq: durable,
            applied_seq: applied.0,
            applied_origin_revision: if position.is_some() { view.applied_revision.0 } else { 0 },
            waymark: position.map(|p| p.waymark.into()),
            following: position.is_some_and(|p| p.state == crate::model::Phase::Following),
            waiting: view.waiting.clone(),
            repeated: self.end.counters.repeated.load(Ordering::Relaxed),
            transactions: view.transactions,
            conflicts: view.conflicts,
        }
    }

    /// Takes one shipment. What it leads to may have to wait for its place: the caller goes on with receipts meanwhile.
    fn take(&mut self, admit: &mut Admit, shipment: Shipment) -> Result<Option<Placing>, (Kind, String)> {
        match shipment.what {
            Some(shipment::What::Frame(frame)) => self.take_frame(admit, &frame),
            Some(shipment::What::Progress(progress)) => Ok(self.take_progress(admit, &progress)),
            Some(shipment::What::CopyBegin(begin)) => Ok(Some(self.copy_step(CopyStep::Begin(self.begin_of(begin))))),
            Some(shipment::What::KeysPage(page)) => {
                let (range, last) = (KeyRange { from: page.from.clone(), to: page.to.clone() }, page.last);
                let keys = self.kvs_of(page)?.into_iter().map(|(key, _)| key).collect();
                Ok(Some(self.copy_step(CopyStep::Keys { range, keys, last })))
            }
            Some(shipment::What::Page(page)) => {
                let range = KeyRange { from: page.from.clone(), to: page.to.clone() };
                let revision = Revision(page.revision);
                let kvs = self.kvs_of(page)?;
                Ok(Some(self.copy_step(CopyStep::Page { range, revision, kvs })))
            }
            Some(shipment::What::CopyEnd(end)) => {
                Ok(Some(self.copy_step(CopyStep::End { anchor_revision: Revision(end.anchor_revision) })))
            }
            None => Ok(None),
        }
    }

    fn take_frame(&mut self, admit: &mut Admit, frame: &Bytes) -> Result<Option<Placing>, (Kind, String)> {
        let counters = &self.end.counters;
        counters.frames.fetch_add(1, Ordering::Relaxed);
        counters.bytes_sent.fetch_add(frame.len() as u64, Ordering::Relaxed);
        let decoded = match self.decoder.decode(frame) {
            Ok(decoded) => decoded,
            // Frames that were on their way before the origin heard of the reset.
            Err(DecodeError::NotFresh) => return Ok(None),
            Err(e) => {
                counters.resets.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(link = %self.end.config.link, error = %e, "a frame cannot be decoded; asking for a fresh window");
                self.due.reset = Some(Reset { after_seq: admit.received().0, reason: e.to_string() });
                return Ok(None);
            }
        };
        counters.bytes_raw.fetch_add(decoded.plain_bytes as u64, Ordering::Relaxed);
        if let Some(whole) = decoded.revisions.iter().find(|whole| outside(&self.opened.ranges, whole)) {
            return Err((
                Kind::Outside,
                format!("revision {} changes a key outside of the link's ranges", whole.revision),
            ));
        }
        let repeated =
            admit.admit_frame(decoded.epoch, decoded.term, decoded.seq_first, &decoded.digests).map_err(|refused| {
                let kind = match refused {
                    Refused::Gap { .. } => Kind::Gap,
                    Refused::Fenced { .. } => Kind::Fenced,
                    Refused::Conflict { .. } => Kind::Conflict,
                };
                (kind, refused.to_string())
            })?;
        counters.repeated.fetch_add(repeated as u64, Ordering::Relaxed);
        let seqs = (decoded.seq_first.0..).map(Seq);
        let received = seqs.zip(decoded.revisions.into_iter().zip(decoded.digests)).skip(repeated);
        let entries: Vec<JournalEntry> = received
            .map(|(seq, (whole, digest))| JournalEntry { epoch: decoded.epoch, seq, revision: Arc::new(whole), digest })
            .collect();
        if entries.is_empty() {
            self.due.ack = true;
            return Ok(None);
        }
        Ok(Some(Box::pin(journal_all(self.end.clone(), entries))))
    }

    fn take_progress(&mut self, admit: &Admit, progress: &Progress) -> Option<Placing> {
        self.end.told.send_modify(|told| {
            told.head = Revision(progress.head_revision);
            told.lag = Duration::from_millis(progress.lag_ms);
            told.rpo = Duration::from_millis(progress.rpo_ms);
            told.lag_revisions = progress.lag_revisions;
            told.rpo_revisions = progress.rpo_revisions;
            told.at = Some(Instant::now());
        });
        self.due.ack = true;
        if progress.origin_revision == 0 {
            return None;
        }
        let command = ApplyCommand::Progress {
            through: Revision(progress.origin_revision),
            after: admit.received(),
            waymark: progress.waymark.map(Waymark::from).unwrap_or_default(),
            persist: progress.persist,
        };
        Some(self.command(command))
    }

    fn copy_step(&self, step: CopyStep) -> Placing {
        self.command(ApplyCommand::Copy { session: self.opened.number, step })
    }

    fn command(&self, command: ApplyCommand) -> Placing {
        let commands = self.end.commands.clone();
        Box::pin(async move {
            commands
                .send(command)
                .await
                .map_err(|_| (Kind::Closing, "the replica's sidecar is shutting down".to_owned()))
        })
    }

    fn begin_of(&self, begin: CopyBegin) -> Begin {
        Begin {
            epoch: Epoch(begin.epoch),
            term: Term(begin.term),
            origin_cluster: self.opened.origin_cluster,
            anchor: Revision(begin.anchor_revision),
            waymark: begin.waymark.map(Waymark::from).unwrap_or_default(),
            allow_deletes: begin.allow_deletes,
            origin_empty: begin.origin_empty,
            guard_pass: begin.guard_pass,
            keys_total: begin.keys_total,
            resume: begin.resume,
            deletes_share_max: begin.deletes_share_max,
            link_back: self.opened.link_back,
        }
    }

    /// A page's keys and values, checked against the ranges.
    fn kvs_of(&self, page: Page) -> Result<Vec<(Bytes, Bytes)>, (Kind, String)> {
        let counters = &self.end.counters;
        counters.bytes_sent.fetch_add(page.frame.len() as u64, Ordering::Relaxed);
        // A page that cannot be decoded is asked for again by a new hello: the copy goes on at its cursor.
        let decoded = frame::decode_standalone(&page.frame, &self.pages)
            .map_err(|e| (Kind::Gap, format!("a page of the base copy cannot be decoded: {e}")))?;
        counters.bytes_raw.fetch_add(decoded.plain_bytes as u64, Ordering::Relaxed);
        let range = KeyRange { from: page.from, to: page.to };
        if decoded.revisions.iter().any(|whole| outside(&self.opened.ranges, whole)) {
            return Err((Kind::Outside, "a page of the base copy holds a key outside of the link's ranges".to_owned()));
        }
        let changes = decoded.revisions.into_iter().flat_map(|whole| whole.changes);
        let kv = |change| match change {
            Change::Put { key, value } if range.contains(&key) => Ok((key, value)),
            Change::Put { .. } | Change::Delete { .. } => {
                Err((Kind::Gap, "a page of the base copy is not what it says".to_owned()))
            }
        };
        changes.map(kv).collect()
    }
}

async fn place(placing: &mut Option<Placing>) -> Result<(), (Kind, String)> {
    match placing {
        Some(placing) => placing.as_mut().await,
        None => std::future::pending().await,
    }
}

/// Puts admitted revisions into the journal, waiting for room; and into the dedupe log beside it.
async fn journal_all(end: Arc<LinkEnd>, entries: Vec<JournalEntry>) -> Result<(), (Kind, String)> {
    let failed = |e: JournalError| (Kind::Closing, format!("the replica's journal: {e}"));
    let Some(epoch) = entries.first().map(|e| e.epoch) else { return Ok(()) };
    let notes = entries.iter().map(|e| (e.seq, e.digest, e.revision.revision)).collect();
    let mut waiting = entries;
    loop {
        match end.journal.append(waiting).await.map_err(failed)? {
            Appended::Taken => break,
            Appended::Full(back) => {
                waiting = back;
                end.journal.room().await.map_err(failed)?;
            }
        }
    }
    // A dedupe log that cannot be written costs the sight of conflicts with old seqs, never a revision.
    let _ = end.dedupe.note(epoch, notes, State::Pending).await;
    Ok(())
}
