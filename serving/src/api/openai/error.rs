//! The one place where an error becomes an HTTP answer, in OpenAI's shape.

use athanor_contract::process::failure;
use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    api::headers,
    capacity::Full,
    engine::{
        encode::EngineError,
        generate::{GenerateError, sampling::LogitsError},
    },
    service::ServiceError,
};

/// `{"error": {"message", "type", "param", "code"}}` with a status.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// Path of the offending field, such as `input[3]`.
    pub param: Option<String>,
    /// A stable name for programs.
    pub code: &'static str,
    /// Seconds after which the client should try again, of a 429 or 503. Absent: 1.
    pub retry_after: Option<u64>,
    /// Value of the header `x-athanor-failure`: what failed, for a router that counts it apart.
    pub failure: Option<&'static str>,
}

/// The body of an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorDetail {
    pub message: String,
    pub r#type: String,
    pub param: Option<String>,
    pub code: String,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code, retry_after: None, failure: None }
    }

    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// An error of a model whose output is not finite.
    fn not_finite(message: String) -> Self {
        let error = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "model_failed", message);
        Self { failure: Some(failure::NOT_FINITE), ..error }
    }

    /// An error of the service whose inputs are in this field of the request.
    pub fn of_field(error: ServiceError, field: &str) -> Self {
        let error = Self::from(error);
        let param = error.param.map(|param| match param.strip_prefix("input") {
            Some(rest) => format!("{field}{rest}"),
            None => param,
        });
        // OpenAI's status; `/v1/classify` has another one.
        let is_unprocessable = error.status == StatusCode::UNPROCESSABLE_ENTITY;
        let status = if is_unprocessable { StatusCode::BAD_REQUEST } else { error.status };
        Self { status, param, ..error }
    }

    /// The JSON of the error.
    pub fn body(self) -> ErrorBody {
        let error = ErrorDetail {
            r#type: self.kind().into(),
            message: self.message,
            param: self.param,
            code: self.code.into(),
        };
        ErrorBody { error }
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::NOT_FOUND => "not_found_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, retry_after, failure) = (self.status, self.retry_after.unwrap_or(1), self.failure);
        let mut response = (status, Json(self.body())).into_response();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(retry_after));
        }
        if let Some(failure) = failure {
            response.headers_mut().insert(headers::FAILURE, HeaderValue::from_static(failure));
        }
        response
    }
}

impl From<ServiceError> for ApiError {
    fn from(error: ServiceError) -> Self {
        let message = error.to_string();
        match error {
            ServiceError::UnknownModel { .. } => {
                Self::new(StatusCode::NOT_FOUND, "model_not_found", message).param("model")
            }
            ServiceError::NoInput => Self::new(StatusCode::UNPROCESSABLE_ENTITY, "input_empty", message).param("input"),
            ServiceError::TooManyInputs { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "too_many_inputs", message).param("input")
            }
            ServiceError::EmptyInput { index } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "input_empty", message).param(format!("input[{index}]"))
            }
            ServiceError::WrongKind { .. } => Self::new(StatusCode::NOT_FOUND, "wrong_model_kind", message),
            ServiceError::TooManyAnswers { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "too_many_answers", message).param("n")
            }
            ServiceError::LongInput { index, .. } => {
                Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message).param(format!("input[{index}]"))
            }
            ServiceError::LongText { input, .. } => {
                Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message)
                    .param(input.map_or("messages".into(), |index| format!("input[{index}]")))
            }
            ServiceError::UnknownToken { index, .. } => {
                Self::new(StatusCode::BAD_REQUEST, "invalid_field", message).param(format!("input[{index}]"))
            }
            ServiceError::NoToken { index, .. } => {
                Self::new(StatusCode::BAD_REQUEST, "invalid_field", message).param(format!("tokens[{index}]"))
            }
            ServiceError::Conversation(_) => {
                Self::new(StatusCode::BAD_REQUEST, "invalid_conversation", message).param("messages")
            }
            ServiceError::Grammar(_) => Self::new(StatusCode::BAD_REQUEST, "invalid_schema", message),
            ServiceError::Draining => Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message),
            ServiceError::Engine(EngineError::QueueFull { .. }) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
            }
            ServiceError::Engine(EngineError::Stopped) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "engine_stopped", message)
            }
            ServiceError::NotFinite { .. } => Self::not_finite(message),
            ServiceError::Engine(EngineError::Backend(_)) | ServiceError::Tokenizer(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "model_failed", message)
            }
            ServiceError::Generate(error) => error.into(),
        }
    }
}

impl From<Full> for ApiError {
    fn from(full: Full) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", full.to_string())
    }
}

impl From<GenerateError> for ApiError {
    fn from(error: GenerateError) -> Self {
        let (message, retry_after) = (error.to_string(), error.retry_after());
        match error {
            GenerateError::QueueFull { .. } | GenerateError::LongWait { .. } => {
                Self { retry_after, ..Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message) }
            }
            GenerateError::EmptyPrompt => Self::new(StatusCode::BAD_REQUEST, "input_empty", message).param("prompt"),
            GenerateError::TooLong { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message).param("max_tokens")
            }
            GenerateError::Invalid(invalid) => {
                Self::new(StatusCode::BAD_REQUEST, "invalid_field", message).param(invalid.field)
            }
            // The grammar is the client's.
            GenerateError::Constraint(_) => Self::new(StatusCode::BAD_REQUEST, "constraint_failed", message),
            GenerateError::Logits(LogitsError::NotFinite { .. }) => Self::not_finite(message),
            GenerateError::Logits(_) | GenerateError::Backend(_) | GenerateError::Adapter(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "model_failed", message)
            }
            GenerateError::TimedOut { .. } => Self::new(StatusCode::GATEWAY_TIMEOUT, "request_timeout", message),
            GenerateError::Stopped => Self::new(StatusCode::SERVICE_UNAVAILABLE, "engine_stopped", message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_when_to_come_back() {
        for (error, status, expected) in [
            (GenerateError::LongWait { expected: 41.2, limit: 30.0, retry_after: 42 }, 429, "42"),
            (GenerateError::QueueFull { capacity: 8, retry_after: 3 }, 429, "3"),
            (GenerateError::Stopped, 503, "1"),
        ] {
            let response = ApiError::from(error).into_response();
            assert_eq!(response.status(), status);
            assert_eq!(response.headers()[RETRY_AFTER], expected);
        }
    }
}
