//! What all HTTP routes share: which revision a request goes to, its way to a server, and the answer's way back.

use std::sync::Arc;

use athanor_contract::process::failure;
use athanor_serving::api::{headers, openai::ApiError};
use axum::{
    body::Body,
    http::{
        HeaderMap, HeaderName, Method, StatusCode, Uri,
        header::{
            ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, RETRY_AFTER, TE, TRAILER,
            TRANSFER_ENCODING, UPGRADE,
        },
        request::Parts,
    },
    response::{IntoResponse, Response},
};
use bytes::Bytes;

use crate::{
    access::Caller,
    adapter,
    analysis::Answer as Worth,
    balance::{
        client::ClientError,
        endpoints::{Endpoint, Snapshot},
        forward::{self, Attempt, ForwardError, Forwarded, Policy},
        select::Target,
    },
    gateway::Gateway,
    record::request_id::RequestId,
};

/// Headers that belong to one connection, and those that the client library writes itself. Answers are recorded, so
/// servers do not compress them. A client's key is the router's to check and nobody else's to see.
const NOT_PASSED_ON: [HeaderName; 12] = [
    ACCEPT_ENCODING,
    AUTHORIZATION,
    CONNECTION,
    CONTENT_LENGTH,
    EXPECT,
    HOST,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// The revision that answered, for the metrics around.
#[derive(Clone)]
pub struct AnsweredBy(pub Arc<str>);

/// Who sent the request; `None` if the router asks nobody.
#[derive(Clone)]
pub struct AdmittedCaller(pub Option<Arc<Caller>>);

/// The id that the client gets, by which feedback to the answer is accepted.
#[derive(Clone)]
pub struct ProvenId(pub String);

/// An error with the revision it is about, if there is one.
pub struct ApiErrorOf {
    pub error: ApiError,
    pub revision: Option<Arc<str>>,
}

impl From<ApiError> for ApiErrorOf {
    fn from(error: ApiError) -> Self {
        Self { error, revision: None }
    }
}

impl IntoResponse for ApiErrorOf {
    fn into_response(self) -> Response {
        let response = self.error.into_response();
        match self.revision {
            Some(revision) => by(response, revision),
            None => response,
        }
    }
}

impl From<ForwardError> for ApiErrorOf {
    fn from(error: ForwardError) -> Self {
        let message = error.to_string();
        let revision = Some(error.revision()).filter(|name| !name.is_empty()).map(Arc::from);
        let error = match error {
            ForwardError::NoEndpoint { .. } => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_endpoint", message),
            ForwardError::Failed { .. } => ApiError::new(StatusCode::BAD_GATEWAY, "no_answer", message),
            ForwardError::Timeout { .. } => ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message),
            ForwardError::Overloaded { .. } => ApiError::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message),
            ForwardError::Full { retry_after, .. } => ApiError {
                retry_after: Some(retry_after),
                ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
            },
        };
        Self { error, revision }
    }
}

/// Names the revision in the answer.
pub fn by(mut response: Response, revision: Arc<str>) -> Response {
    response.headers_mut().insert(headers::REVISION, headers::text(&revision));
    response.extensions_mut().insert(AnsweredBy(revision));
    response
}

/// The caller of a request, if the router asks for one.
pub fn caller(parts: &Parts) -> Option<&Arc<Caller>> {
    parts.extensions.get::<AdmittedCaller>().and_then(|caller| caller.0.as_ref())
}

/// The request's id.
pub fn id(parts: &Parts) -> Result<RequestId, ApiError> {
    let missing = || ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "no_request_id", "the request was given no id");
    parts.extensions.get::<RequestId>().copied().ok_or_else(missing)
}

/// The target of a request: by weight, or the revision that `x-athanor-revision` names.
pub fn target(snapshot: &Snapshot, headers: &HeaderMap, hash: u64) -> Result<Target, ApiError> {
    let Some(pinned) = headers.get(headers::REVISION) else { return Ok(Target::Weighted(hash)) };
    let name = String::from_utf8_lossy(pinned.as_bytes()).into_owned();
    if snapshot.revision(&name).is_some() {
        return Ok(Target::Pinned(name));
    }
    let known =
        snapshot.revisions.iter().map(|revision| format!("{:?}", &*revision.name)).collect::<Vec<_>>().join(", ");
    let shown: String = name.chars().take(80).collect();
    let message = format!("there is no revision {shown:?}; the revisions are {known}");
    Err(ApiError::new(StatusCode::NOT_FOUND, "revision_not_found", message).param(headers::REVISION.as_str()))
}

/// What kind of request is passed on.
#[derive(Clone, Copy)]
pub struct Way {
    pub policy: Policy,
    /// Whether it runs the model, and so counts in the analysis of a canary.
    pub is_counted: bool,
    /// Whether its `model` selects an adapter, which answers instead of the revision.
    pub selects: bool,
}

/// Returns whether the `model` of a request selects an adapter.
pub fn selects_adapter(gateway: &Gateway, body: &[u8]) -> bool {
    let config = gateway.registry.snapshot().config.clone();
    config.is_some_and(|config| adapter::selected(&config.adapters, body).is_some())
}

