//! A response as server-sent events, each with its name and a number, in OpenAI's order. There is no `[DONE]`: the last
//! event is `response.completed`, `response.incomplete` or `response.failed`.
//!
//! The stream owns the answer: a client that goes away drops it, and so cancels it.

use std::{collections::VecDeque, convert::Infallible};

use axum::response::{Response, sse::Event};
use futures::{Stream, stream};
use serde_json::{Value, json};

use super::super::{error::ApiError, sse, usage::Usage};
use super::{
    output::Output,
    shape::{Shape, status},
};
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
    output: Output,
    usage: Usage,
}

/// The response that streams the answer.
pub fn stream(answers: Answers, shape: Shape, output: Output) -> Response {
    sse::respond(events(answers, shape, output))
}

fn events(answers: Answers, shape: Shape, output: Output) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    let usage = Usage { prompt: answers.prompt_tokens, ..Usage::default() };
    let mut state = State {
        shape,
        answer: answers.answers.into_iter().next(),
        queue: VecDeque::new(),
        sequence_number: 0,
        output,
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
        self.show();
    }

    fn piece(&mut self, piece: &Piece) {
        self.output.piece(&piece.text, &piece.logprobs);
        match &piece.end {
            Some(end) => self.end(end),
            None => self.show(),
        }
    }

    fn end(&mut self, end: &End) {
        self.answer = None;
        self.usage.add(end);
        let status = status(end.reason);
        self.output.end(status);
        self.show();
        let response = self.shape.response(status, self.output.items(), Some(&self.usage));
        self.push(&format!("response.{status}"), json!({"response": response}));
    }

    /// Queues the events about the output.
    fn show(&mut self) {
        for (name, data) in self.output.take_events() {
            self.push(name, data);
        }
    }

    fn push(&mut self, name: &str, mut data: Value) {
        data["type"] = json!(name);
        data["sequence_number"] = json!(self.sequence_number);
        self.sequence_number += 1;
        self.queue.push_back(Event::default().event(name).data(data.to_string()));
    }
}
