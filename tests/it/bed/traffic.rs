//! Job: writers at an origin that remember what etcd acknowledged.
//! Input: a seed and how to reach an etcd. Output: each acknowledged revision with its changes.
//! Always true: what is recorded comes from etcd's answer to the writer, never from a watch; what was not answered is not recorded; the
//! same seed asks for the same writes.

use super::etcd::{Access, KeyMap};
use bytes::Bytes;
use etcd_client::{Compare, CompareOp, DeleteOptions, Error, GetOptions, KvClient, Txn, TxnOp, TxnOpResponse};
use etcd_ferry::demo::objects;
use etcd_ferry::model::{Change, KeyRange, Revision};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// An answer that takes longer counts as none.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(20);
const OBJECTS_PER_WRITER: u64 = 150;
const KEYS_PER_TXN_MAX: usize = 40;
const WRITERS_AT_ONCE: usize = 16;

/// A revision that etcd said it committed, with what the writer asked for in it; in key order.
#[derive(Debug, Clone, PartialEq)]
pub struct Acknowledged {
    pub revision: Revision,
    pub changes: Vec<Change>,
}

#[derive(Debug, Clone)]
pub enum Write {
    Put { key: Bytes, value: Bytes },
    Delete { key: Bytes },
    DeletePrefix { prefix: Bytes },
}

impl Write {
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self::Put { key: key.into(), value: value.into() }
    }

    pub fn delete(key: impl Into<Bytes>) -> Self {
        Self::Delete { key: key.into() }
    }

    pub fn delete_prefix(prefix: impl Into<Bytes>) -> Self {
        Self::DeletePrefix { prefix: prefix.into() }
    }

    fn deleted_range(&self) -> Option<KeyRange> {
        match self {
            Write::Put { .. } => None,
            Write::Delete { key } => Some(KeyRange { from: key.clone(), to: Bytes::from([key, &[0][..]].concat()) }),
            Write::DeletePrefix { prefix } => Some(KeyRange::prefix(prefix)),
        }
    }
}

/// Commits all writes in one transaction. `None`: etcd had nothing to do (deletes of what is not there), so there is no revision.
/// Each delete also lists its keys in the same transaction, which takes a second place of etcd's `--max-txn-ops`.
pub async fn commit(kv: &mut KvClient, writes: &[Write]) -> Result<Option<Acknowledged>, Error> {
    let mut operations = Vec::new();
    for range in writes.iter().filter_map(Write::deleted_range) {
        let options = GetOptions::new().with_range(range.etcd_end()).with_keys_only();
        operations.push(TxnOp::get(range.etcd_from(), Some(options)));
    }
    for write in writes {
        operations.push(match (write, write.deleted_range()) {
            (Write::Put { key, value }, _) => TxnOp::put(key.to_vec(), value.to_vec(), None),
            (_, range) => {
                let range = range.expect("a write is a put or deletes a range");
                TxnOp::delete(range.etcd_from(), Some(DeleteOptions::new().with_range(range.etcd_end())))
            }
        });
    }
    let answer = kv.txn(Txn::new().and_then(operations)).await?;
    let mut changes = BTreeMap::new();
    for write in writes {
        if let Write::Put { key, value } = write {
            changes.insert(key.clone(), Change::Put { key: key.clone(), value: value.clone() });
        }
    }
    for response in answer.op_responses() {
        if let TxnOpResponse::Get(mut listed) = response {
            for kv in listed.take_kvs() {
                let key = Bytes::from(kv.into_key_value().0);
                changes.insert(key.clone(), Change::Delete { key });
            }
        }
    }
    let revision = Revision::from_etcd(answer.header().map_or(0, |header| header.revision()));
    Ok((!changes.is_empty()).then(|| Acknowledged { revision, changes: changes.into_values().collect() }))
}

/// Puts each pair in a revision of its own, several at a time; what was acknowledged, in the order of revisions. Fails if one is refused.
pub async fn put_at_once(access: &Access, pairs: Vec<(Bytes, Bytes)>) -> Vec<Acknowledged> {
    let mut writers = JoinSet::new();
    for share in pairs.chunks(pairs.len().div_ceil(WRITERS_AT_ONCE).max(1)) {
        let (share, access) = (share.to_vec(), access.clone());
        writers.spawn(async move {
            let mut kv = access.kv().await;
            let mut acknowledged = Vec::with_capacity(share.len());
            for (key, value) in share {
                let ack = commit(&mut kv, &[Write::Put { key, value }]).await.expect("a put");
                acknowledged.extend(ack);
            }
            acknowledged
        });
    }
    let mut acknowledged: Vec<Acknowledged> = writers.join_all().await.into_iter().flatten().collect();
    acknowledged.sort_by_key(|ack| ack.revision);
    acknowledged
}

#[derive(Debug, Clone)]
pub struct TrafficOptions {
    pub seed: u64,
    pub writers: usize,
    /// Every key starts with it.
    pub prefix: String,
    /// Writes that each writer tries; it can be stopped earlier.
    pub writes_per_writer: usize,
    /// Writes a second of each writer; `None`: as fast as etcd answers.
    pub rate_per_writer: Option<u32>,
    pub value_bytes_max: usize,
}

