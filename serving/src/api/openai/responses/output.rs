//! The items of a response's output, and the events by which a stream shows them: a message for text, an item for each call of a
//! function.

use serde_json::{Value, json};
use uuid::Uuid;

use super::super::logprobs;
use crate::service::{
    answer::TokenLogprob,
    calls::parse::{CallParser, Part, Reading},
};

/// An event's name and data, without what all events have.
pub type Named = (&'static str, Value);

/// The output of one response.
pub struct Output {
    /// Present if there may be calls of functions.
    parser: Option<CallParser>,
    /// Items that are complete.
    items: Vec<Value>,
    open: Option<Open>,
    /// Log-probabilities of text that is held back, since it may be a call. Those of calls are not reported.
    held: Vec<Value>,
    events: Vec<Named>,
}

/// The item that grows.
enum Open {
    Message { id: String, text: String, logprobs: Vec<Value> },
    Call { id: String, call_id: String, name: String, arguments: String },
}

fn id(prefix: &str) -> String {
    format!("{prefix}_{}", Uuid::now_v7().simple())
}

/// The text of a message.
fn part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

impl Open {
    fn id(&self) -> &str {
        match self {
            Self::Message { id, .. } | Self::Call { id, .. } => id,
        }
    }

    /// The item. `content`: that of a message.
    fn item(&self, status: &str, content: Vec<Value>) -> Value {
        match self {
            Self::Message { id, .. } => {
                json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
            }
            Self::Call { id, call_id, name, arguments } => json!({"id": id, "type": "function_call", "status": status,
                "call_id": call_id, "name": name, "arguments": arguments}),
        }
    }
}

impl Output {
    /// `reading`: how calls of functions are found; absent: the output is one message, which begins at once.
    pub fn new(reading: Option<Reading>) -> Self {
        let parser = reading.map(CallParser::new);
        let mut output = Self { parser, items: Vec::new(), open: None, held: Vec::new(), events: Vec::new() };
        if output.parser.is_none() {
            output.open_message();
        }
        output
    }

    /// The events since the last call.
    pub fn take_events(&mut self) -> Vec<Named> {
        std::mem::take(&mut self.events)
    }

    /// The items that are complete.
    pub fn items(&self) -> Vec<Value> {
        self.items.clone()
    }

    /// Takes a piece of the answer.
    pub fn piece(&mut self, text: &str, logprobs: &[TokenLogprob]) {
        let logprobs = logprobs::tokens(logprobs);
        let Some(parser) = &mut self.parser else {
            if !text.is_empty() || !logprobs.is_empty() {
                self.content(text, logprobs);
            }
            return;
        };
        let parts = parser.push(text);
        self.held.extend(logprobs);
        self.parts(parts);
    }

    /// Ends the output of a response with this status.
    pub fn end(&mut self, status: &'static str) {
        let parts = self.parser.as_mut().map(CallParser::finish).unwrap_or_default();
        self.parts(parts);
        if self.open.is_none() {
            self.open_message();
        }
        let is_cut = self.parser.as_ref().is_some_and(CallParser::is_within_call);
        match &self.open {
            Some(Open::Call { .. }) => self.close(if is_cut { "incomplete" } else { "completed" }),
            _ => self.close(status),
        }
    }

    fn parts(&mut self, parts: Vec<Part>) {
        for part in parts {
            match part {
                Part::Content(text) => {
                    let logprobs = std::mem::take(&mut self.held);
                    self.content(&text, logprobs);
                }
                Part::Call { name } => {
                    self.held.clear();
                    self.close("completed");
                    let (id, call_id) = (id("fc"), id("call"));
                    self.open(Open::Call { id, call_id, name, arguments: String::new() });
                }
                Part::Arguments(text) => {
                    if let Some(Open::Call { arguments, .. }) = &mut self.open {
                        arguments.push_str(&text);
                    }
                    self.push("response.function_call_arguments.delta", json!({"delta": text}));
                }
            }
        }
    }

    fn content(&mut self, text: &str, logprobs: Vec<Value>) {
        if !matches!(self.open, Some(Open::Message { .. })) {
            self.close("completed");
            self.open_message();
        }
        let delta = json!({"content_index": 0, "delta": text, "logprobs": logprobs});
        if let Some(Open::Message { text: whole, logprobs: all, .. }) = &mut self.open {
            whole.push_str(text);
            all.extend(logprobs);
        }
        self.push("response.output_text.delta", delta);
    }

    fn open_message(&mut self) {
        self.open(Open::Message { id: id("msg"), text: String::new(), logprobs: Vec::new() });
        self.push("response.content_part.added", json!({"content_index": 0, "part": part("", &[])}));
    }

    fn open(&mut self, open: Open) {
        let item = open.item("in_progress", Vec::new());
        self.events.push(("response.output_item.added", json!({"output_index": self.items.len(), "item": item})));
        self.open = Some(open);
    }

    /// Completes the item that grows, if there is one.
    fn close(&mut self, status: &str) {
        let Some(open) = self.open.take() else { return };
        let mut content = Vec::new();
        let done = match &open {
            Open::Message { text, logprobs, .. } => {
                let part = part(text, logprobs);
                content.push(part.clone());
                vec![
                    ("response.output_text.done", json!({"content_index": 0, "text": text, "logprobs": logprobs})),
                    ("response.content_part.done", json!({"content_index": 0, "part": part})),
                ]
            }
            Open::Call { name, arguments, .. } => {
                vec![("response.function_call_arguments.done", json!({"name": name, "arguments": arguments}))]
            }
        };
        let item = open.item(status, content);
        self.open = Some(open);
        done.into_iter().for_each(|(name, data)| self.push(name, data));
        self.open = None;
        self.events.push(("response.output_item.done", json!({"output_index": self.items.len(), "item": item})));
        self.items.push(item);
    }

    /// Adds an event about the item that grows.
    fn push(&mut self, name: &'static str, mut data: Value) {
        data["item_id"] = json!(self.open.as_ref().map(Open::id));
        data["output_index"] = json!(self.items.len());
        self.events.push((name, data));
    }
}
