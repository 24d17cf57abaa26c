//! Llama 2 and 3 (Touvron et al. 2023, <https://arxiv.org/abs/2307.09288>), Mistral (<https://arxiv.org/abs/2310.06825>), Qwen 2, 2.5
//! and 3 (<https://arxiv.org/abs/2407.10671>) and SmolLM. They differ in fields of the configuration. Names of modules are the keys
//! of Hugging Face's checkpoints.
//!
//! Shapes: N tokens of all sequences, C = hidden_size, H heads and K key and value heads of D = head_dim.

use serde::Deserialize;
use tch::Tensor;

use super::Backbone;
use crate::{
    batch::Batch,
    kv_cache::{CacheShape, KvCache},
    load::LoadError,
    nn::{
        attention::Attention,
        linear::Projection,
        norm::RmsNorm,
        rotary::{RopeScaling, Rotary, rotate},
    },
    weights::builder::Builder,
};

/// Fields of `config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct LlamaConfig {
    pub model_type: String,
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    /// Absent: as many as query heads.
    pub num_key_value_heads: Option<i64>,
    /// Absent: `hidden_size / num_attention_heads`.
    pub head_dim: Option<i64>,
    pub max_position_embeddings: i64,
    #[serde(default = "rms_norm_eps")]
    pub rms_norm_eps: f64,
    pub rope_theta: Option<f64>,
    pub rope_scaling: Option<serde_json::Value>,
    /// transformers 5 writes theta and scaling here.
    pub rope_parameters: Option<serde_json::Value>,
    #[serde(default = "silu")]
    pub hidden_act: String,
    /// Biases of query, key, value and output projection. Absent: Qwen 2 has the first three, the others have none.
    pub attention_bias: Option<bool>,
    #[serde(default)]
    pub mlp_bias: bool,
    /// Absent: Llama's and Mistral's head is a matrix of its own.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    pub sliding_window: Option<i64>,
    /// Qwen: whether `sliding_window` is in force.
    pub use_sliding_window: Option<bool>,
    /// Qwen: layers from this one on have the window.
    pub max_window_layers: Option<usize>,
    #[serde(default)]
    pub attention_dropout: f64,
}

fn rms_norm_eps() -> f64 {
    1e-6
}

fn silu() -> String {
    "silu".into()
}

impl LlamaConfig {
    pub fn head_dim(&self) -> i64 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    pub fn key_value_heads(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Names the field that no model can have.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.key_value_heads()),
            ("max_position_embeddings", self.max_position_embeddings),
            ("num_hidden_layers", self.num_hidden_layers as i64),
        ] {
            if value < 1 {
                return Err((name, format!("{value} is too small")));
            }
        }
        if self.num_attention_heads % self.key_value_heads() != 0 {
            let message = format!("{} does not divide num_attention_heads", self.key_value_heads());
            return Err(("num_key_value_heads", message));
        }
        if self.head_dim() < 2 || self.head_dim() % 2 != 0 {
            return Err(("head_dim", format!("{} is not a positive even number", self.head_dim())));
        }
        if self.hidden_act != "silu" {
            return Err(("hidden_act", format!("{:?} is not supported, \"silu\" is", self.hidden_act)));
        }
        if !(0.0..1.0).contains(&self.attention_dropout) {
            return Err(("attention_dropout", format!("{} is not in [0, 1)", self.attention_dropout)));
        }
        self.rope().map(|_| ())
    }

    /// Theta and scaling of the rotary positions.
    pub fn rope(&self) -> Result<(f64, RopeScaling), (&'static str, String)> {
        let object = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref()).filter(|value| !value.is_null());
        let theta = object.and_then(|object| object["rope_theta"].as_f64()).or(self.rope_theta).unwrap_or(10_000.0);
        let Some(object) = object else { return Ok((theta, RopeScaling::Default)) };
        let mut object = object.clone();
        if let Some(fields) = object.as_object_mut() {
            // Older files call the field "type".
            if let Some(old) = fields.remove("type") {
                fields.entry("rope_type").or_insert(old);
            }
            fields.entry("rope_type").or_insert("default".into());
        }
        match serde_json::from_value(object.clone()) {
            Ok(scaling) => Ok((theta, scaling)),
            Err(error) => Err(("rope_scaling", format!("{}: {error}", object["rope_type"]))),
        }
    }

    /// Whether the projections to queries, keys and values have a bias.
    pub fn attention_has_bias(&self) -> bool {
        self.attention_bias.unwrap_or(self.model_type == "qwen2")
    }

    /// Whether the projection behind attention has a bias.
    pub fn output_has_bias(&self) -> bool {
        self.attention_has_bias() && self.model_type != "qwen2"
    }

    /// Whether queries and keys of each head are normalised.
    pub fn normalises_heads(&self) -> bool {
        self.model_type == "qwen3"
    }

    /// The window of one layer's attention.
    pub fn window(&self, layer: usize) -> Option<i64> {
        let window = self.sliding_window.filter(|&window| window > 0)?;
        if !self.model_type.starts_with("qwen") {
            return Some(window);
        }
        let first = self.max_window_layers.unwrap_or(self.num_hidden_layers);
        (self.use_sliding_window == Some(true) && layer >= first).then_some(window)
    }
}

