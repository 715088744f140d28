//! Job: the base copy: ship the link's ranges in pages, each with its revision and the cursor that it reaches.
//! Input: pages as reader.rs reads them, a cursor to go on at. Output: keys pages (guard), pages, the revision after which following starts.
//! Always true: the watch covers everything after the anchor before the first page is read.

use super::decide::{not_opened, unkept};
use super::reader::Reader;
use super::session::{Session, SessionEnd};
use super::ship::{Shipper, at_origin};
use super::tail::{Begins, Seen, TailState, seen_by};
use crate::admin::next_command;
use crate::etcd::{Columns, Etcd};
use crate::failpoint;
use crate::model::{CopyProgress, Epoch, KeyRange, LinkState, Position, Ranges, Revision, Run};
use crate::wire::replicate::{CopyBegin, CopyEnd, Shipment, shipment};
use bytes::Bytes;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Pages that were sent and not acknowledged; with those being read ahead they bound a copy's memory.
const PAGES_IN_FLIGHT_MAX: u64 = 6;
const PAGES_AHEAD: usize = 2;
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
        (_, _) => open_anchor(ship, session, epoch).await?,
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
        view.verification.copied();
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
    let anchor = open_anchor(ship, session, epoch).await?;
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
async fn open_anchor(ship: &mut Shipper, session: &mut Session, epoch: Epoch) -> Result<Revision, SessionEnd> {
    const TRIES: u32 = 20;
    for _ in 0..TRIES {
        let look = session.etcd.look(&ship.origin.send.link.waymark_key()).await.map_err(|e| at_origin(&e))?;
        match restarted(ship, session, look.head, seen_by(&look)).await? {
            Ok(()) => {
                let run = Run { cluster: look.cluster, epoch };
                ship.spool.serves(run, look.head).await.map_err(unkept)?;
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
    seen: Seen,
) -> Result<Result<(), TailState>, SessionEnd> {
    let mut opening = std::pin::pin!(ship.restart_tail(anchor, None, Some(seen), Begins::Afresh, ANCHOR_OPENS_MAX));
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
pub(super) fn pieces_from(ranges: &Ranges, cursor: Option<&Bytes>) -> Vec<KeyRange> {
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
