//! ModelDeployment: a model behind one stable address, rolled out by canary, watched for drift and retrained.

use std::collections::BTreeMap;

use athanor_contract::{
    Decimal,
    monitor::{MonitorSpec, MonitorStatus},
    train::{OffsetRange, most_samples},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    FineTuneJobSpec, PodOverrides,
    access::AccessSpec,
    adapter::{AdapterStatus, BaseModel, JobReference, ServedAdapter},
    engine::EngineSpec,
    feedback::FeedbackSpec,
    retraining::{RetrainingOutcome, RetrainingProposal, RetrainingStatus},
};

/// A ModelDeployment serves a model at the Service of the same name (port 80 HTTP, 8081 gRPC), rolls out new models
/// behind a canary, records requests, answers and feedback, and retrains the model when it has become stale.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "athanor.dev",
    version = "v1alpha1",
    kind = "ModelDeployment",
    plural = "modeldeployments",
    shortname = "mdep",
    category = "athanor",
    namespaced,
    derive = "PartialEq",
    status = "ModelDeploymentStatus",
    doc = "A ModelDeployment serves a model at the Service of the same name (port 80 HTTP, 8081 gRPC), rolls out new models behind a canary, records requests, answers and feedback, and retrains the model when it has become stale.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Revision", type_ = "string", json_path = ".status.currentRevision.name"),
    printcolumn(name = "Candidate", type_ = "string", json_path = ".status.candidate.name", priority = 1),
    printcolumn(name = "Traffic", type_ = "integer", json_path = ".status.candidate.weight"),
    printcolumn(name = "Drifted", type_ = "string", json_path = ".status.conditions[?(@.type==\"Drifted\")].status"),
    printcolumn(name = "Retraining", type_ = "string", json_path = ".status.retraining.job"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!has(self.monitor) || has(self.feedback)", "message": "monitor requires feedback: drift is measured on recorded events"},
    {"rule": "!has(self.retrain) || has(self.monitor)", "message": "retrain requires monitor: a drift verdict starts a retraining"},
    {"rule": "!has(self.engine.container) || !has(self.model.base) && (!has(self.adapters) || size(self.adapters) == 0)", "message": "model.base and adapters require engine.builtin"}]))]
pub struct ModelDeploymentSpec {
    /// Model to serve.
    pub model: ModelSource,
    /// LoRA adapters of the served language model, which clients select by `model: NAME`. Servers load and unload them
    /// without a restart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub adapters: Vec<ServedAdapter>,
    /// Number of server pods of the current revision; a candidate has the same number.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
    /// Name of a Secret in the same namespace whose keys become environment variables of server and monitor:
    /// AWS_ACCESS_KEY_ID, ... With engine.container the init container that fetches the model has them, and the server has not.
    /// Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub credentials_secret_name: Option<String>,
    /// Resources, placement and environment of the server's pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_template: Option<PodOverrides>,
    /// Resources, placement and environment of the routers' pods. Without resources they request 10m of CPU and 64Mi of
    /// memory, and are limited to 1Gi of memory. The ServiceAccount is Athanor's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_pod_template: Option<PodOverrides>,
    /// The same for the monitor's pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor_pod_template: Option<PodOverrides>,
    /// Image of athanor-server. Absent: the operator's, with CUDA if the pods reserve GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// Longest duration in seconds of a request to a language model, from its head to the end of its answer. Pods that
    /// are going down let such requests end.
    #[serde(default = "default_max_request")]
    #[schemars(range(min = 1, max = 3600))]
    pub max_request_seconds: u32,
    /// What runs a language model; a change restarts the server's pods one by one.
    #[serde(default)]
    pub engine: EngineSpec,
    /// Who may use the deployment. Absent: whoever reaches the Service, over connections that are not encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<AccessSpec>,
    /// Whether `GET /` of the Service answers with a page on which people try the model in a browser. The page requires no
    /// API key; its requests to the model and its feedback do, if access.apiKeys is set.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub playground: bool,
    /// How a new model replaces the current one.
    #[serde(default)]
    pub rollout: RolloutSpec,
    /// Where requests, answers and feedback are recorded. Absent: they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feedback: Option<FeedbackSpec>,
    /// Thresholds beyond which the model is considered stale. Absent: no monitor runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<MonitorSpec>,
    /// Retraining of a stale model. Absent: drift is only reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retrain: Option<RetrainSpec>,
}

