//! The search for hyperparameters on a laptop: trials as processes of this program, as the operator makes them jobs of their own.
//!
//! A trial's folder is named by its specification, and an artifact that is there is a trial that is done: a search that was killed
//! goes on by running it again.

use std::process::ExitStatus;

use athanor_contract::{
    process::api,
    train::{Hyperparameters, TrainConfig, TrainResult, TrainSpec, exit_code},
};
use athanor_search::{Next, Search, Trial, Unit, apply};
use athanor_store::StoreError;
use tokio::{process::Command, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{TrainError, config, distributed::environment, run, training::count_steps};

/// Runs the trials that the specification asks for, and gives the job with the best one's values.
///
/// # Errors
/// If all trials fail, or one by the user's error, which the others have too. Another trial that fails is told and passed over.
/// A second search with the same specification is refused while the first one runs.
pub async fn best(job: &TrainConfig, stop: CancellationToken) -> Result<TrainConfig, TrainError> {
    let spec = &job.spec;
    let Some(wanted) = &spec.hyperparameters.search else { return Ok(job.clone()) };
    let user = |message: String| TrainError::User(format!("hyperparameters.search: {message}"));
    let search = Search::new(wanted, &spec.hyperparameters).map_err(user)?;
    let search = search.first_alone(spec.data.endpoint_annotates());
    let _claim = run::claim(job)?;
    let key = wanted.objective.key(&spec.hyperparameters);
    let mut trials: Vec<Trial> = Vec::new();
    let mut running: JoinSet<(usize, Result<f64, TrainError>)> = JoinSet::new();
    let mut last = String::new();
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
                let outcomes = Search::outcomes(&trials, best);
                let best = &trials[best];
                tracing::info!(trial = best.name(), values = %best.assignment, "the best of {} trials", trials.len());
                let found = config::of_laptop(job.name.clone(), apply(&best.assignment, spec).map_err(user)?)?;
                return Ok(TrainConfig { trials: outcomes, ..found });
            }
            Next::Done { best: None } => {
                return Err(user(format!("all {} trials failed, the last one: {last}", trials.len())));
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
                    Err(TrainError::User(message)) => {
                        return Err(user(format!("trial {} ({}): {message}", trial.name(), trial.assignment)));
                    }
                    Err(error) => {
                        last = error.to_string();
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
            running.spawn(async move { (index, train(&config, &key).await) });
        }
    }
}

/// Steps of all trials together, with the job's own values for those that are searched for: on `rows` rows, and on those of each
/// fold. 0 without a search.
pub fn steps(h: &Hyperparameters, rows: usize, folds: &[usize]) -> Result<u64, TrainError> {
    let Some(wanted) = &h.search else { return Ok(0) };
    let search = Search::new(wanted, h).map_err(|mistake| TrainError::User(format!("hyperparameters.{mistake}")))?;
    let one_of = u64::from(wanted.asha.unwrap_or_default().reduction_factor);
    let mut trials = u64::from(wanted.max_trials);
    let mut steps = 0;
    for &budget in search.budgets() {
        let h = match search.unit() {
            Unit::Steps => Hyperparameters { max_steps: Some(budget), ..h.clone() },
            Unit::Epochs => Hyperparameters { epochs: u32::try_from(budget).ok(), ..h.clone() },
        };
        steps += trials * folds.iter().chain([&rows]).map(|&rows| count_steps(rows, &h).1).sum::<u64>();
        trials /= one_of;
    }
    Ok(steps)
}

/// The metric of one trial, from its artifact.
async fn train(config: &TrainConfig, key: &str) -> Result<f64, TrainError> {
    if let Some(value) = found(config, key).await? {
        return Ok(value);
    }
    let manifest = serde_json::json!({
        "apiVersion": api::API_VERSION, "kind": api::FINE_TUNE_JOB, "metadata": {"name": config.name}, "spec": config.spec,
    });
    let file = tempfile::Builder::new().suffix(".json").tempfile().map_err(TrainError::other)?;
    serde_json::to_writer(&file, &manifest).map_err(TrainError::other)?;
    let program = std::env::current_exe().map_err(TrainError::other)?;
    // Its result is its artifact: what else a run tells is the whole search's to tell.
    let told = tempfile::NamedTempFile::new().map_err(TrainError::other)?;
    let mut command = Command::new(program);
    command.args(["run", "-f"]).arg(file.path()).kill_on_drop(true);
    command.env(environment::TERMINATION_LOG, told.path()).env(environment::LOSS_LOG, "");
    command.env(environment::PARENT, std::process::id().to_string());
    let status: ExitStatus = command.status().await.map_err(TrainError::other)?;
    if !status.success() {
        return Err(failure(status, &std::fs::read_to_string(told.path()).unwrap_or_default()));
    }
    found(config, key).await?.ok_or_else(|| TrainError::Other(format!("the trial's artifact tells no {key}")))
}

