//! Job: hold the transport to "known peers": who is let in, who is refused, and that both ends say why.
//! Input: certificates made for each case; a small gRPC service (grpc.health.v1) behind the real accept loop.
//! Output: passed or failed.
//! Always true: each refusal is checked at both ends: the words at the caller, and the line in the server's log.

mod server;

use crate::bed::ports::Nobody;
use etcd_ferry::certs::issue::IssueRequest;
use etcd_ferry::config::TlsConfig;
use etcd_ferry::tls::accept::AcceptLimits;
use etcd_ferry::tls::connect::{PeerConnector, endpoint, found_nobody};
use etcd_ferry::tls::{admin_client_config, client_config, explain, is_distrust};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, HandshakeKind};
use server::{Authority, Log, Server, call, without_certificate};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const EAST: &str = "spiffe://etcd-ferry.dev/region/us-east-1";
const WEST: &str = "spiffe://etcd-ferry.dev/region/cn-hangzhou";

/// The words at the caller, and those in the server's log.
async fn assert_refused(server: &TlsConfig, client: Arc<ClientConfig>, at_client: &str, at_server: &str) {
    let (log, _guard) = Log::capture();
    let server = Server::start(server).await;
    let error = server.call(client).await.expect_err("the call is refused");
    assert!(error.contains(at_client), "the caller is told {error:?}, which lacks {at_client:?}");
    log.wait_for(at_server).await;
    assert!(log.text().contains("remote=127.0.0.1:"), "the log names the caller's address: {}", log.text());
    assert!(server.callers.lock().unwrap().is_empty(), "nothing reaches the service");
    server.stop().await;
}

#[tokio::test]
async fn a_peer_of_our_ca_is_let_in_and_the_service_knows_its_name() {
    let authority = Authority::new();
    let (east, west) = (authority.east(), authority.west());
    let server = Server::start(&west).await;
    server.call(client_config(&east, WEST).unwrap()).await.unwrap();
    let callers = server.callers.lock().unwrap().clone();
    assert!(callers[0].identity.bears(EAST) && !callers[0].identity.bears(WEST));
    assert!(callers[0].remote.ip().is_loopback());
    server.stop().await;
}

