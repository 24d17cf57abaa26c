//! An encoder with the head of its task.
//!
//! Shapes: B texts, T tokens, C = hidden_size, L labels, V tokens of the vocabulary.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use tch::{Device, Tensor};

use crate::{
    builder::{Builder, Initializer},
    config::{CLASSIFIER, EncoderConfig, HiddenHead, MASKED_LANGUAGE_MODEL, PLAIN},
    encoder::{Encoder, Keep},
    head::{MaskedLanguageModelHead, SequenceHead, mean_pooling},
    load::{self, LoadError, Weights},
    nn::{dense::Linear, embeddings::EmbeddingRows, encoder_layer::Layer, packed::Packing},
    quantize,
    weights::sharded,
};

/// What a model's head is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// One of these labels for each text.
    Classification(Vec<String>),
    /// One number for each text.
    Regression,
    /// The tokens that were masked.
    MaskedLanguageModel,
    /// One vector for each text, by mean pooling.
    Embedding,
}

/// How a model differs from the one in the folder.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Seed of layers that are in no file.
    pub seed: u64,
    /// Layers that a student keeps of the folder's, counted from 0, in this order. Absent: all.
    pub keep_layers: Option<Vec<usize>>,
    /// A student that takes only the vocabulary from the folder and begins at random.
    pub fresh: Option<Shape>,
    /// A hidden layer in the head.
    pub hidden_head: Option<HiddenHead>,
    /// Initializer of the head's weights.
    pub initializer: Initializer,
    /// Dropout before the head's layers.
    pub head_dropout: Option<f64>,
    /// Dropout of hidden states and of attention in the encoder.
    pub dropout: Option<f64>,
}

/// The size of a fresh encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub layers: usize,
    pub hidden_size: i64,
    pub heads: i64,
    pub intermediate_size: i64,
}

enum Head {
    Sequence(SequenceHead),
    MaskedLanguageModel(MaskedLanguageModelHead),
    Pooling,
}

/// An encoder with a head, for training and inference.
pub struct Model {
    config: EncoderConfig,
    task: Task,
    encoder: Encoder,
    head: Head,
    parameters: Vec<(String, Tensor)>,
    fresh: Vec<String>,
}

impl Model {
    /// Reads `config.json` and `model.safetensors` of a folder and gives the encoder the head of `task`. The folder's own head is
    /// kept if it is for the same labels; what is missing is drawn by `options.seed`.
    pub fn load(folder: &Path, task: Task, options: &Options, device: Device) -> Result<Self, LoadError> {
        let found = EncoderConfig::load(folder)?;
        let same_head = options.hidden_head.is_none_or(|head| found.athanor_head == Some(head));
        let keep_head = options.fresh.is_none()
            && same_head
            && match &task {
                Task::Classification(labels) => found.labels().as_deref() == Some(labels),
                Task::Regression => found.is_regression(),
                Task::MaskedLanguageModel => true,
                Task::Embedding => false,
            };
        let layers = kept_layers(folder, &found, options)?;
        let mut weights = if options.fresh.is_some() { None } else { Some(sharded::load_folder(folder, device)?) };
        let keep_head = keep_head
            && (task != Task::MaskedLanguageModel
                || weights.as_ref().is_some_and(|weights| weights.contains(found.model_type.masked_head.bias)));
        let mut config = with_options(found, options, layers.len());
        if !keep_head {
            config.athanor_head = options.hidden_head;
        }
        config.quantization_config = None;
        let config = match &task {
            Task::Classification(labels) => config.with_labels(labels),
            Task::Regression => config.with_regression(),
            Task::MaskedLanguageModel => config.with_architecture(MASKED_LANGUAGE_MODEL),
            Task::Embedding => config.with_architecture(PLAIN),
        };
        let prefix = config.model_type.prefix;
        let mut builder =
            Builder::new(weights.as_mut(), prefix, &layers, config.initializer_range, options.seed, device);
        let encoder = Encoder::load(&mut builder, &config)?;
        let outputs = match &task {
            Task::Classification(labels) => labels.len() as i64,
            _ => 1,
        };
        let head = match &task {
            Task::Classification(_) | Task::Regression => {
                Head::Sequence(SequenceHead::load(&mut builder, &config, outputs, keep_head, options.initializer)?)
            }
            Task::MaskedLanguageModel => {
                Head::MaskedLanguageModel(MaskedLanguageModelHead::load(&mut builder, &config, keep_head)?)
            }
            Task::Embedding => Head::Pooling,
        };
        let (parameters, fresh) = builder.finish();
        Ok(Self { config, task, encoder, head, parameters, fresh })
    }

