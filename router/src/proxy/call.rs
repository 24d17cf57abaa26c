//! One call of the Open Inference Protocol to a revision's server: access, id, trace, retries, metrics, and the record of its answer.

use std::{
    error::Error as _,
    sync::Arc,
    time::{Duration, Instant},
};

use athanor_contract::{
    event::TokenUsage,
    process::{failure, header},
    serve::Scope,
};
use athanor_serving::api::inference::{
    contents,
    generation::{self, Ending},
    protocol::{ModelInferRequest, ModelInferResponse, grpc_inference_service_client::GrpcInferenceServiceClient},
    tensors,
};
use axum::http::HeaderMap;
use bytes::Bytes;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap, transport::Channel};
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::pass::{passed_on, target, with_adapter};
use crate::{
    access::{Caller, Denied, Meter},
    analysis::Answer as Worth,
    balance::{
        endpoints::{Endpoint, Snapshot},
        forward::{self, Attempt, ForwardError, Forwarded, Policy},
        select::{self, Target},
    },
    config::Configuration,
    gateway::{Answered, Gateway},
    record::{
        generation::{Answers, Recorder},
        request_id::RequestId,
    },
};

/// The most that an answer of a server may hold.
const MAX_ANSWER_BYTES: usize = 64 << 20;

pub type Client = GrpcInferenceServiceClient<Channel>;

/// A call of the protocol.
#[derive(Clone, Copy)]
pub struct Route {
    pub name: &'static str,
    /// Whether it runs the model, and so counts in the analysis of a canary.
    pub is_counted: bool,
    pub policy: Policy,
    /// Whether the request's model selects an adapter, which answers instead of the revision.
    pub selects: bool,
    /// Whether a language model answers it.
    pub is_generation: bool,
}

/// A call that has an answer, or none.
pub struct Passed<A> {
    pub id: RequestId,
    /// Absent: the router asks nobody, or the caller was refused.
    pub caller: Option<Arc<Caller>>,
    /// Whether the revision was chosen by weight.
    pub is_by_weight: bool,
    pub result: Result<Forwarded<Result<Response<A>, Status>>, Status>,
}

/// Passes one call on, with id, trace, retries and metrics. `incoming`: the client's metadata.
pub async fn pass_on<Q, A, F>(
    gateway: &Gateway,
    route: Route,
    incoming: &HeaderMap,
    message: Q,
    call: impl Fn(Client, Request<Q>) -> F,
) -> Passed<A>
where
    Q: Clone,
    F: Future<Output = Result<Response<A>, Status>>,
{
    let started = Instant::now();
    let id = gateway.ids.generate();
    let shown = id.unproven();
    let span = tracing::info_span!("route", otel.name = route.name, otel.kind = "server", request_id = %shown);
    // Fails only when traces are off.
    let _ = span.set_parent(athanor_telemetry::propagation::extract(incoming));
    let (mut caller, mut is_by_weight) = (None, false);
    let result = async {
        if let Some(access) = &gateway.access {
            caller = Some(access.admit(incoming, Scope::Infer).map_err(denied)?);
        }
        let snapshot = gateway.registry.snapshot();
        let target = target(&snapshot, incoming, id.hash).map_err(|error| Status::not_found(error.message))?;
        check_port(&snapshot, &target)?;
        is_by_weight = target.is_by_weight() && !route.selects;
        let passed = passed_on(incoming, &id);
        let attempt = |endpoint: Arc<Endpoint>, adapter: Option<Arc<str>>| {
            // The metadata would win over the name of the model.
            let adapter = adapter.filter(|_| !route.selects);
            let metadata = MetadataMap::from_headers(with_adapter(&passed, adapter.as_deref()));
            let request = Request::from_parts(metadata, Default::default(), message.clone());
            let answer = endpoint
                .channel()
                .map(|channel| call(Client::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES), request));
            async move {
                match answer {
                    Some(answer) => match answer.await {
                        Err(status) if lacks(&status, adapter.as_deref(), route.selects) => {
                            Attempt::Lacking { answer: Err(status) }
                        }
                        answer => outcome(&endpoint, answer),
                    },
                    None => Attempt::Unreached { failure: format!("{} has no gRPC port", endpoint.http) },
                }
            }
        };
        let usable = |endpoint: &Endpoint| endpoint.grpc.is_some();
        let analysis = (route.is_counted && is_by_weight).then_some(&*gateway.analysis);
        forward::forward(&gateway.registry, analysis, &target, route.policy, usable, attempt).await.map_err(status)
    };
    let result = result.instrument(span).await;
    let (revision, code) = match &result {
        Ok(forwarded) => {
            let code = forwarded.answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
            (forwarded.revision.to_string(), code)
        }
        Err(status) => (String::new(), status.code()),
    };
    record_latency(&revision, route.is_generation, started);
    let code = format!("{code:?}");
    metrics::counter!("athanor_router_requests_total", "revision" => revision, "code" => code, "route" => route.name)
        .increment(1);
    Passed { id, caller, is_by_weight, result }
}

