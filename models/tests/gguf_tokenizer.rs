//! Tokenizers of GGUF files against transformers (`models/tests/golden/make_tokenizer.py`), and their text as it grows.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use athanor_models::{
    tokenizer::{
        gguf::{tokenizer, tokenizer_config},
        stream::{TextStream, TokenBytes},
    },
    weights::gguf::Gguf,
};
use proptest::prelude::*;
use serde::Deserialize;
use tokenizers::Tokenizer;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A GGUF file: one of the golden files, or of a model that `scripts/fetch` has.
fn open(name: &str) -> Gguf {
    if name == "sentencepiece" {
        return Gguf::open(&golden("sentencepiece.gguf")).unwrap();
    }
    let models = std::env::var_os("ATHANOR_MODELS").expect("ATHANOR_MODELS, by `. scripts/env`");
    let folder = Path::new(&models).join(name);
    let files = std::fs::read_dir(&folder);
    let files = files.unwrap_or_else(|_| panic!("{}: run scripts/fetch smollm2 qwen-coder-0.5b", folder.display()));
    let mut files = files.map(|file| file.unwrap().path());
    Gguf::open(&files.find(|file| file.extension().is_some_and(|ending| ending == "gguf")).unwrap()).unwrap()
}

#[derive(Deserialize)]
struct Golden {
    special_tokens: serde_json::Map<String, serde_json::Value>,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    text: String,
    ids: Vec<u32>,
    /// In characters.
    offsets: Vec<(usize, usize)>,
    decoded: String,
    skipped: String,
}

fn compare(name: &str) {
    let all: serde_json::Value = serde_json::from_slice(&std::fs::read(golden("tokenizers.json")).unwrap()).unwrap();
    let golden = Golden::deserialize(&all[name]).unwrap();
    let gguf = open(name);
    let (own, json) = tokenizer(&gguf).unwrap();
    // What is exported reads back as the same tokenizer.
    let exported = Tokenizer::from_bytes(json).unwrap();
    let tokens = Arc::new(TokenBytes::new(&own).unwrap());
    for row in &golden.rows {
        let what = format!("{name}: {:?}", row.text);
        let encoding = own.encode_char_offsets(row.text.as_str(), true).unwrap();
        assert_eq!(encoding.get_ids(), row.ids, "{what}");
        assert_eq!(encoding.get_offsets(), row.offsets, "{what}");
        assert_eq!(own.decode(&row.ids, false).unwrap(), row.decoded, "{what}");
        assert_eq!(own.decode(&row.ids, true).unwrap(), row.skipped, "{what}");
        assert_eq!(exported.encode_fast(row.text.as_str(), true).unwrap().get_ids(), row.ids, "{what}");
        assert_eq!(streamed(&tokens, &row.ids, false), row.decoded, "{what}");
        assert_eq!(streamed(&tokens, &row.ids, true), row.skipped, "{what}");
    }
    let config = tokenizer_config(&gguf).unwrap();
    for (field, token) in &golden.special_tokens {
        assert_eq!(&config[field], token, "{name}: {field}");
    }
}

#[test]
fn sentencepiece_is_what_transformers_makes_of_it() {
    compare("sentencepiece");
}

#[test]
fn smollm2_is_what_transformers_makes_of_it() {
    compare("smollm2-135m");
}

/// `cargo test --release -p athanor-models --test gguf_tokenizer -- --ignored`
#[test]
#[ignore = "needs scripts/fetch qwen-coder-0.5b"]
fn qwen_is_what_transformers_makes_of_it() {
    compare("qwen2.5-coder-0.5b");
}

/// All that a stream gives out, and that each piece of it is whole.
fn streamed(tokens: &Arc<TokenBytes>, ids: &[u32], skip_special_tokens: bool) -> String {
    let mut stream = TextStream::new(tokens.clone(), skip_special_tokens);
    let text: String = ids.iter().map(|id| stream.push(*id)).collect();
    text + &stream.finish()
}

static SMOLLM2: LazyLock<(Tokenizer, Arc<TokenBytes>)> = LazyLock::new(|| tables("smollm2-135m"));
static SENTENCE_PIECE: LazyLock<(Tokenizer, Arc<TokenBytes>)> = LazyLock::new(|| tables("sentencepiece"));

fn tables(name: &str) -> (Tokenizer, Arc<TokenBytes>) {
    let (tokenizer, _) = tokenizer(&open(name)).unwrap();
    let tokens = TokenBytes::new(&tokenizer).unwrap();
    (tokenizer, Arc::new(tokens))
}

