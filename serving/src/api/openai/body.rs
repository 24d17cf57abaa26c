//! Request bodies: read within a limit, decoded as UTF-8 and JSON, each failure with its place.

use std::time::Duration;

use axum::{
    body::{Body, BodyDataStream},
    extract::Request,
    http::{
        HeaderMap, StatusCode,
        header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT},
    },
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde::de::DeserializeOwned;

use super::error::ApiError;
use crate::capacity::Full;

/// What is read of a body that is too large, in bytes and in time.
const DISCARDED: usize = 64 << 20;
const DISCARDING: Duration = Duration::from_secs(2);

/// Longest time in which a client sends its body.
const READING: Duration = Duration::from_secs(60);

/// Reads the body of a request that has to be JSON, of at most `limit` bytes.
pub async fn json(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let (parts, body) = request.into_parts();
    check_content_type(&parts.headers)?;
    read(&parts.headers, body, limit).await
}

/// Reads a whole body of at most `limit` bytes within a minute.
pub async fn read(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let message = || format!("the body did not arrive within {} s", READING.as_secs());
    let read = tokio::time::timeout(READING, read_all(headers, body, limit)).await;
    read.unwrap_or_else(|_| Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message())))
}

async fn read_all(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let too_large = || {
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", format!("the body is larger than {limit} bytes"))
    };
    let announced =
        headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()).and_then(|text| text.parse::<u64>().ok());
    let mut chunks = body.into_data_stream();
    if announced.is_some_and(|length| length > limit as u64) {
        // Whoever waits for leave to send does not get it.
        if !headers.contains_key(EXPECT) {
            discard(chunks).await;
        }
        return Err(too_large());
    }
    let mut whole = BytesMut::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                if let Some(full) = Full::cause_of(&error) {
                    discard(chunks).await;
                    return Err(full.into());
                }
                let message = format!("the body could not be read: {error}");
                return Err(ApiError::new(StatusCode::BAD_REQUEST, "body_incomplete", message));
            }
        };
        if whole.len() + chunk.len() > limit {
            discard(chunks).await;
            return Err(too_large());
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.freeze())
}

/// Reads on for a while and forgets it: to a client that is still sending when the connection is closed, a refusal is a broken pipe.
async fn discard(mut chunks: BodyDataStream) {
    let reading = async {
        let mut left = DISCARDED;
        while let Some(Ok(chunk)) = chunks.next().await
            && left > chunk.len()
        {
            left -= chunk.len();
        }
    };
    let _ = tokio::time::timeout(DISCARDING, reading).await;
}

/// Refuses a body that says it is something else than JSON.
pub fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(CONTENT_TYPE) else { return Ok(()) };
    let text = value.to_str().unwrap_or_default();
    let media_type = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if media_type == "application/json" || (media_type.starts_with("application/") && media_type.ends_with("+json")) {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "not_json",
        format!("content-type is {text:?}; send application/json"),
    ))
}

/// Decodes JSON; the error names the field.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "not_utf8",
            format!("the body is not UTF-8: first bad byte at offset {}", error.valid_up_to()),
        )
    })?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        let (code, message, param) = if inner.is_data() {
            let param = match (path.as_str(), missing_field(&inner.to_string())) {
                (".", missing) => missing,
                (path, Some(missing)) => Some(format!("{path}.{missing}")),
                (path, None) => Some(path.to_owned()),
            };
            let message = param.as_ref().map_or_else(|| inner.to_string(), |param| format!("{param}: {inner}"));
            ("invalid_field", message, param)
        } else {
            // Where the text stops being JSON, the path so far says nothing, but for numbers that JSON does not have.
            let param = is_not_finite(text, &inner).then_some(path).filter(|path| path != ".");
            let message = match &param {
                Some(param) => format!("{param}: JSON has neither NaN nor Infinity: {inner}"),
                None => format!("the body is not JSON: {inner}"),
            };
            ("invalid_json", message, param)
        };
        ApiError { status: StatusCode::BAD_REQUEST, message, param, code, retry_after: None, failure: None }
    })?;
    deserializer.end().map_err(|error| {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not JSON: {error}"))
    })?;
    Ok(value)
}

/// serde puts the path of a missing field at its parent; its name is only in the message.
fn missing_field(message: &str) -> Option<String> {
    message.strip_prefix("missing field `")?.split('`').next().map(str::to_owned)
}

/// Whether the text stops being JSON at a NaN or an Infinity, which some clients write.
fn is_not_finite(text: &str, error: &serde_json::Error) -> bool {
    let Some(line) = text.lines().nth(error.line().saturating_sub(1)) else { return false };
    // The error is at the first or at the second character of the word.
    (0..=2)
        .filter_map(|back| line.get(error.column().checked_sub(back)?..))
        .any(|rest| ["NaN", "Infinity", "-Infinity"].iter().any(|word| rest.starts_with(word)))
}
