//! Rows (`athanor-data`) to token ids and batches.

pub mod batches;
mod encoded;
mod tokenizer;
pub mod tokens;

pub use athanor_data::{Dataset, Parts};
pub use encoded::{Batch, Columns, Encoded, IGNORED, Part};
pub use tokenizer::TaskTokenizer;
