//! The one place where an error becomes a gRPC status.

use athanor_contract::process::{failure, header};
use axum::http::StatusCode;
use tonic::{Status, metadata::MetadataValue};

use super::contents::TensorError;
use crate::{
    api::openai::error::ApiError,
    engine::{
        encode::EngineError,
        generate::{GenerateError, sampling::LogitsError},
    },
    service::ServiceError,
};

pub fn of_service(error: ServiceError) -> Status {
    let message = error.to_string();
    match error {
        ServiceError::UnknownModel { .. } => Status::not_found(message),
        ServiceError::WrongKind { .. } => Status::unimplemented(message),
        ServiceError::NoInput
        | ServiceError::TooManyInputs { .. }
        | ServiceError::TooManyAnswers { .. }
        | ServiceError::EmptyInput { .. }
        | ServiceError::LongInput { .. }
        | ServiceError::LongText { .. }
        | ServiceError::UnknownToken { .. }
        | ServiceError::NoToken { .. }
        | ServiceError::Conversation(_)
        | ServiceError::Grammar(_) => Status::invalid_argument(message),
        ServiceError::Engine(EngineError::QueueFull { .. }) => Status::resource_exhausted(message),
        ServiceError::Engine(EngineError::Stopped) | ServiceError::Draining => Status::unavailable(message),
        ServiceError::NotFinite { .. } => not_finite(message),
        ServiceError::Engine(EngineError::Backend(_)) | ServiceError::Tokenizer(_) => Status::internal(message),
        ServiceError::Generate(error) => of_generation(&error),
    }
}

/// An answer of a language model that was refused or broke off.
pub fn of_generation(error: &GenerateError) -> Status {
    let message = error.to_string();
    match error {
        GenerateError::QueueFull { .. } | GenerateError::LongWait { .. } => Status::resource_exhausted(message),
        GenerateError::EmptyPrompt
        | GenerateError::TooLong { .. }
        | GenerateError::Invalid(_)
        | GenerateError::Constraint(_) => Status::invalid_argument(message),
        GenerateError::Logits(LogitsError::NotFinite { .. }) => not_finite(message),
        GenerateError::Logits(_) | GenerateError::Backend(_) | GenerateError::Adapter(_) => Status::internal(message),
        GenerateError::TimedOut { .. } => Status::deadline_exceeded(message),
        GenerateError::Stopped => Status::unavailable(message),
    }
}

/// An error of a model whose output is not finite, with the metadata by which a router counts it apart.
fn not_finite(message: String) -> Status {
    let mut status = Status::internal(message);
    status.metadata_mut().insert(header::FAILURE, MetadataValue::from_static(failure::NOT_FINITE));
    status
}

pub fn of_tensor(error: TensorError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// A parameter that is refused as HTTP refuses it.
pub fn of_parameter(error: ApiError) -> Status {
    match error.status {
        StatusCode::NOT_FOUND => Status::not_found(error.message),
        _ => Status::invalid_argument(error.message),
    }
}
