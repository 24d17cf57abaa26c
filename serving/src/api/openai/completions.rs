//! `POST /v1/completions`

use std::{collections::HashMap, sync::Arc};

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{
    body,
    error::ApiError,
    fields::{Fields, asks, inputs, unsupported},
    options::{Options, refuse_unsupported},
    sse::{self, Format},
    usage::{Usage, finish_reason},
};
use crate::service::{
    Service,
    answer::{Piece, TokenLogprob},
    generate::{Completed, Generation, Prompt},
};

pub async fn completions(State(service): State<Arc<Service>>, request: Request) -> Result<Response, ApiError> {
    let generator = service.generator()?;
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let mut fields = Fields::parse(&bytes)?;
    let mut options = Options::take(&mut fields, &["max_tokens", "max_completion_tokens"])?;
    service.check_model(options.model.as_deref())?;
    options.sampling.logprobs = fields.take("logprobs")?;
    refuse_unsupported(&mut fields)?;
    for name in ["echo", "suffix"] {
        fields.refuse(name, asks)?;
    }
    if fields.take::<usize>("best_of")?.is_some_and(|best_of| best_of != options.choices) {
        return Err(unsupported("best_of", "another number than n is not supported"));
    }
    let prompt = inputs("prompt", fields.require("prompt")?)?;
    fields.finish()?;
    let answers = generator
        .generate(Generation {
            prompt: Prompt::Inputs(prompt),
            choices: options.choices,
            sampling: options.sampling,
            stop: options.stop,
            max_tokens: options.max_tokens,
        })
        .await
        .map_err(|error| ApiError::of_field(error, "prompt"))?;
    let mut format = Text::new(&service);
    if options.stream {
        return Ok(sse::stream(answers, format, options.includes_usage));
    }
    let prompt_tokens = answers.prompt_tokens;
    let completed = answers.complete().await?;
    Ok(Json(format.whole(prompt_tokens, completed)).into_response())
}

/// The shape of an answer and of its chunks.
struct Text {
    id: String,
    created: i64,
    model: String,
    revision: String,
    /// Characters of each choice so far: `text_offset` counts them.
    offsets: HashMap<usize, usize>,
}

impl Text {
    fn new(service: &Service) -> Self {
        Self {
            id: format!("cmpl-{}", uuid::Uuid::now_v7().simple()),
            created: jiff::Timestamp::now().as_second(),
            model: service.model_name.clone(),
            revision: service.revision.clone(),
            offsets: HashMap::new(),
        }
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
            "system_fingerprint": self.revision, "choices": choices,
        })
    }

    fn choice(&mut self, index: usize, text: &str, logprobs: &[TokenLogprob], reason: Option<&str>) -> Value {
        let offset = self.offsets.entry(index).or_default();
        let logprobs = logprobs_json(logprobs, offset);
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
    }

    fn whole(&mut self, prompt_tokens: usize, completed: Vec<Completed>) -> Value {
        let usage = Usage::of(prompt_tokens, &completed);
        let choice = |(index, one): (usize, Completed)| {
            self.choice(index, &one.text, &one.logprobs, Some(finish_reason(one.reason)))
        };
        let choices = completed.into_iter().enumerate().map(choice).collect();
        let mut whole = self.object(choices);
        whole["usage"] = usage.json();
        whole
    }
}

impl Format for Text {
    fn first(&self, _: usize) -> Option<Value> {
        None
    }

    fn piece(&mut self, index: usize, piece: &Piece) -> Vec<Value> {
        let reason = piece.end.map(|end| finish_reason(end.reason));
        let choice = self.choice(index, &piece.text, &piece.logprobs, reason);
        vec![self.object(vec![choice])]
    }

    fn usage(&self, usage: &Usage) -> Value {
        let mut chunk = self.object(Vec::new());
        chunk["usage"] = usage.json();
        chunk
    }
}

/// The older shape of log-probabilities: parallel lists. Tokens that read alike are one entry of `top_logprobs`, the
/// more probable one.
fn logprobs_json(logprobs: &[TokenLogprob], offset: &mut usize) -> Value {
    if logprobs.is_empty() {
        return Value::Null;
    }
    let (mut offsets, mut tops) = (Vec::new(), Vec::new());
    for entry in logprobs {
        offsets.push(*offset);
        *offset += entry.token.text.chars().count();
        let mut top = Map::new();
        for (token, logprob) in &entry.top {
            top.entry(token.text.clone()).or_insert((*logprob).into());
        }
        tops.push(Value::Object(top));
    }
    json!({
        "tokens": logprobs.iter().map(|entry| entry.token.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": logprobs.iter().map(|entry| entry.logprob).collect::<Vec<_>>(),
        "top_logprobs": tops,
        "text_offset": offsets,
    })
}
