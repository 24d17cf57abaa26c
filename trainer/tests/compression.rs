//! Smaller forms of a trained model: their files, loaded as a server loads them, are what the trainer says of them. The
//! validation rows choose the form, the test rows measure it.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::path::{Path, PathBuf};

use athanor_contract::train::{SplitSpec, TrainSummary};
use athanor_data::{Part, part_of};
use athanor_models::{Classifier, Model, Tokenizer, tokenizer::pad};
use place::Place;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const LONGEST: usize = 24;

fn folder(summary: &TrainSummary) -> PathBuf {
    summary.artifact.trim_start_matches("file://").into()
}

fn forms(summary: &TrainSummary) -> Vec<Value> {
    let report: Value = serde_json::from_slice(&std::fs::read(folder(summary).join("report.json")).unwrap()).unwrap();
    report["forms"].as_array().unwrap().clone()
}

const WORDS: [&str; 4] = ["excellent", "terrible", "average", "confusing"];

/// Rows whose label is their first word: a few steps are enough to learn it.
fn plain_rows(place: &Place) {
    let file = place.folder.path().join("rows.jsonl");
    let text = std::fs::read_to_string(&file).unwrap();
    let of_row = |(index, line): (usize, &str)| {
        let row: Value = serde_json::from_str(line).unwrap();
        let word = WORDS[index % WORDS.len()];
        format!("{}\n", json!({"text": format!("{word}: {}", row["text"].as_str().unwrap()), "label": word}))
    };
    let rows: String = text.lines().enumerate().map(of_row).collect();
    std::fs::write(file, rows).unwrap();
}

/// Texts and labels of a part.
fn held_out(place: &Place, part: Part) -> Vec<(String, String)> {
    let rows = std::fs::read_to_string(place.folder.path().join("rows.jsonl")).unwrap();
    let of_row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let field = |name: &str| row[name].as_str().unwrap().to_owned();
        (field("text"), field("label"))
    };
    let mut rows: Vec<_> = rows.lines().map(of_row).collect();
    rows.retain(|(text, _)| part_of(text, &SplitSpec::default()) == part);
    // A text counts once.
    let mut seen = std::collections::BTreeSet::new();
    rows.retain(|(text, _)| seen.insert(text.clone()));
    rows
}

/// What a server finds in a folder: the labels, and the probabilities [texts, labels].
fn answers(folder: &Path, texts: &[&str]) -> (Vec<String>, Tensor) {
    let classifier = Classifier::load(folder, Device::Cpu).unwrap();
    let tokens = Tokenizer::load(folder).unwrap().encode_batch(texts, LONGEST).unwrap();
    let rows: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let (ids, mask) = pad(&rows, classifier.config().pad_token_id);
    (classifier.labels().to_vec(), classifier.forward(&ids, &mask).softmax(-1, Kind::Float))
}

fn accuracy(labels: &[String], probabilities: &Tensor, truth: &[(String, String)]) -> f64 {
    let found = Vec::<i64>::try_from(probabilities.argmax(-1, false)).unwrap();
    let right = found.iter().zip(truth).filter(|(found, (_, truth))| labels[**found as usize] == *truth).count();
    right as f64 / truth.len() as f64
}

