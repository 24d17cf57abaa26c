//! The JSON API of `athanor-server` in OpenAI's shapes: classification, embeddings, chat and text completions.
//!
//! Each error has OpenAI's body and names the field; every answer, errors and unknown paths included, carries the request's id and
//! the revision. No authentication: that is the gateway's.

pub mod body;
mod chat;
mod classify;
mod completions;
mod embeddings;
mod error;
mod fields;
#[cfg(test)]
mod generate_tests;
mod models;
mod options;
mod sse;
#[cfg(test)]
mod tests;
pub mod types;
mod usage;

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use opentelemetry::trace::Status as SpanStatus;
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

pub use error::{ApiError, ErrorBody, ErrorDetail};

use crate::{
    api::{headers, observe},
    service::Service,
};

/// The application: the API, and `ops` (`/metrics`, `/healthz`, `/readyz`) on the same port. The routes of models of
/// another kind answer which ones this model has.
pub fn app(service: Arc<Service>, ops: Router) -> Router {
    Router::new()
        .route("/v1/classify", post(classify::classify))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models::models))
        .route("/v1/models/{model}", get(models::model))
        .with_state(service.clone())
        .merge(ops)
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(service, around))
}

/// Ids, metrics and the trace around every request.
async fn around(State(service): State<Arc<Service>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let route = request.extensions().get::<MatchedPath>().map_or("other", |path| path.as_str()).to_owned();
    let id = headers::request_id(request.headers());
    request.headers_mut().insert(headers::REQUEST_ID, id.clone());
    let (text, revision) = (id.to_str().unwrap_or_default(), &service.revision);
    let span = match route.as_str() {
        "/v1/classify" => Some(observe::classification(text, revision, request.headers())),
        "/v1/embeddings" | "/v1/chat/completions" | "/v1/completions" => {
            Some(observe::generation(&route, text, revision, request.headers()))
        }
        _ => None,
    };
    let mut response = match span {
        Some(span) => {
            let response = next.run(request).instrument(span.clone()).await;
            if response.status().is_server_error() {
                span.set_status(SpanStatus::error(response.status().to_string()));
            }
            response
        }
        None => next.run(request).await,
    };
    let code = response.status().as_str().to_owned();
    if route.starts_with("/v1/") || route == "other" {
        observe::timed(&route, started);
    }
    observe::counted(&route, code);
    response.headers_mut().insert(headers::REQUEST_ID, id);
    response.headers_mut().insert(headers::REVISION, headers::text(&service.revision));
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
