//! Bodies of requests as the OpenAPI document describes them. The routes read their fields one by one, for errors that
//! name a field; a test sends each field of these types to its route.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde_json::Value;

/// One text or several.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum Texts {
    One(String),
    Several(Vec<String>),
}

/// Texts, or token ids with the special tokens around them.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    SeveralTokens(Vec<Vec<u32>>),
}

/// A text, or parts that are texts.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum Content<P> {
    Text(String),
    Parts(Vec<P>),
}

/// A part of a chat message.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TextPart {
    Text { text: String },
}

/// A part of a response's input.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputPart {
    InputText { text: String },
    OutputText { text: String },
    Text { text: String },
}

/// Who says a message.
#[derive(JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    System,
    /// Read as `system`.
    Developer,
    User,
    Assistant,
    Tool,
}

/// A message of a conversation.
#[derive(JsonSchema)]
pub struct Message {
    pub role: Role,
    /// Required, except of an assistant that called tools.
    pub content: Option<Content<TextPart>>,
    pub name: Option<String>,
    pub tool_call_id: Option<String>,
    /// Calls of functions in an earlier answer.
    pub tool_calls: Option<Vec<BTreeMap<String, Value>>>,
    pub reasoning_content: Option<String>,
}

/// How tokens are chosen.
#[derive(JsonSchema)]
pub struct Sampling {
    /// 0 chooses the most probable token.
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: Option<f32>,
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f32>,
    /// 0 and -1: all tokens.
    #[schemars(range(min = -1))]
    pub top_k: Option<i64>,
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: Option<f32>,
    #[schemars(range(min = 0.0, max = 100.0))]
    pub repetition_penalty: Option<f32>,
    #[schemars(range(min = -2.0, max = 2.0))]
    pub presence_penalty: Option<f32>,
    #[schemars(range(min = -2.0, max = 2.0))]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits, by token id.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Absent: random.
    pub seed: Option<i64>,
    /// At most four strings, which end an answer and are not part of it.
    pub stop: Option<Texts>,
    /// Number of tokens before which an answer ends only at a stop string.
    pub min_tokens: Option<u64>,
    /// Whether an answer ends only at its limit of tokens or at a stop string.
    pub ignore_eos: Option<bool>,
    /// Whether the answer is sent as server-sent events.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    /// Has no effect.
    pub user: Option<Value>,
    /// Has no effect: nothing is stored.
    pub store: Option<Value>,
}

/// What a stream has besides the answers.
#[derive(JsonSchema)]
pub struct StreamOptions {
    /// Whether a stream of a chat or a completion ends with the usage.
    pub include_usage: Option<bool>,
    /// Has no effect.
    pub include_obfuscation: Option<bool>,
}

