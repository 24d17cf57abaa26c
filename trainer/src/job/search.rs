//! The search for hyperparameters on a laptop: trials as processes of this program, as the operator makes them jobs of
//! their own.
//!
//! A trial's folder is named by its specification, and an artifact in it of the same data and models is a trial that is
//! done: a search that was killed continues when it is run again.

use std::{process::ExitStatus, sync::Arc};

use athanor_contract::{
    artifact::MANIFEST,
    process::api,
    train::{DataSpec, Hyperparameters, TrainConfig, TrainResult, TrainSpec, exit_code},
};
use athanor_search::{Next, Search, Trial, Unit, apply};
use athanor_store::{Location, StoreError};
use serde::{Deserialize, Serialize};
use tokio::{process::Command, runtime::Handle, sync::OnceCell, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{config, run};
use crate::{TrainError, distributed::environment, report::Reading, tasks, train::count_steps};

/// Runs the trials of the specification and returns the job with the values of the best one.
///
/// # Errors
/// If all trials fail, or one with a user error, which the others have too. Any other trial that fails is logged and
/// skipped. A second search with the same specification is refused while the first one runs.
pub async fn best(job: &TrainConfig, stop: CancellationToken) -> Result<TrainConfig, TrainError> {
    let spec = &job.spec;
    let Some(wanted) = &spec.hyperparameters.search else { return Ok(job.clone()) };
    let user = |message: String| TrainError::User(format!("hyperparameters.search: {message}"));
    let search = Search::new(wanted, &spec.hyperparameters).map_err(user)?;
    let search = search.first_alone(spec.data.endpoint_annotates());
    let _claim = run::claim(job)?;
    let key = wanted.objective.key(&spec.hyperparameters);
    let data = Arc::new(Data::new(spec));
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
            let (key, data) = (key.clone(), data.clone());
            running.spawn(async move { (index, train(&config, &key, &data).await) });
        }
    }
}

/// Steps of all trials together, with the job's own values for those that are searched for: on `rows` rows, and on
/// those of each fold. 0 without a search.
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

/// What the results of trials follow from besides their specifications. Artifacts of earlier trials count only if it has
/// not changed.
struct Data {
    spec: DataSpec,
    needs_labels: bool,
    /// URIs of the parent and, if there is one, the teacher.
    models: Vec<String>,
    digest: OnceCell<String>,
    inputs: OnceCell<Inputs>,
}

/// The part of it that an artifact does not name, kept next to a trial's checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Inputs {
    /// Versions of the models.
    models: Vec<String>,
    /// Digest of the rows without the labels that they are given. Absent where rows are not annotated: there the
    /// artifact has the digest of the same rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rows: Option<String>,
}

impl Inputs {
    const FILE: &str = "inputs.json";

    fn place(config: &TrainConfig) -> Result<Location, TrainError> {
        Ok(athanor_store::open(&config.checkpoint_to)?.child(Self::FILE))
    }

