//! Weights in files.

pub mod gguf;
