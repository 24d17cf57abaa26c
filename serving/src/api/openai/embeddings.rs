//! `POST /v1/embeddings`

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    body,
    error::ApiError,
    fields::{Fields, inputs, invalid},
};
use crate::service::Service;

/// How a vector is written.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    #[default]
    Float,
    /// FP32, little-endian.
    Base64,
}

pub async fn embeddings(State(service): State<Arc<Service>>, request: Request) -> Result<Json<Value>, ApiError> {
    let embedder = service.embedder()?;
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let mut fields = Fields::parse(&bytes)?;
    service.check_model(fields.take::<String>("model")?.as_deref())?;
    let encoding: Encoding = fields.take("encoding_format")?.unwrap_or_default();
    let dimensions = fields.take::<usize>("dimensions")?;
    if let Some(dimensions) = dimensions.filter(|dimensions| !(1..=embedder.size()).contains(dimensions)) {
        return Err(invalid("dimensions", format!("{dimensions} is not between 1 and {}", embedder.size())));
    }
    fields.ignore(&["user"]);
    let inputs = inputs("input", fields.require("input")?)?;
    fields.finish()?;
    let mut embedded = embedder.embed(inputs).await.map_err(|error| ApiError::of_field(error, "input"))?;
    if let Some(dimensions) = dimensions {
        embedded.shorten(dimensions);
    }
    let data: Vec<Value> = embedded
        .vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| {
            let embedding = match encoding {
                Encoding::Float => json!(vector),
                Encoding::Base64 => {
                    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
                    BASE64_STANDARD.encode(bytes).into()
                }
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    Ok(Json(json!({
        "object": "list",
        "data": data,
        "model": service.model_name,
        "usage": {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens},
    })))
}
