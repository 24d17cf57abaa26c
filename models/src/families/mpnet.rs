//! The encoder of MPNet (Song et al. 2020, <https://arxiv.org/abs/2004.09297>): BERT's layers, with a learned bias of the attention
//! by the distance between two tokens, shared by all layers. Names of modules are the keys of Hugging Face's checkpoints.

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
    query: "attention.attn.q",
    key: "attention.attn.k",
    value: "attention.attn.v",
    attention_output: "attention.attn.o",
    attention_norm: "attention.LayerNorm",
};
/// Distances beyond this share the last bucket of their side.
const MAX_DISTANCE: f64 = 128.0;

/// Embeddings and layers.
pub struct MpNet {
    word_embeddings: WordEmbeddings,
    position_embeddings: Tensor,
    embeddings_norm: LayerNorm,
    layers: Vec<Layer>,
    /// [buckets, H].
    relative_attention_bias: Tensor,
}

impl MpNet {
    pub fn load(builder: &mut Builder, config: &EncoderConfig) -> Result<Self, LoadError> {
        let c = config.hidden_size;
        let mut table = |name: &str, rows: i64, columns: i64| {
            builder.encoder(&format!("{name}.weight"), &[rows, columns], Initializer::Normal)
        };
        Ok(Self {
            word_embeddings: WordEmbeddings::new(table("embeddings.word_embeddings", config.vocab_size, c)?),
            position_embeddings: table("embeddings.position_embeddings", config.max_position_embeddings, c)?,
            relative_attention_bias: table(
                "encoder.relative_attention_bias",
                config.relative_buckets(),
                config.num_attention_heads,
            )?,
            embeddings_norm: builder.layer_norm("embeddings.LayerNorm", c, config.layer_norm_eps)?,
            layers: (0..config.num_hidden_layers)
                .map(|index| Layer::load(builder, index, &NAMES, config))
                .collect::<Result<_, _>>()?,
        })
    }
}

impl EncoderBackbone for MpNet {
    fn embed(&self, ids: &Tensor, mask: Option<&Tensor>, config: &EncoderConfig, dropout: f64) -> (Tensor, Bias) {
        let t = ids.size()[1];
        let words = self.word_embeddings.forward(ids, config.pad_token_id);
        // Padding is at the end, where its position does not matter: nothing looks at it.
        let embedded = words + self.position_embeddings.narrow(0, config.first_position(), t);
        let x = drop(&self.embeddings_norm.forward(&embedded), dropout);
        (x, Bias { mask: allowed(mask), relative: self.relative_bias(t, config).map(|relative| relative.unsqueeze(0)) })
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
        self.position_embeddings.narrow(0, config.first_position(), config.max_length() as i64)
    }

    fn embeddings_norm(&self) -> &LayerNorm {
        &self.embeddings_norm
    }

    fn relative_bias(&self, tokens: i64, config: &EncoderConfig) -> Option<Tensor> {
        let buckets = Tensor::from_slice(&buckets(tokens, config.relative_buckets())).view([tokens, tokens]);
        let buckets = buckets.to_device(self.relative_attention_bias.device());
        let relative = Tensor::embedding(&self.relative_attention_bias, &buckets, -1, false, false);
        Some(relative.permute([2, 0, 1]))
    }
}

/// The bucket of each pair of a query's and a key's place, row by row: half of the buckets for each side, of these half for one
/// distance each and the others growing with its logarithm (Raffel et al. 2020).
fn buckets(tokens: i64, buckets: i64) -> Vec<i64> {
    let side = buckets / 2;
    let exact = side / 2;
    let bucket = |distance: i64| {
        let size = distance.abs();
        let within = if size < exact {
            size
        } else {
            // f32, as in transformers: a distance at a border must fall on the same side.
            let share = (size as f32 / exact as f32).ln() / ((MAX_DISTANCE / exact as f64).ln() as f32);
            (exact + (share * (side - exact) as f32) as i64).min(side - 1)
        };
        if distance > 0 { side + within } else { within }
    };
    (0..tokens).flat_map(|query| (0..tokens).map(move |key| key - query)).map(bucket).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_distances_have_buckets_of_their_own() {
        let found = buckets(300, 32);
        let at = |query: usize, key: usize| found[query * 300 + key];
        assert_eq!([at(5, 5), at(5, 4), at(12, 5), at(4, 5), at(5, 12)], [0, 1, 7, 17, 23]);
        // relative_position_bucket of transformers for distances -8, -16, -127, -250 and 8, 16, 64, 128, 290.
        assert_eq!([at(8, 0), at(16, 0), at(127, 0), at(250, 0)], [8, 10, 15, 15]);
        assert_eq!([at(0, 8), at(0, 16), at(0, 64), at(0, 128), at(0, 290)], [24, 26, 30, 31, 31]);
    }
}
