//! The layer that the encoder families share, which normalises behind each half.
//!
//! Shapes: B texts, T tokens, C = hidden_size, H heads of D = C / H.

use athanor_torch::LayerCall;
use tch::{Kind, Tensor};

use super::{
    dense::Linear,
    dropout::drop,
    norm::LayerNorm,
    packed::{Packing, computed},
};
use crate::{builder::Builder, config::EncoderConfig, load::LoadError};

/// Mask and bias of attention.
#[derive(Default)]
pub struct Bias {
    /// True where attention may look, broadcast to [B, H, T, T]; absent: everywhere.
    pub mask: Option<Tensor>,
    /// Added to the scores, broadcast to [B, H, T, T].
    pub relative: Option<Tensor>,
}

/// A family's names of the parts of a layer, behind `encoder.layer.{index}.`.
pub struct LayerNames {
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    pub attention_output: &'static str,
    pub attention_norm: &'static str,
}

/// A transformer layer that normalises behind each half (Vaswani et al. 2017).
pub struct Layer {
    /// Query, key and value as one product, for inference; key and value alone if only the first token has a query.
    packed: Option<Linear>,
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
    pub fn load(
        builder: &mut Builder,
        index: usize,
        names: &LayerNames,
        config: &EncoderConfig,
    ) -> Result<Self, LoadError> {
        let (c, eps) = (config.hidden_size, config.layer_norm_eps);
        let name = |part: &str| format!("encoder.layer.{index}.{part}");
        Ok(Self {
            packed: None,
            query: builder.linear(&name(names.query), c, c)?,
            key: builder.linear(&name(names.key), c, c)?,
            value: builder.linear(&name(names.value), c, c)?,
            attention_output: builder.linear(&name(names.attention_output), c, c)?,
            attention_norm: builder.layer_norm(&name(names.attention_norm), c, eps)?,
            intermediate: builder.linear(&name("intermediate.dense"), c, config.intermediate_size)?,
            output: builder.linear(&name("output.dense"), config.intermediate_size, c)?,
            output_norm: builder.layer_norm(&name("output.LayerNorm"), c, eps)?,
        })
    }

    /// `x` [B, T, C] to the same shape, or with `first_token` to what that token's would be, [B, 1, C].
    pub fn forward(&self, x: &Tensor, bias: &Bias, config: &EncoderConfig, train: bool, first_token: bool) -> Tensor {
        if let Some(call) = self.trained_call(x, bias, config, train, first_token) {
            return computed(call.forward(x));
        }
        let (b, _, c) = x.size3().expect("hidden states have three dimensions");
        let heads = |projected: Tensor| {
            projected.view([b, -1, config.num_attention_heads, c / config.num_attention_heads]).transpose(1, 2)
        };
        // The tokens that ask, and go on to the layer's second half.
        let (asking, bias) = if first_token {
            let relative = bias.relative.as_ref().map(|relative| relative.narrow(2, 0, 1));
            let mask = bias.mask.as_ref().map(Tensor::shallow_clone);
            (&x.narrow(1, 0, 1), &Bias { mask, relative })
        } else {
            (x, bias)
        };
        let [query, key, value] = match &self.packed {
            Some(packed) => {
                let all = packed.forward(x);
                let part = |from_last: i64| heads(all.narrow(2, all.size()[2] - from_last * c, c));
                let query = match self.query.is_packed() {
                    true => heads(self.query.forward(asking)),
                    false => part(3).narrow(2, 0, asking.size()[1]),
                };
                [query, part(2), part(1)]
            }
            None => [heads(self.query.forward(asking)), heads(self.key.forward(x)), heads(self.value.forward(x))],
        };
        let context =
            attention(&query, &key, &value, bias, if train { config.attention_probs_dropout_prob } else { 0.0 });
        let context = context.transpose(1, 2).reshape([b, -1, c]);
        let dropout = if train { config.hidden_dropout_prob } else { 0.0 };
        let attended = drop(&self.attention_output.forward(&context), dropout);
        let x = self.attention_norm.forward(&(attended + asking));
        let inner = self.intermediate.forward_activated(&x, config.hidden_act);
        let out = drop(&self.output.forward(&inner), dropout);
        self.output_norm.forward(&(out + x))
    }

