//! The HTTP client for the servers behind the router.

use std::{net::SocketAddr, time::Duration};

use athanor_serving::capacity::{Capacity, Held};
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

/// A whole body and what it takes of the capacity.
struct Whole {
    bytes: Vec<u8>,
    _held: Held,
}

impl AsRef<[u8]> for Whole {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Why a server gave no whole answer.
#[derive(Debug)]
pub enum ClientError {
    /// No connection came about: the server has not seen the request.
    Connect(String),
    Lost(String),
    /// There is no memory left for the answer.
    Full(String),
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

    /// Sends a request and reads the whole answer, of at most `limit` bytes. They take from `capacity` until the last
    /// clone of the body is dropped.
    pub async fn send(
        &self,
        request: Request<Body>,
        limit: usize,
        capacity: &Capacity,
    ) -> Result<Response<Bytes>, ClientError> {
        let (parts, body) = self.open(request).await?.into_parts();
        let mut whole = Vec::new();
        let mut held = Held::default();
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| ClientError::Lost(describe(&error)))?;
            if whole.len() + chunk.len() > limit {
                return Err(ClientError::Lost(format!("the answer is larger than {limit} bytes")));
            }
            held.add(capacity.hold(chunk.len()).map_err(|full| ClientError::Full(full.to_string()))?);
            whole.extend_from_slice(&chunk);
        }
        Ok(Response::from_parts(parts, Bytes::from_owner(Whole { bytes: whole, _held: held })))
    }

    /// The body of a 200 answer within two seconds, for the router's own use.
    pub async fn get(&self, address: SocketAddr, path: &str, limit: usize) -> Result<Bytes, String> {
        let capacity = Capacity::new(limit);
        let request = Request::builder().method(Method::GET).uri(format!("http://{address}{path}"));
        let request = request.body(Body::empty()).map_err(|error| error.to_string())?;
        match tokio::time::timeout(Duration::from_secs(2), self.send(request, limit, &capacity)).await {
            Err(_) => Err("no answer within 2 s".into()),
            Ok(Err(ClientError::Connect(error) | ClientError::Lost(error) | ClientError::Full(error))) => Err(error),
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
