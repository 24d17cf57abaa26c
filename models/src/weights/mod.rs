//! Where a decoder's weights come from.

pub mod builder;
pub mod sharded;

use std::path::Path;

use tch::Tensor;

use crate::load::{LoadError, Weights};

/// Tensors under Hugging Face's names.
pub trait Source {
    /// The file that errors name.
    fn file(&self) -> &Path;

    fn contains(&self, name: &str) -> bool;

    /// Takes a tensor out, in the kind that the file has.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or is not of floating-point numbers.
    fn take(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError>;
}

impl Source for Weights {
    fn file(&self) -> &Path {
        self.file()
    }

    fn contains(&self, name: &str) -> bool {
        self.contains(name)
    }

    fn take(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        self.take_stored(name, shape)
    }
}
