//! Sources that are a part of their own, rows that the processes of a machine share, and hostile files, by the real
//! binary on MiniLM's first layer and a few real rows.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::collections::BTreeSet;

use athanor_contract::train::TrainResult;
use place::{Place, page, report};
use serde_json::{Value, json};

/// A short training on `processes` processes of one machine.
fn spec(place: &Place, processes: u32, data: Value) -> Value {
    json!({
        "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]}},
        "data": data,
        "hyperparameters": {"maxSteps": 3, "batchSize": 8, "maxSequenceLength": 16, "precision": "FP32"},
        "distributed": {"processesPerNode": processes, "backend": "Gloo"},
    })
}

fn log(place: &Place, out: &str) -> String {
    std::fs::read_to_string(place.folder.path().join(out).join("log")).unwrap()
}

/// The place's rows, each text once.
fn rows(place: &Place) -> Vec<Value> {
    let text = std::fs::read_to_string(place.folder.path().join("rows.jsonl")).unwrap();
    let mut seen = BTreeSet::new();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.filter(|row| seen.insert(row["text"].as_str().unwrap().to_owned())).collect()
}

fn write(place: &Place, name: &str, rows: &[Value]) {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(place.folder.path().join(name), lines).unwrap();
}

#[test]
fn a_source_with_a_part_is_that_part_and_its_texts_are_not_trained_on() {
    let place = Place::new(0.0);
    let rows = rows(&place);
    let (train, held_out) = rows.split_at(rows.len() - 60);
    let (validation, test) = held_out.split_at(30);
    // Five test rows and two validation rows are in the training file too, and a row that is nearly a test row.
    let mut own = [train, &test[..5], &validation[..2]].concat();
    let longest = test.iter().max_by_key(|row| row["text"].as_str().unwrap().len()).unwrap();
    own.push(json!({"text": format!("{}!?", longest["text"].as_str().unwrap()), "label": longest["label"]}));
    write(&place, "own.jsonl", &own);
    write(&place, "validation.jsonl", validation);
    write(&place, "test.jsonl", test);
    let sources = json!([
        {"name": "own", "uri": place.uri("own.jsonl")},
        {"name": "validation", "uri": place.uri("validation.jsonl"), "part": "Validation"},
        {"name": "test", "uri": place.uri("test.jsonl"), "part": "Test"},
    ]);

    let mut exact = spec(&place, 2, json!({"sources": sources}));
    exact["hyperparameters"]["crossValidation"] = json!({"folds": 2});
    exact["evaluate"] = json!({"gates": [{"metric": "Accuracy", "minimum": "0", "sources": ["test"]}]});
    let told = place.check("checked", &exact).unwrap();
    assert!(told.contains("left out    7 rows that a source with a part has too, such as "), "{told}");
    assert!(told.contains(&format!("rows        own: {} train, 0 validation, 0 test", train.len() + 1)), "{told}");
    let child = place.start("exact", &exact);
    place.finish("exact", child, 0);
    let summary = place.summary("exact");
    assert_eq!((summary.rows.validation, summary.rows.test), (30, 30));
    assert_eq!(summary.rows.train, train.len() as u64 + 1);
    assert_eq!(summary.chosen["heldOutOverlap"], "7");
    let found = report(&summary.artifact);
    assert_eq!(found["heldOutOverlap"]["rows"], 7);
    let folds = found["crossValidation"]["folds"].as_array().unwrap();
    let in_folds: u64 = folds.iter().map(|fold| fold["heldOut"].as_u64().unwrap()).sum();
    assert_eq!(in_folds, summary.rows.train, "folds are of training rows alone");
    assert!(page(&summary.artifact).contains("Rows with texts of a held-out source: 7 left out"));

    let clean = json!({"nearDuplicates": {}});
    let child = place.start("near", &spec(&place, 1, json!({"sources": sources, "clean": clean})));
    place.finish("near", child, 0);
    let near = place.summary("near");
    let left_out: u64 = near.chosen["heldOutOverlap"].parse().unwrap();
    // The real rows may have near duplicates of their own.
    let counted = near.rows.train + near.rows.validation + near.rows.test + left_out;
    assert!(left_out >= 8 && counted == own.len() as u64 + 60, "{left_out} {:?}", near.rows);
    assert_eq!(near.rows.test, 30);
    assert_ne!(near.data_digest, summary.data_digest);

    let parts = [("own", "Validation"), ("test", "Test")];
    let all: Vec<Value> = parts
        .iter()
        .map(|(name, part)| json!({"name": name, "uri": place.uri(&format!("{name}.jsonl")), "part": part}))
        .collect();
    let child = place.start("none", &spec(&place, 1, json!({"sources": all})));
    place.finish("none", child, 3);
    let TrainResult::Failed { message } = place.result("none") else { panic!("a job without training rows") };
    assert!(message.contains("at least one source must have no part"), "{message}");
}

