//! Serving: configuration that the operator mounts into server and router.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::process::port;

/// Content of `serve.json`, which the operator mounts into `athanor-server`: one model revision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServeConfig {
    /// Name clients use in `model`: the ModelDeployment's name.
    pub model_name: String,
    /// Name of this revision, echoed in `x-athanor-revision`.
    pub revision: String,
    /// Folder of the artifact: s3://, gs://, az://, file://.
    pub model_uri: String,
    #[serde(default = "http_port")]
    pub http_port: u16,
    #[serde(default = "grpc_port")]
    pub grpc_port: u16,
    #[serde(default)]
    pub limits: ServeLimits,
    /// Engine of a language model; other models do not read it.
    #[serde(default)]
    pub engine: EngineConfig,
    /// Adapters of a language model that are loaded at the start, which fails if one of them cannot be used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterConfig>,
    /// Whether a request may have any `model`, for clients that cannot be given the model's name. The operator does not
    /// set it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_any_model: bool,
}

/// A low-rank adapter of a served language model.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AdapterConfig {
    /// Name that clients use in `model`: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Folder in PEFT's format, or an artifact of a job that trained an adapter: s3://, gs://, az://, file://.
    pub uri: String,
}

/// Content of `adapters.json`, a file next to `serve.json` that a server reads every two seconds: adapters in addition to
/// [`ServeConfig::adapters`]. Without the file there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AdaptersFile {
    #[serde(default)]
    pub adapters: Vec<AdapterConfig>,
}

/// How the built-in engine runs a language model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Largest number of tokens of a sequence, prompt and answer together. Absent: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_length: Option<usize>,
    /// Memory for the keys and values of all sequences, in bytes. Absent: 1 GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_memory: Option<u64>,
    pub weights: Weights,
    // Left out by default, so that the pods of servers without the setting are not replaced.
    #[serde(skip_serializing_if = "Speculation::is_auto")]
    pub speculation: Speculation,
}

/// Whether a step checks several tokens that may come next in an answer. No text depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Speculation {
    /// Where it is faster by what was measured.
    #[default]
    Auto,
    /// Never.
    // Not `Off`, which is a boolean in YAML 1.1.
    Disabled,
}

impl Speculation {
    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// Format of a model's weights in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Weights {
    /// Language models: BF16; FP32 on a CPU without AVX2, and of a GPT-2 on one that does not multiply bfloat16 in hardware.
    /// Encoders: BF16 on a CPU that multiplies bfloat16 in hardware, FP32 elsewhere and on a GPU; one that was compressed to
    /// eight bits with rounded inputs has Int8 on a CPU.
    #[default]
    Auto,
    /// 32-bit floating-point numbers.
    FP32,
    /// 16-bit floating-point numbers (bfloat16).
    BF16,
    /// 8-bit integers. CPU only.
    Int8,
    /// 4-bit integers for the matrices of the layers, 8-bit integers for embeddings and output head. A tensor that a
    /// GGUF file stores with more than 4 bits has 8. Language models on a CPU only.
    Int4,
}

fn http_port() -> u16 {
    port::HTTP
}

fn grpc_port() -> u16 {
    port::GRPC
}

/// Bounds of one server; beyond them a request gets a 4xx (413, 429), never an unbounded queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ServeLimits {
    pub max_body_bytes: usize,
    /// Largest number of inputs in one request.
    pub max_inputs: usize,
    /// Largest number of inputs that wait for a batch; a full queue answers 429.
    pub queue_inputs: usize,
    /// Longest expected time in seconds that a generation waits before it runs; one that would wait longer is answered 429.
    /// A server of an earlier version does not read it.
    #[serde(skip_serializing_if = "is_max_queue_seconds")]
    pub max_queue_seconds: u64,
    /// Largest number of inputs in one batch.
    pub max_batch_inputs: usize,
    /// Largest product of the number of inputs in a batch and the tokens of the longest of them.
    pub max_batch_tokens: usize,
    pub max_sequence_length: usize,
    /// Seconds that a shutdown waits for requests in progress.
    pub drain_seconds: u64,
    /// Longest duration of a generation in seconds; a shutdown waits that long for those in progress.
    pub max_request_seconds: u64,
}

