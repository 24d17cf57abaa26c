//! The tokenizer of a decoder with what belongs to it: the chat template and the tokens that end an answer.

use std::{
    collections::BTreeSet,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Zoned;
use serde_json::{Value, json};

use super::{
    chat::{self, Chat, ChatError, ChatTemplate},
    gguf,
    stream::{TextStream, TokenBytes},
};
use crate::{load::LoadError, weights::gguf::Gguf};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The model in a folder: the folder itself if it has a config.json, else the one GGUF file in it. A path of a GGUF file
/// is returned as it is.
///
/// # Errors
/// A folder with neither, or with several GGUF files.
pub fn locate(path: &Path) -> Result<PathBuf, LoadError> {
    if path.join("config.json").is_file() || is_gguf(path) {
        return Ok(path.to_owned());
    }
    let entries = std::fs::read_dir(path).map_err(|error| LoadError::io(path, error))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|file| is_gguf(file)).collect();
    let failed = |message: String| LoadError::File { file: path.to_owned(), message };
    match (files.pop(), files.len()) {
        (Some(file), 0) => Ok(file),
        (Some(_), others) => Err(failed(format!("{} GGUF files; one is expected", others + 1))),
        (None, _) => Err(failed("neither config.json nor a GGUF file".into())),
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "gguf")
}

/// The tokenizer, chat template and stop tokens of a decoder. Shared between threads by reference.
#[derive(Debug)]
pub struct DecoderTokenizer {
    inner: tokenizers::Tokenizer,
    bytes: Arc<TokenBytes>,
    template: Option<ChatTemplate>,
    /// Tokens that end an answer.
    stop_tokens: Vec<u32>,
    /// The files of a model folder, by name.
    files: Vec<(&'static str, Vec<u8>)>,
    /// config.json, or what a GGUF file has instead.
    config: Value,
}

/// A conversation as ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    pub ids: Vec<u32>,
    /// Places of the tokens that the assistant says, in order.
    pub assistant: Vec<Range<usize>>,
}

impl DecoderTokenizer {
    /// Reads the tokenizer of a GGUF file, or of a model folder: tokenizer.json, tokenizer_config.json with
    /// chat_template.jinja, and generation_config.json.
    ///
    /// # Errors
    /// See [`LoadError`]; each names the file.
    pub fn load(model: &Path) -> Result<Self, LoadError> {
        if is_gguf(model) { Self::from_gguf(model) } else { Self::from_folder(model) }
    }

    fn from_gguf(path: &Path) -> Result<Self, LoadError> {
        let file = Gguf::open(path)?;
        let (inner, tokenizer) = gguf::tokenizer(&file)?;
        let mut config = gguf::tokenizer_config(&file)?;
        let generation = file.generation_config()?;
        let template = config.as_object_mut().and_then(|fields| fields.remove("chat_template"));
        let mut files = vec![
            (TOKENIZER, tokenizer),
            (TOKENIZER_CONFIG, written(path, &config)?),
            (GENERATION_CONFIG, written(path, &generation)?),
        ];
        let source = template.as_ref().and_then(Value::as_str);
        files.extend(source.map(|source| (CHAT_TEMPLATE, source.as_bytes().to_vec())));
        let template = source
            .map(|source| ChatTemplate::new(source, chat::special_tokens(&config), clock()))
            .transpose()
            .map_err(|error| failed(path, error.to_string()))?;
        let model_config = file.config()?;
        Self::new(path, inner, template, files, model_config, &generation, &config)
    }

    fn from_folder(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join(TOKENIZER);
        let bytes = std::fs::read(&path).map_err(|error| LoadError::io(&path, error))?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| failed(&path, format!("not a tokenizer: {error}")))?;
        let mut files = vec![(TOKENIZER, bytes)];
        let mut values = Vec::new();
        for name in ["config.json", GENERATION_CONFIG, TOKENIZER_CONFIG] {
            let path = folder.join(name);
            let value = match std::fs::read(&path) {
                Ok(bytes) => {
                    let value =
                        serde_json::from_slice(&bytes).map_err(|error| failed(&path, format!("not JSON: {error}")))?;
                    if name != "config.json" {
                        files.push((name, bytes));
                    }
                    value
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Value::Null,
                Err(error) => return Err(LoadError::io(&path, error)),
            };
            values.push(value);
        }
        for name in [CHAT_TEMPLATE, "special_tokens_map.json"] {
            if let Ok(bytes) = std::fs::read(folder.join(name)) {
                files.push((name, bytes));
            }
        }
        let template = ChatTemplate::load(folder, clock())?;
        let config = values.remove(0);
        Self::new(&path, inner, template, files, config, &values[0], &values[1])
    }

    fn new(
        path: &Path,
        mut inner: tokenizers::Tokenizer,
        template: Option<ChatTemplate>,
        files: Vec<(&'static str, Vec<u8>)>,
        config: Value,
        generation: &Value,
        tokenizer_config: &Value,
    ) -> Result<Self, LoadError> {
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| failed(path, error.to_string()))?;
        let bytes = TokenBytes::new(&inner).map_err(|error| failed(path, error.to_string()))?;
        let mut stop_tokens: BTreeSet<u32> = [generation, &config].into_iter().flat_map(end_tokens).collect();
        let named = chat::special_tokens(tokenizer_config);
        stop_tokens.extend(named.get("eos_token").and_then(|token| inner.token_to_id(token)));
        let stop_tokens = stop_tokens.into_iter().collect();
        Ok(Self { inner, bytes: Arc::new(bytes), template, stop_tokens, files, config })
    }

