//! Job: read the link's ranges for a base copy, page by page, ahead of the shipping.
//! Input: the origin's etcd, ranges, a cursor to go on at. Output: pages, each with the revision that it was read at.
//! Edge: a task of its own, behind a bounded channel.
//! Always true: pages are in key order and without holes; compaction changes the revision of the pages that follow, never their order.

use super::anchor::pieces_from;
use super::session::Session;
use super::ship::Shipper;
use crate::config::Limits;
use crate::etcd::{Columns, Etcd, EtcdError, Kv};
use crate::failpoint;
use crate::model::{Change, Epoch, KeyRange, Ranges, Revision, Seq, Term, WholeRevision};
use crate::wire;
use crate::wire::parts::after_key;
use crate::wire::replicate::Page;
use bytes::Bytes;
use std::collections::VecDeque;
use tokio::sync::mpsc;

/// The first page is small: nobody knows yet how large values are.
const KEYS_FIRST: usize = 64;
/// Keys of one page without values.
const KEYS_ONLY_MAX: usize = 5_000;
/// Once the pin was compacted so often, each page is read at a revision of its own.
const PINS_MAX: u32 = 2;

/// One page as it was read.
pub(super) struct ReadPage {
    pub from: Bytes,
    pub to: Bytes,
    pub revision: Revision,
    pub kvs: Vec<Kv>,
    pub last: bool,
}

impl ReadPage {
    pub fn encode(self) -> Page {
        let changes = self.kvs.into_iter().map(|kv| Change::Put { key: kv.key, value: kv.value }).collect();
        let whole = WholeRevision { revision: self.revision, changes };
        let digest = wire::digest::of_revision(&whole);
        let frame = wire::frame::encode_standalone(Epoch(0), Term(0), Seq(0), &[whole], &[digest]);
        Page { from: self.from, to: self.to, revision: self.revision.0, frame, last: self.last }
    }
}

/// Reads the ranges page by page, ahead of the shipping.
pub(super) struct Reader {
    etcd: Etcd,
    pieces: VecDeque<KeyRange>,
    columns: Columns,
    /// Pages are read at this revision until etcd compacts it.
    pin: Option<Revision>,
    pins_lost: u32,
    keys_limit: usize,
    keys_max: usize,
    bytes_max: usize,
}

impl Reader {
    pub fn new(
        session: &Session,
        ship: &Shipper,
        ranges: Ranges,
        cursor: Option<Bytes>,
        anchor: Revision,
        columns: Columns,
    ) -> Self {
        let limits: &Limits = &ship.origin.limits;
        let pieces = VecDeque::from(pieces_from(&ranges, cursor.as_ref()));
        let keys_only = columns == Columns::KeysOnly;
        Self {
            etcd: session.etcd.clone(),
            pieces,
            columns,
            pin: Some(anchor),
            pins_lost: 0,
            keys_limit: if keys_only { KEYS_ONLY_MAX } else { KEYS_FIRST.min(limits.page_keys_max) },
            keys_max: if keys_only { KEYS_ONLY_MAX } else { limits.page_keys_max },
            bytes_max: limits.page_bytes_max.min(session.frame_bytes_max),
        }
    }

    pub async fn run(mut self, pages: mpsc::Sender<Result<ReadPage, EtcdError>>) {
        while let Some(piece) = self.pieces.pop_front() {
            let mut from = piece.from.clone();
            loop {
                let rest = KeyRange { from: from.clone(), to: piece.to.clone() };
                let read = match self.read(&rest).await {
                    Ok(read) => read,
                    Err(e) => {
                        let _ = pages.send(Err(e)).await;
                        return;
                    }
                };
                let (more, revision) = (read.more, read.revision);
                let end = if more {
                    read.kvs.last().map_or_else(|| piece.to.clone(), |kv| after_key(&kv.key))
                } else {
                    piece.to.clone()
                };
                let last_of_all = !more && self.pieces.is_empty();
                for page in cut(read.kvs, from, end.clone(), revision, last_of_all, self.bytes_max) {
                    if pages.send(Ok(page)).await.is_err() {
                        return;
                    }
                }
                if !more {
                    break;
                }
                from = end;
            }
        }
    }

