//! Where a decoder's weights come from: safetensors, in one file or in shards, or GGUF.

pub mod builder;
pub mod gguf;
pub mod sharded;
pub mod stored;

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use tch::{Device, Kind, Tensor};

use self::stored::{EachRow, StoredRow};
use crate::load::{LoadError, Weights};

/// Rows that are converted to FP32 at a time.
const ROWS: i64 = 256;

/// Tensors under Hugging Face's names, for several threads.
pub trait Source: Sync {
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
    fn take(&self, name: &str, shape: &[i64], kind: Option<Kind>) -> Result<Tensor, LoadError>;

    /// Bits of a number of a tensor that is stored in blocks of whole numbers. Absent: floating-point numbers.
    fn block_bits(&self, _name: &str) -> Option<u32> {
        None
    }

    /// Takes a matrix [outputs, inputs] out row by row, in any order. FP32 is made of a few rows at a time.
    ///
    /// # Errors
    /// See [`Self::take`]; an error of `each` is passed on.
    fn rows(&self, name: &str, shape: [i64; 2], each: EachRow<'_>) -> Result<(), LoadError> {
        let tensor = self.take(name, &shape, None)?;
        let mut numbers = vec![0.0; shape[1] as usize];
        for first in (0..shape[0]).step_by(ROWS as usize) {
            let count = ROWS.min(shape[0] - first);
            let part = tensor.f_narrow(0, first, count)?.f_to_kind(Kind::Float)?.f_contiguous()?;
            for row in 0..count {
                part.f_select(0, row)?.f_copy_data(&mut numbers, shape[1] as usize)?;
                each((first + row) as usize, StoredRow::Numbers(&numbers))?;
            }
        }
        Ok(())
    }
}

/// Tensors of safetensors files, each of which is taken once.
pub struct Tensors {
    file: PathBuf,
    weights: Mutex<Weights>,
}

impl From<Weights> for Tensors {
    fn from(weights: Weights) -> Self {
        Self { file: weights.file().to_owned(), weights: Mutex::new(weights) }
    }
}

impl Source for Tensors {
    fn file(&self) -> &Path {
        &self.file
    }

    fn contains(&self, name: &str) -> bool {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    fn take(&self, name: &str, shape: &[i64], kind: Option<Kind>) -> Result<Tensor, LoadError> {
        let tensor = self.weights.lock().unwrap_or_else(PoisonError::into_inner).take_stored(name, shape)?;
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

    fn take(&self, name: &str, shape: &[i64], kind: Option<Kind>) -> Result<Tensor, LoadError> {
        self.weight(name, shape)?.tensor(kind.unwrap_or(Kind::Float), Device::Cpu)
    }

    fn block_bits(&self, name: &str) -> Option<u32> {
        self.weights().flatten().find(|weight| weight.name == name)?.format().block_bits()
    }

    fn rows(&self, name: &str, shape: [i64; 2], each: EachRow<'_>) -> Result<(), LoadError> {
        self.weight(name, &shape)?.rows(each)
    }
}
