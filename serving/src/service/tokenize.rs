//! What a language model needs of its tokenizer.

use serde_json::Value;

use super::error::ServiceError;

/// A language model's tokenizer and chat template.
pub trait ChatTokenize: Send + Sync + 'static {
    /// Token ids of a conversation, up to the place where the assistant's answer begins. Each message is an object with
    /// `role` and `content`.
    ///
    /// # Errors
    /// [`ServiceError::Conversation`] if the model has no template or its template refuses the conversation.
    fn render_chat(&self, messages: &[Value], tools: Option<&[Value]>) -> Result<Vec<u32>, ServiceError>;

    /// Token ids of a text, with the special tokens that the model wants around it.
    fn encode(&self, text: &str) -> Result<Vec<u32>, String>;

    /// Token ids to text as they come, without special tokens.
    fn stream(&self) -> Box<dyn StreamDecode>;

    /// The bytes of a token, which may be a part of a character.
    fn token_bytes(&self, token: u32) -> Vec<u8>;
}

/// Text of one sequence of token ids.
pub trait StreamDecode: Send + Sync {
    /// The text that is complete with this token.
    fn push(&mut self, token: u32) -> String;

    /// The text of what is incomplete when no more tokens come.
    fn finish(&mut self) -> String;
}
