//! A decoder of the llama family with packed weights.

use std::path::{Path, PathBuf};

use athanor_cpu::{Config, Decoder, Format, InstructionSet, Layer, Matrix};
use rayon::prelude::*;
use serde_json::Value;
use tch::{Device, Kind};

use crate::{
    families::llama::LlamaConfig,
    load::LoadError,
    nn::rotary,
    registry,
    weights::{Source, Tensors, gguf::Gguf, sharded, stored::StoredRow},
};

/// Bits of packed weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// BF16 for every matrix.
    Sixteen,
    /// Eight bits for every matrix.
    Eight,
    /// Four bits for the layers' matrices; embeddings and head have eight. A matrix that a GGUF file stores with more than
    /// four bits has eight, one that it stores with four keeps its numbers.
    Four,
}

/// How a decoder is packed.
#[derive(Clone, Debug)]
pub struct PackOptions {
    pub bits: Bits,
    /// Largest number of tokens of a sequence. Absent, or larger than the model's own: the model's own.
    pub max_length: Option<usize>,
    /// Memory for keys and values, in bytes.
    pub cache_memory: u64,
    /// Largest number of sequences at once.
    pub sequences: usize,
    pub threads: usize,
    pub instruction_set: InstructionSet,
}

/// Whether the model of a folder or a GGUF file can be packed: it is of the llama family.
///
/// # Errors
/// The configuration cannot be read.
pub fn is_packable(path: &Path) -> Result<bool, LoadError> {
    let config = if is_gguf(path) { Gguf::open(path)?.config()? } else { read_config(path)? };
    Ok(config["model_type"].as_str().is_some_and(registry::is_llama))
}

/// Reads a GGUF file or a model folder, and packs it.
///
/// # Errors
/// See [`LoadError`]; each names the file and the field or tensor.
pub fn load(path: &Path, options: &PackOptions) -> Result<Decoder, LoadError> {
    if is_gguf(path) {
        let gguf = Gguf::open(path)?;
        let config = gguf.config()?;
        return Packer { source: &gguf, bits: options.bits }.pack(&config, options);
    }
    let config = read_config(path)?;
    let weights = Tensors::from(sharded::load_folder(path, Device::Cpu)?);
    Packer { source: &weights, bits: options.bits }.pack(&config, options)
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "gguf")
}

fn read_config(folder: &Path) -> Result<Value, LoadError> {
    let path = folder.join("config.json");
    let bytes = std::fs::read(&path).map_err(|error| LoadError::io(&path, error))?;
    serde_json::from_slice(&bytes).map_err(|error| LoadError::Config {
        file: path,
        field: "(root)".into(),
        message: format!("not JSON: {error}"),
    })
}

/// A module whose weight is a part of a matrix, and its number of outputs.
struct Part {
    name: String,
    outputs: usize,
}

struct Packer<'a> {
    source: &'a dyn Source,
    bits: Bits,
}

