//! `POST /v1/tokenize` and `POST /v1/detokenize`, in vLLM's shapes, for every kind of model.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
};
use serde_json::{Value, json};

use super::{
    body, chat,
    error::ApiError,
    fields::{Fields, asks, invalid, typed, unsupported},
};
use crate::service::Service;

pub async fn tokenize(State(service): State<Arc<Service>>, request: Request) -> Result<Json<Value>, ApiError> {
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let mut fields = Fields::parse(&bytes)?;
    service.check_model(fields.take::<String>("model")?.as_deref())?;
    let returns_names = fields.take::<bool>("return_token_strs")?.unwrap_or(false);
    let with_special = fields.take::<bool>("add_special_tokens")?;
    let tokens = match (fields.take_value("prompt"), fields.take_value("messages")) {
        (Some(prompt), None) => {
            let prompt: String = typed("prompt", prompt)?;
            fields.finish()?;
            service.tokens(prompt, with_special.unwrap_or(true)).await?
        }
        (None, Some(messages)) => of_chat(&service, messages, with_special, fields).await?,
        (None, None) => return Err(invalid("prompt", "missing; prompt or messages is required")),
        (Some(_), Some(_)) => return Err(invalid("messages", "prompt and messages exclude each other")),
    };
    let names = returns_names.then(|| service.token_names(&tokens));
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": service.max_length(),
        "tokens": tokens,
        "token_strs": names,
    })))
}

async fn of_chat(
    service: &Service,
    messages: Value,
    with_special: Option<bool>,
    mut fields: Fields,
) -> Result<Vec<u32>, ApiError> {
    let generator = match service.generator() {
        Err(crate::service::ServiceError::WrongKind { kind, .. }) => {
            return Err(invalid("messages", format!("this model is {kind} without a chat template; send prompt")));
        }
        found => found?,
    };
    let add_generation_prompt = fields.take::<bool>("add_generation_prompt")?.unwrap_or(true);
    for name in ["continue_final_message", "chat_template", "chat_template_kwargs", "tools"] {
        fields.refuse(name, asks)?;
    }
    if with_special == Some(true) {
        return Err(unsupported("add_special_tokens", "the chat template writes the special tokens"));
    }
    let messages = chat::messages(messages)?;
    fields.finish()?;
    Ok(generator.tokenize_chat(messages, add_generation_prompt).await?)
}

pub async fn detokenize(State(service): State<Arc<Service>>, request: Request) -> Result<Json<Value>, ApiError> {
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let mut fields = Fields::parse(&bytes)?;
    service.check_model(fields.take::<String>("model")?.as_deref())?;
    let tokens: Vec<u32> = typed("tokens", fields.require("tokens")?)?;
    fields.finish()?;
    Ok(Json(json!({"prompt": service.text(&tokens)?})))
}
