//! athanor-operator: takes part in the election, serves health, metrics and progress, and runs the controllers while it leads.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context as _;
use athanor_operator::{
    context::Context,
    controllers::{self, Stores},
    lease::Election,
    object_metrics,
    progress::{ProgressService, Reports, proto::progress_server::ProgressServer},
    settings::Settings,
};
use athanor_telemetry::Readiness;
use axum::{http::header::CONTENT_TYPE, routing::get};
use clap::Parser;
use futures::stream;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::sync::CancellationToken;

/// Jobs with new reports that wait to be looked at.
const REPORTED: usize = 1024;
/// An update is a few hundred bytes.
const MOST_REPORT_BYTES: usize = 64 << 10;
/// Reconciles under way may take this long once shutdown began.
const GRACE: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let settings = Settings::parse();
    let _telemetry = athanor_telemetry::init("athanor-operator");
    let result = run(settings).await;
    if let Err(error) = &result {
        tracing::error!(error = format!("{error:#}"), "athanor-operator ends");
    }
    result
}

async fn run(settings: Settings) -> anyhow::Result<()> {
    let shutdown = athanor_telemetry::shutdown_signal();
    let client = kube::Client::try_default().await.context("connecting to Kubernetes")?;
    let http = reqwest::Client::builder().no_proxy().build().context("HTTP client")?;
    let (changed, mut reported) = mpsc::channel(REPORTED);
    let reports = Arc::new(Reports::new(changed));
    let context = Arc::new(Context::new(client.clone(), settings.clone(), reports.clone(), http));
    let controllers = controllers::controllers(&context, stream::poll_fn(move |task| reported.poll_recv(task)));
    let stores = controllers.stores.clone();

    let ready = Readiness::new();
    let ops = tokio::spawn(ops_server(settings.ops_port, ready.clone(), stores.clone(), shutdown.clone()));
    let progress = tokio::spawn(progress_server(settings.progress_port, reports.clone(), shutdown.clone()));

    let identity = settings.identity.clone().unwrap_or_else(|| {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{}-{:08x}", host.trim(), rand::random::<u32>())
    });
    tracing::info!(identity, "waiting to lead");
    let mut election = Election::new(client, &settings.lease_namespace, &settings.lease_name, identity);
    let servers = async {
        tokio::select! {
            ended = ops => ended.context("the health server")?.context("the health server"),
            ended = progress => ended.context("the progress server")?.context("the progress server"),
        }
    };
    let leading = lead(&mut election, controllers, context, reports, stores, ready, shutdown.clone());
    let result = tokio::select! {
        result = leading => result,
        // Either ends at shutdown, which `leading` waits for too, or because its port is taken.
        result = until_failure(servers) => result,
    };
    shutdown.cancel();
    election.release().await;
    result
}

/// Only an error ends it.
async fn until_failure(servers: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    match servers.await {
        Ok(()) => std::future::pending().await,
        Err(error) => Err(error),
    }
}

async fn lead(
    election: &mut Election,
    controllers: controllers::Controllers,
    context: Arc<Context>,
    reports: Arc<Reports>,
    stores: Stores,
    ready: Readiness,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    if !election.acquire(&shutdown, || ready.set(true)).await {
        return Ok(());
    }
    tracing::info!("leading");
    reports.serve(stores.jobs);
    let stop = shutdown.child_token();
    let mut running = tokio::spawn(controllers.run(context, stop.clone()));
    let lost = tokio::select! {
        lost = election.hold(&shutdown) => lost,
        ended = &mut running => {
            ended.context("the controllers")?;
            anyhow::bail!("the controllers ended")
        }
    };
    ready.set(false);
    if lost {
        // Another may act from now on: nothing of this process may go on.
        running.abort();
        anyhow::bail!("leadership was lost");
    }
    stop.cancel();
    if tokio::time::timeout(GRACE, &mut running).await.is_err() {
        tracing::warn!("reconciles under way did not end in time");
        running.abort();
    }
    Ok(())
}

async fn ops_server(port: u16, ready: Readiness, stores: Stores, shutdown: CancellationToken) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port)).await.with_context(|| format!("listening on port {port}"))?;
    let metrics = athanor_telemetry::metrics();
    let recorded = metrics.clone();
    let scrape = get(async move || {
        let text = format!("{}{}", recorded.render(), object_metrics::render(&stores));
        ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
    });
    let router =
        axum::Router::new().route("/metrics", scrape).fallback_service(athanor_telemetry::ops_router(metrics, ready));
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await.context("serving")
}

async fn progress_server(port: u16, reports: Arc<Reports>, shutdown: CancellationToken) -> anyhow::Result<()> {
    let service = ProgressServer::new(ProgressService(reports)).max_decoding_message_size(MOST_REPORT_BYTES);
    let stop = async move {
        shutdown.cancelled().await;
    };
    // Streams of trainers have no end of their own: they are cut, and open again elsewhere.
    let serving = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .add_service(service)
        .serve(([0, 0, 0, 0], port).into());
    tokio::select! {
        result = serving => result.with_context(|| format!("listening on port {port}")),
        () = stop => Ok(()),
    }
}
