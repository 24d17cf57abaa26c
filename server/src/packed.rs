//! The engine's backend for language models on a CPU without libtorch: packed weights of eight or four bits.

use std::path::Path;

use athanor_contract::serve::{EngineConfig, Weights};
use athanor_cpu::{Decoder, InstructionSet};
use athanor_models::packed::{self, Bits, PackOptions};
use athanor_serving::engine::backend::{BackendError, GenerateBackend, GenerateLimits, Row};

use crate::generate::CACHE_MEMORY;

/// A packed decoder and the logits of its last step.
pub struct PackedGenerator {
    decoder: Decoder,
    logits: Vec<f32>,
}

impl PackedGenerator {
    /// The bits that a configuration asks for, if this machine can compute with packed weights and the model is of a
    /// family that can be packed.
    ///
    /// # Errors
    /// The model's configuration cannot be read.
    pub fn bits(model: &Path, weights: Weights) -> anyhow::Result<Option<(Bits, InstructionSet)>> {
        let bits = match weights {
            Weights::Int4 => Bits::Four,
            Weights::Int8 => Bits::Eight,
            Weights::Auto | Weights::FP32 | Weights::BF16 => return Ok(None),
        };
        let Some(instruction_set) = InstructionSet::best() else { return Ok(None) };
        Ok(packed::is_packable(model)?.then_some((bits, instruction_set)))
    }

    /// Loads a GGUF file or a model folder. At most `sequences` sequences run at once.
    ///
    /// # Errors
    /// The model cannot be loaded, or the memory for the cache has no room for a block.
    pub fn load(
        model: &Path,
        config: &EngineConfig,
        sequences: usize,
        threads: usize,
        (bits, instruction_set): (Bits, InstructionSet),
    ) -> anyhow::Result<Self> {
        let cache_memory = config.kv_cache_memory.unwrap_or(CACHE_MEMORY);
        let options = PackOptions {
            bits,
            max_length: config.max_model_length,
            cache_memory,
            sequences,
            threads,
            instruction_set,
        };
        let decoder = packed::load(model, &options)?;
        let (blocks, max_length) = (decoder.config().blocks, decoder.config().max_length);
        if config.max_model_length.is_some_and(|wanted| wanted > max_length) {
            tracing::warn!(
                max_model_length = max_length,
                "engine.maxModelLength exceeds the model's own, which is in force"
            );
        }
        tracing::info!(?bits, ?instruction_set, threads, blocks, max_length, "language model packed");
        Ok(Self { decoder, logits: Vec::new() })
    }
}

impl GenerateBackend for PackedGenerator {
    fn limits(&self) -> GenerateLimits {
        let config = self.decoder.config();
        GenerateLimits {
            blocks: config.blocks,
            block_size: Decoder::BLOCK,
            max_length: config.max_length,
            vocabulary: config.vocabulary,
        }
    }

    fn step(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<f32>>, BackendError> {
        let native: Vec<athanor_cpu::Row<'_>> = rows
            .iter()
            .map(|row| athanor_cpu::Row {
                tokens: row.tokens,
                start: row.start,
                blocks: row.blocks,
                wants_logits: row.wants_logits,
            })
            .collect();
        self.decoder.step(&native, &mut self.logits).map_err(|error| BackendError(error.to_string()))?;
        let mut found = self.logits.chunks_exact(self.decoder.config().vocabulary);
        let mut logits = |row: &Row<'_>| row.wants_logits.then(|| found.next().map(<[f32]>::to_vec)).flatten();
        Ok(rows.iter().map(|row| logits(row).unwrap_or_default()).collect())
    }
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
