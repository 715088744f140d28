//! Job: name each place at which a process can be made to end on purpose, and end it there.
//! Input: `ETCD_FERRY_FAILPOINTS`, such as `spooled=return`. Output: an abort, and the place's name on standard error.
//! Edge: only with the feature `failpoints`; without it nothing is read, and a place is no code.
//! Always true: every place is in the one list below, under a name of its own.

use crate::model::Side;
use During::{BaseCopy, Compaction, Following, Mark, Outage, Pages, Parts, Repair, Start};
use Side::{Origin, Replica};

/// True if this build can be made to end at a point.
pub fn are_compiled_in() -> bool {
    cfg!(feature = "failpoints")
}

/// What a link does when a process passes a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum During {
    /// The origin's sidecar starts, and says hello.
    Start,
    Following,
    /// A revision is carried that is larger than a request.
    Parts,
    /// The link is carried on while the replica's etcd does not answer, and after that.
    Outage,
    BaseCopy,
    /// Of a base copy, at each page.
    Pages,
    /// A base copy is under way, and etcd compacts the revision that its pages are read at.
    Compaction,
    Mark,
    Repair,
}

impl During {
    pub fn as_str(self) -> &'static str {
        match self {
            Start => "start",
            Following => "following",
            Parts => "following, in parts",
            Outage => "an outage",
            BaseCopy => "base copy",
            Pages => "base copy, each page",
            Compaction => "base copy, compaction",
            Mark => "mark",
            Repair => "repair",
        }
    }
}

/// A place between two steps.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    pub name: &'static str,
    /// Whose process passes it.
    pub sides: &'static [Side],
    pub during: During,
    /// What is done there, and what is not yet.
    pub stands: &'static str,
}

const fn origin(during: During, name: &'static str, stands: &'static str) -> Point {
    Point { name, sides: &[Origin], during, stands }
}

const fn replica(during: During, name: &'static str, stands: &'static str) -> Point {
    Point { name, sides: &[Replica], during, stands }
}

/// In what spool and journal have in common.
const fn both(during: During, name: &'static str, stands: &'static str) -> Point {
    Point { name, sides: &[Origin, Replica], during, stands }
}

