//! `/metrics` and `/healthz` of a trainer.

use athanor_telemetry::{MetricsHandle, Readiness, ops_router};

/// Serves until the process ends. A port that is taken costs the metrics and a warning, not the run.
pub async fn serve(port: u16, metrics: MetricsHandle, ready: Readiness) {
    let result = async {
        let listener = tokio::net::TcpListener::bind(("0.0.0.0", port)).await?;
        axum::serve(listener, ops_router(metrics, ready)).await
    };
    if let Err(error) = result.await {
        tracing::warn!(port, %error, "metrics are not served");
    }
}
