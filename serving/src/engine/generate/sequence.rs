//! One sequence: its tokens, how many of them the cache holds, and when it ends.

use super::{blocks::Prefix, sampling::Sampling};

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
    /// A stop token was chosen.
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
    /// Number of tokens whose keys and values are in the cache.
    pub(super) computed: usize,
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
            computed: 0,
            table: Vec::new(),
            sealed: 0,
            prefix: Prefix::EMPTY,
            cached: None,
        }
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

    /// Number of tokens that are not in the cache yet.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Tokens that must not come next.
    pub fn forbidden(&self) -> &[u32] {
        match self.answer().len() < self.stopping.min_tokens {
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