/// From reading a revision to acknowledging it; then base copy, mark and repair.
pub const POINTS: &[Point] = &[
    origin(Start, "candidate-written", "a step to its candidacy is in etcd, and it has not looked who is elected"),
    origin(Start, "elected", "it is elected, and has said no hello"),
    origin(Start, "greeted", "its hello is answered, and it has not decided where to go on"),
    replica(Start, "term-taken", "the position bears the new shipper's term, and the hello is not answered"),
    replica(Start, "session-opened", "the session is open, and the origin is not told"),
    origin(Start, "stream-opened", "the stream is being opened, and nothing is shipped"),
    origin(Start, "waymark-written", "the next waymark is in etcd, and the session does not know"),
    origin(Start, "applied-published", "what is applied is published for standbys, and the session does not know"),
    origin(Following, "watch-read", "events are read, and not sequenced"),
    origin(Following, "sequenced", "revisions are whole and in order, and not in the spool"),
    origin(Following, "spooled", "they are in the spool's memory, and the lag has not heard of them"),
    both(Following, "segment-written", "a record is in the file, and not synced"),
    both(Outage, "segment-synced", "records are synced, and nobody is told that they are durable"),
    both(Outage, "segment-full", "a full file is synced, and there is no next one"),
    both(Outage, "segment-unnamed", "the next file is written, and has no name that counts"),
    both(Outage, "segment-rolled", "the next file is there, and empty"),
    both(Outage, "segment-unlinked", "a file that is applied is unlinked, and its folder not synced"),
    both(BaseCopy, "segment-cleared", "a file that starts anew is there, and the old ones still are"),
    origin(Following, "spool-read", "revisions are read from the spool, and have no seq"),
    origin(Following, "frame-encoded", "a frame is encoded, and not sent"),
    origin(Following, "shipment-sent", "a frame is handed to the connection"),
    replica(Following, "frame-received", "a frame is received, and not decoded"),
    replica(Following, "frame-admitted", "its revisions are admitted, and not in the journal"),
    replica(Following, "journaled", "they are in the journal's memory, and not in the dedupe log"),
    replica(Following, "dedupe-noted", "the dedupe log is told of them as pending"),
    replica(Following, "txn-made", "a transaction of changes and position is made, and not sent"),
    replica(Following, "txn-answered", "etcd has answered it, and the applier has noted nothing"),
    replica(Parts, "part-applied", "a part of a revision is committed, and the next one not"),
    replica(Following, "txn-noted", "the applier knows that it is committed, and has told nobody"),
    replica(Following, "journal-trimmed", "the journal may let go of it, and the dedupe log is not told"),
    replica(Following, "dedupe-done", "the dedupe log is told that it is done"),
    replica(Following, "ack-made", "an ack is made, and not sent"),
    replica(Following, "ack-sent", "an ack is handed to the connection"),
    origin(Following, "ack-heard", "an ack is read, and not taken into account"),
    origin(Outage, "durable-heard", "what is not applied is heard to be durable, and kept"),
    origin(Following, "applied-heard", "the position is heard to have moved, and nothing is trimmed"),
    origin(Following, "spool-trimmed", "the spool may let go of it, and the lag has not heard of it"),
    origin(BaseCopy, "anchor-opened", "the watch covers all after the anchor, and the replica is not told"),
    origin(BaseCopy, "copy-begun", "the replica is told of the copy, and no page is read"),
    replica(BaseCopy, "guard-counted", "keys are counted for the guard, and nothing is written"),
    replica(BaseCopy, "epoch-opened", "the position opens the next epoch, and the journal holds the last one"),
    replica(BaseCopy, "journal-reset", "the journal is that of the next epoch, and no page is in"),
    origin(BaseCopy, "guard-passed", "the guard is passed, and no page is sent"),
    origin(Pages, "page-read", "a page is read, and not sent"),
    origin(Compaction, "pin-lost", "etcd has compacted what pages are read at, and the next is not read"),
    origin(Pages, "page-sent", "a page is handed to the connection"),
    replica(Pages, "page-compared", "a page is compared with what is there, and nothing of it written"),
    replica(Pages, "cursor-moved", "keys are in with their cursor, and the page may have more"),
    replica(Compaction, "anchor-moved", "keys are in that are later than the anchor, which has moved with them"),
    replica(Pages, "page-applied", "a page is in, and not acknowledged"),
    origin(BaseCopy, "copy-ended", "the replica is told that there is no more, and has not answered"),
    replica(BaseCopy, "cursor-gone", "the position has no cursor any more, and the copy is not acknowledged"),
    origin(BaseCopy, "copy-acknowledged", "the copy is acknowledged, and the stream does not follow"),
    replica(BaseCopy, "following-written", "the position says following, and nobody is told"),
    origin(Mark, "mark-made", "a mark has its place between two seqs, and is not sent"),
    origin(Mark, "mark-sent", "a mark is handed to the connection, and nothing is asked about it"),
    replica(Mark, "mark-reached", "the replica's revision at the mark is known, and not noted"),
    replica(Mark, "answer-made", "an answer about the mark is made, and not sent"),
    origin(Mark, "answer-heard", "an answer is heard, and not taken into account"),
    origin(Mark, "compared", "what both sides compare to is known, and nobody is told"),
    origin(Repair, "difference-known", "the keys that differ are known, and none is shipped"),
    origin(Repair, "repair-read", "what they are at the origin is read, and no message made of it"),
    origin(Repair, "repair-made", "a message with them is made, and not sent"),
    replica(Repair, "repair-reached", "a repair's place is reached, and nothing of it is written"),
    replica(Repair, "repair-committed", "keys of a repair are in, and more may follow"),
    replica(Repair, "repair-applied", "all keys of a message are in, and the origin is not told"),
    origin(Repair, "repair-heard", "the replica is heard to be mended, and more may be shipped"),
];

/// Passes a point: ends the process if this pass of it was asked for.
#[cfg(feature = "failpoints")]
pub fn reach(name: &'static str) {
    armed::reach(name);
}

/// Passes a point.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn reach(_name: &'static str) {}

#[cfg(feature = "failpoints")]
pub use armed::arm;

#[cfg(feature = "failpoints")]
mod armed {
    use super::POINTS;
    use fail_parallel::{FailPointRegistry, fail_point};
    use std::sync::{Arc, LazyLock};

    const VARIABLE: &str = "ETCD_FERRY_FAILPOINTS";

    static REGISTRY: LazyLock<Arc<FailPointRegistry>> = LazyLock::new(Arc::default);

    /// Takes what the environment asks for: `NAME=ACTIONS`, several with `;` between, in the words of fail-parallel. `return` ends the process;
    /// so `2*off->return` ends it at the third pass.
    pub fn arm() -> Result<(), String> {
        let Ok(asked) = std::env::var(VARIABLE) else { return Ok(()) };
        for one in asked.split(';').map(str::trim).filter(|one| !one.is_empty()) {
            let (name, actions) =
                one.split_once('=').ok_or_else(|| format!("{VARIABLE}: {one:?} is not NAME=ACTIONS"))?;
            if !POINTS.iter().any(|point| point.name == name) {
                return Err(format!("{VARIABLE}: there is no failpoint {name:?}: README.md#failpoints lists them"));
            }
            fail_parallel::cfg(REGISTRY.clone(), name, actions).map_err(|e| format!("{VARIABLE}: {name}: {e}"))?;
        }
        Ok(())
    }

    pub(super) fn reach(name: &'static str) {
        fail_point!(REGISTRY.clone(), name, |_| {
            eprintln!("failpoint {name}: the process ends here");
            std::process::abort()
        });
    }
}
