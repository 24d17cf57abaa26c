//! Token ids to text as it grows: complete characters only, and in the end what decoding all ids at once gives.

use std::sync::Arc;

use tokenizers::{DecoderWrapper, Tokenizer};

/// How the bytes of tokens become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decoding {
    /// Each character of a token is a byte; text is the UTF-8 of all bytes, invalid sequences replaced.
    ByteLevel,
    /// Tokens are text, or a byte each. Consecutive bytes are text together, or each is replaced.
    ByteFallback {
        /// Whether the first space of the text is dropped.
        strips: bool,
    },
}

/// Why the text of a tokenizer cannot be streamed.
#[derive(Debug, thiserror::Error)]
#[error(
    "the tokenizer's decoder is neither byte-level nor SentencePiece with byte fallback, so its text cannot be streamed"
)]
pub struct UnknownDecoder;

#[derive(Clone, Debug)]
struct Entry {
    bytes: Box<[u8]>,
    special: bool,
    /// One byte of a longer character.
    is_byte: bool,
}

/// The bytes of every token of a vocabulary.
#[derive(Debug)]
pub struct TokenBytes {
    decoding: Decoding,
    /// The token of each id; `None` for an id without a token.
    entries: Vec<Option<Entry>>,
}

impl TokenBytes {
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, UnknownDecoder> {
        let decoding = decoding(tokenizer.get_decoder())?;
        let alphabet = alphabet();
        let vocabulary = tokenizer.get_vocab(true);
        let count = vocabulary.values().max().map_or(0, |last| *last as usize + 1);
        let special: std::collections::HashSet<String> = tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .filter(|added| added.special)
            .map(|t| t.content)
            .collect();
        let entry = |id: u32| {
            let token = tokenizer.id_to_token(id)?;
            let special = special.contains(&token);
            Some(match decoding {
                Decoding::ByteLevel => {
                    let mapped: Option<Vec<u8>> =
                        token.chars().map(|c| alphabet.get(c as usize).copied().flatten()).collect();
                    let bytes = mapped.unwrap_or_else(|| token.into_bytes());
                    Entry { bytes: bytes.into(), special, is_byte: false }
                }
                Decoding::ByteFallback { .. } => match fallback_byte(&token) {
                    Some(byte) => Entry { bytes: Box::new([byte]), special, is_byte: true },
                    None => Entry { bytes: token.replace('▁', " ").into_bytes().into(), special, is_byte: false },
                },
            })
        };
        Ok(Self { decoding, entries: (0..count as u32).map(entry).collect() })
    }

    /// The bytes of a token, which may be a part of a character. Empty for an id without a token.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.entry(id).map_or(&[], |entry| &entry.bytes)
    }

    /// Whether a token stands for no text, such as `<|im_end|>`.
    pub fn is_special(&self, id: u32) -> bool {
        self.entry(id).is_some_and(|entry| entry.special)
    }

    fn entry(&self, id: u32) -> Option<&Entry> {
        self.entries.get(id as usize)?.as_ref()
    }
}

fn decoding(decoder: Option<&DecoderWrapper>) -> Result<Decoding, UnknownDecoder> {
    let Some(decoder) = decoder else { return Err(UnknownDecoder) };
    let parts = match decoder {
        DecoderWrapper::ByteLevel(_) => return Ok(Decoding::ByteLevel),
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders(),
        _ => return Err(UnknownDecoder),
    };
    match parts {
        [DecoderWrapper::ByteLevel(_)] => Ok(Decoding::ByteLevel),
        [DecoderWrapper::Replace(_), DecoderWrapper::ByteFallback(_), DecoderWrapper::Fuse(_)] => {
            Ok(Decoding::ByteFallback { strips: false })
        }
        [
            DecoderWrapper::Replace(_),
            DecoderWrapper::ByteFallback(_),
            DecoderWrapper::Fuse(_),
            DecoderWrapper::Strip(strip),
        ] if (strip.content, strip.start, strip.stop) == (' ', 1, 0) => Ok(Decoding::ByteFallback { strips: true }),
        _ => Err(UnknownDecoder),
    }
}

/// The byte that a token such as `<0x0A>` stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (token.len() == 6).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// GPT-2's characters for bytes, by character: printable ones stand for themselves, the others for 256 and up.
fn alphabet() -> Vec<Option<u8>> {
    let mut bytes = vec![None; 256 + 68];
    let mut next = 256;
    for byte in 0..=255_u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let character = if printable { usize::from(byte) } else { next };
        next += usize::from(!printable);
        bytes[character] = Some(byte);
    }
    bytes
}

/// Text of one sequence of ids. What is pushed and finished, one behind the other, is what the tokenizer decodes from
/// all ids.
#[derive(Clone, Debug)]
pub struct TextStream {
    tokens: Arc<TokenBytes>,
    skip_special_tokens: bool,
    /// Bytes that are no text yet.
    pending: Vec<u8>,
    /// Whether text was given out.
    begun: bool,
}

impl TextStream {
    pub fn new(tokens: Arc<TokenBytes>, skip_special_tokens: bool) -> Self {
        Self { tokens, skip_special_tokens, pending: Vec::new(), begun: false }
    }

    /// The text that is complete with this token. Empty while a character is incomplete, and for a token that is
    /// skipped.
    pub fn push(&mut self, id: u32) -> String {
        let tokens = self.tokens.clone();
        let Some(entry) = tokens.entry(id) else { return String::new() };
        if self.skip_special_tokens && entry.special {
            return String::new();
        }
        let text = match tokens.decoding {
            Decoding::ByteLevel => {
                self.pending.extend_from_slice(&entry.bytes);
                self.complete()
            }
            Decoding::ByteFallback { .. } if entry.is_byte => {
                // A later byte may make all of them invalid.
                self.pending.extend_from_slice(&entry.bytes);
                return String::new();
            }
            Decoding::ByteFallback { .. } => self.run() + &String::from_utf8_lossy(&entry.bytes),
        };
        self.stripped(text)
    }

    /// The text of what is incomplete when no more ids come.
    pub fn finish(mut self) -> String {
        let text = match self.tokens.decoding {
            Decoding::ByteLevel => String::from_utf8_lossy(&self.pending).into_owned(),
            Decoding::ByteFallback { .. } => self.run(),
        };
        self.stripped(text)
    }

    /// Takes whole characters from the front of what is pending, and replaces what can become none.
    fn complete(&mut self) -> String {
        let mut text = String::new();
        let mut taken = 0;
        loop {
            let rest = &self.pending[taken..];
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&rest[..valid]));
                    let Some(invalid) = error.error_len() else {
                        self.pending.drain(..taken + valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    taken += valid + invalid;
                }
            }
        }
    }

    /// Takes a run of bytes that has ended.
    fn run(&mut self) -> String {
        let bytes = std::mem::take(&mut self.pending);
        let count = bytes.len();
        let replaced = |_| char::REPLACEMENT_CHARACTER.to_string().repeat(count);
        String::from_utf8(bytes).unwrap_or_else(replaced)
    }

    fn stripped(&mut self, mut text: String) -> String {
        if !self.begun && !text.is_empty() {
            self.begun = true;
            if self.tokens.decoding == (Decoding::ByteFallback { strips: true }) && text.starts_with(' ') {
                text.remove(0);
            }
        }
        text
    }
}
