//! `ModelStreamInfer` through the router: several requests over one stream of a client, each passed on by itself to a revision of its
//! own choosing, and retried until its first response has arrived.
//!
//! A task carries each answer, as of HTTP's streams ([`super::stream`]). It ends with the answer, at the time limit of the request,
//! or when the client goes; then it drops the server's stream, which cancels the answer.

use std::{
    future::ready,
    sync::Arc,
    time::{Duration, Instant},
};

use athanor_contract::serve::Scope;
use athanor_serving::{
    api::{
        headers,
        inference::{
            generation::{is_final, is_generation, reported_tokens, set},
            label,
            protocol::{
                ModelInferRequest, ModelInferResponse, ModelStreamInferResponse, infer_parameter::ParameterChoice,
            },
            stream::{MOST_AT_ONCE, STATUS_ERRORS, hold, leaving, message, wants_status},
        },
    },
    capacity::Capacity,
};
use athanor_telemetry::Readiness;
use axum::http::HeaderMap;
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use tokio::{
    sync::{Semaphore, mpsc},
    time::timeout_at,
};
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{AsciiMetadataKey, AsciiMetadataValue},
};
use tracing::Instrument;

use super::{
    call::{self, Client, Passed, Route},
    stream::count,
};
use crate::{access::Meter, balance::forward::Forwarded, gateway::Gateway, record::generation::Recorder};

/// The responses to all requests of a stream.
pub type Responses = BoxStream<'static, Result<ModelStreamInferResponse, Status>>;

type Sender = mpsc::Sender<Result<ModelStreamInferResponse, Status>>;

/// What all requests of a client's stream share.
struct Exchange {
    gateway: Arc<Gateway>,
    /// Metadata of the stream.
    incoming: HeaderMap,
    sender: Sender,
    /// The capacity that the bytes of the requests are taken from; absent: none.
    capacity: Option<Capacity>,
}

/// Takes a client's stream.
///
/// # Errors
/// It has no key of a caller who may send requests. The requests are counted one by one.
pub fn open(
    gateway: Arc<Gateway>,
    ready: Readiness,
    request: Request<Streaming<ModelInferRequest>>,
) -> Result<Response<Responses>, Status> {
    let (metadata, extensions, requests) = request.into_parts();
    let incoming = metadata.into_headers();
    let id = gateway.ids.generate().unproven();
    if let Some(access) = &gateway.access
        && let Err(denied) = access.identify(&incoming, Scope::Infer)
    {
        let mut status = call::denied(denied);
        label(status.metadata_mut(), &id, "");
        return Err(status);
    }
    let (sender, mut receiver) = mpsc::channel(1);
    let exchange = Exchange { gateway, incoming, sender, capacity: Capacity::of(&extensions) };
    tokio::spawn(read(Arc::new(exchange), ready, requests).in_current_span());
    let responses = stream::poll_fn(move |context| receiver.poll_recv(context)).boxed();
    let mut response = Response::new(responses);
    label(response.metadata_mut(), &id, "");
    Ok(response)
}

/// Reads the requests of a stream and has each answered. The client's stream ends with the last answer.
async fn read(exchange: Arc<Exchange>, ready: Readiness, requests: Streaming<ModelInferRequest>) {
    let places = Arc::new(Semaphore::new(MOST_AT_ONCE));
    let next = async {
        let mut requests = requests;
        loop {
            let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
            match requests.next().await {
                Some(Ok(request)) => {
                    let exchange = exchange.clone();
                    let answering = async move {
                        exchange.answer(request).await;
                        drop(place);
                    };
                    tokio::spawn(answering.in_current_span());
                }
                Some(Err(status)) => {
                    // Fails when the client is gone.
                    let _ = exchange.sender.send(Err(status)).await;
                    return;
                }
                None => return,
            }
        }
    };
    tokio::select! {
        () = next => return,
        () = exchange.sender.closed() => return,
        () = ready.lost() => {}
    }
    let ended = async {
        let _all = places.acquire_many(MOST_AT_ONCE as u32).await;
        let _ = exchange.sender.send(Err(leaving())).await;
    };
    tokio::select! {
        () = ended => {}
        () = exchange.sender.closed() => {}
    }
}

/// The first response to a request, and the stream of those that follow.
type Begun = (ModelStreamInferResponse, Streaming<ModelStreamInferResponse>);

