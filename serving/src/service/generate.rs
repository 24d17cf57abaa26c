//! A conversation or a prompt in, text out, piece by piece.

use std::{sync::Arc, time::Duration};

use athanor_contract::serve::ServeLimits;
use futures::future::try_join_all;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    adapters::Adapters,
    answer::{Answer, Echo, TokenLogprob},
    calls::{CallFormat, prompt, shows_functions},
    error::ServiceError,
    grammar::{Grammar, Grammars},
    inputs::Inputs,
    meter::Meter,
    stop::StopStrings,
    tokenize::{ChatTokenize, Vocabulary},
    tokenizing::{Tokenizing, most_bytes},
};
use crate::engine::generate::{
    Adapter, Engine, GenerateError, GenerateRequest, Load,
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
    grammars: Grammars,
    call_format: CallFormat,
    /// Whether the chat template shows functions; otherwise they are written into the messages.
    shows_functions: bool,
    engine: Engine,
    adapters: Adapters,
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
    /// Absent: the model's own weights.
    pub adapter: Option<Adapter>,
    /// Number of tokens before which no token that ends an answer is chosen. A stop string ends it earlier.
    pub min_tokens: usize,
}

/// What a conversation's answer may be besides text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Structure {
    /// Functions that may be called, in OpenAI's shape, as the client sent them.
    pub functions: Option<Vec<Value>>,
    /// What the answer must be.
    pub grammar: Option<Grammar>,
}

