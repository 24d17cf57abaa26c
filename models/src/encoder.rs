//! An encoder of any family: ids to hidden states.
//!
//! Shapes: B texts, T tokens, C = hidden_size.

use tch::Tensor;

use crate::{
    builder::Builder,
    config::{EncoderConfig, Family},
    families::{bert::Bert, mpnet::MpNet},
    load::LoadError,
    nn::{dense::Linear, embeddings::WordEmbeddings, encoder_layer::Layer, packed::Packing},
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

pub enum Encoder {
    Bert(Bert),
    MpNet(MpNet),
}

impl Encoder {
    pub fn load(builder: &mut Builder, config: &EncoderConfig) -> Result<Self, LoadError> {
        Ok(match config.model_type {
            Family::Bert => Self::Bert(Bert::load(builder, config)?),
            Family::MpNet => Self::MpNet(MpNet::load(builder, config)?),
        })
    }

    pub fn word_embeddings(&self) -> &WordEmbeddings {
        match self {
            Self::Bert(bert) => &bert.word_embeddings,
            Self::MpNet(mpnet) => &mpnet.word_embeddings,
        }
    }

    pub fn word_embeddings_mut(&mut self) -> &mut WordEmbeddings {
        match self {
            Self::Bert(bert) => &mut bert.word_embeddings,
            Self::MpNet(mpnet) => &mut mpnet.word_embeddings,
        }
    }

    /// The matrices of all layers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers().iter().flat_map(Layer::linears)
    }

    fn layers(&self) -> &[Layer] {
        match self {
            Self::Bert(bert) => &bert.layers,
            Self::MpNet(mpnet) => &mpnet.layers,
        }
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
        let (mut x, bias) = match self {
            Self::Bert(bert) => bert.embed(ids, mask, config, dropout),
            Self::MpNet(mpnet) => mpnet.embed(ids, mask, config, dropout),
        };
        let mut states = Vec::new();
        let layers = self.layers();
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
        match self {
            Self::Bert(bert) => &mut bert.layers,
            Self::MpNet(mpnet) => &mut mpnet.layers,
        }
    }

    /// Lays all matrices out for inference; `first_token`: of the last layer's outputs only that token's will be asked for.
    pub fn pack(&mut self, how: Packing, first_token: bool) -> Result<(), LoadError> {
        let layers = self.layers_mut();
        let last = layers.len().saturating_sub(1);
        layers.iter_mut().enumerate().try_for_each(|(index, layer)| layer.pack(how, first_token && index == last))
    }
}
