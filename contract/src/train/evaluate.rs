//! Metrics and gates.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Task, rules};
use crate::Decimal;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EvaluateSpec {
    /// Number of optimizer steps between validations, in addition to one at the end of each epoch. 0: only at the end
    /// of each epoch.
    #[schemars(range(min = 0))]
    pub every_steps: u64,
    /// Conditions that the result must meet on the test rows. A job whose result does not meet them fails with the
    /// reason GateFailed; its artifact is kept, but no ModelDeployment serves it.
    #[schemars(length(max = 32))]
    pub gates: Vec<Gate>,
    /// Artifact that is evaluated on the same test rows, as the reference of a gate's minimumGain. In a retraining it
    /// is the model that is being served. Absent: none; for the task CausalLanguageModel model.from before training.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048))]
    pub baseline: Option<String>,
    /// How answers are generated for ExactMatch and TokenF1 (CausalLanguageModel).
    #[serde(skip_serializing_if = "GenerationSpec::is_default")]
    pub generation: GenerationSpec,
}

/// Bounds of the answers that an evaluation generates. Each token is the most probable one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GenerationSpec {
    /// Largest number of rows for which an answer is generated: evenly spaced over the part, so that each source has
    /// its share.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub samples: u32,
    /// Largest number of tokens of an answer.
    #[schemars(range(min = 1, max = 32768))]
    pub max_new_tokens: u32,
}

impl Default for GenerationSpec {
    fn default() -> Self {
        Self { samples: 100, max_new_tokens: 128 }
    }
}

impl GenerationSpec {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// One condition on the test rows: exactly one of `minimum`, `maximum`, `minimumGain` and `minimumOfTeacher`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::ONE_MINIMUM]))]
pub struct Gate {
    /// Metric that the gate compares.
    pub metric: Metric,
    /// Names of the sources whose test rows are counted. Absent: all test rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32), inner(length(min = 1, max = 63)))]
    pub sources: Option<Vec<String>>,
    /// Least value of the metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum: Option<Decimal>,
    /// Largest value of the metric, for Perplexity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum: Option<Decimal>,
    /// Least improvement over the baseline's metric; a negative number allows a loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_gain: Option<Decimal>,
    /// Least ratio to the metric of the job's teacher on the same rows, such as "0.97".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_of_teacher: Option<Decimal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Metric {
    /// Share of rows with the right label, of masked tokens that were predicted, or of texts whose own pair is the
    /// nearest.
    Accuracy,
    /// Mean of the F1 scores of all labels (TextClassification).
    MacroF1,
    /// Pearson correlation between predicted and true numbers (TextRegression).
    PearsonCorrelation,
    /// Exponential of the mean cross entropy of the target tokens; smaller is better (CausalLanguageModel).
    Perplexity,
    /// Share of target tokens that are the most probable ones (CausalLanguageModel).
    TokenAccuracy,
    /// Share of generated answers that equal the expected ones, apart from white space at the ends
    /// (CausalLanguageModel).
    ExactMatch,
    /// Mean F1 score of the words that generated and expected answers have in common (CausalLanguageModel).
    TokenF1,
}

impl Metric {
    /// Metrics that a task has.
    pub fn of(task: Task) -> &'static [Self] {
        match task {
            Task::TextClassification => &[Self::Accuracy, Self::MacroF1],
            Task::TextRegression => &[Self::PearsonCorrelation],
            Task::MaskedLanguageModel | Task::Embedding => &[Self::Accuracy],
            Task::CausalLanguageModel => &[Self::Perplexity, Self::TokenAccuracy, Self::ExactMatch, Self::TokenF1],
        }
    }

    /// Whether smaller values are better.
    pub fn is_loss(self) -> bool {
        self == Self::Perplexity
    }
}
