//! Job: the origin's half of a base copy, stepped: pages at a pinned revision, or each at its own once the pin is compacted.
//! Input: the origin's etcd, ranges, a cursor. Output: pages in key order.
//! Pure: no clock, no I/O.
//! Always true: as in the product's origin/reader.rs; pages leave no hole between them.

use super::etcd::{Compacted, Etcd};
use super::random::Random;
use bytes::Bytes;
use etcd_ferry::model::{Epoch, KeyRange, Ranges, Revision};
use std::collections::VecDeque;

const PINS_MAX: u32 = 2;
const PAGE_KEYS_MAX: usize = 24;

/// A copy under way.
pub struct Copy {
    pub epoch: Epoch,
    pub anchor: Revision,
    /// The keys-only pass before the first write.
    pub guard: Option<Reader>,
    pub pages: Reader,
    pub sent: u64,
    pub ended: bool,
}

pub struct Reader {
    pieces: VecDeque<KeyRange>,
    pin: Option<Revision>,
    pins_lost: u32,
    pub highest: Revision,
}

pub struct Page {
    pub range: KeyRange,
    pub revision: Revision,
    pub kvs: Vec<(Bytes, Bytes)>,
    pub last: bool,
}

impl Reader {
    pub fn new(ranges: &Ranges, cursor: Option<Bytes>, anchor: Revision) -> Self {
        let mut pieces: VecDeque<KeyRange> = ranges.pieces().to_vec().into();
        if let Some(cursor) = cursor {
            pieces.retain(|piece| piece.to.is_empty() || piece.to > cursor);
            if let Some(first) = pieces.front_mut() {
                first.from = first.from.clone().max(cursor);
            }
        }
        Self { pieces, pin: Some(anchor), pins_lost: 0, highest: anchor }
    }

    pub fn next(&mut self, etcd: &Etcd, random: &mut Random) -> Option<Page> {
        let piece = self.pieces.front()?.clone();
        let limit = random.between(1, PAGE_KEYS_MAX);
        let (page, revision) = match etcd.page(&piece, limit, self.pin) {
            Ok(page) => {
                let revision = self.pin.unwrap_or(page.head);
                (page, revision)
            }
            Err(Compacted) => {
                self.pins_lost += 1;
                let page = etcd.page(&piece, limit, None).expect("the head is never compacted");
                let head = page.head;
                self.pin = (self.pins_lost < PINS_MAX).then_some(head);
                (page, head)
            }
        };
        self.highest = self.highest.max(revision);
        let to = match page.kvs.last().filter(|_| page.more) {
            Some((last, _)) => Bytes::from([&last[..], &[0]].concat()),
            None => piece.to.clone(),
        };
        if page.more {
            self.pieces[0].from = to.clone();
        } else {
            self.pieces.pop_front();
        }
        let last = self.pieces.is_empty();
        Some(Page { range: KeyRange { from: piece.from, to }, revision, kvs: page.kvs, last })
    }
}
