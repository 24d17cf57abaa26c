//! Bodies of answers as the OpenAPI document describes them. A test compares them with answers of the routes.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde_json::Value;

#[derive(JsonSchema)]
pub struct PromptTokensDetails {
    /// Tokens of the prompts that the prefix cache had.
    pub cached_tokens: u64,
}

#[derive(JsonSchema)]
pub struct GenerationUsage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptTokensDetails,
}

/// A token with its log-probability by the model's own distribution.
#[derive(JsonSchema)]
pub struct TokenLogprob {
    pub token: String,
    pub bytes: Vec<u8>,
    pub logprob: f32,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(JsonSchema)]
pub struct TopLogprob {
    pub token: String,
    pub bytes: Vec<u8>,
    pub logprob: f32,
}

#[derive(JsonSchema)]
pub struct ChatLogprobs {
    pub content: Vec<TokenLogprob>,
    pub refusal: Option<Value>,
}

#[derive(JsonSchema)]
pub struct ChatMessage {
    /// `assistant`
    pub role: String,
    /// Null if there are calls and no text.
    pub content: Option<String>,
    pub refusal: Option<String>,
    /// Absent if there are none.
    pub tool_calls: Option<Vec<ToolCall>>,
}

/// A call of a function.
#[derive(JsonSchema)]
pub struct ToolCall {
    pub id: String,
    /// `function`
    pub r#type: String,
    pub function: CalledFunction,
}

#[derive(JsonSchema)]
pub struct CalledFunction {
    pub name: String,
    /// JSON.
    pub arguments: String,
}

#[derive(JsonSchema)]
pub struct ChatChoice {
    pub index: u32,
    pub message: ChatMessage,
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`
    pub finish_reason: String,
}

#[derive(JsonSchema)]
pub struct ChatCompletion {
    pub id: String,
    /// `chat.completion`
    pub object: String,
    pub created: i64,
    pub model: String,
    /// Name of the revision.
    pub system_fingerprint: String,
    pub choices: Vec<ChatChoice>,
    pub usage: GenerationUsage,
}

/// Parallel lists. The first token of an echoed prompt has null.
#[derive(JsonSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Place of each token in the text, in characters.
    pub text_offset: Vec<u32>,
}

#[derive(JsonSchema)]
pub struct CompletionChoice {
    pub index: u32,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`
    pub finish_reason: String,
}

#[derive(JsonSchema)]
pub struct Completion {
    pub id: String,
    /// `text_completion`
    pub object: String,
    pub created: i64,
    pub model: String,
    /// Name of the revision.
    pub system_fingerprint: String,
    pub choices: Vec<CompletionChoice>,
    pub usage: GenerationUsage,
}

#[derive(JsonSchema)]
pub struct OutputText {
    /// `output_text`
    pub r#type: String,
    pub text: String,
    pub annotations: Vec<Value>,
    pub logprobs: Vec<TokenLogprob>,
}

#[derive(JsonSchema)]
pub struct OutputMessage {
    pub id: String,
    /// `message`
    pub r#type: String,
    /// `in_progress`, `completed` or `incomplete`
    pub status: String,
    /// `assistant`
    pub role: String,
    pub content: Vec<OutputText>,
}

/// A call of a function.
#[derive(JsonSchema)]
pub struct OutputCall {
    pub id: String,
    /// `function_call`
    pub r#type: String,
    /// `in_progress`, `completed` or `incomplete`
    pub status: String,
    /// What the result of the call refers to.
    pub call_id: String,
    pub name: String,
    /// JSON.
    pub arguments: String,
}

#[derive(JsonSchema)]
#[serde(untagged)]
pub enum OutputItem {
    Message(OutputMessage),
    FunctionCall(OutputCall),
}

#[derive(JsonSchema)]
pub struct OutputTokensDetails {
    pub reasoning_tokens: u64,
}

#[derive(JsonSchema)]
pub struct ResponseUsage {
    pub input_tokens: u64,
    pub input_tokens_details: PromptTokensDetails,
    pub output_tokens: u64,
    pub output_tokens_details: OutputTokensDetails,
    pub total_tokens: u64,
}

#[derive(JsonSchema)]
pub struct ResponseError {
    pub code: String,
    pub message: String,
}

#[derive(JsonSchema)]
pub struct IncompleteDetails {
    /// `max_output_tokens`
    pub reason: String,
}

/// A response: a message, or calls of functions. It is not stored.
#[derive(JsonSchema)]
pub struct ResponseObject {
    pub id: String,
    /// `response`
    pub object: String,
    pub created_at: i64,
    /// `in_progress`, `completed`, `incomplete` or `failed`
    pub status: String,
    pub background: bool,
    pub error: Option<ResponseError>,
    pub incomplete_details: Option<IncompleteDetails>,
    pub instructions: Option<String>,
    pub max_output_tokens: Option<u32>,
    pub metadata: BTreeMap<String, String>,
    pub model: String,
    pub output: Vec<OutputItem>,
    pub parallel_tool_calls: bool,
    pub previous_response_id: Option<String>,
    pub reasoning: BTreeMap<String, Option<String>>,
    pub store: bool,
    pub temperature: f32,
    pub text: BTreeMap<String, Value>,
    /// As the request has it.
    pub tool_choice: Value,
    pub tools: Vec<Value>,
    pub top_logprobs: u32,
    pub top_p: f32,
    pub truncation: String,
    /// Absent until the response has ended.
    pub usage: Option<ResponseUsage>,
}

/// Numbers, or FP32 in little-endian order as base64.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

#[derive(JsonSchema)]
pub struct Embedding {
    /// `embedding`
    pub object: String,
    pub index: u32,
    pub embedding: Vector,
}

#[derive(JsonSchema)]
pub struct InputUsage {
    pub prompt_tokens: u64,
    pub total_tokens: u64,
}

#[derive(JsonSchema)]
pub struct Embeddings {
    /// `list`
    pub object: String,
    pub data: Vec<Embedding>,
    pub model: String,
    pub usage: InputUsage,
}

#[derive(JsonSchema)]
pub struct RankedText {
    pub text: String,
}

#[derive(JsonSchema)]
pub struct RankedDocument {
    /// Place of the document in the request.
    pub index: u32,
    /// Cosine with the query.
    #[schemars(range(min = -1.0, max = 1.0))]
    pub relevance_score: f32,
    pub document: Option<RankedText>,
}

#[derive(JsonSchema)]
pub struct Ranking {
    pub id: String,
    pub model: String,
    /// The most similar document first.
    pub results: Vec<RankedDocument>,
    pub usage: InputUsage,
}

#[derive(JsonSchema)]
pub struct Tokens {
    pub count: u32,
    /// Largest number of tokens that the model reads, and writes, at a time.
    pub max_model_len: u32,
    pub tokens: Vec<u32>,
    pub token_strs: Option<Vec<String>>,
}

#[derive(JsonSchema)]
pub struct Detokenized {
    pub prompt: String,
}
