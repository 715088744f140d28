//! Job: ask the origin's etcd about its past: what one revision held, and whether it can still be shown.
//! Input: a revision of the link. Output: its digest, or why there is none.
//! Always true: nothing is told of a revision at or below the compaction, where etcd no longer shows deletes.

use super::sequence::{Event, Sequencer, WatchMessage};
use super::watch::MESSAGE_BYTES_CEILING;
use crate::config::Limits;
use crate::etcd::{Columns, Etcd, EtcdError, WatchSignal, watch_right};
use crate::model::{Digest, KeyRange, LINKS_PREFIX, LinkName, Ranges, Revision};
use crate::wire::digest;
use std::time::Duration;

const PROBE_DEADLINE: Duration = Duration::from_secs(10);
/// How often etcd is asked how far the watch is, while it has nothing to show.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// What the origin holds at one revision of the link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probed {
    Digest(Digest),
    Compacted,
    /// etcd has passed the revision and shows no change of the link there.
    Nothing,
}

/// False if etcd has compacted at or past `revision`: then it no longer shows that revision's deletes, and nothing can be told of it.
pub async fn shows_whole(etcd: &Etcd, revision: Revision) -> Result<bool, EtcdError> {
    let one = KeyRange::prefix(LINKS_PREFIX);
    match etcd.page(&one, 1, Some(Revision(revision.0.saturating_sub(1))), Columns::CountOnly).await {
        Ok(_) => Ok(true),
        Err(EtcdError::Compacted) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Reads one revision of the link from etcd's history, by a short watch that starts at it.
pub async fn probe(
    etcd: &Etcd,
    ranges: &Ranges,
    link: &LinkName,
    at: Revision,
    limits: &Limits,
) -> Result<Probed, EtcdError> {
    if !shows_whole(etcd, at).await? {
        return Ok(Probed::Compacted);
    }
    let reading = async {
        let mut watch = etcd.watch(&ranges.covering(), at, MESSAGE_BYTES_CEILING).await?;
        let mut sequencer =
            Sequencer::new(link, ranges.clone(), Revision(at.0.saturating_sub(1)), limits.revision_bytes_max);
        let mut ask = etcd.progress_asks(ASK_EVERY);
        let progress_key = link.progress_key();
        loop {
            tokio::select! {
                biased;
                signal = watch.next() => match probe_step(&mut sequencer, at, signal?) {
                    Some(outcome) => return outcome,
                    None => continue,
                },
                _ = ask.tick() => etcd.ask_progress(&mut watch, &progress_key).await?,
            }
        }
    };
    let read = tokio::time::timeout(PROBE_DEADLINE, reading).await.map_err(|_| EtcdError::TimedOut)?;
    let read = read.map_err(|e| e.needing(|| watch_right(&ranges.covering())))?;
    // Compacted meanwhile, the watch may have lacked deletes.
    if shows_whole(etcd, at).await? { Ok(read) } else { Ok(Probed::Compacted) }
}

fn probe_step(
    sequencer: &mut Sequencer,
    at: Revision,
    signal: Option<WatchSignal>,
) -> Option<Result<Probed, EtcdError>> {
    let Some(signal) = signal else {
        return Some(Err(EtcdError::Other("etcd closed the watch".to_owned())));
    };
    match signal {
        WatchSignal::Created => None,
        WatchSignal::Compacted(_) => Some(Ok(Probed::Compacted)),
        WatchSignal::Canceled(said) => Some(Err(EtcdError::Denied { right: String::new(), said })),
        WatchSignal::Progress(revision) if revision >= at => Some(Ok(Probed::Nothing)),
        WatchSignal::Progress(_) => None,
        WatchSignal::Events { events, fragment } => {
            let events = events.into_iter().map(|(revision, change)| Event { revision, change }).collect();
            match sequencer.push(WatchMessage { events, fragment }) {
                Err(e) => Some(Err(EtcdError::Other(e.to_string()))),
                Ok(whole) => {
                    let first = whole.iter().find(|w| w.is_of_the_link())?;
                    if first.whole.revision == at {
                        return Some(Ok(Probed::Digest(digest::of_revision(&first.whole))));
                    }
                    Some(Ok(Probed::Nothing))
                }
            }
        }
    }
}
