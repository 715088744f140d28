//! Job: every call of the admin service, one by one: it is in the log, and proto/admin.proto says what it is.
//! Input: a pair, an operator's certificate; the text of proto/admin.proto. Output: passes or fails.
//! Always true: a call that is added to the service must be made here too.

use crate::bed::pair::{LINK, Pair};
use crate::bed::sidecar::Sidecar;
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
        "Allow" => admin.allow(proto::AllowRequest { link }).await.map(drop),
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

/// Makes every call at a sidecar, and looks for its line in the log; those that were refused.
async fn make_all(sidecar: &Sidecar) -> Vec<&'static str> {
    let options = &sidecar.options;
    let file = |name: &str| options.certs.join(name);
    let own_cert = file(&format!("{}.pem", options.region));
    let (ca, cert, key) = (file("ca.pem"), file("admin.pem"), file("admin.key"));
    let connection = Connection { admin: options.ports.admin, ca, cert, key, own_cert };
    let mut admin = AdminClient::new(client::connect(&connection).await.unwrap());
    let mut refused = Vec::new();
    for (call, _) in CALLS {
        let told = make(&mut admin, call).await;
        let outcome = match &told {
            Ok(()) if ["Resync", "Verify", "Repair"].contains(&call) => "begun",
            Ok(()) => "done",
            Err(refusal) => refusal.message(),
        };
        let (log, forms) = (sidecar.log(), [format!("call=\"{call}\""), format!("call=\"{call} ")]);
        let is_of_call = |line: &&str| line.contains("admin call ") && forms.iter().any(|form| line.contains(form));
        let lines: Vec<&str> = log.lines().filter(is_of_call).collect();
        assert_eq!(lines.len(), 1, "of {call}: {lines:#?}");
        for part in [format!("admin={ADMIN:?}"), format!("outcome={outcome:?}")] {
            assert!(lines[0].contains(&part), "{part} is not in: {}", lines[0]);
        }
        if told.is_err() {
            refused.push(call);
        } else if call == "Resync" {
            let copied = |link: &Value| link["state"] == "following" && link["epoch"] == 2 && link["reason"] == "";
            sidecar.wait_for(LINK, "the new base copy", copied).await;
        }
    }
    refused
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_has_one_line_in_the_log_with_who_made_it_and_what_they_were_told() {
    let pair = Box::pin(Pair::start(over_app())).await;
    pair.wait_applied(pair.origin.put("/app/a", "1").await).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let nothing_there = ["ShowQuarantined", "RetryQuarantined", "DiscardQuarantined", "Allow"];
    assert_eq!(make_all(&pair.origin_sidecar).await, [&nothing_there[..], &["Pause", "Resume"]].concat());
    pair.replica_sidecar.wait_for_state(LINK, "following").await;
    let of_the_origin = ["Resync", "Verify", "Repair"];
    assert_eq!(make_all(&pair.replica_sidecar).await, [&of_the_origin[..], &nothing_there].concat());
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
