//! One answer in progress: tokens from the engine to pieces of text, up to a stop string or the end.

use std::{collections::VecDeque, sync::Arc};

use tokio::time::{Instant, timeout_at};

use super::{
    stop::StopStrings,
    tokenize::{ChatTokenize, StreamDecode},
};
use crate::engine::generate::{Choice, Event, GenerateError, sampling::Sampled, sequence::FinishReason};

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
    /// Bytes of text that were decoded, and that were given out.
    decoded: usize,
    released: usize,
    /// Tokens whose text was not given out yet, with the places where it begins and ends.
    held: VecDeque<(usize, usize, TokenLogprob)>,
    completion_tokens: usize,
    cached_tokens: usize,
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
    pub logprob: f32,
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
            decoded: 0,
            released: 0,
            held: VecDeque::new(),
            completion_tokens: 0,
            cached_tokens: 0,
        }
    }

    /// Sets whether log-probabilities are reported, and whether the prompt is counted with this answer.
    pub(super) fn reporting(self, reports_logprobs: bool, counts_prompt: bool) -> Self {
        Self { reports_logprobs, counts_prompt, ..self }
    }

    /// The next piece that is not empty; `None` after the end or an error.
    pub async fn next(&mut self) -> Option<Result<Piece, GenerateError>> {
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
                Event::Token(sampled) => self.token(sampled),
                Event::Finished(finished) => self.finish(finished.reason),
            };
            if piece != Piece::default() {
                return Some(Ok(piece));
            }
        }
    }

    fn token(&mut self, sampled: Sampled) -> Piece {
        self.completion_tokens += 1;
        if self.stop_tokens.contains(&sampled.token) {
            return Piece::default();
        }
        let text = self.decode.push(sampled.token);
        self.hold(&sampled, text.len());
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
        let cached_tokens = if self.counts_prompt { self.cached_tokens } else { 0 };
        End { reason, completion_tokens: self.completion_tokens, cached_tokens }
    }

    fn hold(&mut self, sampled: &Sampled, bytes: usize) {
        let begin = self.decoded;
        self.decoded += bytes;
        let Some(logprobs) = sampled.logprobs.as_ref().filter(|_| self.reports_logprobs) else { return };
        let text = |token: u32| {
            let bytes = self.tokenizer.token_bytes(token);
            TokenText { text: String::from_utf8_lossy(&bytes).into_owned(), bytes }
        };
        let top = logprobs.top.iter().map(|&(token, logprob)| (text(token), logprob)).collect();
        let entry = TokenLogprob { token: text(sampled.token), logprob: logprobs.chosen, top };
        self.held.push_back((begin, self.decoded, entry));
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
