//! Job: a man in the middle whom both sides trust, and whose memory is bad: TLS ends here, and bits of the gRPC messages flip.
//! Input: connections of the origin's sidecar, certificates of both regions, what to aim at. Output: the same HTTP/2 frames, with bits flipped;
//! or with messages put in that neither side has sent.
//! Always true: frame headers, header blocks and the five bytes before each gRPC message pass unharmed, so what is hit is what the sidecars
//! say to each other; the same seed aims in the same way.

use super::sidecar::region_name;
use bytes::{BufMut, Bytes, BytesMut};
use etcd_ferry::config::{EtcdConfig, TlsConfig};
use etcd_ferry::tls::{Certificates, client_config};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustls::pki_types::ServerName;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
const MESSAGE_HEADER_BYTES: usize = 5;
/// What follows each message: crc32c, little-endian.
const CHECKSUM_BYTES: u32 = 4;
/// The flag of the last frame of a stream.
const END_STREAM: u8 = 0x1;
/// What hellos and their answers begin with, and nothing in a Ship stream does.
const HELLO_TAG: u8 = 0x08;

/// Which bytes may be hit: those of messages that begin with `tag`, from byte `from` to before byte `to`, but for the last `tail`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aim {
    to_target: bool,
    tag: u8,
    from: u32,
    to: u32,
    tail: u32,
    /// The message's checksum is made anew: the bit flipped before the sender had sealed it.
    sealed: bool,
}

impl Aim {
    /// Frames of revisions, after the shipment's tag and length; the checksum of the message says nothing of it.
    pub const SEALED_FRAMES: Aim =
        Aim { to_target: true, tag: 0x0a, from: 6, to: u32::MAX, tail: CHECKSUM_BYTES, sealed: true };
    /// The same, on the way.
    pub const FRAMES: Aim = Aim { to_target: true, tag: 0x0a, from: 6, to: u32::MAX, tail: 0, sealed: false };
    /// Frames in the pages of a base copy, after the page's two keys and before its last field.
    pub const PAGES: Aim = Aim { to_target: true, tag: 0x2a, from: 300, to: u32::MAX, tail: 4, sealed: false };
    /// Acknowledgements.
    pub const ACKS: Aim = Aim { to_target: false, tag: 0x0a, from: 0, to: u32::MAX, tail: 0, sealed: false };
    /// Who asks, and for what.
    pub const HELLOS: Aim = Aim { to_target: true, tag: 0x08, from: 0, to: u32::MAX, tail: 0, sealed: false };
    /// What a hello is answered: the position, and where to go on.
    pub const HELLO_REPLIES: Aim = Aim { to_target: false, tag: 0x08, from: 0, to: u32::MAX, tail: 0, sealed: false };
    /// What the origin says of itself while no frame does.
    pub const PROGRESS: Aim = Aim { to_target: true, tag: 0x12, from: 0, to: u32::MAX, tail: 0, sealed: false };
    /// The first bytes of a base copy's pages: from where to where.
    pub const PAGE_BOUNDS: Aim = Aim { to_target: true, tag: 0x2a, from: 0, to: 80, tail: 0, sealed: false };
}

struct Plan {
    random: StdRng,
    aim: Aim,
    bytes_between: u64,
    flips_left: u64,
    /// Bytes that may be hit until one is.
    next: u64,
    flips: u64,
    /// What comes behind each message of a Ship stream.
    stranger: Option<Bytes>,
    /// How often it came, to the origin and to the replica.
    strangers: [u64; 2],
}

impl Plan {
    fn new(random: StdRng, aim: Aim, bytes_between: u64) -> Self {
        Self { random, aim, bytes_between, flips_left: 0, next: 0, flips: 0, stranger: None, strangers: [0, 0] }
    }

    /// Puts the stranger behind the last frame of a message, in a frame of its own.
    fn put_in(&mut self, to_target: bool, stream: u32, frame: &mut BytesMut) {
        let Some(stranger) = &self.stranger else { return };
        let message_bytes = stranger.len() as u64 + u64::from(CHECKSUM_BYTES);
        frame.put_uint(MESSAGE_HEADER_BYTES as u64 + message_bytes, 3);
        // Data, without a flag.
        frame.put_slice(&[0, 0]);
        frame.put_u32(stream);
        // Not compressed.
        frame.put_u8(0);
        frame.put_uint(message_bytes, 4);
        frame.put_slice(stranger);
        frame.put_u32_le(crc32c::crc32c(stranger));
        self.strangers[usize::from(to_target)] += 1;
    }

