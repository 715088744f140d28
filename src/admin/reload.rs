//! Job: have a running sidecar read its configuration again, and tell what came of it.
//! Input: the admin call; the answer of whoever runs the links. Output: a reply; lines for a terminal, JSON for scripts.
//! Edge: asks by channel.
//! Always true: what is told is told key by key and link by link, as taken, as failed, or as one that needs a restart; a configuration that
//! is refused comes back with its faults.

use super::client::{self, ClientError, Connection};
use super::proto::{ReloadConfigurationReply, ReloadConfigurationRequest};
use super::show::printable;
use serde::Serialize;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

/// Less than a client waits. Links stop within 5 s.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(8);
/// Faults that one answer holds: its head is small.
const FAULTS_MAX: usize = 12;

/// What a sidecar made of its configuration when it was read again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// In use now: links, limits, the log's level.
    pub taken: Vec<String>,
    /// Not in use, and why.
    pub failed: Vec<String>,
    /// Keys that wait for a restart.
    pub needs_restart: Vec<String>,
}

/// Asks for the configuration to be read again; the answer is what came of it, or every fault of what is there.
pub type ReloadCommand = oneshot::Sender<Result<Reloaded, Vec<String>>>;

/// Asks, and waits for what comes of it.
pub(super) async fn ask(reloads: &mpsc::Sender<ReloadCommand>) -> Result<ReloadConfigurationReply, Status> {
    let stops = || Status::unavailable("the sidecar is stopping");
    let exchange = async {
        let (reply, answer) = oneshot::channel();
        reloads.send(reply).await.map_err(|_| stops())?;
        answer.await.map_err(|_| stops())?.map_err(|faults| Status::failed_precondition(refusal(&faults)))
    };
    let late = || Status::unavailable("the configuration is being read and taken: see the log of the sidecar");
    let reloaded = tokio::time::timeout(RELOAD_TIMEOUT, exchange).await.unwrap_or_else(|_| Err(late()))?;
    let Reloaded { taken, failed, needs_restart } = reloaded;
    Ok(ReloadConfigurationReply { taken, failed, needs_restart })
}

fn refusal(faults: &[String]) -> String {
    let mut told = faults.iter().take(FAULTS_MAX).map(String::as_str).collect::<Vec<_>>().join("; ");
    if faults.len() > FAULTS_MAX {
        told.push_str(&format!("; and {} more: `etcd-ferry check` tells all", faults.len() - FAULTS_MAX));
    }
    format!("the configuration is not sound, and the last one stays in use: {told}")
}

/// Has a sidecar read its configuration again.
pub async fn reload(connection: &Connection) -> Result<ReloadConfigurationReply, ClientError> {
    client::ask(connection, async |mut client| client.reload_configuration(ReloadConfigurationRequest {}).await).await
}

/// For a terminal.
pub fn lines(reply: &ReloadConfigurationReply) -> Vec<String> {
    let ReloadConfigurationReply { taken, failed, needs_restart } = reply;
    let taken = taken.iter().map(|what| format!("taken: {what}"));
    let failed = failed.iter().map(|what| format!("not taken: {what}"));
    let restart = needs_restart.iter().map(|key| format!("needs a restart: {key}"));
    let lines: Vec<String> = taken.chain(failed).chain(restart).map(|line| printable(&line)).collect();
    if lines.is_empty() { vec!["nothing has changed".to_owned()] } else { lines }
}

#[derive(Serialize)]
struct Json<'a> {
    taken: &'a [String],
    failed: &'a [String],
    needs_restart: &'a [String],
}

/// For scripts.
pub fn json(reply: &ReloadConfigurationReply) -> String {
    let ReloadConfigurationReply { taken, failed, needs_restart } = reply;
    // Lists of strings: serde_json has no way to fail on these.
    serde_json::to_string_pretty(&Json { taken, failed, needs_restart }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_came_of_it_is_told_line_by_line_and_a_refusal_with_its_faults() {
        let (reloads, mut asked) = mpsc::channel::<ReloadCommand>(1);
        let answer = tokio::spawn(async move {
            let one = |words: &str| vec![words.to_owned()];
            let reloaded =
                Reloaded { taken: one("link a\u{7}"), failed: one("link b"), needs_restart: one("listen.http") };
            let reply = asked.recv().await.unwrap();
            reply.send(Ok(reloaded)).unwrap();
            let reply = asked.recv().await.unwrap();
            reply.send(Err((0..15).map(|n| format!("fault {n}")).collect())).unwrap();
        });
        let reply = ask(&reloads).await.unwrap();
        assert_eq!(lines(&reply), ["taken: link a ", "not taken: link b", "needs a restart: listen.http"]);
        assert!(json(&reply).contains("\"needs_restart\": [\n    \"listen.http\"\n  ]"), "{}", json(&reply));
        let refused = ask(&reloads).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("fault 11; and 3 more"), "{}", refused.message());
        answer.await.unwrap();
        assert!(ask(&reloads).await.unwrap_err().message().contains("stopping"));
        assert_eq!(lines(&ReloadConfigurationReply::default()), ["nothing has changed"]);
    }
}
