//! Job: trust between two running sidecars: who is refused, and that both ends say why; what an origin may touch.
//! Input: pairs of regions with certificates and configurations that do not fit. Output: passes or fails.
//! Always true: a refusal is looked for in the log of the side that refused and in the status of the side that was refused, and nothing
//! of the origin may have reached the replica's etcd.

use crate::bed::pair::{LINK, ORIGIN_REGION, Pair, PairOptions, REPLICA_REGION, link_name};
use crate::bed::sidecar::{ReceiveLink, SendLink, make_certificates, region_name};
use crate::bed::{PATIENCE, until};
use bytes::Bytes;
use etcd_ferry::certs::issue::{IssueRequest, Issuer};
use etcd_ferry::config::TlsConfig;
use etcd_ferry::model::{Change, Term, WholeRevision};
use etcd_ferry::tls::connect::{PeerConnector, endpoint};
use etcd_ferry::tls::{client_config, explain};
use etcd_ferry::wire::digest;
use etcd_ferry::wire::frame::encode_standalone;
use etcd_ferry::wire::replicate::handshake_client::HandshakeClient;
use etcd_ferry::wire::replicate::replicate_client::ReplicateClient;
use etcd_ferry::wire::replicate::{HelloReply, HelloRequest, Progress, Range, Shipment, receipt, refusal, shipment};
use etcd_ferry::wire::{LINK_METADATA, PROTOCOL_VERSION, SESSION_METADATA};
use futures::{Stream, StreamExt};
use rustls::pki_types::ServerName;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Code;
use tonic::transport::Channel;

const ELSEWHERE: &str = "elsewhere";

/// A link that carries `/app/`, with a key at the origin that must not cross while the sidecars distrust each other.
async fn prepared() -> Pair {
    let pair = Box::pin(Pair::prepare(PairOptions { prefixes: vec!["/app/".into()], ..PairOptions::default() })).await;
    pair.origin.put("/app/a", "1").await;
    pair
}

/// Issues `request` from the pair's CA, in the place of what `name` had.
fn reissue(pair: &Pair, name: &str, request: &IssueRequest) {
    let certs = pair.dir().join("certs");
    for suffix in ["pem", "key"] {
        fs::remove_file(certs.join(format!("{name}.{suffix}"))).unwrap();
    }
    let issuer = Issuer::load(&certs.join("ca.pem"), &certs.join("ca.key")).unwrap();
    issuer.issue(request).unwrap().write(&certs, name).unwrap();
}

/// Certificates of another CA, whose bearer trusts the pair's CA too.
fn stranger(pair: &Pair) -> PathBuf {
    let folder = pair.dir().join("another-ca");
    make_certificates(&folder, &[ORIGIN_REGION, REPLICA_REGION]);
    let both = [&folder, &pair.dir().join("certs")].map(|dir| fs::read_to_string(dir.join("ca.pem")).unwrap());
    fs::write(folder.join("ca.pem"), both.concat()).unwrap();
    folder
}

fn says(link: &Value, told: &str) -> bool {
    link["reason"].as_str().is_some_and(|reason| reason.contains(told))
}

/// The replica's status says why its last caller was turned away, while no origin is connected.
async fn assert_turned_away(pair: &Pair, told: &str) {
    let told = format!("a caller from 127.0.0.1 was turned away: {told}");
    pair.replica_sidecar.wait_for(LINK, &format!("the reason {told:?}"), |entry| says(entry, &told)).await;
}

/// The origin is not let in: its status says `told`, by http and by command, and the replica's etcd stays empty.
async fn assert_not_let_in(pair: &Pair, told: &str) {
    assert_waits_outside(pair, told).await;
    let status = pair.origin_sidecar.status();
    assert!(says(&status["links"][0], told), "{status:#}");
}

/// As `assert_not_let_in`, for an origin whose admin port shows a bad certificate too.
async fn assert_waits_outside(pair: &Pair, told: &str) {
    let entry = pair.origin_sidecar.wait_for(LINK, &format!("the reason {told:?}"), |entry| says(entry, told)).await;
    assert_eq!(entry["state"], "connecting");
    assert_eq!(pair.replica.read_all().await.1.len(), 0, "nothing of the origin is at the replica");
}

async fn assert_follows(pair: &Pair) {
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let put = pair.origin.put("/app/b", "2").await;
    pair.wait_applied(put).await;
    pair.assert_equal().await;
}

