//! Job: a TCP link that can be made as bad as one between regions: slow, narrow, cut, deaf, bent.
//! Input: connections to a loopback port, and what the holder of a `LinkProxy` sets. Output: the same bytes at the target, later.
//! Always true: bytes of one direction keep their order; what is in flight is bounded; dropping the `LinkProxy` ends every connection.
//! Limits: connecting is not delayed, and a refused target or a cut shows as a connection that is reset right after it opened.

use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// One read, and so one unit of the delay line.
const CHUNK_BYTES_MAX: usize = 32 * 1024;
/// Chunks in flight in one direction of one connection: 64 MiB, more than 1 s of a 400 Mbit/s link.
const CHUNKS_MAX: usize = 2_048;
/// A narrow link is read in slices of about this long, so that its rate is smooth.
const SLICES_PER_SECOND: u64 = 100;
const CONNECTIONS_MAX: usize = 1_024;

/// Seen from the side that connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    ToTarget,
    FromTarget,
}

/// What one direction does to the bytes it carries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Shape {
    delay: Duration,
    /// 0: as fast as it goes.
    rate_bytes_per_second: u64,
    /// Bytes wait, and arrive when it thaws: what TCP makes of a loss that ends.
    frozen: bool,
    /// Bytes are read and thrown away, and a close is not passed on: what a half-open connection looks like.
    black_hole: bool,
}

/// Whether connections live. Every change of `resets` ends those that are open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Gate {
    cut: bool,
    resets: u64,
}

/// One direction of all connections: they share its rate, as they would share a line.
struct Lane {
    shape: watch::Sender<Shape>,
    /// When the last byte that was read has left the narrow place.
    free_at: Mutex<Instant>,
    /// Bytes until the one to bend, and the bit to flip in it.
    flip: Mutex<Option<(u64, u8)>>,
    bytes: AtomicU64,
}

struct Shared {
    to_target: Lane,
    from_target: Lane,
    gate: watch::Sender<Gate>,
    connections: AtomicU64,
    open: Mutex<Vec<Weak<Connection>>>,
}

/// What concerns one connection alone.
#[derive(Default)]
struct Connection {
    to_target: Line,
    from_target: Line,
}

/// One direction of one connection.
#[derive(Default)]
struct Line {
    bytes: AtomicU64,
    frozen: watch::Sender<bool>,
}

impl Connection {
    fn line(&self, direction: Direction) -> &Line {
        match direction {
            Direction::ToTarget => &self.to_target,
            Direction::FromTarget => &self.from_target,
        }
    }
}

/// What has passed since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    pub bytes_to_target: u64,
    pub bytes_from_target: u64,
    /// All that were ever accepted.
    pub connections: u64,
}

/// A running proxy on a loopback port; ends when dropped.
pub struct LinkProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: JoinHandle<()>,
}

