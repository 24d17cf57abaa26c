//! safetensors files to tensors, in one file or in shards. Every error names the file and the tensor. Pickled weights are refused.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    io::Read,
    path::{Path, PathBuf},
};

use safetensors::{
    Dtype, View,
    tensor::{Metadata, TensorInfo},
};
use tch::{Device, Kind, Tensor};

/// Name of the weights in a model folder.
pub const WEIGHTS: &str = "model.safetensors";
/// Largest header in bytes, the limit of the format's own library.
const LONGEST_HEADER: u64 = 100_000_000;

/// Why a model folder cannot be used. All of these are for the user to mend.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{file}: {message}", file = .file.display())]
    File { file: PathBuf, message: String },
    #[error("{file}: field {field}: {message}", file = .file.display())]
    Config { file: PathBuf, field: String, message: String },
    #[error("{file}: tensor {tensor}: {message}", file = .file.display())]
    Tensor { file: PathBuf, tensor: String, message: String },
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    #[error(transparent)]
    Shim(#[from] athanor_torch::Error),
    #[error(transparent)]
    Packed(#[from] athanor_cpu::Error),
}

impl LoadError {
    pub(crate) fn io(file: &Path, error: std::io::Error) -> Self {
        Self::File { file: file.to_owned(), message: error.to_string() }
    }
}

/// The tensors of one file by name.
pub struct Weights {
    file: PathBuf,
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// Reads a safetensors file, a tensor at a time: memory never holds it twice.
    pub fn load(path: &Path, device: Device) -> Result<Self, LoadError> {
        let mut file = std::fs::File::open(path).map_err(|error| LoadError::io(path, error))?;
        let length = file.metadata().map_err(|error| LoadError::io(path, error))?.len();
        let damaged = |error: String| LoadError::File {
            file: path.to_owned(),
            message: format!("not a whole safetensors file ({length} bytes): {error}"),
        };
        let header = header(&mut file, length).map_err(damaged)?;
        let (mut tensors, mut buffer) = (BTreeMap::new(), Vec::new());
        for name in header.offset_keys() {
            let Some(info) = header.info(&name) else { continue };
            buffer.resize(info.data_offsets.1 - info.data_offsets.0, 0);
            file.read_exact(&mut buffer).map_err(|error| damaged(error.to_string()))?;
            let tensor = tensor_of(info, &buffer).map_err(|message| LoadError::Tensor {
                file: path.to_owned(),
                tensor: name.clone(),
                message,
            })?;
            tensors.insert(name, tensor.f_to_device(device)?);
        }
        Ok(Self { file: path.to_owned(), tensors })
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor; absent if there is none of this name.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.tensors.get(name).map(Tensor::size)
    }

    /// Takes a tensor out as f32, checked for its shape.
    pub fn take(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        let refused = |message: String| LoadError::Tensor { file: self.file.clone(), tensor: name.to_owned(), message };
        let Some(tensor) = self.tensors.remove(name) else { return Err(refused("missing".into())) };
        if tensor.size() != shape {
            return Err(refused(format!("its shape is {:?}, config.json asks for {shape:?}", tensor.size())));
        }
        match tensor.kind() {
            Kind::Float => Ok(tensor),
            Kind::Half | Kind::BFloat16 | Kind::Double => Ok(tensor.f_to_kind(Kind::Float)?),
            Kind::Int8 => {
                // The notation of compressed-tensors: whole numbers, and a scale for each row.
                let Some(scale) = self.tensors.remove(&format!("{name}_scale")) else {
                    return Err(refused(format!("its dtype is Int8, but {name}_scale is missing")));
                };
                let rows = shape.first().copied().unwrap_or(1);
                if scale.numel() as i64 != rows {
                    return Err(refused(format!("{name}_scale has {} numbers, {rows} are needed", scale.numel())));
                }
                Ok(tensor.f_to_kind(Kind::Float)?.f_mul(&scale.f_to_kind(Kind::Float)?.f_view([rows, 1])?)?)
            }
            other => Err(refused(format!("its dtype is {other:?}, weights are floating-point numbers"))),
        }
    }

    /// Takes a floating-point tensor out in the kind that the file has, checked for its shape.
    pub fn take_stored(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        let refused = |message: String| LoadError::Tensor { file: self.file.clone(), tensor: name.to_owned(), message };
        let Some(tensor) = self.tensors.remove(name) else { return Err(refused("missing".into())) };
        if tensor.size() != shape {
            return Err(refused(format!("its shape is {:?}, config.json asks for {shape:?}", tensor.size())));
        }
        if !matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
            let message = format!("its dtype is {:?}, weights are floating-point numbers", tensor.kind());
            return Err(refused(message));
        }
        Ok(tensor)
    }

    /// Adds the tensors of another file; errors name this one from now on.
    pub(crate) fn add(&mut self, other: Self) {
        self.tensors.extend(other.tensors);
    }

    /// Weights without a tensor, whose errors name `file`.
    pub(crate) fn empty(file: &Path) -> Self {
        Self { file: file.to_owned(), tensors: BTreeMap::new() }
    }

    /// Takes a tensor out as it is.
    pub fn take_any(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.remove(name)
    }
}

