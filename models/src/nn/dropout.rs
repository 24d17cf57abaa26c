//! Dropout by our own kernel.

use tch::Tensor;

use super::packed::computed;

/// Sets elements to zero with probability `p` and scales the rest; nothing happens at 0.
pub fn drop(x: &Tensor, p: f64) -> Tensor {
    computed(athanor_torch::dropout(x, p))
}
