//! What a run does when loss or gradients are not finite (`failurePolicy.onNonFinite`): in the process on a tiny model,
//! and by the real binary on MiniLM's first layer (`$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment`,
//! `scripts/fetch`), seconds each.

mod place;

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use athanor_contract::{
    artifact::{Kind, Manifest},
    train::{SplitSpec, Task, TrainSpec},
};
use athanor_data::{Part, part_of};
use athanor_models::{Model, Options};
use athanor_trainer::{
    TrainError,
    data::{Encoded, batches::epoch_batches},
    network::Network,
    objectives::Objective,
    report::Timeline,
    tasks::regression::Numbers,
    train::{
        self, Session,
        checkpoint::{self, Restored, State, Writer},
        watchdog::Watchdog,
    },
};
use place::Place;
use serde_json::{Value, json};
use tch::{Device, Tensor};
use tokio_util::sync::CancellationToken;

const ROWS: usize = 24;
const BATCH: usize = 4;
const STEPS_PER_EPOCH: u64 = (ROWS / BATCH) as u64;
const EPOCHS: u64 = 2;
const SEED: u64 = 3;
/// A number whose square is not finite in FP32.
const HUGE: f32 = 1e30;
/// Runs of one process share libtorch's generator, by which dropout is drawn: they take turns.
static GENERATOR: Mutex<()> = Mutex::new(());

/// Numbers to learn; those of the rows in `bad` are huge.
fn rows(bad: &[usize]) -> Encoded {
    let ids = (0..ROWS as u32)
        .map(|row| {
            let inner = (0..3 + row % 5).map(|place| 5 + (row * 31 + place * 17) % 115);
            std::iter::once(0).chain(inner).chain([2]).collect::<Vec<u32>>()
        })
        .collect();
    let numbers = (0..ROWS).map(|row| if bad.contains(&row) { HUGE } else { row as f32 / 10.0 }).collect();
    Encoded { ids, sources: vec![0; ROWS], columns: Box::new(Numbers(numbers)) }
}

/// Some row of each step of the first epoch.
fn row_of_step() -> Vec<usize> {
    epoch_batches(&rows(&[]).lengths(), BATCH, SEED, 0).iter().map(|batch| batch[0]).collect()
}

/// Steps, counted from 1, of the batches with these rows.
fn steps_with(bad: &[usize]) -> BTreeSet<u64> {
    let lengths = rows(&[]).lengths();
    let batches = (0..EPOCHS).flat_map(|epoch| epoch_batches(&lengths, BATCH, SEED, epoch).iter().collect::<Vec<_>>());
    let steps = (1..).zip(batches).filter(|(_, batch)| batch.iter().any(|row| bad.contains(row)));
    steps.map(|(step, _)| step).collect()
}

fn spec(policy: &str, checkpoint_every: u64, validate_every: u64) -> TrainSpec {
    serde_json::from_value(json!({
        "model": {"from": "file:///unused", "task": "TextRegression"},
        "data": {"sources": [{"name": "rows", "uri": "file:///unused.csv"}]},
        "hyperparameters": {"epochs": EPOCHS, "batchSize": BATCH, "learningRate": 1e-3, "precision": "FP32", "seed": SEED},
        "evaluate": {"everySteps": validate_every},
        "checkpoint": {"everySteps": checkpoint_every},
        "failurePolicy": {"onNonFinite": policy},
        "output": {"to": "file:///unused"},
    }))
    .unwrap()
}

type AtValidation<'a> = &'a dyn Fn(u64, &[Tensor]);

/// What is special about a run.
#[derive(Default)]
struct Special<'a> {
    /// Called at each validation with its number, from 1, and the model's weights.
    at_validation: Option<AtValidation<'a>>,
    stop: CancellationToken,
    checkpoints: Option<Writer>,
    restored: Option<Restored>,
}

/// Losses by step in the order of the log, and the weights at the end.
type Ended = (Vec<(u64, Option<f64>)>, Vec<Tensor>);

fn run(spec: &TrainSpec, bad: &[usize], special: Special) -> Result<Ended, TrainError> {
    let _turn = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-bert");
    let options = Options { dropout: Some(0.1), head_dropout: Some(0.1), ..Options::default() };
    let mut model =
        Network::from(Model::load(&folder, athanor_models::Task::Regression, &options, Device::Cpu).unwrap());
    let weights: Vec<Tensor> = model.parameters().iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
    let terms = spec.objective_terms();
    let objective = Objective::new(terms, Task::TextRegression, &model, None, SEED, Device::Cpu).unwrap();
    let (train, validation) = (rows(bad), Arc::new(rows(&[])));
    let log = tempfile::NamedTempFile::new().unwrap();
    let validations = Cell::new(0);
    let session = Session {
        spec,
        stage: "Training".into(),
        device: Device::Cpu,
        bf16: false,
        group: None,
        model: &mut model,
        objective,
        teacher: None,
        train: &train,
        validation: Box::new(|| {
            validations.set(validations.get() + 1);
            if let Some(at_validation) = special.at_validation {
                at_validation(validations.get(), &weights);
            }
            Ok(validation.clone())
        }),
        fingerprint: String::new(),
        restored: special.restored,
        checkpoints: special.checkpoints,
        events: None,
        reporter: None,
        timeline: Timeline::new(Instant::now()),
        watchdog: Watchdog::start(Duration::ZERO, |_, _| ()),
        stop: special.stop,
        loss_log: Some(log.path().to_owned()),
    };
    if let Some(mut writer) = train::train(session)?.checkpoints {
        writer.finish()?;
    }
    let text = std::fs::read_to_string(log.path()).unwrap();
    let line = |line: &str| -> (u64, Option<f64>) {
        let line: Value = serde_json::from_str(line).unwrap();
        (line["step"].as_u64().unwrap(), line["loss"].as_f64())
    };
    Ok((text.lines().map(line).collect(), weights.iter().map(Tensor::detach).collect()))
}