/// Default of `maxRequestSeconds`.
pub const MAX_REQUEST_SECONDS: u64 = 300;
/// Default of `maxQueueSeconds`.
pub const MAX_QUEUE_SECONDS: u64 = 30;

fn is_max_queue_seconds(seconds: &u64) -> bool {
    *seconds == MAX_QUEUE_SECONDS
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self {
            max_body_bytes: 1 << 20,
            max_inputs: 256,
            queue_inputs: 2048,
            max_queue_seconds: MAX_QUEUE_SECONDS,
            max_batch_inputs: 64,
            max_batch_tokens: 8192,
            max_sequence_length: 128,
            drain_seconds: 20,
            max_request_seconds: MAX_REQUEST_SECONDS,
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
    /// Names of the adapters that requests may select by their `model`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<String>,
    /// Absent: nothing is recorded and `/v1/feedback` answers 404.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<EventsConfig>,
    #[serde(default)]
    pub limits: RouterLimits,
    /// Whether `GET /` answers with a page for trying the model. Absent if false: a router of an earlier version does not read it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub playground: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouterRevision {
    pub name: String,
    /// Service whose EndpointSlices hold the revision's pods; ports are named `http` and `grpc`.
    pub service: String,
    /// Share of the traffic in percent; the weights of all revisions add up to 100.
    pub weight: u32,
    /// Name of the adapter that makes the revision out of the servers' model, which other revisions may share. Absent:
    /// the servers have this revision alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RouterLimits {
    pub max_body_bytes: usize,
    /// Attempts on other endpoints after a connection error or 502, 503, 504, 429.
    pub retries: u32,
    /// Longest duration of a classification in seconds, all attempts together.
    pub request_timeout_seconds: u64,
    /// Longest duration of a request to a language model in seconds, from its head to the end of its answer.
    pub max_request_seconds: u64,
    /// Seconds that a shutdown waits for requests in progress. While requests to a language model are in progress it
    /// waits for at least `maxRequestSeconds`.
    pub drain_seconds: u64,
}

impl Default for RouterLimits {
    fn default() -> Self {
        Self {
            max_body_bytes: 1 << 20,
            retries: 3,
            request_timeout_seconds: 30,
            max_request_seconds: MAX_REQUEST_SECONDS,
            drain_seconds: 20,
        }
    }
}

/// Kafka topic of the events, and what is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EventsConfig {
    pub bootstrap_servers: String,
    pub topic: String,
    /// Configuration of the topic, if a router creates it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub topic_config: BTreeMap<String, String>,
    /// Percentage of requests whose answers and feedback are recorded. The id of a request decides.
    #[serde(default = "all")]
    pub sample_percent: u32,
    /// Regular expressions; each match in a recorded text is replaced by [`crate::redaction::REDACTED`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub redact: Vec<String>,
    /// Largest percentage of the feedback in a verdict or a retraining that may come from one API key.
    #[serde(default = "all")]
    pub maximum_caller_percent: u32,
    /// Whether a classifier's answer waits until its event is in Kafka or on disk.
    #[serde(default)]
    pub durable_predictions: bool,
}

impl EventsConfig {
    /// A topic in which everything is recorded as it is.
    pub fn new(bootstrap_servers: impl Into<String>, topic: impl Into<String>) -> Self {
        Self {
            bootstrap_servers: bootstrap_servers.into(),
            topic: topic.into(),
            topic_config: BTreeMap::new(),
            sample_percent: all(),
            redact: Vec::new(),
            maximum_caller_percent: all(),
            durable_predictions: false,
        }
    }
}

fn all() -> u32 {
    100
}

/// Who may use a router: content of [`variable::ACCESS`](crate::process::variable::ACCESS).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessConfig {
    pub callers: Vec<Caller>,
}

/// A caller of a deployment, known by an API key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Caller {
    /// Name of the caller, and of the Secret's key that has the hash of the caller's API key.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// What the caller may do.
    #[serde(default = "all_scopes")]
    #[schemars(length(min = 1, max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub scopes: Vec<Scope>,
    /// Largest number of requests in a minute, for each router. Beyond it requests are answered 429. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub requests_per_minute: Option<u32>,
    /// Largest number of tokens in a minute, of prompts and answers together, for each router. An answer is counted when
    /// it ends; while more tokens than these were used, requests are answered 429. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub tokens_per_minute: Option<u32>,
}

