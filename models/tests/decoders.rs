//! Tiny random decoders against transformers and peft (`golden/decoders/make.py`), FP32, rtol = atol = 1e-4 unless a test says
//! otherwise.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use athanor_models::{
    Batch, CachedRow, CausalLanguageModel, CausalOptions, KvCache,
    heads::causal::next_token_loss,
    load::{self, Weights},
    lora,
};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const FAMILIES: [&str; 5] = ["gpt2", "llama", "mistral", "qwen2", "qwen3"];
/// Slots for four sequences of 128 tokens.
const SLOTS: i64 = 512;

#[derive(Deserialize)]
struct Golden {
    rows: Vec<Vec<i64>>,
    models: BTreeMap<String, Expected>,
    adapters: BTreeMap<String, Expected>,
}

#[derive(Deserialize)]
struct Expected {
    /// For each row the logits of its first and its last token, every ninth column.
    logits: Vec<[Vec<f64>; 2]>,
    /// The 64 tokens that follow the first row.
    #[serde(default)]
    greedy: Vec<i64>,
    loss: f64,
    /// The norm, and some elements.
    gradients: BTreeMap<String, Vec<f64>>,
    /// Losses of 20 steps of AdamW.
    training: Vec<f64>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/decoders/golden.json")).unwrap()
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/decoders").join(name)
}

fn load(name: &str) -> CausalLanguageModel {
    CausalLanguageModel::load(&folder(name), &CausalOptions::default()).unwrap()
}

fn load_adapted(name: &str) -> CausalLanguageModel {
    let adapter = folder(&format!("{name}-adapter"));
    let options = CausalOptions { lora: Some(lora::options(&adapter).unwrap()), ..CausalOptions::default() };
    let mut model = CausalLanguageModel::load(&folder(name), &options).unwrap();
    model.load_adapter(&adapter).unwrap();
    model
}

fn packed(rows: &[Vec<i64>]) -> Batch {
    Batch::new(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), CPU)
}

fn hidden(model: &CausalLanguageModel, rows: &[Vec<i64>]) -> Tensor {
    tch::no_grad(|| model.forward(&packed(rows), None, false))
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.to_kind(Kind::Double).reshape([-1])).unwrap()
}

fn assert_close(what: &str, ours: &[f64], theirs: &[f64]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (a, b) in ours.iter().zip(theirs) {
        assert!((a - b).abs() <= 1e-4 + 1e-4 * b.abs(), "{what}: {a} is not {b}");
    }
}

fn assert_logits(what: &str, model: &CausalLanguageModel, rows: &[Vec<i64>], expected: &Expected) {
    let all = tch::no_grad(|| model.logits(&hidden(model, rows)));
    let mut at = 0;
    for (row, [first, last]) in rows.iter().zip(&expected.logits) {
        let end = at + row.len() as i64 - 1;
        for (place, theirs) in [(at, first), (end, last)] {
            let ours: Vec<f64> = numbers(&all.get(place)).into_iter().step_by(9).collect();
            assert_close(&format!("{what}, token {place}"), &ours, theirs);
        }
        at = end + 1;
    }
}

/// The next token of each, as make.py chooses them: none for a row's last token, and none that 5 divides.
fn targets(rows: &[Vec<i64>]) -> Tensor {
    let next = |row: &Vec<i64>| {
        let next = row[1..].iter().map(|&token| if token % 5 == 0 { -100 } else { token });
        next.chain([-100]).collect::<Vec<i64>>()
    };
    Tensor::from_slice(&rows.iter().flat_map(next).collect::<Vec<i64>>())
}

fn loss(model: &CausalLanguageModel, rows: &[Vec<i64>], chunk: i64) -> Tensor {
    let states = model.forward(&packed(rows), None, true);
    let found = model.next_token_loss(&states, &targets(rows), chunk).unwrap();
    found.sum / found.targets as f64
}

