//! Listening, serving and going down: the same for server and router.
//!
//! A shutdown first stops being ready, goes on serving while the rest of the cluster notices, then finishes what is under way.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context;
use athanor_contract::process::variable;
use athanor_telemetry::Readiness;
use axum::{
    http::{HeaderValue, header::CONNECTION},
    middleware::map_response,
    response::Response,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admission::{Admission, Calls},
    capacity::Capacity,
    tls::{Protocol, Tls},
};

/// Seconds that a process goes on serving after SIGTERM: endpoints and routers need about that long to look elsewhere.
pub const GRACE_SECONDS: u64 = 3;

/// Most connections of one listener; further ones wait until another ends. One of HTTP/2 has many requests at a time.
const MOST_CONNECTIONS: usize = 4096;
const MOST_CONNECTIONS_HTTP2: usize = 1024;
/// Longest time in which a connection may send nothing or only a part of a request's head. It is longer than the
/// router's pool keeps an idle connection, so that the router does not use one that is being closed. Over HTTP/2 it is
/// the time up to the first request; the head of a later one is limited by [`PING`], which nobody can answer in the midst of it.
const LONGEST_HEAD: Duration = Duration::from_secs(60);
/// Longest time in which a message of gRPC arrives.
const LONGEST_MESSAGE: Duration = Duration::from_secs(60);
/// How long a connection of HTTP/2 may be without requests. Then its client is asked to go, and loses nothing by it.
const LONGEST_ABSENCE: Duration = Duration::from_secs(600);
/// Most bytes of heads, and of what was not read of a body, that a connection of HTTP/1 holds.
const MOST_UNREAD: usize = 64 << 10;
/// Most bytes that a connection of HTTP/2 holds, and each of its streams, before they are read.
const WINDOW: u32 = 256 << 10;
/// Most bytes of an answer that wait for the client, for each stream of HTTP/2.
const MOST_UNSENT: usize = 64 << 10;
/// Between two questions whether the other end of a connection of HTTP/2 is still there, and the wait for an answer.
const PING: Duration = Duration::from_secs(30);
/// Most requests at the same time on one connection of HTTP/2.
const MOST_STREAMS: u32 = 256;
/// Wait after a connection could not be accepted, as when there are no file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// The servers of a process.
pub struct Servers {
    tasks: JoinSet<anyhow::Result<()>>,
    /// Cancelled when the process is no longer ready.
    leaving: CancellationToken,
    stop: CancellationToken,
    /// What all listeners together take.
    capacity: Capacity,
}

/// Listens on `address:port`.
pub async fn listen(address: &str, port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind((address, port)).await.with_context(|| format!("listening on {address}:{port}"))
}

impl Servers {
    pub fn new(capacity: Capacity) -> Self {
        let (leaving, stop) = (CancellationToken::new(), CancellationToken::new());
        Self { tasks: JoinSet::new(), leaving, stop, capacity }
    }

    /// Serves HTTP/1.1 until [`Servers::run`] drains, with a certificate if there is one.
    pub fn http(&mut self, listener: TcpListener, app: axum::Router, tls: Option<Tls>) {
        let app = parting(app, self.leaving.clone());
        self.listen(listener, app, Protocol::Http1, self.capacity.clone(), tls);
    }

    /// Serves a process' operations until [`Servers::run`] drains. Bodies there have memory of their own, so that clients
    /// cannot use it up.
    pub fn ops(&mut self, listener: TcpListener, app: axum::Router, memory: usize) {
        let app = parting(app, self.leaving.clone());
        self.listen(listener, app, Protocol::Http1, Capacity::new(memory), None);
    }

    /// Serves gRPC until [`Servers::run`] drains, with a certificate if there is one.
    pub fn grpc(&mut self, listener: TcpListener, routes: tonic::service::Routes, tls: Option<Tls>) {
        self.listen(listener, routes.prepare().into_axum_router(), Protocol::Http2, self.capacity.clone(), tls);
    }

