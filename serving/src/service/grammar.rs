//! Grammars that answers must follow, compiled by llguidance (<https://github.com/guidance-ai/llguidance>): JSON of a
//! schema, and calls of functions.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use llguidance::earley::SlicedBiasComputer;
use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};
use tokio::{sync::Semaphore, time::timeout};

use super::{error::GrammarError, example::example, tokenize::ChatTokenize};
use crate::engine::generate::constraint::{Constraint, ConstraintError, Progress, TokenSet};

/// Most bytes of a grammar, schemas included.
const MOST_BYTES: usize = 64 << 10;
/// Longest time in which a grammar is compiled.
const COMPILING: Duration = Duration::from_secs(2);
/// Grammars that are compiled at a time: one that takes too long keeps its thread until llguidance gives up.
const AT_A_TIME: usize = 2;
/// Longest token that a grammar can use, in bytes. The longer ones are runs of one character.
const LONGEST_TOKEN: usize = 512;
/// White space between the parts of JSON. Without a bound a small model may write nothing else.
const WHITE_SPACE: &str = r"[ \t\r\n]{1,32}";

/// What an answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that this schema accepts.
    Json(Value),
    /// A text of a grammar in llguidance's variant of Lark.
    Lark(String),
}

/// The compiler for one vocabulary.
pub struct Grammars {
    tokenizer: Arc<dyn ChatTokenize>,
    /// Number of token ids.
    vocabulary: usize,
    stop_tokens: Arc<[u32]>,
    /// Made when it is first used, which takes up to a second for a large vocabulary.
    factory: Arc<OnceLock<Result<ParserFactory, String>>>,
    places: Arc<Semaphore>,
}

impl Grammars {
    pub fn new(tokenizer: Arc<dyn ChatTokenize>, vocabulary: usize, stop_tokens: Arc<[u32]>) -> Self {
        let places = Arc::new(Semaphore::new(AT_A_TIME));
        Self { tokenizer, vocabulary, stop_tokens, factory: Arc::default(), places }
    }

    /// Prepares the vocabulary, so that the first grammar need not wait for it.
    pub async fn prepare(&self) -> Result<(), GrammarError> {
        self.run(|_| Ok(())).await
    }

    /// The constraint of a grammar.
    pub async fn compile(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>, GrammarError> {
        let bytes = match grammar {
            Grammar::Json(schema) => schema.to_string().len(),
            Grammar::Lark(text) => text.len(),
        };
        if bytes > MOST_BYTES {
            return Err(GrammarError::TooLarge { bytes, limit: MOST_BYTES });
        }
        let example = match grammar {
            Grammar::Json(schema) => example(schema),
            // The functions that may be called are in the prompt.
            Grammar::Lark(_) => String::new(),
        };
        let tokenizer = self.tokenizer.clone();
        let grammar = match grammar.clone() {
            Grammar::Json(schema) => TopLevelGrammar::from_json_schema(bounded(schema)),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text),
        };
        let compile = move |factory: &ParserFactory| -> Result<Box<dyn Constraint>, GrammarError> {
            let parser = factory.create_parser(grammar).map_err(|error| GrammarError::Invalid(message(&error)))?;
            let example = tokenizer.encode(&example).unwrap_or_default().into();
            Ok(Box::new(Following { matcher: Matcher::new(Ok(parser)), example, tokenizer: tokenizer.clone() }))
        };
        timeout(COMPILING, self.run(compile))
            .await
            .map_err(|_| GrammarError::TooSlow { seconds: COMPILING.as_secs() })?
    }

    /// Runs on a thread that may block, at most [`AT_A_TIME`] at once.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ParserFactory) -> Result<T, GrammarError> + Send + 'static,
    ) -> Result<T, GrammarError> {
        let failed = |error: &dyn std::fmt::Display| GrammarError::Invalid(error.to_string());
        let place = self.places.clone().acquire_owned().await.map_err(|error| failed(&error))?;
        let (factory, tokenizer) = (self.factory.clone(), self.tokenizer.clone());
        let (vocabulary, stop_tokens) = (self.vocabulary, self.stop_tokens.clone());
        let working = tokio::task::spawn_blocking(move || {
            // Kept until the end, even if nobody waits for it any more.
            let _place = place;
            let factory = factory.get_or_init(|| make_factory(&*tokenizer, vocabulary, &stop_tokens));
            work(factory.as_ref().map_err(|error| GrammarError::Invalid(error.clone()))?)
        });
        working.await.map_err(|error| failed(&error))?
    }
}

