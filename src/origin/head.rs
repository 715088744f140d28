//! Job: keep an eye on the origin's head.
//! Input: etcd's answers to a read of the waymark's key. Output: a `HeadView`, head events for the lag.
//! Always true: reads are linearizable and on a connection of their own, so that a frozen watch does not hide the head.

use super::{Clock, LinkEvent};
use crate::etcd::gate::Gate;
use crate::etcd::{Etcd, EtcdError};
use crate::model::{LinkName, Revision};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

const HEAD_INTERVAL: Duration = Duration::from_secs(2);

/// The origin's head, read linearizably each [`HEAD_INTERVAL`].
#[derive(Debug, Clone, Default)]
pub struct HeadView {
    pub revision: Revision,
    /// Why the head could not be read the last time.
    pub trouble: Option<String>,
}

/// Reads the head each [`HEAD_INTERVAL`] until `stop`.
pub async fn poll(
    etcd: Arc<Gate>,
    link: LinkName,
    view: watch::Sender<HeadView>,
    events: mpsc::Sender<LinkEvent>,
    clock: Clock,
    stop: CancellationToken,
) {
    let key = link.waymark_key();
    let mut connection: Option<Etcd> = None;
    let mut ticks = tokio::time::interval(HEAD_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let read = async {
            let etcd = match connection.take() {
                Some(etcd) => etcd,
                None => etcd.connect().await?,
            };
            let look = etcd.look(&key).await?;
            Ok::<_, EtcdError>((etcd, look))
        };
        let outcome = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            outcome = read => outcome,
        };
        match outcome {
            Ok((etcd, look)) => {
                connection = Some(etcd);
                view.send_replace(HeadView { revision: look.head, trouble: None });
                let at_ms = clock.now_ms();
                if events.send(LinkEvent::Head { revision: look.head, at_ms }).await.is_err() {
                    return;
                }
            }
            Err(e) => {
                view.send_modify(|view| view.trouble = Some(e.to_string()));
            }
        }
    }
}