    /// The ids of a text; with the tokens that the model wants around every text if `with_special` is set.
    ///
    /// # Errors
    /// A text that the tokenizer cannot read.
    pub fn encode(&self, text: &str, with_special: bool) -> Result<Vec<u32>, LoadError> {
        let encoding = self.inner.encode_fast(text, with_special).map_err(|error| unreadable(&error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a conversation up to the place where the assistant's next answer begins.
    ///
    /// # Errors
    /// [`ConversationError`].
    pub fn prompt(&self, chat: &Chat) -> Result<Vec<u32>, ConversationError> {
        self.rendered(chat, true)
    }

    /// The ids of a conversation. With `add_generation_prompt` they end where the assistant's next answer begins.
    ///
    /// # Errors
    /// [`ConversationError`].
    pub fn rendered(&self, chat: &Chat, add_generation_prompt: bool) -> Result<Vec<u32>, ConversationError> {
        let text = self.template()?.render(chat, add_generation_prompt)?;
        Ok(self.encode(&text, false)?)
    }

    /// The ids of a whole conversation, with the places of what the assistant says: its text and the token that ends
    /// its turn.
    ///
    /// # Errors
    /// [`ConversationError`].
    pub fn conversation(&self, chat: &Chat) -> Result<Conversation, ConversationError> {
        let rendered = self.template()?.assistant_spans(chat)?;
        let encoding = self.inner.encode(rendered.text, false).map_err(|error| unreadable(&error))?;
        let offsets = encoding.get_offsets();
        let place = |span: &Range<usize>| {
            let begin = offsets.partition_point(|(begin, _)| *begin < span.start);
            begin..offsets.partition_point(|(begin, _)| *begin < span.end).max(begin)
        };
        let assistant = rendered.assistant.iter().map(place).collect();
        Ok(Conversation { ids: encoding.get_ids().to_vec(), assistant })
    }

    /// Source of the chat template. Empty if the model has none.
    pub fn template_source(&self) -> String {
        self.template.as_ref().map(ChatTemplate::source).unwrap_or_default()
    }

    /// Whether the vocabulary has this token.
    pub fn has_token(&self, text: &str) -> bool {
        self.inner.token_to_id(text).is_some()
    }

    fn template(&self) -> Result<&ChatTemplate, ConversationError> {
        self.template.as_ref().ok_or(ConversationError::NoTemplate)
    }

    /// Text of ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// Text of ids, special tokens included.
    pub fn decode_all(&self, ids: &[u32]) -> String {
        let mut stream = TextStream::new(self.bytes.clone(), false);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// The token with an id, as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Text of ids as they come, without special tokens.
    pub fn stream(&self) -> TextStream {
        TextStream::new(self.bytes.clone(), true)
    }

    /// The bytes of each token.
    pub fn bytes(&self) -> &TokenBytes {
        &self.bytes
    }

    /// Tokens that end an answer, ascending: those of generation_config.json and config.json, and `eos_token` of the
    /// tokenizer.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// The token that ends a text.
    pub fn end_token(&self) -> Option<u32> {
        end_tokens(&self.config).next().or_else(|| self.stop_tokens.first().copied())
    }

    /// Tokens of the longest sequence by config.json; `None` if it does not say so.
    pub fn max_length(&self) -> Option<usize> {
        let length = |name: &str| self.config[name].as_u64();
        Some(length("max_position_embeddings").or_else(|| length("n_positions"))? as usize)
    }

    /// Writes tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja, as far as the model
    /// has them.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub fn save(&self, folder: &Path) -> Result<(), LoadError> {
        let mut files = self.files.clone();
        if files.iter().all(|(name, _)| *name != GENERATION_CONFIG) {
            let generation = json!({"eos_token_id": self.stop_tokens});
            files.push((GENERATION_CONFIG, written(folder, &generation)?));
        }
        for (name, bytes) in files {
            let path = folder.join(name);
            std::fs::write(&path, bytes).map_err(|error| LoadError::io(&path, error))?;
        }
        Ok(())
    }
}

/// Why a conversation has no ids.
#[derive(Debug, thiserror::Error)]
pub enum ConversationError {
    #[error("the model has no chat template")]
    NoTemplate,
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error(transparent)]
    Tokenizer(#[from] LoadError),
}

/// `eos_token_id` of a configuration: a number or several.
fn end_tokens(config: &Value) -> impl Iterator<Item = u32> + '_ {
    let field = &config["eos_token_id"];
    let several = field.as_array().into_iter().flatten();
    several.chain(std::iter::once(field)).filter_map(|id| u32::try_from(id.as_u64()?).ok())
}

/// What templates call the present time.
fn clock() -> chat::Clock {
    Arc::new(|| Zoned::now().datetime())
}

fn written(path: &Path, value: &Value) -> Result<Vec<u8>, LoadError> {
    serde_json::to_vec_pretty(value).map_err(|error| failed(path, error.to_string()))
}

fn failed(file: &Path, message: String) -> LoadError {
    LoadError::File { file: file.to_owned(), message }
}

fn unreadable(error: &tokenizers::Error) -> LoadError {
    failed(Path::new(TOKENIZER), format!("a text cannot be tokenized: {error}"))
}
