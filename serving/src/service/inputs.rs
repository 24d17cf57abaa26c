//! Texts to token ids, for models that read whole inputs.

use std::sync::Arc;

use athanor_contract::serve::ServeLimits;

use super::{error::ServiceError, tokenize::Vocabulary};

/// Texts up to this many bytes together are tokenised where they arrive; more goes to a blocking thread.
const INLINE_BYTES: usize = 4096;

/// Bytes of a text that are tokenised, for each token of the longest sequence: tokens of common vocabularies are
/// shorter.
const BYTES_PER_TOKEN: usize = 256;

/// Turns texts into token ids, special tokens included, cut to `max_length`.
pub trait Tokenize: Vocabulary {
    fn encode(&self, texts: &[String], max_length: usize) -> Result<Vec<Vec<u32>>, String>;
}

/// Inputs of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inputs {
    Texts(Vec<String>),
    /// Token ids, special tokens included.
    Tokens(Vec<Vec<u32>>),
}

impl Inputs {
    /// The number of inputs; an error if there is none, too many, or an empty one.
    pub(super) fn check(&self, limits: &ServeLimits) -> Result<usize, ServiceError> {
        let lengths: Vec<usize> = match self {
            Self::Texts(texts) => texts.iter().map(String::len).collect(),
            Self::Tokens(rows) => rows.iter().map(Vec::len).collect(),
        };
        check_count(lengths.len(), limits)?;
        match lengths.iter().position(|&length| length == 0) {
            Some(index) => Err(ServiceError::EmptyInput { index }),
            None => Ok(lengths.len()),
        }
    }
}

/// Refuses a request without inputs, or with too many.
pub(super) fn check_count(count: usize, limits: &ServeLimits) -> Result<(), ServiceError> {
    match count {
        0 => Err(ServiceError::NoInput),
        count if count > limits.max_inputs => Err(ServiceError::TooManyInputs { count, limit: limits.max_inputs }),
        _ => Ok(()),
    }
}

/// The token ids of each text.
pub(super) async fn tokenize(
    tokenizer: &Arc<dyn Tokenize>,
    mut texts: Vec<String>,
    length: usize,
) -> Result<Vec<Vec<u32>>, ServiceError> {
    for text in &mut texts {
        text.truncate(text.floor_char_boundary(length.saturating_mul(BYTES_PER_TOKEN)));
    }
    let bytes = texts.iter().map(String::len).sum();
    let tokenizer = tokenizer.clone();
    away_from_requests(bytes, move || tokenizer.encode(&texts, length).map_err(ServiceError::Tokenizer)).await
}

/// Tokenises `bytes` of text by `work`: where they are if they are few, else on a thread that serves no requests.
pub(super) async fn away_from_requests<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, ServiceError> + Send + 'static,
) -> Result<T, ServiceError> {
    if bytes <= INLINE_BYTES {
        return work();
    }
    tokio::task::spawn_blocking(work).await.map_err(|error| ServiceError::Tokenizer(error.to_string()))?
}
