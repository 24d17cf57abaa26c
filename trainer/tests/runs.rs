//! Whole runs of the real binary on MiniLM and a few real rows: what must hold whatever happens to processes.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::{collections::BTreeMap, path::Path};

use athanor_contract::train::{TrainResult, TrainSummary};
use place::Place;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

#[test]
fn two_and_four_ranks_have_the_losses_of_one() {
    // Dropout draws other numbers on two ranks: it is off. 15 rows a batch do not divide evenly.
    let place = Place::new(0.0);
    let spec = |ranks: u32| {
        json!({
            "hyperparameters": {"maxSteps": 8, "batchSize": 15, "precision": "FP32", "maxSequenceLength": 32, "learningRate": 1e-4},
            "distributed": {"processesPerNode": ranks, "backend": "Gloo"},
        })
    };
    for (out, ranks) in [("one", 1), ("two", 2), ("four", 4)] {
        let child = place.start(out, &spec(ranks));
        place.finish(out, child, 0);
    }
    let one = place.losses("one");
    for (out, ranks) in [("two", "2"), ("four", "4")] {
        let more = place.losses(out);
        assert_eq!((one.len(), more.len()), (8, 8));
        for ((step, a), (_, b)) in std::iter::zip(&one, &more) {
            // Only the order of sums differs; it moves a loss near 0.7 by some 1e-6 in the first step.
            assert!((a - b).abs() < 2e-4, "step {step}: {a} is not {b}");
        }
        assert!((one[0].1 - more[0].1).abs() < 1e-5, "{one:?} {more:?}");
        let (one, more) = (place.summary("one"), place.summary(out));
        assert_eq!((one.data_digest, one.rows), (more.data_digest, more.rows));
        assert_eq!(more.chosen["ranks"], ranks);
    }
}

#[test]
fn a_step_in_parts_is_the_same_step() {
    let place = Place::new(0.0);
    let spec = |parts: u32, ranks: u32| {
        json!({
            "hyperparameters": {
                "maxSteps": 6, "batchSize": 8, "precision": "FP32", "maxSequenceLength": 32, "learningRate": 1e-3,
                "accumulateSteps": parts, "optimizer": "RMSprop", "momentum": 0.5, "beta2": 0.99, "l1": 1e-5, "l2": 1e-3,
            },
            "distributed": {"processesPerNode": ranks, "backend": "Gloo"},
        })
    };
    for (out, parts, ranks) in [("whole", 1, 1), ("eight", 8, 1), ("shared", 3, 4)] {
        let child = place.start(out, &spec(parts, ranks));
        place.finish(out, child, 0);
    }
    let whole = place.losses("whole");
    for out in ["eight", "shared"] {
        assert_eq!((whole.len(), place.losses(out).len()), (6, 6));
        for ((step, a), (_, b)) in std::iter::zip(&whole, &place.losses(out)) {
            assert!((a - b).abs() < 2e-4, "{out}, step {step}: {a} is not {b}");
        }
    }
}

