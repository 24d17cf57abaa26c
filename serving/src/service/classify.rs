//! Texts in, labels and probabilities out.

use std::{sync::Arc, time::Duration};

use athanor_contract::serve::ServeLimits;

use super::{
    error::ServiceError,
    inputs::{Tokenize, check_count, tokenize},
    tokenize::Vocabulary,
    tokenizing::Tokenizing,
};
use crate::engine::encode::Engine;

/// A model that has one of its labels for each text.
pub struct Classifier {
    pub labels: Vec<String>,
    limits: ServeLimits,
    tokenizer: Arc<dyn Tokenize>,
    tokenizing: Tokenizing,
    engine: Engine,
}

/// The answer to one input.
#[derive(Clone, Debug, PartialEq)]
pub struct Classification {
    /// Index into [`Classifier::labels`] of the most probable label.
    pub label: usize,
    /// One probability for each label, in the order of [`Classifier::labels`].
    pub probabilities: Vec<f32>,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Classified {
    pub results: Vec<Classification>,
    /// Tokens read, special tokens included, padding not.
    pub tokens: u64,
    /// The longest wait of its inputs for a batch.
    pub queued: Duration,
    /// The longest batch of its inputs.
    pub computed: Duration,
    pub batch_inputs: usize,
}

impl Classifier {
    pub fn new(limits: ServeLimits, labels: Vec<String>, tokenizer: Arc<dyn Tokenize>, engine: Engine) -> Self {
        Self { labels, limits, tokenizer, tokenizing: Tokenizing::default(), engine }
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(super) fn vocabulary(&self) -> Arc<dyn Vocabulary> {
        self.tokenizer.clone()
    }

    /// Classifies the texts of one request.
    pub async fn classify(&self, texts: Vec<String>) -> Result<Classified, ServiceError> {
        check_count(texts.len(), &self.limits)?;
        if let Some(index) = texts.iter().position(String::is_empty) {
            return Err(ServiceError::EmptyInput { index });
        }
        let places = self.engine.reserve(texts.len())?;
        let rows = tokenize(&self.tokenizing, &self.tokenizer, texts, self.limits.max_sequence_length).await?;
        let tokens = rows.iter().map(|row| row.len() as u64).sum();
        let outputs = self.engine.run(places, rows).await?;
        let results = outputs.iter().enumerate().map(|(index, output)| {
            let probabilities = softmax(&output.logits).ok_or(ServiceError::NotFinite { index })?;
            Ok(Classification { label: highest(&probabilities), probabilities })
        });
        let results = results.collect::<Result<_, ServiceError>>()?;
        Ok(Classified {
            tokens,
            queued: outputs.iter().map(|output| output.queued).max().unwrap_or_default(),
            computed: outputs.iter().map(|output| output.computed).max().unwrap_or_default(),
            batch_inputs: outputs.iter().map(|output| output.batch_inputs).max().unwrap_or_default(),
            results,
        })
    }

    /// Runs a short and a full-length batch, so that the first request meets warm kernels and allocators.
    pub async fn warm_up(&self) -> Result<(), ServiceError> {
        self.classify(vec!["warm-up".into()]).await?;
        let inputs = self.limits.max_inputs.min(self.limits.max_batch_inputs).clamp(1, 8);
        self.classify(vec!["warm up ".repeat(self.limits.max_sequence_length); inputs]).await?;
        Ok(())
    }
}

/// Softmax in f64, shifted by the maximum so that large logits do not overflow; `None` if a logit is not finite.
fn softmax(logits: &[f32]) -> Option<Vec<f32>> {
    if !logits.iter().all(|logit| logit.is_finite()) {
        return None;
    }
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponents: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) - f64::from(highest)).exp()).collect();
    let sum: f64 = exponents.iter().sum();
    Some(exponents.iter().map(|exponent| (exponent / sum) as f32).collect())
}

/// Index of the highest probability, the first of equals.
fn highest(probabilities: &[f32]) -> usize {
    let mut best = 0;
    for (index, probability) in probabilities.iter().enumerate() {
        if *probability > probabilities[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softmax_survives_large_logits_and_refuses_those_that_are_not_finite() {
        assert_eq!(softmax(&[1000.0, 1000.0]), Some(vec![0.5, 0.5]));
        let probabilities = softmax(&[0.0, 3f32.ln()]).unwrap();
        assert!((probabilities[1] - 0.75).abs() < 1e-6, "{probabilities:?}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(softmax(&[0.0, bad]), None);
        }
    }
}
