//! Job: the base copy: read the link's ranges in pages and ship them, each with its revision and the cursor that it reaches.
//! Input: the origin's etcd, a cursor to go on at. Output: keys pages (guard), pages, the revision after which following starts.
//! Always true: the watch covers everything after the anchor before the first page is read; pages are in key order and without holes;
//! compaction changes the revision of the pages that follow, never their order.

use super::decide::not_opened;
use super::session::{Session, SessionEnd};
use super::ship::{Shipper, at_origin};
use super::watch::{Begins, TailState};
use crate::admin::next_command;
use crate::config::Limits;
use crate::etcd::{Columns, Etcd, EtcdError, Kv};
use crate::failpoint;
use crate::model::{
    Change, CopyProgress, Epoch, KeyRange, LinkState, Position, Ranges, Revision, Seq, Term, WholeRevision,
};
use crate::wire;
use crate::wire::parts::after_key;
use crate::wire::replicate::{CopyBegin, CopyEnd, Page, Shipment, shipment};
use bytes::Bytes;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Pages that were sent and not acknowledged; with those being read ahead they bound a copy's memory.
const PAGES_IN_FLIGHT_MAX: u64 = 6;
const PAGES_AHEAD: usize = 2;
/// The first page is small: nobody knows yet how large values are.
const KEYS_FIRST: usize = 64;
/// Keys of one page without values.
const KEYS_ONLY_MAX: usize = 5_000;
/// Once the pin was compacted so often, each page is read at a revision of its own.
const PINS_MAX: u32 = 2;
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// A watch that does not open is told of by the tail; a stream that says no more than that is worth little.
const ANCHOR_OPENS_MAX: Duration = Duration::from_secs(30);

/// Copies, then waits until the replica has all pages. Returns the revision after which following starts.
pub(super) async fn copy(
    ship: &mut Shipper,
    session: &mut Session,
    epoch: Epoch,
    cursor: Option<Bytes>,
) -> Result<Revision, SessionEnd> {
    let position = Position::from_json(&session.reply.position).ok();
    let resuming = cursor.is_some();
    session.copying = true;
    let anchor = match (&position, resuming) {
        (Some(position), true) => position.origin_revision,
        (_, _) => open_anchor(ship, session).await?,
    };
    if session.waymark.present.counter == 0 {
        session.write_waymark(ship).await?;
    }
    let ranges = ship.origin.send.ranges.clone();
    let keys_total = count(&session.etcd, ranges.pieces()).await?;
    let link_back = session.reply.link_back || ship.origin.link_back;
    let guard_pass = !resuming && !link_back && !session.reply.ranges_empty && keys_total > 0;
    let begin = CopyBegin {
        epoch: epoch.0,
        term: session.term.0,
        anchor_revision: anchor.0,
        waymark: Some(session.waymark.present.into()),
        allow_deletes: ship.resync.is_some_and(|r| r.allow_deletes),
        origin_empty: keys_total == 0,
        guard_pass,
        keys_total,
        resume: resuming,
        deletes_share_max: ship.origin.send.deletes_share_max,
        repair: false,
    };
    let keys_done = keys_total.saturating_sub(count(&session.etcd, &pieces_from(&ranges, cursor.as_ref())).await?);
    let mut copying = Copying { progress: CopyProgress { keys_done, keys_total }, sent: 0, highest: anchor };
    // The replica may open the epoch though its answer is lost: the next hello must not claim an older one.
    ship.learned_epoch(epoch);
    copying.show(ship, session, "base copy: looking at what it would delete");
    copying.send(ship, session, shipment::What::CopyBegin(begin)).await?;
    failpoint::reach("copy-begun");
    if guard_pass {
        let reader = Reader::new(session, ship, ranges.clone(), None, anchor, Columns::KeysOnly);
        copying.ship_pages(ship, session, reader, true).await?;
    }
    while !session.copy_ack.guard_passed {
        copying.wait(ship, session).await?;
    }
    failpoint::reach("guard-passed");
    (ship.resync, ship.copy_wanted) = (None, None);
    ship.follows_in(epoch);
    // From now on this is where the replica is: a standby whose spool began later begins it anew.
    session.publish(ship, epoch, anchor);
    copying.sent = session.copy_ack.pages;
    let reader = Reader::new(session, ship, ranges, cursor, anchor, Columns::KeysAndValues);
    copying.ship_pages(ship, session, reader, false).await?;
    let end = CopyEnd { anchor_revision: copying.highest.0 };
    copying.send(ship, session, shipment::What::CopyEnd(end)).await?;
    failpoint::reach("copy-ended");
    while !session.copy_ack.complete {
        copying.wait(ship, session).await?;
    }
    failpoint::reach("copy-acknowledged");
    let ack = session.copy_ack.clone();
    tracing::info!(link = %ship.origin.send.link, %anchor, written = ack.keys_written, equal = ack.keys_equal,
        deleted = ack.keys_deleted, conflicts = ack.conflicts, "base copy is complete");
    ship.view.send_modify(|view| {
        view.copy = None;
        view.count("copies", 1);
        view.count("copied_keys_written", ack.keys_written);
        view.count("copied_keys_equal", ack.keys_equal);
        view.count("copied_keys_deleted", ack.keys_deleted);
    });
    session.opened_epoch(ship, epoch, anchor).await;
    Ok(anchor)
}

