//! A conversation or a prompt in, text out, piece by piece.

use std::{sync::Arc, time::Duration};

use athanor_contract::serve::ServeLimits;
use futures::future::try_join_all;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    answer::{Answer, TokenLogprob},
    error::ServiceError,
    inputs::Inputs,
    stop::StopStrings,
    tokenize::ChatTokenize,
    tokenizing::{Tokenizing, most_bytes},
};
use crate::engine::generate::{
    Engine, GenerateError, GenerateRequest, Load,
    sampling::Sampling,
    sequence::{FinishReason, Stopping},
};

/// A language model.
pub struct Generator {
    limits: ServeLimits,
    tokenizer: Arc<dyn ChatTokenize>,
    tokenizing: Tokenizing,
    /// Tokens that end an answer.
    stop_tokens: Arc<[u32]>,
    engine: Engine,
}

/// What is continued.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Messages of one conversation.
    Chat(Vec<Value>),
    /// Texts or token ids; each is continued by itself.
    Inputs(Inputs),
}

/// A request for answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub prompt: Prompt,
    /// Number of answers to each prompt.
    pub choices: usize,
    pub sampling: Sampling,
    /// Strings that end an answer and are not part of it.
    pub stop: Vec<String>,
    /// Largest number of tokens of an answer. Absent: what the prompt leaves of the context.
    pub max_tokens: Option<usize>,
}

/// Answers in progress. Dropping one cancels it.
pub struct Answers {
    /// Those of the first prompt, then those of the second one, and so on.
    pub answers: Vec<Answer>,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
}

impl Generator {
    pub fn new(limits: ServeLimits, stop_tokens: Vec<u32>, tokenizer: Arc<dyn ChatTokenize>, engine: Engine) -> Self {
        Self { limits, tokenizer, tokenizing: Tokenizing::default(), stop_tokens: stop_tokens.into(), engine }
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Largest number of tokens of prompt and answer together.
    pub fn max_length(&self) -> usize {
        self.engine.max_length()
    }

    /// What the engine does at the moment.
    pub fn load(&self) -> Load {
        self.engine.load()
    }

    /// Starts the answers of one request.
    pub async fn generate(&self, request: Generation) -> Result<Answers, ServiceError> {
        let prompts = match &request.prompt {
            Prompt::Chat(_) => 1,
            Prompt::Inputs(inputs) => inputs.check(&self.limits)?,
        };
        let count = prompts.saturating_mul(request.choices);
        if count > self.limits.max_inputs {
            return Err(ServiceError::TooManyAnswers { count, limit: self.limits.max_inputs });
        }
        self.check_bytes(&request.prompt)?;
        let mut places = self.engine.reserve(count)?;
        let seconds = self.limits.max_request_seconds;
        let deadline = (Instant::now() + Duration::from_secs(seconds), seconds);
        let prompts = self.tokenize(request.prompt).await?;
        let mut answers = Vec::with_capacity(count);
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let logprobs = request.sampling.logprobs.is_some();
        for prompt in prompts {
            let left = self.max_length().saturating_sub(prompt.len());
            let max_tokens = request.max_tokens.unwrap_or(left.max(1));
            let stopping = Stopping { max_tokens, min_tokens: 0, stop_tokens: self.stop_tokens.to_vec() };
            let (choices, sampling) = (request.choices, request.sampling.clone());
            let sequences = GenerateRequest { prompt, choices, sampling, stopping };
            let submitted = self.engine.submit(&mut places, sequences)?;
            for (index, choice) in submitted.into_iter().enumerate() {
                let stop = StopStrings::new(request.stop.clone());
                let answer = Answer::new(choice, self.tokenizer.clone(), self.stop_tokens.clone(), stop, deadline);
                answers.push(answer.reporting(logprobs, index == 0));
            }
        }
        Ok(Answers { answers, prompt_tokens })
    }

    /// Refuses texts that cannot fit, however they are tokenised.
    fn check_bytes(&self, prompt: &Prompt) -> Result<(), ServiceError> {
        let limit = self.max_length();
        let check = |input: Option<usize>, bytes: usize| match bytes > most_bytes(limit) {
            true => Err(ServiceError::LongText { input, bytes, limit }),
            false => Ok(()),
        };
        match prompt {
            Prompt::Chat(messages) => check(None, messages.iter().map(|message| content(message).len()).sum()),
            Prompt::Inputs(Inputs::Texts(texts)) => {
                texts.iter().enumerate().try_for_each(|(index, text)| check(Some(index), text.len()))
            }
            Prompt::Inputs(Inputs::Tokens(_)) => Ok(()),
        }
    }

    async fn tokenize(&self, prompt: Prompt) -> Result<Vec<Vec<u32>>, ServiceError> {
        let bytes = match &prompt {
            Prompt::Inputs(Inputs::Tokens(_)) => 0,
            Prompt::Inputs(Inputs::Texts(texts)) => texts.iter().map(String::len).sum(),
            Prompt::Chat(messages) => messages.iter().map(text_bytes).sum(),
        };
        let tokenizer = self.tokenizer.clone();
        let encode = move || match prompt {
            Prompt::Chat(messages) => Ok(vec![tokenizer.render_chat(&messages, None)?]),
            Prompt::Inputs(Inputs::Tokens(rows)) => Ok(rows),
            Prompt::Inputs(Inputs::Texts(texts)) => {
                texts.iter().map(|text| tokenizer.encode(text).map_err(ServiceError::Tokenizer)).collect()
            }
        };
        self.tokenizing.run(bytes, encode).await
    }

    /// Generates a few tokens after a short and after a longer prompt.
    pub async fn warm_up(&self) -> Result<(), ServiceError> {
        for words in [1, self.max_length().min(256) / 2] {
            let tokens = self.tokenizer.encode("warm up").map_err(ServiceError::Tokenizer)?;
            let row: Vec<u32> = tokens.iter().copied().cycle().take(words.max(1)).collect();
            let answers = self
                .generate(Generation {
                    prompt: Prompt::Inputs(Inputs::Tokens(vec![row])),
                    choices: 1,
                    sampling: Sampling { temperature: 0.0, ..Sampling::default() },
                    stop: Vec::new(),
                    max_tokens: Some(4.min(self.max_length().saturating_sub(words)).max(1)),
                })
                .await?;
            answers.complete().await?;
        }
        Ok(())
    }
}

fn content(message: &Value) -> &str {
    message["content"].as_str().unwrap_or_default()
}

/// Bytes of all texts of a message, calls of tools included.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.values().map(text_bytes).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Completed {
    pub text: String,
    pub logprobs: Vec<TokenLogprob>,
    pub reason: FinishReason,
    pub completion_tokens: usize,
    pub cached_tokens: usize,
}

impl Answers {
    /// Waits for all answers; an error of one cancels the others.
    pub async fn complete(self) -> Result<Vec<Completed>, GenerateError> {
        try_join_all(self.answers.into_iter().map(complete)).await
    }
}

async fn complete(mut answer: Answer) -> Result<Completed, GenerateError> {
    let (mut text, mut logprobs) = (String::new(), Vec::new());
    while let Some(piece) = answer.next().await {
        let piece = piece?;
        text.push_str(&piece.text);
        logprobs.extend(piece.logprobs);
        if let Some(end) = piece.end {
            let (completion_tokens, cached_tokens) = (end.completion_tokens, end.cached_tokens);
            return Ok(Completed { text, logprobs, reason: end.reason, completion_tokens, cached_tokens });
        }
    }
    Err(GenerateError::Stopped)
}
