//! What every answer carries: `x-request-id` and `x-athanor-revision`.

use athanor_contract::process::header;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

pub const REQUEST_ID: HeaderName = HeaderName::from_static(header::REQUEST_ID);
pub const REVISION: HeaderName = HeaderName::from_static(header::REVISION);
pub const ADAPTER: HeaderName = HeaderName::from_static(header::ADAPTER);
pub const FAILURE: HeaderName = HeaderName::from_static(header::FAILURE);

/// The caller's request id if it is usable (1 to 128 letters, digits, `-_.:`), else a new UUIDv7.
pub fn request_id(headers: &HeaderMap) -> HeaderValue {
    let usable = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=128).contains(&bytes.len())
            && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte))
    };
    headers.get(REQUEST_ID).filter(usable).cloned().unwrap_or_else(|| text(&Uuid::now_v7().to_string()))
}

/// A header value; characters that a header cannot hold become `_`.
pub fn text(text: &str) -> HeaderValue {
    let clean: String = text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '_' }).collect();
    HeaderValue::from_str(&clean).unwrap_or_else(|_| HeaderValue::from_static("_"))
}
