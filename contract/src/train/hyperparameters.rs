//! Hyperparameters of training.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{CrossValidationSpec, SearchSpec, rules};

/// Epochs of a training whose `epochs` and `maxSteps` are absent.
pub const DEFAULT_EPOCHS: u32 = 3;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [rules::EPOCHS_OR_STEPS]))]
pub struct Hyperparameters {
    /// Number of passes over the training rows. Absent: 3, unless maxSteps is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub epochs: Option<u32>,
    /// Number of optimizer steps, instead of epochs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub max_steps: Option<u64>,
    /// Number of rows in one optimizer step, over all ranks together.
    #[schemars(range(min = 1, max = 65536))]
    pub batch_size: u32,
    /// Peak learning rate.
    #[schemars(range(min = 1e-9, max = 10.0))]
    pub learning_rate: f64,
    /// Course of the learning rate after the warm-up.
    pub schedule: Schedule,
    /// Share of the steps in which the learning rate rises from zero to its peak.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub warmup_ratio: f64,
    /// Number of forward and backward passes over which the rows of one optimizer step are divided: the same result in
    /// less memory.
    #[schemars(range(min = 1, max = 65536))]
    pub accumulate_steps: u32,
    /// Update rule.
    pub optimizer: Optimizer,
    /// Momentum; used by SGD and RMSprop.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub momentum: f64,
    /// Decay of the mean of the gradients; used by Adam and AdamW.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub beta1: f64,
    /// Decay of the mean of the squared gradients; used by Adam, AdamW and RMSprop.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub beta2: f64,
    /// Number that the update rules add to their denominator.
    #[schemars(range(min = 1e-12, max = 1.0))]
    pub epsilon: f64,
    /// Decoupled weight decay; used by AdamW. Biases and normalisation weights do not decay.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub weight_decay: f64,
    /// Factor of the sum of the weights' absolute values, which is added to the objective. Biases and normalisation
    /// weights are not counted.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l1: f64,
    /// Twice the factor of the sum of the weights' squares, which is added to the objective. Biases and normalisation
    /// weights are not counted.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l2: f64,
    /// Dropout probability of hidden states and attention in the encoder. Absent: the values in the model's
    /// config.json.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: Option<f64>,
    /// Largest norm of all gradients together; larger gradients are scaled down to it. 0 turns clipping off.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub clip_norm: f64,
    /// Seed for initial weights, the order of rows and dropout.
    #[schemars(range(min = 0))]
    pub seed: i64,
    /// Number format of the matrix products.
    pub precision: Precision,
    /// Number of tokens to which longer texts are cut.
    #[schemars(range(min = 8, max = 8192))]
    pub max_sequence_length: u32,
    /// Whether several short rows share one sequence of maxSequenceLength tokens, so that the steps of a training have
    /// about the same number of tokens; no row sees another. Requires the task CausalLanguageModel.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub packing: bool,
    /// Search for the best values of some hyperparameters, which the job then trains with. Absent: no search.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search: Option<SearchSpec>,
    /// Cross-validation, which estimates how much the score varies: before the job's own training, one training for
    /// each fold, on the training rows without the fold, evaluated on the fold (never on test rows). Mean and standard
    /// deviation are in the report and in the summary's metrics with the prefix crossValidation/; a search compares its
    /// trials by the mean. An interrupted job continues with the first unfinished fold, from the beginning of that
    /// fold. Absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cross_validation: Option<CrossValidationSpec>,
}

impl Default for Hyperparameters {
    fn default() -> Self {
        Self {
            epochs: None,
            max_steps: None,
            batch_size: 32,
            learning_rate: 5e-5,
            schedule: Schedule::Linear,
            warmup_ratio: 0.1,
            accumulate_steps: 1,
            optimizer: Optimizer::AdamW,
            momentum: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            l1: 0.0,
            l2: 0.0,
            dropout: None,
            clip_norm: 1.0,
            seed: 0,
            precision: Precision::Auto,
            max_sequence_length: 128,
            packing: false,
            search: None,
            cross_validation: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Schedule {
    /// The learning rate stays at its peak.
    Constant,
    /// The learning rate falls linearly to zero.
    Linear,
    /// The learning rate falls to zero along a half cosine.
    Cosine,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Optimizer {
    SGD,
    Adam,
    AdamW,
    RMSprop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Precision {
    /// BF16 if the hardware computes in it, otherwise FP32.
    Auto,
    FP32,
    /// Weights and optimizer in FP32, matrix products in bfloat16.
    BF16,
}
