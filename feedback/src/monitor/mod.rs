//! The monitor process: configuration, Kafka session, status. The only place of this crate that knows Kubernetes.
//!
//! It keeps nothing on disk. What it must know after a kill is in Kafka and in the status it published: the windows are rebuilt by
//! reading the events again from the beginning of the published ranges.

mod config;
mod publisher;
mod session;

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context;
use athanor_telemetry::Readiness;
use tokio_util::sync::CancellationToken;

use athanor_feedback::signing::{self, SharedKeys};
use config::{ConfigFile, PAUSE};
use session::Session;

/// Runs until `shutdown`.
///
/// # Errors
/// `ops_address` cannot be served, or the signing keys cannot be read; Kafka, the object store and the API server may come and go.
pub async fn run(config: PathBuf, ops_address: SocketAddr, shutdown: CancellationToken) -> anyhow::Result<()> {
    let readiness = Readiness::new();
    let ops = athanor_telemetry::ops_router(athanor_telemetry::metrics(), readiness.clone());
    session::describe_metrics();
    let listener =
        tokio::net::TcpListener::bind(ops_address).await.with_context(|| format!("cannot listen on {ops_address}"))?;
    let stop = shutdown.clone();
    let serving = tokio::spawn(async move {
        axum::serve(listener, ops).with_graceful_shutdown(async move { stop.cancelled().await }).await
    });
    let keys = signing::keys_of_environment().context("the signing keys cannot be read")?;
    shutdown.run_until_cancelled(watch(ConfigFile::new(config), keys, &readiness)).await;
    tracing::info!("the monitor stops");
    serving.await.context("the ops server panicked")?.context("the ops server failed")
}

/// One session after another: each ends with an error, or when the configuration changes.
async fn watch(mut file: ConfigFile, keys: Option<SharedKeys>, readiness: &Readiness) {
    loop {
        let config = file.next().await;
        tracing::info!(
            deployment = config.deployment,
            revision = config.revisions.first().map(|revision| &revision.name),
            "watching"
        );
        tokio::select! {
            () = file.changed() => tracing::info!("the configuration has changed"),
            () = repeat(Session::new(config, keys.clone()), readiness) => {}
        }
    }
}

async fn repeat(session: Session, readiness: &Readiness) {
    loop {
        if let Err(error) = session.run(readiness).await {
            tracing::warn!(error = format!("{error:#}"), "watching is interrupted and begins again");
        }
        tokio::time::sleep(PAUSE).await;
    }
}
