//! LoRA adapters of a ModelDeployment, and what its models and adapters come from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A FineTuneJob of the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobReference {
    /// Name of the FineTuneJob, which may be created later.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Model that the served model is an adapter of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BaseModel {
    /// Folder of an artifact, a Hugging Face folder or a folder with one GGUF file, at s3://, gs://, az://, https:// or
    /// file://: the weights that the adapters were trained on.
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(s3|gs|az|http|https|file)://.+"))]
    pub from: String,
}

/// A LoRA adapter that clients select by its name in `model`: exactly one of `from` and `fromJob`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.from) != has(self.fromJob)", "message": "set exactly one of from and fromJob"}]))]
pub struct ServedAdapter {
    /// Name of the adapter, other than the ModelDeployment's.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Folder of the adapter in PEFT's format, or of an artifact that was trained with `adapter.lora`, at s3://, gs://,
    /// az://, https:// or file://.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^(s3|gs|az|http|https|file)://.+"))]
    pub from: Option<String>,
    /// FineTuneJob of the same namespace, with `adapter.lora`, whose adapter is served once it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_job: Option<JobReference>,
}

/// An adapter as it is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterStatus {
    /// Name of the adapter.
    #[schemars(length(max = 63))]
    pub name: String,
    /// Folder of the adapter, or of the artifact that has it.
    #[schemars(length(max = 2048))]
    pub uri: String,
    /// Name of the FineTuneJob that trained it. The adapter stays when that job is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub job: Option<String>,
}
