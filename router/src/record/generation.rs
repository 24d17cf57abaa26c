//! What is recorded of an answer of a language model: put together from the events of a stream as they pass, or read from a bounded
//! copy of a whole answer. The request is read when the answer is over, so that neither is delayed.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use athanor_contract::event::{Generation, GenerationInput, TokenUsage};
use athanor_serving::api::openai::responses::input;
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Value, json};

use super::{
    request_id::RequestId,
    sse::{self, Meaning},
};
use crate::config::Configuration;

/// Most bytes of text in an answer, all choices together.
const MOST_TEXT: usize = 1 << 20;
/// Most bytes of a whole answer that are kept to be read.
const MOST_COPY: usize = 8 << 20;
/// Most choices of an answer.
const MOST_CHOICES: usize = 1024;

/// Most calls of functions in a choice.
const MOST_CALLS: usize = 1024;

/// Why an answer is not recorded, as the label of a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unrecorded {
    /// More text than is kept.
    TooLong,
    /// A choice without a finish reason, or a stream without its end.
    Unfinished,
    /// Not an answer of OpenAI's shape.
    Unreadable,
    /// Token ids instead of a prompt's text.
    NoText,
}

impl Unrecorded {
    pub fn label(self) -> &'static str {
        match self {
            Self::TooLong => "too_long",
            Self::Unfinished => "unfinished",
            Self::Unreadable => "unreadable",
            Self::NoText => "no_text",
        }
    }
}

/// Records one answer while it passes.
pub struct Recorder {
    pub config: Arc<Configuration>,
    pub id: RequestId,
    /// The id with the proof that the client got.
    pub request_id: String,
    /// Body of the request.
    pub request: Bytes,
    pub answers: Answers,
    pub trace_parent: Option<String>,
}

/// One answer, or one event of a stream.
#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    choices: Vec<ChoicePart>,
    #[serde(default)]
    usage: Option<Usage>,
    /// The response at the beginning and at the end of a stream of `/v1/responses`.
    #[serde(default)]
    response: Option<Box<Part>>,
    /// Status and items of a response.
    #[serde(default)]
    status: Option<String>,
    #[serde(default)]
    output: Vec<Item>,
}

/// An item of a response's output: a message or a call of a function.
#[derive(Deserialize)]
struct Item {
    r#type: String,
    #[serde(default)]
    content: Vec<ItemPart>,
    #[serde(default)]
    call_id: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    arguments: String,
}

#[derive(Deserialize)]
struct ItemPart {
    #[serde(default)]
    text: String,
}

#[derive(Deserialize)]
struct ChoicePart {
    #[serde(default)]
    index: u32,
    /// The message or delta of a chat completion.
    #[serde(default, alias = "delta")]
    message: Option<Message>,
    /// The text of a completion.
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<CallPart>>,
}

/// A call of a function, or a part of one in a stream.
#[derive(Deserialize)]
struct CallPart {
    /// Number of the call; absent in a whole answer.
    #[serde(default)]
    index: Option<usize>,
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    function: Option<FunctionPart>,
}

#[derive(Default, Deserialize)]
struct FunctionPart {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    arguments: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default, alias = "input_tokens")]
    prompt_tokens: u64,
    #[serde(default, alias = "output_tokens")]
    completion_tokens: u64,
}

/// A call of a function so far.
#[derive(Default)]
struct Call {
    id: String,
    name: String,
    arguments: String,
}

impl Call {
    fn add(&mut self, part: CallPart) {
        let FunctionPart { name, arguments } = part.function.unwrap_or_default();
        self.id.push_str(&part.id.unwrap_or_default());
        self.name.push_str(&name.unwrap_or_default());
        self.arguments.push_str(&arguments.unwrap_or_default());
    }

    fn json(self) -> Value {
        let function = json!({"name": self.name, "arguments": self.arguments});
        json!({"id": self.id, "type": "function", "function": function})
    }
}

#[derive(Default)]
struct Choice {
    text: String,
    calls: Vec<Call>,
    finish_reason: Option<String>,
}

/// The choices of an answer so far.
#[derive(Default)]
pub struct Answers {
    choices: BTreeMap<u32, Choice>,
    usage: Option<TokenUsage>,
    /// Bytes of text so far.
    bytes: usize,
    /// Copy of an answer that is not a stream.
    copy: BytesMut,
    is_stream: bool,
    is_done: bool,
    unrecorded: Option<Unrecorded>,
}

