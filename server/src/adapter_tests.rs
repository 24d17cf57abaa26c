//! Adapters of tiny random decoders (`models/tests/golden/decoders`) over both backends.

use std::path::PathBuf;

use athanor_contract::serve::{EngineConfig, Weights};
use athanor_cpu::InstructionSet;
use athanor_models::{CausalLanguageModel, CausalOptions, packed::Bits};
use athanor_serving::engine::backend::{AdapterId, GenerateBackend, Row};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::Device;

use super::*;
use crate::{
    generate::TorchGenerator,
    packed::{PackedGenerator, tests::instruction_sets},
};

const PACKED: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];
const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden/decoders").join(name)
}

fn config(weights: Weights) -> EngineConfig {
    EngineConfig { kv_cache_memory: Some(8 << 20), weights, ..EngineConfig::default() }
}

fn torch(path: &Path, weights: Weights) -> TorchGenerator {
    TorchGenerator::load(path, &config(weights), 8, Device::Cpu).unwrap()
}

fn packed(family: &str, bits: Bits, set: InstructionSet, threads: usize) -> PackedGenerator {
    PackedGenerator::load(&folder(family), &config(Weights::Int8), 8, threads, (bits, set)).unwrap()
}

/// An adapter of some modules of both layers, whose products are about half as large as the model's own.
fn random(family: &str, modules: &[&str], rank: usize, seed: u64) -> AdapterWeights {
    let config = std::fs::read(folder(family).join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let size = |name: &str| config[name].as_u64().map(|size| size as usize);
    let (hidden, inner, heads) =
        (size("hidden_size").unwrap(), size("intermediate_size").unwrap(), size("num_attention_heads").unwrap());
    let d = size("head_dim").unwrap_or(hidden / heads);
    let (queries, keys) = (heads * d, size("num_key_value_heads").unwrap() * d);
    let mut random = StdRng::seed_from_u64(seed);
    let mut uniform = |count: usize, most: f64| -> Vec<f32> {
        (0..count).map(|_| ((random.random::<f64>() * 2.0 - 1.0) * most) as f32).collect()
    };
    let mut found = Vec::new();
    for layer in 0..2 {
        for module in modules {
            let (inputs, outputs) = match *module {
                "self_attn.q_proj" => (hidden, queries),
                "self_attn.k_proj" | "self_attn.v_proj" => (hidden, keys),
                "self_attn.o_proj" => (queries, hidden),
                "mlp.gate_proj" | "mlp.up_proj" => (hidden, inner),
                _ => (inner, hidden),
            };
            found.push(LowRank {
                module: format!("model.layers.{layer}.{module}"),
                rank,
                a: uniform(rank * inputs, (3.0 / inputs as f64).sqrt()),
                b: uniform(outputs * rank, (3.0 / rank as f64).sqrt()),
                scale: 0.6,
            });
        }
    }
    AdapterWeights { modules: found }
}

fn row<'a>(tokens: &'a [u32], start: usize, blocks: &'a [u32], adapter: Option<u64>) -> Row<'a> {
    let adapter = adapter.map(AdapterId);
    Row { tokens, start, blocks, logits: 1, targets: &[], top: 0, adapter }
}

/// Logits behind `tokens`, computed `chunk` tokens a step, stored in the blocks from `block` on.
fn logits(
    backend: &mut impl GenerateBackend,
    tokens: &[u32],
    adapter: Option<u64>,
    (chunk, block): (usize, u32),
) -> Vec<f32> {
    let blocks: Vec<u32> = (block..block + tokens.len().div_ceil(16) as u32).collect();
    let mut last = Vec::new();
    for (index, part) in tokens.chunks(chunk).enumerate() {
        last = backend.step(&[row(part, index * chunk, &blocks, adapter)]).unwrap().remove(0).logits[0].to_vec();
    }
    last
}

/// Largest difference.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    std::iter::zip(a, b).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()))
}

/// Largest difference, as a share of the largest logit.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    difference(a, b) / b.iter().fold(0.0_f32, |most, value| most.max(value.abs()))
}

fn tokens(count: u32) -> Vec<u32> {
    (0..count).map(|index| (index * 37 + 11) % 200).collect()
}

