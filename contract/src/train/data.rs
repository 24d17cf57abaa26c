//! Where rows come from, and how they are split.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{AnnotateSpec, AugmentSpec, CleanSpec, SelectSpec, rules};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DataSpec {
    /// Rows of all sources together are the dataset. A source's name is a slice that metrics and gates can name.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub sources: Vec<Source>,
    /// What is done to texts before they are used. Absent: nothing, but that a text which occurs twice in a source is kept once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clean: Option<CleanSpec>,
    /// Labels for rows that have none. Absent: a row without a label is an error where the task needs one. Validation and test
    /// rows labelled this way are left out, unless no other of them has a label: results are measured by the data's own labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotate: Option<AnnotateSpec>,
    /// Parts for training, validation and test. A row's part depends on its text and the seed alone, so a row that was held out
    /// once stays held out in every retraining.
    #[serde(default)]
    pub split: SplitSpec,
    /// Trains on a part of the training rows: those that matter most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<SelectSpec>,
    /// More texts for the teacher to answer, made from the training rows (the selected ones). For TextClassification with a teacher
    /// that the objective asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub augment: Option<AugmentSpec>,
}

impl DataSpec {
    /// Whether the job's teacher labels rows.
    pub fn teacher_annotates(&self) -> bool {
        self.annotate.as_ref().is_some_and(|annotate| annotate.teacher.is_some())
    }

    /// Whether an endpoint labels rows, which may want to be paid for each.
    pub fn endpoint_annotates(&self) -> bool {
        self.annotate.as_ref().is_some_and(|annotate| annotate.endpoint.is_some())
    }
}

/// One source of rows: exactly one of `uri` and `kafka`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::URI_OR_KAFKA]))]
pub struct Source {
    /// Name of the source, also the name of its slice in metrics and gates.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// A file, or the files that a pattern with `*`, `**`, `?`, `[...]` or `{a,b}` matches: s3://, gs://, az://, file://, and
    /// hf://datasets/OWNER/NAME[@REVISION]/PATH; in a cluster pvc://CLAIM/PATH, on a PersistentVolumeClaim of the job's namespace,
    /// mounted read-only in each pod; one file by http:// and https://. The format follows the name: .jsonl, .csv,
    /// .tsv, .parquet, .txt (a row a line), .pdf (a row a page), .html (a row a file), each also with .gz or .zst behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 2048),
        regex(pattern = r"^((s3|gs|az|http|https|file|hf)://|pvc://[a-z0-9]([-.a-z0-9]*[a-z0-9])?/).+")
    )]
    pub uri: Option<String>,
    /// The format, where the name does not tell it. A compression is told by the name alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DataFormat>,
    /// Labelled requests of a ModelDeployment: predictions joined with their feedback inside exact offset ranges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kafka: Option<KafkaSource>,
    /// Names of the columns (or JSON keys) that hold text, label, pair and group.
    #[serde(default)]
    pub columns: Columns,
}

/// How a file holds rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum DataFormat {
    /// A JSON object a line.
    JsonLines,
    /// Values separated by commas, with a header and quotes as of RFC 4180.
    Csv,
    /// Values separated by tabs, with a header; quotes are part of the text.
    Tsv,
    /// Apache Parquet; text, number or boolean columns at the top level.
    Parquet,
    /// A row a line, without labels.
    Text,
    /// A row a page with text, without labels.
    Pdf,
    /// A row a file, without labels: its text, without scripts and styles.
    Html,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Columns {
    /// Column with the text.
    #[serde(default = "text_column")]
    #[schemars(length(min = 1, max = 256))]
    pub text: String,
    /// Column with the label. It may be absent where the task needs no labels.
    #[serde(default = "label_column")]
    #[schemars(length(min = 1, max = 256))]
    pub label: String,
    /// Column with a second text, for tasks about pairs such as a question and its answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub pair: Option<String>,
    /// Column with a key, such as an author or a document: rows of one key are all in one part of the split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub group: Option<String>,
}

fn text_column() -> String {
    "text".into()
}

fn label_column() -> String {
    "label".into()
}

impl Default for Columns {
    fn default() -> Self {
        Self { text: text_column(), label: label_column(), pair: None, group: None }
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
#[schemars(extend("x-kubernetes-validations" = [rules::BEGIN_BEFORE_END]))]
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
#[schemars(extend("x-kubernetes-validations" = [rules::SPLIT_LEAVES_ROWS]))]
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
    /// Exact shares within each label, instead of shares in expectation. A row's part then depends on the other rows too: a
    /// retraining with more rows may move some.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stratify: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn ten() -> u8 {
    10
}

impl Default for SplitSpec {
    fn default() -> Self {
        Self { validation_percent: 10, test_percent: 10, seed: 0, stratify: false }
    }
}
