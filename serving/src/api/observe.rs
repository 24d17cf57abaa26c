//! The trace and the metrics of a request, the same for both protocols.

use std::time::Instant;

use axum::http::HeaderMap;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::service::Classified;

/// The span of one classification, as a child of the trace that `incoming` names.
pub fn classification(request_id: &str, revision: &str, incoming: &HeaderMap) -> Span {
    let span = tracing::info_span!(
        "classify",
        otel.kind = "server",
        request_id,
        revision,
        inputs = tracing::field::Empty,
        tokens = tracing::field::Empty,
        queue_ms = tracing::field::Empty,
        batch_ms = tracing::field::Empty,
        batch_inputs = tracing::field::Empty,
    );
    // Fails only when traces are off.
    let _ = span.set_parent(athanor_telemetry::propagation::extract(incoming));
    span
}

/// The span of a request to a language or embedding model, as a child of the trace that `incoming` names.
pub fn generation(route: &str, request_id: &str, revision: &str, incoming: &HeaderMap) -> Span {
    let span = tracing::info_span!("generate", otel.kind = "server", route, request_id, revision);
    // Fails only when traces are off.
    let _ = span.set_parent(athanor_telemetry::propagation::extract(incoming));
    span
}

/// Writes what the engine did into the current span.
pub fn classified(classified: &Classified) {
    let span = Span::current();
    span.record("inputs", classified.results.len());
    span.record("tokens", classified.tokens);
    span.record("queue_ms", classified.queued.as_secs_f64() * 1e3);
    span.record("batch_ms", classified.computed.as_secs_f64() * 1e3);
    span.record("batch_inputs", classified.batch_inputs);
}

/// Counts a request of `route` that ended with `code`.
pub fn counted(route: &str, code: String) {
    metrics::counter!("athanor_server_requests_total", "code" => code, "route" => route.to_owned()).increment(1);
}

/// Records the time since `started` as the duration of a request of `route`.
pub fn timed(route: &str, started: Instant) {
    metrics::histogram!("athanor_server_request_seconds", "route" => route.to_owned())
        .record(started.elapsed().as_secs_f64());
}
