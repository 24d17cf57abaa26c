//! BERT (Devlin et al. 2019, <https://arxiv.org/abs/1810.04805>) with a classification head. Names of modules are the keys of
//! Hugging Face's checkpoints, so nothing is renamed on the way in or out.
//!
//! Shapes: B texts, T tokens, C = hidden_size, H heads of D = C / H, L labels.

use std::path::Path;

use athanor_torch::PackedLinear;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};

use crate::{
    config::{Activation, BertConfig},
    load::{self, LoadError, Weights},
};

/// Collects the parameters in the order they are made, under their names.
struct Builder<'a> {
    weights: &'a mut Weights,
    /// In front of the encoder's names in the file: `bert.` or nothing.
    prefix: &'static str,
    initializer_range: f64,
    random: StdRng,
    device: Device,
    parameters: Vec<(String, Tensor)>,
}

impl Builder<'_> {
    /// An encoder's tensor from the file, known as `bert.{name}`.
    fn encoder(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        let tensor = self.weights.take(&format!("{}{name}", self.prefix), shape)?;
        Ok(self.add(format!("bert.{name}"), tensor))
    }

    fn add(&mut self, name: String, tensor: Tensor) -> Tensor {
        self.parameters.push((name, tensor.shallow_clone()));
        tensor
    }

    fn linear(&mut self, name: &str, inputs: i64, outputs: i64) -> Result<Linear, LoadError> {
        let weight = self.encoder(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = self.encoder(&format!("{name}.bias"), &[outputs])?;
        Ok(Linear { weight, bias, packed: None })
    }

    /// A layer that the file does not have: weights from normal(0, initializer_range), biases zero, as transformers does.
    fn fresh_linear(&mut self, name: &str, inputs: i64, outputs: i64) -> Linear {
        let count = (inputs * outputs) as usize;
        let values: Vec<f32> = (0..count)
            .map(|_| {
                // Box-Muller: two uniform numbers make one that is normal.
                let (radius, angle): (f64, f64) = (1.0 - self.random.random::<f64>(), self.random.random());
                ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos() * self.initializer_range) as f32
            })
            .collect();
        let weight = Tensor::from_slice(&values).view([outputs, inputs]).to_device(self.device);
        let bias = Tensor::zeros([outputs], (Kind::Float, self.device));
        Linear {
            weight: self.add(format!("{name}.weight"), weight),
            bias: self.add(format!("{name}.bias"), bias),
            packed: None,
        }
    }

    fn layer_norm(&mut self, name: &str, size: i64, eps: f64) -> Result<LayerNorm, LoadError> {
        let weight = self.encoder(&format!("{name}.weight"), &[size])?;
        let bias = self.encoder(&format!("{name}.bias"), &[size])?;
        Ok(LayerNorm { weight, bias, eps })
    }
}

struct Linear {
    weight: Tensor,
    bias: Tensor,
    /// Instead of the weight, for inference.
    packed: Option<PackedLinear>,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Tensor {
        match &self.packed {
            Some(packed) => computed(packed.forward(x, athanor_torch::Activation::Identity)),
            None => x.linear(&self.weight, Some(&self.bias)),
        }
    }

    fn forward_activated(&self, x: &Tensor, activation: Activation) -> Tensor {
        if let Some(packed) = &self.packed {
            return computed(packed.forward(x, activation.into()));
        }
        let inner = x.linear(&self.weight, Some(&self.bias));
        match activation {
            Activation::Gelu => inner.gelu("none"),
            Activation::GeluNew => inner.gelu("tanh"),
            Activation::Relu => inner.relu(),
        }
    }

    fn pack(&mut self) -> Result<(), LoadError> {
        self.packed = Some(PackedLinear::new(&self.weight, &self.bias)?);
        self.weight = Tensor::new();
        Ok(())
    }
}

/// Shapes are checked when a model is loaded, so that this fails as tch's own operators do: never, but for a lack of memory.
fn computed(result: Result<Tensor, athanor_torch::Error>) -> Tensor {
    result.expect("the layer has the model's shapes")
}

impl From<Activation> for athanor_torch::Activation {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Gelu => Self::Gelu,
            Activation::GeluNew => Self::GeluTanh,
            Activation::Relu => Self::Relu,
        }
    }
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}

