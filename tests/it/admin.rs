//! Job: the admin port as an operator meets it: who is let in, what is answered, where commands go.
//! Input: a running admin server with development certificates. Output: passes or fails.
//! Edge: loopback sockets, free ports, a temporary folder.
//! Always true: nothing here waits for time, only for answers.

use crate::bed::ports::Nobody;
use crate::bed::sidecar::region_name;
use crate::bed::{PATIENCE, until};
use etcd_ferry::admin::client::{self, ClientError, Connection};
use etcd_ferry::admin::proto::admin_client::AdminClient;
use etcd_ferry::admin::roles::Admins;
use etcd_ferry::admin::service::{Server, ServiceError};
use etcd_ferry::admin::{Directory, LinkCommand, LinkHandle, Listening, Own, certificates, proto, verification};
use etcd_ferry::config::{Config, EtcdConfig, TlsConfig};
use etcd_ferry::model::{LinkName, LinkState, LinkStatus, Outcome, PartsProgress, Revision, Seq, Side};
use etcd_ferry::tls::Certificates;
use etcd_ferry::{certs, logs, metrics};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

const ADMIN: &str = "spiffe://etcd-ferry.dev/admin";
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

struct Running {
    folder: tempfile::TempDir,
    addr: SocketAddr,
    origin: watch::Sender<LinkStatus>,
    _replica: watch::Sender<LinkStatus>,
    commands: mpsc::Receiver<LinkCommand>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), ServiceError>>,
}

impl Running {
    /// As `name`.pem from the server's own folder of certificates.
    fn connection(&self, name: &str) -> Connection {
        connection(self.folder.path(), self.addr, name)
    }
}

fn connection(folder: &std::path::Path, admin: SocketAddr, name: &str) -> Connection {
    let file = |name: String| folder.join(name);
    Connection {
        admin,
        ca: file("ca.pem".into()),
        cert: file(format!("{name}.pem")),
        key: file(format!("{name}.key")),
        own_cert: file("us-east-1.pem".into()),
    }
}

fn handle(name: &str, side: Side, state: LinkState) -> (watch::Sender<LinkStatus>, LinkHandle) {
    let link = LinkName::new(name).unwrap();
    let mut first = LinkStatus::new(link.clone(), side, "spiffe://etcd-ferry.dev/region/cn-hangzhou".to_owned());
    (first.state, first.applied_seq) = (state, Seq(7));
    first.counts.insert("repeated", 2);
    let (sender, status) = watch::channel(first);
    let refresh = etcd_ferry::admin::refresh::channel().0;
    (sender, LinkHandle::new((link, side), status, refresh, CancellationToken::new()))
}

/// What it tells of itself; its log is nobody's.
fn own(folder: &std::path::Path) -> Own {
    let file = |name: &str| folder.join(name).display().to_string();
    let text = format!(
        "region = 'us-east-1'\nnode = 'us-east-1-a'\ndata_dir = {:?}\n\
         [etcd]\nendpoints = ['https://127.0.0.1:2379']\nca = {:?}\ncert = {:?}\nkey = {:?}\nusername = 'ferry'\npassword_file = {:?}\n\
         [listen]\npeer = '127.0.0.1:0'\nadmin = '127.0.0.1:0'\nhttp = '127.0.0.1:0'\n\
         [tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n\
         [[send]]\nlink = 'config'\nto = ['https://127.0.0.1:1']\npeer = 'a.example'\n",
        file("data"),
        file("ca.pem"),
        file("cn-hangzhou.pem"),
        file("cn-hangzhou.key"),
        file("password"),
        file("ca.pem"),
        file("us-east-1.pem"),
        file("us-east-1.key"),
    );
    let config = Config::from_toml(&text).unwrap_or_else(|faults| panic!("{faults}"));
    let (logs, _) = logs::prepare(&config.log, false).unwrap();
    Own { config: watch::channel(Arc::new(config)).1, logs, exporter: metrics::install().unwrap() }
}