    /// Those of the trial's last run; `None` if it has not run, or if the file cannot be read.
    async fn kept(place: &Location) -> Result<Option<Self>, TrainError> {
        match place.read().await {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn keep(&self, place: &Location) -> Result<(), TrainError> {
        place.write(serde_json::to_vec(self).map_err(TrainError::other)?.into()).await?;
        Ok(())
    }
}

impl Data {
    fn new(spec: &TrainSpec) -> Self {
        let teacher = spec.teacher.iter().map(|teacher| teacher.from.clone());
        Self {
            spec: spec.data.clone(),
            needs_labels: tasks::of(spec.model.task).needs_labels(),
            models: std::iter::once(spec.model.from.clone()).chain(teacher).collect(),
            digest: OnceCell::new(),
            inputs: OnceCell::new(),
        }
    }

    /// The digest of the data as they are now, which are read once.
    async fn digest(&self) -> Result<&str, TrainError> {
        let now = self.digest.get_or_try_init(|| async {
            let (spec, needs_labels, runtime) = (self.spec.clone(), self.needs_labels, Handle::current());
            // Reading computes between its waits.
            let read = move || runtime.block_on(async { Reading::new(false).read(&spec, needs_labels).await });
            let dataset = tokio::task::spawn_blocking(read).await.map_err(TrainError::other)??;
            Ok::<_, TrainError>(dataset.digest)
        });
        Ok(now.await?)
    }

    async fn inputs(&self) -> Result<&Inputs, TrainError> {
        let now = self.inputs.get_or_try_init(|| async {
            let mut models = Vec::new();
            for uri in &self.models {
                models.push(athanor_store::artifact::model_version(&athanor_store::open(uri)?).await?);
            }
            let rows = if self.spec.annotate.is_some() { Some(self.digest().await?.to_owned()) } else { None };
            Ok::<_, TrainError>(Inputs { models, rows })
        });
        now.await
    }

    /// What has changed since a trial whose artifact has this digest of data; `None` if its result counts.
    async fn changed(&self, data_digest: &str, kept: Option<Inputs>) -> Result<Option<&'static str>, TrainError> {
        let now = self.inputs().await?;
        let models_are_same = kept.as_ref().is_some_and(|kept| kept.models == now.models);
        let data_are_same = match self.spec.annotate {
            Some(_) => kept.is_some_and(|kept| kept.rows == now.rows),
            None => self.digest().await? == data_digest,
        };
        Ok(match (data_are_same, models_are_same) {
            (true, true) => None,
            (false, _) => Some("data"),
            (true, false) => Some("models"),
        })
    }
}

/// The metric of one trial, from its artifact.
async fn train(config: &TrainConfig, key: &str, data: &Data) -> Result<f64, TrainError> {
    let inputs = Inputs::place(config)?;
    if let Some(trial) = found(config, key).await? {
        let Some(what) = data.changed(&trial.data_digest, Inputs::kept(&inputs).await?).await? else {
            return Ok(trial.value);
        };
        tracing::info!(trial = config.name, "the {what} have changed since the trial: it runs again");
        // Until it has ended, no artifact is its result.
        athanor_store::open(&config.artifact_to)?.child(MANIFEST).delete().await?;
    }
    data.inputs().await?.keep(&inputs).await?;
    let manifest = serde_json::json!({
        "apiVersion": api::API_VERSION, "kind": api::FINE_TUNE_JOB,
        "metadata": {"name": config.name}, "spec": config.spec,
    });
    let file = tempfile::Builder::new().suffix(".json").tempfile().map_err(TrainError::other)?;
    serde_json::to_writer(&file, &manifest).map_err(TrainError::other)?;
    let program = std::env::current_exe().map_err(TrainError::other)?;
    // Its result is its artifact; the termination message is the search's own.
    let message = tempfile::NamedTempFile::new().map_err(TrainError::other)?;
    let mut command = Command::new(program);
    command.args(["run", "-f"]).arg(file.path()).kill_on_drop(true);
    command.env(environment::TERMINATION_LOG, message.path()).env(environment::LOSS_LOG, "");
    command.env(environment::PARENT, std::process::id().to_string());
    let status: ExitStatus = command.status().await.map_err(TrainError::other)?;
    if !status.success() {
        return Err(failure(status, &std::fs::read_to_string(message.path()).unwrap_or_default()));
    }
    let trial = found(config, key).await?;
    trial.map(|trial| trial.value).ok_or_else(|| TrainError::Other(format!("the trial's artifact has no metric {key}")))
}

/// Why a trial ended early; `written` is its termination message, or empty.
fn failure(status: ExitStatus, written: &str) -> TrainError {
    let message = match serde_json::from_str(written) {
        Ok(TrainResult::Failed { message }) => message,
        _ => format!("it ended with {status}"),
    };
    if status.code() == Some(exit_code::USER_ERROR) { TrainError::User(message) } else { TrainError::Other(message) }
}

/// A trial that is done.
struct Found {
    value: f64,
    data_digest: String,
}

async fn found(config: &TrainConfig, key: &str) -> Result<Option<Found>, TrainError> {
    let artifact = athanor_store::open(&config.artifact_to)?;
    match athanor_store::artifact::read_manifest(&artifact).await {
        Ok(manifest) => {
            let value = manifest.metrics.get(key).map(|value| value.get());
            Ok(value.map(|value| Found { value, data_digest: manifest.data_digest }))
        }
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_trial_fails_with_its_own_message() {
        let message = "data.sources[0]: no column 'text'".to_owned();
        let written = &serde_json::to_string(&TrainResult::Failed { message }).unwrap();
        let ended = |code: i32| ExitStatus::from_raw(code << 8);
        let error = failure(ended(exit_code::USER_ERROR), written);
        assert!(matches!(&error, TrainError::User(message) if message.contains("no column 'text'")), "{error}");
        assert!(
            matches!(failure(ended(exit_code::NON_FINITE), written), TrainError::Other(_)),
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
    async fn only_artifacts_of_the_same_data_and_models_are_results() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let uri = |name: &str| format!("file://{}/{name}", folder.path().display());
        let spec: TrainSpec = serde_json::from_value(serde_json::json!({
            "model": {"from": uri("parent"), "task": "TextClassification"},
            "teacher": {"from": uri("teacher")},
            "data": {"sources": [{"name": "rows", "uri": uri("rows.jsonl")}]},
            "output": {"to": uri("output")},
        }))
        .unwrap();
        let mut annotated = spec.clone();
        annotated.data.annotate = Some(serde_json::from_value(serde_json::json!({"teacher": {}})).unwrap());
        let row = |text: &str| write("rows.jsonl", &format!("{{\"text\": \"{text}\", \"label\": \"a\"}}\n"));
        row("one");
        for model in ["parent", "teacher"] {
            for file in ["model.safetensors", "config.json", "tokenizer.json"] {
                write(&format!("{model}/{file}"), "{}");
            }
        }
        let place = athanor_store::open(&uri("inputs.json")).unwrap();
        assert_eq!(Inputs::kept(&place).await.unwrap(), None);
        Data::new(&annotated).inputs().await.unwrap().keep(&place).await.unwrap();
        let kept = Inputs::kept(&place).await.unwrap();
        let digest = Data::new(&spec).digest().await.unwrap().to_owned();
        let changed =
            async |spec: &TrainSpec, kept: Option<Inputs>| Data::new(spec).changed(&digest, kept).await.unwrap();
        assert_eq!(changed(&spec, kept.clone()).await, None);
        assert_eq!(
            changed(&annotated, kept.clone()).await,
            None,
            "the artifact's digest has the labels that were given"
        );
        assert_eq!(changed(&spec, None).await, Some("models"), "a trial of a version that kept nothing");
        row("another");
        assert_eq!(changed(&spec, kept.clone()).await, Some("data"));
        assert_eq!(changed(&annotated, kept.clone()).await, Some("data"));
        row("one");
        write("teacher/model.safetensors", "{\"other\": 1}");
        assert_eq!(changed(&spec, kept).await, Some("models"));
        let of_parent = Data::new(&TrainSpec { teacher: None, ..spec.clone() }).inputs().await.unwrap().clone();
        let other = TrainSpec { teacher: None, ..spec };
        assert_eq!(changed(&other, Some(of_parent.clone())).await, None);
        write("parent/config.json", "{\"layers\": 1}");
        assert_eq!(changed(&other, Some(of_parent)).await, Some("models"));
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
