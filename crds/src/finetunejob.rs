//! FineTuneJob: one training run, from data to an artifact.

use std::collections::BTreeMap;

use athanor_contract::{
    Decimal,
    train::{TrainSpec, TrainSummary},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::PodOverrides;

/// A FineTuneJob trains a model on one or more processes, evaluates it and writes an artifact. Its specification is
/// immutable, except for suspend and ttlSecondsAfterFinished.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "athanor.dev",
    version = "v1alpha1",
    kind = "FineTuneJob",
    plural = "finetunejobs",
    shortname = "ftj",
    category = "athanor",
    namespaced,
    derive = "PartialEq",
    status = "FineTuneJobStatus",
    doc = "A FineTuneJob trains a model on one or more processes, evaluates it and writes an artifact. Its specification is immutable, except for suspend and ttlSecondsAfterFinished.",
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress.percentText"),
    printcolumn(name = "Step", type_ = "integer", json_path = ".status.progress.step"),
    printcolumn(name = "Loss", type_ = "string", json_path = ".status.progress.loss"),
    printcolumn(name = "ETA", type_ = "string", json_path = ".status.progress.eta"),
    printcolumn(name = "Accuracy", type_ = "string", json_path = ".status.summary.metrics.accuracy"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.conditions[?(@.type==\"Succeeded\")].reason"),
    printcolumn(name = "Search", type_ = "string", json_path = ".status.search.text", priority = 1),
    printcolumn(name = "Restarts", type_ = "integer", json_path = ".status.restarts", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobSpec {
    /// Model, data, hyperparameters, evaluation, output: the part that the trainer reads.
    #[serde(flatten)]
    pub train: TrainSpec,
    /// Name of a Secret in the same namespace whose keys become environment variables of the trainer:
    /// AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, ... Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub credentials_secret_name: Option<String>,
    /// Resources, placement and environment of the trainer's pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_template: Option<PodOverrides>,
    /// Image of the trainer. Absent: the operator's, with CUDA if the pods reserve GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// Whether the pods are stopped; checkpoints are kept, and training continues from the last one when this is false
    /// again.
    #[serde(default)]
    pub suspend: bool,
    /// Time limit of the job in seconds after its start; a job that takes longer fails. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub active_deadline_seconds: Option<u32>,
    /// Seconds after which a finished job is deleted; its artifact is kept. Absent: it is not deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<u32>,
}

/// Observed state of a FineTuneJob.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobStatus {
    /// Conditions of the job. Succeeded is Unknown until the job is over, then True or False with the reason. Running
    /// is True while all pods run. GpuImage is False if the pods reserve GPUs and the operator has no image with CUDA.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Progress of the training, as last reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Number of restarts that count against failurePolicy.maxRestarts.
    #[serde(default)]
    pub restarts: u32,
    /// Number of restarts after a preemption, which do not count.
    #[serde(default)]
    pub preemptions: u32,
    /// Number of preemptions in a row between which no further checkpoint was written; too many end the job.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub fruitless_preemptions: u32,
    /// Time of the last preemption.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preempted_at: Option<Time>,
    /// Step of the newest checkpoint then.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub preempted_at_step: u64,
    /// Number of the current attempt, from 0; its Kubernetes Job is named {name}-{attempt}.
    #[serde(default)]
    pub attempt: u32,
    /// Time at which the first pod was requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// Time at which the job was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Result of the training: artifact, digests, metrics on the test rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<TrainSummary>,
    /// State of the search for hyperparameters, if the specification has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<SearchStatus>,
    /// Seconds from the creation of the object to admitted, podsRunning, processStart, dataReady, firstStep and
    /// finished.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub timeline: BTreeMap<String, Decimal>,
}

/// Progress of a training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Current stage, such as Preparing, Training, Evaluating or Writing; in a cross-validation the current fold, such
    /// as Fold 2 of 5.
    #[schemars(length(max = 64))]
    pub stage: String,
    /// Number of optimizer steps done.
    pub step: u64,
    /// Number of optimizer steps in total; 0 until it is known.
    pub total_steps: u64,
    /// Percentage of steps done, rounded down.
    #[schemars(range(min = 0, max = 100))]
    pub percent: u8,
    /// The percentage with a percent sign, for kubectl get.
    #[schemars(length(max = 8))]
    pub percent_text: String,
    /// Most recent training loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<Decimal>,
    /// Estimated remaining time, such as 1m20s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub eta: Option<String>,
    /// Rows per second over all processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_per_second: Option<Decimal>,
    /// Most recent metrics on the validation rows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub metrics: BTreeMap<String, Decimal>,
    /// Step of the last checkpoint, from which a restart continues.
    #[serde(default)]
    pub checkpoint_step: u64,
}

/// State of a search for hyperparameters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SearchStatus {
    /// Summary for kubectl get: finished trials, all trials, and the best result.
    #[schemars(length(max = 128))]
    pub text: String,
    /// Name of the best trial so far; after the search, of the trial whose values the job trains with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub best: Option<String>,
    /// Whether the search is over.
    #[serde(default)]
    pub done: bool,
    /// Trials in the order in which they were started.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub trials: Vec<TrialStatus>,
}

/// One assignment of hyperparameters and its results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrialStatus {
    /// Name of the trial: a hash of the assignment.
    #[schemars(length(min = 1, max = 16))]
    pub name: String,
    /// Values of the hyperparameters that are searched for.
    #[schemars(extend("maxProperties" = 16))]
    pub parameters: BTreeMap<String, String>,
    /// State of the trial.
    pub state: TrialState,
    /// Values of the objective's metric on the validation rows or over the folds, one for each budget of the trial.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub results: Vec<Decimal>,
    /// Name of the most recent FineTuneJob that trains it.
    #[schemars(length(max = 63))]
    pub job: String,
    /// Reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub message: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TrialState {
    Running,
    Finished,
    Failed,
}
