//! What models need of their tokenizers.

use serde_json::Value;

use super::error::ServiceError;

/// Texts to token ids and back, for every kind of model.
pub trait Vocabulary: Send + Sync + 'static {
    /// Token ids of a whole text; with the special tokens that the model wants around it if `with_special` is set.
    fn tokens(&self, text: &str, with_special: bool) -> Result<Vec<u32>, String>;

    /// Text of token ids, special tokens included.
    fn text(&self, tokens: &[u32]) -> Result<String, String>;

    /// A token as the vocabulary has it; `None` for an id without a token.
    fn name(&self, token: u32) -> Option<String>;
}

/// A language model's tokenizer and chat template.
pub trait ChatTokenize: Vocabulary {
    /// Token ids of a conversation, up to the place where the assistant's answer begins. Each message is an object with
    /// `role` and `content`. `tools` are the functions that may be called, as JSON schemas in OpenAI's shape.
    ///
    /// # Errors
    /// [`ServiceError::Conversation`] if the model has no template or its template refuses the conversation.
    fn render_chat(&self, messages: &[Value], tools: Option<&[Value]>) -> Result<Vec<u32>, ServiceError>;

    /// Token ids of a conversation that is complete: without the beginning of an answer.
    ///
    /// # Errors
    /// As of [`Self::render_chat`].
    fn render_whole(&self, messages: &[Value]) -> Result<Vec<u32>, ServiceError>;

    /// Token ids of a text, with the special tokens that the model wants around it.
    fn encode(&self, text: &str) -> Result<Vec<u32>, String>;

    /// Token ids to text as they come, without special tokens.
    fn stream(&self) -> Box<dyn StreamDecode>;

    /// The bytes of a token, which may be a part of a character. Empty for an id without a token.
    fn token_bytes(&self, token: u32) -> Vec<u8>;

    /// Whether a token stands for no text, such as `<|im_end|>`.
    fn is_special(&self, token: u32) -> bool;

    /// Whether the vocabulary has this token.
    fn has_token(&self, text: &str) -> bool;

    /// Source of the chat template. Empty if the model has none.
    fn template(&self) -> String;
}

/// Text of one sequence of token ids.
pub trait StreamDecode: Send + Sync {
    /// The text that is complete with this token.
    fn push(&mut self, token: u32) -> String;

    /// The text of what is incomplete when no more tokens come.
    fn finish(&mut self) -> String;
}
