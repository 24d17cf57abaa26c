//! Normalisation of hidden states.

use tch::{Kind, Tensor};

/// Root mean square normalisation (Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>), computed in FP32 as
/// transformers does.
pub struct RmsNorm {
    /// [C].
    pub weight: Tensor,
    pub eps: f64,
}

impl RmsNorm {
    /// [..., C] to the same shape and kind.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let variance = wide.square().mean_dim([-1_i64].as_slice(), true, Kind::Float);
        (wide * (variance + self.eps).rsqrt()).to_kind(x.kind()) * &self.weight
    }
}

/// Layer normalisation with a bias.
pub struct LayerNorm {
    /// [C].
    pub weight: Tensor,
    /// [C].
    pub bias: Tensor,
    pub eps: f64,
}

impl LayerNorm {
    /// [..., C] to the same shape.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}
