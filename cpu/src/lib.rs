//! Decoders of the llama family and encoders of BERT's kind on the CPU, for serving: weights of four or eight bits, BF16 or
//! FP32, attention over a paged cache, texts without padding, and a team of threads that computes a step together.
//!
//! Weights are packed in tiles of 16 outputs and groups of 32 inputs ([`Matrix`]). For weights of four and eight bits, inputs
//! of a product are rounded to eight bits by groups of 32, and products are sums of whole numbers (VNNI where the machine
//! has it). For weights of BF16, inputs are BF16 where the machine multiplies it, else FP32. Keys and values are BF16, and so
//! are low-rank adapters, of which each row of a step may have another one. A token's result does not depend on the other
//! tokens of its step, to the last bit.
//!
//! What this crate leaves out: files, names of tensors and tokenizers (crate `models`), and training (libtorch).

mod adapter;
mod decoder;
mod encoder;
mod ffi;
mod memory;
mod pack;

pub use self::{
    adapter::{Adapter, AdapterLayer, LowRank},
    decoder::{Config, Decoder, Layer, Row},
    encoder::{Activation, Dense, Encoder, EncoderConfig, EncoderLayer, Norm},
    ffi::{InstructionSet, release_free_memory, use_few_heaps},
    pack::{Format, Group, Matrix},
};

/// A decoder could not be built or could not compute.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("no memory for {0}")]
    Memory(&'static str),
    #[error("{0}")]
    Invalid(String),
}
