//! `athanor-router`: the stable address of a ModelDeployment, in a cluster or (with `--config-file`) without one.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use athanor_contract::{
    process::{port, variable},
    serve::RouterLimits,
};
use athanor_feedback::signing::{self, SharedKeys};
use athanor_router::{
    access::Access,
    gateway::Gateway,
    proxy::{grpc::Passing, http},
    record::{events, hand_over, labels, request_id::RequestIds},
    source::{
        kubernetes,
        local::{self, EndpointArgument},
    },
};
use athanor_serving::{
    api::inference::{self, protocol::grpc_inference_service_server::GrpcInferenceServiceServer},
    capacity::{self, Capacity},
    lifecycle::{self, Servers},
    runtime,
    tls::Tls,
};
use athanor_telemetry::Readiness;
use clap::Parser;
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;

/// Wait for the events of answers whose last byte has been sent.
const LAST_EVENTS: Duration = Duration::from_millis(500);
/// Bytes that a message of gRPC may have beyond the largest body of HTTP.
const GRPC_OVERHEAD: usize = 64 << 10;

/// Routes requests to revisions by weight, retries, publishes predictions and takes feedback.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Namespace of the ConfigMap and the Services.
    #[arg(long, env = variable::NAMESPACE, required_unless_present = "config_file")]
    namespace: Option<String>,
    /// The ConfigMap whose key router.json is followed.
    #[arg(long, env = variable::CONFIG_MAP, required_unless_present = "config_file")]
    config_map: Option<String>,
    /// File to follow instead of the ConfigMap, to run without Kubernetes.
    #[arg(long, conflicts_with_all = ["namespace", "config_map"])]
    config_file: Option<PathBuf>,
    /// Endpoints to run without Kubernetes, each revision=host:httpPort[:grpcPort].
    #[arg(long, value_delimiter = ',', requires = "config_file")]
    endpoints: Vec<EndpointArgument>,
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0")]
    address: String,
    #[arg(long, default_value_t = port::HTTP)]
    http_port: u16,
    #[arg(long, default_value_t = port::GRPC)]
    grpc_port: u16,
    /// Port of /metrics, /healthz, /readyz and /analysis.
    #[arg(long, default_value_t = port::ROUTER_OPS)]
    ops_port: u16,
    /// Folder for events while Kafka is away; it should outlive the container. What is left in it when the pod ends is
    /// handed over to another router.
    #[arg(long, env = variable::SPILL_DIR, default_value = "/var/lib/athanor/spill")]
    spill_dir: PathBuf,
    /// Who may use the router, as JSON: {"callers": [{"name": "app", "scopes": ["infer", "feedback"]}]}. Absent:
    /// everyone.
    #[arg(long, env = variable::ACCESS, requires = "api_keys")]
    access: Option<String>,
    /// Folder with a file for each caller, named as the caller, with lines sha256:<hash of an API key>.
    #[arg(long, env = variable::API_KEYS)]
    api_keys: Option<PathBuf>,
    /// Bytes of bodies of requests and answers that are held at the same time; what is beyond is answered 429.
    #[arg(long, env = variable::BODY_MEMORY, default_value_t = capacity::BODY_MEMORY)]
    body_memory: usize,
    /// Folder with tls.crt and tls.key. Absent: HTTP and gRPC without TLS.
    #[arg(long, env = variable::TLS)]
    tls: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    runtime::build().context("the runtime cannot be started")?.block_on(serve(arguments))
}

async fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let _telemetry = athanor_telemetry::init("athanor-router");
    let result = run(arguments).await;
    if let Err(error) = &result {
        tracing::error!(error = format!("{error:#}"), "athanor-router ends");
    }
    result
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let shutdown = athanor_telemetry::shutdown_signal();
    let metrics = athanor_telemetry::metrics();
    let ready = Readiness::new();
    let keys = signing::keys_of_environment().context("the signing keys cannot be read")?;
    let (access, capacity) = (access(&arguments)?, Capacity::new(arguments.body_memory));
    let gateway = Arc::new(Gateway { access, capacity, ..Gateway::new(request_ids(keys.as_ref())) });
    let registry = gateway.registry.clone();
    let tls = arguments.tls.clone().map(Tls::read).transpose()?;
    if let Some(tls) = &tls {
        tokio::spawn(tls.clone().follow());
    }

    let mut servers = Servers::new(gateway.capacity.clone());
    let mut ops = athanor_telemetry::ops_router(metrics, ready.clone()).merge(http::analysis(gateway.clone()));
    if let Some(keys) = &keys {
        ops = ops.merge(hand_over::routes(gateway.clone(), keys.clone()));
    }
    servers.ops(lifecycle::listen(&arguments.address, arguments.ops_port).await?, ops, hand_over::LARGEST);
    let listener = lifecycle::listen(&arguments.address, arguments.http_port).await?;
    servers.http(listener, http::app(gateway.clone()), tls.clone());
    let (health, health_service) = tonic_health::server::health_reporter();
    // The whole server (the empty name) is as healthy as its only service.
    health.set_not_serving::<GrpcInferenceServiceServer<Passing>>().await;
    health.set_service_status("", ServingStatus::NotServing).await;
    let longest = RouterLimits::default().max_body_bytes + GRPC_OVERHEAD;
    let passing = GrpcInferenceServiceServer::new(Passing::new(gateway.clone(), ready.clone()));
    let passing = passing.max_decoding_message_size(longest);
    let routes = inference::reflection()?.add_service(health_service).add_service(passing);
    servers.grpc(lifecycle::listen(&arguments.address, arguments.grpc_port).await?, routes, tls);

    let mut cluster = None;
    match (arguments.config_file, arguments.namespace, arguments.config_map) {
        (Some(file), ..) => {
            let text = local::load(&file, &arguments.endpoints, &registry).await?;
            tokio::spawn(local::follow(file, arguments.endpoints, registry.clone(), text));
        }
        (None, Some(namespace), Some(config_map)) => {
            let client = kube::Client::try_default().await.context("connecting to Kubernetes")?;
            cluster = Some((client.clone(), namespace.clone()));
            tokio::spawn(kubernetes::watch(client, namespace, config_map, registry.clone()));
        }
        _ => anyhow::bail!("give --namespace and --config-map, or --config-file"),
    }
    tokio::spawn(labels::learn(registry.clone(), gateway.client.clone(), gateway.labels.clone()));
    let stop_events = CancellationToken::new();
    let producer = tokio::spawn(events::keep_producer(
        registry.clone(),
        gateway.events.clone(),
        keys.clone(),
        arguments.spill_dir.clone(),
        stop_events.clone(),
    ));
    tokio::spawn({
        let (gateway, ready, shutdown, health) = (gateway.clone(), ready.clone(), shutdown.clone(), health.clone());
        async move {
            tokio::select! {
                () = able(&gateway) => {}
                () = shutdown.cancelled() => return,
            }
            ready.set(true);
            health.set_serving::<GrpcInferenceServiceServer<Passing>>().await;
            health.set_service_status("", ServingStatus::Serving).await;
            tracing::info!("ready");
            shutdown.cancelled().await;
            health.set_not_serving::<GrpcInferenceServiceServer<Passing>>().await;
            health.set_service_status("", ServingStatus::NotServing).await;
        }
    });

    let drain = {
        let gateway = gateway.clone();
        move || gateway.drain()
    };
    let result = servers.run(shutdown, ready, lifecycle::grace(), drain, std::future::pending()).await;
    // Only now: requests that were drained had events too, some of them written just after their answers' ends.
    let _ = tokio::time::timeout(LAST_EVENTS, gateway.running.ended()).await;
    stop_events.cancel();
    producer.await.context("the task that keeps the producer failed")?;
    if let (Some(cluster), Some(keys)) = (cluster, keys) {
        hand_events_over(&gateway, keys, &arguments.spill_dir, cluster).await;
    }
    result
}

/// Gives events that Kafka did not take to another router of the deployment.
async fn hand_events_over(
    gateway: &Gateway,
    keys: SharedKeys,
    spill_dir: &Path,
    (kube, namespace): (kube::Client, String),
) {
    let Some(config) = gateway.registry.snapshot().config.clone() else { return };
    let Some(events) = config.events.clone() else { return };
    let peers = async || kubernetes::ready_routers(&kube, &namespace, &config.deployment).await;
    hand_over::Sender { client: gateway.client.clone(), keys, events }.run(spill_dir, peers).await;
}

fn request_ids(keys: Option<&SharedKeys>) -> RequestIds {
    if let Some(keys) = keys {
        return RequestIds::new(keys.clone());
    }
    tracing::warn!(
        "{} is not set: only the process that answered a request accepts feedback for it, and events are not signed",
        variable::SIGNING_KEYS
    );
    RequestIds::random()
}

/// The callers that are let in, with their keys; `None`: everyone.
fn access(arguments: &Arguments) -> anyhow::Result<Option<Arc<Access>>> {
    let Some((access, folder)) = arguments.access.as_ref().zip(arguments.api_keys.clone()) else { return Ok(None) };
    let config = serde_json::from_str(access).with_context(|| format!("{} is not valid", variable::ACCESS))?;
    let access = Arc::new(Access::new(&config, folder));
    tokio::spawn(access.clone().follow());
    Ok(Some(access))
}

/// Resolves once configuration and endpoints are known and a request could be answered. It does not go back: without any endpoint a
/// request waits and is answered 503, which says more than a refused connection.
async fn able(gateway: &Gateway) {
    let mut snapshots = gateway.registry.subscribe();
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        let events =
            snapshot.config.as_ref().is_none_or(|config| config.events.is_none()) || gateway.events.get().is_some();
        let endpoint = snapshot.revisions.iter().any(|revision| !revision.endpoints.is_empty());
        if snapshot.config.is_some() && snapshot.synced && endpoint && events {
            return;
        }
        tokio::select! {
            changed = snapshots.changed() => if changed.is_err() { std::future::pending::<()>().await },
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }
    }
}
