//! Training: the part of a `FineTuneJob` that the trainer reads, the configuration the operator mounts, and the result.

mod adapter;
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

pub use adapter::*;
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

/// Exit codes of a trainer process, by which the operator decides what happens next.
pub mod exit_code {
    pub const DONE: i32 = 0;
    /// The user's input is wrong. It is not retried; the termination message says what to change.
    pub const USER_ERROR: i32 = 3;
    /// A peer was lost. The gang restarts from its last checkpoint.
    pub const LOST_PEER: i32 = 42;
    /// No step ended within `failurePolicy.hangSeconds`.
    pub const HUNG: i32 = 43;
    /// The loss or the gradients were not finite, and `failurePolicy.onNonFinite` is `Fail` or has used up its
    /// attempts.
    pub const NON_FINITE: i32 = 44;
    /// A rank received a signal to stop. The gang restarts from its last checkpoint.
    pub const STOPPED: i32 = 45;
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

/// What is trained, on which data, and which metrics the result must reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::GAIN_NEEDS_BASELINE]))]
pub struct TrainSpec {
    /// Model to start from, its task and its head.
    pub model: ModelSpec,
    /// What is trained instead of all weights; requires the task CausalLanguageModel. Absent: all weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterSpec>,
    /// Trained model that this one learns from, in addition to the labels. Absent: no teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<TeacherSpec>,
    /// Objective that training minimises. Absent: the task's own loss.
    #[serde(default, skip_serializing_if = "ObjectiveSpec::is_default")]
    pub objective: ObjectiveSpec,
    /// Sources of rows, how rows are prepared, and how they are split.
    pub data: DataSpec,
    /// Hyperparameters. Each has a default that suits fine-tuning an encoder.
    #[serde(default)]
    pub hyperparameters: Hyperparameters,
    /// How often metrics are computed, and the gates that the result must pass.
    #[serde(default)]
    pub evaluate: EvaluateSpec,
    /// Compression steps that are applied to the trained model in order. Absent: the model is not compressed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub compress: Vec<CompressStep>,
    /// Destination of the artifact.
    pub output: OutputSpec,
    /// Number of processes that train together, and how they communicate.
    #[serde(default)]
    pub distributed: DistributedSpec,
    /// How often the training state is saved.
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
    /// Destination folder: s3://, gs://, az:// or file://. Each run writes its artifact to a folder of its own below
    /// it.
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(s3|gs|az|file)://.+"))]
    pub to: String,
}

/// Content of `train.json`, which the operator mounts: the resolved specification and the names and folders of the run.
/// Rank, world size and rendezvous come from the environment: [`variable`](crate::process::variable).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainConfig {
    /// Name of the job in logs, metrics and the artifact's manifest.
    pub name: String,
    /// UID of the job. It is part of the names of the run's folders and authenticates progress reports.
    pub run_id: String,
    pub spec: TrainSpec,
    /// Folder of checkpoints, `{output.to}/{name}-{run_id[..8]}/checkpoints`.
    pub checkpoint_to: String,
    /// Folder of the artifact, `{output.to}/{name}-{run_id[..8]}/artifact`.
    pub artifact_to: String,
    /// Folder of the event files for TensorBoard, written during the run:
    /// `{output.to}/{name}-{run_id[..8]}/tensorboard`.
    pub events_to: String,
    /// Trials that the hyperparameters come from, in the order in which they were started. Empty without a search.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<TrialOutcome>,
    /// gRPC address for progress reports, such as `http://athanor-operator.athanor-system:9443`. Absent on a laptop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress_to: Option<String>,
}

/// Termination message of rank 0, at most 4,096 bytes. It remains available if the operator was not running when the
/// trainer ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "outcome")]
pub enum TrainResult {
    #[serde(rename_all = "camelCase")]
    Succeeded(TrainSummary),
    /// The training finished, but the result did not pass a gate.
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
    /// Number of rows for training, validation and test.
    pub rows: RowCounts,
    /// Metrics on the test rows, such as `accuracy` and `macroF1`. Prefixes: a source's name (`reviews/accuracy`) for
    /// its rows, `baseline/` for the baseline, `validation/` for the best validation, `crossValidation/` for the mean
    /// over the folds (with the suffix `/deviation` their standard deviation).
    pub metrics: BTreeMap<String, Decimal>,
    /// Gates that the result did not pass, each as a sentence with the numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_gates: Vec<String>,
    /// Values that were chosen for absent fields: labels, precision, steps, ...
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub chosen: BTreeMap<String, String>,
    /// Seconds from the start of the process to `dataReady`, `firstStep`, `crossValidated`, `trained`, `evaluated` and
    /// `written`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub timeline: BTreeMap<String, Decimal>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RowCounts {
    /// Number of training rows.
    pub train: u64,
    /// Number of validation rows, by which the best checkpoint is chosen.
    pub validation: u64,
    /// Number of test rows, on which the final metrics and gates are computed.
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
