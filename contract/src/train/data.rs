//! Where rows come from, and how they are split.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{AnnotateSpec, AugmentSpec, CleanSpec, SelectSpec, rules};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::ONE_SOURCE_WITHOUT_PART]))]
pub struct DataSpec {
    /// Sources of rows; the rows of all sources form the dataset. Metrics and gates can refer to a source by its name.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub sources: Vec<Source>,
    /// What happens to a row that cannot be read: a field that is missing, empty or not text, malformed JSON or CSV, text
    /// that is not UTF-8, a page of a PDF that is damaged.
    #[serde(default, skip_serializing_if = "OnBadRow::is_default")]
    pub on_bad_row: OnBadRow,
    /// How texts are cleaned before they are used. Absent: they are not, except that a text which occurs twice in a
    /// source is kept once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clean: Option<CleanSpec>,
    /// Labels rows that have no label. Absent: a row without a label is an error if the task requires one. Validation
    /// and test rows that are labelled this way are left out, unless none of them has a label of its own, so that
    /// results are measured by the data's own labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotate: Option<AnnotateSpec>,
    /// Shares of rows for training, validation and test, of the sources without a part. The part of a row depends only
    /// on its text and the seed, so a row that was held out once is held out in every retraining.
    #[serde(default)]
    pub split: SplitSpec,
    /// Selects a part of the training rows: those that contribute most. Absent: all training rows are used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<SelectSpec>,
    /// Generates further texts from the (selected) training rows, for which the teacher computes the targets. Requires
    /// the task TextClassification, a teacher, and a term of the objective that uses it. Absent: none.
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

/// What happens to a row that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnBadRow {
    /// The job fails and names up to ten such rows of the file.
    #[default]
    Fail,
    /// It is left out. The report counts the rows that were left out and shows the first ten.
    Skip,
}

impl OnBadRow {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// One source of rows: exactly one of `uri` and `kafka`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::URI_OR_KAFKA]))]
pub struct Source {
    /// Name of the source; metrics and gates refer to its rows by it.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// File, or pattern of files with `*`, `**`, `?`, `[...]` or `{a,b}`, at s3://, gs://, az://, file:// or
    /// hf://datasets/OWNER/NAME[@REVISION]/PATH; in a cluster also pvc://CLAIM/PATH, a PersistentVolumeClaim of the
    /// job's namespace that is mounted read-only in each pod; at http:// and https:// a single file. The extension
    /// gives the format: .jsonl, .csv, .tsv, .parquet, .txt (one row per line), .pdf (one row per page) or .html (one
    /// row per file), optionally followed by .gz or .zst.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 2048),
        regex(pattern = r"^((s3|gs|az|http|https|file|hf)://|pvc://[a-z0-9]([-.a-z0-9]*[a-z0-9])?/).+")
    )]
    pub uri: Option<String>,
    /// Format of the files. Absent: it follows from the extension. Compression always follows from the extension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DataFormat>,
    /// Labelled requests of a ModelDeployment: predictions joined with their feedback within exact offset ranges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kafka: Option<KafkaSource>,
    /// Names of the columns or JSON keys with text, label, pair and group.
    #[serde(default)]
    pub columns: Columns,
    /// The part that all rows of this source belong to; the rows of such sources are then the whole of that part. A row
    /// of another source is left out if a row of this one has the same text, is a near duplicate of it
    /// (`clean.nearDuplicates`), or has the same group; the report counts these rows. Absent: the split assigns each row
    /// to a part that no source names. At least one source has no part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<HeldOutPart>,
}

/// A part of the dataset that is not trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum HeldOutPart {
    /// Rows by which the best checkpoint is chosen. A text that is also in a source with the part Test is left out.
    Validation,
    /// Rows for the final metrics and gates.
    Test,
}

/// Format of a file with rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum DataFormat {
    /// One JSON object per line.
    JsonLines,
    /// Comma-separated values with a header and quotes (RFC 4180).
    Csv,
    /// Tab-separated values with a header; quotes are part of the text.
    Tsv,
    /// Apache Parquet with text, number or boolean columns at the top level.
    Parquet,
    /// One row per line, without labels.
    Text,
    /// One row per page that has text, without labels.
    Pdf,
    /// One row per file, without labels: the text without scripts and styles.
    Html,
}

