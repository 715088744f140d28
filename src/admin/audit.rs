//! Job: one line in the log for each admin call, however it ends: who, what, on which link, how.
//! Input: a request, behind service.rs; what it is answered. Output: the line.
//! Always true: a call that changes something is in the log at every level, and also where its caller did not wait for the answer.

use super::roles::AdminRole;
use crate::logs::AUDIT;
use std::net::SocketAddr;
use tonic::{Request, Status};
use tracing::{info, warn};

/// Who calls, once it is known that they may. Put into the request by `authorise` of service.rs, which lets nothing through without.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// The one of `tls.admins` or `tls.viewers` that the certificate bears.
    pub admin: String,
    pub from: SocketAddr,
    /// The role that the call asks for.
    pub asked: AdminRole,
}

/// The name by which the caller was let in.
pub(super) fn caller<T>(request: &Request<T>) -> String {
    request.extensions().get::<Caller>().map_or_else(String::new, |caller| caller.admin.clone())
}

/// The line of a call whose answer is known.
pub(super) fn audit<R, T>(request: &Request<R>, call: &str, link: &str, outcome: &Result<T, Status>) {
    if let Some(caller) = request.extensions().get::<Caller>() {
        tell(caller, call, link, outcome.as_ref().map(drop).map_err(Status::message));
    }
}

/// Waits for the answer to a call, and writes its line; also if the caller leaves meanwhile, by which this is dropped.
pub(super) async fn audited<R, T>(
    request: &Request<R>,
    call: &str,
    link: &str,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let unanswered = Unanswered { caller: request.extensions().get::<Caller>(), call, link };
    let outcome = answer.await;
    std::mem::forget(unanswered);
    audit(request, call, link, &outcome);
    outcome
}

/// Dropped only where the answer was not waited for.
struct Unanswered<'a> {
    caller: Option<&'a Caller>,
    call: &'a str,
    link: &'a str,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if let Some(caller) = self.caller {
            tell(
                caller,
                self.call,
                self.link,
                Err("the caller left before the answer: it may be done, or be done yet"),
            );
        }
    }
}

fn tell(caller: &Caller, call: &str, link: &str, outcome: Result<(), &str>) {
    let Caller { admin, from, asked } = caller;
    // What they begin ends later, and is told by the link.
    let begins = ["Verify", "Repair", "Resync"].iter().any(|begins| call.starts_with(begins));
    match (outcome, asked) {
        (Ok(()), AdminRole::ReadOnly) => info!(admin, %from, call, link, outcome = "done", "admin call"),
        (Ok(()), AdminRole::Full) => {
            let outcome = if begins { "begun" } else { "done" };
            info!(target: AUDIT, admin, %from, call, link, outcome, "admin call");
        }
        (Err(refusal), AdminRole::ReadOnly) => warn!(admin, %from, call, link, outcome = refusal, "admin call"),
        (Err(refusal), AdminRole::Full) => {
            warn!(target: AUDIT, admin, %from, call, link, outcome = refusal, "admin call");
        }
    }
}