    /// Takes one byte that may be hit.
    fn pass(&mut self, byte: &mut u8) {
        if self.flips_left == 0 {
            return;
        }
        if self.next > 0 {
            self.next -= 1;
            return;
        }
        *byte ^= 1 << self.random.random_range(0..8);
        self.flips += 1;
        self.flips_left -= 1;
        self.next = self.random.random_range(0..2 * self.bytes_between);
    }
}

#[derive(Clone)]
struct Middle {
    target: SocketAddr,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    plan: Arc<Mutex<Plan>>,
}

/// A running man in the middle on a loopback port; ends when dropped.
pub struct Bender {
    address: SocketAddr,
    plan: Arc<Mutex<Plan>>,
    task: JoinHandle<()>,
}

impl Bender {
    /// Stands between `origin` and `replica`, whose certificates are in `certs`; flips nothing yet.
    pub async fn start(target: SocketAddr, certs: &Path, origin: &str, replica: &str) -> Self {
        let tls = |region: &str| TlsConfig {
            ca: certs.join("ca.pem"),
            cert: certs.join(format!("{region}.pem")),
            key: certs.join(format!("{region}.key")),
            crl: None,
            admins: Vec::new(),
            viewers: Vec::new(),
        };
        let random = StdRng::seed_from_u64(0);
        let plan = Plan::new(random, Aim::FRAMES, 1);
        let middle = Middle {
            target,
            acceptor: TlsAcceptor::from(
                Certificates::load(&tls(replica), &EtcdConfig::default())
                    .expect("the replica's certificate")
                    .in_use()
                    .borrow()
                    .server
                    .clone(),
            ),
            connector: TlsConnector::from(
                client_config(&tls(origin), &region_name(replica)).expect("the origin's certificate"),
            ),
            plan: Arc::new(Mutex::new(plan)),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let plan = middle.plan.clone();
        Self { address, plan, task: tokio::spawn(accept(listener, middle)) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on flips one bit in about each `bytes_between` bytes that `aim` allows, `flips_max` in all.
    pub fn bend(&self, seed: u64, aim: Aim, bytes_between: u64, flips_max: u64) {
        eprintln!("bender: seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let next = random.random_range(0..2 * bytes_between);
        let mut plan = self.plan.lock().expect("no holder panics");
        *plan = Plan { flips_left: flips_max, next, ..Plan::new(random, aim, bytes_between) };
    }

    /// From now on puts a message behind each one of a Ship stream, in both directions, whole and with its checksum.
    pub fn put_in(&self, stranger: Bytes) {
        self.plan.lock().expect("no holder panics").stranger = Some(stranger);
    }

    /// How many were put in, on the way to the origin and to the replica.
    pub fn strangers(&self) -> [u64; 2] {
        self.plan.lock().expect("no holder panics").strangers
    }

    /// How many bits were flipped since `bend`.
    pub fn flips(&self) -> u64 {
        self.plan.lock().expect("no holder panics").flips
    }

    /// Flips nothing more; returns how many bits it flipped.
    pub fn rest(&self) -> u64 {
        let mut plan = self.plan.lock().expect("no holder panics");
        plan.flips_left = 0;
        plan.flips
    }
}

impl Drop for Bender {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, middle: Middle) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => if let Ok((inbound, _)) = accepted {
                connections.spawn(carry(inbound, middle.clone()));
            }
        }
    }
}

/// One connection; either end's end is the end of both.
async fn carry(inbound: TcpStream, middle: Middle) -> io::Result<()> {
    inbound.set_nodelay(true)?;
    let outbound = TcpStream::connect(middle.target).await?;
    outbound.set_nodelay(true)?;
    let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
    let outbound = middle.connector.connect(name, outbound).await?;
    let inbound = middle.acceptor.accept(inbound).await?;
    let (in_read, in_write) = tokio::io::split(inbound);
    let (out_read, out_write) = tokio::io::split(outbound);
    tokio::select! {
        ended = pump(in_read, out_write, Bent::new(true, &middle.plan)) => ended,
        ended = pump(out_read, in_write, Bent::new(false, &middle.plan)) => ended,
    }
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, mut bent: Bent) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    if bent.to_target {
        let mut preface = [0; PREFACE_BYTES];
        from.read_exact(&mut preface).await?;
        to.write_all(&preface).await?;
    }
    loop {
        while let Some(frame) = bent.next_frame(&mut buffer) {
            to.write_all(&frame).await?;
        }
        to.flush().await?;
        if from.read_buf(&mut buffer).await? == 0 {
            return to.shutdown().await;
        }
    }
}

