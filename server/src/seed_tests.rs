//! The same seed gives the same answer alone, in a batch of 16, after preemptions, and with and without a prefix from the cache.
//! Packed weights give it to the last bit, log-probabilities included. Over libtorch logits depend on the
//! batch a little: the tests show by how much, and that an answer computed alone does not change.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use athanor_contract::serve::{EngineConfig, Weights};
use athanor_cpu::InstructionSet;
use athanor_models::packed::Bits;
use athanor_serving::engine::{
    backend::{AdapterId, AdapterWeights, BackendError, GenerateBackend, GenerateLimits, Row, RowOutput},
    generate::{
        Choice, Engine, EngineLimits, Event, GenerateRequest,
        sampling::{Sampled, Sampling},
        scheduler::StepLimits,
        sequence::Stopping,
    },
};
use tch::Device;

use crate::{generate::TorchGenerator, packed::PackedGenerator};

const BATCH: usize = 16;
const ANSWER: usize = 40;

/// A backend of which at most some blocks are used, and the largest batch that it has computed.
struct Watched<B> {
    backend: B,
    blocks: usize,
    most: Arc<AtomicUsize>,
}

impl<B: GenerateBackend> GenerateBackend for Watched<B> {
    fn limits(&self) -> GenerateLimits {
        let limits = self.backend.limits();
        GenerateLimits { blocks: limits.blocks.min(self.blocks), ..limits }
    }

    fn checks_proposals(&self) -> bool {
        self.backend.checks_proposals()
    }

    fn load_adapter(&mut self, id: AdapterId, adapter: AdapterWeights) -> Result<(), BackendError> {
        self.backend.load_adapter(id, adapter)
    }

    fn unload_adapter(&mut self, id: AdapterId) {
        self.backend.unload_adapter(id);
    }

    fn step(&mut self, rows: &[Row<'_>]) -> Result<Vec<RowOutput>, BackendError> {
        self.most.fetch_max(rows.len(), Ordering::SeqCst);
        self.backend.step(rows)
    }
}

/// An engine, and the largest batch that it has computed.
fn start(backend: impl GenerateBackend, blocks: usize, name: &str) -> (Engine, Arc<AtomicUsize>) {
    let most = Arc::<AtomicUsize>::default();
    let limits = EngineLimits { queue: 64, wait: Duration::MAX, step: StepLimits { tokens: 256, sequences: BATCH } };
    let watched = Watched { backend, blocks, most: most.clone() };
    (Engine::start(watched, limits, name).unwrap(), most)
}

/// Requests with prompts that share no block, and seeds of their own.
fn requests(vocabulary: usize) -> Vec<GenerateRequest> {
    let prompt = |index: usize| {
        (0..33 + index).map(|place| ((place * (37 + index) + 11 * index + 5) % vocabulary) as u32).collect()
    };
    let request = |index: usize| GenerateRequest {
        prompt: prompt(index),
        choices: 1,
        sampling: Sampling {
            temperature: 1.0,
            top_p: if index.is_multiple_of(2) { 1.0 } else { 0.95 },
            seed: 1000 + index as u64,
            logprobs: Some(2),
            ..Sampling::default()
        },
        stopping: Stopping { max_tokens: ANSWER, min_tokens: 0, stop_tokens: Vec::new() },
        constraint: None,
        prompt_logprobs: None,
        adapter: None,
    };
    (0..BATCH).map(request).collect()
}

/// The tokens of an answer, and the number of prompt tokens that the cache had.
type Answer = (Vec<Sampled>, usize);

async fn read(mut choice: Choice) -> Answer {
    let (mut tokens, mut cached) = (Vec::new(), 0);
    while let Some(event) = choice.recv().await {
        match event.unwrap() {
            Event::Token(sampled) => tokens.push(sampled),
            Event::Finished(finished) => cached = finished.cached_tokens,
            Event::Admitted { .. } | Event::Prompt(_) => {}
        }
    }
    assert_eq!(tokens.len(), ANSWER);
    (tokens, cached)
}

async fn answers(engine: &Engine, at_once: usize) -> Vec<Answer> {
    let mut found = Vec::new();
    for requests in requests(engine.vocabulary()).chunks(at_once) {
        let submit = |request: &GenerateRequest| {
            let mut places = engine.reserve(1).unwrap();
            engine.submit(&mut places, request.clone()).unwrap().remove(0)
        };
        let choices: Vec<Choice> = requests.iter().map(submit).collect();
        for choice in choices {
            found.push(read(choice).await);
        }
    }
    found
}

fn preemptions(name: &str) -> u64 {
    let text = athanor_telemetry::metrics().render();
    let line = format!("vllm:num_preemptions_total{{model_name=\"{name}\"}} ");
    text.lines().find_map(|found| found.strip_prefix(&line)).unwrap().parse().unwrap()
}

/// Compares the answers of all ways with those that were computed alone without a cache.
async fn compare<B: GenerateBackend>(load: impl Fn() -> B, name: &str, same: impl Fn(&[Sampled], &[Sampled]) -> bool) {
    let check = |way: &str, found: &[Answer], expected: &[Answer]| {
        for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!(same(&found.0, &expected.0), "{name}: answer {index} is another one {way}");
        }
    };
    let (engine, most) = start(load(), usize::MAX, name);
    let expected = answers(&engine, 1).await;
    assert!(expected.iter().all(|(_, cached)| *cached == 0) && most.load(Ordering::SeqCst) == 1);
    let cached = answers(&engine, 1).await;
    assert!(cached.iter().all(|(_, cached)| *cached >= 32), "nothing came from the cache: the test shows nothing");
    check("with a prefix from the cache", &cached, &expected);
    check("in a batch with prefixes from the cache", &answers(&engine, BATCH).await, &expected);