impl Packer<'_> {
    fn pack(&self, config: &Value, options: &PackOptions) -> Result<Decoder, LoadError> {
        let wrong =
            |file: PathBuf, field: &str, message: String| LoadError::Config { file, field: field.into(), message };
        let file = self.source.config_file();
        let config: LlamaConfig =
            serde_json::from_value(config.clone()).map_err(|error| wrong(file.clone(), "(root)", error.to_string()))?;
        config.check().map_err(|(field, message)| wrong(file.clone(), field, message))?;
        let (theta, scaling) = config.rope().map_err(|(field, message)| wrong(file.clone(), field, message))?;
        let size = |value: i64| value as usize;
        let (hidden, vocabulary) = (size(config.hidden_size), size(config.vocab_size));
        let (heads, key_value_heads) = (size(config.num_attention_heads), size(config.key_value_heads()));
        let (head_dim, own) = (size(config.head_dim()), size(config.max_position_embeddings));
        let max_length = options.max_length.map_or(own, |wanted| wanted.min(own));
        let block_bytes = Decoder::block_bytes(config.num_hidden_layers, key_value_heads, head_dim) as u64;
        let affordable = usize::try_from(options.cache_memory / block_bytes).unwrap_or(usize::MAX);
        if affordable == 0 {
            let message = format!("{} bytes are less than a block's {block_bytes}", options.cache_memory);
            return Err(wrong(file, "kvCacheMemory", message));
        }
        // More than all sequences can fill would never be used.
        let blocks = affordable.min(max_length.div_ceil(Decoder::BLOCK).saturating_mul(options.sequences.max(1)));
        let (layers, embeddings, head) = self.matrices(&config, options.threads)?;
        let sizes = Config {
            hidden,
            intermediate: size(config.intermediate_size),
            heads,
            key_value_heads,
            head_dim,
            vocabulary,
            max_length,
            blocks,
            threads: options.threads,
            rms_norm_eps: config.rms_norm_eps as f32,
            frequencies: rotary::frequencies(theta, config.head_dim(), &scaling),
            norm: self.vector("model.norm.weight", hidden)?,
        };
        Ok(Decoder::new(options.instruction_set, sizes, layers, embeddings, head)?)
    }

    /// The layers, the embeddings, and the head unless it is the embeddings: on `threads` threads, a layer or table each.
    fn matrices(
        &self,
        config: &LlamaConfig,
        threads: usize,
    ) -> Result<(Vec<Layer>, Matrix, Option<Matrix>), LoadError> {
        let (hidden, vocabulary) = (config.hidden_size as usize, config.vocab_size as usize);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|_| "pack".into()).build();
        let pool = pool.map_err(|error| LoadError::io(self.source.file(), std::io::Error::other(error)))?;
        let table = |name: &str| self.table(name, vocabulary, hidden);
        let tables = || {
            let head = || (!config.tie_word_embeddings).then(|| table("lm_head.weight")).transpose();
            rayon::join(|| table("model.embed_tokens.weight"), head)
        };
        let layers = || {
            let each = (0..config.num_hidden_layers).into_par_iter().with_max_len(1);
            each.map(|index| self.layer(config, index)).collect::<Vec<_>>()
        };
        let ((embeddings, head), layers) = pool.install(|| rayon::join(tables, layers));
        // Of several errors always the same one is told.
        let (embeddings, head) = (embeddings?, head?);
        Ok((layers.into_iter().collect::<Result<_, _>>()?, embeddings, head))
    }

    fn layer(&self, config: &LlamaConfig, index: usize) -> Result<Layer, LoadError> {
        let size = |value: i64| value as usize;
        let (hidden, inner, d) = (size(config.hidden_size), size(config.intermediate_size), size(config.head_dim()));
        let (queries, keys) = (size(config.num_attention_heads) * d, size(config.key_value_heads()) * d);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let part = |part: &str, outputs: usize| Part { name: name(part), outputs };
        let qkv = [part("self_attn.q_proj", queries), part("self_attn.k_proj", keys), part("self_attn.v_proj", keys)];
        let output = [part("self_attn.o_proj", hidden)];
        let head_norms = match config.normalises_heads() {
            true => Some((
                self.vector(&name("self_attn.q_norm.weight"), d)?,
                self.vector(&name("self_attn.k_norm.weight"), d)?,
            )),
            false => None,
        };
        Ok(Layer {
            qkv: self.matrix(&qkv, hidden, config.attention_has_bias())?,
            output: self.matrix(&output, queries, config.output_has_bias())?,
            gate_up: self.gate_and_up(
                &part("mlp.gate_proj", inner),
                &part("mlp.up_proj", inner),
                hidden,
                config.mlp_bias,
            )?,
            down: self.matrix(&[part("mlp.down_proj", hidden)], inner, config.mlp_bias)?,
            input_norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            post_attention_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            head_norms,
            window: config.window(index).map(size),
        })
    }

    /// The parts' outputs one behind the other.
    fn matrix(&self, parts: &[Part], inputs: usize, bias: bool) -> Result<Matrix, LoadError> {
        let formats: Vec<(usize, Format)> =
            parts.iter().map(|part| (part.outputs, self.format(&format!("{}.weight", part.name)))).collect();
        let mut matrix = Matrix::zeros(&formats, inputs)?;
        let mut biases = Vec::new();
        let mut first = 0;
        for part in parts {
            self.fill(&mut matrix, &format!("{}.weight", part.name), part.outputs, |row| first + row)?;
            if bias {
                biases.extend(self.vector(&format!("{}.bias", part.name), part.outputs)?);
            }
            first += part.outputs;
        }
        if bias {
            matrix.set_bias(&biases);
        }
        Ok(matrix)
    }

    /// Tiles of 16 outputs of `gate` and `up` take turns.
    fn gate_and_up(&self, gate: &Part, up: &Part, inputs: usize, bias: bool) -> Result<Matrix, LoadError> {
        let parts = [gate, up];
        let formats = parts.map(|part| self.format(&format!("{}.weight", part.name)));
        let tiles = gate.outputs.div_ceil(16);
        let turns: Vec<(usize, Format)> = (0..tiles).flat_map(|_| formats.map(|format| (16, format))).collect();
        let mut matrix = Matrix::zeros(&turns, inputs)?;
        let mut biases = vec![0.0; tiles * 32];
        for (turn, part) in parts.into_iter().enumerate() {
            let place = |row: usize| row / 16 * 32 + turn * 16 + row % 16;
            self.fill(&mut matrix, &format!("{}.weight", part.name), part.outputs, place)?;
            if bias {
                let found = self.vector(&format!("{}.bias", part.name), part.outputs)?;
                found.into_iter().enumerate().for_each(|(row, value)| biases[place(row)] = value);
            }
        }
        if bias {
            matrix.set_bias(&biases);
        }
        Ok(matrix)
    }

    /// A matrix with a row for each token. It has eight bits where the layers have four: rounding it to four costs most.
    fn table(&self, name: &str, outputs: usize, inputs: usize) -> Result<Matrix, LoadError> {
        let format = if self.bits == Bits::Sixteen { Format::BF16 } else { Format::Int8 };
        let mut matrix = Matrix::zeros(&[(outputs, format)], inputs)?;
        self.fill(&mut matrix, name, outputs, |row| row)?;
        Ok(matrix)
    }

    fn fill(
        &self,
        matrix: &mut Matrix,
        name: &str,
        outputs: usize,
        place: impl Fn(usize) -> usize,
    ) -> Result<(), LoadError> {
        let (stored, file) = (self.stored(name), self.source.file().to_owned());
        let shape = [outputs as i64, matrix.inputs() as i64];
        self.source.rows(&stored, shape, &mut |row, weights| {
            let done = match weights {
                StoredRow::Numbers(numbers) => matrix.set_row(place(row), numbers),
                StoredRow::Groups(groups) => matrix.set_groups(place(row), groups),
            };
            done.map_err(|error| LoadError::Tensor {
                file: file.clone(),
                tensor: name.to_owned(),
                message: error.to_string(),
            })
        })
    }

    fn format(&self, name: &str) -> Format {
        match (self.bits, self.source.block_bits(&self.stored(name))) {
            (Bits::Sixteen, _) => Format::BF16,
            (Bits::Four, None | Some(4)) => Format::Int4,
            _ => Format::Int8,
        }
    }

    /// A vector in FP32.
    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, LoadError> {
        let tensor = self.source.take(&self.stored(name), &[length as i64], Some(Kind::Float))?;
        Ok(Vec::try_from(tensor)?)
    }

    /// Checkpoints of a bare backbone lack the first part of names.
    fn stored(&self, name: &str) -> String {
        let bare = name.split_once('.').map_or(name, |(_, rest)| rest);
        if !self.source.contains(name) && self.source.contains(bare) { bare.to_owned() } else { name.to_owned() }
    }
}