fn all_scopes() -> Vec<Scope> {
    vec![Scope::Infer, Scope::Feedback]
}

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Ask the model, and list the models.
    Infer,
    /// Give feedback.
    Feedback,
}

impl Scope {
    pub fn name(self) -> &'static str {
        match self {
            Self::Infer => "infer",
            Self::Feedback => "feedback",
        }
    }
}

/// Response of `GET /analysis` on a router's ops port: counts since the router started, by which a canary is analysed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouterAnalysis {
    /// By revision name.
    pub revisions: std::collections::BTreeMap<String, RevisionAnalysis>,
}

/// Numbers of answers by latency, which add up over routers. Buckets grow by a twelfth from a tenth of a millisecond to
/// more than two minutes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LatencyHistogram(Vec<u64>);

impl LatencyHistogram {
    pub const BUCKETS: usize = 180;
    const FIRST_MS: f64 = 0.1;
    const GROWTH: f64 = 1.083;

    /// From the counts of all buckets; those after the last answer are left out.
    pub fn new(mut counts: Vec<u64>) -> Self {
        counts.truncate(Self::BUCKETS);
        counts.truncate(counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1));
        Self(counts)
    }

    /// Index of the bucket of a latency.
    pub fn bucket(milliseconds: f64) -> usize {
        let bucket = (milliseconds / Self::FIRST_MS).max(1.0).log(Self::GROWTH).ceil() as usize;
        bucket.min(Self::BUCKETS - 1)
    }

    /// Adds the answers of another router.
    pub fn add(&mut self, other: &Self) {
        let buckets = other.0.len().min(Self::BUCKETS);
        if self.0.len() < buckets {
            self.0.resize(buckets, 0);
        }
        for (count, &more) in self.0.iter_mut().zip(&other.0) {
            *count = count.saturating_add(more);
        }
    }

    /// Number of answers.
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |total, &count| total.saturating_add(count))
    }

    /// Number of answers that certainly took longer: those of the latency's own bucket, which ends at most a twelfth
    /// above it, do not count.
    pub fn slower_than(&self, milliseconds: f64) -> u64 {
        let slower = self.0.iter().skip(Self::bucket(milliseconds) + 1);
        slower.fold(0, |total, &count| total.saturating_add(count))
    }

    /// The upper end, in milliseconds, of the bucket that holds this share of the answers; 0 without answers.
    pub fn percentile(&self, share: f64) -> f64 {
        let total = self.total();
        if total == 0 {
            return 0.0;
        }
        let rank = (total as f64 * share).ceil() as u64;
        let mut seen = 0_u64;
        let bucket = self.0.iter().position(|&count| {
            seen = seen.saturating_add(count);
            seen >= rank
        });
        Self::FIRST_MS * Self::GROWTH.powi(bucket.unwrap_or(self.0.len()) as i32)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RevisionAnalysis {
    /// Number of requests that the revision answered or should have answered, without refusals. A request that another
    /// revision had to answer counts for both.
    pub requests: u64,
    /// Number of these requests that the revision did not answer, answered with a 5xx, or whose answer broke off.
    pub errors: u64,
    /// Number of requests that were answered with a 4xx or 501: `busy` and `rejected`. A router of an earlier version
    /// does not report it.
    #[serde(default)]
    pub refused: u64,
    /// Number of requests that were answered with 429, as by a full queue. A router of an earlier version does not report it,
    /// nor the three below.
    #[serde(default)]
    pub busy: u64,
    /// Number of requests that were answered with another 4xx or 501.
    #[serde(default)]
    pub rejected: u64,
    /// Number of errors in which no server answered: the request was lost, reached none, or ran out of time.
    #[serde(default)]
    pub missing: u64,
    /// Number of errors in which the model's output was not finite, as athanor-server reports them.
    #[serde(default)]
    pub non_finite: u64,
    /// Latencies of the answers. A router of an earlier version does not report them.
    #[serde(default)]
    pub latency: LatencyHistogram,
    /// Number of remembered answers with feedback, each counted once.
    pub feedback_total: u64,
    pub feedback_correct: u64,
}
