//! Job: tell what others write at the replica, under the link's prefixes, from what the link itself writes there.
//! Input: the revisions that this applier made, the head, watch events of the rest. Output: foreign revisions; an account of them.
//! Pure: no clock, no I/O.
//! Always true: a revision is the link's own only if this applier made it or the link's position was written in it; no value is kept.
//!
//! Each transaction of the applier makes one revision. As long as they follow each other without a gap nobody else wrote, and etcd need not
//! be asked; a gap is looked at by a short watch.

use crate::model::{ClusterId, LinkName, Ranges, Revision};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Runs of own revisions that are remembered; where another client writes between them they are many, and the oldest are looked at.
const RUNS_MAX: usize = 1_024;
/// Foreign keys that are named; the rest is counted.
pub const KEYS_NAMED_MAX: usize = 8;

/// The revisions that this applier made, as runs.
#[derive(Debug, Default)]
pub struct OwnRevisions {
    /// First and last of each, in order.
    runs: VecDeque<(Revision, Revision)>,
}

impl OwnRevisions {
    /// In order; one that went back (a replica that was restored) forgets the others.
    pub fn note(&mut self, revision: Revision) {
        match self.runs.back_mut() {
            Some((_, last)) if last.next() == revision => *last = revision,
            Some((_, last)) if *last >= revision => {
                self.runs.clear();
                self.runs.push_back((revision, revision));
            }
            Some(_) | None => self.runs.push_back((revision, revision)),
        }
        while self.runs.len() > RUNS_MAX {
            self.runs.pop_front();
        }
    }

    /// The replica was restored or replaced: they are of a past that is none any more.
    fn forget(&mut self) {
        self.runs.clear();
    }

    /// How far nobody else wrote after `checked`; what lies before it is forgotten.
    pub fn advance(&mut self, checked: Revision) -> Revision {
        let mut checked = checked;
        while let Some((first, last)) = self.runs.front().copied() {
            if first > checked.next() {
                break;
            }
            checked = checked.max(last);
            // It may still grow.
            if self.runs.len() == 1 {
                break;
            }
            self.runs.pop_front();
        }
        checked
    }
}

/// A revision that somebody else wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignRevision {
    pub revision: Revision,
    /// Of the link's prefixes.
    pub keys: u64,
    /// The first of them, at most [`KEYS_NAMED_MAX`].
    pub named: Vec<Bytes>,
}

/// A revision that may go on in the next message.
struct Gathering {
    revision: Revision,
    own: bool,
    keys: u64,
    named: Vec<Bytes>,
}

/// Judges the revisions of one watch.
pub struct Judge {
    position_key: Bytes,
    ranges: Ranges,
    gathering: Option<Gathering>,
    checked: Revision,
}

impl Judge {
    /// For a watch that starts at `checked` + 1, over [`Ranges::covering`].
    pub fn new(link: &LinkName, ranges: Ranges, checked: Revision) -> Self {
        Self { position_key: link.position_key(), ranges, gathering: None, checked }
    }

    /// Takes the keys of one message, with their revisions. `fragment`: the last revision goes on in the next message.
    pub fn push(&mut self, keys: impl Iterator<Item = (Revision, Bytes)>, fragment: bool) -> Vec<ForeignRevision> {
        let mut foreign = Vec::new();
        for (revision, key) in keys {
            if self.gathering.as_ref().is_some_and(|gathering| gathering.revision != revision) {
                foreign.extend(self.end());
            }
            let gathering =
                self.gathering.get_or_insert_with(|| Gathering { revision, own: false, keys: 0, named: Vec::new() });
            gathering.own |= key == self.position_key;
            if self.ranges.contains(&key) {
                gathering.keys += 1;
                if gathering.named.len() < KEYS_NAMED_MAX {
                    gathering.named.push(key);
                }
            }
        }
        if !fragment {
            foreign.extend(self.end());
        }
        foreign
    }

    /// Everything up to this revision has come.
    pub fn progress(&mut self, revision: Revision) {
        if self.gathering.is_none() {
            self.checked = self.checked.max(revision);
        }
    }

    /// Everything up to it was looked at.
    pub fn checked(&self) -> Revision {
        self.checked
    }

    fn end(&mut self) -> Option<ForeignRevision> {
        let Gathering { revision, own, keys, named } = self.gathering.take()?;
        self.checked = self.checked.max(revision);
        (!own && keys > 0).then_some(ForeignRevision { revision, keys, named })
    }
}

/// What is known of foreign writes; a file keeps it across restarts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Of which etcd.
    pub cluster: ClusterId,
    /// Everything up to it was looked at.
    pub checked: Revision,
    /// The position's `mod_revision` at the last look; 0: not known.
    #[serde(default)]
    pub position: Revision,
    /// The last hello knew of a link back over the same ranges: its writes are expected.
    pub link_back: bool,
    /// Keys in foreign revisions, ever.
    pub keys_ever: u64,
    pub open: Open,
}

