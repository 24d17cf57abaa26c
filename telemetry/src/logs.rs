//! Structured logs, and traces over OTLP.

use std::io::IsTerminal;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig, tonic_types::transport::ClientTlsConfig};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// Flushes traces when dropped; keep it until the process ends.
#[must_use = "traces are flushed when this is dropped"]
pub struct Guard {
    provider: Option<SdkTracerProvider>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown()
        {
            eprintln!("traces could not be flushed: {error}");
        }
    }
}

/// Installs logging and, with `OTEL_EXPORTER_OTLP_ENDPOINT`, tracing for the whole process. Call once, inside a tokio runtime.
///
/// Also settles which cryptography TLS uses: reqwest brings none and wants to find one.
pub fn init(service: &'static str) -> Guard {
    // An error means that it was settled before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    let (provider, problem) = match provider(service) {
        Ok(provider) => (provider, None),
        Err(error) => (None, Some(error)),
    };
    let traces = provider
        .as_ref()
        .map(|provider| tracing_opentelemetry::layer().with_tracer(provider.tracer(service)).with_filter(filter()));
    // People read at a terminal, collectors read everything else.
    let people = std::io::stderr().is_terminal();
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let json = (!people).then(|| {
        tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .with_writer(std::io::stderr)
            .with_filter(filter())
    });
    let text = people.then(|| format.with_target(false).with_filter(filter()));
    if tracing_subscriber::registry().with(traces).with(json).with(text).try_init().is_err() {
        eprintln!("logging was already set up");
    }
    if let Some(error) = problem {
        tracing::warn!(%error, "traces are off: the OTLP exporter could not be built");
    }
    Guard { provider }
}

fn filter() -> EnvFilter {
    EnvFilter::builder().with_default_directive(tracing::Level::INFO.into()).from_env_lossy()
}

fn provider(service: &'static str) -> Result<Option<SdkTracerProvider>, opentelemetry_otlp::ExporterBuildError> {
    let Some(endpoint) = std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").ok().filter(|endpoint| !endpoint.is_empty())
    else {
        return Ok(None);
    };
    let mut exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic();
    if endpoint.starts_with("https:") {
        // The system's certificates, or those of SSL_CERT_FILE.
        exporter = exporter.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
    }
    let exporter = exporter.with_endpoint(endpoint).build()?;
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder().with_service_name(service).build())
        .build();
    opentelemetry::global::set_tracer_provider(provider.clone());
    Ok(Some(provider))
}
