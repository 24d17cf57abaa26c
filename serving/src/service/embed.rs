//! Texts or token ids in, vectors out.

use std::sync::Arc;

use athanor_contract::serve::ServeLimits;

use super::{
    error::ServiceError,
    inputs::{Inputs, Tokenize, tokenize},
    tokenizing::Tokenizing,
};
use crate::engine::encode::Engine;

/// A model that has one vector for each text.
pub struct Embedder {
    limits: ServeLimits,
    /// Number of tokens in the vocabulary.
    vocabulary: usize,
    tokenizer: Arc<dyn Tokenize>,
    tokenizing: Tokenizing,
    engine: Engine,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedded {
    /// One vector of length 1 for each input.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens read, special tokens included, padding not.
    pub tokens: u64,
}

impl Embedder {
    pub fn new(limits: ServeLimits, vocabulary: usize, tokenizer: Arc<dyn Tokenize>, engine: Engine) -> Self {
        Self { limits, vocabulary, tokenizer, tokenizing: Tokenizing::default(), engine }
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The vectors of the inputs of one request. A text is cut to the longest sequence, as in training; token ids that
    /// exceed it are an error.
    pub async fn embed(&self, inputs: Inputs) -> Result<Embedded, ServiceError> {
        let count = inputs.check(&self.limits)?;
        if let Inputs::Tokens(rows) = &inputs {
            self.check_tokens(rows)?;
        }
        let places = self.engine.reserve(count)?;
        let rows = match inputs {
            Inputs::Texts(texts) => {
                tokenize(&self.tokenizing, &self.tokenizer, texts, self.limits.max_sequence_length).await?
            }
            Inputs::Tokens(rows) => rows,
        };
        let tokens = rows.iter().map(|row| row.len() as u64).sum();
        let outputs = self.engine.run(places, rows).await?;
        let vectors = outputs.into_iter().enumerate().map(|(index, output)| {
            let vector = output.logits;
            let finite = vector.iter().all(|value| value.is_finite());
            finite.then_some(vector).ok_or(ServiceError::NotFinite { index })
        });
        Ok(Embedded { vectors: vectors.collect::<Result<_, _>>()?, tokens })
    }

    fn check_tokens(&self, rows: &[Vec<u32>]) -> Result<(), ServiceError> {
        let (vocabulary, limit) = (self.vocabulary, self.limits.max_sequence_length);
        for (index, row) in rows.iter().enumerate() {
            if row.len() > limit {
                return Err(ServiceError::LongInput { index, tokens: row.len(), limit });
            }
            if let Some(&token) = row.iter().find(|&&token| token as usize >= vocabulary) {
                return Err(ServiceError::UnknownToken { index, token, vocabulary });
            }
        }
        Ok(())
    }

    /// Runs a short and a full-length input.
    pub async fn warm_up(&self) -> Result<(), ServiceError> {
        self.embed(Inputs::Texts(vec!["warm-up".into()])).await?;
        self.embed(Inputs::Texts(vec!["warm up ".repeat(self.limits.max_sequence_length)])).await?;
        Ok(())
    }
}
