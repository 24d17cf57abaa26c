//! ModelDeployment: a model behind one stable address, rolled out by canary, watched for drift and retrained.

use std::collections::BTreeMap;

use athanor_contract::{
    Decimal,
    serve::{MonitorSpec, MonitorStatus},
    train::OffsetRange,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{FineTuneJobSpec, PodOverrides};

/// Serves a model at the Service of the same name (port 80 HTTP, 8081 gRPC), rolls new models out behind a canary, records what
/// users asked and what they thought of the answers, and retrains when the model has gone stale.
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
    doc = "Serves a model at the Service of the same name (port 80 HTTP, 8081 gRPC), rolls new models out behind a canary, records what users asked and what they thought of the answers, and retrains when the model has gone stale.",
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
    {"rule": "!has(self.monitor) || has(self.feedback)", "message": "monitor needs feedback: drift is measured on recorded events"},
    {"rule": "!has(self.retrain) || has(self.monitor)", "message": "retrain needs monitor: a drift verdict starts a retraining"}]))]
pub struct ModelDeploymentSpec {
    /// The model to serve.
    pub model: ModelSource,
    /// Server pods of the current revision; a candidate gets the same number.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
    /// Secret of the same namespace whose keys become environment of server and monitor: AWS_ACCESS_KEY_ID, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub credentials_secret_name: Option<String>,
    /// Resources, placement and environment of the server's pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_template: Option<PodOverrides>,
    /// Image of the server, instead of the operator's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// How a new model takes over from the current one.
    #[serde(default)]
    pub rollout: RolloutSpec,
    /// Where requests, answers and feedback are recorded. Absent: nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feedback: Option<FeedbackSpec>,
    /// When the model counts as stale. Absent: no monitor runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<MonitorSpec>,
    /// What to train when the model has gone stale. Absent: drift is reported only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retrain: Option<RetrainSpec>,
}

fn one() -> i32 {
    1
}

/// The model to serve: exactly one of `from` and `fromJob`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.from) != has(self.fromJob)", "message": "set exactly one of from and fromJob"}]))]
pub struct ModelSource {
    /// Folder of an artifact: s3://, gs://, az://, https://, file://.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(s3|gs|az|http|https|file)://.+"))]
    pub from: Option<String>,
    /// The output of a FineTuneJob of the same namespace, or of the newest retraining of this deployment that passed its gates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_job: Option<JobReference>,
}

/// A FineTuneJob of the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobReference {
    /// Name of the FineTuneJob. It may appear later.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// How a new model takes over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutSpec {
    /// Steps of traffic, each analysed before the next. The first revision of a deployment takes all traffic at once.
    #[serde(default)]
    pub canary: CanarySpec,
}

/// Steps of traffic and what a candidate must keep to in each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CanarySpec {
    /// Shares of traffic in turn; after the last the candidate is the current revision. Default: 10, 50, 100 percent, 5 s each.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "atomic", "x-kubernetes-validations" = [
        {"rule": "self.map(s, s.trafficPercent).isSorted()", "message": "trafficPercent must not fall from step to step"}]))]
    pub steps: Vec<CanaryStep>,
    /// Limits on the candidate's traffic: within them it goes on, beyond them it is rolled back, and with too few requests to say it
    /// holds. Errors are counted anew in each step; latency is that of all its answers so far.
    pub analysis: AnalysisSpec,
}

impl Default for CanarySpec {
    fn default() -> Self {
        let step = |traffic_percent| CanaryStep { traffic_percent, pause_seconds: default_pause() };
        Self { steps: vec![step(10), step(50), step(100)], analysis: AnalysisSpec::default() }
    }
}

/// One step of a canary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanaryStep {
    /// Share of requests that the candidate answers.
    #[schemars(range(min = 1, max = 100))]
    pub traffic_percent: u32,
    /// Seconds that the step lasts at least.
    #[serde(default = "default_pause")]
    #[schemars(range(min = 0, max = 604_800))]
    pub pause_seconds: u32,
}

fn default_pause() -> u32 {
    5
}

/// Limits on a candidate's traffic within one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AnalysisSpec {
    /// Requests the candidate may fail, in percent.
    pub max_error_percent: Decimal,
    /// Limit on the 95th percentile of latency, in milliseconds. Absent: latency is not judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 600_000))]
    pub max_latency_p95_ms: Option<u32>,
    /// Requests of the candidate in a step before a verdict that lets it go on; 0: the pause alone decides.
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub minimum_requests: u64,
}

impl Default for AnalysisSpec {
    fn default() -> Self {
        let max_error_percent = Decimal::new(1.0).expect("a finite constant");
        Self { max_error_percent, max_latency_p95_ms: None, minimum_requests: 50 }
    }
}

/// Where events are recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.kafka.topic) == has(oldSelf.kafka.topic) && (!has(self.kafka.topic) || self.kafka.topic == oldSelf.kafka.topic)",
     "message": "topic is immutable: offsets of the old topic would be read from the new one"}]))]
pub struct FeedbackSpec {
    /// The Kafka cluster and topic.
    pub kafka: KafkaSpec,
}

