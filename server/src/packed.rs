//! The engine's backend for language models on a CPU without libtorch: packed weights of sixteen, eight or four bits.

use std::{collections::HashMap, path::Path, sync::Arc};

use athanor_contract::serve::{EngineConfig, Speculation, Weights};
use athanor_cpu::{Adapter, Decoder, InstructionSet};
use athanor_models::packed::{self, Bits, PackOptions};
use athanor_serving::engine::{
    backend::{
        AdapterId, AdapterWeights, BackendError, GenerateBackend, GenerateLimits, Logits, Logprobs, Row, RowOutput,
    },
    generate::sampling,
};

use crate::{
    adapter,
    generate::{CACHE_MEMORY, SCORED_TOKENS},
};

/// A packed decoder and the logits of its last step.
pub struct PackedGenerator {
    decoder: Decoder,
    logits: Arc<Vec<f32>>,
    speculates: bool,
    adapters: HashMap<AdapterId, Arc<Adapter>>,
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
            Weights::Auto | Weights::BF16 => Bits::Sixteen,
            Weights::FP32 => return Ok(None),
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
        let speculates = config.speculation == Speculation::Auto;
        Ok(Self { decoder, logits: Arc::default(), speculates, adapters: HashMap::new() })
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

    fn step(&mut self, rows: &[Row<'_>]) -> Result<Vec<RowOutput>, BackendError> {
        // A row's results do not depend on the other rows, so rows with targets are computed by themselves first.
        let adapters = rows.iter().map(|row| self.adapter(row)).collect::<Result<Vec<_>, _>>()?;
        let rows_with_adapters = || std::iter::zip(rows, &adapters).map(|(row, adapter)| (row, adapter.as_deref()));
        let mut outputs = Vec::with_capacity(rows.len());
        for (row, adapter) in rows_with_adapters() {
            outputs.push(self.scored(row, adapter)?);
        }
        let others = rows_with_adapters().filter(|(row, _)| row.targets.is_empty());
        let others: Vec<athanor_cpu::Row<'_>> = others.map(|(row, adapter)| native(row, adapter)).collect();
        self.compute(&others)?;
        let mut logits = Logits::rows(&self.logits, self.decoder.config().vocabulary);
        for (row, output) in rows.iter().zip(&mut outputs) {
            if row.targets.is_empty() {
                output.logits.extend(logits.by_ref().take(row.logits));
            }
        }
        Ok(outputs)
    }

    fn checks_proposals(&self) -> bool {
        self.speculates
    }

    fn load_adapter(&mut self, id: AdapterId, weights: AdapterWeights) -> Result<(), BackendError> {
        let layers = adapter::layers(weights, self.decoder.layers()).map_err(BackendError)?;
        let adapter = self.decoder.adapter(&layers).map_err(|error| BackendError(error.to_string()))?;
        self.adapters.insert(id, Arc::new(adapter));
        Ok(())
    }

    fn unload_adapter(&mut self, id: AdapterId) {
        self.adapters.remove(&id);
    }
}

impl PackedGenerator {
    fn adapter(&self, row: &Row<'_>) -> Result<Option<Arc<Adapter>>, BackendError> {
        let Some(id) = row.adapter else { return Ok(None) };
        self.adapters.get(&id).cloned().map(Some).ok_or_else(|| BackendError(format!("there is no adapter {}", id.0)))
    }

    /// Computes a row with targets, some tokens at a time, since each has logits. Nothing for another row.
    fn scored(&mut self, row: &Row<'_>, adapter: Option<&Adapter>) -> Result<RowOutput, BackendError> {
        let mut output = RowOutput::default();
        if row.targets.is_empty() {
            return Ok(output);
        }
        let vocabulary = self.decoder.config().vocabulary;
        let mut targets = row.targets.chunks(SCORED_TOKENS);
        for (index, tokens) in row.tokens.chunks(SCORED_TOKENS).enumerate() {
            let start = row.start + index * SCORED_TOKENS;
            let logits = tokens.len();
            self.compute(&[athanor_cpu::Row { tokens, start, blocks: row.blocks, logits, adapter }])?;
            let scores = std::iter::zip(targets.next().unwrap_or_default(), self.logits.chunks_exact(vocabulary));
            output.targets.extend(scores.map(|(&target, logits)| score(logits, target, row.top)));
        }
        if row.logits > 0 {
            let last = self.logits.chunks_exact(vocabulary).next_back().unwrap_or_default();
            output.logits.push(last.to_vec().into());
        }
        Ok(output)
    }

    fn compute(&mut self, rows: &[athanor_cpu::Row<'_>]) -> Result<(), BackendError> {
        if Arc::get_mut(&mut self.logits).is_none() {
            // Rows of the step before are still held.
            self.logits = Arc::default();
        }
        self.decoder.step(rows, Arc::make_mut(&mut self.logits)).map_err(|error| BackendError(error.to_string()))
    }
}

fn native<'a>(row: &Row<'a>, adapter: Option<&'a Adapter>) -> athanor_cpu::Row<'a> {
    let Row { tokens, start, blocks, logits, .. } = *row;
    athanor_cpu::Row { tokens, start, blocks, logits, adapter }
}

/// NaN where a logit is not finite, which the engine finds.
fn score(logits: &[f32], target: u32, top: usize) -> Logprobs {
    match logits.iter().fold(true, |finite, logit| finite & logit.is_finite()) {
        true => sampling::logprobs(logits, target as usize, top),
        false => Logprobs { chosen: f32::NAN, top: Vec::new() },
    }
}

#[cfg(test)]
#[path = "packed_tests.rs"]
pub(crate) mod tests;

#[cfg(test)]
#[path = "speculation_tests.rs"]
mod speculation_tests;