#[tokio::test]
async fn an_origin_of_another_ca_is_refused_and_both_ends_say_why() {
    let mut pair = prepared().await;
    pair.origin_sidecar.options.certs = stranger(&pair);
    pair.origin_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.wait_for_log("is not of the CA that we trust").await;
    assert_turned_away(&pair, "the peer's certificate is refused: ").await;
    assert_not_let_in(&pair, "the peer refused our certificate").await;

    pair.origin_sidecar.options.certs = pair.dir().join("certs");
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    assert_follows(&pair).await;
    let well = |entry: &Value| entry["state"] == "following" && entry["reason"] == "";
    pair.replica_sidecar.wait_for(LINK, "no word of who was turned away before", well).await;
}

#[tokio::test]
async fn a_replica_of_another_ca_is_refused_and_both_ends_say_why() {
    let mut pair = prepared().await;
    pair.replica_sidecar.options.certs = stranger(&pair);
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.origin_sidecar.wait_for_log("is not of the CA that we trust").await;
    pair.replica_sidecar.wait_for_log("the peer refused our certificate").await;
    assert_turned_away(&pair, "the peer refused our certificate").await;
    assert_not_let_in(&pair, "no mutual trust with https://").await;
    assert_not_let_in(&pair, "is not of the CA that we trust").await;
}

#[tokio::test]
async fn a_replica_that_does_not_bear_the_name_that_the_link_names_is_refused() {
    let mut pair = prepared().await;
    pair.origin_sidecar.options.send[0].peer = region_name(ELSEWHERE);
    pair.origin_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let told = format!("names {}", region_name(REPLICA_REGION));
    pair.origin_sidecar.wait_for_log(&told).await;
    pair.replica_sidecar.wait_for_log("it does not bear the name that the peer expects").await;
    assert_not_let_in(&pair, &told).await;
    assert_not_let_in(&pair, &region_name(ELSEWHERE)).await;
}