/// Passes a request on to a revision's server. `send` sends it to one server; what it returns decides about the attempt.
pub async fn pass_on<T, F>(
    gateway: &Gateway,
    parts: &Parts,
    id: &RequestId,
    body: &Bytes,
    way: Way,
    send: impl Fn(axum::http::Request<Body>) -> F,
) -> Result<Forwarded<axum::http::Response<T>>, ApiErrorOf>
where
    F: Future<Output = Result<axum::http::Response<T>, ClientError>>,
{
    let target = target(&gateway.registry.snapshot(), &parts.headers, id.hash)?;
    let passed = passed_on(&parts.headers, id);
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let attempt = |endpoint: Arc<Endpoint>, revision: Option<Arc<str>>| {
        // The header would win over the `model` of the request.
        let revision = revision.filter(|_| !way.selects);
        let headers = with_adapter(&passed, revision.as_deref());
        let sent = request(&endpoint, parts.method.clone(), path, headers, body.clone()).map(&send);
        async move {
            match sent {
                Ok(sent) => match (sent.await, revision) {
                    (Ok(answer), Some(revision)) if lacks(&answer, &revision) => Attempt::Lacking { answer },
                    (Ok(answer), _) if way.selects && answer.status() == StatusCode::NOT_FOUND => {
                        Attempt::Lacking { answer }
                    }
                    (answer, _) => outcome(&endpoint, answer),
                },
                Err(error) => Attempt::Lost { failure: format!("{path} cannot be passed on: {error}") },
            }
        }
    };
    let analysis = (way.is_counted && !way.selects && target.is_by_weight()).then_some(&*gateway.analysis);
    Ok(forward::forward(&gateway.registry, analysis, &target, way.policy, |_| true, attempt).await?)
}

/// Returns whether a server has answered that it does not have an adapter. What the adapter answers, errors included, has its
/// name; adapters are loaded while a server runs, so another server may have it already.
fn lacks<T>(answer: &axum::http::Response<T>, adapter: &str) -> bool {
    let by = answer.headers().get(headers::REVISION).map(|name| name.as_bytes());
    answer.status() == StatusCode::NOT_FOUND && by.is_some_and(|name| name != adapter.as_bytes())
}

fn outcome<T>(
    endpoint: &Endpoint,
    outcome: Result<axum::http::Response<T>, ClientError>,
) -> Attempt<axum::http::Response<T>> {
    match outcome {
        Ok(answer) => match answer.status() {
            StatusCode::TOO_MANY_REQUESTS => Attempt::Busy { retry_after: retry_after(&answer), answer },
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                Attempt::Unavailable { answer }
            }
            // The last is llama.cpp's for what a model or its options do not offer.
            status if status.is_client_error() || status == StatusCode::NOT_IMPLEMENTED => Attempt::Refused { answer },
            status if status.is_server_error() => {
                let is_not_finite =
                    answer.headers().get(headers::FAILURE).is_some_and(|why| why == failure::NOT_FINITE);
                let worth = if is_not_finite { Worth::NotFinite } else { Worth::Failed };
                Attempt::Answer { answer, worth }
            }
            _ => Attempt::Answer { answer, worth: Worth::Good },
        },
        Err(ClientError::Connect(error)) => Attempt::Unreached { failure: format!("{}: {error}", endpoint.http) },
        Err(ClientError::Full(failure)) => Attempt::Unheld { failure },
        Err(ClientError::Lost(error)) => Attempt::Lost { failure: format!("{}: {error}", endpoint.http) },
    }
}

/// Seconds of `Retry-After`; none of a date or without the header.
fn retry_after<T>(answer: &axum::http::Response<T>) -> Option<u64> {
    answer.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()
}

/// The headers of an attempt, with the adapter that makes the revision out of the server's model.
pub fn with_adapter(passed: &HeaderMap, adapter: Option<&str>) -> HeaderMap {
    let mut passed = passed.clone();
    if let Some(adapter) = adapter {
        passed.insert(headers::ADAPTER, headers::text(adapter));
    }
    passed
}

/// The headers for a server: the client's, with our id and the current trace. Which adapter a revision is, is not the client's
/// to say.
pub fn passed_on(incoming: &HeaderMap, id: &RequestId) -> HeaderMap {
    let mut passed = HeaderMap::with_capacity(incoming.len() + 2);
    let named = named_by_connection(incoming);
    for (name, value) in incoming {
        let is_ours = NOT_PASSED_ON.contains(name)
            || [headers::REVISION, headers::ADAPTER].contains(name)
            || named.contains(name);
        if !is_ours && !name.as_str().starts_with("proxy-") {
            passed.append(name.clone(), value.clone());
        }
    }
    passed.insert(headers::REQUEST_ID, headers::text(&id.unproven()));
    athanor_telemetry::propagation::inject_current(&mut passed);
    passed
}

fn request(
    endpoint: &Endpoint,
    method: Method,
    path: &str,
    headers: HeaderMap,
    body: Bytes,
) -> Result<axum::http::Request<Body>, axum::http::Error> {
    let uri: Uri = format!("http://{}{path}", endpoint.http).parse()?;
    let mut request = axum::http::Request::builder().method(method).uri(uri).body(Body::from(body))?;
    *request.headers_mut() = headers;
    Ok(request)
}

/// Removes what belongs to the connection to the server from the head of its answer.
pub fn clean(headers: &mut HeaderMap) {
    for name in NOT_PASSED_ON.into_iter().chain(named_by_connection(headers)) {
        headers.remove(name);
    }
}

/// The headers that `Connection` makes the connection's own (RFC 9110, 7.6.1).
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok()).collect()
}