/// One direction of one connection.
struct Bent {
    to_target: bool,
    plan: Arc<Mutex<Plan>>,
    streams: HashMap<u32, Message>,
}

/// Where a stream is in its present gRPC message.
#[derive(Default)]
struct Message {
    header: [u8; MESSAGE_HEADER_BYTES],
    header_seen: usize,
    first: u8,
    at: u32,
    left: u32,
    /// Of what has passed of the message.
    checksum: u32,
    /// How many of the message's bytes come after the one just taken; none before the first.
    after: Option<u32>,
}

impl Bent {
    fn new(to_target: bool, plan: &Arc<Mutex<Plan>>) -> Self {
        Self { to_target, plan: plan.clone(), streams: HashMap::new() }
    }

    /// The next whole HTTP/2 frame, bent if it carries data.
    fn next_frame(&mut self, buffer: &mut BytesMut) -> Option<Bytes> {
        let header = buffer.get(..FRAME_HEADER_BYTES)?;
        let length = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
        let (kind, flags) = (header[3], header[4]);
        let stream = u32::from_be_bytes([header[5], header[6], header[7], header[8]]);
        if buffer.len() < FRAME_HEADER_BYTES + length {
            return None;
        }
        let mut frame = buffer.split_to(FRAME_HEADER_BYTES + length);
        if kind == 0 {
            assert_eq!(flags & 0x8, 0, "nobody here pads");
            let message = self.streams.entry(stream).or_default();
            let mut plan = self.plan.lock().expect("no holder panics");
            for byte in &mut frame[FRAME_HEADER_BYTES..] {
                if message.take(*byte, plan.aim, self.to_target) {
                    plan.pass(byte);
                }
                message.seal(byte, plan.aim);
            }
            if message.has_ended() && message.first != HELLO_TAG && flags & END_STREAM == 0 {
                plan.put_in(self.to_target, stream, &mut frame);
            }
        }
        Some(frame.freeze())
    }
}

impl Message {
    /// Takes the stream's next byte; true if it may be hit.
    fn take(&mut self, byte: u8, aim: Aim, to_target: bool) -> bool {
        self.after = None;
        if self.header_seen < MESSAGE_HEADER_BYTES {
            self.header[self.header_seen] = byte;
            self.header_seen += 1;
            if self.header_seen == MESSAGE_HEADER_BYTES {
                let [_, a, b, c, d] = self.header;
                (self.at, self.left, self.checksum) = (0, u32::from_be_bytes([a, b, c, d]), 0);
                self.begin_if_over();
            }
            return false;
        }
        if self.at == 0 {
            self.first = byte;
        }
        let at = self.at;
        self.at += 1;
        self.left -= 1;
        let left = self.left;
        self.after = Some(left);
        self.begin_if_over();
        let aimed_at = to_target == aim.to_target && self.first == aim.tag;
        aimed_at && (aim.from..aim.to).contains(&at) && left >= aim.tail
    }

    /// Counts the byte just taken, as it goes on, or makes it one of the checksum's.
    fn seal(&mut self, byte: &mut u8, aim: Aim) {
        match self.after {
            None => {}
            Some(after) if after >= CHECKSUM_BYTES => self.checksum = crc32c::crc32c_append(self.checksum, &[*byte]),
            Some(after) if aim.sealed => *byte = self.checksum.to_le_bytes()[(CHECKSUM_BYTES - 1 - after) as usize],
            Some(_) => {}
        }
    }

    /// True between a message and the next.
    fn has_ended(&self) -> bool {
        self.header_seen == 0 && self.at > 0
    }

    fn begin_if_over(&mut self) {
        if self.left == 0 {
            self.header_seen = 0;
        }
    }
}
