//! Tokens of a request, and why an answer ended.

use serde_json::{Value, json};

use crate::{
    engine::generate::sequence::FinishReason,
    service::{answer::End, generate::Completed},
};

/// Tokens of a request to a language model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: usize,
    pub completion: usize,
    /// Tokens of the prompts that the prefix cache had.
    pub cached: usize,
}

impl Usage {
    pub fn of(prompt: usize, completed: &[Completed]) -> Self {
        Self {
            prompt,
            completion: completed.iter().map(|one| one.completion_tokens).sum(),
            cached: completed.iter().map(|one| one.cached_tokens).sum(),
        }
    }

    pub fn add(&mut self, end: &End) {
        self.completion += end.completion_tokens;
        self.cached += end.cached_tokens;
    }

    pub fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}
