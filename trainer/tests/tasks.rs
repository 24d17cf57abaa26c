//! Every task, a teacher, selection and compression by the real binary, on MiniLM's first layer and a few real rows.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use athanor_contract::train::{SplitSpec, TrainResult};
use athanor_data::part_of;
use place::Place;
use serde_json::{Value, json};

fn folder(artifact: &str) -> PathBuf {
    PathBuf::from(artifact.trim_start_matches("file://"))
}

fn page(artifact: &str) -> String {
    std::fs::read_to_string(folder(artifact).join("report.html")).unwrap()
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
    assert!(fallen.failed_gates[0].ends_with("1.5 of it is asked for"), "{:?}", fallen.failed_gates);
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
    assert!(mistake.contains("data.augment needs a teacher"), "{mistake}");
}

/// An OpenAI-compatible endpoint that finds words of praise, and counts what it is asked.
fn endpoint() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/v1", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let count = count.clone();
            std::thread::spawn(move || answer(stream, &count));
        }
    });
    (address, asked)
}

fn answer(stream: TcpStream, count: &AtomicUsize) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        count.fetch_add(1, Ordering::Relaxed);
        let text = String::from_utf8_lossy(&body).to_lowercase();
        let label = if ["great", "good", "love", "best"].iter().any(|word| text.contains(word)) {
            "positive"
        } else {
            "negative"
        };
        let body = json!({
            "choices": [{"message": {"role": "assistant", "content": label}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 1},
        })
        .to_string();
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
        writer.write_all(head.as_bytes()).and_then(|()| writer.write_all(body.as_bytes())).unwrap();
    }
}

fn drop_every_other_label(place: &Place) {
    let file = place.folder.path().join("rows.jsonl");
    let rows: String = std::fs::read_to_string(&file)
        .unwrap()
        .lines()
        .enumerate()
        .map(|(index, line)| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            if index % 2 == 1 {
                row.as_object_mut().unwrap().remove("label");
            }
            format!("{row}\n")
        })
        .collect();
    std::fs::write(&file, rows).unwrap();
}

