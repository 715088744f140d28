//! Job: whether a version of etcd can be trusted with a link.
//! Input: a version as a member says it. Output: a `Verdict`, with what is wrong and what to upgrade to.
//! Pure: no clock, no I/O.
//! Always true: a version that corrupts is refused, one that loses or repeats watch events is warned of; what is not understood is neither.

use std::fmt;

/// A version of etcd, ordered as etcd's releases are: a pre-release stands before its release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
    released: bool,
}

impl Version {
    const fn release(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch, released: true }
    }

    /// `3.5.30`, `3.6.0-rc.1`, `3.5.30+distribution`; `None`: anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let text = text.split_once('+').map_or(text, |(version, _)| version);
        let (numbers, pre_release) = text.split_once('-').map_or((text, None), |(n, pre)| (n, Some(pre)));
        let number = |n: &str| n.bytes().all(|b| b.is_ascii_digit()).then(|| n.parse::<u32>().ok()).flatten();
        let numbers = numbers.split('.').map(number).collect::<Option<Vec<u32>>>()?;
        let [major, minor, patch] = numbers[..] else { return None };
        Some(Self { major, minor, patch, released: pre_release.is_none() })
    }

    /// True for a pre-release of `release`, too: it has what its release mends.
    fn is_before(self, release: Version) -> bool {
        self < release
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What is to be thought of a member by its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Fine,
    /// The link goes on, and what may be lost is told.
    Warned {
        fault: &'static str,
        upgrade_to: Version,
    },
    /// Nothing goes through such a member.
    Refused {
        fault: &'static str,
        upgrade_to: Version,
    },
    /// The member did not say, or says what is no version of etcd.
    Unknown,
}

impl Verdict {
    /// Empty where there is none.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Fine => "fine",
            Verdict::Warned { .. } => "warned",
            Verdict::Refused { .. } => "refused",
            Verdict::Unknown => "",
        }
    }
}

/// One fault of etcd: the versions from `from` on that do not have what mended it.
struct Fault {
    /// What of `3.minor` has it: all below `mended`.
    minor: u32,
    mended: u32,
    what: &'static str,
}

/// The release of each minor version that has none of the faults below, and where later ones are not yet known to have others.
const SOUND: [Version; 3] = [Version::release(3, 4, 38), Version::release(3, 5, 24), Version::release(3, 6, 6)];

/// Etcd's own changelogs and its notice of March 2022: data of members may come to differ after a crash under load.
const CORRUPTS: (Version, Version) =
    (Version { major: 3, minor: 5, patch: 0, released: false }, Version::release(3, 5, 3));
const CORRUPTION: &str = "can corrupt its data: after a crash its members may hold different keys";

const EVENTS_LOST: &str = "can lose watch events after a compaction";
const DELETES_LOST: &str = "can lose the watch events of deletes after a compaction";
const EVENTS_REPEATED: &str = "can repeat old watch events";
const EVENTS_DROPPED: &str = "can drop watch events while watches are opened";

/// For each minor version the worst first, which is also the order in which they were mended.
const FAULTS: [Fault; 9] = [
    Fault { minor: 4, mended: 31, what: EVENTS_LOST },
    Fault { minor: 4, mended: 36, what: DELETES_LOST },
    Fault { minor: 4, mended: 38, what: EVENTS_REPEATED },
    Fault { minor: 5, mended: 13, what: EVENTS_LOST },
    Fault { minor: 5, mended: 18, what: DELETES_LOST },
    Fault { minor: 5, mended: 22, what: EVENTS_REPEATED },
    Fault { minor: 5, mended: 24, what: EVENTS_DROPPED },
    Fault { minor: 6, mended: 2, what: EVENTS_REPEATED },
    Fault { minor: 6, mended: 6, what: EVENTS_DROPPED },
];

/// Etcd's pull request 15237: before these a notice of progress that was asked for may come before events that it says were sent.
const PROGRESS_IN_ORDER: [Version; 2] = [Version::release(3, 4, 25), Version::release(3, 5, 8)];

/// Whether a notice of progress that a watch asked for can be believed; `None`: the version is not understood.
pub fn progress_in_order(text: &str) -> Option<bool> {
    let version = Version::parse(text)?;
    let mended = PROGRESS_IN_ORDER.into_iter().find(|v| (v.major, v.minor) == (version.major, version.minor));
    Some(!version.is_before(mended.unwrap_or(PROGRESS_IN_ORDER[0])))
}