    /// The layer as one operation with its gradient, if gradients are required and the device has the operation.
    fn trained_call<'a>(
        &'a self,
        x: &Tensor,
        bias: &'a Bias,
        config: &EncoderConfig,
        train: bool,
        first_token: bool,
    ) -> Option<LayerCall<'a>> {
        let is_plain = |linear: &&Linear| !linear.is_packed() && !linear.is_observed();
        if !LayerCall::applies(x) || self.packed.is_some() || !self.linears().iter().all(is_plain) {
            return None;
        }
        let [query, key, value, attention_output, intermediate, output] =
            self.linears().map(|linear| [&linear.weight, &linear.bias]);
        let [attention_norm, output_norm] =
            [&self.attention_norm, &self.output_norm].map(|norm| [&norm.weight, &norm.bias]);
        let parameters = [query, key, value, attention_output, attention_norm, intermediate, output, output_norm];
        let dropout = |p: f64| if train { p } else { 0.0 };
        Some(LayerCall {
            parameters: std::array::from_fn(|place| parameters[place / 2][place % 2]),
            relative: bias.relative.as_ref(),
            mask: bias.mask.as_ref(),
            heads: config.num_attention_heads,
            first_token,
            activation: config.hidden_act.into(),
            attention_dropout: dropout(config.attention_probs_dropout_prob),
            hidden_dropout: dropout(config.hidden_dropout_prob),
            eps: self.output_norm.eps,
        })
    }

    /// The matrices, as a checkpoint names them.
    pub fn linears(&self) -> [&Linear; 6] {
        [&self.query, &self.key, &self.value, &self.attention_output, &self.intermediate, &self.output]
    }

    /// The normalisations behind attention and behind the layer.
    pub fn norms(&self) -> [&LayerNorm; 2] {
        [&self.attention_norm, &self.output_norm]
    }

    /// Undoes [`Layer::pack`].
    pub fn unpack(&mut self) {
        self.packed = None;
        self.linears_mut().into_iter().for_each(Linear::unpack);
    }

    /// Drops the matrices that were packed.
    pub fn drop_weights(&mut self) {
        self.linears_mut().into_iter().for_each(|linear| linear.weight = Tensor::new());
    }

    fn linears_mut(&mut self) -> [&mut Linear; 6] {
        [
            &mut self.query,
            &mut self.key,
            &mut self.value,
            &mut self.attention_output,
            &mut self.intermediate,
            &mut self.output,
        ]
    }

    /// Lays the matrices out for inference; `first_token`: mostly of that one.
    pub fn pack(&mut self, how: Packing, first_token: bool) -> Result<(), LoadError> {
        let mut packed = if first_token {
            self.query.pack(how)?;
            Linear::joined([&self.key, &self.value])
        } else {
            Linear::joined([&self.query, &self.key, &self.value])
        };
        packed.pack(how)?;
        packed.weight = Tensor::new();
        self.packed = Some(packed);
        for linear in [&mut self.attention_output, &mut self.intermediate, &mut self.output] {
            linear.pack(how)?;
        }
        Ok(())
    }
}

/// softmax(Q K^T / sqrt(D) + bias) V, all [B, H, T, D].
fn attention(query: &Tensor, key: &Tensor, value: &Tensor, bias: &Bias, dropout: f64) -> Tensor {
    // For the CPU libtorch has no fused kernel with dropout, and draws the mask slowly.
    if dropout == 0.0 || query.device().is_cuda() {
        let allowed = bias.mask.as_ref();
        let joined = bias.relative.as_ref().map(|relative| match allowed {
            Some(mask) => relative.masked_fill(&mask.logical_not(), f64::NEG_INFINITY),
            None => relative.shallow_clone(),
        });
        // Its kind has to be the query's, which autocast may have changed.
        let joined = joined.map(|joined| joined.to_kind(query.kind()));
        return Tensor::scaled_dot_product_attention(
            query,
            key,
            value,
            joined.as_ref().or(allowed),
            dropout,
            false,
            None,
            false,
        );
    }
    let scale = (query.size().last().copied().unwrap_or(1) as f64).sqrt().recip();
    let mut scores = (query * scale).matmul(&key.transpose(-2, -1));
    if let Some(relative) = &bias.relative {
        scores += relative.to_kind(query.kind());
    }
    if let Some(mask) = &bias.mask {
        scores = scores.masked_fill(&mask.logical_not(), f64::NEG_INFINITY);
    }
    drop(&scores.softmax(-1, scores.kind()), dropout).matmul(value)
}

/// `attention_mask` [B, T], 1 where a token is, to what attention broadcasts.
pub fn allowed(attention_mask: Option<&Tensor>) -> Option<Tensor> {
    attention_mask.map(|mask| mask.to_kind(Kind::Bool).unsqueeze(1).unsqueeze(1))
}
