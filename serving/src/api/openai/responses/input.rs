//! The input of a response as the messages of a conversation.

use serde_json::{Map, Value, json};

use super::super::{
    content,
    error::ApiError,
    fields::{invalid, typed, unsupported},
};

/// Types of parts that have a text: what a user says and what an earlier response said.
const TEXTS: [&str; 3] = ["input_text", "output_text", "text"];

/// Messages as chat templates read them: `instructions` as the system's, then `input`, which is a text or a list of
/// message items.
///
/// # Errors
/// An item of another type than `message`, a part that is no text, or a wrong role; each error names its place.
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
        messages.push(item(&format!("input[{index}]"), value)?);
    }
    Ok(messages)
}

fn item(path: &str, value: Value) -> Result<Value, ApiError> {
    let mut fields: Map<String, Value> = typed(path, value)?;
    let kind: String = match fields.remove("type") {
        Some(kind) => typed(&format!("{path}.type"), kind)?,
        None => "message".into(),
    };
    match kind.as_str() {
        "message" => {}
        "item_reference" => {
            return Err(unsupported(format!("{path}.type"), "items are not stored; send the item itself"));
        }
        other => {
            return Err(unsupported(format!("{path}.type"), format!("{other:?} is not supported, \"message\" is")));
        }
    }
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
