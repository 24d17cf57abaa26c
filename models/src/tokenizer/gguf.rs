//! The tokenizer of a GGUF file as Hugging Face's `tokenizer.json` and `tokenizer_config.json`.
//!
//! Byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback (`llama`) are supported. A file names the rule by
//! which text is split before its merges apply (`tokenizer.ggml.pre`) and does not contain it; an unknown name is an
//! error, since another rule would give other tokens without a warning.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use crate::{
    LoadError,
    weights::gguf::{Gguf, Metadata},
};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// The token for text that has none.
const UNKNOWN: u64 = 2;
/// Tokens that stand for no text, such as `<|im_end|>`.
const CONTROL: u64 = 3;
/// Tokens that are matched whole before anything else, and stand for their text.
const USER_DEFINED: u64 = 4;

const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// How a byte-level tokenizer treats text before its merges apply, by `tokenizer.ggml.pre`.
struct Pre {
    /// The models' own tokenizers compose characters first (NFC); llama.cpp and the file do not mention it.
    composes: bool,
    splits: Value,
    /// A piece that is a token as a whole is that token, whatever the merges say.
    ignores_merges: bool,
    /// Whether text begins with the first special token if the file does not say so.
    begins: bool,
}

impl Pre {
    fn of(metadata: &Metadata) -> Result<Self, LoadError> {
        let byte_level = |by_words: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                "use_regex": by_words})
        };
        let pattern = |pattern: &str| {
            let split =
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
        };
        let pre = |composes, splits, whole| Self { composes, splits, ignores_merges: whole, begins: whole };
        Ok(match metadata.string(PRE)? {
            None | Some("default" | "gpt-2" | "gpt2") => pre(false, byte_level(true), false),
            Some("smollm") => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                pre(false, json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]}), false)
            }
            Some("qwen2" | "deepseek-r1-qwen") => pre(true, pattern(QWEN2), false),
            Some("llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral") => pre(false, pattern(LLAMA3), true),
            Some("tekken") => pre(false, pattern(TEKKEN), true),
            Some(other) => {
                let known = "default, smollm, qwen2, llama-bpe and tekken";
                return Err(metadata.error(PRE, format!("{other:?} is not supported; supported are {known}")));
            }
        })
    }
}

/// What the header says about the vocabulary.
struct Vocabulary<'a> {
    metadata: &'a Metadata,
    tokens: Vec<&'a str>,
    types: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self, LoadError> {
        let tokens = metadata.strings(TOKENS)?.ok_or_else(|| metadata.error(TOKENS, "missing"))?;
        let types = metadata.integers(TYPES)?.unwrap_or_default();
        if !types.is_empty() && types.len() != tokens.len() {
            return Err(metadata.error(TYPES, format!("{} types of {} tokens", types.len(), tokens.len())));
        }
        Ok(Self { metadata, tokens, types })
    }

    /// A special token by the metadata key of its id.
    fn special(&self, key: &str) -> Result<Option<(u64, &'a str)>, LoadError> {
        let Some(id) = self.metadata.integer(key)? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id).copied());
        let token = token.ok_or_else(|| {
            self.metadata.error(key, format!("{id} is not an id; there are {} tokens", self.tokens.len()))
        })?;
        Ok(Some((id, token)))
    }

    /// The unknown token, control tokens, then those of the user, each in the order of ids.
    fn added(&self) -> Vec<Value> {
        let of = |wanted: u64| {
            let all = self.tokens.iter().zip(&self.types).enumerate();
            all.filter(move |(_, (token, kind))| **kind == wanted && !token.is_empty()).map(move |(id, (token, _))| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": wanted != USER_DEFINED})
            })
        };
        of(UNKNOWN).chain(of(CONTROL)).chain(of(USER_DEFINED)).collect()
    }

    /// Ids by token. Of two equal tokens the later one counts, as in transformers.
    fn ids(&self) -> HashMap<&'a str, usize> {
        self.tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect()
    }

    fn merges(&self) -> Result<Vec<(&'a str, &'a str)>, LoadError> {
        if let Some(merges) = self.metadata.strings(MERGES)? {
            let split = |merge: &'a str| {
                merge.split_once(' ').ok_or_else(|| self.metadata.error(MERGES, format!("{merge:?} is not two tokens")))
            };
            return merges.into_iter().map(split).collect();
        }
        let scores = self.metadata.floats(SCORES)?;
        let scores = scores.ok_or_else(|| self.metadata.error(MERGES, "missing, and there are no scores either"))?;
        if scores.len() != self.tokens.len() {
            let message = format!("{} scores of {} tokens", scores.len(), self.tokens.len());
            return Err(self.metadata.error(SCORES, message));
        }
        Ok(self.merges_by_score(&scores))
    }

    /// Every way to make a token from two others, best score first: SentencePiece merges the pair whose result scores
    /// best.
    fn merges_by_score(&self, scores: &[f32]) -> Vec<(&'a str, &'a str)> {
        let ids = self.ids();
        let mut merges = Vec::new();
        let mut seen = HashSet::new();
        for token in self.tokens.iter().copied().filter(|token| seen.insert(*token)) {
            let begin = merges.len();
            let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            merges.extend(
                splits.filter(|(left, right)| ids.contains_key(left) && ids.contains_key(right)).map(
                    |(left, right)| (scores[ids[token]], left.chars().count(), right.chars().count(), left, right),
                ),
            );
            merges[begin..].sort_by_key(|(.., left, right)| (ids[left], ids[right]));
        }
        merges.sort_by(|one, other| other.0.total_cmp(&one.0).then(other.1.cmp(&one.1)).then(other.2.cmp(&one.2)));
        merges.into_iter().map(|(.., left, right)| (left, right)).collect()
    }

    /// The tokens that begin and end every text.
    fn post_processor(&self, begins: bool) -> Result<Value, LoadError> {
        let flag = |key: &str, default: bool| Ok::<_, LoadError>(self.metadata.bool(key)?.unwrap_or(default));
        let token = |add: bool, key: &str| if add { self.special(key) } else { Ok(None) };
        let first = token(flag("tokenizer.ggml.add_bos_token", begins)?, "tokenizer.ggml.bos_token_id")?;
        let last = token(flag("tokenizer.ggml.add_eos_token", false)?, "tokenizer.ggml.eos_token_id")?;
        let special = |token: Option<(u64, &str)>, part: u32| {
            token.map(|(_, token)| json!({"SpecialToken": {"id": token, "type_id": part}}))
        };
        let part = |name: &str, part: u32| -> Vec<Value> {
            let text = json!({"Sequence": {"id": name, "type_id": part}});
            special(first, part).into_iter().chain([text]).chain(special(last, part)).collect()
        };
        let tokens = first
            .into_iter()
            .chain(last)
            .map(|(id, token)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})));
        let pair: Vec<Value> = part("A", 0).into_iter().chain(part("B", 1)).collect();
        Ok(json!({"type": "TemplateProcessing", "single": part("A", 0), "pair": pair,
            "special_tokens": tokens.collect::<Map<_, _>>()}))
    }
}

