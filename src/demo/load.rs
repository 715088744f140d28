//! Job: write to the origin what Kubernetes and its friends would.
//! Input: the origin's etcd, how often. Output: each acknowledged revision, with its moment.
//! Always true: what is reported is what etcd acknowledged; a write that etcd does not take ends the demo with the reason.

use super::meter::Written;
use super::objects;
use super::show::Seen;
use crate::etcd::{DeleteOptions, Etcd, Txn, TxnOp, TxnOpResponse, txn_revision};
use crate::model::{KeyRange, Revision};
use anyhow::Context;
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

pub const WRITERS: u64 = 4;
/// Of all writers together, batches aside.
pub const WRITES_PER_SECOND: u32 = 400;
/// What is there before the sidecars start: their first copy.
pub const OBJECTS_FIRST: u64 = 1_000;
/// What one prefix delete deletes.
pub const BATCH_KEYS: u64 = 3_000;

const PREFIX: &str = "/registry/";
const OBJECTS_PER_WRITER: u64 = 400;
/// One object of so many is large, and stays so; the others have about 0.9 KiB.
const LARGE_ONE_OF: u64 = 40;
const LARGE_BYTES: [usize; 5] = [5 << 10, 10 << 10, 20 << 10, 50 << 10, 100 << 10];
/// Keys of a transaction; etcd's own limit is 128.
const TXN_KEYS: u64 = 100;
const BATCH_PAUSE: Duration = Duration::from_millis(10);

enum Write {
    Put { key: Bytes, value: Bytes },
    Delete { key: Bytes },
}

/// Commits all writes in one transaction, each key once. `None`: there was nothing to delete, so there is no revision.
async fn commit(etcd: &Etcd, writes: Vec<Write>) -> anyhow::Result<Option<Written>> {
    let mut written = Written { revision: Revision(0), at: Instant::now(), puts: 0, deletes: 0, bytes: 0 };
    let mut operations = Vec::new();
    let mut deleted_keys = Vec::new();
    for write in writes {
        match write {
            Write::Put { key, value } => {
                written.puts += 1;
                written.bytes += (key.len() + value.len()) as u64;
                operations.push(TxnOp::put(key, value, None));
            }
            Write::Delete { key } => {
                deleted_keys.push(key.len() as u64);
                operations.push(TxnOp::delete(key, None));
            }
        }
    }
    let answer = etcd
        .txn(Txn::new().and_then(operations), "write the demo's keys")
        .await
        .context("the origin's etcd did not take a write")?;
    written.at = Instant::now();
    written.revision = txn_revision(&answer);
    let deleted = answer.op_responses().into_iter().filter_map(|response| match response {
        TxnOpResponse::Delete(deleted) => Some(deleted.deleted() > 0),
        TxnOpResponse::Put(_) | TxnOpResponse::Get(_) | TxnOpResponse::Txn(_) => None,
    });
    for (_, key_bytes) in deleted.zip(deleted_keys).filter(|(deleted, _)| *deleted) {
        written.deletes += 1;
        written.bytes += key_bytes;
    }
    Ok((written.puts + written.deletes > 0).then_some(written))
}

/// Objects that are in the origin before there is a link.
pub async fn write_first(etcd: &Etcd) -> anyhow::Result<()> {
    for first in (0..OBJECTS_FIRST).step_by(usize::try_from(TXN_KEYS)?) {
        let put = |number| Write::Put {
            key: objects::key(PREFIX, number),
            value: objects::value(number, 0, bytes_min(number)),
        };
        commit(etcd, (first..(first + TXN_KEYS).min(OBJECTS_FIRST)).map(put).collect()).await?;
    }
    Ok(())
}

/// One writer, with objects of its own, until `stop`.
pub async fn write_objects(
    etcd: Etcd,
    number: u64,
    stop: CancellationToken,
    seen: mpsc::Sender<Seen>,
) -> anyhow::Result<()> {
    let mut writer =
        Writer { random: StdRng::from_os_rng(), first: number * OBJECTS_PER_WRITER, versions: BTreeMap::new() };
    let mut ticks = tokio::time::interval(Duration::from_secs(WRITERS) / WRITES_PER_SECOND);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !stop.is_cancelled() {
        ticks.tick().await;
        if let Some(written) = commit(&etcd, writer.choose()).await? {
            seen.send(Seen::Written(written)).await?;
        }
    }
    Ok(())
}

