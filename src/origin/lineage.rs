//! Job: of which run of its link what the spool holds is known to be, where etcd cannot show it any more.
//! Input: how far the spool reaches, what the open watch has shown, the cluster and the epoch that the replica follows. Output: whether the
//! spool may be shipped from, or shows that the origin was restored.
//! Pure: no clock, no I/O.
//! Always true: what was read before a watch ended is believed only where the next one shows the last revision of it again, or where the
//! replica still follows the run that it was read in.
//!
//! While no watch is open the origin may be restored or replaced, and another sidecar may go on with it. The spool's last revision tells, where
//! the origin can still show it. Where it is compacted, a watch that opens after the spool's end shows nothing of that, and what it appends
//! says nothing of what was before: then the epoch tells.

use super::resume::CarriedCheck;
use crate::model::{Revision, Run};
use serde::{Deserialize, Serialize};

/// The lineage of what a spool holds. The default is that of one that is begun anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// What comes after `doubted_through` is of this run; `None`: it is not known yet.
    run: Option<Run>,
    /// What is held up to here was read in another run than the present one; 0: nothing.
    other_through: Revision,
    /// What comes after it was appended by watches of which each showed the end of the one before; nothing that is held up to here was shown by
    /// the first of them. 0: all that is held is linked so.
    linked_after: Revision,
    /// What is held up to here was read before the present watch, which has not shown the end of it. Each start begins so.
    #[serde(skip)]
    doubted_through: Revision,
}

impl Lineage {
    /// As a process finds it. `kept`: as [`Lineage::to_json`] gave it; anything else says nothing, and what is held is then of no known run.
    /// `covered`: the spool's end.
    pub fn found(kept: &[u8], covered: Revision) -> Self {
        let kept: Option<(Self, u32)> = serde_json::from_slice(kept).ok();
        let kept = kept.filter(|(kept, checksum)| checksum_of(kept) == *checksum);
        Self { doubted_through: covered, ..kept.map_or(Self::of_no_run(covered), |(kept, _)| kept) }
    }

    /// Of what is held up to `covered` nothing is known.
    pub fn of_no_run(covered: Revision) -> Self {
        Self { other_through: covered, ..Self::default() }
    }

    /// What is to outlive the process: a pair, of the lineage and a checksum of it.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&(self, checksum_of(self))).unwrap_or_default()
    }

    /// The watch has ended, or another one is open that begins after the spool's end, `covered`.
    pub fn unwatched(&mut self, covered: Revision) {
        self.doubted_through = self.doubted_through.max(covered);
    }

    /// The first revision is about to be appended by a watch that began after the spool's end, `covered`, and showed nothing of it.
    pub fn appends_unlinked(&mut self, covered: Revision) {
        self.linked_after = self.linked_after.max(covered);
    }

    /// Up to here what is held is not linked to its last revision: that this is shown again proves nothing of it. 0: all of it is linked.
    pub fn linked_after(&self) -> Revision {
        self.linked_after
    }

    /// The origin has shown the spool's last revision again, and that is what it was.
    pub fn proven(&mut self) {
        self.doubted_through = self.doubted_through.min(self.linked_after);
    }

    /// Whether the origin is to show the spool's last revision again before anything after `reached` goes to a replica that follows `run`:
    /// something is held that nothing but the run speaks for, or the run is not the one that it was read in.
    pub fn asks_after(&self, run: Run, reached: Revision) -> bool {
        self.doubted_through > reached || self.is_of_another(run)
    }

    /// Whether the spool is known to be of another run than this one. Then it shows nothing of this one's origin, neither that it is the same nor
    /// that it is not.
    pub fn is_of_another(&self, run: Run) -> bool {
        self.run.is_some_and(|own| own != run)
    }

    /// Whether the origin was restored within the run that the replica follows: the spool's last revision, `last`, was read in it, and the origin
    /// has another now. That the replica's last carried revision is the origin's says nothing against it: one that writes the same again and
    /// again leaves the same at one revision of both histories.
    pub fn is_restored(&self, run: Run, last: Revision, shown: CarriedCheck) -> bool {
        self.run == Some(run) && last > self.other_through && shown == CarriedCheck::Other
    }

    /// The link is in this run, as far as this sidecar hears, and its watch stands. `applied`: the replica has everything up to it.
    pub fn serves(&mut self, run: Run, applied: Revision) {
        if self.doubted_through <= applied {
            self.judge(run, Revision(0));
        }
    }

    /// The replica follows this run. `base`: nothing up to it is held any more.
    pub fn judge(&mut self, run: Run, base: Revision) {
        let doubted = std::mem::take(&mut self.doubted_through);
        if doubted > base && self.run != Some(run) {
            self.other_through = self.other_through.max(doubted);
        }
        (self.run, self.linked_after) = (Some(run), Revision(0));
    }

    /// Whether the spool may be shipped from to a replica that has everything up to `reached`.
    pub fn ships_after(&self, reached: Revision) -> bool {
        reached >= self.other_through
    }
}

