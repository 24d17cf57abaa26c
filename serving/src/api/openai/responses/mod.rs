//! `POST /v1/responses`: one answer to a text or a list of items. Nothing is stored.
//!
//! [`input`] turns items into messages, [`tools`] reads functions and structured output; [`output`] makes the items of the
//! answer, [`shape`] the response around them.

pub mod input;
mod output;
mod shape;
mod stream;
mod tools;

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use self::{output::Output, shape::Shape};
use super::{
    body,
    error::ApiError,
    fields::{Fields, asks, invalid, unsupported},
    options::Options,
    structure::{self, Asked},
    usage::Usage,
};
use crate::service::{
    Service,
    generate::{Generation, Prompt},
};

/// Value of `include` by which log-probabilities are reported.
const LOGPROBS: &str = "message.output_text.logprobs";
/// Value of `include` that concerns models with a hidden chain of thought only, and that clients send to all.
const REASONING: &str = "reasoning.encrypted_content";

pub async fn responses(State(service): State<Arc<Service>>, request: Request) -> Result<Response, ApiError> {
    let generator = service.generator()?;
    let revision = request.extensions().get().cloned();
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let mut fields = Fields::parse(&bytes)?;
    refuse_what_is_missing(&mut fields)?;
    let (Asked { structure, reading, schema }, repeated) = tools::take(&mut fields, generator.call_format())?;
    let metadata: Option<BTreeMap<String, String>> = fields.take("metadata")?;
    let instructions: Option<String> = fields.take("instructions")?;
    let input = fields.require("input")?;
    let number = |name: &str| json!(fields.get(name).and_then(Value::as_f64).unwrap_or(1.0));
    let (temperature, top_p) = (number("temperature"), number("top_p"));
    let mut options = Options::take(&mut fields, &["max_output_tokens"])?;
    let selection = service.select(options.model.as_deref(), revision)?;
    structure::check_min_tokens(&structure, options.min_tokens)?;
    let logprobs = logprobs(&mut fields)?;
    options.sampling.logprobs = logprobs;
    fields.finish()?;
    let messages = input::messages(instructions.as_deref(), input)?;
    let mut parameters = Map::from_iter(repeated);
    parameters.extend([
        ("instructions".to_owned(), json!(instructions)),
        ("max_output_tokens".to_owned(), json!(options.max_tokens)),
        ("metadata".to_owned(), json!(metadata.unwrap_or_default())),
        ("temperature".to_owned(), temperature),
        ("top_logprobs".to_owned(), json!(logprobs.unwrap_or(0))),
        ("top_p".to_owned(), top_p),
    ]);
    let generation = Generation {
        prompt: Prompt::Chat(messages),
        choices: 1,
        sampling: options.sampling,
        stop: options.stop,
        max_tokens: options.max_tokens,
        adapter: selection.adapter,
        min_tokens: options.min_tokens,
    };
    let answers = match generator.generate_structured(generation, structure).await {
        Ok(answers) => answers,
        Err(error) => {
            let functions = reading.as_ref().map(|reading| &*reading.functions);
            return Err(renamed(tools::renamed(structure::refused(error, functions, schema, generator).await)));
        }
    };
    let (shape, output) = (Shape::new(&selection.model, parameters), Output::new(reading));
    if options.stream {
        return Ok(stream::stream(answers, shape, output));
    }
    let prompt_tokens = answers.prompt_tokens;
    let completed = answers.complete().await?;
    let usage = Usage::of(prompt_tokens, &completed);
    let [one] = <[_; 1]>::try_from(completed).map_err(|_| crate::engine::generate::GenerateError::Stopped)?;
    Ok(Json(shape.complete(&one, output, &usage)).into_response())
}

/// The error with the names that its fields have here.
fn renamed(error: ApiError) -> ApiError {
    let param = error.param.map(|param| match param.as_str() {
        "max_tokens" => "max_output_tokens".into(),
        "messages" | "prompt" => "input".into(),
        _ => param,
    });
    ApiError { param, ..error }
}

/// Number of alternatives to report with each token.
fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let include: Vec<String> = fields.take("include")?.unwrap_or_default();
    if let Some(index) = include.iter().position(|name| name != LOGPROBS && name != REASONING) {
        let message = format!("{:?} is not supported, {LOGPROBS:?} is", include[index]);
        return Err(unsupported(format!("include[{index}]"), message));
    }
    let wanted = include.iter().any(|name| name == LOGPROBS);
    match fields.take::<usize>("top_logprobs")? {
        Some(count) if !wanted && count > 0 => {
            Err(invalid("top_logprobs", format!("requires {LOGPROBS:?} in include")))
        }
        count => Ok(wanted.then(|| count.unwrap_or(0))),
    }
}

/// Refuses what there is at OpenAI and not here: stored responses, built-in tools and reasoning.
fn refuse_what_is_missing(fields: &mut Fields) -> Result<(), ApiError> {
    for (name, why) in [
        ("previous_response_id", "responses are not stored; send the whole conversation in input"),
        ("conversation", "conversations are not stored; send the whole conversation in input"),
        ("background", "responses are not stored, so none runs in the background"),
        ("prompt", "prompts are not stored; send instructions and input"),
        ("max_tool_calls", "there are no built-in tools, whose calls it limits"),
        ("context_management", "a conversation is not shortened"),
    ] {
        if fields.take_value(name).is_some_and(|value| asks(&value)) {
            return Err(unsupported(name, why));
        }
    }
    if fields.take::<String>("truncation")?.is_some_and(|truncation| truncation != "disabled") {
        return Err(unsupported("truncation", "a conversation is not shortened; \"disabled\" alone is supported"));
    }
    if fields.take::<usize>("n")?.is_some_and(|n| n != 1) {
        return Err(unsupported("n", "a response has one answer; /v1/chat/completions has several"));
    }
    let reasoning: Option<Map<String, Value>> = fields.take("reasoning")?;
    if reasoning.is_some_and(|reasoning| reasoning.values().any(asks)) {
        return Err(unsupported("reasoning", "this model has no reasoning to configure"));
    }
    Ok(())
}