/// Sends one request over a stream of its own and waits for the first response. An error is the status of the stream.
async fn begin(mut client: Client, request: Request<ModelInferRequest>) -> Result<Response<Begun>, Status> {
    let (mut metadata, extensions, message) = request.into_parts();
    metadata.insert(AsciiMetadataKey::from_static(STATUS_ERRORS), AsciiMetadataValue::from_static("true"));
    let requests = stream::once(ready(message));
    let response = client.model_stream_infer(Request::from_parts(metadata, extensions, requests)).await?;
    let (metadata, mut responses, extensions) = response.into_parts();
    match responses.message().await? {
        Some(first) => Ok(Response::from_parts(metadata, (first, responses), extensions)),
        None => Err(Status::internal("the server's stream ended without a response")),
    }
}

/// How an answer ended.
enum End {
    Whole,
    /// The server's stream broke off, or said that the model failed.
    Broken(Status),
    /// The server was not done in time.
    Late,
    /// The client did not read in time.
    Unread,
    /// The client went away.
    Gone,
}

/// What counts when an answer has ended.
struct Account {
    revision: Arc<str>,
    /// Whether an answer that breaks off is an error of the revision.
    is_by_weight: bool,
    began: Instant,
    /// Longest duration of the request.
    limit: Duration,
}

impl Exchange {
    /// Answers one request.
    async fn answer(&self, request: ModelInferRequest) {
        let gateway = &self.gateway;
        let _held = match hold(self.capacity.as_ref(), &request) {
            Ok(held) => held,
            Err(status) => return self.fail(&request, "", "", status).await,
        };
        let began = Instant::now();
        // A shutdown waits for answers of language models.
        let is_generation = is_generation(&request);
        let _running = is_generation.then(|| gateway.running.begin());
        let (policy, selects) = (call::policy(gateway, &request), call::selects_adapter(gateway, &request));
        let route = Route { name: "ModelStreamInfer", is_counted: true, policy, selects, is_generation };
        let passed = tokio::select! {
            passed = call::pass_on(gateway, route, &self.incoming, request.clone(), begin) => passed,
            () = self.sender.closed() => return,
        };
        let Passed { id, caller, is_by_weight, result } = passed;
        let Forwarded { answer, revision, latency, outstanding } = match result {
            Ok(forwarded) => forwarded,
            Err(status) => return self.fail(&request, &id.unproven(), "", status).await,
        };
        let begun = match answer {
            Ok(response) => response.into_inner(),
            Err(status) => return self.fail(&request, &id.unproven(), &revision, status).await,
        };
        let mut carrier = Carrier {
            sender: &self.sender,
            deadline: (began + route.policy.timeout).into(),
            shown: id.unproven(),
            revision: &revision,
            is_done: false,
            recorder: call::recorder(gateway, &request, id),
            meter: call::meter(caller.as_ref(), &request),
        };
        if let Some(recorder) = &carrier.recorder {
            carrier.shown.clone_from(&recorder.request_id);
        } else if let (Some(config), Some(response)) = (gateway.records(), &begun.0.infer_response) {
            let answer = (id, &revision, latency);
            let proven = call::record_classification(gateway, &config, &request, response, answer).await;
            if let Some(proven) = proven {
                carrier.shown = proven;
            }
        }
        let end = carrier.carry(begun).await;
        // The server is free, whatever the client still has to read.
        drop(outstanding);
        let Carrier { recorder, shown, .. } = carrier;
        let account = Account { revision: revision.clone(), is_by_weight, began, limit: route.policy.timeout };
        if let Some(status) = self.settle(end, recorder, account) {
            self.fail(&request, &shown, &revision, status).await;
        }
    }

    /// Records an answer that is whole and counts another; returns the error that the client has to get.
    fn settle(&self, end: End, recorder: Option<Recorder>, account: Account) -> Option<Status> {
        let Account { revision, is_by_weight, began, limit } = account;
        let seconds = limit.as_secs();
        let (code, status) = match end {
            End::Whole => {
                if let Some(recorder) = recorder {
                    self.gateway.record_generations(recorder, &revision, began.elapsed());
                }
                return None;
            }
            End::Gone => {
                count("client_gone", &revision);
                return None;
            }
            // A slow client is nobody's error but its own.
            End::Unread => {
                tracing::warn!(revision = &*revision, "an answer was not read within {seconds} s");
                count("timeout", &revision);
                return None;
            }
            End::Broken(status) => {
                let message = format!("the answer broke off: {}", status.message());
                ("stream_interrupted", Status::new(status.code(), message))
            }
            End::Late => {
                let message = format!("the answer was not complete within {seconds} s");
                ("timeout", Status::deadline_exceeded(message))
            }
        };
        count(code, &revision);
        if is_by_weight {
            self.gateway.analysis.of(&revision).broken();
        }
        tracing::warn!(revision = &*revision, message = status.message(), "an answer was not passed on to its end");
        Some(status)
    }

