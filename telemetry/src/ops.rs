//! `/metrics`, `/healthz`, `/readyz` and `/health`.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Router, extract::State, http::StatusCode, http::header::CONTENT_TYPE, response::IntoResponse, routing::get,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::sync::watch;

use crate::info;

/// Seconds, from a fast encoder call to a slow drain.
const SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Seconds of a whole answer and of each of its tokens, as OpenTelemetry's conventions for generative AI advise.
const ANSWER_SECONDS: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const TOKEN_SECONDS: &[f64] = &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// Between two counts of what histograms were given.
const UPKEEP: Duration = Duration::from_secs(5);
/// Counts of things in a batch.
const INPUTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Tokens of a request, as OpenTelemetry's conventions for generative AI advise.
const TOKENS: &[f64] = &[1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0, 1_048_576.0];

/// Renders what the `metrics` macros recorded.
#[derive(Clone)]
pub struct MetricsHandle(PrometheusHandle);

impl MetricsHandle {
    /// Prometheus text format.
    pub fn render(&self) -> String {
        self.0.run_upkeep();
        let mut text = self.0.render();
        info::render(&mut text);
        text
    }
}

/// The recorder of this process, installed at the first call.
pub fn metrics() -> MetricsHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    let handle = HANDLE.get_or_init(|| {
        let full = |name: &str| Matcher::Full(name.into());
        let handle = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)
            .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_inputs".into()), INPUTS))
            .and_then(|builder| {
                builder.set_buckets_for_metric(full("gen_ai_server_request_duration_seconds"), ANSWER_SECONDS)
            })
            .and_then(|builder| {
                builder.set_buckets_for_metric(full("gen_ai_server_time_per_output_token_seconds"), TOKEN_SECONDS)
            })
            .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_token_usage".into()), TOKENS))
            .expect("the buckets are not empty")
            .install_recorder()
            .expect("no other recorder is installed in this process");
        // Samples of histograms are kept one by one until they are counted: not only when somebody scrapes.
        let upkeep = handle.clone();
        let counting = std::thread::Builder::new().name("metrics".into()).spawn(move || {
            loop {
                std::thread::sleep(UPKEEP);
                upkeep.run_upkeep();
            }
        });
        if let Err(error) = counting {
            tracing::warn!(%error, "histograms are counted at scrapes only");
        }
        handle
    });
    MetricsHandle(handle.clone())
}

/// Whether the process can take work; starts as not ready.
#[derive(Clone, Default)]
pub struct Readiness(Arc<watch::Sender<bool>>);

impl Readiness {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn set(&self, ready: bool) {
        self.0.send_replace(ready);
    }

    pub fn get(&self) -> bool {
        *self.0.borrow()
    }

    /// Resolves once the process can take no more work, after it could.
    pub async fn lost(&self) {
        let mut changes = self.0.subscribe();
        // Neither fails while `self` exists.
        let _ = changes.wait_for(|&ready| ready).await;
        let _ = changes.wait_for(|&ready| !ready).await;
    }
}

/// `/metrics`, `/healthz` (the process answers) and `/readyz` (it can take work), which is `/health` as well: probes that were
/// written for vLLM's or llama.cpp's server ask for that.
pub fn ops_router(handle: MetricsHandle, ready: Readiness) -> Router {
    let metrics = get(async |State(handle): State<MetricsHandle>| {
        ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], handle.render())
    })
    .with_state(handle);
    let readyz = get(async |State(ready): State<Readiness>| {
        if ready.get() { (StatusCode::OK, "ok\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") }
            .into_response()
    })
    .with_state(ready);
    let router = Router::new().route("/metrics", metrics).route("/healthz", get("ok\n"));
    router.route("/readyz", readyz.clone()).route("/health", readyz)
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::Request};
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn readiness_and_metrics_are_served() {
        let ready = Readiness::new();
        let router = ops_router(metrics(), ready.clone());
        let status = async |path: &str| {
            router.clone().oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap().status()
        };
        for path in ["/readyz", "/health"] {
            ready.set(false);
            assert_eq!(status(path).await, StatusCode::SERVICE_UNAVAILABLE);
            ready.set(true);
            assert_eq!(status(path).await, StatusCode::OK);
        }
        assert_eq!(status("/healthz").await, StatusCode::OK);
        metrics::counter!("athanor_test_total").increment(2);
        metrics::histogram!("athanor_test_seconds").record(0.3);
        let text = metrics().render();
        assert!(text.contains("athanor_test_total 2"), "{text}");
        assert!(text.contains("athanor_test_seconds_bucket{le=\"0.5\"} 1"), "{text}");
    }
}
