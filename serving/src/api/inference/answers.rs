//! What the model answers to one request: one response, or a language model's text piece by piece.
//!
//! The pieces own the answer: whoever drops them cancels it.

use std::{future::ready, sync::Arc};

use axum::http::HeaderMap;
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use tonic::Status;
use tracing::Span;

use super::{
    errors::{of_generation, of_service, of_tensor},
    generation::{self, FINAL, PROMPT_TOKENS, set, set_tokens},
    protocol::{ModelInferRequest, ModelInferResponse, infer_parameter::ParameterChoice},
    tensors,
};
use crate::{
    api::observe,
    engine::generate::GenerateError,
    service::{Inputs, Kind, Service, ServiceError, answer::Answer, generate::Answers},
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

/// Refuses a request for another model or revision.
pub fn check(service: &Service, model: &str, version: Option<&str>) -> Result<(), Status> {
    service.check_model(Some(model)).map_err(of_service)?;
    match version {
        Some(version) if !version.is_empty() && version != service.revision => {
            Err(of_service(ServiceError::UnknownModel {
                asked: format!("{model}:{version}"),
                known: format!("{model}:{}", service.revision),
            }))
        }
        _ => Ok(()),
    }
}

/// The only response to a request.
pub async fn whole(service: &Service, request: &ModelInferRequest) -> Result<ModelInferResponse, Status> {
    check(service, &request.model_name, request.model_version.as_deref())?;
    match service.kind() {
        Kind::Classifier => classify(service, request).await,
        Kind::Embedder => embed(service, request).await,
        Kind::Generator => {
            let (_, answers) = generate(service, request, false).await?;
            complete(service, request, answers).await
        }
    }
}

/// The responses to a request of a stream.
pub fn parts(service: Arc<Service>, request: ModelInferRequest) -> Responses {
    let begun = async move { begin(&service, &request).await.unwrap_or_else(alone) };
    stream::once(begun).flatten().boxed()
}

fn alone(status: Status) -> Responses {
    stream::once(ready(Err(status))).boxed()
}

async fn begin(service: &Service, request: &ModelInferRequest) -> Result<Responses, Status> {
    check(service, &request.model_name, request.model_version.as_deref())?;
    if service.kind() == Kind::Generator {
        let (is_stream, answers) = generate(service, request, true).await?;
        if is_stream {
            return pieces(service, request, answers);
        }
        let response = complete(service, request, answers).await?;
        return Ok(stream::once(ready(Ok(last(response)))).boxed());
    }
    let response = whole(service, request).await?;
    Ok(stream::once(ready(Ok(last(response)))).boxed())
}

fn last(mut response: ModelInferResponse) -> ModelInferResponse {
    set(&mut response, FINAL, ParameterChoice::BoolParam(true));
    response
}

/// A response without outputs.
fn empty(service: &Service, request: &ModelInferRequest) -> ModelInferResponse {
    ModelInferResponse {
        model_name: service.model_name.clone(),
        model_version: service.revision.clone(),
        id: request.id.clone(),
        ..Default::default()
    }
}

async fn classify(service: &Service, request: &ModelInferRequest) -> Result<ModelInferResponse, Status> {
    let classifier = service.classifier().map_err(of_service)?;
    tensors::check_outputs(request).map_err(of_tensor)?;
    let texts = tensors::decode_texts(request).map_err(of_tensor)?;
    let classified = classifier.classify(texts).await.map_err(of_service)?;
    observe::classified(&classified);
    let mut response = empty(service, request);
    tensors::encode(request, &classifier.labels, &classified.results, &mut response).map_err(of_tensor)?;
    set_tokens(&mut response, PROMPT_TOKENS, classified.tokens);
    Ok(response)
}

async fn embed(service: &Service, request: &ModelInferRequest) -> Result<ModelInferResponse, Status> {
    let embedder = service.embedder().map_err(of_service)?;
    tensors::check_embedding(request).map_err(of_tensor)?;
    let texts = tensors::decode_texts(request).map_err(of_tensor)?;
    let embedded = embedder.embed(Inputs::Texts(texts)).await.map_err(of_service)?;
    let mut response = empty(service, request);
    tensors::encode_vectors(request, embedder.size(), &embedded.vectors, &mut response).map_err(of_tensor)?;
    set_tokens(&mut response, PROMPT_TOKENS, embedded.tokens);
    Ok(response)
}

/// Starts the answer of a language model; returns as well whether it is wanted in pieces.
async fn generate(service: &Service, request: &ModelInferRequest, may_stream: bool) -> Result<(bool, Answers), Status> {
    let generator = service.generator().map_err(of_service)?;
    let asked = generation::read(request)?;
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
    service: &Service,
    request: &ModelInferRequest,
    answers: Answers,
) -> Result<ModelInferResponse, Status> {
    let prompt_tokens = answers.prompt_tokens;
    let completed = answers.complete().await.map_err(|error| of_generation(&error))?;
    let one = completed.first().ok_or_else(|| of_generation(&GenerateError::Stopped))?;
    let mut response = empty(service, request);
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

fn pieces(service: &Service, request: &ModelInferRequest, answers: Answers) -> Result<Responses, Status> {
    let prompt_tokens = answers.prompt_tokens;
    let answer = answers.answers.into_iter().next().ok_or_else(|| of_generation(&GenerateError::Stopped))?;
    let pieces = Pieces { answer, prompt_tokens, is_raw: is_raw(request), empty: empty(service, request) };
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
