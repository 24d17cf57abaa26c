//! Students and their teachers by the real binary, with selection, new texts and compression.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::path::Path;

use athanor_contract::train::TrainResult;
use place::{Place, folder, page, report, richer_rows};
use serde_json::{Value, json};

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
    // Those about the training rows and those about the test rows.
    assert_eq!(log.matches("the teacher's answers were kept from another run").count(), 2);
    assert_eq!(std::fs::read_dir(place.folder.path().join("cached/teacher-outputs")).unwrap().count(), 2);
    let summary = place.summary("cached");
    let of_teacher = [&summary.metrics["teacher/accuracy"], &place.summary("teacher").metrics["accuracy"]];
    let [here, there] = of_teacher.map(|accuracy| accuracy.get());
    // Here in the precision of the training.
    assert!((here - there).abs() < 0.05, "{here} is not {there}");
    let child = place
        .start("fallen", &student(json!({"evaluate": {"gates": [{"metric": "Accuracy", "minimumOfTeacher": "1.5"}]}})));
    place.finish("fallen", child, 0);
    let TrainResult::GateFailed(fallen) = place.result("fallen") else { panic!("{:?}", place.result("fallen")) };
    assert!(fallen.failed_gates[0].contains("required: 1.5 of the teacher's score"), "{:?}", fallen.failed_gates);
    let rows = summary.chosen["trainedRows"].parse::<u64>().unwrap();
    assert!(rows * 10 <= summary.rows.train * 4 + 20 && rows > 0, "{rows} of {:?}", summary.rows);
    let report = report(&summary.artifact);
    assert_eq!(report["objective"][1]["name"], "softLabel");
    assert_eq!(report["selection"]["rows"], rows);
    let html = page(&summary.artifact);
    let title = format!("Selected rows: {rows} of {} by GradientMatching", summary.rows.train);
    for part in [&title[..], "clusters covered", "as many random rows", "share of the selection"] {
        assert!(html.contains(part), "{part} is not in {html}");
    }
    let forms = report["forms"].as_array().unwrap();
    assert_eq!(forms.len(), 4);
    // Whole weights of each matrix: shares are rounded to one weight a row.
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
fn a_teacher_answers_new_texts_and_its_doubts_leave_rows_out() {
    let place = Place::new(0.0);
    let steps = json!({"maxSteps": 4, "batchSize": 8, "maxSequenceLength": 24, "precision": "FP32"});
    let child = place.start("teacher", &json!({"hyperparameters": steps}));
    place.finish("teacher", child, 0);
    let spec = |ranks: u32, augment: Value, minimum: &str| {
        json!({
            "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]}},
            "teacher": {"from": place.summary("teacher").artifact},
            "data": {
                "sources": [{"name": "reviews", "uri": place.uri("rows.jsonl")}],
                "select": {"method": "Uncertainty", "keepPercent": 40, "viewer": "Model", "minimumAgreement": minimum},
                "augment": augment,
            },
            "hyperparameters": steps,
            "distributed": {"processesPerNode": ranks, "backend": "Gloo"},
        })
    };
    let names = [1, 2].map(|ranks| format!("ranks-{ranks}"));
    for (out, ranks) in names.iter().zip([1, 2]) {
        let child = place.start(out, &spec(ranks, json!({"copies": 3}), "0.2"));
        place.finish(out, child, 0);
    }
    let [one, two] = names.each_ref().map(|out| place.losses(out));
    assert_eq!(one.len(), 4);
    for ((step, a), (_, b)) in one.iter().zip(&two) {
        // Sums over ranks in another order, made larger by the optimizer.
        assert!((a - b).abs() < 2e-4 * a.abs().max(1.0), "step {step}: {a} is not {b}");
    }
    let summary = place.summary(&names[0]);
    let report = report(&summary.artifact);
    let chosen = report["selection"]["rows"].as_u64().unwrap();
    let (new, of) = (report["augmented"]["rows"].as_u64().unwrap(), report["augmented"]["of"].as_u64().unwrap());
    assert_eq!((new, of), (3 * chosen, chosen));
    assert_eq!(summary.chosen["trainedRows"], (4 * chosen).to_string());
    assert_eq!(report["augmented"]["examples"].as_array().unwrap().len(), 8);
    assert!(page(&summary.artifact).contains("New texts for the teacher"));
    let text = place.check("check", &spec(1, json!({"copies": 3}), "0.2")).unwrap();
    let told = text.lines().find(|line| line.starts_with("augmented")).unwrap();
    assert!(told.contains("3 of each training row") && text.contains("an epoch"), "{text}");

    // A teacher that has learned little is sure of nothing.
    let child = place.start("sure", &spec(1, json!({"copies": 1}), "1"));
    place.finish("sure", child, 3);
    let TrainResult::Failed { message } = place.result("sure") else { panic!("{:?}", place.result("sure")) };
    assert!(message.contains("the teacher gives no row of label") && message.contains("minimumAgreement"), "{message}");
    let alone = json!({"data": {
        "sources": [{"name": "reviews", "uri": place.uri("rows.jsonl")}], "augment": {"copies": 1},
    }});
    let mistake = place.check("alone", &alone).unwrap_err();
    assert!(mistake.contains("data.augment: requires a teacher"), "{mistake}");
}