/// What an answer must be.
#[derive(JsonSchema)]
pub struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`
    pub r#type: String,
    /// Required by the type `json_schema`.
    pub json_schema: Option<NamedSchema>,
}

/// JSON that an answer must be.
#[derive(JsonSchema)]
pub struct NamedSchema {
    /// Has no effect.
    pub name: String,
    /// Has no effect.
    pub description: Option<String>,
    /// A JSON schema.
    pub schema: BTreeMap<String, Value>,
    /// Has no effect: the schema is always followed.
    pub strict: Option<bool>,
}

/// What the model may call.
#[derive(JsonSchema)]
pub struct Tool {
    /// `function`
    pub r#type: String,
    pub function: Function,
}

/// A function of the client.
#[derive(JsonSchema)]
pub struct Function {
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    pub description: Option<String>,
    /// A JSON schema of an object; absent: no parameters.
    pub parameters: Option<BTreeMap<String, Value>>,
    /// Has no effect: the schema is followed whenever a call is required.
    pub strict: Option<bool>,
}

/// Whether functions are called.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum ToolChoice {
    /// `auto`, `none` or `required`
    Mode(String),
    Function(NamedTool),
}

/// The function that is called.
#[derive(JsonSchema)]
pub struct NamedTool {
    /// `function`
    pub r#type: String,
    pub function: FunctionName,
}

#[derive(JsonSchema)]
pub struct FunctionName {
    pub name: String,
}

/// Messages of a conversation to answer.
#[derive(JsonSchema)]
pub struct ChatRequest {
    /// Absent: the model that is served.
    pub model: Option<String>,
    #[schemars(length(min = 1))]
    pub messages: Vec<Message>,
    /// Absent: what the prompt leaves of the context.
    #[schemars(range(min = 1))]
    pub max_completion_tokens: Option<u32>,
    /// The older name of `max_completion_tokens`.
    #[schemars(range(min = 1))]
    pub max_tokens: Option<u32>,
    /// Number of answers.
    #[schemars(range(min = 1))]
    pub n: Option<u32>,
    pub logprobs: Option<bool>,
    #[schemars(range(max = 20))]
    pub top_logprobs: Option<u32>,
    /// Absent: text.
    pub response_format: Option<ResponseFormat>,
    #[schemars(length(max = 128))]
    pub tools: Option<Vec<Tool>>,
    /// Absent: `auto`.
    pub tool_choice: Option<ToolChoice>,
    /// Whether an answer may have several calls; absent: true.
    pub parallel_tool_calls: Option<bool>,
    /// Has no effect.
    pub metadata: Option<Value>,
    #[serde(flatten)]
    pub sampling: Sampling,
}

/// Texts to continue.
#[derive(JsonSchema)]
pub struct CompletionRequest {
    /// Absent: the model that is served.
    pub model: Option<String>,
    pub prompt: Prompt,
    /// Absent: what the prompt leaves of the context. 0 requires `echo`.
    pub max_tokens: Option<u32>,
    /// Number of answers to each prompt.
    #[schemars(range(min = 1))]
    pub n: Option<u32>,
    /// Number of answers to generate for each prompt, of which the `n` with the highest mean log-probability are
    /// returned. Without streams.
    #[schemars(range(min = 1))]
    pub best_of: Option<u32>,
    /// Whether an answer begins with its prompt; with `logprobs` the prompt's log-probabilities are reported as well.
    pub echo: Option<bool>,
    /// Number of most probable tokens to report with each token.
    #[schemars(range(max = 20))]
    pub logprobs: Option<u32>,
    /// Has no effect.
    pub metadata: Option<Value>,
    #[serde(flatten)]
    pub sampling: Sampling,
}

/// A text of the user, or items of a conversation.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum ResponseInput {
    Text(String),
    Items(Vec<InputItem>),
}

/// A part of a conversation, as a request or an earlier response has it.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum InputItem {
    Message(MessageItem),
    FunctionCall(CallItem),
    FunctionCallOutput(ResultItem),
}

#[derive(JsonSchema)]
pub struct MessageItem {
    /// `message`
    pub r#type: Option<String>,
    /// `system`, `developer`, `user` or `assistant`
    pub role: String,
    pub content: Content<InputPart>,
    /// Has no effect.
    pub id: Option<Value>,
    /// Has no effect.
    pub status: Option<Value>,
}

/// A call of a function in an earlier answer.
#[derive(JsonSchema)]
pub struct CallItem {
    /// `function_call`
    pub r#type: String,
    pub call_id: String,
    pub name: String,
    /// JSON.
    pub arguments: String,
    pub id: Option<String>,
    pub status: Option<String>,
}

/// The result of a call.
#[derive(JsonSchema)]
pub struct ResultItem {
    /// `function_call_output`
    pub r#type: String,
    pub call_id: String,
    pub output: Content<InputPart>,
    pub id: Option<String>,
    pub status: Option<String>,
}

/// A function of the client.
#[derive(JsonSchema)]
pub struct FunctionTool {
    /// `function`
    pub r#type: String,
    #[serde(flatten)]
    pub function: Function,
}

/// Whether functions are called.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum FunctionChoice {
    /// `auto`, `none` or `required`
    Mode(String),
    Function(NamedFunction),
}

/// The function that is called.
#[derive(JsonSchema)]
pub struct NamedFunction {
    /// `function`
    pub r#type: String,
    pub name: String,
}

/// What an answer must be.
#[derive(JsonSchema)]
pub struct TextOptions {
    pub format: Option<TextFormat>,
    /// `medium`
    pub verbosity: Option<String>,
}

#[derive(JsonSchema)]
pub struct TextFormat {
    /// `text`, `json_object` or `json_schema`
    pub r#type: String,
    /// Has no effect. Required by the type `json_schema`.
    pub name: Option<String>,
    /// Has no effect.
    pub description: Option<String>,
    /// A JSON schema. Required by the type `json_schema`.
    pub schema: Option<BTreeMap<String, serde_json::Value>>,
    /// Has no effect: the schema is always followed.
    pub strict: Option<bool>,
}

/// A text or a conversation to answer. The response is not stored.
#[derive(JsonSchema)]
pub struct ResponseRequest {
    /// Absent: the model that is served.
    pub model: Option<String>,
    pub input: ResponseInput,
    /// The system's message, before the input.
    pub instructions: Option<String>,
    /// Absent: what the prompt leaves of the context.
    #[schemars(range(min = 1))]
    pub max_output_tokens: Option<u32>,
    /// `message.output_text.logprobs` reports log-probabilities.
    pub include: Option<Vec<String>>,
    #[schemars(range(max = 20))]
    pub top_logprobs: Option<u32>,
    /// `disabled`
    pub truncation: Option<String>,
    pub text: Option<TextOptions>,
    #[schemars(length(max = 128))]
    pub tools: Option<Vec<FunctionTool>>,
    pub tool_choice: Option<FunctionChoice>,
    /// Whether an answer may have more than one call; absent: true.
    pub parallel_tool_calls: Option<bool>,
    pub metadata: Option<BTreeMap<String, String>>,
    #[serde(flatten)]
    pub sampling: Sampling,
}

/// Texts to embed.
#[derive(JsonSchema)]
pub struct EmbeddingRequest {
    pub model: Option<String>,
    pub input: Prompt,
    pub encoding_format: Option<EncodingFormat>,
    /// The vectors are cut to so many numbers and scaled to length 1 again.
    #[schemars(range(min = 1))]
    pub dimensions: Option<u32>,
    /// Has no effect.
    pub user: Option<Value>,
}

/// How a vector is written.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EncodingFormat {
    Float,
    /// FP32, little-endian.
    Base64,
}

/// A document, as a text or an object with one.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum Document {
    Text(String),
    Object { text: String },
}

/// Documents to order by their similarity with a query.
#[derive(JsonSchema)]
pub struct RerankRequest {
    pub model: Option<String>,
    pub query: String,
    #[schemars(length(min = 1))]
    pub documents: Vec<Document>,
    /// Number of results; absent: all.
    #[schemars(range(min = 1))]
    pub top_n: Option<u32>,
    /// Whether results have their documents; absent: false.
    pub return_documents: Option<bool>,
}

/// One of `prompt` and `messages` is required.
#[derive(JsonSchema)]
pub struct TokenizeRequest {
    pub model: Option<String>,
    pub prompt: Option<String>,
    /// Whether special tokens are added around a prompt; absent: true.
    pub add_special_tokens: Option<bool>,
    /// Whether the tokens are returned as texts as well.
    pub return_token_strs: Option<bool>,
    /// A conversation, for a language model.
    pub messages: Option<Vec<Message>>,
    /// Whether a conversation ends where the assistant's answer begins; absent: true.
    pub add_generation_prompt: Option<bool>,
}

/// Tokens to turn into a text.
#[derive(JsonSchema)]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<u32>,
}
