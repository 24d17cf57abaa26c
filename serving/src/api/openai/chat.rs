//! `POST /v1/chat/completions`

use std::{collections::HashMap, sync::Arc};

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
    structure::{self, Asked},
    usage::{Usage, finish_reason},
};
use crate::{
    engine::generate::sequence::FinishReason,
    service::{
        Selection, Service,
        answer::{Piece, TokenLogprob},
        calls::parse::{CallParser, Part, Reading},
        generate::{Completed, Generation, Prompt},
    },
};

pub async fn chat(State(service): State<Arc<Service>>, request: Request) -> Result<Response, ApiError> {
    let generator = service.generator()?;
    let revision = request.extensions().get().cloned();
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let mut fields = Fields::parse(&bytes)?;
    let Asked { structure, reading, schema } = structure::take(&mut fields, generator.call_format())?;
    let mut options = Options::take(&mut fields, &["max_completion_tokens", "max_tokens"])?;
    let selection = service.select(options.model.as_deref(), revision)?;
    options.sampling.logprobs = logprobs(&mut fields)?;
    structure::check_min_tokens(&structure, options.min_tokens)?;
    refuse_unsupported(&mut fields)?;
    let messages = messages(fields.require("messages")?)?;
    fields.finish()?;
    let generation = Generation {
        prompt: Prompt::Chat(messages),
        choices: options.choices,
        sampling: options.sampling,
        stop: options.stop,
        max_tokens: options.max_tokens,
        adapter: selection.adapter.clone(),
        min_tokens: options.min_tokens,
    };
    let answers = match generator.generate_structured(generation, structure).await {
        Ok(answers) => answers,
        Err(error) => {
            let functions = reading.as_ref().map(|reading| &*reading.functions);
            return Err(structure::refused(error, functions, schema, generator).await);
        }
    };
    let format = Chat::new(selection, reading);
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
pub(in crate::api) fn messages(value: Value) -> Result<Vec<Value>, ApiError> {
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
    let mut calls: Vec<serde_json::Map<String, Value>> = typed(path, calls)?;
    for call in &mut calls {
        let function = call.get_mut("function");
        if let Some(arguments) = function.and_then(|function| function.get_mut("arguments"))
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
    /// How calls of functions are found; absent: there are none.
    reading: Option<Reading>,
    /// The choices of a stream so far.
    readers: HashMap<usize, Reader>,
}

/// Reads one choice for content and calls of functions.
struct Reader {
    parser: CallParser,
    calls: Vec<Call>,
}

struct Call {
    id: String,
    name: String,
    arguments: String,
}

impl Reader {
    fn new(reading: Reading) -> Self {
        Self { parser: CallParser::new(reading), calls: Vec::new() }
    }

    /// Takes parts and returns their deltas.
    fn take(&mut self, parts: Vec<Part>) -> Vec<Value> {
        parts.into_iter().filter_map(|part| self.part(part)).collect()
    }

    fn part(&mut self, part: Part) -> Option<Value> {
        let delta = match part {
            Part::Content(text) => return Some(json!({"content": text})),
            Part::Call { name } => {
                let id = format!("call_{}", uuid::Uuid::now_v7().simple());
                self.calls.push(Call { id: id.clone(), name: name.clone(), arguments: String::new() });
                let function = json!({"name": name, "arguments": ""});
                json!({"index": self.calls.len() - 1, "id": id, "type": "function", "function": function})
            }
            Part::Arguments(text) => {
                let index = self.calls.len().checked_sub(1)?;
                self.calls[index].arguments.push_str(&text);
                json!({"index": index, "function": {"arguments": text}})
            }
        };
        Some(json!({"tool_calls": [delta]}))
    }

    fn finish_reason(&self, reason: FinishReason) -> &'static str {
        match reason {
            FinishReason::Stop if self.parser.calls() > 0 && !self.parser.is_within_call() => "tool_calls",
            reason => finish_reason(reason),
        }
    }
}

impl Chat {
    fn new(selection: Selection, reading: Option<Reading>) -> Self {
        Self {
            id: format!("chatcmpl-{}", uuid::Uuid::now_v7().simple()),
            created: jiff::Timestamp::now().as_second(),
            model: selection.model,
            revision: selection.revision,
            reading,
            readers: HashMap::new(),
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
            let (message, reason) = self.message(&one);
            json!({
                "index": index,
                "message": message,
                "logprobs": logprobs_json(&one.logprobs),
                "finish_reason": reason,
            })
        };
        let mut whole = self.object("chat.completion", completed.into_iter().enumerate().map(choice).collect());
        whole["usage"] = usage.json();
        whole
    }

    /// The message of a whole answer, and why it ended.
    fn message(&self, one: &Completed) -> (Value, &'static str) {
        let mut message = json!({"role": "assistant", "content": one.text, "refusal": null});
        let Some(reading) = &self.reading else { return (message, finish_reason(one.reason)) };
        let mut reader = Reader::new(reading.clone());
        let mut parts = reader.parser.push(&one.text);
        parts.extend(reader.parser.finish());
        let deltas = reader.take(parts);
        let content: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
        let reason = reader.finish_reason(one.reason);
        message["content"] = content.into();
        if !reader.calls.is_empty() {
            if message["content"] == "" {
                message["content"] = Value::Null;
            }
            let call = |Call { id, name, arguments }| {
                let function = json!({"name": name, "arguments": arguments});
                json!({"id": id, "type": "function", "function": function})
            };
            message["tool_calls"] = reader.calls.into_iter().map(call).collect();
        }
        (message, reason)
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, finish_reason: Option<&str>) -> Value {
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason});
        self.object("chat.completion.chunk", vec![choice])
    }

    /// The deltas of a piece, and why the answer ended if it did.
    fn deltas(&mut self, index: usize, piece: &Piece) -> (Vec<Value>, Option<&'static str>) {
        let Some(reading) = &self.reading else {
            let delta = (!piece.text.is_empty()).then(|| json!({"content": piece.text}));
            return (delta.into_iter().collect(), piece.end.map(|end| finish_reason(end.reason)));
        };
        let reader = self.readers.entry(index).or_insert_with(|| Reader::new(reading.clone()));
        let mut parts = reader.parser.push(&piece.text);
        if piece.end.is_some() {
            parts.extend(reader.parser.finish());
        }
        let deltas = reader.take(parts);
        (deltas, piece.end.map(|end| reader.finish_reason(end.reason)))
    }
}

impl Format for Chat {
    fn first(&self, index: usize) -> Option<Value> {
        Some(self.chunk(index, json!({"role": "assistant", "content": ""}), Value::Null, None))
    }

    fn piece(&mut self, index: usize, piece: &Piece) -> Vec<Value> {
        let (mut deltas, reason) = self.deltas(index, piece);
        // The log-probabilities of a text come with its first delta, and by themselves while the text is held back.
        let mut logprobs = logprobs_json(&piece.logprobs);
        if deltas.is_empty() && !logprobs.is_null() {
            deltas.push(if self.reading.is_some() { json!({}) } else { json!({"content": ""}) });
        }
        let mut chunks = Vec::new();
        for delta in deltas {
            chunks.push(self.chunk(index, delta, logprobs.take(), None));
        }
        if reason.is_some() {
            chunks.push(self.chunk(index, json!({}), Value::Null, reason));
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