#[tokio::test]
async fn the_name_dialled_is_not_what_makes_a_peer() {
    let authority = Authority::new();
    let mut request = IssueRequest::region("cn-hangzhou");
    (request.dns, request.addresses) = (Vec::new(), Vec::new());
    let west = authority.tls("cn-hangzhou", &request);
    let server = Server::start(&west).await;
    server.call(client_config(&authority.east(), WEST).unwrap()).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn a_peer_can_be_named_by_its_dns_name() {
    let authority = Authority::new();
    let mut request = IssueRequest::region("cn-hangzhou");
    request.dns = vec!["ferry.example".to_owned()];
    let west = authority.tls("cn-hangzhou", &request);
    let server = Server::start(&west).await;
    server.call(client_config(&authority.east(), "Ferry.Example").unwrap()).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    let authority = Authority::new();
    let west = authority.west();
    let client = without_certificate(&authority);
    assert_refused(&west, client, "none was presented", "the peer presented no certificate").await;
}

#[tokio::test]
async fn a_caller_of_another_ca_is_refused() {
    let (ours, other) = (Authority::new(), Authority::new());
    let mut stranger = other.east();
    stranger.ca = ours.dir.path().join("ca.pem");
    let client = client_config(&stranger, WEST).unwrap();
    let (at_client, at_server) = ("the peer refused our certificate", "is not of the CA that we trust");
    assert_refused(&ours.west(), client, at_client, at_server).await;
}

#[tokio::test]
async fn an_expired_caller_is_refused() {
    let authority = Authority::new();
    let east = authority.tls("us-east-1", &IssueRequest::region("us-east-1").expired());
    let client = client_config(&east, WEST).unwrap();
    assert_refused(&authority.west(), client, "it has expired", "the peer's certificate is refused: it expired on")
        .await;
}

#[tokio::test]
async fn a_caller_whose_time_has_not_come_is_refused() {
    let authority = Authority::new();
    let east = authority.tls("us-east-1", &IssueRequest::region("us-east-1").not_yet_valid());
    let client = client_config(&east, WEST).unwrap();
    assert_refused(&authority.west(), client, "not yet valid", "it is not valid before").await;
}

#[tokio::test]
async fn a_caller_with_a_certificate_for_servers_only_is_refused() {
    let authority = Authority::new();
    let request = IssueRequest { client_auth: false, ..IssueRequest::region("us-east-1") };
    let client = client_config(&authority.tls("us-east-1", &request), WEST).unwrap();
    let words = "not issued for this use";
    assert_refused(&authority.west(), client, words, words).await;
}

#[tokio::test]
async fn an_expired_server_is_refused() {
    let authority = Authority::new();
    let west = authority.tls("cn-hangzhou", &IssueRequest::region("cn-hangzhou").expired());
    let client = client_config(&authority.east(), WEST).unwrap();
    let at_server = "the peer refused our certificate: it has expired";
    assert_refused(&west, client, "the peer's certificate is refused: it expired on", at_server).await;
}

#[tokio::test]
async fn a_server_of_another_ca_is_refused_even_before_its_name_is_looked_at() {
    let (ours, other) = (Authority::new(), Authority::new());
    // Neither the name dialled nor the name wanted is in the certificate: the reason given must still be its CA.
    let mut request = IssueRequest::region("elsewhere");
    (request.dns, request.addresses) = (Vec::new(), Vec::new());
    let stranger = other.tls("elsewhere", &request);
    let client = client_config(&ours.east(), WEST).unwrap();
    let at_client = "is not of the CA that we trust";
    assert_refused(&stranger, client, at_client, "the peer refused our certificate").await;
}

#[tokio::test]
async fn a_server_with_another_name_is_refused_and_both_names_are_told() {
    let authority = Authority::new();
    let client = client_config(&authority.east(), WEST).unwrap();
    let elsewhere = authority.tls("elsewhere", &IssueRequest::region("elsewhere"));
    let at_client = format!("names spiffe://etcd-ferry.dev/region/elsewhere, localhost, not {WEST}");
    let at_server = "the peer refused our certificate: it does not bear the name that the peer expects";
    assert_refused(&elsewhere, client, &at_client, at_server).await;
}

#[tokio::test]
async fn a_server_with_an_operators_certificate_is_refused() {
    let authority = Authority::new();
    let admin = authority.tls("admin", &IssueRequest::admin());
    let client = client_config(&authority.east(), "spiffe://etcd-ferry.dev/admin").unwrap();
    let words = "not issued for this use";
    assert_refused(&admin, client, words, words).await;
}

#[tokio::test]
async fn an_operator_talks_only_to_the_sidecar_of_its_configuration() {
    let authority = Authority::new();
    let (east, west) = (authority.east(), authority.west());
    let admin = authority.tls("admin", &IssueRequest::admin());
    let client = |own: &Path| admin_client_config(&admin.ca, &admin.cert, &admin.key, own).unwrap();
    let server = Server::start(&east).await;
    server.call(client(&east.cert)).await.unwrap();
    assert!(server.callers.lock().unwrap()[0].identity.bears("spiffe://etcd-ferry.dev/admin"));
    // Both bear `localhost`; that is not enough.
    let error = server.call(client(&west.cert)).await.unwrap_err();
    assert!(error.contains(&format!("not {WEST}")), "{error}");
    server.stop().await;
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_at_either_end() {
    let authority = Authority::new();
    let pair = authority.issuer.issue(&IssueRequest::region("us-east-1")).unwrap();
    let revoked = authority.tls_of("us-east-1", &pair);
    let list = authority.issuer.revoke(&[&pair], OffsetDateTime::now_utc() + time::Duration::days(1)).unwrap();
    let crl = authority.dir.path().join("crl.pem");
    std::fs::write(&crl, list).unwrap();
    let west = TlsConfig { crl: Some(crl), ..authority.west() };

    let client = client_config(&revoked, WEST).unwrap();
    assert_refused(&west, client, "it is revoked", "the peer's certificate is refused: it is revoked").await;
    let client = client_config(&west, EAST).unwrap();
    assert_refused(&revoked, client, "it is revoked", "the peer refused our certificate: it is revoked").await;

    let good = authority.tls("other", &IssueRequest::region("other"));
    let server = Server::start(&west).await;
    server.call(client_config(&good, WEST).unwrap()).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn a_revocation_list_past_its_time_lets_nobody_in() {
    let authority = Authority::new();
    let list = authority.issuer.revoke(&[], OffsetDateTime::now_utc() - time::Duration::days(1)).unwrap();
    let crl = authority.dir.path().join("crl.pem");
    std::fs::write(&crl, list).unwrap();
    let west = TlsConfig { crl: Some(crl), ..authority.west() };
    let client = client_config(&authority.east(), WEST).unwrap();
    assert_refused(&west, client, "cannot tell whether it is revoked", "(tls.crl) is out of date since").await;
}

#[tokio::test]
async fn a_refused_caller_is_not_cut_off_before_it_can_read_why() {
    let authority = Authority::new();
    let server = Server::start(&authority.west()).await;
    let connector = TlsConnector::from(without_certificate(&authority));
    let tcp = TcpStream::connect(server.address).await.unwrap();
    let stream = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
    let (mut tcp, _) = stream.into_inner();
    tcp.readable().await.unwrap();
    // What the caller still sends, as HTTP/2 does at once, would reset a closed connection and lose the alert.
    for _ in 0..3 {
        tcp.write_all(&[0; 1024]).await.expect("the server still takes what comes");
    }
    server.stop().await;
}

#[tokio::test]
async fn plain_http_is_refused() {
    let (log, _guard) = Log::capture();
    let authority = Authority::new();
    let server = Server::start(&authority.west()).await;
    let mut plain = TcpStream::connect(server.address).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).await.unwrap();
    log.wait_for("the peer does not speak TLS").await;
    server.stop().await;
}

#[tokio::test]
async fn a_probe_that_connects_and_leaves_is_no_warning() {
    let (log, _guard) = Log::capture();
    let authority = Authority::new();
    let server = Server::start(&authority.west()).await;
    drop(TcpStream::connect(server.address).await.unwrap());
    let mut plain = TcpStream::connect(server.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    log.wait_for("the peer does not speak TLS").await;
    assert_eq!(log.text().lines().count(), 1, "{}", log.text());
    server.stop().await;
}

#[tokio::test]
async fn a_handshake_that_stalls_holds_up_nobody() {
    let authority = Authority::new();
    let server = Server::start(&authority.west()).await;
    let stalled = TcpStream::connect(server.address).await.unwrap();
    server.call(client_config(&authority.east(), WEST).unwrap()).await.unwrap();
    let still_open = stalled.try_read(&mut [0]).unwrap_err();
    assert_eq!(still_open.kind(), std::io::ErrorKind::WouldBlock, "its time-out is not what let the other one in");
    server.stop().await;
}

#[tokio::test]
async fn a_handshake_that_stalls_is_dropped_at_its_time_out() {
    let (log, _guard) = Log::capture();
    let authority = Authority::new();
    let limits = AcceptLimits { handshake_timeout: Duration::from_millis(100), ..AcceptLimits::default() };
    let server = Server::start_with(&authority.west(), limits).await;
    let mut stalled = TcpStream::connect(server.address).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(10), stalled.read_u8()).await.expect("it is dropped");
    assert!(read.is_err());
    log.wait_for("it did not finish its TLS handshake within 100 ms").await;
    server.stop().await;
}

#[tokio::test]
async fn handshakes_beyond_the_limit_wait_and_are_served_later() {
    let authority = Authority::new();
    let (east, west) = (authority.east(), authority.west());
    let limits =
        AcceptLimits { handshakes_max: 1, handshake_timeout: Duration::from_millis(300), ..AcceptLimits::default() };
    let server = Server::start_with(&west, limits).await;
    let start = Instant::now();
    let _stalled = TcpStream::connect(server.address).await.unwrap();
    server.call(client_config(&east, WEST).unwrap()).await.unwrap();
    assert!(start.elapsed() >= limits.handshake_timeout, "it waited for the one place");
    server.stop().await;
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_until_one_ends() {
    let authority = Authority::new();
    let (east, west) = (authority.east(), authority.west());
    let limits = AcceptLimits { connections_max: 1, ..AcceptLimits::default() };
    let server = Server::start_with(&west, limits).await;
    let endpoint = endpoint(&format!("https://{}", server.address)).unwrap();
    let connector = || PeerConnector::new(client_config(&east, WEST).unwrap());
    let held = endpoint.connect_with_connector(connector()).await.unwrap();
    HealthClient::new(held.clone()).check(HealthCheckRequest::default()).await.unwrap();
    let impatient = connector().with_timeout(Duration::from_millis(300));
    let refused = endpoint.connect_with_connector(impatient).await.expect_err("there is no place");
    assert!(explain(&refused).contains("no answer within 300 ms"), "{}", explain(&refused));
    drop(held);
    server.call(client_config(&east, WEST).unwrap()).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn a_handshake_under_way_does_not_delay_shutdown() {
    let authority = Authority::new();
    let server = Server::start(&authority.west()).await;
    let mut stalled = TcpStream::connect(server.address).await.unwrap();
    server.call(client_config(&authority.east(), WEST).unwrap()).await.unwrap();
    server.stop().await;
    assert!(stalled.read_u8().await.is_err());
}

#[tokio::test]
async fn a_second_connection_makes_a_full_handshake_again() {
    let authority = Authority::new();
    let server = Server::start(&authority.west()).await;
    // A caller that would resume if it were offered a ticket, as an attacker would.
    let config = client_config(&authority.east(), WEST).unwrap();
    let mut eager = ClientConfig::clone(&config);
    eager.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let connector = TlsConnector::from(Arc::new(eager));
    for _ in 0..2 {
        let tcp = TcpStream::connect(server.address).await.unwrap();
        let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
        // The server's HTTP/2 settings: by then any ticket would have come.
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        stream.read_u8().await.unwrap();
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(stream.get_ref().1.tls13_tickets_received(), 0);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_caller_is_told_that_nothing_listens() {
    let authority = Authority::new();
    let nobody = Nobody::new();
    let address = nobody.address;
    let error = call(address, client_config(&authority.east(), WEST).unwrap()).await.unwrap_err();
    assert!(error.contains("nothing listens there") && error.contains(&address.to_string()), "{error}");
}

#[tokio::test]
async fn a_server_that_never_answers_is_given_up() {
    let authority = Authority::new();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = client_config(&authority.east(), WEST).unwrap();
    let connector = PeerConnector::new(config).with_timeout(Duration::from_millis(100));
    let endpoint = endpoint(&format!("https://{}", silent.local_addr().unwrap())).unwrap();
    let dialled = tokio::time::timeout(Duration::from_secs(5), endpoint.connect_with_connector(connector)).await;
    let error = dialled.expect("it is given up long before the longest dial").unwrap_err();
    assert!(explain(&error).contains("no answer within 100 ms"), "{}", explain(&error));
}

#[tokio::test]
async fn a_dial_that_nobody_answers_is_told_from_one_that_a_peer_refused() {
    let (ours, other) = (Authority::new(), Authority::new());
    let nobody = Nobody::new();
    let (hangs_up, stranger) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), Server::start(&other.west()).await);
    let cut = hangs_up.local_addr().unwrap();
    let hanging_up = tokio::spawn(async move { drop(hangs_up.accept().await) });
    let of_http = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http = of_http.local_addr().unwrap();
    let answering = tokio::spawn(async move {
        let (mut socket, _) = of_http.accept().await.unwrap();
        socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        // Until the caller has gone.
        let _ = socket.read_to_end(&mut Vec::new()).await;
    });
    let config = client_config(&ours.east(), WEST).unwrap();
    for (address, nobody_there, distrust) in
        [(nobody.address, true, false), (cut, true, false), (stranger.address, false, true), (http, false, false)]
    {
        let connector = PeerConnector::new(config.clone());
        let endpoint = endpoint(&format!("https://{address}")).unwrap();
        let error = endpoint.connect_with_connector(connector).await.unwrap_err();
        assert_eq!((found_nobody(&error), is_distrust(&error)), (nobody_there, distrust), "{}", explain(&error));
    }
    hanging_up.await.unwrap();
    answering.await.unwrap();
    stranger.stop().await;
}
