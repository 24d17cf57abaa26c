//! The one place where an error becomes an HTTP answer, in OpenAI's shape.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use crate::{engine::encode::EngineError, service::ServiceError};

/// `{"error": {"message", "type", "param", "code"}}` with a status.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// Path of the offending field, such as `input[3]`.
    pub param: Option<String>,
    /// A stable name for programs.
    pub code: &'static str,
}

/// The body of an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorDetail {
    pub message: String,
    pub r#type: String,
    pub param: Option<String>,
    pub code: String,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code }
    }

    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
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
        let detail = ErrorDetail {
            r#type: self.kind().into(),
            message: self.message,
            param: self.param,
            code: self.code.into(),
        };
        let mut response = (self.status, Json(ErrorBody { error: detail })).into_response();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
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
            ServiceError::Engine(EngineError::QueueFull { .. }) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
            }
            ServiceError::Engine(EngineError::Stopped) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "engine_stopped", message)
            }
            ServiceError::Engine(EngineError::Backend(_))
            | ServiceError::NotFinite { .. }
            | ServiceError::Tokenizer(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "model_failed", message),
        }
    }
}