/// Fills a prefix and deletes it in one revision, again and again, until `stop`.
pub async fn write_batches(
    etcd: Etcd,
    every: Duration,
    stop: CancellationToken,
    seen: mpsc::Sender<Seen>,
) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for batch in 0_u64.. {
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            _ = ticks.tick() => {}
        }
        let prefix = format!("/events/batch-{batch:03}/");
        let event = |number: u64| Write::Put {
            key: Bytes::from(format!("{prefix}{number:05}")),
            value: Bytes::from(format!(r#"{{"kind":"Event","reason":"Scheduled","count":{number},"batch":{batch}}}"#)),
        };
        for first in (0..BATCH_KEYS).step_by(usize::try_from(TXN_KEYS)?) {
            let puts = (first..first + TXN_KEYS).map(event).collect();
            if let Some(written) = commit(&etcd, puts).await? {
                seen.send(Seen::Written(written)).await?;
            }
            tokio::time::sleep(BATCH_PAUSE).await;
        }
        let written = delete_prefix(&etcd, &prefix).await?;
        seen.send(Seen::Written(written)).await?;
    }
    Ok(())
}

/// The prefix holds one batch and nothing else.
async fn delete_prefix(etcd: &Etcd, prefix: &str) -> anyhow::Result<Written> {
    let range = KeyRange::prefix(prefix.as_bytes());
    let options = DeleteOptions::new().with_range(range.etcd_end());
    let answer = etcd
        .txn(Txn::new().and_then([TxnOp::delete(range.etcd_from(), Some(options))]), "write the demo's keys")
        .await?;
    let key_bytes = prefix.len() as u64 + 5;
    let (at, revision) = (Instant::now(), txn_revision(&answer));
    Ok(Written { revision, at, puts: 0, deletes: BATCH_KEYS, bytes: BATCH_KEYS * key_bytes })
}

/// The size of an object, for its life.
fn bytes_min(number: u64) -> usize {
    let large = usize::try_from(number / LARGE_ONE_OF).unwrap_or(0) % LARGE_BYTES.len();
    if number.is_multiple_of(LARGE_ONE_OF) { LARGE_BYTES[large] } else { 0 }
}

struct Writer {
    random: StdRng,
    first: u64,
    versions: BTreeMap<u64, u64>,
}

impl Writer {
    /// The next transaction: mostly one object, sometimes an empty one, a delete, or many at once.
    fn choose(&mut self) -> Vec<Write> {
        match self.random.random_range(0..100) {
            0..72 => vec![self.put()],
            72..75 => vec![Write::Put { key: self.any_key(), value: Bytes::new() }],
            75..87 => vec![Write::Delete { key: self.any_key() }],
            _ => self.many(),
        }
    }

    /// Some objects are written far more often than others.
    fn any(&mut self) -> u64 {
        let share: f64 = self.random.random();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below OBJECTS_PER_WRITER")]
        let pick = (share * share * OBJECTS_PER_WRITER as f64) as u64;
        self.first + pick
    }

    fn any_key(&mut self) -> Bytes {
        objects::key(PREFIX, self.any())
    }

    fn put(&mut self) -> Write {
        let number = self.any();
        let version = self.versions.entry(number).or_default();
        *version += 1;
        Write::Put { key: objects::key(PREFIX, number), value: objects::value(number, *version, bytes_min(number)) }
    }

    /// Several keys, each once: etcd refuses a key that is written twice in one transaction.
    fn many(&mut self) -> Vec<Write> {
        let mut writes = BTreeMap::new();
        for _ in 0..self.random.random_range(2..=40) {
            let write = if self.random.random_ratio(1, 5) { Write::Delete { key: self.any_key() } } else { self.put() };
            let (Write::Put { key, .. } | Write::Delete { key }) = &write;
            writes.insert(key.clone(), write);
        }
        writes.into_values().collect()
    }
}
