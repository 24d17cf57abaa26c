//! The model to start from and what it shall do.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