/// What is known of a version, as a member says it.
pub fn judge(text: &str) -> Verdict {
    let Some(version) = Version::parse(text) else { return Verdict::Unknown };
    let sound = SOUND.into_iter().find(|sound| (sound.major, sound.minor) == (version.major, version.minor));
    if CORRUPTS.0 <= version && version.is_before(CORRUPTS.1) {
        return Verdict::Refused { fault: CORRUPTION, upgrade_to: sound.unwrap_or(SOUND[1]) };
    }
    let of_its_own = |fault: &&Fault| {
        let mended = Version::release(3, fault.minor, fault.mended);
        version.major == 3 && version.minor == fault.minor && version.is_before(mended)
    };
    if let (Some(fault), Some(upgrade_to)) = (FAULTS.iter().find(of_its_own), sound) {
        return Verdict::Warned { fault: fault.what, upgrade_to };
    }
    if version.is_before(Version::release(3, 4, 0)) {
        // Never mended there.
        return Verdict::Warned { fault: EVENTS_LOST, upgrade_to: SOUND[1] };
    }
    Verdict::Fine
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(text: &str) -> (&'static str, &'static str, String) {
        match judge(text) {
            verdict @ (Verdict::Fine | Verdict::Unknown) => (verdict.as_str(), "", String::new()),
            verdict @ (Verdict::Warned { fault, upgrade_to } | Verdict::Refused { fault, upgrade_to }) => {
                (verdict.as_str(), fault, upgrade_to.to_string())
            }
        }
    }

    #[test]
    fn a_version_that_corrupts_is_refused_with_what_to_upgrade_to_and_its_neighbours_are_not() {
        for version in ["3.5.0", "3.5.1", "3.5.2", "3.5.0-alpha.0", "3.5.0-rc.1", "3.5.3-rc.0", "3.5.2+git"] {
            assert_eq!(judged(version), ("refused", CORRUPTION, "3.5.24".to_owned()), "{version}");
        }
        for version in ["3.4.99", "3.5.3", "3.6.0", "3.50.1"] {
            assert_ne!(judged(version).0, "refused", "{version}");
        }
    }

    #[test]
    fn a_version_whose_watch_loses_or_repeats_events_is_warned_of_by_its_worst_fault() {
        for (version, fault, upgrade_to) in [
            ("2.3.8", EVENTS_LOST, "3.5.24"),
            ("3.3.27", EVENTS_LOST, "3.5.24"),
            ("3.4.0", EVENTS_LOST, "3.4.38"),
            ("3.4.30", EVENTS_LOST, "3.4.38"),
            ("3.4.31", DELETES_LOST, "3.4.38"),
            ("3.4.35", DELETES_LOST, "3.4.38"),
            ("3.4.37", EVENTS_REPEATED, "3.4.38"),
            ("3.5.3", EVENTS_LOST, "3.5.24"),
            ("3.5.12", EVENTS_LOST, "3.5.24"),
            ("3.5.16", DELETES_LOST, "3.5.24"),
            ("3.5.18", EVENTS_REPEATED, "3.5.24"),
            ("3.5.21", EVENTS_REPEATED, "3.5.24"),
            ("3.5.23", EVENTS_DROPPED, "3.5.24"),
            ("3.5.24-rc.0", EVENTS_DROPPED, "3.5.24"),
            ("3.6.0-rc.4", EVENTS_REPEATED, "3.6.6"),
            ("3.6.1", EVENTS_REPEATED, "3.6.6"),
            ("3.6.5", EVENTS_DROPPED, "3.6.6"),
        ] {
            assert_eq!(judged(version), ("warned", fault, upgrade_to.to_owned()), "{version}");
        }
    }

    #[test]
    fn the_first_sound_release_of_each_line_and_all_that_come_after_it_are_fine() {
        for version in [
            "3.4.38",
            "3.4.43",
            "3.5.24",
            "3.5.30",
            "v3.5.30",
            "3.5.30+debian",
            "3.6.6",
            "3.7.0",
            "3.7.0-alpha.0",
            "4.0.0",
        ] {
            assert_eq!(judge(version), Verdict::Fine, "{version}");
        }
    }

    #[test]
    fn what_is_no_version_is_not_judged() {
        for text in ["", "3.5", "3.5.x", "3.5.1.2", "unknown", "3.5.-1", "3..1", "99999999999.0.0", "3.5.+1"] {
            assert_eq!(judge(text), Verdict::Unknown, "{text:?}");
        }
    }

    #[test]
    fn a_notice_of_progress_is_believed_of_those_versions_that_send_it_after_the_events() {
        for version in ["3.4.25", "3.4.38", "3.5.8", "3.5.30", "3.6.0-rc.1", "3.6.6", "4.0.0"] {
            assert_eq!(progress_in_order(version), Some(true), "{version}");
        }
        for version in ["3.3.27", "3.4.0", "3.4.23", "3.4.24", "3.4.25-rc.0", "3.5.0", "3.5.3", "3.5.7", "3.5.8-rc.0"] {
            assert_eq!(progress_in_order(version), Some(false), "{version}");
        }
        assert_eq!(progress_in_order("no version"), None);
    }
}
