//! Conversations in OpenAI's chat format: what a language model reads, and the answer that it should give.

use serde_json::{Map, Value};

/// Roles of messages.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// A conversation as a row: the messages before the last one, and the last one, which is the assistant's. Both are JSON
/// with sorted keys, so that the same conversation is the same row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conversation {
    pub before: String,
    pub answer: String,
}

impl Conversation {
    /// Reads a JSON list of messages.
    ///
    /// # Errors
    /// What is wrong, by the number of the message from 0.
    pub fn parse(json: &str) -> Result<Self, String> {
        let mut messages: Vec<Value> =
            serde_json::from_str(json).map_err(|error| format!("not a JSON list of messages: {error}"))?;
        messages.iter_mut().for_each(Value::sort_all_objects);
        for (index, message) in messages.iter().enumerate() {
            check(message).map_err(|error| format!("message {index}: {error}"))?;
        }
        let is_assistant = |message: &Value| message["role"] == "assistant";
        match messages.split_last() {
            Some((last, before)) if is_assistant(last) && !before.is_empty() => {
                Ok(Self { before: Value::from(before.to_vec()).to_string(), answer: last.to_string() })
            }
            Some((last, [])) if is_assistant(last) => Err("no message is before the assistant's".into()),
            Some(_) => Err("the last message is not the assistant's".into()),
            None => Err("no messages".into()),
        }
    }

    /// A request to a language model, and the text that it should have been answered with.
    pub fn corrected(messages: &[Value], expected: &str) -> Self {
        let mut answer = Map::new();
        answer.insert("role".into(), "assistant".into());
        answer.insert("content".into(), expected.into());
        let sorted = |mut value: Value| {
            value.sort_all_objects();
            value.to_string()
        };
        Self { before: sorted(messages.to_vec().into()), answer: sorted(answer.into()) }
    }
}

/// A message has a role, and text or calls of tools.
fn check(message: &Value) -> Result<(), String> {
    let Some(message) = message.as_object() else { return Err("not an object".into()) };
    let role = match message.get("role").and_then(Value::as_str) {
        Some(role) if ROLES.contains(&role) => role,
        Some(role) => return Err(format!("role {role:?} is none of {}", ROLES.join(", "))),
        None => return Err("role is missing".into()),
    };
    let has_calls = message.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty());
    match message.get("content") {
        Some(Value::String(text)) if role != "assistant" || !text.trim().is_empty() || has_calls => Ok(()),
        Some(Value::String(_)) => Err("the assistant's content is empty".into()),
        Some(Value::Array(parts)) => parts.iter().try_for_each(check_part),
        None | Some(Value::Null) if has_calls => Ok(()),
        None | Some(Value::Null) => Err("content is missing".into()),
        Some(_) => Err("content is not text".into()),
    }
}

/// Models here read text only.
fn check_part(part: &Value) -> Result<(), String> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(_)) => Ok(()),
        (Some("text"), None) => Err("a part of content has no text".into()),
        (kind, _) => Err(format!("a part of content has the type {}, only text is supported", kind.unwrap_or("null"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_message_is_the_answer() {
        let json = r#"[{"role": "user", "content": "a"}, {"content": "b", "role": "assistant"}]"#;
        let conversation = Conversation::parse(json).unwrap();
        assert_eq!(conversation.before, r#"[{"content":"a","role":"user"}]"#);
        assert_eq!(conversation.answer, r#"{"content":"b","role":"assistant"}"#);
        let messages: Vec<Value> = serde_json::from_str(&conversation.before).unwrap();
        assert_eq!(Conversation::corrected(&messages, "b"), conversation);
        let unsorted: Vec<Value> = serde_json::from_str(r#"[{"role": "user", "content": "a"}]"#).unwrap();
        assert_eq!(Conversation::corrected(&unsorted, "b"), conversation);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let user = r#"{"role": "user", "content": "a"}"#;
        let assistant = r#"{"role": "assistant", "content": "b"}"#;
        for (json, message) in [
            ("[".to_owned(), "not a JSON list of messages: EOF"),
            ("[]".to_owned(), "no messages"),
            (format!("[{user}]"), "the last message is not the assistant's"),
            (format!("[{assistant}]"), "no message is before the assistant's"),
            (format!("[{user}, 5]"), "message 1: not an object"),
            (format!("[{{\"content\": \"a\"}}, {assistant}]"), "message 0: role is missing"),
            (format!("[{{\"role\": \"bot\"}}, {assistant}]"), "message 0: role \"bot\" is none of system, "),
            (format!("[{{\"role\": \"user\"}}, {assistant}]"), "message 0: content is missing"),
            (
                format!("[{user}, {{\"role\": \"assistant\", \"content\": \" \"}}]"),
                "message 1: the assistant's content is",
            ),
            (
                format!("[{{\"role\": \"user\", \"content\": [{{\"type\": \"image_url\"}}]}}, {assistant}]"),
                "message 0: a part of content has the type image_url",
            ),
        ] {
            let error = Conversation::parse(&json).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
        let call = r#"{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}"#;
        assert!(Conversation::parse(&format!("[{user}, {call}]")).is_ok());
    }
}
