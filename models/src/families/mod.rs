//! One file for each family: layers, loading, forward pass, and for decoders the configuration.

pub mod bert;
pub mod gpt2;
pub mod llama;
pub mod mpnet;

use tch::Tensor;

use crate::{
    batch::Batch,
    kv_cache::{CacheShape, KvCache},
    nn::linear::Projection,
};

/// A decoder without its output head.
pub trait Backbone: Send {
    /// Hidden states behind the last normalisation, [N, C]. With a cache, the new tokens are stored in it.
    fn forward(&self, batch: &Batch, cache: Option<&mut KvCache>, train: bool) -> Tensor;

    /// The table of token embeddings, [V, C], which a tied output head uses too.
    fn embeddings(&self) -> &Tensor;

    /// The matrices of all layers.
    fn projections(&self) -> Vec<&Projection>;

    fn projections_mut(&mut self) -> Vec<&mut Projection>;

    fn cache_shape(&self) -> CacheShape;
}