struct Layer {
    /// For inference query, key and value are one product.
    packed_qkv: Option<PackedLinear>,
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

impl Layer {
    fn load(builder: &mut Builder, index: usize, config: &BertConfig) -> Result<Self, LoadError> {
        let (c, eps) = (config.hidden_size, config.layer_norm_eps);
        let name = |part: &str| format!("encoder.layer.{index}.{part}");
        Ok(Self {
            packed_qkv: None,
            query: builder.linear(&name("attention.self.query"), c, c)?,
            key: builder.linear(&name("attention.self.key"), c, c)?,
            value: builder.linear(&name("attention.self.value"), c, c)?,
            attention_output: builder.linear(&name("attention.output.dense"), c, c)?,
            attention_norm: builder.layer_norm(&name("attention.output.LayerNorm"), c, eps)?,
            intermediate: builder.linear(&name("intermediate.dense"), c, config.intermediate_size)?,
            output: builder.linear(&name("output.dense"), config.intermediate_size, c)?,
            output_norm: builder.layer_norm(&name("output.LayerNorm"), c, eps)?,
        })
    }

    /// `x` [B, T, C], `mask` [B, 1, 1, T], true where attention may look.
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>, config: &BertConfig, train: bool) -> Tensor {
        let (b, t, c) = x.size3().expect("hidden states have three dimensions");
        let heads = |projected: Tensor| {
            projected.view([b, t, config.num_attention_heads, c / config.num_attention_heads]).transpose(1, 2)
        };
        let [query, key, value] = match &self.packed_qkv {
            Some(packed) => {
                let all = computed(packed.forward(x, athanor_torch::Activation::Identity));
                [0, 1, 2].map(|part| heads(all.narrow(2, part * c, c)))
            }
            None => [&self.query, &self.key, &self.value].map(|linear| heads(linear.forward(x))),
        };
        let context =
            attention(&query, &key, &value, mask, if train { config.attention_probs_dropout_prob } else { 0.0 });
        let context = context.transpose(1, 2).reshape([b, t, c]);
        let dropout = if train { config.hidden_dropout_prob } else { 0.0 };
        let attended = drop(&self.attention_output.forward(&context), dropout);
        let x = self.attention_norm.forward(&(attended + x));
        let inner = self.intermediate.forward_activated(&x, config.hidden_act);
        let out = drop(&self.output.forward(&inner), dropout);
        self.output_norm.forward(&(out + x))
    }
}

/// softmax(Q K^T / sqrt(D)) V, all [B, H, T, D].
fn attention(query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>, dropout: f64) -> Tensor {
    if dropout == 0.0 {
        return Tensor::scaled_dot_product_attention(query, key, value, mask, 0.0, false, None, false);
    }
    // With dropout libtorch has no fused kernel for the CPU either, and draws the mask slowly.
    let scale = (query.size().last().copied().unwrap_or(1) as f64).sqrt().recip();
    let mut scores = (query * scale).matmul(&key.transpose(-2, -1));
    if let Some(mask) = mask {
        scores = scores.masked_fill(&mask.logical_not(), f64::NEG_INFINITY);
    }
    drop(&scores.softmax(-1, scores.kind()), dropout).matmul(value)
}

fn drop(x: &Tensor, p: f64) -> Tensor {
    computed(athanor_torch::dropout(x, p))
}

/// The encoder, with the pooler that the head reads.
struct Bert {
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    embeddings_norm: LayerNorm,
    layers: Vec<Layer>,
    pooler: Linear,
}

impl Bert {
    fn load(builder: &mut Builder, config: &BertConfig) -> Result<Self, LoadError> {
        let c = config.hidden_size;
        Ok(Self {
            word_embeddings: builder.encoder("embeddings.word_embeddings.weight", &[config.vocab_size, c])?,
            position_embeddings: builder
                .encoder("embeddings.position_embeddings.weight", &[config.max_position_embeddings, c])?,
            token_type_embeddings: builder
                .encoder("embeddings.token_type_embeddings.weight", &[config.type_vocab_size, c])?,
            embeddings_norm: builder.layer_norm("embeddings.LayerNorm", c, config.layer_norm_eps)?,
            layers: (0..config.num_hidden_layers).map(|i| Layer::load(builder, i, config)).collect::<Result<_, _>>()?,
            pooler: if builder.weights.contains(&format!("{}pooler.dense.weight", builder.prefix)) {
                builder.linear("pooler.dense", c, c)?
            } else {
                builder.fresh_linear("bert.pooler.dense", c, c)
            },
        })
    }

    /// `input_ids` [B, T] to hidden states [B, T, C].
    fn forward(&self, input_ids: &Tensor, mask: Option<&Tensor>, config: &BertConfig, train: bool) -> Tensor {
        let t = input_ids.size()[1];
        let words = Tensor::embedding(&self.word_embeddings, input_ids, config.pad_token_id, false, false);
        // One segment: every token has type 0.
        let embedded = words + self.position_embeddings.narrow(0, 0, t) + self.token_type_embeddings.get(0);
        let mut x =
            drop(&self.embeddings_norm.forward(&embedded), if train { config.hidden_dropout_prob } else { 0.0 });
        let mask = mask.map(|mask| mask.to_kind(Kind::Bool).unsqueeze(1).unsqueeze(1));
        for layer in &self.layers {
            x = layer.forward(&x, mask.as_ref(), config, train);
        }
        x
    }
}

