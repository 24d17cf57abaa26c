//! One file for each family: layers, loading, forward pass, and for decoders the configuration.

pub mod bert;
pub mod encoders;
pub mod gpt2;
pub mod llama;
pub mod mpnet;

use tch::Tensor;

use crate::{
    batch::Batch,
    config::EncoderConfig,
    kv_cache::{CacheShape, KvCache},
    nn::{
        embeddings::WordEmbeddings,
        encoder_layer::{Bias, Layer},
        linear::Projection,
        norm::LayerNorm,
    },
};

/// An encoder without its head.
pub trait EncoderBackbone: Send {
    /// Ids and mask [B, T] to what the first layer reads [B, T, C], and where attention may look.
    fn embed(&self, ids: &Tensor, mask: Option<&Tensor>, config: &EncoderConfig, dropout: f64) -> (Tensor, Bias);

    fn word_embeddings(&self) -> &WordEmbeddings;

    fn word_embeddings_mut(&mut self) -> &mut WordEmbeddings;

    fn layers(&self) -> &[Layer];

    fn layers_mut(&mut self) -> &mut [Layer];

    /// What is added to the words' embeddings at each place, [T, C] for the T tokens of the longest text.
    fn positions(&self, config: &EncoderConfig) -> Tensor;

    /// The normalisation of the sum of embeddings.
    fn embeddings_norm(&self) -> &LayerNorm;

    /// What is added to the scores of attention between two of T tokens, [H, T, T]; absent: nothing.
    fn relative_bias(&self, tokens: i64, config: &EncoderConfig) -> Option<Tensor>;
}

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
