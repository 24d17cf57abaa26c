//! A decoder whose weights are packed.

use std::{ffi::c_void, ptr};

use crate::{
    Error, Format, InstructionSet, Matrix,
    adapter::{Adapter, AdapterLayer, Sizes},
    ffi::{self, Tile},
};

/// Positions in a block of the cache.
const BLOCK: usize = 16;

/// Sizes of a decoder and of its cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// C.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// H.
    pub heads: usize,
    /// K, which divides H.
    pub key_value_heads: usize,
    /// D, even.
    pub head_dim: usize,
    /// V.
    pub vocabulary: usize,
    /// Largest number of positions of a sequence.
    pub max_length: usize,
    /// Blocks of the cache, of [`Decoder::BLOCK`] positions.
    pub blocks: usize,
    /// Threads that compute a step.
    pub threads: usize,
    pub rms_norm_eps: f32,
    /// Rotary frequencies, [D / 2].
    pub frequencies: Vec<f32>,
    /// Weights of the last normalisation, [C].
    pub norm: Vec<f32>,
}

/// One layer. Lengths are in [`Config`]'s letters.
pub struct Layer {
    /// [H D + 2 K D, C]: queries, keys, values.
    pub qkv: Matrix,
    /// [C, H D].
    pub output: Matrix,
    /// [2 I', C], where I' is I rounded up to tiles of 16 and tiles of gate and up take turns.
    pub gate_up: Matrix,
    /// [C, I].
    pub down: Matrix,
    /// [C].
    pub input_norm: Vec<f32>,
    /// [C].
    pub post_attention_norm: Vec<f32>,
    /// Norms of each head's queries and keys, [D] both.
    pub head_norms: Option<(Vec<f32>, Vec<f32>)>,
    /// Number of tokens that a query sees, itself included. Absent: all before it.
    pub window: Option<usize>,
}

/// Consecutive tokens of one sequence that a step computes.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    pub tokens: &'a [u32],
    /// Position of the first token.
    pub start: usize,
    /// Position `p` is stored in block `blocks[p / 16]`.
    pub blocks: &'a [u32],
    /// Number of last tokens whose logits are wanted.
    pub logits: usize,
    /// Absent: the decoder's own weights.
    pub adapter: Option<&'a Adapter>,
}

/// A decoder, its cache and its threads.
pub struct Decoder {
    native: ptr::NonNull<c_void>,
    config: Config,
    sizes: Sizes,
    /// What the native decoder points into.
    _weights: Weights,
}

struct Weights {
    _layers: Vec<Layer>,
    _embeddings: Matrix,
    _head: Option<Matrix>,
    _tiles: Vec<Vec<Tile>>,
}

// SAFETY: the native decoder is used through `&mut self` only; its threads work only while a call lasts.
unsafe impl Send for Decoder {}

impl Decoder {
    /// Positions in a block of the cache.
    pub const BLOCK: usize = BLOCK;

    /// Bytes that a block of the cache takes in all layers.
    pub fn block_bytes(layers: usize, key_value_heads: usize, head_dim: usize) -> usize {
        2 * layers * key_value_heads * BLOCK * (head_dim + head_dim.next_multiple_of(16))
    }

