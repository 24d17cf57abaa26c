//! The JSON API of `athanor-server`: OpenAI's shapes for classification.
//!
//! Each error has OpenAI's body and names the field; every answer, errors and unknown paths included, carries the request's id and
//! the revision. No authentication: that is the gateway's.

pub mod body;
mod error;
#[cfg(test)]
mod tests;
pub mod types;

use std::{sync::Arc, time::Instant};

use axum::{
    Json, Router,
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
use types::{ClassifyRequest, ClassifyResponse, ClassifyResult, LabelScore, Model, ModelList, Usage};

use crate::{
    api::{headers, observe},
    service::{Classified, Service},
};

/// The application: the API, and `ops` (`/metrics`, `/healthz`, `/readyz`) on the same port.
pub fn app(service: Arc<Service>, ops: Router) -> Router {
    Router::new()
        .route("/v1/classify", post(classify))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
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
    let mut response = if route == "/v1/classify" {
        let span = observe::classification(id.to_str().unwrap_or_default(), &service.revision, request.headers());
        let response = next.run(request).instrument(span.clone()).await;
        if response.status().is_server_error() {
            span.set_status(SpanStatus::error(response.status().to_string()));
        }
        response
    } else {
        next.run(request).await
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

async fn classify(State(service): State<Arc<Service>>, request: Request) -> Result<Json<ClassifyResponse>, ApiError> {
    let (parts, body) = request.into_parts();
    body::check_content_type(&parts.headers)?;
    let bytes = body::read(&parts.headers, body, service.limits.max_body_bytes).await?;
    let request: ClassifyRequest = body::parse(&bytes)?;
    service.check_model(request.model.as_deref())?;
    let classified = service.classify(request.input.0).await?;
    observe::classified(&classified);
    Ok(Json(response(&service, classified)))
}

fn response(service: &Service, classified: Classified) -> ClassifyResponse {
    let data = classified.results.into_iter().zip(0..).map(|(result, index)| ClassifyResult {
        index,
        label: service.labels[result.label].clone(),
        score: result.probabilities[result.label],
        probabilities: service
            .labels
            .iter()
            .zip(&result.probabilities)
            .map(|(label, score)| LabelScore { label: label.clone(), score: *score })
            .collect(),
    });
    ClassifyResponse {
        object: "list".into(),
        model: service.model_name.clone(),
        data: data.collect(),
        usage: Usage { prompt_tokens: classified.tokens, total_tokens: classified.tokens },
    }
}

fn describe(service: &Service) -> Model {
    Model {
        id: service.model_name.clone(),
        object: "model".into(),
        created: service.created,
        owned_by: "athanor".into(),
        labels: service.labels.clone(),
        max_model_len: service.limits.max_sequence_length,
    }
}

async fn models(State(service): State<Arc<Service>>) -> Json<ModelList> {
    Json(ModelList { object: "list".into(), data: vec![describe(&service)] })
}

async fn model(
    State(service): State<Arc<Service>>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Json<Model>, ApiError> {
    service.check_model(Some(&name))?;
    Ok(Json(describe(&service)))
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
