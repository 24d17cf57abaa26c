//! The engine's backend over libtorch for language models: a decoder of the crate `models` and its paged cache on one
//! device.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail};
use athanor_contract::serve::{EngineConfig, ServeLimits, Weights};
use athanor_models::{Batch, CachedRow, CausalLanguageModel, CausalOptions, KvCache, Packing};
use athanor_serving::engine::{
    backend::{
        AdapterId, AdapterWeights, BackendError, GenerateBackend, GenerateLimits, Logits, Logprobs, Row, RowOutput,
    },
    generate::{EngineLimits, scheduler::StepLimits},
};
use tch::{Device, Kind, Tensor};

use crate::{adapter, torch::describe};

/// Positions in a block of the cache.
const BLOCK: usize = 16;
/// Memory of the cache if the configuration has none.
pub const CACHE_MEMORY: u64 = 1 << 30;
/// Tokens of a step on a CPU: a longer step would hold up the answers in progress, and is no faster for each token.
const CPU_STEP_TOKENS: usize = 512;

/// Steps of at most so many tokens run on one thread: waking another for each operation costs more than it computes
/// (docs/serving.md has the measurement).
const ONE_THREAD_TOKENS: usize = 2;

/// Rows of logits that exist at once while a prompt's log-probabilities are computed.
pub const SCORED_TOKENS: usize = 64;

/// A language model and the keys and values of its sequences.
pub struct TorchGenerator {
    model: CausalLanguageModel,
    cache: KvCache,
    limits: GenerateLimits,
    device: Device,
    /// Threads of an operation in a step of many tokens.
    threads: usize,
}

/// The format of the weights that a configuration asks for on a device.
///
/// # Errors
/// `Int8` on a GPU, and `Int4`: this machine or the model cannot be packed.
fn format(weights: Weights, device: Device) -> anyhow::Result<(Kind, Option<Packing>)> {
    let on_cpu = device == Device::Cpu;
    let float = (Kind::Float, on_cpu.then_some(Packing::Float));
    Ok(match weights {
        Weights::Auto if athanor_torch::computes_in_bf16(device) => (Kind::BFloat16, None),
        Weights::Auto | Weights::FP32 => float,
        Weights::BF16 => (Kind::BFloat16, None),
        Weights::Int8 if on_cpu => (Kind::Float, Some(Packing::Int8)),
        Weights::Int8 => bail!("engine.weights: Int8 requires a CPU; a GPU has BF16 and FP32"),
        Weights::Int4 => bail!(
            "engine.weights: Int4 requires a CPU with AVX2 and a model of type llama, mistral, qwen2 or qwen3; Int8 or BF16 would do"
        ),
    })
}

impl TorchGenerator {
    /// Loads a GGUF file or a model folder. At most `sequences` sequences run at once.
    ///
    /// # Errors
    /// The model cannot be loaded, or the memory for the cache has no room for a block.
    pub fn load(model: &Path, config: &EngineConfig, sequences: usize, device: Device) -> anyhow::Result<Self> {
        let (kind, packing) = format(config.weights, device)?;
        let options = CausalOptions { kind: Some(kind), device, ..CausalOptions::default() };
        let mut model = CausalLanguageModel::load(model, &options)?;
        if let Some(how) = packing {
            model.pack_for_good(how)?;
        }
        let own = model.max_length();
        let max_length = config.max_model_length.unwrap_or(own).min(own);
        if config.max_model_length.is_some_and(|wanted| wanted > own) {
            tracing::warn!(max_model_length = own, "engine.maxModelLength exceeds the model's own, which is in force");
        }
        let memory = config.kv_cache_memory.unwrap_or(CACHE_MEMORY);
        let block_bytes = BLOCK * model.cache_shape().slot_bytes(kind);
        let affordable = usize::try_from(memory / block_bytes as u64).unwrap_or(usize::MAX);
        if affordable == 0 {
            bail!("engine.kvCacheMemory: {memory} bytes are less than a block of {BLOCK} tokens, {block_bytes} bytes");
        }
        // More than all sequences can fill would never be used.
        let blocks = affordable.min(max_length.div_ceil(BLOCK).saturating_mul(sequences));
        let limits = GenerateLimits {
            blocks,
            block_size: BLOCK,
            max_length,
            vocabulary: usize::try_from(model.vocab_size()).context("vocab_size")?,
        };
        let cache = KvCache::new(model.cache_shape(), (blocks * BLOCK) as i64, kind, device);
        tracing::info!(
            ?kind,
            ?packing,
            blocks,
            cache_bytes = blocks * block_bytes,
            max_length = max_length.min(blocks * BLOCK),
            "language model loaded"
        );
        Ok(Self { model, cache, limits, device, threads: athanor_torch::num_threads() })
    }

