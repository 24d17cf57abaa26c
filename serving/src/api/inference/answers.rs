//! What the model answers to one request: one response, or a language model's text piece by piece.
//!
//! The pieces own the answer: whoever drops them cancels it.

use std::{future::ready, sync::Arc};

use athanor_contract::process::header;
use axum::http::HeaderMap;
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use tonic::{Status, metadata::MetadataValue};
use tracing::Span;

use super::{
    errors::{of_generation, of_service, of_tensor},
    generation::{self, FINAL, PROMPT_TOKENS, set, set_tokens},
    protocol::{ModelInferRequest, ModelInferResponse, infer_parameter::ParameterChoice},
    tensors,
};
use crate::{
    api::{headers, observe},
    engine::generate::{Adapter, GenerateError},
    service::{Inputs, Kind, Service, ServiceError, answer::Answer, generate::Answers, select::Selection},
};

/// The responses to one request of a stream. The last one says so, or is an error.
pub type Responses = BoxStream<'static, Result<ModelInferResponse, Status>>;

/// The span of a request, as a child of the trace that `incoming` names.
pub fn span(service: &Service, route: &str, request_id: &str, incoming: &HeaderMap) -> Span {
    match service.kind() {
        Kind::Classifier => observe::classification(request_id, &service.revision, incoming),
        Kind::Embedder | Kind::Generator => observe::generation(route, request_id, &service.revision, incoming),
    }
}

/// The adapter that a request's metadata names as the revision that answers.
pub fn revision(service: &Service, incoming: &HeaderMap) -> Option<Adapter> {
    service.adapter(incoming.get(headers::ADAPTER)?.to_str().ok()?)
}

/// Chooses the weights for a request. Refuses one for another model, revision or adapter.
pub fn select(
    service: &Service,
    model: &str,
    version: Option<&str>,
    incoming: &HeaderMap,
) -> Result<Selection, Status> {
    let revision = revision(service, incoming);
    if let (None, Some(name)) = (&revision, incoming.get(headers::ADAPTER)) {
        let mut status = Status::not_found(format!("{}: there is no adapter {name:?} here", headers::ADAPTER));
        // By it a router sees that this is not the adapter's own answer.
        if let Ok(own) = MetadataValue::try_from(service.revision.as_str()) {
            status.metadata_mut().insert(header::REVISION, own);
        }
        return Err(status);
    }
    let selection = service.select(Some(model), revision).map_err(of_service)?;
    match version {
        Some(version) if !version.is_empty() && version != selection.revision => {
            Err(of_service(ServiceError::UnknownModel {
                asked: format!("{model}:{version}"),
                known: format!("{model}:{}", selection.revision),
            }))
        }
        _ => Ok(selection),
    }
}

/// The only response to a request.
pub async fn whole(
    service: &Service,
    request: &ModelInferRequest,
    incoming: &HeaderMap,
) -> Result<ModelInferResponse, Status> {
    let selection = select(service, &request.model_name, request.model_version.as_deref(), incoming)?;
    whole_of(service, request, &selection).await
}

async fn whole_of(
    service: &Service,
    request: &ModelInferRequest,
    selection: &Selection,
) -> Result<ModelInferResponse, Status> {
    match service.kind() {
        Kind::Classifier => classify(service, request, selection).await,
        Kind::Embedder => embed(service, request, selection).await,
        Kind::Generator => {
            let (_, answers) = generate(service, request, selection, false).await?;
            complete(request, selection, answers).await
        }
    }
}

/// The responses to a request of a stream.
pub fn parts(service: Arc<Service>, request: ModelInferRequest, incoming: HeaderMap) -> Responses {
    let begun = async move { begin(&service, &request, &incoming).await.unwrap_or_else(alone) };
    stream::once(begun).flatten().boxed()
}

fn alone(status: Status) -> Responses {
    stream::once(ready(Err(status))).boxed()
}

async fn begin(service: &Service, request: &ModelInferRequest, incoming: &HeaderMap) -> Result<Responses, Status> {
    let selection = select(service, &request.model_name, request.model_version.as_deref(), incoming)?;
    if service.kind() == Kind::Generator {
        let (is_stream, answers) = generate(service, request, &selection, true).await?;
        if is_stream {
            return pieces(request, &selection, answers);
        }
        let response = complete(request, &selection, answers).await?;
        return Ok(stream::once(ready(Ok(last(response)))).boxed());
    }
    let response = whole_of(service, request, &selection).await?;
    Ok(stream::once(ready(Ok(last(response)))).boxed())
}

