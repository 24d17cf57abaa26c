//! Texts to token ids, by the model folder's `tokenizer.json`, and ids to padded tensors.

use std::{collections::BTreeSet, path::Path};

use tch::Tensor;
use tokenizers::PostProcessor;

use crate::{EncoderConfig, load::LoadError};

/// What masking tokens needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskTokens {
    /// Id of the mask.
    pub mask: u32,
    /// Ids below this are tokens.
    pub vocabulary: u32,
    /// Ids that are never predicted.
    pub special: BTreeSet<u32>,
}

/// Rows of token ids behind each other in one buffer: four bytes a token and eight a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRows {
    ids: Vec<u32>,
    /// Where each row ends; it begins where the one before ends.
    ends: Vec<usize>,
}

impl TokenRows {
    pub fn push(&mut self, ids: &[u32]) {
        self.ids.extend_from_slice(ids);
        self.ends.push(self.ids.len());
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Tokens of each row.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        (0..self.len()).map(|row| self[row].len())
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        (0..self.len()).map(|row| &self[row])
    }

    /// These rows, in this order.
    pub fn select(&self, rows: &[usize]) -> Self {
        rows.iter().map(|&row| &self[row]).collect()
    }
}

impl std::ops::Index<usize> for TokenRows {
    type Output = [u32];

    fn index(&self, row: usize) -> &[u32] {
        let begin = if row == 0 { 0 } else { self.ends[row - 1] };
        &self.ids[begin..self.ends[row]]
    }
}

impl<T: AsRef<[u32]>> FromIterator<T> for TokenRows {
    fn from_iter<I: IntoIterator<Item = T>>(rows: I) -> Self {
        let mut all = Self::default();
        rows.into_iter().for_each(|row| all.push(row.as_ref()));
        all
    }
}

/// Texts that are tokenized at a time: while they are, each needs a kilobyte and more.
const TEXTS_AT_A_TIME: usize = 8192;

/// A Hugging Face fast tokenizer. Shared between threads by reference.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Tokens such as [CLS] and [SEP] that every text gets.
    specials: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder. Truncation and padding that the file asks for are turned off: both are the
    /// caller's, who knows the batch.
    pub fn load(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join("tokenizer.json");
        let failed = |message: String| LoadError::File { file: path.clone(), message };
        let bytes = std::fs::read(&path).map_err(|error| LoadError::io(&path, error))?;
        let mut inner =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| failed(format!("not a tokenizer: {error}")))?;
        let size = EncoderConfig::load(folder)?.vocab_size;
        let last = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        if let Some((token, id)) = last.filter(|(_, id)| i64::from(*id) >= size) {
            return Err(failed(format!("token {token:?} has the id {id}, but vocab_size in config.json is {size}")));
        }
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| failed(error.to_string()))?;
        let specials = inner.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        Ok(Self { inner, specials })
    }

    /// For masked language models; `None` if the vocabulary has no mask.
    pub fn mask_tokens(&self) -> Option<MaskTokens> {
        let mask = ["[MASK]", "<mask>"].iter().find_map(|name| self.inner.token_to_id(name))?;
        let added = self.inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        Some(MaskTokens { mask, vocabulary: u32::try_from(self.inner.get_vocab_size(true)).ok()?, special })
    }

    /// Words that are a token of their own wherever they stand after a space, in lower case, with their ids, in order of the ids.
    pub fn words(&self) -> Vec<(String, u32)> {
        let all = self.inner.get_vocab(false).into_iter();
        let word = |token: String| {
            let word = token.trim_start_matches(['Ġ', '▁']);
            let is_word = word.chars().all(char::is_lowercase) && !word.is_empty();
            is_word.then(|| word.to_owned())
        };
        let words: BTreeSet<String> = all.filter_map(|(token, _)| word(token)).collect();
        let alone = |word: &str| {
            // Byte-level vocabularies have words with the space before them.
            let encoding = self.inner.encode_fast(format!("a {word}"), false).ok()?;
            let before = self.inner.encode_fast("a", false).ok()?.len();
            (encoding.len() == before + 1).then(|| encoding.get_ids()[before])
        };
        let mut words: Vec<(String, u32)> =
            words.into_iter().filter_map(|word| Some((alone(&word)?, word))).map(|(id, word)| (word, id)).collect();
        words.sort_by_key(|(_, id)| *id);
        words
    }

    /// Ids of each text with the special tokens around them, at most `max_length` of them: longer texts lose their end.
    pub fn encode_batch<T: AsRef<str>>(&self, texts: &[T], max_length: usize) -> Result<Vec<Vec<u32>>, LoadError> {
        let failed = |error: tokenizers::Error| LoadError::File {
            file: "tokenizer.json".into(),
            message: format!("a text cannot be tokenized: {error}"),
        };
        let inputs: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        let encodings = self.inner.encode_batch_fast(inputs, false).map_err(failed)?;
        let room = max_length.saturating_sub(self.specials);
        encodings
            .into_iter()
            .map(|mut encoding| {
                encoding.truncate(room, 0, tokenizers::TruncationDirection::Right);
                let encoding = self.inner.post_process(encoding, None, true).map_err(failed)?;
                Ok(encoding.get_ids().to_vec())
            })
            .collect()
    }

    /// As [`Self::encode_batch`], of many texts with little memory beside the ids.
    pub fn encode_rows<'t>(
        &self,
        texts: impl IntoIterator<Item = &'t str>,
        max_length: usize,
    ) -> Result<TokenRows, LoadError> {
        let mut texts = texts.into_iter();
        let mut rows = TokenRows::default();
        loop {
            let some: Vec<&str> = texts.by_ref().take(TEXTS_AT_A_TIME).collect();
            if some.is_empty() {
                return Ok(rows);
            }
            self.encode_batch(&some, max_length)?.iter().for_each(|ids| rows.push(ids));
        }
    }
}

/// Ids `[batch, longest]` (i64), filled up with `pad_id`, and the mask of real tokens (i64, 1 or 0).
pub fn pad(batch: &[&[u32]], pad_id: i64) -> (Tensor, Tensor) {
    let longest = batch.iter().map(|ids| ids.len()).max().unwrap_or(0);
    let mut ids = Vec::with_capacity(batch.len() * longest);
    let mut mask = Vec::with_capacity(batch.len() * longest);
    for row in batch {
        ids.extend(row.iter().map(|&id| i64::from(id)));
        ids.extend(std::iter::repeat_n(pad_id, longest - row.len()));
        mask.extend(std::iter::repeat_n(1_i64, row.len()));
        mask.extend(std::iter::repeat_n(0_i64, longest - row.len()));
    }
    let shape = [batch.len() as i64, longest as i64];
    (Tensor::from_slice(&ids).view(shape), Tensor::from_slice(&mask).view(shape))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_rows_are_filled_up() {
        let (ids, mask) = pad(&[&[5, 6, 7], &[8]], 9);
        assert_eq!(Vec::<Vec<i64>>::try_from(ids).unwrap(), [[5, 6, 7], [8, 9, 9]]);
        assert_eq!(Vec::<Vec<i64>>::try_from(mask).unwrap(), [[1, 1, 1], [1, 0, 0]]);
    }
}
