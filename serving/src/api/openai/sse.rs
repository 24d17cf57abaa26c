//! Answers as server-sent events, in OpenAI's order: chunks of all choices as they come, the usage if it is asked for,
//! `[DONE]`. An error becomes a last event `{"error": ...}` without `[DONE]`. Comments keep an idle connection open.
//!
//! The stream owns the answers: a client that goes away drops them, and so cancels them.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use serde_json::{Value, json};

use super::{error::ApiError, usage::Usage};
use crate::{
    engine::generate::GenerateError,
    service::{answer::Piece, generate::Answers},
};

/// Pause after which a comment is sent.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The JSON of a stream's chunks.
pub trait Format: Send + 'static {
    /// The chunk that opens a choice.
    fn first(&self, index: usize) -> Option<Value>;

    fn piece(&mut self, index: usize, piece: &Piece) -> Vec<Value>;

    /// The chunk without choices that has the usage.
    fn usage(&self, usage: &Usage) -> Value;
}

type Pieces = BoxStream<'static, (usize, Result<Piece, GenerateError>)>;

struct State<F> {
    format: F,
    /// Pieces of all answers; absent once the last event is queued.
    pieces: Option<Pieces>,
    queue: VecDeque<Event>,
    includes_usage: bool,
    usage: Usage,
}

/// The response that streams these answers.
pub fn stream(answers: Answers, format: impl Format, includes_usage: bool) -> Response {
    respond(events(answers, format, includes_usage))
}

/// The response that sends these events, and comments while there is none.
pub fn respond(events: impl Stream<Item = Result<Event, Infallible>> + Send + 'static) -> Response {
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive");
    Sse::new(events).keep_alive(keep_alive).into_response()
}

fn events(
    answers: Answers,
    format: impl Format,
    includes_usage: bool,
) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    let usage = Usage { prompt: answers.prompt_tokens, ..Usage::default() };
    let queue = VecDeque::new();
    let mut state = State { format, pieces: None, queue, includes_usage, usage };
    for index in 0..answers.answers.len() {
        let first = state.format.first(index);
        first.into_iter().for_each(|chunk| state.push(chunk));
    }
    let each = answers.answers.into_iter().enumerate().map(|(index, answer)| {
        let pieces = stream::unfold(answer, |mut answer| async {
            let piece = answer.next().await?;
            Some((piece, answer))
        });
        pieces.map(move |piece| (index, piece)).boxed()
    });
    state.pieces = Some(stream::select_all(each).boxed());
    stream::unfold(state, |mut state| async {
        let event = state.next().await?;
        Some((Ok(event), state))
    })
}

impl<F: Format> State<F> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(event);
            }
            match self.pieces.as_mut()?.next().await {
                Some((index, Ok(piece))) => {
                    if let Some(end) = &piece.end {
                        self.usage.add(end);
                    }
                    for chunk in self.format.piece(index, &piece) {
                        self.push(chunk);
                    }
                }
                Some((_, Err(error))) => {
                    self.pieces = None;
                    let error = ApiError::from(error).body();
                    self.queue.push_back(Event::default().data(json!(error).to_string()));
                }
                None => {
                    self.pieces = None;
                    if self.includes_usage {
                        let usage = self.format.usage(&self.usage);
                        self.queue.push_back(Event::default().data(usage.to_string()));
                    }
                    self.queue.push_back(Event::default().data("[DONE]"));
                }
            }
        }
    }

    /// Queues a chunk of a choice. With the usage at the end, every other chunk has a null in its place.
    fn push(&mut self, mut chunk: Value) {
        if self.includes_usage {
            chunk["usage"] = Value::Null;
        }
        self.queue.push_back(Event::default().data(chunk.to_string()));
    }
}
