//! Every task by the real binary, on MiniLM's first layer and a few real rows.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use athanor_contract::train::{SplitSpec, TrainResult};
use athanor_data::part_of;
use place::{Place, folder, richer_rows};
use serde_json::{Value, json};

#[test]
fn every_task_has_the_losses_of_one_rank_on_two() {
    let place = Place::new(0.0);
    richer_rows(&place);
    for (task, metric) in [
        ("TextRegression", "pearsonCorrelation"),
        ("MaskedLanguageModel", "crossEntropy"),
        ("Embedding", "meanReciprocalRank"),
    ] {
        let columns = if task == "Embedding" { json!({"pair": "pair"}) } else { json!({}) };
        let spec = |ranks: u32| {
            json!({
                "model": {"from": place.uri("model"), "task": task, "student": {"keepLayers": [0]}},
                "data": {"sources": [{"name": "rows", "uri": place.uri("richer.jsonl"), "columns": columns}]},
                "hyperparameters": {
                    "maxSteps": 6, "batchSize": 9, "precision": "FP32", "maxSequenceLength": 24, "learningRate": 2e-4,
                },
                "distributed": {"processesPerNode": ranks, "backend": "Gloo"},
            })
        };
        let names = [1, 2].map(|ranks| format!("{task}-{ranks}"));
        for (out, ranks) in names.iter().zip([1, 2]) {
            let child = place.start(out, &spec(ranks));
            place.finish(out, child, 0);
        }
        let [one, two] = names.each_ref().map(|out| place.losses(out));
        assert_eq!(one.len(), 6);
        for ((step, a), (_, b)) in one.iter().zip(&two) {
            // Sums over ranks in another order, made larger by the optimizer; a squared error is above 1.
            assert!((a - b).abs() < 2e-4 * a.abs().max(1.0), "{task}, step {step}: {a} is not {b}");
        }
        let summary = place.summary(&names[0]);
        assert!(summary.metrics.contains_key(metric), "{task}: {:?}", summary.metrics);
        assert!(summary.metrics.keys().any(|name| name.starts_with("validation/")), "{:?}", summary.metrics);
        assert!(folder(&summary.artifact).join("model.safetensors").exists());
    }
}

#[test]
fn what_a_task_lacks_is_named_by_file_and_row_or_field() {
    let place = Place::new(0.0);
    richer_rows(&place);
    let failed = |task: &str, model: &str, file: &str, columns: Value| {
        let spec = json!({
            "model": {"from": place.uri(model), "task": task, "student": {"keepLayers": [0]}},
            "data": {"sources": [{"name": "rows", "uri": place.uri(file), "columns": columns}]},
            "hyperparameters": {"maxSteps": 2, "batchSize": 8, "maxSequenceLength": 16},
        });
        let out = format!("{task}-{file}");
        let told = place.check(&out, &spec).unwrap_err();
        let child = place.start(&out, &spec);
        place.finish(&out, child, 3);
        let TrainResult::Failed { message } = place.result(&out) else { panic!("{:?}", place.result(&out)) };
        assert_eq!(told.trim_end(), message, "a check says what a run says");
        assert!(place.losses(&out).is_empty(), "before the first step");
        message
    };
    // A row of the training part, wherever it is.
    let rows = std::fs::read_to_string(place.folder.path().join("richer.jsonl")).unwrap();
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let is_trained =
        |row: &Value| part_of(row["text"].as_str().unwrap(), &SplitSpec::default()) == athanor_data::Part::Train;
    let place_of = rows.iter().skip(100).position(is_trained).unwrap() + 100;
    let changed = |name: &str, change: &dyn Fn(&mut Value)| {
        let mut rows = rows.clone();
        change(&mut rows[place_of]);
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(place.folder.path().join(name), lines).unwrap();
    };
    let row = |file: &str| format!("{} row {}: ", place.uri(file), place_of + 1);

    changed("words.jsonl", &|row| row["label"] = json!("four"));
    let message = failed("TextRegression", "model", "words.jsonl", json!({}));
    assert_eq!(message, row("words.jsonl") + "label \"four\" is not a number, which TextRegression needs");
    changed("infinite.jsonl", &|row| row["label"] = json!("inf"));
    let message = failed("TextRegression", "model", "infinite.jsonl", json!({}));
    assert!(message.starts_with(&row("infinite.jsonl")), "{message}");

    changed("single.jsonl", &|row| drop(row.as_object_mut().unwrap().remove("pair")));
    let message = failed("Embedding", "model", "single.jsonl", json!({"pair": "pair"}));
    assert!(message.starts_with(&row("single.jsonl")) && message.contains("\"pair\""), "{message}");
    let message = failed("Embedding", "model", "richer.jsonl", json!({}));
    assert!(message.contains("richer.jsonl row ") && message.contains("data.sources[].columns.pair"), "{message}");

    // A tokenizer that knows no mask.
    let to = place.folder.path().join("maskless");
    std::fs::create_dir(&to).unwrap();
    for entry in std::fs::read_dir(place.folder.path().join("model")).unwrap().flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    let text = std::fs::read_to_string(to.join("tokenizer.json")).unwrap();
    std::fs::write(to.join("tokenizer.json"), text.replace("[MASK]", "[NONE]")).unwrap();
    let message = failed("MaskedLanguageModel", "maskless", "richer.jsonl", json!({}));
    assert_eq!(message, "model.from: its tokenizer has no mask token, which the task needs");
}