/// Opens an epoch whose position says `repairing`: what the replica holds stays, and following starts at the anchor that is returned. The
/// session mends what differs as it does with a repair that was cut short.
pub(super) async fn open_repair(
    ship: &mut Shipper,
    session: &mut Session,
    epoch: Epoch,
) -> Result<Revision, SessionEnd> {
    session.copying = true;
    let anchor = open_anchor(ship, session).await?;
    if session.waymark.present.counter == 0 {
        session.write_waymark(ship).await?;
    }
    let begin = CopyBegin {
        epoch: epoch.0,
        term: session.term.0,
        anchor_revision: anchor.0,
        waymark: Some(session.waymark.present.into()),
        deletes_share_max: ship.origin.send.deletes_share_max,
        repair: true,
        ..CopyBegin::default()
    };
    let mut opening = Copying { progress: CopyProgress::default(), sent: 0, highest: anchor };
    ship.learned_epoch(epoch);
    opening.send(ship, session, shipment::What::CopyBegin(begin)).await?;
    while !session.copy_ack.complete {
        opening.wait(ship, session).await?;
    }
    session.opened_epoch(ship, epoch, anchor).await;
    Ok(anchor)
}

/// Has the tail watch everything after the present head, and returns that head. Under heavy compaction the head may be
/// compacted before the watch opens: then the next head is tried.
async fn open_anchor(ship: &mut Shipper, session: &mut Session) -> Result<Revision, SessionEnd> {
    const TRIES: u32 = 20;
    for _ in 0..TRIES {
        let look = session.etcd.look(&ship.origin.send.link.waymark_key()).await.map_err(|e| at_origin(&e))?;
        match restarted(ship, session, look.head).await? {
            Ok(()) => {
                failpoint::reach("anchor-opened");
                return Ok(look.head);
            }
            Err(TailState::Lost { .. }) => {}
            Err(TailState::Connecting { reason }) => return Err(not_opened(&reason)),
            Err(state) => return Err(SessionEnd::Wait(format!("the origin's watch did not open: {state:?}"))),
        }
    }
    Err(SessionEnd::Wait(format!("the origin was compacted past its head {TRIES} times before a watch could open")))
}

/// The tail restarted at an anchor, while receipts and commands are taken.
async fn restarted(
    ship: &mut Shipper,
    session: &mut Session,
    anchor: Revision,
) -> Result<Result<(), TailState>, SessionEnd> {
    let mut opening = std::pin::pin!(ship.restart_tail(anchor, None, Begins::Afresh, ANCHOR_OPENS_MAX));
    let mut ticks = tokio::time::interval(KEEP_ALIVE);
    loop {
        tokio::select! {
            biased;
            command = next_command(&mut ship.commands) => session.command(ship, command)?,
            receipt = session.next_receipt() => session.take(ship, receipt).await?,
            opened = &mut opening => return Ok(opened),
            _ = ticks.tick() => {
                session.keep_alive(ship);
                session.check_deadline()?;
            }
        }
    }
}

/// What of the ranges is still to be copied.
fn pieces_from(ranges: &Ranges, cursor: Option<&Bytes>) -> Vec<KeyRange> {
    let mut pieces = ranges.pieces().to_vec();
    if let Some(cursor) = cursor {
        pieces.retain(|p| p.to.is_empty() || p.to > *cursor);
        if let Some(first) = pieces.first_mut() {
            first.from = first.from.clone().max(cursor.clone());
        }
    }
    pieces
}

async fn count(etcd: &Etcd, pieces: &[KeyRange]) -> Result<u64, SessionEnd> {
    let mut keys = 0;
    for piece in pieces {
        keys += etcd.page(piece, 0, None, Columns::CountOnly).await.map_err(|e| at_origin(&e))?.count;
    }
    Ok(keys)
}

/// A copy's own account.
struct Copying {
    progress: CopyProgress,
    sent: u64,
    highest: Revision,
}

impl Copying {
    fn show(&self, ship: &Shipper, session: &Session, detail: &str) {
        ship.view.send_modify(|view| {
            view.state = LinkState::Copying;
            view.reason.clear();
            view.detail = detail.to_owned();
            view.epoch = session.epoch;
            view.copy = Some(self.progress);
        });
    }