    /// `embeddings`: [V, C]. `head`: [V, C]; absent where it is the table of embeddings. Either all matrices have whole numbers,
    /// eight or four bits, or all have BF16 or all FP32. Keys and values are BF16 with each of them.
    ///
    /// # Errors
    /// The sizes or formats do not fit together, there is no memory, or the machine lacks `instruction_set`.
    pub fn new(
        instruction_set: InstructionSet,
        config: Config,
        layers: Vec<Layer>,
        embeddings: Matrix,
        head: Option<Matrix>,
    ) -> Result<Self, Error> {
        instruction_set.check()?;
        check(&config, &layers, &embeddings, head.as_ref())?;
        let mut tiles = Vec::new();
        let mut matrix = |matrix: &Matrix| matrix.native(&mut tiles);
        let native_layers: Vec<ffi::Layer> = layers
            .iter()
            .map(|layer| ffi::Layer {
                qkv: matrix(&layer.qkv),
                output: matrix(&layer.output),
                gate_up: matrix(&layer.gate_up),
                down: matrix(&layer.down),
                input_norm: layer.input_norm.as_ptr(),
                post_attention_norm: layer.post_attention_norm.as_ptr(),
                query_norm: layer.head_norms.as_ref().map_or(ptr::null(), |(query, _)| query.as_ptr()),
                key_norm: layer.head_norms.as_ref().map_or(ptr::null(), |(_, key)| key.as_ptr()),
                window: layer.window.unwrap_or(0) as i64,
            })
            .collect();
        let native_embeddings = matrix(&embeddings);
        let native_head = head.as_ref().map_or(native_embeddings, matrix);
        let shape = ffi::Shape {
            layers: layers.len() as i64,
            hidden: config.hidden as i64,
            intermediate: config.intermediate as i64,
            heads: config.heads as i64,
            key_value_heads: config.key_value_heads as i64,
            head_dim: config.head_dim as i64,
            vocabulary: config.vocabulary as i64,
            max_length: config.max_length as i64,
            blocks: config.blocks as i64,
            threads: config.threads.clamp(1, 256) as i64,
            eps: config.rms_norm_eps,
        };
        // SAFETY: the machine has the instruction set; sizes were checked against each other; all that is pointed to
        // lives as long as `Self` and does not move: vectors keep their buffers when they are moved.
        let native = unsafe {
            ffi::athanor_cpu_decoder(
                instruction_set.number(),
                &shape,
                native_layers.as_ptr(),
                &native_embeddings,
                &native_head,
                config.norm.as_ptr(),
                config.frequencies.as_ptr(),
            )
        };
        let native = ptr::NonNull::new(native).ok_or(Error::Memory("the cache of keys and values"))?;
        let sizes = Sizes {
            layers: layers.len(),
            hidden: config.hidden,
            intermediate: config.intermediate,
            queries: config.heads * config.head_dim,
            keys: config.key_value_heads * config.head_dim,
        };
        let weights = Weights { _layers: layers, _embeddings: embeddings, _head: head, _tiles: tiles };
        Ok(Self { native, config, sizes, _weights: weights })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Lays out an adapter for rows of this decoder; `layers` has one entry for each of its layers.
    ///
    /// # Errors
    /// A matrix of another shape, a number that is not finite, or there is no memory.
    pub fn adapter(&self, layers: &[AdapterLayer]) -> Result<Adapter, Error> {
        Adapter::new(self.sizes, layers)
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.sizes.layers
    }

    /// Computes the rows' tokens and stores their keys and values. `logits` receives [V] numbers for each
    /// token that wants them, in the order of rows. A row's result does not depend on the other rows.
    ///
    /// # Errors
    /// A token, position or block that does not exist; two rows that write to the same block are the caller's error and
    /// are not found. There is no memory.
    pub fn step(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), Error> {
        let mut wanted = 0;
        for row in rows {
            self.check_row(row)?;
            wanted += row.logits;
        }
        logits.resize(wanted * self.config.vocabulary, 0.0);
        if rows.is_empty() {
            return Ok(());
        }
        let native: Vec<ffi::Row> = rows
            .iter()
            .map(|row| ffi::Row {
                tokens: row.tokens.as_ptr(),
                length: row.tokens.len() as i64,
                start: row.start as i64,
                blocks: row.blocks.as_ptr(),
                logits: row.logits as i64,
                adapter: row.adapter.map_or(ptr::null(), Adapter::native),
                rank: row.adapter.map_or(0, Adapter::rank) as i64,
            })
            .collect();
        // SAFETY: tokens, positions, blocks and adapters were checked, and live while the call lasts; `logits` has room; the decoder is borrowed exclusively.
        let code = unsafe {
            ffi::athanor_cpu_step(self.native.as_ptr(), native.as_ptr(), native.len() as i64, logits.as_mut_ptr())
        };
        if code == 0 { Ok(()) } else { Err(Error::Memory("a step")) }
    }

    fn check_row(&self, row: &Row<'_>) -> Result<(), Error> {
        let (config, end) = (&self.config, row.start + row.tokens.len());
        if row.tokens.is_empty() {
            return Err(Error::Invalid("a row has no token".into()));
        }
        if row.logits > row.tokens.len() {
            return Err(Error::Invalid(format!("logits of {} tokens of {}", row.logits, row.tokens.len())));
        }
        if let Some(token) = row.tokens.iter().find(|&&token| token as usize >= config.vocabulary) {
            return Err(Error::Invalid(format!("token {token}; the vocabulary has {}", config.vocabulary)));
        }
        if end > config.max_length || end > row.blocks.len() * BLOCK {
            let (most, blocks) = (config.max_length, row.blocks.len());
            return Err(Error::Invalid(format!("{end} positions; at most {most}, and {blocks} blocks of {BLOCK}")));
        }
        if row.adapter.is_some_and(|adapter| !adapter.fits(self.sizes)) {
            return Err(Error::Invalid("the adapter is that of another decoder".into()));
        }
        if let Some(block) = row.blocks.iter().find(|&&block| block as usize >= config.blocks) {
            return Err(Error::Invalid(format!("block {block}; the cache has {}", config.blocks)));
        }
        Ok(())
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: created by `athanor_cpu_decoder` and freed once.
        unsafe { ffi::athanor_cpu_free(self.native.as_ptr()) }
    }
}

/// BF16 or FP32, which a matrix has in all its tiles. Absent: whole numbers.
fn float_format(matrix: &Matrix) -> Option<Format> {
    (matrix.outputs() > 0).then(|| matrix.format(0)).filter(|format| format.is_float())
}

/// Whether all sizes and formats fit together: the kernels rely on it.
fn check(config: &Config, layers: &[Layer], embeddings: &Matrix, head: Option<&Matrix>) -> Result<(), Error> {
    let expect = |what: &str, found: usize, wanted: usize| {
        if found == wanted { Ok(()) } else { Err(Error::Invalid(format!("{what}: {found} instead of {wanted}"))) }
    };
    let matrix = |what: &str, matrix: &Matrix, outputs: usize, inputs: usize| {
        expect(&format!("outputs of {what}"), matrix.outputs(), outputs)?;
        expect(&format!("inputs of {what}"), matrix.inputs(), inputs)?;
        let (found, wanted) = (float_format(matrix), float_format(embeddings));
        if found == wanted {
            return Ok(());
        }
        let name = |format: Option<Format>| format.map_or("whole numbers".into(), |format| format!("{format:?}"));
        Err(Error::Invalid(format!("{what}: {} next to embeddings of {}", name(found), name(wanted))))
    };
    let Config { hidden, intermediate, heads, key_value_heads, head_dim, vocabulary, .. } = *config;
    for (what, value) in
        [("hidden", hidden), ("heads", heads), ("keyValueHeads", key_value_heads), ("blocks", config.blocks)]
    {
        if value == 0 {
            return Err(Error::Invalid(format!("{what} is 0")));
        }
    }
    if head_dim == 0 || head_dim % 2 != 0 || heads % key_value_heads != 0 {
        let message = format!("{heads} heads of {head_dim}, {key_value_heads} key and value heads");
        return Err(Error::Invalid(message));
    }
    expect("frequencies", config.frequencies.len(), head_dim / 2)?;
    expect("norm", config.norm.len(), hidden)?;
    matrix("embeddings", embeddings, vocabulary, hidden)?;
    if let Some(head) = head {
        matrix("head", head, vocabulary, hidden)?;
    }
    for layer in layers {
        matrix("qkv", &layer.qkv, (heads + 2 * key_value_heads) * head_dim, hidden)?;
        matrix("output", &layer.output, hidden, heads * head_dim)?;
        matrix("gate_up", &layer.gate_up, 2 * intermediate.next_multiple_of(16), hidden)?;
        matrix("down", &layer.down, hidden, intermediate)?;
        expect("input_norm", layer.input_norm.len(), hidden)?;
        expect("post_attention_norm", layer.post_attention_norm.len(), hidden)?;
        for norm in layer.head_norms.iter().flat_map(|(query, key)| [query, key]) {
            expect("a head's norm", norm.len(), head_dim)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
pub(crate) mod tests;
