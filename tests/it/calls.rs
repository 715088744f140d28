//! Job: every call of the admin service, one by one: it is in the log, and proto/admin.proto says what it is.
//! Input: a pair, an operator's certificate; the text of proto/admin.proto. Output: passes or fails.
//! Always true: a call that is added to the service must be made here too.

use crate::bed::pair::{LINK, Pair};
use crate::bed::sidecar::Sidecar;
use crate::bed::{PATIENCE, until};
use crate::documents;
use crate::verify::over_app;
use etcd_ferry::admin::client::{self, Connection};
use etcd_ferry::admin::proto;
use etcd_ferry::admin::proto::admin_client::AdminClient;
use etcd_ferry::admin::roles::CALLS;
use serde_json::Value;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

const ADMIN: &str = "spiffe://etcd-ferry.dev/admin";

/// Hears what goes on telling, to its end.
async fn to_its_end<T>(answer: Response<Streaming<T>>) -> Result<(), Status> {
    let mut told = answer.into_inner();
    while told.message().await?.is_some() {}
    Ok(())
}

/// Makes one call; what the caller is told.
async fn make(admin: &mut AdminClient<Channel>, call: &str) -> Result<(), Status> {
    let link = LINK.to_owned();
    let one = proto::QuarantinedRequest { link: link.clone(), seq: 1 };
    match call {
        "Status" => admin.status(proto::StatusRequest {}).await.map(drop),
        "Resync" => admin.resync(proto::ResyncRequest { link, allow_deletes: true }).await.map(drop),
        "Verify" => to_its_end(admin.verify(proto::VerifyRequest { link }).await?).await,
        "Repair" => to_its_end(admin.repair(proto::RepairRequest { link, allow_deletes: true }).await?).await,
        "ShowQuarantined" => admin.show_quarantined(one).await.map(drop),
        "RetryQuarantined" => admin.retry_quarantined(one).await.map(drop),
        "DiscardQuarantined" => admin.discard_quarantined(one).await.map(drop),
        "Allow" => admin.allow(proto::AllowRequest { link, seq: 0 }).await.map(drop),
        "Pause" => admin.pause(proto::PauseRequest { link }).await.map(drop),
        "Resume" => admin.resume(proto::ResumeRequest { link }).await.map(drop),
        "WatchStatus" => admin.watch_status(proto::WatchStatusRequest { interval_ms: 0 }).await.map(drop),
        "GetConfiguration" => admin.get_configuration(proto::GetConfigurationRequest {}).await.map(drop),
        "ReloadConfiguration" => admin.reload_configuration(proto::ReloadConfigurationRequest {}).await.map(drop),
        "GetCertificates" => admin.get_certificates(proto::GetCertificatesRequest {}).await.map(drop),
        "Bundle" => to_its_end(admin.bundle(proto::BundleRequest {}).await?).await,
        "GetLogLevel" => admin.get_log_level(proto::GetLogLevelRequest {}).await.map(drop),
        "SetLogLevel" => {
            let level = "info,etcd_ferry=debug".to_owned();
            admin.set_log_level(proto::SetLogLevelRequest { level }).await.map(drop)
        }
        unknown => panic!("make {unknown} here too"),
    }
}

/// An operator's, with the full role.
pub fn connection_to(sidecar: &Sidecar) -> Connection {
    let options = &sidecar.options;
    let file = |name: &str| options.certs.join(name);
    let own_cert = file(&format!("{}.pem", options.region));
    let (ca, cert, key) = (file("ca.pem"), file("admin.pem"), file("admin.key"));
    Connection { admin: options.ports.admin, ca, cert, key, own_cert }
}

/// Connected as an operator with the full role.
pub async fn admin_of(sidecar: &Sidecar) -> AdminClient<Channel> {
    let connection = connection_to(sidecar);
    AdminClient::new(client::connect(&connection).await.unwrap())
}

