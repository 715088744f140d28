//! Job: fill an etcd quickly, and tell which of its keys were written since.
//! Input: keys and values, an etcd. Output: the same keys in it; the revision that last wrote each key.
//! Always true: a batch is one revision and fits what a replica takes by default; stamps are read at one revision.

use super::etcd::{Etcd, KeyMap, whole_keyspace};
use bytes::Bytes;
use etcd_client::{GetOptions, Txn, TxnOp};
use etcd_ferry::model::{Ranges, Revision};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::collections::BTreeMap;
use tokio::task::JoinSet;

const BATCH_KEYS: usize = 100;
const BATCH_BYTES: usize = 1_000_000;
const BATCHES_IN_FLIGHT: usize = 8;

/// The revision that last wrote each key.
pub type Stamps = BTreeMap<Bytes, Revision>;

/// Puts all keys, many at a time; what was there stays.
pub async fn load(etcd: &Etcd, keys: &KeyMap) {
    let kv = etcd.kv().await;
    let mut loading = JoinSet::new();
    for batch in batches(keys) {
        if loading.len() >= BATCHES_IN_FLIGHT {
            loading.join_next().await.expect("there is one").expect("a batch is put");
        }
        let mut kv = kv.clone();
        loading.spawn(async move {
            kv.txn(Txn::new().and_then(batch)).await.expect("a batch is put");
        });
    }
    loading.join_all().await;
}

fn batches(keys: &KeyMap) -> Vec<Vec<TxnOp>> {
    let (mut batches, mut batch, mut bytes) = (Vec::new(), Vec::new(), 0);
    for (key, value) in keys {
        let size = key.len() + value.len();
        if batch.len() == BATCH_KEYS || (bytes + size > BATCH_BYTES && !batch.is_empty()) {
            batches.push(std::mem::take(&mut batch));
            bytes = 0;
        }
        bytes += size;
        batch.push(TxnOp::put(key.to_vec(), value.to_vec(), None));
    }
    batches.push(batch);
    batches
}

/// Keys that no compression makes smaller: `count` of them below `prefix`, in the order of their numbers.
pub fn noise(prefix: &str, count: usize, value_bytes: usize) -> KeyMap {
    let mut random = StdRng::seed_from_u64(count as u64);
    let mut one = |number| {
        let mut value = vec![0; value_bytes];
        random.fill_bytes(&mut value);
        (Bytes::from(format!("{prefix}{number:06}")), Bytes::from(value))
    };
    (0..count).map(&mut one).collect()
}

/// Keys of any bytes, and values of sizes from nothing to 300 KiB; `seed` says which.
pub fn oddities(prefix: &[u8], count: usize, seed: u64) -> KeyMap {
    eprintln!("oddities: seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut keys = KeyMap::new();
    while keys.len() < count {
        let mut key = prefix.to_vec();
        key.resize(prefix.len() + random.random_range(1..40), 0);
        random.fill_bytes(&mut key[prefix.len()..]);
        let largest: usize = [0, 1, 30, 1_000, 20_000][random.random_range(0..5)];
        let mut value = vec![0; random.random_range(0..=largest)];
        random.fill_bytes(&mut value);
        keys.insert(Bytes::from(key), Bytes::from(value));
    }
    keys.insert(Bytes::from([prefix, &[0xff, 0xff]].concat()), Bytes::from(vec![7; 300 * 1_024]));
    keys.insert(Bytes::from([prefix, &[0]].concat()), Bytes::new());
    keys
}

impl Etcd {
    /// The stamps of all keys in `ranges`.
    pub async fn stamps(&self, ranges: &Ranges) -> Stamps {
        let (_, keys) = self.all_stamps().await;
        keys.into_iter().filter(|(key, _)| ranges.contains(key)).collect()
    }

    /// The stamps of all keys, those of etcd-ferry too, and the head at which they were read.
    pub async fn all_stamps(&self) -> (Revision, Stamps) {
        let options = GetOptions::new().with_range(whole_keyspace().etcd_end()).with_keys_only();
        let mut got = self.kv().await.get(whole_keyspace().etcd_from(), Some(options)).await.expect("all keys");
        let head = Revision::from_etcd(got.header().map_or(0, |header| header.revision()));
        let stamp = |kv: etcd_client::KeyValue| {
            let revision = Revision::from_etcd(kv.mod_revision());
            (Bytes::from(kv.into_key_value().0), revision)
        };
        (head, got.take_kvs().into_iter().map(stamp).collect())
    }
}
