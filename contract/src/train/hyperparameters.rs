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
    /// Passes over the training rows. Absent together with maxSteps: 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub epochs: Option<u32>,
    /// Optimizer steps, instead of epochs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub max_steps: Option<u64>,
    /// Rows of one optimizer step over all ranks together.
    #[schemars(range(min = 1, max = 65536))]
    pub batch_size: u32,
    /// Peak learning rate.
    #[schemars(range(min = 1e-9, max = 10.0))]
    pub learning_rate: f64,
    /// How the learning rate goes on after the warm-up.
    pub schedule: Schedule,
    /// Share of the steps in which the learning rate grows from zero.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub warmup_ratio: f64,
    /// Forward and backward passes that the rows of one optimizer step are dealt over: the same result in less memory.
    #[schemars(range(min = 1, max = 65536))]
    pub accumulate_steps: u32,
    /// The update rule.
    pub optimizer: Optimizer,
    /// Momentum of SGD and RMSprop.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub momentum: f64,
    /// Adam's and AdamW's decay of the gradients' mean.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub beta1: f64,
    /// Adam's and AdamW's decay of the squares' mean; RMSprop's too.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub beta2: f64,
    /// What the update rules add to a denominator.
    #[schemars(range(min = 1e-12, max = 1.0))]
    pub epsilon: f64,
    /// Decoupled weight decay, AdamW's alone; biases and normalisation weights are left out.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub weight_decay: f64,
    /// Adds l1 times the sum of the weights' absolute values to the objective; biases and normalisation weights are left out.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l1: f64,
    /// Adds l2 / 2 times the sum of the weights' squares to the objective; biases and normalisation weights are left out.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l2: f64,
    /// Dropout in the encoder, of hidden states and attention. Absent: what the model's config.json says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: Option<f64>,
    /// Largest global gradient norm; 0 turns clipping off.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub clip_norm: f64,
    /// Seed of initialisation, order of rows and dropout.
    #[schemars(range(min = 0))]
    pub seed: i64,
    /// Number format of the matrix products.
    pub precision: Precision,
    /// Longer texts are cut to this many tokens.
    #[schemars(range(min = 8, max = 8192))]
    pub max_sequence_length: u32,
    /// Tries other values of some hyperparameters first, and trains with the best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search: Option<SearchSpec>,
    /// Tells how far the score can be trusted: before the job's own training, one for each fold, on the training rows without the
    /// fold, measured on the fold (never on test rows). Mean and deviation are in the report and among the summary's metrics, with
    /// crossValidation/ in front; a search judges its trials by the mean. A job that was interrupted goes on with the first fold
    /// that is not done, from that fold's beginning. Absent: none.
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
            search: None,
            cross_validation: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Schedule {
    Constant,
    Linear,
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
    /// BF16 where the hardware computes in it, else FP32.
    Auto,
    FP32,
    /// Weights and optimizer in FP32, matrix products in bfloat16.
    BF16,
}