#[test]
fn a_model_with_an_adapter_answers_as_the_merged_model() {
    for name in ["qwen2", "gpt2"] {
        let adapter = folder(&format!("{name}-adapter"));
        let options = CausalOptions { lora: Some(lora::options(&adapter).unwrap()), ..CausalOptions::default() };
        let mut merged = CausalLanguageModel::load(&folder(name), &options).unwrap();
        merged.load_adapter(&adapter).unwrap();
        let to = tempfile::tempdir().unwrap();
        merged.save(to.path()).unwrap();
        let tokens: Vec<u32> = tokens(40).into_iter().map(|token| token % 100).collect();
        let mut merged = torch(to.path(), Weights::FP32);
        let mut adapted = torch(&folder(name), Weights::FP32);
        let own = logits(&mut adapted, &tokens, None, (64, 0));
        adapted.load_adapter(AdapterId(3), read(&adapter).unwrap()).unwrap();
        let expected = logits(&mut merged, &tokens, None, (64, 0));
        for chunk in [64, 7] {
            let found = logits(&mut adapted, &tokens, Some(3), (chunk, 0));
            assert!(difference(&found, &expected) < 1e-3, "{name}: {}", difference(&found, &expected));
        }
        assert!(difference(&own, &expected) > 1e-2, "{name}: the adapter changes nothing");
        assert!(difference(&logits(&mut adapted, &tokens, None, (64, 0)), &own) < 1e-4, "{name}");
        // Both, and another prompt, in one step.
        let blocks: Vec<[u32; 3]> = [[0, 1, 2], [3, 4, 5], [6, 7, 8]].into();
        let rows = [
            row(&tokens, 0, &blocks[0], None),
            row(&tokens[..21], 0, &blocks[1], Some(3)),
            row(&tokens, 0, &blocks[2], Some(3)),
        ];
        let found = adapted.step(&rows).unwrap();
        assert!(difference(&found[0].logits[0], &own) < 1e-3, "{name}");
        assert!(difference(&found[2].logits[0], &expected) < 1e-3, "{name}");
    }
}

#[test]
fn bf16_computes_adapters_as_well() {
    let tokens = tokens(30);
    let weights = random("llama", &MODULES, 4, 1);
    let mut exact = torch(&folder("llama"), Weights::FP32);
    let mut half = torch(&folder("llama"), Weights::BF16);
    for backend in [&mut exact, &mut half] {
        backend.load_adapter(AdapterId(0), weights.clone()).unwrap();
    }
    let expected = logits(&mut exact, &tokens, Some(0), (64, 0));
    let far = distance(&logits(&mut half, &tokens, Some(0), (64, 0)), &expected);
    assert!(far > 0.0 && far < 0.15, "{far}");
}

#[test]
fn packed_decoders_with_adapters_are_near_libtorch() {
    let tokens = tokens(40);
    for family in PACKED {
        // All layers, and some of them; ranks below, at and above those of a tile.
        for (modules, rank) in [(&MODULES[..], 4), (&MODULES[..], 21), (&["self_attn.q_proj", "mlp.up_proj"][..], 16)] {
            let weights = random(family, modules, rank, 7);
            let mut exact = torch(&folder(family), Weights::FP32);
            let own = logits(&mut exact, &tokens, None, (64, 0));
            exact.load_adapter(AdapterId(0), weights.clone()).unwrap();
            let expected = logits(&mut exact, &tokens, Some(0), (64, 0));
            for set in instruction_sets() {
                for (bits, tolerance) in [(Bits::Sixteen, 0.1), (Bits::Eight, 0.2)] {
                    let mut backend = packed(family, bits, set, 2);
                    backend.load_adapter(AdapterId(0), weights.clone()).unwrap();
                    let far = distance(&logits(&mut backend, &tokens, Some(0), (64, 0)), &expected);
                    let changed = distance(&own, &expected);
                    let what = format!("{family} {bits:?} {set:?} rank {rank}");
                    assert!(far < tolerance && far < changed / 3.0, "{what}: {far}, changed {changed}");
                }
            }
        }
    }
}

/// To the last bit: with rows of other adapters and without any, in parts behind what the cache has, on one thread.
#[test]
fn a_row_with_an_adapter_does_not_depend_on_its_batch() {
    let tokens = tokens(45);
    for (set, bits, family) in instruction_sets().into_iter().flat_map(|set| {
        [
            (set, Bits::Sixteen, "qwen2"),
            (set, Bits::Eight, "mistral"),
            (set, Bits::Four, "qwen2"),
            (set, Bits::Four, "qwen3"),
        ]
    }) {
        let what = format!("{family} {bits:?} {set:?}");
        let weights = [random(family, &MODULES, 5, 1), random(family, &["self_attn.v_proj", "mlp.down_proj"], 20, 2)];
        let load = |threads| {
            let mut backend = packed(family, bits, set, threads);
            for (id, weights) in (0..).zip(&weights) {
                backend.load_adapter(AdapterId(id), weights.clone()).unwrap();
            }
            backend
        };
        let (mut backend, mut one_thread) = (load(2), load(1));
        let kinds = [None, Some(0), Some(1)];
        let alone = kinds.map(|adapter| logits(&mut backend, &tokens, adapter, (64, 0)));
        assert!(alone[0] != alone[1] && alone[1] != alone[2] && alone[0] != alone[2], "{what}");
        for (adapter, alone) in std::iter::zip(kinds, &alone) {
            for chunk in [1, 7, 16, 33] {
                let found = logits(&mut backend, &tokens, adapter, (chunk, 7));
                assert_eq!(&found, alone, "{what} {adapter:?} in parts of {chunk}");
            }
            assert_eq!(&logits(&mut one_thread, &tokens, adapter, (64, 0)), alone, "{what} {adapter:?} on one thread");
        }
        let tables: Vec<[u32; 3]> = (0..6).map(|row| [row * 3, row * 3 + 1, row * 3 + 2]).collect();
        for order in [[0, 1, 2, 0, 1, 2], [1, 1, 2, 2, 0, 0], [2, 1, 1, 1, 1, 1]] {
            // The second row has other tokens, so that the rows of a tile have other borders.
            let rows: Vec<Row<'_>> = (0..6)
                .map(|index| {
                    let length = if index == 1 { 13 } else { tokens.len() };
                    row(&tokens[..length], 0, &tables[index], kinds[order[index]])
                })
                .collect();
            let found = backend.step(&rows).unwrap();
            for index in [0, 2, 3, 4, 5] {
                assert_eq!(found[index].logits[0].to_vec(), alone[order[index]], "{what} {order:?} row {index}");
            }
        }
        // Log-probabilities of a prompt are computed with its adapter.
        let scored = Row { targets: &tokens[1..], ..row(&tokens[..44], 0, &tables[0], Some(1)) };
        let scored = backend.step(&[scored]).unwrap().remove(0);
        assert_eq!(scored.logits[0].to_vec(), logits(&mut backend, &tokens[..44], Some(1), (64, 9)), "{what}");
    }
}

