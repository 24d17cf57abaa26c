//! Search for hyperparameters: which values are tried, in which order, and how trials are compared.

use std::{collections::BTreeMap, fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{
    Deserialize, Serialize,
    de::{IntoDeserializer, value::Error},
};

use super::{Hyperparameters, Metric, rules};
use crate::Decimal;

/// Trials of the same training with different hyperparameters. The job trains with the values of the best trial, by the
/// metric on the validation rows; only the job's own result is evaluated on the test rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::ASHA_ALONE]))]
pub struct SearchSpec {
    /// Algorithm that chooses the next trial.
    #[serde(default)]
    pub algorithm: SearchAlgorithm,
    /// Number of different assignments to try, including those that fail.
    #[serde(default = "twenty")]
    #[schemars(range(min = 1, max = 256))]
    pub max_trials: u32,
    /// Largest number of concurrent trials.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub parallelism: u32,
    /// Metric by which trials are compared, on the validation rows or over the folds of crossValidation.
    #[serde(default)]
    pub objective: SearchObjective,
    /// Hyperparameters to search for; the others have the job's values.
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub parameters: Vec<SearchParameter>,
    /// Settings of the algorithm ASHA. Absent: its defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asha: Option<AshaSpec>,
    /// Seed of the search: the same seed, specification and results give the same trials.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub seed: i64,
}

fn twenty() -> u32 {
    20
}

fn one() -> u32 {
    1
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SearchAlgorithm {
    /// Each trial is drawn independently.
    Random,
    /// Trials are drawn where good trials were denser than bad ones (tree-structured Parzen estimators).
    #[default]
    TPE,
    /// Random trials get a small budget first, and the better ones of them more (asynchronous successive halving).
    ASHA,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SearchObjective {
    /// Metric on the validation rows; with crossValidation the mean over its folds. The task must have it:
    /// TextRegression requires PearsonCorrelation.
    pub metric: Metric,
    /// Whether larger or smaller values are better.
    pub goal: SearchGoal,
}

impl Default for SearchObjective {
    fn default() -> Self {
        Self { metric: Metric::Accuracy, goal: SearchGoal::Maximize }
    }
}

impl SearchObjective {
    /// The metric's key in the `TrainSummary::metrics` of a trial of `job`: `validation/accuracy`, or
    /// `crossValidation/accuracy`.
    pub fn key(&self, job: &Hyperparameters) -> String {
        let measured = if job.cross_validation.is_some() { "crossValidation" } else { "validation" };
        let name = format!("{:?}", self.metric);
        let (first, rest) = name.split_at(1);
        format!("{measured}/{}{rest}", first.to_lowercase())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SearchGoal {
    Maximize,
    Minimize,
}

/// One hyperparameter: exactly one of `range`, `values` and `choices`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::RANGE_VALUES_OR_CHOICES, rules::CHOICES_ARE_NAMES]))]
pub struct SearchParameter {
    /// Name of the hyperparameter.
    pub name: ParameterName,
    /// Range of numbers to draw from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<ParameterRange>,
    /// Numbers to choose from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub values: Option<Vec<f64>>,
    /// Names to choose from, such as AdamW and SGD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), inner(length(min = 1, max = 63)))]
    pub choices: Option<Vec<String>>,
}

/// Numbers from `min` to `max`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    rules::MIN_BELOW_MAX, rules::LOG_ABOVE_ZERO, rules::STEP_IS_LINEAR, rules::STEP_ABOVE_ZERO]))]
pub struct ParameterRange {
    /// Smallest number.
    pub min: f64,
    /// Largest number.
    pub max: f64,
    /// Scale on which numbers are drawn evenly.
    #[serde(default)]
    pub scale: ParameterScale,
    /// Distance between neighbouring numbers, counted from min. Absent: 1 for integers, otherwise any number in the
    /// range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<f64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ParameterScale {
    /// Numbers are drawn evenly.
    #[default]
    Linear,
    /// Logarithms are drawn evenly: 1e-5 to 1e-4 is drawn as often as 1e-4 to 1e-3. Suits learning rates and penalties.
    Log,
}

/// Hyperparameters that can be searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ParameterName {
    AccumulateSteps,
    BatchSize,
    Beta1,
    Beta2,
    ClipNorm,
    Dropout,
    Epochs,
    Epsilon,
    L1,
    L2,
    LearningRate,
    MaxSequenceLength,
    MaxSteps,
    Momentum,
    Optimizer,
    Precision,
    Schedule,
    Seed,
    WarmupRatio,
    WeightDecay,
}

impl fmt::Display for ParameterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl FromStr for ParameterName {
    type Err = Error;

    /// The name as it is written in a manifest, such as `learningRate`.
    fn from_str(text: &str) -> Result<Self, Error> {
        Self::deserialize(text.into_deserializer())
    }
}

/// Budgets of asynchronous successive halving: at most one of `minimumSteps` and `minimumEpochs`. The largest budget is
/// the job's maxSteps or epochs; each smaller one is the next larger one divided by the reduction factor, down to the
/// minimum. There are at most ten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [rules::STEPS_OR_EPOCHS]))]
pub struct AshaSpec {
    /// Factor between budgets: one of this many trials continues with this many times the budget.
    #[schemars(range(min = 2, max = 16))]
    pub reduction_factor: u32,
    /// Smallest number of optimizer steps of a trial, if the job has maxSteps. Absent: a hundredth of maxSteps.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub minimum_steps: Option<u64>,
    /// Smallest number of epochs of a trial, if the job has epochs. Absent: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub minimum_epochs: Option<u32>,
}

impl Default for AshaSpec {
    fn default() -> Self {
        Self { reduction_factor: 3, minimum_steps: None, minimum_epochs: None }
    }
}

/// A trial of the search that a job's hyperparameters come from, for its report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrialOutcome {
    /// A hash of its values.
    pub name: String,
    /// The hyperparameters that were searched for, with the trial's values.
    pub parameters: BTreeMap<String, String>,
    /// The objective's metric after each budget that the trial was given.
    pub results: Vec<Decimal>,
    pub failed: bool,
    /// Whether the job trains with its values.
    pub best: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::CrossValidationSpec;

    #[test]
    fn a_short_search_gets_every_default() {
        let search: SearchSpec =
            serde_json::from_str(r#"{"parameters": [{"name": "learningRate", "values": [1e-5, 5e-5]}]}"#).unwrap();
        assert_eq!((search.algorithm, search.max_trials, search.parallelism), (SearchAlgorithm::TPE, 20, 1));
        let plain = Hyperparameters::default();
        assert_eq!(search.objective.key(&plain), "validation/accuracy");
        let f1 = SearchObjective { metric: Metric::MacroF1, goal: SearchGoal::Maximize };
        let folded = Hyperparameters { cross_validation: Some(CrossValidationSpec { folds: 5 }), ..plain };
        assert_eq!(f1.key(&folded), "crossValidation/macroF1", "as the trainer names it");
        assert_eq!("weightDecay".parse(), Ok(ParameterName::WeightDecay));
        assert_eq!(ParameterName::L1.to_string(), "l1");
        assert!("weightdecay".parse::<ParameterName>().unwrap_err().to_string().contains("weightDecay"));
        let again = serde_json::to_string(&search).unwrap();
        assert_eq!(serde_json::from_str::<SearchSpec>(&again).unwrap(), search);
    }
}
