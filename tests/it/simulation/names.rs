//! Job: the names under which outcomes of the resume table are counted, so that each is known to have happened.
//! Input: a `Resume`. Output: its name.
//! Pure.
//! Always true: every outcome and every reason has a name of its own.

use etcd_ferry::origin::resume::{CopyReason, Resume, StopReason};

/// A resume outcome with its reason, as it is counted.
pub fn name_of(decided: &Resume) -> String {
    let reason = match decided {
        Resume::ShipFromSpool { .. } => "ship from the spool".to_owned(),
        Resume::WatchFrom { .. } => "watch from the position".to_owned(),
        Resume::Tail { .. } => "tail".to_owned(),
        Resume::Copy { reason, .. } => format!("copy: {}", name_of_copy(reason)),
        Resume::Repair { reason, .. } => format!("repair: {}", name_of_copy(reason)),
        Resume::Stop { reason } => format!("stop: {}", name_of_stop(reason)),
    };
    format!("resume {reason}")
}

fn name_of_copy(reason: &CopyReason) -> &'static str {
    match reason {
        CopyReason::NoPosition => "no position",
        CopyReason::OtherRanges => "other ranges",
        CopyReason::Compacted { .. } => "compacted",
        CopyReason::NotProvable => "not provable",
        CopyReason::GoesOn => "goes on",
        // What a comparison led to.
        CopyReason::TooManyDiffer { .. } => "too many differ",
        CopyReason::Asked => "asked",
        // Its policy is the default here.
        CopyReason::OtherHistory => "other history",
    }
}

fn name_of_stop(reason: &StopReason) -> &'static str {
    match reason {
        StopReason::OtherCluster { .. } => "other cluster",
        StopReason::HeadBelow { .. } => "head below",
        StopReason::WaymarkMissing { .. } => "waymark missing",
        StopReason::WaymarkOlder { .. } => "waymark older",
        StopReason::WaymarkUnknown { .. } => "waymark unknown",
        StopReason::CarriedDiffers { .. } => "carried differs",
        // Decided by the lineage, and counted where it is asked.
        StopReason::SpooledDiffers { .. } => "spooled differs",
        StopReason::TermBelow { .. } => "term below",
    }
}