/// What only a completion of texts asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TextOptions {
    /// Whether each answer begins with its prompt. If log-probabilities are reported, the prompt's are as well, and
    /// `max_tokens` may be 0.
    pub echo: bool,
    /// Number of answers to generate for each prompt, of which [`best`] keeps the most probable. Absent: as many as are
    /// kept.
    pub best_of: Option<usize>,
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
        let stop_tokens: Arc<[u32]> = stop_tokens.into();
        let template = tokenizer.template();
        let call_format = CallFormat::of(&template, |text| tokenizer.has_token(text));
        let shows_functions = shows_functions(&template);
        let grammars = Grammars::new(tokenizer.clone(), engine.vocabulary(), stop_tokens.clone());
        let (tokenizing, adapters) = (Tokenizing::default(), Adapters::new(engine.clone()));
        Self { limits, tokenizer, tokenizing, stop_tokens, grammars, call_format, shows_functions, engine, adapters }
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(super) fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    pub(super) fn vocabulary(&self) -> Arc<dyn Vocabulary> {
        self.tokenizer.clone()
    }

    /// Token ids of a conversation; with `add_generation_prompt` up to the place where an answer begins.
    pub async fn tokenize_chat(
        &self,
        messages: Vec<Value>,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, ServiceError> {
        if add_generation_prompt {
            return self.tokenize(Prompt::Chat(messages), None).await.map(|rows| rows.concat());
        }
        let bytes = messages.iter().map(text_bytes).sum();
        let (tokenizer, shows_functions) = (self.tokenizer.clone(), self.shows_functions);
        let encode = move || match shows_functions {
            true => tokenizer.render_whole(&messages),
            false => tokenizer.render_whole(&prompt::plain(&messages, None)),
        };
        self.tokenizing.run(bytes, encode).await
    }

    /// Largest number of tokens of prompt and answer together.
    pub fn max_length(&self) -> usize {
        self.engine.max_length()
    }

    /// How this model writes calls of functions.
    pub fn call_format(&self) -> CallFormat {
        self.call_format
    }

    /// Compiles a grammar and forgets it.
    ///
    /// # Errors
    /// [`ServiceError::Grammar`].
    pub async fn check_grammar(&self, grammar: &Grammar) -> Result<(), ServiceError> {
        self.grammars.compile(grammar).await?;
        Ok(())
    }

    /// What the engine does at the moment.
    pub fn load(&self) -> Load {
        self.engine.load()
    }

    /// Starts the answers of one request.
    pub async fn generate(&self, request: Generation) -> Result<Answers, ServiceError> {
        self.start(request, TextOptions::default(), Structure::default()).await
    }

    /// Starts the answers of one request with the options of text completions.
    pub async fn generate_text(&self, request: Generation, options: TextOptions) -> Result<Answers, ServiceError> {
        self.start(request, options, Structure::default()).await
    }

    /// Starts the answers of one request that may call functions or must follow a grammar.
    pub async fn generate_structured(
        &self,
        request: Generation,
        structure: Structure,
    ) -> Result<Answers, ServiceError> {
        self.start(request, TextOptions::default(), structure).await
    }

    async fn start(
        &self,
        request: Generation,
        options: TextOptions,
        structure: Structure,
    ) -> Result<Answers, ServiceError> {
        let prompts = match &request.prompt {
            Prompt::Chat(_) => 1,
            Prompt::Inputs(inputs) => inputs.check(&self.limits)?,
        };
        let choices = options.best_of.unwrap_or(request.choices);
        let count = prompts.saturating_mul(choices);
        if count > self.limits.max_inputs {
            return Err(ServiceError::TooManyAnswers { count, limit: self.limits.max_inputs });
        }
        self.check_bytes(&request.prompt, structure.functions.as_deref())?;
        let mut places = self.engine.reserve(count)?;
        let seconds = self.limits.max_request_seconds;
        let deadline = (Instant::now() + Duration::from_secs(seconds), seconds);
        let constraint = match &structure.grammar {
            Some(grammar) => Some(self.grammars.compile(grammar).await?),
            None => None,
        };
        let operation = match &request.prompt {
            Prompt::Chat(_) => "chat",
            Prompt::Inputs(_) => "text_completion",
        };
        let texts = match &request.prompt {
            Prompt::Inputs(Inputs::Texts(texts)) if options.echo => texts.clone(),
            _ => Vec::new(),
        };
        let prompts = self.tokenize(request.prompt, structure.functions).await?;
        let mut answers = Vec::with_capacity(count);
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let logprobs = request.sampling.logprobs;
        let mut sampling = request.sampling;
        if options.best_of.is_some() {
            // Without alternatives: to compare the answers.
            sampling.logprobs = Some(logprobs.unwrap_or(0));
        }
        let mut texts = texts.into_iter();
        for prompt in prompts {
            let echo = options.echo.then(|| Echo {
                text: texts.next(),
                tokens: prompt.clone(),
                has_logprobs: logprobs.is_some(),
            });
            let prompt_logprobs = match request.max_tokens {
                Some(0) => Some(logprobs.unwrap_or(0)),
                _ => logprobs,
            };
            let tokens = prompt.len();
            let left = self.max_length().saturating_sub(tokens);
            let max_tokens = request.max_tokens.unwrap_or(left.max(1));
            let stopping =
                Stopping { max_tokens, min_tokens: request.min_tokens, stop_tokens: self.stop_tokens.to_vec() };
            let sequences = GenerateRequest {
                prompt,
                choices,
                sampling: sampling.clone(),
                stopping,
                constraint: constraint.clone(),
                prompt_logprobs: prompt_logprobs.filter(|_| options.echo),
                adapter: request.adapter.clone(),
            };
            let submitted = self.engine.submit(&mut places, sequences)?;
            for (index, choice) in submitted.into_iter().enumerate() {
                let stop = StopStrings::new(request.stop.clone());
                let counted = if index == 0 { tokens } else { 0 };
                let model = request.adapter.as_ref().map_or(self.engine.model(), Adapter::name);
                let meter = Meter::new(operation, model.clone(), counted);
                let (tokenizer, stop_tokens) = (self.tokenizer.clone(), self.stop_tokens.clone());
                let answer = Answer::new(choice, tokenizer, stop_tokens, stop, deadline, meter);
                answers.push(answer.reporting(logprobs.is_some(), index == 0).echoing(echo.clone()));
            }
        }
        Ok(Answers { answers, prompt_tokens })
    }

    /// Refuses texts that cannot fit, however they are tokenised.
    fn check_bytes(&self, prompt: &Prompt, functions: Option<&[Value]>) -> Result<(), ServiceError> {
        let limit = self.max_length();
        let check = |input: Option<usize>, bytes: usize| match bytes > most_bytes(limit) {
            true => Err(ServiceError::LongText { input, bytes, limit }),
            false => Ok(()),
        };
        match prompt {
            Prompt::Chat(messages) => {
                let functions = functions.into_iter().flatten().map(text_bytes).sum::<usize>();
                check(None, functions + messages.iter().map(|message| content(message).len()).sum::<usize>())
            }
            Prompt::Inputs(Inputs::Texts(texts)) => {
                texts.iter().enumerate().try_for_each(|(index, text)| check(Some(index), text.len()))
            }
            Prompt::Inputs(Inputs::Tokens(_)) => Ok(()),
        }
    }

    async fn tokenize(&self, prompt: Prompt, functions: Option<Vec<Value>>) -> Result<Vec<Vec<u32>>, ServiceError> {
        let bytes = match &prompt {
            Prompt::Inputs(Inputs::Tokens(_)) => 0,
            Prompt::Inputs(Inputs::Texts(texts)) => texts.iter().map(String::len).sum(),
            Prompt::Chat(messages) => messages.iter().chain(functions.iter().flatten()).map(text_bytes).sum(),
        };
        let (tokenizer, shows_functions) = (self.tokenizer.clone(), self.shows_functions);
        let encode = move || match prompt {
            Prompt::Chat(messages) if shows_functions => {
                Ok(vec![tokenizer.render_chat(&messages, functions.as_deref())?])
            }
            Prompt::Chat(messages) => {
                Ok(vec![tokenizer.render_chat(&prompt::plain(&messages, functions.as_deref()), None)?])
            }
            Prompt::Inputs(Inputs::Tokens(rows)) => Ok(rows),
            Prompt::Inputs(Inputs::Texts(texts)) => {
                texts.iter().map(|text| tokenizer.encode(text).map_err(ServiceError::Tokenizer)).collect()
            }
        };
        self.tokenizing.run(bytes, encode).await
    }

    /// Generates a few tokens after a short and after a longer prompt, and prepares the vocabulary for grammars.
    pub async fn warm_up(&self) -> Result<(), ServiceError> {
        let grammars = async {
            if let Err(error) = self.grammars.prepare().await {
                tracing::warn!(%error, "no answer of this model can follow a grammar");
            }
        };
        let ((), answered) = tokio::join!(grammars, self.warm_up_model());
        answered
    }

    async fn warm_up_model(&self) -> Result<(), ServiceError> {
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
                    adapter: None,
                    min_tokens: 0,
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

/// Bytes of all texts of a message or a function, names of fields included.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + text_bytes(value)).sum(),
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
    /// Mean log-probability of the generated tokens; 0 unless the engine reports them.
    pub mean_logprob: f64,
}

/// The `choices` answers with the highest mean log-probability of each `generated` answers to a prompt, the highest
/// first.
pub fn best(completed: Vec<Completed>, choices: usize, generated: usize) -> Vec<Completed> {
    let mut completed = completed.into_iter();
    let mut kept = Vec::new();
    loop {
        let mut group: Vec<Completed> = completed.by_ref().take(generated.max(1)).collect();
        if group.is_empty() {
            return kept;
        }
        group.sort_by(|a, b| b.mean_logprob.total_cmp(&a.mean_logprob));
        kept.extend(group.into_iter().take(choices));
    }
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
            let mean_logprob = answer.mean_logprob();
            return Ok(Completed {
                text,
                logprobs,
                reason: end.reason,
                completion_tokens,
                cached_tokens,
                mean_logprob,
            });
        }
    }
    Err(GenerateError::Stopped)
}