fn assert_gradients(what: &str, named: &[(String, Tensor)], expected: &Expected) {
    assert_eq!(named.len(), expected.gradients.len(), "{what}");
    for (name, tensor) in named {
        let theirs = expected.gradients.get(name).unwrap_or_else(|| panic!("{what}: no gradient of {name}"));
        let gradient = tensor.grad();
        let mut found = vec![gradient.norm().double_value(&[])];
        found.extend(numbers(&gradient).iter().take(28).step_by(7));
        assert_close(&format!("{what}, gradient of {name}"), &found, theirs);
    }
}

/// Losses of as many steps of AdamW (learning rate 0.001, decay 0.01) as make.py took.
fn train(model: &mut CausalLanguageModel, rows: &[Vec<i64>], steps: usize) -> Vec<f64> {
    model.set_trainable();
    let mut parameters: Vec<Tensor> = model.trainable().iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
    let mut moments: Vec<(Tensor, Tensor)> = parameters.iter().map(|p| (p.zeros_like(), p.zeros_like())).collect();
    (1..=steps as i32)
        .map(|step| {
            let loss = loss(model, rows, 16);
            parameters.iter_mut().for_each(Tensor::zero_grad);
            loss.backward();
            tch::no_grad(|| {
                for (p, (mean, square)) in parameters.iter_mut().zip(&mut moments) {
                    let gradient = p.grad();
                    *mean = &*mean * 0.9 + &gradient * 0.1;
                    *square = &*square * 0.999 + gradient.square() * 0.001;
                    let root = square.sqrt() / (1.0 - 0.999_f64.powi(step)).sqrt() + 1e-8;
                    let update = &*mean / root * (0.001 / (1.0 - 0.9_f64.powi(step)));
                    let next = &*p * (1.0 - 0.001 * 0.01) - update;
                    p.copy_(&next);
                }
            });
            loss.double_value(&[])
        })
        .collect()
}

fn cache(model: &CausalLanguageModel) -> KvCache {
    KvCache::new(model.cache_shape(), SLOTS, Kind::Float, CPU)
}

/// Slots of the first `length` tokens of one of four sequences, scattered over the cache.
fn slots(sequence: usize, length: usize) -> Vec<i64> {
    (0..length).map(|token| ((token * 4 + sequence) as i64 * 7 + 3) % SLOTS).collect()
}

#[test]
fn logits_losses_and_gradients_are_those_of_transformers() {
    let golden = golden();
    assert_eq!(golden.models.len(), FAMILIES.len());
    for (name, expected) in &golden.models {
        let mut model = load(name);
        assert_logits(name, &model, &golden.rows, expected);
        model.set_trainable();
        let loss = loss(&model, &golden.rows, 16);
        assert_close(name, &numbers(&loss), &[expected.loss]);
        loss.backward();
        assert_gradients(name, model.parameters(), expected);
    }
}

#[test]
fn twenty_steps_of_training_have_the_losses_of_plain_pytorch() {
    let golden = golden();
    for (name, expected) in &golden.models {
        let losses = train(&mut load(name), &golden.rows, expected.training.len());
        assert_close(name, &losses, &expected.training);
        assert!(losses[19] < losses[0], "{name}: {losses:?}");
    }
}

#[test]
fn greedy_text_is_that_of_transformers_with_and_without_a_cache() {
    let golden = golden();
    for (name, expected) in &golden.models {
        let model = load(name);
        let prompt = &golden.rows[0];
        for cached in [false, true] {
            let (mut ids, mut stored, mut cache) = (prompt.clone(), 0, cache(&model));
            while ids.len() < prompt.len() + expected.greedy.len() {
                let all = slots(1, ids.len());
                let row = CachedRow { new: &ids[stored..], slots: &all };
                let batch = if cached { Batch::cached(&[row], CPU) } else { Batch::new(&[&ids], CPU) };
                let next = tch::no_grad(|| {
                    let states = model.forward(&batch, cached.then_some(&mut cache), false);
                    model.logits(&states.index_select(0, &batch.last_rows())).argmax(-1, false).int64_value(&[0])
                });
                stored = ids.len();
                ids.push(next);
            }
            assert_eq!(ids[prompt.len()..], expected.greedy, "{name}, cached: {cached}");
        }
    }
}

