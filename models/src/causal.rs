//! A decoder with its output head: training, generation and export use the same type.
//!
//! Shapes: N tokens of all sequences of a batch, C = hidden size, V tokens of the vocabulary.

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::{
    batch::Batch,
    families::Backbone,
    heads::causal::{self, NextTokenLoss},
    kv_cache::{CacheShape, KvCache},
    load::{self, LoadError},
    lora::{self, LoraOptions, LowRank},
    nn::{
        linear::Projection,
        packed::{Packed, Packing},
    },
    registry,
    weights::{Source, Tensors, builder::Builder, gguf::Gguf, sharded},
};

/// Name of an output head of its own.
const HEAD: &str = "lm_head.weight";

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct CausalOptions {
    /// Kind of the parameters. Absent: as the file has them.
    pub kind: Option<Kind>,
    pub device: Device,
    /// Adds adapters, which are then all that trains.
    pub lora: Option<LoraOptions>,
}

impl Default for CausalOptions {
    fn default() -> Self {
        Self { kind: None, device: Device::Cpu, lora: None }
    }
}

/// A causal language model.
pub struct CausalLanguageModel {
    /// config.json, fields that are not read here included.
    config: Value,
    backbone: Box<dyn Backbone>,
    /// [V, C]; absent where the head is the table of token embeddings.
    head: Option<Tensor>,
    /// The head, for inference.
    packed_head: Option<Packed>,
    vocab_size: i64,
    max_length: usize,
    parameters: Vec<(String, Tensor)>,
    adapters: Vec<(String, Tensor)>,
    lora: Option<LoraOptions>,
}

impl CausalLanguageModel {
    /// Reads a GGUF file, or a model folder: config.json, and model.safetensors or its shards.
    ///
    /// # Errors
    /// See [`LoadError`]; each names the file and the field or tensor.
    pub fn load(folder: &Path, options: &CausalOptions) -> Result<Self, LoadError> {
        if folder.extension().is_some_and(|ending| ending == "gguf") {
            let gguf = Gguf::open(folder)?;
            return Self::from_source(gguf.config()?, &gguf, options);
        }
        let path = folder.join("config.json");
        let bytes = std::fs::read(&path).map_err(|error| LoadError::io(&path, error))?;
        let config = serde_json::from_slice(&bytes).map_err(|error| LoadError::Config {
            file: path.clone(),
            field: "(root)".into(),
            message: format!("not JSON: {error}"),
        })?;
        let weights = Tensors::from(sharded::load_folder(folder, options.device)?);
        Self::from_source(config, &weights, options)
    }

