//! Listening, serving and going down: the same for server and router.
//!
//! A shutdown first stops being ready, goes on serving while the rest of the cluster notices, then finishes what is under way.

use std::{future::Future, time::Duration};

use anyhow::Context;
use athanor_contract::process::variable;
use athanor_telemetry::Readiness;
use axum::serve::ListenerExt;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

/// Seconds that a process goes on serving after SIGTERM: endpoints and routers need about that long to look elsewhere.
pub const GRACE_SECONDS: u64 = 3;

/// The servers of a process.
pub struct Servers {
    tasks: JoinSet<anyhow::Result<()>>,
    stop: CancellationToken,
}

impl Default for Servers {
    fn default() -> Self {
        Self { tasks: JoinSet::new(), stop: CancellationToken::new() }
    }
}

/// Listens on `address:port`.
pub async fn listen(address: &str, port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind((address, port)).await.with_context(|| format!("listening on {address}:{port}"))
}

impl Servers {
    /// Serves HTTP/1.1 until [`Servers::run`] drains.
    pub fn http(&mut self, listener: TcpListener, app: axum::Router) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let listener = listener.tap_io(|stream| {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY could not be set");
                }
            });
            axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await.context("serving HTTP")
        });
    }

    /// Serves gRPC until [`Servers::run`] drains.
    pub fn grpc(&mut self, listener: TcpListener, routes: tonic::service::Routes) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            tonic::transport::Server::builder()
                .add_routes(routes)
                .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
                .await
                .context("serving gRPC")
        });
    }

    /// Waits for `shutdown`, then: not ready, `grace`, drain for at most `drain` (asked then, as a
    /// configuration may have changed it). A server that ends by itself, or `fault`, is an
    /// error at once: better a restart than a process that only looks alive.
    pub async fn run(
        mut self,
        shutdown: CancellationToken,
        ready: Readiness,
        grace: Duration,
        drain: impl FnOnce() -> Duration,
        fault: impl Future<Output = String>,
    ) -> anyhow::Result<()> {
        tokio::select! {
            () = shutdown.cancelled() => {}
            ended = self.tasks.join_next() => {
                ended.context("there is no server")?.context("a server's task failed")??;
                anyhow::bail!("a server ended by itself");
            }
            fault = fault => anyhow::bail!(fault),
        }
        ready.set(false);
        tracing::info!(grace_seconds = grace.as_secs_f64(), "no longer ready");
        tokio::time::sleep(grace).await;
        self.stop.cancel();
        let drain = drain();
        let drained = tokio::time::timeout(drain, async {
            while let Some(ended) = self.tasks.join_next().await {
                ended.context("a server's task failed")??;
            }
            anyhow::Ok(())
        });
        match drained.await {
            Ok(result) => result?,
            Err(_) => tracing::warn!(seconds = drain.as_secs(), "requests were still under way when the drain ended"),
        }
        tracing::info!("drained");
        Ok(())
    }
}

/// [`variable::SHUTDOWN_GRACE_SECONDS`], or [`GRACE_SECONDS`].
pub fn grace() -> Duration {
    let seconds = std::env::var(variable::SHUTDOWN_GRACE_SECONDS).ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(GRACE_SECONDS))
}