#[test]
fn chunks_of_prompts_and_single_tokens_share_a_forward_pass() {
    let golden = golden();
    // Tokens of each row that a pass takes: two and seven of a prompt, one as in decoding.
    let takes = [2, 1, 7, 1];
    for name in FAMILIES {
        let model = load(name);
        let mut cache = cache(&model);
        let mut found: Vec<Vec<Tensor>> = golden.rows.iter().map(|_| Vec::new()).collect();
        let mut stored = vec![0; golden.rows.len()];
        loop {
            let open: Vec<usize> = (0..stored.len()).filter(|&row| stored[row] < golden.rows[row].len()).collect();
            if open.is_empty() {
                break;
            }
            let ends: Vec<usize> =
                open.iter().map(|&row| (stored[row] + takes[row]).min(golden.rows[row].len())).collect();
            let all: Vec<Vec<i64>> = open.iter().zip(&ends).map(|(&row, &end)| slots(row, end)).collect();
            let rows: Vec<CachedRow<'_>> = (0..open.len())
                .map(|place| {
                    let row = open[place];
                    CachedRow { new: &golden.rows[row][stored[row]..ends[place]], slots: &all[place] }
                })
                .collect();
            let batch = Batch::cached(&rows, CPU);
            let states = tch::no_grad(|| model.forward(&batch, Some(&mut cache), false));
            let mut at = 0;
            for (place, &row) in open.iter().enumerate() {
                let length = batch.lengths()[place];
                found[row].push(states.narrow(0, at, length));
                at += length;
                stored[row] = ends[place];
            }
        }
        let found = Tensor::cat(&found.into_iter().map(|parts| Tensor::cat(&parts, 0)).collect::<Vec<_>>(), 0);
        assert_close(name, &numbers(&found), &numbers(&hidden(&model, &golden.rows)));
    }
}

#[test]
fn a_packed_sequence_is_the_sequence_alone() {
    let golden = golden();
    for name in FAMILIES {
        let model = load(name);
        let together = hidden(&model, &golden.rows);
        let mut at = 0;
        for row in &golden.rows {
            let length = row.len() as i64;
            let alone = hidden(&model, std::slice::from_ref(row));
            assert_close(name, &numbers(&together.narrow(0, at, length)), &numbers(&alone));
            at += length;
        }
    }
}

#[test]
fn no_token_sees_a_later_one_or_another_sequence() {
    let golden = golden();
    for name in FAMILIES {
        let model = load(name);
        let before = hidden(&model, &golden.rows);
        let mut changed = golden.rows.clone();
        changed[2][30] += 1;
        let after = hidden(&model, &changed);
        let is_same = |at: usize| before.get(at as i64) == after.get(at as i64);
        let first = golden.rows[0].len() + golden.rows[1].len();
        let all = first + golden.rows[2].len() + golden.rows[3].len();
        let (own, next) = (first + 30, first + golden.rows[2].len());
        assert!((0..own).all(is_same), "{name}: an earlier token sees it");
        assert!(!is_same(own) && !is_same(own + 1), "{name}: the token and the next see it");
        assert!((next..all).all(is_same), "{name}: another sequence sees it");
        // Two layers of a window of 8 reach 14 tokens back.
        assert!(!is_same(next - 1), "{name}: the last token sees it");
    }
}

#[test]
fn a_sliding_window_hides_what_is_before_it() {
    let golden = golden();
    for (name, is_windowed) in [("mistral", true), ("llama", false)] {
        let model = load(name);
        let row = golden.rows[2].clone();
        let mut changed = row.clone();
        changed[0] += 1;
        let [before, after] = [row, changed].map(|row| hidden(&model, &[row]));
        let is_same = |at: i64| before.get(at) == after.get(at);
        assert!(!is_same(14), "{name}: two windows of 8 overlap in a token");
        assert_eq!(is_same(15), is_windowed, "{name}");
    }
}