/// What a look at the replica's etcd shows.
#[derive(Debug, Clone, Copy)]
pub struct Shown {
    pub cluster: ClusterId,
    pub head: Revision,
    /// The position's `mod_revision`.
    pub position: Revision,
    /// What others wrote up to it is nobody's concern: both sides were proved equal there, or the position was made there.
    pub settled: Revision,
}

/// Foreign writes since both sides were last equal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    pub revisions: u64,
    pub keys: u64,
    pub first: Revision,
    pub last: Revision,
    /// The first keys, escaped where they are no printable ASCII.
    pub named: Vec<String>,
}

impl Account {
    /// Whether the etcd that it is of is another one, or was restored since: then its own revisions, or the position's, went back.
    pub fn is_past(&self, shown: &Shown) -> bool {
        self.cluster != shown.cluster || self.checked > shown.head || self.position > shown.position
    }

    /// From where to look on. `own`: what the applier made, of which nothing is left where the etcd's past is another.
    pub fn begin(kept: Option<Self>, shown: &Shown, own: &mut OwnRevisions) -> Self {
        if kept.as_ref().is_some_and(|kept| kept.is_past(shown)) {
            own.forget();
        }
        let begun = match kept {
            Some(kept) if !kept.is_past(shown) => kept,
            // What came after is gone, and so is what was foreign in it. Where the new past begins is not known, so all is looked at that
            // nothing has settled.
            Some(kept) if kept.cluster == shown.cluster => {
                Self { checked: shown.settled, open: Open::default(), ..kept }
            }
            Some(_) => Self { cluster: shown.cluster, checked: shown.settled, ..Self::default() },
            None => Self { cluster: shown.cluster, checked: shown.position, ..Self::default() },
        };
        Self { position: shown.position, ..begun }
    }

    pub fn add(&mut self, foreign: &ForeignRevision) {
        self.keys_ever += foreign.keys;
        let open = &mut self.open;
        if open.revisions == 0 {
            open.first = foreign.revision;
        }
        open.revisions += 1;
        open.keys += foreign.keys;
        open.last = foreign.revision;
        let room = KEYS_NAMED_MAX.saturating_sub(open.named.len());
        for key in foreign.named.iter().take(room) {
            let name = key.escape_ascii().to_string();
            if !open.named.contains(&name) {
                open.named.push(name);
            }
        }
    }

