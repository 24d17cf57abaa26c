//! Training: the part of a `FineTuneJob` that the trainer reads, the configuration the operator mounts, and the result.

mod annotate;
mod augment;
mod clean;
mod compress;
mod cross_validation;
mod data;
mod evaluate;
mod execution;
mod hyperparameters;
mod model;
mod objective;
mod search;
mod select;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Decimal;

pub use annotate::*;
pub use augment::*;
pub use clean::*;
pub use compress::*;
pub use cross_validation::*;
pub use data::*;
pub use evaluate::*;
pub use execution::*;
pub use hyperparameters::*;
pub use model::*;
pub use objective::*;
pub use search::*;
pub use select::*;

/// How a trainer process ended; the operator decides by these numbers.
pub mod exit_code {
    pub const DONE: i32 = 0;
    /// The user's input is wrong: never retried, the termination message says what to change.
    pub const USER_ERROR: i32 = 3;
    /// A peer went away, or this process was asked to stop: the gang starts again from its last checkpoint.
    pub const LOST_PEER: i32 = 42;
    /// No step ended for `failurePolicy.hangSeconds`.
    pub const HUNG: i32 = 43;
    /// Loss or gradients were not finite and the policy is `Fail`.
    pub const NON_FINITE: i32 = 44;
}

/// A FineTuneJob as a file: the same manifest that `kubectl apply` takes, read by `athanor-trainer run -f`.
/// Fields of the specification that only a cluster needs (`podTemplate`, `suspend`, ...) are skipped.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobManifest {
    pub api_version: String,
    pub kind: String,
    pub metadata: ManifestMetadata,
    pub spec: TrainSpec,
}

/// Fields of a FineTuneJob's specification that only a cluster needs.
pub const CLUSTER_FIELDS: [&str; 6] =
    ["credentialsSecretName", "podTemplate", "image", "suspend", "activeDeadlineSeconds", "ttlSecondsAfterFinished"];

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ManifestMetadata {
    pub name: String,
}

/// What to train, on which data, and what the result has to be worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainSpec {
    /// The model to start from and what it shall do.
    pub model: ModelSpec,
    /// A trained model that this one learns from, besides the labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<TeacherSpec>,
    /// What is minimised.
    #[serde(default, skip_serializing_if = "ObjectiveSpec::is_default")]
    pub objective: ObjectiveSpec,
    /// Where rows come from and how they are split.
    pub data: DataSpec,
    /// Hyperparameters; every one has a default that suits fine-tuning an encoder.
    #[serde(default)]
    pub hyperparameters: Hyperparameters,
    /// Metrics, how often they are computed, and the gates a result must pass.
    #[serde(default)]
    pub evaluate: EvaluateSpec,
    /// Makes the result smaller, step by step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub compress: Vec<CompressStep>,
    /// Where the artifact goes.
    pub output: OutputSpec,
    /// How many processes train together.
    #[serde(default)]
    pub distributed: DistributedSpec,
    /// How often training state is saved.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
    /// What happens when a process fails, hangs or diverges.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
}

