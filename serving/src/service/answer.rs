//! One answer in progress: tokens from the engine to pieces of text, up to a stop string or the end.

use std::{collections::VecDeque, sync::Arc};

use tokio::time::{Instant, timeout_at};

use super::{
    meter::Meter,
    stop::StopStrings,
    tokenize::{ChatTokenize, StreamDecode},
};
use crate::engine::generate::{
    Choice, Event, GenerateError,
    sampling::{Logprobs, Sampled},
    sequence::FinishReason,
};

/// An answer. Dropping it cancels it.
pub struct Answer {
    /// Absent once the answer is complete.
    choice: Option<Choice>,
    tokenizer: Arc<dyn ChatTokenize>,
    decode: Box<dyn StreamDecode>,
    stop: StopStrings,
    stop_tokens: Arc<[u32]>,
    /// When the answer has to be complete, and the seconds that it had.
    deadline: (Instant, u64),
    reports_logprobs: bool,
    /// Whether the cached tokens of the prompt are counted with this answer.
    counts_prompt: bool,
    /// The prompt, if it is to be repeated before the answer and was not yet.
    echo: Option<Echo>,
    /// Bytes of text that were decoded, and that were given out.
    decoded: usize,
    released: usize,
    /// Tokens whose text was not given out yet, with the places where it begins and ends.
    held: VecDeque<(usize, usize, TokenLogprob)>,
    /// Characters of text that were decoded, an echoed prompt included.
    characters: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    meter: Meter,
    /// Sum of the tokens' log-probabilities, as far as the engine reports them.
    logprobs: f64,
}

/// A prompt that is repeated before its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Echo {
    /// Absent: the text of the tokens.
    pub(super) text: Option<String>,
    pub(super) tokens: Vec<u32>,
    /// Whether the engine sends log-probabilities of the tokens, and so the echo waits for them.
    pub(super) has_logprobs: bool,
}

/// A part of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    pub text: String,
    /// Log-probabilities of the tokens of `text`, if the request asks for them.
    pub logprobs: Vec<TokenLogprob>,
    /// Set in the last piece.
    pub end: Option<End>,
}

/// The end of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub reason: FinishReason,
    /// Tokens that were generated, the one that ended the answer included.
    pub completion_tokens: usize,
    /// Tokens of the prompt that the prefix cache had. 0 in all but the first answer to a prompt, so that the sum over
    /// the answers counts a prompt once.
    pub cached_tokens: usize,
}

/// A token with its log-probability and those of the most probable tokens in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub token: TokenText,
    /// Number of characters before the token's text, an echoed prompt included.
    pub offset: usize,
    /// Absent for the first token of a prompt, which follows nothing.
    pub logprob: Option<f32>,
    /// The most probable first.
    pub top: Vec<(TokenText, f32)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenText {
    /// Lossy if the token is a part of a character.
    pub text: String,
    pub bytes: Vec<u8>,
}

impl Answer {
    pub(super) fn new(
        choice: Choice,
        tokenizer: Arc<dyn ChatTokenize>,
        stop_tokens: Arc<[u32]>,
        stop: StopStrings,
        deadline: (Instant, u64),
        meter: Meter,
    ) -> Self {
        Self {
            choice: Some(choice),
            decode: tokenizer.stream(),
            tokenizer,
            stop,
            stop_tokens,
            deadline,
            reports_logprobs: false,
            counts_prompt: true,
            echo: None,
            decoded: 0,
            released: 0,
            held: VecDeque::new(),
            characters: 0,
            completion_tokens: 0,
            cached_tokens: 0,
            meter,
            logprobs: 0.0,
        }
    }

    /// Sets whether log-probabilities are reported, and whether the prompt is counted with this answer.
    pub(super) fn reporting(self, reports_logprobs: bool, counts_prompt: bool) -> Self {
        Self { reports_logprobs, counts_prompt, ..self }
    }

    /// Repeats the prompt before the answer.
    pub(super) fn echoing(self, echo: Option<Echo>) -> Self {
        Self { echo, ..self }
    }

    /// Mean log-probability of the tokens so far, as far as the engine reports them.
    pub(super) fn mean_logprob(&self) -> f64 {
        self.logprobs / self.completion_tokens.max(1) as f64
    }

    /// The next piece that is not empty; `None` after the end or an error.
    pub async fn next(&mut self) -> Option<Result<Piece, GenerateError>> {
        if let Some(echo) = self.echo.take_if(|echo| !echo.has_logprobs) {
            return Some(Ok(self.repeat(echo, None)));
        }
        loop {
            let choice = self.choice.as_mut()?;
            let event = match timeout_at(self.deadline.0, choice.recv()).await {
                Ok(Some(Ok(event))) => event,
                ended => {
                    self.choice = None;
                    return Some(Err(match ended {
                        Ok(Some(Err(error))) => error,
                        Ok(_) => GenerateError::Stopped,
                        Err(_) => GenerateError::TimedOut { seconds: self.deadline.1 },
                    }));
                }
            };
            let piece = match event {
                Event::Admitted { cached_tokens } => {
                    self.cached_tokens = cached_tokens;
                    continue;
                }
                Event::Prompt(logprobs) => match self.echo.take() {
                    Some(echo) => self.repeat(echo, Some(logprobs)),
                    None => continue,
                },
                Event::Token(sampled) => self.token(sampled),
                Event::Finished(finished) => self.finish(finished.reason),
            };
            if piece != Piece::default() {
                return Some(Ok(piece));
            }
        }
    }

