//! Calls of functions in the answers of language models: which text is a call, and the grammar of a call.
//!
//! - [`parse`]: the text of an answer, piece by piece, to content and calls;
//! - [`prompt`]: functions in the messages, for templates that cannot show them.

pub mod parse;
pub mod prompt;

use serde_json::Value;

use super::grammar::bounded;

/// Most calls in an answer that has to consist of calls.
const MOST_CALLS: usize = 16;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// Letters, digits, `_` and `-`.
    pub name: String,
    /// JSON schema of its arguments.
    pub parameters: Value,
}

/// How a model writes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>`, JSON with `name` and `arguments`, `</tool_call>`: Hermes, Qwen 2.5 and 3, SmolLM3.
    Hermes,
    /// JSON with `name` and `parameters`, alone or after `<|python_tag|>`: Llama 3.
    Llama3,
    /// JSON with `name` and `arguments` in a Markdown block.
    Fenced,
}

impl CallFormat {
    /// The format of a model, by its chat template and vocabulary.
    pub fn of(template: &str, has_token: impl Fn(&str) -> bool) -> Self {
        if template.contains("<tool_call>") {
            return Self::Hermes;
        }
        if template.contains("<|python_tag|>") || (shows_functions(template) && has_token("<|python_tag|>")) {
            return Self::Llama3;
        }
        Self::Fenced
    }

    /// What comes before the JSON of a call.
    fn open(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>\n",
            Self::Llama3 => "",
            Self::Fenced => "```json\n",
        }
    }

    /// What comes after it.
    fn close(self) -> &'static str {
        match self {
            Self::Hermes => "\n</tool_call>",
            Self::Llama3 => "",
            Self::Fenced => "\n```",
        }
    }

    /// The JSON up to the arguments.
    fn head(self, name: &str) -> String {
        let key = if self == Self::Llama3 { "parameters" } else { "arguments" };
        format!("{{\"name\": \"{name}\", \"{key}\": ")
    }

    /// Grammar of an answer that is JSON of a schema, or consists of calls of these functions.
    pub fn grammar_or_json(self, functions: &[Function], several: bool, schema: &Value) -> String {
        // JSON of the schema may begin as a call of Llama 3 does; a block is read as a call of every model.
        let format = if self == Self::Llama3 { Self::Fenced } else { self };
        let calls = format.grammar(functions, several).replacen("start:", "calls:", 1);
        format!("start: calls | answer\nanswer: %json {}\n{calls}", bounded(schema.clone()))
    }

    /// Grammar of an answer that consists of calls of these functions, of one call or of several. Llama 3 makes one
    /// call at a time.
    pub fn grammar(self, functions: &[Function], several: bool) -> String {
        let text = |text: &str| Value::from(text).to_string();
        let calls = (0..functions.len()).map(|index| format!("call_{index}")).collect::<Vec<_>>().join(" | ");
        let mut lines = vec![match several && self != Self::Llama3 {
            true => format!("start: call (\"\\n\" call)~0..{}", MOST_CALLS - 1),
            false => "start: call".to_owned(),
        }];
        // The beginning that all calls share is one lexeme, so that names are told apart by the next one.
        let head = self.head("");
        let (before, after) = head.split_once("\"\"").unwrap_or((&head, ""));
        let begin = text(&format!("{}{before}\"", self.open()));
        lines.push(format!("call: {begin} ( {calls} ) {}", text(&format!("}}{}", self.close()))));
        for (index, Function { name, parameters }) in functions.iter().enumerate() {
            lines.push(format!("call_{index}: {} arguments_{index}", text(&format!("{name}\"{after}"))));
            lines.push(format!("arguments_{index}: %json {}", bounded(parameters.clone())));
        }
        lines.join("\n") + "\n"
    }
}

/// Whether a chat template shows the model its functions.
pub fn shows_functions(template: &str) -> bool {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    template.split(|c| !is_name(c)).any(|word| word == "tools")
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
