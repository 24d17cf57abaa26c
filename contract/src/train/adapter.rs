//! Adapters: small matrices that are trained instead of the model's weights.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is trained instead of all weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterSpec {
    /// Low-rank adapters of the linear layers (Hu et al. 2021). The model's own weights stay as they are.
    pub lora: LoraSpec,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LoraSpec {
    /// Rank of the two matrices of an adapter.
    #[schemars(range(min = 1, max = 1024))]
    pub rank: u32,
    /// The product of the matrices is scaled by alpha / rank.
    #[schemars(range(min = 0.01, max = 4096.0))]
    pub alpha: f64,
    /// Dropout probability of an adapter's input.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: f64,
    /// Names of the layers that get an adapter, such as q_proj. Absent: all linear layers except the output head.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 128)))]
    pub target_modules: Vec<String>,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, dropout: 0.0, target_modules: Vec::new() }
    }
}
