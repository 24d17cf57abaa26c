//! A GGUF file and its tensors.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use tch::{Device, Kind, Tensor};

use super::{
    BlockFormat, Metadata,
    header::{self, Header, TensorInfo},
    names::{self, ARCHITECTURES, Rows},
};
use crate::{
    LoadError,
    weights::stored::{EachRow, StoredRow},
};

/// Numbers that a thread converts at a time. Few, since a model may be packed on many threads.
const PIECE: usize = 1 << 17;

/// An open GGUF file. The header is in memory, the tensors are read when they are asked for.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
}

impl Gguf {
    /// Reads the header, and checks that the file holds every tensor that the header names.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let file = File::open(path).map_err(|error| LoadError::io(path, error))?;
        let size = file.metadata().map_err(|error| LoadError::io(path, error))?.len();
        let Header { metadata, tensors } = header::read(path, &file, size)?;
        Ok(Self { path: path.to_owned(), file, metadata, tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.iter().any(|tensor| tensor.name == name)
    }

    /// `general.architecture`, one of [`ARCHITECTURES`].
    pub fn architecture(&self) -> Result<&str, LoadError> {
        let key = "general.architecture";
        let found = self.metadata.string(key)?.ok_or_else(|| self.metadata.error(key, "missing"))?;
        if ARCHITECTURES.contains(&found) {
            return Ok(found);
        }
        let message = format!("{found:?} is not supported; supported are {}", ARCHITECTURES.join(", "));
        Err(self.metadata.error(key, message))
    }

    /// `attention.head_count`, or `attention.head_count_kv`, which is the former if it is absent. At least 1.
    pub(super) fn attention_heads(&self, which: &str) -> Result<u64, LoadError> {
        let architecture = self.architecture()?;
        let all = format!("{architecture}.attention.head_count");
        let key = format!("{architecture}.attention.{which}");
        let found = match self.metadata.integer(&key)? {
            Some(heads) => Some(heads),
            None => self.metadata.integer(&all)?,
        };
        match found {
            Some(heads @ 1..=65_536) => Ok(heads),
            Some(heads) => Err(self.metadata.error(&key, format!("{heads} heads are not possible"))),
            None => Err(self.metadata.error(&all, "missing")),
        }
    }

    pub(super) fn tensor_error(&self, tensor: &str, message: impl Into<String>) -> LoadError {
        LoadError::Tensor { file: self.path.clone(), tensor: tensor.to_owned(), message: message.into() }
    }

    /// The numbers of a tensor in the order of the file.
    pub fn read(&self, tensor: &TensorInfo) -> Result<Vec<f32>, LoadError> {
        let mut values = Vec::with_capacity(tensor.elements());
        self.pieces(tensor, |_, piece| {
            values.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(values)
    }

    /// The weights by the names of transformers, one at a time.
    ///
    /// # Errors
    /// Each item that the llama family does not have is an error that names it.
    pub fn weights(&self) -> impl Iterator<Item = Result<Weight<'_>, LoadError>> {
        self.tensors.iter().map(|info| {
            let unknown = || {
                let message = match info.name.as_str() {
                    "rope_freqs.weight" => "rotary frequencies of their own are not supported",
                    _ => "the llama family has no such tensor",
                };
                self.tensor_error(&info.name, message)
            };
            let name = names::hugging_face(&info.name).ok_or_else(unknown)?;
            let rows = self.rows(info)?;
            Ok(Weight { name, gguf: self, info, rows })
        })
    }

    /// How the rows of a tensor are ordered.
    fn rows(&self, info: &TensorInfo) -> Result<Rows, LoadError> {
        let Some(heads) = names::reordered_heads(self.architecture()?, &info.name) else {
            return Ok(Rows::AsHuggingFace);
        };
        let heads = self.attention_heads(heads)?;
        let rows = info.rows() as u64;
        if !rows.is_multiple_of(2 * heads) {
            return Err(self.tensor_error(&info.name, format!("{rows} rows are not {heads} heads of an even size")));
        }
        Ok(Rows::Interleaved { head: (rows / heads) as usize })
    }

    /// The weight that transformers calls `name`.
    ///
    /// # Errors
    /// It is missing or has another shape.
    pub fn weight(&self, name: &str, shape: &[i64]) -> Result<Weight<'_>, LoadError> {
        let refused = |message: String| LoadError::Tensor { file: self.path.clone(), tensor: name.to_owned(), message };
        for weight in self.weights() {
            let weight = weight?;
            if weight.name != name {
                continue;
            }
            if weight.shape() != shape {
                return Err(refused(format!("its shape is {:?}, the metadata asks for {shape:?}", weight.shape())));
            }
            return Ok(weight);
        }
        Err(refused("missing".into()))
    }

    /// Calls `each` with whole rows of `tensor`, about [`PIECE`] numbers at a time, and the index of the first of these
    /// rows.
    fn pieces(
        &self,
        tensor: &TensorInfo,
        mut each: impl FnMut(usize, &[f32]) -> Result<(), LoadError>,
    ) -> Result<(), LoadError> {
        let mut values = Vec::new();
        self.stored_pieces(tensor, |first, bytes| {
            values.clear();
            tensor.format.dequantize(bytes, &mut values);
            each(first, &values)
        })
    }

    /// [`Self::pieces`] as they are in the file.
    fn stored_pieces(
        &self,
        tensor: &TensorInfo,
        mut each: impl FnMut(usize, &[u8]) -> Result<(), LoadError>,
    ) -> Result<(), LoadError> {
        let (row, block) = (tensor.row(), tensor.format.block_elements());
        let step = ((PIECE / row).max(1) * row).next_multiple_of(block);
        let mut bytes = Vec::new();
        for begin in (0..tensor.elements()).step_by(step) {
            let count = step.min(tensor.elements() - begin);
            let offset = tensor.offset + (begin / block * tensor.format.block_bytes()) as u64;
            bytes.resize(count / block * tensor.format.block_bytes(), 0);
            self.file
                .read_exact_at(&mut bytes, offset)
                .map_err(|error| self.tensor_error(&tensor.name, format!("offset {offset}: {error}")))?;
            each(begin / row, &bytes)?;
        }
        Ok(())
    }
}

/// A weight of a model by its name in transformers. Its numbers are still in the file.
#[derive(Clone, Debug)]
pub struct Weight<'a> {
    pub name: String,
    gguf: &'a Gguf,
    info: &'a TensorInfo,
    rows: Rows,
}