    fn compute(&mut self, rows: &[Row<'_>]) -> Vec<RowOutput> {
        let slot = |blocks: &[u32], place: usize| (blocks[place / BLOCK] as usize * BLOCK + place % BLOCK) as i64;
        let tokens: Vec<Vec<i64>> =
            rows.iter().map(|row| row.tokens.iter().map(|&token| i64::from(token)).collect()).collect();
        let slots: Vec<Vec<i64>> = rows
            .iter()
            .map(|row| (0..row.start + row.tokens.len()).map(|place| slot(row.blocks, place)).collect())
            .collect();
        let cached: Vec<CachedRow<'_>> =
            std::iter::zip(&tokens, &slots).map(|(new, slots)| CachedRow { new, slots }).collect();
        let adapters: Vec<Option<u64>> = rows.iter().map(|row| row.adapter.map(|id| id.0)).collect();
        let batch = Batch::cached(&cached, self.device).with_adapters(&adapters);
        let few = tokens.iter().map(Vec::len).sum::<usize>() <= ONE_THREAD_TOKENS;
        athanor_torch::set_num_threads(if few { 1 } else { self.threads });
        let wanted: Vec<i64> = (0..).zip(rows).filter(|(_, row)| row.logits > 0).map(|(index, _)| index).collect();
        let (logits, mut scores) = tch::no_grad(|| {
            let hidden = self.model.forward(&batch, Some(&mut self.cache), false);
            let scores = self.scores(&hidden, rows);
            if wanted.is_empty() {
                return (None, scores);
            }
            let places = batch.last_rows().index_select(0, &Tensor::from_slice(&wanted).to_device(self.device));
            let logits = self.model.logits(&hidden.index_select(0, &places));
            (Some(logits.to_kind(Kind::Float).to_device(Device::Cpu).contiguous()), scores)
        });
        let mut found = (0..wanted.len() as i64).filter_map(|index| {
            let row = logits.as_ref()?.get(index);
            let mut numbers = vec![0_f32; row.numel()];
            let count = numbers.len();
            row.copy_data(&mut numbers, count);
            Some(Logits::from(numbers))
        });
        std::iter::zip(rows, &mut scores)
            .map(|(row, scores)| RowOutput {
                logits: if row.logits > 0 { found.next().into_iter().collect() } else { Vec::new() },
                targets: std::mem::take(scores),
            })
            .collect()
    }

    /// Log-probabilities of each row's targets, from the hidden states [N, C] of all rows. The logits of a few tokens
    /// exist at a time, and only the results leave the device.
    fn scores(&self, hidden: &Tensor, rows: &[Row<'_>]) -> Vec<Vec<Logprobs>> {
        let mut first = 0;
        let mut found = Vec::with_capacity(rows.len());
        for row in rows {
            let mut scores = Vec::with_capacity(row.targets.len());
            for (targets, begin) in row.targets.chunks(SCORED_TOKENS).zip((first..).step_by(SCORED_TOKENS)) {
                let part = hidden.narrow(0, begin, targets.len() as i64);
                scores.extend(score(&self.model.logits(&part), targets, row.top));
            }
            found.push(scores);
            first += row.tokens.len() as i64;
        }
        found
    }
}

impl GenerateBackend for TorchGenerator {
    fn limits(&self) -> GenerateLimits {
        self.limits
    }

    fn step(&mut self, rows: &[Row<'_>]) -> Result<Vec<RowOutput>, BackendError> {
        // libtorch's errors are panics here. Weights are only read, and the cache's slots of these rows are written
        // again before they are read.
        catch_unwind(AssertUnwindSafe(|| self.compute(rows))).map_err(|panic| BackendError(describe(&*panic)))
    }

    fn load_adapter(&mut self, id: AdapterId, weights: AdapterWeights) -> Result<(), BackendError> {
        let modules = adapter::tensors(&weights).map_err(BackendError)?;
        // Memory of a GPU may be short.
        let added = catch_unwind(AssertUnwindSafe(|| self.model.add_adapter(id.0, &modules)));
        let added =
            added.map_err(|panic| BackendError(describe(&*panic))).and_then(|added| added.map_err(BackendError));
        added.inspect_err(|_| self.model.remove_adapter(id.0))
    }

    fn unload_adapter(&mut self, id: AdapterId) {
        self.model.remove_adapter(id.0);
    }
}

/// Log-probabilities of one target for each row of logits [n, V], with the `top` most probable tokens.
fn score(logits: &Tensor, targets: &[u32], top: usize) -> Vec<Logprobs> {
    let logits = logits.to_kind(Kind::Float);
    let sums = logits.logsumexp([-1_i64].as_slice(), true);
    let targets: Vec<i64> = targets.iter().map(|&token| i64::from(token)).collect();
    let targets = Tensor::from_slice(&targets).to_device(logits.device()).unsqueeze(1);
    let chosen = numbers(&(logits.gather(1, &targets, false) - &sums));
    let top = (top as i64).min(logits.size()[1]);
    let (best, tokens) = logits.topk(top, 1, true, true);
    let (best, tokens) = (numbers(&(best - &sums)), whole_numbers(&tokens));
    let row = |(index, chosen): (usize, f32)| {
        let places = index * top as usize..(index + 1) * top as usize;
        let tokens = tokens[places.clone()].iter().map(|&token| token as u32);
        Logprobs { chosen, top: tokens.zip(best[places].iter().copied()).collect() }
    };
    chosen.into_iter().enumerate().map(row).collect()
}

/// The elements of a tensor, row by row.
fn numbers(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let mut numbers = vec![0_f32; tensor.numel()];
    let count = numbers.len();
    tensor.copy_data(&mut numbers, count);
    numbers
}

/// The elements of a tensor of integers, row by row.
fn whole_numbers(tensor: &Tensor) -> Vec<i64> {
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let mut numbers = vec![0_i64; tensor.numel()];
    let count = numbers.len();
    tensor.copy_data(&mut numbers, count);
    numbers
}

/// Bounds of the engine on a device.
pub fn engine_limits(limits: &ServeLimits, device: Device) -> EngineLimits {
    let most = if device == Device::Cpu { CPU_STEP_TOKENS } else { usize::MAX };
    let sequences = limits.max_batch_inputs.max(1);
    EngineLimits {
        queue: limits.queue_inputs,
        wait: Duration::from_secs(limits.max_queue_seconds),
        step: StepLimits { tokens: limits.max_batch_tokens.min(most), sequences },
    }
}

#[cfg(test)]
#[path = "generate_tests.rs"]
mod tests;
