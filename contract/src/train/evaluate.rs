//! Metrics and gates.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Task, rules};
use crate::Decimal;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [rules::GAIN_NEEDS_BASELINE]))]
pub struct EvaluateSpec {
    /// Validate every so many steps besides at the end of each epoch; 0: only at the end of each epoch.
    #[schemars(range(min = 0))]
    pub every_steps: u64,
    /// What the result must be worth on the test rows. A job whose gates fail ends as Failed with reason GateFailed; its artifact
    /// stays, but no ModelDeployment takes it.
    #[schemars(length(max = 32))]
    pub gates: Vec<Gate>,
    /// An artifact evaluated on the same test rows, which `minimumGain` of a gate compares with (in a retraining: the champion).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048))]
    pub baseline: Option<String>,
}

/// One condition on the test rows: exactly one of `minimum`, `minimumGain` and `minimumOfTeacher`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::ONE_MINIMUM]))]
pub struct Gate {
    /// What is measured.
    pub metric: Metric,
    /// Only rows of the sources with these names. Absent: all test rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32), inner(length(min = 1, max = 63)))]
    pub sources: Option<Vec<String>>,
    /// The metric must be at least this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum: Option<Decimal>,
    /// The metric must be at least the baseline's plus this; negative allows a loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_gain: Option<Decimal>,
    /// The metric must be at least this share of what the job's teacher has on the same rows, such as "0.97".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_of_teacher: Option<Decimal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Metric {
    /// Share of the rows with the right label; of the masked tokens predicted; of the texts whose own pair is the nearest.
    Accuracy,
    /// Of classes alone.
    MacroF1,
    /// Of numbers alone.
    PearsonCorrelation,
}

impl Metric {
    /// Those that a task's results have.
    pub fn of(task: Task) -> &'static [Self] {
        match task {
            Task::TextClassification => &[Self::Accuracy, Self::MacroF1],
            Task::TextRegression => &[Self::PearsonCorrelation],
            Task::MaskedLanguageModel | Task::Embedding => &[Self::Accuracy],
        }
    }
}
