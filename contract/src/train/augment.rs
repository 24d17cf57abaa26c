//! New training texts, for a student to ask its teacher about.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Makes new texts from the training rows, which nobody has to label: the student learns what the teacher says of them (as in
/// TinyBERT, Jiao et al. 2020). Half of them are a row, half the beginning of one row before the end of another; then words give
/// way to words that the teacher reads alike. Validation and test rows have no part in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AugmentSpec {
    /// New texts for each training row.
    #[schemars(range(min = 1, max = 100))]
    pub copies: u8,
    /// Percent of a new text's words that give way to another.
    #[serde(default = "replaced_percent")]
    #[schemars(range(min = 0, max = 100))]
    pub replaced_percent: u8,
    /// Of all that is drawn.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub seed: i64,
}

fn replaced_percent() -> u8 {
    30
}
