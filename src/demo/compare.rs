//! Job: the replica as an etcd client sees it: its revisions as they come, and in the end every key beside the origin's.
//! Input: both etcds. Output: each revision that moved the position; whether both sides are equal, and where not.
//! Always true: nothing here asks a sidecar; keys under `/etcd-ferry/` are not compared, they are never carried.

use super::meter::Arrived;
use super::regions::LINK;
use super::show::Seen;
use crate::etcd::{Columns, Etcd, Kv, WatchSignal};
use crate::model::{Change, FERRY_PREFIX, KeyRange, LinkName, Position, Ranges, Revision};
use anyhow::{anyhow, bail};
use bytes::Bytes;
use std::time::Instant;
use tokio::sync::mpsc;

const PAGE_KEYS: usize = 100;
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Tells of each revision of the replica after `from`, for ever.
pub async fn watch(etcd: Etcd, from: Revision, seen: mpsc::Sender<Seen>) -> anyhow::Result<()> {
    let position_key = LinkName::new(LINK).map_err(|rule| anyhow!(rule))?.position_key();
    let all = KeyRange { from: Bytes::new(), to: Bytes::new() };
    let mut watch = etcd.watch(&all, from.next(), MESSAGE_BYTES_MAX).await?;
    let mut open: Option<Open> = None;
    loop {
        let signal = watch.next().await?;
        let at = Instant::now();
        let (events, fragment) = match signal {
            Some(WatchSignal::Events { events, fragment }) => (events, fragment),
            Some(WatchSignal::Created | WatchSignal::Progress(_)) => continue,
            Some(WatchSignal::Compacted(_)) => bail!("the replica was compacted by someone else"),
            Some(WatchSignal::Canceled(reason)) => bail!("the watch at the replica was cancelled: {reason}"),
            None => bail!("the watch at the replica ended"),
        };
        for (revision, change) in events {
            if open.as_ref().is_some_and(|open| open.revision != revision) {
                tell(&mut open, at, &seen).await?;
            }
            let open = open.get_or_insert(Open { revision, changes: 0, position: None });
            match change {
                Change::Put { key, value } if key == position_key => open.position = Position::from_json(&value).ok(),
                change @ (Change::Put { .. } | Change::Delete { .. }) => {
                    open.changes += u64::from(!change.key().starts_with(FERRY_PREFIX))
                }
            }
        }
        if !fragment {
            tell(&mut open, at, &seen).await?;
        }
    }
}

/// A revision whose end has not come yet.
struct Open {
    revision: Revision,
    changes: u64,
    position: Option<Position>,
}

async fn tell(open: &mut Option<Open>, at: Instant, seen: &mpsc::Sender<Seen>) -> anyhow::Result<()> {
    let Some(Open { changes, position, revision }) = open.take() else { return Ok(()) };
    let Some(Position { epoch, seq, origin_revision, .. }) = position else {
        bail!("revision {revision} of the replica changed {changes} keys without moving the position");
    };
    seen.send(Seen::Arrived(Arrived { at, epoch, seq, origin_revision, changes })).await?;
    Ok(())
}

/// What a comparison found.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// Keys that are equal, and their bytes with their values'.
    pub keys: u64,
    pub bytes: u64,
    /// The first difference; `None`: both sides are equal.
    pub difference: Option<String>,
}

/// Both sides, key by key, while nobody writes.
pub async fn compare(origin: &Etcd, replica: &Etcd) -> anyhow::Result<Comparison> {
    let mut found = Comparison::default();
    for piece in Ranges::new(&[], &[]).pieces() {
        let mut range = piece.clone();
        loop {
            let page = |etcd: Etcd, range: KeyRange| async move {
                etcd.page(&range, PAGE_KEYS, None, Columns::KeysAndValues).await
            };
            let (here, there) =
                tokio::try_join!(page(origin.clone(), range.clone()), page(replica.clone(), range.clone()))?;
            found.difference = difference(&here.kvs, &there.kvs);
            if found.difference.is_some() {
                return Ok(found);
            }
            found.keys += here.kvs.len() as u64;
            found.bytes += here.kvs.iter().map(|kv| (kv.key.len() + kv.value.len()) as u64).sum::<u64>();
            let Some(last) = here.kvs.last().filter(|_| here.more || there.more) else { break };
            range.from = Bytes::from([&last.key[..], &[0]].concat());
        }
    }
    Ok(found)
}

/// The first one, between two pages that start at the same key.
fn difference(here: &[Kv], there: &[Kv]) -> Option<String> {
    for (one, two) in here.iter().zip(there) {
        let key = one.key.escape_ascii();
        match one.key.cmp(&two.key) {
            std::cmp::Ordering::Less => return Some(format!("{key} is missing at the replica")),
            std::cmp::Ordering::Greater => return Some(format!("{} is only at the replica", two.key.escape_ascii())),
            std::cmp::Ordering::Equal if one.value != two.value => {
                return Some(format!("{key} has another value at the replica"));
            }
            std::cmp::Ordering::Equal => {}
        }
    }
    let missing = here.get(there.len()).map(|kv| format!("{} is missing at the replica", kv.key.escape_ascii()));
    missing.or_else(|| there.get(here.len()).map(|kv| format!("{} is only at the replica", kv.key.escape_ascii())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(pairs: &[(&'static str, &'static str)]) -> Vec<Kv> {
        pairs
            .iter()
            .map(|(k, v)| Kv {
                key: Bytes::from(*k),
                value: Bytes::from(*v),
                create_revision: Revision(1),
                mod_revision: Revision(1),
            })
            .collect()
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        let here = keys(&[("a", "1"), ("c", "")]);
        let found = |there: &[(&'static str, &'static str)]| difference(&here, &keys(there));
        assert_eq!(found(&[("a", "1"), ("c", "")]), None);
        for (there, words) in [
            (&[("a", "2"), ("c", "")][..], "a has another value at the replica"),
            (&[("c", "")], "a is missing at the replica"),
            (&[("a", "1")], "c is missing at the replica"),
            (&[("a", "1"), ("b", "1"), ("c", "")], "b is only at the replica"),
            (&[("a", "1"), ("c", ""), ("d", "")], "d is only at the replica"),
        ] {
            assert_eq!(found(there).as_deref(), Some(words));
        }
    }
}