proptest! {
    #[test]
    fn text_that_grows_is_the_text_of_all_tokens(
        whole in proptest::collection::vec(0_u32..49_200, 0..40),
        // Tokens of single bytes, whose sequences are mostly no characters.
        bytes in proptest::collection::vec(0_u32..330, 0..40),
        skip in any::<bool>(),
    ) {
        for (tokenizer, tokens) in [&*SMOLLM2, &*SENTENCE_PIECE] {
            for ids in [&whole, &bytes] {
                prop_assert_eq!(streamed(tokens, ids, skip), tokenizer.decode(ids, skip).unwrap());
            }
        }
    }

    #[test]
    fn the_bytes_of_a_texts_tokens_are_the_texts(text in "(\\PC|[🙂é漢 \n]){0,30}") {
        let (tokenizer, tokens) = &*SMOLLM2;
        let encoding = tokenizer.encode_fast(text.as_str(), false).unwrap();
        let bytes: Vec<u8> = encoding.get_ids().iter().flat_map(|id| tokens.bytes(*id).to_vec()).collect();
        prop_assert_eq!(String::from_utf8(bytes).unwrap(), text);
    }
}

#[test]
fn a_character_is_held_back_until_it_is_complete() {
    let (tokenizer, tokens) = &*SMOLLM2;
    let ids = tokenizer.encode_fast("a🜁!", false).unwrap().get_ids().to_vec();
    assert!(ids.len() > 4, "the character is several tokens: {ids:?}");
    let mut stream = TextStream::new(tokens.clone(), true);
    let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
    assert_eq!(pieces.iter().filter(|piece| !piece.is_empty()).collect::<Vec<_>>(), ["a", "🜁", "!"]);
    assert!(tokens.bytes(ids[1]).len() < 4 && !tokens.bytes(ids[1]).is_empty());
    // Cut off within the character.
    let mut stream = TextStream::new(tokens.clone(), true);
    ids[..2].iter().for_each(|id| drop(stream.push(*id)));
    assert_eq!(stream.finish(), "\u{fffd}");

    let (tokenizer, tokens) = &*SENTENCE_PIECE;
    let ids = tokenizer.encode_fast("a🙂b", true).unwrap().get_ids().to_vec();
    let mut stream = TextStream::new(tokens.clone(), true);
    let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
    assert_eq!(pieces.iter().filter(|piece| !piece.is_empty()).collect::<Vec<_>>(), ["a", "🙂b"]);
    assert_eq!(tokens.bytes(ids[2]), [0xf0]);
    assert!(tokens.is_special(1) && tokens.bytes(1_000_000).is_empty() && !tokens.is_special(1_000_000));
}

#[test]
fn a_vocabulary_that_does_not_fit_is_refused_with_its_key() {
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(golden("sentencepiece.gguf")).unwrap();
        change(&mut bytes);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        tokenizer(&Gguf::open(file.path()).unwrap()).err().unwrap().to_string()
    };
    /// Puts other bytes in the place of `from`, which is there once.
    fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
        let place = bytes.windows(from.len()).position(|window| window == from).unwrap();
        bytes[place..place + to.len()].copy_from_slice(to);
    }
    let model = b"tokenizer.ggml.model\x08\0\0\0\x05\0\0\0\0\0\0\0llama";
    let other = b"tokenizer.ggml.model\x08\0\0\0\x05\0\0\0\0\0\0\0rwkv7";
    let error = with(&|bytes| replace(bytes, model, other));
    assert!(
        error.contains("field tokenizer.ggml.model: \"rwkv7\" is not supported; supported are gpt2 and llama"),
        "{error}"
    );
    let error = with(&|bytes| replace(bytes, b"tokenizer.ggml.scores", b"tokenizer.ggml.xcores"));
    assert!(error.contains("field tokenizer.ggml.merges: missing, and there are no scores either"), "{error}");
    let error = with(&|bytes| replace(bytes, b"tokenizer.ggml.tokens", b"tokenizer.ggml.xokens"));
    assert!(error.contains("field tokenizer.ggml.tokens: missing"), "{error}");
    let id = b"tokenizer.ggml.bos_token_id\x04\0\0\0\x01";
    let error = with(&|bytes| replace(bytes, id, b"tokenizer.ggml.bos_token_id\x04\0\0\0\xff\xff"));
    assert!(error.contains("field tokenizer.ggml.bos_token_id: 65535 is not an id; there are"), "{error}");
}
