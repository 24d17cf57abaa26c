//! The protocols of a server: JSON over HTTP in OpenAI's shapes, and the Open Inference Protocol v2 over gRPC.

pub mod headers;
pub mod inference;
pub mod observe;
pub mod openai;
