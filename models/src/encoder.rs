//! An encoder of any family: ids to hidden states.
//!
//! Shapes: B texts, T tokens, C = hidden_size.

use tch::Tensor;

use crate::{
    bert::Bert,
    builder::Builder,
    config::{EncoderConfig, Family},
    layers::{Layer, Linear, Packing},
    load::LoadError,
    mpnet::MpNet,
};

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

    /// [V, C].
    pub fn word_embeddings(&self) -> &Tensor {
        match self {
            Self::Bert(bert) => &bert.word_embeddings,
            Self::MpNet(mpnet) => &mpnet.word_embeddings,
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

    /// Ids and mask [B, T] to hidden states [B, T, C]: what the first layer reads, then each layer's output. Without `every` only
    /// the last is kept.
    pub fn forward(
        &self,
        ids: &Tensor,
        mask: Option<&Tensor>,
        config: &EncoderConfig,
        train: bool,
        every: bool,
    ) -> Vec<Tensor> {
        let dropout = if train { config.hidden_dropout_prob } else { 0.0 };
        let (mut x, bias) = match self {
            Self::Bert(bert) => bert.embed(ids, mask, config, dropout),
            Self::MpNet(mpnet) => mpnet.embed(ids, mask, config, dropout),
        };
        let mut states = Vec::new();
        for layer in self.layers() {
            let next = layer.forward(&x, &bias, config, train);
            let before = std::mem::replace(&mut x, next);
            if every {
                states.push(before);
            }
        }
        states.push(x);
        states
    }

    pub fn pack(&mut self, how: Packing) -> Result<(), LoadError> {
        let layers = match self {
            Self::Bert(bert) => &mut bert.layers,
            Self::MpNet(mpnet) => &mut mpnet.layers,
        };
        layers.iter_mut().try_for_each(|layer| layer.pack(how))
    }
}
