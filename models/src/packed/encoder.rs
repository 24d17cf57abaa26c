//! An encoder with packed weights.

use athanor_cpu::{Activation, Dense, Encoder, EncoderConfig, EncoderLayer, Format, InstructionSet, Matrix, Norm};
use tch::{Kind, Tensor};

use crate::{
    config::{self, HeadActivation},
    load::LoadError,
    model::Model,
    nn::{dense::Linear, encoder_layer::Layer, norm::LayerNorm},
};

/// Packs a model with a head over the first token, or without a head. Its outputs are those of [`Model::forward`], or of
/// [`Model::embedding`] scaled to length 1. `format`: that of the layers' matrices and of the table of words; all else is FP32.
///
/// # Errors
/// A weight is not finite, or there is no memory.
pub fn pack(
    model: &Model,
    format: Format,
    instruction_set: InstructionSet,
    threads: usize,
) -> Result<Encoder, LoadError> {
    let config = model.config();
    let (encoder, head) = model.parts();
    let backbone = encoder.backbone();
    let size = |value: i64| value as usize;
    let max_length = config.max_length();
    // The bias depends on the distance alone: the first key's column and the first query's row have every distance.
    let relative = match backbone.relative_bias(max_length as i64, config) {
        Some(bias) => {
            let before = bias.select(2, 0).narrow(1, 1, max_length as i64 - 1).flip([1]);
            Some(numbers(&Tensor::cat(&[&before, &bias.select(1, 0)], 1))?)
        }
        None => None,
    };
    let sizes = EncoderConfig {
        hidden: size(config.hidden_size),
        intermediate: size(config.intermediate_size),
        heads: size(config.num_attention_heads),
        max_length,
        threads,
        layer_norm_eps: config.layer_norm_eps as f32,
        activation: match config.hidden_act {
            config::Activation::Gelu => Activation::Gelu,
            config::Activation::GeluNew => Activation::GeluTanh,
            config::Activation::Relu => Activation::Relu,
        },
        positions: numbers(&backbone.positions(config))?,
        norm: norm(backbone.embeddings_norm())?,
        relative,
    };
    let words = matrix(&[&backbone.word_embeddings().weight], &[], format)?;
    let layers = backbone.layers().iter().map(|each| layer(each, format)).collect::<Result<Vec<_>, _>>()?;
    let head = head.map(|head| head.layers()).unwrap_or_default();
    let head = head.into_iter().map(dense).collect::<Result<Vec<_>, _>>()?;
    Ok(Encoder::new(instruction_set, sizes, words, layers, head)?)
}

fn layer(layer: &Layer, format: Format) -> Result<EncoderLayer, LoadError> {
    let [query, key, value, output, up, down] = layer.linears();
    let [attention_norm, output_norm] = layer.norms();
    let linears = |linears: &[&Linear]| {
        let weights: Vec<&Tensor> = linears.iter().map(|linear| &linear.weight).collect();
        let biases: Vec<&Tensor> = linears.iter().map(|linear| &linear.bias).collect();
        matrix(&weights, &biases, format)
    };
    Ok(EncoderLayer {
        qkv: linears(&[query, key, value])?,
        output: linears(&[output])?,
        attention_norm: norm(attention_norm)?,
        up: linears(&[up])?,
        down: linears(&[down])?,
        output_norm: norm(output_norm)?,
    })
}

/// Matrices [outputs, inputs] one below the other, and their biases.
fn matrix(weights: &[&Tensor], biases: &[&Tensor], format: Format) -> Result<Matrix, LoadError> {
    let inputs = weights[0].size()[1] as usize;
    let outputs = weights.iter().map(|weight| weight.size()[0] as usize).sum();
    let mut matrix = Matrix::zeros(&[(outputs, format)], inputs)?;
    let mut output = 0;
    for weight in weights {
        for row in numbers(weight)?.chunks_exact(inputs) {
            matrix.set_row(output, row)?;
            output += 1;
        }
    }
    if !biases.is_empty() {
        let all = biases.iter().map(|bias| numbers(bias)).collect::<Result<Vec<_>, _>>()?;
        matrix.set_bias(&all.concat());
    }
    Ok(matrix)
}

fn dense((linear, activation): (&Linear, Option<HeadActivation>)) -> Result<Dense, LoadError> {
    Ok(Dense {
        weight: numbers(&linear.weight)?,
        bias: numbers(&linear.bias)?,
        activation: match activation {
            None => Activation::Identity,
            Some(HeadActivation::Tanh) => Activation::Tanh,
            Some(HeadActivation::Gelu) => Activation::Gelu,
            Some(HeadActivation::Relu) => Activation::Relu,
        },
    })
}

fn norm(norm: &LayerNorm) -> Result<Norm, LoadError> {
    Ok(Norm { weight: numbers(&norm.weight)?, shift: numbers(&norm.bias)? })
}

/// A tensor's numbers in FP32.
fn numbers(tensor: &Tensor) -> Result<Vec<f32>, LoadError> {
    Ok(Vec::try_from(tensor.f_to_kind(Kind::Float)?.f_reshape([-1])?)?)
}
