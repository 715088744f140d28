//! Job: tell a caller the sidecar's status again and again.
//! Input: the directory, how often. Output: statuses, until the caller is gone or the sidecar stops.
//! Edge: one task for each caller.
//! Always true: an interval is in its bounds; a caller that does not read is told less often, and holds nobody else.

use super::Directory;
use super::calls::status_reply;
use super::proto::StatusReply;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Each costs a status of every link at each interval; operators' tools use a handful.
pub(super) const WATCHERS_MAX: usize = 16;
/// Faster than anybody reads, and no slower than a proxy between that cuts what is silent for a minute.
const INTERVAL_MS: RangeInclusive<u32> = 100..=60_000;
const INTERVAL_MS_DEFAULT: u32 = 1_000;

/// The interval that a caller asks for; 0: the default.
pub(super) fn interval_of(asked_ms: u32) -> Result<Duration, Status> {
    let ms = if asked_ms == 0 { INTERVAL_MS_DEFAULT } else { asked_ms };
    if !INTERVAL_MS.contains(&ms) {
        let (least, most) = (INTERVAL_MS.start(), INTERVAL_MS.end());
        let rule = format!("interval_ms must be from {least} to {most}, or 0 for {INTERVAL_MS_DEFAULT} (found {ms})");
        return Err(Status::invalid_argument(rule));
    }
    Ok(Duration::from_millis(ms.into()))
}

/// `place`: one of [`WATCHERS_MAX`], given back at the end.
pub(super) async fn tell_status(
    directory: Arc<Directory>,
    interval: Duration,
    _place: OwnedSemaphorePermit,
    stop: CancellationToken,
    out: mpsc::Sender<Result<StatusReply, Status>>,
) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let telling = async {
        loop {
            ticks.tick().await;
            directory.refresh().await;
            if out.send(Ok(status_reply(&directory))).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = out.closed() => {}
        () = telling => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_taken_in_its_bounds_alone() {
        let taken = |ms| interval_of(ms).map(|interval| interval.as_millis()).map_err(|status| status.code());
        assert_eq!(taken(0), Ok(1_000));
        assert_eq!((taken(100), taken(60_000)), (Ok(100), Ok(60_000)));
        for wrong in [1, 99, 60_001, u32::MAX] {
            assert_eq!(taken(wrong), Err(tonic::Code::InvalidArgument), "{wrong}");
        }
    }
}
