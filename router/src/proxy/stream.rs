//! The body of an answer on its way from a server to a client: piece by piece, never held back and never asked for twice.
//!
//! A task carries it. The task ends with the answer, with the time of the request, or when the client goes; then it drops the server's
//! body, which closes the connection to the server unless the answer was whole.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::{Body, BodyDataStream},
    http::{
        HeaderMap, HeaderValue,
        header::{CONTENT_LENGTH, CONTENT_TYPE},
    },
    response::Response,
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::Instrument;

use super::pass;
use crate::{
    access::Meter,
    balance::{client::describe, endpoints::Outstanding},
    gateway::{Gateway, Running},
    record::{
        generation::Recorder,
        sse::{self, Lines, Meaning},
    },
};

/// What goes along with an answer.
pub struct Passing {
    pub gateway: Arc<Gateway>,
    pub revision: Arc<str>,
    /// Whether an answer that breaks off is an error of the revision.
    pub is_counted: bool,
    pub recorder: Option<Recorder>,
    /// Counts the tokens of a caller with a limit.
    pub meter: Option<Meter>,
    /// When the request was passed on.
    pub began: Instant,
    /// Longest duration of the request.
    pub limit: Duration,
    /// Counts the request as load of its endpoint.
    pub outstanding: Outstanding,
    /// Counts the request among those that a shutdown waits for.
    pub running: Running,
}

/// How an answer ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Whole,
    /// The server's body broke off, or said that the model failed.
    Broken(String),
    /// The server was not done in time.
    Late,
    /// The client did not read in time.
    Unread,
    /// The client went away.
    Gone,
}