impl Default for TrafficOptions {
    fn default() -> Self {
        Self {
            seed: rand::random(),
            writers: 3,
            prefix: "/registry/".to_owned(),
            writes_per_writer: 300,
            rate_per_writer: None,
            value_bytes_max: 100 * 1_024,
        }
    }
}

/// Writers at work. They go on over failures of etcd; what failed is not in their record.
pub struct Traffic {
    stop: CancellationToken,
    writers: JoinSet<Vec<Acknowledged>>,
}

impl Traffic {
    pub fn start(access: &Access, options: &TrafficOptions) -> Self {
        eprintln!("traffic: seed {}", options.seed);
        let stop = CancellationToken::new();
        let mut writers = JoinSet::new();
        for number in 0..options.writers {
            let writer = Writer::new(number, options);
            writers.spawn(writer.run(access.clone(), options.clone(), stop.clone()));
        }
        Self { stop, writers }
    }

    /// Waits until every writer has tried all of its writes; what was acknowledged, in the order of revisions.
    pub async fn finish(self) -> Vec<Acknowledged> {
        let mut acknowledged: Vec<Acknowledged> = self.writers.join_all().await.into_iter().flatten().collect();
        acknowledged.sort_by_key(|ack| ack.revision);
        acknowledged
    }

    /// Stops every writer after the write that it is at.
    pub async fn stop(self) -> Vec<Acknowledged> {
        self.stop.cancel();
        self.finish().await
    }
}

/// One writer, with keys of its own.
struct Writer {
    random: StdRng,
    prefix: String,
    value_bytes_max: usize,
    versions: BTreeMap<u64, u64>,
}

impl Writer {
    fn new(number: usize, options: &TrafficOptions) -> Self {
        Self {
            random: StdRng::seed_from_u64(options.seed.wrapping_add(number as u64)),
            prefix: format!("{}writer-{number}/", options.prefix),
            value_bytes_max: options.value_bytes_max,
            versions: BTreeMap::new(),
        }
    }

    async fn run(mut self, access: Access, options: TrafficOptions, stop: CancellationToken) -> Vec<Acknowledged> {
        let mut acknowledged = Vec::new();
        let mut kv = access.kv().await;
        let period = options.rate_per_writer.map(|rate| Duration::from_secs(1) / rate.max(1));
        let mut ticks = tokio::time::interval(period.unwrap_or(Duration::from_millis(1)));
        for _ in 0..options.writes_per_writer {
            if period.is_some() {
                ticks.tick().await;
            }
            if stop.is_cancelled() {
                break;
            }
            let writes = self.choose();
            match tokio::time::timeout(ANSWER_LIMIT, commit(&mut kv, &writes)).await {
                Ok(Ok(ack)) => acknowledged.extend(ack),
                Ok(Err(_)) | Err(_) => tokio::time::sleep(PAUSE_AFTER_FAILURE).await,
            }
        }
        acknowledged
    }

    /// The next transaction, as Kubernetes and its friends would write: mostly one object, sometimes many, now and then a whole prefix.
    fn choose(&mut self) -> Vec<Write> {
        match self.random.random_range(0..100) {
            0..60 => vec![self.put_object(0)],
            60..72 => vec![Write::delete(self.any_key())],
            72..76 => vec![Write::put(self.any_key(), Bytes::new())],
            76..80 => {
                let bytes = self.random.random_range(0..=self.value_bytes_max);
                vec![self.put_object(bytes)]
            }
            80..92 => self.many(),
            92..97 => self.fill_batch(),
            _ => vec![Write::delete_prefix(format!("{}batch-{}/", self.prefix, self.random.random_range(0..3)))],
        }
    }

    fn any_key(&mut self) -> Bytes {
        objects::key(&self.prefix, self.random.random_range(0..OBJECTS_PER_WRITER))
    }

    fn put_object(&mut self, bytes_min: usize) -> Write {
        let number = self.random.random_range(0..OBJECTS_PER_WRITER);
        let version = self.versions.entry(number).or_default();
        *version += 1;
        Write::put(objects::key(&self.prefix, number), objects::value(number, *version, bytes_min))
    }

    /// Several keys, each once: puts and deletes.
    fn many(&mut self) -> Vec<Write> {
        let mut writes = BTreeMap::new();
        for _ in 0..self.random.random_range(2..=KEYS_PER_TXN_MAX) {
            let write = if self.random.random_ratio(1, 4) { Write::delete(self.any_key()) } else { self.put_object(0) };
            let (Write::Put { key, .. } | Write::Delete { key } | Write::DeletePrefix { prefix: key }) = &write;
            writes.insert(key.clone(), write);
        }
        writes.into_values().collect()
    }

    fn fill_batch(&mut self) -> Vec<Write> {
        let batch = self.random.random_range(0..3);
        let key = |i: usize| format!("{}batch-{batch}/{i:04}", self.prefix);
        (0..KEYS_PER_TXN_MAX).map(|i| Write::put(key(i), vec![b'x'; i])).collect()
    }
}

