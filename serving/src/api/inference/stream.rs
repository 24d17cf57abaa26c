//! `ModelStreamInfer`, Triton's extension: several requests over one stream, answered at the same time.
//!
//! The stream of responses owns the answers: a client that goes away drops it, and so cancels them. Once the process is no
//! longer ready, no request of a stream is read any more; the stream ends after the answers in progress, with UNAVAILABLE.

use std::{
    future::ready,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use athanor_telemetry::Readiness;
use axum::http::HeaderMap;
use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use prost::Message;
use tonic::{Code, Status};
use tracing::{Instrument, Span};

use super::{
    answers,
    generation::{FINAL, is_final, set},
    protocol::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse, infer_parameter::ParameterChoice},
};
use crate::{
    api::observe,
    capacity::{Capacity, Held},
    service::Service,
};

/// The responses to all requests of a stream.
pub type Responses = BoxStream<'static, Result<ModelStreamInferResponse, Status>>;

/// Metadata by which a client wants an error as the status of the stream, which ends by it. Otherwise errors are messages in
/// the stream.
pub const STATUS_ERRORS: &str = "triton_grpc_error";
/// Most requests of a stream that are answered at the same time; others wait.
pub const MOST_AT_ONCE: usize = 64;
const ROUTE: &str = "ModelStreamInfer";

/// What all requests of a stream share.
pub struct Opened {
    pub service: Arc<Service>,
    /// Id of the stream, for logs and traces.
    pub request_id: String,
    /// Metadata of the stream.
    pub incoming: HeaderMap,
    pub ready: Readiness,
    /// The capacity that the bytes of the requests are taken from; absent: none.
    pub capacity: Option<Capacity>,
}

/// Whether the metadata of a stream asks for errors as statuses.
pub fn wants_status(metadata: &HeaderMap) -> bool {
    metadata.get(STATUS_ERRORS).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true"))
}

/// The status that ends a stream of a process that is shutting down.
pub fn leaving() -> Status {
    Status::unavailable("the server is shutting down")
}

/// An error as a message in a stream. `id`: that of the request.
pub fn message(id: String, status: &Status) -> ModelStreamInferResponse {
    let error_message = match status.message() {
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    };
    let mut response = ModelInferResponse { id, ..Default::default() };
    set(&mut response, FINAL, ParameterChoice::BoolParam(true));
    ModelStreamInferResponse { error_message, infer_response: Some(response) }
}

/// Answers the requests of a stream.
pub fn respond(
    opened: Opened,
    requests: impl Stream<Item = Result<ModelInferRequest, Status>> + Send + 'static,
) -> Responses {
    let opened = Arc::new(opened);
    let is_leaving = Arc::new(AtomicBool::new(false));
    let lost = {
        let (ready, is_leaving) = (opened.ready.clone(), is_leaving.clone());
        async move {
            ready.lost().await;
            is_leaving.store(true, Ordering::Relaxed);
        }
    };
    let each = move |request: Result<ModelInferRequest, Status>| match request {
        Ok(request) => one(opened.clone(), request),
        Err(status) => stream::once(ready(Err(status))).boxed(),
    };
    let end = stream::once(async move { is_leaving.load(Ordering::Relaxed).then(|| Err(leaving())) });
    let answered = requests.take_until(lost).map(each).flatten_unordered(MOST_AT_ONCE);
    answered.chain(end.filter_map(ready)).boxed()
}

/// Takes a request's bytes from the capacity.
///
/// # Errors
/// Fewer are left.
pub fn hold(capacity: Option<&Capacity>, request: &ModelInferRequest) -> Result<Held, Status> {
    let held = capacity.map(|capacity| capacity.hold(request.encoded_len())).transpose()?;
    Ok(held.unwrap_or_default())
}

/// One request in progress.
struct Answering {
    _held: Held,
    responses: answers::Responses,
    id: String,
    wants_status: bool,
    span: Span,
    started: Instant,
    /// How it ended, if it has.
    code: Code,
}

fn one(opened: Arc<Opened>, request: ModelInferRequest) -> Responses {
    let Opened { service, request_id, incoming, capacity, .. } = &*opened;
    let (id, wants_status) = (request.id.clone(), wants_status(incoming));
    let held = match hold(capacity.as_ref(), &request) {
        Ok(held) => held,
        Err(status) if wants_status => return stream::once(ready(Err(status))).boxed(),
        Err(status) => return stream::once(ready(Ok(message(id, &status)))).boxed(),
    };
    let span = answers::span(service, ROUTE, request_id, incoming);
    let answering = Answering {
        _held: held,
        id,
        responses: answers::parts(service.clone(), request, incoming.clone()),
        wants_status,
        span,
        started: Instant::now(),
        code: Code::Cancelled,
    };
    stream::unfold(answering, |mut answering| async {
        let response = answering.next().await?;
        Some((response, answering))
    })
    .boxed()
}

impl Answering {
    async fn next(&mut self) -> Option<Result<ModelStreamInferResponse, Status>> {
        let response = self.responses.next().instrument(self.span.clone()).await?;
        Some(match response {
            Ok(response) => {
                if is_final(&response) {
                    self.code = Code::Ok;
                }
                Ok(ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) })
            }
            Err(status) => {
                self.code = status.code();
                match self.wants_status {
                    true => Err(status),
                    false => Ok(message(self.id.clone(), &status)),
                }
            }
        })
    }
}

impl Drop for Answering {
    /// Also if the client has left: the code is Cancelled then.
    fn drop(&mut self) {
        observe::counted(ROUTE, format!("{:?}", self.code));
        observe::timed(ROUTE, self.started);
    }
}
