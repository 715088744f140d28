//! Job: every bound of the process, with its default, its key and whose it is.
//! Input: nothing. Output: `Limits`, and one by one.
//! Pure: no clock, no I/O.
//! Always true: a limit that is added is shown, compared and reloaded, or this does not compile.

use crate::model::Side;

/// Every bound of the process; each is a key of `[limits]` with the default given here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Spool files of one link. 8 GiB.
    pub spool_bytes_max: u64,
    /// Journal files of one link. 1 GiB.
    pub journal_bytes_max: u64,
    /// One segment file. 64 MiB.
    pub segment_bytes: u64,
    /// What one stage of one link keeps in memory for the next one. 8 MiB.
    pub queue_bytes_max: usize,
    /// Plain bytes of one frame, unless a single revision is larger. 1 MiB.
    pub frame_bytes_max: usize,
    /// The delta window's values, at each end of a link. 16 MiB.
    pub window_bytes_max: usize,
    /// One revision, plain. 256 MiB: a larger one stops the link.
    pub revision_bytes_max: usize,
    /// The replica etcd's `--max-txn-ops`. 128.
    pub txn_ops_max: usize,
    /// The replica etcd's `--max-request-bytes`. 1572864.
    pub request_bytes_max: usize,
    /// Keys of one page of a base copy. 1000.
    pub page_keys_max: usize,
    /// Bytes of one page of a base copy. 1 MiB.
    pub page_bytes_max: usize,
    /// So long without progress is a stall. 30 s.
    pub stall_seconds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            spool_bytes_max: 8 << 30,
            journal_bytes_max: 1 << 30,
            segment_bytes: 64 << 20,
            queue_bytes_max: 8 << 20,
            frame_bytes_max: 1 << 20,
            window_bytes_max: 16 << 20,
            revision_bytes_max: 256 << 20,
            txn_ops_max: 128,
            request_bytes_max: 1_572_864,
            page_keys_max: 1000,
            page_bytes_max: 1 << 20,
            stall_seconds: 30,
        }
    }
}

impl Limits {
    /// The most that `revision_bytes_max` can be set to.
    pub const REVISION_BYTES_CEILING: usize = 1 << 30;

    /// Every limit, and which side's links have it. Taken apart by name, so that one that is added is not forgotten here.
    pub(super) fn each(&self) -> [Limit; 12] {
        let Limits {
            spool_bytes_max,
            journal_bytes_max,
            segment_bytes,
            queue_bytes_max,
            frame_bytes_max,
            window_bytes_max,
            revision_bytes_max,
            txn_ops_max,
            request_bytes_max,
            page_keys_max,
            page_bytes_max,
            stall_seconds,
        } = *self;
        let wide = |limit: usize| u64::try_from(limit).unwrap_or(u64::MAX);
        let one = |key, origin, replica, value| Limit { key, origin, replica, value };
        [
            one("limits.spool_bytes_max", true, false, spool_bytes_max),
            one("limits.journal_bytes_max", false, true, journal_bytes_max),
            one("limits.segment_bytes", true, true, segment_bytes),
            one("limits.queue_bytes_max", true, true, wide(queue_bytes_max)),
            one("limits.frame_bytes_max", true, true, wide(frame_bytes_max)),
            one("limits.window_bytes_max", true, true, wide(window_bytes_max)),
            one("limits.revision_bytes_max", true, true, wide(revision_bytes_max)),
            one("limits.txn_ops_max", false, true, wide(txn_ops_max)),
            one("limits.request_bytes_max", false, true, wide(request_bytes_max)),
            one("limits.page_keys_max", true, false, wide(page_keys_max)),
            one("limits.page_bytes_max", true, false, wide(page_bytes_max)),
            one("limits.stall_seconds", true, true, stall_seconds),
        ]
    }
}

/// One key of `[limits]`.
pub(super) struct Limit {
    /// `limits.<key>`.
    pub key: &'static str,
    /// A link of this side has it.
    origin: bool,
    replica: bool,
    pub value: u64,
}

impl Limit {
    pub fn is_of(&self, side: Side) -> bool {
        match side {
            Side::Origin => self.origin,
            Side::Replica => self.replica,
        }
    }
}
