//! An encoder whose weights are packed.

use std::{ffi::c_void, ptr};

use crate::{
    Error, InstructionSet, Matrix,
    ffi::{self, Tile},
};

/// A function of single numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Identity,
    /// GELU with the error function.
    Gelu,
    /// GELU approximated with tanh.
    GeluTanh,
    Relu,
    Tanh,
}

impl Activation {
    fn number(self) -> i32 {
        match self {
            Self::Identity => 0,
            Self::Gelu => 1,
            Self::GeluTanh => 2,
            Self::Relu => 3,
            Self::Tanh => 4,
        }
    }
}

/// Sizes of an encoder and its vectors in FP32.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderConfig {
    /// C.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// H, which divides C.
    pub heads: usize,
    /// Largest number of tokens of a text.
    pub max_length: usize,
    /// Threads that compute a batch.
    pub threads: usize,
    pub layer_norm_eps: f32,
    pub activation: Activation,
    /// Added to the words' embeddings, [max_length, C].
    pub positions: Vec<f32>,
    /// Normalises the sum of embeddings.
    pub norm: Norm,
    /// Added to attention's scores by the distance of key and query, from `1 - max_length` on, [H, 2 max_length - 1].
    /// Absent: nothing.
    pub relative: Option<Vec<f32>>,
}

/// Weights of a layer normalisation, [C] both.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    pub weight: Vec<f32>,
    pub shift: Vec<f32>,
}

/// One layer, which normalises behind each half. Lengths are in [`EncoderConfig`]'s letters.
pub struct EncoderLayer {
    /// [3 C, C]: queries, keys, values.
    pub qkv: Matrix,
    /// [C, C].
    pub output: Matrix,
    pub attention_norm: Norm,
    /// [I, C].
    pub up: Matrix,
    /// [C, I].
    pub down: Matrix,
    pub output_norm: Norm,
}

/// A layer of a head, in FP32.
#[derive(Clone, Debug, PartialEq)]
pub struct Dense {
    /// [outputs, inputs].
    pub weight: Vec<f32>,
    /// [outputs].
    pub bias: Vec<f32>,
    pub activation: Activation,
}

/// An encoder, its head and its threads.
pub struct Encoder {
    native: ptr::NonNull<c_void>,
    max_length: usize,
    vocabulary: usize,
    outputs: usize,
    /// What the native encoder points into.
    _weights: Weights,
}

struct Weights {
    _config: EncoderConfig,
    _words: Matrix,
    _layers: Vec<EncoderLayer>,
    _head: Vec<Dense>,
    _tiles: Vec<Vec<Tile>>,
}

// SAFETY: the native encoder is used through `&mut self` only; its threads work only while a call lasts.
unsafe impl Send for Encoder {}

impl Encoder {
    /// `words`: [V, C]. `head`: layers over a text's first token, of which the first reads C numbers; empty: an output
    /// is the mean of the text's tokens, scaled to length 1.
    ///
    /// The matrices of the layers have whole numbers of eight or four bits, or all BF16, or all FP32; `words` has any format.
    ///
    /// # Errors
    /// Sizes or formats do not fit together, there is no memory, or the machine lacks `instruction_set`.
    pub fn new(
        instruction_set: InstructionSet,
        config: EncoderConfig,
        words: Matrix,
        layers: Vec<EncoderLayer>,
        head: Vec<Dense>,
    ) -> Result<Self, Error> {
        instruction_set.check()?;
        check(&config, &words, &layers, &head)?;
        let mut tiles = Vec::new();
        let native_layers: Vec<ffi::EncoderLayer> = layers
            .iter()
            .map(|layer| ffi::EncoderLayer {
                qkv: layer.qkv.native(&mut tiles),
                output: layer.output.native(&mut tiles),
                up: layer.up.native(&mut tiles),
                down: layer.down.native(&mut tiles),
                attention_weight: layer.attention_norm.weight.as_ptr(),
                attention_shift: layer.attention_norm.shift.as_ptr(),
                output_weight: layer.output_norm.weight.as_ptr(),
                output_shift: layer.output_norm.shift.as_ptr(),
            })
            .collect();
        let embeddings = ffi::EncoderEmbeddings {
            words: words.native(&mut tiles),
            positions: config.positions.as_ptr(),
            weight: config.norm.weight.as_ptr(),
            shift: config.norm.shift.as_ptr(),
            relative: config.relative.as_ref().map_or(ptr::null(), |relative| relative.as_ptr()),
        };
        let dense = |dense: &Dense| ffi::Dense {
            outputs: dense.bias.len() as i64,
            inputs: (dense.weight.len() / dense.bias.len()) as i64,
            weight: dense.weight.as_ptr(),
            bias: dense.bias.as_ptr(),
            activation: dense.activation.number(),
        };
        let native_head: Vec<ffi::Dense> = head.iter().map(dense).collect();
        let shape = ffi::EncoderShape {
            layers: layers.len() as i64,
            hidden: config.hidden as i64,
            intermediate: config.intermediate as i64,
            heads: config.heads as i64,
            max_length: config.max_length as i64,
            threads: config.threads.clamp(1, 256) as i64,
            eps: config.layer_norm_eps,
            activation: config.activation.number(),
            first_token: i32::from(!head.is_empty()),
        };
        // SAFETY: the machine has the instruction set; sizes were checked against each other; layers and head are copied,
        // and what they point to lives as long as `Self` and does not move: vectors keep their buffers when moved.
        let native = unsafe {
            ffi::athanor_cpu_encoder(
                instruction_set.number(),
                &shape,
                native_layers.as_ptr(),
                &embeddings,
                native_head.as_ptr(),
                native_head.len() as i64,
            )
        };
        let native = ptr::NonNull::new(native).ok_or(Error::Memory("an encoder"))?;
        Ok(Self {
            native,
            max_length: config.max_length,
            vocabulary: words.outputs(),
            outputs: head.last().map_or(config.hidden, |dense| dense.bias.len()),
            _weights: Weights { _config: config, _words: words, _layers: layers, _head: head, _tiles: tiles },
        })
    }