/// BERT with one linear layer on the pooled encoder output, `BertForSequenceClassification` in transformers.
pub struct BertForSequenceClassification {
    config: BertConfig,
    bert: Bert,
    classifier: Linear,
    parameters: Vec<(String, Tensor)>,
    fresh: Vec<String>,
}

impl BertForSequenceClassification {
    /// Reads `config.json` and `model.safetensors` of a folder and gives the model a head for `labels`. The folder's own head is
    /// kept if it is for the same labels; a head or pooler that is missing starts from normal(0, initializer_range) by `seed`.
    pub fn load(folder: &Path, labels: &[String], seed: u64, device: Device) -> Result<Self, LoadError> {
        let config = BertConfig::load(folder)?;
        let keep_head = config.labels().as_deref() == Some(labels);
        let mut weights = Weights::load_folder(folder, device)?;
        let prefix = if weights.contains("bert.embeddings.word_embeddings.weight") { "bert." } else { "" };
        let config = config.with_labels(labels);
        let mut builder = Builder {
            prefix,
            initializer_range: config.initializer_range,
            random: StdRng::seed_from_u64(seed),
            device,
            parameters: Vec::new(),
            weights: &mut weights,
        };
        let pooler_in_file = builder.weights.contains(&format!("{prefix}pooler.dense.weight"));
        let bert = Bert::load(&mut builder, &config)?;
        let (c, l) = (config.hidden_size, labels.len() as i64);
        let classifier = if keep_head {
            let weight = builder.weights.take("classifier.weight", &[l, c])?;
            let bias = builder.weights.take("classifier.bias", &[l])?;
            Linear {
                weight: builder.add("classifier.weight".into(), weight),
                bias: builder.add("classifier.bias".into(), bias),
                packed: None,
            }
        } else {
            builder.fresh_linear("classifier", c, l)
        };
        let parameters = builder.parameters;
        let mut fresh = Vec::new();
        if !pooler_in_file {
            fresh.push("bert.pooler.dense".to_owned());
        }
        if !keep_head {
            fresh.push("classifier".to_owned());
        }
        Ok(Self { config, bert, classifier, parameters, fresh })
    }

    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// For settings that change no tensor, such as dropout.
    pub fn config_mut(&mut self) -> &mut BertConfig {
        &mut self.config
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

    /// Gives the encoder's matrices the layout in which the CPU multiplies fastest. From here on the model only infers: it has no
    /// parameters to train or to save. FP32 on the CPU.
    pub(crate) fn pack(&mut self) -> Result<(), LoadError> {
        for layer in &mut self.bert.layers {
            let qkv = [&mut layer.query, &mut layer.key, &mut layer.value];
            let weight = Tensor::cat(&qkv.each_ref().map(|linear| &linear.weight), 0);
            let bias = Tensor::cat(&qkv.each_ref().map(|linear| &linear.bias), 0);
            layer.packed_qkv = Some(PackedLinear::new(&weight, &bias)?);
            for linear in qkv {
                linear.weight = Tensor::new();
            }
            for linear in [&mut layer.attention_output, &mut layer.intermediate, &mut layer.output] {
                linear.pack()?;
            }
        }
        self.parameters.clear();
        Ok(())
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

    /// `input_ids` and `attention_mask` [B, T] (i64; no mask means that nothing is padding) to logits [B, L] (f32).
    pub fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>, train: bool) -> Tensor {
        let hidden = self.hidden_states(input_ids, attention_mask, train);
        let pooled = self.bert.pooler.forward(&hidden.select(1, 0)).tanh();
        let pooled = drop(&pooled, if train { self.config.head_dropout() } else { 0.0 });
        self.classifier.forward(&pooled).to_kind(Kind::Float)
    }

    /// Hidden states of the last layer, [B, T, C].
    pub fn hidden_states(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>, train: bool) -> Tensor {
        self.bert.forward(input_ids, attention_mask, &self.config, train)
    }

    /// Writes `config.json` and `model.safetensors` so that transformers loads them.
    pub fn save(&self, folder: &Path) -> Result<(), LoadError> {
        save(folder, &self.config, &self.parameters)
    }
}

/// Writes `config.json` and `model.safetensors` of a classifier with these parameters.
pub fn save(folder: &Path, config: &BertConfig, parameters: &[(String, Tensor)]) -> Result<(), LoadError> {
    let path = folder.join("config.json");
    let text = serde_json::to_vec_pretty(config)
        .map_err(|error| LoadError::File { file: path.clone(), message: error.to_string() })?;
    std::fs::write(&path, text).map_err(|error| LoadError::io(&path, error))?;
    load::save(&folder.join(load::WEIGHTS), parameters)
}