#[test]
fn the_processes_of_a_machine_prepare_the_data_once() {
    let place = Place::new(0.0);
    let select = json!({"method": "ClusterCenter", "keepPercent": 50});
    let data = json!({"sources": [{"name": "reviews", "uri": place.uri("rows.jsonl")}], "select": select});
    for (out, processes) in [("one", 1), ("three", 3)] {
        let child = place.start(out, &spec(&place, processes, data.clone()));
        place.finish(out, child, 0);
    }
    for what in ["rows", "split", "tokens", "selection"] {
        let line = format!("loaded the {what} that the first process of this machine prepared");
        assert_eq!(log(&place, "one").matches(&line).count(), 0);
        assert_eq!(log(&place, "three").matches(&line).count(), 2, "{what}");
    }
    let (one, three) = (place.summary("one"), place.summary("three"));
    assert_eq!((one.data_digest, one.rows), (three.data_digest, three.rows));
    assert_eq!(one.chosen["trainedRows"], three.chosen["trainedRows"]);
    assert!(report(&three.artifact)["selection"]["rows"].is_u64(), "the report is that of the first process");

    let mut rows = rows(&place);
    rows[7]["text"] = json!("");
    write(&place, "wrong.jsonl", &rows);
    let wrong = json!({"sources": [{"name": "reviews", "uri": place.uri("wrong.jsonl")}]});
    let child = place.start("wrong", &spec(&place, 3, wrong));
    place.finish("wrong", child, 3);
    let TrainResult::Failed { message } = place.result("wrong") else { panic!("a wrong row") };
    assert_eq!(message, format!("{} row 8: field \"text\" is empty", place.uri("wrong.jsonl")));
}

/// A PDF with one page, which shows a line of text and draws the form /F.
fn pdf(text: &str, form: &str) -> Vec<u8> {
    let content = format!("BT /F1 12 Tf 10 10 Td ({text}) Tj ET /F Do");
    let resources = "/Resources << /Font << /F1 6 0 R >> /XObject << /F 5 0 R >> >>";
    let objects = [
        "<< /Type /Catalog /Pages 2 0 R >>".to_owned(),
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>".to_owned(),
        format!("<< /Type /Page /Parent 2 0 R /MediaBox [0 0 99 99] /Contents 4 0 R {resources} >>"),
        format!("<< /Length {} >>\nstream\n{content}\nendstream", content.len()),
        format!(
            "<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] {resources} /Length {} >>\nstream\n{form}\nendstream",
            form.len()
        ),
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>".to_owned(),
    ];
    let (mut file, mut table) = ("%PDF-1.4\n".to_owned(), String::new());
    for (number, object) in (1..).zip(&objects) {
        table.push_str(&format!("{:010} 00000 n \n", file.len()));
        file.push_str(&format!("{number} 0 obj\n{object}\nendobj\n"));
    }
    let (start, size) = (file.len(), objects.len() + 1);
    file.push_str(&format!("xref\n0 {size}\n0000000000 65535 f \n{table}"));
    file.push_str(&format!("trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n"));
    file.into_bytes()
}

#[test]
fn a_hostile_pdf_is_named_and_ends_no_trainer() {
    let place = Place::new(0.0);
    let folder = place.folder.path().join("pdf");
    std::fs::create_dir(&folder).unwrap();
    for number in 0..40 {
        let text = format!("the page of document number {number}");
        std::fs::write(folder.join(format!("{number}.pdf")), pdf(&text, "q Q")).unwrap();
    }
    let mut job = spec(&place, 1, json!({"sources": [{"name": "documents", "uri": place.uri("pdf/*.pdf")}]}));
    job["model"]["task"] = json!("MaskedLanguageModel");
    let told = place.check("good", &job).unwrap();
    assert!(told.contains("rows        documents: "), "{told}");

    // A form that draws itself.
    std::fs::write(folder.join("hostile.pdf"), pdf("a page", "/F Do")).unwrap();
    let child = place.start("hostile", &job);
    place.finish("hostile", child, 3);
    let TrainResult::Failed { message } = place.result("hostile") else { panic!("a hostile file") };
    let expected = format!("{}: not readable as PDF: its objects are nested too deeply", place.uri("pdf/hostile.pdf"));
    assert!(message.starts_with(&expected), "{message}");
}
