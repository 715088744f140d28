//! Job: send spans to a collector, over OTLP/gRPC.
//! Input: the queue of spans. Output: `Export` calls.
//! Edge: dials the collector.
//! Always true: a batch is sent once; what a collector does not take in time is dropped and counted, and said once.

use super::TracesError;
use super::span::{Span, Step};
use crate::certs::load;
use crate::config::TracesConfig;
use crate::metrics;
use crate::retry::Backoff;
use crate::tls::explain;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span as ProtoSpan};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// Spans of one call: some 100 KiB, far below what a collector takes (4 MiB).
const BATCH_MAX: usize = 512;
/// Spans are shown soon, and an idle link costs a collector nothing.
const GATHER: Duration = Duration::from_secs(1);
const EXPORT_WITHIN: Duration = Duration::from_secs(5);
/// What is left at a stop is sent if that is quick.
const LAST_EXPORT_WITHIN: Duration = Duration::from_secs(1);
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// The task behind the process' tracer.
pub struct Exporter {
    endpoint: String,
    client: TraceServiceClient<Channel>,
    queue: mpsc::Receiver<Span>,
    resource: Resource,
}

impl Exporter {
    pub(super) fn new(
        config: &TracesConfig,
        region: &str,
        node: &str,
        queue: mpsc::Receiver<Span>,
    ) -> Result<Self, TracesError> {
        let unusable = |e: tonic::transport::Error| TracesError::Endpoint {
            endpoint: config.endpoint.clone(),
            reason: explain(&e),
        };
        let mut endpoint = Endpoint::from_shared(config.endpoint.clone()).map_err(unusable)?;
        if let Some(ca) = &config.ca {
            let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(load::read(ca)?));
            endpoint = endpoint.tls_config(tls).map_err(unusable)?;
        }
        let channel = endpoint.connect_timeout(EXPORT_WITHIN).timeout(EXPORT_WITHIN).connect_lazy();
        let of_process = [
            ("service.name", "etcd-ferry"),
            ("service.version", env!("CARGO_PKG_VERSION")),
            ("service.instance.id", node),
            ("etcd_ferry.region", region),
        ];
        let attributes = of_process.map(|(key, value)| attribute(key, Value::StringValue(value.to_owned())));
        Ok(Self {
            endpoint: config.endpoint.clone(),
            client: TraceServiceClient::new(channel),
            queue,
            resource: Resource { attributes: attributes.into(), ..Resource::default() },
        })
    }

    /// Exports until `stop`, and then what is there.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
        let mut failing = false;
        tracing::info!(collector = %self.endpoint, "traces are on");
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = gather(&mut self.queue, &mut batch) => {}
            }
            let exported = {
                let exporting = self.export(std::mem::take(&mut batch), EXPORT_WITHIN);
                tokio::pin!(exporting);
                tokio::select! {
                    biased;
                    exported = &mut exporting => exported,
                    () = stop.cancelled() => {
                        let _ = tokio::time::timeout(LAST_EXPORT_WITHIN, exporting).await;
                        break;
                    }
                }
            };
            match exported {
                Ok(()) => {
                    if std::mem::take(&mut failing) {
                        tracing::info!(collector = %self.endpoint, "the collector takes spans again");
                    }
                    backoff.succeeded();
                }
                Err(reason) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(collector = %self.endpoint, %reason, "the collector takes no spans: they are dropped, and links go on");
                    }
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(backoff.after_failure(rand::random())) => {}
                    }
                }
            }
        }
        self.queue.close();
        while let Ok(span) = self.queue.try_recv() {
            batch.push(span);
        }
        if !batch.is_empty() {
            let _ = self.export(batch, LAST_EXPORT_WITHIN).await;
        }
    }

    async fn export(&mut self, batch: Vec<Span>, within: Duration) -> Result<(), String> {
        let spans = batch.len() as u64;
        let scope = InstrumentationScope { name: "etcd-ferry".to_owned(), ..InstrumentationScope::default() };
        let scope = ScopeSpans {
            scope: Some(scope),
            spans: batch.into_iter().map(to_proto).collect(),
            ..ScopeSpans::default()
        };
        let resource = ResourceSpans {
            resource: Some(self.resource.clone()),
            scope_spans: vec![scope],
            ..ResourceSpans::default()
        };
        let request = ExportTraceServiceRequest { resource_spans: vec![resource] };
        let answer = match tokio::time::timeout(within, self.client.export(request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner().partial_success.unwrap_or_default()),
            Ok(Err(status)) => Err(explain(&status)),
            Err(_) => Err(format!("no answer within {} s", within.as_secs())),
        };
        let rejected = answer.as_ref().map_or(spans, |part| u64::try_from(part.rejected_spans).unwrap_or(0).min(spans));
        metrics::count_spans(spans - rejected);
        metrics::count_dropped_spans(rejected);
        match answer {
            Ok(part) if rejected > 0 => {
                Err(format!("{rejected} of {spans} spans were rejected: {}", part.error_message))
            }
            Ok(_) => Ok(()),
            Err(reason) => Err(reason),
        }
    }
}

/// A first span, and what comes soon after it. Cancel-safe: what was taken is in `batch`.
async fn gather(queue: &mut mpsc::Receiver<Span>, batch: &mut Vec<Span>) {
    if batch.is_empty() && queue.recv_many(batch, BATCH_MAX).await == 0 {
        return std::future::pending().await;
    }
    let more = async { while batch.len() < BATCH_MAX && queue.recv_many(batch, BATCH_MAX - batch.len()).await > 0 {} };
    let _ = tokio::time::timeout(GATHER, more).await;
}

fn to_proto(span: Span) -> ProtoSpan {
    let kind = match span.step {
        Step::Ship => SpanKind::Client,
        Step::Journal => SpanKind::Server,
        Step::Revision | Step::Spool | Step::Encode | Step::Ack | Step::Apply | Step::Acknowledge => SpanKind::Internal,
    };
    let number = |number: u64| Value::IntValue(i64::try_from(number).unwrap_or(i64::MAX));
    ProtoSpan {
        trace_id: span.of.trace_id().to_vec(),
        span_id: span.of.span_id(span.step).to_vec(),
        parent_span_id: span.step.parent().map(|parent| span.of.span_id(parent).to_vec()).unwrap_or_default(),
        name: span.step.as_str().to_owned(),
        kind: kind.into(),
        start_time_unix_nano: span.from_ns,
        end_time_unix_nano: span.until_ns,
        attributes: vec![
            attribute("etcd_ferry.link", Value::StringValue(span.of.link.as_str().to_owned())),
            attribute("etcd_ferry.epoch", number(span.of.epoch.0)),
            attribute("etcd_ferry.seq", number(span.of.seq.0)),
            attribute("etcd_ferry.origin_revision", number(span.revision.0)),
        ],
        ..ProtoSpan::default()
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}