fn make_factory(tokenizer: &dyn ChatTokenize, vocabulary: usize, stop_tokens: &[u32]) -> Result<ParserFactory, String> {
    let word = |token: u32| {
        let mut bytes = tokenizer.token_bytes(token);
        if bytes.len() > LONGEST_TOKEN {
            return Vec::new();
        }
        if !bytes.is_empty() && (tokenizer.is_special(token) || stop_tokens.contains(&token)) {
            // No text has this byte, so that a text never contains the token.
            bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
        bytes
    };
    let size = u32::try_from(vocabulary).map_err(|error| error.to_string())?;
    let words: Vec<Vec<u8>> = (0..size).map(word).collect();
    let stop_tokens: Vec<u32> = stop_tokens.iter().copied().filter(|token| *token < size).collect();
    let first = stop_tokens.first().copied().unwrap_or(INVALID_TOKEN);
    let mut trie = TokTrie::from(&TokRxInfo::new(size, first), &words);
    if !stop_tokens.is_empty() {
        trie = trie.with_eos_tokens(&stop_tokens);
    }
    // The model chooses how a text is cut into tokens: no token is forced, and no tokenizer is needed.
    let environment: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::general_slices();
    let mut factory =
        ParserFactory::new(&environment, InferenceCapabilities::default(), &slices).map_err(|error| message(&error))?;
    factory.quiet();
    let limits = factory.limits_mut();
    // One or two kilobytes each.
    limits.max_lexer_states = 20_000;
    limits.max_grammar_size = 100_000;
    limits.verbose_errors = false;
    Ok(factory)
}

/// A schema with bounded white space.
pub(super) fn bounded(mut schema: Value) -> Value {
    if let Value::Object(fields) = &mut schema {
        fields.insert("x-guidance".into(), json!({"whitespace_pattern": WHITE_SPACE}));
    }
    schema
}

/// The message without the compiler's state and backtraces, which follow in marks of their own.
fn message(error: &dyn std::fmt::Display) -> String {
    let text = error.to_string();
    let end = ["\n<state>", "\n<backtrace>", "\n<non-verbose/>", "\n<grammar>"]
        .iter()
        .filter_map(|mark| text.find(mark))
        .min();
    text[..end.unwrap_or(text.len())].trim_end().to_owned()
}

/// An answer that follows a grammar.
struct Following {
    matcher: Matcher,
    example: Arc<[u32]>,
    tokenizer: Arc<dyn ChatTokenize>,
}

impl Constraint for Following {
    fn mask(&mut self) -> Result<TokenSet, ConstraintError> {
        let mask = self.matcher.compute_mask().map_err(|error| ConstraintError(message(&error)))?;
        Ok(TokenSet::from_words(mask.as_slice().to_vec()))
    }

    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintError> {
        self.matcher.consume_token(token).map_err(|error| ConstraintError(message(&error)))?;
        Ok(if self.matcher.is_stopped() { Progress::Complete } else { Progress::Continues })
    }

    fn example(&self) -> Arc<[u32]> {
        self.example.clone()
    }

    /// The bytes are forced in a copy: in the matcher itself they would count as read.
    fn forced(&self) -> Vec<u32> {
        let bytes = self.matcher.clone().compute_ff_bytes();
        // A mark of a special token is no text, and part of a character has no tokens.
        let end = std::str::from_utf8(&bytes).map_or_else(|error| error.valid_up_to(), str::len);
        match std::str::from_utf8(&bytes[..end]) {
            Ok(text) if !text.is_empty() => self.tokenizer.tokens(text, false).unwrap_or_default(),
            _ => Vec::new(),
        }
    }

    fn fork(&self) -> Box<dyn Constraint> {
        let (example, tokenizer) = (self.example.clone(), self.tokenizer.clone());
        Box::new(Self { matcher: self.matcher.deep_clone(), example, tokenizer })
    }
}

#[cfg(test)]
#[path = "grammar_tests.rs"]
mod tests;