#[tokio::test]
async fn an_origin_that_does_not_bear_the_name_that_the_link_names_is_refused() {
    let mut pair = prepared().await;
    pair.replica_sidecar.options.receive[0].peer = region_name(ELSEWHERE);
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.wait_for_log("a call is refused").await;
    let told = format!("link config takes {} only, and this certificate bears", region_name(ELSEWHERE));
    assert_not_let_in(&pair, &told).await;
    assert_not_let_in(&pair, &region_name(ORIGIN_REGION)).await;
    let at_replica = |entry: &Value| {
        entry["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("the last hello was refused") && reason.contains(&told))
    };
    pair.replica_sidecar.wait_for(LINK, "at the replica too why nobody is connected", at_replica).await;
}

/// A certificate that is good when the sidecar starts, and whose time ends while the link is cut.
async fn expires_while_cut(name: &str) -> Pair {
    let mut pair = prepared().await;
    // Long enough for both sidecars to start; in whole seconds, as certificates count.
    let not_after = OffsetDateTime::now_utc() + time::Duration::seconds(5);
    reissue(&pair, name, &IssueRequest { not_after, ..IssueRequest::region(name) });
    pair.proxy.cut();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    let over = async || (OffsetDateTime::now_utc() > not_after + time::Duration::seconds(1)).then_some(());
    until("the certificate's time to be over", PATIENCE, over).await;
    pair.proxy.heal();
    pair
}

#[tokio::test]
async fn an_origin_whose_certificate_has_expired_is_refused_and_both_ends_say_so() {
    let pair = Box::pin(expires_while_cut(ORIGIN_REGION)).await;
    pair.replica_sidecar.wait_for_log("the peer's certificate is refused: it expired on").await;
    assert_waits_outside(&pair, "the peer refused our certificate: it has expired").await;
    let output = pair.origin_sidecar.admin(&["status"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("it expired on"), "{said}");
}

#[tokio::test]
async fn a_replica_whose_certificate_has_expired_is_refused_and_both_ends_say_so() {
    let pair = Box::pin(expires_while_cut(REPLICA_REGION)).await;
    pair.origin_sidecar.wait_for_log("it expired on").await;
    pair.replica_sidecar.wait_for_log("the peer refused our certificate: it has expired").await;
    assert_not_let_in(&pair, "the peer's certificate is refused: it expired on").await;
}

#[tokio::test]
async fn a_sidecar_whose_certificate_has_expired_does_not_start() {
    let mut pair = prepared().await;
    reissue(&pair, ORIGIN_REGION, &IssueRequest::region(ORIGIN_REGION).expired());
    pair.origin_sidecar.spawn();
    assert_eq!(pair.origin_sidecar.ended().await.code(), Some(2));
    assert!(pair.origin_sidecar.log().contains("tls.cert: "), "{}", pair.origin_sidecar.log());
    assert!(pair.origin_sidecar.log().contains("expired on"), "{}", pair.origin_sidecar.log());
}

/// A caller's own TLS configuration: the pair's CA, and the certificate that `name` has there.
fn tls_of(pair: &Pair, name: &str) -> TlsConfig {
    let file = |suffix: &str| pair.dir().join("certs").join(format!("{name}.{suffix}"));
    TlsConfig {
        ca: pair.dir().join("certs/ca.pem"),
        cert: file("pem"),
        key: file("key"),
        crl: None,
        admins: Vec::new(),
        viewers: Vec::new(),
    }
}

async fn channel(pair: &Pair, name: &str) -> Channel {
    let config = client_config(&tls_of(pair, name), &region_name(REPLICA_REGION)).unwrap();
    let endpoint = endpoint(&format!("https://{}", pair.replica_sidecar.options.ports.peer)).unwrap();
    endpoint.connect_with_connector(PeerConnector::new(config)).await.unwrap_or_else(|e| panic!("{}", explain(&e)))
}

fn hello() -> HelloRequest {
    HelloRequest {
        protocol_version: PROTOCOL_VERSION,
        link: LINK.to_owned(),
        origin_cluster: 7,
        ranges: vec![Range { from: Bytes::from_static(b"/app/"), to: Bytes::from_static(b"/app0") }],
        window_bytes_max: 1 << 20,
        frame_bytes_max: 1 << 20,
        ..HelloRequest::default()
    }
}

#[tokio::test]
async fn a_caller_without_a_certificate_gets_no_byte_of_http() {
    let mut pair = prepared().await;
    pair.replica_sidecar.restart().await;
    let roots = etcd_ferry::certs::load::load_roots(&pair.dir().join("certs/ca.pem")).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(etcd_ferry::certs::load::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    for port in [pair.replica_sidecar.options.ports.peer, pair.replica_sidecar.options.ports.admin] {
        let tcp = TcpStream::connect(port).await.unwrap();
        let connector = TlsConnector::from(Arc::new(config.clone()));
        let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
        let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
        let mut answer = Vec::new();
        let error = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("CertificateRequired"), "{error}");
        assert!(answer.is_empty());
    }
    let presented_none = |log: &str| log.matches("the peer presented no certificate").count() == 2;
    until("both in the log", PATIENCE, async || presented_none(&pair.replica_sidecar.log()).then_some(())).await;
}

#[tokio::test]
async fn a_caller_of_our_ca_with_another_name_can_neither_greet_nor_ship() {
    let mut pair = prepared().await;
    let certs = pair.dir().join("certs");
    make_certificates(&certs, &[ELSEWHERE]);
    pair.replica_sidecar.restart().await;
    for name in [ELSEWHERE, "admin", REPLICA_REGION] {
        let channel = channel(&pair, name).await;
        let refused = HandshakeClient::new(channel.clone()).hello(hello()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{name}: {refused}");
        let mut request = tonic::Request::new(tokio_stream::iter([Shipment::default()]));
        request.metadata_mut().insert(LINK_METADATA, LINK.parse().unwrap());
        request.metadata_mut().insert(SESSION_METADATA, "00".parse().unwrap());
        let refused = ReplicateClient::new(channel).ship(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{name}: {refused}");
    }
    pair.replica_sidecar.wait_for_log("names=spiffe://etcd-ferry.dev/region/elsewhere").await;
    assert_eq!(pair.replica.read_all().await.1.len(), 0);
}

#[tokio::test]
async fn a_peer_with_the_right_name_is_held_to_small_hellos_known_links_and_its_own_session() {
    let mut pair = prepared().await;
    pair.replica_sidecar.restart().await;
    let channel = channel(&pair, ORIGIN_REGION).await;
    let mut handshake = HandshakeClient::new(channel.clone());
    let large = HelloRequest { software: "x".repeat(1 << 20), ..hello() };
    let refused = handshake.hello(large).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    let unknown = HelloRequest { link: "confg".to_owned(), ..hello() };
    let refused = handshake.hello(unknown).await.unwrap_err();
    assert!(refused.message().contains("receives no link named \"confg\""), "{refused}");
    assert_turned_away(&pair, "it asked for the link \"confg\", which is not among those received here").await;
    let old = HelloRequest { protocol_version: PROTOCOL_VERSION + 1, ..hello() };
    let refused = handshake.hello(old).await.unwrap_err();
    assert!(refused.message().contains("upgrade the older one"), "{refused}");
    let ferry = Range { from: Bytes::from_static(b"/etcd-ferry/"), to: Bytes::from_static(b"/etcd-ferry0") };
    let refused = handshake.hello(HelloRequest { ranges: vec![ferry], ..hello() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let mut request = tonic::Request::new(tokio_stream::iter([Shipment::default()]));
    request.metadata_mut().insert(LINK_METADATA, LINK.parse().unwrap());
    request.metadata_mut().insert(SESSION_METADATA, "00112233445566778899aabbccddeeff".parse().unwrap());
    let refused = ReplicateClient::new(channel).ship(request).await.unwrap_err();
    assert!(refused.message().contains("no hello opened this session"), "{refused}");
    assert_eq!(pair.replica.read_all().await.1.len(), 0);
}

#[tokio::test]
async fn what_the_replica_does_not_allow_is_refused_with_both_ranges_named() {
    let mut pair = Box::pin(Pair::prepare(PairOptions { prefixes: vec!["/".into()], ..PairOptions::default() })).await;
    pair.origin.put("/app/a", "1").await;
    pair.replica_sidecar.options.receive[0].prefixes = vec!["/app/".into()];
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.wait_for_log("a call is refused").await;
    assert_not_let_in(
        &pair,
        "may touch the prefix /app/ here, and the origin asks for the prefix / (but etcd-ferry's own)",
    )
    .await;
    assert_not_let_in(&pair, "set prefixes of [[receive]] to allow it").await;
}

#[tokio::test]
async fn without_prefixes_the_first_hello_fixes_what_the_origin_may_touch_also_after_a_restart() {
    let mut pair = prepared().await;
    pair.replica_sidecar.options.receive[0].prefixes.clear();
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    assert_follows(&pair).await;

    pair.origin.put("/more/a", "1").await;
    pair.origin_sidecar.options.send[0].prefixes.push("/more/".into());
    pair.origin_sidecar.write_config();
    pair.origin_sidecar.restart().await;
    let refused = |entry: &Value| says(entry, "may touch the prefix /app/ here");
    pair.origin_sidecar.wait_for(LINK, "the wider range to be refused", refused).await;
    pair.replica_sidecar.restart().await;
    pair.replica_sidecar.wait_for(LINK, "the wider range to be refused after a restart", refused).await;
    assert_eq!(pair.replica.get("/more/a").await, None);

    pair.replica_sidecar.options.receive[0].prefixes = vec!["/app/".into(), "/more/".into()];
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    until("the wider range to be carried", PATIENCE, async || pair.replica.get("/more/a").await).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
}

#[tokio::test]
async fn two_links_over_one_range_of_a_replica_are_not_both_taken() {
    let mut pair = prepared().await;
    let first = pair.origin_sidecar.options.send[0].clone();
    let send = SendLink { link: "second".into(), prefixes: vec!["/app/sub/".into()], ..first };
    pair.origin_sidecar.options.send.push(send);
    let receive = ReceiveLink { link: "second".into(), peer: region_name(ORIGIN_REGION), ..ReceiveLink::default() };
    pair.replica_sidecar.options.receive.push(receive);
    pair.origin_sidecar.write_config();
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    assert_follows(&pair).await;
    let refused = |entry: &Value| says(entry, "overlap those of link config");
    pair.origin_sidecar.wait_for("second", "the overlap to be refused", refused).await;
    assert!(pair.replica.position(&link_name("second")).await.is_none());
}

/// Every file and folder below `dir`, with its mode.
fn modes(dir: &Path, into: &mut Vec<(PathBuf, u32)>) {
    into.push((dir.to_owned(), fs::metadata(dir).unwrap().permissions().mode() & 0o777));
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::metadata(&path);
        match metadata {
            Ok(metadata) if metadata.is_dir() => modes(&path, into),
            Ok(metadata) => into.push((path, metadata.permissions().mode() & 0o777)),
            // A segment that was trimmed meanwhile.
            Err(_) => {}
        }
    }
}

#[tokio::test]
async fn what_a_sidecar_keeps_on_disk_is_its_users_alone() {
    let mut pair = prepared().await;
    pair.replica_sidecar.options.receive[0].prefixes.clear();
    pair.replica_sidecar.write_config();
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    assert_follows(&pair).await;
    pair.proxy.cut();
    pair.origin.put("/app/spooled", "1").await;
    pair.origin_sidecar.stop().await;
    pair.replica_sidecar.stop().await;
    let mut found = Vec::new();
    modes(&pair.origin_sidecar.data_dir(), &mut found);
    modes(&pair.replica_sidecar.data_dir(), &mut found);
    let named = |name: &str| found.iter().any(|(path, _)| path.to_string_lossy().contains(name));
    for name in ["origin/config/spool/", "replica/config/journal/", "replica/config/dedupe/", "ranges.json"] {
        assert!(named(name), "{name} is not among {found:#?}");
    }
    for (path, mode) in &found {
        let wanted = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(*mode, wanted, "{} has mode {mode:04o}", path.display());
    }
}

/// Opens the stream that this hello was answered for.
fn stream_of<S>(reply: &HelloReply, shipments: S) -> tonic::Request<S> {
    let session: String = reply.session.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut request = tonic::Request::new(shipments);
    request.metadata_mut().insert(LINK_METADATA, LINK.parse().unwrap());
    request.metadata_mut().insert(SESSION_METADATA, session.parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revision_that_comes_again_under_its_seq_with_another_content_is_refused_as_a_conflict() {
    let mut pair = prepared().await;
    pair.replica_sidecar.restart().await;
    pair.origin_sidecar.restart().await;
    assert_follows(&pair).await;
    let revision = pair.origin.put("/app/b", "1").await;
    pair.wait_applied(revision).await;
    pair.origin_sidecar.stop().await;
    let position = pair.position().await.unwrap();
    let term = Term(position.term.0 + 1_000);
    let takes_over =
        HelloRequest { epoch: position.epoch.0, term: term.0, origin_cluster: position.origin_cluster.0, ..hello() };
    let wide = channel(&pair, ORIGIN_REGION).await;
    let reply = HandshakeClient::new(wide.clone()).hello(takes_over).await.unwrap().into_inner();
    let put = Change::Put { key: Bytes::from_static(b"/app/b"), value: Bytes::from_static(b"another") };
    let other = WholeRevision { revision: position.origin_revision, changes: vec![put] };
    let digests = [digest::of_revision(&other)];
    let frame = encode_standalone(position.epoch, term, position.seq, &[other], &digests);
    let shipment = Shipment { what: Some(shipment::What::Frame(frame)) };
    let shipments = futures::stream::iter([shipment]).chain(futures::stream::pending());
    let mut receipts = ReplicateClient::new(wide).ship(stream_of(&reply, shipments)).await.unwrap().into_inner();
    let refusal = async {
        loop {
            let receipt = receipts.message().await.unwrap().expect("a refusal before the stream's end");
            if let Some(receipt::What::Refusal(refusal)) = receipt.what {
                break refusal;
            }
        }
    };
    let refusal = tokio::time::timeout(PATIENCE, refusal).await.expect("a refusal");
    assert_eq!(refusal.kind(), refusal::Kind::Conflict, "{refusal:?}");
    assert!(refusal.reason.contains("came before"), "{refusal:?}");
    assert_eq!(pair.replica.get("/app/b").await.as_deref(), Some(&b"1"[..]));
    assert_eq!(pair.position().await.unwrap().seq, position.seq);
}

/// What a sender says each 30 ms: that its etcd has come so far.
fn heads() -> impl Stream<Item = Shipment> + Send + 'static {
    let ticks = tokio::time::interval(Duration::from_millis(30));
    futures::stream::unfold((ticks, 0), |(mut ticks, head)| async move {
        ticks.tick().await;
        let progress = Progress { head_revision: head, ..Progress::default() };
        Some((Shipment { what: Some(shipment::What::Progress(progress)) }, (ticks, head + 1)))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_takes_no_receipts_does_not_keep_out_the_one_that_follows_it() {
    let mut pair = prepared().await;
    pair.replica_sidecar.restart().await;
    let wide = channel(&pair, ORIGIN_REGION).await;
    let request = async || {
        let reply = HandshakeClient::new(wide.clone()).hello(hello()).await.unwrap().into_inner();
        stream_of(&reply, heads())
    };
    // A byte of receipts is on its way, and nobody reads it.
    let config = client_config(&tls_of(&pair, ORIGIN_REGION), &region_name(REPLICA_REGION)).unwrap();
    let address = format!("https://{}", pair.replica_sidecar.options.ports.peer);
    let narrow = endpoint(&address).unwrap().initial_stream_window_size(1);
    let narrow = narrow.connect_with_connector(PeerConnector::new(config)).await.unwrap();
    let unread = ReplicateClient::new(narrow).ship(request().await).await.unwrap();
    let full = |entry: &Value| entry["head_revision"].as_u64() > Some(60);
    pair.replica_sidecar.wait_for(LINK, "more words of it than there is room for their receipts", full).await;
    let followed = ReplicateClient::new(wide.clone()).ship(request().await).await;
    assert!(followed.is_ok(), "{followed:?}");
    drop(unread);
}