impl Answers {
    /// Takes the data of one event of a stream.
    pub fn event(&mut self, data: &[u8]) {
        self.is_stream = true;
        self.is_done |= sse::meaning(data) == Meaning::End;
        if data != b"[DONE]" && self.unrecorded.is_none() {
            self.part(data);
        }
    }

    /// Takes a piece of a whole answer.
    pub fn piece(&mut self, bytes: &[u8]) {
        if self.unrecorded.is_some() {
            return;
        }
        if self.copy.len() + bytes.len() > MOST_COPY {
            self.give_up(Unrecorded::TooLong);
        } else {
            self.copy.extend_from_slice(bytes);
        }
    }

    /// Takes a piece of text of an answer with one choice, which is no JSON. `end`: why the answer ended, and its tokens.
    pub fn text(&mut self, text: &str, end: Option<(String, TokenUsage)>) {
        self.is_stream = true;
        if self.unrecorded.is_some() {
            return;
        }
        self.bytes += text.len();
        if self.bytes > MOST_TEXT {
            return self.give_up(Unrecorded::TooLong);
        }
        let choice = self.choices.entry(0).or_default();
        choice.text.push_str(text);
        if let Some((finish_reason, usage)) = end {
            choice.finish_reason = Some(finish_reason);
            self.usage = Some(usage);
            self.is_done = true;
        }
    }

    /// Frees what was kept: nothing will be recorded.
    fn give_up(&mut self, why: Unrecorded) {
        *self = Self { unrecorded: Some(why), is_stream: self.is_stream, ..Self::default() };
    }

    fn part(&mut self, json: &[u8]) {
        let Ok(mut part) = serde_json::from_slice::<Part>(json) else { return self.give_up(Unrecorded::Unreadable) };
        if let Some(response) = part.response.take() {
            part = *response;
        }
        if let Some(status) = part.status {
            return self.response(&status, part.output, part.usage);
        }
        if let Some(usage) = part.usage {
            let Usage { prompt_tokens, completion_tokens } = usage;
            self.usage = Some(TokenUsage { prompt_tokens, completion_tokens });
        }
        for choice in part.choices {
            let message = choice.message.unwrap_or(Message { content: None, tool_calls: None });
            let calls = message.tool_calls.unwrap_or_default();
            let text = message.content.or(choice.text).unwrap_or_default();
            let size = |call: &CallPart| {
                let function = call.function.as_ref();
                let texts = [function.and_then(|f| f.name.as_ref()), function.and_then(|f| f.arguments.as_ref())];
                texts.into_iter().chain([call.id.as_ref()]).flatten().map(String::len).sum::<usize>()
            };
            self.bytes += text.len() + calls.iter().map(size).sum::<usize>();
            if self.bytes > MOST_TEXT
                || (self.choices.len() == MOST_CHOICES && !self.choices.contains_key(&choice.index))
            {
                return self.give_up(Unrecorded::TooLong);
            }
            let known = self.choices.entry(choice.index).or_default();
            known.text.push_str(&text);
            known.finish_reason = choice.finish_reason.or(known.finish_reason.take());
            for (position, part) in calls.into_iter().enumerate() {
                let index = part.index.unwrap_or(position);
                if index >= MOST_CALLS {
                    return self.give_up(Unrecorded::TooLong);
                }
                if known.calls.len() <= index {
                    known.calls.resize_with(index + 1, Call::default);
                }
                known.calls[index].add(part);
            }
        }
    }
}

impl Answers {
    /// Takes a response, unless it has only begun.
    fn response(&mut self, status: &str, output: Vec<Item>, usage: Option<Usage>) {
        let finish_reason = match status {
            "completed" if output.iter().any(|item| item.r#type == "function_call") => "tool_calls",
            "completed" => "stop",
            "incomplete" => "length",
            _ => return,
        };
        let mut choice = Choice { finish_reason: Some(finish_reason.into()), ..Choice::default() };
        for Item { r#type, content, call_id, name, arguments } in output {
            match r#type.as_str() {
                "message" => choice.text.extend(content.into_iter().map(|part| part.text)),
                "function_call" => choice.calls.push(Call { id: call_id, name, arguments }),
                _ => return self.give_up(Unrecorded::NoText),
            }
        }
        let calls = choice.calls.iter().map(|call| call.id.len() + call.name.len() + call.arguments.len());
        if choice.text.len() + calls.sum::<usize>() > MOST_TEXT || choice.calls.len() > MOST_CALLS {
            return self.give_up(Unrecorded::TooLong);
        }
        self.usage = usage
            .map(|usage| TokenUsage { prompt_tokens: usage.prompt_tokens, completion_tokens: usage.completion_tokens });
        self.choices.insert(0, choice);
    }
}

