//! The Open Inference Protocol through the router: `ModelInfer` and the model's metadata are passed on like HTTP requests, the server's
//! own questions are answered here.

use std::{error::Error as _, sync::Arc, time::Instant};

use athanor_contract::serve::Scope;
use athanor_serving::api::inference::{
    label,
    protocol::{
        ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest,
        ModelReadyResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse,
        ServerReadyRequest, ServerReadyResponse, grpc_inference_service_client::GrpcInferenceServiceClient,
        grpc_inference_service_server::GrpcInferenceService,
    },
    tensors,
};
use athanor_telemetry::Readiness;
use tonic::{
    Code, Request, Response, Status,
    metadata::{KeyAndValueRef, MetadataMap},
    transport::Channel,
};
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::pass::{passed_on, target, with_adapter};
use crate::{
    access::Denied,
    balance::{
        endpoints::{Endpoint, Snapshot},
        forward::{self, Attempt, ForwardError, Forwarded, Policy},
        select::{self, Target},
    },
    gateway::{Answered, Gateway},
    record::request_id::RequestId,
};

/// The most that an answer of a server may hold.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// A call of the protocol.
#[derive(Clone, Copy)]
struct Route {
    name: &'static str,
    /// Whether it runs the model, and so counts in the analysis of a canary.
    is_counted: bool,
}

/// The protocol over the revisions of a [`Gateway`].
pub struct Passing {
    gateway: Arc<Gateway>,
    ready: Readiness,
}

impl Passing {
    pub fn new(gateway: Arc<Gateway>, ready: Readiness) -> Self {
        Self { gateway, ready }
    }

    /// Passes one call on, with id, trace, retries and metrics.
    async fn pass_on<Q, A, F>(
        &self,
        route: Route,
        request: Request<Q>,
        call: impl Fn(GrpcInferenceServiceClient<Channel>, Request<Q>) -> F,
    ) -> (RequestId, Result<Forwarded<Result<Response<A>, Status>>, Status>)
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let started = Instant::now();
        let gateway = &self.gateway;
        let id = gateway.ids.generate();
        let (metadata, _, message) = request.into_parts();
        let incoming = metadata.into_headers();
        let shown = id.unproven();
        let span = tracing::info_span!("route", otel.name = route.name, otel.kind = "server", request_id = %shown);
        // Fails only when traces are off.
        let _ = span.set_parent(athanor_telemetry::propagation::extract(&incoming));
        let limits = gateway.limits();
        let result = async {
            if let Some(access) = &gateway.access {
                access.admit(&incoming, Scope::Infer).map_err(denied)?;
            }
            let snapshot = gateway.registry.snapshot();
            let target = target(&snapshot, &incoming, id.hash).map_err(|error| Status::not_found(error.message))?;
            check_port(&snapshot, &target)?;
            let passed = passed_on(&incoming, &id);
            let attempt = |endpoint: Arc<Endpoint>, adapter: Option<Arc<str>>| {
                let metadata = MetadataMap::from_headers(with_adapter(&passed, adapter.as_deref()));
                let request = Request::from_parts(metadata, Default::default(), message.clone());
                let answer = endpoint.channel().map(|channel| {
                    call(GrpcInferenceServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES), request)
                });
                async move {
                    match answer {
                        Some(answer) => outcome(&endpoint, answer.await),
                        None => Attempt::Unreached { failure: format!("{} has no gRPC port", endpoint.http) },
                    }
                }
            };
            let usable = |endpoint: &Endpoint| endpoint.grpc.is_some();
            let policy = Policy::new(&limits);
            let analysis = (route.is_counted && target.is_by_weight()).then_some(&*gateway.analysis);
            forward::forward(&gateway.registry, analysis, &target, policy, usable, attempt).await.map_err(status)
        };
        let result = result.instrument(span).await;
        let (revision, code) = match &result {
            Ok(forwarded) => {
                let code = forwarded.answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
                (forwarded.revision.to_string(), code)
            }
            Err(status) => (String::new(), status.code()),
        };
        metrics::histogram!("athanor_router_request_seconds", "revision" => revision.clone())
            .record(started.elapsed().as_secs_f64());
        let code = format!("{code:?}");
        metrics::counter!("athanor_router_requests_total", "revision" => revision, "code" => code, "route" => route.name)
            .increment(1);
        (id, result)
    }
}

/// Refuses a call that no server can take: those of other projects have no port for gRPC. Without any server a call waits
/// for one.
fn check_port(snapshot: &Snapshot, target: &Target) -> Result<(), Status> {
    let revisions = select::revisions(snapshot, target);
    let mut endpoints = revisions.iter().flat_map(|revision| &revision.endpoints).peekable();
    if endpoints.peek().is_some() && endpoints.all(|endpoint| endpoint.grpc.is_none()) {
        let message = "the servers of this deployment have no port for gRPC (spec.engine.container); use HTTP";
        return Err(Status::unimplemented(message));
    }
    Ok(())
}