fn checksum_of(lineage: &Lineage) -> u32 {
    crc32c::crc32c(&serde_json::to_vec(lineage).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ClusterId, Epoch};

    const FIRST: Run = Run { cluster: ClusterId(1), epoch: Epoch(1) };
    const LATER: Run = Run { cluster: ClusterId(1), epoch: Epoch(2) };
    const ELSEWHERE: Run = Run { cluster: ClusterId(2), epoch: Epoch(1) };

    fn begun(run: Run) -> Lineage {
        let mut lineage = Lineage::default();
        lineage.serves(run, Revision(0));
        lineage
    }

    /// As the next process finds it.
    fn restarted(lineage: Lineage, covered: u64) -> Lineage {
        Lineage::found(&lineage.to_json(), Revision(covered))
    }

    #[test]
    fn what_an_earlier_process_left_is_shipped_in_the_run_that_it_was_read_in_and_in_no_other() {
        for (run, expected) in [(FIRST, true), (LATER, false), (ELSEWHERE, false)] {
            let mut lineage = restarted(begun(FIRST), 40);
            lineage.judge(run, Revision(0));
            assert_eq!(lineage.ships_after(Revision(39)), expected, "{run:?}");
            assert!(lineage.ships_after(Revision(40)), "what follows was read since");
            assert_eq!(restarted(lineage, 60).ships_after(Revision(39)), expected, "the next process knows it too");
        }
    }

    #[test]
    fn where_nothing_says_in_which_run_it_was_read_it_is_not_shipped() {
        let sound = begun(FIRST).to_json();
        for at in 0..=sound.len() {
            let (cut, mut bent) = (sound[..at].to_vec(), sound.clone());
            bent.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1);
            for kept in [cut, bent].into_iter().filter(|kept| *kept != sound) {
                let mut lineage = Lineage::found(&kept, Revision(40));
                lineage.judge(FIRST, Revision(0));
                assert!(!lineage.ships_after(Revision(39)), "{}", kept.escape_ascii());
                assert!(lineage.ships_after(Revision(40)));
            }
        }
    }

    #[test]
    fn a_watch_that_shows_the_last_revision_again_proves_all_before_it() {
        let mut lineage = restarted(begun(FIRST), 40);
        assert!(lineage.asks_after(FIRST, Revision(39)) && !lineage.asks_after(FIRST, Revision(40)));
        lineage.proven();
        assert!(!lineage.asks_after(FIRST, Revision(0)));
        lineage.judge(LATER, Revision(0));
        assert!(lineage.ships_after(Revision(0)));
    }

    #[test]
    fn a_revision_that_was_read_after_a_gap_proves_nothing_of_what_came_before() {
        // Three watches begin after the spool's end: the first and the last append a revision each, and a process ends in between.
        let mut lineage = begun(FIRST);
        lineage.unwatched(Revision(40));
        lineage.appends_unlinked(Revision(40));
        assert_eq!(lineage.linked_after(), Revision(40));
        let mut same = restarted(lineage, 60);
        same.proven();
        assert!(same.asks_after(FIRST, Revision(39)) && !same.asks_after(FIRST, Revision(40)));
        let mut other = same;
        other.judge(LATER, Revision(0));
        assert!(!other.ships_after(Revision(39)) && other.ships_after(Revision(40)));
        same.judge(FIRST, Revision(0));
        assert!(same.ships_after(Revision(0)) && same.linked_after() == Revision(0), "the run links it");
        lineage = restarted(lineage, 60);
        lineage.unwatched(Revision(60));
        lineage.appends_unlinked(Revision(60));
        lineage = restarted(lineage, 80);
        lineage.proven();
        lineage.judge(LATER, Revision(0));
        assert!(!lineage.ships_after(Revision(59)) && lineage.ships_after(Revision(60)));
    }

    #[test]
    fn an_origin_that_was_restored_within_the_run_is_known_by_the_spools_last_revision() {
        use CarriedCheck::{Compacted, Open, Other, Same};
        let lineage = restarted(begun(FIRST), 40);
        assert!(lineage.is_restored(FIRST, Revision(39), Other));
        assert!(!lineage.is_restored(LATER, Revision(39), Other), "the link has gone on since");
        for shown in [Open, Same, Compacted] {
            assert!(!lineage.is_restored(FIRST, Revision(39), shown), "{shown:?}");
        }
        assert!(lineage.is_of_another(LATER) && lineage.is_of_another(ELSEWHERE) && !lineage.is_of_another(FIRST));
        assert!(!Lineage::of_no_run(Revision(40)).is_of_another(FIRST), "that is not known");
        let mut gone_on = lineage;
        gone_on.judge(LATER, Revision(0));
        assert!(!gone_on.is_restored(LATER, Revision(39), Other), "it was read in the run before");
        assert!(gone_on.is_restored(LATER, Revision(41), Other));
    }

    #[test]
    fn a_gap_in_one_process_is_a_gap_too() {
        let mut lineage = begun(FIRST);
        lineage.unwatched(Revision(40));
        // The first hello comes before the next watch stands; the origin is restored, and another sidecar goes on, in between.
        lineage.judge(FIRST, Revision(0));
        assert!(lineage.ships_after(Revision(0)));
        lineage.unwatched(Revision(50));
        lineage.judge(LATER, Revision(0));
        assert!(!lineage.ships_after(Revision(49)) && lineage.ships_after(Revision(50)));
    }

    #[test]
    fn a_standby_whose_watch_never_ended_goes_on_in_each_epoch_that_it_hears_of() {
        let mut lineage = begun(FIRST);
        lineage.judge(LATER, Revision(0));
        assert!(lineage.ships_after(Revision(0)));
        assert!(!lineage.asks_after(LATER, Revision(0)));
        assert!(
            lineage.asks_after(FIRST, Revision(100)),
            "whether its watch stands at an origin that was left is asked once"
        );
    }

    #[test]
    fn an_epoch_that_is_only_heard_of_settles_no_doubt_while_what_is_doubted_is_not_applied() {
        let mut lineage = restarted(begun(FIRST), 40);
        lineage.serves(LATER, Revision(39));
        lineage.judge(LATER, Revision(39));
        assert!(!lineage.ships_after(Revision(39)));
        let mut same = restarted(begun(FIRST), 40);
        same.serves(FIRST, Revision(39));
        assert!(same.asks_after(FIRST, Revision(39)), "the origin has not been asked");
        let mut applied = restarted(begun(FIRST), 40);
        applied.serves(LATER, Revision(40));
        applied.unwatched(Revision(60));
        applied.judge(LATER, Revision(0));
        assert!(applied.ships_after(Revision(40)));
        assert!(!applied.ships_after(Revision(39)), "a replica that went back is not sent what was read before");
    }

    #[test]
    fn what_was_of_another_run_stays_so_however_the_link_goes_on() {
        let mut lineage = restarted(begun(FIRST), 40);
        lineage.judge(LATER, Revision(0));
        lineage.unwatched(Revision(60));
        lineage.judge(LATER, Revision(0));
        assert!(!lineage.ships_after(Revision(39)) && lineage.ships_after(Revision(40)));
        lineage = restarted(lineage, 80);
        lineage.judge(FIRST, Revision(0));
        assert!(!lineage.ships_after(Revision(79)) && lineage.ships_after(Revision(80)));
    }
}
