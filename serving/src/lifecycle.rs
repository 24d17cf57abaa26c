//! Listening, serving and going down: the same for server and router.
//!
//! A shutdown first stops being ready, goes on serving while the rest of the cluster notices, then finishes what is under way.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context;
use athanor_contract::process::variable;
use athanor_telemetry::Readiness;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::server::TcpIncoming;

/// Seconds that a process goes on serving after SIGTERM: endpoints and routers need about that long to look elsewhere.
pub const GRACE_SECONDS: u64 = 3;

/// Most connections of one HTTP listener; further ones wait until another ends.
const MOST_CONNECTIONS: usize = 4096;
/// Longest time in which a connection may send nothing or only a part of a request's head. It is longer than the
/// router's pool keeps an idle connection, so that the router does not use one that is being closed.
const LONGEST_HEAD: Duration = Duration::from_secs(60);
/// Wait after a connection could not be accepted, as when there are no file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

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
        let bounds = Bounds { connections: MOST_CONNECTIONS, head: LONGEST_HEAD };
        self.tasks.spawn(async move {
            accept(listener, app, bounds, stop).await;
            Ok(())
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

/// What one HTTP listener takes.
#[derive(Clone, Copy)]
struct Bounds {
    connections: usize,
    head: Duration,
}

/// Accepts connections until `stop`, then waits for the requests in progress.
async fn accept(listener: TcpListener, app: axum::Router, bounds: Bounds, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(bounds.connections));
    let connections = TaskTracker::new();
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let served = serve(stream, app.clone(), bounds.head, stop.clone());
                connections.spawn(async move {
                    served.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// Serves one connection; after `stop` it ends with the request in progress.
async fn serve(stream: TcpStream, app: axum::Router, head: Duration, stop: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(head);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection ended early");
    }
}

/// [`variable::SHUTDOWN_GRACE_SECONDS`], or [`GRACE_SECONDS`].
pub fn grace() -> Duration {
    let seconds = std::env::var(variable::SHUTDOWN_GRACE_SECONDS).ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(GRACE_SECONDS))
}

#[cfg(test)]
mod tests {
    use axum::{Router, routing::get};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn listening(bounds: Bounds, app: Router) -> (std::net::SocketAddr, CancellationToken, JoinSet<()>) {
        let listener = listen("127.0.0.1", 0).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let mut task = JoinSet::new();
        task.spawn(accept(listener, app, bounds, stop.clone()));
        (address, stop, task)
    }

    /// What a connection receives until it is closed.
    async fn received(stream: &mut TcpStream) -> String {
        let mut bytes = Vec::new();
        let reading = stream.read_to_end(&mut bytes);
        tokio::time::timeout(Duration::from_secs(5), reading).await.expect("the connection is closed").unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[tokio::test]
    async fn half_a_head_and_silence_are_not_waited_for() {
        let bounds = Bounds { connections: 1, head: Duration::from_millis(200) };
        let (address, _stop, _task) = listening(bounds, Router::new().route("/", get(async || "yes"))).await;
        for sent in ["", "GET / HTTP/1.1\r\nhost"] {
            let mut slow = TcpStream::connect(address).await.unwrap();
            slow.write_all(sent.as_bytes()).await.unwrap();
            // The only place is taken: the second connection is served once the first is closed.
            let mut second = TcpStream::connect(address).await.unwrap();
            second.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
            received(&mut slow).await;
            assert!(received(&mut second).await.ends_with("yes"), "{sent:?}");
        }
    }

    #[tokio::test]
    async fn a_stop_lets_requests_end_and_closes_idle_connections() {
        let (release, released) = tokio::sync::watch::channel(());
        let slow = get(async move || {
            let _ = released.clone().changed().await;
            "done"
        });
        let bounds = Bounds { connections: 8, head: Duration::from_secs(60) };
        let (address, stop, mut task) = listening(bounds, Router::new().route("/", slow)).await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        let mut busy = TcpStream::connect(address).await.unwrap();
        busy.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        stop.cancel();
        assert_eq!(received(&mut idle).await, "");
        assert!(task.try_join_next().is_none(), "a request is in progress");
        release.send(()).unwrap();
        assert!(received(&mut busy).await.ends_with("done"));
        let ended = tokio::time::timeout(Duration::from_secs(5), task.join_next()).await;
        ended.expect("the listener ends").unwrap().unwrap();
    }
}
