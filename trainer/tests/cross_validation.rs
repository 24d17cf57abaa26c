//! Cross-validation by the real binary, on MiniLM's first layer and a few real rows.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::time::{Duration, Instant};

use place::Place;
use serde_json::{Value, json};

const FOLDS: usize = 3;

fn spec(place: &Place, hyperparameters: Value) -> Value {
    let mut all = json!({"maxSteps": 3, "batchSize": 8, "maxSequenceLength": 16, "precision": "FP32"});
    all.as_object_mut().unwrap().extend(hyperparameters.as_object().unwrap().clone());
    json!({
        "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]}},
        "hyperparameters": all,
    })
}

fn report(place: &Place, out: &str) -> Value {
    let folder = place.summary(out).artifact.trim_start_matches("file://").to_owned();
    serde_json::from_slice(&std::fs::read(format!("{folder}/report.json")).unwrap()).unwrap()
}

fn log(place: &Place, out: &str) -> String {
    std::fs::read_to_string(place.folder.path().join(out).join("log")).unwrap_or_default()
}

/// Folds that were trained, in their order.
fn trained(place: &Place, out: &str) -> Vec<u64> {
    let log = log(place, out);
    let lines = log.lines().filter(|line| line.contains("a fold is done"));
    lines
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            line["fields"]["fold"].as_u64().or_else(|| line["fold"].as_u64()).unwrap()
        })
        .collect()
}

#[test]
fn each_fold_is_measured_by_a_model_that_never_saw_it_and_the_job_stays_as_it_was() {
    let place = Place::new(0.1);
    let folded = spec(&place, json!({"crossValidation": {"folds": FOLDS}}));
    let child = place.start("plain", &spec(&place, json!({})));
    place.finish("plain", child, 0);
    let child = place.start("whole", &folded);
    place.finish("whole", child, 0);
    let (plain, whole) = (place.summary("plain"), place.summary("whole"));
    assert_eq!(plain.model_digest, whole.model_digest, "the same model, with folds or without");
    assert_eq!(place.losses("plain"), place.losses("whole"), "folds are not in the log of losses");

    let found = report(&place, "whole")["crossValidation"].take();
    let folds = found["folds"].as_array().unwrap();
    assert_eq!(folds.len(), FOLDS);
    let number = |fold: &Value, name: &str| fold[name].as_u64().unwrap();
    for fold in folds {
        assert_eq!(
            number(fold, "train") + number(fold, "heldOut"),
            whole.rows.train,
            "neither validation nor test rows"
        );
        assert_eq!(number(fold, "steps"), 3);
    }
    assert_eq!(folds.iter().map(|fold| number(fold, "heldOut")).sum::<u64>(), whole.rows.train);
    let scores: Vec<f64> = folds.iter().map(|fold| fold["metrics"]["accuracy"].as_f64().unwrap()).collect();
    let mean = scores.iter().sum::<f64>() / FOLDS as f64;
    let deviation = (scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / (FOLDS - 1) as f64).sqrt();
    for (name, expected) in [("crossValidation/accuracy", mean), ("crossValidation/accuracy/deviation", deviation)] {
        // Metrics have four decimals.
        assert!((whole.metrics[name].get() - expected).abs() < 1e-4, "{name}: {:?}", whole.metrics);
    }
    assert!(whole.metrics.contains_key("crossValidation/macroF1") && whole.metrics.contains_key("validation/accuracy"));
    assert!(whole.timeline["crossValidated"] < whole.timeline["trained"], "{:?}", whole.timeline);
    let page =
        std::fs::read_to_string(format!("{}/report.html", whole.artifact.trim_start_matches("file://"))).unwrap();
    assert!(page.contains("Cross-validation: 3 folds") && page.contains(&format!("{mean:.4} ± {deviation:.4}")));

    // Killed after its first fold, it goes on with the second.
    let mut child = place.start("killed", &folded);
    let deadline = Instant::now() + Duration::from_secs(120);
    while place.find("killed", "fold-1.json").is_empty() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "{}", log(&place, "killed"));
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(trained(&place, "killed").len() < FOLDS, "the kill came too late to prove anything");
    let child = place.start("killed", &folded);
    place.finish("killed", child, 0);
    assert_eq!(trained(&place, "killed").iter().filter(|fold| **fold == 1).count(), 1, "{}", log(&place, "killed"));
    assert_eq!(report(&place, "killed")["crossValidation"], found, "as if it had not been killed");
}