/// Makes every call at a sidecar, twice, and looks for its lines in the log; those that were refused.
async fn make_all(sidecar: &Sidecar) -> Vec<&'static str> {
    let mut admin = admin_of(sidecar).await;
    let mut refused = Vec::new();
    for (call, _) in CALLS {
        let mut outcomes = Vec::new();
        for epoch in [2, 3] {
            let told = make(&mut admin, call).await;
            if told.is_ok() && call == "Resync" {
                let copied =
                    |link: &Value| link["state"] == "following" && link["epoch"] == epoch && link["reason"] == "";
                sidecar.wait_for(LINK, "the new base copy", copied).await;
            }
            outcomes.push(match told {
                Ok(()) if ["Resync", "Verify", "Repair"].contains(&call) => "begun".to_owned(),
                Ok(()) => "done".to_owned(),
                Err(refusal) => refusal.message().to_owned(),
            });
        }
        assert_eq!(outcomes[0], outcomes[1], "{call} is safe to repeat");
        let (log, forms) = (sidecar.log(), [format!("call=\"{call}\""), format!("call=\"{call} ")]);
        let is_of_call = |line: &&str| line.contains("admin call ") && forms.iter().any(|form| line.contains(form));
        let lines: Vec<&str> = log.lines().filter(is_of_call).collect();
        assert_eq!(lines.len(), 2, "of {call}: {lines:#?}");
        for part in [format!("admin={ADMIN:?}"), format!("outcome={:?}", outcomes[0])] {
            assert!(lines.iter().all(|line| line.contains(&part)), "{part} is not in: {lines:#?}");
        }
        if !["begun", "done"].contains(&outcomes[0].as_str()) {
            refused.push(call);
        }
    }
    refused
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_is_safe_to_repeat_and_has_a_line_in_the_log_with_who_made_it_and_what_they_were_told() {
    let pair = Box::pin(Pair::start(over_app())).await;
    pair.wait_applied(pair.origin.put("/app/a", "1").await).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let nothing_there = ["ShowQuarantined", "RetryQuarantined", "DiscardQuarantined", "Allow"];
    assert_eq!(make_all(&pair.origin_sidecar).await, [&nothing_there[..], &["Pause", "Resume"]].concat());
    pair.replica_sidecar.wait_for_state(LINK, "following").await;
    let of_the_origin = ["Resync", "Verify", "Repair"];
    assert_eq!(make_all(&pair.replica_sidecar).await, [&of_the_origin[..], &nothing_there].concat());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_who_does_not_wait_for_the_answer_is_in_the_log_too() {
    let pair = Box::pin(Pair::start(over_app())).await;
    pair.wait_applied(pair.origin.put("/app/a", "1").await).await;
    let sidecar = &pair.replica_sidecar;
    let mut admin = admin_of(sidecar).await;
    // It is written down in etcd, which does not answer.
    pair.replica.pause();
    let asks = tokio::spawn(async move { make(&mut admin, "Pause").await });
    let says = async |words: &str| until(words, PATIENCE, async || sidecar.log().contains(words).then_some(())).await;
    says("call=\"/etcd_ferry.admin.v1.Admin/Pause\"").await;
    asks.abort();
    says("outcome=\"the caller left before the answer").await;
    let (log, call) = (sidecar.log(), format!("admin={ADMIN:?}"));
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("call=\"Pause\"")).collect();
    assert!(lines.len() == 1 && lines[0].contains(&call) && lines[0].contains("caller left"), "{lines:#?}");
    pair.replica.resume();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_for_a_comparison_while_one_runs_gets_the_next_one_and_all_of_them_the_same() {
    let pair = Box::pin(Pair::start(over_app())).await;
    pair.wait_applied(pair.origin.put("/app/a", "1").await).await;
    let sidecar = &pair.origin_sidecar;
    sidecar.wait_for_state(LINK, "following").await;
    let admin = admin_of(sidecar).await;
    let ask = |call: &'static str| {
        let mut admin = admin.clone();
        tokio::spawn(async move { make(&mut admin, call).await })
    };
    let begun = async |count: usize| {
        let lines = || sidecar.log().matches("outcome=\"begun\"").count();
        until(&format!("{count} calls to have begun"), PATIENCE, async || (lines() == count).then_some(())).await;
    };
    // The one that runs waits for the replica's answer.
    pair.replica_sidecar.pause();
    let mut asked = vec![ask("Verify")];
    begun(1).await;
    asked.extend([ask("Verify"), ask("Repair"), ask("Verify")]);
    begun(4).await;
    let runs = sidecar.wait_for(LINK, "a comparison", |link| !link["verification"]["running"].is_null()).await;
    pair.replica_sidecar.resume();
    for told in asked {
        told.await.unwrap().unwrap();
    }
    let over = |link: &Value| link["verification"]["running"].is_null();
    let over = sidecar.wait_for(LINK, "no comparison", over).await;
    let made = [&runs, &over].map(|link| link["verification"]["runs"].as_u64().unwrap());
    assert_eq!(made[1] - made[0], 2, "{over:#}");
}

#[test]
fn every_call_every_message_and_every_field_of_the_service_has_a_comment() {
    let text = documents::text("proto/admin.proto");
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let is_number = |text: &str| text.strip_suffix(';').is_some_and(|number| number.parse::<u32>().is_ok());
    let is_declared = |line: &str| {
        let begins = ["service ", "rpc ", "message "].iter().any(|word| line.starts_with(word));
        begins || line.rsplit_once(" = ").is_some_and(|(_, number)| is_number(number))
    };
    let declared: Vec<&[&str]> = lines.windows(2).filter(|pair| is_declared(pair[1])).collect();
    assert!(declared.len() > 150, "the file does not look as this test expects: {declared:?}");
    let bare: Vec<&str> = declared.iter().filter(|pair| !pair[0].starts_with("//")).map(|pair| pair[1]).collect();
    assert!(bare.is_empty(), "without a comment above them: {bare:#?}");
}