impl Weight<'_> {
    /// Sizes as in transformers: `[outputs, inputs]` for a linear layer.
    pub fn shape(&self) -> &[i64] {
        &self.info.shape
    }

    /// The format in the file.
    pub fn format(&self) -> BlockFormat {
        self.info.format
    }

    /// The numbers in the order of transformers.
    pub fn read(&self) -> Result<Vec<f32>, LoadError> {
        let row = self.info.row();
        let mut values = vec![0.0; self.info.elements()];
        self.gguf.pieces(self.info, |first, piece| {
            for (index, numbers) in piece.chunks_exact(row).enumerate() {
                let begin = self.rows.target(first + index) * row;
                values[begin..begin + row].copy_from_slice(numbers);
            }
            Ok(())
        })?;
        Ok(values)
    }

    /// Calls `each` with the rows, numbered as in transformers: groups of four bits as they are, numbers otherwise.
    ///
    /// # Errors
    /// The file cannot be read, or `each` fails.
    pub fn rows(&self, each: EachRow<'_>) -> Result<(), LoadError> {
        let (row, format) = (self.info.row(), self.info.format);
        if format.block_bits() == Some(4) && row.is_multiple_of(format.block_elements()) {
            let mut groups = Vec::new();
            return self.gguf.stored_pieces(self.info, |first, bytes| {
                let row_bytes = row / format.block_elements() * format.block_bytes();
                for (index, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
                    groups.clear();
                    format.groups(bytes, &mut groups);
                    each(self.rows.target(first + index), StoredRow::Groups(&groups))?;
                }
                Ok(())
            });
        }
        self.gguf.pieces(self.info, |first, piece| {
            for (index, numbers) in piece.chunks_exact(row).enumerate() {
                each(self.rows.target(first + index), StoredRow::Numbers(numbers))?;
            }
            Ok(())
        })
    }

    /// The weight as a tensor of `kind`. No FP32 copy of all of it is made on the way.
    pub fn tensor(&self, kind: Kind, device: Device) -> Result<Tensor, LoadError> {
        let whole = Tensor::f_empty(self.shape(), (kind, Device::Cpu))?;
        let mut shape = self.shape().to_vec();
        let row = self.info.row();
        self.gguf.pieces(self.info, |first, piece| {
            let count = piece.len() / row;
            shape[0] = count as i64;
            let piece = Tensor::f_from_slice(piece)?.f_reshape(shape.as_slice())?;
            match self.rows {
                Rows::AsHuggingFace => whole.f_narrow(0, first as i64, count as i64)?.f_copy_(&piece)?,
                Rows::Interleaved { .. } => {
                    let rows: Vec<i64> = (first..first + count).map(|row| self.rows.target(row) as i64).collect();
                    let rows = Tensor::f_from_slice(&rows)?;
                    let _ = whole.shallow_clone().f_index_copy_(0, &rows, &piece.f_totype(kind)?)?;
                }
            }
            Ok(())
        })?;
        Ok(whole.f_to(device)?)
    }
}
