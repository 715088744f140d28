//! Job: when both sides of a link are compared, and the repairs that are shipped.
//! Input: an operator's wish, the interval, the session's receipts. Output: comparisons that run beside the frames; marks and repairs between
//! the frames; the view's `Verification`.
//! Edge: part of the session; a comparison ends with its stream.
//! Always true: a comparison that was asked for begins after it was asked for; one runs at a time; a repair holds what the origin is where the
//! stream stands; nothing is mended unasked, nor where a link back exists.

use super::Clock;
use super::compare::{Answer, Ask, Comparison, Failed, Pace, Shipped};
use super::found::{Compared, MendStop, Mending, Unmended};
use super::mend::{RepairOf, RepairReading, WANTED_KEYS_MAX};
use super::outcome::{tell, tell_failed};
use super::session::{Session, SessionEnd};
use super::ship::Shipper;
use super::tally::{Mark, Tally};
use crate::admin::LinkCommand;
use crate::etcd::EtcdError;
use crate::failpoint;
use crate::model::{Change, PartsProgress, Revision, Seq, WholeRevision};
use crate::scan::Sizes;
use crate::wire::replicate::{KeysWanted, Mark as MarkMessage, Repair, Shipment, shipment};
use crate::wire::{digest, frame};
use bytes::Bytes;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// A comparison asks for one thing at a time.
const ASKS_MAX: usize = 1;
/// More than the answers that a comparison has open, and the word that its mark failed.
const ANSWERS_MAX: usize = 32;
/// A repair that failed is begun again after so long, and then after twice as long each time: what both etcds are compacted past meanwhile
/// fails for as long as that goes on.
const REPAIR_PAUSE_FIRST: Duration = Duration::from_secs(2);
const REPAIR_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Between a repair and the comparison that proves it: its outcome is seen before the next one's.
const PROOF_PAUSE: Duration = Duration::from_secs(1);
/// The comparison of one stream that runs, and the one that is wanted next.
#[derive(Default)]
pub(super) struct Verifying {
    running: Option<Running>,
    /// Asked for while another ran that began before.
    wanted_next: Option<Wish>,
    /// The next one that is due goes at full speed: it proves what a repair did.
    hurry: bool,
    /// When the last one ended in this stream, and how many that found something did.
    ended: Option<(Instant, u32)>,
    marks: u64,
    repairs: u64,
    /// A mark that waits for the way to be free, and who waits for it.
    marking: Option<(oneshot::Sender<Mark>, Mark)>,
    reading: Option<RepairReading>,
    /// What the replica asks, until nothing else is being read.
    wanted: Option<KeysWanted>,
}

struct Running {
    /// By an operator; else it was due.
    asked: bool,
    started: Instant,
    tasks: JoinSet<Result<Compared, Failed>>,
    asks: mpsc::Receiver<Ask>,
    answers: mpsc::Sender<Answer>,
    progress: watch::Receiver<PartsProgress>,
}

/// What an operator asked for.
#[derive(Debug, Clone, Copy, Default)]
struct Wish {
    mending: Option<Mending>,
}

/// What the session has to do for a comparison.
pub(super) enum VerifyEvent {
    /// One is due.
    Due,
    Asked(Ask),
    Read(Result<Vec<Change>, EtcdError>),
    /// The replica retries a revision in quarantine.
    Wanted(KeysWanted),
    Ended(Result<Compared, Failed>),
}

impl Verifying {
    /// What comes next; cancel-safe. `due`: when the next one begins by itself.
    pub(super) async fn next(&mut self, due: Option<Instant>) -> VerifyEvent {
        if let Some(reading) = &mut self.reading {
            let read = reading.changes.join_next().await;
            let ended = || Err(EtcdError::Other("the read has ended".to_owned()));
            return VerifyEvent::Read(read.and_then(Result::ok).unwrap_or_else(ended));
        }
        if let Some(wanted) = self.wanted.take() {
            return VerifyEvent::Wanted(wanted);
        }
        let Some(running) = &mut self.running else {
            return match due {
                Some(due) => {
                    tokio::time::sleep_until(due).await;
                    VerifyEvent::Due
                }
                None => std::future::pending().await,
            };
        };
        tokio::select! {
            biased;
            Some(ask) = running.asks.recv() => VerifyEvent::Asked(ask),
            ended = running.tasks.join_next() => {
                VerifyEvent::Ended(ended.and_then(Result::ok).unwrap_or(Err(Failed::StreamEnded)))
            }
        }
    }

    /// True while a repair is being read: what is read is the origin where the stream stands, so the stream must stand still.
    pub(super) fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Passes an answer on to the comparison that waits for it.
    pub(super) fn take(&self, answer: Answer) {
        // Never full: it has fewer questions open. Of one that has ended, the answers are nobody's.
        if let Some(running) = &self.running {
            let _ = running.answers.try_send(answer);
        }
    }