    fn listen(
        &mut self,
        listener: TcpListener,
        app: axum::Router,
        protocol: Protocol,
        capacity: Capacity,
        tls: Option<Tls>,
    ) {
        let stop = self.stop.clone();
        let bounds = Bounds { capacity, ..Bounds::new(protocol) };
        self.tasks.spawn(async move {
            accept(listener, app, bounds, tls, stop).await;
            Ok(())
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
        self.leaving.cancel();
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

/// After `leaving`, answers of HTTP/1.1 end their connections: a client opens its next one to another process, instead of
/// sending a request on this one just when it is closed.
fn parting(app: axum::Router, leaving: CancellationToken) -> axum::Router {
    app.layer(map_response(move |mut response: Response| {
        if leaving.is_cancelled() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        std::future::ready(response)
    }))
}

/// What one listener takes.
#[derive(Clone)]
pub(crate) struct Bounds {
    pub protocol: Protocol,
    pub connections: usize,
    pub head: Duration,
    pub message: Duration,
    pub absence: Duration,
    pub capacity: Capacity,
}

impl Bounds {
    pub fn new(protocol: Protocol) -> Self {
        let connections = match protocol {
            Protocol::Http1 => MOST_CONNECTIONS,
            Protocol::Http2 => MOST_CONNECTIONS_HTTP2,
        };
        Self {
            protocol,
            connections,
            head: LONGEST_HEAD,
            message: LONGEST_MESSAGE,
            absence: LONGEST_ABSENCE,
            capacity: Capacity::default(),
        }
    }
}

/// Accepts connections until `stop`, then waits for the requests in progress.
pub(crate) async fn accept(
    listener: TcpListener,
    app: axum::Router,
    bounds: Bounds,
    tls: Option<Tls>,
    stop: CancellationToken,
) {
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
                let served = secure(stream, app.clone(), bounds.clone(), tls.clone(), stop.clone());
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

/// Makes a connection secure if there is a certificate, and serves it.
async fn secure(stream: TcpStream, app: axum::Router, bounds: Bounds, tls: Option<Tls>, stop: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let Some(tls) = tls else { return serve(stream, app, bounds, stop).await };
    let handshake = tls.acceptor(bounds.protocol).accept(stream);
    let handshake = stop.run_until_cancelled(tokio::time::timeout(bounds.head, handshake));
    match handshake.await {
        Some(Ok(Ok(stream))) => serve(stream, app, bounds, stop).await,
        Some(Ok(Err(error))) => tracing::debug!(%error, "a connection could not be made secure"),
        Some(Err(_)) => tracing::debug!("a connection was not made secure in time"),
        None => {}
    }
}

/// Serves one connection; after `stop` it ends with the requests in progress.
async fn serve<S>(stream: S, app: axum::Router, bounds: Bounds, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let builder = auto::Builder::new(TokioExecutor::new());
    let mut builder = match bounds.protocol {
        Protocol::Http1 => builder.http1_only(),
        Protocol::Http2 => builder.http2_only(),
    };
    builder.http1().timer(TokioTimer::new()).header_read_timeout(bounds.head).max_buf_size(MOST_UNREAD);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).keep_alive_interval(PING).keep_alive_timeout(PING);
    http2.max_concurrent_streams(MOST_STREAMS).max_send_buf_size(MOST_UNSENT);
    http2.initial_connection_window_size(WINDOW).initial_stream_window_size(WINDOW);
    let Bounds { protocol, head, message, absence, capacity, .. } = bounds;
    let calls = Calls::default();
    let admission = Admission { app, protocol, capacity, message, calls: calls.clone() };
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(admission));
    let mut connection = std::pin::pin!(connection);
    let mut is_asked_to_go = false;
    let ended = loop {
        // Of HTTP/1 hyper limits the time of each head itself.
        let absent = async {
            match protocol {
                Protocol::Http1 => std::future::pending().await,
                Protocol::Http2 => calls.absent(head, if is_asked_to_go { head } else { absence }).await,
            }
        };
        tokio::select! {
            ended = connection.as_mut() => break ended,
            () = stop.cancelled(), if !is_asked_to_go => {}
            () = absent => {
                if is_asked_to_go || calls.is_new() {
                    tracing::debug!("a connection sent no request in time");
                    return;
                }
            }
        }
        connection.as_mut().graceful_shutdown();
        is_asked_to_go = true;
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
    use rustls::pki_types::CertificateDer;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn listening(bounds: Bounds, app: Router) -> (std::net::SocketAddr, CancellationToken, JoinSet<()>) {
        let listener = listen("127.0.0.1", 0).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let mut task = JoinSet::new();
        task.spawn(accept(listener, app, bounds, None, stop.clone()));
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
        let bounds = Bounds { connections: 1, head: Duration::from_millis(200), ..Bounds::new(Protocol::Http1) };
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

    /// Writes a new certificate for localhost, and returns it.
    fn certificate(folder: &std::path::Path) -> CertificateDer<'static> {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        std::fs::write(folder.join("tls.crt"), made.cert.pem()).unwrap();
        std::fs::write(folder.join("tls.key"), made.signing_key.serialize_pem()).unwrap();
        made.cert.der().clone()
    }

    /// Asks a server that has to have this certificate.
    async fn ask_securely(address: std::net::SocketAddr, trusted: CertificateDer<'static>) -> std::io::Result<String> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(trusted).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let config = config.with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = TcpStream::connect(address).await.unwrap();
        let mut stream = connector.connect("localhost".try_into().unwrap(), stream).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        // hyper closes the connection without TLS' own farewell.
        let _ = stream.read_to_string(&mut answer).await;
        Ok(answer)
    }

    #[tokio::test]
    async fn a_listener_with_a_certificate_speaks_tls_alone_and_takes_a_renewed_one() {
        let folder = tempfile::tempdir().unwrap();
        let missing = Tls::read(folder.path().into()).unwrap_err();
        assert!(format!("{missing:#}").contains("tls.crt"), "{missing:#}");
        let first = certificate(folder.path());
        let tls = Tls::read(folder.path().into()).unwrap();
        let listener = listen("127.0.0.1", 0).await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().route("/", get(async || "yes"));
        let stop = CancellationToken::new();
        let bounds = Bounds { head: Duration::from_millis(300), ..Bounds::new(Protocol::Http1) };
        let task = tokio::spawn(accept(listener, app, bounds, Some(tls.clone()), stop.clone()));
        assert!(ask_securely(address, first.clone()).await.unwrap().ends_with("yes"));
        // Neither a request in clear text nor silence is answered, or waited for.
        for sent in ["GET / HTTP/1.1\r\nhost: a\r\n\r\n", ""] {
            let mut open = TcpStream::connect(address).await.unwrap();
            open.write_all(sent.as_bytes()).await.unwrap();
            let mut bytes = Vec::new();
            let _ = tokio::time::timeout(Duration::from_secs(5), open.read_to_end(&mut bytes)).await.expect("closed");
            assert!(!bytes.starts_with(b"HTTP"), "{sent:?}");
        }
        let second = certificate(folder.path());
        tls.read_again().unwrap();
        assert!(ask_securely(address, second).await.unwrap().ends_with("yes"));
        assert!(ask_securely(address, first).await.is_err(), "the old certificate is no longer used");
        std::fs::write(folder.path().join("tls.key"), "no key").unwrap();
        assert!(format!("{:#}", tls.read_again().unwrap_err()).contains("tls.key"));
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(5), task).await.expect("the listener ends").unwrap();
    }

    #[tokio::test]
    async fn a_process_that_leaves_answers_once_more_on_each_connection() {
        let leaving = CancellationToken::new();
        let app = parting(Router::new().route("/", get(async || "yes")), leaving.clone());
        let (address, _stop, _task) = listening(Bounds::new(Protocol::Http1), app).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = [0; 1024];
        let count = stream.read(&mut answer).await.unwrap();
        assert!(!String::from_utf8_lossy(&answer[..count]).contains("connection"), "it is kept");
        leaving.cancel();
        stream.write_all(request).await.unwrap();
        let last = received(&mut stream).await;
        assert!(last.contains("connection: close") && last.ends_with("yes"), "{last}");
    }

    #[tokio::test]
    async fn a_stop_lets_requests_end_and_closes_idle_connections() {
        let (release, released) = tokio::sync::watch::channel(());
        let slow = get(async move || {
            let _ = released.clone().changed().await;
            "done"
        });
        let bounds = Bounds { connections: 8, ..Bounds::new(Protocol::Http1) };
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