    let (engine, most) = start(load(), usize::MAX, name);
    check("in a batch", &answers(&engine, BATCH).await, &expected);
    assert_eq!(most.load(Ordering::SeqCst), BATCH, "the batch was smaller: the test shows nothing");

    // One sequence needs up to 6 blocks of 16 positions.
    let name = format!("{name}-preempted");
    let (engine, most) = start(load(), 26, &name);
    check("after preemptions", &answers(&engine, BATCH).await, &expected);
    assert!(preemptions(&name) > 4 && most.load(Ordering::SeqCst) > 3, "{} preemptions", preemptions(&name));
}

fn folder(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden/decoders").join(family)
}

fn config(weights: Weights) -> EngineConfig {
    EngineConfig { kv_cache_memory: Some(8 << 20), weights, ..EngineConfig::default() }
}

#[tokio::test]
async fn packed_weights_give_the_same_answers_to_the_last_bit() {
    let _metrics = athanor_telemetry::metrics();
    let set = InstructionSet::best().expect("the tests need AVX2");
    for family in ["llama", "mistral", "qwen2", "qwen3"] {
        for bits in [Bits::Sixteen, Bits::Eight, Bits::Four] {
            let path = folder(family);
            let load = || PackedGenerator::load(&path, &config(Weights::Int8), BATCH, 2, (bits, set)).unwrap();
            compare(load, &format!("seeds-{family}-{bits:?}"), |found, expected| found == expected).await;
        }
    }
}

/// The tiny models' texts are the same; their log-probabilities need not be.
#[tokio::test]
async fn fp32_over_libtorch_gives_the_same_texts() {
    let _metrics = athanor_telemetry::metrics();
    for family in ["gpt2", "llama", "qwen3"] {
        let load = || TorchGenerator::load(&folder(family), &config(Weights::FP32), BATCH, Device::Cpu).unwrap();
        let same = |found: &[Sampled], expected: &[Sampled]| {
            found.iter().map(|one| one.token).eq(expected.iter().map(|one| one.token))
        };
        compare(load, &format!("seeds-{family}-fp32"), same).await;
    }
}

/// Computed alone and without a cached prefix, an answer is the same to the last bit in each format.
#[tokio::test]
async fn an_answer_computed_alone_is_the_same_each_time() {
    for weights in [Weights::FP32, Weights::BF16] {
        for family in ["gpt2", "llama"] {
            let mut found = Vec::new();
            for _ in 0..2 {
                let backend = TorchGenerator::load(&folder(family), &config(weights), BATCH, Device::Cpu).unwrap();
                found.push(answers(&start(backend, usize::MAX, "seeds-alone").0, 1).await);
            }
            assert!(found[0] == found[1], "{family}, {weights:?}");
        }
    }
}

/// Largest difference of logits in a batch of 16 from those alone, as a share of the largest logit. SmolLM2 over libtorch.
#[test]
fn logits_over_libtorch_depend_on_the_batch_by_little() {
    let models = PathBuf::from(std::env::var_os("ATHANOR_MODELS").expect("ATHANOR_MODELS, by `. scripts/env`"));
    let path = athanor_models::tokenizer::decoder::locate(&models.join("smollm2-135m")).unwrap();
    for (weights, tolerance) in [(Weights::FP32, 1e-4), (Weights::BF16, 0.05)] {
        let config = EngineConfig { kv_cache_memory: Some(64 << 20), ..config(weights) };
        let mut backend = TorchGenerator::load(&path, &config, BATCH, Device::Cpu).unwrap();
        let tokens: Vec<Vec<u32>> =
            (0..BATCH as u32).map(|row| (0..20 + row).map(|place| 1000 + row * 31 + place * 97).collect()).collect();
        let tables: Vec<Vec<u32>> = (0..BATCH as u32).map(|row| vec![row * 3, row * 3 + 1, row * 3 + 2]).collect();
        let row = |index: usize, from: usize, to: usize| Row {
            tokens: &tokens[index][from..to],
            start: from,
            blocks: &tables[index],
            logits: 1,
            targets: &[],
            top: 0,
            adapter: None,
        };
        let ends: Vec<usize> = tokens.iter().map(Vec::len).collect();
        // The last token of each is computed behind the others, as in a step of answers.
        let before: Vec<Row<'_>> = (0..BATCH).map(|index| row(index, 0, ends[index] - 1)).collect();
        backend.step(&before).unwrap();
        let last: Vec<Row<'_>> = (0..BATCH).map(|index| row(index, ends[index] - 1, ends[index])).collect();
        let together = backend.step(&last).unwrap();
        let mut most = 0.0_f32;
        for (one, together) in last.iter().zip(&together) {
            let alone = backend.step(std::slice::from_ref(one)).unwrap().remove(0);
            let (alone, together) = (&alone.logits[0], &together.logits[0]);
            let largest = alone.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
            let differences = alone.iter().zip(together.iter()).map(|(a, b)| (a - b).abs() / largest);
            most = differences.fold(most, f32::max);
        }
        println!("SmolLM2, {weights:?}: a batch changes logits by at most {most:e} of the largest");
        assert!(most < tolerance, "{weights:?}: {most}");
    }
}
