//! What tch lacks of libtorch: c10d process groups (Gloo, NCCL) with the DDP [`Reducer`], autocast, norms, fused
//! optimizers, one that updates single rows of a table, a transformer layer with its backward pass, packed and
//! quantized linear layers, dropout, RNG state, compute capabilities and page-locked copies. Leaves out everything that
//! tch has, and any policy: retries and exit codes are decided by the trainer.
//!
//! This is the only crate with unsafe code. C++ exceptions become [`Error`]s; a peer that went away is
//! [`Error::LostPeer`].

mod distributed;
mod dropout;
mod embedding_adam;
mod ffi;
mod layer;
mod linear;
mod optimizer;
mod runtime;
mod sharding;

pub use distributed::{Backend, ProcessGroup, Reducer, Rendezvous};
pub use dropout::dropout;
pub use embedding_adam::EmbeddingAdam;
pub use layer::LayerCall;
pub use linear::{Activation, PackedLinear, QuantizedLinear};
pub use optimizer::{Optimizer, ParameterGroup, Rule, add_penalty, backward, norm, scale, zero_grad};
pub use runtime::{
    Autocast, computes_in_bf16, copy_to_host, exit_now, has_nccl, num_threads, rng_state, set_num_threads,
    set_rng_state,
};
pub use sharding::Shard;

/// What libtorch said when a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A collective failed because another rank went away or did not answer in time. A rank that cannot be connected to in
    /// the first place, and errors of NCCL itself, are [`Error::Torch`].
    #[error("lost a peer: {0}")]
    LostPeer(String),
    #[error("libtorch: {0}")]
    Torch(String),
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.to_string())
    }
}

/// Tests of one process share libtorch's generator: those that draw from it take turns.
#[cfg(test)]
static GENERATOR: std::sync::Mutex<()> = std::sync::Mutex::new(());