/// The loss and the value of each term, step by step.
fn terms(place: &Place, out: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(place.folder.path().join(out).join("losses")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Means of a term over the first and the last quarter of the steps.
fn falls(steps: &[Value], value: impl Fn(&Value) -> f64) -> [f64; 2] {
    let quarter = steps.len() / 4;
    [&steps[..quarter], &steps[steps.len() - quarter..]]
        .map(|steps| steps.iter().map(&value).sum::<f64>() / quarter as f64)
}

#[test]
fn a_student_learns_the_words_and_the_vectors_of_a_teacher() {
    let place = Place::new(0.0);
    richer_rows(&place);
    let spec = |task: &str, steps: u32, more: Value| {
        let columns = if task == "Embedding" { json!({"pair": "pair"}) } else { json!({}) };
        let mut spec = json!({
            "model": {"from": place.uri("model"), "task": task, "student": {"keepLayers": [0]}},
            "data": {"sources": [{"name": "rows", "uri": place.uri("richer.jsonl"), "columns": columns}]},
            "hyperparameters": {
                "maxSteps": steps, "batchSize": 8, "precision": "FP32", "maxSequenceLength": 16, "learningRate": 5e-4,
            },
        });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let whole = json!({"model": {"from": place.uri("model"), "task": "MaskedLanguageModel"}});
    let child = place.start("words-teacher", &spec("MaskedLanguageModel", 4, whole));
    place.finish("words-teacher", child, 0);
    let teacher = place.summary("words-teacher").artifact;
    for (task, teacher, names) in [
        ("MaskedLanguageModel", teacher, ["maskedLanguageModel", "softLabel"]),
        ("Embedding", place.uri("model"), ["contrastive", "meanSquaredError"]),
    ] {
        let child = place.start(task, &spec(task, 24, json!({"teacher": {"from": teacher}})));
        place.finish(task, child, 0);
        let steps = terms(&place, task);
        assert_eq!(steps.len(), 24);
        let [first, last] = falls(&steps, |step| step["loss"].as_f64().unwrap());
        assert!(last < first, "{task}: {first} to {last}");
        let [first, last] = falls(&steps, |step| step["terms"][names[1]].as_f64().unwrap());
        // Not a rounding: the term must fall by at least a twentieth.
        assert!(0.0 < last && last < 0.95 * first, "{task}, {}: {first} to {last}", names[1]);
        let found = report(&place.summary(task).artifact);
        let told: Vec<&Value> = found["objective"].as_array().unwrap().iter().map(|term| &term["name"]).collect();
        assert_eq!(told, names);
    }
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
    richer_rows(&place);
    let vectors = json!({
        "model": {
            "from": place.uri("model"), "task": "Embedding",
            "student": {"fresh": {"layers": 1, "hiddenSize": 32, "attentionHeads": 2, "intermediateSize": 64}},
        },
        "data": {"sources": [{"name": "rows", "uri": place.uri("richer.jsonl"), "columns": {"pair": "pair"}}]},
        "teacher": {"from": place.uri("model")},
    });
    let message = failed("vectors", vectors);
    assert!(message.contains("vectors have 32 numbers, the teacher's 384"), "{message}");
    let deep = json!({"model": model(json!({"student": {"keepLayers": [6]}}))});
    let message = failed("deep", deep);
    assert!(message.contains("the student keeps layer 6, but the model has 6"), "{message}");
    // Another vocabulary: tokens are compared as long as both cut the rows alike.
    let other = place.folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    for entry in std::fs::read_dir(folder(&teacher)).unwrap().flatten().filter(|entry| entry.path().is_file()) {
        std::fs::copy(entry.path(), other.join(entry.file_name())).unwrap();
    }
    std::fs::remove_file(other.join("manifest.json")).unwrap();
    std::fs::remove_file(other.join("reference.json")).unwrap();
    let compared = |teacher: &str| {
        json!({
            "hyperparameters": {"maxSteps": 2, "batchSize": 4, "maxSequenceLength": 16, "precision": "FP32"},
            "teacher": {"from": teacher},
            "objective": {"terms": [{"hiddenState": {"layers": [{"student": 1, "teacher": 2}]}}]},
        })
    };
    for (from, to) in [("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[PAD]", "<pad>")] {
        rename_a_token(&other.join("tokenizer.json"), from, to);
    }
    let losses = [("alike", place.uri("other")), ("equal", teacher.clone())].map(|(out, teacher)| {
        let child = place.start(out, &compared(&teacher));
        place.finish(out, child, 0);
        place.losses(out)
    });
    assert!(losses[0].len() == 2 && losses[0] == losses[1], "{losses:?}");
    rename_a_token(&other.join("tokenizer.json"), "the", "teh");
    let message = failed("vocabulary", compared(&place.uri("other")));
    assert!(message.contains("rows.jsonl row ") && message.contains("is \"the\", the teacher's \""), "{message}");
    // A model without rows for the last of its tokenizer's tokens.
    let config = other.join("config.json");
    let mut smaller: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    smaller["vocab_size"] = json!(30_000);
    std::fs::write(&config, smaller.to_string()).unwrap();
    let message = failed("tokens", json!({"model": {"from": place.uri("other"), "task": "TextClassification"}}));
    assert!(message.contains("but vocab_size in config.json is 30000"), "{message}");
}

fn rename_a_token(tokenizer: &Path, from: &str, to: &str) {
    let whole = std::fs::read_to_string(tokenizer).unwrap();
    std::fs::write(tokenizer, whole.replace(&json!(from).to_string(), &json!(to).to_string())).unwrap();
}