    /// Reads a trained model with the head that the folder has.
    pub fn load_trained(folder: &Path, device: Device) -> Result<Self, LoadError> {
        let config = EncoderConfig::load(folder)?;
        let task = match config.labels() {
            Some(labels) => Task::Classification(labels),
            None if config.is_regression() => Task::Regression,
            None if config.architectures.iter().any(|name| name.ends_with(MASKED_LANGUAGE_MODEL)) => {
                Task::MaskedLanguageModel
            }
            None if config.has_sequence_head() => {
                return Err(LoadError::Config {
                    file: PathBuf::from(folder).join("config.json"),
                    field: "id2label".into(),
                    message: format!("missing, so the classes of this {CLASSIFIER} are not known"),
                });
            }
            None => Task::Embedding,
        };
        Self::load(folder, task, &Options::default(), device)
    }

    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    pub fn task(&self) -> &Task {
        &self.task
    }

    /// Every parameter under its name in the checkpoint, always in the same order, sharing memory with the model.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// Names of the layers that did not come from the folder.
    pub fn fresh_layers(&self) -> &[String] {
        &self.fresh
    }

    /// Marks all parameters as trainable.
    pub fn set_trainable(&mut self) {
        for (_, tensor) in &mut self.parameters {
            let _ = tensor.requires_grad_(true);
        }
    }

    /// The table of word embeddings, [V, C], sharing memory with the model.
    pub fn word_embeddings(&self) -> Tensor {
        self.encoder.word_embeddings().weight.shallow_clone()
    }

    /// Reads words from some rows of the table, until it gets `None`.
    pub fn set_word_rows(&mut self, rows: Option<EmbeddingRows>) {
        self.encoder.word_embeddings_mut().set_rows(rows);
    }

    /// Gives the encoder's matrices the layout in which the CPU multiplies fastest. Until [`Model::unpack`] the model only infers, and
    /// its parameters have to stay as they are. FP32 on the CPU.
    pub fn pack(&mut self, how: Packing) -> Result<(), LoadError> {
        self.encoder.pack(how, self.reads_first_token())
    }

    /// Undoes [`Model::pack`].
    pub fn unpack(&mut self) {
        self.encoder.layers_mut().iter_mut().for_each(Layer::unpack);
    }

    /// Packs for good: the model has no parameters to train or to save any more, and takes half of the memory.
    pub fn pack_for_good(&mut self, how: Packing) -> Result<(), LoadError> {
        self.pack(how)?;
        self.encoder.layers_mut().iter_mut().for_each(Layer::drop_weights);
        self.parameters.clear();
        Ok(())
    }

    /// The encoder, and the head over the first token; without one, texts have vectors (see [`Model::embedding`]).
    pub(crate) fn parts(&self) -> (&Encoder, Option<&SequenceHead>) {
        match &self.head {
            Head::Sequence(head) => (&self.encoder, Some(head)),
            Head::MaskedLanguageModel(_) | Head::Pooling => (&self.encoder, None),
        }
    }

    /// The encoder's matrices by name, sharing memory with the model.
    pub fn matrices(&self) -> Vec<(String, Tensor)> {
        self.encoder
            .linears()
            .map(|linear| (format!("{}.weight", linear.name), linear.weight.shallow_clone()))
            .collect()
    }

    /// The norm of each input of each of the encoder's matrices over some texts, by the matrix's name: [inputs]. `batches` are ids
    /// and masks [B, T].
    pub fn input_norms(&self, batches: impl Iterator<Item = (Tensor, Option<Tensor>)>) -> BTreeMap<String, Tensor> {
        self.encoder.linears().for_each(Linear::observe);
        for (ids, mask) in batches {
            let _ = tch::no_grad(|| self.last_hidden_state(&ids, mask.as_ref(), false));
        }
        let norms = self.encoder.linears().map(|linear| (format!("{}.weight", linear.name), linear.observed()));
        norms.filter_map(|(name, norm)| Some((name, norm?))).collect()
    }

    /// Overwrites the parameters with tensors of the same names and shapes.
    pub fn load_parameters(&mut self, weights: &mut Weights) -> Result<(), LoadError> {
        tch::no_grad(|| {
            for (name, tensor) in &mut self.parameters {
                let saved = weights.take(name, &tensor.size())?;
                tensor.f_copy_(&saved)?;
            }
            Ok(())
        })
    }

    /// `input_ids` and `attention_mask` [B, T] (i64; no mask means that nothing is padding) to hidden states [B, T, C]: what the
    /// first layer reads and each layer's output; without `every` the last alone.
    pub fn hidden_states(&self, ids: &Tensor, mask: Option<&Tensor>, train: bool, every: bool) -> Vec<Tensor> {
        self.encoder.forward(ids, mask, &self.config, train, if every { Keep::Every } else { Keep::Last })
    }

    /// The last layer's hidden states as far as the head reads them: [B, 1, C] for outputs of a text, else [B, T, C].
    pub fn head_states(&self, ids: &Tensor, mask: Option<&Tensor>, train: bool) -> Tensor {
        let keep = if self.reads_first_token() { Keep::FirstToken } else { Keep::Last };
        self.encoder.forward(ids, mask, &self.config, train, keep).pop().unwrap_or_default()
    }

