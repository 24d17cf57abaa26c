//! One sequence: its tokens, how many of them the cache holds, and when it ends.

use super::{blocks::Prefix, sampling::Sampling};
use crate::engine::backend::AdapterId;

/// When an answer ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopping {
    /// Largest number of tokens in the answer.
    pub max_tokens: usize,
    /// Number of tokens before which no end token is chosen.
    pub min_tokens: usize,
    /// Tokens that end the answer and are part of it. They include the model's own end tokens unless these are to be
    /// ignored.
    pub stop_tokens: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was chosen, or nothing can follow by the answer's constraint.
    Stop,
    /// The answer has `max_tokens` tokens.
    Length,
}

/// A sequence's number within its scheduler. Later sequences have higher numbers.
pub type SequenceId = u64;

#[derive(Clone, Debug)]
pub struct Sequence {
    pub id: SequenceId,
    /// The request; sequences of one request share their prompt.
    pub request: u64,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    pub prompt_length: usize,
    pub sampling: Sampling,
    pub stopping: Stopping,
    /// Number of most probable tokens to report with the log-probability of each prompt token; absent: none is reported.
    pub prompt_logprobs: Option<usize>,
    /// Absent: the model's own weights.
    pub adapter: Option<AdapterId>,
    /// Number of prompt tokens behind the first one whose log-probabilities were computed.
    pub(super) scored: usize,
    /// Number of tokens whose keys and values are in the cache.
    pub(super) computed: usize,
    /// Proposed next tokens that a step computes with the last token; none between steps.
    pub(super) proposed: Vec<u32>,
    pub(super) table: Vec<u32>,
    /// Number of blocks of the table that are sealed, and the identity of the last of them.
    pub(super) sealed: usize,
    pub(super) prefix: Prefix,
    /// Number of prompt tokens that the prefix cache had at the first admission; absent before it.
    pub(super) cached: Option<usize>,
}

impl Sequence {
    pub fn new(id: SequenceId, request: u64, prompt: Vec<u32>, sampling: Sampling, stopping: Stopping) -> Self {
        Self {
            id,
            request,
            prompt_length: prompt.len(),
            tokens: prompt,
            sampling,
            stopping,
            prompt_logprobs: None,
            adapter: None,
            scored: 0,
            computed: 0,
            proposed: Vec::new(),
            table: Vec::new(),
            sealed: 0,
            prefix: Prefix::Empty(None),
            cached: None,
        }
    }

    /// The empty prefix, from which the identities of its blocks follow.
    pub(super) fn root(&self) -> Prefix {
        Prefix::Empty(self.adapter)
    }

    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_length]
    }

    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt_length..]
    }

    /// Number of prompt tokens that were not computed because the cache had them.
    pub fn cached(&self) -> usize {
        self.cached.unwrap_or_default()
    }

    /// The prompt tokens whose log-probabilities come with computing `length` tokens from `start` on: each token's own
    /// come from the token before it. None once all are there.
    pub fn targets(&self, start: usize, length: usize) -> &[u32] {
        if !self.scores_prompt() {
            return &[];
        }
        let end = (start + length + 1).min(self.prompt_length);
        &self.tokens[(start + 1).min(end)..end]
    }

    /// Number of leading tokens that may come from the prefix cache. A token's successor has a log-probability only if
    /// the token is computed.
    pub(super) fn reusable(&self) -> usize {
        if self.scores_prompt() { self.scored } else { self.tokens.len() }
    }

    /// Whether log-probabilities of the prompt are still to be computed.
    fn scores_prompt(&self) -> bool {
        self.prompt_logprobs.is_some() && self.scored + 1 < self.prompt_length
    }

    /// Number of tokens that are not in the cache yet.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Tokens that must not come behind an answer of so many tokens.
    pub fn forbidden(&self, answer: usize) -> &[u32] {
        match answer < self.stopping.min_tokens {
            true => &self.stopping.stop_tokens,
            false => &[],
        }
    }

    /// Whether the answer is complete.
    pub fn finished(&self) -> Option<FinishReason> {
        if self.answer().last().is_some_and(|token| self.stopping.stop_tokens.contains(token)) {
            return Some(FinishReason::Stop);
        }
        (self.answer().len() >= self.stopping.max_tokens).then_some(FinishReason::Length)
    }
}