/// A Kafka topic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KafkaSpec {
    /// host:port, comma separated.
    #[schemars(length(min = 1, max = 1024))]
    pub bootstrap_servers: String,
    /// Topic for predictions and feedback. Absent: athanor.{namespace}.{name}.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 249), regex(pattern = r"^[a-zA-Z0-9._-]+$"))]
    pub topic: Option<String>,
}

/// What happens when the model has gone stale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "size(self.template.spec.data.sources) < 32", "message": "the template may have 31 sources: one is added for the recorded events"}]))]
pub struct RetrainSpec {
    /// The FineTuneJob to create. Recorded events become one more of its sources and the current artifact its
    /// evaluate.baseline; the rest stays as written.
    pub template: RetrainTemplate,
    /// Whether a retraining starts by itself.
    #[serde(default)]
    pub approval: Approval,
    /// Requests with feedback, since the current revision took over, that a retraining needs.
    #[serde(default = "default_minimum_samples")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub minimum_samples: u64,
    /// Seconds between the end of a retraining and the start of the next.
    #[serde(default = "default_cooldown")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub cooldown_seconds: u32,
    /// Name of the added source, also of its slice in metrics and gates.
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

/// A FineTuneJob to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetrainTemplate {
    /// Labels of the FineTuneJob, such as a queue's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub labels: BTreeMap<String, String>,
    /// Specification of the FineTuneJob.
    pub spec: FineTuneJobSpec,
}

/// Whether a retraining starts by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Approval {
    /// At once.
    #[default]
    Automatic,
    /// When the annotation athanor.dev/approve has the retraining's name, which the condition Retraining tells.
    Manual,
}

/// What has been observed of a ModelDeployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentStatus {
    /// Ready sums up; Progressing: a candidate is on its way; Drifted: the monitor's verdict; Retraining: a job runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The revision that has (or, during a canary, had) all traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_revision: Option<RevisionStatus>,
    /// The revision on its way to become current.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate: Option<CandidateStatus>,
    /// The revision before the current one, until its requests have drained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_revision: Option<RetiredRevision>,
    /// Revisions that were rolled back, newest last: they are not tried again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 253)), extend("x-kubernetes-list-type" = "atomic"))]
    pub failed_revisions: Vec<String>,
    /// The monitor's verdict, written by the monitor alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<MonitorStatus>,
    /// The newest retraining, until it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retraining: Option<RetrainingStatus>,
    /// When the last retraining was over: the cooldown counts from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_retrained_at: Option<Time>,
    /// How the last retraining ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_retraining: Option<RetrainingOutcome>,
    /// spec.model as last seen, and since when: a retraining that ended before a change does not replace the user's new choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ObservedSource>,
    /// Label selector of the current revision's pods, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub selector: Option<String>,
    /// Server pods of the current revision, for the scale subresource.
    #[serde(default)]
    pub replicas: i32,
}

/// A revision: one model as it is served.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RevisionStatus {
    /// {deployment}-{first 8 digits of the model's digest, or of the hash of its address}.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Folder of the artifact.
    #[schemars(length(max = 2048))]
    pub model_uri: String,
    /// sha256 over the artifact's files; absent where the model was given by its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub model_digest: Option<String>,
    /// The FineTuneJob that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub job: Option<String>,
    /// When that job was over: among models of jobs the newest is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Time>,
    /// When all its pods were ready for the first time. A current revision that never was is replaced without a canary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_at: Option<Time>,
}

/// A revision on its way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CandidateStatus {
    /// Name, address and origin of the model.
    #[serde(flatten)]
    pub revision: RevisionStatus,
    /// Step of the canary, from 0.
    #[schemars(range(min = 0, max = 64))]
    pub step_index: u32,
    /// Share of requests it answers, in percent.
    #[schemars(range(min = 0, max = 100))]
    pub weight: u32,
    /// When the step began.
    pub since: Time,
    /// What the analysis says at the moment.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// Requests the routers had counted for it when the step began.
    #[serde(default)]
    pub baseline_requests: u64,
    /// Failed requests among them.
    #[serde(default)]
    pub baseline_errors: u64,
}

/// A revision that answers its last requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetiredRevision {
    /// Name of the revision.
    #[schemars(length(max = 253))]
    pub name: String,
    /// When it lost its traffic.
    pub since: Time,
}

/// A retraining under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetrainingStatus {
    /// Name of the FineTuneJob.
    #[schemars(length(max = 253))]
    pub job: String,
    /// Offsets of the events it is trained on.
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    pub ranges: Vec<OffsetRange>,
    /// When it was created.
    pub started_at: Time,
}

/// How a retraining ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetrainingOutcome {
    /// Name of the FineTuneJob.
    #[schemars(length(max = 253))]
    pub job: String,
    /// Reason of its condition Succeeded, such as Succeeded or GateFailed.
    #[schemars(length(max = 128))]
    pub reason: String,
    /// Message of that condition.
    #[schemars(length(max = 2048))]
    pub message: String,
}

/// spec.model as last seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObservedSource {
    /// The address, or job/{name}.
    #[schemars(length(max = 2048))]
    pub value: String,
    /// When it became this. Absent: it was this from the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}
