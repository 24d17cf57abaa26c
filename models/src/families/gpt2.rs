//! GPT-2 (Radford et al. 2019, <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>):
//! learned positions, normalisation before each half of a layer, matrices stored as [inputs, outputs]. Names of modules are the keys
//! of Hugging Face's checkpoints.
//!
//! Shapes: N tokens of all sequences, C = n_embd, H = n_head heads of D = C / H.

use serde::Deserialize;
use tch::Tensor;

use super::Backbone;
use crate::{
    batch::Batch,
    kv_cache::{CacheShape, KvCache},
    load::LoadError,
    nn::{attention::Attention, dropout::drop, linear::Projection, norm::LayerNorm},
    weights::builder::Builder,
};

/// Fields of `config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Gpt2Config {
    pub vocab_size: i64,
    pub n_positions: i64,
    pub n_embd: i64,
    pub n_layer: usize,
    pub n_head: i64,
    /// Absent: four times `n_embd`.
    pub n_inner: Option<i64>,
    #[serde(default = "gelu_new")]
    pub activation_function: String,
    #[serde(default = "tenth")]
    pub resid_pdrop: f64,
    #[serde(default = "tenth")]
    pub embd_pdrop: f64,
    #[serde(default = "tenth")]
    pub attn_pdrop: f64,
    #[serde(default = "layer_norm_epsilon")]
    pub layer_norm_epsilon: f64,
    /// Absent: the output head is the table of token embeddings.
    #[serde(default = "tied")]
    pub tie_word_embeddings: bool,
}

fn gelu_new() -> String {
    "gelu_new".into()
}

fn tenth() -> f64 {
    0.1
}

fn layer_norm_epsilon() -> f64 {
    1e-5
}

fn tied() -> bool {
    true
}

impl Gpt2Config {
    /// Names the field that no model can have.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_embd", self.n_embd),
            ("n_layer", self.n_layer as i64),
            ("n_head", self.n_head),
            ("n_inner", self.n_inner.unwrap_or(1)),
        ] {
            if value < 1 {
                return Err((name, format!("{value} is too small")));
            }
        }
        if self.n_embd % self.n_head != 0 {
            return Err(("n_head", format!("{} does not divide n_embd {}", self.n_head, self.n_embd)));
        }
        if self.activation_function != "gelu_new" {
            let message = format!("{:?} is not supported, \"gelu_new\" is", self.activation_function);
            return Err(("activation_function", message));
        }
        for (name, value) in
            [("resid_pdrop", self.resid_pdrop), ("embd_pdrop", self.embd_pdrop), ("attn_pdrop", self.attn_pdrop)]
        {
            if !(0.0..1.0).contains(&value) {
                return Err((name, format!("{value} is not in [0, 1)")));
            }
        }
        Ok(())
    }
}

struct Layer {
    ln_1: LayerNorm,
    c_attn: Projection,
    attn_c_proj: Projection,
    ln_2: LayerNorm,
    c_fc: Projection,
    mlp_c_proj: Projection,
}

/// The decoder.
pub struct Gpt2 {
    wte: Tensor,
    wpe: Tensor,
    layers: Vec<Layer>,
    ln_f: LayerNorm,
    config: Gpt2Config,
}

impl Gpt2 {
    pub fn load(builder: &mut Builder<'_>, config: &Gpt2Config) -> Result<Self, LoadError> {
        let c = config.n_embd;
        Ok(Self {
            wte: builder.tensor("transformer.wte.weight", &[config.vocab_size, c])?,
            wpe: builder.tensor("transformer.wpe.weight", &[config.n_positions, c])?,
            layers: (0..config.n_layer).map(|index| Layer::load(builder, index, config)).collect::<Result<_, _>>()?,
            ln_f: builder.layer_norm("transformer.ln_f", c, config.layer_norm_epsilon)?,
            config: config.clone(),
        })
    }
}

impl Layer {
    fn load(builder: &mut Builder<'_>, index: usize, config: &Gpt2Config) -> Result<Self, LoadError> {
        let (c, eps) = (config.n_embd, config.layer_norm_epsilon);
        let inner = config.n_inner.unwrap_or(4 * c);
        let name = |part: &str| format!("transformer.h.{index}.{part}");
        Ok(Self {
            ln_1: builder.layer_norm(&name("ln_1"), c, eps)?,
            c_attn: builder.transposed_projection(&name("attn.c_attn"), c, 3 * c)?,
            attn_c_proj: builder.transposed_projection(&name("attn.c_proj"), c, c)?,
            ln_2: builder.layer_norm(&name("ln_2"), c, eps)?,
            c_fc: builder.transposed_projection(&name("mlp.c_fc"), c, inner)?,
            mlp_c_proj: builder.transposed_projection(&name("mlp.c_proj"), inner, c)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        index: usize,
        config: &Gpt2Config,
        (batch, cache): (&Batch, Option<&mut KvCache>),
        train: bool,
    ) -> Tensor {
        let probability = |p: f64| if train { p } else { 0.0 };
        let n = x.size()[0];
        let joined = self.c_attn.forward(&self.ln_1.forward(x), batch, train).view([n, 3, config.n_head, -1]);
        let [query, key, value] = [0, 1, 2].map(|part| joined.select(1, part));
        let attention = Attention { layer: index, window: None, dropout: probability(config.attn_pdrop) };
        let context = attention.forward(&query, &key, &value, batch, cache);
        let x = x + drop(&self.attn_c_proj.forward(&context, batch, train), probability(config.resid_pdrop));
        let inner = self.c_fc.forward(&self.ln_2.forward(&x), batch, train).gelu("tanh");
        &x + drop(&self.mlp_c_proj.forward(&inner, batch, train), probability(config.resid_pdrop))
    }
}

impl Backbone for Gpt2 {
    fn forward(&self, batch: &Batch, mut cache: Option<&mut KvCache>, train: bool) -> Tensor {
        let lookup = |table: &Tensor, at: &Tensor| Tensor::embedding(table, at, -1, false, false);
        let x = lookup(&self.wte, &batch.ids) + lookup(&self.wpe, &batch.positions);
        let mut x = drop(&x, if train { self.config.embd_pdrop } else { 0.0 });
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, index, &self.config, (batch, cache.as_deref_mut()), train);
        }
        self.ln_f.forward(&x)
    }

    fn embeddings(&self) -> &Tensor {
        &self.wte
    }

    fn projections(&self) -> Vec<&Projection> {
        self.layers
            .iter()
            .flat_map(|layer| [&layer.c_attn, &layer.attn_c_proj, &layer.c_fc, &layer.mlp_c_proj])
            .collect()
    }

    fn projections_mut(&mut self) -> Vec<&mut Projection> {
        self.layers
            .iter_mut()
            .flat_map(|layer| [&mut layer.c_attn, &mut layer.attn_c_proj, &mut layer.c_fc, &mut layer.mlp_c_proj])
            .collect()
    }

    fn cache_shape(&self) -> CacheShape {
        CacheShape {
            layers: self.config.n_layer,
            key_value_heads: self.config.n_head,
            head_dim: self.config.n_embd / self.config.n_head,
        }
    }
}
