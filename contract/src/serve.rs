//! Serving: what the operator mounts into server, router and monitor, and the verdict the monitor publishes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Decimal, train::OffsetRange};

/// Response and request headers of the serving path.
pub mod header {
    pub const REQUEST_ID: &str = "x-request-id";
    pub const REVISION: &str = "x-athanor-revision";
    pub const TRACE_PARENT: &str = "traceparent";
}

/// Mounted as `serve.json` into `athanor-server`: one model revision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServeConfig {
    /// Name clients use in `model`: the ModelDeployment's name.
    pub model_name: String,
    /// Name of this revision, echoed in `x-athanor-revision`.
    pub revision: String,
    /// Folder of the artifact: s3://, gs://, az://, file://.
    pub model_uri: String,
    #[serde(default)]
    pub http_port: Port<8080>,
    #[serde(default)]
    pub grpc_port: Port<8081>,
    #[serde(default)]
    pub limits: ServeLimits,
}

/// A port with a default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Port<const DEFAULT: u16>(pub u16);

impl<const DEFAULT: u16> Default for Port<DEFAULT> {
    fn default() -> Self {
        Self(DEFAULT)
    }
}

/// Bounds of one server; beyond them a request gets a 4xx (413, 429), never an unbounded queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ServeLimits {
    pub max_body_bytes: usize,
    /// Inputs of one request.
    pub max_inputs: usize,
    /// Inputs waiting for a batch; a full queue answers 429.
    pub queue_inputs: usize,
    /// Inputs of one batch.
    pub max_batch_inputs: usize,
    /// Inputs times the longest of them, in tokens, of one batch.
    pub max_batch_tokens: usize,
    pub max_sequence_length: usize,
    /// Seconds a shutdown waits for requests under way.
    pub drain_seconds: u64,
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self {
            max_body_bytes: 1 << 20,
            max_inputs: 256,
            queue_inputs: 2048,
            max_batch_inputs: 64,
            max_batch_tokens: 8192,
            max_sequence_length: 128,
            drain_seconds: 20,
        }
    }
}

/// Key `router.json` of the ConfigMap the router watches. Weights change during a canary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouterConfig {
    pub namespace: String,
    /// Name of the ModelDeployment.
    pub deployment: String,
    pub revisions: Vec<RouterRevision>,
    /// Absent: nothing is recorded and `/v1/feedback` answers 404.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<EventsConfig>,
    #[serde(default)]
    pub limits: RouterLimits,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouterRevision {
    pub name: String,
    /// Service whose EndpointSlices hold the revision's pods; ports are named `http` and `grpc`.
    pub service: String,
    /// Share of the traffic in percent; the weights of all revisions add up to 100.
    pub weight: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RouterLimits {
    pub max_body_bytes: usize,
    /// Attempts on other endpoints after a connection error or 502, 503, 504, 429.
    pub retries: u32,
    pub request_timeout_seconds: u64,
    pub drain_seconds: u64,
}

impl Default for RouterLimits {
    fn default() -> Self {
        Self { max_body_bytes: 1 << 20, retries: 3, request_timeout_seconds: 30, drain_seconds: 20 }
    }
}

/// Where events go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EventsConfig {
    pub bootstrap_servers: String,
    pub topic: String,
}

/// `GET /analysis` of a router's ops port: what a canary is judged by, counted since that router started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouterAnalysis {
    /// By revision name.
    pub revisions: std::collections::BTreeMap<String, RevisionAnalysis>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RevisionAnalysis {
    /// Attempts, failed ones included.
    pub requests: u64,
    /// Attempts that failed or were answered with a 5xx.
    pub errors: u64,
    /// 0 without answers.
    pub latency_p95_ms: f64,
    /// Feedback to answers that this router remembers, each counted once.
    pub feedback_total: u64,
    pub feedback_correct: u64,
}

/// Mounted as `monitor.json` into `athanor-monitor`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MonitorConfig {
    pub namespace: String,
    pub deployment: String,
    pub events: EventsConfig,
    /// Artifact folders of the revisions that may answer: the reference of each is read from there.
    pub revisions: Vec<MonitoredRevision>,
    pub windows: MonitorSpec,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MonitoredRevision {
    pub name: String,
    pub model_uri: String,
}

/// When a model counts as stale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MonitorSpec {
    /// Predictions in a window.
    #[schemars(range(min = 50, max = 1_000_000))]
    pub window_predictions: u32,
    /// Population stability index of predicted labels above which the prediction distribution has drifted.
    pub prediction_psi: Decimal,
    /// p-value of the two-sample Kolmogorov-Smirnov test on confidences below which confidence has drifted.
    pub confidence_p_value: Decimal,
    /// Accuracy on labelled requests that may be lost against the reference before the sequential test (Wald's SPRT at
    /// 1 % errors either way) calls it drift.
    pub accuracy_loss: Decimal,
    /// Labelled requests before an accuracy verdict.
    #[schemars(range(min = 10, max = 1_000_000))]
    pub minimum_labels: u32,
}

impl Default for MonitorSpec {
    fn default() -> Self {
        let decimal = |value| Decimal::new(value).expect("a finite constant");
        Self {
            window_predictions: 500,
            prediction_psi: decimal(0.2),
            confidence_p_value: decimal(0.001),
            accuracy_loss: decimal(0.05),
            minimum_labels: 100,
        }
    }
}

/// `status.monitor` of a ModelDeployment, written by the monitor alone (field manager `athanor-monitor`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MonitorStatus {
    /// Revision the statistics are about: that with the most traffic.
    #[serde(default)]
    pub revision: String,
    /// Whether the model is stale.
    pub verdict: Verdict,
    /// Each statistic with its threshold, newest window.
    #[serde(default)]
    pub statistics: Vec<Statistic>,
    /// Predictions since the revision took over.
    #[serde(default)]
    pub predictions: u64,
    /// Predictions among them with feedback.
    #[serde(default)]
    pub labelled: u64,
    /// Offsets of the events since the revision took over: what a retraining would be trained on.
    #[serde(default)]
    pub ranges: Vec<OffsetRange>,
    /// Time of the verdict, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Verdict {
    /// Too few events so far.
    #[default]
    Unknown,
    Stable,
    /// The labelled accuracy has fallen, or, without enough labels, both distributions moved.
    Drifted,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Statistic {
    /// PredictionPSI, ConfidenceKS, LabelledAccuracy or PositiveRatings.
    pub name: String,
    /// Its value in the newest window.
    pub value: Decimal,
    /// Beyond this it has drifted.
    pub threshold: Decimal,
    /// Whether it is beyond the threshold.
    pub drifted: bool,
}
