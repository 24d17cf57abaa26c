//! The monitor process: configuration, Kafka session, status. The only place of this crate that knows Kubernetes.
//!
//! It keeps nothing on disk. What it must know after a kill is in Kafka and in the status it published: the windows are rebuilt by
//! reading the events again from the beginning of the published ranges.

mod config;
mod publisher;
mod session;

use std::{convert::Infallible, net::SocketAddr, path::PathBuf};

use anyhow::Context;
use athanor_contract::monitor::MonitorConfig;
use athanor_telemetry::Readiness;
use tokio_util::sync::CancellationToken;

use athanor_feedback::signing;
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
    let session = |config| repeat(Session::new(config, keys.clone()), readiness.clone());
    shutdown.run_until_cancelled(watch(ConfigFile::new(config), session)).await;
    tracing::info!("the monitor stops");
    serving.await.context("the ops server panicked")?.context("the ops server failed")
}

/// Watches by one session at a time, until the configuration asks for something else to be watched.
async fn watch<F: Future<Output = Infallible>>(mut file: ConfigFile, session: impl Fn(MonitorConfig) -> F) {
    let mut config = file.next().await;
    loop {
        tracing::info!(
            deployment = config.deployment,
            revision = config.revisions.first().map(|revision| &revision.name),
            "watching"
        );
        config = tokio::select! {
            other = other(&mut file, &config) => other,
            never = session(config.clone()) => match never {},
        };
        tracing::info!("the configuration has changed");
    }
}

/// Waits for a configuration by which something else is watched. A candidate that comes or goes is nothing to watch: the session
/// continues, and so it does while the file cannot be read.
async fn other(file: &mut ConfigFile, config: &MonitorConfig) -> MonitorConfig {
    loop {
        file.changed().await;
        let next = file.next().await;
        if watched(&next) != watched(config) {
            return next;
        }
    }
}

/// The part of a configuration that a session depends on: of the revisions it is the first.
fn watched(config: &MonitorConfig) -> MonitorConfig {
    let revisions = config.revisions.iter().take(1).cloned().collect();
    MonitorConfig { revisions, ..config.clone() }
}

async fn repeat(session: Session, readiness: Readiness) -> Infallible {
    loop {
        if let Err(error) = session.run(&readiness).await {
            tracing::warn!(error = format!("{error:#}"), "watching is interrupted and begins again");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use athanor_contract::{
        monitor::{MonitorSpec, MonitoredRevision},
        serve::EventsConfig,
    };
    use tokio::{sync::mpsc, time::timeout};

    use super::*;

    fn write(path: &Path, revisions: &[&str], windows: MonitorSpec) {
        let revision =
            |name: &&str| MonitoredRevision { name: (*name).into(), model_uri: format!("s3://models/{name}") };
        let config = MonitorConfig {
            namespace: "n".into(),
            deployment: "d".into(),
            events: EventsConfig::new("kafka:9092", "events"),
            revisions: revisions.iter().map(revision).collect(),
            windows,
        };
        // In one step, as the kubelet swaps a volume.
        let next = path.with_extension("next");
        std::fs::write(&next, serde_json::to_vec(&config).unwrap()).unwrap();
        std::fs::rename(next, path).unwrap();
    }

    #[tokio::test]
    async fn a_candidate_that_comes_or_goes_keeps_the_session() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("monitor.json");
        let (sender, mut sessions) = mpsc::unbounded_channel();
        let session = move |config: MonitorConfig| {
            sender.send((config.revisions[0].name.clone(), config.windows.window_predictions)).unwrap();
            std::future::pending()
        };
        let windows = MonitorSpec { window_predictions: 100, ..MonitorSpec::default() };
        write(&path, &["r1"], windows.clone());
        let watching = tokio::spawn(watch(ConfigFile::new(path.clone()), session));
        let soon = Duration::from_secs(30);
        let began = |revision: &str, predictions| Ok(Some((revision.to_owned(), predictions)));
        assert_eq!(timeout(soon, sessions.recv()).await, began("r1", 100));
        for revisions in [&["r1", "r2"][..], &["r1"]] {
            write(&path, revisions, windows.clone());
            // The file is read once a second.
            assert!(timeout(PAUSE * 5 / 2, sessions.recv()).await.is_err(), "another session because of {revisions:?}");
        }
        write(&path, &["r1"], MonitorSpec { window_predictions: 200, ..windows.clone() });
        assert_eq!(timeout(soon, sessions.recv()).await, began("r1", 200));
        write(&path, &["r2", "r1"], MonitorSpec { window_predictions: 200, ..windows });
        assert_eq!(timeout(soon, sessions.recv()).await, began("r2", 200));
        watching.abort();
    }
}
