//! Smaller forms of a trained model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;
use crate::Decimal;

/// One step of compression: exactly one of `prune` and `quantize`. Steps follow one another. Each result is measured on the test
/// rows; one that breaks a gate, or loses more than `maximumLoss`, is left out and the report says so.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::PRUNE_OR_QUANTIZE]))]
pub struct CompressStep {
    /// Sets weights of the encoder's matrices to zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune: Option<PruneSpec>,
    /// Gives weights fewer bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<QuantizeSpec>,
    /// How much accuracy the step may cost, such as "0.01".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum_loss: Option<Decimal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::SPARSITY_OR_TWO_OF_FOUR]))]
pub struct PruneSpec {
    /// Which weights go.
    #[serde(default)]
    pub method: PruneMethod,
    /// Percent of each matrix's weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 95))]
    pub sparsity_percent: Option<u8>,
    /// Two of each four neighbours, the pattern that GPUs compute with.
    #[serde(default)]
    pub two_of_four: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PruneMethod {
    /// The smallest weights.
    #[default]
    Magnitude,
    /// The smallest products of weight and norm of its input (Sun et al. 2023).
    Wanda,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct QuantizeSpec {
    /// What is rounded.
    pub method: QuantizeMethod,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum QuantizeMethod {
    /// Eight-bit weights, and inputs rounded to eight bits as they come: less memory and faster products.
    #[default]
    Int8Dynamic,
    /// Eight-bit weights alone: a smaller file, computed with in FP32.
    Int8WeightOnly,
}