    /// The next keys of `range`; the revision that they were read at, pinned while etcd lets us.
    async fn read(&mut self, range: &KeyRange) -> Result<Read, EtcdError> {
        loop {
            match self.etcd.page(range, self.keys_limit, self.pin, self.columns).await {
                Ok(page) => {
                    let revision = self.pin.unwrap_or(page.head);
                    if self.pin.is_none() && self.pins_lost < PINS_MAX {
                        self.pin = Some(page.head);
                    }
                    self.fit(&page.kvs);
                    return Ok(Read { kvs: page.kvs, revision, more: page.more });
                }
                Err(EtcdError::Compacted) if self.pin.is_some() => {
                    failpoint::reach("pin-lost");
                    self.pin = None;
                    self.pins_lost += 1;
                }
                Err(EtcdError::AnswerTooLarge { .. }) if self.keys_limit > 1 => self.keys_limit /= 2,
                Err(e) => return Err(e),
            }
        }
    }

    /// Aims the next page at the configured bytes, and never more than doubles it.
    fn fit(&mut self, kvs: &[Kv]) {
        let bytes: usize = kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
        let mean = (bytes / kvs.len().max(1)).max(1);
        let wanted = (self.bytes_max / mean).max(1);
        self.keys_limit = wanted.min(self.keys_limit * 2).min(self.keys_max);
    }
}

struct Read {
    kvs: Vec<Kv>,
    revision: Revision,
    more: bool,
}

/// Cuts what one read gave into pages of at most `bytes_max` (a page holds one key at least), without holes between them.
fn cut(
    kvs: Vec<Kv>,
    from: Bytes,
    end: Bytes,
    revision: Revision,
    last_of_all: bool,
    bytes_max: usize,
) -> Vec<ReadPage> {
    let mut pages = Vec::new();
    let mut page = ReadPage { from, to: Bytes::new(), revision, kvs: Vec::new(), last: false };
    let mut bytes = 0;
    for kv in kvs {
        let size = kv.key.len() + kv.value.len();
        if !page.kvs.is_empty() && bytes + size > bytes_max {
            page.to = kv.key.clone();
            let next = ReadPage { from: kv.key.clone(), to: Bytes::new(), revision, kvs: Vec::new(), last: false };
            pages.push(std::mem::replace(&mut page, next));
            bytes = 0;
        }
        bytes += size;
        page.kvs.push(kv);
    }
    page.to = end;
    page.last = last_of_all;
    pages.push(page);
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv(key: &str, value_bytes: usize) -> Kv {
        Kv {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Bytes::from(vec![7; value_bytes]),
            create_revision: Revision(1),
            mod_revision: Revision(1),
        }
    }

    #[test]
    fn pages_are_cut_by_bytes_without_holes_and_only_the_last_says_so() {
        let kvs = vec![kv("a", 10), kv("b", 10), kv("c", 100), kv("d", 10)];
        let pages = cut(kvs, Bytes::from_static(b"a"), Bytes::from_static(b"z"), Revision(7), true, 25);
        let edges: Vec<(&[u8], &[u8], usize, bool)> =
            pages.iter().map(|p| (&p.from[..], &p.to[..], p.kvs.len(), p.last)).collect();
        assert_eq!(
            edges,
            vec![(&b"a"[..], &b"c"[..], 2, false), (&b"c"[..], &b"d"[..], 1, false), (&b"d"[..], &b"z"[..], 1, true)]
        );
    }

    #[test]
    fn a_range_without_keys_is_one_empty_page_so_that_the_replica_deletes_what_it_has_there() {
        let pages = cut(Vec::new(), Bytes::from_static(b"a"), Bytes::new(), Revision(7), true, 25);
        assert_eq!(pages.len(), 1);
        assert!(pages[0].kvs.is_empty() && pages[0].last);
    }
}