    /// The replica asks what some keys are now; its last question counts.
    pub(super) fn want_keys(&mut self, wanted: KeysWanted) {
        self.wanted = Some(wanted);
    }

    /// The mark was sent: what is asked about it comes after it.
    pub(super) fn mark_sent(&mut self) {
        if let Some((reply, mark)) = self.marking.take() {
            failpoint::reach("mark-sent");
            let _ = reply.send(mark);
        }
    }
}

impl Session {
    /// A command during the stream; what ends it is an `Err`.
    pub(super) fn command(&mut self, ship: &mut Shipper, command: Option<LinkCommand>) -> Result<(), SessionEnd> {
        match command {
            Some(LinkCommand::Verify { reply }) => {
                let _ = reply.send(self.want(ship, Wish::default()));
                Ok(())
            }
            Some(LinkCommand::Repair { allow_deletes, reply }) => {
                let answer = if self.has_link_back(ship) {
                    Err("a link back exists over these keys, so nobody can tell which side is right: write the right value at one side, \
                         and it crosses"
                        .to_owned())
                } else {
                    let mending = Some(self.mending(ship, allow_deletes));
                    self.want(ship, Wish { mending })
                };
                let _ = reply.send(answer);
                Ok(())
            }
            command @ (Some(LinkCommand::Resync { .. }) | None) => Err(SessionEnd::Commanded(command)),
        }
    }

    fn mending(&self, ship: &Shipper, allow_deletes: bool) -> Mending {
        let deletes_share_max = ship.origin.send.deletes_share_max;
        Mending { allow_deletes, deletes_share_max, ends: self.shipped.acked.repairing }
    }

    fn has_link_back(&self, ship: &Shipper) -> bool {
        self.reply.link_back || ship.origin.link_back
    }

    /// The number of the comparison that will answer; it begins from now on.
    fn want(&mut self, ship: &mut Shipper, wish: Wish) -> Result<u64, String> {
        if !self.shipped.acked.heard {
            return Err(
                "its stream is being opened, and the replica has said nothing yet: ask again in a moment".to_owned()
            );
        }
        if self.shipped.acked.paused {
            return Err("it is paused at the replica, which notes no mark meanwhile: resume it there, then ask again"
                .to_owned());
        }
        if self.shipped.acked.held {
            return Err("it is held at the replica, which notes no mark meanwhile: `etcd-ferry status` at its sidecar says what for; decide \
                        there, then ask again"
                .to_owned());
        }
        if !self.shipped.acked.following && !self.shipped.acked.repairing {
            return Err("the base copy is not over at the replica: ask again once the link follows".to_owned());
        }
        let runs = ship.view.borrow().verification.runs;
        let promised = if self.verifying.running.as_ref().is_some_and(|running| running.asked) {
            let before = self.verifying.wanted_next.unwrap_or_default();
            self.verifying.wanted_next = Some(Wish { mending: wish.mending.or(before.mending) });
            runs + 2
        } else {
            // One that was due began earlier, and goes slowly.
            self.begin(ship, wish, true, 1.0);
            runs + 1
        };
        ship.view.send_modify(|view| view.runs_promised = promised);
        Ok(promised)
    }

