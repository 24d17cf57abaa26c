//! Requests to a language model and its answers as tensors, by the names of Triton's vLLM and TensorRT-LLM backends: BYTES
//! `text_input` or `messages` in, BYTES `text_output` out, one element each.
//!
//! Parameters are parameters of the request or further inputs, by the names of HTTP. They are read by the same code.

use serde_json::{Map, Value};
use tonic::Status;

use super::{
    contents::{self, BYTES, Elements, FP32, TensorError, output_texts, put, wanted},
    errors::{of_parameter, of_tensor},
    protocol::{
        InferParameter, ModelInferRequest, ModelInferResponse, infer_parameter::ParameterChoice,
        model_infer_request::InferInputTensor, model_metadata_response::TensorMetadata,
    },
};
use crate::{
    api::openai::{
        chat,
        error::ApiError,
        fields::{Fields, invalid, unsupported},
        options::{Options, refuse_unsupported},
        usage::finish_reason,
    },
    engine::generate::{Adapter, sequence::FinishReason},
    service::{
        Inputs,
        generate::{Generation, Prompt},
    },
};

pub const TEXT_INPUT: &str = "text_input";
pub const MESSAGES: &str = "messages";
pub const TEXT_OUTPUT: &str = "text_output";
/// Parameter of a response: whether it is the last one to its request.
pub const FINAL: &str = "triton_final_response";
/// Parameters of the last response: why the answer ended, and its tokens.
pub const FINISH_REASON: &str = "finish_reason";
pub const PROMPT_TOKENS: &str = "prompt_tokens";
pub const COMPLETION_TOKENS: &str = "completion_tokens";
/// Parameters in a JSON object, as the vLLM backend takes them.
const SAMPLING_PARAMETERS: &str = "sampling_parameters";
/// Parameters of the protocol itself, which change no answer here.
const IGNORED: [&str; 6] =
    ["sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"];
/// Parameters that may be numbers in a string: clients of the vLLM backend send them so.
const NUMBERS: [&str; 9] = [
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
];

/// What a request asks for.
pub struct Asked {
    pub generation: Generation,
    /// Whether the answer comes in pieces.
    pub is_stream: bool,
}

/// Reads a request, which `adapter` answers, or else the model's own weights.
pub fn read(request: &ModelInferRequest, adapter: Option<Adapter>) -> Result<Asked, Status> {
    wanted(request, &[TEXT_OUTPUT]).map_err(of_tensor)?;
    let mut parameters = Map::new();
    for (name, parameter) in &request.parameters {
        if !IGNORED.contains(&name.as_str()) && !name.starts_with("triton_") {
            add(&mut parameters, name, value(parameter)).map_err(of_parameter)?;
        }
    }
    let mut prompts = Vec::new();
    for (index, input) in request.inputs.iter().enumerate() {
        let mut values = contents::values(request, index).map_err(of_tensor)?;
        match input.name.as_str() {
            TEXT_INPUT | MESSAGES => prompts.push(prompt(input, values)?),
            name @ ("stop" | "stop_words") => add(&mut parameters, name, values.into()).map_err(of_parameter)?,
            name => match values.pop() {
                Some(value) if values.is_empty() => add(&mut parameters, name, value).map_err(of_parameter)?,
                _ => return Err(of_tensor(one_element(input))),
            },
        }
    }
    let prompt = match (prompts.pop(), prompts.pop()) {
        (Some(prompt), None) => prompt,
        _ => {
            let message = "a request to a language model has one of the inputs \"text_input\" and \"messages\"";
            return Err(Status::invalid_argument(message));
        }
    };
    asked(prompt, Fields::of(parameters), adapter).map_err(of_parameter)
}

fn asked(prompt: Prompt, mut fields: Fields, adapter: Option<Adapter>) -> Result<Asked, ApiError> {
    let options = Options::take(&mut fields, &["max_tokens"])?;
    if options.model.is_some() {
        return Err(invalid("model", "the request has the name of the model in model_name"));
    }
    if options.choices != 1 {
        return Err(invalid("n", "a request has one answer"));
    }
    refuse_unsupported(&mut fields)?;
    fields.finish()?;
    let generation = Generation {
        prompt,
        choices: 1,
        sampling: options.sampling,
        stop: options.stop,
        max_tokens: options.max_tokens,
        min_tokens: options.min_tokens,
        adapter,
    };
    Ok(Asked { generation, is_stream: options.stream })
}