    /// Outputs of each text, [outputs]. A text's outputs do not depend on the other texts, to the last bit.
    ///
    /// # Errors
    /// A text without tokens, or with more than the encoder reads; a token that does not exist. There is no memory.
    pub fn encode(&mut self, texts: &[&[u32]]) -> Result<Vec<Vec<f32>>, Error> {
        for text in texts {
            if text.is_empty() || text.len() > self.max_length {
                return Err(Error::Invalid(format!("{} tokens; a text has 1 to {}", text.len(), self.max_length)));
            }
            if let Some(token) = text.iter().find(|&&token| token as usize >= self.vocabulary) {
                return Err(Error::Invalid(format!("token {token}; the vocabulary has {}", self.vocabulary)));
            }
        }
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let native: Vec<ffi::Text> =
            texts.iter().map(|text| ffi::Text { tokens: text.as_ptr(), length: text.len() as i64 }).collect();
        let mut outputs = vec![0.0; texts.len() * self.outputs];
        // SAFETY: tokens and lengths were checked; `outputs` has room; the encoder is borrowed exclusively.
        let code = unsafe {
            ffi::athanor_cpu_encode(self.native.as_ptr(), native.as_ptr(), native.len() as i64, outputs.as_mut_ptr())
        };
        match code {
            0 => Ok(outputs.chunks_exact(self.outputs).map(<[f32]>::to_vec).collect()),
            _ => Err(Error::Memory("a batch")),
        }
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        // SAFETY: created by `athanor_cpu_encoder` and freed once.
        unsafe { ffi::athanor_cpu_encoder_free(self.native.as_ptr()) }
    }
}

/// Whether all sizes fit together: the kernels rely on it.
fn check(config: &EncoderConfig, words: &Matrix, layers: &[EncoderLayer], head: &[Dense]) -> Result<(), Error> {
    let expect = |what: &str, found: usize, wanted: usize| {
        if found == wanted { Ok(()) } else { Err(Error::Invalid(format!("{what}: {found} instead of {wanted}"))) }
    };
    let matrix = |what: &str, matrix: &Matrix, outputs: usize, inputs: usize| {
        expect(&format!("outputs of {what}"), matrix.outputs(), outputs)?;
        expect(&format!("inputs of {what}"), matrix.inputs(), inputs)
    };
    let EncoderConfig { hidden, intermediate, heads, max_length, .. } = *config;
    let norm = |norm: &Norm| {
        expect("weights of a norm", norm.weight.len(), hidden)?;
        expect("shifts of a norm", norm.shift.len(), hidden)
    };
    if hidden == 0 || intermediate == 0 || heads == 0 || max_length == 0 || hidden % heads != 0 {
        return Err(Error::Invalid(format!("hidden {hidden}, {heads} heads, {max_length} positions")));
    }
    expect("inputs of words", words.inputs(), hidden)?;
    expect("positions", config.positions.len(), max_length * hidden)?;
    norm(&config.norm)?;
    if let Some(relative) = &config.relative {
        expect("relative biases", relative.len(), heads * (2 * max_length - 1))?;
    }
    // Rows of activations are BF16 or FP32 as the weights are, or else rounded to eight bits.
    let rows = |matrix: &Matrix| Some(matrix.format(0)).filter(|format| format.is_float());
    for layer in layers {
        let matrices = [
            ("qkv", &layer.qkv, 3 * hidden, hidden),
            ("output", &layer.output, hidden, hidden),
            ("up", &layer.up, intermediate, hidden),
            ("down", &layer.down, hidden, intermediate),
        ];
        for (what, found, outputs, inputs) in matrices {
            matrix(what, found, outputs, inputs)?;
            if rows(found) != rows(&layers[0].qkv) {
                return Err(Error::Invalid(format!("{what}: BF16 or FP32 and another format in one encoder")));
            }
        }
        norm(&layer.attention_norm)?;
        norm(&layer.output_norm)?;
    }
    let mut inputs = hidden;
    for dense in head {
        if dense.bias.is_empty() {
            return Err(Error::Invalid("a layer of the head has no outputs".into()));
        }
        expect("weights of a layer of the head", dense.weight.len(), inputs * dense.bias.len())?;
        inputs = dense.bias.len();
    }
    Ok(())
}
