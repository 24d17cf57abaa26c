//! MiniLM against transformers (`golden/make.py`), fp32, rtol = atol = 1e-4. Needs `$ATHANOR_MODELS/minilm-l6` (`scripts/fetch model`).

use std::path::PathBuf;

use athanor_models::{Classifier, Model, Options, Task, Tokenizer, tokenizer::pad};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

#[derive(Deserialize)]
struct Golden {
    max_length: usize,
    sentences: Vec<String>,
    ids: Vec<Vec<u32>>,
    cls: Vec<Vec<f32>>,
    mean: Vec<Vec<f32>>,
}

fn minilm() -> PathBuf {
    let models = std::env::var("ATHANOR_MODELS").expect("ATHANOR_MODELS is set by scripts/env");
    PathBuf::from(models).join("minilm-l6")
}

fn assert_close(ours: &Tensor, theirs: &[Vec<f32>]) {
    let ours = Vec::<Vec<f32>>::try_from(ours.narrow(1, 0, 8)).unwrap();
    for (row, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        for (a, b) in ours.iter().zip(theirs) {
            // FP32 through six layers, products summed in another order; the project's bound for parity.
            assert!((a - b).abs() <= 1e-4 + 1e-4 * b.abs(), "sentence {row}: {a} is not {b}");
        }
    }
}

#[test]
fn minilm_gives_the_hidden_states_of_transformers() {
    let golden: Golden = serde_json::from_str(include_str!("golden/minilm.json")).unwrap();
    let tokenizer = Tokenizer::load(&minilm()).unwrap();
    let ids = tokenizer.encode_batch(&golden.sentences, golden.max_length).unwrap();
    assert_eq!(ids, golden.ids);

    let labels = ["a".to_owned(), "b".to_owned()];
    let model =
        Model::load(&minilm(), Task::Classification(labels.to_vec()), &Options::default(), Device::Cpu).unwrap();
    assert_eq!(model.fresh_layers(), ["classifier"]);
    let rows: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    let (ids, mask) = pad(&rows, model.config().pad_token_id);
    let hidden = tch::no_grad(|| model.last_hidden_state(&ids, Some(&mask), false));
    assert_close(&hidden.select(1, 0), &golden.cls);
    let mask = mask.unsqueeze(-1).to_kind(Kind::Float);
    let mean = (hidden * &mask).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float)
        / mask.sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
    assert_close(&mean, &golden.mean);
}

#[test]
fn a_saved_classifier_gives_the_same_logits_whatever_the_batch() {
    let labels = ["neg".to_owned(), "neu".to_owned(), "pos".to_owned()];
    let folder = tempfile::tempdir().unwrap();
    let options = Options { seed: 3, ..Options::default() };
    let model = Model::load(&minilm(), Task::Classification(labels.to_vec()), &options, Device::Cpu).unwrap();
    model.save(folder.path()).unwrap();
    let classifier = Classifier::load(folder.path(), Device::Cpu).unwrap();
    assert_eq!(classifier.labels(), labels);

    let rows: [&[u32]; 2] = [&[101, 2023, 2003, 102], &[101, 2204, 102]];
    let (ids, mask) = pad(&rows, 0);
    let together = classifier.forward(&ids, &mask);
    let original = tch::no_grad(|| model.forward(&ids, Some(&mask), false));
    // Packed weights: the same products, summed in another order.
    assert!(together.allclose(&original, 1e-6, 1e-6, false));
    for (i, row) in rows.iter().enumerate() {
        let (ids, mask) = pad(&[row], 0);
        let alone = classifier.forward(&ids, &mask);
        // Other lengths take other kernels, which sum in another order through six layers.
        assert!(alone.allclose(&together.narrow(0, i as i64, 1), 1e-4, 1e-4, false), "padding changes row {i}");
    }
}
