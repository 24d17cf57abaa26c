//! The input of a response as the messages of a conversation: messages, calls of functions and their results.

use serde_json::{Map, Value, json};

use super::super::{
    content,
    error::ApiError,
    fields::{invalid, typed, unsupported},
};

/// Types of parts that have a text: what a user says and what an earlier response said.
const TEXTS: [&str; 3] = ["input_text", "output_text", "text"];

/// Messages as chat templates read them: `instructions` as the system's, then `input`, which is a text or a list of
/// items. A call belongs to the assistant's message before it.
///
/// # Errors
/// An item of another type than `message`, `function_call` and `function_call_output`, a part that is no text, a wrong
/// role, or a result without its call; each error names its place.
pub fn messages(instructions: Option<&str>, input: Value) -> Result<Vec<Value>, ApiError> {
    let system = instructions.filter(|text| !text.is_empty());
    let mut messages: Vec<Value> = system.map(|text| json!({"role": "system", "content": text})).into_iter().collect();
    let items = match input {
        Value::String(text) => vec![json!({"role": "user", "content": text})],
        Value::Array(items) => items,
        _ => return Err(invalid("input", "a string or a list of items is expected")),
    };
    if items.is_empty() {
        return Err(invalid("input", "the list is empty"));
    }
    for (index, value) in items.into_iter().enumerate() {
        item(&format!("input[{index}]"), value, &mut messages)?;
    }
    Ok(messages)
}

fn item(path: &str, value: Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields: Map<String, Value> = typed(path, value)?;
    let kind: String = match fields.remove("type") {
        Some(kind) => typed(&format!("{path}.type"), kind)?,
        None => "message".into(),
    };
    match kind.as_str() {
        "message" => messages.push(message(path, fields)?),
        "function_call" => call(path, &mut fields, messages)?,
        "function_call_output" => messages.push(result(path, &mut fields, messages)?),
        "item_reference" => {
            return Err(unsupported(format!("{path}.type"), "items are not stored; send the item itself"));
        }
        other => {
            let known = "\"message\", \"function_call\" and \"function_call_output\" are";
            return Err(unsupported(format!("{path}.type"), format!("{other:?} is not supported, {known}")));
        }
    }
    Ok(())
}

fn text(path: &str, fields: &mut Map<String, Value>, name: &str) -> Result<String, ApiError> {
    let path = format!("{path}.{name}");
    match fields.remove(name).filter(|value| !value.is_null()) {
        Some(value) => typed(&path, value),
        None => Err(invalid(path, "missing")),
    }
}

/// Adds a call to the assistant's message before it, or to one of its own.
fn call(path: &str, fields: &mut Map<String, Value>, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let id = text(path, fields, "call_id")?;
    let name = text(path, fields, "name")?;
    let arguments = text(path, fields, "arguments")?;
    // Templates read arguments as an object.
    let arguments = serde_json::from_str(&arguments).unwrap_or(Value::String(arguments));
    let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    let Some(last) = messages.last_mut().filter(|last| last["role"] == "assistant") else {
        messages.push(json!({"role": "assistant", "content": "", "tool_calls": [call]}));
        return Ok(());
    };
    match last["tool_calls"].as_array_mut() {
        Some(calls) => calls.push(call),
        None => last["tool_calls"] = json!([call]),
    }
    Ok(())
}

/// The message with the result of an earlier call.
fn result(path: &str, fields: &mut Map<String, Value>, messages: &[Value]) -> Result<Value, ApiError> {
    let id = text(path, fields, "call_id")?;
    let mut calls = messages.iter().filter_map(|message| message["tool_calls"].as_array()).flatten();
    let Some(call) = calls.find(|call| call["id"] == id) else {
        return Err(invalid(format!("{path}.call_id"), format!("no function_call before it has the call_id {id:?}")));
    };
    let name = call["function"]["name"].clone();
    let content = match fields.remove("output").filter(|output| !output.is_null()) {
        Some(output) => content::text(&format!("{path}.output"), output, &TEXTS)?,
        None => return Err(invalid(format!("{path}.output"), "missing")),
    };
    Ok(json!({"role": "tool", "content": content, "tool_call_id": id, "name": name}))
}

fn message(path: &str, mut fields: Map<String, Value>) -> Result<Value, ApiError> {
    let role: String = match fields.remove("role") {
        Some(role) => typed(&format!("{path}.role"), role)?,
        None => return Err(invalid(format!("{path}.role"), "missing")),
    };
    let role = match role.as_str() {
        // Templates have the older name.
        "developer" => "system",
        "system" | "user" | "assistant" => role.as_str(),
        other => {
            let known = "\"system\", \"developer\", \"user\" and \"assistant\" are";
            return Err(invalid(format!("{path}.role"), format!("{other:?} is not supported, {known}")));
        }
    };
    let content = match fields.remove("content").filter(|content| !content.is_null()) {
        Some(content) => content::text(&format!("{path}.content"), content, &TEXTS)?,
        None => return Err(invalid(format!("{path}.content"), "missing")),
    };
    Ok(json!({"role": role, "content": content}))
}
