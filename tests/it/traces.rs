//! Job: a sampled revision is one trace over both sidecars; others are none, and a collector that is away harms nobody.
//! Input: pairs whose sidecars export to a collector of the test. Output: passes or fails.
//! Always true: what is judged is what a collector was really sent, over OTLP/gRPC.

use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::ports::Nobody;
use crate::bed::sidecar::Sidecar;
use crate::bed::{PATIENCE, until};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};

/// A span as it came, with the node that sent it.
#[derive(Debug, Clone)]
struct Seen {
    node: String,
    name: String,
    trace: Vec<u8>,
    id: Vec<u8>,
    parent: Vec<u8>,
    from: u64,
    until: u64,
    link: String,
    seq: i64,
}

#[derive(Clone, Default)]
struct Collector {
    seen: Arc<Mutex<Vec<Seen>>>,
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    match value(attributes, key) {
        Some(Value::StringValue(text)) => text,
        other => panic!("{key} is {other:?}"),
    }
}

fn value(attributes: &[KeyValue], key: &str) -> Option<Value> {
    attributes.iter().find(|attribute| attribute.key == key)?.value.clone()?.value
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let of_process = resource.resource.unwrap().attributes;
            assert_eq!(text(&of_process, "service.name"), "etcd-ferry");
            let node = text(&of_process, "service.instance.id");
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let Some(Value::IntValue(seq)) = value(&span.attributes, "etcd_ferry.seq") else { panic!("no seq") };
                self.seen.lock().unwrap().push(Seen {
                    node: node.clone(),
                    link: text(&span.attributes, "etcd_ferry.link"),
                    seq,
                    name: span.name,
                    trace: span.trace_id,
                    id: span.span_id,
                    parent: span.parent_span_id,
                    from: span.start_time_unix_nano,
                    until: span.end_time_unix_nano,
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    fn listen(&self, listener: std::net::TcpListener) -> AbortOnDropHandle<()> {
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(self.clone()));
        let serving = async move { server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() };
        AbortOnDropHandle::new(tokio::spawn(serving))
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The spans of one seq, as soon as all eight are here.
    async fn trace_of(&self, seq: i64) -> BTreeMap<String, Seen> {
        until(&format!("the trace of seq {seq}"), PATIENCE, async || {
            let of_seq = self.seen().into_iter().filter(|span| span.seq == seq);
            let spans: BTreeMap<String, Seen> = of_seq.map(|span| (span.name.clone(), span)).collect();
            (spans.len() == 8).then_some(spans)
        })
        .await
    }
}

fn trace(sidecar: &mut Sidecar, collector: SocketAddr, sample: i64) {
    sidecar.options.traces = Some(toml::Table::from_iter([
        ("endpoint".to_owned(), format!("http://{collector}").into()),
        ("sample".to_owned(), sample.into()),
    ]));
    sidecar.write_config();
}

async fn metric(sidecar: &Sidecar, name: &str) -> Option<f64> {
    let (_, text) = sidecar.http("/metrics").await;
    text.lines().find_map(|line| line.strip_prefix(&format!("{name} "))?.parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sampled_revision_is_one_trace_over_both_sidecars_in_the_order_of_its_way() {
    let (collector, listener) = (Collector::default(), std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    let _listening = collector.listen(listener);
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    for sidecar in [&mut pair.origin_sidecar, &mut pair.replica_sidecar] {
        trace(sidecar, address, 3);
        sidecar.restart().await;
    }
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    for round in 1..=7 {
        let revision = pair.origin.put("/app/key", &*round.to_string()).await;
        pair.wait_applied(revision).await;
    }
    let (origin, replica) = (&pair.origin_sidecar.options.node, &pair.replica_sidecar.options.node);
    let mut traces = BTreeSet::new();
    for seq in [3, 6] {
        let spans = collector.trace_of(seq).await;
        let root = &spans["revision"];
        assert!(root.parent.is_empty() && root.trace.len() == 16 && root.id.len() == 8);
        assert!(traces.insert(root.trace.clone()), "each revision has a trace of its own");
        assert!(spans.values().all(|span| span.trace == root.trace && span.link == LINK && span.from <= span.until));
        for (names, node, parent) in [
            (&["spool", "encode", "ship", "ack"][..], origin, root),
            (&["journal", "apply", "acknowledge"], replica, &spans["ship"]),
        ] {
            for name in names {
                assert_eq!((&spans[*name].node, &spans[*name].parent), (node, &parent.id), "{name}");
            }
        }
        // Both processes read the clock of this machine.
        let way = ["spool", "encode", "journal", "apply", "acknowledge"].map(|name| (spans[name].from, name));
        assert!(way.is_sorted(), "{way:?}");
        let (ship, ack) = (&spans["ship"], &spans["ack"]);
        assert!(root.from == spans["spool"].from && root.until == ack.until, "{spans:?}");
        assert!(spans["encode"].until == ship.from && ship.until == ack.from, "{spans:?}");
        assert!(ship.from <= spans["journal"].from && spans["apply"].until <= root.until, "{spans:?}");
    }
    let seqs: BTreeSet<i64> = collector.seen().iter().map(|span| span.seq).collect();
    assert_eq!(seqs, BTreeSet::from([3, 6]), "one in three");
    pair.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_traced_unless_it_is_configured() {
    let (collector, listener) = (Collector::default(), std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    let _listening = collector.listen(listener);
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    trace(&mut pair.origin_sidecar, address, 1);
    pair.origin_sidecar.restart().await;
    pair.replica_sidecar.restart().await;
    // What a base copy brings is in no trace.
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let revision = pair.origin.put("/app/key", "1").await;
    pair.wait_applied(revision).await;
    let root = async || collector.seen().into_iter().find(|span| span.name == "revision");
    until("the origin's spans", PATIENCE, root).await;
    // What is queued at a stop is sent; the replica's sidecar has nothing to send.
    pair.replica_sidecar.stop().await;
    assert!(collector.seen().iter().all(|span| span.node == pair.origin_sidecar.options.node));
    assert!(!pair.replica_sidecar.log().contains("traces are on"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_costs_spans_and_nothing_else() {
    let (collector, nobody) = (Collector::default(), Nobody::new());
    let address = nobody.address;
    let mut pair = Box::pin(Pair::prepare(PairOptions::default())).await;
    for sidecar in [&mut pair.origin_sidecar, &mut pair.replica_sidecar] {
        trace(sidecar, address, 1);
        sidecar.restart().await;
    }
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let first = pair.origin.put("/app/key", "1").await;
    pair.wait_applied(first).await;
    for sidecar in [&pair.origin_sidecar, &pair.replica_sidecar] {
        let dropped = async || metric(sidecar, "etcd_ferry_trace_spans_dropped_total").await.filter(|n| *n > 0.0);
        until("spans to be dropped", PATIENCE, dropped).await;
        let words = "the collector takes no spans";
        sidecar.wait_for_log(words).await;
        assert_eq!(sidecar.log().matches(words).count(), 1, "it is said once");
    }
    let _listening = collector.listen(nobody.listen());
    let written = async || {
        let revision = pair.origin.put("/app/key", "2").await;
        pair.wait_applied(revision).await;
        let seen = collector.seen();
        let nodes: BTreeSet<&String> = seen.iter().map(|span| &span.node).collect();
        (nodes.len() == 2).then_some(())
    };
    until("spans of both, now that the collector is there", PATIENCE, written).await;
    pair.origin_sidecar.wait_for_log("the collector takes spans again").await;
    assert!(metric(&pair.origin_sidecar, "etcd_ferry_trace_spans_total").await.is_some_and(|spans| spans > 0.0));
    pair.assert_equal().await;
}