/// A sidecar `us-east-1-a` that is the origin of `config` and the replica of `orders`.
async fn start() -> Running {
    let folder = tempfile::tempdir().unwrap();
    certs::dev(folder.path(), &["us-east-1", "cn-hangzhou", "eu-central-1"]).unwrap();
    let tls = TlsConfig {
        ca: folder.path().join("ca.pem"),
        cert: folder.path().join("us-east-1.pem"),
        key: folder.path().join("us-east-1.key"),
        admins: vec![ADMIN.to_owned()],
        viewers: vec![region_name("eu-central-1")],
        crl: None,
    };
    let certificates = Certificates::load(&tls, &EtcdConfig::default()).unwrap();
    let server = Server::bind(LOOPBACK, certificates.in_use(), Admins { admins: tls.admins, viewers: tls.viewers })
        .await
        .unwrap();
    let addr = server.local_addr();
    let (origin, mut config) = handle("config", Side::Origin, LinkState::Following);
    let (replica, orders) = handle("orders", Side::Replica, LinkState::Copying);
    let (sender, commands) = mpsc::channel(1);
    config.commands = Some(sender);
    let directory = Directory {
        region: "us-east-1".to_owned(),
        node: "us-east-1-a".to_owned(),
        version: "9.9.9".to_owned(),
        started: Instant::now(),
        listening: Listening { peer: addr, admin: addr, http: addr },
        links: watch::channel(Arc::from([config, orders])).1,
        reloads: mpsc::channel(1).0,
        etcd: watch::channel(Vec::new()).1,
        certificates: certificates.status(),
    };
    let stop = CancellationToken::new();
    let task = tokio::spawn(server.run(Arc::new(directory), own(folder.path()), stop.clone()));
    Running { folder, addr, origin, _replica: replica, commands, stop, task }
}

