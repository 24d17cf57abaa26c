//! A projection with an optional bias and an optional low-rank adapter.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::{
    dropout::drop,
    packed::{Packed, Packing},
};
use crate::{batch::Batch, load::LoadError};

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
    /// The adapter that trains, or is merged.
    pub adapter: Option<Adapter>,
    /// A [rank, inputs] and scaled B [outputs, rank] of the adapters that rows of a batch may have, for inference.
    row_adapters: BTreeMap<u64, (Tensor, Tensor)>,
    /// Instead of the weight, for inference.
    packed: Option<Packed>,
    inputs: i64,
    outputs: i64,
}

impl Projection {
    /// A projection without an adapter; see the fields.
    pub fn new(name: &str, weight: Tensor, bias: Option<Tensor>, transposed: bool) -> Self {
        let (rows, columns) = (weight.size()[0], weight.size()[1]);
        let (outputs, inputs) = if transposed { (columns, rows) } else { (rows, columns) };
        let (row_adapters, adapter, packed) = (BTreeMap::new(), None, None);
        Self { name: name.to_owned(), weight, bias, transposed, adapter, row_adapters, packed, inputs, outputs }
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
        self.inputs
    }

    pub fn outputs(&self) -> i64 {
        self.outputs
    }

    /// Adds an adapter for the rows that name it. `a` [rank, inputs], `b` [outputs, rank] with the scale.
    pub(crate) fn add_row_adapter(&mut self, id: u64, a: Tensor, b: Tensor) {
        self.row_adapters.insert(id, (a, b));
    }

    pub(crate) fn remove_row_adapter(&mut self, id: u64) {
        self.row_adapters.remove(&id);
    }

    /// [N, inputs] to [N, outputs], with the adapters of the batch's rows.
    pub fn forward(&self, x: &Tensor, batch: &Batch, train: bool) -> Tensor {
        let mut y = self.product(x, train);
        for (id, rows) in batch.adapted() {
            let Some((a, b)) = self.row_adapters.get(id) else { continue };
            let x = x.index_select(0, rows).to_kind(a.kind());
            let delta = x.linear(a, None::<&Tensor>).linear(b, None::<&Tensor>);
            let _ = y.index_add_(0, rows, &delta.to_kind(y.kind()));
        }
        y
    }

    fn product(&self, x: &Tensor, train: bool) -> Tensor {
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