/// The table in front of the tensors, whose data follow without gaps and end with the file.
fn header(file: &mut std::fs::File, length: u64) -> Result<Metadata, String> {
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(|error| error.to_string())?;
    let size = u64::from_le_bytes(size);
    if size > length.saturating_sub(8) || size > LONGEST_HEADER {
        return Err(format!("its header would have {size} bytes"));
    }
    let mut text = vec![0; size as usize];
    file.read_exact(&mut text).map_err(|error| error.to_string())?;
    let header: Metadata = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let needed = 8 + size + header.data_len() as u64;
    if needed == length { Ok(header) } else { Err(format!("its header speaks of {needed} bytes")) }
}

fn tensor_of(info: &TensorInfo, data: &[u8]) -> Result<Tensor, String> {
    let kind = match info.dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F64 => Kind::Double,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        Dtype::I8 => Kind::Int8,
        Dtype::BOOL => Kind::Bool,
        other => return Err(format!("dtype {other:?} is not supported")),
    };
    let shape: Vec<i64> = info.shape.iter().map(|&size| size as i64).collect();
    Tensor::f_from_data_size(data, &shape, kind).map_err(|error| error.to_string())
}

/// A tensor on the CPU whose bytes are copied when they are written.
struct Saved {
    dtype: Dtype,
    element_bytes: usize,
    shape: Vec<usize>,
    tensor: Tensor,
}

impl View for Saved {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut data = vec![0_u8; self.data_len()];
        self.tensor.copy_data_u8(&mut data, self.tensor.numel());
        data.into()
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.element_bytes
    }
}

/// Writes named tensors as one safetensors file, with the metadata transformers asks for. The file appears whole: it is
/// written beside its place and renamed.
pub fn save(path: &Path, named: &[(String, Tensor)]) -> Result<(), LoadError> {
    let failed = |message: String| LoadError::File { file: path.to_owned(), message };
    let mut views = Vec::with_capacity(named.len());
    for (name, tensor) in named {
        let tensor = tensor.detach().f_to_device(Device::Cpu)?.f_contiguous()?;
        let (dtype, element_bytes) = match tensor.kind() {
            Kind::Float => (Dtype::F32, 4),
            Kind::BFloat16 => (Dtype::BF16, 2),
            Kind::Int64 => (Dtype::I64, 8),
            Kind::Uint8 => (Dtype::U8, 1),
            Kind::Int8 => (Dtype::I8, 1),
            other => return Err(failed(format!("tensor {name} has dtype {other:?}, which is not written"))),
        };
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        views.push((name.as_str(), Saved { dtype, element_bytes, shape, tensor }));
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let part = path.with_extension("part");
    safetensors::serialize_to_file(views, Some(metadata), &part).map_err(|error| failed(error.to_string()))?;
    std::fs::rename(&part, path).map_err(|error| LoadError::io(path, error))
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn tensors_come_back_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(WEIGHTS);
        let tensor = Tensor::rand([3, 2], (Kind::Float, Device::Cpu));
        let named = vec![
            ("a.weight".to_owned(), tensor.shallow_clone()),
            ("ids".to_owned(), Tensor::from_slice(&[1_i64, 2])),
            ("step".to_owned(), Tensor::from(3_f32)),
        ];
        save(&path, &named).unwrap();
        let load = || crate::weights::sharded::load_folder(folder.path(), Device::Cpu);
        assert_eq!(load().unwrap().take("a.weight", &[3, 2]).unwrap(), tensor);
        assert_eq!(load().unwrap().take_any("step").unwrap(), Tensor::from(3_f32));

        for (name, shape, part) in [
            ("b.weight", vec![1], "tensor b.weight: missing"),
            ("a.weight", vec![2, 3], "its shape is [3, 2], config.json asks for [2, 3]"),
            ("ids", vec![2], "its dtype is Int64"),
        ] {
            let error = load().unwrap().take(name, &shape).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(WEIGHTS), "{error}");
        }

        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
        let error = load().err().unwrap().to_string();
        assert!(error.contains("not a whole safetensors file"), "{error}");

        let seed = rand::random();
        let mut random = StdRng::seed_from_u64(seed);
        for _ in 0..200 {
            let length = random.random_range(0..bytes.len());
            std::fs::write(&path, &bytes[..length]).unwrap();
            let error = load().err().unwrap_or_else(|| panic!("{length} bytes are read, seed {seed}")).to_string();
            assert!(error.contains("model.safetensors: not a whole safetensors file"), "{error}, seed {seed}");
        }

        std::fs::remove_file(&path).unwrap();
        std::fs::write(folder.path().join("pytorch_model.bin"), b"").unwrap();
        let error = load().err().unwrap().to_string();
        assert!(error.contains("pickled"), "{error}");
    }
}