/// Accounts whose sum never changes: a torn revision shows as money made or lost.
#[derive(Debug, Clone)]
pub struct Bank {
    pub prefix: String,
    pub accounts: u32,
    pub balance_first: i64,
}

impl Bank {
    pub fn total(&self) -> i64 {
        self.balance_first * i64::from(self.accounts)
    }

    fn account(&self, number: u32) -> String {
        format!("{}account-{number:04}", self.prefix)
    }

    /// All accounts, in one revision.
    pub async fn open(&self, kv: &mut KvClient) -> Acknowledged {
        let put = |i| Write::put(self.account(i), self.balance_first.to_string());
        let writes: Vec<Write> = (0..self.accounts).map(put).collect();
        commit(kv, &writes).await.expect("the bank opens").expect("opening a bank changes keys")
    }

    /// Moves money between two accounts; `None` if another transfer came between.
    pub async fn transfer(&self, kv: &mut KvClient, random: &mut StdRng) -> Result<Option<Acknowledged>, Error> {
        let from = random.random_range(0..self.accounts);
        let to = (from + random.random_range(1..self.accounts)) % self.accounts;
        let amount = random.random_range(1..=10);
        let (mut compares, mut changes, mut puts) = (Vec::new(), BTreeMap::new(), Vec::new());
        for (number, change) in [(from, -amount), (to, amount)] {
            let key = self.account(number);
            let got = kv.get(key.clone(), None).await?;
            let account = got.kvs().first().expect("an account is never deleted");
            let value = (balance(account.value()) + change).to_string();
            compares.push(Compare::mod_revision(key.clone(), CompareOp::Equal, account.mod_revision()));
            puts.push(TxnOp::put(key.clone(), value.clone(), None));
            let key = Bytes::from(key);
            changes.insert(key.clone(), Change::Put { key, value: Bytes::from(value) });
        }
        let answer = kv.txn(Txn::new().when(compares).and_then(puts)).await?;
        let revision = Revision::from_etcd(answer.header().map_or(0, |header| header.revision()));
        Ok(answer.succeeded().then(|| Acknowledged { revision, changes: changes.into_values().collect() }))
    }

    /// The sum of all accounts in `keys`; `None` if there is not a single one yet.
    pub fn sum(&self, keys: &KeyMap) -> Option<i64> {
        let mut accounts = keys.iter().filter(|(key, _)| key.starts_with(self.prefix.as_bytes())).peekable();
        accounts.peek()?;
        Some(accounts.map(|(_, value)| balance(value)).sum())
    }
}

fn balance(value: &[u8]) -> i64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).expect("a balance is a number")
}

/// The bed's own proof: what writers were told while their etcd was killed is what the recorder saw, and the same seed asks the same.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::bed::etcd::{Etcd, EtcdOptions};
    use crate::bed::recording::Recorder;
    use etcd_ferry::model::Ranges;

    #[test]
    fn the_same_seed_asks_for_the_same_writes() {
        let options = TrafficOptions { seed: 7, ..TrafficOptions::default() };
        let asked = || {
            let mut writer = Writer::new(0, &options);
            (0..200).flat_map(|_| writer.choose()).map(|write| format!("{write:?}")).collect::<Vec<_>>()
        };
        assert_eq!(asked(), asked());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_acknowledgement_is_in_the_recording_though_the_etcd_was_killed() {
        let mut etcd = Etcd::start(EtcdOptions::default()).await;
        let recorder = Recorder::start(&etcd).await;
        let traffic = Traffic::start(&etcd.access(), &TrafficOptions { seed: 1, ..TrafficOptions::default() });
        crate::bed::until("some writes", crate::bed::PATIENCE, async || (etcd.head().await.0 > 50).then_some(())).await;
        etcd.kill();
        etcd.restart().await;
        let acknowledged = traffic.finish().await;
        let head = etcd.head().await;
        let history = recorder.finish(head).await;
        assert!(acknowledged.len() > 500, "{} acknowledgements", acknowledged.len());
        for ack in &acknowledged {
            assert_eq!(history.revisions.get(&ack.revision), Some(&ack.changes), "revision {}", ack.revision);
        }
        let everything = Ranges::new(&[], &[]);
        let (at, keys) = etcd.read(&everything, None).await;
        assert_eq!(history.state_at(at, &everything), keys);
    }

    #[tokio::test]
    async fn a_transfer_keeps_the_sum_and_is_acknowledged_as_it_was_committed() {
        let etcd = Etcd::start(EtcdOptions::default()).await;
        let recorder = Recorder::start(&etcd).await;
        let bank = Bank { prefix: "/bank/".into(), accounts: 5, balance_first: 100 };
        let mut kv = etcd.kv().await;
        bank.open(&mut kv).await;
        let ack = bank.transfer(&mut kv, &mut StdRng::seed_from_u64(1)).await.unwrap().unwrap();
        let (_, keys) = etcd.read_all().await;
        assert_eq!(bank.sum(&keys), Some(bank.total()));
        let history = recorder.finish(ack.revision).await;
        assert_eq!(history.revisions.get(&ack.revision), Some(&ack.changes));
    }
}
