//! Which training rows are trained on.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;
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
    /// Whose view of the rows it goes by, where there is a teacher; without one it is the model's.
    #[serde(default)]
    pub viewer: SelectViewer,
    /// Only rows whose label the job's teacher finds this probable, such as "0.8", can be chosen: of the others the label may be
    /// wrong, or the text says little. Absent: all rows can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = [rules::FROM_0_TO_1]))]
    pub minimum_agreement: Option<Decimal>,
    /// The job fails before it trains where the selection covers less than this share of the clusters of all rows, such as "0.9".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_coverage: Option<Decimal>,
}

/// Who looks at the rows: mean-pooled vectors, and a linear classifier on them that is fitted to one half of the rows and asked
/// about the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelectViewer {
    #[default]
    Teacher,
    /// The model as it is before training: what it finds hard may be easy for the teacher. Not for a fresh student, who knows nothing.
    Model,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelectMethod {
    /// Any rows: what the others have to be better than.
    Random,
    /// The rows a linear classifier is least sure about (Settles 2009).
    Uncertainty,
    /// The rows nearest to the centres of k-means, one a cluster.
    ClusterCenter,
    /// Rows whose gradients of the last layer point where those of all rows do together, by orthogonal matching pursuit (after
    /// Killamsetty et al. 2021).
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
