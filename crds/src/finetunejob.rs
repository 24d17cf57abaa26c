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

/// Trains a model on many processes, evaluates it and writes an artifact. The specification cannot change once created, except
/// for suspend and ttlSecondsAfterFinished.
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
    doc = "Trains a model on many processes, evaluates it and writes an artifact. The specification cannot change once created, except for suspend and ttlSecondsAfterFinished.",
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
    /// Secret of the same namespace whose keys become environment of the trainer: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    /// AWS_ENDPOINT_URL, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub credentials_secret_name: Option<String>,
    /// Resources, placement and environment of the trainer's pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_template: Option<PodOverrides>,
    /// Image of the trainer, instead of the operator's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// Stops the pods and keeps the checkpoints; set to false again, training goes on from the last of them.
    #[serde(default)]
    pub suspend: bool,
    /// Seconds after the start in which the job must end; after them it fails. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub active_deadline_seconds: Option<u32>,
    /// Seconds after its end in which a finished job is deleted, its artifact kept. Absent: it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<u32>,
}

/// What has been observed of a FineTuneJob.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobStatus {
    /// Succeeded sums up: Unknown while the job is not over, then True or False with the reason. Running: all pods run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Where training stands, as last reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Restarts of the gang that counted against failurePolicy.maxRestarts.
    #[serde(default)]
    pub restarts: u32,
    /// Restarts after a preemption, which do not count.
    #[serde(default)]
    pub preemptions: u32,
    /// Number of the current attempt, from 0; its Kubernetes Job is named {name}-{attempt}.
    #[serde(default)]
    pub attempt: u32,
    /// When the first pod was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the job was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The result: artifact, digests, metrics on the test rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<TrainSummary>,
    /// The search for hyperparameters, if the specification has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<SearchStatus>,
    /// Seconds from the object's creation to: admitted, podsRunning, processStart, dataReady, firstStep, finished.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub timeline: BTreeMap<String, Decimal>,
}

/// Where training stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Preparing, Training, Evaluating or Writing; in a cross-validation the fold that is trained, such as Fold 2 of 5.
    #[schemars(length(max = 64))]
    pub stage: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps in all; 0 while not known.
    pub total_steps: u64,
    /// step of totalSteps in percent, rounded down.
    #[schemars(range(min = 0, max = 100))]
    pub percent: u8,
    /// The same with its sign, for kubectl get.
    #[schemars(length(max = 8))]
    pub percent_text: String,
    /// Newest training loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<Decimal>,
    /// Time left, such as 1m20s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub eta: Option<String>,
    /// Rows a second over all processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_per_second: Option<Decimal>,
    /// Newest metrics on the validation rows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub metrics: BTreeMap<String, Decimal>,
    /// Newest step that a checkpoint holds: a restart goes on from here.
    #[serde(default)]
    pub checkpoint_step: u64,
}

/// What has been tried.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SearchStatus {
    /// In a few words, for kubectl get: trials that are over, all of them, and the best result.
    #[schemars(length(max = 128))]
    pub text: String,
    /// Name of the best trial so far; once the search is over, of the one that the job trains with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub best: Option<String>,
    /// The search is over.
    #[serde(default)]
    pub done: bool,
    /// In the order in which they were started.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub trials: Vec<TrialStatus>,
}

/// One assignment of hyperparameters and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrialStatus {
    /// A hash of the assignment.
    #[schemars(length(min = 1, max = 16))]
    pub name: String,
    /// The hyperparameters that are searched for, with the trial's values.
    #[schemars(extend("maxProperties" = 16))]
    pub parameters: BTreeMap<String, String>,
    /// Running, Finished or Failed.
    pub state: TrialState,
    /// The objective's metric on the validation rows or over the folds, one value for each budget that the trial was given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub results: Vec<Decimal>,
    /// FineTuneJob that trains it, or was the last to.
    #[schemars(length(max = 63))]
    pub job: String,
    /// Why it failed.
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
