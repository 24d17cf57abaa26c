//! Heads on an encoder's hidden states, with the names that transformers gives them.
//!
//! Shapes: B texts, T tokens, C = hidden_size, L labels, V tokens of the vocabulary.

use tch::{Kind, Tensor};

use crate::{
    builder::{Builder, Initializer},
    config::{EncoderConfig, HeadActivation},
    families::encoders::MaskedHeadNames,
    load::LoadError,
    nn::{dense::Linear, dropout::drop, norm::LayerNorm},
};

/// From the first token's hidden state to one value for each output.
pub struct SequenceHead {
    /// `tanh(x W + b)` before anything else.
    pooler: Option<Linear>,
    /// The family's, or one that was asked for.
    hidden: Option<(Linear, HeadActivation)>,
    output: Linear,
}

impl SequenceHead {
    /// `keep`: the head is in the file; else it is drawn.
    pub fn load(
        builder: &mut Builder,
        config: &EncoderConfig,
        outputs: i64,
        keep: bool,
        initializer: Initializer,
    ) -> Result<Self, LoadError> {
        let c = config.hidden_size;
        let family = config.model_type;
        let names = &family.sequence_head;
        let pooler = match names.pooler {
            Some(name) if builder.has(name) => Some(builder.linear(name, c, c)?),
            Some(name) => Some(builder.fresh_linear(&format!("{}{name}", family.prefix), c, c, Initializer::Normal)),
            None => None,
        };
        let mut linear = |name: &str, inputs: i64, outputs: i64| {
            if keep {
                builder.plain_linear(name, inputs, outputs)
            } else {
                Ok(builder.fresh_linear(name, inputs, outputs, initializer))
            }
        };
        let (hidden, output) = match (config.athanor_head, names.hidden) {
            (Some(head), _) => {
                let hidden = linear("classifier.hidden", c, head.units)?;
                (Some((hidden, head.activation)), linear("classifier.output", head.units, outputs)?)
            }
            (None, Some(name)) => {
                let hidden = linear(name, c, c)?;
                (Some((hidden, HeadActivation::Tanh)), linear(names.output, c, outputs)?)
            }
            (None, None) => (None, linear(names.output, c, outputs)?),
        };
        Ok(Self { pooler, hidden, output })
    }

    /// The layers over the first token's hidden state, in order; `None`: no activation.
    pub(crate) fn layers(&self) -> Vec<(&Linear, Option<HeadActivation>)> {
        let pooler = self.pooler.iter().map(|pooler| (pooler, Some(HeadActivation::Tanh)));
        let hidden = self.hidden.iter().map(|(hidden, activation)| (hidden, Some(*activation)));
        pooler.chain(hidden).chain([(&self.output, None)]).collect()
    }

    /// Hidden states [B, T, C] to [B, outputs], in FP32.
    pub fn forward(&self, hidden: &Tensor, dropout: f64) -> Tensor {
        let x = self.last_features(hidden, dropout);
        self.output.forward(&x).to_kind(Kind::Float)
    }

    /// What the last layer reads, [B, C] or [B, units].
    pub fn last_features(&self, hidden: &Tensor, dropout: f64) -> Tensor {
        let mut x = hidden.select(1, 0);
        if let Some(pooler) = &self.pooler {
            x = pooler.forward(&x).tanh();
        }
        x = drop(&x, dropout);
        if let Some((layer, activation)) = &self.hidden {
            let inner = layer.forward(&x);
            let active = match activation {
                HeadActivation::Tanh => inner.tanh(),
                HeadActivation::Gelu => inner.gelu("none"),
                HeadActivation::Relu => inner.relu(),
            };
            x = drop(&active, dropout);
        }
        x
    }
}

/// From hidden states to the vocabulary, with the word embeddings as its last weight.
pub struct MaskedLanguageModelHead {
    dense: Linear,
    norm: LayerNorm,
    /// [V].
    bias: Tensor,
}

impl MaskedLanguageModelHead {
    pub fn load(builder: &mut Builder, config: &EncoderConfig, keep: bool) -> Result<Self, LoadError> {
        let MaskedHeadNames { dense, norm, bias } = config.model_type.masked_head;
        let c = config.hidden_size;
        Ok(Self {
            dense: if keep {
                builder.plain_linear(dense, c, c)?
            } else {
                builder.fresh_linear(dense, c, c, Initializer::Normal)
            },
            norm: builder.plain_layer_norm(norm, c, config.layer_norm_eps, !keep)?,
            bias: builder.plain_bias(bias, config.vocab_size, !keep)?,
        })
    }

    /// Hidden states [N, C] of single tokens to logits [N, V].
    pub fn forward(&self, hidden: &Tensor, word_embeddings: &Tensor) -> Tensor {
        let x = self.norm.forward(&self.dense.forward(hidden).gelu("none"));
        x.linear(word_embeddings, Some(&self.bias)).to_kind(Kind::Float)
    }
}

/// The mean of the tokens' hidden states, padding left out: [B, T, C] and [B, T] to [B, C] in FP32 (Reimers and Gurevych 2019).
pub fn mean_pooling(hidden: &Tensor, attention_mask: Option<&Tensor>) -> Tensor {
    let hidden = hidden.to_kind(Kind::Float);
    let Some(mask) = attention_mask else { return hidden.mean_dim([1_i64].as_slice(), false, Kind::Float) };
    let mask = mask.to_kind(Kind::Float).unsqueeze(-1);
    (hidden * &mask).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float)
        / mask.sum_dim_intlist([1_i64].as_slice(), false, Kind::Float).clamp_min(1e-9)
}
