//! The engine over real decoders: tiny random ones (`models/tests/golden/decoders`) and SmolLM2.

use std::{collections::BTreeMap, path::PathBuf};

use athanor_serving::engine::generate::{
    Engine, Event, GenerateRequest,
    sampling::{Sampling, logprobs},
    sequence::{FinishReason, Stopping},
};
use serde::Deserialize;

use super::*;

const FAMILIES: [&str; 5] = ["gpt2", "llama", "mistral", "qwen2", "qwen3"];

#[derive(Deserialize)]
struct Golden {
    rows: Vec<Vec<u32>>,
    models: BTreeMap<String, Expected>,
}

#[derive(Deserialize)]
struct Expected {
    /// The tokens that follow the first row.
    greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct RealGolden {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

fn goldens() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden")
}

fn golden() -> Golden {
    serde_json::from_slice(&std::fs::read(goldens().join("decoders/golden.json")).unwrap()).unwrap()
}

fn config(weights: Weights) -> EngineConfig {
    EngineConfig { kv_cache_memory: Some(8 << 20), weights, ..EngineConfig::default() }
}

fn load(family: &str, config: &EngineConfig) -> anyhow::Result<TorchGenerator> {
    TorchGenerator::load(&goldens().join("decoders").join(family), config, 8, Device::Cpu)
}

/// The tokens that follow each prompt, all of them at once.
async fn greedy(engine: &Engine, prompts: &[Vec<u32>], count: usize) -> Vec<Vec<u32>> {
    let submit = |prompt: &Vec<u32>| {
        let stopping = Stopping { max_tokens: count, min_tokens: 0, stop_tokens: Vec::new() };
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let request = GenerateRequest {
            prompt: prompt.clone(),
            choices: 1,
            sampling,
            stopping,
            constraint: None,
            prompt_logprobs: None,
            adapter: None,
        };
        let mut places = engine.reserve(1).unwrap();
        engine.submit(&mut places, request).unwrap().remove(0)
    };
    let choices: Vec<_> = prompts.iter().map(submit).collect();
    let mut found = Vec::new();
    for mut choice in choices {
        let mut tokens = Vec::new();
        while let Some(event) = choice.recv().await {
            match event.unwrap() {
                Event::Token(sampled) => tokens.push(sampled.token),
                Event::Finished(finished) => assert_eq!(finished.reason, FinishReason::Length),
                Event::Admitted { .. } | Event::Prompt(_) => {}
            }
        }
        found.push(tokens);
    }
    found
}

/// Starts an engine for 8 sequences and few tokens a step, so that it computes prompts in parts next to answers.
fn start(backend: TorchGenerator) -> Engine {
    let step = StepLimits { tokens: 20, sequences: 8 };
    Engine::start(backend, EngineLimits { queue: 64, wait: Duration::MAX, step }, "tiny").unwrap()
}

#[tokio::test]
async fn a_batch_answers_as_its_members_do_and_as_transformers_does() {
    let golden = golden();
    for family in FAMILIES {
        let expected = &golden.models[family].greedy;
        let single = start(load(family, &config(Weights::FP32)).unwrap());
        let batched = start(load(family, &config(Weights::FP32)).unwrap());
        let together = greedy(&batched, &golden.rows, expected.len()).await;
        assert_eq!(&together[0], expected, "{family}");
        for (prompt, tokens) in golden.rows.iter().zip(&together) {
            assert_eq!(&greedy(&single, std::slice::from_ref(prompt), expected.len()).await[0], tokens, "{family}");
        }
    }
}

#[tokio::test]
async fn a_cache_without_room_for_all_changes_no_answer() {
    let golden = golden();
    let whole = load("llama", &config(Weights::FP32)).unwrap();
    let block = BLOCK * whole.model.cache_shape().slot_bytes(Kind::Float);
    let most = golden.rows.iter().map(Vec::len).max().unwrap() + 64;
    let tight =
        EngineConfig { kv_cache_memory: Some((block * (most.div_ceil(BLOCK) + 2)) as u64), ..config(Weights::FP32) };
    let tight = load("llama", &tight).unwrap();
    assert_eq!(tight.limits.blocks, most.div_ceil(BLOCK) + 2);
    let expected = greedy(&start(whole), &golden.rows, 64).await;
    assert_eq!(greedy(&start(tight), &golden.rows, 64).await, expected);
}

/// Logits of a prompt's last token.
fn logits(backend: &mut TorchGenerator, prompt: &[u32]) -> Vec<f32> {
    let blocks: Vec<u32> = (0..prompt.len().div_ceil(BLOCK) as u32).collect();
    let row = Row { tokens: prompt, start: 0, blocks: &blocks, logits: 1, targets: &[], top: 0, adapter: None };
    backend.step(&[row]).unwrap().remove(0).logits[0].to_vec()
}

#[test]
fn log_probabilities_of_a_prompt_are_those_of_its_logits() {
    let mut backend = load("llama", &config(Weights::FP32)).unwrap();
    let vocabulary = backend.limits.vocabulary as u32;
    // More than are computed at a time.
    let prompt: Vec<u32> = (0..SCORED_TOKENS as u32 + 6).map(|index| index * 7 % vocabulary).collect();
    let blocks: Vec<u32> = (0..prompt.len().div_ceil(BLOCK) as u32).collect();
    let row =
        Row { tokens: &prompt, start: 0, blocks: &blocks, logits: 0, targets: &prompt[1..], top: 3, adapter: None };
    let found = backend.step(&[row]).unwrap().remove(0);
    assert!(found.logits.is_empty());
    assert_eq!(found.targets.len(), prompt.len() - 1);
    for (end, found) in (1..).zip(&found.targets) {
        let expected = logprobs(&logits(&mut backend, &prompt[..end]), prompt[end] as usize, 3);
        assert!((found.chosen - expected.chosen).abs() < 1e-4, "{end}: {found:?}, {expected:?}");
        assert_eq!(found.top.len(), 3);
        for ((_, found), (_, expected)) in found.top.iter().zip(&expected.top) {
            assert!((found - expected).abs() < 1e-4, "{end}: {found}, {expected}");
        }
    }
    let row = Row { tokens: &[1, 2], start: 0, blocks: &[0], logits: 1, targets: &[2], top: 0, adapter: None };
    let found = backend.step(&[row]).unwrap().remove(0);
    assert_eq!((found.logits[0].len(), found.targets[0].top.len()), (vocabulary as usize, 0));
}

#[test]
fn weights_of_fewer_bits_give_nearly_the_same_logits() {
    let prompt = &golden().rows[0];
    for family in FAMILIES {
        let exact = logits(&mut load(family, &config(Weights::FP32)).unwrap(), prompt);
        let largest = exact.iter().fold(0_f32, |most, value| most.max(value.abs()));
        for (weights, tolerance) in [(Weights::BF16, 0.05), (Weights::Int8, 0.1)] {
            let found = logits(&mut load(family, &config(weights)).unwrap(), prompt);
            let error = found.iter().zip(&exact).fold(0_f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(error > 0.0 && error < tolerance * largest, "{family}, {weights:?}: {error} of {largest}");
        }
    }
}

#[test]
fn a_failed_step_is_an_error_and_the_next_one_works() {
    let mut backend = load("llama", &config(Weights::FP32)).unwrap();
    let expected = logits(&mut backend, &[1, 2, 3]);
    let outside = [backend.limits.vocabulary as u32];
    let row = Row { tokens: &outside, start: 0, blocks: &[0], logits: 1, targets: &[], top: 0, adapter: None };
    let error = backend.step(&[row]).unwrap_err();
    assert!(!error.0.is_empty() && !error.0.contains('\n'), "{error}");
    assert_eq!(logits(&mut backend, &[1, 2, 3]), expected);
}

#[test]
fn the_configuration_bounds_length_and_memory() {
    let own = load("llama", &config(Weights::Auto)).unwrap();
    let limited = EngineConfig { max_model_length: Some(40), ..config(Weights::FP32) };
    assert_eq!(load("llama", &limited).unwrap().limits.max_length, 40);
    assert_eq!(load("llama", &limited).unwrap().limits.blocks, 3 * 8, "no more than 8 sequences can fill");
    let longer = EngineConfig { max_model_length: Some(1 << 20), ..config(Weights::FP32) };
    assert_eq!(load("llama", &longer).unwrap().limits.max_length, own.limits.max_length);
    let nothing = EngineConfig { kv_cache_memory: Some(100), ..config(Weights::FP32) };
    let error = load("llama", &nothing).err().unwrap().to_string();
    assert!(error.contains("engine.kvCacheMemory") && error.contains("100 bytes"), "{error}");
    assert!(format(Weights::Int8, Device::Cuda(0)).is_err());
}

#[tokio::test]
async fn smollm2_has_the_greedy_text_of_transformers() {
    let golden: RealGolden =
        serde_json::from_slice(&std::fs::read(goldens().join("smollm2-logits.json")).unwrap()).unwrap();
    let models = PathBuf::from(std::env::var_os("ATHANOR_MODELS").expect("ATHANOR_MODELS, by `. scripts/env`"));
    let path = athanor_models::tokenizer::decoder::locate(&models.join("smollm2-135m")).unwrap();
    let config = EngineConfig { kv_cache_memory: Some(64 << 20), ..config(Weights::FP32) };
    let engine = start(TorchGenerator::load(&path, &config, 8, Device::Cpu).unwrap());
    // The same prompt three times: the prefix is shared, and the steps are batches.
    let prompts = vec![golden.prompt.clone(); 3];
    for tokens in greedy(&engine, &prompts, golden.greedy.len()).await {
        assert_eq!(tokens, golden.greedy);
    }
}