impl LinkProxy {
    /// Listens on a free loopback port and forwards to `target`, which need not be up yet.
    pub async fn start(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            to_target: Lane::new(),
            from_target: Lane::new(),
            gate: watch::Sender::new(Gate::default()),
            connections: AtomicU64::new(0),
            open: Mutex::new(Vec::new()),
        });
        let acceptor = tokio::spawn(accept(listener, target, shared.clone()));
        Ok(Self { address, shared, acceptor })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// One-way delay of both directions; bytes that are in flight already keep theirs.
    pub fn set_delay(&self, one_way: Duration) {
        for lane in [&self.shared.to_target, &self.shared.from_target] {
            lane.shape.send_modify(|shape| shape.delay = one_way);
        }
    }

    /// The width of each direction; `None`: as fast as it goes.
    pub fn set_rate(&self, bytes_per_second: Option<u64>) {
        for lane in [&self.shared.to_target, &self.shared.from_target] {
            lane.shape.send_modify(|shape| shape.rate_bytes_per_second = bytes_per_second.unwrap_or(0));
        }
    }

    /// Resets every connection, and each new one, until `heal`.
    pub fn cut(&self) {
        self.shared.gate.send_modify(|gate| {
            gate.cut = true;
            gate.resets += 1;
        });
    }

    /// Resets every connection; new ones are let through.
    pub fn reset(&self) {
        self.shared.gate.send_modify(|gate| gate.resets += 1);
    }

    /// Bytes of this direction wait, and arrive after `heal`. Connections stay.
    pub fn freeze(&self, direction: Direction) {
        self.lane(direction).shape.send_modify(|shape| shape.frozen = true);
    }

    /// As `freeze`, but only for the connection that has carried the most bytes in this direction; others, and new ones, go on.
    pub fn freeze_busiest(&self, direction: Direction) {
        let open: Vec<Arc<Connection>> = locked(&self.shared.open).iter().filter_map(Weak::upgrade).collect();
        let carried = |connection: &&Arc<Connection>| connection.line(direction).bytes.load(Ordering::Relaxed);
        if let Some(busiest) = open.iter().max_by_key(carried) {
            busiest.line(direction).frozen.send_replace(true);
        }
    }

    /// Bytes of this direction vanish, and closes are not passed on. Connections stay until `heal`, which resets those that lost bytes.
    pub fn black_hole(&self, direction: Direction) {
        self.lane(direction).shape.send_modify(|shape| shape.black_hole = true);
    }

    /// Ends `cut`, `freeze`, `freeze_busiest` and `black_hole`; delay and rate stay.
    pub fn heal(&self) {
        for lane in [&self.shared.to_target, &self.shared.from_target] {
            lane.shape.send_modify(|shape| {
                shape.frozen = false;
                shape.black_hole = false;
            });
        }
        for connection in locked(&self.shared.open).iter().filter_map(Weak::upgrade) {
            connection.to_target.frozen.send_replace(false);
            connection.from_target.frozen.send_replace(false);
        }
        self.shared.gate.send_modify(|gate| gate.cut = false);
    }

    /// Flips bit `bit` (0 to 7) of the byte that comes `after_bytes` bytes from now in this direction, whatever connection carries it.
    pub fn flip_bit(&self, direction: Direction, after_bytes: u64, bit: u8) {
        *locked(&self.lane(direction).flip) = Some((after_bytes, bit & 7));
    }

    pub fn counters(&self) -> Counters {
        Counters {
            bytes_to_target: self.shared.to_target.bytes.load(Ordering::Relaxed),
            bytes_from_target: self.shared.from_target.bytes.load(Ordering::Relaxed),
            connections: self.shared.connections.load(Ordering::Relaxed),
        }
    }

    fn lane(&self, direction: Direction) -> &Lane {
        match direction {
            Direction::ToTarget => &self.shared.to_target,
            Direction::FromTarget => &self.shared.from_target,
        }
    }
}

