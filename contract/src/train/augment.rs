//! New training texts, whose targets are the teacher's outputs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// New texts made from the training rows; their targets are the teacher's outputs, so they need no labels (as in
/// TinyBERT, Jiao et al. 2020). Half of them start as a row, half as the beginning of one row followed by the end of
/// another; then words are replaced by words with similar embeddings in the teacher. Validation and test rows are not
/// used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AugmentSpec {
    /// Number of new texts for each training row.
    #[schemars(range(min = 1, max = 100))]
    pub copies: u8,
    /// Percentage of a new text's words that are replaced.
    #[serde(default = "replaced_percent")]
    #[schemars(range(min = 0, max = 100))]
    pub replaced_percent: u8,
    /// Seed for choosing rows, words and replacements.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub seed: i64,
}

fn replaced_percent() -> u8 {
    30
}