fn same(one: &[Tensor], other: &[Tensor]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(one, other)| one.equal(other))
}

fn finite(weights: &[Tensor]) -> bool {
    weights.iter().all(|tensor| tensor.isfinite().all().int64_value(&[]) == 1)
}

#[test]
fn a_rolled_back_run_is_the_run_without_the_step() {
    let bad = [row_of_step()[3]];
    let left_out = steps_with(&bad);
    assert!(left_out.contains(&4) && left_out.len() == EPOCHS as usize, "{left_out:?}");
    match run(&spec("Fail", 2, 0), &bad, Special::default()) {
        Err(error @ TrainError::NonFinite { step: 4, .. }) => assert_eq!(error.exit_code(), 44),
        other => panic!("{:?}", other.map(|(losses, _)| losses)),
    }
    let (skipped, expected) = run(&spec("Skip", 2, 0), &bad, Special::default()).unwrap();
    assert!(finite(&expected) && skipped.len() as u64 == EPOCHS * STEPS_PER_EPOCH);
    let losses: BTreeMap<u64, f64> = skipped.into_iter().filter_map(|(step, loss)| Some((step, loss?))).collect();
    for checkpoint_every in [1, 2, 0] {
        let (steps, weights) = run(&spec("RollBack", checkpoint_every, 0), &bad, Special::default()).unwrap();
        assert!(same(&weights, &expected), "checkpoints every {checkpoint_every}");
        // Steps after a checkpoint are taken again, and are the same again.
        let again = steps.len() - losses.len();
        assert!((again == 0) == (checkpoint_every == 1), "{again} steps were taken again: {steps:?}");
        for (step, loss) in steps {
            assert!(!left_out.contains(&step) && loss == Some(losses[&step]), "step {step}: {loss:?}");
        }
    }
}

#[test]
fn corrupted_weights_are_mended_by_rolling_back_and_not_by_skipping() {
    // Validations after steps 3, 6, ...; checkpoints after 6 and 12.
    let corrupt = |validation: u64, weights: &[Tensor]| {
        if validation == 1 {
            tch::no_grad(|| weights.iter().for_each(|tensor| drop(tensor.shallow_clone().fill_(f64::NAN))));
        }
    };
    let special = || Special { at_validation: Some(&corrupt), ..Special::default() };
    let (_, weights) = run(&spec("Skip", 0, 3), &[], special()).unwrap();
    assert!(!finite(&weights));
    let (steps, weights) = run(&spec("RollBack", 0, 3), &[], special()).unwrap();
    assert!(finite(&weights));
    let order: Vec<u64> = steps.iter().map(|(step, _)| *step).collect();
    assert_eq!(order, [1, 2, 3, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]);
}

#[test]
fn roll_backs_without_a_new_checkpoint_are_numbered() {
    let bad = &row_of_step()[1..5];
    match run(&spec("RollBack", 0, 0), bad, Special::default()) {
        Err(error @ TrainError::RolledBackInVain { step: 5, times: 3, checkpoint: 0, .. }) => {
            assert_eq!(error.exit_code(), 44);
            assert!(error.to_string().contains("after 3 roll-backs to step 0 without a new checkpoint"), "{error}");
        }
        other => panic!("{:?}", other.map(|(losses, _)| losses)),
    }
    // Each of them with a checkpoint before it.
    let (_, expected) = run(&spec("Skip", 1, 0), bad, Special::default()).unwrap();
    let (_, weights) = run(&spec("RollBack", 1, 0), bad, Special::default()).unwrap();
    assert!(same(&weights, &expected));
}

