//! `athanor-server`: fetches one model revision and answers for it over HTTP and gRPC.

mod adapter;
mod adapters;
mod fetch;
mod generate;
mod load;
mod packed;
mod packed_encoder;
mod tokenizer;
mod torch;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use athanor_contract::{
    process::{file, path, variable},
    serve::ServeConfig,
};
use athanor_serving::{
    api::{
        inference::{self, Inference, protocol::grpc_inference_service_server::GrpcInferenceServiceServer},
        openai::{self, ApiError},
    },
    capacity::{self, Capacity},
    lifecycle::{self, Servers},
    runtime,
    service::Service,
};
use athanor_telemetry::Readiness;
use axum::{Router, extract::Request, extract::State, http::StatusCode, response::IntoResponse};
use clap::{Parser, Subcommand};
use tokio::sync::watch;
use tower::ServiceExt;

use crate::adapters::Adapters;

/// Serves one revision of a model: JSON in OpenAI's shapes, and the Open Inference Protocol v2 over gRPC.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// The configuration the operator mounts.
    #[arg(long, env = variable::CONFIG, default_value = path::SERVE_CONFIG)]
    config: PathBuf,
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0")]
    address: String,
    /// Bytes of request bodies that are held at the same time; what is beyond is answered 429.
    #[arg(long, env = variable::BODY_MEMORY, default_value_t = capacity::BODY_MEMORY)]
    body_memory: usize,
    /// Folder for the fetched model; a temporary one without it.
    #[arg(long, env = variable::CACHE_DIR)]
    cache: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Fetches the model of a configuration into a folder and ends: for a server of another project.
    Fetch {
        /// The configuration the operator mounts.
        #[arg(long, env = variable::CONFIG, default_value = path::SERVE_CONFIG)]
        config: PathBuf,
        /// Folder for the model.
        #[arg(long)]
        to: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    athanor_cpu::use_few_heaps();
    let arguments = Arguments::parse();
    runtime::build().context("the runtime cannot be started")?.block_on(serve(arguments))
}

async fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let _telemetry = athanor_telemetry::init("athanor-server");
    let result = run(arguments).await;
    if let Err(error) = &result {
        tracing::error!(error = format!("{error:#}"), "athanor-server ends");
    }
    result
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let shutdown = athanor_telemetry::shutdown_signal();
    if let Some(Command::Fetch { config, to }) = arguments.command {
        let config = read_config(&config)?;
        return tokio::select! {
            fetched = fetch::fetch_for_another(&config, &to) => fetched,
            () = shutdown.cancelled() => anyhow::bail!("the process was asked to end before the model had arrived"),
        };
    }
    let metrics = athanor_telemetry::metrics();
    let ready = Readiness::new();
    let config = read_config(&arguments.config)?;

    // Health is served while the model loads, so that a long download does not look like a dead process.
    let ops = athanor_telemetry::ops_router(metrics, ready.clone());
    let (current, app) = watch::channel(ops.clone().fallback(async || {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "loading", "the model is being loaded").into_response()
    }));
    let mut servers = Servers::new(Capacity::new(arguments.body_memory));
    let listener = lifecycle::listen(&arguments.address, config.http_port).await?;
    servers.http(listener, Router::new().fallback(dispatch).with_state(app), None);

    let loading = async {
        let (service, folder) = fetch_and_load(&config, arguments.cache.as_deref()).await?;
        let file = arguments.config.with_file_name(file::ADAPTERS);
        let adapters = Adapters::start(service.clone(), config.adapters.clone(), file).await?;
        anyhow::Ok((service, folder, adapters))
    };
    let loaded = tokio::select! {
        loaded = loading => loaded?,
        () = shutdown.cancelled() => return Ok(()),
    };
    athanor_cpu::release_free_memory();
    // The weights are in memory; the folder is not needed any more, but a given cache stays.
    let (service, _folder, adapters) = loaded;
    tokio::spawn(adapters.run(shutdown.clone().cancelled_owned()));
    let _ = current.send_replace(openai::app(service.clone(), ops));

    let (health, health_service) = tonic_health::server::health_reporter();
    let passing = GrpcInferenceServiceServer::new(Inference::new(service.clone(), ready.clone()))
        .max_decoding_message_size(config.limits.max_body_bytes.saturating_add(64 << 10));
    health.set_serving::<GrpcInferenceServiceServer<Inference>>().await;
    let routes = inference::reflection()?.add_service(health_service).add_service(passing);
    servers.grpc(lifecycle::listen(&arguments.address, config.grpc_port).await?, routes, None);

    ready.set(true);
    tracing::info!(
        model = config.model_name,
        revision = config.revision,
        http_port = config.http_port,
        grpc_port = config.grpc_port,
        "ready"
    );
    tokio::spawn({
        let shutdown = shutdown.clone();
        let service = service.clone();
        async move {
            shutdown.cancelled().await;
            health.set_not_serving::<GrpcInferenceServiceServer<Inference>>().await;
            tokio::time::sleep(lifecycle::grace()).await;
            service.drain();
        }
    });
    let limits = config.limits;
    // A stream may take as long as a request may.
    let longest = if service.generator().is_ok() { limits.max_request_seconds } else { 0 };
    let drain = Duration::from_secs(limits.drain_seconds.max(longest));
    let fault = async {
        service.stopped().await;
        "the engine's thread ended by a fault".to_owned()
    };
    servers.run(shutdown, ready, lifecycle::grace(), || drain, fault).await
}

fn read_config(path: &PathBuf) -> anyhow::Result<ServeConfig> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(&text))
        .map_err(|error| anyhow::anyhow!("{}, {}: {}", path.display(), error.path(), error.inner()))
}

/// Fetches, loads and warms up the model. The folder is removed when the second value is dropped, unless it is a given cache.
async fn fetch_and_load(
    config: &ServeConfig,
    cache: Option<&std::path::Path>,
) -> anyhow::Result<(Arc<Service>, Option<tempfile::TempDir>)> {
    let started = std::time::Instant::now();
    let (folder, temporary) = match cache {
        Some(cache) => {
            let folder = cache.join(&config.revision);
            std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
            (folder, None)
        }
        None => {
            let temporary = tempfile::tempdir().context("making a temporary folder")?;
            (temporary.path().to_owned(), Some(temporary))
        }
    };
    let manifest = fetch::fetch(config, &folder).await?;
    let max_sequence_length = manifest.and_then(|manifest| manifest.max_sequence_length);
    let config = config.clone();
    // The model's threads begin here, and keep the priority of this one.
    let service = runtime::on_own_thread(move || {
        load::load(&config, &folder, max_sequence_length).with_context(|| format!("loading {}", config.model_uri))
    })
    .await??;
    let service = Arc::new(service);
    service.warm_up().await.context("the model did not answer a warm-up")?;
    tracing::info!(seconds = started.elapsed().as_secs_f64(), "warmed up");
    Ok((service, temporary))
}

/// Hands a request to the application of the moment.
async fn dispatch(State(app): State<watch::Receiver<Router>>, request: Request) -> axum::response::Response {
    let app = app.borrow().clone();
    app.oneshot(request).await.into_response()
}
