//! What a model answers, without a wire format: what HTTP and gRPC share.
//!
//! - [`classify`]: texts in, labels and probabilities out;
//! - [`embed`]: texts or token ids in, vectors out;
//! - [`generate`]: a conversation or a prompt in, text out, piece by piece ([`answer`], [`stop`], [`mod@tokenize`]);
//! - [`grammar`]: JSON of a schema and other formats that an answer must have;
//! - [`calls`]: calls of functions in an answer;
//! - [`adapters`] of a language model; [`select`]: which of them, or which model, answers a request.
//!
//! Each holds the limits of one request and the order of the steps; wire formats belong to [`crate::api`].

pub mod adapters;
pub mod answer;
pub mod calls;
pub mod classify;
pub mod closed;
pub mod embed;
pub mod error;
mod example;
pub mod generate;
pub mod grammar;
mod inputs;
mod meter;
pub mod select;
pub mod stop;
pub mod tokenize;
mod tokenizing;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use athanor_contract::serve::{ServeConfig, ServeLimits};

use self::tokenizing::Tokenizing;

pub use self::{
    adapters::AdapterError,
    classify::{Classification, Classified, Classifier},
    embed::Embedder,
    error::{GrammarError, ServiceError},
    generate::Generator,
    inputs::{Inputs, Tokenize},
    select::Selection,
    tokenize::{ChatTokenize, StreamDecode, Vocabulary},
};

/// One revision of one model, ready to answer.
pub struct Service {
    pub model_name: String,
    pub revision: String,
    pub limits: ServeLimits,
    /// Seconds since the epoch at which this process loaded the model.
    pub created: i64,
    accepts_any_model: bool,
    model: Model,
    tokenizing: Tokenizing,
    draining: AtomicBool,
}

/// What the model does.
#[expect(clippy::large_enum_variant, reason = "a process has one")]
pub enum Model {
    Classifier(Classifier),
    Embedder(Embedder),
    Generator(Generator),
}

/// What a model does, without the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Classifier,
    Embedder,
    Generator,
}

impl Service {
    pub fn new(config: &ServeConfig, model: Model) -> Self {
        Self {
            model_name: config.model_name.clone(),
            revision: config.revision.clone(),
            limits: config.limits,
            created: jiff::Timestamp::now().as_second(),
            accepts_any_model: config.accept_any_model,
            model,
            tokenizing: Tokenizing::default(),
            draining: AtomicBool::new(false),
        }
    }

    /// Absent, this model's own name and the names of its adapters are accepted, and every name if the configuration says so.
    pub fn check_model(&self, asked: Option<&str>) -> Result<(), ServiceError> {
        self.named(asked).map(drop)
    }

    pub fn classifier(&self) -> Result<&Classifier, ServiceError> {
        match &self.model {
            Model::Classifier(classifier) => Ok(classifier),
            _ => Err(self.wrong_kind()),
        }
    }

    pub fn embedder(&self) -> Result<&Embedder, ServiceError> {
        match &self.model {
            Model::Embedder(embedder) => Ok(embedder),
            _ => Err(self.wrong_kind()),
        }
    }

    /// The language model, unless the process is shutting down: an answer may take minutes.
    pub fn generator(&self) -> Result<&Generator, ServiceError> {
        match &self.model {
            Model::Generator(_) if self.draining.load(Ordering::Relaxed) => Err(ServiceError::Draining),
            Model::Generator(generator) => Ok(generator),
            _ => Err(self.wrong_kind()),
        }
    }

    pub fn kind(&self) -> Kind {
        match &self.model {
            Model::Classifier(_) => Kind::Classifier,
            Model::Embedder(_) => Kind::Embedder,
            Model::Generator(_) => Kind::Generator,
        }
    }

    fn wrong_kind(&self) -> ServiceError {
        let (kind, routes) = match &self.model {
            Model::Classifier(_) => ("a classifier", "/v1/classify"),
            Model::Embedder(_) => ("an embedding model", "/v1/embeddings or /v1/rerank"),
            Model::Generator(_) => ("a language model", "/v1/chat/completions, /v1/completions or /v1/responses"),
        };
        ServiceError::WrongKind { kind, routes }
    }

    /// The tokenizer of the model, of whatever kind.
    fn vocabulary(&self) -> Arc<dyn Vocabulary> {
        match &self.model {
            Model::Classifier(classifier) => classifier.vocabulary(),
            Model::Embedder(embedder) => embedder.vocabulary(),
            Model::Generator(generator) => generator.vocabulary(),
        }
    }

    /// Token ids of a whole text; with the special tokens that the model wants around it if `with_special` is set.
    pub async fn tokens(&self, text: String, with_special: bool) -> Result<Vec<u32>, ServiceError> {
        let vocabulary = self.vocabulary();
        let bytes = text.len();
        let work = move || vocabulary.tokens(&text, with_special).map_err(ServiceError::Tokenizer);
        self.tokenizing.run(bytes, work).await
    }

    /// Text of token ids, special tokens included.
    ///
    /// # Errors
    /// [`ServiceError::NoToken`] for an id without a token.
    pub fn text(&self, tokens: &[u32]) -> Result<String, ServiceError> {
        let vocabulary = self.vocabulary();
        if let Some(index) = tokens.iter().position(|&token| vocabulary.name(token).is_none()) {
            return Err(ServiceError::NoToken { index, token: tokens[index] });
        }
        vocabulary.text(tokens).map_err(ServiceError::Tokenizer)
    }

    /// Tokens as the vocabulary has them.
    pub fn token_names(&self, tokens: &[u32]) -> Vec<String> {
        let vocabulary = self.vocabulary();
        tokens.iter().map(|&token| vocabulary.name(token).unwrap_or_default()).collect()
    }

    /// Labels of a classifier in the order of its probabilities; none of another model.
    pub fn labels(&self) -> &[String] {
        self.classifier().map_or(&[], |classifier| &classifier.labels)
    }

    /// Largest number of tokens that the model reads, and writes, at a time.
    pub fn max_length(&self) -> usize {
        match &self.model {
            Model::Generator(generator) => generator.max_length(),
            _ => self.limits.max_sequence_length,
        }
    }

    /// Refuses new generations from now on; those in progress continue.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Runs the model once, so that the first request meets warm kernels and allocators.
    pub async fn warm_up(&self) -> Result<(), ServiceError> {
        match &self.model {
            Model::Classifier(classifier) => classifier.warm_up().await,
            Model::Embedder(embedder) => embedder.warm_up().await,
            Model::Generator(generator) => generator.warm_up().await,
        }
    }

    /// Resolves when the engine's thread has ended by a fault.
    pub async fn stopped(&self) {
        match &self.model {
            Model::Classifier(classifier) => classifier.engine().stopped().await,
            Model::Embedder(embedder) => embedder.engine().stopped().await,
            Model::Generator(generator) => generator.engine().stopped().await,
        }
    }

    /// Inputs that wait for a batch, or sequences that wait to be admitted.
    pub fn waiting(&self) -> usize {
        match &self.model {
            Model::Classifier(classifier) => classifier.engine().waiting(),
            Model::Embedder(embedder) => embedder.engine().waiting(),
            Model::Generator(generator) => generator.engine().load().waiting,
        }
    }
}

#[cfg(test)]
mod tests;