    fn begin(&mut self, ship: &mut Shipper, wish: Wish, asked: bool, core_share: f64) {
        let (asks, asked_of_us) = mpsc::channel(ASKS_MAX);
        let (answers, incoming) = mpsc::channel(ANSWERS_MAX);
        let (progress, shown) = watch::channel(PartsProgress::default());
        let send = &ship.origin.send;
        let comparison = Comparison {
            etcd: self.etcd.clone(),
            ranges: send.ranges.clone(),
            pace: Pace { core_share },
            link_back: self.has_link_back(ship),
            mending: wish.mending,
            asks,
            outbound: self.outbound.clone(),
            answers: incoming,
            progress,
            tally: Tally::default(),
            sizes: Sizes::default(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(comparison.run());
        let (asks, started) = (asked_of_us, Instant::now());
        ship.quarantined_most = ship.view.borrow().quarantined;
        self.verifying.marking = None;
        self.verifying.reading.take_if(|reading| reading.wanted.is_none());
        self.verifying.running = Some(Running { asked, started, tasks, asks, answers, progress: shown });
        tracing::debug!(link = %send.link, asked, mend = wish.mending.is_some(), "a comparison of both sides begins");
        self.show_verification(ship);
    }

    /// When the next comparison begins by itself: at once where the last one says "as expected" of what is not any more. A repair that was
    /// cut short goes on, and one that the replica wants begins.
    pub(super) fn verification_due(&self, ship: &Shipper) -> Option<Instant> {
        if !self.shipped.acked.notes_marks() {
            return None;
        }
        let repair = || self.verifying.ended.map_or_else(Instant::now, |(at, times)| at + repair_pause(times));
        if self.shipped.acked.repairing {
            return Some(repair());
        }
        let wanted = self.shipped.acked.repair_wanted.then(repair);
        let by_itself = ship.verify_due.is_some() && self.shipped.acked.following;
        let again = (by_itself && ship.expected_no_more()).then(Instant::now);
        wanted.into_iter().chain(again).chain(ship.verify_due).min()
    }

    /// What a comparison needs; a shipment that is to be sent next, if it is one. `Err`: only a base copy helps.
    pub(super) fn verify_event(
        &mut self,
        ship: &mut Shipper,
        event: VerifyEvent,
    ) -> Result<Option<Shipment>, SessionEnd> {
        if let VerifyEvent::Ended(Ok(compared)) = &event
            && let Some(Unmended::Stopped(MendStop::TooMany { differing })) = compared.unmended
            && self.shipped.acked.repairing
        {
            ship.copy_wanted = Some(differing);
            return Err(SessionEnd::HelloAgain(format!("{differing} keys differ: a base copy brings them")));
        }
        Ok(self.shipment_for(ship, event))
    }

    fn shipment_for(&mut self, ship: &mut Shipper, event: VerifyEvent) -> Option<Shipment> {
        match event {
            VerifyEvent::Due => {
                self.begin_due(ship);
                None
            }
            VerifyEvent::Asked(Ask::Mark(reply)) => {
                self.verifying.marks += 1;
                let mark = Mark { id: self.verifying.marks, at: self.standing(ship) };
                self.verifying.marking = Some((reply, mark));
                let (after_seq, origin_revision) = (self.shipped.seq.0, mark.at.0);
                let message = MarkMessage { mark: mark.id, after_seq, origin_revision };
                failpoint::reach("mark-made");
                Some(Shipment { what: Some(shipment::What::Mark(message)) })
            }
            VerifyEvent::Asked(Ask::Repair { keys, last, reply }) => {
                self.read_repair(ship, keys, RepairOf { last, reply: Some(reply), wanted: None });
                None
            }
            VerifyEvent::Wanted(wanted) => {
                self.read_wanted(ship, wanted);
                None
            }
            VerifyEvent::Read(read) => self.repair_of(ship, read),
            VerifyEvent::Ended(outcome) => self.ended(ship, outcome),
        }
    }

    fn begin_due(&mut self, ship: &mut Shipper) {
        if self.shipped.acked.repairing {
            let mending = Some(self.mending(ship, false));
            return self.begin(ship, Wish { mending }, false, 1.0);
        }
        if !self.shipped.acked.following {
            // A replica whose base copy is not over has nothing to be compared yet.
            return ship.verified_now();
        }
        let hurry = std::mem::take(&mut self.verifying.hurry);
        if self.shipped.acked.repair_wanted && !hurry && !self.has_link_back(ship) {
            tracing::info!(link = %ship.origin.send.link, "somebody else wrote at the replica, which wants a repair");
            let mending = Some(self.mending(ship, false));
            return self.begin(ship, Wish { mending }, false, 1.0);
        }
        let core_share = if hurry { 1.0 } else { ship.origin.send.verify_core_share_max };
        self.begin(ship, Wish::default(), false, core_share);
    }

    fn read_repair(&mut self, ship: &Shipper, keys: Vec<Bytes>, of: RepairOf) {
        let stood = (self.shipped.seq, self.shipped.cursor);
        let bytes_max = ship.origin.limits.page_bytes_max.min(self.frame_bytes_max);
        let reading = RepairReading::begin(self.etcd.clone(), keys, (self.standing(ship), bytes_max), stood, of);
        self.verifying.reading = Some(reading);
    }

    fn read_wanted(&mut self, ship: &Shipper, wanted: KeysWanted) {
        let inside = wanted.keys.iter().all(|key| ship.origin.send.ranges.contains(key));
        if !inside || wanted.keys.len() > WANTED_KEYS_MAX {
            tracing::error!(link = %ship.origin.send.link, "the replica asks for keys that are not the link's, or for too many: it is not answered");
            return;
        }
        self.read_repair(ship, wanted.keys.clone(), RepairOf { last: false, reply: None, wanted: Some(wanted) });
    }

    /// A repair of what was read, if the stream still stands where it was read.
    fn repair_of(&mut self, ship: &Shipper, read: Result<Vec<Change>, EtcdError>) -> Option<Shipment> {
        let reading = self.verifying.reading.take()?;
        let (at, keys, wanted) = (reading.at, reading.keys, reading.wanted.as_ref().map_or(0, |wanted| wanted.wanted));
        let changes = match read {
            Ok(changes) if reading.stood == (self.shipped.seq, self.shipped.cursor) => changes,
            Ok(_) => {
                self.verifying.wanted = reading.moved().or(self.verifying.wanted.take());
                return None;
            }
            Err(error) => {
                reading.failed(&ship.origin.send.link, &error);
                return None;
            }
        };
        failpoint::reach("repair-read");
        self.verifying.repairs += 1;
        let (repair, count) = (self.verifying.repairs, changes.len());
        let whole = WholeRevision { revision: at, changes };
        let digest = digest::of_revision(&whole);
        let frame = frame::encode_standalone(self.epoch, self.term, Seq(0), &[whole], &[digest]);
        ship.view.send_modify(|view| view.bytes_sent += frame.len() as u64);
        let last = reading.last && count == keys;
        reading.shipped(Shipped { repair, keys: count });
        failpoint::reach("repair-made");
        let repair = Repair { repair, after_seq: self.shipped.seq.0, frame, last, wanted };
        Some(Shipment { what: Some(shipment::What::Repair(repair)) })
    }

    fn ended(&mut self, ship: &mut Shipper, outcome: Result<Compared, Failed>) -> Option<Shipment> {
        let running = self.verifying.running.take()?;
        let times = self.verifying.ended.map_or(0, |(_, times)| times);
        self.verifying.ended = Some((Instant::now(), times_after(times, &outcome)));
        ship.verified_now();
        let seconds = running.started.elapsed().as_secs_f64();
        let told = match outcome {
            Ok(compared) => {
                failpoint::reach("compared");
                if compared.mended.is_some() && compared.unmended.is_none() {
                    // Nothing is said to be equal that was not compared.
                    self.verifying.hurry = true;
                    ship.verify_due = Some(Instant::now() + PROOF_PAUSE);
                }
                Some(tell(ship, &compared, seconds))
            }
            Err(failed) => {
                tell_failed(ship, &failed);
                None
            }
        };
        ship.view.send_modify(|view| {
            view.verification.runs += 1;
            view.verification.running = None;
            view.count("verifications", 1);
        });
        if let Some(wish) = self.verifying.wanted_next.take() {
            self.begin(ship, wish, true, 1.0);
        }
        told
    }

    /// The stream has ended, and with it what was asked for.
    pub(super) fn abandon_verification(&mut self, ship: &mut Shipper, reason: &str) {
        (self.verifying.running, self.verifying.wanted_next, self.verifying.reading) = (None, None, None);
        self.verifying.wanted = None;
        let reason = format!("the stream to the replica ended: {reason}");
        ship.view.send_modify(|view| view.abandon_verification(&reason, Clock::new().now_ms()));
    }

    /// How far the one that runs is, for the view.
    pub(super) fn show_verification(&self, ship: &Shipper) {
        let running = self.verifying.running.as_ref().map(|running| *running.progress.borrow());
        ship.view.send_if_modified(|view| {
            let moved = view.verification.running != running;
            view.verification.running = running;
            moved
        });
    }

    /// What another sidecar, or this one before its restart, told the replica of a comparison.
    pub(super) fn learn_verified(&self, ship: &Shipper, revision: Revision, at_ms: u64) {
        ship.view.send_if_modified(|view| {
            let newer = at_ms > view.verification.verified_at_ms;
            if newer {
                (view.verification.verified_revision, view.verification.verified_at_ms) = (revision, at_ms);
            }
            newer
        });
    }
}

/// Of the comparisons that delay the next repair, one more, unless it found both sides equal.
fn times_after(times: u32, outcome: &Result<Compared, Failed>) -> u32 {
    match outcome {
        Ok(compared) if compared.differing == 0 => times,
        Ok(_) | Err(_) => times.saturating_add(1),
    }
}

/// After so many comparisons of this stream have ended that found something, or failed.
fn repair_pause(times: u32) -> Duration {
    REPAIR_PAUSE_FIRST.saturating_mul(1 << times.saturating_sub(1).min(16)).min(REPAIR_PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repair_that_fails_is_begun_again_soon_and_then_less_and_less_often() {
        let pauses: Vec<u64> =
            [1, 2, 3, 5, 6, 1_000, u32::MAX].into_iter().map(|n| repair_pause(n).as_secs()).collect();
        assert_eq!(pauses, [2, 4, 8, 32, 60, 60, 60]);
    }

    #[test]
    fn comparisons_that_find_both_sides_equal_delay_no_repair() {
        let equal = (0..10).fold(0, |times, _| times_after(times, &Ok(Compared::default())));
        assert_eq!(repair_pause(times_after(equal, &Err(Failed::NoAnswer))), REPAIR_PAUSE_FIRST);
        let differs = Compared { differing: 1, ..Compared::default() };
        assert_eq!(times_after(equal, &Ok(differs)), 1);
    }
}
