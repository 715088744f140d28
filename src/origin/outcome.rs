//! Job: tell what a comparison of both sides came to.
//! Input: what was compared and mended. Output: the log, the view's `Verification`, a word to the replica.
//! Edge: part of the session.
//! Always true: both sides are told to be equal only where nothing differed; of many keys that differ a bounded number of ranges is told.

use super::Clock;
use super::found::Compared;
use super::ship::Shipper;
use crate::model::{DifferingRange, Outcome};
use crate::wire::parts::DifferingKey;
use crate::wire::replicate::{Shipment, Verified, shipment};
use std::fmt::Display;

/// Where more keys differ, neighbours are told as one range.
const RANGES_TOLD_MAX: usize = 16;

/// Tells the log, the view and the replica what a comparison came to.
pub(super) fn tell(ship: &Shipper, compared: &Compared, seconds: f64) -> Shipment {
    let link = &ship.origin.send.link;
    let revision = compared.revision;
    let outcome = match (compared.differing, compared.mended) {
        (0, _) => Outcome::Equal,
        (_, Some(_)) if compared.unmended.is_none() => Outcome::Mended,
        (_, Some(_) | None) => Outcome::Different,
    };
    let expected = compared.expected();
    match (outcome, compared.mended) {
        // Why it is not mended is told below.
        (Outcome::Different, _) if compared.unmended.is_some() => {}
        (Outcome::Different, _) if expected == compared.differing => {
            tracing::warn!(%link, %revision, expected, "both sides differ as expected, in keys of revisions in quarantine at the replica");
        }
        (Outcome::Different, _) => tracing::error!(%link, %revision, differing = compared.differing,
            "both sides differ: see `etcd-ferry status` at the origin's sidecar"),
        (_, Some((puts, deletes))) => {
            tracing::info!(%link, %revision, puts, deletes, seconds, "what differed is mended")
        }
        (_, None) => tracing::info!(%link, %revision, keys = compared.keys, seconds, "both sides are equal"),
    }
    let at_ms = Clock::new().now_ms();
    ship.view.send_modify(|view| {
        let verification = &mut view.verification;
        (verification.outcome, verification.ended_at_ms) = (outcome, at_ms);
        if outcome == Outcome::Equal {
            (verification.verified_revision, verification.verified_at_ms) = (revision, at_ms);
        }
        (verification.differing_keys, verification.expected_keys) = (compared.differing, expected);
        verification.differing_ranges = told_ranges(&compared.found);
        if compared.unmended.is_none() {
            verification.detail = detail_of(compared, seconds);
        }
        let (puts, deletes) = compared.mended.unwrap_or_default();
        view.count("mended_keys", puts + deletes);
    });
    if let Some(failed) = &compared.unmended {
        tell_failed(ship, failed);
    }
    let verification = &ship.view.borrow().verification;
    let told = Verified {
        origin_revision: verification.verified_revision.0,
        at_ms: verification.verified_at_ms,
        differing_keys: compared.differing,
        expected_keys: expected,
        mended_keys: compared.differing.saturating_sub(verification.differing_now()),
    };
    Shipment { what: Some(shipment::What::Verified(told)) }
}

/// A comparison that came to nothing, or what it found could not be mended. One that begins by itself, again and again, is logged once.
pub(super) fn tell_failed(ship: &Shipper, failed: &dyn Display) {
    let link = &ship.origin.send.link;
    let reason = failed.to_string().replace("LINK", link.as_str());
    if ship.view.borrow().verification.detail != reason {
        tracing::warn!(%link, %reason, "both sides could not be compared, or what differs not be mended");
    }
    ship.view.send_modify(|view| view.verification.failed(&reason, Clock::new().now_ms()));
}

fn detail_of(compared: &Compared, seconds: f64) -> String {
    let mut detail =
        format!("{} keys compared at origin revision {}, in {seconds:.1} s", compared.keys, compared.revision);
    match compared.expected() {
        0 => {}
        all if all == compared.differing => detail.push_str(
            "; all that differ are keys of revisions in quarantine, as expected: `etcd-ferry quarantine list` at the replica's sidecar",
        ),
        some => detail.push_str(&format!("; {some} of those that differ are keys of revisions in quarantine, as expected")),
    }
    if compared.moving > 0 {
        detail
            .push_str(&format!("; {} more differed and were on their way, since a link back exists", compared.moving));
    }
    detail
}

/// Keys that differ, each alone, or as few ranges as are told.
fn told_ranges(found: &[DifferingKey]) -> Vec<DifferingRange> {
    let in_one = found.len().div_ceil(RANGES_TOLD_MAX).max(1);
    let range = |some: &[DifferingKey]| {
        let (first, last) = (some.first()?, some.last()?);
        Some(DifferingRange { first: first.key.clone(), last: last.key.clone(), keys: some.len() as u64 })
    };
    found.chunks(in_one).filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::parts::Difference;
    use bytes::Bytes;

    fn found(count: usize) -> Vec<DifferingKey> {
        let key = |n| DifferingKey {
            key: Bytes::from(format!("{n:04}")),
            difference: Difference::Extra,
            values: (0, n as u64),
        };
        (0..count).map(key).collect()
    }

    #[test]
    fn a_few_keys_are_told_each_alone_and_many_as_a_bounded_number_of_ranges_that_hold_them_all() {
        assert!(told_ranges(&[]).is_empty());
        let few = told_ranges(&found(RANGES_TOLD_MAX));
        assert_eq!(few.len(), RANGES_TOLD_MAX);
        assert!(few.iter().all(|range| range.first == range.last && range.keys == 1));
        for count in [RANGES_TOLD_MAX + 1, 100, 5_000] {
            let ranges = told_ranges(&found(count));
            assert!(ranges.len() <= RANGES_TOLD_MAX);
            assert_eq!(ranges.iter().map(|range| range.keys).sum::<u64>(), count as u64);
            assert!(ranges.windows(2).all(|pair| pair[0].last < pair[1].first));
        }
    }
}
