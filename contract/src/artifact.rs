//! The manifest that makes a folder a model or a checkpoint. It is written last: no manifest, no model.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hexadecimal;

/// Name of the manifest in an artifact or checkpoint folder.
pub const MANIFEST: &str = "manifest.json";
/// Name of the reference statistics in an artifact, which the monitor compares live traffic with.
pub const REFERENCE: &str = "reference.json";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    pub kind: Kind,
    /// Name of the job that wrote it.
    pub job: String,
    /// sha256 over the sorted lines `sha256  name` of `files`; see [`model_digest`].
    pub model_digest: String,
    pub data_digest: String,
    /// The folder this model was trained from.
    pub parent: String,
    /// Version of Athanor that wrote it.
    pub code_version: String,
    /// Optimizer steps taken.
    pub step: u64,
    /// Tokens that texts were cut to in training and for the metrics; a server cuts them alike. Absent in older
    /// artifacts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sequence_length: Option<u32>,
    /// Every file of the folder but this one.
    pub files: BTreeMap<String, FileEntry>,
    /// Test metrics of an artifact; empty in a checkpoint.
    #[serde(default)]
    pub metrics: BTreeMap<String, crate::Decimal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Model,
    Checkpoint,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Lower-case hexadecimal.
    pub sha256: String,
    pub bytes: u64,
}

/// Hexadecimal sha256 of bytes.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hexadecimal::encode(&Sha256::digest(bytes))
}

/// Folder of the event files for TensorBoard, in an artifact and beside it.
pub const EVENTS: &str = "tensorboard";

/// The digest of a set of files, independent of their order on disk. Reports and event files are left out: they tell
/// times, and the same training gives the same model.
pub fn model_digest(files: &BTreeMap<String, FileEntry>) -> String {
    let files = files.iter().filter(|(name, _)| !name.starts_with("report.") && !name.starts_with(EVENTS));
    let lines: String = files.map(|(name, entry)| format!("{}  {name}\n", entry.sha256)).collect();
    sha256_hex(lines.as_bytes())
}

/// What the model did on its test rows, as the baseline of drift detection: the content of [`REFERENCE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Reference {
    Classes(ClassReference),
    Text(TextReference),
}

impl Reference {
    /// Number of right answers on the test rows, and number of test rows; `None` without test rows.
    pub fn accuracy(&self) -> Option<(u64, u64)> {
        let (correct, rows) = match self {
            Self::Classes(reference) => (reference.correct, reference.rows),
            Self::Text(reference) => (reference.correct, reference.rows),
        };
        (rows > 0).then_some((correct, rows))
    }
}

/// The baseline of a classifier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClassReference {
    pub labels: Vec<String>,
    /// Predicted label counts on the test rows, in the order of `labels`.
    pub predicted: Vec<u64>,
    /// The winning probability of each test row, at most 2,048 of them, sorted.
    pub confidences: Vec<f32>,
    /// Number of correct predictions.
    pub correct: u64,
    /// Number of test rows.
    pub rows: u64,
}

/// The baseline of a language model, from the answers that it generated for test rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TextReference {
    /// Number of tokens of each answer, at most 2,048 of them, sorted.
    pub answer_tokens: Vec<u32>,
    /// Mean natural logarithm of the token probabilities of each answer, at most 2,048 of them, sorted.
    pub mean_log_probabilities: Vec<f32>,
    /// Number of answers that equal the expected text, differences in white space apart.
    pub correct: u64,
    /// Number of answers.
    pub rows: u64,
}