    /// Sends, while receipts are taken: a replica that refuses is heard at once.
    async fn send(
        &mut self,
        ship: &mut Shipper,
        session: &mut Session,
        what: shipment::What,
    ) -> Result<(), SessionEnd> {
        let outbound = session.outbound.clone();
        let mut shipment = Some(Shipment { what: Some(what) });
        let mut ticks = tokio::time::interval(KEEP_ALIVE);
        while shipment.is_some() {
            tokio::select! {
                biased;
                command = next_command(&mut ship.commands) => session.command(ship, command)?,
                receipt = session.next_receipt() => session.take(ship, receipt).await?,
                permit = outbound.reserve() => match permit {
                    Ok(permit) => if let Some(shipment) = shipment.take() { permit.send(shipment) },
                    Err(_) => return Err(SessionEnd::HelloAgain("the stream closed during the base copy".to_owned())),
                },
                _ = ticks.tick() => session.check_deadline()?,
            }
        }
        Ok(())
    }

    /// Waits for one receipt (or a second).
    async fn wait(&mut self, ship: &mut Shipper, session: &mut Session) -> Result<(), SessionEnd> {
        tokio::select! {
            biased;
            command = next_command(&mut ship.commands) => session.command(ship, command),
            receipt = session.next_receipt() => session.take(ship, receipt).await,
            () = tokio::time::sleep(KEEP_ALIVE) => {
                session.keep_alive(ship);
                session.check_deadline()
            }
        }
    }

    /// Ships all pages of `reader`, at most [`PAGES_IN_FLIGHT_MAX`] ahead of their acknowledgements.
    async fn ship_pages(
        &mut self,
        ship: &mut Shipper,
        session: &mut Session,
        reader: Reader,
        keys_only: bool,
    ) -> Result<(), SessionEnd> {
        let (pages, mut incoming) = mpsc::channel(PAGES_AHEAD);
        let mut reading = JoinSet::new();
        reading.spawn(reader.run(pages));
        self.sent = session.copy_ack.pages;
        loop {
            // Following could not begin where this copy ends: better to begin anew at once.
            session.check_tail(ship)?;
            while self.sent >= session.copy_ack.pages + PAGES_IN_FLIGHT_MAX {
                self.wait(ship, session).await?;
            }
            let page = tokio::select! {
                biased;
                command = next_command(&mut ship.commands) => {
                    session.command(ship, command)?;
                    continue;
                }
                receipt = session.next_receipt() => {
                    session.take(ship, receipt).await?;
                    continue;
                }
                page = incoming.recv() => page,
                () = tokio::time::sleep(KEEP_ALIVE) => {
                    session.keep_alive(ship);
                    session.check_deadline()?;
                    continue;
                }
            };
            let Some(page) = page else { return Ok(()) };
            let page = page.map_err(|e| at_origin(&e))?;
            failpoint::reach("page-read");
            self.highest = self.highest.max(page.revision);
            let bytes_raw: usize = page.kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
            if !keys_only {
                self.progress.keys_done += page.kvs.len() as u64;
            }
            let page = page.encode();
            let bytes_sent = page.frame.len() as u64;
            let what = if keys_only { shipment::What::KeysPage(page) } else { shipment::What::Page(page) };
            self.send(ship, session, what).await?;
            failpoint::reach("page-sent");
            self.sent += 1;
            ship.view.send_modify(|view| {
                view.bytes_raw += bytes_raw as u64;
                view.bytes_sent += bytes_sent;
                view.copy = Some(self.progress);
                if !keys_only {
                    view.detail =
                        format!("base copy: {} of {} keys sent", self.progress.keys_done, self.progress.keys_total);
                }
            });
        }
    }
}

/// One page as it was read.
struct ReadPage {
    from: Bytes,
    to: Bytes,
    revision: Revision,
    kvs: Vec<Kv>,
    last: bool,
}

impl ReadPage {
    fn encode(self) -> Page {
        let changes = self.kvs.into_iter().map(|kv| Change::Put { key: kv.key, value: kv.value }).collect();
        let whole = WholeRevision { revision: self.revision, changes };
        let digest = wire::digest::of_revision(&whole);
        let frame = wire::frame::encode_standalone(Epoch(0), Term(0), Seq(0), &[whole], &[digest]);
        Page { from: self.from, to: self.to, revision: self.revision.0, frame, last: self.last }
    }
}

/// Reads the ranges page by page, ahead of the shipping.
struct Reader {
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
    fn new(
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
            bytes_max: limits.page_bytes_max,
        }
    }

    async fn run(mut self, pages: mpsc::Sender<Result<ReadPage, EtcdError>>) {
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
