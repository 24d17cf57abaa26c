//! An encoder of any family: ids to hidden states.
//!
//! Shapes: B texts, T tokens, C = hidden_size.

use tch::Tensor;

use crate::{
    builder::Builder,
    config::EncoderConfig,
    families::EncoderBackbone,
    load::LoadError,
    nn::{dense::Linear, embeddings::WordEmbeddings, encoder_layer::Layer, packed::Packing},
    registry,
};

/// Which hidden states a forward pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// What the first layer reads, then each layer's output, [B, T, C].
    Every,
    /// The last layer's output, [B, T, C].
    Last,
    /// The last layer's output for the first token, [B, 1, C]: most of that layer's work falls away.
    FirstToken,
}

/// An encoder's embeddings and layers.
pub struct Encoder(Box<dyn EncoderBackbone>);

impl Encoder {
    pub fn load(builder: &mut Builder, config: &EncoderConfig) -> Result<Self, LoadError> {
        registry::encoder(builder, config).map(Self)
    }

    pub fn word_embeddings(&self) -> &WordEmbeddings {
        self.0.word_embeddings()
    }

    pub(crate) fn backbone(&self) -> &dyn EncoderBackbone {
        self.0.as_ref()
    }

    pub fn word_embeddings_mut(&mut self) -> &mut WordEmbeddings {
        self.0.word_embeddings_mut()
    }

    /// The matrices of all layers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.0.layers().iter().flat_map(Layer::linears)
    }

    /// Ids and mask [B, T] to the hidden states that are kept.
    pub fn forward(
        &self,
        ids: &Tensor,
        mask: Option<&Tensor>,
        config: &EncoderConfig,
        train: bool,
        keep: Keep,
    ) -> Vec<Tensor> {
        let dropout = if train { config.hidden_dropout_prob } else { 0.0 };
        let (mut x, bias) = self.0.embed(ids, mask, config, dropout);
        let mut states = Vec::new();
        let layers = self.0.layers();
        for (index, layer) in layers.iter().enumerate() {
            let first_token = keep == Keep::FirstToken && index + 1 == layers.len();
            let next = layer.forward(&x, &bias, config, train, first_token);
            let before = std::mem::replace(&mut x, next);
            if keep == Keep::Every {
                states.push(before);
            }
        }
        states.push(x);
        states
    }

    pub fn layers_mut(&mut self) -> &mut [Layer] {
        self.0.layers_mut()
    }

    /// Lays all matrices out for inference; `first_token`: of the last layer's outputs only that token's will be asked for.
    pub fn pack(&mut self, how: Packing, first_token: bool) -> Result<(), LoadError> {
        let layers = self.layers_mut();
        let last = layers.len().saturating_sub(1);
        layers.iter_mut().enumerate().try_for_each(|(index, layer)| layer.pack(how, first_token && index == last))
    }
}
