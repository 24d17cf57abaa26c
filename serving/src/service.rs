//! Texts in, labels and probabilities out: what HTTP and gRPC share.
//!
//! It holds the limits of one request and the order of the steps; wire formats belong to [`crate::api`].

use std::{sync::Arc, time::Duration};

use athanor_contract::serve::{ServeConfig, ServeLimits};

use crate::engine::encode::{Engine, EngineError};

/// Texts up to this many bytes together are tokenised where they arrive; more goes to a blocking thread.
const INLINE_BYTES: usize = 4096;

/// Bytes of a text that are tokenised, for each token of the longest sequence: tokens of common vocabularies are shorter.
const BYTES_PER_TOKEN: usize = 256;

/// Turns texts into token ids, special tokens included, cut to `max_length`.
pub trait Tokenize: Send + Sync + 'static {
    fn encode(&self, texts: &[String], max_length: usize) -> Result<Vec<Vec<u32>>, String>;
}

/// One revision of one model, ready to answer.
pub struct Service {
    pub model_name: String,
    pub revision: String,
    pub labels: Vec<String>,
    pub limits: ServeLimits,
    /// Seconds since the epoch at which this process loaded the model.
    pub created: i64,
    tokenizer: Arc<dyn Tokenize>,
    engine: Engine,
}

/// The answer to one input.
#[derive(Clone, Debug, PartialEq)]
pub struct Classification {
    /// Index into [`Service::labels`] of the most probable label.
    pub label: usize,
    /// In the order of [`Service::labels`].
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

/// Why a request has no answer; each protocol maps it to its own codes.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error("the model {asked:?} does not exist here; the model is {known:?}")]
    UnknownModel { asked: String, known: String },
    #[error("there is no input")]
    NoInput,
    #[error("{count} inputs; at most {limit} in one request")]
    TooManyInputs { count: usize, limit: usize },
    #[error("input {index} is empty")]
    EmptyInput { index: usize },
    #[error("the model failed: the logits of input {index} are not finite numbers")]
    NotFinite { index: usize },
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Service {
    pub fn new(config: &ServeConfig, labels: Vec<String>, tokenizer: Arc<dyn Tokenize>, engine: Engine) -> Self {
        Self {
            model_name: config.model_name.clone(),
            revision: config.revision.clone(),
            labels,
            limits: config.limits,
            created: jiff::Timestamp::now().as_second(),
            tokenizer,
            engine,
        }
    }

    /// Absent and this model's own name are accepted.
    pub fn check_model(&self, asked: Option<&str>) -> Result<(), ServiceError> {
        match asked {
            Some(asked) if asked != self.model_name => Err(ServiceError::UnknownModel {
                asked: asked.chars().take(256).collect(),
                known: self.model_name.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Classifies the texts of one request.
    pub async fn classify(&self, texts: Vec<String>) -> Result<Classified, ServiceError> {
        if texts.is_empty() {
            return Err(ServiceError::NoInput);
        }
        if texts.len() > self.limits.max_inputs {
            return Err(ServiceError::TooManyInputs { count: texts.len(), limit: self.limits.max_inputs });
        }
        if let Some(index) = texts.iter().position(String::is_empty) {
            return Err(ServiceError::EmptyInput { index });
        }
        let places = self.engine.reserve(texts.len())?;
        let rows = self.tokenize(texts).await?;
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

    async fn tokenize(&self, mut texts: Vec<String>) -> Result<Vec<Vec<u32>>, ServiceError> {
        let length = self.limits.max_sequence_length;
        for text in &mut texts {
            text.truncate(text.floor_char_boundary(length.saturating_mul(BYTES_PER_TOKEN)));
        }
        if texts.iter().map(String::len).sum::<usize>() <= INLINE_BYTES {
            return self.tokenizer.encode(&texts, length).map_err(ServiceError::Tokenizer);
        }
        let tokenizer = self.tokenizer.clone();
        tokio::task::spawn_blocking(move || tokenizer.encode(&texts, length))
            .await
            .map_err(|error| ServiceError::Tokenizer(error.to_string()))?
            .map_err(ServiceError::Tokenizer)
    }

    /// Runs a short and a full-length batch, so that the first request meets warm kernels and allocators.
    pub async fn warm_up(&self) -> Result<(), ServiceError> {
        self.classify(vec!["warm-up".into()]).await?;
        let inputs = self.limits.max_inputs.min(self.limits.max_batch_inputs).clamp(1, 8);
        self.classify(vec!["warm up ".repeat(self.limits.max_sequence_length); inputs]).await?;
        Ok(())
    }

    /// Resolves when the engine's thread has ended by a fault.
    pub async fn stopped(&self) {
        self.engine.stopped().await;
    }

    /// Inputs that wait for a batch.
    pub fn waiting(&self) -> usize {
        self.engine.waiting()
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
