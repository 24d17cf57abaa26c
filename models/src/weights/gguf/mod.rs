//! Models in GGUF files, the format of llama.cpp: metadata, tokenizer and weights in one file.
//!
//! - [`Gguf`]: the file's header, and its tensors one at a time in FP32;
//! - [`metadata`]: the header's values;
//! - [`blocks`]: block formats to FP32, bit for bit as the Python package `gguf` computes them;
//! - [`names`]: names and row orders of llama.cpp to those of Hugging Face;
//! - [`config`]: the metadata as a `config.json`.
//!
//! Reads versions 2 and 3 (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), little-endian. Leaves out
//! writing, and files in several parts. Every length in a file is compared with the file's size before memory is taken
//! for it.

pub mod blocks;
pub mod config;
mod header;
pub mod metadata;
pub mod names;
mod tensors;

pub use blocks::BlockFormat;
pub use header::TensorInfo;
pub use metadata::{Metadata, Value};
pub use tensors::{Gguf, Weight};
