//! Parameters that chat and text completions share.

use serde::Deserialize;
use serde_json::Value;

use super::{
    error::ApiError,
    fields::{Fields, asks, invalid, typed, unsupported},
};
use crate::engine::generate::sampling::Sampling;

/// Most stop strings of a request, as at OpenAI.
const STOP_STRINGS: usize = 4;

/// Parameters that clients send and that change nothing here.
const IGNORED: [&str; 8] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
];

/// How answers are generated and sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    pub model: Option<String>,
    /// `logprobs` of it is set by the caller.
    pub sampling: Sampling,
    pub choices: usize,
    pub stop: Vec<String>,
    pub max_tokens: Option<usize>,
    /// Number of tokens before which an answer does not end by itself; `usize::MAX` for `ignore_eos`.
    pub min_tokens: usize,
    pub stream: bool,
    /// Whether a stream ends with the usage.
    pub includes_usage: bool,
}

/// `stream_options`
#[derive(Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
    /// Padding of chunks against eavesdroppers on their sizes; not done here.
    #[serde(rename = "include_obfuscation")]
    _include_obfuscation: Option<bool>,
}

impl Options {
    /// Takes the parameters. `max_tokens`: names of the parameter, the preferred one first.
    pub fn take(fields: &mut Fields, max_tokens: &[&'static str]) -> Result<Self, ApiError> {
        fields.ignore(&IGNORED);
        let model = fields.take("model")?;
        let sampling = sampling(fields)?;
        let choices = match fields.take::<usize>("n")? {
            Some(0) => return Err(invalid("n", "0 is less than 1")),
            found => found.unwrap_or(1),
        };
        let stop = stop(fields)?;
        let mut limit = None;
        for name in max_tokens {
            match fields.take::<usize>(name)? {
                Some(0) => return Err(invalid(*name, "0 is less than 1")),
                found => limit = limit.or(found),
            }
        }
        let min_tokens = min_tokens(fields, limit)?;
        let stream = fields.take("stream")?.unwrap_or(false);
        let stream_options: Option<StreamOptions> = fields.take("stream_options")?;
        if stream_options.is_some() && !stream {
            return Err(invalid("stream_options", "requires stream: true"));
        }
        let includes_usage = stream_options.and_then(|options| options.include_usage).unwrap_or(false);
        Ok(Self { model, sampling, choices, stop, max_tokens: limit, min_tokens, stream, includes_usage })
    }
}

/// vLLM's parameters `min_tokens` and `ignore_eos`, which benchmarks send.
fn min_tokens(fields: &mut Fields, max_tokens: Option<usize>) -> Result<usize, ApiError> {
    let least = fields.take::<usize>("min_tokens")?.unwrap_or(0);
    match max_tokens {
        Some(most) if least > most => Err(invalid("min_tokens", format!("{least} is more than max_tokens, {most}"))),
        _ if fields.take::<bool>("ignore_eos")?.unwrap_or(false) => Ok(usize::MAX),
        _ => Ok(least),
    }
}

fn sampling(fields: &mut Fields) -> Result<Sampling, ApiError> {
    let default = Sampling::default();
    let seed = match fields.take_value("seed") {
        None => rand::random(),
        // OpenAI's is signed.
        Some(value) if value.is_u64() => typed::<u64>("seed", value)?,
        Some(value) => typed::<i64>("seed", value)?.cast_unsigned(),
    };
    let top_k = match fields.take::<i64>("top_k")? {
        None | Some(-1) => 0,
        Some(top_k) => usize::try_from(top_k)
            .map_err(|_| invalid("top_k", format!("{top_k} is less than -1; 0 and -1 mean all tokens")))?,
    };
    let mut number = |name: &str, default: f32| fields.take::<f32>(name).map(|found| found.unwrap_or(default));
    Ok(Sampling {
        temperature: number("temperature", default.temperature)?,
        top_p: number("top_p", default.top_p)?,
        min_p: number("min_p", default.min_p)?,
        repetition_penalty: number("repetition_penalty", default.repetition_penalty)?,
        presence_penalty: number("presence_penalty", default.presence_penalty)?,
        frequency_penalty: number("frequency_penalty", default.frequency_penalty)?,
        logit_bias: logit_bias(fields)?,
        top_k,
        seed,
        logprobs: None,
    })
}

/// An object whose keys are token ids.
fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let found: Option<std::collections::BTreeMap<String, f32>> = fields.take("logit_bias")?;
    let entry = |(key, bias): (String, f32)| match key.parse() {
        Ok(token) => Ok((token, bias)),
        Err(_) => Err(invalid(format!("logit_bias.{key}"), "the key is not a token id")),
    };
    found.unwrap_or_default().into_iter().map(entry).collect()
}

/// A string or at most four.
fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let strings: Vec<String> = match fields.take_value("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text],
        Some(list) => typed("stop", list)?,
    };
    if strings.len() > STOP_STRINGS {
        return Err(invalid("stop", format!("{} strings; at most {STOP_STRINGS}", strings.len())));
    }
    match strings.iter().position(String::is_empty) {
        Some(index) => Err(invalid(format!("stop[{index}]"), "the string is empty")),
        None => Ok(strings),
    }
}

/// Refuses what no language model here does yet.
pub fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    if let Some(format) = fields.take_value("response_format")
        && format["type"] != "text"
    {
        return Err(match format["type"].as_str() {
            Some(kind) => unsupported("response_format", format!("type {kind:?} is not supported, \"text\" is")),
            None => invalid("response_format.type", "a string is expected"),
        });
    }
    for name in [
        "tools",
        "functions",
        "tool_choice",
        "function_call",
        "audio",
        "prediction",
        "reasoning_effort",
        "web_search_options",
        "verbosity",
        "moderation",
    ] {
        fields.refuse(name, asks)?;
    }
    if let Some(modalities) = fields.take::<Vec<String>>("modalities")?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(unsupported("modalities", "\"text\" alone is supported"));
    }
    Ok(())
}
