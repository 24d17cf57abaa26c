//! Models on one device, with the names and files of Hugging Face: what [`Model::save`] writes, transformers loads with equal
//! outputs, and the other way round.
//!
//! - [`families`]: one file a family; training and inference share them; [`registry`] lists the decoders;
//! - [`nn`]: layers that families share;
//! - [`causal`]: a decoder with its output head, adapters ([`lora`]) and cache ([`kv_cache`]);
//! - [`model`]: an encoder with the head of its task;
//! - [`load`]: safetensors files to tensors, with errors that name file and tensor;
//! - [`tokenizer`]: texts to padded id tensors;
//! - [`classifier`]: a trained classifier with its labels, for inference.
//!
//! Leaves out process groups, HTTP and downloads: parallelism and transport wrap these types from outside.

pub mod batch;
pub mod builder;
pub mod causal;
pub mod classifier;
pub mod config;
pub mod encoder;
pub mod families;
pub mod head;
pub mod heads;
pub mod kv_cache;
pub mod load;
pub mod lora;
pub mod model;
pub mod nn;
pub mod packed;
pub mod quantize;
pub mod registry;
pub mod tokenizer;
pub mod weights;

pub use batch::{Batch, CachedRow};
pub use builder::Initializer;
pub use causal::{CausalLanguageModel, CausalOptions};
pub use classifier::Classifier;
pub use config::EncoderConfig;
pub use kv_cache::KvCache;
pub use load::LoadError;
pub use lora::LoraOptions;
pub use model::{Model, Options, Shape, Task};
pub use nn::{embeddings::EmbeddingRows, packed::Packing};
pub use tokenizer::{Tokenizer, decoder::DecoderTokenizer};