/// What is read of a request.
#[derive(Deserialize)]
struct Question {
    #[serde(default)]
    messages: Option<Vec<Value>>,
    #[serde(default)]
    prompt: Option<Prompt>,
    #[serde(default)]
    n: Option<u32>,
    /// Whether each answer begins with its prompt.
    #[serde(default)]
    echo: Option<bool>,
    /// What a response answers.
    #[serde(default)]
    input: Option<Value>,
    #[serde(default)]
    instructions: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    One(String),
    Many(Vec<String>),
    /// Token ids.
    Other(IgnoredAny),
}

impl Question {
    /// The input that choice `index` answers.
    fn input(&self, index: u32) -> Result<GenerationInput, Unrecorded> {
        match (&self.messages, &self.prompt) {
            (Some(messages), _) => Ok(GenerationInput::Messages(messages.clone())),
            (None, Some(Prompt::One(prompt))) => Ok(GenerationInput::Prompt(prompt.clone())),
            (None, Some(Prompt::Many(prompts))) => {
                // The choices of the first prompt come first.
                let position = (index / self.n.unwrap_or(1).max(1)) as usize;
                let prompt = prompts.get(position).ok_or(Unrecorded::Unreadable)?;
                Ok(GenerationInput::Prompt(prompt.clone()))
            }
            (None, Some(Prompt::Other(_))) => Err(Unrecorded::NoText),
            (None, None) => {
                let input = self.input.clone().ok_or(Unrecorded::Unreadable)?;
                let messages = input::messages(self.instructions.as_deref(), input);
                messages.map(GenerationInput::Messages).map_err(|_| Unrecorded::NoText)
            }
        }
    }
}

/// Number of choices that a request asks for; `None` if there is nothing to record of them.
pub fn choices(request: &[u8]) -> Option<u32> {
    let question: Question = serde_json::from_slice(request).ok()?;
    if question.echo == Some(true) {
        return None;
    }
    let prompts = match (&question.messages, &question.prompt) {
        (Some(_), _) | (None, Some(Prompt::One(_))) => 1,
        (None, Some(Prompt::Many(prompts))) => u32::try_from(prompts.len()).ok()?,
        (None, None) if question.input.is_some() => 1,
        (None, Some(Prompt::Other(_)) | None) => return None,
    };
    prompts.checked_mul(question.n.unwrap_or(1).max(1))
}

/// What is recorded of an answer that has ended as it should.
pub fn generations(
    request_id: &str,
    revision: &str,
    request: &[u8],
    mut answers: Answers,
    latency: Duration,
) -> Result<Vec<Generation>, Unrecorded> {
    if !answers.is_stream && answers.unrecorded.is_none() {
        let copy = answers.copy.split();
        answers.part(&copy);
    }
    if let Some(why) = answers.unrecorded {
        return Err(why);
    }
    if answers.choices.is_empty() || (answers.is_stream && !answers.is_done) {
        return Err(Unrecorded::Unfinished);
    }
    let question: Question = serde_json::from_slice(request).map_err(|_| Unrecorded::Unreadable)?;
    let usage = answers.usage;
    let generations = answers.choices.into_iter().map(|(index, choice)| {
        Ok(Generation {
            request_id: request_id.to_owned(),
            index,
            revision: revision.to_owned(),
            adapter: None,
            input: question.input(index)?,
            answer: choice.text,
            tool_calls: choice.calls.into_iter().map(Call::json).collect(),
            finish_reason: choice.finish_reason.ok_or(Unrecorded::Unfinished)?,
            usage,
            mean_log_probability: None,
            latency_ms: latency.as_secs_f32() * 1e3,
        })
    });
    generations.collect()
}

#[cfg(test)]
#[path = "generation_tests.rs"]
mod tests;
