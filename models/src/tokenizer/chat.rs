//! Chat templates as transformers renders them, and where in the text the assistant speaks.
//!
//! A template is Jinja (<https://huggingface.co/docs/transformers/chat_templating>) with the settings, filters and
//! functions that transformers gives to it. Where the assistant's answers are follows from rendering parts of the
//! conversation and comparing, so it holds for any template; a template's own `{% generation %}` marks are read over.

use std::{collections::BTreeMap, ops::Range, path::Path, sync::Arc};

use jiff::civil::DateTime;
use minijinja::{Environment, ErrorKind, value::ValueKind};
use serde::Deserialize;

use super::python;
use crate::LoadError;

/// A JSON value whose fields keep their order, which templates show.
pub use minijinja::Value as Json;

const NAME: &str = "chat_template";
/// Instructions of one rendering: a template that loops for ever ends with an error.
const FUEL: u64 = 50_000_000;

/// Names of a message's reasoning, the newest first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// What `strftime_now` reads.
pub type Clock = Arc<dyn Fn() -> DateTime + Send + Sync>;

/// Why a template or a conversation cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    #[error("the chat template cannot be used: line {line}: {message}")]
    Template { line: usize, message: String },
    /// What the template says itself, or why an expression of it has no value.
    #[error("the chat template refuses the conversation: {0}")]
    Conversation(String),
    #[error("message {message} has no role")]
    NoRole { message: usize },
    #[error("the assistant's part of message {message} cannot be found: {reason}")]
    NoSpan { message: usize, reason: &'static str },
}

/// A conversation as a template sees it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Chat {
    /// Each with `role`, and `content`, `tool_calls` or what else the template reads.
    pub messages: Vec<Json>,
    /// Functions that may be called, as JSON schemas.
    #[serde(default)]
    pub tools: Option<Vec<Json>>,
    /// Further variables, such as `enable_thinking`.
    #[serde(default)]
    pub variables: BTreeMap<String, Json>,
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// The bytes of `text` that the assistant says, with the token that ends its turn, in order.
    pub assistant: Vec<Range<usize>>,
}

/// A compiled template. Shared between threads by reference.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are variables of it: `bos_token`, `eos_token` and so on.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>, clock: Clock) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| Ok(out.write_str(&python::str(value))?));
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<(), minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", move |format: String| {
            jiff::fmt::strtime::format(format, clock())
                .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
        });
        environment.add_template_owned(NAME, without_generation_marks(source)).map_err(|error| {
            let message = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            ChatError::Template { line: error.line().unwrap_or(1), message }
        })?;
        Ok(Self { environment, special_tokens })
    }

    /// The template of a model folder: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`. `None` if
    /// the model has none.
    pub fn load(folder: &Path, clock: Clock) -> Result<Option<Self>, LoadError> {
        let path = folder.join("tokenizer_config.json");
        let failed = |file: &Path, message: String| LoadError::File { file: file.to_owned(), message };
        let config = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| failed(&path, format!("not JSON: {error}")))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => serde_json::Value::Null,
            Err(error) => return Err(LoadError::io(&path, error)),
        };
        let own = folder.join("chat_template.jinja");
        let (file, source) = match std::fs::read_to_string(&own) {
            Ok(source) => (own, source),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match template_of(&config) {
                Some(source) => (path, source.to_owned()),
                None => return Ok(None),
            },
            Err(error) => return Err(LoadError::io(&own, error)),
        };
        let template = Self::new(&source, special_tokens(&config), clock);
        template.map(Some).map_err(|error| failed(&file, error.to_string()))
    }

    /// The template's text.
    pub fn source(&self) -> String {
        self.environment.get_template(NAME).map(|template| template.source().to_owned()).unwrap_or_default()
    }

    /// The conversation as text. With `add_generation_prompt` it ends where the assistant's next answer begins.
    pub fn render(&self, chat: &Chat, add_generation_prompt: bool) -> Result<String, ChatError> {
        self.render_first(chat, chat.messages.len(), add_generation_prompt)
    }

    /// The conversation as text, with the places where the assistant speaks. The place of an answer begins where the
    /// text before it ends when a generation prompt is added, and ends where the text with the answer ends, less what
    /// follows `eos_token`.
    ///
    /// # Errors
    /// [`ChatError::NoSpan`] if the template writes a message differently when others follow.
    pub fn assistant_spans(&self, chat: &Chat) -> Result<Rendered, ChatError> {
        let text = self.render(chat, false)?;
        let mut assistant = Vec::new();
        for (index, message) in chat.messages.iter().enumerate() {
            if self.role(index, message)? != "assistant" {
                continue;
            }
            let failed = |reason| ChatError::NoSpan { message: index, reason };
            let before = self.render_first(chat, index, true)?;
            let after = self.render_first(chat, index + 1, false)?;
            if !after.starts_with(&before) {
                return Err(failed(
                    "the text with it does not begin with the text before it and the generation prompt",
                ));
            }
            if !text.starts_with(&after) {
                return Err(failed("the template writes it differently when other messages follow"));
            }
            assistant.push(before.len()..self.end(&after, before.len()));
        }
        Ok(Rendered { text, assistant })
    }

    fn role(&self, index: usize, message: &Json) -> Result<String, ChatError> {
        let role = message.get_attr("role").ok().and_then(|role| role.as_str().map(str::to_owned));
        role.ok_or(ChatError::NoRole { message: index })
    }

    /// The end of an answer that begins at `begin`: behind the token that ends it, if only white space follows that.
    fn end(&self, text: &str, begin: usize) -> usize {
        let eos = self.special_tokens.get("eos_token").filter(|token| !token.is_empty());
        let end = eos.and_then(|eos| Some(begin + text[begin..].rfind(eos.as_str())? + eos.len()));
        end.filter(|end| text[*end..].trim().is_empty()).unwrap_or(text.len())
    }

    fn render_first(&self, chat: &Chat, messages: usize, add_generation_prompt: bool) -> Result<String, ChatError> {
        let mut variables: BTreeMap<&str, Json> = BTreeMap::new();
        variables.extend(self.special_tokens.iter().map(|(name, token)| (name.as_str(), Json::from(token.as_str()))));
        variables.extend(chat.variables.iter().map(|(name, value)| (name.as_str(), value.clone())));
        variables.insert("messages", chat.messages[..messages].iter().map(prepared).collect());
        variables.insert("tools", chat.tools.clone().map_or_else(|| Json::from(()), Json::from));
        variables.insert("documents", Json::from(()));
        variables.insert("add_generation_prompt", add_generation_prompt.into());
        let failed = |error: minijinja::Error| {
            let line = error.line().map(|line| format!(" (line {line} of the template)")).unwrap_or_default();
            let message = match (error.kind(), error.detail()) {
                (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
                (kind, Some(detail)) => format!("{kind}: {detail}"),
                (kind, None) => kind.to_string(),
            };
            ChatError::Conversation(message + &line)
        };
        let template = self.environment.get_template(NAME).map_err(failed)?;
        template.render(variables).map_err(failed)
    }
}

