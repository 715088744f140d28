//! Job: read a range whole, page by page, at one revision.
//! Input: a connection, a range, the revision. Output: pages of keys and values, in key order and without holes.
//! Edge: reads of etcd alone; the caller paces them.
//! Always true: what is handed out is what etcd held at that revision; a page holds about the bytes that were asked for.

use crate::etcd::{Columns, Etcd, EtcdError, Kv};
use crate::model::{KeyRange, Revision};
use crate::wire::parts::after_key;

/// The first page is small: nobody knows yet how large values are.
const KEYS_FIRST: usize = 64;
/// A page is held in memory, at either side of a comparison.
const PAGE_BYTES: usize = 1 << 20;

/// A read under way.
pub struct Scan {
    etcd: Etcd,
    /// What is left to be read.
    rest: KeyRange,
    at: Revision,
    sizes: Sizes,
    over: bool,
}

/// How many keys fit a page, as far as is known.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    keys_limit: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { keys_limit: KEYS_FIRST }
    }
}

impl Scan {
    /// `sizes`: what reads of other ranges have learned.
    pub fn new(etcd: &Etcd, range: &KeyRange, at: Revision, sizes: Sizes) -> Self {
        Self { etcd: etcd.clone(), rest: range.clone(), at, sizes, over: false }
    }

    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// What has not been read yet.
    pub fn rest(&self) -> &KeyRange {
        &self.rest
    }

    /// True if the range was read to its end.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// At most `keys_max` of the keys that follow; the range is read to its end when [`Self::is_over`] says so.
    pub async fn page(&mut self, keys_max: usize) -> Result<Vec<Kv>, EtcdError> {
        if self.over {
            return Ok(Vec::new());
        }
        loop {
            let limit = self.sizes.keys_limit.min(keys_max).max(1);
            let page = match self.etcd.page(&self.rest, limit, Some(self.at), Columns::KeysAndValues).await {
                Err(EtcdError::AnswerTooLarge { .. }) if limit > 1 => {
                    self.sizes.keys_limit = limit / 2;
                    continue;
                }
                page => page?,
            };
            match page.kvs.last() {
                Some(last) if page.more => self.rest.from = after_key(&last.key),
                _ => self.over = true,
            }
            self.fit(&page.kvs);
            return Ok(page.kvs);
        }
    }

    /// Aims the next page at [`PAGE_BYTES`], and never more than doubles it.
    fn fit(&mut self, kvs: &[Kv]) {
        if kvs.is_empty() {
            return;
        }
        let bytes: usize = kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
        let wanted = (PAGE_BYTES / (bytes / kvs.len()).max(1)).max(1);
        self.sizes.keys_limit = wanted.min(self.sizes.keys_limit.saturating_mul(2));
    }
}