/// Rows without a label that the split holds out: a model's word about them measures nothing.
fn held_out_without_label(place: &Place) -> u64 {
    let text = std::fs::read_to_string(place.folder.path().join("rows.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let is_held_out =
        |row: &Value| part_of(row["text"].as_str().unwrap(), &SplitSpec::default()) != athanor_data::Part::Train;
    let count = rows.filter(|row| row.get("label").is_none() && is_held_out(row)).count() as u64;
    assert!(count > 0);
    count
}

#[test]
fn rows_without_labels_get_them_once_for_all_ranks() {
    let place = Place::new(0.1);
    drop_every_other_label(&place);
    let (address, asked) = endpoint();
    let spec = |seed: u32| {
        json!({
            "model": {
                "from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]},
                "labels": ["negative", "positive"],
            },
            "data": {
                "sources": [{"name": "reviews", "uri": place.uri("rows.jsonl")}],
                "annotate": {"endpoint": {"url": address, "model": "judge", "inputTokenPrice": "1"}},
            },
            "hyperparameters": {"maxSteps": 2, "batchSize": 8, "maxSequenceLength": 16, "seed": seed},
            "distributed": {"processesPerNode": 2},
        })
    };
    // A check says what would be asked, and asks nothing.
    let text = place.check("annotated", &spec(0)).unwrap();
    assert!(text.contains("150 of 300 rows have no label: at most 1"), "{text}");
    assert!(text.contains(&format!("questions to judge at {address}, whose prompts cost at most 0.0")), "{text}");
    assert_eq!(asked.load(Ordering::Relaxed), 0);

    let child = place.start("annotated", &spec(0));
    place.finish("annotated", child, 0);
    let summary = place.summary("annotated");
    let left_out = held_out_without_label(&place);
    assert_eq!(summary.rows.train + summary.rows.validation + summary.rows.test, 300 - left_out);
    let first = asked.load(Ordering::Relaxed);
    assert!((100..=150).contains(&first), "each text once: {first}");
    let found = report(&summary.artifact);
    assert_eq!(found["annotation"]["labelled"], 150, "{}", found["annotation"]);
    let html = page(&summary.artifact);
    for part in ["Annotated by judge: 150 of 150 rows", "tokens of prompts, of answers"] {
        assert!(html.contains(part), "{part} is not in {html}");
    }

    // Another job of the same folder: everything was answered before.
    let child = place.start("annotated", &spec(1));
    place.finish("annotated", child, 0);
    assert_eq!(asked.load(Ordering::Relaxed), first);
    assert_eq!(place.summary("annotated").data_digest, summary.data_digest);
}

#[test]
fn a_teacher_labels_the_rows_it_is_sure_of() {
    let place = Place::new(0.1);
    let train = json!({"epochs": 3, "batchSize": 16, "maxSequenceLength": 24, "learningRate": 2e-4});
    let child = place.start("teacher", &json!({"hyperparameters": train}));
    place.finish("teacher", child, 0);
    let teacher = place.summary("teacher").artifact;
    drop_every_other_label(&place);
    let student = |minimum: &str, ranks: u32, seed: u32| {
        json!({
            "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]}},
            "teacher": {"from": teacher},
            "objective": {"terms": [{"crossEntropy": {}}]},
            "data": {
                "sources": [{"name": "reviews", "uri": place.uri("rows.jsonl")}],
                "annotate": {"teacher": {"minimumConfidence": minimum}},
            },
            "hyperparameters": {
                "maxSteps": 2, "batchSize": 8, "maxSequenceLength": 24, "seed": seed, "precision": "FP32",
            },
            "distributed": {"processesPerNode": ranks, "backend": "Gloo"},
        })
    };
    let log = |out: &str| std::fs::read_to_string(place.folder.path().join(out).join("log")).unwrap();
    let number = |value: &Value| value.as_u64().unwrap();

    let text = place.check("all", &student("0.5", 1, 0)).unwrap();
    assert!(
        text.contains("150 of 300 rows have no label: the teacher labels those it is sure of by 0.5 or more"),
        "{text}"
    );

    // Whatever the teacher says is taken, and two ranks together find what one finds.
    for (out, ranks) in [("all", 1), ("shared", 2)] {
        let child = place.start(out, &student("0", ranks, 0));
        place.finish(out, child, 0);
    }
    let (all, shared) = (place.summary("all"), place.summary("shared"));
    let left_out = held_out_without_label(&place);
    assert_eq!(all.rows.train + all.rows.validation + all.rows.test, 300 - left_out);
    assert_eq!(all.data_digest, shared.data_digest);
    let annotation = &report(&all.artifact)["annotation"];
    assert_eq!(
        (&annotation["by"], &annotation["labelled"], &annotation["dropped"]),
        (&json!("Teacher"), &json!(150), &json!(0))
    );
    let html = page(&all.artifact);
    for part in ["Annotated by the teacher: 150 of 150 rows", "confidence below 0", "<td>positive</td>"] {
        assert!(html.contains(part), "{part} is not in {html}");
    }
    let balance: u64 = annotation["balance"].as_array().unwrap().iter().map(|label| number(&label["rows"])).sum();
    assert_eq!(balance, 150, "{annotation}");
    let comparison = &annotation["comparison"];
    assert!((100..150).contains(&number(&comparison["rows"])), "the labelled rows of the training part: {comparison}");
    // It was trained on them.
    assert!(comparison["disagreement"].as_f64().unwrap() < 0.3, "{comparison}");
    assert!(
        std::fs::read_to_string(folder(&all.artifact).join("report.html"))
            .unwrap()
            .contains("Annotated by the teacher")
    );
    assert!(!log("all").contains("Asking the teacher"), "no term learns from it");

    // Rows of which it is not sure are left out, and what it said is known from the first run: two files, of the rows and of the
    // comparison, which is another for another threshold.
    let child = place.start("all", &student("0.9", 1, 1));
    place.finish("all", child, 0);
    let summary = place.summary("all");
    let annotation = &report(&summary.artifact)["annotation"];
    let (labelled, dropped) = (number(&annotation["labelled"]), number(&annotation["dropped"]));
    assert_eq!(labelled + dropped, 150);
    assert!(dropped > 0, "{annotation}");
    let rows = summary.rows.train + summary.rows.validation + summary.rows.test;
    assert!(
        (150 + labelled - left_out..=150 + labelled).contains(&rows),
        "{rows} of {labelled} and 150, without {left_out}"
    );
    assert_eq!((summary.rows.validation, summary.rows.test), (all.rows.validation, all.rows.test));
    assert_ne!(summary.data_digest, all.data_digest);
    assert_eq!(log("all").matches("the teacher's answers were kept from another run").count(), 1);
    let child = place.start("all", &student("0.9", 2, 2));
    place.finish("all", child, 0);
    assert_eq!(place.summary("all").data_digest, summary.data_digest);
    assert_eq!(
        log("all").matches("the teacher's answers were kept from another run").count(),
        1 + 2 * 2,
        "by each rank"
    );

    let mut wrong = student("0", 1, 0);
    wrong["model"]["labels"] = json!(["negative", "great"]);
    let child = place.start("wrong", &wrong);
    place.finish("wrong", child, 3);
    let TrainResult::Failed { message } = place.result("wrong") else { panic!("{:?}", place.result("wrong")) };
    assert!(message.contains("label \"positive\" is not one of model.labels (negative, great)"), "{message}");
}

/// Of each step the loss and the value of each term.
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

#[test]
fn a_search_on_a_laptop_trains_with_the_best_and_goes_on_where_it_was() {
    let place = Place::new(0.1);
    let spec = json!({
        "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]}},
        "hyperparameters": {
            "maxSteps": 3, "batchSize": 8, "maxSequenceLength": 16,
            "search": {
                "algorithm": "Random", "maxTrials": 3, "parallelism": 2,
                // Not the score that chooses a trial's weights.
                "objective": {"metric": "MacroF1"},
                "parameters": [{"name": "learningRate", "range": {"min": 1e-5, "max": 1e-3, "scale": "Log"}}],
            },
        },
    });
    let child = place.start("search", &spec);
    place.finish("search", child, 0);
    let log = || std::fs::read_to_string(place.folder.path().join("search/log")).unwrap();
    assert_eq!(log().matches("a trial is done").count(), 3, "{}", log());
    let best = log().lines().find(|line| line.contains("the best of 3 trials")).unwrap().to_owned();
    let summary = place.summary("search");
    let found = report(&summary.artifact);
    let rate = found["hyperparameters"]["learningRate"].as_f64().unwrap();
    assert!(best.contains(&format!("learningRate={rate}")), "{best}: {rate}");
    let steps = || log().matches("\"milestone\":\"firstStep\"").count();
    assert_eq!(steps(), 4, "three trials and the job");

    let child = place.start("search", &spec);
    place.finish("search", child, 0);
    assert_eq!(log().matches("a trial is done").count(), 6, "told again");
    assert!(steps() <= 5, "no trial was trained again");

    let mut wrong = spec.clone();
    wrong["hyperparameters"]["search"]["parameters"][0]["range"]["min"] = json!(2.0);
    let child = place.start("wrong", &wrong);
    place.finish("wrong", child, 3);

    let mut missing = spec.clone();
    missing["model"]["from"] = json!(place.uri("nowhere"));
    let child = place.start("missing", &missing);
    place.finish("missing", child, 3);
    let TrainResult::Failed { message } = place.result("missing") else { panic!("{:?}", place.result("missing")) };
    assert!(message.starts_with("hyperparameters.search: trial ") && message.contains("nowhere"), "{message}");
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