    /// The prompt as a piece. `logprobs`: those of its tokens behind the first one.
    fn repeat(&mut self, echo: Echo, logprobs: Option<Vec<Logprobs>>) -> Piece {
        let mut decode = self.tokenizer.stream();
        let (mut decoded, mut offsets, mut characters) = (String::new(), Vec::with_capacity(echo.tokens.len()), 0);
        for &token in &echo.tokens {
            offsets.push(characters);
            let text = decode.push(token);
            characters += text.chars().count();
            decoded.push_str(&text);
        }
        decoded.push_str(&decode.finish());
        let text = echo.text.unwrap_or(decoded);
        self.characters = text.chars().count();
        let Some(logprobs) = logprobs.filter(|_| self.reports_logprobs) else {
            return Piece { text, ..Piece::default() };
        };
        let entry = |((&token, offset), logprobs): ((&u32, usize), Option<Logprobs>)| {
            self.described(token, offset, logprobs.as_ref())
        };
        let logprobs = std::iter::once(None).chain(logprobs.into_iter().map(Some));
        let logprobs = echo.tokens.iter().zip(offsets).zip(logprobs).map(entry).collect();
        Piece { text, logprobs, end: None }
    }

    fn token(&mut self, sampled: Sampled) -> Piece {
        self.completion_tokens += 1;
        self.meter.token();
        self.logprobs += sampled.logprobs.as_ref().map_or(0.0, |logprobs| f64::from(logprobs.chosen));
        if self.stop_tokens.contains(&sampled.token) {
            return Piece::default();
        }
        let text = self.decode.push(sampled.token);
        self.hold(&sampled, &text);
        let decided = self.stop.push(&text);
        self.released += decided.text.len();
        if decided.stops {
            // Dropped, so that the engine stops.
            self.choice = None;
            let logprobs = self.release(|begin, _, released| begin < released);
            return Piece { text: decided.text, logprobs, end: Some(self.end(FinishReason::Stop)) };
        }
        let logprobs = self.release(|_, end, released| end <= released);
        Piece { text: decided.text, logprobs, end: None }
    }

    /// The text that was held back, and the end.
    fn finish(&mut self, reason: FinishReason) -> Piece {
        self.choice = None;
        let rest = self.decode.finish();
        let decided = self.stop.push(&rest);
        if decided.stops {
            self.released += decided.text.len();
            let logprobs = self.release(|begin, _, released| begin < released);
            return Piece { text: decided.text, logprobs, end: Some(self.end(FinishReason::Stop)) };
        }
        let text = decided.text + &self.stop.finish();
        let logprobs = self.release(|_, _, _| true);
        Piece { text, logprobs, end: Some(self.end(reason)) }
    }

    fn end(&self, reason: FinishReason) -> End {
        self.meter.finished(self.completion_tokens);
        let cached_tokens = if self.counts_prompt { self.cached_tokens } else { 0 };
        End { reason, completion_tokens: self.completion_tokens, cached_tokens }
    }

    fn hold(&mut self, sampled: &Sampled, text: &str) {
        let (begin, offset) = (self.decoded, self.characters);
        self.decoded += text.len();
        self.characters += text.chars().count();
        let Some(logprobs) = sampled.logprobs.as_ref().filter(|_| self.reports_logprobs) else { return };
        let entry = self.described(sampled.token, offset, Some(logprobs));
        self.held.push_back((begin, self.decoded, entry));
    }

    fn described(&self, token: u32, offset: usize, logprobs: Option<&Logprobs>) -> TokenLogprob {
        let text = |token: u32| {
            let bytes = self.tokenizer.token_bytes(token);
            TokenText { text: String::from_utf8_lossy(&bytes).into_owned(), bytes }
        };
        let top = logprobs.map(|logprobs| logprobs.top.as_slice()).unwrap_or_default();
        let top = top.iter().map(|&(token, logprob)| (text(token), logprob)).collect();
        TokenLogprob { token: text(token), offset, logprob: logprobs.map(|logprobs| logprobs.chosen), top }
    }

    /// Takes tokens from the front as long as `goes(begin, end, released)` holds for their text.
    fn release(&mut self, goes: impl Fn(usize, usize, usize) -> bool) -> Vec<TokenLogprob> {
        let mut released = Vec::new();
        while let Some((_, _, entry)) = self.held.pop_front_if(|(begin, end, _)| goes(*begin, *end, self.released)) {
            released.push(entry);
        }
        released
    }
}