fn one_element(input: &InferInputTensor) -> TensorError {
    TensorError::Shape { input: input.name.clone(), shape: input.shape.clone(), takes: "one element" }
}

/// The prompt of the input `text_input` or `messages`.
fn prompt(input: &InferInputTensor, values: Vec<Value>) -> Result<Prompt, Status> {
    let [value] = <[Value; 1]>::try_from(values).map_err(|_| of_tensor(one_element(input)))?;
    let Value::String(text) = value else {
        let (datatype, takes) = (input.datatype.clone(), BYTES);
        return Err(of_tensor(TensorError::Datatype { input: input.name.clone(), datatype, takes }));
    };
    if input.name == TEXT_INPUT {
        return Ok(Prompt::Inputs(Inputs::Texts(vec![text])));
    }
    let messages = json(MESSAGES, &text).and_then(chat::messages).map_err(of_parameter)?;
    Ok(Prompt::Chat(messages))
}

fn json(name: &str, text: &str) -> Result<Value, ApiError> {
    serde_json::from_str(text).map_err(|error| invalid(name, format!("not JSON: {error}")))
}

fn value(parameter: &InferParameter) -> Value {
    match &parameter.parameter_choice {
        None => Value::Null,
        Some(ParameterChoice::BoolParam(value)) => (*value).into(),
        Some(ParameterChoice::Int64Param(value)) => (*value).into(),
        Some(ParameterChoice::Uint64Param(value)) => (*value).into(),
        // JSON has no number that is not finite, so such a one is a text, which no parameter takes.
        Some(ParameterChoice::DoubleParam(value)) if !value.is_finite() => value.to_string().into(),
        Some(ParameterChoice::DoubleParam(value)) => (*value).into(),
        Some(ParameterChoice::StringParam(value)) => value.as_str().into(),
    }
}

/// Adds a parameter, or all those of `sampling_parameters`.
fn add(parameters: &mut Map<String, Value>, name: &str, value: Value) -> Result<(), ApiError> {
    if name != SAMPLING_PARAMETERS {
        return add_one(parameters, name, value);
    }
    let object = match &value {
        Value::String(text) => json(name, text)?,
        _ => value,
    };
    let Value::Object(object) = object else { return Err(invalid(name, "a JSON object in a string is expected")) };
    object.into_iter().try_for_each(|(name, value)| add_one(parameters, &name, value))
}

fn add_one(parameters: &mut Map<String, Value>, name: &str, mut value: Value) -> Result<(), ApiError> {
    let name = match name {
        "exclude_input_in_output" | "exclude_input_from_output" if value == true => return Ok(()),
        "exclude_input_in_output" | "exclude_input_from_output" => {
            return Err(unsupported(name, "an answer never begins with its prompt"));
        }
        // The names of the TensorRT-LLM backend, whose clients send an empty text for no stop string.
        "stop_words" => {
            if let Value::Array(strings) = &mut value {
                strings.retain(|string| string != "");
            }
            "stop"
        }
        "random_seed" => "seed",
        name => name,
    };
    if NUMBERS.contains(&name)
        && let Value::String(text) = &value
        && let Ok(Value::Number(number)) = serde_json::from_str(text)
    {
        value = Value::Number(number);
    }
    match parameters.insert(name.to_owned(), value) {
        Some(_) => Err(invalid(name, "given twice")),
        None => Ok(()),
    }
}

/// What a request asks a language model, as the HTTP API would have it: an object with `messages` or `prompt`. `None` for a
/// request to another kind of model, or one that cannot be read.
pub fn question(request: &ModelInferRequest) -> Option<Value> {
    let index = request.inputs.iter().position(is_prompt)?;
    let [text] = <[String; 1]>::try_from(contents::texts(request, index).ok()?).ok()?;
    let (name, value) = match request.inputs[index].name.as_str() {
        TEXT_INPUT => ("prompt", text.into()),
        _ => (MESSAGES, serde_json::from_str(&text).ok()?),
    };
    let model = ("model".to_owned(), request.model_name.as_str().into());
    Some(Value::Object(Map::from_iter([model, (name.to_owned(), value)])))
}

