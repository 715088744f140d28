//! Job: the admin port as a public client of gRPC that is not ours meets it: Python's grpcio, by way of reflection and mutual TLS.
//! Input: a pair; Debian's python3-grpcio. Output: passes or fails.
//! Always true: the client is given an address and certificates, and nothing that knows the service.

use crate::bed::pair::{LINK, Pair, REPLICA_REGION};
use crate::bed::sidecar::Sidecar;
use crate::verify::over_app;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// What the client says, as `name`.pem; it also pauses a link that is named, and resumes it.
fn ask(sidecar: &Sidecar, name: &str, link: Option<&str>) -> Value {
    let file = |name: String| sidecar.options.certs.join(name);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/grpcio.py");
    let mut command = Command::new("/usr/bin/python3");
    command.arg(script).arg(sidecar.options.ports.admin.to_string()).arg(file("ca.pem".to_owned()));
    let output = command.args([file(format!("{name}.pem")), file(format!("{name}.key"))]).args(link).output();
    let output = output.expect("Debian's python3 (`.ci/install --tests` brings it)");
    let answer = serde_json::from_slice(&output.stdout);
    answer.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_knows_nothing_of_the_service_calls_it_by_reflection_and_is_refused_without_a_name_that_may() {
    let pair = Box::pin(Pair::start(over_app())).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let answer = ask(&pair.origin_sidecar, "admin", None);
    let services = answer["services"].as_array().unwrap_or_else(|| panic!("{answer}"));
    assert!(services.iter().any(|name| name == "etcd_ferry.admin.v1.Admin"), "{answer}");
    let link = &answer["status"]["links"][0];
    assert_eq!((&link["link"], &link["state"], &link["side"]), (&LINK.into(), &"following".into(), &"origin".into()));
    assert_eq!(answer["statuses"][1]["node"], answer["status"]["node"], "a stream tells again and again");

    let changed = ask(&pair.replica_sidecar, "admin", Some(LINK));
    let paused = &changed["paused"]["paused"];
    assert_eq!(paused["by"], "spiffe://etcd-ferry.dev/admin", "{changed}");
    assert_eq!(changed["resumed"]["paused"], *paused, "{changed}");
    pair.wait_applied(pair.origin.put("/app/after", "1").await).await;

    let refused = ask(&pair.origin_sidecar, REPLICA_REGION, None);
    assert_eq!(refused["refused"], "PERMISSION_DENIED", "{refused}");
    let details = refused["details"].as_str().unwrap_or_default();
    assert!(details.contains("is not among its `tls.admins` or `tls.viewers`"), "{refused}");
}