/// Why a trial ended early; `told` is its termination message, or nothing.
fn failure(status: ExitStatus, told: &str) -> TrainError {
    let message = match serde_json::from_str(told) {
        Ok(TrainResult::Failed { message }) => message,
        _ => format!("it ended with {status}"),
    };
    if status.code() == Some(exit_code::USER_ERROR) { TrainError::User(message) } else { TrainError::Other(message) }
}

async fn found(config: &TrainConfig, key: &str) -> Result<Option<f64>, TrainError> {
    let artifact = athanor_store::open(&config.artifact_to)?;
    match athanor_store::artifact::read_manifest(&artifact).await {
        Ok(manifest) => Ok(manifest.metrics.get(key).map(|value| value.get())),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_trial_fails_with_its_own_words() {
        let message = "data.sources[0]: no column 'text'".to_owned();
        let told = &serde_json::to_string(&TrainResult::Failed { message }).unwrap();
        let ended = |code: i32| ExitStatus::from_raw(code << 8);
        let error = failure(ended(exit_code::USER_ERROR), told);
        assert!(matches!(&error, TrainError::User(message) if message.contains("no column 'text'")), "{error}");
        assert!(
            matches!(failure(ended(exit_code::NON_FINITE), told), TrainError::Other(_)),
            "other trials may go well"
        );
        let killed = failure(ExitStatus::from_raw(9), "");
        assert!(matches!(&killed, TrainError::Other(message) if message.contains("signal: 9")), "{killed}");
    }

    #[test]
    fn trials_count_with_their_budgets_and_folds() {
        let h = |search: serde_json::Value| -> Hyperparameters {
            let mut search = search;
            search["parameters"] = serde_json::json!([{"name": "learningRate", "values": [1e-5, 1e-4]}]);
            serde_json::from_value(serde_json::json!({"maxSteps": 90, "search": search})).unwrap()
        };
        assert_eq!(steps(&Hyperparameters::default(), 320, &[]).unwrap(), 0);
        let random = h(serde_json::json!({"algorithm": "Random", "maxTrials": 4}));
        assert_eq!(steps(&random, 320, &[]).unwrap(), 4 * 90);
        assert_eq!(steps(&random, 320, &[160, 160]).unwrap(), 4 * 3 * 90);
        let epochs = Hyperparameters { epochs: Some(2), max_steps: None, ..random };
        assert_eq!(steps(&epochs, 320, &[160]).unwrap(), 4 * (2 * 10 + 2 * 5));
        let asha = h(serde_json::json!({"algorithm": "ASHA", "maxTrials": 9, "asha": {"minimumSteps": 10}}));
        assert_eq!(steps(&asha, 320, &[]).unwrap(), 9 * 10 + 3 * 30 + 90);
    }

    #[tokio::test]
    async fn a_search_runs_once_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let spec: TrainSpec = serde_json::from_value(serde_json::json!({
            "model": {"from": "file:///models/none", "task": "TextClassification"},
            "data": {"sources": [{"name": "rows", "uri": "file:///none.jsonl"}]},
            "hyperparameters": {"search": {"parameters": [{"name": "learningRate", "values": [1e-5, 1e-4]}]}},
            "output": {"to": format!("file://{}", folder.path().display())},
        }))
        .unwrap();
        let job = config::of_laptop("reviews".into(), spec).unwrap();
        let _first = run::claim(&job).unwrap().unwrap();
        let error = best(&job, CancellationToken::new()).await.unwrap_err();
        assert!(error.to_string().contains("another process runs this job and writes here"), "{error}");
    }
}
