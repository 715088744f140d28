//! Job: grpc.health.v1 at the admin port: the sidecar's health, and each link's.
//! Input: the links' statuses. Output: serving or not, to whoever asks or watches.
//! Edge: one task for each link, as long as it is there.
//! Always true: what is told changes with the link's state and no more often; a sidecar that stops tells so and ends every watch.

use super::LinkHandle;
use crate::model::{LinkState, LinkStatus};
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinHandle;
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

/// Keeps the health of all links true, while they come and go.
pub(super) async fn report_all(
    mut reporter: HealthReporter,
    mut links: watch::Receiver<Arc<[LinkHandle]>>,
    stop: CancellationToken,
) {
    let mut reported: Vec<(LinkHandle, CancellationToken, JoinHandle<()>)> = Vec::new();
    loop {
        let now = links.borrow_and_update().clone();
        let is_there = |handle: &LinkHandle| now.iter().any(|other| other.status.same_channel(&handle.status));
        let (stay, gone): (Vec<_>, Vec<_>) = reported.into_iter().partition(|(handle, ..)| is_there(handle));
        reported = stay;
        // Before another of the same name is told of: the last word is the new one's.
        let names = gone.iter().map(|(handle, ..)| health_name(handle)).collect();
        for (_, end, task) in gone {
            end.cancel();
            // It ends by its token, and a panic of it is in the log.
            let _ = task.await;
        }
        end_watches(&mut reporter, names).await;
        for handle in now.iter() {
            if !reported.iter().any(|(other, ..)| other.status.same_channel(&handle.status)) {
                let end = stop.child_token();
                let task = tokio::spawn(report_health(reporter.clone(), handle.clone(), end.clone()));
                reported.push((handle.clone(), end, task));
            }
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Ok(()) = links.changed() => {}
        }
    }
    for (_, _, task) in reported {
        let _ = task.await;
    }
}

/// Keeps one link's health true. Says only what changed: each word wakes every watcher.
async fn report_health(reporter: HealthReporter, mut handle: LinkHandle, stop: CancellationToken) {
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
    end_watches(reporter, links.into_iter().chain([String::new()]).collect()).await;
}

async fn end_watches(reporter: &mut HealthReporter, names: Vec<String>) {
    for name in names {
        reporter.set_service_status(&name, ServingStatus::NotServing).await;
        reporter.clear_service_status(&name).await;
    }
}