    /// Sends an error: as the end of the stream if the client wants that, else as a message.
    async fn fail(&self, request: &ModelInferRequest, id: &str, revision: &str, status: Status) {
        let failed = if wants_status(&self.incoming) {
            Err(Status::new(status.code(), status.message()))
        } else {
            let mut message = message(request.id.clone(), &status);
            if let Some(response) = &mut message.infer_response {
                name(response, id, revision);
            }
            Ok(message)
        };
        // Fails when the client is gone, to whom it no longer matters.
        let _ = self.sender.send(failed).await;
    }
}

/// Puts the request's id, by which feedback is accepted, and the revision into the parameters of a response: a stream has several
/// requests, and its metadata is sent before the first of them.
fn name(response: &mut ModelInferResponse, id: &str, revision: &str) {
    for (name, value) in [(headers::REQUEST_ID, id), (headers::REVISION, revision)] {
        if !value.is_empty() {
            set(response, name.as_str(), ParameterChoice::StringParam(value.into()));
        }
    }
}

/// Carries the responses to one request.
struct Carrier<'a> {
    sender: &'a Sender,
    deadline: tokio::time::Instant,
    /// The id that the client gets.
    shown: String,
    revision: &'a str,
    /// Whether the last response has been handed on.
    is_done: bool,
    recorder: Option<Recorder>,
    meter: Option<Meter>,
}

impl Carrier<'_> {
    /// Carries an answer to its end.
    async fn carry(&mut self, (first, mut rest): Begun) -> End {
        let mut next = Some(first);
        while let Some(response) = next {
            if let Err(end) = self.hand_on(response).await {
                return end;
            }
            let arrived = tokio::select! {
                // First, so that an answer that is whole is not taken for one that nobody waits for.
                biased;
                arrived = rest.message() => arrived,
                () = self.sender.closed() => Ok(None),
                () = tokio::time::sleep_until(self.deadline) => return if self.is_done { End::Whole } else { End::Late },
            };
            next = match arrived {
                _ if self.is_done => return End::Whole,
                Ok(next) => next,
                Err(status) => return End::Broken(status),
            };
        }
        match self.sender.is_closed() {
            true => End::Gone,
            false => End::Broken(Status::internal("the last response is missing")),
        }
    }

    /// Hands a response on, and only then looks at it.
    async fn hand_on(&mut self, mut response: ModelStreamInferResponse) -> Result<(), End> {
        if !response.error_message.is_empty() {
            return Err(End::Broken(Status::internal(response.error_message)));
        }
        if let Some(response) = &mut response.infer_response {
            name(response, &self.shown, self.revision);
        }
        match timeout_at(self.deadline, self.sender.send(Ok(response.clone()))).await {
            Ok(sent) => sent.map_err(|_| End::Gone)?,
            Err(_) => return Err(End::Unread),
        }
        let Some(response) = &response.infer_response else { return Ok(()) };
        self.is_done = is_final(response);
        if let Some(recorder) = &mut self.recorder {
            call::take(recorder, response);
        }
        if let Some(meter) = &mut self.meter {
            meter.part();
            if let Some(tokens) = reported_tokens(response) {
                meter.report(tokens);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_names_its_request_and_revision() {
        let mut response = ModelInferResponse::default();
        name(&mut response, "r-1", "");
        assert_eq!(response.parameters.keys().collect::<Vec<_>>(), ["x-request-id"]);
        name(&mut response, "r-2", "a");
        let choice = |name: &str| response.parameters[name].parameter_choice.clone().unwrap();
        assert_eq!(choice("x-request-id"), ParameterChoice::StringParam("r-2".into()));
        assert_eq!(choice("x-athanor-revision"), ParameterChoice::StringParam("a".into()));
    }
}
