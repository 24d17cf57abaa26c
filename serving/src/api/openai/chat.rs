//! `POST /v1/chat/completions`

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{
    body, content,
    error::ApiError,
    fields::{Fields, invalid, typed},
    logprobs,
    options::{Options, refuse_unsupported},
    sse::{self, Format},
    usage::{Usage, finish_reason},
};
use crate::service::{
    Service,
    answer::{Piece, TokenLogprob},
    generate::{Completed, Generation, Prompt},
};

pub async fn chat(State(service): State<Arc<Service>>, request: Request) -> Result<Response, ApiError> {
    let generator = service.generator()?;
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let mut fields = Fields::parse(&bytes)?;
    let mut options = Options::take(&mut fields, &["max_completion_tokens", "max_tokens"])?;
    service.check_model(options.model.as_deref())?;
    options.sampling.logprobs = logprobs(&mut fields)?;
    refuse_unsupported(&mut fields)?;
    let messages = messages(fields.require("messages")?)?;
    fields.finish()?;
    let answers = generator
        .generate(Generation {
            prompt: Prompt::Chat(messages),
            choices: options.choices,
            sampling: options.sampling,
            stop: options.stop,
            max_tokens: options.max_tokens,
        })
        .await?;
    let format = Chat::new(&service);
    if options.stream {
        return Ok(sse::stream(answers, format, options.includes_usage));
    }
    let prompt_tokens = answers.prompt_tokens;
    let completed = answers.complete().await?;
    Ok(Json(format.whole(prompt_tokens, completed)).into_response())
}

/// Number of alternatives to report with each token.
fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.take::<bool>("logprobs")?.unwrap_or(false);
    match fields.take::<usize>("top_logprobs")? {
        Some(count) if !wanted && count > 0 => Err(invalid("top_logprobs", "requires logprobs: true")),
        count => Ok(wanted.then(|| count.unwrap_or(0))),
    }
}

/// Messages as templates read them: roles and texts.
pub(super) fn messages(value: Value) -> Result<Vec<Value>, ApiError> {
    let list: Vec<serde_json::Map<String, Value>> = typed("messages", value)?;
    if list.is_empty() {
        let message = "messages: the list is empty";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "messages_empty", message).param("messages"));
    }
    list.into_iter().enumerate().map(|(index, fields)| message(&format!("messages[{index}]"), fields)).collect()
}

fn message(path: &str, mut fields: serde_json::Map<String, Value>) -> Result<Value, ApiError> {
    let param = |name: &str| format!("{path}.{name}");
    let role: String = match fields.remove("role") {
        Some(role) => typed(&param("role"), role)?,
        None => return Err(invalid(param("role"), "missing")),
    };
    let role = match role.as_str() {
        // Templates know the older name.
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => role.as_str(),
        other => {
            let known = "\"system\", \"developer\", \"user\", \"assistant\" and \"tool\" are";
            return Err(invalid(param("role"), format!("{other:?} is not supported, {known}")));
        }
    };
    let mut message = json!({"role": role});
    let calls = fields.remove("tool_calls").filter(|calls| !calls.is_null());
    match fields.remove("content").filter(|content| !content.is_null()) {
        Some(content) => message["content"] = content::text(&param("content"), content, &["text"])?.into(),
        None if role == "assistant" && calls.is_some() => message["content"] = "".into(),
        None => return Err(invalid(param("content"), "missing")),
    }
    if let Some(calls) = calls {
        message["tool_calls"] = tool_calls(&param("tool_calls"), calls)?;
    }
    for name in ["name", "tool_call_id", "reasoning_content"] {
        if let Some(value) = fields.remove(name).filter(|value| !value.is_null()) {
            message[name] = typed::<String>(&param(name), value)?.into();
        }
    }
    Ok(message)
}

/// Calls of functions in an earlier answer. Templates read their arguments as an object, clients send them as JSON in
/// a string.
fn tool_calls(path: &str, calls: Value) -> Result<Value, ApiError> {
    let mut calls: Vec<Value> = typed(path, calls)?;
    for call in &mut calls {
        let arguments = call.pointer_mut("/function/arguments");
        if let Some(arguments) = arguments
            && let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok())
        {
            *arguments = parsed;
        }
    }
    Ok(calls.into())
}

/// The shape of an answer and of its chunks.
struct Chat {
    id: String,
    created: i64,
    model: String,
    revision: String,
}

impl Chat {
    fn new(service: &Service) -> Self {
        Self {
            id: format!("chatcmpl-{}", uuid::Uuid::now_v7().simple()),
            created: jiff::Timestamp::now().as_second(),
            model: service.model_name.clone(),
            revision: service.revision.clone(),
        }
    }

    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.revision, "choices": choices,
        })
    }

    fn whole(&self, prompt_tokens: usize, completed: Vec<Completed>) -> Value {
        let usage = Usage::of(prompt_tokens, &completed);
        let choice = |(index, one): (usize, Completed)| {
            json!({
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": null},
                "logprobs": logprobs_json(&one.logprobs),
                "finish_reason": finish_reason(one.reason),
            })
        };
        let mut whole = self.object("chat.completion", completed.into_iter().enumerate().map(choice).collect());
        whole["usage"] = usage.json();
        whole
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, finish_reason: Option<&str>) -> Value {
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason});
        self.object("chat.completion.chunk", vec![choice])
    }
}

impl Format for Chat {
    fn first(&self, index: usize) -> Option<Value> {
        Some(self.chunk(index, json!({"role": "assistant", "content": ""}), Value::Null, None))
    }

    fn piece(&mut self, index: usize, piece: &Piece) -> Vec<Value> {
        let mut chunks = Vec::new();
        if !piece.text.is_empty() || !piece.logprobs.is_empty() {
            chunks.push(self.chunk(index, json!({"content": piece.text}), logprobs_json(&piece.logprobs), None));
        }
        if let Some(end) = &piece.end {
            chunks.push(self.chunk(index, json!({}), Value::Null, Some(finish_reason(end.reason))));
        }
        chunks
    }

    fn usage(&self, usage: &Usage) -> Value {
        let mut chunk = self.object("chat.completion.chunk", Vec::new());
        chunk["usage"] = usage.json();
        chunk
    }
}

fn logprobs_json(logprobs: &[TokenLogprob]) -> Value {
    if logprobs.is_empty() {
        return Value::Null;
    }
    json!({"content": logprobs::tokens(logprobs), "refusal": null})
}
