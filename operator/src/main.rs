//! athanor-operator: serves health, metrics and progress, takes part in the election, and runs the controllers while it
//! is leader.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context as _;
use athanor_crds::FineTuneJob;
use athanor_operator::{
    context::Context,
    controllers,
    lease::Election,
    modeldeployment,
    ops::{self, Ops},
    progress::{ProgressService, Reports, proto::progress_server::ProgressServer},
    settings::Settings,
    stores::{Feeds, Stores},
};
use athanor_telemetry::Readiness;
use clap::Parser;
use futures::{Stream, stream};
use kube::runtime::reflector::ObjectRef;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::sync::CancellationToken;

/// Most jobs with new reports that wait for a reconcile.
const REPORTED: usize = 1024;
/// Most bytes of a progress report, which has a few hundred.
const MOST_REPORT_BYTES: usize = 64 << 10;
/// Longest time for running reconciles to end after shutdown began.
const GRACE: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let settings = Settings::parse();
    let _telemetry = athanor_telemetry::init("athanor-operator");
    let result = run(settings).await;
    if let Err(error) = &result {
        tracing::error!(error = format!("{error:#}"), "athanor-operator failed");
    }
    result
}

async fn run(settings: Settings) -> anyhow::Result<()> {
    let shutdown = athanor_telemetry::shutdown_signal();
    let client = kube::Client::try_default().await.context("connecting to Kubernetes")?;
    let http = modeldeployment::pod_client().context("making the HTTP client")?;
    let (changed, mut reported) = mpsc::channel(REPORTED);
    let reports = Arc::new(Reports::new(changed));
    let (stores, feeds) = Stores::new();
    let reported = stream::poll_fn(move |task| reported.poll_recv(task));

    let identity = settings.identity.clone().unwrap_or_else(|| {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{}-{:08x}", host.trim(), rand::random::<u32>())
    });
    let mut election = Election::new(client.clone(), &settings.lease_namespace, &settings.lease_name, identity.clone());
    let leadership = election.leadership();
    let context =
        Context::new(client.clone(), settings.clone(), stores.clone(), reports.clone(), http, leadership.clone());
    let context = Arc::new(context);
    let liveness = context.liveness.clone();
    election.beat(liveness.clone());

    let ready = Readiness::new();
    let ops = Ops { metrics: athanor_telemetry::metrics(), ready: ready.clone(), liveness, leadership, stores };
    let ops = tokio::spawn(ops_server(settings.ops_port, ops, shutdown.clone()));
    let progress = tokio::spawn(progress_server(settings.progress_port, reports, shutdown.clone()));
    tracing::info!(identity, "waiting for the Lease");
    let servers = async {
        tokio::select! {
            ended = ops => ended.context("the health server")?.context("the health server"),
            ended = progress => ended.context("the progress server")?.context("the progress server"),
        }
    };
    let controllers = Controllers { client, context, feeds, reported };
    let leading = lead(&mut election, controllers, ready, shutdown.clone());
    let result = tokio::select! {
        result = leading => result,
        // A server ends at shutdown, which `leading` waits for as well, or fails because its port is in use.
        result = until_failure(servers) => result,
    };
    shutdown.cancel();
    election.release().await;
    result
}

/// Returns only if the servers fail.
async fn until_failure(servers: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    match servers.await {
        Ok(()) => std::future::pending().await,
        Err(error) => Err(error),
    }
}

/// What the controllers run with, once.
struct Controllers<S> {
    client: kube::Client,
    context: Arc<Context>,
    feeds: Feeds,
    reported: S,
}

async fn lead<S: Stream<Item = ObjectRef<FineTuneJob>> + Send + 'static>(
    election: &mut Election,
    controllers: Controllers<S>,
    ready: Readiness,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    if !election.acquire(&shutdown, || ready.set(true)).await {
        return Ok(());
    }
    tracing::info!("this process is the leader");
    let Controllers { client, context, feeds, reported } = controllers;
    context.reports.serve(context.stores.fine_tune_jobs.store());
    let stop = shutdown.child_token();
    let until_stop = stop.clone();
    let mut running =
        tokio::spawn(async move { controllers::run(&client, context, feeds, reported, until_stop).await });
    let lost = tokio::select! {
        lost = election.hold(&shutdown) => lost,
        ended = &mut running => {
            ended.context("the controllers")?;
            anyhow::bail!("the controllers ended")
        }
    };
    ready.set(false);
    if lost {
        // Another process may be the leader from now on: no reconcile of this one may continue.
        running.abort();
        anyhow::bail!("leadership was lost");
    }
    stop.cancel();
    if tokio::time::timeout(GRACE, &mut running).await.is_err() {
        tracing::warn!("running reconciles did not end in time");
        running.abort();
    }
    Ok(())
}

async fn ops_server(port: u16, ops: Ops, shutdown: CancellationToken) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port)).await.with_context(|| format!("listening on port {port}"))?;
    axum::serve(listener, ops::router(ops)).with_graceful_shutdown(shutdown.cancelled_owned()).await.context("serving")
}

async fn progress_server(port: u16, reports: Arc<Reports>, shutdown: CancellationToken) -> anyhow::Result<()> {
    let service = ProgressServer::new(ProgressService(reports)).max_decoding_message_size(MOST_REPORT_BYTES);
    let stop = async move {
        shutdown.cancelled().await;
    };
    // Streams of trainers have no end: they are cut here, and trainers open them again.
    let serving = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .add_service(service)
        .serve(([0, 0, 0, 0], port).into());
    tokio::select! {
        result = serving => result.with_context(|| format!("listening on port {port}")),
        () = stop => Ok(()),
    }
}
