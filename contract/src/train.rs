//! Training: the part of a `FineTuneJob` that the trainer reads, the configuration the operator mounts, and the result.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Decimal;

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
    /// Where rows come from and how they are split.
    pub data: DataSpec,
    /// Hyperparameters; every one has a default that suits fine-tuning an encoder.
    #[serde(default)]
    pub hyperparameters: Hyperparameters,
    /// Metrics, how often they are computed, and the gates a result must pass.
    #[serde(default)]
    pub evaluate: EvaluateSpec,
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

/// The model to start from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// A folder with config.json, model.safetensors and tokenizer.json: s3://, gs://, az://, file:// (a plain model folder or an
    /// Athanor artifact). Pickled weights are refused.
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(s3|gs|az|http|https|file)://.+"))]
    pub from: String,
    /// What the model learns to do.
    pub task: Task,
    /// Class names in the order of the model's outputs. Absent: the labels found in the data, sorted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 1024), inner(length(min = 1, max = 256)))]
    pub labels: Option<Vec<String>>,
    /// Shape of the classification head. Absent: one linear layer on the pooled encoder output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadSpec>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Task {
    /// One label for each text; the loss is cross entropy.
    TextClassification,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeadSpec {
    /// Dropout before the last layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DataSpec {
    /// Rows of all sources together are the dataset. A source's name is a slice that metrics and gates can name.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub sources: Vec<Source>,
    /// Parts for training, validation and test. A row's part depends on its text and the seed alone, so a row that was held out
    /// once stays held out in every retraining.
    #[serde(default)]
    pub split: SplitSpec,
}

/// One source of rows: exactly one of `uri` and `kafka`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.uri) != has(self.kafka)", "message": "set exactly one of uri and kafka"}]))]
pub struct Source {
    /// Name of the source, also the name of its slice in metrics and gates.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// A file: s3://, gs://, az://, https://, file://. The format follows the name: .jsonl, .csv, .tsv.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(s3|gs|az|http|https|file)://.+"))]
    pub uri: Option<String>,
    /// Labelled requests of a ModelDeployment: predictions joined with their feedback inside exact offset ranges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kafka: Option<KafkaSource>,
    /// Names of the columns (or JSON keys) that hold text and label.
    #[serde(default)]
    pub columns: Columns,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Columns {
    /// Column with the text.
    #[serde(default = "text_column")]
    #[schemars(length(min = 1, max = 256))]
    pub text: String,
    /// Column with the label.
    #[serde(default = "label_column")]
    #[schemars(length(min = 1, max = 256))]
    pub label: String,
}

fn text_column() -> String {
    "text".into()
}

fn label_column() -> String {
    "label".into()
}

impl Default for Columns {
    fn default() -> Self {
        Self { text: text_column(), label: label_column() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KafkaSource {
    /// host:port, comma separated.
    #[schemars(length(min = 1, max = 1024))]
    pub bootstrap_servers: String,
    /// The deployment's topic.
    #[schemars(length(min = 1, max = 249))]
    pub topic: String,
    /// The ranges to read, each from `begin` up to but not including `end`.
    #[schemars(length(min = 1, max = 1024))]
    pub ranges: Vec<OffsetRange>,
}

/// Offsets of one partition, `begin <= offset < end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{"rule": "self.begin <= self.end", "message": "begin must not be after end"}]))]
pub struct OffsetRange {
    /// Partition of the topic.
    #[schemars(range(min = 0))]
    pub partition: i32,
    /// First offset.
    #[schemars(range(min = 0))]
    pub begin: i64,
    /// Offset after the last.
    #[schemars(range(min = 0))]
    pub end: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "self.validationPercent + self.testPercent < 100", "message": "validationPercent and testPercent leave no rows to train on"}]))]
pub struct SplitSpec {
    /// Percent of rows for choosing the best checkpoint.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 50))]
    pub validation_percent: u8,
    /// Percent of rows for the final metrics and gates; never trained or tuned on.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 50))]
    pub test_percent: u8,
    /// Another seed gives another split.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub seed: i64,
}

fn ten() -> u8 {
    10
}

