//! Why a request has no answer; each protocol maps it to its own codes.

use crate::engine::{encode::EngineError, generate::GenerateError};

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error("the model {asked:?} does not exist here; the model is {known:?}")]
    UnknownModel { asked: String, known: String },
    #[error("this model is {kind}; use {routes}")]
    WrongKind { kind: &'static str, routes: &'static str },
    #[error("there is no input")]
    NoInput,
    #[error("{count} inputs; at most {limit} in one request")]
    TooManyInputs { count: usize, limit: usize },
    #[error("{count} answers; at most {limit} in one request")]
    TooManyAnswers { count: usize, limit: usize },
    #[error("input {index} is empty")]
    EmptyInput { index: usize },
    #[error("input {index} has {tokens} tokens; the model reads at most {limit}")]
    LongInput { index: usize, tokens: usize, limit: usize },
    /// The text is not tokenised. `input` is absent for a conversation.
    #[error("{bytes} bytes of text cannot fit; the model reads at most {limit} tokens")]
    LongText { input: Option<usize>, bytes: usize, limit: usize },
    #[error("input {index} has the token {token}; the vocabulary has {vocabulary} tokens")]
    UnknownToken { index: usize, token: u32, vocabulary: usize },
    #[error("token {index} is {token}, which the vocabulary does not have")]
    NoToken { index: usize, token: u32 },
    #[error("the model failed: the numbers of input {index} are not finite")]
    NotFinite { index: usize },
    #[error("the conversation cannot be rendered: {0}")]
    Conversation(String),
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    #[error("the server is shutting down")]
    Draining,
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
}

/// Why an answer cannot follow a grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    #[error("{bytes} bytes; at most {limit}")]
    TooLarge { bytes: usize, limit: usize },
    #[error("it was not compiled within {seconds} s")]
    TooSlow { seconds: u64 },
    /// The compiler's message.
    #[error("{0}")]
    Invalid(String),
}