fn one() -> i32 {
    1
}

fn default_max_request() -> u32 {
    300
}

/// The model to serve: exactly one of `from` and `fromJob`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.from) != has(self.fromJob)", "message": "set exactly one of from and fromJob"}]))]
pub struct ModelSource {
    /// Folder of an artifact at s3://, gs://, az://, https:// or file://.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(s3|gs|az|http|https|file)://.+"))]
    pub from: Option<String>,
    /// FineTuneJob of the same namespace whose artifact is served, or that of the newest retraining of this deployment
    /// that passed its gates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_job: Option<JobReference>,
    /// Model that the one to serve is a LoRA adapter of. `from` is then the adapter's folder, or an artifact that has an
    /// adapter, and `fromJob` a job with `adapter.lora`. Revisions with the same base share its servers, so a canary
    /// takes no second copy of the weights. Absent: each revision has servers of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseModel>,
}

/// How a new model replaces the current one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutSpec {
    /// Canary of a new revision. The first revision of a deployment receives all traffic at once.
    #[serde(default)]
    pub canary: CanarySpec,
}

/// Steps of a canary, and the limits that a candidate must keep in each of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CanarySpec {
    /// Steps in order; after the last one the candidate becomes the current revision. Default: 10, 50 and 100 percent,
    /// 5 s each.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "atomic", "x-kubernetes-validations" = [
        {"rule": "self.map(s, s.trafficPercent).isSorted()", "message": "trafficPercent must not decrease from step to step"}]))]
    pub steps: Vec<CanaryStep>,
    /// Limits on the candidate's traffic. Within them the rollout continues; if it is shown to be beyond them it is rolled
    /// back; with too few requests it waits. Everything is counted from the start of each step.
    pub analysis: AnalysisSpec,
    /// Seconds after which a rollout without a verdict is rolled back, from the creation of the candidate. Absent: seven
    /// days and the pauses of all steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub deadline_seconds: Option<u32>,
}

impl Default for CanarySpec {
    fn default() -> Self {
        let step = |traffic_percent| CanaryStep { traffic_percent, pause_seconds: default_pause() };
        let steps = vec![step(10), step(50), step(100)];
        Self { steps, analysis: AnalysisSpec::default(), deadline_seconds: None }
    }
}

/// One step of a canary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanaryStep {
    /// Percentage of requests that the candidate answers.
    #[schemars(range(min = 1, max = 100))]
    pub traffic_percent: u32,
    /// Least duration of the step in seconds.
    #[serde(default = "default_pause")]
    #[schemars(range(min = 0, max = 604_800))]
    pub pause_seconds: u32,
}

fn default_pause() -> u32 {
    5
}

/// Limits on a candidate's traffic within one step. Besides, a candidate is rolled back if it is shown to fail or to
/// refuse more of its requests than the current revision in the same time (docs/canary.md).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AnalysisSpec {
    /// Largest percentage of failed requests. A candidate is rolled back if it is shown to exceed it, unless the current
    /// revision may exceed it too; it does not continue while more of its requests failed.
    pub max_error_percent: Decimal,
    /// Largest 95th percentile of latency in milliseconds. A candidate is rolled back if more than 5 percent of its
    /// answers are shown to take longer, unless as many of the current revision's may; it does not continue while more
    /// of its answers take longer. Absent: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 600_000))]
    pub max_latency_p95_ms: Option<u32>,
    /// Largest loss of accuracy against the current revision, by the feedback that came during a step. A candidate is
    /// rolled back if it is shown to be wrong more often, and by more than this. Whoever may give feedback takes part in
    /// that verdict. Absent: feedback is not looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_accuracy_loss: Option<Decimal>,
    /// Number of requests in a step that the rollout requires to continue. 0: only the pause is required.
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub minimum_requests: u64,
}

