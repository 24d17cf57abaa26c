//! Rows without a label get one, from an endpoint or from the teacher, by the real binary.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use athanor_contract::train::{SplitSpec, TrainResult};
use athanor_data::part_of;
use place::{Place, folder, page, report};
use serde_json::{Value, json};

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
#[expect(clippy::too_many_lines, reason = "one run after the other on the same rows")]
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

    // Rows of which it is not sure are left out. Its answers are known from the first run: for the rows without a
    // label, and for those that it is compared with, which are the same for another threshold.
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
    assert_eq!(log("all").matches("the teacher's answers were kept from another run").count(), 2);
    let child = place.start("all", &student("0.9", 2, 2));
    place.finish("all", child, 0);
    assert_eq!(place.summary("all").data_digest, summary.data_digest);
    assert_eq!(
        log("all").matches("the teacher's answers were kept from another run").count(),
        2 + 2 * 2,
        "by each rank"
    );

    let mut wrong = student("0", 1, 0);
    wrong["model"]["labels"] = json!(["negative", "great"]);
    let child = place.start("wrong", &wrong);
    place.finish("wrong", child, 3);
    let TrainResult::Failed { message } = place.result("wrong") else { panic!("{:?}", place.result("wrong")) };
    assert!(message.contains("label \"positive\" is not one of model.labels (negative, great)"), "{message}");
}