fn health_of(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

fn is_serving(answer: &HealthCheckResponse) -> bool {
    answer.status() == ServingStatus::Serving
}

#[tokio::test]
async fn an_admin_sees_every_link() {
    let running = start().await;
    let reply = client::status(&running.connection("admin")).await.unwrap();
    assert_eq!((reply.node.as_str(), reply.version.as_str()), ("us-east-1-a", "9.9.9"));
    let links: Vec<_> = reply.links.iter().map(|l| (l.link.as_str(), l.side.as_str(), l.state.as_str())).collect();
    assert_eq!(links, [("config", "origin", "following"), ("orders", "replica", "copying")]);
    assert_eq!(reply.links[0].applied_seq, 7);
    assert_eq!(reply.links[0].counts["repeated"], 2);
}

#[tokio::test]
async fn another_certificate_of_the_same_ca_is_refused_with_its_name_on_every_service() {
    let running = start().await;
    let other = running.connection("cn-hangzhou");
    let error = client::status(&other).await.unwrap_err();
    assert!(matches!(error, ClientError::NotAdmin { .. }), "{error}");
    let text = error.to_string();
    for part in ["cn-hangzhou.pem", "spiffe://etcd-ferry.dev/region/cn-hangzhou is not among its `tls.admins`"] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }

    let channel = client::connect(&other).await.unwrap();
    let refused = HealthClient::new(channel.clone()).check(health_of("")).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let question = tokio_stream::iter([ServerReflectionRequest::default()]);
    let refused = ServerReflectionClient::new(channel).server_reflection_info(question).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_viewer_looks_and_is_told_which_role_everything_else_asks_for() {
    let running = start().await;
    let viewer = running.connection("eu-central-1");
    assert_eq!(client::status(&viewer).await.unwrap().links.len(), 2);
    let channel = client::connect(&viewer).await.unwrap();
    assert!(is_serving(HealthClient::new(channel).check(health_of("")).await.unwrap().get_ref()));
    let error = client::resync(&viewer, "config", false).await.unwrap_err();
    assert!(matches!(error, ClientError::NotAdmin { .. }), "{error}");
    let told = "Resync asks for the full role, and spiffe://etcd-ferry.dev/region/eu-central-1 is one of `tls.viewers`";
    assert!(error.to_string().contains(told), "{error}");
    for error in [
        verification::verify(&viewer, "config", |_| {}).await.unwrap_err(),
        verification::repair(&viewer, "config", false, |_| {}).await.unwrap_err(),
        client::allow(&viewer, "orders", None).await.unwrap_err(),
    ] {
        assert!(error.to_string().contains("asks for the full role"), "{error}");
    }
}

#[tokio::test]
async fn a_watch_of_the_status_tells_it_again_and_again_and_ends_with_the_sidecar() {
    let running = start().await;
    let viewer = running.connection("eu-central-1");
    let mut states = Vec::new();
    let ended: ClientError = client::watch_status(&viewer, 100, |reply| {
        states.push(reply.links[0].state.clone());
        match states.iter().filter(|state| *state == "stopped").count() {
            0 => running.origin.send_modify(|status| status.state = LinkState::Stopped),
            2 => running.stop.cancel(),
            _ => {}
        }
        Ok(())
    })
    .await
    .unwrap_err();
    assert!(matches!(ended, ClientError::Ended { .. }), "{ended}");
    states.dedup();
    assert_eq!(states, ["following", "stopped"]);
    tokio::time::timeout(Duration::from_secs(5), running.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_watch_that_is_too_fast_or_one_too_many_is_refused_and_a_place_is_given_back() {
    let running = start().await;
    let channel = client::connect(&running.connection("admin")).await.unwrap();
    let mut admin = AdminClient::new(channel);
    let watch = |interval_ms| proto::WatchStatusRequest { interval_ms };
    let too_fast = admin.watch_status(watch(99)).await.unwrap_err();
    assert_eq!(too_fast.code(), Code::InvalidArgument, "{too_fast}");
    let mut watches = Vec::new();
    for _ in 0..16 {
        watches.push(admin.watch_status(watch(60_000)).await.unwrap().into_inner());
    }
    let one_more = admin.watch_status(watch(0)).await.unwrap_err();
    assert_eq!(one_more.code(), Code::ResourceExhausted, "{one_more}");
    assert!(watches[0].message().await.unwrap().is_some(), "the first comes at once");
    watches.pop();
    let again = async || admin.clone().watch_status(watch(0)).await.ok();
    until("a place for one more", PATIENCE, again).await;
}

#[tokio::test]
async fn the_configuration_is_told_with_its_defaults_and_without_what_secret_files_hold() {
    let running = start().await;
    std::fs::write(running.folder.path().join("password"), "unspeakable").unwrap();
    let toml = client::configuration(&running.connection("eu-central-1")).await.unwrap();
    let table: toml::Table = toml.parse().unwrap();
    assert_eq!(table["limits"]["stall_seconds"].as_integer(), Some(30));
    assert_eq!(table["etcd"]["username"].as_str(), Some("ferry"));
    assert!(!toml.contains("unspeakable") && !toml.contains("PRIVATE"), "{toml}");
}

#[tokio::test]
async fn every_certificate_is_told_and_a_file_that_is_gone_too() {
    let running = start().await;
    let viewer = running.connection("eu-central-1");
    let reply = certificates::certificates(&viewer).await.unwrap();
    let uses: Vec<_> = reply.certificates.iter().map(|c| c.r#use.as_str()).collect();
    assert_eq!(uses, ["own", "ca", "etcd client", "etcd ca"]);
    let own = &reply.certificates[0];
    assert!(own.sans.contains(&region_name("us-east-1")) && own.issuer == reply.certificates[1].subject, "{own:?}");
    assert!(own.not_before < own.not_after && own.serial.contains(':'));
    assert_eq!(own.not_after, crate::renewal::ends_of(&running.folder.path().join("us-east-1.pem")));
    assert!(reply.unread.is_empty() && reply.revocation_lists.is_empty());
    std::fs::remove_file(running.folder.path().join("cn-hangzhou.pem")).unwrap();
    let reply = certificates::certificates(&viewer).await.unwrap();
    assert_eq!(reply.certificates.len(), 3);
    assert!(reply.unread[0].file.ends_with("cn-hangzhou.pem") && reply.unread[0].reason.contains("cannot be read"));
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused_and_told_why() {
    let running = start().await;
    let foreign = tempfile::tempdir().unwrap();
    certs::dev(foreign.path(), &["us-east-1"]).unwrap();
    let mut stranger = connection(foreign.path(), running.addr, "admin");
    stranger.ca = running.folder.path().join("ca.pem");
    stranger.own_cert = running.folder.path().join("us-east-1.pem");
    let error = client::status(&stranger).await.unwrap_err();
    assert!(matches!(error, ClientError::Tls { .. }), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_this_region_s_is_not_believed() {
    let running = start().await;
    let mut connection = running.connection("admin");
    connection.own_cert = running.folder.path().join("cn-hangzhou.pem");
    let error = client::status(&connection).await.unwrap_err();
    assert!(matches!(error, ClientError::OtherSidecar { .. }), "{error}");
    assert!(error.to_string().contains("cn-hangzhou"), "{error}");
}

fn resync_asked(command: Option<LinkCommand>) -> (bool, tokio::sync::oneshot::Sender<Result<(), String>>) {
    let Some(LinkCommand::Resync { allow_deletes, reply }) = command else { panic!("not a resync: {command:?}") };
    (allow_deletes, reply)
}

#[tokio::test]
async fn a_comparison_is_told_as_it_goes_on_and_ends_with_its_own_outcome() {
    let mut running = start().await;
    let connection = running.connection("admin");
    let link = async {
        let Some(LinkCommand::Verify { reply }) = running.commands.recv().await else { panic!("not a verify") };
        reply.send(Ok(2)).unwrap();
        for (runs, parts_done, outcome) in
            [(1, 1, Outcome::Different), (1, 5, Outcome::Different), (2, 0, Outcome::Equal)]
        {
            running.origin.send_modify(|status| {
                let verification = &mut status.verification;
                (verification.runs, verification.outcome) = (runs, outcome);
                verification.running = (runs < 2).then_some(PartsProgress { parts_done, parts_total: 9 });
                verification.verified_revision = Revision(40 + runs);
            });
            tokio::task::yield_now().await;
        }
    };
    let mut shown = Vec::new();
    let operator = verification::verify(&connection, "config", |word| shown.push(word.runs));
    let ((), outcome) = tokio::join!(link, operator);
    let outcome = outcome.unwrap();
    assert_eq!((outcome.outcome.as_str(), outcome.verified_revision, outcome.running), ("equal", 42, false));
    assert_eq!(shown.last(), Some(&2));

    let error = verification::verify(&connection, "orders", |_| {}).await.unwrap_err().to_string();
    assert!(error.contains("this sidecar is the replica of link orders"), "{error}");
}

#[tokio::test]
async fn a_resync_reaches_the_link_and_its_refusal_comes_back() {
    let mut running = start().await;
    let connection = running.connection("admin");
    let link = async {
        let (allow_deletes, reply) = resync_asked(running.commands.recv().await);
        assert!(!allow_deletes);
        reply.send(Err("a base copy runs already".to_owned())).unwrap();
        let (allow_deletes, reply) = resync_asked(running.commands.recv().await);
        assert!(allow_deletes);
        reply.send(Ok(())).unwrap();
    };
    let operator = async {
        let error = client::resync(&connection, "config", false).await.unwrap_err();
        assert!(error.to_string().contains("a base copy runs already"), "{error}");
        client::resync(&connection, "config", true).await.unwrap();
    };
    tokio::join!(link, operator);

    running.commands.close();
    let error = client::resync(&connection, "config", false).await.unwrap_err();
    assert!(error.to_string().contains("task has ended"), "{error}");
}

#[tokio::test]
async fn calls_and_refusals_are_in_the_log_with_who_what_and_which_link() {
    let log = tempfile::NamedTempFile::new().unwrap();
    // With a single subscriber alive, tracing asks only the thread that first meets a log line whether anybody wants it; that
    // may be another test's thread, without one. A second subscriber makes it ask all of them.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    let subscriber = tracing_subscriber::fmt().json().with_writer(Arc::new(log.reopen().unwrap())).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let running = start().await;
    client::status(&running.connection("admin")).await.unwrap();
    client::resync(&running.connection("admin"), "orders", true).await.unwrap_err();
    for _ in 0..3 {
        client::resync(&running.connection("cn-hangzhou"), "config", true).await.unwrap_err();
    }
    let text = std::fs::read_to_string(log.path()).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let targets = ["etcd_ferry::admin::audit", "etcd_ferry::audit"];
    let audit: Vec<_> = lines.iter().filter(|line| targets.iter().any(|target| line["target"] == *target)).collect();
    assert_eq!(audit.len(), 3, "who is refused again is told of once a minute: {text}");
    let fields = |line: usize, names: [&str; 3]| names.map(|name| audit[line]["fields"][name].as_str().unwrap());
    assert_eq!(fields(0, ["admin", "call", "outcome"]), [ADMIN, "Status", "done"]);
    assert_eq!(fields(1, ["admin", "call", "link"]), [ADMIN, "Resync --allow-deletes", "orders"]);
    assert!(fields(1, ["outcome"; 3])[0].contains("this sidecar is the replica"), "{text}");
    assert_eq!(
        fields(2, ["who", "call", "message"]),
        [
            "spiffe://etcd-ferry.dev/region/cn-hangzhou",
            "/etcd_ferry.admin.v1.Admin/Resync",
            "admin call refused: none of tls.admins or tls.viewers"
        ]
    );
}

#[tokio::test]
async fn a_resync_of_a_wrong_link_says_which_there_are() {
    let running = start().await;
    let connection = running.connection("admin");
    let error = client::resync(&connection, "confg", false).await.unwrap_err().to_string();
    assert!(error.contains("no link \"confg\" here; there are: config, orders"), "{error}");
    let error = client::resync(&connection, "orders", false).await.unwrap_err().to_string();
    assert!(error.contains("this sidecar is the replica of link orders"), "{error}");
    assert!(error.contains("region/cn-hangzhou"), "{error}");
}

#[tokio::test]
async fn health_follows_each_link() {
    let running = start().await;
    let mut health = HealthClient::new(client::connect(&running.connection("admin")).await.unwrap());
    for name in ["", "link/config/origin", "link/orders/replica"] {
        assert!(is_serving(health.check(health_of(name)).await.unwrap().get_ref()), "{name:?}");
    }
    let unknown = health.check(health_of("link/nowhere/origin")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    let mut watch = health.watch(health_of("link/config/origin")).await.unwrap().into_inner();
    assert!(is_serving(&watch.message().await.unwrap().unwrap()));
    running.origin.send_modify(|status| status.state = LinkState::Stopped);
    assert!(!is_serving(&watch.message().await.unwrap().unwrap()));
    assert!(is_serving(health.check(health_of("")).await.unwrap().get_ref()), "one link is not the sidecar");
}

#[tokio::test]
async fn reflection_lists_what_this_port_serves_and_describes_it() {
    let running = start().await;
    let channel = client::connect(&running.connection("admin")).await.unwrap();
    let ask = |what| ServerReflectionRequest { message_request: Some(what), ..ServerReflectionRequest::default() };
    let services = ["etcd_ferry.admin.v1.Admin", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"];
    let describe = services.map(|service| ask(MessageRequest::FileContainingSymbol(service.to_owned())));
    let questions = std::iter::once(ask(MessageRequest::ListServices(String::new()))).chain(describe);
    let questions = tokio_stream::iter(questions);
    let mut answers =
        ServerReflectionClient::new(channel).server_reflection_info(questions).await.unwrap().into_inner();
    let ServerReflectionResponse { message_response: Some(MessageResponse::ListServicesResponse(list)), .. } =
        answers.message().await.unwrap().unwrap()
    else {
        panic!("not a list of services")
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    assert_eq!(names, services);
    for service in services {
        let described = answers.message().await.unwrap().unwrap().message_response;
        assert!(matches!(described, Some(MessageResponse::FileDescriptorResponse(_))), "{service}: {described:?}");
    }
}

#[tokio::test]
async fn reflection_answers_clients_that_know_only_its_alpha() {
    use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_response::MessageResponse;
    let running = start().await;
    let channel = client::connect(&running.connection("admin")).await.unwrap();
    let question = tonic_reflection::pb::v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel);
    let answers = client.server_reflection_info(tokio_stream::iter([question])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("not a list: {answer:?}") };
    assert!(list.service.iter().any(|service| service.name == "etcd_ferry.admin.v1.Admin"), "{list:?}");
}

#[tokio::test]
async fn a_port_that_nobody_answers_is_said_to_be_so() {
    let (running, nobody) = (start().await, Nobody::new());
    let connection = connection(running.folder.path(), nobody.address, "admin");
    let error = client::status(&connection).await.unwrap_err();
    assert!(matches!(error, ClientError::NoAnswer { .. }), "{error}");
    let wanted = format!("no sidecar answers at {}: is `etcd-ferry run` up?", nobody.address);
    assert!(error.to_string().contains(&wanted), "{error}");
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let running = start().await;
    let tls = TlsConfig {
        ca: running.folder.path().join("ca.pem"),
        cert: running.folder.path().join("us-east-1.pem"),
        key: running.folder.path().join("us-east-1.key"),
        admins: Vec::new(),
        viewers: Vec::new(),
        crl: None,
    };
    let in_use = Certificates::load(&tls, &EtcdConfig::default()).unwrap().in_use();
    let error =
        Server::bind(running.addr, in_use, Admins::default()).await.err().expect("the port is taken").to_string();
    assert!(error.contains(&running.addr.to_string()) && error.contains("listen.admin"), "{error}");
}

#[tokio::test]
async fn stopping_ends_the_streams_that_would_never_end() {
    let running = start().await;
    let mut health = HealthClient::new(client::connect(&running.connection("admin")).await.unwrap());
    let mut watch = health.watch(health_of("")).await.unwrap().into_inner();
    assert!(is_serving(&watch.message().await.unwrap().unwrap()));
    running.stop.cancel();
    let end = async {
        assert!(!is_serving(&watch.message().await.unwrap().unwrap()), "the last word is: not serving");
        assert!(watch.message().await.unwrap().is_none());
        running.task.await.unwrap().unwrap();
    };
    tokio::time::timeout(Duration::from_secs(5), end).await.unwrap();
}

#[tokio::test]
async fn an_unspecified_address_is_dialled_on_loopback() {
    let running = start().await;
    let mut connection = running.connection("admin");
    connection.admin.set_ip(Ipv4Addr::UNSPECIFIED.into());
    let reply: proto::StatusReply = client::status(&connection).await.unwrap();
    assert_eq!(reply.region, "us-east-1");
    // Some systems dial loopback for it by themselves: what was dialled is told where nobody answers.
    running.stop.cancel();
    running.task.await.unwrap().unwrap();
    let error = client::status(&connection).await.unwrap_err().to_string();
    assert!(error.contains(&running.addr.to_string()), "{error}");
}
