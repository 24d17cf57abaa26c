//! What HTTP and gRPC of the router share: the state of the process and what is recorded of an answer.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use athanor_contract::{
    event::Prediction,
    serve::{RouterConfig, RouterLimits},
};
use axum::{
    body::Body,
    http::{Method, Request, Response, StatusCode},
};
use bytes::Bytes;
use futures::StreamExt;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};

use super::{
    analysis::Analysis,
    endpoints::Registry,
    events::{self, Events},
    labels::Labels,
    recent::{self, Answer, Recent},
    request_id::{RequestId, RequestIds},
};

/// A pooled keep-alive HTTP/1.1 client for the servers.
#[derive(Clone)]
pub struct Client(legacy::Client<HttpConnector, Body>);

/// Why a server gave no whole answer.
#[derive(Debug)]
pub enum ClientError {
    /// No connection came about: the server has not seen the request.
    Connect(String),
    Lost(String),
}

impl Default for Client {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(1)));
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_max_idle_per_host(128)
            .build(connector);
        Self(client)
    }
}

impl Client {
    /// Sends a request and reads the whole answer, of at most `limit` bytes.
    pub async fn send(&self, request: Request<Body>, limit: usize) -> Result<Response<Bytes>, ClientError> {
        let response = self.0.request(request).await.map_err(|error| {
            let message = describe(&error);
            if error.is_connect() { ClientError::Connect(message) } else { ClientError::Lost(message) }
        })?;
        let (parts, body) = response.into_parts();
        let mut whole = bytes::BytesMut::new();
        let mut chunks = Body::new(body).into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| ClientError::Lost(describe(&error)))?;
            if whole.len() + chunk.len() > limit {
                return Err(ClientError::Lost(format!("the answer is larger than {limit} bytes")));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(Response::from_parts(parts, whole.freeze()))
    }

    /// The body of a 200 answer within two seconds.
    pub async fn get(&self, address: SocketAddr, path: &str, limit: usize) -> Result<Bytes, String> {
        let request = Request::builder().method(Method::GET).uri(format!("http://{address}{path}"));
        let request = request.body(Body::empty()).map_err(|error| error.to_string())?;
        match tokio::time::timeout(Duration::from_secs(2), self.send(request, limit)).await {
            Err(_) => Err("no answer within 2 s".into()),
            Ok(Err(ClientError::Connect(error) | ClientError::Lost(error))) => Err(error),
            Ok(Ok(response)) if response.status() != StatusCode::OK => Err(format!("status {}", response.status())),
            Ok(Ok(response)) => Ok(response.into_body()),
        }
    }
}

/// An error with its causes, which hyper keeps out of its messages.
fn describe(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    message
}

/// The state of a router process.
pub struct Gateway {
    pub registry: Arc<Registry>,
    pub client: Client,
    pub ids: RequestIds,
    pub analysis: Arc<Analysis>,
    pub recent: Recent,
    pub events: Arc<Events>,
    pub labels: Arc<Labels>,
}

/// One answered request, to be recorded.
pub struct Answered {
    pub id: RequestId,
    pub revision: Arc<str>,
    pub texts: Vec<String>,
    /// Label and its probability, one for each text.
    pub results: Vec<(String, f32)>,
    pub latency: Duration,
}

impl Gateway {
    pub fn new(ids: RequestIds) -> Self {
        // A counter that has never counted is zero, not absent.
        for name in ["athanor_router_events_lost_total", "athanor_router_retries_total"] {
            metrics::counter!(name).increment(0);
        }
        Self {
            registry: Arc::default(),
            client: Client::default(),
            ids,
            analysis: Arc::default(),
            recent: Recent::new(recent::CAPACITY),
            events: Arc::default(),
            labels: Arc::default(),
        }
    }

    pub fn limits(&self) -> RouterLimits {
        self.registry.snapshot().config.as_ref().map(|config| config.limits).unwrap_or_default()
    }

    /// Whether answers are recorded at all.
    pub fn records(&self) -> Option<Arc<RouterConfig>> {
        self.registry.snapshot().config.clone().filter(|config| config.events.is_some())
    }

    /// Remembers an answer and publishes one event for each input. Never waits.
    pub fn record(&self, config: &RouterConfig, answered: Answered) {
        let Ok(uuid) = self.ids.verify(&answered.id.text) else { return };
        if answered.texts.len() != answered.results.len() {
            tracing::warn!(
                revision = &*answered.revision,
                "an answer has not one result for each input and is not recorded"
            );
            return;
        }
        let sink = self.events.get();
        let trace_parent = athanor_telemetry::propagation::current_traceparent();
        for ((index, text), (label, confidence)) in (0..).zip(answered.texts).zip(answered.results) {
            let answer = Answer { revision: answered.revision.clone(), label: label.as_str().into() };
            self.recent.insert((uuid, index), answer);
            let Some(sink) = &sink else {
                metrics::counter!("athanor_router_events_lost_total").increment(1);
                continue;
            };
            let prediction = Prediction {
                request_id: answered.id.text.clone(),
                index,
                revision: answered.revision.to_string(),
                text,
                label,
                confidence,
                latency_ms: answered.latency.as_secs_f32() * 1e3,
            };
            sink.publish(events::prediction(config, trace_parent.clone(), prediction));
        }
    }
}
