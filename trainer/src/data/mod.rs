//! Rows (`athanor-data`) to token ids and batches.

pub mod batches;
mod encoded;

pub use athanor_data::{Dataset, Parts};
pub use encoded::{Batch, Columns, Encoded, IGNORED, Part};
