//! Texts or token ids in, vectors out.

use std::sync::Arc;

use athanor_contract::serve::ServeLimits;

use super::{
    error::ServiceError,
    inputs::{Inputs, Tokenize, tokenize},
    tokenize::Vocabulary,
    tokenizing::Tokenizing,
};
use crate::engine::encode::Engine;

/// A model that has one vector for each text.
pub struct Embedder {
    limits: ServeLimits,
    /// Number of tokens in the vocabulary.
    vocabulary: usize,
    /// Number of numbers in a vector.
    size: usize,
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

impl Embedded {
    /// Cuts the vectors to their first `dimensions` numbers and scales them to length 1 again.
    pub fn shorten(&mut self, dimensions: usize) {
        for vector in &mut self.vectors {
            vector.truncate(dimensions);
            let length = length(vector);
            if length > 0.0 {
                vector.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
            }
        }
    }

    /// Cosine of the first vector with each of the others; 0 for a vector without a direction.
    pub fn cosines(&self) -> Vec<f32> {
        let Some((first, others)) = self.vectors.split_first() else { return Vec::new() };
        let cosine = |other: &Vec<f32>| {
            let product: f64 = first.iter().zip(other).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let lengths = length(first) * length(other);
            if lengths > 0.0 { (product / lengths) as f32 } else { 0.0 }
        };
        others.iter().map(cosine).collect()
    }
}

fn length(vector: &[f32]) -> f64 {
    vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

impl Embedder {
    pub fn new(
        limits: ServeLimits,
        vocabulary: usize,
        size: usize,
        tokenizer: Arc<dyn Tokenize>,
        engine: Engine,
    ) -> Self {
        Self { limits, vocabulary, size, tokenizer, tokenizing: Tokenizing::default(), engine }
    }

    /// Number of numbers in a vector.
    pub fn size(&self) -> usize {
        self.size
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(super) fn vocabulary(&self) -> Arc<dyn Vocabulary> {
        self.tokenizer.clone()
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
