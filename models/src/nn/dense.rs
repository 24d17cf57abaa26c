//! The projection of encoders and heads: with a bias, trained in FP32, packed for inference.

use std::cell::RefCell;

use tch::{Kind, Tensor};

use super::packed::{Packed, Packing};
use crate::{config::Activation, load::LoadError};

/// `x W^T + b`.
pub struct Linear {
    /// Name in a checkpoint, without `.weight` and `.bias`.
    pub name: String,
    pub weight: Tensor,
    pub bias: Tensor,
    /// Instead of the weight, for inference.
    packed: Option<Packed>,
    /// Sums of the squares of the inputs, [inputs], while somebody wants to know.
    observed: RefCell<Option<Tensor>>,
}

impl Linear {
    pub fn new(name: String, weight: Tensor, bias: Tensor) -> Self {
        Self { name, weight, bias, packed: None, observed: RefCell::new(None) }
    }

    /// Begins to sum up the squares of the inputs.
    pub fn observe(&self) {
        let inputs = self.weight.size().get(1).copied().unwrap_or(0);
        self.observed.replace(Some(Tensor::zeros([inputs], (Kind::Float, self.weight.device()))));
    }

    /// The norm of each input since `observe`, [inputs].
    pub fn observed(&self) -> Option<Tensor> {
        self.observed.take().map(|squares| squares.sqrt())
    }

    fn look(&self, x: &Tensor) {
        if let Some(squares) = self.observed.borrow_mut().as_mut() {
            let width = squares.size()[0];
            let seen = x.to_kind(Kind::Float).reshape([-1, width]).square();
            *squares += seen.sum_dim_intlist([0_i64].as_slice(), false, Kind::Float);
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.look(x);
        match &self.packed {
            Some(packed) => packed.forward(x, athanor_torch::Activation::Identity),
            None => x.linear(&self.weight, Some(&self.bias)),
        }
    }

    pub fn forward_activated(&self, x: &Tensor, activation: Activation) -> Tensor {
        self.look(x);
        if let Some(packed) = &self.packed {
            return packed.forward(x, activation.into());
        }
        let inner = x.linear(&self.weight, Some(&self.bias));
        match activation {
            Activation::Gelu => inner.gelu("none"),
            Activation::GeluNew => inner.gelu("tanh"),
            Activation::Relu => inner.relu(),
        }
    }

    /// Lays the weight out as the CPU multiplies fastest: while it is so, the layer only infers.
    pub fn pack(&mut self, how: Packing) -> Result<(), LoadError> {
        self.packed = Some(Packed::new(&self.weight, &self.bias, how)?);
        Ok(())
    }

    /// The layers as one, for inputs they share.
    pub fn joined<const N: usize>(layers: [&Self; N]) -> Self {
        let weight = Tensor::cat(&layers.map(|layer| &layer.weight), 0);
        let bias = Tensor::cat(&layers.map(|layer| &layer.bias), 0);
        Self::new(String::new(), weight, bias)
    }

    /// Drops the packed weight: the layer trains again.
    pub fn unpack(&mut self) {
        self.packed = None;
    }

    pub fn is_packed(&self) -> bool {
        self.packed.is_some()
    }

    /// Whether somebody wants to know the inputs, see [`Linear::observe`].
    pub fn is_observed(&self) -> bool {
        self.observed.borrow().is_some()
    }
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