/// Returns the answer with a body that passes on what arrives.
pub fn respond(answer: Response<Body>, passing: Passing) -> Response {
    let (mut parts, body) = answer.into_parts();
    let length = parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    pass::clean(&mut parts.headers);
    let is_event_stream = is_event_stream(&parts.headers);
    // An event stream may get one more event.
    if let Some(length) = length.filter(|_| !is_event_stream) {
        parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    let (sender, mut receiver) = mpsc::channel(1);
    let carrier = Carrier {
        sender,
        lines: is_event_stream.then(Lines::default),
        left: length,
        deadline: (passing.began + passing.limit).into(),
        is_done: false,
        has_failed: false,
        recorder: passing.recorder,
        meter: passing.meter,
    };
    let account = Account {
        gateway: passing.gateway,
        revision: passing.revision,
        is_counted: passing.is_counted,
        began: passing.began,
        limit: passing.limit,
    };
    let (load, running) = (passing.outstanding, passing.running);
    let carried = async move {
        let mut carrier = carrier;
        let end = carrier.carry(body.into_data_stream()).await;
        // The server is free, whatever the client still has to read.
        drop(load);
        carrier.finish(end, account, running).await;
    };
    tokio::spawn(carried.in_current_span());
    Response::from_parts(parts, Body::from_stream(stream::poll_fn(move |context| receiver.poll_recv(context))))
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    media_type.split(';').next().is_some_and(|text| text.trim().eq_ignore_ascii_case("text/event-stream"))
}

/// Counts how an answer ended.
struct Account {
    gateway: Arc<Gateway>,
    revision: Arc<str>,
    is_counted: bool,
    began: Instant,
    limit: Duration,
}

/// Carries one body.
struct Carrier {
    sender: mpsc::Sender<io::Result<Bytes>>,
    /// Present for an event stream.
    lines: Option<Lines>,
    /// Bytes that are still to come, if the server announced them.
    left: Option<u64>,
    deadline: tokio::time::Instant,
    /// Whether the last event has been handed on: clients go then, without waiting for the end of the body.
    is_done: bool,
    /// Whether an event of the server says that the model failed.
    has_failed: bool,
    recorder: Option<Recorder>,
    meter: Option<Meter>,
}

impl Carrier {
    /// Carries an answer to its end.
    async fn carry(&mut self, upstream: BodyDataStream) -> End {
        match self.carry_pieces(upstream).await {
            _ if self.is_done && !self.has_failed => End::Whole,
            End::Whole if self.has_failed => End::Broken("the server reported an error in its stream".into()),
            end => end,
        }
    }

    async fn carry_pieces(&mut self, mut upstream: BodyDataStream) -> End {
        // A client has the whole of a body with a length before the server's end of it is seen here.
        while self.left != Some(0) {
            let arrived = tokio::select! {
                // First, so that an answer that is whole is not taken for one that nobody waits for.
                biased;
                arrived = upstream.next() => arrived,
                () = self.sender.closed() => return End::Gone,
                () = tokio::time::sleep_until(self.deadline) => return End::Late,
            };
            let piece = match arrived {
                Some(Ok(piece)) => piece,
                Some(Err(error)) => return End::Broken(describe(&error)),
                None => break,
            };
            self.left = self.left.map(|left| left.saturating_sub(piece.len() as u64));
            let piece = match &mut self.lines {
                Some(lines) => match lines.push(piece) {
                    Ok(lines) => lines,
                    Err(error) => return End::Broken(error.to_string()),
                },
                None => piece,
            };
            if let Err(end) = self.hand_on(piece).await {
                return end;
            }
        }
        let rest = self.lines.as_mut().map(Lines::rest).unwrap_or_default();
        match self.hand_on(rest).await {
            Ok(()) => End::Whole,
            Err(end) => end,
        }
    }

    /// Hands a piece on, and only then looks at it.
    async fn hand_on(&mut self, piece: Bytes) -> Result<(), End> {
        if piece.is_empty() {
            return Ok(());
        }
        tokio::select! {
            sent = self.sender.send(Ok(piece.clone())) => sent.map_err(|_| End::Gone)?,
            () = tokio::time::sleep_until(self.deadline) => return Err(End::Unread),
        }
        if self.lines.is_none() {
            if let Some(recorder) = &mut self.recorder {
                recorder.answers.piece(&piece);
            }
            if let Some(meter) = &mut self.meter {
                meter.piece(&piece);
            }
            return Ok(());
        }
        for data in sse::data(&piece) {
            match sse::meaning(data) {
                Meaning::End => self.is_done = true,
                Meaning::Failure => self.has_failed = true,
                Meaning::Part => {}
            }
            if let Some(recorder) = &mut self.recorder {
                recorder.answers.event(data);
            }
            if let Some(meter) = &mut self.meter {
                meter.event(data);
            }
        }
        Ok(())
    }

    /// Ends the client's body and counts how it ended.
    async fn finish(self, end: End, account: Account, running: Running) {
        let Account { gateway, revision, is_counted, began, limit } = account;
        let is_servers = end != End::Unread;
        let (code, message) = match end {
            End::Whole => {
                drop(self.sender);
                if let Some(recorder) = self.recorder {
                    gateway.record_generations(recorder, &revision, began.elapsed());
                }
                // Only now: a shutdown waits for the event as well.
                drop(running);
                return;
            }
            End::Gone => {
                count("client_gone", &revision);
                return;
            }
            End::Broken(message) => ("stream_interrupted", format!("the answer broke off: {message}")),
            End::Late => ("timeout", format!("the answer was not complete within {} s", limit.as_secs())),
            End::Unread => ("timeout", format!("the answer was not read within {} s", limit.as_secs())),
        };
        count(code, &revision);
        drop(running);
        // A slow client is nobody's error but its own.
        if is_counted && is_servers {
            gateway.analysis.of(&revision).broken();
        }
        tracing::warn!(revision = &*revision, message, "an answer was not passed on to its end");
        let last = match &self.lines {
            // The server has said so itself.
            Some(_) if self.has_failed => return,
            Some(lines) => Ok(lines
                .last_event(&json!({"error": {"message": message, "type": "server_error", "code": code}}).to_string())),
            None => Err(io::Error::other(message)),
        };
        // Fails when the client is gone, to whom it no longer matters.
        let _ = self.sender.send(last).await;
    }
}

/// Counts an answer that was not passed on to its end.
pub fn count(reason: &'static str, revision: &str) {
    metrics::counter!("athanor_router_unfinished_answers_total", "reason" => reason, "revision" => revision.to_owned())
        .increment(1);
}
