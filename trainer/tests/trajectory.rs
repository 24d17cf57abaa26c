//! Fifty steps of fine-tuning, distillation and masked language modelling against a plain PyTorch loop over
//! transformers' models (`golden/make.py`), in fp32 on tiny models: losses and gradient norms, mean residual at most
//! 1e-5.

use std::{path::PathBuf, sync::Arc, time::Instant};

use athanor_contract::train::{Task, TrainSpec};
use athanor_models::{Model, Options, tokenizer::MaskTokens};
use athanor_trainer::{
    data::{
        Columns, Encoded,
        batches::{epoch_batches, mix},
    },
    network::Network,
    objectives::{Objective, Teacher},
    report::Timeline,
    tasks::{classification::Labels, masked_language_model::Maskable, masking::mask_row},
    teacher::{Online, Student},
    train::{self, Session, schedule::LearningRate, watchdog::Watchdog},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::Device;
use tokio_util::sync::CancellationToken;

const STEPS: u64 = 50;
const ROWS: usize = 64;
const MASK_TOKENS: (u32, u32, [u32; 3]) = (4, 120, [0, 1, 2]);

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Rows that both sides make alike.
fn rows(task: Task) -> Encoded {
    let ids = (0..ROWS as u32)
        .map(|row| {
            let length = 4 + (row * 7) % 9;
            let inner = (0..length).map(|place| 5 + (row * 31 + place * 17 + row * place) % 115);
            std::iter::once(0).chain(inner).chain([2]).collect::<Vec<u32>>()
        })
        .collect();
    let [mask, vocabulary] = [MASK_TOKENS.0, MASK_TOKENS.1];
    let columns: Box<dyn Columns> = match task {
        Task::MaskedLanguageModel => {
            Box::new(Maskable(Some(MaskTokens { mask, vocabulary, special: MASK_TOKENS.2.into() })))
        }
        _ => Box::new(Labels((0..ROWS).map(|row| Some((row as u16 * 5 / 3) % 2)).collect())),
    };
    Encoded { ids, sources: vec![0; ROWS], columns }
}

fn spec(task: Task, batch_size: u32, accumulate_steps: u32, terms: &Value) -> TrainSpec {
    serde_json::from_value(json!({
        "model": {"from": "file:///unused", "task": task},
        "objective": {"terms": terms},
        "data": {"sources": [{"name": "rows", "uri": "file:///unused.csv"}]},
        "hyperparameters": {
            "maxSteps": STEPS, "batchSize": batch_size, "learningRate": 1e-3, "warmupRatio": 0.1, "precision": "FP32",
            "accumulateSteps": accumulate_steps, "dropout": 0.0, "seed": 7,
        },
        "output": {"to": "file:///unused"},
    }))
    .unwrap()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    loss: f64,
    gradient_norm: f64,
}

/// Losses and gradient norms of a run.
fn run(family: &str, task: Task, batch_size: u32, accumulate: u32, terms: &Value, teacher: Option<&str>) -> Vec<Line> {
    let spec = spec(task, batch_size, accumulate, terms);
    // The CUDA build measures the GPU.
    let device = Device::cuda_if_available();
    let folder = golden(family);
    let labels = ["a".to_owned(), "b".to_owned()];
    let head = match task {
        Task::MaskedLanguageModel => athanor_models::Task::MaskedLanguageModel,
        _ => athanor_models::Task::Classification(labels.to_vec()),
    };
    let options = Options { dropout: Some(0.0), head_dropout: Some(0.0), ..Options::default() };
    let mut model = Network::from(Model::load(&folder, head, &options, device).unwrap());
    let Network::Encoder(encoder) = &model else { panic!("an encoder") };
    assert_eq!(encoder.fresh_layers(), [""; 0], "the golden model is whole");
    let train = rows(task);
    let terms = spec.objective_terms();
    let teacher = teacher.map(|name| {
        // The tiny models have no tokenizer: both folders borrow one.
        let folder = golden(name);
        let student = Student { task, labels: &labels, folder: &golden("tiny-bert"), by_token: false, max_length: 32 };
        Teacher::Online(Box::new(Online::load(&folder, &student, device).unwrap()))
    });
    let objective = Objective::new(terms, task, &model, teacher.as_ref(), 7, device).unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let validation = Arc::new(rows(task));
    let session = Session {
        spec: &spec,
        stage: "Training".into(),
        device,
        bf16: false,
        group: None,
        model: &mut model,
        objective,
        teacher: teacher.as_ref(),
        train: &train,
        validation: Box::new(move || Ok(validation.clone())),
        fingerprint: String::new(),
        restored: None,
        checkpoints: None,
        events: None,
        reporter: None,
        timeline: Timeline::new(Instant::now()),
        watchdog: Watchdog::start(std::time::Duration::ZERO, |_, _| ()),
        stop: CancellationToken::new(),
        loss_log: Some(log.path().to_owned()),
    };
    train::train(session).unwrap();
    let text = std::fs::read_to_string(log.path()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn residual(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!((ours.len(), theirs.len()), (STEPS as usize, STEPS as usize));
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).sum::<f64>() / STEPS as f64
}

#[test]
fn trajectories_are_those_of_a_plain_loop() {
    let theirs: Value = serde_json::from_str(&std::fs::read_to_string(golden("trajectories.json")).unwrap()).unwrap();
    let soft = json!([{"weight": 0.5, "crossEntropy": {}}, {"weight": 0.5, "softLabel": {"temperature": 2.0}}]);
    let cases = [
        ("fine-tuning bert", "tiny-bert", Task::TextClassification, json!([{"crossEntropy": {}}]), None),
        ("fine-tuning mpnet", "tiny-mpnet", Task::TextClassification, json!([{"crossEntropy": {}}]), None),
        ("soft label bert", "tiny-bert", Task::TextClassification, soft, Some("tiny-mpnet")),
        ("masked bert", "tiny-bert-mlm", Task::MaskedLanguageModel, json!([{"maskedLanguageModel": {}}]), None),
        ("masked mpnet", "tiny-mpnet-mlm", Task::MaskedLanguageModel, json!([{"maskedLanguageModel": {}}]), None),
    ];
    for (name, family, task, terms, teacher) in cases {
        let lines = run(family, task, 8, 1, &terms, teacher);
        let expected = |field: &str| -> Vec<f64> { serde_json::from_value(theirs[name][field].clone()).unwrap() };
        let losses = residual(&lines.iter().map(|line| line.loss).collect::<Vec<_>>(), &expected("loss"));
        let norms =
            residual(&lines.iter().map(|line| line.gradient_norm).collect::<Vec<_>>(), &expected("gradient_norm"));
        eprintln!("{name}: mean residual of losses {losses:.2e}, of gradient norms {norms:.2e}");
        // FP32 has 6e-8 relative a sum; fifty steps of AdamW make a hundred times as much of it.
        assert!(losses <= 1e-5 && norms <= 1e-5, "{name}: {losses:.2e} {norms:.2e}");
        let mean = |lines: &[Line]| lines.iter().map(|line| line.loss).sum::<f64>() / lines.len() as f64;
        assert!(mean(&lines[40..]) < mean(&lines[..10]), "{name}: it learns");
    }
}

#[test]
fn eight_passes_of_one_row_are_one_of_eight() {
    for (family, task, terms) in [
        ("tiny-bert", Task::TextClassification, json!([{"crossEntropy": {}}])),
        ("tiny-bert-mlm", Task::MaskedLanguageModel, json!([{"maskedLanguageModel": {}}])),
    ] {
        let whole = run(family, task, 8, 1, &terms, None);
        let parts = run(family, task, 8, 8, &terms, None);
        let losses = |lines: &[Line]| lines.iter().map(|line| line.loss).collect::<Vec<_>>();
        let found = residual(&losses(&whole), &losses(&parts));
        // The same sums in another order, over fifty steps.
        assert!(found <= 1e-5, "{family}: {found:.2e}");
    }
}

/// Writes `golden/batches.json`, what `make.py` trains on: run with `--ignored` after batches or masking have changed.
#[test]
#[ignore = "writes the golden file's input"]
fn write_batches() {
    let train = rows(Task::TextClassification);
    let spec = spec(Task::TextClassification, 8, 1, &json!([]));
    let h = &spec.hyperparameters;
    let rate = LearningRate::new(h.learning_rate, h.warmup_ratio, STEPS, h.schedule);
    let per_epoch = (ROWS / 8) as u64;
    let tokens = MaskTokens { mask: MASK_TOKENS.0, vocabulary: MASK_TOKENS.1, special: MASK_TOKENS.2.into() };
    let steps: Vec<Value> = (0..STEPS)
        .map(|step| {
            let batches = epoch_batches(&train.lengths(), 8, 7, step / per_epoch);
            let rows = batches.get((step % per_epoch) as usize);
            let masked: Vec<_> = rows
                .iter()
                .map(|&row| mask_row(&train.ids[row], &tokens, 0.15, mix(mix(7, step), row as u64)))
                .collect();
            json!({"rows": rows, "learning_rate": rate.at(step), "masked": masked})
        })
        .collect();
    let labels: Vec<usize> = train.classes().into_iter().flatten().collect();
    let file = json!({"ids": train.ids.iter().collect::<Vec<_>>(), "labels": labels, "steps": steps});
    std::fs::write(golden("batches.json"), file.to_string()).unwrap();
}
