//! The router's HTTP API: the routes of classifiers, those of language and embedding models ([`super::generation`]) and those that
//! run no model (`/v1/models`, `/v1/tokenize`, `/v1/detokenize`, `/openapi.json`) passed on to a revision; `/v1/feedback` and the
//! playground answered here; `/analysis` and the usual on the ops port.

use std::{sync::Arc, time::Instant};

use athanor_contract::{process::path, serve::Scope};
use athanor_serving::api::{
    headers,
    openai::{
        ApiError, body, method_not_allowed, not_found, paths,
        types::{ClassifyRequest, ClassifyResponse},
    },
};
use axum::{
    Json, Router,
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderValue, StatusCode, header::CONTENT_LENGTH},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use bytes::Bytes;
use opentelemetry::trace::Status as SpanStatus;
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::{
    call, generation,
    pass::{self, AdmittedCaller, AnsweredBy, ApiErrorOf, ProvenId, Way},
};
use crate::{
    access::Meter,
    balance::forward::{Forwarded, Policy},
    gateway::{Answered, Gateway},
    playground,
    record::feedback::{self, Accepted, Items},
};

/// The most that an answer of a server may hold.
const MAX_ANSWER_BYTES: usize = 64 << 20;

const FEEDBACK: &str = "/v1/feedback";

/// The application on the HTTP port.
pub fn app(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route(paths::CLASSIFY, post(classify))
        .route(paths::CHAT, post(generation::pass))
        .route(paths::COMPLETIONS, post(generation::pass))
        .route(paths::RESPONSES, post(generation::pass))
        .route(paths::EMBEDDINGS, post(generation::pass))
        .route(paths::RERANK, post(generation::pass))
        .route(paths::TOKENIZE, post(plain))
        .route(paths::DETOKENIZE, post(plain))
        .route(paths::MODELS, get(plain))
        .route(paths::MODEL, get(plain))
        .route(paths::OPENAPI, get(plain))
        .route(FEEDBACK, post(accept_feedback))
        .route(playground::PATH, any(playground::page))
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
    let shown = id.unproven();
    let span = tracing::info_span!(
        "route",
        otel.name = %route,
        otel.kind = "server",
        request_id = %shown,
        client_request_id = client_id,
        caller = tracing::field::Empty,
        revision = tracing::field::Empty,
    );
    // Fails only when traces are off.
    let _ = span.set_parent(athanor_telemetry::propagation::extract(request.headers()));
    request.extensions_mut().insert(id);
    let scope = if route == FEEDBACK { Scope::Feedback } else { Scope::Infer };
    // The page is the same for everyone. Its requests have a key.
    let is_open = route == playground::PATH && playground::is_on(&gateway);
    let access = gateway.access.as_ref().filter(|_| !is_open);
    let admitted = access.map(|access| access.admit(request.headers(), scope)).transpose();
    let mut response = match admitted {
        Ok(caller) => {
            span.record("caller", caller.as_ref().map(|caller| &*caller.name));
            request.extensions_mut().insert(AdmittedCaller(caller));
            next.run(request).instrument(span.clone()).await
        }
        Err(denied) => {
            tracing::debug!(parent: &span, %denied, "a request was not let in");
            metrics::counter!("athanor_router_denied_total", "reason" => denied.reason()).increment(1);
            denied.into_response()
        }
    };
    let revision = response.extensions().get::<AnsweredBy>().map(|by| by.0.to_string()).unwrap_or_default();
    span.record("revision", &revision);
    if response.status().is_server_error() {
        span.set_status(SpanStatus::error(response.status().to_string()));
        tracing::warn!(parent: &span, status = response.status().as_u16(), route, "a request failed");
    }
    let code = response.status().as_str().to_owned();
    if route == FEEDBACK {
        metrics::counter!("athanor_router_feedback_total", "code" => code.clone()).increment(1);
    }
    call::record_latency(&revision, generation::GENERATING.contains(&&*route), started);
    metrics::counter!("athanor_router_requests_total", "revision" => revision, "code" => code, "route" => route)
        .increment(1);
    // Whoever has a proven id can give feedback, so only an answer comes with one.
    let shown = response.extensions().get::<ProvenId>().map_or(shown, |proven| proven.0.clone());
    response.headers_mut().insert(headers::REQUEST_ID, headers::text(&shown));
    response
}

async fn classify(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let answer = async {
        body::check_content_type(&parts.headers)?;
        let body = body::read(&parts.headers, body, gateway.limits().max_body_bytes).await?;
        let id = pass::id(&parts)?;
        let way = Way { policy: Policy::new(&gateway.limits()), is_counted: true, selects: false };
        let send = |request| gateway.client.send(request, MAX_ANSWER_BYTES, &gateway.capacity);
        let forwarded = pass::pass_on(&gateway, &parts, &id, &body, way, send).await?;
        Ok::<_, ApiErrorOf>((id, body, forwarded))
    };
    let (id, body, forwarded) = match answer.await {
        Ok(answered) => answered,
        Err(error) => return error.into_response(),
    };
    if forwarded.answer.status().is_success()
        && let Some(mut meter) = Meter::of(pass::caller(&parts), body.len())
    {
        meter.piece(forwarded.answer.body());
    }
    let mut proven = None;
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
                proven = gateway.record(&config, answered).await;
            }
            (request, response) => {
                let error = request.err().map(|error| error.message).or(response.err().map(|error| error.to_string()));
                tracing::warn!(error, revision = &*forwarded.revision, "an answer cannot be read and is not recorded");
            }
        }
    }
    let mut response = respond(forwarded);
    if let Some(proven) = proven {
        response.extensions_mut().insert(ProvenId(proven));
    }
    response
}

/// Passes on what runs no model, and so does not count in the analysis of a canary.
async fn plain(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let answer = async {
        let limits = gateway.limits();
        let body = body::read(&parts.headers, body, limits.max_body_bytes).await?;
        let selects = pass::selects_adapter(&gateway, &body);
        let way = Way { policy: Policy::new(&limits), is_counted: false, selects };
        let send = |request| gateway.client.send(request, MAX_ANSWER_BYTES, &gateway.capacity);
        pass::pass_on(&gateway, &parts, &pass::id(&parts)?, &body, way, send).await
    };
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
    let caller = pass::caller(&parts).map(|caller| caller.name.clone());
    Ok((StatusCode::ACCEPTED, Json(feedback::accept(&gateway, items, caller.as_deref()).await?)))
}

/// The server's answer, to the client.
fn respond(forwarded: Forwarded<axum::http::Response<Bytes>>) -> Response {
    let (mut parts, body) = forwarded.answer.into_parts();
    pass::clean(&mut parts.headers);
    parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    pass::by(Response::from_parts(parts, Body::from(body)), forwarded.revision)
}
