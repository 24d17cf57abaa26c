//! Functions and structured output of a response: the parameters of this route in the shape of a chat's, which
//! [`structure`] reads.

use serde_json::{Map, Value, json};

use super::super::{
    error::ApiError,
    fields::{Fields, invalid, typed, unsupported},
    structure::{self, Asked},
};
use crate::service::calls::CallFormat;

/// Parameters of a response that it repeats.
pub type Repeated = [(String, Value); 4];

/// Takes `tools`, `tool_choice`, `parallel_tool_calls` and `text`. `format`: how the model writes calls.
pub fn take(fields: &mut Fields, format: CallFormat) -> Result<(Asked, Repeated), ApiError> {
    let tools: Vec<Value> = fields.take("tools")?.unwrap_or_default();
    let choice = fields.take_value("tool_choice").unwrap_or_else(|| "auto".into());
    let several: bool = fields.take("parallel_tool_calls")?.unwrap_or(true);
    let text: Map<String, Value> = fields.take("text")?.unwrap_or_default();
    let mut text_format = json!({"type": "text"});
    for (name, value) in text {
        match name.as_str() {
            "format" if value.is_null() => {}
            "format" => text_format = value,
            "verbosity" if value.is_null() || value == "medium" => {}
            "verbosity" => return Err(unsupported("text.verbosity", "\"medium\" alone is supported")),
            _ => return Err(invalid(format!("text.{name}"), "there is no such parameter")),
        }
    }
    let functions = tools.iter().enumerate().map(|(index, tool)| function(&format!("tools[{index}]"), tool.clone()));
    let chat = [
        ("tools".to_owned(), functions.collect::<Result<Value, _>>()?),
        ("tool_choice".to_owned(), named(choice.clone())),
        ("parallel_tool_calls".to_owned(), several.into()),
        ("response_format".to_owned(), response_format(text_format.clone())),
    ];
    let asked = structure::take(&mut Fields::of(Map::from_iter(chat)), format).map_err(renamed)?;
    let repeated = [
        ("tools".to_owned(), tools.into()),
        ("tool_choice".to_owned(), choice),
        ("parallel_tool_calls".to_owned(), several.into()),
        ("text".to_owned(), json!({"format": text_format})),
    ];
    Ok((asked, repeated))
}

/// A function as a chat has it.
fn function(path: &str, tool: Value) -> Result<Value, ApiError> {
    let mut tool: Map<String, Value> = typed(path, tool)?;
    let kind: String = match tool.remove("type") {
        Some(kind) => typed(&format!("{path}.type"), kind)?,
        None => return Err(invalid(format!("{path}.type"), "missing")),
    };
    if kind != "function" {
        let message =
            format!("{kind:?} is not supported: there are no built-in tools, \"function\" alone is supported");
        return Err(unsupported(format!("{path}.type"), message));
    }
    Ok(json!({"type": "function", "function": tool}))
}

/// The choice of a function as a chat has it.
fn named(mut choice: Value) -> Value {
    if choice["type"] == "function"
        && let Some(fields) = choice.as_object_mut()
    {
        let name = fields.remove("name");
        fields.insert("function".into(), json!({"name": name}));
    }
    choice
}

/// The format of an answer as a chat has it.
fn response_format(mut format: Value) -> Value {
    if format["type"] == "json_schema"
        && let Some(fields) = format.as_object_mut()
    {
        let mut schema = std::mem::take(fields);
        schema.remove("type");
        return json!({"type": "json_schema", "json_schema": schema});
    }
    format
}

/// The error with the names that its parameters have here.
pub fn renamed(error: ApiError) -> ApiError {
    let Some(param) = &error.param else { return error };
    let renamed = match param.strip_prefix("response_format") {
        Some(rest) => format!("text.format{}", rest.strip_prefix(".json_schema").unwrap_or(rest)),
        None if param.starts_with("tool") => param.replacen(".function", "", 1),
        None => return error,
    };
    let message = match error.message.strip_prefix(param.as_str()) {
        Some(rest) => format!("{renamed}{rest}"),
        None => error.message.clone(),
    };
    ApiError { message, ..error }.param(renamed)
}
