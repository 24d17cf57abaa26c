//! `POST /v1/completions`

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{
    body,
    error::ApiError,
    fields::{Fields, asks, inputs, invalid, unsupported},
    options::{Options, refuse_unsupported},
    sse::{self, Format},
    usage::{Usage, finish_reason},
};
use crate::{
    engine::generate::sampling::MOST_ALTERNATIVES,
    service::{
        Selection, Service,
        answer::{Piece, TokenLogprob},
        generate::{Completed, Generation, Prompt, TextOptions, best},
    },
};

pub async fn completions(State(service): State<Arc<Service>>, request: Request) -> Result<Response, ApiError> {
    let generator = service.generator()?;
    let revision = request.extensions().get().cloned();
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let mut fields = Fields::parse(&bytes)?;
    let echo = fields.take::<bool>("echo")?.unwrap_or(false);
    // Together with `echo` it asks for the log-probabilities of the prompt alone.
    let asks_for_nothing = echo && fields.take_if("max_tokens", |value| value.as_u64() == Some(0));
    let mut options = Options::take(&mut fields, &["max_tokens", "max_completion_tokens"])?;
    if asks_for_nothing {
        options.max_tokens = Some(0);
    }
    let selection = service.select(options.model.as_deref(), revision)?;
    options.sampling.logprobs = logprobs(&mut fields)?;
    refuse_unsupported(&mut fields)?;
    if fields.take_value("suffix").is_some_and(|suffix| asks(&suffix)) {
        return Err(unsupported("suffix", "text before a suffix is not supported; the model continues the prompt"));
    }
    let text = TextOptions { echo, best_of: best_of(&mut fields, &options)? };
    let prompt = inputs("prompt", fields.require("prompt")?)?;
    fields.finish()?;
    let generation = Generation {
        prompt: Prompt::Inputs(prompt),
        choices: options.choices,
        sampling: options.sampling,
        stop: options.stop,
        max_tokens: options.max_tokens,
        adapter: selection.adapter.clone(),
        min_tokens: options.min_tokens,
    };
    let answers = generator.generate_text(generation, text).await;
    let answers = answers.map_err(|error| ApiError::of_field(error, "prompt"))?;
    let format = Text::new(selection);
    if options.stream {
        return Ok(sse::stream(answers, format, options.includes_usage));
    }
    let prompt_tokens = answers.prompt_tokens;
    let completed = answers.complete().await?;
    // Answers that are not kept were generated as well.
    let usage = Usage::of(prompt_tokens, &completed);
    let completed = match text.best_of {
        Some(generated) => best(completed, options.choices, generated),
        None => completed,
    };
    Ok(Json(format.whole(&usage, completed)).into_response())
}

/// Number of alternatives to report with each token.
fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let count = fields.take::<usize>("logprobs")?;
    match count.filter(|&count| count > MOST_ALTERNATIVES) {
        Some(count) => Err(invalid("logprobs", format!("{count} is more than {MOST_ALTERNATIVES}"))),
        None => Ok(count),
    }
}

/// Number of answers to generate, if it is more than the number to return.
fn best_of(fields: &mut Fields, options: &Options) -> Result<Option<usize>, ApiError> {
    let n = options.choices;
    let best_of = fields.take::<usize>("best_of")?.filter(|&best_of| best_of != n);
    match best_of {
        Some(best_of) if best_of < n => Err(invalid("best_of", format!("{best_of} is less than n, which is {n}"))),
        Some(_) if options.stream => {
            Err(invalid("best_of", "the best answers are known at the end; a stream requires best_of = n"))
        }
        _ => Ok(best_of),
    }
}

/// The shape of an answer and of its chunks.
struct Text {
    id: String,
    created: i64,
    model: String,
    revision: String,
}

impl Text {
    fn new(selection: Selection) -> Self {
        Self {
            id: format!("cmpl-{}", uuid::Uuid::now_v7().simple()),
            created: jiff::Timestamp::now().as_second(),
            model: selection.model,
            revision: selection.revision,
        }
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
            "system_fingerprint": self.revision, "choices": choices,
        })
    }

    fn whole(&self, usage: &Usage, completed: Vec<Completed>) -> Value {
        let one =
            |(index, one): (usize, Completed)| choice(index, &one.text, &one.logprobs, Some(finish_reason(one.reason)));
        let choices = completed.into_iter().enumerate().map(one).collect();
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
        vec![self.object(vec![choice(index, &piece.text, &piece.logprobs, reason)])]
    }

    fn usage(&self, usage: &Usage) -> Value {
        let mut chunk = self.object(Vec::new());
        chunk["usage"] = usage.json();
        chunk
    }
}

fn choice(index: usize, text: &str, logprobs: &[TokenLogprob], reason: Option<&str>) -> Value {
    json!({"index": index, "text": text, "logprobs": logprobs_json(logprobs), "finish_reason": reason})
}

/// The older shape of log-probabilities: parallel lists. Tokens that read alike are one entry of `top_logprobs`, the
/// more probable one. The first token of an echoed prompt has null in the place of each.
fn logprobs_json(logprobs: &[TokenLogprob]) -> Value {
    if logprobs.is_empty() {
        return Value::Null;
    }
    let top = |entry: &TokenLogprob| {
        entry.logprob?;
        let mut top = Map::new();
        for (token, logprob) in &entry.top {
            top.entry(token.text.clone()).or_insert((*logprob).into());
        }
        Some(top)
    };
    json!({
        "tokens": logprobs.iter().map(|entry| entry.token.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": logprobs.iter().map(|entry| entry.logprob).collect::<Vec<_>>(),
        "top_logprobs": logprobs.iter().map(top).collect::<Vec<_>>(),
        "text_offset": logprobs.iter().map(|entry| entry.offset).collect::<Vec<_>>(),
    })
}
