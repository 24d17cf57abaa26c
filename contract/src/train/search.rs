//! The search for hyperparameters: which are tried, how, and what a trial is judged by.

use std::{collections::BTreeMap, fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{
    Deserialize, Serialize,
    de::{IntoDeserializer, value::Error},
};

use super::{Hyperparameters, Metric, rules};
use crate::Decimal;

/// Trials of the same training with other hyperparameters. The best of them, by its metric on the validation rows, is what the job
/// trains with; the test rows are looked at once, after that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::ASHA_ALONE]))]
pub struct SearchSpec {
    /// How the next trial is chosen.
    #[serde(default)]
    pub algorithm: SearchAlgorithm,
    /// Different assignments that are tried, failed ones included.
    #[serde(default = "twenty")]
    #[schemars(range(min = 1, max = 256))]
    pub max_trials: u32,
    /// Trials at the same time.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub parallelism: u32,
    /// What a trial is judged by, on the validation rows or over the folds of crossValidation.
    #[serde(default)]
    pub objective: SearchObjective,
    /// The hyperparameters that are searched for; the others are as the job has them.
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub parameters: Vec<SearchParameter>,
    /// Settings of algorithm ASHA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asha: Option<AshaSpec>,
    /// The same seed, specification and results give the same trials.
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
    /// Every trial is drawn on its own.
    Random,
    /// Trials are drawn where good ones were denser than bad ones: tree-structured Parzen estimators.
    #[default]
    TPE,
    /// Random trials get a small budget first, and the better of them more: asynchronous successive halving.
    ASHA,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SearchObjective {
    /// Measured on the validation rows; where the job has crossValidation, the mean over its folds. It has to be one of the task's:
    /// TextRegression has no Accuracy, and is refused until PearsonCorrelation is named here.
    pub metric: Metric,
    /// Which way is better.
    pub goal: SearchGoal,
}

impl Default for SearchObjective {
    fn default() -> Self {
        Self { metric: Metric::Accuracy, goal: SearchGoal::Maximize }
    }
}

impl SearchObjective {
    /// The metric's key in the `TrainSummary::metrics` of a trial of `job`: `validation/accuracy`, or `crossValidation/accuracy`.
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
    /// The hyperparameter.
    pub name: ParameterName,
    /// Every number between two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<ParameterRange>,
    /// These numbers alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub values: Option<Vec<f64>>,
    /// These names alone, such as AdamW and SGD.
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
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// Whether differences or ratios are drawn evenly.
    #[serde(default)]
    pub scale: ParameterScale,
    /// Distance between neighbours, counted from min. Absent: 1 for whole numbers, else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<f64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ParameterScale {
    #[default]
    Linear,
    /// For learning rates and penalties: 1e-5 to 1e-4 is drawn as often as 1e-4 to 1e-3.
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

/// Budgets of asynchronous successive halving: at most one of `minimumSteps` and `minimumEpochs`. The largest budget is the job's
/// own maxSteps or epochs; each smaller one is the next larger one over the reduction factor, as long as the minimum is kept, and
/// there are ten at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [rules::STEPS_OR_EPOCHS]))]
pub struct AshaSpec {
    /// One of so many trials goes on with so many times the budget.
    #[schemars(range(min = 2, max = 16))]
    pub reduction_factor: u32,
    /// Fewest optimizer steps of a trial, where the job has maxSteps. Absent: a hundredth of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub minimum_steps: Option<u64>,
    /// Fewest epochs of a trial, where the job has epochs. Absent: 1.
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