struct Layer {
    input_norm: RmsNorm,
    query: Projection,
    key: Projection,
    value: Projection,
    output: Projection,
    /// Qwen 3 normalises queries and keys of each head.
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    attention: Attention,
    post_attention_norm: RmsNorm,
    gate: Projection,
    up: Projection,
    down: Projection,
}

/// The decoder.
pub struct Llama {
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    rotary: Rotary,
    shape: CacheShape,
}

impl Llama {
    pub fn load(builder: &mut Builder<'_>, config: &LlamaConfig) -> Result<Self, LoadError> {
        let (theta, scaling) = config.rope().map_err(|(field, message)| builder.config_error(field, message))?;
        Ok(Self {
            embeddings: builder.tensor("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size])?,
            layers: (0..config.num_hidden_layers)
                .map(|index| Layer::load(builder, index, config))
                .collect::<Result<_, _>>()?,
            norm: builder.rms_norm("model.norm", config.hidden_size, config.rms_norm_eps)?,
            rotary: Rotary::new(theta, config.head_dim(), &scaling, builder.device()),
            shape: CacheShape {
                layers: config.num_hidden_layers,
                key_value_heads: config.key_value_heads(),
                head_dim: config.head_dim(),
            },
        })
    }
}

impl Layer {
    fn load(builder: &mut Builder<'_>, index: usize, config: &LlamaConfig) -> Result<Self, LoadError> {
        let (c, d) = (config.hidden_size, config.head_dim());
        let (queries, keys) = (config.num_attention_heads * d, config.key_value_heads() * d);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let bias = config.attention_has_bias();
        let eps = config.rms_norm_eps;
        let head_norm = |builder: &mut Builder<'_>, part: &str| {
            config.normalises_heads().then(|| builder.rms_norm(&name(part), d, eps)).transpose()
        };
        Ok(Self {
            query: builder.projection(&name("self_attn.q_proj"), c, queries, bias)?,
            key: builder.projection(&name("self_attn.k_proj"), c, keys, bias)?,
            value: builder.projection(&name("self_attn.v_proj"), c, keys, bias)?,
            output: builder.projection(&name("self_attn.o_proj"), queries, c, config.output_has_bias())?,
            query_norm: head_norm(builder, "self_attn.q_norm")?,
            key_norm: head_norm(builder, "self_attn.k_norm")?,
            attention: Attention { layer: index, window: config.window(index), dropout: config.attention_dropout },
            gate: builder.projection(&name("mlp.gate_proj"), c, config.intermediate_size, config.mlp_bias)?,
            up: builder.projection(&name("mlp.up_proj"), c, config.intermediate_size, config.mlp_bias)?,
            down: builder.projection(&name("mlp.down_proj"), config.intermediate_size, c, config.mlp_bias)?,
            input_norm: builder.rms_norm(&name("input_layernorm"), c, eps)?,
            post_attention_norm: builder.rms_norm(&name("post_attention_layernorm"), c, eps)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        angles: &(Tensor, Tensor),
        batch: &Batch,
        cache: Option<&mut KvCache>,
        (d, train): (i64, bool),
    ) -> Tensor {
        let normed = self.input_norm.forward(x);
        let heads = |projection: &Projection| projection.forward(&normed, batch, train).view([x.size()[0], -1, d]);
        let normalised = |norm: &Option<RmsNorm>, x: Tensor| match norm {
            Some(norm) => norm.forward(&x),
            None => x,
        };
        let query = rotate(&normalised(&self.query_norm, heads(&self.query)), angles);
        let key = rotate(&normalised(&self.key_norm, heads(&self.key)), angles);
        let attention = Attention { dropout: if train { self.attention.dropout } else { 0.0 }, ..self.attention };
        let context = attention.forward(&query, &key, &heads(&self.value), batch, cache);
        let x = x + self.output.forward(&context, batch, train);
        let normed = self.post_attention_norm.forward(&x);
        let inner = self.gate.forward(&normed, batch, train).silu() * self.up.forward(&normed, batch, train);
        &x + self.down.forward(&inner, batch, train)
    }

    fn projections_mut(&mut self) -> [&mut Projection; 7] {
        let Self { query, key, value, output, gate, up, down, .. } = self;
        [query, key, value, output, gate, up, down]
    }
}

impl Backbone for Llama {
    fn forward(&self, batch: &Batch, mut cache: Option<&mut KvCache>, train: bool) -> Tensor {
        let mut x = Tensor::embedding(&self.embeddings, &batch.ids, -1, false, false);
        let angles = self.rotary.angles(&batch.positions, x.kind());
        for layer in &self.layers {
            x = layer.forward(&x, &angles, batch, cache.as_deref_mut(), (self.shape.head_dim, train));
        }
        self.norm.forward(&x)
    }

    fn embeddings(&self) -> &Tensor {
        &self.embeddings
    }

    fn projections(&self) -> Vec<&Projection> {
        self.layers
            .iter()
            .flat_map(|layer| {
                [&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down]
            })
            .collect()
    }

    fn projections_mut(&mut self) -> Vec<&mut Projection> {
        self.layers.iter_mut().flat_map(Layer::projections_mut).collect()
    }

    fn cache_shape(&self) -> CacheShape {
        self.shape
    }
}
