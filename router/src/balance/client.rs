//! The HTTP client for the servers behind the router.

use std::{net::SocketAddr, time::Duration};

use axum::{
    body::Body,
    http::{Method, Request, Response, StatusCode},
};
use bytes::Bytes;
use futures::StreamExt;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};

/// How long an unused connection is kept. Servers of other projects close theirs after five seconds (uvicorn, cpp-httplib): a
/// request that is sent just then would be lost.
const IDLE: Duration = Duration::from_secs(4);

/// A pooled keep-alive HTTP/1.1 client for the servers.
#[derive(Clone)]
pub struct Client(legacy::Client<HttpConnector, Body>);

/// Why a server gave no whole answer.
#[derive(Debug)]
pub enum ClientError {
    /// No connection came about: the server has not seen the request.
    Connect(String),
    Lost(String),
}

impl Default for Client {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(1)));
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(128)
            .build(connector);
        Self(client)
    }
}

impl Client {
    /// Sends a request and returns the answer as soon as its head is there. Dropping the body before its end closes the
    /// connection, by which the server notices that nobody waits.
    pub async fn open(&self, request: Request<Body>) -> Result<Response<Body>, ClientError> {
        let response = self.0.request(request).await.map_err(|error| {
            let message = describe(&error);
            if error.is_connect() { ClientError::Connect(message) } else { ClientError::Lost(message) }
        })?;
        Ok(response.map(Body::new))
    }

    /// Sends a request and reads the whole answer, of at most `limit` bytes.
    pub async fn send(&self, request: Request<Body>, limit: usize) -> Result<Response<Bytes>, ClientError> {
        let (parts, body) = self.open(request).await?.into_parts();
        let mut whole = bytes::BytesMut::new();
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| ClientError::Lost(describe(&error)))?;
            if whole.len() + chunk.len() > limit {
                return Err(ClientError::Lost(format!("the answer is larger than {limit} bytes")));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(Response::from_parts(parts, whole.freeze()))
    }

    /// The body of a 200 answer within two seconds.
    pub async fn get(&self, address: SocketAddr, path: &str, limit: usize) -> Result<Bytes, String> {
        let request = Request::builder().method(Method::GET).uri(format!("http://{address}{path}"));
        let request = request.body(Body::empty()).map_err(|error| error.to_string())?;
        match tokio::time::timeout(Duration::from_secs(2), self.send(request, limit)).await {
            Err(_) => Err("no answer within 2 s".into()),
            Ok(Err(ClientError::Connect(error) | ClientError::Lost(error))) => Err(error),
            Ok(Ok(response)) if response.status() != StatusCode::OK => Err(format!("status {}", response.status())),
            Ok(Ok(response)) => Ok(response.into_body()),
        }
    }
}

/// An error with its causes, which hyper keeps out of its messages.
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    message
}
