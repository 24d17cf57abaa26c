//! Selection of training rows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;
use crate::Decimal;

/// Selection of the training rows that contribute most. The report says how well they represent all rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SelectSpec {
    /// Method by which rows are chosen.
    pub method: SelectMethod,
    /// Percentage of the training rows to keep, the same for each label.
    #[schemars(range(min = 1, max = 99))]
    pub keep_percent: u8,
    /// Measure of uncertainty; used by the method Uncertainty.
    #[serde(default)]
    pub measure: UncertaintyMeasure,
    /// Seed for random selection and for initialising cluster centres.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub seed: i64,
    /// Model whose view of the rows is used. Without a teacher it is always the model itself.
    #[serde(default)]
    pub viewer: SelectViewer,
    /// Least probability, such as "0.8", that the job's teacher gives a row's label for the row to be chosen. In other
    /// rows the label may be wrong, or the text says little. Absent: all rows can be chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = [rules::FROM_0_TO_1]))]
    pub minimum_agreement: Option<Decimal>,
    /// Least share, such as "0.9", of the clusters of all rows that the selection must cover; otherwise the job fails
    /// before it trains. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_coverage: Option<Decimal>,
}

/// Model whose mean-pooled vectors represent the rows. A linear classifier on the vectors is fitted to one half of the
/// rows and applied to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelectViewer {
    /// The job's teacher.
    #[default]
    Teacher,
    /// The model before training: what is hard for it may be easy for the teacher. Refused for a student with random
    /// weights.
    Model,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelectMethod {
    /// Random rows: the reference for the other methods.
    Random,
    /// Rows about which a linear classifier is least certain (Settles 2009).
    Uncertainty,
    /// Rows nearest to the centres of k-means, one per cluster.
    ClusterCenter,
    /// Rows whose gradients of the last layer together have the direction of the gradient of all rows, found by
    /// orthogonal matching pursuit (after Killamsetty et al. 2021).
    GradientMatching,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UncertaintyMeasure {
    /// Entropy of the probabilities.
    #[default]
    Entropy,
    /// Difference between the two highest probabilities.
    Margin,
}