type Change = fn(&mut LowRank);

#[test]
fn an_adapter_of_another_model_is_refused() {
    for packs in [false, true] {
        let mut backend: Box<dyn GenerateBackend> = match packs {
            true => Box::new(packed("llama", Bits::Eight, InstructionSet::Avx2, 1)),
            false => Box::new(torch(&folder("llama"), Weights::FP32)),
        };
        let good = random("llama", &MODULES, 4, 1);
        let before = backend.step(&[row(&[1, 2], 0, &[0], None)]).unwrap();
        let cases: [(Change, &str); 5] = [
            (|low| low.module = "model.layers.2.mlp.up_proj".into(), "model.layers.2.mlp.up_proj"),
            (|low| low.module = "model.layers.0.mlp.experts".into(), "model.layers.0.mlp.experts"),
            (|low| low.module = "transformer.h.0.attn.c_attn".into(), "transformer.h.0.attn.c_attn"),
            (|low| low.a.extend([0.0; 4]), ""),
            (|low| low.b.truncate(4), ""),
        ];
        for (change, part) in cases {
            let mut wrong = good.clone();
            change(&mut wrong.modules[3]);
            let error = backend.load_adapter(AdapterId(1), wrong).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(backend.step(&[row(&[1, 2], 0, &[0], None)]).unwrap(), before);
        backend.load_adapter(AdapterId(2), good).unwrap();
        let adapted = backend.step(&[row(&[1, 2], 0, &[0], Some(2))]).unwrap();
        assert_ne!(adapted, before);
        backend.unload_adapter(AdapterId(2));
        backend.unload_adapter(AdapterId(9));
        assert_eq!(backend.step(&[row(&[1, 2], 0, &[0], None)]).unwrap(), before);
    }
}

/// A copy of an adapter's folder with other settings.
fn with_settings(change: impl FnOnce(&mut serde_json::Value)) -> tempfile::TempDir {
    let (from, to) = (folder("qwen2-adapter"), tempfile::tempdir().unwrap());
    std::fs::copy(from.join(lora::WEIGHTS), to.path().join(lora::WEIGHTS)).unwrap();
    let mut settings: serde_json::Value =
        serde_json::from_slice(&std::fs::read(from.join(lora::CONFIG)).unwrap()).unwrap();
    change(&mut settings);
    std::fs::write(to.path().join(lora::CONFIG), settings.to_string()).unwrap();
    to
}

#[test]
fn settings_scale_an_adapter_or_refuse_it() {
    let plain = read(&folder("qwen2-adapter")).unwrap();
    assert_eq!((plain.modules.len(), plain.modules[0].rank, plain.modules[0].scale), (6, 4, 3.0));
    let scaled = read(with_settings(|settings| settings["use_rslora"] = true.into()).path()).unwrap();
    assert_eq!(scaled.modules[0].scale, 6.0);
    for (field, value) in [
        ("peft_type", serde_json::json!("IA3")),
        ("use_dora", serde_json::json!(true)),
        ("modules_to_save", serde_json::json!(["lm_head"])),
        ("rank_pattern", serde_json::json!({"q_proj": 8})),
        ("bias", serde_json::json!("all")),
    ] {
        let error = format!("{:#}", read(with_settings(|settings| settings[field] = value).path()).unwrap_err());
        assert!(error.contains(field) && error.contains(lora::CONFIG), "{error}");
    }
    let error = format!("{:#}", read(with_settings(|settings| settings["r"] = 8.into()).path()).unwrap_err());
    assert!(error.contains("the rank in adapter_config.json is 8") && error.contains("lora_A"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    assert!(format!("{:#}", read(empty.path()).unwrap_err()).contains(lora::CONFIG));
}
