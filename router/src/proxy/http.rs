//! The router's HTTP API: `/v1/classify` and `/v1/models` passed on to a revision, `/v1/feedback` answered here; `/analysis` and the
//! usual on the ops port.

use std::{sync::Arc, time::Instant};

use athanor_contract::process::path;
use athanor_serving::api::{
    headers,
    openai::{
        ApiError, body, method_not_allowed, not_found,
        types::{ClassifyRequest, ClassifyResponse},
    },
};
use axum::{
    Json, Router,
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri,
        header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE},
        request::Parts,
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use opentelemetry::trace::Status as SpanStatus;
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::{
    balance::{
        client::ClientError,
        endpoints::{Endpoint, Snapshot},
        forward::{self, Attempt, ForwardError, Forwarded, Policy},
        select::Target,
    },
    gateway::{Answered, Gateway},
    record::{
        feedback::{self, Accepted, Items},
        request_id::RequestId,
    },
};

/// The most that an answer of a server may hold.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Headers that belong to one connection, and those that the client library writes itself.
const NOT_PASSED_ON: [HeaderName; 8] =
    [CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];

/// The revision that answered, for the metrics around.
#[derive(Clone)]
struct AnsweredBy(Arc<str>);

/// The application on the HTTP port.
pub fn app(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/classify", post(classify))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(models))
        .route("/v1/feedback", post(accept_feedback))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(gateway.clone())
        .layer(middleware::from_fn_with_state(gateway, around))
}

/// `GET /analysis` for the ops port.
pub fn analysis(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route(path::ANALYSIS, get(async |State(gateway): State<Arc<Gateway>>| Json(gateway.analysis.read())))
        .with_state(gateway)
}

/// A new request id, the trace and metrics around every request.
async fn around(State(gateway): State<Arc<Gateway>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let route = request.extensions().get::<MatchedPath>().map_or("other", |path| path.as_str()).to_owned();
    // A client's own id would not verify, and a repeated one would hide an event: it is only logged.
    let client_id = request.headers().get(headers::REQUEST_ID).and_then(|id| id.to_str().ok()).map(str::to_owned);
    let id = gateway.ids.generate();
    let span = tracing::info_span!(
        "route",
        otel.name = %route,
        otel.kind = "server",
        request_id = %id.text,
        client_request_id = client_id,
        revision = tracing::field::Empty,
    );
    // Fails only when traces are off.
    let _ = span.set_parent(athanor_telemetry::propagation::extract(request.headers()));
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).instrument(span.clone()).await;
    let revision = response.extensions().get::<AnsweredBy>().map(|by| by.0.to_string()).unwrap_or_default();
    span.record("revision", &revision);
    if response.status().is_server_error() {
        span.set_status(SpanStatus::error(response.status().to_string()));
        tracing::warn!(parent: &span, status = response.status().as_u16(), route, "a request failed");
    }
    let code = response.status().as_str().to_owned();
    if route == "/v1/feedback" {
        metrics::counter!("athanor_router_feedback_total", "code" => code.clone()).increment(1);
    }
    metrics::histogram!("athanor_router_request_seconds", "revision" => revision.clone())
        .record(started.elapsed().as_secs_f64());
    metrics::counter!("athanor_router_requests_total", "revision" => revision, "code" => code, "route" => route)
        .increment(1);
    response.headers_mut().insert(headers::REQUEST_ID, headers::text(&id.text));
    response
}

async fn classify(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let answer = async {
        body::check_content_type(&parts.headers)?;
        let body = body::read(&parts.headers, body, gateway.limits().max_body_bytes).await?;
        let id = id(&parts)?;
        let forwarded = pass_on(&gateway, &parts, &id, body.clone()).await?;
        Ok::<_, ApiErrorOf>((id, body, forwarded))
    };
    let (id, body, forwarded) = match answer.await {
        Ok(answered) => answered,
        Err(error) => return error.into_response(),
    };
    if forwarded.answer.status() == StatusCode::OK
        && let Some(config) = gateway.records()
    {
        match (
            body::parse::<ClassifyRequest>(&body),
            serde_json::from_slice::<ClassifyResponse>(forwarded.answer.body()),
        ) {
            (Ok(request), Ok(response)) => {
                let answered = Answered {
                    id,
                    revision: forwarded.revision.clone(),
                    texts: request.input.0,
                    results: response.data.into_iter().map(|result| (result.label, result.score)).collect(),
                    latency: forwarded.latency,
                };
                gateway.record(&config, answered);
            }
            (request, response) => {
                let error = request.err().map(|error| error.message).or(response.err().map(|error| error.to_string()));
                tracing::warn!(error, revision = &*forwarded.revision, "an answer cannot be read and is not recorded");
            }
        }
    }
    respond(forwarded)
}

async fn models(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    let (parts, _) = request.into_parts();
    let answer = async { pass_on(&gateway, &parts, &id(&parts)?, Bytes::new()).await };
    answer.await.map_or_else(IntoResponse::into_response, respond)
}