    /// Builds the model that `config` describes from any source of tensors.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn from_source(config: Value, source: &dyn Source, options: &CausalOptions) -> Result<Self, LoadError> {
        let mut builder = Builder::new(source, options.kind, options.device);
        let mut loaded = registry::load(&mut builder, &config)?;
        let head = match loaded.tied_head {
            true => None,
            false => Some(builder.tensor(HEAD, &[loaded.vocab_size, loaded.hidden_size])?),
        };
        let adapters = match &options.lora {
            None => Vec::new(),
            Some(lora) => lora::attach(loaded.backbone.projections_mut(), lora)
                .map_err(|message| builder.config_error("target_modules", message))?,
        };
        Ok(Self {
            config,
            backbone: loaded.backbone,
            head,
            packed_head: None,
            vocab_size: loaded.vocab_size,
            max_length: loaded.max_length,
            parameters: builder.finish(),
            adapters,
            lora: options.lora.clone(),
        })
    }

    pub fn config(&self) -> &Value {
        &self.config
    }

    pub fn vocab_size(&self) -> i64 {
        self.vocab_size
    }

    /// Tokens of the longest sequence.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    pub fn cache_shape(&self) -> CacheShape {
        self.backbone.cache_shape()
    }

    /// Every parameter of the base model under its name in the checkpoint, sharing memory with the model.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// The parameters that train: the adapters where there are some, else all.
    pub fn trainable(&self) -> &[(String, Tensor)] {
        if self.lora.is_some() { &self.adapters } else { &self.parameters }
    }

    /// Whether adapters are trained instead of the model's own weights.
    pub fn has_adapters(&self) -> bool {
        self.lora.is_some()
    }

    /// Marks the parameters that train.
    pub fn set_trainable(&mut self) {
        for (_, tensor) in self.trainable() {
            let _ = tensor.shallow_clone().requires_grad_(true);
        }
    }

    /// Hidden states behind the last normalisation, [N, C].
    pub fn forward(&self, batch: &Batch, cache: Option<&mut KvCache>, train: bool) -> Tensor {
        self.backbone.forward(batch, cache, train)
    }

    /// Hidden states [N, C] to logits [N, V] in FP32.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        match &self.packed_head {
            Some(head) => head.product(hidden),
            None => causal::logits(hidden, self.head()),
        }
    }

    /// Lays all matrices out as the CPU multiplies fastest, adapters merged: the model only infers from now on, and has
    /// no parameters to train or to save. FP32 on the CPU.
    ///
    /// # Errors
    /// libtorch has no memory for a copy of a matrix.
    pub fn pack_for_good(&mut self, how: Packing) -> Result<(), LoadError> {
        self.parameters.clear();
        self.adapters.clear();
        self.lora = None;
        for projection in self.backbone.projections_mut() {
            projection.pack_for_good(how)?;
        }
        let bias = Tensor::f_zeros([self.vocab_size], (Kind::Float, self.head().device()))?;
        self.packed_head = Some(Packed::new(&self.head().to_kind(Kind::Float), &bias, how)?);
        self.head = None;
        Ok(())
    }

    /// Cross entropy of `targets` [N] (ids; a negative one is left out) given the hidden states [N, C] that predict them.
    ///
    /// # Errors
    /// libtorch has no memory for `chunk` rows of logits.
    pub fn next_token_loss(
        &self,
        hidden: &Tensor,
        targets: &Tensor,
        chunk: i64,
    ) -> Result<NextTokenLoss, athanor_torch::Error> {
        causal::next_token_loss(hidden, self.head(), targets, chunk)
    }

    fn head(&self) -> &Tensor {
        self.head.as_ref().unwrap_or_else(|| self.backbone.embeddings())
    }

    /// Writes config.json and model.safetensors with the adapters merged, so that transformers loads the folder.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub fn save(&self, folder: &Path) -> Result<(), LoadError> {
        let path = folder.join("config.json");
        let mut config = self.config.clone();
        if let Some(fields) = config.as_object_mut() {
            let kind = self.backbone.embeddings().kind();
            fields.remove("torch_dtype");
            fields.insert("dtype".into(), if kind == Kind::BFloat16 { "bfloat16" } else { "float32" }.into());
        }
        let text = serde_json::to_vec_pretty(&config)
            .map_err(|error| LoadError::File { file: path.clone(), message: error.to_string() })?;
        std::fs::write(&path, text).map_err(|error| LoadError::io(&path, error))?;
        let projections = self.backbone.projections();
        let merged = self.parameters.iter().map(|(name, tensor)| {
            let adapted = projections.iter().find(|projection| {
                projection.adapter.is_some() && name.strip_suffix(".weight") == Some(&projection.name)
            });
            let tensor = adapted.map_or_else(|| tensor.shallow_clone(), |projection| projection.merged());
            (name.clone(), tensor)
        });
        load::save(&folder.join(load::WEIGHTS), &merged.collect::<Vec<_>>())
    }

    /// Writes the adapters alone, as PEFT reads them.
    ///
    /// # Errors
    /// The model has no adapters, or the folder cannot be written to.
    pub fn save_adapter(&self, folder: &Path) -> Result<(), LoadError> {
        let Some(options) = &self.lora else {
            return Err(LoadError::File { file: folder.to_owned(), message: "the model has no adapters".into() });
        };
        let transposed = self.backbone.projections().iter().any(|projection| projection.transposed);
        lora::save(folder, options, &self.adapters, transposed)
    }

    /// Adds an adapter for inference, which rows of a batch have by its number ([`Batch::with_adapters`]).
    ///
    /// # Errors
    /// A module that the model does not have, or whose shape is another one; nothing is added then.
    pub fn add_adapter(&mut self, id: u64, adapter: &[LowRank]) -> Result<(), String> {
        let (kind, device) = (self.backbone.embeddings().kind(), self.backbone.embeddings().device());
        let mut projections: BTreeMap<String, &mut Projection> = self
            .backbone
            .projections_mut()
            .into_iter()
            .map(|projection| (projection.name.clone(), projection))
            .collect();
        for LowRank { module, a, b, .. } in adapter {
            let Some(projection) = projections.get(module) else {
                return Err(format!("{module}: the model has no such linear layer"));
            };
            let (rank, inputs) = a.size2().map_err(|error| format!("{module}: {error}"))?;
            let expected = (vec![rank, projection.inputs()], vec![projection.outputs(), rank]);
            if (vec![rank, inputs], b.size()) != expected {
                let (found, (a, b)) = ((a.size(), b.size()), expected);
                return Err(format!(
                    "{module}: A and B are {:?} and {:?}; the model's are {a:?} and {b:?}",
                    found.0, found.1
                ));
            }
        }
        for LowRank { module, a, b, scale } in adapter {
            if let Some(projection) = projections.get_mut(module) {
                let placed = |tensor: &Tensor| tensor.to_kind(kind).to_device(device);
                projection.add_row_adapter(id, placed(a), placed(&(b * *scale)));
            }
        }
        Ok(())
    }

    /// Removes an adapter that [`Self::add_adapter`] added; an unknown one is ignored.
    pub fn remove_adapter(&mut self, id: u64) {
        self.backbone.projections_mut().into_iter().for_each(|projection| projection.remove_row_adapter(id));
    }

    /// Overwrites the adapters with those of a folder that PEFT or [`Self::save_adapter`] wrote.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn load_adapter(&mut self, folder: &Path) -> Result<(), LoadError> {
        lora::load_into(folder, &self.adapters)
    }
}
