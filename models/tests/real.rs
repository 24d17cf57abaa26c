//! Real models in GGUF files against transformers (`models/tests/golden/make_models.py`), FP32, rtol = atol = 1e-4 of the
//! largest logit.

use std::path::{Path, PathBuf};

use athanor_models::{Batch, CachedRow, CausalLanguageModel, CausalOptions, KvCache};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
/// Every so many logits the golden file has one.
const STEP: usize = 997;

#[derive(Deserialize)]
struct Golden {
    prompt: Vec<i64>,
    /// Logits of the first and of the last token of the prompt.
    first: Vec<f64>,
    last: Vec<f64>,
    /// The 64 tokens that follow the prompt.
    greedy: Vec<i64>,
}

/// The GGUF file of a model that `scripts/fetch` has.
fn file(folder: &str, part: &str) -> PathBuf {
    let models = std::env::var_os("ATHANOR_MODELS").expect("ATHANOR_MODELS, by `. scripts/env`");
    let folder = Path::new(&models).join(folder);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|_| panic!("{}: run scripts/fetch {part}", folder.display()));
    let mut files = files.map(|file| file.unwrap().path());
    files.find(|file| file.extension().is_some_and(|ending| ending == "gguf")).expect("a GGUF file")
}

fn assert_logits(ours: &Tensor, theirs: &[f64]) {
    let ours = Vec::<f64>::try_from(ours.to_kind(Kind::Double)).unwrap();
    let largest = theirs.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
    let ours: Vec<f64> = ours.into_iter().step_by(STEP).collect();
    assert_eq!(ours.len(), theirs.len());
    for (a, b) in ours.iter().zip(theirs) {
        assert!((a - b).abs() <= 1e-4 + 1e-4 * largest, "{a} is not {b}");
    }
}

fn compare(path: &Path, golden: &Golden) {
    let options = CausalOptions { kind: Some(Kind::Float), ..CausalOptions::default() };
    let model = CausalLanguageModel::load(path, &options).unwrap();
    let prompt = &golden.prompt;
    let logits = tch::no_grad(|| model.logits(&model.forward(&Batch::new(&[prompt], CPU), None, false)));
    assert_logits(&logits.get(0), &golden.first);
    assert_logits(&logits.get(prompt.len() as i64 - 1), &golden.last);

    let total = prompt.len() + golden.greedy.len();
    let slots: Vec<i64> = (0..total as i64).collect();
    let mut cache = KvCache::new(model.cache_shape(), total as i64, Kind::Float, CPU);
    let (mut ids, mut stored) = (prompt.clone(), 0);
    while ids.len() < total {
        let batch = Batch::cached(&[CachedRow { new: &ids[stored..], slots: &slots[..ids.len()] }], CPU);
        let next = tch::no_grad(|| {
            let hidden = model.forward(&batch, Some(&mut cache), false);
            model.logits(&hidden.index_select(0, &batch.last_rows())).argmax(-1, false).int64_value(&[0])
        });
        stored = ids.len();
        ids.push(next);
    }
    assert_eq!(ids[prompt.len()..], golden.greedy);
}

#[test]
fn smollm2_has_the_logits_and_the_greedy_text_of_transformers() {
    let golden = serde_json::from_str(include_str!("golden/smollm2-logits.json")).unwrap();
    compare(&file("smollm2-135m", "smollm2"), &golden);
}

/// `cargo test --release -p athanor-models --test real -- --ignored`
#[test]
#[ignore = "needs scripts/fetch qwen-coder-0.5b"]
fn qwen_coder_has_the_logits_and_the_greedy_text_of_transformers() {
    let golden = serde_json::from_str(include_str!("golden/qwen-coder-0.5b-logits.json")).unwrap();
    compare(&file("qwen2.5-coder-0.5b", "qwen-coder-0.5b"), &golden);
}
