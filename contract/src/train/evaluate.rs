//! Metrics and gates.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Task, rules};
use crate::Decimal;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [rules::GAIN_NEEDS_BASELINE]))]
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
    /// is the model that is being served.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048))]
    pub baseline: Option<String>,
}

/// One condition on the test rows: exactly one of `minimum`, `minimumGain` and `minimumOfTeacher`.
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
    /// Least difference to the baseline's metric; a negative number allows a loss.
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
}

impl Metric {
    /// Metrics that a task has.
    pub fn of(task: Task) -> &'static [Self] {
        match task {
            Task::TextClassification => &[Self::Accuracy, Self::MacroF1],
            Task::TextRegression => &[Self::PearsonCorrelation],
            Task::MaskedLanguageModel | Task::Embedding => &[Self::Accuracy],
        }
    }
}
