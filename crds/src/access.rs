//! Who may use a ModelDeployment.

use athanor_contract::serve::Caller;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who may use a ModelDeployment, and over which connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.apiKeys) || has(self.tls)", "message": "set apiKeys, tls or both"}]))]
pub struct AccessSpec {
    /// Callers and their API keys. Absent: whoever reaches the Service may ask the model and give feedback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_keys: Option<ApiKeysSpec>,
    /// Certificate of the Service. With it the Service's ports are 443 (HTTPS) and 8081 (gRPC with TLS). Absent: the
    /// connections are not encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSpec>,
}

/// API keys of callers. A request sends its key in the header `Authorization: Bearer KEY`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiKeysSpec {
    /// Name of a Secret in the same namespace with a key for each caller, named as the caller. Its value has one or more
    /// lines, each `sha256:` and the SHA-256 of an API key in hexadecimal digits. A changed Secret is effective within
    /// about a minute and a half.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,
    /// Callers that are let in.
    #[schemars(length(min = 1, max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub callers: Vec<Caller>,
}

/// A certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TlsSpec {
    /// Name of a Secret of the type kubernetes.io/tls in the same namespace. A renewed certificate is used within about
    /// two minutes, without a restart.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,
}