#[test]
fn forms_are_served_as_they_were_measured_and_a_failed_gate_leaves_one_out() {
    let place = Place::new(0.0);
    plain_rows(&place);
    let half = json!({"prune": {"method": "Wanda", "twoOfFour": true}});
    let run = |out: &str, gates: Value, steps: Value| {
        let spec = json!({
            "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]}},
            "hyperparameters": {
                "maxSteps": 45, "batchSize": 16, "maxSequenceLength": LONGEST, "learningRate": 1e-3, "precision": "FP32",
            },
            "evaluate": {"gates": gates},
            "compress": steps,
        });
        let child = place.start(out, &spec);
        place.finish(out, child, 0);
        place.summary(out)
    };
    let pruned = run("pruned", json!([]), json!([half, {"prune": {"sparsityPercent": 95}, "maximumLoss": "-1"}]));
    let [trained, two_of_four, broken] = forms(&pruned).try_into().unwrap();
    assert_eq!(two_of_four["name"], "2:4 pruned by Wanda");
    // Two of four exactly; the report rounds.
    assert!((two_of_four["sparsity"].as_f64().unwrap() - 0.5).abs() < 1e-3, "{two_of_four}");
    assert!(trained["leftOut"].is_null() && two_of_four["leftOut"].is_null(), "{trained} {two_of_four}");
    let [good, bad] = [&two_of_four, &broken].map(|form| form["validation"].as_f64().unwrap());
    assert!(good > bad, "one in twenty weights does as well: {good}, {bad}");
    let on_test = |form: &Value| form["test"].as_f64();
    assert!(on_test(&trained).is_some() && on_test(&two_of_four).is_some() && on_test(&broken).is_none(), "{broken}");

    // The same with a gate between the two.
    let gate = json!([{"metric": "Accuracy", "minimum": format!("{:.4}", (good + bad) / 2.0)}]);
    let steps = json!([half, {"prune": {"sparsityPercent": 95}}, {"quantize": {"method": "Int8WeightOnly"}}]);
    let small = run("small", gate, steps);
    let [_, again, broken, int8] = forms(&small).try_into().unwrap();
    assert_eq!(
        (&again["validation"], &again["leftOut"]),
        (&two_of_four["validation"], &Value::Null),
        "the same training"
    );
    assert_eq!(again["test"], Value::Null, "it was kept, and a later form is the result");
    let why = broken["leftOut"].as_str().unwrap();
    let decided_by =
        format!("accuracy on all validation rows is {:.4}, less than", broken["validation"].as_f64().unwrap());
    assert!(why.contains(&decided_by), "{why}");
    assert!(broken["sparsity"].as_f64().unwrap() > 0.94, "{broken}");
    assert_eq!((&int8["name"], &int8["leftOut"]), (&json!("int8 weights"), &Value::Null));
    // Eight bits round the smallest weights to zero too.
    assert!((int8["sparsity"].as_f64().unwrap() - 0.5).abs() < 0.01, "what was left out left nothing behind: {int8}");

    // The files: two of four neighbours at most are there, and what is left out left nothing behind.
    for summary in [&pruned, &small] {
        let model = Model::load_trained(&folder(summary), Device::Cpu).unwrap();
        let matrices = model.matrices();
        assert_eq!(matrices.len(), 6);
        for (name, weight) in matrices {
            let kept = weight.not_equal(0.0).reshape([-1, 4]).sum_dim_intlist([1_i64].as_slice(), false, Kind::Int64);
            assert!(kept.max().int64_value(&[]) == 2, "{name} of {}", summary.artifact);
        }
    }

    let mut expected = WORDS;
    expected.sort_unstable();
    for (part, name, rows) in
        [(Part::Validation, "validation", pruned.rows.validation), (Part::Test, "test", pruned.rows.test)]
    {
        let truth = held_out(&place, part);
        assert_eq!(truth.len() as u64, rows);
        let texts: Vec<&str> = truth.iter().map(|(text, _)| text.as_str()).collect();
        let (labels, exact) = answers(&folder(&pruned), &texts);
        let (same, rounded) = answers(&folder(&small), &texts);
        assert_eq!(labels, expected);
        assert_eq!(same, labels);
        for (form, summary, probabilities) in [(&two_of_four, &pruned, &exact), (&int8, &small, &rounded)] {
            let value = accuracy(&labels, probabilities, &truth);
            // The report has six decimals and more, a metric has four.
            assert!((form[name].as_f64().unwrap() - value).abs() < 1e-6, "{form}: {value}");
            if part == Part::Test {
                assert!((summary.metrics["accuracy"].get() - value).abs() < 1e-4, "{:?}: {value}", summary.metrics);
            }
        }
        let difference = (&exact - &rounded).abs().max().double_value(&[]);
        // Eight bits a weight: probabilities move by a few hundredths at most.
        assert!(difference > 0.0 && difference < 0.05, "{difference}");
    }
}
