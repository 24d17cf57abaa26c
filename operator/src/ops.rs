//! `/metrics`, `/healthz` and `/readyz` of the operator.

use std::time::Instant;

use athanor_telemetry::{MetricsHandle, Readiness};
use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};

use crate::{lease::Leadership, liveness::Liveness, object_metrics, stores::Stores};

/// What the routes report on.
pub struct Ops {
    pub metrics: MetricsHandle,
    pub ready: Readiness,
    pub liveness: Liveness,
    pub leadership: Leadership,
    pub stores: Stores,
}

/// Returns the routes. `/healthz` answers 503 with the name of a loop that makes no progress. `/metrics` has the metrics of
/// objects in the leader only: the caches of other processes are empty.
pub fn router(ops: Ops) -> Router {
    let Ops { metrics, ready, liveness, leadership, stores } = ops;
    let recorded = metrics.clone();
    let scrape = get(async move || {
        let objects = object_metrics::render(&stores, leadership.is_held());
        let text = format!("{}{objects}", recorded.render());
        ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
    });
    let healthz = get(async move || match liveness.stalled(Instant::now()) {
        None => (StatusCode::OK, "ok\n").into_response(),
        Some(stalled) => {
            let reason = format!("{} has made no progress for {} s", stalled.name, stalled.silent.as_secs());
            tracing::error!(reason, "this process is not healthy");
            (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response()
        }
    });
    let rest = athanor_telemetry::ops_router(metrics, ready);
    Router::new().route("/metrics", scrape).route("/healthz", healthz).fallback_service(rest)
}

#[cfg(test)]
#[path = "ops_tests.rs"]
mod tests;
