//! Packed decoders: tiny random ones (`models/tests/golden/decoders`) and SmolLM2, next to the same models over libtorch.

use std::path::PathBuf;

use tch::Device;

use super::*;
use crate::generate::TorchGenerator;

const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

fn folder(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden/decoders").join(family)
}

fn config(weights: Weights) -> EngineConfig {
    EngineConfig { kv_cache_memory: Some(8 << 20), weights, ..EngineConfig::default() }
}

fn packed(path: &Path, bits: Bits, instruction_set: InstructionSet, threads: usize) -> PackedGenerator {
    PackedGenerator::load(path, &config(Weights::Int8), 8, threads, (bits, instruction_set)).unwrap()
}

pub(crate) fn instruction_sets() -> Vec<InstructionSet> {
    let best = InstructionSet::best().expect("the tests need AVX2");
    let all = [InstructionSet::Avx2, InstructionSet::Avx512, InstructionSet::Avx512Bf16];
    all.into_iter().filter(|set| *set <= best).collect()
}

fn row<'a>(tokens: &'a [u32], start: usize, blocks: &'a [u32]) -> Row<'a> {
    Row { tokens, start, blocks, logits: 1, targets: &[], top: 0, adapter: None }
}

/// Logits behind `tokens`, computed `chunk` tokens a step, stored in the blocks from `block` on.
fn logits(backend: &mut impl GenerateBackend, tokens: &[u32], chunk: usize, block: u32) -> Vec<f32> {
    let blocks: Vec<u32> = (block..block + tokens.len().div_ceil(16) as u32).collect();
    let mut last = Vec::new();
    for (index, part) in tokens.chunks(chunk).enumerate() {
        let row = row(part, index * chunk, &blocks);
        last = backend.step(&[row]).unwrap().remove(0).logits[0].to_vec();
    }
    last
}

/// Largest difference, as a share of the largest logit.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    std::iter::zip(a, b).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

fn tokens(count: u32, vocabulary: usize) -> Vec<u32> {
    (0..count).map(|index| (index * 37 + 11) % vocabulary as u32).collect()
}

#[test]
fn packed_families_are_near_libtorch() {
    for family in FAMILIES {
        let mut exact = TorchGenerator::load(&folder(family), &config(Weights::FP32), 8, Device::Cpu).unwrap();
        let tokens = tokens(40, exact.limits().vocabulary);
        let expected = logits(&mut exact, &tokens, 64, 0);
        for set in instruction_sets() {
            // Random weights are spread widely, so rounding costs more than in trained models.
            for (bits, tolerance) in [(Bits::Sixteen, 0.05), (Bits::Eight, 0.1), (Bits::Four, 0.5)] {
                let found = logits(&mut packed(&folder(family), bits, set, 2), &tokens, 64, 0);
                let far = distance(&found, &expected);
                assert!(far < tolerance, "{family} {bits:?} {set:?}: {far}");
            }
        }
    }
}

/// To the last bit: the same tokens at once, in parts, one by one, with other rows and with another number of threads.
#[test]
fn a_result_does_not_depend_on_its_batch() {
    for set in instruction_sets() {
        for bits in [Bits::Sixteen, Bits::Eight, Bits::Four] {
            let mut backend = packed(&folder("qwen2"), bits, set, 2);
            let tokens = tokens(45, backend.limits().vocabulary);
            let alone = logits(&mut backend, &tokens, 64, 0);
            assert!(alone.iter().all(|logit| logit.is_finite()));
            for chunk in [1, 7, 16, 33] {
                assert_eq!(logits(&mut backend, &tokens, chunk, 7), alone, "{set:?} {bits:?} in parts of {chunk}");
            }
            let mut one_thread = packed(&folder("qwen2"), bits, set, 1);
            assert_eq!(logits(&mut one_thread, &tokens, 64, 0), alone, "{set:?} {bits:?} on one thread");
            let tables: Vec<Vec<u32>> = (0..5).map(|row| (row * 3..row * 3 + 3).collect()).collect();
            let others: Vec<Vec<u32>> = (0..5).map(|row| tokens[row * 4..].to_vec()).collect();
            let rows: Vec<Row<'_>> =
                std::iter::zip(&others, &tables).map(|(tokens, blocks)| row(tokens, 0, blocks)).collect();
            assert_eq!(*backend.step(&rows).unwrap()[0].logits[0], *alone, "{set:?} {bits:?} with other rows");
        }
    }
}

