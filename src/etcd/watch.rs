//! Job: one watch stream: what etcd says on it, one message at a time.
//! Input: watch responses. Output: a `WatchSignal` for each, or why there is none.
//! Edge: part of the door to etcd, which opens the stream.
//! Always true: what another cluster says is not given out; after an error or an end nothing more comes.

use super::error::reaction;
use super::{CALL_DEADLINE, EtcdError, check_cluster};
use crate::model::{Change, ClusterId, Revision};
use bytes::Bytes;
use etcd_client::{WatchRequestSender, WatchResponse, WatchResponseStream};
use std::sync::{Arc, OnceLock};

/// What a watch stream says, one message at a time.
pub enum WatchSignal {
    Created,
    Events {
        /// Each with its `mod_revision`, in the order in which etcd sent them.
        events: Vec<(Revision, Change)>,
        /// True if the last revision goes on in the next message.
        fragment: bool,
    },
    /// Every event up to this revision has been sent.
    Progress(Revision),
    /// The watch began below this compacted revision, or fell behind it.
    Compacted(Revision),
    Canceled(String),
}

/// A watch stream. After an error or an end it gives nothing more: open another one.
pub struct Watch {
    pub(super) requests: WatchRequestSender,
    pub(super) responses: WatchResponseStream,
    pub(super) message_bytes_max: usize,
    pub(super) endpoints: String,
    /// Of its connection: balanced over several endpoints, the watch may have come to another one than the call before it.
    pub(super) cluster: Arc<OnceLock<ClusterId>>,
}

impl Watch {
    /// The next message; cancel-safe. `Ok(None)`: etcd closed the stream.
    pub async fn next(&mut self) -> Result<Option<WatchSignal>, EtcdError> {
        match self.responses.message().await {
            Ok(Some(response)) => {
                if let Some(header) = &response.0.header {
                    check_cluster(&self.cluster, ClusterId(header.cluster_id))?;
                }
                Ok(Some(signal_of(response)))
            }
            Ok(None) => Ok(None),
            Err(e) => {
                let error = reaction(&e, &self.endpoints);
                if matches!(error, EtcdError::AnswerTooLarge { .. }) {
                    return Err(EtcdError::AnswerTooLarge { limit_bytes: self.message_bytes_max });
                }
                Err(error)
            }
        }
    }

    /// Asks etcd how far this stream is; the answer comes as [`WatchSignal::Progress`].
    pub(super) async fn request_progress(&mut self) -> Result<(), EtcdError> {
        let asked = tokio::time::timeout(CALL_DEADLINE, self.requests.request_progress()).await;
        asked.map_err(|_| EtcdError::TimedOut)?.map_err(|e| reaction(&e, &self.endpoints))
    }
}

fn signal_of(response: WatchResponse) -> WatchSignal {
    let inner = response.0;
    if inner.compact_revision > 0 {
        return WatchSignal::Compacted(Revision::from_etcd(inner.compact_revision));
    }
    if inner.canceled || inner.watch_id < 0 && !inner.cancel_reason.is_empty() {
        return WatchSignal::Canceled(inner.cancel_reason);
    }
    if inner.created {
        return WatchSignal::Created;
    }
    if inner.events.is_empty() && !inner.fragment {
        return WatchSignal::Progress(Revision::from_etcd(inner.header.map_or(0, |header| header.revision)));
    }
    let events = inner.events.into_iter().filter_map(|event| {
        let kv = event.kv?;
        let (key, revision) = (Bytes::from(kv.key), Revision::from_etcd(kv.mod_revision));
        let change = match event.r#type {
            0 => Change::Put { key, value: Bytes::from(kv.value) },
            _ => Change::Delete { key },
        };
        Some((revision, change))
    });
    WatchSignal::Events { events: events.collect(), fragment: inner.fragment }
}
