//! Texts to token ids, for models that read whole inputs.

use std::sync::Arc;

use athanor_contract::serve::ServeLimits;

use super::{
    error::ServiceError,
    tokenize::Vocabulary,
    tokenizing::{Tokenizing, most_bytes},
};

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

/// The token ids of each text. What is far beyond the longest sequence is cut off first.
pub(super) async fn tokenize(
    tokenizing: &Tokenizing,
    tokenizer: &Arc<dyn Tokenize>,
    mut texts: Vec<String>,
    length: usize,
) -> Result<Vec<Vec<u32>>, ServiceError> {
    for text in &mut texts {
        text.truncate(text.floor_char_boundary(most_bytes(length)));
    }
    let bytes = texts.iter().map(String::len).sum();
    let tokenizer = tokenizer.clone();
    tokenizing.run(bytes, move || tokenizer.encode(&texts, length).map_err(ServiceError::Tokenizer)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A token for each text: its bytes.
    struct Bytes;

    impl Vocabulary for Bytes {
        fn tokens(&self, text: &str, _: bool) -> Result<Vec<u32>, String> {
            Ok(vec![text.len() as u32])
        }

        fn text(&self, _: &[u32]) -> Result<String, String> {
            Err("a number of bytes is no text".into())
        }

        fn name(&self, _: u32) -> Option<String> {
            None
        }
    }

    impl Tokenize for Bytes {
        fn encode(&self, texts: &[String], _: usize) -> Result<Vec<Vec<u32>>, String> {
            Ok(texts.iter().map(|text| vec![text.len() as u32]).collect())
        }
    }

    #[tokio::test]
    async fn a_text_far_beyond_the_longest_sequence_is_cut_before_it_is_tokenised() {
        let tokenizer: Arc<dyn Tokenize> = Arc::new(Bytes);
        // Eight tokens of up to 256 bytes; the last character that is cut has two bytes.
        let texts = vec!["short".to_owned(), "x".repeat(2048), format!("{}é", "x".repeat(2047)), "x".repeat(1 << 20)];
        let rows = tokenize(&Tokenizing::default(), &tokenizer, texts, 8).await.unwrap();
        assert_eq!(rows, [[5], [2048], [2047], [2048]]);
    }
}
