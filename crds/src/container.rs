//! `spec.engine.container` of a ModelDeployment: a server of another project.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Server of a language model in a container of its own. It answers OpenAI's API on `port` and reads the model from a
/// folder, which an init container with the image of athanor-server fills first. `command` and `args` may name variables
/// of the container, such as `$(MODEL_DIR)`. Three are always set. MODEL_DIR: folder of the model, /mnt/models, which is
/// read-only; a model that is one GGUF file is also there as model.gguf. MODEL_NAME: name of the ModelDeployment, which
/// requests have as `model`. PORT: `port`. Others come from podTemplate.env.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ContainerEngine {
    /// Image of the server.
    #[schemars(length(min = 1, max = 512))]
    pub image: String,
    /// Command of the container. Absent: the entrypoint of the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)), extend("x-kubernetes-list-type" = "atomic"))]
    pub command: Vec<String>,
    /// Arguments of the command, such as `["--model", "$(MODEL_DIR)", "--served-model-name", "$(MODEL_NAME)"]`. Absent: those
    /// of the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 4096)), extend("x-kubernetes-list-type" = "atomic"))]
    pub args: Vec<String>,
    /// Port of the API and of the metrics.
    #[serde(default = "default_port")]
    #[schemars(range(min = 1024, max = 65535))]
    pub port: u16,
    /// Path that answers with a 2xx status once the model can be asked. It is the container's startup, readiness and
    /// liveness probe.
    #[serde(default = "default_readiness_path")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^/[!-~]*$"))]
    pub readiness_path: String,
    /// Path of the metrics in Prometheus' format.
    #[serde(default = "default_metrics_path")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^/[!-~]*$"))]
    pub metrics_path: String,
    /// Seconds from the start of the container after which it is restarted if `readinessPath` has not answered yet.
    #[serde(default = "default_startup_timeout")]
    #[schemars(range(min = 1, max = 86_400))]
    pub startup_timeout_seconds: u32,
    /// Seconds for which a pod that is going down still runs before its container receives SIGTERM, so that answers in
    /// progress end: most servers break them off at that signal. Absent: maxRequestSeconds. Set 0 for a server that
    /// completes them by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub drain_seconds: Option<u32>,
}

fn default_port() -> u16 {
    8000
}

fn default_readiness_path() -> String {
    "/health".into()
}

fn default_metrics_path() -> String {
    "/metrics".into()
}

fn default_startup_timeout() -> u32 {
    1800
}
