//! The content of messages: texts. Other parts are refused by name.

use serde_json::Value;

use super::{
    error::ApiError,
    fields::{invalid, typed, unsupported},
};

/// A text, or the texts of a list of parts, a line each. `kinds`: the types of parts that have a text.
pub fn text(path: &str, content: Value, kinds: &[&str]) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        _ => return Err(invalid(path, "a string or a list of text parts is expected")),
    };
    let part = |(index, mut part): (usize, Value)| match part["type"].as_str() {
        Some(kind) if kinds.contains(&kind) => typed::<String>(&format!("{path}[{index}].text"), part["text"].take()),
        Some(kind) => Err(unsupported(format!("{path}[{index}].type"), refusal(kind, kinds[0]))),
        None => Err(invalid(format!("{path}[{index}].type"), "a string is expected")),
    };
    let texts: Vec<String> = parts.into_iter().enumerate().map(part).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

fn refusal(kind: &str, text: &str) -> String {
    let what = match kind {
        "image_url" | "input_image" | "image_file" | "image" => "images",
        "input_audio" | "audio" | "audio_url" => "audio",
        "video_url" | "video" | "input_video" => "videos",
        "file" | "input_file" => "files",
        _ => return format!("{kind:?} is not supported, {text:?} is"),
    };
    format!("{what} cannot be read: {kind:?} is not supported, and this model reads text, in parts of type {text:?}")
}
