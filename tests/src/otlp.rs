//! A receiver of OTLP traces, so that the demo can follow one request through the processes.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use anyhow::Result;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status};

/// One span as far as the demo looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub service: String,
    pub name: String,
    /// Lower-case hexadecimal, 32 digits.
    pub trace_id: String,
}

/// Newest spans kept; the demo looks for traces right after it made them.
const KEPT: usize = 200_000;

#[derive(Clone, Default)]
pub struct Receiver(Arc<Mutex<Vec<Span>>>);

impl Receiver {
    /// Receives until the returned task is aborted.
    pub async fn start(address: SocketAddr) -> Result<(Self, JoinHandle<()>)> {
        let receiver = Self::default();
        let listener = tokio::net::TcpListener::bind(address).await?;
        let service = TraceServiceServer::new(receiver.clone());
        let task = tokio::spawn(async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            if let Err(error) =
                tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await
            {
                eprintln!("OTLP receiver: {error}");
            }
        });
        Ok((receiver, task))
    }

    /// Spans of one trace.
    pub fn trace(&self, trace_id: &str) -> Vec<Span> {
        self.0.lock().expect("no holder panics").iter().filter(|span| span.trace_id == trace_id).cloned().collect()
    }

    pub fn spans(&self) -> usize {
        self.0.lock().expect("no holder panics").len()
    }
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().expect("no holder panics");
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.iter().flat_map(|resource| &resource.attributes);
            let service = attributes
                .filter(|attribute| attribute.key == "service.name")
                .find_map(|attribute| match attribute.value.as_ref()?.value.as_ref()? {
                    opentelemetry_proto::tonic::common::v1::any_value::Value::StringValue(name) => Some(name.clone()),
                    _ => None,
                })
                .unwrap_or_default();
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let trace_id = span.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
                spans.push(Span { service: service.clone(), name: span.name, trace_id });
            }
        }
        let surplus = spans.len().saturating_sub(KEPT);
        spans.drain(..surplus);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