/// Whether the file's text begins with the first special token if it has no flag for it.
fn begins(metadata: &Metadata) -> Result<bool, LoadError> {
    match metadata.string(MODEL)? {
        Some("llama") => Ok(true),
        _ => Ok(Pre::of(metadata)?.begins),
    }
}

/// The `tokenizer.json` of a file.
fn tokenizer_json(gguf: &Gguf) -> Result<Value, LoadError> {
    let metadata = gguf.metadata();
    let vocabulary = Vocabulary::read(metadata)?;
    let ids: Map<String, Value> =
        vocabulary.ids().into_iter().map(|(token, id)| (token.to_owned(), id.into())).collect();
    let merges = vocabulary.merges()?;
    let mut model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": ids, "merges": merges});
    let (normalizer, pre_tokenizer, decoder) = match metadata.string(MODEL)? {
        Some("gpt2") => {
            let pre = Pre::of(metadata)?;
            model["ignore_merges"] = pre.ignores_merges.into();
            let normalizer = if pre.composes { json!({"type": "NFC"}) } else { Value::Null };
            let decoder =
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
            (normalizer, pre.splits, decoder)
        }
        Some("llama") => {
            model["fuse_unk"] = true.into();
            model["byte_fallback"] = true.into();
            if let Some((_, token)) = vocabulary.special("tokenizer.ggml.unknown_token_id")? {
                model["unk_token"] = token.into();
            }
            let (pre_tokenizer, decoder) = sentence_piece(metadata)?;
            (Value::Null, pre_tokenizer, decoder)
        }
        found => {
            let message = format!("{:?} is not supported; supported are gpt2 and llama", found.unwrap_or_default());
            return Err(metadata.error(MODEL, message));
        }
    };
    Ok(json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": vocabulary.added(),
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": vocabulary.post_processor(begins(metadata)?)?, "decoder": decoder, "model": model}))
}

/// Pre-tokenizer and decoder of SentencePiece's vocabularies, where a space is `▁`.
fn sentence_piece(metadata: &Metadata) -> Result<(Value, Value), LoadError> {
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let scheme = if prefix { "first" } else { "never" };
    let pre_tokenizer = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok((pre_tokenizer, json!({"type": "Sequence", "decoders": decoders})))
}

/// The `tokenizer_config.json` of a file: special tokens, flags and the chat template.
pub fn tokenizer_config(gguf: &Gguf) -> Result<Value, LoadError> {
    let metadata = gguf.metadata();
    let vocabulary = Vocabulary::read(metadata)?;
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "add_bos_token": metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(begins(metadata)?),
        "add_eos_token": metadata.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
    });
    for (field, key) in [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
        ("unk_token", "tokenizer.ggml.unknown_token_id"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
    ] {
        if let Some((_, token)) = vocabulary.special(key)? {
            config[field] = token.into();
        }
    }
    if let Some(template) = metadata.string(CHAT_TEMPLATE)? {
        config["chat_template"] = template.into();
    }
    Ok(config)
}

/// The tokenizer of a file, and its `tokenizer.json`.
pub fn tokenizer(gguf: &Gguf) -> Result<(tokenizers::Tokenizer, Vec<u8>), LoadError> {
    let failed = |message: String| LoadError::File { file: gguf.path().to_owned(), message };
    let json = serde_json::to_vec_pretty(&tokenizer_json(gguf)?).map_err(|error| failed(error.to_string()))?;
    let tokenizer = tokenizers::Tokenizer::from_bytes(&json)
        .map_err(|error| failed(format!("its tokenizer cannot be used: {error}")))?;
    Ok((tokenizer, json))
}
