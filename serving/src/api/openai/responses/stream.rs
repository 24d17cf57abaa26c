//! A response as server-sent events, each with its name and a number, in OpenAI's order. There is no `[DONE]`: the last
//! event is `response.completed`, `response.incomplete` or `response.failed`.
//!
//! The stream owns the answer: a client that goes away drops it, and so cancels it.

use std::{collections::VecDeque, convert::Infallible};

use axum::response::{Response, sse::Event};
use futures::{Stream, stream};
use serde_json::{Value, json};

use super::super::{error::ApiError, logprobs, sse, usage::Usage};
use super::shape::{Shape, part, status};
use crate::service::{
    answer::{Answer, End, Piece},
    generate::Answers,
};

struct State {
    shape: Shape,
    /// Absent once the last event is queued.
    answer: Option<Answer>,
    queue: VecDeque<Event>,
    sequence_number: u64,
    text: String,
    logprobs: Vec<Value>,
    usage: Usage,
}

/// The response that streams the answer.
pub fn stream(answers: Answers, shape: Shape) -> Response {
    sse::respond(events(answers, shape))
}

fn events(answers: Answers, shape: Shape) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    let usage = Usage { prompt: answers.prompt_tokens, ..Usage::default() };
    let mut state = State {
        shape,
        answer: answers.answers.into_iter().next(),
        queue: VecDeque::new(),
        sequence_number: 0,
        text: String::new(),
        logprobs: Vec::new(),
        usage,
    };
    state.begin();
    stream::unfold(state, |mut state| async {
        let event = state.next().await?;
        Some((Ok(event), state))
    })
}

impl State {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(event);
            }
            match self.answer.as_mut()?.next().await {
                Some(Ok(piece)) => self.piece(&piece),
                Some(Err(error)) => {
                    self.answer = None;
                    let failed = self.shape.failed(&ApiError::from(error).message);
                    self.push("response.failed", json!({"response": failed}));
                }
                // Every answer ends with a piece that says so, or with an error.
                None => self.answer = None,
            }
        }
    }

    fn begin(&mut self) {
        let response = self.shape.response("in_progress", Vec::new(), None);
        self.push("response.created", json!({"response": response}));
        self.push("response.in_progress", json!({"response": response}));
        let message = self.shape.message("in_progress", Vec::new());
        self.push("response.output_item.added", json!({"output_index": 0, "item": message}));
        self.push_of_text("response.content_part.added", json!({"part": part("", Vec::new())}));
    }

    fn piece(&mut self, piece: &Piece) {
        if !piece.text.is_empty() || !piece.logprobs.is_empty() {
            let logprobs = logprobs::tokens(&piece.logprobs);
            self.text.push_str(&piece.text);
            self.logprobs.extend(logprobs.iter().cloned());
            let delta = json!({"delta": piece.text, "logprobs": logprobs});
            self.push_of_text("response.output_text.delta", delta);
        }
        if let Some(end) = &piece.end {
            self.end(end);
        }
    }

    fn end(&mut self, end: &End) {
        self.answer = None;
        self.usage.add(end);
        let (text, logprobs) = (std::mem::take(&mut self.text), std::mem::take(&mut self.logprobs));
        self.push_of_text("response.output_text.done", json!({"text": text, "logprobs": logprobs}));
        let part = part(&text, logprobs);
        self.push_of_text("response.content_part.done", json!({"part": part}));
        let status = status(end.reason);
        let message = self.shape.message(status, vec![part]);
        self.push("response.output_item.done", json!({"output_index": 0, "item": message}));
        let response = self.shape.response(status, vec![message], Some(&self.usage));
        self.push(&format!("response.{status}"), json!({"response": response}));
    }

    /// Queues an event about the text of the message.
    fn push_of_text(&mut self, name: &str, mut data: Value) {
        data["item_id"] = json!(self.shape.item_id);
        data["output_index"] = json!(0);
        data["content_index"] = json!(0);
        self.push(name, data);
    }

    fn push(&mut self, name: &str, mut data: Value) {
        data["type"] = json!(name);
        data["sequence_number"] = json!(self.sequence_number);
        self.sequence_number += 1;
        self.queue.push_back(Event::default().event(name).data(data.to_string()));
    }
}
