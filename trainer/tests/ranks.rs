//! Two ranks that are threads of this process, on a tiny model.

use std::{
    cell::Cell,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use athanor_contract::train::{Task, TrainSpec};
use athanor_models::{Model, Options};
use athanor_torch::{Backend, ProcessGroup, Rendezvous};
use athanor_trainer::{
    data::Encoded,
    network::Network,
    objectives::Objective,
    report::Timeline,
    tasks::regression::Numbers,
    train::{self, Session, Trained, watchdog::Watchdog},
};
use serde_json::json;
use tch::{Device, Tensor};
use tokio_util::sync::CancellationToken;

const ROWS: usize = 24;

/// Rows with a number each.
fn rows(number: impl Fn(usize) -> f32) -> Encoded {
    let ids = (0..ROWS as u32)
        .map(|row| {
            let inner = (0..3 + row % 5).map(|place| 5 + (row * 31 + place * 17) % 115);
            std::iter::once(0).chain(inner).chain([2]).collect::<Vec<u32>>()
        })
        .collect();
    Encoded { ids, sources: vec![0; ROWS], columns: Box::new(Numbers((0..ROWS).map(number).collect())) }
}

/// One rank's training; `at_validation` gets the number of a validation, from 1, and the model's weights, and returns
/// the rows. Returns the weights at the end.
fn run(
    spec: &TrainSpec,
    group: &ProcessGroup,
    at_validation: &dyn Fn(u64, &[Tensor]) -> Arc<Encoded>,
) -> (Trained, Vec<Tensor>) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-bert");
    let options = Options { dropout: Some(0.0), head_dropout: Some(0.0), ..Options::default() };
    let mut model =
        Network::from(Model::load(&folder, athanor_models::Task::Regression, &options, Device::Cpu).unwrap());
    let weights: Vec<Tensor> = model.parameters().iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
    let objective = Objective::new(spec.objective_terms(), Task::TextRegression, &model, None, 3, Device::Cpu).unwrap();
    let train = rows(|row| row as f32 / 10.0);
    let validations = Cell::new(0);
    let session = Session {
        spec,
        stage: "Training".into(),
        device: Device::Cpu,
        bf16: false,
        group: Some(group),
        model: &mut model,
        objective,
        teacher: None,
        train: &train,
        validation: Box::new(|| {
            validations.set(validations.get() + 1);
            Ok(at_validation(validations.get(), &weights))
        }),
        fingerprint: String::new(),
        restored: None,
        checkpoints: None,
        events: None,
        reporter: None,
        timeline: Timeline::new(Instant::now()),
        watchdog: Watchdog::start(Duration::ZERO, |_, _| ()),
        stop: CancellationToken::new(),
        loss_log: None,
    };
    let trained = train::train(session).unwrap();
    let ended = weights.iter().map(Tensor::detach).collect();
    (trained, ended)
}

#[test]
fn every_rank_ends_with_the_best_weights_which_rank_0_kept() {
    let spec: TrainSpec = serde_json::from_value(json!({
        "model": {"from": "file:///unused", "task": "TextRegression"},
        "data": {"sources": [{"name": "rows", "uri": "file:///unused.csv"}]},
        "hyperparameters": {"epochs": 2, "batchSize": 4, "learningRate": 1e-3, "precision": "FP32", "seed": 3},
        "output": {"to": "file:///unused"},
    }))
    .unwrap();
    let copies = |weights: &[Tensor]| weights.iter().map(|tensor| tensor.detach().copy()).collect::<Vec<Tensor>>();
    // Weights of rank 0 at its first validation; those of each rank at the second and at the end.
    let best: Mutex<Vec<Tensor>> = Mutex::default();
    let last: Mutex<Vec<Vec<Tensor>>> = Mutex::default();
    let ended: Mutex<Vec<(u64, Vec<Tensor>)>> = Mutex::default();
    std::thread::scope(|scope| {
        for at in Rendezvous::on_loopback(2).unwrap() {
            let (spec, best, last, ended) = (&spec, &best, &last, &ended);
            scope.spawn(move || {
                let group = ProcessGroup::new(Backend::Gloo, at).unwrap();
                let at_validation = |validation: u64, weights: &[Tensor]| {
                    if validation == 1 {
                        if group.rank() == 0 {
                            *best.lock().unwrap() = copies(weights);
                        }
                        return Arc::new(rows(|row| row as f32 / 10.0));
                    }
                    last.lock().unwrap().push(copies(weights));
                    // The same texts have other numbers now, far from all that was learned: the first one stays the best.
                    Arc::new(rows(|row| 1e4 - 100.0 * row as f32))
                };
                let (trained, weights) = run(spec, &group, &at_validation);
                ended.lock().unwrap().push((trained.best.step, weights));
                // Rank 0 has the store that the other is still using.
                group.barrier().unwrap();
            });
        }
    });
    let (best, last, ended) = (best.into_inner().unwrap(), last.into_inner().unwrap(), ended.into_inner().unwrap());
    assert_eq!((last.len(), ended.len()), (2, 2));
    assert!(last.iter().all(|last| last != &best), "the second epoch changed nothing");
    for (step, weights) in ended {
        assert_eq!(step, ROWS as u64 / 4);
        assert!(weights == best, "a rank ended with other weights");
    }
}
