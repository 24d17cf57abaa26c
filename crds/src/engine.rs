//! `spec.engine` of a ModelDeployment: what runs a language model.

use athanor_contract::serve::{EngineConfig, MAX_QUEUE_SECONDS, Speculation, Weights};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::container::ContainerEngine;

/// What runs a language model: the engine of athanor-server, or the server of another project.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!(has(self.builtin) && has(self.container))", "message": "set at most one of builtin and container"}]))]
pub struct EngineSpec {
    /// Engine of athanor-server, which other models than language models do not read. It is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub builtin: Option<BuiltinEngine>,
    /// Server of another project with an API like OpenAI's, such as vLLM or llama.cpp's, instead of athanor-server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerEngine>,
}

/// Settings of the engine of athanor-server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BuiltinEngine {
    /// Largest number of tokens of a sequence, prompt and answer together. Absent: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub max_model_length: Option<u32>,
    /// Memory of each pod for the keys and values of all sequences, such as 512Mi or 4Gi. It is part of what
    /// podTemplate.resources must have room for. Absent: 1Gi.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 32),
        regex(pattern = r"^([1-9][0-9]{0,14}|[1-9][0-9]{0,8}(Ki|Mi|k|M)|[1-9][0-9]{0,5}(Gi|Ti|G|T))$")
    )]
    pub kv_cache_memory: Option<String>,
    /// Whether a step checks several tokens that may come next in an answer, of models of Llama's kind on a CPU with other weights
    /// than FP32. No text depends on it.
    pub speculation: Speculation,
    /// Format of the weights in memory.
    pub weights: Weights,
    /// Longest expected time in seconds that a request waits before it runs. A request that would wait longer is answered
    /// 429 with Retry-After. Absent: 30.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub max_queue_seconds: Option<u32>,
}

impl EngineSpec {
    /// Longest expected wait of a request to athanor-server, in seconds.
    pub fn max_queue_seconds(&self) -> u64 {
        let own = self.builtin.as_ref().and_then(|engine| engine.max_queue_seconds);
        own.map_or(MAX_QUEUE_SECONDS, u64::from)
    }
}

impl BuiltinEngine {
    /// The settings as the server reads them.
    ///
    /// # Errors
    /// The text of `kvCacheMemory` if it is not a number of bytes.
    pub fn config(&self) -> Result<EngineConfig, String> {
        let memory = self.kv_cache_memory.as_ref();
        Ok(EngineConfig {
            max_model_length: self.max_model_length.map(|length| length as usize),
            kv_cache_memory: memory.map(|text| bytes(text).ok_or_else(|| text.clone())).transpose()?,
            weights: self.weights,
            speculation: self.speculation,
        })
    }
}

/// Bytes of a Kubernetes quantity without a fraction.
fn bytes(quantity: &str) -> Option<u64> {
    let digits = quantity.find(|c: char| !c.is_ascii_digit()).unwrap_or(quantity.len());
    let (number, suffix) = quantity.split_at(digits);
    let factor = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1_u64 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_bytes() {
        for (text, expected) in [
            ("1", Some(1)),
            ("256Mi", Some(256 << 20)),
            ("2Gi", Some(2 << 30)),
            ("3k", Some(3000)),
            ("1G", Some(1_000_000_000)),
            ("", None),
            ("Mi", None),
            ("0", None),
            ("1.5Gi", None),
            ("-1", None),
            ("99999999Ti", None),
            ("1mb", None),
        ] {
            assert_eq!(bytes(text), expected, "{text:?}");
        }
    }
}
