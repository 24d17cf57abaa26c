//! The encoder of BERT (Devlin et al. 2019, <https://arxiv.org/abs/1810.04805>). Names of modules are the keys of Hugging Face's
//! checkpoints, so nothing is renamed on the way in or out.

use tch::Tensor;

use super::EncoderBackbone;
use crate::{
    builder::{Builder, Initializer},
    config::EncoderConfig,
    load::LoadError,
    nn::{
        dropout::drop,
        embeddings::WordEmbeddings,
        encoder_layer::{Bias, Layer, LayerNames, allowed},
        norm::LayerNorm,
    },
};

const NAMES: LayerNames = LayerNames {
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
};

/// Embeddings and layers.
pub struct Bert {
    word_embeddings: WordEmbeddings,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    embeddings_norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Bert {
    pub fn load(builder: &mut Builder, config: &EncoderConfig) -> Result<Self, LoadError> {
        let c = config.hidden_size;
        let mut table = |name: &str, rows: i64| {
            builder.encoder(&format!("embeddings.{name}_embeddings.weight"), &[rows, c], Initializer::Normal)
        };
        Ok(Self {
            word_embeddings: WordEmbeddings::new(table("word", config.vocab_size)?),
            position_embeddings: table("position", config.max_position_embeddings)?,
            token_type_embeddings: table("token_type", config.type_vocab_size)?,
            embeddings_norm: builder.layer_norm("embeddings.LayerNorm", c, config.layer_norm_eps)?,
            layers: (0..config.num_hidden_layers)
                .map(|index| Layer::load(builder, index, &NAMES, config))
                .collect::<Result<_, _>>()?,
        })
    }
}

impl EncoderBackbone for Bert {
    fn embed(&self, ids: &Tensor, mask: Option<&Tensor>, config: &EncoderConfig, dropout: f64) -> (Tensor, Bias) {
        let words = self.word_embeddings.forward(ids, config.pad_token_id);
        // One segment: every token has type 0.
        let embedded = words + self.position_embeddings.narrow(0, 0, ids.size()[1]) + self.token_type_embeddings.get(0);
        let x = drop(&self.embeddings_norm.forward(&embedded), dropout);
        (x, Bias { mask: allowed(mask), relative: None })
    }

    fn word_embeddings(&self) -> &WordEmbeddings {
        &self.word_embeddings
    }

    fn word_embeddings_mut(&mut self) -> &mut WordEmbeddings {
        &mut self.word_embeddings
    }

    fn layers(&self) -> &[Layer] {
        &self.layers
    }

    fn layers_mut(&mut self) -> &mut [Layer] {
        &mut self.layers
    }

    fn positions(&self, config: &EncoderConfig) -> Tensor {
        self.position_embeddings.narrow(0, 0, config.max_position_embeddings) + self.token_type_embeddings.get(0)
    }

    fn embeddings_norm(&self) -> &LayerNorm {
        &self.embeddings_norm
    }

    fn relative_bias(&self, _tokens: i64, _config: &EncoderConfig) -> Option<Tensor> {
        None
    }
}