#[test]
fn two_ranks_find_what_one_does() {
    // Dropout draws other numbers on two ranks: it is off.
    let place = Place::new(0.0);
    for (out, ranks) in [("one", 1), ("two", 2)] {
        let mut spec = spec(&place, json!({"crossValidation": {"folds": 2}, "learningRate": 1e-4}));
        spec["distributed"] = json!({"processesPerNode": ranks, "backend": "Gloo"});
        let child = place.start(out, &spec);
        place.finish(out, child, 0);
    }
    let [one, two] = ["one", "two"].map(|out| report(&place, out)["crossValidation"]["folds"].take());
    for (one, two) in one.as_array().unwrap().iter().zip(two.as_array().unwrap()) {
        assert_eq!((&one["train"], &one["heldOut"]), (&two["train"], &two["heldOut"]));
        let accuracy = |fold: &Value| fold["metrics"]["accuracy"].as_f64().unwrap();
        // Sums differ in their last bits: at most a row or two of some 120 falls on the other side.
        assert!((accuracy(one) - accuracy(two)).abs() < 0.02, "{one} {two}");
    }
    assert_eq!(two.as_array().unwrap().len(), 2);
}

#[test]
fn a_search_takes_the_trial_with_the_best_mean() {
    let place = Place::new(0.1);
    let search = json!({
        "algorithm": "Random", "maxTrials": 2, "parameters": [{"name": "learningRate", "values": [1e-6, 1e-3]}],
    });
    let child = place.start("search", &spec(&place, json!({"crossValidation": {"folds": 2}, "search": search})));
    place.finish("search", child, 0);
    let log = log(&place, "search");
    let values: Vec<f64> = log
        .lines()
        .filter(|line| line.contains("a trial is done"))
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            line["fields"]["value"].as_f64().or_else(|| line["value"].as_f64()).unwrap()
        })
        .collect();
    assert_eq!(values.len(), 2, "{log}");
    let best = values.iter().copied().fold(0.0, f64::max);
    let metrics = place.summary("search").metrics;
    // Metrics have four decimals.
    assert!((metrics["crossValidation/accuracy"].get() - best).abs() < 1e-4, "{values:?} {metrics:?}");
}

#[test]
fn each_fold_selects_its_own_rows_and_has_its_own_answers_of_the_teacher() {
    let place = Place::new(0.1);
    let child = place.start("teacher", &spec(&place, json!({"maxSteps": 1})));
    place.finish("teacher", child, 0);
    let mut student = spec(&place, json!({"crossValidation": {"folds": 2}}));
    student["teacher"] = json!({"from": place.summary("teacher").artifact});
    student["data"] = json!({
        "sources": [{"name": "reviews", "uri": place.uri("rows.jsonl")}],
        "select": {"method": "Random", "keepPercent": 40},
    });
    let child = place.start("student", &student);
    place.finish("student", child, 0);
    let kept = std::fs::read_dir(place.folder.path().join("student/teacher-outputs")).unwrap();
    assert_eq!(kept.count(), 4, "of two folds, of the job and of its test rows");
    let rows = place.summary("student").rows.train;
    let found = report(&place, "student")["crossValidation"].take();
    for fold in found["folds"].as_array().unwrap() {
        let (train, held_out) = (fold["train"].as_u64().unwrap(), fold["heldOut"].as_u64().unwrap());
        assert!((train * 100).abs_diff((rows - held_out) * 40) <= 200, "{train} of {} rows", rows - held_out);
    }
}