/// Records how long a request took. Those of language models are apart, since their time depends on the length of the answer.
pub fn record_latency(revision: &str, is_generation: bool, started: Instant) {
    let kind = if is_generation { "generation" } else { "other" };
    metrics::histogram!("athanor_router_request_seconds", "revision" => revision.to_owned(), "kind" => kind)
        .record(started.elapsed().as_secs_f64());
}

/// Returns whether a server has answered that it does not have an adapter; another may have it already.
fn lacks(status: &Status, adapter: Option<&str>, selects: bool) -> bool {
    let by = status.metadata().get(header::REVISION).map(|name| name.as_bytes());
    let is_anothers = adapter.zip(by).is_some_and(|(adapter, by)| by != adapter.as_bytes());
    status.code() == Code::NotFound && (selects || is_anothers)
}

/// Returns whether the model that a request names is an adapter that clients select.
pub fn selects_adapter(gateway: &Gateway, request: &ModelInferRequest) -> bool {
    let config = gateway.registry.snapshot().config.clone();
    config.is_some_and(|config| config.adapters.contains(&request.model_name))
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

pub fn denied(denied: Denied) -> Status {
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
        ForwardError::Overloaded { .. } | ForwardError::Full { .. } => Status::resource_exhausted(message),
    }
}

fn outcome<A>(endpoint: &Endpoint, answer: Result<Response<A>, Status>) -> Attempt<Result<Response<A>, Status>> {
    let Err(status) = &answer else { return Attempt::Answer { answer, worth: Worth::Good } };
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
        Code::ResourceExhausted => Attempt::Busy { answer, retry_after: None },
        Code::Unavailable => Attempt::Unavailable { answer },
        Code::InvalidArgument
        | Code::NotFound
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::PermissionDenied
        | Code::Unauthenticated => Attempt::Refused { answer },
        // DeadlineExceeded: an answer of a language model took longer than the server lets it.
        Code::Internal | Code::Unknown | Code::DataLoss | Code::DeadlineExceeded => {
            let why = status.metadata().get(header::FAILURE).map(|why| why.as_bytes());
            let is_not_finite = why == Some(failure::NOT_FINITE.as_bytes());
            let worth = if is_not_finite { Worth::NotFinite } else { Worth::Failed };
            Attempt::Answer { answer, worth }
        }
        _ => Attempt::Answer { answer, worth: Worth::Good },
    }
}

/// The bounds of a request: a language model may take as long as an answer may.
pub fn policy(gateway: &Gateway, request: &ModelInferRequest) -> Policy {
    match generation::is_generation(request) {
        true => Policy::generation(&gateway.limits()),
        false => Policy::new(&gateway.limits()),
    }
}

/// Counts the tokens of a caller with a limit.
pub fn meter(caller: Option<&Arc<Caller>>, request: &ModelInferRequest) -> Option<Meter> {
    Meter::of(caller, contents::bytes(request))
}

/// Records a classification; returns the id by which feedback to it is accepted. `None`: there is nothing to record, as of an
/// answer of another model or without label and score.
pub async fn record_classification(
    gateway: &Gateway,
    config: &Configuration,
    request: &ModelInferRequest,
    response: &ModelInferResponse,
    (id, revision, latency): (RequestId, &Arc<str>, Duration),
) -> Option<String> {
    let texts = tensors::decode_texts(request).ok()?;
    let results = tensors::decode_results(response)?;
    gateway.record(config, Answered { id, revision: revision.clone(), texts, results, latency }).await
}

/// A recorder of a language model's answer, if answers are recorded.
pub fn recorder(gateway: &Gateway, request: &ModelInferRequest, id: RequestId) -> Option<Recorder> {
    let config = gateway.records()?;
    let question = generation::question(request)?;
    Some(Recorder {
        config,
        id,
        request_id: gateway.ids.prove(id, 1),
        request: Bytes::from(question.to_string()),
        answers: Answers::default(),
        trace_parent: athanor_telemetry::propagation::current_traceparent(),
    })
}

/// Takes a response, or the next one of a stream, into the record.
pub fn take(recorder: &mut Recorder, response: &ModelInferResponse) {
    let Some((text, ending)) = generation::decode(response) else { return };
    let end = ending.map(|ending| {
        let Ending { finish_reason, prompt_tokens, completion_tokens } = ending;
        (finish_reason, TokenUsage { prompt_tokens, completion_tokens })
    });
    recorder.answers.text(&text, end);
}