impl Drop for LinkProxy {
    fn drop(&mut self) {
        // The acceptor owns the connections.
        self.acceptor.abort();
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((inbound, _)) => {
                    shared.connections.fetch_add(1, Ordering::Relaxed);
                    connections.spawn(carry(inbound, target, shared.clone()));
                }
                // Out of file descriptors, most likely: let some be closed.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }
}

/// One connection, until both directions have ended, one of them failed, or the gate says so.
async fn carry(mut inbound: TcpStream, target: SocketAddr, shared: Arc<Shared>) {
    let mut gate = shared.gate.subscribe();
    let opened = *gate.borrow_and_update();
    let connected = if opened.cut { None } else { TcpStream::connect(target).await.ok() };
    let Some(mut outbound) = connected else {
        reset_on_drop(&inbound);
        return;
    };
    let _ = inbound.set_nodelay(true);
    let _ = outbound.set_nodelay(true);
    let connection = Arc::new(Connection::default());
    {
        let mut open = locked(&shared.open);
        open.retain(|other| other.strong_count() > 0);
        open.push(Arc::downgrade(&connection));
    }
    let ended_well = {
        let (in_read, in_write) = inbound.split();
        let (out_read, out_write) = outbound.split();
        let both = async {
            tokio::try_join!(
                pump(in_read, out_write, &shared.to_target, &connection.to_target),
                pump(out_read, in_write, &shared.from_target, &connection.from_target)
            )
        };
        tokio::select! {
            biased;
            _ = gate.wait_for(|gate| gate.resets != opened.resets) => false,
            ended = both => ended.is_ok(),
        }
    };
    if !ended_well {
        // Through a black hole not even a reset gets.
        let mut to_target = shared.to_target.shape.subscribe();
        let mut from_target = shared.from_target.shape.subscribe();
        tokio::select! {
            _ = gate.wait_for(|gate| gate.resets != opened.resets) => {}
            _ = async {
                let _ = to_target.wait_for(|shape| !shape.black_hole).await;
                let _ = from_target.wait_for(|shape| !shape.black_hole).await;
            } => {}
        }
        reset_on_drop(&inbound);
        reset_on_drop(&outbound);
    }
}

/// Waits for a moment. A timer counts in whole milliseconds, and so delays by up to one what is due already.
async fn reach(moment: Instant) {
    if moment > Instant::now() {
        tokio::time::sleep_until(moment).await;
    }
}

/// Closing with a zero linger sends RST.
fn reset_on_drop(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// One direction of one connection: a reader that stamps each chunk with its time of arrival, and a writer that waits for it. Both run
/// at once, so a delay does not narrow the link.
async fn pump(from: ReadHalf<'_>, to: WriteHalf<'_>, lane: &Lane, own: &Line) -> io::Result<()> {
    let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
    tokio::try_join!(read(from, sender, lane), write(to, receiver, lane, own)).map(|_| ())
}

async fn read(mut from: ReadHalf<'_>, line: mpsc::Sender<(Instant, Bytes)>, lane: &Lane) -> io::Result<()> {
    loop {
        let shape = *lane.shape.borrow();
        let slice = usize::try_from(shape.rate_bytes_per_second / SLICES_PER_SECOND).unwrap_or(CHUNK_BYTES_MAX);
        let limit = if slice == 0 { CHUNK_BYTES_MAX } else { slice.min(CHUNK_BYTES_MAX) };
        let mut chunk = BytesMut::with_capacity(limit);
        if (&mut from).take(limit as u64).read_buf(&mut chunk).await? == 0 {
            return Ok(());
        }
        let passed_at = lane.pass(chunk.len(), shape.rate_bytes_per_second);
        if line.send((passed_at + shape.delay, chunk.freeze())).await.is_err() {
            return Ok(());
        }
        // Nothing more is read before this chunk has left the narrow place: the sender feels the width as TCP lets it.
        reach(passed_at).await;
    }
}

async fn write(
    mut to: WriteHalf<'_>,
    mut line: mpsc::Receiver<(Instant, Bytes)>,
    lane: &Lane,
    own: &Line,
) -> io::Result<()> {
    let mut shape = lane.shape.subscribe();
    let mut frozen = own.frozen.subscribe();
    let mut lost = false;
    loop {
        let next = tokio::select! {
            biased;
            _ = shape.wait_for(|shape| !shape.black_hole), if lost => return Err(io::ErrorKind::ConnectionReset.into()),
            next = line.recv() => next,
        };
        let Some((due, chunk)) = next else { break };
        reach(due).await;
        frozen.wait_for(|frozen| !frozen).await.map_err(io::Error::other)?;
        let now = *shape.wait_for(|shape| !shape.frozen).await.map_err(io::Error::other)?;
        lost |= now.black_hole;
        if lost {
            continue;
        }
        let chunk = lane.bend(chunk);
        lane.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        own.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        to.write_all(&chunk).await?;
    }
    // The other end closed. A black hole hides that too.
    let now = *shape.wait_for(|shape| !shape.frozen && !shape.black_hole).await.map_err(io::Error::other)?;
    tokio::time::sleep(now.delay).await;
    if lost { Err(io::ErrorKind::ConnectionReset.into()) } else { to.shutdown().await }
}

impl Lane {
    fn new() -> Self {
        Self {
            shape: watch::Sender::new(Shape::default()),
            free_at: Mutex::new(Instant::now()),
            flip: Mutex::new(None),
            bytes: AtomicU64::new(0),
        }
    }

    /// When the last of `bytes` bytes that came now has passed the narrow place.
    fn pass(&self, bytes: usize, rate_bytes_per_second: u64) -> Instant {
        let now = Instant::now();
        if rate_bytes_per_second == 0 {
            return now;
        }
        let mut free_at = locked(&self.free_at);
        *free_at = now.max(*free_at) + Duration::from_secs_f64(bytes as f64 / rate_bytes_per_second as f64);
        *free_at
    }

    /// Flips the bit that was asked for, if it lies in this chunk.
    fn bend(&self, chunk: Bytes) -> Bytes {
        let mut flip = locked(&self.flip);
        let Some((after_bytes, bit)) = *flip else { return chunk };
        let length = chunk.len() as u64;
        if after_bytes >= length {
            *flip = Some((after_bytes - length, bit));
            return chunk;
        }
        *flip = None;
        let mut bent = BytesMut::from(&chunk[..]);
        if let Some(byte) = usize::try_from(after_bytes).ok().and_then(|at| bent.get_mut(at)) {
            *byte ^= 1 << bit;
        }
        bent.freeze()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
