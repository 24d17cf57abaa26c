//! Which training rows are trained on.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Decimal;

/// Trains on the rows that matter most. The report says how well they stand for all rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SelectSpec {
    /// How rows are chosen.
    pub method: SelectMethod,
    /// Percent of the training rows, of each label alike.
    #[schemars(range(min = 1, max = 99))]
    pub keep_percent: u8,
    /// What Uncertainty means.
    #[serde(default)]
    pub measure: UncertaintyMeasure,
    /// Of Random, and of the clusters' beginnings.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub seed: i64,
    /// The job fails before it trains where the selection covers less than this share of the clusters of all rows, such as "0.9".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_coverage: Option<Decimal>,
}

/// Rows are told by the teacher's view of them where there is a teacher, else by the model's own before training: mean-pooled
/// vectors, and a linear classifier on them that is fitted to one half of the rows and asked about the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelectMethod {
    /// Any rows: what the others have to be better than.
    Random,
    /// The rows a linear classifier is least sure about (Settles 2009).
    Uncertainty,
    /// The rows nearest to the centres of k-means, one a cluster.
    ClusterCenter,
    /// Rows whose gradients of the last layer add up to those of all rows, by orthogonal matching pursuit (Killamsetty et al. 2021).
    GradientMatching,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UncertaintyMeasure {
    /// The entropy of the probabilities.
    #[default]
    Entropy,
    /// The distance between the two highest probabilities.
    Margin,
}