async fn accept_feedback(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Result<(StatusCode, Json<Accepted>), ApiError> {
    let (parts, body) = request.into_parts();
    body::check_content_type(&parts.headers)?;
    let bytes = body::read(&parts.headers, body, gateway.limits().max_body_bytes).await?;
    let items: Items = body::parse(&bytes)?;
    Ok((StatusCode::ACCEPTED, Json(feedback::accept(&gateway, items).await?)))
}

/// An error with the revision it is about, if there is one.
struct ApiErrorOf {
    error: ApiError,
    revision: Option<Arc<str>>,
}

impl From<ApiError> for ApiErrorOf {
    fn from(error: ApiError) -> Self {
        Self { error, revision: None }
    }
}

impl IntoResponse for ApiErrorOf {
    fn into_response(self) -> Response {
        let response = self.error.into_response();
        match self.revision {
            Some(revision) => by(response, revision),
            None => response,
        }
    }
}

impl From<ForwardError> for ApiErrorOf {
    fn from(error: ForwardError) -> Self {
        let message = error.to_string();
        let revision = Some(error.revision()).filter(|name| !name.is_empty()).map(Arc::from);
        let error = match error {
            ForwardError::NoEndpoint { .. } => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_endpoint", message),
            ForwardError::Failed { .. } => ApiError::new(StatusCode::BAD_GATEWAY, "no_answer", message),
            ForwardError::Timeout { .. } => ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message),
        };
        Self { error, revision }
    }
}

fn by(mut response: Response, revision: Arc<str>) -> Response {
    response.headers_mut().insert(headers::REVISION, headers::text(&revision));
    response.extensions_mut().insert(AnsweredBy(revision));
    response
}

fn id(parts: &Parts) -> Result<RequestId, ApiError> {
    let missing = || ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "no_request_id", "the request was given no id");
    parts.extensions.get::<RequestId>().cloned().ok_or_else(missing)
}

/// By weight, or the revision that `x-athanor-revision` names.
pub fn target(snapshot: &Snapshot, headers: &HeaderMap, hash: u64) -> Result<Target, ApiError> {
    let Some(pinned) = headers.get(headers::REVISION) else { return Ok(Target::Weighted(hash)) };
    let name = String::from_utf8_lossy(pinned.as_bytes()).into_owned();
    if snapshot.revision(&name).is_some() {
        return Ok(Target::Pinned(name));
    }
    let known =
        snapshot.revisions.iter().map(|revision| format!("{:?}", &*revision.name)).collect::<Vec<_>>().join(", ");
    let shown: String = name.chars().take(80).collect();
    let message = format!("there is no revision {shown:?}; the revisions are {known}");
    Err(ApiError::new(StatusCode::NOT_FOUND, "revision_not_found", message).param(headers::REVISION.as_str()))
}

async fn pass_on(
    gateway: &Gateway,
    parts: &Parts,
    id: &RequestId,
    body: Bytes,
) -> Result<Forwarded<axum::http::Response<Bytes>>, ApiErrorOf> {
    let target = target(&gateway.registry.snapshot(), &parts.headers, id.hash)?;
    let passed = passed_on(&parts.headers, id);
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let attempt = |endpoint: Arc<Endpoint>| {
        let request = request(&endpoint, parts.method.clone(), path, passed.clone(), body.clone());
        async move {
            let request = match request {
                Ok(request) => request,
                Err(error) => return Attempt::Lost { failure: format!("{path} cannot be passed on: {error}") },
            };
            classify_outcome(&endpoint, gateway.client.send(request, MAX_ANSWER_BYTES).await)
        }
    };
    let policy = Policy::new(&gateway.limits());
    Ok(forward::forward(&gateway.registry, &gateway.analysis, &target, policy, |_| true, attempt).await?)
}

fn classify_outcome(
    endpoint: &Endpoint,
    outcome: Result<axum::http::Response<Bytes>, ClientError>,
) -> Attempt<axum::http::Response<Bytes>> {
    match outcome {
        Ok(answer) => match answer.status() {
            StatusCode::TOO_MANY_REQUESTS => Attempt::Busy { answer },
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                Attempt::Unavailable { answer }
            }
            status => Attempt::Answer { answer, ok: !status.is_server_error() },
        },
        Err(ClientError::Connect(error)) => Attempt::Unreached { failure: format!("{}: {error}", endpoint.http) },
        Err(ClientError::Lost(error)) => Attempt::Lost { failure: format!("{}: {error}", endpoint.http) },
    }
}

/// The headers for a server: the client's, with our id and the current trace.
fn passed_on(incoming: &HeaderMap, id: &RequestId) -> HeaderMap {
    let mut passed = HeaderMap::with_capacity(incoming.len() + 2);
    for (name, value) in incoming {
        if !NOT_PASSED_ON.contains(name) && *name != headers::REVISION && !name.as_str().starts_with("proxy-") {
            passed.append(name.clone(), value.clone());
        }
    }
    passed.insert(headers::REQUEST_ID, headers::text(&id.text));
    athanor_telemetry::propagation::inject_current(&mut passed);
    passed
}

fn request(
    endpoint: &Endpoint,
    method: Method,
    path: &str,
    headers: HeaderMap,
    body: Bytes,
) -> Result<axum::http::Request<Body>, axum::http::Error> {
    let uri: Uri = format!("http://{}{path}", endpoint.http).parse()?;
    let mut request = axum::http::Request::builder().method(method).uri(uri).body(Body::from(body))?;
    *request.headers_mut() = headers;
    Ok(request)
}

/// The server's answer, to the client.
fn respond(forwarded: Forwarded<axum::http::Response<Bytes>>) -> Response {
    let (mut parts, body) = forwarded.answer.into_parts();
    for name in NOT_PASSED_ON {
        parts.headers.remove(name);
    }
    parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    by(Response::from_parts(parts, Body::from(body)), forwarded.revision)
}
