//! Job: what two etcds leave possible to whoever carries: their puts go from the watch of one into transactions of the other, and nothing else.
//! Input: two etcds. Output: the replica holds what the origin holds, until this is dropped.
//! Always true: one transaction at a time, with all that has come meanwhile, of each key the last; no file, no line, no TLS, no position, and
//! nothing that would survive an error: no replicator does with less.

use crate::bed::etcd::{Access, Etcd};
use etcd_client::{EventType, Txn, TxnOp, WatchOptions};
use std::collections::BTreeMap;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// etcd's own default for the operations of a transaction.
const OPS_MAX: usize = 128;
/// Messages of the watch that wait; more are left to etcd.
const MESSAGES_MAX: usize = 1_024;

type Puts = Vec<(Vec<u8>, Vec<u8>)>;

/// Both tasks end with it.
pub struct Straight {
    _tasks: JoinSet<()>,
}

impl Straight {
    /// Carries every put from the origin's first revision on.
    pub fn start(origin: &Etcd, replica: &Etcd) -> Self {
        let (puts, waiting) = mpsc::channel(MESSAGES_MAX);
        let mut tasks = JoinSet::new();
        tasks.spawn(watch(origin.access(), puts));
        tasks.spawn(write(replica.access(), waiting));
        Self { _tasks: tasks }
    }
}

async fn watch(origin: Access, puts: mpsc::Sender<Puts>) {
    let mut client = origin.client().await.watch_client().max_decoding_message_size(usize::MAX);
    let options = WatchOptions::new().with_all_keys().with_fragment().with_start_revision(1);
    let mut stream = client.watch("", Some(options)).await.unwrap();
    while let Some(message) = stream.message().await.unwrap() {
        let put = |event: &etcd_client::Event| {
            let kv = event.kv().filter(|_| event.event_type() == EventType::Put)?;
            Some((kv.key().to_vec(), kv.value().to_vec()))
        };
        if puts.send(message.events().iter().filter_map(put).collect()).await.is_err() {
            return;
        }
    }
}

async fn write(replica: Access, mut waiting: mpsc::Receiver<Puts>) {
    let mut kv = replica.kv().await;
    while let Some(first) = waiting.recv().await {
        let mut last: BTreeMap<Vec<u8>, Vec<u8>> = first.into_iter().collect();
        while let Ok(more) = waiting.try_recv() {
            last.extend(more);
        }
        let mut ops: Vec<TxnOp> = last.into_iter().map(|(key, value)| TxnOp::put(key, value, None)).collect();
        while !ops.is_empty() {
            let rest = ops.split_off(ops.len().min(OPS_MAX));
            kv.txn(Txn::new().and_then(ops)).await.unwrap();
            ops = rest;
        }
    }
}
