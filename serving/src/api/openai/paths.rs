//! Paths of the API, which the router passes on.

pub const CLASSIFY: &str = "/v1/classify";
pub const EMBEDDINGS: &str = "/v1/embeddings";
pub const RERANK: &str = "/v1/rerank";
pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETIONS: &str = "/v1/completions";
pub const RESPONSES: &str = "/v1/responses";
pub const TOKENIZE: &str = "/v1/tokenize";
pub const DETOKENIZE: &str = "/v1/detokenize";
pub const MODELS: &str = "/v1/models";
pub const MODEL: &str = "/v1/models/{model}";
pub const OPENAPI: &str = "/openapi.json";