/// To the last bit: tokens that are proposed have the logits of steps of their own, and wrong ones change nothing later.
#[test]
fn logits_of_proposed_tokens_are_those_of_single_steps() {
    for set in instruction_sets() {
        for bits in [Bits::Sixteen, Bits::Eight, Bits::Four] {
            let mut backend = packed(&folder("qwen2"), bits, set, 2);
            assert!(backend.checks_proposals());
            let tokens = tokens(45, backend.limits().vocabulary);
            let single = |backend: &mut PackedGenerator, start: usize, blocks: &[u32]| -> Vec<Vec<f32>> {
                let step = |place| backend.step(&[row(&tokens[place..=place], place, blocks)]).unwrap().remove(0);
                (start..45).map(step).map(|output| output.logits[0].to_vec()).collect()
            };
            backend.step(&[row(&tokens[..30], 0, &[0, 1, 2])]).unwrap();
            let expected = single(&mut backend, 30, &[0, 1, 2]);
            for count in [2, 3, 5, 15] {
                backend.step(&[row(&tokens[..30], 0, &[3, 4, 5])]).unwrap();
                let other = [7, 7];
                // The first proposed token is right, the others are wrong.
                let mut proposed = vec![9; count];
                proposed[..2].copy_from_slice(&tokens[30..32]);
                let wrong = Row { logits: count, ..row(&proposed, 30, &[3, 4, 5]) };
                let found = backend.step(&[wrong, row(&other, 0, &[6])]).unwrap();
                assert_eq!((found[0].logits.len(), found[1].logits.len()), (count, 1));
                for (place, expected) in expected.iter().take(2).enumerate() {
                    assert_eq!(*found[0].logits[place], **expected, "{set:?} {bits:?} {count}, {place}");
                }
                let rest = &tokens[32..][..count.min(13)];
                let right = Row { logits: rest.len(), ..row(rest, 32, &[3, 4, 5]) };
                let found = backend.step(&[right]).unwrap().remove(0).logits;
                for (found, expected) in found.iter().zip(&expected[2..]) {
                    assert_eq!(**found, **expected, "{set:?} {bits:?} {count}");
                }
            }
        }
    }
    let off = EngineConfig { speculation: Speculation::Disabled, ..config(Weights::Int8) };
    let off = PackedGenerator::load(&folder("qwen2"), &off, 8, 1, (Bits::Eight, InstructionSet::Avx2)).unwrap();
    assert!(!off.checks_proposals());
}

/// Those of a prompt are the ones that its tokens would have as answers, whatever they are computed with.
#[test]
fn log_probabilities_of_a_prompt_are_those_of_its_logits() {
    let mut backend = packed(&folder("llama"), Bits::Four, InstructionSet::Avx2, 2);
    let tokens = tokens(100, backend.limits().vocabulary);
    let blocks: Vec<u32> = (0..7).collect();
    let targets = &tokens[1..];
    let scored = Row { targets, top: 2, ..row(&tokens[..99], 0, &blocks) };
    let found = backend.step(&[scored, row(&tokens[..5], 0, &[7])]).unwrap();
    assert_eq!(found[0].targets.len(), 99);
    for place in [0, 63, 64, 98] {
        let logits = logits(&mut backend, &tokens[..=place], 16, 8);
        let expected = sampling::logprobs(&logits, tokens[place + 1] as usize, 2);
        assert_eq!(found[0].targets[place], expected, "token {place}");
    }
    assert_eq!(*found[0].logits[0], *logits(&mut backend, &tokens[..99], 16, 8));
    assert_eq!(*found[1].logits[0], *logits(&mut backend, &tokens[..5], 16, 8));
}

#[test]
fn rows_that_cannot_be_computed_are_errors() {
    let mut backend = packed(&folder("llama"), Bits::Eight, InstructionSet::Avx2, 1);
    let vocabulary = backend.limits().vocabulary as u32;
    for (tokens, start, blocks, part) in [
        (vec![vocabulary], 0, vec![0], "vocabulary"),
        (vec![1; 17], 0, vec![0], "positions"),
        (vec![1], 0, vec![1 << 30], "block"),
        (vec![], 0, vec![0], "no token"),
    ] {
        let error = backend.step(&[row(&tokens, start, &blocks)]).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// A GGUF file of four bits keeps its numbers: the packed model answers as the exact one nearly always.
#[test]
fn smollm2_answers_as_over_libtorch() {
    let Some(models) = std::env::var_os("ATHANOR_MODELS") else {
        panic!("ATHANOR_MODELS is not set: run `make setup` and `. scripts/env`");
    };
    let path = athanor_models::tokenizer::decoder::locate(&PathBuf::from(models).join("smollm2-135m")).unwrap();
    let config = EngineConfig { kv_cache_memory: Some(64 << 20), ..config(Weights::FP32) };
    let mut exact = TorchGenerator::load(&path, &config, 1, Device::Cpu).unwrap();
    let tokens: Vec<u32> = (0..60).map(|index| 1000 + index * 97).collect();
    let expected = logits(&mut exact, &tokens, 64, 0);
    drop(exact);
    for (weights, tolerance) in [(Weights::Auto, 0.02), (Weights::Int4, 0.05)] {
        let (bits, set) = PackedGenerator::bits(&path, weights).unwrap().unwrap();
        let mut backend = PackedGenerator::load(&path, &config, 1, 2, (bits, set)).unwrap();
        let far = distance(&logits(&mut backend, &tokens, 64, 0), &expected);
        assert!(far < tolerance, "{weights:?}: {far}");
    }
}
