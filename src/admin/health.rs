//! Job: grpc.health.v1 at the admin port: the sidecar's health, and each link's.
//! Input: the links' statuses. Output: serving or not, to whoever asks or watches.
//! Edge: one task for each link.
//! Always true: what is told changes with the link's state and no more often; a sidecar that stops tells so and ends every watch.

use super::LinkHandle;
use crate::model::{LinkState, LinkStatus};
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// The name under which grpc.health.v1 tells a link's health.
pub(super) fn health_name(handle: &LinkHandle) -> String {
    format!("link/{}/{}", handle.link, handle.side.as_str())
}

fn health(status: &LinkStatus) -> ServingStatus {
    match status.state {
        LinkState::Following | LinkState::Copying => ServingStatus::Serving,
        LinkState::Connecting
        | LinkState::Repairing
        | LinkState::Held
        | LinkState::SpoolFull
        | LinkState::Paused
        | LinkState::Stalled
        | LinkState::Stopped => ServingStatus::NotServing,
    }
}

/// Keeps one link's health true. Says only what changed: each word wakes every watcher.
pub(super) async fn report_health(reporter: HealthReporter, mut handle: LinkHandle, stop: CancellationToken) {
    let name = health_name(&handle);
    let mut said = None;
    loop {
        let now = health(&handle.snapshot());
        if said != Some(now) {
            reporter.set_service_status(&name, now).await;
            said = Some(now);
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            changed = handle.status.changed() => if changed.is_err() {
                reporter.set_service_status(&name, ServingStatus::NotServing).await;
                return;
            },
        }
    }
}

/// Tells every watcher that the sidecar stops, and ends their streams: they would keep their connections open for ever.
pub(super) async fn end_health(reporter: &mut HealthReporter, links: Vec<String>) {
    for name in links.into_iter().chain([String::new()]) {
        reporter.set_service_status(&name, ServingStatus::NotServing).await;
        reporter.clear_service_status(&name).await;
    }
}