fn last(mut response: ModelInferResponse) -> ModelInferResponse {
    set(&mut response, FINAL, ParameterChoice::BoolParam(true));
    response
}

/// A response without outputs.
fn empty(request: &ModelInferRequest, selection: &Selection) -> ModelInferResponse {
    ModelInferResponse {
        model_name: selection.model.clone(),
        model_version: selection.revision.clone(),
        id: request.id.clone(),
        ..Default::default()
    }
}

async fn classify(
    service: &Service,
    request: &ModelInferRequest,
    selection: &Selection,
) -> Result<ModelInferResponse, Status> {
    let classifier = service.classifier().map_err(of_service)?;
    tensors::check_outputs(request).map_err(of_tensor)?;
    let texts = tensors::decode_texts(request).map_err(of_tensor)?;
    let classified = classifier.classify(texts).await.map_err(of_service)?;
    observe::classified(&classified);
    let mut response = empty(request, selection);
    tensors::encode(request, &classifier.labels, &classified.results, &mut response).map_err(of_tensor)?;
    set_tokens(&mut response, PROMPT_TOKENS, classified.tokens);
    Ok(response)
}

async fn embed(
    service: &Service,
    request: &ModelInferRequest,
    selection: &Selection,
) -> Result<ModelInferResponse, Status> {
    let embedder = service.embedder().map_err(of_service)?;
    tensors::check_embedding(request).map_err(of_tensor)?;
    let texts = tensors::decode_texts(request).map_err(of_tensor)?;
    let embedded = embedder.embed(Inputs::Texts(texts)).await.map_err(of_service)?;
    let mut response = empty(request, selection);
    tensors::encode_vectors(request, embedder.size(), &embedded.vectors, &mut response).map_err(of_tensor)?;
    set_tokens(&mut response, PROMPT_TOKENS, embedded.tokens);
    Ok(response)
}

/// Starts the answer of a language model; returns as well whether it is wanted in pieces.
async fn generate(
    service: &Service,
    request: &ModelInferRequest,
    selection: &Selection,
    may_stream: bool,
) -> Result<(bool, Answers), Status> {
    let generator = service.generator().map_err(of_service)?;
    let asked = generation::read(request, selection.adapter.clone())?;
    if asked.is_stream && !may_stream {
        return Err(Status::invalid_argument("stream: ModelInfer has one response; ModelStreamInfer has several"));
    }
    let answers = generator.generate(asked.generation).await.map_err(of_service)?;
    Ok((asked.is_stream, answers))
}

fn is_raw(request: &ModelInferRequest) -> bool {
    !request.raw_input_contents.is_empty()
}

async fn complete(
    request: &ModelInferRequest,
    selection: &Selection,
    answers: Answers,
) -> Result<ModelInferResponse, Status> {
    let prompt_tokens = answers.prompt_tokens;
    let completed = answers.complete().await.map_err(|error| of_generation(&error))?;
    let one = completed.first().ok_or_else(|| of_generation(&GenerateError::Stopped))?;
    let mut response = empty(request, selection);
    let end = (one.reason, prompt_tokens, one.completion_tokens);
    generation::encode(is_raw(request), &one.text, Some(end), &mut response);
    Ok(response)
}

/// An answer in pieces.
struct Pieces {
    answer: Answer,
    prompt_tokens: usize,
    is_raw: bool,
    empty: ModelInferResponse,
}

fn pieces(request: &ModelInferRequest, selection: &Selection, answers: Answers) -> Result<Responses, Status> {
    let prompt_tokens = answers.prompt_tokens;
    let answer = answers.answers.into_iter().next().ok_or_else(|| of_generation(&GenerateError::Stopped))?;
    let pieces = Pieces { answer, prompt_tokens, is_raw: is_raw(request), empty: empty(request, selection) };
    Ok(stream::unfold(pieces, |mut pieces| async {
        let response = pieces.next().await?;
        Some((response, pieces))
    })
    .boxed())
}

impl Pieces {
    /// The next response; `None` after the last one or an error.
    async fn next(&mut self) -> Option<Result<ModelInferResponse, Status>> {
        let piece = match self.answer.next().await? {
            Ok(piece) => piece,
            Err(error) => return Some(Err(of_generation(&error))),
        };
        let mut response = self.empty.clone();
        let end = piece.end.map(|end| (end.reason, self.prompt_tokens, end.completion_tokens));
        generation::encode(self.is_raw, &piece.text, end, &mut response);
        set(&mut response, FINAL, ParameterChoice::BoolParam(end.is_some()));
        Some(Ok(response))
    }
}
