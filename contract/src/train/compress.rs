//! Smaller forms of a trained model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;
use crate::Decimal;

/// One step of compression: exactly one of `prune` and `quantize`. Each step continues from the result of the one
/// before it and is evaluated on the validation rows; a step whose result fails a gate there or loses more than
/// `maximumLoss` is left out, as the report says. The result of the last step that is kept is evaluated on the test
/// rows, for the metrics and the gates of the job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::PRUNE_OR_QUANTIZE]))]
pub struct CompressStep {
    /// Sets weights of the encoder's matrices to zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune: Option<PruneSpec>,
    /// Stores weights with fewer bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<QuantizeSpec>,
    /// Largest loss of accuracy on the validation rows by the step, such as "0.01". Absent: only the gates limit it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum_loss: Option<Decimal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::SPARSITY_OR_TWO_OF_FOUR]))]
pub struct PruneSpec {
    /// Criterion by which weights are set to zero.
    #[serde(default)]
    pub method: PruneMethod,
    /// Percentage of each matrix's weights that is set to zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 95))]
    pub sparsity_percent: Option<u8>,
    /// Whether two of each four neighbouring weights are set to zero, the sparsity pattern that GPUs support.
    #[serde(default)]
    pub two_of_four: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PruneMethod {
    /// Weights with the smallest absolute values.
    #[default]
    Magnitude,
    /// Weights with the smallest product of absolute value and norm of the input (Sun et al. 2023).
    Wanda,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct QuantizeSpec {
    /// Numbers that are rounded.
    pub method: QuantizeMethod,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum QuantizeMethod {
    /// Weights are stored in eight bits, and inputs are rounded to eight bits when they are multiplied: less memory and
    /// faster products.
    #[default]
    Int8Dynamic,
    /// Weights are stored in eight bits and multiplied in FP32: a smaller file only.
    Int8WeightOnly,
}