/// Whether a request is one to a language model.
pub fn is_generation(request: &ModelInferRequest) -> bool {
    request.inputs.iter().any(is_prompt)
}

fn is_prompt(input: &InferInputTensor) -> bool {
    matches!(input.name.as_str(), TEXT_INPUT | MESSAGES)
}

/// The end of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// OpenAI's word.
    pub finish_reason: String,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// Puts a piece of text into a response, and with `end` why the answer ended and its tokens of prompt and answer.
pub fn encode(is_raw: bool, text: &str, end: Option<(FinishReason, usize, usize)>, response: &mut ModelInferResponse) {
    put(response, is_raw, TEXT_OUTPUT, vec![1], Elements::Texts(vec![text]));
    if let Some((reason, prompt_tokens, completion_tokens)) = end {
        set(response, FINISH_REASON, ParameterChoice::StringParam(finish_reason(reason).into()));
        set_tokens(response, PROMPT_TOKENS, prompt_tokens as u64);
        set_tokens(response, COMPLETION_TOKENS, completion_tokens as u64);
    }
}

/// Sets a parameter of a response.
pub fn set(response: &mut ModelInferResponse, name: &str, value: ParameterChoice) {
    response.parameters.insert(name.to_owned(), InferParameter { parameter_choice: Some(value) });
}

/// Sets a number of tokens in a response.
pub fn set_tokens(response: &mut ModelInferResponse, name: &str, tokens: u64) {
    set(response, name, ParameterChoice::Int64Param(i64::try_from(tokens).unwrap_or(i64::MAX)));
}

/// Text of a response and, in the last one, the end of the answer. `None`: it has no such text.
pub fn decode(response: &ModelInferResponse) -> Option<(String, Option<Ending>)> {
    let [text] = <[String; 1]>::try_from(output_texts(response, TEXT_OUTPUT)?).ok()?;
    let ending = match parameter(response, FINISH_REASON) {
        Some(ParameterChoice::StringParam(reason)) => Some(Ending {
            finish_reason: reason.clone(),
            prompt_tokens: tokens(response, PROMPT_TOKENS).unwrap_or_default(),
            completion_tokens: tokens(response, COMPLETION_TOKENS).unwrap_or_default(),
        }),
        _ => None,
    };
    Some((text, ending))
}

/// Tokens that a response reports, of prompts and answers together.
pub fn reported_tokens(response: &ModelInferResponse) -> Option<u64> {
    let prompt = tokens(response, PROMPT_TOKENS)?;
    Some(prompt + tokens(response, COMPLETION_TOKENS).unwrap_or_default())
}

/// Whether a response is the last one to its request.
pub fn is_final(response: &ModelInferResponse) -> bool {
    parameter(response, FINAL) == Some(&ParameterChoice::BoolParam(true))
}

fn parameter<'a>(response: &'a ModelInferResponse, name: &str) -> Option<&'a ParameterChoice> {
    response.parameters.get(name)?.parameter_choice.as_ref()
}

fn tokens(response: &ModelInferResponse, name: &str) -> Option<u64> {
    match parameter(response, name)? {
        ParameterChoice::Int64Param(tokens) => u64::try_from(*tokens).ok(),
        _ => None,
    }
}

/// Inputs and outputs of a language model for `ModelMetadata`. Each request has one of the first two inputs; the others are
/// optional.
pub fn describe() -> (Vec<TensorMetadata>, Vec<TensorMetadata>) {
    let inputs = [
        (TEXT_INPUT, BYTES, 1),
        (MESSAGES, BYTES, 1),
        ("stream", "BOOL", 1),
        ("max_tokens", "INT32", 1),
        ("temperature", FP32, 1),
        ("top_p", FP32, 1),
        ("top_k", "INT32", 1),
        ("seed", "UINT64", 1),
        ("stop", BYTES, -1),
        (SAMPLING_PARAMETERS, BYTES, 1),
    ];
    let inputs = inputs.into_iter().map(|(name, datatype, size)| contents::metadata(name, datatype, &[size]));
    (inputs.collect(), vec![contents::metadata(TEXT_OUTPUT, BYTES, &[1])])
}
