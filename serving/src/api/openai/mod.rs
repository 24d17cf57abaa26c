//! The JSON API of `athanor-server` in OpenAI's shapes: classification, embeddings, reranking, chat and text completions, responses,
//! tokenization.
//!
//! Each error has OpenAI's body and names the field; every answer, errors and unknown paths included, carries the request's id and
//! the revision. No authentication: that is the gateway's.

#[cfg(test)]
mod adapters_tests;
pub mod body;
pub(in crate::api) mod chat;
mod classify;
mod completions;
#[cfg(test)]
mod completions_tests;
mod content;
mod embeddings;
pub(in crate::api) mod error;
pub(in crate::api) mod fields;
#[cfg(test)]
mod generate_tests;
mod logprobs;
mod models;
pub mod openapi;
#[cfg(test)]
mod openapi_tests;
pub(in crate::api) mod options;
pub mod paths;
mod rerank;
pub mod responses;
#[cfg(test)]
mod responses_tests;
mod sse;
mod structure;
#[cfg(test)]
mod structure_tests;
#[cfg(test)]
mod tests;
mod tokenize;
#[cfg(test)]
mod tokenize_tests;
pub mod types;
pub(in crate::api) mod usage;

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{HeaderValue, StatusCode},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use opentelemetry::trace::Status as SpanStatus;
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

pub use error::{ApiError, ErrorBody, ErrorDetail};

use crate::{
    api::{headers, observe},
    engine::generate::Adapter,
    service::Service,
};

/// The application: the API, and `ops` (`/metrics`, `/healthz`, `/readyz`, `/health`) on the same port. The routes of models of
/// another kind answer which ones this model has.
pub fn app(service: Arc<Service>, ops: Router) -> Router {
    let routes = routes().into_iter().fold(Router::new(), |router, (path, handler)| router.route(path, handler));
    routes
        .with_state(service.clone())
        .merge(ops)
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(service, around))
}

/// Paths and handlers of the API. `openapi` describes the same paths.
fn routes() -> Vec<(&'static str, MethodRouter<Arc<Service>>)> {
    vec![
        (paths::CLASSIFY, post(classify::classify)),
        (paths::EMBEDDINGS, post(embeddings::embeddings)),
        (paths::RERANK, post(rerank::rerank)),
        (paths::CHAT, post(chat::chat)),
        (paths::COMPLETIONS, post(completions::completions)),
        (paths::RESPONSES, post(responses::responses)),
        (paths::TOKENIZE, post(tokenize::tokenize)),
        (paths::DETOKENIZE, post(tokenize::detokenize)),
        (paths::MODELS, get(models::models)),
        (paths::MODEL, get(models::model)),
        (paths::OPENAPI, get(openapi::openapi)),
    ]
}

/// Ids, metrics and the trace around every request.
async fn around(State(service): State<Arc<Service>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let route = request.extensions().get::<MatchedPath>().map_or("other", |path| path.as_str()).to_owned();
    let id = headers::request_id(request.headers());
    request.headers_mut().insert(headers::REQUEST_ID, id.clone());
    let adapter = match chosen_adapter(&service, &request, &route) {
        Ok(adapter) => adapter,
        Err(error) => return answered(error.into_response(), (route.as_str(), started), id, &service.revision),
    };
    let revision = adapter.as_ref().map_or(service.revision.clone(), |adapter| adapter.name().to_string());
    if let Some(adapter) = adapter {
        request.extensions_mut().insert(adapter);
    }
    let text = id.to_str().unwrap_or_default();
    let span = match route.as_str() {
        paths::CLASSIFY => Some(observe::classification(text, &revision, request.headers())),
        paths::EMBEDDINGS | paths::RERANK | paths::CHAT | paths::COMPLETIONS | paths::RESPONSES => {
            Some(observe::generation(&route, text, &revision, request.headers()))
        }
        _ => None,
    };
    let response = match span {
        Some(span) => {
            let response = next.run(request).instrument(span.clone()).await;
            if response.status().is_server_error() {
                span.set_status(SpanStatus::error(response.status().to_string()));
            }
            response
        }
        None => next.run(request).await,
    };
    answered(response, (route.as_str(), started), id, &revision)
}

/// The adapter that a request's header names.
fn chosen_adapter(service: &Service, request: &Request, route: &str) -> Result<Option<Adapter>, ApiError> {
    let Some(name) = request.headers().get(headers::ADAPTER).filter(|_| route.starts_with("/v1/")) else {
        return Ok(None);
    };
    service.adapter(name.to_str().unwrap_or_default()).map(Some).ok_or_else(|| {
        let message = format!("{}: there is no adapter {name:?} here", headers::ADAPTER);
        ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message)
    })
}

/// Measures an answer and adds the headers that each has.
fn answered(mut response: Response, (route, started): (&str, Instant), id: HeaderValue, revision: &str) -> Response {
    let code = response.status().as_str().to_owned();
    if route.starts_with("/v1/") || route == "other" {
        observe::timed(route, started);
    }
    observe::counted(route, code);
    response.headers_mut().insert(headers::REQUEST_ID, id);
    response.headers_mut().insert(headers::REVISION, headers::text(revision));
    response
}

/// The answer to a path that is not served.
pub async fn not_found(request: Request) -> Response {
    let message = format!("there is no {}", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "path_not_found", message).into_response()
}

/// The answer to a method that a path does not take.
pub async fn method_not_allowed(request: Request) -> Response {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message).into_response()
}
