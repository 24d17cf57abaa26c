//! A projection with an optional bias and an optional low-rank adapter.

use tch::{Kind, Tensor};

use super::{
    dropout::drop,
    packed::{Packed, Packing},
};
use crate::load::LoadError;

/// The low-rank adapter of a projection: `scaling * x A^T B^T`.
pub struct Adapter {
    /// [rank, inputs], FP32.
    pub a: Tensor,
    /// [outputs, rank], FP32.
    pub b: Tensor,
    pub scaling: f64,
    pub dropout: f64,
}

/// `x W^T + b`, or `x W + b` where the checkpoint stores the matrix transposed.
pub struct Projection {
    /// Name of the module: its parameters are `{name}.weight` and `{name}.bias`.
    pub name: String,
    /// [outputs, inputs]; [inputs, outputs] if `transposed`.
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    /// GPT-2's Conv1D stores its matrix as [inputs, outputs].
    pub transposed: bool,
    pub adapter: Option<Adapter>,
    /// Instead of the weight, for inference.
    packed: Option<Packed>,
}

impl Projection {
    /// A projection without an adapter; see the fields.
    pub fn new(name: &str, weight: Tensor, bias: Option<Tensor>, transposed: bool) -> Self {
        Self { name: name.to_owned(), weight, bias, transposed, adapter: None, packed: None }
    }

    /// Lays the weight, with its adapter, out as the CPU multiplies fastest, and drops it: the projection only infers
    /// from now on.
    ///
    /// # Errors
    /// libtorch has no memory for the copy.
    pub fn pack_for_good(&mut self, how: Packing) -> Result<(), LoadError> {
        let bias = match &self.bias {
            Some(bias) => bias.to_kind(Kind::Float),
            None => Tensor::f_zeros([self.outputs()], (Kind::Float, self.weight.device()))?,
        };
        let weight = self.merged().to_kind(Kind::Float);
        let weight = if self.transposed { weight.tr() } else { weight };
        self.packed = Some(Packed::new(&weight.contiguous(), &bias, how)?);
        self.weight = Tensor::new();
        (self.bias, self.adapter) = (None, None);
        Ok(())
    }

    pub fn inputs(&self) -> i64 {
        self.weight.size()[usize::from(!self.transposed)]
    }

    pub fn outputs(&self) -> i64 {
        self.weight.size()[usize::from(self.transposed)]
    }

    /// [N, inputs] to [N, outputs].
    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        if let Some(packed) = &self.packed {
            return packed.product(x);
        }
        let base = if self.transposed {
            x.linear(&self.weight.tr(), self.bias.as_ref())
        } else {
            x.linear(&self.weight, self.bias.as_ref())
        };
        let Some(adapter) = &self.adapter else { return base };
        let x = x.to_kind(adapter.a.kind());
        let x = if train { drop(&x, adapter.dropout) } else { x };
        let delta = x.linear(&adapter.a, None::<&Tensor>).linear(&adapter.b, None::<&Tensor>) * adapter.scaling;
        let kind = base.kind();
        (base + delta).to_kind(kind)
    }

    /// The matrix with the adapter added, in the layout of the checkpoint.
    pub fn merged(&self) -> Tensor {
        let Some(adapter) = &self.adapter else { return self.weight.shallow_clone() };
        let delta = adapter.b.to_kind(Kind::Float).matmul(&adapter.a.to_kind(Kind::Float)) * adapter.scaling;
        let delta = if self.transposed { delta.tr() } else { delta };
        (self.weight.to_kind(Kind::Float) + delta).to_kind(self.weight.kind())
    }
}
