//! The engine's tokenizers over those of the crate `models`.

use athanor_models::{
    DecoderTokenizer, Tokenizer,
    tokenizer::{
        chat::{Chat, Json},
        decoder::ConversationError,
        stream::TextStream,
    },
};
use athanor_serving::service::{ChatTokenize, ServiceError, StreamDecode, Tokenize, Vocabulary};
use serde_json::Value;

/// The tokenizer of an encoder.
pub struct TextTokenizer(pub Tokenizer);

impl Tokenize for TextTokenizer {
    fn encode(&self, texts: &[String], max_length: usize) -> Result<Vec<Vec<u32>>, String> {
        self.0.encode_batch(texts, max_length).map_err(|error| error.to_string())
    }
}

impl Vocabulary for TextTokenizer {
    fn tokens(&self, text: &str, with_special: bool) -> Result<Vec<u32>, String> {
        self.0.encode(text, with_special).map_err(|error| error.to_string())
    }

    fn text(&self, tokens: &[u32]) -> Result<String, String> {
        self.0.decode(tokens).map_err(|error| error.to_string())
    }

    fn name(&self, token: u32) -> Option<String> {
        self.0.has(token).then(|| self.0.token(token))
    }
}

/// The tokenizer of a language model.
pub struct ChatTokenizer(pub DecoderTokenizer);

impl Vocabulary for ChatTokenizer {
    fn tokens(&self, text: &str, with_special: bool) -> Result<Vec<u32>, String> {
        self.0.encode(text, with_special).map_err(|error| error.to_string())
    }

    fn text(&self, tokens: &[u32]) -> Result<String, String> {
        Ok(self.0.decode_all(tokens))
    }

    fn name(&self, token: u32) -> Option<String> {
        self.0.token(token)
    }
}

impl ChatTokenize for ChatTokenizer {
    fn render_chat(&self, messages: &[Value], tools: Option<&[Value]>) -> Result<Vec<u32>, ServiceError> {
        let json = |values: &[Value]| values.iter().map(Json::from_serialize).collect();
        let chat = Chat { messages: json(messages), tools: tools.map(json), ..Chat::default() };
        self.0.prompt(&chat).map_err(unrendered)
    }

    fn render_whole(&self, messages: &[Value]) -> Result<Vec<u32>, ServiceError> {
        let messages = messages.iter().map(Json::from_serialize).collect();
        self.0.rendered(&Chat { messages, ..Chat::default() }, false).map_err(unrendered)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.0.encode(text, true).map_err(|error| error.to_string())
    }

    fn stream(&self) -> Box<dyn StreamDecode> {
        Box::new(Stream(Some(self.0.stream())))
    }

    fn token_bytes(&self, token: u32) -> Vec<u8> {
        self.0.bytes().bytes(token).to_vec()
    }

    fn is_special(&self, token: u32) -> bool {
        self.0.bytes().is_special(token)
    }

    fn has_token(&self, text: &str) -> bool {
        self.0.has_token(text)
    }

    fn template(&self) -> String {
        self.0.template_source()
    }
}

fn unrendered(error: ConversationError) -> ServiceError {
    match error {
        ConversationError::NoTemplate | ConversationError::Chat(_) => ServiceError::Conversation(error.to_string()),
        ConversationError::Tokenizer(error) => ServiceError::Tokenizer(error.to_string()),
    }
}

/// A text stream, until it is finished.
struct Stream(Option<TextStream>);

impl StreamDecode for Stream {
    fn push(&mut self, token: u32) -> String {
        self.0.as_mut().map(|stream| stream.push(token)).unwrap_or_default()
    }

    fn finish(&mut self) -> String {
        self.0.take().map(TextStream::finish).unwrap_or_default()
    }
}
