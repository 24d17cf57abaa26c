//! Where a decoder's weights come from: safetensors, in one file or in shards, or GGUF.

pub mod builder;
pub mod gguf;
pub mod sharded;

use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::load::{LoadError, Weights};

/// Tensors under Hugging Face's names.
pub trait Source {
    /// The file that errors about tensors name.
    fn file(&self) -> &Path;

    /// The file that errors about the configuration name.
    fn config_file(&self) -> PathBuf {
        self.file().with_file_name("config.json")
    }

    fn contains(&self, name: &str) -> bool;

    /// Takes a tensor out as `kind`, or in the kind that the file has (FP32 for the block formats of GGUF).
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or is not of floating-point numbers.
    fn take(&mut self, name: &str, shape: &[i64], kind: Option<Kind>) -> Result<Tensor, LoadError>;
}

impl Source for Weights {
    fn file(&self) -> &Path {
        self.file()
    }

    fn contains(&self, name: &str) -> bool {
        self.contains(name)
    }

    fn take(&mut self, name: &str, shape: &[i64], kind: Option<Kind>) -> Result<Tensor, LoadError> {
        let tensor = self.take_stored(name, shape)?;
        Ok(tensor.f_to_kind(kind.unwrap_or(tensor.kind()))?)
    }
}

impl Source for gguf::Gguf {
    fn file(&self) -> &Path {
        self.path()
    }

    fn config_file(&self) -> PathBuf {
        self.path().to_owned()
    }

    fn contains(&self, name: &str) -> bool {
        self.weights().flatten().any(|weight| weight.name == name)
    }

    fn take(&mut self, name: &str, shape: &[i64], kind: Option<Kind>) -> Result<Tensor, LoadError> {
        let refused =
            |message: String| LoadError::Tensor { file: self.path().to_owned(), tensor: name.to_owned(), message };
        for weight in self.weights() {
            let weight = weight?;
            if weight.name != name {
                continue;
            }
            if weight.shape() != shape {
                return Err(refused(format!("its shape is {:?}, the metadata asks for {shape:?}", weight.shape())));
            }
            return weight.tensor(kind.unwrap_or(Kind::Float), Device::Cpu);
        }
        Err(refused("missing".into()))
    }
}