impl Default for SplitSpec {
    fn default() -> Self {
        Self { validation_percent: 10, test_percent: 10, seed: 0 }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!(has(self.epochs) && has(self.maxSteps))", "message": "set epochs or maxSteps, not both"}]))]
pub struct Hyperparameters {
    /// Passes over the training rows. Absent together with maxSteps: 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub epochs: Option<u32>,
    /// Optimizer steps, instead of epochs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub max_steps: Option<u64>,
    /// Rows of one optimizer step over all ranks together.
    #[schemars(range(min = 1, max = 65536))]
    pub batch_size: u32,
    /// Peak learning rate.
    #[schemars(range(min = 1e-9, max = 10.0))]
    pub learning_rate: f64,
    /// How the learning rate goes on after the warm-up.
    pub schedule: Schedule,
    /// Share of the steps in which the learning rate grows from zero.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub warmup_ratio: f64,
    /// Forward and backward passes that the rows of one optimizer step are dealt over: the same result in less memory.
    #[schemars(range(min = 1, max = 65536))]
    pub accumulate_steps: u32,
    /// The update rule.
    pub optimizer: Optimizer,
    /// Momentum of SGD and RMSprop.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub momentum: f64,
    /// Adam's and AdamW's decay of the gradients' mean.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub beta1: f64,
    /// Adam's and AdamW's decay of the squares' mean; RMSprop's too.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub beta2: f64,
    /// What the update rules add to a denominator.
    #[schemars(range(min = 1e-12, max = 1.0))]
    pub epsilon: f64,
    /// Decoupled weight decay, AdamW's alone; biases and normalisation weights are left out.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub weight_decay: f64,
    /// Adds l1 times the sum of the weights' absolute values to the objective; biases and normalisation weights are left out.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l1: f64,
    /// Adds l2 / 2 times the sum of the weights' squares to the objective; biases and normalisation weights are left out.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l2: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub clip_norm: f64,
    /// Seed of initialisation, order of rows and dropout.
    #[schemars(range(min = 0))]
    pub seed: i64,
    /// Number format of the matrix products.
    pub precision: Precision,
    /// Longer texts are cut to this many tokens.
    #[schemars(range(min = 8, max = 8192))]
    pub max_sequence_length: u32,
}

impl Default for Hyperparameters {
    fn default() -> Self {
        Self {
            epochs: None,
            max_steps: None,
            batch_size: 32,
            learning_rate: 5e-5,
            schedule: Schedule::Linear,
            warmup_ratio: 0.1,
            accumulate_steps: 1,
            optimizer: Optimizer::AdamW,
            momentum: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            l1: 0.0,
            l2: 0.0,
            clip_norm: 1.0,
            seed: 0,
            precision: Precision::Auto,
            max_sequence_length: 128,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Schedule {
    Constant,
    Linear,
    Cosine,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Optimizer {
    SGD,
    Adam,
    AdamW,
    RMSprop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Precision {
    /// BF16 where the hardware computes in it, else FP32.
    Auto,
    FP32,
    /// Weights and optimizer in FP32, matrix products in bfloat16.
    BF16,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!has(self.gates) || has(self.baseline) || self.gates.all(g, !has(g.minimumGain))",
     "message": "a gate with minimumGain needs a baseline"}]))]
pub struct EvaluateSpec {
    /// Validate every so many steps besides at the end of each epoch; 0: only at the end of each epoch.
    #[schemars(range(min = 0))]
    pub every_steps: u64,
    /// What the result must be worth on the test rows. A job whose gates fail ends as Failed with reason GateFailed; its artifact
    /// stays, but no ModelDeployment takes it.
    #[schemars(length(max = 32))]
    pub gates: Vec<Gate>,
    /// An artifact evaluated on the same test rows, which `minimumGain` of a gate compares with (in a retraining: the champion).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048))]
    pub baseline: Option<String>,
}

/// One condition on the test rows: exactly one of `minimum` and `minimumGain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.minimum) != has(self.minimumGain)", "message": "set exactly one of minimum and minimumGain"}]))]
pub struct Gate {
    /// What is measured.
    pub metric: Metric,
    /// Only rows of the sources with these names. Absent: all test rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32), inner(length(min = 1, max = 63)))]
    pub sources: Option<Vec<String>>,
    /// The metric must be at least this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum: Option<Decimal>,
    /// The metric must be at least the baseline's plus this; negative allows a loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_gain: Option<Decimal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Metric {
    Accuracy,
    MacroF1,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutputSpec {
    /// A folder: s3://, gs://, az://, file://. The artifact appears below it, in a folder of its own for each run.
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(s3|gs|az|file)://.+"))]
    pub to: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DistributedSpec {
    /// Pods, each of one Indexed Job's indices.
    #[schemars(range(min = 1, max = 512))]
    pub num_nodes: u32,
    /// Processes in a pod: one for each GPU.
    #[schemars(range(min = 1, max = 16))]
    pub processes_per_node: u32,
    /// What gradients travel by.
    pub backend: Backend,
}

impl Default for DistributedSpec {
    fn default() -> Self {
        Self { num_nodes: 1, processes_per_node: 1, backend: Backend::Auto }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Backend {
    /// NCCL with GPUs, else Gloo.
    Auto,
    NCCL,
    Gloo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CheckpointSpec {
    /// Save every so many optimizer steps; 0 saves at the end of each epoch only.
    #[schemars(range(min = 0))]
    pub every_steps: u64,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { every_steps: 100 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FailurePolicy {
    /// Restarts of the whole gang before the job fails. Errors in the user's input are never retried.
    #[schemars(range(min = 0, max = 100))]
    pub max_restarts: u32,
    /// A step that takes longer ends the process with exit code 43; 0 turns the watch off.
    #[schemars(range(min = 0, max = 86400))]
    pub hang_seconds: u32,
    /// What happens when loss or gradients are not finite.
    pub on_non_finite: OnNonFinite,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self { max_restarts: 3, hang_seconds: 600, on_non_finite: OnNonFinite::Fail }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnNonFinite {
    /// End with exit code 44.
    Fail,
    /// Leave the step out and go on.
    Skip,
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
    /// the baseline's have `baseline/` in front.
    pub metrics: BTreeMap<String, Decimal>,
    /// Gates that did not hold, each in words with the numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_gates: Vec<String>,
    /// What was chosen where the specification was silent: labels, precision, steps, ...
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub chosen: BTreeMap<String, String>,
    /// Seconds from process start: `dataReady`, `firstStep`, `trained`, `evaluated`, `written`.
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
