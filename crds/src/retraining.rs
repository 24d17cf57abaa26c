//! Retrainings in the status of a ModelDeployment.

use athanor_contract::train::OffsetRange;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A retraining in progress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetrainingStatus {
    /// Name of the FineTuneJob.
    #[schemars(length(max = 253))]
    pub job: String,
    /// Offset ranges of the events that it is trained on.
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    pub ranges: Vec<OffsetRange>,
    /// Time at which it was created.
    pub started_at: Time,
}

/// A retraining that waits for an approval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetrainingProposal {
    /// Name of the FineTuneJob to be created; approved by the annotation athanor.dev/approve.
    #[schemars(length(max = 253))]
    pub job: String,
    /// Revision that has drifted.
    #[schemars(length(max = 253))]
    pub revision: String,
    /// Offset ranges of the events to train on.
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    pub ranges: Vec<OffsetRange>,
}

/// Outcome of a retraining.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetrainingOutcome {
    /// Name of the FineTuneJob.
    #[schemars(length(max = 253))]
    pub job: String,
    /// Reason of the job's condition Succeeded, such as Succeeded or GateFailed.
    #[schemars(length(max = 128))]
    pub reason: String,
    /// Message of that condition.
    #[schemars(length(max = 2048))]
    pub message: String,
}
