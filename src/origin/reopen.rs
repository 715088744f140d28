//! Job: where a watch begins that is opened again, and whether the origin is still the one that was watched.
//! Input: what the spool holds, what etcd says of itself and of its compaction. Output: a sequencer with its first revision; verdicts.
//! Pure: no clock, no I/O.
//! Always true: a watch begins where the spool ends, or at its last revision to see that again; what compaction took is never passed over.

use super::sequence::{Carried, OriginWaymark, Sequencer};
use crate::model::{ClusterId, Digest, LinkName, Ranges, Revision};
use crate::wire::digest;

/// What the spool holds, as far as a watch needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spooled {
    pub covered: Revision,
    pub last: Option<(Revision, Digest)>,
}

/// The sequencer of a watch, and the revision that the watch begins at. `shows_last`: etcd still shows the spool's last revision whole.
pub fn sequencer(
    link: &LinkName,
    ranges: Ranges,
    spooled: Spooled,
    shows_last: bool,
    revision_bytes_max: usize,
) -> (Sequencer, Revision) {
    let sequencer = Sequencer::new(link, ranges, spooled.covered, revision_bytes_max);
    match spooled.last.filter(|_| shows_last) {
        Some((revision, digest)) => {
            let carried = Carried { revision, digest, peer: None, digest_of: digest::of_revision };
            (sequencer.expect(carried), revision)
        }
        None => (sequencer, spooled.covered.next()),
    }
}

/// A watch that began at `from` was refused: true if all that is missing is what the spool has, so that one after its end sees the rest.
/// Of the revision at which it is compacted etcd does not show everything: before 3.5.18 its deletes are gone.
pub fn goes_on_after_end(from: Revision, covered: Revision, compacted: Revision) -> bool {
    from <= covered && compacted <= covered
}

/// The cluster and its waymark at two connects, `before` and `now`.
pub fn same_origin(before: (ClusterId, OriginWaymark), now: (ClusterId, OriginWaymark)) -> bool {
    let (was, is) = (before.1.present, now.1.present);
    let older = is.counter < was.counter;
    let other = is.counter == was.counter && is != was;
    before.0 == now.0 && !older && !other
}

/// Whether two looks, of which either may have come first, cannot have been at the same origin.
pub fn is_another(one: (ClusterId, OriginWaymark), other: (ClusterId, OriginWaymark)) -> bool {
    !same_origin(one, other) && !same_origin(other, one)
}

#[cfg(test)]
mod tests {
    use super::super::sequence::{Event, WatchMessage};
    use super::*;
    use crate::model::{Change, Waymark, WholeRevision};

    fn message(revision: u64) -> WatchMessage {
        let change = Change::Put { key: "/a".into(), value: "1".into() };
        let events = vec![Event { revision: Revision(revision), change }];
        WatchMessage { events, fragment: false }
    }

    fn digest_of(revision: u64) -> Digest {
        let changes = vec![Change::Put { key: "/a".into(), value: "1".into() }];
        digest::of_revision(&WholeRevision { revision: Revision(revision), changes })
    }

    fn begun(spooled: Spooled, shows_last: bool) -> (Sequencer, Revision) {
        sequencer(&LinkName::new("config").unwrap(), Ranges::new(&[], &[]), spooled, shows_last, 1_000)
    }

    #[test]
    fn a_watch_begins_at_the_spools_last_revision_and_sees_whether_it_is_the_same() {
        let spooled = Spooled { covered: Revision(15), last: Some((Revision(10), digest_of(10))) };
        let (mut same, from) = begun(spooled, true);
        assert_eq!(from, Revision(10));
        assert_eq!(same.push(message(10)).unwrap(), vec![]);
        let other = Spooled { last: Some((Revision(10), digest_of(9))), ..spooled };
        assert!(begun(other, true).0.push(message(10)).is_err());
    }

    #[test]
    fn a_watch_begins_after_the_spools_end_where_its_last_revision_is_compacted_or_none() {
        let spooled = Spooled { covered: Revision(15), last: Some((Revision(10), digest_of(10))) };
        for (spooled, shows_last) in [(spooled, false), (Spooled { last: None, ..spooled }, true)] {
            let (mut sequencer, from) = begun(spooled, shows_last);
            assert_eq!(from, Revision(16));
            assert_eq!(sequencer.push(message(16)).unwrap().len(), 1);
        }
    }

    #[test]
    fn a_compaction_within_what_the_spool_has_is_no_loss() {
        assert!(goes_on_after_end(Revision(10), Revision(15), Revision(15)));
        assert!(!goes_on_after_end(Revision(10), Revision(15), Revision(16)), "its deletes may be gone");
        assert!(!goes_on_after_end(Revision(16), Revision(15), Revision(15)));
    }

    #[test]
    fn an_origin_whose_waymark_went_back_or_is_another_is_not_the_same() {
        let at = |cluster, counter, id| {
            (ClusterId(cluster), OriginWaymark { present: Waymark { counter, id }, previous: None })
        };
        assert!(same_origin(at(1, 4, 44), at(1, 4, 44)));
        assert!(same_origin(at(1, 4, 44), at(1, 5, 55)));
        assert!(!same_origin(at(1, 4, 44), at(1, 3, 33)));
        assert!(!same_origin(at(1, 4, 44), at(1, 4, 45)));
        assert!(!same_origin(at(1, 4, 44), at(2, 4, 44)));
        for (other, expected) in [
            (at(1, 4, 44), false),
            (at(1, 5, 55), false),
            (at(1, 3, 33), false),
            (at(1, 4, 45), true),
            (at(2, 5, 55), true),
        ] {
            let one = at(1, 4, 44);
            assert_eq!((is_another(one, other), is_another(other, one)), (expected, expected), "{other:?}");
        }
    }
}