fn denied(denied: Denied) -> Status {
    metrics::counter!("athanor_router_denied_total", "reason" => denied.reason()).increment(1);
    let message = denied.to_string();
    match denied {
        Denied::NoKey | Denied::UnknownKey => Status::unauthenticated(message),
        Denied::Scope { .. } => Status::permission_denied(message),
        Denied::Limit { .. } => Status::resource_exhausted(message),
    }
}

fn status(error: ForwardError) -> Status {
    let message = error.to_string();
    match error {
        ForwardError::NoEndpoint { .. } | ForwardError::Failed { .. } => Status::unavailable(message),
        ForwardError::Timeout { .. } => Status::deadline_exceeded(message),
    }
}

fn outcome<A>(endpoint: &Endpoint, answer: Result<Response<A>, Status>) -> Attempt<Result<Response<A>, Status>> {
    let Err(status) = &answer else { return Attempt::Answer { answer, ok: true } };
    // A status with a source was made on this side: the call did not get through, or its connection was lost.
    if status.source().is_some() {
        let failure = format!("{}: {}", endpoint.http, status.message());
        return if status.code() == Code::Unavailable {
            Attempt::Unreached { failure }
        } else {
            Attempt::Lost { failure }
        };
    }
    match status.code() {
        Code::ResourceExhausted => Attempt::Busy { answer },
        Code::Unavailable => Attempt::Unavailable { answer },
        Code::InvalidArgument
        | Code::NotFound
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::PermissionDenied
        | Code::Unauthenticated => Attempt::Refused { answer },
        Code::Internal | Code::Unknown | Code::DataLoss => Attempt::Answer { answer, ok: false },
        _ => Attempt::Answer { answer, ok: true },
    }
}

/// The server's answer with this router's id, and without what belongs to the connection to the server.
fn respond<A>(
    id: &str,
    forwarded: Result<Forwarded<Result<Response<A>, Status>>, Status>,
) -> Result<Response<A>, Status> {
    let Forwarded { answer, revision, .. } = match forwarded {
        Ok(forwarded) => forwarded,
        Err(mut status) => {
            label(status.metadata_mut(), id, "");
            return Err(status);
        }
    };
    match answer {
        Ok(response) => {
            let mut clean = Response::new(response.into_inner());
            label(clean.metadata_mut(), id, &revision);
            Ok(clean)
        }
        Err(status) => {
            let mut clean = Status::new(status.code(), status.message());
            for entry in status.metadata().iter() {
                if let KeyAndValueRef::Ascii(key, value) = entry
                    && key.as_str().starts_with("x-")
                {
                    clean.metadata_mut().insert(key.clone(), value.clone());
                }
            }
            label(clean.metadata_mut(), id, &revision);
            Err(clean)
        }
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Passing {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.ready.get() }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: "athanor-router".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: Vec::new(),
        }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let call =
            |mut client: GrpcInferenceServiceClient<Channel>, request| async move { client.model_ready(request).await };
        let (id, forwarded) = self.pass_on(Route { name: "ModelReady", is_counted: false }, request, call).await;
        respond(&id.unproven(), forwarded)
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let call = |mut client: GrpcInferenceServiceClient<Channel>, request| async move {
            client.model_metadata(request).await
        };
        let (id, forwarded) = self.pass_on(Route { name: "ModelMetadata", is_counted: false }, request, call).await;
        respond(&id.unproven(), forwarded)
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let recorded = self.gateway.records().map(|config| (config, request.get_ref().clone()));
        let call =
            |mut client: GrpcInferenceServiceClient<Channel>, request| async move { client.model_infer(request).await };
        let (id, forwarded) = self.pass_on(Route { name: "ModelInfer", is_counted: true }, request, call).await;
        let mut shown = id.unproven();
        if let Some((config, request)) = recorded
            && let Ok(forwarded) = &forwarded
            && let Ok(response) = &forwarded.answer
            && let Ok(texts) = tensors::decode_texts(&request)
            // A client that did not ask for label and score leaves nothing to record.
            && let Some(results) = tensors::decode_results(response.get_ref())
        {
            let (revision, latency) = (forwarded.revision.clone(), forwarded.latency);
            // There can be feedback to recorded answers only.
            let answered = Answered { id, revision, texts, results, latency };
            shown = self.gateway.record(&config, answered).await.unwrap_or(shown);
        }
        respond(&shown, forwarded)
    }
}
