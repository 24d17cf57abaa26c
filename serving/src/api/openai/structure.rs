//! Parameters of a chat that ask for more than text: `response_format`, `tools`, `tool_choice`.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    error::ApiError,
    fields::{Fields, asks, invalid, typed, unsupported},
};
use crate::service::{
    Generator, ServiceError,
    calls::{CallFormat, Function, parse::Reading},
    closed::close,
    generate::Structure,
    grammar::Grammar,
};

/// Most functions of a request, as at OpenAI.
const MOST_FUNCTIONS: usize = 128;
/// Longest name of a function, as at OpenAI.
const LONGEST_NAME: usize = 64;

/// What a request asks for, and how its answers are read.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub structure: Structure,
    /// Absent: answers are text.
    pub reading: Option<Reading>,
    /// Schema of an answer that may also be a call.
    pub schema: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResponseFormat {
    r#type: String,
    json_schema: Option<JsonSchema>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonSchema {
    #[serde(rename = "name")]
    _name: String,
    #[serde(rename = "description")]
    _description: Option<String>,
    schema: Map<String, Value>,
    /// A schema is always followed.
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tool {
    r#type: String,
    function: ToolFunction,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ToolFunction {
    name: String,
    #[serde(rename = "description")]
    _description: Option<String>,
    parameters: Option<Map<String, Value>>,
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

/// `tool_choice`
#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    Auto,
    None,
    Required,
    /// Index of the function.
    Named(usize),
}

/// Takes the parameters. `format`: how the model writes calls.
pub fn take(fields: &mut Fields, format: CallFormat) -> Result<Asked, ApiError> {
    for (name, instead) in [("functions", "tools"), ("function_call", "tool_choice")] {
        if fields.take_value(name).is_some_and(|value| asks(&value)) {
            return Err(unsupported(name, format!("not supported; use {instead}")));
        }
    }
    let grammar = fields.take_value("response_format").map(response_format).transpose()?.flatten();
    let several = fields.take("parallel_tool_calls")?.unwrap_or(true);
    let definitions: Vec<Value> = fields.take("tools")?.unwrap_or_default();
    let functions = functions(&definitions)?;
    let choice = fields.take_value("tool_choice").map(|choice| self::choice(choice, &functions)).transpose()?;
    let choice = choice.unwrap_or(Choice::Auto);
    if functions.is_empty() || choice == Choice::None {
        let structure = Structure { functions: None, grammar };
        return Ok(Asked { structure, reading: None, schema: None });
    }
    let (callable, several) = match choice {
        Choice::Named(index) => (vec![functions[index].clone()], false),
        _ => (functions, several),
    };
    // An answer that has to be a call is not the JSON of `response_format`.
    let enforced = choice != Choice::Auto;
    let schema = match grammar {
        Some(Grammar::Json(schema)) if !enforced => Some(schema),
        _ => None,
    };
    let grammar = match &schema {
        Some(schema) => Some(format.grammar_or_json(&callable, several, schema)),
        None => enforced.then(|| format.grammar(&callable, several)),
    };
    let structure = Structure { functions: Some(definitions), grammar: grammar.map(Grammar::Lark) };
    let reading = Reading { format, functions: callable.into(), enforced, several };
    Ok(Asked { structure, reading: Some(reading), schema })
}

/// Refuses a least number of tokens for an answer that ends by its grammar.
pub fn check_min_tokens(structure: &Structure, min_tokens: usize) -> Result<(), ApiError> {
    if min_tokens > 0 && structure.grammar.is_some() {
        let message = "neither min_tokens nor ignore_eos is supported with a schema or a required call";
        return Err(unsupported("min_tokens", message));
    }
    Ok(())
}

/// The grammar of a format; `None` for text.
fn response_format(value: Value) -> Result<Option<Grammar>, ApiError> {
    if !value["type"].is_string() {
        return Err(invalid("response_format.type", "a string is expected"));
    }
    let format: ResponseFormat = typed("response_format", value)?;
    match (format.r#type.as_str(), format.json_schema) {
        ("json_schema", Some(JsonSchema { schema, .. })) => {
            let mut schema = Value::from(schema);
            close(&mut schema);
            Ok(Some(Grammar::Json(schema)))
        }
        ("json_schema", None) => Err(invalid("response_format.json_schema", "missing")),
        (_, Some(_)) => Err(invalid("response_format.json_schema", "requires type \"json_schema\"")),
        ("json_object", None) => Ok(Some(Grammar::Json(json!({"type": "object"})))),
        ("text", None) => Ok(None),
        (other, None) => {
            let known = "\"text\", \"json_object\" and \"json_schema\" are";
            Err(unsupported("response_format.type", format!("{other:?} is not supported, {known}")))
        }
    }
}

fn functions(definitions: &[Value]) -> Result<Vec<Function>, ApiError> {
    if definitions.len() > MOST_FUNCTIONS {
        return Err(invalid("tools", format!("{} functions; at most {MOST_FUNCTIONS}", definitions.len())));
    }
    let mut functions: Vec<Function> = Vec::new();
    for (index, definition) in definitions.iter().enumerate() {
        let path = format!("tools[{index}]");
        let tool: Tool = typed(&path, definition.clone())?;
        if tool.r#type != "function" {
            let message = format!("{:?} is not supported, \"function\" is", tool.r#type);
            return Err(unsupported(format!("{path}.type"), message));
        }
        let name = tool.function.name;
        let is_letter = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(is_letter) {
            let message = format!("{name:?} is not 1 to {LONGEST_NAME} of the characters a-z, A-Z, 0-9, _ and -");
            return Err(invalid(format!("{path}.function.name"), message));
        }
        if functions.iter().any(|function| function.name == name) {
            return Err(invalid(format!("{path}.function.name"), format!("{name:?} is the name of two functions")));
        }
        let none = || Map::from_iter([("properties".to_owned(), json!({}))]);
        let mut parameters = tool.function.parameters.unwrap_or_else(none);
        match parameters.get("type") {
            Some(kind) if kind != "object" => {
                return Err(invalid(format!("{path}.function.parameters.type"), "\"object\" is expected"));
            }
            _ => parameters.insert("type".into(), "object".into()),
        };
        let mut parameters = Value::from(parameters);
        close(&mut parameters);
        functions.push(Function { name, parameters });
    }
    Ok(functions)
}

fn choice(choice: Value, functions: &[Function]) -> Result<Choice, ApiError> {
    let choice = match choice.as_str() {
        Some("auto") => return Ok(Choice::Auto),
        Some("none") => return Ok(Choice::None),
        Some("required") => Choice::Required,
        Some(other) => {
            let message = format!("{other:?} is none of \"auto\", \"none\" and \"required\"");
            return Err(invalid("tool_choice", message));
        }
        None => match (choice["type"].as_str(), choice["function"]["name"].as_str()) {
            (Some("function"), Some(name)) => match functions.iter().position(|function| function.name == name) {
                Some(index) => Choice::Named(index),
                None => return Err(invalid("tool_choice.function.name", format!("{name:?} is not in tools"))),
            },
            (Some("function"), None) => return Err(invalid("tool_choice.function.name", "missing")),
            (Some(other), _) => {
                return Err(unsupported("tool_choice.type", format!("{other:?} is not supported, \"function\" is")));
            }
            (None, _) => return Err(invalid("tool_choice", "a string or an object is expected")),
        },
    };
    if functions.is_empty() {
        return Err(invalid("tool_choice", "requires tools"));
    }
    Ok(choice)
}

/// The error of a request whose answers were not started. One of a grammar names the parameter that has the schema.
/// `schema`: that of [`Asked`].
pub async fn refused(
    error: ServiceError,
    functions: Option<&[Function]>,
    schema: Option<Value>,
    generator: &Generator,
) -> ApiError {
    if !matches!(error, ServiceError::Grammar(_)) {
        return error.into();
    }
    let named = |param: String, error: ServiceError| {
        let error = ApiError::from(error);
        let message = format!("{param}: {}", error.message);
        ApiError { message, ..error }.param(param)
    };
    let Some(functions) = functions else { return named("response_format.json_schema.schema".into(), error) };
    for (index, function) in functions.iter().enumerate() {
        if let Err(error) = generator.check_grammar(&Grammar::Json(function.parameters.clone())).await {
            return named(format!("tools[{index}].function.parameters"), error);
        }
    }
    if let Some(schema) = schema
        && let Err(error) = generator.check_grammar(&Grammar::Json(schema)).await
    {
        return named("response_format.json_schema.schema".into(), error);
    }
    // Each of them can be followed by itself: together they are too large.
    named("tools".into(), error)
}
