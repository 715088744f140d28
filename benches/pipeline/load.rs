//! Job: puts at the origin, at a rate (open loop: the schedule does not wait for answers) or as fast as etcd takes them.
//! Input: a rate, keys drawn by Zipf 0.9, values. Output: puts, each told to the arrivals before it is sent.
//! Always true: a put counts from the time it was due, not from when it was sent; etcd orders the puts of one key, and its answers tell how.

use crate::arrivals::Arrivals;
use crate::bed::etcd::Etcd;
use bytes::Bytes;
use etcd_client::{Txn, TxnOp};
use etcd_ferry::demo::objects;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

pub const PREFIX: &str = "/registry/";
pub const VALUE_BYTES: usize = 1_024;
const ZIPF_EXPONENT: f64 = 0.9;
const CONNECTIONS: usize = 4;
/// Puts that etcd has not answered; a schedule that is so far ahead of etcd waits, and its puts count from when they were due.
const IN_FLIGHT_MAX: usize = 256;
const KEYS_A_TXN: u64 = 100;
const FILLERS: u64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// JSON of about 1 KiB, of which each version changes about 5 %.
    Kubernetes,
    /// 1 KiB that nothing can compress.
    Random,
}

impl Values {
    /// What object `number` holds as of put `version`, which can be read from it again.
    fn value(self, number: u64, version: u64, random: &mut StdRng) -> Bytes {
        match self {
            Self::Kubernetes => objects::value(number, version, VALUE_BYTES),
            Self::Random => {
                let mut value = vec![0; VALUE_BYTES];
                random.fill_bytes(&mut value);
                value[..8].copy_from_slice(&version.to_le_bytes());
                value.into()
            }
        }
    }

    /// The put that wrote `value`.
    pub fn version(self, value: &[u8]) -> Option<u64> {
        const FIELD: &[u8] = br#""resourceVersion":""#;
        match self {
            Self::Kubernetes => {
                let at = value.windows(FIELD.len()).position(|w| w == FIELD)? + FIELD.len();
                let digits = value[at..].iter().take_while(|b| b.is_ascii_digit());
                Some(digits.fold(0, |n, b| n * 10 + u64::from(b - b'0')))
            }
            Self::Random => Some(u64::from_le_bytes(value.get(..8)?.try_into().ok()?)),
        }
    }
}

/// Which object the next put writes.
struct Zipf {
    shares: Vec<f64>,
}

impl Zipf {
    fn new(objects: u64) -> Self {
        let mut sum = 0.0;
        let mut shares: Vec<f64> = (1..=objects)
            .map(|rank| {
                sum += f64::powf(rank as f64, -ZIPF_EXPONENT);
                sum
            })
            .collect();
        shares.iter_mut().for_each(|share| *share /= sum);
        Self { shares }
    }

    fn draw(&self, random: &mut StdRng) -> u64 {
        let at: f64 = random.random();
        (self.shares.partition_point(|share| *share < at) as u64).min(self.shares.len() as u64 - 1)
    }
}

/// What is written, and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub values: Values,
    /// Of so many keys.
    pub keys: u64,
    pub puts: u64,
    /// Puts a second; `None`: as fast as etcd takes them.
    pub rate: Option<u64>,
}

/// Writes keys `0..count` in transactions of 100: what is there before a work begins.
pub async fn fill(etcd: &Etcd, prefix: &'static str, count: u64, values: Values, bytes: usize) {
    let mut fillers = JoinSet::new();
    for filler in 0..FILLERS {
        let mut kv = etcd.kv().await;
        fillers.spawn(async move {
            let mut random = StdRng::seed_from_u64(filler);
            let firsts = (0..count).step_by(KEYS_A_TXN as usize).filter(|first| first / KEYS_A_TXN % FILLERS == filler);
            for first in firsts {
                let put = |i| {
                    let mut value = values.value(i, 0, &mut random);
                    value.truncate(bytes);
                    TxnOp::put(objects::key(prefix, i).to_vec(), value.to_vec(), None)
                };
                let puts: Vec<TxnOp> = (first..count.min(first + KEYS_A_TXN)).map(put).collect();
                kv.txn(Txn::new().and_then(puts)).await.unwrap();
            }
        });
    }
    fillers.join_all().await;
}

/// Puts everything; returns when etcd has answered all. `first`: the first put's version, above all earlier ones.
pub async fn drive(etcd: &Etcd, load: Load, first: u64, arrivals: &Arc<Arrivals>) {
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(etcd.kv().await);
    }
    let in_flight = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let mut puts = JoinSet::new();
    let zipf = Zipf::new(load.keys);
    let mut random = StdRng::seed_from_u64(first);
    let start = Instant::now();
    for put in 0..load.puts {
        let number = zipf.draw(&mut random);
        let value = load.values.value(number, first + put, &mut random);
        let due = match load.rate {
            Some(rate) => start + Duration::from_secs_f64(put as f64 / rate as f64),
            None => Instant::now(),
        };
        if due > Instant::now() {
            tokio::time::sleep_until(due).await;
        }
        arrivals.due(number, first + put, due);
        let permit = in_flight.clone().acquire_owned().await.unwrap();
        let mut kv = connections[put as usize % CONNECTIONS].clone();
        let arrivals = arrivals.clone();
        puts.spawn(async move {
            let response = kv.put(objects::key(PREFIX, number), value, None).await.unwrap();
            arrivals.answered(number, first + put, response.header().map_or(0, |header| header.revision()));
            drop(permit);
        });
        while let Some(done) = puts.try_join_next() {
            done.unwrap();
        }
    }
    puts.join_all().await;
}