impl Default for AnalysisSpec {
    fn default() -> Self {
        let max_error_percent = Decimal::new(1.0).expect("a finite constant");
        Self { max_error_percent, max_latency_p95_ms: None, max_accuracy_loss: None, minimum_requests: 50 }
    }
}

/// Retraining of a stale model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "size(self.template.spec.data.sources) < 32", "message": "the template may have 31 sources: one is added for the recorded events"}]))]
pub struct RetrainSpec {
    /// FineTuneJob to create. The recorded events are added to its sources, and the current artifact becomes its
    /// evaluate.baseline; the rest stays as written.
    pub template: RetrainTemplate,
    /// Largest number of recorded requests with feedback that a retraining uses: the newest.
    #[serde(default = "most_samples")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub maximum_samples: u32,
    /// Whether a retraining starts automatically.
    #[serde(default)]
    pub approval: Approval,
    /// Number of requests with feedback, since the current revision received all traffic, that a retraining requires.
    #[serde(default = "default_minimum_samples")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub minimum_samples: u64,
    /// Seconds between the end of a retraining and the start of the next one. They double with each retraining in a row
    /// that led to no other model, up to 30 days.
    #[serde(default = "default_cooldown")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub cooldown_seconds: u32,
    /// Name of the added source; metrics and gates refer to its rows by it.
    #[serde(default = "default_source_name")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub source_name: String,
}

fn default_minimum_samples() -> u64 {
    100
}

fn default_cooldown() -> u32 {
    3600
}

fn default_source_name() -> String {
    "feedback".into()
}

/// Template of a FineTuneJob.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetrainTemplate {
    /// Labels of the FineTuneJob, such as the name of a queue.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub labels: BTreeMap<String, String>,
    /// Specification of the FineTuneJob.
    pub spec: FineTuneJobSpec,
}

/// Whether a retraining starts automatically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Approval {
    /// The retraining starts at once.
    #[default]
    Automatic,
    /// The retraining starts when the annotation athanor.dev/approve has its name, which the condition Retraining
    /// gives.
    Manual,
}

/// Observed state of a ModelDeployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentStatus {
    /// Conditions of the deployment. Ready: the current revision answers with all replicas. Progressing: a candidate is
    /// being rolled out. Drifted: the monitor's verdict. Retraining: a job runs. AdaptersResolved: the servers have
    /// every adapter of spec.adapters in their configuration. GpuImage is False if the servers reserve
    /// GPUs and the operator has no image with CUDA.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Revision that has all traffic, or had it before the current canary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_revision: Option<RevisionStatus>,
    /// Revision that is being rolled out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate: Option<CandidateStatus>,
    /// Revision before the current one, until its requests have drained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_revision: Option<RetiredRevision>,
    /// Names of the revisions that were rolled back, newest last; they are tried again when spec.model changes, or the
    /// annotation athanor.dev/retry-rollout.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 253)), extend("x-kubernetes-list-type" = "atomic"))]
    pub failed_revisions: Vec<String>,
    /// Completion time of the newest job whose model was rolled back. Of the jobs that were over by then, only the one of the
    /// current revision is served. Cleared as failedRevisions is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled_until: Option<Time>,
    /// Value of the annotation athanor.dev/retry-rollout when it was last looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub retried_rollout: Option<String>,
    /// Verdict of the monitor, which is the only writer of this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<MonitorStatus>,
    /// Number of retrainings that were created; the name of the next one follows from it.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub retrainings: u64,
    /// Newest retraining, until it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retraining: Option<RetrainingStatus>,
    /// Time at which the last retraining was over; the cooldown starts here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_retrained_at: Option<Time>,
    /// Outcome of the last retraining.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_retraining: Option<RetrainingOutcome>,
    /// Retraining that waits for an approval. It does not change with later events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retraining_proposal: Option<RetrainingProposal>,
    /// Number of retrainings since the last one that led to another model; each doubles the cooldown.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub fruitless_retrainings: u32,
    /// Offset ranges that retrainings with a model have used. The next retraining begins where they do, so that it does not
    /// forget what they were for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    pub retrained_ranges: Vec<OffsetRange>,
    /// spec.model as last observed, and since when. A retraining that ended before a change does not replace the user's
    /// new choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ObservedSource>,
    /// Adapters of spec.adapters that are served.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub adapters: Vec<AdapterStatus>,
    /// Label selector of the current revision's pods, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub selector: Option<String>,
    /// Number of server pods of the current revision, for the scale subresource.
    #[serde(default)]
    pub replicas: i32,
}