    /// Both sides were equal at a mark that the replica reached at this revision: what was foreign before it is mended, or made no difference.
    /// True if that closes something.
    pub fn proved_equal(&mut self, at: Revision) -> bool {
        let closes = self.open.revisions > 0 && self.open.last <= at;
        if closes {
            self.open = Open::default();
        }
        closes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> LinkName {
        LinkName::new("config").unwrap()
    }

    fn judge() -> Judge {
        Judge::new(&link(), Ranges::new(&["/app/".into()], &["/app/x/".into()]), Revision(10))
    }

    fn events(keys: &[(u64, &'static str)]) -> impl Iterator<Item = (Revision, Bytes)> {
        keys.iter().map(|(revision, key)| (Revision(*revision), Bytes::from_static(key.as_bytes())))
    }

    const POSITION: &str = "/etcd-ferry/v1/links/config/position";

    #[test]
    fn a_revision_without_the_position_is_foreign_and_only_keys_of_the_ranges_count() {
        let seen = [
            (11, "/app/a"),
            (11, POSITION),
            (12, "/app/b"),
            (12, "/app/c"),
            (12, "/other"),
            (13, "/other"),
            (14, "/app/x/1"),
            (15, "/etcd-ferry/v1/links/other/position"),
        ];
        let mut judge = judge();
        let foreign = judge.push(events(&seen), false);
        let named = vec![Bytes::from_static(b"/app/b"), Bytes::from_static(b"/app/c")];
        assert_eq!(foreign, [ForeignRevision { revision: Revision(12), keys: 2, named }]);
        assert_eq!(judge.checked(), Revision(15));
    }

    #[test]
    fn another_links_position_makes_a_revision_foreign() {
        let seen = [(11, "/app/a"), (11, "/etcd-ferry/v1/links/other/position")];
        assert_eq!(judge().push(events(&seen), false).len(), 1);
    }

    #[test]
    fn a_revision_in_fragments_is_judged_once_its_last_piece_has_come() {
        let mut judge = judge();
        assert_eq!(judge.push(events(&[(11, "/app/a")]), true), []);
        judge.progress(Revision(20));
        assert_eq!(judge.checked(), Revision(10), "it may still bring the position");
        assert_eq!(judge.push(events(&[(11, "/app/b"), (11, POSITION)]), false), []);
        assert_eq!(judge.checked(), Revision(11));
        judge.push(events(&[(12, "/app/a")]), true);
        assert_eq!(judge.push(events(&[(13, POSITION)]), false).len(), 1);
        judge.progress(Revision(20));
        assert_eq!(judge.checked(), Revision(20));
    }

    #[test]
    fn many_keys_are_counted_and_the_first_named() {
        let keys: Vec<(Revision, Bytes)> =
            (0..1_000).map(|n| (Revision(11), Bytes::from(format!("/app/{n:04}")))).collect();
        let foreign = judge().push(keys.into_iter(), false);
        assert_eq!((foreign[0].keys, foreign[0].named.len()), (1_000, KEYS_NAMED_MAX));
        let mut account = Account::default();
        account.add(&foreign[0]);
        account.add(&ForeignRevision { revision: Revision(12), ..foreign[0].clone() });
        let Open { revisions, keys, first, last, named } = account.open;
        assert_eq!((revisions, keys, first, last), (2, 2_000, Revision(11), Revision(12)));
        assert_eq!((named.len(), &named[0][..], account.keys_ever), (KEYS_NAMED_MAX, "/app/0000", 2_000));
    }

    #[test]
    fn own_revisions_without_a_gap_need_no_look_and_a_gap_stops_them() {
        let mut own = OwnRevisions::default();
        assert_eq!(own.advance(Revision(10)), Revision(10));
        for revision in [11, 12, 13, 15, 16] {
            own.note(Revision(revision));
        }
        assert_eq!(own.advance(Revision(9)), Revision(9), "10 is not known");
        assert_eq!(own.advance(Revision(10)), Revision(13));
        assert_eq!(own.advance(Revision(13)), Revision(13), "14 is not known");
        assert_eq!(own.advance(Revision(14)), Revision(16));
        own.note(Revision(17));
        assert_eq!(own.advance(Revision(16)), Revision(17), "a run grows while it is looked at");
        own.note(Revision(5));
        assert_eq!(own.advance(Revision(4)), Revision(5), "the replica was restored");
        own.forget();
        assert_eq!(own.advance(Revision(4)), Revision(4));
    }

    #[test]
    fn the_oldest_of_too_many_runs_is_forgotten_and_looked_at() {
        let mut own = OwnRevisions::default();
        for run in 0..=RUNS_MAX as u64 {
            own.note(Revision(11 + 2 * run));
        }
        assert_eq!(own.runs.len(), RUNS_MAX);
        assert_eq!(own.advance(Revision(10)), Revision(10));
        assert_eq!(own.advance(Revision(12)), Revision(13));
    }

    #[test]
    fn a_look_goes_on_where_the_last_one_ended_unless_the_etcd_is_another_or_was_restored() {
        let cluster = ClusterId(7);
        let (position, settled) = (Revision(50), Revision(40));
        let shown = Shown { cluster, head: Revision(90), position, settled };
        let mut own = OwnRevisions::default();
        let mut begin = |kept| Account::begin(kept, &shown, &mut own);
        assert_eq!(begin(None), Account { cluster, checked: position, position, ..Account::default() });
        let open = Open { revisions: 1, keys: 2, ..Open::default() };
        let kept = Account { cluster, checked: Revision(80), position, link_back: true, keys_ever: 5, open };
        assert_eq!(begin(Some(kept.clone())), kept);
        let earlier = Account { position: Revision(49), ..kept.clone() };
        assert_eq!(begin(Some(earlier)), kept);
        let restored = Account { checked: settled, open: Open::default(), ..kept.clone() };
        assert_eq!(begin(Some(Account { checked: Revision(91), ..kept.clone() })), restored);
        // Others have written as much since.
        assert_eq!(begin(Some(Account { position: Revision(51), ..kept.clone() })), restored);
        let other = begin(Some(Account { cluster: ClusterId(8), ..kept }));
        assert_eq!(other, Account { cluster, checked: settled, position, ..Account::default() });
    }

    #[test]
    fn revisions_that_were_own_before_a_restore_hide_nothing_of_what_came_after_it() {
        let settled = Revision(40);
        let shown = Shown { cluster: ClusterId(7), head: Revision(90), position: Revision(50), settled };
        let looks_on_at = |checked| {
            let mut own = OwnRevisions::default();
            (30..=95).for_each(|revision| own.note(Revision(revision)));
            let kept = Account { cluster: shown.cluster, checked, position: shown.position, ..Account::default() };
            let begun = Account::begin(Some(kept), &shown, &mut own);
            own.advance(begun.checked)
        };
        assert_eq!(looks_on_at(Revision(95)), settled, "restored");
        assert_eq!(looks_on_at(Revision(60)), Revision(95), "it goes on");
    }

    #[test]
    fn equal_sides_close_what_was_foreign_before_the_mark_and_nothing_after_it() {
        let open = Open { revisions: 2, keys: 2, first: Revision(20), last: Revision(30), named: Vec::new() };
        let mut account = Account { open: open.clone(), keys_ever: 2, ..Account::default() };
        assert!(!account.proved_equal(Revision(29)));
        assert_eq!(account.open, open);
        assert!(account.proved_equal(Revision(30)) && !account.proved_equal(Revision(31)));
        assert_eq!((account.open, account.keys_ever), (Open::default(), 2));
    }
}