#[test]
fn a_checkpoint_knows_the_steps_that_are_left_out() {
    let bad = [row_of_step()[3]];
    let spec = spec("RollBack", 0, 1);
    let (_, expected) = run(&spec, &bad, Special::default()).unwrap();

    let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let location = athanor_store::open(&format!("file://{}", folder.path().display())).unwrap();
    let writer = || {
        let template = Manifest {
            kind: Kind::Checkpoint,
            job: "job".into(),
            model_digest: String::new(),
            data_digest: String::new(),
            parent: String::new(),
            code_version: String::new(),
            step: 0,
            max_sequence_length: None,
            files: BTreeMap::new(),
            metrics: BTreeMap::new(),
        };
        Some(Writer::new(location.clone(), template, work.path().to_owned(), runtime.handle().clone()))
    };
    // Validations 1 to 3 are those before the roll-back, the fourth is that of step 1 again.
    let stop = CancellationToken::new();
    let when_rolled_back = |validation: u64, _: &[Tensor]| {
        if validation == 4 {
            stop.cancel();
        }
    };
    let special = Special {
        at_validation: Some(&when_rolled_back),
        stop: stop.clone(),
        checkpoints: writer(),
        ..Special::default()
    };
    match run(&spec, &bad, special) {
        Err(TrainError::Stopped { step: 2, checkpoint: 2 }) => {}
        other => panic!("{:?}", other.map(|(losses, _)| losses)),
    }
    let restored = runtime.block_on(checkpoint::newest(&location, &work.path().join("newest"))).unwrap().unwrap();
    assert_eq!((restored.state.step, &restored.state.skipped), (2, &[4].into()));
    let special = Special { restored: Some(restored), checkpoints: writer(), ..Special::default() };
    let (steps, weights) = run(&spec, &bad, special).unwrap();
    assert_eq!(steps[..3].iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 5, 6], "4 is left out at once");
    assert!(same(&weights, &expected));
}

/// Rows with a number for each of the place's texts; that of one training row is huge.
fn numbered_rows(place: &Place) {
    let text = std::fs::read_to_string(place.folder.path().join("rows.jsonl")).unwrap();
    let texts: Vec<String> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned())
        .collect();
    let is_trained = |text: &String| part_of(text, &SplitSpec::default()) == Part::Train;
    let bad = texts.iter().position(is_trained).unwrap();
    let rows = texts.iter().enumerate().map(|(row, text)| {
        let number = if row == bad { f64::from(HUGE) } else { text.len() as f64 / 100.0 };
        format!("{}\n", json!({"text": text, "label": number.to_string()}))
    });
    std::fs::write(place.folder.path().join("numbers.jsonl"), rows.collect::<String>()).unwrap();
}

#[test]
fn ranks_roll_back_alike_and_a_killed_run_comes_to_the_same_end() {
    let place = Place::new(0.0);
    numbered_rows(&place);
    let spec = |ranks: u32, shard: bool| {
        json!({
            "model": {"from": place.uri("model"), "task": "TextRegression", "student": {"keepLayers": [0]}},
            "data": {"sources": [{"name": "rows", "uri": place.uri("numbers.jsonl")}]},
            "hyperparameters": {"epochs": 2, "batchSize": 16, "precision": "FP32", "maxSequenceLength": 16},
            "checkpoint": {"everySteps": 50},
            "failurePolicy": {"onNonFinite": "RollBack"},
            "distributed": {"processesPerNode": ranks, "backend": "Gloo", "shardOptimizer": shard},
        })
    };
    for (out, ranks, shard) in [("one", 1, false), ("two", 2, false), ("shards", 2, true)] {
        let child = place.start(out, &spec(ranks, shard));
        place.finish(out, child, 0);
    }
    let log = |out: &str| std::fs::read_to_string(place.folder.path().join(out).join("log")).unwrap();
    assert_eq!(log("one").matches("rolled back, the step").count(), 2, "once an epoch: {}", log("one"));
    let one = place.losses("one");
    for out in ["two", "shards"] {
        assert_eq!(log(out).matches("rolled back, the step").count(), 4, "on both ranks: {}", log(out));
        let other = place.losses(out);
        assert_eq!(one.len(), other.len());
        for ((step, a), (same, b)) in one.iter().zip(&other) {
            // Sums over ranks in another order, made larger by the optimizer; a squared error is above 1.
            assert!(step == same && (a - b).abs() < 2e-4 * a.abs().max(1.0), "{out}, step {step}: {a} is not {b}");
        }
    }

    let mut child = place.start("killed", &spec(1, false));
    let deadline = Instant::now() + Duration::from_secs(120);
    while !log("killed").contains("rolled back, the step") {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "{}", log("killed"));
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let child = place.start("killed", &spec(1, false));
    place.finish("killed", child, 0);
    assert_eq!(place.summary("killed").model_digest, place.summary("one").model_digest);
    assert_eq!(skipped(&place, "killed"), skipped(&place, "one"));
    assert_eq!(skipped(&place, "one").len(), 2, "a step of each epoch");
}

/// What the newest checkpoint says is left out.
fn skipped(place: &Place, out: &str) -> BTreeSet<u64> {
    let read = |path: &Path| serde_json::from_slice::<State>(&std::fs::read(path).unwrap()).unwrap();
    let states = place.find(out, "state.json").into_iter().map(|path| read(&path));
    states.max_by_key(|state| state.step).unwrap().skipped
}
