//! Every task, a teacher, selection and compression by the real binary, on MiniLM's first layer and a few real rows.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::path::{Path, PathBuf};

use athanor_contract::train::TrainResult;
use place::Place;
use serde_json::{Value, json};

fn folder(artifact: &str) -> PathBuf {
    PathBuf::from(artifact.trim_start_matches("file://"))
}

fn report(artifact: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder(artifact).join("report.json")).unwrap()).unwrap()
}

/// Rows with a number and a second text for each of the place's texts.
fn richer_rows(place: &Place) {
    let text = std::fs::read_to_string(place.folder.path().join("rows.jsonl")).unwrap();
    let rows: String = text
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            let text = row["text"].as_str().unwrap();
            let half: Vec<&str> = text.split_whitespace().step_by(2).collect();
            format!("{}\n", json!({"text": text, "label": text.len() as f64 / 100.0, "pair": half.join(" ")}))
        })
        .collect();
    std::fs::write(place.folder.path().join("richer.jsonl"), rows).unwrap();
}

#[test]
fn every_task_has_the_losses_of_one_rank_on_two() {
    let place = Place::new(0.0);
    richer_rows(&place);
    for (task, metric) in [
        ("TextRegression", "pearsonCorrelation"),
        ("MaskedLanguageModel", "crossEntropy"),
        ("Embedding", "meanReciprocalRank"),
    ] {
        let spec = |ranks: u32| {
            json!({
                "model": {"from": place.uri("model"), "task": task, "student": {"keepLayers": [0]}},
                "data": {"sources": [{"name": "rows", "uri": place.uri("richer.jsonl"), "columns": {"pair": "pair"}}]},
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
            assert!((a - b).abs() < 2e-4 * a.abs().max(1.0), "{task}, step {step}: {a} is not {b}");
        }
        let summary = place.summary(&names[0]);
        assert!(summary.metrics.contains_key(metric), "{task}: {:?}", summary.metrics);
        assert!(summary.metrics.keys().any(|name| name.starts_with("validation/")), "{:?}", summary.metrics);
        assert!(folder(&summary.artifact).join("model.safetensors").exists());
    }
}

#[test]
fn a_student_learns_from_a_teacher_on_chosen_rows_and_shrinks() {
    let place = Place::new(0.1);
    let steps = json!({"maxSteps": 3, "batchSize": 8, "maxSequenceLength": 24});
    let child = place.start("teacher", &json!({"hyperparameters": steps}));
    place.finish("teacher", child, 0);
    let teacher = place.summary("teacher").artifact;
    let student = |more: Value| {
        let mut spec = json!({
            "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]}},
            "teacher": {"from": teacher},
            "hyperparameters": steps,
        });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };

    // The teacher's answers are kept beside the output, and the next run takes them from there.
    let data = |name: &str| {
        json!({
            "sources": [{"name": "reviews", "uri": place.uri("rows.jsonl")}],
            "select": {"method": name, "keepPercent": 40},
        })
    };
    let cached = |seed: u32| {
        student(json!({
            "data": data("GradientMatching"),
            "hyperparameters": {"maxSteps": 3, "batchSize": 8, "maxSequenceLength": 24, "seed": seed},
            "compress": [
                {"prune": {"method": "Wanda", "sparsityPercent": 20}},
                {"prune": {"sparsityPercent": 95}, "maximumLoss": "-1"},
                {"quantize": {}},
            ],
        }))
    };
    for seed in [0, 1] {
        let child = place.start("cached", &cached(seed));
        place.finish("cached", child, 0);
    }
    let log = std::fs::read_to_string(place.folder.path().join("cached/log")).unwrap();
    assert_eq!(log.matches("the teacher's answers were kept from another run").count(), 1);
    assert_eq!(std::fs::read_dir(place.folder.path().join("cached/teacher-outputs")).unwrap().count(), 1);
    let summary = place.summary("cached");
    let rows = summary.chosen["trainedRows"].parse::<u64>().unwrap();
    assert!(rows * 10 <= summary.rows.train * 4 + 20 && rows > 0, "{rows} of {:?}", summary.rows);
    let report = report(&summary.artifact);
    assert_eq!(report["objective"][1]["name"], "softLabel");
    assert_eq!(report["selection"]["rows"], rows);
    let forms = report["forms"].as_array().unwrap();
    assert_eq!(forms.len(), 4);
    assert!((forms[1]["sparsity"].as_f64().unwrap() - 0.2).abs() < 0.01, "{forms:?}");
    assert!(forms[2]["leftOut"].is_string() && forms[3]["leftOut"].is_null(), "{forms:?}");
    assert!((forms[3]["sparsity"].as_f64().unwrap() - 0.2).abs() < 0.01, "what was left out left nothing behind");
    let bytes = |index: usize| forms[index]["bytes"].as_u64().unwrap();
    assert!(bytes(3) * 3 < bytes(0), "eight bits: {} of {}", bytes(3), bytes(0));
    assert_eq!(std::fs::metadata(folder(&summary.artifact).join("model.safetensors")).unwrap().len(), bytes(3));
    let config = std::fs::read_to_string(folder(&summary.artifact).join("config.json")).unwrap();
    assert!(config.contains("compressed-tensors"), "{config}");

    // Hidden states need the teacher at each step; a projection joins widths and is thrown away.
    let hidden = json!({"terms": [
        {"crossEntropy": {"labelSmoothing": 0.1}},
        {"weight": 0.5, "hiddenState": {"layers": [{"student": 1, "teacher": 6}], "loss": "Cosine", "projection": true}},
        {"softLabel": {"divergence": "JensenShannon"}},
    ]});
    let child = place.start("hidden", &student(json!({"objective": hidden, "distributed": {"processesPerNode": 2}})));
    place.finish("hidden", child, 0);
    let weights = std::fs::read(folder(&place.summary("hidden").artifact).join("model.safetensors")).unwrap();
    assert!(!String::from_utf8_lossy(&weights[..4096]).contains("projection"));
}

#[test]
fn a_teacher_that_does_not_fit_is_the_users_error() {
    let place = Place::new(0.1);
    let child =
        place.start("teacher", &json!({"hyperparameters": {"maxSteps": 1, "batchSize": 4, "maxSequenceLength": 16}}));
    place.finish("teacher", child, 0);
    let teacher = place.summary("teacher").artifact;
    let failed = |out: &str, spec: Value| {
        let child = place.start(out, &spec);
        place.finish(out, child, 3);
        match place.result(out) {
            TrainResult::Failed { message } => message,
            other => panic!("{other:?}"),
        }
    };
    let model = |more: Value| {
        let mut model = json!({"from": place.uri("model"), "task": "TextClassification"});
        model.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        model
    };
    let labels = json!({
        "model": model(json!({"labels": ["negative", "positive", "mixed"]})), "teacher": {"from": teacher},
    });
    let message = failed("labels", labels);
    assert!(message.contains("the teacher's labels are negative, positive, the student's"), "{message}");
    let untrained = json!({"teacher": {"from": place.uri("model")}});
    let message = failed("untrained", untrained);
    assert!(message.contains("teacher.from: the teacher is an encoder without a trained head"), "{message}");
    let narrow = json!({
        "model": model(json!({"student": {"fresh": {"layers": 1, "hiddenSize": 32, "attentionHeads": 2, "intermediateSize": 64}}})),
        "teacher": {"from": teacher},
        "objective": {"terms": [{"hiddenState": {"layers": [{"student": 1, "teacher": 6}]}}]},
    });
    let message = failed("narrow", narrow);
    assert!(message.contains("have 32 units, the teacher's 384"), "{message}");
    let deep = json!({"model": model(json!({"student": {"keepLayers": [6]}}))});
    let message = failed("deep", deep);
    assert!(message.contains("the student keeps layer 6, but the model has 6"), "{message}");
    // Another vocabulary: tokens cannot be compared.
    let other = place.folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    for entry in std::fs::read_dir(folder(&teacher)).unwrap().flatten().filter(|entry| entry.path().is_file()) {
        std::fs::copy(entry.path(), other.join(entry.file_name())).unwrap();
    }
    std::fs::remove_file(other.join("manifest.json")).unwrap();
    std::fs::remove_file(other.join("reference.json")).unwrap();
    rename_a_token(&other.join("tokenizer.json"));
    let vocabulary = json!({
        "teacher": {"from": place.uri("other")},
        "objective": {"terms": [{"hiddenState": {"layers": [{"student": 1, "teacher": 1}]}}]},
    });
    let message = failed("vocabulary", vocabulary);
    assert!(message.contains("its vocabulary is not the student's"), "{message}");
}

fn rename_a_token(tokenizer: &Path) {
    let mut whole: Value = serde_json::from_slice(&std::fs::read(tokenizer).unwrap()).unwrap();
    let vocabulary = whole["model"]["vocab"].as_object_mut().unwrap();
    let id = vocabulary.remove("hello").unwrap();
    vocabulary.insert("hullo".into(), id);
    std::fs::write(tokenizer, whole.to_string()).unwrap();
}