/// A revision: one model as it is served.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RevisionStatus {
    /// Name of the revision: {deployment}-{first 8 digits of the model's digest, or of the hash of its address or of
    /// base and adapter}.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Folder of the artifact.
    #[schemars(length(max = 2048))]
    pub model_uri: String,
    /// Folder of the base model whose servers have this revision as an adapter. Absent: it has servers of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
    pub base: Option<String>,
    /// sha256 over the artifact's files. Absent if the model was given by its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub model_digest: Option<String>,
    /// Name of the FineTuneJob that trained it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub job: Option<String>,
    /// Time at which that job was over; among the models of jobs the newest one is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Time>,
    /// Time at which all its pods were ready for the first time. A current revision that was never ready is replaced
    /// without a canary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_at: Option<Time>,
}

/// A revision that is being rolled out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CandidateStatus {
    /// Name, address and origin of the model.
    #[serde(flatten)]
    pub revision: RevisionStatus,
    /// Index of the canary's step, from 0.
    #[schemars(range(min = 0, max = 64))]
    pub step_index: u32,
    /// Percentage of requests that it answers.
    #[schemars(range(min = 0, max = 100))]
    pub weight: u32,
    /// Time at which the step began.
    pub since: Time,
    /// Time at which the rollout began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// Current result of the analysis.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// What the routers had counted for it when the step began.
    #[serde(default)]
    pub baseline: RevisionCounts,
    /// What the routers had counted for the current revision when the step began.
    #[serde(default)]
    pub champion_baseline: RevisionCounts,
    /// Digest of the routers that had counted it, each with its restarts: the step begins again with other ones.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub routers: String,
    /// maxLatencyP95Ms as of the start of the step: with another value the step begins again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_limit_ms: Option<u32>,
}

/// Counts of the routers for one revision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RevisionCounts {
    /// Number of requests that the model answered or failed to answer.
    pub requests: u64,
    /// Number of failed requests among them.
    pub errors: u64,
    /// Number of requests that were refused with a 4xx, besides.
    pub refused: u64,
    /// Number of answers with feedback on whether they are right.
    pub judged: u64,
    /// Number of wrong answers among them.
    pub wrong: u64,
    /// Number of answers whose latency was measured.
    pub answered: u64,
    /// Number of answers among them that took longer than maxLatencyP95Ms.
    pub slow: u64,
}

/// A revision that is answering its last requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetiredRevision {
    /// Name of the revision.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Folder of the adapter, if it is one. It stays loaded until the requests have ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
    pub model_uri: Option<String>,
    /// Folder of the adapter's base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
    pub base: Option<String>,
    /// Time at which it stopped receiving traffic.
    pub since: Time,
}

/// spec.model as last observed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObservedSource {
    /// Address, or job/{name}; for an adapter followed by ` on ` and the address of its base.
    #[schemars(length(max = 4352))]
    pub value: String,
    /// Time of the last change. Absent: it has not changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}
