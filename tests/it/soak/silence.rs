//! Job: notice a link that stands still while nobody says so.
//! Input: regions that run, with the default limits. Output: returns as soon as such a silence has lasted too long.
//! Always true: a position that moves and a reason that is told each end a silence; a reason that is told where all is well too ends none.

use crate::bed::pair::LINK;
use crate::bed::regions::Regions;
use crate::bed::sidecar::{Sidecar, link_of};
use etcd_ferry::config::Limits;
use serde_json::Value;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

/// A sidecar says that a link stands still after `stall_seconds`, and on a busy machine so much later.
const LATER_MAX: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A sidecar that takes longer to answer says nothing.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// How long a link may stand still with nobody saying so.
pub fn silence_max() -> Duration {
    Duration::from_secs(Limits::default().stall_seconds) + LATER_MAX
}

/// Goes on until the link has stood still for so long with nobody saying so.
pub async fn silent_for_too_long(regions: &Regions) {
    let (max, mut since) = (silence_max(), Instant::now());
    let mut looks = interval_at(since + LOOK_EVERY, LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = None;
    while since.elapsed() < max {
        looks.tick().await;
        let now = regions.try_position().await;
        let moves = now.is_some() && now != before;
        if moves || is_told(&said_by(&regions.origin_sidecars).await, &said_by(&regions.replica_sidecars).await) {
            since = Instant::now();
        }
        before = now.or(before);
    }
}

/// What each that answers says of the link.
async fn said_by(sidecars: &[Sidecar]) -> Vec<Value> {
    let mut said = Vec::new();
    for sidecar in sidecars {
        let health = timeout(ANSWER_LIMIT, sidecar.health()).await.ok().flatten();
        said.extend(health.and_then(|health| link_of(&health, LINK)));
    }
    said
}

/// Whether somebody gives a reason: each state of a link that stands still has one. A replica's sidecar to which nobody is connected says that
/// also where another one has the link, so it counts only if none has.
fn is_told(at_origin: &[Value], at_replica: &[Value]) -> bool {
    let gives_reason = |entry: &Value| entry["reason"].as_str().is_some_and(|reason| !reason.is_empty());
    let is_apart = |entry: &Value| entry["state"] == "connecting";
    let all_apart = at_replica.iter().all(is_apart);
    at_origin.iter().any(gives_reason)
        || at_replica.iter().any(|entry| gives_reason(entry) && (all_apart || !is_apart(entry)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entry(state: &str, reason: &str) -> Value {
        json!({ "state": state, "reason": reason })
    }

    #[test]
    fn a_reason_at_either_side_is_told_and_none_is_where_all_is_well() {
        let (well, apart) = (entry("following", ""), entry("connecting", "the origin's sidecar is not connected"));
        let stalled = entry("stalled", "nothing has been applied");
        let at_origin = [well.clone(), well.clone()];
        assert!(!is_told(&at_origin, &[well.clone(), apart.clone()]), "another of the replica's has the link");
        assert!(!is_told(&[entry("repairing", "")], &[]), "a state alone says nothing of standing still");
        assert!(is_told(&[well.clone(), stalled.clone()], &[well, apart.clone()]));
        assert!(is_told(&at_origin, &[stalled, apart.clone()]));
        assert!(is_told(&at_origin, &[apart.clone(), apart]), "none of the replica's has the link");
    }
}
