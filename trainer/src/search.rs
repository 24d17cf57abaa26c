//! The search for hyperparameters on a laptop: trials as processes of this program, as the operator makes them jobs of their own.
//!
//! A trial's folder is named by its specification, and an artifact that is there is a trial that is done: a search that was killed
//! goes on by running it again.

use std::{collections::BTreeMap, process::ExitStatus};

use athanor_contract::train::{TrainConfig, TrainSpec};
use athanor_search::{Next, Search, Trial, apply};
use athanor_store::StoreError;
use tokio::{process::Command, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{TrainError, config};

/// Runs the trials that the specification asks for, and gives the job with the best one's values.
///
/// # Errors
/// If all trials fail. A trial that fails alone is told and passed over.
pub async fn best(job: &TrainConfig, stop: CancellationToken) -> Result<TrainConfig, TrainError> {
    let spec = &job.spec;
    let Some(wanted) = &spec.hyperparameters.search else { return Ok(job.clone()) };
    let user = |message: String| TrainError::User(format!("hyperparameters.search: {message}"));
    let search = Search::new(wanted, &spec.hyperparameters).map_err(user)?;
    let key = wanted.objective.key(&spec.hyperparameters);
    let mut trials: Vec<Trial> = Vec::new();
    let mut running: JoinSet<(usize, Result<f64, TrainError>)> = JoinSet::new();
    loop {
        let started: Vec<usize> = match search.next(&trials) {
            Next::Start(assignments) => {
                let first = trials.len();
                trials.extend(assignments.into_iter().map(Trial::new));
                (first..trials.len()).collect()
            }
            Next::Promote { trial, .. } => {
                trials[trial].promote();
                vec![trial]
            }
            Next::Done { best: Some(best) } => {
                let best = &trials[best];
                tracing::info!(trial = best.name(), values = %best.assignment, "the best of {} trials", trials.len());
                return config::of_laptop(job.name.clone(), apply(&best.assignment, spec).map_err(user)?);
            }
            Next::Done { best: None } => {
                return Err(TrainError::User(format!("hyperparameters.search: all {} trials failed", trials.len())));
            }
            Next::Wait => {
                let ended = tokio::select! {
                    ended = running.join_next() => ended,
                    () = stop.cancelled() => return Err(TrainError::Stopped { step: 0, checkpoint: 0 }),
                };
                let Some(ended) = ended else {
                    return Err(TrainError::Other("the search waits, but no trial runs".into()));
                };
                let (index, result) = ended.map_err(TrainError::other)?;
                let trial = &mut trials[index];
                match result {
                    Ok(value) => {
                        tracing::info!(trial = trial.name(), values = %trial.assignment, value, "a trial is done");
                        trial.report(value);
                    }
                    Err(error) => {
                        tracing::warn!(trial = trial.name(), values = %trial.assignment, %error, "a trial failed");
                        trial.fail();
                    }
                }
                continue;
            }
        };
        for index in started {
            let trial = &trials[index];
            let mut spec: TrainSpec = search.specification(&trial.assignment, trial.rung(), spec).map_err(user)?;
            // Trials are not judged by test rows, and their artifacts are thrown away.
            (spec.evaluate.gates, spec.evaluate.baseline, spec.compress) = Default::default();
            let config = config::of_laptop(format!("{}-{}-{}", job.name, trial.name(), trial.rung()), spec)?;
            let key = key.clone();
            running.spawn(async move { (index, run(&config, &key).await) });
        }
    }
}

/// The metric of one trial, from its artifact.
async fn run(config: &TrainConfig, key: &str) -> Result<f64, TrainError> {
    if let Some(value) = found(config, key).await? {
        return Ok(value);
    }
    let manifest = serde_json::json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": config.name}, "spec": config.spec,
    });
    let file = tempfile::Builder::new().suffix(".json").tempfile().map_err(TrainError::other)?;
    serde_json::to_writer(&file, &manifest).map_err(TrainError::other)?;
    let program = std::env::current_exe().map_err(TrainError::other)?;
    // Its result is its artifact: what else a run tells is the whole search's to tell.
    let quiet: BTreeMap<&str, &str> = [("ATHANOR_TERMINATION_LOG", ""), ("ATHANOR_LOSS_LOG", "")].into();
    let mut command = Command::new(program);
    command.args(["run", "-f"]).arg(file.path()).envs(quiet).kill_on_drop(true);
    let status: ExitStatus = command.status().await.map_err(TrainError::other)?;
    if !status.success() {
        return Err(TrainError::Other(format!("the trial ended with {status}")));
    }
    found(config, key).await?.ok_or_else(|| TrainError::Other(format!("the trial's artifact tells no {key}")))
}

async fn found(config: &TrainConfig, key: &str) -> Result<Option<f64>, TrainError> {
    let artifact = athanor_store::open(&config.artifact_to)?;
    match athanor_store::artifact::read_manifest(&artifact).await {
        Ok(manifest) => Ok(manifest.metrics.get(key).map(|value| value.get())),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
