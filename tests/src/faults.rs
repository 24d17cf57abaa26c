//! A proxy in front of the real API server that spoils chosen writes.
//!
//! Each write to an object, or to a child of it, is numbered by the object's name. A fault is for one number: so an object
//! for each number shows what happens when just that write fails.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::{Request, State},
    http::{Method, Response, StatusCode, header},
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// Most bytes of a request.
const MOST_BYTES: usize = 8 << 20;
/// How long a delayed write waits.
const DELAY: Duration = Duration::from_millis(700);
/// How long a request about a Lease waits, if they are slow.
const SLOW: Duration = Duration::from_secs(5);
/// Part of their paths.
const LEASES: &str = "/leases";

/// What happens to a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It does not arrive, and the connection breaks.
    Lost,
    /// It arrives, and the connection breaks before the answer.
    AnswerLost,
    /// It does not arrive, and the answer is 500.
    ServerError,
    /// It arrives, and the answer is 500 nevertheless.
    ServerErrorAfter,
    /// It does not arrive, and the answer is 409.
    Conflict,
    /// It arrives late.
    Delayed,
}

pub const FAULTS: [Fault; 6] =
    [Fault::Lost, Fault::AnswerLost, Fault::ServerError, Fault::ServerErrorAfter, Fault::Conflict, Fault::Delayed];

/// A fault for the write with this number, from 0, to an object and its children.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    pub fault: Fault,
    pub write: usize,
}

/// The proxy.
pub struct FaultProxy {
    pub address: String,
    state: Arc<ProxyState>,
}

struct ProxyState {
    upstream: String,
    token: String,
    http: reqwest::Client,
    /// By the object's name.
    planned: HashMap<String, Planned>,
    seen: Mutex<Seen>,
    has_slow_leases: AtomicBool,
}

#[derive(Default)]
struct Seen {
    /// Writes by the object's name.
    writes: HashMap<String, usize>,
    faults: usize,
    /// Writes of any object but Leases.
    all: usize,
    /// Objects that were created, by path and name.
    created: HashMap<(String, String), usize>,
}

impl FaultProxy {
    /// Starts in front of `upstream`. Names of objects may not begin with one another.
    pub async fn start(upstream: String, token: String, planned: HashMap<String, Planned>) -> Result<Self> {
        let http = reqwest::Client::builder().no_proxy().tls_danger_accept_invalid_certs(true).build()?;
        let state = Arc::new(ProxyState {
            upstream,
            token,
            http,
            planned,
            seen: Mutex::default(),
            has_slow_leases: AtomicBool::new(false),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let app = Router::new().fallback(answer).with_state(state.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(Self { address, state })
    }

    /// Numbers the writes of each object from 0 again, so that each meets its fault once more.
    pub fn begin_again(&self) {
        self.state.seen().writes.clear();
    }

    /// Number of writes to an object and its children since they were last numbered from 0.
    pub fn writes(&self, name: &str) -> usize {
        self.state.seen().writes.get(name).copied().unwrap_or(0)
    }

    /// Number of faults so far.
    pub fn faults(&self) -> usize {
        self.state.seen().faults
    }

    /// Number of all writes so far, Leases apart.
    pub fn all_writes(&self) -> usize {
        self.state.seen().all
    }

    /// Lets every request about a Lease wait from now on, so that a process learns late who leads.
    pub fn slow_leases(&self) {
        self.state.has_slow_leases.store(true, Ordering::Relaxed);
    }

    /// How often an object of this resource and name was created.
    pub fn created(&self, resource: &str, name: &str) -> usize {
        let seen = self.state.seen();
        let of_resource =
            seen.created.iter().filter(|((path, created), _)| path.ends_with(resource) && created == name);
        of_resource.map(|(_, count)| count).sum()
    }
}

impl ProxyState {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fault of a write, which is counted.
    fn next(&self, method: &Method, path: &str, body: &[u8]) -> Option<Fault> {
        if matches!(*method, Method::GET | Method::HEAD) {
            return None;
        }
        if !path.contains(LEASES) {
            self.seen().all += 1;
        }
        let name = name(method, path, body)?;
        let (object, planned) = self.planned.iter().find(|(object, _)| {
            name.strip_prefix(object.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        })?;
        let mut seen = self.seen();
        let number = seen.writes.entry(object.clone()).or_default();
        let is_now = *number == planned.write;
        *number += 1;
        seen.faults += usize::from(is_now);
        is_now.then_some(planned.fault)
    }

    async fn forward(
        &self,
        method: Method,
        path: &str,
        headers: header::HeaderMap,
        body: Bytes,
    ) -> Result<Response<Body>> {
        let mut request =
            self.http.request(method.clone(), format!("{}{path}", self.upstream)).bearer_auth(&self.token);
        for (name, value) in headers.iter().filter(|(name, _)| *name == header::CONTENT_TYPE || *name == header::ACCEPT)
        {
            request = request.header(name, value);
        }
        let answer = request.body(body.clone()).send().await?;
        if method == Method::POST && answer.status() == StatusCode::CREATED {
            let name = name(&method, path, &body).unwrap_or_default();
            let path = path.split('?').next().unwrap_or_default().to_owned();
            *self.seen().created.entry((path, name)).or_default() += 1;
        }
        let mut response = Response::builder().status(answer.status());
        if let Some(kind) = answer.headers().get(header::CONTENT_TYPE) {
            response = response.header(header::CONTENT_TYPE, kind);
        }
        Ok(response.body(Body::from_stream(answer.bytes_stream()))?)
    }
}

/// The name of the object that a write is about: in the path, or of the new object.
fn name(method: &Method, path: &str, body: &[u8]) -> Option<String> {
    if method == Method::POST {
        let body: Value = serde_json::from_slice(body).ok()?;
        return body["metadata"]["name"].as_str().map(str::to_owned);
    }
    let path = path.split('?').next()?;
    path.trim_end_matches("/status").rsplit('/').next().map(str::to_owned)
}

async fn answer(State(state): State<Arc<ProxyState>>, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let Ok(body) = to_bytes(body, MOST_BYTES).await else { return broken() };
    if path.contains(LEASES) && state.has_slow_leases.load(Ordering::Relaxed) {
        tokio::time::sleep(SLOW).await;
    }
    let fault = state.next(&parts.method, &path, &body);
    if fault == Some(Fault::Delayed) {
        tokio::time::sleep(DELAY).await;
    }
    match fault {
        Some(Fault::Lost) => return broken(),
        Some(Fault::ServerError) => return refused(StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        Some(Fault::Conflict) => return refused(StatusCode::CONFLICT, "Conflict"),
        _ => {}
    }
    let Ok(answer) = state.forward(parts.method, &path, parts.headers, body).await else { return broken() };
    match fault {
        Some(Fault::AnswerLost) => broken(),
        Some(Fault::ServerErrorAfter) => refused(StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        _ => answer,
    }
}

/// An answer that breaks off: the connection is closed before its end.
fn broken() -> Response<Body> {
    let pieces = futures::stream::iter([Err::<Bytes, _>(std::io::Error::other("broken by a test"))]);
    Response::builder().header(header::CONTENT_LENGTH, 64).body(Body::from_stream(pieces)).expect("a valid response")
}

fn refused(status: StatusCode, reason: &str) -> Response<Body> {
    let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason,
        "message": "spoilt by a test", "code": status.as_u16()});
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_string()))
        .expect("a valid response")
}
