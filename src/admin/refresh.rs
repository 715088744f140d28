//! Job: have a link's own task write its status now, for whoever is to read it.
//! Input: who asks. Output: a word once the status is written.
//! Always true: who asks waits for [`REFRESH_MAX`] at most, and never for a task that has ended.

use super::{Directory, LinkHandle};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// A task writes its status in microseconds; one that is at work for longer is shown as it was.
const REFRESH_MAX: Duration = Duration::from_millis(250);
/// Whoever comes while so many are waiting waits for their turn.
const ASKING_MAX: usize = 4;

/// Told once the status is written.
pub type Asked = oneshot::Sender<()>;

/// Where a link's task is asked, and where it hears of it.
pub fn channel() -> (mpsc::Sender<Asked>, mpsc::Receiver<Asked>) {
    mpsc::channel(ASKING_MAX)
}

impl LinkHandle {
    /// Returns once the link's task has written its status, or has ended.
    async fn refresh(&self) {
        let (asked, written) = oneshot::channel();
        if self.refresh.send(asked).await.is_ok() {
            // A task that ends drops it unanswered.
            let _ = written.await;
        }
    }
}

impl Directory {
    /// Has each link's task write its status now; else it is up to half a second old.
    pub async fn refresh(&self) {
        let links = self.links();
        let all = futures::future::join_all(links.iter().map(LinkHandle::refresh));
        let _ = tokio::time::timeout(REFRESH_MAX, all).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CertificatesStatus, Listening};
    use super::*;
    use crate::model::{LinkName, LinkStatus, Seq, Side};
    use std::sync::Arc;
    use std::time::Instant;
    use tokio::sync::watch;
    use tokio_util::sync::CancellationToken;

    fn directory(links: Vec<LinkHandle>) -> Directory {
        let nowhere = ([127, 0, 0, 1], 1).into();
        Directory {
            region: "us-east-1".to_owned(),
            node: "us-east-1-a".to_owned(),
            version: "9.9.9".to_owned(),
            started: Instant::now(),
            listening: Listening { peer: nowhere, admin: nowhere, http: nowhere },
            links: watch::channel(Arc::from(links)).1,
            reloads: mpsc::channel(1).0,
            etcd: watch::channel(Vec::new()).1,
            certificates: watch::channel(CertificatesStatus::default()).1,
        }
    }

    fn handle(name: &str) -> (watch::Sender<LinkStatus>, mpsc::Receiver<Asked>, LinkHandle) {
        let link = LinkName::new(name).unwrap_or_else(|rule| panic!("{rule}"));
        let (sender, status) = watch::channel(LinkStatus::new(link.clone(), Side::Origin, String::new()));
        let (refresh, asked) = channel();
        let handle = LinkHandle::new((link, Side::Origin), status, refresh, CancellationToken::new());
        (sender, asked, handle)
    }

    #[tokio::test]
    async fn who_asks_reads_what_was_written_then_and_waits_neither_for_an_ended_task_nor_long_for_a_busy_one() {
        let ((living, mut asked, first), (_, ended, second), (_busy, _unheard, third)) =
            (handle("living"), handle("ended"), handle("busy"));
        drop(ended);
        let task = tokio::spawn(async move {
            while let Some(asked) = asked.recv().await {
                living.send_modify(|status| status.seq = Seq(status.seq.0 + 1));
                asked.send(()).unwrap_or_else(|()| panic!("nobody waits"));
            }
        });
        let both = directory(vec![first.clone(), second]);
        both.refresh().await;
        both.refresh().await;
        assert_eq!(both.snapshots()[0].seq, Seq(2));

        let with_busy = directory(vec![third, first]);
        let started = Instant::now();
        with_busy.refresh().await;
        assert_eq!(with_busy.snapshots()[1].seq, Seq(3));
        let waited = started.elapsed();
        assert!(waited >= REFRESH_MAX, "the busy one was given up too soon");
        assert!(waited < REFRESH_MAX * 20, "nobody waits {waited:?} for a busy one");
        drop((both, with_busy));
        task.await.unwrap_or_else(|error| panic!("{error}"));
    }
}