impl TrainSpec {
    /// What is asked of the results or the rows that the task has not: it could only fail after the work.
    pub fn mistakes_of_task(&self) -> Vec<String> {
        let (task, metrics) = (self.model.task, Metric::of(self.model.task));
        let gates = self.evaluate.gates.iter().enumerate();
        let gates = gates.map(|(index, gate)| (format!("evaluate.gates[{index}].metric"), gate.metric));
        let search = self.hyperparameters.search.as_ref();
        let search =
            search.map(|search| ("hyperparameters.search.objective.metric".to_owned(), search.objective.metric));
        let wrong = search.into_iter().chain(gates).filter(|(_, metric)| !metrics.contains(metric));
        let names = metrics.iter().map(|metric| format!("{metric:?}")).collect::<Vec<_>>().join(" or ");
        let mut mistakes: Vec<String> =
            wrong.map(|(field, metric)| format!("{field}: {task:?} has no {metric:?}, but {names}")).collect();
        for (index, _) in self.evaluate.gates.iter().enumerate().filter(|(_, gate)| gate.minimum_of_teacher.is_some()) {
            let field = format!("evaluate.gates[{index}].minimumOfTeacher");
            if task != Task::TextClassification {
                mistakes.push(format!("{field} is for the task TextClassification"));
            } else if self.teacher.is_none() {
                mistakes.push(format!("{field} needs a teacher"));
            }
        }
        if let Some(select) = &self.data.select
            && matches!(select.method, SelectMethod::Uncertainty | SelectMethod::GradientMatching)
            && task != Task::TextClassification
        {
            mistakes.push(format!("data.select.method: {:?} needs labels, which {task:?} has not", select.method));
        }
        if let Some(minimum) = self.data.select.as_ref().and_then(|select| select.minimum_agreement) {
            if task != Task::TextClassification {
                mistakes.push("data.select.minimumAgreement is for the task TextClassification".into());
            } else if self.teacher.is_none() {
                mistakes.push("data.select.minimumAgreement needs a teacher".into());
            }
            if !(0.0..=1.0).contains(&minimum.get()) {
                mistakes.push("data.select.minimumAgreement is from \"0\" to \"1\"".into());
            }
        }
        let is_fresh = self.model.student.as_ref().is_some_and(|student| student.fresh.is_some());
        if is_fresh && self.data.select.as_ref().is_some_and(|select| select.viewer == SelectViewer::Model) {
            mistakes
                .push("data.select.viewer: Model knows nothing before training where model.student is fresh".into());
        }
        if self.data.augment.is_some() {
            if task != Task::TextClassification {
                mistakes.push("data.augment is for the task TextClassification".into());
            } else if self.teacher.is_none() {
                mistakes.push("data.augment needs a teacher, who knows what the new texts mean".into());
            }
        }
        mistakes
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutputSpec {
    /// A folder: s3://, gs://, az://, file://. The artifact appears below it, in a folder of its own for each run.
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(s3|gs|az|file)://.+"))]
    pub to: String,
}

/// What the operator mounts as `train.json`: the specification, resolved, and the run's coordinates.
/// Rank, world size and rendezvous come from the environment (see `RENDEZVOUS` in the trainer).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainConfig {
    /// Name of the job, for logs, metrics and the artifact's manifest.
    pub name: String,
    /// The job's UID: it names the run's folders and authenticates progress reports.
    pub run_id: String,
    pub spec: TrainSpec,
    /// Folder of checkpoints, `{output.to}/{name}-{run_id[..8]}/checkpoints`.
    pub checkpoint_to: String,
    /// Folder of the artifact, `{output.to}/{name}-{run_id[..8]}/artifact`.
    pub artifact_to: String,
    /// Folder of the event files for TensorBoard, which grow while the run goes on: `{output.to}/{name}-{run_id[..8]}/tensorboard`.
    pub events_to: String,
    /// The trials that the hyperparameters come from, in the order in which they were started; none without a search.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<TrialOutcome>,
    /// gRPC address that takes progress, such as `http://athanor-operator.athanor-system:9443`; absent on a laptop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress_to: Option<String>,
}

/// The termination message of rank 0, at most 4,096 bytes: it outlives an operator that was away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "outcome")]
pub enum TrainResult {
    #[serde(rename_all = "camelCase")]
    Succeeded(TrainSummary),
    /// Trained, but a gate did not hold.
    #[serde(rename_all = "camelCase")]
    GateFailed(TrainSummary),
    #[serde(rename_all = "camelCase")]
    Failed { message: String },
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainSummary {
    /// Folder of the artifact.
    pub artifact: String,
    /// sha256 over the artifact's files.
    pub model_digest: String,
    /// sha256 over sources, versions or offset ranges, split and seed.
    pub data_digest: String,
    /// Optimizer steps taken.
    pub steps: u64,
    /// Rows for training, validation, test.
    pub rows: RowCounts,
    /// Metrics on the test rows: `accuracy`, `macroF1`, and with a source's name in front, `reviews/accuracy`;
    /// the baseline's have `baseline/` in front, the best validation's `validation/`, and a cross-validation's `crossValidation/`
    /// (the mean over the folds, and with `/deviation` behind it their standard deviation).
    pub metrics: BTreeMap<String, Decimal>,
    /// Gates that did not hold, each in words with the numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_gates: Vec<String>,
    /// What was chosen where the specification was silent: labels, precision, steps, ...
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub chosen: BTreeMap<String, String>,
    /// Seconds from process start: `dataReady`, `firstStep`, `crossValidated`, `trained`, `evaluated`, `written`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub timeline: BTreeMap<String, Decimal>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RowCounts {
    /// Rows trained on.
    pub train: u64,
    /// Rows that chose the best checkpoint.
    pub validation: u64,
    /// Rows of the final metrics and gates.
    pub test: u64,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_gate_reaches_the_trainer_with_every_digit() {
        let train = json!({
            "model": {"from": "s3://m/a", "task": "TextClassification"},
            "data": {"sources": []},
            "evaluate": {"gates": [{"metric": "Accuracy", "minimum": "0.99999"}]},
            "output": {"to": "s3://o"},
        });
        let spec: TrainSpec = serde_json::from_value(train).unwrap();
        let mounted = serde_json::to_string(&spec).unwrap();
        let again: TrainSpec = serde_json::from_str(&mounted).unwrap();
        assert_eq!(again.evaluate.gates[0].minimum.unwrap().get(), 0.99999);
        assert_eq!(again, spec);
    }

    #[test]
    fn metrics_and_selections_are_of_the_task() {
        let spec = |task: Task, metric: Option<Metric>, method: &str| -> TrainSpec {
            let mut search = json!({"parameters": [{"name": "learningRate", "values": [1e-5, 1e-4]}]});
            if let Some(metric) = metric {
                search["objective"] = json!({"metric": metric});
            }
            serde_json::from_value(json!({
                "model": {"from": "s3://m/a", "task": task},
                "data": {"sources": [], "select": {"method": method, "keepPercent": 50}},
                "hyperparameters": {"search": search},
                "evaluate": {"gates": [{"metric": "Accuracy", "minimum": "0"}, {"metric": "MacroF1", "minimum": "0"}]},
                "output": {"to": "s3://o"},
            }))
            .unwrap()
        };
        let classes = spec(Task::TextClassification, None, "Uncertainty");
        assert_eq!(classes.mistakes_of_task(), Vec::<String>::new());
        let expected = [
            "hyperparameters.search.objective.metric: TextRegression has no Accuracy, but PearsonCorrelation",
            "evaluate.gates[0].metric: TextRegression has no Accuracy, but PearsonCorrelation",
            "evaluate.gates[1].metric: TextRegression has no MacroF1, but PearsonCorrelation",
            "data.select.method: GradientMatching needs labels, which TextRegression has not",
        ];
        assert_eq!(spec(Task::TextRegression, None, "GradientMatching").mistakes_of_task(), expected);
        let named = spec(Task::TextRegression, Some(Metric::PearsonCorrelation), "Random").mistakes_of_task();
        assert_eq!(named, expected[1..3], "{named:?}");
        let mut student = spec(Task::TextClassification, None, "Random");
        student.evaluate.gates[0].minimum_of_teacher = Decimal::new(0.97);
        assert_eq!(student.mistakes_of_task(), ["evaluate.gates[0].minimumOfTeacher needs a teacher"]);
        student.teacher = serde_json::from_value(json!({"from": "s3://m/teacher"})).ok();
        assert_eq!(student.mistakes_of_task(), Vec::<String>::new());
        student.data.augment = serde_json::from_value(json!({"copies": 4})).ok();
        assert_eq!(student.mistakes_of_task(), Vec::<String>::new());
        student.data.select.as_mut().unwrap().minimum_agreement = Decimal::new(0.8);
        assert_eq!(student.mistakes_of_task(), Vec::<String>::new());
        student.teacher = None;
        assert!(student.mistakes_of_task().contains(&"data.select.minimumAgreement needs a teacher".to_owned()));
        assert!(
            student
                .mistakes_of_task()
                .contains(&"data.augment needs a teacher, who knows what the new texts mean".to_owned())
        );
        let vectors = spec(Task::Embedding, None, "ClusterCenter").mistakes_of_task();
        assert_eq!(vectors, ["evaluate.gates[1].metric: Embedding has no MacroF1, but Accuracy"]);
    }
}
