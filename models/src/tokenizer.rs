//! Texts to token ids, by the model folder's `tokenizer.json`, and ids to padded tensors.

pub mod chat;
pub mod decoder;
pub mod gguf;
mod python;
pub mod stream;

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

/// Which tokens of two vocabularies are the same, so that two models' views of a token can be compared.
#[derive(Debug)]
pub struct SameTokens {
    /// The other vocabulary's id by ours.
    ids: Vec<Option<u32>>,
    /// Ours and theirs that stand for no text, such as [CLS] and `<s>`.
    special: [BTreeSet<u32>; 2],
}

impl SameTokens {
    pub fn new(own: &Tokenizer, other: &Tokenizer) -> Self {
        let tokens = own.inner.get_vocab(true);
        let mut ids = vec![None; tokens.values().max().map_or(0, |&last| last as usize + 1)];
        for (token, id) in tokens {
            ids[id as usize] = other.inner.token_to_id(&token);
        }
        Self { ids, special: [own.special(), other.special()] }
    }

    /// The first token at which two views of a text part; `None`: both cut it alike. Any special token stands for any other.
    pub fn first_difference(&self, own: &[u32], other: &[u32]) -> Option<usize> {
        let [ours, theirs] = &self.special;
        let same = |(a, b): (&u32, &u32)| {
            self.ids.get(*a as usize).copied().flatten() == Some(*b) || (ours.contains(a) && theirs.contains(b))
        };
        let place = own.iter().zip(other).position(|pair| !same(pair));
        place.or_else(|| (own.len() != other.len()).then_some(own.len().min(other.len())))
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

    /// Tokens for masking; `None` if the vocabulary has no mask.
    pub fn mask_tokens(&self) -> Option<MaskTokens> {
        let mask = ["[MASK]", "<mask>"].iter().find_map(|name| self.inner.token_to_id(name))?;
        let vocabulary = u32::try_from(self.inner.get_vocab_size(true)).ok()?;
        Some(MaskTokens { mask, vocabulary, special: self.special() })
    }

    /// Ids that stand for no text.
    fn special(&self) -> BTreeSet<u32> {
        let added = self.inner.get_added_tokens_decoder();
        added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect()
    }

    /// The token with an id, as the vocabulary has it.
    pub fn token(&self, id: u32) -> String {
        self.inner.id_to_token(id).unwrap_or_default()
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

    /// Ids of a whole text, however long; with the special tokens around it if `with_special` is set.
    ///
    /// # Errors
    /// A text that the tokenizer cannot read.
    pub fn encode(&self, text: &str, with_special: bool) -> Result<Vec<u32>, LoadError> {
        let encoding = self.inner.encode_fast(text, with_special).map_err(unreadable)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of ids, special tokens included.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, LoadError> {
        self.inner.decode(ids, false).map_err(|error| LoadError::File {
            file: "tokenizer.json".into(),
            message: format!("ids cannot be decoded: {error}"),
        })
    }

    /// Whether an id is one of the vocabulary.
    pub fn has(&self, id: u32) -> bool {
        self.inner.id_to_token(id).is_some()
    }

    /// Ids of each text with the special tokens around them, at most `max_length` of them: longer texts lose their end.
    pub fn encode_batch<T: AsRef<str>>(&self, texts: &[T], max_length: usize) -> Result<Vec<Vec<u32>>, LoadError> {
        let inputs: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        // A batch goes through a pool of threads, which for one text takes longer than the text.
        let encodings = match inputs.as_slice() {
            [text] => self.inner.encode_fast(*text, false).map(|encoding| vec![encoding]),
            _ => self.inner.encode_batch_fast(inputs, false),
        }
        .map_err(unreadable)?;
        let room = max_length.saturating_sub(self.specials);
        encodings
            .into_iter()
            .map(|mut encoding| {
                encoding.truncate(room, 0, tokenizers::TruncationDirection::Right);
                let encoding = self.inner.post_process(encoding, None, true).map_err(unreadable)?;
                Ok(encoding.get_ids().to_vec())
            })
            .collect()
    }

    /// Encodes like [`Self::encode_batch`], for many texts, with little memory besides the ids.
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

fn unreadable(error: tokenizers::Error) -> LoadError {
    LoadError::File { file: "tokenizer.json".into(), message: format!("a text cannot be tokenized: {error}") }
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

    /// Tokens of whole words, between the two special tokens.
    fn tokenizer(words: &[&str]) -> Tokenizer {
        let vocabulary: serde_json::Map<_, _> =
            words.iter().zip(0..).map(|(&word, id)| (word.into(), id.into())).collect();
        let added = |id: usize| {
            serde_json::json!({
                "id": id, "content": words[id], "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false,
            })
        };
        let whole = serde_json::json!({
            "version": "1.0", "added_tokens": [added(0), added(1)], "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {"type": "BertProcessing", "cls": [words[0], 0], "sep": [words[1], 1]},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[1]},
        });
        Tokenizer { inner: tokenizers::Tokenizer::from_bytes(whole.to_string()).unwrap(), specials: 2 }
    }

    #[test]
    fn tokens_are_the_same_by_their_text_and_any_special_one_by_any() {
        let own = tokenizer(&["[CLS]", "[SEP]", "a", "good", "film"]);
        let other = tokenizer(&["<s>", "</s>", "film", "a", "fine", "good"]);
        let same = SameTokens::new(&own, &other);
        let difference = |text: &str, cut: usize| {
            let rows = [&own, &other].map(|tokenizer| tokenizer.encode_batch(&[text], cut).unwrap().remove(0));
            same.first_difference(&rows[0], &rows[1])
        };
        assert_eq!(difference("a good film", 9), None);
        assert_eq!(difference("a film a film", 4), None, "cut to as many");
        assert_eq!(difference("a fine film", 9), Some(2), "known to one of them alone");
        assert_eq!(same.first_difference(&[0, 2, 1], &[0, 3]), Some(2), "one ends before the other");
        assert_eq!(same.first_difference(&[0, 2, 1], &[0, 4, 1]), Some(1), "another word");
        assert_eq!(same.first_difference(&[0, 2, 1], &[0, 0, 1]), Some(1), "a word is no special token");
    }

    #[test]
    fn short_rows_are_filled_up() {
        let (ids, mask) = pad(&[&[5, 6, 7], &[8]], 9);
        assert_eq!(Vec::<Vec<i64>>::try_from(ids).unwrap(), [[5, 6, 7], [8, 9, 9]]);
        assert_eq!(Vec::<Vec<i64>>::try_from(mask).unwrap(), [[1, 1, 1], [1, 0, 0]]);
    }
}