/// Writes a model as two files with an index.
fn shard(name: &str, to: &Path) {
    std::fs::copy(folder(name).join("config.json"), to.join("config.json")).unwrap();
    let model = load(name);
    let (first, second) = model.parameters().split_at(model.parameters().len() / 2);
    let mut map = BTreeMap::new();
    for (file, part) in [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)] {
        load::save(&to.join(file), part).unwrap();
        map.extend(part.iter().map(|(name, _)| (name.clone(), file)));
    }
    write_index(to, &map);
}

fn write_index(to: &Path, map: &BTreeMap<String, &str>) {
    let index = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map});
    std::fs::write(to.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn shards_are_the_single_file() {
    let golden = golden();
    for name in ["gpt2", "llama"] {
        let to = tempfile::tempdir().unwrap();
        shard(name, to.path());
        let model = CausalLanguageModel::load(to.path(), &CausalOptions::default()).unwrap();
        assert_eq!(hidden(&model, &golden.rows), hidden(&load(name), &golden.rows), "{name}");

        let fails = |map: &[(&str, &'static str)]| {
            write_index(to.path(), &map.iter().map(|&(tensor, file)| (tensor.to_owned(), file)).collect());
            CausalLanguageModel::load(to.path(), &CausalOptions::default()).err().unwrap().to_string()
        };
        let error = fails(&[("nothing.weight", "model-00001-of-00002.safetensors")]);
        assert!(error.contains("nothing.weight") && error.contains("model-00001-of-00002"), "{error}");
        let error = fails(&[("a", "../model.safetensors")]);
        assert!(error.contains("not the name of a file in the folder"), "{error}");
    }
}

#[test]
fn a_saved_model_is_read_back_in_its_kind() {
    let golden = golden();
    for name in FAMILIES {
        let exact = hidden(&load(name), &golden.rows);
        for (kind, tolerance) in [(Kind::Float, 0.0), (Kind::BFloat16, 0.2)] {
            let to = tempfile::tempdir().unwrap();
            let options = CausalOptions { kind: Some(kind), ..CausalOptions::default() };
            CausalLanguageModel::load(&folder(name), &options).unwrap().save(to.path()).unwrap();
            let again = CausalLanguageModel::load(to.path(), &CausalOptions::default()).unwrap();
            assert!(again.parameters().iter().all(|(_, tensor)| tensor.kind() == kind), "{name}");
            let found = hidden(&again, &golden.rows);
            assert_eq!(found.kind(), kind, "{name}");
            let apart = (found.to_kind(Kind::Float) - &exact).norm() / exact.norm();
            assert!(apart.double_value(&[]) <= tolerance, "{name} {kind:?}: {apart}");
        }
    }
}

#[test]
fn adapters_compute_and_train_as_peft_does() {
    let golden = golden();
    for (name, expected) in &golden.adapters {
        let mut model = load_adapted(name);
        assert_logits(name, &model, &golden.rows, expected);
        model.set_trainable();
        let loss = loss(&model, &golden.rows, 16);
        assert_close(name, &numbers(&loss), &[expected.loss]);
        loss.backward();
        assert_gradients(name, model.trainable(), expected);
        assert!(model.parameters().iter().all(|(_, tensor)| !tensor.requires_grad()), "{name}: the base is frozen");
        let losses = train(&mut load_adapted(name), &golden.rows, expected.training.len());
        assert_close(name, &losses, &expected.training);
    }
}

#[test]
fn adapters_are_merged_and_read_back() {
    let golden = golden();
    for (name, expected) in &golden.adapters {
        let model = load_adapted(name);
        let to = tempfile::tempdir().unwrap();
        model.save(to.path()).unwrap();
        let merged = CausalLanguageModel::load(to.path(), &CausalOptions::default()).unwrap();
        assert_logits(&format!("{name}, merged"), &merged, &golden.rows, expected);

        model.save_adapter(to.path()).unwrap();
        let options = lora::options(to.path()).unwrap();
        let theirs = lora::options(&folder(&format!("{name}-adapter"))).unwrap();
        assert_eq!((options.rank, options.alpha), (theirs.rank, theirs.alpha), "{name}");
        let names = |folder: &Path| {
            let mut weights = Weights::load(&folder.join(lora::WEIGHTS), CPU).unwrap();
            let found = expected.gradients.keys().filter(|name| weights.take_any(name).is_some());
            found.cloned().collect::<Vec<_>>()
        };
        assert_eq!(names(to.path()), names(&folder(&format!("{name}-adapter"))), "{name}");
        let options = CausalOptions { lora: Some(options), ..CausalOptions::default() };
        let mut again = CausalLanguageModel::load(&folder(name), &options).unwrap();
        assert_eq!(hidden(&again, &golden.rows), hidden(&load(name), &golden.rows), "{name}: B begins at zero");
        again.load_adapter(to.path()).unwrap();
        assert_eq!(hidden(&again, &golden.rows), hidden(&model, &golden.rows), "{name}");
    }
}

#[test]
fn an_adapter_of_an_unknown_layer_is_refused() {
    let mut options = lora::options(&folder("qwen2-adapter")).unwrap();
    options.target_modules = vec!["c_attn".into()];
    let options = CausalOptions { lora: Some(options), ..CausalOptions::default() };
    let error = CausalLanguageModel::load(&folder("qwen2"), &options).err().unwrap().to_string();
    assert!(error.contains("\"c_attn\"") && error.contains("q_proj"), "{error}");
}

/// rtol = atol = 1e-5.
#[test]
fn the_loss_in_chunks_has_the_value_and_gradients_of_the_whole() {
    tch::manual_seed(1);
    let random = |rows: i64, columns: i64| Tensor::randn([rows, columns], (Kind::Float, CPU)).set_requires_grad(true);
    let (states, head) = (random(37, 16), random(50, 16));
    let targets: Vec<i64> = (0..37).map(|i| if i % 4 == 0 { -100 } else { i * 7 % 50 }).collect();
    let targets = Tensor::from_slice(&targets);
    let logits = states.matmul(&head.tr());
    let whole = logits.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::Sum, -100, 0.0);
    // Another factor than 1, as a mean has.
    let expected = Tensor::run_backward(&[&whole * 0.5], &[&states, &head], false, false);
    let correct = logits.argmax(-1, false).eq_tensor(&targets).sum(Kind::Int64).int64_value(&[]);
    for chunk in [1, 7, 64] {
        let found = next_token_loss(&states, &head, &targets, chunk).unwrap();
        assert_eq!((found.targets, found.correct), (27, correct), "{chunk}");
        assert!(found.sum.allclose(&whole, 1e-5, 1e-5, false), "{chunk}: {} {whole}", found.sum);
        let gradients = Tensor::run_backward(&[&found.sum * 0.5], &[&states, &head], false, false);
        for (ours, theirs) in gradients.iter().zip(&expected) {
            assert!(ours.allclose(theirs, 1e-5, 1e-5, false), "{chunk}");
        }
    }
    let none = next_token_loss(&states, &head, &targets.full_like(-100), 8).unwrap();
    assert_eq!((none.targets, none.correct, none.sum.double_value(&[])), (0, 0, 0.0));
}

#[test]
fn what_cannot_be_computed_is_refused_by_its_field() {
    let cases = [
        ("gpt2", "activation_function", serde_json::json!("relu")),
        ("gpt2", "n_head", serde_json::json!(5)),
        ("llama", "hidden_act", serde_json::json!("gelu")),
        ("llama", "num_key_value_heads", serde_json::json!(3)),
        ("llama", "model_type", serde_json::json!("mamba")),
        ("llama", "rope_scaling", serde_json::json!({"rope_type": "yarn", "factor": 2.0})),
    ];
    for (name, field, value) in cases {
        let to = tempfile::tempdir().unwrap();
        let text = std::fs::read(folder(name).join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
        if field == "rope_scaling" {
            config.as_object_mut().unwrap().remove("rope_parameters");
        }
        config[field] = value;
        std::fs::write(to.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(folder(name).join(load::WEIGHTS), to.path().join(load::WEIGHTS)).unwrap();
        let error = CausalLanguageModel::load(to.path(), &CausalOptions::default()).err().unwrap().to_string();
        assert!(error.contains("config.json") && error.contains(field), "{error}");
    }
}