    fn reads_first_token(&self) -> bool {
        matches!(self.head, Head::Sequence(_))
    }

    /// Hidden states of the last layer, [B, T, C].
    pub fn last_hidden_state(&self, ids: &Tensor, mask: Option<&Tensor>, train: bool) -> Tensor {
        self.hidden_states(ids, mask, train, false).pop().unwrap_or_default()
    }

    /// The last hidden states [B, T, C] (of which the first token's are read) to one value for each output, [B, L] (f32).
    ///
    /// # Panics
    /// If the task is not of texts: the caller chose it.
    pub fn outputs(&self, last_hidden_state: &Tensor, train: bool) -> Tensor {
        let Head::Sequence(head) = &self.head else { unreachable!("{:?} has no outputs for a text", self.task) };
        head.forward(last_hidden_state, if train { self.config.head_dropout() } else { 0.0 })
    }

    /// What the head's last layer reads, [B, units]: the features whose products with an error are that layer's gradient.
    ///
    /// # Panics
    /// If the task is not of texts: the caller chose it.
    pub fn last_features(&self, last_hidden_state: &Tensor) -> Tensor {
        let Head::Sequence(head) = &self.head else { unreachable!("{:?} has no outputs for a text", self.task) };
        head.last_features(last_hidden_state, 0.0)
    }

    /// Hidden states of single tokens [N, C] to logits over the vocabulary [N, V] (f32).
    ///
    /// # Panics
    /// If the task is another: the caller chose it.
    pub fn vocabulary_logits(&self, hidden: &Tensor) -> Tensor {
        let Head::MaskedLanguageModel(head) = &self.head else { unreachable!("{:?} predicts no tokens", self.task) };
        head.forward(hidden, &self.encoder.word_embeddings().weight)
    }

    /// One vector for each text, [B, C] (f32).
    pub fn embedding(&self, last_hidden_state: &Tensor, mask: Option<&Tensor>) -> Tensor {
        mean_pooling(last_hidden_state, mask)
    }

    /// Ids and mask [B, T] to outputs [B, L].
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>, train: bool) -> Tensor {
        self.outputs(&self.head_states(ids, mask, train), train)
    }

    /// Writes `config.json` and `model.safetensors` so that transformers loads them.
    pub fn save(&self, folder: &Path) -> Result<(), LoadError> {
        save(folder, &self.config, &self.parameters)
    }

    /// The same with the encoder's matrices and its word embeddings in eight bits, as compressed-tensors writes them.
    pub fn save_quantized(&self, folder: &Path, activations: bool) -> Result<(), LoadError> {
        let names = self.matrices().into_iter().map(|(name, _)| name);
        let chosen =
            names.chain([format!("{}embeddings.word_embeddings.weight", self.config.model_type.prefix)]).collect();
        let mut config = self.config.clone();
        config.quantization_config = Some(quantize::config(activations));
        save(folder, &config, &quantize::quantized(&self.parameters, &chosen))
    }
}

/// Writes `config.json` and `model.safetensors` of a model with these parameters.
///
/// # Errors
/// A folder that cannot be written to.
pub fn save(folder: &Path, config: &EncoderConfig, parameters: &[(String, Tensor)]) -> Result<(), LoadError> {
    let path = folder.join("config.json");
    let text = serde_json::to_vec_pretty(config)
        .map_err(|error| LoadError::File { file: path.clone(), message: error.to_string() })?;
    std::fs::write(&path, text).map_err(|error| LoadError::io(&path, error))?;
    load::save(&folder.join(load::WEIGHTS), parameters)
}

/// Which layer of the file each layer of the model is.
fn kept_layers(folder: &Path, found: &EncoderConfig, options: &Options) -> Result<Vec<usize>, LoadError> {
    if let Some(shape) = options.fresh {
        return Ok((0..shape.layers).collect());
    }
    let Some(kept) = &options.keep_layers else { return Ok((0..found.num_hidden_layers).collect()) };
    match kept.iter().find(|&&layer| layer >= found.num_hidden_layers) {
        Some(layer) => Err(LoadError::Config {
            file: folder.join("config.json"),
            field: "num_hidden_layers".into(),
            message: format!("the student keeps layer {layer}, but the model has {}", found.num_hidden_layers),
        }),
        None => Ok(kept.clone()),
    }
}

fn with_options(mut config: EncoderConfig, options: &Options, layers: usize) -> EncoderConfig {
    config.num_hidden_layers = layers;
    if let Some(shape) = options.fresh {
        config.hidden_size = shape.hidden_size;
        config.num_attention_heads = shape.heads;
        config.intermediate_size = shape.intermediate_size;
    }
    if let Some(dropout) = options.dropout {
        config.hidden_dropout_prob = dropout;
        config.attention_probs_dropout_prob = dropout;
    }
    if let Some(dropout) = options.head_dropout {
        config.classifier_dropout = Some(dropout);
    }
    config
}