/// Names of columns. Rows of a language model are conversations (`messages`), prompts with completions (`prompt` and
/// `completion`), or texts (`text`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::MESSAGES_OR_PROMPT, rules::PROMPT_AND_COMPLETION]))]
pub struct Columns {
    /// Name of the column with the text.
    #[serde(default = "text_column")]
    #[schemars(length(min = 1, max = 256))]
    pub text: String,
    /// Name of the column with the label. The column may be missing if the task requires no labels.
    #[serde(default = "label_column")]
    #[schemars(length(min = 1, max = 256))]
    pub label: String,
    /// Name of the column with a second text, for pairs such as a question and its answer. Absent: rows have one text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub pair: Option<String>,
    /// Name of the column with a key, such as an author or a document; rows with the same key are in the same part of
    /// the split. Absent: rows are independent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub group: Option<String>,
    /// Name of the column with a conversation: a list of messages with role and content as in OpenAI's chat API, of
    /// which the last one is the assistant's; in files other than JSON lines the list as JSON. Requires the task
    /// CausalLanguageModel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub messages: Option<String>,
    /// Name of the column with a prompt. Requires the task CausalLanguageModel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub prompt: Option<String>,
    /// Name of the column with the completion of the prompt. Requires the task CausalLanguageModel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub completion: Option<String>,
}

impl Columns {
    /// Name of the column that a model reads: messages, prompt or text.
    pub fn input(&self) -> &str {
        self.messages.as_deref().or(self.prompt.as_deref()).unwrap_or(&self.text)
    }

    /// Name of the column with a second text: the completion or the pair.
    pub fn second(&self) -> Option<&str> {
        self.completion.as_deref().or(self.pair.as_deref())
    }
}

fn text_column() -> String {
    "text".into()
}

fn label_column() -> String {
    "label".into()
}

impl Default for Columns {
    fn default() -> Self {
        Self {
            text: text_column(),
            label: label_column(),
            pair: None,
            group: None,
            messages: None,
            prompt: None,
            completion: None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KafkaSource {
    /// Addresses of the brokers, host:port, separated by commas.
    #[schemars(length(min = 1, max = 1024))]
    pub bootstrap_servers: String,
    /// Topic of the deployment.
    #[schemars(length(min = 1, max = 249))]
    pub topic: String,
    /// Offset ranges to read, each from `begin` up to but not including `end`.
    #[schemars(length(min = 1, max = 1024))]
    pub ranges: Vec<OffsetRange>,
    /// Name of a Secret in the same namespace whose keys become environment variables: KAFKA_SECURITY_PROTOCOL,
    /// KAFKA_SASL_MECHANISM, KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD, KAFKA_SSL_CA, KAFKA_SSL_CERTIFICATE and
    /// KAFKA_SSL_KEY, as far as the brokers need them. All Kafka sources of a job name the same one. Absent: the brokers
    /// take connections without credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub credentials_secret_name: Option<String>,
    /// Name of the Secret with the deployment's signing keys (`NAME-signing-keys` of a ModelDeployment NAME). Events that
    /// no key of it signed are counted and left out. All Kafka sources of a job name the same one. Absent: signatures
    /// are not verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub signing_keys_secret_name: Option<String>,
    /// Largest number of rows: those with the newest feedback are kept.
    #[serde(default = "most_samples", skip_serializing_if = "is_most_samples")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub maximum_samples: u32,
    /// Largest percentage of the rows that may rest on the feedback of one API key; beyond it that key's oldest rows are
    /// left out.
    #[serde(default = "whole", skip_serializing_if = "is_whole")]
    #[schemars(range(min = 1, max = 100))]
    pub maximum_caller_percent: u32,
}

impl KafkaSource {
    /// Ranges of a topic whose brokers take everyone, unverified.
    pub fn new(bootstrap_servers: impl Into<String>, topic: impl Into<String>, ranges: Vec<OffsetRange>) -> Self {
        Self {
            bootstrap_servers: bootstrap_servers.into(),
            topic: topic.into(),
            ranges,
            credentials_secret_name: None,
            signing_keys_secret_name: None,
            maximum_samples: most_samples(),
            maximum_caller_percent: whole(),
        }
    }
}

/// Default of `maximumSamples`.
pub fn most_samples() -> u32 {
    200_000
}

fn is_most_samples(samples: &u32) -> bool {
    *samples == most_samples()
}

fn whole() -> u32 {
    100
}

fn is_whole(percent: &u32) -> bool {
    *percent == whole()
}

/// Offsets of one partition, `begin <= offset < end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::BEGIN_BEFORE_END]))]
pub struct OffsetRange {
    /// Partition of the topic.
    #[schemars(range(min = 0))]
    pub partition: i32,
    /// First offset of the range.
    #[schemars(range(min = 0))]
    pub begin: i64,
    /// Offset after the last one of the range.
    #[schemars(range(min = 0))]
    pub end: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::SPLIT_LEAVES_ROWS]))]
pub struct SplitSpec {
    /// Percentage of rows by which the best checkpoint and the compressed form are chosen. Has no effect if a source has the
    /// part Validation.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 50))]
    pub validation_percent: u8,
    /// Percentage of rows for the final metrics and gates; they are not used for training or tuning. Has no effect if a
    /// source has the part Test.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 50))]
    pub test_percent: u8,
    /// Seed of the split.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub seed: i64,
    /// Whether each label has exactly the given shares, instead of approximately. The part of a row then depends on the
    /// other rows too, so a retraining with more rows may move some rows.
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