#[test]
fn killed_stopped_and_resumed_is_uninterrupted_bit_for_bit() {
    let place = Place::new(0.1);
    let spec = json!({
        "hyperparameters": {"maxSteps": 30, "batchSize": 16, "maxSequenceLength": 32, "learningRate": 1e-4},
        "checkpoint": {"everySteps": 4},
    });
    let child = place.start("whole", &spec);
    place.finish("whole", child, 0);

    let mut child = place.start("parts", &spec);
    place.wait_for_step("parts", &mut child, 10);
    child.kill().unwrap();
    child.wait().unwrap();
    let events = || place.find("parts", "/tensorboard/events.out.tfevents");
    let [file] = events().try_into().unwrap();
    // Loss, learning rate and norm of a step are 100 bytes and more.
    assert!(std::fs::metadata(&file).unwrap().len() > 10 * 100, "curves grow with each step: {}", file.display());
    let killed_at = place.losses("parts").last().unwrap().0;
    assert!(killed_at < 30, "the kill came too late to prove anything");

    let mut child = place.start("parts", &spec);
    place.wait_for_step("parts", &mut child, killed_at + 3);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    place.finish("parts", child, 42);
    let stopped_at = place.losses("parts").last().unwrap().0;
    assert!(place.checkpoints("parts").contains(&stopped_at), "no checkpoint at the stop");
    assert!(place.checkpoints("parts").len() <= 2, "old checkpoints are deleted");

    let child = place.start("parts", &spec);
    place.finish("parts", child, 0);
    let whole: BTreeMap<u64, f64> = place.losses("whole").into_iter().collect();
    let parts = place.losses("parts");
    assert_eq!(parts.last().unwrap().0, 30);
    for (step, loss) in parts {
        assert_eq!(loss, whole[&step], "step {step}");
    }
    let (whole, parts) = (place.summary("whole"), place.summary("parts"));
    assert_eq!(whole.model_digest, parts.model_digest);
    assert_eq!(whole.metrics, parts.metrics);
    // The report's curves have no hole either.
    let read = |summary: &TrainSummary, name: &str| {
        std::fs::read_to_string(Path::new(summary.artifact.trim_start_matches("file://")).join(name)).unwrap()
    };
    let [first, second] = [&whole, &parts]
        .map(|summary| serde_json::from_str::<Value>(&read(summary, "report.json")).unwrap()["history"].take());
    assert_eq!(first["points"].as_array().unwrap().len(), 30);
    // But for the clock.
    let without_times = |mut history: Value| {
        for list in ["points", "validations"] {
            history[list].as_array_mut().unwrap().iter_mut().for_each(|point| point["time"] = Value::Null);
        }
        history
    };
    assert_eq!(without_times(first), without_times(second));
    assert!(read(&parts, "report.html").contains("Validation"));
    assert_eq!(events().len(), 4, "of three processes, and of the artifact");
}

#[test]
fn a_check_says_what_would_happen_and_all_that_is_wrong() {
    let place = Place::new(0.1);
    let text = place.check("fine", &json!({"hyperparameters": {"batchSize": 16, "epochs": 2}})).unwrap();
    for part in ["reviews: 2", "negative", "median", "22.7 M parameters", "steps", "rows a second", "GiB"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(place.checkpoints("fine").is_empty(), "nothing was trained");

    let missing = json!({
        "model": {"from": place.uri("nowhere"), "task": "TextClassification"},
        "data": {"sources": [{"name": "a", "uri": place.uri("a.csv")}, {"name": "b", "uri": place.uri("b.csv")}]},
    });
    let errors = place.check("wrong", &missing).unwrap_err();
    for part in ["nowhere", "a.csv", "b.csv"] {
        assert!(errors.contains(part), "{part} is not in {errors}");
    }
}

#[test]
fn a_wrong_row_is_the_users_error_and_a_failed_gate_is_not_an_error() {
    let place = Place::new(0.1);
    let rows = place.folder.path().join("rows.jsonl");
    let good = std::fs::read_to_string(&rows).unwrap();
    let spec = json!({
        "hyperparameters": {"maxSteps": 2, "batchSize": 8, "maxSequenceLength": 16},
        "evaluate": {"gates": [{"metric": "Accuracy", "sources": ["reviews"], "minimum": "1"}]},
    });
    std::fs::write(&rows, format!("{good}{{\"text\": \"no label\"}}\n")).unwrap();
    let child = place.start("wrong", &spec);
    place.finish("wrong", child, 3);
    let TrainResult::Failed { message } = place.result("wrong") else { panic!("{:?}", place.result("wrong")) };
    assert!(message.contains("rows.jsonl row 301: field \"label\" is missing"), "{message}");

    std::fs::write(&rows, good).unwrap();
    let child = place.start("gate", &spec);
    place.finish("gate", child, 0);
    let TrainResult::GateFailed(summary) = place.result("gate") else { panic!("{:?}", place.result("gate")) };
    assert!(summary.failed_gates[0].contains("accuracy on the test rows of reviews is"), "{:?}", summary.failed_gates);
    assert_eq!(summary.rows.train + summary.rows.validation + summary.rows.test, 300);
}
