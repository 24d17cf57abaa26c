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
pub mod rules;
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
pub use rules::{Mistake, mistakes};
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
    /// The terms that the training minimises, with the defaults of the task.
    pub fn objective_terms(&self) -> Vec<WeightedTerm> {
        self.objective.terms_of(self.model.task, self.teacher.is_some())
    }

    /// Whether the objective compares the model with the teacher.
    pub fn objective_asks_teacher(&self) -> bool {
        self.objective_terms().iter().any(|term| term.term.needs_teacher(self.model.task))
    }

    /// Whether training or the selection of rows needs the teacher; otherwise it only labels rows, if anything.
    pub fn learns_from_teacher(&self) -> bool {
        self.data.select.is_some() || self.objective_asks_teacher()
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
/// Rank, world size and rendezvous come from the environment: [`variable`](crate::process::variable).
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
}
