//! Models on one device, with the names and files of Hugging Face: what [`BertForSequenceClassification::save`] writes,
//! `transformers.AutoModelForSequenceClassification` loads with equal outputs, and the other way round.
//!
//! - [`bert`]: the architecture; training and inference share it;
//! - [`load`]: safetensors files to tensors, with errors that name file and tensor;
//! - [`tokenizer`]: texts to padded id tensors;
//! - [`classifier`]: a trained classifier with its labels, for inference.
//!
//! Leaves out process groups, HTTP and downloads: parallelism and transport wrap these types from outside.

pub mod bert;
pub mod classifier;
pub mod config;
pub mod load;
pub mod tokenizer;

pub use bert::BertForSequenceClassification;
pub use classifier::Classifier;
pub use config::BertConfig;
pub use load::LoadError;
pub use tokenizer::Tokenizer;