/// A message as transformers hands it to a template: without fields that are null, and with the reasoning, which has
/// several names, as `reasoning_content` and as `thinking`.
fn prepared(message: &Json) -> Json {
    let (ValueKind::Map, Ok(keys)) = (message.kind(), message.try_iter()) else { return message.clone() };
    let field = |key: &Json| message.get_item(key).ok().filter(|value| !value.is_none() && !value.is_undefined());
    let mut fields: Vec<(Json, Json)> = keys.filter_map(|key| Some((key.clone(), field(&key)?))).collect();
    if let Some(reasoning) = REASONING.iter().find_map(|name| field(&Json::from(*name))) {
        if !fields.iter().any(|(key, _)| key.as_str() == Some("thinking")) {
            fields.insert(0, ("thinking".into(), reasoning.clone()));
        }
        match fields.iter_mut().find(|(key, _)| key.as_str() == Some("reasoning_content")) {
            Some((_, value)) => *value = reasoning,
            None => fields.push(("reasoning_content".into(), reasoning)),
        }
    }
    fields.into_iter().collect()
}

/// `chat_template` of a `tokenizer_config.json`: a text, or several with names, of which `default` is taken.
fn template_of(config: &serde_json::Value) -> Option<&str> {
    match &config["chat_template"] {
        serde_json::Value::String(source) => Some(source),
        serde_json::Value::Array(named) => named.iter().find(|one| one["name"] == "default")?["template"].as_str(),
        _ => None,
    }
}

/// The special tokens of a `tokenizer_config.json`, by the names that templates use.
pub fn special_tokens(config: &serde_json::Value) -> BTreeMap<String, String> {
    let names = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
    let token = |name: &str| {
        let value = &config[name];
        let text = value.as_str().or_else(|| value["content"].as_str())?;
        Some((name.to_owned(), text.to_owned()))
    };
    names.into_iter().filter_map(token).collect()
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, a tag of transformers, by a condition that always holds, so
/// that the white space around them is trimmed as around any other tag.
fn without_generation_marks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(begin) = rest.find("{%") {
        let Some(length) = rest[begin..].find("%}") else { break };
        let inner = &rest[begin + 2..begin + length];
        let name = inner.trim_matches(['-', '+']).trim();
        let replacement = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        text.push_str(&rest[..begin + 2]);
        text.push_str(
            &replacement.map_or_else(|| inner.to_owned(), |tag| inner.replacen(name, &format!(" {tag} "), 1)),
        );
        text.push_str("%}");
        rest = &rest[begin + length + 2..];
    }
    text + rest
}
