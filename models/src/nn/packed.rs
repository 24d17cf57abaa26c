//! Matrices laid out for inference on the CPU.

use athanor_torch::{PackedLinear, QuantizedLinear};
use tch::Tensor;

use crate::load::LoadError;

/// How matrices are laid out for inference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    Float,
    /// Eight bits a weight, one scale an output; inputs are rounded to eight bits as they come.
    Int8,
}

/// A matrix and its bias, laid out for inference on the CPU.
pub(crate) enum Packed {
    Float(PackedLinear),
    Int8(QuantizedLinear),
}

impl Packed {
    /// `weight` [outputs, inputs] and `bias` [outputs].
    pub(crate) fn new(weight: &Tensor, bias: &Tensor, how: Packing) -> Result<Self, LoadError> {
        Ok(match how {
            Packing::Float => Self::Float(PackedLinear::new(weight, bias)?),
            Packing::Int8 => Self::Int8(QuantizedLinear::new(weight, bias)?),
        })
    }

    /// The product alone, [..., inputs] to [..., outputs].
    pub(crate) fn product(&self, x: &Tensor) -> Tensor {
        self.forward(x, athanor_torch::Activation::Identity)
    }

    /// The product and the activation behind it, [..., inputs] to [..., outputs].
    pub(crate) fn forward(&self, x: &Tensor, activation: athanor_torch::Activation) -> Tensor {
        computed(match self {
            Self::Float(packed) => packed.forward(x, activation),
            Self::Int8(quantized) => quantized.forward(x, activation),
        })
    }
}

/// Shapes are checked when a model is loaded, so that this fails as tch's own operators do: never, but for a lack of memory.
pub fn computed(result: Result<Tensor, athanor_torch::Error>) -> Tensor {
    result.expect("the layer has the model's shapes")
}
